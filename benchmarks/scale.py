"""Search at the scale of MS MARCO on one machine: exact MaxSim from disk, narrower storage, and two stages with FAISS.

    python benchmarks/scale.py                     # 1,000,000 passages x 4 vectors x 128, and 50,000 x 16 x 576
    python benchmarks/scale.py --passages 20000 --large-passages 2000   # a first look

What is measured and how to read the tables: ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import seaborn as sns
import torch
from matplotlib.figure import Figure

from diffret_lib.addresses import address
from diffret_lib.cache import atomic_path, cache_dir
from diffret_lib.environment import hardware
from diffret_lib.experiments.efficiency import interleaved
from diffret_lib.report.figures import WIDTH
from diffret_lib.report.results import set_style
from diffret_lib.retrieval.index import STORAGES, FaissIndex, PassageIndex, two_stage_search
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import Ranking

TOP_K = 100
#: Bytes of float32 in a shard of an index: to map one costs a tenth of a millisecond, so many small ones take longer.
SHARD = 32 << 20
#: Passages of a cluster; lengths of what a passage, and each of its vectors, add to its centre (of length 1), and of
#: what a query's vector adds to that of a passage.
CLUSTER, SPREAD, OWN, ASKED = 200, 0.6, 0.6, 3.0
#: Multiplications and additions of the square product whose speed is the machine's peak; done this many times.
SIDE, PRODUCTS = 2048, 8
#: What FAISS indexes, and how; "{}" is the root of the number of vectors, as a power of two.
PLANS = (("mean", "Flat"), ("mean", "IVF{},Flat"), ("vectors", "IVF{},PQ32"))
PROBES, CANDIDATES = (4, 16, 64, 256), (100, 300, 1000, 3000)
#: Queries that are timed alone in an exact search.
FEW = 5


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(n: int, k: int, hidden: int, seed: int = 0) -> Iterator[Representations]:
    """Passages of ``k`` unit vectors around the centres of clusters, shard by shard; the same for the same seed."""
    scale = np.float32(hidden**-0.5)
    centres = _unit(np.random.default_rng(seed).standard_normal((max(2, n // CLUSTER), hidden), np.float32))
    step = max(1, SHARD // (4 * k * hidden))
    for start in range(0, n, step):
        size, rng = min(step, n - start), np.random.default_rng([seed, start])
        passage = centres[rng.integers(0, len(centres), size)]
        passage = passage + SPREAD * scale * rng.standard_normal(passage.shape, np.float32)
        own = OWN * scale * rng.standard_normal((size, k, hidden), np.float32)
        yield Representations(_unit(passage[:, None] + own), np.full(size, k))


def indexes(folder: Path, n: int, k: int, hidden: int) -> dict[str, PassageIndex]:
    """The passages in every storage, from disk, or written there."""
    found: dict[str, PassageIndex] = {}
    made = address([clustered, _unit], CLUSTER, SPREAD, OWN, SHARD)[:8]  # another way to make them is another folder
    for storage in STORAGES:
        where = folder / f"{n}x{k}x{hidden}-{made}-{storage}"
        parts = found["float32"].parts() if found else clustered(n, k, hidden)
        found[storage] = PassageIndex.read(where) if where.exists() else PassageIndex.write(where, parts, storage)
    return found


def questions(passages: PassageIndex, n: int, k: int, seed: int = 1) -> tuple[Representations, np.ndarray]:
    """Queries of ``k`` vectors, each near one of the vectors of a passage; and those passages, int (n,)."""
    rng, size = np.random.default_rng(seed), (n, k, passages.hidden)
    sources = rng.choice(len(passages), n, replace=n > len(passages))
    near = passages.reconstruct(sources).dense[np.arange(n)[:, None], rng.integers(0, passages.vectors, (n, k))]
    noise = ASKED * np.float32(passages.hidden**-0.5) * rng.standard_normal(size, np.float32)
    return Representations(_unit(near + noise), np.full(n, k)), sources


def quality(found: Ranking, exact: Ranking, sources: np.ndarray) -> dict[str, float]:
    """Part of the exact search's passages that were found, and nDCG@10 where a query's source alone is relevant."""
    recall = np.mean([len(set(a) & set(b) - {-1}) / len(b) for a, b in zip(found[1], exact[1], strict=True)])
    place = np.where(found[1][:, :10] == sources[:, None], 1 / np.log2(np.arange(min(10, found[1].shape[1])) + 2), 0)
    return {f"recall@{TOP_K}": float(recall), "ndcg@10": float(place.sum(1).mean())}


def _quartiles(values: Sequence[float], name: str) -> dict[str, float]:
    return dict(zip((name, f"{name}_q1", f"{name}_q3"), np.quantile(values, [0.5, 0.25, 0.75]), strict=True))


def exact_table(
    found: dict[str, PassageIndex], queries: Representations, sources: np.ndarray, rounds: int
) -> tuple[pd.DataFrame, Ranking]:
    """All queries at once by exact MaxSim, in turn with the machine's matrix product; and the float32 ranking."""
    a, b = torch.randn(2, SIDE, SIDE)
    results: dict[tuple[str, str], Ranking] = {}

    def peak() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b)

    def search(storage: str, products: str) -> None:
        torch.set_float32_matmul_precision("highest" if products == "float32" else "medium")
        results[storage, products] = found[storage].search(queries, "dense", TOP_K)
        torch.set_float32_matmul_precision("highest")

    search("float32", "float32")
    # kilobytes, on macOS bytes; all that this process has done until now
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    ways = [*((storage, "float32") for storage in STORAGES), ("float32", "bfloat16"), ("int8", "bfloat16")]
    calls = {("peak",): peak} | {way: partial(search, *way) for way in ways}
    times, rows, exact = interleaved(calls, rounds, torch.device("cpu"), "exact"), [], found["float32"]
    fastest = PRODUCTS * 2 * SIDE**3 / times["peak",]
    for storage, products in ways:
        spent = times[storage, products]
        speed = 2 * len(queries) * queries.vectors * len(exact) * exact.vectors * exact.hidden / spent
        width = exact.hidden * {"float32": 4, "float16": 2, "int8": 1}[storage] + 4 * (storage == "int8")
        row = {"storage": storage, "products": products, "gib": len(exact) * exact.vectors * width / 2**30}
        row |= _quartiles(spent, "seconds") | _quartiles(speed / fastest, "share_of_peak")
        row |= {"gflop_per_second": np.median(speed) / 1e9, "peak_gflop_per_second": np.median(fastest) / 1e9}
        quality_of = quality(results[storage, products], results["float32", "float32"], sources)
        rows.append(row | quality_of | {"first_search_peak_rss_gib": rss})
    return pd.DataFrame(rows), results["float32", "float32"]


