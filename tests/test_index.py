from __future__ import annotations

import json
import os
import resource
import threading

import faiss
import numpy as np
import psutil
import pytest
import scipy.sparse as sp

from diffret_lib.retrieval import allow_many_files
from diffret_lib.retrieval import search as module
from diffret_lib.retrieval.index import FaissIndex, PassageIndex, two_stage_search
from diffret_lib.retrieval.representations import Origin, Representations
from diffret_lib.retrieval.search import PASSAGES, RANK_MODES, rank, search, shards_of
from diffret_lib.retrieval.systems import SHARD_TEXTS
from tests.test_search import make, plain_maxsim


def whole(n: int, k: int, seed: int) -> Representations:
    """Texts of 0, 1, 2 or 4 vectors whose scores are exact in any order of sums, and often equal."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([length for length in (0, 1, 2, 4) if length <= k], n)
    dense = rng.integers(-2, 3, (n, k, 8)).astype(np.float32)
    dense[np.arange(k) >= lengths[:, None]] = 0
    return Representations(dense, lengths, sp.csr_matrix(rng.integers(0, 2, (n, 12)).astype(np.float32)))


@pytest.fixture
def written(tmp_path):
    """A function that writes an index of passages in shards of ``size``."""

    def write(passages: Representations, size: int = 16, storage: str = "float32", name: str = "index") -> PassageIndex:
        return PassageIndex.write(tmp_path / name, shards_of(passages, size), storage)

    return write


def test_a_shard_is_one_of_the_cache():
    assert PASSAGES == SHARD_TEXTS


# -- exact search


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize(("kq", "kp"), [(1, 1), (3, 1), (1, 5), (4, 3)])
@pytest.mark.parametrize("top_k", [1, 10, 100])
def test_shards_give_what_one_array_gives(written, kq, kp, top_k, without, monkeypatch):
    monkeypatch.setattr(module, "QUERY_VECTORS", 8)
    monkeypatch.setattr(module, "BLOCK", 90)
    q, p = whole(7, kq, 1), whole(83, kp, 2)
    excluded = np.array([0, -1, 82, 15, 16, -1, 40]) if without else None
    index = written(p)
    assert (len(index), index.vectors, index.hidden, index.vocabulary) == (83, kp, 8, 12)
    for mode in RANK_MODES:
        scores, indices = index.search(q, mode, top_k, excluded)
        expected, places = rank(q, p, mode, top_k, excluded)
        n = min(scores.shape[1], expected.shape[1])  # a passage less, where one is excluded of all
        assert indices[:, :n].tolist() == places[:, :n].tolist()
        assert (indices[:, n:] < 0).all() and (places[:, n:] < 0).all()
        found = indices[:, :n] >= 0
        assert (scores[:, :n][found] == expected[:, :n][found]).all() and scores.dtype == np.float32


def test_many_shards_and_all_equal(written):
    one = make(1, 2, 3, least=2)
    p = Representations(np.repeat(one.dense, 3000, 0), np.repeat(one.lengths, 3000))
    scores, indices = written(p, 100).search(make(2, 2, 1, least=2), "dense", 150)
    assert indices.tolist() == [list(range(150))] * 2
    assert (scores == scores[:, :1]).all()


def test_none_one_and_more_than_there_are(written):
    q = make(3, 2, 1)
    for n in (0, 1, 2):
        index = written(make(n, 2, 2), name=str(n))
        for mode in RANK_MODES:
            scores, indices = index.search(q, mode, 5)
            assert scores.shape == indices.shape and scores.shape[1] <= n and indices.max(initial=-1) < n
        assert index.search(q[:0], "hybrid", 5)[1].shape == index.search(q[:0], "mean", 5)[1].shape == (0, 0)
    assert written(make(1, 2, 2), name="e").search(q, "dense", 5, np.zeros(3, int))[1].tolist() == [[-1]] * 3


def test_folders_of_encodings_are_an_index(tmp_path):
    q, p = make(4, 2, 1), make(50, 3, 2)
    for i, part in enumerate(shards_of(p, 20)):
        part.save(tmp_path / str(i))
    origin = Origin("A", "passage", "s")
    index = PassageIndex([tmp_path / str(i) for i in range(3)], origin)
    with pytest.raises(ValueError, match="cannot be compared"):
        index.search(Representations(q.dense, q.lengths, q.sparse, origin), "dense", 3)
    assert index.lengths.tolist() == p.lengths.tolist() and index.storage == "float32"
    for mode in RANK_MODES:
        np.testing.assert_allclose(index.search(q, mode, 9)[0], rank(q, p, mode, 9)[0], atol=1e-6)
    rows = [49, 0, 20, 20]
    assert (index.reconstruct(rows).dense == p.dense[rows]).all() and len(index.reconstruct([])) == 0
    parts = Representations.concatenate(list(index.parts()))
    assert (parts.dense == p.dense).all() and (parts.sparse != p.sparse).nnz == 0


def test_memory_stays_that_of_a_shard(written, tmp_path):
    p = Representations(np.ones((2048, 16, 256), np.float32), np.full(2048, 16))  # 32 MiB
    index = PassageIndex.write(tmp_path / "i", (p for _ in range(4)))
    del p
    process, seen = psutil.Process(), []

    class Watched(PassageIndex):
        def parts(self, side=None):
            for part in super().parts(side):
                yield part
                seen.append(process.memory_info().rss)

    index = Watched(index._folders)
    q = Representations(np.ones((2, 4, 256), np.float32), np.full(2, 4))
    index.search(q, "dense", 5)
    assert len(seen) == 4 and max(seen) - seen[0] < 48 << 20 < 96 << 20
    before = process.memory_info().rss
    kept = [np.load(folder / "dense.npy", mmap_mode="r") for folder in index._folders]
    assert sum(float(dense.sum()) for dense in kept) > 0
    assert process.memory_info().rss - before > 96 << 20  # what the search would have shown


# -- storage


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_narrow_storage_is_within_its_bound(written, storage):
    q, p = make(6, 3, 1, h=64), make(90, 4, 2, h=64)
    index = written(p, storage=storage)
    if storage == "int8":  # half a step in each component
        error = np.abs(p.dense).max(-1) / 127 / 2
    else:  # half a unit in the last of 11 bits, or of the smallest number
        error = np.maximum(np.abs(p.dense).max(-1) * 2.0**-11, 2.0**-25)
    stored = index.reconstruct(range(90)).dense
    assert stored.dtype == np.float32 and (np.abs(stored - p.dense) <= error[..., None] * (1 + 1e-5)).all()
    assert not (stored == p.dense).all()
    # of a product: times the sum of the query vector's components; of a score: summed over query vectors
    bound = np.abs(q.dense).sum((1, 2)) * error.max()
    scores, indices = index.search(q, "dense", 90)
    assert (np.abs(scores - np.take_along_axis(plain_maxsim(q, p), indices, 1)) <= bound[:, None] + 1e-5).all()
    assert index.storage == storage
    size = sum(path.stat().st_size for path in index._folders[0].glob("*.npy") if path.stem in ("codes", "scales"))
    assert size < 16 * 4 * (64 * {"float16": 2, "int8": 1}[storage] + 4) + 300
    # the sparse side is as it was
    assert (index.search(q, "sparse", 9)[1] == rank(q, p, "sparse", 9)[1]).all()


def test_an_index_is_converted_from_another(written, tmp_path):
    p = make(50, 3, 2)
    narrow = PassageIndex.write(tmp_path / "narrow", written(p).parts(), "int8")
    at_once = written(p, storage="int8", name="at once")
    assert (narrow.reconstruct(range(50)).dense == at_once.reconstruct(range(50)).dense).all()
    with pytest.raises(ValueError, match="storage must be one of float32, float16, int8, not 'int4'"):
        written(p, storage="int4")
    p.dense[20, 0, 0] = 1e6
    with pytest.raises(ValueError, match="shard 000001 has vectors that are not finite as float16"):
        written(p, storage="float16", name="too large")
    p.dense[20, 0, 0] = np.nan
    for storage in ("int8", "float32"):
        with pytest.raises(ValueError, match=rf"shard 000001 .* not finite as {storage}"):
            written(p, storage=storage, name="too large")
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["at once", "index", "narrow"]


def test_an_index_is_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield make(5, 2, 2)
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        PassageIndex.write(tmp_path / "index", broken())
    with pytest.raises(ValueError, match="nothing to write"):
        PassageIndex.write(tmp_path / "index", [])
    assert [path.name for path in tmp_path.iterdir()] == [".index.lock"]


def test_two_runs_on_one_folder(tmp_path):
    p, said = make(200, 3, 1), []

    def write():
        try:
            said.append(len(PassageIndex.write(tmp_path / "index", shards_of(p, 8), "int8")))
        except ValueError as error:
            said.append(str(error))

    both = [threading.Thread(target=write) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    refused = f"{tmp_path / 'index'} is there already: open it with PassageIndex.read, or remove it"
    assert sorted(map(str, said)) == [refused, "200"]
    assert len(PassageIndex.read(tmp_path / "index")) == 200
    PassageIndex.write(tmp_path / "again", shards_of(p, 8), "int8")  # the bytes do not depend on the run
    assert (tmp_path / "again" / "index.json").read_bytes() == (tmp_path / "index" / "index.json").read_bytes()


@pytest.mark.parametrize("fault", ["flipped", "cut", "file gone", "shard gone", "another shard"])
def test_a_damaged_shard_is_named(written, tmp_path, fault):
    folder = written(make(40, 2, 1))._folders[1].parent
    shard = folder / "000001"
    if fault in ("flipped", "cut"):
        content = bytearray((shard / "dense.npy").read_bytes())
        content[-1] ^= 1
        (shard / "dense.npy").write_bytes(content if fault == "flipped" else content[:-4])
    elif fault == "file gone":
        (shard / "lengths.npy").unlink()
    else:
        shard.rename(tmp_path / "away")
        if fault == "another shard":
            (folder / "000000").rename(shard)
            (tmp_path / "away").rename(folder / "000000")
    named = "000000" if fault == "another shard" else "000001"
    with pytest.raises(ValueError, match=f"shard .*{named} is missing or damaged; write the index again"):
        PassageIndex.read(folder)


def test_what_is_no_index(tmp_path, written):
    with pytest.raises(ValueError, match=r"away is no index: FileNotFoundError"):
        PassageIndex.read(tmp_path / "away")
    with pytest.raises(ValueError, match="at least one shard"):
        PassageIndex([])
    make(5, 2, 1).save(tmp_path / "a")
    for other, what in ((make(5, 3, 1), "3, 8, 40"), (make(5, 2, 1, h=9), "2, 9"), (make(5, 2, 1, v=41), "41")):
        other.save(tmp_path / what)
        with pytest.raises(ValueError, match=rf"shard .*{what} does not belong to .*a: .*{what}"):
            PassageIndex([tmp_path / "a", tmp_path / what])
    with pytest.raises(ValueError, match=r"shard .*b has no encodings that can be read"):
        PassageIndex([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a" / "about.json").write_text(json.dumps({"V": 40, "origin": None})[:5])
    with pytest.raises(ValueError, match=r"shard .*a has no encodings that can be read"):
        PassageIndex([tmp_path / "a"])


def test_what_does_not_fit(written):
    q, sided = make(2, 2, 1), make(3, 2, 1)
    sided.origin = Origin("A", "passage", "s")
    alone = written(Representations(sided.dense, sided.lengths, None, sided.origin))
    with pytest.raises(ValueError, match="passages have no sparse side"):
        alone.search(q, "hybrid", 3)
    with pytest.raises(ValueError, match="cannot be compared"):
        alone.search(sided, "dense", 3)


# -- FAISS, and both


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [("Flat", {}), ("IVF4,Flat", {"nprobe": 4}), ("IVF4,PQ4x4", {"nprobe": 4}), ("HNSW16", {"efSearch": 300})],
)
def test_single_vectors_by_faiss(written, tmp_path, factory, parameters):
    q, p = make(5, 2, 1, least=1), make(300, 3, 2, least=1)
    index = written(p, 64)
    found = FaissIndex.build(index, factory)
    scores, indices = found.search(q, 20, **parameters)
    expected, places = search(q, p, ["mean"], 20)["mean"]
    shared = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(indices, places, strict=True)])
    assert shared == 1 if "PQ" not in factory and "HNSW" not in factory else shared > 0.4
    assert (found.candidates(q, 20, **parameters) == indices).all()
    if factory in ("Flat", "IVF4,Flat"):
        np.testing.assert_allclose(scores, expected, atol=1e-6)
    faiss.write_index(found.index, str(tmp_path / "faiss"))
    again = FaissIndex(faiss.read_index(str(tmp_path / "faiss")), index)
    assert (again.search(q, 20, **parameters)[1] == indices).all()
    assert found.search(q, 1000)[1].shape == (5, 300)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("over", ["mean", "vectors"])
def test_two_stages_with_all_candidates_are_exact(written, over, storage):
    q, p = make(6, 3, 1), make(120, 4, 2)
    p.dense[60:], p.lengths[60:] = p.dense[:60], p.lengths[:60]  # each of them twice
    index = written(p, 50, storage)
    found = FaissIndex.build(index, over=over)
    scores, indices = two_stage_search(q, found, candidates=len(p) * 4, top_k=120)
    expected = index.search(q, "dense", 120)[0]
    there = indices >= 0  # over vectors, a passage without any is never found, and a query without any finds none
    for i in range(6):
        n = there[i].sum()
        assert n == (120 if over == "mean" else (p.lengths > 0).sum() * (q.lengths[i] > 0))
        np.testing.assert_allclose(scores[i, :n], expected[i, :n], atol=1e-6)
        twins = indices[i, :n][indices[i, :n] < 60]
        assert all(list(indices[i]).index(j) < list(indices[i]).index(j + 60) for j in twins)


def test_two_stages_with_one_vector_a_side_are_a_dot_product(written):
    q, p = make(6, 1, 1, least=1), make(40, 1, 2, least=1)
    index = written(p)
    scores, indices = index.search(q, "dense", 40)
    assert (scores < 0).any()
    found = two_stage_search(q, FaissIndex.build(index), candidates=40, top_k=40)
    assert (found[1] == indices).all()
    np.testing.assert_allclose(found[0], scores, atol=1e-6)


def test_as_many_files_are_open_as_there_are_shards(written):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
    try:
        allow_many_files()
        assert written(make(60, 2, 1), 1).search(make(2, 2, 2), "hybrid", 60)[1].shape == (2, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_candidates_over_vectors_by_hand(written):
    dense = np.zeros((4, 2, 2), np.float32)
    dense[0], dense[1, 0], dense[2], dense[3, 0] = [[1, 0], [0.9, 0]], [0, 1], [[0.6, 0], [0, 0.6]], [-1, -1]
    p = Representations(dense, np.array([2, 1, 2, 1]))
    q = Representations(np.float32([[[1, 0], [0, 1]], [[1, 0], [0, 0]]]), np.array([2, 1]))
    found = FaissIndex.build(written(p, 3), over="vectors")
    # the two nearest vectors of (1, 0) are both of passage 0, those of (0, 1) of 1 and 2: sums 1, 1 and 0.6
    assert found.candidates(q, 2).tolist() == [[0, 1], [0, -1]]
    assert found.candidates(q, 3).tolist() == [[2, 0, 1], [0, 2, -1]]  # and passage 2 is among those of (1, 0): 1.2
    assert two_stage_search(q, found, 3, 2)[1].tolist() == [[2, 0], [0, 2]]


def test_what_faiss_cannot_do(written):
    q, index = make(2, 2, 1), written(make(30, 2, 2))
    flat = FaissIndex.build(index)
    with pytest.raises(ValueError, match=r"top_k \(100\) must be no more than the candidates \(50\)"):
        two_stage_search(q, flat, 50)
    with pytest.raises(ValueError, match="takes no parameter 'nprobe'"):
        flat.search(q, 3, nprobe=4)
    for factory in ("Flatt", "IVF64,Flat", "IVF2,PQ3"):
        with pytest.raises(ValueError, match=f"FAISS cannot make '{factory}' of 30 passages: ."):
            FaissIndex.build(index, factory)
    with pytest.raises(ValueError, match="over must be one of mean, vectors"):
        FaissIndex.build(index, over="tokens")
    with pytest.raises(ValueError, match="needs an index over the mean"):
        FaissIndex.build(index, over="vectors").search(q, 3)
    with pytest.raises(ValueError, match=r"not one of these passages: 30 vectors of size 8 in FAISS, 31"):
        FaissIndex(flat.index, written(make(31, 2, 2), name="other"))
    with pytest.raises(ValueError, match="nothing to index: 0 passages"):
        FaissIndex.build(written(make(0, 2, 2), name="none"))
    with pytest.raises(ValueError, match="widths of the dense sides differ"):
        two_stage_search(make(2, 2, 1, h=9), flat, 30, 3)
