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
from tests.tiny import tiny_backbone, tiny_folder, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

from diffret_lib.models.backbones import LoadedBackbone
from diffret_lib.models.readers import LastToken, MaskedPositions, MeanOfTokens, NextTokens, Reader

TEXTS = [
    "Return a sorted copy of an array along the given axis.",
    "A heap is a binary tree",
    "heap",
    "Compute the eigenvalues and right eigenvectors of a square array, and return them sorted; the array is not changed.",
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
    for family, loud in (("diffusion", ("<file_sep>", "<repo_name>", "<reponame>", "<|endoftext|>", "<|im_end|>")), ("autoregressive", ('"',))):
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


def masked(backbone: LoadedBackbone, **options) -> MaskedPositions:
    return MaskedPositions(backbone.model, backbone.tokenizer, mask_id=backbone.mask_id, **options).eval()


# -- the independent computation ------------------------------------------------------------------------------
# One text at a time, whole sequences, logits of the whole vocabulary at all positions, attention written out
# (eager, with a mask of zeros where every position sees every other), words and weights in plain loops.


@cache
def plain_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def full_forward(folder: Path, ids: list[int], see_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states and logits of one sequence."""
    model = plain_model(folder)
    assert getattr(model.config, "is_causal", True)
    mask = torch.zeros(1, 1, len(ids), len(ids)) if see_all else None
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), attention_mask=mask, output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0], out.logits[0]


def plain_prompt(tokenizer, side: str, few: bool, text: str, limit: int) -> list[int]:
    """METHOD's prompt in ChatML, written out."""
    left = (
        "<|im_start|>system\nYou are an AI assistant that can understand human language.<|im_end|>\n"
        f'<|im_start|>user\n{side.title()}: "'
    )
    right = (
        f'". Use {"a few words" if few else "one word"} to represent the {side} in a retrieval task. '
        f"Make sure your {'words are' if few else 'word is'} in lowercase.<|im_end|>\n"
        f'<|im_start|>assistant\nThe {"words are" if few else "word is"}: "'
    )
    ids = tokenizer.encode(left, add_special_tokens=False)
    ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)[:limit]
    return ids + tokenizer.encode(right, add_special_tokens=False)


def plain_content_ids(tokenizer, text: str, limit: int) -> set[int]:
    cut = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if len(cut) > limit:
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


def plain_masked(folder, tokenizer, mask_id, text, side, k, shift, limit):
    """Unit vectors [<= K, H], weights [V] and what happened, of DiffRetriever's reading."""
    tail = [*tokenizer.encode('"', add_special_tokens=False), *tokenizer.convert_tokens_to_ids(["<|im_end|>"] * 2)]
    prompt = plain_prompt(tokenizer, side, k > 1, text, limit)
    hidden, logits = full_forward(folder, [*prompt, *[mask_id] * k, *tail], see_all=True)
    special = set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)) | set(range(6))
    vectors, rows, seen = [], [], []
    for i in range(len(prompt), len(prompt) + k):
        at = i - 1 if shift else i
        scores = logits[at].clone()
        if int(scores.argmax()) == mask_id:
            seen.append("mask")
        scores[mask_id] = -torch.inf
        if int(scores.argmax()) in special:
            if vectors:
                seen.append("cut")
                break
            seen.append("special first")
        vectors.append(hidden[at] / hidden[at].norm())
        rows.append(scores)
    allowed = plain_content_ids(tokenizer, text, limit)
    return torch.stack(vectors), plain_sparse(rows, allowed, logits.shape[1]), seen


