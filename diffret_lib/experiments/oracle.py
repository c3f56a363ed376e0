"""The per-query oracle over the grid of pairs (Kq, Kp), and how much of its headroom is chance (claim 7).

The best of M noisy values lies above their mean: an oracle gains even where all pairs are equally good.  Two estimates:

**Random twins** (:func:`random_twins`).  Let S_m(p) be pair m's score of passage p for a query, standardised per
query and pair, C their mean over the pairs (the consensus) and D_m = S_m - C.  A twin of the grid is C + D with the
departures D permuted among passages of neighbouring consensus ranks, the same permutation for all pairs: twins depart
from one another as much, and as jointly, as the pairs do, but know nothing of relevance beyond the consensus.  The
headroom over the twins is the chance level; its distribution over draws gives a permutation test.

**Split halves** (:func:`cross_fitted`).  A pair chosen on one half of a query's passages is scored on the other.

Where pairs differ in quality for all queries alike, both lean to finding nothing over the best fixed pair; departures
that are larger on relevant passages (they share words with the query), and move together there, bias the other way.
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
from diffret_lib.experiments.comparison import PAIR, per_query_best, transfer
from diffret_lib.experiments.study import Study
from diffret_lib.retrieval.metrics import METRIC, bootstrap_interval, macro_interval, macro_randomization_p
from diffret_lib.retrieval.search import SELECTION_MODE, rank

Pair = tuple[int, int]
TWINS, SPLIT = "random twins", "split halves"


def oracle_table(
    grid: pd.DataFrame, selected: Pair, *, fine_tuned: pd.DataFrame | None = None, chance: Mapping | None = None
) -> pd.DataFrame:
    """Compare fixed pairs and the per-query oracle on a grid (:meth:`diffret_lib.experiments.study.Study.grid`).

    ``fine_tuned`` is from :func:`read_fine_tuned` (ValueError for other queries), ``chance`` from :meth:`Twins.chance`.

    Columns collection, coverage, queries, single, selected, fine_tuned, best_fixed_pair, best_fixed, oracle, headroom
    (oracle less best fixed), chance, beyond_chance (headroom less chance) and tied (share of the queries for which all
    pairs are equally good); nan for everything that is not given.
    """
    best = per_query_best(grid)
    best["tied"] = best["ties"] == grid.groupby(PAIR).ngroups
    means = best.groupby("collection")[["value", "tied"]].mean()
    table = transfer(grid, selected).rename(columns={"best_pair": "best_fixed_pair", "best": "best_fixed"})
    table = table.set_index("collection").assign(fine_tuned=np.nan, oracle=means["value"], tied=means["tied"])
    if fine_tuned is not None:
        table["fine_tuned"] = _same_queries(fine_tuned, grid).groupby("collection")["value"].mean()
    table["headroom"] = table["oracle"] - table["best_fixed"]
    table["chance"] = pd.Series(chance or {}, dtype=float)
    table["beyond_chance"] = table["headroom"] - table["chance"]
    columns = "collection coverage queries single selected fine_tuned best_fixed_pair best_fixed oracle headroom chance"
    return table.reset_index()[[*columns.split(), "beyond_chance", "tied"]]


def read_fine_tuned(path: Path, selected: Pair) -> pd.DataFrame | None:
    """Read the fine-tuned system's per-query values at the selected pair from ``per_query.csv``; None without any."""
    if not path.is_file():
        return None
    rows = pd.read_csv(path, dtype={"query_id": str})
    rows = rows[(rows["training"] == "fine-tuned") & (rows["system"] == "DiffRetriever multi")]
    rows = rows[(rows["k_query"] == selected[0]) & (rows["k_passage"] == selected[1])]
    return rows if len(rows) else None


def pair_distribution(best: pd.DataFrame, grid_values: Sequence[int]) -> pd.DataFrame:
    """Share of the queries, in percent, whose best pair is (Kq, Kp); queries on which all pairs tie are left out."""
    counts = best[best["ties"] < len(grid_values) ** 2].groupby(PAIR).size().unstack("k_passage")
    counts = counts.reindex(index=list(grid_values), columns=list(grid_values)).fillna(0.0)
    return 100 * counts / max(1.0, counts.to_numpy().sum())


