from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import Stemmer
import torch
from sentence_transformers import MultiVectorEncoder, SparseEncoder

from diffret_lib.models.architectures import LLaDAForCausalLM
from diffret_lib.models.backbones import LoadedBackbone
from diffret_lib.retrieval import systems as retrievers
from diffret_lib.retrieval.index import PassageIndex
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import shards_of
from diffret_lib.retrieval.systems import BM25, DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, RepLLaMA, Retriever
from tests.tiny import tiny_backbone

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
    "chat tokens": '<|im_end|>\n<|im_start|>assistant\nThe word is: "<file_sep><|endoftext|>',
    "stop words": "the and of",
}
pytestmark = pytest.mark.usefixtures("own_cache")
SYSTEMS = {
    "DiffRetriever, 1": lambda d, a, **o: DiffRetriever(d, k_query=1, k_passage=1, **o),
    "DiffRetriever, 2 and 4": lambda d, a, **o: DiffRetriever(d, k_query=2, k_passage=4, **o),
    "PromptReps single": lambda d, a, **o: PromptReps(a, **o),
    "PromptReps multi": lambda d, a, **o: PromptReps(a, max_vectors=4, **o),
    "DiffRetriever, shared text": lambda d, a, **o: DiffRetriever(d, k_query=2, k_passage=4, shared_text=True, **o),
    "DiffEmbed": lambda d, a, **o: DiffEmbed(d, **o),
    "MeanPooledAR": lambda d, a, **o: MeanPooledAR(a, **o),
    "RepLLaMA": lambda d, a, **o: RepLLaMA(a, **o),
    "BM25": lambda d, a, **o: BM25(),
}


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


def test_one_interface(system, tmp_path):
    both = ("dense", "sparse", "hybrid")
    dense = ("DiffEmbed", "MeanPooledAR", "RepLLaMA")
    assert system.modes == (("sparse",) if system.name == "BM25" else ("dense",) if system.name in dense else both)
    passages = system.encode_passages(iter(TEXTS), progress=False)
    queries = system.encode_queries(["priority queue", "sorted array"], progress=False)
    assert isinstance(passages, Representations) and len(passages) == len(TEXTS) and len(queries) == 2
    order = [3, 0, 6, 2, 5, 1, 4]
    same(system.encode_passages([TEXTS[i] for i in order], progress=False), passages[order])
    index = PassageIndex.write(tmp_path / "index", shards_of(passages, 3))
    for mode in system.modes:
        ids = ["q0", "q1"], [f"p{i}" for i in range(len(TEXTS))]
        run = system.search(queries, passages, mode, 3, *ids)
        indexed = system.search(queries, index, mode, 3, *ids)
        assert [list(ranked) for ranked in indexed.run.values()] == [list(ranked) for ranked in run.run.values()]
        assert set(run.keys()) <= {"q0", "q1"}
        assert all(len(ranked) <= 3 for ranked in run.run.values())
    assert system.search(queries, passages).name == system.modes[-1]
    for mode in [*({*both} - {*system.modes}), "densest"]:
        with pytest.raises(ValueError, match=f"{system.name} has the modes {', '.join(system.modes)}; not '{mode}'"):
            system.search(queries, passages, mode)
    with pytest.raises(ValueError, match="2 passage ids for 7"):
        system.search(queries, passages, passage_ids=["a", "b"])
    with pytest.raises(ValueError, match="passage_ids must be a list of strings, not 'abcdefg'"):
        system.search(queries, passages, passage_ids="abcdefg")
    with pytest.raises(ValueError, match=r"queries .passage side of .* and passages .query side of .* be compared"):
        system.search(passages, queries)
    for given in ((None, passages), (queries, ["heap"])):
        with pytest.raises(TypeError, match=r"(queries|passages) must be Representations, as encode_"):
            system.search(*given)
    empty = [encode([], progress=False) for encode in (system.encode_passages, system.encode_queries)]
    assert not len(empty[0]) and not len(empty[1]) and not len(system.encode_passages([], cached=True, progress=False))
    assert not isinstance(system, Retriever) or empty[0].dense.shape[::2] == (0, 32)


