from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from diffret_lib.config import PYDOCS, SPLITS
from diffret_lib.data import load_collection, pydocs
from diffret_lib.data.collection import words
from diffret_lib.data.docstrings import plain_text
from diffret_lib.data.pydocs import build, near_copies, resolve

FILLER = "Here stands a long account of what it does with each of its many values, in twenty words and {} more."

# A small package whose See Also entries cover the rules of resolution.
FILES = {
    "__init__.py": '''
"""The module docstring is no passage although it is long enough by far to be one, with its many many words."""
from toypkg._hidden import melt as melt
from toypkg.shapes import Circle
import os

__all__ = ["melt", "Circle", "_private", "freeze"]

def _private():
    """Private.

    {filler}
    """

def freeze(x):
    """Turn water into ice.

    {filler_freeze}

    Parameters
    ----------
    x : int
        Degrees, see `melt` [1]_.

    See Also
    --------
    melt : Turns ice into water.
    melt : What it does, WITH each.
    Circle.area, shapes.Circle.edge : Measures of a round thing.
    missing : A function that is nowhere.
    freeze : Its own page does not count.
    shapes.Circle : Too short.
    ice : Account of what it does with

    Examples
    --------
    >>> freeze(1)
    EXAMPLEOUTPUT

    References
    ----------
    .. [1] REFERENCETEXT
    """
''',
    "_hidden.py": '''
def melt(x):
    """Turn ice into water.

    {filler_melt}

    .. versionadded:: 1.2
       Words of the note.

    .. plot::

        PLOTCODE
    """
''',
    "shapes.py": '''
class Base:
    def area(self):
        """The area.

        {filler_area}

        See Also
        --------
        edge : The length of the way round it.
        toypkg.melt : turns ICE into water
        """

class Circle(Base):
    """Round thing.

    {filler_circle}

    Attributes
    ----------
    radius : float
        Half of the width.
    """
    def edge(self):
        """The edge.

        {filler_edge}
        """

    def short(self):
        """Too short to be a passage."""

class Square(Base):
    """Thing with corners.

    {filler_circle}

    Attributes
    ----------
    radius : float
        Half of the width.
    """
''',
    "ice/__init__.py": "",
    "tests/__init__.py": "raise RuntimeError('tests must not be imported')",
    "broken.py": "import a_module_that_does_not_exist",
    "noisy.py": "print('NOISE')",
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch) -> str:
    root = tmp_path / "site" / "toypkg"
    for name, source in FILES.items():
        for key in ("_freeze", "_melt", "_area", "_circle", "_edge", ""):
            source = source.replace(f"{{filler{key}}}", FILLER.format(key.strip("_") + " words about it"))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    monkeypatch.syspath_prepend(str(root.parent))
    for name in [n for n in sys.modules if n.split(".")[0] == "toypkg"]:
        monkeypatch.delitem(sys.modules, name)
    yield "toypkg"
    for name in [n for n in sys.modules if n.split(".")[0] == "toypkg"]:
        del sys.modules[name]


def by_text(docs: dict) -> dict[str, list[str]]:
    return {text: docs["qrels"][query_id] for query_id, text in docs["queries"].items()}


def test_passages_of_a_package(toy: str) -> None:
    docs = build("toy", toy, "1.0")
    assert set(docs["passages"]) == {
        "toypkg.freeze", "toypkg.melt", "toypkg.shapes.Base.area", "toypkg.shapes.Circle",
        "toypkg.shapes.Circle.edge",
    }  # fmt: skip
    freeze = FILLER.format("freeze words about it") + "\n\nParameters\nx : int\nDegrees, see melt."
    assert docs["passages"]["toypkg.freeze"] == freeze
    assert "Words of the note." in docs["passages"]["toypkg.melt"]
    everything = " ".join(docs["passages"].values())
    for left_out in ("EXAMPLEOUTPUT", "REFERENCETEXT", "PLOTCODE", "1.2", "Turn ice", "Turns ice", "versionadded"):
        assert left_out not in everything


