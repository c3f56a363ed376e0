"""Docstrings: the documented objects of an importable package, their text without markup, and those of source."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpydoc.docscrape import NumpyDocString

_SKIP_PARTS = re.compile(
    r"(_.*|tests?|testing|conftest|setup|externals?|vendor(ed)?|sphinxext|sandbox|backends|f2py|distutils|compat|"
    r"arrow)$"
)
_LISTS = ("Parameters", "Other Parameters", "Returns", "Yields", "Receives", "Raises", "Warns", "Attributes", "Methods")
_DROPPED_BLOCK = re.compile(
    r"^\s*\.\. (plot|code|code-block|sourcecode|ipython|image|figure|index|only|doctest|testsetup|testcode|"
    r"toctree|autosummary|automodule|currentmodule|include|raw|minigallery|inheritance-diagram)::"
)
_DIRECTIVE = re.compile(r"^(\s*)\.\. (?:(?:versionadded|versionchanged|deprecated)::\s*\S*\s*|[\w:-]+::\s*)")
_DROPPED_LINE = re.compile(r"^\s*(:[\w-]+:(\s.*)?|([-=~^*+#])\3{2,}\s*)$")  # options of directives, rules
_COMMENT = re.compile(r"^\s*\.\. ")
#: A support table that scipy appends, references to example galleries, and sets that scipy prints in hash order.
_GENERATED = re.compile(r"(?s)\*\*Array API Standard Support\*\*.*?for more information\.|:ref:`sphx_glr_[^`<]*`")
_PRINTED_SET = re.compile(r"(Use of argument\(s\) `*)\{([^}]*)\}")


def _role_text(match: re.Match[str]) -> str:
    target = match[2].strip().lstrip("!.").lstrip("~").lstrip(".")
    shorten = match[1] or match[2].lstrip("!.").startswith("~")
    return target.rsplit(".", 1)[-1] if shorten and re.fullmatch(r"[\w.]+", target) else target


#: Marks inside a text and what is left of them, in the order in which they are replaced.
_INLINE: tuple[tuple[str, Any], ...] = (
    (r"\s*\[[\w.#*-]+\]_", ""),  # citations
    (r":[\w:+-]+:`([^`<]+?)\s*<[^`>]*>`", r"\1"),  # roles with a title
    (r"(?::[\w:+-]+:|(?<!`)(?=`~))`(~?)([^`]+)`", _role_text),
    (r"`([^`<]+?)\s*<[^`>]+>`__?", r"\1"),  # links
    (r"`{1,2}([^`]+)`{1,2}", r"\1"),
    (r"(?<![\w*])(\*{1,2})(?![\s*])([^*\n]*[^*\s])\1(?![\w*])", r"\2"),  # emphasis
    (r"\\([ \n*_])", r"\1"),
    (r"::\n", ":\n"),
)


def plain_text(text: str) -> str:
    """Text without reStructuredText's markup, doctests, code, plots, images, citation marks and comments."""
    text = _GENERATED.sub("", text)
    text = _PRINTED_SET.sub(lambda m: m[1] + ", ".join(sorted(re.split(r",\s*", m[2]))), text)
    kept: list[str] = []
    block: int | None = None  # indentation of the dropped block that the lines stand in
    in_doctest = False
    for line in text.expandtabs().splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if block is not None and (not stripped or indent > block):
            continue
        block = None
        in_doctest = bool(stripped) and (in_doctest or stripped.startswith(">>>"))
        if in_doctest or _DROPPED_LINE.match(line):
            continue
        if _DROPPED_BLOCK.match(line):
            block = indent
            continue
        line = _DIRECTIVE.sub(r"\1", line)
        if not _COMMENT.match(line):
            kept.append(line.rstrip())
    text = "\n".join(kept)
    for pattern, replacement in _INLINE:
        text = re.sub(pattern, replacement, text)
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    return re.sub(r"\n{2,}", "\n", text).strip()


def passage_text(parsed: NumpyDocString) -> str:
    """Passage of a parsed docstring: all but name, signature, summary, See Also, examples and references."""
    parts = [plain_text("\n".join(parsed["Extended Summary"]))]
    for section in (*_LISTS, "Warnings", "Notes"):
        entries = [] if section in _LISTS else ["\n".join(parsed[section])]
        for name, kind, description in parsed[section] if section in _LISTS else ():
            entries += [" : ".join(filter(None, (name, kind))), "\n".join(description)]
        body = "\n".join(filter(None, map(plain_text, entries)))
        if body:
            parts.append(f"{section}\n{body}")
    return "\n\n".join(filter(None, parts))


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of the module, classes and functions of Python source; nothing is imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | documented) and (doc := ast.get_docstring(node)):
            yield name, doc
        for child in ast.iter_child_nodes(node):
            if isinstance(child, documented):
                stack.append((f"{name}.{child.name}".lstrip("."), child))


