from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffret_lib.data.collection import Collection
from diffret_lib.retrieval.systems import DiffRetriever
from tests.tiny import SENTENCES, tiny_backbone

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "encode.py"


@pytest.fixture(scope="module")
def encode():
    spec = importlib.util.spec_from_file_location("benchmarks_encode", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("tiny"), "diffusion")


def test_tables(encode, backbone, tmp_path, monkeypatch, capsys):
    texts = [*SENTENCES, SENTENCES[0]]
    ids = [f"d{i}" for i in range(len(texts))]
    collection = Collection.from_texts("tiny", ids, texts, ["q0"], ["heap"], {"q0": {"d3": 1}})
    monkeypatch.setattr(encode, "load_collection", lambda name: collection)
    monkeypatch.setattr(encode, "load_backbone", lambda name, dtype: backbone)
    command = ["--passages", "5", "--rounds", "2", "--k", "4", "1", "2", "--dtypes", "float32"]
    assert encode.main([*command, "--output", str(tmp_path / "new")]) == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["encode_ratios.csv", "encode_times.csv"]
    times, ratios = (pd.read_csv(tmp_path / "new" / f"encode_{name}.csv") for name in ("times", "ratios"))
    ours = "DiffRetriever"
    assert list(zip(times["system"], times["k"], strict=True)) == [
        (ours, "1"), (ours, "2"), ("plain", "2"), ("matrix products", "2"), (ours, "4"), ("all K at once", "all"),
    ]  # fmt: skip
    assert (times[["seconds", "q1", "q3", "passages_per_second"]] > 0).all(axis=None)
    assert times["gflop_per_second"].notna().tolist() == [False, True, False, True, False, False]
    assert ratios["what"].tolist() == [
        "plain float32 / ours float32, K=2", "matrix products / ours, float32", "all K at once / one by one, float32",
        "K=4 / K=1, float32",
    ]  # fmt: skip
    assert "float32" in capsys.readouterr().out


def test_ratios_are_taken_within_a_round(encode):
    times = {}
    for dtype, by in (("float32", 1.0), ("bfloat16", 0.25)):
        for system, k, seconds in (
            (encode.OURS, 1, [1, 2, 4]), (encode.OURS, 4, [2, 2, 8]), (encode.OURS, 16, [1.5, 2, 8]),
            (encode.PLAIN, 4, [4, 6, 8]), (encode.BOUND, 4, [1, 1, 1]), (encode.SHARED, 0, [0.45, 3, 2]),
        ):  # fmt: skip
            times[dtype, system, k] = by * np.array(seconds, float)
    found = encode.ratios(times, [1, 4, 16]).set_index("what")
    assert found["ratio"].to_dict() == pytest.approx({
        "plain float32 / ours float32, K=4": 2.0, "matrix products / ours, float32": 0.5,
        "all K at once / one by one, float32": 0.1, "K=16 / K=1, float32": 1.5,
        "plain float32 / ours bfloat16, K=4": 8.0, "plain bfloat16 / ours bfloat16, K=4": 2.0,
        "matrix products / ours, bfloat16": 0.5, "all K at once / one by one, bfloat16": 0.1, "K=16 / K=1, bfloat16": 1.5,
    })  # fmt: skip
    assert found["aim"].tolist() == [">= 2", ">= 0.85", "<= 0.4", "<= 1.05", ">= 6", ">= 2.5", ">= 0.45", "<= 0.4", "<= 1.05"]


def test_matrix_products_of_an_encoding(encode, backbone):
    k = 3
    retriever = DiffRetriever(backbone, k_passage=k, batch_tokens=300)
    operations, replay = encode.matrix_products(backbone.model, partial(retriever.encode_passages, SENTENCES, progress=False))
    shapes = []  # padded batches, longest text first
    rows = sorted((len(retriever.reader.preprocess([t])["input_ids"][0]) for t in SENTENCES), reverse=True)
    while rows:
        shapes.append((min(len(rows), max(1, 300 // rows[0])), rows[0]))
        rows = rows[shapes[-1][0] :]
    tokens = sum(n * width for n, width in shapes)
    assert len(shapes) > 1
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v of 2 of 4 heads, o, gate, up and down
    head = 32 * backbone.model.config.vocab_size
    assert operations == 2 * (2 * layer * tokens + head * k * len(SENTENCES))
    replay()
    assert not any(m._forward_pre_hooks for m in backbone.model.modules())


def test_other_vectors_are_an_error(encode, backbone, monkeypatch):
    right = encode.encode_plainly
    monkeypatch.setattr(encode, "encode_plainly", lambda retriever, texts, size: right(retriever, texts[::-1], size))
    with pytest.raises(ValueError, match="plain way gives (other|another number of) vectors"):
        encode.benchmark([backbone], SENTENCES, [1], 1)
