"""Figures of the notebooks; each takes a table and gives a matplotlib figure that is readable in one column."""

from __future__ import annotations

import textwrap
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from seaborn.utils import relative_luminance

from diffret_lib.experiments.claims import CONTRADICTED, INCONCLUSIVE, RATIO, SUPPORTED
from diffret_lib.experiments.comparison import heat_map
from diffret_lib.experiments.efficiency import ENCODING, FORCED
from diffret_lib.retrieval.metrics import METRIC
from diffret_lib.retrieval.search import RANK_MODES, SELECTION_MODE

#: Inches across: a column of a paper is a little narrower, a phone shows all of it.
WIDTH = 4.2
_MODES = {"hybrid": ("C0", "D"), "dense": ("C1", "o"), "mean": ("C4", "^"), "sparse": ("C2", "s")}
#: Colour of each method, whatever its number of vectors.
_METHODS = {"BM25": "0.3", "Mean pooling": "C4", "PromptReps": "C1", "DiffEmbed": "C2", "RepLLaMA": "C3",
            "DiffRetriever": "C0"}  # fmt: skip
_FORMS = {"single": "o", "multi": "D"}
#: Colour and marker of each verdict.
_VERDICTS = {SUPPORTED: ("C2", "o"), CONTRADICTED: ("C3", "X"), INCONCLUSIVE: ("0.45", "D")}
#: How seaborn draws a value and its interval from rows of their three numbers: the one in the middle, and all.
_INTERVAL: dict[str, Any] = {"estimator": "median", "errorbar": ("pi", 100)}
_PAIR_AXES = {"xlabel": "vectors per passage, Kp", "ylabel": "vectors per query, Kq"}


def _panels(n: int, height: float | list[float], columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``n`` panels in columns, and its axes; the height of a panel (inches) is that of all, or a list."""
    rows = -(-n // columns)
    heights = height if isinstance(height, list) else [height] * rows
    options |= {"figsize": (WIDTH, sum(heights) + 0.5), "height_ratios": heights, "squeeze": False}
    fig, axes = plt.subplots(rows, columns, **options)
    for ax in axes.flat[n:]:
        ax.set_axis_off()
    return fig, axes.flat[:n]


def _legend(fig: Figure, ax: Axes, columns: int = 3) -> None:
    """Put the legend of a panel below the figure, whatever the panels have in common once, and nowhere else."""
    known = dict(zip(*ax.get_legend_handles_labels()[::-1]))
    for heading in {"method", "form"} & set(known):  # a mark, or a colour, says which it is
        del known[heading]
    for panel in fig.axes:
        if panel.get_legend():
            panel.get_legend().remove()
    fig.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns, columnspacing=1.2)


def _three(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Three rows for each: the lower end, the value and the upper end of its interval, in a column "number"."""
    ends = table.assign(**{name: table[name].fillna(table[names[1]]) for name in names})
    return ends.melt(table.columns.drop(list(names)), list(names), value_name="number")


def _forest(ax: Axes, table: pd.DataFrame, y: str, hue: str, looks: dict[str, tuple[str, str]], **style: Any) -> None:
    """Draw a point and its interval for each row of a table with columns value, low and high."""
    colours, markers = zip(*looks.values())
    hues = {"hue": hue, "hue_order": list(looks), "palette": list(colours), "markers": list(markers)}
    style = {"markersize": 4.5, "linestyle": "none", "err_kws": {"linewidth": 1.2}} | _INTERVAL | style
    sns.pointplot(_three(table, "low", "value", "high"), x="number", y=y, ax=ax, **hues, **style)
    ax.set(ylabel="")


def _wrapped(labels: pd.Series, width: int) -> pd.Series:
    return labels.map(lambda label: textwrap.fill(label, width, break_on_hyphens=False))


def _log_ticks(ax: Axes, name: str = "x") -> None:
    """Set a logarithmic axis with ticks at 1, 2, 5, 10, ... in plain numbers."""
    ax.set(**{f"{name}scale": "log"})
    axis = ax.xaxis if name == "x" else ax.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,), numticks=20))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


