"""Reading what masks and decoded tokens say: predicted words, how alike vectors are, and one query looked into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from diffret_lib.addresses import address
from diffret_lib.cache import remember
from diffret_lib.data.collection import Collection
from diffret_lib.experiments.oracle import ndcg
from diffret_lib.experiments.rankings import ranking
from diffret_lib.experiments.study import Study
from diffret_lib.models.prompts import ENGLISH_STOP_WORDS, SIDES, Side, content_words
from diffret_lib.retrieval.metrics import METRIC
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import SELECTION_MODE, rank
from diffret_lib.retrieval.systems import BM25, Retriever


def predicted_tokens(retriever: Retriever, texts: Sequence[str], side: Side = "passage") -> list[list[str]]:
    """The greedy token at each position that the retriever reads, up to the first special token; kept in the cache."""
    texts = list(texts)
    key = address([_predicted_tokens], retriever.fingerprint(side), texts)
    return remember("predictions", key, lambda: _predicted_tokens(retriever, texts, side))


def _predicted_tokens(retriever: Retriever, texts: list[str], side: Side) -> list[list[str]]:
    reader, rows = retriever.reader, []
    for start in tqdm(range(0, len(texts), 16), desc=f"{retriever.name}: predictions", disable=len(texts) <= 16):
        with torch.inference_mode():
            out = reader(retriever.features(texts[start : start + 16], side))
        for ids, valid in zip(out["predicted_ids"], out["attention_mask"].bool(), strict=True):
            rows.append([reader.tokenizer.decode([i]) for i in ids[valid].tolist()])
    return rows


def share_of_content(tokens: Sequence[str], text: str) -> dict[str, float]:
    """Shares of the tokens that are letters and no stop word (content), and that begin a word of the text (in_text)."""
    words = content_words(text)
    cleaned = [t.strip().lower() for t in tokens]
    content = [t for t in cleaned if len(t) > 1 and t.isalnum() and t not in ENGLISH_STOP_WORDS]
    inside = [t for t in content if any(w.startswith(t) for w in words)]
    n = max(1, len(cleaned))
    return {"content": len(content) / n, "in_text": len(inside) / n}


def mask_words_table(study: Study, texts: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Words that masks and the parent predict, one row a passage; and each reading's mean :func:`share_of_content`."""
    readings = {
        "one mask": study.diffretriever(1, 1), "four masks": study.diffretriever(4, 4),
        "parent, next token": study.promptreps(), "parent, decoded": study.promptreps(5),
    }  # fmt: skip
    tokens = {name: predicted_tokens(retriever, texts) for name, retriever in readings.items()}
    words = {name: [" ".join(map(_printable, row)) for row in rows] for name, rows in tokens.items()}
    passages = [text[:60].replace("\n", " ") + " ..." for text in texts]
    means = {name: pd.DataFrame(map(share_of_content, rows, texts)).mean() for name, rows in tokens.items()}
    return pd.DataFrame({"passage": passages} | words), pd.DataFrame(means).T.rename_axis("reading").reset_index()


def reading_table(study: Study, texts: Sequence[str], side: Side) -> pd.DataFrame:
    """Tokens that DiffRetriever (K = 1, 4) and PromptReps (single, multi) read, one row a text."""
    n = study.profile.promptreps_vectors
    readings = {
        "DiffRetriever K=1": study.diffretriever(1, 1), "DiffRetriever K=4": study.diffretriever(4, 4),
        "PromptReps single": study.promptreps(), f"PromptReps multi (N={n})": study.promptreps(n),
    }  # fmt: skip
    table = pd.DataFrame({"text": [t[:70].replace("\n", " ") for t in texts]})
    for name, retriever in readings.items():
        table[name] = ["·".join(map(_printable, row)) for row in predicted_tokens(retriever, texts, side)]
    return table


