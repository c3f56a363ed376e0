from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffret_lib.data import beir, load_collection
from diffret_lib.data.beir import load_beir

CORPUS = ['{"_id": "d1", "title": "Cats", "text": "purr"}', '{"_id": "d2", "text": "dogs bark"}']
QUERIES = ['{"_id": "q1", "text": "who purrs"}', '{"_id": "q2", "text": "unjudged"}', '{"_id": "q3", "text": "none"}']
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q3\td2\t0"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DIFFRET_CACHE", str(folder))
    return folder


def write(folder: Path, corpus=CORPUS, queries=QUERIES, qrels=QRELS, end: str = "\n", start: bytes = b"") -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels/test.tsv", qrels)):
        (folder / name).write_bytes(start + (end.join(lines) + end).encode())
    return folder


def no_scan(path: Path, keys: tuple[str, ...]):
    raise AssertionError(f"{path} was read line by line")


def test_reads_passages_queries_and_judgements(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(beir, "_records", no_scan)
    found = load_beir(write(tmp_path / "pets"))
    assert found.name == "pets" and found.coverage == "whole" and found.description == "BEIR folder pets, split test"
    assert dict(zip(found.passage_ids, found.passages, strict=True)) == {"d1": "Cats purr", "d2": "dogs bark"}
    assert found.query_ids == ["q1"] and found.queries == ["who purrs"]
    assert found.qrels == {"q1": {"d1": 2, "d2": 0}}


def test_it_is_one_memory_mapped_entry_until_a_file_changes(tmp_path: Path, cache: Path, monkeypatch) -> None:
    read, reads = beir._read, []
    monkeypatch.setattr(beir, "_read", lambda *files: reads.append(files) or read(*files))
    first = load_beir(write(tmp_path / "pets"))
    (entry,) = [p for p in (cache / "collections").iterdir() if p.is_dir()]
    assert {p.name for p in entry.iterdir()} == {"passages", "queries", "collection.json", "manifest.json"}
    assert all(entry in Path(f["filename"]).parents for f in first.passage_rows.cache_files)
    assert load_beir(tmp_path / "pets").fingerprint == first.fingerprint and len(reads) == 1
    (tmp_path / "pets").rename(tmp_path / "animals")
    assert load_beir(tmp_path / "animals").name == "animals" and len(reads) == 1
    write(tmp_path / "animals", corpus=[*CORPUS, '{"_id": "d3", "text": "birds"}'])
    assert len(load_beir(tmp_path / "animals").passages) == 3 and len(reads) == 2


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(beir, "_records", no_scan)
    plain = load_beir(write(tmp_path / "a"))
    blank = {"corpus": ["", *CORPUS, ""], "queries": [*QUERIES, " "], "qrels": [*QRELS, " ", "\t", ""]}
    odd = load_beir(write(tmp_path / "b", **blank, end="\r\n", start=b"\xef\xbb\xbf"))
    assert odd.fingerprint == plain.fingerprint


def test_separators_quotes_and_white_space_of_a_text(tmp_path: Path) -> None:
    text = 'tab\tquote " line\nend one\u2028two\x85three é'
    corpus = [json.dumps({"_id": "d1", "text": f" \u3000{text}\n"}, ensure_ascii=False), CORPUS[1]]
    assert load_beir(write(tmp_path, corpus)).passages[0] == text


@pytest.mark.parametrize(
    "more",
    [
        ['{"_id": 3, "text": "a number as id"}'],
        ['{"_id": "d3", "text": null, "title": "only a title"}'],
        ['{"_id": "d3", "text": "m", "metadata": {"a": 1}}', '{"_id": "d4", "text": "n", "metadata": "none"}'],
    ],
)
def test_odd_but_sound_records(tmp_path: Path, more: list[str]) -> None:
    found = load_beir(write(tmp_path, [*CORPUS, *more]))
    wanted = [json.loads(line) for line in more]
    assert found.passage_ids[2:] == [str(r["_id"]) for r in wanted]
    assert found.passages[2:] == [r["text"] or r["title"] for r in wanted]


def test_ids_and_texts_that_look_like_something_else(tmp_path: Path) -> None:
    corpus = ['{"_id": 1, "text": "2020-01-01"}', '{"_id": 2, "text": "2020-01-02"}']
    found = load_beir(write(tmp_path, corpus, ['{"_id": "007", "text": "NA"}'], [QRELS[0], "007\t1\t1"]))
    assert found.passages == ["2020-01-01", "2020-01-02"] and found.qrels == {"007": {"1": 1}}


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([CORPUS[0], "", '{"_id": "d2", '], r"corpus\.jsonl:3: malformed JSON"),
        ([CORPUS[0], '["d2"]'], r"corpus\.jsonl:2: a JSON object is needed, got list"),
        ([CORPUS[0], '{"id": "d2", "text": "x"}'], r'corpus\.jsonl:2: the key "_id" is missing'),
        ([CORPUS[0], '{"_id": "d2", "title": "x"}'], r'corpus\.jsonl:2: the key "text" is missing'),
        ([CORPUS[0], '{"_id": "", "text": "x"}'], r'corpus\.jsonl:2: "_id" must be a string'),
        ([CORPUS[0], '{"_id": true, "text": "x"}'], r'corpus\.jsonl:2: "_id" must be a string.*got True'),
        ([CORPUS[0], '{"_id": "d 2", "text": "x"}'], r"corpus\.jsonl:2: .* holds no white space, got 'd 2'"),
        ([CORPUS[0], '{"_id": "d2\u3000", "text": "x"}'], r"corpus\.jsonl:2: .* holds no white space"),
        ([CORPUS[0], '{"_id": "d2", "text": 7}'], r'corpus\.jsonl:2: "text" must be a string, got int'),
        (['{"_id": "d2", "text": 7}'], r'corpus\.jsonl:1: "text" must be a string, got int'),
        ([CORPUS[0], '{"_id": "d2", "text": "\\ud800"}'], r"corpus\.jsonl:2: .*surrogates not allowed"),
        ([*CORPUS, CORPUS[0]], r"corpus\.jsonl:3: duplicate id 'd1', first on line 1"),
        ([CORPUS[0], '{"_id": "d2", "title": " ", "text": ""}'], r"corpus\.jsonl:2: empty text for id 'd2'"),
    ],
)
def test_bad_corpus(tmp_path: Path, cache: Path, capfd, corpus: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_beir(write(tmp_path, corpus=corpus))
    assert [p for p in (cache / "collections").iterdir() if p.is_dir()] == []
    assert "".join(capfd.readouterr()) == ""


def test_bad_queries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"queries\.jsonl:4: duplicate id 'q2', first on line 2"):
        load_beir(write(tmp_path, queries=[*QUERIES, QUERIES[1]]))
    with pytest.raises(ValueError, match=r"queries\.jsonl:1: empty text for id 'q1'"):
        load_beir(write(tmp_path, queries=['{"_id": "q1", "title": "a title", "text": " "}']))


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (QRELS[1:], r"qrels/test\.tsv:1: the header must be query-id, corpus-id, score"),
        ([], r"qrels/test\.tsv:1: the header must be .*, got ''"),
        ([*QRELS, "q1 d1 1"], r"qrels/test\.tsv:5: 3 columns"),
        ([QRELS[0], "q1\td1\t1\tx"], r"qrels/test\.tsv:2: 3 columns"),
        ([*QRELS, "q1\td1\t1\tx\ty\tz"], r"qrels/test\.tsv:5: 3 columns"),
        ([*QRELS, "", "q9\td1\t1"], r"qrels/test\.tsv:6: unknown query id 'q9'"),
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


