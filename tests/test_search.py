from __future__ import annotations

import itertools

import numpy as np
import pytest
import ranx
import scipy.sparse as sp

from diffret_lib.retrieval import search
from diffret_lib.retrieval.metrics import make_run
from diffret_lib.retrieval.representations import Origin, Representations
from diffret_lib.retrieval.search import RANK_MODES, Ranking, hybrid_search, merged, rank, search_parts, to_results


def make(n: int, k: int, seed: int, h: int = 8, v: int = 40, least: int = 0) -> Representations:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(least, k + 1, n)
    dense = rng.standard_normal((n, k, h)).astype(np.float32)
    dense /= np.linalg.norm(dense, axis=2, keepdims=True)
    dense[np.arange(k) >= lengths[:, None]] = 0
    sparse = sp.csr_matrix(sp.random_array((n, v), density=0.15, rng=rng, dtype=np.float32))
    return Representations(dense, lengths, sparse)


def results(q: Representations, p: Representations, mode: str, top_k: int) -> dict[str, dict[str, float]]:
    return to_results(*rank(q, p, mode, top_k), [str(i) for i in range(len(q))], [str(i) for i in range(len(p))])


# -- the plain reference: loops over texts and vectors


def plain_maxsim(q: Representations, p: Representations) -> np.ndarray:
    out = np.zeros((len(q), len(p)))
    for i in range(len(q)):
        for j in range(len(p)):
            for a in q.dense[i, : q.lengths[i]]:
                products = [float(np.dot(a.astype(float), b.astype(float))) for b in p.dense[j, : p.lengths[j]]]
                out[i, j] += max([0.0, *products])
    return out


def plain_mean(q: Representations, p: Representations) -> np.ndarray:
    def mean(side, i):
        vectors = side.dense[i, : side.lengths[i]].astype(float)
        return vectors.mean(0) if len(vectors) else np.zeros(side.dense.shape[2])

    return np.array([[mean(q, i) @ mean(p, j) for j in range(len(p))] for i in range(len(q))])


def plain_sparse(q: Representations, p: Representations) -> np.ndarray:
    return q.sparse.toarray().astype(float) @ p.sparse.toarray().astype(float).T


def plain_top(scores: np.ndarray, top_k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda j: (-row[j], j))[:top_k] for row in scores]


PLAIN = {"maxsim": plain_maxsim, "mean": plain_mean, "sparse": plain_sparse}


def find(kind: str, q: Representations, p: Representations, top_k: int) -> Ranking:
    return search.search(q, p, [kind], top_k)[kind]


@pytest.fixture
def block(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(search, "BLOCK", request.param)
        monkeypatch.setattr(search, "QUERY_VECTORS", 6)
        monkeypatch.setattr(search.shards_of, "__defaults__", (max(1, request.param // 12),))


@pytest.mark.parametrize("block", [None, 1, 150, 400], indirect=True)
@pytest.mark.parametrize(("kq", "kp"), [(1, 1), (3, 1), (1, 5), (4, 3)])
@pytest.mark.parametrize("kind", PLAIN)
def test_against_plain_loops(kind, kq, kp, block):
    q, p = make(5, kq, 1), make(33, kp, 2)
    expected = PLAIN[kind](q, p)
    scores, indices = find(kind, q, p, 10)
    assert scores.dtype == np.float32 and indices.dtype == np.int64 and scores.shape == indices.shape == (5, 10)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, indices, 1), atol=1e-5)
    # the largest there are
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :10], atol=1e-5)
    assert all(len(set(row)) == 10 for row in indices.tolist())


@pytest.mark.parametrize("block", [None, 7, 128], indirect=True)
@pytest.mark.parametrize("top_k", [1, 5, 40, 200, 300])
def test_ties_go_to_the_lower_index(block, top_k):
    # 200 passages of two kinds: the scores are equal bit for bit
    kind = np.arange(200) % 7 == 0
    dense = np.where(kind[:, None, None], np.float32([1, 0]), np.float32([0, 1]))
    sparse = sp.csr_matrix(np.where(kind[:, None], np.float32([2, 0]), np.float32([0, 1])))
    p = Representations(dense.astype(np.float32), np.ones(200, int), sparse)
    q = Representations(
        np.float32([[[0.9, 0.1]], [[0, 1]]]), np.ones(2, int), sp.csr_matrix(np.float32([[1, 1], [0, 1]]))
    )
    for kind in PLAIN:
        scores, indices = find(kind, q, p, top_k)
        exact = (plain_sparse if kind == "sparse" else plain_mean)(q, p)
        assert indices.tolist() == plain_top(exact.round(6), top_k)
        assert scores.shape == (2, min(top_k, 200))