def test_queries_resolve_from_their_page(toy: str) -> None:
    docs = build("toy", toy, "1.0")
    assert by_text(docs) == {  # without "What it does, WITH each.", which stands in the passage of melt
        # the same words on two pages, by a relative and an absolute name
        "Turns ice into water.": ["toypkg.melt"],
        # one text for two names: one inherited, one relative to the package
        "Measures of a round thing.": ["toypkg.shapes.Base.area", "toypkg.shapes.Circle.edge"],
        # Base has no edge, but the inherited page Circle.area does
        "The length of the way round it.": ["toypkg.shapes.Circle.edge"],
    }
    assert docs["version"] == "1.0" and all(q.startswith("q-") for q in docs["queries"])


def test_build_is_the_same_for_every_hash_seed(toy: str, tmp_path: Path) -> None:
    code = (
        f"import sys, json; sys.path[:0] = [{str(tmp_path / 'site')!r}, {str(Path(pydocs.__file__).parents[2])!r}];"
        "from diffret_lib.data.pydocs import build; print(json.dumps(build('toy', 'toypkg', '1')))"
    )
    outputs = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        outputs.add(done.stdout.splitlines()[-1])
    assert len(outputs) == 1 and json.loads(outputs.pop())["queries"]


def test_ambiguous_and_fuzzy_names() -> None:
    passage_of = {"p.A.f": "one", "p.B.f": "two", "p.A.g": "three", "p.q.B.g": "three", "p.f": "four"}
    assert resolve(passage_of, ["p.A.g"], "f") == {"one"}  # nearest first
    assert resolve(passage_of, ["p.q.h"], "f") == {"four"}
    assert resolve(passage_of, ["x.h", "p.A.h", "p.B.h"], "f") == {"one", "two"}  # other names of the page disagree
    assert resolve(passage_of, ["p.h"], "g") == set()
    assert resolve(passage_of, ["p.h"], "~.g") == {"three"}
    assert resolve(passage_of, ["z.h"], ".f") == {"one", "two", "four"}
    assert resolve(passage_of, ["p.h"], "`p.A.f()`") == {"one"}


def test_near_copies_against_plain_sets() -> None:
    base = [f"w{i}" for i in range(60)]
    texts = [
        base,
        base[:55],  # contained, most of it
        base[:25],  # contained, but less than half
        [*base[:58], "x", "y"],
        [w if i % 6 else f"x{i}" for i, w in enumerate(base)],  # same words mostly, other runs
        [f"z{i}" for i in range(60)],
    ]

    def shingles(run: list[str]) -> set[tuple[str, ...]]:
        return {tuple(run[i : i + 5]) for i in range(len(run) - 4)}

    found = near_copies([" ".join(t) for t in texts]).toarray()
    for i, a in enumerate(map(shingles, texts)):
        for j, b in enumerate(map(shingles, texts)):
            jaccard, small = len(a & b) / len(a | b), min(len(a), len(b))
            near = jaccard >= 0.8 or (len(a & b) >= 0.9 * small and max(len(a), len(b)) <= 2 * small)
            assert found[i, j] == near, (i, j)
    assert found[0].tolist() == [True, True, False, True, False, False]


def test_near_copies_leave_boilerplate_out_of_account() -> None:
    shared = " ".join(f"shared{i}" for i in range(200))
    texts = [f"{shared} " + " ".join(f"own{n}x{i}" for i in range(15)) for n in range(25)]
    assert near_copies(texts).nnz == 25  # each with itself only
    assert near_copies(texts[:5]).nnz == 25  # too few texts for it to be boilerplate
    assert near_copies([f"{shared} t{n}" for n in range(25)]).nnz == 25 * 25  # nothing else to compare


def test_plain_text() -> None:
    text = (
        "Use :func:`~a.b.c`, :meth:`.Axes.plot`, :ref:`the guide <guide>` and `d` or `~d.e`, ``e*f`` [1]_, "
        "**bold** *args.\n\n.. note:: Mind\n   this.\n\n.. deprecated:: 1.3\n   Gone.\n\n.. _label:\n"
        "\n.. math::\n   :nowrap:\n\n   x + y\n"
        "\n>>> code\nout\n\nHead\n----\n.. code-block:: python\n\n    hidden\n\nend ::\n"
    )
    assert plain_text(text) == (
        "Use c, Axes.plot, the guide and d or e, e*f, bold *args.\nMind\nthis.\nGone.\nx + y\nHead\nend ::"
    )


