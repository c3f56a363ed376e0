"""Contrastive fine-tuning of the compared systems: the same data, negatives, steps and seed for all.

The loop is sentence-transformers' ``MultiVectorEncoderTrainer``, the adapter peft's LoRA, the loss
:class:`~diffret_lib.losses.JointInfoNCE`.  A training that was interrupted goes on from its last checkpoint and
ends with the weights that it would have had without the interruption.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from diffret_lib.backbones import LoadedBackbone
from diffret_lib.cache import atomic_path, cache_dir, fingerprint
from diffret_lib.collection import Collection, load_collection
from diffret_lib.evaluation import per_query
from diffret_lib.losses import FalseNegatives, JointInfoNCE
from diffret_lib.negatives import hard_negatives
from diffret_lib.profiles import Development, Profile, Sample, Training
from diffret_lib.retrievers import DiffEmbed, DiffRetriever, PromptReps, RepLLaMA, Retriever
from diffret_lib.scoring import rank, to_results
from diffret_lib.study import METRIC, Study, System, slug

SYSTEMS = (
    "DiffRetriever single", "DiffRetriever multi", "DiffEmbed", "PromptReps single", "PromptReps multi", "RepLLaMA",
)  # fmt: skip
#: Tokens that PromptReps multi decodes, in training and after it.
FINETUNED_TOKENS = 4
#: Part of every result's address: raise it when the same recipe and data would give other weights.
FINETUNING_VERSION = 1
#: Seconds between checkpoints, besides those at every measurement.
CHECKPOINT_SECONDS = 300

Pair = tuple[int, int]


class Recipe(Training):
    """Everything that the training of a system depends on, besides its backbone, its reader and the data.

    The learning rate falls linearly to 0.  It does not rise first: an adapter starts as no change at all, and of a
    few steps none is to be wasted.

    Attributes
    ----------
    rank, alpha : int
        Of LoRA, on all linear layers of the transformer.
    dropout : float
        Of LoRA.
    temperature : float
        Of the dense scores.
    """

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=0.01, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = 0


@dataclass(frozen=True)
class TrainingData:
    """What all systems are trained on.

    Attributes
    ----------
    collection : Collection
    negatives : DataFrame
        Columns query_id, passage_id, source.
    rows : Dataset
        Columns query, positive, negative_1, ..., negative_n.
    false_negatives : FalseNegatives
        Of the rows.
    """

    collection: Collection
    negatives: pd.DataFrame
    rows: Dataset
    false_negatives: FalseNegatives

    @property
    def fingerprint(self) -> str:
        """SHA-256 over collection and negatives."""
        return fingerprint(self.collection.fingerprint, self.negatives.to_dict("list"))


@dataclass(frozen=True)
class FinetunedSystem:
    """A trained adapter and how it came about.

    Attributes
    ----------
    system : str
    adapter : Path
        A PEFT adapter folder.
    curve : list of dict
        A record for each step: step, seconds (measurements included), loss, its parts ("dense_loss",
        "sparse_loss"), learning_rate and grad_norm, and dev_ndcg where it was measured.  Step 0, before training,
        has dev_ndcg alone.  ``kept`` is true for the step of the adapter's weights: the best measured one after
        step 0, even where step 0 is better.
    trainable_parameters : int
    """

    system: str
    adapter: Path
    curve: list[dict[str, Any]]
    trainable_parameters: int

    @classmethod
    def load(cls, folder: Path) -> FinetunedSystem:
        """What :func:`finetune` left in a folder."""
        about = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
        return cls(about["system"], folder / "adapter", curve, about["trainable_parameters"])


# -- recipe and data ---------------------------------------------------------------------------------------


def recipe_of(profile: Profile) -> Recipe:
    """The recipe of a profile."""
    return Recipe(**profile.training.model_dump(), seed=profile.seed)


def training_rows(collection: Collection, negatives: pd.DataFrame) -> Dataset:
    """A row for each pair of a query and a passage relevant to it, with the query's hard negatives.

    Returns
    -------
    Dataset
        Columns query, positive, negative_1, ..., negative_n; all texts.
    """
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    queries = dict(zip(collection.query_ids, collection.queries, strict=True))
    mined = negatives.groupby("query_id")["passage_id"].agg(list)
    rows = []
    for query_id in collection.query_ids:
        others = {f"negative_{i}": texts[p] for i, p in enumerate(mined[query_id], 1)}
        rows += [{"query": queries[query_id], "positive": texts[p], **others} for p in collection.relevant(query_id)]
    return Dataset.from_list(rows)


def false_negatives(collection: Collection, rows: Dataset) -> FalseNegatives:
    """Which passages of the rows are relevant to which queries; equal texts are the same."""
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    codes: dict[str, int] = {}
    for text in collection.passages:
        codes.setdefault(text, len(codes))
    relevant: dict[str, set[int]] = defaultdict(set)
    for query_id, query in zip(collection.query_ids, collection.queries, strict=True):
        relevant[query].update(codes[texts[p]] for p in collection.relevant(query_id))
    columns = [name for name in rows.column_names if name != "query"]
    passages = torch.tensor([[codes[text] for text in rows[name]] for name in columns]).T
    width = max(map(len, relevant.values()))
    padded = [sorted(relevant[q]) + [-1] * (width - len(relevant[q])) for q in rows["query"]]
    return FalseNegatives(passages.contiguous(), torch.tensor(padded))


def training_data(study: Study, selected: Pair) -> TrainingData:
    """The training collection in the sample of the profile, with hard negatives mined in it."""
    recipe = recipe_of(study.profile)
    collection = _sampled(study.profile.train_collection, recipe.sample, recipe.seed)
    negatives = hard_negatives(study, collection, selected, recipe.negatives, recipe.seed)
    rows = training_rows(collection, negatives)
    return TrainingData(collection, negatives, rows, false_negatives(collection, rows))


def _sampled(name: str, size: Sample | Development, seed: int) -> Collection:
    return load_collection(name).sample(size.queries, size.passages, seed=seed)


# -- the systems -------------------------------------------------------------------------------------------


def _kind(system: str, selected: Pair) -> tuple[type[Retriever], dict[str, int]]:
    """Class of a system's retriever, and its counts."""
    kinds = {
        "DiffRetriever single": (DiffRetriever, {"k_query": 1, "k_passage": 1}),
        "DiffRetriever multi": (DiffRetriever, {"k_query": selected[0], "k_passage": selected[1]}),
        "DiffEmbed": (DiffEmbed, {}),
        "PromptReps single": (PromptReps, {"max_new_tokens": 0}),
        "PromptReps multi": (PromptReps, {"max_new_tokens": FINETUNED_TOKENS}),
        "RepLLaMA": (RepLLaMA, {}),
    }
    if system not in kinds:
        raise ValueError(f"there is no system {system!r}; there are {', '.join(SYSTEMS)}")
    return kinds[system]


