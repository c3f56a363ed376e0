"""Retrieval: representations, the compared systems, search and metrics."""

import os
import resource

from diffret_lib.cache import cache_dir

# ranx compiles its functions with numba, which reads this when it is imported: compiled once, then read from disk
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))


def allow_many_files() -> None:
    """Raise this process's limit of open files to what it may have: a shard that is memory-mapped keeps three open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # macOS names no number that it takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 10_240), most))


allow_many_files()
