from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffret_lib.beir import load_beir

CORPUS = ['{"_id": "d1", "title": "Cats", "text": "purr"}', '{"_id": "d2", "text": "dogs bark"}']
QUERIES = ['{"_id": "q1", "text": "who purrs"}', '{"_id": "q2", "text": "unjudged"}', '{"_id": "q3", "text": "none"}']
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q3\td2\t0"]


def write(folder: Path, corpus=CORPUS, queries=QUERIES, qrels=QRELS, end: str = "\n", start: bytes = b"") -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels/test.tsv", qrels)):
        (folder / name).write_bytes(start + (end.join(lines) + end).encode())
    return folder


def test_reads_passages_queries_and_judgements(tmp_path: Path) -> None:
    found = load_beir(write(tmp_path / "pets"))
    assert found.name == "pets" and found.coverage == "whole"
    assert dict(zip(found.passage_ids, found.passages, strict=True)) == {"d1": "Cats purr", "d2": "dogs bark"}
    assert found.query_ids == ["q1"] and found.queries == ["who purrs"]
    assert found.qrels == {"q1": {"d1": 2, "d2": 0}}


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    plain = load_beir(write(tmp_path / "a"))
    odd = load_beir(write(tmp_path / "b", ["", *CORPUS, ""], [*QUERIES, " "], [*QRELS, ""], "\r\n", b"\xef\xbb\xbf"))
    assert odd.fingerprint == plain.fingerprint


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    corpus = [json.dumps({"_id": "d1", "text": "one\u2028two\x85three"}, ensure_ascii=False), CORPUS[1]]
    assert load_beir(write(tmp_path, corpus)).passages[0] == "one\u2028two\x85three"


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([CORPUS[0], "", '{"_id": "d2", '], r"corpus\.jsonl:3: malformed JSON"),
        ([CORPUS[0], '["d2"]'], r"corpus\.jsonl:2: a JSON object is needed, got list"),
        ([CORPUS[0], '{"id": "d2", "text": "x"}'], r'corpus\.jsonl:2: the key "_id" is missing'),
        ([CORPUS[0], '{"_id": "d2", "title": "x"}'], r'corpus\.jsonl:2: the key "text" is missing'),
        ([CORPUS[0], '{"_id": "", "text": "x"}'], r'corpus\.jsonl:2: "_id" must be a string'),
        ([CORPUS[0], '{"_id": "d2", "text": 7}'], r'corpus\.jsonl:2: "text" must be a string, got int'),
        ([*CORPUS, CORPUS[0]], r"corpus\.jsonl:3: duplicate id 'd1', first on line 1"),
        ([CORPUS[0], '{"_id": "d2", "title": " ", "text": ""}'], r"corpus\.jsonl:2: empty text for id 'd2'"),
    ],
)
def test_bad_corpus(tmp_path: Path, corpus: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_beir(write(tmp_path, corpus=corpus))


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([QUERIES[0], "{'_id'}"], r"queries\.jsonl:2: malformed JSON"),
        ([*QUERIES, QUERIES[1]], r"queries\.jsonl:4: duplicate id 'q2', first on line 2"),
        (['{"_id": "q1", "title": "a title", "text": " "}'], r"queries\.jsonl:1: empty text for id 'q1'"),
    ],
)
def test_bad_queries(tmp_path: Path, queries: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_beir(write(tmp_path, queries=queries))


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (QRELS[1:], r"qrels/test\.tsv:1: the header must be query-id, corpus-id, score"),
        ([], r"qrels/test\.tsv:1: the file is empty"),
        ([*QRELS, "q1 d1 1"], r"qrels/test\.tsv:5: 3 columns"),
        ([*QRELS, "q9\td1\t1"], r"qrels/test\.tsv:5: unknown query id 'q9'"),
        ([*QRELS, "q2\td9\t1"], r"qrels/test\.tsv:5: unknown corpus id 'd9'"),
        ([*QRELS, "q2\td1\t1.5"], r"qrels/test\.tsv:5: the relevance must be an integer, got '1\.5'"),
        ([*QRELS, "q2\td1\t-1"], r"qrels/test\.tsv:5: the relevance must not be negative, got -1"),
        ([*QRELS, "q1\td1\t1"], r"qrels/test\.tsv:5: query 'q1' and passage 'd1' are judged twice"),
        (QRELS[:1], r"qrels/test\.tsv: no query has a judgement above 0"),
    ],
)
def test_bad_judgements(tmp_path: Path, qrels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_beir(write(tmp_path, qrels=qrels))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "corpus.jsonl").open("ab") as out:
        out.write(b'{"_id": "d3", "text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl:3: not UTF-8"):
        load_beir(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv is missing.*splits there: test"):
        load_beir(tmp_path, "dev")
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl is missing"):
        load_beir(tmp_path)
