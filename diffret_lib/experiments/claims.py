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
and inconclusive otherwise.  Claims 1 to 3 are tested on what there is, zero-shot or fine-tuned; the others need all of
their tests.  Effectiveness is averaged over the out-of-domain collections; the oracle's headroom covers all.

The loss of claim 6 and the headroom beyond chance of claim 7 have no unbiased estimate: the interval that counts
reaches from the lower bound of one that is too small to the upper bound of one that is too large (decided after a look
at runs in which the two disagreed).
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from diffret_lib.cache import write_text
from diffret_lib.config import SPLIT_PACKAGE
from diffret_lib.experiments.comparison import PAIR, comparison_name, per_query_best
from diffret_lib.retrieval.metrics import METRIC, holm, macro_interval, macro_randomization_p
from diffret_lib.retrieval.search import MODES, SELECTION_MODE

SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, NOT_TESTED = "inconclusive at this scale", "not tested"

#: Corrected p-values below it are clear.
ALPHA = 0.05
#: nDCG@10 that counts as little: 5 % of 0.4, which is not noticeable by Spärck Jones's rule of thumb (1974).
MARGIN = 0.02
#: "About the latency of": up to a quarter more, the usual upper limit of equivalence (as in bioequivalence).
SAME_LATENCY = 1.25
#: "Costs several times as much": twice, well below the paper's own ratios, which hold for its hardware.
SEVERAL_TIMES = 2.0
#: Resamples of intervals and tests, whatever the profile: the least p must stay below ALPHA after the correction.
RESAMPLES = 10_000
#: Latency of multi over single in the paper, by the number N of decoded tokens.
PAPER_RATIOS = {20: "about 15x", 4: "about 3x"}
#: The notebook that writes each table or record.
PRODUCERS = {
    "grid_per_query": "02_mask_count_ablation", "selected_pair": "02_mask_count_ablation",
    "per_query": "04_evaluation", "oracle_chance": "05_per_query_optimal_k", "claim4_ratios": "06_efficiency",
}  # fmt: skip
#: A column that tables of earlier versions lack.
TYPED = {"oracle_chance": "kind", "claim4_ratios": "count"}
#: The systems that DiffRetriever is compared with after fine-tuning.
OTHERS = ("DiffEmbed", "PromptReps single", "PromptReps multi", "RepLLaMA")

DIFFERENCE, RATIO = "macro difference of nDCG@10", "ratio of latencies"


@dataclass(frozen=True)
class Test:
    """One test of a claim: a statistic and its 95 % interval, held against ``bound`` by the rule.

    Missing numbers are nan, among them p of a ratio or a loss; ``queries`` and ``collections`` are 0 where the table
    does not say.  ``counts``: the claim's verdict depends on the test.  ``paper``: the paper's own value.
    """

    __test__ = False  # no test of pytest's

    claim: int
    comparison: str
    rule: str = "greater"
    statistic: str = DIFFERENCE
    bound: float = 0.0
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    p_corrected: float = math.nan
    queries: int = 0
    collections: int = 0
    counts: bool = True
    paper: str = ""
    note: str = ""
    id: str = ""
    verdict: str = NOT_TESTED


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


class _Missing(Exception):
    """A table or row that a test needs; the message names what makes it."""


def _named(system: str, training: str, mode: str = SELECTION_MODE) -> str:
    """A system in a mode, without the number of tokens that it decodes."""
    return f"{comparison_name(system, training)} ({mode})"


#: The system of claims 5 and 7.
_OURS = _named("DiffRetriever multi", "fine-tuned")


