"""One run of the study: the collections, systems and rankings of a profile.

This is the only module that knows a profile.  Encodings, rankings and values are entries of the cache, under addresses
that cover backbone, settings, texts and code: notebooks share them, and a second run computes nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from diffret_lib.addresses import address
from diffret_lib.cache import atomic_path, fetch, remember
from diffret_lib.config import CHECKOUT, PYDOCS, Profile, ProfileError, Sample, slug
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

#: The fine-tuned systems.
SYSTEMS = (
    "DiffRetriever single", "DiffRetriever multi", "DiffEmbed", "PromptReps single", "PromptReps multi", "RepLLaMA",
)  # fmt: skip
#: Tokens that PromptReps multi decodes, in training and after it.
FINETUNED_TOKENS = 4

Pair = tuple[int, int]


@dataclass(frozen=True)
class System:
    """A system of the tables: a zero-shot retriever, and the adapter (a PEFT folder) of a fine-tuned one.

    :meth:`Study.evaluate` merges the adapter, and only when the ranking is not in the cache.
    """

    name: str
    family: str
    retriever: Any
    k_query: int | None = None
    k_passage: int | None = None
    training: Literal["zero-shot", "fine-tuned"] = "zero-shot"
    adapter: Path | None = None


@dataclass
class Study:
    """The collections, systems and rankings of a profile; each is loaded or computed once.

    Parameters
    ----------
    profile : Profile
    """

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
            whole = load_collection(name)
            self._collections[key] = whole.sample(size.queries, size.passages, seed=self.profile.seed)
        return self._collections[key]

    @cached_property
    def test_collections(self) -> list[Collection]:
        """The test collections; ProfileError when two have one name for files (:func:`~diffret_lib.config.slug`)."""
        train, found = self.profile.train_collection, {n: self.collection(n) for n in self.profile.test_collections}
        short = {name: _folder_name(collection) for name, collection in found.items()}
        if not any(_same_domain(name, train) for name in short):
            short[train] = _folder_name(self.train_collection)
        for name, folder in short.items():
            if not folder or list(short.values()).count(folder) > 1:
                raise ProfileError(f"{name}: needs a folder name of its own, in letters a-z and digits; rename it")
        return list(found.values())

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
        """Names of the test collections of another package or folder than the training collection."""
        train, names = self.profile.train_collection, self.profile.test_collections
        tested = zip(names, self.test_collections, strict=True)
        return [collection.name for name, collection in tested if not _same_domain(name, train)]

    def backbone(self, family: str) -> LoadedBackbone:
        """The profile's backbone of a family ("diffusion" or "autoregressive")."""
        if family not in self._backbones:
            name = getattr(self.profile.backbones, family)
            self._backbones[family] = load_backbone(name, dtype=self.profile.dtype)
        return self._backbones[family]

    @property
    def limits(self) -> dict[str, int]:
        """Truncation and batching, as every retriever takes them."""
        names = "max_query_tokens", "max_passage_tokens", "batch_tokens"
        return {name: getattr(self.profile, name) for name in names}

    def retriever(self, kind: type[Retriever], **options: Any) -> Any:
        """A retriever of a class, on the profile's backbone and with its limits."""
        return kind(self.backbone(kind.family), **self.limits | options)

    def diffretriever(self, k_query: int, k_passage: int, **options: Any) -> DiffRetriever:
        return self.retriever(DiffRetriever, k_query=k_query, k_passage=k_passage, **options)

    def promptreps(self, max_new_tokens: int = 0, **options: Any) -> PromptReps:
        return self.retriever(PromptReps, max_new_tokens=max_new_tokens, **options)

    def systems(self, selected: Pair) -> list[System]:
        """The systems of the zero-shot table; ``selected`` is the pair (Kq, Kp) of DiffRetriever multi."""
        n = self.profile.promptreps_max_tokens
        return [
            System("BM25", "lexical", BM25()),
            self._system("Mean pooling", MeanPooledAR),
            self._system("PromptReps single", PromptReps, max_new_tokens=0),
            self._system(f"PromptReps multi (N={n})", PromptReps, max_new_tokens=n),
            self._system("DiffEmbed", DiffEmbed),
            self._system("DiffRetriever single", DiffRetriever, k_query=1, k_passage=1),
            self._system("DiffRetriever multi", DiffRetriever, k_query=selected[0], k_passage=selected[1]),
        ]

    def _system(self, name: str, kind: type[Retriever], **options: int) -> System:
        vectors = options
        if "max_new_tokens" in options:
            vectors = dict.fromkeys(("k_query", "k_passage"), 1 + options["max_new_tokens"])
        return System(name, kind.family, self.retriever(kind, **options), **vectors)

    def hard_negatives(self, collection: Collection) -> pd.DataFrame:
        """Hard negatives from BM25 and from zero-shot DiffRetriever (hybrid) at the selected pair; kept in the cache.

        Columns query_id, passage_id, source ("BM25", "DiffRetriever" or "random").
        """
        n, seed = self.profile.training.negatives, self.profile.seed
        bm25, zero_shot = BM25(), self.diffretriever(*self.selected)

        def mined() -> dict[str, list[str]]:
            runs = {
                "BM25": self.runs(bm25, collection, ["sparse"])["sparse"],
                "DiffRetriever": self.runs(zero_shot, collection, [SELECTION_MODE])[SELECTION_MODE],
            }
            return mine_hard_negatives(collection, runs, n, seed).to_dict("list")

        key = self.address([bm25, zero_shot], collection, SELECTION_MODE, n, seed, code=[mine_hard_negatives])
        return pd.DataFrame(remember("negatives", key, mined))

    def training_data(self) -> TrainingData:
        """The training collection, in the sample of the profile's training, with hard negatives mined in it."""
        collection = self._sampled(self.profile.train_collection, self.profile.training.sample)
        return training_data(collection, self.hard_negatives(collection))

    def finetune(self, system: str, **options: Any) -> FinetunedSystem:
        """Fine-tune a system of :data:`SYSTEMS`, or load it; ``options`` as of contrastive.finetune."""
        recipe, size = recipe_of(self.profile), self.profile.training.development
        limits = {"max_passage_tokens": recipe.max_passage_tokens}
        return finetune(
            system, self._untrained(system).retriever, self.training_data(), recipe,
            self._sampled(size.collection, size), training_limits=limits, **options,
        )  # fmt: skip

    def fine_tuned_systems(self) -> list[System]:
        """The fine-tuned systems of the tables; one that is not trained yet is trained."""
        return [
            replace(self._untrained(name), training="fine-tuned", adapter=self.finetune(name).adapter)
            for name in SYSTEMS
        ]

    def _untrained(self, name: str) -> System:
        kq, kp = self.selected
        kinds = dict(zip(SYSTEMS, (
            (DiffRetriever, {"k_query": 1, "k_passage": 1}), (DiffRetriever, {"k_query": kq, "k_passage": kp}),
            (DiffEmbed, {}),
            (PromptReps, {"max_new_tokens": 0}), (PromptReps, {"max_new_tokens": FINETUNED_TOKENS}),
            (RepLLaMA, {}),
        ), strict=True))  # fmt: skip
        if name not in kinds:
            raise ValueError(f"there is no system {name!r}; there are {', '.join(SYSTEMS)}")
        kind, options = kinds[name]
        return self._system(name, kind, **options)

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
        passages = self.encode(retriever, collection, "passage")
        queries, top_k = self.encode(retriever, collection, "query"), self.profile.top_k
        return {mode: ranking(queries, passages, collection, mode, top_k) for mode in modes or retriever.modes}

    def evaluate(self, system: System, collections: Sequence[Collection], runs: Path | None = None) -> pd.DataFrame:
        """Per-query values of a system on collections, in each of its modes; kept in the cache with the rankings.

        ``runs`` is a folder for rankings and judgements in TREC's format: ``<collection>/qrels.txt`` and
        ``<collection>/<system>.<training>.<mode>.txt``.  ValueError: an id has whitespace, which TREC's format cannot
        hold.  Columns query_id, metric, value, collection, coverage, mode, system, training, family, k_query and
        k_passage.
        """
        load = cache(lambda: system.retriever.with_adapter(system.adapter) if system.adapter else system.retriever)
        frames = []
        for collection in collections:
            ranked = self._ranked(system, load, collection)
            values = json.loads((ranked / "values.json").read_text(encoding="utf-8"))
            frames += [_long(of_mode, collection).assign(mode=mode) for mode, of_mode in values.items()]
            if runs is None:
                continue
            folder = runs / _folder_name(collection)
            save_qrels(collection.qrels, folder / "qrels.txt")
            for mode in values:
                with atomic_path(folder / f"{slug(system.name)}.{system.training}.{mode}.txt") as temporary:
                    shutil.copyfile(ranked / f"{mode}.txt", temporary)
        names = {name: getattr(system, name) for name in ("training", "family", "k_query", "k_passage")}
        return pd.concat(frames, ignore_index=True).assign(system=system.name, **names)

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

    def grid(self, collection: Collection, metrics: Sequence[str] = (METRIC,)) -> pd.DataFrame:
        """Per-query values of every pair (Kq, Kp) of the grid in every mode; kept in the cache.

        Each count is encoded once for queries and once for passages; a pair only searches.
        Columns query_id, metric, value, collection, coverage, k_query, k_passage, mode.
        """
        retrievers = {k: self.diffretriever(k, k) for k in self.profile.k_grid}

        def values() -> dict[str, list[Any]]:
            passages = {k: self.encode(r, collection, "passage") for k, r in retrievers.items()}
            queries = {k: self.encode(r, collection, "query") for k, r in retrievers.items()}
            return grid_values(queries, passages, collection, self.profile.top_k, metrics).to_dict("list")

        key = self.address(list(retrievers.values()), collection, list(metrics), code=[grid_values])
        names = {"collection": collection.name, "coverage": collection.coverage}
        return pd.DataFrame(remember("grid", key, values)).assign(**names)

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


