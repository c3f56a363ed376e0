"""Encoding by several processes or machines, on `Ray <https://docs.ray.io>`_ (the extra ``diffret[ray]``).

A worker puts whole shards into the cache; who wants them reads them from there.  So a shard is committed as any entry
of the cache is, a worker that dies costs the shard that it was on, and several runs share one cache.  On several
machines ``DIFFRET_CACHE`` is a folder that all of them see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from diffret_lib.cache import cache_dir
from diffret_lib.data.checks import whole_number
from diffret_lib.models.backbones import LoadedBackbone, uncompiled
from diffret_lib.models.prompts import Side
from diffret_lib.retrieval import systems

#: How many workers of this machine encode; without it, and without Ray's own ``RAY_ADDRESS``, there are none.
WORKERS = "WORKERS"


def asked() -> int | None:
    """Number of workers that the environment asks for: 0 for none, None for as many as the cluster has room for.

    ``WORKERS`` is the number.  ``RAY_ADDRESS`` alone, the address of a running cluster, stands for all that it has.
    ValueError: ``WORKERS`` is no whole number of at least 1.
    """
    text = os.environ.get(WORKERS, "").strip()
    if not text:
        return None if os.environ.get("RAY_ADDRESS") else 0
    return whole_number(WORKERS, int(text) if text.isdecimal() else text)


def encode_shards(
    retriever: systems.Retriever, texts: Sequence[str], side: Side, counts: Sequence[int] | None = None
) -> None:
    """Put the shards of an encoding into the cache, by the workers that the environment asks for (:func:`spread`).

    What ``retriever.encode(texts, side, cached=True)`` (or ``encode_counts`` for several ``counts``) does afterwards is
    to read them.
    """
    name = f"encoding {'queries' if side == 'query' else 'passages'}"
    spread(retriever, partial(_encode, texts, side, counts), len(texts), systems.SHARD_TEXTS, name)


def _encode(
    texts: Sequence[str], side: Side, counts: Sequence[int] | None, retriever: systems.Retriever, rows: slice
) -> None:
    if counts is None:
        retriever.encode(texts[rows], side, cached=True, progress=False)
    else:
        retriever.encode_counts(texts[rows], side, counts, cached=True, progress=False)


def spread(
    retriever: systems.Retriever, task: Callable[[systems.Retriever, slice], object], n: int, size: int, name: str
) -> None:
    """Call ``task(retriever, rows)``, which puts its result into the cache, for each ``size`` rows of ``n`` by workers.

    The environment asks for workers (:func:`asked`), each of which has a copy of the backbone.  Nothing is done without
    any, or where ``size`` rows are all.  ``name`` is what the progress bar says.  ImportError: Ray is missing.
    ValueError: a compiled backbone.
    """
    workers, starts = asked(), range(0, n, size)
    if workers == 0 or len(starts) < 2:
        return
    model = uncompiled(retriever.backbone)
    ray = _connected(workers)
    backbone, gpus = retriever.backbone, int(retriever.backbone.device.type == "cuda")
    there = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
    workers = max(1, min(len(starts), workers or there))
    device = backbone.device
    try:
        sent = ray.put(replace(backbone, model=model.cpu()))
        how = sent, device.type, type(retriever), retriever._settings, ray.put(task)
        rows = ray.data.from_items([{"start": start} for start in starts], override_num_blocks=len(starts))
        done = rows.map_batches(
            Worker, fn_constructor_args=(*how, n, size), batch_size=1, num_cpus=1, num_gpus=gpus, concurrency=workers
        )
        with tqdm(total=n, desc=f"{retriever.name}: {name}, {workers} workers", unit="text") as bar:
            for batch in done.iter_batches(batch_size=1):
                bar.update(int(batch["texts"].sum()))
    finally:
        model.to(device)  # until now the memory of a GPU was the workers'


class Worker:
    """The actor: a retriever on its own copy of the backbone, which does a task for some rows."""

    def __init__(
        self, backbone: Any, device: str, kind: type[systems.Retriever], settings: dict[str, Any], task: Any,
        n: int, size: int,
    ) -> None:  # fmt: skip
        import ray

        torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
        loaded: LoadedBackbone = ray.get(backbone)
        self.retriever = kind(replace(loaded, model=loaded.model.to(device)), **settings)
        self.task, self.n, self.size = ray.get(task), n, size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        ends = [(int(start), min(int(start) + self.size, self.n)) for start in batch["start"]]
        for start, end in ends:
            self.task(self.retriever, slice(start, end))
        return {"texts": [end - start for start, end in ends]}


def _connected(workers: int | None) -> Any:
    """Ray, connected to the cluster of RAY_ADDRESS or started on this machine with as many workers."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"{WORKERS} and RAY_ADDRESS need Ray: python -m pip install 'ray[data]'") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        variables = {"DIFFRET_CACHE": str(cache_dir()), "OMP_NUM_THREADS": "1"}
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables}, **here)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
