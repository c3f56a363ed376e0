from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from diffret_lib.representations import Representations, ShardWriter


def random(n: int, k: int = 3, h: int = 4, v: int = 50, seed: int = 0) -> Representations:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, k + 1, n)
    dense = rng.standard_normal((n, k, h)).astype(np.float32)
    dense[np.arange(k) >= lengths[:, None]] = 0
    sparse = sp.random_array((n, v), density=0.1, rng=rng, dtype=np.float32, format="csr")
    return Representations(dense, lengths, sp.csr_matrix(sparse))


def same(a: Representations, b: Representations) -> bool:
    return (
        np.array_equal(a.dense, b.dense)
        and np.array_equal(a.lengths, b.lengths)
        and a.sparse.shape == b.sparse.shape
        and np.array_equal(a.sparse.toarray(), b.sparse.toarray())
    )


def write(writer: ShardWriter, whole: Representations, bounds: list[tuple[int, int]]) -> None:
    for a, b in bounds:
        part = whole[a:b]
        writer.append(a, part.dense, part.lengths, part.sparse)


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
    assert len(whole[[]]) == 0 and len(whole[whole.lengths >= 0]) == 6
    with pytest.raises(TypeError, match="slice"):
        whole[1]


def test_concatenate_fills_up_to_the_largest_k():
    a, b = random(2, k=2), random(3, k=4, seed=1)
    whole = Representations.concatenate([a, b])
    assert whole.dense.shape == (5, 4, 4) and whole.lengths.tolist() == [*a.lengths, *b.lengths]
    assert np.array_equal(whole.dense[:2, :2], a.dense) and not whole.dense[:2, 2:].any()
    assert np.array_equal(whole.sparse[2:].toarray(), b.sparse.toarray())
    with pytest.raises(ValueError, match="different vocabularies"):
        Representations.concatenate([a, random(2, v=51)])
    with pytest.raises(ValueError, match="some parts have a sparse side"):
        Representations.concatenate([a, Representations(a.dense, a.lengths)])


@pytest.mark.parametrize("order", [[(0, 4), (4, 9), (9, 10)], [(9, 10), (0, 4), (4, 9)]])
def test_shards_join_to_the_whole(tmp_path, order):
    whole = random(10)
    writer = ShardWriter(tmp_path / "e", {"fingerprint": "f", "count": 10})
    write(writer, whole, order)
    writer.finish()
    loaded = Representations.load(tmp_path / "e")
    assert same(whole, loaded)
    assert all(isinstance(part, np.memmap) for part in (loaded.dense, loaded.sparse.data, loaded.sparse.indices))
    assert loaded.sparse.indices.dtype == loaded.sparse.indptr.dtype == np.int32
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "data.npy", "dense.npy", "indices.npy", "indptr.npy", "lengths.npy", "manifest.json",
    ]  # fmt: skip


