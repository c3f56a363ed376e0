"""The store of everything that is computed or fetched: one folder an entry, whole and verified or not there.

An entry is ``<cache>/<kind>/<address>/``: files, and a ``manifest.json`` with the size and SHA-256 of each.  It is
written under another name and renamed, by one process at a time.  Reading verifies it: small files every time, large
ones once a process.  A damaged entry is said in one line, and made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from filelock import FileLock

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
#: Files up to this size (bytes) are verified at every reading, larger ones once a process.
SMALL_FILE = 1 << 20

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:4]
_TEMPORARY = re.compile(rf"\..+\.(\d+)-{_MACHINE}[0-9a-f]{{4}}\.tmp")
_verified: set[tuple[Path, int, int]] = set()


class StorageError(RuntimeError):
    """A folder cannot be written; the message has the path, what is wrong and what to do, on one line."""


def cache_dir() -> Path:
    """``DIFFRET_CACHE``, a relative one from the checkout wherever a notebook runs, or the user's cache folder."""
    named = os.environ.get("DIFFRET_CACHE")
    if not named:
        return Path(platformdirs.user_cache_path("diffret"))
    checkout = Path(__file__).resolve().parents[1]
    return (checkout if os.path.isfile(checkout / "pyproject.toml") else Path.cwd()) / os.path.expanduser(named)


def fetch(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """Folder of an entry; made when it is not there, or not whole.

    ``kind`` is a folder of the cache, such as ``"encodings"``, ``key`` the address.  ``make`` writes the entry's files
    into the empty folder that it is given; another process that wants the same entry waits.  A StorageError says that
    the disk is full, or the folder cannot be written.
    """
    folder = cache_dir() / kind / key
    if is_sealed(folder):
        return folder
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.exists():  # another process made it meanwhile, or it is damaged
                fault = _fault(folder)
                if fault is None:
                    return folder
                logger.warning("%s is damaged (%s): it is made again", folder, fault)
                shutil.rmtree(folder)
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                make(temporary)
                seal(temporary)
            shutil.rmtree(work_folder(kind, key), ignore_errors=True)
    return folder


def remember(kind: str, key: str, compute: Callable[[], Any]) -> Any:
    """Return ``compute()``, which JSON must be able to hold; from the second time on it comes from the cache."""

    def make(folder: Path) -> None:
        (folder / "value.json").write_text(json.dumps(compute()), encoding="utf-8")

    return json.loads((fetch(kind, key, make) / "value.json").read_text(encoding="utf-8"))


def work_folder(kind: str, key: str) -> Path:
    """Where the making of an entry keeps what it needs to go on after an interruption; removed when it is made."""
    return cache_dir() / kind / f".{key}.work"


def seal(folder: Path) -> None:
    """Write the manifest of a folder whose files are all there."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {p.relative_to(folder).as_posix(): [p.stat().st_size, file_sha256(p)] for p in paths}
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest, and every file is as the manifest says."""
    return os.path.isdir(folder) and _fault(folder) is None


def _fault(folder: Path) -> str | None:
    """What is wrong with an entry, or None."""
    try:
        for name, (size, sha256) in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != size:
                return f"{name} has {stat.st_size} bytes, not {size}"
            seen = (folder / name, stat.st_size, stat.st_mtime_ns)
            if seen in _verified:
                continue
            if file_sha256(folder / name) != sha256:
                return f"{name} has another SHA-256 than when it was written"
            if size > SMALL_FILE:
                _verified.add(seen)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name in the folder of ``path`` (made if need be), with its suffix, for a file or a folder.

    It is renamed to ``path`` when the block ends, replacing what is there, and removed when the block raises.  A
    StorageError says that the disk is full, or the folder cannot be written; a FileNotFoundError, that the block has
    written nothing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}-{_MACHINE}{secrets.token_hex(2)}.tmp{path.suffix}")
    old = temporary.with_name(f"{temporary.name}.old")  # a name that `sweep` knows
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            while True:
                try:
                    os.replace(temporary, path)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                with suppress(FileNotFoundError):  # a full folder is not replaced in one step; others may do the same
                    os.replace(path, old)
                _remove(old)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there and can be removed."""
    with suppress(OSError):
        shutil.rmtree(path) if os.path.isdir(path) else path.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically; line ends as they are."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def sweep(folder: Path) -> None:
    """Remove what killed processes left anywhere in a folder: temporaries of this machine's, work for what is made."""
    for path in list(folder.rglob(".*")) if os.path.isdir(folder) else ():
        found = _TEMPORARY.match(path.name)
        entry = path.with_name(path.stem[1:])  # of a work folder
        orphan = found and not psutil.pid_exists(int(found[1]))
        if orphan or (path.suffix == ".work" and (entry / MANIFEST).exists()):
            _remove(path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of disk, memory or permissions into a :class:`StorageError` that names the path and a way out."""
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, StorageError) else _reason(path, error)
        if reason is None:
            raise
        raise StorageError(f"{path}: {reason}") from error


def _reason(path: Path, error: Exception) -> str | None:
    """What is wrong and what to do, when an error on the way to ``path`` is one of disk, memory or permissions."""
    number, named = getattr(error, "errno", None), Path(str(getattr(error, "filename", None) or path))
    ours = path.parent in named.parents or named in (path, *path.parents)  # not a file that is read meanwhile
    place = next(p for p in (path, *path.parents) if os.path.exists(p))
    disk, way_out = shutil.disk_usage(place), "set DIFFRET_CACHE (cache) or results_root (results) to a folder"
    # libraries tell of a full disk or memory in their own ways; /proc has no room at all
    full = "No space left on device" in str(error) or (disk.total > 0 and disk.free < 1 << 20)
    if full or number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({disk.free / 1e6:.1f} MB free); make room, or {way_out} on another disk"
    said, free = str(error).partition("\n")[0], psutil.virtual_memory().available
    if isinstance(error, MemoryError) or re.search("(?i)cannot allocate memory|out of memory", said):  # ENOMEM's, too
        advice = "end other programs, or lower the profile's batch_tokens and mini_batch"
        return f"the memory is full ({free / 1e6:.0f} MB available; {said or type(error).__name__}); {advice}"
    if not (isinstance(error, OSError) and number and ours):
        return None
    if number in (errno.ENOTDIR, errno.EEXIST) and not os.path.isdir(place):
        return f"{place} is a file, and a folder is needed; remove or rename it"
    unwritten = number == errno.ENOENT and named not in (path, *path.parents) and os.path.isdir(path.parent)
    return None if unwritten else f"cannot be written ({error.strerror}); {way_out} of yours"