def ranking(
    queries: Representations, passages: Representations, collection: Collection, mode: str, top_k: int
) -> Run:
    """The ranking of a collection's encoded passages for its encoded queries: query id to passage id to score."""
    scores, indices = rank(queries, passages, mode, top_k)
    return to_results(scores, indices, collection.query_ids, collection.passage_ids)


Sides = Mapping[int, Representations]


def grid_values(
    queries: Sides, passages: Sides, collection: Collection, top_k: int, metrics: Sequence[str]
) -> pd.DataFrame:
    """Per-query values of every pair (Kq, Kp) of encodings in every mode; columns as of :meth:`Study.grid`."""
    frames = []
    for kq, kp, mode in product(queries, passages, MODES):
        values = per_query(collection.qrels, ranking(queries[kq], passages[kp], collection, mode, top_k), metrics)
        frames.append(_long(values, collection).assign(k_query=kq, k_passage=kp, mode=mode))
    return pd.concat(frames, ignore_index=True)


def _long(values: Mapping[str, Sequence[float]], collection: Collection) -> pd.DataFrame:
    ids = sorted(collection.qrels)
    frames = [pd.DataFrame({"query_id": ids, "metric": m, "value": np.asarray(v)}) for m, v in values.items()]
    return pd.concat(frames, ignore_index=True).assign(collection=collection.name, coverage=collection.coverage)


