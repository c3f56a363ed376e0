"""Comparisons of backbones, collections, numbers of masks and systems: tables of 01, 02 and 04.

:func:`interval` is the one way in which a macro average is estimated, here, for the oracle and in the claims, and
:func:`paired` the one in which it is tested.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from diffret_lib.data.checks import whole_number
from diffret_lib.data.collection import lexical_overlap
from diffret_lib.experiments.study import TEXT_ONLY, Study, System, macro
from diffret_lib.retrieval.metrics import METRIC, holm, macro_average, macro_randomization_p
from diffret_lib.retrieval.search import MODES, SELECTION_MODE
from diffret_lib.retrieval.systems import BM25

PAIR, QUERY = ["k_query", "k_passage"], ["collection", "query_id"]
Comparison = tuple[str, str, str]
#: nDCG@10 by collection and query, of each system (:func:`comparison_name`) and mode.
Systems = Mapping[tuple[str, str], pd.Series]
#: Resamples of intervals and tests, whatever the profile: a number has one value in every notebook.
RESAMPLES = 10_000
#: Standard errors of the smallest difference that a two-sided test at 5 % finds with 80 % power.
POWER = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
#: The zero-shot form that a fine-tuned system must beat, where it has another name.
ZERO_SHOT_FORM = {"RepLLaMA": "Mean pooling"}


def backbones_table(study: Study) -> pd.DataFrame:
    """The two backbones: sizes, attention, and seconds until they are loaded."""
    rows = []
    for family, attention in (("autoregressive", "causal"), ("diffusion", "both ways")):
        start = time.perf_counter()
        backbone = study.backbone(family)
        model, spec = backbone.model, backbone.spec
        rows.append({
            "backbone": spec.name, "family": family, "parameters (M)": sum(p.numel() for p in model.parameters()) / 1e6,
            "layers": model.config.num_hidden_layers, "hidden size": model.config.hidden_size, "attention": attention,
            "mask token": spec.mask_token or "", "dtype": backbone.dtype,
            "seconds to load": time.perf_counter() - start, "fingerprint": backbone.fingerprint[:12],
        })  # fmt: skip
    return pd.DataFrame(rows)


def collections_table(study: Study) -> pd.DataFrame:
    """The profile's collections, training first: sizes, what queries share with relevant passages, BM25's nDCG@10."""
    rows = []
    for c in [study.train_collection, *study.test_collections]:
        values = study.evaluate(System("BM25", BM25()), [c])
        ndcg = values[values["metric"] == METRIC]["value"].to_numpy().mean()
        rows.append(c.statistics() | lexical_overlap(c) | {"bm25_ndcg@10": float(ndcg)})
    return pd.DataFrame(rows)


def heat_map(grid: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Mean over collections of the mean nDCG@10; rows Kq, columns Kp."""
    return macro(grid_cells(grid, mode), PAIR).pivot(index="k_query", columns="k_passage", values="value")


def grid_cells(grid: pd.DataFrame, mode: str = SELECTION_MODE) -> pd.DataFrame:
    """nDCG@10 in one mode."""
    return grid[(grid["mode"] == mode) & (grid["metric"] == METRIC)]


def held_out_best(cells: np.ndarray, keep: int | None = None) -> np.ndarray:
    """Value, for each query, of the fixed pair that the other half of the queries chooses: no query chooses its own.

    ``cells`` is float [..., queries, pairs], the result [..., queries]; the halves are random, and always the same for
    as many queries.  Of equal means the pair ``keep`` is chosen, else the first.  nan for a single query.
    """
    n, found = cells.shape[-2], np.full(cells.shape[:-1], np.nan)
    halves = np.array_split(np.random.default_rng(0).permutation(n), 2)
    for chosen_on, scored_on in (halves, halves[::-1]) if n > 1 else ():
        means = cells[..., chosen_on, :].mean(-2, dtype=float).round(6)  # equal sums may differ in the last digits
        best = means.argmax(-1)
        if keep is not None:
            best = np.where(means[..., keep] == means.max(-1), keep, best)
        found[..., scored_on] = np.take_along_axis(cells[..., scored_on, :], best[..., None, None], -1)[..., 0]
    return found


