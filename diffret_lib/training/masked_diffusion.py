"""Objective, data and training of the adaptation of an autoregressive LM into a masked diffusion LM.

The recipe follows Dream (arXiv 2508.15487, section 3) at small scale: attention of the parent looks both ways, and
the weights are trained with the masked-diffusion objective

.. math:: L = E_{t, m} [ -\\frac{1}{|m|} \\sum_{i \\in m} \\log p(x_i \\mid x_{\\setminus m}) ],

where each sequence draws its masking ratio t, and token i is read at position i - 1 (Dream's *shift*).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from diffret_lib.models.prompts import (
    ENGLISH_STOP_WORDS,
    QUOTE,
    RetrievalPrompt,
    Side,
    content_words,
    encode_plain,
    pad_left,
)
from diffret_lib.training.lora import AdapterCheckpoints, Checkpoints, Progress, train_to_end

#: Tokens in the target distribution of a masked position.
TARGETS = 33
#: Tokens of a text that the parent reads to answer.
ANSWERED_TOKENS = 192
#: Numbers of tokens of which one is drawn for an answer.
MASK_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage of the adaptation.

    ``tokens`` counts the tokens of all sequences of the stage, each taken as ``sequence_length``; a step takes
    ``batch_size`` sequences.  The learning rate warms up and falls along a cosine to ``final_learning_rate``, which it
    reaches after ``schedule_tokens`` (by default at the end).  A stage that ``continues`` trains the adapter of the
    stage before, another a new one on top.  With ``answered_passages`` every second sequence is a retrieval prompt that
    the parent answered, for that many passages and a quarter as many queries.
    """

    stage: str
    tokens: int
    schedule_tokens: int | None = None
    continues: bool = False
    sequence_length: int = 256
    batch_size: int = 64
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    final_learning_rate: float = 5e-5
    warmup_steps: int = 100
    seed: int = 0
    answered_passages: int = 0

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence_length * self.batch_size

    @property
    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return max(1, self.tokens // self.step_tokens)

    @property
    def text_rows(self) -> int:
        """Sequences of plain text that the stage takes."""
        return self.steps * self.batch_size // (2 if self.answered_passages else 1)


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, *, limit: int) -> np.ndarray:
    """Concatenate tokenised texts, end-of-text between them, and cut into at most ``limit`` rows; int64 [n, length]."""
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    parts, size = [np.empty(0, np.int64)], 0
    for start in range(0, len(texts), 256):
        block = list(texts[start : start + 256])
        for ids in tokenizer(block, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            parts.append(np.array([separator, *ids], np.int64))
            size += len(parts[-1])
        if size >= limit * length:
            break
    rows = min(limit, size // length)
    return np.concatenate(parts)[: rows * length].reshape(rows, length)


@dataclass(frozen=True)
class Answer:
    """A retrieval prompt with the parent's answer and the parent's own distribution at each answer token.

    ``prompt`` and ``tail`` are the token ids before and after the answer, ``ids`` the n tokens of the answer;
    ``soft_ids`` and ``soft_probs`` [n, TARGETS] are the parent's most probable content tokens at each place, and
    their probabilities (rows sum to 1).
    """

    prompt: np.ndarray
    ids: np.ndarray
    tail: np.ndarray
    soft_ids: np.ndarray
    soft_probs: np.ndarray


def content_token_mask(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokens of the vocabulary that begin a content word: letters only, two or more, no stop word; bool [V]."""
    special = set(tokenizer.all_special_ids)
    keep = torch.zeros(len(tokenizer), dtype=torch.bool)
    for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        word = text.strip().lower()
        keep[i] = len(word) > 1 and word.isalpha() and word not in ENGLISH_STOP_WORDS and i not in special
    return keep


@torch.no_grad()
def parent_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, side: Side, few_words: bool
) -> list[Answer]:
    """Let the autoregressive parent answer the retrieval prompt for each text (its first ``ANSWERED_TOKENS``).

    It decodes greedily, at most 20 tokens, or 6 for one word.  Of its answer up to the closing quote the content
    words are kept, once each; answers without any are dropped.  A second pass reads the parent's distribution at
    each token of what was kept, restricted to content tokens.
    """
    prompt = RetrievalPrompt(tokenizer, side, few_words)
    allowed = content_token_mask(tokenizer).to(model.device)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers: dict[int, Answer] = {}
    label = f"{'a few words' if few_words else 'one word'} for each {side}"
    batch_size = 256 if model.device.type == "cuda" else 24
    for start in tqdm(range(0, len(order), batch_size), desc=f"answers of the parent, {label}"):
        chosen = order[start : start + batch_size]
        rows = prompt.ids([texts[i] for i in chosen], ANSWERED_TOKENS)
        batch = pad_left(rows, tokenizer.pad_token_id, model.device)
        out = model.generate(**batch, max_new_tokens=20 if few_words else 6, do_sample=False)
        kept = []
        for i, row, generated in zip(chosen, rows, out[:, batch["input_ids"].shape[1] :], strict=True):
            words = content_words(tokenizer.decode(generated, skip_special_tokens=True).split(QUOTE)[0])
            words = [w for w in words if w.isalpha() and w.isascii()][: None if few_words else 1]
            if words:
                kept.append((i, row, encode_plain(tokenizer, [" ".join(words)])[0]))
        if not kept:
            continue
        batch = pad_left([row + ids for _, row, ids in kept], tokenizer.pad_token_id, model.device)
        logits = model(**batch, logits_to_keep=max(len(ids) for *_, ids in kept) + 1, use_cache=False).logits
        for (i, row, ids), logit in zip(kept, logits, strict=True):
            logit = logit[-len(ids) - 1 : -1].float().masked_fill(~allowed, -torch.inf)
            probs, top = logit.softmax(-1).topk(TARGETS, dim=-1)
            parts = [np.asarray(part, np.int64) for part in (row, ids, prompt.tail)]
            answers[i] = Answer(*parts, top.cpu().numpy(), (probs / probs.sum(-1, keepdim=True)).cpu().numpy())
    return [answers[i] for i in sorted(answers)]


def answer_texts(texts: Sequence[str], passages: int, seed: int = 0) -> dict[Side, list[str]]:
    """Texts for the parent to answer: ``passages`` passages and a quarter as many queries.

    A query is the first paragraph of a docstring.  Every other passage leaves that paragraph out, as the passages
    of the embedded collections do.
    """
    rng = random.Random(seed)
    out: dict[Side, list[str]] = {"passage": [], "query": []}
    for text in (text for text in texts if len(text) > 250):
        first, _, rest = text.partition("\n\n")
        if len(out["query"]) < passages // 4 and rng.random() < 0.25 and len(first) < 300:
            out["query"].append(first)
        elif len(out["passage"]) < passages:
            out["passage"].append(rest if rng.random() < 0.5 and len(rest) > 200 else text)
        else:
            break
    return out


def collect_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], passages: int, seed: int
) -> list[Answer]:
    """The parent's answers, a third of them to the one-word prompt, shuffled."""
    answers: list[Answer] = []
    for side, group in answer_texts(texts, passages, seed).items():
        third = len(group) // 3
        answers += parent_answers(model, tokenizer, group[:third], side=side, few_words=False)
        answers += parent_answers(model, tokenizer, group[third:], side=side, few_words=True)
    random.Random(seed).shuffle(answers)
    return answers


class MaskedRows(Dataset):
    """The ``length`` sequences of a stage, masked; an item is the same on every access, also in a resumed run.

    Places in a batch take rows of text and answers in turn (text alone without answers), both from the start again
    when they end, then masked otherwise.  The masking ratio is stratified: row b of a batch of B has the ratio
    (b + u) / B, u common to the batch and uniform on [0, 1).  In an answer only the answer is masked, half of the time
    all of it, as in retrieval; the number of its tokens is drawn from ``MASK_COUNTS``.  The first token of a row is
    never masked: nothing comes before it.
    """

    def __init__(
        self, text: np.ndarray, mask_id: int, *, length: int, batch_size: int, seed: int,
        answers: Sequence[Answer] = (),
    ) -> None:  # fmt: skip
        self.text, self.mask_id, self.answers, self.length = text, mask_id, answers, length
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        batch, place = divmod(i, self.batch_size)
        offset = np.random.default_rng([self.seed, batch, 0]).random()
        rng = np.random.default_rng([self.seed, i, 1])
        ratio = max(0.05, (place + offset) / self.batch_size)
        if len(self.answers) and place % 2:
            answer = self.answers[(i // 2) % len(self.answers)]
            ratio = ratio if rng.random() < 0.5 else 1.0
            n = int(rng.choice([k for k in MASK_COUNTS if k <= len(answer.ids)]))
            ids = np.asarray([*answer.prompt, *answer.ids[:n], *answer.tail])
            place = _draw(rng, ratio, np.arange(n))
            chosen = place + len(answer.prompt)
            # half the answer itself, half what else the parent would have said there
            soft_ids = np.column_stack([answer.ids[place], answer.soft_ids[place, : TARGETS - 1]])
            soft = answer.soft_probs[place, : TARGETS - 1]
            probs = np.column_stack([np.full(len(place), 0.5), 0.5 * soft / soft.sum(1, keepdims=True)])
        else:
            ids = self.text[(i // 2 if len(self.answers) else i) % len(self.text)]
            chosen = _draw(rng, ratio, np.arange(1, len(ids)))
            soft_ids, probs = np.repeat(ids[chosen, None], TARGETS, 1), np.eye(1, TARGETS).repeat(len(chosen), 0)
        masked = np.array(ids)
        masked[chosen] = self.mask_id
        arrays = {"input_ids": masked, "masked": chosen, "target_ids": soft_ids, "target_probs": np.float32(probs)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _draw(rng: np.random.Generator, ratio: float, places: np.ndarray) -> np.ndarray:
    """Some of the places, at least one."""
    chosen = places[rng.random(len(places)) < ratio]
    return chosen if len(chosen) else rng.choice(places, 1)


def collate(items: list[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """Left-pad a batch; masked places become (row, column) pairs."""
    batch = pad_left([item["input_ids"] for item in items], pad_id)
    width = batch["input_ids"].shape[1]
    rows = torch.cat([torch.full_like(item["masked"], r) for r, item in enumerate(items)])
    columns = torch.cat([item["masked"] + width - len(item["input_ids"]) for item in items])
    targets = {name: torch.cat([item[name] for item in items]) for name in ("target_ids", "target_probs")}
    return batch | {"masked": torch.stack([rows, columns])} | targets


def masked_cross_entropy(model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy (nats per token) at the masked positions, token i read at position i - 1.

    The target of a position is a distribution (all mass on the token itself for plain text).  The vocabulary
    projection is computed at the masked positions alone.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    mask = batch["attention_mask"]
    hidden = causal_lm.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=mask if not mask.all() else None,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False, is_causal=False,
    ).last_hidden_state  # fmt: skip
    rows, columns = batch["masked"]
    log_probs = causal_lm.get_output_embeddings()(hidden[rows, columns - 1]).float().log_softmax(-1)
    return -(batch["target_probs"] * log_probs.gather(1, batch["target_ids"])).sum(1).mean()


class DiffusionTrainer(AdapterCheckpoints, Trainer):
    """:class:`transformers.Trainer` with the masked-diffusion loss and its own length of the schedule."""

    schedule_steps: int

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(self.schedule_steps, optimizer)

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any) -> Any:
        loss = masked_cross_entropy(model, inputs)
        return (loss, None) if return_outputs else loss


class _HeldOut(TrainerCallback):
    """Adds the held-out losses to the trainer's history every so many steps (0: never)."""

    def __init__(self, evaluate: Callable[[PeftModel], dict[str, Any]] | None, every: int) -> None:
        self.evaluate, self.every = evaluate, every

    def on_step_end(self, args: Any, state: Any, control: Any, model: PeftModel = None, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            state.log_history.append({"step": state.global_step} | self.evaluate(model))


def train(
    model: PeftModel, base: str, dataset: Dataset, recipe: Recipe, work: Path, *, pad_id: int,
    evaluate: Callable[[PeftModel], dict[str, Any]] | None = None, evaluate_every: int = 0, save_every: int = 50,
) -> tuple[Path, list[dict[str, Any]]]:  # fmt: skip
    """Run one stage; started again with the same folder ``work`` it goes on from its last whole checkpoint.

    ``base`` is the fingerprint of the weights that the adapter is for.  With a multiple of 10 in ``save_every`` an
    interrupted training has the same curve, too: the loss is logged every 10 steps.  Products are in the dtypes of the
    weights.

    Returns the adapter's folder in ``work``, and the curve: records with stage, step, tokens_seen, and loss, grad_norm,
    learning_rate and epoch, or what ``evaluate`` returns (held_out, ...).
    """
    arguments = TrainingArguments(
        output_dir=str(work), report_to="none", disable_tqdm=True, remove_unused_columns=False, seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(), train_sampling_strategy="sequential",
        max_steps=recipe.steps, per_device_train_batch_size=recipe.batch_size, logging_steps=min(10, recipe.steps),
        learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate / recipe.learning_rate},
        weight_decay=0.0, adam_beta2=0.99, max_grad_norm=1.0, save_steps=save_every, dataloader_pin_memory=False,
        save_total_limit=2,  # the last, and the one before, which is whole while the last is written
    )  # fmt: skip
    trainer = DiffusionTrainer(
        model, arguments, train_dataset=dataset, data_collator=lambda items: collate(items, pad_id),
        callbacks=[Checkpoints(), Progress(recipe.stage, {"loss": "loss"}), _HeldOut(evaluate, evaluate_every)],
    )  # fmt: skip
    trainer.base = base
    trainer.schedule_steps = max(1, (recipe.schedule_tokens or recipe.tokens) // recipe.step_tokens)
    adapter, state = train_to_end(trainer)
    records = [r for r in state.log_history if any(key == "loss" or key.startswith("held_out") for key in r)]
    seen = [{"step": record["step"], "tokens_seen": record["step"] * recipe.step_tokens} for record in records]
    return adapter, [{"stage": recipe.stage} | a | b for a, b in zip(seen, records, strict=True)]


@torch.no_grad()
def held_out_cross_entropy(
    model: PreTrainedModel | PeftModel, rows: np.ndarray, mask_id: int, *, bfloat16: bool = False,
    progress: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Cross-entropy (nats per masked token) of rows [n, length] at masking ratios (as text), always the same masks.

    With ``bfloat16`` it is computed under autocast, which is slow on a processor without products of it.
    """
    was_training = model.training
    model.eval()
    out = {}
    for ratio in (0.15, 0.5, 0.9):
        rng = np.random.default_rng([0, round(ratio * 1000)])
        total, count = 0.0, 0
        for start in tqdm(range(0, len(rows), 8), desc=f"cross-entropy at {ratio:.0%} masking", disable=not progress):
            ids = torch.from_numpy(np.asarray(rows[start : start + 8]))
            chosen = torch.from_numpy(rng.random(ids.shape) < ratio)
            chosen[:, 0] = False
            masked = int(chosen.sum())
            batch = {
                "input_ids": ids.masked_fill(chosen, mask_id), "attention_mask": torch.ones_like(ids),
                "masked": torch.stack(chosen.nonzero(as_tuple=True)),
                "target_ids": ids[chosen][:, None], "target_probs": torch.ones(masked, 1),
            }  # fmt: skip
            batch = {k: v.to(model.device) for k, v in batch.items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
                total += float(masked_cross_entropy(model, batch)) * masked
            count += masked
        out[f"{ratio:g}"] = total / count
    model.train(was_training)
    return out
