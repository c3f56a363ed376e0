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


def _three(table: pd.DataFrame, names: tuple[str, str, str] = ("low", "value", "high")) -> pd.DataFrame:
    """Three rows for each: the lower end, the value and the upper end of its interval, in a column "number"."""
    return table.melt(table.columns.drop(list(names)), list(names), value_name="number")


def _forest(ax: Axes, table: pd.DataFrame, y: str, hue: str, looks: dict[str, tuple[str, str]], **style: Any) -> None:
    """Draw a point and its interval for each row of a table with columns value, low and high."""
    palette, markers = ({name: look[i] for name, look in looks.items()} for i in range(2))
    style = {"markersize": 5, "linestyle": "none", "err_kws": {"linewidth": 1.5}} | style
    sns.pointplot(
        _three(table), x="number", y=y, hue=hue, hue_order=list(looks), palette=palette, markers=list(markers.values()),
        ax=ax, **_INTERVAL, **style,
    )  # fmt: skip
    ax.tick_params(axis="y", labelsize=8)
    ax.set(ylabel="")


def _by_p(table: pd.DataFrame, p: str, xlabel: str) -> Figure:
    """Draw a row for each label, in a look of its own where p is below 0.05."""
    looks = {"p < 0.05": ("C0", "o"), "p ≥ 0.05, or no test": ("0.55", "D")}
    clear, unclear = looks
    fig, ax = plt.subplots(figsize=(7.5, 0.36 * len(table) + 1.4))
    _forest(ax, table.assign(test=(table[p] < 0.05).map({True: clear, False: unclear})), "label", "test", looks)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set(xlabel=xlabel)
    _legend_above(ax)
    return fig


def _log_ticks(ax: Axes) -> None:
    """Set a logarithmic x axis with ticks at 1, 2, 5, 10, ... in plain numbers."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _legend_above(ax: Axes, ncols: int = 3) -> None:
    ax.legend(fontsize=8, ncols=ncols, loc="lower center", bbox_to_anchor=(0.5, 1.0))


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
        cells = heat_map(values, mode)
        sns.heatmap(cells, annot=True, fmt=".3f", cmap="cividis", cbar=False, ax=ax, annot_kws={"size": 8})
        ax.set(title=mode, xlabel="vectors per passage, Kp", ylabel="vectors per query, Kq")
    fig.suptitle(f"nDCG@10, zero-shot: {title}", fontsize=11)
    return fig


def effectiveness(table: pd.DataFrame) -> Figure:
    """Macro nDCG@10 of every system and mode with its interval; a panel for each training.

    ``table`` is that of :func:`diffret_lib.experiments.comparison.system_intervals`.
    """
    systems, panels = table["system"].unique(), table["training"].unique()
    size = (1.5 + 5.5 * len(panels), 0.55 * len(systems) + 1.4)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False)
    looks = {mode: (f"C{i}", marker) for i, (mode, marker) in enumerate(_MODE_MARKERS.items())}
    for ax, training in zip(axes[0], panels, strict=True):
        rows = table[table["training"] == training]
        _forest(ax, rows, "system", "mode", looks, order=systems, dodge=0.4)
        ax.set(title=training, xlabel="macro nDCG@10, 95 % bootstrap interval over queries")
        ax.get_legend().remove()
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def forest(comparisons: pd.DataFrame) -> Figure:
    """Paired differences with their intervals, marked where the corrected p is below 0.05."""
    table = comparisons.rename(columns={"difference": "value"})
    table["label"] = table["better"] + " − " + table["than"] + " (" + table["mode"] + ")"
    return _by_p(table, "p_corrected", "difference of nDCG@10, 95 % bootstrap interval")


def oracle(table: pd.DataFrame) -> Figure:
    """Fixed pairs, fine-tuning (where it is known) and the per-query oracle for each collection.

    A line across the oracle's bar marks how far it reaches by chance.
    """
    columns = {"single": "(1, 1)", "selected": "selected pair", "fine_tuned": "selected pair, fine-tuned",
               "best_fixed": "best fixed pair", "oracle": "oracle"}  # fmt: skip
    columns = {c: label for c, label in columns.items() if table[c].notna().any()}
    names = table["collection"].str.removeprefix("pydocs/")
    long = table[list(columns)].rename(columns=columns).assign(collection=names).melt("collection", var_name="pair")
    fig, ax = plt.subplots(figsize=(8.5, 3.8))
    sns.barplot(long, x="collection", y="value", hue="pair", errorbar=None, legend=False, ax=ax)
    for bars, label in zip(ax.containers, columns.values(), strict=True):
        bars.set_label(label)
    reach = table["best_fixed"] + table["chance"]
    if reach.notna().any():
        bars = ax.containers[-1]
        ends = [bar.get_x() for bar in bars], [bar.get_x() + bar.get_width() for bar in bars]
        ax.hlines(reach, *ends, color="black", linewidth=1.5, label="best fixed pair + chance")
    ax.set(ylabel="hybrid nDCG@10")
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
    _legend_above(ax)
    return fig


def distribution(shares: pd.DataFrame) -> Figure:
    """Heat map of the share of queries whose best pair is (Kq, Kp), in percent."""
    fig, ax = plt.subplots(figsize=(4.6, 3.9))
    bar = {"label": "queries", "format": PercentFormatter()}
    sns.heatmap(shares, annot=True, fmt=".0f", cmap="cividis", cbar_kws=bar, ax=ax)
    ax.set(xlabel="vectors per passage, Kp", ylabel="vectors per query, Kq", title="best pair of each query")
    return fig


def claims_forest(tests: pd.DataFrame) -> Figure:
    """Statistic and 95 % interval of every test of the ledger, marked by its verdict.

    Differences and losses stand above, ratios (log scale) below; a tick is the bound that an interval is held
    against; secondary tests are small and pale.
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
    _legend_above(axes[0, 0], 4)
    return fig