def _measured_ticks(ax: Axes, values: pd.Series, apart: float = 1.0) -> None:
    """Set ticks of the x axis at the measured values; of values within a factor ``apart`` the smallest."""
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value > apart * ticks[-1]:
            ticks.append(value)
    ax.set_xticks(ticks, [f"{value:,}" for value in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _contrast(ax: Axes) -> None:
    """Set the numbers of a heat map in black or white, whichever stands out more from its cell."""
    for text, colour in zip(ax.texts, ax.collections[0].get_facecolors()):
        text.set_color("black" if relative_luminance(colour) > 0.18 else "white")


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """Columns method and form (single, multi) of the systems of a table; those of another backbone are left out."""
    method = table["system"].str.replace(r" (single|multi)$", "", regex=True)
    form = np.where(table["system"].str.endswith("multi"), "multi", "single")
    return table.assign(method=method, form=form)[method.isin(list(_METHODS))]


def curves(log: dict) -> Figure:
    """Training loss and held-out cross-entropies against the tokens seen, stages one after another.

    A record of ``log["curve"]`` has stage, tokens_seen, loss, and keys that begin with "held_out": {ratio: loss}.
    """
    table = pd.DataFrame(log["curve"])
    held_out = [column for column in table if column.startswith("held_out")]
    before = table.groupby("stage", sort=False)["tokens_seen"].last().cumsum().shift(fill_value=0)
    table["thousands"] = (table["tokens_seen"] + table["stage"].map(before)) / 1000
    fig, axes = _panels(1 + len(held_out), 2.0, sharex=True)
    trained = table.dropna(subset="loss")
    marker = "o" if len(trained) < 20 else None
    sns.lineplot(trained, x="thousands", y="loss", hue="stage", linewidth=0.9, marker=marker, ax=axes[0])
    axes[0].legend(title="", loc="upper right")
    axes[0].set(title="training")
    for ax, column in zip(axes[1:], held_out):
        rows = table[table[column].notna()]
        losses = pd.DataFrame(list(rows[column]), rows["thousands"]).rename(columns=lambda r: f"{float(r):.0%} masked")
        sns.lineplot(losses, markers=True, dashes=False, ax=ax)
        ax.set(title=column.replace("_", " "))
    for ax in axes:
        ax.set(xlabel="tokens seen (thousands)", ylabel="nats per masked token")
    return fig


def _grid_maps(values: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {mode: heat_map(values, mode) for mode in RANK_MODES if mode in set(values["mode"])}


def grid_limits(*grids: pd.DataFrame) -> tuple[float, float]:
    """The least and the largest cell of several grids: one colour scale for their heat maps."""
    cells = np.concatenate([m.to_numpy().ravel() for values in grids for m in _grid_maps(values).values()])
    return cells.min(), cells.max()


def grid(values: pd.DataFrame, title: str, selected: tuple[int, int], limits: tuple[float, float]) -> Figure:
    """Heat maps of nDCG@10 over (Kq, Kp), one for each mode; the selected pair, which the grid has, is framed.

    ``limits`` of the colour scale are those of :func:`grid_limits`.
    """
    maps = _grid_maps(values)
    fig, axes = _panels(len(maps), 1.75, 2, sharex=True, sharey=True)
    for ax, (mode, means) in zip(axes, maps.items()):
        scale = {"vmin": limits[0], "vmax": limits[1], "cmap": "cividis", "cbar": False}
        text = means.map(lambda value: f"{value:.2f}".removeprefix("0"))
        sns.heatmap(means, annot=text, fmt="", ax=ax, annot_kws={"size": 8}, **scale)
        _contrast(ax)
        ax.set(title=mode, xlabel="", ylabel="")
        ax.tick_params("y", rotation=0)
        corner = means.columns.get_loc(selected[1]), means.index.get_loc(selected[0])
        ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False))
    fig.supxlabel(_PAIR_AXES["xlabel"], fontsize=9)
    fig.supylabel(_PAIR_AXES["ylabel"], fontsize=9)
    title = f"nDCG@10, zero-shot: {title}; framed: the selected pair {selected}"
    fig.suptitle(textwrap.fill(title, 62), fontsize=9)
    return fig


def effectiveness(table: pd.DataFrame, over: str) -> Figure:
    """Macro nDCG@10 of every system and mode with its interval; a panel for each training, all with a line at BM25.

    ``table`` has the columns training, system, mode, value, low and high; a system has one row in every panel.
    ``over`` names what the macro is of.
    """
    table = table.sort_values("system", key=lambda names: pd.factorize(names)[0], kind="stable")  # as first named
    panels = [table[table["training"] == training] for training in table["training"].unique()]
    heights = [0.42 * rows["system"].nunique() + 0.5 for rows in panels]
    fig, axes = _panels(len(panels), heights, sharex=True)
    looks = {mode: look for mode, look in _MODES.items() if mode in set(table["mode"])}
    for ax, rows in zip(axes, panels):
        rows = rows.assign(system=_wrapped(rows["system"], 22))
        _forest(ax, rows, "system", "mode", looks, dodge=0.5)
        ax.set(title=rows["training"].iloc[0], xlabel=f"macro nDCG@10, 95 % interval\n({over})")
        for value in table.loc[table["system"] == "BM25", "value"]:
            ax.axvline(value, color=_METHODS["BM25"], linestyle="--", linewidth=1, label="BM25")
    _legend(fig, axes[0])
    return fig


def per_collection(table: pd.DataFrame) -> Figure:
    """nDCG@10 of every system on each collection, in its hybrid mode or the only one; a panel for each training.

    ``table`` is the long one of means: training, system, mode, collection, metric and value.
    """
    rows = table[(table["metric"] == METRIC) & (table["mode"] != "mean")]
    best = rows["mode"] == SELECTION_MODE
    alone = ~best.groupby([rows["training"], rows["system"]]).transform("any")
    rows = _named(rows[best | alone]).assign(collection=lambda d: d["collection"].str.removeprefix("pydocs/"))
    trainings, n = rows["training"].unique(), rows["collection"].nunique()
    fig, axes = _panels(len(trainings), 0.42 * n + 0.7, sharex=True)
    known = rows.drop_duplicates("system")
    looks = {s: (_METHODS[m], _FORMS[f]) for s, m, f in zip(known["system"], known["method"], known["form"])}
    for ax, training in zip(axes, trainings):
        own = rows[rows["training"] == training].assign(low=lambda d: d["value"], high=lambda d: d["value"])
        _forest(ax, own, "collection", "system", looks, dodge=0.6)
        ax.set(title=training, xlabel="nDCG@10 (hybrid, or the system's only mode)", ylim=(n - 0.5, -0.5))
    _legend(fig, axes[0])
    return fig


def oracle(table: pd.DataFrame) -> Figure:
    """Fixed pairs, fine-tuning (where known) and the oracle by collection: dots, with their intervals but for (1, 1).

    A tick marks the oracle's reach by chance: the best fixed pair and the chance level.  Columns as of
    :func:`~diffret_lib.experiments.oracle.oracle_table`.
    """
    labels = {"single": "(1, 1)", "selected": "selected pair", "fine_tuned": "selected, fine-tuned",
              "best_fixed": "best fixed pair", "oracle": "oracle"}  # fmt: skip
    labels = {c: label for c, label in labels.items() if table[c].notna().any()}
    names = table["collection"].str.removeprefix("pydocs/")
    rows = pd.concat([
        pd.DataFrame({"collection": names, "pair": label, "value": table[c], "low": table.get(f"{c}_low", table[c]),
                      "high": table.get(f"{c}_high", table[c])})
        for c, label in labels.items()
    ])  # fmt: skip
    fig, axes = _panels(1, 0.52 * len(table) + 0.8)
    looks = dict(zip(labels.values(), (("0.55", "o"), ("C0", "D"), ("C3", "s"), ("C2", "^"), ("C1", "*"))))
    _forest(axes[0], rows, "collection", "pair", looks, dodge=0.6)
    reach = table["best_fixed"] + table["chance"]
    axes[0].plot(reach, range(len(table)), "|", color="black", markersize=16, label="best fixed + chance")
    label = f"hybrid nDCG@10, 95 % interval (first row: {table['queries'].iloc[0]:,} queries)"
    axes[0].set(xlabel=label, ylim=(len(table) - 0.5, -0.5))
    _legend(fig, axes[0], 2)
    return fig


def distribution(shares: pd.DataFrame) -> Figure:
    """Heat map of :func:`~diffret_lib.experiments.oracle.pair_distribution`."""
    fig, axes = _panels(1, 2.8)
    bar = {"label": "queries", "format": "{x:g} %"}
    sns.heatmap(shares, annot=True, fmt=".0f", cmap="cividis", cbar_kws=bar, ax=axes[0])
    _contrast(axes[0])
    axes[0].set(title="best pair of each query", **_PAIR_AXES)
    axes[0].tick_params("y", rotation=0)
    return fig


def chance_levels(levels: np.ndarray, observed: float) -> Figure:
    """Histogram of the oracle's headroom in draws of the grid's random twins, with a line at the grid's own."""
    fig, axes = _panels(1, 1.9)
    sns.histplot(levels, bins=30, color="0.6", ax=axes[0])
    axes[0].axvline(observed, color="C3", linewidth=2)
    axes[0].annotate("the grid", (observed, 1.02), xycoords=axes[0].get_xaxis_transform(), ha="center", color="C3")
    axes[0].set(xlabel="oracle's headroom over the best fixed pair (nDCG@10)", ylabel="draws of random twins")
    return fig


def claims_forest(tests: pd.DataFrame) -> Figure:
    """Statistic and 95 % interval of the tests that count, marked by their verdicts; each claim has its own scale.

    A tick is the bound that an interval is held against.
    """
    tested = tests[tests["verdict"].isin(list(_VERDICTS)) & tests["counts"].astype(bool)]
    systems = tested["comparison"].str.replace(r"(, fine-tuned)?( \(\w+\))", "", regex=True)
    tested = tested.assign(systems=systems, label=_wrapped(tested["id"] + "  " + tested["comparison"], 34))
    panels = [rows for _, rows in tested.groupby(["claim", "statistic"], sort=False)] or [tested]
    for i, rows in enumerate(panels):
        if len(rows) > 1 and rows["systems"].nunique() == 1:  # they stand in the title, once
            panels[i] = rows.assign(label=rows["id"] + "  " + rows["training"] + ", " + rows["mode"])
    heights = [0.2 * rows["label"].str.count("\n").add(1.2).sum() + 0.45 for rows in panels]
    fig, axes = _panels(len(panels), heights)
    for ax, rows in zip(axes, panels):
        _forest(ax, rows, "label", "verdict", _VERDICTS, order=rows["label"], legend=False)
        bounds = rows[rows["bound"] != 0]
        ax.plot(bounds["bound"], bounds["label"], "|", markersize=12, color="0.2")
        claim, statistic, pair = rows[["claim", "statistic", "systems"]].iloc[0] if len(rows) else ("", "", "")
        title = f"claim {claim}: {statistic}" + f"\n{pair}" * (rows["systems"].nunique() == 1 < len(rows))
        ax.axvline(1 if statistic == RATIO else 0, color="0.4", linewidth=0.8)
        ax.tick_params("y", labelsize=7.5)
        ax.set(xlabel="", ylim=(max(len(rows), 1) - 0.5, -0.5))
        ax.set_title(title, loc="right", fontsize=8.5)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        if statistic == RATIO:
            _log_ticks(ax)
    for name, (colour, marker) in (_VERDICTS | {"bound": ("0.2", "|")}).items():
        axes[0].plot([], [], marker, color=colour, label=name)
    _legend(fig, axes[0], 2)
    return fig


def alignment(products: pd.DataFrame, title: str) -> Figure:
    """Dot products of a query's vectors (rows) and a passage's, each less its row's mean; the row's maximum is framed.

    MaxSim, in the title, sums the maxima of the products themselves, those above 0.
    """
    values = products.to_numpy()
    centred, few = products.sub(products.mean(1), axis=0), products.shape[1] <= 8
    fig, axes = _panels(1, 1.5 + 0.3 * len(products))
    (ax,), widest = axes, float(np.abs(centred).to_numpy().max()) or 1.0
    scale = {"cmap": "vlag", "vmin": -widest, "vmax": widest, "annot_kws": {"size": 6.5}, "fmt": ""}
    text = centred.map(lambda value: f"{value:+.2f}".replace("0.", ".", 1)) if few else False
    bar = {"label": "dot product − mean of its row"}
    sns.heatmap(centred, annot=text, ax=ax, cbar_kws=bar, xticklabels=True, yticklabels=True, **scale)
    for row, column in enumerate(values.argmax(1)):
        ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2))
    turned = {"rotation": 45, "va": "top"} if few else {"rotation": 90, "va": "center"}
    plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor", **turned)
    plt.setp(ax.get_yticklabels(), rotation=0)
    # words may hold what matplotlib would read as mathematics
    plt.setp([ax.title, *ax.get_xticklabels(), *ax.get_yticklabels()], parse_math=False)
    ax.set(xlabel="masks of the passage and their predicted words", ylabel="masks of the query")
    ax.set_title(f"{title}\nMaxSim {values.max(1).clip(min=0).sum():.3f}")
    return fig


