"""Latency: encoding one text by every system, and searching indexes of growing size (claim 4).

Everything that is compared is timed in one run, in turn: each call is warmed up once, then come the rounds, every
other one backwards, so that a drift of the machine cancels.  A ratio is taken within each round first.  On a GPU
the time is that between CUDA events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import faiss
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffret_lib import scoring
from diffret_lib.cache import fingerprint, remembered
from diffret_lib.prompts import Task, encode_plain
from diffret_lib.readers import NextTokens, Reader
from diffret_lib.reporting import hardware, versions
from diffret_lib.representations import Representations
from diffret_lib.retrievers import DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps
from diffret_lib.study import METRIC, SELECTION_MODE, Study, macro

#: An index is not made when it would take a larger part of the memory that is free.
MEMORY_SHARE = 0.25
#: Passages of the index in the figure of effectiveness against latency, at most (the paper's 100K).
INDEXED_PASSAGES = 100_000
FORCED, ANSWERED = "forced", "as answered"


def measured(study: Study, measure: Callable[..., pd.DataFrame], *arguments: Any) -> pd.DataFrame:
    """``measure(study, *arguments)``, kept in the cache for this machine, these versions, backbones and settings.

    Latencies are the one result that a second run does not give again to the digit; so that a cached run of the
    notebooks takes no longer for it, it shows what was measured on the same machine before.
    """
    p, machine = study.profile, hardware()
    backbones = [study.backbone(family).fingerprint for family in ("diffusion", "autoregressive")]
    key = fingerprint(
        measure.__name__, list(arguments), p.efficiency.model_dump(), p.seed, backbones, versions(),
        {name: machine[name] for name in ("cpu", "cores_usable", "gpu", "system")},
        [c.fingerprint for c in study.test_collections[:1]],
    )  # fmt: skip
    return pd.DataFrame(remembered("latency", key, lambda: measure(study, *arguments).to_dict("list")))


# -- timing ------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call; on a GPU those between two CUDA events."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def interleaved(
    calls: Mapping[Hashable, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Hashable, list[float]]:
    """Seconds of each call in each round; every other round goes backwards."""
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    with tqdm(total=rounds * len(calls), desc="measuring", unit="run") as bar:
        for number in range(rounds):
            for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
                times[name].append(seconds(calls[name], device))
                bar.update()
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    q1, median, q3 = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return float(q1), float(median), float(q3)


def _timed(
    calls: Mapping[Hashable, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Hashable, list[float]]:
    with torch.inference_mode():
        for call in calls.values():
            call()
        return interleaved(calls, repeats, device)


# -- encoding ----------------------------------------------------------------------------------------------


class ForcedTokens(NextTokens):
    """PromptReps' reader that decodes all of its ``max_new_tokens``, whatever ends an answer."""

    def ends_answer(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool)


def _forced(retriever: PromptReps) -> PromptReps:
    reader = retriever.reader
    retriever.reader = ForcedTokens(reader.model, reader.tokenizer, **reader.get_config_dict()).eval()
    return retriever


def long_texts(study: Study, tokens: int, count: int) -> list[str]:
    """Different texts of at least ``tokens`` tokens each, made of the first test collection's passages."""
    passages, tokenizer = study.test_collections[0].passages, study.backbone("diffusion").tokenizer
    texts, place = [], 0
    while len(texts) < count:
        text = ""
        while len(encode_plain(tokenizer, [text])[0]) < tokens:
            text += f"{passages[place % len(passages)]} {place} "
            place += 1
        texts.append(text)
    return texts


