"""Stages of the adaptation, kept in the cache, and a table of the committed run.

Each of the three stages (:mod:`diffret_lib.training.masked_diffusion`) starts where the one before ended:
``documentation`` takes packed documentation text; ``answers`` mixes it half and half with the retrieval prompt and an
answer of the autoregressive parent, masked at random ratios, fully masked included; ``refinement`` takes the same
mixture of other documentation and answers to other texts, the learning rate raised once more.

The result is a PEFT adapter: LoRA on all linear layers and one trained embedding row for the mask token.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftModel

from diffret_lib.addresses import address, fingerprint
from diffret_lib.cache import atomic_path, fetch, file_sha256, remember, work_folder, write_text
from diffret_lib.config import PACKAGES
from diffret_lib.data.training_text import INSTALLED_PACKAGES, SHORT_PACKAGES, training_texts
from diffret_lib.environment import versions
from diffret_lib.models.backbones import LoadedBackbone, adapter_sha, make_bidirectional
from diffret_lib.training.lora import add_lora, load_adapter
from diffret_lib.training.masked_diffusion import (
    MaskedRows, Recipe, collect_answers, held_out_cross_entropy, pack, train,
)  # fmt: skip

DOCUMENTATION = Recipe(schedule_tokens=921_600)
ANSWERS = Recipe(
    stage="answers", tokens=307_200, learning_rate=5e-4, final_learning_rate=2e-5, warmup_steps=20, seed=1,
    answered_passages=480,
)  # fmt: skip
REFINEMENT = replace(ANSWERS, stage="refinement", tokens=409_600, learning_rate=7e-4, seed=2, answered_passages=640)
#: The stages of the committed adapter.
STAGES = (DOCUMENTATION, ANSWERS, REFINEMENT)
#: File beside an adapter with the record of the run that made it.
LOG = "training_log.json"
#: Name of the state before the first stage.
UNADAPTED = "parent, bidirectional attention"
#: Name of the stage of the package's adapter.
COMMITTED = "committed adapter"


@dataclass(frozen=True)
class Run:
    """A run: the parent with bidirectional attention and the adapter, its folder, tokens seen, and the whole curve."""

    backbone: LoadedBackbone
    adapter: Path
    tokens: int
    curve: list[dict[str, Any]]


def run_recipe(
    parent: LoadedBackbone, mask_id: int, held_out: np.ndarray, *, tokens: int | None = None,
    wheels: Path | None = None, work: Path | None = None,
) -> Run:  # fmt: skip
    """Run the adaptation: the first stage for ``tokens`` tokens on few packages, or (``None``) the whole recipe.

    ``parent`` is the autoregressive one, in bfloat16 (or float32, slower), ``mask_id`` the token that becomes the mask;
    ``held_out``, int64 [n, length], are rows for the held-out cross-entropy.  A folder of ``wheels`` is read besides
    what is installed; ``work`` gets every stage (``adapter``, ``curve.json``, ``recipe.json``) when it is finished.
    """
    if tokens is None:
        stages, evaluate_every, texts = STAGES, 100, read_texts(wheels)
    else:
        stages, evaluate_every = (replace(DOCUMENTATION, tokens=tokens, schedule_tokens=None, warmup_steps=4),), 0
        texts = read_texts(None, packages=SHORT_PACKAGES, standard_library=False)
    folders = adapt(parent, mask_id, texts, held_out, stages=stages, evaluate_every=evaluate_every, work=work)
    adapter = folders[-1] / "adapter"
    model = _start(parent, mask_id, stages[-1], adapter)
    identity = fingerprint("adapted", parent.fingerprint, mask_id, adapter_sha(adapter))
    backbone = replace(parent, model=model, mask_id=mask_id, fingerprint=identity)
    return Run(backbone, adapter, sum(s.steps * s.step_tokens for s in stages), read_curves(folders))


def read_texts(wheels: Path | None, **options: Any) -> list[str]:
    """:func:`~diffret_lib.data.training_text.training_texts`, from the cache while the same versions are installed."""
    read = versions((*options.get("packages", INSTALLED_PACKAGES), *PACKAGES))
    files = {path.name: file_sha256(path) for path in sorted(Path(wheels).glob("*.whl"))} if wheels else {}
    key = address([training_texts], options, read, files)
    return remember("training_texts", key, lambda: [text.text for text in training_texts(wheels, **options)])


def adapt(
    parent: LoadedBackbone, mask_id: int, texts: Sequence[str], held_out: np.ndarray, *,
    stages: Sequence[Recipe] = STAGES, evaluate_every: int = 100, work: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Train all stages that the cache does not hold; an interrupted one goes on from its last whole checkpoint.

    Of the shuffled ``texts`` documentation is taken from the front, texts to answer from the back, other ones for
    every stage; ``stages`` have the same sequence length.  Returns a folder for each stage, with ``adapter/``,
    ``curve.json`` and ``recipe.json``.

    Raises
    ------
    ValueError
        When the texts are too few for the recipes.
    """
    needed = sum(stage.documentation_rows for stage in stages)
    inputs = parent.weights, str(parent.dtype), mask_id, fingerprint(list(texts)), held_out.tolist(), evaluate_every
    folders: list[Path] = []
    for i, stage in enumerate(stages):
        key = address([adapt], [asdict(s) for s in stages[: i + 1]], *inputs)

        def make(folder: Path, earlier: Sequence[Recipe] = stages[:i], stage: Recipe = stage, key: str = key) -> None:
            rows = pack(texts, parent.tokenizer, stage.sequence_length, limit=needed)
            if len(rows) < needed:
                raise ValueError(
                    f"the training texts give {len(rows)} sequences of {stage.sequence_length} tokens, and the recipe "
                    f"needs {needed}: read more packages, or lower the recipe's tokens"
                )
            first, answers = sum(s.documentation_rows for s in earlier), []
            if stage.answered_passages:
                # a stage passes over some texts: two for each passage that it answers are more than it has seen
                left = texts[::-1][2 * sum(s.answered_passages for s in earlier) :]
                answers = collect_answers(parent.model, parent.tokenizer, left, stage.answered_passages, stage.seed)
            rows = rows[first : first + stage.documentation_rows]
            data = MaskedRows(rows, mask_id, batch_size=stage.batch_size, seed=stage.seed, answers=answers)
            model = _start(parent, mask_id, stage, folders[-1] / "adapter" if folders else None)
            adapter, curve = train(
                model, parent.weights, data, stage, work_folder("adaptation", key),
                pad_id=parent.tokenizer.pad_token_id, evaluate_every=evaluate_every,
                evaluate=lambda model: held_out_cross_entropy(model, held_out, mask_id),
            )  # fmt: skip
            shutil.copytree(adapter, folder / "adapter")
            write_text(folder / "curve.json", json.dumps(curve, indent=1) + "\n")
            write_text(folder / "recipe.json", json.dumps(asdict(stage), indent=1) + "\n")

        folders.append(fetch("adaptation", key, make))
        if work is not None:
            with atomic_path(Path(work) / stage.stage) as temporary:
                shutil.copytree(folders[-1], temporary)
    return folders


