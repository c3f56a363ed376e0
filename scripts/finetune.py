"""Train the fine-tuned systems of a profile and publish each adapter as soon as it is done.

    python scripts/finetune.py PROFILE --out FOLDER [--systems "DiffEmbed" "RepLLaMA"] [--seeds N]

FOLDER gets a folder for each system (and for each further seed): weights in bfloat16, `curve.jsonl`, `recipe.json` and
a card. Named as `training.adapters` in a profile, it stands in for training there: one machine trains what another
evaluates. A run that was interrupted goes on where it was.

On several GPUs every step's queries are shared out among them, and each query meets the passages of all:

    accelerate launch --config_file scripts/accelerate/ddp.yml scripts/finetune.py PROFILE --out FOLDER
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sentence_transformers.util.distributed import get_rank

from diffret_lib.config import load_profile
from diffret_lib.experiments.study import SYSTEMS, Study
from diffret_lib.training.contrastive import publish_adapter


def train(profile: str, out: Path, systems: list[str] | None = None, seeds: int | None = None) -> list[Path]:
    """Train and publish; repetition 0 of every system comes first. Returns the folders.

    By default the systems are those that the profile fine-tunes, or all where it fine-tunes none.
    """
    loaded = load_profile(profile)
    training = loaded.training.model_copy(update={"adapters": None} | ({"seeds": seeds} if seeds else {}))
    study, folders = Study(loaded.model_copy(update={"training": training})), []
    systems = systems or study.fine_tuned or list(SYSTEMS)
    runs = [(r, s) for r in range(training.seeds) for s in systems if r < study.repetitions(s)]
    for repetition, system in runs:
        trained = study.finetune(system, repetition)
        if get_rank():
            continue
        folders.append(publish_adapter(trained, out))
        rate, before, kept = trained.about["recipe"]["learning_rate"], trained.curve[0]["dev_ndcg"], trained.kept
        said = f"nDCG@10 on development {before:.3f} -> {kept['dev_ndcg']:.3f}"
        print(f"{folders[-1]}: learning rate {rate:g}, step {kept['step']}, {said}", flush=True)
    return folders


def join() -> None:
    """Join the processes that accelerate started, if it did; each one has a GPU of its own where there are any."""
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", help="a name in notebooks/profiles, or the path of a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help="by default the profile's")
    parser.add_argument("--seeds", type=int, help="repetitions of the repeated systems, by default the profile's")
    given = parser.parse_args()
    join()
    train(given.profile, given.out, given.systems, given.seeds)
