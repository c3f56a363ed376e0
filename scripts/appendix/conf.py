"""Settings of Sphinx for the appendix; ``build.py`` runs it.  Nothing in a page is loaded over a network."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import latex2mathml.converter
from docutils import nodes

project = "diffret"
author = "diffret contributors"
html_title = "diffret: appendix"
language = "en"
extensions = ["myst_nb"]
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header", "myst.xref_missing", "mystnb.unknown_mime_type"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "navbar_persistent": [],
    "show_toc_level": 2,
    "home_page_in_toc": True,
}
html_context = {"default_mode": "light"}
html_static_path = ["appendix.css"]
html_css_files = ["appendix.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # a page on disk may not fetch another
html_last_updated_fmt = None
html_math_renderer = "latex2mathml"

#: Spellings that latex2mathml does not know, or sets without the space after a function.
SPELLINGS = (
    (r"\\arg(?![A-Za-z])", r"\\operatorname{arg}"),
    (r"\\setminus(?![A-Za-z])", r"\\smallsetminus"),
    (r"\\(exp|log|operatorname\{\w+\})(?=\s*[A-Za-z\\])(?!\s*\\(left|[bB]igg?|,))", r"\\\1\\,"),
)
#: In a displayed formula it sets the range beside the operator instead of below it.
DISPLAYED = ((r"\\(max|min|sup|inf)(?=\s*_)", r"\\\1\\limits"),)


def mathml(latex: str, display: bool = False) -> str:
    """A formula as a ``<math>`` element.

    Raises
    ------
    ValueError
        If latex2mathml cannot convert it, or leaves a command as it is.
    """
    spelled = latex
    for pattern, replacement in (*SPELLINGS, *(DISPLAYED if display else ())):
        spelled = re.sub(pattern, replacement, spelled)
    try:
        element = latex2mathml.converter.convert(spelled, display="block" if display else "inline")
        left = [e.text for e in ElementTree.fromstring(element).iter() if (e.text or "").startswith("\\")]
    except Exception as error:  # the library raises many kinds; text that is no XML is one more
        raise ValueError(f"the formula {latex.strip()!r} cannot be converted to MathML: {error!r}") from error
    if left:
        raise ValueError(f"the formula {latex.strip()!r} has {left[0]}, which latex2mathml does not know")
    return element


def inline(translator: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def displayed(translator: Any, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    translator.body.append(f'<div class="math">{mathml(node.astext(), display=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register the renderer of formulas."""
    app.add_html_math_renderer("latex2mathml", inline_renderers=(inline, None), block_renderers=(displayed, None))
