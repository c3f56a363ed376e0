"""Collections: docstrings of installed packages, published ones, and folders in BEIR's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffret_lib.config import PYDOCS, collection_folder, data_folders
from diffret_lib.data.protocols import published, read_published

if TYPE_CHECKING:
    from diffret_lib.data.collection import Collection


def load_collection(name_or_path: str | Path) -> Collection:
    """Load one of :data:`diffret_lib.config.PYDOCS`, a BEIR folder by its path, or a published collection by its name.

    The published ones are those of ``collections.yaml`` (:mod:`diffret_lib.data.protocols`): ``msmarco/dev``,
    ``beir/NAME``, ``nano/NAME``.  They, and ``ir/NAME``, are looked for in the folder ``DIFFRET_DATA``
    (:func:`~diffret_lib.config.collection_folder`), then on the hub.  A path and a name may end in ``":split"`` for a
    split other than ``test``.

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

    folders = data_folders(text.partition(":")[0])
    if found := collection_folder(text):
        return beir.load_beir(*found, name=text if folders else None)
    if published(text):
        return beir.load_published(text)
    ways = f"neither a BEIR folder nor one of {', '.join(PYDOCS)}"
    if folders:
        ways = f"set DIFFRET_DATA to a folder with {folders[-1]}/, a BEIR folder (corpus.jsonl, queries.jsonl, "
        ways += f"qrels/test.tsv); of the hub there are {', '.join(read_published())}"
    raise FileNotFoundError(f"no collection {text!r}: {ways}")
