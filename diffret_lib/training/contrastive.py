"""Contrastive fine-tuning of the compared systems: the same data, negatives, steps and seeds for all.

The loop is sentence-transformers' ``MultiVectorEncoderTrainer``, the adapter peft's LoRA, the loss
:class:`~diffret_lib.training.losses.JointInfoNCE`.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.util.distributed import get_rank, get_world_size
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from diffret_lib.addresses import address
from diffret_lib.cache import atomic_path, fetch, work_folder, write_text
from diffret_lib.config import Profile, Training, slug
from diffret_lib.data.collection import Collection
from diffret_lib.environment import hardware, versions
from diffret_lib.models.backbones import BackboneError
from diffret_lib.models.prompts import SIDES
from diffret_lib.retrieval.metrics import METRIC, per_query
from diffret_lib.retrieval.search import MODES, rank, to_results
from diffret_lib.retrieval.systems import Retriever
from diffret_lib.training.data import TrainingData, described, training_data
from diffret_lib.training.lora import (
    AdapterCheckpoints,
    Checkpoints,
    Progress,
    add_lora,
    export_adapter,
    read_state,
    train_to_end,
)  # fmt: skip
from diffret_lib.training.losses import Columns, JointInfoNCE

#: Seconds between checkpoints, besides those at every measurement.
CHECKPOINT_SECONDS = 300
#: How many mini-batches of a CPU are one on CUDA.
CUDA_MINI_BATCHES = 16


class Recipe(Training):
    """Settings of one training run of one system.

    The learning rate rises over ``warmup_ratio`` of the steps and falls along a cosine to 0.  ``rank``, ``alpha`` and
    ``dropout`` are LoRA's; ``max_grad_norm`` is the length to which a step's gradient is cut.
    """

    learning_rate: float
    seed: int
    rank: int = 16
    alpha: int = 64
    max_grad_norm: float = 1.0


#: Settings that say which runs there are, not what one of them does; the data are known by their content.
_NOT_OF_A_RUN = {
    "collections", "negatives", "development", "learning_rates", "selection_steps", "seeds", "temperatures", "adapters",
    "rows",
}  # fmt: skip


@dataclass(frozen=True)
class FinetunedSystem:
    """A trained adapter (a PEFT folder) and how it came about.

    ``curve`` has a record for each step: step, seconds (measurements included), loss, dense_loss, sparse_loss,
    learning_rate and grad_norm, and where it was measured (at step 0 alone) nDCG@10 on the development collection:
    dev_dense, dev_sparse, dev_hybrid, and dev_ndcg, the one of the mode that the system is evaluated in.  ``kept`` is
    true for the step of the adapter's weights: the best measured one after step 0, even where step 0 is better.
    ``selection`` has a record for each learning rate tried: learning_rate, steps, dev_ndcg, and lost (the modes that
    ended below where they began) for one that was given up for that.
    """

    system: str
    adapter: Path
    curve: list[dict[str, Any]]
    about: dict[str, Any] = field(repr=False)
    repetition: int = 0
    selection: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, adapter: str = "adapter") -> FinetunedSystem:
        """Read an entry that :func:`finetune` made (or, with ``adapter`` ``"."``, a published one)."""
        about = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
        more = {name: about[name] for name in ("repetition", "selection") if name in about}
        return cls(about["system"], folder / adapter, curve, about, **more)

    @property
    def kept(self) -> dict[str, Any]:
        """The record of the step of the adapter's weights."""
        return next(record for record in self.curve if record.get("kept"))

    @property
    def lost(self) -> list[str]:
        """The modes whose nDCG@10 on the development collection training lowered, however little."""
        return [mode for mode in MODES if self.kept.get(f"dev_{mode}", 0) < self.curve[0].get(f"dev_{mode}", 0)]


def recipe_of(profile: Profile, system: str, learning_rate: float, repetition: int = 0) -> Recipe:
    """The recipe of a system (``"DiffRetriever multi"``) in a profile; a repetition has a seed of its own."""
    settings = profile.training.model_dump()
    settings["temperature"] = settings["temperatures"].get(system.split()[0], settings["temperature"])
    return Recipe(**settings, learning_rate=learning_rate, seed=profile.seed + repetition)


