"""The retrieval prompt, as token ids (PromptReps, arXiv 2404.18424, section 3; DiffRetriever, section 3).

A prompt has a constant left part, the text, and a constant right part::

    system     You are an AI assistant that can understand human language.
    user       Passage: "<text>". Use a few words to represent the passage in a retrieval task. ...
    assistant  The words are: "[MASK][MASK]...  + tail (diffusion only): `"`, end of turn, end of sequence

The three parts are tokenised apart.  So the text is plain text whatever it holds (a special token of the
chat template in it is spelled out), truncation takes tokens of the text alone, and the left part is the
same ids for all texts, which lets an autoregressive model compute it once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
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


@dataclass(frozen=True)
class RetrievalPrompt:
    """Prompt ids of one side and one wording.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With a chat template.
    side : {"query", "passage"}
    few_words : bool
        ``False`` asks for one word (K = 1), ``True`` for a few (K > 1).
    """

    tokenizer: PreTrainedTokenizerBase
    side: Side
    few_words: bool

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side must be 'query' or 'passage', not {self.side!r}")

    @cached_property
    def _parts(self) -> tuple[str, str]:
        words = "words are" if self.few_words else "word is"
        user = USER.format(
            Side=self.side.capitalize(), side=self.side, text=_SLOT, words=words,
            amount="a few words" if self.few_words else "one word",
        )  # fmt: skip
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        left, slot, right = prompt.partition(_SLOT)
        if not slot:
            raise ValueError("the chat template does not keep the user's message as it is")
        return left, right + ASSISTANT.format(words=words)

    @cached_property
    def left(self) -> tuple[int, ...]:
        """Ids before the text."""
        return tuple(self.tokenizer(self._parts[0], add_special_tokens=False)["input_ids"])

    @cached_property
    def right(self) -> tuple[int, ...]:
        """Ids after the text, up to and including the quote that opens the answer."""
        return tuple(self.tokenizer(self._parts[1], add_special_tokens=False)["input_ids"])

    @cached_property
    def tail(self) -> tuple[int, ...]:
        """Closing ids after the masks: the quote, the end of the turn, and end-of-sequence."""
        quote = self.tokenizer(QUOTE, add_special_tokens=False)["input_ids"][0]
        return quote, end_of_turn_id(self.tokenizer), self.tokenizer.eos_token_id

    def ids(self, texts: Sequence[str], max_text_tokens: int) -> list[list[int]]:
        """Prompt ids up to the opening quote; each text cut to ``max_text_tokens`` tokens."""
        left, right = list(self.left), list(self.right)
        return [left + ids[:max_text_tokens] + right for ids in encode_plain(self.tokenizer, texts)]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token with which the chat template closes a turn."""
    turn = tokenizer.apply_chat_template([{"role": "user", "content": _SLOT}], tokenize=False)
    ids = tokenizer(turn.partition(_SLOT)[2], add_special_tokens=False)["input_ids"]
    return ids[0] if ids else tokenizer.eos_token_id


def content_words(text: str) -> list[str]:
    """Lower-cased words of a text without English stop words and punctuation, in order of first use."""
    return [w for w in dict.fromkeys(_WORD.findall(text.lower())) if w not in ENGLISH_STOP_WORDS]


class ContentTokens:
    """Token ids of a text's content words, each word tokenised alone (the filter of the sparse side)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._word_ids = lru_cache(maxsize=200_000)(lambda word: encode_plain(tokenizer, [word])[0])

    def __call__(self, text: str) -> list[int]:
        """Sorted ids without duplicates."""
        return sorted({i for word in content_words(text) for i in self._word_ids(word)})
