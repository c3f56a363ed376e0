from __future__ import annotations

from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from diffret_lib.experiments import efficiency
from diffret_lib.experiments.efficiency import ANSWERED, END_TO_END, FORCED, SEARCH, latency, measured, median_interval
from diffret_lib.models.prompts import encode_plain
from tests.test_study import changed

KEYS = ["quantity", "system", "decoding", "side", "count", "k_passage", "batch", "text_tokens"]


@pytest.fixture(scope="module")
def study(s):
    settings = {"counts": [1, 2, 5], "text_tokens": [8, 16], "batch_sizes": [1, 3], "index_sizes": [100, 10**9],
                "rounds": 7}  # fmt: skip
    return changed(s, sample={"queries": 4, "passages": 8}, efficiency=s.profile.efficiency.model_dump() | settings)


@pytest.fixture(scope="module")
def few(study):
    """The same with a small index, as every measurement of queries has one."""
    return changed(study, efficiency=study.profile.efficiency.model_dump() | {"index_sizes": [100, 200]})


@pytest.fixture(scope="module")
def table(few):
    return latency(few, (2, 1))


def test_rounds_are_interleaved(monkeypatch):
    order, ticks = [], iter(range(100))
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(ticks) ** 2)
    calls = {n: lambda n=n: order.append(n) for n in "abc"}
    times = efficiency.interleaved(calls, 3, torch.device("cpu"), "letters")
    assert "".join(order) == "abc" + "abccbaabc"  # a warm-up of each
    # call number i takes (2i + 1)^2 - (2i)^2
    assert {n: t.tolist() for n, t in times.items()} == {"a": [1, 21, 25], "b": [5, 17, 29], "c": [9, 13, 33]}


def test_forced_decoding_has_every_vector(study):
    timed = [("PromptReps", how, (7, 7)) for how in (FORCED, ANSWERED)]
    systems = efficiency._retrievers(study, timed, 64)
    forced, free = (systems[key] for key in timed)
    texts = ["A heap is a binary tree.", "Return a sorted copy.", "eigenvalues"]
    whole, kept = (r.encode_passages(texts, progress=False) for r in (forced, free))
    assert (whole.lengths == 7).all()
    for i, n in enumerate(kept.lengths):  # what there is of the answer is the same
        np.testing.assert_allclose(whole.dense[i, :n], kept.dense[i, :n], atol=1e-5)


def test_texts_are_long_enough(study):
    texts = efficiency.long_texts(study, 40, 3)
    tokenizer = study.backbone("diffusion").tokenizer
    assert len(set(texts)) == 3 and all(len(ids) >= 40 for ids in encode_plain(tokenizer, texts))


def test_what_is_timed(table):
    assert not table.duplicated(KEYS).any() and not table.isna().any().any()
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    one = table[(table["side"] == "query") & (table["batch"] == 1)]
    timed = {q: set(zip(own["system"], own["decoding"], own["count"])) for q, own in one.groupby("quantity")}
    singles = {(s, "", 1) for s in ("DiffRetriever", "PromptReps", "DiffEmbed", "Mean pooling", "RepLLaMA")}
    # the selected pair (2, 1), the grid's largest (2, 2); N = 4 fine-tuned, 3 zero-shot
    decoded = {("PromptReps", FORCED, 4), ("PromptReps", FORCED, 3), ("PromptReps", ANSWERED, 3)}
    several = {("DiffRetriever", "", 2), *decoded}
    assert timed[SEARCH] == timed[END_TO_END] == singles | several
    curve = {("DiffRetriever", "", 5), ("PromptReps", FORCED, 2), ("PromptReps", FORCED, 5)}
    assert timed["encoding"] == singles | several | curve
    # by a system of the study: neither the most masks nor the zero-shot N forced is
    used = set(one[one["used"]][KEYS[1:3] + KEYS[4:6]].itertuples(index=False, name=None))
    several = {("DiffRetriever", "", 2, 1), ("PromptReps", FORCED, 4, 4), ("PromptReps", ANSWERED, 3, 3)}
    assert used == {(*single, 1) for single in singles} | several
    assert set(table["batch"]) == {1, 3} and set(table[table["side"] == "passage"]["text_tokens"]) == {8, 16}
    indexed = table[table["quantity"] != "encoding"]["passages"]  # 200 vectors at the most vectors, for all
    assert (indexed == 50).all() and (table[table["quantity"] == "encoding"]["passages"] == 0).all()
    assert (table[table["count"] == 1][["ratio", "ratio_low", "ratio_high"]] == 1).all().all()


