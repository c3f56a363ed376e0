"""Exact search over representations: MaxSim, the mean of vectors, sparse, and their min-max hybrid.

Memory is bounded by a block of passages.  Ties are broken the same way everywhere: higher score, then lower index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from diffret_lib.data.checks import strings, whole_number
from diffret_lib.retrieval.representations import Representations

#: Scores of one block: query vectors times passage vectors, or queries times passages.
BLOCK = 1 << 24
MODES = ("dense", "sparse", "hybrid")
RANK_MODES = ("dense", "mean", "sparse", "hybrid")
#: The mode in which pairs (Kq, Kp) are selected and negatives are mined.
SELECTION_MODE = "hybrid"

#: Scores, float (n_queries, k), descending in each row; indices of passages, int64 of the same shape, -1 for none.
Ranking = tuple[np.ndarray, np.ndarray]
_Best = tuple[torch.Tensor, torch.Tensor]


def maxsim_search(queries: Representations, passages: Representations, top_k: int) -> Ranking:
    """Find the best passages by MaxSim: the sum over query vectors of the largest dot product with a passage's vectors.

    Each largest dot product is clamped at 0 from below, as the paper's reference does.  So a text's missing
    vectors, which are zero, change no score.  Scores are float32.  ValueError: a side has no dense vectors, their
    sizes differ, or scores are not finite.
    """
    _check(queries, passages, "dense")
    kq, kp = queries.vectors, passages.vectors
    vectors = torch.from_numpy(_filled(queries)).flatten(0, 1)

    def top(rows: slice) -> _Best:
        part = torch.from_numpy(_filled(passages, rows))
        products = vectors @ part.flatten(0, 1).T  # [nq * Kq, rows * Kp]
        best = products.view(len(vectors), len(part), kp).amax(2) if kp > 1 else products
        return _top(best.clamp_(min=0).view(len(queries), kq, len(part)).sum(1), top_k, rows)

    return _merge_blocks(top, len(queries), len(passages), top_k, len(vectors) * kp)


def single_search(queries: Representations, passages: Representations, top_k: int) -> Ranking:
    """Find the best passages by the dot product of the means of each side's vectors; else as :func:`maxsim_search`."""
    _check(queries, passages, "dense")
    vectors = torch.from_numpy(mean_vectors(queries))

    def top(rows: slice) -> _Best:
        return _top(vectors @ torch.from_numpy(mean_vectors(passages, rows)).T, top_k, rows)

    size = max(len(queries), passages.vectors * vectors.shape[1])
    return _merge_blocks(top, len(queries), len(passages), top_k, size)


def sparse_search(queries: Representations, passages: Representations, top_k: int) -> Ranking:
    """Find the best passages by the dot product of the sparse weights, also those of score 0."""
    _check(queries, passages, "sparse")

    def top(rows: slice) -> _Best:
        return _top(torch.from_numpy((queries.sparse @ passages.sparse[rows].T).toarray()), top_k, rows)

    return _merge_blocks(top, len(queries), len(passages), top_k, len(queries))


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


def _check(queries: Representations, passages: Representations, side: str) -> None:
    asked, held = getattr(queries, side), getattr(passages, side)
    if asked is None or held is None:
        raise ValueError(f"the {'queries' if asked is None else 'passages'} have no {side} side")
    if asked.shape[-1] != held.shape[-1]:
        raise ValueError(f"the widths of the {side} sides differ: queries {asked.shape} and passages {held.shape}")


def _merge_blocks(top: Callable[[slice], _Best], n_queries: int, n: int, top_k: int, size: int) -> Ranking:
    """Best of all passages from the best of each block; ``size`` is what a passage takes of :data:`BLOCK`."""
    whole_number("top_k", top_k)
    best = torch.empty(n_queries, 0), torch.empty(n_queries, 0, dtype=torch.int64)
    block = max(1, BLOCK // max(1, size))
    for start in range(0, n if n_queries else 0, block):
        scores, indices = top(slice(start, min(start + block, n)))
        # what is kept stands before the new, so that of equal scores the lower index stays
        scores, indices = torch.cat([best[0], scores.float()], 1), torch.cat([best[1], indices + start], 1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
        best = scores.gather(1, order), indices.gather(1, order)
    return best[0].numpy(), best[1].numpy()


def _top(scores: torch.Tensor, top_k: int, rows: slice) -> _Best:
    """The ``top_k`` columns of each row, by score and then by column."""
    if not scores.isfinite().all():
        raise ValueError(f"scores of the passages {rows.start}..{rows.stop} are not finite")
    places = torch.arange(scores.shape[1]).expand(len(scores), -1)
    if scores.shape[1] > 4 * top_k:
        # a stable sort of all is slow, and torch.topk picks any of equal scores: of those at the threshold, the first
        threshold = scores.topk(top_k, dim=1, sorted=False).values.amin(1, keepdim=True)
        above, equal = scores > threshold, scores == threshold
        kept = above | (equal & (equal.cumsum(1) <= top_k - above.sum(1, keepdim=True)))
        places = kept.nonzero()[:, 1].view(len(scores), top_k)
        scores = scores.gather(1, places)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return scores.gather(1, order), places.gather(1, order)


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
    if mode not in RANK_MODES:
        raise ValueError(f"mode must be one of {', '.join(RANK_MODES)}, not {mode!r}")
    whole_number("top_k", top_k)
    if excluded is not None and np.shape(excluded) != (len(queries),):
        raise ValueError(f"excluded must have the shape ({len(queries)},), not {np.shape(excluded)}")
    asked, held = queries.origin, passages.origin
    if asked and held and (asked.side, held.side, asked.space) != ("query", "passage", held.space):
        sides = f"queries ({asked.side} side of {asked.system}) and passages ({held.side} side of {held.system})"
        raise ValueError(f"{sides} cannot be compared: swapped, or of different weights, readers or vocabularies")
    if not len(queries) or not len(passages):
        return np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)

    def best(search: Callable[[Representations, Representations, int], Ranking]) -> Ranking:
        if excluded is None:
            return search(queries, passages, top_k)
        scores, indices = search(queries, passages, top_k + 1)
        order = np.argsort(indices == excluded[:, None], axis=1, kind="stable")  # the excluded one last
        scores, indices = np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)
        left_out = indices[:, -1] == excluded
        indices[left_out, -1] = -1
        scores[left_out, -1] = scores[left_out, -2:][:, 0]  # the least of the others: a hybrid is normalised by it
        return scores[:, :top_k], indices[:, :top_k]

    dense = single_search if mode == "mean" or queries.vectors == passages.vectors == 1 else maxsim_search
    if mode == "hybrid":
        return hybrid_search(best(dense), best(sparse_search), top_k)
    scores, indices = best(sparse_search if mode == "sparse" else dense)
    return scores, np.where(scores > 0, indices, -1) if mode == "sparse" else indices


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
