"""The per-query oracle over the grid of counts (Kq, Kp), and how much of its headroom is chance (claim 7).

An oracle takes the best of M pairs for every query.  It gains over a fixed pair even where all pairs are equally
good, as long as they differ: the largest of M noisy values lies above their mean.  Two estimates of that part:

**Random twins** (:func:`random_twins`).  Let S_m(p) be pair m's score of passage p for a query, standardised per
query and pair, C their mean over the pairs (the consensus) and D_m = S_m - C pair m's departures from it.  If the
pairs are equally good noisy versions of one ranking, a departure knows nothing of relevance beyond the consensus:
rows of D are exchangeable among passages of similar C.  A twin of the grid is C + D with these rows permuted among
passages of neighbouring consensus ranks, the same permutation for all pairs, so that twins depart from one another
exactly as much, and as jointly, as the real pairs do.  The oracle's headroom over the twins is the chance level, and
its distribution over draws gives a permutation test.  (Permuting the pairs' nDCG values within a query would leave
that query's maximum, and so the oracle, as it is.  Permuting residuals between queries would need equal variances,
and nDCG of one or two relevant passages has none: many queries have no variance at all.)

**Split halves** (:func:`cross_fitted`).  A query's relevant passages are split into two halves, and its other
passages too.  A pair chosen on one half is scored on the other: what the halves share is the query and the pair, so
that only a preference of this query for this pair carries over.

Limits.  Where pairs differ in quality for all queries alike, both lean to finding nothing over the best fixed pair.
Where departures are larger on relevant passages than on others of like consensus (they share words with the query),
twins find a part beyond chance that is no preference; where a query's relevant passages are alike, they move together
and halves find one that is an accident of how the query was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from diffret_lib import scoring
from diffret_lib.analysis import PAIR, per_query_best, transfer
from diffret_lib.collection import Collection
from diffret_lib.evaluation import bootstrap_interval, macro_interval, macro_randomization_p
from diffret_lib.study import METRIC, SELECTION_MODE, Study

Pair = tuple[int, int]
#: Depth of the nDCG that the estimates compute, the one of the metric.
DEPTH = int(METRIC.rpartition("@")[2])
#: Consecutive consensus ranks among which departures are permuted.
STRATUM = 10
#: Names of the two estimates in tables.
TWINS, SPLIT = "random twins", "split halves"


def oracle_table(
    grid: pd.DataFrame,
    selected: Pair,
    mode: str = SELECTION_MODE,
    *,
    fine_tuned: pd.DataFrame | None = None,
    chance: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Fixed pairs and the per-query oracle.

    Parameters
    ----------
    grid : DataFrame
        Per-query values of the grid (:meth:`diffret_lib.study.Study.grid`).
    selected : (Kq, Kp)
    fine_tuned : DataFrame, optional
        Per-query values of the fine-tuned system at the selected pair: collection, query_id, mode, metric, value.
    chance : dict of collection to float, optional
        The part of the headroom that is chance (:meth:`Twins.chance`).

    Returns
    -------
    DataFrame
        Columns collection, coverage, queries, single, selected, fine_tuned, best_fixed_pair, best_fixed, oracle,
        headroom (oracle less best fixed), chance, beyond_chance (headroom less chance) and tied (share of the
        queries for which all pairs are equally good).  What is not given is nan.

    Raises
    ------
    ValueError
        When a collection's fine-tuned values are of other queries than the grid's.
    """
    best = per_query_best(grid, mode).groupby("collection", sort=False)
    pairs = grid.groupby(PAIR).ngroups
    table = transfer(grid, selected, mode).rename(columns={"best_pair": "best_fixed_pair", "best": "best_fixed"})
    collections = table["collection"]
    table["fine_tuned"] = np.nan
    if fine_tuned is not None:
        tuned = _same_queries(fine_tuned, grid, mode).groupby("collection")["value"].mean()
        table["fine_tuned"] = collections.map(tuned).astype(float)
    table["oracle"] = collections.map(best["value"].mean())
    table["headroom"] = table["oracle"] - table["best_fixed"]
    table["chance"] = collections.map(dict(chance or {})).astype(float)
    table["beyond_chance"] = table["headroom"] - table["chance"]
    table["tied"] = collections.map(best["ties"].agg(lambda t: float(np.mean(t == pairs))))
    columns = ["single", "selected", "fine_tuned", "best_fixed_pair", "best_fixed", "oracle", "headroom"]
    return table[["collection", "coverage", "queries", *columns, "chance", "beyond_chance", "tied"]]


