from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import ndcg_score

from diffret_lib.experiments import oracle
from diffret_lib.experiments.comparison import PAIR, QUERY, per_query_best
from diffret_lib.experiments.oracle import QueryScores, grid_scores, ndcg, oracle_chance, oracle_queries, random_twins
from tests.test_comparison import frame, held_out

K_GRID = (1, 2, 4)
PAIRS = list(product(K_GRID, repeat=2))


def simulated(kind: str, seed: int, queries: int = 30, passages: int = 40) -> list[QueryScores]:
    """Scores of pairs that are one ranking and noise ("equal"), that differ in quality for all queries alike
    ("quality"), or of which each query has two that know better ("interaction")."""
    rng = np.random.default_rng(seed)
    found = []
    for q in range(queries):
        relevance = np.zeros(passages)
        relevance[rng.choice(passages, 1 + q % 3, replace=False)] = 1
        noise = 0.7 * rng.normal(size=(len(PAIRS), passages))
        scores = rng.normal(size=passages) + 1.5 * relevance + noise
        if kind == "quality":
            scores += np.linspace(-1, 1, len(PAIRS))[:, None] * relevance
        if kind == "interaction":
            boost = np.full(len(PAIRS), -0.5)
            boost[rng.choice(len(PAIRS), 2, replace=False)] = 2
            scores += boost[:, None] * relevance
        found.append(QueryScores(f"q{q:02}", oracle._standardised(scores), relevance))
    return found


def estimates(kind: str, seed: int = 0) -> pd.DataFrame:
    twins = random_twins({"a": simulated(kind, seed), "b": simulated(kind, seed + 1)}, K_GRID, draws=99, seed=0)
    table = oracle_chance(oracle_queries(twins, (2, 2)), twins, ["a", "b"], resamples=300)
    kinds = {"best fixed": ["headroom", "chance", "beyond chance"], "selected": ["headroom", "chance", "beyond chance"]}
    assert table.groupby("reference")["kind"].agg(list).to_dict() == kinds and (table["queries"] == 60).all()
    return table.set_index(["reference", "kind"])


def made(values: dict[str, np.ndarray], drawn: dict[str, np.ndarray]) -> oracle.Twins:
    """Twins of two numbers of masks a side, from given values."""
    pairs = pd.MultiIndex.from_product([(1, 2), (1, 2)])
    return {c: (pd.DataFrame(v, [f"q{i}" for i in range(len(v))], pairs), drawn[c]) for c, v in values.items()}


# -- nDCG and scores -------------------------------------------------------------------------------------------


def test_ndcg_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(size=(5, 30))
        relevance = np.zeros(30)
        relevance[rng.choice(30, rng.integers(1, 14), replace=False)] = rng.integers(1, 4)
        theirs = [ndcg_score([relevance], [row], k=10) for row in scores]
        np.testing.assert_allclose(ndcg(scores, relevance), theirs)


def test_of_equal_scores_the_first_passage_stands_first():
    relevance = np.array([0, 0, 1.0])
    scores = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1.0]])
    np.testing.assert_allclose(ndcg(scores, relevance), [1 / np.log2(4), 1 / np.log2(3), 1])
    np.testing.assert_allclose(ndcg(scores, relevance, depth=1), [0, 0, 1])
    assert ndcg(scores, np.array([0, -1.0, 0])).tolist() == [0, 0, 0]  # nothing is relevant


def test_scores_of_a_study_rank_as_its_grid(s):
    """Judged passages that are not there count in the ideal ranking."""
    whole = s.test_collections[0]
    lacking = replace(whole, missing=("gone",), qrels={q: judged | {"gone": 1} for q, judged in whole.qrels.items()})
    for collection in (*s.test_collections, lacking):
        cells = s.grid(collection)
        wide = cells[cells["mode"] == "hybrid"].pivot(index="query_id", columns=PAIR, values="value")
        scores = grid_scores(s, collection)
        assert [q.query_id for q in scores] == list(wide.index)
        found = np.stack([ndcg(q.scores, q.relevance, missing=q.missing) for q in scores])
        np.testing.assert_allclose(found, wide[list(product(s.profile.k_grid, repeat=2))])
        for q in scores:
            np.testing.assert_allclose(q.scores.mean(1), 0, atol=1e-6)
            np.testing.assert_allclose(q.scores.std(1), 1, atol=1e-5)
    assert 0 < found.max() < 1


