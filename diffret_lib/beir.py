"""Collections in BEIR's folder format, read line by line, with errors that name file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffret_lib.collection import Collection


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line that is not blank; a byte order mark and CRs are dropped."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
            line = line.rstrip("\r\n")
            if line.strip():
                yield number, line


def _identifier(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f'{where}: "_id" must be a string that is not empty, got {value!r}')
    return str(value)


def _records(path: Path, *, title: bool) -> Iterator[tuple[int, str, str]]:
    """Line number, id and text of each record of a JSON lines file."""
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON object is needed, got {type(record).__name__}")
        for key in ("_id", "text"):
            if key not in record:
                raise ValueError(f'{where}: the key "{key}" is missing')
        identifier = _identifier(record["_id"], where)
        if identifier in seen:
            raise ValueError(f"{where}: duplicate id {identifier!r}, first on line {seen[identifier]}")
        seen[identifier] = number
        parts = []
        for key in ("title", "text") if title else ("text",):
            value = record.get(key)
            value = "" if value is None else value
            if not isinstance(value, str):
                raise ValueError(f'{where}: "{key}" must be a string, got {type(value).__name__}')
            parts.append(value.strip())
        text = " ".join(p for p in parts if p)
        if not text:
            raise ValueError(f"{where}: empty text for id {identifier!r}{' (title and text)' if title else ''}")
        yield number, identifier, text


def _judgements(path: Path, passages: dict[str, str], queries: dict[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    header_read = False
    for number, line in _lines(path):
        where = f"{path}:{number}"
        row = [cell.strip() for cell in next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE))]
        if not header_read:
            header_read = True
            if row != ["query-id", "corpus-id", "score"]:
                raise ValueError(
                    f"{where}: the header must be query-id, corpus-id, score, separated by tabs; got {line!r}"
                )
            continue
        if len(row) != 3:
            raise ValueError(f"{where}: 3 columns separated by tabs are needed, got {len(row)}: {line!r}")
        query_id, passage_id, score = row
        if query_id not in queries:
            raise ValueError(f"{where}: unknown query id {query_id!r}: it is not in queries.jsonl")
        if passage_id not in passages:
            raise ValueError(f"{where}: unknown corpus id {passage_id!r}: it is not in corpus.jsonl")
        try:
            grade = int(score)
        except ValueError:
            raise ValueError(f"{where}: the relevance must be an integer, got {score!r}") from None
        if grade < 0:
            raise ValueError(f"{where}: the relevance must not be negative, got {grade}")
        if passage_id in qrels.setdefault(query_id, {}):
            raise ValueError(f"{where}: query {query_id!r} and passage {passage_id!r} are judged twice")
        qrels[query_id][passage_id] = grade
    if not header_read:
        raise ValueError(f"{path}:1: the file is empty; the header query-id, corpus-id, score is needed")
    return qrels


def load_beir(folder: str | Path, split: str = "test") -> Collection:
    """Read a BEIR folder.

    Parameters
    ----------
    folder : path
        With ``corpus.jsonl`` (``_id``, ``text`` and, optionally, ``title``), ``queries.jsonl`` (``_id``,
        ``text``) and ``qrels/<split>.tsv`` (``query-id``, ``corpus-id``, ``score`` with this header).
    split : str

    Returns
    -------
    Collection
        Passages are title and text joined with a space, as BEIR joins them.  Queries that have no judgement
        above 0 in the split are left out.  A byte order mark, CR line ends and blank lines are tolerated.

    Raises
    ------
    FileNotFoundError
        When one of the three files is missing.
    ValueError
        Naming file and line: malformed JSON, missing keys, duplicate or unknown ids, empty texts, relevance
        that is no integer or negative.
    """
    folder = Path(folder)
    corpus, query_file = folder / "corpus.jsonl", folder / "queries.jsonl"
    qrels_file = folder / "qrels" / f"{split}.tsv"
    for path in (corpus, query_file, qrels_file):
        if not path.is_file():
            hint = ""
            if path == qrels_file and path.parent.is_dir():
                hint = f"; splits there: {', '.join(sorted(p.stem for p in path.parent.glob('*.tsv'))) or 'none'}"
            raise FileNotFoundError(f"{path} is missing: a BEIR folder needs it{hint}")
    passages = {i: text for _, i, text in _records(corpus, title=True)}
    queries = {i: text for _, i, text in _records(query_file, title=False)}
    qrels = _judgements(qrels_file, passages, queries)
    kept = [q for q in queries if any(grade > 0 for grade in qrels.get(q, {}).values())]
    if not kept:
        raise ValueError(f"{qrels_file}: no query has a judgement above 0")
    name = folder.resolve().name
    return Collection(
        name=name if split == "test" else f"{name}:{split}",
        passage_ids=list(passages),
        passages=list(passages.values()),
        query_ids=kept,
        queries=[queries[q] for q in kept],
        qrels={q: qrels[q] for q in kept},
        description=f"BEIR folder {name}, split {split}",
    )
