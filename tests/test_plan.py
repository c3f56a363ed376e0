"""The plan of a run whose backbones and collections are on the hub: from published sizes, without a download."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffret_lib.config import ProfileError, load_profile
from diffret_lib.data import beir
from diffret_lib.data.protocols import published
from diffret_lib.models.backbones import get_backbone
from diffret_lib.retrieval.streaming import SEGMENT_TEXTS
from scripts import plan as planning
from scripts.plan import DECODED_TOKEN, PROMPT_TOKENS, SIZES, TRAINED_BYTES, UTILISATION, check, plan
from tests.tiny import write_beir

PROFILES = ["nano", "paper", "paper-llada"]
SPEED = 4e14  # operations a second


@pytest.fixture(autouse=True)
def nothing_is_here(monkeypatch, tmp_path) -> None:
    """Neither weights nor collections of the hub, nor a network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.delenv("DIFFRET_DATA", raising=False)
    monkeypatch.setattr(planning, "in_cache", lambda found: False)
    monkeypatch.setattr(planning, "products_per_second", lambda dtype: SPEED)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(beir, "load_dataset", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_of_the_hub_is_checked_by_its_names(name):
    assert check(load_profile(name)) is None


def test_a_profile_of_the_hub_that_tests_what_it_trains_on():
    domain = load_profile("paper").model_copy(update={"test_collections": ["msmarco/dl19"]})
    with pytest.raises(ProfileError, match="all are of what is trained on"):
        check(domain)


def test_rows_that_are_not_there():
    paper = load_profile("paper")
    training = paper.training.model_copy(update={"rows": "nowhere.jsonl"})
    with pytest.raises(ProfileError, match=r"training\.rows: there is no file .*nowhere\.jsonl"):
        check(paper.model_copy(update={"training": training, "fine_tuned": None}))


def test_parameters_follow_from_the_shapes():
    """Layers, hidden size, inner size, size of keys and values, vocabulary; Qwen2 has biases of q, k and v."""
    shapes = {
        "dream-v0-instruct-7b": (28, 3584, 18944, 512, 152064, 3584 + 2 * 512),
        "qwen2.5-7b-instruct": (28, 3584, 18944, 512, 152064, 3584 + 2 * 512),
        "llada-8b-instruct": (32, 4096, 12288, 4096, 126464, 0),
        "llada-1.5": (32, 4096, 12288, 4096, 126464, 0),
        "llama-3-8b-instruct": (32, 4096, 14336, 1024, 128256, 0),
    }
    for name, (layers, hidden, inner, kv, vocabulary, biases) in shapes.items():
        layer = 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden + biases
        assert SIZES[name] == (layers * layer + 2 * vocabulary * hidden + hidden, hidden)
        assert get_backbone(name).source.hub  # a name of the registry
    assert shapes.keys() == SIZES.keys()


def test_the_plan_of_the_paper(monkeypatch):
    profile = load_profile("paper")
    found = plan(profile)
    table = found.table.set_index("part")
    rows = [published(name) for name in profile.test_collections]
    passages = {row.hub: row.passages for row in rows}  # MS MARCO's once
    texts = sum(passages.values()) + sum(row.queries for row in rows)
    row = table.loc["DiffRetriever multi, zero-shot"]
    assert row["texts"] == texts > 17_000_000
    segments = {row.hub: math.ceil(row.passages / SEGMENT_TEXTS) for row in rows}
    ranked = sum(segments[row.hub] * row.queries * 1000 * 3 * 8 for row in {r.hub: r for r in reversed(rows)}.values())
    queries = sum(row.queries for row in rows)  # passages are searched as they are encoded
    assert row["gigabytes"] == pytest.approx((16 * queries * 3584 * 4 + ranked) / 1e9)
    parts = [(row.passages, 192, row.passage_words) for row in {r.hub: r for r in rows}.values()]
    parts += [(row.queries, 64, row.query_words) for row in rows]
    tokens = sum(n * (min(most, int(np.ceil(1.35 * words))) + PROMPT_TOKENS) for n, most, words in parts)
    assert row["tokens"] == tokens
    assert row["hours"] == pytest.approx(2 * SIZES["dream-v0-instruct-7b"][0] * tokens / (SPEED * UTILISATION) / 3600)
    released = table.loc["dream-7b-multi, fine-tuned by the authors", "gigabytes"]  # (4, 16)
    assert released == pytest.approx((4 * queries * 3584 * 4 + ranked) / 1e9)
    grid = table.loc["grid, K = 16"]  # on a part of each, and on the sample that the pair is selected on
    parts = [(20_000, 500), *((min(20_000, r.passages), min(500, r.queries)) for r in rows)]
    assert grid["texts"] == sum(map(sum, parts))
    assert grid["gigabytes"] == pytest.approx(grid["texts"] * 16 * 3584 * 4 / 1e9)
    hours = table.loc[["PromptReps single, zero-shot", "PromptReps multi, zero-shot"], "hours"]
    assert hours.iloc[1] / hours.iloc[0] == pytest.approx(1 + 19 * DECODED_TOKEN)
    assert set(found.table["notebook"]) == {"01", "02", "04"}  # nothing is adapted nor fine-tuned
    weights = 2 * 2 * SIZES["dream-v0-instruct-7b"][0]
    assert found.gpu > weights and found.memory > weights + 20_000 * 31 * 3584 * 4 + 8_841_823 * 56 * 40
    kept = plan(profile.model_copy(update={"keep_passages": True, "grid_sample": None}))
    assert kept.disk > 50 * found.disk and kept.memory > 8_841_823 * 31 * 3584 * 4 and not kept.suffices
    assert found.disk > table["gigabytes"].sum() * 1e9 + weights
    said = str(found)
    on_h100 = f"TFLOP/s: {table['hours'].sum() * SPEED / 989e12:,.1f} hours"
    for part in ("30.5 GB to download: dream-v0-instruct-7b", "36% of the 400.000 TFLOP/s", "msmarco/dl20", on_h100):
        assert part in said
    room = replace(found, disk=1, memory=1)
    assert room.suffices and not replace(room, gpu_there=found.gpu / 2).suffices
    trained = plan(profile.model_copy(update={"fine_tuned": ["DiffRetriever multi"]}))
    assert trained.gpu == weights * 1.5 + 16 * (192 + PROMPT_TOKENS) * 3584 * TRAINED_BYTES > found.gpu
    faster = monkeypatch.setattr(planning, "products_per_second", lambda dtype: 2 * SPEED) or plan(profile)
    assert faster.table["hours"].sum() == pytest.approx(found.table["hours"].sum() / 2)


def test_what_is_here_is_taken_as_it_is(tmp_path, monkeypatch):
    """A folder of DIFFRET_DATA in place of the published sizes."""
    write_beir(tmp_path / "nano" / "scifact", {"a": "x", "b": "y"}, {"q": "x"}, {"q": {"a": 1}})
    profile = load_profile("nano")
    before, name = plan(profile).table.set_index("part"), "DiffEmbed, zero-shot"
    monkeypatch.setenv("DIFFRET_DATA", str(tmp_path))
    after = plan(profile).table.set_index("part")
    row = published("nano/scifact")
    assert before.loc[name, "texts"] - after.loc[name, "texts"] == row.passages + row.queries - 3
    assert before.loc[name, "gigabytes"] > after.loc[name, "gigabytes"]


def test_weights_are_here_when_all_their_files_are(tmp_path):
    spec = get_backbone("dream-v0-instruct-7b")
    repository = tmp_path / "hub" / f"models--{spec.source.hub.replace('/', '--')}"
    commit = spec.source.revision or 40 * "a"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert not planning.weights_are_here(spec.name)
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    Path(snapshot / "model-1.safetensors").touch()
    assert not planning.weights_are_here(spec.name)
    Path(snapshot / "model-2.safetensors").touch()
    assert planning.weights_are_here(spec.name)
    assert planning.weights_are_here("smollm2-135m-instruct")  # not of the hub


def test_the_rate_of_products_is_measured(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < planning.products_per_second("float32") < 1e15
