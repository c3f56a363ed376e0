from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import ir_measures
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import ranx
from safetensors.numpy import save_file
from statsmodels.stats.multitest import multipletests
from tests.tiny import tiny_backbone

from diffret_lib.addresses import SourceTree
from diffret_lib.config import ProfileError, load_profile
from diffret_lib.data.collection import Collection
from diffret_lib.experiments import comparison, study
from diffret_lib.experiments.comparison import (
    COMPARISONS,
    compare_systems,
    comparison_name,
    evaluation_table,
    evaluation_wide,
    heat_map,
    logged_retrieval,
    per_query_best,
    stage_retrieval,
    system_intervals,
    transfer,
)
from diffret_lib.experiments.oracle import oracle_table, pair_distribution
from diffret_lib.experiments.reading import read_out_table
from diffret_lib.experiments.study import SYSTEMS, Study, macro, select_pair
from diffret_lib.report import figures
from diffret_lib.retrieval import systems
from diffret_lib.retrieval.metrics import METRICS, per_query
from diffret_lib.retrieval.search import MODES

WORDS = ["heap", "tree", "array", "axis", "sorted copy", "eigenvalues", "square", "parent", "children", "queue"]


def beir(folder, name: str, seed: int) -> str:
    """A BEIR folder: 8 passages of random words, 5 queries out of one of them each."""
    rng, root = np.random.default_rng(seed), folder / name
    passages = [" ".join(rng.choice(WORDS, 6)) + f" {i}." for i in range(8)]
    (root / "qrels").mkdir(parents=True)
    rows = [{"_id": f"p{i}", "text": text} for i, text in enumerate(passages)]
    queries = [{"_id": f"q{i}", "text": " ".join(passages[i].split()[:2])} for i in range(5)]
    for file, lines in (("corpus", rows), ("queries", queries)):
        (root / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [f"q{i}\tp{j}\t1" for i in range(5) for j in (i, i + 1)]
    (root / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return str(root)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study on tiny backbones and three tiny collections, its cache apart."""
    root = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFRET_CACHE", str(root / "cache"))
    paths = {name: beir(root, name, i) for i, name in enumerate(("mine-train", "mine-test", "other"))}
    profile = load_profile("smoke")
    profile = profile.model_validate(
        profile.model_dump()
        | {
            "train_collection": paths["mine-train"],
            "test_collections": [paths["mine-test"], paths["other"]],
            "k_grid": [1, 2],
            "promptreps_max_tokens": 2,
            "sample": {"queries": 4, "passages": 8},
            "train_sample": {"queries": None, "passages": None},
            "bootstrap_resamples": 50,
        }
    )
    loaded = []

    def load(name, *, dtype):
        loaded.append(name)
        return tiny_backbone(root / "tiny", "diffusion" if name == profile.backbones.diffusion else "autoregressive")

    patch.setattr(study, "load_backbone", load)
    yield Study(profile), loaded
    patch.undo()


@pytest.fixture(scope="module")
def evaluated(world) -> pd.DataFrame:
    s, _ = world
    systems = s.systems((2, 2))
    return pd.concat([s.evaluate(system, s.test_collections) for system in systems], ignore_index=True)


def count_forwards(monkeypatch) -> list[int]:
    calls: list[int] = []
    for reader in (systems.MaskedPositions, systems.NextTokens, systems.MeanOfTokens):
        original = reader.forward

        def forward(self, features, original=original, **kwargs):
            calls.append(1)
            return original(self, features, **kwargs)

        monkeypatch.setattr(reader, "forward", forward)
    return calls


# -- the study -------------------------------------------------------------------------------------------------


def test_collections_of_the_profile(world):
    s, _ = world
    assert [c.name for c in s.test_collections] == ["mine-test", "other"]
    assert len(s.train_collection.queries) == 5 and s.train_collection.coverage == "whole"
    assert all(len(c.queries) == 4 and c.coverage != "whole" for c in s.test_collections)


def test_grid_and_selected_pair(world):
    s, _ = world
    grid = s.train_grid
    assert list(grid.columns) == ["query_id", "metric", "value", "collection", "coverage", "k_query", "k_passage", "mode"]
    cells = set(product([1, 2], [1, 2], MODES))
    assert set(zip(grid["k_query"], grid["k_passage"], grid["mode"], strict=True)) == cells
    assert len(grid) == len(cells) * 5 and grid["value"].between(0, 1).all()
    # a cell is what encoding both sides for it alone and searching gives
    alone = s.diffretriever(2, 1)
    collection = s.train_collection
    run = alone.search(
        alone.encode_queries(collection.queries, progress=False), alone.encode_passages(collection.passages, progress=False),
        "hybrid", s.profile.top_k, collection.query_ids, collection.passage_ids,
    )  # fmt: skip
    for query, relevant in collection.qrels.items():
        order = list(run.run[query])[:10]
        dcg = sum(1 / np.log2(2 + order.index(p)) for p in relevant if p in order)
        ideal = sum(1 / np.log2(2 + i) for i in range(len(relevant)))
        cell = grid[(grid["query_id"] == query) & (grid["k_query"] == 2) & (grid["k_passage"] == 1)]
        assert cell[cell["mode"] == "hybrid"]["value"].item() == pytest.approx(dcg / ideal)
    means = grid[grid["mode"] == "hybrid"].groupby(["k_query", "k_passage"])["value"].mean().drop((1, 1))
    assert s.selected in means.index and means[s.selected] == pytest.approx(means.max())
    assert set(s.test_grid["collection"]) == {"mine-test", "other"} and len(s.test_grid) == 2 * 4 * len(cells)


def test_a_second_encoding_comes_from_the_cache(world, monkeypatch):
    s, _ = world
    collection = s.test_collections[1]
    for new, retriever in ((4, s.diffretriever(2, 2)), (8, s.promptreps(2))):
        first = {side: s.encode(retriever, collection, side) for side in ("query", "passage")}
        calls = count_forwards(monkeypatch)
        for again in (s, Study(s.profile)):
            fresh = again.diffretriever(2, 1) if retriever.name == "DiffRetriever" else again.promptreps(2)
            query = again.encode(fresh, again.test_collections[1], "query")
            assert not calls
            assert isinstance(query.dense, np.memmap) and np.array_equal(query.dense, first["query"].dense)
        assert np.array_equal(s.encode(retriever, collection, "passage").dense, first["passage"].dense)
        assert not calls
        s.encode(s.diffretriever(new, 2), collection, "query")  # another count: computed anew
        assert calls
        monkeypatch.undo()


def test_each_backbone_is_loaded_once(world, evaluated):
    _, loaded = world
    counted = [loaded.count(name) for name in ("smollm2-135m-diffusion", "smollm2-135m-instruct")]
    assert counted[0] <= 3 and counted[1] <= 3  # one study of this module, and two of the test above


def test_systems_and_zero_shot_table(world, evaluated):
    table = evaluation_table(evaluated)
    assert list(table) == [
        "training", "system", "family", "mode", "k_query", "k_passage", "collection", "metric", "value", "coverage"
    ]  # fmt: skip
    assert not table.drop(columns=["k_query", "k_passage"]).isna().any().any()
    assert (table["training"] == "zero-shot").all()
    assert not table.duplicated(["system", "mode", "collection", "metric"]).any()
    pairs = {r.system: (r.family, r.k_query, r.k_passage) for r in table.itertuples()}
    na = pd.NA
    assert {k: v[0] for k, v in pairs.items()} == {
        "BM25": "lexical", "Mean pooling": "autoregressive", "PromptReps single": "autoregressive",
        "PromptReps multi (N=2)": "autoregressive", "DiffEmbed": "diffusion", "DiffRetriever single": "diffusion",
        "DiffRetriever multi": "diffusion",
    }  # fmt: skip
    assert pairs["PromptReps multi (N=2)"][1:] == (3, 3) and pairs["DiffRetriever multi"][1:] == (2, 2)
    assert pairs["DiffRetriever single"][1:] == (1, 1) and pairs["BM25"][1] is pairs["DiffEmbed"][1] is na
    modes = table.groupby("system")["mode"].agg(lambda m: tuple(dict.fromkeys(m))).to_dict()
    assert modes["BM25"] == ("sparse",) and modes["DiffEmbed"] == modes["Mean pooling"] == ("dense",)
    assert all(modes[s] == MODES for s in modes if s.startswith(("DiffRetriever", "PromptReps")))
    assert set(table["metric"]) == set(METRICS) and set(table["collection"]) == {"mine-test", "other"}
    cell = evaluated[(evaluated["system"] == "BM25") & (evaluated["collection"] == "other") & (evaluated["metric"] == "mrr@10")]
    row = table[(table["system"] == "BM25") & (table["collection"] == "other") & (table["metric"] == "mrr@10")]
    assert len(cell) == 4 and row["value"].item() == pytest.approx(cell["value"].mean())
    wide = evaluation_wide(table, ["other"])
    assert np.allclose(wide["macro"], wide["other"])
    both = evaluation_wide(table, ["other", "mine-test"])
    assert np.allclose(both["macro"], (both["other"] + both["mine-test"]) / 2)
    assert len(wide) == 1 + 1 + 1 + 4 * 3
    tuned = evaluated[evaluated["system"] == "DiffRetriever multi"].assign(training="fine-tuned", value=1.0)
    whole = evaluation_table(pd.concat([evaluated, tuned]))
    pd.testing.assert_frame_equal(whole[whole["training"] == "zero-shot"], table)
    wide = evaluation_wide(whole, ["other"])
    assert len(wide) == 15 + 3 and (wide[wide["training"] == "fine-tuned"]["macro"] == 1).all()


def test_runs_on_disk_are_what_other_tools_read(world, tmp_path):
    s, _ = world
    collection = s.test_collections[0]
    system = s.systems((2, 2))[-1]
    values = s.evaluate(system, [collection], tmp_path)
    folder = tmp_path / "mine-test"
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"diffretriever-multi.zero-shot.{mode}.txt" for mode in sorted(MODES)), "qrels.txt"
    ]  # fmt: skip
    qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels.txt")))
    for mode in MODES:
        path = folder / f"diffretriever-multi.zero-shot.{mode}.txt"
        ours = values[values["mode"] == mode].pivot_table(index="query_id", columns="metric", values="value")
        run = list(ir_measures.read_trec_run(str(path)))
        measures = {"ndcg@10": ir_measures.nDCG @ 10, "mrr@10": ir_measures.RR @ 10, "recall@100": ir_measures.R @ 100}
        for name, measure in measures.items():
            theirs = {m.query_id: m.value for m in measure.iter_calc(qrels, run)}
            assert ours[name].to_dict() == pytest.approx(theirs)
        assert ranx.Run.from_file(str(path), kind="trec").keys() == set(ours.index)


def test_rankings_and_values_are_kept(world, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache"))
    s, _ = world
    system, bm25 = s.systems((2, 2))[-1], s.systems((2, 2))[0]
    first = [s.evaluate(x, s.test_collections, tmp_path / "first") for x in (system, bm25)]
    for collection in s.test_collections:
        for mode, run in s.runs(system.retriever, collection).items():
            found = first[0][(first[0]["collection"] == collection.name) & (first[0]["mode"] == mode)]
            for metric, values in per_query(collection.qrels, run).items():
                assert found[found["metric"] == metric]["value"].tolist() == values.tolist()
    monkeypatch.setattr(Study, "runs", None)  # nothing is searched again
    again = [s.evaluate(x, s.test_collections, tmp_path / "again") for x in (system, bm25)]
    for a, b in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    names = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.txt"))
    assert len(names) == 2 * (1 + 3 + 1)
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    renamed = replace(s.test_collections[0], name="renamed")
    assert set(s.evaluate(system, [renamed])["collection"]) == {"renamed"}
    # what else the values depend on: then it is searched
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": np.zeros(1, np.float32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(systems.Retriever, "with_adapter", lambda self, folder: self)
    deeper = Study(s.profile.model_copy(update={"top_k": 3}), s._backbones, s._collections)
    for study_, other in (
        (s, replace(system, retriever=s.diffretriever(2, 1))),
        (s, replace(system, adapter=adapter)),
        (deeper, system),
    ):
        with pytest.raises(TypeError):
            study_.evaluate(other, s.test_collections)


@pytest.mark.parametrize("place", ["retrieval/search.py:rank", "retrieval/search.py:to_results", "retrieval/metrics.py:per_query"])
def test_addresses_cover_the_code_of_search_and_metrics(tmp_path, place):
    root = Path(study.__file__).parents[1]
    copy = shutil.copytree(root, tmp_path / "diffret_lib", ignore=shutil.ignore_patterns("adapters", "__pycache__"))
    file, _, name = place.partition(":")
    code = [("diffret_lib.experiments.study", function) for function in ("ranking", "grid_values")]
    before = SourceTree(copy).fingerprint(code)
    text = (copy / file).read_text()
    (copy / file).write_text("# a comment\n" + text)
    assert SourceTree(copy).fingerprint(code) == before == SourceTree(root).fingerprint(code)
    changed = re.sub(rf"(\ndef {name}\(.*?\) -> [^\n]*:\n)", r"\1    changed = 1\n", text, count=1, flags=re.DOTALL)
    assert changed != text
    (copy / file).write_text(changed)
    assert SourceTree(copy).fingerprint(code) != before


def test_cached_tables_have_the_collection_s_own_name(world):
    s, _ = world
    table = comparison.collections_table(s)
    assert table["collection"].tolist() == [s.train_collection.name, *(c.name for c in s.test_collections)]
    assert table["queries"].tolist() == [len(c.queries) for c in [s.train_collection, *s.test_collections]]
    assert table["bm25_ndcg@10"].between(0, 1).all()
    pd.testing.assert_frame_equal(comparison.collections_table(s), table)
    renamed = replace(s.test_collections[0], name="renamed")
    grid = s.grid(s.test_collections[0])
    pd.testing.assert_frame_equal(s.grid(renamed), grid.assign(collection="renamed"))
    read_out = read_out_table(s)
    pd.testing.assert_frame_equal(read_out_table(s), read_out)
    assert read_out["read_out"].tolist() == ["i - 1 (shifted)", "i (not shifted)"] * 2
    assert read_out["K"].tolist() == [1, 1, 4, 4]
    run = s.runs(s.diffretriever(4, 4), s.development, ["hybrid"])["hybrid"]
    by_hand = per_query(s.development.qrels, run, ["ndcg@10"])
    assert read_out["hybrid"][2] == pytest.approx(by_hand["ndcg@10"].mean())


def test_out_of_domain_leaves_the_training_package_out():
    s = Study(load_profile("embedded"))
    names = [n.removeprefix("pydocs/") for n in s.profile.test_collections]
    s.test_collections = [
        Collection.from_texts(f"pydocs/{n}", ["p"], ["t"], ["q"], ["t"], {"q": {"p": 1}}) for n in names
    ]
    assert s.out_of_domain == [f"pydocs/{n}" for n in names if n != "pandas-test"] and len(s.out_of_domain) == 6


def of_folders(s: Study, train: str, tests: list[str]) -> Study:
    return Study(s.profile.model_copy(update={"train_collection": train, "test_collections": tests}))


def test_the_training_folder_is_not_out_of_domain(world, tmp_path, monkeypatch):
    s, _ = world
    mine, other = beir(tmp_path, "mine", 0), beir(tmp_path, "other", 1)
    assert of_folders(s, mine, [mine, other]).out_of_domain == ["other"]
    (tmp_path / "link").symlink_to(mine)
    assert of_folders(s, mine, [str(tmp_path / "link"), other]).out_of_domain == ["other"]
    assert of_folders(s, mine, [beir(tmp_path, "copy", 0), other]).out_of_domain == ["other"]
    (Path(mine) / "qrels" / "test.tsv").rename(Path(mine) / "qrels" / "dev.tsv")
    (Path(mine) / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tp0\t1\n")
    assert of_folders(s, f"{mine}:dev", [mine, other]).out_of_domain == ["other"]
    monkeypatch.chdir(tmp_path)
    assert of_folders(s, "mine", [mine, other]).out_of_domain == ["other"]


def test_collections_of_one_name_are_refused(world, tmp_path):
    s, _ = world
    one, two, three = beir(tmp_path, "a/fiqa", 0), beir(tmp_path, "b/fiqa", 1), beir(tmp_path, "c/FiQA", 2)
    for train, tests in ((s.profile.train_collection, [one, two]), (s.profile.train_collection, [one, three]), (one, [two])):
        with pytest.raises(ProfileError, match="needs a folder name of its own"):
            _ = of_folders(s, train, tests).test_collections
    with pytest.raises(ProfileError, match="needs a folder name of its own"):
        _ = of_folders(s, one, [beir(tmp_path, "数据", 0)]).test_collections


def test_comparisons_and_intervals_run_on_a_study(world, evaluated):
    s, _ = world
    table = compare_systems(evaluated, COMPARISONS, ["mine-test", "other"], resamples=50, seed=0)
    assert len(table) == len(COMPARISONS) and (table["queries"] == 8).all()
    intervals = system_intervals(evaluated, ["mine-test", "other"], 50, 0)
    assert len(intervals) == 15 and (intervals["low"] <= intervals["value"]).all()


def test_stages_of_the_adaptation(world, monkeypatch):
    s, _ = world
    collection, loaded = s.test_collections[1], []

    def load(name, *, adapter, dtype):
        loaded.append((name, adapter))
        return s.backbone("diffusion")

    monkeypatch.setattr(comparison, "load_backbone", load)
    table = stage_retrieval(s, collection, {"before": "none", "after": None})
    assert list(table) == ["stage", "system", "K", *MODES] and loaded == [(s.profile.backbones.diffusion, "none")]
    assert table["stage"].tolist() == ["", "", "before", "before", "after", "after"]
    assert table["K"].tolist() == [pd.NA, 1, 1, 4, 1, 4]
    assert table.loc[0, ["dense", "hybrid"]].isna().all() and table.loc[1:, list(MODES)].notna().all(axis=None)
    log = {"retrieval": json.loads(table.to_json(orient="records")), "collection": collection.fingerprint}
    kept = logged_retrieval(log, collection, ["after"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, table[table["stage"] == "before"].reset_index(drop=True))
    assert logged_retrieval(log, s.test_collections[0]).empty


def test_fine_tuned_systems(world, tmp_path, monkeypatch):
    s, _ = world
    monkeypatch.setattr(study, "load_collection", lambda name: s.train_collection)
    mined = s.training_data().negatives
    assert list(mined) == ["query_id", "passage_id", "source"]
    assert len(mined) == s.profile.training.negatives * len(s.train_collection.queries)
    monkeypatch.setattr(Study, "runs", None)  # the second time from the cache
    pd.testing.assert_frame_equal(s.training_data().negatives, mined)
    asked = []

    def finetune(name, retriever, data, recipe, development, *, training_limits):
        asked.append((name, retriever, len(data.rows), recipe.seed, training_limits))
        return SimpleNamespace(adapter=tmp_path / name)

    monkeypatch.setattr(study, "finetune", finetune)
    tuned = s.fine_tuned_systems()
    assert [system.name for system in tuned] == [name for name, *_ in asked] == list(SYSTEMS)
    assert all(system.training == "fine-tuned" and system.adapter == tmp_path / system.name for system in tuned)
    counts = {system.name: tuple(system.retriever.vectors(side) for side in ("query", "passage")) for system in tuned}
    assert counts == {
        "DiffRetriever single": (1, 1), "DiffRetriever multi": s.selected, "DiffEmbed": (1, 1),
        "PromptReps single": (1, 1), "PromptReps multi": (5, 5), "RepLLaMA": (1, 1),
    }  # fmt: skip
    limits = {"max_passage_tokens": s.profile.training.max_passage_tokens}
    assert [rest for _, _, *rest in asked] == [[10, s.profile.seed, limits]] * len(SYSTEMS)
    with pytest.raises(KeyError, match="ColBERT"):
        s.finetune("ColBERT")


# -- analyses on frames made by hand ---------------------------------------------------------------------------

VALUES = {  # (1, 1), (1, 2), (2, 1), (2, 2)
    "q1": (0.5, 0.5, 0.8, 0.8),  # the pair of fewest vectors among the best: (2, 1)
    "q2": (1.0, 1.0, 1.0, 1.0),  # all tie
    "q3": (0.2, 0.6, 0.4, 0.1),
    "q4": (0.0, 0.5, 0.5, 0.3),  # as many vectors: the smallest Kq
}
PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2)]


def frame(values: dict[str, tuple[float, ...]], collection: str = "c") -> pd.DataFrame:
    rows = []
    for query, row in values.items():
        for (kq, kp), value in zip(PAIRS, row, strict=True):
            base = {"collection": collection, "coverage": "whole", "query_id": query, "k_query": kq, "k_passage": kp}
            rows.append({**base, "mode": "hybrid", "metric": "ndcg@10", "value": value})
            rows.append({**base, "mode": "dense", "metric": "ndcg@10", "value": 1 - value})
            rows.append({**base, "mode": "hybrid", "metric": "mrr@10", "value": 0.123})
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_best_pair_of_each_query():
    best = per_query_best(frame(VALUES)).set_index("query_id")
    assert best[["k_query", "k_passage"]].apply(tuple, axis=1).to_dict() == {
        "q1": (2, 1), "q2": (1, 1), "q3": (1, 2), "q4": (1, 2)
    }  # fmt: skip
    assert best["value"].to_dict() == {"q1": 0.8, "q2": 1.0, "q3": 0.6, "q4": 0.5}
    assert best["ties"].to_dict() == {"q1": 2, "q2": 4, "q3": 1, "q4": 2}
    assert best["worst"].to_dict() == {"q1": 0.5, "q2": 1.0, "q3": 0.1, "q4": 0.0}


def test_oracle_and_transfer():
    # means: (1, 1) 0.425, (1, 2) 0.65, (2, 1) 0.675, (2, 2) 0.55
    row = oracle_table(frame(VALUES), (2, 2)).iloc[0]
    assert row[["collection", "coverage", "queries", "best_fixed_pair"]].tolist() == ["c", "whole", 4, "(2, 1)"]
    found = row[["single", "selected", "best_fixed", "oracle", "headroom", "tied"]].astype(float)
    np.testing.assert_allclose(found, [0.425, 0.55, 0.675, 0.725, 0.05, 0.25])
    moved = transfer(frame(VALUES), (2, 2)).iloc[0]
    np.testing.assert_allclose(moved[["selected", "best", "loss", "single"]].astype(float), [0.55, 0.675, 0.125, 0.425])
    assert moved["best_pair"] == "(2, 1)"
    two = pd.concat([frame(VALUES), frame({"q1": (0, 0, 0, 1)}, "d")])
    assert oracle_table(two, (2, 2))["oracle"].tolist() == pytest.approx([0.725, 1.0])
    assert oracle_table(two, (2, 2))["tied"].tolist() == [0.25, 0.0]


def test_distribution_of_the_best_pairs():
    shares = pair_distribution(per_query_best(frame(VALUES)), [1, 2])
    # q2, on which all pairs tie, does not count
    np.testing.assert_allclose(shares.to_numpy(), [[0, 200 / 3], [100 / 3, 0]])
    nothing = pair_distribution(per_query_best(frame({"q": (1, 1, 1, 1)})), [1, 2])
    assert nothing.to_numpy().tolist() == [[0, 0], [0, 0]]


def test_heat_map_averages_collections_alike():
    grid = pd.concat([frame(VALUES), frame({"q1": (0, 0, 0, 1)}, "d")])
    cells = heat_map(grid, "hybrid")
    np.testing.assert_allclose(cells.to_numpy(), [[0.425 / 2, 0.325], [0.3375, 0.775]])
    assert list(cells.index) == list(cells.columns) == [1, 2] and cells.index.name == "k_query"
    averaged = macro(grid[(grid["mode"] == "hybrid") & (grid["metric"] == "ndcg@10")], ["k_query", "k_passage"])
    assert averaged.set_index(["k_query", "k_passage"])["value"][2, 2] == pytest.approx(0.775)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ((0.9, 0.2, 0.3, 0.4), (2, 2)),  # (1, 1) is no choice for a multi
        ((0.1, 0.5, 0.5, 0.5), (2, 1)),  # of equals the smaller Kp
        ((0.1, 0.5, 0.4, 0.5), (1, 2)),  # then the smaller Kq
        ((0.1, 0.5, 0.5 + 1e-9, 0.6), (2, 2)),
    ],
)
def test_selected_pair(row, pair):
    assert select_pair(frame({"q": row})) == pair


def by_system(values: dict[str, list[float]], collection: str) -> pd.DataFrame:
    rows = [
        {"training": "zero-shot", "system": system, "mode": "dense", "metric": "ndcg@10", "collection": collection, "query_id": f"q{i}", "value": v}
        for system, row in values.items() for i, v in enumerate(row)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_compared_systems_by_hand():
    one = by_system({"A": [0.9, 0.8, 0.7, 0.9], "B (N=2)": [0.5, 0.5, 0.5, 0.5], "C": [0.9, 0.8, 0.7, 0.9]}, "one")
    two = by_system({"A": [0.6] * 8, "B (N=2)": [0.5] * 8, "C": [0.6] * 8}, "two")
    data = pd.concat([one, two, by_system({"A": [0.0], "B (N=2)": [1.0], "C": [0.0]}, "left out")])
    pairs = [("A", "B", "dense"), ("A", "C", "dense"), ("B", "A", "dense")]
    table = compare_systems(data.sample(frac=1, random_state=1), pairs, ["one", "two"], resamples=4999, seed=0)
    # macro: the mean of 0.325 and 0.1
    assert table["difference"].tolist() == pytest.approx([0.2125, 0.0, -0.2125])
    assert table["queries"].tolist() == [12, 12, 12]
    # all signs alike: 2 of the 2^12 flips are as extreme
    assert table["p"].tolist() == pytest.approx([2 / 4096, 1.0, 2 / 4096], rel=0.01, abs=2e-4)
    np.testing.assert_allclose(table["p_corrected"], multipletests(table["p"], method="holm")[1])
    assert table["p_corrected"][0] == pytest.approx(3 * table["p"][0])
    assert table["reading"].tolist() == ["better", "no clear difference", "worse"]
    assert (table["low"] <= table["difference"]).all() and (table["difference"] <= table["high"]).all()


def test_compared_by_training():
    before = by_system({"A (N=9)": [0.5, 0.4], "B": [0.1, 0.1]}, "one")
    after = by_system({"A (N=4)": [0.7, 0.9]}, "one").assign(training="fine-tuned")
    pairs = [("A, fine-tuned", "A", "dense"), ("A", "B", "dense")]
    table = compare_systems(pd.concat([before, after]), pairs, ["one"], resamples=50, seed=0)
    assert table["difference"].tolist() == pytest.approx([0.35, 0.35])
    assert comparison_name("A (N=4)", "fine-tuned") == "A, fine-tuned"
    with pytest.raises(ValueError, match=r"there is no B, fine-tuned \(dense\) on one"):
        compare_systems(before, [("B, fine-tuned", "B", "dense")], ["one"], resamples=50, seed=0)


def test_systems_of_different_queries_are_not_compared():
    data = pd.concat([by_system({"A": [0.9, 0.8]}, "one"), by_system({"B": [0.5]}, "one")])
    with pytest.raises(ValueError, match=r"A and B \(dense\) were not evaluated on the same queries"):
        compare_systems(data, [("A", "B", "dense")], ["one"], resamples=10, seed=0)


# -- figures ---------------------------------------------------------------------------------------------------


def labelled(fig) -> None:
    """Every axis says what it shows."""
    axes = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    assert axes
    for ax in axes:
        assert ax.get_xlabel()
        names = [t.get_text() for t in ax.get_yticklabels()]
        assert ax.get_ylabel() or any(len(n) > 3 and n[0].isalpha() for n in names)
    fig.canvas.draw()
    plt.close(fig)


def test_figures_of_a_study(world, evaluated):
    s, _ = world
    fig = figures.grid(s.test_grid, "tiny")
    assert [ax.get_title() for ax in fig.axes] == list(MODES)
    labelled(fig)
    labelled(figures.effectiveness(system_intervals(evaluated, ["mine-test", "other"], 50, 0)))
    comparisons = compare_systems(evaluated, COMPARISONS, ["mine-test", "other"], resamples=50, seed=0)
    fig = figures.forest(comparisons)
    assert len(fig.axes[0].get_yticklabels()) == len(COMPARISONS)
    labelled(fig)
    table = oracle_table(s.test_grid, s.selected)
    fig = figures.oracle(table)
    assert len(fig.axes[0].patches) >= 4 * len(table)
    labelled(fig)
    labelled(figures.distribution(pair_distribution(per_query_best(s.test_grid), s.profile.k_grid)))


def test_figure_of_the_curves():
    log = {
        "curve": [
            {"stage": "documentation", "step": 10, "tokens_seen": 1000, "loss": 5.0},
            {"stage": "documentation", "step": 10, "tokens_seen": 1000, "held_out": {"0.15": 4.0, "0.5": 6.0}},
            {"stage": "answers", "step": 10, "tokens_seen": 500, "loss": 3.0},
            {"stage": "answers", "step": 10, "tokens_seen": 500, "held_out": {"0.15": 3.0, "0.5": 5.0}},
        ]
    }
    fig = figures.curves(log)
    points = [point.tolist() for line in fig.axes[0].lines for point in line.get_xydata()]
    # the second stage stands after the first
    assert sorted(points) == [[1.0, 4.0], [1.0, 5.0], [1.0, 6.0], [1.5, 3.0], [1.5, 3.0], [1.5, 5.0]]
    labels = [text.get_text() for legend in [fig.axes[0].get_legend()] for text in legend.get_texts()]
    assert "training, documentation" in labels and "held out, 50% masked" in labels
    labelled(fig)


def test_every_comparison_names_systems_that_there_are(world):
    s, _ = world
    zero_shot = [comparison_name(system.name, "zero-shot") for system in s.systems((2, 2))]
    tuned = [comparison_name(name, "fine-tuned") for name in SYSTEMS]
    pairs = COMPARISONS + comparison.FINE_TUNED_COMPARISONS
    assert len(set(pairs)) == len(pairs)
    for better, than, mode in pairs:
        assert mode in MODES and {better, than} <= {*zero_shot, *tuned}
