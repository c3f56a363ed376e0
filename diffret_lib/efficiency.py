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
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from diffret_lib import scoring
from diffret_lib.cache import fingerprint, remembered
from diffret_lib.prompts import Task, encode_plain
from diffret_lib.readers import NextTokens
from diffret_lib.reporting import Results, hardware, versions
from diffret_lib.representations import Representations
from diffret_lib.retrievers import DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, RepLLaMA, Retriever
from diffret_lib.study import METRIC, SELECTION_MODE, Study, macro

#: An index is not made when it would take a larger part of the memory that is free.
MEMORY_SHARE = 0.25
#: Passages of the index in the figure of effectiveness against latency, at most (the paper's 100K).
INDEXED_PASSAGES = 100_000
FORCED, ANSWERED = "forced", "as answered"
#: Part of the address of what was measured: raise it when something else is measured under the same settings.
MEASURING_VERSIONS = {"encoding_latency": 2, "search_latency": 3}


def measured(study: Study, measure: Callable[..., pd.DataFrame], *arguments: Any) -> pd.DataFrame:
    """``measure(study, *arguments)``, kept in the cache for this machine, these versions, backbones and settings.

    Latencies are the one result that a second run does not give again to the digit; so that a cached run of the
    notebooks takes no longer for it, it shows what was measured on the same machine before.
    """
    p, machine, name = study.profile, hardware(), measure.__name__
    backbones = [study.backbone(family).fingerprint for family in ("diffusion", "autoregressive")]
    key = fingerprint(
        MEASURING_VERSIONS.get(name), torch.get_num_threads(), name, list(arguments), p.efficiency.model_dump(),
        p.seed, backbones, versions(),
        {part: machine[part] for part in ("cpu", "cores_usable", "gpu", "system")},
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


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics, whatever the distribution; nan for fewer than six values."""
    low, high = stats.quantile_test(np.asarray(values, float), p=0.5).confidence_interval(0.95)
    return float(low), float(high)


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
        answered, forced = (PromptReps(parent, max_new_tokens=n, **limits) for _ in range(2))
        out["PromptReps multi", "autoregressive", 1 + n, FORCED] = _forced(forced)
        out["PromptReps multi", "autoregressive", 1 + n, ANSWERED] = answered
    if whole:
        out["DiffEmbed", "diffusion", 1, ""] = DiffEmbed(diffusion, **limits)
        out["Mean pooling", "autoregressive", 1, ""] = MeanPooledAR(parent, **limits)
        out["RepLLaMA", "autoregressive", 1, ""] = RepLLaMA(parent, **limits)
    return out


def _read(retriever: Retriever, texts: list[str], task: Task) -> dict[str, Any]:
    return retriever.reader(retriever.features(texts, task))


def encoding_latency(study: Study) -> pd.DataFrame:
    """Latency of encoding, tokenisation included: against the number of vectors, the text's length and the batch.

    All numbers of vectors are timed for a query of the shortest and a passage of the second length, one text at a
    time; other lengths and batches at the fewest and the most vectors.

    Returns
    -------
    DataFrame
        Columns curve ("vectors", "length", "batch"), system, family, side, vectors, decoding, text_tokens,
        batch_size, q1_ms, median_ms, q3_ms, ratio (median), ratio_q1, ratio_q3, ratio_low, ratio_high (95 % interval
        of the median, nan for fewer than six rounds) and relative_to: within each round, to DiffRetriever K = 1 and
        to PromptReps single, of the same side, length and batch.  The curve of a query against the number of vectors
        has the profile's ``query_repeats`` rounds.
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
        calls = {name: partial(_read, r, texts, side) for name, r in systems.items()}
        rounds = p.query_repeats if (curve, side) == ("vectors", "query") else p.repeats
        times = _timed(calls, rounds, device)
        for name, values in times.items():
            system, family, vectors, decoding = name
            own = (
                ("DiffRetriever", "diffusion", min(p.counts), "") if family == "diffusion"
                else ("PromptReps single", "autoregressive", 1, "")
            )  # fmt: skip
            q1, median, q3 = quartiles(np.array(values) * 1000)
            ratios = np.array(values) / np.array(times[own])
            r1, ratio, r3 = quartiles(ratios)
            low, high = median_interval(ratios)
            rows.append(
                {"curve": curve, "system": system, "family": family, "side": "query" if side == "query" else "passage",
                 "vectors": vectors, "decoding": decoding, "text_tokens": tokens, "batch_size": batch,
                 "q1_ms": q1, "median_ms": median, "q3_ms": q3, "ratio": ratio, "ratio_q1": r1, "ratio_q3": r3,
                 "ratio_low": low, "ratio_high": high,
                 "relative_to": f"DiffRetriever K={min(p.counts)}" if family == "diffusion" else "PromptReps single"}
            )  # fmt: skip
    return pd.DataFrame(rows)


def claim4_ratios(encoding: pd.DataFrame, counts: Sequence[int]) -> pd.DataFrame:
    """Several vectors of a query against one, out of :func:`encoding_latency`.

    Returns
    -------
    DataFrame
        Columns comparison, ratio (median), ratio_low, ratio_high (its 95 % interval over the rounds), vectors_a,
        vectors_b and decoding.
    """
    latency = encoding[(encoding["curve"] == "vectors") & (encoding["side"] == "query")]
    masks = latency[(latency["system"] == "DiffRetriever") & (latency["vectors"] > min(counts))]
    masks = masks.sort_values("vectors", ascending=False)
    decoded = latency[(latency["system"] == "PromptReps multi") & latency["vectors"].isin([1 + max(counts), 5])]
    rows = [(f"DiffRetriever K={row.vectors} / K={min(counts)}", row, min(counts)) for row in masks.itertuples()]
    rows += [
        (f"PromptReps N={row.vectors - 1} / single" + (f", {row.decoding}" if row.decoding == ANSWERED else ""), row, 1)
        for row in decoded.sort_values(["decoding", "vectors"], ascending=False).itertuples()
    ]
    return pd.DataFrame(
        [
            {"comparison": name, "ratio": row.ratio, "ratio_low": row.ratio_low, "ratio_high": row.ratio_high,
             "vectors_a": row.vectors, "vectors_b": other, "decoding": row.decoding}
            for name, row, other in rows
        ]
    )  # fmt: skip


# -- search ------------------------------------------------------------------------------------------------


#: An index: its kind, passages, and the vectors of a query and of a passage.
Index = tuple[str, int, int, int]
SINGLE, SINGLE_FAISS, MAXSIM, SPARSE = "dense, single", "dense, single (faiss)", "MaxSim", "sparse"


def search_latency(study: Study, selected: tuple[int, int], others: Sequence[tuple[int, int]] = ()) -> pd.DataFrame:
    """Latency of an exact search for one query, top 100, against the number of vectors in the index.

    Dense vectors are random (the time does not depend on them); sparse rows are drawn from those of the first
    test collection.  A passage has one vector, or Kp of the selected pair.  At last all kinds search the same number
    of passages, as many as the largest MaxSim index has, and the pairs ``others`` with them.

    Returns
    -------
    DataFrame
        Columns index, vectors, passages, k_query, k_passage, q1_ms, median_ms, q3_ms and note: why an index was
        left out.
    """
    rng, collection = np.random.default_rng(study.profile.seed), study.test_collections[0]
    sides = [study.encode(study.diffretriever(1, 1), collection, task).sparse for task in ("query", "document")]
    sides[0] = sides[0][:1]
    rows: list[dict[str, Any]] = []
    for size in sorted(study.profile.efficiency.index_sizes):
        indexes = [(kind, size, 1, 1) for kind in (SINGLE, SINGLE_FAISS, SPARSE)]
        rows += _search_run(study, [*indexes, (MAXSIM, max(1, size // selected[1]), *selected)], sides, rng)
    largest = [r["passages"] for r in rows if r["index"] == MAXSIM and not r["note"]]
    if not largest:
        return pd.DataFrame(rows)
    passages = min(max(largest), INDEXED_PASSAGES)
    indexes = [(kind, passages, 1, 1) for kind in (SINGLE, SINGLE_FAISS, SPARSE)]
    indexes += [(MAXSIM, passages, *pair) for pair in dict.fromkeys((tuple(selected), *map(tuple, others)))]
    again = _search_run(study, indexes, sides, rng)
    own = ["index", "passages", "k_query", "k_passage"]
    return pd.DataFrame(rows + again).drop_duplicates(own, keep="last", ignore_index=True)


def _search_run(
    study: Study, indexes: Sequence[Index], sides: Sequence[sp.csr_matrix], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A row for each index, all timed in turn, but for those that would take too much memory."""
    hidden, free = study.backbone("diffusion").model.config.hidden_size, psutil.virtual_memory().available
    asked, known = sides
    needed = {
        i: i[1] * (8 * known.nnz / known.shape[0] if i[0] == SPARSE else 4 * i[3] * hidden) for i in indexes
    }
    fitting = [i for i in indexes if needed[i] <= MEMORY_SHARE * free]
    vectors = _normal(rng, max([n * kp for kind, n, _, kp in fitting if kind != SPARSE], default=0), hidden)
    queries = _normal(rng, max(i[2] for i in indexes), hidden)
    calls: dict[Index, Callable[[], object]] = {}
    for index in fitting:
        kind, n, kq, kp = index
        if kind == SPARSE:
            passages = _sparse(known[rng.integers(0, known.shape[0], n)])
            calls[index] = partial(scoring.sparse_search, _sparse(asked), passages, 100)
        elif kind == SINGLE_FAISS:
            flat = faiss.IndexFlatIP(hidden)
            flat.add(vectors[:n])
            calls[index] = partial(flat.search, queries[:1], min(100, n))
        else:
            search = scoring.single_search if kind == SINGLE else scoring.maxsim_search
            passages = _dense(vectors[: n * kp].reshape(n, kp, hidden))
            calls[index] = partial(search, _dense(queries[None, :kq]), passages, 100)
    times = _timed(calls, study.profile.efficiency.repeats, torch.device("cpu"))
    return [
        _index_row(*i, times=times[i]) if i in times
        else _index_row(*i, note=f"left out: {needed[i] / 1e9:.1f} GB of vectors, {free / 1e9:.1f} GB free")
        for i in indexes
    ]  # fmt: skip


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


def read_effectiveness(results: Results) -> pd.DataFrame:
    """``evaluation.csv``, as notebook 04 wrote it.

    Raises
    ------
    FileNotFoundError
        When it is not there; the message has the command that makes it.
    """
    path = results.tables / "evaluation.csv"
    if not path.is_file():
        command = f"python -m diffret_lib.reproduce 04_evaluation --profile {results.profile_name}"
        raise FileNotFoundError(f"{path} is not there; notebook 04 writes it: {command}")
    return pd.read_csv(path).astype({"k_query": "Int64", "k_passage": "Int64"})


def pairs_of(effectiveness: pd.DataFrame) -> list[tuple[int, int]]:
    """The pairs (Kq, Kp) of the systems with several vectors a text."""
    pairs = effectiveness[["k_query", "k_passage"]].dropna().drop_duplicates().astype(int)
    return [(q, p) for q, p in pairs.itertuples(index=False, name=None) if (q, p) != (1, 1)]


def effectiveness_latency(
    encoding: pd.DataFrame, search: pd.DataFrame, effectiveness: pd.DataFrame, out_of_domain: Sequence[str]
) -> pd.DataFrame:
    """Effectiveness of each system beside its latency: encoding a query, and searching (the paper's Figure 1).

    All systems search the same number of passages, the most at which every kind of index was timed.  A fine-tuned
    system costs what its backbone costs, the adapter being merged.

    Parameters
    ----------
    encoding, search : DataFrame
        Of :func:`encoding_latency` and :func:`search_latency`.
    effectiveness : DataFrame
        Of :func:`read_effectiveness`.
    out_of_domain : sequence of str
        Collections of the macro average.

    Returns
    -------
    DataFrame
        Columns training, system, mode (hybrid, or dense where there is no hybrid), ndcg, timed_vectors (of the
        encoding that was timed: the least count that is not below the system's), encoding_ms, search_ms, latency_ms
        and indexed_passages.  A system whose encoding or index was not timed (BM25) is left out.
    """
    cells = effectiveness[(effectiveness["metric"] == METRIC) & effectiveness["collection"].isin(out_of_domain)]
    values = macro(cells, ["training", "system", "mode", "k_query", "k_passage"])
    timed = encoding[(encoding["curve"] == "vectors") & (encoding["side"] == "query")]
    found = search[search["median_ms"].notna() & (search["passages"] <= INDEXED_PASSAGES)]
    common = set.intersection(*(set(found[found["index"] == k]["passages"]) for k in (SINGLE_FAISS, MAXSIM, SPARSE)))
    rows = []
    for (training, system), group in values.groupby(["training", "system"], sort=False):
        mode = SELECTION_MODE if SELECTION_MODE in set(group["mode"]) else "dense"
        chosen = group[group["mode"] == mode]
        if chosen.empty or not common:
            continue
        row = chosen.iloc[0]
        kq, kp = (1 if pd.isna(row[c]) else int(row[c]) for c in ("k_query", "k_passage"))
        read = timed[(timed["system"] == _timed_name(system)) & (timed["decoding"] != FORCED)]
        read = read[read["vectors"] >= kq]
        indexes = found[found["passages"] == max(common)]
        dense = indexes[
            (indexes["index"] == (SINGLE_FAISS if kq == kp == 1 else MAXSIM))
            & (indexes["k_query"] == kq) & (indexes["k_passage"] == kp)
        ]  # fmt: skip
        if read.empty or dense.empty:
            continue
        read = read.nsmallest(1, "vectors").iloc[0]
        sparse = indexes[indexes["index"] == SPARSE]["median_ms"].item() if mode == SELECTION_MODE else 0.0
        searching = dense["median_ms"].item() + sparse
        rows.append(
            {"training": training, "system": system, "mode": mode, "ndcg": row["value"],
             "timed_vectors": int(read["vectors"]), "encoding_ms": read["median_ms"], "search_ms": searching,
             "latency_ms": read["median_ms"] + searching, "indexed_passages": int(max(common))}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _timed_name(system: str) -> str:
    """What a system of the tables is called in :func:`encoding_latency`."""
    for name in ("DiffRetriever", "PromptReps multi"):
        if system.startswith(name):
            return name
    return system
