"""Figures of the notebooks; each takes a table and gives a matplotlib figure."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from diffret_lib.experiments.claims import CONTRADICTED, INCONCLUSIVE, RATIO, SUPPORTED
from diffret_lib.experiments.comparison import comparison_name, heat_map
from diffret_lib.retrieval.search import MODES

_MODE_MARKERS = {"dense": "o", "sparse": "s", "hybrid": "D"}
#: Colour and marker of each verdict.
_VERDICTS = {SUPPORTED: ("C2", "o"), CONTRADICTED: ("C3", "X"), INCONCLUSIVE: ("0.45", "D")}
#: How seaborn draws a value and its interval from rows of their three numbers: the one in the middle, and all.
_INTERVAL: dict[str, Any] = {"estimator": "median", "errorbar": ("pi", 100)}
_HEAT: dict[str, Any] = {"annot": True, "cmap": "cividis"}
_PAIR_AXES = {"xlabel": "vectors per passage, Kp", "ylabel": "vectors per query, Kq"}
_ABOVE = {"fontsize": 8, "ncols": 4, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
_BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}


def _three(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Three rows for each: the lower end, the value and the upper end of its interval, in a column "number"."""
    return table.melt(table.columns.drop(list(names)), list(names), value_name="number")


def _forest(ax: Axes, table: pd.DataFrame, y: str, hue: str, looks: dict[str, tuple[str, str]], **style: Any) -> None:
    """Draw a point and its interval for each row of a table with columns value, low and high."""
    colours, markers = zip(*looks.values())
    hues = {"hue": hue, "hue_order": list(looks), "palette": list(colours), "markers": list(markers)}
    style = {"markersize": 5, "linestyle": "none", "err_kws": {"linewidth": 1.5}} | _INTERVAL | style
    sns.pointplot(_three(table, "low", "value", "high"), x="number", y=y, ax=ax, **hues, **style)
    ax.tick_params(axis="y", labelsize=8)
    ax.set(ylabel="")


def _by_p(table: pd.DataFrame, p: str, xlabel: str) -> Figure:
    """Draw a row for each label, in a look of its own where p is below 0.05."""
    looks = {"p < 0.05": ("C0", "o"), "p ≥ 0.05, or no test": ("0.55", "D")}
    fig, ax = plt.subplots(figsize=(7.5, 0.36 * len(table) + 1.4))
    _forest(ax, table.assign(test=(table[p] < 0.05).map(dict(zip((True, False), looks)))), "label", "test", looks)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set(xlabel=xlabel)
    ax.legend(**_ABOVE)
    return fig


