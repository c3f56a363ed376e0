from __future__ import annotations

import ast
import json
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from tests.tiny import tiny_backbone

from diffret_lib.config import load_profile
from diffret_lib.data.collection import Collection
from diffret_lib.experiments.reading import (
    alignment,
    explain,
    mask_words,
    mask_words_table,
    mean_self_similarity,
    predicted_tokens,
    reading_table,
    self_similarity_table,
    share_of_content,
)
from diffret_lib.experiments.study import Study
from diffret_lib.report import figures
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import maxsim_search
from diffret_lib.retrieval.systems import DiffRetriever, PromptReps

TEXTS = ["A heap is a binary tree.", "Return a sorted copy of an array.", "Compute the eigenvalues.", "Tea is a drink."]
COLLECTION = Collection.from_texts("mine", list("abcd"), TEXTS, ["q"], ["heap"], {"q": {"a": 1}})
NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "90_explore.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def retriever(folder) -> DiffRetriever:
    return DiffRetriever(tiny_backbone(folder), k_query=3, k_passage=4)


@pytest.mark.parametrize("system", ["diffusion", "autoregressive"])
def test_alignment_adds_up_to_maxsim(folder, retriever, system):
    r = retriever if system == "diffusion" else PromptReps(tiny_backbone(folder, system), max_new_tokens=3)
    query = "priority queue"
    queries, passages = r.encode_queries([query], progress=False), r.encode_passages(TEXTS, progress=False)
    scores, indices = maxsim_search(queries, passages, len(TEXTS))
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


def test_explained_ranking_is_the_search(retriever):
    encoded = retriever.encode_passages(TEXTS, progress=False)
    for mode in ("dense", "hybrid"):
        table = explain(retriever, COLLECTION, encoded, "sorted array", 3, mode)
        assert list(table) == ["rank", "score", "passage_id", "words", "text"]
        queries = retriever.encode_queries(["sorted array"], progress=False)
        run = retriever.search(queries, encoded, mode, 3, ["x"], list("abcd"))
        assert dict(zip(table["passage_id"], table["score"], strict=True)) == dict(run.run["x"])
        assert table["rank"].tolist() == [1, 2, 3] and (table["score"].diff().dropna() < 0).all()
        assert [TEXTS["abcd".index(i)] for i in table["passage_id"]] == table["text"].tolist()
    dense = explain(retriever, COLLECTION, encoded, "sorted array", 1)
    top = alignment(retriever, "sorted array", dense["text"][0])
    assert dense["score"][0] == pytest.approx(top.max(axis=1).clip(lower=0).sum(), abs=1e-5)


def test_any_query_text_is_taken(retriever):
    encoded = retriever.encode_passages(TEXTS, progress=False)
    for query in ("", "  ", "$x^2$ <|im_end|> 日本"):
        assert len(explain(retriever, COLLECTION, encoded, query, 2)) == 2
    assert explain(retriever, COLLECTION, encoded, "is the", 5, "sparse").empty  # stop words alone


def test_passages_of_another_collection(retriever):
    with pytest.raises(ValueError, match="2 encodings for 4 passages of mine"):
        explain(retriever, COLLECTION, retriever.encode_passages(TEXTS[:2], progress=False), "heap", 2)


@pytest.fixture
def study(folder, tmp_path, monkeypatch) -> Study:
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache"))

    def load(name, *, dtype):
        return tiny_backbone(folder, "diffusion" if "diffusion" in name else "autoregressive")

    monkeypatch.setattr("diffret_lib.experiments.study.load_backbone", load)
    return Study(load_profile("smoke"))


def test_tables_of_words(study):
    texts = TEXTS[:2]
    words, shares = mask_words_table(study, texts)
    assert len(words) == 2 and list(shares["reading"]) == ["one mask", "four masks", "parent, next token", "parent, decoded"]
    assert shares[["content", "in_text"]].stack().between(0, 1).all()
    assert list(reading_table(study, texts, "query")) == [
        "text", "DiffRetriever K=1", "DiffRetriever K=4", "PromptReps single", "PromptReps multi (N=2)"
    ]  # fmt: skip
    tokens = predicted_tokens(study.diffretriever(4, 4), texts)
    assert all(1 <= len(row) <= 4 for row in tokens)
    assert [len(r) for r in predicted_tokens(study.promptreps(0), texts)] == [1, 1]


def test_share_of_content():
    text = "A heap is a binary tree for which every parent counts."
    assert share_of_content([" heap", "bin", " the", '"', " axis"], text) == {"content": 0.6, "in_text": 0.4}
    assert share_of_content([], text) == {"content": 0.0, "in_text": 0.0}


def test_mean_self_similarity(study):
    dense = np.zeros((3, 3, 2), np.float32)
    dense[0, 0] = dense[0, 1] = dense[0, 2] = (1, 0)  # 1
    dense[1, 0], dense[1, 1] = (1, 0), (0, 1)  # 0
    dense[2, 0] = (1, 0)  # one vector: does not count
    assert mean_self_similarity(Representations(dense, np.array([3, 2, 1]))) == pytest.approx(0.5)
    assert np.isnan(mean_self_similarity(Representations(dense[2:], np.array([1]))))
    table = self_similarity_table(study, COLLECTION)
    assert table["system"].tolist() == ["DiffRetriever", "PromptReps multi"] and table["vectors"].tolist() == [4, 3]
    assert table["cosine"].between(-1, 1).all() and table["vectors used"].between(1, 4).all()


def test_figure_marks_the_row_maxima(retriever):
    products = alignment(retriever, "heap", TEXTS[1])
    names = list(products.columns)
    names[0] = "1 $a_"  # is no mathematics
    products.columns = names
    fig = figures.alignment(products, "a $ in the title")
    frames = [(int(p.get_x()), int(p.get_y())) for p in fig.axes[0].patches]
    assert frames == [(int(np.argmax(row)), i) for i, row in enumerate(products.to_numpy())]
    score = np.clip(products.to_numpy().max(1), 0, None).sum()
    assert f"MaxSim {score:.3f}" in fig.axes[0].get_title()
    fig.canvas.draw()
    assert fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel()
    plt.close(fig)


def test_notebook_runs_and_reacts(folder, tmp_path, monkeypatch):
    """The notebook's cells, on a tiny backbone and a tiny collection: from top to bottom, then a text is typed."""
    monkeypatch.setenv("DIFFRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffret_lib.experiments.study.load_backbone", lambda name, *, dtype: tiny_backbone(folder))
    beir = tmp_path / "mine"
    (beir / "qrels").mkdir(parents=True)
    corpus = zip(COLLECTION.passage_ids, COLLECTION.passages, strict=True)
    (beir / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in corpus))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "heap"}) + "\n")
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    given = {"profile": "smoke", "collection": str(beir), "results_root": str(tmp_path), "query": "heap", "sample": 4}
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
    before = len(shown)
    space["text"].value = "sorted array"
    assert len(shown) > before
    assert "sorted array" in str([getattr(o, "data", o) for o in shown[before:]])
    plt.close("all")
