from __future__ import annotations

import gzip
import shutil
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from diffret_lib.data import training_text
from diffret_lib.data.docstrings import docstrings
from diffret_lib.data.training_text import Text, clean, held_out_english, held_out_texts, read_installed, read_wheel

#: Thirteen words; a run of them in a collection and in another text is a leak.
SHARED = "one two three four five six seven eight nine ten eleven twelve thirteen"
FILLER = {
    "good": "A heap keeps its smallest item at the front so that a queue of tasks gives the most urgent one first, "
    "always.",
    "other": "The second package explains how to draw straight lines between points and how to write them to a file "
    "again.",
    "collection": "Frames hold columns of values with labels and this package reads them from files of many forms and "
    "sizes.",
}


def module(*texts: str) -> str:
    """Source whose functions have these docstrings."""
    return "\n\n".join(f'def f{i}():\n    """{text}"""' for i, text in enumerate(texts))


def wheel(folder: Path, name: str, sources: dict[str, str], description: str = "") -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, source in sources.items():
            archive.writestr(file, source)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\n\n{description}")
    return path


def install(site: Path, name: str, sources: dict[str, str], description: str = "") -> None:
    """A distribution as pip leaves it."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n{description}")
    for file, source in sources.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(source)
    (info / "RECORD").write_text("".join(f"{f},,\n" for f in [*sources, f"{info.name}/METADATA"]))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A small world of packages: one collection, one held out, one to train on; and a folder for wheels."""
    site, wheels = tmp_path / "site", tmp_path / "wheels"
    wheels.mkdir()
    frames = module(FILLER["collection"], f"{SHARED} ends it. {FILLER['collection']}")
    install(site, "dr_frames", {"dr_frames/a.py": frames})
    install(site, "dr_kept_out", {"dr_kept_out/a.py": module(f"Held out. {FILLER['other']} Kept out of training.")})
    install(site, "dr_good", {"dr_good/a.py": module(FILLER["good"] + " And more of it.")})
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(training_text, "PACKAGES", {"dr-frames": "dr_frames"})
    monkeypatch.setattr(training_text, "HELD_OUT_PACKAGES", ("dr_kept_out",))
    return wheels


def read(wheels: Path, **options) -> list[Text]:
    """Texts of that world."""
    names = ("dr_good", "dr.frames", "dr-kept-out", "dr-not-installed")
    return training_text.training_texts(wheels, packages=names, standard_library=False, **options)


def test_lists_do_not_overlap():
    lists = (training_text.PACKAGES, training_text.HELD_OUT_PACKAGES, training_text.INSTALLED_PACKAGES)
    names = [training_text._normal(n) for group in lists for n in group]
    assert len(set(names)) == len(names)
    assert set(training_text.SHORT_PACKAGES) < set(training_text.INSTALLED_PACKAGES)


def test_collections_and_held_out_packages_are_never_read(packages):
    for name in ("dr_frames", "DR.Frames", "dr_kept_out"):
        wheel(packages, name, {f"{name}/b.py": module(f"Only in the wheel of {name}. {FILLER['good']} So it is.")})
    wheel(packages, "dr_other", {"dr_other/b.py": module(FILLER["other"] + " It is allowed, it is no collection.")})
    texts = read(packages)
    assert {t.package for t in texts} == {"dr-good", "dr-other"}


def test_text_shared_with_a_collection_is_dropped(packages):
    twelve = " ".join(SHARED.split()[:12])
    leak = f"Copied: {SHARED.upper().replace(' ', ', ')}! {FILLER['good']}"
    wheel(packages, "dr_other", {"dr_other/b.py": module(leak, f"Twelve: {twelve} then other words. {FILLER['good']}")})
    texts = [t.text for t in read(packages) if t.package == "dr-other"]
    assert len(texts) == 1 and texts[0].startswith("Twelve")


def test_text_shared_with_what_is_kept_apart_is_dropped(packages):
    own = "This one is no copy. " + FILLER["good"]
    excerpt = " ".join(held_out_english().split()[40:60])
    wheel(packages, "dr_other", {"dr_other/b.py": module(f"Copied: {SHARED}. {own}", f"Novel: {excerpt} {own}", own)})
    assert len([t for t in read(packages) if t.package == "dr-other"]) == 1  # the novel's excerpt is never read
    texts = [t.text for t in read(packages, clear_of=[f"A passage: {own}"]) if t.package == "dr-other"]
    assert texts == []


def test_copies_are_dropped(packages):
    text = "This one is twice. " + FILLER["good"] + " The end of the text."
    wheel(packages, "dr_one", {"dr_one/a.py": module(text, text)})
    wheel(packages, "dr_two", {"dr_two/a.py": module(text)})
    assert sum(t.text == text for t in read(packages)) == 1


def test_no_package_dominates(packages):
    many = [f"Number {i} of many. {FILLER['good']} The end of number {i}." for i in range(50)]
    wheel(packages, "dr_big", {"dr_big/a.py": module(*many)})
    texts = [t.text for t in read(packages, max_chars={"wheel": 1000, "deb": 10}) if t.package == "dr-big"]
    assert 1000 <= sum(map(len, texts)) < 1000 + max(map(len, many))


