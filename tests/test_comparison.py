from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from diffret_lib.experiments import comparison, study
from diffret_lib.experiments.comparison import compare_systems, heat_map, held_out_best, interval, paired, undertrained
from diffret_lib.experiments.study import SYSTEMS, System, select_pair
from diffret_lib.models.released import ReleasedAdapter
from diffret_lib.retrieval.systems import BM25
from tests.test_study import changed

#: nDCG@10 of four queries under the pairs.
VALUES = {
    "q1": (0.5, 0.8, 0.8, 0.8),  # a tie: the fewest vectors, then the smallest Kq
    "q2": (1.0, 1.0, 1.0, 1.0),
    "q3": (0.2, 0.6, 0.4, 0.1),
    "q4": (0.0, 0.2, 0.5, 0.3),
}
PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2)]


def frame(values: dict[str, tuple[float, ...]], collection: str = "c") -> pd.DataFrame:
    """A grid of :data:`PAIRS` in the hybrid mode; other modes and metrics have other values."""
    cells = [(query, *pair, value) for query, row in values.items() for pair, value in zip(PAIRS, row, strict=True)]
    base = pd.DataFrame(cells, columns=["query_id", "k_query", "k_passage", "value"])
    base = base.assign(collection=collection, coverage="whole", mode="hybrid", metric="ndcg@10")
    others = base.assign(mode="dense", value=1 - base["value"]), base.assign(metric="mrr@10", value=1 - base["value"])
    return pd.concat([base, *others]).sample(frac=1, random_state=0)


def by_system(values: dict[str, list[float]], collection: str, training: str = "zero-shot") -> pd.DataFrame:
    rows = [(system, f"q{i}", v) for system, row in values.items() for i, v in enumerate(row)]
    about = {"training": training, "mode": "dense", "metric": "ndcg@10", "collection": collection}
    return pd.DataFrame(rows, columns=["system", "query_id", "value"]).assign(**about)


def indexed(values: dict[str, np.ndarray]) -> pd.Series:
    """Values of each collection, as comparisons have them."""
    return pd.concat({c: pd.Series(v, dtype=float) for c, v in values.items()}, names=["collection", "query_id"])


# -- grids -----------------------------------------------------------------------------------------------------


def test_best_pair_of_each_query():
    best = comparison.per_query_best(frame(VALUES)).set_index("query_id")
    pairs = best[["k_query", "k_passage"]].apply(tuple, axis=1).to_dict()
    assert pairs == {"q1": (1, 2), "q2": (1, 1), "q3": (1, 2), "q4": (2, 1)}
    assert best["value"].to_dict() == {"q1": 0.8, "q2": 1.0, "q3": 0.6, "q4": 0.5}
    assert best["ties"].to_dict() == {"q1": 3, "q2": 4, "q3": 1, "q4": 1}


def test_heat_map_averages_collections_alike():
    cells = heat_map(pd.concat([frame(VALUES), frame({"q1": (0, 0, 0, 1)}, "d")]), "hybrid")
    np.testing.assert_allclose(cells.to_numpy(), [[0.425 / 2, 0.325], [0.3375, 0.775]])
    assert list(cells.index) == list(cells.columns) == [1, 2] and cells.index.name == "k_query"


@pytest.mark.parametrize(("row", "pair"), [
    ((0.9, 0.2, 0.3, 0.4), (2, 2)),  # (1, 1) is no choice for a multi
    ((0.1, 0.5, 0.5, 0.5), (2, 1)),  # of equals the smaller Kp
    ((0.1, 0.5, 0.4, 0.5), (1, 2)),  # then the smaller Kq
    ((0.1, 0.5, 0.5 + 1e-9, 0.6), (2, 2)),
])  # fmt: skip
def test_selected_pair(row, pair):
    assert select_pair(frame({"q": row})) == pair


def held_out(values: np.ndarray, keep: int | None = None) -> list[float]:
    """:func:`held_out_best` in the plain way, for one grid [queries, pairs]: a loop over queries and pairs."""
    halves, found = np.array_split(np.random.default_rng(0).permutation(len(values)), 2), []
    for query, row in enumerate(values):
        other = halves[0] if query in halves[1] else halves[1]
        means = [round(sum(float(values[q, i]) for q in other) / len(other), 6) for i in range(len(row))]
        best = [i for i, mean in enumerate(means) if mean == max(means)]
        found.append(row[keep if keep in best else best[0]])
    return found


