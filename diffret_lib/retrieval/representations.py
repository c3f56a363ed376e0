"""Representations of texts: dense vectors and sparse weights, in memory or memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from diffret_lib.models.prompts import Side


@dataclass(frozen=True)
class Origin:
    """Where representations come from; ``space`` identifies what two sides must share (weights, vocabulary)."""

    system: str
    side: Side
    space: str


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
    origin : Origin, optional
        With it on both sides, a search refuses sides that do not belong together.

    Raises
    ------
    ValueError
        When the shapes do not fit, or a length is not in 0..K.
    """

    dense: np.ndarray | None
    lengths: np.ndarray
    sparse: sp.csr_matrix | None = None
    origin: Origin | None = None

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
        dense, sparse = (getattr(side, "shape", None) for side in (self.dense, self.sparse))
        return f"Representations(n={len(self)}, dense={dense}, sparse={sparse})"

    @property
    def vectors(self) -> int:
        """K, the vectors that a text has at most; 0 without a dense side."""
        return 0 if self.dense is None else self.dense.shape[1]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Representations:
        """Some of the texts (a slice, indices or a boolean mask)."""
        if isinstance(rows, int | np.integer):
            raise TypeError("take a slice or a list of rows; a single text is representations[[i]]")
        if not isinstance(rows, slice):
            rows = np.asarray(rows) if len(rows) else np.zeros(0, np.int64)
        dense, sparse = (None if side is None else side[rows] for side in (self.dense, self.sparse))
        return Representations(dense, self.lengths[rows], sparse, self.origin)

    @staticmethod
    def concatenate(parts: Sequence[Representations]) -> Representations:
        """Join parts, in memory; where K differs, the narrower are filled up with zero rows.

        Raises
        ------
        ValueError
            For no parts, or parts of which some lack a side or have another H or V.
        """
        if not parts:
            raise ValueError("nothing to concatenate")
        for side in ("dense", "sparse"):
            widths = {None if (of := getattr(part, side)) is None else of.shape[-1] for part in parts}
            if len(widths) > 1:
                raise ValueError(f"the parts have {side} sides of different widths: {', '.join(map(str, widths))}")
        if len(parts) == 1:
            return parts[0]
        dense = sparse = None
        if parts[0].dense is not None:
            shape = sum(map(len, parts)), max(part.vectors for part in parts), parts[0].dense.shape[2]
            dense, start = np.zeros(shape, np.float32), 0
            for part in parts:
                dense[start : start + len(part), : part.vectors] = part.dense
                start += len(part)
        if parts[0].sparse is not None:
            sparse = sp.csr_matrix(sp.vstack([part.sparse for part in parts], format="csr"))
        origins = {part.origin for part in parts}
        lengths = np.concatenate([part.lengths for part in parts])
        return Representations(dense, lengths, sparse, origins.pop() if len(origins) == 1 else None)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``lengths.npy``, ``dense.npy``, the CSR parts of the sparse side and ``about.json`` into a folder."""
        os.makedirs(folder, exist_ok=True)
        arrays = {"lengths": self.lengths} | ({} if self.dense is None else {"dense": self.dense})
        if self.sparse is not None:
            matrix = self.sparse.sorted_indices()
            matrix.sum_duplicates()
            arrays |= {name: getattr(matrix, name) for name in ("data", "indices", "indptr")}
        for name, array in arrays.items():
            np.save(Path(folder, f"{name}.npy"), array)
        about = {"V": self.sparse is not None and self.sparse.shape[1], "origin": self.origin and asdict(self.origin)}
        Path(folder, "about.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Representations:
        """Memory-map what :meth:`save` wrote.

        Raises
        ------
        ValueError
            When the folder holds no representations, or files that do not fit one another.
        """
        try:
            about = json.loads(Path(folder, "about.json").read_text(encoding="utf-8"))
            arrays = {path.stem: np.load(path, mmap_mode="r") for path in Path(folder).glob("*.npy")}
            sparse, lengths = None, np.array(arrays["lengths"])
            if about["V"] is not False:
                sparse = sp.csr_matrix((len(lengths), about["V"]), dtype=np.float32)
                # set, not given: the constructor would read all of it to check it
                sparse.data, sparse.indices = arrays["data"], arrays["indices"]
                sparse.indptr = np.array(arrays["indptr"])
                sparse.has_canonical_format = True
                if not len(sparse.data) == len(sparse.indices) == sparse.indptr[-1]:
                    raise ValueError("the sparse arrays do not fit")
            return cls(arrays.get("dense"), lengths, sparse, about["origin"] and Origin(**about["origin"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no whole representations ({error}); encode again") from error