def test_ratios_are_taken_within_rounds_and_end_to_end_is_a_sum(few, monkeypatch):
    """Rounds of which the second is three times as slow: no ratio moves."""

    def timed(calls, rounds, device, desc):
        # a pair searches in the milliseconds of its vectors, the sparse index in 1; systems encode in 10 a vector
        cost = [1.0 if k == "sparse" else sum(k) if isinstance(k[0], int) else 10.0 * k[2][0] for k in calls]
        return {key: np.array([ms / 1000, 3 * ms / 1000]) for key, ms in zip(calls, cost)}

    monkeypatch.setattr(efficiency, "interleaved", timed)
    rows = latency(few, (2, 1))
    ms = rows[rows["batch"] == 1].set_index(KEYS[:6])["value"]
    assert ms["encoding", "DiffRetriever", "", "query", 2, 1] == 40  # the median of 20 and 60
    assert ms[SEARCH, "DiffRetriever", "", "query", 2, 1] == 2 * (3 + 1)
    assert ms[SEARCH, "DiffEmbed", "", "query", 1, 1] == 2 * 2  # has no sparse side
    assert ms[END_TO_END, "PromptReps", FORCED, "query", 4, 4] == 2 * (40 + 8 + 1)
    ratios = efficiency.claim4_ratios(rows).set_index(["quantity", "system", "decoding", "count", "batch"])["value"]
    assert np.allclose(ratios["encoding"], ratios["encoding"].index.get_level_values("count"))
    assert ratios[END_TO_END, "PromptReps", FORCED, 4, 3] == pytest.approx((40 + 9) / (10 + 3))


def test_claim_4(table):
    ratios = efficiency.claim4_ratios(table)
    assert list(ratios)[:6] == ["comparison", "quantity", "system", "decoding", "count", "batch"]
    assert set(ratios["quantity"]) == {"encoding", END_TO_END} and (ratios["unit"] == "times").all()
    assert "PromptReps N=3 / N=1, as answered, batch 3, end to end" in set(ratios["comparison"])
    for batch, quantity in ((1, "encoding"), (3, END_TO_END)):
        own = ratios[(ratios["batch"] == batch) & (ratios["quantity"] == quantity)]
        ways = set(zip(own["system"], own["decoding"], own["count"], own["used"]))
        unused = {("DiffRetriever", "", 2, False), ("PromptReps", FORCED, 3, False)}
        assert ways >= unused | {("PromptReps", ANSWERED, 3, True), ("PromptReps", FORCED, 4, True)}
    text = efficiency.in_words(ratios)
    for quantity, batch in (("encoding", 1), (END_TO_END, 3)):
        own = ratios[(ratios["batch"] == batch) & (ratios["quantity"] == quantity)]
        for way in (["DiffRetriever", "", 2], ["PromptReps", ANSWERED, 3], ["PromptReps", FORCED, 3]):
            row = own[(own[["system", "decoding", "count"]] == way).all(axis=1)].iloc[-1]
            assert f"{row['value']:.2f} times [{row['low']:.2f}, {row['high']:.2f}]" in text
    assert text.count(". ") == 1 and "50 passages" in text and "(K = 2)" in text and "to decode all 3." in text


def test_interval_of_a_median():
    values = np.random.default_rng(0).lognormal(size=20)
    # the sign test: 95 % of binomial(20, 1/2) lies between the 6th and the 15th value, and no fewer do
    assert stats.binom.cdf(5, 20, 0.5) < 0.025 < stats.binom.cdf(6, 20, 0.5)
    assert list(median_interval(values).values()) == [np.median(values), np.sort(values)[5], np.sort(values)[14]]
    assert np.isnan(median_interval(values[:5])["low"])
    assert median_interval(values[:6])["high"] == max(values[:6])


