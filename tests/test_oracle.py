from __future__ import annotations

from itertools import combinations, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import ndcg_score
from tests.test_study import VALUES, frame, labelled, world  # noqa: F401  (a fixture)

from diffret_lib.experiments import oracle
from diffret_lib.experiments.oracle import (
    GridScores,
    QueryScores,
    Twins,
    chance_summary,
    cross_fitted,
    grid_scores,
    headroom,
    ndcg,
    oracle_chance,
    oracle_table,
    random_twins,
    read_fine_tuned,
)
from diffret_lib.report import figures

PAIRS = list(product((1, 2, 4), repeat=2))


def simulated(kind: str, seed: int, queries: int = 30, passages: int = 40) -> GridScores:
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
    return GridScores(PAIRS, found)


def estimates(kind: str, seed: int = 0) -> pd.DataFrame:
    scores = {"a": simulated(kind, seed), "b": simulated(kind, seed + 1)}
    twins = random_twins(scores, draws=99, seed=0)
    table = oracle_chance(pd.DataFrame(), scores, twins, (2, 2), resamples=200, seed=0)
    assert not table.duplicated(["method", "quantity"]).any()
    assert set(table["reference"]) == {"best fixed", "selected", ""}
    over = table[table["reference"] != ""]
    assert all(row.quantity.endswith(f"over {row.reference}") for row in over.itertuples())
    kinds = {"raw": ["headroom"], "random twins": ["chance", "beyond chance"]}
    kinds["split halves"] = ["headroom", "chance", "beyond chance"]
    assert over.groupby(["method", "reference"])["kind"].agg(list).to_dict() == {
        (method, name): kinds[method] for method in kinds for name in ("best fixed", "selected")
    }
    return table.set_index(["method", "quantity"])


# -- nDCG ------------------------------------------------------------------------------------------------------


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


def test_scores_of_a_study_rank_as_its_grid(world):  # noqa: F811
    s, _ = world
    for collection in s.test_collections:
        scores = grid_scores(s, collection)
        assert scores.pairs == [(1, 1), (1, 2), (2, 1), (2, 2)]
        cells = s.test_grid[(s.test_grid["collection"] == collection.name) & (s.test_grid["mode"] == "hybrid")]
        wide = cells.pivot(index="query_id", columns=["k_query", "k_passage"], values="value")
        assert [q.query_id for q in scores.queries] == list(wide.index)
        np.testing.assert_allclose([ndcg(q.scores, q.relevance) for q in scores.queries], wide[scores.pairs])
        for q in scores.queries:
            np.testing.assert_allclose(q.scores.mean(1), 0, atol=1e-6)
            np.testing.assert_allclose(q.scores.std(1), 1, atol=1e-5)


def test_passages_that_a_pair_does_not_retrieve_have_its_least_score(world, monkeypatch):  # noqa: F811
    s, _ = world
    collection = s.test_collections[0]
    whole = grid_scores(s, collection)
    monkeypatch.setattr(s, "profile", s.profile.model_copy(update={"top_k": 3}))
    short = grid_scores(s, collection)
    for a, b in zip(short.queries, whole.queries, strict=True):
        assert a.relevance.sum() == b.relevance.sum() == len(collection.qrels[a.query_id])
        assert a.scores.shape[1] <= b.scores.shape[1]
        # of a pair at least all but three are at the bottom together
        assert ((a.scores <= a.scores.min(1, keepdims=True) + 1e-6).sum(1) >= a.scores.shape[1] - 3).all()


# -- headroom --------------------------------------------------------------------------------------------------


def test_headroom_by_hand():
    values = np.array(list(VALUES.values()))  # means 0.425, 0.65, 0.675, 0.55
    np.testing.assert_allclose(headroom(values), [0, 0, 0.2, 0])
    np.testing.assert_allclose(headroom(values, 3), [0, 0, 0.5, 0.2])
    both = headroom(np.stack([values, values[:, ::-1]]))
    np.testing.assert_allclose(both, [[0, 0, 0.2, 0]] * 2)


def test_headroom_over_counts_of_the_query_alone():
    values = np.array(list(VALUES.values()))
    twins = Twins([(1, 1), (1, 2), (2, 1), (2, 2)], {"c": values}, {"c": np.stack([values, values])})
    observed, drawn = twins.headrooms((2, 2), k_passage=2)
    np.testing.assert_allclose(observed["c"], [0, 0, 0.5, 0.2])  # of (1, 2) and (2, 2)
    assert drawn["c"].shape == (2, 4)
    assert twins.chance((2, 2), k_passage=2) == {"c": pytest.approx(0.175)}
    assert twins.chance() == {"c": pytest.approx(0.05)}


# -- random twins ----------------------------------------------------------------------------------------------


