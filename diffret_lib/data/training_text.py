"""Text for the adaptation of the embedded diffusion backbone: docstrings, manuals and dictionaries.

Docstrings come from Python packages (nothing is imported), manuals and dictionaries from Debian's packages.  Packages
that serve as a retrieval collection are never read, and a text that shares a run of 13 words with one of their
docstrings, or with a passage or query of another collection, is dropped: copies do not leak in either.
"""

from __future__ import annotations

import gzip
import inspect
import random
import re
import subprocess
import sysconfig
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from email import message_from_string
from importlib import metadata
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

from lxml import html
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

#: Excerpts of Moby-Dick (1851) and of presidents' addresses to the Congress (1790 to 2016), in the public domain.
HELD_OUT_ENGLISH = Path(__file__).with_name("held_out_english.txt")

MIN_CHARS, MAX_CHARS = 120, 6000
#: Characters that a package gives at most.
MAX_CHARS_OF_A_PACKAGE = {"wheel": 300_000, "deb": 12_000_000}
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


_DICTIONARY_MARKS = (r"\\[^\\\n]*\\", ""), (r"\[[^][\n]*(Webster|PJC|WordNet)[^][\n]*\]", ""), (r"[{}]", "")


def _plain(name: str, raw: bytes) -> str | None:
    """Text of a file of a manual or a dictionary, by its name; None for other files."""
    if name.endswith((".gz", ".dz")):
        name, raw = name[:-3], gzip.decompress(raw)
    text = raw.decode("utf-8", "ignore")
    if name.endswith(".dict"):
        for pattern, by in _DICTIONARY_MARKS:
            text = re.sub(pattern, by, text)
        text = re.sub(r"\n(?=\S)", "\n\n", text)  # an entry begins where a line is not indented
    elif name.endswith(".html"):
        if not text.strip():
            return None
        parts = html.fromstring(raw).xpath("//p|//div[@class='para']|//li[not(p)]|//dd[not(p)]|//h1|//h2|//h3")
        text = "\n\n".join(re.sub(r"\s+", " ", part.text_content()).strip() for part in parts)
    elif name.endswith(".pod"):
        text = re.sub(r"(?m)^=\w+ ?", "", re.sub(r"\b[A-Z]<([^<>]*)>", r"\1", text))
    elif not name.endswith((".txt", ".rst")):
        return None
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _pieces(text: str) -> Iterator[str]:
    """A text cut at blank lines into pieces of at most ``MAX_CHARS`` characters, each as long as it can be."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > MAX_CHARS:
            yield piece
            piece = ""
        piece += paragraph[:MAX_CHARS].rstrip() + "\n\n"
    yield piece


def read_deb(path: Path) -> list[Text]:
    """Texts of a Debian package file: its plain text, HTML, reStructuredText, POD and dictionary files.

    ``dpkg-deb`` unpacks it (FileNotFoundError where there is none); changelogs and licences are left out.
    """
    package, found = path.name.split("_")[0], []
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as unpacked:
        with tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
            for member in archive:
                inside = member.isfile() and not re.search(r"changelog|copyright|NEWS|_sources/whatsnew", member.name)
                text = _plain(member.name, archive.extractfile(member).read()) if inside else None
                language = re.search(r"/html/([a-z]{2})-[A-Z]{2}/|\.([a-z]{2})\.(?:txt|html)", member.name)
                if text and (language is None or "en" in language.groups()):
                    found += [(f"{member.name}:{n}", piece) for n, piece in enumerate(_pieces(text))]
    cleaned = [(origin, clean(text)) for origin, text in sorted(found)]
    return [Text(package, origin, text) for origin, text in cleaned if _is_prose(text)]


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
    folder: Path | None = None, *, packages: Iterable[str] = INSTALLED_PACKAGES, standard_library: bool = True,
    clear_of: Iterable[str] = (), seed: int = 0, max_chars: Mapping[str, int] = MAX_CHARS_OF_A_PACKAGE,
) -> list[Text]:  # fmt: skip
    """Training texts, shuffled by ``seed``: no collection or held-out package, no copies, no leaked passage.

    They are those of the installed ``packages``, of the wheels and Debian packages in ``folder``, and of the standard
    library.  ``clear_of`` are further texts with which none shares 13 words in a row.  A package gives about
    ``max_chars`` characters, by the kind of its file, chosen at random, so that none dominates.
    """
    leaked: set[int] = set().union(*map(word_ngrams, [*clear_of, held_out_english()]))
    for package in tqdm(PACKAGES, desc="indexing evaluation docstrings"):
        leaked.update(*(word_ngrams(item.text) for item in read_installed(package)))
    sources: list[tuple[str, Callable[[Any], list[Text]], Any]] = [(_normal(p), read_installed, p) for p in packages]
    for pattern, read in (("*.whl", read_wheel), ("*.deb", read_deb)):
        for path in sorted(Path(folder).glob(pattern)) if folder else ():
            sources.append((_normal(path.name.split("-" if read is read_wheel else "_")[0]), read, path))
    groups = {"python": read_standard_library() if standard_library else []}
    limits = {"python": max_chars["wheel"]}
    barred = {_normal(package) for package in (*PACKAGES, *HELD_OUT_PACKAGES)}
    for package, read, source in tqdm(sources, desc="reading packages to train on"):
        if package not in barred and package not in groups:
            groups[package] = read(source)
            limits[package] = max_chars["deb" if read is read_deb else "wheel"]
    rng = random.Random(seed)
    seen: set[str] = set()
    kept: list[Text] = []
    for package, texts in tqdm(sorted(groups.items()), desc="dropping copies"):
        rng.shuffle(texts)
        size = 0
        for item in texts:
            if size < limits[package] and item.text not in seen and leaked.isdisjoint(word_ngrams(item.text)):
                seen.add(item.text)
                size += len(item.text)
                kept.append(item)
    rng.shuffle(kept)
    return kept


def held_out_english() -> str:
    """Plain English that is never trained on: novels and speeches of the public domain."""
    return HELD_OUT_ENGLISH.read_text(encoding="utf-8")


def held_out_texts(packages: Iterable[str] = HELD_OUT_PACKAGES, per_package: int = 40) -> list[Text]:
    """Docstrings of packages that are never trained on, the same number of each where it has them."""
    rng = random.Random(0)
    kept: list[Text] = []
    for package in packages:
        texts = sorted({t.text for t in read_installed(package) if t.origin != "description"})
        rng.shuffle(texts)
        kept += [Text(package, "docstring", text) for text in texts[:per_package]]
    return kept
