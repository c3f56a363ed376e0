"""Comparisons of collections, numbers of masks, stages of the adaptation and systems: tables of 00, 01, 02 and 04."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffret_lib.addresses import address
from diffret_lib.cache import remember
from diffret_lib.data.collection import Collection, lexical_overlap
from diffret_lib.experiments.study import Study, System, ranking
from diffret_lib.models.backbones import load_backbone
from diffret_lib.retrieval.metrics import METRIC, holm, macro_interval, macro_randomization_p, per_query
from diffret_lib.retrieval.search import MODES, SELECTION_MODE
from diffret_lib.retrieval.systems import BM25, DiffRetriever

PAIR = ["k_query", "k_passage"]
Comparison = tuple[str, str, str]
#: Numbers of masks for which retrieval is compared between stages of the adaptation.
STAGE_COUNTS = (1, 4)
#: Tokens of a text that are read in it, whatever the profile, so that the values of a log compare.
STAGE_LIMITS = {"max_query_tokens": 64, "max_passage_tokens": 96}
STAGE_COLUMNS = ["stage", "system", "K", *MODES]


def backbones_table(study: Study) -> pd.DataFrame:
    """The two backbones: sizes, attention, and seconds until they are loaded."""
    rows = []
    for family, attention in (("autoregressive", "causal"), ("diffusion", "both ways")):
        start = time.perf_counter()
        backbone = study.backbone(family)
        config = backbone.model.config
        rows.append({
            "backbone": backbone.spec.name, "family": family,
            "parameters (M)": sum(p.numel() for p in backbone.model.parameters()) / 1e6,
            "layers": config.num_hidden_layers, "hidden size": config.hidden_size, "attention": attention,
            "mask token": backbone.spec.mask_token or "", "dtype": study.profile.dtype,
            "seconds to load": time.perf_counter() - start, "fingerprint": backbone.fingerprint[:12],
        })  # fmt: skip
    return pd.DataFrame(rows)


def collections_table(study: Study) -> pd.DataFrame:
    """The profile's collections, training first: sizes, what queries share with relevant passages, BM25's nDCG@10."""
    rows = []
    for c in [study.train_collection, *study.test_collections]:
        key = address([collection_statistics], c.fingerprint, c.coverage)
        rows.append(remember("statistics", key, lambda c=c: collection_statistics(c)) | {"collection": c.name})
    return pd.DataFrame(rows)


def collection_statistics(collection: Collection) -> dict[str, Any]:
    """Sizes, overlap of words and BM25's nDCG@10 of a collection."""
    return collection.statistics() | lexical_overlap(collection) | {"bm25_ndcg@10": bm25_ndcg(collection)}


def bm25_ndcg(collection: Collection) -> float:
    """nDCG@10 of BM25: how lexical a collection is."""
    bm25 = BM25()
    passages = bm25.encode_passages(collection.passages)
    run = ranking(bm25.encode_queries(collection.queries), passages, collection, "sparse", 10)
    return float(per_query(collection.qrels, run, [METRIC])[METRIC].mean())


def stage_retrieval(study: Study, collection: Collection, adapters: Mapping[str, str | Path | None]) -> pd.DataFrame:
    """Zero-shot nDCG@10 with each adapter, for K = 1 and K = 4, with the parent's PromptReps and BM25.

    ``adapters`` maps a stage to an adapter folder, ``"none"``, or None (the committed adapter).  Columns
    :data:`STAGE_COLUMNS`.
    """

    def row(stage: str, system: str, k: int | None, retriever: Any) -> dict[str, Any]:
        values = study.evaluate(System(system, getattr(retriever, "family", "lexical"), retriever, k, k), [collection])
        means = values[values["metric"] == METRIC].groupby("mode")["value"].mean()
        return {"stage": stage, "system": system, "K": k} | means.to_dict()

    rows = [row("", "BM25", None, BM25()), row("", "PromptReps (parent)", 1, study.promptreps(**STAGE_LIMITS))]
    for stage, adapter in adapters.items():
        backbone = study.backbone("diffusion")
        if adapter is not None:
            backbone = load_backbone(study.profile.backbones.diffusion, adapter=adapter, dtype=study.profile.dtype)
        for k in STAGE_COUNTS:
            retriever = DiffRetriever(backbone, k_query=k, k_passage=k, **study.limits | STAGE_LIMITS)
            rows.append(row(stage, "DiffRetriever", k, retriever))
        del backbone
    return pd.DataFrame(rows).astype({"K": "Int64"})[STAGE_COLUMNS]


