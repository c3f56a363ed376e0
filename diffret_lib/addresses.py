"""Content addresses: what a result depends on, as one SHA-256.

An address covers the settings, the inputs, the code that computes the result and the versions of the libraries that
can change a number.  The code is the syntax trees of functions and classes, and of every name that they use in this
package: a changed line gives another address, a changed comment or docstring does not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffret_lib.environment import NUMERIC_PACKAGES, versions

#: Modules that move results about and compute none.
PLUMBING = ("cache", "addresses", "environment")
DEFINING = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Definitions = dict[str, list[ast.AST]]
Imports = dict[str, tuple[str, str | None]]
_VERSIONS = versions(NUMERIC_PACKAGES)


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of the parts as canonical JSON.

    They are str, bytes, numbers, bool, None, or lists, tuples and dicts (str keys, in any order) of them: a TypeError
    refuses anything else, a ValueError a float that is not finite.  A list is the same as the tuple of its items.
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
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"fingerprint takes dicts with str keys, not {list(value)}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"fingerprint takes str, bytes, numbers, None, lists and dicts, not a {type(value).__name__}")


def address(code: Sequence[Callable[..., Any]], *parts: Any) -> str:
    """Address of what ``code`` computes from ``parts``.

    ``code`` holds the functions and classes that compute the result and are not named by one of the others, ``parts``
    the settings and the fingerprints of the inputs, as :func:`fingerprint` takes them.
    """
    return fingerprint(code_fingerprint(tuple(code)), _VERSIONS, *parts)


class SourceTree:
    """The source of a package (its folder and its import name), as it is when this object is made."""

    def __init__(self, root: Path, package: str = "diffret_lib") -> None:
        self.package, self._sources = package, {}
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self._sources[name] = path.read_text(encoding="utf-8")
        self._plumbing = {f"{package}.{name}" for name in PLUMBING}
        self._parsed: dict[str, tuple[Definitions, Imports]] = {}

    def everything(self) -> str:
        """SHA-256 (hex) of the whole package, comments and docstrings aside."""
        return fingerprint({name: ast.dump(_tree(text)) for name, text in self._sources.items()})

    def fingerprint(self, code: Iterable[Callable[..., Any] | tuple[str, str]]) -> str:
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
                    reached[place] = [ast.dump(_tree(textwrap.dedent(inspect.getsource(item))))]
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
        while module in self._sources and module not in self._plumbing:
            definitions, imports = self._module(module)
            if name in definitions:
                return module, name
            target = imports.get(name)
            if target is None or target[1] is None:
                return None
            module, name = target
        return None

    def _module(self, module: str) -> tuple[Definitions, Imports]:
        """Top-level definitions of a module, and what it imports from this package (None: a whole module)."""
        if module in self._parsed:
            return self._parsed[module]
        tree, definitions, imports = _tree(self._sources[module]), {}, {}
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
    if isinstance(statement, DEFINING):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, DEFINING):  # under an `if` or a `try`
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            while isinstance(node, ast.Subscript | ast.Attribute):
                node = node.value
            if isinstance(node, ast.Name):
                names.add(node.id)
    return names


def _tree(text: str) -> ast.Module:
    """Syntax tree without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | DEFINING) and node.body and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


#: SHA-256 (hex) of a tuple of functions and classes, and of all that they use of this package.
code_fingerprint = lru_cache(maxsize=512)(SourceTree(Path(__file__).resolve().parent).fingerprint)
