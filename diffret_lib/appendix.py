"""The executed notebooks as pages that open from disk: ``python -m diffret_lib.appendix --profile embedded``.

``results/<profile>/appendix/`` gets ``index.html`` (what the study is, its notebooks and their questions, the
ledger of claims, the run's hardware, versions, seeds and seconds) and a page for every executed notebook.  Style,
script and figures are inside each page, formulas are MathML, and a content security policy keeps a browser from
loading anything else.  The same results give the same bytes, and the folder is replaced as a whole.

What is read: ``notebooks/*.ipynb``, ``run.json`` and ``claims.json`` of the profile's results (the last two if they
are there), and the first paragraph of the README.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import nbformat
from bs4 import BeautifulSoup, Tag
from jinja2 import Environment, FileSystemLoader, pass_context
from latex2mathml import converter
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from diffret_lib.cache import atomic_path
from diffret_lib.reporting import default_root

__all__ = ["AppendixError", "build_appendix", "main", "mathml"]

#: Every colour of this Pygments style has a contrast of at least 4.5 with the ground that code stands on.
CODE_STYLE = "xcode"

_HERE = Path(__file__).resolve().parent
_TEMPLATES = _HERE / "appendix_template"
_README = _HERE.parent / "README.md"

#: Characters of a table cell below which its column keeps to one line, and from which on it is given room.
_SHORT, _LONG = 24, 40
_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?\s?%?|nan|inf|None", re.IGNORECASE)
_ELSEWHERE = re.compile(r"url\(\s*[\"']?(?!data:|#)|@import", re.IGNORECASE)
_TOO_MUCH = ("iframe", "object", "embed", "video", "audio")

#: Spellings that latex2mathml does not know, or sets without the space after a function.
_SPELLINGS = (
    (r"\\arg(?![A-Za-z])", r"\\operatorname{arg}"),
    (r"\\setminus(?![A-Za-z])", r"\\smallsetminus"),
    (r"\\(exp|log|operatorname\{\w+\})(?=\s*[A-Za-z\\])(?!\s*\\(left|[bB]igg?|,))", r"\\\1\\,"),
)
#: In a displayed formula it sets the range beside the operator instead of below it.
_DISPLAYED = ((r"\\(max|min|sup|inf)(?=\s*_)", r"\\\1\\limits"),)


class AppendixError(ValueError):
    """Results of which no pages can be made; the message says what is missing or wrong, where, and what to do."""


@dataclass(frozen=True)
class Heading:
    """A heading of a page: its level (2 or 3), id and text (HTML)."""

    level: int
    id: str
    text: Markup


@dataclass(frozen=True)
class Page:
    """A notebook as a page: file name, title (plain text), question (HTML, may be empty), headings and body (HTML)."""

    file: str
    title: str
    question: Markup
    headings: list[Heading]
    body: Markup


def build_appendix(
    profile: str = "embedded",
    *,
    results_root: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the pages of a profile's results.

    Parameters
    ----------
    profile : str
        Name of a folder of results.
    results_root : path, optional
        Folder of all results; :func:`diffret_lib.reporting.default_root` if it is not given.
    output : path, optional
        Folder of the pages, ``<results>/<profile>/appendix`` if it is not given.  It is replaced as a whole; one
        that holds anything but pages is refused.

    Returns
    -------
    Path
        ``index.html``.

    Raises
    ------
    AppendixError
        If there is no executed notebook, one has no outputs or ends with an error, a formula cannot be converted,
        an output would load something over the network, or a JSON file cannot be read.
    """
    folder = (Path(results_root) if results_root else default_root()) / profile
    target = Path(output) if output else folder / "appendix"
    if target.exists() and not (target.is_dir() and all(p.suffix == ".html" for p in target.iterdir())):
        raise AppendixError(f"{target} holds other things than pages; name another folder with --output, or remove it")
    paths = _executed(folder, profile)
    pages = [_page(path, {p.stem for p in paths}, profile) for path in paths]
    index = _index(folder, pages)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        _write(temporary / "index.html", _render("index.html.j2", **index))
        for number, page in enumerate(pages):
            before, after = pages[number - 1] if number else None, pages[number + 1 :][:1]
            text = _render(
                "notebook.html.j2", site=index["site"], page=page, previous=before, next=after[0] if after else None
            )
            _write(temporary / page.file, text)
    return target / "index.html"