def finetune_selected(
    system: str, retriever: Retriever, data: TrainingData, profile: Profile, development: Collection,
    repetition: int = 0, callbacks: Sequence[TrainerCallback] = (),
) -> FinetunedSystem:  # fmt: skip
    """Train a system with the learning rate out of the profile's that is best on the development collection.

    The rates are tried with the seed of repetition 0, in ``selection_steps`` steps each (by default in all); of equal
    ones the first is taken.  One whose whole training lowers a mode (:attr:`FinetunedSystem.lost`) is given up for the
    next best; where all do, the best is taken.  Runs are entries of the cache, so an interrupted selection goes on.
    """
    training = profile.training
    steps = training.selection_steps or training.steps

    def train(rate: float, repetition: int = 0, **changes: Any) -> FinetunedSystem:
        recipe = recipe_of(profile, system, rate, repetition).model_copy(update=changes)
        return finetune(system, retriever, data, recipe, development, callbacks=callbacks)

    def tried(trained: FinetunedSystem, rate: float, steps: int) -> dict[str, Any]:
        return {"learning_rate": rate, "steps": steps, "dev_ndcg": trained.kept["dev_ndcg"]}

    selection = []
    if len(training.learning_rates) > 1:
        selection = [tried(train(rate, steps=steps), rate, steps) for rate in training.learning_rates]
    rates = [run["learning_rate"] for run in sorted(selection, key=lambda run: -run["dev_ndcg"])]
    chosen = (rates or training.learning_rates)[0]
    for rate in rates:
        whole = train(rate)
        if not whole.lost:
            chosen = rate
            break
        selection.append(tried(whole, rate, whole.curve[-1]["step"]) | {"lost": ", ".join(whole.lost)})
    return replace(train(chosen, repetition), repetition=repetition, selection=selection)


