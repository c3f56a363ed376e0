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


@dataclass(eq=False, repr=False)
class Representations:
    """Dense vectors and sparse weights of n texts; a ValueError where they are no such arrays, or do not fit.

    Attributes
    ----------
    dense : ndarray or memmap of float32, shape (n, K, H), or None
        Up to K vectors a text; the rows after its ``lengths`` are zero.
    lengths : ndarray of int, shape (n,)
        Vectors that each text has.
    sparse : csr_matrix of float32, shape (n, V), or None
    origin : Origin, optional
        With it on both sides, a search refuses sides that do not belong together.
    """

    dense: np.ndarray | None
    lengths: np.ndarray
    sparse: sp.csr_matrix | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        kinds = {"dense": np.ndarray | None, "lengths": np.ndarray, "sparse": sp.sparray | sp.spmatrix | None}
        for name, kind in kinds.items():
            if not isinstance(given := getattr(self, name), kind):
                raise ValueError(f"{name} must be an array, {'sparse' if name == 'sparse' else 'dense'}: {given!r:.80}")
        if self.dense is not None and not np.issubdtype(self.dense.dtype, np.number):
            raise ValueError(f"dense must hold numbers, not {self.dense.dtype}")
        if self.lengths.ndim != 1 or not np.issubdtype(self.lengths.dtype, np.integer):
            raise ValueError(f"lengths must be integers of shape (n,), not {self.lengths.dtype} {self.lengths.shape}")
        n = len(self)
        if self.dense is not None:
            if self.dense.ndim != 3 or len(self.dense) != n:
                raise ValueError(f"dense must have the shape ({n}, K, H), not {self.dense.shape}")
            k = self.vectors
            if n and not 0 <= self.lengths.min() <= self.lengths.max() <= k:
                raise ValueError(f"lengths must be in 0..{k}; found {self.lengths.min()}..{self.lengths.max()}")
            self.dense = self.dense.astype(np.float32, copy=False)
        if self.sparse is not None:
            if self.sparse.shape[0] != n:
                raise ValueError(f"sparse must have {n} rows, not {self.sparse.shape[0]}")
            self.sparse = self.sparse.tocsr().astype(np.float32, copy=False)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def vectors(self) -> int:
        """K, the vectors that a text has at most; 0 without a dense side."""
        return 0 if self.dense is None else self.dense.shape[1]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Representations:
        """Some of the texts (a slice, indices or a boolean mask); IndexError: there is no such text."""
        try:
            lengths = self.lengths[rows]
        except IndexError as error:
            raise IndexError(f"texts are numbered 0..{len(self) - 1} here: {error}") from None
        dense, sparse = (None if side is None else side[rows] for side in (self.dense, self.sparse))
        return Representations(dense, lengths, sparse, self.origin)

    @staticmethod
    def concatenate(parts: Sequence[Representations]) -> Representations:
        """Join parts in memory, with the origin of the first; a ValueError where there are none, or shapes differ."""
        sides = [(p.dense, p.sparse) for p in parts]
        shapes = {(d is not None and d.shape[1:], s is not None and s.shape[1]) for d, s in sides}
        if len(shapes) != 1:
            raise ValueError(f"parts of one K, H and V are needed, not {sorted(map(str, shapes)) or 'none'}")
        if len(parts) == 1:
            return parts[0]
        dense = sparse = None
        if any(part.dense is not None for part in parts):
            dense = np.concatenate([part.dense for part in parts])
        if any(part.sparse is not None for part in parts):
            sparse = sp.vstack([part.sparse for part in parts], format="csr")
        return Representations(dense, np.concatenate([part.lengths for part in parts]), sparse, parts[0].origin)

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
        """Memory-map what :meth:`save` wrote."""
        about = json.loads(Path(folder, "about.json").read_text(encoding="utf-8"))
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in Path(folder).glob("*.npy")}
        sparse, lengths = None, np.array(arrays["lengths"])
        if about["V"] is not False:
            sparse = sp.csr_matrix((len(lengths), about["V"]), dtype=np.float32)
            # set, not given: the constructor would read all of it to check it
            sparse.data, sparse.indices, sparse.indptr = arrays["data"], arrays["indices"], np.array(arrays["indptr"])
            sparse.has_canonical_format = True
        return cls(arrays.get("dense"), lengths, sparse, about["origin"] and Origin(**about["origin"]))
