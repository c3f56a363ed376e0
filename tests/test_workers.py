"""Encoding by Ray workers: a real cluster of two processes of this machine, one of which is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from diffret_lib.retrieval import streaming, workers
from diffret_lib.retrieval.search import search
from diffret_lib.retrieval.systems import SHARD_TEXTS, DiffEmbed, DiffRetriever
from tests.tiny import tiny_backbone

TEXTS = [f"passage {i} of {i % 7} heaps" for i in range(3 * SHARD_TEXTS + 5)]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Folders for two caches, the second one's for two workers."""
    for name in ("RAY_ADDRESS", workers.WORKERS):
        monkeypatch.delenv(name, raising=False)

    def use(name: str, count: int = 0) -> Path:
        monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / name))
        monkeypatch.setenv(workers.WORKERS, str(count) if count else "")
        return tmp_path / name

    yield use
    ray.shutdown()


def connect(count: int) -> None:
    """Start the cluster as the first encoding does; Ray gives a slow machine 30 seconds, so once more if needed."""
    for last in (False, False, True):
        try:
            workers._connected(count)
            return
        except Exception as error:
            if last or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def content(cache: Path) -> dict[str, bytes]:
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in (cache / "encodings").rglob("*") if p.is_file()}


def actors() -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline"])
    return [p for p in processes if any("(Worker)" in word for word in p.info["cmdline"] or ())]


def test_two_workers_of_which_one_is_killed(cluster, tmp_path, monkeypatch):
    retriever = DiffEmbed(tiny_backbone(tmp_path / "tiny"), max_passage_tokens=8)
    alone = cluster("alone")
    retriever.encode(TEXTS, "passage", cached=True, progress=False)
    several, killed = cluster("several", 2), []
    connect(2)

    def kill() -> None:
        until = time.monotonic() + 120
        while not killed and time.monotonic() < until:
            for process in actors()[:1]:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    workers.encode_shards(retriever, TEXTS, "passage")
    thread.join()
    assert len(killed) == 1
    made = content(several)
    assert made == content(alone) and len(made) > 8
    entry = next(p for p in (several / "encodings").rglob("dense.npy"))
    entry.write_bytes(b"damaged")
    workers.encode_shards(retriever, TEXTS, "passage")  # only the damaged shard is made again
    assert content(several) == made
    monkeypatch.setattr(streaming, "SEGMENT_TEXTS", SHARD_TEXTS)  # segments are shared as shards are
    apart = streaming.stream(retriever, TEXTS[:3], TEXTS, ["mean"], 9)["mean"]
    cluster("alone")
    monkeypatch.setenv(workers.WORKERS, "")
    streamed = streaming.stream(retriever, TEXTS[:3], TEXTS, ["mean"], 9)["mean"]
    sides = (TEXTS[:3], "query"), (TEXTS, "passage")
    encoded = [retriever.encode(texts, side, cached=True, progress=False) for texts, side in sides]
    whole = search(*encoded, ["mean"], 9)["mean"]
    assert all((a == b).all() and (a == c).all() for a, b, c in zip(apart, streamed, whole, strict=True))
    cluster("several", 2)
    queries, counts = TEXTS[: SHARD_TEXTS + 1], [1, 2]
    shared = DiffRetriever(retriever.backbone, shared_text=True, max_query_tokens=8)
    workers.encode_shards(shared, queries, "query", counts)
    before = content(several)
    shared.encode_counts(queries, "query", counts, cached=True, progress=False)
    assert len(before) > len(made) and content(several) == before  # all is there


def test_what_is_asked_for(cluster, monkeypatch):
    cluster("none")
    assert workers.asked() == 0
    workers.encode_shards(None, TEXTS, "passage")  # nothing to do
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    assert workers.asked() is None
    monkeypatch.setenv(workers.WORKERS, "3")
    assert workers.asked() == 3
    for wrong in ("many", "0", "-2", "1.5"):
        monkeypatch.setenv(workers.WORKERS, wrong)
        with pytest.raises(ValueError, match="WORKERS"):
            workers.asked()