@pytest.mark.parametrize(("nq", "n"), [(0, 4), (2, 0), (0, 0)])
def test_none_at_all(nq, n):
    q, p = make(nq, 2, 1), make(n, 2, 2)
    for kind in PLAIN:
        scores, indices = find(kind, q, p, 3)
        assert scores.shape == indices.shape == (nq, 0)
    for mode in RANK_MODES:
        assert list(results(q, p, mode, 3).values()) == [{}] * nq


def test_shapes_that_do_not_fit():
    q, p = make(2, 2, 1), make(3, 3, 2, h=9, v=41)
    for kind, message in ("maxsim", "dense.* 8 .* 9"), ("mean", "dense.* 8 .* 9"), ("sparse", "sparse.* 40 .* 41"):
        with pytest.raises(ValueError, match=f"widths of the {message}"):
            find(kind, q, p, 3)
    with pytest.raises(ValueError, match="the passages have no dense side"):
        find("maxsim", q, Representations(None, p.lengths, p.sparse), 3)
    with pytest.raises(ValueError, match="the queries have no sparse side"):
        find("sparse", Representations(q.dense, q.lengths), p, 3)
    with pytest.raises(ValueError, match="mode must be one of"):
        rank(q, q, "fuzzy", 3)
    with pytest.raises(ValueError, match="kinds must be of maxsim, mean, sparse, not 'dense'"):
        find("dense", q, q, 3)


@pytest.mark.parametrize("bad", [True, "4", 2.0, None, 10**30, 0, -1])
def test_numbers_that_are_none(bad):
    for mode in RANK_MODES:
        with pytest.raises(ValueError, match="top_k must be a whole number of at least 1"):
            rank(make(2, 2, 1), make(3, 2, 2), mode, bad)


def test_sides_that_do_not_belong_together():
    def of(side: str, space: str, system: str = "A") -> Representations:
        some = make(3, 1, 1)
        return Representations(some.dense, some.lengths, some.sparse, Origin(system, side, space))

    rank(of("query", "s"), of("passage", "s"), "dense"), rank(make(3, 1, 1), of("query", "s"), "dense")
    swapped, apart = (of("passage", "s"), of("query", "s")), (of("query", "s"), of("passage", "t", "B"))
    for mode in RANK_MODES:
        with pytest.raises(ValueError, match=r"queries .passage side of A. and passages .query side of A. cannot be"):
            rank(*swapped, mode)
        with pytest.raises(ValueError, match=r"queries .query side of A. and passages .passage side of B. cannot be"):
            rank(*apart, mode)


def test_not_finite_scores_are_told(monkeypatch):
    q, p = make(2, 2, 1), make(30, 2, 2, least=1)
    p.dense[17, 0, 0] = np.nan
    monkeypatch.setattr(search.shards_of, "__defaults__", (10,))
    for kind in ("maxsim", "mean"):
        with pytest.raises(ValueError, match=r"passages 10\.\.20 are not finite"):
            find(kind, q, p, 3)


# -- hybrid


def test_hybrid_of_equal_scores_and_ties():
    constant = np.array([[4.0, 4.0]]), np.array([[3, 8]])
    other = np.array([[2.0, 1.0]]), np.array([[6, 3]])
    scores, indices = hybrid_search(constant, other, 10)
    assert indices.tolist() == [[6, 3, 8]] and scores.tolist() == [[0.5, 0.0, 0.0]]


def test_hybrid_with_an_empty_side():
    none = np.zeros((2, 0)), np.zeros((2, 0), np.int64)
    dense = np.array([[2.0, 1.0], [5.0, 5.0]]), np.array([[1, 0], [0, 1]])
    scores, indices = hybrid_search(dense, none, 5)
    assert indices.tolist() == [[1, 0], [0, 1]] and scores.tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_hybrid_search_is_what_ranx_fuses():
    q, p = make(6, 2, 1), make(40, 3, 2)
    ids = [str(i) for i in range(6)], [f"{i:02d}" for i in range(40)]
    sides = [ranx.Run(to_results(*find(kind, q, p, 12), *ids)) for kind in ("maxsim", "sparse")]
    fused = ranx.fuse(runs=sides, norm="min-max", method="wsum", params={"weights": [0.5, 0.5]}).to_dict()
    for query, found in to_results(*rank(q, p, "hybrid", 12), *ids).items():
        assert len(found) == 12 and found == pytest.approx({i: fused[query][i] for i in found}, abs=1e-6)
        assert min(found.values()) >= max(score for i, score in fused[query].items() if i not in found) - 1e-6


# -- runs


