"""Representations of texts: dense vectors and sparse weights, in memory or streamed to memory-mapped shards.

A folder of shards holds::

    manifest.json            what the caller says it is, and once finished n, K, H, V, dtype and the shards
    0000000000/              one folder per shard, named after its first text
        dense.npy            float32 [rows, K, H]
        lengths.npy          int64 [rows]
        data.npy, indices.npy, indptr.npy    the CSR parts of the sparse rows
        shard.json           rows, K, H, V; written last, within an atomic rename of the folder
    dense.npy, lengths.npy, data.npy, ...    the whole, after finish()

A shard is there whole or not at all, so that an interrupted encoding goes on after the last whole one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.lib.format import open_memmap

from diffret_lib.cache import atomic_path

#: Part of every manifest: raise it when the form of the files changes.
FORMAT = 1
_MANIFEST = "manifest.json"
_SHARD = re.compile(r"\d{10}")


@dataclass(frozen=True, eq=False)
class Representations:
    """Dense vectors and sparse weights of n texts.

    Parameters
    ----------
    dense : ndarray or memmap of float32, shape (n, K, H), or None
        Up to K vectors a text; the rows after its ``lengths`` are zero.
    lengths : ndarray of int, shape (n,)
        Vectors that each text has.
    sparse : csr_matrix of float32, shape (n, V), or None

    Raises
    ------
    ValueError
        When the shapes do not fit one another, or a length is not in 0..K.
    """

    dense: np.ndarray | None
    lengths: np.ndarray
    sparse: sp.csr_matrix | None = None

    def __post_init__(self) -> None:
        lengths = np.asarray(self.lengths)
        if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
            raise ValueError(f"lengths must be integers of shape (n,), not {lengths.dtype} {lengths.shape}")
        object.__setattr__(self, "lengths", lengths)
        n = len(lengths)
        if self.dense is not None:
            if self.dense.ndim != 3 or len(self.dense) != n:
                raise ValueError(f"dense must have the shape ({n}, K, H), not {self.dense.shape}")
            if self.dense.dtype != np.float32:
                object.__setattr__(self, "dense", self.dense.astype(np.float32))
            if n and not (lengths.min() >= 0 and lengths.max() <= self.dense.shape[1]):
                raise ValueError(f"lengths must be in 0..{self.dense.shape[1]}; found {lengths.min()}..{lengths.max()}")
        if self.sparse is not None:
            if self.sparse.shape[0] != n:
                raise ValueError(f"sparse must have {n} rows, not {self.sparse.shape[0]}")
            if self.sparse.format != "csr" or self.sparse.dtype != np.float32:
                object.__setattr__(self, "sparse", sp.csr_matrix(self.sparse, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        dense = None if self.dense is None else "x".join(map(str, self.dense.shape))
        sparse = None if self.sparse is None else f"{self.sparse.shape[0]}x{self.sparse.shape[1]}, {self.sparse.nnz} set"
        return f"Representations(n={len(self)}, dense={dense}, sparse={sparse})"

    @property
    def vectors(self) -> int:
        """K, the vectors that a text has at most; 0 without a dense side."""
        return 0 if self.dense is None else self.dense.shape[1]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Representations:
        """Some of the texts (a slice, indices or a boolean mask)."""
        if isinstance(rows, int | np.integer):
            raise TypeError("take a slice or a list of rows; a single text is representations[[i]]")
        rows = rows if isinstance(rows, slice) else np.asarray(rows)
        if isinstance(rows, np.ndarray) and not len(rows):
            rows = rows.astype(np.int64)
        return Representations(
            None if self.dense is None else self.dense[rows],
            self.lengths[rows],
            None if self.sparse is None else self.sparse[rows],
        )

    @staticmethod
    def concatenate(parts: Sequence[Representations]) -> Representations:
        """One after another; where K differs, the narrower are filled up with zero rows.

        Raises
        ------
        ValueError
            For no parts, or parts of which some lack a side or have another H or V.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("nothing to concatenate")
        dense = sparse = None
        if _all_or_none([p.dense is not None for p in parts], "dense"):
            k, sizes = max(p.vectors for p in parts), {p.dense.shape[2] for p in parts}
            if len(sizes) > 1:
                raise ValueError(f"dense vectors of different sizes: {sorted(sizes)}")
            dense = np.zeros((sum(map(len, parts)), k, sizes.pop()), np.float32)
            start = 0
            for p in parts:
                dense[start : start + len(p), : p.vectors] = p.dense
                start += len(p)
        if _all_or_none([p.sparse is not None for p in parts], "sparse"):
            widths = {p.sparse.shape[1] for p in parts}
            if len(widths) > 1:
                raise ValueError(f"sparse sides of different vocabularies: {sorted(widths)}")
            sparse = sp.csr_matrix(sp.vstack([p.sparse for p in parts], format="csr"))
        return Representations(dense, np.concatenate([p.lengths for p in parts]), sparse)

    def save(self, folder: str | os.PathLike[str], manifest: Mapping[str, Any] | None = None) -> None:
        """Write to a folder that :meth:`load` reads; one that is there is replaced if its manifest fits."""
        writer = ShardWriter(folder, {"count": len(self), **(manifest or {})})
        if not writer.finished and 0 not in writer.done:
            writer.append(0, self.dense, self.lengths, self.sparse)
        writer.finish()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Representations:
        """Memory-map what a finished :class:`ShardWriter` left.

        Raises
        ------
        FileNotFoundError
            When there is no manifest.
        ValueError
            When the encoding was not finished, or a file does not have the size that the manifest says.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        layout = manifest.get("layout")
        if layout is None:
            raise ValueError(f"{folder} is an encoding that was not finished; encode into it again to go on")
        n, k, h, v = (layout[name] for name in ("n", "K", "H", "V"))
        dense = sparse = None
        try:
            if k is not None:
                dense = _open(folder / "dense.npy", (n, k, h))
            lengths = np.array(_open(folder / "lengths.npy", (n,)))
            if v is not None:
                indptr = np.array(_open(folder / "indptr.npy", (n + 1,)))
                data, indices = (_open(folder / f"{name}.npy", (int(indptr[-1]),)) for name in ("data", "indices"))
                sparse = sp.csr_matrix((n, v), dtype=np.float32)
                # set, not given: the constructor would read all of it to check it
                sparse.data, sparse.indices, sparse.indptr = data, indices, indptr
                sparse.has_canonical_format = True
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is damaged ({error}); remove it and encode again") from error
        return cls(dense, lengths, sparse)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder of representations."""
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no representations: it has no {_MANIFEST}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove {folder} and encode again") from error


