from __future__ import annotations

import json
import math
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from diffret_lib.config import CHECKOUT
from diffret_lib.experiments import claims
from diffret_lib.experiments.claims import (
    CONTRADICTED,
    INCONCLUSIVE,
    MARGIN,
    NOT_TESTED,
    OTHERS,
    PRODUCERS,
    SAME_LATENCY,
    SEVERAL_TIMES,
    SUPPORTED,
    combine,
    decide,
    describe,
    transfer_losses,
    write_claims,
)
from diffret_lib.experiments.comparison import compare_systems, transfer
from diffret_lib.report import figures
from diffret_lib.report.results import Results
from diffret_lib.retrieval.search import MODES

COLLECTIONS = ("pydocs/pandas-test", "pydocs/numpy", "pydocs/scipy")
QUERIES = 40
QUERY_IDS = [f"{i:03d}" for i in range(QUERIES)]
PAIR = (4, 2)
GRID = list(product((1, 2, 4), (1, 2, 4)))
RESAMPLES = 2500  # the least p, corrected over some 25 tests, must stay below 0.05

Levels = dict[tuple[str, str], float]


def levels(**changed: float) -> Levels:
    """Mean values of every system by (training, name); by default all claims of effectiveness hold."""
    base = {
        "zero_DiffEmbed": 0.2, "zero_DiffRetriever single": 0.3, "zero_DiffRetriever multi": 0.4,
        "zero_PromptReps single": 0.3, "zero_PromptReps multi (N=20)": 0.2, "zero_BM25": 0.5,
        "fine_DiffEmbed": 0.3, "fine_DiffRetriever single": 0.5, "fine_DiffRetriever multi": 0.6,
        "fine_PromptReps single": 0.4, "fine_PromptReps multi (N=4)": 0.3, "fine_RepLLaMA": 0.4,
    }  # fmt: skip
    assert set(changed) <= set(base)
    names = {"zero": "zero-shot", "fine": "fine-tuned"}
    return {(names[k[:4]], k[5:]): v for k, v in (base | changed).items()}


def per_query(means: Levels, noise: float = 0.05) -> pd.DataFrame:
    """Every system and mode has the given mean in each collection, and noise by query that averages to zero."""
    rows = []
    for s, ((training, system), mean) in enumerate(means.items()):
        modes = MODES
        if system in ("DiffEmbed", "RepLLaMA"):
            modes = ("dense",)
        elif system == "BM25":
            modes = ("sparse",)
        for m, mode in enumerate(modes):
            for c, collection in enumerate(COLLECTIONS):
                values = np.random.default_rng([s, m, c]).normal(0, noise, QUERIES)
                frame = pd.DataFrame({"query_id": QUERY_IDS, "value": mean + values - values.mean()})
                k = PAIR if system == "DiffRetriever multi" else (1, 1)
                rows.append(
                    frame.assign(
                        training=training, system=system, family="any", mode=mode, k_query=k[0], k_passage=k[1],
                        collection=collection, metric="ndcg@10",
                    )
                )  # fmt: skip
    frame = pd.concat(rows, ignore_index=True)
    # other metrics, and the training package's collection, have no say
    other = frame.assign(metric="mrr@10", value=0.0)
    frame.loc[frame["collection"].str.startswith("pydocs/pandas"), "value"] = 1.0
    return pd.concat([frame, other], ignore_index=True)


def grid(loss: float, spread: float, level: float = 0.4) -> pd.DataFrame:
    """Pair (2, 2) is better than the selected by ``loss``, the others worse; ``spread`` varies with pair and query."""
    rows = []
    for j, (kq, kp) in enumerate(GRID):
        mean = {PAIR: level, (2, 2): level + loss}.get((kq, kp), level - 0.05)
        for c, collection in enumerate(("pydocs/pandas-train", *COLLECTIONS)):
            values = np.random.default_rng([j, c]).normal(0, spread, QUERIES)
            values = mean + values - values.mean()
            frame = pd.DataFrame({"query_id": QUERY_IDS, "value": values})
            base = frame.assign(collection=collection, coverage="whole", k_query=kq, k_passage=kp, metric="ndcg@10")
            rows += [base.assign(mode="hybrid"), base.assign(mode="dense", value=0.0)]
    return pd.concat(rows, ignore_index=True)


