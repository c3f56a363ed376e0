"""Figures of the notebooks; each takes a table and gives a matplotlib figure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from diffret_lib.analysis import heat_map, system_intervals
from diffret_lib.study import METRIC, MODES

_MODE_MARKERS = {"dense": "o", "sparse": "s", "hybrid": "D"}


def _log_ticks(axis: Axis) -> None:
    """Ticks at 1, 2, 5, 10, ... in plain numbers, for an axis of one or two decades."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def curves(log: dict) -> Figure:
    """Training loss and held-out cross-entropy against the tokens seen, stages one after another."""
    records, offset, previous = [], 0, None
    for record in log["curve"]:
        if previous is not None and record["stage"] != previous["stage"]:
            offset += previous["tokens_seen"]
        records.append(record | {"total": (offset + record["tokens_seen"]) / 1000})
        previous = record
    fig, ax = plt.subplots(figsize=(7, 4))
    for stage, group in pd.DataFrame([r for r in records if "loss" in r]).groupby("stage", sort=False):
        ax.plot(group["total"], group["loss"].astype(float), linewidth=0.9, alpha=0.7, label=f"training, {stage}")
    held_out = [r for r in records if "held_out" in r]
    for ratio in held_out[0]["held_out"] if held_out else ():
        xs, ys = [r["total"] for r in held_out], [r["held_out"][ratio] for r in held_out]
        ax.plot(xs, ys, marker="o", markersize=4, label=f"held out, {float(ratio):.0%} masked")
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
    fig.suptitle(f"{METRIC.replace('ndcg', 'nDCG')}, zero-shot: {title}", fontsize=11)
    return fig


def effectiveness(per_query: pd.DataFrame, collections: Sequence[str], resamples: int, seed: int) -> Figure:
    """Macro nDCG@10 of every system and mode, with bootstrap intervals over queries; a panel for each training."""
    table = system_intervals(per_query, collections, resamples, seed)
    systems = list(dict.fromkeys(table["system"]))
    panels = list(dict.fromkeys(table["training"]))
    size = (1.5 + 5.5 * len(panels), 0.55 * len(systems) + 1.4)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, training in zip(axes[0], panels, strict=True):
        for offset, mode in zip((-0.22, 0.0, 0.22), MODES, strict=True):
            rows = table[(table["mode"] == mode) & (table["training"] == training)]
            y = [systems.index(s) + offset for s in rows["system"]]
            error = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            ax.errorbar(rows["value"], y, xerr=error, fmt=_MODE_MARKERS[mode], markersize=5, capsize=2, label=mode)
        ax.set(title=training, xlabel="macro nDCG@10, 95 % bootstrap interval over queries")
    axes[0, 0].set(yticks=range(len(systems)), yticklabels=systems)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=len(MODES), loc="outside upper center")
    return fig


def forest(comparisons: pd.DataFrame) -> Figure:
    """Paired differences with their intervals; filled where the corrected p is below 0.05."""
    fig, ax = plt.subplots(figsize=(7.5, 0.36 * len(comparisons) + 1.2))
    for y, row in enumerate(comparisons.itertuples()):
        face = "C0" if row.p_corrected < 0.05 else "white"
        ax.plot([row.low, row.high], [y, y], color="C0")
        ax.plot(row.difference, y, marker=_MODE_MARKERS[row.mode], color="C0", markerfacecolor=face)
    labels = [f"{r.better} − {r.than} ({r.mode})" for r in comparisons.itertuples()]
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set(yticks=range(len(labels)), yticklabels=labels, xlabel="difference of nDCG@10, 95 % bootstrap interval")
    ax.tick_params(axis="y", labelsize=8)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    return fig