def _log_ticks(ax: Axes) -> None:
    """Set a logarithmic x axis with ticks at 1, 2, 5, 10, ... in plain numbers."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _by_collection(table: pd.DataFrame, labels: dict[str, str], name: str) -> pd.DataFrame:
    """A row for each collection and column of ``labels``."""
    collection = table["collection"].str.removeprefix("pydocs/")
    return table[list(labels)].rename(columns=labels).assign(collection=collection).melt("collection", var_name=name)


def curves(log: dict) -> Figure:
    """Training loss and held-out cross-entropy against the tokens seen, stages one after another."""
    table = pd.DataFrame(log["curve"]).reindex(columns=["stage", "tokens_seen", "loss", "held_out"])
    before = table.groupby("stage", sort=False)["tokens_seen"].last().cumsum().shift(fill_value=0)
    table["thousands"] = (table["tokens_seen"] + table["stage"].map(before)) / 1000
    fig, ax = plt.subplots(figsize=(7, 4))
    for stage, rows in table[table["loss"].notna()].groupby("stage", sort=False):
        sns.lineplot(x=rows["thousands"], y=rows["loss"].astype(float), lw=0.9, label=f"training, {stage}", ax=ax)
    held_out = table[table["held_out"].notna()].set_index("thousands")["held_out"]
    for ratio, losses in pd.DataFrame(list(held_out), held_out.index).items():
        sns.lineplot(losses, marker="o", label=f"held out, {float(ratio):.0%} masked", ax=ax)
    ax.set(xlabel="tokens seen (thousands)", ylabel="cross-entropy (nats per masked token)")
    ax.legend(fontsize=8)
    return fig


def grid(values: pd.DataFrame, title: str) -> Figure:
    """Heat maps of nDCG@10 over (Kq, Kp), one for each mode."""
    fig, axes = plt.subplots(1, len(MODES), figsize=(4.2 * len(MODES), 3.9))
    for ax, mode in zip(axes, MODES, strict=True):
        sns.heatmap(heat_map(values, mode), fmt=".3f", cbar=False, ax=ax, annot_kws={"size": 8}, **_HEAT)
        ax.set(title=mode, **_PAIR_AXES)
    fig.suptitle(f"nDCG@10, zero-shot: {title}", fontsize=11)
    return fig


def effectiveness(table: pd.DataFrame) -> Figure:
    """Macro nDCG@10 of every system and mode with its interval; a panel for each training."""
    systems, panels = table["system"].unique(), table["training"].unique()
    size = (1.5 + 5.5 * len(panels), 0.55 * len(systems) + 1.4)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False)
    looks = dict(zip(_MODE_MARKERS, zip(("C0", "C1", "C2"), _MODE_MARKERS.values())))
    for ax, training in zip(axes[0], panels, strict=True):
        _forest(ax, table[table["training"] == training], "system", "mode", looks, order=systems, dodge=0.4)
        ax.set(title=training, xlabel="macro nDCG@10, 95 % bootstrap interval over queries")
        ax.get_legend().remove()
    axes[0, -1].legend(**_BESIDE)
    return fig


def forest(comparisons: pd.DataFrame) -> Figure:
    """Paired differences with their intervals, marked where the corrected p is below 0.05."""
    table = comparisons.rename(columns={"difference": "value"})
    table["label"] = table["better"] + " − " + table["than"] + " (" + table["mode"] + ")"
    return _by_p(table, "p_corrected", "difference of nDCG@10, 95 % bootstrap interval")


def oracle(table: pd.DataFrame) -> Figure:
    """Fixed pairs, fine-tuning (where known) and the oracle, with a line at its reach by chance, by collection."""
    labels = {"single": "(1, 1)", "selected": "selected pair", "fine_tuned": "selected pair, fine-tuned",
              "best_fixed": "best fixed pair", "oracle": "oracle"}  # fmt: skip
    labels = {c: label for c, label in labels.items() if table[c].notna().any()}
    fig, ax = plt.subplots(figsize=(8.5, 3.8))
    rows = _by_collection(table, labels, "pair")
    sns.barplot(rows, x="collection", y="value", hue="pair", errorbar=None, legend=False, ax=ax)
    for bars, label in zip(ax.containers, labels.values(), strict=True):
        bars.set_label(label)
    reach = table["best_fixed"] + table["chance"]
    if reach.notna().any():
        ends = zip(*((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.containers[-1]))
        ax.hlines(reach, *ends, color="black", linewidth=1.5, label="best fixed pair + chance")
    ax.set(ylabel="hybrid nDCG@10")
    ax.set_xticks(range(len(table)), rows["collection"][: len(table)], rotation=20, ha="right")
    ax.legend(**_ABOVE)
    return fig


def distribution(shares: pd.DataFrame) -> Figure:
    """Heat map of the share of queries whose best pair is (Kq, Kp), in percent."""
    fig, ax = plt.subplots(figsize=(4.6, 3.9))
    sns.heatmap(shares, fmt=".0f", cbar_kws={"label": "queries", "format": PercentFormatter()}, ax=ax, **_HEAT)
    ax.set(title="best pair of each query", **_PAIR_AXES)
    return fig


def claims_forest(tests: pd.DataFrame) -> Figure:
    """Statistic and 95 % interval of every test of the ledger, marked by its verdict; ratios have a panel of their own.

    A tick is the bound that an interval is held against; secondary tests are small and pale.
    """
    tested = tests[tests["verdict"].isin(list(_VERDICTS))]
    tested = tested.assign(label=tested["id"] + "  " + tested["comparison"])
    ratio = tested["statistic"] == RATIO
    panels = [(tested[~ratio], "nDCG@10", 0), (tested[ratio], RATIO, 1)]
    panels = [panel for panel in panels if len(panel[0])] or panels[:1]
    heights = [len(rows) + 1.5 for rows, *_ in panels]
    size = (10, 0.27 * sum(heights) + 1.4)
    fig, axes = plt.subplots(len(panels), 1, figsize=size, height_ratios=heights, squeeze=False)
    for ax, (rows, unit, nothing) in zip(axes[:, 0], panels, strict=True):
        for counts, style in ((True, {"markersize": 7}), (False, {"markersize": 4, "alpha": 0.55})):
            if (own := rows[rows["counts"] == counts]).size:
                _forest(ax, own, "label", "verdict", _VERDICTS, order=rows["label"], legend=False, **style)
        bounds = rows[rows["bound"] != 0]
        ax.plot(bounds["bound"], bounds["label"], "|", markersize=12, color="0.2")
        ax.axvline(nothing, color="0.4", linewidth=0.8)
        if unit == RATIO:
            _log_ticks(ax)
        ax.set(xlabel=f"{unit}, value and 95 % interval", ylim=(len(rows) - 0.4, -0.6))
    for name, (colour, marker) in (_VERDICTS | {"bound": ("0.2", "|")}).items():
        axes[0, 0].plot([], [], marker, color=colour, label=name)
    axes[0, 0].legend(**_ABOVE)
    return fig


def alignment(products: pd.DataFrame, title: str = "") -> Figure:
    """Dot products of a query's vectors (rows) and a passage's; MaxSim sums the framed maxima above 0."""
    values = products.to_numpy()
    fig, ax = plt.subplots(figsize=(2.6 + 0.62 * products.shape[1], 1.9 + 0.42 * products.shape[0]))
    ticks = {"xticklabels": True, "yticklabels": True, "annot_kws": {"size": 8}}
    sns.heatmap(products, fmt=".2f", ax=ax, cbar_kws={"label": "dot product (cosine)"}, **ticks, **_HEAT)
    for row, column in enumerate(values.argmax(1)):
        ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    plt.setp(ax.get_yticklabels(), rotation=0)
    # words may hold what matplotlib would read as mathematics
    plt.setp([ax.title, *ax.get_xticklabels(), *ax.get_yticklabels()], parse_math=False)
    ax.set(xlabel="masks of the passage and their predicted words", ylabel="masks of the query")
    ax.set_title(f"{title}\nMaxSim {values.max(1).clip(min=0).sum():.3f}".strip(), fontsize=10)
    return fig


def oracle_chance(table: pd.DataFrame) -> Figure:
    """The oracle's headroom, the part of it that is chance, and the part beyond, by each estimate of chance."""
    rows = table[table["reference"] == "best fixed"]
    rows = rows.assign(label=rows["method"] + ": " + rows["kind"] + " (" + rows["queries"].astype(str) + " queries)")
    return _by_p(rows, "p", "nDCG@10 over the best fixed pair, 95 % interval")


