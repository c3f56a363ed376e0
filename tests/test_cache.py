from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from diffret_lib.cache import atomic_path, cache_dir, file_sha256, fingerprint, remembered


def test_cache_dir_is_what_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c"
    monkeypatch.setenv("DIFFRET_CACHE", "~/c")
    assert cache_dir() == Path.home() / "c"
    monkeypatch.delenv("DIFFRET_CACHE")
    assert cache_dir().name == "diffret"


def test_fingerprint_is_stable_across_processes_and_versions():
    # computed by hand: sha256 of the bytes of ["a",1,{"k":[true,null]}]
    assert fingerprint("a", 1, {"k": [True, None]}) == (
        hashlib.sha256(b'["a",1,{"k":[true,null]}]').hexdigest()
    )


def test_fingerprint_ignores_key_order_and_tells_content_apart():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) == fingerprint((1, 2)) == fingerprint([np.int64(1), 2])
    values = ["1", 1, 1.5, True, None, b"1", "", [], {}, ["1"], [["1"]], "\ud800", "é", "e\u0301"]
    assert len({fingerprint(v) for v in values}) == len(values)
    assert fingerprint("ab", "c") != fingerprint("a", "bc") != fingerprint("abc")


@pytest.mark.parametrize("value", [{1: 2}, {1, 2}, object(), Path("x"), np.zeros(2)])
def test_fingerprint_refuses_what_has_no_canonical_form(value):
    with pytest.raises(TypeError, match="fingerprint takes"):
        fingerprint(value)


def test_fingerprint_refuses_nan():
    with pytest.raises(ValueError):
        fingerprint(float("nan"))


def test_file_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_atomic_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "f.npy"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".npy" and not temporary.exists()
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["f.npy"]


def test_atomic_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "d"
    for content in ("one", "two"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert os.listdir(path) == ["two"]
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "three").write_text("half")
        raise KeyError
    assert os.listdir(path) == ["two"] and os.listdir(tmp_path) == ["d"]


def test_atomic_path_wants_something_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "f"):
        pass


def test_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path))
    calls = []

    def compute():
        calls.append(1)
        return {"a": [0.1 + 0.2, None]}

    first = remembered("things", "key", compute)
    assert remembered("things", "key", compute) == first == {"a": [0.1 + 0.2, None]} and len(calls) == 1
    remembered("things", "other", compute)
    assert len(calls) == 2 and sorted(p.name for p in (tmp_path / "things").iterdir()) == ["key.json", "other.json"]
    with pytest.raises(TypeError):
        remembered("things", "set", lambda: {1})
    assert len(list((tmp_path / "things").iterdir())) == 2  # nothing half-written
