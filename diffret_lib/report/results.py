"""The folder of a profile's results: tables, figures and the record of the run.

:class:`Results` owns ``results/<profile>/`` with ``tables/`` (CSV with all digits, Markdown, LaTeX), ``figures/`` (PNG
and SVG), ``notebooks/`` (executed copies) and ``run.json`` (versions, hardware, profile, seeds, fingerprints, seconds
and peak memory per notebook).  Every file is written whole or not at all, and the same content gives the same bytes.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from diffret_lib.cache import atomic_path, explained, write_text
from diffret_lib.config import CHECKOUT, Profile
from diffret_lib.environment import hardware, versions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"})
_TEX |= str.maketrans({"~": r"\textasciitilde ", "^": r"\textasciicircum ", "\\": r"\textbackslash "})


def default_root() -> Path:
    """``results/`` of the checkout, or in the current folder when there is no checkout."""
    return (CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()) / "results"


@dataclass(frozen=True)
class Table:
    """A table that shows itself in a notebook: the numbers as given, their HTML form and their Markdown."""

    frame: pd.DataFrame
    styler: Styler
    markdown: str

    def _repr_html_(self) -> str:
        return self.styler.to_html()

    def __repr__(self) -> str:
        return self.markdown


class Results:
    """The folder of one profile's results.

    Parameters
    ----------
    profile : str or Profile
        The profile's name; the folder is ``root/<name>``.
    root : path, optional
        Folder of all results; :func:`default_root` if it is not given.

    Attributes
    ----------
    folder, tables, figures, notebooks, run_file : Path
        The folders exist after construction.

    Raises
    ------
    StorageError
        If a file is in the place of a folder, or the folder cannot be written.
    """

    def __init__(self, profile: str | Profile, root: str | os.PathLike[str] | None = None) -> None:
        self.profile_name = profile.name if isinstance(profile, Profile) else str(profile)
        _check_name(self.profile_name, "profile")
        self.folder = (Path(root) if root else default_root()).resolve() / self.profile_name
        self.tables, self.figures, self.notebooks = (self.folder / n for n in ("tables", "figures", "notebooks"))
        self.run_file = self.folder / "run.json"
        for folder in (self.tables, self.figures, self.notebooks):
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def path(self, *parts: str) -> Path:
        """``folder/part/part``, with the folders above it made."""
        path = self.folder.joinpath(*parts)
        with explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def table(
        self, df: pd.DataFrame, name: str, caption: str = "", index: bool = False,
        floatfmt: str | Mapping[str, str] = ".3f",
    ) -> Table:  # fmt: skip
        """Write ``tables/name.csv``, ``.md`` and ``.tex``, and return the table for the notebook.

        Parameters
        ----------
        df : pandas.DataFrame
        name, caption : str
            The file name without its ending, and the text above the table.
        index : bool
            Whether the index is a column of the table.
        floatfmt : str or mapping
            Format of floating-point numbers outside the CSV (all digits), for all columns or by column (else ``.3f``).
        """
        frame = df.reset_index() if index else df.reset_index(drop=True)
        self.data(frame, name)
        floats = frame.columns[[pd.api.types.is_float_dtype(dtype) for dtype in frame.dtypes]]
        given = floatfmt if isinstance(floatfmt, Mapping) else dict.fromkeys(floats, floatfmt)
        formats = {column: f"{{:{given.get(column, '.3f')}}}" for column in floats}

        shown = frame.astype(object).where(frame.notna(), "")
        for column, pattern in formats.items():
            shown[column] = [pattern.format(value) if pd.notna(value) else "" for value in frame[column]]
        shown = shown.map(_one_line)
        shown.columns = [_one_line(" ".join(c) if isinstance(c, tuple) else c) for c in frame.columns]
        sides = ["right" if pd.api.types.is_numeric_dtype(dtype) else "left" for dtype in frame.dtypes]
        piped = shown.map(_escape_pipes).rename(columns=_escape_pipes)
        markdown = piped.to_markdown(index=False, disable_numparse=True, colalign=sides if len(shown) else None)
        markdown = f"**{caption}**\n\n{markdown}" if caption else markdown
        write_text(self.tables / f"{name}.md", markdown + "\n")
        tex = shown.to_latex(
            index=False, escape=True, caption=caption.translate(_TEX) or None, label=f"tab:{name}", position="tbp",
            column_format="".join(side[0] for side in sides),
        )  # fmt: skip
        write_text(self.tables / f"{name}.tex", tex)

        styler = Styler(frame, uuid=name, cell_ids=False).format(formats, na_rep="", escape="html").hide(axis="index")
        styler.format_index(escape="html", axis="columns").set_caption(html.escape(caption))
        styler.set_table_styles([{"selector": "caption", "props": "caption-side: top; font-weight: bold;"}])
        return Table(df, styler, markdown)

    def data(self, df: pd.DataFrame, name: str) -> None:
        """Write ``tables/name.csv`` alone, with all digits: long tables that other notebooks read."""
        _check_name(name, "table")
        write_text(self.tables / f"{name}.csv", df.to_csv(index=False, lineterminator="\n"))

    def figure(self, fig: Any, name: str) -> None:
        """Write ``figures/name.png`` (150 dots per inch) and ``figures/name.svg``, without dates or random ids.

        ``fig`` is a matplotlib figure, or anything that has one as ``.figure`` (axes, a seaborn grid).
        """
        import matplotlib as mpl

        _check_name(name, "figure")
        with mpl.rc_context({"svg.hashsalt": f"diffret-{name}"}):
            for ending, metadata in {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.items():
                with atomic_path(self.figures / f"{name}.{ending}") as path:
                    getattr(fig, "figure", fig).savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)

    def run(self) -> dict[str, Any]:
        """The content of ``run.json`` (empty before the first record).

        Raises
        ------
        ValueError
            If the file is not a JSON object.
        """
        if not self.run_file.exists():
            return {}
        advice = "remove it to start a new record"
        try:
            content = json.loads(self.run_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.run_file}: not valid JSON ({error}); {advice}") from error
        if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
            raise ValueError(f"{self.run_file}: a JSON object of objects is expected; {advice}")
        return content

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
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)
        write_text(self.run_file, text + "\n")


def set_style() -> None:
    """Set one look for all figures: colour-blind palette, light grid, sizes that stay readable in print."""
    import seaborn as sns

    small = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 10)
    look = {"figure.figsize": (7.0, 4.2), "figure.constrained_layout.use": True, "image.cmap": "cividis"}
    frames = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    sizes = {"figure.dpi": 100, "axes.titlesize": 12, "axes.labelsize": 11}
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=look | frames | sizes | small)


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} name {name!r}: allowed are letters, digits, '_', '-' and '.', no folder")


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _escape_pipes(text: str) -> str:
    return text.replace("|", r"\|")


def _plain(value: Any) -> Any:
    """Convert numpy's numbers and arrays, which JSON does not know."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be put into run.json")
