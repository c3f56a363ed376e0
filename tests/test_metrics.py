from __future__ import annotations

import itertools
import math

import ir_measures
import numpy as np
import pytest
import ranx
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG

from diffret_lib.retrieval.metrics import (
    METRICS,
    holm,
    macro_average,
    macro_randomization_p,
    make_run,
    per_query,
    save_qrels,
    save_run,
)
from diffret_lib.retrieval.search import to_results

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


def test_numbers_are_those_of_trec_eval():
    """Graded, zero and negative judgements, judged passages that no one retrieved, missing queries, and ties."""
    rng = np.random.default_rng(0)
    names, qrels, apart, tied = [f"d{i}" for i in rng.permutation(100)], {}, {}, {}
    for query in (f"q{i}" for i in range(20)):
        qrels[query] = dict(zip(rng.choice(names, 30, replace=False), rng.integers(-2, 4, 30).tolist()))
        apart[query] = dict(zip(rng.choice(names, 80, replace=False), rng.random(80).tolist()))
        # of equal scores trec_eval has the greater id first, and here the first that is named is first
        tied[query] = {p: round(4 * score) / 4 for p, score in sorted(apart[query].items(), reverse=True)}
    del apart["q3"], tied["q5"]
    for run in (apart, tied, {**apart, "other": {"d1": 1.0}}):
        found = per_query(qrels, run)
        for metric, theirs in zip(METRICS, (nDCG @ 10, RR, R @ 100), strict=True):
            by_query = {m.query_id: m.value for m in ir_measures.pytrec_eval.iter_calc([theirs], qrels, run)}
            wanted = np.array([by_query.get(query, 0.0) for query in sorted(qrels)])
            wanted[wanted < (0.1 if theirs is RR else 0)] = 0  # a first relevant passage below the cut at 10
            np.testing.assert_allclose(found[metric], wanted, atol=1e-6)
        assert 0.05 < found["ndcg@10"].mean() < 0.9


def as_read(read, path) -> dict[str, dict[str, float]]:
    """A file of TREC's format as ir-measures reads it."""
    found: dict[str, dict[str, float]] = {}
    for query, passage, value, *_ in read(str(path)):
        found.setdefault(query, {})[passage] = value
    return found


def test_a_run_of_ties_has_the_same_numbers_in_trec_eval(tmp_path):
    """Scores are set apart so that trec_eval, which reads float32, keeps the order."""
    ids = [f"p{i:03}" for i in np.random.default_rng(0).permutation(60)]
    run = to_results(np.repeat([[0.3, 0.1, 0.0]], 20, axis=1), np.arange(60)[None], ["q"], ids)
    qrels = {"q": dict.fromkeys(ids[3:60:7], 1)}
    save_run(run, tmp_path / "r.trec")
    (theirs,) = ir_measures.iter_calc([nDCG @ 10], qrels, ir_measures.read_trec_run(str(tmp_path / "r.trec")))
    read = as_read(ir_measures.read_trec_run, tmp_path / "r.trec")
    assert per_query(qrels, read)["ndcg@10"] == [pytest.approx(theirs.value, abs=1e-6)]