def allocator(table: pd.DataFrame) -> Figure:
    """The default Kq, the allocator and the oracle over Kq, for each collection and their mean."""
    labels = {"selected": "default Kq", "adaptive": "allocator", "oracle_kq": "oracle over Kq"}
    rows = _by_collection(table, labels, "Kq")
    fig, ax = plt.subplots(figsize=(7.5, 0.42 * len(table) + 1.4))
    ax.hlines(rows["collection"][: len(table)], table["selected"], table["oracle_kq"], color="0.7", linewidth=1)
    looks = {"hue": "Kq", "style": "Kq", "markers": ["s", "D", "o"], "size": "Kq", "sizes": [110, 35, 50]}
    sns.scatterplot(rows, x="value", y="collection", ax=ax, **looks)
    ax.set(xlabel="hybrid nDCG@10")
    ax.legend(**_ABOVE)
    return fig


def _lines(ax: Axes, table: pd.DataFrame, **options: Any) -> None:
    """Draw median latency against the number of vectors, with the quartiles."""
    looks = {"hue": "label", "style": "label", "markers": True, "dashes": False} | _INTERVAL | options
    sns.lineplot(_three(table, "q1_ms", "median_ms", "q3_ms"), x="vectors", y="number", ax=ax, **looks)
    ax.set(ylabel="latency (ms), median and quartiles")
    ax.legend(fontsize=8)


def latency_vectors(latency: pd.DataFrame) -> Figure:
    """Encoding latency of one text against its number of vectors; a panel a side, bands between the quartiles."""
    cells = latency[latency["curve"] == "vectors"]
    cells = cells.assign(label=cells["system"] + (", " + cells["decoding"]).fillna(""))
    sides = cells["side"].unique()
    fig, axes = plt.subplots(1, len(sides), figsize=(5.2 * len(sides), 4.2), squeeze=False)
    for ax, side in zip(axes[0], sides, strict=True):
        own = cells[cells["side"] == side]
        _lines(ax, own)
        ax.set(title=f"one {side} of {own['text_tokens'].iloc[0]} tokens", xlabel="vectors per text", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


def latency_search(search: pd.DataFrame) -> Figure:
    """Search latency of one query against the number of vectors in the index."""
    timed = search[search["median_ms"].notna()]
    pairs = [f" ({q}, {p})" if max(q, p) > 1 else "" for q, p in zip(timed["k_query"], timed["k_passage"])]
    fig, ax = plt.subplots()
    _lines(ax, timed.assign(label=timed["index"] + pairs), err_style="bars")
    ax.set(xscale="log", yscale="log", xlabel="vectors in the index", title="one query")
    return fig


def effectiveness_latency(table: pd.DataFrame) -> Figure:
    """Effectiveness against the latency of a query (the paper's Figure 1); a line joins a system's two trainings."""
    table = table.assign(system=[comparison_name(name, "zero-shot") for name in table["system"]])
    fig, ax = plt.subplots(figsize=(8.5, 5.2))
    point = {"x": "latency_ms", "y": "ndcg", "hue": "system", "ax": ax}
    sns.lineplot(table, **point, estimator=None, sort=False, alpha=0.6, linewidth=1, legend=False)
    sizes = {"zero-shot": 45, "fine-tuned": 130}
    sns.scatterplot(table, **point, style="mode", markers=_MODE_MARKERS, size="training", sizes=sizes)
    _log_ticks(ax)
    xlabel = f"latency of a query (ms): encoding, and search over {table['indexed_passages'].max():,} passages"
    ax.set(xlabel=xlabel, ylabel="macro nDCG@10, out of domain", ylim=(0, 1))
    ax.legend(fontsize=8, **_BESIDE)
    return fig


def training_curves(table: pd.DataFrame) -> Figure:
    """Training loss, and nDCG@10 on the development collection, against the step; step 0 is before training."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    labels = {"loss": "training loss (nats per query)", "dev_ndcg": "nDCG@10, development collection"}
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for system, rows in table[table[column].notna()].groupby("system", sort=False):
            sns.lineplot(rows, x="step", y=column, label=system, ax=ax, legend=ax is axes[1])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(ylabel=label)
    axes[1].legend(fontsize=8, **_BESIDE)
    return fig
