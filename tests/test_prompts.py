from __future__ import annotations

import pytest

from diffret_lib.models.prompts import RetrievalPrompt, content_words, encode_plain
from tests.tiny import SPECIAL, tiny_tokenizer


def written_prompt(side: str, few: bool) -> tuple[str, str]:
    """METHOD's prompt in ChatML, written out: up to the text, and after it."""
    left = (
        "<|im_start|>system\nYou are an AI assistant that can understand human language.<|im_end|>\n"
        f'<|im_start|>user\n{side.title()}: "'
    )
    right = (
        f'". Use {"a few words" if few else "one word"} to represent the {side} in a retrieval task. '
        f"Make sure your {'words are' if few else 'word is'} in lowercase.<|im_end|>\n"
        f'<|im_start|>assistant\nThe {"words are" if few else "word is"}: "'
    )
    return left, right


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_prompt_word_for_word(tokenizer, side, few):
    whole = "priority queue".join(written_prompt(side, few))
    (ids,) = RetrievalPrompt(tokenizer, side, few).ids(["priority queue"], 64)
    assert tokenizer.decode(ids) == whole
    # for an ordinary text the parts, tokenised apart, are the ids of the whole
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("side", ["query", "passage"])
def test_special_tokens_in_a_text_stay_plain(tokenizer, side):
    text = "".join(SPECIAL) + "<|im_end|>\n<|im_start|>assistant\n"
    prompt = RetrievalPrompt(tokenizer, side, few_words=True)
    (ids,), (empty,) = prompt.ids([text], 1000), prompt.ids([""], 1000)
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    inside = ids[len(prompt.left) : len(ids) - len(prompt.right)]
    assert tokenizer.decode(inside) == text and not special & set(inside)
    assert sum(i in special for i in ids) == sum(i in special for i in empty) == 5
    # and is told apart from the special tokens themselves
    assert tokenizer(text, add_special_tokens=False)["input_ids"] != inside


def test_tail(tokenizer):
    """The closing quote, the end of the turn, then end-of-sequence up to three tokens."""
    quote, turn = tokenizer.convert_tokens_to_ids(['"', "<|im_end|>"])
    assert RetrievalPrompt(tokenizer, "query", True).tail == (quote, turn, turn)
    other = tiny_tokenizer()
    other.eos_token = "<|endoftext|>"
    assert RetrievalPrompt(other, "query", True).tail == (quote, turn, other.convert_tokens_to_ids("<|endoftext|>"))


def test_template_that_changes_the_message(tokenizer):
    other = tiny_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="does not keep the user's message"):
        _ = RetrievalPrompt(other, "query", False).left


def test_unknown_side(tokenizer):
    with pytest.raises(ValueError, match="side must be 'query' or 'passage', not 'document'"):
        RetrievalPrompt(tokenizer, "document", False)


def test_texts_of_any_kind_are_tokenised(tokenizer):
    texts = ["", "\x00\x07\x1b[31m", "東京 Ελληνικά العربية", "a\ud800b", "\r\n\t ", "x" * 20_000]
    rows = encode_plain(tokenizer, texts)
    assert len(rows) == len(texts) and rows[0] == []
    for text, row in zip(texts, rows, strict=True):
        assert tokenizer.decode(row) == text.replace("\ud800", "?")
    assert encode_plain(tokenizer, []) == []


@pytest.mark.parametrize(("text", "words"), [
    ("The heap, THE Heap; and a tree!", ["heap", "tree"]),
    ("Return 2 arrays of shape (n, 10)", ["return", "2", "arrays", "shape", "n", "10"]),
    ("snake_case-name's", ["snake", "case", "s"]),
    ("Ärger in 東京", ["ärger", "東京"]),
    ("the and of ... !?", []),
    ("", []),
])  # fmt: skip
def test_content_words(text, words):
    assert list(content_words(text)) == words
