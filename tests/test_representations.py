from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from diffret_lib.retrieval.representations import Origin, Representations
from tests.test_systems import same


def random(n: int, k: int = 3, h: int = 4, v: int = 50, seed: int = 0) -> Representations:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, k + 1, n)
    dense = rng.standard_normal((n, k, h)).astype(np.float32)
    dense[np.arange(k) >= lengths[:, None]] = 0
    sparse = sp.random_array((n, v), density=0.1, rng=rng, dtype=np.float32, format="csr")
    return Representations(dense, lengths, sp.csr_matrix(sparse))


@pytest.mark.parametrize(
    ("dense", "lengths", "sparse", "message"),
    [
        (np.zeros((2, 3, 4)), np.array([1, 2, 3]), None, r"dense must have the shape \(3, K, H\), not \(2, 3, 4\)"),
        (np.zeros((2, 3)), np.array([1, 2]), None, r"not \(2, 3\)"),
        (np.zeros((2, 3, 4)), np.array([1, 4]), None, r"lengths must be in 0\.\.3; found 1\.\.4"),
        (np.zeros((2, 3, 4)), np.array([0.5, 1]), None, "lengths must be integers"),
        (None, np.array([0, 0]), sp.csr_matrix((3, 5)), "sparse must have 2 rows, not 3"),
    ],
)
def test_shapes_that_do_not_fit(dense, lengths, sparse, message):
    with pytest.raises(ValueError, match=message):
        Representations(dense, lengths, sparse)


def test_rows():
    whole = random(6)
    part = whole[[4, 1]]
    assert len(part) == 2 and np.array_equal(part.dense, whole.dense[[4, 1]])
    assert np.array_equal(part.sparse.toarray(), whole.sparse.toarray()[[4, 1]])
    assert len(whole[:0]) == 0 and len(whole[whole.lengths >= 0]) == 6


@pytest.mark.parametrize("rows", [[99], -4, [True] * 5], ids=str)
def test_rows_that_are_not_there(rows):
    with pytest.raises(IndexError, match=r"texts are numbered 0\.\.2 here"):
        Representations(np.zeros((3, 1, 2), np.float32), np.ones(3, int))[rows]


def test_concatenate():
    a, b = random(2), random(3, seed=1)
    whole = Representations.concatenate([a, b])
    assert whole.lengths.tolist() == [*a.lengths, *b.lengths] and len(whole) == 5
    same(whole[:2], a, exact=True), same(whole[2:], b, exact=True)
    for other in (
        random(2, v=51),
        random(2, h=5),
        Representations(a.dense, a.lengths),
        Representations(None, a.lengths),
    ):
        for parts in ([a, other], [other, a]):
            with pytest.raises(ValueError):
                Representations.concatenate(parts)


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("sides", ["both", "dense", "sparse"])
def test_save_and_load(tmp_path, n, sides):
    whole, origin = random(n), Origin("BM25", "query", "space")
    dense, sparse = None if sides == "sparse" else whole.dense, None if sides == "dense" else whole.sparse
    Representations(dense, whole.lengths, sparse, origin).save(tmp_path / "new" / "e")
    loaded = Representations.load(tmp_path / "new" / "e")
    assert loaded.origin == origin and loaded[:1].origin == origin and loaded.lengths.tolist() == whole.lengths.tolist()
    if dense is None:
        assert loaded.dense is None
    else:
        assert isinstance(loaded.dense, np.memmap) and np.array_equal(loaded.dense, dense)
    if sparse is None:
        assert loaded.sparse is None
    else:
        assert isinstance(loaded.sparse.data, np.memmap) and loaded.sparse.indices.dtype == np.int32
        assert loaded.sparse.shape == sparse.shape and (loaded.sparse != sparse).nnz == 0


@pytest.mark.parametrize(
    ("side", "value"),
    [
        ("dense", [[[1.0]]]),
        ("dense", np.full((1, 1, 1), "a")),
        ("lengths", [1]),
        ("lengths", None),
        ("sparse", np.ones((1, 2))),
    ],
)
def test_what_is_no_array_is_refused(side, value):
    right = {"dense": np.ones((1, 1, 1), np.float32), "lengths": np.ones(1, int), "sparse": None}
    with pytest.raises(ValueError, match=side):
        Representations(**right | {side: value})


def test_parts_that_cannot_be_joined():
    parts = [Representations(np.ones((1, 1, h), np.float32), np.ones(1, int)) for h in (3, 32)]
    for wrong in ([], parts, [parts[0], Representations(None, np.ones(1, int))]):
        with pytest.raises(ValueError, match="parts of one K, H and V are needed"):
            Representations.concatenate(wrong)
