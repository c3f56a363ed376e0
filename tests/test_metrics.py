from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import ranx

from diffret_lib.retrieval.metrics import (
    METRICS,
    bootstrap_interval,
    holm,
    macro_average,
    macro_interval,
    macro_randomization_p,
    make_run,
    per_query,
    save_qrels,
    save_run,
)

QRELS = {"q2": {"a": 1, "b": 1}, "q1": {"c": 2, "d": 1}, "q3": {"e": 1}}
RUN = {
    "q1": {"d": 3.0, "x": 2.0, "c": 1.0},
    "q2": {"x": 9.0, "y": 8.0, "b": 7.0},
    "q3": {f"x{i}": 20.0 - i for i in range(10)} | {"e": 1.0},
}


def test_metrics_by_hand():
    found = per_query(QRELS, RUN)
    assert tuple(found) == METRICS
    log2, log4 = math.log2(3), 2.0  # discounts of the ranks 2 and 3
    q1 = (1 + 2 / log4) / (2 + 1 / log2)
    q2 = (1 / log4) / (1 + 1 / log2)
    np.testing.assert_allclose(found["ndcg@10"], [q1, q2, 0.0])
    np.testing.assert_allclose(found["mrr@10"], [1.0, 1 / 3, 0.0])  # the eleventh does not count
    np.testing.assert_allclose(found["recall@100"], [1.0, 0.5, 1.0])


def test_runs_and_qrels_of_ranx():
    plain, theirs = per_query(QRELS, RUN), per_query(ranx.Qrels(QRELS), make_run(RUN))
    whole = ranx.evaluate(ranx.Qrels(QRELS), make_run(RUN), list(METRICS), return_mean=False)
    for metric in METRICS:
        assert plain[metric].tolist() == theirs[metric].tolist()
        np.testing.assert_allclose(plain[metric], whole[metric], rtol=1e-12)  # of the sorted queries
    assert per_query(QRELS, RUN, ["ndcg@10"])["ndcg@10"].tolist() == plain["ndcg@10"].tolist()


def test_of_equal_scores_the_first_named_is_first():
    assert per_query({"q": {"b": 1}}, {"q": {"a": 1.0, "b": 1.0}}, ["mrr@10"])["mrr@10"] == [0.5]
    assert per_query({"q": {"b": 1}}, {"q": {"b": 1.0, "a": 1.0}}, ["mrr@10"])["mrr@10"] == [1.0]


def test_queries_without_results_count_and_foreign_ones_do_not():
    values = per_query(QRELS, {"q1": {"c": 1.0}, "other": {"c": 1.0}}, ["mrr@10"])
    assert values["mrr@10"].tolist() == [1.0, 0.0, 0.0]
    empty = {"q1": {}, "q2": {}, "q3": {"e": 1.0}}
    assert per_query(QRELS, empty, ["mrr@10"])["mrr@10"].tolist() == [0.0, 0.0, 1.0]


def test_evaluation_errors():
    with pytest.raises(ValueError, match="cannot compute 'speed@10'"):
        per_query(QRELS, RUN, ["speed@10"])
    with pytest.raises(ValueError, match="share no query.*'z1'.*'q2'"):
        per_query(QRELS, {"z1": {"a": 1.0}})
    with pytest.raises(ValueError, match="share no query"):
        per_query({}, RUN)


@pytest.mark.parametrize("metric", ["ndcg@0", "ndcg@-1", "ndcg@x", None, 5, ""])
def test_metrics_that_are_none(metric):
    with pytest.raises(ValueError, match="cannot compute"):
        per_query(QRELS, RUN, [metric])


@pytest.mark.parametrize(
    ("qrels", "run", "error", "message"),
    [
        ({"q": {"a": 1}}, {"q": {"a": "9", "b": "10"}}, TypeError, "not str"),
        ({"q": {"a": 1}}, {"q": {"a": float("nan")}}, ValueError, "query 'q' has scores that are not finite"),
        ({"q": {"a": 1}}, {"q": {"a": float("inf")}}, ValueError, "query 'q' has scores that are not finite"),
        ({"q": {"a": 0.5}}, {"q": {"a": 1.0}}, TypeError, "'float' object cannot be interpreted as an integer"),
    ],
)
def test_values_that_are_none(qrels, run, error, message):
    with pytest.raises(error, match=message):
        per_query(qrels, run)


