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
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback

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


class Recipe(Training):
    """Settings of a training: of LoRA, and ``temperature`` of the dense scores.

    The learning rate falls linearly to 0 and does not rise first: an adapter starts as no change at all.
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

    ``negatives`` has the columns query_id, passage_id, source, ``rows`` query, positive, negative_1, ..., negative_n.
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
    """A trained adapter (a PEFT folder) and how it came about.

    ``curve`` has a record for each step: step, seconds (measurements included), loss, dense_loss, sparse_loss,
    learning_rate and grad_norm, and dev_ndcg where it was measured (at step 0 alone).  ``kept`` is true for the step
    of the adapter's weights: the best measured one after step 0, even where step 0 is better.
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


def recipe_of(profile: Profile) -> Recipe:
    """The recipe of a profile."""
    return Recipe(**profile.training.model_dump(), seed=profile.seed)


def training_data(collection: Collection, negatives: pd.DataFrame) -> TrainingData:
    """A row for each query and passage relevant to it, with the query's hard negatives; equal texts are the same."""
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    mined = negatives.groupby("query_id")["passage_id"].agg(list)
    rows, relevant = [], defaultdict(set)
    for query_id, query in zip(collection.query_ids, collection.queries, strict=True):
        positives = [texts[p] for p in collection.relevant(query_id)]
        others = {f"negative_{i}": texts[p] for i, p in enumerate(mined[query_id], 1)}
        rows += [{"query": query, "positive": text, **others} for text in positives]
        relevant[query].update(positives)
    codes = {text: code for code, text in enumerate(dict.fromkeys(texts.values()))}
    passages = torch.tensor([[codes[text] for name, text in row.items() if name != "query"] for row in rows])
    known = [torch.tensor(sorted(codes[text] for text in relevant[row["query"]])) for row in rows]
    known = pad_sequence(known, batch_first=True, padding_value=-1)
    return TrainingData(collection, negatives, Dataset.from_list(rows), FalseNegatives(passages, known))


def finetune(
    name: str, retriever: Retriever, data: TrainingData, recipe: Recipe, development: Collection, *,
    training_limits: Mapping[str, int], callbacks: Sequence[TrainerCallback] = (),
) -> FinetunedSystem:  # fmt: skip
    """Train a system, go on where an earlier call was interrupted, or give what there is already.

    ``retriever`` is the zero-shot system at the limits of the evaluation, and stays as it is; ``training_limits`` are
    its options that are others in training; on ``development`` nDCG@10 is measured on the way.
    """
    backbone, settings = retriever.backbone, retriever.reader.get_config_dict()
    about = {
        "system": name,
        "backbone": {"name": backbone.spec.name, "fingerprint": backbone.fingerprint},
        "counts": {n: settings[n] for n in ("k_query", "k_passage", "max_new_tokens") if n in settings},
        "limits": {"training": settings | training_limits, "development": settings},
        "recipe": recipe.model_dump(mode="json"),
        "data": data.fingerprint,
        "development": development.fingerprint,
    }
    code = [finetune, type(retriever), type(retriever.reader)]
    key = address(code, about, [retriever.fingerprint(side) for side in SIDES])

    def make(folder: Path) -> None:
        lora = {"rank": recipe.rank, "alpha": recipe.alpha, "lora_dropout": recipe.dropout}
        model = add_lora(backbone, seed=recipe.seed, dtype=torch.float32, **lora)
        trained = replace(backbone, model=model)
        encoder = retriever.on(trained, **training_limits).multi_vector_encoder()
        rows = data.rows.add_column("label", list(range(len(data.rows))))
        loss = JointInfoNCE(
            encoder, temperature=recipe.temperature, mini_batch_size=recipe.mini_batch,
            false_negatives=data.false_negatives,
        )  # fmt: skip
        progress = Progress(name, {"loss": "loss", f"eval_{METRIC}": "dev"})
        trainer = AdapterTrainer(
            encoder, _arguments(recipe, work_folder("adapters", key), backbone.device.type == "cpu"), loss=loss,
            train_dataset=rows.select(step_order(len(rows), recipe.steps * recipe.batch_size, recipe.seed)),
            evaluator=Measurement(retriever.on(trained), development),
            callbacks=[EarlyStoppingCallback(recipe.patience), Checkpoints(CHECKPOINT_SECONDS), progress, *callbacks],
        )  # fmt: skip
        trainer.base = backbone.weights
        adapter, state = train_to_end(trainer)
        shutil.copytree(adapter, folder / "adapter")
        curve = _curve(state.log_history, state.best_global_step)
        write_text(folder / "curve.jsonl", "".join(json.dumps(record) + "\n" for record in curve))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        write_text(folder / "recipe.json", json.dumps(about | {"trainable_parameters": trainable}, indent=1) + "\n")

    return FinetunedSystem.load(fetch("adapters", key, make))