def self_similarity_table(study: Study, collection: Collection) -> pd.DataFrame:
    """How alike a passage's vectors are: columns system, vectors, cosine (mean), vectors used (mean)."""
    n, rows = study.profile.promptreps_vectors, []
    systems = [("DiffRetriever", k, study.diffretriever(k, k)) for k in study.profile.k_grid[1:]]
    for name, count, retriever in [*systems, ("PromptReps multi", n, study.promptreps(n))]:
        vectors = study.encode(retriever, collection, "passage")
        rows.append((name, count, mean_self_similarity(vectors), vectors.lengths.mean()))
    return pd.DataFrame(rows, columns=["system", "vectors", "cosine", "vectors used"])


def mean_self_similarity(representations: Representations) -> float:
    """Mean cosine between the vectors of one text, over texts with two vectors or more."""
    means = []
    for vectors, n in zip(representations.dense, representations.lengths, strict=True):
        if n > 1:
            gram = vectors[:n] @ vectors[:n].T
            means.append((gram.sum() - n) / (n * (n - 1)))
    return float(np.mean(means)) if means else float("nan")


def mask_words(retriever: Retriever, texts: Sequence[str], side: Side) -> list[list[str]]:
    """The greedy token at each position of each text, numbered from 1 ("1 heap"); a token of spaces alone is "␣"."""
    return [_numbered(row) for row in predicted_tokens(retriever, texts, side)]


def _numbered(tokens: Sequence[str]) -> list[str]:
    return [f"{i} {_printable(token)}" for i, token in enumerate(tokens, 1)]


def _printable(token: str) -> str:
    token = token.strip() or "␣"
    return token if token.isprintable() else ascii(token)[1:-1]


def alignment(retriever: Retriever, query: str, passage: str) -> pd.DataFrame:
    """Dot products of a query's vectors with a passage's, of a retriever that predicts tokens: what MaxSim is made of.

    float32, shape (vectors of the query, vectors of the passage); index and columns as of :func:`mask_words`.  The
    rows' maxima, each clamped at 0, sum up to the score of :func:`diffret_lib.retrieval.search.rank`.
    """
    vectors, names = [], []
    for side, text in zip(SIDES, (query, passage), strict=True):
        own, tokens = _positions(retriever, text, side)
        vectors.append(own.float().cpu().numpy())
        words = [retriever.reader.tokenizer.decode([i]) for i in tokens.tolist()]
        names.append(pd.Index(_numbered(words), name=f"masks of the {side}"))
    return pd.DataFrame(vectors[0] @ vectors[1].T, *names)


@torch.inference_mode()
def top_tokens(retriever: Retriever, text: str, side: Side, count: int = 5) -> pd.DataFrame:
    """The best tokens of each position that counts: a row a position (from 1), columns "1" (the greedy one), "2" ..."""
    reader, (vectors, _) = retriever.reader, _positions(retriever, text, side)
    # the vectors are normalised, which changes no order of their logits
    best = reader.logits(vectors[None].to(reader.model.dtype))[0].topk(count).indices
    rows = [[_printable(reader.tokenizer.decode([i])) for i in row] for row in best.tolist()]
    index = pd.Index(range(1, 1 + len(rows)), name=f"position of the {side}")
    return pd.DataFrame(rows, index, [str(i) for i in range(1, 1 + count)])


