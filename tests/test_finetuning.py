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

from diffret_lib import figures
from diffret_lib import study as study_module
from diffret_lib.backbones import with_adapter
from diffret_lib.collection import Collection, load_collection
from diffret_lib.finetuning import (
    SYSTEMS,
    FinetunedSystem,
    finetune,
    learning_curves,
    publish_adapter,
    step_order,
    systems,
    training_data,
    training_rows,
    training_summary,
)
from diffret_lib.profiles import load_profile
from diffret_lib.study import Study

WORDS = ["heap", "tree", "array", "axis", "sorted copy", "eigenvalues", "square", "parent", "children", "queue"]
PAIR = (2, 2)


class Kill(TrainerCallback):
    """End the process as ``kill -9`` does, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_study(root: Path) -> Study:
    """A study on tiny backbones, with 8 passages to train on."""
    rng = np.random.default_rng(0)
    for name in ("train", "dev"):
        if (root / name).exists():
            continue
        passages = [" ".join(rng.choice(WORDS, 6)) + f" {i}." for i in range(8)]
        queries = [" ".join(p.split()[:2]) for p in passages]
        Collection(
            name, [f"p{i}" for i in range(8)], passages, [f"q{i}" for i in range(8)], queries,
            {f"q{i}": {f"p{i}": 1} for i in range(8)},
        ).write_beir(root / name)  # fmt: skip
    content = load_profile("smoke").model_dump()
    content["train_collection"], content["test_collections"] = str(root / "train"), [str(root / "dev")]
    content["training"] |= {
        "sample": {"queries": None, "passages": None}, "steps": 5, "batch_size": 3, "negatives": 2, "mini_batch": 4,
        "learning_rate": 0.01, "evaluate_every": 2, "patience": 9,
        "development": {"collection": str(root / "dev"), "queries": None, "passages": None},
    }  # fmt: skip
    return Study(load_profile("smoke").model_validate(content))


def use_tiny_backbones(root: Path) -> None:
    def load(name, *, dtype):
        return tiny_backbone(root / "tiny", "diffusion" if "diffusion" in name else "autoregressive")

    study_module.load_backbone = load


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetuning")
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFRET_CACHE", str(root / "cache"))
    patch.setattr(study_module, "load_backbone", study_module.load_backbone)  # put back at the end
    use_tiny_backbones(root)
    yield root
    patch.undo()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_killed_and_started_again(root, tmp_path, monkeypatch):
    """A process that is killed leaves a training that ends as an uninterrupted one does, bit by bit."""
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "whole"))
    whole = finetune(make_study(root), "DiffRetriever multi", PAIR, progress=False)
    cache = tmp_path / "killed"
    code = (
        "from pathlib import Path\n"
        "from tests.test_finetuning import *\n"
        f"root = Path({str(root)!r})\n"
        "use_tiny_backbones(root)\n"
        "finetune(make_study(root), 'DiffRetriever multi', PAIR, callbacks=[Kill(3)], progress=False)\n"
    )
    environment = os.environ | {"DIFFRET_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(cache.glob("finetuned/*")) and list(cache.glob("finetuning/*/checkpoint-2"))
    monkeypatch.setenv("DIFFRET_CACHE", str(cache))
    again = finetune(make_study(root), "DiffRetriever multi", PAIR, progress=False)
    assert again.adapter.parent.name == whole.adapter.parent.name and again.adapter != whole.adapter
    for name, tensor in weights(whole.adapter).items():
        assert torch.equal(weights(again.adapter)[name], tensor), name
    steps = [{k: v for k, v in r.items() if k != "seconds"} for r in again.curve]
    assert steps == [{k: v for k, v in r.items() if k != "seconds"} for r in whole.curve]
    assert [r["step"] for r in steps] == [0, 1, 2, 3, 4, 5]
    assert not list(cache.glob("finetuning/*"))  # checkpoints are gone


def test_all_systems(root, monkeypatch):
    study = make_study(root)
    found = systems(study, PAIR)
    assert [s.name for s in found] == list(SYSTEMS) and {s.training for s in found} == {"fine-tuned"}
    counts = {s.name: (s.k_query, s.k_passage) for s in found}
    assert counts == {
        "DiffRetriever single": (1, 1), "DiffRetriever multi": PAIR, "DiffEmbed": (None, None),
        "PromptReps single": (1, 1), "PromptReps multi": (5, 5), "RepLLaMA": (None, None),
    }  # fmt: skip
    results = [finetune(study, name, PAIR) for name in SYSTEMS]
    table = training_summary(results)
    assert table["system"].tolist() == list(SYSTEMS) and (table["steps"] == 5).all()
    assert table["best_step"].isin([2, 4, 5]).all()
    curves = learning_curves(results)
    assert list(curves) == ["system", "step", "loss", "dev_ndcg", "seconds"] and len(curves) == 6 * 6
    assert curves[curves["step"] > 0]["loss"].notna().all()
    # the same steps on the same rows teach every system something on them
    loss = curves.pivot(index="system", columns="step", values="loss")
    assert (loss[5] < loss[1]).sum() >= 4
    for system, result in zip(found, results, strict=True):
        own = study.backbone(system.family)
        assert system.retriever.backbone is own and system.adapter == result.adapter
        tuned = system.retriever.with_adapter(system.adapter)
        assert tuned.fingerprint("query") != system.retriever.fingerprint("query")
        assert tuned.settings("document") == system.retriever.settings("document")
        merged = tuned.backbone.model
        changed = [not torch.equal(a, b) for a, b in zip(own.model.parameters(), merged.parameters(), strict=True)]
        assert any(changed) and all(v.abs().max() > 0 for k, v in weights(result.adapter).items() if "lora_B" in k)
        text = (result.adapter / "adapter_config.json").read_text()
        assert str(root) not in text
        frame = study.evaluate(system, study.test_collections[:1])
        assert frame["value"].between(0, 1).all() and set(frame["training"]) == {"fine-tuned"}
    # finished: nothing is trained, nor is a model copied
    monkeypatch.setattr("diffret_lib.finetuning.new_adapter", None)
    again = finetune(study, "RepLLaMA", PAIR)
    assert again == results[-1] == FinetunedSystem.load(again.adapter.parent)


def test_merged_adapter_is_the_trained_model(root):
    study = make_study(root)
    result = finetune(study, "DiffEmbed", PAIR)
    system = next(s for s in systems(study, PAIR) if s.name == "DiffEmbed")
    retriever = system.retriever.with_adapter(system.adapter)
    kept = next(r for r in result.curve if r.get("kept"))
    frame = study.evaluate(system, [load_collection(study.profile.training.development.collection)])
    assert kept["dev_ndcg"] == pytest.approx(frame[frame["metric"] == "ndcg@10"]["value"].mean())
    assert with_adapter(study.backbone("diffusion"), result.adapter).fingerprint == retriever.backbone.fingerprint


def test_rows_of_the_training_collection(root):
    data = training_data(make_study(root), PAIR)
    assert data.rows.column_names == ["query", "positive", "negative_1", "negative_2"] and len(data.rows) == 8
    texts = dict(zip(data.collection.passage_ids, data.collection.passages, strict=True))
    for query_id, row in zip(data.collection.query_ids, data.rows, strict=True):
        mined = data.negatives[data.negatives["query_id"] == query_id]["passage_id"]
        assert row["positive"] == texts[data.collection.relevant(query_id)[0]]
        assert [row["negative_1"], row["negative_2"]] == [texts[p] for p in mined]
        assert row["positive"] not in (row["negative_1"], row["negative_2"])
    assert set(data.negatives["source"]) <= {"BM25", "DiffRetriever", "random"}
    assert training_data(make_study(root), PAIR).fingerprint == data.fingerprint
    two = Collection("c", ["a", "b", "c"], ["A", "B", "C"], ["q"], ["x"], {"q": {"a": 1, "b": 1}})
    rows = training_rows(two, pd.DataFrame({"query_id": ["q"], "passage_id": ["c"], "source": ["random"]}))
    assert rows.to_list() == [{"query": "x", "positive": p, "negative_1": "C"} for p in ("A", "B")]


def test_order_of_the_rows():
    order = step_order(4, 10, 0)
    assert len(order) == 10 and sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert set(order[8:]) <= {0, 1, 2, 3}
    assert step_order(4, 10, 0) == order != step_order(4, 10, 1)


def test_an_unknown_system(root):
    with pytest.raises(ValueError, match="there is no system 'ColBERT'; there are DiffRetriever single"):
        finetune(make_study(root), "ColBERT", PAIR)


def test_recipe_is_on_record(root):
    study = make_study(root)
    about = json.loads((finetune(study, "RepLLaMA", PAIR).adapter.parent / "recipe.json").read_text())
    assert (about["recipe"]["rank"], about["recipe"]["alpha"], about["recipe"]["temperature"]) == (16, 64, 0.01)
    assert about["recipe"]["steps"] == 5 and about["trainable_parameters"] > 0


def test_published_adapter_is_the_trained_one_in_half_the_bytes(root, tmp_path):
    study = make_study(root)
    result = finetune(study, "DiffRetriever multi", PAIR)
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
    assert (folder / "adapter_model.safetensors").stat().st_size < 0.6 * (
        result.adapter / "adapter_model.safetensors"
    ).stat().st_size
    retriever = next(s for s in systems(study, PAIR) if s.name == "DiffRetriever multi").retriever
    texts = study.train_collection.passages
    exact, rounded, zero_shot = (
        torch.from_numpy(np.asarray(r.encode_passages(texts, progress=False).dense)).flatten(1)
        for r in (retriever.with_adapter(result.adapter), retriever.with_adapter(folder), retriever)
    )
    assert torch.cosine_similarity(exact, rounded).min() > 0.999 > torch.cosine_similarity(exact, zero_shot).min()


class Interrupt(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs) -> None:
        raise KeyboardInterrupt


def test_stops_early_and_stays_stopped(root, tmp_path, monkeypatch):
    """Two measurements without a gain end the training, also where the process ends before the result is written."""
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path))
    study = make_study(root)
    training = study.profile.training.model_copy(update={"learning_rate": 1e-12, "evaluate_every": 1, "patience": 2})
    study.profile = study.profile.model_copy(update={"training": training})
    with pytest.raises(KeyboardInterrupt):
        finetune(study, "RepLLaMA", PAIR, callbacks=[Interrupt()], progress=False)
    result = finetune(study, "RepLLaMA", PAIR, callbacks=[Interrupt()], progress=False)  # does not train on
    assert [r["step"] for r in result.curve] == [0, 1, 2, 3]
    assert [r["step"] for r in result.curve if r.get("kept")] == [1]
    assert len({r["dev_ndcg"] for r in result.curve}) == 1


def test_figure_of_the_curves(root):
    results = [finetune(make_study(root), name, PAIR, progress=False) for name in ("DiffEmbed", "RepLLaMA")]
    loss, dev = figures.training_curves(learning_curves(results)).axes
    assert [line.get_label() for line in dev.lines] == ["DiffEmbed", "RepLLaMA"]
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4, 5] and list(dev.lines[0].get_xdata()) == [0, 2, 4, 5]
    assert list(dev.lines[1].get_ydata()) == [r["dev_ndcg"] for r in results[1].curve if "dev_ndcg" in r]