def mathml(latex: str, display: bool = False) -> str:
    """A formula as a ``<math>`` element.

    Parameters
    ----------
    latex : str
        Without its dollar signs.
    display : bool
        Whether it stands on a line of its own.

    Raises
    ------
    AppendixError
        If ``latex2mathml`` cannot convert it, or leaves a command as it is.
    """
    spelled = latex
    for pattern, replacement in (*_SPELLINGS, *(_DISPLAYED if display else ())):
        spelled = re.sub(pattern, replacement, spelled)
    try:
        element = converter.convert(spelled, display="block" if display else "inline")
        left = [e.text for e in ElementTree.fromstring(element).iter() if (e.text or "").startswith("\\")]
    except Exception as error:  # the library raises many kinds; text that is no XML is one more
        reason = str(error) or type(error).__name__
        raise AppendixError(f"the formula {latex.strip()!r} cannot be converted to MathML: {reason}") from error
    if left:
        raise AppendixError(f"the formula {latex.strip()!r} has {left[0]}, which latex2mathml does not know")
    return element


class _Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML."""

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def block_math(self, body: str) -> str:
        return f'<span class="math">{mathml(body, display=True)}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


def _markdown(source: str, **options: Any) -> str:
    # without nbconvert's links at headings: ids are given for the whole page, see _headings
    return MarkdownWithMath(renderer=_Renderer(escape=False, exclude_anchor_links=True, **options)).render(source)


class _Exporter(HTMLExporter):
    """The cells alone, by ``cells.html.j2``."""

    def __init__(self, folder: Path) -> None:
        kinds = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]
        super().__init__(
            config=Config({"NbConvertBase": {"display_data_priority": kinds}}),
            template_name="basic",
            raw_template=(_TEMPLATES / "cells.html.j2").read_text(encoding="utf-8"),
        )
        self.folder = folder

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        return _markdown(source, attachments=attachments, embed_images=True, path=str(self.folder))


def _executed(folder: Path, profile: str) -> list[Path]:
    """Executed notebooks, those that failed or still run left out."""
    notebooks = folder / "notebooks"
    paths = sorted(p for p in notebooks.glob("*.ipynb") if not p.stem.endswith((".failed", ".running")))
    if not paths:
        raise AppendixError(f"{notebooks} holds no executed notebook; make them with: make reproduce PROFILE={profile}")
    return paths


def _page(path: Path, stems: set[str], profile: str) -> Page:
    again = f"run it again: python -m diffret_lib.reproduce {path.stem} --profile {profile}"
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        raise AppendixError(f"{path}: not a readable notebook ({error}); {again}") from error
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if not outputs:
        raise AppendixError(f"{path} has no outputs: it was not executed; {again}")
    if any(output.output_type == "error" for output in outputs):
        raise AppendixError(f"{path} ends with an error; {again}")
    logging.getLogger("traitlets").setLevel(logging.ERROR)  # asks for texts that describe the images, see _describe
    try:
        html, _ = _Exporter(path.parent).from_notebook_node(notebook)
        soup = BeautifulSoup(html, "html.parser")
        headings = _headings(soup)
        _describe(soup)
        _tables(soup)
        _links(soup, stems)
        _only_what_is_inside(soup)
    except AppendixError as error:
        raise AppendixError(f"{path}: {error}") from error
    title = " ".join(soup.h1.get_text().split()) if soup.h1 else path.stem
    return Page(f"{path.stem}.html", title, _question(soup), headings, Markup(soup))


def _question(soup: BeautifulSoup) -> Markup:
    """What follows "**Question.**" in its paragraph."""
    for strong in soup.select("p > strong:first-child"):
        if strong.get_text().strip() == "Question.":
            return Markup("".join(str(part) for part in strong.next_siblings).strip())
    return Markup("")


def _headings(soup: BeautifulSoup) -> list[Heading]:
    """Give every heading the id that Jupyter links to, made unique; those of levels 2 and 3 are returned."""
    used = {"content", *(tag["id"] for tag in soup.select("[id]"))}
    found = []
    for tag in soup.find_all(re.compile("^h[1-6]$")):
        name = "-".join(tag.get_text().split()) or "section"
        unique, number = name, 1
        while unique in used:
            number += 1
            unique = f"{name}-{number}"
        tag["id"] = unique
        used.add(unique)
        if tag.name in ("h2", "h3"):
            found.append(Heading(int(tag.name[1]), unique, Markup(_without_links(tag))))
    return found


def _without_links(heading: Tag) -> str:
    copy = BeautifulSoup(heading.decode_contents(), "html.parser")
    for link in copy.find_all("a"):
        link.unwrap()
    return str(copy)


def _describe(soup: BeautifulSoup) -> None:
    """Name the section in the text of a figure that has no other."""
    for image in soup.select("figure > img"):
        if image.get("alt", "").startswith("No description"):  # nbconvert's
            heading = image.find_previous(re.compile("^h[1-6]$"))
            image["alt"] = f"Figure: {' '.join(heading.get_text().split())}" if heading else "Figure"


def _tables(soup: BeautifulSoup) -> None:
    """Let wide tables scroll by themselves, align numbers to the right, and give long texts room."""
    for style in soup.select("style[scoped]"):  # pandas' own look of a frame
        style.decompose()
    for table in soup.find_all("table"):
        del table["border"]
        caption = table.caption
        if caption is not None:
            caption_text = caption.get_text(" ", strip=True)
            inner = soup.new_tag("span")
            inner.extend(list(caption.contents))
            caption.append(inner)
        name = f"Table: {caption_text}" if caption is not None else "Table"
        table.wrap(soup.new_tag("div", attrs={"class": "table", "role": "region", "tabindex": "0", "aria-label": name}))
        rows = [row.find_all(["td", "th"], recursive=False) for row in table.find_all("tr")]
        body = [row for row in rows if row and any(cell.name == "td" for cell in row)]
        for column in zip(*body) if len({len(row) for row in body}) == 1 else ():
            texts = [text for cell in column if (text := cell.get_text(" ", strip=True))]
            longest = max(map(len, texts), default=0)
            kind = "long" if longest >= _LONG else "short" if longest < _SHORT else ""
            if texts and all(map(_NUMBER.fullmatch, texts)):
                kind = "number"
            position = body[0].index(column[0])
            heads = [row[position] for row in rows if row not in body and len(row) == len(body[0])]
            for cell in (*column, *heads) if kind else ():
                cell["class"] = [*cell.get("class", []), kind]


def _links(soup: BeautifulSoup, stems: set[str]) -> None:
    """Links between notebooks lead to their pages; to other files of the project, which are not here, no link leads."""
    for link in soup.find_all("a"):
        parts = urlsplit(link.get("href", ""))
        if parts.scheme in ("http", "https", "mailto") or (not parts.path and parts.fragment and not parts.netloc):
            continue
        path = PurePosixPath(parts.path)
        if path.suffix in (".ipynb", ".html") and path.stem in stems and not parts.scheme:
            link["href"] = f"{path.stem}.html" + (f"#{parts.fragment}" if parts.fragment else "")
        else:
            link.unwrap()


def _only_what_is_inside(soup: BeautifulSoup) -> None:
    """Take out scripts; refuse what a browser would load from elsewhere."""
    for tag in soup.find_all(["script", "link", "meta", "base"]):
        tag.decompose()
    for tag in soup.find_all(True):
        if tag.name in _TOO_MUCH:
            raise AppendixError(f"an output has an <{tag.name}>, which a page without a network cannot show")
        for attribute in ("src", "srcset", "background"):
            if not tag.get(attribute, "data:").startswith("data:"):
                raise AppendixError(
                    f"<{tag.name} {attribute}={tag[attribute]!r}> would be loaded from elsewhere; put the image "
                    "into the notebook (an attachment, or an output)"
                )
        style = tag.get_text() if tag.name == "style" else tag.get("style", "")
        if _ELSEWHERE.search(style):
            raise AppendixError(f"the style {style.strip()[:80]!r} would load something from elsewhere; take that out")


def _index(folder: Path, pages: list[Page]) -> dict[str, Any]:
    """What the index page shows."""
    run = _json(folder / "run.json")
    claims = _json(folder / "claims.json")
    project, study = _readme()
    return {
        "site": f"{project}: executed notebooks",
        "study": study,
        "profile": run.get("profile", {}).get("content"),
        "pages": pages,
        "claims": _claims(claims) if claims else "",
        "claims_page": next((page for page in pages if page.file == "07_claims.html"), None),
        "run": _run(run, pages) if run else [],
    }


def _readme() -> tuple[str, Markup]:
    """The project's name and the README's first paragraph; where there is no README, the name alone."""
    text = _README.read_text(encoding="utf-8") if _README.is_file() else ""
    found = re.match(r"# (?P<name>.+)\n+(?P<paragraph>(?:.+\n)+)", text)
    if not found:
        return "diffret", Markup("")
    soup = BeautifulSoup(_markdown(found["paragraph"]), "html.parser")
    _links(soup, set())
    return found["name"].strip(), Markup(soup)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AppendixError(f"{path}: not valid JSON ({error}); the notebooks write it again") from error
    if not isinstance(content, dict):
        raise AppendixError(f"{path}: a JSON object is expected; the notebooks write it again")
    return content


def _claims(content: Mapping[str, Any]) -> Markup:
    """The ledger, a row a claim with the tests that its verdict depends on."""
    rows = []
    try:
        for claim in content["claims"]:
            tests = "\n".join(map(_test, (t for t in claim["tests"] if t["counts"])))
            verdict = Markup("<strong>{}</strong>").format(claim["verdict"])
            rows.append([claim["id"], claim["statement"], verdict, tests, claim["paper"]])
    except (KeyError, TypeError) as error:
        message = f"claims.json is not as notebook 07 writes it ({error!r}); run that notebook again"
        raise AppendixError(message) from error
    columns = ["Claim", "Statement", "Verdict", "Tests that count", "The paper's value"]
    caption = "The paper's claims: value [95 % interval], corrected p, verdict of each test"
    return _table(caption, columns, rows, preformatted=3)


def _test(test: Mapping[str, Any]) -> str:
    head = f"{test['id']} {test['comparison']}: "
    if test["value"] is None:
        return f"{head}{test['verdict']}"
    sign = "" if "ratio" in test["statistic"] else "+"
    low, high = ("?" if test[end] is None else f"{test[end]:{sign}.3f}" for end in ("low", "high"))
    p = "" if test["p_corrected"] is None else f", p = {test['p_corrected']:.2g}"
    return f"{head}{test['value']:{sign}.3f} [{low}, {high}]{p}, {test['verdict']}"


def _run(run: Mapping[str, Any], pages: list[Page]) -> list[Markup]:
    """Tables of what ``run.json`` says: time of each notebook, hardware, seeds, versions."""
    entries = run.get("notebooks", {})
    timed = [(page, entries[stem]) for page in pages if (stem := page.file.removesuffix(".html")) in entries]
    notebooks = [
        [_anchor(page), f"{e['seconds']:,.1f}", _gib(e.get("peak_memory_bytes")), e.get("status", "")]
        for page, e in timed
    ]
    hardware = [
        [name.replace("_bytes", "").replace("_", " "), f"{_gib(v)} GiB" if name.endswith("_bytes") else _shown(v)]
        for name, v in run.get("hardware", {}).items()
    ]
    seeds = [[name, seed] for name, seed in run.get("seeds", {}).items()]
    versions = [[name, version or "not installed"] for name, version in run.get("versions", {}).items()]
    tables = [
        ("Seconds and peak memory of each notebook; encodings that were cached are not computed again",
         ["Notebook", "Seconds", "Peak memory (GiB)", "Status"], notebooks),
        ("Hardware", ["Part", "Value"], hardware),
        ("Seeds", ["Of", "Seed"], seeds),
        ("Versions", ["Package", "Version"], versions),
    ]  # fmt: skip
    return [_table(caption, columns, rows) for caption, columns, rows in tables if rows]


def _anchor(page: Page) -> Markup:
    return Markup('<a href="{}">{}</a>').format(page.file, page.title)


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.1f}"


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], preformatted: int = -1) -> Markup:
    """A table as those of the notebooks; ``preformatted``: the column whose line breaks are kept."""
    text = _ENVIRONMENT.get_template("table.html.j2").render(caption=caption, columns=columns, rows=rows)
    soup = BeautifulSoup(text, "html.parser")
    _tables(soup)
    for row in soup.select("tbody tr") if preformatted >= 0 else ():
        cell = row.find_all("td")[preformatted]
        cell["class"] = [*cell.get("class", []), "pre"]
    return Markup(soup)


_ENVIRONMENT = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _render(template: str, **values: Any) -> str:
    script = (_TEMPLATES / "tables.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    code = HtmlFormatter(style=CODE_STYLE).get_style_defs(".highlight")
    css = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return _ENVIRONMENT.get_template(template).render(
        css=Markup(f"{code}\n{css}"), script=Markup(script), script_hash=f"sha256-{digest}", **values
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m diffret_lib.appendix", description="Make HTML pages of a profile's executed notebooks."
    )
    parser.add_argument("--profile", default="embedded", help="name of a profile that was run (%(default)s)")
    parser.add_argument("--results", metavar="DIR", help="folder of all results (results/ of the checkout)")
    parser.add_argument("--output", metavar="DIR", help="folder of the pages (appendix/ in the profile's results)")
    options = parser.parse_args(arguments)
    try:
        index = build_appendix(options.profile, results_root=options.results, output=options.output)
    except AppendixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
