from __future__ import annotations

import math
from dataclasses import replace

import pytest

from diffret_lib import collection as module
from diffret_lib.beir import load_beir
from diffret_lib.collection import Collection, bm25_ndcg, contains_run, lexical_overlap, load_collection


@pytest.fixture
def cats() -> Collection:
    return Collection(
        name="cats",
        passage_ids=[f"p{i}" for i in range(20)],
        passages=[f"passage {i} speaks of animal{i}" for i in range(20)],
        query_ids=[f"q{i}" for i in range(8)],
        queries=[f"the animal{i}" for i in range(8)],
        qrels={f"q{i}": {f"p{i}": 1, f"p{19 - i}": 2 if i % 2 else 0} for i in range(8)},
    )


def test_fingerprint_follows_content_and_not_the_name(cats: Collection) -> None:
    assert replace(cats, name="dogs", description="other").fingerprint == cats.fingerprint
    texts = [*cats.passages[:-1], "other"]
    assert replace(cats, passages=texts).fingerprint != cats.fingerprint
    assert replace(cats, queries=["other", *cats.queries[1:]]).fingerprint != cats.fingerprint
    assert replace(cats, qrels={**cats.qrels, "q0": {"p0": 2, "p19": 0}}).fingerprint != cats.fingerprint
    assert replace(cats, passage_ids=[*cats.passage_ids[:-1], "p"], qrels={q: {"p1": 1} for q in cats.qrels})
    shuffled = {q: dict(reversed(j.items())) for q, j in reversed(cats.qrels.items())}
    assert replace(cats, qrels=shuffled).fingerprint == cats.fingerprint
    # moving a boundary between id and text must show
    a = Collection("x", ["a"], ["bc"], ["q"], ["t"], {"q": {"a": 1}})
    b = Collection("x", ["ab"], ["c"], ["q"], ["t"], {"q": {"ab": 1}})
    assert a.fingerprint != b.fingerprint


def test_sample_holds_all_relevant_passages_and_others(cats: Collection) -> None:
    part = cats.sample(3, 10, seed=4)
    assert (len(part.queries), len(part.passages)) == (3, 10)
    assert part.coverage == "sample of 10 of 20 passages, 3 of 8 queries"
    for query_id in part.query_ids:
        assert part.relevant(query_id) == cats.relevant(query_id)
    assert [p for p in cats.passage_ids if p in part.passage_ids] == part.passage_ids
    assert all(part.passages[i] == cats.passages[int(p[1:])] for i, p in enumerate(part.passage_ids))
    relevant = {p for q in part.query_ids for p in part.relevant(q)}
    assert set(part.passage_ids) - relevant


def test_sample_is_seeded_nested_and_independent_of_order(cats: Collection) -> None:
    assert cats.sample(3, 10, seed=1) == cats.sample(3, 10, seed=1)
    assert len({tuple(cats.sample(3, 10, seed=s).query_ids) for s in range(8)}) > 1
    assert len({tuple(cats.sample(3, 10, seed=s).passage_ids) for s in range(8)}) > 1
    assert set(cats.sample(2, 10, seed=1).query_ids) < set(cats.sample(5, 20, seed=1).query_ids)
    turned = replace(cats, passage_ids=cats.passage_ids[::-1], passages=cats.passages[::-1])
    assert set(turned.sample(3, 10, seed=1).passage_ids) == set(cats.sample(3, 10, seed=1).passage_ids)


def test_sample_of_everything_is_whole(cats: Collection) -> None:
    assert cats.sample(None, None, seed=3).coverage == "whole"
    assert cats.sample(99, 99, seed=3) == cats
    part = cats.sample(4, None, seed=3)
    assert part.passage_ids == cats.passage_ids
    assert part.coverage == "sample of 20 of 20 passages, 4 of 8 queries"
    assert part.sample(2, 9).coverage.endswith("(sample of 20 of 20 passages, 4 of 8 queries)")


