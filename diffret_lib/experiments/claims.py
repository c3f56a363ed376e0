"""The ledger of the paper's seven claims: tests on the saved tables, and their verdicts.

The tests, their families and directions are written down in ``claims.yaml``, the same for every profile.  All are on
the out-of-domain collections; p is two-sided, intervals are two-sided at 95 %, over the queries of the given
collections.  Intervals over collections as well stand beside.  Directions:

``greater``
    A gain: supported when p is below :data:`ALPHA` and the value positive, contradicted when it is as clear and
    negative.
``clear gain``
    A gain that matters: as ``greater``, but contradicted when the whole interval lies below the bound.
``no gain``
    No gain, which a large p cannot show: supported when the whole interval lies below the bound, contradicted when
    there is a clear positive difference, however small.
``at most``
    A size: supported when the whole interval lies at or below the bound, contradicted when it lies above.
``about``
    A ratio: supported when the whole interval lies within a factor :data:`NEAR` of the bound, contradicted when it lies
    outside.

Whatever is neither is inconclusive.  Only tests that count enter a correction.  In a family ``each`` they are
statements of their own: p is corrected by Holm over the family, and the verdict names the ones that hold.  In a family
``all`` the claim needs every one: by the intersection-union rule it is supported when each is by its raw p, and
contradicted when one is by Holm's.  A test of an undertrained system
(:func:`~diffret_lib.experiments.comparison.undertrained`) enters no verdict.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from diffret_lib.cache import write_text
from diffret_lib.experiments.comparison import (
    RESAMPLES,
    by_system,
    comparison_name,
    differences,
    held_out_losses,
    paired,
    undertrained,
)
from diffret_lib.retrieval.metrics import holm, macro_average

SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, NOT_TESTED = "inconclusive at this scale", "not tested"

#: p-values below it are clear.
ALPHA = 0.05
#: "About" a ratio: between the ratio divided by it and the ratio times it.
NEAR = 1.5
#: Directions of a claimed gain.
GAINS = ("greater", "clear gain")
#: The notebook that writes each table or record.
PRODUCERS = {
    "grid_per_query": "02_mask_count_ablation", "selected_pair": "02_mask_count_ablation",
    "per_query": "04_evaluation", "oracle_chance": "05_per_query_optimal_k", "claim4_ratios": "06_efficiency",
}  # fmt: skip

#: What a test has that compares no two systems of a table.
SOURCES = {
    "held-out losses": "best pair by the other half of the queries (hybrid) − selected pair",
    "best fixed": "per-query oracle less chance (hybrid) − best fixed pair",
    "selected": "per-query oracle less chance (hybrid) − selected pair",
    "fine-tuning": "per-query oracle, frozen, less chance (hybrid) − DiffRetriever multi, fine-tuned",
}  # fmt: skip
DIFFERENCE, RATIO = "macro difference of nDCG@10", "ratio of latencies"
NUMBERS = ["value", "low", "high", "low_all", "high_all", "p", "p_corrected", "p_all", "detectable", "needed_queries"]
_ABOUT = ["claim", "id", "family", "comparison", "training", "mode", "direction", "statistic", "bound", "counts"]
Row = dict[str, Any]


def _texts() -> list[dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _planned() -> list[Row]:
    """All tests as they are declared, one row each."""
    rows = []
    for number, claim in enumerate(_texts(), 1):
        lists = [{k: v if isinstance(v, list) else [v] for k, v in test.items()} for test in claim["tests"]]
        tests = [dict(zip(test, values)) for test in lists for values in product(*test.values())]
        for letter, test in zip(string.ascii_lowercase, tests):
            row = {"claim": number, "id": f"{number}{letter}", "family": claim["family"], "bound": 0.0, "counts": True}
            row |= {"statistic": RATIO if "system" in test else DIFFERENCE, "note": "", "training": "", "mode": ""}
            row |= test
            rows.append({"comparison": _label(row)} | row)
    return rows


def _label(test: Row) -> str:
    if "system" in test:
        return f"{test['system']} {test['count']} against one, {test['quantity']}, batch {test['batch']}"
    if "source" in test:
        return SOURCES[test["source"]]
    names = comparison_name(test["better"], test["training"]), _other(test)
    return "{} ({}) − {} ({})".format(names[0], test["mode"], names[1], test.get("against", test["mode"]))


def _other(test: Row) -> str:
    return comparison_name(test["than"], "zero-shot" if test["than"] == "BM25" else test["training"])


@dataclass
class _Saved:
    """The saved tables, of some collections alone where they have collections."""

    folder: Path
    profile: str
    collections: Sequence[str]
    resamples: int
    seed: int

    def missing(self, what: str, name: str) -> ValueError:
        return ValueError(f"{what}; notebook {PRODUCERS[name]} writes it: make reproduce PROFILE={self.profile}")

    def table(self, name: str) -> pd.DataFrame:
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            raise self.missing(f"tables/{name}.csv is not there", name)
        return pd.read_csv(path, dtype={"query_id": str}, keep_default_na=False, na_values=[""])

    @cached_property
    def per_query(self) -> pd.DataFrame:
        return self.table("per_query")

    @cached_property
    def systems(self) -> dict[tuple[str, str], pd.Series]:
        return dict(by_system(self.per_query, self.collections))

    @cached_property
    def undertrained(self) -> dict[str, str]:
        return undertrained(self.per_query, self.resamples, self.seed)

    @cached_property
    def selected(self) -> tuple[int, int]:
        path = self.folder / "run.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "selected_pair" not in run.get("results", {}):
            raise self.missing("run.json has no selected_pair", "selected_pair")
        return tuple(map(int, run["results"]["selected_pair"]))

    def paired(self, values: dict[str, np.ndarray], test: Row) -> Row:
        bound = test["bound"] if test["direction"] in ("no gain", "at most") else 0.0
        return paired(values, self.resamples, self.seed, bound)


def _compared(saved: _Saved, test: Row) -> Row:
    """Two systems, each in its mode; one that is undertrained leaves the test without a number."""
    ours, other = comparison_name(test["better"], test["training"]), _other(test)
    for name in (ours, other):
        if name in saved.undertrained:
            return {"counts": False, "note": f"{name}: {saved.undertrained[name]}"}
    against = test.get("against", test["mode"])
    if against == "best":
        averages = {mode: _macro(values) for (name, mode), values in saved.systems.items() if name == other}
        against = max(averages, key=averages.get, default="dense")
    try:
        values = differences(saved.systems, (ours, test["mode"]), (other, against))
    except ValueError as error:
        raise saved.missing(str(error), "per_query") from error
    return saved.paired(values, test) | {"comparison": f"{ours} ({test['mode']}) − {other} ({against})"}


def _macro(values: pd.Series) -> float:
    return macro_average({c: v.to_numpy() for c, v in values.groupby(level="collection")})


def _ratio(saved: _Saved, test: Row) -> Row:
    """The ratio of a number of vectors to one vector."""
    count = saved.selected[0] if test["count"] == "selected" else test["count"]
    if count == 1:
        return {"counts": False, "note": "the selected pair has one mask a query"}
    rows = saved.table("claim4_ratios")
    for column in ("system", "quantity", "batch"):
        rows = rows[rows[column] == test[column]]
    rows = rows[(rows["count"] == count) & (rows["decoding"] != "as answered")]
    if rows.empty:
        raise saved.missing(f"claim4_ratios.csv has no row of {_label(test | {'count': count})}", "claim4_ratios")
    return rows.iloc[0][["comparison", "value", "low", "high"]].to_dict()


def _sourced(saved: _Saved, test: Row) -> Row:
    """The loss of the selected pair, or the oracle's headroom beyond chance over a reference."""
    if test["source"] == "held-out losses":
        grid, pair = saved.table("grid_per_query"), saved.selected
        grid = grid[grid["collection"].isin(list(saved.collections))]
        if pair not in set(zip(grid["k_query"], grid["k_passage"])):
            raise saved.missing(f"grid_per_query.csv has no test rows of the pair {pair}", "grid_per_query")
        losses = held_out_losses(grid, pair, saved.seed)
        return saved.paired(losses, test) | {"comparison": f"{test['comparison']} {pair}"}
    rows = saved.table("oracle_chance")
    rows = rows[(rows["kind"] == "beyond chance") & (rows["reference"] == test["source"])]
    if rows.empty:
        raise saved.missing(f"oracle_chance.csv has no part beyond chance over {test['source']}", "oracle_chance")
    tuned = "DiffRetriever multi, fine-tuned"
    if test["training"] == "fine-tuned" and tuned in saved.undertrained:
        return {"counts": False, "note": f"{tuned}: {saved.undertrained[tuned]}"}
    return rows.iloc[0].drop(["kind", "reference", "method"]).to_dict()