def ratios(diffusion=(1.1, 1.05, 1.2), zero=(14, 12, 16), fine=(3, 2.5, 3.5)) -> pd.DataFrame:
    rows = [
        ("DiffRetriever K=4 / K=1", *(9.0, 9.0, 9.0), 4, 1, "DiffRetriever", 4),  # not the most masks: secondary
        ("DiffRetriever K=16 / K=1", *diffusion, 16, 1, "DiffRetriever", 16),
        ("PromptReps N=4 / single", *fine, 5, 1, "PromptReps", 4),
        ("PromptReps N=20 / single", *zero, 21, 1, "PromptReps", 20),
        ("PromptReps N=20 / single, as answered", *(0.1, 0.1, 0.1), 21, 1, "PromptReps", 20),  # left out
    ]
    columns = ["comparison", "ratio", "ratio_low", "ratio_high", "vectors_a", "vectors_b", "system", "count"]
    return pd.DataFrame(rows, columns=columns)


def chance(value: float, low: float, high: float, p: float, level: float = 0.02) -> pd.DataFrame:
    columns = ["method", "kind", "reference", "value", "low", "high", "p"]
    rows = [
        ("raw", "headroom", "best fixed", 0.2, 0.1, 0.3, np.nan),
        ("random twins", "chance", "best fixed", level, level, level, np.nan),
        ("random twins", "chance", "selected", level / 2, level, level, np.nan),
        ("random twins", "beyond chance", "selected", 0.5, 0.5, 0.5, 0.5),
        ("random twins", "beyond chance", "best fixed", value, low, high, p),
        ("split halves", "beyond chance", "best fixed", value + 0.01, low, high + 0.01, p / 2),
    ]
    table = pd.DataFrame(rows, columns=columns).assign(queries=120)
    return table.assign(quantity=table["kind"] + " over " + table["reference"])


@cache
def defaults() -> dict[str, pd.DataFrame]:
    return {
        "per_query": per_query(levels()),
        "grid_per_query": grid(0.0, 0.05, level=0.7),
        "claim4_ratios": ratios(),
        "oracle_chance": chance(0.05, 0.03, 0.07, 0.0002),
    }


def make(root: Path, **tables: pd.DataFrame | None) -> Results:
    """Saved results of which all claims are supported, but for the tables given; None leaves one out."""
    results = Results("made", root)
    for name, frame in (defaults() | tables).items():
        if frame is not None:
            results.data(frame, name)
    results.record("selected_pair", list(PAIR), section="results")
    return results


def ledger(results: Results, **options) -> claims.Ledger:
    return claims.ledger(results.folder, results.profile_name, **options)


def verdicts(results: Results) -> dict[int, str]:
    return {c.id: c.verdict for c in ledger(results, resamples=RESAMPLES).claims}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Results:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def found(made) -> claims.Ledger:
    return ledger(made, resamples=RESAMPLES)


# -- the rules ---------------------------------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(
    ("rule", "value", "low", "high", "p", "bound", "expected"),
    [
        ("greater", 0.1, 0.05, 0.2, 0.049, 0, SUPPORTED),
        ("greater", -0.1, -0.2, -0.05, 0.049, 0, CONTRADICTED),
        ("greater", 0.1, 0.05, 0.2, 0.05, 0, INCONCLUSIVE),
        ("greater", 0.1, 0.05, 0.2, NAN, 0, INCONCLUSIVE),
        ("greater", NAN, NAN, NAN, NAN, 0, NOT_TESTED),
        ("clear gain", 0.03, 0.01, 0.05, 0.01, 0.02, SUPPORTED),
        ("clear gain", 0.01, 0.005, 0.015, 0.01, 0.02, CONTRADICTED),
        ("clear gain", 0.0, -0.01, 0.01, 1.0, 0.02, CONTRADICTED),
        ("clear gain", 0.01, -0.01, 0.03, 0.3, 0.02, INCONCLUSIVE),
        ("no gain", -0.01, -0.03, 0.01, 0.5, 0.02, SUPPORTED),
        ("no gain", -0.1, -0.2, -0.05, 0.001, 0.02, SUPPORTED),
        ("no gain", 0.0, -0.03, 0.03, 0.9, 0.02, INCONCLUSIVE),  # no difference, but a gain is plausible
        ("no gain", 0.01, 0.005, 0.015, 0.01, 0.02, CONTRADICTED),  # small, but clear
        ("at most", 1.1, 1.0, 1.25, NAN, 1.25, SUPPORTED),
        ("at most", 1.2, 1.1, 1.3, NAN, 1.25, INCONCLUSIVE),
        ("at most", 1.4, 1.26, 1.5, NAN, 1.25, CONTRADICTED),
        ("at most", 1.1, NAN, NAN, NAN, 1.25, INCONCLUSIVE),
        ("at least", 3, 2, 4, NAN, 2, SUPPORTED),
        ("at least", 3, 1.9, 4, NAN, 2, INCONCLUSIVE),
        ("at least", 1.5, 1.2, 1.9, NAN, 2, CONTRADICTED),
    ],
)
def test_rule_of_one_test(rule, value, low, high, p, bound, expected):
    assert decide(rule, value, low, high, p, bound) == expected


