"""Profiles: what one run of the notebooks covers, as validated YAML files.

A profile names the backbones, the collections and how much of them is searched, the grid of vector counts
and the sizes of everything that costs time.  ``notebooks/profiles/`` holds ``embedded`` (the default, on a
laptop), ``embedded-long`` (larger samples to test on, a longer training), ``embedded-full`` (whole collections) and
``smoke`` (the same code on next to nothing).  A file is checked as a whole when it is loaded: :class:`ProfileError` names the
file, every key that is wrong and what that key may be.

>>> from diffret_lib.profiles import load_profile
>>> profile = load_profile("smoke")
>>> profile.k_grid
[1, 4]
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from diffret_lib.cache import fingerprint

__all__ = [
    "K_GRID", "PROFILES_DIR", "PYDOCS", "Adaptation", "Backbones", "Development", "Efficiency", "Profile",
    "ProfileError", "Sample", "Training", "load_profile", "profile_names",
]  # fmt: skip

#: Folder of the profiles that come with the project.
PROFILES_DIR = Path(__file__).resolve().parents[1] / "notebooks" / "profiles"

#: Numbers of vectors per text that a grid may hold.
K_GRID = (1, 2, 4, 8, 16)

#: Collections built from docstrings.
PYDOCS = tuple(
    f"pydocs/{name}"
    for name in (
        "pandas-train", "pandas-dev", "pandas-test",
        "numpy", "scipy", "scikit-learn", "statsmodels", "matplotlib", "networkx",
    )
)  # fmt: skip


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file, the key and what is allowed."""


Name = Annotated[str, StringConstraints(min_length=1, pattern=r"^\S(.*\S)?$")]
Count = Annotated[int, Field(ge=1)]

_COUNT = "a whole number of at least 1"
_COUNT_OR_ALL = "a whole number of at least 1, or null for all"
_PYDOCS = f"one of {', '.join(PYDOCS)}"
_COLLECTION = f"{_PYDOCS}, or the path of a BEIR folder"


def _check_collection(name: str) -> str:
    if name.startswith("pydocs/") and name not in PYDOCS:
        raise ValueError(f"there is no collection {name!r}{_did_you_mean(name, PYDOCS)}")
    return name


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Backbones(_Model):
    """Names of the two backbones that a run compares (entries of ``diffret_lib/backbones.yaml``)."""

    diffusion: Name = Field(description="the name of a diffusion backbone in diffret_lib/backbones.yaml")
    autoregressive: Name = Field(description="the name of an autoregressive backbone in diffret_lib/backbones.yaml")


class Sample(_Model):
    """How much of a collection is searched; ``None`` stands for all of it."""

    queries: Count | None = Field(description=_COUNT_OR_ALL)
    passages: Count | None = Field(description=_COUNT_OR_ALL)


class Development(_Model):
    """A collection for choices made on the way (stages of a training, early stopping), and how much of it."""

    collection: Name = Field(description=_COLLECTION)
    queries: Count | None = Field(description=_COUNT_OR_ALL)
    passages: Count | None = Field(description=_COUNT_OR_ALL)

    @field_validator("collection")
    @classmethod
    def _known(cls, value: str) -> str:
        return _check_collection(value)


class Adaptation(_Model):
    """The training run of ``notebooks/00_diffusion_backbone.ipynb`` and what it is measured on."""

    tokens: Count = Field(description=f"{_COUNT}: tokens of the training run")
    held_out_sequences: Count = Field(description=f"{_COUNT}: sequences for the held-out cross-entropy")
    zero_shot: Development = Field(description="a mapping with the keys collection, queries and passages")


class Training(_Model):
    """The contrastive fine-tuning of ``notebooks/03_training.ipynb``, the same for every system.

    Attributes
    ----------
    sample : Sample
        How much of the training collection is trained on; negatives are mined in it.
    steps, batch_size : int
        Optimiser steps, and queries of a step.
    negatives : int
        Hard negatives of a query.
    mini_batch : int
        Texts of one forward pass: with fewer than a step has, gradients are cached.
    max_passage_tokens : int
        Tokens of a passage that are read in training.
    learning_rate : float
    development : Development
        Where nDCG@10 is measured on the way.
    evaluate_every, patience : int
        Steps between two measurements, and measurements without a gain after which training stops.
    """

    sample: Sample = Field(description="a mapping with the keys queries and passages")
    steps: Count = Field(description=_COUNT)
    batch_size: Count = Field(description=_COUNT)
    negatives: Count = Field(description=_COUNT)
    mini_batch: Count = Field(description=_COUNT)
    max_passage_tokens: Count = Field(description=_COUNT)
    learning_rate: float = Field(gt=0, lt=1, description="a number between 0 and 1")
    development: Development = Field(description="a mapping with the keys collection, queries and passages")
    evaluate_every: Count = Field(description=_COUNT)
    patience: Count = Field(description=_COUNT)


