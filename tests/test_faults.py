"""Kills, two runs at once, full disks and damage: whatever happens on the way, the results are those of a clean run.

A pass is a small study on random two-layer models, with all that the cache keeps.  One process imports what it needs
and forks a child for each pass.  ``python tests/test_faults.py ROUNDS`` (``make torture``) is the long form: it tells
the counts after each round, and what was stopped after the third of ten goes on with ``4-10``.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from tqdm import tqdm

from diffret_lib.config import CHECKOUT, load_profile
from scripts.keep_notebook import failure

#: Trials of a round.
TRIALS = {"named kills": 8, "random kills": 8, "two runs": 8, "full disk": 5, "damage": 5}
#: Kills of a trial, of one run after another.
KILLS = 3
DAMAGE = ("bit flipped", "cut", "empty", "file removed", "manifest removed")
HUNG = 300  # seconds after which a pass is ended, with a traceback in its log
FULL = 3  # exit status of a pass that ends with a StorageError of one line


def make_profile(folder: Path) -> None:
    """A profile of two small collections."""
    from tests.tiny import beir

    train, test = (beir(folder, name, seed) for seed, name in enumerate(("mine-train", "mine-test")))
    profile, whole = load_profile("smoke").model_dump(), {"queries": None, "passages": None, "hard": 0}
    profile |= {"train_collection": train, "test_collections": [test], "k_grid": [1, 2]}
    of_training = {"collections": [{"collection": train} | whole], "development": {"collection": test} | whole}
    profile["training"] |= of_training | {"steps": 2}
    profile["backbones"]["text_only"] = None  # two models are enough
    (folder / "profile.json").write_text(json.dumps(profile))


def full_pass(profile: Path, results_root: Path) -> None:
    """Collections, encodings, rankings, grid, negatives, an adapter and an adaptation of 2 steps each, and results."""
    import matplotlib.pyplot as plt
    import numpy as np

    from diffret_lib import report
    from diffret_lib.cache import fetch
    from diffret_lib.experiments.study import System
    from diffret_lib.models.backbones import load_backbone
    from diffret_lib.training.adaptation import Recipe, adapt
    from diffret_lib.training.contrastive import publish_adapter
    from tests.tiny import tiny_folder, tiny_spec

    study, results = report.start(json.loads(profile.read_text()), results_root=results_root)
    model = fetch("backbones", "tiny", lambda folder: tiny_folder(folder))
    for family in ("diffusion", "autoregressive"):
        study._backbones[family] = load_backbone(tiny_spec(model, family), dtype="float32", device="cpu")
    results.table(study.grid(study.train_collection), "grid")
    trained = study.finetune("DiffRetriever single")
    publish_adapter(trained, results.folder / "adapters")
    single, name = study.diffretriever(1, 1), "DiffRetriever single"
    for system in (study.systems((2, 2))[0], System(name, single), System(name, single, "fine-tuned", trained.adapter)):
        values = study.evaluate(system, study.test_collections, runs=results.folder / "runs")
        results.data(values, f"{system.training}-{system.name.split()[0].lower()}")
    recipe = Recipe("text", tokens=64, sequence_length=16, batch_size=2, rank=2, alpha=4, warmup_steps=1)
    texts, rows = [f"a heap is a tree of {i} arrays" * 4 for i in range(8)], np.array([[*range(20, 36)]] * 2)
    options = {"stages": [recipe], "evaluate_every": 1, "work": results.folder / "adapted"}
    adapt(study.backbone("autoregressive"), 5, texts, {"rows": rows}, **options)
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.plot([1, 2])
    results.figure(figure, "curve")
    plt.close(figure)


class Worlds:
    """Folders with a cache and results each; a pass in one is a forked child, to which things may happen."""

    def __init__(self, root: Path) -> None:
        self.root, self.profile = root, root / "profile.json"
        make_profile(root)
        os.environ["DIFFRET_CACHE"] = str(root / "first" / "cache")
        full_pass(self.profile, root / "first")  # what it imports and compiles is there before the forks
        began = time.monotonic()
        codes = self.run("clean", moments=root / "moments"), self.run("again")
        assert codes == (0, 0), self.log("clean") + self.log("again")
        self.seconds = (time.monotonic() - began) / 2
        self.moments = list(dict.fromkeys((root / "moments").read_text().splitlines()))
        self.expected = self.outcome("clean")
        assert self.outcome("again") == self.expected and len(self.expected) > 40, sorted(self.expected)

    def log(self, world: str) -> str:
        return (self.root / f"{world}.log").read_text()

    def start(self, world: str, results: str = "results", seconds: float = 0, **events: Any) -> int:
        """Begin a pass, which is killed after so many seconds (0: not); returns the process id."""
        folder, code = self.root / world, 1
        folder.mkdir(exist_ok=True)
        if pid := os.fork():
            return pid
        try:
            with open(self.root / f"{world}.log", "a") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            faulthandler.dump_traceback_later(HUNG, exit=True)
            # its own lock: forks share numba's, and one that is killed may hold it
            if numbas := sys.modules.get("numba.np.ufunc.parallel"):
                numbas._backend_init_process_lock = None
            os.environ["DIFFRET_CACHE"] = str(folder / "cache")
            watch(folder, **events)
            signal.setitimer(signal.ITIMER_REAL, seconds)  # nothing handles its signal: it ends the process as it is
            full_pass(self.profile, folder / results)
            code = 0
        except BaseException as error:
            code = FULL if type(error).__name__ == "StorageError" and "\n" not in str(error) else 1
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, world: str, **options: Any) -> int:
        """A pass to its end: exit status, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(world, **options), 0)[1])

    def outcome(self, world: str, results: str = "results") -> dict[str, bytes | bool]:
        """Bytes of all results (seconds aside), and whether each entry of the cache is whole; leftovers count, too."""
        from diffret_lib.cache import is_sealed

        cache, folder = self.root / world / "cache", self.root / world / results
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        found = {name: re.sub(rb'"seconds": [\d.e-]+', b"", content) for name, content in files.items()}
        return found | {str(p.relative_to(cache)): is_sealed(p) for p in cache.glob("*/*") if p.suffix != ".lock"}

    def faults(self, world: str, code: int, results: str = "results") -> list[str]:
        """What is wrong after a last pass that ended with ``code``: nothing, an error, or other results."""
        if code:
            said = self.log(world)
            errors = [line for line in said.splitlines() if "Error" in line]
            return [f"ended with {code}: {errors[-1:] or said[-3000:]}"]
        outcome = self.outcome(world, results)
        other = sorted(k for k in {*outcome, *self.expected} if outcome.get(k) != self.expected.get(k))
        return [f"other than in a clean run: {other}"] if other else []


