"""Metrics, paired comparisons and confidence intervals, on per-query values.

Metrics come from :mod:`ranx`, tests and intervals from :mod:`scipy.stats` and :mod:`statsmodels`.  Arrays of
per-query values are in the order of the sorted query ids of the qrels, so that those of two runs pair up.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import ranx
from numba.typed import List as TypedList
from scipy import stats
from statsmodels.stats.multitest import multipletests

from diffret_lib.cache import atomic_path
from diffret_lib.scoring import make_run

METRICS = ("ndcg@10", "mrr@10", "recall@100")
Test = Literal["student", "fisher"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Values of a run.

    Attributes
    ----------
    query_ids : list of str
        Sorted.
    per_query : dict of metric to ndarray of float, shape (n_queries,)
    """

    query_ids: list[str]
    per_query: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, float]:
        """Metric to mean over the queries."""
        return {metric: float(values.mean()) for metric, values in self.per_query.items()}


#: Query id to passage id to score (a run) or to relevance (qrels).
Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]


def evaluate_run(qrels: Qrels | ranx.Qrels, run: Run | ranx.Run, metrics: Sequence[str] = METRICS) -> Evaluation:
    """Evaluate a run on every query of the qrels, by the metrics of :mod:`ranx`.

    ranx gets the ids as numbers: of ids as text it makes dicts whose code numba compiles anew in every process, some
    seconds each time.

    Parameters
    ----------
    qrels : dict of query id to passage id to relevance, or ranx.Qrels
        With at least one relevant passage for each query.
    run : dict of query id to passage id to score, or ranx.Run
        Of equal scores the one that is named first stands first.  A query that it lacks counts with nothing
        retrieved; one that the qrels lack is left out.
    metrics : sequence of str
        Names of ranx, such as ``"ndcg@10"``.

    Raises
    ------
    ValueError
        For an unknown metric, empty qrels, or a run that shares no query with them.
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    qrels, run = (x.to_dict() if isinstance(x, ranx.Qrels | ranx.Run) else x for x in (qrels, run))
    query_ids = sorted(qrels)
    if not query_ids:
        raise ValueError("the qrels have no queries")
    if run and run.keys().isdisjoint(query_ids):
        raise ValueError(
            f"the run and the qrels share no query: the run has {sorted(run)[0]!r} and others, "
            f"the qrels {query_ids[0]!r} and others"
        )
    judged, retrieved = [], []
    for query in query_ids:
        ranked = run.get(query, {})
        numbers = {passage: float(i) for i, passage in enumerate([*qrels[query], *ranked])}
        for rows, named in ((judged, qrels[query]), (retrieved, ranked)):
            best_first = sorted(named, key=named.get, reverse=True)
            rows.append(np.array([(numbers[p], named[p]) for p in best_first], float).reshape(-1, 2))
    try:
        # one metric is named twice: ranx.evaluate fails to return a single one by query
        asked = metrics if len(metrics) > 1 else metrics * 2
        values = ranx.evaluate(TypedList(judged), TypedList(retrieved), asked, return_mean=False)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot compute {', '.join(metrics)}: {error}") from error
    return Evaluation(query_ids, {metric: np.asarray(values[metric], float) for metric in metrics})


def per_query(qrels: Qrels | ranx.Qrels, run: Run | ranx.Run, metrics: Sequence[str] = METRICS) -> dict[str, np.ndarray]:
    """Metric to per-query values, in the order of the sorted query ids; see :func:`evaluate_run`."""
    return evaluate_run(qrels, run, metrics).per_query


# -- comparison --------------------------------------------------------------------------------------------


def paired_p_value(a: np.ndarray, b: np.ndarray, test: Test = "student", *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of a paired test that two systems have the same mean.

    Parameters
    ----------
    a, b : ndarray of float, shape (n,)
        Values of the same queries.
    test : {"student", "fisher"}
        Student's paired t-test, or Fisher's randomisation test (signs of the differences flipped; all
        2^n ways where these are no more than ``resamples``).

    Returns
    -------
    float
        1 where no query differs; nan for fewer than two queries.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired values must be of one shape (n,), not {a.shape} and {b.shape}")
    difference = a - b
    if len(difference) < 2:
        return float("nan")
    if not difference.any():
        return 1.0
    if test == "student":
        if not np.ptp(difference):
            return 0.0
        return float(stats.ttest_rel(a, b).pvalue)
    if test == "fisher":
        return _flip_signs(difference, resamples, seed)
    raise ValueError(f"test must be 'student' or 'fisher', not {test!r}")


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of a family of p-values; nan stays nan and is not of the family."""
    p_values = np.asarray(p_values, float)
    corrected = np.full(p_values.shape, np.nan)
    known = ~np.isnan(p_values)
    if known.any():
        corrected[known] = multipletests(p_values[known], method="holm")[1]
    return corrected


