"""Hard negatives of the training queries, from the rankings of several retrievers.

``sentence_transformers.util.mine_hard_negatives`` is not used: it ranks with one SentenceTransformer, by its single
dense vectors, so neither with BM25 nor by a hybrid of MaxSim and sparse scores.  It excludes the positives that
rows of the same anchor name, so several of a query too, but leaves out the rows for which it finds too few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest

import pandas as pd

from diffret_lib.cache import atomic_path, cache_dir, fingerprint
from diffret_lib.collection import Collection, seeded_order
from diffret_lib.evaluation import Run
from diffret_lib.retrievers import BM25
from diffret_lib.study import SELECTION_MODE, TASKS, Study

#: Part of the cache's addresses: raise it when the same rankings would give other negatives.
MINING_VERSION = 1
RANDOM = "random"


def mine_hard_negatives(collection: Collection, runs: Mapping[str, Run], n: int, seed: int = 0) -> pd.DataFrame:
    """The n highest passages of each query that are not relevant, taken from the rankings in turn.

    Which ranking comes first changes from query to query.  Passages judged relevant, and passages of the same
    text as one of those or as a negative already taken, are left out.  A query whose rankings hold too few is
    filled up with random passages.

    Parameters
    ----------
    collection : Collection
    runs : dict of str to run
        Rankings of the collection's queries (query id to passage id to score), by the name of their source.
    n : int
    seed : int
        Of the random passages.

    Returns
    -------
    DataFrame
        Columns query_id, passage_id, source (a name of ``runs`` or "random"); n rows for each query, in order.

    Raises
    ------
    ValueError
        When n is below 1, or a query has fewer than n passages that are not relevant.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    names, rows = list(runs), []
    for place, query_id in enumerate(collection.query_ids):
        taken = {texts[p] for p in collection.relevant(query_id)}
        shift = place % max(1, len(names))
        lists = []
        for name in names[shift:] + names[:shift]:
            ranked = runs[name].get(query_id, {})
            best_first = sorted(ranked, key=ranked.get, reverse=True)
            lists.append([(p, name) for p in best_first if texts[p] not in taken])
        mined = (pair for pairs in zip_longest(*lists) for pair in pairs if pair is not None)
        found = []
        for passage_id, source in chain(mined, _random(collection, query_id, seed)):
            if len(found) == n:
                break
            if texts[passage_id] not in taken:
                found.append((query_id, passage_id, source))
                taken.add(texts[passage_id])
        if len(found) < n:
            raise ValueError(
                f"{collection.name}: query {query_id!r} has only {len(found)} passages that are not relevant, and {n} "
                "negatives are asked for; ask for fewer, or take a larger sample of passages"
            )
        rows += found
    return pd.DataFrame(rows, columns=["query_id", "passage_id", "source"])


def _random(collection: Collection, query_id: str, seed: int) -> Iterator[tuple[str, str]]:
    for passage_id in seeded_order(collection.passage_ids, f"negatives {seed} {query_id}"):
        yield passage_id, RANDOM


def hard_negatives(
    study: Study, collection: Collection, selected: tuple[int, int], n: int, seed: int = 0
) -> pd.DataFrame:
    """Hard negatives from BM25 and from zero-shot DiffRetriever (hybrid) at ``selected``; kept in the cache.

    Returns what :func:`mine_hard_negatives` does, its sources "BM25" and "DiffRetriever".
    """
    bm25, zero_shot = BM25(), study.diffretriever(*selected)
    key = fingerprint(
        MINING_VERSION, collection.fingerprint, n, seed, study.profile.top_k, SELECTION_MODE,
        [retriever.fingerprint(task) for retriever in (bm25, zero_shot) for task in TASKS],
    )  # fmt: skip
    path = cache_dir() / "negatives" / f"{key}.jsonl"
    if not path.exists():
        runs = {
            "BM25": study.runs(bm25, collection, ["sparse"])["sparse"],
            "DiffRetriever": study.runs(zero_shot, collection, [SELECTION_MODE])[SELECTION_MODE],
        }
        with atomic_path(path) as temporary:
            mine_hard_negatives(collection, runs, n, seed).to_json(temporary, orient="records", lines=True)
    return pd.read_json(path, orient="records", lines=True, dtype=False, convert_dates=False)


def negatives_table(collection: Collection, negatives: pd.DataFrame) -> pd.DataFrame:
    """One row: collection, coverage, queries, passages, negatives per query, and the share of each source."""
    shares = negatives["source"].value_counts(normalize=True)
    row = {
        "collection": collection.name,
        "coverage": collection.coverage,
        "queries": len(collection.queries),
        "passages": len(collection.passages),
        "negatives_per_query": len(negatives) // len(collection.queries),
        **{f"share_{source}": share for source, share in shares.sort_index().items()},
    }
    return pd.DataFrame([row])
