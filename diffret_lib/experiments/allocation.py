"""An adaptive allocator: chooses Kq for a query without looking at relevance (beyond the paper).

Kp stays.  Every query is read and searched at the default Kq; what that pass and that ranking say (:data:`FEATURES`)
decides whether it is read and searched once more at another Kq.
"""

from __future__ import annotations

from collections.abc import Sequence

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

from diffret_lib.cache import remember
from diffret_lib.data.collection import Collection
from diffret_lib.experiments.comparison import PAIR, QUERY, RESAMPLES, grid_cells, paired, per_query_best
from diffret_lib.experiments.rankings import ranking
from diffret_lib.experiments.study import Study
from diffret_lib.models.prompts import SIDES
from diffret_lib.models.readers import MaskedPositions
from diffret_lib.retrieval.metrics import Run, holm
from diffret_lib.retrieval.search import SELECTION_MODE
from diffret_lib.retrieval.systems import DiffRetriever

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
#: Margins (nDCG@10) and penalties (on standardised features) that cross-validation chooses from.
MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1, np.inf)
ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


@torch.inference_mode()
def mask_features(retriever: DiffRetriever, texts: Sequence[str], batch: int = 16) -> pd.DataFrame:
    """First five of :data:`FEATURES`, from one pass over the masked queries, ``batch`` texts at a time.

    As in the representations, positions from a special token on do not count; one vector has ``cosine`` 1.
    """
    reader, rows = retriever.reader, []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        lengths = [len(ids) for ids in reader.text_ids(part, "query")[0]]
        hidden = reader.masked(retriever.features(part, "query"))
        rows.append(summaries(reader, hidden, reader.logits(hidden)).assign(tokens=lengths))
    return pd.concat(rows, ignore_index=True)[list(FEATURES)[:5]]


@torch.inference_mode()
def summaries(reader: MaskedPositions, hidden: torch.Tensor, logits: torch.Tensor) -> pd.DataFrame:
    """Entropies, distinct tokens and cosine of hidden states [n, Kq, H] and logits [n, Kq, V], a row a query."""
    greedy = logits.argmax(-1)
    valid = reader.before_special(greedy)
    entropy = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    vectors = torch.nn.functional.normalize(hidden.float(), dim=-1) * valid[..., None]
    count = valid.sum(1)
    pairs = (count * (count - 1)).clamp(min=1)
    cosine = ((vectors @ vectors.mT).sum((1, 2)) - count) / pairs
    distinct = [len(set(ids[ok].tolist())) / int(ok.sum()) for ids, ok in zip(greedy, valid, strict=True)]
    columns = {"entropy_first": entropy[:, 0], "entropy_mean": (entropy * valid).sum(1) / count}
    columns["cosine"] = torch.where(count > 1, cosine, 1.0)
    return pd.DataFrame({name: v.double().cpu().numpy() for name, v in columns.items()}).assign(distinct=distinct)


def gap_features(run: Run, query_ids: Sequence[str]) -> pd.DataFrame:
    """Score gaps at the head of each query's ranking; 0 for fewer than two passages or equal scores."""
    rows = []
    for query in query_ids:
        scores = np.sort(np.array(list(run[query].values()), float))[::-1]
        spread = scores.std() if len(scores) > 1 else 0.0
        gaps = (scores[0] - scores[1], scores[0] - scores[:10].mean()) if spread > 1e-9 else (0.0, 0.0)
        rows.append(np.array(gaps) / max(spread, 1e-9))
    return pd.DataFrame(rows, columns=["gap_second", "gap_tenth"], dtype=float)


def query_features(study: Study, collection: Collection, pair: tuple[int, int]) -> pd.DataFrame:
    """:data:`FEATURES` of a collection's judged queries at the pair (Kq, Kp), read as the grid is.

    The index is (collection, query_id), sorted.
    """
    retriever, ids = study.diffretriever(*pair, shared_text=study.profile.shared_text_grid), sorted(collection.qrels)
    texts = dict(zip(collection.query_ids, collection.queries, strict=True))

    def computed() -> dict[str, list[float]]:
        masks = mask_features(retriever, [texts[q] for q in ids])
        queries, passages = (study.sides(collection, side)[k] for side, k in zip(SIDES, pair, strict=True))
        run = ranking(queries, passages, collection, SELECTION_MODE, study.profile.top_k)
        return pd.concat([masks, gap_features(run, ids)], axis=1).to_dict("list")

    key = study.address([retriever], collection, code=(mask_features, gap_features, DiffRetriever))
    frame = pd.DataFrame(remember("features", key, computed))
    frame.index = pd.MultiIndex.from_product([[collection.name], ids], names=QUERY)
    return frame[list(FEATURES)].astype(float)


