"""Say what a run of the notebooks will take, without starting it: ``make plan PROFILE=study``.

The profile is named by the environment variable PROFILE, further collections by COLLECTION.  Status 1: the profile is
not whole (:func:`check`, which every run starts with), or the disk or the memory cannot suffice.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import psutil

from diffret_lib.cache import StorageError, cache_dir
from diffret_lib.config import Profile, ProfileError, load_profile
from diffret_lib.data.collection import Collection
from diffret_lib.experiments.departures import dtype_studies
from diffret_lib.experiments.study import SYSTEMS, Study, texts_of
from diffret_lib.models.backbones import get_backbone
from diffret_lib.models.gguf import BackboneError
from diffret_lib.models.prompts import SIDES, Side
from diffret_lib.retrieval.systems import Retriever

#: Tokens of prompt, answer and tail besides the text and the vectors, at most.
PROMPT_TOKENS = 128
#: Texts of the calibration on each side.
CALIBRATION_TEXTS = 8
#: Forward passes that a step of the training takes for each of its texts: forth, back, and the cached gradients'.
TRAINING_PASSES = 4
#: Bytes that the program itself takes.
PROGRAM_BYTES = 1.5e9


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
    p, study = profile, Study(profile)
    trained = [size.collection for size in p.training.collections]
    chosen = {"adaptation.zero_shot": p.adaptation.zero_shot, "training.development": p.training.development}
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


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    ``table`` has a row for each part: notebook, part, texts, tokens, gigabytes (of the vectors that are kept), hours.
    The others are in bytes: the disk that is needed and free, the memory that is needed and there.
    """

    table: pd.DataFrame
    disk: float
    disk_free: float
    memory: float
    memory_there: float

    @property
    def suffices(self) -> bool:
        return self.disk <= self.disk_free and self.memory <= self.memory_there

    def __str__(self) -> str:
        hours = self.table.groupby("notebook")["hours"].sum()
        each = ", ".join(f"{notebook} {value:.2f}" for notebook, value in hours.items())
        return "\n".join([
            self.table.to_markdown(index=False, floatfmt=",.2f", intfmt=","), "",
            f"Hours with an empty cache, at the rate measured now: {hours.sum():.1f} ({each}); notebooks 00, 05, 06, "
            "07 and 90 come on top.",
            f"Disk: {self.disk / 1e9:.2f} GB needed in {cache_dir()}, {self.disk_free / 1e9:.2f} GB free.",
            f"Memory: {self.memory / 1e9:.2f} GB needed, {self.memory_there / 1e9:.2f} GB there.",
        ])  # fmt: skip


def plan(profile: Profile) -> Plan:
    """Measure the rate of every kind of encoding on a few texts, and multiply; nothing is encoded for the run."""
    study, p, rows = Study(profile), profile, []
    rates: dict[tuple[Any, ...], tuple[float, float]] = {}
    read = {"query": p.max_query_tokens, "passage": p.max_passage_tokens}
    hidden = study.backbone("diffusion").model.config.hidden_size

    def rate(retriever: Retriever) -> tuple[float, float]:
        key = (retriever.name, retriever.backbone.dtype, *map(retriever.vectors, SIDES))
        if key not in rates:
            rates[key] = tuple(_seconds(retriever, study.test_collections[0], side) for side in SIDES)
        return rates[key]

    for notebook, part, retriever, collections, times in _encodings(study):
        counts = [sum(len(texts_of(c, side)) for c in collections) for side in SIDES]
        tokens = sum(n * (read[side] + PROMPT_TOKENS) for n, side in zip(counts, SIDES, strict=True))
        vectors = sum(n * retriever.vectors(side) for n, side in zip(counts, SIDES, strict=True))
        seconds = sum(n * each for n, each in zip(counts, rate(retriever), strict=True))
        gigabytes = vectors * hidden * 4 / 1e9
        rows.append((notebook, part, times * sum(counts), times * tokens, times * gigabytes, times * seconds / 3600))
    t = p.training
    lengths = [length + PROMPT_TOKENS for length in (p.max_query_tokens, t.max_passage_tokens)]
    for name in () if t.adapters else study.fine_tuned:
        chosen = len(t.learning_rates) * (t.selection_steps or t.steps) if len(t.learning_rates) > 1 else 0
        queries = (chosen + t.steps * study.repetitions(name)) * t.batch_size
        passages = queries * (1 + t.negatives)
        of_query, of_passage = rate(study.untrained(name, (max(p.k_grid),) * 2))
        of_passage *= lengths[1] / (p.max_passage_tokens + PROMPT_TOKENS)
        seconds = (queries * of_query + passages * of_passage) * TRAINING_PASSES
        tokens = queries * lengths[0] + passages * lengths[1]
        rows.append(("03", f"training of {name}", queries + passages, tokens, 0.0, seconds / 3600))
    table = pd.DataFrame(rows, columns=["notebook", "part", "texts", "tokens", "gigabytes", "hours"])
    table = table.sort_values("notebook", kind="stable", ignore_index=True)
    models = [study.backbone(role).model for role, name in p.backbones if name]
    weights = sum(w.numel() * w.element_size() for model in models for w in model.parameters())
    largest = max(len(c.passages) for c in study.test_collections) * sum(p.k_grid) * hidden * 4
    free, there = shutil.disk_usage(cache_dir()).free, psutil.virtual_memory().total
    return Plan(table, table["gigabytes"].sum() * 1e9, free, PROGRAM_BYTES + 2 * weights + largest, there)


def _encodings(study: Study) -> Iterator[tuple[str, str, Retriever, Sequence[Collection], float]]:
    """Everything that a run encodes: notebook, part, retriever, collections, and how often."""
    p, tests, pair = study.profile, study.test_collections, (max(study.profile.k_grid),) * 2
    sample = [study.sampled(p.train_collection, p.departures)]
    yield "01", "departures: reading and length", study.diffretriever(*pair), sample, 10
    yield "01", "departures: answers", study.promptreps(p.promptreps_vectors), sample, 3
    for dtype, other in dtype_studies(study).items():
        for system in other.systems(pair):
            if isinstance(system.retriever, Retriever):
                yield "01", f"{system.name}, {dtype}", system.retriever, other.test_collections, 1
    if p.shared_text_grid:
        shared = study.diffretriever(sum(p.k_grid), sum(p.k_grid))  # as many masks as all together
        yield "02", "grid, one pass over a text", shared, [study.train_collection, *tests], 1
    else:
        for k in p.k_grid:
            yield "02", f"grid, K = {k}", study.diffretriever(k, k), [study.train_collection, *tests], 1
    pools = [study.sampled(size.collection, size) for size in p.training.collections if study.fine_tuned]
    yield "03", "negatives", study.diffretriever(*pair), pools, 1
    for system in study.systems(pair):
        if isinstance(system.retriever, Retriever):
            yield "04", f"{system.name}, zero-shot", system.retriever, tests, 1
    for name in study.fine_tuned:
        yield "04", f"{name}, fine-tuned", study.untrained(name, pair), tests, study.repetitions(name)


def _seconds(retriever: Retriever, collection: Collection, side: Side) -> float:
    """Seconds that a text takes in a batch, the second time."""
    texts = list(texts_of(collection, side)[:])
    texts = texts[:: max(1, len(texts) // CALIBRATION_TEXTS)][:CALIBRATION_TEXTS]
    retriever.encode(texts[:1], side, progress=False)
    start = time.perf_counter()
    retriever.encode(texts, side, progress=False)
    return (time.perf_counter() - start) / len(texts)


def main() -> None:
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
