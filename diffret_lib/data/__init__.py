"""Collections: docstrings of installed packages, BEIR's, and folders in BEIR's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffret_lib.config import PYDOCS, collection_folder

if TYPE_CHECKING:
    from diffret_lib.data.collection import Collection


def load_collection(name_or_path: str | Path) -> Collection:
    """Load one of :data:`diffret_lib.config.PYDOCS`, a BEIR folder by its path, or a collection of BEIR by its name.

    A path, and a name, may end in ``":split"`` for a split other than ``test``.  ``beir/NAME`` and ``ir/NAME`` are
    looked for in the folder ``DIFFRET_DATA`` (:func:`~diffret_lib.config.collection_folder`), the former then on the
    hub (:data:`~diffret_lib.data.beir.REVISIONS`).

    Raises
    ------
    ValueError
        For an unknown ``pydocs`` name, and for content that is not as recorded or breaks BEIR's format.
    FileNotFoundError
        For a path that is no BEIR folder, and a name that is nowhere or cannot be reached.
    """
    text = str(name_or_path)
    if text.startswith("pydocs/"):  # imported here, so that python -m can run it, and that names are told without it
        from diffret_lib.data import pydocs

        return pydocs.load_pydocs(text)
    from diffret_lib.data import beir

    kind, _, short = text.partition("/")
    if found := collection_folder(text):
        folder, split = found
        named = kind in ("beir", "ir") and short
        return beir.load_beir(folder, split, text.removesuffix(f":{split}") if named else None)
    name, _, split = short.partition(":")
    if kind == "beir" and name in beir.REVISIONS:
        return beir.load_hub(name, split or "test")
    ways = f"neither a BEIR folder nor one of {', '.join(PYDOCS)}"
    if kind in ("beir", "ir") and short:
        ways = f"set DIFFRET_DATA to a folder with {name}/, a BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv)"
        ways += f"; of the hub there are {', '.join(beir.REVISIONS)}" if kind == "beir" else ""
    raise FileNotFoundError(f"no collection {text!r}: {ways}")