@pytest.mark.parametrize(
    ("name", "line"),
    [("corpus.jsonl", b'{"_id": "d3", "text": "\xff"}\n'), ("qrels/test.tsv", "é\td1\t1\n".encode("latin-1"))],
)
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str, line: bytes) -> None:
    path = write(tmp_path) / name
    lines = path.read_bytes()
    path.write_bytes(lines + line)
    with pytest.raises(ValueError, match=rf"{name}:{len(lines.splitlines()) + 1}: not UTF-8"):
        load_beir(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv is missing.*splits there: test"):
        load_beir(tmp_path, "dev")
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl is missing"):
        load_beir(tmp_path)


def test_a_path_of_load_collection(tmp_path: Path, monkeypatch) -> None:
    folder = write(tmp_path / "my pets")
    (folder / "qrels" / "dev.tsv").write_text("\n".join([QRELS[0], "q2\td2\t1"]))
    assert load_collection(folder).query_ids == ["q1"]
    dev = load_collection(f"{folder}:dev")
    assert dev.query_ids == ["q2"] and dev.name == "my pets:dev"
    monkeypatch.setattr("diffret_lib.data.CHECKOUT", tmp_path)
    assert load_collection("my pets:dev").query_ids == ["q2"]  # from the checkout
    write(tmp_path / "here" / "my pets", QUERIES, QUERIES, [QRELS[0], "q1\tq3\t1"])
    monkeypatch.chdir(tmp_path / "here")
    assert load_collection("my pets").passage_ids == ["q1", "q2", "q3"]  # the current folder comes first
    with pytest.raises(FileNotFoundError, match="no collection 'nothing/here'.*pydocs/pandas-train"):
        load_collection("nothing/here")
    with pytest.raises(ValueError, match="unknown collection 'pydocs/perl'; there are pydocs/pandas"):
        load_collection("pydocs/perl")
