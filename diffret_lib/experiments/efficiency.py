"""Latency: encoding by every system, searching, both together, and against length and index size (claim 4).

All that is compared is timed in one run, in turn, every other round backwards, so that a drift of the machine cancels.
A ratio is taken within each round first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import faiss
import numpy as np
import pandas as pd
import psutil
import torch
from scipy import stats
from sklearn.preprocessing import normalize
from tqdm import trange

from diffret_lib.addresses import address
from diffret_lib.cache import remember
from diffret_lib.environment import hardware
from diffret_lib.experiments.study import SYSTEMS, Pair, Study, macro
from diffret_lib.models.prompts import SIDES, encode_plain
from diffret_lib.retrieval.metrics import METRIC
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import SELECTION_MODE, search
from diffret_lib.retrieval.systems import DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, RepLLaMA, Retriever

#: An index takes at most this part of the memory that is free.
MEMORY_SHARE = 0.25
#: Passages of the index behind end-to-end latencies, at most (the paper's 100K).
INDEXED_PASSAGES = 100_000
#: Decoding of PromptReps: exactly N vectors (as it is fine-tuned), or until its answer ends (as it is zero-shot).
FORCED, ANSWERED = "forced", "as answered"
ENCODING, SEARCH, END_TO_END = "encoding", "search", "end to end"
#: Kinds of index; a pair (Kq, Kp) is one for MaxSim.
SINGLE_FAISS, MAXSIM, SPARSE = "dense, single (faiss)", "MaxSim", "sparse"
#: A system that is timed: name, decoding, and the pair of counts (Kq, Kp); N of PromptReps counts on both sides.
Timed = tuple[str, str, Pair]
#: Those with several vectors: name and decoding.
MASKS, DECODED = ("DiffRetriever", ""), ("PromptReps", FORCED)


def measured(study: Study, measure: Callable[..., pd.DataFrame], *arguments: Any) -> pd.DataFrame:
    """Return ``measure(study, *arguments)``, measured once for a machine, its versions, the code and the settings."""
    p, found = study.profile, hardware()
    machine = {part: found[part] for part in ("cpu", "cores_usable", "gpu", "system")}
    backbones = [(b.fingerprint, b.device.type) for b in map(study.backbone, ("diffusion", "autoregressive"))]
    limits = "max_query_tokens", "max_passage_tokens"  # they decide the sparse rows that are searched
    settings = p.model_dump(include={"efficiency", "k_grid", "promptreps_vectors", "seed", *limits})
    texts, threads = study.grid_collections[0].fingerprint, torch.get_num_threads()
    key = address([measure], list(arguments), settings, backbones, texts, machine, threads)
    return pd.DataFrame(remember("latency", key, lambda: measure(study, *arguments).to_dict("list")))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, until a GPU has done what it was given."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


@torch.inference_mode()
def interleaved(
    calls: Mapping[Hashable, Callable[[], object]], rounds: int, device: torch.device, desc: str
) -> dict[Hashable, np.ndarray]:
    """Seconds of each call in each round (float, ``rounds`` of them), after a warm-up of each; every other round goes
    backwards."""
    for call in calls.values():
        call()
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for number in trange(rounds, desc=desc, unit="round"):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(calls[name], device))
    return {name: np.array(values) for name, values in times.items()}


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """The median as value, low and high its 95 % interval from order statistics (nan for fewer than six values)."""
    low, high = stats.quantile_test(np.asarray(values, float), p=0.5).confidence_interval(0.95)
    return {"value": float(np.median(values)), "low": float(low), "high": float(high)}


def long_texts(study: Study, tokens: int, count: int) -> list[str]:
    """Different texts of at least ``tokens`` tokens each, made of the first test collection's passages."""
    passages, tokenizer = study.grid_collections[0].passages, study.backbone("diffusion").tokenizer
    texts, place = [], 0
    while len(texts) < count:
        text = ""
        while len(encode_plain(tokenizer, [text])[0]) < tokens:
            text += f"{passages[place % len(passages)]} {place} "
            place += 1
        texts.append(text)
    return texts


