"""Execute a numbered notebook and keep its result: ``python -m diffret_lib.reproduce 01_backbones``.

The notebook runs by papermill in its own folder, in a kernel of the very interpreter that runs this module
(whatever kernels are registered on the machine).  The executed copy and its HTML go to
``results/<profile>/notebooks/``, seconds and peak memory to ``results/<profile>/run.json``.  What differs
between two runs of the same code (timings, progress bars, random ids) is taken out of the executed copy.

A notebook that fails leaves ``<name>.failed.ipynb`` for reading; an earlier good copy stays.  The failing
cell and its traceback are the last thing printed, and the exit status is 1.

Parameters given to a notebook, each if its ``parameters`` cell names it: ``profile``, ``collection`` (with
``--collection``), ``results_root`` (with ``--results``), and whatever ``-p`` says.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import papermill
import yaml
import zmq
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from diffret_lib.cache import atomic_path
from diffret_lib.profiles import ProfileError, load_profile
from diffret_lib.reporting import Results

__all__ = ["NOTEBOOKS_DIR", "NotebookError", "ParameterError", "main", "run_notebook"]

#: Folder of the numbered notebooks.
NOTEBOOKS_DIR = Path(__file__).resolve().parents[1] / "notebooks"

#: HTML larger than this (bytes) stays out of version control.
LARGE_HTML = 5_000_000

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_PROGRESS = re.compile(r"\d+%\|.*\||\d+(\.\d+)?\w* ?\[\d+:\d+(:\d+)?, ")
_CURSOR_UP = re.compile(r"\x1b\[\d*A")
_WIDGET = "application/vnd.jupyter.widget-view+json"

# The imports leave 600,000 objects that live as long as the kernel: looking through them for garbage takes a second
# while they come and two when the kernel ends, in every notebook.
_KERNEL = """
import atexit, gc, runpy
gc.set_threshold(10_000, 10, 10)
atexit.register(gc.freeze)
runpy.run_module("ipykernel_launcher", run_name="__main__")
"""


class ParameterError(ValueError):
    """A notebook that is not there, or a parameter that it does not have."""


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message ends with the failing cell's source and traceback.

    Attributes
    ----------
    kept : Path
        The executed copy up to the failure.
    """

    def __init__(self, message: str, kept: Path) -> None:
        super().__init__(message)
        self.kept = kept


