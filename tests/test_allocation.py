from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from statsmodels.stats.multitest import multipletests

from diffret_lib.experiments import allocation
from diffret_lib.experiments.allocation import KAllocator, allocator_table, count_values, mask_features, query_features
from diffret_lib.experiments.comparison import QUERY, paired
from diffret_lib.retrieval.systems import DiffRetriever
from tests.test_study import changed

TEXTS = ["heap", "sorted copy of an array", "eigenvalues and right eigenvectors", "", "a binary tree for parents",
         "queue"]  # fmt: skip


@pytest.fixture(scope="module")
def retriever(diffusion) -> DiffRetriever:
    return DiffRetriever(diffusion, k_query=4, k_passage=2)


# -- features --------------------------------------------------------------------------------------------------


def test_features_of_the_masks_recomputed(retriever):
    """Against one plain pass of the whole model for each query."""
    found = mask_features(retriever, TEXTS, batch=4)
    assert list(found) == ["tokens", "entropy_first", "entropy_mean", "distinct", "cosine"] and len(found) == len(TEXTS)
    reader, shorter = retriever.reader, 0
    for text, row in zip(TEXTS, found.itertuples(), strict=True):
        inputs = reader.preprocess([text], task="query")
        ids = inputs["input_ids"]
        with torch.no_grad():
            out = reader.model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, is_causal=False)
        masks = (ids[0] == reader.mask_id).nonzero()[:, 0] - 1  # token i is read at position i - 1
        logits, hidden = out.logits[0, masks].double(), out.hidden_states[-1][0, masks].double()
        logits[:, reader.mask_id] = -math.inf
        greedy = logits.argmax(-1).tolist()
        special = set(reader.special_ids.tolist())
        n = next((i for i, token in enumerate(greedy) if i and token in special), len(greedy))
        shorter += n < 4
        entropies = []
        for z in logits.tolist():
            weights = [math.exp(v - max(z)) for v in z]
            p = [w / sum(weights) for w in weights]
            entropies.append(-sum(v * math.log(v) for v in p if v))
        assert row.entropy_first == pytest.approx(entropies[0], abs=1e-4)
        assert row.entropy_mean == pytest.approx(np.mean(entropies[:n]), abs=1e-4)
        assert row.distinct == len(set(greedy[:n])) / n
        pairs = [(hidden[i], hidden[j]) for i in range(n) for j in range(i)]
        cosines = [float(a @ b / a.norm() / b.norm()) for a, b in pairs]
        assert row.cosine == pytest.approx(np.mean(cosines) if cosines else 1.0, abs=1e-4)
        assert row.tokens == len(reader.tokenizer.encode(text, add_special_tokens=False))
    assert found["entropy_mean"].std() > 0.01 and found["cosine"].std() > 0.01


def test_positions_from_a_special_token_on_do_not_count(retriever):
    reader = retriever.reader
    special = int(reader.special_ids[reader.special_ids != reader.mask_id][0])
    logits = torch.zeros(3, 4, reader.vocab_size)
    for row, tokens in enumerate(((50, 51, special, 52), (50, special, 51, 52), (special, 51, 51, 52))):
        for place, token in enumerate(tokens):
            logits[row, place, token] = 5.0 * (1 + place)
    hidden = torch.tensor([[[1.0, 0], [3, 0], [0, 1], [0, 1]], [[1, 0]] * 4, [[1, 0], [0, 1], [0, -2], [0, 2]]])
    found = allocation.summaries(reader, hidden, logits)
    assert found["distinct"].tolist() == [1, 1, 0.75]
    assert found["cosine"].tolist() == pytest.approx([1, 1, -1 / 6])  # one vector is left of the second query
    p = torch.softmax(logits[1, 0], 0)
    assert found["entropy_mean"][1] == found["entropy_first"][1] == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_one_vector_is_no_spread(retriever):
    single = DiffRetriever(retriever.backbone, k_query=1, k_passage=2)
    found = mask_features(single, TEXTS)
    assert (found["cosine"] == 1).all() and (found["distinct"] == 1).all()
    np.testing.assert_allclose(found["entropy_first"], found["entropy_mean"])


def test_gaps_by_hand():
    scores = {f"p{i}": float(s) for i, s in enumerate([9, 7, 6, 5, 5, 4, 3, 2, 1, 1, 0, 0])}
    run = {"a": scores, "b": {"p1": 1.0}, "c": {"p1": 2.0, "p2": 2.0}}
    found = allocation.gap_features(run, ["c", "a", "b"])
    spread = np.std(list(scores.values()))
    np.testing.assert_allclose(found["gap_second"], [0, 2 / spread, 0])
    np.testing.assert_allclose(found["gap_tenth"], [0, (9 - 4.3) / spread, 0])


