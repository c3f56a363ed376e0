from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from diffret_lib.config import CHECKOUT, Profile, load_profile
from diffret_lib.data.beir import load_training_rows
from diffret_lib.data.collection import Collection
from diffret_lib.experiments import study
from diffret_lib.models.backbones import BackboneError
from diffret_lib.retrieval.systems import DiffRetriever
from diffret_lib.training import contrastive
from diffret_lib.training.contrastive import FinetunedSystem, finetune, finetune_selected, load_published, step_order
from diffret_lib.training.data import TrainingData, data_table, published_rows, training_data
from diffret_lib.training.negatives import mine_hard_negatives
from scripts.finetune import join
from tests.test_adaptation import assert_same_adapters, weights
from tests.tiny import random_texts, tiny_backbone

SETTINGS = CHECKOUT / "scripts" / "accelerate"
QRELS = {"q": {"a": 1, "b": 1}, "r": {"d": 1}}
LIMITS = {"max_query_tokens": 32, "max_passage_tokens": 48}
SYSTEMS = study.SYSTEMS | {"DiffRetriever multi": (DiffRetriever, {"k_query": 2, "k_passage": 2})}


class Kill(TrainerCallback):
    """End the process as ``kill -9`` does, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_collection(name: str, seed: int) -> Collection:
    passages = random_texts(seed, 8)
    queries, judged = [" ".join(text.split()[:2]) for text in passages], {f"q{i}": {f"p{i}": 1} for i in range(8)}
    return Collection.from_texts(name, [f"p{i}" for i in range(8)], passages, list(judged), queries, judged)


def make_data() -> TrainingData:
    collection = make_collection("train", 0)
    return training_data([(collection, mine_hard_negatives(collection, {}, 2, 13))])


def make_profile(**changes) -> Profile:
    profile = load_profile("smoke")
    settings = {"steps": 5, "batch_size": 3, "negatives": 2, "mini_batch": 4, "max_passage_tokens": 32}
    settings |= {"learning_rates": [0.01], "evaluate_every": 2, "patience": 9} | changes
    return profile.model_copy(update={"training": profile.training.model_copy(update=settings)})


def make_recipe(system: str, **changes) -> contrastive.Recipe:
    profile = make_profile(**changes)
    return contrastive.recipe_of(profile, system, profile.training.learning_rates[0])


def make_retriever(root: Path, system: str, dtype: str = "float32", **options):
    kind, counts = SYSTEMS[system]
    return kind(tiny_backbone(root / "tiny", kind.family, dtype=dtype), **counts | LIMITS | options)


def train(root: Path, system: str, dtype: str = "float32", callbacks=(), **changes) -> FinetunedSystem:
    retriever, recipe = make_retriever(root, system, dtype), make_recipe(system, **changes)
    return finetune(system, retriever, make_data(), recipe, make_collection("dev", 1), callbacks=callbacks)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("contrastive")
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFRET_CACHE", str(root / "cache"))
    yield root
    patch.undo()


class Part(TrainerCallback):
    """A training that goes on after a step and is interrupted at another; under FSDP, and only there, it is sharded."""

    def __init__(self, begin: int, end: int | None = None) -> None:
        self.begin, self.end = begin, end

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        assert state.global_step == self.begin
        sharded = {isinstance(weight, DTensor) for weight in model.parameters()}
        assert sharded == {os.environ.get("ACCELERATE_USE_FSDP") == "true"}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.end:
            raise KeyboardInterrupt


def sharded_on_cpus(self, *args, fsdp_plugin=None, made=AcceleratorState.__init__, **more) -> None:
    """What accelerate does on GPUs alone."""
    made(self, *args, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def one_of_two(root: Path, folder: Path, system: str, settings: dict) -> None:
    """A process of the next test."""
    AcceleratorState.__init__ = sharded_on_cpus
    join()
    with pytest.raises(KeyboardInterrupt):
        train(root, system, callbacks=[Part(0, 3)], **settings)
    assert not list(Path(os.environ["DIFFRET_CACHE"]).rglob("pytorch_model*"))  # the frozen weights
    result = train(root, system, callbacks=[Part(2)], **settings)
    assert train(root, system, **settings).adapter == result.adapter  # from the cache
    if os.environ.get("ACCELERATE_USE_FSDP"):
        with pytest.raises(ValueError, match="FSDP cannot train PromptReps multi"):
            train(root, "PromptReps multi", **settings)
    (folder / os.environ["RANK"]).write_text(str(result.adapter))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(root, tmp_path, kind):
    """Each has half of a step's queries, and every query meets the passages of all: weights and curves agree.

    Also after an interruption, and where the model is shared out.
    """
    system, settings = "DiffRetriever multi", {"batch_size": 8, "dropout": 0.0, "steps": 3}
    whole = train(root, system, **settings)
    script = tmp_path / "together.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.test_contrastive import one_of_two\n"
        f"one_of_two(Path({str(root)!r}), Path({str(tmp_path)!r}), {system!r}, {settings})\n"
    )
    environment = os.environ | {"DIFFRET_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{SETTINGS / kind}.yml"]
    command += ["--num_processes", "2", "--main_process_port", "0", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-9000:]
    (adapter,) = {(tmp_path / rank).read_text() for rank in "01"}
    together = FinetunedSystem.load(Path(adapter).parent)
    for name, tensor in weights(whole.adapter).items():
        torch.testing.assert_close(weights(together.adapter)[name], tensor, rtol=1e-4, atol=1e-6)
    numbers = ["loss", "grad_norm", "dev_ndcg"]
    one, two = (pd.DataFrame(result.curve)[numbers].to_numpy(float) for result in (whole, together))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    with pytest.raises(AssertionError):  # half the batch is something else
        half = train(root, system, **settings | {"batch_size": 4})
        np.testing.assert_allclose(pd.DataFrame(half.curve)[numbers].to_numpy(float), one, rtol=1e-4)


@pytest.mark.parametrize("path", sorted(SETTINGS.iterdir()), ids=lambda path: path.stem)
def test_settings_are_what_accelerate_takes(path):
    settings, options = load_config_from_file(str(path)), vars(launch_command_parser().parse_args(["script.py"]))
    assert (settings.fsdp_config | settings.deepspeed_config).keys() <= options.keys()
    assert f"`scripts/accelerate/{path.name}`" in (CHECKOUT / "README.md").read_text(encoding="utf-8")


def without_seconds(result: FinetunedSystem) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result.curve]


def test_killed_and_started_again(root, tmp_path, monkeypatch):
    """A process that is killed leaves a training that ends as an uninterrupted one does, bit for bit."""
    whole = train(root, "DiffRetriever multi")
    cache = tmp_path / "killed"
    code = (
        "from pathlib import Path\n"
        "from tests.test_contrastive import *\n"
        f"train(Path({str(root)!r}), 'DiffRetriever multi', callbacks=[Kill(5)])\n"
    )
    environment = os.environ | {"DIFFRET_CACHE": str(cache), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (work,) = cache.rglob(".*.work")
    assert sorted(p.name for p in work.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not [p for p in cache.glob("adapters/*") if p.is_dir() and p.name == whole.adapter.parent.name]
    monkeypatch.setenv("DIFFRET_CACHE", str(cache))
    again = train(root, "DiffRetriever multi")
    assert again.adapter.parent.name == whole.adapter.parent.name and again.adapter != whole.adapter
    assert_same_adapters(again.adapter, whole.adapter)
    assert without_seconds(again) == without_seconds(whole)
    assert [r["step"] for r in again.curve] == [0, 1, 2, 3, 4, 5]
    assert not list(cache.rglob(".*.work"))  # checkpoints are gone


def test_all_systems(root, monkeypatch):
    results = {name: train(root, name) for name in SYSTEMS}
    table = contrastive.training_summary(list(results.values()), {"RepLLaMA": 2.0})
    assert table["system"].tolist() == list(SYSTEMS) and (table["steps"] == 5).all()
    assert table["best_step"].isin([2, 4, 5]).all()
    assert table.set_index("system")["dev_mean_pooled"].dropna().to_dict() == {"RepLLaMA": 2.0}
    curves = pd.concat([pd.DataFrame(result.curve).assign(system=name) for name, result in results.items()])
    assert curves[curves["step"] > 0]["loss"].notna().all() and len(curves) == 6 * 6
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
        measured = contrastive.Measurement(tuned, make_collection("dev", 1))()
        assert kept["dev_ndcg"] == kept[f"dev_{tuned.modes[-1]}"] == pytest.approx(measured["ndcg"])
        assert {name: kept.get(f"dev_{name}") for name in tuned.modes} == pytest.approx(
            {name: measured[name] for name in tuned.modes}
        )
        assert ("dev_sparse" in kept) == ("sparse_loss" in kept) == tuned.reader.has_sparse
    # an adapter belongs to the backbone that it was trained on
    with pytest.raises(BackboneError):
        make_retriever(root, "RepLLaMA").with_adapter(results["DiffEmbed"].adapter)
    # finished: nothing is trained, nor is a model copied
    monkeypatch.setattr("diffret_lib.training.contrastive.add_lora", None)
    again = train(root, "RepLLaMA")
    assert again == results["RepLLaMA"] == FinetunedSystem.load(again.adapter.parent)


def test_published_rows(own_cache, tmp_path, monkeypatch):
    """Of each query the first positive, and as many negatives as asked for, the same every time."""
    monkeypatch.setenv("DIFFRET_DATA", str(tmp_path))
    folder = tmp_path / "msmarco-passage-aug"
    folder.mkdir()
    texts = {"1": ["a", "b", "c", "d"], "2": ["e"]}
    lines = [
        {"query_id": q, "query": f"query {q}", "positive_passages": [{"title": "", "text": t} for t in ("yes", "more")],
         "negative_passages": [{"title": "T", "text": text} for text in negatives]}
        for q, negatives in texts.items()
    ]  # fmt: skip
    (folder / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    data = published_rows(load_training_rows(), "rows", 3, 13)
    assert data.names == ["rows"] and not data.collections and data.false_negatives is None
    assert data_table(data).iloc[0].to_dict() == {"collection": "rows", "queries": 2, "negatives_per_query": 3}
    first, second = data.rows.to_list()
    assert list(first) == ["query", "positive", "negative_1", "negative_2", "negative_3"]
    assert (first["query"], first["positive"]) == ("query 1", "yes") and set(list(second.values())[2:]) == {"T e"}
    assert len(set(list(first.values())[2:])) == 3 <= sum(f"T {t}" in first.values() for t in texts["1"])
    again = published_rows(load_training_rows(), "rows", 3, 13)
    assert again.rows.to_list() == [first, second] and again.fingerprint == data.fingerprint
    assert published_rows(load_training_rows(), "rows", 3, 14).fingerprint != data.fingerprint
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(lines[0] | {"negative_passages": []}).encode()))
    with pytest.raises(ValueError, match="rows: query '1' has no hard negative"):
        published_rows(load_training_rows(), "rows", 3, 13)


def test_rows_of_two_collections():
    """Ids may be the same in both; a text that both have is one text."""
    first = Collection.from_texts("c", list("abcde"), list("ABCAF"), ["q", "r"], ["x", "y"], QRELS)
    second = Collection.from_texts("d", list("abc"), ["E", "C", "A"], ["q"], ["z"], {"q": {"a": 1}})
    negatives = pd.DataFrame({"query_id": list("qqrr"), "passage_id": list("cebc"), "source": ["random"] * 4})
    made = training_data([(first, negatives), (second, negatives[:2].assign(passage_id=["b", "c"]))])
    names = "query", "positive", "negative_1", "negative_2"
    texts = ["xACF", "xBCF", "yABC", "zECA"]
    assert made.rows.to_list() == [dict(zip(names, row, strict=True)) for row in texts]
    assert made.false_negatives.passages.tolist() == [[0, 2, 3], [1, 2, 3], [0, 1, 2], [4, 2, 0]]
    assert made.false_negatives.relevant.tolist() == [[0, 1], [0, 1], [0, -1], [4, -1]]
    assert made.negatives["collection"].tolist() == ["c", "c", "c", "c", "d", "d"]
    assert data_table(made)[["collection", "queries"]].to_numpy().tolist() == [["c", 2], ["d", 1]]
    assert made.fingerprint != training_data([(first, negatives)]).fingerprint


def test_order_of_the_rows():
    order = step_order(4, 10, 0)
    assert len(order) == 10 and sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert set(order[8:]) <= {0, 1, 2, 3}
    assert step_order(4, 10, 0) == order != step_order(4, 10, 1)


def test_recipe_is_on_record(root):
    about = train(root, "RepLLaMA").about
    assert (about["recipe"]["rank"], about["recipe"]["alpha"], about["recipe"]["steps"]) == (16, 64, 5)
    assert about["environment"]["versions"]["torch"] and about["environment"]["hardware"]["cpu"]
    assert about["trainable_parameters"] > 0 and about["recipe"].keys().isdisjoint({"adapters", "seeds"})
    limits = [about["limits"][part]["max_passage_tokens"] for part in ("training", "development")]
    assert limits == [32, 48]
    assert make_recipe("RepLLaMA").temperature == make_recipe("DiffEmbed").temperature == 0.02
    assert make_recipe("DiffRetriever multi").temperature == 0.01


def test_schedule_of_the_authors(root):
    """The rate rises in the first 6 % of the steps (at least one) and falls along a cosine to 0."""
    result = train(root, "DiffEmbed")
    rates = [record["learning_rate"] for record in result.curve if "learning_rate" in record]
    expected = [0.0, *(0.01 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4))]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_learning_rate_is_chosen_on_the_development_collection(root, monkeypatch):
    """Every rate has its run, and every run its entry; the best has the full one, with each seed."""
    profile, dev = make_profile(learning_rates=[1e-9, 0.01, 0.02], selection_steps=2), make_collection("dev", 1)
    given = make_retriever(root, "DiffEmbed"), make_data(), profile, dev
    result = finetune_selected("DiffEmbed", *given)
    assert [tried["learning_rate"] for tried in result.selection] == [1e-9, 0.01, 0.02]
    assert {tried["steps"] for tried in result.selection} == {2} and result.curve[-1]["step"] == 5
    scores = [tried["dev_ndcg"] for tried in result.selection]
    best = result.selection[int(np.argmax(scores))]["learning_rate"]
    assert len(set(scores)) > 1 and result.about["recipe"]["learning_rate"] == best
    second = finetune_selected("DiffEmbed", *given, repetition=1)
    assert second.about["recipe"] == result.about["recipe"] | {"seed": profile.seed + 1}
    assert second.selection == result.selection and second.repetition == 1
    assert without_seconds(second) != without_seconds(result)
    assert contrastive.training_summary([result, second], {})["repetition"].tolist() == [0, 1]
    monkeypatch.setattr("diffret_lib.training.contrastive.add_lora", None)  # nothing is trained again
    assert finetune_selected("DiffEmbed", *given, repetition=1) == second
    longer = make_profile(learning_rates=[1e-9, 0.01, 0.02, 0.04], selection_steps=2)
    with pytest.raises(TypeError):  # the first three are there, the fourth is trained
        finetune_selected("DiffEmbed", *given[:2], longer, dev)


def test_a_rate_that_lowers_a_mode_is_given_up(monkeypatch):
    """Of the rates, best first on the development collection, the first whose training lowers no mode is taken."""
    start = {"step": 0, "dev_dense": 0.5, "dev_sparse": 0.6, "dev_hybrid": 0.6, "dev_ndcg": 0.6}
    values = {0.1: (0.8, 0.0, 0.9), 0.2: (0.8, 0.59, 0.8), 0.3: (0.5, 0.6, 0.7)}
    dead = {0.1, 0.2}

    def finetune(system, retriever, data, recipe, development, callbacks=()):
        dense, sparse, hybrid = values[recipe.learning_rate]
        sparse = sparse if recipe.learning_rate in dead else 0.6
        kept = {"dev_dense": dense, "dev_sparse": sparse, "dev_hybrid": hybrid, "dev_ndcg": hybrid}
        curve = [start, {"step": recipe.steps, "kept": True} | kept]
        return FinetunedSystem(system, Path("adapter"), curve, {"recipe": recipe.model_dump()})

    monkeypatch.setattr("diffret_lib.training.contrastive.finetune", finetune)
    profile = make_profile(learning_rates=[0.3, 0.1, 0.2], selection_steps=2)
    given = "DiffRetriever single", None, None, profile, None
    result = finetune_selected(*given, repetition=1)
    assert (result.about["recipe"]["learning_rate"], result.repetition, result.lost) == (0.3, 1, [])
    assert [(t["learning_rate"], t["steps"], t.get("lost")) for t in result.selection] == [
        (0.3, 2, None), (0.1, 2, None), (0.2, 2, None), (0.1, 5, "sparse"), (0.2, 5, "sparse"),
    ]  # fmt: skip
    dead.add(0.3)
    values[0.3] = (0.4, 0.6, 0.7)
    result = finetune_selected(*given)  # all lower a mode: the best on the development collection
    assert result.about["recipe"]["learning_rate"] == 0.1
    assert [t["lost"] for t in result.selection[3:]] == ["sparse", "sparse", "dense"]


def test_bfloat16_trains_float32_adapters(root):
    result = train(root, "DiffRetriever multi", dtype="bfloat16", temperature=1.0)
    assert {weight.dtype for weight in weights(result.adapter).values()} == {torch.float32}
    exact = train(root, "DiffRetriever multi", temperature=1.0)
    assert result.adapter != exact.adapter and result.about["backbone"]["dtype"] == "torch.bfloat16"
    first = [next(r for r in run.curve if r["step"] == 1) for run in (result, exact)]
    assert first[0]["dense_loss"] == pytest.approx(first[1]["dense_loss"], rel=0.1)
    assert first[0]["sparse_loss"] == pytest.approx(first[1]["sparse_loss"], rel=0.1)


def test_published_adapter_is_the_trained_one_in_half_the_bytes(root, tmp_path):
    result = train(root, "DiffRetriever multi")
    for _ in range(2):  # what is there is replaced
        folder = contrastive.publish_adapter(result, tmp_path / "adapters")
    assert folder == tmp_path / "adapters" / "diffretriever-multi"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curve.jsonl", "recipe.json",
    ]  # fmt: skip
    card = (folder / "README.md").read_text()
    assert 'DiffRetriever("tiny-diffusion", k_query=2, k_passage=2).with_adapter(' in card
    assert "trained on train (whole), with the learning rate 0.01 and the seed 13" in card
    about = result.about | {"limits": {"development": {"max_vectors": 4, "stop": "never"}}}
    other = contrastive.publish_adapter(replace(result, system="PromptReps multi", about=about), tmp_path)
    assert 'PromptReps("tiny-diffusion", max_vectors=4, stop="never").with' in (other / "README.md").read_text()
    assert all(str(root) not in path.read_text() for path in folder.glob("*.[mj]*"))
    assert all(weight.dtype == torch.bfloat16 for weight in weights(folder).values())
    retriever = make_retriever(root, "DiffRetriever multi")
    passages = make_data().collections[0].passages
    exact, rounded, zero_shot = (
        torch.from_numpy(np.array(r.encode_passages(passages, progress=False).dense)).flatten(1)
        for r in (retriever.with_adapter(result.adapter), retriever.with_adapter(folder), retriever)
    )
    assert torch.cosine_similarity(exact, rounded).min() > 0.999 > torch.cosine_similarity(exact, zero_shot).min()


def test_published_adapter_stands_in_for_training(root, tmp_path):
    result = replace(train(root, "DiffRetriever multi"), repetition=2, selection=[{"learning_rate": 0.01}])
    folder = contrastive.publish_adapter(result, tmp_path)
    assert folder.name == "diffretriever-multi-seed-2"
    retriever = make_retriever(root, "DiffRetriever multi")
    loaded = load_published(tmp_path, "DiffRetriever multi", retriever, 2)
    assert (loaded.curve, loaded.selection, loaded.repetition) == (result.curve, result.selection, 2)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert contrastive.publish_adapter(loaded, tmp_path) == folder  # what is there already, and stays
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert load_published(tmp_path, "DiffRetriever multi", retriever, 2) == replace(loaded, about=ANY)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter of DiffRetriever multi; scripts/finetune.py"):
        load_published(tmp_path, "DiffRetriever multi", retriever)
    with pytest.raises(BackboneError, match=r"with \[2, 2\] vectors .* \[2, 4\] are asked for"):
        load_published(tmp_path, "DiffRetriever multi", retriever.on(k_passage=4), 2)
    tiny_backbone(tmp_path / "other", "diffusion", seed=1)
    other = DiffRetriever(tiny_backbone(tmp_path / "other"), k_query=2, k_passage=2, **LIMITS)
    with pytest.raises(BackboneError, match="does not fit"):
        load_published(tmp_path, "DiffRetriever multi", other, 2)


class Interrupt(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs) -> None:
        raise KeyboardInterrupt


def test_stops_early_and_stays_stopped(root):
    """Two measurements without a gain end the training, also where the process ends before the result is written."""
    settings = {"learning_rates": [1e-12], "evaluate_every": 1, "patience": 2, "callbacks": [Interrupt()]}
    with pytest.raises(KeyboardInterrupt):
        train(root, "RepLLaMA", **settings)
    result = train(root, "RepLLaMA", **settings)  # does not train on
    assert [r["step"] for r in result.curve] == [0, 1, 2, 3]
    assert [r["step"] for r in result.curve if r.get("kept")] == [1]
    assert len({r["dev_ndcg"] for r in result.curve}) == 1
