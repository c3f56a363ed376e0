"""Addresses cover content, settings and the code that computes; edits are made in a copy of the package."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import diffret_lib
from diffret_lib.addresses import SourceTree, address, code_fingerprint, fingerprint
from diffret_lib.environment import NUMERIC_PACKAGES, versions
from diffret_lib.models.prompts import SIDES
from diffret_lib.retrieval.systems import DiffRetriever
from tests.tiny import tiny_backbone

PACKAGE = Path(diffret_lib.__file__).parent
# as the fingerprints of retrievers and backbones, and Study.address, take them
ENCODING = [
    ("diffret_lib.retrieval.systems", "encode_shard"), ("diffret_lib.models.readers", "MaskedPositions"),
    ("diffret_lib.models.backbones", "load_backbone"),
]  # fmt: skip
RANKING = [("diffret_lib.experiments.study", name) for name in ("ranking", "grid_values")]


@pytest.fixture
def package(tmp_path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "diffret_lib", ignore=shutil.ignore_patterns("adapters", "__pycache__"))
    return tmp_path / "diffret_lib"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def addresses(package: Path) -> list[str]:
    tree = SourceTree(package)
    return [tree.fingerprint(ENCODING), tree.fingerprint(RANKING), tree.everything()]


@pytest.mark.parametrize(("module", "old", "new", "encoding", "ranking"), [
    ("models/readers.py", "torch.log1p(", "torch.log(", True, False),
    ("models/prompts.py", "Use {amount}", "Use just {amount}", True, False),
    ("models/shared_text.py", "{0, block, *seen}", "{0, *seen}", True, False),
    ("retrieval/search.py", "1e-9", "1e-8", False, True),
    ("retrieval/search.py", "np.nextafter(scores[:, j - 1]", "np.nextafter(scores[:, 0]", False, True),
    ("retrieval/metrics.py", "max(0, int(grade))", "int(grade)", False, True),
    ("cache.py", "SMALL_FILE = 1 << 20", "SMALL_FILE = 1 << 21", False, False),  # plumbing
])  # fmt: skip
def test_an_edit_gives_another_address_to_what_it_computes_alone(package, module, old, new, encoding, ranking):
    before = addresses(package)
    edit(package / module, old, new)
    changed = [address != other for address, other in zip(addresses(package), before, strict=True)]
    assert changed == [encoding, ranking, True]


@pytest.mark.parametrize(
    "module", ["models/readers.py", "retrieval/systems.py", "retrieval/search.py", "models/prompts.py"]
)
def test_comments_and_docstrings_give_no_other_address(package, module):
    before = addresses(package)
    assert before == addresses(PACKAGE)
    path = package / module
    text = path.read_text(encoding="utf-8")
    commented = re.sub(r"^(def |class )", r"# a comment\n\1", text, flags=re.MULTILINE)
    commented = re.sub(r'^( *)"""(?=\w)', r'\1"""Now: ', commented, flags=re.MULTILINE)
    assert commented.count("a comment") > 3 and commented.count("Now: ") > 5
    path.write_text(commented, encoding="utf-8")
    compile(commented, module, "exec")
    assert addresses(package) == before


def sources(folder: Path, **modules: str) -> SourceTree:
    root = folder / "lib"
    root.mkdir(exist_ok=True)
    for name, text in modules.items():
        (root / f"{name}.py").write_text(text, encoding="utf-8")
    return SourceTree(root, "lib")


A = """
from lib.b import helper
from lib import c

class Base:
    k = 1

class Reader(Base):
    def read(self):
        return helper(c.SIZE)
"""
B = """
import functools

def _inner(x):
    return x

@functools.cache
def helper(x):
    return _inner(x)

def other():
    return 2
"""
C = """
SIZE = 3
TABLE = {}
TABLE['x'] = 1
if SIZE:
    def under():
        return 1

def use():
    return TABLE, under
"""


@pytest.mark.parametrize(("module", "old", "new", "reader", "use"), [
    ("a", "k = 1", "k = 2", True, False),  # a base class
    ("a", "helper(c", "-helper(c", True, False),
    ("b", "return x", "return x + 1", True, False),  # a function of a function
    ("b", "@functools.cache\n", "", True, False),  # a decorator
    ("b", "return 2", "return 3", False, False),  # not used
    ("c", "SIZE = 3", "SIZE = 4", True, True),  # a constant, through its module; the other is under an `if` of it
    ("c", "= 1\nif", "= 2\nif", False, True),  # an item that is put into a constant
    ("c", "        return 1", "        return 2", False, True),  # a function under an `if`
])  # fmt: skip
def test_names_are_followed_through_modules(tmp_path, module, old, new, reader, use):
    texts = {"a": A, "b": B, "c": C}
    before = sources(tmp_path, **texts)
    assert old in texts[module]
    after = sources(tmp_path, **texts | {module: texts[module].replace(old, new, 1)})
    for place, changed in (("lib.a", "Reader"), reader), (("lib.c", "use"), use):
        assert (before.fingerprint([place]) != after.fingerprint([place])) is changed
    assert before.everything() != after.everything()


def test_the_code_of_a_notebook_counts():
    def one():
        return 1

    def two():
        return 2

    assert code_fingerprint((one,)) == code_fingerprint((one,)) != code_fingerprint((two,))
    assert address([one], "settings") != address([one], "other settings") != address([two], "other settings")


def test_versions_of_libraries_count(monkeypatch):
    before = address([fingerprint], 1)
    assert address([fingerprint], 1) == before
    monkeypatch.setattr("diffret_lib.addresses._VERSIONS", {"torch": "0"})
    assert address([fingerprint], 1) != before
    found = versions(NUMERIC_PACKAGES)
    named = "torch transformers tokenizers sentence-transformers peft datasets faiss-cpu ranx numba numpy scipy bm25s"
    assert {*named.split(), "PyStemmer"} <= found.keys() and None not in found.values()
    assert versions(["no-such-distribution"]) == {"python": found["python"], "no-such-distribution": None}


def test_a_gpu_and_a_cpu_give_other_addresses(tmp_path):
    backbone = tiny_backbone(tmp_path / "tiny")
    elsewhere = replace(backbone, model=copy.deepcopy(backbone.model).to("meta"))
    on_cpu, on_other = DiffRetriever(backbone), DiffRetriever(elsewhere)
    for side in SIDES:
        assert on_cpu.fingerprint(side) == DiffRetriever(backbone).fingerprint(side) != on_other.fingerprint(side)


def test_fingerprint_is_stable_across_processes_and_versions():
    # computed by hand: sha256 of the bytes of ["a",1,{"k":[true,null]}]
    assert fingerprint("a", 1, {"k": [True, None]}) == hashlib.sha256(b'["a",1,{"k":[true,null]}]').hexdigest()


def test_fingerprint_ignores_key_order_and_tells_content_apart():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) == fingerprint((1, 2)) == fingerprint([np.int64(1), 2])
    values = ["1", 1, 1.5, True, None, b"1", "", [], {}, ["1"], [["1"]], "\ud800", "é", "e\u0301"]
    assert len({fingerprint(v) for v in values}) == len(values)
    assert fingerprint("ab", "c") != fingerprint("a", "bc") != fingerprint("abc")


@pytest.mark.parametrize(
    "value", [{1: 2}, {1, 2}, object(), Path("x"), np.zeros(2), float("nan"), float("inf"), [np.float32("nan")]]
)
def test_fingerprint_refuses_what_has_no_canonical_form(value):
    with pytest.raises((TypeError, ValueError), match=r"fingerprint takes|not JSON compliant"):
        fingerprint(value)