def systems(study: Study, selected: Pair) -> list[System]:
    """The fine-tuned systems of the tables; one that is not trained yet is trained."""
    out = []
    for name in SYSTEMS:
        adapter = finetune(study, name, selected).adapter
        kind, counts = _kind(name, selected)
        retriever = kind(study.backbone(kind.family), **counts, **study.limits)
        if "max_new_tokens" in counts:
            counts = dict.fromkeys(("k_query", "k_passage"), 1 + counts["max_new_tokens"])
        out.append(System(name, kind.family, retriever, **counts, training="fine-tuned", adapter=adapter))
    return out


# -- training ----------------------------------------------------------------------------------------------


def finetune(
    study: Study,
    system: str,
    selected: Pair,
    *,
    work: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> FinetunedSystem:
    """Train a system, go on where an earlier call was interrupted, or give what there is already.

    The result is in the cache, under an address that covers the backbone, the reader, the recipe, the training
    data and the development collection: ``adapter/`` (a PEFT adapter), ``curve.jsonl`` and ``recipe.json``.

    Parameters
    ----------
    study : Study
    system : str
        Of :data:`SYSTEMS`.
    selected : (int, int)
        The pair (Kq, Kp) of DiffRetriever multi, with which negatives are mined as well.
    work : Path, optional
        Folder of the checkpoints, removed at the end; by default in the cache.
    callbacks : sequence of TrainerCallback
        Further ones.
    progress : bool

    Returns
    -------
    FinetunedSystem

    Raises
    ------
    ValueError
        For an unknown system, or a training collection with too few passages for the negatives.
    """
    kind, counts = _kind(system, selected)
    recipe, data = recipe_of(study.profile), training_data(study, selected)
    development = _sampled(recipe.development.collection, recipe.development, recipe.seed)
    backbone = study.backbone(kind.family)
    limits = study.limits | {"max_passage_tokens": recipe.max_passage_tokens}
    about = {
        "version": FINETUNING_VERSION,
        "system": system,
        "backbone": {"name": backbone.spec.name, "fingerprint": backbone.fingerprint},
        "counts": counts,
        "limits": {"training": limits, "development": study.limits},
        "recipe": recipe.model_dump(mode="json"),
        "data": data.fingerprint,
        "development": development.fingerprint,
    }
    key = fingerprint(about)
    folder = cache_dir() / "finetuned" / key
    if (folder / "recipe.json").exists():
        return FinetunedSystem.load(folder)

    model = new_adapter(backbone, recipe)
    own = replace(backbone, model=model)
    trained, measured = kind(own, **counts, **limits), kind(own, **counts, **study.limits)
    work = cache_dir() / "finetuning" / key if work is None else Path(work)
    trainer = _trainer(trained, data, recipe, Measurement(measured, development), work, system, callbacks, progress)
    checkpoint = last_checkpoint(work)
    if checkpoint is None or not _has_stopped(checkpoint):
        trainer.args.eval_on_start = checkpoint is None
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        checkpoint = last_checkpoint(work)
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    kept = state["best_global_step"]
    about["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with atomic_path(folder) as temporary:
        shutil.copytree(work / f"checkpoint-{kept}" / "adapter", temporary / "adapter")
        lines = [json.dumps(record) + "\n" for record in _curve(state["log_history"], kept)]
        (temporary / "curve.jsonl").write_text("".join(lines), encoding="utf-8")
        (temporary / "recipe.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return FinetunedSystem.load(folder)


def new_adapter(backbone: LoadedBackbone, recipe: Recipe) -> PeftModel:
    """A float32 copy of the backbone's model with LoRA on all its linear layers, the same for a seed."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        model = get_peft_model(copy.deepcopy(backbone.model).float(), config)
    model.peft_config["default"].base_model_name_or_path = backbone.spec.name
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a PEFT adapter; the same weights give the same bytes, and no local path is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    # "auto" would look for the base model's configuration on the hub
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def publish_adapter(trained: FinetunedSystem, parent: Path) -> Path:
    """Write a trained adapter for others: its weights in bfloat16, half the size, with curve, recipe and a card.

    Parameters
    ----------
    trained : FinetunedSystem
    parent : Path
        Folder of the adapters.

    Returns
    -------
    Path
        ``parent/<system>``, replaced if it was there: a PEFT adapter, for
        :meth:`diffret_lib.retrievers.Retriever.with_adapter`.
    """
    folder = parent / slug(trained.system)
    about = json.loads((trained.adapter.parent / "recipe.json").read_text(encoding="utf-8"))
    with atomic_path(folder) as temporary:
        shutil.copytree(trained.adapter.parent, temporary, ignore=shutil.ignore_patterns("adapter"))
        shutil.copyfile(trained.adapter / "adapter_config.json", temporary / "adapter_config.json")
        weights = load_file(trained.adapter / "adapter_model.safetensors")
        halves = {name: weight.bfloat16() for name, weight in weights.items()}
        save_file(halves, temporary / "adapter_model.safetensors", {"format": "pt"})
        counts = "".join(f", {name}={count}" for name, count in about["counts"].items())
        reader = trained.system.split()[0]
        card = _CARD.format(system=trained.system, backbone=about["backbone"]["name"], reader=reader, counts=counts)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return folder


_CARD = """---
library_name: peft
license: apache-2.0
tags: [lora, information-retrieval]
---
# {system}, fine-tuned

A LoRA adapter on `{backbone}` of diffret, trained by notebook 03. The weights are those of the
training, rounded to bfloat16. `recipe.json` has the recipe, the fingerprints of the data and what the reader was set
to, `curve.jsonl` the losses and nDCG@10 on the development collection.

```python
retriever = {reader}("{backbone}"{counts}).with_adapter("path/of/this/folder")
```
"""


class Measurement(BaseEvaluator):
    """nDCG@10 on the development collection, as the study measures it; hybrid where there is a sparse side."""

    def __init__(self, retriever: Retriever, collection: Collection) -> None:
        super().__init__()
        self.retriever, self.collection, self.primary_metric = retriever, collection, METRIC

    def __call__(self, model: Any, output_path: Any = None, epoch: int = -1, steps: int = -1) -> dict[str, float]:
        retriever, collection = self.retriever, self.collection
        retriever.reader.eval()  # forgets what it has kept of other weights
        ranked = rank(
            retriever.encode_queries(collection.queries, progress=False),
            retriever.encode_passages(collection.passages, progress=False),
            "hybrid" if "hybrid" in retriever.modes else "dense",
        )
        run = to_results(*ranked, collection.query_ids, collection.passage_ids)
        return {METRIC: float(per_query(collection.qrels, run, (METRIC,))[METRIC].mean())}


class AdapterTrainer(MultiVectorEncoderTrainer):
    """The library's trainer, with checkpoints of the adapter alone.

    sentence-transformers saves the model as a folder that loads by itself, with tokenizer, settings and a card,
    and loads a checkpoint by building the model anew from it; a reader's folder would then name the backbone by a
    path, and a diffusion backbone is not what lies there: its own adapter has been merged into it in memory.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_adapter(self.model[0].model, Path(output_dir or self.args.output_dir) / "adapter")

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        weights = load_file(Path(checkpoint_path) / "adapter" / "adapter_model.safetensors")
        set_peft_model_state_dict(self.model[0].model, weights)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card is written, so none is prepared (it would tokenise the training data)."""

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, **kwargs: Any
    ) -> DefaultBatchSampler:
        """Rows are in the order of the steps already."""
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self._start, self._before = time.perf_counter(), 0.0
        if resume_from_checkpoint:
            text = (Path(resume_from_checkpoint) / "trainer_state.json").read_text(encoding="utf-8")
            self._before = max((r.get("seconds", 0.0) for r in json.loads(text)["log_history"]), default=0.0)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the loss's parts, and the seconds of this training, earlier calls included."""
        if "loss" in logs:
            logs = logs | {f"{side}_loss": float(part) for side, part in self.loss.parts.items()}
        super().log(logs | {"seconds": self._before + time.perf_counter() - self._start}, start_time)


class _Checkpoints(TrainerCallback):
    """Save every :data:`CHECKPOINT_SECONDS` as well; when a checkpoint is written changes no weight."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= time.perf_counter() - self.last > CHECKPOINT_SECONDS

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()


class _Progress(TrainerCallback):
    """A bar over the steps."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"training {self.name}", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        names = {"loss": "loss", f"eval_{METRIC}": "dev"}
        shown = {name: f"{logs[key]:.3f}" for key, name in names.items() if key in logs}
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _trainer(
    retriever: Retriever,
    data: TrainingData,
    recipe: Recipe,
    measurement: Measurement,
    work: Path,
    name: str,
    callbacks: Sequence[TrainerCallback],
    progress: bool,
) -> AdapterTrainer:
    model = MultiVectorEncoder(modules=[retriever.reader], device=str(retriever.backbone.device))
    loss = JointInfoNCE(
        model,
        temperature=recipe.temperature,
        mini_batch_size=recipe.mini_batch,
        false_negatives=data.false_negatives,
    )
    arguments = MultiVectorEncoderTrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        use_cpu=retriever.backbone.device.type == "cpu",
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        save_strategy="steps",
        save_steps=recipe.evaluate_every,
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=True,
        metric_for_best_model=METRIC,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    order = step_order(len(data.rows), recipe.steps * recipe.batch_size, recipe.seed)
    rows = data.rows.add_column("label", list(range(len(data.rows)))).select(order)
    own = [EarlyStoppingCallback(recipe.patience), _Checkpoints(), *([_Progress(name)] if progress else [])]
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        loss=loss,
        evaluator=measurement,
        callbacks=[*own, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_order(rows: int, count: int, seed: int) -> list[int]:
    """Row numbers of the whole training, one permutation of the rows after another.

    It is one epoch for the trainer, which then finds its place in it again by the number of steps alone.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(rows) for _ in range(math.ceil(count / rows))])[:count].tolist()


def last_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint in a folder (its state is written last); None without one."""
    found = [p for p in Path(work).glob("checkpoint-*") if _is_json(p / "trainer_state.json")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _has_stopped(checkpoint: Path) -> bool:
    """Whether training had ended (early or at its last step) when the checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def _curve(history: Sequence[Mapping[str, Any]], kept: int) -> list[dict[str, Any]]:
    """One record a step out of the trainer's history."""
    names = {f"eval_{METRIC}": "dev_ndcg"} | {
        name: name for name in ("loss", "dense_loss", "sparse_loss", "learning_rate", "grad_norm", "seconds")
    }
    curve: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "loss" in entry or f"eval_{METRIC}" in entry:
            record = curve.setdefault(entry["step"], {"step": entry["step"]})
            record.update({new: entry[old] for old, new in names.items() if old in entry})
    curve[kept]["kept"] = True
    return list(curve.values())


# -- tables ------------------------------------------------------------------------------------------------


def learning_curves(results: Sequence[FinetunedSystem]) -> pd.DataFrame:
    """Columns system, step, loss, dev_ndcg, seconds; nan where a step has no measurement (or, step 0, no loss)."""
    frames = [pd.DataFrame(result.curve).assign(system=result.system) for result in results]
    columns = ["system", "step", "loss", "dev_ndcg", "seconds"]
    return pd.concat(frames, ignore_index=True).reindex(columns=columns)


def training_summary(results: Sequence[FinetunedSystem]) -> pd.DataFrame:
    """Columns system, trainable_parameters, steps, best_step, seconds, dev_before, dev_best."""
    rows = []
    for result in results:
        kept = next(record for record in result.curve if record.get("kept"))
        rows.append(
            {
                "system": result.system,
                "trainable_parameters": result.trainable_parameters,
                "steps": result.curve[-1]["step"],
                "best_step": kept["step"],
                "seconds": result.curve[-1]["seconds"],
                "dev_before": result.curve[0]["dev_ndcg"],
                "dev_best": kept["dev_ndcg"],
            }
        )
    return pd.DataFrame(rows)
