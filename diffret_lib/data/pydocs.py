"""``pydocs``: retrieval collections made from the docstrings of installed packages.

A *passage* is the docstring of a public class, function, method or property without its name, signature,
summary line, See Also, Examples and References.  A *query* is the one-line description that another page's
"See Also" entry gives of an object; the object is relevant.  Queries are thus written by people, about the
object, and on another page than the one to be found.

See Also entries are resolved as Sphinx resolves numpydoc's references: from the page the entry stands on, relative
to its class, its module, and each enclosing package, nearest first, then as an absolute name; a leading dot asks for
the one name that ends so.  An entry that resolves to nothing, to several passages, or to its own page is dropped.

Passages with the same words are merged.  Near-copies (:func:`near_copies`) stay apart in the corpus and are
relevant together.  Queries with the same words are merged, and their relevant passages united.  Queries of
fewer than three words, queries that describe more than five different objects ("Equivalent function for
arrays."), and queries that stand word for word in a relevant passage are dropped.

pandas is split by passage into train, dev and test: groups of near-copies go whole to one split, each split's
corpus is its own passages only, and a query belongs to the split of its relevant passages (none when they
fall into several).

The fingerprints of the pinned package versions are recorded in ``pydocs_fingerprints.json`` and checked on load;
``python -m diffret_lib.data.pydocs`` writes that file anew and prints statistics.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.feature_extraction.text import CountVectorizer

from diffret_lib.addresses import address
from diffret_lib.cache import fetch, remember, write_text
from diffret_lib.config import PACKAGES, PYDOCS, SPLIT_PACKAGE, SPLITS
from diffret_lib.data.collection import Collection, contains_run, lexical_overlap, words
from diffret_lib.data.docstrings import documented_objects, parse, passage_text, plain_text

#: Upper bounds of the splits' shares.
SPLIT_BOUNDS = dict(zip(SPLITS, (0.6, 0.8, 1.0), strict=True))
MIN_PASSAGE_WORDS, MIN_QUERY_WORDS = 20, 3
SHINGLE_WORDS = 5
NEAR_COPY_JACCARD, NEAR_COPY_CONTAINMENT = 0.8, 0.9
BOILERPLATE_TEXTS, MIN_OWN_SHINGLES = 20, 10
MAX_OBJECTS_PER_QUERY = 5
FINGERPRINTS = Path(__file__).with_name("pydocs_fingerprints.json")


@dataclass
class Material:
    """Passages and queries (texts by id) that a package's docstrings give.

    ``qrels`` maps query id to the passage ids that See Also entries name and their near-copies; ``groups`` maps a
    passage id to the first id of its group of (transitively) near copies; ``dropped`` counts what was left out.
    """

    package: str
    version: str
    passages: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, list[str]]
    groups: dict[str, str]
    dropped: dict[str, int]


# -- building ------------------------------------------------------------------------------------------------


def _shingles(text: str) -> set[str]:
    run = words(text)
    return {" ".join(run[i : i + SHINGLE_WORDS]) for i in range(max(len(run) - SHINGLE_WORDS + 1, bool(run)))}


def near_copies(texts: list[str]) -> sp.csr_matrix:
    """Find the texts that are near-copies: most of their text is the same.

    Two texts are near-copies when the sets of their runs of five words have a Jaccard similarity of at least
    0.8, or when one holds at least 0.9 of the other's runs and is at most twice as large.  Runs that stand in
    more than :data:`BOILERPLATE_TEXTS` texts are boilerplate (the parameters that all of numpy's ufuncs share)
    and are not compared, unless fewer than :data:`MIN_OWN_SHINGLES` others are left in either text.

    Returns
    -------
    scipy.sparse.csr_matrix of bool, shape (n, n)
        Symmetric; the diagonal is set.
    """
    full = CountVectorizer(analyzer=_shingles, dtype=np.float32).fit_transform(texts)
    own = full[:, np.asarray(full.sum(axis=0)).ravel() <= BOILERPLATE_TEXTS]
    bare = np.asarray(own.sum(axis=1)).ravel() < MIN_OWN_SHINGLES
    near = sp.identity(len(texts), bool, "csr")
    for matrix, either_bare in ((own, False), (full, True)):
        sizes = np.asarray(matrix.sum(axis=1)).ravel()
        shared = (matrix @ matrix.T).tocoo()
        i, j, both = shared.row, shared.col, shared.data
        small, large = np.minimum(sizes[i], sizes[j]), np.maximum(sizes[i], sizes[j])
        found = (both >= NEAR_COPY_JACCARD * (sizes[i] + sizes[j] - both)) | (
            (both >= NEAR_COPY_CONTAINMENT * small) & (large <= 2 * small)
        )
        found &= (bare[i] | bare[j]) == either_bare
        near += sp.csr_matrix((found[found], (i[found], j[found])), shape=near.shape)
    return near


class _Resolver:
    """Finds the passages that a name in a See Also section may mean."""

    def __init__(self, passage_of: dict[str, str]):
        self.passage_of = passage_of
        self.by_last: dict[str, list[str]] = defaultdict(list)
        for name in passage_of:
            self.by_last[name.rpartition(".")[2]].append(name)

    def _from(self, page: str, name: str) -> str | None:
        while page:
            page = page.rpartition(".")[0]
            if found := self.passage_of.get(f"{page}.{name}" if page else name):
                return found
        return None

    def resolve(self, pages: Iterable[str], name: str) -> set[str]:
        """Passages meant by ``name`` on a page; ``pages`` are the page's names, its canonical one first."""
        name = name.strip().strip("`").removesuffix("()").lstrip("~!")
        if "<" in name:
            name = name.rpartition("<")[2].rstrip("> ")
        fuzzy, name = name.startswith("."), name.lstrip("~.")
        for short, whole in (("np.", "numpy."), ("pd.", "pandas.")):
            name = whole + name.removeprefix(short) if name.startswith(short) else name
        first, *others = pages
        if found := self._from(first, name):
            return {found}
        several = {found for page in others if (found := self._from(page, name))}
        if several or not fuzzy:
            return several
        return {self.passage_of[n] for n in self.by_last[name.rpartition(".")[2]] if n.endswith(f".{name}")}


def build(package: str, root: str, version: str) -> Material:
    """Build the material of an installed package (distribution name, import name, version), in this interpreter.

    Raises
    ------
    ImportError
        When the package cannot be imported.
    ValueError
        When it has no docstrings to build from.
    """
    dropped: Counter[str] = Counter()
    pages = []
    passages: dict[str, str] = {}
    by_words: dict[str, str] = {}  # the words of a passage to its id
    passage_of: dict[str, str] = {}  # every name of an object to the id of its passage
    for obj in documented_objects(root):
        try:
            parsed = parse(obj.doc)
        except ValueError:
            dropped["unparsed_docstrings"] += 1
            continue
        pages.append((obj, parsed))
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
        for functions, description in parsed["See Also"]:
            text = plain_text(" ".join(description)).replace("\n", " ").strip()
            key = " ".join(words(text))
            for name, _ in functions:
                if len(key.split()) < MIN_QUERY_WORDS:
                    dropped["short_entries"] += 1
                    continue
                found = resolver.resolve(names, name)
                if len(found) != 1:
                    dropped["ambiguous_entries" if found else "unresolved_entries"] += 1
                elif found == {passage_of.get(obj.canonical)}:
                    dropped["own_page_entries"] += 1
                else:
                    dropped["merged_queries"] += key in texts
                    texts.setdefault(key, text)
                    meant[key] |= found

    ids = list(passages)
    near = near_copies(list(passages.values()))
    _, labels = sp.csgraph.connected_components(near, directed=False)
    first_of: dict[int, str] = {}
    groups = {p: first_of.setdefault(int(label), p) for p, label in zip(ids, labels, strict=True)}
    place = {p: i for i, p in enumerate(ids)}
    queries, qrels = {}, {}
    for key in sorted(texts):
        if len({groups[p] for p in meant[key]}) > MAX_OBJECTS_PER_QUERY:
            dropped["generic_queries"] += 1
            continue
        relevant = sorted({ids[j] for p in meant[key] for j in near[place[p]].indices})
        if any(contains_run(words(passages[p]), key.split()) for p in relevant):
            dropped["queries_in_passage"] += 1
            continue
        query_id = f"q-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        queries[query_id] = texts[key]
        qrels[query_id] = relevant
    return Material(package, version, passages, queries, qrels, groups, dict(dropped))


def _build_apart(package: str) -> dict[str, Any]:
    """Build in a fresh interpreter: what this one imported, its hash seed and optimisation level change nothing."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONOPTIMIZE", "PYTHONSTARTUP")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "diffret_lib.data.pydocs", package],
        env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"building pydocs/{package} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def material(package: str) -> Material:
    """Material of one of :data:`diffret_lib.config.PACKAGES`, from the cache where it is there, else built.

    Raises
    ------
    ModuleNotFoundError
        When the package is not installed.
    """
    key = address([build], package, _version(package))
    return Material(**remember("docstrings", key, lambda: _build_apart(package)))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"pydocs/{package} is made from the docstrings of {package}, which is not installed: pip install {package}"
        ) from None


# -- collections ---------------------------------------------------------------------------------------------


def whole_collection(found: Material) -> Collection:
    """All of a package's passages and queries."""
    texts = [part for texts in (found.passages, found.queries) for part in (list(texts), list(texts.values()))]
    qrels = {q: dict.fromkeys(relevant, 1) for q, relevant in found.qrels.items()}
    description = f"docstrings of {found.package} {found.version}"
    return Collection.from_texts(f"pydocs/{found.package}", *texts, qrels, description=description)


def split_of(found: Material, seed: int = 0) -> dict[str, str]:
    """Split of each passage, by the hash of its group of near-copies, so that no group is divided."""
    splits = {}
    for passage_id, group in found.groups.items():
        digest = hashlib.sha256(f"pydocs split {seed}\0{group}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        splits[passage_id] = next(name for name, bound in SPLIT_BOUNDS.items() if share < bound)
    return splits


def split_collection(found: Material, split: str, seed: int = 0) -> Collection:
    """A split: its own passages only, and the queries all of whose relevant passages are among them."""
    splits = split_of(found, seed)
    passages = [p for p in found.passages if splits[p] == split]
    queries = [q for q, relevant in found.qrels.items() if all(splits[p] == split for p in relevant)]
    whole = whole_collection(found)
    description = f"{whole.description}, {split} split" + (f" of seed {seed}" if seed else "")
    return replace(whole.restrict(passages, queries), name=f"{whole.name}-{split}", description=description)


def recorded_fingerprints() -> dict[str, dict[str, Any]]:
    """The committed table: collection name to version, fingerprint, passages and queries."""
    return json.loads(FINGERPRINTS.read_text(encoding="utf-8"))


def check_fingerprint(collection: Collection, version: str, recorded: dict[str, dict[str, Any]]) -> None:
    """Compare a built collection with the recorded one of that name, and warn when it is of another version, or none.

    Raises
    ------
    ValueError
        When the package has the recorded version, but the collection differs.
    """
    expected = recorded.get(collection.name)
    if expected is None:
        warnings.warn(f"{collection.name}: no fingerprint is recorded in {FINGERPRINTS.name}", stacklevel=3)
    elif expected["version"] != version:
        versions = f"built from version {version}, but the recorded collection from {expected['version']}"
        warnings.warn(f"{collection.name} is {versions}: results will differ from the recorded ones", stacklevel=3)
    elif expected["fingerprint"] != collection.fingerprint:
        raise ValueError(
            f"{collection!r} of version {version} has the fingerprint {collection.fingerprint}, but recorded is "
            f"{expected}: the package or numpydoc is not the pinned one, or the build has changed (then run "
            "python -m diffret_lib.data.pydocs)"
        )


def load_pydocs(name: str, seed: int = 0, check: bool = True) -> Collection:
    """Load a ``pydocs`` collection, built or from the cache, and check it against its recorded fingerprint.

    Parameters
    ----------
    name : str
        One of :data:`diffret_lib.config.PYDOCS`.
    seed : int
        Salts the splits of pandas; those of a seed other than 0 have no recorded fingerprint.
    check : bool

    Raises
    ------
    ValueError
        For an unknown name, and when the fingerprint is not the recorded one for the same version.
    ModuleNotFoundError
        When the package is not installed.
    """
    if name not in PYDOCS:
        raise ValueError(f"unknown collection {name!r}; there are {', '.join(PYDOCS)}")
    package = name.removeprefix("pydocs/")
    split = package.removeprefix(f"{SPLIT_PACKAGE}-")
    parts = (split, seed) if split in SPLITS else ()
    package = SPLIT_PACKAGE if parts else package

    def make(folder: Path) -> None:
        found = material(package)
        (split_collection(found, *parts) if parts else whole_collection(found)).save(folder)

    version = _version(package)
    key = address([build, split_collection], package, version, *parts)
    collection = Collection.load(fetch("collections", key, make))
    if check and not (parts and seed):
        check_fingerprint(collection, version, recorded_fingerprints())
    return collection


def record() -> None:
    """Write the fingerprints anew and print a table of statistics."""
    recorded, rows = {}, []
    for name in PYDOCS:
        collection = load_pydocs(name, check=False)
        row = collection.statistics()
        version = _version(collection.description.split()[2])
        recorded[name] = {"version": version} | {key: row[key] for key in ("fingerprint", "passages", "queries")}
        rows.append(row | lexical_overlap(collection))
    write_text(FINGERPRINTS, json.dumps(recorded, indent=2) + "\n")
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(pd.DataFrame(rows).set_index("collection").drop(columns=["coverage", "fingerprint"]).round(3).to_string())
        dropped = pd.DataFrame({package: material(package).dropped for package in PACKAGES})
        print("\nLeft out:\n" + dropped.fillna(0).astype(int).to_string())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        record()
    else:  # of _build_apart
        print("\n" + json.dumps(asdict(build(sys.argv[1], PACKAGES[sys.argv[1]], _version(sys.argv[1])))))
