"""Exact search over representations: MaxSim, the mean of vectors, sparse, and their min-max hybrid.

Memory is bounded by a block of passages.  Ties are broken the same way everywhere: higher score, then lower index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch

from diffret_lib.data.checks import strings, whole_number
from diffret_lib.retrieval.representations import Representations

#: Passages of a shard of the cache, and those that are scored at a time.
PASSAGES, SCORED = 1024, 8192
#: Query vectors in one matrix product, and dot products at a time for each thread: they stay in a core's cache.
QUERY_VECTORS, BLOCK = 512, 1 << 19
MODES = ("dense", "sparse", "hybrid")
RANK_MODES = ("dense", "mean", "sparse", "hybrid")
#: What a ranking is made of.
KINDS = ("maxsim", "mean", "sparse")
#: The mode in which pairs (Kq, Kp) are selected and negatives are mined.
SELECTION_MODE = "hybrid"

#: Scores, float (n_queries, k), descending in each row; indices of passages, int64 of the same shape, -1 for none.
Ranking = tuple[np.ndarray, np.ndarray]
#: Queries, passages and scores of what was found: arrays of one length.
Found = tuple[np.ndarray, np.ndarray, np.ndarray]
Score = Callable[[Representations], torch.Tensor]


def search_parts(
    queries: Representations, parts: Iterable[Representations], kinds: Sequence[str], top_k: int,
    excluded: np.ndarray | None = None, start: int = 0,
) -> dict[str, Ranking]:  # fmt: skip
    """Find the best of passages that come in parts, which are seen once, by each of some :data:`KINDS` of scores.

    "maxsim" is the sum over query vectors of the largest dot product with a passage's vectors, each clamped at 0 from
    below, as the paper's reference does: a text's missing vectors, which are zero, change no score.  "mean" is the dot
    product of the means of each side's vectors, "sparse" that of the sparse weights, passages of score 0 among them.
    Scores are float32.  The first passage has the index ``start``; ``excluded`` is as for :func:`rank`.  ValueError: an
    unknown kind, a side that is missing, sizes or origins that do not fit, or scores that are not finite.
    """
    if wrong := set(kinds) - set(KINDS):
        raise ValueError(f"kinds must be of {', '.join(KINDS)}, not {min(wrong)!r}")
    best = {kind: _Best(len(queries), whole_number("top_k", top_k), excluded) for kind in kinds}
    scores: dict[str, Score] = {}
    end = start
    for part in (block for whole in parts for block in shards_of(whole)):
        check_sides(queries, part, kinds)
        for kind in kinds if len(queries) and len(part) else ():
            if kind not in scores:
                scores[kind] = scores_of(kind, queries, part.vectors)
            best[kind].add(scores[kind](part), end)
        end += len(part)
    return {kind: found.ranking(end - start if len(queries) else 0) for kind, found in best.items()}


def search(
    queries: Representations, passages: Representations, kinds: Sequence[str], top_k: int,
    excluded: np.ndarray | None = None,
) -> dict[str, Ranking]:  # fmt: skip
    """Find the best passages as :func:`search_parts` does."""
    dense, sparse = (passages.dense if {"maxsim", "mean"} & {*kinds} else None), passages.sparse
    only = Representations(dense, passages.lengths, sparse if "sparse" in kinds else None, passages.origin)
    return search_parts(queries, [only], kinds, top_k, excluded)


def kinds_of(mode: str, k_query: int, k_passage: int) -> tuple[str, ...]:
    """The :data:`KINDS` of scores that a mode is made of; ValueError: an unknown mode."""
    if mode not in RANK_MODES:
        raise ValueError(f"mode must be one of {', '.join(RANK_MODES)}, not {mode!r}")
    dense = "mean" if mode == "mean" or k_query == k_passage == 1 else "maxsim"
    return {"hybrid": (dense, "sparse"), "sparse": ("sparse",)}.get(mode, (dense,))


def in_mode(mode: str, found: Mapping[str, Ranking], top_k: int) -> Ranking:
    """The ranking of a mode, made of those of its kinds (:func:`kinds_of`)."""
    dense = found.get("mean" if mode == "mean" else "maxsim", found.get("mean"))
    if mode == "hybrid":
        return hybrid_search(dense, found["sparse"], top_k)
    if mode == "sparse":
        scores, indices = found["sparse"]
        return scores, np.where(scores > 0, indices, -1)
    return dense


def merged(rankings: Sequence[Ranking], top_k: int) -> Ranking:
    """The best of several rankings of different passages for the same queries."""
    found = []
    for scores, indices in rankings:
        query, place = np.nonzero(indices >= 0)
        found.append((query, indices[query, place], scores[query, place]))
    return to_ranking(found, len(rankings[0][0]), min(top_k, sum(ranking[0].shape[1] for ranking in rankings)))


def scores_of(kind: str, queries: Representations, vectors: int) -> Score:
    """What gives the scores of one of :data:`KINDS`, float32 (n_queries, n), of passages with so many vectors each."""
    if kind == "sparse":
        return partial(sparse_scores, queries.sparse)
    mean = kind == "mean"
    return partial(mean_scores, torch.from_numpy(mean_vectors(queries))) if mean else MaxSim(queries, vectors)


def shards_of(encoded: Representations, size: int = SCORED) -> Iterator[Representations]:
    """Give representations in parts of ``size`` texts, as shards of an index are."""
    for start in range(0, len(encoded) or 1, size):
        yield encoded[start : start + size] if len(encoded) > size else encoded


def mean_vectors(side: Representations, rows: slice = slice(None)) -> np.ndarray:
    """Mean of each text's vectors, those that are there; float32 [n, H]."""
    vectors = _filled(side, rows)
    if vectors.shape[1] == 1:
        return vectors[:, 0]
    return vectors.sum(1) / np.maximum(side.lengths[rows], 1)[:, None].astype(np.float32)


