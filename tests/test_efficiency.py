from __future__ import annotations

from collections import namedtuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tests.test_study import world  # noqa: F401  (a fixture)
from tests.tiny import tiny_backbone

from diffret_lib import efficiency, figures
from diffret_lib.efficiency import (
    ANSWERED,
    FORCED,
    claim4_ratios,
    effectiveness_latency,
    encoding_latency,
    interleaved,
    long_texts,
    measured,
    search_latency,
)
from diffret_lib.prompts import encode_plain
from diffret_lib.retrievers import PromptReps
from diffret_lib.study import Study


@pytest.fixture(scope="module")
def study(world):  # noqa: F811
    s, _ = world
    settings = {"counts": [1, 4], "text_tokens": [8, 16], "batch_sizes": [1, 2], "index_sizes": [100, 10**9], "repeats": 2}
    profile = s.profile.model_copy(update={"efficiency": s.profile.efficiency.model_copy(update=settings)})
    return Study(profile, s._backbones, s._collections)


@pytest.fixture(scope="module")
def encoded(study):
    return encoding_latency(study)


@pytest.fixture(scope="module")
def searched(study):
    return search_latency(study, (2, 4))


def test_rounds_are_interleaved(monkeypatch):
    order, ticks = [], iter(range(100))
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(ticks) ** 2)
    times = interleaved({n: lambda n=n: order.append(n) for n in "abc"}, 3, torch.device("cpu"))
    assert "".join(order) == "abccbaabc"
    # call number i takes (2i + 1)^2 - (2i)^2
    assert times == {"a": [1, 21, 25], "b": [5, 17, 29], "c": [9, 13, 33]}


def test_forced_decoding_has_every_token(tmp_path):
    backbone = tiny_backbone(tmp_path, "autoregressive")
    free, forced = (PromptReps(backbone, max_new_tokens=6) for _ in range(2))
    forced = efficiency._forced(forced)
    forced.reader.special_ids = forced.reader.special_ids[:0]
    texts = ["A heap is a binary tree.", "Return a sorted copy.", "eigenvalues"]
    assert (forced.encode_passages(texts, progress=False).lengths == 7).all()
    kept = free.encode_passages(texts, progress=False)
    whole = forced.encode_passages(texts, progress=False)
    for i, n in enumerate(kept.lengths):  # what there is of the answer is the same
        np.testing.assert_allclose(whole.dense[i, :n], kept.dense[i, :n], atol=1e-5)


def test_texts_are_long_enough(study):
    texts = long_texts(study, 40, 3)
    tokenizer = study.backbone("diffusion").tokenizer
    assert len(set(texts)) == 3 and all(len(ids) >= 40 for ids in encode_plain(tokenizer, texts))


def test_encoding_latency(encoded):
    table, ratios = encoded, claim4_ratios(encoded, [1, 4])
    assert not table.drop(columns="decoding").isna().any().any()
    assert (table["q1_ms"] <= table["median_ms"]).all() and (table["median_ms"] <= table["q3_ms"]).all()
    curve = table[(table["curve"] == "vectors") & (table["side"] == "query")]
    kinds = set(zip(curve["system"], curve["vectors"], curve["decoding"]))
    assert kinds == {
        ("DiffRetriever", 1, ""), ("DiffRetriever", 4, ""), ("PromptReps single", 1, ""), ("DiffEmbed", 1, ""),
        ("Mean pooling", 1, ""), *(("PromptReps multi", n, d) for n in (2, 5) for d in (FORCED, ANSWERED)),
    }  # fmt: skip
    assert set(table[table["curve"] == "length"]["text_tokens"]) == {8, 16}
    assert set(table[table["curve"] == "batch"]["batch_size"]) == {1, 2}
    own = table[(table["system"] == "PromptReps single") | ((table["system"] == "DiffRetriever") & (table["vectors"] == 1))]
    assert (own[["ratio", "ratio_q1", "ratio_q3"]] == 1).all().all()
    assert ratios["comparison"].tolist() == [
        "DiffRetriever K=4 / K=1", "PromptReps N=4 / single", "PromptReps N=4 / single, as answered"
    ]  # fmt: skip
    assert ratios[["vectors_a", "vectors_b"]].to_numpy().tolist() == [[4, 1], [5, 1], [5, 1]]
    row = curve[(curve["system"] == "DiffRetriever") & (curve["vectors"] == 4)]
    assert ratios["ratio"][0] == row["ratio"].item()


