"""Stages of the adaptation, kept in the cache, and tables on them and on the committed run.

Three stages (:mod:`diffret_lib.training.masked_diffusion`), each from where the one before ended:

``documentation``
    packed documentation text (:mod:`diffret_lib.data.training_text`);
``answers``
    the retrieval prompt with an answer of the autoregressive parent, masked at random ratios, fully
    masked included, mixed half and half with documentation;
``refinement``
    the same mixture of other documentation and answers to other texts, the learning rate raised once more.

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
from safetensors.numpy import load_file, save_file

from diffret_lib.addresses import address, fingerprint
from diffret_lib.cache import atomic_path, fetch, file_sha256, remember, work_folder, write_text
from diffret_lib.config import PACKAGES
from diffret_lib.data.training_text import INSTALLED_PACKAGES, SHORT_PACKAGES, training_texts
from diffret_lib.environment import versions
from diffret_lib.models.backbones import LoadedBackbone, adapter_sha, make_bidirectional
from diffret_lib.training.lora import add_lora, load_adapter
from diffret_lib.training.masked_diffusion import (
    Answer, MaskedRows, Recipe, collect_answers, held_out_cross_entropy, pack, train,
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
    """A run of the recipe.

    Attributes
    ----------
    backbone : LoadedBackbone
        The parent with bidirectional attention and the trained adapter (not merged).
    adapter : Path
    tokens : int
        Tokens seen.
    curve : list of dict
        Of all stages; see :func:`diffret_lib.training.masked_diffusion.train`.
    """

    backbone: LoadedBackbone
    adapter: Path
    tokens: int
    curve: list[dict[str, Any]]


def run_recipe(
    parent: LoadedBackbone,
    mask_id: int,
    held_out: np.ndarray,
    *,
    tokens: int | None = None,
    wheels: Path | None = None,
    work: Path | None = None,
) -> Run:
    """Run the adaptation: the first stage for ``tokens`` tokens, or (``None``) the whole recipe.

    Parameters
    ----------
    parent : LoadedBackbone
        The autoregressive parent, in bfloat16 (or float32, slower).
    mask_id : int
        The token that becomes the mask.
    held_out : ndarray of int64, shape (n, length)
        Rows for the held-out cross-entropy.
    tokens : int, optional
        A short run, on few packages' documentation.
    wheels : Path, optional
        A folder of wheels to read besides what is installed.
    work : Path, optional
        A folder that gets every stage (``adapter``, ``curve.json``, ``recipe.json``) as soon as it is finished.
    """
    if tokens is None:
        stages, texts = STAGES, read_texts(wheels)
    else:
        stages = (replace(DOCUMENTATION, tokens=tokens, schedule_tokens=None, warmup_steps=4),)
        texts = read_texts(None, packages=SHORT_PACKAGES, standard_library=False)
    evaluate_every = 100 if tokens is None else 0
    folders = adapt(parent, mask_id, texts, held_out, stages=stages, evaluate_every=evaluate_every, work=work)
    model = _start(parent, mask_id, stages[-1], folders[-1])
    identity = fingerprint("adapted", parent.fingerprint, mask_id, adapter_sha(folders[-1] / "adapter"))
    return Run(
        replace(parent, model=model, mask_id=mask_id, fingerprint=identity),
        folders[-1] / "adapter",
        sum(recipe.steps * recipe.step_tokens for recipe in stages),
        read_curves(folders),
    )


def read_texts(wheels: Path | None, **options: Any) -> list[str]:
    """:func:`~diffret_lib.data.training_text.training_texts`, from the cache while the same versions are installed."""
    read = versions((*options.get("packages", INSTALLED_PACKAGES), *PACKAGES))
    files = {path.name: file_sha256(path) for path in sorted(Path(wheels).glob("*.whl"))} if wheels else {}
    key = address([training_texts], options, read, files)
    return remember("training_texts", key, lambda: [text.text for text in training_texts(wheels, **options)])


def adapt(
    parent: LoadedBackbone,
    mask_id: int,
    texts: Sequence[str],
    held_out: np.ndarray,
    *,
    stages: Sequence[Recipe] = STAGES,
    evaluate_every: int = 100,
    work: Path | None = None,
) -> list[Path]:
    """Train all stages that the cache does not hold; an interrupted one goes on from its last whole checkpoint.

    Parameters
    ----------
    texts : sequence of str
        Shuffled training texts.  Documentation is taken from the front, texts to answer from the back, other ones
        for every stage.
    stages : sequence of Recipe
        With the same sequence length.

    Returns
    -------
    list of Path
        A folder for each stage, with ``adapter/``, ``curve.json`` and ``recipe.json``.

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
            first = sum(s.documentation_rows for s in earlier)
            data = MaskedRows(
                rows[first : first + stage.documentation_rows], mask_id, batch_size=stage.batch_size, seed=stage.seed,
                answers=_answers(parent, texts, stage, earlier),
            )  # fmt: skip
            adapter, curve = train(
                _start(parent, mask_id, stage, folders[-1] if folders else None), parent.weights, data, stage,
                work_folder("adaptation", key), pad_id=parent.tokenizer.pad_token_id,
                evaluate=lambda model: held_out_cross_entropy(model, held_out, mask_id), evaluate_every=evaluate_every,
            )  # fmt: skip
            shutil.copytree(adapter, folder / "adapter")
            write_text(folder / "curve.json", json.dumps(curve, indent=1) + "\n")
            write_text(folder / "recipe.json", json.dumps(asdict(stage), indent=1) + "\n")

        folders.append(fetch("adaptation", key, make))
        if work is not None:
            with atomic_path(Path(work) / stage.stage) as temporary:
                shutil.copytree(folders[-1], temporary)
    return folders