def allocator(table: pd.DataFrame) -> Figure:
    """The default Kq, the allocator and the oracle over Kq, for each collection and their mean."""
    labels = {"selected": "default Kq", "adaptive": "allocator", "oracle_kq": "oracle over Kq"}
    table = table.assign(collection=table["collection"].str.removeprefix("pydocs/"))
    rows = table.rename(columns=labels).melt("collection", list(labels.values()), var_name="Kq")
    fig, axes = _panels(1, 0.28 * len(table) + 0.6)
    axes[0].hlines(table["collection"], table["selected"], table["oracle_kq"], color="0.7", linewidth=1)
    looks = {"hue": "Kq", "style": "Kq", "markers": ["s", "D", "o"], "size": "Kq", "sizes": [80, 25, 40]}
    sns.scatterplot(rows, x="value", y="collection", ax=axes[0], **looks)
    axes[0].set(xlabel="hybrid nDCG@10", ylabel="")
    _legend(fig, axes[0])
    return fig


def _latency(ax: Axes, table: pd.DataFrame, x: str, **labels: str) -> None:
    """Draw median latency against a column, with intervals where there are any; every other line is dashed."""
    dashes = dict(zip(table["label"].unique(), cycle(("", (3, 2)))))  # so that a line shows through the one on it
    looks = {"hue": "label", "style": "label", "markers": True, "dashes": dashes, "markersize": 5}
    sns.lineplot(_three(table, "low", "value", "high"), x=x, y="number", ax=ax, err_style="bars", **looks, **_INTERVAL)
    ax.set(ylabel="median ms", **labels)


