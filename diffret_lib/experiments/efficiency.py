"""Latency: encoding one text by every system, and searching indexes of growing size (claim 4).

All that is compared is timed in one run, in turn, every other round backwards, so that a drift of the machine cancels.
A ratio is taken within each round first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
import torch
from scipy import stats
from tqdm import trange

from diffret_lib.addresses import address
from diffret_lib.cache import remember
from diffret_lib.environment import hardware
from diffret_lib.experiments.study import Study, macro
from diffret_lib.models.prompts import encode_plain
from diffret_lib.retrieval.metrics import METRIC
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import SELECTION_MODE, maxsim_search, sparse_search
from diffret_lib.retrieval.systems import DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, RepLLaMA, Retriever

#: An index is not made when it would take a larger part of the memory that is free.
MEMORY_SHARE = 0.25
#: Passages of the index in the figure of effectiveness against latency, at most (the paper's 100K).
INDEXED_PASSAGES = 100_000
#: Decoding of PromptReps (all N tokens, or until its answer ends), and kinds of index.
FORCED, ANSWERED = "forced", "as answered"
SINGLE_FAISS, MAXSIM, SPARSE = "dense, single (faiss)", "MaxSim", "sparse"


def measured(study: Study, measure: Callable[..., pd.DataFrame], *arguments: Any) -> pd.DataFrame:
    """Return ``measure(study, *arguments)``, measured once for a machine, its versions, the code and the settings."""
    p, found = study.profile, hardware()
    machine = {part: found[part] for part in ("cpu", "cores_usable", "gpu", "system")}
    backbones = [(b.fingerprint, b.device.type) for b in map(study.backbone, ("diffusion", "autoregressive"))]
    key = address(
        [measure], list(arguments), p.efficiency.model_dump(), p.seed, backbones, study.test_collections[0].fingerprint,
        machine, torch.get_num_threads(),
    )  # fmt: skip
    return pd.DataFrame(remember("latency", key, lambda: measure(study, *arguments).to_dict("list")))


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


@torch.inference_mode()
def interleaved(
    calls: Mapping[Hashable, Callable[[], object]], rounds: int, device: torch.device, desc: str, warm_up: bool = True
) -> dict[Hashable, list[float]]:
    """Seconds of each call in each round, after a warm-up of each; every other round goes backwards."""
    for call in calls.values() if warm_up else ():
        call()
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for number in trange(rounds, desc=desc, unit="round"):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(calls[name], device))
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def _milliseconds(times: Sequence[float]) -> dict[str, float]:
    return dict(zip(("q1_ms", "median_ms", "q3_ms"), quartiles(np.array(times) * 1000), strict=True))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics, whatever the distribution; nan for fewer than six values."""
    low, high = stats.quantile_test(np.asarray(values, float), p=0.5).confidence_interval(0.95)
    return float(low), float(high)


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


def _systems(study: Study, counts: Sequence[int], tokens: int, whole: bool) -> dict[tuple, Retriever]:
    """Retrievers by system, family, vectors and decoding; of all counts, or (not ``whole``) of least and most."""
    limits = {"max_query_tokens": tokens, "max_passage_tokens": tokens}
    diffusion, parent = study.backbone("diffusion"), study.backbone("autoregressive")
    ks = sorted(counts) if whole else sorted({min(counts), max(counts)})
    out: dict[tuple, Retriever] = {}
    for k in ks:
        out["DiffRetriever", "diffusion", k, ""] = DiffRetriever(diffusion, k_query=k, k_passage=k, **limits)
    out["PromptReps single", "autoregressive", 1, ""] = PromptReps(parent, **limits)
    for n in ks if whole else ks[-1:]:
        answered, forced = (PromptReps(parent, max_new_tokens=n, **limits) for _ in range(2))
        forced.reader.ends_answer = lambda ids: torch.zeros_like(ids, dtype=torch.bool)
        out["PromptReps multi", "autoregressive", 1 + n, FORCED] = forced
        out["PromptReps multi", "autoregressive", 1 + n, ANSWERED] = answered
    if whole:
        out["DiffEmbed", "diffusion", 1, ""] = DiffEmbed(diffusion, **limits)
        out["Mean pooling", "autoregressive", 1, ""] = MeanPooledAR(parent, **limits)
        out["RepLLaMA", "autoregressive", 1, ""] = RepLLaMA(parent, **limits)
    return out