def _same_queries(fine_tuned: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Hybrid fine-tuned rows of the grid's collections; ValueError where the queries are not the grid's."""
    known = grid.groupby("collection")["query_id"].agg(set)
    rows = fine_tuned[(fine_tuned["mode"] == SELECTION_MODE) & (fine_tuned["metric"] == METRIC)]
    rows = rows[rows["collection"].isin(known.index)]
    for collection, queries in rows.groupby("collection")["query_id"]:
        if set(queries) != known[collection]:
            raise ValueError(f"fine-tuned values on {collection} are not of the grid's queries: run notebook 04 again")
    return rows


class QueryScores(NamedTuple):
    """Scores of a query's passages under every pair (float32 [M, P], rows standardised), and their relevance [P].

    Columns are the passages that some pair retrieves and the relevant ones, in the order of the collection; a passage
    that a pair does not retrieve has its least score.
    """

    query_id: str
    scores: np.ndarray
    relevance: np.ndarray


class GridScores(NamedTuple):
    """Scores of one collection's queries (sorted by their ids) under every pair of the grid."""

    pairs: list[Pair]
    queries: list[QueryScores]


def grid_scores(study: Study, collection: Collection) -> GridScores:
    """Search a collection with every pair of the profile's grid, hybrid; encodings come from the cache."""
    sides = {k: study.diffretriever(k, k) for k in study.profile.k_grid}
    queries = {k: study.encode(r, collection, "query") for k, r in sides.items()}
    passages = {k: study.encode(r, collection, "passage") for k, r in sides.items()}
    pairs = list(product(study.profile.k_grid, repeat=2))
    bar = tqdm(pairs, desc=f"{collection.name}: pairs", unit="pair")
    found = [rank(queries[kq], passages[kp], SELECTION_MODE, study.profile.top_k) for kq, kp in bar]
    passage_ids, place = list(collection.passage_ids), {query: i for i, query in enumerate(collection.query_ids)}
    out = []
    for query, judged in sorted(collection.qrels.items()):
        scores = np.full((len(pairs), len(passage_ids)), np.nan)
        for row, (of_pair, indices) in zip(scores, found, strict=True):
            retrieved = indices[place[query]]
            row[retrieved[retrieved >= 0]] = of_pair[place[query]][retrieved >= 0]
        relevance = np.array([judged.get(passage, 0) for passage in passage_ids], float)
        union = ~np.isnan(scores).all(0) | np.isin(passage_ids, list(judged))
        scores = scores[:, union]
        least = np.nan_to_num(np.nanmin(scores, axis=1, keepdims=True, initial=np.inf), posinf=0.0)
        out.append(QueryScores(query, _standardised(np.where(np.isnan(scores), least, scores)), relevance[union]))
    return GridScores(pairs, out)


def _standardised(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.mean(1, keepdims=True)
    return (scores / np.maximum(scores.std(1, keepdims=True), 1e-9)).astype(np.float32)


def ndcg(scores: np.ndarray, relevance: np.ndarray, depth: int = 10) -> np.ndarray:
    """nDCG of many rankings of the same passages (float64 [...]); of equal scores the first passage stands first.

    Scores are [..., P], and relevance [P] with at least one above 0.  :mod:`ranx` gives the same, one run at a time.
    """
    gain = np.zeros(scores.shape[:-1])
    for i in np.flatnonzero(relevance > 0):
        own = scores[..., i : i + 1]
        above = (scores > own).sum(-1) + (scores[..., :i] == own).sum(-1)
        gain += np.where(above < depth, relevance[i] / np.log2(above + 2), 0.0)
    best = np.sort(relevance[relevance > 0])[::-1][:depth]
    return gain / (best / np.log2(np.arange(len(best)) + 2)).sum()


class Twins(NamedTuple):
    """nDCG@10 by collection: of the grid (``observed``, float [Q, M]), and of its twins (``drawn``, [draws, Q, M])."""

    pairs: list[Pair]
    observed: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]

    def headrooms(self, fixed: Pair | None = None, k_passage: int | None = None) -> list[dict[str, np.ndarray]]:
        """Headroom of the oracle for each query by collection: on the grid [Q], and on its twins [draws, Q].

        It is over the pair ``fixed``, or over each collection's best one (of the twins, the best of each draw).  With
        ``k_passage`` the oracle chooses Kq alone, at this Kp.
        """
        columns = [i for i, (_, kp) in enumerate(self.pairs) if k_passage in (None, kp)]
        place = None if fixed is None else columns.index(self.pairs.index(fixed))
        sides = (self.observed, self.drawn)
        return [{c: headroom(values[..., columns], place) for c, values in side.items()} for side in sides]

    def chance(self, fixed: Pair | None = None, k_passage: int | None = None) -> dict[str, float]:
        """Chance level of each collection: mean headroom over the twins; parameters as of :meth:`headrooms`."""
        return {c: float(h.mean()) for c, h in self.headrooms(fixed, k_passage)[1].items()}


def random_twins(scores: Mapping[str, GridScores], *, draws: int = 499, stratum: int = 10, seed: int = 0) -> Twins:
    """Draw twins of each collection's grid: the consensus, with the pairs' departures from it permuted.

    The smallest p-value is 1 / (draws + 1).  Departures move among ``stratum`` consecutive ranks of the consensus: in
    small strata many keep their place (1 in ``stratum``), which is conservative; large ones mix unlike passages.
    """
    rng = np.random.default_rng(seed)
    observed, drawn = {}, {}
    for collection, grid in scores.items():
        observed[collection] = np.stack([ndcg(q.scores, q.relevance) for q in grid.queries])
        drawn[collection] = np.empty((draws, *observed[collection].shape), np.float32)
        for i, query in enumerate(tqdm(grid.queries, desc=f"{collection}: random twins", unit="query")):
            drawn[collection][:, i] = _twin_values(query, draws, stratum, rng)
    return Twins(next(iter(scores.values())).pairs, observed, drawn)


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
        values.append(ndcg(twins, relevance).T)
    return np.concatenate(values)


def headroom(values: np.ndarray, fixed: int | None = None) -> np.ndarray:
    """Best value of each query less the fixed column's (by default that of the best mean); [..., Q, M] to [..., Q]."""
    if fixed is not None:
        return values.max(-1) - values[..., fixed]
    best = values.mean(-2).argmax(-1)[..., None, None]
    return values.max(-1) - np.take_along_axis(values, best, -1)[..., 0]


def cross_fitted(grid: GridScores, fixed: int, *, splits: int = 100, seed: int = 0) -> pd.DataFrame:
    """Choose the oracle's pair on one half of a query's passages and score it on the other, in both directions.

    Relevant passages and the others are each split at random (``splits`` times, averaged).  Where several pairs are
    best on a half, the oracle keeps the fixed pair (index ``fixed``) if it is among them, and else takes their mean.
    A row for each query with two relevant passages or more: query_id, headroom (on the half that chose) and replicated
    (the same choice on the other half), both over the fixed pair.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for query in grid.queries:
        relevant, other = np.flatnonzero(query.relevance > 0), np.flatnonzero(query.relevance <= 0)
        if len(relevant) < 2:
            continue
        gains = []
        for _ in range(splits):
            sides = [np.array_split(rng.permutation(side), 2) for side in (relevant, other)]
            halves = [np.sort(np.concatenate(half)) for half in zip(*sides, strict=True)]
            first, second = (ndcg(query.scores[:, half], query.relevance[half]) for half in halves)
            gains += [_choose(first, second, fixed), _choose(second, first, fixed)]
        rows.append((query.query_id, *np.mean(gains, axis=0)))
    return pd.DataFrame(rows, columns=["query_id", "headroom", "replicated"])


def _choose(choosing: np.ndarray, scoring: np.ndarray, fixed: int) -> tuple[float, float]:
    best = np.isclose(choosing, choosing.max())
    chosen = scoring[fixed] if best[fixed] else scoring[best].mean()
    return choosing.max() - choosing[fixed], chosen - scoring[fixed]


def oracle_chance(
    grid: pd.DataFrame, scores: Mapping[str, GridScores], twins: Twins, selected: Pair, *, resamples: int, seed: int,
    fine_tuned: pd.DataFrame | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Headroom, chance level, and the part beyond chance by both estimates; macro over the collections.

    Columns method ("raw", "random twins", "split halves"), quantity, value, low, high, p, queries, reference ("best
    fixed", "selected", "fine-tuning" or "") and kind ("headroom", "chance", "beyond chance", "mean", "difference").
    Intervals are 95 % bootstrap intervals over queries, drawn within each collection; of a chance level by twins, the
    middle 95 % of the draws.  p is one-sided, that the part beyond chance is above 0 (twins: a permutation test,
    halves: sign flips); over fine-tuning it is two-sided.  Split halves pool their queries, and have no rows with
    fewer than two.
    """
    rows: list[tuple] = []
    queries = sum(map(len, twins.observed.values()))

    def add(method, quantity, interval, reference, kind, p=np.nan, n=queries) -> None:
        rows.append((method, quantity, *interval, p, n, reference, kind))

    references = {"best fixed": None, "selected": selected}
    headrooms = {name: twins.headrooms(fixed) for name, fixed in references.items()}
    for name, (observed, _) in headrooms.items():
        add("raw", f"headroom over {name}", macro_interval(observed, resamples, seed), name, "headroom")
    if fine_tuned is not None:
        sides = per_query_best(grid), _same_queries(fine_tuned, grid)
        best, tuned = (side.set_index(["collection", "query_id"])["value"] for side in sides)
        by_query = (best - tuned).dropna().groupby(level="collection", sort=False)
        if differences := {c: d.to_numpy() for c, d in by_query}:
            p, interval = (f(differences, resamples, seed) for f in (macro_randomization_p, macro_interval))
            n = sum(map(len, differences.values()))
            add("raw", "headroom over fine-tuning", interval, "fine-tuning", "headroom", p, n)
    for name, (observed, drawn) in headrooms.items():
        levels = np.mean([h.mean(-1) for h in drawn.values()], axis=0)  # [draws]
        add(TWINS, f"chance over {name}", _middle(levels), name, "chance")
        beyond = {c: h - drawn[c].mean(0) for c, h in observed.items()}
        value = np.mean([h.mean() for h in observed.values()])
        p = float((1 + np.sum(levels >= value - 1e-9)) / (1 + len(levels)))
        add(TWINS, f"beyond chance over {name}", macro_interval(beyond, resamples, seed), name, "beyond chance", p)
    summaries = {"mean nDCG@10 of a pair": ("mean", lambda values: values.mean(-1)),
                 "mean difference of two pairs": ("difference", _disagreement)}  # fmt: skip
    for label, (kind, summary) in summaries.items():
        observed = {c: summary(v) for c, v in twins.observed.items()}
        add(TWINS, f"{label}, grid", macro_interval(observed, resamples, seed), "", kind)
        levels = np.mean([summary(v).mean(-1) for v in twins.drawn.values()], axis=0)
        add(TWINS, f"{label}, twins", _middle(levels), "", kind)
    for name, fixed in references.items():
        halves = []
        for c, values in twins.observed.items():
            place = int(values.mean(0).argmax()) if fixed is None else twins.pairs.index(fixed)
            halves.append(cross_fitted(scores[c], place, seed=seed))
        halves = pd.concat(halves)
        if (n := len(halves)) < 2:
            continue
        found, kept = halves["headroom"].to_numpy(), halves["replicated"].to_numpy()
        whole, lost, beyond = (bootstrap_interval(v, resamples, seed) for v in (found, found - kept, kept))
        p = macro_randomization_p({"": kept}, resamples, seed) / 2
        add(SPLIT, f"headroom over {name}", whole, name, "headroom", n=n)
        add(SPLIT, f"lost on the other half, over {name}", lost, name, "chance", n=n)
        add(SPLIT, f"beyond chance over {name}", beyond, name, "beyond chance", p if beyond[0] > 0 else 1 - p, n)
    return pd.DataFrame(rows, columns="method quantity value low high p queries reference kind".split())


def _middle(levels: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the range of the middle 95 %."""
    return levels.mean(), *np.quantile(levels, [0.025, 0.975])


def _disagreement(values: np.ndarray) -> np.ndarray:
    """Mean absolute difference between two pairs' values, over all twos of pairs; [..., M] to [...]."""
    m = values.shape[-1]
    # of sorted values the i-th is the larger in i differences and the smaller in m - 1 - i
    weights = 2 * np.arange(m) - (m - 1)
    return np.sort(values, axis=-1) @ weights / max(1, m * (m - 1) / 2)


def chance_summary(chance: pd.DataFrame, table: pd.DataFrame) -> str:
    """Say in words (Markdown) what :func:`oracle_chance` and :func:`oracle_table` found."""
    lines = [f"- For {table['tied'].mean():.0%} of the queries all pairs are equally good."]
    for row in chance[chance["reference"] != ""].itertuples():
        value = f"**{row.value:+.3f}** [{row.low:+.3f}, {row.high:+.3f}]"
        over = row.reference if row.reference == "fine-tuning" else f"the {row.reference} pair"
        p = "" if np.isnan(row.p) else f" (p = {row.p:.3g})"
        if row.method == "raw":
            lines.append(f"- The oracle gains {value} over {over}{p}, chance included.")
        elif row.kind == "beyond chance":
            lines.append(f"- By {row.method} ({row.queries} queries), {over}: the part beyond chance is {value}{p}.")
    if SPLIT not in set(chance["method"]):
        lines.append(f"- By {SPLIT}: too few queries with several relevant passages for an estimate.")
    grid, twins, apart, twins_apart = chance[chance["reference"] == ""]["value"]
    lines.append(f"- Mean nDCG@10 is {grid:.3f} of the pairs and {twins:.3f} of twins; on a query two pairs differ by "
                 f"{apart:.3f}, two twins by {twins_apart:.3f}.")  # fmt: skip
    return "\n".join(lines)