def _start(parent: LoadedBackbone, mask_id: int, stage: Recipe, adapter: Path | None) -> PeftModel:
    """The parent with bidirectional attention and an adapter: that of the stage before, or a new one."""
    model = add_lora(
        replace(parent, model=make_bidirectional(copy.deepcopy(parent.model))),
        rank=stage.rank, alpha=stage.alpha, seed=stage.seed, trainable_token_indices={"embed_tokens": [mask_id]},
    )  # fmt: skip
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def held_out_losses(backbone: LoadedBackbone, rows: np.ndarray) -> dict[str, float]:
    """:func:`~diffret_lib.training.masked_diffusion.held_out_cross_entropy` of a backbone, kept in the cache."""
    model, mask_id = backbone.model, backbone.mask_id
    key = address([held_out_cross_entropy], backbone.fingerprint, mask_id, rows.tolist())
    return remember("held_out", key, lambda: held_out_cross_entropy(model, rows, mask_id, progress=True))


def read_curves(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Records of the curves in folders of stages, in order."""
    return [r for folder in folders for r in json.loads((folder / "curve.json").read_text(encoding="utf-8"))]


def read_log(adapter: Path) -> dict[str, Any]:
    """The record of the run that made an adapter."""
    return json.loads((Path(adapter) / LOG).read_text(encoding="utf-8"))


def adaptation_table(log: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Held-out cross-entropy along the run: columns stage, tokens_seen, mask_ratio, cross_entropy.

    ``measured`` holds what was computed now, on the profile's held-out sequences: the first before the run, the
    others after it.  ``tokens_seen`` counts all stages up to the record.
    """
    curve = pd.DataFrame(log["curve"])
    ends = curve.groupby("stage", sort=False)["tokens_seen"].last().cumsum()
    curve["tokens_seen"] += curve["stage"].map(ends.shift(fill_value=0))
    records = curve.dropna(subset="held_out")[["stage", "tokens_seen", "held_out"]].to_numpy().tolist()
    (first, before), *after = measured.items()
    records = [(first, 0, before), *records, *((name, ends.iloc[-1], losses) for name, losses in after)]
    rows = [(stage, seen, float(ratio), loss) for stage, seen, losses in records for ratio, loss in losses.items()]
    return pd.DataFrame(rows, columns=["stage", "tokens_seen", "mask_ratio", "cross_entropy"])
