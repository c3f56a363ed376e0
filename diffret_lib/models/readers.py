"""Readers: modules of sentence-transformers, each a way to turn a text into dense vectors and sparse weights.

One forward pass writes ``token_embeddings`` [batch, K, H] and ``attention_mask`` [batch, K] (1 where a vector counts):
the reader is a whole ``MultiVectorEncoder``; and ``sentence_embedding`` [batch, V], the sparse weights: it is a whole
``SparseEncoder``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from diffret_lib.data.checks import whole_number
from diffret_lib.models.prompts import QUOTE, ContentTokens, RetrievalPrompt, Side, encode_plain, pad_left
from diffret_lib.models.shared_text import Branches

ContentFrom = Literal["whole text", "read text"]
Stop = Literal["quote", "any quote", "never"]

_HEAD_ROWS = 512  # of [batch * K, V] logits that are held at once


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return ``value``, or raise a ValueError that names it where it is none of the choices."""
    if type(value) not in map(type, choices) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    return value


class Reader(InputModule):
    """Base of the readers: the language model, the dense side, saving and loading.

    ``model`` is a causal LM of transformers; a diffusion LM has ``config.is_causal`` false.  ``max_query_tokens`` and
    ``max_passage_tokens`` of a text are read, the rest is cut.  A ``ValueError`` says which setting is wrong.
    """

    config_file_name = "reader_config.json"
    config_keys: ClassVar[list[str]] = ["max_query_tokens", "max_passage_tokens"]
    has_sparse = False  # whether ``sentence_embedding`` is written
    decoded = 0  # tokens that are put after the features, at most

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_query_tokens: int = 64,
        max_passage_tokens: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        self.max_query_tokens = whole_number("max_query_tokens", max_query_tokens)
        self.max_passage_tokens = whole_number("max_passage_tokens", max_passage_tokens)
        self.model, self.tokenizer = model, tokenizer

    @property
    def bidirectional(self) -> bool:
        return not getattr(self.model.config, "is_causal", True)

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def max_text_tokens(self, side: Side) -> int:
        return self.max_query_tokens if side == "query" else self.max_passage_tokens

    def get_embedding_dimension(self) -> int:  # the name in sentence-transformers
        return self.hidden_size

    def preprocess(self, inputs: list[str], prompt: str | None = None, task: str | None = None, **kwargs: Any):
        """Make the features that :meth:`forward` takes: ``input_ids``, ``attention_mask`` (int64 [batch, length]), ...

        ``task`` is the side; "document", the word of sentence-transformers, or none stands for a passage.
        """
        if task not in ("query", "passage", "document", None):
            raise ValueError(f"task must be 'query', 'passage' or 'document', not {task!r}")
        return self.features([(prompt or "") + text for text in inputs], "query" if task == "query" else "passage")

    def cut_ids(self, texts: list[str], side: Side) -> list[list[int]]:
        """Ids of the cut texts."""
        return [row[: self.max_text_tokens(side)] for row in encode_plain(self.tokenizer, texts)]

    def read_texts(self, texts: list[str], side: Side) -> list[str]:
        """What of each text is read: all of it, or its beginning where it is cut."""
        limit, rows = self.max_text_tokens(side), encode_plain(self.tokenizer, texts)
        pairs = zip(texts, rows, strict=True)
        return [text if len(row) <= limit else self.tokenizer.decode(row[:limit]) for text, row in pairs]

    def pad_left(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Ids and attention mask (1: a token, 0: padding), both int64 [batch, length]."""
        return pad_left(rows, self.tokenizer.pad_token_id)

    def body(self, input_ids: Tensor, mask: Tensor, past: DynamicCache | None = None) -> Tensor:
        """Last hidden states after the final norm [batch, length, H]; ``mask`` covers what ``past`` holds as well."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return self.decoder(input_ids, None if bool(mask.all()) else mask, positions, past)

    def decoder(self, ids: Tensor, mask: Tensor | None, positions: Tensor, past: DynamicCache | None = None) -> Tensor:
        # the attention kernel asks the layer, not the configuration, when there is no mask
        kwargs = {"is_causal": False} if self.bidirectional else {}
        return self.model.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past,
            use_cache=past is not None, **kwargs,
        ).last_hidden_state  # fmt: skip

    def dense(self, hidden: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Normalise vectors [batch, K, H]; those that are not ``valid`` (bool [batch, K]) become zero.

        Returns ``token_embeddings`` float32 [batch, K, H] and ``attention_mask`` int64 [batch, K].
        """
        if valid is None:
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        vectors = F.normalize(hidden.float(), dim=-1) * valid[..., None]
        return {"token_embeddings": vectors, "attention_mask": valid.long()}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.model.save_pretrained(output_path)
        self.save_tokenizer(output_path)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Reader:
        """Load what :meth:`save` wrote (weights, tokenizer, settings), from a folder or from the hub."""
        hub = {k: kwargs[k] for k in ("token", "cache_folder", "revision", "local_files_only") if k in kwargs}
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **hub)
        if not config:
            raise FileNotFoundError(f"{model_name_or_path} has no {cls.config_file_name}: it does not hold a reader")
        hub |= {"cache_dir": hub.pop("cache_folder", None), "subfolder": subfolder}
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path, **hub)
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub)
        return cls(model.eval(), tokenizer, **config)


class PromptReader(Reader):
    """Base of the readers with the retrieval prompt, and so with a sparse side.

    ``content_from`` says whose content words the sparse side is kept to: those of the whole text, as in the paper's
    reference, or of the text that is read, where it is cut.
    """

    config_keys: ClassVar[list[str]] = [*Reader.config_keys, "content_from"]
    has_sparse = True

    def __init__(self, *args: Any, content_from: ContentFrom = "whole text", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.content_from = one_of("content_from", content_from, get_args(ContentFrom))
        self.content_tokens = ContentTokens(self.tokenizer)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        self.special_ids = torch.tensor(sorted(special))

    def text_ids(self, texts: list[str], side: Side) -> tuple[list[list[int]], Tensor]:
        """Ids of the cut texts, and those of the content words: int64 [batch, C], each once a row, padded with -1."""
        source = texts if self.content_from == "whole text" else self.read_texts(texts, side)
        content = [self.content_tokens(text) for text in source]
        width = max(1, max(map(len, content), default=1))
        return self.cut_ids(texts, side), torch.tensor([row + [-1] * (width - len(row)) for row in content])

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of chosen positions, [batch, K, V]; the mask token is never predicted."""
        # of a 3-d slice, torch copies the whole matrix of the head
        return self.model.get_output_embeddings()(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def read(self, hidden: Tensor, content_ids: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Normalise the vectors [batch, K, H] and make the sparse weights.

        ``valid`` is bool [batch, K], ``content_ids`` int64 [batch, C].  Returns what :meth:`dense` does,
        ``content_weights`` float32 [batch, C], ``sentence_embedding`` float32 [batch, V] and ``predicted_ids`` int64
        [batch, K].
        """
        if valid is None:
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        greedy, weights, counts = [], [], []
        step = max(1, _HEAD_ROWS // hidden.shape[1])
        for vectors, given, content in zip(hidden.split(step), valid.split(step), content_ids.split(step)):
            logits = self.logits(vectors)
            greedy.append(logits.argmax(-1))
            counts.append(given & self.before_special(greedy[-1]))
            weights.append(self.content_weights(logits, counts[-1], content))
        out = {"predicted_ids": torch.cat(greedy), "content_weights": torch.cat(weights)}
        sparse = torch.zeros(len(hidden), self.vocab_size, device=hidden.device)
        sparse = sparse.scatter_reduce(1, content_ids.clamp(min=0), out["content_weights"], "amax")
        return out | {"sentence_embedding": sparse} | self.dense(hidden, torch.cat(counts))

    def before_special(self, predicted_ids: Tensor) -> Tensor:
        """Mark the positions that count: those before the first special token; all, if that is at the first."""
        special = torch.isin(predicted_ids, self.special_ids.to(predicted_ids.device))
        return (special.cumsum(1) == 0) | special[:, :1]

    def content_weights(self, logits: Tensor, valid: Tensor, content_ids: Tensor) -> Tensor:
        """log(1 + ReLU(logit)) at the content tokens, the largest over the positions; float32 [batch, C]."""
        index = content_ids.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
        chosen = logits.gather(2, index).float() * (content_ids >= 0)[:, None] * valid[..., None]
        return torch.log1p(F.relu(chosen)).amax(1)


class MaskedPositions(PromptReader):
    """DiffRetriever's reader: the prompt, K mask tokens, the tail; one forward pass (arXiv 2605.07210, section 3).

    ``k_query`` and ``k_passage`` are the numbers of masks (Kq, Kp); K = 1 asks for one word, K > 1 for a few.  With
    ``prediction_shift`` token i is read at position i - 1, as models adapted from an autoregressive LM predict it
    (Dream), otherwise at position i.  The vectors are the hidden states at the positions that are read.

    ``shared_text``, which is not in the paper, makes a text's states independent of K, so that one pass reads any
    number of counts: see :class:`~diffret_lib.models.shared_text.Branches`.
    """

    config_keys: ClassVar[list[str]] = [
        *PromptReader.config_keys, "mask_id", "k_query", "k_passage", "prediction_shift", "shared_text"
    ]  # fmt: skip

    def __init__(
        self, *args: Any, mask_id: int, k_query: int = 1, k_passage: int = 1, prediction_shift: bool = True,
        shared_text: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.mask_id = mask_id
        self.k_query, self.k_passage = whole_number("k_query", k_query), whole_number("k_passage", k_passage)
        self.prediction_shift = one_of("prediction_shift", prediction_shift, (True, False))
        self.shared_text = one_of("shared_text", shared_text, (True, False))

    def mask_count(self, side: Side) -> int:
        return self.k_query if side == "query" else self.k_passage

    def features(self, texts: list[str], side: Side, counts: Sequence[int] | None = None) -> dict[str, Any]:
        """Features of one pass; for several numbers of masks at once (``counts``) where the text is shared."""
        counts = [self.mask_count(side)] if counts is None else counts
        prompts = {few: RetrievalPrompt(self.tokenizer, side, few) for few in (False, True)}
        ids, content = self.text_ids(texts, side)
        if self.shared_text:
            branches = Branches(prompts, counts, self.mask_id)
            first, after, left = branches.first_mask, branches.ids, prompts[True].left
        else:
            (k,), prompt, branches = counts, prompts[counts[0] > 1], None
            left, after = prompt.left, [*prompt.right, *[self.mask_id] * k, *prompt.tail]
            first = {k: len(prompt.tail) + k}
        rows = [[*left, *row, *after] for row in ids]
        return self.pad_left(rows) | {"content_ids": content, "first_mask": first, "branches": branches}

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        logits[..., self.mask_id] = -torch.inf
        return logits

    def states(self, features: dict[str, Any]) -> dict[int, Tensor]:
        """Hidden states at the positions that are read, [batch, K, H], by K."""
        ids, mask, branches = features["input_ids"], features["attention_mask"], features["branches"]
        if branches is None:
            hidden = self.body(ids, mask)
        else:
            hidden = self.decoder(ids, *branches.mask_and_positions(mask, self.model.dtype))
        starts = {k: ids.shape[1] - n - int(self.prediction_shift) for k, n in features["first_mask"].items()}
        return {k: hidden[:, start : start + k] for k, start in starts.items()}

    def masked(self, features: dict[str, Any]) -> Tensor:
        """Hidden states at the positions that are read, [batch, K, H], for features of one K."""
        (hidden,) = self.states(features).values()
        return hidden

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return features | self.read(self.masked(features), features["content_ids"])

    def forward_counts(self, features: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
        """What :meth:`forward` adds, by K, from one pass."""
        return {k: self.read(hidden, features["content_ids"]) for k, hidden in self.states(features).items()}


class NextTokens(PromptReader):
    """PromptReps' reader (arXiv 2404.18424): the last prompt token; then greedy decoding, a vector a token.

    Vector 0 is the last prompt token's, vector j the one after the j-th decoded token.  There are
    ``max_vectors`` at most; with 1 the prompt asks for one word.  Decoding ends at a special token, or at a closing
    quote: with ``stop`` "quote" the token that is a quote and nothing else, as in the reference, with "any quote" one
    that holds a quote; "never" decodes them all.  The left part of the prompt is computed once.  In training, with
    gradients and without, one pass over prompt and decoded tokens reads the same positions.
    """

    config_keys: ClassVar[list[str]] = [*PromptReader.config_keys, "max_vectors", "stop"]

    def __init__(self, *args: Any, max_vectors: int = 1, stop: Stop = "quote", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_vectors, self.stop = whole_number("max_vectors", max_vectors), one_of("stop", stop, get_args(Stop))
        self._left: dict[tuple, DynamicCache] = {}
        self._ends_answer: dict[int, bool] = {}

    @property
    def decoded(self) -> int:
        return self.max_vectors - 1

    def features(self, texts: list[str], side: Side) -> dict[str, Any]:
        template = RetrievalPrompt(self.tokenizer, side, few_words=self.max_vectors > 1)
        ids, content = self.text_ids(texts, side)
        rows = [[*row, *template.right] for row in ids]  # forward puts the left part before them
        return self.pad_left(rows) | {"content_ids": content, "left_ids": template.left}

    def left_cache(self, left_ids: tuple[int, ...], batch: int, keep: bool) -> DynamicCache:
        """Keys and values of the constant left part, for a batch; ``keep`` where the weights do not change."""
        key = (left_ids, self.model.device, self.model.dtype)
        if not keep or key not in self._left:
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([left_ids], device=self.model.device)
            self.body(ids, torch.ones_like(ids), past=cache)
            self._left = {key: cache} if keep else {}
        cache = copy.deepcopy(self._left[key]) if keep else cache
        cache.batch_repeat_interleave(batch)
        return cache

    def train(self, mode: bool = True) -> NextTokens:
        self._left = {}
        return super().train(mode)

    def ends_answer(self, ids: Tensor) -> Tensor:
        """Mark the tokens that close the answer."""
        for i in set(ids.tolist()) - self._ends_answer.keys():
            text = self.tokenizer.decode([i])
            quote = text == QUOTE if self.stop == "quote" else QUOTE in text
            self._ends_answer[i] = self.stop != "never" and (quote or i in self.special_ids)
        return torch.tensor([self._ends_answer[i] for i in ids.tolist()], device=ids.device, dtype=torch.bool)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if torch.is_grad_enabled() or self.training:  # a gradient cache wants the same dropout without gradients
            hidden, valid = self.teacher_forced(features)
        else:
            hidden, valid, _ = self.decode(features, keep=True)
        return features | self.read(hidden, features["content_ids"], valid)

    def decode(self, features: dict[str, Any], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy decoding with a key-value cache: hidden states [batch, N, H], which of them there are
        (bool [batch, N]), and the decoded tokens (int64 [batch, N - 1], padding where there are none)."""
        ids, mask = features["input_ids"], F.pad(features["attention_mask"], (len(features["left_ids"]), 0), value=1)
        cache = self.left_cache(features["left_ids"], len(ids), keep)
        last = self.body(ids, mask, past=cache)[:, -1]
        hidden = last.new_zeros(len(ids), self.max_vectors, last.shape[-1])
        valid = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        tokens = ids.new_full((len(ids), self.max_vectors - 1), self.tokenizer.pad_token_id)
        hidden[:, 0], valid[:, 0] = last, True
        active = torch.arange(len(ids), device=hidden.device)
        for j in range(1, self.max_vectors):
            token = self.logits(last[:, None])[:, 0].argmax(-1)
            goes_on = ~self.ends_answer(token)
            if not goes_on.any():
                break
            if not goes_on.all():
                active, token, mask = active[goes_on], token[goes_on], mask[goes_on]
                cache.batch_select_indices(goes_on.nonzero()[:, 0])
            mask = F.pad(mask, (0, 1), value=1)
            last = self.body(token[:, None], mask, past=cache)[:, -1]
            hidden[active, j], valid[active, j], tokens[active, j - 1] = last, True, token
        return hidden, valid, tokens

    def teacher_forced(self, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The hidden states of :meth:`decode` from one pass with gradients, and which of them there are."""
        ids, mask = features["input_ids"], F.pad(features["attention_mask"], (len(features["left_ids"]), 0), value=1)
        ids = torch.cat([torch.tensor([features["left_ids"]], device=ids.device).expand(len(ids), -1), ids], 1)
        valid, longest = torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device), 0
        if self.max_vectors > 1:
            with torch.no_grad():
                _, valid, tokens = self.decode(features, keep=False)
            longest = int(valid.sum(1).max()) - 1
            ids = torch.cat([ids, tokens[:, :longest]], 1)
            mask = torch.cat([mask, valid[:, 1 : 1 + longest].to(mask.dtype)], 1)
        hidden = self.body(ids, mask)[:, -1 - longest :]
        return F.pad(hidden, (0, 0, 0, valid.shape[1] - hidden.shape[1])), valid

    def before_special(self, predicted_ids: Tensor) -> Tensor:
        return torch.ones_like(predicted_ids, dtype=torch.bool)  # decoding ends before a special token is read


class MeanOfTokens(Reader):
    """The mean of the last hidden states over the text's tokens (DiffEmbed, arXiv 2505.15045): no prompt, no mask, no
    sparse side.  An empty text is read as one end-of-sequence token."""

    def features(self, texts: list[str], side: Side) -> dict[str, Any]:
        return self.pad_left([row or [self.tokenizer.eos_token_id] for row in self.cut_ids(texts, side)])

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        mask = features["attention_mask"]
        hidden = self.body(features["input_ids"], mask).float()
        return features | self.dense((hidden * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None])


class LastToken(Reader):
    """RepLLaMA's reader (arXiv 2310.08319): the last token's hidden state of ``query: <text></s>`` or ``passage:
    <text></s>``; no sparse side."""

    def features(self, texts: list[str], side: Side) -> dict[str, Any]:
        (left,) = encode_plain(self.tokenizer, [f"{side}:"])
        ids = self.cut_ids([" " + text for text in texts], side)  # as in one piece with what is before it
        return self.pad_left([[*left, *row, self.tokenizer.eos_token_id] for row in ids])

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return features | self.dense(self.body(features["input_ids"], features["attention_mask"])[:, -1:])