def watch(folder: Path, moments: Path | None = None, kill: str = "", full: str = "") -> None:
    """Follow what is written in a folder by Python's audit events, named with what differs between runs left out.

    ``moments`` is a file for their names, ``kill`` ends the process just before one, and from ``full`` on all writing
    fails as on a full disk.
    """
    writes, is_full = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}, False
    names = moments and os.open(moments, os.O_CREAT | os.O_WRONLY)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal is_full
        path = str(args[0]) if event in writes else ""
        if not path.startswith(f"{folder}/") or path.endswith(".lock") or (event == "open" and not args[2] & 3):
            return
        name = f"{event} {path.removeprefix(f'{folder}/')}"
        name = re.sub(r"\d+-[0-9a-f]{8}|(?<=/tmp)\w{8}|[0-9a-f]{16,}", "*", name)
        if names:
            os.write(names, f"{name}\n".encode())
        if name == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        is_full |= name == full
        if is_full and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    if moments or kill or full:
        sys.addaudithook(hook)


def named_kills(worlds: Worlds, world: str, number: int, rng: random.Random) -> tuple[int, list[str]]:
    """The next moments of all, in turn from each kind of file."""
    kinds: dict[str, list[str]] = {}
    for name in random.Random(0).sample(worlds.moments, len(worlds.moments)):
        kinds.setdefault("/".join(re.sub(r"\.?\*|.* ", "", name).split("/")[:2]), []).append(name)
    turns = [names[i] for i in range(len(worlds.moments)) for names in kinds.values() if i < len(names)]
    taken = [turns[(number * KILLS + i) % len(turns)] for i in range(KILLS)]
    hit = [worlds.run(world, kill=name) for name in sorted(taken, key=worlds.moments.index)]
    return hit.count(-signal.SIGKILL), worlds.faults(world, worlds.run(world))


def random_kills(worlds: Worlds, world: str, number: int, rng: random.Random) -> tuple[int, list[str]]:
    hit, faults = 0, []
    while hit < KILLS and not faults:
        code = worlds.run(world, seconds=rng.uniform(0.05, 0.7) * worlds.seconds)
        if code == -signal.SIGALRM:
            hit += 1
        else:  # it has ended before: a new world
            faults = worlds.faults(world, code)
            shutil.rmtree(worlds.root / world)
    return hit, faults or worlds.faults(world, worlds.run(world))


def two_runs(worlds: Worlds, world: str, number: int, rng: random.Random) -> tuple[int, list[str]]:
    """Two runs on one cache, with one folder of results or with two."""
    names, pids = ["results", "results" if number % 2 else "others"], []
    for results in names:
        pids.append(worlds.start(world, results))
        time.sleep(rng.uniform(0, 0.3) * worlds.seconds)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return 1, [fault for results, code in zip(names, codes) for fault in worlds.faults(world, code, results)]


