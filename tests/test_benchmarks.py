from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import bfloat16, encode, full_size, scale
from diffret_lib.data.collection import Collection
from diffret_lib.experiments import departures
from diffret_lib.retrieval.systems import DiffRetriever
from scripts.plan import SIZES
from tests.tiny import SENTENCES, WORDS, tiny_tokenizer


def test_tables(diffusion, tmp_path, monkeypatch, capsys):
    texts = [*SENTENCES, SENTENCES[0]]
    ids = [f"d{i}" for i in range(len(texts))]
    collection = Collection.from_texts("tiny", ids, texts, ["q0"], ["heap"], {"q0": {"d3": 1}})
    monkeypatch.setattr(encode, "load_collection", lambda name: collection)
    monkeypatch.setattr(encode, "load_backbone", lambda name, dtype: diffusion)
    monkeypatch.setattr(encode, "compiled", lambda loaded: loaded)  # tested by itself
    command = ["--passages", "5", "--rounds", "2", "--k", "4", "1", "2", "--dtypes", "float32"]
    assert encode.main([*command, "--output", str(tmp_path / "new")]) == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["encode_ratios.csv", "encode_times.csv"]
    times, ratios = (pd.read_csv(tmp_path / "new" / f"encode_{name}.csv") for name in ("times", "ratios"))
    ours = "DiffRetriever"
    assert list(zip(times["system"], times["k"], strict=True)) == [
        (ours, "1"), (ours, "2"), ("plain", "2"), ("matrix products", "2"), (f"{ours}, compiled", "2"), (ours, "4"),
        ("all K at once", "all"),
    ]  # fmt: skip
    assert (times[["seconds", "q1", "q3", "passages_per_second"]] > 0).all(axis=None)
    assert times["gflop_per_second"].notna().tolist() == [False, True, False, True, True, False, False]
    assert ratios["what"].tolist() == [
        "plain float32 / ours float32, K=2", "plain float32 / ours compiled float32, K=2",
        "matrix products / ours, float32", "matrix products / ours compiled, float32",
        "all K at once / one by one, float32", "K=4 / K=1, float32",
    ]  # fmt: skip
    assert "float32" in capsys.readouterr().out


def test_ratios_are_taken_within_a_round():
    times = {}
    for dtype, by in (("float32", 1.0), ("bfloat16", 0.25)):
        for system, k, seconds in (
            (encode.OURS, 1, [1, 2, 4]), (encode.OURS, 4, [2, 2, 8]), (encode.OURS, 16, [1.5, 2, 8]),
            (encode.PLAIN, 4, [4, 6, 8]), (encode.BOUND, 4, [1, 1, 1]), (encode.SHARED, 0, [0.45, 3, 2]),
            (encode.COMPILED, 4, [1, 2, 2]),
        ):  # fmt: skip
            times[dtype, system, k] = by * np.array(seconds, float)
    found = encode.ratios(times, [1, 4, 16]).set_index("what")
    assert found["ratio"].to_dict() == pytest.approx({
        "plain float32 / ours float32, K=4": 2.0, "matrix products / ours, float32": 0.5,
        "plain float32 / ours compiled float32, K=4": 4.0, "matrix products / ours compiled, float32": 0.5,
        "all K at once / one by one, float32": 0.1, "K=16 / K=1, float32": 1.5,
        "plain float32 / ours bfloat16, K=4": 8.0, "plain bfloat16 / ours bfloat16, K=4": 2.0,
        "plain float32 / ours compiled bfloat16, K=4": 16.0, "plain bfloat16 / ours compiled bfloat16, K=4": 4.0,
        "matrix products / ours, bfloat16": 0.5, "matrix products / ours compiled, bfloat16": 0.5,
        "all K at once / one by one, bfloat16": 0.1, "K=16 / K=1, bfloat16": 1.5,
    })  # fmt: skip
    assert found["aim"].tolist() == [
        ">= 2", ">= 2", ">= 0.85", ">= 0.85", "<= 0.4", "<= 1.05",
        ">= 6", ">= 6", ">= 2.5", ">= 2.5", ">= 0.45", ">= 0.45", "<= 0.4", "<= 1.05",
    ]  # fmt: skip


