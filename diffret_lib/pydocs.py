"""``pydocs``: retrieval collections made from the docstrings of installed packages.

A *passage* is the docstring of a public class, function, method or property without its name, signature,
summary line, See Also, Examples and References.  A *query* is the one-line description that another page's
"See Also" entry gives of an object; the object is relevant.  Queries are thus written by people, about the
object, and on another page than the one to be found.

How objects are found.  All public modules of the package are imported (none with a private, test or vendored
part in its name, nor one whose members depend on optional packages; a module that cannot be imported is left
out) and the public members of each are read; members of classes are looked up along the bases that belong to
the package.  Module docstrings are left out:
they are tables of contents that repeat the summary lines.  An object may have several names; its passage
carries the one that stands closest to its definition.

How See Also entries are resolved.  As Sphinx resolves numpydoc's references: from the page the entry stands
on, relative to its class, its module, and each enclosing package, nearest first, then as an absolute name; a
leading dot asks for the one name that ends so.  An entry that resolves to nothing, to several passages, or to
the page's own passage is dropped.

Passages with the same words are merged.  Near-copies (:func:`near_copies`) stay apart in the corpus and are
relevant together.  Queries with the same words are merged, and their relevant passages united.  Queries of
fewer than three words, queries that describe more than five different objects ("Equivalent function for
arrays."), and queries that stand word for word in a relevant passage are dropped.

pandas is split by passage into train, dev and test: groups of near-copies go whole to one split, each split's
corpus is its own passages only, and a query belongs to the split of its relevant passages (none when they
fall into several).

The build runs in a fresh interpreter, so that it depends neither on what the caller imported nor on its hash
seed or optimisation level.  Built documents are kept in the cache folder.  The fingerprints of the pinned
package versions are recorded in ``pydocs_fingerprints.json`` and checked on load; ``python -m
diffret_lib.pydocs`` writes that file anew and prints statistics.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.sparse as sp

from diffret_lib.collection import Collection, bm25_ndcg, contains_run, lexical_overlap, words

#: Distribution name to import name.
PACKAGES = {
    "pandas": "pandas",
    "numpy": "numpy",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "statsmodels": "statsmodels",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
}
#: The package that is split, and its splits with the upper bounds of their shares.
SPLIT_PACKAGE = "pandas"
SPLITS = {"train": 0.6, "dev": 0.8, "test": 1.0}

MIN_PASSAGE_WORDS = 20
MIN_QUERY_WORDS = 3
SHINGLE_WORDS = 5
NEAR_COPY_JACCARD = 0.8
NEAR_COPY_CONTAINMENT = 0.9
BOILERPLATE_TEXTS = 20
MIN_OWN_SHINGLES = 10
MAX_OBJECTS_PER_QUERY = 5

#: Raised whenever the build changes, so that cached builds of older code are not used.
BUILD_VERSION = 3

FINGERPRINTS = Path(__file__).with_name("pydocs_fingerprints.json")

_SKIP_PARTS = re.compile(
    r"^(_.*|tests?|testing|conftest|setup|externals?|vendor(ed)?|sphinxext|sandbox|backends|f2py|distutils|compat|"
    r"arrow)$"
)
_LIST_SECTIONS = ("Parameters", "Other Parameters", "Returns", "Yields", "Receives", "Raises", "Warns", "Attributes",
                  "Methods")  # fmt: skip
_TEXT_SECTIONS = ("Warnings", "Notes")


# Docstrings to text ------------------------------------------------------------------------------------------

_DROPPED_BLOCK = re.compile(
    r"^\s*\.\. (plot|code|code-block|sourcecode|ipython|image|figure|index|only|doctest|testsetup|testcode|"
    r"toctree|autosummary|automodule|currentmodule|include|raw|minigallery|inheritance-diagram)::"
)
_VERSION_DIRECTIVE = re.compile(r"^(\s*)\.\. (versionadded|versionchanged|deprecated)::\s*\S*\s*")
_DIRECTIVE = re.compile(r"^(\s*)\.\. [\w:-]+::\s*")
_COMMENT = re.compile(r"^\s*\.\. ")
_OPTION = re.compile(r"^\s*:[\w-]+:(\s.*)?$")
_RULE = re.compile(r"^\s*([-=~^*+#])\1{2,}\s*$")
_TITLED_ROLE = re.compile(r":[\w:+-]+:`([^`<]+?)\s*<[^`>]*>`")
_ROLE = re.compile(r"(?::[\w:+-]+:|(?<!`)(?=`~))`(~?)([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?")
_CITATION = re.compile(r"\s*\[[\w.#*-]+\]_")
_GENERATED = re.compile(
    r"\*\*Array API Standard Support\*\*.*?for more information\.|:ref:`sphx_glr_[^`<]*`", re.DOTALL
)  # a support table that scipy appends to its docstrings; references to example galleries


_PRINTED_SET = re.compile(r"(Use of argument\(s\) `*)\{([^}]*)\}")  # scipy prints a set, in hash order


def _role_text(match: re.Match[str]) -> str:
    target = match[2].strip().lstrip("!.").lstrip("~").lstrip(".")
    shorten = match[1] or match[2].lstrip("!.").startswith("~")
    return target.rsplit(".", 1)[-1] if shorten and re.fullmatch(r"[\w.]+", target) else target


def plain_text(text: str) -> str:
    """Text without reStructuredText's markup: directives' and roles' marks go, their words stay.

    Doctests, code, plots and images are dropped, and so are citation marks and comments.
    """
    text = _GENERATED.sub("", text)
    text = _PRINTED_SET.sub(lambda m: m[1] + ", ".join(sorted(re.split(r",\s*", m[2]))), text)
    kept: list[str] = []
    block: int | None = None
    in_doctest = False
    for line in text.expandtabs().splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if block is not None:
            if not stripped or indent > block:
                continue
            block = None
        in_doctest = bool(stripped) and (in_doctest or stripped.startswith(">>>"))
        if in_doctest or _RULE.match(line) or _OPTION.match(line):
            continue
        if _DROPPED_BLOCK.match(line):
            block = indent
            continue
        line = _VERSION_DIRECTIVE.sub(r"\1", line)
        line = _DIRECTIVE.sub(r"\1", line)
        if not _COMMENT.match(line):
            kept.append(line.rstrip())
    text = "\n".join(kept)
    text = _CITATION.sub("", text)
    text = _TITLED_ROLE.sub(r"\1", text)
    text = _ROLE.sub(_role_text, text)
    text = _LINK.sub(r"\1", text)
    text = re.sub(r"`{1,2}([^`]+)`{1,2}", r"\1", text)
    text = re.sub(r"(?<![\w*])(\*{1,2})(?![\s*])([^*\n]*[^*\s])\1(?![\w*])", r"\2", text)
    text = re.sub(r"\\([ \n*_])", r"\1", text).replace("::\n", ":\n")
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    return re.sub(r"\n{2,}", "\n", text).strip()


def _parsed(doc: str) -> Any:
    from numpydoc.docscrape import NumpyDocString

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NumpyDocString(doc)


def passage_text(parsed: Any) -> str:
    """The passage of a parsed docstring: what is left without name, signature, summary and references."""
    parts = [plain_text("\n".join(parsed["Extended Summary"]))]
    for section in (*_LIST_SECTIONS, *_TEXT_SECTIONS):
        content = parsed[section]
        if not content:
            continue
        if section in _TEXT_SECTIONS:
            body = plain_text("\n".join(content))
        else:
            entries = []
            for name, kind, description in content:
                head = plain_text(" : ".join(p for p in (name, kind) if p))
                entries += [head, plain_text("\n".join(description))]
            body = "\n".join(e for e in entries if e)
        if body:
            parts.append(f"{section}\n{body}")
    return "\n\n".join(p for p in parts if p)


# Objects -----------------------------------------------------------------------------------------------------


@dataclass
class _Object:
    """A documented object: its docstring and every public name that leads to it."""

    doc: str
    names: dict[str, int] = field(default_factory=dict)  # name -> how near it stands to the definition

    @property
    def canonical(self) -> str:
        return min(self.names, key=lambda n: (-self.names[n], n.count("."), len(n), n))


def public_modules(root: str) -> list[ModuleType]:
    """The package and all its public modules that can be imported, sorted by name."""
    modules: dict[str, ModuleType] = {}

    def visit(name: str) -> None:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit):  # an optional dependency is missing, or the module is no library
            if name == root:
                raise
            return
        modules[name] = module
        for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
            if not _SKIP_PARTS.match(info.name):
                visit(f"{name}.{info.name}")

    visit(root)
    return [modules[name] for name in sorted(modules)]


def _own_doc(obj: Any) -> str | None:
    """The docstring of an object itself, not that of its type."""
    obj = getattr(obj, "orig_func", obj)  # networkx wraps functions to dispatch them
    try:
        doc = obj.__doc__
    except Exception:
        return None
    if not isinstance(doc, str) or not doc.strip():
        return None
    return doc


def _has_type_doc(obj: Any) -> bool:
    """Whether an instance has no docstring but its class's."""
    return not inspect.isclass(obj) and getattr(obj, "__doc__", None) == type(obj).__doc__


