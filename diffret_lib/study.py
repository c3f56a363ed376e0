"""One run of the study: what a profile says, turned into encodings, runs and tables.

Encodings, rankings and their values are kept in a content-addressed cache.  An encoding's address covers the
backbone's weights, the reader's settings (prompt side, K, truncation) and the texts, so that notebooks share them, a
second run computes nothing, and a change of any of these computes anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from diffret_lib import scoring
from diffret_lib.backbones import LoadedBackbone, adapter_sha, load_backbone
from diffret_lib.cache import atomic_path, cache_dir, fingerprint, remembered
from diffret_lib.collection import Collection, load_collection
from diffret_lib.evaluation import METRICS, per_query, save_qrels, save_run
from diffret_lib.profiles import Profile
from diffret_lib.prompts import Task
from diffret_lib.representations import Representations
from diffret_lib.retrievers import BM25, DiffEmbed, DiffRetriever, MeanPooledAR, PromptReps, Retriever

#: The metric by which counts are selected and systems compared.
METRIC = "ndcg@10"
#: The mode in which the pair of counts is selected.
SELECTION_MODE = "hybrid"
MODES = ("dense", "sparse", "hybrid")
TASKS: tuple[Task, ...] = ("query", "document")
#: Part of the addresses in the cache of rankings and their values: raise it when the same encodings would give
#: others.
EVALUATION_VERSION = 1


@dataclass(frozen=True)
class System:
    """A system of the tables: a name, a retriever for it, its counts, and how it was trained for retrieval.

    The retriever stands without the ``adapter`` (a PEFT folder) of a fine-tuned system: by itself it is the zero-shot
    one.  :meth:`Study.evaluate` merges the adapter, and only when the ranking is not in the cache.
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
    """Loads what a profile names, once, and runs retrievers on it.

    Parameters
    ----------
    profile : Profile
    """

    profile: Profile
    _backbones: dict[str, LoadedBackbone] = field(default_factory=dict, repr=False)
    _collections: dict[str, Collection] = field(default_factory=dict, repr=False)

    def backbone(self, family: str) -> LoadedBackbone:
        """The profile's backbone of a family ("diffusion" or "autoregressive")."""
        if family not in self._backbones:
            name = getattr(self.profile.backbones, family)
            self._backbones[family] = load_backbone(name, dtype=self.profile.dtype)
        return self._backbones[family]

    @property
    def limits(self) -> dict[str, int]:
        """Truncation and batching, as every retriever takes them."""
        p = self.profile
        return {
            "max_query_tokens": p.max_query_tokens,
            "max_passage_tokens": p.max_passage_tokens,
            "batch_tokens": p.batch_tokens,
        }

    def collection(self, name: str) -> Collection:
        """A collection, in the sample that the profile asks for."""
        if name not in self._collections:
            p = self.profile
            size = p.train_sample if name == p.train_collection else p.sample
            whole = load_collection(name)
            self._collections[name] = whole.sample(size.queries, size.passages, seed=p.seed)
        return self._collections[name]

    @cached_property
    def test_collections(self) -> list[Collection]:
        return [self.collection(name) for name in self.profile.test_collections]

    @property
    def train_collection(self) -> Collection:
        return self.collection(self.profile.train_collection)

    @cached_property
    def development(self) -> Collection:
        """The collection on which stages of the adaptation are compared."""
        size = self.profile.adaptation.zero_shot
        return load_collection(size.collection).sample(size.queries, size.passages, seed=self.profile.seed)

    @property
    def out_of_domain(self) -> list[str]:
        """Names of the test collections of other packages than the training collection's."""
        domain = self.profile.train_collection.rsplit("-", 1)[0]
        return [c.name for c in self.test_collections if not c.name.startswith(domain)]

    # -- retrievers ------------------------------------------------------------------------------------

    def diffretriever(self, k_query: int, k_passage: int, **options: Any) -> DiffRetriever:
        return DiffRetriever(
            self.backbone("diffusion"), k_query=k_query, k_passage=k_passage, **self.limits, **options
        )

    def promptreps(self, max_new_tokens: int = 0) -> PromptReps:
        return PromptReps(self.backbone("autoregressive"), max_new_tokens=max_new_tokens, **self.limits)

    def systems(self, selected: tuple[int, int]) -> list[System]:
        """The systems of the zero-shot table; ``selected`` is the pair (Kq, Kp) of DiffRetriever multi."""
        n = self.profile.promptreps_max_tokens
        return [
            System("BM25", "lexical", BM25()),
            System("Mean pooling", "autoregressive", MeanPooledAR(self.backbone("autoregressive"), **self.limits)),
            System("PromptReps single", "autoregressive", self.promptreps(), 1, 1),
            System(f"PromptReps multi (N={n})", "autoregressive", self.promptreps(n), 1 + n, 1 + n),
            System("DiffEmbed", "diffusion", DiffEmbed(self.backbone("diffusion"), **self.limits)),
            System("DiffRetriever single", "diffusion", self.diffretriever(1, 1), 1, 1),
            System("DiffRetriever multi", "diffusion", self.diffretriever(*selected), *selected),
        ]

    # -- encodings -------------------------------------------------------------------------------------

    def encode(self, retriever: Any, collection: Collection, task: Task) -> Representations:
        """One side of a collection, from the cache or computed (and then kept)."""
        texts = collection.queries if task == "query" else collection.passages
        encode = retriever.encode_queries if task == "query" else retriever.encode_passages
        if not isinstance(retriever, Retriever):
            return encode(texts)
        key = fingerprint(retriever.fingerprint(task), texts)
        return encode(texts, output=cache_dir() / "encodings" / key[:2] / key)

    def address(self, retrievers: Sequence[Any], collection: Collection, *more: Any) -> str:
        """The address in the cache of what is computed from retrievers' rankings of a collection."""
        sides = [retriever.fingerprint(task) for retriever in retrievers for task in TASKS]
        return fingerprint(
            EVALUATION_VERSION, sides, collection.fingerprint, collection.coverage, self.profile.top_k, more
        )

    def runs(
        self, retriever: Any, collection: Collection, modes: Sequence[str] | None = None
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Rankings of a retriever on a collection: mode (each that it has) to query id to passage id to score."""
        passages = self.encode(retriever, collection, "document")
        queries = self.encode(retriever, collection, "query")
        return {mode: self.run(queries, passages, collection, mode) for mode in modes or retriever.modes}

    def run(
        self, queries: Representations, passages: Representations, collection: Collection, mode: str
    ) -> dict[str, dict[str, float]]:
        """The ranking of a collection's encoded passages for its encoded queries, to the profile's depth."""
        scores, indices = scoring.rank(queries, passages, mode, self.profile.top_k)
        return scoring.to_results(scores, indices, collection.query_ids, collection.passage_ids)

    def evaluate(
        self, system: System, collections: Sequence[Collection], runs: Path | None = None
    ) -> pd.DataFrame:
        """Per-query values of a system on collections, in each of its modes; kept in the cache with the rankings.

        Parameters
        ----------
        system : System
        collections : sequence of Collection
        runs : Path, optional
            A folder for the rankings and judgements in TREC's format: ``<collection>/qrels.txt`` and
            ``<collection>/<system>.<training>.<mode>.txt``.

        Returns
        -------
        DataFrame
            Columns query_id, metric, value, collection, coverage, mode, training, system, family, k_query,
            k_passage.

        Raises
        ------
        ValueError
            For an id with whitespace, which TREC's format cannot hold.
        """
        load = cache(lambda: system.retriever.with_adapter(system.adapter) if system.adapter else system.retriever)
        frames = []
        for collection in collections:
            ranked = self._ranked(system, load, collection)
            values = json.loads((ranked / "values.json").read_text(encoding="utf-8"))
            frames += [_long(of_mode, collection).assign(mode=mode) for mode, of_mode in values.items()]
            if runs is None:
                continue
            folder = runs / slug(collection.name.removeprefix("pydocs/"))
            save_qrels(collection.qrels, folder / "qrels.txt")
            for mode in values:
                with atomic_path(folder / f"{slug(system.name)}.{system.training}.{mode}.txt") as temporary:
                    shutil.copyfile(ranked / f"{mode}.txt", temporary)
        names = {name: getattr(system, name) for name in ("training", "family", "k_query", "k_passage")}
        return pd.concat(frames, ignore_index=True).assign(system=system.name, **names)

    def _ranked(self, system: System, load: Callable[[], Any], collection: Collection) -> Path:
        """The cache's folder of a system's rankings of a collection (``<mode>.txt``) and their ``values.json``."""
        about = system.name, system.training, adapter_sha(system.adapter), system.retriever.modes, METRICS
        key = self.address([system.retriever], collection, about)
        folder = cache_dir() / "rankings" / key
        if folder.exists():
            return folder
        values = {}
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for mode, run in self.runs(load(), collection).items():
                scores = per_query(collection.qrels, run, METRICS)
                values[mode] = {metric: of_queries.tolist() for metric, of_queries in scores.items()}
                save_run(run, temporary / f"{mode}.txt", tag=slug(f"{system.name} {system.training} {mode}"))
            (temporary / "values.json").write_text(json.dumps(values), encoding="utf-8")
        return folder

    # -- the grid --------------------------------------------------------------------------------------

    def grid(self, collection: Collection, metrics: Sequence[str] = (METRIC,)) -> pd.DataFrame:
        """Per-query values of every pair (Kq, Kp) of the grid in every mode; kept in the cache.

        Each count is encoded once for queries and once for passages; a pair only searches.

        Returns
        -------
        DataFrame
            Columns collection, coverage, query_id, k_query, k_passage, mode, metric, value.
        """
        sides = {k: self.diffretriever(k, k) for k in self.profile.k_grid}
        key = self.address(list(sides.values()), collection, list(metrics))
        values = remembered("grid", key, lambda: self._grid(collection, sides, metrics).to_dict("list"))
        return pd.DataFrame(values).assign(collection=collection.name, coverage=collection.coverage)

    def _grid(
        self, collection: Collection, sides: Mapping[int, DiffRetriever], metrics: Sequence[str]
    ) -> pd.DataFrame:
        passages = {k: self.encode(r, collection, "document") for k, r in sides.items()}
        queries = {k: self.encode(r, collection, "query") for k, r in sides.items()}
        frames = []
        for kq, kp, mode in self._cells():
            run = self.run(queries[kq], passages[kp], collection, mode)
            values = _long(per_query(collection.qrels, run, metrics), collection)
            frames.append(values.assign(k_query=kq, k_passage=kp, mode=mode))
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def train_grid(self) -> pd.DataFrame:
        """The grid on the training collection, from which the pair is selected."""
        return self.grid(self.train_collection)

    @cached_property
    def test_grid(self) -> pd.DataFrame:
        """The grid on every test collection."""
        return pd.concat([self.grid(c) for c in self.test_collections], ignore_index=True)

    @cached_property
    def selected(self) -> tuple[int, int]:
        """The pair (Kq, Kp) of DiffRetriever multi, chosen on the training collection alone."""
        return select_pair(self.train_grid)

    def _cells(self) -> Iterator[tuple[int, int, str]]:
        for kq in self.profile.k_grid:
            for kp in self.profile.k_grid:
                for mode in MODES:
                    yield kq, kp, mode


def _long(values: dict[str, np.ndarray], collection: Collection) -> pd.DataFrame:
    ids = sorted(collection.qrels)
    frames = [
        pd.DataFrame({"query_id": ids, "metric": metric, "value": np.asarray(scores)})
        for metric, scores in values.items()
    ]
    return pd.concat(frames, ignore_index=True).assign(collection=collection.name, coverage=collection.coverage)


def slug(name: str) -> str:
    """A name for files: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", Path(name).name.lower()).strip("-")


def select_pair(grid: pd.DataFrame, mode: str = SELECTION_MODE, metric: str = METRIC) -> tuple[int, int]:
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
