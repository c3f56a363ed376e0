"""What bfloat16 changes in nDCG@10: every zero-shot system of a profile in both, on its sample of each test collection.

    python benchmarks/bfloat16.py [PROFILE]

How to read the table: ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from diffret_lib.cache import atomic_path
from diffret_lib.config import load_profile
from diffret_lib.environment import hardware
from diffret_lib.experiments.departures import dtype_table
from diffret_lib.experiments.study import Study


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", default="embedded", help="a name in notebooks/profiles, or a YAML file")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), help="folder of the CSV file")
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    study = Study(profile.model_copy(update={"dtype_sample": profile.sample}))
    table = dtype_table(study).drop(columns=["choice", "reference", "other", "ours"])
    print(table.round(4).to_string(index=False))
    found = hardware()
    table = table.assign(profile=profile.name, device=", ".join(found["gpu"]) or found["cpu"], torch=torch.__version__)
    with atomic_path(options.output / "bfloat16.csv") as path:
        table.to_csv(path, index=False, float_format="%.6g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
