"""Text for the adaptation of the embedded diffusion backbone: docstrings (nothing is imported) and descriptions.

Packages that serve as a retrieval collection are never read, and a text that shares a run of 13 words with one of
their docstrings is dropped, so that copied documentation does not leak in either.
"""

from __future__ import annotations

import inspect
import random
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterable
from email import message_from_string
from importlib import metadata
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

from tqdm import tqdm

from diffret_lib.config import PACKAGES
from diffret_lib.data.collection import words
from diffret_lib.data.docstrings import docstrings

#: Packages of the lock whose docstrings are kept for measuring the held-out cross-entropy.
HELD_OUT_PACKAGES = ("seaborn", "pyarrow", "numba", "sentence-transformers", "ranx")
#: Installed packages whose docstrings are text to train on.
INSTALLED_PACKAGES = (
    "torch", "transformers", "datasets", "peft", "accelerate", "huggingface-hub", "sympy", "mpmath", "sphinx",
    "docutils", "ipython", "jupyter-server", "jupyter-client", "jupyterlab", "nbconvert", "nbformat", "traitlets",
    "pydantic", "requests", "httpx", "aiohttp", "fsspec", "tqdm", "rich", "jinja2", "numpydoc", "pytest", "pillow",
    "joblib", "psutil", "tornado", "ipywidgets", "papermill", "patsy", "contourpy", "fonttools", "pyzmq",
    "jsonschema", "anyio", "tenacity", "lxml", "pygments", "beautifulsoup4", "typer", "click", "setuptools", "pip",
    "safetensors", "tokenizers",
)  # fmt: skip
#: Some of them, for a short run: quick to read, and prose more than code.
SHORT_PACKAGES = ("ipython", "traitlets", "nbconvert", "fsspec", "peft", "accelerate", "datasets")

MIN_CHARS, MAX_CHARS = 120, 6000
_SKIP_DIRS = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|_?extern(al)?|node_modules|_pytest/_code)(/|$)")


class Text(NamedTuple):
    """One training text and where it comes from."""

    package: str
    origin: str
    text: str


def clean(text: str) -> str:
    """Drop doctest examples and markup that is not prose; collapse blank lines."""
    lines, in_example = [], False
    for line in text.splitlines():
        stripped = line.strip()
        in_example = bool(stripped) and (in_example or stripped.startswith((">>>", "...")))
        if not in_example and not stripped.startswith(("![", "<img", "[![", "|", ".. image", ".. code", "```")):
            lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", inspect.cleandoc("\n".join(lines))).strip()


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text) >= MIN_CHARS and letters >= 0.75 * len(text) and text.isascii()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _texts(package: str, names: Iterable[str], read: Callable[[str], str], about: str = "") -> list[Text]:
    """Prose of a package's metadata and of the docstrings of its files, as far as they are sources, in order."""
    found = [("description", message_from_string(about).get_payload())]
    for name in names:
        if name.endswith(".py") and not _SKIP_DIRS.search(name):
            found += [(f"{name}:{of}", doc) for of, doc in docstrings(read(name))]
    cleaned = [(origin, clean(text)[:MAX_CHARS]) for origin, text in found]
    return [Text(package, origin, text) for origin, text in cleaned if _is_prose(text)]


def read_installed(package: str) -> list[Text]:
    """Texts of an installed distribution; none when it is not installed."""
    try:
        dist = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return []
    names = sorted(str(name) for name in dist.files or () if Path(dist.locate_file(name)).is_file())
    about = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or ""  # `dist.metadata` differs between finders
    return _texts(_normal(package), names, lambda n: Path(dist.locate_file(n)).read_text("utf-8", "ignore"), about)


def read_wheel(path: Path) -> list[Text]:
    """Texts of a wheel file, which need not be installed."""
    with zipfile.ZipFile(path) as archive:

        def read(name: str) -> str:
            return archive.read(name).decode("utf-8", "ignore")

        names = archive.namelist()
        about = next((read(name) for name in names if name.endswith(".dist-info/METADATA")), "")
        return _texts(_normal(path.name.split("-")[0]), sorted(names), read, about)


def read_standard_library() -> list[Text]:
    """Docstrings of the standard library and the language reference of ``pydoc_data.topics``."""
    reference = [
        Text("python", f"topics:{name}:{start}", body[start : start + MAX_CHARS])
        for name, body in sorted((name, clean(text)) for name, text in topics.topics.items())
        for start in range(0, len(body), MAX_CHARS)
    ]
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    sources = _texts("python", names, lambda name: (root / name).read_text("utf-8", "ignore"))
    return [text for text in reference if _is_prose(text.text)] + sources


def word_ngrams(text: str, n: int = 13) -> set[int]:
    """Hashes of the runs of ``n`` lower-cased words of a text."""
    run = words(text)
    return {hash(tuple(run[i : i + n])) for i in range(len(run) - n + 1)}


def training_texts(
    wheels: Path | None = None, *, packages: Iterable[str] = INSTALLED_PACKAGES, standard_library: bool = True,
    seed: int = 0, max_chars_per_package: int = 300_000,
) -> list[Text]:  # fmt: skip
    """Training texts, shuffled by ``seed``: no collection or held-out package, no copies, no leaked passage.

    They are those of the installed ``packages``, of the wheels in the folder ``wheels``, and of the standard library.
    A package gives about ``max_chars_per_package`` characters, chosen at random, so that none dominates.
    """
    leaked: set[int] = set()
    for package in tqdm(PACKAGES, desc="indexing evaluation docstrings"):
        leaked.update(*(word_ngrams(item.text) for item in read_installed(package)))
    sources = [(_normal(package), read_installed, package) for package in packages]
    for path in sorted(Path(wheels).glob("*.whl")) if wheels else ():
        sources.append((_normal(path.name.split("-")[0]), read_wheel, path))
    groups = {"python": read_standard_library() if standard_library else []}
    barred = {_normal(package) for package in (*PACKAGES, *HELD_OUT_PACKAGES)}
    for package, read, source in tqdm(sources, desc="reading packages to train on"):
        if package not in barred and package not in groups:
            groups[package] = read(source)
    rng = random.Random(seed)
    seen: set[str] = set()
    kept: list[Text] = []
    for _, texts in sorted(groups.items()):
        rng.shuffle(texts)
        size = 0
        for item in texts:
            if size < max_chars_per_package and item.text not in seen and not word_ngrams(item.text) & leaked:
                seen.add(item.text)
                size += len(item.text)
                kept.append(item)
    rng.shuffle(kept)
    return kept


def held_out_texts(packages: Iterable[str] = HELD_OUT_PACKAGES, per_package: int = 40) -> list[Text]:
    """Docstrings of packages that are never trained on, the same number of each where it has them."""
    rng = random.Random(0)
    kept: list[Text] = []
    for package in packages:
        texts = sorted({t.text for t in read_installed(package) if t.origin != "description"})
        rng.shuffle(texts)
        kept += [Text(package, "docstring", text) for text in texts[:per_package]]
    return kept
