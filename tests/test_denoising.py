"""Several denoising steps, against the loop written out; and the table of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from diffret_lib.experiments.denoising import COLUMNS, denoising_table
from diffret_lib.models.denoising import DenoisedPositions
from diffret_lib.models.readers import MaskedPositions
from diffret_lib.retrieval.denoising import MultiStepDiffRetriever
from diffret_lib.retrieval.metrics import METRIC, per_query
from diffret_lib.retrieval.systems import DiffRetriever

TEXTS = ["Return a sorted copy of an array along the given axis.", "heap", "A heap is a binary tree"]


def reader(backbone, kind=DenoisedPositions, **options):
    return kind(backbone.model, backbone.tokenizer, mask_id=backbone.mask_id, **options).eval()


def plain_steps(folder, ids: list[int], k: int, steps: int, shift: int, mask_id: int) -> tuple[torch.Tensor, list[int]]:
    """Hidden states of the K masks in the last of several passes over one sequence, and what its input was."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    places, fixed = [i for i, token in enumerate(ids) if token == mask_id], 0
    steps = min(steps, k)
    share = [len(part) for part in np.array_split(np.arange(k), steps)]  # the first ones are the larger ones
    for number in [*share[:-1], None]:
        see_all = torch.zeros(1, 1, len(ids), len(ids))
        with torch.no_grad():
            out = model(torch.tensor([ids]), attention_mask=see_all, output_hidden_states=True, use_cache=False)
        if number is None:
            break
        logits = out.logits[0].double()
        logits[:, mask_id] = -torch.inf
        best = {place: logits[place - shift].softmax(-1).max(0) for place in places if ids[place] == mask_id}
        chosen = sorted(best, key=lambda place: -best[place].values)[:number]
        ids = [int(best[i].indices) if i in chosen else token for i, token in enumerate(ids)]
        fixed += number
        assert sum(ids[place] == mask_id for place in places) == k - fixed > 0
    return out.hidden_states[-1][0][[place - shift for place in places]], ids


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("k", "steps"), [(5, 2), (5, 3), (4, 4), (2, 7), (1, 3)])
def test_the_loop_written_out(folder, diffusion, k, steps, shift):
    own = reader(diffusion, k_passage=k, steps=steps, prediction_shift=shift)
    features = own.preprocess(TEXTS, task="passage")
    given = features["input_ids"].clone()
    with torch.no_grad():
        states = own.masked(features)
    assert torch.equal(features["input_ids"], given)
    one_pass = reader(diffusion, MaskedPositions, k_passage=k, prediction_shift=shift).masked(features)
    for ids, mask, found, once in zip(given, features["attention_mask"], states, one_pass):
        expected, _ = plain_steps(folder, ids[mask.bool()].tolist(), k, steps, shift, diffusion.mask_id)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        assert torch.equal(found, once) == (k == 1)


def test_one_step_is_diffretriever(diffusion):
    options = {"k_query": 2, "k_passage": 4}
    one, own = DiffRetriever(diffusion, **options), MultiStepDiffRetriever(diffusion, **options)
    several = own.on(steps=2)
    for side in ("query", "passage"):
        a, b, c = (r.encode(TEXTS, side, progress=False) for r in (one, own, several))
        assert np.array_equal(a.dense, b.dense) and np.array_equal(a.lengths, b.lengths)
        assert (a.sparse != b.sparse).nnz == 0
        assert not np.array_equal(a.dense, c.dense)
        assert len({r.fingerprint(side) for r in (one, own, several)}) == 3
    with pytest.raises(ValueError, match="steps"):
        own.on(steps=0)


def test_several_counts_share_a_text(diffusion):
    shared = MultiStepDiffRetriever(diffusion, shared_text=True, steps=3)
    together = shared.encode_counts(TEXTS, "passage", [1, 2, 4], progress=False)
    for k, found in together.items():
        alone = shared.on(k_passage=k).encode_passages(TEXTS, progress=False)
        np.testing.assert_allclose(found.dense, alone.dense, atol=1e-5)
        np.testing.assert_allclose(found.sparse.toarray(), alone.sparse.toarray(), atol=1e-5)


def test_the_table_of_steps(s):
    s.selected = (2, 2)  # without the grid that selects it
    table = denoising_table(s, (1, 3))
    assert list(table) == COLUMNS and set(table["steps"]) == {1, 3}
    assert (table[["query_ms", "passage_ms"]] > 0).all().all()
    assert table[["k_query", "k_passage"]].drop_duplicates().to_numpy().tolist() == [[2, 2]]
    collection = s.sampled(s.profile.train_collection, s.profile.departures)
    assert set(table["collection"]) == {collection.name} and set(table["queries"]) == {3}
    one = s.diffretriever(*s.selected)
    run = s.runs(one, collection, ["hybrid"])["hybrid"]
    expected = np.mean(per_query(collection.qrels, run, [METRIC])[METRIC])
    (found,) = table.loc[(table["steps"] == 1) & (table["mode"] == "hybrid"), "ndcg"]
    assert found == pytest.approx(expected)
