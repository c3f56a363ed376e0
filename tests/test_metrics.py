from __future__ import annotations

import itertools
import math
from functools import partial

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
    load_run,
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


def test_runs_and_qrels_of_ranx():
    plain, theirs = per_query(QRELS, RUN), per_query(ranx.Qrels(QRELS), make_run(RUN))
    assert tuple(plain) == METRICS
    with pytest.raises(ValueError, match="a finite number is needed for query 'q', passage 'a', not 'x'"):
        make_run({"q": {"a": "x"}})
    assert all(plain[metric].tolist() == theirs[metric].tolist() for metric in METRICS)
    assert per_query(QRELS, RUN, ["ndcg@10"])["ndcg@10"].tolist() == plain["ndcg@10"].tolist()


def test_numbers_are_those_of_trec_eval():
    """Graded, zero and negative judgements, judged passages no one retrieved, queries without results, and ties."""
    rng = np.random.default_rng(0)
    names, qrels, apart, tied = [f"d{i}" for i in rng.permutation(100)], {}, {}, {}
    for query in (f"q{i}" for i in range(20)):
        qrels[query] = dict(zip(rng.choice(names, 30, replace=False), rng.integers(-2, 4, 30).tolist()))
        apart[query] = dict(zip(rng.choice(names, 80, replace=False), rng.random(80).tolist()))
        # of equal scores trec_eval has the greater id first, and here the first that is named is first
        tied[query] = {p: round(4 * score) / 4 for p, score in sorted(apart[query].items(), reverse=True)}
    del apart["q3"], tied["q5"]
    apart["q4"] = {}
    for run in (apart, tied, {**apart, "other": {"d1": 1.0}}):
        found = per_query(qrels, run)
        for metric, theirs in zip(METRICS, (nDCG @ 10, RR, R @ 100), strict=True):
            by_query = {m.query_id: m.value for m in ir_measures.pytrec_eval.iter_calc([theirs], qrels, run)}
            wanted = np.array([by_query.get(query, 0.0) for query in sorted(qrels)])
            wanted[wanted < (0.1 if theirs is RR else 0)] = 0  # a first relevant passage below the cut at 10
            np.testing.assert_allclose(found[metric], wanted, atol=1e-6)
        assert 0.05 < found["ndcg@10"].mean() < 0.9


def test_a_run_of_ties_has_the_same_numbers_in_trec_eval(tmp_path):
    """Scores are set apart so that trec_eval, which reads float32, keeps the order."""
    ids = [f"p{i:03}" for i in np.random.default_rng(0).permutation(60)]
    run = to_results(np.repeat([[0.3, 0.1, 0.0]], 20, axis=1), np.arange(60)[None], ["q"], ids)
    qrels = {"q": dict.fromkeys(ids[3:60:7], 1)}
    save_run(run, tmp_path / "r.trec")
    (theirs,) = ir_measures.iter_calc([nDCG @ 10], qrels, ir_measures.read_trec_run(str(tmp_path / "r.trec")))
    assert per_query(qrels, load_run(tmp_path / "r.trec"))["ndcg@10"] == [pytest.approx(theirs.value, abs=1e-6)]


@pytest.mark.parametrize(("qrels", "run", "metrics", "message"), [
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
])  # fmt: skip
def test_what_cannot_be_evaluated_is_named(qrels, run, metrics, message):
    with pytest.raises(ValueError, match=message):
        per_query(qrels, run, metrics)