def _start(parent: LoadedBackbone, mask_id: int, stage: Recipe, before: Path | None) -> PeftModel:
    """The parent with bidirectional attention and an adapter: that of the stage before, or a new one."""
    model = add_lora(
        replace(parent, model=make_bidirectional(copy.deepcopy(parent.model))),
        rank=stage.rank, alpha=stage.alpha, seed=stage.seed, trainable_token_indices={"embed_tokens": [mask_id]},
    )  # fmt: skip
    if before is not None:
        load_adapter(model, before / "adapter")
    return model


def _answers(parent: LoadedBackbone, texts: Sequence[str], stage: Recipe, earlier: Sequence[Recipe]) -> list[Answer]:
    """The parent's answers for a stage, from the cache; to texts behind those of earlier stages."""
    if not stage.answered_passages:
        return []
    # a stage passes over some texts: two for each passage that it answers are more than it has seen
    left = texts[::-1][2 * sum(s.answered_passages for s in earlier) :]

    def make(folder: Path) -> None:
        answers = collect_answers(parent.model, parent.tokenizer, left, stage.answered_passages, stage.seed)
        arrays = {f"{i:06}.{name}": array for i, answer in enumerate(answers) for name, array in vars(answer).items()}
        save_file(arrays, folder / "answers.safetensors")

    inputs = parent.weights, str(parent.dtype), fingerprint(list(left)), stage.answered_passages, stage.seed
    arrays = load_file(fetch("answers", address([collect_answers], *inputs), make) / "answers.safetensors")
    answers: dict[str, dict[str, np.ndarray]] = {}
    for key in sorted(arrays):
        number, _, name = key.partition(".")
        answers.setdefault(number, {})[name] = arrays[key]
    return [Answer(**parts) for parts in answers.values()]


def held_out_losses(backbone: LoadedBackbone, rows: np.ndarray) -> dict[str, float]:
    """:func:`~diffret_lib.training.masked_diffusion.held_out_cross_entropy` of a backbone, kept in the cache."""
    key = address([held_out_cross_entropy], backbone.fingerprint, backbone.mask_id, rows.tolist())
    return remember(
        "held_out", key, lambda: held_out_cross_entropy(backbone.model, rows, backbone.mask_id, progress=True)
    )


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
    rows, offset, total, stage = [], 0, 0, None
    for record in log["curve"]:
        if record["stage"] != stage:
            offset, stage = total, record["stage"]
        total = offset + record["tokens_seen"]
        rows += [(stage, total, float(ratio), loss) for ratio, loss in record.get("held_out", {}).items()]
    before, *after = [
        [(name, 0 if i == 0 else total, float(ratio), loss) for ratio, loss in losses.items()]
        for i, (name, losses) in enumerate(measured.items())
    ]
    return pd.DataFrame(
        [*before, *rows, *(row for part in after for row in part)],
        columns=["stage", "tokens_seen", "mask_ratio", "cross_entropy"],
    )
