"""One run of the study: the collections, systems and rankings of a profile; what is computed is kept in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffret_lib.addresses import address
from diffret_lib.cache import atomic_path, fetch, remember
from diffret_lib.config import CHECKOUT, PYDOCS, Profile, ProfileError, Sample, slug
from diffret_lib.data import load_collection
from diffret_lib.data.beir import TRAINING_ROWS, load_training_rows
from diffret_lib.data.collection import Collection
from diffret_lib.data.protocols import metrics_of, published, source
from diffret_lib.experiments.rankings import modes_of, ranking, rankings, streamed_rankings
from diffret_lib.models.backbones import LoadedBackbone, adapter_sha, load_backbone, with_adapter
from diffret_lib.models.prompts import SIDES, Side
from diffret_lib.models.released import RELEASED, released_adapter
from diffret_lib.retrieval.metrics import METRIC, Run, per_query, save_qrels, save_run
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import RANK_MODES, SELECTION_MODE
from diffret_lib.retrieval.systems import BM25, DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, RepLLaMA, Retriever
from diffret_lib.retrieval.workers import encode_shards
from diffret_lib.training import contrastive
from diffret_lib.training.data import TrainingData, published_rows, training_data
from diffret_lib.training.negatives import mine_hard_negatives

#: The fine-tuned systems: class and options (those of DiffRetriever multi are the selected pair).
SYSTEMS: dict[str, tuple[type[Retriever], dict[str, Any]]] = {
    "DiffRetriever single": (DiffRetriever, {"k_query": 1, "k_passage": 1}),
    "DiffRetriever multi": (DiffRetriever, {}),
    "DiffEmbed": (DiffEmbed, {}),
    "PromptReps single": (PromptReps, {"max_vectors": 1}),
    "PromptReps multi": (PromptReps, {"max_vectors": 4, "stop": "never"}),
    "RepLLaMA": (RepLLaMA, {}),
}
#: Systems that are trained with each of the profile's seeds; the others with the first alone.
REPEATED = ("DiffRetriever single", "DiffRetriever multi", "PromptReps single", "RepLLaMA")
#: Added to the name of a system that runs on the backbone before it met the retrieval prompt.
TEXT_ONLY = " (text only)"
Pair = tuple[int, int]
Sides = Mapping[int, Representations]


class CutBM25(BM25):
    """BM25 on the part of each text that ``retriever`` reads."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever

    def fingerprint(self, side: Side) -> str:
        return address([CutBM25], super().fingerprint(side), self.retriever.fingerprint(side))

    def encode(self, texts: Sequence[str], side: Side, **options: bool) -> Representations:
        return super().encode(self.retriever.read_texts(texts, side), side, **options)


@dataclass(frozen=True)
class System:
    """A system of the tables: a zero-shot retriever, and the adapter (a PEFT folder) of a fine-tuned one.

    ``training`` is "zero-shot", "fine-tuned" or "fine-tuned by the authors".
    """

    name: str
    retriever: Any
    training: str = "zero-shot"
    adapter: Path | None = None


