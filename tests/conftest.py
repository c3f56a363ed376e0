"""Settings and fixtures that many tests share; the settings stand before matplotlib and the tokenizers are imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from diffret_lib.config import Profile, load_profile
from diffret_lib.experiments import study
from diffret_lib.models.backbones import load_backbone
from tests.tiny import beir, tiny_backbone, tiny_folder, tiny_spec, tiny_tokenizer, whole


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A model folder, which no test changes."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def diffusion(folder):
    return tiny_backbone(folder, "diffusion")


@pytest.fixture(scope="module")
def autoregressive(folder):
    return tiny_backbone(folder, "autoregressive")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study on tiny backbones and three tiny collections, its cache apart; and the names of loaded backbones."""
    root = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFRET_CACHE", str(root / "cache"))
    paths = {name: beir(root, name, i) for i, name in enumerate(("mine-train", "mine-test", "other", "dev"))}
    content = load_profile("smoke").model_dump()
    content["backbones"]["text_only"] = "tiny-text"
    content["adaptation"]["zero_shot"]["collection"] = content["training"]["development"]["collection"] = paths["dev"]
    content["training"] |= {"collections": [whole(paths["mine-train"])], "seeds": 2}
    content["efficiency"]["counts"] = [1, 2]
    content |= {
        "train_collection": paths["mine-train"], "test_collections": [paths["mine-test"], paths["other"]],
        "k_grid": [1, 2], "shared_text_grid": False, "promptreps_vectors": 3,
        "sample": {"queries": 4, "passages": 8, "hard": 1}, "train_sample": {"queries": None, "passages": None},
        "departures": {"queries": 3, "passages": 7, "hard": 1},
    }  # fmt: skip
    profile = Profile.model_validate(content)
    loaded = []

    def load(name, *, dtype):
        loaded.append(name)
        family = "autoregressive" if name.endswith("instruct") else "diffusion"
        folder = root / ("text" if name == "tiny-text" else "tiny")
        if not folder.exists():
            tiny_folder(folder, seed=int(name == "tiny-text"))
        return load_backbone(tiny_spec(folder, family), dtype=dtype, device="cpu")

    patch.setattr(study, "load_backbone", load)
    yield study.Study(profile), loaded
    patch.undo()


@pytest.fixture(scope="module")
def s(world) -> study.Study:
    """That study."""
    return world[0]