def latency_vectors(table: pd.DataFrame) -> Figure:
    """Encoding latency of queries against their number of vectors; a panel for each size of a batch."""
    cells = table[(table["quantity"] == ENCODING) & (table["side"] == "query")]
    cells = cells[cells.groupby("system")["count"].transform("max") > 1]
    decoding = cells["decoding"].mask((cells["system"] == "PromptReps") & (cells["count"] == 1), FORCED)
    cells = cells.assign(label=cells["system"] + (", " + decoding).where(decoding != "", ""))
    fig, axes = _panels(cells["batch"].nunique(), 1.9, sharex=True)
    for ax, (batch, own) in zip(axes, cells.groupby("batch")):
        _latency(ax, own, "count", xlabel="vectors of a query (as answered: at most)")
        ax.set(title=f"queries at once: {batch}", ylabel="median ms of the batch", ylim=(0, None))
        _measured_ticks(ax, own["count"])
    _legend(fig, axes[0], 1)
    return fig


def latency_length(table: pd.DataFrame, search: pd.DataFrame) -> Figure:
    """Latency against the length of a passage (encoding), and against the passages of an index (searching it)."""
    cells = table[(table["quantity"] == ENCODING) & (table["side"] == "passage")]
    letters = cells["system"].map({"DiffRetriever": " K=", "PromptReps": " N="})  # the others have one vector
    counted = cells["system"] + (letters + cells["count"].astype(str)).fillna("")
    fig, axes = _panels(2, 3.0)
    _latency(axes[0], cells.assign(label=counted), "text_tokens", xlabel="tokens of a passage", title="encoding")
    timed = search.dropna(subset="value").assign(label=lambda d: d["index"])
    _latency(axes[1], timed, "passages", xlabel="passages in the index", title="searching, one query")
    axes[1].set_xscale("log")
    _measured_ticks(axes[0], cells["text_tokens"])
    _measured_ticks(axes[1], timed["passages"], apart=2.0)
    for ax in axes:
        _log_ticks(ax, "y")
        ax.legend(title="", loc="upper center", bbox_to_anchor=(0.45, -0.25), ncols=2)
    return fig


