"""An adaptive allocator: chooses Kq for a query without looking at relevance (beyond the paper).

Passages are indexed once, so that Kp stays.  Every query is read and searched at the default Kq; what that pass and
that ranking say (:data:`FEATURES`) decides whether it is read and searched once more at another Kq.  A query that
stays at the default costs the pass that it costs anyway, and the features' arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.base import BaseEstimator
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffret_lib.analysis import PAIR, per_query_best
from diffret_lib.cache import remembered
from diffret_lib.collection import Collection
from diffret_lib.evaluation import Run, holm, macro_randomization_p
from diffret_lib.readers import MaskedPositions
from diffret_lib.retrievers import DiffRetriever
from diffret_lib.study import METRIC, SELECTION_MODE, Study

#: Features of a query, with what each needs besides the text.
FEATURES = {
    "tokens": "tokens of the query: no pass",
    "entropy_first": "entropy of the prediction at the first mask (nats): the pass at the default Kq",
    "entropy_mean": "mean entropy over the masks (nats): the same pass",
    "distinct": "share of distinct tokens among the greedy predictions: the same pass",
    "cosine": "mean cosine between the query's vectors: the same pass",
    "gap_second": "first score less the second, in standard deviations of the ranking's scores: the default ranking",
    "gap_tenth": "first score less the mean of the first ten, in the same unit: the default ranking",
}
_KEYS = ["collection", "query_id"]


# -- features ----------------------------------------------------------------------------------------------


def mask_features(retriever: DiffRetriever, texts: Sequence[str], batch: int = 16) -> pd.DataFrame:
    """What one pass over the masked queries says of each; columns the first five of :data:`FEATURES`.

    As in the representations, positions from a special token on do not count.  A query with one vector has
    ``cosine`` 1.

    Parameters
    ----------
    retriever : DiffRetriever
        Its Kq is the one of the pass.
    texts : sequence of str
    batch : int
        Texts of one forward pass.
    """
    reader, rows = retriever.reader, []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        hidden, logits = masked_pass(retriever, part)
        lengths = [len(ids) for ids in reader.text_ids(part, "query")[0]]
        rows.append(summaries(reader, hidden, logits).assign(tokens=lengths))
    columns = list(FEATURES)[:5]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns, dtype=float)


@torch.inference_mode()
def masked_pass(retriever: DiffRetriever, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [n, Kq, H] and logits [n, Kq, V] at the positions that are read for queries."""
    reader: MaskedPositions = retriever.reader
    hidden = reader.masked(retriever.features(list(texts), "query"))
    return hidden, reader.logits(hidden)


@torch.inference_mode()
def summaries(reader: MaskedPositions, hidden: torch.Tensor, logits: torch.Tensor) -> pd.DataFrame:
    """Entropies, distinct tokens and cosine of :func:`masked_pass`, a row a query."""
    greedy = logits.argmax(-1)
    valid = reader.before_special(greedy)
    entropy = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    vectors = torch.nn.functional.normalize(hidden.float(), dim=-1) * valid[..., None]
    count = valid.sum(1)
    pairs = (count * (count - 1)).clamp(min=1)
    cosine = ((vectors @ vectors.mT).sum((1, 2)) - count) / pairs
    distinct = [len(set(ids[ok].tolist())) / int(ok.sum()) for ids, ok in zip(greedy, valid, strict=True)]
    columns = {
        "entropy_first": entropy[:, 0],
        "entropy_mean": (entropy * valid).sum(1) / count,
        "cosine": torch.where(count > 1, cosine, 1.0),
    }
    return pd.DataFrame({name: v.double().cpu().numpy() for name, v in columns.items()}).assign(distinct=distinct)


def gap_features(run: Run, query_ids: Sequence[str]) -> pd.DataFrame:
    """Score gaps at the head of each query's ranking; columns gap_second, gap_tenth.

    0 where fewer than two passages are retrieved or all scores are equal.
    """
    rows = []
    for query in query_ids:
        scores = np.sort(np.array(list(run[query].values()), float))[::-1]
        spread = scores.std() if len(scores) > 1 else 0.0
        if spread > 1e-9:
            rows.append(((scores[0] - scores[1]) / spread, (scores[0] - scores[:10].mean()) / spread))
        else:
            rows.append((0.0, 0.0))
    return pd.DataFrame(rows, columns=["gap_second", "gap_tenth"], dtype=float)