def read_fine_tuned(path: Path, selected: Pair, system: str = "DiffRetriever multi") -> pd.DataFrame | None:
    """Per-query values of the fine-tuned system at the selected pair, out of notebook 04's ``per_query.csv``.

    Returns
    -------
    DataFrame or None
        Its rows; None when the file is not there or has none of this system at this pair.
    """
    if not path.is_file():
        return None
    rows = pd.read_csv(path, dtype={"query_id": str})
    chosen = (rows["training"] == "fine-tuned") & (rows["system"] == system)
    rows = rows[chosen & (rows["k_query"] == selected[0]) & (rows["k_passage"] == selected[1])]
    return rows if len(rows) else None


def pair_distribution(best: pd.DataFrame, grid_values: Sequence[int]) -> pd.DataFrame:
    """Share of the queries, in percent, whose best pair is (Kq, Kp); queries on which all pairs tie left out."""
    undecided = best["ties"] == len(grid_values) ** 2
    counts = best[~undecided].groupby(PAIR).size().unstack("k_passage")
    counts = counts.reindex(index=list(grid_values), columns=list(grid_values)).fillna(0.0)
    return 100 * counts / max(1.0, counts.to_numpy().sum())


def _same_queries(fine_tuned: pd.DataFrame, grid: pd.DataFrame, mode: str) -> pd.DataFrame:
    """The fine-tuned rows of the grid's collections, in one mode; an error where the queries are not the grid's."""
    known = grid.groupby("collection")["query_id"].agg(set)
    rows = fine_tuned[(fine_tuned["mode"] == mode) & (fine_tuned["metric"] == METRIC)]
    rows = rows[rows["collection"].isin(known.index)]
    for collection, queries in rows.groupby("collection")["query_id"]:
        if set(queries) != known[collection]:
            raise ValueError(
                f"the fine-tuned values on {collection} are of other queries than the grid's: "
                "run notebook 04 again with this profile"
            )
    return rows


# -- scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QueryScores:
    """What every pair scores a query's passages.

    Attributes
    ----------
    query_id : str
    scores : ndarray of float32, shape (M, P)
        Standardised in each row: mean 0, variance 1.  Columns are the passages that some pair retrieves and the
        relevant ones, in the order of the collection; where a pair does not retrieve one it has its least score.
    relevance : ndarray of float, shape (P,)
    """

    query_id: str
    scores: np.ndarray
    relevance: np.ndarray


@dataclass(frozen=True, eq=False)
class GridScores:
    """Scores of one collection's queries (sorted by their ids) under every pair of the grid."""

    pairs: list[Pair]
    queries: list[QueryScores]

    def values(self) -> np.ndarray:
        """nDCG@10 of every query and pair; float [Q, M]."""
        return np.stack([ndcg(q.scores, q.relevance) for q in self.queries])


def grid_scores(study: Study, collection: Collection, mode: str = SELECTION_MODE) -> GridScores:
    """Search a collection with every pair of the profile's grid; encodings come from the study's cache."""
    sides = {k: study.diffretriever(k, k) for k in study.profile.k_grid}
    queries = {k: study.encode(r, collection, "query") for k, r in sides.items()}
    passages = {k: study.encode(r, collection, "document") for k, r in sides.items()}
    pairs = list(product(study.profile.k_grid, repeat=2))
    shape = len(collection.query_ids), len(collection.passage_ids)
    retrieved = np.full((len(pairs), *shape), np.nan)
    for found, (kq, kp) in zip(retrieved, tqdm(pairs, desc=f"{collection.name}: pairs", unit="pair"), strict=True):
        scores, indices = scoring.rank(queries[kq], passages[kp], mode, study.profile.top_k)
        rows, places = np.nonzero(indices >= 0)
        found[rows, indices[rows, places]] = scores[rows, places]
    place = {query: i for i, query in enumerate(collection.query_ids)}
    out = []
    for query, judged in sorted(collection.qrels.items()):
        scores = retrieved[:, place[query]]
        relevance = np.array([judged.get(passage, 0) for passage in collection.passage_ids], float)
        union = ~np.isnan(scores).all(0) | np.isin(collection.passage_ids, list(judged))
        scores = scores[:, union]
        least = np.nan_to_num(np.nanmin(scores, axis=1, keepdims=True, initial=np.inf), posinf=0.0)
        out.append(QueryScores(query, _standardised(np.where(np.isnan(scores), least, scores)), relevance[union]))
    return GridScores(pairs, out)