def _systems(study: Study, counts: Sequence[int], tokens: int, whole: bool) -> dict[tuple[str, str, int, str], Any]:
    """Retrievers by (system, family, vectors, decoding); all counts, or (not ``whole``) the least and the most."""
    limits = {"max_query_tokens": tokens, "max_passage_tokens": tokens}
    diffusion, parent = study.backbone("diffusion"), study.backbone("autoregressive")
    ks = sorted(counts) if whole else sorted({min(counts), max(counts)})
    ns = sorted(counts) if whole else [max(counts)]
    out: dict[tuple[str, str, int, str], Any] = {
        ("DiffRetriever", "diffusion", k, ""): DiffRetriever(diffusion, k_query=k, k_passage=k, **limits) for k in ks
    }
    out["PromptReps single", "autoregressive", 1, ""] = PromptReps(parent, **limits)
    for n in ns:
        for decoding, change in ((FORCED, _forced), (ANSWERED, lambda retriever: retriever)):
            retriever = PromptReps(parent, max_new_tokens=n, **limits)
            out["PromptReps multi", "autoregressive", 1 + n, decoding] = change(retriever)
    if whole:
        out["DiffEmbed", "diffusion", 1, ""] = DiffEmbed(diffusion, **limits)
        out["Mean pooling", "autoregressive", 1, ""] = MeanPooledAR(parent, **limits)
    return out


def _read(reader: Reader, texts: list[str], task: Task, device: torch.device) -> dict[str, Any]:
    features = reader.preprocess(texts, task=task)
    return reader({k: v.to(device) if torch.is_tensor(v) else v for k, v in features.items()})


def encoding_latency(study: Study) -> pd.DataFrame:
    """Latency of encoding, tokenisation included: against the number of vectors, the text's length and the batch.

    All numbers of vectors are timed for a query of the shortest and a passage of the second length, one text at a
    time; other lengths and batches at the fewest and the most vectors.

    Returns
    -------
    DataFrame
        Columns curve ("vectors", "length", "batch"), system, family, side, vectors, decoding, text_tokens,
        batch_size, q1_ms, median_ms, q3_ms, ratio, ratio_q1, ratio_q3 and relative_to: within each round, to
        DiffRetriever K = 1 and to PromptReps single, of the same side, length and batch.
    """
    p = study.profile.efficiency
    lengths = sorted(p.text_tokens)
    middle = lengths[min(1, len(lengths) - 1)]
    designs = [("vectors", "query", lengths[0], 1), ("vectors", "document", middle, 1)]
    designs += [("length", "document", n, 1) for n in lengths]
    designs += [("batch", "document", middle, b) for b in sorted(p.batch_sizes)]
    rows, device = [], study.backbone("diffusion").device
    for curve, side, tokens, batch in designs:
        systems = _systems(study, p.counts, tokens, curve == "vectors")
        texts = long_texts(study, tokens, batch)
        calls = {name: partial(_read, r.reader, texts, side, device) for name, r in systems.items()}
        times = _timed(calls, p.repeats, device)
        for name, values in times.items():
            system, family, vectors, decoding = name
            own = (
                ("DiffRetriever", "diffusion", min(p.counts), "") if family == "diffusion"
                else ("PromptReps single", "autoregressive", 1, "")
            )  # fmt: skip
            q1, median, q3 = quartiles(np.array(values) * 1000)
            r1, ratio, r3 = quartiles(np.array(values) / np.array(times[own]))
            rows.append(
                {"curve": curve, "system": system, "family": family, "side": "query" if side == "query" else "passage",
                 "vectors": vectors, "decoding": decoding, "text_tokens": tokens, "batch_size": batch,
                 "q1_ms": q1, "median_ms": median, "q3_ms": q3, "ratio": ratio, "ratio_q1": r1, "ratio_q3": r3,
                 "relative_to": f"DiffRetriever K={min(p.counts)}" if family == "diffusion" else "PromptReps single"}
            )  # fmt: skip
    return pd.DataFrame(rows)