def query_features(
    study: Study, collection: Collection, pair: tuple[int, int], mode: str = SELECTION_MODE
) -> pd.DataFrame:
    """The features of a collection's judged queries, from the pass and the ranking of the pair (Kq, Kp).

    Returns
    -------
    DataFrame
        Index (collection, query_id), sorted by query; columns :data:`FEATURES`.
    """
    retriever = study.diffretriever(*pair)
    texts = dict(zip(collection.query_ids, collection.queries, strict=True))
    ids = sorted(collection.qrels)

    def computed() -> dict[str, list[float]]:
        masks = mask_features(retriever, [texts[q] for q in ids])
        gaps = gap_features(study.runs(retriever, collection, [mode])[mode], ids)
        return pd.concat([masks, gaps], axis=1).to_dict("list")

    key = study.address([retriever], collection, mode, list(FEATURES))
    frame = pd.DataFrame(remembered("features", key, computed))
    frame.index = pd.MultiIndex.from_product([[collection.name], ids], names=_KEYS)
    return frame[list(FEATURES)].astype(float)


def count_values(grid: pd.DataFrame, k_passage: int, mode: str = SELECTION_MODE) -> pd.DataFrame:
    """nDCG@10 of every query under each Kq at one Kp; index (collection, query_id), columns Kq."""
    cells = grid[(grid["mode"] == mode) & (grid["metric"] == METRIC) & (grid["k_passage"] == k_passage)]
    return cells.pivot(index=_KEYS, columns="k_query", values="value")


def feature_correlations(features: pd.DataFrame, grid: pd.DataFrame, mode: str = SELECTION_MODE) -> pd.DataFrame:
    """Spearman correlations of the features with a query's need of vectors, ranked within each collection.

    Ranks within collections keep differences between collections out.  The targets are ``best Kq`` (queries on
    which all pairs tie left out) and ``large over small Kq`` (nDCG@10 at the largest Kq less that at the smallest,
    mean over Kp).  p-values are corrected by Holm over the whole table.

    Returns
    -------
    DataFrame
        Columns feature, target, rho, p, p_corrected, queries; rho and p are nan where a feature does not vary.
    """
    best = per_query_best(grid, mode)
    best = best[best["ties"] < grid.groupby(PAIR).ngroups].set_index(_KEYS)["k_query"]
    cells = grid[(grid["mode"] == mode) & (grid["metric"] == METRIC)]
    by_count = cells.groupby([*_KEYS, "k_query"])["value"].mean().unstack("k_query")
    smallest, largest = by_count.columns.min(), by_count.columns.max()
    targets = {"best Kq": best, "large over small Kq": by_count[largest] - by_count[smallest]}
    rows = []
    for target, values in targets.items():
        both = features.join(values.rename("target"), how="inner")
        ranks = both.groupby(level="collection").rank(pct=True)
        for feature in features.columns:
            x, y = ranks[feature], ranks["target"]
            varies = len(both) > 2 and x.nunique() > 1 and y.nunique() > 1
            rho, p = stats.spearmanr(x, y) if varies else (np.nan, np.nan)
            rows.append({"feature": feature, "target": target, "rho": rho, "p": p, "queries": len(both)})
    table = pd.DataFrame(rows)
    table["p_corrected"] = holm(table["p"].to_numpy())
    return table[["feature", "target", "rho", "p", "p_corrected", "queries"]]


# -- the allocator -----------------------------------------------------------------------------------------


