from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from tests.tiny import tiny_backbone

from diffret_lib.training.lora import add_lora
from diffret_lib.training.losses import FalseNegatives, JointInfoNCE, dense_scores
from diffret_lib.retrieval.systems import DiffEmbed, DiffRetriever, PromptReps, RepLLaMA

QUERIES = ["priority queue", "sorted copy of an array", "eigenvalues"]
PASSAGES = [
    ["A heap is a binary tree.", "Return a sorted copy.", "Compute the eigenvalues of a square array."],
    ["Every parent has a value.", "An array along the given axis.", "right eigenvectors"],
]
SYSTEMS = {
    "DiffRetriever single": (DiffRetriever, {}),
    "DiffRetriever multi": (DiffRetriever, {"k_query": 2, "k_passage": 3}),
    "DiffEmbed": (DiffEmbed, {}),
    "PromptReps single": (PromptReps, {}),
    "PromptReps multi": (PromptReps, {"max_new_tokens": 2}),
    "RepLLaMA": (RepLLaMA, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def trainable(folder, system: str):
    kind, options = SYSTEMS[system]
    backbone = tiny_backbone(folder, kind.family)
    model = add_lora(backbone, rank=16, alpha=64, seed=13, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: nothing would be learned of lora_A
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    retriever = kind(backbone, **options)
    retriever.reader.model = model
    return retriever.reader.train()


def features(reader):
    columns = [reader.preprocess(QUERIES, task="query")]
    return columns + [reader.preprocess(texts, task="passage") for texts in PASSAGES]


def gradients(reader, loss) -> dict[str, torch.Tensor]:
    reader.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in reader.named_parameters() if p.requires_grad}


def plain(reader, temperature: float) -> torch.Tensor:
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
                sparse.append(q["sentence_embedding"][0] @ p["sentence_embedding"][0])
        for scores in (dense, sparse):
            if scores:
                total = total + torch.logsumexp(torch.stack(scores), 0) - scores[i]
    return total / len(queries)


@pytest.mark.parametrize("system", SYSTEMS)
def test_cached_and_uncached_are_the_formula(folder, system):
    reader = trainable(folder, system)
    model = MultiVectorEncoder(modules=[reader], device="cpu")
    expected = plain(reader, 0.1)
    wanted = gradients(reader, expected)
    assert any(g.abs().max() > 1e-4 for g in wanted.values())
    for size in (1000, 2):  # at once; two texts at a time, gradients cached
        loss = JointInfoNCE(model, temperature=0.1, mini_batch_size=size)
        value = loss(features(reader))
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)
        found = gradients(reader, value)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
        assert set(loss.parts) == ({"dense", "sparse"} if reader.has_sparse else {"dense"})
        assert float(sum(loss.parts.values())) == pytest.approx(expected.item(), abs=1e-5)


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
        JointInfoNCE(model, temperature=0.1, false_negatives=f)(features(reader), torch.arange(3)).item()
        for f in (None, none, all_of_them)
    ]
    assert losses[0] == losses[1] > 0.1 and losses[2] == 0  # nothing left but the positive
