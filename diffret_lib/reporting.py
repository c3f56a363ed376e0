"""Where results go: tables, figures and the record of a run.

:class:`Results` owns one folder ``results/<profile>/`` with ``tables/`` (CSV with all digits, Markdown, LaTeX),
``figures/`` (PNG and SVG), ``notebooks/`` (executed copies and HTML) and ``run.json`` (versions, hardware,
profile, seeds, fingerprints, seconds and peak memory per notebook).  Every file is written whole or not at
all, and the same content gives the same bytes.

>>> from diffret_lib.reporting import Results
>>> results = Results("smoke")                                     # doctest: +SKIP
>>> results.table(frame, "zero_shot", caption="nDCG@10")           # doctest: +SKIP
>>> results.figure(figure, "heat_map")                             # doctest: +SKIP
>>> results.record("pydocs/numpy", collection.fingerprint)         # doctest: +SKIP
"""

from __future__ import annotations

import html
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import psutil

from diffret_lib.cache import atomic_path
from diffret_lib.profiles import Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Results", "Table", "default_root", "hardware", "set_style", "versions"]

#: Distributions whose version goes into ``run.json``.
RECORDED_PACKAGES = (
    "diffret", "torch", "transformers", "sentence-transformers", "peft", "safetensors", "tokenizers", "gguf",
    "ranx", "bm25s", "faiss-cpu", "numpydoc", "numpy", "scipy", "pandas", "scikit-learn", "statsmodels",
    "matplotlib", "networkx", "papermill", "nbconvert",
)  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def default_root() -> Path:
    """``results/`` beside the package in a checkout, else ``results/`` in the current folder."""
    checkout = Path(__file__).resolve().parents[1]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


