"""Collections: docstrings of installed packages, and folders in BEIR's format."""

from __future__ import annotations

from pathlib import Path

from diffret_lib.config import CHECKOUT, PYDOCS
from diffret_lib.data.beir import load_beir
from diffret_lib.data.collection import Collection


def load_collection(name_or_path: str | Path) -> Collection:
    """Load one of :data:`diffret_lib.config.PYDOCS`, or a BEIR folder by its path.

    A path may end in ``":split"`` for a split other than ``test``; a relative one is looked for in the current folder
    and then in the checkout.

    Raises
    ------
    ValueError
        For an unknown ``pydocs`` name, and for content that is not as recorded or breaks BEIR's format.
    FileNotFoundError
        For a path that is no BEIR folder.
    """
    text = str(name_or_path)
    before, _, split = text.rpartition(":")
    for root in (Path(), CHECKOUT):
        if (root / text).is_dir():
            return load_beir(root / text)
        if before and split and (root / before).is_dir():
            return load_beir(root / before, split)
    if text.startswith("pydocs/"):
        from diffret_lib.data.pydocs import load_pydocs  # here, so that python -m can run that module

        return load_pydocs(text)
    raise FileNotFoundError(f"no collection {text!r}: neither a BEIR folder nor one of {', '.join(PYDOCS)}")
