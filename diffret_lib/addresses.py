"""Content addresses: what a result depends on, as one SHA-256.

An address covers the settings, the inputs, the code that computes the result and the versions of the libraries that
can change a number.  The code is covered by its syntax tree: :func:`code_fingerprint` starts at the functions or
classes that it is given and follows every name that they use through this package.  A changed line gives another
address; a changed comment or docstring does not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffret_lib.environment import NUMERIC_PACKAGES, versions

#: Modules that move results about and compute none.
PLUMBING = ("cache", "addresses", "environment")


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of the parts as canonical JSON.

    Parameters
    ----------
    *parts : str, bytes, int, float, bool, None, or lists, tuples and dicts (str keys) of them
        The order of a dict's keys does not matter; a list and the tuple of the same items are the same.

    Raises
    ------
    TypeError
        For anything else: the same content must give the same fingerprint in every process.
    ValueError
        For a float that is not finite.
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, bytes):
        return {"\0bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"fingerprint takes dicts with str keys; {key!r} is a {type(key).__name__}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"fingerprint takes str, bytes, numbers, None, lists and dicts, not a {type(value).__name__}")


def address(code: Sequence[Callable[..., Any]], *parts: Any) -> str:
    """Address of what ``code`` computes from ``parts``.

    Parameters
    ----------
    code : sequence of functions and classes
        Everything that computes the result and is not named by one of the others.
    *parts
        Settings and fingerprints of the inputs, as :func:`fingerprint` takes them.
    """
    return fingerprint(code_fingerprint(*code), _library_versions(), *parts)


@cache
def _library_versions() -> dict[str, str | None]:
    return versions(NUMERIC_PACKAGES)


@lru_cache(maxsize=512)
def code_fingerprint(*code: Callable[..., Any]) -> str:
    """SHA-256 (hex) over the syntax trees of functions and classes, and of everything of this package they use."""
    return _THIS_PACKAGE.fingerprint(code)


class SourceTree:
    """The source of a package, as it is when this object is made.

    Parameters
    ----------
    root : Path
        Folder of the package.
    package : str
        Its import name.
    """

    def __init__(self, root: Path, package: str = "diffret_lib") -> None:
        self.package, self._sources = package, {}
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self._sources[name] = path.read_text(encoding="utf-8")
        self._plumbing = {f"{package}.{name}" for name in PLUMBING}
        self._parsed: dict[str, tuple[dict[str, list[ast.AST]], dict[str, tuple[str, str | None]]]] = {}

    def everything(self) -> str:
        """SHA-256 (hex) of the whole package, comments and docstrings aside."""
        trees = {name: ast.dump(_without_docstrings(ast.parse(text))) for name, text in self._sources.items()}
        return fingerprint(trees)

    def fingerprint(self, code: Iterable[Callable[..., Any]] | Iterable[tuple[str, str]]) -> str:
        """SHA-256 (hex) of the code reached from objects, or from pairs of module and name."""
        reached: dict[tuple[str, str], list[str]] = {}
        waiting: list[tuple[str, str]] = []
        for item in code:
            if isinstance(item, tuple):
                waiting.append(item)
                continue
            for part in inspect.getmro(item) if inspect.isclass(item) else (item,):
                place = part.__module__, part.__qualname__.partition(".")[0]
                if part is item and place[0] not in self._sources:  # of a notebook or a test
                    tree = ast.parse(textwrap.dedent(inspect.getsource(item)))
                    reached[place] = [ast.dump(_without_docstrings(tree))]
                elif place[0] in self._sources:
                    waiting.append(place)
        while waiting:
            place = self._resolve(*waiting.pop())
            if place is None or place in reached:
                continue
            module, name = place
            definitions, imports = self._module(module)
            reached[place] = [ast.dump(node) for node in definitions[name]]
            for node in (node for definition in definitions[name] for node in ast.walk(definition)):
                if isinstance(node, ast.Name):
                    waiting.append((module, node.id))
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    target = imports.get(node.value.id)
                    if target is not None and target[1] is None:
                        waiting.append((target[0], node.attr))
        return fingerprint([[*place, *dumped] for place, dumped in sorted(reached.items())])

    def _resolve(self, module: str, name: str) -> tuple[str, str] | None:
        """Where a name that a module uses is defined in this package; None when it is not, or in plumbing."""
        seen = set()
        while module in self._sources and module not in self._plumbing and (module, name) not in seen:
            seen.add((module, name))
            definitions, imports = self._module(module)
            if name in definitions:
                return module, name
            target = imports.get(name)
            if target is None or target[1] is None:
                return None
            module, name = target
        return None

    def _module(self, module: str) -> tuple[dict[str, list[ast.AST]], dict[str, tuple[str, str | None]]]:
        """Top-level definitions of a module, and what it imports from this package (None: a whole module)."""
        if module in self._parsed:
            return self._parsed[module]
        tree = _without_docstrings(ast.parse(self._sources[module]))
        definitions: dict[str, list[ast.AST]] = {}
        imports: dict[str, tuple[str, str | None]] = {}
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                for name in _bound(node):
                    definitions.setdefault(name, []).append(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == self.package:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    target = (whole, None) if whole in self._sources else (node.module, alias.name)
                    imports[alias.asname or alias.name] = target
        self._parsed[module] = definitions, imports
        return self._parsed[module]


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement defines, or puts something into."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):  # under an `if` or a `try`
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            while isinstance(node, ast.Subscript | ast.Attribute):
                node = node.value
            if isinstance(node, ast.Name):
                names.add(node.id)
    return names


def _without_docstrings(tree: ast.AST) -> Any:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            text = first.value if isinstance(first, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


_THIS_PACKAGE = SourceTree(Path(__file__).resolve().parent)
