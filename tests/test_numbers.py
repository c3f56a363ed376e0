"""One number, one place: text that is written by hand holds no measured number, so that none can disagree with a table.

What a notebook says of its results it computes from the tables.  Numbers that settings, conventions and the paper give
may stand in text; each has its source here, and one that a file gives is compared with that file.
"""

from __future__ import annotations

import inspect
import re

import nbformat
import pytest
import yaml

from diffret_lib.config import CHECKOUT
from diffret_lib.experiments.claims import ALPHA, NEAR
from diffret_lib.experiments.oracle import random_twins
from diffret_lib.retrieval.systems import SHARD_TEXTS

TEXTS = [*sorted(CHECKOUT.glob("notebooks/*.ipynb")), CHECKOUT / "README.md"]
#: Code, formulas, addresses, and names of papers and licences: no numbers of ours.
APART = r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|https?://\S+"
APART += r"|(?i:arxiv) [\d.]+|Apache-2\.0|Python 3\.\d+( to 3\.\d+)?|TREC DL \d{4} and \d{4}"
#: A decimal number, one of three digits or more, a share, a ratio, a time, a size.
NUMBER = re.compile(
    r"(?<![\w.-])[-+−]?(?:\d+[.,]\d[\d.,]*\d|\d+\.\d|\d{3,}|\d+(?=\s?(?:%|x\b|×|times|[GM]B\b|ms\b|seconds|minutes|hours|hundredths)))"
    r"(?:\s?(?:%|x\b|×|times|million|M\b|billion|[GM]B\b|ms\b|seconds|minutes|hours|hundredths))?"
)


def known() -> set[str]:
    """Numbers that text may hold."""
    claims = yaml.safe_load((CHECKOUT / "diffret_lib/experiments/claims.yaml").read_text(encoding="utf-8"))
    bounds = {f"{test['bound']:g}" for claim in claims for test in claim["tests"] if "bound" in test}
    backbones = (CHECKOUT / "diffret_lib/models/backbones.yaml").read_text(encoding="utf-8")
    sizes = {f"{n} {unit}" for n in re.findall(r"smollm2-(\d+)m", backbones) for unit in ("M", "million")}
    conventions = {"95 %", "80 %", f"{ALPHA:.0%}".replace("%", " %"), f"{ALPHA:g}", f"{NEAR:g}"}
    settings = {str(inspect.signature(random_twins).parameters["draws"].default), "100"}  # the best 100 of a search
    settings.add(f"{SHARD_TEXTS:,}")
    return bounds | {f"{bound} times" for bound in bounds} | sizes | conventions | settings


def measured(text: str) -> list[str]:
    """Numbers of a text that look measured."""
    return [found.strip() for found in NUMBER.findall(re.sub(APART, " ", text, flags=re.DOTALL))]


def written(path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_text_holds_no_measured_number(path):
    unknown = [number for number in measured(written(path)) if number not in known()]
    assert not unknown, (
        f"{path.name}: write {unknown} from the table that it comes from, or name its source in this test"
    )


def test_what_a_measured_number_is():
    text = "It scores 0.693 [+0.02, 1,234], 9.7 times in 15 minutes: 37 % of 240 queries, −0.5, 3x. In 04 and 4 of 7."
    assert measured(text) == ["0.693", "+0.02", "1,234", "9.7 times", "15 minutes", "37 %", "240", "−0.5", "3x"]
    assert (
        measured("$0.5$, `0.25`, [a table](a_0.4.md), arXiv 2605.07210, Apache-2.0, Python 3.11 to 3.13, SmolLM2-135M")
        == []
    )
    assert {"0.02", "15 times", "135 million"} <= known() and "0.693" not in known()


def test_every_table_of_a_notebook_is_written_by_one():
    """A table's name stands in one notebook alone: two would write different numbers to one file."""
    names: dict[str, str] = {}
    for path in TEXTS[:-1]:
        code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        for name in set(re.findall(r'results\.(?:table|data|effectiveness|figure)\([^\n]*?, "(\w+)"', code)):
            assert names.setdefault(name, path.name) == path.name, name
    assert len(names) > 20