def held_out_losses(grid: pd.DataFrame, selected: tuple[int, int]) -> pd.Series:
    """What the selected pair loses against :func:`held_out_best`, indexed by collection and query."""
    values = grid_cells(grid).pivot(index=QUERY, columns=PAIR, values="value")
    place = values.columns.get_loc(selected)
    best = [held_out_best(own.to_numpy(), place) for _, own in values.groupby(level="collection")]
    return np.concatenate(best) - values[selected]


def transfer(grid: pd.DataFrame, selected: tuple[int, int], resamples: int = RESAMPLES) -> pd.DataFrame:
    """The pair selected on training data against each test collection's own best pair (claim 6).

    ``loss`` is against the best pair in hindsight, which its own queries chose and therefore favours; ``held_out_loss``
    against the pair that the other half of the queries chooses, with its 95 % interval (low, high).  Columns
    collection, coverage, queries, selected, best_pair, best, loss, held_out_loss, low, high, single (the pair (1, 1)).
    """
    rows, losses = [], held_out_losses(grid, selected)
    for (collection, coverage), cells in grid_cells(grid).groupby(["collection", "coverage"], sort=False):
        means = cells.groupby(PAIR)["value"].mean()
        best, held_out = means.idxmax(), interval(losses.loc[[collection]], resamples)
        rows.append({
            "collection": collection, "coverage": coverage, "queries": cells["query_id"].nunique(),
            "selected": means[selected], "best_pair": f"({best[0]}, {best[1]})", "best": means[best],
            "loss": means[best] - means[selected], "held_out_loss": held_out["value"], "low": held_out["low"],
            "high": held_out["high"], "single": means[1, 1],
        })  # fmt: skip
    return pd.DataFrame(rows)


def per_query_best(grid: pd.DataFrame) -> pd.DataFrame:
    """Each query's best pair; ties go to the fewest vectors, then to the smallest Kq.

    Columns collection, query_id, k_query, k_passage, value, ties (pairs of the best value).
    """
    cells = grid_cells(grid).assign(cost=lambda d: d["k_query"] * d["k_passage"], loss=lambda d: -d["value"])
    groups = cells.sort_values([*QUERY, "loss", "cost", "k_query"], kind="stable").groupby(QUERY, sort=False)
    best = groups.first()[[*PAIR, "value"]]
    best["ties"] = groups["value"].agg(lambda v: int(np.isclose(v, v.max()).sum()))
    return best.reset_index()


def evaluation_table(per_query: pd.DataFrame) -> pd.DataFrame:
    """Means over queries, for each training, system, family, mode, pair, collection and metric."""
    keys = ["training", "system", "family", "mode", *PAIR, "collection", "metric"]
    table = per_query.groupby([*keys, "coverage"], sort=False, dropna=False)["value"].mean().reset_index()
    table[PAIR] = table[PAIR].astype("Int64")
    return table[[*keys, "value", "coverage"]]


def evaluation_wide(table: pd.DataFrame, out_of_domain: Sequence[str], metric: str = METRIC) -> pd.DataFrame:
    """One row a training, system and mode: the macro average of the out-of-domain collections, then each collection."""
    cells, index = table[table["metric"] == metric], ["training", "system", "mode"]
    wide = cells.pivot_table(index=index, columns="collection", values="value", sort=False)
    wide.insert(0, "macro", wide[list(out_of_domain)].mean(axis=1))
    return wide.rename(columns=lambda c: c.removeprefix("pydocs/")).rename_axis(columns=None).reset_index()


def interval(values: pd.Series, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float]:
    """Estimate the macro average of per-query values or paired differences, indexed by collection and query.

    Returns value and 95 % percentile bootstrap intervals: low, high (queries are resampled within the given
    collections), low_all, high_all (collections are resampled as well).  An interval that cannot be had (one query in a
    collection; one collection) is nan.  ValueError: there is nothing to average over, a value is no number, there are
    fewer than two resamples, or the seed is negative.
    """
    whole_number("resamples", resamples, 2)
    whole_number("seed", seed, 0)
    parts = _parts(values)
    found = dict.fromkeys(("value", "low", "high", "low_all", "high_all"), math.nan) | {"value": macro_average(parts)}
    if math.isnan(found["value"]) or min(map(len, parts.values())) < 2:
        return found
    rng, places = np.random.default_rng(seed), np.arange(resamples)
    means = np.array([_resampled(v, resamples, rng) for v in parts.values()])  # [collections, resamples]
    found["low"], found["high"] = np.quantile(means.mean(0), [0.025, 0.975]).tolist()
    if len(means) > 1:
        # a collection that is drawn twice comes with two different resamples of its queries
        drawn = [means[rng.integers(0, len(means), resamples), rng.permutation(places)] for _ in means]
        found["low_all"], found["high_all"] = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975]).tolist()
    return found