@pytest.mark.parametrize(
    ("parts", "needs_all", "expected"),
    [
        ([SUPPORTED, SUPPORTED], True, SUPPORTED),
        ([SUPPORTED, INCONCLUSIVE], True, INCONCLUSIVE),
        ([SUPPORTED, CONTRADICTED], True, CONTRADICTED),
        ([INCONCLUSIVE, CONTRADICTED], True, CONTRADICTED),
        ([SUPPORTED, NOT_TESTED], False, SUPPORTED),
        ([SUPPORTED, NOT_TESTED], True, NOT_TESTED),
        ([CONTRADICTED, NOT_TESTED], True, CONTRADICTED),
        ([NOT_TESTED, NOT_TESTED], False, NOT_TESTED),
    ],
)
def test_rule_of_a_claim(parts, needs_all, expected):
    assert combine(parts, needs_all) == expected


# -- every claim, every verdict ----------------------------------------------------------------------------------


def test_all_claims_hold(found):
    assert [c.id for c in found.claims] == list(range(1, 8))
    assert {c.verdict for c in found.claims} == {SUPPORTED}


def test_all_claims_fail(tmp_path):
    means = levels(**{
        "zero_DiffEmbed": 0.5, "zero_DiffRetriever multi": 0.2, "zero_PromptReps multi (N=20)": 0.4,
        "fine_DiffEmbed": 0.7, "fine_DiffRetriever multi": 0.4, "fine_PromptReps multi (N=4)": 0.5,
    })  # fmt: skip
    results = make(
        tmp_path, per_query=per_query(means), grid_per_query=grid(0.1, 0.02, level=0.2),
        claim4_ratios=ratios((1.5, 1.4, 1.6), (1.5, 1.2, 1.9)), oracle_chance=chance(0.0, -0.01, 0.01, 0.5),
    )  # fmt: skip
    assert set(verdicts(results).values()) == {CONTRADICTED}


def test_no_claim_can_be_decided(tmp_path):
    results = make(
        tmp_path, per_query=per_query(dict.fromkeys(levels(), 0.4), noise=0.3),
        grid_per_query=grid(0.05, 0.4, level=0.0),
        claim4_ratios=ratios((1.2, 1.1, 1.3)), oracle_chance=chance(0.03, -0.01, 0.07, 0.04, level=0.19),
    )  # fmt: skip
    assert set(verdicts(results).values()) == {INCONCLUSIVE}


def test_nothing_was_run(tmp_path):
    found = ledger(Results("made", tmp_path))
    assert {c.verdict for c in found.claims} == {NOT_TESTED} and [c.evidence for c in found.claims] == [[]] * 7
    tests = found.tests()
    assert (tests["verdict"] == NOT_TESTED).all() and tests["value"].isna().all()
    assert all((CHECKOUT / "notebooks" / f"{name}.ipynb").is_file() for name in PRODUCERS.values())
    ways = [f"notebook {name} writes it: make reproduce PROFILE=made" for name in PRODUCERS.values()]
    assert all(note.endswith(tuple(ways)) for note in tests["note"])
    write_claims(found, tmp_path / "claims.json")
    assert [c["verdict"] for c in json.loads((tmp_path / "claims.json").read_text())["claims"]] == [NOT_TESTED] * 7
    assert all("not tested" in describe(c) for c in found.claims)
    plt.close(figures.claims_forest(tests))