def count_values(grid: pd.DataFrame, k_passage: int) -> pd.DataFrame:
    """Hybrid nDCG@10 of every query under each Kq at one Kp; index (collection, query_id), columns Kq."""
    return grid_cells(grid[grid["k_passage"] == k_passage]).pivot(index=QUERY, columns="k_query", values="value")


def feature_correlations(features: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Spearman correlations of the features with a query's need of vectors, ranked within each collection.

    Targets: ``best Kq`` (without queries on which all pairs tie) and ``large over small Kq`` (nDCG@10 at the largest Kq
    less that at the smallest, mean over Kp).  Columns feature, target, rho, p, p_corrected (Holm, over the table) and
    queries; rho and p are nan where a feature does not vary.
    """
    best = per_query_best(grid)
    best = best[best["ties"] < grid.groupby(PAIR).ngroups].set_index(QUERY)["k_query"]
    by_count = grid_cells(grid).groupby([*QUERY, "k_query"])["value"].mean().unstack("k_query")
    larger = by_count[by_count.columns.max()] - by_count[by_count.columns.min()]
    rows = []
    for target, values in {"best Kq": best, "large over small Kq": larger}.items():
        both = features.join(values.rename("target"), how="inner")
        ranks = both.groupby(level="collection").rank(pct=True)
        for feature in features.columns:
            x, y = ranks[feature], ranks["target"]
            varies = len(both) > 2 and x.nunique() > 1 and y.nunique() > 1
            rows.append((feature, target, *(stats.spearmanr(x, y) if varies else (np.nan, np.nan)), len(both)))
    table = pd.DataFrame(rows, columns=["feature", "target", "rho", "p", "queries"])
    table.insert(4, "p_corrected", holm(table["p"]))
    return table


class KAllocator(BaseEstimator):
    """Chooses Kq by the predicted gain over a default Kq.

    A ridge regression per other Kq predicts its gain in nDCG@10 over the default; the largest is taken if it exceeds a
    margin.  Penalties (:data:`ALPHAS`) and the margin (:data:`MARGINS`; of equally good ones the largest) are chosen by
    cross-validation, its folds split by ``seed``.

    Fitted: ``model_`` (of all queries), ``margin_``, ``out_of_fold_`` (held-out predicted gains, float [n, other Kq])
    and ``learned_``, a row for each other Kq: k_query, mean_gain (over the default), ties (share of the queries on
    which it equals the default), r2 (held out), alpha, margin, margin_gain (held out), and each feature's coefficient
    (nDCG@10 for one standard deviation).
    """

    def __init__(self, default: int = 4, seed: int = 0) -> None:
        self.default, self.seed = default, seed

    def fit(self, features: pd.DataFrame, values: pd.DataFrame) -> KAllocator:
        """Learn from queries of which nDCG@10 under every Kq is known (the columns of ``values``).

        ValueError when rows do not fit or there are fewer than four queries; KeyError without the default's column.
        """
        if not features.index.equals(values.index):
            raise ValueError("features and values are not of the same queries")
        if len(features) < 4:
            raise ValueError(f"{len(features)} queries are too few to learn from; at least 4 are needed")
        gains = values[[k for k in values if k != self.default]].sub(values[self.default], axis=0)
        x, y = features.to_numpy(float), np.ascontiguousarray(gains, float)
        model = make_pipeline(StandardScaler(), RidgeCV(ALPHAS, alpha_per_target=y.shape[1] > 1))
        folds = KFold(min(10, len(x)), shuffle=True, random_state=self.seed)
        self.out_of_fold_ = cross_val_predict(model, x, y, cv=folds).reshape(y.shape)
        known = np.column_stack([np.zeros(len(x)), y])
        margin_gains = {m: known[np.arange(len(x)), self._places(self.out_of_fold_, m)].mean() for m in MARGINS}
        self.margin_ = max(MARGINS, key=lambda m: (round(margin_gains[m], 9), m))
        self.model_ = model.fit(x, y)
        learned = pd.DataFrame({
            "k_query": gains.columns, "mean_gain": gains.mean().to_numpy(), "ties": np.isclose(gains, 0).mean(0),
            "r2": r2_score(y, self.out_of_fold_, multioutput="raw_values"), "alpha": model[-1].alpha_,
            "margin": self.margin_, "margin_gain": margin_gains[self.margin_],
        })  # fmt: skip
        self.learned_ = learned.join(pd.DataFrame(np.atleast_2d(model[-1].coef_), columns=features.columns))
        return self

    def predict(self, features: pd.DataFrame) -> np.ndarray:
        """Choose Kq for each query; int64 [n]."""
        gains = self.model_.predict(features.to_numpy(float)).reshape(len(features), -1)
        return np.array([self.default, *self.learned_["k_query"]])[self._places(gains, self.margin_)]

    @staticmethod
    def _places(gains: np.ndarray, margin: float) -> np.ndarray:
        """0 for the default, i + 1 for the i-th other Kq."""
        return np.where(gains.max(1) > margin, 1 + gains.argmax(1), 0)


def allocator_table(
    values: pd.DataFrame, chosen: pd.Series, default: int, chance: pd.Series, out_of_domain: Sequence[str],
    resamples: int = RESAMPLES, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Compare the allocator with the default Kq and the oracle over Kq.

    ``values`` is from :func:`count_values`; ``chosen`` has the Kq of every query, and ``chance`` the chance level of
    the oracle's headroom over Kq.  A row for each collection, and one for ``macro``, the mean of those out of domain.
    Columns collection, queries, selected, adaptive, oracle_kq, headroom (oracle_kq less selected), chance, gain
    (adaptive less selected), low, high, p and detectable (of the macro gain, as of
    :func:`~diffret_lib.experiments.comparison.paired`), closed (gain / headroom; nan without any), mean_kq and changed
    (share that leaves the default).
    """
    chosen = chosen.reindex(values.index)
    taken = values.to_numpy()[np.arange(len(values)), values.columns.get_indexer(chosen)]
    frame = pd.DataFrame({"selected": values[default], "adaptive": taken, "oracle_kq": values.max(axis=1)})
    frame["headroom"], frame["gain"] = frame["oracle_kq"] - frame["selected"], frame["adaptive"] - frame["selected"]
    frame["chance"], frame["mean_kq"], frame["changed"] = chance.reindex(values.index), chosen, chosen != default
    groups, outside = frame.astype(float).groupby(level="collection", sort=False), list(out_of_domain)
    table, sizes = groups.mean(), groups.size()
    table.loc["macro"] = table.loc[outside].mean()
    table["queries"] = [*sizes, sizes[outside].sum()]
    # of a collection or a mean without headroom there is nothing to close
    table["closed"] = table["gain"] / table["headroom"].where(table["headroom"] > 1e-12)
    counted = frame["gain"][frame.index.isin(outside, level="collection")]
    found, tested = paired(counted, resamples, seed), ["low", "high", "p", "detectable"]
    table.loc["macro", tested] = [found[name] for name in tested]
    order = "queries selected adaptive oracle_kq headroom chance gain low high p detectable closed mean_kq changed"
    return table[order.split()].rename_axis("collection").reset_index()


def allocate(study: Study, queries: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Fit an allocator on the training collection and apply it to all test collections, at the selected Kp.

    ``queries`` is from :func:`~diffret_lib.experiments.oracle.oracle_queries`, for the chance level.  Returns the
    features of the test queries, what the allocator learned (:class:`KAllocator`), and :func:`allocator_table`.
    """
    pair, seed = study.selected, study.profile.seed
    known, values = count_values(study.train_grid, pair[1]), count_values(study.test_grid, pair[1])
    train = query_features(study, study.train_collection, pair).loc[known.index]
    features = pd.concat([query_features(study, c, pair) for c in study.grid_collections])
    allocator = KAllocator(default=pair[0], seed=seed).fit(train, known)
    values = pd.concat([values.loc[[c.name]] for c in study.grid_collections])  # in the profile's order
    chosen = pd.Series(allocator.predict(features.loc[values.index]), values.index)
    chance = queries.set_index(QUERY)["chance_kq"]
    outcome = allocator_table(values, chosen, pair[0], chance, study.out_of_domain, seed=seed)
    return features, allocator.learned_, outcome


def allocator_answer(outcome: pd.DataFrame) -> str:
    """One sentence (Markdown) on :func:`allocator_table`."""
    if not outcome["changed"].any():
        return "Without judgements the allocator never leaves the default Kq: no margin paid in cross-validation."
    macro = outcome.iloc[-1]
    verdict = ("a gain" if macro["gain"] > 0 else "a loss") if macro["p"] < 0.05 else "no clear difference"
    return (
        f"Chosen without relevance judgements, Kq changes for {macro['changed']:.0%} of the queries and moves nDCG@10 "
        f"by **{macro['gain']:+.4f}** [{macro['low']:+.4f}, {macro['high']:+.4f}] (p = {macro['p']:.2g}; detectable "
        f"{macro['detectable']:.4f}), of a headroom of {macro['headroom']:.3f}, {macro['chance']:.3f} of it chance: "
        f"{verdict}."
    )
