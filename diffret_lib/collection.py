"""Retrieval collections: passages, queries and relevance judgements, held together and fingerprinted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The lower-cased words (runs of letters, digits and underscores) of a text."""
    return _WORD.findall(text.lower())


def seeded_order(ids: Iterable[str], seed: int | str) -> list[str]:
    """The ids in a pseudo-random order that depends on each id and the seed alone.

    The order is that of the SHA-256 of ``seed`` and id, so that it is the same on every machine and in
    every version of every library, and so that a smaller sample is part of a larger one.
    """
    return sorted(ids, key=lambda i: (hashlib.sha256(f"{seed}\0{i}".encode()).digest(), i))


@dataclass(frozen=True)
class Collection:
    """A retrieval collection.

    Parameters
    ----------
    name : str
        For tables, such as ``"pydocs/numpy"``.
    passage_ids, passages : list of str
        Of the same length; the ids are unique.
    query_ids, queries : list of str
        Of the same length; the ids are unique.
    qrels : dict of str to dict of str to int
        Relevance by query id and passage id.  Every query has at least one passage of relevance above 0.
    coverage : str
        ``"whole"``, or what part of the collection this is, in words.
    description : str
        Where the collection comes from (package and version, folder and split).

    Raises
    ------
    ValueError
        When lengths differ, an id occurs twice, or the judgements name unknown ids or leave a query out.
    """

    name: str
    passage_ids: list[str]
    passages: list[str]
    query_ids: list[str]
    queries: list[str]
    qrels: dict[str, dict[str, int]]
    coverage: str = "whole"
    description: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for kind, ids, texts in (
            ("passage", self.passage_ids, self.passages),
            ("query", self.query_ids, self.queries),
        ):
            if len(ids) != len(texts):
                raise ValueError(f"{self.name}: {len(ids)} {kind} ids but {len(texts)} {kind} texts")
            if len(set(ids)) != len(ids):
                twice = sorted(i for i, count in Counter(ids).items() if count > 1)[:3]
                raise ValueError(f"{self.name}: {kind} ids that occur twice: {', '.join(twice)}")
        known_passages, known_queries = set(self.passage_ids), set(self.query_ids)
        if known_queries != self.qrels.keys():
            odd = sorted(known_queries ^ self.qrels.keys())[:3]
            raise ValueError(f"{self.name}: queries and judgements do not name the same query ids: {', '.join(odd)}")
        for query_id, judged in self.qrels.items():
            if unknown := sorted(judged.keys() - known_passages)[:3]:
                raise ValueError(
                    f"{self.name}: the judgements of query {query_id!r} name unknown passages: {', '.join(unknown)}"
                )
            if not any(grade > 0 for grade in judged.values()):
                raise ValueError(f"{self.name}: query {query_id!r} has no relevant passage")

    def __repr__(self) -> str:
        return (
            f"Collection({self.name!r}, {len(self.passages):,} passages, {len(self.queries):,} queries, "
            f"coverage={self.coverage!r})"
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over ids, texts and judgements, in order; name and description do not count."""
        digest = hashlib.sha256()

        def add(*parts: Any) -> None:
            digest.update(json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")

        for passage in zip(self.passage_ids, self.passages, strict=True):
            add("passage", *passage)
        for query_id, query in zip(self.query_ids, self.queries, strict=True):
            add("query", query_id, query, sorted(self.qrels[query_id].items()))
        return digest.hexdigest()

    def relevant(self, query_id: str) -> list[str]:
        """Ids of the passages of relevance above 0, sorted."""
        return sorted(p for p, grade in self.qrels[query_id].items() if grade > 0)

    def sample(self, n_queries: int | None, n_passages: int | None, seed: int = 0) -> Collection:
        """A seeded random part: queries, all their relevant passages, and random other passages.

        No retriever has a say in which passages are taken: a pool of one retriever's results would be
        biased against it.  Queries and passages keep their order; with one seed a smaller sample's queries
        are among a larger one's.

        Parameters
        ----------
        n_queries, n_passages : int or None
            How many to take; None, or more than there are, means all.  Where the relevant passages of
            ``n_queries`` queries are more than ``n_passages``, queries are taken (in seeded order) up to the
            first whose relevant passages no longer fit; ``coverage`` states the numbers reached.
        seed : int

        Raises
        ------
        ValueError
            When a number is below 1, or not even one query's relevant passages fit.
        """
        for label, number in (("n_queries", n_queries), ("n_passages", n_passages)):
            if number is not None and number < 1:
                raise ValueError(f"{label} must be at least 1 or None, got {number}")
        total_queries, total_passages = len(self.query_ids), len(self.passage_ids)
        want_queries = total_queries if n_queries is None else min(n_queries, total_queries)
        want_passages = total_passages if n_passages is None else min(n_passages, total_passages)
        if (want_queries, want_passages) == (total_queries, total_passages):
            return self
        kept_queries: set[str] = set()
        kept_passages: set[str] = set()
        for query_id in seeded_order(self.query_ids, f"queries {seed}")[:want_queries]:
            enlarged = kept_passages.union(self.relevant(query_id))
            if len(enlarged) > want_passages:
                break
            kept_queries.add(query_id)
            kept_passages = enlarged
        if not kept_queries:
            raise ValueError(
                f"{self.name}: the relevant passages of the first sampled query do not fit into "
                f"{want_passages} passages; ask for more"
            )
        for passage_id in seeded_order(self.passage_ids, f"passages {seed}"):
            if len(kept_passages) >= want_passages:
                break
            kept_passages.add(passage_id)
        coverage = (
            f"sample of {len(kept_passages):,} of {total_passages:,} passages, "
            f"{len(kept_queries):,} of {total_queries:,} queries"
        )
        if self.coverage != "whole":
            coverage += f" ({self.coverage})"
        return replace(self.restrict(kept_passages, kept_queries), coverage=coverage)

    def restrict(self, passage_ids: Iterable[str], query_ids: Iterable[str]) -> Collection:
        """The part with these passages and queries, in this collection's order; judgements of others go."""
        passages, queries = set(passage_ids), set(query_ids)
        keep_p = [i for i, p in enumerate(self.passage_ids) if p in passages]
        keep_q = [i for i, q in enumerate(self.query_ids) if q in queries]
        return replace(
            self,
            passage_ids=[self.passage_ids[i] for i in keep_p],
            passages=[self.passages[i] for i in keep_p],
            query_ids=[self.query_ids[i] for i in keep_q],
            queries=[self.queries[i] for i in keep_q],
            qrels={
                self.query_ids[i]: {p: g for p, g in self.qrels[self.query_ids[i]].items() if p in passages}
                for i in keep_q
            },
        )

    def statistics(self) -> dict[str, Any]:
        """Sizes, relevant passages per query, mean lengths in words, coverage and fingerprint."""

        def mean(values: list[int]) -> float:
            return float(np.mean(values)) if values else 0.0

        return {
            "collection": self.name,
            "passages": len(self.passages),
            "queries": len(self.queries),
            "relevant_per_query": mean([len(self.relevant(q)) for q in self.query_ids]),
            "passage_words": mean([len(p.split()) for p in self.passages]),
            "query_words": mean([len(q.split()) for q in self.queries]),
            "coverage": self.coverage,
            "fingerprint": self.fingerprint,
        }

    def write_beir(self, folder: str | Path, split: str = "test") -> Path:
        """Write a BEIR folder: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

        The folder is written beside its final place and renamed, so that it is whole or absent.

        Raises
        ------
        FileExistsError
            When ``folder`` exists and is not an empty folder.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists already; remove it or choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            (temporary / "qrels").mkdir()
            with (temporary / "corpus.jsonl").open("w", encoding="utf-8", newline="\n") as out:
                for i, text in zip(self.passage_ids, self.passages, strict=True):
                    out.write(json.dumps({"_id": i, "title": "", "text": text}, ensure_ascii=False) + "\n")
            with (temporary / "queries.jsonl").open("w", encoding="utf-8", newline="\n") as out:
                for i, text in zip(self.query_ids, self.queries, strict=True):
                    out.write(json.dumps({"_id": i, "text": text}, ensure_ascii=False) + "\n")
            with (temporary / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="\n") as out:
                out.write("query-id\tcorpus-id\tscore\n")
                for query_id in self.query_ids:
                    for passage_id, grade in sorted(self.qrels[query_id].items()):
                        out.write(f"{query_id}\t{passage_id}\t{grade}\n")
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder


def contains_run(text: list[str], run: list[str]) -> bool:
    """Whether the words of ``run`` stand in ``text`` one after the other."""
    return bool(run) and f" {' '.join(run)} " in f" {' '.join(text)} "


def lexical_overlap(collection: Collection) -> dict[str, float]:
    """How much of the queries' wording stands in their relevant passages.

    Returns
    -------
    dict
        ``content_words``: the share of a query's content words (English stop words left out) found in a
        relevant passage, averaged over its relevant passages and then over queries.  ``whole_query``: the
        share of queries whose words all stand in a relevant passage one after the other.
    """
    from bm25s.stopwords import STOPWORDS_EN

    stop = set(STOPWORDS_EN)
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    needed = {p for q in collection.query_ids for p in collection.relevant(q)}
    passage_words = {p: words(texts[p]) for p in needed}
    vocabularies = {p: set(w) for p, w in passage_words.items()}
    shares, whole = [], []
    for query_id, query in zip(collection.query_ids, collection.queries, strict=True):
        run = words(query)
        content = set(run) - stop or set(run)
        relevant = collection.relevant(query_id)
        if content:
            shares.append(np.mean([len(content & vocabularies[p]) / len(content) for p in relevant]))
        whole.append(any(contains_run(passage_words[p], run) for p in relevant))
    return {
        "content_words": float(np.mean(shares)) if shares else 0.0,
        "whole_query": float(np.mean(whole)) if whole else 0.0,
    }


def bm25_ndcg(collection: Collection, k: int = 10) -> float:
    """nDCG@k of :class:`~diffret_lib.retrievers.BM25`: how lexical a collection is."""
    from diffret_lib import scoring
    from diffret_lib.evaluation import per_query
    from diffret_lib.retrievers import BM25

    retriever = BM25()
    passages = retriever.encode_passages(collection.passages)
    ranked = scoring.rank(retriever.encode_queries(collection.queries), passages, "sparse", k)
    run = scoring.to_results(*ranked, collection.query_ids, collection.passage_ids)
    return float(per_query(collection.qrels, run, [f"ndcg@{k}"])[f"ndcg@{k}"].mean())


def load_collection(name_or_path: str | Path, seed: int = 0) -> Collection:
    """Load a collection by its name or from a BEIR folder.

    Parameters
    ----------
    name_or_path : str or Path
        ``"pydocs/<package>"`` (see :mod:`diffret_lib.pydocs`; ``"pydocs/pandas-train"``, ``-dev`` and
        ``-test`` for pandas' splits), or the path of a BEIR folder, with ``":split"`` appended for a split
        other than ``test``.
    seed : int
        Salts the split of pandas; the recorded fingerprints are those of seed 0.

    Raises
    ------
    ValueError
        For an unknown ``pydocs`` name, or content that is not as recorded.
    FileNotFoundError
        For a path that is no BEIR folder.
    """
    text = str(name_or_path)
    if text.startswith("pydocs/") and not Path(text).is_dir():
        from diffret_lib.pydocs import load_pydocs

        return load_pydocs(text.removeprefix("pydocs/"), seed=seed)
    from diffret_lib.beir import load_beir

    if not Path(text).is_dir() and ":" in text:
        folder, _, split = text.rpartition(":")
        if Path(folder).is_dir() and split:
            return load_beir(folder, split)
    if not Path(text).is_dir():
        from diffret_lib.pydocs import collection_names

        raise FileNotFoundError(
            f"no collection {text!r}: neither a BEIR folder nor one of {', '.join(collection_names())}"
        )
    return load_beir(text)