def test_twins_permute_departures_within_strata():
    query = simulated("equal", 0).queries[4]
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
    first, again, other = (random_twins(scores, draws=3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.drawn["a"], again.drawn["a"])
    assert (first.drawn["a"] != other.drawn["a"]).any()
    np.testing.assert_allclose(first.observed["a"], [ndcg(q.scores, q.relevance) for q in scores["a"].queries])


@pytest.mark.parametrize("seed", [0, 10])
def test_of_equal_pairs_the_headroom_is_chance(seed):
    table = estimates("equal", seed)
    raw = table["value"]["raw", "headroom over best fixed"]
    assert raw > 0.15  # there is much of it
    beyond = table.loc["random twins", "beyond chance over best fixed"]
    assert abs(beyond["value"]) < 0.15 * raw and beyond["low"] < 0.02 and beyond["p"] > 0.01
    assert table["value"]["random twins", "chance over best fixed"] == pytest.approx(raw - beyond["value"])
    halves = table.loc["split halves", "beyond chance over best fixed"]
    assert halves["value"] < 0.15 * raw and halves["p"] > 0.05
    for label in ("mean nDCG@10 of a pair", "mean difference of two pairs"):
        grid, twins = (table["value"]["random twins", f"{label}, {of}"] for of in ("grid", "twins"))
        assert grid == pytest.approx(twins, abs=0.02)


def test_p_values_of_equal_pairs_are_not_small_too_often():
    p = []
    for seed in range(20):
        twins = random_twins({"a": simulated("equal", seed, queries=12)}, draws=39, seed=seed)
        observed, drawn = twins.headrooms()
        p.append((1 + (drawn["a"].mean(1) >= observed["a"].mean()).sum()) / 40)
    assert np.mean(np.array(p) <= 0.1) <= 0.25 and np.median(p) > 0.25


def test_a_pair_that_is_better_for_all_queries_is_no_headroom():
    table = estimates("quality")
    for method in ("random twins", "split halves"):
        row = table.loc[method, "beyond chance over best fixed"]
        assert row["value"] < 0 and row["p"] > 0.5
    # over a fixed pair that is not the best it is, and that is no interaction
    assert table["value"]["split halves", "beyond chance over selected"] > 0.05


def test_preferences_of_queries_are_found_beyond_chance():
    table = estimates("interaction")
    for method in ("random twins", "split halves"):
        row = table.loc[method, "beyond chance over best fixed"]
        assert row["value"] > 0.1 and row["low"] > 0 and row["p"] <= 0.01
        assert row["low"] <= row["value"] <= row["high"]
    grid, twins = (table["value"]["random twins", f"mean difference of two pairs, {of}"] for of in ("grid", "twins"))
    assert grid > twins + 0.02
    raw = table.loc["raw"]["value"]
    parts = table["value"]["random twins"]
    for name in ("best fixed", "selected"):
        whole = parts[f"chance over {name}"] + parts[f"beyond chance over {name}"]
        assert whole == pytest.approx(raw[f"headroom over {name}"])
    halves = table["value"]["split halves"]
    assert halves["headroom over selected"] == pytest.approx(
        halves["lost on the other half, over selected"] + halves["beyond chance over selected"]
    )
    assert table["queries"]["split halves"].tolist() == [40] * 6 and table["queries"]["raw"].tolist() == [60] * 2


def test_difference_of_two_pairs():
    values = np.random.default_rng(0).normal(size=(4, 7))
    plain = [np.mean([abs(a - b) for a, b in combinations(row, 2)]) for row in values]
    np.testing.assert_allclose(oracle._disagreement(values), plain)


# -- split halves ----------------------------------------------------------------------------------------------


def test_only_queries_with_several_relevant_passages_are_split():
    grid = simulated("equal", 0)
    halves = cross_fitted(grid, 0, splits=2)
    assert list(halves["query_id"]) == [q.query_id for q in grid.queries if q.relevance.sum() > 1]


def test_the_choice_of_a_half_by_hand():
    choosing, scoring = np.array([0.2, 0.8, 0.8, 0.1]), np.array([0.5, 0.4, 0.2, 0.9])
    assert oracle._choose(choosing, scoring, 0) == pytest.approx((0.6, 0.3 - 0.5))
    assert oracle._choose(choosing, scoring, 1) == (0, 0)  # the fixed pair is among the best


def test_without_differences_there_is_nothing_to_find():
    relevance = np.array([1.0, 1, 0, 0, 0, 0])
    same = np.tile(np.array([3.0, 0, 2, 1, -1, -2], np.float32), (len(PAIRS), 1))
    scores = {"c": GridScores(PAIRS, [QueryScores(f"q{i}", same, relevance) for i in range(4)])}
    twins = random_twins(scores, draws=9)
    table = oracle_chance(pd.DataFrame(), scores, twins, (1, 1), resamples=50, seed=0).set_index(["method", "quantity"])
    heads = [i for i in table.index if "over" in i[1]]
    assert len(heads) == 12 and (table.loc[heads, "value"].abs() < 1e-9).all()
    assert (table.loc[[i for i in heads if "beyond" in i[1]], "p"] > 0.4).all()


def test_with_one_relevant_passage_a_query_there_are_no_halves():
    grid = simulated("equal", 0)
    scores = {"c": GridScores(PAIRS, [q for q in grid.queries if q.relevance.sum() == 1])}
    table = oracle_chance(pd.DataFrame(), scores, random_twins(scores, draws=9), (2, 2), resamples=50, seed=0)
    assert set(table["method"]) == {"raw", "random twins"}
    text = chance_summary(table, pd.DataFrame({"tied": [0.25, 0.75]}))
    assert "too few queries with several relevant passages" in text and "For 50% of the queries" in text


# -- tables ----------------------------------------------------------------------------------------------------


def tuned(values: list[float], collection: str = "c") -> pd.DataFrame:
    rows = [
        {"training": "fine-tuned", "system": "DiffRetriever multi", "k_query": 2, "k_passage": 2, "collection": collection,
         "query_id": f"q{i + 1}", "mode": mode, "metric": "ndcg@10", "value": v + (mode == "dense")}
        for i, v in enumerate(values) for mode in ("dense", "hybrid")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_oracle_table_with_fine_tuning_and_chance():
    grid = pd.concat([frame(VALUES), frame({"q1": (0, 0, 0, 1)}, "d")])
    table = oracle_table(grid, (2, 2), fine_tuned=tuned([0.9, 1, 0.5, 0.4]), chance={"c": 0.02}).set_index("collection")
    assert table["fine_tuned"]["c"] == pytest.approx(0.7) and np.isnan(table["fine_tuned"]["d"])
    assert table["beyond_chance"]["c"] == pytest.approx(0.03) and np.isnan(table["beyond_chance"]["d"])
    plain = oracle_table(grid, (2, 2))
    assert list(plain) == [
        "collection", "coverage", "queries", "single", "selected", "fine_tuned", "best_fixed_pair", "best_fixed", "oracle",
        "headroom", "chance", "beyond_chance", "tied",
    ]  # fmt: skip
    assert plain[["fine_tuned", "chance", "beyond_chance"]].isna().all().all()
    with pytest.raises(ValueError, match="on c are not of the grid's queries: run notebook 04"):
        oracle_table(grid, (2, 2), fine_tuned=tuned([0.9, 1, 0.5]))


def test_headroom_over_fine_tuning():
    values = np.array(list(VALUES.values()))
    queries = [QueryScores(f"q{i + 1}", np.zeros((4, 3), np.float32), np.array([1.0, 0, 0])) for i in range(4)]
    pairs = [(1, 1), (1, 2), (2, 1), (2, 2)]
    twins = Twins(pairs, {"c": values}, {"c": values[None]})
    scores, values = {"c": GridScores(pairs, queries)}, tuned([0.9, 1, 0.5, 0.4])
    table = oracle_chance(frame(VALUES), scores, twins, (2, 2), resamples=50, seed=0, fine_tuned=values)
    row = table.set_index("quantity").loc["headroom over fine-tuning"]
    assert row["method"] == "raw" and row["queries"] == 4
    assert row["reference"] == "fine-tuning" and row["kind"] == "headroom"
    assert row["value"] == pytest.approx(np.mean([-0.1, 0, 0.1, 0.1]))
    assert row["p"] == pytest.approx(1.0)  # every flip of three equal signs is as extreme
    assert "over fine-tuning (p = 1), chance included" in chance_summary(table, pd.DataFrame({"tied": [0]}))


def test_fine_tuned_values_of_the_evaluation(tmp_path):
    path = tmp_path / "per_query.csv"
    assert read_fine_tuned(path, (2, 2)) is None
    rows = tuned([0.1, 0.2])
    rows["query_id"] = rows["query_id"].str.removeprefix("q").str.zfill(3)
    others = [rows.assign(training="zero-shot"), rows.assign(system="DiffEmbed", k_query=np.nan)]
    pd.concat([rows, *others]).to_csv(path, index=False)
    found = read_fine_tuned(path, (2, 2))
    assert len(found) == 4 and set(found["query_id"]) == {"001", "002"} and set(found["training"]) == {"fine-tuned"}
    assert read_fine_tuned(path, (4, 2)) is None


# -- figures ---------------------------------------------------------------------------------------------------


def test_figures():
    table = oracle_table(frame(VALUES), (2, 2), fine_tuned=tuned([0.9, 1, 0.5, 0.4]), chance={"c": 0.02})
    fig = figures.oracle(table)
    assert sum(len(bars) for bars in fig.axes[0].containers) == 5
    (line,) = fig.axes[0].collections[0].get_segments()
    assert line[:, 1] == pytest.approx([0.695, 0.695])  # best fixed 0.675, and chance
    labelled(fig)
    fig = figures.oracle_chance(estimates("interaction").reset_index())
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert names == [
        "raw: headroom (60 queries)", "random twins: chance (60 queries)", "random twins: beyond chance (60 queries)",
        "split halves: headroom (40 queries)", "split halves: chance (40 queries)",
        "split halves: beyond chance (40 queries)",
    ]  # fmt: skip
    labelled(fig)
    plt.close("all")
