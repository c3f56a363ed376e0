"""Search passages as they are encoded: where their vectors are too many to keep, only the best passages are.

At Kp = 16 and H = 3,584 the vectors of MS MARCO's 8.8 million passages take 2 TB.  Where all queries are known before,
a shard can be encoded, searched by each of them, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffret_lib.addresses import address
from diffret_lib.cache import fetch
from diffret_lib.models.prompts import SIDES
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import Ranking, merged, search_parts
from diffret_lib.retrieval.systems import SHARD_TEXTS, Retriever
from diffret_lib.retrieval.workers import spread

#: Passages of which the best are kept: what an interrupted run loses at most, and what one worker does at a time.
SEGMENT_TEXTS = 256 * SHARD_TEXTS


def stream(
    retriever: Retriever, asked: Sequence[str], passages: Sequence[str], kinds: Sequence[str], top_k: int,
    excluded: np.ndarray | None = None,
) -> dict[str, Ranking]:  # fmt: skip
    """Rank passages for the queries ``asked`` as :func:`~diffret_lib.retrieval.search.search` ranks their encodings.

    The rankings are the same, but for the last bit of a score where a product of matrices rounds its sums by its shape.
    Those of every :data:`SEGMENT_TEXTS` passages are kept in the cache, so that an interrupted run goes on; the workers
    that the environment asks for share them (:func:`~diffret_lib.retrieval.workers.spread`).
    """
    queries = retriever.encode(asked, "query", cached=True)
    without = None if excluded is None else excluded.tolist()
    key = address([search_parts], *map(retriever.fingerprint, SIDES), list(asked), kinds, top_k, without)
    of_segment = partial(_segment, queries, passages, kinds, top_k, excluded, key)
    spread(retriever, of_segment, len(passages), SEGMENT_TEXTS, "searching passages")
    found: dict[str, Ranking] = {}
    for start in range(0, len(passages), SEGMENT_TEXTS):
        folder = of_segment(retriever, slice(start, start + SEGMENT_TEXTS), progress=True)
        for kind in kinds:
            best = tuple(np.load(folder / f"{kind}-{part}.npy") for part in ("scores", "indices"))
            found[kind] = merged([found[kind], best] if kind in found else [best], top_k)
    return found


def _segment(
    queries: Representations, passages: Sequence[str], kinds: Sequence[str], top_k: int, excluded: np.ndarray | None,
    key: str, retriever: Retriever, rows: slice, progress: bool = False,
) -> Path:  # fmt: skip
    """The cache's folder of the rankings of some passages: ``<kind>-scores.npy`` and ``<kind>-indices.npy``."""
    texts = passages[rows]

    def parts() -> Iterator[Representations]:
        with tqdm(
            total=len(texts), desc=f"{retriever.name}: searching passages", unit="text", disable=not progress
        ) as bar:
            for start in range(0, len(texts), SHARD_TEXTS):
                shard = texts[start : start + SHARD_TEXTS]
                yield retriever.encode(shard, "passage", progress=False)
                bar.update(len(shard))

    def make(folder: Path) -> None:
        for kind, (scores, indices) in search_parts(queries, parts(), kinds, top_k, excluded, rows.start).items():
            np.save(folder / f"{kind}-scores.npy", scores)
            np.save(folder / f"{kind}-indices.npy", indices.astype(np.int32))

    return fetch("segments", address([_segment], key, rows.start, texts), make)
