"""Text for the adaptation of the embedded diffusion backbone.

The text is documentation: docstrings (read with :mod:`ast`, nothing is imported) and package
descriptions (the README that a distribution's metadata carries) of installed packages and of wheels
on disk, the standard library's docstrings, and the language reference that ships with it
(``pydoc_data.topics``).  Packages that serve as a retrieval collection are never read, and a text that
shares a run of 13 words with one of their docstrings is dropped, so that copied documentation does not
leak in either.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import re
import sysconfig
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email import message_from_string
from importlib import metadata
from pathlib import Path

from tqdm.auto import tqdm

#: Packages that are retrieval collections; no training text comes from them.
COLLECTION_PACKAGES = ("pandas", "numpy", "scipy", "scikit-learn", "statsmodels", "matplotlib", "networkx")

#: Packages of the lock whose docstrings are kept for measuring the held-out cross-entropy.
HELD_OUT_PACKAGES = ("seaborn", "pyarrow", "numba", "sentence-transformers", "ranx")

#: Installed packages whose docstrings are text to train on.
INSTALLED_PACKAGES = (
    "torch", "transformers", "datasets", "peft", "accelerate", "huggingface-hub", "sympy", "mpmath",
    "sphinx", "docutils", "ipython", "jupyter-server", "jupyter-client", "jupyterlab", "nbconvert",
    "nbformat", "traitlets", "pydantic", "requests", "httpx", "aiohttp", "fsspec", "tqdm", "rich",
    "jinja2", "numpydoc", "pytest", "pillow", "joblib", "psutil", "tornado", "ipywidgets", "papermill",
    "patsy", "contourpy", "fonttools", "pyzmq", "jsonschema", "anyio", "tenacity", "lxml", "pygments",
    "beautifulsoup4", "typer", "click", "setuptools", "pip", "safetensors", "tokenizers",
)  # fmt: skip

#: Some of them, for a short run: quick to read, and prose more than code.
SHORT_PACKAGES = ("ipython", "traitlets", "nbconvert", "fsspec", "peft", "accelerate", "datasets")

MIN_CHARS, MAX_CHARS = 120, 6000
_NGRAM = 13
_SKIP_DIRS = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|_?extern(al)?|node_modules|_pytest/_code)(/|$)")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Text:
    """One training text and where it comes from."""

    package: str
    origin: str
    text: str


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield ``(qualified name, docstring)`` of the module, classes and functions of Python source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=True)
            if doc:
                yield name, doc
        for child in ast.iter_child_nodes(node):
            label = f"{name}.{child.name}".lstrip(".") if hasattr(child, "name") else name
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((label, child))


def clean(text: str) -> str:
    """Drop doctest examples and markup that is not prose; collapse blank lines."""
    lines, in_example = [], False
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith((">>>", "...")):
            in_example = True
        elif not stripped:
            in_example = False
        if in_example or stripped.startswith(("![", "<img", "[![", "|", ".. image", ".. code", "```")):
            continue
        lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", inspect.cleandoc("\n".join(lines))).strip()


def _accept(text: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text) >= MIN_CHARS and letters >= 0.75 * len(text) and text.isascii()


def _texts(package: str, sources: Iterable[tuple[str, str]], description: str | None) -> Iterator[Text]:
    if description:
        body = clean(description)[:MAX_CHARS]
        if _accept(body):
            yield Text(package, "description", body)
    for path, source in sources:
        for name, doc in docstrings(source):
            body = clean(doc)[:MAX_CHARS]
            if _accept(body):
                yield Text(package, f"{path}:{name}", body)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_installed(package: str) -> Iterator[Text]:
    """Texts of an installed distribution; nothing when it is not installed."""
    try:
        dist = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return
    paths = [f for f in dist.files or () if f.suffix == ".py" and not _SKIP_DIRS.search(str(f))]

    def sources() -> Iterator[tuple[str, str]]:
        for f in sorted(paths, key=str):
            try:
                yield str(f), Path(f.locate()).read_text(encoding="utf-8", errors="ignore")
            except OSError:
                continue

    yield from _texts(_normal(package), sources(), dist.metadata.get_payload() or None)


def read_wheel(path: Path) -> Iterator[Text]:
    """Texts of a wheel file, which need not be installed."""
    package = _normal(path.name.split("-")[0])
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".py") and not _SKIP_DIRS.search(n))
        meta = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        description = None
        if meta:
            description = message_from_string(archive.read(meta[0]).decode("utf-8", "ignore")).get_payload()
        sources = ((n, archive.read(n).decode("utf-8", "ignore")) for n in names)
        yield from _texts(package, sources, description)


def read_standard_library() -> Iterator[Text]:
    """Docstrings of the standard library and the language reference of ``pydoc_data.topics``."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        body = clean(text)
        for start in range(0, len(body), MAX_CHARS):
            piece = body[start : start + MAX_CHARS]
            if _accept(piece):
                yield Text("python", f"topics:{name}:{start}", piece)
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        p for p in sorted(root.rglob("*.py"))
        if "site-packages" not in p.parts and not _SKIP_DIRS.search(p.relative_to(root).as_posix())
    ]  # fmt: skip
    sources = ((p.relative_to(root).as_posix(), p.read_text("utf-8", "ignore")) for p in files)
    yield from _texts("python", sources, None)


