"""The adapters that the authors of DiffRetriever fine-tuned and released, on our backbones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

from diffret_lib.addresses import address
from diffret_lib.cache import fetch, file_sha256
from diffret_lib.models.architectures import llama_name
from diffret_lib.models.backbones import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from diffret_lib.models.gguf import BackboneError

_PREFIX = "base_model.model."  # of every tensor of an adapter
#: Settings of an adapter that name modules, and are not renamed.
_UNSUPPORTED = ("alpha_pattern", "rank_pattern", "modules_to_save")


@dataclass(frozen=True)
class ReleasedAdapter:
    """Place of an adapter on the Hugging Face hub, the backbone it belongs to, and its pair (Kq, Kp)."""

    hub: str
    backbone: str
    pair: tuple[int, int]

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``DiffRetriever`` with which it was trained: the authors' code reads token i at position i."""
        return {"k_query": self.pair[0], "k_passage": self.pair[1], "shifted": False}


_DREAM, _LLADA = "dream-v0-instruct-7b", "llada-8b-instruct"
#: The released adapters by name.
RELEASED = {
    "dream-7b-single": ReleasedAdapter("ielabgroup/diffretriever-dream-7b-single", _DREAM, (1, 1)),
    "dream-7b-multi": ReleasedAdapter("ielabgroup/diffretriever-dream-7b-multi-q4-p16", _DREAM, (4, 16)),
    "llada-8b-single": ReleasedAdapter("ielabgroup/diffretriever-llada-8b-single", _LLADA, (1, 1)),
    "llada-8b-multi": ReleasedAdapter("ielabgroup/diffretriever-llada-8b-multi-q4-p4", _LLADA, (4, 4)),
}


def released_adapter(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """PEFT folder of an adapter of :data:`RELEASED`, which ``Retriever.with_adapter`` takes.

    It comes from the hub (or its cache), or from ``folder``, a copy that was downloaded elsewhere.  Modules that have
    LLaDA's names get Llama's, in a copy in the cache.  ValueError: an unknown name.  BackboneError: the files cannot
    be had, or have settings that cannot be renamed.
    """
    if name not in RELEASED:
        raise ValueError(f"there is no released adapter {name!r:.100}; there are {', '.join(RELEASED)}")
    where = RELEASED[name].hub if folder is None else str(Path(folder).expanduser())
    try:
        config, weights = (Path(cached_file(where, file)) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{name}: cannot load the adapter {where}: {error}") from error
    if all(_renamed(key) == key for key in tensors):
        return config.parent
    settings = json.loads(config.read_text(encoding="utf-8"))
    if unsupported := [key for key in _UNSUPPORTED if settings.get(key)]:
        raise BackboneError(f"{name}: the adapter {where} sets {', '.join(unsupported)}, which cannot be renamed")
    key = address([rename_adapter], file_sha256(weights), settings)
    return fetch("released", key, lambda target: rename_adapter(tensors, settings, target))


def rename_adapter(tensors: Mapping[str, Tensor], settings: dict[str, Any], target: Path) -> None:
    """Write an adapter of LLaDA as one of Llama, for exactly the modules of which it has tensors."""
    tensors = {_renamed(key): tensor for key, tensor in tensors.items()}
    modules = sorted({key.removeprefix(_PREFIX).partition(".lora_")[0] for key in tensors})
    settings = settings | {"target_modules": modules, "exclude_modules": None, "layers_to_transform": None}
    (target / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    save_file(tensors, target / ADAPTER_WEIGHTS, {"format": "pt"})


def _renamed(key: str) -> str:
    return _PREFIX + llama_name(key.removeprefix(_PREFIX)) if key.startswith(_PREFIX) else key
