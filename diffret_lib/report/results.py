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
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from diffret_lib.cache import atomic_path, explained, write_text
from diffret_lib.config import CHECKOUT, Profile
from diffret_lib.environment import hardware, versions

#: What pdfLaTeX needs to be told of a character; any other beyond Latin-1 is named by its code.
_TEX = {c: f"\\{c}" for c in "&%$#{}"} | {"_": r"\_\allowbreak{}"}
_TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"\textless{}",
         ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "−": "$-$", "×": r"$\times$",
         "≥": r"$\ge$", "≤": r"$\le$", "†": r"\dag{}", "␣": r"\textvisiblespace{}", "…": r"\dots{}", "–": "--",
         "’": "'", "/": r"/\allowbreak{}", "·": r"\textperiodcentered\allowbreak{}"}  # fmt: skip
#: Rows of the longest table that is written for LaTeX, and characters of a line of its small print across a page.
_TEX_ROWS, _TEX_WIDTH = 60, 130
#: Makes what is larger than the page as large as it, and leaves all else.
_TEX_FIT = (r"\resizebox*{!}{\ifdim\totalheight>0.85\textheight 0.85\textheight\else\totalheight\fi}{"
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%s}}")  # fmt: skip
ALPHA = 0.05


def telling_collections(metric: str, passages: Mapping[str, int]) -> list[str]:
    """Collections (name to number of passages) on which a metric tells rankings apart.

    All of them; for recall, those with more passages than it looks at.
    """
    least = int(metric.split("@")[1]) if metric.startswith("recall") else 0
    return [name for name, n in passages.items() if n > least]


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
        self.profile_name = profile.name if isinstance(profile, Profile) else profile
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

    def table(
        self, df: pd.DataFrame, name: str, caption: str = "", floatfmt: str | Mapping = "",
        *, bold: pd.DataFrame | None = None, data: pd.DataFrame | None = None,
    ) -> Table:  # fmt: skip
        """Write ``tables/name.csv``, ``.md`` and ``.tex`` without the index, and return the table for the notebook.

        The CSV has every column and all digits (of ``data``, where that is another table).  What is shown is
        :func:`readable`, in bold where ``bold`` (bool, a column for some of ``df``) is true; ``floatfmt`` formats
        floating-point numbers: one format such as ``.2f``, or one for each column.  The LaTeX needs the packages that
        its first line names; a table of more than 60 rows has none.
        """
        self.data(df if data is None else data, name)
        shown = readable(df, floatfmt)
        bold = pd.DataFrame(index=shown.index) if bold is None else bold.reset_index(drop=True).rename(columns=_header)
        strong = bold.reindex(columns=shown.columns, fill_value=False)
        sides = ["right" if _numeric(shown[column]) else "left" for column in shown]
        piped = shown.map(lambda cell: cell.replace("|", r"\|")).where(~strong, "**" + shown + "**")
        markdown = piped.to_markdown(index=False, disable_numparse=True, colalign=sides if len(df) else None)
        markdown = f"**{caption}**\n\n{markdown}" if caption else markdown
        write_text(self.tables / f"{name}.md", markdown + "\n")
        if len(df) <= _TEX_ROWS:
            write_text(self.tables / f"{name}.tex", latex(shown, strong, caption, f"tab:{name}"))
        else:
            (self.tables / f"{name}.tex").unlink(missing_ok=True)

        # an interval stays on one line, and so does "< .001"
        unbroken = shown.map(lambda cell: re.sub(r"(?<=\d,) (?=-?\d)|(?<=^<) ", "\u00a0", cell))
        styler = Styler(unbroken, uuid=name, cell_ids=False).hide(axis="index").format(escape="html")
        styler.apply(lambda _: strong.map({True: "font-weight: bold", False: ""}.get), axis=None)
        long = [i for i, column in enumerate(shown) if i and shown[column].str.len().max() > 28]
        looks = [{"selector": f"td.col{i}", "props": "min-width: min(32ch, 45vw);"} for i in long]
        looks += [{"selector": "caption", "props": "caption-side: top; font-weight: bold;"}]
        styler.set_table_styles(looks)
        styler.format_index(escape="html", axis="columns").set_caption(html.escape(caption))
        return Table(styler.to_html(), markdown)

    def effectiveness(
        self, wide: pd.DataFrame, name: str, caption: str, intervals: pd.DataFrame | None = None,
        comparisons: pd.DataFrame | None = None,
    ) -> Table:  # fmt: skip
        """Write a table of systems by collections: the macro average first, the best of each column in bold.

        ``wide`` has the columns training, system, mode, macro, and then one a collection; ``intervals`` those of
        :func:`~diffret_lib.experiments.comparison.system_intervals`, ``comparisons`` those of ``compare_systems``:
        ``*`` marks several vectors that are better than one (corrected p < 0.05), ``†`` a fine-tuned system that is
        better than zero-shot, in the same mode.
        """
        keys = ["training", "system", "mode"]
        data = wide
        if intervals is not None:
            data = wide.merge(intervals[[*keys, "low", "high"]], how="left", on=keys)
            data = data[[*keys, "macro", "low", "high", *wide.columns[4:]]]
        named = data["system"].where(data["training"] == "zero-shot", data["system"] + ", " + data["training"])
        shown = data.drop(columns=["training", "mode"]).assign(system=named + " (" + data["mode"] + ")")
        means = shown.drop(columns=["system", "low", "high"], errors="ignore")
        if comparisons is not None:
            clear = comparisons[comparisons["reading"] == "better"]
            better = set(zip(clear["better"], clear["than"], clear["mode"]))
            marks = [
                "*" * ((of, of.replace("multi", "single"), mode) in better) + "†" * ((of, plain, mode) in better)
                for of, plain, mode in zip(named, data["system"], data["mode"])
            ]
            shown.insert(shown.columns.get_loc("macro") + 1, "mark", marks)
            caption += " * better than one vector, † better than zero-shot (corrected p < 0.05)."
        return self.table(shown, name, caption, bold=means.eq(means.max()), data=data)

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
                    fig.savefig(path, dpi=200, bbox_inches="tight", metadata=metadata)

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