def _filled(side: Representations, rows: slice = slice(None)) -> np.ndarray:
    """Dense vectors [n, K, H] in memory, as torch takes them."""
    part = np.ascontiguousarray(side.dense[rows])
    return part if part.flags.writeable else part.copy()


def check_sides(queries: Representations, passages: Representations, kinds: Sequence[str]) -> None:
    """Refuse sides that are missing, or do not fit each other (ValueError)."""
    asked, held = queries.origin, passages.origin
    if asked and held and (asked.side, held.side, asked.space) != ("query", "passage", held.space):
        sides = f"queries ({asked.side} side of {asked.system}) and passages ({held.side} side of {held.system})"
        raise ValueError(f"{sides} cannot be compared: swapped, or of different weights, readers or vocabularies")
    for side in sorted({"sparse" if kind == "sparse" else "dense" for kind in kinds}):
        asked, held = getattr(queries, side), getattr(passages, side)
        if asked is None or held is None:
            raise ValueError(f"the {'queries' if asked is None else 'passages'} have no {side} side")
        if asked.shape[-1] != held.shape[-1]:
            sizes = f"{asked.shape[-1]} of the queries, {held.shape[-1]} of the passages"
            raise ValueError(f"the widths of the {side} sides differ: {sizes}")


def sparse_scores(asked: sp.csr_matrix, part: Representations) -> torch.Tensor:
    return torch.from_numpy((asked @ part.sparse.T).toarray())


def mean_scores(asked: torch.Tensor, part: Representations) -> torch.Tensor:
    return asked @ torch.from_numpy(mean_vectors(part)).T