def _retrievers(study: Study, timed: Collection[Timed], tokens: int) -> dict[Timed, Retriever]:
    """Retrievers that read ``tokens`` tokens of a text; those with one vector are always among them."""
    limits = {"max_query_tokens": tokens, "max_passage_tokens": tokens}
    kinds = {"DiffRetriever": DiffRetriever, "PromptReps": PromptReps, "DiffEmbed": DiffEmbed,
             "Mean pooling": MeanPooledAR, "RepLLaMA": RepLLaMA}  # fmt: skip
    out: dict[Timed, Retriever] = {(name, "", (1, 1)): study.retriever(kind, **limits) for name, kind in kinds.items()}
    for system, decoding, pair in timed:
        if system == "DiffRetriever":
            out[system, decoding, pair] = study.diffretriever(*pair, **limits)
        else:
            stop = {"stop": "never"} if decoding == FORCED else {}
            out[system, decoding, pair] = study.promptreps(pair[0], **stop, **limits)
    return out


def latency(study: Study, selected: Pair) -> pd.DataFrame:
    """Time queries: encoding (tokenisation included), searching as many passages, and both, for each size of a batch.

    Every system of the study at the counts that it uses, the grid's most masks, PromptReps' N forced, and for encoding
    alone others up to the profile's largest.  The index is dense (random vectors; the time does not depend on them),
    with a sparse one for systems that have that side.  Then passages: encoding one of each length, at the fewest and
    the most vectors.  Columns quantity ("encoding", "search", "end to end"), system, decoding, side, count (vectors of
    that side), k_passage, used (bool: by a system of the study), batch, text_tokens, passages (in the index; 0: none),
    rounds, value, low, high (median and its 95 % interval, nan for fewer than six rounds), unit ("ms"), and ratio,
    ratio_low, ratio_high: to one vector, all else equal, within a round.
    """
    p, rows, device = study.profile.efficiency, [], study.backbone("diffusion").device
    shortest, most, n = min(p.text_tokens), max(study.profile.k_grid), study.profile.promptreps_vectors
    tuned = SYSTEMS["PromptReps multi"][1]["max_vectors"]
    ways = (*MASKS, tuple(selected)), (*DECODED, (tuned, tuned)), ("PromptReps", ANSWERED, (n, n))
    whole = list(dict.fromkeys([*ways, (*MASKS, (most, most)), (*DECODED, (n, n))]))
    known = {(system, pair[0]) for system, _, pair in whole}
    curves = [(*way, (k, k)) for way in (MASKS, DECODED) for k in p.counts if k > 1 and (way[0], k) not in known]
    for batch in sorted(p.batch_sizes):
        retrievers, texts = _retrievers(study, [*whole, *curves], shortest), long_texts(study, shortest, batch)
        calls = {key: partial(_encode, retriever, texts, "query") for key, retriever in retrievers.items()}
        # an index for each system that the study has; the others are curves of encoding alone
        searches, passages = _index(study, {pair for *_, pair in whole} | {(1, 1)}, batch)
        times = interleaved(calls | searches, p.rounds, device, desc=f"{batch} queries at once")
        for timed, retriever in retrievers.items():
            spent = {ENCODING: (times[timed], times[timed[0], "", (1, 1)])}
            if timed not in curves:
                sparse = times[SPARSE] if SELECTION_MODE in retriever.modes else 0.0
                spent[SEARCH] = times[timed[2]] + sparse, times[1, 1] + sparse
                spent[END_TO_END] = tuple(a + b for a, b in zip(spent[ENCODING], spent[SEARCH]))
            for quantity, both in spent.items():
                indexed = 0 if quantity == ENCODING else passages
                used = timed in ways or timed[2] == (1, 1)
                rows.append(_row(quantity, timed, "query", used, batch, shortest, indexed, *both))
    most = [max((t for t in whole if t[:2] == way), key=lambda t: t[2][1]) for way in (MASKS, DECODED)]
    for tokens in sorted(p.text_tokens):
        retrievers, texts = _retrievers(study, most, tokens), long_texts(study, tokens, 1)
        calls = {key: partial(_encode, retriever, texts, "passage") for key, retriever in retrievers.items()}
        times = interleaved(calls, p.rounds, device, desc=f"a passage of {tokens} tokens")
        for timed in retrievers:
            both = times[timed], times[timed[0], "", (1, 1)]
            used = timed in ways or timed[2] == (1, 1)
            rows.append(_row(ENCODING, timed, "passage", used, 1, tokens, 0, *both))
    return pd.DataFrame(rows)


def _encode(retriever: Retriever, texts: list[str], side: Any) -> object:
    return retriever.reader(retriever.features(texts, side))


