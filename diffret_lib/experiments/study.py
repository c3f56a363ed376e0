"""One run of the study: the collections, systems and rankings of a profile; what is computed is kept in the cache."""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from diffret_lib.addresses import address
from diffret_lib.cache import atomic_path, fetch, remember
from diffret_lib.config import PYDOCS, Profile, ProfileError, Sample, slug
from diffret_lib.data import load_collection
from diffret_lib.data.collection import Collection
from diffret_lib.models.backbones import LoadedBackbone, adapter_sha, load_backbone, with_adapter
from diffret_lib.models.prompts import SIDES, Side
from diffret_lib.retrieval.metrics import METRIC, Run, per_query, save_qrels, save_run
from diffret_lib.retrieval.representations import Representations
from diffret_lib.retrieval.search import MODES, SELECTION_MODE, rank, to_results
from diffret_lib.retrieval.systems import BM25, DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, RepLLaMA, Retriever
from diffret_lib.training.contrastive import FinetunedSystem, TrainingData, finetune, recipe_of, training_data
from diffret_lib.training.negatives import mine_hard_negatives

#: The fine-tuned systems: class and options (those of DiffRetriever multi are the selected pair).
SYSTEMS: dict[str, tuple[type[Retriever], dict[str, int]]] = {
    "DiffRetriever single": (DiffRetriever, {"k_query": 1, "k_passage": 1}),
    "DiffRetriever multi": (DiffRetriever, {}),
    "DiffEmbed": (DiffEmbed, {}),
    "PromptReps single": (PromptReps, {"max_new_tokens": 0}),
    "PromptReps multi": (PromptReps, {"max_new_tokens": 4}),
    "RepLLaMA": (RepLLaMA, {}),
}
Pair = tuple[int, int]
Sides = Mapping[int, Representations]


@dataclass(frozen=True)
class System:
    """A system of the tables: a zero-shot retriever, and the adapter (a PEFT folder) of a fine-tuned one."""

    name: str
    retriever: Any
    training: Literal["zero-shot", "fine-tuned"] = "zero-shot"
    adapter: Path | None = None


