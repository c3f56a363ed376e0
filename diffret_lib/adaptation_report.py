"""Tables on the adaptation: the committed run's log, a run made on the spot, retrieval at each stage."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from diffret_lib.adaptation import (
    DOCUMENTATION,
    STAGES,
    Recipe,
    adapt,
    export_adapter,
    held_out_cross_entropy,
    pack,
    read_curves,
)
from diffret_lib.backbones import adapter_path, load_backbone
from diffret_lib.cache import atomic_path, cache_dir, file_sha256, fingerprint, remembered
from diffret_lib.collection import Collection
from diffret_lib.profiles import load_profile
from diffret_lib.retrievers import BM25, DiffRetriever, PromptReps
from diffret_lib.study import METRIC, Study, System
from diffret_lib.training_text import COLLECTION_PACKAGES, HELD_OUT_PACKAGES, held_out_texts

#: File beside an adapter with the record of the run that made it.
LOG = "training_log.json"
#: What the state before the first stage is called.
UNADAPTED = "parent, attention both ways"
#: What the stage of the package's adapter is called.
COMMITTED = "committed adapter"
#: Counts for which retrieval is compared between stages.
STAGE_COUNTS = (1, 4)
#: Tokens of a text that are read in it, whatever the profile, so that what the log holds compares.
STAGE_LIMITS = {"max_query_tokens": 64, "max_passage_tokens": 96}


@dataclass(frozen=True)
class Run:
    """A run of the recipe: the model, the folder of its adapter, tokens seen and its curve."""

    model: PeftModel
    adapter: Path
    tokens: int
    curve: list[dict[str, Any]]

    @property
    def fingerprint(self) -> str:
        """Identifies the trained model."""
        return fingerprint("adapted", file_sha256(self.adapter / "adapter_model.safetensors"))


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
    stages: tuple[Recipe, ...] = STAGES
    if tokens is not None:
        stages = (replace(DOCUMENTATION, tokens=tokens, schedule_tokens=None, warmup_steps=4),)
    if work is None:
        work = cache_dir() / "adaptation" / fingerprint(parent, [repr(r) for r in stages])[:16]
    model = adapt(
        lambda: load_backbone(parent, dtype="bfloat16").model,
        tokenizer, mask_id, texts, Path(work), held_out=held_out, stages=stages,
        evaluate_every=100 if tokens is None else 0,
    )  # fmt: skip
    seen = sum(r.steps * r.batch_size * r.sequence_length for r in stages)
    return Run(model, Path(work) / stages[-1].stage / "adapter", seen, read_curves(Path(work)))


def held_out_losses(model: Any, rows: np.ndarray, mask_id: int, identity: str) -> dict[str, float]:
    """:func:`~diffret_lib.adaptation.held_out_cross_entropy`, kept in the cache.

    Parameters
    ----------
    identity : str
        A fingerprint of the model.
    """
    key = fingerprint(identity, mask_id, rows.tolist())
    return remembered("held_out", key, lambda: held_out_cross_entropy(model, rows, mask_id, progress=True))


def write_log(work: Path, adapter: Path, retrieval: pd.DataFrame, **more: Any) -> None:
    """Write :data:`LOG` beside an adapter: recipes, curves, and retrieval at each stage."""
    log = {
        "recipes": [json.loads((Path(work) / s.stage / "recipe.json").read_text()) for s in STAGES],
        "curve": read_curves(work),
        "retrieval": json.loads(retrieval.to_json(orient="records")),
        **more,
    }
    with atomic_path(Path(adapter) / LOG) as temporary:
        Path(temporary).write_text(json.dumps(log, indent=1) + "\n")


CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
tags: [masked-diffusion, lora]
---

# SmolLM2-135M-Diffusion

A LoRA adapter and a trained mask-token embedding (`<file_sep>`) that make a masked diffusion language model of
SmolLM2-135M-Instruct, as Dream was made of Qwen2.5: attention looks both ways, and token i is predicted at
position i - 1. Weights in bfloat16. Load it with `diffret_lib.backbones.load_backbone("smollm2-135m-diffusion")`.

This page is written by `python -m diffret_lib.adaptation_report` from `training_log.json`.

## Data

Documentation: docstrings and descriptions of installed packages (`diffret_lib/training_text.py`) and of the wheels
in `notebooks/adaptation-wheels.txt`, the standard library's docstrings, and the Python language reference. No
package that is a retrieval collection ({collections}) is read, texts that share 13 words in a row with one of their
docstrings are dropped, and {held_out} are held out.

The later stages add the retrieval prompt with the answer of SmolLM2-135M-Instruct to it, for `answered_passages`
passages and a quarter as many queries out of the same documentation. No relevance judgement is used anywhere.

## Recipe

{recipes}

## Held-out cross-entropy

Nats per masked token at the share of masked tokens, on docstrings of the held-out packages.

{losses}

## Zero-shot retrieval at each stage

nDCG@10 on {collection}.

{retrieval}

## Limits

135 M parameters and some hours of CPU training: far from Dream or LLaDA. It knows Python documentation in
English; it was not tried on anything else, and it is no text generator.
"""


