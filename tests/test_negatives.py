from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from diffret_lib.data.collection import Collection
from diffret_lib.training.data import training_data
from diffret_lib.training.negatives import mine_hard_negatives, negatives_table

COLLECTION = Collection.from_texts(
    "made", list("abcdef"), ["one", "two", "three", "four", "one", "six"], ["q1", "q2"], ["x", "y"],
    {"q1": {"a": 1, "b": 0}, "q2": {"c": 2, "d": 1}},
)  # fmt: skip
RUNS = {
    "BM25": {"q1": {"a": 9.0, "b": 8.0, "c": 7.0}, "q2": {"a": 3.0}},
    "DiffRetriever": {"q1": {"e": 5.0, "c": 4.0, "d": 3.0}, "q2": {"d": 9.0, "f": 8.0, "b": 7.0}},
}


def mined(n: int, **options) -> dict[str, list[tuple[str, str]]]:
    frame = mine_hard_negatives(COLLECTION, RUNS, n, **options)
    assert list(frame) == ["query_id", "passage_id", "source"]
    return {q: list(zip(v["passage_id"], v["source"])) for q, v in frame.groupby("query_id")}


def test_rankings_take_turns_without_what_is_relevant():
    found = mined(3)
    # q1: a is relevant, e has its text; q2 begins with the other ranking, c and d are relevant
    assert found["q1"] == [("b", "BM25"), ("c", "DiffRetriever"), ("d", "DiffRetriever")]
    assert found["q2"] == [("f", "DiffRetriever"), ("a", "BM25"), ("b", "DiffRetriever")]
    assert mined(3) == found and mined(1) == {q: pairs[:1] for q, pairs in found.items()}


def test_a_passage_that_is_the_query_is_no_negative():
    """Neither mined, nor against its query when it is another one's negative (ArguAna)."""
    texts = {"q1": "one", "a": "two", "b": "three", "c": "four"}
    collection = Collection.from_texts(
        "own", list(texts), list(texts.values()), ["q1", "q2"], ["one", "x"], {"q1": {"a": 1}, "q2": {"b": 1}},
        own=["q1"],
    )  # fmt: skip
    runs = {"BM25": {"q1": {"q1": 9.0, "c": 8.0}, "q2": {"q1": 9.0}}}
    found = mine_hard_negatives(collection, runs, 1)
    assert found[["query_id", "passage_id"]].to_numpy().tolist() == [["q1", "c"], ["q2", "q1"]]
    left_out = training_data([(collection, found)]).false_negatives(torch.arange(2))
    # positives a and b, then negatives c and q1
    assert left_out.tolist() == [[False, False, False, True], [False, False, False, False]]


def test_filled_up_at_random():
    few = {"BM25": {"q1": {"b": 1.0}, "q2": {"a": 1.0}}}
    orders = {tuple(mine_hard_negatives(COLLECTION, few, 3, seed=s)["passage_id"]) for s in range(8)}
    assert len(orders) > 1 and all((order[0], order[3]) == ("b", "a") for order in orders)
    sources = mine_hard_negatives(COLLECTION, few, 3)["source"].tolist()
    assert sources == ["BM25", "random", "random"] * 2
    assert all(not {"a", "e"} & set(order[:3]) and not {"c", "d"} & set(order[3:]) for order in orders)


def test_too_few_passages():
    with pytest.raises(ValueError, match=r"made: query 'q2' has only 3 passages that are not relevant, and 4"):
        mined(4)
    with pytest.raises(ValueError, match="n must be at least 1"):
        mined(0)


def test_table():
    table = negatives_table(COLLECTION, mine_hard_negatives(COLLECTION, RUNS, 2))
    assert table["negatives_per_query"].item() == 2
    shares = pd.Series({c: table[c].item() for c in table if c.startswith("share_")})
    assert shares.sum() == pytest.approx(1) and shares["share_BM25"] == 0.5


def test_a_query_without_a_relevant_passage_has_none():
    qrels = {"q1": {"gone": 1}, "q2": COLLECTION.qrels["q2"]}
    collection = replace(COLLECTION, qrels=qrels, missing=["gone"])
    made = mine_hard_negatives(collection, RUNS, 2)
    assert negatives_table(collection, made)["negatives_per_query"].item() == 2
    assert made["query_id"].unique().tolist() == ["q2"] and len(made) == 2