@dataclass
class _Saved:
    """The saved tables, of the out-of-domain collections alone where they have collections."""

    folder: Path
    profile: str
    resamples: int
    seed: int

    def missing(self, what: str, name: str) -> _Missing:
        return _Missing(f"{what}; notebook {PRODUCERS[name]} writes it: make reproduce PROFILE={self.profile}")

    def table(self, name: str) -> pd.DataFrame:
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            raise self.missing(f"tables/{name}.csv is not there", name)
        frame = pd.read_csv(path, dtype={"query_id": str})
        if TYPED.get(name, "") not in ["", *frame]:
            raise self.missing(f"tables/{name}.csv has no column {TYPED[name]}", name)
        if "collection" in frame:
            frame = frame[(frame["metric"] == METRIC) & ~frame["collection"].str.startswith(f"pydocs/{SPLIT_PACKAGE}")]
        return frame

    @cached_property
    def systems(self) -> dict[str, pd.DataFrame]:
        """The rows of ``per_query`` of each system and mode, indexed by collection and query."""
        frame = self.table("per_query").set_index(["collection", "query_id"]).sort_index()
        names = map(_named, frame["system"], frame["training"], frame["mode"])
        return dict(list(frame.groupby(list(names))))

    def values(self, system: str) -> pd.Series:
        """nDCG@10 by collection and query."""
        if system not in self.systems:
            what = f"per_query.csv has no rows of {system}"
            if not any(", fine-tuned (" in name for name in self.systems):
                raise _Missing(f"{what}; no system is fine-tuned in it")
            raise self.missing(what, "per_query")
        return self.systems[system]["value"]

    @cached_property
    def selected(self) -> tuple[int, int]:
        path = self.folder / "run.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "selected_pair" not in run.get("results", {}):
            raise self.missing("run.json has no selected_pair", "selected_pair")
        return tuple(map(int, run["results"]["selected_pair"]))

    @cached_property
    def grid(self) -> pd.DataFrame:
        """Rows of the grid in the mode of the selection, the selected pair among them."""
        cells = self.table("grid_per_query")
        cells = cells[cells["mode"] == SELECTION_MODE]
        if self.selected not in set(zip(cells["k_query"], cells["k_passage"])):
            raise self.missing(f"grid_per_query.csv has no test rows of the pair {self.selected}", "grid_per_query")
        return cells

    def paired(self, test: Test, better: pd.Series, than: pd.Series) -> Test:
        """The test with the macro average of the paired differences."""
        if not better.index.equals(than.index):
            raise self.missing("the two were not evaluated on the same queries", "per_query")
        values = {c: d.to_numpy() for c, d in (better - than).groupby(level="collection")}
        value, low, high = macro_interval(values, self.resamples, self.seed)
        p = macro_randomization_p(values, self.resamples, self.seed)
        return replace(test, value=value, low=low, high=high, p=p, queries=len(better), collections=len(values))


def _compared(saved: _Saved, test: Test) -> list[Test]:
    """The two systems that the test's comparison names."""
    return [saved.paired(test, *map(saved.values, test.comparison.split(" − ")))]


def _ratios(saved: _Saved, test: Test) -> list[Test]:
    """Ratios of latencies, one test a count; of DiffRetriever the most masks decide."""
    system = test.comparison.split()[0]
    rows = saved.table("claim4_ratios").sort_values("count", ascending=False, kind="stable")
    rows = rows[rows["system"] == system].drop_duplicates("count")
    if rows.empty:
        raise saved.missing(f"claim4_ratios.csv has no row of {system}", "claim4_ratios")
    most, masks = rows["count"].max(), system == "DiffRetriever"
    return [
        replace(
            test, comparison=r.comparison, value=r.ratio, low=r.ratio_low, high=r.ratio_high,
            counts=not masks or bool(r.count == most), paper=test.paper if masks else PAPER_RATIOS.get(r.count, ""),
            note=f"vectors of a text: {r.vectors_a:g} against {r.vectors_b:g}",
        )
        for r in rows.itertuples()
    ]  # fmt: skip


def _best_mode(saved: _Saved, system: str) -> str:
    """A fine-tuned system in its best mode in hindsight; in the first if there is none."""
    names = [_named(system, "fine-tuned", mode) for mode in MODES]
    try:
        means = {n: saved.values(n).groupby(level="collection").mean().mean() for n in names if n in saved.systems}
    except _Missing:
        means = {}
    return max(means, key=means.get, default=names[0])


def transfer_losses(values: pd.DataFrame, selected: tuple[int, int], *, splits: int = 100, seed: int = 0):
    """Per-query losses of the selected pair against a collection's own best pair; both choose it where it ties.

    ``values`` has one row a query and one column a pair (Kq, Kp).  Returns two arrays of float, shape (queries,).  The
    first is cross-fitted: the best pair is chosen on the half of the queries that the query is not in, averaged over
    ``splits`` random halvings (too small on average; nan for a single query).  For the second the pair is chosen in
    hindsight, on the queries that it is scored on (too large on average).
    """
    cells = values.to_numpy(float)
    own, n = values.columns.get_loc(selected), len(values)

    def best(rows: np.ndarray | slice) -> int:
        means = cells[rows].mean(0).round(9)  # equal sums may differ in the last digit
        return own if means[own] == means.max() else int(means.argmax())

    hindsight = cells[:, best(slice(None))] - cells[:, own]
    if n < 2:
        return np.full(n, np.nan), hindsight
    cross_fitted, rng = np.zeros(n), np.random.default_rng(seed)
    for _ in range(splits):
        halves = np.array_split(rng.permutation(n), 2)
        for chosen_on, scored_on in (halves, halves[::-1]):
            cross_fitted[scored_on] += cells[scored_on, best(chosen_on)] - cells[scored_on, own]
    return cross_fitted / splits, hindsight