@dataclass
class Study:
    """The collections, systems and rankings of a profile; each is loaded or computed once."""

    profile: Profile
    _backbones: dict[str, LoadedBackbone] = field(default_factory=dict, repr=False)
    _collections: dict[tuple[Any, ...], Collection] = field(default_factory=dict, repr=False)
    _passages: dict[str, str] = field(default_factory=dict, repr=False)

    def collection(self, name: str) -> Collection:
        """A collection, in the sample that the profile asks for."""
        p = self.profile
        return self.sampled(name, p.train_sample if name == p.train_collection else p.samples.get(name, p.sample))

    def sampled(self, name: str, size: Sample) -> Collection:
        """A sample of a collection, with the passages that BM25 ranks highest for its queries (``size.hard``)."""
        key = (name, size.queries, size.passages, size.hard)
        if key not in self._collections:
            whole, hard = load_collection(name), None
            if size.hard and size.passages is not None:
                asked = whole if size.queries is None else whole.sample(size.queries, None, seed=self.profile.seed)
                hard = hard_passages(asked, size.hard)
            self._collections[key] = whole.sample(*key[1:3], seed=self.profile.seed, hard=hard)
        return self._collections[key]

    @cached_property
    def test_collections(self) -> list[Collection]:
        """The test collections; ProfileError when two have one name for files (:func:`~diffret_lib.config.slug`)."""
        train, names = self.profile.train_collection, self.profile.test_collections
        found = [self.collection(name) for name in names]
        apart = [] if any(self.same_domain(name, train) for name in names) else [self.train_collection]
        folders = [slug(collection.name) for collection in [*found, *apart]]
        if "" in folders or len(set(folders)) < len(folders):
            raise ProfileError(f"a collection needs a folder name of its own, in letters a-z and digits: {folders}")
        return found

    def grid_collection(self, name: str) -> Collection:
        """The part of a collection on which every pair (Kq, Kp) is tried, and single queries are looked at."""
        size = self.profile.grid_sample
        whole = size is None or name == self.profile.train_collection
        return self.collection(name) if whole else self.sampled(name, size)

    @cached_property
    def grid_collections(self) -> list[Collection]:
        """Those parts of the test collections; the test collections themselves without ``grid_sample``."""
        return [self.grid_collection(name) for name in self.profile.test_collections]

    @property
    def train_collection(self) -> Collection:
        return self.collection(self.profile.train_collection)

    @property
    def development(self) -> Collection:
        """The collection on which stages of the adaptation are compared."""
        size = self.profile.adaptation.zero_shot
        return self.sampled(size.collection, size)

    @property
    def training_development(self) -> Collection:
        """The collection on which learning rates and steps of the fine-tuning are chosen."""
        size = self.profile.training.development
        return self.sampled(size.collection, size)

    @cached_property
    def out_of_domain(self) -> list[str]:
        """Names of the test collections of no package and no passages that pairs are selected or systems trained on."""
        seen, training = {self.profile.train_collection}, self.profile.training
        seen |= {c.collection for c in training.collections if self.fine_tuned}
        released = any(adapter.backbone == self.profile.backbones.diffusion for adapter in RELEASED.values())
        if released or (self.fine_tuned and training.rows == TRAINING_ROWS.hub):
            seen.add("msmarco/train")
        named = zip(self.profile.test_collections, self.test_collections, strict=True)
        return [c.name for name, c in named if not any(self.same_domain(name, train) for train in seen)]

    def same_domain(self, name: str, train: str) -> bool:
        """Whether two collections are of the same package, or have the same passages, or one some of the other's."""
        if name in PYDOCS and train in PYDOCS:
            return name.startswith(train.rsplit("-", 1)[0])
        if published(name) and published(train):
            return source(name) == source(train)
        if {name, train} & {*PYDOCS} and (published(name) or published(train)):
            return False
        for key in {name, train} - self._passages.keys():
            digest = hashlib.sha256()
            for text in load_collection(key).passages:
                digest.update(hashlib.sha256(text.encode()).digest())
            self._passages[key] = digest.hexdigest()
        return self._passages[name] == self._passages[train]

    def backbone(self, role: str) -> LoadedBackbone:
        """The profile's backbone in a role: "diffusion", "autoregressive" or "text_only"."""
        if role not in self._backbones:
            self._backbones[role] = load_backbone(getattr(self.profile.backbones, role), dtype=self.profile.dtype)
        return self._backbones[role]

    def retriever(self, kind: type[Retriever], backbone: LoadedBackbone | None = None, **options: Any) -> Any:
        """A retriever of a class, with the profile's limits, by default on the profile's backbone."""
        limits = self.profile.model_dump(include={"max_query_tokens", "max_passage_tokens", "batch_tokens"})
        return kind(backbone or self.backbone(kind.family), **limits | options)

    def diffretriever(self, k_query: int, k_passage: int, **options: Any) -> DiffRetriever:
        return self.retriever(DiffRetriever, k_query=k_query, k_passage=k_passage, **options)

    def promptreps(self, max_vectors: int = 1, **options: Any) -> PromptReps:
        return self.retriever(PromptReps, max_vectors=max_vectors, **options)

    def systems(self, selected: Pair) -> list[System]:
        """The systems of the zero-shot table; ``selected`` is the pair (Kq, Kp) of DiffRetriever multi."""
        found = [
            System("BM25", BM25()),
            System("BM25, cut text", CutBM25(self.diffretriever(1, 1))),
            System("Mean pooling", self.retriever(MeanPooledAR)),
            System("PromptReps single", self.promptreps()),
            System("PromptReps multi", self.promptreps(self.profile.promptreps_vectors)),
        ]
        for role in ("diffusion", "text_only") if self.profile.backbones.text_only else ("diffusion",):
            backbone, end = self.backbone(role), "" if role == "diffusion" else TEXT_ONLY
            found += [
                System(f"DiffEmbed{end}", self.retriever(DiffEmbed, backbone)),
                System(f"DiffRetriever single{end}", self.diffretriever(1, 1, backbone=backbone)),
                System(f"DiffRetriever multi{end}", self.diffretriever(*selected, backbone=backbone)),
            ]
        return found

    def training_data(self) -> TrainingData:
        """The training collections, with hard negatives of BM25 and zero-shot DiffRetriever (selected pair, hybrid).

        With ``rows`` in the profile they are read instead.
        """
        n, seed, parts = self.profile.training.negatives, self.profile.seed, []
        if (path := self.profile.training.rows) is not None:
            return published_rows(load_training_rows(path), path, n, seed)
        bm25, zero_shot = BM25(), self.diffretriever(*self.selected)
        for size in self.profile.training.collections:
            collection = self.sampled(size.collection, size)

            def mined(collection: Collection = collection) -> dict[str, list[str]]:
                runs = {"BM25": self.runs(bm25, collection)["sparse"]}
                runs["DiffRetriever"] = self.runs(zero_shot, collection, [SELECTION_MODE])[SELECTION_MODE]
                return mine_hard_negatives(collection, runs, n, seed).to_dict("list")

            key = self.address([bm25, zero_shot], collection, SELECTION_MODE, n, seed, code=[mine_hard_negatives])
            parts.append((collection, pd.DataFrame(remember("negatives", key, mined))))
        return training_data(parts)

    @property
    def fine_tuned(self) -> list[str]:
        """Names of the systems that the profile trains."""
        return [n for n in SYSTEMS if self.profile.fine_tuned is None or n in self.profile.fine_tuned]

    def repetitions(self, system: str) -> int:
        """How many seeds a system is trained with."""
        return self.profile.training.seeds if system in REPEATED else 1

    def finetune(self, system: str, repetition: int = 0, **options: Any) -> contrastive.FinetunedSystem:
        """Fine-tune a system of :data:`SYSTEMS`, or load it, from the profile's folder of adapters if it names one.

        ``options`` are those of :func:`~diffret_lib.training.contrastive.finetune_selected`.
        """
        retriever, folder = self.untrained(system), self.profile.training.adapters
        if folder:
            return contrastive.load_published(CHECKOUT / folder, system, retriever, repetition)
        data, development = self.training_data(), self.training_development
        return contrastive.finetune_selected(
            system, retriever, data, self.profile, development, repetition=repetition, **options
        )

    def fine_tuned_systems(self) -> list[System]:
        """The fine-tuned systems of the tables, of the first seed; one that is not trained yet is trained."""
        return [System(n, self.untrained(n), "fine-tuned", self.finetune(n).adapter) for n in self.fine_tuned]

    def released_systems(self) -> list[System]:
        """DiffRetriever with the adapters that the authors released for the profile's diffusion backbone, or none."""
        name, found = self.backbone("diffusion").spec.name, []
        for adapter, about in RELEASED.items():
            if about.backbone == name:
                system = f"DiffRetriever {'single' if about.pair == (1, 1) else 'multi'}"
                retriever, tuned = self.retriever(DiffRetriever, **about.options), released_adapter(adapter)
                found.append(System(system, retriever, "fine-tuned by the authors", tuned))
        return found

    def untrained(self, name: str, pair: Pair | None = None) -> Any:
        """A system of :data:`SYSTEMS` before its training; ``pair`` in place of the selected one."""
        kind, options = SYSTEMS[name]
        if name == "DiffRetriever multi":
            return self.diffretriever(*(pair or self.selected))
        return self.retriever(kind, **options)

    def encode(self, retriever: Any, collection: Collection, side: Side) -> Representations:
        """One side of a collection, from the cache or computed (and then kept)."""
        if isinstance(retriever, Retriever):
            encode_shards(retriever, texts_of(collection, side), side)
        return retriever.encode(texts_of(collection, side), side, cached=True)

    def sides(self, collection: Collection, side: Side) -> Sides:
        """One side of a collection for each number of masks of the grid, from one pass where the profile says so."""
        if self.profile.shared_text_grid:
            shared, texts = self.diffretriever(1, 1, shared_text=True), texts_of(collection, side)
            encode_shards(shared, texts, side, self.profile.k_grid)
            return shared.encode_counts(texts, side, self.profile.k_grid, cached=True)
        return {k: self.encode(self.diffretriever(k, k), collection, side) for k in self.profile.k_grid}

    def address(self, retrievers: Sequence[Any], collection: Collection, *more: Any, code: Sequence[Any] = ()) -> str:
        """Address of what ``code`` computes from retrievers' rankings of a collection."""
        code = [ranking, *code, *([] if self.profile.keep_passages else [streamed_rankings])]
        sides = [retriever.fingerprint(side) for retriever in retrievers for side in SIDES]
        return address(code, sides, collection.fingerprint, collection.coverage, self.profile.top_k, more)

    def runs(self, retriever: Any, collection: Collection, modes: Sequence[str] | None = None) -> dict[str, Run]:
        """Rankings of a retriever on a collection in some modes (by default in each that it has)."""
        modes, top_k = modes or modes_of(retriever), self.profile.top_k
        if self.profile.keep_passages or not isinstance(retriever, Retriever):
            passages, queries = (self.encode(retriever, collection, side) for side in ("passage", "query"))
            return rankings(queries, passages, collection, modes, top_k)
        return streamed_rankings(retriever, collection, self.test_collections, modes, top_k)

    def evaluate(self, system: System, collections: Sequence[Collection], runs: Path | None = None) -> pd.DataFrame:
        """Per-query values of a system on collections, in each of its modes; kept in the cache with the rankings.

        ``runs`` is a folder for rankings and judgements in TREC's format: ``<collection>/qrels.txt`` and
        ``<collection>/<system>.<training>.<mode>.txt``.  ValueError: an id has whitespace, which it cannot hold.
        Columns query_id, metric, value, collection, coverage, mode, system, training, family, backbone (its name,
        "none" for BM25), k_query, k_passage.
        """
        load = cache(lambda: system.retriever.with_adapter(system.adapter) if system.adapter else system.retriever)
        frames = []
        for collection in collections:
            ranked = self._ranked(system, load, collection)
            values = json.loads((ranked / "values.json").read_text(encoding="utf-8"))
            frames += [_long(of_mode, collection).assign(mode=mode) for mode, of_mode in values.items()]
            if runs is None:
                continue
            folder = runs / slug(collection.name)
            save_qrels(collection.qrels, folder / "qrels.txt")
            for mode in values:
                with atomic_path(folder / f"{slug(system.name)}.{slug(system.training)}.{mode}.txt") as temporary:
                    shutil.copyfile(ranked / f"{mode}.txt", temporary)
        retriever, family = system.retriever, getattr(system.retriever, "family", "lexical")
        backbone = "none" if isinstance(retriever, BM25) else retriever.backbone.spec.name
        about = {"system": system.name, "training": system.training, "family": family, "backbone": backbone}
        several = isinstance(retriever, DiffRetriever | PromptReps)
        about |= {f"k_{side}": retriever.vectors(side) if several else None for side in SIDES}
        return pd.concat(frames, ignore_index=True).assign(**about)

    def _ranked(self, system: System, load: Callable[[], Any], collection: Collection) -> Path:
        """The cache's folder of a system's rankings of a collection (``<mode>.txt``) and their ``values.json``."""

        metrics = metrics_of(collection.name)

        def make(folder: Path) -> None:
            values = {}
            for mode, run in self.runs(load(), collection).items():
                found = per_query(collection.qrels, run, metrics)
                # a grade from which a passage counts ("mrr@10-l2") is the collection's own
                values[mode] = {metric.partition("-l")[0]: scores.tolist() for metric, scores in found.items()}
                save_run(run, folder / f"{mode}.txt", tag=slug(f"{system.name} {system.training} {mode}"))
            (folder / "values.json").write_text(json.dumps(values), encoding="utf-8")

        about = system.name, system.training, adapter_sha(system.adapter), modes_of(system.retriever)
        code = [per_query, save_run, with_adapter]
        return fetch("rankings", self.address([system.retriever], collection, about, metrics, code=code), make)

    def grid(self, collection: Collection) -> pd.DataFrame:
        """Per-query nDCG@10 of every pair (Kq, Kp) of the grid in every mode; kept in the cache.

        Columns query_id, metric, value, collection, coverage, k_query, k_passage, mode.
        """
        shared, counts = self.profile.shared_text_grid, self.profile.k_grid
        retrievers = [self.diffretriever(k, k, **{"shared_text": True} if shared else {}) for k in counts]

        def values() -> dict[str, list[Any]]:
            queries, passages = (self.sides(collection, side) for side in SIDES)
            return grid_values(queries, passages, collection, self.profile.top_k).to_dict("list")

        key = self.address(retrievers, collection, code=[grid_values, DiffRetriever])
        return pd.DataFrame(remember("grid", key, values)).assign(collection=collection.name)

    @cached_property
    def train_grid(self) -> pd.DataFrame:
        """The grid on the training collection, from which the pair is selected."""
        return self.grid(self.train_collection)

    @cached_property
    def test_grid(self) -> pd.DataFrame:
        """The grid on every test collection, or the part of it that the profile takes."""
        return pd.concat([self.grid(c) for c in self.grid_collections], ignore_index=True)

    @cached_property
    def selected(self) -> Pair:
        """The pair (Kq, Kp) of DiffRetriever multi, chosen on the training collection alone."""
        return select_pair(self.train_grid)


