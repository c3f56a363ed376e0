from __future__ import annotations

from collections import namedtuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from diffret_lib.experiments import efficiency
from diffret_lib.experiments.efficiency import (
    ANSWERED,
    FORCED,
    claim4_ratios,
    effectiveness_latency,
    encoding_latency,
    interleaved,
    long_texts,
    measured,
    median_interval,
    pairs_of,
    read_effectiveness,
    search_latency,
)
from diffret_lib.experiments.study import Study
from diffret_lib.models.prompts import encode_plain
from diffret_lib.report import figures
from tests.test_study import world  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def study(world):  # noqa: F811
    s, _ = world
    settings = {"counts": [1, 4], "text_tokens": [8, 16], "batch_sizes": [1, 2], "index_sizes": [100, 10**9], "repeats": 2,
                "query_repeats": 7}
    profile = s.profile.model_copy(update={"efficiency": s.profile.efficiency.model_copy(update=settings)})
    return Study(profile, s._backbones, s._collections)


@pytest.fixture(scope="module")
def encoded(study):
    return encoding_latency(study)


@pytest.fixture(scope="module")
def searched(study):
    return search_latency(study, (2, 4), [(5, 5)])


def test_rounds_are_interleaved(monkeypatch):
    order, ticks = [], iter(range(100))
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(ticks) ** 2)
    calls = {n: lambda n=n: order.append(n) for n in "abc"}
    times = interleaved(calls, 3, torch.device("cpu"), "letters", warm_up=False)
    assert "".join(order) == "abccbaabc"
    # call number i takes (2i + 1)^2 - (2i)^2
    assert times == {"a": [1, 21, 25], "b": [5, 17, 29], "c": [9, 13, 33]}
    interleaved(calls, 1, torch.device("cpu"), "letters")
    assert "".join(order[9:]) == "abcabc"


def test_forced_decoding_has_every_token(study):
    systems = efficiency._systems(study, [6], 64, False)
    free, forced = (systems["PromptReps multi", "autoregressive", 7, decoding] for decoding in (ANSWERED, FORCED))
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
    assert not table.drop(columns=["decoding", "ratio_low", "ratio_high"]).isna().any().any()
    assert (table["q1_ms"] <= table["median_ms"]).all() and (table["median_ms"] <= table["q3_ms"]).all()
    curve = table[(table["curve"] == "vectors") & (table["side"] == "query")]
    kinds = set(zip(curve["system"], curve["vectors"], curve["decoding"]))
    assert kinds == {
        ("DiffRetriever", 1, ""), ("DiffRetriever", 4, ""), ("PromptReps single", 1, ""), ("DiffEmbed", 1, ""),
        ("Mean pooling", 1, ""), ("RepLLaMA", 1, ""), *(("PromptReps multi", n, d) for n in (2, 5) for d in (FORCED, ANSWERED)),
    }  # fmt: skip
    assert set(table[table["curve"] == "length"]["text_tokens"]) == {8, 16}
    assert set(table[table["curve"] == "batch"]["batch_size"]) == {1, 2}
    own = table[(table["system"] == "PromptReps single") | ((table["system"] == "DiffRetriever") & (table["vectors"] == 1))]
    assert (own[["ratio", "ratio_q1", "ratio_q3"]] == 1).all().all()
    assert ratios["comparison"].tolist() == [
        "DiffRetriever K=4 / K=1", "PromptReps N=4 / single", "PromptReps N=4 / single, as answered"
    ]  # fmt: skip
    assert ratios[["vectors_a", "vectors_b"]].to_numpy().tolist() == [[4, 1], [5, 1], [5, 1]]
    assert ratios["system"].tolist() == ["DiffRetriever", "PromptReps", "PromptReps"]
    assert ratios["count"].tolist() == [4] * 3
    row = curve[(curve["system"] == "DiffRetriever") & (curve["vectors"] == 4)]
    assert ratios["ratio"][0] == row["ratio"].item()
    # two rounds have no interval; the query's curve, on which claim 4 rests, has more
    assert curve["ratio_low"].notna().all() and table.drop(curve.index)["ratio_low"].isna().all()
    assert (ratios["ratio_low"] <= ratios["ratio"]).all() and (ratios["ratio"] <= ratios["ratio_high"]).all()


def test_ratios_are_taken_within_rounds(study, monkeypatch):
    """Rounds of which the second is three times as slow: no ratio moves."""

    def timed(calls, repeats, device, desc):
        cost = {name: 10.0 * name[2] for name in calls}
        return {name: [c / 1000, 3 * c / 1000] for name, c in cost.items()}

    monkeypatch.setattr(efficiency, "interleaved", timed)
    table = encoding_latency(study)
    ratios = claim4_ratios(table, [1, 4])
    assert np.allclose(table["ratio"], table["vectors"]) and np.allclose(table["ratio_q1"], table["ratio_q3"])
    assert np.allclose(table["median_ms"], 20 * table["vectors"])
    assert ratios["ratio"].tolist() == pytest.approx([4, 5, 5])