class Efficiency(_Model):
    """What ``notebooks/06_efficiency.ipynb`` measures.

    Attributes
    ----------
    counts : list of int
        Numbers of masks, or of decoded tokens.
    text_tokens, batch_sizes : list of int
        Lengths of the encoded texts, and texts of one call.
    index_sizes : list of int
        Vectors of the indexes that are searched.
    repeats : int
        Timed calls behind every median.
    query_repeats : int
        The same of a query against its number of vectors, on which claim 4 rests; fewer than six give no interval.
    """

    counts: list[Count] = Field(min_length=1, description=f"a list; each {_COUNT}")
    text_tokens: list[Count] = Field(min_length=1, description=f"a list; each {_COUNT}")
    batch_sizes: list[Count] = Field(min_length=1, description=f"a list; each {_COUNT}")
    index_sizes: list[Count] = Field(min_length=1, description=f"a list; each {_COUNT}")
    repeats: Count = Field(description=_COUNT)
    query_repeats: Count = Field(description=_COUNT)


class Profile(_Model):
    """One run of the notebooks, frozen and validated.

    Attributes
    ----------
    name, description : str
        ``name`` is the file's stem and the folder under ``results/``.
    seed : int
        Seed of every random choice.
    backbones : Backbones
    dtype : {"float32", "bfloat16"}
        Number format of the backbones' weights.
    train_collection : str
        Where the pair of vector counts is selected.
    test_collections : list of str
        Where it is evaluated; the in-domain one comes first.
    sample, train_sample : Sample
        How much of each test collection, and of the training collection, is searched.
    max_query_tokens, max_passage_tokens : int
        Tokens of the text alone that are kept.
    k_grid : list of int
        Vector counts per text, a subset of :data:`K_GRID` that contains 1.
    promptreps_max_tokens : int
        Longest answer that PromptReps decodes.
    top_k : int
        Length of every ranking.
    batch_tokens : int
        Token budget of a batch.
    bootstrap_resamples : int
        Resamples behind every confidence interval.
    adaptation : Adaptation
    training : Training
    efficiency : Efficiency
    """

    name: Name = Field(description="the file's name without its ending")
    description: Name = Field(description="a text that is not empty")
    seed: int = Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    backbones: Backbones = Field(description="a mapping with the keys diffusion and autoregressive")
    dtype: Literal["float32", "bfloat16"] = Field(description="float32 or bfloat16")
    train_collection: Name = Field(description=_COLLECTION)
    test_collections: list[Name] = Field(min_length=1, description=f"a list without repetition; each {_COLLECTION}")
    sample: Sample = Field(description="a mapping with the keys queries and passages")
    train_sample: Sample = Field(description="a mapping with the keys queries and passages")
    max_query_tokens: Count = Field(description=_COUNT)
    max_passage_tokens: Count = Field(description=_COUNT)
    k_grid: list[int] = Field(
        min_length=1, description=f"an ascending list without repetition out of {list(K_GRID)} that contains 1"
    )
    promptreps_max_tokens: Count = Field(description=_COUNT)
    top_k: Count = Field(description=_COUNT)
    batch_tokens: Count = Field(description=_COUNT)
    bootstrap_resamples: Count = Field(description=_COUNT)
    adaptation: Adaptation = Field(description="a mapping with the keys tokens, held_out_sequences and zero_shot")
    training: Training = Field(description=f"a mapping with the keys {', '.join(Training.model_fields)}")
    efficiency: Efficiency = Field(description=f"a mapping with the keys {', '.join(Efficiency.model_fields)}")

    @field_validator("train_collection")
    @classmethod
    def _known(cls, value: str) -> str:
        return _check_collection(value)

    @field_validator("test_collections")
    @classmethod
    def _known_and_unique(cls, values: list[str]) -> list[str]:
        for value in values:
            _check_collection(value)
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{', '.join(repeated)} stands there more than once")
        return values

    @field_validator("k_grid")
    @classmethod
    def _in_grid(cls, values: list[int]) -> list[int]:
        if outside := [value for value in values if value not in K_GRID]:
            raise ValueError(f"K outside the grid: {', '.join(map(str, outside))}")
        if values != sorted(set(values)):
            raise ValueError("the values are not in ascending order without repetition")
        if 1 not in values:
            raise ValueError("1 is missing: K=1 is what every other K is compared with")
        return values

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the profile says (the description aside)."""
        return fingerprint(self.model_dump(mode="json", exclude={"description"}))


def profile_names() -> list[str]:
    """Names of the profiles that come with the project, sorted."""
    return sorted(path.stem for path in PROFILES_DIR.glob("*.yml"))


def load_profile(profile: str | Path | Profile, collection: str | Path | None = None) -> Profile:
    """Load and check a profile.

    Parameters
    ----------
    profile : str or Path or Profile
        The name of a file in ``notebooks/profiles/`` (``"embedded"``), or the path of any profile (ending in
        ``.yml`` or ``.yaml``).  A :class:`Profile` is taken as it is.
    collection : str or Path, optional
        One more test collection: a BEIR folder (``"path"`` or ``"path:split"``) or a ``pydocs/`` name.  One that is
        in the profile already is not added again.  Empty text counts as none.

    Returns
    -------
    Profile

    Raises
    ------
    ProfileError
        If there is no such profile, if the file is no YAML mapping, if a key is unknown, missing, given twice
        or has a value that is not allowed, or if ``collection`` does not exist.
    """
    if not isinstance(profile, Profile):
        profile = _read(_find(profile))
    if collection is None or not str(collection).strip():
        return profile
    collection = str(collection).strip()
    if collection.startswith("pydocs/") and not Path(collection).exists():
        try:
            _check_collection(collection)
        except ValueError as error:
            raise ProfileError(f"collection: {error}; allowed: {_COLLECTION}") from None
    elif not _folder(collection).is_dir():
        raise ProfileError(
            f"collection: there is no folder {collection!r} (looked for {_folder(collection).resolve()}); "
            f"allowed: {_COLLECTION}, with ':split' after it to choose a split"
        )
    if collection in profile.test_collections:
        return profile
    return profile.model_copy(update={"test_collections": [*profile.test_collections, collection]})


def _folder(collection: str) -> Path:
    """The folder part of ``path[:split]``."""
    path = Path(collection).expanduser()
    if path.exists() or ":" not in path.name:
        return path
    return path.with_name(path.name.rpartition(":")[0])


def _find(profile: str | Path) -> Path:
    path = Path(profile)
    if path.suffix in (".yml", ".yaml"):
        if not path.is_file():
            raise ProfileError(f"{path}: there is no such file")
        return path
    found = PROFILES_DIR / f"{profile}.yml"
    if path.name != str(profile) or not found.is_file():
        names = profile_names()
        raise ProfileError(
            f"there is no profile {str(profile)!r}{_did_you_mean(str(profile), names)}; allowed: "
            f"{', '.join(names) or 'none is'} (in {PROFILES_DIR}), or the path of a .yml file"
        )
    return found


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(None, None, f"line {line}: the key {key!r} is given twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read(path: Path) -> Profile:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: a mapping of keys is expected, got {type(content).__name__}")
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        raise ProfileError("\n".join(f"{path}: {line}" for line in _explain(error))) from None
    if profile.name != path.stem:
        raise ProfileError(f"{path}: name: got {profile.name!r}; allowed: {path.stem!r}, the file's name")
    return profile


def _explain(error: ValidationError) -> Iterable[str]:
    for item in error.errors(include_url=False):
        loc = item["loc"]
        key = ".".join(map(str, loc))
        parent, field = _locate(loc)
        if item["type"] == "extra_forbidden":
            keys = list(parent.model_fields)
            yield f"{key}: unknown key{_did_you_mean(str(loc[-1]), keys)}; allowed: {', '.join(keys)}"
            continue
        allowed = f"; allowed: {field.description}" if field is not None and field.description else ""
        if item["type"] == "missing":
            yield f"{key}: the key is missing{allowed}"
        elif item["type"] == "value_error":
            yield f"{key}: {item['ctx']['error']}{allowed}"
        else:
            yield f"{key}: got {item['input']!r} ({item['msg']}){allowed}"


def _locate(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], Any]:
    """The model that holds the place ``loc`` and the field (if any) that it lies in."""
    model: type[BaseModel] = Profile
    field = None
    for part in loc:
        if part not in model.model_fields:
            return model, field if isinstance(part, int) else None
        field = model.model_fields[part]
        inner = next(
            (t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type) and issubclass(t, _Model)),
            None,
        )
        if inner is None or part == loc[-1]:
            break
        model = inner
    return model, field