def run_notebook(
    notebook: str | Path,
    profile: str | Path = "embedded",
    *,
    collection: str | None = None,
    results_root: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Execute one notebook under a profile.

    Parameters
    ----------
    notebook : str or Path
        A name in ``notebooks/`` (``"01_backbones"``) or the path of an ``.ipynb`` file.
    profile : str or Path
        As for :func:`diffret_lib.profiles.load_profile`.
    collection : str, optional
        A further test collection (BEIR folder, ``path`` or ``path:split``), relative to the current folder.
    results_root : path, optional
        Folder of all results, ``results/`` of the checkout if it is not given.
    parameters : mapping, optional
        Further parameters; each must be in the notebook's ``parameters`` cell.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Path
        The executed copy.

    Raises
    ------
    ProfileError, ParameterError
        Before anything runs.
    NotebookError
        If a cell raises or the kernel dies.
    """
    source = _find(notebook)
    loaded = load_profile(profile, collection)
    content = _read(source)
    folder = source.parent
    given = _parameters(content, source, profile, collection, results_root, parameters or {})

    results = Results(loaded, results_root)
    results.record_environment(loaded)
    target = results.notebooks / source.name
    failed = target.with_suffix(".failed.ipynb")
    running = target.with_suffix(f".{os.getpid()}.running.ipynb")
    measured: dict[str, int] = {}
    error: BaseException | None = None
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(
                content,
                str(running),
                parameters=given,
                cwd=str(folder),
                kernel_name="python3",
                language="python",
                progress_bar=progress,
                kernel_manager_class=_kernel_manager(measured),
            )
    except BaseException as raised:  # kept and raised again below, a keyboard interrupt included
        error = raised
    seconds = time.perf_counter() - start
    try:
        executed = nbformat.read(running, as_version=4) if running.exists() else content
        message = None if error is None else _explain(error, executed)
        _clean(executed, content)
        with atomic_path(failed if error else target) as temporary:
            nbformat.write(executed, temporary)
    finally:
        running.unlink(missing_ok=True)
    results.record_run(
        source.stem,
        seconds=seconds,
        peak_memory_bytes=measured.get("peak") or _peak_of_children(),
        status="failed" if error else "ok",
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
    )
    if error is not None:
        if not isinstance(error, Exception):
            raise error
        kept = f"{source.name} failed under profile {loaded.name}; its executed copy is {_shown(failed)}"
        raise NotebookError(f"{kept}\n\n{message}", failed) from error
    failed.unlink(missing_ok=True)
    _write_html(executed, target, folder)
    return target


def _find(notebook: str | Path) -> Path:
    path = Path(notebook)
    candidates = [path] if path.suffix == ".ipynb" else [NOTEBOOKS_DIR / f"{path}.ipynb"]
    if path.suffix == ".ipynb" and path.name == str(path):
        candidates.append(NOTEBOOKS_DIR / path)
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    names = ", ".join(sorted(p.stem for p in NOTEBOOKS_DIR.glob("[0-9]*.ipynb"))) or "none is"
    raise ParameterError(f"there is no notebook {str(notebook)!r}; in {_shown(NOTEBOOKS_DIR)}: {names}")


def _read(path: Path) -> nbformat.NotebookNode:
    """The notebook in the current format, with a kernel name and ids that are the same in every run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = nbformat.read(path, as_version=nbformat.NO_CONVERT)
            had_ids = [cell.get("id") for cell in raw.get("cells", [])]
            notebook = nbformat.convert(raw, 4)
    except Exception as error:  # nbformat raises many kinds
        raise ParameterError(f"{_shown(path)}: not a readable notebook: {error}") from error
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    for number, cell in enumerate(notebook.cells):
        if not (number < len(had_ids) and had_ids[number]):
            cell["id"] = f"cell-{number}"
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


def _parameters(
    content: nbformat.NotebookNode,
    source: Path,
    profile: str | Path,
    collection: str | None,
    results_root: str | Path | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    known = papermill.inspect_notebook(content)
    if unknown := sorted(set(more) - set(known)):
        raise ParameterError(
            f"{_shown(source)} has no parameter {', '.join(unknown)}; "
            f"its parameters cell names {', '.join(known) or 'none'}"
        )
    if results_root is not None and "results_root" not in known:
        raise ParameterError(f"{_shown(source)} has no parameter results_root, so it cannot write to {results_root}")
    given: dict[str, Any] = {}
    if "profile" in known:
        is_file = Path(profile).suffix in (".yml", ".yaml")
        given["profile"] = _relative(profile, source.parent) if is_file else str(profile)
    if collection and "collection" in known:
        named = collection.startswith("pydocs/") and not Path(collection).exists()
        given["collection"] = collection if named else _relative(collection, source.parent)
    if results_root is not None:
        given["results_root"] = _relative(results_root, source.parent)
    return given | dict(more)


def _relative(path: str | Path, folder: Path) -> str:
    """``path`` as seen from ``folder``: an executed copy then says nothing of where the checkout lies."""
    return Path(os.path.relpath(Path(path).expanduser().absolute(), folder)).as_posix()


class _ShellChannel(AsyncZMQSocketChannel):
    """The kernel's replies, looked for again every second.

    A message that is sent over the socket (as nbclient does for widgets) takes away the signal of a reply that came in
    the same moment; the library waits for that signal alone, and so for ever.
    """

    seconds = 1.0

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        while timeout is None:
            try:
                return await super().get_msg(self.seconds)
            except Empty:
                continue
        return await super().get_msg(timeout)


class _Client(AsyncKernelClient):
    shell_channel_class = _ShellChannel


def _kernel_manager(measured: dict[str, int]) -> type[AsyncKernelManager]:
    """A manager whose kernel is this interpreter, and that reads the kernel's peak memory before it ends it."""

    class ThisInterpreter(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.client_factory = _Client
            if self.has_trait("transport_encryption") and zmq.has("curve"):
                self.transport_encryption = "auto"  # else the kernel warns of it in every notebook

        @property
        def kernel_spec(self) -> KernelSpec:
            package_root = str(Path(__file__).resolve().parents[1])
            search = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            return KernelSpec(
                argv=[sys.executable, "-c", _KERNEL, "-f", "{connection_file}"],
                display_name="Python 3",
                language="python",
                metadata={"debugger": True, "supported_encryption": ["curve"]},
                env={
                    "PYTHONPATH": os.pathsep.join(search).replace("$", "$$"),
                    "PYTHONHASHSEED": "0",
                    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                },
            )

        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
            pid = getattr(self.provisioner, "pid", None)
            if pid and (peak := _peak_of(pid)):
                measured["peak"] = peak
            await super().shutdown_kernel(now=now, restart=restart)

    return ThisInterpreter


def _peak_of(pid: int) -> int | None:
    """Largest resident memory (bytes) of a running process, as Linux keeps it (``VmHWM``)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _peak_of_children() -> int:
    """Largest resident memory of any child process that has ended: for other systems, and for a killed kernel."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _explain(error: BaseException, executed: nbformat.NotebookNode) -> str:
    """What failed: the cell's source, then its traceback."""
    if isinstance(error, PapermillExecutionError):
        return _cell(error.source) + "\n".join(error.traceback).rstrip()
    begun = [c for c in executed.cells if c.cell_type == "code" and c.metadata.get("papermill", {}).get("start_time")]
    where = _cell(begun[-1].source) if begun else ""
    if isinstance(error, DeadKernelError):
        return f"{where}{type(error).__name__}: {error}: the kernel's process ended, most often for want of memory"
    return where + "".join(traceback.format_exception(error)).rstrip()


def _cell(source: str) -> str:
    lines = "\n".join(f"    {line}".rstrip() for line in source.rstrip().splitlines())
    return f"The failing cell:\n\n{lines}\n\n"


def _clean(executed: nbformat.NotebookNode, source: nbformat.NotebookNode) -> None:
    """Take out what differs between two runs of the same code (in place)."""
    for key in ("papermill", "widgets"):
        executed.metadata.pop(key, None)
    if "kernelspec" in source.metadata:
        executed.metadata["kernelspec"] = source.metadata["kernelspec"]
    known = {cell["id"] for cell in source.cells}
    for number, cell in enumerate(executed.cells):
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell["id"] not in known:
            injected = "injected-parameters" in cell.metadata.get("tags", [])
            cell["id"] = "injected-parameters" if injected else f"added-{number}"
        if cell.cell_type == "code":
            cell["outputs"] = [output for output in map(_clean_output, cell.outputs) if output is not None]


def _clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Without progress bars: a widget shows nothing once its kernel is gone, a text bar holds its timings."""
    if _WIDGET in output.get("data", {}):
        return None
    if output.output_type == "stream":
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in _CURSOR_UP.sub("", output.text).split("\n")]
        if output.name == "stderr":
            lines = [line for line in lines if not _PROGRESS.search(line)]
        output["text"] = "\n".join(lines).lstrip("\n")
        if not output["text"]:
            return None
    return output


def _write_html(notebook: nbformat.NotebookNode, target: Path, folder: Path) -> None:
    """The executed copy as one HTML file with its images inside."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True, jupyter_widgets_base_url="", widget_renderer_url="")
    logging.getLogger("traitlets").setLevel(logging.ERROR)  # asks for texts that describe the images
    resources = {"metadata": {"name": target.stem, "path": str(folder)}}
    body, _ = exporter.from_notebook_node(notebook, resources=resources)
    path = target.with_suffix(".html")
    with atomic_path(path) as temporary:
        Path(temporary).write_text(body, encoding="utf-8", newline="\n")
    _ignore_large(path)


def _ignore_large(path: Path) -> None:
    """Keep a ``.gitignore`` beside the results that names the HTML files too large to be committed."""
    ignore = path.with_name(".gitignore")
    old = set(ignore.read_text(encoding="utf-8").split()) if ignore.exists() else set()
    new = old | {path.name} if path.stat().st_size > LARGE_HTML else old - {path.name}
    if new:
        with atomic_path(ignore) as temporary:
            Path(temporary).write_text("".join(f"{name}\n" for name in sorted(new)), encoding="utf-8", newline="\n")
    else:
        ignore.unlink(missing_ok=True)


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m diffret_lib.reproduce", description="Execute a notebook into results/<profile>/notebooks/."
    )
    parser.add_argument("notebook", help="name in notebooks/ (01_backbones), or path of an .ipynb file")
    parser.add_argument("--profile", default="embedded", help="name in notebooks/profiles/, or path (%(default)s)")
    parser.add_argument("--collection", metavar="PATH", help="BEIR folder (path or path:split) to evaluate on as well")
    parser.add_argument("--results", metavar="DIR", help="folder of all results (results/ of the checkout)")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
        help="a further parameter of the notebook, its value as in YAML; may be given again",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        parameters = {key: yaml.safe_load(value) for key, value in options.parameter}
        target = run_notebook(
            options.notebook,
            options.profile,
            collection=options.collection or None,
            results_root=options.results,
            parameters=parameters,
        )
    except (ProfileError, ParameterError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotebookError as error:
        message = str(error) if sys.stderr.isatty() else _ANSI.sub("", str(error))
        sys.stdout.flush()
        print(f"\n{message}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{_shown(target)} (and .html)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