def encoding_latency(study: Study) -> pd.DataFrame:
    """Time encoding, tokenisation included: against the number of vectors, the text's length and the batch.

    All numbers of vectors are timed for a query of the shortest length (``query_repeats`` rounds) and a passage of the
    second, one at a time; other lengths and batches at the fewest and the most vectors.  Columns curve ("vectors",
    "length", "batch"), system, family, side, vectors, decoding, text_tokens, batch_size, q1_ms, median_ms, q3_ms, ratio
    (median), ratio_q1, ratio_q3, ratio_low, ratio_high (95 % interval of the median, nan for fewer than six rounds) and
    relative_to: within a round, to DiffRetriever at the fewest masks or PromptReps single, all else equal.
    """
    p, rows = study.profile.efficiency, []
    lengths, fewest = sorted(p.text_tokens), min(p.counts)
    middle = lengths[:2][-1]
    designs = [("vectors", "query", lengths[0], 1), ("vectors", "passage", middle, 1)]
    designs += [("length", "passage", n, 1) for n in lengths]
    designs += [("batch", "passage", middle, b) for b in sorted(p.batch_sizes)]
    references = {
        "diffusion": (f"DiffRetriever K={fewest}", ("DiffRetriever", "diffusion", fewest, "")),
        "autoregressive": ("PromptReps single", ("PromptReps single", "autoregressive", 1, "")),
    }
    for curve, side, tokens, batch in designs:
        texts = long_texts(study, tokens, batch)
        systems = _systems(study, p.counts, tokens, curve == "vectors")
        calls = {name: lambda r=r: r.reader(r.features(texts, side)) for name, r in systems.items()}
        rounds = p.query_repeats if (curve, side) == ("vectors", "query") else p.repeats
        times = interleaved(calls, rounds, study.backbone("diffusion").device, desc=f"encoding a {side}: {curve}")
        for (system, family, vectors, decoding), values in times.items():
            relative_to, own = references[family]
            ratios = np.array(values) / np.array(times[own])
            (r1, ratio, r3), (low, high) = quartiles(ratios), median_interval(ratios)
            rows.append(
                {"curve": curve, "system": system, "family": family, "side": side, "vectors": vectors,
                 "decoding": decoding, "text_tokens": tokens, "batch_size": batch, **_milliseconds(values),
                 "ratio": ratio, "ratio_q1": r1, "ratio_q3": r3, "ratio_low": low, "ratio_high": high,
                 "relative_to": relative_to}
            )  # fmt: skip
    return pd.DataFrame(rows)


def claim4_ratios(encoding: pd.DataFrame, counts: Sequence[int]) -> pd.DataFrame:
    """Several vectors of a query against one, from :func:`encoding_latency`.

    Columns comparison, ratio (median), ratio_low, ratio_high (its 95 % interval over the rounds), vectors_a, vectors_b,
    decoding, system ("DiffRetriever" or "PromptReps") and count (K or N).
    """
    fewest, found = min(counts), encoding[(encoding["curve"] == "vectors") & (encoding["side"] == "query")]
    found = found.rename(columns={"vectors": "vectors_a"}).sort_values(["decoding", "vectors_a"], ascending=False)
    masks = found[(found["system"] == "DiffRetriever") & (found["vectors_a"] > fewest)]
    decoded = found[(found["system"] == "PromptReps multi") & found["vectors_a"].isin([1 + max(counts), 5])]
    masks = masks.assign(count=masks["vectors_a"], vectors_b=fewest)
    decoded = decoded.assign(count=decoded["vectors_a"] - 1, vectors_b=1, system="PromptReps")
    masks["comparison"] = [f"DiffRetriever K={k} / K={fewest}" for k in masks["count"]]
    endings = decoded["decoding"].map({FORCED: "", ANSWERED: f", {ANSWERED}"})
    decoded["comparison"] = "PromptReps N=" + decoded["count"].astype(str) + " / single" + endings
    columns = "comparison ratio ratio_low ratio_high vectors_a vectors_b decoding system count"
    return pd.concat([masks, decoded], ignore_index=True)[columns.split()]


