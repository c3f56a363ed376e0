"""Search in passages that stay on disk: exact over memory-mapped shards, by FAISS, and by both in two stages.

:class:`PassageIndex` holds the encodings, :class:`FaissIndex` finds the nearest of them approximately, and
:func:`two_stage_search` scores exactly what FAISS found.  Ties are broken as in :mod:`diffret_lib.retrieval.search`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from filelock import FileLock

from diffret_lib.cache import MANIFEST, atomic_path, file_sha256, is_sealed, seal, write_text
from diffret_lib.data.checks import whole_number
from diffret_lib.retrieval.representations import Origin, Representations
from diffret_lib.retrieval.search import (
    Ranking,
    check_sides,
    in_mode,
    kinds_of,
    mean_vectors,
    scores_of,
    search_parts,
    to_ranking,
)

#: How dense vectors are stored; "int8" has a scale for each vector, its largest component over 127.
STORAGES = ("float32", "float16", "int8")
#: What FAISS indexes: the mean of a passage's vectors, or each of them.
OVER = ("mean", "vectors")
#: Name of the file that says what an index holds.
ABOUT = "index.json"


class PassageIndex:
    """Encoded passages in shards on disk, which are never joined in memory.

    ``folders`` are the shards in the order of the passages: folders of :meth:`Representations.save`, such as the
    cache's encodings, or those that :meth:`write` made.  ``origin`` is by default that of the shards.  ValueError,
    naming the shard: it has no encodings, or their sides, sizes, storage or origin are not those of the first.

    Attributes
    ----------
    lengths : ndarray of int, shape (n,)
        Vectors that each passage has.
    vectors, hidden, vocabulary : int
        Kp, H and V; 0 where there is no such side.
    storage : str or None
        One of :data:`STORAGES`; None without a dense side.
    origin : Origin or None
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]], origin: Origin | None = None) -> None:
        self._folders, self._maps, lengths, kinds = [Path(folder) for folder in folders], [], [], []
        for folder in self._folders:
            try:
                about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
                lengths.append(np.load(folder / "lengths.npy"))
                self._maps.append(_mapped(folder))
            except (OSError, ValueError) as error:
                raise ValueError(f"shard {folder} has no encodings that can be read: {error}") from None
            dense = self._maps[-1][0]
            kinds.append((None, 0, 0) if dense is None else (dense.dtype.name, *dense.shape[1:]))
            kinds[-1] += about["V"] or 0, about["origin"] and Origin(**about["origin"])
            if kinds[-1] != kinds[0]:
                raise ValueError(f"shard {folder} does not belong to {self._folders[0]}: {kinds[-1]}, not {kinds[0]}")
        if not kinds:
            raise ValueError("an index needs at least one shard of encodings")
        self.storage, self.vectors, self.hidden, self.vocabulary, self.origin = kinds[0]
        self.origin = origin or self.origin
        self.lengths, self._starts = np.concatenate(lengths), np.cumsum([0, *map(len, lengths)])

    @classmethod
    def write(
        cls, folder: str | os.PathLike[str], parts: Iterable[Representations], storage: str = "float32"
    ) -> PassageIndex:
        """Write an index of ``parts`` (each becomes a shard) into a new folder, whole or not at all, and open it.

        ``parts`` are those of another index (:meth:`parts`), or of texts in memory
        (:func:`~diffret_lib.retrieval.search.shards_of`).  A shard has a manifest with its files' SHA-256, and
        ``index.json`` the number of passages and the manifests' SHA-256.
        ValueError: an unknown storage, no parts, numbers that are not finite in it (float16 ends at 65,504), a folder
        that is there already, perhaps from another run that this one waited for.
        """
        folder = Path(folder)
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, not {storage!r}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")), atomic_path(folder) as temporary:
            if folder.exists():
                raise ValueError(f"{folder} is there already: open it with PassageIndex.read, or remove it")
            shards: dict[str, dict[str, int | str]] = {}
            for part in parts:
                shard = temporary / f"{len(shards):06d}"
                _save(part, shard, storage)
                seal(shard)
                shards[shard.name] = {"count": len(part), "sha256": file_sha256(shard / MANIFEST)}
            if not shards:
                raise ValueError(f"nothing to write to {folder}: there are no parts")
            write_text(temporary / ABOUT, json.dumps({"storage": storage, "shards": shards}, indent=1))
        return cls.read(folder)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> PassageIndex:
        """Open what :meth:`write` wrote, after a look at every byte of it; a ValueError names a damaged shard."""
        try:
            shards = json.loads(Path(folder, ABOUT).read_text(encoding="utf-8"))["shards"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} is no index: {type(error).__name__}: {error}") from None
        for name, shard in shards.items():
            where = Path(folder, name)
            if not is_sealed(where) or file_sha256(where / MANIFEST) != shard["sha256"]:
                raise ValueError(f"shard {where} is missing or damaged; write the index again from its encodings")
        return cls([Path(folder, name) for name in shards])

    def __len__(self) -> int:
        return len(self.lengths)

    def parts(self, side: str | None = None) -> Iterator[Representations]:
        """Give the shards one after another, with one ``side`` ("dense", "sparse") or both; dense as float32.

        A shard is mapped anew, so that its pages leave the process with it.
        """
        for folder, start, end in zip(self._folders, self._starts[:-1], self._starts[1:], strict=True):
            dense = _decoded(*_mapped(folder)) if side != "sparse" and self.vectors else None
            sparse = Representations.load(folder).sparse if side != "dense" and self.vocabulary else None
            yield Representations(dense, self.lengths[start:end], sparse, self.origin)

    def reconstruct(self, rows: Sequence[int] | np.ndarray) -> Representations:
        """Read the dense side of some passages (indices) into memory, as float32."""
        rows = np.asarray(rows, np.int64)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))
        gathered = []
        for which, first in enumerate(self._maps[0]):
            gathered.append(None if first is None else np.empty((len(rows), *first.shape[1:]), first.dtype))
            for i, (shard, place) in enumerate(places if first is not None else ()):
                gathered[-1][i] = self._maps[shard][which][place]
        return Representations(_decoded(*gathered), self.lengths[rows], None, self.origin)

    def search(
        self, queries: Representations, mode: str = "dense", top_k: int = 100, excluded: np.ndarray | None = None
    ) -> Ranking:
        """Rank shard by shard as :func:`~diffret_lib.retrieval.search.rank` does, with its modes, arguments, errors.

        In float32 the result is that of ``rank`` on all passages at once; only where a product of matrices rounds its
        sums by its shape, the last bit of a score can differ.  ``torch.set_float32_matmul_precision("medium")`` is
        faster on processors with AMX: the vectors are then rounded to bfloat16 (8 bits) in the products.
        """
        kinds = kinds_of(mode, queries.vectors, self.vectors)
        side = None if mode == "hybrid" else "sparse" if mode == "sparse" else "dense"
        return in_mode(mode, search_parts(queries, self.parts(side), kinds, top_k, excluded), top_k)


