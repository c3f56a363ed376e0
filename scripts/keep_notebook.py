"""Keep what papermill left of a notebook: ``keep_notebook.py PROFILE NAME STATUS``, STATUS being papermill's.

The executed copy goes from ``build/PROFILE/`` to ``results/PROFILE/notebooks/``, without what differs between two runs
of the same code (timings, progress bars, widgets, random ids); seconds and peak memory go to ``run.json``.  A notebook
that failed is kept as ``NAME.failed.ipynb``, an earlier good copy stays, and the failing cell and its traceback are
printed last.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

import nbformat

from diffret_lib.cache import StorageError, atomic_path, file_sha256, write_text
from diffret_lib.config import CHECKOUT, load_profile
from diffret_lib.report.results import Results

ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
CURSOR_UP = re.compile(r"\x1b\[\d*A")
PROGRESS = re.compile(r"\d+%\|.*\||\d+(\.\d+)?\w* ?\[\d+:\d+(:\d+)?, ")
#: Errors whose message has the place, what is wrong and what to do.
NAMED = ("StorageError", "ProfileError", "BackboneError")
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook in the current format, with or without a byte-order mark."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)


def clean(executed: nbformat.NotebookNode, ids: list[str | None]) -> None:
    """Take out what differs between two runs (in place); ``ids`` are those of the source's cells."""
    for key in ("papermill", "widgets"):
        executed.metadata.pop(key, None)
    executed.nbformat_minor = max(executed.nbformat_minor, 5)
    tagged = {"papermill-error-cell-tag", "papermill-error-cell-link"}  # cells that papermill adds to a failed notebook
    executed.cells = [cell for cell in executed.cells if not tagged & set(cell.metadata.get("tags", []))]
    number = 0
    for cell in executed.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
        else:
            cell["id"] = (ids[number] if number < len(ids) else None) or f"cell-{number}"
            number += 1
        if cell.cell_type == "code":
            cell["outputs"] = [output for output in map(clean_output, cell.outputs) if output is not None]


def clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output without progress bars: a widget shows nothing once its kernel is gone, a text bar holds its timings."""
    if WIDGET in output.get("data", {}):
        return None
    if output.output_type == "stream":
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in CURSOR_UP.sub("", output.text).split("\n")]
        output["text"] = "\n".join(line for line in lines if not PROGRESS.search(line)).lstrip("\n")
        if not output["text"]:
            return None
    return output


def failure(executed: nbformat.NotebookNode) -> str:
    """The failing cell's source, then its traceback; of a kernel that ended, the cell that it was in.

    The errors of :data:`NAMED` say all themselves.
    """
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error" and output.ename in NAMED:
                return output.evalue
            if output.output_type == "error":
                return ANSI.sub("", f"{shown(cell)}{chr(10).join(output.traceback).rstrip()}")
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    begun = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    where = shown(begun[-1]) if begun else ""
    return f"{where}the kernel's process ended, or papermill did (its message is above): most often for want of memory"


def shown(cell: nbformat.NotebookNode) -> str:
    """A cell's source, indented."""
    lines = "\n".join(f"    {line}".rstrip() for line in cell.source.rstrip().splitlines())
    return f"The failing cell:\n\n{lines}\n\n"


def made(results: Results, since: int, before: Path) -> list[str]:
    """Files of the results changed since a time (ns), and those that the run before made, if they are there still."""
    kept = {"notebooks", "run.json", "appendix"}
    files = [p for p in results.folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    names = {p.relative_to(results.folder).as_posix(): max(p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in files}
    try:
        old = json.loads(before.read_text(encoding="utf-8"))["made"]
    except (OSError, ValueError, KeyError, TypeError):
        old = []
    return sorted(n for n, time_ns in names.items() if n.split("/")[0] not in kept and (time_ns >= since or n in old))


def main(profile_name: str, name: str, status: int) -> int:
    """Keep one notebook; the exit status is 1 when it failed."""
    source = CHECKOUT / "notebooks" / f"{name}.ipynb"
    results = Results(load_profile(profile_name))
    build = CHECKOUT / "build" / results.folder.name
    begun, done, peak = (build / f"{name}.{ending}" for ending in ("begun", "done", "peak"))
    target = results.notebooks / f"{name}.ipynb"
    failed = target.with_suffix(".failed.ipynb")
    try:
        executed = read(build / f"{name}.ipynb")
    except (OSError, ValueError):  # papermill has written nothing, or was cut off: it says why
        executed, status = None, status or 1
    message = "papermill left no notebook; its message is above"
    seconds = time.time() - begun.stat().st_mtime
    if executed is not None:
        if status:
            message = failure(executed)
        seconds = executed.metadata.get("papermill", {}).get("duration") or seconds
        clean(executed, [cell.get("id") for cell in json.loads(source.read_text(encoding="utf-8-sig"))["cells"]])
        with atomic_path(failed if status else target) as temporary:
            nbformat.write(executed, temporary)
    results.record_run(
        name,
        seconds=seconds,
        peak_memory_bytes=int(peak.read_text(encoding="utf-8")) if peak.exists() else None,
        status="failed" if status else "ok",
        sha256=file_sha256(source),
    )
    if status:
        kept = f"; its executed copy is {os.path.relpath(failed)}" if executed is not None else ""
        print(f"\nerror: {name} failed under profile {profile_name}{kept}\n\n{message}", file=sys.stderr)
        return 1
    failed.unlink(missing_ok=True)
    names = [*made(results, begun.stat().st_mtime_ns, done), f"notebooks/{name}.ipynb", "run.json"]
    inputs = (build / f"{name}.inputs").read_text(encoding="utf-8")
    write_text(done, json.dumps({"inputs": inputs, "made": names}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    except (StorageError, ValueError) as error:  # of a profile or a record of runs that cannot be read
        sys.exit(f"error: {error}")
