"""Contrastive fine-tuning of the compared systems: the same data, negatives, steps and seed for all.

The loop is sentence-transformers' ``MultiVectorEncoderTrainer``, the adapter peft's LoRA, the loss
:class:`~diffret_lib.training.losses.JointInfoNCE`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from pydantic import Field
from sentence_transformers import MultiVectorEncoder, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from diffret_lib.addresses import address, fingerprint
from diffret_lib.cache import atomic_path, fetch, work_folder, write_text
from diffret_lib.config import Profile, Training, slug
from diffret_lib.data.collection import Collection
from diffret_lib.models.prompts import SIDES
from diffret_lib.retrieval.metrics import METRIC, per_query
from diffret_lib.retrieval.search import rank, to_results
from diffret_lib.retrieval.systems import Retriever
from diffret_lib.training.lora import (
    AdapterCheckpoints, Checkpoints, Progress, add_lora, export_adapter, read_state, train_to_end,
)  # fmt: skip
from diffret_lib.training.losses import FalseNegatives, JointInfoNCE

#: Seconds between checkpoints, besides those at every measurement.
CHECKPOINT_SECONDS = 300
#: Settings of a reader that its model card names.
COUNTS = ("k_query", "k_passage", "max_new_tokens")


class Recipe(Training):
    """Settings of a training, besides the backbone, the reader and the data.

    ``rank``, ``alpha`` and ``dropout`` are those of LoRA, ``temperature`` that of the dense scores.  The learning
    rate falls linearly to 0 and does not rise first: an adapter starts as no change at all.
    """

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=0.01, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = 0


@dataclass(frozen=True)
class TrainingData:
    """The data that all systems are trained on.

    ``negatives`` has the columns query_id, passage_id and source, ``rows`` the texts query, positive, negative_1,
    ..., negative_n.
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
        A record for each step: step, seconds (measurements included), loss, dense_loss, sparse_loss, learning_rate
        and grad_norm, and dev_ndcg where it was measured (at step 0 alone).  ``kept`` is true for the step of the
        adapter's weights: the best measured one after step 0, even where step 0 is better.
    trainable_parameters : int
    """

    system: str
    adapter: Path
    curve: list[dict[str, Any]]
    trainable_parameters: int

    @classmethod
    def load(cls, folder: Path) -> FinetunedSystem:
        """Read an entry that :func:`finetune` made."""
        about = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
        return cls(about["system"], folder / "adapter", curve, about["trainable_parameters"])


# -- recipe and data ---------------------------------------------------------------------------------------


def recipe_of(profile: Profile) -> Recipe:
    """The recipe of a profile."""
    return Recipe(**profile.training.model_dump(), seed=profile.seed)


def training_data(collection: Collection, negatives: pd.DataFrame) -> TrainingData:
    """Rows of a collection with its hard negatives (columns query_id, passage_id, source)."""
    rows = training_rows(collection, negatives)
    return TrainingData(collection, negatives, rows, false_negatives(collection, rows))


def training_rows(collection: Collection, negatives: pd.DataFrame) -> Dataset:
    """A row for each query and passage relevant to it, with the query's hard negatives; all texts."""
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    mined = negatives.groupby("query_id")["passage_id"].agg(list)
    rows = []
    for query_id, query in zip(collection.query_ids, collection.queries, strict=True):
        others = {f"negative_{i}": texts[p] for i, p in enumerate(mined[query_id], 1)}
        rows += [{"query": query, "positive": texts[p], **others} for p in collection.relevant(query_id)]
    return Dataset.from_list(rows)


def false_negatives(collection: Collection, rows: Dataset) -> FalseNegatives:
    """The passages of the rows that are relevant to each query; equal texts are the same."""
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    codes: dict[str, int] = {}
    for text in texts.values():
        codes.setdefault(text, len(codes))
    relevant: dict[str, set[int]] = defaultdict(set)
    for query_id, query in zip(collection.query_ids, collection.queries, strict=True):
        relevant[query].update(codes[texts[p]] for p in collection.relevant(query_id))
    columns = [name for name in rows.column_names if name != "query"]
    passages = torch.tensor([[codes[text] for text in rows[name]] for name in columns]).T
    width = max(map(len, relevant.values()))
    padded = [sorted(relevant[q]) + [-1] * (width - len(relevant[q])) for q in rows["query"]]
    return FalseNegatives(passages.contiguous(), torch.tensor(padded))