def readable(df: pd.DataFrame, floatfmt: str | Mapping = "") -> pd.DataFrame:
    """A table as it is read: all cells and headers text, without the index.

    Columns ``low``, ``high`` (or ``x_low``, ``x_high``) become an interval behind the value before them; behind ``low``
    and ``high`` stands ``*`` where the table's p (corrected, if it has that) is below 0.05.  ``low_all``, ``high_all``
    become one interval; a column ``mark`` joins the value before it.  A p below 0.001 is "< .001", numbers of queries
    from 100,000 are "> 100,000", a hash has its first 12 digits, underscores of a header are spaces; a column without a
    cell is left out.
    """
    df = df.reset_index(drop=True)
    shown, value = df.astype(object), {}
    for place, (low, high) in enumerate(zip(df.columns, df.columns[1:])):
        if re.fullmatch(r"(.*_)?low(_all)?", low) and high == low.replace("low", "high"):
            before = [c for c in df.columns[:place] if c not in {"mark", *value}]
            value[low] = value[high] = before[-1]
    for column in df.select_dtypes("floating"):
        own = value.get(column, column)
        given = floatfmt.get(own) if isinstance(floatfmt, Mapping) else floatfmt
        number = f"{{:z{given or _digits(df[own])}}}".format  # z: what rounds to zero has no sign
        text = p_value if re.match(r"p(_|$)", column) else _queries if column == "needed_queries" else number
        shown[column] = shown[column].map(text, na_action="ignore")
    shown = shown.where(df.notna(), "").map(_cell)
    clear = next((df[p] < ALPHA for p in ("p_corrected", "p") if p in df), pd.Series(False, df.index))
    if "mark" in df:
        shown.iloc[:, df.columns.get_loc("mark") - 1] += shown.pop("mark")
    for low, high in zip(list(value)[::2], list(value)[1::2]):
        ends = ("[" + shown[low] + ", " + shown.pop(high) + "]").where(df[low].notna(), "")
        if low.endswith("low"):
            mark = clear.map({True: "*", False: ""}) if low == "low" else ""
            shown[value[low]] += (" " + ends + mark).where(ends != "", "")
            del shown[low]
        else:
            shown[low] = ends
    empty = shown.columns[(shown == "").all()] if len(shown) else []
    shown = shown.drop(columns=empty).rename(columns={"low_all": "interval over collections too"})
    return shown.rename(columns=_header)