@pytest.mark.parametrize(
    ("table", "lost"),
    [("per_query", {1, 2, 3, 5, 7}), ("grid_per_query", {6, 7}), ("claim4_ratios", {4}), ("oracle_chance", {7})],
)
def test_one_missing_table(tmp_path, table, lost):
    found = verdicts(make(tmp_path, **{table: None}))
    assert {c for c, v in found.items() if v == NOT_TESTED} == lost


def test_zero_shot_alone(tmp_path, found):
    frame = per_query(levels())
    zero_shot = ledger(make(tmp_path, per_query=frame[frame["training"] == "zero-shot"]), resamples=RESAMPLES)
    assert [c.verdict for c in zero_shot.claims] == [SUPPORTED] * 4 + [NOT_TESTED, SUPPORTED, NOT_TESTED]
    tests = {t.id: t for c in zero_shot.claims for t in c.tests}
    assert tests["1a"].verdict == SUPPORTED and tests["1d"].verdict == NOT_TESTED
    note = tests["1d"].note
    assert "no rows of DiffRetriever single, fine-tuned (hybrid); no system is fine-tuned in it" in note
    # claim 5 needs every other system
    frame = frame[frame["system"] != "RepLLaMA"]
    assert verdicts(make(tmp_path / "more", per_query=frame))[5] == NOT_TESTED


def test_selected_pair_that_is_not_in_the_grid(tmp_path):
    results = make(tmp_path)
    results.record("selected_pair", [16, 16], section="results")
    (own,) = (c for c in ledger(results, resamples=100).claims if c.id == 6)
    assert own.verdict == NOT_TESTED and "(16, 16)" in own.tests[0].note


def test_systems_of_other_queries_are_not_compared(tmp_path):
    frame = per_query(levels())
    lost = (frame["system"] == "DiffEmbed") & (frame["query_id"] == "003") & (frame["training"] == "zero-shot")
    tests = ledger(make(tmp_path, per_query=frame[~lost]), resamples=RESAMPLES).tests().set_index("id")
    assert tests["verdict"]["1a"] == NOT_TESTED and "same queries" in tests["note"]["1a"]
    assert tests["verdict"]["1d"] == SUPPORTED


# -- the numbers -------------------------------------------------------------------------------------------------


def test_differences_by_hand(found):
    tests = found.tests().set_index("id")
    # the noise averages to zero in each collection, so that differences are those of the levels
    for key, expected in {"1a": 0.1, "1d": 0.2, "2a": 0.1, "2d": 0.1, "3a": -0.1, "3d": -0.1}.items():
        assert tests["value"][key] == pytest.approx(expected) and tests["counts"][key]
        assert tests["low"][key] < expected < tests["high"][key]
    assert tests["comparison"]["1a"] == "DiffRetriever single (hybrid) − DiffEmbed (dense)"
    sides = "PromptReps multi, fine-tuned (hybrid)", "PromptReps single, fine-tuned (hybrid)"
    assert tests["comparison"]["3d"] == " − ".join(sides)
    assert not tests["counts"][["1b", "1c", "1e", "1f"]].any()
    assert (tests["queries"]["1a"], tests["collections"]["1a"]) == (2 * QUERIES, 2)  # pandas is left out
    assert (tests.loc[["3a", "3d"], "bound"] == MARGIN).all()


def test_differences_are_those_of_the_comparisons(found):
    trained = product(("", ", fine-tuned"), ("hybrid", "dense", "sparse"))
    pairs = [(f"DiffRetriever multi{t}", f"DiffRetriever single{t}", mode) for t, mode in trained]
    table = compare_systems(per_query(levels()), pairs, COLLECTIONS[1:], resamples=RESAMPLES, seed=0)
    own = pd.DataFrame([vars(t) for t in found.claims[1].tests])
    np.testing.assert_allclose(own["value"], table["difference"])
    np.testing.assert_allclose(own[["low", "high"]], table[["low", "high"]])
    np.testing.assert_allclose(own["p"], table["p"])


def test_holm_is_over_all_tests_with_p(found):
    tests = found.tests()
    known = tests["p"].notna()
    assert known.sum() > 20 and not known[tests["claim"].isin([4, 6])].any()
    np.testing.assert_allclose(tests["p_corrected"][known], multipletests(tests["p"][known], method="holm")[1])
    assert tests["p_corrected"][~known].isna().all()


