from __future__ import annotations

import ast

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from diffret_lib.config import CHECKOUT, load_profile
from diffret_lib.data.collection import Collection
from diffret_lib.experiments import reading
from diffret_lib.experiments.reading import Explorer, alignment, mask_words, predicted_tokens, top_tokens
from diffret_lib.experiments.study import Study
from diffret_lib.report import figures
from diffret_lib.retrieval.metrics import per_query
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import search
from diffret_lib.retrieval.systems import BM25, DiffRetriever, PromptReps
from tests.tiny import write_beir

TEXTS = ["A heap is a binary tree.", "Return a sorted copy of an array.", "Compute the eigenvalues.", "Tea is a drink."]
QUERIES = ["eigenvalues of tea", "heap"]
JUDGED = {"q": {"a": 1}, "p": {"c": 1, "d": 2, "b": 0}}
COLLECTION = Collection.from_texts("mine", list("abcd"), TEXTS, ["p", "q"], QUERIES, JUDGED)
NOTEBOOK = CHECKOUT / "notebooks" / "90_explore.ipynb"


@pytest.fixture(scope="module")
def retriever(diffusion) -> DiffRetriever:
    return DiffRetriever(diffusion, k_query=3, k_passage=4)


@pytest.mark.parametrize("system", ["diffusion", "autoregressive"])
def test_alignment_adds_up_to_maxsim(retriever, autoregressive, system):
    r = retriever if system == "diffusion" else PromptReps(autoregressive, max_vectors=4)
    query = "priority queue"
    queries, passages = r.encode_queries([query], progress=False), r.encode_passages(TEXTS, progress=False)
    scores, indices = search(queries, passages, ["maxsim"], len(TEXTS))["maxsim"]
    expected = dict(zip(indices[0].tolist(), scores[0].tolist(), strict=True))
    for i, text in enumerate(TEXTS):
        products = alignment(r, query, text)
        assert products.shape == (queries.lengths[0], passages.lengths[i])
        by_hand = sum(max(0.0, *row) for row in products.to_numpy().tolist())
        assert by_hand == pytest.approx(expected[i], abs=1e-5)
        np.testing.assert_allclose(products.iloc[0, 0], queries.dense[0, 0] @ passages.dense[i, 0], atol=1e-5)
        assert list(products.columns) == mask_words(r, [text], "passage")[0]


def test_rows_and_columns_are_named_by_position_and_word(retriever):
    products = alignment(retriever, "heap", TEXTS[0])
    assert [n.split(" ", 1)[0] for n in products.index] == [str(i) for i in range(1, 1 + len(products))]
    assert products.index.is_unique and products.columns.is_unique
    ids = retriever.reader(retriever.reader.preprocess(["heap"], task="query"))["predicted_ids"][0]
    first = retriever.reader.tokenizer.decode([int(ids[0])]).strip()
    assert products.index[0] == f"1 {first if first.isprintable() else ascii(first)[1:-1]}"
    assert all(name.isprintable() for name in [*products.index, *products.columns])


@pytest.fixture
def study(own_cache, diffusion, autoregressive) -> Study:
    return Study(load_profile("smoke"), {"diffusion": diffusion, "autoregressive": autoregressive})


@pytest.fixture
def explorer(study) -> Explorer:
    return Explorer(study, COLLECTION, "DiffRetriever", (4, 1))


@pytest.mark.parametrize("system", ["DiffRetriever", "PromptReps"])
def test_what_is_found_is_the_search(study, system):
    looked = Explorer(study, COLLECTION, system, (4, 1))
    for mode in ("dense", "hybrid"):
        table = looked.found("sorted array", mode, 3)
        assert list(table) == ["rank", "score", "BM25", "passage_id", "words", "text"]
        queries = looked.retriever.encode_queries(["sorted array"], progress=False)
        run = looked.retriever.search(queries, looked.passages, mode, 3, ["x"], list("abcd")).run["x"]
        assert list(table["passage_id"]) == list(run) and table["rank"].tolist() == [1, 2, 3]
        np.testing.assert_allclose(table["score"], list(run.values()), rtol=1e-6)
        assert [TEXTS["abcd".index(i)] for i in table["passage_id"]] == table["text"].tolist()
        # only b shares a word with the query
        assert table["BM25"].tolist() == ["1" if i == "b" else "-" for i in table["passage_id"]]
    dense = looked.found("sorted array", top_k=1)
    top = alignment(looked.retriever, "sorted array", dense["text"][0])
    assert dense["score"][0] == pytest.approx(top.max(axis=1).clip(lower=0).sum(), abs=1e-5)


def test_any_query_text_is_taken(explorer):
    for query in ("", "  ", "$x^2$ <|im_end|> 日本"):
        assert len(explorer.found(query, top_k=2)) == 2
    assert explorer.found("is the", "sparse").empty  # stop words alone
    with pytest.raises(ValueError, match="the system must be 'DiffRetriever' or 'PromptReps', not 'BM25'"):
        Explorer(explorer.study, COLLECTION, "BM25", (1, 1))


def test_judged_queries_and_their_ranks(explorer):
    table = explorer.judged("dense").set_index("query")
    assert set(table.index) == set(QUERIES)
    lexical = BM25()
    passages = lexical.encode_passages(TEXTS)
    run = lexical.search(lexical.encode_queries(QUERIES), passages, "sparse", 4, ["p", "q"], list("abcd"))
    expected = per_query(JUDGED, run, ["ndcg@10"])["ndcg@10"]
    assert table.loc[QUERIES, "BM25: ndcg@10"].tolist() == pytest.approx(list(expected))
    assert table.loc["heap", "BM25: ranks"] == "1" and table.loc[QUERIES[0], "BM25: ranks"] == "1, 2"
    places = explorer.found("heap", "dense", 4).set_index("passage_id")["rank"]
    assert table.loc["heap", "DiffRetriever: ranks"] == str(places["a"])
    behind = table["DiffRetriever: ndcg@10"] - table["BM25: ndcg@10"]
    assert behind.is_monotonic_increasing
    assert explorer.judged("sparse").set_index("query").loc[QUERIES[0], "DiffRetriever: ranks"].count(",") == 1


