from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from diffret_lib.models.backbones import LoadedBackbone
from diffret_lib.models.readers import LastToken, MaskedPositions, MeanOfTokens, NextTokens, Reader
from tests.test_prompts import written_prompt
from tests.tiny import tiny_backbone, tiny_folder, tiny_model, tiny_tokenizer

TEXTS = [
    "Return a sorted copy of an array along the given axis.",
    "A heap is a binary tree",
    "heap",
    "Compute the eigenvalues and right eigenvectors of a square array, and return them sorted; "
    "the array is not changed.",
    "",
    "The passage: 17 words, e.g. Ärger, 東京 and snake_case_names <|im_end|> <file_sep>",
    "priority queue priority queue",
    "the and of",
]
LOUDNESS = 3.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Random backbones that like to say certain tokens, so that every rule has a case in the texts."""
    made = {}
    special = ("<file_sep>", "<repo_name>", "<reponame>", "<|endoftext|>", "<|im_end|>")
    for family, loud in (("diffusion", special), ("autoregressive", ('"',))):
        folder = tmp_path_factory.mktemp(family)
        tokenizer = tiny_tokenizer()
        model = tiny_model(len(tokenizer), seed=3)
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[tokenizer.eos_token_id] = weight[tokenizer.bos_token_id].flip(0)  # it is zero: torch's padding row
            for token in loud:
                weight[tokenizer.convert_tokens_to_ids(token)] *= LOUDNESS
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[family] = folder
    return made


@pytest.fixture(scope="module")
def diffusion(folders) -> LoadedBackbone:
    return tiny_backbone(folders["diffusion"], "diffusion")


@pytest.fixture(scope="module")
def autoregressive(folders) -> LoadedBackbone:
    return tiny_backbone(folders["autoregressive"], "autoregressive")


def next_tokens(backbone: LoadedBackbone, **options) -> NextTokens:
    return NextTokens(backbone.model, backbone.tokenizer, **options).eval()


def masked(backbone: LoadedBackbone, **options) -> MaskedPositions:
    return MaskedPositions(backbone.model, backbone.tokenizer, mask_id=backbone.mask_id, **options).eval()


# -- the independent computation ------------------------------------------------------------------------------
# One text at a time, whole sequences, logits of the whole vocabulary at all positions, attention written out
# (eager, with a mask of zeros where every position sees every other), words and weights in plain loops.


@cache
def plain_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def full_forward(folder: Path, ids: list[int], see_all: bool, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states and logits of one sequence."""
    model = plain_model(folder)
    assert getattr(model.config, "is_causal", True)
    more = {"attention_mask": torch.zeros(1, 1, len(ids), len(ids)) if see_all else None} | more
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False, **more)
    return out.hidden_states[-1][0], out.logits[0]


def plain_prompt(tokenizer, side: str, few: bool, text: str, limit: int) -> tuple[list[int], list[int]]:
    """METHOD's prompt: ids up to the end of the text, and after it."""
    left, right = (tokenizer.encode(part, add_special_tokens=False) for part in written_prompt(side, few))
    return left + tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)[:limit], right


def plain_content_ids(tokenizer, text: str, limit: int | None) -> set[int]:
    """Ids of the words of a text (``limit`` None), or of what is read of it."""
    cut = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if limit is not None and len(cut) > limit:
        text = tokenizer.decode(cut[:limit])
    words, word = [], ""
    for character in text.lower() + " ":
        if character.isalnum():
            word += character
        elif word:
            words.append(word)
            word = ""
    ids = set()
    for word in words:
        if word not in ENGLISH_STOP_WORDS:
            ids.update(tokenizer.encode(word, add_special_tokens=False, split_special_tokens=True))
    return ids


def plain_sparse(rows: list[torch.Tensor], allowed: set[int], size: int) -> list[float]:
    """Max over the positions of log(1 + ReLU(logit)) at the allowed ids."""
    weights = [0.0] * size
    for logits in rows:
        for i in allowed:
            weights[i] = max(weights[i], math.log(1.0 + max(0.0, float(logits[i]))))
    return weights


