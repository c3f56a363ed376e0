"""The folder of a profile's results: tables, figures and the record of the run.

``results/<profile>/`` has ``tables/`` (CSV with all digits, Markdown, LaTeX), ``figures/`` (PNG and SVG),
``notebooks/`` (executed copies) and ``run.json`` (versions, hardware, profile, seeds, fingerprints, seconds and peak
memory per notebook).  Every file is written whole or not at all, and the same content gives the same bytes.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from diffret_lib.cache import atomic_path, explained, write_text
from diffret_lib.config import CHECKOUT, Profile
from diffret_lib.environment import hardware, versions

_TEX = {c: f"\\{c}" for c in "&%$#_{}"}
_TEX |= {"~": r"\textasciitilde ", "^": r"\textasciicircum ", "\\": r"\textbackslash "}


def default_root() -> Path:
    """``results/`` of the checkout, or in the current folder when there is no checkout."""
    return (CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()) / "results"


@dataclass(frozen=True)
class Table:
    """A table that shows itself in a notebook, as HTML or as Markdown."""

    html: str
    markdown: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.markdown


class Results:
    """The folder ``root/<name of the profile>``; ``root`` is :func:`default_root` if it is not given.

    The attributes folder, tables, figures and notebooks are folders, which exist; run_file is ``run.json``.  Raises
    ``StorageError`` if a file is in the place of a folder, or the folder cannot be written.
    """

    def __init__(self, profile: str | Profile, root: str | os.PathLike[str] | None = None) -> None:
        self.profile_name = profile.name if isinstance(profile, Profile) else str(profile)
        _check_name(self.profile_name, "profile")
        self.folder = (Path(root) if root else default_root()).resolve() / self.profile_name
        self.run_file = self.folder / "run.json"
        folders = "tables", "figures", "notebooks"
        self.tables, self.figures, self.notebooks = (self.path(name, "file").parent for name in folders)

    def path(self, *parts: str) -> Path:
        """``folder/part/part``, with the folders above it made."""
        path = self.folder.joinpath(*parts)
        with explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def table(self, df: pd.DataFrame, name: str, caption: str = "", floatfmt: str | Mapping = ".3f") -> Table:
        """Write ``tables/name.csv``, ``.md`` and ``.tex`` without the index, and return the table for the notebook.

        ``floatfmt`` formats floating-point numbers outside the CSV, which has all digits: one format, or one for each
        column (else ``.3f``).
        """
        self.data(df, name)
        floats = df.select_dtypes("floating").columns
        given = floatfmt if isinstance(floatfmt, Mapping) else dict.fromkeys(floats, floatfmt)
        formats = {column: f"{{:{given.get(column, '.3f')}}}" for column in floats}

        shown = df.astype(object)
        for column, pattern in formats.items():
            shown[column] = shown[column].map(pattern.format, na_action="ignore")
        shown = shown.where(df.notna(), "").map(lambda cell: " ".join(str(cell).split()))
        sides = ["right" if pd.api.types.is_numeric_dtype(dtype) else "left" for dtype in df.dtypes]
        piped = shown.map(lambda cell: cell.replace("|", r"\|"))
        markdown = piped.to_markdown(index=False, disable_numparse=True, colalign=sides if len(df) else None)
        markdown = f"**{caption}**\n\n{markdown}" if caption else markdown
        write_text(self.tables / f"{name}.md", markdown + "\n")
        tex = shown.to_latex(
            index=False, escape=True, caption=caption.translate(str.maketrans(_TEX)) or None, label=f"tab:{name}",
            position="tbp", column_format="".join(side[0] for side in sides),
        )  # fmt: skip
        write_text(self.tables / f"{name}.tex", tex)

        styler = Styler(df.reset_index(drop=True), uuid=name, cell_ids=False).hide(axis="index")
        styler.format(formats, na_rep="", escape="html").format_index(escape="html", axis="columns")
        styler.set_table_styles([{"selector": "caption", "props": "caption-side: top; font-weight: bold;"}])
        return Table(styler.set_caption(html.escape(caption)).to_html(), markdown)

    def data(self, df: pd.DataFrame, name: str) -> None:
        """Write ``tables/name.csv`` alone, with all digits: long tables that other notebooks read."""
        _check_name(name, "table")
        write_text(self.tables / f"{name}.csv", df.to_csv(index=False, lineterminator="\n"))

    def figure(self, fig: Any, name: str) -> None:
        """Write a matplotlib figure as ``figures/name.png`` and ``figures/name.svg``, without dates or random ids."""
        import matplotlib as mpl

        _check_name(name, "figure")
        with mpl.rc_context({"svg.hashsalt": f"diffret-{name}"}):
            for ending, metadata in {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.items():
                with atomic_path(self.figures / f"{name}.{ending}") as path:
                    fig.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)

    def run(self) -> dict[str, dict[str, Any]]:
        """The content of ``run.json`` (empty before the first record); ``ValueError`` if it is no record."""
        if not self.run_file.exists():
            return {}
        try:
            content = json.loads(self.run_file.read_text(encoding="utf-8"))
            return {section: dict(entries) for section, entries in content.items()}
        except (AttributeError, TypeError, ValueError) as error:
            advice = "remove it to start a new record"
            raise ValueError(f"{self.run_file}: not a JSON object of objects ({error}); {advice}") from error

    def record(self, key: str, value: Any, section: str = "fingerprints") -> None:
        """Put ``value`` under ``key`` of a section of ``run.json``; everything else there stays."""
        content = self.run()
        content.setdefault(section, {})[key] = value
        self._write(content)

    def record_run(self, notebook: str, *, seconds: float, peak_memory_bytes: int | None, **more: Any) -> None:
        """Replace the entry of one notebook in ``run.json`` (``more``: status, fingerprints, and so on)."""
        entry = {"seconds": round(float(seconds), 2), "peak_memory_bytes": peak_memory_bytes, **more}
        self.record(notebook, entry, "notebooks")

    def record_environment(self, profile: Profile) -> None:
        """Put versions, hardware and the profile with its fingerprint and seed into ``run.json``."""
        content = self.run() | {"versions": versions(), "hardware": hardware()}
        content["profile"] = {"fingerprint": profile.fingerprint, "content": profile.model_dump(mode="json")}
        content.setdefault("seeds", {})["profile"] = profile.seed
        self._write(content)

    def _write(self, content: dict[str, Any]) -> None:
        options = {"indent": 2, "sort_keys": True, "ensure_ascii": False, "default": methodcaller("tolist")}  # numpy's
        write_text(self.run_file, json.dumps(content, **options) + "\n")


def set_style() -> None:
    """Set one look for all figures: colour-blind palette, light grid, sizes that stay readable in print."""
    import seaborn as sns

    look = {"figure.figsize": (7.0, 4.2), "figure.constrained_layout.use": True, "figure.dpi": 100,
            "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "axes.labelsize": 11,
            "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10, "legend.frameon": False}  # fmt: skip
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=look | {"image.cmap": "cividis"})


def _check_name(name: str, what: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{what} name {name!r}: allowed are letters, digits, '_', '-' and '.', no folder")
