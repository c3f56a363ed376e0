"""The stages of the adaptation, each kept in the cache, and a table of the committed run.

``text`` trains on packed plain text (:mod:`diffret_lib.data.training_text`), and ``annealing`` goes on with it while
the learning rate falls: a masked diffusion LM that has never seen the retrieval prompt.  ``answers`` trains a second
adapter on top: half of its sequences are plain text, half the retrieval prompt with an answer of the autoregressive
parent, masked at random ratios, fully masked included.

An adapter is LoRA on all linear layers and one trained embedding row for the mask token, in bfloat16.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diffret_lib.addresses import address, fingerprint
from diffret_lib.cache import atomic_path, fetch, file_sha256, remember, work_folder, write_text
from diffret_lib.config import PACKAGES
from diffret_lib.data.training_text import (
    HELD_OUT_PACKAGES,
    INSTALLED_PACKAGES,
    SHORT_PACKAGES,
    held_out_english,
    held_out_texts,
    training_texts,
)  # fmt: skip
from diffret_lib.environment import versions
from diffret_lib.models.backbones import LoadedBackbone, make_bidirectional, uncompiled, with_adapter
from diffret_lib.training.lora import add_lora, export_adapter, load_adapter
from diffret_lib.training.masked_diffusion import (
    MaskedRows,
    Recipe,
    collect_answers,
    held_out_cross_entropy,
    pack,
    train,
)  # fmt: skip

TEXT = Recipe("text", tokens=16_384_000, schedule_tokens=33_554_432, rank=48, alpha=96)
ANNEALING = Recipe(
    "annealing", tokens=524_288, continues=True, batch_size=8, rank=48, alpha=96, learning_rate=3e-4,
    final_learning_rate=1e-5, warmup_steps=10, seed=1,
)  # fmt: skip
ANSWERS = Recipe(
    "answers", tokens=409_600, batch_size=8, learning_rate=5e-4, final_learning_rate=2e-5, warmup_steps=20, seed=2,
    answered_passages=600,
)  # fmt: skip
#: The stages of the committed adapters.
STAGES = (TEXT, ANNEALING, ANSWERS)
#: File beside an adapter with the record of the run that made it.
LOG = "training_log.json"
#: Name of the state before the first stage.
UNADAPTED = "parent, bidirectional attention"
#: Tokens of a held-out sequence.
HELD_OUT_LENGTH = 256


@dataclass(frozen=True)
class Run:
    """A run: the adapted backbone, tokens seen, and the whole curve."""

    backbone: LoadedBackbone
    tokens: int
    curve: list[dict[str, Any]]


def held_out_rows(tokenizer: Any, limit: int) -> dict[str, np.ndarray]:
    """Sequences for the held-out cross-entropy, of documentation and of plain English; int64 [limit, 256] each."""
    texts = {"documentation": [t.text for t in held_out_texts(HELD_OUT_PACKAGES)], "English": [held_out_english()]}
    return {kind: pack(group, tokenizer, HELD_OUT_LENGTH, limit=limit) for kind, group in texts.items()}


def run_recipe(
    parent: LoadedBackbone, mask_id: int, held_out: Mapping[str, np.ndarray], *, tokens: int | None = None,
    packages: Path | None = None, clear_of: Sequence[str] = (), work: Path | None = None,
) -> Run:  # fmt: skip
    """Run the adaptation: the first stage for ``tokens`` tokens on few packages, or (``None``) the whole recipe.

    ``parent`` is the autoregressive one, whose dtype is that of the products, ``mask_id`` the token that becomes the
    mask, ``held_out`` of :func:`held_out_rows`.  A folder of ``packages`` (wheels and Debian's) is read besides what is
    installed, and no text shares 13 words in a row with one of ``clear_of``; ``work`` gets every stage (``adapter``,
    ``curve.json``, ``recipe.json``) when it is finished.
    """
    if tokens is None:
        stages, evaluate_every, texts = STAGES, 200, read_texts(packages, clear_of=list(clear_of))
    else:
        stages, evaluate_every = (replace(TEXT, tokens=tokens, schedule_tokens=None, batch_size=4, warmup_steps=4),), 0
        texts = read_texts(None, packages=SHORT_PACKAGES, standard_library=False)
    folders = adapt(parent, mask_id, texts, held_out, stages=stages, evaluate_every=evaluate_every, work=work)
    backbone = _staged(parent, mask_id, layers(stages, folders))
    return Run(backbone, sum(s.steps * s.step_tokens for s in stages), read_curves(folders))


def read_texts(folder: Path | None, **options: Any) -> list[str]:
    """:func:`~diffret_lib.data.training_text.training_texts`, from the cache while the same versions are installed."""
    read = versions((*options.get("packages", INSTALLED_PACKAGES), *PACKAGES))
    files = {p.name: file_sha256(p) for p in sorted(Path(folder).iterdir())} if folder else {}
    key = address([training_texts], options, read, files)
    return remember("training_texts", key, lambda: [text.text for text in training_texts(folder, **options)])


def adapt(
    parent: LoadedBackbone, mask_id: int, texts: Sequence[str], held_out: Mapping[str, np.ndarray], *,
    stages: Sequence[Recipe] = STAGES, evaluate_every: int = 200, work: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Train all stages that the cache does not hold; an interrupted one goes on from its last whole checkpoint.

    Of the shuffled ``texts`` plain text is taken from the front, from the start again when all is read, and texts to
    answer from the back; ``stages`` have the same sequence length.  Returns a folder for each stage, with ``adapter/``,
    ``curve.json`` and ``recipe.json``.

    Raises
    ------
    ValueError
        When the texts give no sequence.
    """
    needed, length = sum(stage.text_rows for stage in stages), stages[0].sequence_length
    rows_of = {kind: rows.tolist() for kind, rows in held_out.items()}
    machine, bfloat16 = (str(parent.dtype), parent.device.type), parent.dtype == torch.bfloat16
    inputs = parent.weights, *machine, mask_id, fingerprint(list(texts)), rows_of, evaluate_every
    folders: list[Path] = []
    for i, stage in enumerate(stages):
        key = address([adapt], [asdict(s) for s in stages[: i + 1]], *inputs)

        def make(folder: Path, i: int = i, stage: Recipe = stage, key: str = key) -> None:
            rows = pack(texts, parent.tokenizer, length, limit=needed)
            if not len(rows):
                raise ValueError(f"the training texts give no sequence of {length} tokens: read more packages")
            answers = []
            if stage.answered_passages:
                answers = collect_answers(
                    parent.model, parent.tokenizer, texts[::-1], stage.answered_passages, stage.seed
                )
            data = MaskedRows(
                np.roll(rows, -sum(s.text_rows for s in stages[:i]), axis=0), mask_id, answers=answers,
                length=stage.steps * stage.batch_size, batch_size=stage.batch_size, seed=stage.seed,
            )  # fmt: skip
            below = layers(stages[:i], folders)
            begun = below.pop() / "adapter" if stage.continues else None
            before = _staged(parent, mask_id, below)
            model = add_lora(
                before, rank=stage.rank, alpha=stage.alpha, seed=stage.seed,
                trainable_token_indices={"embed_tokens": [mask_id]},
            )  # fmt: skip
            if begun:
                load_adapter(model, begun)
            adapter, curve = train(
                model, before.weights, data, stage, work_folder("adaptation", key),
                pad_id=parent.tokenizer.pad_token_id, evaluate_every=evaluate_every, save_every=500,
                evaluate=lambda model: {
                    f"held_out {kind}": held_out_cross_entropy(model, rows, mask_id, bfloat16=bfloat16)
                    for kind, rows in held_out.items()
                },
            )  # fmt: skip
            export_adapter(adapter, folder / "adapter")
            write_text(folder / "curve.json", json.dumps(curve, indent=1) + "\n")
            write_text(folder / "recipe.json", json.dumps(asdict(stage), indent=1) + "\n")

        folders.append(fetch("adaptation", key, make))
        if work is not None:
            with atomic_path(Path(work) / stage.stage) as temporary:
                shutil.copytree(folders[-1], temporary)
    return folders


def layers(stages: Sequence[Recipe], folders: Sequence[Path]) -> list[Path]:
    """The folders of stages whose adapters are merged, in order: the last of those that continue one another."""
    kept: list[Path] = []
    for stage, folder in zip(stages, folders, strict=False):
        kept = [*(kept[:-1] if stage.continues else kept), folder]
    return kept


def _staged(parent: LoadedBackbone, mask_id: int, folders: Sequence[Path]) -> LoadedBackbone:
    """The parent with bidirectional attention and the adapters of these stages merged in, in order."""
    model = make_bidirectional(copy.deepcopy(uncompiled(parent)))
    backbone = replace(parent, model=model, mask_id=mask_id, fingerprint=fingerprint(parent.fingerprint, mask_id))
    for folder in folders:
        backbone = with_adapter(backbone, folder / "adapter")
    return backbone


def held_out_table(backbones: Mapping[str, LoadedBackbone], held_out: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Held-out cross-entropy of backbones, from the cache: columns backbone, text, and one for each masking ratio."""
    rows = []
    for name, backbone in backbones.items():
        for text, sequences in held_out.items():
            where = backbone.fingerprint, backbone.device.type, backbone.mask_id
            key = address([held_out_cross_entropy], *where, sequences.tolist())
            how = {"bfloat16": backbone.dtype == torch.bfloat16, "progress": True}
            compute = partial(held_out_cross_entropy, backbone.model, sequences, backbone.mask_id, **how)
            losses = remember("held_out", key, compute)
            rows.append({"backbone": name, "text": text} | {f"{float(r):.0%} masked": v for r, v in losses.items()})
    return pd.DataFrame(rows)


def read_curves(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Records of the curves in folders of stages, in order."""
    return [r for folder in folders for r in json.loads((folder / "curve.json").read_text(encoding="utf-8"))]


def read_log(adapter: Path) -> dict[str, Any]:
    """The record of the run that made an adapter."""
    return json.loads((Path(adapter) / LOG).read_text(encoding="utf-8"))


def adaptation_table(curve: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Held-out cross-entropy along a run: stage, tokens_seen (of all stages), text, mask_ratio, cross_entropy."""
    rows, before, stage, last = [], 0, None, 0
    for record in curve:
        if record["stage"] != stage:
            before, stage = before + last, record["stage"]
        last = record["tokens_seen"]
        for name in (name for name in record if name.startswith("held_out ")):
            for ratio, loss in record[name].items():
                rows.append((stage, before + last, name.removeprefix("held_out "), float(ratio), loss))
    return pd.DataFrame(rows, columns=["stage", "tokens_seen", "text", "mask_ratio", "cross_entropy"])
