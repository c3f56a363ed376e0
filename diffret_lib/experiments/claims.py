"""The ledger of the paper's seven claims: tests on the saved tables, and their verdicts.

Rules are the same for every profile; p is two-sided and corrected by Holm over all tests of the ledger that have one;
intervals are two-sided at 95 %.

``greater``
    A gain: supported when the corrected p is below :data:`ALPHA` and the difference is positive, contradicted when it
    is as clear and negative.
``clear gain``
    A gain that matters: as ``greater``, but contradicted when the whole interval lies below :data:`MARGIN`.
``no gain``
    No gain, which a large p cannot show: supported when the whole interval lies below :data:`MARGIN`, contradicted
    when there is a clear positive difference, however small.
``at most``, ``at least``
    A size: supported when the whole interval lies on the claimed side of a bound, contradicted when it lies on the
    other (one-sided at 2.5 %; the claim needs all of them, so no correction is needed).

Whatever is neither is inconclusive.  A claim is supported when every test that counts is, contradicted when one is,
and inconclusive otherwise; secondary tests (other modes, fewer masks) do not count.  Claims 1 to 3 are tested on what
there is, zero-shot or fine-tuned; the others need all of their tests.  Effectiveness is nDCG@10 averaged over the
out-of-domain collections; the oracle's headroom covers all test collections.

Two numbers have no unbiased estimate: the interval that counts reaches from the lower bound of one that is too small
to the upper bound of one that is too large.  They are the loss of claim 6 (cross-fitted, and against the best pair in
hindsight) and the headroom beyond chance of claim 7 (random twins, and split halves; its p is the larger one).
Against fine-tuning the oracle loses the least and the most that it gains by chance.  (These rules were made after a
look at runs in which the two estimates disagreed.)
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import yaml

from diffret_lib.cache import write_text
from diffret_lib.experiments.claim_tests import (
    MARGIN, RATIO, RESAMPLES, SAME_LATENCY, SEVERAL_TIMES, Rule, Test, claim_tests,
)  # fmt: skip
from diffret_lib.retrieval.metrics import holm

SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, NOT_TESTED = "inconclusive at this scale", "not tested"

#: Corrected p-values below it are clear.
ALPHA = 0.05


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, in our words (``claims.yaml``), with its tests and verdict."""

    id: int
    statement: str
    verdict: str
    paper: str
    tests: list[Test]
    evidence: list[str]
    not_shown: str


@dataclass(frozen=True)
class Ledger:
    """All claims of one run of the study."""

    profile: str
    claims: list[Claim]

    def tests(self) -> pd.DataFrame:
        """One row a test, in the order of the ledger; the columns are the attributes of :class:`Test`."""
        rows = pd.DataFrame([asdict(test) for claim in self.claims for test in claim.tests])
        return rows[["claim", "id", *rows.columns.drop(["claim", "id"])]]

    def verdicts(self) -> pd.DataFrame:
        """One row a claim: claim, statement, verdict, tests (their own verdicts), paper, evidence, not_shown."""
        rows = pd.DataFrame([asdict(claim) for claim in self.claims]).rename(columns={"id": "claim"})
        rows["tests"] = ["; ".join(f"{t.id} {t.verdict}" for t in c.tests if t.counts) for c in self.claims]
        rows["evidence"] = rows["evidence"].map(", ".join)
        return rows[["claim", "statement", "verdict", "tests", "paper", "evidence", "not_shown"]]


def decide(rule: Rule, value: float, low: float, high: float, p: float, bound: float = 0.0) -> str:
    """The verdict of one test by its rule (see the module); ``p`` is the corrected one.

    A value that is nan was not tested; a bound of the interval, or a p, that is nan makes nothing clear.
    """
    if math.isnan(value):
        return NOT_TESTED
    gain, loss = p < ALPHA and value > 0, p < ALPHA and value < 0
    supported, contradicted = {
        "greater": (gain, loss),
        "clear gain": (gain and not high < bound, high < bound),
        "no gain": (high < bound and not gain, gain),
        "at most": (high <= bound, low > bound),
        "at least": (low >= bound, high < bound),
    }[rule]
    return SUPPORTED if supported else CONTRADICTED if contradicted else INCONCLUSIVE