class KAllocator(BaseEstimator):
    """Chooses Kq by the predicted gain over a default Kq.

    One ridge regression per other Kq predicts its gain in nDCG@10 over the default; the largest predicted gain is
    taken if it exceeds a margin.  Penalties and the margin are chosen by cross-validation on the queries that it is
    fitted to.  An infinite margin, that never leaves the default, is among the margins: of margins that do equally
    well the largest is taken.

    Parameters
    ----------
    default : int
        The Kq of a query that there is no reason to change.
    margins : sequence of float
        In units of nDCG@10.
    alphas : sequence of float
        Penalties of the ridge regressions, on standardised features.
    folds : int
        Of the cross-validation; no more than there are queries.
    seed : int
        Of the split into folds.

    Attributes
    ----------
    counts_ : list of int
        The Kq other than the default.
    model_ : Pipeline
        Fitted on all queries.
    margin_ : float
    out_of_fold_ : ndarray of float, shape (n, len(counts_))
        Gains predicted for queries that were held out.
    r2_ : dict of Kq to float
        Explained variance of the held-out gains; below 0 is worse than their mean.
    margin_gains_ : dict of margin to float
        Mean gain over the default on held-out queries.
    """

    def __init__(
        self,
        default: int = 4,
        margins: Sequence[float] = (0.0, 0.01, 0.02, 0.05, 0.1, np.inf),
        alphas: Sequence[float] = (1.0, 10.0, 100.0, 1000.0, 10000.0),
        folds: int = 10,
        seed: int = 0,
    ) -> None:
        self.default, self.margins, self.alphas, self.folds, self.seed = default, margins, alphas, folds, seed

    def fit(self, features: pd.DataFrame, values: pd.DataFrame) -> KAllocator:
        """Learn from queries of which the value under every Kq is known.

        Parameters
        ----------
        features : DataFrame of float, shape (n, F)
        values : DataFrame of float, shape (n, number of Kq)
            nDCG@10; columns Kq, with the default among them; rows those of ``features``.

        Raises
        ------
        ValueError
            When rows do not fit, the default has no column, or there are fewer than four queries.
        """
        if not features.index.equals(values.index):
            raise ValueError(
                f"features of {len(features)} queries and values of {len(values)} are not of the same queries"
            )
        if self.default not in values.columns:
            known = ", ".join(map(str, values.columns))
            raise ValueError(f"the default Kq={self.default} has no column; there are {known}")
        if len(features) < 4:
            raise ValueError(f"{len(features)} queries are too few to learn from; at least 4 are needed")
        self.counts_ = [int(k) for k in values.columns if k != self.default]
        self.feature_names_in_ = np.array(features.columns, dtype=object)
        x = features.to_numpy(float)
        gains = values[self.counts_].to_numpy(float) - values[[self.default]].to_numpy(float)
        model = make_pipeline(StandardScaler(), RidgeCV(list(self.alphas), alpha_per_target=gains.shape[1] > 1))
        folds = KFold(min(self.folds, len(x)), shuffle=True, random_state=self.seed)
        self.out_of_fold_ = cross_val_predict(model, x, gains, cv=folds).reshape(gains.shape)
        self.r2_ = dict(zip(self.counts_, r2_score(gains, self.out_of_fold_, multioutput="raw_values"), strict=True))
        known = np.column_stack([np.zeros(len(x)), gains])
        self.margin_gains_ = {
            m: float(known[np.arange(len(x)), self._places(self.out_of_fold_, m)].mean()) for m in self.margins
        }
        self.margin_ = max(self.margins, key=lambda m: (round(self.margin_gains_[m], 9), m))
        self.model_ = model.fit(x, gains)
        return self

    def predict(self, features: pd.DataFrame) -> np.ndarray:
        """The Kq of each query; int64 [n]."""
        gains = self.model_.predict(features[list(self.feature_names_in_)].to_numpy(float)).reshape(len(features), -1)
        return np.array([self.default, *self.counts_])[self._places(gains, self.margin_)]

    @staticmethod
    def _places(gains: np.ndarray, margin: float) -> np.ndarray:
        """0 for the default, i + 1 for the i-th other Kq."""
        return np.where(gains.max(1) > margin, 1 + gains.argmax(1), 0)