@pytest.mark.parametrize("bad", [None, 3, b"bytes", float("nan")])
def test_texts_that_are_no_strings(diffusion, bad):
    for system in (DiffRetriever(diffusion), BM25()):
        for texts in (["heap", bad], bad, "heap", {"heap": "tree"}):
            with pytest.raises(TypeError, match="texts must be a sequence of strings; found "):
                system.encode_passages(texts)
        with pytest.raises(ValueError, match="side must be one of 'query', 'passage', not 'document'"):
            system.encode(["heap"], "document")


@pytest.mark.parametrize("bad", ["4", 2.0, None, float("nan"), True, 0, -1, 10**30])
def test_numbers_that_are_none(diffusion, autoregressive, bad):
    for name in ("k_query", "k_passage", "max_query_tokens", "max_passage_tokens", "batch_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not {bad!r}"):
            DiffRetriever(diffusion, **{name: bad})
    with pytest.raises(ValueError, match="max_vectors must be a whole number of at least 1"):
        PromptReps(autoregressive, max_vectors=bad)
    shared = DiffRetriever(diffusion, shared_text=True)
    for counts in ([2, bad], bad, [], [2, 2], "12"):
        with pytest.raises(ValueError, match="counts must be"):
            shared.encode_counts(["heap"], "query", counts)


