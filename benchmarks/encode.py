"""Encoding speed: DiffRetriever beside the plain Hugging Face way, the machine's matrix products, and every K at once.

    python benchmarks/encode.py --passages 32 --rounds 3

What is measured and how to read the tables: ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffret_lib.cache import atomic_path
from diffret_lib.config import K_GRID
from diffret_lib.data import load_collection
from diffret_lib.environment import hardware
from diffret_lib.experiments.efficiency import interleaved
from diffret_lib.models.backbones import LoadedBackbone, compiled, fast_dtype, load_backbone
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.systems import DiffRetriever

#: Smallest cosine at which the plain way's vectors count as the same, by dtype.
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.98}
OURS, PLAIN, BOUND, SHARED = "DiffRetriever", "plain", "matrix products", "all K at once"
COMPILED = "DiffRetriever, compiled"
#: Dtype, what is timed, K (0: every K).
Row = tuple[str, str, int]


@torch.inference_mode()
def encode_plainly(retriever: DiffRetriever, texts: Sequence[str], batch_size: int) -> list[np.ndarray]:
    """Encode passages as one would write it first with transformers; the normalised vectors of each text.

    Batches of a fixed number of texts, padded, in input order; hidden states of all layers, and vocabulary logits of
    all positions; the content words as a mask over the whole vocabulary.
    """
    reader, vectors = retriever.reader, []
    for start in range(0, len(texts), batch_size):
        features = reader.preprocess(list(texts[start : start + batch_size]), task="passage")
        ids, mask = features["input_ids"].to(reader.model.device), features["attention_mask"].to(reader.model.device)
        out = reader.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        ((k, after),) = features["first_mask"].items()
        first = ids.shape[1] - after - int(reader.prediction_shift)
        hidden, logits = out.hidden_states[-1][:, first : first + k].float(), out.logits[:, first : first + k].float()
        logits[..., reader.mask_id] = -torch.inf
        valid = reader.before_special(logits.argmax(-1))
        allowed = torch.zeros(len(ids), logits.shape[-1])
        for row, content in enumerate(features["content_ids"]):
            allowed[row, content[content >= 0]] = 1
        (torch.log1p(torch.relu(logits)) * allowed.to(logits.device)[:, None] * valid[..., None]).amax(1).cpu()
        vectors += [own[there].cpu().numpy() for own, there in zip(F.normalize(hidden, dim=-1), valid, strict=True)]
    return vectors


def least_cosine(ours: Representations, plain: list[np.ndarray]) -> float:
    """Smallest cosine of two vectors of the same text and position, of texts with as many in both."""
    both = [(own[:n], other) for own, n, other in zip(ours.dense, ours.lengths, plain, strict=True)]
    pairs = [(own, other) for own, other in both if len(own) == len(other)]
    if len(pairs) < 0.9 * len(plain):
        raise ValueError("the plain way gives another number of vectors than encode_passages: it is not the same work")
    return min(float((own * other).sum(1).min()) for own, other in pairs)


def matrix_products(model: nn.Module, run: Callable[[], object]) -> tuple[int, Callable[[], None]]:
    """Operations in the linear layers, head included, that ``run`` calls; and a function that does these products only.

    An operation is a multiplication or an addition.  The products are those of the very sizes, with the model's
    weights, on random inputs.
    """
    calls: list[tuple[nn.Linear, int]] = []

    def note(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        calls.append((layer, inputs[0].numel() // layer.in_features))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    run()
    for hook in hooks:
        hook.remove()
    longest: dict[int, int] = {}
    for layer, rows in calls:
        longest[layer.in_features] = max(rows, longest.get(layer.in_features, 0))
    inputs = {width: torch.randn(rows, width).to(calls[0][0].weight) for width, rows in longest.items()}

    @torch.inference_mode()
    def replay() -> None:
        for layer, rows in calls:
            F.linear(inputs[layer.in_features][:rows], layer.weight, layer.bias)

    return sum(2 * rows * layer.in_features * layer.out_features for layer, rows in calls), replay


def benchmark(
    backbones: Sequence[LoadedBackbone], texts: Sequence[str], ks: Sequence[int], rounds: int, plain_batch: int = 16,
    **options: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Encode the same passages in every way, one after another in each round, every other round backwards.

    ``backbones`` are one model in one or two dtypes, ``options`` those of the retrievers.  Returns the times (dtype,
    system, k, seconds and its quartiles q1 and q3, passages_per_second, gflop_per_second in matrix products) and the
    ratios (what, aim, ratio, q1, q3), each taken within a round first.  ValueError: the plain way gives other vectors.
    """
    texts, ks = list(dict.fromkeys(texts)), sorted(set(ks))
    calls: dict[Row, Callable[[], object]] = {}
    operations: dict[Row, int] = {}
    middle = ks[len(ks) // 2]
    for backbone in backbones:
        dtype = str(backbone.dtype).removeprefix("torch.")
        for k in ks:
            retriever = DiffRetriever(backbone, k_passage=k, **options)
            calls[dtype, OURS, k] = partial(retriever.encode_passages, texts, progress=False)
            if k == middle:
                plain = calls[dtype, PLAIN, k] = partial(encode_plainly, retriever, texts, plain_batch)
                count, calls[dtype, BOUND, k] = matrix_products(backbone.model, calls[dtype, OURS, k])
                faster = retriever.on(compiled(backbone))
                calls[dtype, COMPILED, k] = partial(faster.encode_passages, texts, progress=False)
                operations |= {(dtype, way, k): count for way in (BOUND, OURS, COMPILED)}
                others = plain()
                for way in (OURS, COMPILED):
                    if not (cosine := least_cosine(calls[dtype, way, k](), others)) >= LEAST_COSINE[dtype]:
                        raise ValueError(f"{dtype}, {way}: the plain way gives other vectors: cosine {cosine:.6f}")
        shared = DiffRetriever(backbone, shared_text=True, **options)
        calls[dtype, SHARED, 0] = partial(shared.encode_counts, texts, "passage", ks, progress=False)
    times = interleaved(calls, rounds, backbones[0].device, "encoding")
    return _times(times, len(texts), operations), ratios(times, ks)


def _times(times: dict[Row, np.ndarray], passages: int, operations: dict[Row, int]) -> pd.DataFrame:
    rows = []
    for (dtype, system, k), values in times.items():
        q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
        row = {"dtype": dtype, "system": system, "k": k or "all", "seconds": median, "q1": q1, "q3": q3}
        rate = operations.get((dtype, system, k), np.nan) / median / 1e9
        rows.append(row | {"passages_per_second": passages / median, "gflop_per_second": rate})
    return pd.DataFrame(rows)


def ratios(times: dict[Row, np.ndarray], ks: Sequence[int]) -> pd.DataFrame:
    """What the times of :func:`benchmark` (seconds by round) show, beside what is aimed at."""
    dtypes, (least, middle, most) = list(dict.fromkeys(row[0] for row in times)), (ks[0], ks[len(ks) // 2], ks[-1])
    ways, lines = {"ours": OURS, "ours compiled": COMPILED}, []

    def line(what: str, aim: str, above: np.ndarray, below: np.ndarray) -> None:
        q1, median, q3 = np.quantile(np.asarray(above) / below, [0.25, 0.5, 0.75])
        lines.append({"what": what, "aim": aim, "ratio": median, "q1": q1, "q3": q3})

    for dtype in dtypes:
        for other in dtypes[: dtypes.index(dtype) + 1]:
            aim = {("float32", "float32"): 2, ("bfloat16", "float32"): 6, ("bfloat16", "bfloat16"): 2.5}[dtype, other]
            plain = times[other, PLAIN, middle]
            for ours, way in ways.items():
                line(f"plain {other} / {ours} {dtype}, K={middle}", f">= {aim}", plain, times[dtype, way, middle])
        share, bound = {"float32": 0.85, "bfloat16": 0.45}[dtype], times[dtype, BOUND, middle]
        for ours, way in ways.items():
            line(f"matrix products / {ours}, {dtype}", f">= {share}", bound, times[dtype, way, middle])
        one_by_one = sum(times[dtype, OURS, k] for k in ks)
        line(f"all K at once / one by one, {dtype}", "<= 0.4", times[dtype, SHARED, 0], one_by_one)
        line(f"K={most} / K={least}, {dtype}", "<= 1.05", times[dtype, OURS, most], times[dtype, OURS, least])
    return pd.DataFrame(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=32, help="a random sample of this many (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="after the warm-up (default: 3)")
    parser.add_argument("--collection", default="pydocs/pandas-dev", help="its name, or a BEIR folder")
    parser.add_argument("--k", type=int, nargs="+", default=list(K_GRID), help="masks of a passage")
    parser.add_argument("--backbone", default="smollm2-135m-diffusion", help="a diffusion backbone of the registry")
    parser.add_argument("--dtypes", nargs="+", choices=list(LEAST_COSINE), help="default: float32, then the fast one")
    parser.add_argument("--max-passage-tokens", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), help="folder of the two CSV files")
    options = parser.parse_args(arguments)
    texts = sorted(set(load_collection(options.collection).passages))
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[: options.passages]]
    dtypes = options.dtypes or list(dict.fromkeys(["float32", fast_dtype()]))
    backbones = [load_backbone(options.backbone, dtype=dtype) for dtype in dtypes]
    device, load = backbones[0].device, psutil.getloadavg()[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"]
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; load before: {load:.1f}")
    print(f"{len(texts)} passages of {options.collection}, at most {options.max_passage_tokens} tokens")
    tables = benchmark(backbones, texts, options.k, options.rounds, max_passage_tokens=options.max_passage_tokens)
    for file, table in zip(("encode_times", "encode_ratios"), tables, strict=True):
        table = table.assign(device=name, threads=torch.get_num_threads(), torch=torch.__version__, load=load)
        with atomic_path(options.output / f"{file}.csv") as path:
            table.to_csv(path, index=False, float_format="%.6g")
        print("\n" + table.drop(columns=["device", "threads", "torch", "load"]).round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