def alignment(products: pd.DataFrame, title: str = "") -> Figure:
    """Heat map of the dot products between a query's vectors (rows) and a passage's (columns).

    Each row's maximum is framed; under the title stands their sum, clamped at 0 each: the MaxSim score.
    """

    def plain(text: str) -> str:  # predicted words may hold what matplotlib would read as mathematics
        return text.replace("$", r"\$")

    values, shown = products.to_numpy(), products.rename(index=plain, columns=plain)
    fig, ax = plt.subplots(figsize=(2.6 + 0.62 * products.shape[1], 1.9 + 0.42 * products.shape[0]))
    bar = {"label": "dot product (cosine)"}
    sns.heatmap(shown, annot=True, fmt=".2f", cmap="cividis", annot_kws={"size": 8}, ax=ax, cbar_kws=bar,
                xticklabels=True, yticklabels=True)  # fmt: skip
    for row, column in enumerate(values.argmax(1)):
        ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    plt.setp(ax.get_yticklabels(), rotation=0)
    ax.set(xlabel="masks of the passage and their predicted words", ylabel="masks of the query")
    ax.set_title(f"{plain(title)}\nMaxSim {values.max(1).clip(min=0).sum():.3f}".strip(), fontsize=10)
    return fig


def oracle_chance(table: pd.DataFrame, over: str = "best fixed") -> Figure:
    """The oracle's headroom, the part of it that is chance, and the part beyond, by each estimate of chance."""
    rows = table[table["reference"] == over]
    rows = rows.assign(label=rows["method"] + ": " + rows["kind"] + " (" + rows["queries"].astype(str) + " queries)")
    return _by_p(rows, "p", f"nDCG@10 over the {over} pair, 95 % interval")