# -- training ----------------------------------------------------------------------------------------------


def finetune(
    name: str, retriever: Retriever, data: TrainingData, recipe: Recipe, development: Collection, *,
    training_limits: Mapping[str, int], progress: bool = True, callbacks: Sequence[TrainerCallback] = (),
) -> FinetunedSystem:  # fmt: skip
    """Train a system, go on where an earlier call was interrupted, or give what there is already.

    The result is an entry of the cache: ``adapter/`` (a PEFT adapter), ``curve.jsonl`` and ``recipe.json``.

    Parameters
    ----------
    retriever : Retriever
        The zero-shot system, at the limits of the evaluation; its backbone stays as it is.
    development : Collection
        Where nDCG@10 is measured on the way.
    training_limits : dict
        Options of the retriever that are others in training (``max_passage_tokens``).
    callbacks : sequence of TrainerCallback
        Additional trainer callbacks.
    """
    backbone, settings = retriever.backbone, retriever.reader.get_config_dict()
    about = {
        "system": name,
        "backbone": {"name": backbone.spec.name, "fingerprint": backbone.fingerprint},
        "counts": {count: settings[count] for count in COUNTS if count in settings},
        "limits": {"training": settings | training_limits, "development": settings},
        "recipe": recipe.model_dump(mode="json"),
        "data": data.fingerprint,
        "development": development.fingerprint,
    }
    code = [_train, type(retriever), type(retriever.reader)]
    key = address(code, about, [retriever.fingerprint(side) for side in SIDES])

    def make(folder: Path) -> None:
        model = add_lora(
            backbone, rank=recipe.rank, alpha=recipe.alpha, lora_dropout=recipe.dropout, seed=recipe.seed,
            dtype=torch.float32,
        )  # fmt: skip
        adapter, curve = _train(
            retriever, model, data, recipe, development, training_limits, work_folder("adapters", key),
            [*([Progress(name, {"loss": "loss", f"eval_{METRIC}": "dev"})] if progress else []), *callbacks],
        )  # fmt: skip
        shutil.copytree(adapter, folder / "adapter")
        write_text(folder / "curve.jsonl", "".join(json.dumps(record) + "\n" for record in curve))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        write_text(folder / "recipe.json", json.dumps(about | {"trainable_parameters": trainable}, indent=1) + "\n")

    return FinetunedSystem.load(fetch("adapters", key, make))


def _train(
    retriever: Retriever, model: PeftModel, data: TrainingData, recipe: Recipe, development: Collection,
    training_limits: Mapping[str, int], work: Path, callbacks: Sequence[TrainerCallback],
) -> tuple[Path, list[dict[str, Any]]]:  # fmt: skip
    """Train the adapter of ``model``; the folder of the kept one in ``work``, and the curve."""
    backbone = replace(retriever.backbone, model=model)
    encoder = retriever.on(backbone, **training_limits).multi_vector_encoder()
    arguments = MultiVectorEncoderTrainingArguments(
        output_dir=str(work), report_to="none", disable_tqdm=True, dataloader_pin_memory=False, seed=recipe.seed,
        use_cpu=backbone.device.type == "cpu", max_steps=recipe.steps, per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate, lr_scheduler_type="linear", optim="adamw_torch", weight_decay=0.0,
        max_grad_norm=recipe.max_grad_norm, logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=recipe.evaluate_every, load_best_model_at_end=True,
        metric_for_best_model=METRIC, greater_is_better=True,
        save_strategy="steps", save_steps=recipe.evaluate_every, restore_callback_states_from_checkpoint=True,
        save_total_limit=3,  # the best, the last, and the one before, which is whole while the last is written
    )  # fmt: skip
    order = step_order(len(data.rows), recipe.steps * recipe.batch_size, recipe.seed)
    rows = data.rows.add_column("label", list(range(len(data.rows)))).select(order)
    loss = JointInfoNCE(
        encoder, temperature=recipe.temperature, mini_batch_size=recipe.mini_batch, false_negatives=data.false_negatives
    )
    trainer = AdapterTrainer(
        encoder, arguments, train_dataset=rows, loss=loss, evaluator=Measurement(retriever.on(backbone), development),
        callbacks=[EarlyStoppingCallback(recipe.patience), Checkpoints(CHECKPOINT_SECONDS), *callbacks],
    )  # fmt: skip
    trainer.base = retriever.backbone.weights

    def has_ended(state: TrainerState) -> bool:
        stopping = state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]
        return state.global_step >= recipe.steps or stopping["early_stopping_patience_counter"] >= recipe.patience

    adapter, state = train_to_end(trainer, has_ended)
    return adapter, _curve(state.log_history, state.best_global_step)


