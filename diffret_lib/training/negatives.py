"""Hard negatives of the training queries, from the rankings of several retrievers.

``sentence_transformers.util.mine_hard_negatives`` ranks with one SentenceTransformer, by its single dense vectors:
neither with BM25 nor by a hybrid of MaxSim and sparse scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, zip_longest

import pandas as pd

from diffret_lib.data.collection import Collection, seeded_order
from diffret_lib.retrieval.metrics import Run


def mine_hard_negatives(collection: Collection, runs: Mapping[str, Run], n: int, seed: int = 0) -> pd.DataFrame:
    """The n highest passages of each query that are not relevant, taken from the rankings in turn.

    ``runs`` are rankings of the collection's queries by the name of their source; which comes first changes from query
    to query.  Passages judged relevant, the passage that is the query itself, and passages of the same text as one of
    those or as a negative already taken, are left out.  A query whose rankings hold too few is filled up with random
    passages, those of ``seed``.

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
    names, own, rows = list(runs), {*collection.own}, []
    for place, query_id in enumerate(collection.query_ids):
        relevant = {texts[p] for p in collection.relevant(query_id)}
        if not relevant:
            continue
        if query_id in own and query_id in texts:
            relevant.add(texts[query_id])
        shift = place % max(1, len(names))
        rankings = []
        for name in names[shift:] + names[:shift]:
            scores = runs[name].get(query_id, {})
            best_first = sorted(scores, key=scores.get, reverse=True)
            rankings.append([(p, name) for p in best_first if texts[p] not in relevant])
        chosen: dict[str, tuple[str, str, str]] = {}  # by their texts
        for passage_id, source in filter(None, chain.from_iterable(zip_longest(*rankings))):
            chosen.setdefault(texts[passage_id], (query_id, passage_id, source))
        if len(chosen) < n:
            for passage_id in seeded_order(collection.passage_ids, f"negatives {seed} {query_id}"):
                if texts[passage_id] not in relevant:
                    chosen.setdefault(texts[passage_id], (query_id, passage_id, "random"))
        if len(chosen) < n:
            raise ValueError(
                f"{collection.name}: query {query_id!r} has only {len(chosen)} passages that are not relevant, and {n} "
                "negatives are asked for; ask for fewer, or take a larger sample of passages"
            )
        rows += list(chosen.values())[:n]
    return pd.DataFrame(rows, columns=["query_id", "passage_id", "source"])


def negatives_table(collection: Collection, negatives: pd.DataFrame) -> pd.DataFrame:
    """One row: collection, coverage, queries, passages, negatives of a query, and the share of each source."""
    shares = negatives["source"].value_counts(normalize=True).sort_index().add_prefix("share_")
    row = {
        "collection": collection.name, "coverage": collection.coverage, "queries": len(collection.queries),
        "passages": len(collection.passages), "negatives_per_query": len(negatives) // negatives["query_id"].nunique(),
    }  # fmt: skip
    return pd.DataFrame([row | shares.to_dict()])
