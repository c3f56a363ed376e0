"""Encoding speed: DiffRetriever at several K beside the naive way, the machine's matrix products, and the baselines.

    python benchmarks/encode.py --passages 64 --rounds 3

What is measured and how to read the table: ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from diffret_lib.cache import atomic_path
from diffret_lib.config import K_GRID
from diffret_lib.data import load_collection
from diffret_lib.environment import hardware
from diffret_lib.experiments.efficiency import interleaved
from diffret_lib.models.backbones import LoadedBackbone, get_backbone, load_backbone
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.systems import DiffEmbed, DiffRetriever, PromptReps, Retriever

#: Tokens that PromptReps decodes for its multi-vector form.
NEW_TOKENS = 16
#: Smallest cosine at which two ways to compute a vector count as the same, by dtype.
LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99, torch.float16: 0.999}

OURS, NAIVE, BOUND = "DiffRetriever", "naive", "GEMM bound"
SINGLE, MULTI, EMBED = "PromptReps single", "PromptReps multi", "DiffEmbed"
#: (system, k); k is empty for systems without masks.
Row = tuple[str, int | None]


def encode_naively(retriever: DiffRetriever, texts: Sequence[str], batch_size: int) -> Representations:
    """Encode passages as one would write it first; the same result as :meth:`DiffRetriever.encode_passages`.

    Batches of a fixed number of texts, padded, in input order; vocabulary logits of all positions; the content
    words as a mask over the whole vocabulary.
    """
    reader = retriever.reader
    dense, lengths, sparse = [], [], []
    for start in range(0, len(texts), batch_size):
        features = reader.preprocess(list(texts[start : start + batch_size]), task="passage")
        ids, mask = (features[name].to(reader.model.device) for name in ("input_ids", "attention_mask"))
        with torch.inference_mode():
            out = reader.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            first = ids.shape[1] - features["first_mask"] - int(reader.prediction_shift)
            positions = slice(first, first + features["mask_count"])
            hidden, logits = out.hidden_states[-1][:, positions].float(), out.logits[:, positions].float()
            logits[..., reader.mask_id] = -torch.inf
            valid = reader.before_special(logits.argmax(-1))
            allowed = torch.zeros(len(ids), logits.shape[-1])
            for row, content in enumerate(features["content_ids"]):
                allowed[row, content[content >= 0]] = 1
            weights = torch.log1p(torch.relu(logits)) * allowed.to(logits.device)[:, None] * valid[..., None]
            dense.append((F.normalize(hidden, dim=-1) * valid[..., None]).cpu().numpy())
            lengths.append(valid.sum(1).cpu().numpy())
            sparse.append(sp.csr_matrix(weights.amax(1).cpu().numpy()))
    return Representations(np.concatenate(dense), np.concatenate(lengths), sp.vstack(sparse, format="csr"))


def agreement(ours: Representations, naive: Representations) -> tuple[float, float]:
    """Smallest cosine of two vectors of the same text and position, and the largest difference of two weights.

    ValueError when a text has another number of vectors in one than in the other.
    """
    if ours.dense.shape != naive.dense.shape or not np.array_equal(ours.lengths, naive.lengths):
        raise ValueError("the naive way gives another number of vectors than encode_passages: it is not the same work")
    valid = np.arange(ours.dense.shape[1]) < ours.lengths[:, None]
    cosines = np.einsum("nkh,nkh->nk", ours.dense, naive.dense)[valid]
    weights = abs(ours.sparse - naive.sparse)
    return float(cosines.min(initial=1.0)), float(weights.max() if weights.nnz else 0.0)


@dataclass(frozen=True)
class MatrixProducts:
    """Products of all linear layers, head included, that one encoding calls: each layer, and the rows of its input."""

    calls: list[tuple[nn.Linear, int]]

    @classmethod
    def of(cls, model: nn.Module, run: Callable[[], object]) -> MatrixProducts:
        """Run something and note which layers it calls on how many rows."""
        calls: list[tuple[nn.Linear, int]] = []

        def note(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            calls.append((layer, inputs[0].numel() // layer.in_features))

        hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return cls(calls)

    @property
    def flop(self) -> int:
        """Floating point operations: two for each multiply-add."""
        return sum(2 * rows * layer.in_features * layer.out_features for layer, rows in self.calls)

    def inputs(self) -> dict[int, Tensor]:
        """Random inputs by number of features, as long as the longest call needs."""
        rows: dict[int, int] = {}
        for layer, n in self.calls:
            rows[layer.in_features] = max(n, rows.get(layer.in_features, 0))
        weight = self.calls[0][0].weight
        return {width: torch.randn(n, width).to(weight) for width, n in rows.items()}

    def replay(self, inputs: dict[int, Tensor]) -> None:
        """The same products on random inputs, and nothing else."""
        with torch.inference_mode():
            for layer, rows in self.calls:
                F.linear(inputs[layer.in_features][:rows], layer.weight, layer.bias)


def reference(row: Row, ks: Sequence[int]) -> Row:
    """Row that a system's time is divided by."""
    system, k = row
    if system in (NAIVE, BOUND):
        return OURS, k
    if system in (SINGLE, MULTI):
        return SINGLE, None
    return OURS, min(ks)