@pytest.mark.parametrize(
    ("qrels", "run", "metrics", "message"),
    [
        (QRELS, RUN, ["speed@10"], "cannot compute 'speed@10'"), (QRELS, RUN, ["ndcg@0"], "cannot compute 'ndcg@0'"),
        (QRELS, RUN, ["ndcg@-1"], "cannot compute"), (QRELS, RUN, ["ndcg@x"], "cannot compute"),
        (QRELS, RUN, ["ndcg@10@5"], "cannot compute"), (QRELS, RUN, [f"ndcg@{10**30}"], "cannot compute"),
        (QRELS, RUN, [""], "cannot compute"), (QRELS, RUN, [None], "metrics must be strings, not NoneType"),
        (QRELS, RUN, [5], "metrics must be strings, not int"), (QRELS, RUN, "ndcg@10", "metrics must be a list"),
        (QRELS, {"z1": {"a": 1.0}}, METRICS, "share no query.*'z1'.*'q2'"), ({}, RUN, METRICS, "share no query"),
        ({"q": {"a": 1}}, {"q": {"a": "9", "b": "10"}}, METRICS, "a finite number .* .q., passage .a., not .9."),
        ({"q": {"a": 1}}, {"q": {"a": math.nan}}, METRICS, "a finite number .* not nan"),
        ({"q": {"a": 1}}, {"q": {"a": -math.inf}}, METRICS, "a finite number .* not -inf"),
        ({"q": {"a": 1}}, {"q": {"a": None}}, METRICS, "a finite number .* not None"),
        ({"q": {"a": 1}}, {"q": {"a": True}}, METRICS, "a finite number .* not True"),
        ({"q": {"a": 0.5}}, {"q": {"a": 1.0}}, METRICS, "a whole number of at most 9 digits .* not 0.5"),
        ({"q": {"a": 10**30}}, {"q": {"a": 1.0}}, METRICS, "a whole number of at most 9 digits"),
        ({"q": {"a": 1}}, {"q": {7: 1.0}}, METRICS, "passage ids of the run must be strings, not int .as 7."),
        ({7: {"a": 1}}, {"q": {"a": 1.0}}, METRICS, "query ids of the qrels must be strings"),
        ({"q": {"a": 1}}, {"q": ["a"]}, METRICS, "the run must map query ids to passage ids"),
        ({"q": {"a": 1}}, None, METRICS, "the run must map query ids to passage ids to numbers, not None"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_named(qrels, run, metrics, message):
    with pytest.raises(ValueError, match=message):
        per_query(qrels, run, metrics)


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


def test_macro_randomization_by_enumeration():
    differences = {"a": np.array([0.3, 0.1]), "b": np.array([0.2, -0.1, 0.4])}
    weights = [0.3 / 2, 0.1 / 2, 0.2 / 3, -0.1 / 3, 0.4 / 3]
    sums = [
        abs(sum(s * w for s, w in zip(signs, weights, strict=True))) for signs in itertools.product((1, -1), repeat=5)
    ]
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
    assert [line[:4] for line in lines] == [
        [q, "Q0", p, r] for q, p, r in (("q1", "a", "1"), ("q1", "b", "2"), ("q2", "é", "1"), ("q2", "c", "2"))
    ]
    assert all(float(score) == scores[q][p] and tag == "t" for q, _, p, _, score, tag in lines)
    save_run(RUN, tmp_path / "ours.trec")
    assert ranx.Run.from_file(str(tmp_path / "ours.trec"), kind="trec").to_dict() == RUN


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"q 1": {"a": 1.0}}, "holds no white space, got 'q 1'"), ({"q": {"a\tb": 1.0}}, r"got 'a\\tb'"),
        ({"q": {"": 1.0, "b": 0.5}}, "not empty .* got ''"), ({"q": {"\ufeffa": 1.0}}, "holds no white space"),
        ({"q": {"a": math.nan}}, "a finite number"), ({"q": {"a": "1"}}, "a finite number"),
        ({"q": {3: 1.0}}, "not int"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        save_run(scores, tmp_path / "r.trec")
    with pytest.raises(ValueError, match="not empty"):
        save_run(RUN, tmp_path / "r.trec", tag="two words")
    with pytest.raises(ValueError, match="holds no white space, got 'a b'"):
        save_qrels({"q1": {"a b": 1}}, tmp_path / "r.trec")
    assert not list(tmp_path.iterdir())


ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


def of_queries(values):
    return st.dictionaries(ids, st.dictionaries(ids, values, min_size=1, max_size=4), max_size=3)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(run=of_queries(st.floats(width=64)), qrels=of_queries(st.integers(-(10**10), 10**10)))
def test_what_is_written_is_read_back_or_refused_by_name(tmp_path_factory, run, qrels):
    path = tmp_path_factory.getbasetemp() / "made.txt"
    for save, read, made, bound in (
        (save_run, ir_measures.read_trec_run, run, math.inf), (save_qrels, ir_measures.read_trec_qrels, qrels, 10**9),
    ):  # fmt: skip
        names = [*made, *itertools.chain.from_iterable(made.values())]
        sound = all(name.split() == [name] and "\ufeff" not in name for name in names)
        sound &= all(abs(value) < bound for row in made.values() for value in row.values())
        if sound:
            save(made, path)
            assert as_read(read, path) == made
        else:
            with pytest.raises(ValueError, match=r"must be a string that is not empty|a (finite|whole) number"):
                save(made, path)


def test_qrels_on_disk(tmp_path):
    save_qrels({"q1": {"a": 1, "b": 0, "c": -1}}, tmp_path / "new" / "qrels.txt")
    assert (tmp_path / "new" / "qrels.txt").read_text() == "q1 0 a 1\nq1 0 b 0\nq1 0 c -1\n"
