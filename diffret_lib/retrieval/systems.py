"""The compared systems, with one interface: encode queries, encode passages, search."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from diffret_lib.data.checks import strings, whole_number
from diffret_lib.models.backbones import Backbone, LoadedBackbone, get_backbone, load_backbone, with_adapter
from diffret_lib.models.prompts import SIDES, Side
from diffret_lib.models.readers import LastToken, MaskedPositions, MeanOfTokens, NextTokens, Reader, one_of
from diffret_lib.retrieval.index import PassageIndex
from diffret_lib.retrieval.metrics import make_run
from diffret_lib.retrieval.representations import Origin, Representations
from diffret_lib.retrieval.search import MODES, rank, to_results

#: Texts of one shard: what an interrupted encoding loses at most, and within which equal texts are encoded once.
SHARD_TEXTS = 1024
#: Parameters of BM25: those of Anserini, with which BEIR's baseline was measured.
K1, B = 0.9, 0.4
#: On a GPU a batch has this many times the tokens.
CUDA_BATCH = 16


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

    def with_adapter(self, folder: str | os.PathLike[str]) -> Self:
        """This system with a PEFT adapter; a ValueError where it has no model."""
        raise ValueError(f"{self.name} has no model that {folder!r:.100} could adapt")

    def search(
        self, queries: Representations, passages: Representations | PassageIndex, mode: str | None = None,
        top_k: int = 100, query_ids: Sequence[str] | None = None, passage_ids: Sequence[str] | None = None,
    ) -> ranx.Run:  # fmt: skip
        """Retrieve passages for each query; see :func:`diffret_lib.retrieval.search.rank`.

        ``mode`` is one of :attr:`modes`, by default hybrid or the only one.  Ids are by default ``"0"``, ``"1"``, ...
        TypeError: no representations.  ValueError: a mode that the system does not have, representations or ids that
        do not fit.
        """
        kinds = {"queries": Representations, "passages": Representations | PassageIndex}
        for (name, kind), given in zip(kinds.items(), (queries, passages), strict=True):
            if not isinstance(given, kind):
                raise TypeError(f"{name} must be Representations, as encode_{name} makes them, not {given!r:.100}")
        mode = self.modes[-1] if mode is None else mode
        if mode not in self.modes:
            raise ValueError(f"{self.name} has the modes {', '.join(self.modes)}; not {mode!r}")
        query_ids = list(map(str, range(len(queries)))) if query_ids is None else query_ids
        passage_ids = list(map(str, range(len(passages)))) if passage_ids is None else passage_ids
        strings("passage_ids", passage_ids)
        if len(passage_ids) != len(passages):
            raise ValueError(f"{len(passage_ids)} passage ids for {len(passages)} passages")
        how = queries, mode, top_k
        ranked = passages.search(*how) if isinstance(passages, PassageIndex) else rank(queries, passages, *how[1:])
        return make_run(to_results(*ranked, query_ids, passage_ids), mode)


def _checked(texts: Sequence[str], side: Side) -> list[str]:
    one_of("side", side, SIDES)
    several = isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping | Set)
    listed = list(texts) if several else [texts]
    if wrong := [text for text in listed if not (several and isinstance(text, str))]:
        raise TypeError(f"texts must be a sequence of strings; found {wrong[0]!r:.100}")
    return listed


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
        self.batch_tokens = whole_number("batch_tokens", batch_tokens)
        self.backbone = load_backbone(backbone)
        limits = {"max_query_tokens": max_query_tokens, "max_passage_tokens": max_passage_tokens}
        self._settings = limits | options | {"batch_tokens": batch_tokens}
        if self.backbone.device.type == "cuda":
            self.batch_tokens *= CUDA_BATCH
        model, tokenizer = self.backbone.model, self.backbone.tokenizer
        self.reader = self.reader_class(model, tokenizer, **limits, **self._reader_options(**options)).eval()
        for side in SIDES:
            k = self.vectors(side)
            others = k if k > spec.max_length else _overhead(self.reader, "a", side)
            length = self.reader.max_text_tokens(side) + others
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
        backbone, model = (self.backbone.fingerprint, self.backbone.device.type), type(self.backbone.model)
        own = [model] if model.__module__.startswith("diffret_lib.") else []  # the others are in the versions
        how = settings, self.batch_tokens, torch.get_float32_matmul_precision()
        return address([encode_shard, type(self.reader), *own], side, *how, *backbone)

    def encode(self, texts: Sequence[str], side: Side, cached: bool = False, progress: bool = True) -> Representations:
        """Dense vectors and sparse weights of texts; TypeError: ``texts`` is one str, or holds anything else than str.

        ``cached`` keeps every shard in the cache, from which an interrupted encoding goes on.
        """
        (encoded,) = self._encode(_checked(texts, side), side, None, cached, progress).values()
        return encoded

    def _encode(
        self, texts: list[str], side: Side, counts: Sequence[int] | None, cached: bool, progress: bool
    ) -> dict[int, Representations]:
        own, parts = fingerprint(self.fingerprint(side), counts) if cached else None, []
        name = f"{self.name}: encoding {'queries' if side == 'query' else 'passages'}"
        with tqdm(total=len(texts), desc=name, disable=not progress, unit="text") as bar:
            for start in range(0, len(texts) or 1, SHARD_TEXTS):
                shard = texts[start : start + SHARD_TEXTS]
                how = side, self.batch_tokens, counts or [self.vectors(side)], bar.update
                encode = partial(encode_shard, self.reader, shard, *how)
                if cached:
                    folder = fetch("encodings", fingerprint(own, shard), partial(_save, encode))
                    parts.append({k: Representations.load(folder / str(k)) for k in how[2]})
                else:
                    parts.append(encode())
                bar.update(start + len(shard) - bar.n)
        origin = Origin(self.name, side, fingerprint(self.backbone.fingerprint, type(self.reader).__name__))
        joined = {k: Representations.concatenate([part[k] for part in parts]) for k in counts or parts[0]}
        return {k: replace(encoded, origin=origin) for k, encoded in joined.items()}

    def read_texts(self, texts: Sequence[str], side: Side) -> list[str]:
        """What of each text is read: all of it, or its beginning where it is cut."""
        return self.reader.read_texts(_checked(texts, side), side)

    def features(self, texts: list[str], side: Side) -> dict[str, Any]:
        """Tokenise texts as the reader's forward pass takes them, on the backbone's device."""
        return _on_device(self.reader, self.reader.preprocess(texts, task=side))

    def multi_vector_encoder(self) -> MultiVectorEncoder:
        """The dense side as sentence-transformers, its evaluators and mteb take it."""
        return MultiVectorEncoder(modules=[self.reader], device=str(self.backbone.device))

    def sparse_encoder(self) -> SparseEncoder:
        """The sparse side as sentence-transformers, its evaluators and mteb take it."""
        if not self.reader.has_sparse:
            raise ValueError(f"{self.name} has no sparse side")
        return SparseEncoder(modules=[self.reader], device=str(self.backbone.device), similarity_fn_name="dot")


def encode_shard(
    reader: Reader,
    texts: list[str],
    side: Side,
    batch_tokens: int,
    counts: Sequence[int],
    advance: Callable[[int], Any],
) -> dict[int, Representations]:
    """Encode texts, equal ones once, in batches of similar length, at each of ``counts`` numbers of vectors.

    More than one number needs a reader that shares the text.  ``advance`` is called with the size of each batch.
    """
    rows: dict[str, int] = {}
    vectors: dict[int, list[np.ndarray]] = {k: [] for k in counts}
    weights = {k: [sp.csr_matrix((0, reader.vocab_size), dtype=np.float32)] for k in counts}
    extra = {"counts": counts} if len(counts) > 1 else {}
    for batch in _batches(reader, list(dict.fromkeys(texts)), side, batch_tokens, extra):
        features = _on_device(reader, reader.features(batch, side, **extra))
        with torch.inference_mode():
            outputs = reader.forward_counts(features) if extra else {counts[0]: reader(features)}
        for k, out in outputs.items():
            embeddings, valid = out["token_embeddings"].cpu().numpy(), out["attention_mask"].bool().cpu().numpy()
            vectors[k] += [own[there] for own, there in zip(embeddings, valid, strict=True)]
            if reader.has_sparse:
                weights[k].append(_csr(features["content_ids"].cpu(), out["content_weights"].cpu(), reader.vocab_size))
        rows |= {text: len(rows) + i for i, text in enumerate(batch)}
        advance(len(batch))
    take = np.array([rows[text] for text in texts], np.int64)
    encoded = {}
    for k, found in vectors.items():
        dense = np.zeros((len(found), k, reader.hidden_size), np.float32)
        for row, own in zip(dense, found, strict=True):
            row[: len(own)] = own
        lengths = np.array([len(own) for own in found], np.int64)
        sparse = sp.vstack(weights[k], format="csr")[take] if reader.has_sparse else None
        encoded[k] = Representations(dense[take], lengths[take], sparse)
    return encoded


def _csr(ids: torch.Tensor, weights: torch.Tensor, size: int) -> sp.csr_matrix:
    """Sparse matrix [n, size] of weights [n, C] at ids [n, C], those above 0."""
    kept = weights > 0
    indptr = np.concatenate([[0], kept.sum(1).cumsum(0).numpy()])
    return sp.csr_matrix((weights[kept].numpy(), ids[kept].numpy(), indptr), (len(ids), size))


def _save(encode: Callable[[], dict[int, Representations]], folder: Path) -> None:
    for k, encoded in encode().items():
        encoded.save(folder / str(k))


def _on_device(reader: Reader, features: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(reader.model.device) if torch.is_tensor(v) else v for k, v in features.items()}


def _overhead(reader: Reader, text: str, side: Side, **extra: Any) -> int:
    """Tokens of an input besides those of its text."""
    row, (ids,) = reader.features([text], side, **extra), reader.cut_ids([text], side)
    return row["input_ids"].shape[1] + len(row.get("left_ids", ())) + reader.decoded - len(ids)


def _batches(reader: Reader, texts: list[str], side: Side, batch_tokens: int, extra: dict[str, Any]) -> list[list[str]]:
    """The texts, longest first, as many to a batch as the token budget takes."""
    ids = reader.cut_ids(texts, side)
    overhead, batches, size = _overhead(reader, "", side, **extra), [], 0
    for i in sorted(range(len(texts)), key=lambda i: -len(ids[i])):
        if not batches or len(batches[-1]) >= size:
            size = max(1, batch_tokens // (len(ids[i]) + overhead))
            batches.append([])
        batches[-1].append(texts[i])
    return batches


class DiffRetriever(Retriever):
    """K masked positions of a diffusion LM, read after one forward pass (arXiv 2605.07210).

    ``k_query`` and ``k_passage`` are the numbers of masks (Kq, Kp), 1 by default.  ``shifted`` reads token i at
    position i - 1 (True) or at i; by default as the backbone's ``prediction_shift`` says.  ``content_from``: the words
    of the sparse side are those of the "whole text" (default), or of the "read text".  ``shared_text``, not in the
    paper, reads a text without a look at its masks, and so any number of K in one pass (:meth:`encode_counts`).
    """

    name = "DiffRetriever"
    family = "diffusion"
    reader_class = MaskedPositions

    def _reader_options(self, shifted: bool | None = None, **options: Any) -> dict[str, Any]:
        shift = self.backbone.spec.prediction_shift if shifted is None else one_of("shifted", shifted, (True, False))
        return options | {"mask_id": self.backbone.mask_id, "prediction_shift": shift}

    def vectors(self, side: Side) -> int:
        return self.reader.mask_count(side)

    def encode_counts(
        self, texts: Sequence[str], side: Side, counts: Sequence[int], cached: bool = False, progress: bool = True
    ) -> dict[int, Representations]:
        """Representations of texts by K, for all K of ``counts`` from one pass: each is that of :meth:`encode`.

        ValueError: ``shared_text`` is off, or counts are none, double, no whole numbers, or too large for the backbone.
        """
        if not self.reader.shared_text:
            raise ValueError(f"{self.name} reads several K in one pass with shared_text=True only")
        texts, several = _checked(texts, side), isinstance(counts, Iterable) and not isinstance(counts, str)
        numbers = sorted(whole_number("counts", k) for k in counts) if several else []
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"counts must be a list of different numbers of masks, not {counts!r}")
        widest = self.on(**{f"k_{side}": numbers[-1]})  # refuses what is too long
        return widest._encode(texts, side, numbers, cached, progress)


class PromptReps(Retriever):
    """The same prompt on an autoregressive LM (arXiv 2404.18424).

    ``max_vectors`` N is the most vectors of a text, that of the prompt and N - 1 decoded ones; 1, the default, is
    single.  ``stop`` ends the answer at "quote" (the token that is a quote alone, by default), at "any quote" (a token
    that holds one) or "never".  ``content_from`` is as for :class:`DiffRetriever`.
    """

    name = "PromptReps"
    family = "autoregressive"
    reader_class = NextTokens

    def vectors(self, side: Side) -> int:
        return self.reader.max_vectors


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
    """Lexical baseline from :mod:`bm25s` (Lucene's variant, k1 0.9, b 0.4), English stems, stop words, whole texts.

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
        terms = _terms(_checked(texts, side))
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
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
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