def test_passages_that_a_pair_does_not_retrieve_have_its_least_score(s, monkeypatch):
    collection = s.test_collections[0]
    whole = grid_scores(s, collection)
    monkeypatch.setattr(s, "profile", s.profile.model_copy(update={"top_k": 3}))
    short = grid_scores(s, collection)
    for a, b in zip(short, whole, strict=True):
        assert a.relevance.sum() == b.relevance.sum() == len(collection.qrels[a.query_id])
        assert a.scores.shape[1] <= b.scores.shape[1]
        # of a pair at least all but three are at the bottom together
        assert ((a.scores <= a.scores.min(1, keepdims=True) + 1e-6).sum(1) >= a.scores.shape[1] - 3).all()


# -- random twins ----------------------------------------------------------------------------------------------


def test_twins_permute_departures_within_strata():
    query = simulated("equal", 0)[4]
    rng = np.random.default_rng(0)
    own = ndcg(query.scores, query.relevance)
    np.testing.assert_allclose(oracle._twin_values(query, 3, 1, rng), np.tile(own, (3, 1)))
    # by hand, with the same random numbers
    consensus = query.scores.mean(0)
    order = np.argsort(-consensus, kind="stable")
    keys = np.arange(len(order)) // 10 + np.random.default_rng(5).random((2, len(order)))
    for draw, key in enumerate(keys):
        twin = np.empty_like(query.scores)
        for start in range(0, len(order), 10):
            place = order[start : start + 10]
            moved = place[np.argsort(key[start : start + 10])]
            twin[:, place] = consensus[place] + query.scores[:, moved] - consensus[moved]
        drawn = oracle._twin_values(query, 2, 10, np.random.default_rng(5))
        np.testing.assert_allclose(drawn[draw], ndcg(twin, query.relevance), atol=1e-9)


def test_twins_are_reproducible_and_differ():
    scores = {"a": simulated("equal", 0)}
    drawn = [random_twins(scores, K_GRID, draws=3, seed=seed)["a"] for seed in (0, 0, 1)]
    (grid, first), (_, again), (_, other) = drawn
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and grid.index[:2].tolist() == ["q00", "q01"] and grid.columns.tolist() == PAIRS
    np.testing.assert_allclose(grid, [ndcg(q.scores, q.relevance) for q in scores["a"]])


def test_values_of_each_query_against_a_loop():
    rng = np.random.default_rng(0)
    values, drawn = rng.random((6, 4)), rng.random((5, 6, 4))
    values[2] = 0.5
    found = oracle_queries(made({"c": values}, {"c": drawn}), (2, 2))
    best_fixed, of_draws = held_out(values), [held_out(draw) for draw in drawn]
    for q, row in enumerate(found.itertuples()):
        assert (row.collection, row.query_id, row.tied) == ("c", f"q{q}", q == 2) and np.isnan(row.fine_tuned)
        assert (row.oracle, row.selected, row.single) == (max(values[q]), values[q, 3], values[q, 0])
        assert row.best_fixed == pytest.approx(best_fixed[q])
        rooms = [max(draw[q]) - fixed[q] for draw, fixed in zip(drawn, of_draws, strict=True)]
        assert row.chance == pytest.approx(np.mean(rooms))
        assert row.chance_selected == pytest.approx(np.mean([max(draw[q]) - draw[q, 3] for draw in drawn]))
        assert row.chance_kq == pytest.approx(np.mean([max(draw[q, 1], draw[q, 3]) - draw[q, 3] for draw in drawn]))
    levels, observed = oracle.twin_levels(made({"c": values}, {"c": drawn}), ["c"])
    assert levels.mean() == pytest.approx(found["chance"].mean()) and len(levels) == 5
    assert observed == pytest.approx((found["oracle"] - found["best_fixed"]).mean())