def oracle(table: pd.DataFrame) -> Figure:
    """Fixed pairs, fine-tuning (where it is known) and the per-query oracle for each collection.

    A line across the oracle's bar marks how far it reaches by chance.
    """
    columns = {
        "single": "(1, 1)",
        "selected": "selected pair",
        "fine_tuned": "selected pair, fine-tuned",
        "best_fixed": "best fixed pair",
        "oracle": "oracle",
    }
    columns = {c: label for c, label in columns.items() if table[c].notna().any()}
    fig, ax = plt.subplots(figsize=(8.5, 3.8))
    x, width = np.arange(len(table)), 0.8 / len(columns)
    for i, (column, label) in enumerate(columns.items()):
        offset = (i - (len(columns) - 1) / 2) * width
        hatch = "//" if column == "fine_tuned" else None
        ax.bar(x + offset, table[column], 0.95 * width, label=label, hatch=hatch, edgecolor="white")
    reach = table["best_fixed"] + table["chance"]
    if reach.notna().any():
        at = x + (len(columns) - 1) / 2 * width
        style = {"color": "black", "linewidth": 1.5, "label": "best fixed pair + chance"}
        ax.hlines(reach, at - width / 2, at + width / 2, **style)
    names = [c.removeprefix("pydocs/") for c in table["collection"]]
    ax.set(xticks=x, ylabel="hybrid nDCG@10", xlabel="collection")
    ax.set_xticklabels(names, rotation=20, ha="right")
    ax.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return fig


def distribution(shares: pd.DataFrame) -> Figure:
    """Heat map of the share of queries whose best pair is (Kq, Kp), in percent."""
    fig, ax = plt.subplots(figsize=(4.6, 3.9))
    sns.heatmap(shares, annot=True, fmt=".0f", cmap="cividis", cbar_kws={"label": "queries", "format": PercentFormatter()}, ax=ax)
    ax.set(xlabel="vectors per passage, Kp", ylabel="vectors per query, Kq", title="best pair of each query")
    return fig


#: Marker and colour of each verdict; what is inconclusive is hollow.
_VERDICTS = {"supported": ("o", "C2"), "contradicted": ("X", "C3"), "inconclusive at this scale": ("D", "0.45")}


def claims_forest(tests: pd.DataFrame) -> Figure:
    """Statistic and 95 % interval of every test of the ledger, marked by its verdict.

    Differences and losses above, ratios (log scale) below; a tick is the bound that an interval is held against;
    tests that stand beside are small and pale.
    """
    tested = tests[tests["verdict"].isin(list(_VERDICTS))]
    ratio = tested["statistic"].str.contains("ratio")
    panels = [(tested[~ratio], "nDCG@10"), (tested[ratio], "ratio of latencies")]
    panels = [(rows, unit) for rows, unit in panels if len(rows)] or [(tested, "nDCG@10")]
    heights = [len(rows) + 1.5 for rows, _ in panels]
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.27 * sum(heights) + 1.4), height_ratios=heights, squeeze=False
    )
    for ax, (rows, unit) in zip(axes[:, 0], panels, strict=True):
        for y, row in enumerate(rows.itertuples()):
            marker, colour = _VERDICTS[row.verdict]
            look = {"color": colour, "alpha": 1.0 if row.counts else 0.55}
            face = "white" if marker == "D" else colour
            ax.plot([row.low, row.high], [y, y], **look)
            ax.plot(row.value, y, marker, markersize=7 if row.counts else 4.5, markerfacecolor=face, **look)
            if row.bound:
                ax.plot(row.bound, y, marker="|", markersize=12, color="0.2")
        ax.axvline(1 if "ratio" in unit else 0, color="0.4", linewidth=0.8)
        if "ratio" in unit:
            ax.set_xscale("log")
            _log_ticks(ax.xaxis)
        labels = [f"{r.id}  {r.comparison}" for r in rows.itertuples()]
        ax.set(yticks=range(len(rows)), yticklabels=labels, xlabel=f"{unit}, value and 95 % interval")
        ax.tick_params(axis="y", labelsize=8)
        ax.set_ylim(len(rows) - 0.4, -0.6)
    for verdict, (marker, colour) in _VERDICTS.items():
        face = "white" if marker == "D" else colour
        axes[0, 0].plot([], [], marker, color=colour, markerfacecolor=face, label=verdict)
    axes[0, 0].plot([], [], "|", markersize=12, color="0.2", label="bound")
    axes[0, 0].legend(fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))  # above the panel
    return fig