def test_strongest_is_against_the_best_mode_of_each(tmp_path, found):
    (own,) = (c for c in found.claims if c.id == 5)
    assert len(own.tests) == len(OTHERS) + 1 and not own.tests[-1].counts and "BM25" in own.tests[-1].comparison
    frame = per_query(levels())
    best = (frame["system"] == "PromptReps single") & (frame["training"] == "fine-tuned") & (frame["mode"] == "sparse")
    frame.loc[best & (frame["metric"] == "ndcg@10"), "value"] += 0.3
    (own,) = (c for c in ledger(make(tmp_path, per_query=frame), resamples=RESAMPLES).claims if c.id == 5)
    names = [t.comparison.split(" − ")[1] for t in own.tests]
    assert "PromptReps single, fine-tuned (sparse)" in names and own.verdict == CONTRADICTED
    assert [t.verdict for t in own.tests if t.counts].count(SUPPORTED) == len(OTHERS) - 1


def test_latency_of_the_most_masks_decides(found, tmp_path):
    tests = found.tests()
    own = tests[tests["claim"] == 4]
    masks, tokens = [f"DiffRetriever K={k} / K=1" for k in (16, 4)], [f"PromptReps N={n} / single" for n in (20, 4)]
    names = masks + tokens
    assert own["comparison"].tolist() == names and own["counts"].tolist() == [True, False, True, True]
    assert own["paper"].tolist() == ["about 1x", "about 1x", "about 15x", "about 3x"]
    assert own["bound"].tolist() == [SAME_LATENCY] * 2 + [SEVERAL_TIMES] * 2
    assert own["verdict"].tolist() == [SUPPORTED, CONTRADICTED, SUPPORTED, SUPPORTED]
    assert found.claims[3].verdict == SUPPORTED
    assert own["note"].iloc[2] == "vectors of a text: 21 against 1"
    small = ratios().iloc[:3].assign(comparison="any words", count=[4, 16, 2])
    own = ledger(make(tmp_path, claim4_ratios=small), resamples=100).claims[3]
    assert [t.paper for t in own.tests] == ["about 1x", "about 1x", ""] and own.verdict == SUPPORTED
    own = ledger(make(tmp_path, claim4_ratios=small.iloc[:2]), resamples=100).claims[3]
    assert own.verdict == NOT_TESTED and "no row of PromptReps" in own.tests[2].note


def test_words_of_a_label_change_no_verdict(found, tmp_path):
    reworded = {
        "claim4_ratios": ratios().assign(comparison="time"),
        "oracle_chance": chance(0.05, 0.03, 0.07, 0.0002).assign(quantity="gain"),
    }
    again = ledger(make(tmp_path, **reworded), resamples=RESAMPLES)
    columns = ["id", "value", "low", "high", "p_corrected", "counts", "paper", "note", "verdict"]
    pd.testing.assert_frame_equal(again.tests()[columns], found.tests()[columns])


@pytest.mark.parametrize(("table", "column", "claim"), [("claim4_ratios", "count", 4), ("oracle_chance", "kind", 7)])
def test_table_of_an_earlier_version(tmp_path, table, column, claim):
    own = ledger(make(tmp_path, **{table: defaults()[table].drop(columns=column)}), resamples=100).claims[claim - 1]
    assert own.verdict == NOT_TESTED and f"tables/{table}.csv has no column {column}; notebook" in own.tests[0].note


def test_transfer_losses_by_hand():
    pairs = pd.MultiIndex.from_tuples([(1, 1), (1, 2), (2, 1)])
    values = pd.DataFrame([[0.5, 0.9, 0.2], [0.5, 0.3, 0.9]], columns=pairs)
    cross_fitted, hindsight = transfer_losses(values, (1, 1))
    np.testing.assert_allclose(hindsight, [0.4, -0.2])  # means 0.5, 0.6, 0.55
    np.testing.assert_allclose(cross_fitted, [0.2 - 0.5, 0.3 - 0.5])  # each by the other's best pair
    same, again = transfer_losses(pd.DataFrame(np.full((3, 3), 0.1), columns=pairs), (1, 2))
    assert not same.any() and not again.any()
    assert np.isnan(transfer_losses(values[:1], (1, 1))[0]).all()
    more = pd.DataFrame(np.random.default_rng(0).random((7, 3)), columns=pairs)
    np.testing.assert_array_equal(*(transfer_losses(more, (1, 1), seed=3)[0] for _ in range(2)))
    # one halving in the plain way
    halves = np.array_split(np.random.default_rng(3).permutation(7), 2)
    expected = np.zeros(7)
    for half, other in (halves, halves[::-1]):
        best = more.iloc[other].mean().argmax()
        for query in half:
            expected[query] = more.iloc[query, best] - more.iloc[query, 0]
    np.testing.assert_allclose(transfer_losses(more, (1, 1), splits=1, seed=3)[0], expected)