def _belongs(obj: Any, root: str) -> bool:
    module = getattr(obj, "__module__", None)
    if type(obj).__name__ == "ufunc" and root != "numpy":
        return getattr(np, getattr(obj, "__name__", ""), None) is not obj
    if not isinstance(module, str):
        module = getattr(type(obj), "__module__", None) or ""
    return module.split(".")[0] == root


class _Walk:
    """The documented public objects of a package."""

    def __init__(self, root: str):
        self.root = root
        self.objects: dict[int, _Object] = {}
        self._alive: list[Any] = []  # ids are only unique among living objects
        self._instances: list[tuple[Any, str]] = []
        for module in public_modules(root):
            self.module(module)
        public = set(self.objects)
        # An instance stands for its class where the class itself is not public (numpy.mgrid).
        for obj, path in self._instances:
            if id(type(obj)) not in public and _belongs(type(obj), root):
                self.add(type(obj), path, 0)

    def add(self, obj: Any, name: str, nearness: int) -> None:
        doc = _own_doc(obj)
        if doc is None:
            return
        if id(obj) not in self.objects:
            self.objects[id(obj)] = _Object(inspect.cleandoc(doc))
            self._alive.append(obj)
        names = self.objects[id(obj)].names
        names[name] = max(names.get(name, 0), nearness)

    def module(self, module: ModuleType) -> None:
        listed = getattr(module, "__all__", None)
        names = listed if listed is not None else dir(module)
        for name in sorted({n for n in names if isinstance(n, str) and not n.startswith("_")}):
            try:
                obj = getattr(module, name)
            except Exception:
                continue
            if isinstance(obj, ModuleType) or not _belongs(obj, self.root):
                continue
            path = f"{module.__name__}.{name}"
            if inspect.isclass(obj):
                self.cls(obj, path, ())
            elif _has_type_doc(obj):
                self._instances.append((obj, path))
            else:
                self.add(obj, path, int(getattr(obj, "__module__", None) == module.__name__))

    def cls(self, cls: type, path: str, outer: tuple[type, ...]) -> None:
        at_home = int(cls.__module__ == path.rpartition(".")[0])
        self.add(cls, path, at_home)
        bases = [b for b in inspect.getmro(cls) if str(b.__module__).split(".")[0] == self.root]
        for name in sorted({n for base in bases for n in vars(base) if not n.startswith("_")}):
            for base in bases:
                raw = vars(base).get(name)
                if raw is None:
                    continue
                member = f"{path}.{name}"
                nested = raw if inspect.isclass(raw) else getattr(raw, "_accessor", None)
                if inspect.isclass(nested):
                    if nested not in (cls, *outer) and _belongs(nested, self.root) and len(outer) < 2:
                        self.cls(nested, member, (*outer, cls))
                    break
                raw = getattr(raw, "__func__", raw)
                documented = _own_doc(raw) is not None and not _has_type_doc(raw)
                if documented and (inspect.isroutine(raw) or hasattr(type(raw), "__get__")):
                    self.add(raw, member, 1 + at_home if base is cls else 0)
                    break