def alignment(products: pd.DataFrame, title: str = "") -> Figure:
    """Heat map of the dot products between a query's vectors (rows) and a passage's (columns).

    Each row's maximum is framed; under the title stands their sum, clamped at 0 each: the MaxSim score.
    """
    best = products.to_numpy().argmax(1)
    score = products.to_numpy().max(1).clip(min=0).sum()
    fig, ax = plt.subplots(figsize=(2.6 + 0.62 * products.shape[1], 1.9 + 0.42 * products.shape[0]))
    sns.heatmap(
        products, annot=True, fmt=".2f", cmap="cividis", annot_kws={"size": 8}, ax=ax,
        cbar_kws={"label": "dot product (cosine)"},
    )  # fmt: skip
    for row, column in enumerate(best):
        ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    # predicted words may hold what matplotlib would read as mathematics
    ax.set_xticks(ax.get_xticks(), [str(c).replace("$", r"\$") for c in products.columns], rotation=45, ha="right")
    ax.set_yticks(ax.get_yticks(), [str(r).replace("$", r"\$") for r in products.index], rotation=0)
    title = title.replace("$", r"\$")
    ax.set(xlabel="masks of the passage and their predicted words", ylabel="masks of the query")
    ax.set_title(f"{title}\nMaxSim {score:.3f}".strip(), fontsize=10)
    return fig


def oracle_chance(table: pd.DataFrame, over: str = "best fixed") -> Figure:
    """The oracle's headroom, what of it is chance, and the part beyond chance, by each estimate of chance."""
    kinds = {"headroom": "s", "chance": "o", "lost on the other half,": "o", "beyond chance": "D"}
    rows = [
        (method, kind, row)
        for method in dict.fromkeys(table["method"])
        for kind in kinds
        for row in table[(table["method"] == method) & (table["quantity"] == f"{kind} over {over}")].itertuples()
    ]
    fig, ax = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 1.2))
    for y, (_, kind, row) in enumerate(rows):
        face = "C0" if row.p < 0.05 else "white"
        ax.plot([row.low, row.high], [y, y], color="C0")
        ax.plot(row.value, y, marker=kinds[kind], color="C0", markerfacecolor=face)
    labels = [f"{method}: {kind.rstrip(',')} ({row.queries} queries)" for method, kind, row in rows]
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set(yticks=range(len(labels)), yticklabels=labels, xlabel=f"nDCG@10 over the {over} pair, 95 % interval")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    return fig


def allocator(table: pd.DataFrame) -> Figure:
    """The default Kq, the allocator and the oracle over Kq, for each collection and their mean."""
    columns = {"selected": ("o", "default Kq"), "adaptive": ("D", "allocator"), "oracle_kq": ("|", "oracle over Kq")}
    fig, ax = plt.subplots(figsize=(7.5, 0.42 * len(table) + 1.4))
    y = np.arange(len(table))
    ax.hlines(y, table["selected"], table["oracle_kq"], color="0.7", linewidth=1)
    for i, (column, (marker, label)) in enumerate(columns.items()):
        face = "none" if column == "selected" else f"C{i}"
        size = 14 if marker == "|" else 7 + 3 * (column == "selected")
        ax.plot(table[column], y, marker, color=f"C{i}", markerfacecolor=face, markersize=size, label=label)
    names = [c.removeprefix("pydocs/") for c in table["collection"]]
    ax.set(yticks=y, yticklabels=names, xlabel="hybrid nDCG@10", ylabel="collection")
    ax.invert_yaxis()
    ax.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return fig


_FAMILY_MARKERS = {"diffusion": "o", "autoregressive": "s"}


