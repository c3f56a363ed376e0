from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from diffret_lib.experiments import study
from diffret_lib.retrieval.systems import DiffRetriever, PromptReps
from diffret_lib.training.lora import add_lora
from diffret_lib.training.losses import Columns, FalseNegatives, JointInfoNCE, dense_scores
from tests.tiny import tiny_backbone

QUERIES = ["priority queue", "sorted copy of an array", "eigenvalues"]
PASSAGES = [
    ["A heap is a binary tree.", "Return a sorted copy.", "Compute the eigenvalues of a square array."],
    ["Every parent has a value.", "An array along the given axis.", "right eigenvectors"],
]
SYSTEMS = study.SYSTEMS | {
    "DiffRetriever multi": (DiffRetriever, {"k_query": 2, "k_passage": 3}),
    "PromptReps multi": (PromptReps, {"max_vectors": 3}),  # answers of different lengths
}


def trainable(folder, system: str, **options: float):
    kind, counts = SYSTEMS[system]
    backbone = tiny_backbone(folder, kind.family)
    model = add_lora(backbone, rank=16, alpha=64, seed=13, dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: nothing would be learned of lora_A
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    retriever = kind(backbone, **counts)
    retriever.reader.model = model
    return retriever.reader.train()


def features(reader) -> tuple[list[dict], torch.Tensor]:
    """The two columns of the batch, as the library's trainer gives them, and the labels."""
    rows = [
        {"query": q, "positive": p, "negative_1": n, "label": i}
        for i, (q, p, n) in enumerate(zip(QUERIES, *PASSAGES, strict=True))
    ]
    batch = Columns(reader)(rows)
    columns = [{k.removeprefix(s): v for k, v in batch.items() if k.startswith(s)} for s in ("query_", "passage_")]
    return columns, batch["label"]


def gradients(reader, loss) -> dict[str, torch.Tensor]:
    reader.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in reader.named_parameters() if p.requires_grad}


def plain(reader, temperature: float, sparse_temperature: float, sparse_weight: float) -> torch.Tensor:
    """The formula with loops: one text at a time."""
    columns = [(QUERIES, "query"), *((texts, "passage") for texts in PASSAGES)]
    sides = [[reader(reader.preprocess([t], task=task)) for t in texts] for texts, task in columns]
    queries, passages = sides[0], [p for side in sides[1:] for p in side]
    total = 0.0
    for i, q in enumerate(queries):
        dense, sparse = [], []
        vectors = q["token_embeddings"][0][q["attention_mask"][0].bool()]
        for p in passages:
            others = p["token_embeddings"][0][p["attention_mask"][0].bool()]
            single = q["token_embeddings"].shape[1] == p["token_embeddings"].shape[1] == 1
            best = [torch.stack([v @ o for o in others]).max() for v in vectors]
            score = best[0] if single else sum(b.clamp(min=0) for b in best) / len(vectors)
            dense.append(score / temperature)
            if reader.has_sparse:
                sparse.append(q["sentence_embedding"][0] @ p["sentence_embedding"][0] / sparse_temperature)
        for scores, weight in ((dense, 1.0), (sparse, sparse_weight)):
            if scores:
                total = total + weight * (torch.logsumexp(torch.stack(scores), 0) - scores[i])
    return total / len(queries)


