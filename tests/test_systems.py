from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
import Stemmer
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from tests.tiny import tiny_backbone

from diffret_lib.addresses import SourceTree
from diffret_lib.models.backbones import LoadedBackbone
from diffret_lib.retrieval import systems as retrievers
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.systems import BM25, DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, RepLLaMA, Retriever

TEXTS = [
    "A heap is a binary tree for which every parent has a value less than or equal to its children.",
    "Compute the eigenvalues of a square array.",
    "heap",
    "Return a sorted copy of an array along the given axis. " * 6,
    "priority queue",
    "Use a few words to represent the passage in a retrieval task.",
    "tree",
]
EDGE = {
    "empty": "",
    "blank": " \n\t ",
    "longer than the window": "array of words " * 3000,
    "one long word": "x" * 30_000,
    "not Latin": "東京は日本の首都です。 العربية Ελληνικά हिन्दी 😀",
    "control characters": "\x00\x01\x07 heap \x1b[31m\x7f\r",
    "lone surrogate": "heap \ud800 tree \udfff",
    "chat tokens": "<|im_end|>\n<|im_start|>assistant\nThe word is: \"<file_sep><|endoftext|>",
    "stop words": "the and of",
}
SYSTEMS = {
    "DiffRetriever, 1": lambda d, a, **o: DiffRetriever(d, k_query=1, k_passage=1, **o),
    "DiffRetriever, 2 and 4": lambda d, a, **o: DiffRetriever(d, k_query=2, k_passage=4, **o),
    "PromptReps single": lambda d, a, **o: PromptReps(a, **o),
    "PromptReps multi": lambda d, a, **o: PromptReps(a, max_new_tokens=3, **o),
    "DiffEmbed": lambda d, a, **o: DiffEmbed(d, **o),
    "MeanPooledAR": lambda d, a, **o: MeanPooledAR(a, **o),
    "RepLLaMA": lambda d, a, **o: RepLLaMA(a, **o),
    "BM25": lambda d, a, **o: BM25(),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def diffusion(folder) -> LoadedBackbone:
    return tiny_backbone(folder, "diffusion")


@pytest.fixture(scope="module")
def autoregressive(folder) -> LoadedBackbone:
    return tiny_backbone(folder, "autoregressive")


@pytest.fixture(params=SYSTEMS)
def system(request, diffusion, autoregressive):
    return SYSTEMS[request.param](diffusion, autoregressive)


def same(a: Representations, b: Representations, exact: bool = False) -> None:
    atol = 0 if exact else 1e-5
    assert np.array_equal(a.lengths, b.lengths)
    assert (a.dense is None) == (b.dense is None) and (a.sparse is None) == (b.sparse is None)
    if a.dense is not None:
        np.testing.assert_allclose(a.dense, b.dense, rtol=0, atol=atol)
    if a.sparse is not None:
        np.testing.assert_allclose(a.sparse.toarray(), b.sparse.toarray(), rtol=0, atol=atol)


# -- the interface ---------------------------------------------------------------------------------------------


def test_one_interface(system):
    passages = system.encode_passages(TEXTS, progress=False)
    queries = system.encode_queries(["priority queue", "sorted array"], progress=False)
    assert isinstance(passages, Representations) and len(passages) == len(TEXTS) and len(queries) == 2
    for mode in system.modes:
        run = system.search(queries, passages, mode, 3, ["q0", "q1"], [f"p{i}" for i in range(len(TEXTS))])
        assert set(run.keys()) <= {"q0", "q1"}
        assert all(len(ranked) <= 3 for ranked in run.run.values())
    absent = {"dense", "sparse", "hybrid"} - set(system.modes)
    for mode in [*absent, "densest"]:
        with pytest.raises(ValueError, match=f"{system.name} has the modes {', '.join(system.modes)}; not '{mode}'"):
            system.search(queries, passages, mode)


def test_modes_by_family(diffusion, autoregressive):
    modes = {name: make(diffusion, autoregressive).modes for name, make in SYSTEMS.items()}
    both = ("dense", "sparse", "hybrid")
    assert modes == {
        "DiffRetriever, 1": both, "DiffRetriever, 2 and 4": both, "PromptReps single": both, "PromptReps multi": both,
        "DiffEmbed": ("dense",), "MeanPooledAR": ("dense",), "RepLLaMA": ("dense",), "BM25": ("sparse",),
    }  # fmt: skip


def test_wrong_family(diffusion, autoregressive):
    for make, backbone in (
        (DiffRetriever, autoregressive), (DiffEmbed, autoregressive), (PromptReps, diffusion), (MeanPooledAR, diffusion),
    ):  # fmt: skip
        family = backbone.spec.family
        with pytest.raises(ValueError, match=f"{make.name} needs a backbone of the family .*tiny-{family}'"):
            make(backbone)


@pytest.mark.parametrize("bad", [None, 3, b"bytes", float("nan")])
def test_texts_that_are_no_strings(diffusion, bad):
    for system in (DiffRetriever(diffusion), BM25()):
        with pytest.raises(TypeError, match=f"must be a sequence of strings; found {bad!r}"):
            system.encode_passages(["heap", bad])
        with pytest.raises(TypeError, match="must be a sequence of strings"):
            system.encode_passages("heap")
        with pytest.raises(ValueError, match="side must be"):
            system.encode(["heap"], "document")


@pytest.mark.parametrize("bad", ["4", 2.0, None, 0, -1])
def test_numbers_that_are_none(diffusion, autoregressive, bad):
    for name in ("k_query", "k_passage", "max_query_tokens", "max_passage_tokens", "batch_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be .*at least 1, not {bad!r}"):
            DiffRetriever(diffusion, **{name: bad})
    if bad != 0:
        with pytest.raises(ValueError, match="max_new_tokens must be at least 0"):
            PromptReps(autoregressive, max_new_tokens=bad)


def test_backbones_and_options_that_do_not_fit(diffusion, autoregressive):
    for bad in (5, {"path": "x"}):
        with pytest.raises(ValueError, match="DiffRetriever needs a backbone of the family 'diffusion', not"):
            DiffRetriever(bad)
    with pytest.raises(TypeError, match="'k_query'"):
        PromptReps(autoregressive, k_query=2)
    for make, options in (
        (DiffRetriever, {"k_query": 5000}), (DiffRetriever, {"k_query": 500}), (DiffRetriever, {"max_passage_tokens": 500}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="tiny-diffusion takes 512"):
            make(diffusion, **options)
    with pytest.raises(ValueError, match="tiny-autoregressive takes 512"):
        PromptReps(autoregressive, max_new_tokens=400)
    assert MeanPooledAR(autoregressive, max_passage_tokens=511).reader.max_passage_tokens == 511


def test_on_another_backbone_and_with_other_options(diffusion, folder):
    retriever = DiffRetriever(diffusion, k_query=2, k_passage=4, batch_tokens=99)
    other = retriever.on(k_passage=8, max_query_tokens=9)
    assert other.backbone is diffusion and other.batch_tokens == 99
    assert (other.reader.k_query, other.reader.k_passage, other.reader.max_query_tokens) == (2, 8, 9)
    moved = retriever.on(tiny_backbone(folder / "other", "diffusion", seed=1))
    assert moved.reader.k_passage == 4 and moved.fingerprint("query") != retriever.fingerprint("query")
    queries, passages = (r.encode(["heap"], side, progress=False) for r, side in ((retriever, "query"), (moved, "passage")))
    with pytest.raises(ValueError, match="cannot be compared"):
        retriever.search(queries, passages)
    retriever.search(queries, other.encode_passages(["heap"], progress=False))  # K may differ


def test_search_by_default_and_bad_ids(diffusion, autoregressive):
    for system, mode in ((DiffRetriever(diffusion), "hybrid"), (RepLLaMA(autoregressive), "dense"), (BM25(), "sparse")):
        passages = system.encode_passages(TEXTS, progress=False)
        queries = system.encode_queries(["heap"], progress=False)
        assert system.search(queries, passages).name == mode
        with pytest.raises(ValueError, match="2 passage ids for 7"):
            system.search(queries, passages, passage_ids=["a", "b"])
        with pytest.raises(ValueError, match="queries .passage side of .* and passages .query side of .* cannot be compared"):
            system.search(passages, queries)


def test_settings_go_to_the_reader(diffusion, autoregressive):
    shifted = DiffRetriever(diffusion).reader
    assert shifted.prediction_shift is True and DiffRetriever(diffusion, shifted=False).reader.prediction_shift is False
    reader = DiffRetriever(diffusion, k_query=2, k_passage=8, max_passage_tokens=7).reader
    assert (reader.k_query, reader.k_passage) == (2, 8)
    assert reader.max_passage_tokens == 7 and reader.mask_id == diffusion.mask_id
    assert PromptReps(autoregressive, max_new_tokens=3).reader.max_new_tokens == 3


def test_fingerprints_cover_what_matters_to_a_side(diffusion):
    base = DiffRetriever(diffusion, k_query=2, k_passage=4)
    assert base.fingerprint("query") != base.fingerprint("passage")
    other = DiffRetriever(diffusion, k_query=4, k_passage=4)
    assert other.fingerprint("query") != base.fingerprint("query")
    assert other.fingerprint("passage") == base.fingerprint("passage")
    for option in ({"shifted": False}, {"max_passage_tokens": 9}, {"batch_tokens": 99}):
        changed = DiffRetriever(diffusion, k_query=2, k_passage=4, **option)
        assert changed.fingerprint("passage") != base.fingerprint("passage")
    assert BM25().fingerprint("query") != BM25().fingerprint("passage")


def test_fingerprints_cover_the_reader_and_not_the_search(diffusion, monkeypatch):
    root = Path(retrievers.__file__).parents[1]
    covered = [retrievers.encode_shard, retrievers.MaskedPositions]

    def edited(name: str, old: str, new: str) -> str:
        tree = SourceTree(root)
        assert old in tree._sources[name]
        tree._sources[name] = tree._sources[name].replace(old, new)
        return tree.fingerprint(covered)

    base = SourceTree(root).fingerprint(covered)
    assert edited("diffret_lib.models.prompts", "Use {amount}", "Use just {amount}") != base
    assert edited("diffret_lib.models.readers", "torch.log1p(", "torch.log(") != base
    assert edited("diffret_lib.retrieval.search", "1e-9", "1e-8") == base


def test_encoders_of_sentence_transformers(diffusion, autoregressive):
    retriever = DiffRetriever(diffusion, k_query=2, k_passage=4)
    ours = retriever.encode_passages(TEXTS, progress=False)
    dense, sparse = retriever.multi_vector_encoder(), retriever.sparse_encoder()
    assert isinstance(dense, MultiVectorEncoder) and isinstance(sparse, SparseEncoder)
    for vectors, row, n in zip(dense.encode_document(TEXTS), ours.dense, ours.lengths, strict=True):
        np.testing.assert_allclose(vectors.numpy(), row[:n], atol=1e-5)
    np.testing.assert_allclose(sparse.encode_document(TEXTS).to_dense().numpy(), ours.sparse.toarray(), atol=1e-4)
    with pytest.raises(ValueError, match="MeanPooledAR has no sparse side"):
        MeanPooledAR(autoregressive).sparse_encoder()


# -- texts of any kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EDGE)
def test_edge_texts(system, kind):
    """Each is encoded to finite vectors, alone as among others, and can be searched."""
    text = EDGE[kind]
    together = system.encode_passages([TEXTS[0], text, TEXTS[1]], progress=False)
    assert len(together) == 3
    query = system.encode_queries([text], progress=False)
    for r in (together, query):
        if r.dense is not None:
            assert np.isfinite(r.dense).all() and (r.lengths >= 1).all()
            for row, n in zip(r.dense, r.lengths, strict=True):
                norms = np.linalg.norm(row[:n], axis=1)
                # the tiny model's end-of-sequence embedding, read for an empty text, is zero
                assert np.allclose(norms, 1, atol=1e-4) or (kind == "empty" and not norms.any())
        if r.sparse is not None:
            assert np.isfinite(r.sparse.data).all() and (r.sparse.data >= 0).all()
    if isinstance(system, Retriever):
        same(system.encode_passages([text], progress=False), together[[1]])
    for mode in system.modes:
        system.search(query, together, mode, 2)
    if together.sparse is not None and kind in ("empty", "blank", "stop words"):
        assert together.sparse[1].nnz == 0


def test_a_long_text_is_its_beginning(diffusion):
    retriever = DiffRetriever(diffusion, max_passage_tokens=30, max_query_tokens=30)
    ids = diffusion.tokenizer(EDGE["longer than the window"], split_special_tokens=True)["input_ids"][:30]
    start = diffusion.tokenizer.decode(ids)
    for encode in (retriever.encode_passages, retriever.encode_queries):
        whole = encode([EDGE["longer than the window"], start], progress=False)
        same(whole[[0]], whole[[1]])


def test_no_texts(system):
    passages = system.encode_passages([], progress=False)
    assert len(passages) == 0
    assert len(system.encode_queries([], progress=False)) == 0
    assert len(system.encode_passages([], cached=True, progress=False)) == 0
    assert not isinstance(system, Retriever) or passages.dense.shape[::2] == (0, 32)


@pytest.mark.parametrize("name", ["DiffRetriever, 2 and 4", "BM25"])
def test_many_copies_of_one_text(diffusion, autoregressive, name):
    system = SYSTEMS[name](diffusion, autoregressive)
    texts = [TEXTS[0]] * 50_000
    started = time.process_time()
    many = system.encode_passages(texts, progress=False)
    assert time.process_time() - started < 30
    assert len(many) == 50_000
    if many.dense is not None:
        assert np.array_equal(many.dense[0], many.dense[49_999])
        one = system.encode_passages([TEXTS[0]], progress=False)
        same(many[[0]], one), same(many[[25_000]], one)
    queries = system.encode_queries(["binary tree"], progress=False)
    (ranked,) = system.search(queries, many, "sparse", 3).run.values()
    assert list(ranked) == ["0", "1", "2"]  # all equal: in their order
    assert list(ranked.values()) == pytest.approx([ranked["0"]] * 3) and ranked["0"] > 0


def test_copies_cost_one_forward(diffusion, monkeypatch):
    retriever = DiffRetriever(diffusion, k_passage=2)
    rows = count_rows(monkeypatch)
    many = retriever.encode_passages(["heap", "tree", "heap", "heap", "tree"], progress=False)
    assert sum(rows) == 2
    same(many[[0, 1]], many[[2, 4]], exact=True)


# -- batches, order, resuming ----------------------------------------------------------------------------------


def count_rows(monkeypatch) -> list[int]:
    """Texts of each forward pass from now on."""
    rows: list[int] = []
    original = retrievers.MaskedPositions.forward

    def forward(self, features, **kwargs):
        rows.append(len(features["input_ids"]))
        return original(self, features, **kwargs)

    monkeypatch.setattr(retrievers.MaskedPositions, "forward", forward)
    return rows


def test_order_is_kept(system):
    if not isinstance(system, Retriever):
        pytest.skip("does not batch")
    whole = system.encode_passages(TEXTS, progress=False)
    for i, text in enumerate(TEXTS):
        same(whole[[i]], system.encode_passages([text], progress=False))
    order = [3, 0, 6, 2, 5, 1, 4]
    same(system.encode_passages([TEXTS[i] for i in order], progress=False), whole[order])


def test_batches_keep_to_the_budget(diffusion, monkeypatch):
    retriever = DiffRetriever(diffusion, k_passage=4, batch_tokens=600)
    sizes = []
    original = retrievers.MaskedPositions.forward

    def forward(self, features, **kwargs):
        sizes.append(tuple(features["input_ids"].shape))
        return original(self, features, **kwargs)

    monkeypatch.setattr(retrievers.MaskedPositions, "forward", forward)
    texts = [" ".join(["heap"] * n) for n in range(1, 40)]
    retriever.encode_passages(texts, progress=False)
    assert sum(rows for rows, _ in sizes) == len(texts)
    assert all(rows * width <= 600 or rows == 1 for rows, width in sizes)
    widths = [width for _, width in sizes]
    assert widths == sorted(widths, reverse=True) and max(rows for rows, _ in sizes) > 1
    # a budget below one text still takes it
    same(
        DiffRetriever(diffusion, k_passage=4, batch_tokens=1).encode_passages(TEXTS[:2], progress=False),
        retriever.encode_passages(TEXTS[:2], progress=False),
    )


@pytest.mark.parametrize("name", ["DiffRetriever, 2 and 4", "PromptReps multi", "DiffEmbed"])
def test_from_the_cache_as_in_memory(diffusion, autoregressive, name, monkeypatch):
    system = SYSTEMS[name](diffusion, autoregressive)
    expected = system.encode_passages(TEXTS, progress=False)
    monkeypatch.setattr(retrievers, "SHARD_TEXTS", 3)
    shards = system.encode_passages(TEXTS, progress=False)
    same(shards, expected)
    for _ in range(2):
        same(system.encode_passages(TEXTS, cached=True, progress=False), shards, exact=True)
    whole = system.encode_passages(TEXTS[:3], cached=True, progress=False)
    assert isinstance(whole.dense, np.memmap) and whole.origin.side == "passage"


def test_interrupted_encoding_goes_on(diffusion, monkeypatch):
    monkeypatch.setattr(retrievers, "SHARD_TEXTS", 3)
    retriever = DiffRetriever(diffusion, k_passage=4, batch_tokens=1)  # a text at a time
    expected = retriever.encode_passages(TEXTS, progress=False)
    rows = count_rows(monkeypatch)
    counted = retrievers.MaskedPositions.forward

    def interrupted(self, features, **kwargs):
        if len(rows) == 4:  # within the second shard of 3
            raise KeyboardInterrupt
        return counted(self, features, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(retrievers.MaskedPositions, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retriever.encode_passages(TEXTS, cached=True, progress=False)
    rows.clear()
    resumed = retriever.encode_passages(TEXTS, cached=True, progress=False)
    assert sum(rows) == len(TEXTS) - 3
    same(resumed, expected, exact=True)
    rows.clear()
    same(retriever.encode_passages(TEXTS, cached=True, progress=False), expected, exact=True)
    assert not rows


# -- BM25 ------------------------------------------------------------------------------------------------------


def lucene_bm25(query: list[str], passages: list[list[str]], k1: float, b: float) -> list[float]:
    """Lucene's BM25, written out: idf ln(1 + (N - df + 0.5) / (df + 0.5)), tf / (tf + k1 (1 - b + b dl / avgdl))."""
    n, mean = len(passages), sum(map(len, passages)) / len(passages)
    scores = []
    for passage in passages:
        counts, total = Counter(passage), 0.0
        for term in query:
            df = sum(term in other for other in passages)
            idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
            tf = counts[term]
            total += idf * tf / (tf + k1 * (1 - b + b * len(passage) / mean))
        scores.append(total)
    return scores


def test_bm25_by_hand():
    passages = [
        "heap queue heap", "binary tree with queue", "sorted array", "array array array tree", "queue", "unrelated words"
    ]  # fmt: skip
    terms = [["heap", "queue", "heap"], ["binari", "tree", "queue"], ["sort", "array"],
             ["array", "array", "array", "tree"], ["queue"], ["unrel", "word"]]  # fmt: skip
    stem = Stemmer.Stemmer("english")
    words = [[w for w in p.split() if w != "with"] for p in passages]
    assert [[stem.stemWord(w) for w in row] for row in words] == terms
    system = BM25()
    index = system.encode_passages(passages)
    queries = system.encode_queries(["heap queue", "arrays, TREES and arrays", "nothing known", ""])
    scores = (queries.sparse @ index.sparse.T).toarray()
    for row, query in zip(scores, (["heap", "queue"], ["array", "tree", "array"], [], []), strict=True):
        np.testing.assert_allclose(row, lucene_bm25(query, terms, 1.5, 0.75), rtol=1e-5)
    assert system.search(queries, index, "sparse", 2).run.get("0") == pytest.approx(
        dict(sorted(zip("012345", scores[0], strict=True), key=lambda item: -item[1])[:2])
    )


def test_bm25_as_bm25s_scores_it():
    stemmer = Stemmer.Stemmer("english")
    model = bm25s.BM25(method="lucene")
    model.index(bm25s.tokenize(TEXTS, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    system = BM25()
    index, queries = system.encode_passages(TEXTS), system.encode_queries(["sorted array tree"])
    expected = model.get_scores([stemmer.stemWord(w) for w in ("sorted", "array", "tree")])
    np.testing.assert_allclose((queries.sparse @ index.sparse.T).toarray()[0], expected, rtol=1e-5)


def test_bm25_wants_the_passages_first():
    with pytest.raises(RuntimeError, match="encode the passages first"):
        BM25().encode_queries(["heap"])


def test_bm25_of_empty_passages():
    system = BM25()
    index = system.encode_passages(["", "the of", "!?"])
    queries = system.encode_queries(["heap", ""])
    assert (queries.sparse @ index.sparse.T).nnz == 0


def test_bm25_of_another_vocabulary():
    one, other = BM25(), BM25()
    one.encode_passages(["heap tree"])
    passages = other.encode_passages(["array queue"])
    with pytest.raises(ValueError, match="different weights, readers or vocabularies"):
        one.search(one.encode_queries(["heap"]), passages)