def _row(
    quantity: str, timed: Timed, side: str, used: bool, batch: int, tokens: int, passages: int, own: np.ndarray,
    one: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """Median milliseconds, and the median ratio to the times of one vector, each with its interval."""
    system, decoding, pair = timed
    ratio = dict(zip(("ratio", "ratio_low", "ratio_high"), median_interval(own / one).values()))
    return {"quantity": quantity, "passages": passages, "system": system, "decoding": decoding, "side": side,
            "count": pair[SIDES.index(side)], "k_passage": pair[1], "used": used, "batch": batch, "text_tokens": tokens,
            "rounds": len(own)} | median_interval(own * 1000) | {"unit": "ms"} | ratio  # fmt: skip


def claim4_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Several vectors of a query against one, from :func:`latency`: what claim 4 says, at each batch and end to end.

    Columns comparison, quantity ("encoding" or "end to end"), system ("DiffRetriever" or "PromptReps"), decoding, count
    (K, or N with the prompt's own vector), batch, used, passages, rounds, value (median of the rounds' ratios), low,
    high (its 95 % interval) and unit ("times").
    """
    rows = table[(table["side"] == "query") & (table["quantity"] != SEARCH) & (table["count"] > 1)]
    rows = rows.assign(value=rows["ratio"], low=rows["ratio_low"], high=rows["ratio_high"], unit="times")
    rows = rows.sort_values(["quantity", "batch", "system", "count", "decoding"], kind="stable", ignore_index=True)
    label = "{system} {letter}={count} / {letter}=1{how}, batch {batch}, {quantity}"
    letters = {"DiffRetriever": "K", "PromptReps": "N"}
    more = {"letter": rows["system"].map(letters), "how": rows["decoding"].map(lambda how: how and f", {how}")}
    rows["comparison"] = [label.format(**row) for row in rows.assign(**more).to_dict("records")]
    columns = "comparison quantity system decoding count batch used passages rounds value low high unit"
    return rows[columns.split()]


def in_words(ratios: pd.DataFrame) -> str:
    """Two sentences on :func:`claim4_ratios`: encoding one query, and end to end with the largest batch."""
    keys, one, many = ["quantity", "batch", "system", "decoding", "count"], ratios["batch"].min(), ratios["batch"].max()
    found = ratios.drop_duplicates(keys, keep="last").set_index(keys)
    whole = ratios[ratios["quantity"] == END_TO_END].groupby(["system", "decoding"])["count"].max()
    k, n = whole[MASKS], whole["PromptReps", ANSWERED]
    said, ways = [], [(*MASKS, k), ("PromptReps", ANSWERED, n), (*DECODED, n)]
    for cell, way in product([(ENCODING, one), (END_TO_END, many)], ways):
        r = found.loc[cell + way]
        said.append(f"{r['value']:.2f} times" + (f" [{r['low']:.2f}, {r['high']:.2f}]" if r["low"] == r["low"] else ""))
    return (
        f"Encoding one query costs the diffusion backbone {said[0]} (K = {k}) the time of one mask, and the "
        f"autoregressive one {said[1]} that of one vector as PromptReps answers zero-shot (at most N = {n}) and "
        f"{said[2]} when it is made to decode all {n}. For {many} queries at once, with the search of "
        f"{ratios['passages'].max():,} passages, these are {said[3]}, {said[4]} and {said[5]}."
    )


def search_latency(study: Study, selected: Pair) -> pd.DataFrame:
    """Time an exact search for one query, top 100, against the number of vectors in the index.

    A passage has one vector, or Kp of the selected pair in an index for MaxSim.  Columns index, vectors, passages,
    rounds, value, low, high (as of :func:`latency`), unit ("ms") and note (why an index was left out).
    """
    rows, kinds = [], {(1, 1): SINGLE_FAISS, tuple(selected): MAXSIM, SPARSE: SPARSE}
    for size, pair in product(sorted(study.profile.efficiency.index_sizes), ((1, 1), tuple(selected))):
        asked = max(1, size // pair[1])
        calls, n = _index(study, {pair}, 1, asked)
        row = {"index": kinds[pair], "vectors": asked * pair[1], "passages": asked, "unit": "ms", "note": ""}
        if n < asked:
            rows.append(row | {"note": f"left out: {MEMORY_SHARE:.0%} of the free memory take {n:,} passages"})
            continue
        calls = {k: call for k, call in calls.items() if k != SPARSE or pair == (1, 1)}
        times = interleaved(calls, study.profile.efficiency.rounds, torch.device("cpu"), desc="searching")
        rows += [row | {"index": kinds[k], "rounds": len(t)} | median_interval(t * 1000) for k, t in times.items()]
    columns = "index vectors passages rounds value low high unit note"
    return pd.DataFrame(rows).reindex(columns=columns.split())


def _index(
    study: Study, pairs: Collection[Pair], batch: int, passages: int | None = None
) -> tuple[dict[Hashable, Callable[[], object]], int]:
    """Searches of indexes of as many passages, by pair (Kq, Kp), and that of sparse rows; and how many passages.

    By default as many as the profile's largest index has at the most vectors, up to :data:`INDEXED_PASSAGES`; always as
    few as the memory takes.
    """
    rng, collection = np.random.default_rng(study.profile.seed), study.grid_collections[0]
    hidden, most = study.backbone("diffusion").model.config.hidden_size, max(kp for _, kp in pairs)
    n = passages or min(max(study.profile.efficiency.index_sizes) // most, INDEXED_PASSAGES)
    n = max(1, min(n, int(MEMORY_SHARE * psutil.virtual_memory().available / (4 * hidden * most))))
    sizes = n * most, batch * max(kq for kq, _ in pairs)
    known, asked = (normalize(rng.standard_normal((size, hidden), np.float32), copy=False) for size in sizes)
    calls: dict[Hashable, Callable[[], object]] = {}
    for kq, kp in pairs:
        if kq == kp == 1:
            flat = faiss.IndexFlatIP(hidden)
            flat.add(known[:n])
            calls[kq, kp] = partial(flat.search, asked[:batch], min(100, n))
        else:
            arrays = asked[: batch * kq].reshape(batch, kq, hidden), known[: n * kp].reshape(n, kp, hidden)
            sides = (Representations(a, np.full(len(a), a.shape[1])) for a in arrays)
            calls[kq, kp] = partial(search, *sides, ["maxsim"], 100)
    retriever = study.diffretriever(1, 1)
    sides = [study.encode(retriever, collection, side).sparse for side in SIDES]
    rows = [side[rng.integers(0, side.shape[0], size)] for side, size in zip(sides, (batch, n))]
    sparse = (Representations(None, np.zeros(m.shape[0], int), m) for m in rows)
    calls[SPARSE] = partial(search, *sparse, ["sparse"], 100)
    return calls, n


def effectiveness_latency(
    table: pd.DataFrame, effectiveness: pd.DataFrame, out_of_domain: Sequence[str]
) -> pd.DataFrame:
    """Effectiveness of each system beside its latency: encoding a query, and searching (the paper's Figure 1).

    ``table`` is that of :func:`latency`, ``effectiveness`` the long table of means (``evaluation.csv``), averaged over
    the collections ``out_of_domain``.  A fine-tuned system costs what its backbone costs, the adapter being merged.
    Columns training, system, mode (hybrid, or dense where there is no hybrid), ndcg, encoding_ms, search_ms, latency_ms
    and passages (of the index); without systems that were not timed (BM25).
    """
    cells = effectiveness[(effectiveness["metric"] == METRIC) & effectiveness["collection"].isin(out_of_domain)]
    values = macro(cells, ["training", "system", "mode", "k_query", "k_passage"]).fillna({"k_query": 1, "k_passage": 1})
    values = values[values["mode"].isin([SELECTION_MODE, "dense"])].sort_values("mode", ascending=False, kind="stable")
    values = values.drop_duplicates(["training", "system"]).sort_index().rename(columns={"value": "ndcg"})
    several, tuned = values["system"] == "PromptReps multi", values["training"] != "zero-shot"
    values["decoding"] = np.select([several & tuned, several], [FORCED, ANSWERED], "")
    values["name"] = values["system"].str.replace(r" (single|multi)$", "", regex=True)
    timed = table[(table["side"] == "query") & table["used"] & (table["batch"] == table["batch"].min())]
    timed = timed.rename(columns={"system": "name", "count": "k_query"})
    keys = ["name", "decoding", "k_query", "k_passage"]
    ms = timed.pivot(index=keys, columns="quantity", values="value")[[ENCODING, SEARCH, END_TO_END]].dropna()
    ms.columns = ["encoding_ms", "search_ms", "latency_ms"]
    found = values.merge(ms.reset_index(), on=keys).assign(passages=timed["passages"].max())
    return found[["training", "system", "mode", "ndcg", *ms, "passages"]]
