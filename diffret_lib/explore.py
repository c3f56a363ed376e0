"""One query looked into: the words at its masks, the passages found, and the vectors that match.

The searches are those of :mod:`diffret_lib.scoring`; the passages of a collection are encoded once and given along.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from diffret_lib.analysis import predicted_tokens
from diffret_lib.collection import Collection
from diffret_lib.prompts import Task
from diffret_lib.representations import Representations
from diffret_lib.retrievers import Retriever
from diffret_lib.scoring import rank, to_results


def mask_words(retriever: Retriever, texts: list[str], task: Task) -> list[list[str]]:
    """The greedy token at each position of each text, numbered from 1 ("1 heap"); a token of spaces alone is "␣"."""
    return [
        [f"{i} {_visible(token.strip()) or '␣'}" for i, token in enumerate(row, 1)]
        for row in predicted_tokens(retriever, texts, task)
    ]


def _visible(token: str) -> str:
    return token if token.isprintable() else ascii(token)[1:-1]


def alignment(retriever: Retriever, query: str, passage: str) -> pd.DataFrame:
    """Dot products of a query's vectors with a passage's: what MaxSim is made of.

    The sum of the rows' maxima, each clamped at 0, is the score of :func:`diffret_lib.scoring.maxsim_search`.

    Parameters
    ----------
    retriever : Retriever
        One that predicts tokens (DiffRetriever, PromptReps).
    query, passage : str

    Returns
    -------
    DataFrame of float32, shape (vectors of the query, vectors of the passage)
        Index and columns are the positions and their predicted words, as of :func:`mask_words`.
    """
    queries = retriever.encode_queries([query], progress=False)
    passages = retriever.encode_passages([passage], progress=False)
    sides = (side.dense[0, : side.lengths[0]] for side in (queries, passages))
    left, right = (np.asarray(vectors) for vectors in sides)
    (rows,), (columns,) = (mask_words(retriever, [t], task) for t, task in ((query, "query"), (passage, "document")))
    return pd.DataFrame(
        left @ right.T, pd.Index(rows, name="masks of the query"), pd.Index(columns, name="masks of the passage")
    )


def explain(
    retriever: Retriever,
    collection: Collection,
    query: str,
    top_k: int = 5,
    mode: str = "dense",
    passages: Representations | None = None,
) -> pd.DataFrame:
    """The best passages for any query text, with the words at their masks.

    Parameters
    ----------
    retriever : Retriever
        As for :func:`alignment`.
    collection : Collection
    query : str
    top_k : int
    mode : {"dense", "sparse", "hybrid"}
    passages : Representations, optional
        Of the collection's passages, encoded before; otherwise they are encoded now.

    Returns
    -------
    DataFrame
        Columns rank (from 1), score, passage_id, words, text.  A sparse search leaves out passages that share no term.
    """
    if passages is None:
        passages = retriever.encode_passages(collection.passages)
    if len(passages) != len(collection.passages):
        raise ValueError(
            f"{len(passages)} representations for the {len(collection.passages)} passages of {collection.name}: "
            "encode the passages of this collection"
        )
    queries = retriever.encode_queries([query], progress=False)
    ranked = rank(queries, passages, mode, top_k)
    found = to_results(*ranked, ["query"], collection.passage_ids)["query"]
    texts = dict(zip(collection.passage_ids, collection.passages, strict=True))
    words = mask_words(retriever, [texts[i] for i in found], "document")
    table = pd.DataFrame({"rank": range(1, 1 + len(found)), "score": found.values(), "passage_id": found.keys()})
    return table.assign(words=[" · ".join(w) for w in words], text=[texts[i] for i in found])
