"""Metrics and paired tests on per-query values; runs and judgements on disk.

Metrics come from :mod:`ranx`, tests from :mod:`scipy.stats` and :mod:`statsmodels`.  Arrays of
per-query values are in the order of the sorted query ids of the qrels, so that those of two runs pair up.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import ranx
from scipy import stats
from statsmodels.stats.multitest import multipletests

from diffret_lib.cache import write_text
from diffret_lib.data.checks import identifier, numbered_lines, numbers_by_id, strings, whole_number

#: The metric by which pairs are selected and claims are judged.
METRIC = "ndcg@10"
METRICS = (METRIC, "mrr@10", "recall@100")

#: Query id to passage id to score (a run) or to relevance (qrels).
Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]
#: Collections or metrics to values of their queries, float (n_queries,).
Values = Mapping[str, np.ndarray]

_METRIC_NAME = re.compile(r"(ndcg|dcg|mrr|map|recall|precision|f1|hits|hit_rate)(@[1-9]\d{0,7})?(-l[1-9]\d{0,7})?")


def per_query(qrels: Qrels | ranx.Qrels, run: Run | ranx.Run, metrics: Sequence[str] = METRICS) -> Values:
    """Evaluate a run on every query of the qrels, by ``metrics`` as ranx names them: metric to float (n_queries,).

    Of equal scores the one that is named first stands first (trec_eval has the greater id first).  A query that the run
    lacks counts with nothing retrieved; one that the qrels lack is left out.  A negative grade counts as 0.
    ValueError: an unknown metric, empty qrels, no query in common, grades that are no whole numbers, scores that are
    not finite, ids that are no strings.
    """
    strings("metrics", metrics)
    for metric in metrics:
        if not _METRIC_NAME.fullmatch(metric):
            raise ValueError(f"cannot compute {metric!r}: a metric is named as in 'ndcg@10', with a cut of 1 or more")
    qrels, run = (x.to_dict() if isinstance(x, ranx.Qrels | ranx.Run) else x for x in (qrels, run))
    numbers_by_id("run", run), numbers_by_id("qrels", qrels, whole=True)
    if not qrels or (run and run.keys().isdisjoint(qrels)):
        raise ValueError(f"the run and the qrels share no query: {list(run)[:3]}..., {list(qrels)[:3]}...")
    # ranx gets ids of one width and scores without ties: its code is compiled once for all runs, and sorts as here
    judged, retrieved = {}, {}
    for i, query in enumerate(sorted(qrels)):
        ranked = run.get(query) or {None: 0.0}  # nothing retrieved: one passage that nobody judged
        numbers = {passage: f"{j:08d}" for j, passage in enumerate(dict.fromkeys([*qrels[query], *ranked]))}
        best_first = sorted(ranked, key=ranked.get, reverse=True)
        judged[f"{i:08d}"] = {numbers[passage]: max(0, int(grade)) for passage, grade in qrels[query].items()}
        retrieved[f"{i:08d}"] = {numbers[passage]: -float(place) for place, passage in enumerate(best_first)}
    # one metric is named twice: ranx returns a single one in another form
    asked = list(metrics) if len(metrics) > 1 else [*metrics, *metrics]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unsafe cast from uint64 to int64")  # while ranx compiles
        values = ranx.evaluate(ranx.Qrels(judged), ranx.Run(retrieved), asked, return_mean=False)
    return {metric: np.asarray(values[metric], float) for metric in metrics}


def make_run(results: Run, name: str | None = None) -> ranx.Run:
    """Results as a :class:`ranx.Run`, without the queries that have none; a ValueError as of :func:`per_query`."""
    numbers_by_id("run", results)
    run, rows = ranx.Run(name=name), {query: row for query, row in results.items() if row}
    if rows:  # in this way the compiled code is the same for ids of any length
        run.add_multi(list(rows), [list(row) for row in rows.values()], [list(row.values()) for row in rows.values()])
    return run


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of a family of p-values; nan stays nan and is not of the family.

    ValueError: a value that is no number from 0 to 1.
    """
    try:
        corrected = np.array(p_values, float)
    except (TypeError, ValueError):
        raise ValueError(f"p-values must be numbers from 0 to 1, not {p_values!r:.100}") from None
    known = ~np.isnan(corrected)
    if ((corrected[known] < 0) | (corrected[known] > 1)).any():
        raise ValueError(f"p-values must be from 0 to 1, not {p_values}")
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected


def macro_average(values: Values) -> float:
    """Mean over collections of the means over their queries; a ValueError where there are none."""
    if not values or not all(map(len, values.values())):
        raise ValueError(f"nothing to average over in one of the collections {list(values)}")
    return float(np.mean([np.mean(v) for v in values.values()]))


def macro_randomization_p(differences: Values, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of Fisher's randomisation test that the macro average of paired differences is 0.

    The signs of the per-query differences (float (n_queries,) of each collection) are flipped in all collections at
    once, all 2^n ways where these are no more than ``resamples``.  1 where no query differs.  ValueError: no
    differences, some that are not finite, ``resamples`` or a ``seed`` that is no whole number of at least 1 or 0.
    """
    whole_number("resamples", resamples), whole_number("seed", seed, 0)
    if not math.isfinite(macro_average(differences)):
        raise ValueError("the differences must be finite numbers")
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


def save_run(run: Run, path: str | os.PathLike[str], tag: str = "run") -> None:
    """Write a run (``query Q0 passage rank score tag``), best first; queries without results have no line.

    ValueError: an id or the tag is empty or has white space, which the format cannot hold, or a score is not finite.
    """
    numbers_by_id("run", run)
    rows = []
    for query, ranked in run.items():
        for rank, passage in enumerate(sorted(ranked, key=ranked.get, reverse=True), 1):
            rows.append((query, "Q0", passage, str(rank), repr(float(ranked[passage])), tag))
    _write_columns(path, rows)


def load_run(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Read a run of TREC's format (also as ``.gz``), as :func:`save_run` writes it: passages in the order of the lines.

    ValueError, naming file and line: text that is not UTF-8, not six columns, a score that is no finite number, an id
    that :func:`save_run` would refuse, a passage that a query has twice.
    """
    run: dict[str, dict[str, float]] = {}
    for number, line in numbered_lines(Path(path)):
        try:
            if len(cells := line.split()) != 6:
                raise ValueError(f"query, Q0, passage, rank, score and tag are needed, got {line!r}")
            query, _, passage, _, score, _ = cells
            ranked = run.setdefault(identifier(query), {})
            if identifier(passage) in ranked:
                raise ValueError(f"query {query!r} has passage {passage!r} twice")
            ranked[passage] = float(score)
            if not math.isfinite(ranked[passage]):
                raise ValueError(f"the score must be a finite number, got {score!r}")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return run


def save_qrels(judgements: Qrels, path: str | os.PathLike[str]) -> None:
    """Write judgements (``query 0 passage relevance``); errors as of :func:`save_run`."""
    numbers_by_id("qrels", judgements, whole=True)
    _write_columns(path, [(q, "0", p, str(grade)) for q, judged in judgements.items() for p, grade in judged.items()])


def _write_columns(path: str | os.PathLike[str], rows: Sequence[Sequence[str]]) -> None:
    for text in {text for row in rows for text in row}:
        identifier(text)
    write_text(path, "".join(" ".join(row) + "\n" for row in rows))
