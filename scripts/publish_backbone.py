"""Make the package's diffusion adapter of a finished run of notebook 00: weights, log and model card.

    python scripts/publish_backbone.py WORK [--profile embedded]

WORK is the folder that the notebook's parameter `work` named with `long = True`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from diffret_lib.cache import write_text
from diffret_lib.config import PACKAGES, load_profile
from diffret_lib.data.training_text import HELD_OUT_PACKAGES, held_out_texts
from diffret_lib.experiments.comparison import logged_retrieval, stage_retrieval
from diffret_lib.experiments.study import Study
from diffret_lib.models.backbones import adapter_path, load_backbone
from diffret_lib.training.adaptation import COMMITTED, LOG, STAGES, UNADAPTED, held_out_losses, read_curves, read_log
from diffret_lib.training.lora import export_adapter
from diffret_lib.training.masked_diffusion import pack

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
tags: [masked-diffusion, lora]
---

# SmolLM2-135M-Diffusion

A LoRA adapter and a trained mask-token embedding (`<file_sep>`) that make a masked diffusion language model of
SmolLM2-135M-Instruct, as Dream was made of Qwen2.5: attention looks both ways, and token i is predicted at
position i - 1. Weights in bfloat16. Load it with
`diffret_lib.models.backbones.load_backbone("smollm2-135m-diffusion")`.

This page is written by `python scripts/publish_backbone.py` from `training_log.json`.

## Data

Documentation: docstrings and descriptions of installed packages (`diffret_lib/data/training_text.py`) and of the
wheels in `notebooks/adaptation-wheels.txt`, the standard library's docstrings, and the Python language reference. No
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
    measured = [record for record in log["curve"] if "held_out" in record]
    last = measured[-1]["step"] if measured else 0
    rows = [(UNADAPTED, 0, log["before"]), *((r["stage"], r["step"], r["held_out"]) for r in measured)]
    rows.append((COMMITTED, last, log["after"]))
    losses = [
        {"stage": stage, "step": step} | {f"{float(ratio):.0%}": loss for ratio, loss in values.items()}
        for stage, step, values in rows
    ]
    retrieval = pd.DataFrame(log["retrieval"]).astype({"K": "Int64"}).astype(object).fillna("")
    card = CARD.format(
        collections=", ".join(PACKAGES),
        held_out=", ".join(HELD_OUT_PACKAGES),
        recipes=pd.DataFrame(log["recipes"]).set_index("stage").T.to_markdown(),
        losses=pd.DataFrame(losses).to_markdown(index=False, floatfmt=".2f"),
        collection=log["collection_name"],
        retrieval=retrieval.to_markdown(index=False, floatfmt=".3f"),
    )
    write_text(Path(adapter) / "README.md", card)


def publish(work: Path, profile: str = "embedded") -> None:
    """Export the last stage's adapter and measure every stage in ``work``.

    Cross-entropy is measured on the held-out packages, retrieval on the profile's development collection.
    """
    study = Study(load_profile(profile))
    name = study.profile.backbones.diffusion
    target = adapter_path(name)
    known = read_log(target) if (target / LOG).exists() else {"retrieval": [], "collection": ""}
    folders = {stage.stage: work / stage.stage for stage in STAGES}
    size = export_adapter(folders[STAGES[-1].stage] / "adapter", target)
    print(f"{target}: {size / 1e6:.1f} MB")
    bare = load_backbone(name, adapter="none", dtype="bfloat16")
    texts, count = [t.text for t in held_out_texts()], study.profile.adaptation.held_out_sequences
    rows = pack(texts, bare.tokenizer, 256, limit=count)
    before, after = (held_out_losses(backbone, rows) for backbone in (bare, study.backbone("diffusion")))
    collection = study.development
    earlier = {stage: folder / "adapter" for stage, folder in list(folders.items())[:-1]}
    stages = {UNADAPTED: "none"} | {s: folder for s, folder in earlier.items() if folder.exists()} | {COMMITTED: None}
    measured = stage_retrieval(study, collection, stages)
    # a stage whose adapter is no longer there keeps what was measured when it was
    logged = logged_retrieval(known, collection, but=list(stages))
    order = ["", UNADAPTED, *earlier, COMMITTED]
    retrieval = pd.concat([measured, logged]).sort_values("stage", key=lambda s: s.map(order.index), kind="stable")
    log = {
        "recipes": [json.loads((folder / "recipe.json").read_text(encoding="utf-8")) for folder in folders.values()],
        "curve": read_curves(list(folders.values())),
        "retrieval": json.loads(retrieval.to_json(orient="records")),
        "before": before,
        "after": after,
        "collection": collection.fingerprint,
        "collection_name": f"{collection.name} ({collection.coverage})",
    }
    write_text(target / LOG, json.dumps(log, indent=1) + "\n")
    write_card(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the run's stages")
    parser.add_argument("--profile", default="embedded")
    arguments = parser.parse_args()
    publish(arguments.work, arguments.profile)
