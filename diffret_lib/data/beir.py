"""Collections in BEIR's format, from a folder or the hub, and Tevatron's training rows; all memory-mapped.

What BEIR's own evaluation takes is taken, counted, and said in one line: passages without title and text, judgements
of passages that are not in the corpus (they count in the ideal ranking), of unknown queries (left out), of negative
grades (not relevant), and the same judgement twice.  A passage that is the query itself never counts for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset
from datasets.arrow_writer import ArrowWriter

from diffret_lib.addresses import address
from diffret_lib.cache import cache_dir, fetch, file_sha256, remember
from diffret_lib.config import data_folders, rows_file
from diffret_lib.data.checks import identifier, judge, numbered_lines
from diffret_lib.data.collection import FEATURES, Collection, Column, contains_run, words
from diffret_lib.data.protocols import Download, Published, Repository, published

logger = logging.getLogger(__name__)

HEADER = ["query-id", "corpus-id", "score"]
#: Where the hub has its collections (a folder in the same form does as well), and the passages of each.
HUB, CORPUS = "hf://datasets", "corpus/*.parquet"
#: MS MARCO's training queries with relevant passages and hard negatives of BM25 and coCondenser; no revision is pinned.
TRAINING_ROWS = Repository(hub="Tevatron/msmarco-passage-aug", revision=None)
_STRING = Value("string")
ROW = Features({"query_id": _STRING, "query": _STRING, "positives": [_STRING], "negatives": [_STRING]})
#: Rows that are written at a time.
BATCH = 1000
#: Number and content, a line or a table's row, of each record of a source.
Rows = Iterator[tuple[int, Any]]
_said: set[str] = set()


@dataclass(frozen=True)
class Source:
    """Records of a file or a repository: its name in messages, the address of its content, and what gives them."""

    name: str
    key: str
    rows: Callable[[], Rows]


def load_beir(folder: str | Path, split: str = "test", name: str | None = None) -> Collection:
    """Load a BEIR folder, memory-mapped; it is read once and then comes from the cache until a file changes.

    It holds ``corpus.jsonl`` (``_id``, ``text`` and, optionally, ``title``, which are joined with a space),
    ``queries.jsonl`` (``_id``, ``text``) and ``qrels/<split>.tsv`` (with the header ``query-id``, ``corpus-id``,
    ``score``), each as it is or as ``.gz``.  A byte order mark, CR line ends and blank lines are tolerated.  Queries
    that have no judgement above 0 in the split are left out.  ``name`` is by default the folder's; a published one
    (:func:`~diffret_lib.data.protocols.published`) gives the rules, and other names of the judgements' file.

    Raises
    ------
    FileNotFoundError
        When one of the three files is missing.
    ValueError
        Naming file and line: text that is not UTF-8, malformed JSON, missing keys, duplicate ids, ids that a TREC run
        cannot hold, queries without text, relevance that is no integer, one judged twice in different ways.
    """
    folder, named = Path(folder), published(name or "")
    judgements, files = [f"qrels/{each}.tsv" for each in (split, *(named.files if named else ()))], []
    for choice in (["corpus.jsonl"], ["queries.jsonl"], judgements):
        there = [path for file in choice for path in (folder / file, folder / f"{file}.gz") if path.is_file()]
        files += there[:1] or [None]
        if not there:
            splits = sorted({path.name.partition(".tsv")[0] for path in folder.glob("qrels/*.tsv*")})
            hint = f"; splits there: {', '.join(splits) or 'none'}" if len(files) == 3 else ""
            raise FileNotFoundError(f"{folder / choice[0]} is missing: a BEIR folder needs it{hint}")
    name = name or folder.resolve().name + (f":{split}" if split != "test" else "")
    about = f"BEIR folder {name.removesuffix(f':{split}')}, split {split}"
    return _collection(name, about, *map(_file, files))


def load_published(name: str) -> Collection:
    """Load a published collection from the hub, or the cache; errors as of :func:`load_beir`."""
    found = published(name)
    judged, split = found.judgements, name.partition(":")[2] or found.split
    queries = _web(found.topics) if found.topics else _hub(found, "queries/*.parquet")
    if isinstance(judged, Download):
        judgements = _web(judged)
    else:
        judgements = _hub(judged, f"{split}.tsv") if judged else _hub(found, f"{split}/*.parquet")
    try:
        return _collection(name, f"hub, {found}, split {split}", _hub(found, CORPUS), queries, judgements)
    except FileNotFoundError as error:
        folder = data_folders(name.partition(":")[0])[-1]
        ways = f"set DIFFRET_DATA to a folder with {folder}/, a BEIR folder, or connect to the hub ({found.hub})"
        raise FileNotFoundError(f"{name}, split {split}: {ways}; {error}") from error


def in_cache(found: Published) -> bool:
    """Whether the passages of a published collection have come from the hub before."""
    source = _hub(found, CORPUS)
    return (cache_dir() / "texts" / _address(source, _passage)).is_dir()


def load_training_rows(rows: str | Path = TRAINING_ROWS.hub) -> Dataset:
    """Load rows to train on, memory-mapped: columns query_id, query, positives and negatives (lists of texts).

    ``rows`` is a file of JSON lines (also ``.gz``) as Tevatron has them: ``query_id``, ``query``, and the lists
    ``positive_passages`` and ``negative_passages`` of passages, whose ``title`` and ``text`` are joined with a space.
    :data:`TRAINING_ROWS` are by default those of the hub, or of the folder ``DIFFRET_DATA``
    (:func:`~diffret_lib.config.rows_file`).

    FileNotFoundError: there is no such file, or the hub cannot be reached.  ValueError, naming file and line: malformed
    JSON, missing keys, an id that occurs twice, a query without text or without positives.
    """
    file = rows_file(rows)
    if file is None and rows != TRAINING_ROWS.hub:
        message = f"there is no file {rows}: training.rows names one of Tevatron's rows, or {TRAINING_ROWS.hub}"
        raise FileNotFoundError(message)
    return _stored(_file(file) if file else _hub(TRAINING_ROWS, "train.jsonl.gz"), ROW, _training_row)[0]


def _file(path: Path) -> Source:
    return Source(str(path), file_sha256(path), partial(numbered_lines, path))


def _hub(place: Repository, files: str) -> Source:
    where = f"{HUB}/{place.hub}@{place.revision or 'main'}/{files}"
    return Source(f"{place.hub}/{files}", where, partial(_hub_rows, where))


def _web(file: Download) -> Source:
    return Source(file.url, file.md5, lambda: numbered_lines(_downloaded(file)))


def _hub_rows(files: str) -> Rows:
    """Rows of tables, or lines of a text file, as the hub or a folder has them."""
    table = files.endswith(".parquet")
    with _reached(files):
        rows = load_dataset("parquet" if table else "text", data_files=files, split="train", streaming=True)
        yield from enumerate((row if table else row["text"] for row in rows), start=1)


def _downloaded(file: Download) -> Path:
    """A file of the web, from the cache or downloaded; a ValueError when its MD5 is another."""
    name = file.url.rpartition("/")[2]

    def make(entry: Path) -> None:
        with _reached(file.url), urllib.request.urlopen(file.url, timeout=60) as read, (entry / name).open("wb") as out:
            shutil.copyfileobj(read, out)
        found = hashlib.md5((entry / name).read_bytes()).hexdigest()
        if found != file.md5:
            raise ValueError(f"{file.url} has the MD5 {found}, not {file.md5}: it is damaged, or another version")

    return fetch("downloads", file.md5, make) / name


@contextmanager
def _reached(place: str) -> Iterator[None]:
    """Turn what the libraries raise where a network or a file is not there into a FileNotFoundError."""
    try:
        yield
    except Exception as error:  # each library has errors of its own
        raise FileNotFoundError(f"{place}: {type(error).__name__}: {error}") from error


def _collection(name: str, about: str, corpus: Source, queries: Source, judgements: Source) -> Collection:
    """The collection of three sources; what was found while reading stands in its description, and is said once."""
    passages, empty = _stored(corpus, FEATURES, _passage)
    asked, _ = _stored(queries, FEATURES, _topic if queries.name.endswith(".tsv.gz") else _query)
    named = published(name)
    excluded = named.excluded if named else "the query itself"
    key = address([_judged, _hub_rows, numbered_lines], corpus.key, queries.key, judgements.key, excluded)
    found = remember("judgements", key, lambda: _judged(passages, empty, asked, judgements, excluded))
    said = "; ".join(f"{what}: {count:,}" for what, count in found["counts"].items() if count)
    if said and name not in _said:
        _said.add(name)
        logger.warning("%s: %s", name, said)
    return Collection(
        name, passages, asked.select(found["rows"]), found["qrels"],
        description="; ".join(filter(None, (about, said))), text_format="title and text, joined with a space",
        missing=tuple(found["missing"]), own=tuple(found["own"]),
    )  # fmt: skip


def _judged(passages: Dataset, empty: int, asked: Dataset, judgements: Source, excluded: str) -> dict[str, Any]:
    """Rows of the queries with a judgement above 0, their judgements, what the rules concern, and how often."""
    judged, odd = _judgements(judgements)
    rows = {query: row for row, query in enumerate(Column(asked, "id")) if query in judged}
    qrels = {query: judged[query] for query in rows if any(grade > 0 for grade in judged[query].values())}
    if not qrels:
        raise ValueError(f"{judgements.name}: no query has a judgement above 0")
    missing, same = set().union(*qrels.values()), {}
    for row, passage in enumerate(Column(passages, "id")):
        missing.discard(passage)
        if passage in qrels and qrels[passage].get(passage, 0) <= 0:
            same[passage] = row

    def is_query(passage: str) -> bool:  # numbers may be the same by chance: then the texts tell
        texts = passages[same[passage]]["text"], asked[rows[passage]]["text"]
        return not passage.isdigit() or contains_run(*map(words, texts))

    own = [passage for passage in same if is_query(passage)] if excluded == "the query itself" else []
    counts = {
        "judgements that are there twice (count once)": odd["twice"],
        "judgements of unknown queries (left out)": sum(len(judged[query]) for query in judged.keys() - rows.keys()),
        "negative grades (not relevant)": odd["negative"],
        "passages without title and text (kept)": empty,
        "judged passages that are not in the corpus (in the ideal ranking)": len(missing),
        "passages that are a query themselves (never count for it)": len(own),
    }
    taken = {"rows": [rows[query] for query in qrels], "qrels": qrels, "missing": sorted(missing), "own": own}
    return taken | {"counts": counts}


def _judgements(source: Source) -> tuple[dict[str, dict[str, int]], Counter[str]]:
    """All judgements of a source (BEIR's or TREC's columns, or a table), and how many are odd."""
    qrels: dict[str, dict[str, int]] = {}
    odd: Counter[str] = Counter()
    rows, trec = source.rows(), source.name.endswith(".txt")
    if source.name.endswith((".tsv", ".tsv.gz")):
        first, header = next(rows, (1, ""))
        if [cell.strip() for cell in header.split("\t")] != HEADER:
            wanted = f"{', '.join(HEADER)}, separated by tabs"
            raise ValueError(f"{source.name}:{first}: the header must be {wanted}, got {header!r}")
    for number, row in rows:
        if isinstance(row, Mapping):  # a table has no grades where all are 1
            cells = [str(row.get(key, 1)) for key in HEADER]
        else:
            cells = row.split()[:1] + row.split()[2:] if trec else [cell.strip() for cell in row.split("\t")]
        try:
            if len(cells) != 3:
                raise ValueError(f"{'4 columns' if trec else '3 columns separated by tabs'} are needed, got {row!r}")
            again = judge(qrels, *cells)
        except ValueError as error:
            raise ValueError(f"{source.name}:{number}: {error}") from None
        odd["twice"] += again
        odd["negative"] += cells[2].startswith("-") and not again
    return qrels, odd


def _stored(source: Source, features: Features, row: Callable[[Any], dict[str, Any]]) -> tuple[Dataset, int]:
    """The rows that ``row`` makes of a source's records, memory-mapped, and how many have an empty text.

    They come from the cache, or are read.  The first of ``features`` is an id, which no two have.
    """
    key, empty = next(iter(features)), 0

    def rows() -> Iterator[dict[str, Any]]:
        for number, record in source.rows():
            try:
                yield row(record) | {"number": number}
            except ValueError as error:
                raise ValueError(f"{source.name}:{number}: {error}") from None

    def make(entry: Path) -> None:
        nonlocal empty
        made, file = rows(), entry / "rows.arrow"
        with ArrowWriter(features=features, path=str(file)) as writer:
            while batch := list(islice(made, BATCH)):
                empty += sum(not each.get("text", True) for each in batch)
                writer.write_batch({name: [each[name] for each in batch] for name in features})
            writer.finalize()
        ids = Dataset.from_file(str(file)).data.column(key)
        if not len(ids):
            raise ValueError(f"{source.name}: there is no record in it")
        if len(ids.unique()) < len(ids):
            first: dict[str, int] = {}
            for each in rows():
                if (line := first.setdefault(each[key], each["number"])) != each["number"]:
                    place = f"{source.name}:{each['number']}"
                    raise ValueError(f"{place}: duplicate id {each[key]!r}, first on line {line}")
        (entry / "empty.json").write_text(json.dumps(empty))

    folder = fetch("texts", _address(source, row), make)
    return Dataset.from_file(str(folder / "rows.arrow")), json.loads((folder / "empty.json").read_text())


def _address(source: Source, row: Callable[[Any], dict[str, Any]]) -> str:
    return address([_stored, row, _hub_rows, numbered_lines], source.key)


def _passage(record: Any) -> dict[str, str]:
    """Id and text of a passage, which may be empty."""
    record = _mapping(record)
    return {"id": _id(record, "_id"), "text": _text(record, "title", "text")}


def _query(record: Any) -> dict[str, str]:
    """Id and text of a query."""
    record = _mapping(record)
    name = _id(record, "_id")
    return {"id": name, "text": _asked(record, "text", name)}


def _topic(line: str) -> dict[str, str]:
    """Id and text of a query as MS MARCO has them: two columns."""
    return _query(dict(zip(("_id", "text"), line.split("\t"), strict=False)))


def _training_row(record: Any) -> dict[str, Any]:
    """Query, positives and negatives of a row of Tevatron's."""
    record = _mapping(record)
    name = _id(record, "query_id")
    row: dict[str, Any] = {"query_id": name, "query": _asked(record, "query", name)}
    for kind in ("positive", "negative"):
        passages = record.get(f"{kind}_passages")
        if not isinstance(passages, list):
            raise ValueError(f'"{kind}_passages" must be a list, got {type(passages).__name__}')
        row[f"{kind}s"] = [_text(_mapping(passage), "title", "text") for passage in passages]
    if not row["positives"]:
        raise ValueError(f"query {name!r} has no positive passage")
    return row


def _mapping(record: Any) -> Mapping[str, Any]:
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except json.JSONDecodeError as error:
            raise ValueError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    return record


def _id(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise ValueError(f'the key "{key}" is missing')
    name = record[key]
    return identifier(str(name) if isinstance(name, int) and not isinstance(name, bool) else name, f'"{key}"')


def _asked(record: Mapping[str, Any], key: str, name: str) -> str:
    if not (text := _text(record, key)):
        raise ValueError(f"empty text for id {name!r}")
    return text


def _text(record: Mapping[str, Any], *keys: str) -> str:
    """The values of the keys, joined with a space; the last key must be there."""
    if keys[-1] not in record:
        raise ValueError(f'the key "{keys[-1]}" is missing')
    parts = {key: record[key] for key in keys if record.get(key) is not None}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string, got {type(value).__name__}')
    text = " ".join(filter(None, map(str.strip, parts.values())))
    text.encode()  # a ValueError for half of a surrogate pair
    return text
