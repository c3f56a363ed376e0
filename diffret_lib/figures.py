"""Figures of the notebooks; each takes a table and gives a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from diffret_lib.analysis import heat_map, system_intervals
from diffret_lib.study import METRIC, MODES

_MODE_MARKERS = {"dense": "o", "sparse": "s", "hybrid": "D"}


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
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, training in zip(axes[0], panels, strict=True):
        for offset, mode in zip((-0.22, 0.0, 0.22), MODES, strict=True):
            rows = table[(table["mode"] == mode) & (table["training"] == training)]
            y = [systems.index(s) + offset for s in rows["system"]]
            error = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            ax.errorbar(rows["value"], y, xerr=error, fmt=_MODE_MARKERS[mode], markersize=5, capsize=2, label=mode)
        ax.set(title=training, xlabel="macro nDCG@10, 95 % bootstrap interval over queries")
    axes[0, 0].set(yticks=range(len(systems)), yticklabels=systems)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend()
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
    ax.invert_yaxis()
    return fig


def oracle(table: pd.DataFrame) -> Figure:
    """Single, selected, best fixed pair and per-query oracle for each collection."""
    columns = {"single": "(1, 1)", "selected": "selected pair", "best_fixed": "best fixed pair", "oracle": "oracle"}
    fig, ax = plt.subplots(figsize=(7.5, 3.8))
    x = np.arange(len(table))
    for i, (column, label) in enumerate(columns.items()):
        ax.bar(x + (i - 1.5) * 0.2, table[column], 0.19, label=label)
    names = [c.removeprefix("pydocs/") for c in table["collection"]]
    ax.set(xticks=x, ylabel="hybrid nDCG@10", xlabel="collection")
    ax.set_xticklabels(names, rotation=20, ha="right")
    ax.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    return fig


def distribution(shares: pd.DataFrame) -> Figure:
    """Heat map of the share of queries whose best pair is (Kq, Kp), in percent."""
    fig, ax = plt.subplots(figsize=(4.6, 3.9))
    sns.heatmap(shares, annot=True, fmt=".0f", cmap="cividis", cbar_kws={"label": "queries", "format": PercentFormatter()}, ax=ax)
    ax.set(xlabel="vectors per passage, Kp", ylabel="vectors per query, Kq", title="best pair of each query")
    return fig