class ShardWriter:
    """Stream representations to a folder, shard by shard; an interrupted writing goes on where it was.

    Parameters
    ----------
    folder : path
        Made if it is not there.
    manifest : dict
        What identifies the content, as JSON.  ``count``, if given, is the number of texts.

    Attributes
    ----------
    done : dict of int to int
        First text to number of texts of the shards that are there.
    finished : bool

    Raises
    ------
    ValueError
        When the folder holds something else: another manifest.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads(json.dumps(dict(manifest), sort_keys=True))
        self._layout: dict[str, Any] | None = None
        self._shards: dict[int, dict[str, Any]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / _MANIFEST).exists():
            found = read_manifest(self.folder)
            if found.get("format") != FORMAT or found.get("content") != self.manifest:
                raise ValueError(
                    f"{self.folder} holds other representations than those to be written.\n"
                    f"there: {json.dumps(found.get('content'), sort_keys=True)} (format {found.get('format')})\n"
                    f"here:  {json.dumps(self.manifest, sort_keys=True)} (format {FORMAT})\n"
                    "Name another folder, or remove this one."
                )
            self._layout = found.get("layout")
        elif any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no representations; name another folder")
        else:
            self._write_manifest()
        if self._layout is not None:
            self._shards = {start: {"rows": rows} for start, rows in self._layout["shards"]}
        else:
            for path in sorted(self.folder.iterdir()):
                if _SHARD.fullmatch(path.name):
                    self._shards[int(path.name)] = json.loads((path / "shard.json").read_text(encoding="utf-8"))

    @property
    def done(self) -> dict[int, int]:
        return {start: shard["rows"] for start, shard in sorted(self._shards.items())}

    @property
    def finished(self) -> bool:
        return self._layout is not None

    def _write_manifest(self) -> None:
        content = {"format": FORMAT, "content": self.manifest}
        if self._layout is not None:
            content["layout"] = self._layout
        with atomic_path(self.folder / _MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def append(
        self, start: int, dense: np.ndarray | None, lengths: np.ndarray, sparse: sp.csr_matrix | None = None
    ) -> None:
        """Write the shard of the texts ``start`` to ``start + len(lengths)``.

        Parameters
        ----------
        dense : ndarray of float32, shape (rows, K, H), or None
            K may differ between shards.
        lengths : ndarray of int, shape (rows,)
        sparse : csr_matrix of float32, shape (rows, V), or None

        Raises
        ------
        ValueError
            When it overlaps a shard that is there, or has another H or V than the others.
        RuntimeError
            After :meth:`finish`.
        """
        if self.finished:
            raise RuntimeError(f"{self.folder} is finished; there is nothing to append")
        part = Representations(dense, lengths, sparse)
        rows = len(part)
        if start < 0:
            raise ValueError(f"a shard starts at 0 or later, not at {start}")
        for other, count in self.done.items():
            if start < other + count and other < start + rows:
                raise ValueError(f"shard {start}..{start + rows} overlaps shard {other}..{other + count}")
        shard = {
            "rows": rows,
            "K": None if part.dense is None else part.dense.shape[1],
            "H": None if part.dense is None else part.dense.shape[2],
            "V": None if part.sparse is None else part.sparse.shape[1],
        }
        for other, known in self._shards.items():
            if (known["H"], known["V"]) != (shard["H"], shard["V"]):
                raise ValueError(
                    f"shard {start} has H={shard['H']}, V={shard['V']}; shard {other} has H={known['H']}, V={known['V']}"
                )
        with atomic_path(self.folder / f"{start:010d}") as temporary:
            temporary.mkdir()
            np.save(temporary / "lengths.npy", part.lengths.astype(np.int64))
            if part.dense is not None:
                np.save(temporary / "dense.npy", part.dense)
            if part.sparse is not None:
                matrix = part.sparse.sorted_indices()
                matrix.sum_duplicates()
                np.save(temporary / "data.npy", matrix.data)
                np.save(temporary / "indices.npy", matrix.indices.astype(np.int32))
                np.save(temporary / "indptr.npy", matrix.indptr.astype(np.int64))
            (temporary / "shard.json").write_text(json.dumps(shard), encoding="utf-8")
        self._shards[start] = shard

    def finish(self) -> None:
        """Join the shards to one file a part, and say in the manifest that all is there.

        Memory stays at one shard.  Doing it again changes nothing.

        Raises
        ------
        ValueError
            When texts are missing between the shards or after them.
        """
        if self.finished:
            return
        n = 0
        for start, rows in self.done.items():
            if start != n:
                raise ValueError(f"{self.folder}: the texts {n}..{start} are missing")
            n += rows
        count = self.manifest.get("count", n)
        if n != count:
            raise ValueError(f"{self.folder}: {n} texts were written, and there should be {count}")
        shards = [self._shards[start] for start in self.done]
        h, v = (shards[0]["H"], shards[0]["V"]) if shards else (None, None)
        k = None if h is None else max(shard["K"] for shard in shards)
        self._join(n, k, h, v)
        self._layout = {
            "n": n, "K": k, "H": h, "V": v, "dtype": "float32", "shards": [[s, r] for s, r in self.done.items()],
        }  # fmt: skip
        self._write_manifest()
        for start in self.done:
            shutil.rmtree(self.folder / f"{start:010d}", ignore_errors=True)

    def _join(self, n: int, k: int | None, h: int | None, v: int | None) -> None:
        parts = {start: self.folder / f"{start:010d}" for start in self.done}
        self._join_one("lengths", np.int64, (n,), parts)
        if k is not None:
            self._join_one("dense", np.float32, (n, k, h), parts)
        if v is not None:
            row, entry, at, bounds = 1, 0, {}, np.zeros(n + 1, np.int64)
            for path in parts.values():
                indptr = np.load(path / "indptr.npy")
                bounds[row : row + len(indptr) - 1] = entry + indptr[1:]
                if indptr[-1]:
                    at[entry] = path
                row, entry = row + len(indptr) - 1, entry + int(indptr[-1])
            with atomic_path(self.folder / "indptr.npy") as temporary:
                # of the type of the indices where it fits: scipy would copy these to the wider one
                np.save(temporary, bounds.astype(np.int32) if entry <= np.iinfo(np.int32).max else bounds)
            self._join_one("data", np.float32, (entry,), at)
            self._join_one("indices", np.int32, (entry,), at)

    def _join_one(self, name: str, dtype: type, shape: tuple[int, ...], parts: dict[int, Path]) -> None:
        with atomic_path(self.folder / f"{name}.npy") as temporary:
            if not np.prod(shape):
                np.save(temporary, np.zeros(shape, dtype))
                return
            whole = open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
            for start, path in parts.items():
                part = np.load(path / f"{name}.npy", mmap_mode="r")
                rows = whole[start : start + len(part)]
                if part.ndim == 3:
                    rows = rows[:, : part.shape[1]]
                rows[...] = part
            whole.flush()
            del whole


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    # an empty file cannot be mapped
    array = np.load(path, mmap_mode="r" if np.prod(shape) else None)
    if array.shape != shape:
        raise ValueError(f"{path.name} has the shape {array.shape}, and the manifest says {shape}")
    return array


def _all_or_none(present: Sequence[bool], side: str) -> bool:
    if any(present) != all(present):
        raise ValueError(f"some parts have a {side} side and some do not")
    return all(present)