# -- tests


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the one before, 0.5
    np.testing.assert_allclose(holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    np.testing.assert_allclose(holm([0.03, np.nan, 0.04]), [0.06, np.nan, 0.06])
    assert len(holm([])) == 0


# -- averages


def test_macro_counts_collections_the_same():
    values = {"small": np.array([1.0, 0.0]), "large": np.zeros(100)}
    assert macro_average(values) == 0.25
    for bad in ({}, {"x": np.array([])}):
        with pytest.raises(ValueError, match="nothing to average over"):
            macro_average(bad)


def test_interval_of_a_mean_is_about_the_normal_one():
    values = np.random.default_rng(0).random(400)
    mean, low, high = bootstrap_interval(values, 4000)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.003) and high == pytest.approx(mean + half, abs=0.003)
    assert bootstrap_interval(values, 4000) == (mean, low, high)


def test_stratified_interval_has_no_variance_between_collections():
    # each collection is constant: only the difference between the collections varies
    assert macro_interval({"a": np.zeros(9), "b": np.ones(9)}) == (0.5, 0.5, 0.5)
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(0, 0.1, 200), "b": rng.normal(5, 0.1, 50)}
    value, low, high = macro_interval(values, 4000)
    half = 1.96 * math.sqrt(values["a"].var() / 200 + values["b"].var() / 50) / 2
    assert (value - low, high - value) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))
    single = macro_interval({"a": np.array([1.0]), "b": np.zeros(3)})
    assert single[0] == 0.5 and math.isnan(single[1])


def test_macro_randomization_by_enumeration():
    differences = {"a": np.array([0.3, 0.1]), "b": np.array([0.2, -0.1, 0.4])}
    weights = [0.3 / 2, 0.1 / 2, 0.2 / 3, -0.1 / 3, 0.4 / 3]
    sums = [abs(sum(s * w for s, w in zip(signs, weights, strict=True))) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean([s >= abs(sum(weights)) - 1e-12 for s in sums])
    assert macro_randomization_p(differences) == pytest.approx(expected)
    assert macro_randomization_p({"a": np.zeros(4)}) == 1.0
    clear = {"a": np.full(30, 0.1) + np.random.default_rng(0).normal(0, 0.05, 30)}
    assert macro_randomization_p(clear, 999, 3) == pytest.approx(2 / 1000)
    with pytest.raises(ValueError, match="nothing to average"):
        macro_randomization_p({})


# -- runs on disk


def test_runs_on_disk(tmp_path):
    scores = {"q1": {"b": np.nextafter(0.1, 0), "a": 0.1}, "q2": {"é": 1e-300, "c": -2.0}, "none": {}}
    save_run(scores, tmp_path / "new" / "r.trec", tag="t")
    lines = [line.split(" ") for line in (tmp_path / "new" / "r.trec").read_text(encoding="utf-8").splitlines()]
    assert [line[:4] for line in lines] == [[q, "Q0", p, r] for q, p, r in
                                            (("q1", "a", "1"), ("q1", "b", "2"), ("q2", "é", "1"), ("q2", "c", "2"))]
    assert all(float(score) == scores[q][p] and tag == "t" for q, _, p, _, score, tag in lines)
    save_run(RUN, tmp_path / "ours.trec")
    assert ranx.Run.from_file(str(tmp_path / "ours.trec"), kind="trec").to_dict() == RUN


@pytest.mark.parametrize(
    ("scores", "message"),
    [({"q 1": {"a": 1.0}}, "'q 1' is empty or has whitespace"), ({"q": {"a\tb": 1.0}}, r"'a\\tb' is empty"), ({"q": {"": 1.0, "b": 0.5}}, "'' is empty")],
)  # fmt: skip
def test_ids_that_the_format_cannot_hold(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        save_run(scores, tmp_path / "r.trec")
    assert not list(tmp_path.iterdir())


def test_qrels_on_disk(tmp_path):
    save_qrels({"q1": {"a": 1, "b": 0}}, tmp_path / "new" / "qrels.txt")
    assert (tmp_path / "new" / "qrels.txt").read_text() == "q1 0 a 1\nq1 0 b 0\n"
    with pytest.raises(ValueError, match="'a b' is empty or has whitespace"):
        save_qrels({"q1": {"a b": 1}}, tmp_path / "other.txt")
    assert not (tmp_path / "other.txt").exists()
