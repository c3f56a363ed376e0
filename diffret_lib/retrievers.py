"""The compared systems, with one interface: encode queries, encode passages, search.

>>> retriever = DiffRetriever("smollm2-135m-diffusion", k_query=4, k_passage=16)     # doctest: +SKIP
>>> passages = retriever.encode_passages(["A heap is a tree.", "Tea is a drink."])   # doctest: +SKIP
>>> queries = retriever.encode_queries(["priority queue"])                           # doctest: +SKIP
>>> retriever.search(queries, passages, mode="hybrid", top_k=10)                     # doctest: +SKIP
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import bm25s
import numpy as np
import ranx
import scipy.sparse as sp
import Stemmer
import torch
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from tqdm.auto import tqdm

from diffret_lib import scoring
from diffret_lib.backbones import LoadedBackbone, load_backbone, with_adapter
from diffret_lib.cache import fingerprint
from diffret_lib.prompts import Task
from diffret_lib.readers import LastToken, MaskedPositions, MeanOfTokens, NextTokens, Reader
from diffret_lib.representations import Representations, ShardWriter

#: Texts of one shard: what is held in memory, and what an interrupted encoding loses at most.
SHARD_TEXTS = 1024
#: Part of every fingerprint: raise it when the same settings would give other representations.
ENCODING_VERSION = 1


class Retriever:
    """A retriever on a language model: a reader, batched by a token budget.

    Parameters
    ----------
    backbone : str, Backbone or LoadedBackbone
    max_query_tokens, max_passage_tokens : int
        Tokens of the text that are read.
    batch_tokens : int
        Padded tokens of one forward pass.
    dtype : {"float32", "bfloat16"}
        When the backbone is yet to load.
    **options
        Of the reader.
    """

    name: ClassVar[str]
    family: ClassVar[str | None] = None
    modes: ClassVar[tuple[str, ...]] = ("dense", "sparse", "hybrid")
    reader: Reader

    def __init__(
        self,
        backbone: Any,
        *,
        max_query_tokens: int = 64,
        max_passage_tokens: int = 256,
        batch_tokens: int = 4096,
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, LoadedBackbone) else load_backbone(backbone, dtype=dtype)
        if self.family is not None and self.backbone.spec.family != self.family:
            raise ValueError(
                f"{self.name} needs a backbone of the family {self.family!r}; "
                f"{self.backbone.spec.name} is {self.backbone.spec.family!r}"
            )
        self.batch_tokens = batch_tokens
        limits = {"max_query_tokens": max_query_tokens, "max_passage_tokens": max_passage_tokens}
        self._options = limits | options
        self.reader = self.make_reader(**self._options).eval()

    def make_reader(self, **options: Any) -> Reader:
        raise NotImplementedError

    def with_adapter(self, folder: str | os.PathLike[str]) -> Self:
        """This retriever with a PEFT adapter, such as a fine-tuned one, merged into a copy of its backbone.

        Raises
        ------
        BackboneError
            When the folder holds no adapter, or one that does not fit.
        """
        other = copy.copy(self)
        other.backbone = with_adapter(self.backbone, folder)
        other.reader = other.make_reader(**other._options).eval()
        return other

    def settings(self, task: Task) -> dict[str, Any]:
        """What the representations of one side depend on, besides the texts and the backbone."""
        options = self.reader.get_config_dict()
        side, other = ("query", "passage") if task == "query" else ("passage", "query")
        options = {k: v for k, v in options.items() if other not in k}
        return {"version": ENCODING_VERSION, "reader": type(self.reader).__name__, "side": side, **options}

    def fingerprint(self, task: Task) -> str:
        """Identifies this side's encodings in a cache."""
        return fingerprint(self.settings(task), self.backbone.fingerprint)

    def encode_queries(self, texts: Sequence[str], output: Path | None = None, progress: bool = True) -> Representations:
        """Representations of queries; see :meth:`encode`."""
        return self.encode(texts, "query", output, progress)

    def encode_passages(self, texts: Sequence[str], output: Path | None = None, progress: bool = True) -> Representations:
        """Representations of passages; see :meth:`encode`."""
        return self.encode(texts, "document", output, progress)

    def encode(
        self, texts: Sequence[str], task: Task, output: Path | None = None, progress: bool = True
    ) -> Representations:
        """Dense vectors and sparse weights of texts, both from one forward pass.

        Parameters
        ----------
        texts : sequence of str
            Any text, the empty one too.  Equal texts are encoded once per shard.
        task : {"query", "document"}
        output : Path, optional
            A folder to which shards are written, and from which an interrupted encoding goes on; the result
            is memory-mapped.  Without it all is held in memory.
        progress : bool

        Returns
        -------
        Representations
            ``dense`` float32 [n, K, H], ``lengths`` [n], ``sparse`` CSR float32 [n, V] or None.
        """
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts must be strings; text {i} is a {type(text).__name__}")
        shards = [(s, min(s + SHARD_TEXTS, len(texts))) for s in range(0, len(texts), SHARD_TEXTS)]
        bar = tqdm(total=len(texts), desc=f"{self.name}: {'queries' if task == 'query' else 'passages'}",
                   disable=not progress, unit="text")  # fmt: skip
        if output is None:
            with bar:
                parts = [self._encode_shard(texts[a:b], task, bar) for a, b in shards]
            return Representations.concatenate(parts) if parts else self._empty()
        manifest = {"fingerprint": fingerprint(self.fingerprint(task), texts), "count": len(texts)}
        writer = ShardWriter(output, manifest)
        with bar:
            for start, end in shards:
                if start in writer.done:
                    bar.update(end - start)
                    continue
                part = self._encode_shard(texts[start:end], task, bar)
                writer.append(start, part.dense, part.lengths, part.sparse)
        writer.finish()
        return Representations.load(output)

    def _empty(self) -> Representations:
        sparse = sp.csr_matrix((0, self.reader.vocab_size), dtype=np.float32) if self.reader.has_sparse else None
        return Representations(np.zeros((0, 1, self.reader.hidden_size), np.float32), np.zeros(0, np.int64), sparse)

    def _encode_shard(self, texts: list[str], task: Task, bar: tqdm) -> Representations:
        unique = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(unique)}
        dense: list[np.ndarray] = [None] * len(unique)
        lengths = np.zeros(len(unique), np.int64)
        sparse: list[tuple[np.ndarray, np.ndarray]] = [None] * len(unique)
        reader = self.reader
        for batch in self._batches(unique, task):
            with torch.inference_mode():
                out = reader(self.features([unique[i] for i in batch], task))
            vectors, valid = out["token_embeddings"].cpu().numpy(), out["attention_mask"].bool().cpu().numpy()
            weights = sp.csr_matrix(out["sentence_embedding"].cpu().numpy()) if reader.has_sparse else None
            for row, i in enumerate(batch):
                kept = vectors[row, valid[row]]
                dense[i], lengths[i] = kept, len(kept)
                if weights is not None:
                    span = slice(*weights.indptr[row : row + 2])
                    sparse[i] = weights.indices[span], weights.data[span]
            bar.update(len(batch))
        bar.update(len(texts) - len(unique))
        block = np.zeros((len(unique), max(lengths.max(), self._vectors(task)), reader.hidden_size), np.float32)
        for i, vectors in enumerate(dense):
            block[i, : len(vectors)] = vectors
        matrix = None
        if reader.has_sparse:
            indptr = np.cumsum([0, *(len(ids) for ids, _ in sparse)])
            ids, data = (np.concatenate(part) for part in zip(*sparse, strict=True))
            matrix = sp.csr_matrix((data, ids, indptr), shape=(len(unique), reader.vocab_size))
        take = np.array([place[text] for text in texts])
        return Representations(block[take], lengths[take], None if matrix is None else matrix[take])

    def features(self, texts: list[str], task: Task) -> dict[str, Any]:
        """What the reader makes of texts before its forward pass, on the backbone's device."""
        features, device = self.reader.preprocess(texts, task=task), self.backbone.device
        return {k: v.to(device) if torch.is_tensor(v) else v for k, v in features.items()}

    def _vectors(self, task: Task) -> int:
        """Vectors a text has at most."""
        return 1

    def _batches(self, texts: list[str], task: Task) -> list[list[int]]:
        """Indices of the texts, longest first, as many to a batch as the token budget takes."""
        ids, _ = self.reader.text_ids(texts, task)
        empty = self.reader.preprocess([""], task=task)
        overhead = empty["input_ids"].shape[1] + len(empty.get("left_ids", ())) + self._vectors(task) - 1
        order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
        batches: list[list[int]] = []
        size = 0
        for i in order:
            if not batches or len(batches[-1]) >= size:
                size = max(1, self.batch_tokens // (len(ids[i]) + overhead))
                batches.append([])
            batches[-1].append(i)
        return batches

    def search(
        self,
        queries: Representations,
        passages: Representations,
        mode: str = "hybrid",
        top_k: int = 100,
        query_ids: Sequence[str] | None = None,
        passage_ids: Sequence[str] | None = None,
    ) -> ranx.Run:
        """Retrieve; see :func:`diffret_lib.scoring.search`."""
        if mode not in self.modes:
            raise ValueError(f"{self.name} has the modes {', '.join(self.modes)}; not {mode!r}")
        return scoring.search(queries, passages, mode, top_k, query_ids=query_ids, passage_ids=passage_ids)

    def multi_vector_encoder(self) -> MultiVectorEncoder:
        """The dense side as sentence-transformers, its evaluators and mteb take it."""
        return MultiVectorEncoder(modules=[self.reader], device=str(self.backbone.device))

    def sparse_encoder(self) -> SparseEncoder:
        """The sparse side as sentence-transformers, its evaluators and mteb take it."""
        if not self.reader.has_sparse:
            raise ValueError(f"{self.name} has no sparse side")
        return SparseEncoder(modules=[self.reader], device=str(self.backbone.device), similarity_fn_name="dot")


class DiffRetriever(Retriever):
    """K masked positions of a diffusion LM, read after one forward pass (arXiv 2605.07210).

    Parameters
    ----------
    k_query, k_passage : int
        Number of masks (Kq, Kp).
    shifted : bool, optional
        Read token i at position i - 1 or at i; what the backbone's family does by default.
    """

    name = "DiffRetriever"
    family = "diffusion"

    def __init__(
        self,
        backbone: Any = "smollm2-135m-diffusion",
        *,
        k_query: int = 1,
        k_passage: int = 1,
        shifted: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, k_query=k_query, k_passage=k_passage, shifted=shifted, **options)

    def make_reader(self, *, shifted: bool | None, **options: Any) -> Reader:
        shift = self.backbone.spec.prediction_shift if shifted is None else shifted
        return MaskedPositions(
            self.backbone.model,
            self.backbone.tokenizer,
            mask_id=self.backbone.mask_id,
            prediction_shift=shift,
            **options,
        )

    def _vectors(self, task: Task) -> int:
        return self.reader.mask_count(task)


class PromptReps(Retriever):
    """The same prompt on an autoregressive LM (arXiv 2404.18424).

    Parameters
    ----------
    max_new_tokens : int
        0 for a single vector; N decodes up to N tokens, a vector each besides the first.
    """

    name = "PromptReps"
    family = "autoregressive"

    def __init__(self, backbone: Any = "smollm2-135m-instruct", *, max_new_tokens: int = 0, **options: Any) -> None:
        super().__init__(backbone, max_new_tokens=max_new_tokens, **options)

    def make_reader(self, **options: Any) -> Reader:
        return NextTokens(self.backbone.model, self.backbone.tokenizer, **options)

    def _vectors(self, task: Task) -> int:
        return 1 + self.reader.max_new_tokens


class _MeanPooled(Retriever):
    modes = ("dense",)

    def make_reader(self, **options: Any) -> Reader:
        return MeanOfTokens(self.backbone.model, self.backbone.tokenizer, **options)


class DiffEmbed(_MeanPooled):
    """Mean of a diffusion LM's last hidden states over the raw text (arXiv 2505.15045)."""

    name = "DiffEmbed"
    family = "diffusion"

    def __init__(self, backbone: Any = "smollm2-135m-diffusion", **options: Any) -> None:
        super().__init__(backbone, **options)


class MeanPooledAR(_MeanPooled):
    """Mean of an autoregressive LM's last hidden states, for contrast with :class:`DiffEmbed`."""

    name = "MeanPooledAR"
    family = "autoregressive"

    def __init__(self, backbone: Any = "smollm2-135m-instruct", **options: Any) -> None:
        super().__init__(backbone, **options)


class RepLLaMA(Retriever):
    """The end-of-sequence token of an autoregressive LM (arXiv 2310.08319); means little before it is fine-tuned."""

    name = "RepLLaMA"
    family = "autoregressive"
    modes = ("dense",)

    def __init__(self, backbone: Any = "smollm2-135m-instruct", **options: Any) -> None:
        super().__init__(backbone, **options)

    def make_reader(self, **options: Any) -> Reader:
        return LastToken(self.backbone.model, self.backbone.tokenizer, **options)


class BM25:
    """Lexical baseline from :mod:`bm25s` (Lucene's variant), English stemming and stop words, whole passages.

    A passage is the row of its BM25 term scores, a query its term counts; their product is the BM25 score.
    """

    name = "BM25"
    family = None
    modes = ("sparse",)

    def __init__(self, k1: float = 1.5, b: float = 0.75) -> None:
        self.k1, self.b = k1, b
        self._vocabulary: dict[str, int] | None = None

    def fingerprint(self, task: Task) -> str:
        """As :meth:`Retriever.fingerprint`."""
        return fingerprint(ENCODING_VERSION, self.name, self.k1, self.b, bm25s.__version__, Stemmer.version())

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(
            list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
        )

    def encode_passages(self, texts: Sequence[str], output: Path | None = None, progress: bool = True) -> Representations:
        """Index the passages: CSR float32 [n, V], V the terms of these passages."""
        tokens = self._tokenize(texts)
        self._vocabulary = {t: i for i, t in enumerate(sorted({t for row in tokens for t in row}))}
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        if not self._vocabulary:
            return self._representations(sp.csr_matrix((len(tokens), 1), dtype=np.float32))
        ids = [[self._vocabulary[t] for t in row] for row in tokens]
        width = len(self._vocabulary)
        index.index((ids, dict(self._vocabulary)), create_empty_token=False, show_progress=False)
        scores = (index.scores[name] for name in ("data", "indices", "indptr"))
        matrix = sp.csc_matrix(tuple(scores), shape=(len(tokens), width))
        return self._representations(matrix.tocsr().astype(np.float32))

    def encode_queries(self, texts: Sequence[str], output: Path | None = None, progress: bool = True) -> Representations:
        """Term counts over the indexed passages' vocabulary."""
        if self._vocabulary is None:
            raise RuntimeError("encode the passages first: BM25 has no vocabulary before it has seen them")
        rows = [[self._vocabulary[t] for t in row if t in self._vocabulary] for row in self._tokenize(texts)]
        indptr = np.cumsum([0, *map(len, rows)])
        ids = np.array([i for row in rows for i in row], dtype=np.int64)
        counts = sp.csr_matrix((np.ones(len(ids), np.float32), ids, indptr), (len(rows), max(1, len(self._vocabulary))))
        counts.sum_duplicates()
        return self._representations(counts)

    def _representations(self, matrix: sp.csr_matrix) -> Representations:
        return Representations(None, np.zeros(matrix.shape[0], np.int64), matrix)

    search = Retriever.search
