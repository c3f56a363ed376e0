"""The direction of imports, the declared dependencies, and the size of modules."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from diffret_lib.config import CHECKOUT

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = packages_distributions()
MODULES = sorted((CHECKOUT / "diffret_lib").rglob("*.py"))


def imported(folder: str) -> set[str]:
    """Distributions that the modules of a folder import, in PyPI's spelling."""
    names: set[str] = set()
    for path in (CHECKOUT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    names -= {"diffret_lib", "conf", "build", "tests", "tiny", "benchmarks", "scripts", *sys.stdlib_module_names}
    return {spelled(DISTRIBUTIONS[name][0]) for name in names}


def spelled(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=]", name)[0]).lower()


def declared(*extras: str) -> set[str]:
    parts = [*PROJECT["dependencies"], *(part for extra in extras for part in EXTRAS[extra])]
    return {spelled(part) for part in parts}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml, checked in a process of its own (the linter turns other loggers off)."""
    code = "import sys; sys.path[0] = '.'; import importlinter.cli as cli; cli.lint_imports_command(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)


def test_imports_go_downwards_without_circles():
    done = lint(CHECKOUT)
    assert done.returncode == 0 and "2 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def test_an_upward_import_and_a_circle_are_found(tmp_path):
    ignore = shutil.ignore_patterns("adapters", "__pycache__")
    shutil.copytree(CHECKOUT / "diffret_lib", tmp_path / "diffret_lib", ignore=ignore)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    for module, target in (("cache", "data.beir"), ("retrieval/metrics", "retrieval.systems")):  # systems uses metrics
        path = tmp_path / "diffret_lib" / f"{module}.py"
        text = path.read_text(encoding="utf-8")
        path.write_text(f"{text}\n\ndef late():\n    import diffret_lib.{target}\n", encoding="utf-8")
        done = lint(tmp_path)
        assert done.returncode == 1 and "No circles within a part BROKEN" in done.stdout, done.stdout + done.stderr
        path.write_text(text, encoding="utf-8")


def test_what_is_imported_is_declared_and_the_other_way_round():
    library = imported("diffret_lib")
    assert library <= declared("ray")
    # what other libraries import for this one: transformers, pandas, and the documentation that is a collection
    assert declared() - library <= {"accelerate", "gguf", "jinja2", "tabulate", "networkx"}
    assert imported("scripts") <= declared("appendix", "notebooks")
    brought = {"huggingface-hub", "lxml", "pillow", "tokenizers"}  # by those that are declared
    assert imported("tests") <= declared(*EXTRAS) | brought
    lock = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8")
    pinned = {spelled(line) for line in lock.splitlines() if "==" in line}
    assert declared(*EXTRAS) - {"diffret"} <= pinned
    assert "://" not in lock


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(CHECKOUT).as_posix())
def test_modules_are_short_and_their_imports_can_be_followed(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        # addresses follow names; these three forms would hide some
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("diffret_lib") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and not any(alias.name == "*" for alias in node.names)
