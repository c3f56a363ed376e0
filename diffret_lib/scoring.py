"""Search over representations: MaxSim, mean of vectors, sparse, and their min-max hybrid.

All are exact.  Scores come out of matrix products over blocks of passages with a running top k, so that
memory is bounded by the block and not by the collection.  Ties are broken the same way everywhere: higher
score, then lower passage index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import ranx
import torch
from numba.typed import List as TypedList
from ranx.data_structures.common import create_and_sort

from diffret_lib.representations import Representations

#: Scores (query vectors times passage vectors) of one dense block.
DENSE_BLOCK = 1 << 24
#: Scores (queries times passages) of one sparse block.
SPARSE_BLOCK = 1 << 24
MODES = ("dense", "mean", "sparse", "hybrid")


def maxsim_search(
    queries: Representations, passages: Representations, top_k: int, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best passages by MaxSim: sum over query vectors of the largest dot product with a passage's vectors.

    Each largest dot product is clamped at 0 from below, as the paper's reference does.  So a text's missing
    vectors, which are zero, change no score.

    Parameters
    ----------
    queries, passages : Representations
        With ``dense`` of the same H.
    top_k : int
        More than there are passages gives all of them.
    block : int, optional
        Passages of one block; by default as many as :data:`DENSE_BLOCK` scores take.

    Returns
    -------
    scores : ndarray of float32, shape (n_queries, min(top_k, n_passages))
    indices : ndarray of int64, of the same shape

    Raises
    ------
    ValueError
        When a side has no dense vectors, or their sizes differ.
    """
    _check_dense(queries, passages)
    kq, kp = queries.vectors, passages.vectors
    vectors = torch.from_numpy(_filled(queries)).flatten(0, 1)

    def score(rows: slice) -> torch.Tensor:
        part = torch.from_numpy(_filled(passages, rows))
        products = vectors @ part.flatten(0, 1).T  # [nq * Kq, rows * Kp]
        best = products.view(len(vectors), len(part), kp).amax(2) if kp > 1 else products
        return best.clamp_(min=0).view(len(queries), kq, len(part)).sum(1)

    block = block or max(1, DENSE_BLOCK // max(1, len(vectors) * kp))
    return _running_top_k(score, len(queries), len(passages), top_k, block)


def single_search(
    queries: Representations, passages: Representations, top_k: int, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best passages by the dot product of the means of each side's vectors (those that are there).

    Parameters, returns and errors as of :func:`maxsim_search`.  A text without vectors scores 0.
    """
    _check_dense(queries, passages)
    vectors = torch.from_numpy(mean_vectors(queries))

    def score(rows: slice) -> torch.Tensor:
        return vectors @ torch.from_numpy(mean_vectors(passages, rows)).T

    block = block or max(1, DENSE_BLOCK // max(1, len(queries), passages.vectors * passages.dense.shape[2]))
    return _running_top_k(score, len(queries), len(passages), top_k, block)


def sparse_search(
    queries: Representations, passages: Representations, top_k: int, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best passages by the dot product of the sparse weights (CSR products).

    Parameters, returns and errors as of :func:`maxsim_search`, of the sparse side.  Passages that share no
    term with the query are there too, with the score 0, where ``top_k`` reaches them.
    """
    for name, side in (("queries", queries), ("passages", passages)):
        if side.sparse is None:
            raise ValueError(f"the {name} have no sparse side")
    if queries.sparse.shape[1] != passages.sparse.shape[1]:
        raise ValueError(
            f"vocabularies differ: queries {queries.sparse.shape} and passages {passages.sparse.shape} "
            "(texts and vocabulary)"
        )
    left = queries.sparse

    def score(rows: slice) -> torch.Tensor:
        return torch.from_numpy((left @ passages.sparse[rows].T).toarray())

    block = block or max(1, SPARSE_BLOCK // max(1, len(queries)))
    return _running_top_k(score, len(queries), len(passages), top_k, block)


def mean_vectors(side: Representations, rows: slice = slice(None)) -> np.ndarray:
    """Mean of each text's vectors, those that are there; float32 [n, H]."""
    vectors = _filled(side, rows)
    if vectors.shape[1] == 1:
        return vectors[:, 0]
    return vectors.sum(1) / np.maximum(side.lengths[rows], 1)[:, None].astype(np.float32)


def _filled(side: Representations, rows: slice = slice(None)) -> np.ndarray:
    """Dense vectors [n, K, H] in memory, of which the missing are zero whatever the array holds there."""
    part = np.ascontiguousarray(side.dense[rows])
    missing = np.arange(part.shape[1]) >= side.lengths[rows][:, None]
    if missing.any() and part[missing].any():
        part = np.where(missing[..., None], np.float32(0), part)
    return part if part.flags.writeable else part.copy()


def _check_dense(queries: Representations, passages: Representations) -> None:
    for name, side in (("queries", queries), ("passages", passages)):
        if side.dense is None:
            raise ValueError(f"the {name} have no dense side")
    if queries.dense.shape[2] != passages.dense.shape[2]:
        raise ValueError(
            f"vector sizes differ: queries {queries.dense.shape} and passages {passages.dense.shape} "
            "(texts, vectors, size)"
        )


def _running_top_k(
    score: Callable[[slice], torch.Tensor], n_queries: int, n_passages: int, top_k: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    best = torch.empty(n_queries, 0), torch.empty(n_queries, 0, dtype=torch.int64)
    if not n_queries or not n_passages:
        return best[0].numpy(), best[1].numpy()
    for rows in _blocks(n_passages, block):
        scores = score(rows).float()
        if not torch.isfinite(scores).all():
            raise ValueError(f"scores of the passages {rows.start}..{rows.stop} are not finite")
        indices = torch.arange(rows.start, rows.stop).expand(n_queries, -1)
        scores, indices = _top(scores, indices, top_k)
        # what is kept stands before the new, so that of equal scores the lower index stays
        scores, indices = torch.cat([best[0], scores], 1), torch.cat([best[1], indices], 1)
        best = _top(scores, indices, top_k)
    return best[0].numpy(), best[1].numpy()


def _top(scores: torch.Tensor, indices: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``top_k`` columns of each row, by score and then by place (places are in the order of ties)."""
    if scores.shape[1] > 4 * top_k:
        # a stable sort of all is slow, and torch.topk picks any of equal scores: so the threshold is
        # found first; of the columns that equal it, the first fill the rest
        threshold = scores.topk(top_k, dim=1, sorted=False).values.amin(1, keepdim=True)
        above, equal = scores > threshold, scores == threshold
        left = top_k - above.sum(1, keepdim=True)
        kept = above | (equal & (equal.cumsum(1) <= left))
        places = kept.nonzero()[:, 1].view(len(scores), top_k)
        scores, indices = scores.gather(1, places), indices.gather(1, places)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return scores.gather(1, order), indices.gather(1, order)


def _blocks(n: int, block: int) -> Iterator[slice]:
    for start in range(0, n, block):
        yield slice(start, min(start + block, n))


# -- runs --------------------------------------------------------------------------------------------------


def to_results(
    scores: np.ndarray,
    indices: np.ndarray,
    query_ids: Sequence[str],
    passage_ids: Sequence[str],
    exclude: Mapping[str, Collection[str]] | None = None,
    top_k: int | None = None,
) -> dict[str, dict[str, float]]:
    """Ranked passages as a dict of query id to passage id to score, best first, that keeps their order.

    Equal scores are set apart by one unit in the last place of float64: what sorts a run by its scores
    (ranx, trec_eval) has no other means to know the order.

    Parameters
    ----------
    scores : ndarray of float, shape (n_queries, k)
        Descending in each row.
    indices : ndarray of int, shape (n_queries, k)
        Into ``passage_ids``; -1 for none.
    exclude : dict of query id to passage ids, optional
        Passages that a query does not retrieve, such as its own source.
    top_k : int, optional
        Passages of a query at most, after the exclusion.

    Raises
    ------
    ValueError
        When shapes and ids do not fit, ids are not unique, or a row is not descending.
    """
    scores, indices = np.asarray(scores, np.float64), np.asarray(indices)
    if scores.shape != indices.shape or scores.ndim != 2 or len(scores) != len(query_ids):
        raise ValueError(
            f"scores {scores.shape}, indices {indices.shape} and {len(query_ids)} query ids do not fit"
        )
    for kind, ids in (("query", query_ids), ("passage", passage_ids)):
        if len(set(ids)) < len(ids):
            raise ValueError(f"{kind} ids must be unique")
    if indices.size and indices.max() >= len(passage_ids):
        raise ValueError(f"passage index {indices.max()}, but there are {len(passage_ids)} passage ids")
    if (scores[:, 1:] > scores[:, :-1]).any():
        raise ValueError("the scores of a query must be descending")
    results = {}
    for query, row, values in zip(query_ids, indices.tolist(), _strictly_descending(scores).tolist(), strict=True):
        left_out = exclude.get(query, ()) if exclude else ()
        found = ((passage_ids[i], score) for i, score in zip(row, values, strict=True) if i >= 0)
        results[query] = dict(islice(((p, score) for p, score in found if p not in left_out), top_k))
    return results


def _strictly_descending(scores: np.ndarray) -> np.ndarray:
    scores = scores.copy()
    for j in range(1, scores.shape[1]):
        scores[:, j] = np.minimum(scores[:, j], np.nextafter(scores[:, j - 1], -np.inf))
    return scores


def make_run(results: Mapping[str, Mapping[str, float]], name: str | None = None) -> ranx.Run:
    """A :class:`ranx.Run` of query id to passage id to score, as ``ranx.Run(results)`` but faster at first.

    ranx compiles its code anew for every length that the longest id of a run has (10 to 20 seconds); here ids
    are held in arrays of one width.
    """
    run = ranx.Run(name=name)
    if results:
        values = TypedList([np.array(list(ranked.values()), dtype=np.float64) for ranked in results.values()])
        ids = id_arrays([list(ranked) for ranked in results.values()])
        run.run = create_and_sort(TypedList(list(results)), ids, values)
        run.sorted = True
    return run


def id_arrays(rows: Sequence[Sequence[str]]) -> TypedList:
    """Ids as arrays of one width: 64, or a larger power of two where an id is longer."""
    longest = max((len(i) for row in rows for i in row), default=1)
    width = max(64, 1 << (longest - 1).bit_length())
    return TypedList([np.array(row, dtype=f"<U{width}") for row in rows])


def hybrid_search(
    dense: tuple[np.ndarray, np.ndarray], sparse: tuple[np.ndarray, np.ndarray], top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Join two rankings: per query, min-max normalised scores of the retrieved passages, in equal parts.

    A passage that one side did not retrieve has 0 there after the normalisation, as the last that it did
    retrieve.  A list of equal scores normalises to 0.  These are the values of
    ``ranx.fuse(runs, norm="min-max", method="wsum", params={"weights": [0.5, 0.5]})``, which leaves the order
    of equal sums open; here it is that of the passages.

    Parameters
    ----------
    dense, sparse : pair of ndarray (scores, indices), each of shape (n_queries, k)
    top_k : int

    Returns
    -------
    scores : ndarray of float32, shape (n_queries, k)
        k is the lesser of ``top_k`` and the largest number of passages that a query retrieved; scores are in
        0..1, and -inf where a query has fewer.
    indices : ndarray of int64, of the same shape; -1 where a query has fewer.
    """
    n_queries = len(dense[0])
    if len(sparse[0]) != n_queries:
        raise ValueError(f"{n_queries} queries in the dense ranking, {len(sparse[0])} in the sparse one")
    indices = np.concatenate([dense[1], sparse[1]], axis=1)
    scores = np.concatenate([_min_max(dense[0]), _min_max(sparse[0])], axis=1) / 2
    # a passage is at most twice in a row: once its indices are in order, beside itself
    order = np.argsort(indices, axis=1, kind="stable")
    indices, scores = np.take_along_axis(indices, order, 1), np.take_along_axis(scores, order, 1)
    again = indices[:, 1:] == indices[:, :-1]
    scores[:, :-1] += np.where(again, scores[:, 1:], 0)
    scores[:, 1:][again], indices[:, 1:][again] = -np.inf, -1
    # rows are in the order of the passages, so that a stable sort leaves equal scores in it
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    indices, scores = np.take_along_axis(indices, order, 1), np.take_along_axis(scores, order, 1)
    used = (indices >= 0).any(0)
    return scores[:, used].astype(np.float32), indices[:, used].astype(np.int64)


def _min_max(scores: np.ndarray) -> np.ndarray:
    if not scores.shape[1]:
        return scores.astype(np.float64)
    scores = scores.astype(np.float64)
    least = scores.min(1, keepdims=True)
    # the floor is the one of ranx
    return (scores - least) / np.maximum(scores.max(1, keepdims=True) - least, 1e-9)


def search(
    queries: Representations,
    passages: Representations,
    mode: str,
    top_k: int = 100,
    *,
    query_ids: Sequence[str] | None = None,
    passage_ids: Sequence[str] | None = None,
    exclude: Mapping[str, Collection[str]] | None = None,
    depth: int | None = None,
    name: str | None = None,
) -> ranx.Run:
    """Rank the passages for each query.

    Parameters
    ----------
    queries, passages : Representations
    mode : {"dense", "mean", "sparse", "hybrid"}
        ``dense`` is the dot product where each side has one vector a text (K = 1), MaxSim otherwise; ``mean``
        the dot product of the means of the vectors; ``hybrid`` joins ``dense`` and ``sparse``.
    top_k : int
        Passages of a query's ranking, at most.
    query_ids, passage_ids : sequence of str, optional
        By default ``"0"``, ``"1"``, ...
    exclude : dict of query id to passage ids, optional
        Passages that a query does not retrieve.
    depth : int, optional
        Passages that each side of a hybrid retrieves, over which its scores are normalised; by default
        ``top_k``.
    name : str, optional
        Of the run; by default the mode.

    Returns
    -------
    ranx.Run
        A sparse run leaves out passages of score 0, which share no term with the query.  (A hybrid takes them
        as retrieved, with the least sparse score that there is.)

    Raises
    ------
    ValueError
        For an unknown mode, a side that is missing, shapes or ids that do not fit.
    """
    query_ids, passage_ids = (
        [str(i) for i in range(len(side))] if ids is None else ids
        for ids, side in ((query_ids, queries), (passage_ids, passages))
    )
    for kind, ids, side in (("query", query_ids, queries), ("passage", passage_ids, passages)):
        if len(ids) != len(side):
            raise ValueError(f"{len(ids)} {kind} ids for {len(side)} representations")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    # what is excluded must not cost a place
    more = max(map(len, exclude.values()), default=0) if exclude else 0
    scores, indices = rank(queries, passages, mode, top_k + more, max(depth or top_k, top_k) + more)
    return make_run(to_results(scores, indices, query_ids, passage_ids, exclude, top_k), name or mode)


def rank(
    queries: Representations, passages: Representations, mode: str, top_k: int = 100, depth: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`search` puts into its run, as arrays.

    Returns
    -------
    scores : ndarray of float, shape (n_queries, k)
        Descending in each row.
    indices : ndarray of int64, of the same shape
        Of passages; -1 for none.

    Raises
    ------
    ValueError
        For an unknown mode, a side that is missing, shapes that do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if not len(queries) or not len(passages):
        return np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)
    if mode == "hybrid":
        depth = depth or top_k
        return hybrid_search(_dense_search(queries, passages, depth), sparse_search(queries, passages, depth), top_k)
    how = {"dense": _dense_search, "mean": single_search, "sparse": sparse_search}[mode]
    scores, indices = how(queries, passages, top_k)
    return scores, np.where(scores > 0, indices, -1) if mode == "sparse" else indices


def _dense_search(queries: Representations, passages: Representations, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    single = queries.vectors == 1 and passages.vectors == 1
    return (single_search if single else maxsim_search)(queries, passages, top_k)
