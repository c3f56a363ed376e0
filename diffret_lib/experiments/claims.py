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
contradicted when one is by Holm's.  A test of an undertrained system or mode
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
    read_table,
    undertrained,
)
from diffret_lib.experiments.study import TEXT_ONLY
from diffret_lib.retrieval.metrics import holm

SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, NOT_TESTED = "inconclusive at this scale", "not tested"

#: p-values below it are clear.
ALPHA = 0.05
#: "About" a ratio: between the ratio divided by it and the ratio times it.
NEAR = 1.5
#: The notebook that writes each table.
PRODUCERS = {"per_query": "04_evaluation", "claim4_ratios": "06_efficiency", "grid_per_query": "02_mask_count_ablation",
             "oracle_chance": "05_per_query_optimal_k"}  # fmt: skip
DIFFERENCE, RATIO = "macro difference of nDCG@10", "ratio of latencies"
NUMBERS = ["value", "low", "high", "low_all", "high_all", "p", "p_corrected", "p_all", "detectable", "needed_queries"]
#: The note of tests that a profile without fine-tuning leaves out.
NO_TRAINING = "no system is fine-tuned in this profile"
_MULTI = "DiffRetriever multi, fine-tuned"
_COMPARED = "{ours} ({mode}) − {other} ({against})"
#: Columns of the tests, with what a test has there that declares and finds nothing else.
_COLUMNS = dict.fromkeys("claim id family comparison training mode direction statistic".split(), "")
_COLUMNS |= {"bound": 0.0, "counts": True} | dict.fromkeys(NUMBERS, math.nan)
_COLUMNS |= {"queries": 0, "collections": 0, "verdict": "", "note": ""}
Row = dict[str, Any]


