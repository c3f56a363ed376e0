"""Reading what masks and decoded tokens say: predicted words, how alike vectors are, and one query looked into."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from diffret_lib.addresses import address
from diffret_lib.cache import remember
from diffret_lib.data.collection import Collection
from diffret_lib.experiments.study import Study
from diffret_lib.models.prompts import ENGLISH_STOP_WORDS, SIDES, Side, content_words
from diffret_lib.retrieval.metrics import METRIC, per_query
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import RANK_MODES, rank, to_results
from diffret_lib.retrieval.systems import Retriever


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
        "parent, next token": study.promptreps(0), "parent, decoded": study.promptreps(4),
    }  # fmt: skip
    words, shares = pd.DataFrame({"passage": [text[:60].replace("\n", " ") + " ..." for text in texts]}), []
    for name, retriever in readings.items():
        rows = predicted_tokens(retriever, texts)
        words[name] = [_joined(row, " ") for row in rows]
        shares.append({"reading": name, **pd.DataFrame(map(share_of_content, rows, texts)).mean()})
    return words, pd.DataFrame(shares)


def reading_table(study: Study, texts: Sequence[str], side: Side) -> pd.DataFrame:
    """Tokens that DiffRetriever (K = 1, 4) and PromptReps (single, multi) read, one row a text."""
    n = study.profile.promptreps_max_tokens
    readings = {
        "DiffRetriever K=1": study.diffretriever(1, 1), "DiffRetriever K=4": study.diffretriever(4, 4),
        "PromptReps single": study.promptreps(0), f"PromptReps multi (N={n})": study.promptreps(n),
    }  # fmt: skip
    table = pd.DataFrame({"text": [t[:70].replace("\n", " ") for t in texts]})
    for name, retriever in readings.items():
        table[name] = [_joined(row, "·") for row in predicted_tokens(retriever, texts, side)]
    return table


def _joined(tokens: Sequence[str], by: str) -> str:
    return by.join(t.strip() or "␣" for t in tokens)


def read_out_table(study: Study) -> pd.DataFrame:
    """nDCG@10 on the development collection in RANK_MODES, reading token i at position i - 1 (shifted) or at i."""
    collection, rows = study.development, []
    for k, shifted in product((1, 4), (True, False)):
        runs = study.runs(study.diffretriever(k, k, shifted=shifted), collection, RANK_MODES)
        ndcg = {mode: float(per_query(collection.qrels, run, (METRIC,))[METRIC].mean()) for mode, run in runs.items()}
        rows.append({"read_out": "i - 1 (shifted)" if shifted else "i (not shifted)", "K": k} | ndcg)
    return pd.DataFrame(rows)


def self_similarity_table(study: Study, collection: Collection) -> pd.DataFrame:
    """How alike a passage's vectors are: columns system, vectors, cosine (mean), vectors used (mean)."""
    n, rows = study.profile.promptreps_max_tokens, []
    systems = [("DiffRetriever", k, study.diffretriever(k, k)) for k in study.profile.k_grid[1:]]
    for name, count, retriever in [*systems, ("PromptReps multi", 1 + n, study.promptreps(n))]:
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
    return [
        [f"{i} {t if t.isprintable() else ascii(t)[1:-1]}" for i, t in enumerate((t.strip() or "␣" for t in row), 1)]
        for row in predicted_tokens(retriever, texts, side)
    ]


def alignment(retriever: Retriever, query: str, passage: str) -> pd.DataFrame:
    """Dot products of a query's vectors with a passage's, of a retriever that predicts tokens: what MaxSim is made of.

    float32, shape (vectors of the query, vectors of the passage); index and columns as of :func:`mask_words`.  The
    rows' maxima, each clamped at 0, sum up to the score of :func:`diffret_lib.retrieval.search.maxsim_search`.
    """
    vectors, names = [], []
    for side, text in zip(SIDES, (query, passage), strict=True):
        encoded = retriever.encode([text], side, progress=False)
        vectors.append(np.asarray(encoded.dense[0, : encoded.lengths[0]]))
        names.append(pd.Index(mask_words(retriever, [text], side)[0], name=f"masks of the {side}"))
    return pd.DataFrame(vectors[0] @ vectors[1].T, *names)


def explain(
    retriever: Retriever, collection: Collection, passages: Representations, query: str, top_k: int, mode: str = "dense"
) -> pd.DataFrame:
    """The best passages for any query text: columns rank (from 1), score, passage_id, words (at the masks), text.

    A sparse search leaves out passages that share no term.  ValueError: ``passages`` are not the collection's.
    """
    if len(passages) != len(collection.passages):
        raise ValueError(f"{len(passages)} encodings for {len(collection.passages)} passages of {collection.name}")
    queries = retriever.encode_queries([query], progress=False)
    found = to_results(*rank(queries, passages, mode, top_k), ["query"], collection.passage_ids)["query"]
    place = {passage_id: i for i, passage_id in enumerate(collection.passage_ids)}
    texts = [collection.passages[place[i]] for i in found]
    words = [" · ".join(w) for w in mask_words(retriever, texts, "passage")]
    table = pd.DataFrame({"rank": range(1, 1 + len(found)), "score": found.values(), "passage_id": found.keys()})
    return table.assign(words=words, text=texts)