def logged_retrieval(log: Mapping[str, Any], collection: Collection, but: Sequence[str] = ()) -> pd.DataFrame:
    """The log's rows of :func:`stage_retrieval` for other stages than ``but``.

    Empty when they were measured on another sample than ``collection``.
    """
    table = pd.DataFrame(log["retrieval"], columns=STAGE_COLUMNS).astype({"K": "Int64"})
    return table[~table["stage"].isin(["", *but]) & (log["collection"] == collection.fingerprint)]


def heat_map(grid: pd.DataFrame, mode: str, metric: str = METRIC) -> pd.DataFrame:
    """Mean over collections of the mean metric; rows Kq, columns Kp."""
    cells = grid[(grid["mode"] == mode) & (grid["metric"] == metric)]
    means = cells.groupby([*PAIR, "collection"])["value"].mean()
    return means.groupby(PAIR).mean().unstack("k_passage")


def grid_table(grid: pd.DataFrame) -> pd.DataFrame:
    """Means over queries: columns collection, coverage, mode, k_query, k_passage, metric, value."""
    keys = ["collection", "coverage", "mode", *PAIR, "metric"]
    return grid.groupby(keys, sort=False)["value"].mean().reset_index()


def transfer(grid: pd.DataFrame, selected: tuple[int, int], mode: str = SELECTION_MODE) -> pd.DataFrame:
    """The pair selected on training data against each test collection's own best pair (claim 6).

    The best pair is chosen and scored on the same queries, which favours it: the loss is biased upwards.
    Columns collection, coverage, queries, selected, best_pair, best, loss, single (the pair (1, 1)).
    """
    rows = []
    for collection, cells in _cells(grid, mode).groupby("collection", sort=False):
        means = cells.groupby(PAIR)["value"].mean()
        best = means.idxmax()
        rows.append({
            "collection": collection, "coverage": cells["coverage"].iloc[0], "queries": cells["query_id"].nunique(),
            "selected": means[selected], "best_pair": f"({best[0]}, {best[1]})", "best": means[best],
            "loss": means[best] - means[selected], "single": means[1, 1],
        })  # fmt: skip
    return pd.DataFrame(rows)


def transfer_summary(table: pd.DataFrame) -> str:
    """A sentence on :func:`transfer`: mean loss to the best pair, and mean gain over one vector a side."""
    loss, gain = table["loss"].mean(), (table["selected"] - table["single"]).mean()
    return (
        f"On average the selected pair scores **{loss:.3f}** below the best pair in hindsight, and **{gain:+.3f}** "
        f"against one vector on each side (hybrid nDCG@10, {int(table['queries'].sum())} queries in {len(table)} "
        "collections)."
    )


def per_query_best(grid: pd.DataFrame, mode: str = SELECTION_MODE) -> pd.DataFrame:
    """Each query's best pair; ties go to the fewest vectors, then to the smallest Kq.

    Columns collection, query_id, k_query, k_passage, value, ties (pairs that share the best value) and worst (the
    value of the worst pair).
    """
    cells = _cells(grid, mode).assign(cost=lambda d: d["k_query"] * d["k_passage"])
    ordered = cells.sort_values(
        ["collection", "query_id", "value", "cost", "k_query"], ascending=[True, True, False, True, True], kind="stable"
    )
    groups = ordered.groupby(["collection", "query_id"], sort=False)
    best = groups.first()[[*PAIR, "value"]]
    best["ties"] = groups["value"].agg(lambda v: int(np.isclose(v, v.max()).sum()))
    best["worst"] = groups["value"].min()
    return best.reset_index()


