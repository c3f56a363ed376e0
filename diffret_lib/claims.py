"""The ledger of the paper's seven claims: our tests, their verdicts and what these rest on, from the saved tables.

A claim has one test or several, each with one of these rules, which are the same for every profile.  ``p`` is
two-sided and corrected by Holm over all tests of the ledger that have one; intervals are two-sided at 95 %.

``greater``
    The claim is of a gain.  Supported when the corrected p is below :data:`ALPHA` and the difference is positive,
    contradicted when it is as clear and negative.
``clear gain``
    The claim is of a gain that matters.  As ``greater``, but contradicted when the whole interval lies below
    :data:`MARGIN`: what there is then is little.
``no gain``
    The claim is that there is none, which a p above :data:`ALPHA` cannot show: supported when the whole interval
    lies below :data:`MARGIN`, contradicted when there is a clear positive difference, however small.
``at most``, ``at least``
    The claim is of a size: supported when the whole interval lies on the claimed side of a bound, contradicted
    when it lies on the other.  That is a one-sided test at 2.5 %; a claim is a conjunction of them, so that no
    correction is needed.

Whatever is neither is inconclusive.  A claim is supported when every test that counts is, contradicted when one
that counts is, and inconclusive otherwise.  Tests of other modes stand beside and do not count.  Claims 1 to 3
are tested zero-shot and fine-tuned, on what of both there is; the others need all of their tests.  Tests of
effectiveness are of nDCG@10, averaged over the out-of-domain collections; the oracle's headroom is read from its
table, which covers all test collections.

The loss of claim 6 has no unbiased estimate: against the best pair in hindsight it is too large, against a
cross-fitted one too small.  Its interval runs from the lower bound of the one to the upper bound of the other, so
that neither luck in a collection's best pair nor a poor choice of it decides.  (The rule was first the cross-fitted
estimate alone, and was tightened after a look at a zero-shot grid: a lower bound cannot show that little is lost.)
The same holds of the headroom beyond chance in claim 7: random twins lean to finding nothing, split halves rest on
few queries and lean to finding something, and the interval that counts holds both; its p is the larger one.  Against
fine-tuning the oracle loses the least and the most that it gains by chance.  (These rules too were made after a look
at runs in which the two estimates disagreed.  Random twins alone would have counted, and the most alone would have
been taken off, which made the comparison with fine-tuning say *contradicted*.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from diffret_lib.analysis import PAIR, comparison_name, per_query_best
from diffret_lib.cache import atomic_path
from diffret_lib.evaluation import holm, macro_interval, macro_randomization_p
from diffret_lib.profiles import PROFILES_DIR
from diffret_lib.study import METRIC, MODES, SELECTION_MODE, macro

if TYPE_CHECKING:
    from diffret_lib.reporting import Results

__all__ = ["Claim", "Ledger", "Test", "decide", "describe", "ledger", "transfer_losses", "write_claims"]

SUPPORTED, CONTRADICTED = "supported", "contradicted"
INCONCLUSIVE, NOT_TESTED = "inconclusive at this scale", "not tested"

#: Corrected p-values below it are clear.
ALPHA = 0.05
#: nDCG@10 that counts as little.  By Spärck Jones's rule of thumb (1974) differences below 5 % are not noticeable:
#: 0.02 is 5 % of an nDCG@10 of 0.4, and less of any higher one.
MARGIN = 0.02
#: "About the latency of": up to a quarter more, the usual upper limit of equivalence (in bioequivalence, 0.80 to 1.25).
SAME_LATENCY = 1.25
#: "Costs several times as much": twice, well below the paper's own ratios, which hold for its hardware.
SEVERAL_TIMES = 2.0
#: Resamples of bootstrap intervals and randomisation tests, whatever the profile: the least p that a test can have
#: must stay below ALPHA after the correction.
RESAMPLES = 10_000
#: Random halvings of a collection's queries behind a cross-fitted loss.
SPLITS = 100
#: Collections of the training collection's package, which the tests leave out.
IN_DOMAIN = "pydocs/pandas"
#: Latency of multi over single in the paper, by the number N of decoded tokens.
PAPER_RATIOS = {20: "about 15x", 4: "about 3x"}

Rule = Literal["greater", "clear gain", "no gain", "at most", "at least"]
DIFFERENCE = "macro difference of nDCG@10"
#: The notebook that writes what is read here.
PRODUCERS = {
    "grid_per_query": "02_mask_count",
    "selected_pair": "02_mask_count",
    "per_query": "04_evaluation",
    "oracle_chance": "05_per_query_optimal_k",
    "claim4_ratios": "06_efficiency",
}
TRAININGS = ("zero-shot", "fine-tuned")
#: What DiffRetriever is compared with after fine-tuning.
OTHERS = ("DiffEmbed", "PromptReps single", "PromptReps multi", "RepLLaMA")


@dataclass(frozen=True)
class Test:
    """One test of a claim.

    Attributes
    ----------
    id : str
        The claim's number and a letter.
    comparison, statistic : str
    rule : {"greater", "clear gain", "no gain", "at most", "at least"}
    bound : float
        0 for ``greater``; otherwise what the interval is held against.
    value, low, high : float
        The statistic and its 95 % interval; nan when there is none.
    p, p_corrected : float
        Two-sided, of the difference 0; nan for a ratio or a loss.
    queries, collections : int
        0 where the statistic is not over queries, or the table does not say.
    counts : bool
        Whether the claim's verdict depends on it.
    paper : str
        The paper's own value, if it is known.
    verdict, note : str
    """

    __test__ = False  # no test of pytest's

    claim: int
    comparison: str
    rule: Rule
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
    """A claim of the paper, in our words, with its tests and verdict."""

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
        return rows[["claim", "id", *[c for c in rows if c not in ("claim", "id")]]]

    def verdicts(self) -> pd.DataFrame:
        """One row a claim: claim, statement, verdict, tests (their own verdicts), paper, evidence, not_shown."""
        rows = []
        for c in self.claims:
            tests = "; ".join(f"{t.id} {t.verdict}" for t in c.tests if t.counts)
            rows.append({"claim": c.id, "statement": c.statement, "verdict": c.verdict, "tests": tests,
                         "paper": c.paper, "evidence": ", ".join(c.evidence), "not_shown": c.not_shown})  # fmt: skip
        return pd.DataFrame(rows)

    def as_dict(self) -> dict[str, Any]:
        """What ``claims.json`` holds: plain values, None for what is not a number."""
        rule = {"alpha": ALPHA, "correction": "Holm, over all tests with p", "margin_ndcg@10": MARGIN,
                "same_latency": SAME_LATENCY, "several_times": SEVERAL_TIMES}  # fmt: skip
        return {"profile": self.profile, "rule": rule, "claims": _plain([asdict(c) for c in self.claims])}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


class _Missing(Exception):
    """A table, or rows of it, that a test needs are not there."""


@dataclass
class _Saved:
    """The saved tables, of the out-of-domain collections alone where they have collections."""

    results: Results
    resamples: int
    seed: int
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def how(self, name: str) -> str:
        """How to make what is missing; a table that no notebook writes yet is said to be such."""
        notebook = PRODUCERS[name]
        if not (PROFILES_DIR.parent / f"{notebook}.ipynb").is_file():
            return "the notebooks do not measure it yet"
        command = f"python -m diffret_lib.reproduce {notebook} --profile {self.results.profile_name}"
        return f"notebook {notebook} writes it: {command}"

    def table(self, name: str) -> pd.DataFrame:
        if name not in self._tables:
            path = self.results.tables / f"{name}.csv"
            if not path.is_file():
                raise _Missing(f"tables/{name}.csv is not there; {self.how(name)}")
            frame = pd.read_csv(path, dtype={"query_id": str})
            if name in ("per_query", "grid_per_query"):
                frame = frame[(frame["metric"] == METRIC) & ~frame["collection"].str.startswith(IN_DOMAIN)]
            self._tables[name] = frame
        return self._tables[name]

    @cached_property
    def systems(self) -> pd.DataFrame:
        """``per_query`` with the mode in the system's name, "DiffRetriever multi, fine-tuned (hybrid)"."""
        frame = self.table("per_query")
        names = [f"{comparison_name(s, t)} ({m})" for s, t, m in zip(frame["system"], frame["training"], frame["mode"])]
        return frame[["collection", "query_id", "value"]].assign(system=names)

    @property
    def zero_shot_alone(self) -> bool:
        return set(self.table("per_query")["training"]) == {"zero-shot"}

    @property
    def selected(self) -> tuple[int, int]:
        pair = self.results.run().get("results", {}).get("selected_pair")
        if pair is None:
            raise _Missing(f"run.json has no selected_pair; {self.how('selected_pair')}")
        return int(pair[0]), int(pair[1])

    def grid(self) -> dict[str, pd.DataFrame]:
        """Values of each collection in the mode of the selection; a row a query, a column a pair."""
        cells = self.table("grid_per_query")
        cells = cells[cells["mode"] == SELECTION_MODE]
        if cells.empty or self.selected not in set(zip(cells["k_query"], cells["k_passage"])):
            how = self.how("grid_per_query")
            raise _Missing(f"grid_per_query.csv has no test rows of the pair {self.selected}; {how}")
        return {c: v.pivot(index="query_id", columns=PAIR, values="value") for c, v in cells.groupby("collection")}

    def compare(self, test: Test, better: str, than: str, more: pd.DataFrame | None = None) -> Test:
        """The test, filled with the paired difference of two systems (``more``: a frame of further ones)."""
        frame = self.systems if more is None else pd.concat([self.systems, more], ignore_index=True)
        sides = []
        for name in (better, than):
            cells = frame[frame["system"] == name]
            if cells.empty:
                how = "no system is fine-tuned in it" if self.zero_shot_alone else self.how("per_query")
                raise _Missing(f"per_query.csv has no rows of {name}; {how}")
            sides.append(cells.set_index(["collection", "query_id"])["value"].sort_index())
        if not sides[0].index.equals(sides[1].index):
            raise _Missing(f"{better} and {than} were not evaluated on the same queries; {self.how('per_query')}")
        differences = (sides[0] - sides[1]).groupby(level="collection")
        values = {collection: d.to_numpy() for collection, d in differences}
        value, low, high = macro_interval(values, self.resamples, self.seed)
        p = macro_randomization_p(values, self.resamples, self.seed)
        queries = len(sides[0])
        return replace(test, value=value, low=low, high=high, p=p, queries=queries, collections=len(values))


