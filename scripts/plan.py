"""Say what a run of the notebooks will take, without starting it: ``make plan PROFILE=study``.

The profile is named by the environment variable PROFILE, further collections by COLLECTION.  Nothing is downloaded: of
a collection of the hub that is not on this machine the published sizes are taken, of a backbone its parameters.
Status 1: the profile is not whole (:func:`check`, which every run starts with), or the disk or the memory cannot
suffice.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
from transformers.utils import cached_file

from diffret_lib.cache import StorageError, cache_dir
from diffret_lib.config import CHECKOUT, Profile, ProfileError, Sample, collection_folder, load_profile, rows_file
from diffret_lib.data.beir import TRAINING_ROWS, in_cache
from diffret_lib.data.collection import Collection
from diffret_lib.data.protocols import Published, published
from diffret_lib.experiments.departures import dtype_studies
from diffret_lib.experiments.study import SYSTEMS, Study, texts_of
from diffret_lib.models.backbones import get_backbone
from diffret_lib.models.gguf import BackboneError
from diffret_lib.models.prompts import SIDES, Side
from diffret_lib.models.released import RELEASED
from diffret_lib.retrieval.streaming import SEGMENT_TEXTS
from diffret_lib.retrieval.systems import BM25, CUDA_BATCH, PromptReps, Retriever
from diffret_lib.training.contrastive import CUDA_MINI_BATCHES, published_folder

#: Tokens of prompt, answer and tail besides the text and the vectors, at most.
PROMPT_TOKENS = 128
#: Texts of the calibration on each side.
CALIBRATION_TEXTS = 8
#: Forward passes that a step of the training takes for each of its texts: forth, back, and the cached gradients'.
TRAINING_PASSES = 4
#: Bytes that the program itself takes, and those of a number of a vector as it is kept.
PROGRAM_BYTES, NUMBER_BYTES = 1.5e9, 4
#: Bytes of a passage in a kept ranking (score and index), and of a word in the memory of BM25's index.
RANKED_BYTES, BM25_BYTES = 8, 40
#: Parameters and H of the backbones of the hub, from the shapes in their ``config.json``.
SIZES = {
    "dream-v0-instruct-7b": (7_615_616_512, 3584),
    "qwen2.5-7b-instruct": (7_615_616_512, 3584),
    "llada-8b-instruct": (8_015_581_184, 4096),
    "llada-1.5": (8_015_581_184, 4096),
    "llama-3-8b-instruct": (8_030_261_248, 4096),
}
#: What is assumed of a backbone that cannot be timed here, as ``benchmarks/full_size.py`` measured it on an H200 (the
#: chip of an H100, with more memory): the share of the rate of large products of matrices that an encoding reaches, and
#: the cost of a decoded token of a batch in passes over the prompt.
UTILISATION, DECODED_TOKEN = 0.36, 0.056
#: From there as well: bytes that a token takes on a GPU for each dimension of H, encoded and trained on.
BATCH_BYTES, TRAINED_BYTES = 96, 2400
#: An H100's rate of products in bfloat16 (its data sheet), for comparison.
H100 = 989e12
#: Tokens and bytes of an English word, with the space or mark after it.
WORD_TOKENS, WORD_BYTES = 1.35, 6.0


def check(profile: Profile) -> None:
    """Check a profile as a whole, before the first notebook: a ProfileError with a line for each fault."""
    if faults := [*_backbone_faults(profile), *_collection_faults(profile)]:
        raise ProfileError("\n".join(f"profile {profile.name}: {fault}" for fault in faults))


def _backbone_faults(profile: Profile) -> Iterator[str]:
    p, read = profile, max(profile.max_passage_tokens, profile.max_query_tokens)
    counts = {"diffusion": max(p.k_grid), "text_only": max(p.k_grid), "autoregressive": max(4, p.promptreps_vectors)}
    for role, name in p.backbones:
        if name is None:
            continue
        try:
            spec = get_backbone(name)
        except ValueError as error:
            yield f"backbones.{role}: {error}"
            continue
        family = "autoregressive" if role == "autoregressive" else "diffusion"
        if spec.family != family:
            yield f"backbones.{role}: {name} is of the family {spec.family}, and a {family} one is needed"
        longest = max(read + counts[role], max(p.efficiency.text_tokens) + max(p.efficiency.counts)) + PROMPT_TOKENS
        if longest > spec.max_length:
            yield (
                f"backbones.{role}: text, prompt and vectors take up to {longest} tokens, and {name} takes "
                f"{spec.max_length}: lower the text's tokens, k_grid, promptreps_vectors or efficiency"
            )
    if max(p.k_grid) not in p.efficiency.counts:
        yield f"efficiency.counts: {max(p.k_grid)}, the most masks of k_grid, is missing: claim 4 compares it with 1"


def _collection_faults(profile: Profile) -> Iterator[str]:
    p, study = profile, Outline(profile)
    trained = [size.collection for size in p.training.collections]
    chosen = {"training.development": p.training.development}
    chosen |= {"adaptation.zero_shot": p.adaptation.zero_shot} if p.adaptation else {}
    sizes = [("train_collection", p.train_collection, p.train_sample)]
    sizes += [("test_collections", name, p.samples.get(name, p.sample)) for name in p.test_collections]
    sizes += [("training.collections", size.collection, size) for size in p.training.collections]
    sizes += [(key, size.collection, size) for key, size in chosen.items()]
    found = 0
    for key, name, size in sizes:
        try:
            collection = study.sampled(name, size)
            found += 1
        except (ValueError, OSError) as error:
            yield f"{key}: {name}: {error}"
            continue
        if key == "training.collections" and len(collection.passages) <= p.training.negatives + 1:
            yield f"{key}: {name}: {len(collection.passages)} passages, too few for training.negatives"
    for name in sorted(p.samples.keys() - set(p.test_collections)):
        yield f"samples: {name} is none of the test_collections"
    for name in sorted(set(p.fine_tuned or ()) - set(SYSTEMS)):
        yield f"fine_tuned: there is no system {name!r}; there are {', '.join(SYSTEMS)}"
    if p.training.adapters and not (CHECKOUT / p.training.adapters).is_dir():
        yield f"training.adapters: there is no folder {CHECKOUT / p.training.adapters}"
    elif p.training.adapters:
        runs = [(system, seed) for system in study.fine_tuned for seed in range(study.repetitions(system))]
        folders = {published_folder(CHECKOUT / p.training.adapters, *run) for run in runs}
        for folder in sorted(path for path in folders if not (path / "recipe.json").is_file()):
            yield f"training.adapters: there is no adapter in {folder}; scripts/finetune.py writes it there"
    elif (rows := p.training.rows) not in (None, TRAINING_ROWS.hub) and study.fine_tuned and not rows_file(rows):
        yield f"training.rows: there is no file {rows}"
    if p.train_collection not in trained:
        yield f"training.collections: {p.train_collection}, the train_collection, is not among them"
    for key, size in chosen.items():
        if size.collection in {*p.test_collections, p.train_collection, *trained}:
            yield f"{key}: {size.collection} is also tested or trained on; name a collection that is not"
    if found == len(sizes):
        try:
            if not study.out_of_domain:
                yield "test_collections: all are of what is trained on, and the claims need one that is not"
        except ProfileError as error:
            yield f"test_collections: {error}"


class Facts(NamedTuple):
    """What is known of a backbone that is not on this machine: its parameters, and the dimensions H of a vector."""

    name: str
    parameters: int
    hidden_size: int
    dtype: None = None


class Outlined(NamedTuple):
    """A retriever on such a backbone."""

    kind: type[Retriever]
    backbone: Facts
    options: dict[str, Any]

    def vectors(self, side: Side) -> int:
        return self.options.get(f"k_{side}", self.options.get("max_vectors", 1))


class Sized(NamedTuple):
    """A collection that is not on this machine: as many passages and queries as are published."""

    name: str
    passages: range
    queries: range


class Outline(Study):
    """A study whose backbones and collections are known in outline where they are not on this machine."""

    def sampled(self, name: str, size: Sample) -> Any:
        if (found := elsewhere(name)) is None:
            return super().sampled(name, size)
        wanted = ((found.passages, size.passages), (found.queries, size.queries))
        return Sized(name, *(range(min(n, asked or n)) for n, asked in wanted))

    def same_domain(self, name: str, train: str) -> bool:
        compared = published(name) and published(train) or not (elsewhere(name) or elsewhere(train))
        return bool(compared) and super().same_domain(name, train)

    def backbone(self, role: str) -> Any:
        name = getattr(self.profile.backbones, role)
        return Facts(name, *SIZES[name]) if name in SIZES and not weights_are_here(name) else super().backbone(role)

    def retriever(self, kind: type[Retriever], backbone: Any = None, **options: Any) -> Any:
        backbone = backbone or self.backbone(kind.family)
        outlined = isinstance(backbone, Facts)
        return Outlined(kind, backbone, options) if outlined else super().retriever(kind, backbone, **options)


def elsewhere(name: str) -> Published | None:
    """A published collection that is neither in a folder nor in the cache; None for any other."""
    found = published(name)
    return None if found is None or collection_folder(name) or in_cache(found) else found


def weights_are_here(name: str) -> bool:
    """Whether all files of a backbone's weights are on this machine."""
    source = get_backbone(name).source
    if not source.hub:
        return True

    def here(file: str) -> str | None:
        try:
            return cached_file(source.hub, file, revision=source.revision or "main", local_files_only=True)
        except OSError:
            return None

    index = here("model.safetensors.index.json")
    files = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {"model.safetensors"}
    return all(map(here, files))


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    ``table`` has a row for each part: notebook, part, texts, tokens, gigabytes (of the vectors that are kept), hours.
    The others are in bytes: the disk that is needed and free, the memory, and that of the GPU (infinite where there is
    none), needed and there.  ``notes`` say what is not on this machine, and what is assumed of it.
    """

    table: pd.DataFrame
    disk: float
    disk_free: float
    memory: float
    memory_there: float
    gpu: float
    gpu_there: float
    notes: list[str]

    @property
    def suffices(self) -> bool:
        return self.disk <= self.disk_free and self.memory <= self.memory_there and self.gpu <= self.gpu_there

    def __str__(self) -> str:
        hours = self.table.groupby("notebook")["hours"].sum()
        each = ", ".join(f"{notebook} {value:,.2f}" for notebook, value in hours.items())
        there = "none is here" if self.gpu_there == math.inf else f"{self.gpu_there / 1e9:,.2f} GB there"
        return "\n".join([
            self.table.to_markdown(index=False, floatfmt=",.2f", intfmt=","), "",
            f"Hours with an empty cache, at the rate measured now: {hours.sum():,.1f} ({each}); notebooks 00, 05, 06, "
            "07 and 90 come on top.",
            f"Disk: {self.disk / 1e9:,.2f} GB needed in {cache_dir()}, {self.disk_free / 1e9:,.2f} GB free.",
            f"Memory: {self.memory / 1e9:,.2f} GB needed, {self.memory_there / 1e9:,.2f} GB there.",
            f"GPU memory: {self.gpu / 1e9:,.2f} GB for the backbones and the largest batch, {there}.",
            *self.notes,
        ])  # fmt: skip


def plan(profile: Profile) -> Plan:
    """Measure the rate of every kind of encoding on a few texts, and multiply; nothing is encoded for the run.

    On a backbone that is not on this machine an encoding takes 2 operations for each parameter and token, at
    :data:`UTILISATION` of the rate of products of matrices here.
    """
    study, p, rows = Outline(profile), profile, []
    rates: dict[tuple[Any, ...], list[float]] = {}
    read = {"query": p.max_query_tokens, "passage": p.max_passage_tokens}
    backbones = {name: study.backbone(role) for role, name in p.backbones if name}
    absent = [b for b in backbones.values() if isinstance(b, Facts)]
    speed = products_per_second(p.dtype) if absent else 0.0
    hidden = max(b.hidden_size if isinstance(b, Facts) else b.model.config.hidden_size for b in backbones.values())

    def seconds(retriever: Any, side: Side, tokens: float) -> float:
        """Seconds that a text of so many tokens takes, prompt and vectors included."""
        if isinstance(retriever, Outlined):
            decoded = retriever.vectors(side) - 1 if retriever.kind is PromptReps else 0
            operations = 2 * retriever.backbone.parameters * tokens * (1 + decoded * DECODED_TOKEN)
            return operations / (speed * UTILISATION)
        key = (retriever.name, retriever.backbone.dtype, *map(retriever.vectors, SIDES))
        if key not in rates:
            rates[key] = [_seconds(retriever, study.test_collections[0], side) for side in SIDES]
        return rates[key][SIDES.index(side)] * tokens / (read[side] + PROMPT_TOKENS)

    for notebook, part, retriever, collections, times in _encodings(study):
        total, encoded = np.zeros(4), set()
        for collection, side in product(collections, SIDES):
            n, length = len(texts_of(collection, side)), read[side]
            if found := published(collection.name):
                length = min(length, math.ceil(getattr(found, f"{side}_words") * WORD_TOKENS))
                whole = side == "passage" and n == found.passages
                if whole and found.hub in encoded:  # those of MS MARCO serve several collections
                    continue
                encoded |= {found.hub} if whole else set()
            length += PROMPT_TOKENS
            kept = n * retriever.vectors(side) * hidden * NUMBER_BYTES
            if side == "passage" and not p.keep_passages and notebook != "02":
                # the best passages of each segment, for MaxSim, means and sparse
                kept = math.ceil(n / SEGMENT_TEXTS) * len(collection.queries) * min(n, p.top_k) * 3 * RANKED_BYTES
            total += n, n * length, kept / 1e9, n * seconds(retriever, side, length) / 3600
        rows.append((notebook, part, *(times * total)))
    t = p.training
    lengths = [length + PROMPT_TOKENS for length in (p.max_query_tokens, t.max_passage_tokens)]
    for name in () if t.adapters else study.fine_tuned:
        chosen = len(t.learning_rates) * (t.selection_steps or t.steps) if len(t.learning_rates) > 1 else 0
        queries = (chosen + t.steps * study.repetitions(name)) * t.batch_size
        counts, retriever = (queries, queries * (1 + t.negatives)), study.untrained(name, (max(p.k_grid),) * 2)
        took = sum(n * seconds(retriever, *each) for n, *each in zip(counts, SIDES, lengths, strict=True))
        hours = took * TRAINING_PASSES / 3600
        rows.append(("03", f"training of {name}", sum(counts), np.dot(counts, lengths), 0.0, hours))
    table = pd.DataFrame(rows, columns=["notebook", "part", "texts", "tokens", "gigabytes", "hours"])
    table = table.astype({"texts": int, "tokens": int}).sort_values("notebook", kind="stable", ignore_index=True)
    return Plan(table, *_needs(study, table, backbones, hidden, speed))


def _needs(
    study: Outline, table: pd.DataFrame, backbones: dict[str, Any], hidden: int, speed: float
) -> tuple[float, float, float, float, float, float, list[str]]:
    """The fields of a :class:`Plan` after its table."""
    p, absent, notes = study.profile, [b for b in backbones.values() if isinstance(b, Facts)], []
    names = [name for name in (p.train_collection, *p.test_collections) if elsewhere(name)]
    missing = {published(name).hub: published(name) for name in names}
    texts = sum(found.passages * found.passage_words * WORD_BYTES for found in missing.values())
    fetched = sum(2.0 * b.parameters for b in absent)  # their files are in bfloat16
    if absent:
        each = ", ".join(f"{b.name} ({b.parameters / 1e9:.2f} billion parameters)" for b in absent)
        notes += [
            f"Not on this machine, {fetched / 1e9:,.1f} GB to download: {each}.",
            f"Assumed of them: 2 operations a parameter and token, at {UTILISATION:.0%} of the {speed / 1e12:,.3f} "
            f"TFLOP/s of products of matrices here in {p.dtype}; a decoded token takes {DECODED_TOKEN:.2f} passes.",
            f"At that share of an H100's {H100 / 1e12:.0f} TFLOP/s: {table['hours'].sum() * speed / H100:,.1f} hours.",
        ]  # fmt: skip
    if missing:
        sizes = f"about {texts / 1e9:,.2f} GB of text to download, of the published sizes"
        notes.append(f"Not on this machine, {sizes}: {', '.join(names)}.")
    number = 4 if p.dtype == "float32" else 2
    weighs = [number * b.parameters if isinstance(b, Facts) else _bytes(b.model) for b in backbones.values()]
    weights = sum(weighs)
    loaded = [study.train_collection, *study.grid_collections, *(study.test_collections if p.keep_passages else ())]
    largest = max(len(c.passages) for c in loaded) * sum(p.k_grid) * hidden * NUMBER_BYTES
    known = [(len(c.passages), published(c.name)) for c in study.test_collections]
    largest += max((n * found.passage_words * BM25_BYTES for n, found in known if found), default=0)
    free, there = shutil.disk_usage(cache_dir()).free, psutil.virtual_memory().total
    gpu_there = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else math.inf
    gpu = p.batch_tokens * CUDA_BATCH * hidden * BATCH_BYTES
    if study.fine_tuned and not p.training.adapters:  # on a copy of a backbone
        longest = max(p.max_query_tokens, p.training.max_passage_tokens) + PROMPT_TOKENS
        batch = p.training.mini_batch * CUDA_MINI_BATCHES * longest
        gpu = max(gpu, max(weighs) + batch * hidden * TRAINED_BYTES)
    gpu += weights
    disk = table["gigabytes"].sum() * 1e9 + fetched + texts
    return disk, free, PROGRAM_BYTES + 2 * weights + largest, there, gpu, gpu_there, notes


def _bytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def products_per_second(dtype: str) -> float:
    """Operations a second of products of large matrices, in float32 or bfloat16: the best of five."""
    cuda = torch.cuda.is_available()
    size, best = 8192 if cuda else 1024, math.inf
    number = torch.float32 if dtype == "float32" else torch.bfloat16
    matrix = torch.ones(size, size, dtype=number, device="cuda" if cuda else "cpu")
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _encodings(study: Outline) -> Iterator[tuple[str, str, Any, Sequence[Any], float]]:
    """Everything that a run encodes: notebook, part, retriever, collections, and how often."""
    p, tests, pair = study.profile, study.test_collections, (max(study.profile.k_grid),) * 2
    grids = [study.train_collection, *study.grid_collections]
    sample = [study.sampled(p.train_collection, p.departures)]
    yield "01", "departures: reading and length", study.diffretriever(*pair), sample, 10
    yield "01", "departures: answers", study.promptreps(p.promptreps_vectors), sample, 3
    for dtype, alike in dtype_studies(study).items():
        other = Outline(alike.profile, alike._backbones)
        for system in other.systems(pair):
            if not isinstance(system.retriever, BM25):
                yield "01", f"{system.name}, {dtype}", system.retriever, other.test_collections, 1
    if p.shared_text_grid:
        shared = study.diffretriever(sum(p.k_grid), sum(p.k_grid))  # as many masks as all together
        yield "02", "grid, one pass over a text", shared, grids, 1
    else:
        for k in p.k_grid:
            yield "02", f"grid, K = {k}", study.diffretriever(k, k), grids, 1
    if study.fine_tuned and not p.training.rows:
        pools = [study.sampled(size.collection, size) for size in p.training.collections]
        yield "03", "negatives", study.diffretriever(*pair), pools, 1
    for system in study.systems(pair):
        if not isinstance(system.retriever, BM25):
            yield "04", f"{system.name}, zero-shot", system.retriever, tests, 1
    for name in study.fine_tuned:
        yield "04", f"{name}, fine-tuned", study.untrained(name, pair), tests, 1
    for name, adapter in RELEASED.items():
        if adapter.backbone == p.backbones.diffusion:
            yield "04", f"{name}, fine-tuned by the authors", study.diffretriever(*adapter.pair), tests, 1


def _seconds(retriever: Retriever, collection: Collection, side: Side) -> float:
    """Seconds that a text takes in a batch, the second time."""
    texts = list(texts_of(collection, side)[:])
    texts = texts[:: max(1, len(texts) // CALIBRATION_TEXTS)][:CALIBRATION_TEXTS]
    retriever.encode(texts[:1], side, progress=False)
    start = time.perf_counter()
    retriever.encode(texts, side, progress=False)
    return (time.perf_counter() - start) / len(texts)


def main() -> None:
    os.chdir(CHECKOUT / "notebooks")  # a relative path is what it is in the notebooks
    profile = load_profile(os.environ.get("PROFILE") or "embedded", os.environ.get("COLLECTION"))
    check(profile)
    needed = plan(profile)
    print(f"Profile {profile.name}: {profile.description}.\n\n{needed}")
    if not needed.suffices:
        sys.exit("error: disk or memory cannot suffice: set DIFFRET_CACHE to another disk, or take smaller samples")


if __name__ == "__main__":
    try:
        main()
    except (ProfileError, StorageError, BackboneError) as error:
        sys.exit(f"error: {error}")
