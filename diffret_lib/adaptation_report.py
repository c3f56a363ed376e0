"""Tables on the adaptation: the committed run's log, a run made on the spot, retrieval at each stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from diffret_lib.adaptation import ANSWERS, DOCUMENTATION, Recipe, adapt, read_curves
from diffret_lib.backbones import load_backbone
from diffret_lib.cache import atomic_path, cache_dir, fingerprint
from diffret_lib.collection import Collection
from diffret_lib.evaluation import per_query
from diffret_lib.retrievers import BM25, DiffRetriever, PromptReps
from diffret_lib.study import METRIC, Study

#: File beside an adapter with the record of the run that made it.
LOG = "training_log.json"
#: Counts for which retrieval is compared between stages.
STAGE_COUNTS = (1, 4)


@dataclass(frozen=True)
class Run:
    """A run of the recipe: the model, the folder of its adapter, tokens seen and its curve."""

    model: PeftModel
    adapter: Path
    tokens: int
    curve: list[dict[str, Any]]


def run_recipe(
    parent: str,
    tokenizer: PreTrainedTokenizerBase,
    mask_id: int,
    held_out: np.ndarray,
    *,
    texts: Callable[[], Sequence[str]],
    tokens: int | None = None,
    work: Path | None = None,
) -> Run:
    """Run the adaptation: the first stage for ``tokens`` tokens, or (``None``) the whole recipe.

    Checkpoints go to ``work``, or to the cache folder under a name that the settings make; a run that is
    finished there is loaded.
    """
    if tokens is None:
        recipes: tuple[Recipe, Recipe | None] = (DOCUMENTATION, ANSWERS)
    else:
        recipes = (replace(DOCUMENTATION, tokens=tokens, schedule_tokens=None, warmup_steps=4), None)
    if work is None:
        work = cache_dir() / "adaptation" / fingerprint(parent, [repr(r) for r in recipes])[:16]
    model = adapt(
        lambda: load_backbone(parent, dtype="bfloat16").model,
        tokenizer, mask_id, texts, Path(work), held_out=held_out, documentation=recipes[0], answers=recipes[1],
        evaluate_every=100 if tokens is None else max(1, recipes[0].steps // 2),
    )  # fmt: skip
    last = recipes[1] or recipes[0]
    seen = sum(r.steps * r.batch_size * r.sequence_length for r in recipes if r is not None)
    return Run(model, Path(work) / last.stage / "adapter", seen, read_curves(Path(work)))


def write_log(work: Path, adapter: Path, retrieval: pd.DataFrame, **more: Any) -> None:
    """Write :data:`LOG` beside an adapter: recipes, curves, and retrieval at each stage."""
    stages = (DOCUMENTATION.stage, ANSWERS.stage)
    log = {
        "recipes": [json.loads((Path(work) / s / "recipe.json").read_text()) for s in stages],
        "curve": read_curves(work),
        "retrieval": retrieval.to_dict("records"),
        **more,
    }
    with atomic_path(Path(adapter) / LOG) as temporary:
        Path(temporary).write_text(json.dumps(log, indent=1) + "\n")


def read_log(adapter: Path) -> dict[str, Any]:
    """The record of the run that made an adapter."""
    return json.loads((Path(adapter) / LOG).read_text())


def adaptation_table(log: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Held-out cross-entropy along the run: columns stage, tokens_seen, mask_ratio, cross_entropy.

    ``measured`` holds what was computed now, on the profile's held-out sequences; ``tokens_seen`` counts all
    stages up to the record.
    """
    rows, offset, previous = [], 0, None
    total = 0
    for record in log["curve"]:
        if previous is not None and record["stage"] != previous["stage"]:
            offset += previous["tokens_seen"]
        previous = record
        total = offset + record["tokens_seen"]
        for ratio, loss in record.get("held_out", {}).items():
            rows.append((record["stage"], total, float(ratio), loss))
    before, *after = [
        [(stage, 0 if i == 0 else total, float(r), loss) for r, loss in losses.items()]
        for i, (stage, losses) in enumerate(measured.items())
    ]
    return pd.DataFrame(
        [*before, *rows, *(row for part in after for row in part)],
        columns=["stage", "tokens_seen", "mask_ratio", "cross_entropy"],
    )


def stage_retrieval(study: Study, collection: Collection, adapters: Mapping[str, str | Path | None]) -> pd.DataFrame:
    """Zero-shot nDCG@10 with each adapter, for K = 1 and K = 4, with the parent's PromptReps and BM25.

    Parameters
    ----------
    adapters : mapping
        Name of the stage to an adapter folder, ``"none"``, or None for the committed adapter.

    Returns
    -------
    DataFrame
        Columns stage, system, K, and one for each mode.
    """

    def row(stage: str, system: str, k: int | None, retriever: Any) -> dict[str, Any]:
        qrels = collection.ranx_qrels()
        runs = study.runs(retriever, collection)
        return {"stage": stage, "system": system, "K": k} | {
            mode: float(np.mean(per_query(qrels, run, (METRIC,))[METRIC])) for mode, run in runs.items()
        }

    rows = [
        row("", "BM25", None, BM25()),
        row("", "PromptReps (parent)", 1, PromptReps(study.backbone("autoregressive"), **study.limits)),
    ]
    for stage, adapter in adapters.items():
        backbone = (
            study.backbone("diffusion")
            if adapter is None
            else load_backbone(study.profile.backbones.diffusion, adapter=adapter, dtype=study.profile.dtype)
        )
        for k in STAGE_COUNTS:
            retriever = DiffRetriever(backbone, k_query=k, k_passage=k, **study.limits)
            rows.append(row(stage, "DiffRetriever", k, retriever))
        del backbone
    table = pd.DataFrame(rows)
    table["K"] = table["K"].astype("Int64")
    return table[["stage", "system", "K", "dense", "sparse", "hybrid"]]


def logged_retrieval(log: Mapping[str, Any], collection: Collection) -> pd.DataFrame:
    """Rows of the log that were measured on this very collection (same fingerprint), DiffRetriever's alone."""
    if log.get("collection") != collection.fingerprint:
        return pd.DataFrame(columns=["stage", "system", "K", "dense", "sparse", "hybrid"])
    return pd.DataFrame(log["retrieval"]).astype({"K": "Int64"})