def texts_of(collection: Collection, side: Side) -> Sequence[str]:
    """The queries or the passages of a collection."""
    return collection.queries if side == "query" else collection.passages


def hard_passages(collection: Collection, count: int) -> dict[str, list[str]]:
    """The passages that BM25 ranks highest for each query, at most ``count``, best first; kept in the cache."""
    bm25 = BM25()

    def found() -> dict[str, list[str]]:
        passages, queries = bm25.encode_passages(collection.passages), bm25.encode_queries(collection.queries)
        return {query: list(row) for query, row in ranking(queries, passages, collection, "sparse", count).items()}

    sides = [bm25.fingerprint(side) for side in SIDES]
    return remember("hard", address([ranking], sides, collection.fingerprint, count), found)


def grid_values(queries: Sides, passages: Sides, collection: Collection, top_k: int) -> pd.DataFrame:
    """Per-query nDCG@10 of every pair (Kq, Kp) of encodings in every mode; columns as of :meth:`Study.grid`."""
    frames = []
    for kq, kp in product(queries, passages):
        for mode, run in rankings(queries[kq], passages[kp], collection, RANK_MODES, top_k).items():
            values = per_query(collection.qrels, run, [METRIC])
            frames.append(_long(values, collection).assign(k_query=kq, k_passage=kp, mode=mode))
    return pd.concat(frames, ignore_index=True)


def _long(values: Mapping[str, Sequence[float]], collection: Collection) -> pd.DataFrame:
    ids = sorted(collection.qrels)
    frames = [pd.DataFrame({"query_id": ids, "metric": m, "value": np.asarray(v)}) for m, v in values.items()]
    return pd.concat(frames, ignore_index=True).assign(collection=collection.name, coverage=collection.coverage)


def select_pair(grid: pd.DataFrame) -> Pair:
    """The best pair (Kq, Kp) with more than one vector on a side, by mean; of equals the cheaper (smaller Kp, Kq)."""
    cells = grid[(grid["mode"] == SELECTION_MODE) & (grid["metric"] == METRIC)]
    cells = cells[(cells["k_query"] > 1) | (cells["k_passage"] > 1)]
    k_passage, k_query = cells.groupby(["k_passage", "k_query"])["value"].mean().round(6).idxmax()
    return int(k_query), int(k_passage)


def macro(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean over collections of the means over queries, for each combination of ``by``."""
    means = frame.groupby([*by, "collection"], dropna=False, sort=False)["value"].mean()
    return means.groupby(level=list(range(len(by))), dropna=False, sort=False).mean().reset_index()