def test_features_of_a_collection(s):
    collection = s.test_collections[0]
    found = query_features(s, collection, (2, 1))
    assert list(found) == list(allocation.FEATURES)
    assert list(found.index) == [(collection.name, q) for q in sorted(collection.qrels)]
    retriever = s.diffretriever(2, 1)
    texts = dict(zip(collection.query_ids, collection.queries, strict=True))
    masks = mask_features(retriever, [texts[q] for q in sorted(collection.qrels)])
    np.testing.assert_allclose(found[list(masks)], masks)
    gaps = allocation.gap_features(s.runs(retriever, collection, ["hybrid"])["hybrid"], sorted(collection.qrels))
    np.testing.assert_allclose(found[["gap_second", "gap_tenth"]], gaps)
    # they are those of the reading that the grid has
    shared = query_features(changed(s, shared_text_grid=True), collection, (2, 1))
    masks = mask_features(s.diffretriever(2, 1, shared_text=True), [texts[q] for q in sorted(collection.qrels)])
    np.testing.assert_allclose(shared[list(masks)], masks)
    assert (shared["gap_tenth"] != found["gap_tenth"]).any()


def grid_of(values: dict[tuple[int, int], np.ndarray], collection: str = "c") -> pd.DataFrame:
    frames = [
        pd.DataFrame({"query_id": [f"q{i:03}" for i in range(len(v))], "k_query": kq, "k_passage": kp, "mode": mode,
                      "value": v if mode == "hybrid" else 0.5})
        for (kq, kp), v in values.items() for mode in ("dense", "hybrid")
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True).assign(collection=collection, coverage="whole", metric="ndcg@10")


def test_values_of_each_count():
    grid = grid_of({(1, 1): np.array([0.1, 0.2]), (4, 1): np.array([0.3, 0.4]), (1, 4): np.ones(2), (4, 4): np.ones(2)})
    found = count_values(grid, 1)
    assert found.to_dict("list") == {1: [0.1, 0.2], 4: [0.3, 0.4]}
    assert list(found.index) == [("c", "q000"), ("c", "q001")]


def queries_of(n: int, collection: str = "c") -> pd.MultiIndex:
    return pd.MultiIndex.from_product([[collection], [f"q{i:03}" for i in range(n)]], names=QUERY)


def test_correlations_are_spearman_s_within_collections():
    rng = np.random.default_rng(0)
    grids, features = [], []
    for shift, name in ((0.0, "c"), (100.0, "d")):
        x = rng.normal(size=30)
        values = {(kq, kp): rng.normal(size=30) * 0.3 + kq * x for kq in (1, 2, 4) for kp in (1, 2)}
        grids.append(grid_of(values, name))
        columns = {"goes": x + shift, "constant": 1.0, "other": rng.normal(size=30) - shift}
        features.append(pd.DataFrame(columns, queries_of(30, name)))
    one = allocation.feature_correlations(features[0], grids[0]).set_index(["feature", "target"])
    cells = count_values(grids[0], 1) / 2 + count_values(grids[0], 2) / 2
    rho, p = stats.spearmanr(features[0]["goes"], cells[4] - cells[1])
    row = one.loc["goes", "large over small Kq"]
    assert row["rho"] == pytest.approx(rho) and row["p"] == pytest.approx(p) and rho > 0.9 and row["queries"] == 30
    both = allocation.feature_correlations(pd.concat(features), pd.concat(grids))
    assert list(both) == ["feature", "target", "rho", "p", "p_corrected", "queries"] and len(both) == 6
    known = both.dropna()
    assert set(both["feature"]) - set(known["feature"]) == {"constant"}
    np.testing.assert_allclose(known["p_corrected"], multipletests(known["p"], method="holm")[1])
    rows = both.set_index(["feature", "target"])
    assert rows["rho"]["goes", "large over small Kq"] > 0.9 and rows["rho"]["goes", "best Kq"] > 0.7
    assert rows["p_corrected"]["other", "best Kq"] > 0.05  # the collections differ in it, and in nothing else