def compare(
    values: Mapping[str, np.ndarray],
    *,
    baseline: str | None = None,
    test: Test = "student",
    alpha: float = 0.05,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Paired tests over a family of comparisons, corrected by Holm's method.

    Parameters
    ----------
    values : dict of system to ndarray of float, shape (n,)
        Per-query values of the same queries in the same order.
    baseline : str, optional
        Compare every other system with this one; by default every pair is compared.
    test : {"student", "fisher"}
    alpha : float
        Familywise error rate.

    Returns
    -------
    DataFrame
        A row for each comparison: system, other (the baseline), queries, mean, mean_other, difference,
        p_value, p_holm, significant.
    """
    sizes = {name: len(v) for name, v in values.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"paired values must be of the same queries; numbers of queries: {sizes}")
    if baseline is not None and baseline not in values:
        raise ValueError(f"there is no system {baseline!r}; there are {', '.join(values)}")
    pairs = (
        list(itertools.combinations(values, 2))
        if baseline is None
        else [(name, baseline) for name in values if name != baseline]
    )
    rows = []
    for a, b in pairs:
        x, y = np.asarray(values[a], float), np.asarray(values[b], float)
        p = paired_p_value(x, y, test, resamples=resamples, seed=seed)
        rows.append((a, b, len(x), x.mean(), y.mean(), (x - y).mean(), p))
    frame = pd.DataFrame(rows, columns=["system", "other", "queries", "mean", "mean_other", "difference", "p_value"])
    frame["p_holm"] = holm(frame["p_value"]) if len(frame) else []
    return frame.assign(significant=frame["p_holm"] <= alpha)


# -- averages over collections -----------------------------------------------------------------------------


def macro_average(values: Mapping[str, np.ndarray]) -> float:
    """Mean over collections of the means over their queries."""
    if not values:
        raise ValueError("no collections to average over")
    for name, v in values.items():
        if not len(v):
            raise ValueError(f"the collection {name!r} has no values")
    return float(np.mean([np.mean(v) for v in values.values()]))


def bootstrap_interval(
    values: np.ndarray, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean over queries and its percentile bootstrap interval; see :func:`macro_interval`."""
    return macro_interval({"": values}, resamples, seed, confidence)


def macro_interval(
    values: Mapping[str, np.ndarray], resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Macro average and its percentile bootstrap interval, stratified: queries are drawn within each collection.

    Parameters
    ----------
    values : dict of collection to ndarray of float, shape (n_queries,)
        For a difference, the per-query differences.

    Returns
    -------
    value, low, high : float
        The bounds are nan where a collection has fewer than two queries; where no value varies within its
        collection, they are the average itself.
    """
    value = macro_average(values)
    samples = [np.asarray(v, float) for v in values.values()]
    if min(map(len, samples)) < 2:
        return value, float("nan"), float("nan")
    if not any(np.ptp(s) for s in samples):
        return value, value, value

    def average(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    interval = stats.bootstrap(
        samples,
        average,
        n_resamples=resamples,
        batch=200,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return value, float(interval.low), float(interval.high)


def macro_randomization_p(differences: Mapping[str, np.ndarray], resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of Fisher's randomisation test that the macro average of paired differences is 0.

    The signs of the per-query differences are flipped, in all collections at once, and the macro average is
    the statistic: a collection counts the same however many queries it has.

    Parameters
    ----------
    differences : dict of collection to ndarray of float, shape (n_queries,)

    Returns
    -------
    float
        1 where no query differs.
    """
    macro_average(differences)  # checks
    # each value with the weight that it has in the average: its sum is then the macro average
    parts = [np.asarray(v, float) / (len(v) * len(differences)) for v in differences.values()]
    weighted = np.concatenate(parts)
    if not weighted.any():
        return 1.0
    return _flip_signs(weighted, resamples, seed)


def _flip_signs(differences: np.ndarray, resamples: int, seed: int) -> float:
    """Of a paired randomisation test with the sum of the differences as the statistic."""
    result = stats.permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        n_resamples=resamples,
        batch=200,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


# -- runs on disk ------------------------------------------------------------------------------------------


def save_run(run: Run | ranx.Run, path: str | os.PathLike[str], tag: str | None = None) -> None:
    """Write a run in TREC's format (``query Q0 passage rank score tag``), which cannot hold queries without results.

    The tag is by default the name of a ranx.Run, or ``run``; its whitespace is written as ``_``.

    Raises
    ------
    ValueError
        When a query or passage id is empty or has whitespace, which the format cannot hold.
    """
    if isinstance(run, ranx.Run):
        run, tag = run.to_dict(), tag or run.name
    tag = re.sub(r"\s+", "_", (tag or "").strip()) or "run"
    lines = []
    for query, ranked in run.items():
        for kind, name in (("query", query), *(("passage", passage) for passage in ranked)):
            if not _is_trec_id(name):
                raise ValueError(f"the {kind} id {name!r} is empty or has whitespace, which a TREC run cannot hold")
        for rank, passage in enumerate(sorted(ranked, key=ranked.get, reverse=True), 1):
            lines.append(f"{query} Q0 {passage} {rank} {float(ranked[passage])!r} {tag}\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")


def _is_trec_id(name: str) -> bool:
    """Whether TREC's formats, whose columns are set apart by whitespace, can hold an id."""
    return name.split() == [name]


def save_qrels(judgements: Mapping[str, Mapping[str, int]], path: str | os.PathLike[str]) -> None:
    """Write judgements in TREC's format (``query 0 passage relevance``).

    Raises
    ------
    ValueError
        When an id is empty or has whitespace.
    """
    lines = []
    for query, judged in judgements.items():
        for passage, relevance in judged.items():
            for name in (query, passage):
                if not _is_trec_id(name):
                    raise ValueError(f"the id {name!r} is empty or has whitespace, which TREC's format cannot hold")
            lines.append(f"{query} 0 {passage} {relevance}\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")


def load_run(path: str | os.PathLike[str], name: str | None = None) -> ranx.Run:
    """Read a run in TREC's format.

    Parameters
    ----------
    path : path
    name : str, optional
        Of the run; by default the tag in the file.

    Raises
    ------
    ValueError
        Naming file and line, for a line that is not ``query Q0 passage rank score tag``, or a passage that
        a query has twice.
    """
    path = Path(path)
    results: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.split()
            try:
                if len(parts) != 6:
                    raise ValueError(f"it has {len(parts)} columns, and a TREC run has 6")
                query, _, passage, _, score, tag = parts
                if not np.isfinite(float(score)):
                    raise ValueError(f"the score {score} is not finite")
                if passage in results.setdefault(query, {}):
                    raise ValueError(f"query {query!r} has passage {passage!r} twice")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            results[query][passage] = float(score)
            name = tag if name is None else name
    return make_run(results, name)