def test_sample_too_small_takes_fewer_queries_or_raises() -> None:
    many = Collection(
        "many", ["a", "b", "c", "d"], list("abcd"), ["q", "r"], ["x", "y"],
        {"q": {"a": 1, "b": 1}, "r": {"c": 1, "d": 1}},
    )  # fmt: skip
    part = many.sample(2, 3)
    assert len(part.queries) == 1 and len(part.passages) == 3
    assert part.coverage == "sample of 3 of 4 passages, 1 of 2 queries"
    with pytest.raises(ValueError, match="do not fit into 1 passages"):
        many.sample(2, 1)
    with pytest.raises(ValueError, match="n_queries must be at least 1"):
        many.sample(0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passages": ["one"]}, "20 passage ids but 1 passage texts"),
        ({"passage_ids": ["p0"] * 20}, "passage ids that occur twice: p0"),
        ({"query_ids": ["q0"] * 8}, "query ids that occur twice: q0"),
        ({"qrels": {"q0": {"p0": 1}}}, "do not name the same query ids: q1, q2, q3"),
        ({"qrels": {f"q{i}": {"p99": 1} for i in range(8)}}, "query 'q0' name unknown passages: p99"),
        ({"qrels": {f"q{i}": {"p1": 0} for i in range(8)}}, "query 'q0' has no relevant passage"),
    ],
)
def test_inconsistent_content_is_named(cats: Collection, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(cats, **change)


def test_statistics(cats: Collection) -> None:
    found = cats.statistics()
    assert found["passages"] == 20 and found["queries"] == 8 and found["coverage"] == "whole"
    assert found["relevant_per_query"] == pytest.approx((4 * 1 + 4 * 2) / 8)
    assert found["passage_words"] == 5 and found["query_words"] == 2
    assert found["fingerprint"] == cats.fingerprint


def test_beir_round_trip(cats: Collection, tmp_path) -> None:
    odd = replace(cats, passages=['tab\tquote " line\nend \u2028 é', *cats.passages[1:]])
    folder = odd.write_beir(tmp_path / "cats", split="dev")
    back = load_beir(folder, "dev")
    assert back.fingerprint == odd.fingerprint
    assert load_collection(f"{folder}:dev") == back and back.name == "cats:dev"
    assert [p.name for p in tmp_path.iterdir()] == ["cats"]
    with pytest.raises(FileExistsError, match="cats exists already"):
        cats.write_beir(folder)


def test_failed_write_leaves_nothing(cats: Collection, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(module.json, "dumps", fail)
    with pytest.raises(OSError, match="no space left"):
        cats.write_beir(tmp_path / "cats")
    assert list(tmp_path.iterdir()) == []


def test_lexical_overlap_by_hand() -> None:
    found = lexical_overlap(
        Collection(
            "x",
            ["a", "b", "c"],
            ["Sorts the Rows of a frame", "frame of rows", "sort columns quickly, then stop"],
            ["q", "r"],
            ["the rows of wood", "Columns, quickly then!"],
            {"q": {"a": 1, "b": 1, "c": 0}, "r": {"c": 1, "b": 1}},
        )
    )
    # q: rows in a and b, wood nowhere: 1/2.  r: columns and quickly ("then" is a stop word) in c, none in b: 1/2.
    assert found["content_words"] == pytest.approx(0.5)
    assert found["whole_query"] == pytest.approx(0.5)
    assert contains_run(["a", "bc", "d"], ["bc", "d"]) and not contains_run(["a", "bc", "d"], ["c", "d"])


def test_bm25_ndcg_by_hand() -> None:
    texts = ["apples grow", "pears grow and pears fall", "stones"]
    best_first = Collection("x", ["a", "b", "c"], texts, ["q"], ["pear"], {"q": {"b": 1}})
    assert bm25_ndcg(best_first) == pytest.approx(1.0)  # only by stemming
    second = replace(best_first, queries=["growing"], qrels={"q": {"b": 1}})
    assert bm25_ndcg(second) == pytest.approx(1 / math.log2(3))  # the shorter passage stands first
    all_relevant = {"q": {"a": 1, "b": 1, "c": 1}}
    assert bm25_ndcg(replace(best_first, queries=["the of"], qrels=all_relevant)) == 0  # no word is searched for


def test_load_collection_names_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match="no collection 'nothing/here'.*pydocs/pandas-train"):
        load_collection("nothing/here")
    with pytest.raises(ValueError, match="unknown collection 'pydocs/perl'; there are pydocs/pandas"):
        load_collection("pydocs/perl")
