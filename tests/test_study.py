"""The study: its collections and pools, systems, rankings and grids, the departures, and what a run is checked for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import ir_measures
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from diffret_lib.config import CHECKOUT, Profile, ProfileError, Sample, load_profile
from diffret_lib.data.collection import Collection
from diffret_lib.experiments import departures, rankings, study
from diffret_lib.experiments.comparison import ablation_answer, transfer
from diffret_lib.experiments.study import REPEATED, SYSTEMS, CutBM25, Study, System, hard_passages, macro
from diffret_lib.retrieval import search, streaming, systems
from diffret_lib.retrieval.metrics import METRICS, load_run, per_query
from diffret_lib.retrieval.search import MODES, RANK_MODES
from diffret_lib.retrieval.systems import BM25
from scripts import plan as planning
from scripts.plan import check, plan
from tests.test_systems import count_rows
from tests.tiny import beir, whole


def changed(s: Study, **values) -> Study:
    """The study with other values of the profile, its backbones kept."""
    return Study(Profile.model_validate(s.profile.model_dump() | values), s._backbones)


# -- collections and pools -------------------------------------------------------------------------------------


def test_collections_of_the_profile(s):
    assert [c.name for c in s.test_collections] == ["mine-test", "other"]
    assert len(s.train_collection.queries) == 5 and s.train_collection.coverage == "whole"
    assert all(len(c.queries) == 4 and c.coverage != "whole" for c in s.test_collections)
    _, other = s.profile.test_collections
    bigger = changed(s, samples={other: {"queries": None, "passages": None}})
    assert [len(c.queries) for c in bigger.test_collections] == [4, 5] and bigger.collection(other).coverage == "whole"


def test_pools_hold_the_hard_passages_of_bm25(s, tmp_path):
    path = beir(tmp_path, "pool", 5, passages=40)
    all_of_it, one_each = study.load_collection(path), {"queries": 5, "passages": 11, "hard": 1}
    hard = hard_passages(all_of_it, 40)
    bm25 = BM25()
    run = bm25.search(
        passages=bm25.encode_passages(all_of_it.passages), queries=bm25.encode_queries(all_of_it.queries),
        top_k=40, query_ids=all_of_it.query_ids, passage_ids=all_of_it.passage_ids,
    )  # fmt: skip
    assert hard == {query: list(row) for query, row in run.run.items()}
    pool = changed(s, test_collections=[path], sample=one_each).test_collections[0]
    relevant = {p for q in pool.query_ids for p in pool.relevant(q)}
    taken, best = set(pool.passage_ids) - relevant, {row[0] for row in hard_passages(all_of_it, 1).values()}
    assert len(pool.passage_ids) == 11 and len(pool.query_ids) == 5
    assert best - relevant and best - relevant <= taken
    plain = changed(s, test_collections=[path], sample=one_each | {"hard": 0}).test_collections[0]
    assert set(plain.passage_ids) != set(pool.passage_ids)


def test_out_of_domain_leaves_out_what_is_trained_on(s):
    embedded = Study(load_profile("embedded"))
    names = embedded.profile.test_collections
    embedded.test_collections = [Collection.from_texts(n, ["p"], ["t"], ["q"], ["t"], {"q": {"p": 1}}) for n in names]
    assert embedded.out_of_domain == names[1:] and len(names) > 2
    both = [whole(s.profile.train_collection), whole(s.profile.test_collections[1])]
    training = s.profile.training.model_dump() | {"collections": both}
    assert s.out_of_domain == ["mine-test", "other"] and changed(s, training=training).out_of_domain == ["mine-test"]


def test_published_collections_of_the_same_passages(s):
    assert s.same_domain("beir/scifact", "beir/scifact:train") and s.same_domain("msmarco/dl19", "msmarco/train")
    assert not s.same_domain("beir/scifact", "msmarco/train")  # nothing is loaded to know it
    assert not s.same_domain("pydocs/numpy", "msmarco/train")
    for part, of in {"msmarco": "msmarco/train", "fiqa2018": "beir/fiqa", "scifact": "beir/scifact:train"}.items():
        assert s.same_domain(f"nano/{part}", of) and not s.same_domain(f"nano/{part}", "beir/nq")


def of_folders(s: Study, train: str, tests: list[str]) -> Study:
    training = s.profile.training.model_dump() | {"collections": [whole(train)]}
    return changed(s, train_collection=train, test_collections=tests, training=training)


def test_the_training_folder_is_not_out_of_domain(s, tmp_path, monkeypatch):
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


def test_collections_of_one_name_are_refused(s, tmp_path):
    train, names = s.profile.train_collection, ("a/fiqa", "b/fiqa", "c/FiQA", "数据")
    one, two, three, nameless = (beir(tmp_path, name, seed) for seed, name in enumerate(names))
    for train, tests in (train, [one, two]), (train, [one, three]), (one, [two]), (one, [nameless]):
        with pytest.raises(ProfileError, match="needs a folder name of its own"):
            _ = of_folders(s, train, tests).test_collections


# -- passages that are searched as they are encoded ----------------------------------------------------------------


@pytest.fixture
def streamed(s, own_cache, monkeypatch):
    """The study with a cache of its own that keeps no passages; segments of four passages in shards of two."""
    monkeypatch.setattr(streaming, "SEGMENT_TEXTS", 4)
    monkeypatch.setattr(streaming, "SHARD_TEXTS", 2)
    monkeypatch.setattr(systems, "SHARD_TEXTS", 2)
    monkeypatch.setattr(search.shards_of, "__defaults__", (2,))  # as long as a shard, for the same sums
    return changed(s, keep_passages=False)


def test_streamed_rankings_are_those_of_kept_passages(streamed, own_cache):
    s, kept = streamed, changed(streamed, keep_passages=True)
    c = s.test_collections[1]
    for retriever in (s.diffretriever(2, 2), s.promptreps(3), s.retriever(systems.DiffEmbed), BM25()):
        runs = s.runs(retriever, c)
        assert runs == kept.runs(retriever, c) and list(runs) == rankings.modes_of(retriever)
        assert [list(run) for run in runs["sparse" if "sparse" in runs else "dense"].values()]
    shapes = [p for p in (own_cache / "segments").iterdir() if p.is_dir()]
    assert len(shapes) == 3 * 2  # eight passages


def test_a_stream_goes_on_where_it_was(streamed, own_cache, monkeypatch):
    s, calls = streamed, count_rows(monkeypatch)
    c, retriever = s.test_collections[0], s.diffretriever(2, 1)
    first = s.runs(retriever, c)
    every = len(calls)
    assert s.runs(retriever, c) == first and len(calls) == every  # from the cache
    shutil.rmtree(next(p for p in (own_cache / "segments").iterdir() if p.is_dir()))
    assert s.runs(retriever, c) == first and every < len(calls) < 2 * every
    queries = s.diffretriever(1, 1)
    assert s.runs(queries, c) != first  # other vectors have other segments


def test_a_stream_answers_all_collections_with_the_same_passages(streamed, monkeypatch):
    s, calls = streamed, count_rows(monkeypatch, kind=systems.MeanOfTokens)
    whole = s.sampled(s.profile.test_collections[0], Sample(queries=None, passages=None))
    parts = [
        replace(whole.restrict(None, ids), name=name) for name, ids in {"a": ["q0", "q3"], "b": ["q1", "q2"]}.items()
    ]
    monkeypatch.setattr(rankings, "published", lambda name: SimpleNamespace(hub="one") if name in "ab" else None)
    s.__dict__["test_collections"] = parts
    retriever = s.retriever(systems.DiffEmbed)
    runs = [s.runs(retriever, c) for c in parts]
    once = len(calls)
    kept = changed(s, keep_passages=True)
    assert runs == [kept.runs(retriever, c) for c in parts]
    calls.clear()
    s.runs(s.retriever(systems.DiffEmbed, max_passage_tokens=5, max_query_tokens=5), parts[0])
    assert once == len(calls)  # those of one collection cost as much as those of both
    assert not rankings.same_passages(parts[0], replace(whole, name="c"))


def test_the_grid_of_a_part(s):
    size = {"queries": 3, "passages": 6, "hard": 0}
    part = changed(s, grid_sample=size)
    assert part.grid_collections[0] is part.sampled(s.profile.test_collections[0], Sample(**size))
    assert [len(c.passages) for c in part.grid_collections] == [6, 6] and s.grid_collections == s.test_collections
    assert part.grid_collection(s.profile.train_collection) is part.train_collection
    assert part.test_grid.groupby("collection")["query_id"].nunique().tolist() == [3, 3]


# -- systems, rankings and grids -------------------------------------------------------------------------------


def test_grid_and_selected_pair(s):
    grid = s.train_grid
    assert list(grid) == "query_id metric value collection coverage k_query k_passage mode".split()
    cells = set(product([1, 2], [1, 2], RANK_MODES))
    assert set(zip(grid["k_query"], grid["k_passage"], grid["mode"], strict=True)) == cells
    assert len(grid) == len(cells) * 5 and grid["value"].between(0, 1).all()
    # a cell is what encoding both sides for it alone and searching gives
    alone = s.diffretriever(2, 1)
    collection = s.train_collection
    run = alone.search(
        alone.encode_queries(collection.queries, progress=False),
        alone.encode_passages(collection.passages, progress=False),
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


def test_the_grid_of_one_pass(s):
    shared = changed(s, shared_text_grid=True)
    collection = shared.train_collection
    alone = shared.diffretriever(2, 1, shared_text=True)
    grid, own = shared.train_grid, s.train_grid
    cell = {"k_query": 2, "k_passage": 1, "mode": "dense"}
    run = shared.runs(alone, collection, ["dense"])["dense"]
    found = grid[(grid[list(cell)] == pd.Series(cell)).all(axis=1)]
    assert found["value"].tolist() == pytest.approx(per_query(collection.qrels, run, ["ndcg@10"])["ndcg@10"].tolist())
    assert list(grid) == list(own) and len(grid) == len(own) and not np.allclose(grid["value"], own["value"])


def test_a_second_encoding_comes_from_the_cache(s, monkeypatch):
    collection = s.test_collections[1]
    first = s.encode(s.diffretriever(2, 2), collection, "query")
    calls = count_rows(monkeypatch)
    for again in (s, Study(s.profile)):
        query = again.encode(again.diffretriever(2, 1), again.test_collections[1], "query")
        assert isinstance(query.dense, np.memmap) and np.array_equal(query.dense, first.dense) and not calls
    s.encode(s.diffretriever(4, 2), collection, "query")  # another count: computed anew
    assert calls


def test_systems_and_their_values(world):
    s, loaded = world
    evaluated = pd.concat([s.evaluate(x, s.test_collections) for x in s.systems((2, 2))], ignore_index=True)
    before = len(loaded)
    s.systems((2, 2))
    assert len(loaded) == before and loaded.count("tiny-text") == 1  # each backbone is loaded once
    columns = ["query_id", "metric", "value", "collection", "coverage", "mode"]
    about = ["system", "training", "family", "backbone", "k_query", "k_passage"]
    assert list(evaluated) == [*columns, *about]
    assert not evaluated.drop(columns=["k_query", "k_passage"]).isna().any().any()
    assert set(evaluated["metric"]) == set(METRICS) and (evaluated["training"] == "zero-shot").all()
    rows = evaluated.drop_duplicates("system").set_index("system")
    ar, diffusion = ("autoregressive", "tiny-autoregressive"), ("diffusion", "tiny-diffusion")
    of = {
        "BM25": ("lexical", "none"), "BM25, cut text": ("lexical", "none"), "Mean pooling": ar, "PromptReps single": ar,
        "PromptReps multi": ar, "DiffEmbed": diffusion, "DiffRetriever single": diffusion,
        "DiffRetriever multi": diffusion, "DiffEmbed (text only)": diffusion,
        "DiffRetriever single (text only)": diffusion, "DiffRetriever multi (text only)": diffusion,
    }  # fmt: skip
    assert {name: (row["family"], row["backbone"]) for name, row in rows.iterrows()} == of
    pairs = rows[["k_query", "k_passage"]].dropna()
    counts = {name: tuple(row) for name, row in pairs.iterrows()}
    assert counts == {
        "PromptReps single": (1, 1), "PromptReps multi": (3, 3), "DiffRetriever single": (1, 1),
        "DiffRetriever multi": (2, 2), "DiffRetriever single (text only)": (1, 1),
        "DiffRetriever multi (text only)": (2, 2),
    }  # fmt: skip
    modes = evaluated.groupby("system")["mode"].agg(lambda m: tuple(dict.fromkeys(m))).to_dict()
    for name, found in modes.items():
        several = RANK_MODES if counts.get(name, (1, 1)) != (1, 1) else MODES
        alone = ("sparse",) if name.startswith("BM25") else ("dense",) if name not in counts else None
        assert found == (alone or several)
    # the backbone that never met the prompt has other weights
    means = evaluated[evaluated["metric"] == "ndcg@10"].groupby(["system", "mode", "collection"])["value"].mean()
    for name in ("DiffEmbed", "DiffRetriever multi"):
        assert not np.allclose(means[name, "dense"], means[f"{name} (text only)", "dense"])


def test_bm25_on_the_text_that_others_read(s):
    collection = s.test_collections[1]
    short = s.diffretriever(1, 1, max_passage_tokens=5, max_query_tokens=4)
    cut = CutBM25(short)
    texts = {side: short.read_texts(study.texts_of(collection, side), side) for side in ("passage", "query")}
    assert all(len(part) < len(text) for part, text in zip(texts["passage"], collection.passages, strict=True))
    by_hand = BM25()
    for side in ("passage", "query"):
        expected = by_hand.encode(texts[side], side).sparse.toarray()
        assert np.array_equal(cut.encode(study.texts_of(collection, side), side).sparse.toarray(), expected)
        assert len({x.fingerprint(side) for x in (cut, CutBM25(s.diffretriever(1, 1)), BM25())}) == 3


def test_rankings_and_values_are_kept_and_written(s, own_cache, tmp_path, monkeypatch):
    system, bm25 = System("DiffRetriever multi", s.diffretriever(2, 2)), System("BM25", BM25())
    first = [s.evaluate(x, s.test_collections, tmp_path / "first") for x in (system, bm25)]
    for collection in s.test_collections:
        folder = tmp_path / "first" / collection.name
        judged = ir_measures.read_trec_qrels(str(folder / "qrels.txt"))
        grades = {(query, passage): grade for query, row in collection.qrels.items() for passage, grade in row.items()}
        assert {(j.query_id, j.doc_id): j.relevance for j in judged} == grades
        for mode, run in s.runs(system.retriever, collection).items():
            written = load_run(folder / f"diffretriever-multi.zero-shot.{mode}.txt")
            assert written == {query: row for query, row in run.items() if row}
            found = first[0][(first[0]["collection"] == collection.name) & (first[0]["mode"] == mode)]
            for metric, values in per_query(collection.qrels, run).items():
                assert found[found["metric"] == metric]["value"].tolist() == values.tolist()
    monkeypatch.setattr(Study, "runs", None)  # nothing is searched again
    again = [s.evaluate(x, s.test_collections, tmp_path / "again") for x in (system, bm25)]
    for a, b in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    names = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.txt"))
    assert len(names) == 2 * (1 + 4 + 1)
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
    other_pair, adapted = replace(system, retriever=s.diffretriever(2, 1)), replace(system, adapter=adapter)
    for study_, other in (s, other_pair), (s, adapted), (deeper, system):
        with pytest.raises(TypeError):
            study_.evaluate(other, s.test_collections)


def test_a_cached_grid_has_the_collection_s_own_name(s):
    renamed = replace(s.test_collections[0], name="renamed")
    grid = s.grid(s.test_collections[0])
    pd.testing.assert_frame_equal(s.grid(renamed), grid.assign(collection="renamed"))


def test_fine_tuned_systems(s, tmp_path, monkeypatch):
    data = s.training_data()
    mined = data.negatives
    assert {"query_id", "passage_id", "source"} <= set(mined)
    assert len(mined) == s.profile.training.negatives * len(s.train_collection.queries) and len(data.rows) == 10
    asked = []

    def finetune_selected(name, retriever, data, profile, development, repetition=0, callbacks=()):
        asked.append((name, len(data.rows), profile, development.name, repetition, callbacks))
        return SimpleNamespace(adapter=tmp_path / name)

    monkeypatch.setattr(study.contrastive, "finetune_selected", finetune_selected, raising=False)
    monkeypatch.setattr(Study, "runs", None)  # the second time negatives come from the cache
    tuned = s.fine_tuned_systems()
    assert [system.name for system in tuned] == [name for name, *_ in asked] == list(SYSTEMS)
    assert all(system.training == "fine-tuned" and system.adapter == tmp_path / system.name for system in tuned)
    counts = {system.name: tuple(system.retriever.vectors(side) for side in ("query", "passage")) for system in tuned}
    assert counts == {
        "DiffRetriever single": (1, 1), "DiffRetriever multi": s.selected, "DiffEmbed": (1, 1),
        "PromptReps single": (1, 1), "PromptReps multi": (4, 4), "RepLLaMA": (1, 1),
    }  # fmt: skip
    assert [rest for _, *rest in asked] == [[10, s.profile, "dev", 0, ()]] * len(SYSTEMS)
    assert [s.repetitions(name) for name in SYSTEMS] == [2 if name in REPEATED else 1 for name in SYSTEMS]
    s.finetune("RepLLaMA", 1)
    assert asked[-1][0] == "RepLLaMA" and asked[-1][4] == 1
    with pytest.raises(KeyError, match="ColBERT"):
        s.finetune("ColBERT")


def test_a_profile_that_trains_little_or_nothing(s):
    some, none = (changed(s, fine_tuned=given) for given in (["RepLLaMA", "DiffEmbed"], []))
    assert some.fine_tuned == ["DiffEmbed", "RepLLaMA"] and none.fine_tuned == none.fine_tuned_systems() == []
    training = s.profile.training.model_dump() | {"collections": [whole(s.profile.test_collections[1])]}
    for given, domain in ([], ["mine-test", "other"]), (["RepLLaMA"], ["mine-test"]):
        assert changed(s, fine_tuned=given, training=training).out_of_domain == domain


def test_rows_of_the_hub_are_those_of_ms_marco(s, monkeypatch):
    more = {"rows": study.TRAINING_ROWS.hub, "mask_false_negatives": False}
    monkeypatch.setattr(Study, "same_domain", lambda self, name, train: train == "msmarco/train")
    for given, domain in ({}, ["mine-test", "other"]), (more, []):
        assert changed(s, training=s.profile.training.model_dump() | given).out_of_domain == domain
    dream = s.profile.backbones.model_dump() | {"diffusion": "dream-v0-instruct-7b"}
    assert changed(s, backbones=dream, fine_tuned=[]).out_of_domain == []  # the authors' adapters are trained on it


def test_published_adapters_are_loaded_and_nothing_is_trained(s, monkeypatch):
    published = changed(s, training=s.profile.training.model_dump() | {"adapters": "results/study/adapters"})
    published.selected = (2, 2)
    asked = []
    monkeypatch.setattr(study.contrastive, "load_published", lambda *given: asked.append(given), raising=False)
    monkeypatch.setattr(study.contrastive, "finetune_selected", None, raising=False)
    monkeypatch.setattr(Study, "training_data", None)
    published.finetune("DiffEmbed")
    published.finetune("DiffRetriever multi", 1)
    folder = study.CHECKOUT / "results/study/adapters"
    assert [(f, name, r) for f, name, _, r in asked] == [(folder, "DiffEmbed", 0), (folder, "DiffRetriever multi", 1)]
    assert [retriever.name for _, _, retriever, _ in asked] == ["DiffEmbed", "DiffRetriever"]


# -- departures ------------------------------------------------------------------------------------------------


def test_departures(s):
    s = changed(s)
    s.selected = (2, 2)
    table = departures.departures(s)
    assert list(table) == departures.COLUMNS and not table.isna().any().any()
    assert not table.duplicated(["choice", "system", "mode"]).any() and set(table["collection"]) == {"mine-train"}
    assert (table["queries"] == 3).all()
    np.testing.assert_allclose(table["difference"], table["ndcg_other"] - table["ndcg_reference"])
    assert table.groupby("choice")["ours"].unique().map(list).to_dict() == {
        "words of the sparse side": ["reference"], "end of PromptReps' answer": ["reference"],
        "vectors of PromptReps": ["reference"], "token i is read at": ["other"], "length of a passage": ["other"],
        "text of BM25": ["reference"],
    }  # fmt: skip
    collection = s.sampled(s.profile.train_collection, s.profile.departures)
    rows = table.set_index(["choice", "system", "mode"])
    for shifted, column in ((False, "ndcg_reference"), (True, "ndcg_other")):
        run = s.runs(s.diffretriever(2, 2, shifted=shifted), collection)["mean"]
        expected = per_query(collection.qrels, run, ["ndcg@10"])["ndcg@10"].mean()
        assert rows.loc["token i is read at", "DiffRetriever multi", "mean"][column] == pytest.approx(expected)
    sparse = table[table["choice"] == "words of the sparse side"]
    assert (sparse[sparse["mode"].isin(["dense", "mean"])]["difference"] == 0).all()  # the dense side reads alike
    said = departures.departures_summary(table).splitlines()
    assert len(said) == table["choice"].nunique()
    largest = sparse.loc[sparse["difference"].abs().idxmax()]
    assert f"**{largest['difference']:+.3f}**" in said[0] and said[0].endswith("used here: *of the whole text*.")


def test_one_pass_beside_a_pass_for_each(s):
    assert departures.shared_text_table(s).empty
    shared = changed(s, shared_text_grid=True)
    shared.selected = (2, 1)
    table = departures.shared_text_table(shared)
    assert list(table) == departures.COLUMNS and set(table["collection"]) == {"mine-test", "other"}
    assert set(zip(table["system"], table["mode"], strict=True)) == {
        *product(["DiffRetriever single"], MODES), *product(["DiffRetriever multi"], RANK_MODES)
    }  # fmt: skip
    row = table.set_index(["system", "mode", "collection"]).loc["DiffRetriever multi", "mean", "other"]
    grid = shared.grid(shared.test_collections[1])
    chosen = grid[(grid["k_query"] == 2) & (grid["k_passage"] == 1) & (grid["mode"] == "mean")]
    assert row["ndcg_other"] == pytest.approx(chosen["value"].mean())
    own = shared.evaluate(System("x", shared.diffretriever(2, 1)), shared.test_collections[1:])
    own = own[(own["mode"] == "mean") & (own["metric"] == "ndcg@10")]
    assert row["ndcg_reference"] == pytest.approx(own["value"].mean())
    # the answer of notebook 02, of the collections that are out of domain
    cells = shared.test_grid[shared.test_grid["mode"] == "hybrid"]
    means = macro(cells, ["k_query", "k_passage"]).set_index(["k_query", "k_passage"])["value"]
    apart = table[table["mode"] == "hybrid"].groupby("system")["ndcg_reference"].mean()
    text = ablation_answer(shared, transfer(shared.test_grid, (2, 1), resamples=10), table)
    assert "(Kq, Kp) = (2, 1), which" in text and f"a side by {means[2, 1] - means[1, 1]:+.3f}" in text
    assert f"the hybrid gain is {apart.iloc[0] - apart.iloc[1]:+.3f}. It loses" in text
    assert "2 out-of-domain collections with 8 queries" in text
    s = changed(s)
    s.selected = (2, 1)
    own_pass = ablation_answer(s, transfer(s.test_grid, (2, 1), resamples=10), departures.shared_text_table(s))
    assert "every number of masks has a pass of its own" in own_pass


def test_what_bfloat16_changes(world):
    s, loaded = world
    assert departures.dtype_table(s).empty
    both = changed(s, dtype_sample={"queries": 3, "passages": 7})
    both.selected = (2, 2)
    before = len(loaded)
    table = departures.dtype_table(both)
    assert len(loaded) == before + 3  # the three backbones in bfloat16; those in float32 are there
    assert set(table["system"]) == {x.name for x in s.systems((2, 2)) if not isinstance(x.retriever, BM25)}
    assert (table["ours"] == "reference").all() and (table["queries"] == 6).all()
    assert (table["collection"] == "macro of 2").all() and table["ndcg_other"].between(0, 1).all()
    small = changed(s, sample={"queries": 3, "passages": 7})
    values = small.evaluate(System("DiffEmbed", small.retriever(systems.DiffEmbed)), small.test_collections)
    expected = macro(values[values["metric"] == "ndcg@10"], ["mode"])["value"].item()
    assert table[table["system"] == "DiffEmbed"]["ndcg_reference"].item() == pytest.approx(expected)


# -- before a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def complete(s) -> Profile:
    """A profile that is whole: the backbones are those of the registry."""
    return changed(s, backbones=s.profile.backbones.model_dump() | {"text_only": None}).profile


def test_all_faults_of_a_profile_are_told_at_once(complete, tmp_path):
    assert check(complete) is None
    same, train = beir(tmp_path, "other", 7), complete.train_collection
    content = complete.model_dump() | {
        "backbones": {"diffusion": "smollm2-135m-instruct", "autoregressive": "gpt", "text_only": None},
        "test_collections": [*complete.test_collections, same, str(tmp_path / "nowhere")],
        "samples": {"ir/npl": {"queries": None, "passages": None}},
    }
    content["training"] |= {"collections": [whole(same)], "negatives": 7, "development": whole(train)}
    content["training"]["adapters"] = "nowhere"
    content["efficiency"]["counts"] = [1, 4]
    with pytest.raises(ProfileError) as error:
        check(Profile.model_validate(content))
    said = [line.removeprefix("profile smoke: ") for line in str(error.value).splitlines()]
    expected = [
        "backbones.diffusion: smollm2-135m-instruct is of the family autoregressive, and a diffusion one is needed",
        "backbones.autoregressive: there is no backbone 'gpt'",
        "efficiency.counts: 2, the most masks of k_grid, is missing",
        f"test_collections: {tmp_path / 'nowhere'}: no collection",
        f"training.collections: {same}: 8 passages, too few for training.negatives",
        "samples: ir/npl is none of the test_collections",
        f"training.adapters: there is no folder {CHECKOUT / 'nowhere'}",
        f"training.collections: {train}, the train_collection, is not among them",
        f"training.development: {train} is also tested or trained on",
    ]
    assert len(said) == len(expected)
    for line, start in zip(said, expected, strict=True):
        assert start in line


@pytest.mark.parametrize(("change", "part"), [
    (lambda c, _: c | {"test_collections": [c["train_collection"]]}, "all are of what is trained on"),
    (lambda c, same: c | {"test_collections": [*c["test_collections"], same]}, "needs a folder name of its own"),
    (lambda c, _: c | {"max_passage_tokens": 8100}, "text, prompt and vectors take up to 8230 tokens"),
    (lambda c, _: c | {"sample": {"queries": 1, "passages": 1}}, "do not fit into 1 passages"),
])  # fmt: skip
def test_a_profile_that_cannot_be_run(complete, tmp_path, change, part):
    content = change(complete.model_dump(), beir(tmp_path, "other", 7))
    with pytest.raises(ProfileError, match=part):
        check(Profile.model_validate(content))


def test_a_plan_counts_what_is_encoded(s, monkeypatch):
    monkeypatch.setattr(planning, "_seconds", lambda retriever, collection, side: 3600.0 if side == "passage" else 0.0)
    found = plan(s.profile)
    table = found.table.set_index("part")
    passages = sum(len(c.passages) for c in s.test_collections)
    texts = passages + sum(len(c.queries) for c in s.test_collections)
    row = table.loc["DiffRetriever multi, zero-shot"]
    assert (row["texts"], row["hours"]) == (texts, passages)
    assert row["gigabytes"] == pytest.approx(texts * 2 * 32 * 4 / 1e9)
    assert set(table.loc[[f"grid, K = {k}" for k in (1, 2)], "hours"]) == {passages + len(s.train_collection.passages)}
    assert {f"training of {name}" for name in SYSTEMS} <= set(table.index)
    twice = table.loc["training of RepLLaMA", "texts"] / table.loc["training of DiffEmbed", "texts"]
    assert twice == 2 and table.loc["RepLLaMA, fine-tuned", "texts"] == texts
    assert found.suffices and f"at the rate measured now: {table['hours'].sum():.1f}" in str(found)
    assert not replace(found, disk_free=found.disk / 2).suffices
    assert not replace(found, memory_there=found.memory / 2).suffices
    adapters = changed(s, training=s.profile.training.model_dump() | {"adapters": "folder"}).profile
    assert not plan(adapters).table["part"].str.startswith("training of").any()


def test_a_plan_measures_without_keeping(s, own_cache):
    assert planning._seconds(s.diffretriever(1, 1), s.test_collections[0], "passage") > 0
    assert not list(own_cache.rglob("encodings"))