def test_transfer_losses_bracket_the_truth():
    rng = np.random.default_rng(0)
    pairs = pd.MultiIndex.from_tuples(GRID)
    truth = np.linspace(0, 0.05, len(GRID))
    draws = (pd.DataFrame(truth + rng.normal(0, 0.3, (40, len(GRID))), columns=pairs) for _ in range(100))
    low, high = np.mean([[part.mean() for part in transfer_losses(values, GRID[4])] for values in draws], axis=0)
    assert low < truth.max() - truth[4] < high


def test_hindsight_is_the_loss_of_the_transfer_table(made, found):
    saved = grid(0.0, 0.05, level=0.7)
    expected = transfer(saved[saved["collection"].isin(COLLECTIONS[1:])], PAIR)["loss"].mean()
    both, cross_fitted, hindsight = found.claims[5].tests
    assert (both.counts, cross_fitted.counts, hindsight.counts) == (True, False, False)
    assert hindsight.value == pytest.approx(expected) and cross_fitted.value <= hindsight.value
    assert (both.low, both.high) == (cross_fitted.low, hindsight.high)
    assert both.value == pytest.approx((cross_fitted.value + hindsight.value) / 2)
    assert (both.queries, both.collections) == (2 * QUERIES, 2) and str(PAIR) in both.comparison
    assert "Dream (4, 16)" in found.claims[5].paper


def test_transfer_needs_both_estimates(tmp_path):
    # all pairs are equally good, but the best in hindsight has luck: little is lost, and that cannot be shown
    lucky = grid(0.0, 0.0)
    hybrid = lucky["mode"] == "hybrid"
    lucky.loc[hybrid, "value"] = np.random.default_rng(0).normal(0.4, 0.1, hybrid.sum())
    selected = hybrid & (lucky["k_query"] == PAIR[0]) & (lucky["k_passage"] == PAIR[1])
    lucky.loc[selected, "value"] = 0.4
    own = ledger(make(tmp_path, grid_per_query=lucky), resamples=RESAMPLES).claims[5]
    assert own.tests[1].value < MARGIN < own.tests[2].value and own.verdict == INCONCLUSIVE


def test_headroom_and_its_part_by_chance(found):
    own = found.claims[6].tests
    assert [t.counts for t in own] == [True, False, False, False, True]
    # first the interval of both estimates over the best fixed pair; p is one-sided in the table
    assert (own[0].value, own[0].low, own[0].high) == pytest.approx((0.055, 0.03, 0.08))
    assert (own[0].p, own[0].queries) == (0.0004, 120)
    assert (own[1].value, own[1].p, own[2].value, own[2].p) == pytest.approx((0.05, 0.0004, 0.06, 0.0002))
    cells = grid(0.0, 0.05, level=0.7)
    cells = cells[(cells["mode"] == "hybrid") & cells["collection"].isin(COLLECTIONS[1:])]
    best = cells.groupby(["collection", "query_id"])["value"].max().groupby("collection").mean().mean()
    # less what chance levels there are and the fine-tuned level; the interval holds both ends
    assert own[-1].value == pytest.approx(best - 0.015 - 0.6)
    assert own[-1].high - own[-1].low > 0.01
    assert own[-1].note == "" and "less 0.010 to 0.020 by chance" in own[-1].comparison


def test_chance_levels_on_both_sides_of_fine_tuning(found, tmp_path):
    """A lead that the least leaves and the most takes away shows nothing, in either direction."""
    lead = found.claims[6].tests[-1].value
    table = chance(0.05, 0.03, 0.07, 0.0002, level=3 * lead)
    lost = pd.DataFrame([{"method": "split halves", "kind": "chance", "reference": "selected", "value": 0.0}])
    own = ledger(make(tmp_path, oracle_chance=pd.concat([table, lost])), resamples=RESAMPLES).claims[6].tests[-1]
    assert own.low < 0 < own.high and own.p == 1 and own.verdict == INCONCLUSIVE