def summarise(times: dict[Row, list[float]], passages: int, flop: dict[Row, int], ks: Sequence[int]) -> pd.DataFrame:
    """Medians and quartiles over the rounds; a ratio is taken within each round first.

    ``times`` are seconds by system and K, ``flop`` the operations in the matrix products where they were counted.
    Columns system, k, seconds, passages_per_second, time_ratio (this row's seconds over those of the row that
    relative_to names), each with _q1 and _q3, and gflop_per_second (matrix products).
    """
    rows = []
    for row, values in times.items():
        other = reference(row, ks)
        entry = {"system": row[0], "k": row[1]}
        measured = {
            "seconds": np.array(values),
            "passages_per_second": passages / np.array(values),
            "time_ratio": np.array(values) / np.array(times[other]),
        }
        for name, numbers in measured.items():
            q1, median, q3 = np.quantile(numbers, [0.25, 0.5, 0.75])
            entry |= {name: median, f"{name}_q1": q1, f"{name}_q3": q3}
        entry["relative_to"] = other[0] if other[1] is None else f"{other[0]} K={other[1]}"
        entry["gflop_per_second"] = flop[row] / entry["seconds"] / 1e9 if row in flop else np.nan
        rows.append(entry)
    return pd.DataFrame(rows).astype({"k": "Int64"})


def benchmark(
    diffusion: LoadedBackbone, parent: LoadedBackbone, texts: Sequence[str], ks: Sequence[int] = K_GRID,
    rounds: int = 3, naive_batch: int = 16, **options: int,
) -> pd.DataFrame:  # fmt: skip
    """Encode the same passages with every system, in one process.

    Equal texts count once, as an encoding reads them once.  ``ks`` are masks of a passage; the naive way (in batches of
    ``naive_batch`` texts) and the bound are measured at the smallest and at the largest.  ``options`` are
    ``max_passage_tokens`` and ``batch_tokens`` of the retrievers.

    The table of :func:`summarise`, with vectors (mean number of vectors of a passage), min_cosine and
    max_weight_difference (naive rows: from what ``encode_passages`` gives).  ValueError when the naive way does not
    give the same vectors.
    """
    texts, ks = list(dict.fromkeys(texts)), sorted(set(ks))
    ours = {k: DiffRetriever(diffusion, k_passage=k, **options) for k in ks}
    baselines: dict[str, Retriever] = {
        SINGLE: PromptReps(parent, **options),
        MULTI: PromptReps(parent, max_new_tokens=NEW_TOKENS, **options),
        EMBED: DiffEmbed(diffusion, **options),
    }

    # the first run of each is the warm-up, the check of the outputs, and the count of the matrix products
    systems: dict[Row, Callable[[], object]] = {}
    flop: dict[Row, int] = {}
    found: dict[Row, dict[str, float]] = {}

    def first(row: Row, retriever: Retriever) -> tuple[Representations, MatrixProducts]:
        systems[row] = partial(retriever.encode_passages, texts, progress=False)
        result: list[Representations] = []
        products = MatrixProducts.of(retriever.backbone.model, lambda: result.append(systems[row]()))
        flop[row] = products.flop
        found[row] = {"vectors": result[0].lengths.mean()}
        return result[0], products

    for k in tqdm(ks, desc="warm-up: K", unit="system"):
        expected, products = first((OURS, k), ours[k])
        if k in (ks[0], ks[-1]):
            systems[NAIVE, k] = partial(encode_naively, ours[k], texts, naive_batch)
            found[NAIVE, k] = _checked(expected, systems[NAIVE, k](), ours[k].backbone.dtype, k)
            systems[BOUND, k] = partial(products.replay, products.inputs())
            flop[BOUND, k] = products.flop
            systems[BOUND, k]()
    for name, retriever in tqdm(baselines.items(), desc="warm-up: baselines", unit="system"):
        first((name, NEW_TOKENS if name == MULTI else None), retriever)

    table = summarise(interleaved(systems, rounds, diffusion.device, "encoding", warm_up=False), len(texts), flop, ks)
    more = pd.DataFrame([found.get(row, {}) for row in systems])
    more = more.reindex(columns=["vectors", "min_cosine", "max_weight_difference"])
    return pd.concat([table, more], axis=1)