def allocator(table: pd.DataFrame) -> Figure:
    """The default Kq, the allocator and the oracle over Kq, for each collection and their mean."""
    columns = {"selected": "default Kq", "adaptive": "allocator", "oracle_kq": "oracle over Kq"}
    names = table["collection"].str.removeprefix("pydocs/")
    long = table[list(columns)].rename(columns=columns).assign(collection=names).melt("collection", var_name="Kq")
    fig, ax = plt.subplots(figsize=(7.5, 0.42 * len(table) + 1.4))
    ax.hlines(names, table["selected"], table["oracle_kq"], color="0.7", linewidth=1)
    sns.scatterplot(long, x="value", y="collection", hue="Kq", style="Kq", markers=["s", "D", "o"], size="Kq",
                    sizes=[110, 35, 50], ax=ax)  # fmt: skip
    ax.set(xlabel="hybrid nDCG@10")
    _legend_above(ax)
    return fig


def _lines(ax: Axes, table: pd.DataFrame, **options: Any) -> None:
    """Draw median latency against the number of vectors, with the quartiles."""
    long = _three(table, ("q1_ms", "median_ms", "q3_ms"))
    sns.lineplot(long, x="vectors", y="number", hue="label", style="label", markers=True, dashes=False, ax=ax,
                 **_INTERVAL, **options)  # fmt: skip
    ax.legend(fontsize=8)


def latency_vectors(latency: pd.DataFrame) -> Figure:
    """Encoding latency of one text against its number of vectors; a panel a side, bands between the quartiles."""
    cells = latency[latency["curve"] == "vectors"]
    decoding = (", " + cells["decoding"]).fillna("")
    cells = cells.assign(label=cells["system"] + decoding)
    sides = cells["side"].unique()
    fig, axes = plt.subplots(1, len(sides), figsize=(5.2 * len(sides), 4.2), squeeze=False)
    for ax, side in zip(axes[0], sides, strict=True):
        own = cells[cells["side"] == side]
        _lines(ax, own)
        ax.set(title=f"one {side} of {own['text_tokens'].iloc[0]} tokens", xlabel="vectors per text", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("latency (ms), median and quartiles")
    return fig


def latency_search(search: pd.DataFrame) -> Figure:
    """Search latency of one query against the number of vectors in the index."""
    timed = search[search["median_ms"].notna()]
    pairs = " (" + timed["k_query"].astype(str) + ", " + timed["k_passage"].astype(str) + ")"
    several = (timed["k_query"] > 1) | (timed["k_passage"] > 1)
    fig, ax = plt.subplots()
    _lines(ax, timed.assign(label=timed["index"] + pairs.where(several, "")), err_style="bars")
    ax.set(xscale="log", yscale="log", xlabel="vectors in the index")
    ax.set_ylabel("latency of one query (ms), median and quartiles")
    return fig


def effectiveness_latency(table: pd.DataFrame) -> Figure:
    """Effectiveness against the latency of a query (the paper's Figure 1); a line joins a system's two trainings."""
    table = table.assign(system=[comparison_name(name, "zero-shot") for name in table["system"]])
    fig, ax = plt.subplots(figsize=(8.5, 5.2))
    point = {"x": "latency_ms", "y": "ndcg", "hue": "system", "ax": ax}
    sns.lineplot(table, **point, estimator=None, sort=False, alpha=0.6, linewidth=1, legend=False)
    sns.scatterplot(table, **point, style="mode", markers=_MODE_MARKERS, size="training",
                    sizes={"zero-shot": 45, "fine-tuned": 130})  # fmt: skip
    _log_ticks(ax)
    ax.set(xlabel=f"latency of a query (ms): encoding, and search over {table['indexed_passages'].max():,} passages")
    ax.set(ylabel="macro nDCG@10, out of domain", ylim=(0, 1))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def training_curves(table: pd.DataFrame) -> Figure:
    """Training loss, and nDCG@10 on the development collection, against the step; step 0 is before training.

    ``table`` is that of :func:`diffret_lib.training.contrastive.learning_curves`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    labels = {"loss": "training loss (nats per query)", "dev_ndcg": "nDCG@10, development collection"}
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for system, rows in table[table[column].notna()].groupby("system", sort=False):
            sns.lineplot(rows, x="step", y=column, label=system, ax=ax, legend=ax is axes[1])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(ylabel=label)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