def _cells(grid: pd.DataFrame, mode: str) -> pd.DataFrame:
    return grid[(grid["mode"] == mode) & (grid["metric"] == METRIC)]


def training_gain(summary: pd.DataFrame) -> str:
    """A sentence on training's effect on the development collection, out of ``training_summary``."""
    gain = summary["dev_best"] - summary["dev_before"]
    text = (
        f"On the development collection training changes nDCG@10 by **{gain.mean():+.3f}** on average; "
        f"{int((gain > 0).sum())} of {len(summary)} systems rise."
    )
    fell = ", ".join(summary["system"][gain < 0])
    return text + (f" {fell} never regain the score of step 0; the best later step is kept." if fell else "")


def evaluation_table(per_query: pd.DataFrame) -> pd.DataFrame:
    """Means over queries, for each training, system, family, mode, pair, collection and metric."""
    keys = ["training", "system", "family", "mode", *PAIR, "collection", "metric"]
    table = per_query.groupby([*keys, "coverage"], sort=False, dropna=False)["value"].mean().reset_index()
    table[PAIR] = table[PAIR].astype("Int64")
    return table[[*keys, "value", "coverage"]]


def zero_shot_table(per_query: pd.DataFrame) -> pd.DataFrame:
    """The zero-shot rows of :func:`evaluation_table`, without their column training."""
    table = evaluation_table(per_query)
    return table[table["training"] == "zero-shot"].drop(columns="training").reset_index(drop=True)


def evaluation_wide(table: pd.DataFrame, out_of_domain: Sequence[str], metric: str = METRIC) -> pd.DataFrame:
    """One row a training, system and mode, a column a collection, and the macro average of the out-of-domain ones."""
    cells = table[table["metric"] == metric]
    index = [name for name in ("training", "system", "mode") if name in cells]
    wide = cells.pivot_table(index=index, columns="collection", values="value", sort=False)
    wide["macro"] = wide[list(out_of_domain)].mean(axis=1)
    return wide.rename(columns=lambda c: c.removeprefix("pydocs/")).rename_axis(columns=None).reset_index()


def system_intervals(
    per_query: pd.DataFrame, collections: Sequence[str], resamples: int, seed: int
) -> pd.DataFrame:
    """Macro averages with 95 % bootstrap intervals (queries resampled within each collection).

    Columns training, system, mode, value, low, high.
    """
    chosen = per_query[(per_query["metric"] == METRIC) & per_query["collection"].isin(collections)]
    rows = []
    for (training, system, mode), cells in chosen.groupby(["training", "system", "mode"], sort=False):
        values = {c: v["value"].to_numpy() for c, v in cells.groupby("collection", sort=False)}
        value, low, high = macro_interval(values, resamples, seed)
        rows.append((training, system, mode, value, low, high))
    return pd.DataFrame(rows, columns=["training", "system", "mode", "value", "low", "high"])


def comparison_name(system: str, training: str) -> str:
    """A system's name in comparisons: without the number of tokens it decodes, and fine-tuned if it is."""
    name = re.sub(r" \(N=\d+\)$", "", system)
    return name if training == "zero-shot" else f"{name}, {training}"


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

    The test is a sign-flipping randomisation test of the macro difference; p-values are corrected by Holm
    over the comparisons; the interval is a bootstrap over queries within each collection.
    Columns better, than, mode, queries, difference, low, high, p, p_corrected, reading.

    Raises
    ------
    ValueError
        When a system is missing, or two systems were evaluated on different queries.
    """
    chosen = per_query[(per_query["metric"] == METRIC) & per_query["collection"].isin(collections)]
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
        difference, low, high = macro_interval(values, resamples, seed)
        p = macro_randomization_p(values, resamples, seed)
        rows.append((better, than, mode, len(differences), difference, low, high, p))
    table = pd.DataFrame(rows, columns=["better", "than", "mode", "queries", "difference", "low", "high", "p"])
    table["p_corrected"] = holm(table["p"].to_numpy())
    above, clear = table["difference"] > 0, table["p_corrected"] < 0.05
    table["reading"] = np.select([clear & above, clear & ~above], ["better", "worse"], "no clear difference")
    return table
