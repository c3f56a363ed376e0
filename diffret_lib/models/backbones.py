"""The registry of backbones, and the one path on which all of them load."""

from __future__ import annotations

import copy
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from diffret_lib.addresses import address, fingerprint
from diffret_lib.cache import explained, file_sha256, remember
from diffret_lib.config import read_yaml
from diffret_lib.environment import hardware
from diffret_lib.models.gguf import BackboneError, converted_model

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FOLDER = Path(__file__).resolve().parent
_SHOWN = 5  # tensors that an error names
#: What transformers reads of a model folder.
_READ = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.txt", "*.model")
_FORMS = ({"wheel", "member", "sha256"}, {"parent", "adapter"}, {"hub"}, {"hub", "revision"}, {"path"})

Dtype = Literal["float32", "bfloat16", "float16"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Source(BaseModel, frozen=True, extra="forbid"):
    """Place of the weights, in one of the four forms that ``backbones.yaml`` explains."""

    wheel: str | None = None
    member: str | None = None
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None
    parent: str | None = None
    adapter: str | None = None
    hub: str | None = None
    revision: str | None = None
    path: Path | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Source:
        if {name for name, value in self if value is not None} not in _FORMS:
            raise ValueError("a source is {wheel, member, sha256}, {parent, adapter}, {hub, revision} or {path}")
        return self


class Backbone(BaseModel, frozen=True, extra="forbid"):
    """Description of a language model and of where it comes from; the fields are those of ``backbones.yaml``."""

    name: Name = "own"
    family: Literal["autoregressive", "diffusion"]
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

    ``model.config.is_causal`` is false for a diffusion backbone.  ``weights`` is a SHA-256 over the source of the
    weights and the merged adapters, whatever the dtype; ``fingerprint`` over these, the registry entry, the dtype and
    the code that loads them.
    """

    spec: Backbone
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask_id: int | None
    weights: str
    fingerprint: str

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device


@cache
def read_registry(path: str | os.PathLike[str] = _FOLDER / "backbones.yaml") -> dict[str, Backbone]:
    """Read backbones by name; a ``ValueError`` names the file, the backbone and the field that is wrong."""
    try:
        entries = TypeAdapter(dict[Name, Backbone]).validate_python(read_yaml(path))
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, entry in entries.items():
        above = {name}
        while (parent := entry.source.parent) is not None:
            if parent not in entries or parent in above:
                raise ValueError(f"{path}: {name}: there is no parent {parent!r} that does not come from it")
            if (entries[parent].family, entry.family) == ("diffusion", "autoregressive"):
                raise ValueError(f"{path}: {name}: a bidirectional model, {parent}, stays a diffusion one")
            above.add(parent)
            entry = entries[parent]
    return {name: entry.model_copy(update={"name": name}) for name, entry in entries.items()}


def get_backbone(name: str) -> Backbone:
    """Look up a backbone of the registry; a ``ValueError`` for an unknown name lists the known ones."""
    registry = read_registry()
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"there is no backbone {name!r:.100}; there are {', '.join(registry)}")
    return registry[name]


@cache
def fast_dtype(device: str | None = None) -> Dtype:
    """Name of the dtype that ``dtype="auto"`` takes: bfloat16 on a GPU that has it, and on a CPU that is fast in it.

    A CPU is when its products take at most half the time of float32: the best of five of 1024 x 1024 matrices.  The
    finding is kept in the cache for a processor and its number of threads, so that all runs of a study agree.
    ``device`` is a type ("cpu", "cuda"; on others it is float32), by default CUDA if there is one.
    """
    device = device or _default_device()
    if device != "cpu":
        has = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has else "float32"
    machine = hardware()["cpu"], torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return remember("dtype", address([_probe], *machine), _probe)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _probe() -> Dtype:
    best = {}
    for name in ("float32", "bfloat16"):
        matrix, times = torch.ones(1024, 1024, dtype=_DTYPES[name]), []
        for _ in range(6):  # the first one is the warm-up
            start = time.perf_counter()
            _ = matrix @ matrix
            times.append(time.perf_counter() - start)
        best[name] = min(times[1:])
    logger.info("products of 1024 x 1024 matrices: %s s", best)
    return "bfloat16" if 2 * best["bfloat16"] <= best["float32"] else "float32"


def load_backbone(
    backbone: str | Backbone | LoadedBackbone, *, dtype: Dtype | Literal["auto"] = "auto",
    device: str | torch.device | None = None, adapter: str | os.PathLike[str] | None = None,
) -> LoadedBackbone:  # fmt: skip
    """Load a backbone; the embedded ones are fetched and converted at their first use.

    ``backbone`` is a name of the registry, or a ``Backbone(family="autoregressive", source={"path": "folder"})`` of
    one's own; a loaded one is returned as it is.  ``dtype`` "auto" is what :func:`fast_dtype` finds.  ``adapter`` is a
    PEFT folder in place of the backbone's own, or ``"none"`` for its parent's weights.  Without a device it is CUDA if
    there is one.  Adapters are merged in float32, a parent's before the backbone's own.  A ValueError refuses an
    unknown name, dtype or device, other settings than a loaded backbone has, or a mask token that the vocabulary lacks;
    a BackboneError says that the weights cannot be fetched, verified or found, or are not those of the model's
    ``config.json``, or that the adapter does not belong to them.
    """
    if not isinstance(dtype, str) or dtype not in ("auto", *_DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(_DTYPES)}, not {dtype!r}")
    if isinstance(backbone, LoadedBackbone):
        known = dtype in ("auto", str(backbone.dtype).removeprefix("torch."))
        if not known or device is not None or adapter is not None:
            hint = "load it anew with these settings, or put an adapter on it with with_adapter"
            raise ValueError(f"{backbone.spec.name} is loaded already, in {backbone.dtype}: {hint}")
        return backbone
    spec = backbone if isinstance(backbone, Backbone) else get_backbone(backbone)
    if not isinstance(adapter, str | os.PathLike | None):
        raise ValueError(f"adapter must be a folder, or 'none', not {adapter!r}")
    device = _device(device)
    dtype = fast_dtype(device.type) if dtype == "auto" else dtype
    with _quiet():
        model, tokenizer, weights = _load(spec, _DTYPES[dtype], adapter)
        model = model.to(device=device, dtype=_DTYPES[dtype])
    tokenizer.chat_template = spec.chat_template or tokenizer.chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    mask_id = tokenizer.get_vocab().get(spec.mask_token)
    if spec.mask_token is not None and (mask_id is None or mask_id >= model.config.vocab_size):
        raise ValueError(f"{spec.name}: the vocabulary has no mask token {spec.mask_token!r}")
    settings = spec.model_dump(include={"family", "mask_token", "prediction_shift", "chat_template"})
    identity = address([load_backbone], settings, weights, dtype)
    return LoadedBackbone(spec, model.eval().requires_grad_(False), tokenizer, mask_id, weights, identity)


def _device(named: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(named or _default_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        known = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"device must be {known} here, not {named!r}: {str(error)[:200]}") from error
    return device


def make_bidirectional(model: PreTrainedModel) -> PreTrainedModel:
    """Let every position attend to every other, with and without a padding mask."""
    model.config.is_causal = False  # the mask that transformers makes
    for module in (m for m in model.modules() if hasattr(m, "is_causal")):
        module.is_causal = False  # an attention function without a mask
    return model


def _load(
    spec: Backbone, dtype: torch.dtype, adapter: str | os.PathLike[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model, tokenizer and identity of the weights; in float32 where an adapter is merged."""
    adapter = adapter or (spec.source.adapter and _FOLDER / spec.source.adapter)
    folder = None if adapter is None or str(adapter) == "none" else Path(adapter).expanduser()
    dtype = torch.float32 if folder else dtype
    parent = spec.source.parent
    model, tokenizer, weights = _load(get_backbone(parent), dtype) if parent else _load_base(spec, dtype)
    if spec.family == "diffusion":
        make_bidirectional(model)
    if folder is not None:
        model = _merge_adapter(model, folder, parent or spec.name, weights)
        weights = fingerprint(weights, adapter_sha(folder))
    return model, tokenizer, weights


def _load_base(spec: Backbone, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    source = spec.source
    if source.wheel is not None:
        where, weights = converted_model(source.wheel, source.member, source.sha256), fingerprint(source.sha256)
    elif source.hub is not None:
        where = source.hub
    else:
        where = source.path.expanduser()
        if not (where / "config.json").is_file():
            raise BackboneError(f"{spec.name}: {where} is not a model folder: it has no config.json")
        files = (p for pattern in _READ for p in where.glob(pattern))
        weights = fingerprint({p.name: file_sha256(p) for p in files})
    try:
        with explained(Path(where)):
            how = {"dtype": dtype, "revision": source.revision or "main"}
            checked = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            model, found = AutoModelForCausalLM.from_pretrained(where, **how, **checked)
            _check_whole(found)
            tokenizer = AutoTokenizer.from_pretrained(where, revision=source.revision or "main")
    except (OSError, ValueError, SafetensorError) as error:
        hint = "a model of the hub can be downloaded elsewhere, and its folder named as the source's path"
        raise BackboneError(f"{spec.name}: cannot load {where}: {error}\n({hint})") from error
    if source.hub is not None:
        commit = getattr(model.config, "_commit_hash", None) or source.revision or "main"
        weights = fingerprint(f"{source.hub}@{commit}")
    return model, tokenizer, weights


def _check_whole(found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not the model's: transformers would make up the missing ones."""
    wrong = [f"{name} is missing" for name in found["missing_keys"]]
    wrong += [f"{name} is unexpected" for name in found["unexpected_keys"]]
    wrong += [f"{name} has the shape {tuple(a)}, not {tuple(b)}" for name, a, b in found["mismatched_keys"]]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"the checkpoint does not fit its config.json: {', '.join(sorted(wrong)[:_SHOWN])}{more}")


def adapter_path(name: str) -> Path:
    """Folder of the adapter that the package holds for a backbone of the registry."""
    adapter = get_backbone(name).source.adapter
    if adapter is None:
        raise ValueError(f"{name} has no adapter")
    return _FOLDER / adapter


def with_adapter(backbone: LoadedBackbone, folder: str | os.PathLike[str]) -> LoadedBackbone:
    """Copy a loaded backbone with a further PEFT adapter merged in; raises as :func:`load_backbone`."""
    if not isinstance(backbone, LoadedBackbone) or not isinstance(folder, str | os.PathLike):
        raise ValueError(f"a loaded backbone and a folder are needed, not {backbone!r:.100} and {folder!r:.100}")
    folder = Path(folder).expanduser()
    with _quiet():
        model = copy.deepcopy(uncompiled(backbone)).float()
        model = _merge_adapter(model, folder, backbone.spec.name, backbone.weights)
    sha = adapter_sha(folder)
    model = model.to(backbone.dtype).eval().requires_grad_(False)
    weights, identity = fingerprint(backbone.weights, sha), address([with_adapter], backbone.fingerprint, sha)
    return replace(backbone, model=model, weights=weights, fingerprint=identity)


def compiled(backbone: LoadedBackbone) -> LoadedBackbone:
    """Copy a loaded backbone with each layer of its decoder compiled by torch, once for all lengths.

    Faster, and the last bits of its numbers are others: a backbone with a fingerprint of its own.  It is for systems of
    one forward pass; torch needs a C++ compiler for it on a CPU.
    """
    model = copy.deepcopy(uncompiled(backbone))
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)
    return replace(backbone, model=model, fingerprint=address([compiled], backbone.fingerprint))


def uncompiled(backbone: LoadedBackbone) -> PreTrainedModel:
    """A backbone's model, to be copied; a ValueError where its layers are compiled, which a copy would lose unseen."""
    if any(module._compiled_call_impl for module in backbone.model.modules()):
        way = "compile it last, after its adapters, and without workers"
        raise ValueError(f"{backbone.spec.name} is compiled, and a copy of it would not be: {way}")
    return backbone.model


def adapter_sha(folder: Path | None) -> str | None:
    """SHA-256 over an adapter's tensors and the settings with which they are merged; None for no adapter."""
    if folder is None:
        return None
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    names = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "trainable_token_indices")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    content = {n: [str(t.dtype), t.shape, t.view(torch.uint8).numpy().tobytes()] for n, t in tensors.items()}
    return fingerprint(content, {name: config.get(name) for name in names})