# -- the estimate ----------------------------------------------------------------------------------------------


def test_of_equal_pairs_the_headroom_is_chance():
    """On average; neither p-values nor intervals find more than there is."""
    found = []
    for seed in range(20):
        twins = random_twins({"a": simulated("equal", seed, queries=20)}, K_GRID, draws=39, seed=seed)
        table = oracle_chance(oracle_queries(twins, (2, 2)), twins, ["a"], resamples=200)
        room, chance, beyond = table["value"].to_numpy().reshape(2, 3).T
        np.testing.assert_allclose(chance + beyond, room)
        found.append([table["value"][0], *table.loc[2, ["value", "p", "low", "high"]]])
    raw, value, p, low, high = np.array(found, float).T
    assert raw.min() > 0.15 and abs(value.mean()) < min(0.1 * raw.mean(), 2.5 * value.std() / 20**0.5)
    assert np.mean(p <= 0.1) <= 0.25 and np.median(p) > 0.25 and max(p) <= 1
    assert np.mean((low <= 0) & (high >= 0)) >= 0.8


def test_a_pair_that_is_better_for_all_queries_is_no_headroom():
    table = estimates("quality")["value"]
    assert table["best fixed", "beyond chance"] < 0 < table["selected", "headroom"]


def test_preferences_of_queries_are_found_beyond_chance():
    row = estimates("interaction").loc["best fixed", "beyond chance"]
    assert row["value"] > 0.1 and 0 < row["low"] <= row["value"] <= row["high"]
    assert row["p"] == pytest.approx(2 / 100)  # no draw of 99 has as much headroom
    assert row["low_all"] < row["high_all"] and 0 < row["detectable"] < row["value"]


def test_without_differences_there_is_nothing_to_find():
    values = np.tile(np.array([[0.2], [0.5], [1.0]]), (1, 4))
    twins = made({"c": values, "d": values}, {"c": np.stack([values] * 9), "d": np.stack([values] * 9)})
    table = oracle_chance(oracle_queries(twins, (2, 2)), twins, ["c", "d"], resamples=50)
    assert np.allclose(table[["value", "low", "high"]], 0) and (table["p"] == 1).all()
    assert "queries), not clearly above zero." in oracle.oracle_answer(table)


# -- fine-tuning and tables ------------------------------------------------------------------------------------


def tuned(values: list[float], collection: str = "c") -> pd.Series:
    index = pd.MultiIndex.from_tuples([(collection, f"q{i}") for i in range(len(values))], names=QUERY)
    return pd.Series(values, index)


def test_fine_tuning_and_the_collections_that_are_asked_for():
    rng = np.random.default_rng(0)
    values, drawn = {c: rng.random((3, 4)) for c in "cd"}, {c: rng.random((7, 3, 4)) for c in "cd"}
    twins = made(values, drawn)
    queries = oracle_queries(twins, (2, 2), fine_tuned=tuned([0.9, 1, 0.5]))
    assert queries["fine_tuned"].tolist()[:3] == [0.9, 1, 0.5] and queries["fine_tuned"][3:].isna().all()
    table = oracle_chance(queries, twins, ["c"], resamples=50).set_index(["reference", "kind"])
    room = values["c"].max(1).mean() - 0.8
    assert table["value"]["fine-tuning", "headroom"] == pytest.approx(room)
    chance = np.mean(drawn["c"].max(-1) - drawn["c"][..., 3])
    assert table["value"]["fine-tuning", "beyond chance"] == pytest.approx(room - chance)
    assert (table["queries"] == 3).all() and (table["collections"] == 1).all()
    with pytest.raises(ValueError, match="on c are not of the grid's queries: run notebook 04"):
        oracle_queries(twins, (2, 2), fine_tuned=tuned([0.9, 1]))


