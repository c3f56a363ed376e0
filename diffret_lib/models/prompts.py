"""The retrieval prompt, as token ids (PromptReps, arXiv 2404.18424, section 3; DiffRetriever, section 3).

A prompt has a constant left part, the text, and a constant right part::

    system     You are an AI assistant that can understand human language.
    user       Passage: "<text>". Use a few words to represent the passage in a retrieval task. ...
    assistant  The words are: "[MASK][MASK]...  + tail (diffusion only): `"`, end of turn, end of sequence

The three parts are tokenised apart.  So a special token in the text is spelled out, truncation takes tokens of the text
alone, and the left part is the same ids for all texts, which lets an autoregressive model compute it once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

Side = Literal["query", "passage"]
SIDES: tuple[Side, ...] = ("query", "passage")

SYSTEM = "You are an AI assistant that can understand human language."
USER = (
    '{Side}: "{text}". Use {amount} to represent the {side} in a retrieval task. Make sure your {words} in lowercase.'
)
ASSISTANT = 'The {words}: "'
QUOTE = '"'

_SLOT = "\N{LEFT DOUBLE QUOTATION MARK}text\N{RIGHT DOUBLE QUOTATION MARK}"
_WORD = re.compile(r"[^\W_]+")


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which nothing is a special token (``<|im_end|>`` becomes ``<``, ``|``, ...)."""
    if not len(texts):
        return []
    texts = [t.encode("utf-8", "replace").decode("utf-8") for t in texts]  # lone surrogates cannot be tokenised
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def pad_left(rows: Sequence[Any], pad_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Ids of rows, padded on the left, as ``input_ids``; ``attention_mask`` (1: a token); int64 [n, longest]."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    sides = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence(rows, padding_value=pad_id, **sides)
    mask = pad_sequence([torch.ones_like(row) for row in rows], **sides)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class RetrievalPrompt:
    """Prompt ids of one side; ``few_words`` asks for a few words (K > 1), otherwise for one (K = 1).

    ``left`` holds the ids before the text, ``right`` those after it, with the quote that opens the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, side: Side, few_words: bool) -> None:
        if side not in SIDES:
            raise ValueError(f"side must be 'query' or 'passage', not {side!r}")
        amount, words = ("a few words", "words are") if few_words else ("one word", "word is")
        user = USER.format(Side=side.capitalize(), side=side, text=_SLOT, words=words, amount=amount)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        left, slot, right = prompt.partition(_SLOT)
        if not slot:
            raise ValueError("the chat template does not keep the user's message as it is")
        self.tokenizer, right = tokenizer, right + ASSISTANT.format(words=words)
        self.left, self.right = (tuple(tokenizer(x, add_special_tokens=False)["input_ids"]) for x in (left, right))

    @cached_property
    def tail(self) -> tuple[int, ...]:
        """Closing ids after the masks: the quote, the end of the turn, and end-of-sequence."""
        turn = self.tokenizer.apply_chat_template([{"role": "user", "content": _SLOT}], tokenize=False)
        end, eos = turn.partition(_SLOT)[2], self.tokenizer.eos_token_id
        quote, end_ids = (self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in (QUOTE, end))
        return quote[0], end_ids[0] if end_ids else eos, eos

    def ids(self, texts: Sequence[str], max_text_tokens: int) -> list[list[int]]:
        """Prompt ids up to the opening quote; each text cut to ``max_text_tokens`` tokens."""
        return [[*self.left, *ids[:max_text_tokens], *self.right] for ids in encode_plain(self.tokenizer, texts)]


def content_words(text: str) -> list[str]:
    """Lower-cased words of a text without English stop words and punctuation, in order of first use."""
    return [w for w in dict.fromkeys(_WORD.findall(text.lower())) if w not in ENGLISH_STOP_WORDS]


class ContentTokens:
    """Sorted token ids of a text's content words, each word tokenised alone (the filter of the sparse side)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._word_ids = lru_cache(maxsize=200_000)(lambda word: encode_plain(tokenizer, [word])[0])

    def __call__(self, text: str) -> list[int]:
        return sorted({i for word in content_words(text) for i in self._word_ids(word)})