def search_latency(study: Study, selected: tuple[int, int], others: Sequence[tuple[int, int]] = ()) -> pd.DataFrame:
    """Time an exact search for one query, top 100, against the number of vectors in the index.

    Dense vectors are random (the time does not depend on them); sparse rows are drawn from those of the first test
    collection.  A passage has one vector, or Kp of the selected pair.  At last all kinds, and the pairs ``others``,
    search the same number of passages, as many as the largest MaxSim index has.  Columns index, vectors, passages,
    k_query, k_passage, q1_ms, median_ms, q3_ms and note (why an index was left out).
    """
    rng, collection = np.random.default_rng(study.profile.seed), study.test_collections[0]
    sides = [study.encode(study.diffretriever(1, 1), collection, side).sparse for side in ("query", "passage")]
    rows: list[dict[str, Any]] = []
    for size in sorted(study.profile.efficiency.index_sizes):
        indexes = [(SINGLE_FAISS, size, 1, 1), (SPARSE, size, 1, 1), (MAXSIM, max(1, size // selected[1]), *selected)]
        rows += _search_run(study, indexes, *sides, rng)
    if largest := [r["passages"] for r in rows if r["index"] == MAXSIM and not r["note"]]:
        n = min(max(largest), INDEXED_PASSAGES)
        pairs = dict.fromkeys((tuple(selected), *map(tuple, others)))
        indexes = [(SINGLE_FAISS, n, 1, 1), (SPARSE, n, 1, 1), *((MAXSIM, n, *pair) for pair in pairs)]
        rows += _search_run(study, indexes, *sides, rng)
    own = ["index", "passages", "k_query", "k_passage"]
    return pd.DataFrame(rows).drop_duplicates(own, keep="last", ignore_index=True)


def _search_run(
    study: Study, indexes: Sequence[tuple], asked: sp.csr_matrix, known: sp.csr_matrix, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A row for each index (kind, passages, Kq, Kp), all timed in turn, but for those that take too much memory."""
    hidden, free = study.backbone("diffusion").model.config.hidden_size, psutil.virtual_memory().available
    needed = {i: i[1] * (8 * known.nnz / known.shape[0] if i[0] == SPARSE else 4 * i[3] * hidden) for i in indexes}
    fitting = [index for index in indexes if needed[index] <= MEMORY_SHARE * free]
    passages = _normal(rng, max([n * kp for kind, n, _, kp in fitting if kind != SPARSE], default=0), hidden)
    queries = _normal(rng, max(kq for _, _, kq, _ in indexes), hidden)
    calls: dict[Hashable, Callable[[], object]] = {}
    for index in fitting:
        kind, n, kq, kp = index
        if kind == SPARSE:
            matrices = asked[:1], known[rng.integers(0, known.shape[0], n)]
            sides = (Representations(None, np.zeros(m.shape[0], int), m) for m in matrices)
            calls[index] = partial(sparse_search, *sides, 100)
        elif kind == SINGLE_FAISS:
            flat = faiss.IndexFlatIP(hidden)
            flat.add(passages[:n])
            calls[index] = partial(flat.search, queries[:1], min(100, n))
        else:
            arrays = queries[None, :kq], passages[: n * kp].reshape(n, kp, hidden)
            sides = (Representations(a, np.full(len(a), a.shape[1])) for a in arrays)
            calls[index] = partial(maxsim_search, *sides, 100)
    times = interleaved(calls, study.profile.efficiency.repeats, torch.device("cpu"), desc="searching")
    rows = []
    for index in indexes:
        kind, n, kq, kp = index
        row = {"index": kind, "vectors": n * kp, "passages": n, "k_query": kq, "k_passage": kp}
        left_out = f"left out: {needed[index] / 1e9:.1f} GB of vectors, {free / 1e9:.1f} GB free"
        rows.append(row | _milliseconds(times.get(index, [np.nan])) | {"note": "" if index in times else left_out})
    return rows


def _normal(rng: np.random.Generator, n: int, hidden: int) -> np.ndarray:
    vectors = rng.standard_normal((n, hidden), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read_effectiveness(tables: Path) -> pd.DataFrame:
    """Read ``evaluation.csv``, which notebook 04 writes to a profile's folder of tables."""
    return pd.read_csv(tables / "evaluation.csv").astype({"k_query": "Int64", "k_passage": "Int64"})


def pairs_of(effectiveness: pd.DataFrame) -> list[tuple[int, int]]:
    """Pairs (Kq, Kp) of the systems with several vectors a text."""
    pairs = effectiveness[["k_query", "k_passage"]].dropna().drop_duplicates().astype(int)
    return [(q, p) for q, p in pairs.itertuples(index=False, name=None) if (q, p) != (1, 1)]


def effectiveness_latency(
    encoding: pd.DataFrame, search: pd.DataFrame, effectiveness: pd.DataFrame, out_of_domain: Sequence[str]
) -> pd.DataFrame:
    """Effectiveness of each system beside its latency: encoding a query, and searching (the paper's Figure 1).

    The tables are those of :func:`encoding_latency`, :func:`search_latency` and :func:`read_effectiveness`, averaged
    over the collections ``out_of_domain``.  All systems search as many passages, the most at which every kind of index
    was timed.  A fine-tuned system costs what its backbone costs, the adapter being merged.  Columns training, system,
    mode (hybrid, or dense where there is no hybrid), ndcg, timed_vectors (of the encoding that was timed: the least
    count not below the system's), encoding_ms, search_ms, latency_ms and indexed_passages; without systems of which
    encoding or index was not timed (BM25).
    """
    cells = effectiveness[(effectiveness["metric"] == METRIC) & effectiveness["collection"].isin(out_of_domain)]
    values = macro(cells, ["training", "system", "mode", "k_query", "k_passage"]).fillna({"k_query": 1, "k_passage": 1})
    values = values[values["mode"].isin([SELECTION_MODE, "dense"])].sort_values("mode", ascending=False, kind="stable")
    timed = encoding[(encoding["curve"] == "vectors") & (encoding["side"] == "query")]
    timed = timed[timed["decoding"] != FORCED].sort_values("vectors")
    found = search[search["median_ms"].notna() & (search["passages"] <= INDEXED_PASSAGES)]
    common = set.intersection(*(set(found[found["index"] == k]["passages"]) for k in (SINGLE_FAISS, MAXSIM, SPARSE)))
    passages = max(common, default=0)
    search_ms = found[found["passages"] == passages].set_index(["index", "k_query", "k_passage"])["median_ms"].to_dict()
    rows = []
    for row in values.drop_duplicates(["training", "system"]).sort_index().itertuples():
        name = next((n for n in ("DiffRetriever", "PromptReps multi") if row.system.startswith(n)), row.system)
        read = timed[(timed["system"] == name) & (timed["vectors"] >= row.k_query)].head(1)
        kind = SINGLE_FAISS if row.k_query == row.k_passage == 1 else MAXSIM
        searching = search_ms.get((kind, row.k_query, row.k_passage))
        if read.empty or searching is None:
            continue
        encoding_ms = read["median_ms"].item()
        searching += search_ms[SPARSE, 1, 1] if row.mode == SELECTION_MODE else 0.0
        latency = (read["vectors"].item(), encoding_ms, searching, encoding_ms + searching)
        rows.append((row.training, row.system, row.mode, row.value, *latency, int(passages)))
    columns = "training system mode ndcg timed_vectors encoding_ms search_ms latency_ms indexed_passages"
    return pd.DataFrame(rows, columns=columns.split())