def allocator_model_table(allocator: KAllocator, values: pd.DataFrame) -> pd.DataFrame:
    """What an allocator learned, a row for each Kq other than the default.

    Parameters
    ----------
    allocator : KAllocator
        Fitted.
    values : DataFrame
        What it was fitted to.

    Returns
    -------
    DataFrame
        Columns k_query, mean_gain (over the default), ties (share of the queries on which it equals the default),
        r2 (held out), alpha, margin, margin_gain (held out), and for each feature its coefficient (nDCG@10 for one
        standard deviation).
    """
    ridge = allocator.model_[-1]
    coefficients = np.atleast_2d(ridge.coef_)
    alphas = np.broadcast_to(ridge.alpha_, len(allocator.counts_))
    rows = []
    for k, alpha, row in zip(allocator.counts_, alphas, coefficients, strict=True):
        gain = values[k] - values[allocator.default]
        rows.append(
            {
                "k_query": k,
                "mean_gain": gain.mean(),
                "ties": float(np.isclose(gain, 0).mean()),
                "r2": allocator.r2_[k],
                "alpha": alpha,
                "margin": allocator.margin_,
                "margin_gain": allocator.margin_gains_[allocator.margin_],
                **dict(zip(allocator.feature_names_in_, row, strict=True)),
            }
        )
    return pd.DataFrame(rows)