class MaxSim:
    """Scores of passages for the same queries: float32 (n_queries, n), from blocks that stay in the processor's cache.

    A block's products have passage vectors as rows and, as columns, vector 0 of each query, then vector 1, and so on: a
    maximum over a passage's vectors, and a sum over a query's, then go through memory in its order.
    """

    def __init__(self, queries: Representations, vectors: int) -> None:
        size, dense = max(1, QUERY_VECTORS // queries.vectors), torch.from_numpy(_filled(queries))
        width = queries.vectors * min(size, len(queries))
        block = max(1, BLOCK * torch.get_num_threads() // max(1, width * vectors))
        self.block = min(1 << (block.bit_length() - 1), PASSAGES)  # a power of two: a whole number in a shard
        self.groups, self.size, self.scores = [], size, torch.empty(0, len(queries))
        # made once: memory for each block anew would cost as much as the maxima
        products, best = torch.empty(self.block * width * vectors), torch.empty(self.block * width)
        for own in dense.split(size):
            columns = own.transpose(0, 1).flatten(0, 1).T.contiguous()
            n = self.block * columns.shape[1]
            shapes = (self.block, vectors, columns.shape[1]), (self.block, queries.vectors, len(own))
            self.groups.append((columns, products[: n * vectors].view(shapes[0]), best[:n].view(shapes[1])))

    def __call__(self, part: Representations) -> torch.Tensor:
        """Scores of a part's passages, which the next call writes over."""
        if len(part) > len(self.scores):
            self.scores = torch.empty(len(part), self.scores.shape[1])
        vectors, scores = torch.from_numpy(_filled(part)), self.scores[: len(part)]
        for (columns, products, best), own in zip(self.groups, scores.split(self.size, 1), strict=True):
            for rows, out in zip(vectors.split(self.block), own.split(self.block), strict=True):
                products, best = products[: len(rows)], best[: len(rows)]  # fewer in the last block alone
                torch.mm(rows.flatten(0, 1), columns, out=products.flatten(0, 1))
                torch.amax(products, 1, out=best.flatten(1))
                torch.sum(best.clamp_(min=0), 1, out=out)
        return scores.T


class _Best:
    """The best passages of each query, from scores that come in the order of the passages."""

    def __init__(self, n_queries: int, top_k: int, excluded: np.ndarray | None) -> None:
        if excluded is not None and np.shape(excluded) != (n_queries,):
            raise ValueError(f"excluded must have the shape ({n_queries},), not {np.shape(excluded)}")
        self.top_k, self.excluded, self.pending = top_k, excluded, 0
        #: The score that a passage must exceed: of equal ones the earlier stays.
        self.least = np.full(n_queries, -np.inf, np.float32)
        self.found: list[Found] = []

    def add(self, scores: torch.Tensor, start: int) -> None:
        """Take the scores (n_queries, n) of the passages from ``start`` on."""
        if not scores.numel():
            return
        end, values = start + scores.shape[1], scores.numpy().T  # in rows, as MaxSim has them: passages
        if not scores.sum().isfinite() and not scores.isfinite().all():  # one look at all; a sum can overflow
            raise ValueError(f"scores of the passages {start}..{end} are not finite")
        least = self.least
        if not self.found and end - start > self.top_k + 1:  # fewer to sort than all; one more for the excluded one
            least = np.nextafter(scores.topk(self.top_k + 1).values[:, -1].numpy(), np.float32(-np.inf))
        above = np.greater(values, least, order="C")
        if self.excluded is not None:
            (own,) = np.nonzero((self.excluded >= start) & (self.excluded < end))
            above[self.excluded[own] - start, own] = False
        place, query = np.divmod(np.flatnonzero(above), len(least))
        self.found.append((query, place + start, values[place, query]))
        self.pending += len(query)
        if self.pending > max(PASSAGES, self.top_k * len(least)):
            self._keep()

    def _keep(self) -> None:
        *found, place = _ordered(tuple(map(np.concatenate, zip(*self.found, strict=True))), self.top_k)
        self.found, self.pending, last = [tuple(found)], 0, place == self.top_k - 1
        self.least[found[0][last]] = found[2][last]

    def ranking(self, n: int) -> Ranking:
        return to_ranking(self.found, len(self.least), min(self.top_k, n))


def _ordered(found: Found, top_k: int) -> tuple[np.ndarray, ...]:
    """The ``top_k`` best of each query, by score and then by passage; and the place of each, from 0."""
    query, passage, score = found
    order = np.lexsort((passage, -score, query))
    place = np.arange(len(order)) - np.searchsorted(query[order], query[order])
    kept = order[place < top_k]
    return query[kept], passage[kept], score[kept], place[place < top_k]


def to_ranking(found: Sequence[Found], n_queries: int, top_k: int) -> Ranking:
    """A ranking of what was found; where a query has fewer passages, the last score again, with the index -1."""
    scores, indices = np.full((n_queries, top_k), np.inf, np.float32), np.full((n_queries, top_k), -1, np.int64)
    if found:
        query, passage, score, place = _ordered(tuple(map(np.concatenate, zip(*found, strict=True))), top_k)
        scores[query, place], indices[query, place] = score, passage
    scores = np.minimum.accumulate(scores, axis=1)
    return np.where(np.isfinite(scores), scores, np.float32(0)), indices


def hybrid_search(dense: Ranking, sparse: Ranking, top_k: int) -> Ranking:
    """Join two rankings: per query, min-max normalised scores of the retrieved passages, in equal parts.

    A passage that one side did not retrieve has 0 there, as the last that it did retrieve.  A list of equal scores
    normalises to 0.  These are the values of ``ranx.fuse(runs, "min-max", "wsum", {"weights": [0.5, 0.5]})``, with
    equal sums in the order of the passages.  Scores are float32 in 0..1; -inf where a query has fewer passages.
    """
    indices = np.concatenate([dense[1], sparse[1]], axis=1)
    scores = np.concatenate([_min_max(dense[0]), _min_max(sparse[0])], axis=1) / 2
    # a passage is at most twice in a row: once its indices are in order, beside itself
    order = np.argsort(indices, axis=1, kind="stable")
    indices, scores = np.take_along_axis(indices, order, 1), np.take_along_axis(scores, order, 1)
    again = indices[:, 1:] == indices[:, :-1]
    scores[:, :-1] += np.where(again, scores[:, 1:], 0)
    scores[:, 1:][again], indices[:, 1:][again] = -np.inf, -1
    scores[indices < 0] = -np.inf
    # rows are in the order of the passages, so that a stable sort leaves equal scores in it
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    indices, scores = np.take_along_axis(indices, order, 1), np.take_along_axis(scores, order, 1)
    used = (indices >= 0).any(0)
    return scores[:, used].astype(np.float32), indices[:, used].astype(np.int64)


def _min_max(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    if not scores.shape[1]:
        return scores
    least = scores.min(1, keepdims=True)
    return (scores - least) / np.maximum(scores.max(1, keepdims=True) - least, 1e-9)  # the floor is the one of ranx


def rank(
    queries: Representations, passages: Representations, mode: str, top_k: int = 100,
    excluded: np.ndarray | None = None,
) -> Ranking:  # fmt: skip
    """Rank at most ``top_k`` passages for each query.

    ``dense`` is the dot product where each side has one vector a text (K = 1), MaxSim otherwise; ``mean`` the dot
    product of the means of the vectors; ``sparse`` leaves out passages of score 0; ``hybrid`` joins the ``top_k``
    of ``dense`` and of the sparse side, those of score 0 too.  ``excluded``, int64 (n_queries,), is the passage that
    never counts for a query (-1: none), as :attr:`Collection.excluded` has it.  ValueError: an unknown mode, a side
    that is missing, shapes or origins that do not fit, or a ``top_k`` that is no whole number of at least 1.
    """
    kinds = kinds_of(mode, queries.vectors, passages.vectors)
    return in_mode(mode, search(queries, passages, kinds, top_k, excluded), top_k)


def to_results(
    scores: np.ndarray, indices: np.ndarray, query_ids: Sequence[str], passage_ids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Ranked passages as a dict of query id to passage id to score, best first.

    Equal scores are set apart by one unit in the last place of float32: what sorts a run by its scores (ranx, and
    trec_eval, which reads them as float32) has no other means to know the order.  Scores and indices are a
    :data:`Ranking`; ValueError: shapes and ids do not fit, ids are no list of strings or not unique, a score is not
    finite, or a row does not descend.
    """
    strings("query_ids", query_ids), strings("passage_ids", passage_ids)
    scores, indices, passage_ids = np.array(scores, np.float32), np.asarray(indices), list(passage_ids)
    if len(set(query_ids)) < len(query_ids) or len(set(passage_ids)) < len(passage_ids):
        raise ValueError("query ids and passage ids must be unique")
    if scores.shape != indices.shape or len(scores) != len(query_ids) or indices.max(initial=-1) >= len(passage_ids):
        sizes = f"{scores.shape} and {indices.shape} for {len(query_ids)} query and {len(passage_ids)} passage ids"
        raise ValueError(f"scores and indices, ({sizes}), must be a row for each query, of passages that are there")
    if not np.isfinite(scores[indices >= 0]).all() or (scores[:, 1:] > scores[:, :-1]).any():
        raise ValueError("the scores of a query must be finite and descending")
    for j in range(1, scores.shape[1]):
        scores[:, j] = np.minimum(scores[:, j], np.nextafter(scores[:, j - 1], np.float32(-np.inf)))
    return {
        query: {passage_ids[i]: score for i, score in zip(row, values, strict=True) if i >= 0}
        for query, row, values in zip(query_ids, indices.tolist(), scores.tolist(), strict=True)
    }
