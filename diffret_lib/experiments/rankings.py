"""Rankings of a collection by a retriever, in each of its modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffret_lib.data.collection import Collection
from diffret_lib.data.protocols import published
from diffret_lib.models.prompts import SIDES
from diffret_lib.retrieval.metrics import Run
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import RANK_MODES, Ranking, in_mode, kinds_of, search, to_results
from diffret_lib.retrieval.streaming import stream
from diffret_lib.retrieval.systems import DiffRetriever, PromptReps, Retriever


def modes_of(retriever: Any) -> list[str]:
    """The modes in which a retriever is evaluated: its own, and "mean" where a text has several vectors."""
    several = isinstance(retriever, DiffRetriever | PromptReps) and max(map(retriever.vectors, SIDES)) > 1
    return [mode for mode in RANK_MODES if mode in retriever.modes or (mode == "mean" and several)]


def ranking(queries: Representations, passages: Representations, collection: Collection, mode: str, top_k: int) -> Run:
    """The ranking of a collection's encoded passages for its encoded queries: query id to passage id to score."""
    return rankings(queries, passages, collection, [mode], top_k)[mode]


def rankings(
    queries: Representations, passages: Representations, collection: Collection, modes: Sequence[str], top_k: int
) -> dict[str, Run]:
    """Such rankings in several modes, which share what they are made of."""
    kinds = needed_kinds(modes, queries.vectors, passages.vectors)
    return _runs(search(queries, passages, kinds, top_k, collection.excluded), collection, modes, top_k)


def needed_kinds(modes: Sequence[str], k_query: int, k_passage: int) -> list[str]:
    """The kinds of scores that some modes are made of, each once."""
    return list(dict.fromkeys(kind for mode in modes for kind in kinds_of(mode, k_query, k_passage)))


def _runs(found: Mapping[str, Ranking], collection: Collection, modes: Sequence[str], top_k: int) -> dict[str, Run]:
    ids = collection.query_ids, collection.passage_ids
    return {mode: to_results(*in_mode(mode, found, top_k), *ids) for mode in modes}


def same_passages(one: Collection, other: Collection) -> bool:
    """Whether two collections have the same passages in the same order, as far as their published source tells."""
    sources = published(one.name), published(other.name)
    same_source = all(sources) and sources[0].hub == sources[1].hub
    return one is other or (same_source and list(one.passage_ids) == list(other.passage_ids))


def streamed_rankings(
    retriever: Retriever, collection: Collection, others: Sequence[Collection], modes: Sequence[str], top_k: int
) -> dict[str, Run]:
    """:func:`rankings` without keeping the passages' vectors (:func:`~diffret_lib.retrieval.streaming.stream`).

    Where ``collection`` is among ``others``, one pass over the passages answers the queries of all that have them.
    """
    together = [other for other in others if same_passages(other, collection)]
    place = next((i for i, other in enumerate(together) if other is collection), None)
    together = [collection] if place is None else together
    starts = np.cumsum([0, *(len(each.queries) for each in together)])
    asked, excluded = [query for each in together for query in each.queries], np.full(starts[-1], -1)
    for start, each in zip(starts, together):
        if each.excluded is not None:
            excluded[start : start + len(each.queries)] = each.excluded
    kinds = needed_kinds(modes, *map(retriever.vectors, SIDES))
    found = stream(retriever, asked, collection.passages, kinds, top_k, excluded)
    own = slice(starts[place or 0], starts[(place or 0) + 1])
    return _runs({kind: (scores[own], rows[own]) for kind, (scores, rows) in found.items()}, collection, modes, top_k)
