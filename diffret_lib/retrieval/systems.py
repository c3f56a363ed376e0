"""The compared systems, with one interface: encode queries, encode passages, search.

>>> retriever = DiffRetriever("smollm2-135m-diffusion", k_query=4, k_passage=16)     # doctest: +SKIP
>>> passages = retriever.encode_passages(["A heap is a tree.", "Tea is a drink."])   # doctest: +SKIP
>>> queries = retriever.encode_queries(["priority queue"])                           # doctest: +SKIP
>>> retriever.search(queries, passages, mode="hybrid", top_k=10)                     # doctest: +SKIP
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import bm25s
import numpy as np
import ranx
import scipy.sparse as sp
import Stemmer
import torch
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from tqdm import tqdm

from diffret_lib.addresses import address, fingerprint
from diffret_lib.cache import fetch
from diffret_lib.models.backbones import Backbone, LoadedBackbone, get_backbone, load_backbone, with_adapter
from diffret_lib.models.prompts import SIDES, Side
from diffret_lib.models.readers import LastToken, MaskedPositions, MeanOfTokens, NextTokens, Reader
from diffret_lib.retrieval.metrics import make_run
from diffret_lib.retrieval.representations import Origin, Representations
from diffret_lib.retrieval.search import MODES, rank, to_results, whole_number

#: Texts of one shard: what an interrupted encoding loses at most, and within which equal texts are encoded once.
SHARD_TEXTS = 1024


class System:
    """Base of the systems: what they have in common."""

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = MODES

    def fingerprint(self, side: Side) -> str:
        """Address of this side's encodings, over the code and settings that decide them; search is not covered."""
        raise NotImplementedError

    def encode(
        self, texts: Sequence[str], side: Side, *, cached: bool = False, progress: bool = True
    ) -> Representations:
        """Dense vectors and sparse weights of texts.

        Parameters
        ----------
        texts : sequence of str
            Any text, the empty one too.
        side : {"query", "passage"}
        cached : bool
            Keep every shard in the cache, from which an interrupted encoding goes on.

        Returns
        -------
        Representations
            ``dense`` float32 [n, K, H] or None, ``lengths`` [n], ``sparse`` CSR float32 [n, V] or None.

        Raises
        ------
        TypeError
            When ``texts`` is one str, or holds anything else than str.
        """
        raise NotImplementedError

    def encode_queries(self, texts: Sequence[str], *, cached: bool = False, progress: bool = True) -> Representations:
        """Representations of queries; see :meth:`encode`."""
        return self.encode(texts, "query", cached=cached, progress=progress)

    def encode_passages(self, texts: Sequence[str], *, cached: bool = False, progress: bool = True) -> Representations:
        """Representations of passages; see :meth:`encode`."""
        return self.encode(texts, "passage", cached=cached, progress=progress)

    def search(
        self, queries: Representations, passages: Representations, mode: str | None = None, top_k: int = 100,
        query_ids: Sequence[str] | None = None, passage_ids: Sequence[str] | None = None,
    ) -> ranx.Run:  # fmt: skip
        """Retrieve passages for each query; see :func:`diffret_lib.retrieval.search.rank`.

        ``mode`` is one of :attr:`modes`, by default hybrid or the only one.  Ids are by default ``"0"``, ``"1"``, ...
        ValueError: a mode that the system does not have, representations or ids that do not fit.
        """
        mode = self.modes[-1] if mode is None else mode
        if mode not in self.modes:
            raise ValueError(f"{self.name} has the modes {', '.join(self.modes)}; not {mode!r}")
        query_ids = [str(i) for i in range(len(queries))] if query_ids is None else query_ids
        passage_ids = [str(i) for i in range(len(passages))] if passage_ids is None else passage_ids
        if len(passage_ids) != len(passages):
            raise ValueError(f"{len(passage_ids)} passage ids for {len(passages)} passages")
        return make_run(to_results(*rank(queries, passages, mode, top_k), query_ids, passage_ids), mode)


def _check_texts(texts: Sequence[str], side: Side) -> None:
    if side not in SIDES:
        raise ValueError(f"side must be 'query' or 'passage', not {side!r}")
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, not one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings; text {i} is a {type(text).__name__}")


# -- systems on a language model ---------------------------------------------------------------------------------