def paired(values: pd.Series, resamples: int = RESAMPLES, seed: int = 0, bound: float = 0.0) -> dict[str, float]:
    """Test the macro average of paired differences, indexed by collection and query.

    Returns the numbers of :func:`interval`; p (two-sided, signs flipped by query, that the average is 0); detectable
    (the smallest distance from ``bound`` that a two-sided test at 5 % finds with 80 % power: 2.8 standard errors);
    needed_queries (how many, in the same proportions, would find the distance that was measured); queries and
    collections.  What cannot be had is nan.
    """
    parts, found = _parts(values), interval(values, resamples, seed)
    found |= dict.fromkeys(("p", "detectable", "needed_queries"), math.nan)
    found |= {"queries": len(values), "collections": len(parts)}
    if not math.isnan(found["low"]):
        error = math.sqrt(sum(v.var(ddof=1) / len(v) for v in parts.values())) / len(parts)
        found["p"], found["detectable"] = macro_randomization_p(parts, resamples, seed), POWER * error
        if (distance := abs(found["value"] - bound)) > 1e-9:
            found["needed_queries"] = float(math.ceil(len(values) * (POWER * error / distance) ** 2))
    return found


def _parts(values: pd.Series) -> dict[str, np.ndarray]:
    try:
        return {name: part.to_numpy(float) for name, part in values.groupby(level="collection")}
    except (TypeError, ValueError) as error:
        raise ValueError(f"the values must be numbers: {error}") from None


def _resampled(values: np.ndarray, resamples: int, rng: np.random.Generator, block: int = 500) -> np.ndarray:
    """Means of resamples of the values, drawn with replacement."""
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([values[rng.integers(0, len(values), (size, len(values)))].mean(1) for size in sizes])


def read_table(path: Path) -> pd.DataFrame:
    """A saved table as it was; a query may be called "001" or "null"."""
    return pd.read_csv(path, dtype={"query_id": str}, keep_default_na=False, na_values=[""])


def by_system(per_query: pd.DataFrame, collections: Sequence[str]) -> Systems:
    """Values of every system and mode on some collections, indexed by collection and query, sorted."""
    cells = per_query[(per_query["metric"] == METRIC) & per_query["collection"].isin(list(collections))]
    names = [comparison_name(*row) for row in zip(cells["system"], cells["training"])]
    cells = cells.assign(name=names).set_index(QUERY).sort_index()
    return dict(list(cells.groupby(["name", "mode"])["value"]))


def differences(systems: Systems, better: tuple[str, str], than: tuple[str, str]) -> pd.Series:
    """Paired differences of two systems, each a name and a mode, indexed by collection and query.

    ValueError: one of them is not among the systems, or they are not of the same queries.
    """
    for name, mode in (better, than):
        if (name, mode) not in systems:
            raise ValueError(f"there is no {name} ({mode}) in the table")
    one, other = systems[better], systems[than]
    if not one.index.equals(other.index):
        raise ValueError(f"{better[0]} and {than[0]} ({than[1]}) were not evaluated on the same queries")
    return one - other


def system_intervals(per_query: pd.DataFrame, collections: Sequence[str], resamples: int = RESAMPLES) -> pd.DataFrame:
    """Macro averages; columns training, system, mode, and those of :func:`interval`."""
    cells = per_query[(per_query["metric"] == METRIC) & per_query["collection"].isin(list(collections))]
    keys = ["training", "system", "mode"]
    groups = cells.set_index("collection").groupby(keys, sort=False)["value"]
    return pd.DataFrame([dict(zip(keys, key)) | interval(own, resamples) for key, own in groups])


