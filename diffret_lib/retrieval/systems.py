"""The compared systems, with one interface: encode queries, encode passages, search."""

from __future__ import annotations

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
    """Base of the systems, which define ``encode(texts, side)`` and ``fingerprint(side)``, an encoding's address."""

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = MODES

    def encode_queries(self, texts: Sequence[str], **options: bool) -> Representations:
        """Representations of queries; see :meth:`Retriever.encode`."""
        return self.encode(texts, "query", **options)

    def encode_passages(self, texts: Sequence[str], **options: bool) -> Representations:
        """Representations of passages; see :meth:`Retriever.encode`."""
        return self.encode(texts, "passage", **options)

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
        query_ids = list(map(str, range(len(queries)))) if query_ids is None else query_ids
        passage_ids = list(map(str, range(len(passages)))) if passage_ids is None else passage_ids
        if len(passage_ids) != len(passages):
            raise ValueError(f"{len(passage_ids)} passage ids for {len(passages)} passages")
        return make_run(to_results(*rank(queries, passages, mode, top_k), query_ids, passage_ids), mode)


def _check_texts(texts: Sequence[str], side: Side) -> None:
    if side not in SIDES:
        raise ValueError(f"side must be 'query' or 'passage', not {side!r}")
    wrong = [texts] if isinstance(texts, str) else [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"texts must be a sequence of strings; found {wrong[0]!r}")


class Retriever(System):
    """A retriever on a language model: a reader, batched by a token budget.

    The backbone is by default the embedded one of the family.  ``max_query_tokens`` and ``max_passage_tokens`` are the
    tokens of the text that are read, ``batch_tokens`` the padded tokens of one forward pass; ``options`` are those of
    the system.  TypeError: an unknown option.  ValueError: a backbone of another family, numbers that are too small,
    inputs that are longer than the backbone takes.
    """

    family: ClassVar[str]
    reader_class: ClassVar[type[Reader]]

    def __init__(
        self, backbone: str | Backbone | LoadedBackbone | None = None, *, max_query_tokens: int = 64,
        max_passage_tokens: int = 256, batch_tokens: int = 4096, **options: Any,
    ) -> None:  # fmt: skip
        if backbone is None:
            backbone = {"diffusion": "smollm2-135m-diffusion", "autoregressive": "smollm2-135m-instruct"}[self.family]
        spec = get_backbone(backbone) if isinstance(backbone, str) else getattr(backbone, "spec", backbone)
        if getattr(spec, "family", None) != self.family:
            raise ValueError(f"{self.name} needs a backbone of the family {self.family!r}, not {spec!r}")
        self.backbone = backbone if isinstance(backbone, LoadedBackbone) else load_backbone(backbone)
        self.batch_tokens = whole_number("batch_tokens", batch_tokens)
        limits = {"max_query_tokens": max_query_tokens, "max_passage_tokens": max_passage_tokens}
        self._settings = limits | options | {"batch_tokens": batch_tokens}
        model, tokenizer = self.backbone.model, self.backbone.tokenizer
        self.reader = self.reader_class(model, tokenizer, **limits, **self._reader_options(**options)).eval()
        for side in SIDES:
            length = self.reader.max_text_tokens(side) + _overhead(self.reader, "a", side, self.vectors(side))
            if length > spec.max_length:
                needed = f"text, prompt and vectors of a {side} take {length} tokens"
                raise ValueError(f"{self.name}: {needed}, and {spec.name} takes {spec.max_length}; lower one of them")

    def _reader_options(self, **options: Any) -> dict[str, Any]:
        return options

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
        """Address of this side's encodings, over the code and settings that decide them; search is not covered."""
        other = "passage" if side == "query" else "query"
        settings = {k: v for k, v in self.reader.get_config_dict().items() if other not in k}
        return address([encode_shard, type(self.reader)], side, settings, self.batch_tokens, self.backbone.fingerprint)

    def encode(self, texts: Sequence[str], side: Side, cached: bool = False, progress: bool = True) -> Representations:
        """Dense vectors and sparse weights of texts; TypeError: ``texts`` is one str, or holds anything else than str.

        ``cached`` keeps every shard in the cache, from which an interrupted encoding goes on.
        """
        _check_texts(texts, side)
        own, parts = self.fingerprint(side) if cached else None, []
        name = f"{self.name}: encoding {'queries' if side == 'query' else 'passages'}"
        with tqdm(total=len(texts), desc=name, disable=not progress, unit="text") as bar:
            for start in range(0, len(texts) or 1, SHARD_TEXTS):
                shard = list(texts[start : start + SHARD_TEXTS])
                how = side, self.batch_tokens, self.vectors(side), bar.update
                encode = partial(encode_shard, self.reader, shard, *how)
                if cached:
                    key = fingerprint(own, shard)
                    folder = fetch("encodings", key, lambda folder, encode=encode: encode().save(folder))
                parts.append(Representations.load(folder) if cached else encode())
                bar.update(start + len(shard) - bar.n)
        space = fingerprint(self.backbone.fingerprint, type(self.reader).__name__)
        return replace(Representations.concatenate(parts), origin=Origin(self.name, side, space))

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
    """Encode texts, equal ones once, in batches of similar length; ``advance`` is called with the size of each."""
    rows: dict[str, int] = {}
    found: list[np.ndarray] = []
    weights = [sp.csr_matrix((0, reader.vocab_size), dtype=np.float32)]
    for batch in _batches(reader, list(dict.fromkeys(texts)), side, batch_tokens, vectors):
        with torch.inference_mode():
            out = reader(_features(reader, batch, side))
        embeddings, valid = out["token_embeddings"].cpu().numpy(), out["attention_mask"].bool().cpu().numpy()
        found += [own[there] for own, there in zip(embeddings, valid, strict=True)]
        if reader.has_sparse:
            weights.append(sp.csr_matrix(out["sentence_embedding"].cpu().numpy()))
        rows |= {text: len(rows) + i for i, text in enumerate(batch)}
        advance(len(batch))
    dense = np.zeros((len(found), vectors, reader.hidden_size), np.float32)
    for row, own in zip(dense, found, strict=True):
        row[: len(own)] = own
    lengths = np.array([len(own) for own in found], np.int64)
    take = np.array([rows[text] for text in texts], np.int64)
    sparse = sp.vstack(weights, format="csr")[take] if reader.has_sparse else None
    return Representations(dense[take], lengths[take], sparse)


