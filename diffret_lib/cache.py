"""The cache folder, content addresses, and writes that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs


def cache_dir() -> Path:
    """Folder of everything that can be computed or fetched again.

    ``DIFFRET_CACHE`` names it; otherwise it is ``diffret`` in the user's cache folder.  It is not created.
    """
    named = os.environ.get("DIFFRET_CACHE")
    return Path(named).expanduser().absolute() if named else Path(platformdirs.user_cache_path("diffret"))


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of the parts as canonical JSON.

    Parameters
    ----------
    *parts : str, bytes, int, float, bool, None, or lists, tuples and dicts (str keys) of them
        The order of a dict's keys does not matter; a list and the tuple of the same items are the same.

    Raises
    ------
    TypeError
        For anything else: the same content must give the same fingerprint in every process.
    ValueError
        For a float that is not finite.
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, bytes):
        return {"\0bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"fingerprint takes dicts with str keys; {key!r} is a {type(key).__name__}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"fingerprint takes str, bytes, numbers, None, lists and dicts, not a {type(value).__name__}")


def remembered(kind: str, key: str, compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, out of the cache from the second time on; JSON.

    Parameters
    ----------
    kind : str
        A folder of the cache.
    key : str
        The content address: a fingerprint of everything that the value depends on.
    compute : callable
        Gives what JSON can hold.
    """
    path = cache_dir() / kind / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(compute())
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return json.loads(text)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file or a folder so that it is there whole or not at all.

    Parameters
    ----------
    path : path
        What is to be written.  Its parent folder is created.

    Yields
    ------
    Path
        A name in the same folder (same suffix, nothing there yet).  Write a file or make a folder of that
        name.  It is renamed to ``path`` when the block ends, replacing what is there, and removed when the
        block raises.

    Raises
    ------
    FileNotFoundError
        When the block ends without having written anything.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # a folder cannot replace one that is not empty in one step
            old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        elif temporary.exists():
            os.replace(temporary, path)
        else:
            raise FileNotFoundError(f"nothing was written to {temporary}, so there is no {path}")
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
