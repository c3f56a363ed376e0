"""Settings that all tests share; they must stand before matplotlib and the tokenizers are imported."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
