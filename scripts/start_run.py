"""Check what a run of the notebooks needs, find what has changed, and go on: ``start_run.py make run``.

The profile is named by the environment variable PROFILE, a further collection by COLLECTION.  For every notebook
``build/PROFILE/NAME.inputs`` gets a SHA-256 over all that its result depends on: its cells, the library's code (without
comments and docstrings) and data, the versions of the packages, the profile, and the files of the collection.  Its time
is what make looks at: that of 1970 when ``NAME.done`` has the same SHA-256 and all files that it names are there, else
now.

One run at a time: a second one in the same checkout with the same profile says that it waits.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

from diffret_lib.addresses import SourceTree, fingerprint
from diffret_lib.cache import StorageError, cache_dir, explained, file_sha256, sweep, write_text
from diffret_lib.config import CHECKOUT, PYDOCS, ProfileError, load_profile
from diffret_lib.environment import versions

BOM = b"\xef\xbb\xbf"


def collection_files(name: str) -> list[Path]:
    """Files of a BEIR folder, given as ``path`` or ``path:split``; none for no name and for docstrings.

    Raises
    ------
    ProfileError
        If there is no such folder.
    """
    if not name or name in PYDOCS:
        return []
    for path in (name, name.rpartition(":")[0] or name):
        for base in (CHECKOUT / "notebooks", CHECKOUT):
            if (folder := base / Path(path).expanduser()).is_dir():
                return sorted(p for p in folder.rglob("*") if p.suffix in (".jsonl", ".tsv") and p.is_file())
    raise ProfileError(f"COLLECTION: there is no folder {name!r}, and no docstring collection of that name")


def library() -> str:
    """SHA-256 over the library: its code, and the data files beside it."""
    root = CHECKOUT / "diffret_lib"
    data = [p for p in sorted(root.rglob("*")) if p.suffix in (".yaml", ".json", ".safetensors")]
    return fingerprint(SourceTree(root).everything(), {str(p.relative_to(root)): file_sha256(p) for p in data})


def prepare(name: str, depends_on: str, build: Path, results: Path) -> None:
    """Write ``NAME.inputs``: older than any ``NAME.done`` when that is the outcome of these inputs, and whole."""
    content = (CHECKOUT / "notebooks" / f"{name}.ipynb").read_bytes()
    plain = build / f"{name}.plain.ipynb"
    if content.startswith(BOM):
        plain.write_bytes(content.removeprefix(BOM))
    else:
        plain.unlink(missing_ok=True)
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
        cells = [[cell["cell_type"], "".join(cell["source"])] for cell in notebook["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"notebooks/{name}.ipynb: not a readable notebook: {error}") from error
    inputs, key = build / f"{name}.inputs", fingerprint(depends_on, cells)
    try:
        done = json.loads((build / f"{name}.done").read_text(encoding="utf-8"))
        fresh = done["inputs"] == key and all((results / file).exists() for file in done["made"])
    except (OSError, ValueError, KeyError, TypeError):
        fresh = False
    write_text(inputs, key)
    if fresh:
        os.utime(inputs, (0, 0))


def main(command: list[str]) -> None:
    """Replace this process by the command, which then holds the lock."""
    collection = os.environ.get("COLLECTION", "")
    profile = load_profile(os.environ["PROFILE"], collection)
    build, results = CHECKOUT / "build" / profile.name, CHECKOUT / "results" / profile.name
    for folder in (build, results, cache_dir()):
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(build / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run of the profile {profile.name} goes on in this checkout: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    for folder in (build, results):
        sweep(folder)
    files = {str(path): file_sha256(path) for path in collection_files(collection)}
    depends_on = fingerprint(library(), versions(), profile.model_dump(mode="json"), collection, files)
    for path in (CHECKOUT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        prepare(path.stem, depends_on, build, results)
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ProfileError, StorageError) as error:
        sys.exit(f"error: {error}")