def allocator_table(
    values: pd.DataFrame,
    chosen: pd.Series,
    default: int,
    *,
    resamples: int,
    seed: int,
    chance: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The allocator against the default Kq and the oracle over Kq.

    Parameters
    ----------
    values : DataFrame
        nDCG@10, index (collection, query_id), columns Kq (:func:`count_values`).
    chosen : Series of int
        Kq of every query, of the same index.
    default : int
    chance : dict of collection to float, optional
        The part of the oracle's headroom over Kq that is chance.

    Returns
    -------
    DataFrame
        A row for each collection and a last one, ``macro``, their mean.  Columns collection, queries, selected,
        adaptive, oracle_kq, headroom (oracle_kq less selected), chance, gain (adaptive less selected), closed (gain
        / headroom; nan where there is none), mean_kq, changed (share of the queries that leave the default), and in
        the last row closed_low, closed_high (95 % bootstrap interval, queries drawn within each collection) and p
        (sign-flipping test that the macro gain is 0).

    Raises
    ------
    ValueError
        When a query has no choice.
    """
    chosen = chosen.reindex(values.index)
    if chosen.isna().any():
        raise ValueError(f"no Kq was chosen for {int(chosen.isna().sum())} of {len(values)} queries")
    places = values.columns.get_indexer(chosen.astype(int))
    taken = pd.Series(values.to_numpy()[np.arange(len(values)), places], values.index)
    frame = pd.DataFrame(
        {
            "selected": values[default],
            "adaptive": taken,
            "oracle_kq": values.max(axis=1),
            "headroom": values.max(axis=1) - values[default],
            "gain": taken - values[default],
            "mean_kq": chosen.astype(float),
            "changed": (chosen != default).astype(float),
        }
    )
    groups = frame.groupby(level="collection", sort=False)
    table = groups.mean()
    table.insert(0, "queries", groups.size())
    table["chance"] = pd.Series(dict(chance or {}), dtype=float).reindex(table.index)
    table = pd.concat([table, table.mean().to_frame("macro").T.assign(queries=len(frame))]).astype({"queries": int})
    # of a collection or a mean without headroom there is nothing to close
    table["closed"] = (table["gain"] / table["headroom"].where(table["headroom"] > 1e-12)).astype(float)
    parts = [(g["gain"].to_numpy(), g["headroom"].to_numpy()) for _, g in groups]
    bounds = _closed_interval(parts, resamples, seed)
    p = macro_randomization_p({c: g["gain"].to_numpy() for c, g in groups}, resamples, seed)
    for name, value in zip(("closed_low", "closed_high", "p"), (*bounds, p), strict=True):
        table[name] = np.where(table.index == "macro", value, np.nan)
    order = ["queries", "selected", "adaptive", "oracle_kq", "headroom", "chance", "gain", "closed", "closed_low",
             "closed_high", "p", "mean_kq", "changed"]  # fmt: skip
    return table[order].rename_axis("collection").reset_index()


def _closed_interval(parts: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of macro gain / macro headroom; queries are drawn within each collection."""
    if min(len(gain) for gain, _ in parts) < 2 or not any(headroom.any() for _, headroom in parts):
        return float("nan"), float("nan")

    def share(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        gain = sum(g[i.astype(int)].mean(axis) for (g, _), i in zip(parts, drawn, strict=True))
        headroom = sum(h[i.astype(int)].mean(axis) for (_, h), i in zip(parts, drawn, strict=True))
        return np.where(headroom > 0, gain / np.where(headroom > 0, headroom, 1), 0.0)

    # places are drawn, so that a query's gain and headroom stay together
    interval = stats.bootstrap(
        [np.arange(len(gain)) for gain, _ in parts],
        share,
        n_resamples=resamples,
        batch=200,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def allocator_latency(study: Study, texts: Sequence[str], pair: tuple[int, int], chosen: Sequence[int]) -> pd.DataFrame:
    """Milliseconds that the allocator costs a query, read alone.

    Parameters
    ----------
    texts : sequence of str
        Queries.
    pair : (Kq, Kp)
        Kq is the default.
    chosen : sequence of int
        The Kq that the allocator gives each of them.

    Returns
    -------
    DataFrame
        Columns step, queries, median_ms, q25_ms, q75_ms, mean_ms.  The steps: one pass (what a fixed Kq costs), the
        features' arithmetic, and the whole (a pass, the features, and a second pass where Kq changes).  Searching is
        not in it.
    """
    default, k_passage = pair
    readers = {k: study.diffretriever(k, k_passage) for k in {default, *map(int, chosen)}}
    for retriever in readers.values():
        masked_pass(retriever, texts[:1])  # warm-up
    steps: dict[str, list[float]] = {"one pass at the default Kq": [], "features": [], "allocator": []}
    one_pass, features, whole = steps.values()
    for text, k in zip(texts, chosen, strict=True):
        (hidden, logits), first = _timed(lambda text=text: masked_pass(readers[default], [text]))
        _, extra = _timed(lambda h=hidden, z=logits: summaries(readers[default].reader, h, z))
        second = _timed(lambda text=text, k=int(k): masked_pass(readers[k], [text]))[1] if k != default else 0.0
        one_pass.append(first)
        features.append(extra)
        whole.append(first + extra + second)
    rows = []
    for step, times in steps.items():
        low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
        rows.append({"step": step, "queries": len(times), "median_ms": median, "q25_ms": low, "q75_ms": high,
                     "mean_ms": np.mean(times)})  # fmt: skip
    return pd.DataFrame(rows)


def _timed(call: Callable[[], object]) -> tuple[object, float]:
    """What the call gives, and its milliseconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, 1000 * (time.perf_counter() - start)


def allocator_summary(table: pd.DataFrame, learned: pd.DataFrame, latency: pd.DataFrame) -> str:
    """:func:`allocator_table`, :func:`allocator_model_table` and :func:`allocator_latency` in words (Markdown)."""
    macro = table[table["collection"] == "macro"].iloc[0]
    cost = latency.set_index("step")["mean_ms"]
    if macro["p"] < 0.05:
        verdict = "a gain" if macro["gain"] > 0 else "a loss"
    else:
        verdict = "no clear difference from the default"
    lines = [
        f"- The allocator changes {macro['changed']:.0%} of the queries (mean Kq {macro['mean_kq']:.1f}) and moves "
        f"macro nDCG@10 by **{macro['gain']:+.4f}** (p = {macro['p']:.3g}): {verdict}. It closes **{macro['closed']:.1%}** "
        f"[{macro['closed_low']:.1%}, {macro['closed_high']:.1%}] of the headroom of {macro['headroom']:.3f}, of which "
        f"{macro['chance']:.3f} is chance by random twins.",
        f"- On training queries, held out, the features explain at best {learned['r2'].max():+.3f} of the variance of "
        f"the gains (0 is what their mean does); on {learned['ties'].mean():.0%} of the queries another Kq gives the "
        f"same nDCG@10 as the default; the margin is {learned['margin'].iloc[0]:g}, with a held-out gain of "
        f"{learned['margin_gain'].iloc[0]:+.4f}.",
        f"- Reading a query costs {cost['allocator']:.1f} ms on average, against "
        f"{cost['one pass at the default Kq']:.1f} ms at a fixed Kq; the features take "
        f"{cost['features']:.2f} ms of it.",
    ]
    if not macro["changed"]:
        why = "because it never leaves the default: cross-validation found no margin that pays"
        lines.insert(1, f"- It closes nothing {why}.")
    elif macro["gain"] <= 0:
        lines.insert(1, "- It closes nothing: the gains that it predicts on training queries are not there on others.")
    return "\n".join(lines)