def _merge_adapter(model: PreTrainedModel, folder: Path, name: str, weights: str) -> PreTrainedModel:
    """Merge an adapter into the model, where the metadata of its file (base, base_name, attention) say it belongs."""
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            hint = 'name a folder that PeftModel.save_pretrained wrote, or "none" for the bare weights'
            raise BackboneError(f"{name}: the adapter {folder} has no {file}: {hint}")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    attention = "causal" if getattr(model.config, "is_causal", True) else "bidirectional"
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("base", weights) != weights or metadata.get("attention", attention) != attention:
            base, way = metadata.get("base", "unknown"), metadata.get("attention", "as the base")
            raise ValueError(
                f"it was trained on {metadata.get('base_name')} (weights {base[:12]}, attention {way}), and this is "
                f"{name} (weights {weights[:12]}, {attention})"
            )
        adapted = PeftModel.from_pretrained(model, str(folder))
        # "auto" would look for the base model's configuration on the hub
        wrong = tensors.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        wrong |= {key for key, tensor in tensors.items() if not tensor.isfinite().all()}
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing, unexpected or not finite, such as {min(wrong)}")
    except (ValueError, KeyError, RuntimeError, TypeError, OSError, SafetensorError) as error:
        raise BackboneError(f"the adapter {folder} does not fit {name}: {error}") from error
    if "base" not in metadata:
        logger.warning("the base of the adapter %s is unknown; its tensors fit %s", folder, name)
    merged = adapted.merge_and_unload()
    if tied:
        merged.tie_weights()
    return merged


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch off the progress bars and warnings of transformers while it loads."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
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