def _name(system: str, training: str, mode: str) -> str:
    return f"{comparison_name(system, training)} ({mode})"


def _paired(saved: _Saved, claim: int, better: str, than: str, **options: Any) -> Test:
    """A paired comparison of two systems, or what is missing for it."""
    test = Test(claim, f"{better} − {than}", **({"rule": "greater"} | options))
    try:
        return saved.compare(test, better, than)
    except _Missing as missing:
        return replace(test, note=str(missing))


def _by_training(saved: _Saved, claim: int, better: str, than: str, **options: Any) -> Iterator[Test]:
    """Zero-shot and fine-tuned in the mode of the selection, which counts, and in the others beside it."""
    for training in TRAININGS:
        for mode in (SELECTION_MODE, *(m for m in MODES if m != SELECTION_MODE)):
            other = "dense" if than == "DiffEmbed" else mode
            sides = _name(better, training, mode), _name(than, training, other)
            yield _paired(saved, claim, *sides, counts=mode == SELECTION_MODE, **options)


def _single_against_diffembed(saved: _Saved) -> Iterator[Test]:
    return _by_training(saved, 1, "DiffRetriever single", "DiffEmbed")


def _multi_against_single(saved: _Saved) -> Iterator[Test]:
    return _by_training(saved, 2, "DiffRetriever multi", "DiffRetriever single")


