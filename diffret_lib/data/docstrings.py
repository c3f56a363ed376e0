"""Docstrings: the documented objects of an importable package, their text without markup, and those of source."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpydoc.docscrape import NumpyDocString

_SKIP_PARTS = re.compile(
    r"^(_.*|tests?|testing|conftest|setup|externals?|vendor(ed)?|sphinxext|sandbox|backends|f2py|distutils|compat|"
    r"arrow)$"
)
_LIST_SECTIONS = ("Parameters", "Other Parameters", "Returns", "Yields", "Receives", "Raises", "Warns", "Attributes",
                  "Methods")  # fmt: skip
_TEXT_SECTIONS = ("Warnings", "Notes")
_DROPPED_BLOCK = re.compile(
    r"^\s*\.\. (plot|code|code-block|sourcecode|ipython|image|figure|index|only|doctest|testsetup|testcode|"
    r"toctree|autosummary|automodule|currentmodule|include|raw|minigallery|inheritance-diagram)::"
)
_DIRECTIVE = re.compile(r"^(\s*)\.\. (?:(?:versionadded|versionchanged|deprecated)::\s*\S*\s*|[\w:-]+::\s*)")
_DROPPED_LINE = re.compile(r"^\s*(:[\w-]+:(\s.*)?|([-=~^*+#])\3{2,}\s*)$")  # options of directives, rules
_COMMENT = re.compile(r"^\s*\.\. ")
#: A support table that scipy appends, references to example galleries, and sets that scipy prints in hash order.
_GENERATED = re.compile(
    r"\*\*Array API Standard Support\*\*.*?for more information\.|:ref:`sphx_glr_[^`<]*`", re.DOTALL
)
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
    """Text without reStructuredText's markup: directives' and roles' marks go, their words stay.

    Doctests, code, plots and images are dropped, and so are citation marks and comments.
    """
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


def parse(doc: str) -> NumpyDocString:
    """Parse a docstring into numpydoc's sections; ValueError when its sections contradict each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NumpyDocString(doc)


def passage_text(parsed: NumpyDocString) -> str:
    """Passage of a parsed docstring: all but name, signature, summary, See Also, examples and references."""
    parts = [plain_text("\n".join(parsed["Extended Summary"]))]
    for section in (*_LIST_SECTIONS, *_TEXT_SECTIONS):
        if section in _TEXT_SECTIONS:
            body = plain_text("\n".join(parsed[section]))
        else:
            entries = []
            for name, kind, description in parsed[section]:
                entries += [plain_text(" : ".join(filter(None, (name, kind)))), plain_text("\n".join(description))]
            body = "\n".join(filter(None, entries))
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


@dataclass
class DocumentedObject:
    """A docstring and every public name that leads to it, with how near each stands to the definition."""

    doc: str
    names: dict[str, int] = field(default_factory=dict)

    @property
    def canonical(self) -> str:
        """The name that stands closest to the definition, then the shortest."""
        return min(self.names, key=lambda n: (-self.names[n], n.count("."), len(n), n))


def documented_objects(root: str) -> list[DocumentedObject]:
    """Documented public objects of an importable package, by canonical name; silent.

    All public modules are imported (none with a private, test or vendored part in its name; one that cannot be
    imported is left out).  Members of classes are looked up along the bases that belong to the package.

    Raises
    ------
    ImportError
        When the package itself cannot be imported.
    """
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        walk = _Walk(root)
    return sorted(walk.objects.values(), key=lambda o: o.canonical)


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
    """Docstring of an object; None when there is none or it is empty."""
    obj = getattr(obj, "orig_func", obj)  # networkx wraps functions to dispatch them
    try:
        doc = obj.__doc__
    except Exception:
        return None
    return doc if isinstance(doc, str) and doc.strip() else None


def _has_type_doc(obj: Any) -> bool:
    """Whether an instance only inherits its class's docstring."""
    return not inspect.isclass(obj) and getattr(obj, "__doc__", None) == type(obj).__doc__


def _belongs(obj: Any, root: str) -> bool:
    module = getattr(obj, "__module__", None)
    if type(obj).__name__ == "ufunc" and root != "numpy":
        return getattr(np, getattr(obj, "__name__", ""), None) is not obj
    if not isinstance(module, str):
        module = getattr(type(obj), "__module__", None) or ""
    return module.split(".")[0] == root


class _Walk:
    """The documented public objects of a package, by their Python ids."""

    def __init__(self, root: str):
        self.root = root
        self.objects: dict[int, DocumentedObject] = {}
        self._alive: list[Any] = []  # ids are only unique among living objects
        self._instances: list[tuple[Any, str]] = []
        for module in _public_modules(root):
            self.module(module)
        public = set(self.objects)
        # An instance stands for its class where the class itself is not public (numpy.mgrid).
        for obj, path in self._instances:
            if id(type(obj)) not in public and _belongs(type(obj), root):
                self.add(type(obj), path, 0)

    def add(self, obj: Any, name: str, nearness: int) -> None:
        doc = _own_doc(obj)
        if doc is None:
            return
        if id(obj) not in self.objects:
            self.objects[id(obj)] = DocumentedObject(inspect.cleandoc(doc))
            self._alive.append(obj)
        names = self.objects[id(obj)].names
        names[name] = max(names.get(name, 0), nearness)

    def module(self, module: ModuleType) -> None:
        listed = getattr(module, "__all__", None)
        names = listed if listed is not None else dir(module)
        for name in sorted({n for n in names if isinstance(n, str) and not n.startswith("_")}):
            try:
                obj = getattr(module, name)
            except Exception:
                continue
            if isinstance(obj, ModuleType) or not _belongs(obj, self.root):
                continue
            path = f"{module.__name__}.{name}"
            if inspect.isclass(obj):
                self.cls(obj, path, ())
            elif _has_type_doc(obj):
                self._instances.append((obj, path))
            else:
                self.add(obj, path, int(getattr(obj, "__module__", None) == module.__name__))

    def cls(self, cls: type, path: str, outer: tuple[type, ...]) -> None:
        at_home = int(cls.__module__ == path.rpartition(".")[0])
        self.add(cls, path, at_home)
        bases = [b for b in inspect.getmro(cls) if str(b.__module__).split(".")[0] == self.root]
        for name in sorted({n for base in bases for n in vars(base) if not n.startswith("_")}):
            for base in bases:
                raw = vars(base).get(name)
                nested = raw if inspect.isclass(raw) else getattr(raw, "_accessor", None)
                if inspect.isclass(nested):
                    if nested not in (cls, *outer) and _belongs(nested, self.root) and len(outer) < 2:
                        self.cls(nested, f"{path}.{name}", (*outer, cls))
                    break
                raw = getattr(raw, "__func__", raw)
                documented = raw is not None and _own_doc(raw) is not None and not _has_type_doc(raw)
                if documented and (inspect.isroutine(raw) or hasattr(type(raw), "__get__")):
                    self.add(raw, f"{path}.{name}", 1 + at_home if base is cls else 0)
                    break