def _texts() -> list[dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _planned() -> list[Row]:
    """All tests as they are declared, one row each."""
    rows = []
    for number, claim in enumerate(_texts(), 1):
        lists = [{k: v if isinstance(v, list) else [v] for k, v in test.items()} for test in claim["tests"]]
        tests = [dict(zip(test, values)) for test in lists for values in product(*test.values())]
        shared = {"claim": number, "table": "per_query", "comparison": _COMPARED, "statistic": DIFFERENCE}
        shared |= {key: value for key, value in claim.items() if key != "tests"}
        for letter, test in zip(string.ascii_lowercase, tests):
            row = _COLUMNS | shared | {"id": f"{number}{letter}"} | test
            if row["table"] == "per_query":
                row["ours"] = comparison_name(row["better"], row["training"])
                row["other"] = comparison_name(row["than"], "zero-shot" if row["than"] == "BM25" else row["training"])
                row["against"] = row.get("against", row["mode"])
            rows.append(row | {"comparison": row["comparison"].format(**row)})
    return rows


@dataclass
class _Saved:
    """The saved tables, of some collections alone where they have collections."""

    folder: Path
    collections: Sequence[str]
    resamples: int

    def table(self, name: str) -> pd.DataFrame:
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            raise ValueError(f"tables/{name}.csv is not there")
        return read_table(path)

    @cached_property
    def per_query(self) -> pd.DataFrame:
        return self.table("per_query")

    @cached_property
    def systems(self) -> dict[tuple[str, str], pd.Series]:
        return dict(by_system(self.per_query, self.collections))

    @cached_property
    def undertrained(self) -> dict[str, str]:
        return undertrained(self.per_query, self.resamples)

    @cached_property
    def selected(self) -> tuple[int, int]:
        path = self.folder / "run.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "selected_pair" not in run.get("results", {}):
            raise ValueError("run.json has no selected_pair of notebook 02")
        return tuple(map(int, run["results"]["selected_pair"]))

    def paired(self, values: pd.Series, test: Row) -> Row:
        bound = test["bound"] if test["direction"] in ("no gain", "at most") else 0.0
        return paired(values, self.resamples, bound=bound)


def _numbers(saved: _Saved, test: Row) -> Row:
    """What a test finds in its table, or a note on why it is not made; a ValueError says what is not there."""
    if test["training"] == "fine-tuned":
        if not (saved.per_query["training"] == "fine-tuned").any():
            return {"note": NO_TRAINING}
        ours, other = test.get("ours", _MULTI), test.get("other", _MULTI)
        names = ours, other, f"{ours} ({test['mode']})", f"{other} ({test.get('against', test['mode'])})"
        for name in filter(saved.undertrained.__contains__, names):
            return {"counts": False, "note": f"{name}: {saved.undertrained[name]}"}
    if TEXT_ONLY in test.get("ours", "") and not saved.per_query["system"].str.endswith(TEXT_ONLY).any():
        return {"note": "the profile names no text_only backbone"}
    find = {"per_query": _compared, "claim4_ratios": _ratio, "grid_per_query": _losses, "oracle_chance": _beyond_chance}
    return find[test["table"]](saved, test)


def _compared(saved: _Saved, test: Row) -> Row:
    """Two systems, each in its mode."""
    if test["against"] == "best":
        known = {mode: values for (name, mode), values in saved.systems.items() if name == test["other"]}
        means = {mode: values.groupby(level="collection").mean().mean() for mode, values in known.items()}
        test = test | {"against": max(means, key=means.get, default="dense")}
    values = differences(saved.systems, (test["ours"], test["mode"]), (test["other"], test["against"]))
    return saved.paired(values, test) | {"comparison": _COMPARED.format(**test)}


def _ratio(saved: _Saved, test: Row) -> Row:
    """The ratio of a number of vectors to one vector."""
    count = saved.selected[0] if test["count"] == "selected" else test["count"]
    if count == 1:
        return {"counts": False, "note": "the selected pair has one mask a query"}
    rows, asked = saved.table("claim4_ratios"), [count, *(test[c] for c in ("system", "quantity", "batch"))]
    rows = rows[(rows[["count", "system", "quantity", "batch"]] == asked).all(axis=1)]
    rows = rows[rows["decoding"].fillna("") == test.get("decoding", "")]
    if rows.empty:
        raise ValueError(f"claim4_ratios.csv has no row of {test['comparison']} at {count}")
    return rows.iloc[0][["comparison", "value", "low", "high"]].to_dict()


def _losses(saved: _Saved, test: Row) -> Row:
    """What the selected pair loses; that it loses nothing at all is not what is tested, so p is nan."""
    grid = saved.table("grid_per_query")
    grid = grid[grid["collection"].isin(list(saved.collections))]
    if saved.selected not in set(zip(grid["k_query"], grid["k_passage"])):
        raise ValueError(f"grid_per_query.csv has no test rows of the pair {saved.selected}")
    found = saved.paired(held_out_losses(grid, saved.selected), test)
    return found | {"comparison": f"{test['comparison']} {saved.selected}", "p": math.nan}


def _beyond_chance(saved: _Saved, test: Row) -> Row:
    """The oracle's headroom beyond chance over a reference."""
    rows = saved.table("oracle_chance").set_index(["kind", "reference"]).drop(columns="method")
    if ("beyond chance", test["reference"]) not in rows.index:
        raise ValueError(f"oracle_chance.csv has no part beyond chance over {test['reference']}")
    return rows.loc["beyond chance", test["reference"]].to_dict()


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
    if len(set(tested)) == 1:
        return tested[0]
    return ", ".join(f"{v} in part" for v in (SUPPORTED, CONTRADICTED) if v in tested) or NOT_TESTED


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


def ledger(folder: Path, profile_name: str, collections: Sequence[str], resamples: int = RESAMPLES) -> Ledger:
    """Test every claim on ``tables/*.csv`` and ``run.json`` of a results folder, on the (out-of-domain) collections.

    A test whose table or rows are missing is "not tested", with a note that says which notebook makes them.
    """
    saved, rows = _Saved(folder, collections, resamples), []
    for test in _planned():
        try:
            rows.append(test | _numbers(saved, test))
        except ValueError as error:
            table = next((name for name in PRODUCERS if f"/{name}." in str(error)), test["table"])
            where = f"notebook {PRODUCERS[table]} writes it: make reproduce PROFILE={profile_name}"
            rows.append(test | {"note": f"{error}; {where}"})
    tests = pd.DataFrame(rows)
    # two numbers of vectors that are one: the selected pair has 16 masks a query
    tests = tests[~(tests.duplicated(["claim", "comparison", "batch", "quantity"]) & (tests["statistic"] == RATIO))]
    tests = tests.reset_index(drop=True)[list(_COLUMNS)].astype({"queries": int, "collections": int, "counts": bool})
    counting = tests[tests["counts"]]
    gains = counting[counting["direction"].isin(["greater", "clear gain"])]
    tests["p_all"] = pd.Series(holm(gains["p"]), gains.index)
    tests["p_corrected"] = counting.groupby("claim")["p"].transform(holm)
    corrected = tests["p_corrected"].where(tests["counts"], tests["p"])
    own = tests["p"].where(tests["family"] == "all", corrected)
    numbers = (tests[column] for column in ("direction", "value", "low", "high"))
    tests["verdict"] = list(map(decide, *numbers, own, corrected, tests["bound"]))
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
    """Counting tests by their verdicts: mode and training, or what was compared; and why some were not made."""
    parts, why = [], tests["note"].where(tests["verdict"] == NOT_TESTED, "")
    for (verdict, note), rows in tests.groupby(["verdict", why], sort=False):
        several = rows["mode"].nunique() > 1 or rows["training"].nunique() > 1
        names = rows["mode"] + " " + rows["training"] if several and rows["mode"].all() else rows["comparison"]
        parts.append(f"{verdict}: {'; '.join(names)}" + (f" ({note})" if note else ""))
    return ". ".join(parts)


def answer(ledger: Ledger) -> str:
    """The verdicts in two sentences (Markdown)."""
    claims = ledger.verdicts.astype({"claim": str}).groupby("verdict", sort=False)["claim"].agg(", ".join)
    notes, counting = ledger.tests["note"], ledger.tests[ledger.tests["counts"]]
    why = {NOT_TESTED: f" ({NO_TRAINING})"} if (notes == NO_TRAINING).any() else {}
    verdicts = "; ".join(f"**{verdict}**{why.get(verdict, '')}: {numbers}" for verdict, numbers in claims.items())
    out = sorted(set(notes[notes.str.contains("undertrained")].str.split(":").str[0]))
    names = next(filter(None, ledger.verdicts["collections"]), "none")
    left = f"; undertrained, so in no verdict: {', '.join(out)}" if out else ""
    return (
        f"**Answer.** The paper's claims, by their numbers, are {verdicts}. The tests are on up to "
        f"{counting['queries'].max():,} queries of the out-of-domain collections ({names}){left}."
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


def untested(tests: pd.DataFrame) -> str:
    """The tests of a ledger that were not made, and why, a line for each reason (Markdown)."""
    groups = tests[tests["value"].isna()].groupby("note", sort=False)["id"]
    lines = [f"- Not tested: {', '.join(ids)} ({note})." for note, ids in groups]
    return "\n".join(lines) or "All tests were made."


def describe(ledger: Ledger, claim: int) -> str:
    """A claim and what its verdict rests on, with what would decide each test that is not decided (Markdown).

    Then those whose verdict holds for the given collections only (with collections resampled as well, their interval
    reaches over 0 or the bound), and the tests that do not count.
    """
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
    lines = [f"{head} *Tests:* {text['where'] or 'none'}. *Not shown:* {text['not_shown']} "
             f"*Evidence:* {text['evidence'] or 'none'}.\n"]
    open_ = tests[tests["counts"] & (tests["verdict"] == INCONCLUSIVE) & tests["detectable"].notna()]
    for test in open_.itertuples():
        needed = f"about {test.needed_queries:,.0f}" if test.needed_queries < 1e5 else "more than 100,000"
        within = test.direction in ("no gain", "at most")
        side = "below" if test.value < test.bound else "above"
        goal = f"show that it lies {side} {test.bound:g}" if within else "find it"
        lines.append(
            f"- {test.id}, {test.comparison}: {test.value:+.3f} was measured, {test.detectable:.3f} is detectable at "
            f"80 % power; if the true difference is as measured, to {goal} takes {needed} queries."
        )
    for test in tests[tests["verdict"].isin([SUPPORTED, CONTRADICTED]) & tests["counts"]].itertuples():
        held = test.bound if test.direction in ("no gain", "at most") or test.verdict == CONTRADICTED else 0.0
        if test.low_all <= held <= test.high_all:
            lines.append(
                f"- {test.id}, {test.comparison}: with collections resampled the interval is [{test.low_all:+.3f}, "
                f"{test.high_all:+.3f}]: the verdict holds for these collections only."
            )
    for test in tests[~tests["counts"] & tests["value"].notna()].itertuples():
        number = ".2f" if test.statistic == RATIO else "+.3f"
        between = "" if math.isnan(test.low) else f" [{test.low:{number}}, {test.high:{number}}]"
        lines.append(f"- shown, {test.comparison}: {test.value:{number}}{between}.")
    return "\n".join(lines)
