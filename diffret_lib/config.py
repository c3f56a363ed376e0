"""Profiles: what one run of the notebooks covers, as validated YAML files.

A file of ``notebooks/profiles/`` holds a profile under the key ``profile``, which is a parameter of every notebook:
``papermill notebook.ipynb out.ipynb -f notebooks/profiles/smoke.yml`` gives it along, and ``profile = "smoke"`` in
JupyterLab reads the same file.

>>> load_profile("smoke").k_grid
[1, 4]
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from diffret_lib.addresses import fingerprint

#: The checkout, or the folder above the installed package.
CHECKOUT = Path(__file__).resolve().parents[1]
PROFILES_DIR = CHECKOUT / "notebooks" / "profiles"
#: Numbers of masks that a grid may hold (the paper's).
K_GRID = (1, 2, 4, 8, 16)
#: Packages whose docstrings are collections: distribution name to import name.
PACKAGES = {
    "pandas": "pandas", "numpy": "numpy", "scipy": "scipy", "scikit-learn": "sklearn", "statsmodels": "statsmodels",
    "matplotlib": "matplotlib", "networkx": "networkx",
}  # fmt: skip
#: The package that is split into training, development and test collection.
SPLIT_PACKAGE, SPLITS = "pandas", ("train", "dev", "test")
PYDOCS = (
    *(f"pydocs/{SPLIT_PACKAGE}{split}" for split in ("", *(f"-{name}" for name in SPLITS))),
    *(f"pydocs/{package}" for package in PACKAGES if package != SPLIT_PACKAGE),
)


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file, the key and what is wrong."""


