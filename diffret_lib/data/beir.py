"""Collections in BEIR's folder format, read with ``datasets``; errors name file and line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from diffret_lib.addresses import address
from diffret_lib.cache import fetch, file_sha256
from diffret_lib.data.collection import FEATURES, Collection, Column

HEADER = ["query-id", "corpus-id", "score"]


def load_beir(folder: str | Path, split: str = "test") -> Collection:
    """Load a BEIR folder, memory-mapped; it is read once and then comes from the cache until a file changes.

    It holds ``corpus.jsonl`` (``_id``, ``text`` and, optionally, ``title``, which are joined with a space),
    ``queries.jsonl`` (``_id``, ``text``) and ``qrels/<split>.tsv`` (with the header ``query-id``, ``corpus-id``,
    ``score``).  A byte order mark, CR line ends and blank lines are tolerated.  Queries that have no judgement above 0
    in the split are left out.

    Raises
    ------
    FileNotFoundError
        When one of the three files is missing.
    ValueError
        Naming file and line: text that is not UTF-8, malformed JSON, missing keys, duplicate or unknown ids, ids
        with white space (a TREC run cannot hold them), empty texts, relevance that is no integer or negative.
    """
    folder = Path(folder)
    files = folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"
    for path in files:
        if not path.is_file():
            splits = ", ".join(sorted(p.stem for p in path.parent.glob("*.tsv"))) or "none"
            hint = f"; splits there: {splits}" if path is files[2] else ""
            raise FileNotFoundError(f"{path} is missing: a BEIR folder needs it{hint}")
    key = address([_read, Collection], split, *map(file_sha256, files))
    read = Collection.load(fetch("collections", key, lambda entry: _read(*files, entry)))
    name = folder.resolve().name
    title = name if split == "test" else f"{name}:{split}"
    return replace(read, name=title, description=f"BEIR folder {name}, split {split}")


def _read(corpus: Path, query_file: Path, qrels_file: Path, entry: Path) -> None:
    with TemporaryDirectory(dir=entry) as work:
        passages = _texts(corpus, ("title", "text"), work)
        queries = _texts(query_file, ("text",), work)
        qrels = _judgements(qrels_file, set(Column(queries, "id")), set(Column(passages, "id")), work)
        qrels = {query_id: judged for query_id, judged in qrels.items() if any(judged.values())}
        if not qrels:
            raise ValueError(f"{qrels_file}: no query has a judgement above 0")
        queries = queries.select([i for i, query_id in enumerate(Column(queries, "id")) if query_id in qrels])
        Collection("", passages, queries, {query_id: qrels[query_id] for query_id in Column(queries, "id")}).save(entry)


def _texts(path: Path, keys: tuple[str, ...], work: str) -> Dataset:
    """Ids and texts of a JSON lines file; a text is the values of ``keys`` joined."""
    try:
        rows = load_dataset("json", data_files=str(path), split="train", encoding="utf-8-sig", cache_dir=work)
        rows = rows.map(_record, fn_kwargs={"keys": keys}, remove_columns=rows.column_names, features=FEATURES)
        if len(rows.unique("id")) == len(rows):
            return rows
    except Exception:
        pass
    try:  # line by line, which names the first at fault, or reads what only the builder refused (other keys' types)
        return Dataset.from_generator(_records, FEATURES, cache_dir=work, gen_kwargs={"path": path, "keys": keys})
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _record(record: Any, keys: tuple[str, ...], nulls: bool = False) -> dict[str, str]:
    """Id and text of a record; the builder's nulls may be missing keys and count as such, unless ``nulls``."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    for key in ("_id", "text"):
        if key not in record or not nulls and record[key] is None:
            raise ValueError(f'the key "{key}" is missing')
    name = record["_id"]
    if isinstance(name, bool) or not isinstance(name, str | int) or str(name).split() != [str(name)]:
        raise ValueError(f'"_id" must be a string that is not empty and holds no white space, got {name!r}')
    parts = {key: record[key] for key in keys if record.get(key) is not None}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string, got {type(value).__name__}')
    text = " ".join(filter(None, map(str.strip, parts.values())))
    if not text:
        raise ValueError(f"empty text for id {name!r}{' (title and text)' if 'title' in keys else ''}")
    f"{name}{text}".encode()  # a ValueError for half of a surrogate pair
    return {"id": str(name), "text": text}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank; a byte order mark and CRs are dropped."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
            if line.strip():
                yield number, line


def _records(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Ids and texts as in :func:`_texts`, or the first line at fault."""
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            row = _record(json.loads(line), keys, nulls=True)
            if row["id"] in seen:
                raise ValueError(f"duplicate id {row['id']!r}, first on line {seen[row['id']]}")
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: malformed JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        seen[row["id"]] = number
        yield row


def _judgements(path: Path, queries: set[str], passages: set[str], work: str) -> dict[str, dict[str, int]]:
    first, header = next(_lines(path), (1, ""))
    if [cell.strip() for cell in header.split("\t")] != HEADER:
        raise ValueError(f"{path}:{first}: the header must be {', '.join(HEADER)}, separated by tabs, got {header!r}")
    names = [*HEADER, "more"]
    try:
        rows = load_dataset(
            "csv", data_files=str(path), split="train", cache_dir=work, encoding="utf-8-sig", delimiter="\t",
            names=names, header=None, index_col=False, quoting=csv.QUOTE_NONE, keep_default_na=False,
            skip_blank_lines=False, features=Features(dict.fromkeys(names, Value("string"))),
        )  # fmt: skip
    except Exception:
        for number, line in _lines(path):
            if line.count("\t") != 2:
                raise ValueError(f"{path}:{number}: 3 columns separated by tabs are needed, got {line!r}") from None
        raise
    qrels: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows, start=1):
        cells = [(row[name] or "").strip() for name in names]
        query_id, passage_id, score, more = cells
        if number <= first or not any(cells):
            continue
        judged = qrels.setdefault(query_id, {})
        fault = None
        if more or not score:
            fault = f"3 columns separated by tabs are needed, got {cells}"
        elif query_id not in queries:
            fault = f"unknown query id {query_id!r}: it is not in queries.jsonl"
        elif passage_id not in passages:
            fault = f"unknown corpus id {passage_id!r}: it is not in corpus.jsonl"
        elif not re.fullmatch(r"-?[0-9]+", score):
            fault = f"the relevance must be an integer, got {score!r}"
        elif int(score) < 0:
            fault = f"the relevance must not be negative, got {score}"
        elif passage_id in judged:
            fault = f"query {query_id!r} and passage {passage_id!r} are judged twice"
        if fault:
            raise ValueError(f"{path}:{number}: {fault}")
        judged[passage_id] = int(score)
    return qrels
