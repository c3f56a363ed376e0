"""Check what a run of the notebooks needs, find what has changed, and go on: ``start_run.py make run``.

The profile is named by the environment variable PROFILE, further collections by COLLECTION.  For every notebook
``build/PROFILE/NAME.inputs`` gets a SHA-256 over all that its result depends on: its cells, the library's code (without
comments and docstrings) and data, the versions of the packages, whether there is a GPU, the profile, and the files of
the collections, adapters, backbones and rows to train on that it names.  Its time is what make looks at: that of 1970
when ``NAME.done`` has the same SHA-256 and all files that it names are there, else now.  Where a notebook is out of
date the profile is checked as a whole first.
The command gets LEFT_OUT, the notebooks that the profile has no work for.

One run at a time: a second one in the same checkout with the same profile says that it waits.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from diffret_lib.addresses import SourceTree, fingerprint
from diffret_lib.cache import StorageError, cache_dir, explained, file_sha256, sweep, write_text
from diffret_lib.config import (
    CHECKOUT,
    Profile,
    ProfileError,
    collection_folder,
    load_profile,
    read_yaml,
    rows_file,
    split_collections,
)
from diffret_lib.data.protocols import published
from diffret_lib.environment import hardware, versions

#: Notebooks that are left out where the profile adapts no backbone, and where it fine-tunes nothing.
ADAPTATION, TRAINING = "00_diffusion_backbone", "03_training"
BOM = b"\xef\xbb\xbf"


def collection_files(name: str) -> list[Path]:
    """Files of a collection that is read from a folder; none for one of docstrings or of the hub."""
    folder, _ = collection_folder(name) or (None, "")
    found = folder.rglob("*") if folder else ()
    return sorted(p for p in found if p.name.removesuffix(".gz").endswith((".jsonl", ".tsv")) and p.is_file())


def library() -> str:
    """SHA-256 over the library: its code, and the data files beside it."""
    root = CHECKOUT / "diffret_lib"
    data = [p for p in sorted(root.rglob("*")) if p.suffix in (".yaml", ".json", ".txt", ".safetensors")]
    return fingerprint(SourceTree(root).everything(), {str(p.relative_to(root)): file_sha256(p) for p in data})


def prepare(name: str, depends_on: str, build: Path, results: Path) -> bool:
    """Write ``NAME.inputs``, and return whether ``NAME.done`` is the outcome of these inputs, and whole."""
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
        os.utime(inputs, (0, 0))  # older than any NAME.done
    return fresh


def large_files(profile: Profile) -> Iterator[Path]:
    """Rows to train on, and the files of backbones that are folders: too large to be read at every start."""
    if profile.training.rows and (rows := rows_file(profile.training.rows)):
        yield rows
    registry = read_yaml(CHECKOUT / "diffret_lib" / "models" / "backbones.yaml")
    waiting = [name for _, name in profile.backbones if name]
    while waiting:
        source = registry.get(waiting.pop(), {}).get("source", {})
        waiting += [source["parent"]] if "parent" in source else []
        if "path" in source:
            yield from (file for file in Path(source["path"]).expanduser().glob("*") if file.is_file())


def main(command: list[str]) -> None:
    """Replace this process by the command, which then holds the lock."""
    collection = os.environ.get("COLLECTION", "").strip()
    os.chdir(CHECKOUT / "notebooks")  # so that a relative path is here what it is in the notebooks
    profile = load_profile(os.environ["PROFILE"], collection)
    for name in split_collections(collection) if collection else ():
        if collection_folder(name) is None and not name.startswith("pydocs/") and published(name) is None:
            raise ProfileError(f"COLLECTION: there is no folder {name!r}, and no published collection of this name")
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
    sizes = [profile.training.development, *profile.training.collections]
    sizes += [profile.adaptation.zero_shot] if profile.adaptation else []
    names = {profile.train_collection, *profile.test_collections, *(size.collection for size in sizes)}
    paths = [path for name in names for path in collection_files(name)]
    if profile.training.adapters:
        paths += (path for path in (CHECKOUT / profile.training.adapters).glob("*/*") if path.is_file())
    files = {str(path): file_sha256(path) for path in paths}
    files |= {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in large_files(profile)}
    gpu = bool(hardware()["gpu"])
    depends_on = fingerprint(library(), versions(), profile.model_dump(mode="json"), collection, files, gpu)
    left_out = [ADAPTATION] if profile.adaptation is None else []
    left_out += [TRAINING] if profile.fine_tuned == [] else []
    os.environ["LEFT_OUT"] = " ".join(left_out)
    names = [path.stem for path in (CHECKOUT / "notebooks").glob("[0-9][0-9]_*.ipynb")]
    if not all([prepare(name, depends_on, build, results) for name in names if name not in left_out]):
        from scripts.plan import check  # here, since it takes seconds to load

        check(profile)
    os.chdir(CHECKOUT)
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ProfileError, StorageError) as error:
        sys.exit(f"error: {error}")