def _checked(ours: Representations, naive: Representations, dtype: torch.dtype, k: int) -> dict[str, float]:
    if dtype != torch.float32 and not np.array_equal(ours.lengths, naive.lengths):
        # in half precision a position may predict a special token in one of the two alone
        same = ours.lengths == naive.lengths
        ours, naive = ours[np.flatnonzero(same)], naive[np.flatnonzero(same)]
    cosine, difference = agreement(ours, naive)
    if not cosine >= LEAST_COSINE[dtype]:
        raise ValueError(f"K={k}: the naive way gives other vectors than encode_passages (cosine {cosine:.6f})")
    return {"vectors": naive.lengths.mean(), "min_cosine": cosine, "max_weight_difference": difference}


def printed(table: pd.DataFrame) -> str:
    """The table for people: median [quartiles]."""

    def spread(name: str, digits: int) -> list[str]:
        values = zip(table[name], table[f"{name}_q1"], table[f"{name}_q3"], strict=True)
        return [f"{m:.{digits}f} [{a:.{digits}f}, {b:.{digits}f}]" for m, a, b in values]

    def optional(name: str, form: str) -> list[str]:
        return ["" if pd.isna(v) else format(v, form) for v in table[name]]

    return pd.DataFrame({
        "system": table["system"], "K or N": optional("k", "d"), "vectors": optional("vectors", ".1f"),
        "passages/s": spread("passages_per_second", 2), "time ratio": spread("time_ratio", 3),
        "to": table["relative_to"], "GFLOP/s": optional("gflop_per_second", ".0f"),
        "min cosine": optional("min_cosine", ".6f"),
    }).to_string(index=False)  # fmt: skip


def machine(backbone: LoadedBackbone) -> dict[str, str | int]:
    """Device, threads, dtype and torch version of the measurement."""
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"]
    dtype = str(backbone.dtype).removeprefix("torch.")
    return {"device": name, "threads": torch.get_num_threads(), "dtype": dtype, "torch": torch.__version__}


def _sample(texts: Sequence[str], number: int, seed: int) -> list[str]:
    unique = list(dict.fromkeys(texts))
    chosen = np.random.default_rng(seed).permutation(len(unique))[:number]
    return [unique[i] for i in chosen]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=_positive, default=64, help="a random sample of this many (default: 64)")
    parser.add_argument("--rounds", type=_positive, default=3, help="after the warm-up (default: 3)")
    parser.add_argument("--collection", default="pydocs/pandas-dev", help="its name, or a BEIR folder")
    parser.add_argument("--k", type=_positive, nargs="+", default=list(K_GRID), help="masks of a passage")
    parser.add_argument("--backbone", default="smollm2-135m-diffusion", help="a diffusion backbone of the registry")
    parser.add_argument("--parent", help="PromptReps' backbone (default: the one that the diffusion backbone adapts)")
    parser.add_argument("--adapter", help="a folder in place of the diffusion backbone's own adapter, or 'none'")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-passage-tokens", type=_positive, default=256)
    parser.add_argument("--batch-tokens", type=_positive, help="padded tokens of a batch (default: the library's)")
    parser.add_argument("--naive-batch", type=_positive, default=16, help="texts of a naive batch (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/encode.csv"))
    options = parser.parse_args(arguments)
    parent = options.parent or get_backbone(options.backbone).source.parent
    if parent is None:
        parser.error(f"{options.backbone} has no parent in the registry: name PromptReps' backbone with --parent")

    texts = _sample(load_collection(options.collection).passages, options.passages, options.seed)
    diffusion = load_backbone(options.backbone, dtype=options.dtype, adapter=options.adapter)
    where = machine(diffusion)
    print(f"{where['device']}, {where['threads']} threads, {where['dtype']}, torch {where['torch']}")
    print(f"{len(texts)} passages of {options.collection}, at most {options.max_passage_tokens} tokens")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        load = os.getloadavg()[0]
        print(f"note: the machine is busy (load {load:.1f}); the times will not mean much", file=sys.stderr)
    limits = {"max_passage_tokens": options.max_passage_tokens}
    if options.batch_tokens is not None:
        limits["batch_tokens"] = options.batch_tokens
    autoregressive = load_backbone(parent, dtype=options.dtype)
    table = benchmark(diffusion, autoregressive, texts, options.k, options.rounds, options.naive_batch, **limits)
    table = table.assign(passages=len(texts), collection=options.collection, rounds=options.rounds, **where)
    with atomic_path(options.output) as path:
        table.to_csv(path, index=False, float_format="%.6g")
    print(f"\n{printed(table)}\n\n{options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