# -- tests


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the one before, 0.5
    np.testing.assert_allclose(holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    np.testing.assert_allclose(holm([0.03, np.nan, 0.04]), [0.06, np.nan, 0.06])
    assert len(holm([])) == 0
    for bad in ([2.0], [0.5, -0.1]):
        with pytest.raises(ValueError, match="p-values must be from 0 to 1"):
            holm(bad)


# -- averages


def test_macro_randomization_by_enumeration():
    differences = {"a": np.array([0.3, 0.1]), "b": np.array([0.2, -0.1, 0.4])}
    weights = [0.3 / 2, 0.1 / 2, 0.2 / 3, -0.1 / 3, 0.4 / 3]
    sums = np.abs(np.array(list(itertools.product((1, -1), repeat=5))) @ weights)
    expected = np.mean(sums >= abs(sum(weights)) - 1e-12)
    assert macro_randomization_p(differences) == pytest.approx(expected)
    assert macro_randomization_p({"a": np.zeros(4)}) == 1.0
    clear = {"a": np.full(30, 0.1) + np.random.default_rng(0).normal(0, 0.05, 30)}
    assert macro_randomization_p(clear, 999, 3) == pytest.approx(2 / 1000)
    for values, options, message in (
        ({}, {}, "nothing to average"), ({"x": np.array([])}, {}, "nothing to average"),
        ({"a": np.array([np.nan, 1])}, {}, "differences must be finite"),
        (differences, {"resamples": 0}, "resamples must be a whole number of at least 1, not 0"),
        (differences, {"resamples": 1.5}, "not 1.5"), (differences, {"seed": -1}, "seed must be .*, not -1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            macro_randomization_p(values, **options)


# -- runs on disk


def test_runs_on_disk(tmp_path):
    scores = {"q1": {"b": 0.09999999999999999, "a": 0.1}, "q2": {"é": 1e-300, "c": -2.0}, "none": {}}
    save_run(scores, tmp_path / "new" / "r.trec", tag="t")
    assert (tmp_path / "new" / "r.trec").read_text(encoding="utf-8").splitlines() == [
        "q1 Q0 a 1 0.1 t", "q1 Q0 b 2 0.09999999999999999 t",
        "q2 Q0 é 1 1e-300 t", "q2 Q0 c 2 -2.0 t",
    ]  # fmt: skip


@pytest.mark.parametrize("change", [
    lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: text.replace(b" ", b"\t"), lambda text: b"\n" + text.rstrip(),
])  # fmt: skip
def test_runs_of_other_programs(tmp_path, change):
    (tmp_path / "r.trec").write_bytes(change("q1 Q0 é 1 2.5 t\nq1 Q0 b 2 -1e3 t\n".encode()))
    assert load_run(tmp_path / "r.trec") == {"q1": {"é": 2.5, "b": -1000.0}}


@pytest.mark.parametrize(("line", "message"), [
    (b"q Q0 a b 2 1 t", "query, Q0, passage, rank, score and tag are needed, got 'q Q0 a b 2 1 t'"),
    (b"q Q0 a 1 0.5", "are needed"), (b"q Q0 a 1 nan t", "a finite number, got 'nan'"), (b"q Q0 a 1 -inf t", "-inf"),
    (b"q Q0 a 1 x t", "'x'"), (b"q1 Q0 b 3 0 t", "query 'q1' has passage 'b' twice"), (b"\xe9 Q0 a 1 1 t", "not UTF-8"),
    ("\ufeffq Q0 a 1 1 t".encode(), "an id must be"),
])  # fmt: skip
def test_what_is_no_run_is_named_with_its_line(tmp_path, line, message):
    (tmp_path / "r.trec").write_bytes(b"q1 Q0 b 2 1 t\n" + line)
    with pytest.raises(ValueError, match=f"^{tmp_path}/r.trec:2: .*{message}"):
        load_run(tmp_path / "r.trec")


ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6) | st.sampled_from(["", "a\tb", "\ufeffa", "q 1"])


def of_queries(values):
    return st.dictionaries(ids, st.dictionaries(ids, values, min_size=1, max_size=4), max_size=3)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(run=of_queries(st.floats(width=64)), qrels=of_queries(st.integers(-(10**10), 10**10)))
def test_what_is_written_is_read_back_or_refused_by_name(tmp_path_factory, run, qrels):
    path = tmp_path_factory.getbasetemp() / "made.txt"
    path.unlink(missing_ok=True)
    for save, read, made, bound in (
        (save_run, ir_measures.read_trec_run, run, math.inf), (save_qrels, ir_measures.read_trec_qrels, qrels, 10**9),
    ):  # fmt: skip
        names = [*made, *itertools.chain.from_iterable(made.values())]
        sound = all(name.split() == [name] and "\ufeff" not in name for name in names)
        sound &= all(abs(value) < bound for row in made.values() for value in row.values())
        if sound:
            save(made, path)
            lines = [(query, passage, value) for query, row in made.items() for passage, value in row.items()]
            assert sorted(lines) == sorted((query, passage, value) for query, passage, value, *_ in read(str(path)))
            assert save is save_qrels or load_run(path) == made
            path.unlink()
        else:
            with pytest.raises(ValueError, match=r"must be a string that is not empty|a (finite|whole) number"):
                save(made, path)
            assert not path.exists()


def test_what_the_format_cannot_hold(tmp_path):
    tagged = partial(save_run, tag="two words")
    for save, made in (tagged, RUN), (save_run, {"q": {3: 1.0}}), (save_qrels, {"q": {3: 1}}):
        with pytest.raises(ValueError, match=r"is not empty|not int"):
            save(made, tmp_path / "r.trec")
    assert not list(tmp_path.iterdir())
