from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import ranx
from scipy import stats

from diffret_lib.evaluation import (
    METRICS,
    bootstrap_interval,
    compare,
    evaluate_run,
    holm,
    load_run,
    macro_average,
    macro_interval,
    macro_randomization_p,
    paired_p_value,
    per_query,
    save_qrels,
    save_run,
)
from diffret_lib.scoring import make_run

QRELS = {"q2": {"a": 1, "b": 1}, "q1": {"c": 2, "d": 1}, "q3": {"e": 1}}
RUN = {
    "q1": {"d": 3.0, "x": 2.0, "c": 1.0},
    "q2": {"x": 9.0, "y": 8.0, "b": 7.0},
    "q3": {f"x{i}": 20.0 - i for i in range(10)} | {"e": 1.0},
}


def test_metrics_by_hand():
    found = evaluate_run(QRELS, RUN)
    assert found.query_ids == ["q1", "q2", "q3"] and tuple(found.per_query) == METRICS
    log2, log4 = math.log2(3), 2.0  # discounts of the ranks 2 and 3
    q1 = (1 + 2 / log4) / (2 + 1 / log2)
    q2 = (1 / log4) / (1 + 1 / log2)
    np.testing.assert_allclose(found.per_query["ndcg@10"], [q1, q2, 0.0])
    np.testing.assert_allclose(found.per_query["mrr@10"], [1.0, 1 / 3, 0.0])  # the eleventh does not count
    np.testing.assert_allclose(found.per_query["recall@100"], [1.0, 0.5, 1.0])
    assert found.means["mrr@10"] == pytest.approx(4 / 9)


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
    with pytest.raises(ValueError, match="cannot compute speed@10"):
        evaluate_run(QRELS, RUN, ["speed@10"])
    with pytest.raises(ValueError, match="share no query.*'z1'.*'q1'"):
        evaluate_run(QRELS, {"z1": {"a": 1.0}})
    with pytest.raises(ValueError, match="no queries"):
        evaluate_run({}, RUN)


# -- tests


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the one before, 0.5
    np.testing.assert_allclose(holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    np.testing.assert_allclose(holm([0.03, np.nan, 0.04]), [0.06, np.nan, 0.06])
    assert len(holm([])) == 0


def test_student():
    a, b = np.array([0.5, 0.7, 0.2, 0.9]), np.array([0.4, 0.4, 0.3, 0.5])
    d = a - b
    t = d.mean() / (d.std(ddof=1) / 2)
    assert paired_p_value(a, b) == pytest.approx(2 * stats.t.sf(abs(t), 3))
    assert paired_p_value(a, a) == 1.0
    assert paired_p_value(a, a - 1) == 0.0
    assert math.isnan(paired_p_value(a[:1], b[:1]))
    with pytest.raises(ValueError, match="one shape"):
        paired_p_value(a, b[:2])
    with pytest.raises(ValueError, match="'student' or 'fisher'"):
        paired_p_value(a, b, "z")


def test_fisher_enumerates_all_signs_of_few_queries():
    a, b = np.array([0.5, 0.7, 0.2, 0.9, 0.3]), np.array([0.4, 0.4, 0.3, 0.5, 0.1])
    d = a - b
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    assert paired_p_value(a, b, "fisher") == pytest.approx(expected)


def test_fisher_by_sampling_is_seeded_and_near_student():
    rng = np.random.default_rng(0)
    a = rng.random(60)
    b = a + rng.normal(0.05, 0.2, 60)
    p = paired_p_value(a, b, "fisher", seed=1)
    assert p == paired_p_value(a, b, "fisher", seed=1)
    assert p == pytest.approx(paired_p_value(a, b), abs=0.02)


def test_compare_corrects_the_family():
    rng = np.random.default_rng(0)
    base = rng.random(50)
    values = {"base": base, "same": base, "better": base + rng.normal(0.1, 0.1, 50), "noise": base + rng.normal(0, 0.3, 50)}
    table = compare(values, baseline="base")
    assert table["system"].tolist() == ["same", "better", "noise"] and set(table["other"]) == {"base"}
    np.testing.assert_allclose(table["p_holm"], holm(table["p_value"]))
    assert table["significant"].tolist() == [False, True, False]
    assert table["difference"][1] == pytest.approx((values["better"] - base).mean())
    assert len(compare(values)) == 6 and len(compare({"base": base})) == 0
    with pytest.raises(ValueError, match="same queries"):
        compare({"a": base, "b": base[:3]})
    with pytest.raises(ValueError, match="no system 'x'"):
        compare(values, baseline="x")


# -- averages


def test_macro_counts_collections_the_same():
    values = {"small": np.array([1.0, 0.0]), "large": np.zeros(100)}
    assert macro_average(values) == 0.25
    with pytest.raises(ValueError, match="no collections"):
        macro_average({})
    with pytest.raises(ValueError, match="'x' has no values"):
        macro_average({"x": np.array([])})


def test_interval_of_a_mean_is_about_the_normal_one():
    values = np.random.default_rng(0).random(400)
    mean, low, high = bootstrap_interval(values, 4000)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.003) and high == pytest.approx(mean + half, abs=0.003)
    assert bootstrap_interval(values, 4000) == (mean, low, high)
    assert bootstrap_interval(values, 4000, confidence=0.5)[1] > low


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
    with pytest.raises(ValueError, match="no collections"):
        macro_randomization_p({})