def combine(verdicts: list[str], needs_all: bool) -> str:
    """The verdict of a claim from those of the tests that count; ``needs_all``: none of them may be missing."""
    tested = [v for v in verdicts if v != NOT_TESTED]
    if CONTRADICTED in tested:
        return CONTRADICTED
    if not tested or (needs_all and len(tested) < len(verdicts)):
        return NOT_TESTED
    return SUPPORTED if set(tested) == {SUPPORTED} else INCONCLUSIVE


def ledger(folder: Path, profile_name: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Ledger:
    """Test every claim on ``tables/*.csv`` and ``run.json`` of a results folder.

    ``resamples`` is of bootstrap intervals and randomisation tests.  A test whose table or rows are missing is "not
    tested", with a note that names the notebook and the command which make them.
    """
    folder, tests = Path(folder), claim_tests(Path(folder), profile_name, resamples, seed)
    corrected = map(float, holm([t.p for t in tests]))
    tests = [replace(t, p_corrected=p, verdict=decide(t.rule, t.value, t.low, t.high, p, t.bound))
             for t, p in zip(tests, corrected)]  # fmt: skip
    claims = []
    texts = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for number, text in enumerate(texts, 1):
        own = [t for t in tests if t.claim == number]
        verdict = combine([t.verdict for t in own if t.counts], needs_all=number > 3)
        found = [name for name in text["evidence"] if (folder / name).is_file()]
        paper = text.get("paper", "")
        claims.append(Claim(number, text["statement"], verdict, paper, own, found, text["not_shown"]))
    return Ledger(profile_name, claims)


def write_claims(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    """Write the ledger as JSON, whole or not at all (null is no number); the same ledger gives the same bytes."""
    rule = {"alpha": ALPHA, "correction": "Holm, over all tests with p", "margin_ndcg@10": MARGIN,
            "same_latency": SAME_LATENCY, "several_times": SEVERAL_TIMES}  # fmt: skip
    content = {"profile": ledger.profile, "rule": rule, "claims": [asdict(c) for c in ledger.claims]}
    for claim in content["claims"]:
        claim["tests"] = [{k: None if v != v else v for k, v in test.items()} for test in claim["tests"]]
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def describe(claim: Claim) -> str:
    """A claim and its tests as a paragraph of Markdown."""
    text = f"**Claim {claim.id}: {claim.verdict}.** {claim.statement}"
    if claim.paper:
        text += f" The paper's own: {claim.paper}."
    counted = [t.id for t in claim.tests if t.counts]
    if len(counted) > 1:
        text += f" The verdict takes {', '.join(counted)} together: supported if each is, contradicted if one is."
    text += f" *Not shown:* {claim.not_shown}\n"
    return "\n".join([text, *(f"- {_sentence(test)}" for test in claim.tests)])


def _sentence(test: Test) -> str:
    head = f"{test.id}{'' if test.counts else ' (secondary)'}, {test.comparison}: "
    if test.verdict == NOT_TESTED:
        return f"{head}not tested; {test.note}."
    sign = "" if test.statistic == RATIO else "+"
    parts = [f"**{test.value:{sign}.3f}** [{test.low:{sign}.3f}, {test.high:{sign}.3f}]"]
    if test.rule != "greater":
        parts.append(f"held against {test.bound:g}")
    if not math.isnan(test.p):
        parts.append(f"corrected p = {test.p_corrected:.3g}")
    if test.queries:
        parts.append(f"{test.queries} queries" + (f", {test.collections} collections" if test.collections else ""))
    return f"{head}{', '.join(parts)}: {test.verdict}{f' ({test.note})' if test.note else ''}."