def test_matrix_products_of_an_encoding(diffusion):
    k, model = 3, diffusion.model
    retriever = DiffRetriever(diffusion, k_passage=k, batch_tokens=300)
    operations, replay = encode.matrix_products(model, partial(retriever.encode_passages, SENTENCES, progress=False))
    shapes = []  # padded batches, longest text first
    rows = sorted((len(retriever.reader.preprocess([t])["input_ids"][0]) for t in SENTENCES), reverse=True)
    while rows:
        shapes.append((min(len(rows), max(1, 300 // rows[0])), rows[0]))
        rows = rows[shapes[-1][0] :]
    tokens = sum(n * width for n, width in shapes)
    assert len(shapes) > 1
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v of 2 of 4 heads, o, gate, up and down
    head = 32 * model.config.vocab_size
    assert operations == 2 * (2 * layer * tokens + head * k * len(SENTENCES))
    replay()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_other_vectors_are_an_error(diffusion, monkeypatch):
    monkeypatch.setattr(encode, "compiled", lambda loaded: loaded)
    right = encode.encode_plainly
    monkeypatch.setattr(encode, "encode_plainly", lambda retriever, texts, size: right(retriever, texts[::-1], size))
    with pytest.raises(ValueError, match="plain way gives (other|another number of) vectors"):
        encode.benchmark([diffusion], SENTENCES, [1], 1)


# -- scale.py


def test_tables_of_search(tmp_path, monkeypatch, capsys):
    settings = {"SIDE": 64, "FEW": 2, "PROBES": (1, 64), "CANDIDATES": (100, 600), "CLUSTER": 50}
    settings["PLANS"] = (("mean", "Flat"), ("vectors", "IVF{},SQ8"))
    for name, value in settings.items():
        monkeypatch.setattr(scale, name, value)
    sizes = ["--passages", "600", "--large-passages", "200", "--queries", "12", "--alone", "6", "--rounds", "2"]
    command = [*sizes, "--data", str(tmp_path / "data"), "--output", str(tmp_path / "new")]
    assert scale.main(command) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "scale_exact.csv", "scale_latency.csv", "scale_latency.png"
    ]  # fmt: skip
    exact, latency = (pd.read_csv(tmp_path / "new" / f"scale_{name}.csv") for name in ("exact", "latency"))
    ways = ["float32 float32", "float16 float32", "int8 float32", "float32 bfloat16", "int8 bfloat16"]
    assert (exact["storage"] + " " + exact["products"]).tolist() == 2 * ways
    assert (exact[["seconds", "share_of_peak", "first_search_peak_rss_gib"]] > 0).all(axis=None)
    assert (exact["recall@100"] > 0.9).all() and (exact["recall@100"][::5] == 1).all()
    assert exact["gib"].to_numpy()[:3] * 2**30 == pytest.approx([600 * 4 * 512, 600 * 4 * 256, 600 * 4 * 132], rel=1e-3)
    assert latency.groupby("passages").size().tolist() == [3 + 6 + 4] * 2
    everything = latency[(latency["candidates"] == 600) & latency["nprobe"].isna() & (latency["storage"] == "float32")]
    assert (everything["recall@100"] == 1).all() and len(everything) == 2
    probed = latency[latency["candidates"] == 600].dropna(subset="nprobe").set_index("nprobe")["recall@100"]
    assert probed[probed.index.max()].mean() > probed[1].mean() > 0
    assert "int8" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.npy")}
    found = scale.indexes(tmp_path / "data", 600, 4, 128)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.npy")} == before  # read, not made
    again = np.concatenate([part.dense for part in scale.clustered(600, 4, 128)])
    assert (found["float32"].reconstruct(range(600)).dense == again).all()


def test_quality_by_hand():
    exact = np.zeros((2, 4)), np.array([[3, 1, 2, 0], [5, 6, 7, 8]])
    found = np.zeros((2, 4)), np.array([[1, 3, 9, -1], [8, 7, 6, 5]])
    scores = scale.quality(found, exact, np.array([3, 4]))
    assert scores == pytest.approx({"recall@100": (0.5 + 1) / 2, "ndcg@10": (1 / np.log2(3) + 0) / 2})


def test_bfloat16_beside_float32(s, tmp_path, monkeypatch, capsys):
    asked, table_of = [], bfloat16.dtype_table
    monkeypatch.setattr(bfloat16, "load_profile", lambda name: s.profile)
    monkeypatch.setattr(bfloat16, "dtype_table", lambda study: asked.append(study) or table_of(study))
    assert bfloat16.main(["--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "bfloat16.csv")
    systems = set(table["system"])
    assert {"DiffRetriever multi", "PromptReps single", "DiffEmbed"} <= systems and "BM25" not in systems
    assert np.allclose(table["difference"], table["ndcg_other"] - table["ndcg_reference"], atol=1e-5)
    assert table["ndcg_reference"].between(0, 1).all() and "DiffEmbed" in capsys.readouterr().out
    dtypes = {name: other.backbone("diffusion").dtype for name, other in departures.dtype_studies(asked[0]).items()}
    assert dtypes == {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("name", full_size.SHAPES)
def test_random_backbones_have_the_papers_sizes(name):
    kind, shapes = full_size.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shapes))
    assert (sum(p.numel() for p in model.parameters()), model.config.hidden_size) == SIZES[name]


def test_backbones_of_the_papers_size(tmp_path, monkeypatch, capsys):
    ids = [f"d{i}" for i in range(len(SENTENCES))]
    judged = {f"q{i}": {name: 1} for i, name in enumerate(ids)}
    collection = Collection.from_texts("tiny", ids, SENTENCES, list(judged), WORDS[: len(ids)], judged)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": len(tokenizer)}  # fmt: skip
    monkeypatch.setattr(full_size, "SHAPES", {k: (kind, s | small) for k, (kind, s) in full_size.SHAPES.items()})
    monkeypatch.setattr(full_size, "load_collection", lambda name: collection)
    monkeypatch.setattr(full_size, "MINI_BATCHES", (64,))
    names = ["llada-8b-instruct", "qwen2.5-7b-instruct"]
    command = ["--backbones", *names, "--rounds", "2", "--max-passage-tokens", "8"]
    assert full_size.main([*command, "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path)]) == 0
    assert "llada-8b-instruct" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "full_size.csv").set_index("part")
    assert (table["seconds"] > 0).all() and table.index.value_counts().to_dict() == {
        "write": 2, "load": 2, "encoding, passage": 9, "encoding, query": 9, "training, 64 texts at once": 2,
    }  # fmt: skip
    encoded = table.loc["encoding, passage"].set_index(["backbone", "system", "vectors"])
    masks, decoded = ((name, system) for name, system in zip(names, ("DiffRetriever", "PromptReps"), strict=True))
    assert encoded.loc[(*masks, 16), "tokens"] - encoded.loc[(*masks, 4), "tokens"] == 12 * len(ids)
    assert encoded.loc[(*decoded, 16), "tokens"] == encoded.loc[(*decoded, 4), "tokens"]
    assert encoded.loc[(*decoded, 20), "to_one_vector"] > 2 and (encoded["texts"] == len(ids)).all()
    assert table.loc["training, 64 texts at once", "system"].tolist() == ["DiffRetriever", "PromptReps"]
