"""Metrics, paired tests and confidence intervals, on per-query values; runs and judgements on disk.

Metrics come from :mod:`ranx`, tests and intervals from :mod:`scipy.stats` and :mod:`statsmodels`.  Arrays of
per-query values are in the order of the sorted query ids of the qrels, so that those of two runs pair up.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import ranx
from scipy import stats
from statsmodels.stats.multitest import multipletests

from diffret_lib.cache import write_text

#: The metric by which pairs are selected and claims are judged.
METRIC = "ndcg@10"
METRICS = (METRIC, "mrr@10", "recall@100")

#: Query id to passage id to score (a run) or to relevance (qrels).
Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

_METRIC_NAME = re.compile(r"[a-z][a-z_-]*(@[1-9]\d*)?(-l[1-9]\d*)?")


def per_query(
    qrels: Qrels | ranx.Qrels, run: Run | ranx.Run, metrics: Sequence[str] = METRICS
) -> dict[str, np.ndarray]:
    """Evaluate a run on every query of the qrels.

    Parameters
    ----------
    qrels : dict of query id to passage id to relevance (whole numbers), or ranx.Qrels
    run : dict of query id to passage id to score, or ranx.Run
        Of equal scores the one that is named first stands first.  A query that it lacks counts with nothing
        retrieved; one that the qrels lack is left out.
    metrics : sequence of str
        Names of ranx.

    Returns
    -------
    dict of metric to ndarray of float, shape (n_queries,), in the order of the sorted query ids of the qrels

    Raises
    ------
    TypeError
        For ids that are no strings, scores that are no numbers, or grades that are no whole numbers.
    ValueError
        For an unknown metric, empty qrels, scores that are not finite, or no query in common.
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    for metric in metrics:
        if not isinstance(metric, str) or not _METRIC_NAME.fullmatch(metric):
            raise ValueError(f"cannot compute {metric!r}: a metric is named as in 'ndcg@10', with a cut of 1 or more")
    qrels, run = (x.to_dict() if isinstance(x, ranx.Qrels | ranx.Run) else x for x in (qrels, run))
    if not qrels:
        raise ValueError("the qrels have no queries")
    _check_values("qrels", qrels, qrels, Integral)
    query_ids = sorted(qrels)
    _check_values("run", run, qrels, Real)
    if run and run.keys().isdisjoint(query_ids):
        raise ValueError(f"the run and the qrels share no query: {min(run)!r} and others, {query_ids[0]!r} and others")
    # ranx gets ids of one width and scores without ties: its code is compiled once for all runs, and sorts as here
    judged, retrieved = {}, {}
    for i, query in enumerate(query_ids):
        ranked = run.get(query) or {None: 0.0}  # nothing retrieved: one passage that nobody judged
        numbers = {passage: f"{j:08d}" for j, passage in enumerate(dict.fromkeys([*qrels[query], *ranked]))}
        best_first = sorted(ranked, key=ranked.get, reverse=True)
        judged[f"{i:08d}"] = {numbers[passage]: int(grade) for passage, grade in qrels[query].items()}
        retrieved[f"{i:08d}"] = {numbers[passage]: -float(place) for place, passage in enumerate(best_first)}
    try:
        # one metric is named twice: ranx returns a single one in another form
        asked = metrics if len(metrics) > 1 else metrics * 2
        values = ranx.evaluate(ranx.Qrels(judged), ranx.Run(retrieved), asked, return_mean=False)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot compute {', '.join(metrics)}: {error}") from error
    return {metric: np.asarray(values[metric], float) for metric in metrics}


def _check_values(name: str, table: Any, queries: Mapping[str, Any], kind: type) -> None:
    for query, row in table.items():
        if not isinstance(query, str) or not isinstance(row, Mapping):
            raise TypeError(f"the {name} must map str query ids to dicts, not {query!r} to a {type(row).__name__}")
        for passage, value in row.items() if query in queries else ():
            place = f"the {name}, query {query!r}, passage {passage!r}"
            if not isinstance(passage, str):
                raise TypeError(f"{place}: the id is a {type(passage).__name__}, not a str")
            if not isinstance(value, kind):
                raise TypeError(f"{place}: {value!r} is not a {'number' if kind is Real else 'whole number'}")
            if not math.isfinite(value):
                raise ValueError(f"{place}: the score {value} is not finite")


def make_run(results: Run, name: str | None = None) -> ranx.Run:
    """Results as a :class:`ranx.Run`, without the queries that have none."""
    run, rows = ranx.Run(name=name), {query: row for query, row in results.items() if row}
    if rows:  # in this way the compiled code is the same for ids of any length
        run.add_multi(list(rows), [list(row) for row in rows.values()], [list(row.values()) for row in rows.values()])
    return run