def step_order(rows: int, count: int, seed: int) -> list[int]:
    """Row numbers of the whole training, one permutation of the rows after another.

    It is one epoch for the trainer, which then finds its place in it again by the number of steps alone.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(rows) for _ in range(math.ceil(count / rows))])[:count].tolist()


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


class AdapterTrainer(AdapterCheckpoints, MultiVectorEncoderTrainer):
    """The library's trainer, with checkpoints of the adapter alone.

    sentence-transformers saves the model as a folder that loads by itself and builds the model anew from it; a
    reader's folder would name the backbone by a path, and a diffusion backbone is not what lies there: its own
    adapter has been merged into it in memory.
    """

    @property
    def adapted(self) -> PeftModel:
        return self.model[0].model

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card is written, so none is prepared (it would tokenise the training data)."""

    def get_batch_sampler(self, dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
        """Rows are in the order of the steps already."""
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self._start, self._before = time.perf_counter(), 0.0
        self.args.eval_on_start = not resume_from_checkpoint
        if resume_from_checkpoint:
            history = read_state(Path(resume_from_checkpoint)).log_history
            self._before = max((record.get("seconds", 0.0) for record in history), default=0.0)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the loss's parts, and the seconds of this training, earlier calls included."""
        if "loss" in logs:
            logs = logs | {f"{side}_loss": float(part) for side, part in self.loss.parts.items()}
        super().log(logs | {"seconds": self._before + time.perf_counter() - self._start}, start_time)


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


# -- results -----------------------------------------------------------------------------------------------

_CARD = """---
library_name: peft
license: apache-2.0
tags: [lora, information-retrieval]
---
# {system}, fine-tuned

A LoRA adapter on `{backbone}` of diffret, trained by notebook 03. The weights are those of the
training, rounded to bfloat16. `recipe.json` has the recipe, the fingerprints of the data and the settings of the
reader, `curve.jsonl` the losses and nDCG@10 on the development collection.

```python
retriever = {reader}("{backbone}"{counts}).with_adapter("path/of/this/folder")
```
"""


def publish_adapter(trained: FinetunedSystem, parent: Path) -> Path:
    """Write a trained adapter to ``parent/<system>``: weights in bfloat16, half the size, curve, recipe and a card."""
    folder, entry = parent / slug(trained.system), trained.adapter.parent
    about = json.loads((entry / "recipe.json").read_text(encoding="utf-8"))
    with atomic_path(folder) as temporary:
        export_adapter(trained.adapter, temporary)
        for file in ("curve.jsonl", "recipe.json"):
            shutil.copyfile(entry / file, temporary / file)
        counts = "".join(f", {name}={count}" for name, count in about["counts"].items())
        reader, backbone = trained.system.split()[0], about["backbone"]["name"]
        card = _CARD.format(system=trained.system, backbone=backbone, reader=reader, counts=counts)
        write_text(temporary / "README.md", card)
    return folder


def learning_curves(results: Sequence[FinetunedSystem]) -> pd.DataFrame:
    """Columns system, step, loss, dev_ndcg, seconds; nan where a step has no measurement (or, step 0, no loss)."""
    frames = [pd.DataFrame(result.curve).assign(system=result.system) for result in results]
    columns = ["system", "step", "loss", "dev_ndcg", "seconds"]
    return pd.concat(frames, ignore_index=True).reindex(columns=columns)


def training_summary(results: Sequence[FinetunedSystem]) -> pd.DataFrame:
    """Columns system, trainable_parameters, steps, best_step, seconds, dev_before, dev_best."""
    rows = []
    for result in results:
        first, last = result.curve[0], result.curve[-1]
        kept = next(record for record in result.curve if record.get("kept"))
        row = {"system": result.system, "trainable_parameters": result.trainable_parameters, "steps": last["step"]}
        row |= {"best_step": kept["step"], "seconds": last["seconds"]}
        rows.append(row | {"dev_before": first["dev_ndcg"], "dev_best": kept["dev_ndcg"]})
    return pd.DataFrame(rows)
