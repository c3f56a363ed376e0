"""The tests of the paper's claims, filled from the saved tables; :mod:`diffret_lib.experiments.claims` judges them."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from diffret_lib.config import SPLIT_PACKAGE
from diffret_lib.experiments.comparison import PAIR, comparison_name, per_query_best
from diffret_lib.retrieval.metrics import METRIC, macro_interval, macro_randomization_p
from diffret_lib.retrieval.search import MODES, SELECTION_MODE

#: nDCG@10 that counts as little: 5 % of 0.4, which is not noticeable by Spärck Jones's rule of thumb (1974).
MARGIN = 0.02
#: "About the latency of": up to a quarter more, the usual upper limit of equivalence (as in bioequivalence).
SAME_LATENCY = 1.25
#: "Costs several times as much": twice, well below the paper's own ratios, which hold for its hardware.
SEVERAL_TIMES = 2.0
#: Resamples of intervals and tests, whatever the profile: the least p must stay below ALPHA after the correction.
RESAMPLES = 10_000
#: Random halvings of a collection's queries behind a cross-fitted loss.
SPLITS = 100
#: Start of the names of the training package's collections, which the tests leave out.
IN_DOMAIN = f"pydocs/{SPLIT_PACKAGE}"
#: Latency of multi over single in the paper, by the number N of decoded tokens.
PAPER_RATIOS = {20: "about 15x", 4: "about 3x"}
#: The notebook that writes each table or record.
PRODUCERS = {
    "grid_per_query": "02_mask_count_ablation",
    "selected_pair": "02_mask_count_ablation",
    "per_query": "04_evaluation",
    "oracle_chance": "05_per_query_optimal_k",
    "claim4_ratios": "06_efficiency",
}
#: Columns that say what a row is; tables of earlier versions lack them.
TYPED = {"oracle_chance": ("reference", "kind"), "claim4_ratios": ("system", "count")}
#: The systems that DiffRetriever is compared with after fine-tuning.
OTHERS = ("DiffEmbed", "PromptReps single", "PromptReps multi", "RepLLaMA")

Rule = Literal["greater", "clear gain", "no gain", "at most", "at least"]
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
    rule: Rule = "greater"
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
    verdict: str = "not tested"


# -- what was saved ----------------------------------------------------------------------------------------


class _Missing(Exception):
    """A table or row that a test needs is missing; the message names what makes it."""


class _System(NamedTuple):
    """A system in a mode; the name is without the number of tokens that it decodes."""

    system: str
    training: str
    mode: str = SELECTION_MODE

    def __str__(self) -> str:
        return f"{comparison_name(self.system, self.training)} ({self.mode})"


#: The system of claims 5 and 7.
_OURS = _System("DiffRetriever multi", "fine-tuned")


@dataclass
class _Saved:
    """The saved tables, of the out-of-domain collections alone where they have collections."""

    folder: Path
    profile_name: str
    resamples: int
    seed: int

    def missing(self, what: str, name: str) -> _Missing:
        made = f"notebook {PRODUCERS[name]} writes it: make reproduce PROFILE={self.profile_name}"
        return _Missing(f"{what}; {made}")

    def table(self, name: str) -> pd.DataFrame:
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            raise self.missing(f"tables/{name}.csv is not there", name)
        frame = pd.read_csv(path, dtype={"query_id": str})
        if lacking := [column for column in TYPED.get(name, ()) if column not in frame]:
            raise self.missing(f"tables/{name}.csv has no column {lacking[0]}", name)
        if "collection" in frame:
            frame = frame[(frame["metric"] == METRIC) & ~frame["collection"].str.startswith(IN_DOMAIN)]
        return frame

    @cached_property
    def systems(self) -> dict[_System, pd.DataFrame]:
        """The rows of ``per_query`` of each system and mode."""
        frame = self.table("per_query")
        frame["system"] = [comparison_name(name, "zero-shot") for name in frame["system"]]
        return {_System(*key): rows for key, rows in frame.groupby(list(_System._fields))}

    def values(self, system: _System) -> pd.Series:
        """nDCG@10 by collection and query."""
        if system not in self.systems:
            what = f"per_query.csv has no rows of {system}"
            if {s.training for s in self.systems} == {"zero-shot"}:
                raise _Missing(f"{what}; no system is fine-tuned in it")
            raise self.missing(what, "per_query")
        return self.systems[system].set_index(["collection", "query_id"])["value"].sort_index()

    @cached_property
    def selected(self) -> tuple[int, int]:
        path = self.folder / "run.json"
        run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        pair = run.get("results", {}).get("selected_pair")
        if pair is None:
            raise self.missing("run.json has no selected_pair", "selected_pair")
        return int(pair[0]), int(pair[1])

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


# -- the tests: one that stands if data are missing, and what fills it (with one or several) ----------------

_Tests = Iterator[tuple[Test, Callable[[Test], list[Test]]]]


def _compared(saved: _Saved, test: Test, better: _System, than: _System) -> tuple[Test, Callable[[Test], list[Test]]]:
    test = replace(test, comparison=f"{better} − {than}")
    return test, lambda test: [saved.paired(test, saved.values(better), saved.values(than))]


def _by_training(saved: _Saved, test: Test, better: str, than: str) -> _Tests:
    """Zero-shot and fine-tuned in the mode of the selection, which counts, and in the others."""
    for training in ("zero-shot", "fine-tuned"):
        for mode in (SELECTION_MODE, *(m for m in MODES if m != SELECTION_MODE)):
            other = _System(than, training, "dense" if than == "DiffEmbed" else mode)
            counts = mode == SELECTION_MODE
            yield _compared(saved, replace(test, counts=counts), _System(better, training, mode), other)


def _latency(saved: _Saved) -> _Tests:
    """Ratios of latencies, one test a count; of DiffRetriever the most masks decide."""

    def ratios(system: str, test: Test) -> list[Test]:
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

    for system, rule, bound, paper in (
        ("DiffRetriever", "at most", SAME_LATENCY, "about 1x"),
        ("PromptReps", "at least", SEVERAL_TIMES, "about 15x, 3x"),
    ):
        yield Test(4, f"{system} multi / single", rule, RATIO, bound, paper=paper), partial(ratios, system)


def _strongest(saved: _Saved) -> _Tests:
    """DiffRetriever multi in the mode chosen beforehand, against every other system's best mode in hindsight."""

    def mean(system: _System) -> float:
        try:
            return saved.values(system).groupby(level="collection").mean().mean()
        except _Missing:
            return -math.inf

    for system in OTHERS:
        yield _compared(saved, Test(5, ""), _OURS, max((_System(system, "fine-tuned", m) for m in MODES), key=mean))
    note = "not fine-tuned, and reads whole passages"
    yield _compared(saved, Test(5, "", counts=False, note=note), _OURS, _System("BM25", "zero-shot", "sparse"))