def documented_objects(root: str) -> list[tuple[list[str], str]]:
    """Names (canonical one first) and docstring of each documented public object of a package, by canonical name.

    All public modules are imported (none with a private, test or vendored part in its name; one that cannot be
    imported is left out).  Members of classes are looked up along the bases that belong to the package.  The canonical
    name stands closest to the definition, then is the shortest.
    """
    found = []
    for obj, near in _Walk(root).found.values():
        canonical, *others = sorted(near, key=lambda n: (-near[n], n.count("."), len(n), n))
        found.append(([canonical, *sorted(others)], inspect.cleandoc(_own_doc(obj) or "")))
    return sorted(found, key=lambda names_and_doc: names_and_doc[0][0])


def _public_modules(root: str) -> list[ModuleType]:
    modules, waiting = {root: importlib.import_module(root)}, [root]
    while waiting:
        parent = waiting.pop()
        for info in pkgutil.iter_modules(getattr(modules[parent], "__path__", ())):
            name = f"{parent}.{info.name}"
            if not _SKIP_PARTS.match(info.name):
                # an optional dependency may be missing, or the module be no library
                with contextlib.suppress(Exception, SystemExit):
                    modules[name] = importlib.import_module(name)
                    waiting.append(name)
    return [modules[name] for name in sorted(modules)]


def _own_doc(obj: Any) -> str | None:
    """Docstring of an object; None when it has none, or an instance only its class's."""
    obj = getattr(obj, "orig_func", obj)  # networkx wraps functions to dispatch them
    doc = getattr(obj, "__doc__", None)
    inherited = not inspect.isclass(obj) and doc == type(obj).__doc__
    return doc if isinstance(doc, str) and doc.strip() and not inherited else None


def _belongs(obj: Any, root: str) -> bool:
    if type(obj).__name__ == "ufunc" and root != "numpy":
        return getattr(np, getattr(obj, "__name__", ""), None) is not obj
    module = getattr(obj, "__module__", None)
    module = module if isinstance(module, str) else getattr(type(obj), "__module__", None) or ""
    return module.split(".")[0] == root


class _Walk:
    """The documented public objects of a package by ``id``, each with its names and how near they are to its home."""

    def __init__(self, root: str):
        self.root = root
        self.found: dict[int, tuple[Any, dict[str, int]]] = {}
        self.instances: list[tuple[type, str]] = []  # their class and path
        for module in _public_modules(root):
            self.module(module)
        public = set(self.found)
        # An instance stands for its class where the class itself is not public (numpy.mgrid).
        for cls, path in self.instances:
            if id(cls) not in public and _belongs(cls, root):
                self.add(cls, path, 0)

    def add(self, obj: Any, name: str, nearness: int) -> None:
        if _own_doc(obj) is not None:
            _, names = self.found.setdefault(id(obj), (obj, {}))
            names[name] = max(names.get(name, 0), nearness)

    def module(self, module: ModuleType) -> None:
        for name in sorted({n for n in getattr(module, "__all__", dir(module)) if not n.startswith("_")}):
            obj, path = getattr(module, name, None), f"{module.__name__}.{name}"
            if isinstance(obj, ModuleType) or not _belongs(obj, self.root):
                continue
            if inspect.isclass(obj):
                self.cls(obj, path, ())
            elif getattr(obj, "__doc__", None) == type(obj).__doc__:
                self.instances.append((type(obj), path))
            else:
                self.add(obj, path, int(getattr(obj, "__module__", None) == module.__name__))

    def cls(self, cls: type, path: str, outer: tuple[type, ...]) -> None:
        at_home = int(cls.__module__ == path.rpartition(".")[0])
        self.add(cls, path, at_home)
        bases = [b for b in inspect.getmro(cls) if b.__module__.split(".")[0] == self.root]
        for name in sorted({n for base in bases for n in vars(base) if not n.startswith("_")}):
            for base in bases:
                raw = vars(base).get(name)
                nested = raw if inspect.isclass(raw) else getattr(raw, "_accessor", None)
                if inspect.isclass(nested):
                    if nested not in (cls, *outer) and _belongs(nested, self.root) and len(outer) < 2:
                        self.cls(nested, f"{path}.{name}", (*outer, cls))
                    break
                raw = getattr(raw, "__func__", raw)
                if _own_doc(raw) is not None and (inspect.isroutine(raw) or hasattr(type(raw), "__get__")):
                    self.add(raw, f"{path}.{name}", 1 + at_home if base is cls else 0)
                    break