def test_no_query_chooses_its_own_pair():
    draws = np.random.default_rng(0).random((3, 9, 4)).round(1)
    draws[..., 2] = draws[..., 0]  # equal means: the first, or the one to keep
    for keep in (None, 2):
        expected = [held_out(draw, keep) for draw in draws]
        np.testing.assert_allclose(held_out_best(draws, keep), expected)
        np.testing.assert_allclose(held_out_best(draws[1], keep), expected[1])
    # of two queries each has the pair that is the other's best
    np.testing.assert_allclose(held_out_best(np.array([[0.5, 0.9], [0.6, 0.3]])), [0.5, 0.3])
    assert np.isnan(held_out_best(draws[:, :1])).all()  # a single query


def test_held_out_loss_is_unbiased_where_hindsight_is_not():
    """Of equally good pairs nothing is lost by any, but the best in hindsight has luck."""
    values = np.random.default_rng(0).normal(0.5, 0.2, (300, 20, 4))
    hindsight = (values.mean(1).max(-1) - values[..., 3].mean(1)).mean()
    assert hindsight > 0.03 and abs((held_out_best(values, keep=3) - values[..., 3]).mean()) < 0.01
    # a pair that is better by 0.1 is found by either half
    values[..., 1] += 0.1
    assert (held_out_best(values) - values[..., 3]).mean() == pytest.approx(0.1, abs=0.03)


def test_transfer_by_hand():
    # means: (1, 1) 0.425, (1, 2) 0.65, (2, 1) 0.675, (2, 2) 0.55
    row = comparison.transfer(frame(VALUES), (2, 2), resamples=200).iloc[0]
    assert row[["collection", "coverage", "queries", "best_pair"]].tolist() == ["c", "whole", 4, "(2, 1)"]
    found = row[["selected", "best", "loss", "single"]].astype(float)
    np.testing.assert_allclose(found, [0.55, 0.675, 0.125, 0.425])
    assert row["low"] <= row["held_out_loss"] <= row["high"] and row["held_out_loss"] <= row["loss"]


# -- the estimate ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"b": rng.normal(0.1, 0.3, 60), "a": rng.normal(0.0, 0.2, 35), "c": rng.normal(0.05, 0.1, 20)}


def test_estimate_against_scipy(sample):
    found = paired(indexed(sample), 20_000, seed=0)
    assert found["value"] == pytest.approx(np.mean([v.mean() for v in sample.values()]))
    assert (found["queries"], found["collections"]) == (115, 3)

    def macro(*parts, axis=-1):
        return sum(part.mean(axis) for part in parts) / len(parts)

    theirs = stats.bootstrap(list(sample.values()), macro, n_resamples=20_000, method="percentile", rng=3)
    np.testing.assert_allclose([found["low"], found["high"]], theirs.confidence_interval, atol=0.002)
    assert found["detectable"] == pytest.approx(2.8016 * theirs.standard_error, rel=0.03)
    # the normal approximation of the randomisation test: all values are as far from 0 as they are
    spread = np.sqrt(sum((v**2).sum() / len(v) ** 2 for v in sample.values())) / 3
    assert found["p"] == pytest.approx(2 * stats.norm.sf(found["value"] / spread), abs=0.01)
    # the order of collections does not matter
    assert interval(indexed(dict(reversed(sample.items()))), 20_000, seed=0).items() <= found.items()
    assert found["low"] != interval(indexed(sample), 20_000, seed=1)["low"]


def test_collections_are_resampled_as_well(sample):
    """Against a loop that draws collections, and then queries of each."""
    found, rng = interval(indexed(sample), 20_000, seed=0), np.random.default_rng(7)
    parts, drawn = list(sample.values()), []
    for _ in range(6000):
        chosen = [parts[i] for i in rng.integers(0, 3, 3)]
        drawn.append(np.mean([rng.choice(part, len(part)).mean() for part in chosen]))
    np.testing.assert_allclose([found["low_all"], found["high_all"]], np.quantile(drawn, [0.025, 0.975]), atol=0.004)
    assert found["high_all"] - found["low_all"] > found["high"] - found["low"]


def test_the_detectable_difference_is_found_with_80_percent_power(sample):
    """Simulated: a shift of that size is clear in 80 of 100 studies of as many queries."""
    centred = {c: v - v.mean() for c, v in sample.items()}
    shift, rng, clear = paired(indexed(centred), 100)["detectable"], np.random.default_rng(0), 0
    for _ in range(400):
        study = {c: shift + rng.choice(v, len(v)) for c, v in centred.items()}
        error = np.sqrt(sum(v.var(ddof=1) / len(v) for v in study.values())) / 3
        clear += abs(np.mean([v.mean() for v in study.values()])) > 1.96 * error
    assert 0.74 <= clear / 400 <= 0.86