class Retriever(System):
    """A retriever on a language model: a reader, batched by a token budget.

    Parameters
    ----------
    backbone : str, Backbone or LoadedBackbone, optional
        By default the embedded one of the family.
    max_query_tokens, max_passage_tokens : int
        Tokens of the text that are read.
    batch_tokens : int
        Padded tokens of one forward pass.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Of a backbone that is yet to load; by default float32.
    **options
        Those of the system.

    Raises
    ------
    TypeError
        For an unknown option, or a backbone of another type.
    ValueError
        For a backbone of another family or dtype, a number that is no whole number or too small, and inputs (text,
        prompt and masks) that are longer than the backbone takes.
    """

    family: ClassVar[str]
    reader_class: ClassVar[type[Reader]]
    #: The system's own options and their defaults.
    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, backbone: str | Backbone | LoadedBackbone | None = None, *, max_query_tokens: int = 64,
        max_passage_tokens: int = 256, batch_tokens: int = 4096, dtype: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if unknown := options.keys() - self.options.keys():
            raise TypeError(f"{self.name} has no option {min(unknown)!r}")
        limits = {"max_query_tokens": max_query_tokens, "max_passage_tokens": max_passage_tokens}
        self._settings = limits | {"batch_tokens": batch_tokens} | self.options | options
        for name, value in self._settings.items():
            if name != "shifted":
                whole_number(name, value, least=0 if name == "max_new_tokens" else 1)
        self.batch_tokens = batch_tokens
        self.backbone = self._load(backbone, dtype)
        self.reader = self.reader_class(
            self.backbone.model, self.backbone.tokenizer, **limits, **self._reader_options(self._settings)
        ).eval()
        for side in SIDES:
            self._check_length(side)

    def _load(self, backbone: str | Backbone | LoadedBackbone | None, dtype: str | None) -> LoadedBackbone:
        if backbone is None:
            backbone = {"diffusion": "smollm2-135m-diffusion", "autoregressive": "smollm2-135m-instruct"}[self.family]
        if not isinstance(backbone, str | Backbone | LoadedBackbone):
            raise TypeError(f"backbone must be a name, a Backbone or a LoadedBackbone, not a {type(backbone).__name__}")
        spec = get_backbone(backbone) if isinstance(backbone, str) else getattr(backbone, "spec", backbone)
        if spec.family != self.family:
            raise ValueError(
                f"{self.name} needs a backbone of the family {self.family!r}; {spec.name} is {spec.family!r}"
            )
        if not isinstance(backbone, LoadedBackbone):
            return load_backbone(backbone, dtype=dtype or "float32")
        if dtype is not None and f"torch.{dtype}" != str(backbone.dtype):
            raise ValueError(f"{spec.name} is loaded as {backbone.dtype}; load it again for dtype={dtype!r}")
        return backbone

    def _check_length(self, side: Side) -> None:
        limit, vectors, most = self.reader.max_text_tokens(side), self.vectors(side), self.backbone.spec.max_length
        length = limit + vectors
        if length <= most:  # otherwise the prompt need not be made
            length = limit + _overhead(self.reader, "a", side, vectors)
        if length > most:
            raise ValueError(
                f"{self.name}: {limit} tokens of a {side}, its prompt and {vectors} vectors take {length} tokens or "
                f"more, and {self.backbone.spec.name} takes {most}; lower max_{side}_tokens or the number of vectors"
            )

    def _reader_options(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {name: settings[name] for name in self.options}

    def vectors(self, side: Side) -> int:
        """Number of vectors that a text has at most."""
        return 1

    def on(self, backbone: LoadedBackbone | None = None, **options: Any) -> Self:
        """This retriever on another loaded backbone, with changed options, or both."""
        return type(self)(backbone or self.backbone, **self._settings | options)

    def with_adapter(self, folder: str | os.PathLike[str]) -> Self:
        """This retriever with a PEFT adapter merged into a copy of its backbone (BackboneError: it does not fit)."""
        return self.on(with_adapter(self.backbone, folder))

    def fingerprint(self, side: Side) -> str:
        other = "passage" if side == "query" else "query"
        settings = {k: v for k, v in self.reader.get_config_dict().items() if other not in k}
        code = [encode_shard, type(self.reader)]
        return address(code, side, settings, self.batch_tokens, self.backbone.fingerprint)

    def encode(
        self, texts: Sequence[str], side: Side, *, cached: bool = False, progress: bool = True
    ) -> Representations:
        _check_texts(texts, side)
        own, parts = self.fingerprint(side) if cached else None, []
        name = f"{self.name}: encoding {'queries' if side == 'query' else 'passages'}"
        with tqdm(total=len(texts), desc=name, disable=not progress, unit="text") as bar:
            for start in range(0, len(texts), SHARD_TEXTS):
                shard = list(texts[start : start + SHARD_TEXTS])
                encode = partial(
                    encode_shard, self.reader, shard, side, self.batch_tokens, self.vectors(side), bar.update
                )
                if cached:
                    make = lambda folder, encode=encode: encode().save(folder)  # noqa: E731
                    parts.append(Representations.load(fetch("encodings", fingerprint(own, shard), make)))
                else:
                    parts.append(encode())
                bar.update(start + len(shard) - bar.n)
        space = fingerprint(self.backbone.fingerprint, type(self.reader).__name__)
        if not parts:
            dense = np.zeros((0, 1, self.reader.hidden_size), np.float32)
            sparse = sp.csr_matrix((0, self.reader.vocab_size), dtype=np.float32) if self.reader.has_sparse else None
            parts = [Representations(dense, np.zeros(0, np.int64), sparse)]
        whole = Representations.concatenate(parts)
        return replace(whole, origin=Origin(self.name, side, space))

    def features(self, texts: list[str], side: Side) -> dict[str, Any]:
        """Tokenise texts as the reader's forward pass takes them, on the backbone's device."""
        return _features(self.reader, texts, side)

    def multi_vector_encoder(self) -> MultiVectorEncoder:
        """The dense side as sentence-transformers, its evaluators and mteb take it."""
        return MultiVectorEncoder(modules=[self.reader], device=str(self.backbone.device))

    def sparse_encoder(self) -> SparseEncoder:
        """The sparse side as sentence-transformers, its evaluators and mteb take it."""
        if not self.reader.has_sparse:
            raise ValueError(f"{self.name} has no sparse side")
        return SparseEncoder(modules=[self.reader], device=str(self.backbone.device), similarity_fn_name="dot")


def encode_shard(
    reader: Reader, texts: list[str], side: Side, batch_tokens: int, vectors: int, advance: Callable[[int], Any]
) -> Representations:
    """Encode texts, equal ones once, in batches of similar length; both sides come from one forward pass.

    ``vectors`` is the number that a text has at most; ``advance`` is called with the number of texts of each batch.
    """
    unique = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    dense: list[np.ndarray] = [None] * len(unique)
    lengths = np.zeros(len(unique), np.int64)
    sparse: list[tuple[np.ndarray, np.ndarray]] = [None] * len(unique)
    for batch in _batches(reader, unique, side, batch_tokens, vectors):
        with torch.inference_mode():
            out = reader(_features(reader, [unique[i] for i in batch], side))
        found, valid = out["token_embeddings"].cpu().numpy(), out["attention_mask"].bool().cpu().numpy()
        weights = sp.csr_matrix(out["sentence_embedding"].cpu().numpy()) if reader.has_sparse else None
        for row, i in enumerate(batch):
            dense[i] = found[row, valid[row]]
            lengths[i] = len(dense[i])
            if weights is not None:
                span = slice(*weights.indptr[row : row + 2])
                sparse[i] = weights.indices[span], weights.data[span]
        advance(len(batch))
    block = np.zeros((len(unique), max(lengths.max(), vectors), reader.hidden_size), np.float32)
    for i, found in enumerate(dense):
        block[i, : len(found)] = found
    matrix = None
    if reader.has_sparse:
        indptr = np.cumsum([0, *(len(ids) for ids, _ in sparse)])
        ids, data = (np.concatenate(part) for part in zip(*sparse, strict=True))
        matrix = sp.csr_matrix((data, ids, indptr), shape=(len(unique), reader.vocab_size))
    take = np.array([place[text] for text in texts])
    return Representations(block[take], lengths[take], None if matrix is None else matrix[take])


def _features(reader: Reader, texts: list[str], side: Side) -> dict[str, Any]:
    features, device = reader.preprocess(texts, task=side), reader.model.device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in features.items()}