def claim4_ratios(encoding: pd.DataFrame, counts: Sequence[int]) -> pd.DataFrame:
    """Several vectors of a query against one, out of :func:`encoding_latency`.

    Returns
    -------
    DataFrame
        Columns comparison, ratio (median), ratio_low, ratio_high (quartiles over the rounds), vectors_a, vectors_b
        and decoding.
    """
    latency = encoding[(encoding["curve"] == "vectors") & (encoding["side"] == "query")]
    masks = latency[(latency["system"] == "DiffRetriever") & (latency["vectors"] == max(counts))]
    decoded = latency[(latency["system"] == "PromptReps multi") & latency["vectors"].isin([1 + max(counts), 5])]
    rows = [(f"DiffRetriever K={row.vectors} / K={min(counts)}", row, min(counts)) for row in masks.itertuples()]
    rows += [
        (f"PromptReps N={row.vectors - 1} / single" + (f", {row.decoding}" if row.decoding == ANSWERED else ""), row, 1)
        for row in decoded.sort_values(["decoding", "vectors"], ascending=False).itertuples()
    ]
    return pd.DataFrame(
        [
            {"comparison": name, "ratio": row.ratio, "ratio_low": row.ratio_q1, "ratio_high": row.ratio_q3,
             "vectors_a": row.vectors, "vectors_b": other, "decoding": row.decoding}
            for name, row, other in rows
        ]
    )  # fmt: skip


# -- search ------------------------------------------------------------------------------------------------


