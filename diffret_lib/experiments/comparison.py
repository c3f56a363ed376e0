"""Comparisons of collections, numbers of masks, stages of the adaptation and systems: tables of 00, 01, 02 and 04."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffret_lib.data.collection import Collection, lexical_overlap
from diffret_lib.experiments.study import Study, System
from diffret_lib.models.backbones import load_backbone
from diffret_lib.retrieval.metrics import METRIC, holm, macro_interval, macro_randomization_p
from diffret_lib.retrieval.search import MODES, SELECTION_MODE
from diffret_lib.retrieval.systems import BM25

PAIR = ["k_query", "k_passage"]
Comparison = tuple[str, str, str]
#: Tokens read of a text in a stage of the adaptation, whatever the profile, so that the values of a log compare.
STAGE_LIMITS = {"max_query_tokens": 64, "max_passage_tokens": 96}
STAGE_COLUMNS = ["stage", "system", "K", *MODES]


def backbones_table(study: Study) -> pd.DataFrame:
    """The two backbones: sizes, attention, and seconds until they are loaded."""
    rows = []
    for family, attention in (("autoregressive", "causal"), ("diffusion", "both ways")):
        start = time.perf_counter()
        backbone = study.backbone(family)
        model, spec = backbone.model, backbone.spec
        rows.append({
            "backbone": spec.name, "family": family, "parameters (M)": sum(p.numel() for p in model.parameters()) / 1e6,
            "layers": model.config.num_hidden_layers, "hidden size": model.config.hidden_size, "attention": attention,
            "mask token": spec.mask_token or "", "dtype": study.profile.dtype,
            "seconds to load": time.perf_counter() - start, "fingerprint": backbone.fingerprint[:12],
        })  # fmt: skip
    return pd.DataFrame(rows)


def collections_table(study: Study) -> pd.DataFrame:
    """The profile's collections, training first: sizes, what queries share with relevant passages, BM25's nDCG@10."""
    rows = []
    for c in [study.train_collection, *study.test_collections]:
        values = study.evaluate(System("BM25", BM25()), [c])
        ndcg = values[values["metric"] == METRIC]["value"].to_numpy().mean()
        rows.append(c.statistics() | lexical_overlap(c) | {"bm25_ndcg@10": float(ndcg)})
    return pd.DataFrame(rows)


def stage_retrieval(study: Study, collection: Collection, adapters: Mapping[str, str | Path | None]) -> pd.DataFrame:
    """Zero-shot nDCG@10 with each adapter, for K = 1 and K = 4, with the parent's PromptReps and BM25.

    ``adapters`` maps a stage to an adapter folder, ``"none"``, or None (the committed one).  Columns STAGE_COLUMNS.
    """

    def row(stage: str, system: str, k: int | None, retriever: Any) -> dict[str, Any]:
        values = study.evaluate(System(system, retriever), [collection])
        means = values[values["metric"] == METRIC].groupby("mode")["value"].mean()
        return {"stage": stage, "system": system, "K": k} | means.to_dict()

    rows = [row("", "BM25", None, BM25()), row("", "PromptReps (parent)", 1, study.promptreps(**STAGE_LIMITS))]
    for stage, adapter in adapters.items():
        backbone, name = None, study.profile.backbones.diffusion
        if adapter is not None:
            backbone = load_backbone(name, adapter=adapter, dtype=study.profile.dtype)
        for k in (1, 4):
            rows.append(row(stage, "DiffRetriever", k, study.diffretriever(k, k, backbone=backbone, **STAGE_LIMITS)))
    return pd.DataFrame(rows).astype({"K": "Int64"})[STAGE_COLUMNS]


def logged_retrieval(log: Mapping[str, Any], collection: Collection, but: Sequence[str] = ()) -> pd.DataFrame:
    """The log's rows of :func:`stage_retrieval` for other stages than ``but``; none if of another sample."""
    table = pd.DataFrame(log["retrieval"], columns=STAGE_COLUMNS).astype({"K": "Int64"})
    return table[~table["stage"].isin(["", *but]) & (log["collection"] == collection.fingerprint)]


