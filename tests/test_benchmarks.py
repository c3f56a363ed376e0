from __future__ import annotations

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from tiny import SENTENCES, tiny_backbone

from diffret_lib.data.collection import Collection
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.systems import DiffRetriever

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "encode.py"


@pytest.fixture(scope="module")
def encode():
    spec = importlib.util.spec_from_file_location("benchmarks_encode", PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_backbone(folder / "d", "diffusion"), tiny_backbone(folder / "a", "autoregressive")


def test_table(encode, backbones, tmp_path, monkeypatch, capsys):
    texts = [*SENTENCES, SENTENCES[0]]
    ids = [f"d{i}" for i in range(len(texts))]
    collection = Collection.from_texts("tiny", ids, texts, ["q0"], ["heap"], {"q0": {"d3": 1}})
    monkeypatch.setattr(encode, "load_collection", lambda name: collection)
    monkeypatch.setattr(encode, "load_backbone", lambda name, **_: backbones[0 if "diffusion" in name else 1])
    monkeypatch.setattr(encode, "NEW_TOKENS", 3)
    output = tmp_path / "new" / "encode.csv"
    command = ["--passages", "5", "--rounds", "2", "--k", "4", "1", "2", "--naive-batch", "2", "--output", str(output)]
    assert encode.main(command) == 0

    table = pd.read_csv(output)
    assert [p.name for p in output.parent.iterdir()] == ["encode.csv"]
    spread = [f"{name}{q}" for name in ("seconds", "passages_per_second", "time_ratio") for q in ("", "_q1", "_q3")]
    more = ["vectors", "min_cosine", "max_weight_difference"]
    where = ["passages", "collection", "rounds", "device", "threads", "dtype", "torch"]
    assert list(table.columns) == ["system", "k", *spread, "relative_to", "gflop_per_second", *more, *where]
    ours, naive, bound = "DiffRetriever", "naive", "GEMM bound"
    rows = [(s, None if math.isnan(k) else int(k)) for s, k in zip(table["system"], table["k"], strict=True)]
    assert rows == [
        (ours, 1), (naive, 1), (bound, 1), (ours, 2), (ours, 4), (naive, 4), (bound, 4),
        ("PromptReps single", None), ("PromptReps multi", 3), ("DiffEmbed", None),
    ]  # fmt: skip
    assert table["relative_to"].tolist() == [
        f"{ours} K=1", f"{ours} K=1", f"{ours} K=1", f"{ours} K=1", f"{ours} K=1", f"{ours} K=4", f"{ours} K=4",
        "PromptReps single", "PromptReps single", f"{ours} K=1",
    ]  # fmt: skip
    assert (table[spread] > 0).all(axis=None) and table["time_ratio"][0] == 1
    assert set(table["passages"]) == {5} and set(table["dtype"]) == {"float32"}
    assert table["min_cosine"].notna().tolist() == [s == naive for s in table["system"]]
    assert (table["min_cosine"].dropna() > 0.9999).all() and (table["max_weight_difference"].dropna() < 1e-4).all()
    assert (table["gflop_per_second"].notna() == (table["system"] != naive)).all()
    text = capsys.readouterr().out
    assert "float32" in text and str(output) in text and text.count(naive) == 2


def test_summary(encode):
    one, many, naive = ("DiffRetriever", 1), ("DiffRetriever", 16), ("naive", 16)
    times = {one: [1.0, 2.0, 4.0], many: [1.5, 2.0, 8.0], naive: [3.0, 6.0, 4.0]}
    table = encode.summarise(times, 10, {one: int(6e9)}, [16, 1])
    assert table["seconds"].tolist() == [2.0, 2.0, 4.0]
    assert table["passages_per_second"].tolist() == pytest.approx([5.0, 5.0, 2.5])
    assert table["time_ratio"].tolist() == [1.0, 1.5, 2.0]  # medians of (1.5, 1, 2) and of (2, 3, 0.5)
    assert table["time_ratio_q1"].tolist() == [1.0, 1.25, 1.25] and table["time_ratio_q3"].tolist() == [1.0, 1.75, 2.5]
    assert table["relative_to"].tolist() == ["DiffRetriever K=1", "DiffRetriever K=1", "DiffRetriever K=16"]
    assert table["gflop_per_second"][0] == 3.0 and table["gflop_per_second"][1:].isna().all()


def test_bound_has_the_products_of_an_encoding(encode, backbones):
    k = 3
    retriever = DiffRetriever(backbones[0], k_passage=k, batch_tokens=300)
    run = partial(retriever.encode_passages, SENTENCES, progress=False)
    products = encode.MatrixProducts.of(backbones[0].model, run)
    shapes = []  # padded batches, longest text first
    rows = sorted((len(retriever.reader.preprocess([t])["input_ids"][0]) for t in SENTENCES), reverse=True)
    while rows:
        shapes.append((max(1, 300 // rows[0]), rows[0]))
        rows = rows[shapes[-1][0] :]
    tokens = sum(min(n, len(SENTENCES) - sum(m for m, _ in shapes[:i])) * width for i, (n, width) in enumerate(shapes))
    assert len(shapes) > 1
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v of 2 of 4 heads, o, gate, up and down
    head = 32 * backbones[0].model.config.vocab_size
    assert products.flop == 2 * (2 * layer * tokens + head * k * len(SENTENCES))
    inputs = products.inputs()
    assert {width: x.shape[1] for width, x in inputs.items()} == {32: 32, 64: 64}
    products.replay(inputs)
    assert not any(m._forward_pre_hooks for m in backbones[0].model.modules())


def test_other_vectors_are_an_error(encode, backbones, monkeypatch):
    right = encode.encode_naively

    def wrong(retriever, texts, batch_size):
        return right(retriever, texts[::-1], batch_size)

    monkeypatch.setattr(encode, "encode_naively", wrong)
    monkeypatch.setattr(encode, "NEW_TOKENS", 1)
    with pytest.raises(ValueError, match="naive way gives (other|another number of) vectors"):
        encode.benchmark(*backbones, SENTENCES, [1], 1)


def test_agreement(encode):
    dense = np.zeros((2, 2, 2), np.float32)
    dense[0], dense[1, 0] = np.eye(2), [0.6, 0.8]  # the second text has one vector
    other = dense.copy()
    other[1, 0], other[1, 1] = [0.8, 0.6], [1, 0]  # the row that is not used does not count
    weights = np.array([[1, 0, 2], [0, 3, 0]], np.float32)
    ours = Representations(dense, np.array([2, 1]), sp.csr_matrix(weights))
    naive = Representations(other, np.array([2, 1]), sp.csr_matrix(weights - [[0, 0, 0], [0, 0.5, 0]]))
    assert encode.agreement(ours, ours) == (pytest.approx(1.0), 0.0)
    assert encode.agreement(ours, naive) == (pytest.approx(0.96), 0.5)
    with pytest.raises(ValueError, match="number of vectors"):
        encode.agreement(ours, Representations(dense, np.array([2, 2]), ours.sparse))


@pytest.mark.parametrize("arguments", [["--passages", "0"], ["--k", "0"], ["--backbone", "smollm2-135m-instruct"]])
def test_bad_arguments(encode, arguments, capsys):
    with pytest.raises(SystemExit):
        encode.main(arguments)
    assert "error" in capsys.readouterr().err