def plain_next_tokens(folder, tokenizer, text, side, n, limit):
    """PromptReps: greedy decoding, the whole sequence computed anew for each token."""
    ids = plain_prompt(tokenizer, side, n > 0, text, limit)
    vectors, rows = [], []
    while True:
        hidden, logits = full_forward(folder, ids, see_all=False)
        vectors.append(hidden[-1] / hidden[-1].norm())
        rows.append(logits[-1])
        token = int(logits[-1].argmax())
        if len(vectors) == 1 + n or '"' in tokenizer.decode([token]) or token < 6:
            break
        ids.append(token)
    weights = plain_sparse(rows, plain_content_ids(tokenizer, text, limit), logits.shape[1])
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
@pytest.mark.parametrize("k", [1, 4])
def test_masked_positions_as_plainly_computed(diffusion, folders, k, shift, side):
    reader = masked(diffusion, k_query=k, k_passage=k, prediction_shift=shift, max_query_tokens=12, max_passage_tokens=20)
    seen, weighted = set(), 0
    for text, (vectors, sparse) in zip(TEXTS, read(reader, TEXTS, side), strict=True):
        limit = 12 if side == "query" else 20
        expected, weights, what = plain_masked(
            folders["diffusion"], diffusion.tokenizer, diffusion.mask_id, text, side, k, shift, limit
        )
        close(vectors, expected)
        close(sparse, weights)
        seen.update(what)
        weighted += any(weights)
    assert weighted >= 5
    if k == 4:  # the texts show each rule at work
        assert {"cut", "mask"} <= seen


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_next_tokens_as_plainly_computed(autoregressive, folders, n, side):
    reader = NextTokens(autoregressive.model, autoregressive.tokenizer, max_new_tokens=n, max_query_tokens=9).eval()
    counts = set()
    for text, (vectors, sparse) in zip(TEXTS, read(reader, TEXTS, side), strict=True):
        limit = 9 if side == "query" else 256
        expected, weights = plain_next_tokens(folders["autoregressive"], autoregressive.tokenizer, text, side, n, limit)
        close(vectors, expected)
        close(sparse, weights)
        counts.add(len(vectors))
    if n == 0:
        assert counts == {1}
    else:  # some answers end early, some never
        assert max(counts) == 1 + n and len(counts) > 1


@pytest.mark.parametrize("family", ["diffusion", "autoregressive"])
def test_mean_of_tokens_as_plainly_computed(request, folders, family):
    backbone = request.getfixturevalue(family)
    reader = MeanOfTokens(backbone.model, backbone.tokenizer, max_passage_tokens=20).eval()
    for text, (vectors, sparse) in zip(TEXTS, read(reader, TEXTS, "passage"), strict=True):
        ids = backbone.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)[:20]
        hidden, _ = full_forward(folders[family], ids or [backbone.tokenizer.eos_token_id], family == "diffusion")
        total = torch.zeros(hidden.shape[1])
        for vector in hidden:
            total += vector
        close(vectors, (total / total.norm())[None])
        assert sparse is None


@pytest.mark.parametrize("side", ["query", "passage"])
def test_last_token_as_plainly_computed(autoregressive, folders, side):
    reader = LastToken(autoregressive.model, autoregressive.tokenizer, max_query_tokens=7, max_passage_tokens=9).eval()
    tokenizer, limit = autoregressive.tokenizer, {"query": 7, "passage": 9}[side]
    for text, (vectors, sparse) in zip(TEXTS, read(reader, TEXTS, side), strict=True):
        ids = tokenizer.encode(f"{side}: {text}", add_special_tokens=False, split_special_tokens=True)
        prefix = len(tokenizer.encode(f"{side}:", add_special_tokens=False))
        whole = [*ids[: prefix + limit], tokenizer.eos_token_id]
        hidden, _ = full_forward(folders["autoregressive"], whole, see_all=False)
        close(vectors, hidden[-1:] / hidden[-1].norm())
        assert sparse is None


# -- the sparse side -------------------------------------------------------------------------------------------


