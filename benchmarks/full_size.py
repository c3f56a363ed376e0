"""Encoding and training at the paper's size: time and memory of backbones of 7 and 8 billion parameters on one GPU.

    python benchmarks/full_size.py --backbones dream-v0-instruct-7b qwen2.5-7b-instruct

Their weights are random, written and loaded as any checkpoint: time and memory do not depend on the values.  What is
measured and how to read the table: ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from diffret_lib.cache import StorageError, atomic_path
from diffret_lib.config import load_profile
from diffret_lib.data import load_collection
from diffret_lib.data.collection import Collection
from diffret_lib.environment import hardware
from diffret_lib.experiments.efficiency import interleaved
from diffret_lib.models.backbones import Backbone, LoadedBackbone, get_backbone, load_backbone
from diffret_lib.retrieval.systems import DiffEmbed, DiffRetriever, PromptReps, RepLLaMA, Retriever
from diffret_lib.training.contrastive import CUDA_MINI_BATCHES, FinetunedSystem, finetune, recipe_of
from diffret_lib.training.data import TrainingData

_QWEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}
#: Model type and shapes of the paper's backbones, those of their ``config.json`` on the hub.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dream-v0-instruct-7b": ("Dream", _QWEN),
    "qwen2.5-7b-instruct": ("qwen2", _QWEN),
    "llada-8b-instruct": ("llada", _LLAMA | {"intermediate_size": 12288, "vocab_size": 126464}),
    "llama-3-8b-instruct": (
        "llama", _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
    ),
}  # fmt: skip
#: The systems of a family, and the numbers of vectors at which each is timed.
WAYS: dict[str, tuple[tuple[type[Retriever], tuple[int, ...]], ...]] = {
    "diffusion": ((DiffRetriever, (1, 4, 16)), (DiffEmbed, (1,))),
    "autoregressive": ((PromptReps, (1, 4, 16, 20)), (RepLLaMA, (1,))),
}
#: Texts of a mini-batch of the training, and vectors of its system.
MINI_BATCHES, VECTORS = (16, 32), 16
#: Queries and hard negatives of a step of the training, and steps (the second and third are timed).
QUERIES, NEGATIVES, STEPS = 4, 15, 4


def random_backbone(
    name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, **shapes: Any
) -> tuple[LoadedBackbone, dict[str, float]]:  # fmt: skip
    """Write a random model of a backbone's shapes (``shapes`` change some), load it, and say how long each took (s)."""
    known, (kind, own) = get_backbone(name), SHAPES[name]
    device, start = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    with torch.device(device):
        config = AutoConfig.for_model(kind, **own | shapes, pad_token_id=None, bos_token_id=None, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    written = time.perf_counter()
    mask = get_backbone("smollm2-135m-diffusion").mask_token if known.family == "diffusion" else None
    source = {"family": known.family, "source": {"path": folder}, "mask_token": mask}
    loaded = load_backbone(Backbone(name=name, **source, prediction_shift=known.prediction_shift), dtype="bfloat16")
    return loaded, {"write": written - start, "load": time.perf_counter() - written}


def retrievers(backbone: LoadedBackbone, **limits: int) -> dict[tuple[str, int], Retriever]:
    """The timed systems by name and number of vectors; PromptReps decodes all of them."""
    out: dict[tuple[str, int], Retriever] = {}
    for kind, counts in WAYS[backbone.spec.family]:
        for k in counts:
            options: dict[str, Any] = {"k_query": k, "k_passage": k} if kind is DiffRetriever else {}
            options |= {"max_vectors": k, "stop": "never"} if kind is PromptReps else {}
            out[kind.name, k] = kind(backbone, **limits, **options)
    return out


def encoding(backbone: LoadedBackbone, collection: Collection, rounds: int, **limits: int) -> Iterator[dict[str, Any]]:
    """A row for each system and number of vectors: all passages of the collection, and one query alone."""
    parameters = backbone.model.num_parameters()
    systems = retrievers(backbone, **limits)
    for side, texts in (("passage", list(collection.passages)), ("query", list(collection.queries)[:1])):
        calls = {key: partial(retriever.encode, texts, side, progress=False) for key, retriever in systems.items()}
        peaks = {key: peak_memory(call) for key, call in calls.items()}
        times = interleaved(calls, rounds, backbone.device, f"{backbone.spec.name}, {side}")
        for (system, k), spent in times.items():
            features = systems[system, k].reader.preprocess(texts, task=side)
            tokens = int(features["attention_mask"].sum()) + len(features.get("left_ids", ()))
            q1, median, q3 = np.quantile(spent, [0.25, 0.5, 0.75])
            yield {
                "part": f"encoding, {side}", "system": system, "vectors": k, "texts": len(texts), "tokens": tokens,
                "seconds": median, "q1": q1, "q3": q3, "tflop_per_second": 2 * parameters * tokens / median / 1e12,
                "to_one_vector": np.median(spent / times[system, 1]), "peak_gb": peaks[system, k],
            }  # fmt: skip


def training(backbone: LoadedBackbone, collection: Collection, **limits: int) -> Iterator[dict[str, Any]]:
    """A row for each size of a mini-batch: seconds of a step of contrastive fine-tuning with 16 vectors."""
    retriever = next(found for (_, vectors), found in retrievers(backbone, **limits).items() if vectors == VECTORS)
    texts, cuda, rows = list(collection.passages), backbone.device.type == "cuda", []
    for i, query in enumerate(collection.queries):
        others = {f"negative_{j}": texts[(i + j) % len(texts)] for j in range(1, NEGATIVES + 1)}
        rows.append({"query": query, "positive": texts[i % len(texts)]} | others)
    data = TrainingData(Dataset.from_list(rows), ["benchmark"], str(len(rows)))
    read = [retriever.reader.preprocess(list(row.values()), task="passage") for row in rows[:QUERIES]]
    tokens = sum(int(features["attention_mask"].sum()) for features in read)
    parameters = backbone.model.num_parameters()
    for size in MINI_BATCHES:
        changes = {"steps": STEPS, "batch_size": QUERIES, "evaluate_every": STEPS, "mask_false_negatives": False}
        changes |= {"mini_batch": max(1, size // CUDA_MINI_BATCHES) if cuda else size}
        recipe = recipe_of(load_profile("paper"), f"{retriever.name} multi", 1e-4).model_copy(update=changes)
        row = {"part": f"training, {size} texts at once", "system": retriever.name, "vectors": VECTORS}
        row |= {"texts": QUERIES * (2 + NEGATIVES), "tokens": tokens}
        done: list[FinetunedSystem] = []
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, DIFFRET_CACHE=cache):
            try:
                train = partial(finetune, retriever.name, retriever, data, recipe, collection)
                row["peak_gb"] = peak_memory(lambda: done.append(train()))
            except StorageError as error:
                yield row | {"note": str(error).partition(": ")[2][:120]}
                continue
        at = {record["step"]: record["seconds"] for record in done[0].curve}
        spent = (at[STEPS - 1] - at[1]) / (STEPS - 2)
        yield row | {"seconds": spent, "tflop_per_second": 2 * parameters * tokens / spent / 1e12}


def peak_memory(call: Callable[[], object]) -> float:
    """Call, and return the GPU memory (GB) that it took at its peak besides what was there; nan without a GPU."""
    if not torch.cuda.is_available():
        call()
        return float("nan")
    gc.collect()  # what an earlier model or call left counts in neither
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--passages", type=int, default=128, help="a random sample of this many (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="after the warm-up (default: 3)")
    parser.add_argument("--collection", default="pydocs/pandas-dev", help="its name, or a BEIR folder")
    parser.add_argument("--tokenizer", help="its folder (default: that of the embedded backbone)")
    parser.add_argument("--max-passage-tokens", type=int, default=192)
    parser.add_argument("--layers", type=int, help="fewer layers, for a try without a GPU")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), help="folder of full_size.csv")
    options = parser.parse_args(arguments)
    whole, rows = load_collection(options.collection), []
    collection = whole.sample(QUERIES * STEPS, options.passages)
    given = options.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(given) if given else load_backbone("smollm2-135m-instruct").tokenizer
    limits = {"max_passage_tokens": options.max_passage_tokens}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware()["cpu"]
    shapes = {"num_hidden_layers": options.layers} if options.layers else {}
    for name in options.backbones:
        with tempfile.TemporaryDirectory() as folder:
            backbone, took = random_backbone(name, Path(folder), tokenizer, **shapes)
        rows += [{"backbone": name, "part": part, "seconds": seconds} for part, seconds in took.items()]
        parts = encoding(backbone, collection, options.rounds, **limits), training(backbone, collection, **limits)
        for part in parts:
            rows += [{"backbone": name} | row for row in part]
            table = pd.DataFrame(rows).assign(device=device, torch=torch.__version__)
            with atomic_path(options.output / "full_size.csv") as path:
                table.to_csv(path, index=False, float_format="%.6g")
        del backbone
    print(table.drop(columns=["device", "torch"]).round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