def documented_objects(root: str) -> list[_Object]:
    """The documented public objects of an importable package, by canonical name."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        walk = _Walk(root)
    return sorted(walk.objects.values(), key=lambda o: o.canonical)


# Building ----------------------------------------------------------------------------------------------------


@dataclass
class Documents:
    """What a package's docstrings give: passages, queries, and which passages are near-copies.

    ``qrels`` maps query id to the passage ids that See Also entries name and their near-copies; ``groups`` maps
    a passage id to the first id of its group of (transitively) near copies; ``dropped`` counts what was left
    out, and why.
    """

    package: str
    version: str
    passages: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, list[str]]
    groups: dict[str, str]
    dropped: dict[str, int]


def _shingles(texts: list[str]) -> sp.csr_matrix:
    """Which runs of five words (columns) stand in which texts (rows): a matrix of 0 and 1."""
    vocabulary: dict[tuple[str, ...], int] = {}
    indices, indptr = [], [0]
    for text in texts:
        run = words(text)
        n = min(SHINGLE_WORDS, len(run))
        found = {tuple(run[i : i + n]) for i in range(len(run) - n + 1)} if run else set()
        indices += sorted(vocabulary.setdefault(s, len(vocabulary)) for s in found)
        indptr.append(len(indices))
    shape = (len(texts), max(len(vocabulary), 1))
    return sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=shape)


def near_copies(texts: list[str]) -> sp.csr_matrix:
    """Which texts are near-copies: most of their text is the same.

    Two texts are near-copies when the sets of their runs of five words have a Jaccard similarity of at least
    0.8, or when one holds at least 0.9 of the other's runs and is at most twice as large.  Runs that stand in
    more than :data:`BOILERPLATE_TEXTS` texts are boilerplate (the parameters that all of numpy's ufuncs share)
    and are not compared, unless fewer than :data:`MIN_OWN_SHINGLES` others are left in either text.

    Returns
    -------
    scipy.sparse.csr_matrix of bool, shape (n, n)
        Symmetric; the diagonal is set.
    """
    full = _shingles(texts)
    common = np.asarray(full.sum(axis=0)).ravel() > BOILERPLATE_TEXTS
    own = full[:, ~common]
    bare = np.asarray(own.sum(axis=1)).ravel() < MIN_OWN_SHINGLES
    n = len(texts)
    found_rows, found_columns = [np.arange(n)], [np.arange(n)]
    for matrix, either_bare in ((own, False), (full, True)):
        sizes = np.asarray(matrix.sum(axis=1)).ravel()
        for start in range(0, n, 512):
            shared = (matrix[start : start + 512] @ matrix.T).tocoo()
            i, j, both = shared.row + start, shared.col, shared.data
            small, large = np.minimum(sizes[i], sizes[j]), np.maximum(sizes[i], sizes[j])
            near = (both >= NEAR_COPY_JACCARD * (sizes[i] + sizes[j] - both)) | (
                (both >= NEAR_COPY_CONTAINMENT * small) & (large <= 2 * small)
            )
            near &= (bare[i] | bare[j]) == either_bare
            found_rows.append(i[near])
            found_columns.append(j[near])
    i, j = np.concatenate(found_rows), np.concatenate(found_columns)
    return sp.csr_matrix((np.ones(len(i), np.int32), (i, j)), shape=(n, n)).astype(bool)


class _Resolver:
    """Finds the passages that a name in a See Also section may mean."""

    def __init__(self, passage_of: dict[str, str]):
        self.passage_of = passage_of
        self.by_last: dict[str, list[str]] = defaultdict(list)
        for name in passage_of:
            self.by_last[name.rpartition(".")[2]].append(name)

    def _from(self, page: str, name: str) -> str | None:
        parent = page
        while parent:
            parent = parent.rpartition(".")[0]
            found = self.passage_of.get(f"{parent}.{name}" if parent else name)
            if found is not None:
                return found
        return None

    def resolve(self, pages: Iterable[str], name: str) -> set[str]:
        """Passages meant by ``name`` on a page; ``pages`` are the page's names, its canonical one first."""
        name = name.strip().strip("`").removesuffix("()").lstrip("~!")
        if "<" in name:
            name = name.rpartition("<")[2].rstrip("> ")
        fuzzy, name = name.startswith("."), name.lstrip("~.")
        if name.startswith("np."):
            name = f"numpy.{name[3:]}"
        if name.startswith("pd."):
            name = f"pandas.{name[3:]}"
        pages = list(pages)
        if found := self._from(pages[0], name):
            return {found}
        others = {found for page in pages[1:] if (found := self._from(page, name))}
        if others or not fuzzy:
            return others
        return {self.passage_of[n] for n in self.by_last[name.rpartition(".")[2]] if n.endswith(f".{name}")}


def _see_also(parsed: Any) -> Iterator[tuple[str, str]]:
    for functions, description in parsed["See Also"]:
        text = plain_text(" ".join(description)).replace("\n", " ").strip()
        for name, _ in functions:
            yield name, text


def build_documents(package: str, root: str, version: str) -> Documents:
    """Build the passages, queries and judgements of an importable package, in this interpreter.

    Parameters
    ----------
    package, root, version : str
        Distribution name, import name, and version (recorded only).

    Raises
    ------
    ImportError
        When the package is not installed.
    ValueError
        When it has no docstrings to build from.
    """
    dropped = dict.fromkeys(
        ("unparsed_docstrings", "short_passages", "merged_passages", "short_entries", "unresolved_entries",
         "ambiguous_entries", "own_page_entries", "merged_queries", "generic_queries", "queries_in_passage"), 0
    )  # fmt: skip
    pages: list[tuple[_Object, Any]] = []
    by_words: dict[str, str] = {}
    passages: dict[str, str] = {}
    passage_of: dict[str, str] = {}
    documented: set[str] = set()
    for obj in documented_objects(root):
        try:
            parsed = _parsed(obj.doc)
        except ValueError:
            dropped["unparsed_docstrings"] += 1
            continue
        pages.append((obj, parsed))
        documented.update(obj.names)
        text = passage_text(parsed)
        run = words(text)
        if len(run) < MIN_PASSAGE_WORDS:
            dropped["short_passages"] += 1
            continue
        first = by_words.setdefault(" ".join(run), obj.canonical)
        if first == obj.canonical:
            passages[first] = text
        else:
            dropped["merged_passages"] += 1
        passage_of.update(dict.fromkeys(obj.names, first))
    if not passages:
        raise ValueError(f"{package}: no docstring of {root!r} gives a passage")

    resolver = _Resolver(passage_of)
    texts: dict[str, str] = {}
    meant: dict[str, set[str]] = defaultdict(set)
    for obj, parsed in pages:
        names = [obj.canonical, *sorted(obj.names.keys() - {obj.canonical})]
        for name, text in _see_also(parsed):
            run = words(text)
            if len(run) < MIN_QUERY_WORDS:
                dropped["short_entries"] += 1
                continue
            found = resolver.resolve(names, name)
            if len(found) != 1:
                dropped["ambiguous_entries" if found else "unresolved_entries"] += 1
            elif found == {passage_of.get(obj.canonical)}:
                dropped["own_page_entries"] += 1
            else:
                key = " ".join(run)
                dropped["merged_queries"] += key in texts
                texts.setdefault(key, text)
                meant[key] |= found

    ids = list(passages)
    near = near_copies(list(passages.values()))
    neighbours = {p: [ids[j] for j in near.indices[near.indptr[i] : near.indptr[i + 1]]] for i, p in enumerate(ids)}
    _, labels = sp.csgraph.connected_components(near, directed=False)
    first_of: dict[int, str] = {}
    groups = {p: first_of.setdefault(int(label), p) for p, label in zip(ids, labels, strict=True)}

    runs = {p: words(t) for p, t in passages.items()}
    queries, qrels = {}, {}
    for key in sorted(texts):
        if len({groups[p] for p in meant[key]}) > MAX_OBJECTS_PER_QUERY:
            dropped["generic_queries"] += 1
            continue
        relevant = sorted({n for p in meant[key] for n in neighbours[p]})
        if any(contains_run(runs[p], key.split()) for p in relevant):
            dropped["queries_in_passage"] += 1
            continue
        query_id = f"q-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        queries[query_id] = texts[key]
        qrels[query_id] = relevant
    return Documents(package, version, passages, queries, qrels, groups, dropped)


# Cache -------------------------------------------------------------------------------------------------------


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_cached(path: Path) -> Documents | None:
    """A cached build; None when there is none or it is damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        content = stored["documents"]
        if stored["checksum"] != _checksum(content):
            return None
        return Documents(**content)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    from diffret_lib.cache import atomic_path

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def _build_apart(package: str) -> Documents:
    """Build in a fresh interpreter that has this one's import path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONOPTIMIZE", "PYTHONSTARTUP")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "PYTHONHASHSEED": "0",
        "PYTHONIOENCODING": "utf-8",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "diffret_lib.pydocs", "--documents", package],
        env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"building pydocs/{package} failed:\n{done.stderr[-2000:]}")
    return Documents(**json.loads(done.stdout.splitlines()[-1]))