# -- tests, averages over collections and intervals --------------------------------------------------------


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of a family of p-values; nan stays nan and is not of the family."""
    p_values = np.asarray(p_values, float)
    corrected = np.full(p_values.shape, np.nan)
    known = ~np.isnan(p_values)
    if known.any():
        corrected[known] = multipletests(p_values[known], method="holm")[1]
    return corrected


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

    ``values`` maps collections to per-query values (or differences), float (n_queries,).  Returns value, low, high;
    the bounds are nan where a collection has fewer than two queries, and where no value varies within its collection,
    they are the average itself.  ValueError: ``confidence`` outside (0, 1), fewer than 2 ``resamples``.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence!r}")
    if not isinstance(resamples, Integral) or resamples < 2:
        raise ValueError(f"resamples must be a whole number of at least 2, not {resamples!r}")
    value = macro_average(values)
    samples = [np.asarray(v, float) for v in values.values()]
    if min(map(len, samples)) < 2:
        return value, float("nan"), float("nan")
    if not any(np.ptp(s) for s in samples):
        return value, value, value

    def average(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    interval = stats.bootstrap(
        samples, average, n_resamples=resamples, batch=200, vectorized=True, confidence_level=confidence,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return value, float(interval.low), float(interval.high)


def macro_randomization_p(differences: Mapping[str, np.ndarray], resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of Fisher's randomisation test that the macro average of paired differences is 0.

    The signs of the per-query differences (float (n_queries,) of each collection) are flipped in all collections at
    once, all 2^n ways where these are no more than ``resamples``.  1 where no query differs.
    """
    macro_average(differences)  # checks
    # each value with the weight that it has in the average: its sum is then the macro average
    parts = [np.asarray(v, float) / (len(v) * len(differences)) for v in differences.values()]
    weighted = np.concatenate(parts)
    if not weighted.any():
        return 1.0
    result = stats.permutation_test(
        (weighted,), np.sum, permutation_type="samples", n_resamples=resamples, batch=200, vectorized=True,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


# -- runs and judgements on disk ---------------------------------------------------------------------------


def save_run(run: Run | ranx.Run, path: str | os.PathLike[str], tag: str | None = None) -> None:
    """Write a run in TREC's format (``query Q0 passage rank score tag``), which cannot hold queries without results.

    The tag is by default the name of a ranx.Run, or ``run``; its whitespace is written as ``_``.  ValueError: an id is
    empty or has whitespace, which the format cannot hold.
    """
    if isinstance(run, ranx.Run):
        run, tag = run.to_dict(), tag or run.name
    tag = "_".join((tag or "").split()) or "run"
    _write_columns(path, (
        (query, "Q0", passage, rank, repr(float(ranked[passage])), tag)
        for query, ranked in run.items()
        for rank, passage in enumerate(sorted(ranked, key=ranked.get, reverse=True), 1)
    ))  # fmt: skip


def save_qrels(judgements: Qrels, path: str | os.PathLike[str]) -> None:
    """Write judgements in TREC's format (``query 0 passage relevance``); errors as of :func:`save_run`."""
    _write_columns(path, (
        (query, "0", passage, relevance)
        for query, judged in judgements.items()
        for passage, relevance in judged.items()
    ))  # fmt: skip


def _write_columns(path: str | os.PathLike[str], rows: Iterable[tuple[Any, ...]]) -> None:
    lines = []
    for row in rows:
        for kind, name in (("query", row[0]), ("passage", row[2])):
            if name.split() != [name]:
                raise ValueError(f"the {kind} id {name!r} is empty or has whitespace, which TREC's format cannot hold")
        lines.append(" ".join(map(str, row)) + "\n")
    write_text(path, "".join(lines))


def load_run(path: str | os.PathLike[str], name: str | None = None) -> ranx.Run:
    """Read a run in TREC's format (UTF-8, with or without a byte-order mark); its name is by default the file's tag.

    ValueError, naming file and line: a line is not ``query Q0 passage rank score tag`` in UTF-8, a score is no finite
    number, or a query has a passage twice.
    """
    results: dict[str, dict[str, float]] = {}
    for number, line in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            parts = line.decode("utf-8").split()
            if len(parts) != 6:
                raise ValueError(f"it has {len(parts)} columns, and a TREC run has 6")
            query, _, passage, _, score, tag = parts
            if not math.isfinite(float(score)):
                raise ValueError(f"the score {score} is not finite")
            if passage in results.setdefault(query, {}):
                raise ValueError(f"query {query!r} has passage {passage!r} twice")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        results[query][passage] = float(score)
        name = tag if name is None else name
    return make_run(results, name)