class Table:
    """A table that shows itself in a notebook, the same way in every run.

    Attributes
    ----------
    frame : pandas.DataFrame
        The numbers, as given.
    styler : pandas.io.formats.style.Styler
        Its HTML form, to be styled further (``table.styler.background_gradient()``).
    """

    def __init__(self, frame: pd.DataFrame, styler: Any, markdown: str) -> None:
        self.frame, self.styler, self._markdown = frame, styler, markdown

    def _repr_html_(self) -> str:
        return self.styler.to_html()

    def __repr__(self) -> str:
        return self._markdown


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
    folder, tables, figures, notebooks : Path
        Exist after construction.
    """

    def __init__(self, profile: str | Profile, root: str | os.PathLike[str] | None = None) -> None:
        self.profile_name = profile.name if isinstance(profile, Profile) else str(profile)
        _check_name(self.profile_name, "profile")
        self.folder = (Path(root) if root else default_root()).resolve() / self.profile_name
        self.tables, self.figures, self.notebooks = (self.folder / n for n in ("tables", "figures", "notebooks"))
        for folder in (self.tables, self.figures, self.notebooks):
            folder.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"Results({self.profile_name!r})"

    def path(self, *parts: str) -> Path:
        """``folder/part/part``, with the folders above it made."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def table(
        self,
        df: pd.DataFrame,
        name: str,
        caption: str = "",
        index: bool = False,
        floatfmt: str | Mapping[str, str] = ".3f",
    ) -> Table:
        """Write ``tables/name.csv``, ``.md`` and ``.tex``, and return what the notebook shows.

        Parameters
        ----------
        df : pandas.DataFrame
        name : str
            File name without its ending.
        caption : str
            Stands above the table in Markdown, LaTeX and HTML.
        index : bool
            Whether the index is a column of the table.
        floatfmt : str or mapping
            Format of floating-point numbers for reading, for all columns or by column (others then have ``.3f``).
            The CSV holds all digits whatever it is.

        Returns
        -------
        Table
        """
        _check_name(name, "table")
        frame = df.reset_index() if index else df.reset_index(drop=True)
        shown = _formatted(frame, floatfmt)
        numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]

        flat = shown.map(_one_line)
        flat.columns = [_one_line(" ".join(map(str, c)).strip() if isinstance(c, tuple) else c) for c in frame.columns]
        markdown = flat.map(_escape_pipes).to_markdown(
            index=False,
            headers=[_escape_pipes(column) for column in flat.columns],
            disable_numparse=True,
            colalign=["right" if n else "left" for n in numeric] if len(flat) else None,
        )
        if caption:
            markdown = f"**{caption}**\n\n{markdown}"
        tex = flat.to_latex(
            index=False,
            escape=True,
            caption=_escape_tex(caption) or None,
            label=f"tab:{name}",
            position="tbp",
            column_format="".join("r" if n else "l" for n in numeric),
        )
        self.data(frame, name)
        for ending, text in (("md", markdown + "\n"), ("tex", tex)):
            _write(self.tables / f"{name}.{ending}", text)

        styler = (
            pd.io.formats.style.Styler(frame, uuid=name, cell_ids=False)
            .format(
                {c: _formatter(c, floatfmt) for c, d in zip(frame.columns, frame.dtypes, strict=True) if _is_float(d)},
                na_rep="",
                escape="html",
            )
            .format_index(escape="html", axis="columns")
            .hide(axis="index")
            .set_table_styles([{"selector": "caption", "props": "caption-side: top; font-weight: bold;"}])
        )
        if caption:
            styler = styler.set_caption(html.escape(caption))
        return Table(df, styler, markdown)

    def data(self, df: pd.DataFrame, name: str) -> None:
        """Write ``tables/name.csv`` alone, with all digits: what other notebooks read, too long for a page."""
        _check_name(name, "table")
        _write(self.tables / f"{name}.csv", df.to_csv(index=False, lineterminator="\n"))

    def figure(self, fig: Figure | Any, name: str) -> None:
        """Write ``figures/name.png`` (150 dots per inch) and ``figures/name.svg``, without dates or random ids.

        ``fig`` is a matplotlib figure, or anything that has one as ``.figure`` (axes, a seaborn grid).
        """
        import matplotlib as mpl

        _check_name(name, "figure")
        fig = getattr(fig, "figure", fig)
        options: dict[str, dict[str, Any]] = {
            "png": {"dpi": 150, "metadata": {"Software": None}},
            "svg": {"metadata": {"Date": None, "Creator": None}},
        }
        with mpl.rc_context({"svg.hashsalt": f"diffret-{name}"}):
            for ending, more in options.items():
                with atomic_path(self.figures / f"{name}.{ending}") as temporary:
                    fig.savefig(temporary, format=ending, bbox_inches="tight", **more)

    @property
    def run_file(self) -> Path:
        """``run.json``."""
        return self.folder / "run.json"

    def run(self) -> dict[str, Any]:
        """The content of ``run.json`` (empty before the first record).

        Raises
        ------
        ValueError
            If the file is not a JSON object.
        """
        if not self.run_file.exists():
            return {}
        try:
            content = json.loads(self.run_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.run_file}: not valid JSON ({error}); remove it to start a new record") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.run_file}: a JSON object is expected; remove it to start a new record")
        return content

    def record(self, key: str, value: Any, section: str = "fingerprints") -> None:
        """Put ``value`` under ``key`` of a section of ``run.json``; what is there otherwise stays.

        A mapping is merged into a mapping that is there; anything else replaces it.
        """
        self._merge({section: {key: value}})

    def record_run(self, notebook: str, *, seconds: float, peak_memory_bytes: int | None, **more: Any) -> None:
        """Replace the entry of one notebook in ``run.json`` (``more``: status, fingerprints, and so on)."""
        entry = {"seconds": round(float(seconds), 2), "peak_memory_bytes": peak_memory_bytes, **more}
        content = self.run()
        content.setdefault("notebooks", {})[notebook] = entry
        self._write_run(content)

    def record_environment(self, profile: Profile | None = None) -> None:
        """Put versions, hardware and (if given) the profile with its fingerprint and seed into ``run.json``."""
        content = self.run()
        content["versions"], content["hardware"] = versions(), hardware()
        if profile is not None:
            content["profile"] = {"fingerprint": profile.fingerprint, "content": profile.model_dump(mode="json")}
            content.setdefault("seeds", {})["profile"] = profile.seed
        self._write_run(content)

    def _merge(self, update: Mapping[str, Any]) -> None:
        content = self.run()
        _merge(content, update)
        self._write_run(content)

    def _write_run(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)
        _write(self.run_file, text + "\n")


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
    return {
        "cpu": _cpu_model(),
        "cores_logical": psutil.cpu_count(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Names and memory as the driver tells them; asked without torch, which would take seconds to import."""
    lines = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def set_style() -> None:
    """One look for all figures: colour-blind palette, light grid, sizes that stay readable in print."""
    import seaborn as sns

    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette="colorblind",
        rc={
            "figure.figsize": (7.0, 4.2),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "image.cmap": "cividis",
        },
    )


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} name {name!r}: allowed are letters, digits, '_', '-' and '.', no folder")


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def _is_float(dtype: Any) -> bool:
    return pd.api.types.is_float_dtype(dtype)


def _formatter(column: Any, floatfmt: str | Mapping[str, str]) -> Any:
    spec = floatfmt if isinstance(floatfmt, str) else floatfmt.get(column, ".3f")
    return lambda value: "" if pd.isna(value) else format(value, spec)


def _formatted(frame: pd.DataFrame, floatfmt: str | Mapping[str, str]) -> pd.DataFrame:
    """The frame as text: floating-point columns by their format, missing values empty."""
    columns = []
    for position, column in enumerate(frame.columns):
        values = frame.iloc[:, position]
        text = _formatter(column, floatfmt) if _is_float(values.dtype) else lambda v: "" if _missing(v) else str(v)
        columns.append(pd.Series([text(value) for value in values], dtype=object))
    shown = pd.concat(columns, axis=1) if columns else pd.DataFrame()
    shown.columns = frame.columns
    return shown


def _missing(value: Any) -> bool:
    return bool(np.ndim(value) == 0 and pd.isna(value))


def _one_line(text: Any) -> str:
    return " ".join(str(text).split()) if str(text).strip() else ""


def _escape_pipes(text: str) -> str:
    return text.replace("|", r"\|")


_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde ", "^": r"\textasciicircum "}
_TEX["\\"] = r"\textbackslash "


def _escape_tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _merge(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(old.get(key), dict):
            _merge(old[key], value)
        else:
            old[key] = value


def _plain(value: Any) -> Any:
    """What JSON cannot say by itself: numpy numbers and arrays, paths, sets."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be put into run.json")