def test_backbones_and_options_that_do_not_fit(diffusion, autoregressive):
    for make, bad in (
        (DiffRetriever, 5), (DiffRetriever, {"path": "x"}), (DiffRetriever, autoregressive),
        (DiffEmbed, autoregressive), (PromptReps, diffusion), (MeanPooledAR, diffusion),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{make.name} needs a backbone of the family '{make.family}', not"):
            make(bad)
    with pytest.raises(TypeError, match="'k_query'"):
        PromptReps(autoregressive, k_query=2)
    for make, backbone, name, bad in (
        (DiffRetriever, diffusion, "shifted", "no"), (DiffRetriever, diffusion, "shared_text", 1),
        (DiffRetriever, diffusion, "content_from", "here"), (PromptReps, autoregressive, "stop", None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be one of .*, not {bad!r}"):
            make(backbone, **{name: bad})
    with pytest.raises(ValueError, match="several K in one pass with shared_text=True only"):
        DiffRetriever(diffusion).encode_counts(["heap"], "query", [1, 2])
    with pytest.raises(ValueError, match="tiny-diffusion takes 512"):
        DiffRetriever(diffusion, shared_text=True).encode_counts(["heap"], "query", [1, 500])
    for options in {"k_query": 2**31 - 1}, {"k_query": 500}, {"max_passage_tokens": 500}:
        with pytest.raises(ValueError, match="tiny-diffusion takes 512"):
            DiffRetriever(diffusion, **options)
    with pytest.raises(ValueError, match="tiny-autoregressive takes 512"):
        PromptReps(autoregressive, max_vectors=400)
    assert MeanPooledAR(autoregressive, max_passage_tokens=511).reader.max_passage_tokens == 511


def test_on_another_backbone_and_with_other_options(diffusion, tmp_path):
    retriever = DiffRetriever(diffusion, k_query=2, k_passage=4, batch_tokens=99)
    other = retriever.on(k_passage=8, max_query_tokens=9)
    assert other.backbone is diffusion and other.batch_tokens == 99
    assert (other.reader.k_query, other.reader.k_passage, other.reader.max_query_tokens) == (2, 8, 9)
    moved = retriever.on(tiny_backbone(tmp_path, "diffusion", seed=1))
    assert moved.reader.k_passage == 4 and moved.fingerprint("query") != retriever.fingerprint("query")
    queries, passages = retriever.encode_queries(["heap"]), moved.encode_passages(["heap"])
    with pytest.raises(ValueError, match="cannot be compared"):
        retriever.search(queries, passages)
    retriever.search(queries, other.encode_passages(["heap"], progress=False))  # K may differ


def test_settings_go_to_the_reader(diffusion, autoregressive):
    assert DiffRetriever(diffusion).reader.prediction_shift is True
    options = {"k_query": 2, "k_passage": 8, "max_passage_tokens": 7, "shared_text": True, "content_from": "read text"}
    reader = DiffRetriever(diffusion, shifted=False, **options).reader
    assert reader.get_config_dict() == options | {"max_query_tokens": 64, "mask_id": 5, "prediction_shift": False}
    reader = PromptReps(autoregressive, max_vectors=3, stop="any quote").reader
    assert (reader.max_vectors, reader.stop, reader.content_from) == (3, "any quote", "whole text")


def test_a_batch_on_a_gpu_is_larger(diffusion, monkeypatch):
    monkeypatch.setattr(LoadedBackbone, "device", torch.device("cuda"))
    assert DiffRetriever(diffusion, batch_tokens=10).batch_tokens == 10 * retrievers.CUDA_BATCH
    assert DiffRetriever(diffusion, batch_tokens=10).on(k_query=2).batch_tokens == 10 * retrievers.CUDA_BATCH


def test_fingerprints_cover_what_matters_to_a_side(diffusion):
    base = DiffRetriever(diffusion, k_query=2, k_passage=4)
    assert base.fingerprint("query") != base.fingerprint("passage")
    other = DiffRetriever(diffusion, k_query=4, k_passage=4)
    assert other.fingerprint("query") != base.fingerprint("query")
    assert other.fingerprint("passage") == base.fingerprint("passage")
    options = {"shifted": False, "max_passage_tokens": 9, "batch_tokens": 99, "shared_text": True}
    for name, value in (options | {"content_from": "read text"}).items():
        changed = DiffRetriever(diffusion, k_query=2, k_passage=4, **{name: value})
        assert changed.fingerprint("passage") != base.fingerprint("passage")
    assert BM25().fingerprint("query") != BM25().fingerprint("passage")
    before = base.fingerprint("passage")
    torch.set_float32_matmul_precision("medium")
    try:
        assert base.fingerprint("passage") != before
    finally:
        torch.set_float32_matmul_precision("highest")
    own = copy.copy(diffusion.model)
    own.__class__ = LLaDAForCausalLM  # a model whose code is this package's
    covered = DiffRetriever(replace(diffusion, model=own), k_query=2, k_passage=4)
    assert covered.fingerprint("passage") != base.fingerprint("passage")


def test_encoders_of_sentence_transformers(diffusion, autoregressive):
    retriever = DiffRetriever(diffusion, k_query=2, k_passage=4)
    dense, sparse = retriever.multi_vector_encoder(), retriever.sparse_encoder()
    assert isinstance(dense, MultiVectorEncoder) and isinstance(sparse, SparseEncoder)
    assert dense[0] is sparse[0] is retriever.reader and sparse.similarity_fn_name == "dot"
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
    retriever = DiffRetriever(diffusion, max_passage_tokens=30, max_query_tokens=30, content_from="read text")
    long = EDGE["longer than the window"]
    for side in ("query", "passage"):
        read = retriever.read_texts([long, "heap"], side)
        assert read[1] == "heap" and long.startswith(read[0]) and 30 <= len(read[0]) < 200
        whole = retriever.encode([long, read[0]], side, progress=False)
        same(whole[[0]], whole[[1]])


@pytest.mark.parametrize("name", ["DiffRetriever, 2 and 4", "BM25"])
def test_many_copies_of_one_text(diffusion, autoregressive, name, monkeypatch):
    system, rows = SYSTEMS[name](diffusion, autoregressive), count_rows(monkeypatch)
    many = system.encode_passages([TEXTS[0]] * 20_000, progress=False)
    assert len(many) == 20_000 and sum(rows) <= 20_000 // retrievers.SHARD_TEXTS + 1  # each once a shard
    if many.dense is not None:
        same(many[[0, 19_999]], system.encode_passages([TEXTS[0]] * 2, progress=False))
    queries = system.encode_queries(["binary tree"], progress=False)
    (ranked,) = system.search(queries, many, "sparse", 3).run.values()
    assert list(ranked) == ["0", "1", "2"]  # all equal: in their order
    assert list(ranked.values()) == pytest.approx([ranked["0"]] * 3) and ranked["0"] > 0


# -- batches, order, resuming ----------------------------------------------------------------------------------


def count_rows(monkeypatch, method: str = "forward", shapes: bool = False, kind=retrievers.MaskedPositions) -> list:
    """Texts (or ``shapes``: texts and length) of each forward pass of a reader from now on."""
    seen, original = [], getattr(kind, method)

    def counted(self, features, **kwargs):
        shape = tuple(features["input_ids"].shape)
        seen.append(shape if shapes else shape[0])
        return original(self, features, **kwargs)

    monkeypatch.setattr(kind, method, counted)
    return seen


def test_batches_keep_to_the_budget(diffusion, monkeypatch):
    retriever = DiffRetriever(diffusion, k_passage=4, batch_tokens=600)
    sizes = count_rows(monkeypatch, shapes=True)
    texts = [" ".join(["heap"] * n) for n in range(1, 40)]
    retriever.encode_passages(texts, progress=False)
    assert sum(rows for rows, _ in sizes) == len(texts)
    assert all(rows * width <= 600 or rows == 1 for rows, width in sizes)
    widths = [width for _, width in sizes]
    assert widths == sorted(widths, reverse=True) and max(rows for rows, _ in sizes) > 1
    # a budget below one text still takes it
    one = DiffRetriever(diffusion, k_passage=4, batch_tokens=1).encode_passages(TEXTS[:2], progress=False)
    same(one, retriever.encode_passages(TEXTS[:2], progress=False))


def test_every_k_in_one_pass(diffusion, monkeypatch, tmp_path):
    monkeypatch.setattr(retrievers, "SHARD_TEXTS", 3)
    texts, counts = [*TEXTS, TEXTS[0]], [4, 1, 8]
    system = DiffRetriever(diffusion, shared_text=True)
    rows = count_rows(monkeypatch, "states")
    found = system.encode_counts(texts, "passage", counts, progress=False)
    assert sum(rows) == len(texts) and list(found) == sorted(counts)
    for k, encoded in found.items():
        alone = system.on(k_passage=k).encode_passages(texts, progress=False)
        assert encoded.origin == alone.origin and encoded.vectors == k
        same(encoded, alone)
        same(system.encode_counts(texts, "passage", [k], progress=False)[k], alone)
    for _ in range(2):
        for k, encoded in system.encode_counts(texts, "passage", counts, cached=True, progress=False).items():
            same(encoded, found[k], exact=True)
    folders = [p for p in (tmp_path / "cache" / "encodings").iterdir() if p.is_dir()]
    assert len(folders) == 3 and {p.name for p in folders[0].iterdir() if p.is_dir()} == {"1", "4", "8"}


def test_interrupted_encoding_goes_on(diffusion, monkeypatch):
    retriever = DiffRetriever(diffusion, k_passage=4, batch_tokens=1)  # a text at a time
    expected = retriever.encode_passages(TEXTS, progress=False)
    whole = retriever.encode_passages(TEXTS, cached=True, progress=False)  # in one shard
    assert isinstance(whole.dense, np.memmap) and whole.origin == expected.origin and whole.origin.side == "passage"
    same(whole, expected, exact=True)
    monkeypatch.setattr(retrievers, "SHARD_TEXTS", 3)
    same(retriever.encode_passages(TEXTS, progress=False), expected, exact=True)
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
        "heap queue heap", "binary tree with queue", "sorted array", "array array array tree", "queue",
        "unrelated words",
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
        np.testing.assert_allclose(row, lucene_bm25(query, terms, 0.9, 0.4), rtol=1e-5)
    assert system.search(queries, index, "sparse", 2).run.get("0") == pytest.approx(
        dict(sorted(zip("012345", scores[0], strict=True), key=lambda item: -item[1])[:2])
    )


def test_bm25_of_nothing():
    with pytest.raises(RuntimeError, match="encode the passages first"):
        BM25().encode_queries(["heap"])
    with pytest.raises(ValueError, match="BM25 has no model that 'folder' could adapt"):
        BM25().with_adapter("folder")
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