def test_plain_text_does_not_depend_on_the_order_of_printed_sets() -> None:
    texts = {plain_text(f"Use of argument(s) ``{{{names}}}`` by position.") for names in ("'b', 'a'", "'a', 'b'")}
    assert texts == {"Use of argument(s) 'a', 'b' by position."}


def material(n: int = 60) -> dict:
    passages = {f"p{i:02}": f"text number {i}" for i in range(n)}
    groups = {p: f"p{int(p[1:]) // 2 * 2:02}" for p in passages}  # pairs of near-copies
    qrels = {f"q{i}": [f"p{i:02}"] for i in range(n)} | {"wide": list(passages)}
    return {
        "package": "pandas", "version": "3.1", "passages": passages, "queries": {q: f"query {q}" for q in qrels},
        "qrels": qrels, "groups": groups,
    }  # fmt: skip


def test_splits_share_no_passage_and_divide_no_group() -> None:
    docs = material()
    parts = {split: pydocs.collection_of(docs, split) for split in SPLITS}
    ids = [p for part in parts.values() for p in part.passage_ids]
    assert sorted(ids) == sorted(docs["passages"])
    split_of = {p: name for name, part in parts.items() for p in part.passage_ids}
    assert all(split_of[p] == split_of[group] for p, group in docs["groups"].items())
    queries = [q for part in parts.values() for q in part.query_ids]
    assert sorted(queries) == sorted(set(docs["qrels"]) - {"wide"})
    assert all(split_of[p] == name for name, part in parts.items() for q in part.query_ids for p in part.qrels[q])
    assert len(parts["train"].passages) > len(parts["test"].passages) > 0
    assert parts["dev"].name == "pydocs/pandas-dev" and parts["dev"].coverage == "whole"


def test_material_is_an_entry(own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    built = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        built.append(command[-1])
        return subprocess.CompletedProcess(command, 0, f"NOISE\n{json.dumps(material())}\n", "")

    recorded = {name: {"version": "3.1", "fingerprint": "other"} for name in PYDOCS}
    train = pydocs.collection_of(material(), "train")
    recorded["pydocs/pandas-train"]["fingerprint"] = train.fingerprint
    monkeypatch.setattr(pydocs, "FINGERPRINTS", tmp_path / "recorded.json")
    pydocs.FINGERPRINTS.write_text(json.dumps(recorded))
    monkeypatch.setattr(pydocs.subprocess, "run", run)
    monkeypatch.setattr(pydocs, "version_of", lambda package: "3.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_collection("pydocs/pandas-train")
    assert (found.name, found.fingerprint) == ("pydocs/pandas-train", train.fingerprint)
    assert found.description == "docstrings of pandas 3.1, train split"
    with pytest.raises(ValueError, match="pydocs/pandas-dev.*version 3.1 has the fingerprint .*recorded is .*'other'"):
        load_collection("pydocs/pandas-dev")
    assert len([p for p in (own_cache / "docstrings").iterdir() if p.is_dir()]) == 1 and built == ["pandas"]
    monkeypatch.setattr(pydocs, "version_of", lambda package: "3.2")
    with pytest.warns(UserWarning, match="built from version 3.2, but the recorded collection from 3.1"):
        load_collection("pydocs/pandas-dev")
    assert built == ["pandas", "pandas"]


def test_a_package_that_is_not_installed_or_cannot_be_built(own_cache: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no-such-package"):
        pydocs.material("no-such-package")
    with pytest.raises(RuntimeError, match="(?s)building pydocs/pytest failed:.*KeyError: 'pytest'"):
        pydocs.material("pytest")


def test_networkx_is_as_recorded(own_cache: Path) -> None:
    """A real package, built in a fresh interpreter."""
    recorded = json.loads(pydocs.FINGERPRINTS.read_text())
    assert list(recorded) == list(PYDOCS)
    found = load_collection("pydocs/networkx")
    if version("networkx") == recorded["pydocs/networkx"]["version"]:
        assert found.fingerprint == recorded["pydocs/networkx"]["fingerprint"]
    texts = dict(zip(found.passage_ids, found.passages, strict=True))
    for query_id, query in zip(found.query_ids, found.queries, strict=True):
        for passage_id in found.relevant(query_id):
            assert f" {' '.join(words(query))} " not in f" {' '.join(words(texts[passage_id]))} "
    assert min(len(words(p)) for p in found.passages) >= pydocs.MIN_PASSAGE_WORDS
