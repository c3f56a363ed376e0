"""Denoising steps: what S forward passes a text change in effectiveness, and what they cost (notebook 01)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from diffret_lib.experiments.efficiency import interleaved, measured
from diffret_lib.experiments.study import Pair, Study, System, macro
from diffret_lib.models.prompts import SIDES
from diffret_lib.retrieval.denoising import MultiStepDiffRetriever
from diffret_lib.retrieval.metrics import METRIC

#: Numbers of steps S of the table.
STEPS = (1, 2, 4)
COLUMNS = ["steps", "k_query", "k_passage", "collection", "queries", "mode", "ndcg", "query_ms", "passage_ms"]


def denoising_table(study: Study, steps: Sequence[int] = STEPS) -> pd.DataFrame:
    """DiffRetriever multi (the selected pair) with S steps, on the profile's ``departures`` sample.

    Columns steps, k_query, k_passage, collection, queries, mode, ndcg (nDCG@10), query_ms and passage_ms (median
    milliseconds of encoding one text, tokenisation included).
    """
    collection = study.sampled(study.profile.train_collection, study.profile.departures)
    pair, frames = study.selected, []
    cost = measured(study, encoding_times, list(steps), list(pair)).set_index("steps")
    for s, retriever in _retrievers(study, steps, pair).items():
        values = study.evaluate(System("DiffRetriever multi", retriever), [collection])
        means = macro(values[values["metric"] == METRIC], ["mode"]).rename(columns={"value": "ndcg"})
        frames.append(means.assign(steps=s, **cost.loc[s]))
    about = {"k_query": pair[0], "k_passage": pair[1], "collection": collection.name}
    return pd.concat(frames, ignore_index=True).assign(**about, queries=len(collection.queries))[COLUMNS]


def in_words(table: pd.DataFrame) -> str:
    """A sentence or two on :func:`denoising_table`."""
    values = table.pivot(index="steps", columns="mode", values="ndcg")
    cost = table.drop_duplicates("steps").set_index("steps")["passage_ms"]
    more = values.loc[values.index > 1, "hybrid"].max() > values.loc[1, "hybrid"]
    said = "; ".join(f"{m} {', '.join(f'{v:.3f}' for v in values[m])}" for m in ("hybrid", "dense") if m in values)
    times = " and ".join(f"{ratio:.1f}" for ratio in cost[cost.index > 1] / cost[1])
    return (
        f"More steps {'help' if more else 'do not help'} here: {said} at S = {', '.join(map(str, values.index))} "
        f"({table['queries'].iloc[0]} training queries). A passage takes {times} times as long."
    )


def encoding_times(study: Study, steps: Sequence[int], pair: Pair) -> pd.DataFrame:
    """Median milliseconds of encoding one query and one passage with S steps: columns steps, query_ms, passage_ms."""
    collection = study.grid_collections[0]  # `measured` has it in the address
    texts = {"query": collection.queries[:1], "passage": collection.passages[:1]}
    calls = {
        (s, side): lambda r=retriever, side=side: r.encode(texts[side], side, progress=False)
        for s, retriever in _retrievers(study, steps, pair).items()
        for side in SIDES
    }
    times = interleaved(calls, study.profile.efficiency.rounds, study.backbone("diffusion").device, desc="timing")
    return pd.DataFrame(
        [{"steps": s, **{f"{side}_ms": 1000 * float(np.median(times[s, side])) for side in SIDES}} for s in steps]
    )


def _retrievers(study: Study, steps: Sequence[int], pair: Pair) -> dict[int, MultiStepDiffRetriever]:
    kind, masks = MultiStepDiffRetriever, {"k_query": pair[0], "k_passage": pair[1]}
    return {s: study.retriever(kind, **masks, steps=s) for s in steps}