def word_ngrams(text: str, n: int = _NGRAM) -> set[int]:
    """Hashes of the runs of ``n`` lower-cased words of a text."""
    words = _WORD.findall(text.lower())
    return {hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)}


def training_texts(
    wheels: Path | None = None,
    *,
    packages: Iterable[str] = INSTALLED_PACKAGES,
    standard_library: bool = True,
    seed: int = 0,
    max_chars_per_package: int = 300_000,
) -> list[Text]:
    """The training texts, shuffled: no collection or held-out package, no copies, no leaked passage.

    Parameters
    ----------
    wheels : Path, optional
        Folder of wheels to read besides what is installed.
    packages : iterable of str
        Installed packages to read.
    standard_library : bool
        Whether to read the standard library.
    seed : int
        Of the shuffle.
    max_chars_per_package : int
        A package gives at most this many characters, chosen at random, so that none dominates.
    """
    barred = {_normal(p) for p in (*COLLECTION_PACKAGES, *HELD_OUT_PACKAGES)}
    leaked: set[int] = set()
    for package in tqdm(COLLECTION_PACKAGES, desc="texts to stay clear of"):
        for item in read_installed(package):
            leaked |= word_ngrams(item.text)
    groups: dict[str, list[Text]] = {"python": list(read_standard_library()) if standard_library else []}
    sources: list[tuple[str, Iterable[Text]]] = [(_normal(p), read_installed(p)) for p in packages]
    for path in sorted(Path(wheels).glob("*.whl")) if wheels else ():
        sources.append((_normal(path.name.split("-")[0]), read_wheel(path)))
    for package, texts in tqdm(sources, desc="packages to train on"):
        if package not in barred and package not in groups:
            groups[package] = list(texts)
    rng = random.Random(seed)
    seen: set[str] = set()
    kept: list[Text] = []
    for _, texts in sorted(groups.items()):
        rng.shuffle(texts)
        size = 0
        for item in texts:
            key = hashlib.sha256(item.text.encode()).hexdigest()
            if size >= max_chars_per_package or key in seen or word_ngrams(item.text) & leaked:
                continue
            seen.add(key)
            size += len(item.text)
            kept.append(item)
    rng.shuffle(kept)
    return kept


def held_out_texts(*, seed: int = 0, per_package: int = 40, packages: Iterable[str] = HELD_OUT_PACKAGES) -> list[Text]:
    """Docstrings of packages that are never trained on, the same number of each where it has them."""
    rng = random.Random(seed)
    kept: list[Text] = []
    for package in packages:
        texts = sorted(set(t.text for t in read_installed(package) if t.origin != "description"))
        rng.shuffle(texts)
        kept += [Text(package, "docstring", t) for t in texts[:per_package]]
    return kept
