"""Analyses of the grid of counts and of what the masks predict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from diffret_lib.cache import fingerprint, remembered
from diffret_lib.collection import Collection, bm25_ndcg, lexical_overlap
from diffret_lib.evaluation import holm, macro_interval, macro_randomization_p, per_query
from diffret_lib.prompts import ENGLISH_STOP_WORDS, Task, content_words
from diffret_lib.representations import Representations
from diffret_lib.retrievers import BM25, Retriever
from diffret_lib.study import METRIC, MODES, SELECTION_MODE, TASKS, Study

PAIR = ["k_query", "k_passage"]
READ_OUT_MODES = ("dense", "mean", "sparse", "hybrid")
#: Part of the addresses of collections' statistics in the cache.
STATISTICS_VERSION = 1


def collections_table(study: Study) -> pd.DataFrame:
    """The profile's collections, training first: sizes, what queries share with relevant passages, BM25's nDCG@10."""

    def statistics(c: Collection) -> dict[str, Any]:
        return c.statistics() | lexical_overlap(c) | {"bm25_ndcg@10": bm25_ndcg(c)}

    rows = []
    for c in [study.train_collection, *study.test_collections]:
        key = fingerprint(STATISTICS_VERSION, BM25().fingerprint("document"), c.fingerprint, c.coverage)
        rows.append(remembered("statistics", key, lambda c=c: statistics(c)) | {"collection": c.name})
    return pd.DataFrame(rows)


def heat_map(grid: pd.DataFrame, mode: str, metric: str = METRIC) -> pd.DataFrame:
    """Mean over collections of the mean metric; rows Kq, columns Kp."""
    cells = grid[(grid["mode"] == mode) & (grid["metric"] == metric)]
    means = cells.groupby([*PAIR, "collection"])["value"].mean()
    return means.groupby(PAIR).mean().unstack("k_passage")


def transfer(grid: pd.DataFrame, selected: tuple[int, int], mode: str = SELECTION_MODE) -> pd.DataFrame:
    """The pair selected on training data against each test collection's own best pair (claim 6).

    The own best pair is chosen and scored on the same queries, which favours it: the loss is an upper bound.

    Returns
    -------
    DataFrame
        Columns collection, coverage, queries, selected, best_pair, best, loss, single (the pair (1, 1)).
    """
    rows = []
    for collection, cells in _cells(grid, mode).groupby("collection", sort=False):
        means = cells.groupby(PAIR)["value"].mean()
        best = means.idxmax()
        rows.append(
            {
                "collection": collection,
                "coverage": cells["coverage"].iloc[0],
                "queries": cells["query_id"].nunique(),
                "selected": means[selected],
                "best_pair": f"({best[0]}, {best[1]})",
                "best": means[best],
                "loss": means[best] - means[selected],
                "single": means[1, 1],
            }
        )
    return pd.DataFrame(rows)


def per_query_best(grid: pd.DataFrame, mode: str = SELECTION_MODE) -> pd.DataFrame:
    """Each query's best pair; of pairs that tie, the one with the fewest vectors, then the smallest Kq.

    Returns
    -------
    DataFrame
        Columns collection, query_id, k_query, k_passage, value, ties (pairs that share the best value) and
        worst (the value of the worst pair).
    """
    cells = _cells(grid, mode).assign(cost=lambda d: d["k_query"] * d["k_passage"])
    ordered = cells.sort_values(
        ["collection", "query_id", "value", "cost", "k_query"], ascending=[True, True, False, True, True], kind="stable"
    )
    groups = ordered.groupby(["collection", "query_id"], sort=False)
    best = groups.first()[["k_query", "k_passage", "value"]]
    best["ties"] = groups["value"].agg(lambda v: int(np.isclose(v, v.max()).sum()))
    best["worst"] = groups["value"].min()
    return best.reset_index()


def _cells(grid: pd.DataFrame, mode: str) -> pd.DataFrame:
    return grid[(grid["mode"] == mode) & (grid["metric"] == METRIC)]


def predicted_tokens(retriever: Retriever, texts: Sequence[str], task: Task = "document") -> list[list[str]]:
    """The greedy token at each position that the retriever reads, up to the first special token; kept in the cache."""
    key = fingerprint(retriever.fingerprint(task), list(texts))
    return remembered("predictions", key, lambda: _predicted_tokens(retriever, texts, task))


def _predicted_tokens(retriever: Retriever, texts: Sequence[str], task: Task) -> list[list[str]]:
    reader, rows = retriever.reader, []
    for start in tqdm(range(0, len(texts), 16), desc=f"{retriever.name}: predictions", disable=len(texts) <= 16):
        with torch.inference_mode():
            out = reader(retriever.features(list(texts[start : start + 16]), task))
        for ids, valid in zip(out["predicted_ids"], out["attention_mask"].bool(), strict=True):
            rows.append([reader.tokenizer.decode([i]) for i in ids[valid].tolist()])
    return rows


def share_of_content(tokens: Sequence[str], text: str) -> dict[str, float]:
    """How many predicted tokens are (beginnings of) content words, and of content words of this text.

    Returns
    -------
    dict
        ``content``: share of the tokens that are letters and no stop word; ``in_text``: share of the tokens
        that begin a content word of the text.
    """
    words = content_words(text)
    cleaned = [t.strip().lower() for t in tokens]
    content = [t for t in cleaned if len(t) > 1 and t.isalnum() and t not in ENGLISH_STOP_WORDS]
    inside = [t for t in content if any(w.startswith(t) for w in words)]
    n = max(1, len(cleaned))
    return {"content": len(content) / n, "in_text": len(inside) / n}


def mask_words_table(study: Study, texts: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What one mask and four masks predict for passages, beside the parent's next token and its answer.

    Returns
    -------
    words : DataFrame
        One row a passage.
    shares : DataFrame
        For each reading the mean of :func:`share_of_content`.
    """
    readings = {
        "one mask": study.diffretriever(1, 1),
        "four masks": study.diffretriever(4, 4),
        "parent, next token": study.promptreps(0),
        "parent, decoded": study.promptreps(4),
    }
    tokens = {name: predicted_tokens(retriever, texts) for name, retriever in readings.items()}
    words = pd.DataFrame({"passage": [text[:60].replace("\n", " ") + " ..." for text in texts]})
    shares = []
    for name, rows in tokens.items():
        words[name] = [" ".join(t.strip() or "␣" for t in row) for row in rows]
        measured = pd.DataFrame([share_of_content(r, t) for r, t in zip(rows, texts, strict=True)]).mean()
        shares.append({"reading": name, **measured})
    return words, pd.DataFrame(shares)