def test_queries_that_would_decide_it(sample):
    values, bound = indexed(sample), 0.2
    found, against = paired(values, 100), paired(values, 100, bound=bound)
    for distance, needed in ((found["value"], found), (bound - found["value"], against)):
        # with n times the queries the detectable difference is what is there: its square falls as 1 / n
        assert needed["needed_queries"] == np.ceil(115 * (found["detectable"] / distance) ** 2)


def test_what_cannot_be_had_is_nan():
    one = paired(indexed({"a": [0.5], "b": [0.1, 0.2]}), 100)
    assert one["value"] == pytest.approx(0.325) and np.isnan([one["low"], one["high_all"], one["p"]]).all()
    alone = paired(indexed({"a": [0.1, 0.3, 0.2]}), 100)
    assert alone["low"] <= 0.2 <= alone["high"] and np.isnan([alone["low_all"], alone["high_all"]]).all()
    same = paired(indexed({"a": np.zeros(4), "b": np.zeros(3)}), 100)
    assert (same["low"], same["high"], same["p"]) == (0, 0, 1) and np.isnan(same["needed_queries"])
    with pytest.raises(ValueError, match="nothing to average over"):
        paired(indexed({"a": [0.5]})[:0])
    for options in ({"resamples": 1}, {"resamples": "9"}, {"resamples": 1.5}, {"seed": -1}):
        ((name, given),) = options.items()
        with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least \d, not {given!r}"):
            paired(indexed({"a": [0.1, 0.3]}), **options)


# -- systems ---------------------------------------------------------------------------------------------------


def test_compared_systems_by_hand():
    one = by_system({"A": [0.9, 0.8, 0.7, 0.9], "B": [0.5] * 4, "C": [0.9, 0.8, 0.7, 0.9]}, "one")
    two = by_system({"A": [0.6] * 8, "B": [0.5] * 8, "C": [0.6] * 8}, "two")
    data = pd.concat([one, two, by_system({"A": [0.0], "B": [1.0], "C": [0.0]}, "left out")])
    pairs = [("A", "B", "dense"), ("A", "C", "dense"), ("B", "A", "dense")]
    table = compare_systems(data.sample(frac=1, random_state=1), pairs, ["one", "two"], resamples=4999)
    # macro: the mean of 0.325 and 0.1
    assert table["difference"].tolist() == pytest.approx([0.2125, 0.0, -0.2125])
    assert table["queries"].tolist() == [12, 12, 12]
    # all signs alike: 2 of the 2^12 flips are as extreme
    assert table["p"].tolist() == pytest.approx([2 / 4096, 1.0, 2 / 4096], rel=0.01, abs=2e-4)
    np.testing.assert_allclose(table["p_corrected"], multipletests(table["p"], method="holm")[1])
    assert table["p_corrected"][0] == pytest.approx(3 * table["p"][0])
    assert table["reading"].tolist() == ["better", "no clear difference", "worse"]
    intervals = comparison.system_intervals(data, ["one", "two"], 500)
    assert intervals["value"].tolist() == pytest.approx([0.7125, 0.5, 0.7125])
    assert (intervals["low_all"] <= intervals["low"]).all()


def test_compared_by_training_and_on_the_same_queries():
    before = by_system({"A": [0.5, 0.4], "B": [0.1, 0.1]}, "one")
    data = pd.concat([before, by_system({"A": [0.7, 0.9]}, "one", "fine-tuned")])
    pairs = [("A, fine-tuned", "A", "dense"), ("A", "B", "dense")]
    table = compare_systems(data, pairs, ["one"], resamples=50)
    assert table["difference"].tolist() == pytest.approx([0.35, 0.35])
    with pytest.raises(ValueError, match=r"there is no B, fine-tuned \(dense\) in the table"):
        compare_systems(data, [("B, fine-tuned", "B", "dense")], ["one"])
    fewer = pd.concat([before, by_system({"C": [0.5]}, "one")])
    with pytest.raises(ValueError, match=r"A and C \(dense\) were not evaluated on the same queries"):
        compare_systems(fewer, [("A", "C", "dense")], ["one"])