def _standardised(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.mean(1, keepdims=True)
    return (scores / np.maximum(scores.std(1, keepdims=True), 1e-9)).astype(np.float32)


def ndcg(scores: np.ndarray, relevance: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """nDCG of many rankings of the same passages; of equal scores the first passage stands first.

    :mod:`ranx` gives the same; it takes one run at a time, and the estimates here rank a query ten thousand times.

    Parameters
    ----------
    scores : ndarray of float, shape (..., P)
    relevance : ndarray of float, shape (P,)
        With at least one above 0.

    Returns
    -------
    ndarray of float64, shape (...)
    """
    gain = np.zeros(scores.shape[:-1])
    for i in np.flatnonzero(relevance > 0):
        own = scores[..., i : i + 1]
        above = (scores > own).sum(-1) + (scores[..., :i] == own).sum(-1)
        gain += np.where(above < depth, relevance[i] / np.log2(above + 2), 0.0)
    best = np.sort(relevance[relevance > 0])[::-1][:depth]
    return gain / (best / np.log2(np.arange(len(best)) + 2)).sum()


# -- random twins ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Twins:
    """nDCG@10 of the grid, and of random twins of it.

    Attributes
    ----------
    pairs : list of (Kq, Kp)
    observed : dict of collection to ndarray of float, shape (Q, M)
    drawn : dict of collection to ndarray of float32, shape (draws, Q, M)
    """

    pairs: list[Pair]
    observed: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]

    def headrooms(
        self, fixed: Pair | None = None, k_passage: int | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The oracle's headroom for each query, on the grid [Q] and on its twins [draws, Q].

        Parameters
        ----------
        fixed : (Kq, Kp), optional
            Over this pair; by default over each collection's best fixed pair, of the twins the best of each draw.
        k_passage : int, optional
            The oracle chooses Kq alone, at this Kp.
        """
        columns = [i for i, (_, kp) in enumerate(self.pairs) if k_passage in (None, kp)]
        place = None if fixed is None else columns.index(self.pairs.index(fixed))
        return tuple(
            {c: headroom(values[..., columns], place) for c, values in side.items()}
            for side in (self.observed, self.drawn)
        )

    def chance(self, fixed: Pair | None = None, k_passage: int | None = None) -> dict[str, float]:
        """The chance level of each collection: mean headroom over the twins; see :meth:`headrooms`."""
        return {c: float(h.mean()) for c, h in self.headrooms(fixed, k_passage)[1].items()}


def random_twins(
    scores: Mapping[str, GridScores], *, draws: int = 499, stratum: int = STRATUM, seed: int = 0
) -> Twins:
    """Draw twins of the grid: the consensus, with the pairs' departures from it permuted between passages.

    Parameters
    ----------
    scores : dict of collection to GridScores
    draws : int
        The smallest p-value is 1 / (draws + 1).
    stratum : int
        Consecutive ranks of the consensus among which departures are permuted.  1 in ``stratum`` passages keeps
        its own, so that small ones make the test conservative; large ones mix departures of passages that are
        not alike.
    seed : int
    """
    rng = np.random.default_rng(seed)
    observed, drawn = {}, {}
    with tqdm(total=sum(len(s.queries) for s in scores.values()), desc="random twins", unit="query") as bar:
        for collection, grid in scores.items():
            observed[collection] = grid.values()
            twins = np.empty((draws, *observed[collection].shape), np.float32)
            for i, query in enumerate(grid.queries):
                twins[:, i] = _twin_values(query, draws, stratum, rng)
                bar.update()
            drawn[collection] = twins
    return Twins(next(iter(scores.values())).pairs, observed, drawn)


def _twin_values(query: QueryScores, draws: int, stratum: int, rng: np.random.Generator, block: int = 50) -> np.ndarray:
    """nDCG@10 of twins of one query; float [draws, M]."""
    consensus = query.scores.mean(0)
    order = np.argsort(-consensus, kind="stable")
    consensus, relevance = consensus[order], query.relevance[order]
    departures = query.scores[:, order] - consensus
    strata = np.arange(len(order)) // stratum
    parts = []
    for start in range(0, draws, block):
        # sorting by stratum and then by a random number permutes within strata
        keys = strata + rng.random((min(block, draws - start), len(order)))
        twins = consensus + departures[:, np.argsort(keys, axis=1)]  # [M, block, P]
        parts.append(ndcg(twins, relevance).T)
    return np.concatenate(parts)


def headroom(values: np.ndarray, fixed: int | None = None) -> np.ndarray:
    """Each query's best value less that of a fixed pair.

    Parameters
    ----------
    values : ndarray of float, shape (..., Q, M)
    fixed : int, optional
        Column of the fixed pair; by default the one with the best mean over the queries.

    Returns
    -------
    ndarray of float, shape (..., Q)
    """
    if fixed is not None:
        return values.max(-1) - values[..., fixed]
    best = values.mean(-2).argmax(-1)[..., None, None]
    return values.max(-1) - np.take_along_axis(values, best, -1)[..., 0]


# -- split halves ------------------------------------------------------------------------------------------


def cross_fitted(grid: GridScores, fixed: int, *, splits: int = 100, seed: int = 0) -> pd.DataFrame:
    """The oracle chosen on one half of a query's passages and scored on the other, in both directions.

    Relevant passages and the others are each split at random.  Where several pairs are best on a half, the
    oracle keeps the fixed pair if it is among them, and else takes their mean.

    Parameters
    ----------
    grid : GridScores
    fixed : int
        Index of the fixed pair.
    splits : int
        Random splits over which a query's values are averaged.

    Returns
    -------
    DataFrame
        A row for each query with two relevant passages or more: query_id, headroom (on the half that chose),
        replicated (the same choice on the other half); both over the fixed pair.
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


# -- the table ---------------------------------------------------------------------------------------------


def oracle_chance(
    grid: pd.DataFrame,
    scores: Mapping[str, GridScores],
    twins: Twins,
    selected: Pair,
    *,
    resamples: int,
    seed: int,
    fine_tuned: pd.DataFrame | None = None,
    mode: str = SELECTION_MODE,
) -> pd.DataFrame:
    """Raw headroom, chance level, and the part beyond chance, by both estimates; macro over the collections.

    Returns
    -------
    DataFrame
        Columns method ("raw", "random twins", "split halves"), quantity, value, low, high, p, queries.  Intervals
        are 95 % bootstrap intervals over queries (drawn within each collection; the best fixed pair stays the one
        of all queries); of a chance level, the range of the middle 95 % of the draws.  p is one-sided, that the
        part beyond chance is above 0: of random twins a permutation test, of split halves a sign-flipping one.
        Split halves pool the queries with several relevant passages, and have no rows with fewer than two of
        them.  With ``fine_tuned``, "headroom over fine-tuning" has a two-sided p.
    """
    rows: list[dict[str, object]] = []
    queries = sum(map(len, twins.observed.values()))

    def add(
        method: str, quantity: str, interval: tuple[float, float, float], p: float = np.nan, n: int = queries
    ) -> None:
        value, low, high = interval
        rows.append(
            {"method": method, "quantity": quantity, "value": value, "low": low, "high": high, "p": p, "queries": n}
        )

    references = {"best fixed": None, "selected": selected}
    headrooms = {name: twins.headrooms(fixed) for name, fixed in references.items()}
    for name, (observed, _) in headrooms.items():
        add("raw", f"headroom over {name}", macro_interval(observed, resamples, seed))
    if fine_tuned is not None:
        tuned = _same_queries(fine_tuned, grid, mode).set_index(["collection", "query_id"])["value"]
        best = per_query_best(grid, mode).set_index(["collection", "query_id"])["value"]
        differences = (best - tuned).dropna()
        by_collection = {c: d.to_numpy() for c, d in differences.groupby(level="collection", sort=False)}
        if by_collection:
            p = macro_randomization_p(by_collection, resamples, seed)
            interval = macro_interval(by_collection, resamples, seed)
            add("raw", "headroom over fine-tuning", interval, p, len(differences))
    for name, (observed, drawn) in headrooms.items():
        levels = np.mean([h.mean(-1) for h in drawn.values()], axis=0)  # [draws]
        add(TWINS, f"chance over {name}", (levels.mean(), *np.quantile(levels, [0.025, 0.975])))
        beyond = {c: h - drawn[c].mean(0) for c, h in observed.items()}
        value = np.mean([h.mean() for h in observed.values()])
        p = (1 + np.sum(levels >= value - 1e-9)) / (1 + len(levels))
        add(TWINS, f"beyond chance over {name}", macro_interval(beyond, resamples, seed), float(p))
    for label, summary in (("mean nDCG@10 of a pair", np.mean), ("mean difference of two pairs", _disagreement)):
        observed = {c: summary(v, axis=-1) for c, v in twins.observed.items()}
        add(TWINS, f"{label}, grid", macro_interval(observed, resamples, seed))
        levels = np.mean([summary(v, axis=-1).mean(-1) for v in twins.drawn.values()], axis=0)
        add(TWINS, f"{label}, twins", (levels.mean(), *np.quantile(levels, [0.025, 0.975])))
    for name, fixed in references.items():
        halves = []
        for c, of_collection in scores.items():
            best = twins.observed[c].mean(0).argmax() if fixed is None else twins.pairs.index(fixed)
            halves.append(cross_fitted(of_collection, int(best), seed=seed))
        halves = pd.concat(halves, ignore_index=True)
        n = len(halves)
        if n < 2:
            continue
        found, kept = halves["headroom"].to_numpy(float), halves["replicated"].to_numpy(float)
        interval = bootstrap_interval(kept, resamples, seed)
        p = macro_randomization_p({"": kept}, resamples, seed) / 2
        add(SPLIT, f"headroom over {name}", bootstrap_interval(found, resamples, seed), n=n)
        add(SPLIT, f"lost on the other half, over {name}", bootstrap_interval(found - kept, resamples, seed), n=n)
        add(SPLIT, f"beyond chance over {name}", interval, p if interval[0] > 0 else 1 - p, n)
    return pd.DataFrame(rows)


def _disagreement(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean absolute difference between two pairs' values, over all twos of pairs; [..., M] to [...]."""
    ordered = np.sort(values, axis=axis)
    m = ordered.shape[axis]
    # of sorted values the i-th is the larger in i differences and the smaller in m - 1 - i
    weights = 2 * np.arange(m) - (m - 1)
    return np.moveaxis(ordered, axis, -1) @ weights / max(1, m * (m - 1) / 2)


def chance_summary(chance: pd.DataFrame, table: pd.DataFrame) -> str:
    """:func:`oracle_chance` and :func:`oracle_table` in words (Markdown)."""

    def row(method: str, quantity: str) -> pd.Series | None:
        found = chance[(chance["method"] == method) & (chance["quantity"] == quantity)]
        return None if found.empty else found.iloc[0]

    def value(of: pd.Series) -> str:
        return f"**{of['value']:+.3f}** [{of['low']:+.3f}, {of['high']:+.3f}]"

    lines = [
        f"- The oracle stands {value(row('raw', 'headroom over best fixed'))} above each collection's best fixed pair "
        f"and {value(row('raw', 'headroom over selected'))} above the selected pair; for {table['tied'].mean():.0%} of the "
        "queries the pair makes no difference."
    ]
    tuned = row("raw", "headroom over fine-tuning")
    if tuned is not None:
        lines.append(
            f"- Over fine-tuning at the selected pair: {value(tuned)}, p = {tuned['p']:.3g}; not corrected for chance."
        )
    for method in (TWINS, SPLIT):
        for name in ("best fixed", "selected"):
            beyond = row(method, f"beyond chance over {name}")
            if beyond is None:
                lines.append(f"- By {method}: too few queries with several relevant passages for an estimate.")
                break
            whole = row("raw" if method == TWINS else method, f"headroom over {name}")["value"]
            reading = "is more than chance" if beyond["p"] < 0.05 else "cannot be told from chance"
            lines.append(
                f"- By {method} ({beyond['queries']} queries), of {whole:+.3f} over the {name} pair {value(beyond)} is "
                f"beyond chance (p = {beyond['p']:.3g}): it {reading}."
            )
    same, twin = (row(TWINS, f"mean nDCG@10 of a pair, {of}") for of in ("grid", "twins"))
    apart, twins_apart = (row(TWINS, f"mean difference of two pairs, {of}") for of in ("grid", "twins"))
    lines.append(
        f"- Twins are a match for the pairs where they are as good (mean nDCG@10 {twin['value']:.3f} against "
        f"{same['value']:.3f}); two twins differ on a query by {twins_apart['value']:.3f}, two pairs by "
        f"{apart['value']:.3f}, and more than the twins only where departures fall on relevant passages."
    )
    return "\n".join(lines)
