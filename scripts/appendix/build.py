"""Build the executed notebooks of a results folder as pages: ``build.py results/embedded``.

``<results>/appendix/index.html`` opens from disk, without a network: contents, the ledger's verdicts, what the run
ran on, and a page for every notebook.  The folder is replaced as a whole.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import sphinx.cmd.build

from diffret_lib.cache import StorageError, atomic_path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]


class AppendixError(ValueError):
    """Results of which no pages can be made; the message says what is missing, where, and what to do."""


def notebooks(results: Path) -> list[Path]:
    """Executed notebooks of a results folder, those that failed left out.

    Raises
    ------
    AppendixError
        If there is none, or one cannot be read, was not executed or ends with an error.
    """
    again = f"make it with: make reproduce PROFILE={results.name}"
    paths = sorted(p for p in (results / "notebooks").glob("*.ipynb") if not p.stem.endswith(".failed"))
    if not paths:
        raise AppendixError(f"{results / 'notebooks'} holds no executed notebook; {again}")
    for path in paths:
        try:
            outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]
        except Exception as error:  # nbformat raises many kinds
            raise AppendixError(f"{path}: not a readable notebook ({error}); {again}") from error
        if not outputs or any(output.output_type == "error" for output in outputs):
            raise AppendixError(f"{path} was not executed to its end; {again}")
    return paths


def index(results: Path, names: list[str]) -> str:
    """The first page, as MyST Markdown."""
    title, introduction = re.split(r"\n{2,}", (CHECKOUT / "README.md").read_text(encoding="utf-8"))[:2]
    parts = [title, introduction, f"These are the notebooks of the profile `{results.name}`, as they were executed."]
    parts += ["## Notebooks", "\n".join(f"- [](notebooks/{name}.ipynb)" for name in names)]
    verdicts = results / "tables" / "claims.csv"
    if verdicts.is_file():
        claims, shown = pd.read_csv(verdicts, keep_default_na=False), ["claim", "statement", "verdict", "where"]
        where = f"The verdicts are of {claims['collections'].iloc[0]}; the last column says in which mode and training."
        parts += ["## The claims", where, table(shown, claims[shown].itertuples(index=False))]
    run = results / "run.json"
    if run.is_file():
        try:
            parts += ["## The run", *run_tables(json.loads(run.read_text(encoding="utf-8")))]
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise AppendixError(f"{run}: not as a run writes it ({error}); remove it, and run again") from error
    tree = "\n".join(["```{toctree}", ":hidden:", *(f"notebooks/{name}" for name in names), "```"])
    return "\n\n".join([*parts, tree]) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def run_tables(run: dict[str, Any]) -> list[str]:
    """What the run ran on, as tables in Markdown."""
    machine = run.get("hardware", {})
    shown = {key: ", ".join(value) if isinstance(value, list) else value for key, value in machine.items()}
    if memory := shown.pop("memory_bytes", None):
        shown["memory (GB)"] = f"{memory / 1e9:.1f}"
    took = [
        (name, f"{entry['seconds']:,.0f}", f"{(entry['peak_memory_bytes'] or 0) / 1e9:.1f}", entry["status"])
        for name, entry in run.get("notebooks", {}).items()
    ]
    seeds = ", ".join(f"{key} {value}" for key, value in run.get("seeds", {}).items())
    return [
        table(("machine", ""), [(key.replace("_", " "), value or "none") for key, value in shown.items()]),
        "What the cache holds is not computed again: seconds are those of the last run.",
        table(("notebook", "seconds", "peak memory (GB)", "status"), took),
        table(("package", "version"), [(k, v) for k, v in run.get("versions", {}).items() if v]),
        *([f"Seeds: {seeds}."] if seeds else []),
    ]


def build(results: Path) -> Path:
    """Write the pages.

    Returns
    -------
    Path
        ``index.html``.

    Raises
    ------
    AppendixError
        As :func:`notebooks`, or when Sphinx has something to say of a page.
    """
    paths = notebooks(results)
    with tempfile.TemporaryDirectory() as folder:
        source, pages = Path(folder) / "source", Path(folder) / "html"  # myst-nb leaves a folder beside the pages
        (source / "notebooks").mkdir(parents=True)
        for path in paths:
            (source / "notebooks" / path.name).write_bytes(path.read_bytes())
        (source / "index.md").write_text(index(results, [path.stem for path in paths]), encoding="utf-8")
        options = ["-q", "-W", "--keep-going", "-c", str(HERE), "-d", str(Path(folder) / "doctrees")]
        if sphinx.cmd.build.main([*options, str(source), str(pages)]):
            raise AppendixError("Sphinx could not make the pages without a warning; its messages are above")
        for name in (".buildinfo", "objects.inv"):
            (pages / name).unlink(missing_ok=True)
        with atomic_path(results / "appendix") as temporary:
            shutil.copytree(pages, temporary)
    return results / "appendix" / "index.html"


if __name__ == "__main__":
    try:
        print(build(CHECKOUT / sys.argv[1]))
    except (AppendixError, StorageError) as error:
        sys.exit(f"error: {error}")
