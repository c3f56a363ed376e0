"""What the fine-tuned systems are trained on: collections with mined hard negatives, or published rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from diffret_lib.addresses import address, fingerprint
from diffret_lib.cache import fetch
from diffret_lib.data.collection import Collection
from diffret_lib.training.losses import FalseNegatives
from diffret_lib.training.negatives import negatives_table


@dataclass(frozen=True)
class TrainingData:
    """The data that all systems are trained on.

    ``rows`` has the columns query, positive, negative_1, ..., negative_n.  ``names`` says where they come from,
    ``fingerprint`` is a SHA-256 over it.  Of collections (:func:`training_data`) the others are known as well:
    ``negatives`` has the columns collection, query_id, passage_id, source.
    """

    rows: Dataset
    names: list[str]
    fingerprint: str
    collections: list[Collection] = field(default_factory=list)
    negatives: pd.DataFrame | None = None
    false_negatives: FalseNegatives | None = None


def training_data(parts: Sequence[tuple[Collection, pd.DataFrame]]) -> TrainingData:
    """A row for each query and passage relevant to it, with the query's hard negatives; equal texts are the same.

    ``parts`` are collections with their mined negatives, the same number for each query.  A passage that is the query
    itself is no negative of it.
    """
    rows, relevant = [], defaultdict(set)
    codes: dict[str, int] = {}
    for collection, negatives in parts:
        texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
        mined, own = negatives.groupby("query_id")["passage_id"].agg(list), {*collection.own} & texts.keys()
        for query_id, query in zip(collection.query_ids, collection.queries, strict=True):
            positives = [texts[p] for p in collection.relevant(query_id)]
            others = {f"negative_{i}": texts[p] for i, p in enumerate(mined.get(query_id, ()), 1)}
            rows += [{"query": query, "positive": text, **others} for text in positives]
            relevant[query].update(positives, [texts[query_id]] if query_id in own else [])
        for text in texts.values():
            codes.setdefault(text, len(codes))
    passages = torch.tensor([[codes[text] for name, text in row.items() if name != "query"] for row in rows])
    known = [torch.tensor(sorted(codes[text] for text in relevant[row["query"]])) for row in rows]
    known = pad_sequence(known, batch_first=True, padding_value=-1)
    negatives = pd.concat([frame.assign(collection=c.name) for c, frame in parts], ignore_index=True)
    collections, false = [c for c, _ in parts], FalseNegatives(passages, known)
    key = fingerprint([c.fingerprint for c in collections], negatives.to_dict("list"))
    return TrainingData(Dataset.from_list(rows), list(map(described, collections)), key, collections, negatives, false)


def published_rows(rows: Dataset, name: str, n: int, seed: int = 0) -> TrainingData:
    """Training data of :func:`~diffret_lib.data.beir.load_training_rows`: a row for each query, memory-mapped.

    Its positive is the first one, its n hard negatives are drawn by ``seed`` (more than once where there are too few).
    ValueError: a query has no negative.
    """

    def drawn(row: dict[str, Any], place: int) -> dict[str, str]:
        if not (known := row["negatives"]):
            raise ValueError(f"{name}: query {row['query_id']!r} has no hard negative")
        chosen = np.random.default_rng([seed, place]).choice(len(known), n, replace=len(known) < n)
        negatives = {f"negative_{i}": known[j] for i, j in enumerate(chosen, 1)}
        return {"query": row["query"], "positive": row["positives"][0]} | negatives

    def make(folder: Path) -> None:
        how = {"with_indices": True, "remove_columns": rows.column_names, "desc": f"{name}: rows to train on"}
        rows.map(drawn, cache_file_name=str(folder / "rows.arrow"), **how)

    key = address([published_rows], Path(rows.cache_files[0]["filename"]).parent.name, n, seed)
    return TrainingData(Dataset.from_file(str(fetch("rows", key, make) / "rows.arrow")), [name], key)


def data_table(data: TrainingData) -> pd.DataFrame:
    """A row for each source of the training data; of collections, with what their negatives come from."""
    if not data.collections:
        row = {"collection": data.names[0], "queries": len(data.rows)}
        return pd.DataFrame([row | {"negatives_per_query": len(data.rows.column_names) - 2}])
    own = ((c, data.negatives[data.negatives["collection"] == c.name]) for c in data.collections)
    return pd.concat([negatives_table(*each) for each in own], ignore_index=True)


def described(collection: Collection) -> str:
    """A collection's name, and how much of it is there."""
    return f"{collection.name} ({collection.coverage})"
