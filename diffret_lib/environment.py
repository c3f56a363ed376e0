"""What a result was computed with: versions of Python and libraries, and the machine."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import psutil

#: Distributions whose version can change a number: they are part of every address in the cache.
NUMERIC_PACKAGES = (
    "torch", "transformers", "tokenizers", "sentence-transformers", "peft", "accelerate", "gguf", "datasets", "numpy",
    "numba", "scipy", "pandas", "scikit-learn", "statsmodels", "ranx", "faiss-cpu", "bm25s", "PyStemmer", "numpydoc",
)  # fmt: skip
RECORDED_PACKAGES = (
    "diffret", *NUMERIC_PACKAGES, "safetensors", "pyarrow", "networkx", "matplotlib", "seaborn", "papermill"
)  # fmt: skip


def versions(packages: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of distributions (``None`` for one that is not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory (bytes), GPUs and operating system."""
    process = psutil.Process()
    named = re.search(r"^model name\s*:\s*(.+)$", _output("cat", "/proc/cpuinfo"), re.MULTILINE)
    cpu = named[1].strip() if named else _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return {
        "cpu": cpu,
        "cores_logical": psutil.cpu_count(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader").splitlines(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _output(*command: str) -> str:
    """Standard output of a command; empty when the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
