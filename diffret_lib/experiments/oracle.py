"""The per-query oracle over the grid of pairs (Kq, Kp), and how much of its headroom is chance (claim 7).

The best of M noisy values lies above their mean: an oracle gains even where all pairs are equally good.  How much, says
a **random twin** of the grid.  Let S_m(p) be pair m's score of passage p for a query, standardised per query and pair,
C their mean over the pairs (the consensus) and D_m = S_m - C.  A twin is C + D with the departures D permuted among
passages of neighbouring consensus ranks, the same permutation for all pairs: twins depart from one another as much, and
as jointly, as the pairs do, but know nothing of relevance beyond the consensus.  Their oracle's headroom is the chance
level; its distribution over draws gives a permutation test.

Headroom is over the best *fixed* pair, which the other half of the queries chooses (cross-fitting), in the grid and in
every twin alike.  Where pairs differ in quality for all queries, the estimate leans to finding nothing; departures that
are larger on relevant passages (they share words with the query), and move together there, bias it the other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from diffret_lib.data.collection import Collection
from diffret_lib.experiments.comparison import (
    PAIR,
    QUERY,
    RESAMPLES,
    by_system,
    grid_cells,
    held_out_best,
    interval,
    paired,
    read_table,
)
from diffret_lib.experiments.study import Pair, Study
from diffret_lib.retrieval.search import SELECTION_MODE, rank


def pair_distribution(grid: pd.DataFrame, grid_values: Sequence[int]) -> pd.DataFrame:
    """Share of the queries, in percent, whose best pair is (Kq, Kp).

    Pairs that tie for a query's best share it equally; queries on which all pairs tie are left out.
    """
    cells = grid_cells(grid).pivot(index=QUERY, columns=PAIR, values="value")
    best = pd.DataFrame(np.isclose(cells, cells.max(axis=1).to_numpy()[:, None]), columns=cells.columns)
    best = best[~best.all(axis=1)]
    shares = best.div(best.sum(axis=1), axis=0).sum().unstack("k_passage")
    return 100 * shares.reindex(index=list(grid_values), columns=list(grid_values)) / max(1, len(best))


def read_fine_tuned(study: Study, path: Path) -> pd.Series | None:
    """Fine-tuned DiffRetriever multi at the selected pair, hybrid, from ``per_query.csv``: nDCG@10.

    It is indexed by collection and query.  None where there are no such rows, or the grid is on other passages.
    """
    if study.profile.grid_sample or not path.is_file():
        return None
    rows, selected = read_table(path), study.selected
    rows = rows[(rows["k_query"] == selected[0]) & (rows["k_passage"] == selected[1])]
    return by_system(rows, rows["collection"].unique()).get(("DiffRetriever multi, fine-tuned", SELECTION_MODE))


class QueryScores(NamedTuple):
    """Scores of a query's passages under every pair (float32 [M, P], rows standardised), and their relevance [P].

    Columns are the passages that some pair retrieves and the relevant ones, in the order of the collection; a passage
    that a pair does not retrieve has the pair's least score.  ``missing`` has the grades above 0 of judged passages
    that are not there: they count in the ideal ranking.
    """

    query_id: str
    scores: np.ndarray
    relevance: np.ndarray
    missing: Sequence[float] = ()


#: By collection: nDCG@10 of the grid (a row a query, a column a pair), and of its twins (float32 [draws, Q, M]).
Twins = Mapping[str, tuple[pd.DataFrame, np.ndarray]]


def grid_scores(study: Study, collection: Collection) -> list[QueryScores]:
    """Search a collection with every pair of the profile's grid, hybrid; encodings come from the cache.

    Queries are sorted by their ids, pairs as :data:`itertools.product` has them.
    """
    queries, passages = (study.sides(collection, side) for side in ("query", "passage"))
    pairs = list(product(study.profile.k_grid, repeat=2))
    options = SELECTION_MODE, study.profile.top_k, collection.excluded
    bar = tqdm(pairs, desc=f"{collection.name}: pairs", unit="pair")
    found = [rank(queries[kq], passages[kp], *options) for kq, kp in bar]
    passage_ids, place = list(collection.passage_ids), {query: i for i, query in enumerate(collection.query_ids)}
    out = []
    for query, judged in sorted(collection.qrels.items()):
        scores = np.full((len(pairs), len(passage_ids)), np.nan)
        for row, (of_pair, indices) in zip(scores, found, strict=True):
            retrieved = indices[place[query]]
            row[retrieved[retrieved >= 0]] = of_pair[place[query]][retrieved >= 0]
        relevance = np.array([judged.get(passage, 0) for passage in passage_ids], float)
        union = ~np.isnan(scores).all(0) | (relevance > 0)
        scores = scores[:, union]
        least = np.nan_to_num(np.nanmin(scores, axis=1, keepdims=True, initial=np.inf), posinf=0.0)
        scores = _standardised(np.where(np.isnan(scores), least, scores))
        missing = [float(judged[p]) for p in collection.missing if judged.get(p, 0) > 0]
        out.append(QueryScores(query, scores, relevance[union], missing))
    return out


def _standardised(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.mean(1, keepdims=True)
    return (scores / np.maximum(scores.std(1, keepdims=True), 1e-9)).astype(np.float32)


def ndcg(scores: np.ndarray, relevance: np.ndarray, depth: int = 10, missing: Sequence[float] = ()) -> np.ndarray:
    """nDCG of many rankings of the same passages (float64 [...]); of equal scores the first passage stands first.

    Scores are [..., P], relevance is [P]; without any above 0 all is 0.  ``missing`` are grades of relevant passages
    that are not among the P, which the ideal ranking has too.  :mod:`ranx` gives the same, one run at a time.
    """
    gain = np.zeros(scores.shape[:-1])
    for i in np.flatnonzero(relevance > 0):
        own = scores[..., i : i + 1]
        above = (scores > own).sum(-1) + (scores[..., :i] == own).sum(-1)
        gain += np.where(above < depth, relevance[i] / np.log2(above + 2), 0.0)
    best = np.sort([*relevance[relevance > 0], *missing])[::-1][:depth]
    return gain / max((best / np.log2(np.arange(len(best)) + 2)).sum(), 1e-12)


def random_twins(
    scores: Mapping[str, list[QueryScores]], k_grid: Sequence[int], draws: int = 499, stratum: int = 10, seed: int = 0
) -> Twins:
    """Draw twins of each collection's grid: the consensus, with the pairs' departures from it permuted.

    ``scores`` are of :func:`grid_scores`, ``k_grid`` the numbers of masks.  The smallest p-value is 1 / (draws + 1).
    Departures move among ``stratum`` consecutive ranks of the consensus: in small strata many keep their place (1 in
    ``stratum``), which is conservative; large ones mix unlike passages.
    """
    rng, twins = np.random.default_rng(seed), {}
    pairs = pd.MultiIndex.from_product([k_grid, k_grid], names=PAIR)
    for collection, queries in scores.items():
        observed = np.stack([ndcg(q.scores, q.relevance, missing=q.missing) for q in queries])
        bar = tqdm(queries, desc=f"{collection}: random twins", unit="query")
        drawn = np.stack([_twin_values(query, draws, stratum, rng).astype(np.float32) for query in bar], axis=1)
        twins[collection] = pd.DataFrame(observed, [q.query_id for q in queries], pairs), drawn
    return twins


def _twin_values(query: QueryScores, draws: int, stratum: int, rng: np.random.Generator, block: int = 50) -> np.ndarray:
    """nDCG@10 of twins of one query; float [draws, M]."""
    consensus = query.scores.mean(0)
    order = np.argsort(-consensus, kind="stable")
    consensus, relevance = consensus[order], query.relevance[order]
    departures = query.scores[:, order] - consensus
    strata = np.arange(len(order)) // stratum
    values = []
    for start in range(0, draws, block):
        # sorting by stratum and then by a random number permutes within strata
        keys = strata + rng.random((min(block, draws - start), len(order)))
        twins = consensus + departures[:, np.argsort(keys, axis=1)]  # [M, block, P]
        values.append(ndcg(twins, relevance, missing=query.missing).T)
    return np.concatenate(values)


def oracle_queries(twins: Twins, selected: Pair, fine_tuned: pd.Series | None = None) -> pd.DataFrame:
    """nDCG@10 of each query by the oracle and by fixed pairs, from which the tables below are made.

    Columns collection, query_id, oracle, best_fixed (:func:`~diffret_lib.experiments.comparison.held_out_best`),
    selected, single (the first pair of the grid), fine_tuned (of :func:`read_fine_tuned`; nan without it), chance and
    chance_selected (headroom of the twins' oracle over their own best fixed pair, and over the selected one, mean over
    draws), chance_kq (the latter where the oracle chooses Kq alone) and tied (whether all pairs are equally good).
    ValueError: fine-tuned values of other queries.
    """
    frames = []
    for collection, (grid, drawn) in twins.items():
        values, place = grid.to_numpy(), grid.columns.get_loc(selected)
        same_kp = grid.columns.get_level_values(1) == selected[1]
        best, own = drawn.max(-1), drawn[..., place]
        columns = {
            "oracle": values.max(1), "best_fixed": held_out_best(values), "selected": values[:, place],
            "single": values[:, 0], "chance": (best - held_out_best(drawn)).mean(0),
            "chance_selected": (best - own).mean(0, dtype=float),
            "chance_kq": (drawn[..., same_kp].max(-1) - own).mean(0, dtype=float),
            "tied": np.isclose(values, values[:, :1]).all(1),
        }  # fmt: skip
        frames.append(pd.DataFrame({"collection": collection, "query_id": grid.index, **columns}))
    table = pd.concat(frames).set_index(QUERY)
    tuned = pd.Series(dtype=float, index=table.index[:0]) if fine_tuned is None else fine_tuned
    for collection, known in tuned.groupby(level=0):
        if set(known.index) != set(table.loc[[collection]].index):
            raise ValueError(f"fine-tuned values on {collection} are not of the grid's queries: run notebook 04 again")
    return table.assign(fine_tuned=tuned.reindex(table.index)).reset_index()


def oracle_table(queries: pd.DataFrame, collections: Sequence[str], resamples: int = RESAMPLES) -> pd.DataFrame:
    """Means of :func:`oracle_queries` by collection, some with their 95 % interval (``<column>_low``, ``_high``).

    The first row is the macro average of ``collections``, those out of domain.
    Columns collection, queries, single, selected, fine_tuned, best_fixed, oracle, headroom (oracle less best fixed),
    chance, beyond_chance (headroom less chance) and tied (share); selected, fine_tuned, best_fixed, oracle and
    beyond_chance have intervals.
    """
    queries = queries.assign(headroom=queries["oracle"] - queries["best_fixed"]).set_index(QUERY)
    queries["beyond_chance"] = queries["headroom"] - queries["chance"]
    rows, outside = [], queries[queries.index.isin(list(collections), level="collection")]
    for collection, own in [("macro", outside), *queries.groupby(level="collection", sort=False)]:
        row = {"collection": collection, "queries": len(own)}
        for name in "single selected fine_tuned best_fixed oracle headroom chance beyond_chance tied".split():
            row[name] = own[name].groupby(level="collection").mean().mean()
            if name in ("selected", "fine_tuned", "best_fixed", "oracle", "beyond_chance"):
                found = interval(own[name], resamples)
                row |= {f"{name}_{end}": found[end] for end in ("low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def twin_levels(twins: Twins, collections: Sequence[str]) -> tuple[np.ndarray, float]:
    """The oracle's macro headroom over the best fixed pair in each draw of twins (float [draws]), and in the grid."""
    both = [np.concatenate([[observed], drawn]) for observed, drawn in map(twins.get, collections)]
    rooms = np.mean([(v.max(-1) - held_out_best(v)).mean(-1) for v in both], axis=0)
    return rooms[1:], float(rooms[0])