def test_dense_is_a_dot_product_for_one_vector_and_maxsim_for_more():
    q, p = make(3, 1, 1, least=1), make(20, 1, 2, least=1)
    run = results(q, p, "dense", 20)
    expected = plain_mean(q, p)
    assert min(run["0"].values()) < 0  # not clamped
    assert run["0"]["3"] == pytest.approx(expected[0, 3], abs=1e-6)
    many = make(20, 2, 2, least=1)
    assert results(q, many, "dense", 20)["1"]["4"] == pytest.approx(plain_maxsim(q, many)[1, 4], abs=1e-6)
    assert results(q, many, "mean", 20)["1"]["4"] == pytest.approx(plain_mean(q, many)[1, 4], abs=1e-6)


def test_a_sparse_run_leaves_out_what_shares_no_term():
    q = Representations(None, np.zeros(2, int), sp.csr_matrix(np.float32([[1, 0, 0], [0, 0, 0]])))
    p = Representations(None, np.zeros(3, int), sp.csr_matrix(np.float32([[0, 1, 0], [2, 0, 0], [3, 1, 0]])))
    run = to_results(*rank(q, p, "sparse", 3), ["a", "b"], ["x", "y", "z"])
    assert run == {"a": {"z": 3.0, "y": 2.0}, "b": {}}


@pytest.mark.parametrize(("scores", "indices", "ids", "message"), [
    ([[0.0], [0.0]], [[0], [0]], (["a"], ["x"]), "and .* for 1 query and 1 passage ids., must be"),
    ([[0.0]], [[4]], (["a"], ["x", "y"]), "of passages that are there"),
    ([[1.0, 2.0]], [[0, 1]], (["a"], ["x", "y"]), "must be finite and descending"),
    ([[np.nan, 2.0]], [[0, 1]], (["a"], ["x", "y"]), "must be finite and descending"),
    ([[0.0], [0.0]], [[0], [0]], (["a", "a"], ["x"]), "query ids and passage ids must be unique"),
    ([[0.0]], [[0]], (["a"], ["x", "x"]), "passage ids must be unique"),
    ([[0.0]], [[0]], ("a", ["x"]), "query_ids must be a list of strings, not 'a'"),
    ([[0.0]], [[0]], (["a"], [7]), "passage_ids must be strings, not int"),
])  # fmt: skip
def test_to_results_checks(scores, indices, ids, message):
    with pytest.raises(ValueError, match=message):
        to_results(np.array(scores), np.array(indices), *ids)


def test_to_results_by_hand():
    assert len(make_run({}).run) == 0
    found = to_results(np.array([[2.0, 1.0, -np.inf]]), np.array([[1, 0, -1]]), ["a"], ["x", "y" * 40])
    assert found == {"a": {"y" * 40: 2.0, "x": 1.0}} and list(found["a"]) == ["y" * 40, "x"]
    assert make_run(found, "n").to_dict() == found
    assert list(make_run({"a": {"x": 1.0, "y": 2.0}}).run["a"]) == ["y", "x"]  # best first


@pytest.mark.parametrize("top_k", [1, 7, 19, 20, 50])
@pytest.mark.parametrize("mode", RANK_MODES)
def test_an_excluded_passage_is_as_if_it_were_not_there(mode, top_k):
    q, p = make(4, 2, 1, least=1), make(20, 3, 2, least=1)
    places = rank(q, p, "dense", 20)[1]
    excluded = np.array([places[0, -1], -1, 0, places[3, 0]])  # the last of all, none, some one, the first
    run = to_results(*rank(q, p, mode, top_k, excluded), list("abcd"), [str(i) for i in range(20)])
    for i, query in enumerate("abcd"):
        rest = [j for j in range(20) if j != excluded[i]]
        alone = to_results(*rank(q[[i]], p[rest], mode, top_k), [query], [str(j) for j in rest])[query]
        assert list(run[query]) == list(alone) and run[query] == pytest.approx(alone, abs=1e-6)
    with pytest.raises(ValueError, match=r"excluded must have the shape \(4,\), not \(3,\)"):
        rank(q, p, mode, top_k, excluded[:3])


@pytest.mark.parametrize("top_k", [1, 7, 60])
def test_parts_searched_apart_and_merged(top_k):
    # as segments of a large collection are: each from its own start, with a passage that a query excludes
    q, p = make(4, 3, 1), make(50, 2, 2)
    p = p[np.r_[0:50, 3:9]]  # equal passages in different parts
    excluded, kinds = np.array([-1, 49, 2, -1]), ("maxsim", "mean", "sparse")
    whole, parts = search.search(q, p, kinds, top_k, excluded), []
    for a, b in itertools.pairwise([0, 20, 21, 56]):
        parts.append(search_parts(q, search.shards_of(p[a:b], 8), kinds, top_k, excluded, a))
    for kind in kinds:
        scores, indices = merged([part[kind] for part in parts], top_k)
        assert (indices == whole[kind][1]).all() and indices.dtype == np.int64
        np.testing.assert_allclose(scores, whole[kind][0], rtol=1e-6, atol=1e-6)