def test_sparse_weights_by_hand(diffusion):
    reader = masked(diffusion)
    logits = torch.full((1, 2, reader.vocab_size), 5.0)
    logits[0, 0, [10, 11, 12, 13]] = torch.tensor([1.0, 2.0, 3.0, -4.0])
    logits[0, 1, [10, 11, 12, 13]] = torch.tensor([7.0, 2.5, 0.5, -4.0])
    content = torch.tensor([[10, 11, 12, 13, -1]])
    for valid, expected in (([True, True], {10: 8, 11: 3.5, 12: 4}), ([True, False], {10: 2, 11: 3, 12: 4})):
        weights = reader.sparse_weights(logits, torch.tensor([valid]), content)[0]
        found = {int(i): float(weights[i]) for i in weights.nonzero()[:, 0]}
        assert found == pytest.approx({i: math.log(w) for i, w in expected.items()})


# -- special tokens and the mask token -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special_at", "left"),
    [((2,), 2), ((1, 3), 1), ((3,), 3), ((0,), 4), ((0, 1), 1), ((), 4)],
    ids=["third", "second and fourth", "last", "first has no effect", "first and second", "none"],
)
def test_cut_after_a_special_token(diffusion, monkeypatch, special_at, left):
    reader = masked(diffusion, k_passage=4)
    word = diffusion.tokenizer.encode("heap", add_special_tokens=False)[0]
    later = diffusion.tokenizer.encode("tree", add_special_tokens=False)[0]
    calls = []

    def logits(hidden):
        out = torch.full((*hidden.shape[:2], reader.vocab_size), 0.1)
        out[..., word] = 1.0
        out[:, 3, later] = 2.0  # only the last position says it
        for j in special_at:
            out[:, j, diffusion.tokenizer.eos_token_id] = 9.0
        calls.append(1)
        return out

    monkeypatch.setattr(reader, "logits", logits)
    vectors, sparse = read(reader, ["heap tree"], "passage")[0]
    assert calls and len(vectors) == left
    assert sparse[word] == pytest.approx(math.log(2))
    assert sparse[later] == pytest.approx(math.log(3) if left == 4 else math.log(1.1))


def test_the_mask_is_never_predicted(diffusion, monkeypatch):
    reader = masked(diffusion, k_passage=4)
    head = diffusion.model.get_output_embeddings()
    with torch.inference_mode():
        before = reader(reader.preprocess(TEXTS, task="passage"))
    original = torch.nn.Linear.forward

    def forward(self, x):
        out = original(self, x)
        if self is head:
            out = out.clone()
            out[..., diffusion.mask_id] = 1e4
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    assert int(head(torch.ones(1, reader.hidden_size)).argmax()) == diffusion.mask_id
    with torch.inference_mode():
        after = reader(reader.preprocess(TEXTS, task="passage"))
    assert not (after["predicted_ids"] == diffusion.mask_id).any()
    assert torch.equal(before["predicted_ids"], after["predicted_ids"])
    assert torch.equal(before["token_embeddings"], after["token_embeddings"])
    assert not after["sentence_embedding"][:, diffusion.mask_id].any()


# -- batches, padding, direction, cache ------------------------------------------------------------------------


def readers(diffusion, autoregressive) -> dict[str, Reader]:
    return {
        "masked, 1": masked(diffusion, k_query=1, k_passage=1),
        "masked, 8": masked(diffusion, k_query=8, k_passage=8),
        "masked, unshifted": masked(diffusion, k_query=4, k_passage=4, prediction_shift=False),
        "next, single": NextTokens(autoregressive.model, autoregressive.tokenizer).eval(),
        "next, multi": NextTokens(autoregressive.model, autoregressive.tokenizer, max_new_tokens=6).eval(),
        "mean, diffusion": MeanOfTokens(diffusion.model, diffusion.tokenizer).eval(),
        "mean, autoregressive": MeanOfTokens(autoregressive.model, autoregressive.tokenizer).eval(),
        "last": LastToken(autoregressive.model, autoregressive.tokenizer).eval(),
    }