def test_goes_on_after_the_last_whole_shard(tmp_path):
    whole = random(10)
    first = ShardWriter(tmp_path, {"count": 10})
    write(first, whole, [(0, 4)])
    # the second was interrupted while it was written
    half = tmp_path / ".0000000004.abcd.tmp"
    half.mkdir()
    (half / "dense.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="was not finished"):
        Representations.load(tmp_path)
    second = ShardWriter(tmp_path, {"count": 10})
    assert second.done == {0: 4} and not second.finished
    with pytest.raises(ValueError, match="4 texts were written, and there should be 10"):
        second.finish()
    write(second, whole, [(4, 10)])
    second.finish()
    assert same(whole, Representations.load(tmp_path))
    third = ShardWriter(tmp_path, {"count": 10})
    assert third.finished and third.done == {0: 4, 4: 6}
    third.finish()
    with pytest.raises(RuntimeError, match="finished"):
        write(third, whole, [(0, 4)])


def test_finish_interrupted_is_done_again(tmp_path, monkeypatch):
    whole = random(5)
    writer = ShardWriter(tmp_path, {})
    write(writer, whole, [(0, 2), (2, 5)])
    monkeypatch.setattr(ShardWriter, "_write_manifest", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    monkeypatch.undo()
    again = ShardWriter(tmp_path, {})
    assert again.done == {0: 2, 2: 3}
    again.finish()
    assert same(whole, Representations.load(tmp_path))


def test_a_manifest_that_does_not_fit_names_both(tmp_path):
    ShardWriter(tmp_path, {"fingerprint": "old"})
    with pytest.raises(ValueError, match='"old"(.|\n)*"new"'):
        ShardWriter(tmp_path, {"fingerprint": "new"})


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        ShardWriter(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="no manifest"):
        Representations.load(tmp_path)


def test_shards_that_do_not_fit(tmp_path):
    whole = random(6)
    writer = ShardWriter(tmp_path, {})
    write(writer, whole, [(0, 3)])
    with pytest.raises(ValueError, match=r"2\.\.5 overlaps shard 0\.\.3"):
        write(writer, whole, [(2, 5)])
    other = random(3, h=5)
    with pytest.raises(ValueError, match="H=5.*H=4"):
        writer.append(3, other.dense, other.lengths, other.sparse)
    write(writer, whole, [(4, 6)])
    with pytest.raises(ValueError, match=r"the texts 3\.\.4 are missing"):
        writer.finish()


def test_damage_is_told(tmp_path):
    random(6).save(tmp_path / "e")
    np.save(tmp_path / "e" / "dense.npy", np.zeros((5, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"damaged.*\(5, 3, 4\).*\(6, 3, 4\)"):
        Representations.load(tmp_path / "e")
    (tmp_path / "e" / "dense.npy").unlink()
    with pytest.raises(ValueError, match="damaged"):
        Representations.load(tmp_path / "e")


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("sides", ["both", "dense", "sparse"])
def test_save_and_load(tmp_path, n, sides):
    whole = random(n)
    whole = Representations(
        None if sides == "sparse" else whole.dense, whole.lengths, None if sides == "dense" else whole.sparse
    )
    whole.save(tmp_path / "e", {"what": sides})
    loaded = Representations.load(tmp_path / "e")
    assert len(loaded) == n and (loaded.dense is None) == (sides == "sparse")
    assert (loaded.sparse is None) == (sides == "dense")
    if loaded.dense is not None:
        assert np.array_equal(loaded.dense, whole.dense) and loaded.dense.shape == whole.dense.shape
    if loaded.sparse is not None:
        assert (loaded.sparse != whole.sparse).nnz == 0


def test_shards_without_sparse_entries(tmp_path):
    writer = ShardWriter(tmp_path, {})
    full = random(2)
    for start in (0, 2, 4):
        sparse = full.sparse if start == 2 else sp.csr_matrix((2, 50), dtype=np.float32)
        writer.append(start, None, np.zeros(2, int), sparse)
    writer.finish()
    loaded = Representations.load(tmp_path)
    assert np.array_equal(loaded.sparse.toarray()[2:4], full.sparse.toarray())
    assert loaded.sparse.nnz == full.sparse.nnz


def test_no_texts_at_all(tmp_path):
    writer = ShardWriter(tmp_path, {"count": 0})
    writer.finish()
    assert len(Representations.load(tmp_path)) == 0


def test_memory_stays_at_a_shard(tmp_path):
    writer = ShardWriter(tmp_path, {})
    n, shard = 20, np.ones((50, 16, 64), np.float32)  # 200 kB a shard
    tracemalloc.start()
    for i in range(n):
        writer.append(50 * i, shard, np.full(50, 16))
    writer.finish()
    loaded = Representations.load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded.dense.nbytes == n * shard.nbytes
    assert peak < 6 * shard.nbytes
    assert json.loads((tmp_path / "manifest.json").read_text())["layout"]["n"] == 50 * n