def installed_version(package: str) -> str:
    """The installed version of a package.

    Raises
    ------
    ModuleNotFoundError
        When it is not installed.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"pydocs/{package} is made from the docstrings of {package}, which is not installed: pip install {package}"
        ) from None


@functools.lru_cache(maxsize=len(PACKAGES))
def documents(package: str) -> Documents:
    """The documents of one of :data:`PACKAGES`, from the cache where it has them, else built."""
    from diffret_lib.cache import cache_dir

    version = installed_version(package)
    numpydoc = metadata.version("numpydoc")
    path = Path(cache_dir()) / "pydocs" / f"{package}-{version}-numpydoc-{numpydoc}-build-{BUILD_VERSION}.json"
    stored = _read_cached(path)
    if stored is None or (stored.package, stored.version) != (package, version):
        stored = _build_apart(package)
        content = asdict(stored)
        _write_json(path, {"checksum": _checksum(content), "documents": content})
    return stored


# Collections -------------------------------------------------------------------------------------------------


def collection_names() -> list[str]:
    """The names that :func:`diffret_lib.collection.load_collection` knows."""
    names = [f"pydocs/{SPLIT_PACKAGE}", *(f"pydocs/{SPLIT_PACKAGE}-{split}" for split in SPLITS)]
    return names + [f"pydocs/{package}" for package in PACKAGES if package != SPLIT_PACKAGE]


def whole_collection(docs: Documents) -> Collection:
    """All of a package's passages and queries."""
    return Collection(
        name=f"pydocs/{docs.package}",
        passage_ids=list(docs.passages),
        passages=list(docs.passages.values()),
        query_ids=list(docs.queries),
        queries=list(docs.queries.values()),
        qrels={q: dict.fromkeys(relevant, 1) for q, relevant in docs.qrels.items()},
        description=f"docstrings of {docs.package} {docs.version}",
    )