@pytest.mark.parametrize("side", ["query", "passage"])
@pytest.mark.parametrize(
    "name",
    [
        "masked, 1", "masked, 8", "masked, unshifted", "next, single", "next, multi",
        "mean, diffusion", "mean, autoregressive", "last",
    ],
)  # fmt: skip
def test_padding_and_batching_change_nothing(diffusion, autoregressive, name, side):
    reader = readers(diffusion, autoregressive)[name]
    texts = [*TEXTS, " ".join(TEXTS)]  # the last one pads all others by much
    batched = read(reader, texts, side)
    pairs = read(reader, texts[:2], side) + read(reader, texts[2:], side)
    for text, (vectors, sparse), (paired, _) in zip(texts, batched, pairs, strict=True):
        ((alone, alone_sparse),) = read(reader, [text], side)
        assert vectors.shape == alone.shape == paired.shape
        assert (torch.cosine_similarity(vectors, alone, dim=-1) >= 0.9999).all()
        assert (torch.cosine_similarity(vectors, paired, dim=-1) >= 0.9999).all()
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
        if sparse is not None and alone_sparse.any():
            assert torch.cosine_similarity(sparse, alone_sparse, dim=0) >= 0.9999


@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_diffusion_attends_both_ways(diffusion, autoregressive, padded):
    """A later token changes the state of an earlier one in a diffusion LM, and only there."""
    ids = torch.tensor([[7, 30, 31, 32, 33], [7, 30, 31, 32, 34]])
    if padded:
        mask = torch.tensor([[0, 1, 1, 1, 1]] * 2)
    else:
        mask = torch.ones_like(ids)
    for backbone, sees in ((diffusion, True), (autoregressive, False)):
        reader = MeanOfTokens(backbone.model, backbone.tokenizer)
        with torch.inference_mode():
            hidden = reader.body(ids, mask)
        assert ((hidden[0, 1] - hidden[1, 1]).abs().max() > 1e-3) == sees


def test_what_follows_the_masks_is_seen_where_the_model_is_bidirectional(diffusion, folders):
    """The first vector depends on the closing tail; the direction is the model's, not the reader's."""
    causal = tiny_backbone(folders["diffusion"], "autoregressive")
    one_way = MaskedPositions(causal.model, causal.tokenizer, mask_id=5, prediction_shift=False)
    for reader, sees in ((masked(diffusion, k_query=2, k_passage=4), True), (one_way, False)):
        features = reader.preprocess(["a heap"], task="passage")
        other = dict(features, input_ids=features["input_ids"].clone())
        other["input_ids"][0, -1] = 40
        with torch.inference_mode():
            a, b = (reader(f)["token_embeddings"][0, 0] for f in (features, other))
        assert bool(features["attention_mask"].all())
        assert a @ b < 0.9999 if sees else torch.equal(a, b)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[tuple[int, ...], bool, bool]]:
    """Shape, gradients and key-value cache of every forward pass of PromptReps' reader."""
    seen, original = [], NextTokens.body

    def body(self, input_ids, mask, past=None):
        seen.append((tuple(input_ids.shape), torch.is_grad_enabled(), past is not None))
        return original(self, input_ids, mask, past)

    monkeypatch.setattr(NextTokens, "body", body)
    return seen


def test_left_part_is_computed_once_and_equals_no_cache(autoregressive, passes):
    reader = NextTokens(autoregressive.model, autoregressive.tokenizer, max_new_tokens=3).eval()
    features = reader.preprocess(TEXTS, task="passage")
    first, again = read(reader, TEXTS, "passage"), read(reader, TEXTS, "passage")
    left, lengths = (1, len(features["left_ids"])), [shape for shape, *_ in passes]
    assert lengths.count(left) == 1
    assert max(width for rows, width in lengths if rows > 1) == features["input_ids"].shape[1]
    for (a, sa), (b, sb) in zip(first, again, strict=True):  # a batch leaves nothing behind in the cache
        assert torch.equal(a, b) and torch.equal(sa, sb)
    model = autoregressive.model
    for text, (vectors, _) in zip(TEXTS, first, strict=True):
        row = reader.preprocess([text], task="passage")
        ids = torch.tensor([[*features["left_ids"], *row["input_ids"][0].tolist()]])
        with torch.inference_mode():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        close(vectors[0], hidden / hidden.norm())
    # changed weights are not read from the old cache
    reader.train()
    assert not reader._left