def latency_vectors(latency: pd.DataFrame) -> Figure:
    """Encoding latency of one text against its number of vectors; a panel a side, bands between the quartiles."""
    cells = latency[latency["curve"] == "vectors"]
    sides = list(dict.fromkeys(cells["side"]))
    fig, axes = plt.subplots(1, len(sides), figsize=(5.2 * len(sides), 4.2), squeeze=False)
    for ax, side in zip(axes[0], sides, strict=True):
        own = cells[cells["side"] == side]
        for (system, decoding), group in own.groupby(["system", "decoding"], sort=False):
            group = group.sort_values("vectors")
            label = f"{system}, {decoding}" if decoding else system
            style = {"linestyle": "--" if decoding == "as answered" else "-"}
            (line,) = ax.plot(
                group["vectors"], group["median_ms"], marker=_FAMILY_MARKERS[group["family"].iloc[0]], label=label, **style
            )
            ax.fill_between(group["vectors"], group["q1_ms"], group["q3_ms"], color=line.get_color(), alpha=0.2)
        tokens = own["text_tokens"].iloc[0]
        ax.set(title=f"one {side} of {tokens} tokens", xlabel="vectors per text", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("latency (ms), median and quartiles")
    axes[0, 0].legend(fontsize=8)
    return fig


def latency_search(search: pd.DataFrame) -> Figure:
    """Search latency of one query against the number of vectors in the index."""
    fig, ax = plt.subplots()
    markers = iter("osD^vPX*")
    timed = search[search["median_ms"].notna()].sort_values("vectors", kind="stable")
    for (kind, kq, kp), group in timed.groupby(["index", "k_query", "k_passage"], sort=False):
        error = [group["median_ms"] - group["q1_ms"], group["q3_ms"] - group["median_ms"]]
        label = kind if kq == kp == 1 else f"{kind} ({kq}, {kp})"
        ax.errorbar(group["vectors"], group["median_ms"], yerr=error, marker=next(markers), capsize=2, label=label)
    ax.set(xscale="log", yscale="log", xlabel="vectors in the index", ylabel="latency of one query (ms), median and quartiles")
    ax.legend(fontsize=8)
    return fig


def effectiveness_latency(table: pd.DataFrame) -> Figure:
    """Effectiveness against the latency of a query (the paper's Figure 1).

    Fine-tuned points are filled and joined to the system's zero-shot point; its name stands over the upper of the two.
    """
    fig, ax = plt.subplots(figsize=(8.5, 5.2))
    names = [re.sub(r" \(N=\d+\)$", "", system) for system in table["system"]]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(names))}
    for name, points in table.groupby(names, sort=False):
        ax.plot(points["latency_ms"], points["ndcg"], color=colours[name], linewidth=1, alpha=0.6)
        for row in points.itertuples():
            face = colours[name] if row.training == "fine-tuned" else "white"
            ax.plot(
                row.latency_ms, row.ndcg, _MODE_MARKERS[row.mode], markersize=8, color=colours[name], markerfacecolor=face
            )
        upper = points.loc[points["ndcg"].idxmax()]
        place = {"xytext": (3, 7), "textcoords": "offset points", "rotation": 35, "rotation_mode": "anchor"}
        ax.annotate(name, (upper["latency_ms"], upper["ndcg"]), fontsize=9, **place)
    for mode in dict.fromkeys(table["mode"]):
        ax.plot([], [], _MODE_MARKERS[mode], color="0.3", markerfacecolor="white", label=mode)
    for training in dict.fromkeys(table["training"]):
        face = "0.3" if training == "fine-tuned" else "white"
        ax.plot([], [], "h", color="0.3", markerfacecolor=face, label=training)
    passages = table["indexed_passages"].max()
    ax.set(xscale="log", xlabel=f"latency of a query (ms): encoding, and search over {passages:,} passages")
    _log_ticks(ax.xaxis)
    ax.set(ylabel="macro nDCG@10, out of domain", ylim=(0, 1))
    ax.margins(x=0.2)
    ax.legend(fontsize=8, loc="lower right")
    return fig


def training_curves(table: pd.DataFrame) -> Figure:
    """Training loss, and nDCG@10 on the development collection, against the step; step 0 is before training.

    ``table`` is that of :func:`diffret_lib.finetuning.learning_curves`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    for ax, column in zip(axes, ("loss", "dev_ndcg"), strict=True):
        for marker, (system, rows) in zip("osD^vP", table.groupby("system", sort=False)):
            rows = rows[rows[column].notna()]
            every = max(1, len(rows) // 12)
            style = {"marker": marker, "markevery": every, "markersize": 5, "linewidth": 1.2}
            ax.plot(rows["step"], rows[column], label=system, **style)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="step", ylabel="training loss (nats per query)")
    axes[1].set(xlabel="step", ylabel="nDCG@10, development collection")
    axes[1].legend(fontsize=8)
    return fig