def test_ratios_are_taken_within_rounds(study, monkeypatch):
    """Rounds of which the second is three times as slow: no ratio moves."""

    def timed(calls, repeats, device):
        cost = {name: 10.0 * name[2] for name in calls}
        return {name: [c / 1000, 3 * c / 1000] for name, c in cost.items()}

    monkeypatch.setattr(efficiency, "_timed", timed)
    table = encoding_latency(study)
    ratios = claim4_ratios(table, [1, 4])
    assert np.allclose(table["ratio"], table["vectors"]) and np.allclose(table["ratio_q1"], table["ratio_q3"])
    assert np.allclose(table["median_ms"], 20 * table["vectors"])
    assert ratios["ratio"].tolist() == pytest.approx([4, 5, 5])


def test_search_latency_and_what_does_not_fit(searched):
    assert searched[["index", "passages"]].to_numpy().tolist()[:4] == [
        ["dense, single", 100], ["dense, single (faiss)", 100], ["MaxSim", 25], ["sparse", 100]
    ]  # fmt: skip
    assert (searched["vectors"][:4] == 100).all() and searched["median_ms"][:4].notna().all()
    left_out = searched[searched["vectors"] == 10**9]
    assert len(left_out) == 4 and left_out["median_ms"].isna().all() and left_out["note"].str.contains("128.0 GB of vectors").all()


def test_measured_once_on_a_machine(study, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path))
    calls = []

    def measure(study, pair):
        calls.append(pair)
        return pd.DataFrame({"ms": [0.1 + 0.2], "note": [""], "pair": [str(pair)]})

    first = measured(study, measure, (2, 4))
    pd.testing.assert_frame_equal(measured(study, measure, (2, 4)), first)
    assert first["ms"][0] == 0.1 + 0.2 and calls == [(2, 4)]
    measured(study, measure, (2, 2))
    monkeypatch.setattr(efficiency, "hardware", lambda: dict.fromkeys(("cpu", "cores_usable", "gpu", "system"), "other"))
    measured(study, measure, (2, 4))
    assert calls == [(2, 4), (2, 2), (2, 4)]


def test_memory_decides(study, monkeypatch):
    monkeypatch.setattr(efficiency.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(100 * 32 * 4 * 3))
    assert search_latency(study, (2, 4))["note"].str.startswith("left out").all()


def test_effectiveness_beside_latency(encoded, searched):
    cells = [("DiffRetriever single", "hybrid", 0.5), ("DiffRetriever multi", "hybrid", 0.6), ("DiffEmbed", "dense", 0.2),
             ("PromptReps single", "hybrid", 0.4), ("PromptReps multi (N=4)", "hybrid", 0.3)]  # fmt: skip
    frame = pd.DataFrame(
        [{"system": s, "mode": m, "collection": c, "metric": "ndcg@10", "value": v + d}
         for s, m, v in cells for c, d in (("one", 0.1), ("two", -0.1), ("left out", 9.0))]
    )  # fmt: skip
    table = effectiveness_latency(*[encoded, searched], frame, (2, 4), ["one", "two"], 4).set_index("system")
    assert table["ndcg"].to_dict() == pytest.approx({s: v for s, _, v in cells})
    curve = encoded[(encoded["curve"] == "vectors") & (encoded["side"] == "query")]
    # Kq = 2 was not timed: the next larger count was
    multi = curve[(curve["system"] == "DiffRetriever") & (curve["vectors"] == 4)]["median_ms"].item()
    assert table["encoding_ms"]["DiffRetriever multi"] == multi
    search = searched.set_index(["index", "vectors"])["median_ms"]
    assert table["search_ms"]["DiffRetriever multi"] == pytest.approx(search["MaxSim", 100] + search["sparse", 100])
    assert table["search_ms"]["DiffEmbed"] == search["dense, single (faiss)", 100]
    assert np.allclose(table["latency_ms"], table["encoding_ms"] + table["search_ms"])
    for fig in (figures.latency_vectors(encoded), figures.latency_search(searched), figures.effectiveness_latency(table.reset_index())):
        assert all(ax.get_xlabel() and "ms" in ax.get_xlabel() + ax.get_ylabel() for ax in fig.axes)
        fig.canvas.draw()
        plt.close(fig)
