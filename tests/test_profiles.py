from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diffret_lib.profiles import K_GRID, PROFILES_DIR, ProfileError, load_profile, profile_names


@pytest.fixture
def content() -> dict:
    return yaml.safe_load((PROFILES_DIR / "smoke.yml").read_text(encoding="utf-8"))


def write(folder: Path, content: dict, name: str = "smoke.yml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_profiles_that_come_with_the_project():
    assert profile_names() == ["embedded", "embedded-full", "embedded-long", "smoke"]
    embedded, full, long, smoke = (load_profile(name) for name in profile_names())
    out_of_domain = [f"pydocs/{n}" for n in "numpy scipy scikit-learn statsmodels matplotlib networkx".split()]
    assert embedded.test_collections == long.test_collections == full.test_collections == ["pydocs/pandas-test", *out_of_domain]
    assert smoke.test_collections == ["pydocs/pandas-test", "pydocs/numpy"]
    assert embedded.k_grid == long.k_grid == full.k_grid == list(K_GRID) == [1, 2, 4, 8, 16]
    assert smoke.k_grid == [1, 4]
    assert (full.sample.queries, full.sample.passages, full.train_sample.passages) == (None, None, None)
    assert full.max_passage_tokens == 256
    for profile in (embedded, full, long, smoke):
        assert profile.train_collection == "pydocs/pandas-train"
        # the stages of the adaptation are compared where nothing is tested
        assert profile.adaptation.zero_shot.collection not in profile.test_collections
        # training stops early where nothing is tested, nor trained on
        assert profile.training.development.collection not in [profile.train_collection, *profile.test_collections]
    assert len({p.fingerprint for p in (embedded, full, long, smoke)}) == 4


def test_the_larger_profiles_differ_in_size_alone():
    embedded = load_profile("embedded").model_dump()
    size = {
        "name", "description", "sample", "train_sample", "max_passage_tokens", "bootstrap_resamples", "adaptation",
        "training", "efficiency",
    }  # fmt: skip
    for name, keys in {"embedded-full": size, "embedded-long": size - {"train_sample"}}.items():
        other = load_profile(name).model_dump()
        assert {key for key in embedded if embedded[key] != other[key]} == keys


def test_frozen_and_fingerprint_follows_the_content(tmp_path, content):
    smoke = load_profile("smoke")
    with pytest.raises(ValidationError):
        smoke.seed = 4
    assert load_profile(write(tmp_path, content)).fingerprint == smoke.fingerprint
    assert load_profile(write(tmp_path, content | {"description": "another"})).fingerprint == smoke.fingerprint
    assert load_profile(write(tmp_path, content | {"seed": 14})).fingerprint != smoke.fingerprint
    assert load_profile(smoke) is smoke


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"k_gird": [1]}, ["k_gird: unknown key", "did you mean 'k_grid'", "allowed: name, description"]),
        ({"k_grid": [1, 3]}, ["k_grid: K outside the grid: 3", "[1, 2, 4, 8, 16]"]),
        ({"k_grid": [2, 4]}, ["k_grid: 1 is missing"]),
        ({"k_grid": [1, 4, 2]}, ["k_grid: the values are not in ascending order"]),
        ({"k_grid": [1, 1]}, ["k_grid: the values are not in ascending order without repetition"]),
        ({"k_grid": []}, ["k_grid: got []", "contains 1"]),
        ({"k_grid": [1, "2"]}, ["k_grid.1: got '2'", "[1, 2, 4, 8, 16]"]),
        ({"dtype": "float16"}, ["dtype: got 'float16'", "allowed: float32 or bfloat16"]),
        ({"seed": "13"}, ["seed: got '13'", "a whole number from 0"]),
        ({"seed": True}, ["seed: got True"]),
        ({"top_k": 0}, ["top_k: got 0", "at least 1"]),
        ({"top_k": 10.5}, ["top_k: got 10.5"]),
        ({"sample": {"queries": 5}}, ["sample.passages: the key is missing", "or null for all"]),
        ({"sample": {"queries": 5, "passages": 6, "docs": 1}}, ["sample.docs: unknown key", "queries, passages"]),
        ({"training": {"steps": 2}}, ["training.sample: the key is missing", "training.learning_rate: the key is missing"]),
        ({"efficiency": {"counts": [0]}}, ["efficiency.counts.0: got 0", "efficiency.repeats: the key is missing"]),
        ({"sample": 5}, ["sample: got 5", "a mapping with the keys queries and passages"]),
        ({"backbones": {"diffusion": "x", "autoregressive": ""}}, ["backbones.autoregressive: got ''"]),
        ({"train_collection": "pydocs/pandas"}, ["train_collection: there is no collection 'pydocs/pandas'"]),
        ({"test_collections": ["pydocs/nunpy"]}, ["did you mean 'pydocs/numpy'", "test_collections"]),
        ({"test_collections": ["pydocs/numpy"] * 2}, ["test_collections: pydocs/numpy stands there more than once"]),
        ({"name": "other"}, ["name: got 'other'", "allowed: 'smoke'"]),
    ],
)
def test_an_error_names_the_file_the_key_and_what_is_allowed(tmp_path, content, change, parts):
    path = write(tmp_path, content | change)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_all_errors_are_told_at_once(tmp_path, content):
    del content["seed"]
    content["adaptation"]["zero_shot"]["collection"] = "pydocs/x"
    path = write(tmp_path, content | {"top_k": "a", "extra": 1})
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all(line.startswith(f"{path}: ") for line in lines)
    keys = {line.removeprefix(f"{path}: ").partition(":")[0] for line in lines}
    assert keys == {"seed", "top_k", "extra", "adaptation.zero_shot.collection"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\nseed: 2\n", "line 2: the key 'seed' is given twice"),
        ("a: [1\n", "not readable as YAML"),
        ("- 1\n", "a mapping of keys is expected, got list"),
        ("", "a mapping of keys is expected, got NoneType"),
    ],
)
def test_files_that_are_no_mapping(tmp_path, text, part):
    path = tmp_path / "p.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert str(path) in str(error.value) and part in str(error.value)


def test_a_profile_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match=r"no profile 'embeded' \(did you mean 'embedded'\?\); allowed: embedded, "):
        load_profile("embeded")
    with pytest.raises(ProfileError, match="no such file"):
        load_profile(tmp_path / "none.yml")
    with pytest.raises(ProfileError, match="there is no profile"):
        load_profile("../profiles/embedded")


def test_a_further_collection(tmp_path, monkeypatch):
    folder = tmp_path / "my corpus"
    folder.mkdir()
    base = load_profile("smoke")
    for given in (str(folder), f"{folder}:dev"):
        more = load_profile("smoke", given)
        assert more.test_collections == [*base.test_collections, given]
        assert more.fingerprint != base.fingerprint
    assert load_profile("smoke", folder).test_collections[-1] == str(folder)
    monkeypatch.chdir(tmp_path)
    assert load_profile("smoke", "my corpus:test").test_collections[-1] == "my corpus:test"
    assert load_profile("smoke", "pydocs/scipy").test_collections[-1] == "pydocs/scipy"
    for nothing in (None, "", "pydocs/numpy"):
        assert load_profile("smoke", nothing) == base
    with pytest.raises(ProfileError, match="there is no folder 'nowhere:dev'"):
        load_profile("smoke", "nowhere:dev")
    with pytest.raises(ProfileError, match="no collection 'pydocs/torch'"):
        load_profile("smoke", "pydocs/torch")
    assert len(base.test_collections) == 2
