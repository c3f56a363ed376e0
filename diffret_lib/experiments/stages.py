"""What each stage of the adaptation adds to retrieval (notebook 00)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from diffret_lib.data import load_collection
from diffret_lib.data.collection import Collection
from diffret_lib.experiments.study import Study, System
from diffret_lib.models.backbones import LoadedBackbone, get_backbone, load_backbone
from diffret_lib.retrieval.metrics import METRIC
from diffret_lib.retrieval.systems import BM25, DiffRetriever
from diffret_lib.training.adaptation import UNADAPTED

#: Numbers of masks of both sides.
COUNTS = (1, 4)
#: Test collections that are no docstrings; text to train on must not repeat them.
APART = ("beir/scifact", "ir/cranfield", "ir/medline", "ir/npl")


def stage_backbones(study: Study) -> dict[str, LoadedBackbone]:
    """Backbones by name: the autoregressive parent with bidirectional attention, then each stage, to the profile's."""
    name, dtype = study.profile.backbones.diffusion, study.profile.dtype
    chain = [name]
    while (above := get_backbone(chain[0]).source.parent) and get_backbone(above).family == "diffusion":
        chain.insert(0, above)
    stages = {stage: load_backbone(stage, dtype=dtype) for stage in chain[:-1]} | {name: study.backbone("diffusion")}
    return {UNADAPTED: load_backbone(chain[0], adapter="none", dtype=dtype)} | stages


def stage_retrieval(study: Study, backbones: Mapping[str, LoadedBackbone], collection: Collection) -> pd.DataFrame:
    """Zero-shot nDCG@10 of DiffRetriever on each of the backbones, beside BM25 and the parent's PromptReps.

    Columns backbone, system, K, and one for each mode.
    """
    systems = [("", "BM25", None, BM25())]
    systems.append((study.profile.backbones.autoregressive, "PromptReps single", 1, study.promptreps()))
    for name, backbone in backbones.items():
        for k in COUNTS:
            retriever = study.retriever(DiffRetriever, backbone, k_query=k, k_passage=k)
            systems.append((name, "DiffRetriever", k, retriever))
    rows = []
    for name, system, k, retriever in systems:
        values = study.evaluate(System(system, retriever), [collection])
        means = values[values["metric"] == METRIC].groupby("mode", sort=False)["value"].mean()
        rows.append({"backbone": name, "system": system, "K": k} | means.to_dict())
    return pd.DataFrame(rows).astype({"K": "Int64"})


def texts_kept_apart() -> list[str]:
    """Passages and queries of :data:`APART`, whole; a FileNotFoundError says how to get one that is not there."""
    return [text for c in map(load_collection, APART) for text in (*c.passages, *c.queries)]


def in_words(losses: pd.DataFrame, retrieval: pd.DataFrame) -> str:
    """The answer of notebook 00 in two sentences, of its two tables."""
    ratio = losses.columns[-1]
    change = " and ".join(
        f"from {rows.iloc[0]:.2f} to {rows.iloc[-1]:.2f} nats on {text}"
        for text, rows in losses.groupby("text", sort=False)[ratio]
    )
    steps = []
    for k, rows in retrieval[retrieval["system"] == "DiffRetriever"].groupby("K"):
        bare, *text, prompt = (f"{value:.3f}" for value in rows["dense"])
        by_text = "".join(f" to {value} by plain text, and" for value in text)
        steps.append(f"from {bare}{by_text} to {prompt} after the prompt (K = {k})")
    return (
        f"The adaptation makes the parent a model that fills masked text: at {ratio} its held-out cross-entropy goes "
        f"{change}. Zero-shot, dense nDCG@10 goes {'; '.join(steps)}."
    )