def paper_against_ours(tests: pd.DataFrame) -> pd.DataFrame:
    """What the paper says and what was measured, for each test of the ledger that counts.

    ``tests`` has the columns claim, comparison, direction, statistic, bound, value, low, high, counts and
    verdict.  Columns claim, comparison, paper (the direction, and the size where the paper gives one), ours (the
    direction that the interval leaves, from the paper's size where it is "about" one; empty where nothing was tested),
    value, low, high and verdict.
    """
    rows = tests[tests["counts"].astype(bool)].reset_index(drop=True)
    said = {"greater": "better", "clear gain": "clear headroom", "no gain": "no reliable gain",
            "at most": "about the same", "about": "{:g} times"}  # fmt: skip
    rows["paper"] = [said[direction].format(bound) for direction, bound in zip(rows["direction"], rows["bound"])]
    nothing = rows["bound"].where(rows["direction"] == "about", rows["statistic"].str.startswith("ratio").astype(float))
    sides = [rows["value"].isna(), rows["low"] > nothing, rows["high"] < nothing]
    rows["ours"] = np.select(sides, ["", "more", "less"], "not clear")
    return rows["claim comparison paper ours value low high verdict".split()]


def p_value(p: float) -> str:
    """A p-value: "< .001", else three digits without the zero before the point."""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _queries(number: float) -> str:
    return f"{number:,.0f}" if number < 1e5 else "> 100,000"


def latex(shown: pd.DataFrame, strong: pd.DataFrame, caption: str, label: str) -> str:
    """A table of text for pdfLaTeX, no larger than a page; numbers align at their points (siunitx)."""
    widths = {column: max([len(column), *shown[column].map(len)]) for column in shown}
    long = {column: n for column, n in widths.items() if n > 28 and not _numeric(shown[column])}
    fixed = sum(n + 2 for column, n in widths.items() if column not in long)
    room = max(_TEX_WIDTH - fixed, 24 * len(long))
    share = {column: min(n, room * n / sum(long.values())) / _TEX_WIDTH for column, n in long.items()}

    def side(column: str) -> str:
        if column in share:
            return f">{{\\raggedright\\arraybackslash}}p{{{max(0.08, 0.94 * share[column]):.2f}\\textwidth}}"
        digits = [len(part) for part in max(shown[column], key=len, default="").lstrip("-").split(".")]
        return f"S[table-format=-{'.'.join(map(str, digits))}]" if _numeric(shown[column]) else "l"

    escaped = shown.map(_tex)
    cells = escaped.where(~strong, "{\\textbf{" + escaped + "}}").set_axis([f"{{{_tex(c)}}}" for c in shown], axis=1)
    body = cells.to_latex(index=False, column_format=f"@{{}}{''.join(map(side, shown))}@{{}}").strip()
    body = _TEX_FIT % body if fixed + room > _TEX_WIDTH or len(shown) > 25 else body
    environment = "table*" if sum(widths.values()) > 0.4 * _TEX_WIDTH else "table"
    return "\n".join([
        r"% \usepackage[T1]{fontenc} \usepackage{booktabs,graphicx,siunitx,textcomp}",
        rf"\begin{{{environment}}}[tbp]\centering\scriptsize\setlength{{\tabcolsep}}{{3pt}}",
        rf"\caption{{{_tex(caption)}}}\label{{{label}}}\vspace{{4pt}}", body, rf"\end{{{environment}}}", "",
    ])  # fmt: skip


def set_style() -> None:
    """Set one look for all figures: colour-blind palette, light grid, sizes that are readable in a column."""
    import seaborn as sns

    look = {"figure.figsize": (4.2, 3.0), "figure.constrained_layout.use": True, "figure.dpi": 150, "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.labelsize": 9,
            "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
            "lines.linewidth": 1.2, "grid.linewidth": 0.6, "axes.linewidth": 0.8}  # fmt: skip
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", rc=look | {"image.cmap": "cividis"})


def _digits(column: pd.Series) -> str:
    """Three decimals for numbers below 10, fewer for larger ones; three digits where all are below 0.01."""
    largest = column.abs().max()
    if 0 < largest < 0.01:
        return ".3g"
    return ".0f" if largest >= 1000 else ".1f" if largest >= 10 else ".3f"


def _header(column: Any) -> str:
    return _cell(column).replace("_", " ")


def _cell(cell: Any) -> str:
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{52}$", r"\1", " ".join(str(cell).split()))


def _numeric(column: pd.Series) -> bool:
    return len(column) > 0 and bool(column.str.fullmatch(r"-?\d+(\.\d+)?|").all()) and bool((column != "").any())


def _tex(text: str) -> str:
    def spelled(c: str) -> str:
        known = _TEX.get(c) or (c if c < "\u0100" else "")
        return known or (f"U+{ord(c):04X}" if unicodedata.category(c)[0] != "M" else "")

    return "".join(map(spelled, text))


def _check_name(name: str, what: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{what} name {name!r}: allowed are letters, digits, '_', '-' and '.', no folder")