def test_order_is_that_of_the_seed(packages):
    wheel(packages, "dr_big", {"dr_big/a.py": module(*(f"Number {i}. {FILLER['good']} It ends." for i in range(20)))})
    assert read(packages, seed=1) == read(packages, seed=1)
    assert read(packages, seed=1) != read(packages, seed=2)
    assert set(read(packages, seed=1)) == set(read(packages, seed=2))


def test_held_out_texts(packages):
    texts = held_out_texts(packages=("dr_kept_out", "dr-not-installed"))
    assert [t.package for t in texts] == ["dr_kept_out"] and texts[0].text.startswith("Held out.")
    assert held_out_texts(packages=("dr_kept_out",), per_package=0) == []


def test_docstrings_of_source():
    source = (
        '"""The module."""\n'
        'class A:\n    """A class."""\n'
        '    def method(self):\n        """\n        A method.\n\n          Indented.\n        """\n'
        '    async def later(self):\n        """Later."""\n        def inner():\n            """Inner."""\n'
        'def none(): pass\n'
            'x = """No docstring."""\n'
    )
    assert dict(docstrings(source)) == {
        "": "The module.",
        "A": "A class.",
        "A.method": "A method.\n\n  Indented.",
        "A.later": "Later.",
        "A.later.inner": "Inner.",
    }


@pytest.mark.parametrize("source", ["def f(:", "x = '\0'", "print 'python 2'"])
def test_source_that_does_not_parse(source):
    assert list(docstrings(source)) == []


def test_cleaning():
    text = (
        "Title\n\n\n\nProse of the text.\n\n>>> f(1)\n2\n... more\n\nAfter the example.\n![badge](x)\n"
        "| a | b |\n.. code:: python\n```\nLast."
    )
    assert clean(text) == "Title\n\nProse of the text.\n\nAfter the example.\nLast."


def test_what_is_no_prose_is_left_out(tmp_path):
    good = FILLER["good"] + " And so on."
    path = wheel(
        tmp_path, "dr_some",
        {
            "dr_some/a.py": module("Too short.", "0123456789 " * 20, good.replace("heap", "Häp"), good),
            "dr_some/tests/test_a.py": module("A test. " + good),
            "dr_some/_vendor/b.py": module("Vendored. " + good),
            "dr_some/data.txt": module("No source. " + good),
            "dr_some/long.py": module((good + " ") * 100),
        },
        description="Description. " + good,
    )  # fmt: skip
    texts = list(read_wheel(path))
    assert [(t.package, t.origin, t.text[:12]) for t in texts] == [
        ("dr-some", "description", "Description."),
        ("dr-some", "dr_some/a.py:f3", good[:12]),
        ("dr-some", "dr_some/long.py:f0", good[:12]),
    ]
    assert len(texts[2].text) == training_text.MAX_CHARS


def test_installed_and_wheel_give_the_same(tmp_path, monkeypatch):
    sources = {
        "dr_pkg/__init__.py": module(FILLER["good"] + " Told at length."),
        "dr_pkg/tests/t.py": module(FILLER["other"]),
    }
    install(tmp_path / "site", "dr_pkg", sources, "Described at some length. " + FILLER["other"])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert metadata.version("dr_pkg") == "1.0"
    expected = list(read_wheel(wheel(tmp_path, "dr_pkg", sources, "Described at some length. " + FILLER["other"])))
    assert list(read_installed("dr_pkg")) == expected and len(expected) == 2
    assert all(isinstance(t, Text) for t in expected)
    assert list(read_installed("dr-not-installed")) == []


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_debian_package(tmp_path, packages):
    """Manuals and dictionaries: plain text, HTML, POD, gzip; no other language, changelog or picture."""
    prose = [f"{FILLER['good']} This is text number {i} of the manual." for i in range(5)]
    files = {
        "doc/a.txt": prose[0], "doc/b.html": f"<html><body><p>{prose[1]}</p></body></html>", "doc/d.png": prose[0],
        "doc/changelog.txt": prose[0], "doc/html/fr-FR/e.html": f"<p>{prose[0]} fr</p>",
        "doc/c.pod": f"=head1 {prose[2]}",
        "dict/w.dict.dz": f"Heap \\Heap\\, n.\n   {prose[3]} [1913 Webster]\nTree\n   {{Oak}}. {prose[4]}\n",
    }  # fmt: skip
    root = tmp_path / "root"
    for name, text in files.items():
        path = root / "usr/share" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("dz") else text.encode())
    (root / "DEBIAN").mkdir()
    control = {"Package": "dr-manual", "Version": "1", "Architecture": "all", "Maintainer": "x", "Description": "x"}
    (root / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in control.items()))
    deb = packages / "dr-manual_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(deb)], check=True, capture_output=True)
    texts = training_text.read_deb(deb)
    assert [t.text for t in texts if "dict" not in t.origin] == prose[:3]
    (entry,) = [t.text for t in texts if "dict" in t.origin]
    assert entry == f"Heap , n.\n   {prose[3]}\n\nTree\n   Oak. {prose[4]}"
    assert {t.package for t in read(packages)} >= {"dr-manual", "dr-good"}
