"""The store: whole or made again, one maker at a time, and errors that say what to do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffret_lib import cache
from diffret_lib.cache import StorageError, atomic_path, cache_dir, fetch, file_sha256, is_sealed, remember, seal, sweep
from diffret_lib.config import CHECKOUT

BIG = b"0123456789abcdef" * (1 << 16) + b"!"  # more than a small file


@pytest.fixture(autouse=True)
def store(own_cache, monkeypatch) -> Path:
    monkeypatch.setattr(cache, "_verified", set())
    return own_cache


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


@pytest.mark.parametrize("name", ["deep/big.npy", "small.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "empty", "removed"])
def test_a_damaged_entry_is_made_again_and_said_in_one_line(name, fault, caplog, monkeypatch):
    folder = fetch("things", "key", fill)
    path = folder / name
    whole, stat = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}, path.stat()
    if fault == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk does it
    elif fault == "removed":
        path.unlink()
    else:
        os.truncate(path, stat.st_size // 2 if fault == "cut" else 0)
    monkeypatch.setattr(cache, "_verified", set())  # another process
    assert not is_sealed(folder)
    assert fetch("things", "key", fill) == folder
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == whole
    (record,) = caplog.records
    said = record.getMessage()
    assert "is made again" in said and str(folder) in said and "\n" not in said


def test_large_files_are_verified_once_a_process_and_small_ones_every_time(monkeypatch):
    fetch("things", "key", fill)
    read = []
    monkeypatch.setattr(cache, "file_sha256", lambda path: read.append(Path(path).name) or file_sha256(path))
    for _ in range(2):
        fetch("things", "key", fill)
    assert sorted(read) == ["big.npy", "small.json", "small.json"]


def test_work_is_kept_until_the_entry_is_made():
    work = cache.work_folder("things", "key")
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


def at_once(*targets) -> list[int]:
    """Exit statuses of processes that run together."""
    processes = [multiprocessing.get_context("fork").Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_at_once_make_an_entry_once(store):
    def slow(folder: Path) -> None:
        with open(store / "made", "a", encoding="utf-8") as file:
            file.write("x")
        time.sleep(1)
        fill(folder)

    def ask() -> None:
        assert is_sealed(fetch("things", "key", slow))

    assert at_once(ask, ask) == [0, 0] and (store / "made").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize("name", ["new/f.npy", "d", "d.old", "long" * 30])
def test_atomic_file_or_folder_is_whole_or_not_there(tmp_path, name):
    path = tmp_path / name

    def write(temporary: Path, content: str) -> None:
        if path.suffix != ".npy":  # a folder
            temporary.mkdir()
            temporary /= content
        temporary.write_text(content)

    for content in ("one", "two"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent and temporary.name.endswith(f".tmp{path.suffix}")
            write(temporary, content)
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        write(temporary, "half")
        raise KeyError
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    (kept,) = (p for p in path.parent.rglob("*") if p.is_file())
    assert kept.read_text() == "two" and os.listdir(path.parent) == [path.name]


def test_processes_at_once_replace_a_folder(tmp_path):
    def replace_often() -> None:
        for _ in range(150):
            with atomic_path(tmp_path / "d") as temporary:
                temporary.mkdir()
                (temporary / "one").touch()

    assert at_once(replace_often, replace_often, replace_often) == [0, 0, 0]
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["d", "d/one"]


def test_what_a_killed_process_leaves_is_swept(store, tmp_path):
    def killed() -> None:
        for path in (tmp_path / "a.csv", tmp_path / "runs" / "deep" / "b.csv"):
            with atomic_path(path) as temporary:
                temporary.write_text("half")
                if path.name == "b.csv":
                    os.kill(os.getpid(), 9)

    def killed_between() -> None:  # the old folder is away, the new one is not there yet
        replace, renamed = os.replace, []
        os.replace = lambda *args: os.kill(os.getpid(), 9) if len(renamed) > 1 else (renamed.append(1), replace(*args))
        (tmp_path / "d" / "full").mkdir(parents=True)
        with atomic_path(tmp_path / "d") as temporary:
            temporary.mkdir()

    assert at_once(killed, killed_between) == [-9, -9]
    for key in ("made", "not made"):
        cache.work_folder("things", key).mkdir(parents=True)
    (store / "things" / "made").mkdir()
    seal(store / "things" / "made")  # killed before the work was removed
    elsewhere = tmp_path / f".x.{2**22 + 1}-0000abcd.tmp"  # of another machine, on a folder that both see
    elsewhere.touch()
    with atomic_path(tmp_path / "own.csv") as temporary:
        temporary.write_text("of a living process")
        assert len(list(tmp_path.rglob(".*.tmp*"))) == 4
        sweep(tmp_path)
        assert {*tmp_path.rglob(".*.tmp*")} == {temporary, elsewhere}
    assert [p.name for p in store.rglob(".*.work")] == [".not made.work"]


@pytest.mark.parametrize(("error", "said"), [
    (OSError(errno.ENOSPC, "No space left on device"), r"is full \(.* MB free\); make room, or set DIFFRET_CACHE"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    (OSError(errno.EACCES, "Permission denied"), r"cannot be written \(Permission denied\); set DIFFRET_CACHE"),
    (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
    (MemoryError(), r"the memory is full \(\d+ MB available; MemoryError\); end other programs, or lower"),
    (RuntimeError("unable to mmap 538 bytes from file <f>: Cannot allocate memory (12)"), "; unable to mmap 538"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), r"Tried to allocate 2 GiB.\); end"),
    (PermissionError(errno.EACCES, "Permission denied", "/elsewhere/corpus.jsonl"), None),  # read meanwhile: not ours
    (FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/corpus.jsonl"), None),
    (RuntimeError("of the maker"), None),
])  # fmt: skip
def test_an_error_of_disk_memory_or_permissions_is_one_line(store, error, said):
    def make(folder: Path) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise error

    with pytest.raises(StorageError if said else type(error), match=said) as raised:
        fetch("things", "key", make)
    if said:
        assert str(raised.value).startswith(f"{store}/things/key: ") and "\n" not in str(raised.value)
    else:
        assert raised.value is error
    assert [p.name for p in (store / "things").iterdir()] == [".key.lock"]
    fetch("things", "key", fill)  # with room


def test_a_disk_without_room_whatever_the_library_says(monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=1000))
    with pytest.raises(StorageError, match="the disk is full"):
        fetch("things", "key", lambda folder: (folder / "none" / "file").read_text())


@pytest.mark.parametrize("name", ["a file", "a file/c", "/proc/c", "broken link", "loop", "n" * 300, "of another user"])
def test_a_cache_that_cannot_be_is_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    (tmp_path / "broken link").symlink_to("/proc/nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / name))
    user = None
    if name == "of another user":
        (tmp_path / name).mkdir(mode=0o555)
        user = os.geteuid() == 0
    for call in (lambda: fetch("things", "key", fill), lambda: cache.write_text(cache_dir() / "things" / "f.txt", "x")):
        if user:
            os.seteuid(65534)
        try:
            with pytest.raises(StorageError) as raised:
                call()
        finally:
            if user:
                os.seteuid(0)
        said = str(raised.value)
        assert said.startswith(f"{tmp_path / name}/things/") and "\n" not in said and "disk is full" not in said
        assert ("is a file, and a folder is needed; remove" if "file" in name else "cannot be written (") in said
    sweep(cache_dir())
    with pytest.raises(StorageError), cache.explained(cache_dir()):  # as make begins
        if user:
            raise StorageError
        cache_dir().mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("name", ["a b", "é", "a;b $HOME", "a\nb", "deep/er", "link"])
def test_a_cache_of_any_name(name, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / name))
    assert is_sealed(fetch("things", "key", fill)) and (tmp_path / name / "things" / "key" / "small.json").exists()


def test_text_is_written_as_it_is(tmp_path):
    cache.write_text(tmp_path / "deep" / "t.txt", "é\r\nb\n")
    assert (tmp_path / "deep" / "t.txt").read_bytes() == "é\r\nb\n".encode()
    assert not is_sealed(tmp_path / "deep") and not is_sealed(tmp_path / "none")