def test_search_latency_and_what_does_not_fit(study, monkeypatch):
    memory = namedtuple("Memory", "available")(10**9)
    monkeypatch.setattr(efficiency.psutil, "virtual_memory", lambda: memory)
    searched = efficiency.search_latency(study, (2, 4))
    assert searched[["index", "vectors", "passages"]].to_numpy().tolist() == [
        ["dense, single (faiss)", 100, 100], ["sparse", 100, 100], ["MaxSim", 100, 25],
        ["dense, single (faiss)", 10**9, 10**9], ["MaxSim", 10**9, 25 * 10**7],
    ]  # fmt: skip
    assert searched["value"].notna().tolist() == [True] * 3 + [False] * 2
    assert searched["note"].str.startswith("left out: 25%").tolist() == [False] * 3 + [True] * 2


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
    other = dict.fromkeys(("cpu", "cores_usable", "gpu", "system"), "other")
    monkeypatch.setattr(efficiency, "hardware", lambda: other)
    measured(study, measure, (2, 4))
    assert calls == [(2, 4), (2, 2), (2, 4)]
    # the sparse rows that are searched are of passages that are read up to this length
    measured(changed(study, max_passage_tokens=9), measure, (2, 4))
    assert calls[3:] == [(2, 4)]


def test_effectiveness_beside_latency(table):
    cells = [("zero-shot", "BM25", "sparse", 0.7, None), ("zero-shot", "DiffRetriever single", "hybrid", 0.5, (1, 1)),
             ("zero-shot", "DiffRetriever multi", "hybrid", 0.6, (2, 1)),
             ("zero-shot", "DiffEmbed", "dense", 0.2, None),
             ("zero-shot", "DiffRetriever multi (text only)", "hybrid", 0.3, (2, 1)),
             ("zero-shot", "PromptReps multi", "hybrid", 0.3, (3, 3)),
             ("zero-shot", "PromptReps multi", "dense", 0.1, (3, 3)),
             ("fine-tuned", "DiffRetriever multi", "hybrid", 0.8, (2, 1)),
             ("fine-tuned", "PromptReps multi", "hybrid", 0.5, (4, 4))]  # fmt: skip
    rows = [(t, s, m, *(k or (None, None)), c, v + d)
            for t, s, m, v, k in cells for c, d in (("one", 0.1), ("two", -0.1), ("left out", 9.0))]  # fmt: skip
    columns = ["training", "system", "mode", "k_query", "k_passage", "collection", "value"]
    frame = pd.DataFrame(rows, columns=columns).assign(metric="ndcg@10")
    placed = efficiency.effectiveness_latency(table, frame, ["one", "two"]).set_index(["training", "system"])
    expected = {(t, s): v for t, s, m, v, _ in cells if m != "sparse" and "text" not in s and v != 0.1}
    assert placed["ndcg"].to_dict() == pytest.approx(expected)
    ms = table[(table["side"] == "query") & (table["batch"] == 1)].set_index([*KEYS[:3], *KEYS[4:6]])["value"]
    for (training, name), system in {
        ("zero-shot", "DiffRetriever multi"): ("DiffRetriever", "", 2, 1),
        ("zero-shot", "DiffEmbed"): ("DiffEmbed", "", 1, 1),
        ("zero-shot", "PromptReps multi"): ("PromptReps", ANSWERED, 3, 3),
        ("fine-tuned", "PromptReps multi"): ("PromptReps", FORCED, 4, 4),
    }.items():  # fmt: skip
        spent = [ms[(quantity, *system)] for quantity in ("encoding", SEARCH, END_TO_END)]
        assert placed.loc[(training, name), ["encoding_ms", "search_ms", "latency_ms"]].tolist() == spent
    assert (placed["passages"] == 50).all()
