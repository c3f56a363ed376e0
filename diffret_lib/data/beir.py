"""Collections in BEIR's format, from a folder or the hub.

What BEIR's own evaluation takes is taken, counted, and said in one line: passages without title and text, judgements
of passages that are not in the corpus (they count in the ideal ranking), of unknown queries (left out), of negative
grades (not relevant), and the same judgement twice.  A passage that is the query itself never counts for it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, DownloadManager, load_dataset
from datasets.exceptions import DatasetGenerationError

from diffret_lib.addresses import address
from diffret_lib.cache import fetch, file_sha256
from diffret_lib.data.checks import identifier, judge, numbered_lines
from diffret_lib.data.collection import FEATURES, Collection, Column, contains_run, quiet, words

logger = logging.getLogger(__name__)

HEADER = ["query-id", "corpus-id", "score"]
#: Where the hub has BEIR's collections (a folder in the same form does as well).
HUB = "hf://datasets/BeIR"
#: Revisions on the hub of the paper's seven: of passages and queries, and of the judgements.
REVISIONS = {
    "arguana": ("9bcf8fc0320c4e3860e25b8b85fa205fcdd7078f", "ae5468c6f1c198109a8af5f0d4dc58bd18b6fea7"),
    "fiqa": ("979c07a7cb5ccc6ca009792241fa1250b98055dd", "252958f2d646e22cab6d0c72dd3f0d5de6d0655a"),
    "hotpotqa": ("a7e8bab212f5a89f9be1bc9b654aa6dfa317f32b", "b15429e9244c8ec966985d7778427c3b1543b314"),
    "nq": ("b7253e6c379163d024ddb1d6948152a91a2e3b46", "519acd4e48bb3e5da22b2b888ce36c614f4f2bc9"),
    "quora": ("main", "main"),  # the newest
    "scifact": ("b3b5335604bf5ee3c4447671af975ea25143d4f5", "2938d17dc3b09882fdb8c12bbbe2e2dc0e75a029"),
    "trec-covid": ("7e16fde3016c639c7f856e803f4bab92645562c4", "532ac68ee6756ac22c9346eebf65bd3c6a042e10"),
}
#: Number and content of each record of a source.
Rows = Iterator[tuple[int, Any]]
_said: set[str] = set()


def load_beir(folder: str | Path, split: str = "test", name: str | None = None) -> Collection:
    """Load a BEIR folder, memory-mapped; it is read once and then comes from the cache until a file changes.

    It holds ``corpus.jsonl`` (``_id``, ``text`` and, optionally, ``title``, which are joined with a space),
    ``queries.jsonl`` (``_id``, ``text``) and ``qrels/<split>.tsv`` (with the header ``query-id``, ``corpus-id``,
    ``score``), each as it is or as ``.gz``.  A byte order mark, CR line ends and blank lines are tolerated.  Queries
    that have no judgement above 0 in the split are left out.  ``name`` is by default the folder's.

    Raises
    ------
    FileNotFoundError
        When one of the three files is missing.
    ValueError
        Naming file and line: text that is not UTF-8, malformed JSON, missing keys, duplicate ids, ids that a TREC run
        cannot hold, queries without text, relevance that is no integer, one judged twice in different ways.
    """
    folder = Path(folder)
    files = []
    for file in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv"):
        files += [path for path in (folder / file, folder / f"{file}.gz") if path.is_file()][:1] or [None]
        if files[-1] is None:
            splits = sorted({path.name.partition(".tsv")[0] for path in folder.glob("qrels/*.tsv*")})
            hint = f"; splits there: {', '.join(splits) or 'none'}" if len(files) == 3 else ""
            raise FileNotFoundError(f"{folder / file} is missing: a BEIR folder needs it{hint}")
    sources = [(str(path), partial(_lines, path)) for path in files[:2]]
    key = address([_read, _lines], *map(file_sha256, files))
    read = Collection.load(fetch("collections", key, lambda entry: _read(*sources, files[2], entry)))
    return _named(read, name or folder.resolve().name, split, "BEIR folder")


def load_hub(name: str, split: str = "test") -> Collection:
    """Load one of :data:`REVISIONS` from the hub, or the cache; errors as of :func:`load_beir`."""
    revision, of_qrels = REVISIONS[name]

    def make(entry: Path) -> None:
        parts = [(f"BeIR/{name}, {part}", partial(_parquet, name, part)) for part in ("corpus", "queries")]
        try:
            qrels = DownloadManager().download(f"{HUB}/{name}-qrels@{of_qrels}/{split}.tsv")
            _read(*parts, Path(qrels), entry)
        except (ConnectionError, FileNotFoundError) as error:
            ways = f"set DIFFRET_DATA to a folder with {name}/, a BEIR folder, or connect to the hub (BeIR/{name})"
            raise FileNotFoundError(f"beir/{name}, split {split}: {ways}; {error}") from error

    read = Collection.load(fetch("collections", address([_read, _parquet], HUB, name, revision, of_qrels, split), make))
    return _named(read, f"beir/{name}", split, f"hub, revision {revision[:7]}")


def _named(read: Collection, name: str, split: str, source: str) -> Collection:
    """The collection under its name; what was found while reading stands in its description, and is said once."""
    name = name if split == "test" else f"{name}:{split}"
    if read.description and name not in _said:
        _said.add(name)
        logger.warning("%s: %s", name, read.description)
    about = f"{source} {name.removesuffix(f':{split}')}, split {split}"
    return replace(read, name=name, description="; ".join(filter(None, (about, read.description))))


def _lines(path: Path) -> Rows:
    for number, line in numbered_lines(path):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: malformed JSON: {error.msg} at column {error.colno}") from None


def _parquet(name: str, part: str) -> Rows:
    files = f"{HUB}/{name}@{REVISIONS[name][0]}/{part}/*.parquet"
    return enumerate(load_dataset("parquet", data_files=files, split="train", streaming=True), start=1)


def _read(
    corpus: tuple[str, Callable[[], Rows]], query_source: tuple[str, Callable[[], Rows]], qrels_file: Path, entry: Path
) -> None:
    """Read passages, queries and judgements, and save the collection; a source is its name and what gives its rows."""
    with TemporaryDirectory(dir=entry) as work:
        passages = _texts(*corpus, ("title", "text"), work)
        queries = _texts(*query_source, ("text",), work)
        asked = dict(zip(Column(queries, "id"), Column(queries, "text"), strict=True))
        judged, found = _judgements(qrels_file, asked)
        qrels = {query: judged[query] for query in asked if any(g > 0 for g in judged.get(query, {}).values())}
        if not qrels:
            raise ValueError(f"{qrels_file}: no query has a judgement above 0")
        missing, own = set().union(*qrels.values()), []
        for passage, text in zip(Column(passages, "id"), Column(passages, "text"), strict=True):
            missing.discard(passage)
            found["passages without title and text (kept)"] += not text
            if passage in qrels and qrels[passage].get(passage, 0) <= 0:
                # numbers may be the same by chance: then the texts tell
                if not passage.isdigit() or contains_run(words(text), words(asked[passage])):
                    own.append(passage)
        found["judged passages that are not in the corpus (in the ideal ranking)"] = len(missing)
        found["passages that are a query themselves (never count for it)"] = len(own)
        Collection(
            "", passages, queries.select([i for i, query in enumerate(asked) if query in qrels]), qrels,
            description="; ".join(f"{what}: {count:,}" for what, count in found.items() if count),
            text_format="title and text, joined with a space", missing=tuple(sorted(missing)), own=tuple(own),
        ).save(entry)  # fmt: skip


def _texts(source: str, rows: Callable[[], Rows], keys: tuple[str, ...], work: str) -> Dataset:
    """Ids and texts of the records of a source; a text is the values of ``keys`` joined."""

    def records() -> Iterator[dict[str, str]]:
        seen: dict[str, int] = {}
        for number, record in rows():
            try:
                row = _record(record, keys)
                if row["id"] in seen:
                    raise ValueError(f"duplicate id {row['id']!r}, first on line {seen[row['id']]}")
            except ValueError as error:
                raise ValueError(f"{source}:{number}: {error}") from None
            seen[row["id"]] = number
            yield row
        if not seen:
            raise ValueError(f"{source}: there is no record in it")

    try:
        with quiet():
            return Dataset.from_generator(records, FEATURES, cache_dir=work)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _record(record: Any, keys: tuple[str, ...]) -> dict[str, str]:
    """Id and text of a passage (``keys`` title and text) or a query."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    for key in ("_id", "text"):
        if key not in record:
            raise ValueError(f'the key "{key}" is missing')
    name = record["_id"]
    name = identifier(str(name) if isinstance(name, int) and not isinstance(name, bool) else name, '"_id"')
    parts = {key: record[key] for key in keys if record.get(key) is not None}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string, got {type(value).__name__}')
    text = " ".join(filter(None, map(str.strip, parts.values())))
    if not text and "title" not in keys:
        raise ValueError(f"empty text for id {name!r}")
    text.encode()  # a ValueError for half of a surrogate pair
    return {"id": name, "text": text}


def _judgements(path: Path, queries: Container[str]) -> tuple[dict[str, dict[str, int]], Counter[str]]:
    """Judgements of the queries, and how many were left out or odd."""
    lines = numbered_lines(path)
    first, header = next(lines, (1, ""))
    if [cell.strip() for cell in header.split("\t")] != HEADER:
        raise ValueError(f"{path}:{first}: the header must be {', '.join(HEADER)}, separated by tabs, got {header!r}")
    qrels: dict[str, dict[str, int]] = {}
    found: Counter[str] = Counter()
    for number, line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        try:
            if len(cells) != 3:
                raise ValueError(f"3 columns separated by tabs are needed, got {line!r}")
            again = judge(qrels, *cells)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        found["judgements that are there twice (count once)"] += again
        found["judgements of unknown queries (left out)"] += cells[0] not in queries and not again
        found["negative grades (not relevant)"] += cells[2].startswith("-") and not again
    return qrels, found
