from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from diffret_lib.retrieval.representations import Origin, Representations
from tests.test_search import make
from tests.test_systems import same

ONE = np.ones(1, int)


@pytest.mark.parametrize(("dense", "lengths", "sparse", "message"), [
    (np.zeros((2, 3, 4)), np.array([1, 2, 3]), None, r"dense must have the shape \(3, K, H\), not \(2, 3, 4\)"),
    (np.zeros((2, 3)), np.array([1, 2]), None, r"not \(2, 3\)"),
    (np.zeros(2), np.array([1, 2]), None, r"dense must have the shape \(2, K, H\), not \(2,\)"),
    (np.zeros((2, 3, 4)), np.array(2), None, r"lengths must be integers of shape \(n,\), not int64 \(\)"),
    (np.zeros((2, 3, 4)), np.array([1, 4]), None, r"lengths must be in 0\.\.3; found 1\.\.4"),
    (np.zeros((2, 3, 4)), np.array([0.5, 1]), None, "lengths must be integers"),
    (None, np.array([0, 0]), sp.csr_matrix((3, 5)), "sparse must have 2 rows, not 3"),
    ([[[1.0]]], ONE, None, "dense must be an array"),
    (np.full((1, 1, 1), "a"), ONE, None, "dense must hold numbers"),
    (np.ones((1, 1, 1)), [1], None, "lengths must be an array"),
    (np.ones((1, 1, 1)), None, None, "lengths must be an array"),
    (np.ones((1, 1, 1)), ONE, np.ones((1, 2)), "sparse must be an array"),
])  # fmt: skip
def test_arrays_that_do_not_fit(dense, lengths, sparse, message):
    with pytest.raises(ValueError, match=message):
        Representations(dense, lengths, sparse)


@pytest.mark.parametrize("rows", [[99], -4, [True] * 5], ids=str)
def test_rows_that_are_not_there(rows):
    with pytest.raises(IndexError, match=r"texts are numbered 0\.\.2 here"):
        Representations(np.zeros((3, 1, 2), np.float32), np.ones(3, int))[rows]


def test_concatenate():
    a, b = make(2, 3, 0), make(3, 3, 1)
    whole = Representations.concatenate([a, b])
    assert whole.lengths.tolist() == [*a.lengths, *b.lengths] and len(whole) == 5
    same(whole[:2], a, exact=True), same(whole[2:], b, exact=True)
    same(whole[np.arange(5) >= 2], b, exact=True)
    dense, nothing = Representations(a.dense, a.lengths), Representations(None, a.lengths)
    for other in make(2, 3, 0, v=51), make(2, 3, 0, h=5), dense, nothing:
        for parts in ([a, other], [other, a], []):
            with pytest.raises(ValueError, match="parts of one K, H and V are needed"):
                Representations.concatenate(parts)


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("sides", ["both", "dense", "sparse"])
def test_save_and_load(tmp_path, n, sides):
    whole, origin = make(n, 3, 0), Origin("BM25", "query", "space")
    dense, sparse = None if sides == "sparse" else whole.dense, None if sides == "dense" else whole.sparse
    Representations(dense, whole.lengths, sparse, origin).save(tmp_path / "new" / "e")
    loaded = Representations.load(tmp_path / "new" / "e")
    assert loaded.origin == origin and loaded[:1].origin == origin
    same(loaded, Representations(dense, whole.lengths, sparse), exact=True)
    assert dense is None or isinstance(loaded.dense, np.memmap)
    if sparse is not None:
        assert isinstance(loaded.sparse.data, np.memmap) and loaded.sparse.indices.dtype == np.int32