def decide(direction: str, value: float, low: float, high: float, p: float, p_other: float, bound: float = 0.0) -> str:
    """The verdict of one test by its direction (see the module).

    ``p`` is held against ALPHA for the claim, ``p_other`` against it.  A value that is nan was not tested; a bound of
    the interval, or a p, that is nan makes nothing clear.
    """
    if math.isnan(value):
        return NOT_TESTED
    gain, loss = value > 0, value < 0
    supported, contradicted = {
        "greater": (gain and p < ALPHA, loss and p_other < ALPHA),
        "clear gain": (gain and p < ALPHA and not high < bound, high < bound),
        "no gain": (high < bound and not (gain and p_other < ALPHA), gain and p_other < ALPHA),
        "at most": (high <= bound, low > bound),
        "about": (bound / NEAR <= low and high <= bound * NEAR, high < bound / NEAR or low > bound * NEAR),
    }[direction]
    return SUPPORTED if supported else CONTRADICTED if contradicted else INCONCLUSIVE


def combine(verdicts: Sequence[str], family: str) -> str:
    """The verdict of a claim from those of the tests that count.

    ``all``: contradicted when one is, else every one must be tested, and supported.  ``each``: of those that were
    tested, "supported" or "contradicted" when all are, and "in part" when some are.
    """
    tested = [v for v in verdicts if v != NOT_TESTED]
    if family == "all":
        if CONTRADICTED in tested:
            return CONTRADICTED
        if not tested or len(tested) < len(verdicts):
            return NOT_TESTED
        return SUPPORTED if set(tested) == {SUPPORTED} else INCONCLUSIVE
    clear = [v for v in (SUPPORTED, CONTRADICTED) if v in tested]
    if not clear:
        return INCONCLUSIVE if tested else NOT_TESTED
    return clear[0] if set(tested) == set(clear[:1]) else ", ".join(f"{v} in part" for v in clear)