def finetune(
    system: str, retriever: Retriever, data: TrainingData, recipe: Recipe, development: Collection, *,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetunedSystem:  # fmt: skip
    """Train a system, go on where an earlier call was interrupted, or give what there is already.

    ``retriever`` is the zero-shot system at the limits of the evaluation, and stays as it is; on ``development``
    nDCG@10 is measured on the way.  A backbone in bfloat16 is trained under autocast; LoRA's weights are float32.
    """
    backbone, settings = retriever.backbone, retriever.reader.get_config_dict()
    limits = {"max_passage_tokens": recipe.max_passage_tokens}
    about = {
        "system": system,
        "backbone": {"name": backbone.spec.name, "fingerprint": backbone.fingerprint, "dtype": str(backbone.dtype)},
        "vectors": [retriever.vectors(side) for side in SIDES],
        "limits": {"training": settings | limits, "development": settings},
        "recipe": recipe.model_dump(mode="json", exclude=_NOT_OF_A_RUN),
        "data": {"fingerprint": data.fingerprint, "rows": len(data.rows), "collections": data.names},
        "development": {"fingerprint": development.fingerprint, "collection": described(development)},
    }
    code = [finetune, training_data, type(retriever), type(retriever.reader)]
    key = address(code, about, [retriever.fingerprint(side) for side in SIDES])

    def make(folder: Path) -> None:
        model = add_lora(backbone, rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed, lora_dropout=recipe.dropout)
        trained, cuda = replace(backbone, model=model), backbone.device.type == "cuda"
        encoder = retriever.on(trained, **limits).multi_vector_encoder()
        rows = data.rows.add_column("label", list(range(len(data.rows))))
        loss = JointInfoNCE(
            encoder, temperature=recipe.temperature, sparse_temperature=recipe.sparse_temperature,
            sparse_weight=recipe.sparse_weight, bfloat16=backbone.dtype == torch.bfloat16,
            mini_batch_size=recipe.mini_batch * (CUDA_MINI_BATCHES if cuda else 1),
            false_negatives=data.false_negatives if recipe.mask_false_negatives else None,
        )  # fmt: skip
        progress = Progress(system, {"loss": "loss", "eval_ndcg": "dev"})
        trainer = AdapterTrainer(
            encoder, _arguments(recipe, work_folder("adapters", key), cuda), loss=loss,
            data_collator=Columns(encoder[0]),
            train_dataset=rows.select(step_order(len(rows), recipe.steps * recipe.batch_size, recipe.seed)),
            evaluator=Measurement(retriever.on(trained), development),
            callbacks=[EarlyStoppingCallback(recipe.patience), RankCheckpoints(), progress, *callbacks],
        )  # fmt: skip
        trainer.base = backbone.weights
        adapter, state = train_to_end(trainer)
        shutil.copytree(adapter, folder / "adapter")
        curve = _curve(state.log_history, state.best_global_step)
        write_text(folder / "curve.jsonl", _lines(curve))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        made = {"trainable_parameters": trainable, "environment": {"versions": versions(), "hardware": hardware()}}
        write_text(folder / "recipe.json", json.dumps(about | made, indent=1) + "\n")

    return FinetunedSystem.load(_made_together(key, make))


def _made_together(key: str, make: Callable[[Path], None]) -> Path:
    """The cache's entry; several processes make it together, and the first one keeps it."""
    if get_world_size() == 1:
        return fetch("adapters", key, make)
    asked = [False]

    def make_with_the_others(folder: Path) -> None:
        asked[0] = True
        dist.broadcast_object_list(asked)
        make(folder)
        dist.barrier()  # checkpoints stay until all have read them

    if get_rank() == 0:
        fetch("adapters", key, make_with_the_others)
        if not asked[0]:
            dist.broadcast_object_list(asked)
    else:
        dist.broadcast_object_list(asked)
        with tempfile.TemporaryDirectory() as folder:
            if asked[0]:
                make(Path(folder))
                dist.barrier()
    dist.barrier()
    return fetch("adapters", key, make)


class RankCheckpoints(Checkpoints):
    """Checkpoints after some time as well, in a training by one process; of several, the first one seals them."""

    def __init__(self) -> None:
        super().__init__(CHECKPOINT_SECONDS if get_world_size() == 1 else math.inf)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if get_world_size() > 1:
            dist.barrier()  # until all have written their part
        if state.is_world_process_zero:
            super().on_save(args, state, control, **kwargs)


def _arguments(recipe: Recipe, work: Path, cuda: bool) -> MultiVectorEncoderTrainingArguments:
    own, rest = divmod(recipe.batch_size, get_world_size())
    if rest:
        raise ValueError(f"batch_size {recipe.batch_size} must be a multiple of the {get_world_size()} processes")
    return MultiVectorEncoderTrainingArguments(
        output_dir=str(work), report_to="none", disable_tqdm=True, seed=recipe.seed, use_cpu=not cuda,
        dataloader_pin_memory=cuda, dataloader_num_workers=2 if cuda else 0,  # texts are tokenised while a step runs
        max_steps=recipe.steps, per_device_train_batch_size=own, optim="adamw_torch",
        learning_rate=recipe.learning_rate, lr_scheduler_type="cosine", weight_decay=recipe.weight_decay,
        warmup_steps=math.ceil(recipe.warmup_ratio * recipe.steps), max_grad_norm=recipe.max_grad_norm,
        logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=recipe.evaluate_every, load_best_model_at_end=True,
        metric_for_best_model="ndcg", greater_is_better=True,
        save_strategy="steps", save_steps=recipe.evaluate_every, restore_callback_states_from_checkpoint=True,
        save_total_limit=3,  # the best, the last, and the one before, which is whole while the last is written
    )  # fmt: skip


def step_order(rows: int, count: int, seed: int) -> list[int]:
    """Row numbers of the whole training, one permutation after another: for the trainer, a single epoch."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(rows) for _ in range(math.ceil(count / rows))])[:count].tolist()


class Measurement(BaseEvaluator):
    """nDCG@10 on the development collection in each mode of a system; the last (hybrid where there is one) decides."""

    def __init__(self, retriever: Retriever, collection: Collection) -> None:
        super().__init__()
        self.retriever, self.collection, self.primary_metric = retriever, collection, "ndcg"

    def __call__(self, *asked: Any, **more: Any) -> dict[str, float]:
        """Names of modes, and "ndcg", the one that decides, to nDCG@10; arguments, as the trainer gives, do nothing."""
        retriever, collection = self.retriever, self.collection
        retriever.reader.eval()  # forgets what it has kept of other weights
        bfloat16 = retriever.backbone.dtype == torch.bfloat16
        with torch.autocast(retriever.backbone.device.type, torch.bfloat16, enabled=bfloat16):
            queries = retriever.encode_queries(collection.queries, progress=False)
            passages = retriever.encode_passages(collection.passages, progress=False)
        values = {}
        for mode in retriever.modes:
            ranked = rank(queries, passages, mode, excluded=collection.excluded)
            run = to_results(*ranked, collection.query_ids, collection.passage_ids)
            values[mode] = float(per_query(collection.qrels, run, (METRIC,))[METRIC].mean())
        return values | {"ndcg": values[retriever.modes[-1]]}


class AdapterTrainer(AdapterCheckpoints, MultiVectorEncoderTrainer):
    """The library's trainer, with checkpoints of the adapter alone: a whole model's lack what is merged in memory."""

    @property
    def adapted(self) -> PeftModel:
        return self.model[0].model

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card is written, so none is prepared (it would tokenise the training data)."""

    def get_batch_sampler(self, dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
        """Rows are in the order of the steps already."""
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self._start, self.args.eval_on_start = time.perf_counter(), not resume_from_checkpoint
        if resume_from_checkpoint:
            self._start -= read_state(Path(resume_from_checkpoint)).log_history[-1]["seconds"]
        if self.is_fsdp_enabled:
            if self.model[0].decoded:  # all processes have to take part in each pass
                raise ValueError("FSDP cannot train PromptReps multi: its processes decode different numbers of tokens")
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(self.adapted._no_split_modules)
        trained = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.accelerator.wait_for_everyone()  # until the first process has written the last checkpoint
        return trained

    def evaluate(self, *given: Any, **more: Any) -> dict[str, float]:
        """Measure; for a sharded model that is a forward pass, in which a layer's weights come together."""

        def measure() -> dict[str, float]:
            for layer in self.adapted.modules():
                if isinstance(layer, FSDPModule):  # what it allocates in inference mode could not be trained
                    layer.unshard()
                    layer.reshard()
            return super(AdapterTrainer, self).evaluate(*given, **more)

        self.model.measure = measure
        register_fsdp_forward_method(self.model, "measure")
        return self.model.measure()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the loss's parts, and the seconds of this training, earlier calls included."""
        if "loss" in logs:
            logs = logs | {f"{side}_loss": float(part) for side, part in self.loss.parts.items()}
        super().log(logs | {"seconds": time.perf_counter() - self._start}, start_time)


def _curve(history: Sequence[Mapping[str, Any]], kept: int) -> list[dict[str, Any]]:
    """One record a step out of the trainer's history."""
    wanted = {"loss", "dense_loss", "sparse_loss", "learning_rate", "grad_norm", "seconds"}
    wanted |= {f"eval_{name}" for name in ("ndcg", *MODES)}
    curve: dict[int, dict[str, Any]] = {}
    for entry in history:
        record = curve.setdefault(entry["step"], {"step": entry["step"]})
        record.update({name.replace("eval_", "dev_"): entry[name] for name in entry.keys() & wanted})
    curve[kept]["kept"] = True
    return [dict(sorted(record.items())) for record in curve.values()]


def _lines(curve: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in curve)


_CARD = """---
library_name: peft
license: apache-2.0
tags: [lora, information-retrieval]
---
# {system}, fine-tuned

This LoRA adapter belongs to the backbone `{backbone}` of diffret. Its weights are rounded to bfloat16.

It was trained on {collections}, with the learning rate {rate:g} and the seed {seed}. On {development}, nDCG@10 was
{before:.3f} before the training and {after:.3f} at step {step}, whose weights these are. That collection also chose
the step, so the second number is a little too high.

`recipe.json` has every setting, `curve.jsonl` the losses and the measurements.

```python
retriever = {reader}("{backbone}"{options}).with_adapter("path/of/this/folder")
```
"""


def published_folder(parent: Path, system: str, repetition: int) -> Path:
    """Where in a folder of published adapters that of a system is."""
    return parent / (slug(system) + (f"-seed-{repetition}" if repetition else ""))


def publish_adapter(trained: FinetunedSystem, parent: Path) -> Path:
    """Write a trained adapter to ``parent/<system>`` (``<system>-seed-<repetition>`` but for the first).

    Its weights are in bfloat16, half the size; curve, recipe and a card are beside them.  One that was loaded from
    there stays as it is.
    """
    folder, about = published_folder(parent, trained.system, trained.repetition), trained.about
    if trained.adapter.resolve() == folder.resolve():
        return folder
    settings, recipe = about["limits"]["development"], about["recipe"]
    named = "k_query", "k_passage", "max_vectors", "stop"
    options = [f", {name}={json.dumps(settings[name])}" for name in named if name in settings]
    card = _CARD.format(
        system=trained.system, reader=trained.system.split()[0], backbone=about["backbone"]["name"],
        options="".join(options), collections=" and ".join(about["data"]["collections"]), seed=recipe["seed"],
        rate=recipe["learning_rate"], development=about["development"]["collection"], step=trained.kept["step"],
        before=trained.curve[0]["dev_ndcg"], after=trained.kept["dev_ndcg"],
    )  # fmt: skip
    about = about | {"repetition": trained.repetition, "selection": trained.selection}
    with atomic_path(folder) as temporary:
        export_adapter(trained.adapter, temporary)
        write_text(temporary / "curve.jsonl", _lines(trained.curve))
        write_text(temporary / "recipe.json", json.dumps(about, indent=1) + "\n")
        write_text(temporary / "README.md", card)
    return folder


def load_published(parent: Path, system: str, retriever: Retriever, repetition: int = 0) -> FinetunedSystem:
    """Read an adapter that :func:`publish_adapter` wrote, for the zero-shot system ``retriever``.

    FileNotFoundError: there is none.  BackboneError: it is for another backbone, or other numbers of vectors, or its
    weights are not whole.
    """
    folder = published_folder(parent, system, repetition)
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter of {system}; scripts/finetune.py writes it there")
    trained = FinetunedSystem.load(folder, ".")
    has, wanted = trained.about["vectors"], [retriever.vectors(side) for side in SIDES]
    if has != wanted:
        raise BackboneError(f"{folder} was trained with {has} vectors (query, passage), and {wanted} are asked for")
    retriever.with_adapter(folder)
    return trained


def training_summary(results: Sequence[FinetunedSystem], mean_pooled: Mapping[str, float]) -> pd.DataFrame:
    """A row for each training; ``mean_pooled`` has nDCG@10 of a system's mean-pooled form, where there is one.

    Columns system, repetition, learning_rate, trainable_parameters, steps, best_step, seconds, dev_zero_shot,
    dev_mean_pooled, dev_best (nDCG@10 on the development collection).
    """
    rows = []
    for result in results:
        first, last, kept = result.curve[0], result.curve[-1], result.kept
        rows.append({
            "system": result.system, "repetition": result.repetition,
            "learning_rate": result.about["recipe"]["learning_rate"],
            "trainable_parameters": result.about["trainable_parameters"], "steps": last["step"],
            "best_step": kept["step"], "seconds": last["seconds"], "dev_zero_shot": first["dev_ndcg"],
            "dev_mean_pooled": mean_pooled.get(result.system, math.nan), "dev_best": kept["dev_ndcg"],
        })  # fmt: skip
    return pd.DataFrame(rows)