def _losses(saved: _Saved, test: Test) -> list[Test]:
    """The loss of the selected pair: its enclosure, which counts, and the two estimates that enclose it."""
    pair, low, high = saved.selected, {}, {}
    for collection, cells in saved.grid.groupby("collection"):
        values = cells.pivot(index="query_id", columns=PAIR, values="value")
        low[collection], high[collection] = transfer_losses(values, pair, seed=saved.seed)
    test = replace(test, queries=sum(map(len, low.values())), collections=len(low))
    low, high = (macro_interval(losses, saved.resamples, saved.seed) for losses in (low, high))
    both = (low[0] + high[0]) / 2, low[1], high[2]
    ends = "from the lower bound of the cross-fitted to the upper bound of the one in hindsight"
    return [
        replace(
            test, comparison=f"each collection's best pair{name} − selected pair {pair}", counts=note == ends,
            value=value, low=low, high=high, note=f"{note}; zero-shot, {SELECTION_MODE}",
        )
        for name, note, (value, low, high) in (
            (", both estimates", ends, both),
            (", cross-fitted", "too small on average", low),
            (" in hindsight", "too large on average", high),
        )
    ]  # fmt: skip


def _headroom(saved: _Saved, test: Test) -> list[Test]:
    """The oracle's headroom over fixed pairs beyond chance."""
    table = saved.table("oracle_chance")
    rows = table[table["kind"] == "beyond chance"]
    if rows.empty:
        raise saved.missing("oracle_chance.csv has no row beyond chance", "oracle_chance")
    rows = rows.sort_values("reference", key=lambda r: r != "best fixed", kind="stable")
    rows["comparison"] = "oracle, " + rows["quantity"] + " (" + rows["method"] + ")"
    rows["p"] = np.minimum(1.0, 2 * rows["p"])  # one-sided in the table
    best = rows[rows["reference"] == "best fixed"]
    if len(best) > 1:
        both = best.agg({"value": "mean", "low": "min", "high": "max", "p": "max", "queries": "min"}).to_frame().T
        both["comparison"] = "oracle, beyond chance over best fixed (both estimates)"
        rows = pd.concat([both, rows])
    rows = rows[["comparison", "value", "low", "high", "p", "queries"]].astype({"queries": int})
    return [replace(test, **row, counts=i == 0) for i, row in enumerate(rows.to_dict("records"))]


def _fine_tuning(saved: _Saved, test: Test) -> list[Test]:
    """The frozen oracle, less the least and the most that it gains by chance, against fine-tuning."""
    table = saved.table("oracle_chance")
    chance = table[table["kind"] == "chance"]["value"].dropna().clip(lower=0)
    if chance.empty:
        raise saved.missing("oracle_chance.csv has no row of chance", "oracle_chance")
    best = per_query_best(saved.grid).set_index(["collection", "query_id"])["value"].sort_index()
    low, high = (saved.paired(test, best - gain, saved.values(_OURS)) for gain in (chance.max(), chance.min()))
    tuned = tuple(int(k) for k in saved.systems[_OURS][PAIR].iloc[0])
    note = "" if tuned == saved.selected else f"fine-tuned at {tuned}, not at the selected pair {saved.selected}"
    less = f" less {chance.min():.3f} to {chance.max():.3f} by chance − "
    return [replace(
        low, comparison=test.comparison.replace(" − ", less), value=(low.value + high.value) / 2, high=high.high,
        p=max(low.p, high.p) if low.value * high.value > 0 else 1.0, note=note,
    )]  # fmt: skip