def test_estimates_of_the_headroom_that_disagree(tmp_path):
    table = chance(-0.01, -0.02, 0.01, 0.9)
    alone = table[table["method"] != "split halves"]
    assert verdicts(make(tmp_path / "one", oracle_chance=alone))[7] == CONTRADICTED
    table.loc[table["method"] == "split halves", ["value", "low", "high", "p"]] = 0.05, 0.03, 0.08, 0.0001
    assert verdicts(make(tmp_path / "two", oracle_chance=table))[7] == INCONCLUSIVE


def test_fine_tuned_at_another_pair(tmp_path):
    frame = per_query(levels())
    frame["k_passage"] = frame["k_passage"].where(frame["training"] == "zero-shot", 1)
    own = ledger(make(tmp_path, per_query=frame), resamples=100).claims[6].tests[-1]
    assert own.note == "fine-tuned at (4, 1), not at the selected pair (4, 2)"


# -- what is written ---------------------------------------------------------------------------------------------


def test_claims_on_disk(made, found, tmp_path):
    write_claims(found, tmp_path / "a" / "claims.json")
    write_claims(ledger(Results("made", made.folder.parent), resamples=RESAMPLES), tmp_path / "b.json")
    assert (tmp_path / "a" / "claims.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["profile"] == "made" and content["rule"]["margin_ndcg@10"] == MARGIN
    for claim, own in zip(content["claims"], found.claims, strict=True):
        assert (claim["id"], claim["verdict"], claim["statement"]) == (own.id, own.verdict, own.statement)
        assert [t["id"] for t in claim["tests"]] == [f"{own.id}{letter}" for letter in "abcdef"[: len(own.tests)]]
        assert claim["tests"][0]["value"] == own.tests[0].value
    assert content["claims"][3]["tests"][0]["p"] is None  # not a number
    assert content["claims"][3]["evidence"] == ["tables/claim4_ratios.csv"]


def test_tables_and_paragraphs(made, found):
    table = found.verdicts()
    assert table["claim"].tolist() == list(range(1, 8)) and table["tests"][0] == "1a supported; 1d supported"
    made.table(table, "claims")
    made.table(found.tests(), "claims_tests")
    text = describe(found.claims[1])
    assert text.startswith("**Claim 2: supported.**") and "takes 2a, 2d together" in text
    assert "- 2b (secondary), DiffRetriever multi (dense) − DiffRetriever single (dense): **+0.100** [" in text
    assert f"{2 * QUERIES} queries, 2 collections: supported" in text
    assert "**14.000** [12.000, 16.000], held against 2: supported" in describe(found.claims[3])


def test_forest_marks_verdicts(tmp_path, found):
    assert set(figures._VERDICTS) == {SUPPORTED, CONTRADICTED, INCONCLUSIVE}
    fig = figures.claims_forest(found.tests())
    differences, latencies = fig.axes
    labels = [t.get_text() for t in differences.get_yticklabels()]
    assert labels == [f"{t.id}  {t.comparison}" for c in found.claims for t in c.tests if c.id != 4]
    assert latencies.get_xscale() == "log" and len(latencies.get_yticklabels()) == 4
    assert differences.get_xlabel() and latencies.get_xlabel()
    markers = [line.get_marker() for line in latencies.lines for x in line.get_xdata() if np.isfinite(x)]
    assert (markers.count("o"), markers.count("X"), markers.count("D")) == (3, 1, 0)
    fig.canvas.draw()
    plt.close(fig)


def test_notebook_has_the_cells_it_needs(made, monkeypatch):
    """The notebook, run on the made results."""
    space: dict = {"__name__": "__main__"}
    shown: list = []
    monkeypatch.setattr("IPython.display.display", lambda *objects, **_: shown.extend(o.data for o in objects))
    study = SimpleNamespace(profile=SimpleNamespace(name="made", seed=0))
    monkeypatch.setattr("diffret_lib.report.start", lambda *_: (study, made))
    for cell in nbformat.read(CHECKOUT / "notebooks" / "07_claims.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), space)
    assert (made.folder / "claims.json").is_file() and (made.figures / "claims_forest.svg").is_file()
    assert (made.tables / "claims.md").is_file() and "**Claim 7: " in shown[-1]
    plt.close("all")
