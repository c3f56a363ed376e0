"""Adaptation of an autoregressive LM into a masked diffusion LM (stage losses, data, training).

The recipe follows Dream (arXiv 2508.15487, section 3) at small scale: take the weights of an
autoregressive parent, let attention look both ways, and train with the masked-diffusion objective

.. math:: L = E_{t, m} [ -\\frac{1}{|m|} \\sum_{i \\in m} \\log p(x_i \\mid x_{\\setminus m}) ],

where each sequence draws its masking ratio t, and token i is read at position i - 1 (Dream's *shift*,
which keeps the parent's habit of predicting the next token).  Three stages, each from where the one before ended:

``documentation``
    packed documentation text (:mod:`diffret_lib.training_text`);
``answers``
    the retrieval prompt with an answer of the autoregressive parent, masked at random ratios, fully
    masked included, mixed half and half with documentation;
``refinement``
    the same mixture of other documentation and answers to other texts, the learning rate raised once more.

The result is a PEFT adapter: LoRA on all linear layers and one trained embedding row for the mask token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from diffret_lib.cache import atomic_path
from diffret_lib.prompts import ENGLISH_STOP_WORDS, QUOTE, RetrievalPrompt, content_words, encode_plain

#: Tokens in the target distribution of a masked position.
TARGETS = 33


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage of the adaptation.

    ``tokens`` counts the tokens of all sequences of the stage, each taken as ``sequence_length``; a step takes
    ``batch_size`` sequences.  The learning rate warms up and falls along a cosine to ``final_learning_rate``,
    which it reaches after ``schedule_tokens`` (by default at the end).  With ``answered_passages`` every second
    sequence is a retrieval prompt that the parent answered, for that many passages and a quarter as many queries.
    """

    stage: str = "documentation"
    tokens: int = 563_200
    schedule_tokens: int | None = None
    sequence_length: int = 256
    batch_size: int = 4
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    final_learning_rate: float = 2e-4
    warmup_steps: int = 30
    seed: int = 0
    answered_passages: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.sequence_length * self.batch_size))

    @property
    def schedule_steps(self) -> int:
        return max(1, (self.schedule_tokens or self.tokens) // (self.sequence_length * self.batch_size))

    @property
    def documentation_rows(self) -> int:
        """Sequences of documentation that the stage takes."""
        return self.steps * self.batch_size // (2 if self.answered_passages else 1)


DOCUMENTATION = Recipe(schedule_tokens=921_600)
ANSWERS = Recipe(
    stage="answers", tokens=307_200, learning_rate=5e-4, final_learning_rate=2e-5, warmup_steps=20, seed=1,
    answered_passages=480,
)  # fmt: skip
REFINEMENT = replace(ANSWERS, stage="refinement", tokens=409_600, learning_rate=7e-4, seed=2, answered_passages=640)
#: The stages of the committed adapter.
STAGES = (DOCUMENTATION, ANSWERS, REFINEMENT)


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, *, limit: int) -> np.ndarray:
    """Concatenate tokenised texts, end-of-text between them, and cut into rows of ``length`` token ids.

    Returns
    -------
    ndarray of int64, shape (n, length)
        At most ``limit`` rows.
    """
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stream: list[int] = []
    for start in range(0, len(texts), 256):
        block = list(texts[start : start + 256])
        for ids in tokenizer(block, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            stream += [separator, *ids]
        if len(stream) >= limit * length:
            break
    rows = min(limit, len(stream) // length)
    return np.asarray(stream[: rows * length], dtype=np.int64).reshape(rows, length)


@dataclass(frozen=True)
class Answer:
    """A retrieval prompt with the parent's answer and the parent's own distribution at each answer token.

    Attributes
    ----------
    prompt, tail : tuple of int
        Token ids before and after the answer.
    ids : ndarray of int64, shape (n,)
        Answer tokens.
    soft_ids, soft_probs : ndarray, shape (n, TARGETS)
        The parent's most probable content tokens at each place, and their probabilities (rows sum to 1).
    """

    prompt: tuple[int, ...]
    ids: np.ndarray
    tail: tuple[int, ...]
    soft_ids: np.ndarray
    soft_probs: np.ndarray


def content_token_mask(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Which tokens of the vocabulary begin a content word: letters only, two or more, no stop word; bool [V]."""
    special = set(tokenizer.all_special_ids)
    keep = torch.zeros(len(tokenizer), dtype=torch.bool)
    for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        word = text.strip().lower()
        keep[i] = len(word) > 1 and word.isalpha() and word not in ENGLISH_STOP_WORDS and i not in special
    return keep


@torch.no_grad()
def parent_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    task: str,
    few_words: bool,
    max_text_tokens: int = 96,
    max_answer_tokens: int = 20,
    batch_size: int = 24,
) -> list[Answer]:
    """Let the autoregressive parent answer the retrieval prompt for each text.

    The parent decodes greedily up to the closing quote.  Of its answer the content words are kept, once
    each; answers without any are dropped.  A second pass reads the parent's distribution at each token of
    what was kept, restricted to content tokens.
    """
    prompt = RetrievalPrompt(tokenizer, task, few_words)
    allowed = content_token_mask(tokenizer).to(model.device)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers: dict[int, Answer] = {}
    label = f"{'few words' if few_words else 'one word'}, {task}"
    for start in tqdm(range(0, len(order), batch_size), desc=f"the parent answers ({label})"):
        chosen = order[start : start + batch_size]
        rows = prompt.ids([texts[i] for i in chosen], max_text_tokens)
        batch = _left_pad(rows, tokenizer.pad_token_id, model.device)
        out = model.generate(**batch, max_new_tokens=max_answer_tokens if few_words else 6, do_sample=False)
        kept: list[tuple[int, list[int], list[int]]] = []
        for i, row, generated in zip(chosen, rows, out[:, batch["input_ids"].shape[1] :], strict=True):
            words = content_words(tokenizer.decode(generated, skip_special_tokens=True).split(QUOTE)[0])
            words = [w for w in words if w.isalpha() and w.isascii()][: None if few_words else 1]
            if words:
                kept.append((i, row, encode_plain(tokenizer, [" ".join(words)])[0]))
        if not kept:
            continue
        batch = _left_pad([row + ids for _, row, ids in kept], tokenizer.pad_token_id, model.device)
        logits = model(**batch, logits_to_keep=max(len(ids) for *_, ids in kept) + 1, use_cache=False).logits
        for (i, row, ids), logit in zip(kept, logits, strict=True):
            logit = logit[-len(ids) - 1 : -1].float().masked_fill(~allowed, -torch.inf)
            probs, top = logit.softmax(-1).topk(TARGETS, dim=-1)
            probs = probs / probs.sum(-1, keepdim=True)
            answers[i] = Answer(tuple(row), np.asarray(ids), prompt.tail, top.cpu().numpy(), probs.cpu().numpy())
    return [answers[i] for i in sorted(answers)]


def answer_texts(texts: Sequence[str], passages: int, seed: int = 0) -> dict[str, list[str]]:
    """Texts for the parent to answer: ``passages`` passages and a quarter as many queries.

    A query is the first paragraph of a docstring, often one line.  Every other passage leaves that paragraph
    out, as the passages of the embedded collections do.
    """
    rng = random.Random(seed)
    out: dict[str, list[str]] = {"document": [], "query": []}
    for text in texts:
        first, _, rest = text.partition("\n\n")
        if len(text) <= 250:
            continue
        if len(out["query"]) < passages // 4 and rng.random() < 0.25 and len(first) < 300:
            out["query"].append(first)
        elif len(out["document"]) < passages:
            out["document"].append(rest if rng.random() < 0.5 and len(rest) > 200 else text)
        else:
            break
    return out


def collect_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], passages: int, seed: int = 0
) -> list[Answer]:
    """The parent's answers, a third of them to the one-word prompt, shuffled."""
    answers: list[Answer] = []
    for task, group in answer_texts(texts, passages, seed).items():
        third = len(group) // 3
        answers += parent_answers(model, tokenizer, group[:third], task=task, few_words=False)
        answers += parent_answers(model, tokenizer, group[third:], task=task, few_words=True)
    random.Random(seed).shuffle(answers)
    return answers


def _left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


class MaskedRows(Dataset):
    """Rows of documentation and answers, masked; item ``i`` is the same on every access, so that a resumed run
    sees the same data.

    Places in a batch take documentation and answers in turn (documentation alone without answers).  The
    masking ratio is stratified over the batch: row b of a batch of B has the ratio (b + u) / B, u common to
    the batch and uniform on [0, 1), so that every step covers low and high ratios.  In an answer only the
    answer is masked, half of the time all of it, as in retrieval; the number of its tokens is drawn from
    ``mask_counts``.  The first token of a row is never masked (nothing comes before it to read it from).
    """

    def __init__(
        self,
        documentation: np.ndarray,
        mask_id: int,
        *,
        batch_size: int,
        seed: int,
        answers: Sequence[Answer] = (),
        mask_counts: Sequence[int] = (1, 2, 4, 8, 16),
    ) -> None:
        self.documentation, self.mask_id = documentation, mask_id
        self.batch_size, self.seed = batch_size, seed
        self.answers, self.mask_counts = answers, tuple(mask_counts)

    def __len__(self) -> int:
        return len(self.documentation) * (2 if len(self.answers) else 1)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        batch, place = divmod(i, self.batch_size)
        offset = np.random.default_rng([self.seed, batch, 0]).random()
        rng = np.random.default_rng([self.seed, i, 1])
        ratio = max(0.05, (place + offset) / self.batch_size)
        if len(self.answers) and place % 2:
            answer = self.answers[(i // 2) % len(self.answers)]
            return self._answer(answer, ratio if rng.random() < 0.5 else 1.0, rng)
        ids = self.documentation[i // 2 if len(self.answers) else i]
        chosen = _draw(rng, ratio, np.arange(1, len(ids)))
        soft_ids = np.repeat(ids[chosen, None], TARGETS, 1)
        soft_probs = np.zeros(soft_ids.shape, np.float32)
        soft_probs[:, 0] = 1.0
        return self._item(ids, chosen, soft_ids, soft_probs)

    def _answer(self, answer: Answer, ratio: float, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        n = int(rng.choice([k for k in self.mask_counts if k <= len(answer.ids)]))
        ids = np.asarray([*answer.prompt, *answer.ids[:n], *answer.tail])
        chosen = _draw(rng, ratio, len(answer.prompt) + np.arange(n))
        place = chosen - len(answer.prompt)
        # half the answer itself, half what else the parent would have said there
        soft_ids = np.column_stack([answer.ids[place], answer.soft_ids[place, : TARGETS - 1]])
        soft = answer.soft_probs[place, : TARGETS - 1]
        soft_probs = np.column_stack([np.full(len(place), 0.5), 0.5 * soft / soft.sum(1, keepdims=True)])
        return self._item(ids, chosen, soft_ids, soft_probs.astype(np.float32))

    def _item(self, ids, chosen, soft_ids, soft_probs) -> dict[str, torch.Tensor]:
        masked = np.array(ids)
        masked[chosen] = self.mask_id
        return {
            "input_ids": torch.from_numpy(masked),
            "masked": torch.from_numpy(chosen),
            "target_ids": torch.from_numpy(soft_ids),
            "target_probs": torch.from_numpy(soft_probs),
        }


def _draw(rng: np.random.Generator, ratio: float, places: np.ndarray) -> np.ndarray:
    chosen = places[rng.random(len(places)) < ratio]
    return chosen if len(chosen) else rng.choice(places, 1)


def collate(items: list[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """Left-pad a batch; masked places become (row, column) pairs."""
    width = max(len(item["input_ids"]) for item in items)
    shifts = [width - len(item["input_ids"]) for item in items]
    rows = torch.cat([torch.full_like(x["masked"], r) for r, x in enumerate(items)])
    columns = torch.cat([x["masked"] + shift for x, shift in zip(items, shifts, strict=True)])
    return {
        "input_ids": torch.stack([F.pad(x["input_ids"], (s, 0), value=pad_id) for x, s in zip(items, shifts, strict=True)]),
        "attention_mask": torch.stack(
            [F.pad(torch.ones_like(x["input_ids"]), (s, 0)) for x, s in zip(items, shifts, strict=True)]
        ),
        "masked": torch.stack([rows, columns]),
        "target_ids": torch.cat([x["target_ids"] for x in items]),
        "target_probs": torch.cat([x["target_probs"] for x in items]),
    }


def masked_cross_entropy(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy (nats per token) at the masked positions, token i read at position i - 1.

    The target of a position is a distribution over ``TARGETS`` tokens (all mass on the token itself for
    plain text).  The vocabulary projection is computed at the masked positions alone.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    mask = batch["attention_mask"]
    hidden = causal_lm.model(
        input_ids=batch["input_ids"],
        attention_mask=mask if not mask.all() else None,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        is_causal=False,
    ).last_hidden_state
    rows, columns = batch["masked"]
    log_probs = causal_lm.lm_head(hidden[rows, columns - 1]).float().log_softmax(-1)
    return -(batch["target_probs"] * log_probs.gather(1, batch["target_ids"])).sum(1).mean()


class DiffusionTrainer(Trainer):
    """:class:`transformers.Trainer` with the masked-diffusion loss; rows keep their order."""

    schedule_steps: int

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        return super().create_scheduler(self.schedule_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = masked_cross_entropy(model, inputs)
        return (loss, None) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class _Curve(TrainerCallback):
    """Append the training loss, and now and then the held-out cross-entropy, to a JSON-lines file."""

    def __init__(self, path: Path, recipe: Recipe, evaluate=None, every: int = 0) -> None:
        self.path, self.recipe, self.evaluate, self.every = path, recipe, evaluate, every

    def _write(self, record: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            seen = state.global_step * self.recipe.sequence_length * self.recipe.batch_size
            self._write({"stage": self.recipe.stage, "step": state.global_step, "tokens_seen": seen, **logs})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.evaluate and self.every and state.global_step % self.every == 0:
            seen = state.global_step * self.recipe.sequence_length * self.recipe.batch_size
            losses = self.evaluate(model)
            self._write({"stage": self.recipe.stage, "step": state.global_step, "tokens_seen": seen, "held_out": losses})


def bidirectional(model: PreTrainedModel) -> PreTrainedModel:
    """Let every position attend to every other (``config.is_causal = False``, transformers >= 5)."""
    model.config.is_causal = False
    return model


def new_adapter(model: PreTrainedModel, mask_id: int, recipe: Recipe) -> PeftModel:
    """LoRA on all linear layers and a trained embedding for the mask token."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": [mask_id]},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(
    model: PeftModel,
    dataset: Dataset,
    recipe: Recipe,
    output_dir: Path,
    *,
    pad_id: int,
    evaluate=None,
    evaluate_every: int = 0,
    save_every: int = 50,
) -> PeftModel:
    """Run one stage; started again with the same ``output_dir`` it goes on from its last checkpoint.

    The training loss goes to ``output_dir/curve.jsonl``; the adapter to ``output_dir/adapter``.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
    floor = recipe.final_learning_rate / recipe.learning_rate
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": floor},
        warmup_steps=recipe.warmup_steps,
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=min(10, recipe.steps),
        save_steps=save_every,
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=0,
        disable_tqdm=False,
    )
    trainer = DiffusionTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=lambda items: collate(items, pad_id),
        callbacks=[_Curve(output_dir / "curve.jsonl", recipe, evaluate, evaluate_every)],
    )
    trainer.schedule_steps = recipe.schedule_steps
    trainer.train(resume_from_checkpoint=any(output_dir.glob("checkpoint-*")) or None)
    model.save_pretrained(output_dir / "adapter")
    return model


@torch.no_grad()
def held_out_cross_entropy(
    model: PreTrainedModel,
    rows: np.ndarray,
    mask_id: int,
    *,
    ratios: Sequence[float] = (0.15, 0.5, 0.9),
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, float]:
    """Cross-entropy (nats per masked token) at fixed masking ratios, the same masks on every call.

    Parameters
    ----------
    rows : ndarray of int64, shape (n, length)
    ratios : sequence of float
        Share of the tokens that are masked.

    Returns
    -------
    dict
        Masking ratio (as text) to mean cross-entropy over all masked tokens.
    """
    was_training = model.training
    model.eval()
    out = {}
    for ratio in ratios:
        rng = np.random.default_rng([seed, round(ratio * 1000)])
        total, count = 0.0, 0
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc=f"cross-entropy at {ratio:.0%}", disable=not progress, leave=False):
            ids = torch.from_numpy(np.asarray(rows[start : start + batch_size]))
            chosen = torch.from_numpy(rng.random(ids.shape) < ratio)
            chosen[:, 0] = False
            batch = {
                "input_ids": ids.masked_fill(chosen, mask_id),
                "attention_mask": torch.ones_like(ids),
                "masked": torch.stack(chosen.nonzero(as_tuple=True)),
                "target_ids": ids[chosen][:, None],
                "target_probs": torch.ones(int(chosen.sum()), 1),
            }
            batch = {k: v.to(model.device) for k, v in batch.items()}
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                loss = masked_cross_entropy(model, batch)
            total += float(loss) * int(chosen.sum())
            count += int(chosen.sum())
        out[f"{ratio:g}"] = total / count
    model.train(was_training)
    return out


def adapt(
    parent: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    mask_id: int,
    texts: Sequence[str] | Callable[[], Sequence[str]],
    work: Path,
    *,
    held_out: np.ndarray,
    stages: Sequence[Recipe] = STAGES,
    evaluate_every: int = 100,
) -> PeftModel:
    """All stages, from the parent to the adapter; started again it goes on from the last checkpoint.

    Parameters
    ----------
    parent : callable
        Gives the parent's causal LM, freshly loaded, in bfloat16 (or float32, slower).
    texts : sequence of str, or a callable that gives it
        Shuffled training texts; asked for only when there is something to train.  Documentation is taken from
        the front, texts to answer from the back, other ones for every stage.
    work : Path
        A folder for each stage: checkpoints, the parent's answers, ``curve.jsonl`` and the stage's ``adapter``.
    held_out : ndarray of int64, shape (n, length)
        Rows for the held-out cross-entropy.
    stages : sequence of Recipe
        With the same sequence length.

    Returns
    -------
    PeftModel

    Raises
    ------
    ValueError
        When the texts are too few for the recipes.
    """
    work = Path(work)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        return held_out_cross_entropy(model, held_out, mask_id)

    done = max((i for i, s in enumerate(stages, 1) if _is_finished(work / s.stage)), default=0)
    model = None
    if done:
        last = work / stages[done - 1].stage / "adapter"
        model = PeftModel.from_pretrained(bidirectional(parent()), last, is_trainable=done < len(stages))
    if done == len(stages):
        return model
    texts = texts() if callable(texts) else texts
    needed = sum(stage.documentation_rows for stage in stages)
    rows = pack(texts, tokenizer, stages[0].sequence_length, limit=needed)
    if len(rows) < needed:
        raise ValueError(
            f"the training texts give {len(rows)} sequences of {stages[0].sequence_length} tokens, "
            f"and the recipe needs {needed}: read more packages, or lower the recipe's tokens"
        )
    for i, stage in enumerate(stages[done:], done):
        first = sum(s.documentation_rows for s in stages[:i])
        data = MaskedRows(
            rows[first : first + stage.documentation_rows], mask_id, batch_size=stage.batch_size, seed=stage.seed,
            answers=_stage_answers(parent, tokenizer, texts, work / stage.stage, stages[: i + 1]),
        )  # fmt: skip
        if model is None:
            model = new_adapter(bidirectional(parent()), mask_id, stage)
        model = train(
            model, data, stage, work / stage.stage,
            pad_id=tokenizer.pad_token_id, evaluate=evaluate, evaluate_every=evaluate_every,
        )  # fmt: skip
    return model


def _is_finished(folder: Path) -> bool:
    return (folder / "adapter" / "adapter_model.safetensors").exists()


def _stage_answers(
    parent: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    folder: Path,
    stages: Sequence[Recipe],
) -> list[Answer]:
    """The answers of the last of ``stages``, kept in its folder; the texts are behind those of earlier stages."""
    *earlier, stage = stages
    if not stage.answered_passages:
        return []
    kept = folder / "answers.pt"
    if not kept.exists():
        # a stage passes over some texts: two for each passage that it answers are more than it has seen
        skip = 2 * sum(s.answered_passages for s in earlier)
        collected = collect_answers(parent(), tokenizer, texts[::-1][skip:], stage.answered_passages, stage.seed)
        with atomic_path(kept) as temporary:
            torch.save(collected, temporary)
    return torch.load(kept, weights_only=False)


def export_adapter(source: Path, target: Path, base_name: str) -> int:
    """Write an adapter for the package: weights in bfloat16, no local path in its configuration.

    Returns
    -------
    int
        Size of the weights in bytes.
    """
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source / "adapter_model.safetensors").items()}
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base_name
    target.mkdir(parents=True, exist_ok=True)
    with atomic_path(target / "adapter_model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with atomic_path(target / "adapter_config.json") as temporary:
        Path(temporary).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return (target / "adapter_model.safetensors").stat().st_size


def read_curves(work: Path) -> list[dict]:
    """Records of ``curve.jsonl`` of all stages in ``work``, in order; of a step logged twice the later one."""
    records: list[dict] = []
    for stage in STAGES:
        path = Path(work) / stage.stage / "curve.jsonl"
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            records += {(r["step"], "held_out" in r): r for r in lines}.values()
    return records