@torch.inference_mode()
def _positions(retriever: Retriever, text: str, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised vectors [n, H] and greedy tokens [n] of the positions that count."""
    out = retriever.reader(retriever.features([text], side))
    counts = out["attention_mask"][0].bool()
    return out["token_embeddings"][0, counts], out["predicted_ids"][0, counts]


@dataclass
class Explorer:
    """One collection of a study, searched zero-shot by one system at one pair of counts, and by BM25.

    ``system`` is "DiffRetriever", with the masks of ``pair`` (Kq, Kp), as the grid of notebook 02 reads them, or
    "PromptReps", with as many vectors on a side at most.  A collection's name stands for the part of it on which the
    grid is.  Encodings come from the cache, where they are.
    """

    study: Study
    collection: Collection | str
    system: str
    pair: tuple[int, int]

    def __post_init__(self) -> None:
        if isinstance(self.collection, str):
            self.collection = self.study.grid_collection(self.collection)
        if self.system == "DiffRetriever":
            self.retriever = self.study.diffretriever(*self.pair, shared_text=self.study.profile.shared_text_grid)
        elif self.system == "PromptReps":
            self.retriever = self.study.promptreps(max(self.pair))
        else:
            raise ValueError(f"the system must be 'DiffRetriever' or 'PromptReps', not {self.system!r}")
        self.bm25 = BM25()
        self._bm25 = self.bm25.encode_passages(self.collection.passages)

    def _side(self, side: Side) -> Representations:
        profile = self.study.profile
        if self.system == "DiffRetriever" and profile.shared_text_grid and set(self.pair) <= set(profile.k_grid):
            return self.study.sides(self.collection, side)[self.pair[SIDES.index(side)]]
        return self.study.encode(self.retriever, self.collection, side)

    @cached_property
    def passages(self) -> Representations:
        return self._side("passage")

    def judged(self, mode: str = SELECTION_MODE) -> pd.DataFrame:
        """The judged queries: columns query, ranks of the relevant passages ("-": not among the best), nDCG@10, and the
        same for BM25; the queries on which the system is furthest behind BM25 first."""
        c, top_k = self.collection, self.study.profile.top_k
        runs = {self.system: ranking(self._side("query"), self.passages, c, mode, top_k)}
        runs["BM25"] = ranking(self.bm25.encode_queries(c.queries), self._bm25, c, "sparse", top_k)
        texts = dict(zip(c.query_ids, c.queries))
        table = pd.DataFrame({"query": [texts[q] for q in sorted(c.qrels)]})
        for name, run in runs.items():
            table[f"{name}: ranks"] = [_ranks(c.qrels[q], list(run.get(q, {}))) for q in sorted(c.qrels)]
            table[f"{name}: {METRIC}"] = [_ndcg(c.qrels[q], list(run.get(q, {}))) for q in sorted(c.qrels)]
        behind = table[f"{self.system}: {METRIC}"] - table[f"BM25: {METRIC}"]
        return table.loc[behind.sort_values(kind="stable").index].reset_index(drop=True)

    def found(self, query: str, mode: str = "dense", top_k: int = 5) -> pd.DataFrame:
        """The best passages for any query text: columns rank (from 1), score, BM25 (its rank there, "-": not found),
        passage_id, words (at the masks) and text.  A sparse search leaves out passages that share no term."""
        c, n = self.collection, len(self.collection.passages)
        queries = self.retriever.encode_queries([query], progress=False)
        scores, places = rank(queries, self.passages, mode, top_k)
        beside = rank(self.bm25.encode_queries([query]), self._bm25, "sparse", n)[1][0]
        lexical = {place: i for i, place in enumerate(beside.tolist(), 1) if place >= 0}
        kept = [(score, place) for score, place in zip(scores[0].tolist(), places[0].tolist()) if place >= 0]
        texts = [c.passages[place] for _, place in kept]
        words = [" · ".join(w) for w in mask_words(self.retriever, texts, "passage")] if texts else []
        table = pd.DataFrame({"rank": range(1, 1 + len(kept)), "score": [score for score, _ in kept]})
        table["BM25"] = [str(lexical.get(place, "-")) for _, place in kept]
        return table.assign(passage_id=[c.passage_ids[place] for _, place in kept], words=words, text=texts)


def _ndcg(grades: Mapping[str, int], ranked: list[str]) -> float:
    """As ranx has it, which takes seconds to compile."""
    missing = [grade for passage, grade in grades.items() if grade > 0 and passage not in ranked]
    return float(ndcg(-np.arange(len(ranked)), np.array([grades.get(p, 0) for p in ranked]), missing=missing))


def _ranks(grades: Mapping[str, int], ranked: list[str]) -> str:
    """Ranks of the relevant passages in order, "-" for those that are not ranked."""
    places = [ranked.index(p) + 1 if p in ranked else None for p, grade in grades.items() if grade > 0]
    return ", ".join(str(place or "-") for place in sorted(places, key=lambda place: place or len(ranked) + 1))