def test_queries_on_which_all_pairs_tie_have_no_best_count():
    values = {(kq, 1): np.array([0.5, 0.5, 0.1 * kq, 0.2, 0.4]) for kq in (1, 2)}
    values |= {(kq, 2): np.array([0.5, 0.5, 0.1, 0.3, 0.4 - 0.1 * kq]) for kq in (1, 2)}
    table = allocation.feature_correlations(pd.DataFrame({"x": np.arange(5.0)}, queries_of(5)), grid_of(values))
    assert table.set_index("target")["queries"].to_dict() == {"best Kq": 3, "large over small Kq": 5}


# -- the allocator ---------------------------------------------------------------------------------------------


def learnable(n: int, signal: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Queries whose gain at Kq = 8 grows with the first feature, and at Kq = 1 falls with it."""
    rng, index = np.random.default_rng(seed), queries_of(n)
    features = pd.DataFrame(rng.normal(size=(n, 3)) * [1, 50, 0.01], index, ["x", "y", "z"])
    base = rng.normal(0.5, 0.05, n)
    noise = rng.normal(0, 0.05, (2, n))
    values = {1: base - signal * features["x"] + noise[0], 4: base, 8: base + signal * features["x"] + noise[1]}
    return features, pd.DataFrame(values, index)


def outcome(values: pd.DataFrame, chosen: np.ndarray | int, resamples: int = 50) -> pd.DataFrame:
    """The table for a default of 4 and a chance level of a half."""
    chosen, chance = (pd.Series(given, values.index) for given in (chosen, 0.5))
    return allocator_table(values, chosen, 4, chance, values.index.unique(0), resamples)


def test_what_can_be_learned_is_learned():
    allocator = KAllocator(default=4).fit(*learnable(120, 0.2, 0))
    assert allocator.learned_["k_query"].tolist() == [1, 8] and allocator.learned_["r2"].min() > 0.8
    assert allocator.margin_ < 0.05
    new, truth = learnable(200, 0.2, 1)
    chosen = allocator.predict(new)
    assert (chosen[new["x"] > 0.3] == 8).all() and (chosen[new["x"] < -0.3] == 1).all()
    row = outcome(truth, chosen, 200).iloc[-1]
    assert 0.8 < row["closed"] <= 1 and row["p"] < 0.01 and 0 < row["low"] < row["gain"] < row["high"]


def test_of_noise_nothing_is_learned():
    closed = []
    for seed in range(5):
        allocator = KAllocator(default=4).fit(*learnable(40, 0.0, seed))
        assert allocator.learned_["r2"].max() < 0.1
        new, truth = learnable(200, 0.0, 100 + seed)
        closed.append(outcome(truth, allocator.predict(new))["closed"].iloc[-1])
    assert abs(np.mean(closed)) < 0.2


def test_the_default_is_kept_when_nothing_gains():
    features, values = learnable(30, 0.2, 0)
    values = pd.DataFrame({k: values[4] - (k != 4) * 0.1 for k in values}, values.index)
    allocator = KAllocator(default=4).fit(features, values)
    assert allocator.margin_ == np.inf and (allocator.predict(features) == 4).all()
    assert (allocator.learned_["margin_gain"] == 0).all()
    table = outcome(values, 4)
    assert table["gain"].tolist() == [0, 0] and table["changed"].tolist() == [0, 0] and table["closed"].isna().all()


def test_margins_and_predictions_recomputed():
    features, values = learnable(40, 0.03, 3)
    allocator, gains = KAllocator(default=4, seed=2).fit(features, values), values[[1, 8]].sub(values[4], axis=0)
    learned, z = allocator.learned_, (features - features.mean()) / features.std(ddof=0)
    plain = Ridge(learned["alpha"]).fit(z, gains)
    predicted = plain.predict(z)
    np.testing.assert_allclose(learned[["x", "y", "z"]], plain.coef_)
    by_hand = [4 if row.max() <= allocator.margin_ else (1, 8)[int(row.argmax())] for row in predicted]
    assert allocator.predict(features).tolist() == by_hand

    def gained(margin: float) -> float:
        rows = zip(allocator.out_of_fold_, gains.to_numpy(), strict=True)
        return np.mean([0.0 if row.max() <= margin else actual[int(row.argmax())] for row, actual in rows])

    best = max(map(gained, allocation.MARGINS))
    assert learned["margin_gain"][0] == pytest.approx(best) == pytest.approx(gained(allocator.margin_))
    assert (learned["margin"] == allocator.margin_).all()
    np.testing.assert_allclose(learned["mean_gain"], gains.mean())
    by_hand = [r2_score(gains[k], held_out) for k, held_out in zip(gains, allocator.out_of_fold_.T)]
    np.testing.assert_allclose(learned["r2"], by_hand)


def test_two_counts_and_unfit_input():
    features, values = learnable(20, 0.2, 0)
    two = KAllocator(default=4).fit(features, values[[4, 8]])
    assert set(two.predict(features)) <= {4, 8} and len(two.learned_) == 1
    with pytest.raises(KeyError, match="2"):
        KAllocator(default=2).fit(features, values)
    with pytest.raises(ValueError, match="not of the same queries"):
        KAllocator(default=4).fit(features, values.iloc[1:])
    with pytest.raises(ValueError, match="3 queries are too few"):
        KAllocator(default=4).fit(features.iloc[:3], values.iloc[:3])


def test_allocator_table_by_hand():
    index = pd.MultiIndex.from_tuples([("c", "a"), ("c", "b"), ("d", "a"), ("d", "b"), ("d", "c")], names=QUERY)
    values = pd.DataFrame({1: [0.2, 0.9, 0.5, 0.0, 0.6], 4: [0.4, 0.5, 0.5, 0.2, 0.3]}, index)
    chosen = pd.Series([4, 1, 1, 1, 4], index).sample(frac=1, random_state=0)
    chance = pd.Series([0.1, 0.1, 0.02, 0.0, 0.04], index)
    table = allocator_table(values, chosen, 4, chance, ["c", "d"], 500).set_index("collection")
    assert list(table.index) == ["c", "d", "macro"] and table["queries"].tolist() == [2, 3, 5]
    own = allocator_table(values[::-1], chosen, 4, chance, ["d"], 500).set_index("collection")
    assert list(own.index) == ["d", "c", "macro"] and own["queries"].tolist() == [3, 2, 3]
    assert own.loc["macro", "gain"] == own.loc["d", "gain"] == pytest.approx(-0.2 / 3)
    assert own.loc["macro", "p"] == paired(pd.Series([0, -0.2, 0], index[2:]), 500)["p"]
    expected = {
        "selected": [0.45, 1 / 3], "adaptive": [0.65, 0.8 / 3], "oracle_kq": [0.65, 1.3 / 3], "headroom": [0.2, 0.1],
        "gain": [0.2, -0.2 / 3], "chance": [0.1, 0.02], "mean_kq": [2.5, 2], "changed": [1 / 2, 2 / 3],
    }  # fmt: skip
    for name, numbers in expected.items():
        np.testing.assert_allclose(table[name], [*numbers, np.mean(numbers)])
    np.testing.assert_allclose(table["closed"], [1, -2 / 3, (0.2 - 0.2 / 3) / 0.3])
    tested = ["low", "high", "p", "detectable"]
    assert table[tested].iloc[:2].isna().all().all()
    found = paired(pd.Series([0, 0.4, 0, -0.2, 0], index), 500)
    assert table.loc["macro", tested].tolist() == [found[name] for name in tested]


def test_from_a_study_to_the_table(s):
    kq, kp = s.selected
    values = count_values(s.test_grid, kp)
    queries = pd.DataFrame(list(values.index), columns=QUERY).assign(chance_kq=0.25)
    features, learned, table = allocation.allocate(s, queries)
    assert len(learned) == len(s.profile.k_grid) - 1 and set(features.index) == set(values.index)
    known = count_values(s.train_grid, kp)
    train = query_features(s, s.train_collection, s.selected)
    allocator = KAllocator(default=kq, seed=s.profile.seed).fit(train.loc[known.index], known)
    taken = [values.loc[query, k] for query, k in zip(values.index, allocator.predict(features.loc[values.index]))]
    means = pd.Series(taken, values.index).groupby(level="collection").mean()
    found = table.set_index("collection")
    np.testing.assert_allclose(found["adaptive"].drop("macro"), means[found.index.drop("macro")])
    assert (found["chance"] == 0.25).all() and list(found.index) == ["mine-test", "other", "macro"]


def test_words_when_nothing_is_closed():
    values = pd.DataFrame({1: [0.2, 0.9, 0.5], 4: [0.4, 0.5, 0.5]}, queries_of(3))
    text = allocation.allocator_answer(outcome(values, 4))
    assert "never leaves the default Kq" in text and not any(c.isdigit() for c in text)
    loses = allocation.allocator_answer(outcome(values, np.array([1, 4, 4])))
    assert "changes for 33% of the queries and moves nDCG@10 by **-0.0667**" in loses and "(p = 1;" in loses
    assert loses.endswith("headroom of 0.133, 0.500 of it chance: no clear difference.")
