"""Retrieval: representations, the compared systems, search and metrics."""

import os
import resource
from contextlib import suppress

from diffret_lib.cache import cache_dir

# ranx compiles its functions with numba, which reads this when it is imported: compiled once, then read from disk
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))


def allow_many_files() -> None:
    """Raise this process's limit of open files to what it may have: a shard that is memory-mapped keeps three open."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (most, max(now, 10_240)):  # macOS names no number that it takes
        with suppress(OSError, ValueError):
            return resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


allow_many_files()