def select_pair(grid: pd.DataFrame, mode: str = SELECTION_MODE, metric: str = METRIC) -> Pair:
    """The best pair (Kq, Kp) with more than one vector on a side, by mean; of equals the cheaper (smaller Kp, Kq)."""
    cells = grid[(grid["mode"] == mode) & (grid["metric"] == metric)]
    cells = cells[(cells["k_query"] > 1) | (cells["k_passage"] > 1)]
    means = cells.groupby(["k_passage", "k_query"])["value"].mean().round(6)
    k_passage, k_query = means.idxmax()
    return int(k_query), int(k_passage)


def macro(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean over collections of the means over queries, for each combination of ``by``."""
    means = frame.groupby([*by, "collection"], dropna=False, sort=False)["value"].mean()
    return means.groupby(level=list(range(len(by))), dropna=False, sort=False).mean().reset_index()


def _folder_name(collection: Collection) -> str:
    return slug(collection.name.removeprefix("pydocs/"))


def _same_domain(name: str, train: str) -> bool:
    """Whether two collections are of the same package, in the same folder, or the same in content."""
    if name in PYDOCS and train in PYDOCS:
        return name.startswith(train.rsplit("-", 1)[0])
    folders = {_resolved(name), _resolved(train)}
    return len(folders) == 1 or load_collection(name).fingerprint == load_collection(train).fingerprint


def _resolved(name: str) -> Path:
    """The folder of a BEIR collection, whatever its split."""
    places = [base / text for base in (Path.cwd(), CHECKOUT) for text in (name, name.rpartition(":")[0]) if text]
    return next((place.resolve() for place in places if place.is_dir()), Path(name))
