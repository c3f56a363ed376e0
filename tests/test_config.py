"""Profiles: what is in them, and what is refused, by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diffret_lib.config import CHECKOUT, K_GRID, PROFILES_DIR, ProfileError, collection_folder, load_profile, slug
from diffret_lib.data.protocols import read_published
from diffret_lib.experiments.study import REPEATED, SYSTEMS


@pytest.fixture
def content() -> dict:
    return yaml.safe_load((PROFILES_DIR / "smoke.yml").read_text(encoding="utf-8"))["profile"]


def write(folder: Path, content: dict, name: str = "smoke.yml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({"profile": content}), encoding="utf-8")
    return path


PACKAGES_TESTED = [f"pydocs/{n}" for n in "numpy scipy scikit-learn statsmodels matplotlib networkx".split()]
JUDGED = ["beir/scifact", "ir/cranfield", "ir/medline", "ir/npl"]
MSMARCO = ["msmarco/dev", "msmarco/dl19", "msmarco/dl20"]
BEIR_7 = [f"beir/{n}" for n in "arguana fiqa hotpotqa nq quora scifact trec-covid".split()]


def test_the_profiles_that_come_with_the_project():
    names = sorted(path.stem for path in PROFILES_DIR.iterdir())
    assert names == ["embedded", "nano", "paper", "paper-llada", "smoke", "study"]
    embedded, nano, paper, llada, smoke, study = map(load_profile, names)
    assert embedded.test_collections == ["pydocs/pandas-test", "pydocs/numpy", "pydocs/scipy"]
    assert smoke.test_collections == ["pydocs/pandas-test", "pydocs/numpy"]
    assert study.test_collections == ["pydocs/pandas-test", *PACKAGES_TESTED, *JUDGED]
    assert paper.test_collections == llada.test_collections == [*MSMARCO, *BEIR_7]
    assert nano.test_collections == [name for name in read_published() if name.startswith("nano/")]
    for profile in (embedded, nano, paper, llada, study):
        assert profile.k_grid == list(K_GRID) == [1, 2, 4, 8, 16]
    assert smoke.k_grid == [1, 4]
    assert embedded.sample.queries >= 40 and embedded.sample.passages >= 100 and embedded.sample.hard > 0
    assert (study.sample.queries, study.sample.passages, study.sample.hard) == (None, 1000, 10)
    for size in (*(study.samples[name] for name in JUDGED[:3]), nano.sample, paper.sample):
        assert (size.queries, size.passages) == (None, None)
    assert (study.samples["ir/npl"].queries, study.samples["ir/npl"].passages) == (None, 3000)
    assert study.max_passage_tokens >= 192
    assert (embedded.dtype, study.dtype, paper.dtype) == ("float32", "auto", "bfloat16")  # equal bytes, and speed
    training = study.training
    assert (training.steps, training.batch_size, training.negatives) >= (200, 16, 3)
    assert len(training.learning_rates) >= 3 and training.seeds == 3
    # the committed adapters are those of the profile: no seed is asked for that nobody trained, and none is left over
    runs = [(system, r) for system in SYSTEMS for r in range(training.seeds if system in REPEATED else 1)]
    folders = {slug(system) + (f"-seed-{r}" if r else "") for system, r in runs}
    assert {path.name for path in (CHECKOUT / training.adapters).iterdir()} == folders
    assert [c.collection for c in training.collections] == ["pydocs/pandas-train", "beir/scifact:train"]
    assert (paper.training.batch_size, paper.training.negatives, paper.training.learning_rates) == (128, 15, [1e-4])
    pairs = {(p.backbones.diffusion, p.backbones.autoregressive) for p in (nano, paper, llada)}
    assert pairs == {("dream-v0-instruct-7b", "qwen2.5-7b-instruct"), ("llada-8b-instruct", "llama-3-8b-instruct")}
    for profile in (embedded, nano, paper, smoke, study):
        assert profile.train_collection == ("msmarco/train" if profile is paper else "pydocs/pandas-train")
        # the stages of the adaptation are compared, and training stops early, where nothing is tested nor trained on
        used = {*profile.test_collections, *(c.collection for c in profile.training.collections)}
        assert profile.training.development.collection not in used
        assert profile.adaptation is None or profile.adaptation.zero_shot.collection not in used
    assert len({p.fingerprint for p in (embedded, nano, paper, llada, smoke, study)}) == 6


def test_a_profile_may_be_like_another(tmp_path, content):
    path = write(tmp_path, {"like": "smoke", "name": "mine", "seed": 4}, "mine.yml")
    assert load_profile(path) == load_profile(content | {"name": "mine", "seed": 4})
    assert load_profile({"like": str(path), "name": "other", "top_k": 7}).top_k == 7
    write(tmp_path, {"like": str(tmp_path / "b.yml")}, "a.yml")
    with pytest.raises(ProfileError, match=r"b\.yml: like: .* in a circle"):
        load_profile(write(tmp_path, {"like": str(tmp_path / "a.yml")}, "b.yml"))
    for like in ("none", None, 5):
        with pytest.raises(ProfileError, match="there is no profile"):
            load_profile({"like": like})
    with pytest.raises(ProfileError, match=r"mine\.yml: seed: "):
        load_profile(write(tmp_path, {"like": "smoke", "name": "mine", "seed": "x"}, "mine.yml"))


def test_frozen_and_fingerprint_follows_the_content(tmp_path, content):
    smoke = load_profile("smoke")
    with pytest.raises(ValidationError):
        smoke.seed = 4
    assert load_profile(write(tmp_path, content)).fingerprint == smoke.fingerprint
    assert load_profile(content) == load_profile(smoke) == smoke  # as papermill gives it to a notebook
    assert load_profile(write(tmp_path, content | {"description": "another"})).fingerprint == smoke.fingerprint
    assert load_profile(write(tmp_path, content | {"seed": 14})).fingerprint != smoke.fingerprint


@pytest.mark.parametrize(("change", "parts"), [
    ({"k_gird": [1]}, ["k_gird: unknown key"]),
    ({"k_grid": [1, 3]}, ["k_grid: ", "[1, 2, 4, 8, 16]", "[1, 3]"]),
    ({"k_grid": [2, 4]}, ["k_grid: ", "with 1 and a larger number"]),
    ({"k_grid": [1]}, ["k_grid: ", "with 1 and a larger number"]),
    ({"k_grid": [1, 4, 2]}, ["k_grid: an ascending list"]),
    ({"k_grid": [1, 1]}, ["k_grid: an ascending list"]),
    ({"k_grid": []}, ["k_grid: ", "at least 1 item"]),
    ({"k_grid": [1, "2"]}, ["k_grid.1: ", "'2'"]),
    ({"k_grid": [1, 2.0]}, ["k_grid.1: ", "2.0"]),
    ({"dtype": "float16"}, ["dtype: ", "'auto', 'float32' or 'bfloat16'", "'float16'"]),
    ({"seed": "13"}, ["seed: ", "'13'"]),
    ({"seed": True}, ["seed: ", "True"]),
    ({"seed": None}, ["seed: ", "None"]),
    ({"promptreps_vectors": 1}, ["promptreps_vectors: ", "greater than or equal to 2"]),
    ({"top_k": 0}, ["top_k: ", "greater than or equal to 1"]),
    ({"top_k": 10**30}, ["top_k: "]),
    ({"top_k": float("nan")}, ["top_k: "]),
    ({"sample": {"queries": 5}}, ["sample.passages: the key is missing"]),
    ({"sample": {"queries": 5, "passages": 6, "docs": 1}}, ["sample.docs: unknown key"]),
    ({"sample": 5}, ["sample: ", "(got 5)"]),
    (
        {"training": {"steps": 2}},
        ["training.collections: the key is missing", "training.learning_rates: the key is missing"],
    ),
    ({"training": {"learning_rates": [0.1, 0.1]}}, ["training.learning_rates: each learning rate is given once"]),
    ({"training": {"learning_rates": []}}, ["training.learning_rates: ", "at least 1 item"]),
    ({"training": {"learning_rates": [1.5]}}, ["training.learning_rates.0: ", "less than 1"]),
    ({"training": {"collections": []}}, ["training.collections: ", "at least 1 item"]),
    ({"training": {"temperatures": {"DiffEmbed": 0.0}}}, ["training.temperatures.DiffEmbed: ", "greater than 0"]),
    ({"training": {"warmup_ratio": 1.0}}, ["training.warmup_ratio: ", "less than 1"]),
    ({"training": {"temperature": float("inf")}}, ["training.temperature: ", "finite"]),
    ({"sample": {"queries": 5, "passages": 6, "hard": -1}}, ["sample.hard: ", "(got -1)"]),
    ({"samples": {"ir/npl": {"queries": None}}}, ["samples.ir/npl.passages: the key is missing"]),
    ({"efficiency": {"counts": [0]}}, ["efficiency.counts.0: ", "efficiency.rounds: the key is missing"]),
    ({"efficiency": {"counts": [1]}}, ["efficiency.counts: 1 and a larger number of masks are needed"]),
    ({"efficiency": {"counts": [2, 4]}}, ["efficiency.counts: 1 and a larger number of masks are needed"]),
    ({"efficiency": {"counts": [1, 1, 2]}}, ["efficiency.counts: 1 and a larger number of masks are needed"]),
    ({"backbones": {"diffusion": "x", "autoregressive": ""}}, ["backbones.autoregressive: "]),
    ({"test_collections": "pydocs/numpy"}, ["test_collections: ", "list"]),
    ({"name": "other"}, ["name: 'other' must be 'smoke'"]),
    ({"name": "a/b"}, ["name: "]),
])  # fmt: skip
def test_an_error_names_the_file_the_key_and_what_is_allowed(tmp_path, content, change, parts):
    path = write(tmp_path, content | change)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


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


@pytest.mark.parametrize(("text", "part"), [
    (b"profile:\n  seed: 1\n  seed: 2\n", "the key 'seed' is given twice in the mapping that begins in line 2"),
    (b"a: [1\n", "not readable as YAML"),
    (b"profile: \xe9\n", "not readable as YAML"),
    (b"- 1\n", "a mapping under the one key 'profile' is expected"),
    (b"", "a mapping under the one key 'profile' is expected"),
    (b"profile: {}\nother: 1\n", "a mapping under the one key 'profile' is expected"),
    (b"profile: 3\n", "a mapping under the one key 'profile' is expected"),
])  # fmt: skip
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


@pytest.mark.parametrize("name", ["embeded", "../profiles/embedded", "", "none.yml", ".", "x" * 300, None, 5, b"smoke"])
def test_a_profile_that_is_not_there(name):
    with pytest.raises(ProfileError, match=r"there is no profile .*; there are embedded, nano, paper, paper-llada"):
        load_profile(name)


def test_further_collections(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFRET_DATA", raising=False)
    base = load_profile("smoke")
    for given in ("/data/my corpus", "my corpus:dev", "pydocs/scipy", Path("/data/x"), 'a "b'):
        more = load_profile("smoke", given)
        assert more.test_collections == [*base.test_collections, str(given)] and more.fingerprint != base.fingerprint
    for nothing in (None, "", " ", "pydocs/numpy"):
        assert load_profile("smoke", nothing) == base
    assert len(base.test_collections) == 2
    (tmp_path / "my corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    several = load_profile("smoke", "pydocs/scipy 'my corpus:dev' ir/npl nano/nq pydocs/numpy").test_collections[2:]
    assert several == ["pydocs/scipy", "my corpus:dev", "ir/npl", "nano/nq"]
    assert load_profile("smoke", "pydocs/scipy nowhere").test_collections[2:] == ["pydocs/scipy nowhere"]


def test_folders_of_collections(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFRET_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("data/scifact", "data/med", "data/msmarco", "data/beir/nq", "data/nano/nq", "own", "own:dev"):
        (tmp_path / name).mkdir(parents=True)
    assert collection_folder("own") == (Path("own"), "test")
    assert collection_folder("own:train") == (Path("own"), "train")
    assert collection_folder("own:dev") == (Path("own:dev"), "test")  # a folder of that very name
    assert collection_folder("notebooks") == (CHECKOUT / "notebooks", "test")
    for nothing in ("", "none", ":dev", "own:", "beir/scifact", "ir/medline", "x" * 300):
        assert collection_folder(nothing) is None
    monkeypatch.setenv("DIFFRET_DATA", str(tmp_path / "data"))
    assert collection_folder("beir/scifact:train") == (tmp_path / "data/scifact", "train")
    assert collection_folder("ir/medline") == (tmp_path / "data/med", "test")
    assert collection_folder("msmarco/dl19") == (tmp_path / "data/msmarco", "dl19")
    assert collection_folder("beir/nq") == (tmp_path / "data/beir/nq", "test")
    assert collection_folder("nano/nq") == (tmp_path / "data/nano/nq", "test")
    assert collection_folder("beir/fiqa") is collection_folder("nano/scifact") is None  # not BEIR's whole SciFact


def test_slug():
    assert slug("data/My Corpus_2:dev") == "my-corpus-2-dev" and slug("pydocs/numpy") == "numpy"