def test_undertrained_systems():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 30)
    noisy = base + rng.normal(0, 0.02, 30)
    zero = dict.fromkeys(("Mean pooling", "DiffEmbed", "PromptReps multi"), base)
    tuned = {"RepLLaMA": base - 0.1, "DiffEmbed": noisy + 0.05, "PromptReps multi": noisy - 0.001}
    data = pd.concat([by_system(*given) for c in ("one", "two") for given in ((zero, c), (tuned, c, "fine-tuned"))])
    found = undertrained(data)
    assert set(found) == {"RepLLaMA, fine-tuned", "PromptReps multi, fine-tuned"}
    reason = "undertrained: at best -0.100 [-0.100, -0.100] nDCG@10 against Mean pooling (dense)"
    assert found["RepLLaMA, fine-tuned"] == reason
    # one mode in which the gain is clear is enough
    hybrid = data[data["system"].str.startswith("PromptReps")].assign(mode="hybrid")
    hybrid.loc[hybrid["training"] == "fine-tuned", "value"] += 0.1
    assert set(undertrained(pd.concat([data, hybrid]))) == {"RepLLaMA, fine-tuned"}
    assert undertrained(data[data["training"] == "zero-shot"]) == {}


def test_a_mode_that_training_lowered_is_undertrained_and_hybrid_with_it():
    base, frames = np.linspace(0.2, 0.6, 30), []
    for mode, change in (("dense", 0.1), ("sparse", -0.2), ("hybrid", 0.0)):
        for values, *training in ((base,), (base + change, "fine-tuned")):
            frames.append(by_system({"DiffRetriever single": values}, "one", *training).assign(mode=mode))
    found = undertrained(pd.concat(frames))
    name = "DiffRetriever single, fine-tuned"
    assert found == {
        f"{name} (sparse)": "undertrained: -0.200 [-0.200, -0.200] nDCG@10 against DiffRetriever single (sparse)",
        f"{name} (hybrid)": "its sparse side is undertrained",
    }
    systems = [System(f"DiffRetriever {n}", None, "fine-tuned") for n in ("single", "multi")]
    planned = comparison.planned_comparisons(systems, found)
    assert planned == [("DiffRetriever multi, fine-tuned", name, "dense")]


def test_macro_average_stands_first():
    table = pd.concat([by_system({"A": [0.4], "B": [0.2]}, c).assign(value=lambda d, x=x: d["value"] + x)
                       for c, x in (("pydocs/numpy", 0.0), ("scifact", 0.2), ("pydocs/pandas-test", 0.5))])  # fmt: skip
    wide = comparison.evaluation_wide(table, ["pydocs/numpy", "scifact"])
    assert list(wide) == ["training", "system", "mode", "macro", "numpy", "scifact", "pandas-test"]
    np.testing.assert_allclose(wide["macro"], [0.5, 0.3])


def test_comparisons_are_told_apart():
    zero_shot = [System(name, None) for name in [*SYSTEMS, "Mean pooling"] if name != "RepLLaMA"]
    before = comparison.planned_comparisons(zero_shot)
    pairs = comparison.planned_comparisons([*zero_shot, *(System(name, None, "fine-tuned") for name in SYSTEMS)])
    assert len(set(pairs)) == len(pairs) == 42 and len(before) == 14 and pairs[:14] == before
    assert all(better != than for better, than, _ in pairs)
    assert ("DiffEmbed", "Mean pooling", "dense") in before and ("DiffEmbed, fine-tuned", "DiffEmbed", "dense") in pairs
    assert ("DiffRetriever multi, fine-tuned", "RepLLaMA, fine-tuned", "dense") in pairs


def test_released_adapters_and_metrics_of_a_collections_own(s, monkeypatch):
    s = changed(s)
    assert s.released_systems() == []
    about = ReleasedAdapter("them/theirs", s.backbone("diffusion").spec.name, (2, 1))
    monkeypatch.setattr(study, "RELEASED", {"theirs": about, "other": replace(about, backbone="another")})
    monkeypatch.setattr(study, "released_adapter", Path)
    (system,) = s.released_systems()
    assert (system.name, system.training) == ("DiffRetriever multi", "fine-tuned by the authors")
    assert system.adapter == Path("theirs") and [system.retriever.vectors(x) for x in ("query", "passage")] == [2, 1]
    # passages count from grade 2, and all of these have 1
    monkeypatch.setattr(study, "metrics_of", lambda name: ("mrr@10-l2", "ndcg@10", "recall@100-l2"))
    values = s.evaluate(System("BM25", BM25()), s.test_collections[:1]).groupby("metric", sort=False)["value"].max()
    assert (values > 0).to_dict() == {"mrr@10": False, "ndcg@10": True, "recall@100": False}
