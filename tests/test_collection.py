from __future__ import annotations

import subprocess
import sys

import pytest

from diffret_lib.data.collection import Collection, contains_run, lexical_overlap, seeded_order

CATS = {
    "name": "cats",
    "passage_ids": [f"p{i}" for i in range(20)],
    "passages": [f"passage {i} speaks of animal{i}" for i in range(20)],
    "query_ids": [f"q{i}" for i in range(8)],
    "queries": [f"the animal{i}" for i in range(8)],
    "qrels": {f"q{i}": {f"p{i}": 1, f"p{19 - i}": 2 if i % 2 else 0} for i in range(8)},
}


@pytest.fixture
def cats() -> Collection:
    return Collection.from_texts(**CATS)


def changed(**parts: object) -> Collection:
    return Collection.from_texts(**{**CATS, **parts})


def test_columns_are_sequences(cats: Collection) -> None:
    texts = ['tab\tquote " line\nend \u2028 é', *CATS["passages"][1:]]
    for found, passages in ((cats, CATS["passages"]), (changed(passages=texts), texts)):
        assert found.passages[0] == passages[0] and found.passages[-1] == passages[-1] and found.passages == passages
        assert found.queries[2:4] == CATS["queries"][2:4]
        assert list(found.passage_ids) == CATS["passage_ids"] and len(found.query_ids) == 8
    assert repr(cats) == "Collection('cats', 20 passages, 8 queries, coverage='whole')"


def test_fingerprint_follows_content_and_not_the_name(cats: Collection) -> None:
    assert cats.fingerprint == "8f15c191a02ce5dc85ad89da313d88fdd89fed942ef611ea5e45d91281f88a27"
    assert changed(name="dogs", description="other").fingerprint == cats.fingerprint
    for part in (
        {"passages": [*CATS["passages"][:-1], "other"]},
        {"queries": ["other", *CATS["queries"][1:]]},
        {"qrels": {**CATS["qrels"], "q0": {"p0": 2, "p19": 0}}},
        {"passage_ids": ["p19", *CATS["passage_ids"][1:-1], "p0"]},
    ):
        assert changed(**part).fingerprint != cats.fingerprint, part
    shuffled = {q: dict(reversed(j.items())) for q, j in reversed(cats.qrels.items())}
    assert changed(qrels=shuffled).fingerprint == cats.fingerprint
    # moving a boundary between id and text must show
    a = Collection.from_texts("x", ["a"], ["bc"], ["q"], ["t"], {"q": {"a": 1}})
    b = Collection.from_texts("x", ["ab"], ["c"], ["q"], ["t"], {"q": {"ab": 1}})
    assert a.fingerprint != b.fingerprint


def test_sample_holds_all_relevant_passages_and_others(cats: Collection) -> None:
    part = cats.sample(3, 10, seed=4)
    assert (len(part.queries), len(part.passages)) == (3, 10)
    assert part.coverage == "sample of 10 of 20 passages, 3 of 8 queries"
    for query_id in part.query_ids:
        assert part.relevant(query_id) == cats.relevant(query_id)
    assert [p for p in cats.passage_ids if p in list(part.passage_ids)] == list(part.passage_ids)
    assert all(part.passages[i] == cats.passages[int(p[1:])] for i, p in enumerate(part.passage_ids))
    relevant = {p for q in part.query_ids for p in part.relevant(q)}
    assert set(part.passage_ids) - relevant


def test_sample_is_seeded_nested_and_independent_of_order(cats: Collection) -> None:
    assert cats.sample(3, 10, seed=1).fingerprint == cats.sample(3, 10, seed=1).fingerprint
    assert len({tuple(cats.sample(3, 10, seed=s).query_ids) for s in range(8)}) > 1
    assert len({tuple(cats.sample(3, 10, seed=s).passage_ids) for s in range(8)}) > 1
    assert set(cats.sample(2, 10, seed=1).query_ids) < set(cats.sample(5, 20, seed=1).query_ids)
    turned = changed(passage_ids=CATS["passage_ids"][::-1], passages=CATS["passages"][::-1])
    assert set(turned.sample(3, 10, seed=1).passage_ids) == set(cats.sample(3, 10, seed=1).passage_ids)


def test_sample_of_everything_is_whole(cats: Collection) -> None:
    assert cats.sample(None, None, seed=3).coverage == "whole"
    assert cats.sample(99, 99, seed=3) is cats
    part = cats.sample(4, None, seed=3)
    assert part.passage_ids == cats.passage_ids
    assert part.coverage == "sample of 20 of 20 passages, 4 of 8 queries"
    assert part.sample(2, 9).coverage.endswith("(sample of 20 of 20 passages, 4 of 8 queries)")


def test_sample_too_small_takes_fewer_queries_or_raises() -> None:
    many = Collection.from_texts(
        "many", ["a", "b", "c", "d"], list("abcd"), ["q", "r"], ["x", "y"],
        {"q": {"a": 1, "b": 1}, "r": {"c": 1, "d": 1}},
    )  # fmt: skip
    part = many.sample(2, 3)
    assert len(part.queries) == 1 and len(part.passages) == 3
    assert part.coverage == "sample of 3 of 4 passages, 1 of 2 queries"
    with pytest.raises(ValueError, match="do not fit into 1 passages"):
        many.sample(2, 1)


@pytest.mark.parametrize("bad", [0, -1, "4", 2.0, True, float("nan"), 10**30])
def test_sizes_that_are_none(cats: Collection, bad: object) -> None:
    for sizes, name in (((bad, 3), "n_queries"), ((3, bad), "n_passages")):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not"):
            cats.sample(*sizes)


