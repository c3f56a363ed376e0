"""Collections in BEIR's folder format, read with ``datasets``; errors name file and line.

Passages and queries are checked a column at a time.  Where anything is wrong, the file is read line by line, which
names the first line at fault, or reads what only the builder refused (other keys of changing types).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from diffret_lib.addresses import address
from diffret_lib.cache import fetch, file_sha256
from diffret_lib.data.collection import FEATURES, Collection, Column, quiet

HEADER = ["query-id", "corpus-id", "score"]


def load_beir(folder: str | Path, split: str = "test") -> Collection:
    """Load a BEIR folder, memory-mapped; it is read once and then comes from the cache until a file changes.

    Parameters
    ----------
    folder : path
        With ``corpus.jsonl`` (``_id``, ``text`` and, optionally, ``title``, which are joined with a space),
        ``queries.jsonl`` (``_id``, ``text``) and ``qrels/<split>.tsv`` (with the header ``query-id``, ``corpus-id``,
        ``score``).  A byte order mark, CR line ends and blank lines are tolerated.
    split : str
        Queries that have no judgement above 0 in it are left out.

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
    with quiet(), TemporaryDirectory(dir=entry) as work:
        passages = _texts(corpus, ("title", "text"), work)
        queries = _texts(query_file, ("text",), work)
        qrels = _judgements(qrels_file, queries, passages, work)
        qrels = {query_id: judged for query_id, judged in qrels.items() if any(grade > 0 for grade in judged.values())}
        if not qrels:
            raise ValueError(f"{qrels_file}: no query has a judgement above 0")
        queries = queries.select([i for i, query_id in enumerate(Column(queries, "id")) if query_id in qrels])
        Collection("", passages, queries, {query_id: qrels[query_id] for query_id in Column(queries, "id")}).save(entry)


def _texts(path: Path, keys: tuple[str, ...], work: str) -> Dataset:
    """Ids and texts of a JSON lines file; a text is the values of ``keys`` joined."""
    try:
        rows = load_dataset("json", data_files=str(path), split="train", encoding="utf-8-sig", cache_dir=work)
        allowed = {"_id": ("string", "int64"), "title": ("string", "null"), "text": ("string",)}
        if any(rows.features[key] not in map(Value, allowed[key]) for key in ("_id", *keys) if key in rows.features):
            raise TypeError(f"columns of other types: {rows.features}")
        rows = rows.with_format("arrow").map(
            _joined, batched=True, fn_kwargs={"keys": keys}, remove_columns=rows.column_names, features=FEATURES
        )
        if len(pc.unique(rows.data.column("id"))) == len(rows):
            return rows.with_format(None)
    except Exception:  # whatever it is, reading line by line names the line
        pass
    try:
        return Dataset.from_generator(_records, FEATURES, cache_dir=work, gen_kwargs={"path": path, "keys": keys})
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _joined(table: pa.Table, keys: tuple[str, ...]) -> pa.Table:
    ids = pc.cast(table["_id"], pa.string())
    parts = [pc.fill_null(pc.cast(table[key], pa.string()), "") for key in keys if key in table.column_names]
    texts = pc.utf8_trim_whitespace(pc.binary_join_element_wise(*map(pc.utf8_trim_whitespace, parts), " "))
    one_word = pc.equal(pc.list_value_length(pc.utf8_split_whitespace(ids)), 1)
    sound = pc.and_(one_word, pc.and_(pc.not_equal(ids, ""), pc.not_equal(texts, "")))
    if ids.null_count or table["text"].null_count or not pc.all(sound).as_py():
        raise ValueError("an id or a text is missing or empty, or an id holds white space")
    return pa.table({"id": ids, "text": texts})


def _judgements(path: Path, queries: Dataset, passages: Dataset, work: str) -> dict[str, dict[str, int]]:
    names = [*HEADER, "more"]
    try:
        table = load_dataset(
            "csv", data_files=str(path), split="train", cache_dir=work, encoding="utf-8-sig", delimiter="\t",
            names=names, header=None, index_col=False, quoting=csv.QUOTE_NONE, keep_default_na=False,
            features=Features(dict.fromkeys(names, Value("string"))),
        ).data.table  # fmt: skip
    except Exception:
        lines = list(_lines(path))
        if not lines:
            raise ValueError(f"{path}:1: the file is empty; the header {', '.join(HEADER)} is needed") from None
        for where, line in lines:
            if line.count("\t") != 2:
                raise ValueError(f"{where}: 3 columns separated by tabs are needed, got {line!r}") from None
        raise
    known_queries, known_passages = (set(Column(rows, "id")) for rows in (queries, passages))
    qrels: dict[str, dict[str, int]] = {}
    columns = [pc.utf8_trim_whitespace(pc.fill_null(table[name], "")).to_pylist() for name in names]
    for place, row in enumerate(filter(any, zip(*columns, strict=True))):
        query_id, passage_id, score, more = row
        fault = None
        if place == 0:
            if row == (*HEADER, ""):
                continue
            fault = f"the header must be {', '.join(HEADER)}, separated by tabs, got {row}"
        elif more or not score:
            fault = f"3 columns separated by tabs are needed, got {row}"
        elif query_id not in known_queries:
            fault = f"unknown query id {query_id!r}: it is not in queries.jsonl"
        elif passage_id not in known_passages:
            fault = f"unknown corpus id {passage_id!r}: it is not in corpus.jsonl"
        elif not re.fullmatch(r"-?[0-9]+", score):
            fault = f"the relevance must be an integer, got {score!r}"
        elif int(score) < 0:
            fault = f"the relevance must not be negative, got {score}"
        elif passage_id in qrels.setdefault(query_id, {}):
            fault = f"query {query_id!r} and passage {passage_id!r} are judged twice"
        if fault:
            where, _ = next(islice(_lines(path), place, None))
            raise ValueError(f"{where}: {fault}")
        qrels[query_id][passage_id] = int(score)
    return qrels


# -- line by line --------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not blank; a byte order mark and CRs are dropped."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
            if line.strip():
                yield f"{path}:{number}", line


def _records(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Ids and texts as in :func:`_texts`, or the first line at fault."""
    seen: dict[str, str] = {}
    for where, line in _lines(path):
        try:
            record: Any = json.loads(line)
            fault, key, text = _record(record, keys)
            f"{key}{text}".encode()
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
        except UnicodeEncodeError:
            fault = "half of a surrogate pair is no character"
        if not fault and key in seen:
            fault = f"duplicate id {key!r}, first on line {seen[key].rpartition(':')[2]}"
        if fault:
            raise ValueError(f"{where}: {fault}")
        seen[key] = where
        yield {"id": key, "text": text}


def _record(record: Any, keys: tuple[str, ...]) -> tuple[str, str, str]:
    """Fault (or nothing), id and text of a line."""
    if not isinstance(record, dict):
        return f"a JSON object is needed, got {type(record).__name__}", "", ""
    if missing := [key for key in ("_id", "text") if key not in record]:
        return f'the key "{missing[0]}" is missing', "", ""
    key = record["_id"]
    if isinstance(key, bool) or not isinstance(key, str | int) or str(key).split() != [str(key)]:
        return f'"_id" must be a string that is not empty and holds no white space, got {key!r}', "", ""
    parts = {name: record[name] for name in keys if record.get(name) is not None}
    for name, value in parts.items():
        if not isinstance(value, str):
            return f'"{name}" must be a string, got {type(value).__name__}', "", ""
    text = " ".join(filter(None, map(str.strip, parts.values())))
    fault = "" if text else f"empty text for id {key!r}{' (title and text)' if 'title' in keys else ''}"
    return fault, str(key), text