def _autoregressive_multi(saved: _Saved) -> Iterator[Test]:
    return _by_training(saved, 3, "PromptReps multi", "PromptReps single", rule="no gain", bound=MARGIN)


def _latency(saved: _Saved) -> Iterator[Test]:
    """The ratios of latencies; the counts are read from the names of the comparisons.

    The most masks decide; fewer stand beside.
    """
    expected = [
        Test(4, "DiffRetriever multi / single", "at most", "ratio of latencies", SAME_LATENCY, paper="about 1x"),
        Test(4, "PromptReps multi / single", "at least", "ratio of latencies", SEVERAL_TIMES, paper="about 15x, 3x"),
    ]
    try:
        ratios = saved.table("claim4_ratios")
    except _Missing as missing:
        yield from (replace(test, note=str(missing)) for test in expected)
        return
    for test, pattern in zip(expected, (r"DiffRetriever.*?\bK\s*=\s*(\d+)", r"PromptReps.*?\bN\s*=\s*(\d+)")):
        counts = ratios["comparison"].str.extract(f"(?i:{pattern})", expand=False).dropna().astype(int)
        counts = counts.sort_values(ascending=False, kind="stable").drop_duplicates()
        if counts.empty:
            yield replace(test, note=f"claim4_ratios.csv has no row of {test.comparison}; {saved.how('claim4_ratios')}")
        for index, count in counts.items():
            row = ratios.loc[index]
            vectors = [f"{row[c]:g}" for c in ("vectors_a", "vectors_b") if c in row and pd.notna(row[c])]
            yield replace(
                test, comparison=str(row["comparison"]),
                value=float(row["ratio"]), low=float(row["ratio_low"]), high=float(row["ratio_high"]),
                paper=test.paper if test.rule == "at most" else PAPER_RATIOS.get(count, ""),
                note=f"vectors of a text: {' against '.join(vectors)}" if len(vectors) == 2 else "",
                counts=test.rule == "at least" or bool(count == counts.max()),
            )  # fmt: skip


