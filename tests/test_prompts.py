from __future__ import annotations

import pytest

from diffret_lib.models.prompts import ContentTokens, RetrievalPrompt, content_words, encode_plain
from tests.tiny import SPECIAL, tiny_tokenizer

SYSTEM = "<|im_start|>system\nYou are an AI assistant that can understand human language.<|im_end|>\n"
PROMPTS = {
    ("query", False): (
        '<|im_start|>user\nQuery: "priority queue". Use one word to represent the query in a retrieval task. '
        'Make sure your word is in lowercase.<|im_end|>\n<|im_start|>assistant\nThe word is: "'
    ),
    ("query", True): (
        '<|im_start|>user\nQuery: "priority queue". Use a few words to represent the query in a retrieval task. '
        'Make sure your words are in lowercase.<|im_end|>\n<|im_start|>assistant\nThe words are: "'
    ),
    ("passage", False): (
        '<|im_start|>user\nPassage: "priority queue". Use one word to represent the passage in a retrieval task. '
        'Make sure your word is in lowercase.<|im_end|>\n<|im_start|>assistant\nThe word is: "'
    ),
    ("passage", True): (
        '<|im_start|>user\nPassage: "priority queue". Use a few words to represent the passage in a retrieval task. '
        'Make sure your words are in lowercase.<|im_end|>\n<|im_start|>assistant\nThe words are: "'
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(("side", "few"), PROMPTS)
def test_prompt_word_for_word(tokenizer, side, few):
    prompt = RetrievalPrompt(tokenizer, side, few)
    (ids,) = prompt.ids(["priority queue"], 64)
    assert tokenizer.decode(ids) == SYSTEM + PROMPTS[side, few]
    # for an ordinary text the parts, tokenised apart, are the ids of the whole
    assert ids == tokenizer(SYSTEM + PROMPTS[side, few], add_special_tokens=False)["input_ids"]


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


def test_truncation_cuts_the_text_alone(tokenizer):
    prompt = RetrievalPrompt(tokenizer, "passage", few_words=False)
    text = "Return a sorted copy of an array along the given axis."
    (whole,) = encode_plain(tokenizer, [text])
    assert len(whole) > 5
    for limit in (1, 5, len(whole), 10_000):
        (ids,) = prompt.ids([text], limit)
        assert tuple(ids) == (*prompt.left, *whole[:limit], *prompt.right)
    (ids,) = prompt.ids([text * 500], 5)
    assert tuple(ids) == (*prompt.left, *whole[:5], *prompt.right)


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The heap, THE Heap; and a tree!", ["heap", "tree"]),
        ("Return 2 arrays of shape (n, 10)", ["return", "2", "arrays", "shape", "n", "10"]),
        ("snake_case-name's", ["snake", "case", "s"]),
        ("Ärger in 東京", ["ärger", "東京"]),
        ("the and of ... !?", []),
        ("", []),
    ],
)
def test_content_words(text, words):
    # one-letter words: English stop words hold only some of them ("a", "i")
    assert [w for w in content_words(text) if w not in ("s", "n")] == [w for w in words if w not in ("s", "n")]


def test_content_tokens_tokenise_each_word_alone(tokenizer):
    tokens = ContentTokens(tokenizer)
    alone = lambda word: tokenizer(word, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert tokens("The heap and the array's axis.") == sorted(
        {*alone("heap"), *alone("array"), *alone("s"), *alone("axis")}
    )
    # a word within a text has a space before it, and so other ids
    assert alone("heap") != alone(" heap")
    assert tokens("HEAP heap") == sorted(set(alone("heap")))
    assert tokens("the of") == []
    # a special token is no content
    assert not set(tokens("<|im_end|> <file_sep>")) & set(tokenizer.convert_tokens_to_ids(SPECIAL))