def plain_masked(folder, tokenizer, mask_id, text, side, k, shift, limit, content_limit=None, shared=False):
    """Unit vectors [<= K, H], weights [V] and what happened, of DiffRetriever's reading."""
    tail = [*tokenizer.encode('"', add_special_tokens=False), *tokenizer.convert_tokens_to_ids(["<|im_end|>"] * 2)]
    start, rest = plain_prompt(tokenizer, side, k > 1, text, limit)
    if shared:
        hidden, logits = plain_shared(folder, start, rest, [*[mask_id] * k, *tail])
    else:
        hidden, logits = full_forward(folder, [*start, *rest, *[mask_id] * k, *tail], see_all=True)
    special = set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)) | set(range(6))
    vectors, rows, seen = [], [], []
    first = len(start) + len(rest)
    for i in range(first, first + k):
        at = i - 1 if shift else i
        scores = logits[at].clone()
        if int(scores.argmax()) == mask_id:
            seen.append("mask")
        scores[mask_id] = -torch.inf
        if int(scores.argmax()) in special:
            if vectors and "special first" not in seen:
                seen.append("cut")
                break
            if not vectors:
                seen.append("special first")
        vectors.append(hidden[at] / hidden[at].norm())
        rows.append(scores)
    allowed = plain_content_ids(tokenizer, text, content_limit)
    return torch.stack(vectors), plain_sparse(rows, allowed, logits.shape[1]), seen


def plain_shared(folder, start, rest, answer):
    """The states where the text sees itself alone: of the text, the rest of the prompt, and the answer after it.

    The quote that opens the answer (the last of ``rest``) is part of the answer: it sees the masks.
    """
    part = ["text"] * len(start) + ["prompt"] * (len(rest) - 1) + ["answer"] * (1 + len(answer))
    sees = {"text": {"text"}, "prompt": {"text", "prompt"}, "answer": {"text", "prompt", "answer"}}
    mask = torch.tensor([[0.0 if key in sees[query] else -1e9 for key in part] for query in part])
    return full_forward(folder, [*start, *rest, *answer], True, attention_mask=mask[None, None])


def plain_next_tokens(folder, tokenizer, text, side, n, limit, stop):
    """PromptReps: greedy decoding to at most n vectors, the whole sequence computed anew for each token."""
    start, rest = plain_prompt(tokenizer, side, n > 1, text, limit)
    ids = [*start, *rest]
    vectors, rows = [], []
    while True:
        hidden, logits = full_forward(folder, ids, see_all=False)
        vectors.append(hidden[-1] / hidden[-1].norm())
        rows.append(logits[-1])
        token = int(logits[-1].argmax())
        word = tokenizer.decode([token])
        ends = {"quote": token < 6 or word == '"', "any quote": token < 6 or '"' in word, "never": False}[stop]
        if len(vectors) == n or ends:
            break
        ids.append(token)
    weights = plain_sparse(rows, plain_content_ids(tokenizer, text, None), logits.shape[1])
    return torch.stack(vectors), weights


