"""The store: whole or made again, one maker at a time, and errors that say what to do."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from diffret_lib import cache
from diffret_lib.cache import (
    StorageError, atomic_path, cache_dir, fetch, file_sha256, is_sealed, remember, seal, sweep, work_folder, write_text,
)  # fmt: skip
from diffret_lib.config import CHECKOUT

BIG = b"0123456789abcdef" * (1 << 16) + b"!"  # more than a small file


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_verified", set())
    return tmp_path / "cache"


def fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "big.npy").write_bytes(BIG)
    (folder / "small.json").write_text("{}", encoding="utf-8")


def test_cache_dir_is_what_the_variable_says(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("DIFFRET_CACHE", "~/c")
    assert cache_dir() == Path.home() / "c"
    for folder in (tmp_path, CHECKOUT):  # one folder wherever a notebook runs
        monkeypatch.chdir(folder)
        monkeypatch.setenv("DIFFRET_CACHE", "c")
        assert cache_dir() == CHECKOUT / "c"
    monkeypatch.delenv("DIFFRET_CACHE")
    assert cache_dir().name == "diffret"


def test_an_entry_is_made_once(store, caplog):
    calls = []
    for _ in range(3):
        folder = fetch("things", "key", lambda f: (calls.append(1), fill(f)))
    assert folder == store / "things" / "key" and len(calls) == 1 and is_sealed(folder) and not caplog.records
    fetch("things", "other", fill)
    assert {p.name for p in (store / "things").iterdir() if not p.name.endswith(".lock")} == {"key", "other"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk does it


@pytest.mark.parametrize("name", ["deep/big.npy", "small.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "empty", "removed"])
def test_a_damaged_entry_is_made_again_and_said_in_one_line(name, fault, caplog, monkeypatch):
    folder = fetch("things", "key", fill)
    path = folder / name
    whole = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if fault == "flipped":
        flip(path)
    elif fault == "removed":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if fault == "cut" else 0)
    monkeypatch.setattr(cache, "_verified", set())  # another process
    assert not is_sealed(folder)
    assert fetch("things", "key", fill) == folder
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == whole
    (record,) = caplog.records
    assert "is made again" in record.getMessage() and str(folder) in record.getMessage() and "\n" not in record.getMessage()


def test_large_files_are_verified_once_a_process_and_small_ones_every_time(monkeypatch):
    fetch("things", "key", fill)
    read = []
    monkeypatch.setattr(cache, "file_sha256", lambda path: read.append(Path(path).name) or file_sha256(path))
    for _ in range(2):
        fetch("things", "key", fill)
    assert sorted(read) == ["big.npy", "small.json", "small.json"]


def test_a_failed_maker_leaves_nothing(store):
    def half(folder: Path) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        fetch("things", "key", half)
    assert [p.name for p in (store / "things").iterdir()] == [".key.lock"]
    fetch("things", "key", fill)


def test_work_is_kept_until_the_entry_is_made():
    work = work_folder("things", "key")
    work.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        fetch("things", "key", lambda folder: 1 / 0)
    assert work.is_dir()
    fetch("things", "key", fill)
    assert not work.exists()


def test_remember(store):
    calls = []

    def compute():
        calls.append(1)
        return {"a": [0.1 + 0.2, None]}

    first = remember("values", "key", compute)
    assert remember("values", "key", compute) == first == {"a": [0.1 + 0.2, None]} and len(calls) == 1
    with pytest.raises(TypeError):
        remember("values", "set", lambda: {1})
    assert not (store / "values" / "set").exists()


def slow(folder: Path) -> None:
    with open(folder.parents[1] / "made", "a", encoding="utf-8") as file:
        file.write("x")
    time.sleep(1.5)
    fill(folder)


def ask(results: multiprocessing.Queue) -> None:
    results.put(is_sealed(fetch("things", "key", slow)))


def test_two_processes_at_once_make_an_entry_once(store):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=ask, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [True, True]
    for process in processes:
        process.join(30)
    assert (store / "made").read_text(encoding="utf-8") == "x"


def test_atomic_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "f.npy"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".npy" and not temporary.exists()
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "one" and os.listdir(path.parent) == ["f.npy"]
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass


@pytest.mark.parametrize("name", ["d", "d.old", "long" * 30])
def test_atomic_folder_replaces_a_folder(tmp_path, name):
    path = tmp_path / name
    for content in ("one", "two"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.mkdir()
        raise KeyError
    assert os.listdir(path) == ["two"] and os.listdir(tmp_path) == [name]


def test_what_a_killed_process_leaves_is_swept(tmp_path):
    def killed() -> None:
        for path in (tmp_path / "a.csv", tmp_path / "tables" / "b.csv"):
            with atomic_path(path) as temporary:
                temporary.write_text("half")
                if path.name == "b.csv":
                    os.kill(os.getpid(), 9)

    def killed_between() -> None:  # the old folder is away, the new one is not there yet
        replace, renamed = os.replace, []
        os.replace = lambda *args: os.kill(os.getpid(), 9) if renamed else (renamed.append(1), replace(*args))
        (tmp_path / "d").mkdir()
        with atomic_path(tmp_path / "d") as temporary:
            temporary.mkdir()

    for target in (killed, killed_between):
        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()
        process.join(30)
        assert process.exitcode == -9
    with atomic_path(tmp_path / "own.csv") as temporary:
        temporary.write_text("of a living process")
        assert len(list(tmp_path.rglob(".*.tmp*"))) == 4
        sweep(tmp_path)
        assert list(tmp_path.rglob(".*.tmp*")) == [temporary]


def test_a_full_disk_a_folder_of_others_and_a_file_in_the_way(store, tmp_path):
    def fails(number: int, name: str | None = None):
        def make(folder: Path) -> None:
            raise OSError(number, os.strerror(number), name)

        return make

    with pytest.raises(StorageError, match=r"things/key: the disk is full \(.* MB free\); make room, or set DIFFRET_CACHE"):
        fetch("things", "key", fails(errno.ENOSPC))
    with pytest.raises(StorageError, match="things/key: cannot be written"):
        fetch("things", "key", fails(errno.EACCES))
    with pytest.raises(PermissionError):  # a file that is read meanwhile, no matter of the cache
        fetch("things", "key", fails(errno.EACCES, "/elsewhere/corpus.jsonl"))
    assert not (store / "things" / "key").exists()
    (store / "values").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match=r"values is a file, and a folder is needed; remove or rename it") as error:
        remember("values", "key", dict)
    assert "\n" not in str(error.value)
    fetch("things", "key", fill)  # with room


def test_a_disk_without_room_whatever_the_library_says(monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())

    def make(folder: Path) -> None:
        raise RuntimeError("unexpected pos 102080 vs 101968")

    with pytest.raises(StorageError, match="the disk is full"):
        fetch("things", "key", make)


def test_seal_and_text(tmp_path):
    write_text(tmp_path / "deep" / "t.txt", "é\r\nb\n")
    assert (tmp_path / "deep" / "t.txt").read_bytes() == "é\r\nb\n".encode()
    assert not is_sealed(tmp_path / "deep") and not is_sealed(tmp_path / "none")
    seal(tmp_path / "deep")
    assert is_sealed(tmp_path / "deep")
    manifest = json.loads((tmp_path / "deep" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == {"files": {"t.txt": [6, file_sha256(tmp_path / "deep" / "t.txt")]}}