def test_top_tokens_begin_with_the_greedy_one(study):
    for system in (study.diffretriever(4, 4), study.promptreps(3)):
        table = top_tokens(system, TEXTS[0], "passage", 5)
        assert list(table) == list("12345") and table.index.tolist() == list(range(1, 1 + len(table)))
        words = [name.split(" ", 1)[1] for name in mask_words(system, [TEXTS[0]], "passage")[0]]
        assert table["1"].tolist() == words and all(row.nunique() > 1 for _, row in table.iterrows())


def test_tables_of_words(study):
    texts = TEXTS[:2]
    words, shares = reading.mask_words_table(study, texts)
    readings = ["one mask", "four masks", "parent, next token", "parent, decoded"]
    assert len(words) == 2 and list(shares["reading"]) == list(words)[1:] == readings
    assert shares[["content", "in_text"]].stack().between(0, 1).all()
    assert list(reading.reading_table(study, texts, "query")) == [
        "text", "DiffRetriever K=1", "DiffRetriever K=4", "PromptReps single", "PromptReps multi (N=2)"
    ]  # fmt: skip
    tokens = predicted_tokens(study.diffretriever(4, 4), texts)
    assert all(1 <= len(row) <= 4 for row in tokens)
    assert [len(r) for r in predicted_tokens(study.promptreps(), texts)] == [1, 1]


def test_share_of_content():
    text = "A heap is a binary tree for which every parent counts."
    assert reading.share_of_content([" heap", "bin", " the", '"', " axis"], text) == {"content": 0.6, "in_text": 0.4}
    assert reading.share_of_content([], text) == {"content": 0.0, "in_text": 0.0}


def test_mean_self_similarity(study):
    dense = np.zeros((3, 3, 2), np.float32)
    dense[0, 0] = dense[0, 1] = dense[0, 2] = (1, 0)  # 1
    dense[1, 0], dense[1, 1] = (1, 0), (0, 1)  # 0
    dense[2, 0] = (1, 0)  # one vector: does not count
    assert reading.mean_self_similarity(Representations(dense, np.array([3, 2, 1]))) == pytest.approx(0.5)
    assert np.isnan(reading.mean_self_similarity(Representations(dense[2:], np.array([1]))))
    table = reading.self_similarity_table(study, COLLECTION)
    assert table["system"].tolist() == ["DiffRetriever", "PromptReps multi"] and table["vectors"].tolist() == [4, 2]
    assert table["cosine"].between(-1, 1).all() and table["vectors used"].between(1, 4).all()


def test_figure_marks_the_row_maxima_of_centred_rows(retriever):
    products = alignment(retriever, "heap", TEXTS[1])
    names = list(products.columns)
    names[0] = "1 $a_"  # is no mathematics
    products.columns = names
    fig = figures.alignment(products, "a $ in the title")
    frames = [(int(p.get_x()), int(p.get_y())) for p in fig.axes[0].patches]
    assert frames == [(int(np.argmax(row)), i) for i, row in enumerate(products.to_numpy())]
    shown = fig.axes[0].collections[0].get_array().reshape(products.shape)
    np.testing.assert_allclose(shown, products.to_numpy() - products.to_numpy().mean(1, keepdims=True), atol=1e-6)
    score = np.clip(products.to_numpy().max(1), 0, None).sum()
    assert f"MaxSim {score:.3f}" in fig.axes[0].get_title()
    fig.canvas.draw()
    plt.close(fig)


def test_notebook_runs_and_reacts(own_cache, diffusion, tmp_path, monkeypatch):
    """The notebook's cells, on a tiny backbone and a tiny collection: from top to bottom, then something is chosen."""
    monkeypatch.setattr("diffret_lib.experiments.study.load_backbone", lambda name, *, dtype: diffusion)
    passages = dict(zip(COLLECTION.passage_ids, COLLECTION.passages, strict=True))
    beir = write_beir(tmp_path / "mine", passages, {"q": "heap"}, {"q": {"a": 1}})
    given = {"profile": "smoke", "collection": beir, "results_root": str(tmp_path), "pair": (4, 4)}
    space: dict = {"__name__": "__main__"}
    shown: list = []
    monkeypatch.setattr("IPython.display.display", lambda *objects, **_: shown.extend(objects))
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.cell_type != "code":
            continue
        exec(compile(ast.parse(cell.source), cell.id, "exec"), space)
        if "parameters" in cell.metadata.get("tags", []):
            assert set(given) <= set(space)
            space.update(given)
    assert space["status"].value == ""
    working = []
    space["status"].observe(lambda change: working.append(change["new"]), "value")
    looked = [o for o in shown if str(getattr(o, "data", "")).startswith("**heap** in ")]
    assert len(looked) == 1  # the first judged query is looked into, once
    assert shown.index(space["status"]) < shown.index(looked[0])
    for control, value in (("query", "sorted array"), ("k_query", 1), ("mode", "hybrid")):
        before = len(shown)
        space["controls"][control].value = value
        assert "sorted array" in str([getattr(o, "data", o) for o in shown[before:]])
    assert [bool(text) for text in working] == [True, False] * 3 and "DiffRetriever (1, 4)" in working[2]
    space["judged"].value = "heap"
    assert space["controls"]["query"].value == "heap"
    plt.close("all")