def search_latency(study: Study, selected: tuple[int, int]) -> pd.DataFrame:
    """Latency of an exact search for one query, top 100, against the number of vectors in the index.

    Dense vectors are random (the time does not depend on them); sparse rows are drawn from those of the first
    test collection.  A passage has one vector, or Kp of the selected pair.

    Returns
    -------
    DataFrame
        Columns index, vectors, passages, k_query, k_passage, q1_ms, median_ms, q3_ms and note: why a size was
        left out.
    """
    rows, rng = [], np.random.default_rng(study.profile.seed)
    kq, kp = selected
    hidden = study.backbone("diffusion").model.config.hidden_size
    known = study.encode(study.diffretriever(1, 1), study.test_collections[0], "document").sparse
    asked = study.encode(study.diffretriever(1, 1), study.test_collections[0], "query").sparse[:1]
    for size in sorted(study.profile.efficiency.index_sizes):
        kinds = dict.fromkeys(("dense, single", "dense, single (faiss)", "MaxSim", "sparse"), (size, 1, 1))
        kinds["MaxSim"] = (max(1, size // kp), kq, kp)
        needed, free = 4 * size * hidden, psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            note = f"left out: {needed / 1e9:.1f} GB of vectors, {free / 1e9:.1f} GB free"
            rows += [_index_row(kind, *shape, note=note) for kind, shape in kinds.items()]
            continue
        vectors = _normal(rng, size, hidden)
        queries = _normal(rng, kq, hidden)
        flat = faiss.IndexFlatIP(hidden)
        flat.add(vectors)
        single, passages = _dense(vectors[:, None]), kinds["MaxSim"][0]
        multi = _dense(vectors[: passages * kp].reshape(passages, -1, hidden))
        sparse = _sparse(known[rng.integers(0, known.shape[0], size)])
        calls = {
            "dense, single": partial(scoring.single_search, _dense(queries[:1, None]), single, 100),
            "dense, single (faiss)": partial(flat.search, queries[:1], min(100, size)),
            "MaxSim": partial(scoring.maxsim_search, _dense(queries[None]), multi, 100),
            "sparse": partial(scoring.sparse_search, _sparse(asked), sparse, 100),
        }
        times = _timed(calls, study.profile.efficiency.repeats, torch.device("cpu"))
        rows += [_index_row(kind, *kinds[kind], times=values) for kind, values in times.items()]
    return pd.DataFrame(rows)


def _index_row(
    kind: str, passages: int, kq: int, kp: int, times: Sequence[float] | None = None, note: str = ""
) -> dict[str, Any]:
    q1, median, q3 = quartiles(np.array(times) * 1000) if times is not None else (np.nan,) * 3
    return {"index": kind, "vectors": passages * kp, "passages": passages, "k_query": kq, "k_passage": kp,
            "q1_ms": q1, "median_ms": median, "q3_ms": q3, "note": note}  # fmt: skip


def _normal(rng: np.random.Generator, n: int, hidden: int) -> np.ndarray:
    vectors = rng.standard_normal((n, hidden), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _dense(vectors: np.ndarray) -> Representations:
    return Representations(vectors, np.full(len(vectors), vectors.shape[1]), None)


def _sparse(rows: sp.csr_matrix) -> Representations:
    return Representations(None, np.zeros(rows.shape[0], np.int64), rows)


# -- effectiveness against latency -----------------------------------------------------------------------------


def effectiveness_latency(
    encoding: pd.DataFrame,
    search: pd.DataFrame,
    effectiveness: pd.DataFrame,
    selected: tuple[int, int],
    out_of_domain: Sequence[str],
    decoded: int,
) -> pd.DataFrame:
    """Zero-shot effectiveness of each system beside its latency: encoding a query, and searching (the paper's Figure 1).

    Parameters
    ----------
    encoding, search : DataFrame
        Of :func:`encoding_latency` and :func:`search_latency`.
    effectiveness : DataFrame
        Columns system, mode, collection, metric, value (``zero_shot.csv``).
    selected : (int, int)
        The pair of DiffRetriever multi.  Its encoding is that of the least timed count that is not below Kq.
    out_of_domain : sequence of str
        Collections of the macro average.
    decoded : int
        Tokens that PromptReps multi decodes, as its answers have it.

    Returns
    -------
    DataFrame
        Columns system, mode, ndcg, encoding_ms, search_ms, latency_ms and indexed_vectors: of the largest index of no
        more than :data:`INDEXED_PASSAGES` vectors, with MaxSim for several vectors, faiss for one.
    """
    cells = effectiveness[(effectiveness["metric"] == METRIC) & effectiveness["collection"].isin(out_of_domain)]
    values = macro(cells, ["system", "mode"]).set_index(["system", "mode"])["value"]
    timed = encoding[(encoding["curve"] == "vectors") & (encoding["side"] == "query")]
    masks = sorted(timed[timed["system"] == "DiffRetriever"]["vectors"])
    nearest = min((k for k in masks if k >= selected[0]), default=masks[-1])
    chosen = {
        "DiffRetriever single": ("DiffRetriever", masks[0], "", False),
        "DiffRetriever multi": ("DiffRetriever", nearest, "", True),
        "PromptReps single": ("PromptReps single", 1, "", False),
        f"PromptReps multi (N={decoded})": ("PromptReps multi", 1 + decoded, ANSWERED, True),
        "DiffEmbed": ("DiffEmbed", 1, "", False),
        "Mean pooling": ("Mean pooling", 1, "", False),
    }
    indexes = search[search["median_ms"].notna() & (search["vectors"] <= INDEXED_PASSAGES)]
    rows = []
    for name, (system, vectors, decoding, several) in chosen.items():
        found = timed[(timed["system"] == system) & (timed["vectors"] == vectors) & (timed["decoding"] == decoding)]
        mode = SELECTION_MODE if (name, SELECTION_MODE) in values else "dense"
        if found.empty or (name, mode) not in values:
            continue
        kinds = ["MaxSim" if several else "dense, single (faiss)", *(["sparse"] if mode == SELECTION_MODE else [])]
        sizes = [indexes[indexes["index"] == kind].nlargest(1, "vectors") for kind in kinds]
        row = {"system": name, "mode": mode, "ndcg": values[name, mode], "encoding_ms": found["median_ms"].item()}
        row["search_ms"] = float(sum(s["median_ms"].item() for s in sizes))
        row["latency_ms"] = row["encoding_ms"] + row["search_ms"]
        rows.append(row | {"indexed_vectors": int(sizes[0]["vectors"].item())})
    return pd.DataFrame(rows)