def _claim_tests(saved: _Saved) -> list[Test]:
    """All tests of the claims, in their order; one without data has a note that says how to make them."""
    planned: list[tuple[Test, Callable[[_Saved, Test], list[Test]]]] = []
    multi, single = "DiffRetriever multi", "DiffRetriever single"
    trained = [(t, m) for t in ("zero-shot", "fine-tuned") for m in sorted(MODES, key=lambda m: m != SELECTION_MODE)]
    for claim, better, than, rule, bound in (
        (1, single, "DiffEmbed", "greater", 0.0), (2, multi, single, "greater", 0.0),
        (3, "PromptReps multi", "PromptReps single", "no gain", MARGIN),
    ):  # fmt: skip
        for training, mode in trained:
            other = _named(than, training, "dense" if than == "DiffEmbed" else mode)
            comparison = f"{_named(better, training, mode)} − {other}"
            planned.append((Test(claim, comparison, rule, bound=bound, counts=mode == SELECTION_MODE), _compared))
    masks, tokens = (f"{system} multi / single" for system in ("DiffRetriever", "PromptReps"))
    # claim 5: DiffRetriever in the mode chosen beforehand, the others in their best mode in hindsight
    bm25, beyond = f"{_OURS} − {_named('BM25', 'zero-shot', 'sparse')}", "oracle − fixed pair, beyond chance"
    planned += [
        (Test(4, masks, "at most", RATIO, SAME_LATENCY, paper="about 1x"), _ratios),
        (Test(4, tokens, "at least", RATIO, SEVERAL_TIMES, paper="about 15x, 3x"), _ratios),
        *((Test(5, f"{_OURS} − {_best_mode(saved, system)}"), _compared) for system in OTHERS),
        (Test(5, bm25, counts=False, note="not fine-tuned, and reads whole passages"), _compared),
        (Test(6, "each collection's best pair − selected pair", "at most", "macro loss of nDCG@10", MARGIN), _losses),
        (Test(7, beyond, "clear gain", "headroom of nDCG@10", MARGIN, note="over all test collections"), _headroom),
        (Test(7, f"per-query oracle, frozen ({SELECTION_MODE}) − {_OURS}"), _fine_tuning),
    ]
    tests: list[Test] = []
    for test, fill in planned:
        try:
            found = fill(saved, test)
        except _Missing as missing:
            found = [replace(test, note=str(missing))]
        before = sum(t.claim == test.claim for t in tests)
        tests += [replace(t, id=f"{t.claim}{string.ascii_lowercase[before + i]}") for i, t in enumerate(found)]
    return tests


def decide(rule: str, value: float, low: float, high: float, p: float, bound: float = 0.0) -> str:
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

    A test whose table or rows are missing is "not tested", with a note that says which notebook makes them.
    """
    tests = _claim_tests(_Saved(Path(folder), profile_name, resamples, seed))
    corrected = map(float, holm([t.p for t in tests]))
    tests = [
        replace(t, p_corrected=p, verdict=decide(t.rule, t.value, t.low, t.high, p, t.bound))
        for t, p in zip(tests, corrected)
    ]
    claims = []
    texts = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for number, text in enumerate(texts, 1):
        own = [t for t in tests if t.claim == number]
        verdict = combine([t.verdict for t in own if t.counts], needs_all=number > 3)
        text["evidence"] = [name for name in text["evidence"] if (Path(folder) / name).is_file()]
        claims.append(Claim(id=number, verdict=verdict, tests=own, **{"paper": ""} | text))
    return Ledger(profile_name, claims)


def write_claims(ledger: Ledger, path: str | Path) -> None:
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
    return "\n".join([f"{text} *Not shown:* {claim.not_shown}\n", *(f"- {_sentence(test)}" for test in claim.tests)])


def _sentence(test: Test) -> str:
    text = f"{test.id}{'' if test.counts else ' (secondary)'}, {test.comparison}: "
    if test.verdict == NOT_TESTED:
        return f"{text}not tested; {test.note}."
    sign = "" if test.statistic == RATIO else "+"
    text += f"**{test.value:{sign}.3f}** [{test.low:{sign}.3f}, {test.high:{sign}.3f}]"
    text += f", held against {test.bound:g}" if test.rule != "greater" else ""
    text += f", corrected p = {test.p_corrected:.3g}" if not math.isnan(test.p) else ""
    text += f", {test.queries} queries" if test.queries else ""
    text += f", {test.collections} collections" if test.collections else ""
    return f"{text}: {test.verdict}{f' ({test.note})' if test.note else ''}."
