"""Every figure, on small tables: what it draws, and that it can be read in a column and on a phone."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from seaborn.utils import relative_luminance

from diffret_lib.experiments.claims import CONTRADICTED, DIFFERENCE, INCONCLUSIVE, RATIO, SUPPORTED
from diffret_lib.report import figures
from diffret_lib.report.results import set_style

COLLECTIONS = ["pydocs/scikit-learn", "beir/scifact", "pydocs/networkx"]
SYSTEMS = ["Mean pooling", "DiffEmbed", "PromptReps single", "PromptReps multi", "DiffRetriever single",
           "DiffRetriever multi"]  # fmt: skip


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        set_style()
        yield
        plt.close("all")


def legible(fig: Figure) -> None:
    """No wider than a column, no small print, no text on another, nothing blank."""
    assert fig.get_size_inches()[0] == figures.WIDTH
    fig.canvas.draw()
    texts = [t for legend in fig.legends for t in legend.get_texts()] + [fig._suptitle, fig._supxlabel, fig._supylabel]
    for ax in (ax for ax in fig.axes if ax.axison):
        assert ax.collections or ax.lines or ax.patches, "a blank panel"
        texts += [ax.title, ax._left_title, ax._right_title, ax.xaxis.label, ax.yaxis.label]
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            texts += [t.label1 for t in axis.get_major_ticks() if t.label1.get_visible() and low <= t.get_loc() <= high]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
    texts = [t for t in texts if t is not None and t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in texts) >= 7
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_rotation() % 90 == 0]
    for (one, a), (other, b) in combinations(boxes, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) < 2, f"{one!r} on {other!r}"


def labelled(fig: Figure) -> None:
    """Every axis says what it shows."""
    for ax in fig.axes:
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert ax.get_xlabel() and (ax.get_ylabel() or any(len(n) > 3 and n[0].isalpha() for n in names))


def grid() -> pd.DataFrame:
    cells = product(("dense", "mean", "sparse", "hybrid"), (1, 2, 4), (1, 2, 4), COLLECTIONS)
    rows = [(m, q, p, c, "ndcg@10", 0.1 * q + 0.01 * p) for m, q, p, c in cells]
    return pd.DataFrame(rows, columns=["mode", "k_query", "k_passage", "collection", "metric", "value"])


def evaluated() -> pd.DataFrame:
    """Means of every system, and of what the figures leave out: cut text, and another backbone."""
    rng = np.random.default_rng(0)
    systems = [("BM25", "sparse"), ("BM25, cut text", "sparse"), ("DiffEmbed (text only)", "dense")]
    for system in SYSTEMS:
        several = [m for m in ("mean", "sparse", "hybrid") if system.endswith(("multi", "single"))]
        systems += [(system, m) for m in ("dense", *several)]
    cells = product(("zero-shot", "fine-tuned"), systems, COLLECTIONS)
    rows = [(training, *system, collection, "ndcg@10", rng.random()) for training, system, collection in cells]
    return pd.DataFrame(rows, columns=["training", "system", "mode", "collection", "metric", "value"])


def test_grid_has_one_scale_and_marks_the_pair():
    title, limits = "mean of three collections, each of them a sample of its passages", figures.grid_limits(grid())
    fig = figures.grid(grid(), title, (2, 4), limits)
    legible(fig)
    assert [ax.get_title() for ax in fig.axes] == ["dense", "mean", "sparse", "hybrid"]
    np.testing.assert_allclose([ax.collections[0].get_clim() for ax in fig.axes], [(0.11, 0.44)] * 4)
    assert all([(p.get_x(), p.get_y()) for p in ax.patches] == [(2, 1)] for ax in fig.axes)
    limits = figures.grid_limits(grid(), grid().assign(value=0.9))  # one scale for two figures
    both = figures.grid(grid(), "three", (2, 4), limits)
    np.testing.assert_allclose([ax.collections[0].get_clim() for ax in both.axes], [(0.11, 0.9)] * 4)
    for ax in fig.axes:  # a number is readable on its cell
        cells = [relative_luminance(colour) for colour in ax.collections[0].get_facecolors()]
        texts = [relative_luminance(text.get_color()) for text in ax.texts]
        assert len(cells) == len(texts) == 9
        assert min((max(a, b) + 0.05) / (min(a, b) + 0.05) for a, b in zip(cells, texts)) > 4.5


def test_effectiveness_and_collections():
    table = evaluated()
    means = table.groupby(["training", "system", "mode"], sort=False)["value"].mean().reset_index()
    tuned = means["training"] == "fine-tuned"
    means = pd.concat([means[~tuned], means[tuned][::-1]])
    fig = figures.effectiveness(means.assign(low=means["value"] - 0.05, high=means["value"] + 0.05), "3 collections")
    legible(fig)
    assert [ax.get_title() for ax in fig.axes] == ["zero-shot", "fine-tuned"]
    orders = [[label.get_text() for label in ax.get_yticklabels()] for ax in fig.axes]
    assert orders[0] == orders[1] and len(orders[0]) == 9  # whatever the order of the fine-tuned ones
    bm25 = means[means["system"] == "BM25"]["value"]
    dashed = [[line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] for ax in fig.axes]
    assert dashed == [list(bm25)] * 2
    fig = figures.per_collection(table)
    legible(fig)
    lines = [line.get_xydata() for ax in fig.axes for line in ax.lines if line.get_marker() not in ("", "None")]
    points = np.concatenate([line for line in lines if len(line)])
    points = points[~np.isnan(points).any(1)]
    assert len(points) == 2 * 7 * len(COLLECTIONS)  # a dot a system, in its hybrid or only mode
    assert len(np.unique(points[:, 1])) == 7 * len(COLLECTIONS)  # none at the height of another one
    own = table[(table["system"] == "DiffRetriever multi") & (table["mode"] == "hybrid")]
    assert set(own["value"]) <= set(points[:, 0])


def test_oracle():
    values = {"single": 0.5, "selected": 0.6, "fine_tuned": np.nan, "best_fixed": 0.65, "oracle": 0.8}
    values |= {"chance": 0.1, "oracle_low": 0.75, "oracle_high": 0.9}
    fig = figures.oracle(pd.DataFrame({"collection": COLLECTIONS, "queries": 30} | values))
    legible(fig)
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["(1, 1)", "selected pair", "best fixed pair", "oracle", "best fixed + chance"]
    (reach,) = (line for line in fig.axes[0].lines if line.get_marker() == "|")
    assert reach.get_xdata().tolist() == [0.75] * 3
    assert any(set(line.get_xdata()) == {0.75, 0.9} for line in fig.axes[0].lines)


def test_chance():
    fig = figures.chance_levels(np.linspace(0.01, 0.03, 100), 0.04)
    legible(fig), labelled(fig)
    assert fig.axes[0].lines[0].get_xdata() == [0.04, 0.04]
    (label,), bars = fig.axes[0].texts, fig.axes[0].get_window_extent()
    assert label.get_window_extent().y0 >= bars.y1  # it lies on no bar
    legible(figures.distribution(pd.DataFrame(np.eye(3) * 33, [1, 2, 4], [1, 2, 4])))
    rows = pd.DataFrame({"collection": [*COLLECTIONS, "macro"], "selected": 0.5, "adaptive": 0.55, "oracle_kq": 0.6})
    fig = figures.allocator(rows)
    legible(fig), labelled(fig)
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert names == ["scikit-learn", "beir/scifact", "networkx", "macro"]


def test_claims():
    pair = "DiffRetriever multi{0} ({1}) − DiffRetriever single{0} ({1})"
    rows = []
    for i, (mode, training) in zip("abcd", product(("dense", "hybrid"), ("zero-shot", "fine-tuned"))):
        comparison = pair.format("" if training == "zero-shot" else ", fine-tuned", mode)
        rows.append((2, f"2{i}", comparison, training, mode, DIFFERENCE, 0.0, 0.1, SUPPORTED, True))
    rows += [(4, "4a", "DiffRetriever 16 against one, encoding, batch 1", "", "", RATIO, 1.25, 1.2, INCONCLUSIVE, True),
             (4, "4b", "PromptReps 20 against one, encoding, batch 1", "", "", RATIO, 15.0, 9.5, CONTRADICTED, True),
             (4, "4c", "not drawn", "", "", RATIO, 15.0, 9.5, CONTRADICTED, False)]  # fmt: skip
    columns = ["claim", "id", "comparison", "training", "mode", "statistic", "bound", "value", "verdict", "counts"]
    tests = pd.DataFrame(rows, columns=columns).assign(low=lambda d: d["value"] * 0.9, high=lambda d: d["value"] * 1.2)
    fig = figures.claims_forest(tests)
    legible(fig)
    labels = [[label.get_text().replace("\n", " ") for label in ax.get_yticklabels()] for ax in fig.axes]
    assert labels[0][0] == "2a  zero-shot, dense" and [label[:2] for label in labels[1]] == ["4a", "4b"]
    assert "DiffRetriever multi − DiffRetriever single" in fig.axes[0].get_title(loc="right")
    assert fig.axes[1].get_xscale() == "log"
    figures.claims_forest(tests[:0]).canvas.draw()  # before any test


def latencies() -> pd.DataFrame:
    ways = [("DiffRetriever", "", (1, 8, 16)), ("PromptReps", "", (1,)), ("PromptReps", "forced", (4, 20)),
            ("PromptReps", "as answered", (20,)), ("DiffEmbed", "", (1,))]  # fmt: skip
    rows = [("encoding", s, d, "query", k, b, 16, 10.0 * k) for s, d, ks in ways for k in ks for b in (1, 8)]
    rows += [("encoding", s, d, "passage", k, 1, n, 10.0 * k) for s, d, ks in ways for k in ks[-1:] for n in (16, 64)]
    columns = ["quantity", "system", "decoding", "side", "count", "batch", "text_tokens", "value"]
    return pd.DataFrame(rows, columns=columns).assign(low=lambda d: d["value"] * 0.9, high=np.nan)


def test_latencies():
    fig = figures.latency_vectors(latencies())
    legible(fig)
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert set(labels) == {"DiffRetriever", "PromptReps, forced", "PromptReps, as answered"} and len(fig.axes) == 2
    assert fig.axes[0].get_xticks().tolist() == [1, 4, 8, 16, 20]
    marked = [line for line in fig.axes[0].lines if line.get_marker() != "None"]
    assert sorted(len(set(line.get_xdata())) for line in marked)[-3:] == [1, 3, 3]  # what is answered is one point
    numbers = {"low": 1.0, "high": np.nan, "index": ["MaxSim", "sparse"] * 2, "passages": [12, 100, 125, 1000]}
    fig = figures.latency_length(latencies(), pd.DataFrame({"value": [1.0, 2.0, 30.0, np.nan]} | numbers))
    legible(fig)
    assert fig.axes[0].get_xticks().tolist() == [16, 64] and fig.axes[1].get_xticks().tolist() == [12, 100]


def test_effectiveness_against_latency_links_single_to_multi():
    rows = [(t, s, 0.1 * i, 5.0 * 3**i, 1000) for t in ("zero-shot", "fine-tuned") for i, s in enumerate(SYSTEMS)]
    table = pd.DataFrame(rows, columns=["training", "system", "ndcg", "latency_ms", "passages"])
    for trainings in (["zero-shot", "fine-tuned"], ["zero-shot"]):
        fig = figures.effectiveness_latency(table[table["training"].isin(trainings)])
        legible(fig)
        assert [ax.get_title() for ax in fig.axes] == trainings
        links = [line.get_xydata().tolist() for line in fig.axes[0].lines if len(line.get_xydata()) == 2]
        assert np.allclose(links, [[[5 * 3**i, 0.1 * i] for i in pair] for pair in ((2, 3), (4, 5))])


def test_training():
    rows = [(s, step, loss, dev, r) for s in SYSTEMS for r in (0, 1)
            for step, loss, dev in ((0, np.nan, 0.3), (1, 2.0, np.nan), (2, 1.0, 0.5))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["system", "step", "loss", "dev_ndcg", "repetition"])
    fig = figures.training_curves(table, "60 queries")
    legible(fig)
    assert len(fig.axes) == 2 * len(SYSTEMS)
    assert all(list(ax.lines[-1].get_ydata()) == [0.3, 0.3] for ax in fig.axes[1::2])  # the zero-shot level
    assert {ax.get_ylim() for ax in fig.axes[1::2]} == {(0.25, 0.55)}  # one scale
    cells = product((("documentation", 4.0), ("answers", 3.0)), ("documentation", "English"))
    about = {"stage": "documentation", "tokens_seen": 1000}, {"stage": "answers", "tokens_seen": 500}
    seen = {"tokens_seen": 1000}
    held_out = [seen | {"stage": s, f"held_out {text}": {"0.15": v, "0.5": v + 1}} for (s, v), text in cells]
    trained = [stage | {"loss": loss} for stage, loss in zip(about, (5.0, 3.0))]
    fig = figures.curves({"curve": trained + held_out})
    legible(fig)
    assert [ax.get_title() for ax in fig.axes] == ["training", "held out documentation", "held out English"]
    points = [point.tolist() for line in fig.axes[0].lines for point in line.get_xydata()]
    assert sorted(points) == [[1.0, 5.0], [1.5, 3.0]] and fig.axes[0].lines[0].get_marker() == "o"  # a point is seen


def test_alignment_of_many_masks():
    names = [f"{i} word" for i in range(16)]
    products = pd.DataFrame(np.random.default_rng(0).random((16, 16)), names, names)
    fig = figures.alignment(products, "rank 1: p")
    legible(fig)
    assert not fig.axes[0].texts
    fig = figures.alignment(products.iloc[:2, :8], "rank 1: p")
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in fig.axes[0].texts[:8]]
    assert len(boxes) == 8 and all(a.x1 < b.x0 for a, b in pairwise(boxes))  # numbers do not run together
