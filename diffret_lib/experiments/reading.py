"""Reading what masks and decoded tokens say: predicted words, how alike vectors are, and one query looked into."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from diffret_lib.addresses import address
from diffret_lib.cache import remember
from diffret_lib.data.collection import Collection
from diffret_lib.experiments.study import Study, ranking
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
    """What one mask and four masks predict for passages, beside the parent's next token and its answer.

    Two tables: the words, one row a passage; for each reading the mean of :func:`share_of_content`.
    """
    readings = {
        "one mask": study.diffretriever(1, 1),
        "four masks": study.diffretriever(4, 4),
        "parent, next token": study.promptreps(0),
        "parent, decoded": study.promptreps(4),
    }
    words = pd.DataFrame({"passage": [text[:60].replace("\n", " ") + " ..." for text in texts]})
    shares = []
    for name, retriever in readings.items():
        rows = predicted_tokens(retriever, texts)
        words[name] = [_joined(row, " ") for row in rows]
        measured = pd.DataFrame([share_of_content(r, t) for r, t in zip(rows, texts, strict=True)]).mean()
        shares.append({"reading": name, **measured})
    return words, pd.DataFrame(shares)


def reading_table(study: Study, texts: Sequence[str], side: Side) -> pd.DataFrame:
    """Tokens that DiffRetriever (K = 1, 4) and PromptReps (single, multi) read, one row a text."""
    n = study.profile.promptreps_max_tokens
    columns = {
        "DiffRetriever K=1": study.diffretriever(1, 1),
        "DiffRetriever K=4": study.diffretriever(4, 4),
        "PromptReps single": study.promptreps(0),
        f"PromptReps multi (N={n})": study.promptreps(n),
    }
    table = pd.DataFrame({"text": [t[:70].replace("\n", " ") for t in texts]})
    for name, retriever in columns.items():
        table[name] = [_joined(row, "·") for row in predicted_tokens(retriever, texts, side)]
    return table


def _joined(tokens: Sequence[str], by: str) -> str:
    return by.join(t.strip() or "␣" for t in tokens)


def read_out_table(study: Study, counts: Sequence[int] = (1, 4)) -> pd.DataFrame:
    """nDCG@10 on the development collection, reading token i at position i - 1 (shifted) or at i.

    Columns read_out, K, dense, mean (dot product of the mean vectors), sparse, hybrid.
    """
    collection, rows = study.development, []
    for k in counts:
        for shifted in (True, False):
            retriever = study.diffretriever(k, k, shifted=shifted)

            def values(retriever: Retriever = retriever) -> dict[str, float]:
                sides = [study.encode(retriever, collection, side) for side in SIDES]
                return read_out_values(*sides, collection, study.profile.top_k)

            key = study.address([retriever], collection, code=[read_out_values])
            name = "i - 1 (shifted)" if shifted else "i (not shifted)"
            rows.append({"read_out": name, "K": k} | remember("read_out", key, values))
    return pd.DataFrame(rows)


def read_out_values(
    queries: Representations, passages: Representations, collection: Collection, top_k: int
) -> dict[str, float]:
    """Mean nDCG@10 of encodings in each of :data:`RANK_MODES`."""
    runs = {mode: ranking(queries, passages, collection, mode, top_k) for mode in RANK_MODES}
    return {mode: float(per_query(collection.qrels, run, (METRIC,))[METRIC].mean()) for mode, run in runs.items()}


def self_similarity_table(study: Study, collection: Collection) -> pd.DataFrame:
    """How alike a passage's vectors are: columns system, vectors, cosine (mean), vectors used (mean)."""
    n, rows = study.profile.promptreps_max_tokens, []
    systems = [("DiffRetriever", k, study.diffretriever(k, k)) for k in study.profile.k_grid[1:]]
    for name, count, retriever in [*systems, ("PromptReps multi", 1 + n, study.promptreps(n))]:
        vectors = study.encode(retriever, collection, "passage")
        cosine = mean_self_similarity(vectors)
        rows.append({"system": name, "vectors": count, "cosine": cosine, "vectors used": vectors.lengths.mean()})
    return pd.DataFrame(rows)


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
        [f"{i} {_visible(token.strip()) or '␣'}" for i, token in enumerate(row, 1)]
        for row in predicted_tokens(retriever, texts, side)
    ]


def _visible(token: str) -> str:
    return token if token.isprintable() else ascii(token)[1:-1]


def alignment(retriever: Retriever, query: str, passage: str) -> pd.DataFrame:
    """Dot products of a query's vectors with a passage's: what MaxSim is made of.

    The retriever is one that predicts tokens (DiffRetriever, PromptReps).  The sum of the rows' maxima, each clamped
    at 0, is the score of :func:`diffret_lib.retrieval.search.maxsim_search`.

    Returns
    -------
    DataFrame of float32, shape (vectors of the query, vectors of the passage)
        Index and columns are the positions and their predicted words, as of :func:`mask_words`.
    """
    vectors, names = [], []
    for side, text in zip(SIDES, (query, passage), strict=True):
        encoded = retriever.encode([text], side, progress=False)
        vectors.append(np.asarray(encoded.dense[0, : encoded.lengths[0]]))
        names.append(pd.Index(mask_words(retriever, [text], side)[0], name=f"masks of the {side}"))
    return pd.DataFrame(vectors[0] @ vectors[1].T, *names)


def explain(
    retriever: Retriever,
    collection: Collection,
    query: str,
    top_k: int = 5,
    mode: str = "dense",
    passages: Representations | None = None,
) -> pd.DataFrame:
    """The best passages for any query text, with the words at their masks.

    Columns rank (from 1), score, passage_id, words, text.  A sparse search leaves out passages that share no term.
    ``passages`` are the collection's, encoded before (ValueError when they are not as many); otherwise they are
    encoded now.
    """
    if passages is None:
        passages = retriever.encode_passages(collection.passages)
    if len(passages) != len(collection.passages):
        raise ValueError(
            f"{len(passages)} representations for the {len(collection.passages)} passages of {collection.name}: "
            "encode the passages of this collection"
        )
    queries = retriever.encode_queries([query], progress=False)
    found = to_results(*rank(queries, passages, mode, top_k), ["query"], collection.passage_ids)["query"]
    place = {passage_id: i for i, passage_id in enumerate(collection.passage_ids)}
    texts = [collection.passages[place[i]] for i in found]
    words = [" · ".join(w) for w in mask_words(retriever, texts, "passage")]
    table = pd.DataFrame({"rank": range(1, 1 + len(found)), "score": found.values(), "passage_id": found.keys()})
    return table.assign(words=words, text=texts)