def transfer_losses(
    values: pd.DataFrame, selected: tuple[int, int], *, splits: int = SPLITS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Per-query losses of the selected pair against a collection's own best pair; both choose it where it ties.

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
        The best pair is chosen on the half that the query is not in: too small on average; nan for a single query.
    hindsight : ndarray of float, shape (queries,)
        The best pair is chosen on the queries that it is scored on: too large on average.
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


def _transfer(saved: _Saved) -> _Tests:
    """The loss of the selected pair: its enclosure, which counts, and the two estimates that enclose it."""

    def losses(test: Test) -> list[Test]:
        pair, grids = saved.selected, {}
        for collection, cells in saved.grid.groupby("collection"):
            values = cells.pivot(index="query_id", columns=PAIR, values="value")
            grids[collection] = transfer_losses(values, pair, seed=saved.seed)
        low, high = (
            macro_interval({c: losses[i] for c, losses in grids.items()}, saved.resamples, saved.seed) for i in (0, 1)
        )
        ends = "from the lower bound of the cross-fitted to the upper bound of the one in hindsight"
        test = replace(test, queries=sum(len(own) for own, _ in grids.values()), collections=len(grids))
        return [
            replace(
                test, comparison=f"each collection's best pair{name} − selected pair {pair}", counts=note == ends,
                value=value, low=low, high=high, note=f"{note}; zero-shot, {SELECTION_MODE}",
            )
            for name, note, (value, low, high) in (
                (", both estimates", ends, ((low[0] + high[0]) / 2, low[1], high[2])),
                (", cross-fitted", "too small on average", low),
                (" in hindsight", "too large on average", high),
            )
        ]  # fmt: skip

    yield Test(6, "each collection's best pair − selected pair", "at most", "macro loss of nDCG@10", MARGIN), losses


def _oracle(saved: _Saved) -> _Tests:
    """The oracle's headroom over fixed pairs beyond chance, and the oracle against fine-tuning at the selected pair."""

    def headroom(test: Test) -> list[Test]:
        table = saved.table("oracle_chance")
        rows = table[table["kind"] == "beyond chance"]
        if rows.empty:
            raise saved.missing("oracle_chance.csv has no row beyond chance", "oracle_chance")
        rows = rows.sort_values("reference", key=lambda r: r != "best fixed", kind="stable")
        rows["p"] = np.minimum(1.0, 2 * rows["p"])  # one-sided in the table
        rows["comparison"] = "oracle, " + rows["quantity"] + " (" + rows["method"] + ")"
        best = rows[rows["reference"] == "best fixed"]
        if len(best) > 1:
            both = {"comparison": "oracle, beyond chance over best fixed (both estimates)",
                    "value": best["value"].mean(), "low": best["low"].min(), "high": best["high"].max(),
                    "p": best["p"].max(), "queries": best["queries"].min()}  # fmt: skip
            rows = pd.concat([pd.DataFrame([both]), rows])
        return [
            replace(test, comparison=r.comparison, value=float(r.value), low=float(r.low), high=float(r.high),
                    p=float(r.p), queries=int(r.queries), counts=i == 0)
            for i, r in enumerate(rows.itertuples())
        ]  # fmt: skip

    def fine_tuning(test: Test) -> list[Test]:
        try:
            table = saved.table("oracle_chance")
            chance = table[table["kind"] == "chance"]["value"].dropna().clip(lower=0)
        except _Missing:
            chance = pd.Series(dtype=float)
        least, most = (chance.min(), chance.max()) if len(chance) else (0.0, 0.0)
        best = per_query_best(saved.grid).set_index(["collection", "query_id"])["value"].sort_index()
        ends = [saved.paired(test, best - by_chance, saved.values(_OURS)) for by_chance in (most, least)]
        tuned = tuple(int(k) for k in saved.systems[_OURS][PAIR].iloc[0])
        notes = [f"fine-tuned at {tuned}, not at the selected pair {saved.selected}"] if tuned != saved.selected else []
        less = f" less {least:.3f} to {most:.3f} by chance"
        if not most:
            less, notes = "", [*notes, "the oracle's gain by chance is not known and not taken off"]
        return [replace(
            ends[0], comparison=f"{oracle}{less} − {_OURS}", value=(ends[0].value + ends[1].value) / 2,
            high=ends[1].high, p=max(end.p for end in ends) if ends[0].value * ends[1].value > 0 else 1.0,
            note="; ".join(notes),
        )]  # fmt: skip

    note = "over all test collections"
    beyond = Test(7, "oracle − fixed pair, beyond chance", "clear gain", "headroom of nDCG@10", MARGIN, note=note)
    yield beyond, headroom
    oracle = f"per-query oracle, frozen ({SELECTION_MODE})"
    yield Test(7, f"{oracle} − {_OURS}"), fine_tuning


def claim_tests(folder: Path, profile_name: str, resamples: int, seed: int) -> list[Test]:
    """All tests of the claims 1 to 7, in their order; one without data has a note that says how to make them."""
    saved, tests = _Saved(folder, profile_name, resamples, seed), []
    by_claim = (
        _by_training(saved, Test(1, ""), "DiffRetriever single", "DiffEmbed"),
        _by_training(saved, Test(2, ""), "DiffRetriever multi", "DiffRetriever single"),
        _by_training(saved, Test(3, "", "no gain", bound=MARGIN), "PromptReps multi", "PromptReps single"),
        _latency(saved), _strongest(saved), _transfer(saved), _oracle(saved),
    )  # fmt: skip
    for planned in by_claim:
        own: list[Test] = []
        for test, fill in planned:
            try:
                own += fill(test)
            except _Missing as missing:
                own.append(replace(test, note=str(missing)))
        tests += [replace(test, id=f"{test.claim}{letter}") for test, letter in zip(own, string.ascii_lowercase)]
    return tests