def read(reader: Reader, texts: list[str], side: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Valid vectors and weights of texts read as one batch."""
    with torch.inference_mode():
        out = reader(reader.preprocess(texts, task=side))
    sparse = out.get("sentence_embedding")
    rows = []
    for i in range(len(texts)):
        valid = out["attention_mask"][i].bool()
        assert not out["token_embeddings"][i][~valid].any(), "what does not count must be zero"
        rows.append((out["token_embeddings"][i][valid], None if sparse is None else sparse[i]))
    return rows


def close(a, b) -> None:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


# -- representations are those of the plain computation --------------------------------------------------------


@pytest.mark.parametrize("side", ["query", "passage"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("k", "shared"), [(1, False), (4, False), (1, True), (4, True)])
def test_masked_positions_as_plainly_computed(diffusion, folders, k, shared, shift, side):
    content = "read text" if side == "query" else "whole text"
    reader = masked(
        diffusion, k_query=k, k_passage=k, prediction_shift=shift, max_query_tokens=12, max_passage_tokens=20,
        content_from=content, shared_text=shared,
    )  # fmt: skip
    seen, weighted = set(), 0
    for text, (vectors, sparse) in zip(TEXTS, read(reader, TEXTS, side), strict=True):
        limits = (12, 12) if side == "query" else (20, None)
        expected, weights, what = plain_masked(
            folders["diffusion"], diffusion.tokenizer, diffusion.mask_id, text, side, k, shift, *limits, shared
        )
        close(vectors, expected)
        close(sparse, weights)
        seen.update(what)
        weighted += any(weights)
    assert weighted >= 5
    if k == 4 and not shared:  # the texts show each rule at work
        assert {"cut", "mask", "special first"} <= seen


@pytest.mark.parametrize(("n", "stop"), [(1, "quote"), (6, "quote"), (6, "any quote"), (4, "never")])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_next_tokens_as_plainly_computed(autoregressive, folders, n, stop, side):
    reader = next_tokens(autoregressive, max_vectors=n, stop=stop, max_query_tokens=9)
    counts = set()
    for text, (vectors, sparse) in zip(TEXTS, read(reader, TEXTS, side), strict=True):
        limit = 9 if side == "query" else 256
        expected, weights = plain_next_tokens(
            folders["autoregressive"], autoregressive.tokenizer, text, side, n, limit, stop
        )
        close(vectors, expected)
        close(sparse, weights)
        counts.add(len(vectors))
    if stop == "quote" and n > 1:  # some answers end early, some never
        assert max(counts) == n and len(counts) > 1
    elif stop == "never" or n == 1:
        assert counts == {n}


@pytest.mark.parametrize(("make", "family"), [
    (MeanOfTokens, "diffusion"), (MeanOfTokens, "autoregressive"), (LastToken, "autoregressive"),
])  # fmt: skip
@pytest.mark.parametrize("side", ["query", "passage"])
def test_pooled_tokens_as_plainly_computed(request, folders, make, family, side):
    backbone = request.getfixturevalue(family)
    tokenizer, limit = backbone.tokenizer, {"query": 7, "passage": 20}[side]
    reader = make(backbone.model, tokenizer, max_query_tokens=7, max_passage_tokens=20).eval()
    prefix = f"{side}: " if make is LastToken else ""
    limit += len(tokenizer.encode(prefix.strip(), add_special_tokens=False))
    for text, (vectors, sparse) in zip(TEXTS, read(reader, TEXTS, side), strict=True):
        ids = tokenizer.encode(prefix + text, add_special_tokens=False, split_special_tokens=True)[:limit]
        ids = [*ids, tokenizer.eos_token_id] if prefix else ids or [tokenizer.eos_token_id]
        hidden, _ = full_forward(folders[family], ids, family == "diffusion")
        total = hidden[-1] if prefix else hidden.sum(0)
        close(vectors, (total / total.norm())[None])
        assert sparse is None


# -- decoding with a cache, gradients --------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[tuple[tuple[int, ...], bool, bool]]:
    """Shape, gradients and key-value cache of every forward pass of PromptReps' reader."""
    seen, original = [], NextTokens.body

    def body(self, input_ids, mask, past=None):
        seen.append((tuple(input_ids.shape), torch.is_grad_enabled(), past is not None))
        return original(self, input_ids, mask, past)

    monkeypatch.setattr(NextTokens, "body", body)
    return seen


def test_left_part_is_computed_once(autoregressive, passes):
    reader = next_tokens(autoregressive, max_vectors=4)
    features = reader.preprocess(TEXTS, task="passage")
    first, again = read(reader, TEXTS, "passage"), read(reader, TEXTS, "passage")
    left, lengths = (1, len(features["left_ids"])), [shape for shape, *_ in passes]
    assert lengths.count(left) == 1
    assert max(width for rows, width in lengths if rows > 1) == features["input_ids"].shape[1]
    for (a, sa), (b, sb) in zip(first, again, strict=True):  # a batch leaves nothing behind in the cache
        assert torch.equal(a, b) and torch.equal(sa, sb)
    fresh = next_tokens(autoregressive, max_vectors=4)
    for (a, _), (b, _) in zip(read(reader, TEXTS, "query"), read(fresh, TEXTS, "query"), strict=True):
        assert torch.equal(a, b)  # another side has another left part
    # changed weights are not read from the old cache
    reader.train()
    assert not reader._left


def test_sequences_that_ended_leave_the_batch(autoregressive, passes):
    reader = next_tokens(autoregressive, max_vectors=6)
    counts = [len(vectors) for vectors, _ in read(reader, TEXTS, "passage")]
    rows = [n for (n, width), *_ in passes if width == 1]
    assert rows == [sum(c > j for c in counts) for j in range(1, max(counts))]
    assert min(rows) < len(TEXTS)


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_one_pass_with_gradients_reads_what_decoding_reads(autoregressive, passes, n, side):
    reader = next_tokens(autoregressive, max_vectors=n)
    features = reader.preprocess(TEXTS, task=side)
    with torch.no_grad():
        decoded = reader(features)
    taught = reader.train()(features)
    reader.eval()
    assert [cached for _, gradients, cached in passes if gradients] == [False]  # no cache where there are gradients
    assert torch.equal(decoded["attention_mask"], taught["attention_mask"])
    torch.testing.assert_close(taught["token_embeddings"], decoded["token_embeddings"], atol=1e-5, rtol=0)
    torch.testing.assert_close(taught["sentence_embedding"], decoded["sentence_embedding"], atol=1e-4, rtol=0)
    lengths = decoded["attention_mask"].sum(1)
    assert (n, side) != (6, "passage") or len(lengths.unique()) > 1  # some decode less than others


def test_vectors_are_read_on_their_device(diffusion, monkeypatch):
    reader = MaskedPositions(diffusion.model, diffusion.tokenizer, mask_id=diffusion.mask_id)
    size = reader.vocab_size
    monkeypatch.setattr(reader, "logits", lambda hidden: torch.empty(*hidden.shape[:2], size, device="meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes and devices, and no values
        out = reader.read(torch.empty(3, 2, 8, device="meta"), torch.ones(3, 5, dtype=torch.long, device="meta"))
    assert {name: value.device.type for name, value in out.items()} == dict.fromkeys(out, "meta")


def test_the_word_of_sentence_transformers_for_a_passage(diffusion):
    reader = masked(diffusion, k_query=1, k_passage=2)
    passage, *others = (reader.preprocess(TEXTS, task=task) for task in ("passage", "document", None))
    assert all(np.array_equal(passage[key], other[key]) for other in others for key in passage if key != "first_mask")
    assert list(passage["first_mask"]) == [2] and list(reader.preprocess(TEXTS, task="query")["first_mask"]) == [1]
    with pytest.raises(ValueError, match="task must be 'query', 'passage' or 'document', not 'title'"):
        reader.preprocess(["heap"], task="title")


# -- as modules of sentence-transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [MultiVectorEncoder, SparseEncoder])
@pytest.mark.parametrize("kind", ["masked", "shared", "next"])
def test_saved_and_loaded_as_an_encoder(diffusion, autoregressive, tmp_path, encoder, kind):
    if kind == "next":
        reader = next_tokens(autoregressive, max_vectors=4, stop="any quote")
    else:
        options = {"k_query": 1, "k_passage": 4, "prediction_shift": False, "max_passage_tokens": 11}
        reader = masked(diffusion, **options, content_from="read text", shared_text=kind == "shared")
    made = encoder(modules=[reader], device="cpu")
    made.save_pretrained(str(tmp_path / "model"))
    loaded = encoder(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    assert type(loaded[0]) is type(reader) and loaded[0].get_config_dict() == reader.get_config_dict()
    assert loaded[0].bidirectional == (kind != "next")
    dense, both = encoder is MultiVectorEncoder, []
    for encode, side in (("encode_document", "passage"), ("encode_query", "query")):
        before, after = (getattr(e, encode)(TEXTS) for e in (made, loaded))
        if not dense:
            before, after = before.to_dense(), after.to_dense()
        for a, b, direct in zip(before, after, read(reader, TEXTS, side), strict=True):
            close(a, b)
            close(b, direct[not dense])
        both.append(after[2])
    assert both[0].shape != both[1].shape or not np.allclose(both[0], both[1], atol=1e-3)
    # without padding there is no mask, and the loaded layers are as transformers makes them
    if dense:
        close(loaded.encode_document([TEXTS[0]])[0], read(reader, TEXTS[:1], "passage")[0][0])


def test_a_folder_without_a_reader(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not hold a reader"):
        MaskedPositions.load(str(tiny_folder(tmp_path / "plain")))


def test_evaluators_of_sentence_transformers(diffusion):
    reader = masked(diffusion, k_query=2, k_passage=2)
    queries, passages = {"q1": "priority queue", "q2": "sorted array"}, {"d1": TEXTS[1], "d2": TEXTS[0], "d3": TEXTS[3]}
    task = queries, passages, {"q1": {"d1"}, "q2": {"d2"}}
    found = MultiVectorInformationRetrievalEvaluator(*task)(MultiVectorEncoder(modules=[reader], device="cpu"))
    value = next(v for k, v in found.items() if k.endswith("ndcg@10"))
    q = [v for v, _ in read(reader, list(queries.values()), "query")]
    d = [v for v, _ in read(reader, list(passages.values()), "passage")]
    gains = []
    for qi, right in ((0, 0), (1, 1)):
        scores = [float((q[qi] @ p.T).max(1).values.sum()) for p in d]
        gains.append(1 / math.log2(2 + sorted(scores, reverse=True).index(scores[right])))
    assert value == pytest.approx(np.mean(gains))
    encoder = SparseEncoder(modules=[reader], device="cpu", similarity_fn_name="dot")
    found = SparseInformationRetrievalEvaluator(*task)(encoder)
    assert 0 < next(v for k, v in found.items() if k.endswith("ndcg@10")) <= 1
