from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import tiny_backbone
from transformers import TrainerCallback

from diffret_lib.config import load_profile
from diffret_lib.data.collection import Collection
from diffret_lib.models.backbones import BackboneError
from diffret_lib.report import figures
from diffret_lib.retrieval.systems import DiffEmbed, DiffRetriever, PromptReps, RepLLaMA
from diffret_lib.training.contrastive import (
    FinetunedSystem, Measurement, Recipe, TrainingData, finetune, learning_curves, publish_adapter, recipe_of,
    step_order, training_data, training_summary,
)  # fmt: skip
from diffret_lib.training.negatives import mine_hard_negatives

WORDS = ["heap", "tree", "array", "axis", "sorted copy", "eigenvalues", "square", "parent", "children", "queue"]
LIMITS = {"max_query_tokens": 32, "max_passage_tokens": 48}
SYSTEMS = {
    "DiffRetriever single": (DiffRetriever, {}),
    "DiffRetriever multi": (DiffRetriever, {"k_query": 2, "k_passage": 2}),
    "DiffEmbed": (DiffEmbed, {}),
    "PromptReps single": (PromptReps, {}),
    "PromptReps multi": (PromptReps, {"max_new_tokens": 4}),
    "RepLLaMA": (RepLLaMA, {}),
}


class Kill(TrainerCallback):
    """End the process as ``kill -9`` does, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_collection(name: str, seed: int) -> Collection:
    rng = np.random.default_rng(seed)
    passages = [" ".join(rng.choice(WORDS, 6)) + f" {i}." for i in range(8)]
    queries = [" ".join(p.split()[:2]) for p in passages]
    ids = [f"q{i}" for i in range(8)]
    return Collection.from_texts(
        name, [f"p{i}" for i in range(8)], passages, ids, queries, {q: {f"p{i}": 1} for i, q in enumerate(ids)}
    )


def make_data() -> TrainingData:
    collection = make_collection("train", 0)
    return training_data(collection, mine_hard_negatives(collection, {}, 2, 13))


def make_recipe(**changes) -> Recipe:
    recipe = recipe_of(load_profile("smoke"))
    settings = {"steps": 5, "batch_size": 3, "negatives": 2, "mini_batch": 4, "learning_rate": 0.01}
    return recipe.model_copy(update=settings | {"evaluate_every": 2, "patience": 9} | changes)


def make_retriever(root: Path, system: str):
    kind, counts = SYSTEMS[system]
    return kind(tiny_backbone(root / "tiny", kind.family), **counts, **LIMITS)


def train(root: Path, system: str, recipe: Recipe | None = None, **options) -> FinetunedSystem:
    limits = {"max_passage_tokens": 32}
    return finetune(
        system, make_retriever(root, system), make_data(), recipe or make_recipe(), make_collection("dev", 1),
        training_limits=limits, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("contrastive")
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFRET_CACHE", str(root / "cache"))
    yield root
    patch.undo()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def without_seconds(result: FinetunedSystem) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result.curve]


@pytest.mark.parametrize("cut", [False, True])
def test_killed_and_started_again(root, tmp_path, monkeypatch, cut):
    """A process that is killed leaves a training that ends as an uninterrupted one does, bit for bit.

    Also where the kill came while the newest checkpoint was written.
    """
    whole = train(root, "DiffRetriever multi")
    cache = tmp_path / "killed"
    code = (
        "from pathlib import Path\n"
        "from tests.test_contrastive import *\n"
        f"train(Path({str(root)!r}), 'DiffRetriever multi', callbacks=[Kill(5)])\n"
    )
    environment = os.environ | {"DIFFRET_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (work,) = cache.glob("work/*")
    assert sorted(p.name for p in work.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not [p for p in cache.glob("adapters/*") if p.is_dir() and p.name == whole.adapter.parent.name]
    if cut:
        path = work / "checkpoint-4" / "adapter" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    monkeypatch.setenv("DIFFRET_CACHE", str(cache))
    again = train(root, "DiffRetriever multi")
    assert again.adapter.parent.name == whole.adapter.parent.name and again.adapter != whole.adapter
    settings = [(result.adapter / "adapter_config.json").read_bytes() for result in (again, whole)]
    assert settings[0] == settings[1] and weights(again.adapter).keys() == weights(whole.adapter).keys()
    assert all(torch.equal(tensor, weights(whole.adapter)[name]) for name, tensor in weights(again.adapter).items())
    assert without_seconds(again) == without_seconds(whole)
    assert [r["step"] for r in again.curve] == [0, 1, 2, 3, 4, 5]
    assert not list(cache.glob("work/*"))  # checkpoints are gone


def test_all_systems(root, monkeypatch):
    results = {name: train(root, name) for name in SYSTEMS}
    table = training_summary(list(results.values()))
    assert table["system"].tolist() == list(SYSTEMS) and (table["steps"] == 5).all()
    assert table["best_step"].isin([2, 4, 5]).all()
    curves = learning_curves(list(results.values()))
    assert list(curves) == ["system", "step", "loss", "dev_ndcg", "seconds"] and len(curves) == 6 * 6
    assert curves[curves["step"] > 0]["loss"].notna().all()
    # the same steps on the same rows teach every system something on them
    loss = curves.pivot(index="system", columns="step", values="loss")
    assert (loss[5] < loss[1]).sum() >= 4
    for name, result in results.items():
        retriever = make_retriever(root, name)
        before = [p.clone() for p in retriever.backbone.model.parameters()]
        tuned = retriever.with_adapter(result.adapter)
        assert tuned.fingerprint("query") != retriever.fingerprint("query")
        assert tuned.reader.get_config_dict() == retriever.reader.get_config_dict()
        assert all(torch.equal(a, b) for a, b in zip(before, retriever.backbone.model.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(before, tuned.backbone.model.parameters(), strict=True))
        assert all(v.abs().max() > 0 for k, v in weights(result.adapter).items() if "lora_B" in k)
        assert str(root) not in (result.adapter / "adapter_config.json").read_text()
        # the merged adapter is the trained model
        kept = next(r for r in result.curve if r.get("kept"))
        measured = Measurement(tuned, make_collection("dev", 1))(None)["ndcg@10"]
        assert kept["dev_ndcg"] == pytest.approx(measured)
    # an adapter belongs to the backbone that it was trained on
    with pytest.raises(BackboneError):
        make_retriever(root, "RepLLaMA").with_adapter(results["DiffEmbed"].adapter)
    # finished: nothing is trained, nor is a model copied
    monkeypatch.setattr("diffret_lib.training.contrastive.add_lora", None)
    again = train(root, "RepLLaMA")
    assert again == results["RepLLaMA"] == FinetunedSystem.load(again.adapter.parent)
    loss, dev = figures.training_curves(learning_curves([results["DiffEmbed"], again])).axes
    assert [line.get_label() for line in dev.lines] == ["DiffEmbed", "RepLLaMA"]
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4, 5] and list(dev.lines[0].get_xdata()) == [0, 2, 4, 5]
    assert list(dev.lines[1].get_ydata()) == [r["dev_ndcg"] for r in again.curve if "dev_ndcg" in r]


def test_rows_of_the_training_collection():
    data = make_data()
    assert data.rows.column_names == ["query", "positive", "negative_1", "negative_2"] and len(data.rows) == 8
    texts = dict(zip(data.collection.passage_ids, data.collection.passages, strict=True))
    for query_id, row in zip(data.collection.query_ids, data.rows, strict=True):
        mined = data.negatives[data.negatives["query_id"] == query_id]["passage_id"]
        assert row["positive"] == texts[data.collection.relevant(query_id)[0]]
        assert [row["negative_1"], row["negative_2"]] == [texts[p] for p in mined]
        assert row["positive"] not in (row["negative_1"], row["negative_2"])
    assert make_data().fingerprint == data.fingerprint
    qrels = {"q": {"a": 1, "b": 1}, "r": {"d": 1}}
    three = Collection.from_texts("c", list("abcd"), ["A", "B", "C", "A"], ["q", "r"], ["x", "y"], qrels)
    negatives = pd.DataFrame({"query_id": ["q", "r"], "passage_id": ["c", "b"], "source": ["random"] * 2})
    made = training_data(three, negatives)
    texts = [("x", "A", "C"), ("x", "B", "C"), ("y", "A", "B")]
    assert made.rows.to_list() == [dict(zip(("query", "positive", "negative_1"), row, strict=True)) for row in texts]
    assert made.false_negatives.passages.tolist() == [[0, 2], [1, 2], [0, 1]]
    assert made.false_negatives.relevant.tolist() == [[0, 1], [0, 1], [0, -1]]


def test_order_of_the_rows():
    order = step_order(4, 10, 0)
    assert len(order) == 10 and sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert set(order[8:]) <= {0, 1, 2, 3}
    assert step_order(4, 10, 0) == order != step_order(4, 10, 1)


def test_recipe_is_on_record(root):
    about = json.loads((train(root, "RepLLaMA").adapter.parent / "recipe.json").read_text())
    assert (about["recipe"]["rank"], about["recipe"]["alpha"], about["recipe"]["temperature"]) == (16, 64, 0.01)
    assert about["recipe"]["steps"] == 5 and about["trainable_parameters"] > 0
    limits = [about["limits"][part]["max_passage_tokens"] for part in ("training", "development")]
    assert limits == [32, 48]


def test_published_adapter_is_the_trained_one_in_half_the_bytes(root, tmp_path):
    result = train(root, "DiffRetriever multi")
    for _ in range(2):  # what is there is replaced
        folder = publish_adapter(result, tmp_path / "adapters")
    assert folder == tmp_path / "adapters" / "diffretriever-multi"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curve.jsonl", "recipe.json",
    ]  # fmt: skip
    assert 'DiffRetriever("tiny-diffusion", k_query=2, k_passage=2).with_adapter(' in (folder / "README.md").read_text()
    published, trained = weights(folder), weights(result.adapter)
    assert published.keys() == trained.keys()
    for name, weight in published.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), trained[name], rtol=2**-8, atol=1e-8)
    sizes = [(f / "adapter_model.safetensors").stat().st_size for f in (folder, result.adapter)]
    assert sizes[0] < 0.6 * sizes[1]
    retriever = make_retriever(root, "DiffRetriever multi")
    exact, rounded, zero_shot = (
        torch.from_numpy(np.array(r.encode_passages(list(make_data().collection.passages), progress=False).dense)).flatten(1)
        for r in (retriever.with_adapter(result.adapter), retriever.with_adapter(folder), retriever)
    )
    assert torch.cosine_similarity(exact, rounded).min() > 0.999 > torch.cosine_similarity(exact, zero_shot).min()


class Interrupt(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs) -> None:
        raise KeyboardInterrupt


def test_stops_early_and_stays_stopped(root):
    """Two measurements without a gain end the training, also where the process ends before the result is written."""
    recipe = make_recipe(learning_rate=1e-12, evaluate_every=1, patience=2)
    with pytest.raises(KeyboardInterrupt):
        train(root, "RepLLaMA", recipe, callbacks=[Interrupt()])
    result = train(root, "RepLLaMA", recipe, callbacks=[Interrupt()])  # does not train on
    assert [r["step"] for r in result.curve] == [0, 1, 2, 3]
    assert [r["step"] for r in result.curve if r.get("kept")] == [1]
    assert len({r["dev_ndcg"] for r in result.curve}) == 1