def test_oracle_table():
    values = {"c": np.array([[0.5, 0.8], [0.2, 0.6], [0.0, 0.5], [0.1, 0.1]]).repeat(2, 1)}
    queries = oracle_queries(made(values, {"c": values["c"][None] * 0}), (2, 2), fine_tuned=tuned([0.9, 1, 0.5, 0.4]))
    macro, row = oracle.oracle_table(queries, ["c"], resamples=200).itertuples(index=False)
    assert macro[1:] == pytest.approx(row[1:]) and macro.collection == "macro"  # of one collection
    row = pd.Series(row._asdict())
    names = ["single", "selected", "fine_tuned", "best_fixed", "oracle", "headroom", "chance", "tied"]
    np.testing.assert_allclose(row[names].astype(float), [0.2, 0.5, 0.7, 0.5, 0.5, 0, 0, 0.25], atol=1e-9)
    assert row["collection"] == "c" and row["queries"] == 4 and row["oracle_low"] < 0.5 < row["oracle_high"]


def test_fine_tuned_values_of_the_evaluation(tmp_path):
    path, profile = tmp_path / "per_query.csv", SimpleNamespace(grid_sample=None)
    study = SimpleNamespace(selected=(2, 2), profile=profile)
    assert oracle.read_fine_tuned(study, path) is None
    rows = pd.DataFrame({"collection": "c", "query_id": ["001", "null"], "value": [0.1, 0.2], "metric": "ndcg@10",
                         "system": "DiffRetriever multi", "training": "fine-tuned", "mode": "hybrid", "k_query": 2,
                         "k_passage": 2})  # fmt: skip
    others = [rows.assign(**{c: v}) for c, v in (("training", "zero-shot"), ("system", "DiffEmbed"), ("mode", "dense"))]
    pd.concat([rows, *others]).to_csv(path, index=False)
    found = oracle.read_fine_tuned(study, path)
    assert found.to_dict() == {("c", "001"): 0.1, ("c", "null"): 0.2}
    study.selected = (4, 2)
    assert oracle.read_fine_tuned(study, path) is None
    study.selected, profile.grid_sample = (2, 2), {"queries": 2}  # the grid is on other passages
    assert oracle.read_fine_tuned(study, path) is None


def test_distribution_of_the_best_pairs():
    values = {"q1": (0.5, 0.8, 0.8, 0.8), "q2": (1.0, 1.0, 1.0, 1.0), "q3": (0.2, 0.6, 0.4, 0.1), "q4": (0, 0, 1, 0)}
    shares = oracle.pair_distribution(frame(values), [1, 2])
    # q2, on which all tie, does not count; q1 is shared by three
    np.testing.assert_allclose(shares.to_numpy(), [[0, 400 / 9], [400 / 9, 100 / 9]])
    nothing = oracle.pair_distribution(frame({"q": (1, 1, 1, 1)}), [1, 2])
    assert nothing.to_numpy().tolist() == [[0, 0], [0, 0]]


def test_from_a_study_to_the_words(s):
    twins = random_twins({c.name: grid_scores(s, c) for c in s.test_collections}, s.profile.k_grid, draws=9)
    queries = oracle_queries(twins, s.selected)
    best = per_query_best(s.test_grid).groupby("collection")["value"].mean()
    table = oracle.oracle_table(queries, s.out_of_domain, resamples=50)
    np.testing.assert_allclose(table["oracle"][1:], best[table["collection"][1:]])
    assert table["oracle"][0] == pytest.approx(best[s.out_of_domain].mean())
    chance = oracle_chance(queries, twins, s.out_of_domain, resamples=50)
    beyond, text = chance.loc[2], oracle.oracle_answer(chance)
    assert f"**{beyond['value']:+.3f}** [{beyond['low']:+.3f}, {beyond['high']:+.3f}]" in text and "nan" not in text