def write_card(adapter: Path) -> None:
    """Write the model card beside an adapter, from its log."""
    log = read_log(adapter)
    recipes = pd.DataFrame(log["recipes"])
    held_out = [
        {"stage": r["stage"], "step": r["step"]} | {f"{float(k):.0%}": v for k, v in r["held_out"].items()}
        for r in log["curve"]
        if "held_out" in r
    ]
    first = {"stage": UNADAPTED, "step": 0}
    first |= {f"{float(k):.0%}": v for k, v in log["before"].items()}
    last = {"stage": COMMITTED, "step": held_out[-1]["step"] if held_out else 0}
    last |= {f"{float(k):.0%}": v for k, v in log["after"].items()}
    card = CARD.format(
        collections=", ".join(COLLECTION_PACKAGES),
        held_out=", ".join(HELD_OUT_PACKAGES),
        recipes=recipes.set_index("stage").T.to_markdown(),
        losses=pd.DataFrame([first, *held_out, last]).to_markdown(index=False, floatfmt=".2f"),
        collection=log["collection_name"],
        retrieval=pd.DataFrame(log["retrieval"]).astype({"K": "Int64"}).astype(object).fillna("").to_markdown(
            index=False, floatfmt=".3f"
        ),
    )
    with atomic_path(Path(adapter) / "README.md") as temporary:
        Path(temporary).write_text(card)


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
        values = study.evaluate(System(system, retriever.family or "lexical", retriever, k, k), [collection])
        means = values[values["metric"] == METRIC].groupby("mode")["value"].mean()
        return {"stage": stage, "system": system, "K": k} | means.to_dict()

    limits = study.limits | STAGE_LIMITS
    rows = [
        row("", "BM25", None, BM25()),
        row("", "PromptReps (parent)", 1, PromptReps(study.backbone("autoregressive"), **limits)),
    ]
    for stage, adapter in adapters.items():
        backbone = (
            study.backbone("diffusion")
            if adapter is None
            else load_backbone(study.profile.backbones.diffusion, adapter=adapter, dtype=study.profile.dtype)
        )
        for k in STAGE_COUNTS:
            retriever = DiffRetriever(backbone, k_query=k, k_passage=k, **limits)
            rows.append(row(stage, "DiffRetriever", k, retriever))
        del backbone
    table = pd.DataFrame(rows)
    table["K"] = table["K"].astype("Int64")
    return table[["stage", "system", "K", "dense", "sparse", "hybrid"]]


def logged_retrieval(log: Mapping[str, Any], collection: Collection, but: Sequence[str] = ()) -> pd.DataFrame:
    """The log's rows of :func:`stage_retrieval` for other stages than ``but``.

    Empty when they were measured on another sample than ``collection``.
    """
    columns = ["stage", "system", "K", "dense", "sparse", "hybrid"]
    table = pd.DataFrame(log["retrieval"], columns=columns).astype({"K": "Int64"})
    return table[~table["stage"].isin(["", *but]) & (log["collection"] == collection.fingerprint)]


def publish(work: Path, profile: str = "embedded") -> None:
    """Make the package's adapter of a finished long run: weights, log and model card.

    Cross-entropy and retrieval are measured for every stage in ``work``, on the held-out packages and on the
    profile's development collection.
    """
    study = Study(load_profile(profile))
    name = study.profile.backbones.diffusion
    target = adapter_path(name)
    known = read_log(target) if (target / LOG).exists() else {"retrieval": [], "collection": ""}
    size = export_adapter(Path(work) / STAGES[-1].stage / "adapter", target, study.profile.backbones.autoregressive)
    print(f"{target}: {size / 1e6:.1f} MB")
    backbone = load_backbone(name, adapter="none", dtype="bfloat16")
    rows = pack(
        [t.text for t in held_out_texts()], backbone.tokenizer, 256, limit=study.profile.adaptation.held_out_sequences
    )
    adapted = study.backbone("diffusion")
    before = held_out_losses(backbone.model, rows, backbone.mask_id, backbone.fingerprint)
    after = held_out_losses(adapted.model, rows, backbone.mask_id, adapted.fingerprint)
    collection = study.development
    folders = {s.stage: Path(work) / s.stage / "adapter" for s in STAGES[:-1]}
    stages = {UNADAPTED: "none"}
    stages |= {name: folder for name, folder in folders.items() if folder.exists()} | {COMMITTED: None}
    measured = stage_retrieval(study, collection, stages)
    # a stage whose adapter is no longer there keeps what was measured when it was
    earlier = logged_retrieval(known, collection, but=list(stages))
    order = ["", UNADAPTED, *folders, COMMITTED]
    retrieval = pd.concat([measured, earlier]).sort_values("stage", key=lambda s: s.map(order.index), kind="stable")
    write_log(
        work, target, retrieval,
        before=before, after=after, collection=collection.fingerprint,
        collection_name=f"{collection.name} ({collection.coverage})",
    )  # fmt: skip
    write_card(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=publish.__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the run: the `work` of notebook 00 with long = True")
    parser.add_argument("--profile", default="embedded")
    arguments = parser.parse_args()
    publish(arguments.work, arguments.profile)