def undertrained(per_query: pd.DataFrame, resamples: int = RESAMPLES) -> dict[str, str]:
    """Fine-tuned systems, and modes of others (``"RepLLaMA, fine-tuned (dense)"``), that enter no verdict: the reasons.

    A system is undertrained when it beats its zero-shot form (RepLLaMA, which has none: mean pooling) clearly in none
    of its modes: the 95 % interval of the macro difference, over all collections of the table, must lie above 0.  A
    mode of another system is when the interval lies below 0, and hybrid with it: it is the other side alone.
    """
    systems, reasons = by_system(per_query, per_query["collection"].unique()), {}
    tuned = per_query.loc[per_query["training"] != "zero-shot", ["system", "training"]].drop_duplicates()
    for system, training in tuned.itertuples(index=False):
        name, form = comparison_name(system, training), ZERO_SHOT_FORM.get(system, system)
        modes = [mode for known, mode in systems if known == name and (form, mode) in systems]
        gains = [interval(differences(systems, (name, mode), (form, mode)), resamples) for mode in modes]
        shown = {
            mode: f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] nDCG@10 against {form} ({mode})"
            for mode, gain in zip(modes, gains)
        }
        if gains and not any(gain["low"] > 0 for gain in gains):
            _, best = max(zip(gains, modes), key=lambda gain: gain[0]["value"])
            reasons[name] = f"undertrained: at best {shown[best]}"
            continue
        lost = [mode for mode, gain in zip(modes, gains) if gain["high"] < 0]
        reasons |= {f"{name} ({mode})": f"undertrained: {shown[mode]}" for mode in lost}
        if (sides := {"dense", "sparse"} & {*lost}) and "hybrid" in modes:
            reasons.setdefault(f"{name} (hybrid)", f"its {' and '.join(sorted(sides))} side is undertrained")
    return reasons


def comparison_name(system: str, training: str) -> str:
    """A system's name in comparisons: "DiffEmbed" before its training, "DiffEmbed, fine-tuned" after it."""
    return system if training == "zero-shot" else f"{system}, {training}"


#: Paired comparisons of notebook 04: (better by the paper's claims, than), both in the same mode.
COMPARISONS = (
    ("DiffRetriever single", "DiffEmbed", "dense"),
    *(("DiffRetriever multi", "DiffRetriever single", mode) for mode in MODES),
    *(("PromptReps multi", "PromptReps single", mode) for mode in MODES),
    *(("DiffRetriever single", "PromptReps single", mode) for mode in MODES),
    *(("DiffRetriever multi", "PromptReps multi", mode) for mode in MODES),
)
#: The same on the backbone before it met the retrieval prompt.
TEXT_ONLY_COMPARISONS = tuple(
    (f"{better}{TEXT_ONLY}", f"{than}{TEXT_ONLY}", mode)
    for better, than, mode in COMPARISONS
    if better.startswith("DiffRetriever") and not than.startswith("PromptReps")
)


def planned_comparisons(systems: Sequence[System], left_out: Collection[str] = ()) -> list[Comparison]:
    """Those above, what fine-tuning adds to each system, and the same after it, where both systems are given.

    ``left_out`` are names of systems and of modes (:func:`undertrained`) that are in no comparison.
    """
    several = [f"{name} {form}" for name in ("DiffRetriever", "PromptReps") for form in ("single", "multi")]
    added = [*product(several, MODES), ("DiffEmbed", "dense")]
    after = [*COMPARISONS, *(("DiffRetriever multi", than, "dense") for than in ("DiffEmbed", "RepLLaMA"))]
    planned = [*COMPARISONS, *TEXT_ONLY_COMPARISONS, ("DiffEmbed", "Mean pooling", "dense")]
    planned += [(f"{name}, fine-tuned", name, mode) for name, mode in added]
    planned += [(f"{better}, fine-tuned", f"{than}, fine-tuned", mode) for better, than, mode in after]
    names = {comparison_name(s.name, s.training) for s in systems} - {*left_out}
    return [
        (better, than, mode) for better, than, mode in planned
        if {better, than} <= names and not {f"{better} ({mode})", f"{than} ({mode})"} & {*left_out}
    ]  # fmt: skip