def test_hard_passages_come_before_random_ones(cats: Collection) -> None:
    plain = cats.sample(3, 10, seed=4)
    first, second, third = (q for q in seeded_order(cats.query_ids, "queries 4") if q in list(plain.query_ids))
    relevant = {p for q in plain.query_ids for p in plain.relevant(q)}
    free = [p for p in cats.passage_ids if p not in relevant]
    hard = {first: free[:3], second: [min(relevant), free[3], free[0]], third: [free[0], free[4]], "q9": ["p0"]}

    def drawn(n_passages: int) -> set[str]:
        return set(cats.sample(3, n_passages, 4, hard).passage_ids) - relevant

    n = len(relevant)
    assert drawn(n) == set() and drawn(n + 1) == {free[0]}  # the first of each query: one of them, and what is relevant
    assert drawn(n + 2) == {free[0], free[1]} and drawn(n + 3) == {free[0], free[1], free[3]}  # the second of each
    assert drawn(n + 5) == set(free[:5])
    more = cats.sample(3, n + 8, 4, hard)
    rest = [p for p in seeded_order(cats.passage_ids, "passages 4") if p not in relevant | set(free[:5])]
    assert set(more.passage_ids) == relevant | set(free[:5]) | set(rest[:3]) and more.query_ids == plain.query_ids[:]
    assert more.coverage == f"sample of {n + 8} of 20 passages, 5 of them hard, 3 of 8 queries"
    assert cats.sample(3, n, 4, hard).coverage.endswith("passages, 0 of them hard, 3 of 8 queries")
    faults = {"names unknown passages: p99": {first: ["p99"]}, "must be a list of strings, not 'bd'": {first: "bd"}}
    for message, wrong in (faults | {"must map query ids to lists": 5}).items():
        with pytest.raises(ValueError, match=f"hard .*{message}"):
            cats.sample(3, 10, 4, wrong)
    assert seeded_order(cats.passage_ids, 4, 7) == seeded_order(cats.passage_ids, 4)[:7]


def test_importing_leaves_datasets_as_it_was() -> None:
    code = "import datasets as d; before = d.are_progress_bars_disabled(), d.logging.get_verbosity(); import "
    code += "diffret_lib.data.beir; assert before == (d.are_progress_bars_disabled(), d.logging.get_verbosity())"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"passages": ["one"]}, "cats: 20 passage ids for 1 texts"),
    ({"passages": [*CATS["passages"][:-1], "\ud800"]}, "cats: passage 'p19': .*surrogates not allowed"),
    ({"name": None}, "a collection needs a name, not None"),
    ({"passage_ids": ["p0"] * 20}, "ids that occur twice: p0"),
    ({"passage_ids": [*CATS["passage_ids"][:-1], "p 19"]}, "an id .* holds no white space, got 'p 19'"),
    ({"passage_ids": list(range(20))}, "passage ids must be strings, not int"),
    ({"queries": "eight..."}, "query texts must be a list of strings, not 'eight...'"),
    ({"queries": [None] * 8}, "query texts must be strings, not NoneType"),
    ({"query_ids": ["q0"] * 8}, "ids that occur twice: q0"),
    ({"qrels": {"q0": {"p0": 1}}}, "differ in their query ids: q1, q2, q3"),
    ({"qrels": {f"q{i}": {"p99": 1} for i in range(8)}}, "name unknown passages: p99"),
    ({"qrels": {f"q{i}": {"p1": 0} for i in range(8)}}, "query 'q0' has no relevant passage"),
    ({"qrels": {"q0": {"p1": 0.5}}}, "qrels: a whole number .* for query 'q0', passage 'p1', not 0.5"),
])  # fmt: skip
def test_inconsistent_content_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**change)


def test_statistics(cats: Collection) -> None:
    found = cats.statistics()
    assert found["passages"] == 20 and found["queries"] == 8 and found["coverage"] == "whole"
    assert found["relevant_per_query"] == pytest.approx((4 * 1 + 4 * 2) / 8)
    assert found["passage_words"] == 5 and found["query_words"] == 2
    assert found["fingerprint"] == cats.fingerprint
    assert cats.protocol() == {
        "collection": "cats", "source": "", "passage": "text", "relevant": "grade above 0", "grades": "0, 1, 2",
        "excluded": "nothing",
    }  # fmt: skip


def test_restricting_leaves_no_query_without_a_relevant_passage(cats: Collection) -> None:
    part = cats.restrict(["p0", "p2", "p18"], ["q1", "q0"])
    assert part.qrels == {"q0": {"p0": 1}, "q1": {"p18": 2}} and list(part.passage_ids) == ["p0", "p2", "p18"]
    with pytest.raises(ValueError, match="query 'q3' has no relevant passage"):
        cats.restrict(["p0"], ["q0", "q3"])


def test_lexical_overlap_by_hand() -> None:
    passages = ["Sorts the Rows of a frame", "frame of rows", "sort columns quickly, then stop"]
    queries = ["the rows of wood", "Columns, quickly then!"]
    judged = {"q": {"a": 1, "b": 1, "c": 0}, "r": {"c": 1, "b": 1}}
    found = lexical_overlap(Collection.from_texts("x", list("abc"), passages, ["q", "r"], queries, judged))
    # q: rows in a and b, wood nowhere: 1/2.  r: columns and quickly ("then" is a stop word) in c, none in b: 1/2.
    assert found["content_words"] == pytest.approx(0.5)
    assert found["whole_query"] == pytest.approx(0.5)
    assert contains_run(["a", "bc", "d"], ["bc", "d"]) and not contains_run(["a", "bc", "d"], ["c", "d"])