def _features(reader: Reader, texts: list[str], side: Side) -> dict[str, Any]:
    features, device = reader.preprocess(texts, task=side), reader.model.device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in features.items()}


def _overhead(reader: Reader, text: str, side: Side, vectors: int) -> int:
    """Tokens of an input besides those of its text."""
    row, (ids,) = reader.preprocess([text], task=side), reader.text_ids([text], side)[0]
    return row["input_ids"].shape[1] + len(row.get("left_ids", ())) + vectors - 1 - len(ids)


def _batches(reader: Reader, texts: list[str], side: Side, batch_tokens: int, vectors: int) -> list[list[str]]:
    """The texts, longest first, as many to a batch as the token budget takes."""
    ids, _ = reader.text_ids(texts, side)
    overhead, batches, size = _overhead(reader, "", side, vectors), [], 0
    for i in sorted(range(len(texts)), key=lambda i: -len(ids[i])):
        if not batches or len(batches[-1]) >= size:
            size = max(1, batch_tokens // (len(ids[i]) + overhead))
            batches.append([])
        batches[-1].append(texts[i])
    return batches


class DiffRetriever(Retriever):
    """K masked positions of a diffusion LM, read after one forward pass (arXiv 2605.07210).

    ``k_query`` and ``k_passage`` are the numbers of masks (Kq, Kp), 1 by default.  ``shifted`` reads token i at
    position i - 1 (True) or at i; by default what the backbone's family does.
    """

    name = "DiffRetriever"
    family = "diffusion"
    reader_class = MaskedPositions

    def _reader_options(self, k_query: int = 1, k_passage: int = 1, shifted: bool | None = None) -> dict[str, Any]:
        shift = self.backbone.spec.prediction_shift if shifted is None else bool(shifted)
        counts = {"k_query": k_query, "k_passage": k_passage}
        return counts | {"mask_id": self.backbone.mask_id, "prediction_shift": shift}

    def vectors(self, side: Side) -> int:
        return self.reader.mask_count(side)


class PromptReps(Retriever):
    """The same prompt on an autoregressive LM (arXiv 2404.18424).

    ``max_new_tokens`` N decodes up to N tokens, a vector each besides the first; 0, the default, for a single vector.
    """

    name = "PromptReps"
    family = "autoregressive"
    reader_class = NextTokens

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


class BM25(System):
    """Lexical baseline from :mod:`bm25s` (Lucene's variant), English stemming and stop words, whole passages.

    A passage is the row of its BM25 term scores, a query its term counts; their product is the BM25 score.  Passages
    must be encoded first (RuntimeError): V is the number of their terms.  Nothing is kept in the cache.
    """

    name = "BM25"
    modes = ("sparse",)

    _vocabulary: dict[str, int] | None = None

    def fingerprint(self, side: Side) -> str:
        return address([_terms, _term_scores, _term_counts], side)

    def encode(self, texts: Sequence[str], side: Side, **options: bool) -> Representations:
        """Term scores or counts of texts; ``options`` of :meth:`Retriever.encode` change nothing."""
        _check_texts(texts, side)
        terms = _terms(texts)
        if side == "passage":
            self._vocabulary = {t: i for i, t in enumerate(sorted({t for row in terms for t in row}))}
            matrix = _term_scores(terms, self._vocabulary)
        elif self._vocabulary is None:
            raise RuntimeError("encode the passages first: BM25 has no vocabulary before it has seen them")
        else:
            matrix = _term_counts(terms, self._vocabulary)
        origin = Origin(self.name, side, fingerprint(list(self._vocabulary)))
        return Representations(None, np.zeros(len(terms), np.int64), matrix, origin)


def _terms(texts: Sequence[str]) -> list[list[str]]:
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def _term_scores(terms: list[list[str]], vocabulary: dict[str, int]) -> sp.csr_matrix:
    if not vocabulary:
        return sp.csr_matrix((len(terms), 1), dtype=np.float32)
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
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
