"""The published collections (``collections.yaml``): where they come from, and how each is evaluated."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from diffret_lib.data.collection import Collection

TABLE = Path(__file__).with_name("collections.yaml")
Count = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Repository(_Entry):
    """A repository of the hub; the revision is a commit, None for the newest."""

    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str | None, Field(pattern="^[0-9a-f]{40}$")]

    def __str__(self) -> str:
        return f"{self.hub}, {f'revision {self.revision[:7]}' if self.revision else 'newest (not pinned)'}"


class Download(_Entry):
    """A file of the web and its MD5."""

    url: str
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]

    def __str__(self) -> str:
        return self.url


class Published(Repository):
    """A published collection; the fields are those of ``collections.yaml``."""

    judgements: Repository | Download | None = None
    split: str
    files: list[str] = []
    topics: Download | None = None
    metric: Literal["ndcg@10", "mrr@10"]
    relevant_from: Count
    excluded: Literal["the query itself", "nothing"]
    passage: str
    passages: Count
    queries: Count
    passage_words: Count
    query_words: Count
    licence: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is computed, as :func:`~diffret_lib.retrieval.metrics.per_query` takes it; :attr:`metric` stands first.

        MRR and recall count passages of :attr:`relevant_from` or more, nDCG all grades.
        """
        level = f"-l{self.relevant_from}" if self.relevant_from > 1 else ""
        return tuple(sorted(("ndcg@10", f"mrr@10{level}", f"recall@100{level}"), key=lambda m: m != self.metric))


@cache
def read_published(path: Path = TABLE) -> dict[str, Published]:
    """The table by name; a ValueError of pydantic names what is wrong in it."""
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Published.model_validate(row) for name, row in rows.items() if not name.startswith(".")}


def published(name: str) -> Published | None:
    """The published collection of this name (with or without ``:split``), or None."""
    return read_published().get(name.partition(":")[0])


def source(name: str) -> str:
    """The collection of BEIR of which a published one has passages, all or (NanoBEIR) some."""
    kind, _, short = name.partition(":")[0].partition("/")
    return "msmarco" if kind == "msmarco" else {"fiqa2018": "fiqa", "quoraretrieval": "quora"}.get(short, short)


def metrics_of(name: str) -> tuple[str, ...]:
    """Metrics of a collection, its own first: nDCG@10, MRR@10 and recall@100 for one that is not in the table."""
    found = published(name)
    return found.metrics if found else ("ndcg@10", "mrr@10", "recall@100")


def protocol(collection: Collection) -> dict[str, Any]:
    """How a collection is evaluated: :meth:`~diffret_lib.data.collection.Collection.protocol`, metric and licence."""
    found = published(collection.name)
    row = collection.protocol() | {"metric": metrics_of(collection.name)[0], "licence": found.licence if found else ""}
    if found:
        row["passage"] = found.passage
        if found.relevant_from > 1:
            row["relevant"] += f"; {found.relevant_from} or more for MRR and recall"
    return row
