"""``pydocs``: retrieval collections made from the docstrings of installed packages.

A *passage* is the docstring of a public class, function, method or property without its name, signature, summary
line, See Also, Examples and References.  A *query* is the one-line description that another page's "See Also" entry
gives of an object; the object is relevant.  Queries are thus written by people, about the object, and on another page
than the one to be found.

Passages with the same words are merged.  Near-copies (:func:`near_copies`) stay apart in the corpus and are relevant
together.  Queries with the same words are merged, and their relevant passages united.  Left out are queries of fewer
than three words, queries that describe more than five different objects ("Equivalent function for arrays."), queries
that stand word for word in a relevant passage, and entries that mean no passage, several, or their own page.

pandas is split by passage into train, dev and test: groups of near-copies go whole to one split, each split's corpus
is its own passages only, and a query belongs to the split of its relevant passages (none when they fall into several).

The fingerprints of the pinned package versions are recorded in ``pydocs_fingerprints.json`` and checked on load;
``python -m diffret_lib.data.pydocs`` writes that file anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpydoc.docscrape import NumpyDocString
from sklearn.feature_extraction.text import CountVectorizer

from diffret_lib.addresses import address
from diffret_lib.cache import remember, write_text
from diffret_lib.config import PACKAGES, PYDOCS, SPLIT_PACKAGE, SPLITS
from diffret_lib.data.collection import Collection, contains_run, words
from diffret_lib.data.docstrings import documented_objects, passage_text, plain_text

#: Upper bounds of the splits' shares.
SPLIT_BOUNDS = dict(zip(SPLITS, (0.6, 0.8, 1.0), strict=True))
MIN_PASSAGE_WORDS, MIN_QUERY_WORDS, MAX_OBJECTS_PER_QUERY = 20, 3, 5
SHINGLE_WORDS, NEAR_COPY_JACCARD, NEAR_COPY_CONTAINMENT = 5, 0.8, 0.9
BOILERPLATE_TEXTS, MIN_OWN_SHINGLES = 20, 10
FINGERPRINTS = Path(__file__).with_name("pydocs_fingerprints.json")


def _shingles(text: str) -> set[str]:
    run = words(text)
    return {" ".join(run[i : i + SHINGLE_WORDS]) for i in range(max(len(run) - SHINGLE_WORDS + 1, bool(run)))}


def near_copies(texts: list[str]) -> sp.csr_matrix:
    """Find near-copies; a bool matrix of shape (n, n), symmetric, with its diagonal set.

    Two texts are near-copies when the sets of their runs of five words have a Jaccard similarity of at least 0.8, or
    when one holds at least 0.9 of the other's runs and is at most twice as large.  Runs that stand in more than
    :data:`BOILERPLATE_TEXTS` texts are boilerplate (the parameters that all of numpy's ufuncs share) and are not
    compared, unless fewer than :data:`MIN_OWN_SHINGLES` others are left in either text.
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
        contained = (both >= NEAR_COPY_CONTAINMENT * small) & (large <= 2 * small)
        found = contained | (both >= NEAR_COPY_JACCARD * (sizes[i] + sizes[j] - both))
        found &= (bare[i] | bare[j]) == either_bare
        near += sp.csr_matrix((found[found], (i[found], j[found])), shape=near.shape)
    return near


def resolve(passage_of: dict[str, str], pages: Iterable[str], name: str) -> set[str]:
    """Passages that a name in a See Also section may mean, found as Sphinx finds numpydoc's references.

    It is looked for from the page on which it stands, relative to the page's class, its module and each enclosing
    package, nearest first, then as an absolute name; a leading dot asks for the names that end so.  ``pages`` are the
    page's names, its canonical one first; ``passage_of`` maps every name of an object to its passage.
    """

    def seen_from(page: str) -> set[str]:
        while page:
            page = page.rpartition(".")[0]
            if found := passage_of.get(f"{page}.{name}" if page else name):
                return {found}
        return set()

    name = name.strip().strip("`").removesuffix("()").lstrip("~!")
    if "<" in name:
        name = name.rpartition("<")[2].rstrip("> ")
    fuzzy, name = name.startswith("."), name.lstrip("~.")
    for short, whole in (("np.", "numpy."), ("pd.", "pandas.")):
        name = whole + name.removeprefix(short) if name.startswith(short) else name
    first, *others = pages
    found = seen_from(first) or set().union(*map(seen_from, others))
    return found or {passage for other, passage in passage_of.items() if fuzzy and other.endswith(f".{name}")}


def build(package: str, root: str, version: str) -> dict[str, Any]:
    """Build the material of an installed package (distribution name, import name, version), in this interpreter.

    It has ``package`` and ``version``; ``passages`` and ``queries``: texts by id; ``qrels``: query id to the ids of
    the passages that See Also entries name, and of their near-copies; ``groups``: passage id to the first id of its
    group of (transitively) near copies.
    """
    pages = []
    passages: dict[str, str] = {}
    by_words: dict[str, str] = {}  # the words of a passage to its id
    passage_of: dict[str, str] = {}  # every name of an object to the id of its passage
    for names, doc in documented_objects(root):
        try:
            parsed = NumpyDocString(doc)
        except ValueError:  # its sections contradict each other
            continue
        pages.append((names, parsed))
        text = passage_text(parsed)
        run = words(text)
        if len(run) >= MIN_PASSAGE_WORDS:
            first = by_words.setdefault(" ".join(run), names[0])
            passages.setdefault(first, text)
            passage_of.update(dict.fromkeys(names, first))

    texts: dict[str, str] = {}
    meant: dict[str, set[str]] = defaultdict(set)
    for names, parsed in pages:
        for functions, description in parsed["See Also"]:
            text = plain_text(" ".join(description)).replace("\n", " ").strip()
            run = words(text)
            for name, _ in functions if len(run) >= MIN_QUERY_WORDS else ():
                found = resolve(passage_of, names, name)
                if len(found) == 1 and found != {passage_of.get(names[0])}:
                    texts.setdefault(" ".join(run), text)
                    meant[" ".join(run)] |= found

    ids = list(passages)
    near = near_copies(list(passages.values()))
    _, labels = sp.csgraph.connected_components(near, directed=False)
    groups = {p: ids[int(np.argmax(labels == label))] for p, label in zip(ids, labels, strict=True)}
    place = {p: i for i, p in enumerate(ids)}
    queries, qrels = {}, {}
    for key in sorted(texts):
        relevant = sorted({ids[j] for p in meant[key] for j in near[place[p]].indices})
        in_passage = any(contains_run(words(passages[p]), key.split()) for p in relevant)
        if len({groups[p] for p in meant[key]}) <= MAX_OBJECTS_PER_QUERY and not in_passage:
            query_id = f"q-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
            queries[query_id] = texts[key]
            qrels[query_id] = relevant
    texts_of = {"passages": passages, "queries": queries, "qrels": qrels, "groups": groups}
    return {"package": package, "version": version} | texts_of


def material(package: str) -> dict[str, Any]:
    """Material (:func:`build`) of a package, from the cache or built in a fresh interpreter."""

    def build_apart() -> dict[str, Any]:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        fixed = {"PYTHONHASHSEED": "0", "PYTHONOPTIMIZE": "", "PYTHONIOENCODING": "utf-8", "MPLBACKEND": "Agg"}
        environment = os.environ | fixed | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "diffret_lib.data.pydocs", package]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise RuntimeError(f"building pydocs/{package} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    return remember("docstrings", address([build], package, version_of(package)), build_apart)


def split_of(group: str) -> str:
    """Split of the passages of a group of near-copies, by its hash, so that no group is divided."""
    digest = hashlib.sha256(f"pydocs split 0\0{group}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, bound in SPLIT_BOUNDS.items() if share < bound)


def collection_of(found: dict[str, Any], split: str = "") -> Collection:
    """Collection of a material; a split has its own passages, and the queries whose passages are all among them."""
    package, passages, queries = found["package"], found["passages"], found["queries"]
    qrels = {q: dict.fromkeys(relevant, 1) for q, relevant in found["qrels"].items()}
    texts = list(passages), list(passages.values()), list(queries), list(queries.values())
    description = f"docstrings of {package} {found['version']}"
    about = {"description": description, "text_format": "docstring without name, signature and summary"}
    whole = Collection.from_texts(f"pydocs/{package}", *texts, qrels, **about)
    if not split:
        return whole
    own = {p for p, group in found["groups"].items() if split_of(group) == split}
    part = whole.restrict(own, [q for q, relevant in qrels.items() if own.issuperset(relevant)])
    return replace(part, name=f"{whole.name}-{split}", description=f"{description}, {split} split")


def load_pydocs(name: str, check: bool = True) -> Collection:
    """Load one of :data:`diffret_lib.config.PYDOCS`, built or from the cache, and check its fingerprint.

    A package of another version than the recorded one gives a warning.

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
    package, split = (SPLIT_PACKAGE, split) if split in SPLITS else (package, "")
    version = version_of(package)
    found = collection_of(material(package), split)
    if check:
        expected = json.loads(FINGERPRINTS.read_text(encoding="utf-8"))[name]
        if expected["version"] != version:
            versions = f"built from version {version}, but the recorded collection from {expected['version']}"
            warnings.warn(f"{name} is {versions}: results will differ from the recorded ones", stacklevel=2)
        elif expected["fingerprint"] != found.fingerprint:
            raise ValueError(
                f"{found!r} of version {version} has the fingerprint {found.fingerprint}, but recorded is {expected}: "
                "the package or numpydoc is not the pinned one, or the build has changed (then run "
                "python -m diffret_lib.data.pydocs)"
            )
    return found


def record() -> None:
    """Write the fingerprints anew."""
    recorded = {}
    for name in PYDOCS:
        found = load_pydocs(name, check=False)
        sizes = {"passages": len(found.passages), "queries": len(found.queries)}
        version = found.description.split(",")[0].split()[-1]
        recorded[name] = {"version": version, "fingerprint": found.fingerprint} | sizes
    write_text(FINGERPRINTS, json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        record()
    else:  # of material
        print("\n" + json.dumps(build(sys.argv[1], PACKAGES[sys.argv[1]], version_of(sys.argv[1]))))