def compare_systems(
    per_query: pd.DataFrame, comparisons: Sequence[Comparison], collections: Sequence[str], resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Paired differences over the queries of several collections, macro-averaged; systems by :func:`comparison_name`.

    Columns better, than, mode, queries, difference, low, high, low_all, high_all, p, p_corrected (by Holm over the
    comparisons), detectable, needed_queries (all as of :func:`paired`) and reading.  Errors are those of
    :func:`differences`.
    """
    systems, rows = by_system(per_query, collections), []
    for better, than, mode in comparisons:
        found = paired(differences(systems, (better, mode), (than, mode)), resamples)
        rows.append({"better": better, "than": than, "mode": mode, "queries": found["queries"]} | found)
    table = pd.DataFrame(rows).rename(columns={"value": "difference"}).drop(columns="collections")
    table.insert(table.columns.get_loc("p") + 1, "p_corrected", holm(table["p"].to_numpy()))
    above, clear = table["difference"] > 0, table["p_corrected"] < 0.05
    table["reading"] = np.select([clear & above, clear & ~above], ["better", "worse"], "no clear difference")
    return table


def evaluation_answer(intervals: pd.DataFrame, comparisons: pd.DataFrame) -> str:
    """Two sentences on :func:`system_intervals` and :func:`compare_systems`: the best systems, and masks zero-shot."""
    values = intervals.set_index("system")["value"]
    models = intervals[~intervals["system"].str.startswith("BM25")]
    best = [models.loc[rows["value"].idxmax()] for _, rows in models.groupby("training", sort=False)]
    subject = "model by macro nDCG@10 is" if len(best) == 1 else "models by macro nDCG@10 are"
    leads = ", and ".join(f"{row['training']} {row['system']} ({row['mode']}) with {row['value']:.3f}" for row in best)
    asked = [("DiffRetriever single", "DiffEmbed", "dense")]
    asked += [("DiffRetriever multi", "DiffRetriever single", mode) for mode in ("dense", "hybrid")]
    rows = comparisons.set_index(["better", "than", "mode"], drop=False).loc[asked]
    gains = [f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}] ({row.mode})" for row in rows.itertuples()]
    return (
        f"Out of domain the best {subject} {leads}; BM25 has {values['BM25']:.3f}, and "
        f"{values['BM25, cut text']:.3f} on the text that the others read. Zero-shot, one mask makes {gains[0]} over "
        f"DiffEmbed, and several masks over one make {gains[1]} and {gains[2]}."
    )


def maxsim_over_mean(intervals: pd.DataFrame) -> str:
    """A sentence on what MaxSim adds to the dot product of the mean vectors, for each system with several vectors."""
    values = intervals.set_index(["system", "training", "mode"])["value"]
    mean = values.xs("mean", level="mode")
    gains = values.xs("dense", level="mode").loc[mean.index] - mean
    said = "; ".join(f"{name}, {training} {gain:+.3f}" for (name, training), gain in gains.items())
    return f"MaxSim adds to macro nDCG@10, over the dot product of the mean vectors: {said}."


def ablation_answer(study: Study, losses: pd.DataFrame, shared: pd.DataFrame) -> str:
    """Two sentences on the grid of the out-of-domain collections.

    ``losses`` is :func:`transfer`, ``shared`` :func:`~diffret_lib.experiments.departures.shared_text_table`.
    """
    names = study.out_of_domain
    cells = macro(study.test_grid[study.test_grid["collection"].isin(names)], [*PAIR, "mode"])
    cells = cells.set_index([*PAIR, "mode"])["value"]
    gain = [cells[(*study.selected, mode)] - cells[1, 1, mode] for mode in ("hybrid", "dense")]
    lost, one_pass = losses[losses["collection"].isin(names)], "every number of masks has a pass of its own"
    if len(shared):
        own = shared[shared["collection"].isin(names) & (shared["mode"] == "hybrid")]
        own = own.groupby("system")["ndcg_reference"].mean()
        apart = own["DiffRetriever multi"] - own["DiffRetriever single"]
        one_pass = f"with a pass of its own for each number of masks (notebook 04) the hybrid gain is {apart:+.3f}"
    return (
        f"Training queries select (Kq, Kp) = {study.selected}, which changes macro nDCG@10 against one vector a side "
        f"by {gain[0]:+.3f} (hybrid) and {gain[1]:+.3f} (dense) over {len(lost)} out-of-domain collections with "
        f"{lost['queries'].sum():,} queries; {one_pass}. It loses {lost['held_out_loss'].mean():.3f} nDCG@10 "
        f"on average against the pair that the other half of each collection's queries would choose "
        f"({lost['loss'].mean():.3f} in hindsight)."
    )
