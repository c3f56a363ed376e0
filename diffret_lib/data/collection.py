"""Retrieval collections: passages and queries as Arrow tables, relevance judgements, and a fingerprint."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any

import datasets
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from diffret_lib.data.checks import identifier, numbers_by_id, strings, whole_number

#: Columns of passages and of queries.
FEATURES = datasets.Features({"id": datasets.Value("string"), "text": datasets.Value("string")})


def words(text: str) -> list[str]:
    """Lower-cased words (runs of letters, digits and underscores) of a text."""
    return re.findall(r"\w+", text.lower())


def contains_run(text: list[str], run: list[str]) -> bool:
    """Whether the words of ``run`` stand in ``text`` one after the other."""
    return bool(run) and f" {' '.join(run)} " in f" {' '.join(text)} "


def seeded_order(ids: Iterable[str], seed: int | str, count: int | None = None) -> list[str]:
    """The first ``count`` ids (None: all) in the order of the SHA-256 of seed and id.

    It is the same everywhere, and a smaller sample is part of a larger one.
    """

    def place(name: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}\0{name}".encode()).digest(), name

    return sorted(ids, key=place) if count is None else heapq.nsmallest(count, ids, place)


class Column(datasets.Column):
    """A column of a Dataset as a sequence; iterating reads 1,000 rows at a time."""

    def __iter__(self) -> Iterator[str]:
        for batch in self.source.select_columns(self.column_name).iter(1000):
            yield from batch[self.column_name]

    def __getitem__(self, key: int | slice) -> Any:
        return self.source[key][self.column_name]


@dataclass(frozen=True, eq=False, repr=False)
class Collection:
    """A retrieval collection; :meth:`from_texts` makes one of lists.

    Raises
    ------
    ValueError
        When queries and judgements do not name the same query ids, or a query has no relevant passage.
    """

    name: str
    passage_rows: datasets.Dataset  #: with the columns ``id`` (unique) and ``text``; so is ``query_rows``
    query_rows: datasets.Dataset
    qrels: dict[str, dict[str, int]]  #: relevance by query id and passage id; above 0 is relevant
    coverage: str = "whole"  #: or what part of the collection this is, in words
    description: str = ""  #: package and version, or folder and split; what was found while reading
    text_format: str = "text"  #: what of a passage its text is
    missing: Sequence[str] = ()  #: judged passages that are not there: they count in the ideal ranking only
    own: Sequence[str] = ()  #: ids of queries that are passages themselves, under the same id

    def __post_init__(self) -> None:
        if odd := sorted(set(self.query_ids) ^ self.qrels.keys()):
            raise ValueError(f"{self.name}: queries and judgements differ in their query ids: {', '.join(odd[:3])}")
        if bare := [query_id for query_id, judged in self.qrels.items() if not any(g > 0 for g in judged.values())]:
            raise ValueError(f"{self.name}: query {bare[0]!r} has no relevant passage")

    @classmethod
    def from_texts(
        cls, name: str, passage_ids: Sequence[str], passages: Sequence[str], query_ids: Sequence[str],
        queries: Sequence[str], qrels: dict[str, dict[str, int]], **more: str,
    ) -> Collection:  # fmt: skip
        """Make a collection in memory; ``more`` are other attributes.

        ValueError: no name, other lengths, ids that occur twice or that a TREC run cannot hold, unknown ids, no
        strings, half of a surrogate pair.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a collection needs a name, not {name!r}")
        numbers_by_id("qrels", qrels, whole=True)
        rows = []
        for what, ids, texts in (("passage", passage_ids, passages), ("query", query_ids, queries)):
            strings(f"{what} ids", ids), strings(f"{what} texts", texts)
            if twice := [i for i, count in Counter(map(identifier, ids)).items() if count > 1]:
                raise ValueError(f"{name}: ids that occur twice: {', '.join(twice[:3])}")
            if len(ids) != len(texts):
                raise ValueError(f"{name}: {len(ids)} {what} ids for {len(texts)} texts")
            for key, text in zip(ids, texts, strict=True):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{name}: {what} {key!r}: {error}") from None
            rows.append(datasets.Dataset.from_dict({"id": list(ids), "text": list(texts)}, features=FEATURES))
        if unknown := sorted(set().union(*qrels.values()) - set(passage_ids)):
            raise ValueError(f"{name}: the judgements name unknown passages: {', '.join(unknown[:3])}")
        return cls(name, *rows, qrels, **more)

    passage_ids = property(lambda self: Column(self.passage_rows, "id"), doc="Ids of the passages.")
    passages = property(lambda self: Column(self.passage_rows, "text"), doc="Texts of the passages.")
    query_ids = property(lambda self: Column(self.query_rows, "id"), doc="Ids of the queries.")
    queries = property(lambda self: Column(self.query_rows, "text"), doc="Texts of the queries.")

    def __repr__(self) -> str:
        sizes = f"{len(self.passages):,} passages, {len(self.queries):,} queries"
        return f"Collection({self.name!r}, {sizes}, coverage={self.coverage!r})"

    @cached_property
    def excluded(self) -> np.ndarray | None:
        """Row of the passage that is the query itself, int64 (n_queries,), -1 for none; None where no query has one.

        BEIR's evaluation leaves such a passage out of the query's ranking (ArguAna, Quora).
        """
        own = set(self.own).intersection(self.query_ids if self.own else ())
        rows = {passage: row for row, passage in enumerate(self.passage_ids) if passage in own} if own else {}
        return np.array([rows.get(query, -1) for query in self.query_ids], np.int64) if rows else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over ids, texts, judgements and :attr:`excluded`; names and descriptions do not count."""
        digest = hashlib.sha256()
        for kind, ids, texts in (("passage", self.passage_ids, self.passages), ("query", self.query_ids, self.queries)):
            for key, text in zip(ids, texts, strict=True):
                more = [sorted(self.qrels[key].items())] if kind == "query" else []
                digest.update(json.dumps([kind, key, text, *more], separators=(",", ":")).encode() + b"\n")
        if self.excluded is not None:
            digest.update(self.excluded.tobytes())
        return digest.hexdigest()

    def relevant(self, query_id: str) -> list[str]:
        """Ids of the passages of relevance above 0, sorted; none of :attr:`missing`."""
        return sorted(p for p, grade in self.qrels[query_id].items() if grade > 0 and p not in self._missing)

    _missing = cached_property(lambda self: frozenset(self.missing))

    def sample(
        self, n_queries: int | None, n_passages: int | None, seed: int = 0,
        hard: Mapping[str, Sequence[str]] | None = None,
    ) -> Collection:  # fmt: skip
        """Take a seeded random part: queries, all their relevant passages, and other passages, hard or random ones.

        Queries and passages keep their order; with one seed a smaller sample's queries are among a larger one's.  None,
        or more than there are, means all.  Queries are taken in seeded order up to the first whose relevant passages no
        longer fit; ``coverage`` states the numbers reached.

        ``hard`` maps query ids to passage ids, best first: after the relevant passages the first one of each query is
        taken, then the second of each, and random ones when there are no more.  A pool of one retriever's results is
        harder for that retriever than for others; without ``hard`` none has a say.

        ValueError: no query fits, a number is no whole one of at least 1, ``hard`` maps no ids to lists of ids, or
        names unknown passages.
        """
        if not isinstance(hard or {}, Mapping):
            raise ValueError(f"hard must map query ids to lists of passage ids, not {hard!r:.80}")
        for query_id, best in (hard or {}).items():
            strings(f"hard passages of {query_id!r}", best)
        all_queries, all_passages = len(self.query_rows), len(self.passage_rows)
        want_queries, want_passages = (
            there if asked is None else min(whole_number(name, asked), there)
            for name, asked, there in (("n_queries", n_queries, all_queries), ("n_passages", n_passages, all_passages))
        )
        if (want_queries, want_passages) == (all_queries, all_passages):
            return self
        queries: dict[str, None] = {}
        passages: set[str] = set()
        for query_id in seeded_order(self.query_ids, f"queries {seed}")[:want_queries]:
            enlarged = passages.union(self.relevant(query_id))
            if len(enlarged) > want_passages:
                break
            queries[query_id] = None
            passages = enlarged
        if not queries:
            raise ValueError(f"{self.name}: the passages of the first query do not fit into {want_passages} passages")
        rounds = zip_longest(*((hard or {}).get(query_id, ()) for query_id in queries))
        near = [p for p in dict.fromkeys(chain.from_iterable(rounds)) if p is not None and p not in passages]
        near = near[: want_passages - len(passages)]
        passages.update(near)
        if unknown := passages.difference(self.passage_ids):
            raise ValueError(f"{self.name}: hard names unknown passages: {', '.join(sorted(unknown)[:3])}")
        if want_passages < all_passages:
            others = (p for p in self.passage_ids if p not in passages)
            passages.update(seeded_order(others, f"passages {seed}", want_passages - len(passages)))
        coverage = f"sample of {want_passages:,} of {all_passages:,} passages"
        coverage += f", {len(near):,} of them hard" if hard else ""
        coverage += f", {len(queries):,} of {all_queries:,} queries"
        coverage += "" if self.coverage == "whole" else f" ({self.coverage})"
        part = self.restrict(passages if want_passages < all_passages else None, queries)
        return replace(part, coverage=coverage)

    def restrict(self, passage_ids: Iterable[str] | None, query_ids: Iterable[str]) -> Collection:
        """Take these passages (None: all) and queries, in this collection's order; judgements of other passages go."""
        queries, rows = set(query_ids), self.passage_rows
        qrels = {query: judged for query, judged in self.qrels.items() if query in queries}
        if passage_ids is not None:
            passages = set(passage_ids)
            rows = rows.select([i for i, p in enumerate(self.passage_ids) if p in passages])
            kept = passages | self._missing
            qrels = {query: {p: r for p, r in judged.items() if p in kept} for query, judged in qrels.items()}
        chosen = self.query_rows.select([i for i, q in enumerate(self.query_ids) if q in queries])
        return replace(self, passage_rows=rows, query_rows=chosen, qrels=qrels)

    def protocol(self) -> dict[str, Any]:
        """How the collection is evaluated, beside metric and lengths: source, passage text, relevance, exclusion."""
        excluded = 0 if self.excluded is None else int((self.excluded >= 0).sum())
        return {
            "collection": self.name,
            "source": self.description,
            "passage": self.text_format,
            "relevant": "grade above 0",
            "grades": ", ".join(map(str, sorted({g for judged in self.qrels.values() for g in judged.values()}))),
            "excluded": f"the query itself ({excluded:,} queries)" if excluded else "nothing",
        }

    def statistics(self) -> dict[str, Any]:
        """Sizes, relevant passages per query, mean lengths in words, coverage and fingerprint."""
        return {
            "collection": self.name,
            "passages": len(self.passages),
            "queries": len(self.queries),
            "relevant_per_query": float(np.mean([len(self.relevant(q)) for q in self.query_ids])),
            "passage_words": float(np.mean([len(p.split()) for p in self.passages])),
            "query_words": float(np.mean([len(q.split()) for q in self.queries])),
            "coverage": self.coverage,
            "fingerprint": self.fingerprint,
        }


def lexical_overlap(collection: Collection) -> dict[str, float]:
    """Measure how much of the queries' wording stands in their relevant passages.

    ``content_words`` is the share of a query's content words (English stop words left out) found in a relevant
    passage, averaged over its relevant passages and then over queries; ``whole_query`` the share of queries whose
    words all stand in a relevant passage one after the other.
    """
    stop = set(STOPWORDS_EN)
    needed = {p for q in collection.query_ids for p in collection.relevant(q)}
    texts = zip(collection.passage_ids, collection.passages, strict=True)
    passage_words = {p: words(text) for p, text in texts if p in needed}
    shares, whole = [], []
    for query_id, query in zip(collection.query_ids, collection.queries, strict=True):
        run = words(query)
        content = set(run) - stop or set(run)
        relevant = [passage_words[p] for p in collection.relevant(query_id)]
        if content and relevant:
            shares.append(np.mean([len(content.intersection(passage)) / len(content) for passage in relevant]))
        whole.append(any(contains_run(passage, run) for passage in relevant))
    return {"content_words": float(np.mean(shares or [0])), "whole_query": float(np.mean(whole or [0]))}