@pytest.mark.parametrize("sparse", [(1.0, 1.0), (5.0, 0.5)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_cached_and_uncached_are_the_formula(folder, system, sparse):
    reader = trainable(folder, system)
    model = MultiVectorEncoder(modules=[reader], device="cpu")
    expected = plain(reader, 0.1, *sparse)
    wanted = gradients(reader, expected)
    assert any(g.abs().max() > 1e-4 for g in wanted.values())
    for size in (1000, 2):  # at once; two texts at a time, gradients cached
        settings = {"sparse_temperature": sparse[0], "sparse_weight": sparse[1], "mini_batch_size": size}
        loss = JointInfoNCE(model, temperature=0.1, **settings)
        value = loss(*features(reader))
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)
        found = gradients(reader, value)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
        assert set(loss.parts) == ({"dense", "sparse"} if reader.has_sparse else {"dense"})
        weighted = sum(part * {"dense": 1.0, "sparse": sparse[1]}[side] for side, part in loss.parts.items())
        assert float(weighted) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_second_pass_with_gradients_has_the_dropout_of_the_first(folder, system):
    """The gradient cache gives the gradients of its first pass to the vectors of its second."""
    reader = trainable(folder, system, lora_dropout=0.2)
    batch, passes = reader.preprocess(QUERIES, task="query"), []
    for grad in (False, True, True):
        torch.manual_seed(len(passes) == 2)
        with torch.set_grad_enabled(grad):
            passes.append(reader(batch)["token_embeddings"].detach())
    torch.testing.assert_close(passes[0], passes[1], atol=1e-6, rtol=0)
    assert passes[1].shape != passes[2].shape or (passes[1] - passes[2]).abs().max() > 1e-3


def test_columns_have_the_longest_passage_first(folder):
    (_, passages), labels = features(trainable(folder, "DiffRetriever multi"))
    lengths = passages["attention_mask"].sum(1).tolist()
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2 and labels.tolist() == [0, 1, 2]


def test_bfloat16_runs_the_model_and_not_the_scores(folder):
    reader = trainable(folder, "DiffRetriever multi")
    model, dtypes = MultiVectorEncoder(modules=[reader], device="cpu"), []
    reader.model.get_base_model().lm_head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    loss = JointInfoNCE(model, temperature=0.1, mini_batch_size=2, bfloat16=True)
    value = loss(*features(reader))
    assert value.dtype == torch.float32 and value.item() == pytest.approx(plain(reader, 0.1, 1.0, 1.0).item(), rel=0.05)
    before = len(dtypes)
    gradients(reader, value)  # the second pass of the cache as well
    assert set(dtypes[:5] + dtypes[before:]) == {torch.bfloat16} and len(dtypes) > before


def test_dense_scores_are_what_is_searched_by():
    rng = np.random.default_rng(0)
    queries, passages = (torch.from_numpy(rng.standard_normal((3, k, 4), dtype=np.float32)) for k in (2, 3))
    queries[1, 1] = 0  # has one vector
    found = dense_scores(queries, passages, torch.tensor([2, 1, 2]))
    for i in range(3):
        for j in range(3):
            best = [max(0.0, *(float(v @ p) for p in passages[j])) for v in queries[i]]
            assert float(found[i, j]) == pytest.approx(sum(best) / (1 if i == 1 else 2), abs=1e-6)
    single = dense_scores(queries[:, :1], -queries[:, :1], torch.ones(3))
    assert (single.diagonal() < 0).all()  # a dot product, not clamped


def test_passages_that_are_relevant_are_no_negatives(folder):
    # row 0 and 1 are of the same query: each other's positive is relevant; row 2's negative is row 0's positive
    masks = FalseNegatives(torch.tensor([[0, 5], [1, 5], [2, 0]]), torch.tensor([[0, 1], [0, 1], [2, -1]]))
    assert masks(torch.tensor([0, 1, 2])).int().tolist() == [[0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1], [0] * 6]
    assert masks(torch.tensor([2])).int().tolist() == [[0, 0]]
    reader = trainable(folder, "DiffEmbed")
    model = MultiVectorEncoder(modules=[reader], device="cpu")
    none = FalseNegatives(torch.arange(6).view(3, 2), torch.tensor([[0], [2], [4]]))
    all_of_them = FalseNegatives(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long))
    losses = [
        JointInfoNCE(model, temperature=0.1, false_negatives=f)(*features(reader)).item()
        for f in (None, none, all_of_them)
    ]
    assert losses[0] == losses[1] > 0.1 and losses[2] == 0  # nothing left but the positive