def full_disk(worlds: Worlds, world: str, number: int, rng: random.Random) -> tuple[int, list[str]]:
    """A small disk (or, now and then and where none may be mounted, writing that fails), then one with room."""
    folder, share = worlds.root / world, rng.uniform(0.1, 0.9)
    folder.mkdir()
    size = sum(p.stat().st_size for p in (worlds.root / "clean").rglob("*") if p.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={round(share * size)}", "tmpfs", str(folder)]
    mounted = number % 5 < 4 and shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    name = "" if mounted else rng.choice([m for m in worlds.moments if m.startswith("open")])
    try:
        code = worlds.run(world, full=name)
        faults = [] if code == FULL else [f"{name or f'{share:.0%} of the room'}: {code}, {worlds.log(world)}"]
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
        return 1, faults + worlds.faults(world, worlds.run(world))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def damage(worlds: Worlds, world: str, number: int, rng: random.Random) -> tuple[int, list[str]]:
    """Every entry of the cache is damaged, and each is said and made again."""
    shutil.copytree(worlds.root / "clean", worlds.root / world)
    kind, count = DAMAGE[number % len(DAMAGE)], 0
    for manifest in (worlds.root / world / "cache").glob("*/*/manifest.json"):
        files = sorted(p for p in manifest.parent.rglob("*") if p.is_file() and p != manifest and p.stat().st_size)
        for path in [manifest] if kind == "manifest removed" else files[:1] if kind == "file removed" else files:
            before, count = path.stat(), count + 1
            if kind == "bit flipped":
                content = bytearray(path.read_bytes())
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk does it
            elif kind.endswith("removed"):
                path.unlink()
            else:
                os.truncate(path, rng.randrange(before.st_size) if kind == "cut" else 0)
    shutil.rmtree(worlds.root / world / "results")
    faults = worlds.faults(world, worlds.run(world))
    entries, said = list(worlds.expected.values()).count(True), worlds.log(world).count("it is made again")
    return count, faults + ([] if said == entries else [f"{kind}: {said} of {entries} said"])


def trial(worlds: Worlds, job: tuple[str, int]) -> tuple[int, list[str]]:
    """One trial of a fault: how often it happened, and what was wrong after it."""
    fault, number = job
    world = f"{fault.replace(' ', '-')}-{number}"
    try:
        happened, wrong = globals()[fault.replace(" ", "_")](worlds, world, number, random.Random(world))
    except Exception:
        happened, wrong = 0, [traceback.format_exc()]
    shutil.rmtree(worlds.root / world, ignore_errors=True)
    return happened, [f"{world}: {line}" for line in wrong]


def torture(rounds: range, workers: int = 2) -> dict[str, dict[str, Any]]:
    """All trials of the rounds: for each fault how often it happened, and what was wrong; told after each round."""
    report = {fault: {"happened": 0, "trials": 0, "wrong": []} for fault in TRIALS}
    with tempfile.TemporaryDirectory() as root:
        worlds = Worlds(Path(root))
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for turn in rounds:
                jobs = [(fault, turn * TRIALS[fault] + i) for fault in TRIALS for i in range(TRIALS[fault])]
                for (fault, _), (happened, wrong) in zip(jobs, pool.imap(partial(trial, worlds), jobs), strict=True):
                    found = report[fault]
                    found["happened"] += happened
                    found["trials"] += 1
                    found["wrong"] += wrong
                print(f"rounds {rounds[0] + 1} to {turn + 1}:")
                for fault, found in report.items():
                    told = f"  {fault}: {found['happened']} in {found['trials']} trials, {len(found['wrong'])} wrong"
                    print(told, *found["wrong"], sep="\n    ", flush=True)
    return report


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    command = [sys.executable, __file__, "1"]  # a round
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("fault", TRIALS)
def test_all_ends_as_a_clean_run(report, fault):
    found = report[fault]
    assert found["wrong"] == [] and found["trials"] == TRIALS[fault]
    assert found["happened"] >= TRIALS[fault] * (KILLS if fault.endswith("kills") else 1)


def test_a_notebook_that_fails_by_a_named_error_is_told_in_its_words():
    raised = new_output("error", ename="StorageError", evalue="/c: the disk is full", traceback=["Traceback"])
    assert failure(new_notebook(cells=[new_code_cell("f()", outputs=[raised])])) == "/c: the disk is full"


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"}
    # Forks share tqdm's locks, one for each class that has none to inherit, and one that is killed may hold them.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # seconds: no thread that holds it while another forks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is mounted and made is removed
    asked = re.fullmatch(r"(?:([1-9]\d*)-)?([1-9]\d*)", sys.argv[1])
    if not asked:
        sys.exit(f"error: ROUNDS is a number, or the first and the last round as in 4-10, not {sys.argv[1]!r}")
    print(json.dumps(torture(range(int(asked[1] or 1) - 1, int(asked[2])))))