def _save(part: Representations, folder: Path, storage: str) -> None:
    arrays = {} if part.dense is None else _stored(part.dense, storage)
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"shard {folder.name} has vectors that are not finite as {storage}")
    Representations(None, part.lengths, part.sparse, part.origin).save(folder)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _stored(dense: np.ndarray, storage: str) -> dict[str, np.ndarray]:
    """Dense vectors as they are stored, by the names of their files; what is not finite stays so."""
    if storage == "float32":
        return {"dense": dense}
    with np.errstate(over="ignore", invalid="ignore"):
        if storage == "float16":
            return {"codes": dense.astype(np.float16)}
        scales = np.abs(dense).max(-1, initial=0) / np.float32(127)
        codes = np.rint(dense / np.where(scales > 0, scales, 1)[..., None]).astype(np.int8)
        return {"codes": codes, "scales": scales}


def _mapped(folder: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Dense vectors of a shard as they are stored, memory-mapped, and the scales of int8."""
    paths = [folder / f"{name}.npy" for name in ("dense", "codes", "scales")]
    # "c": pages of the file, never written; torch takes no array that is read-only
    dense, codes, scales = (np.load(path, mmap_mode="c") if path.exists() else None for path in paths)
    return codes if dense is None else dense, scales


def _decoded(stored: np.ndarray | None, scales: np.ndarray | None) -> np.ndarray | None:
    if stored is None or stored.dtype == np.float32:
        return stored
    dense = torch.from_numpy(stored).float()
    return (dense if scales is None else dense.mul_(torch.from_numpy(scales)[..., None])).numpy()


class FaissIndex:
    """Nearest neighbours among the vectors of ``passages`` by inner product, as a FAISS index finds them.

    ``over`` "mean" has one vector for each passage (single-vector search), "vectors" all that it has.  :meth:`build`
    makes one; ``faiss.write_index(found.index, path)`` keeps it, ``FaissIndex(faiss.read_index(path), passages, over)``
    opens it again, also with the same passages in another storage.  ValueError: an unknown ``over``, no dense vectors,
    or an index of another number of vectors or another size.
    """

    def __init__(self, index: faiss.Index, passages: PassageIndex, over: str = "mean") -> None:
        if over not in OVER:
            raise ValueError(f"over must be one of {', '.join(OVER)}, not {over!r}")
        self.index, self.passages, self.over, self._ends = index, passages, over, np.cumsum(passages.lengths)
        n = len(passages) if over == "mean" else int(passages.lengths.sum())
        if not n or (index.ntotal, index.d) != (n, passages.hidden):
            wrong = f"{index.ntotal} vectors of size {index.d} in FAISS, {n} of size {passages.hidden} ({over})"
            raise ValueError(f"the FAISS index is not one of these passages: {wrong}")

    @classmethod
    def build(
        cls, passages: PassageIndex, factory: str = "Flat", over: str = "mean", train_size: int = 1 << 16,
        seed: int = 0, **parameters: int,
    ) -> FaissIndex:  # fmt: skip
        """Index passages by FAISS, which keeps what it needs in memory.

        ``factory`` is a description as of ``faiss.index_factory``: "Flat" (exact), "IVF1024,PQ32", "HNSW32", ...;
        ``parameters`` those of the making, such as ``efConstruction``.  What must be trained sees the vectors of
        ``train_size`` passages at random.  ValueError: as of the class, or what FAISS says of a description, a
        parameter, or too few vectors.  With several threads HNSW is not the same every time.
        """
        rng, n = np.random.default_rng(seed), min(whole_number("train_size", train_size), len(passages))
        if not n or not passages.vectors:
            raise ValueError(f"nothing to index: {len(passages)} passages with {passages.vectors} dense vectors")
        try:
            index = faiss.index_factory(passages.hidden, factory, faiss.METRIC_INNER_PRODUCT)
            _set(index, parameters)
            if not index.is_trained:
                rows = np.sort(rng.choice(len(passages), n, replace=False))
                index.train(_flat(passages.reconstruct(rows), over))
            for part in passages.parts("dense"):
                index.add(_flat(part, over))
        except RuntimeError as error:
            said = str(error).rpartition(": ")[2].strip()
            raise ValueError(f"FAISS cannot make {factory!r} of {len(passages)} passages: {said}") from None
        return cls(index, passages, over)

    def search(self, queries: Representations, top_k: int = 100, **parameters: int) -> Ranking:
        """Rank passages by the dot product of the means of the vectors (``over`` "mean"), as FAISS finds them.

        ``parameters`` are FAISS's of the search, such as ``nprobe`` or ``efSearch``, and stay set.  A query with fewer
        passages has the index -1.  ValueError: another ``over``, an unknown parameter, sides that do not fit.
        """
        if self.over != "mean":
            raise ValueError(f"single-vector search needs an index over the mean, not over {self.over!r}")
        self._check(queries, top_k)
        scores, indices = self._nearest(mean_vectors(queries), top_k, parameters)
        query, place = np.nonzero(indices >= 0)
        return to_ranking([(query, indices[query, place], scores[query, place])], len(queries), scores.shape[1])

    def candidates(self, queries: Representations, count: int, **parameters: int) -> np.ndarray:
        """Find at most ``count`` passages for each query: int64 (n_queries, count or n), best first, -1 for none.

        Over "vectors", the ``count`` nearest vectors of each query vector are found; a passage has the sum of its best
        dot products, and 0 for a query vector to which it is not among the nearest.  Errors as of :meth:`search`.
        """
        if self.over == "mean":
            return self.search(queries, count, **parameters)[1]
        self._check(queries, count)
        n, (query, slot) = len(self.passages), np.nonzero(np.arange(queries.vectors) < queries.lengths[:, None])
        scores, found = self._nearest(queries.dense[query, slot], count, parameters)
        vector, place = np.nonzero(found >= 0)
        passage = np.searchsorted(self._ends, found[vector, place], side="right")
        # FAISS gives vectors best first: the first of a passage counts
        _, first = np.unique(vector * n + passage, return_index=True)
        pairs, where = np.unique(query[vector[first]] * n + passage[first], return_inverse=True)
        total = np.bincount(where, scores[vector, place][first].clip(min=0), len(pairs)).astype(np.float32)
        return to_ranking([(pairs // n, pairs % n, total)], len(queries), min(count, n))[1]

    def _check(self, queries: Representations, count: int) -> None:
        whole_number("top_k", count)
        held = np.empty((0, self.passages.vectors, self.passages.hidden), np.float32)
        check_sides(queries, Representations(held, np.zeros(0, int), None, self.passages.origin), ["mean"])

    def _nearest(self, vectors: np.ndarray, count: int, parameters: Mapping[str, int]) -> Ranking:
        _set(self.index, parameters)
        return self.index.search(np.ascontiguousarray(vectors), min(count, self.index.ntotal))


def _set(index: faiss.Index, parameters: Mapping[str, int]) -> None:
    for name, value in parameters.items():
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            raise ValueError(f"this FAISS index takes no parameter {name!r} of {value!r}") from None


def _flat(part: Representations, over: str) -> np.ndarray:
    """Vectors of a part as FAISS indexes them, float32 (vectors, H)."""
    if over == "mean":
        return np.ascontiguousarray(mean_vectors(part))
    return np.asarray(part.dense)[np.arange(part.vectors) < part.lengths[:, None]]


def two_stage_search(
    queries: Representations, index: FaissIndex, candidates: int = 1000, top_k: int = 100, **parameters: int
) -> Ranking:
    """Rank by exact dense scores the ``candidates`` that FAISS finds for each query (:meth:`FaissIndex.candidates`).

    With all passages as candidates this is the exact search, but for the rounding of sums.  Pages of passages that were
    read stay in the process until the system needs the memory.  ValueError: more is asked for than there are
    candidates, or as of :meth:`FaissIndex.search`.
    """
    if whole_number("top_k", top_k) > whole_number("candidates", candidates):
        raise ValueError(f"top_k ({top_k}) must be no more than the candidates ({candidates})")
    passages, found = index.passages, []
    (kind,) = kinds_of("dense", queries.vectors, passages.vectors)
    for i, row in enumerate(index.candidates(queries, candidates, **parameters)):
        own = np.sort(row[row >= 0])
        scores = scores_of(kind, queries[[i]], passages.vectors)(passages.reconstruct(own))[0].numpy()
        found.append((np.full(len(own), i), own, scores))
    return to_ranking(found, len(queries), min(top_k, len(passages)))
