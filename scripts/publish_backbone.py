"""Make the package's diffusion adapters of a finished run of notebook 00: weights, log and model cards.

    python scripts/publish_backbone.py WORK

WORK is the folder that the notebook's parameter `work` named with `long = True`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from diffret_lib.cache import write_text
from diffret_lib.config import PACKAGES
from diffret_lib.data.training_text import HELD_OUT_PACKAGES
from diffret_lib.models.backbones import adapter_path
from diffret_lib.training.adaptation import LOG, STAGES, adaptation_table, layers, read_curves
from diffret_lib.training.lora import export_adapter

TEXT, ANSWERS = "smollm2-135m-diffusion-text", "smollm2-135m-diffusion"

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
tags: [masked-diffusion, lora]
---

# {name}

{about} Attention looks both ways, and token i is predicted at position i - 1, as in Dream. Weights in bfloat16. Load it
with `diffret_lib.models.backbones.load_backbone("{name}")`.

This page is written by `python scripts/publish_backbone.py` from `{log}`.

## Data

Plain text: docstrings and descriptions of installed packages and of the wheels in `notebooks/adaptation-wheels.txt`,
the standard library's docstrings and the Python language reference, and the free manuals and dictionaries of Debian
that `scripts/fetch_adaptation_texts.sh` lists (`diffret_lib/data/training_text.py` reads them all). No package that is
a retrieval collection ({collections}) is read, and texts that share 13 words in a row with one of their docstrings, or
with a passage or query of SciFact, Cranfield, NPL or Medline, are dropped. {held_out} and the excerpts in
`diffret_lib/data/held_out_english.txt` are held out.

The stage `answers` adds the retrieval prompt with the answer of SmolLM2-135M-Instruct to it, for `answered_passages`
passages and a quarter as many queries out of the same texts. No relevance judgement is used anywhere.

## Recipe

{recipes}

## Held-out cross-entropy

Nats per masked token at the share of masked tokens, after the tokens seen.

{losses}

## Limits

135 M parameters: far from Dream or LLaDA. It was trained on English documentation and dictionaries, and is no text
generator. Notebook 00 measures what each stage adds to retrieval.
"""
ABOUT = {
    TEXT: "A LoRA adapter and a trained mask-token embedding (`<file_sep>`) that make a masked diffusion language "
    "model of SmolLM2-135M-Instruct. It has seen plain text alone, never the retrieval prompt.",
    ANSWERS: f"A LoRA adapter on top of `{TEXT}`, trained with the retrieval prompt and the parent's own answers to "
    "it.",
}


def publish(work: Path) -> None:
    """Write both adapters, their cards, and the log of the run beside the second."""
    folders = [work / stage.stage for stage in STAGES]
    curve = read_curves(folders)
    log = {
        "recipes": [json.loads((folder / "recipe.json").read_text(encoding="utf-8")) for folder in folders],
        "curve": curve,
    }
    table = adaptation_table(curve)
    losses = table.assign(masked=table["mask_ratio"].map("{:.0%}".format)).pivot(
        index=["tokens_seen", "stage"], columns=["text", "masked"], values="cross_entropy"
    )
    losses.columns = [", ".join(column) for column in losses.columns]
    for name, folder in zip((TEXT, ANSWERS), layers(STAGES, folders), strict=True):
        target = adapter_path(name)
        print(f"{target}: {export_adapter(folder / 'adapter', target) / 1e6:.1f} MB")
        card = CARD.format(
            name=name,
            about=ABOUT[name],
            log=f"training_log.json (of {ANSWERS})",
            collections=", ".join(PACKAGES),
            held_out=", ".join(HELD_OUT_PACKAGES),
            recipes=pd.DataFrame(log["recipes"], dtype=object).set_index("stage").T.to_markdown(disable_numparse=True),
            losses=losses.reset_index().to_markdown(index=False, floatfmt=".2f"),
        )
        write_text(target / "README.md", card)
    write_text(adapter_path(ANSWERS) / LOG, json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the run's stages")
    publish(parser.parse_args().work)