def reading_table(study: Study, texts: Sequence[str], task: Task) -> pd.DataFrame:
    """Tokens that DiffRetriever (K = 1, 4) and PromptReps (single, multi) read, one row a text."""
    n = study.profile.promptreps_max_tokens
    columns = {
        "DiffRetriever K=1": study.diffretriever(1, 1),
        "DiffRetriever K=4": study.diffretriever(4, 4),
        "PromptReps single": study.promptreps(0),
        f"PromptReps multi (N={n})": study.promptreps(n),
    }
    table = pd.DataFrame({"text": [t[:70].replace("\n", " ") for t in texts]})
    for name, retriever in columns.items():
        table[name] = ["·".join(t.strip() or "␣" for t in row) for row in predicted_tokens(retriever, texts, task)]
    return table


def read_out_table(study: Study, counts: Sequence[int] = (1, 4)) -> pd.DataFrame:
    """nDCG@10 on the development collection, reading token i at position i - 1 (shifted) or at i.

    Returns
    -------
    DataFrame
        Columns read_out, K, dense, mean (dot product of the mean vectors), sparse, hybrid.
    """
    collection = study.development
    rows = []
    for k in counts:
        for shifted in (True, False):
            retriever = study.diffretriever(k, k, shifted=shifted)
            key = study.address([retriever], collection, METRIC, READ_OUT_MODES)
            values = remembered("read_out", key, lambda retriever=retriever: _read_out(study, retriever, collection))
            rows.append({"read_out": "i - 1 (shifted)" if shifted else "i (not shifted)", "K": k} | values)
    return pd.DataFrame(rows)


def _read_out(study: Study, retriever: Retriever, collection: Collection) -> dict[str, float]:
    sides = [study.encode(retriever, collection, task) for task in TASKS]
    runs = {mode: study.run(*sides, collection, mode) for mode in READ_OUT_MODES}
    return {mode: float(per_query(collection.qrels, run, (METRIC,))[METRIC].mean()) for mode, run in runs.items()}


def mean_self_similarity(representations: Representations) -> float:
    """Mean cosine between the vectors of one text, over texts with two vectors or more."""
    means = []
    for vectors, n in zip(representations.dense, representations.lengths, strict=True):
        if n > 1:
            gram = vectors[:n] @ vectors[:n].T
            means.append((gram.sum() - n) / (n * (n - 1)))
    return float(np.mean(means)) if means else float("nan")


def grid_table(grid: pd.DataFrame) -> pd.DataFrame:
    """Means over queries: columns collection, coverage, mode, k_query, k_passage, metric, value."""
    keys = ["collection", "coverage", "mode", *PAIR, "metric"]
    return grid.groupby(keys, sort=False)["value"].mean().reset_index()


def evaluation_table(per_query: pd.DataFrame) -> pd.DataFrame:
    """Means over queries: columns training, system, family, mode, k_query, k_passage, collection, metric, value, coverage."""
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
    per_query: pd.DataFrame, collections: Sequence[str], resamples: int, seed: int, metric: str = METRIC
) -> pd.DataFrame:
    """Macro averages with bootstrap intervals (queries resampled within each collection)."""
    chosen = per_query[(per_query["metric"] == metric) & per_query["collection"].isin(collections)]
    rows = []
    for (training, system, mode), cells in chosen.groupby(["training", "system", "mode"], sort=False):
        values = {c: v["value"].to_numpy() for c, v in cells.groupby("collection", sort=False)}
        value, low, high = macro_interval(values, resamples, seed)
        rows.append({"training": training, "system": system, "mode": mode, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


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
    per_query: pd.DataFrame,
    comparisons: Sequence[tuple[str, str, str]],
    collections: Sequence[str],
    *,
    resamples: int,
    seed: int,
    metric: str = METRIC,
) -> pd.DataFrame:
    """Paired differences over the queries of several collections, macro-averaged; systems by :func:`comparison_name`.

    The test is a sign-flipping randomisation test of the macro difference; p-values are corrected by Holm
    over the comparisons; the interval is a bootstrap over queries within each collection.

    Returns
    -------
    DataFrame
        Columns better, than, mode, queries, difference, low, high, p, p_corrected, reading.
    """
    chosen = per_query[(per_query["metric"] == metric) & per_query["collection"].isin(collections)]
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
        rows.append({"better": better, "than": than, "mode": mode, "queries": len(differences),
                     "difference": difference, "low": low, "high": high, "p": p})  # fmt: skip
    table = pd.DataFrame(rows)
    table["p_corrected"] = holm(table["p"].to_numpy())
    above, clear = table["difference"] > 0, table["p_corrected"] < 0.05
    table["reading"] = np.select([clear & above, clear & ~above], ["better", "worse"], "no clear difference")
    return table