Name = Annotated[str, StringConstraints(min_length=1, pattern=r"^\S(.*\S)?$")]
Count = Annotated[int, Field(ge=1, le=2**31)]
Counts = Annotated[list[Count], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Backbones(_Model):
    """Names of the backbones that a run compares (entries of ``diffret_lib/models/backbones.yaml``).

    ``text_only`` is the diffusion backbone before it met the retrieval prompt; without it, no system runs on that.
    """

    diffusion: Name
    autoregressive: Name
    text_only: Name | None = None


class Sample(_Model):
    """How much of a collection is searched; ``None`` stands for all of it.

    The pool holds the relevant passages, then up to ``hard`` passages of each query that BM25 ranks highest, then
    random ones.
    """

    queries: Count | None
    passages: Count | None
    hard: int = Field(default=0, ge=0, le=1000)


class Development(Sample):
    """A collection for choices made on the way (stages of a training, early stopping), and how much of it."""

    collection: Name


class Adaptation(_Model):
    """The training run of notebook 00 (``tokens``), and what it is measured on."""

    tokens: Count
    held_out_sequences: Count
    zero_shot: Development


class Training(_Model):
    """The contrastive fine-tuning of notebook 03, the same for every system; defaults are the authors' settings.

    All ``collections`` are trained on together, and negatives are mined in each.  A step has ``batch_size`` queries
    with ``negatives`` hard negatives each, and ``mini_batch`` texts in a forward pass.  nDCG@10 on ``development`` is
    measured every ``evaluate_every`` steps; training stops after ``patience`` without a gain.  The best of
    ``learning_rates`` by it is taken, after ``selection_steps`` of each (null: all steps); ``seeds`` are the
    repetitions of :data:`diffret_lib.experiments.study.REPEATED`, compared on ``development``.  ``temperatures`` are by
    class name, else ``temperature``.  With ``adapters``, a folder of published ones (from the checkout), nothing is
    trained.  With ``rows``, a file of Tevatron's rows (from the checkout) or the name of their repository on the hub,
    these are trained on, and no negatives are mined; which of their passages are relevant to another query is not
    known, so ``mask_false_negatives`` must be off.
    """

    collections: list[Development] = Field(min_length=1)
    steps: Count
    batch_size: Count
    negatives: Count
    mini_batch: Count
    max_passage_tokens: Count
    learning_rates: list[Annotated[float, Field(gt=0, lt=1)]] = Field(min_length=1)
    selection_steps: Count | None = None
    seeds: Count = 1
    warmup_ratio: Share = 0.06
    weight_decay: Share = 0.01
    dropout: Share = 0.05
    temperature: Positive = 0.01
    temperatures: dict[Name, Positive] = {"DiffEmbed": 0.02, "RepLLaMA": 0.02}
    sparse_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    sparse_temperature: Positive = 1.0
    mask_false_negatives: bool = True
    development: Development
    evaluate_every: Count
    patience: Count
    adapters: Name | None = None
    rows: Name | None = None

    @field_validator("learning_rates")
    @classmethod
    def _each_once(cls, values: list[float]) -> list[float]:
        if len(set(values)) < len(values):
            raise ValueError("each learning rate is given once")
        return values

    @model_validator(mode="after")
    def _rows_know_no_false_negatives(self) -> Training:
        if self.rows and self.mask_false_negatives:
            raise ValueError("rows know no false negatives: mask_false_negatives must be false")
        return self


class Efficiency(_Model):
    """The measurements of notebook 06.

    ``counts`` are numbers of masks or decoded tokens, ``text_tokens`` and ``batch_sizes`` what is encoded in a call,
    ``index_sizes`` vectors of the searched indexes.  ``rounds`` are the timed calls behind every median: fewer than six
    give no interval.
    """

    counts: Counts
    text_tokens: Counts
    batch_sizes: Counts
    index_sizes: Counts
    rounds: Count

    @field_validator("counts")
    @classmethod
    def _claim_4_compares_counts(cls, values: list[int]) -> list[int]:
        if 1 not in values or len(set(values)) < max(2, len(values)):
            raise ValueError("1 and a larger number of masks are needed, each once: claim 4 compares them")
        return values


class Profile(_Model):
    """One run of the notebooks, frozen and validated.

    ``name`` is the file's stem and the folder under ``results/``.  In a file, ``like: NAME`` takes the keys that are
    not there from another profile.  The pair (Kq, Kp) is selected on ``train_collection``; the first of
    ``test_collections`` is the in-domain one.  ``sample`` is taken of each test collection, or what ``samples`` says
    for it; ``departures`` of the training collection for the table of departures, ``dtype_sample`` of each test
    collection for what bfloat16 changes (null: not shown), ``grid_sample`` of each for the grid of pairs and the oracle
    (null: what is searched).  Without ``keep_passages`` the passages of a system are searched as they are encoded, and
    their vectors are not kept: the same rankings, from little disk.
    ``max_query_tokens`` and ``max_passage_tokens`` count the text alone; ``promptreps_vectors`` are PromptReps' most
    vectors (N, the prompt's among them), ``top_k`` the length of every ranking, ``batch_tokens`` the token budget of a
    batch on a CPU.  With ``shared_text_grid`` all pairs of the grid come from one pass over each text.  ``dtype``
    "auto" is bfloat16 where the machine is fast in it.  Without ``adaptation`` (null) notebook 00 is left out.
    ``fine_tuned`` are the systems that are trained (null: all of :data:`diffret_lib.experiments.study.SYSTEMS`); an
    empty list leaves notebook 03 out.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    description: Name
    seed: int = Field(ge=0, lt=2**32)
    backbones: Backbones
    dtype: Literal["auto", "float32", "bfloat16"]
    train_collection: Name
    test_collections: list[Name] = Field(min_length=1)
    sample: Sample
    samples: dict[Name, Sample] = {}
    train_sample: Sample
    departures: Sample
    dtype_sample: Sample | None = None
    grid_sample: Sample | None = None
    keep_passages: bool = True
    max_query_tokens: Count
    max_passage_tokens: Count
    k_grid: Counts
    shared_text_grid: bool
    promptreps_vectors: Annotated[int, Field(ge=2, le=2**31)]
    top_k: Count
    batch_tokens: Count
    adaptation: Adaptation | None
    training: Training
    fine_tuned: list[Name] | None = None
    efficiency: Efficiency

    @field_validator("k_grid")
    @classmethod
    def _in_grid(cls, values: list[int]) -> list[int]:
        if values != sorted(set(values) & set(K_GRID)) or values[0] != 1 or len(values) < 2:
            raise ValueError(f"an ascending list out of {list(K_GRID)} is needed, with 1 and a larger number")
        return values

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the profile says (the description aside)."""
        return fingerprint(self.model_dump(mode="json", exclude={"description"}))


def load_profile(profile: str | Path | Mapping[str, Any] | Profile, collection: str | Path | None = None) -> Profile:
    """Load and check a profile.

    Parameters
    ----------
    profile
        The name of a file in ``notebooks/profiles/`` (``"embedded"``), the path of any such file (ending in ``.yml`` or
        ``.yaml``), or the content of its key ``profile``.
    collection
        More test collections, where the profile has them not yet; see :func:`split_collections`.  Empty text is none.

    Raises
    ------
    ProfileError
        If there is no such profile, if the file is no YAML mapping, or if a key is unknown, missing, given twice or
        has a value that is not allowed; every wrong key is named.
    """
    if not isinstance(profile, Profile):
        where = "profile" if isinstance(profile, Mapping) else _find(profile)
        try:
            content = profile if isinstance(profile, Mapping) else _read(where)
            profile = Profile.model_validate(_with_likes(content, where))
        except ValidationError as error:
            lines, known = [], {"missing": "the key is missing", "extra_forbidden": "unknown key"}
            for e in error.errors(include_url=False):
                said = known.get(e["type"]) or f"{e['msg'].removeprefix('Value error, ')} (got {e['input']!r})"
                lines.append(f"{where}: {'.'.join(map(str, e['loc']))}: {said}")
            raise ProfileError("\n".join(lines)) from None
        if isinstance(where, Path) and profile.name != where.stem:
            raise ProfileError(f"{where}: name: {profile.name!r} must be {where.stem!r}, the file's name")
    collection = "" if collection is None else str(collection).strip()
    if not collection:
        return profile
    tests = dict.fromkeys([*profile.test_collections, *split_collections(collection)])
    return profile.model_copy(update={"test_collections": list(tests)})


_NAMED = re.compile(r"(beir|ir|msmarco|nano)/[\w.-]+(:[\w.-]+)?")


def data_root() -> Path | None:
    """The folder ``DIFFRET_DATA``, a relative one from the checkout; None where it is not set."""
    named = os.environ.get("DIFFRET_DATA")
    return CHECKOUT / os.path.expanduser(named) if named else None


def rows_file(rows: str | Path) -> Path | None:
    """The file of ``training.rows`` on this machine, or None.

    It is a path from the checkout (``~`` is the home folder), or a repository's ``NAME/train.jsonl.gz`` in the folder
    ``DIFFRET_DATA``.
    """
    data, places = data_root(), [CHECKOUT / os.path.expanduser(rows)]
    places += [data / Path(rows).name / "train.jsonl.gz"] if data else []
    return next(filter(Path.is_file, places), None)


def data_folders(name: str) -> list[str]:
    """Folders that may hold a named collection in the folder ``DIFFRET_DATA``, or none for another name.

    ``msmarco/dl19`` is in ``msmarco`` (``qrels/dl19.tsv``), ``beir/NAME`` and ``ir/NAME`` are in a folder of this name
    or of ``NAME`` alone (``med`` for ``ir/medline``), ``nano/NAME`` in a folder of this name.
    """
    kind, short = name.split("/") if _NAMED.fullmatch(name) else ("", "")
    named = {"msmarco": ["msmarco"], "nano": [name], "": []}
    return named.get(kind, [name, *(["med"] if short == "medline" else []), short])


def collection_folder(name: str | Path) -> tuple[Path, str] | None:
    """Folder and split of a collection named ``path``, ``path:split``, or as in :func:`data_folders`; None: no folder.

    Named ones are looked for in the folder ``DIFFRET_DATA``, paths from the current folder, then from the checkout;
    ``~`` is the home folder.
    """
    text, data = str(name), data_root()
    before, _, last = text.rpartition(":")
    for path, split in ((text, "test"), (before, last)):
        home = os.path.expanduser(path)
        named = [data / each for each in data_folders(path)] if data else []
        for folder in (*named, Path(home), CHECKOUT / home):
            if path and split and os.path.isdir(folder):  # False for a name that is too long as well
                return folder, path.partition("/")[2] if path.startswith("msmarco/") and folder in named else split
    return None


def split_collections(text: str) -> list[str]:
    """Names of collections in a text: the whole of it where that is one, else its words (with quotes as in a shell).

    A name is a ``pydocs/``, ``beir/``, ``ir/``, ``msmarco/`` or ``nano/`` one, or a BEIR folder (``path`` or
    ``path:split``).
    """

    def known(name: str) -> bool:
        return name in PYDOCS or bool(_NAMED.fullmatch(name)) or collection_folder(name) is not None

    text = text.strip()
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation mark that is not closed
        words = []
    return [text] if known(text) or not words or not all(map(known, words)) else words


def slug(name: str) -> str:
    """A name for files: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", Path(name).name.lower()).strip("-")


def _find(profile: str | Path) -> Path:
    path, named = Path(str(profile)), {path.stem: path for path in PROFILES_DIR.glob("*.yml")}
    found = path if path.suffix in (".yml", ".yaml") else named.get(str(profile))
    if found is None or not os.path.isfile(found):  # False for a path that is too long as well
        raise ProfileError(
            f"there is no profile {str(profile)!r}; there are {', '.join(sorted(named))} (in {PROFILES_DIR}), "
            "or name the path of a .yml file"
        )
    return found


def _with_likes(content: Mapping[str, Any], *seen: Path | str) -> dict[str, Any]:
    """A profile's keys, and those of the profile that it is like."""
    own = {key: value for key, value in content.items() if key != "like"}
    if "like" not in content:
        return own
    where = _find(content["like"])
    if where in seen:
        raise ProfileError(f"{where}: like: profiles that are like each other in a circle")
    return _with_likes(_read(where), *seen, where) | own


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML itself would take the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            place = f"in the mapping that begins in line {node.start_mark.line + 1}"
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} is given twice {place}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; ValueError: it is not readable, or a key is given twice."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error


def _read(path: Path) -> Any:
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ProfileError(str(error)) from error
    if not isinstance(content, Mapping) or list(content) != ["profile"] or not isinstance(content["profile"], Mapping):
        raise ProfileError(f"{path}: a mapping under the one key 'profile' is expected")
    return content["profile"]