def _arguments(recipe: Recipe, work: Path, use_cpu: bool) -> MultiVectorEncoderTrainingArguments:
    return MultiVectorEncoderTrainingArguments(
        output_dir=str(work), report_to="none", disable_tqdm=True, dataloader_pin_memory=False, seed=recipe.seed,
        use_cpu=use_cpu, max_steps=recipe.steps, per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate, lr_scheduler_type="linear", optim="adamw_torch", weight_decay=0.0,
        max_grad_norm=recipe.max_grad_norm, logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=recipe.evaluate_every, load_best_model_at_end=True,
        metric_for_best_model=METRIC, greater_is_better=True,
        save_strategy="steps", save_steps=recipe.evaluate_every, restore_callback_states_from_checkpoint=True,
        save_total_limit=3,  # the best, the last, and the one before, which is whole while the last is written
    )  # fmt: skip


def step_order(rows: int, count: int, seed: int) -> list[int]:
    """Row numbers of the whole training, one permutation after another: for the trainer, a single epoch."""
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
        queries = retriever.encode_queries(collection.queries, progress=False)
        passages = retriever.encode_passages(collection.passages, progress=False)
        ranked = rank(queries, passages, "hybrid" if "hybrid" in retriever.modes else "dense")
        run = to_results(*ranked, collection.query_ids, collection.passage_ids)
        return {METRIC: float(per_query(collection.qrels, run, (METRIC,))[METRIC].mean())}


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
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the loss's parts, and the seconds of this training, earlier calls included."""
        if "loss" in logs:
            logs = logs | {f"{side}_loss": float(part) for side, part in self.loss.parts.items()}
        super().log(logs | {"seconds": time.perf_counter() - self._start}, start_time)


def _curve(history: Sequence[Mapping[str, Any]], kept: int) -> list[dict[str, Any]]:
    """One record a step out of the trainer's history."""
    same = ("loss", "dense_loss", "sparse_loss", "learning_rate", "grad_norm", "seconds")
    names = {f"eval_{METRIC}": "dev_ndcg", **dict(zip(same, same, strict=True))}
    curve: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "loss" in entry or f"eval_{METRIC}" in entry:
            record = curve.setdefault(entry["step"], {"step": entry["step"]})
            record.update({new: entry[old] for old, new in names.items() if old in entry})
    curve[kept]["kept"] = True
    return list(curve.values())


_CARD = """---
library_name: peft
license: apache-2.0
tags: [lora, information-retrieval]
---
# {system}, fine-tuned

A LoRA adapter on `{backbone}` of diffret, rounded to bfloat16. `recipe.json` has its recipe and data, `curve.jsonl`
the losses and nDCG@10 on the development collection.

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
    return pd.concat(frames, ignore_index=True).reindex(columns=["system", "step", "loss", "dev_ndcg", "seconds"])


def training_summary(results: Sequence[FinetunedSystem]) -> pd.DataFrame:
    """Columns system, trainable_parameters, steps, best_step, seconds, dev_before, dev_best."""
    rows = []
    for result in results:
        first, last = result.curve[0], result.curve[-1]
        kept = next(record for record in result.curve if record.get("kept"))
        rows.append((
            result.system, result.trainable_parameters, last["step"], kept["step"], last["seconds"],
            first["dev_ndcg"], kept["dev_ndcg"],
        ))  # fmt: skip
    columns = ["system", "trainable_parameters", "steps", "best_step", "seconds", "dev_before", "dev_best"]
    return pd.DataFrame(rows, columns=columns)
