"""The README: its Python example, for every system that it names, and its links."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
from tiny import tiny_backbone

from diffret_lib.config import CHECKOUT
from diffret_lib.retrieval import systems

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
SYSTEMS = {
    "DiffRetriever": 'DiffRetriever(diffusion, k_query=4, k_passage=4)', "PromptReps": "PromptReps(parent)",
    "DiffEmbed": "DiffEmbed(diffusion)", "MeanPooledAR": "MeanPooledAR(parent)", "RepLLaMA": "RepLLaMA(parent)",
    "BM25": "BM25()",
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_python_example_works_for_each_system(name, tmp_path, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert all(f"`{other}`" in README for other in SYSTEMS if other != "DiffRetriever")
    code, changed = re.subn(r'DiffRetriever\("smollm2.*\)', SYSTEMS[name], code)
    assert changed == 1
    code = code.replace("import DiffRetriever", f"import {name}")
    family = "diffusion" if "diffusion" in SYSTEMS[name] else "autoregressive"
    loaded = tiny_backbone(tmp_path / family, family)
    space: dict = {"diffusion": loaded, "parent": loaded}
    exec(code, space)
    run = space["retriever"].search(space["queries"], space["passages"], top_k=10)
    (scores,) = run.run.values() if hasattr(run, "run") else run.values()
    assert 1 <= len(dict(scores)) <= 2
    assert capsys.readouterr().out


def test_verdicts_are_those_of_the_study():
    folder = CHECKOUT / "results" / "study"
    claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))["claims"]
    rows = re.findall(r"^\| (\d) \| .* \| ([a-z ,]+) \|$", README, re.MULTILINE)
    assert rows == [(str(claim["claim"]), claim["verdict"]) for claim in claims] and len(rows) == 7
    shown = ({(t["training"], t["mode"]) for t in claims[n]["tests"] if t["counts"] and t["verdict"] == "supported"}
        for n in (0, 1))  # fmt: skip
    first, second = ({mode for training, mode in held if training == "fine-tuned"} for held in shown)
    assert first == {"hybrid"} and second == {"dense", "mean"}
    sparse = [test["verdict"] for test in claims[1]["tests"] if test["counts"] and test["mode"] == "sparse"]
    assert len(sparse) == 2 and "supported" not in sparse
    table = pd.read_csv(folder / "tables" / "evaluation_ndcg.csv")
    best = table.loc[table.groupby(["training", "system"])["macro"].idxmax()].sort_values("macro", ascending=False)
    named = list(zip(best["training"], best["system"], best["mode"]))
    assert named[:5] == [
        *(("fine-tuned", f"{system} {form}", "hybrid") for system in ("PromptReps", "DiffRetriever")
          for form in (["multi", "single"])), ("zero-shot", "BM25", "sparse"),
    ]  # fmt: skip
    assert not [test["note"] for claim in claims for test in claim["tests"] if "undertrained" in test["note"]]
    modes = pd.read_csv(folder / "tables" / "training_modes.csv")
    dead = modes[(modes["mode"] == "sparse") & (modes["change"] < 0)]
    assert dead["system"].tolist() == ["DiffRetriever multi"] and dead["repetition"].gt(0).all()
    pairs = pd.read_csv(folder / "tables" / "comparisons.csv").set_index(["better", "than"])["reading"].sort_index()
    single, multi = (f"DiffRetriever {form} (text only)" for form in ("single", "multi"))
    assert pairs[single, "DiffEmbed (text only)"] == "worse"
    assert pairs[multi, single].tolist() == ["better"] * 3
    gains = pd.read_csv(folder / "tables" / "comparisons.csv").set_index(["better", "than", "mode"]).sort_index()
    met = "DiffRetriever multi", "DiffRetriever single"
    before, after = (gains.loc[pair, "difference"] for pair in ((multi, single), met))
    assert len(before) == 3 and (before > after).all()
    ones = pairs["DiffRetriever single, fine-tuned", "PromptReps single, fine-tuned"]
    assert ones.tolist() == ["worse"] * 3
    fifth = {re.search("− ([A-Za-z]+)", test["comparison"])[1]: test["verdict"] for test in claims[4]["tests"]
        if test["counts"]}  # fmt: skip
    assert {name for name, verdict in fifth.items() if verdict == "supported"} == {"DiffEmbed", "RepLLaMA"}


def test_latencies_at_full_size_are_those_of_the_table():
    table = pd.read_csv(CHECKOUT / "results" / "benchmarks" / "full_size.csv")
    ratios = table.pivot_table(index=["part", "system", "vectors"], columns="backbone", values="to_one_vector")
    query, passages = (ratios.loc[f"encoding, {side}"] for side in ("query", "passage"))
    masks, decoded = ("DiffRetriever", 16), ("PromptReps", 20)
    assert query.loc[masks].dropna().between(0.9, 1.1).all() and (query.loc[decoded].dropna() > 10).all()
    assert (passages.loc[masks].dropna() < 1.2).all() and passages.loc[decoded].dropna().between(1.5, 2.5).all()
    assert table["backbone"].nunique() == 4 and table["device"].eq("NVIDIA H200").all()


def test_every_system_is_named():
    kinds = [value for value in vars(systems).values() if isinstance(value, type)]
    own = {kind.__name__ for kind in kinds if kind.__module__ == systems.__name__}
    assert own - {"System", "Retriever"} == set(SYSTEMS)


def test_links_and_paths_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    paths = re.findall(r"`((?:diffret_lib|notebooks|scripts|benchmarks)/[\w./-]+)`", README)
    assert len(links) > 9 and len(paths) > 3
    for path in (*links, *paths):
        assert (CHECKOUT / path).exists(), path
    assert all(f"[`{p.stem}`](notebooks/{p.name})" in README for p in CHECKOUT.glob("notebooks/*.ipynb"))
