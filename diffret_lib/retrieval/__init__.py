"""Retrieval: representations, the compared systems, search and metrics."""

import os

from diffret_lib.cache import cache_dir

# ranx compiles its functions with numba, which reads this when it is imported: compiled once, then read from disk
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))