def test_interval_of_a_median():
    values = np.random.default_rng(0).lognormal(size=20)
    # the sign test: 95 % of binomial(20, 1/2) lies between the 6th and the 15th value, and no fewer do
    assert stats.binom.cdf(5, 20, 0.5) < 0.025 < stats.binom.cdf(6, 20, 0.5)
    assert median_interval(values) == (np.sort(values)[5], np.sort(values)[14])
    assert np.isnan(median_interval(values[:5])).all()
    assert median_interval(values[:6]) == (min(values[:6]), max(values[:6]))


def test_search_latency_and_what_does_not_fit(searched):
    assert searched[["index", "passages"]].to_numpy().tolist()[:3] == [
        ["dense, single (faiss)", 100], ["sparse", 100], ["dense, single (faiss)", 10**9]
    ]  # fmt: skip
    timed = searched[searched["note"] == ""]
    assert timed["median_ms"].notna().all() and (timed["vectors"] == timed["passages"] * timed["k_passage"]).all()
    # every kind searches the passages of the largest MaxSim index, and the other pair does
    same = timed[timed["passages"] == 25]
    assert same[["index", "k_query", "k_passage"]].to_numpy().tolist() == [
        ["dense, single (faiss)", 1, 1], ["sparse", 1, 1], ["MaxSim", 2, 4], ["MaxSim", 5, 5]
    ]  # fmt: skip
    left_out = searched[searched["vectors"] == 10**9]
    assert len(left_out) == 3 and left_out["median_ms"].isna().all()
    assert (left_out["note"].str.contains("128.0 GB of vectors") == (left_out["index"] != "sparse")).all()


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
    notes = search_latency(study, (2, 4)).query("index != 'sparse'")["note"]
    assert len(notes) == 4 and notes.str.startswith("left out").all()


def evaluation() -> pd.DataFrame:
    cells = [("zero-shot", "BM25", "sparse", 0.7, None), ("zero-shot", "DiffRetriever single", "hybrid", 0.5, (1, 1)),
             ("zero-shot", "DiffRetriever multi", "hybrid", 0.6, (2, 4)),
             ("zero-shot", "DiffEmbed", "dense", 0.2, None),
             ("zero-shot", "PromptReps single", "hybrid", 0.4, (1, 1)),
             ("zero-shot", "PromptReps multi (N=4)", "hybrid", 0.3, (5, 5)),
             ("fine-tuned", "DiffRetriever multi", "hybrid", 0.8, (2, 4)),
             ("fine-tuned", "RepLLaMA", "dense", 0.5, None)]  # fmt: skip
    frame = pd.DataFrame(
        [{"training": t, "system": s, "mode": m, "k_query": k and k[0], "k_passage": k and k[1], "collection": c,
          "metric": "ndcg@10", "value": v + d}
         for t, s, m, v, k in cells for c, d in (("one", 0.1), ("two", -0.1), ("left out", 9.0))]
    )  # fmt: skip
    return frame.astype({"k_query": "Int64", "k_passage": "Int64"})


def test_effectiveness_beside_latency(encoded, searched):
    assert pairs_of(evaluation()) == [(2, 4), (5, 5)]
    table = effectiveness_latency(encoded, searched, evaluation(), ["one", "two"]).set_index(["training", "system"])
    expected = evaluation().query("collection == 'one' and system != 'BM25'").set_index(["training", "system"])
    assert table["ndcg"].to_dict() == pytest.approx((expected["value"] - 0.1).to_dict())
    curve = encoded[(encoded["curve"] == "vectors") & (encoded["side"] == "query") & (encoded["decoding"] != FORCED)]
    encoding = curve.set_index(["system", "vectors"])["median_ms"]
    search = searched[searched["passages"] == 25].set_index(["index", "k_passage"])["median_ms"]
    assert (table["indexed_passages"] == 25).all()
    dense, sparse = search["dense, single (faiss)", 1], search["sparse", 1]
    for name, read, vectors, searching in [
        ("DiffRetriever single", "DiffRetriever", 1, dense + sparse),
        ("DiffRetriever multi", "DiffRetriever", 4, search["MaxSim", 4] + sparse),  # 2 was not timed
        ("PromptReps multi (N=4)", "PromptReps multi", 5, search["MaxSim", 5] + sparse),
        ("DiffEmbed", "DiffEmbed", 1, dense),
    ]:
        row = table.loc["zero-shot", name]
        assert row["timed_vectors"] == vectors and row["encoding_ms"] == encoding[read, vectors]
        assert row["search_ms"] == pytest.approx(searching)
        assert row["latency_ms"] == pytest.approx(encoding[read, vectors] + searching)
    own = [table.loc[t, "DiffRetriever multi"]["latency_ms"] for t in ("zero-shot", "fine-tuned")]
    assert own[0] == own[1]
    drawn = figures.latency_vectors(encoded), figures.latency_search(searched)
    for fig in (*drawn, figures.effectiveness_latency(table.reset_index())):
        assert all(ax.get_xlabel() and "ms" in ax.get_xlabel() + ax.get_ylabel() for ax in fig.axes)
        fig.canvas.draw()
        plt.close(fig)


def test_evaluation_is_read_as_it_was_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"evaluation\.csv"):
        read_effectiveness(tmp_path)
    evaluation().to_csv(tmp_path / "evaluation.csv", index=False)
    pd.testing.assert_frame_equal(read_effectiveness(tmp_path), evaluation())