def test_left_part_differs_between_sides_and_wordings(autoregressive):
    reader = NextTokens(autoregressive.model, autoregressive.tokenizer).eval()
    for side in ("query", "passage", "query"):
        fresh = NextTokens(autoregressive.model, autoregressive.tokenizer).eval()
        for (a, _), (b, _) in zip(read(reader, TEXTS[:3], side), read(fresh, TEXTS[:3], side), strict=True):
            assert torch.equal(a, b)


def test_sequences_that_ended_leave_the_batch(autoregressive, passes):
    reader = NextTokens(autoregressive.model, autoregressive.tokenizer, max_new_tokens=5).eval()
    counts = [len(vectors) for vectors, _ in read(reader, TEXTS, "passage")]
    rows = [n for (n, width), *_ in passes if width == 1]
    assert rows == [sum(c > j for c in counts) for j in range(1, max(counts))]
    assert min(rows) < len(TEXTS)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_one_pass_with_gradients_reads_what_decoding_reads(autoregressive, passes, n, side):
    reader = NextTokens(autoregressive.model, autoregressive.tokenizer, max_new_tokens=n).eval()
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
    assert (n, side) != (5, "passage") or len(lengths.unique()) > 1  # some decode less than others


def test_gradients_reach_the_model(folders):
    """Training needs the graph through the prefix as well."""
    for family, build in (
        ("diffusion", lambda b: masked(b, k_passage=2)),
        ("autoregressive", lambda b: NextTokens(b.model, b.tokenizer, max_new_tokens=2)),
    ):
        backbone = tiny_backbone(folders[family], family)
        backbone.model.requires_grad_(True)
        reader = build(backbone).train()
        out = reader(reader.preprocess(["a heap", "a sorted array"], task="passage"))
        (out["token_embeddings"].sum() + out["sentence_embedding"].sum()).backward()
        grads = [p.grad for p in backbone.model.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        assert any(g.any() for g in grads)


def test_unknown_settings():
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    with pytest.raises(ValueError, match="max_passage_tokens must be at least 1, not 0"):
        MeanOfTokens(model, tokenizer, max_passage_tokens=0)
    with pytest.raises(ValueError, match="k_passage must be at least 1, not '4'"):
        MaskedPositions(model, tokenizer, mask_id=5, k_passage="4")
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, not -1"):
        NextTokens(model, tokenizer, max_new_tokens=-1)
    with pytest.raises(ValueError, match="task must be 'query', 'passage' or 'document', not 'title'"):
        LastToken(model, tokenizer).preprocess(["heap"], task="title")


def test_the_word_of_sentence_transformers_for_a_passage():
    tokenizer = tiny_tokenizer()
    reader = MaskedPositions(tiny_model(len(tokenizer)), tokenizer, mask_id=5, k_query=1, k_passage=2)
    passage, *others = (reader.preprocess(TEXTS, task=task) for task in ("passage", "document", None))
    for other in others:
        assert all(np.array_equal(passage[key], other[key]) for key in passage)
    assert passage["mask_count"] == 2 and reader.preprocess(TEXTS, task="query")["mask_count"] == 1


# -- as modules of sentence-transformers -----------------------------------------------------------------------


def test_saved_and_loaded_as_multi_vector_encoder(diffusion, tmp_path):
    reader = masked(diffusion, k_query=2, k_passage=4, prediction_shift=False, max_passage_tokens=11)
    encoder = MultiVectorEncoder(modules=[reader], device="cpu")
    encoder.save_pretrained(str(tmp_path / "model"))
    loaded = MultiVectorEncoder(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    assert type(loaded[0]) is MaskedPositions
    assert loaded[0].get_config_dict() == reader.get_config_dict()
    assert loaded[0].bidirectional
    for encode, side in (("encode_document", "passage"), ("encode_query", "query")):
        before = getattr(encoder, encode)(TEXTS)
        after = getattr(loaded, encode)(TEXTS)
        direct = read(reader, TEXTS, side)
        for a, b, (c, _) in zip(before, after, direct, strict=True):
            close(a, b)
            close(b, c)
    # without padding there is no mask, and the loaded layers are as transformers makes them
    close(loaded.encode_document([TEXTS[0]])[0], read(reader, TEXTS[:1], "passage")[0][0])
    query = loaded.encode_query(["heap"])[0]
    document = loaded.encode_document(["heap"])[0]
    assert len(query) <= 2 < len(document) or not np.allclose(query[0], document[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["masked", "next"])
def test_saved_and_loaded_as_sparse_encoder(diffusion, autoregressive, tmp_path, kind):
    if kind == "masked":
        reader = masked(diffusion, k_query=1, k_passage=4)
    else:
        reader = NextTokens(autoregressive.model, autoregressive.tokenizer, max_new_tokens=3).eval()
    encoder = SparseEncoder(modules=[reader], device="cpu")
    encoder.save_pretrained(str(tmp_path / "model"))
    loaded = SparseEncoder(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    assert type(loaded[0]) is type(reader)
    for encode, side in (("encode_document", "passage"), ("encode_query", "query")):
        before = getattr(encoder, encode)(TEXTS).to_dense()
        after = getattr(loaded, encode)(TEXTS).to_dense()
        direct = torch.stack([sparse for _, sparse in read(reader, TEXTS, side)])
        close(before, after)
        close(after, direct)
    query, document = loaded.encode_query(["heap tree"]).to_dense(), loaded.encode_document(["heap tree"]).to_dense()
    assert not torch.allclose(query, document, atol=1e-3)


def test_a_folder_without_a_reader(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not hold a reader"):
        MaskedPositions.load(str(tiny_folder(tmp_path / "plain")))


IR = (
    {"q1": "priority queue", "q2": "sorted array"},
    {"d1": TEXTS[1], "d2": TEXTS[0], "d3": TEXTS[3]},
    {"q1": {"d1"}, "q2": {"d2"}},
)


def test_evaluators_of_sentence_transformers(diffusion):
    reader = masked(diffusion, k_query=2, k_passage=2)
    common = {"accuracy_at_k": [1], "precision_recall_at_k": [1], "mrr_at_k": [10], "ndcg_at_k": [10], "map_at_k": [10]}
    dense = MultiVectorInformationRetrievalEvaluator(*IR, name="tiny", **common)
    found = dense(MultiVectorEncoder(modules=[reader], device="cpu"))
    value = next(v for k, v in found.items() if k.endswith("ndcg@10"))
    q = [v for v, _ in read(reader, list(IR[0].values()), "query")]
    d = [v for v, _ in read(reader, list(IR[1].values()), "passage")]
    gains = []
    for qi, right in ((0, 0), (1, 1)):
        scores = [float((q[qi] @ p.T).max(1).values.sum()) for p in d]
        gains.append(1 / math.log2(2 + sorted(scores, reverse=True).index(scores[right])))
    assert value == pytest.approx(np.mean(gains))
    sparse = SparseInformationRetrievalEvaluator(*IR, name="tiny", **common)
    found = sparse(SparseEncoder(modules=[reader], device="cpu", similarity_fn_name="dot"))
    assert 0 < next(v for k, v in found.items() if k.endswith("ndcg@10")) <= 1
