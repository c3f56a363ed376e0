"""Encoding by several processes or machines, on `Ray <https://docs.ray.io>`_ (the extra ``diffret[ray]``).

A worker encodes whole shards into the cache; who wants the representations reads them from there.  So a shard is
committed as any entry of the cache is, a worker that dies costs the shard that it was on, and several runs share one
cache.  On several machines ``DIFFRET_CACHE`` is a folder that all of them see.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from diffret_lib.cache import cache_dir
from diffret_lib.data.checks import whole_number
from diffret_lib.models.backbones import LoadedBackbone
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
    """Put the shards of an encoding into the cache, by the workers that the environment asks for (:func:`asked`).

    What ``retriever.encode(texts, side, cached=True)`` (or ``encode_counts`` for several ``counts``) does afterwards is
    to read them.  Nothing is done for a single shard, or where no worker is asked for.  ImportError: Ray is missing.
    """
    workers, starts = asked(), range(0, len(texts), systems.SHARD_TEXTS)
    if workers == 0 or len(starts) < 2:
        return
    ray = _connected(workers)
    backbone, gpus = retriever.backbone, int(retriever.backbone.device.type == "cuda")
    there = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
    workers = max(1, min(len(starts), workers or there))
    sent = ray.put(replace(backbone, model=copy.deepcopy(backbone.model).cpu()) if gpus else backbone)
    how = sent, backbone.device.type, type(retriever), retriever._settings, side, counts
    shards = [{"shard": list(texts[start : start + systems.SHARD_TEXTS])} for start in starts]
    rows = ray.data.from_items(shards, override_num_blocks=len(shards))
    done = rows.map_batches(
        ShardEncoder, fn_constructor_args=how, batch_size=1, num_cpus=1, num_gpus=gpus, concurrency=workers
    )
    name = f"{retriever.name}: encoding {'queries' if side == 'query' else 'passages'}, {workers} workers"
    with tqdm(total=len(texts), desc=name, unit="text") as bar:
        for batch in done.iter_batches(batch_size=1):
            bar.update(int(batch["texts"].sum()))


class ShardEncoder:
    """The actor: a retriever on its own copy of the backbone, which encodes a shard into the cache."""

    def __init__(
        self, backbone: Any, device: str, kind: type[systems.Retriever], settings: dict[str, Any], side: Side,
        counts: Sequence[int] | None,
    ) -> None:  # fmt: skip
        import ray

        torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
        loaded: LoadedBackbone = ray.get(backbone)
        self.retriever = kind(replace(loaded, model=loaded.model.to(device)), **settings)
        self.side, self.counts = side, counts

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"]:
            how = list(shard), self.side
            if self.counts is None:
                self.retriever.encode(*how, cached=True, progress=False)
            else:
                self.retriever.encode_counts(*how, self.counts, cached=True, progress=False)
        return {"texts": [len(shard) for shard in batch["shard"]]}


def _connected(workers: int | None) -> Any:
    """Ray, connected to the cluster of RAY_ADDRESS or started on this machine with as many workers."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"{WORKERS} and RAY_ADDRESS need Ray: python -m pip install 'diffret[ray]'") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        variables = {"DIFFRET_CACHE": str(cache_dir()), "OMP_NUM_THREADS": "1"}
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables}, **here)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