def oracle_chance(
    queries: pd.DataFrame, twins: Twins, collections: Sequence[str], resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Headroom of the oracle, its chance level and the part beyond chance; macro over some collections.

    ``queries`` is from :func:`oracle_queries`; a resample of the queries has its own chance level.  Columns method,
    reference ("best fixed", "selected" or "fine-tuning"), kind ("headroom", "chance", "beyond chance") and those of
    :func:`~diffret_lib.experiments.comparison.paired`.  p is two-sided; beyond chance over the best fixed pair it is
    that of the permutation test, twice the smaller tail.
    """
    queries, rows = queries[queries["collection"].isin(list(collections))].set_index(QUERY), []
    parts = {"best fixed": ("best_fixed", "chance"), "selected": ("selected", "chance_selected"),
             "fine-tuning": ("fine_tuned", "chance_selected")}  # fmt: skip
    for reference, (column, chance) in parts.items():
        headroom = queries["oracle"] - queries[column]
        if headroom.isna().all():
            continue
        values = {"headroom": headroom, "chance": queries[chance], "beyond chance": headroom - queries[chance]}
        for kind, of_kind in values.items():
            about = {"method": "raw" if kind == "headroom" else "random twins", "reference": reference, "kind": kind}
            rows.append(about | paired(of_kind, resamples))
    levels, observed = twin_levels(twins, collections)
    tails = [np.sum(levels >= observed - 1e-9), np.sum(levels <= observed + 1e-9)]
    rows[2]["p"] = min(1.0, 2 * (1 + float(min(tails))) / (1 + len(levels)))
    return pd.DataFrame(rows)


def oracle_answer(chance: pd.DataFrame) -> str:
    """One sentence (Markdown) on :func:`oracle_chance`."""
    rows = chance[chance["reference"] == "best fixed"].set_index("kind")
    room, level, beyond = (rows.loc[kind] for kind in ("headroom", "chance", "beyond chance"))
    clear = "clearly" if beyond["p"] < 0.05 and beyond["value"] > 0 else "not clearly"
    return (
        f"An oracle that knows each query's best pair gains **{room['value']:+.3f}** [{room['low']:+.3f}, "
        f"{room['high']:+.3f}] nDCG@10 over the best fixed pair, and {level['value']:.3f} where all pairs are equally "
        f"good (chance): beyond chance remain **{beyond['value']:+.3f}** [{beyond['low']:+.3f}, {beyond['high']:+.3f}] "
        f"(p = {beyond['p']:.2g}, {beyond['queries']:,} queries), {clear} above zero."
    )