def one_by_one(
    search: Callable[[Representations], Ranking], queries: Representations, exact: Ranking, sources: np.ndarray
) -> dict[str, float]:
    """Milliseconds of each query alone, after a warm-up, and the quality of what is found."""
    search(queries[:1])
    spent, rankings = [], []
    for i in range(len(queries)):
        start = time.perf_counter()
        rankings.append(search(queries[i : i + 1]))
        spent.append(1000 * (time.perf_counter() - start))
    found = tuple(np.concatenate(part) for part in zip(*rankings, strict=True))
    known = exact[0][: len(queries)], exact[1][: len(queries)]
    return _quartiles(spent, "ms") | quality(found, known, sources[: len(queries)])


def latency_table(
    found: dict[str, PassageIndex], queries: Representations, sources: np.ndarray, exact: Ranking
) -> pd.DataFrame:
    """Queries one by one: exact MaxSim in each storage, and two stages with several FAISS indexes and settings."""
    rows, passages = [], found["float32"]
    for storage, index in found.items():
        few = one_by_one(partial(index.search, top_k=TOP_K), queries[:FEW], exact, sources)
        rows.append({"way": "exact", "storage": storage} | few)
    for over, plan in PLANS:
        start, each = time.perf_counter(), passages.vectors if over == "vectors" else 1
        lists = 1 << round(np.log2(len(passages) * each) / 2)
        built = FaissIndex.build(passages, plan.format(lists), over, min(len(passages), (1 << 17) // each))
        about = {"way": f"{over}: {plan.format(lists)}", "build_seconds": time.perf_counter() - start}
        for storage in STORAGES if plan == "Flat" else STORAGES[:1]:
            index = FaissIndex(built.index, found[storage], over)
            for probes in PROBES if "IVF" in plan else (None,):
                for count in CANDIDATES:
                    settings = {"nprobe": min(probes, lists)} if probes else {}
                    stages = partial(two_stage_search, index=index, candidates=count, top_k=TOP_K, **settings)
                    row = about | {"storage": storage, "candidates": count} | settings
                    rows.append(row | one_by_one(stages, queries, exact, sources))
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Figure:
    """Recall of the exact search's best against the latency of one query; a panel for each set of passages."""
    set_style()
    kinds = list(table.groupby(["passages", "vectors", "hidden"], sort=False))
    fig, axes = plt.subplots(len(kinds), 1, figsize=(WIDTH, 2.4 * len(kinds) + 0.8), squeeze=False)
    for ax, (sizes, rows) in zip(axes[:, 0], kinds, strict=True):
        shown = rows[rows["storage"] == "float32"].assign(way=lambda d: d["way"].str.replace(r"\d+,", ",", regex=True))
        looks = {"hue": "way", "style": "way", "markers": ["X", "o", "s", "D"][: shown["way"].nunique()]}
        sns.scatterplot(shown, x="ms", y=f"recall@{TOP_K}", ax=ax, legend=ax is axes[-1, 0], s=28, **looks)
        ax.set(xscale="log", ylim=(None, 1.03), title="{:,} passages x {} vectors x {}".format(*sizes))
        ax.set(xlabel="ms of one query", ylabel=f"recall@{TOP_K} of exact MaxSim")
    axes[-1, 0].get_legend().remove()
    fig.legend(*axes[-1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=1_000_000, help="of 4 vectors x 128 (default: 1,000,000)")
    parser.add_argument("--large-passages", type=int, default=50_000, help="of 16 vectors x 576 (default: 50,000)")
    parser.add_argument("--queries", type=int, default=100, help="of 4 vectors, at once (default: 100)")
    parser.add_argument("--alone", type=int, default=25, help="that are timed one by one; of 16 vectors (default: 25)")
    parser.add_argument("--rounds", type=int, default=3, help="of the exact search (default: 3)")
    parser.add_argument("--data", type=Path, default=cache_dir() / "scale", help="folder of the passages on disk")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), help="folder of tables and figure")
    options = parser.parse_args(arguments)
    alone = min(options.alone, options.queries)
    about = {"device": hardware()["cpu"], "threads": torch.get_num_threads(), "torch": torch.__version__}
    exact_tables, latency_tables = [], []
    for n, k, hidden, asked in ((options.passages, 4, 128, options.queries), (options.large_passages, 16, 576, alone)):
        found = indexes(options.data, n, k, hidden)
        queries, sources = questions(found["float32"], asked, k)
        sizes = {"passages": n, "vectors": k, "hidden": hidden, "k_query": k, "load": psutil.getloadavg()[0]} | about
        table, exact = exact_table(found, queries, sources, options.rounds)
        exact_tables.append(table.assign(queries=asked, **sizes))
        _save(exact_tables, options.output / "scale_exact.csv")
        table = latency_table(found, queries[:alone], sources[:alone], exact)
        latency_tables.append(table.assign(queries=alone, **sizes))
        table = _save(latency_tables, options.output / "scale_latency.csv")
        with atomic_path(options.output / "scale_latency.png") as path:
            figure(table).savefig(path, dpi=200, bbox_inches="tight")
    return 0


def _save(tables: Sequence[pd.DataFrame], path: Path) -> pd.DataFrame:
    print("\n" + tables[-1].drop(columns=["device", "threads", "torch"]).round(3).to_string(index=False), flush=True)
    table = pd.concat(tables, ignore_index=True)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.5g")
    return table


if __name__ == "__main__":
    sys.exit(main())
