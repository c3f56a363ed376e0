"""Profiles: what is in them, and what is refused, by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diffret_lib.config import K_GRID, PROFILES_DIR, ProfileError, load_profile, slug


@pytest.fixture
def content() -> dict:
    return yaml.safe_load((PROFILES_DIR / "smoke.yml").read_text(encoding="utf-8"))["profile"]


def write(folder: Path, content: dict, name: str = "smoke.yml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({"profile": content}), encoding="utf-8")
    return path


def test_the_profiles_that_come_with_the_project():
    names = sorted(path.stem for path in PROFILES_DIR.iterdir())
    assert names == ["embedded", "embedded-full", "embedded-long", "smoke"]
    embedded, full, long, smoke = map(load_profile, names)
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
    assert load_profile(content) == load_profile(smoke) == smoke  # as papermill gives it to a notebook
    assert load_profile(write(tmp_path, content | {"description": "another"})).fingerprint == smoke.fingerprint
    assert load_profile(write(tmp_path, content | {"seed": 14})).fingerprint != smoke.fingerprint


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"k_gird": [1]}, ["k_gird: unknown key"]),
        ({"k_grid": [1, 3]}, ["k_grid: ", "[1, 2, 4, 8, 16]", "[1, 3]"]),
        ({"k_grid": [2, 4]}, ["k_grid: ", "with 1 and a larger number"]),
        ({"k_grid": [1]}, ["k_grid: ", "with 1 and a larger number"]),
        ({"k_grid": [1, 4, 2]}, ["k_grid: an ascending list"]),
        ({"k_grid": [1, 1]}, ["k_grid: an ascending list"]),
        ({"k_grid": []}, ["k_grid: ", "at least 1 item"]),
        ({"k_grid": [1, "2"]}, ["k_grid.1: ", "'2'"]),
        ({"k_grid": [1, 2.0]}, ["k_grid.1: ", "2.0"]),
        ({"dtype": "float16"}, ["dtype: ", "'float32' or 'bfloat16'", "'float16'"]),
        ({"seed": "13"}, ["seed: ", "'13'"]),
        ({"seed": True}, ["seed: ", "True"]),
        ({"seed": None}, ["seed: ", "None"]),
        ({"top_k": 0}, ["top_k: ", "greater than or equal to 1"]),
        ({"top_k": 10**30}, ["top_k: "]),
        ({"top_k": float("nan")}, ["top_k: "]),
        ({"sample": {"queries": 5}}, ["sample.passages: the key is missing"]),
        ({"sample": {"queries": 5, "passages": 6, "docs": 1}}, ["sample.docs: unknown key"]),
        ({"sample": 5}, ["sample: ", "(got 5)"]),
        ({"training": {"steps": 2}}, ["training.sample: the key is missing", "training.learning_rate: the key is missing"]),
        ({"efficiency": {"counts": [0]}}, ["efficiency.counts.0: ", "efficiency.repeats: the key is missing"]),
        ({"backbones": {"diffusion": "x", "autoregressive": ""}}, ["backbones.autoregressive: "]),
        ({"test_collections": "pydocs/numpy"}, ["test_collections: ", "list"]),
        ({"name": "other"}, ["name: 'other' must be 'smoke'"]),
        ({"name": "a/b"}, ["name: "]),
    ],
)
def test_an_error_names_the_file_the_key_and_what_is_allowed(tmp_path, content, change, parts):
    path = write(tmp_path, content | change)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_claim_4_needs_one_mask_and_several(tmp_path, content):
    for counts in ([1], [2, 4], [1, 1, 2]):
        path = write(tmp_path, content | {"efficiency": content["efficiency"] | {"counts": counts}})
        with pytest.raises(ProfileError, match=r"efficiency\.counts: 1 and a larger number of masks are needed"):
            load_profile(path)


def test_all_errors_are_told_at_once(tmp_path, content):
    del content["seed"]
    content["adaptation"]["zero_shot"]["collection"] = ""
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
        (b"profile:\n  seed: 1\n  seed: 2\n", "the key 'seed' is given twice in the mapping that begins in line 2"),
        (b"a: [1\n", "not readable as YAML"),
        (b"profile: \xe9\n", "not readable as YAML"),
        (b"- 1\n", "a mapping under the one key 'profile' is expected"),
        (b"", "a mapping under the one key 'profile' is expected"),
        (b"profile: {}\nother: 1\n", "a mapping under the one key 'profile' is expected"),
        (b"profile: 3\n", "a mapping under the one key 'profile' is expected"),
    ],
)
def test_files_that_are_no_mapping(tmp_path, text, part):
    path = tmp_path / "p.yml"
    path.write_bytes(text)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert str(path) in str(error.value) and part in str(error.value)


def test_a_byte_order_mark_is_no_fault(tmp_path, content):
    path = write(tmp_path, content)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_profile(path) == load_profile("smoke")


@pytest.mark.parametrize("name", ["embeded", "../profiles/embedded", "", "none.yml", "."])
def test_a_profile_that_is_not_there(name):
    with pytest.raises(ProfileError, match="there is no profile .*; there are embedded, embedded-full, embedded-long, smoke"):
        load_profile(name)


def test_a_further_collection():
    base = load_profile("smoke")
    for given in ("/data/my corpus", "my corpus:dev", "pydocs/scipy", Path("/data/x")):
        more = load_profile("smoke", given)
        assert more.test_collections == [*base.test_collections, str(given)] and more.fingerprint != base.fingerprint
    for nothing in (None, "", " ", "pydocs/numpy"):
        assert load_profile("smoke", nothing) == base
    assert len(base.test_collections) == 2


def test_slug():
    assert slug("data/My Corpus_2:dev") == "my-corpus-2-dev" and slug("pydocs/numpy") == "numpy"
