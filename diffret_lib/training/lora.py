"""LoRA adapters and their checkpoints: what the adaptation and the contrastive fine-tuning share.

An interrupted training goes on from its last whole checkpoint and ends with the weights that it would have had
without the interruption.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers.util.distributed import get_rank
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME

from diffret_lib.cache import is_sealed, seal, write_text
from diffret_lib.models.backbones import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoadedBackbone, uncompiled


def add_lora(
    backbone: LoadedBackbone, *, rank: int, alpha: int, seed: int, dtype: torch.dtype | None = None, **options: Any
) -> PeftModel:
    """A copy of a backbone's model, in ``dtype`` (by default its own), with float32 LoRA on all its linear layers.

    A seed always gives the same one; ``options`` are other fields of :class:`peft.LoraConfig`.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        model = get_peft_model(copy.deepcopy(uncompiled(backbone)).to(dtype or backbone.dtype), config)
    model.peft_config["default"].base_model_name_or_path = backbone.spec.name
    return model


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Write a PEFT adapter without local paths; ``base`` is :attr:`LoadedBackbone.weights` of what it is for.

    Of several processes the first one writes; all are needed where the model is sharded.
    """
    weights = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in _weights(model).items()}
    if get_rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    write_text(folder / ADAPTER_CONFIG, json.dumps(settings, indent=1, sort_keys=True) + "\n")
    attention = "causal" if getattr(model.config, "is_causal", True) else "bidirectional"
    metadata = {"base": base, "base_name": settings["base_model_name_or_path"], "attention": attention}
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    _save(weights, folder / ADAPTER_WEIGHTS, {"format": "pt", **metadata})


def _save(weights: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its metadata in order; the library's own order is one of chance."""
    save_file(weights, path, metadata)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(size))


def _weights(model: PeftModel) -> dict[str, torch.Tensor]:
    # "auto" would look for the base model's configuration on the hub
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load the weights that :func:`save_adapter` wrote; of a sharded model, a process takes its shards."""
    whole = load_file(folder / ADAPTER_WEIGHTS)
    for name, own in _weights(model).items():
        sharded = isinstance(own, DTensor)
        own.copy_(distribute_tensor(whole[name], own.device_mesh, own.placements) if sharded else whole[name])


def export_adapter(source: Path, target: Path) -> int:
    """Write a saved adapter again with its weights in bfloat16, half the size; returns their bytes."""
    target.mkdir(parents=True, exist_ok=True)
    with safe_open(source / ADAPTER_WEIGHTS, framework="pt") as file:
        halves = {name: file.get_tensor(name).bfloat16() for name in file.keys()}  # noqa: SIM118
        _save(halves, target / ADAPTER_WEIGHTS, file.metadata())
    shutil.copyfile(source / ADAPTER_CONFIG, target / ADAPTER_CONFIG)
    return (target / ADAPTER_WEIGHTS).stat().st_size


class AdapterCheckpoints:
    """Mixin of a trainer whose checkpoints hold the adapter alone, in the folder ``adapter``."""

    #: As for :func:`save_adapter`.
    base: str

    @property
    def adapted(self) -> PeftModel:
        """The model that is trained."""
        return self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_adapter(self.adapted, Path(output_dir or self.args.output_dir) / "adapter", self.base)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # where the model is sharded, the library would write its frozen weights as well
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.adapted, Path(resume_from_checkpoint) / "adapter")


class Checkpoints(TrainerCallback):
    """Seal every checkpoint when it is whole, and have one written after ``seconds`` as well."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        control.should_save |= time.perf_counter() - self.last > self.seconds

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        seal(_checkpoint(args.output_dir, state.global_step))
        self.last = time.perf_counter()


class Progress(TrainerCallback):
    """A progress bar over the steps; ``shown`` maps names of logged numbers to what the bar calls them."""

    def __init__(self, name: str, shown: Mapping[str, str]) -> None:
        self.name, self.shown = name, shown

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"training {self.name}", unit="step")

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        if values := {name: f"{logs[key]:.3f}" for key, name in self.shown.items() if key in logs}:
            self.bar.set_postfix(values, refresh=False)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint in a folder that is whole, as is the best one until then; None without one."""
    found = [path for path in work.glob("checkpoint-*") if is_sealed(path) and is_sealed(_best(path))]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def read_state(checkpoint: Path) -> TrainerState:
    """The trainer's state in a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def train_to_end(trainer: Trainer) -> tuple[Path, TrainerState]:
    """Train, or go on from the last whole checkpoint in the trainer's folder, unless the training ended there.

    Returns the adapter of the best measured step (without measurements: the last), and the state at the end.
    """
    trainer.remove_callback(PrinterCallback)
    work = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(work)
    control = read_state(checkpoint).stateful_callbacks["TrainerControl"]["args"] if checkpoint else {}
    if not control.get("should_training_stop"):  # set after all steps, and where it stopped early
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        checkpoint = last_checkpoint(work)
    return _best(checkpoint) / "adapter", read_state(checkpoint)


def _best(checkpoint: Path) -> Path:
    """The checkpoint of the best measured step until a checkpoint (without measurements: itself)."""
    state = read_state(checkpoint)
    return _checkpoint(checkpoint.parent, state.best_global_step or state.global_step)


def _checkpoint(work: str | Path, step: int) -> Path:
    return Path(work) / f"checkpoint-{step}"