@dataclass
class Study:
    """The collections, systems and rankings of a profile; each is loaded or computed once."""

    profile: Profile
    _backbones: dict[str, LoadedBackbone] = field(default_factory=dict, repr=False)
    _collections: dict[tuple[Any, ...], Collection] = field(default_factory=dict, repr=False)

    def collection(self, name: str) -> Collection:
        """A collection, in the sample that the profile asks for."""
        train = name == self.profile.train_collection
        return self._sampled(name, self.profile.train_sample if train else self.profile.sample)

    def _sampled(self, name: str, size: Sample) -> Collection:
        key = (name, size.queries, size.passages)
        if key not in self._collections:
            self._collections[key] = load_collection(name).sample(*key[1:], seed=self.profile.seed)
        return self._collections[key]

    @cached_property
    def test_collections(self) -> list[Collection]:
        """The test collections; ProfileError when two have one name for files (:func:`~diffret_lib.config.slug`)."""
        train, names = self.profile.train_collection, self.profile.test_collections
        found = [self.collection(name) for name in names]
        apart = [] if any(_same_domain(name, train) for name in names) else [self.train_collection]
        folders = [slug(collection.name) for collection in [*found, *apart]]
        if "" in folders or len(set(folders)) < len(folders):
            raise ProfileError(f"a collection needs a folder name of its own, in letters a-z and digits: {folders}")
        return found

    @property
    def train_collection(self) -> Collection:
        return self.collection(self.profile.train_collection)

    @property
    def development(self) -> Collection:
        """The collection on which stages of the adaptation are compared."""
        size = self.profile.adaptation.zero_shot
        return self._sampled(size.collection, size)

    @cached_property
    def out_of_domain(self) -> list[str]:
        """Names of the test collections of another package or other passages than the training collection."""
        named = zip(self.profile.test_collections, self.test_collections, strict=True)
        return [c.name for name, c in named if not _same_domain(name, self.profile.train_collection)]

    def backbone(self, family: str) -> LoadedBackbone:
        """The profile's backbone of a family ("diffusion" or "autoregressive")."""
        if family not in self._backbones:
            self._backbones[family] = load_backbone(getattr(self.profile.backbones, family), dtype=self.profile.dtype)
        return self._backbones[family]

    def retriever(self, kind: type[Retriever], backbone: LoadedBackbone | None = None, **options: Any) -> Any:
        """A retriever of a class, with the profile's limits, by default on the profile's backbone."""
        limits = self.profile.model_dump(include={"max_query_tokens", "max_passage_tokens", "batch_tokens"})
        return kind(backbone or self.backbone(kind.family), **limits | options)

    def diffretriever(self, k_query: int, k_passage: int, **options: Any) -> DiffRetriever:
        return self.retriever(DiffRetriever, k_query=k_query, k_passage=k_passage, **options)

    def promptreps(self, max_new_tokens: int = 0, **options: Any) -> PromptReps:
        return self.retriever(PromptReps, max_new_tokens=max_new_tokens, **options)

    def systems(self, selected: Pair) -> list[System]:
        """The systems of the zero-shot table; ``selected`` is the pair (Kq, Kp) of DiffRetriever multi."""
        n = self.profile.promptreps_max_tokens
        return [
            System("BM25", BM25()),
            System("Mean pooling", self.retriever(MeanPooledAR)),
            System("PromptReps single", self.promptreps()),
            System(f"PromptReps multi (N={n})", self.promptreps(n)),
            System("DiffEmbed", self.retriever(DiffEmbed)),
            System("DiffRetriever single", self.diffretriever(1, 1)),
            System("DiffRetriever multi", self.diffretriever(*selected)),
        ]

    def training_data(self) -> TrainingData:
        """The training sample, with hard negatives of BM25 and of zero-shot DiffRetriever (selected pair, hybrid)."""
        collection = self._sampled(self.profile.train_collection, self.profile.training.sample)
        n, seed = self.profile.training.negatives, self.profile.seed
        bm25, zero_shot = BM25(), self.diffretriever(*self.selected)

        def mined() -> dict[str, list[str]]:
            runs = {"BM25": self.runs(bm25, collection)["sparse"]}
            runs["DiffRetriever"] = self.runs(zero_shot, collection, [SELECTION_MODE])[SELECTION_MODE]
            return mine_hard_negatives(collection, runs, n, seed).to_dict("list")

        key = self.address([bm25, zero_shot], collection, SELECTION_MODE, n, seed, code=[mine_hard_negatives])
        return training_data(collection, pd.DataFrame(remember("negatives", key, mined)))

    def finetune(self, system: str, **options: Any) -> FinetunedSystem:
        """Fine-tune a system of :data:`SYSTEMS`, or load it; ``options`` as of contrastive.finetune."""
        recipe, size = recipe_of(self.profile), self.profile.training.development
        data, development = self.training_data(), self._sampled(size.collection, size)
        limits = {"max_passage_tokens": recipe.max_passage_tokens}
        return finetune(system, self._untrained(system), data, recipe, development, training_limits=limits, **options)

    def fine_tuned_systems(self) -> list[System]:
        """The fine-tuned systems of the tables; one that is not trained yet is trained."""
        return [System(n, self._untrained(n), "fine-tuned", self.finetune(n).adapter) for n in SYSTEMS]

    def _untrained(self, name: str) -> Any:
        kind, options = SYSTEMS[name]
        return self.diffretriever(*self.selected) if name == "DiffRetriever multi" else self.retriever(kind, **options)

    def encode(self, retriever: Any, collection: Collection, side: Side) -> Representations:
        """One side of a collection, from the cache or computed (and then kept)."""
        texts = collection.queries if side == "query" else collection.passages
        return retriever.encode(texts, side, cached=True)

    def address(self, retrievers: Sequence[Any], collection: Collection, *more: Any, code: Sequence[Any] = ()) -> str:
        """Address of what ``code`` computes from retrievers' rankings of a collection."""
        sides = [retriever.fingerprint(side) for retriever in retrievers for side in SIDES]
        return address([ranking, *code], sides, collection.fingerprint, collection.coverage, self.profile.top_k, more)

    def runs(self, retriever: Any, collection: Collection, modes: Sequence[str] | None = None) -> dict[str, Run]:
        """Rankings of a retriever on a collection in some modes (by default in each that it has)."""
        passages, queries = (self.encode(retriever, collection, side) for side in ("passage", "query"))
        modes, top_k = modes or retriever.modes, self.profile.top_k
        return {mode: ranking(queries, passages, collection, mode, top_k) for mode in modes}

    def evaluate(self, system: System, collections: Sequence[Collection], runs: Path | None = None) -> pd.DataFrame:
        """Per-query values of a system on collections, in each of its modes; kept in the cache with the rankings.

        ``runs`` is a folder for rankings and judgements in TREC's format: ``<collection>/qrels.txt`` and
        ``<collection>/<system>.<training>.<mode>.txt``.  ValueError: an id has whitespace, which it cannot hold.
        Columns query_id, metric, value, collection, coverage, mode, system, training, family, k_query, k_passage.
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
                with atomic_path(folder / f"{slug(system.name)}.{system.training}.{mode}.txt") as temporary:
                    shutil.copyfile(ranked / f"{mode}.txt", temporary)
        retriever, family = system.retriever, getattr(system.retriever, "family", "lexical")
        about = {"system": system.name, "training": system.training, "family": family}
        several = isinstance(retriever, DiffRetriever | PromptReps)
        about |= {f"k_{side}": retriever.vectors(side) if several else None for side in SIDES}
        return pd.concat(frames, ignore_index=True).assign(**about)

    def _ranked(self, system: System, load: Callable[[], Any], collection: Collection) -> Path:
        """The cache's folder of a system's rankings of a collection (``<mode>.txt``) and their ``values.json``."""

        def make(folder: Path) -> None:
            values = {}
            for mode, run in self.runs(load(), collection).items():
                values[mode] = {metric: scores.tolist() for metric, scores in per_query(collection.qrels, run).items()}
                save_run(run, folder / f"{mode}.txt", tag=slug(f"{system.name} {system.training} {mode}"))
            (folder / "values.json").write_text(json.dumps(values), encoding="utf-8")

        about = system.name, system.training, adapter_sha(system.adapter), system.retriever.modes
        code = [per_query, save_run, with_adapter]
        return fetch("rankings", self.address([system.retriever], collection, about, code=code), make)

    def grid(self, collection: Collection) -> pd.DataFrame:
        """Per-query nDCG@10 of every pair (Kq, Kp) of the grid in every mode; kept in the cache.

        Columns query_id, metric, value, collection, coverage, k_query, k_passage, mode.
        """
        retrievers = {k: self.diffretriever(k, k) for k in self.profile.k_grid}

        def values() -> dict[str, list[Any]]:
            sides = ({k: self.encode(r, collection, side) for k, r in retrievers.items()} for side in SIDES)
            return grid_values(*sides, collection, self.profile.top_k).to_dict("list")

        key = self.address(list(retrievers.values()), collection, code=[grid_values])
        return pd.DataFrame(remember("grid", key, values)).assign(collection=collection.name)

    @cached_property
    def train_grid(self) -> pd.DataFrame:
        """The grid on the training collection, from which the pair is selected."""
        return self.grid(self.train_collection)

    @cached_property
    def test_grid(self) -> pd.DataFrame:
        """The grid on every test collection."""
        return pd.concat([self.grid(c) for c in self.test_collections], ignore_index=True)

    @cached_property
    def selected(self) -> Pair:
        """The pair (Kq, Kp) of DiffRetriever multi, chosen on the training collection alone."""
        return select_pair(self.train_grid)


def ranking(queries: Representations, passages: Representations, collection: Collection, mode: str, top_k: int) -> Run:
    """The ranking of a collection's encoded passages for its encoded queries: query id to passage id to score."""
    scores, indices = rank(queries, passages, mode, top_k)
    return to_results(scores, indices, collection.query_ids, collection.passage_ids)


def grid_values(queries: Sides, passages: Sides, collection: Collection, top_k: int) -> pd.DataFrame:
    """Per-query nDCG@10 of every pair (Kq, Kp) of encodings in every mode; columns as of :meth:`Study.grid`."""
    frames = []
    for kq, kp, mode in product(queries, passages, MODES):
        values = per_query(collection.qrels, ranking(queries[kq], passages[kp], collection, mode, top_k), [METRIC])
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


def _same_domain(name: str, train: str) -> bool:
    """Whether two collections are of the same package, or have the same passages."""
    if name in PYDOCS and train in PYDOCS:
        return name.startswith(train.rsplit("-", 1)[0])
    one, other = load_collection(name).passages, load_collection(train).passages
    return len(one) == len(other) and all(map(operator.eq, one, other))