def _strongest(saved: _Saved) -> Iterator[Test]:
    """DiffRetriever multi in the mode chosen beforehand, against every other system's best mode in hindsight."""
    ours = _name("DiffRetriever multi", "fine-tuned", SELECTION_MODE)
    try:
        means = macro(saved.systems, ["system"]).set_index("system")["value"]
    except _Missing:
        means = pd.Series(dtype=float)
    for system in OTHERS:
        modes = [n for n in (_name(system, "fine-tuned", mode) for mode in MODES) if n in means]
        than = max(modes, key=means.get) if modes else _name(system, "fine-tuned", "dense")
        yield _paired(saved, 5, ours, than)
    yield _paired(saved, 5, ours, "BM25 (sparse)", counts=False, note="not fine-tuned, and reads whole passages")


def transfer_losses(
    values: pd.DataFrame, selected: tuple[int, int], *, splits: int = SPLITS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Per-query loss of the selected pair against a collection's own best pair, twice.

    Parameters
    ----------
    values : DataFrame, shape (queries, pairs)
        The columns are pairs (Kq, Kp).
    selected : tuple of int
    splits : int
        Random halvings of the queries, over which the cross-fitted losses are averaged.
    seed : int

    Returns
    -------
    cross_fitted : ndarray of float, shape (queries,)
        The best pair is chosen on the half that the query is not in.  A choice has no luck on the queries that it is
        scored on, but a choice from few queries misses the best pair: the mean is too small on average.  (To leave
        one query out at a time has about the same mean at twice the deviation.)
    hindsight : ndarray of float, shape (queries,)
        The best pair is chosen on all queries, those it is scored on among them: the mean is too large on average.

    Both choose the selected pair where it ties.  The first is nan for a single query.
    """
    cells = values.to_numpy(float)
    own = values.columns.get_loc(selected)

    def best(rows: np.ndarray | slice) -> int:
        means = cells[rows].mean(0).round(9)  # equal sums may differ in the last digit
        return own if means[own] == means.max() else int(means.argmax())

    n = len(cells)
    hindsight = cells[:, best(slice(None))] - cells[:, own]
    if n < 2:
        return np.full(n, np.nan), hindsight
    cross_fitted, rng = np.zeros(n), np.random.default_rng(seed)
    for _ in range(splits):
        halves = np.array_split(rng.permutation(n), 2)
        for chosen_on, scored_on in (halves, halves[::-1]):
            cross_fitted[scored_on] += cells[scored_on, best(chosen_on)] - cells[scored_on, own]
    return cross_fitted / splits, hindsight


def _transfer(saved: _Saved) -> Iterator[Test]:
    """The loss of the selected pair: its enclosure, which counts, and the two estimates that enclose it."""
    own = "each collection's best pair"
    names = (f"{own}, both estimates", f"{own}, cross-fitted", f"{own} in hindsight")
    ends = "from the lower bound of the cross-fitted to the upper bound of the one in hindsight"
    notes = (ends, "too small on average", "too large on average")
    options = {"statistic": "macro loss of nDCG@10", "bound": MARGIN}
    tests = [Test(6, f"{name} − selected pair", "at most", counts=i == 0, **options) for i, name in enumerate(names)]
    try:
        pair, grids = saved.selected, saved.grid()
    except _Missing as missing:
        yield from (replace(test, note=str(missing)) for test in tests)
        return
    losses = {c: transfer_losses(values, pair, seed=saved.seed) for c, values in grids.items()}
    low, high = (
        macro_interval({c: loss[i] for c, loss in losses.items()}, saved.resamples, saved.seed) for i in range(2)
    )
    enclosure = (low[0] + high[0]) / 2, low[1], high[2]
    for test, name, note, interval in zip(tests, names, notes, (enclosure, low, high)):
        yield replace(
            test, comparison=f"{name} − selected pair {pair}", value=interval[0], low=interval[1], high=interval[2],
            queries=sum(map(len, grids.values())), collections=len(grids), note=f"{note}; zero-shot, {SELECTION_MODE}",
        )  # fmt: skip


def _headroom(saved: _Saved) -> tuple[list[Test], tuple[float, float]]:
    """The oracle's headroom beyond chance, and the least and the most that it gains by chance.

    Over the best fixed pair there are two estimates; first, and counting, stands the interval that holds both.
    """
    test, unknown = Test(7, "oracle − fixed pair, beyond chance", "clear gain", "headroom of nDCG@10", MARGIN), (0.0, 0.0)
    try:
        table = saved.table("oracle_chance")
    except _Missing as missing:
        return [replace(test, note=str(missing))], unknown
    beyond = table["quantity"].str.contains("beyond chance")
    if not beyond.any():
        return [replace(test, note=f"oracle_chance.csv has no row beyond chance; {saved.how('oracle_chance')}")], unknown
    rows = table[beyond].sort_values("quantity", key=lambda q: ~q.str.contains("best fixed"), kind="stable")
    rows["p"] = np.minimum(1.0, 2 * rows["p"])  # one-sided in the table
    rows["comparison"] = [f"oracle, {row.quantity} ({row.method})" for row in rows.itertuples()]
    best = rows[rows["quantity"].str.contains("best fixed")]
    if len(best) > 1:
        both = {"comparison": "oracle, beyond chance over best fixed (both estimates)", "value": best["value"].mean(),
                "low": best["low"].min(), "high": best["high"].max(), "p": best["p"].max(), "queries": best["queries"].min()}  # fmt: skip
        rows = pd.concat([pd.DataFrame([both]), rows], ignore_index=True)
    tests = [
        replace(
            test, comparison=row.comparison, value=float(row.value), low=float(row.low), high=float(row.high),
            p=float(row.p), queries=int(row.queries), counts=i == 0, note="over all test collections",
        )
        for i, row in enumerate(rows.itertuples())
    ]  # fmt: skip
    chance = table[~beyond & table["quantity"].str.contains("chance|lost")]["value"].dropna().clip(lower=0)
    return tests, (float(chance.min()), float(chance.max())) if len(chance) else unknown


def _oracle(saved: _Saved) -> Iterator[Test]:
    """The oracle against fixed pairs, and against fine-tuning at the selected pair."""
    tests, (least, most) = _headroom(saved)
    yield from tests
    name = f"per-query oracle, frozen ({SELECTION_MODE})"
    than = _name("DiffRetriever multi", "fine-tuned", SELECTION_MODE)
    less = f" less {least:.3f} to {most:.3f} by chance" if most else ""
    test = Test(7, f"{name}{less} − {than}", "greater")
    try:
        pair = saved.selected
        saved.grid()  # checks
        best = per_query_best(saved.table("grid_per_query"))[["collection", "query_id", "value"]].assign(system=name)
        ends = [
            saved.compare(test, name, than, best.assign(value=best["value"] - chance)) for chance in (most, least)
        ]
        agree = ends[0].value * ends[1].value > 0
        p = max(end.p for end in ends) if agree else 1.0
        test = replace(ends[0], value=(ends[0].value + ends[1].value) / 2, high=ends[1].high, p=p)
        rows = saved.table("per_query")
        rows = rows[(rows["training"] == "fine-tuned") & (rows["system"] == "DiffRetriever multi")]
        tuned = tuple(int(k) for k in rows[PAIR].iloc[0])
        note = "" if most else "the oracle's gain by chance is not known and not taken off"
        same = "" if tuned == pair else f"fine-tuned at {tuned}, not at the selected pair {pair}"
        yield replace(test, note="; ".join(filter(None, (same, note))))
    except _Missing as missing:
        yield replace(test, note=str(missing))


@dataclass(frozen=True)
class _Entry:
    """What the ledger says of a claim beforehand."""

    statement: str
    tests: Callable[[_Saved], Iterator[Test]]
    evidence: tuple[str, ...]
    not_shown: str
    paper: str = ""
    needs_all: bool = True


_EVALUATION = ("tables/per_query.csv", "tables/evaluation_ndcg.csv", "figures/effectiveness.png")
_ENTRIES = {
    1: _Entry(
        "DiffRetriever with a single mask is more effective than DiffEmbed on the same diffusion backbone.",
        _single_against_diffembed, _EVALUATION,
        "DiffEmbed has dense vectors only, so the hybrid comparison holds what the lexical weights add; dense against "
        "dense stands beside it. One small backbone: not whether it holds for another.",
        needs_all=False,
    ),
    2: _Entry(
        "With a diffusion backbone, several masks are more effective than one.",
        _multi_against_single, _EVALUATION,
        "One small diffusion backbone instead of two large ones. Multi also asks for 'a few words' where single asks "
        "for one: the gain is of both changes together.",
        needs_all=False,
    ),
    3: _Entry(
        "With an autoregressive backbone, several decoded tokens are not reliably more effective than one.",
        _autoregressive_multi, _EVALUATION,
        "That no gain as large as the margin is plausible does not say that there is none. One small autoregressive "
        "backbone: what a large one decodes may be worth more.",
        needs_all=False,
    ),
    4: _Entry(
        "With a diffusion backbone several vectors are encoded in about the time of one; with an autoregressive one "
        "they take about 15 times as long at N = 20 decoded tokens (zero-shot) and 3 times at N = 4 (fine-tuned).",
        _latency, ("tables/claim4_ratios.csv",),
        "Ratios are those of one machine, one model size and the lengths that were timed. What is tested is 'about "
        "the same' and 'several times', not the figures 15 and 3.",
        paper="about 1x for masks; about 15x at N = 20, about 3x at N = 4",
    ),
    5: _Entry(
        "After fine-tuning, DiffRetriever is the most effective of the compared systems on the whole.",
        _strongest, _EVALUATION,
        "The others have their best mode in hindsight, which favours them; DiffRetriever has its mode chosen before. "
        "Fine-tuning is short and on documentation alone; with more, the order can be another.",
    ),
    6: _Entry(
        "A pair of counts chosen on training data transfers: little is lost against each test set's own best pair.",
        _transfer, ("tables/transfer.csv", "tables/grid_per_query.csv", "figures/grid_test.png"),
        "The two estimates enclose the loss on average, not in every sample. All collections are Python "
        "documentation, so that transfer to another kind of text is not tested.",
        paper="selected pairs (Kq, Kp): Dream (4, 16), LLaDA (4, 4)",
    ),
    7: _Entry(
        "The best pair varies by query: a per-query oracle leaves clear headroom over any fixed pair, and on a frozen "
        "backbone is above fine-tuning at the same pair.",
        _oracle,
        ("tables/oracle_chance.csv", "tables/oracle.csv", "tables/grid_per_query.csv", "figures/oracle_chance.png"),
        "Beyond chance is less than the raw headroom that the paper reports (tables/oracle.csv), and says that the pair "
        "matters to the query, not that it needs so many vectors: random weights show some too. Headroom that exists need "
        "not be predictable without the judgements. The comparison with fine-tuning also "
        "depends on how much fine-tuning adds.",
    ),
}  # fmt: skip


def ledger(results: Results, *, resamples: int = RESAMPLES, seed: int = 0) -> Ledger:
    """Test every claim on the saved tables of a profile.

    Parameters
    ----------
    results : Results
        Of which ``tables/*.csv`` and ``run.json`` are read.
    resamples : int
        Of bootstrap intervals and randomisation tests.
    seed : int

    Returns
    -------
    Ledger
        A test whose table or rows are missing has the verdict "not tested", and a note that names the notebook and
        the command which make them.
    """
    saved = _Saved(results, resamples, seed)
    tests = []
    for number, entry in _ENTRIES.items():
        tests += [replace(t, id=f"{number}{chr(ord('a') + i)}") for i, t in enumerate(entry.tests(saved))]
    corrected = holm([t.p for t in tests])
    tests = [replace(t, p_corrected=float(p)) for t, p in zip(tests, corrected)]
    tests = [replace(t, verdict=decide(t.rule, t.value, t.low, t.high, t.p_corrected, t.bound)) for t in tests]
    claims = []
    for number, entry in _ENTRIES.items():
        own = [t for t in tests if t.claim == number]
        verdict = combine([t.verdict for t in own if t.counts], entry.needs_all)
        evidence = [name for name in entry.evidence if (results.folder / name).is_file()]
        claims.append(Claim(number, entry.statement, verdict, entry.paper, own, evidence, entry.not_shown))
    return Ledger(results.profile_name, claims)


def write_claims(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    """Write the ledger as JSON, whole or not at all; the same ledger gives the same bytes."""
    text = json.dumps(ledger.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")


def describe(claim: Claim) -> str:
    """A claim and its tests as a paragraph of Markdown."""
    lines = [f"**Claim {claim.id}: {claim.verdict}.** {claim.statement}"]
    if claim.paper:
        lines[0] += f" The paper's own: {claim.paper}."
    counted = [t for t in claim.tests if t.counts]
    if len(counted) > 1:
        together = ", ".join(t.id for t in counted)
        lines[0] += f" The verdict takes {together} together: supported if each is, contradicted if one is."
    lines[0] += f" *Not shown:* {claim.not_shown}"
    return "\n".join([lines[0], "", *(f"- {_sentence(test)}" for test in claim.tests)])


def _sentence(test: Test) -> str:
    beside = "" if test.counts else " (beside)"
    head = f"{test.id}{beside}, {test.comparison}: "
    if test.verdict == NOT_TESTED:
        return f"{head}not tested; {test.note}."
    sign = "" if "ratio" in test.statistic else "+"
    parts = [f"**{test.value:{sign}.3f}** [{test.low:{sign}.3f}, {test.high:{sign}.3f}]"]
    if test.rule != "greater":
        parts.append(f"held against {test.bound:g}")
    if not math.isnan(test.p):
        parts.append(f"corrected p = {test.p_corrected:.3g}")
    if test.queries:
        parts.append(f"{test.queries} queries" + (f", {test.collections} collections" if test.collections else ""))
    return f"{head}{', '.join(parts)}: {test.verdict}{f' ({test.note})' if test.note else ''}."
