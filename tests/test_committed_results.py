"""What is committed speaks of the project alone: no warning, and no path of the machine on which it was made."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from diffret_lib.config import CHECKOUT

FOLDERS = ("results", "diffret_lib/models/adapters")
BINARY = {".png", ".safetensors"}
#: The beginning of an absolute path of Linux, macOS or Windows, where no address (https://...) or word goes before it.
PATH = re.compile(r"(?<![\w.:/*<-])(/(?:root|home|work|tmp|usr|opt|mnt|var|private|Users|content)/|[A-Z]:\\\\?\w)")
WARNING = re.compile(r"\w*Warning\b|warnings\.warn|\bWARNING\b|site-packages|Traceback \(most|^\W*\[transformers\]")


def committed() -> list[Path]:
    """Files of the results and adapters that git tracks, or, outside a clone, all that are there."""
    asked = subprocess.run(["git", "ls-files", "-z", *FOLDERS], cwd=CHECKOUT, capture_output=True, text=True)
    if asked.returncode == 0:
        return [CHECKOUT / name for name in asked.stdout.split("\0") if name and (CHECKOUT / name).is_file()]
    return [path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*") if path.is_file()]


def faults(path: Path) -> list[str]:
    """Lines of a text file, or of a notebook's outputs and metadata, that name a machine or warn."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join(json.dumps([c.get("outputs"), c["metadata"]], indent=0, ensure_ascii=False) for c in cells)
        text = re.sub(r'"image/\w+": "[^"]*"', "", text)
    return [line.strip()[:200] for line in text.splitlines() if PATH.search(line) or WARNING.search(line)]


def test_no_warning_and_no_path_of_a_machine():
    paths = committed()
    found = {path.relative_to(CHECKOUT).as_posix(): faults(path) for path in paths if path.suffix not in BINARY}
    assert len(found) > 20 and {name: lines for name, lines in found.items() if lines} == {}
    adapters = [path.read_bytes() for path in paths if path.suffix == ".safetensors"]
    assert adapters and not any(re.search(rb"/(root|home|Users)/\w", content) for content in adapters)


def test_what_the_test_looks_for_is_found(tmp_path):
    notebook, text = tmp_path / "n.ipynb", tmp_path / "t.md"
    said = "/home/a/.venv/lib/python3.11/site-packages/x.py:3: FutureWarning: old\n"
    for output in ({"name": "stderr", "text": [said]}, {"data": {"text/plain": ["PosixPath('/tmp/x')"]}}):
        notebook.write_text(json.dumps({"cells": [{"source": "", "metadata": {}, "outputs": [output]}]}))
        assert len(faults(notebook)) == 1
    for line in ("from /root/x", '{"base": "/Users/me/model"}', "C:\\Users\\me", "a UserWarning: b"):
        text.write_text(f"# Title\n{line}\n")
        assert faults(text) == [line]
    fine = "see https://host/home/page, `notebooks/x/usr/y`, a/tmp/b, <a href=\"/\">, 1/2, a forewarning"
    text.write_text(fine)
    assert faults(text) == []