@dataclass(frozen=True)
class Ledger:
    """All claims of one run of the study.

    ``tests`` has one row a test, in the order of ``claims.yaml``: what it compares, then the numbers of
    :func:`~diffret_lib.experiments.comparison.paired` with p_corrected (Holm over the claim's tests that count) and
    p_all (Holm over all tests of a gain that count), queries, collections, verdict and note; missing numbers are nan.
    ``verdicts`` has one row a claim: claim, verdict, where (the tests that count by their verdicts), collections,
    statement, paper, evidence and not_shown.
    """

    profile: str
    tests: pd.DataFrame
    verdicts: pd.DataFrame

    def shown(self) -> pd.DataFrame:
        """The columns and rows of the tests that a reader wants: what was tested, or should have been."""
        left_out = ["claim", "family", "training", "mode", "statistic", "collections"]
        return self.tests[_telling(self.tests)].drop(columns=left_out)


def _telling(tests: pd.DataFrame) -> pd.Series:
    return tests["counts"] | (tests["verdict"] != NOT_TESTED) | tests["note"].str.contains("undertrained")


def ledger(
    folder: Path, profile_name: str, collections: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Ledger:
    """Test every claim on ``tables/*.csv`` and ``run.json`` of a results folder, on the (out-of-domain) collections.

    A test whose table or rows are missing is "not tested", with a note that says which notebook makes them.
    """
    saved, rows = _Saved(Path(folder), profile_name, collections, resamples, seed), []
    for test in _planned():
        fill = _ratio if "system" in test else _sourced if "source" in test else _compared
        row = dict.fromkeys(NUMBERS, math.nan) | {"queries": 0, "collections": 0} | test
        try:
            rows.append(row | fill(saved, test))
        except ValueError as error:
            rows.append(row | {"note": str(error)})
    tests = pd.DataFrame(rows)
    # two numbers of vectors that are one: the selected pair has 16 masks a query
    tests = tests[~(tests.duplicated(["claim", "comparison", "batch", "quantity"]) & (tests["statistic"] == RATIO))]
    tests = tests.reset_index(drop=True).astype({"queries": int, "collections": int, "counts": bool})
    tests.loc[tests["direction"] == "at most", "p"] = math.nan  # that there is no loss at all is not what is tested
    counting = tests[tests["counts"]]
    gains = counting[counting["direction"].isin(GAINS)]
    tests["p_all"] = pd.Series(holm(gains["p"]), gains.index)
    tests["p_corrected"] = counting.groupby("claim")["p"].transform(holm)
    verdicts = []
    for t in tests.itertuples():
        corrected = t.p_corrected if t.counts else t.p
        own = t.p if t.family == "all" else corrected
        verdicts.append(decide(t.direction, t.value, t.low, t.high, own, corrected, t.bound))
    tests["verdict"] = verdicts
    tests = tests[[*_ABOUT, *NUMBERS, "queries", "collections", "verdict", "note"]]
    return Ledger(profile_name, tests, _verdicts(tests, saved))


def _verdicts(tests: pd.DataFrame, saved: _Saved) -> pd.DataFrame:
    rows, names = [], ", ".join(name.removeprefix("pydocs/") for name in saved.collections)
    for number, text in enumerate(_texts(), 1):
        own = tests[(tests["claim"] == number) & tests["counts"]]
        evidence = ", ".join(name for name in text["evidence"] if (saved.folder / name).is_file())
        rows.append({
            "claim": number, "verdict": combine(own["verdict"].tolist(), text["family"]), "where": _where(own),
            "collections": names if own["queries"].any() else "", "statement": text["statement"],
            "paper": text.get("paper", ""), "evidence": evidence, "not_shown": text["not_shown"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def _where(tests: pd.DataFrame) -> str:
    """The counting tests by their verdicts: mode and training, or what was compared."""
    parts = []
    for verdict, rows in tests[tests["verdict"] != NOT_TESTED].groupby("verdict", sort=False):
        several = rows["mode"].nunique() > 1 or rows["training"].nunique() > 1
        names = rows["mode"] + " " + rows["training"] if several and rows["mode"].all() else rows["comparison"]
        parts.append(f"{verdict}: {'; '.join(names)}")
    return ". ".join(parts)


def answer(ledger: Ledger) -> str:
    """The verdicts in two sentences (Markdown)."""
    claims = ledger.verdicts.groupby("verdict", sort=False)["claim"].agg(list)
    verdicts = "; ".join(f"**{verdict}**: {', '.join(map(str, numbers))}" for verdict, numbers in claims.items())
    notes, queries = ledger.tests["note"], ledger.tests.loc[ledger.tests["counts"], "queries"].max()
    out = sorted(set(notes[notes.str.contains("undertrained")].str.split(":").str[0]))
    names = next(filter(None, ledger.verdicts["collections"]), "none")
    left = f"; undertrained, so in no verdict: {', '.join(out)}" if out else ""
    return (
        f"**Answer.** The paper's claims, by their numbers, are {verdicts}. The tests are on up to {queries} queries "
        f"of the out-of-domain collections ({names}){left}."
    )


def write_claims(ledger: Ledger, path: str | Path) -> None:
    """Write the ledger as JSON, whole or not at all (null is no number); the same ledger gives the same bytes."""
    rule = {"alpha": ALPHA, "near": NEAR, "correction": "Holm over the tests of a claim that count"}
    tests = ledger.tests.astype(object).where(ledger.tests.notna(), None)
    claims = [
        row | {"tests": tests[tests["claim"] == row["claim"]].drop(columns="claim").to_dict("records")}
        for row in ledger.verdicts.to_dict("records")
    ]
    content = {"profile": ledger.profile, "rule": rule, "claims": claims}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def describe(ledger: Ledger, claim: int) -> str:
    """A claim and its tests as a paragraph of Markdown."""
    text, tests = ledger.verdicts.set_index("claim").loc[claim], ledger.tests[ledger.tests["claim"] == claim]
    head = f"**Claim {claim}: {text['verdict']}.** {text['statement']}"
    head += f" The paper's own: {text['paper']}." if text["paper"] else ""
    own = tests[tests["counts"] & tests["p_all"].notna()]
    if len(own) > 1 and own["family"].iloc[0] == "all":
        head += (
            f" The claim needs every test: the largest raw p is {own['p'].max():.2g}; by Holm it is "
            f"{own['p_corrected'].max():.2g} within the claim and {own['p_all'].max():.2g} over all gains; with "
            f"collections resampled as well, {int((own['low_all'] > 0).sum())} of {len(own)} intervals lie above 0."
        )
    lines = [f"- {_sentence(test)}" for test in tests[_telling(tests)].itertuples()]
    return "\n".join([f"{head} *Not shown:* {text['not_shown']}\n", *lines])


def _sentence(test: Any) -> str:
    text = f"{test.id}{'' if test.counts else ' (shown)'}, {test.comparison}: "
    if test.verdict == NOT_TESTED:
        return f"{text}not tested; {test.note}."
    sign = "" if test.statistic == RATIO else "+"
    text += f"**{test.value:{sign}.3f}** [{test.low:{sign}.3f}, {test.high:{sign}.3f}]"
    if not math.isnan(test.low_all):
        text += f" (collections resampled too: [{test.low_all:{sign}.3f}, {test.high_all:{sign}.3f}])"
    text += f", held against {test.direction} {test.bound:g}" if test.bound else ""
    text += f", p = {test.p:.2g}" if not math.isnan(test.p) else ""
    text += f" (Holm {test.p_corrected:.2g})" if not math.isnan(test.p_corrected) else ""
    text += f", {test.queries} queries: {test.verdict}" if test.queries else f": {test.verdict}"
    if test.verdict == INCONCLUSIVE and not math.isnan(test.detectable):
        needed = f"about {test.needed_queries:,.0f}" if test.needed_queries < 1e5 else "more than 100,000"
        text += f"; detectable at 80 % power: {test.detectable:.3f}; {needed} queries would decide it"
    return f"{text}{f' ({test.note})' if test.note else ''}."