def _overhead(reader: Reader, text: str, side: Side, vectors: int) -> int:
    """Tokens of an input besides those of its text."""
    row, (ids,) = reader.preprocess([text], task=side), reader.text_ids([text], side)[0]
    return row["input_ids"].shape[1] + len(row.get("left_ids", ())) + vectors - 1 - len(ids)


def _batches(reader: Reader, texts: list[str], side: Side, batch_tokens: int, vectors: int) -> list[list[int]]:
    """Indices of the texts, longest first, as many to a batch as the token budget takes."""
    ids, _ = reader.text_ids(texts, side)
    overhead = _overhead(reader, "", side, vectors)
    batches: list[list[int]] = []
    size = 0
    for i in sorted(range(len(texts)), key=lambda i: -len(ids[i])):
        if not batches or len(batches[-1]) >= size:
            size = max(1, batch_tokens // (len(ids[i]) + overhead))
            batches.append([])
        batches[-1].append(i)
    return batches


class DiffRetriever(Retriever):
    """K masked positions of a diffusion LM, read after one forward pass (arXiv 2605.07210).

    Parameters
    ----------
    k_query, k_passage : int
        Number of masks (Kq, Kp); 1 by default.
    shifted : bool, optional
        Read token i at position i - 1 or at i; what the backbone's family does by default.
    """

    name = "DiffRetriever"
    family = "diffusion"
    reader_class = MaskedPositions
    options = {"k_query": 1, "k_passage": 1, "shifted": None}

    def _reader_options(self, settings: dict[str, Any]) -> dict[str, Any]:
        shifted = settings["shifted"]
        if shifted not in (None, True, False):
            raise ValueError(f"shifted must be True, False or None, not {shifted!r}")
        shift = self.backbone.spec.prediction_shift if shifted is None else shifted
        counts = {name: settings[name] for name in ("k_query", "k_passage")}
        return counts | {"mask_id": self.backbone.mask_id, "prediction_shift": shift}

    def vectors(self, side: Side) -> int:
        return self.reader.mask_count(side)


class PromptReps(Retriever):
    """The same prompt on an autoregressive LM (arXiv 2404.18424).

    Parameters
    ----------
    max_new_tokens : int
        0, the default, for a single vector; N decodes up to N tokens, a vector each besides the first.
    """

    name = "PromptReps"
    family = "autoregressive"
    reader_class = NextTokens
    options = {"max_new_tokens": 0}

    def vectors(self, side: Side) -> int:
        return 1 + self.reader.max_new_tokens


class DiffEmbed(Retriever):
    """Mean of a diffusion LM's last hidden states over the raw text (arXiv 2505.15045)."""

    name = "DiffEmbed"
    family = "diffusion"
    modes = ("dense",)
    reader_class = MeanOfTokens


class MeanPooledAR(Retriever):
    """Mean of an autoregressive LM's last hidden states, for contrast with :class:`DiffEmbed`."""

    name = "MeanPooledAR"
    family = "autoregressive"
    modes = ("dense",)
    reader_class = MeanOfTokens


class RepLLaMA(Retriever):
    """The end-of-sequence token of an autoregressive LM (arXiv 2310.08319); means little before it is fine-tuned."""

    name = "RepLLaMA"
    family = "autoregressive"
    modes = ("dense",)
    reader_class = LastToken


# -- the lexical baseline ----------------------------------------------------------------------------------------


class BM25(System):
    """Lexical baseline from :mod:`bm25s` (Lucene's variant), English stemming and stop words, whole passages.

    A passage is the row of its BM25 term scores, a query its term counts; their product is the BM25 score.  Passages
    must be encoded first (RuntimeError): V is the number of their terms.  Nothing is kept in the cache.
    """

    name = "BM25"
    modes = ("sparse",)

    def __init__(self, k1: float = 1.5, b: float = 0.75) -> None:
        if not (0 <= k1 < math.inf and 0 <= b <= 1):
            raise ValueError(f"BM25 needs a k1 of at least 0 and a b in 0..1, not k1={k1!r}, b={b!r}")
        self.k1, self.b = k1, b
        self._vocabulary: dict[str, int] | None = None

    def fingerprint(self, side: Side) -> str:
        return address([_terms, _term_scores, _term_counts], side, self.k1, self.b)

    def encode(
        self, texts: Sequence[str], side: Side, *, cached: bool = False, progress: bool = True
    ) -> Representations:
        _check_texts(texts, side)
        if side == "query" and self._vocabulary is None:
            raise RuntimeError("encode the passages first: BM25 has no vocabulary before it has seen them")
        terms = _terms(texts)
        if side == "passage":
            self._vocabulary = {t: i for i, t in enumerate(sorted({t for row in terms for t in row}))}
            matrix = _term_scores(terms, self._vocabulary, self.k1, self.b)
        else:
            matrix = _term_counts(terms, self._vocabulary)
        origin = Origin(self.name, side, fingerprint(list(self._vocabulary)))
        return Representations(None, np.zeros(matrix.shape[0], np.int64), matrix, origin)


def _terms(texts: Sequence[str]) -> list[list[str]]:
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def _term_scores(terms: list[list[str]], vocabulary: dict[str, int], k1: float, b: float) -> sp.csr_matrix:
    if not vocabulary:
        return sp.csr_matrix((len(terms), 1), dtype=np.float32)
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    ids = [[vocabulary[t] for t in row] for row in terms]
    index.index((ids, dict(vocabulary)), create_empty_token=False, show_progress=False)
    scores = tuple(index.scores[name] for name in ("data", "indices", "indptr"))
    return sp.csc_matrix(scores, shape=(len(terms), len(vocabulary))).tocsr().astype(np.float32)


def _term_counts(terms: list[list[str]], vocabulary: dict[str, int]) -> sp.csr_matrix:
    rows = [[vocabulary[t] for t in row if t in vocabulary] for row in terms]
    indptr = np.cumsum([0, *map(len, rows)])
    ids = np.array([i for row in rows for i in row], dtype=np.int64)
    counts = sp.csr_matrix((np.ones(len(ids), np.float32), ids, indptr), (len(rows), max(1, len(vocabulary))))
    counts.sum_duplicates()
    return counts