def split_of(docs: Documents, seed: int = 0) -> dict[str, str]:
    """The split of each passage: by the hash of its group of near-copies, so that no group is divided."""
    splits = {}
    for passage_id, group in docs.groups.items():
        digest = hashlib.sha256(f"pydocs split {seed}\0{group}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        splits[passage_id] = next(name for name, bound in SPLITS.items() if share < bound)
    return splits


def split_collection(docs: Documents, split: str, seed: int = 0) -> Collection:
    """A split: its own passages only, and the queries all of whose relevant passages are among them."""
    splits = split_of(docs, seed)
    passages = [p for p in docs.passages if splits[p] == split]
    queries = [q for q, relevant in docs.qrels.items() if all(splits[p] == split for p in relevant)]
    part = whole_collection(docs).restrict(passages, queries)
    return Collection(
        name=f"pydocs/{docs.package}-{split}",
        passage_ids=part.passage_ids,
        passages=part.passages,
        query_ids=part.query_ids,
        queries=part.queries,
        qrels=part.qrels,
        description=f"{part.description}, {split} split" + (f" of seed {seed}" if seed else ""),
    )


def recorded_fingerprints() -> dict[str, dict[str, Any]]:
    """The committed table: collection name to version, fingerprint, passages and queries."""
    try:
        return json.loads(FINGERPRINTS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def check_fingerprint(collection: Collection, version: str, recorded: dict[str, dict[str, Any]]) -> None:
    """Compare a built collection with the recorded one.

    Raises
    ------
    ValueError
        When the package has the recorded version, but the collection differs.

    Warns
    -----
    UserWarning
        When the package has another version than the recorded one, or nothing is recorded.
    """
    expected = recorded.get(collection.name)
    if expected is None:
        warnings.warn(f"{collection.name}: no fingerprint is recorded in {FINGERPRINTS.name}", stacklevel=3)
    elif expected["version"] != version:
        warnings.warn(
            f"{collection.name} is built from version {version}, but the recorded collection from "
            f"{expected['version']}: results will differ from the recorded ones",
            stacklevel=3,
        )
    elif expected["fingerprint"] != collection.fingerprint:
        raise ValueError(
            f"{collection.name} (version {version}) has the fingerprint {collection.fingerprint} with "
            f"{len(collection.passages):,} passages and {len(collection.queries):,} queries, but recorded is "
            f"{expected['fingerprint']} with {expected['passages']:,} and {expected['queries']:,}: the package or "
            "numpydoc is not the pinned one, or the build has changed (then run python -m diffret_lib.pydocs)"
        )


def _collection(name: str, seed: int = 0) -> tuple[Collection, Documents]:
    package, split = name, None
    if name.rpartition("-")[0] == SPLIT_PACKAGE and name.rpartition("-")[2] in SPLITS:
        package, _, split = name.rpartition("-")
    if package not in PACKAGES:
        raise ValueError(f"unknown collection 'pydocs/{name}'; there are {', '.join(collection_names())}")
    docs = documents(package)
    return (split_collection(docs, split, seed) if split else whole_collection(docs)), docs


def load_pydocs(name: str, seed: int = 0) -> Collection:
    """A ``pydocs`` collection, built or from the cache, and checked against its recorded fingerprint.

    Parameters
    ----------
    name : str
        A package of :data:`PACKAGES`, or ``"pandas-train"``, ``"pandas-dev"``, ``"pandas-test"``.
    seed : int
        Salts the split of pandas; splits of a seed other than 0 have no recorded fingerprint.

    Raises
    ------
    ValueError
        For an unknown name, and when the fingerprint is not the recorded one for the same version.
    ModuleNotFoundError
        When the package is not installed.
    """
    collection, docs = _collection(name, seed)
    if not (seed and collection.name != f"pydocs/{docs.package}"):
        check_fingerprint(collection, docs.version, recorded_fingerprints())
    return collection


# Command -----------------------------------------------------------------------------------------------------


def _record_all() -> None:
    """Write the fingerprints anew and print a table of statistics."""
    import pandas as pd

    recorded: dict[str, dict[str, Any]] = {}
    rows, drops = [], {}
    for full_name in collection_names():
        collection, docs = _collection(full_name.removeprefix("pydocs/"))
        statistics = collection.statistics()
        recorded[full_name] = {
            "version": docs.version,
            "fingerprint": collection.fingerprint,
            "passages": len(collection.passages),
            "queries": len(collection.queries),
        }
        overlap = lexical_overlap(collection)
        rows.append(
            {k: statistics[k] for k in ("collection", "passages", "queries", "relevant_per_query", "passage_words",
                                        "query_words")}
            | {"overlap": overlap["content_words"], "whole_query": overlap["whole_query"],
               "bm25_sample": bm25_ndcg(collection.sample(150, 400, seed=0)), "bm25_whole": bm25_ndcg(collection)}
        )  # fmt: skip
        drops[docs.package] = docs.dropped
    _write_json(FINGERPRINTS, recorded, indent=2)
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(pd.DataFrame(rows).set_index("collection").round(3).to_string())
        print("\nLeft out:")
        print(pd.DataFrame(drops).to_string())


def main(arguments: list[str] | None = None) -> None:
    """Command line: record all fingerprints, or print one package's documents as JSON."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m diffret_lib.pydocs", description=_record_all.__doc__)
    parser.add_argument("--documents", metavar="PACKAGE", choices=PACKAGES, help="print one package's build as JSON")
    options = parser.parse_args(arguments)
    if options.documents:
        package = options.documents
        built = build_documents(package, PACKAGES[package], installed_version(package))
        print("\n" + json.dumps(asdict(built)))
    else:
        _record_all()


if __name__ == "__main__":
    main()