def effectiveness_latency(table: pd.DataFrame) -> Figure:
    """Effectiveness against the latency of a query (the paper's Figure 1): a panel for each training.

    A line joins a method's single and multi form.  Columns as of efficiency.effectiveness_latency.
    """
    table, trainings = _named(table), table["training"].unique()
    fig, axes = _panels(len(trainings), 2.1, sharex=True, sharey=True)
    shown = {"x": "latency_ms", "y": "ndcg", "hue": "method", "palette": _METHODS}
    shown["hue_order"] = [method for method in _METHODS if method in set(table["method"])]
    for ax, training in zip(axes, trainings):
        own = table[table["training"] == training]
        sns.lineplot(own, estimator=None, sort=False, alpha=0.6, legend=False, ax=ax, **shown)
        sns.scatterplot(own, style="form", markers=_FORMS, style_order=list(_FORMS), s=55, ax=ax, **shown)
        ax.set(title=training, ylabel="macro nDCG@10")
        ax.set(xlabel=f"ms of a query: encoding, and searching {table['passages'].max():,} passages")
        ax.margins(0.12)
    _log_ticks(axes[0])
    _legend(fig, axes[0])
    return fig


def training_curves(table: pd.DataFrame, over: str) -> Figure:
    """Training loss, and nDCG@10 on the development collection beside its zero-shot level, of every system.

    Columns system, repetition (a line each), step (0: before training), loss and dev_ndcg; ``over`` names the
    development queries.
    """
    systems, one = table["system"].unique(), {"units": "repetition", "estimator": None, "linewidth": 1.1}
    fig, axes = _panels(2 * len(systems), 1.0, 2, sharex=True)
    low, high = table["dev_ndcg"].min() - 0.05, table["dev_ndcg"].max() + 0.05
    for row, system in enumerate(systems):
        rows, (left, right) = table[table["system"] == system], axes[2 * row : 2 * row + 2]
        sns.lineplot(rows.dropna(subset="loss"), x="step", y="loss", color="C0", ax=left, **one)
        measured = rows.dropna(subset="dev_ndcg")
        sns.lineplot(measured, x="step", y="dev_ndcg", color="C1", marker="o", markersize=4, ax=right, **one)
        right.axhline(measured["dev_ndcg"].iloc[0], color="0.3", linestyle="--", linewidth=1)
        left.set_title(system, loc="left")
        right.set_title(f"{over}; dashed: zero-shot" if row == 0 else "", loc="right", fontsize=8)
        left.set(ylabel="loss (nats)", xlabel="step")
        right.set(ylabel="nDCG@10", xlabel="step", ylim=(low, high))
        for ax in (left, right):
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return fig