def heat_map(grid: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Mean over collections of the mean nDCG@10; rows Kq, columns Kp."""
    means = _cells(grid, mode).groupby([*PAIR, "collection"])["value"].mean()
    return means.groupby(PAIR).mean().unstack("k_passage")


def _cells(grid: pd.DataFrame, mode: str = SELECTION_MODE) -> pd.DataFrame:
    return grid[(grid["mode"] == mode) & (grid["metric"] == METRIC)]


def transfer(grid: pd.DataFrame, selected: tuple[int, int]) -> pd.DataFrame:
    """The pair selected on training data against each test collection's own best pair (claim 6).

    The best pair is chosen and scored on the same queries, which favours it: the loss is biased upwards.
    Columns collection, coverage, queries, selected, best_pair, best, loss, single (the pair (1, 1)).
    """
    rows, names = [], ["collection", "coverage"]
    for (collection, coverage), cells in _cells(grid).groupby(names, sort=False):
        means = cells.groupby(PAIR)["value"].mean()
        best = means.idxmax()
        loss, pair, queries = means[best] - means[selected], f"({best[0]}, {best[1]})", cells["query_id"].nunique()
        rows.append((collection, coverage, queries, means[selected], pair, means[best], loss, means[1, 1]))
    return pd.DataFrame(rows, columns=[*names, "queries", "selected", "best_pair", "best", "loss", "single"])


def per_query_best(grid: pd.DataFrame) -> pd.DataFrame:
    """Each query's best pair; ties go to the fewest vectors, then to the smallest Kq.

    Columns collection, query_id, k_query, k_passage, value, ties (pairs of the best value), worst (the lowest value).
    """
    cells = _cells(grid).assign(cost=lambda d: d["k_query"] * d["k_passage"], loss=lambda d: -d["value"])
    ordered = cells.sort_values(["collection", "query_id", "loss", "cost", "k_query"], kind="stable")
    groups = ordered.groupby(["collection", "query_id"], sort=False)
    best = groups.first()[[*PAIR, "value"]]
    best["ties"] = groups["value"].agg(lambda v: int(np.isclose(v, v.max()).sum()))
    best["worst"] = groups["value"].min()
    return best.reset_index()


def evaluation_table(per_query: pd.DataFrame) -> pd.DataFrame:
    """Means over queries, for each training, system, family, mode, pair, collection and metric."""
    keys = ["training", "system", "family", "mode", *PAIR, "collection", "metric"]
    table = per_query.groupby([*keys, "coverage"], sort=False, dropna=False)["value"].mean().reset_index()
    table[PAIR] = table[PAIR].astype("Int64")
    return table[[*keys, "value", "coverage"]]


def evaluation_wide(table: pd.DataFrame, out_of_domain: Sequence[str], metric: str = METRIC) -> pd.DataFrame:
    """One row a training, system and mode, a column a collection, and the macro average of the out-of-domain ones."""
    cells, index = table[table["metric"] == metric], ["training", "system", "mode"]
    wide = cells.pivot_table(index=index, columns="collection", values="value", sort=False)
    wide["macro"] = wide[list(out_of_domain)].mean(axis=1)
    return wide.rename(columns=lambda c: c.removeprefix("pydocs/")).rename_axis(columns=None).reset_index()


def system_intervals(per_query: pd.DataFrame, collections: Sequence[str], resamples: int, seed: int) -> pd.DataFrame:
    """Macro averages (value) with 95 % bootstrap intervals (low, high; queries resampled within each collection)."""
    keys, rows = ["training", "system", "mode"], []
    for key, cells in _of(per_query, collections).groupby(keys, sort=False):
        values = {c: v["value"].to_numpy() for c, v in cells.groupby("collection", sort=False)}
        rows.append((*key, *macro_interval(values, resamples, seed)))
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high"])


def _of(per_query: pd.DataFrame, collections: Sequence[str]) -> pd.DataFrame:
    return per_query[(per_query["metric"] == METRIC) & per_query["collection"].isin(collections)]


def comparison_name(system: str, training: str) -> str:
    """A system's name in comparisons: without the number of tokens it decodes, and fine-tuned if it is."""
    return re.sub(r" \(N=\d+\)$", "", system) + ("" if training == "zero-shot" else f", {training}")


#: The paired comparisons of the zero-shot study: (better by the paper's claims, than), both in the same mode.
COMPARISONS = (
    ("DiffRetriever single", "DiffEmbed", "dense"),
    *(("DiffRetriever multi", "DiffRetriever single", mode) for mode in MODES),
    *(("PromptReps multi", "PromptReps single", mode) for mode in MODES),
    *(("DiffRetriever single", "PromptReps single", mode) for mode in MODES),
    *(("DiffRetriever multi", "PromptReps multi", mode) for mode in MODES),
    ("DiffEmbed", "Mean pooling", "dense"),
)
#: What fine-tuning adds to each system, and the same claims after it.
FINE_TUNED_COMPARISONS = (
    *(
        (f"{system}, fine-tuned", system, mode)
        for system in ("DiffRetriever single", "DiffRetriever multi", "PromptReps single", "PromptReps multi")
        for mode in MODES
    ),
    ("DiffEmbed, fine-tuned", "DiffEmbed", "dense"),
    *((f"{better}, fine-tuned", f"{than}, fine-tuned", mode) for better, than, mode in COMPARISONS[:-1]),
    *(("DiffRetriever multi, fine-tuned", f"{than}, fine-tuned", "dense") for than in ("DiffEmbed", "RepLLaMA")),
)


def compare_systems(
    per_query: pd.DataFrame, comparisons: Sequence[Comparison], collections: Sequence[str], *, resamples: int, seed: int
) -> pd.DataFrame:
    """Paired differences over the queries of several collections, macro-averaged; systems by :func:`comparison_name`.

    The test is a sign-flipping randomisation test of the macro difference; p-values are corrected by Holm over the
    comparisons; the interval is a bootstrap over queries within each collection.  ValueError: a system is missing, or
    on other queries.  Columns better, than, mode, queries, difference, low, high, p, p_corrected, reading.
    """
    chosen = _of(per_query, collections)
    names = pd.Series(map(comparison_name, chosen["system"], chosen["training"]), chosen.index, dtype=str)
    rows = []
    for better, than, mode in comparisons:
        sides = []
        for name in (better, than):
            cells = chosen[(names == name) & (chosen["mode"] == mode)]
            if cells.empty:
                raise ValueError(f"there is no {name} ({mode}) on {', '.join(collections)}")
            sides.append(cells.set_index(["collection", "query_id"])["value"])
        differences = (sides[0] - sides[1]).dropna()
        if len(differences) != len(sides[0]) or len(differences) != len(sides[1]):
            raise ValueError(f"{better} and {than} ({mode}) were not evaluated on the same queries")
        values = {c: v.to_numpy() for c, v in differences.groupby(level="collection", sort=False)}
        found = *macro_interval(values, resamples, seed), macro_randomization_p(values, resamples, seed)
        rows.append((better, than, mode, len(differences), *found))
    table = pd.DataFrame(rows, columns=["better", "than", "mode", "queries", "difference", "low", "high", "p"])
    table["p_corrected"] = holm(table["p"].to_numpy())
    above, clear = table["difference"] > 0, table["p_corrected"] < 0.05
    table["reading"] = np.select([clear & above, clear & ~above], ["better", "worse"], "no clear difference")
    return table