# -- runs on disk


def test_run_round_trip(tmp_path):
    scores = {"q1": {"a": 0.1, "b": np.nextafter(0.1, 0)}, "q2": {"é": 1e-300, "c": -2.0}}
    save_run(make_run(scores, name="DiffRetriever multi"), tmp_path / "new" / "r.trec")
    loaded = load_run(tmp_path / "new" / "r.trec")
    assert loaded.to_dict() == scores and loaded.name == "DiffRetriever_multi"
    assert list(loaded.run["q1"]) == ["a", "b"]
    assert load_run(tmp_path / "new" / "r.trec", name="x").name == "x"
    save_run(dict(reversed(scores.items())), tmp_path / "plain.trec")
    assert load_run(tmp_path / "plain.trec").to_dict() == scores and load_run(tmp_path / "plain.trec").name == "run"
    assert (tmp_path / "new" / "r.trec").read_text().splitlines()[0] == "q1 Q0 a 1 0.1 DiffRetriever_multi"


@pytest.mark.parametrize(
    ("scores", "message"),
    [({"q 1": {"a": 1.0}}, "query id 'q 1'"), ({"q": {"a\tb": 1.0}}, r"passage id 'a\\tb'"), ({"q": {"": 1.0, "b": 0.5}}, "passage id ''")],
)  # fmt: skip
def test_ids_that_the_format_cannot_hold(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        save_run(scores, tmp_path / "r.trec")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 a 1 0.5", "5 columns"),
        ("q Q0 a 1 high run", "high"),
        ("q Q0 a 1 nan run", "not finite"),
        ("q Q0 ok 1 0.5 run", "twice"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "r.trec").write_text(f"q Q0 ok 1 0.9 run\n{line}\n")
    with pytest.raises(ValueError, match=rf"r\.trec, line 2: .*{message}"):
        load_run(tmp_path / "r.trec")


def test_an_empty_file_is_an_empty_run(tmp_path):
    (tmp_path / "r.trec").write_text("")
    assert len(load_run(tmp_path / "r.trec").run) == 0


def test_qrels_on_disk(tmp_path):
    save_qrels({"q1": {"a": 1, "b": 0}}, tmp_path / "new" / "qrels.txt")
    assert (tmp_path / "new" / "qrels.txt").read_text() == "q1 0 a 1\nq1 0 b 0\n"
    with pytest.raises(ValueError, match="the id 'a b' is empty or has whitespace"):
        save_qrels({"q1": {"a b": 1}}, tmp_path / "other.txt")
    assert not (tmp_path / "other.txt").exists()
