from __future__ import annotations

import gzip
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffret_lib.config import collection_folder
from diffret_lib.data import beir, load_collection
from diffret_lib.data.beir import load_beir
from diffret_lib.data.collection import Collection
from diffret_lib.retrieval.metrics import per_query
from diffret_lib.retrieval.search import rank, to_results
from diffret_lib.retrieval.systems import BM25

CORPUS = ['{"_id": "d1", "title": "Cats", "text": "purr"}', '{"_id": "d2", "text": "dogs bark"}']
QUERIES = ['{"_id": "q1", "text": "who purrs"}', '{"_id": "q2", "text": "unjudged"}', '{"_id": "q3", "text": "none"}']
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q3\td2\t0"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DIFFRET_CACHE", str(folder))
    monkeypatch.delenv("DIFFRET_DATA", raising=False)
    monkeypatch.setattr(beir, "_said", set())
    return folder


def write(folder: Path, corpus=CORPUS, queries=QUERIES, qrels=QRELS, end="\n", start=b"", gz="") -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels/test.tsv", qrels)):
        content = start + (end.join(lines) + end).encode()
        (folder / f"{name}{gz}").write_bytes(gzip.compress(content) if gz else content)
    return folder


def record(name: str, text: str, **more: str) -> str:
    return json.dumps({"_id": name, "text": text, **more}, ensure_ascii=False)


def bm25(found, top_k: int = 10) -> dict[str, dict[str, float]]:
    system = BM25()
    passages, queries = system.encode(found.passages, "passage"), system.encode(found.queries, "query")
    return to_results(*rank(queries, passages, "sparse", top_k, found.excluded), found.query_ids, found.passage_ids)


def test_reads_passages_queries_and_judgements(tmp_path: Path, caplog) -> None:
    found = load_beir(write(tmp_path / "pets"))
    assert found.name == "pets" and found.coverage == "whole" and found.description == "BEIR folder pets, split test"
    assert dict(zip(found.passage_ids, found.passages, strict=True)) == {"d1": "Cats purr", "d2": "dogs bark"}
    assert found.query_ids == ["q1"] and found.queries == ["who purrs"]
    assert found.qrels == {"q1": {"d1": 2, "d2": 0}} and found.excluded is None
    assert not caplog.records


def test_it_is_one_memory_mapped_entry_until_a_file_changes(tmp_path: Path, cache: Path, monkeypatch) -> None:
    texts, reads = beir._texts, []
    monkeypatch.setattr(beir, "_texts", lambda *files: reads.append(files) or texts(*files))
    first = load_beir(write(tmp_path / "pets"))
    (entry,) = [p for p in (cache / "collections").iterdir() if p.is_dir()]
    assert {p.name for p in entry.iterdir()} == {"passages", "queries", "collection.json", "manifest.json"}
    assert all(entry in Path(f["filename"]).parents for f in first.passage_rows.cache_files)
    assert load_beir(tmp_path / "pets").fingerprint == first.fingerprint and len(reads) == 2
    (tmp_path / "pets").rename(tmp_path / "animals")
    assert load_beir(tmp_path / "animals").name == "animals" and len(reads) == 2
    write(tmp_path / "animals", corpus=[*CORPUS, record("d3", "birds")])
    assert len(load_beir(tmp_path / "animals").passages) == 3 and len(reads) == 4


def test_byte_order_mark_crlf_blank_lines_and_gz_change_nothing(tmp_path: Path) -> None:
    plain = load_beir(write(tmp_path / "a"))
    blank = {"corpus": ["", *CORPUS, ""], "queries": [*QUERIES, " "], "qrels": [*QRELS, " ", "\t", ""]}
    for gz in ("", ".gz"):
        odd = load_beir(write(tmp_path / f"b{gz}", **blank, end="\r\n", start=b"\xef\xbb\xbf", gz=gz))
        assert odd.fingerprint == plain.fingerprint


def test_odd_but_sound_records(tmp_path: Path) -> None:
    text = 'tab\tquote " line\nend one\u2028two\x85three é'
    more = [
        record("d3", f" \u3000{text}\n"), '{"_id": 3, "text": "2020-01-01"}',
        '{"_id": "007", "text": null, "title": "only a title"}',
        '{"_id": "d5", "text": "m", "metadata": {"a": 1}}', '{"_id": "d6", "text": "n", "metadata": "none"}',
    ]  # fmt: skip
    found = load_beir(write(tmp_path, [*CORPUS, *more], ['{"_id": 7, "text": "NA"}'], [QRELS[0], "7\t007\t1"]))
    assert found.passage_ids[2:] == ["d3", "3", "007", "d5", "d6"] and found.queries == ["NA"]
    assert found.passages[2:] == [text, "2020-01-01", "only a title", "m", "n"] and found.qrels == {"7": {"007": 1}}


# -- BEIR's own rules


def test_the_query_itself_never_counts_for_it(tmp_path: Path) -> None:
    """ArguAna, Quora."""
    texts = {"pro-1a": "cats are kind animals", "pro-1b": "cats are cruel animals", "pro-2a": "ships sail"}
    corpus = [record(i, text, title="animals") for i, text in texts.items()]
    queries = [record(i, texts[i]) for i in ("pro-1b", "pro-1a")]
    qrels = [QRELS[0], "pro-1a\tpro-1b\t1", "pro-1b\tpro-1a\t1"]
    found = load_beir(write(tmp_path / "arguana", corpus, queries, qrels))
    assert found.excluded.tolist() == [1, 0]
    assert found.protocol()["excluded"] == "the query itself (2 queries)"
    for top_k in (1, 2, 3):
        run = bm25(found, top_k)
        assert {query: list(ranked)[0] for query, ranked in run.items()} == {"pro-1b": "pro-1a", "pro-1a": "pro-1b"}
        assert [len(ranked) for ranked in run.values()] == [min(top_k, 2)] * 2  # as many as without the rule
    assert per_query(found.qrels, bm25(found))["ndcg@10"].tolist() == [1.0, 1.0]
    part = found.restrict(["pro-1a", "pro-2a"], ["pro-1b"])  # without the query's own passage
    assert part.excluded is None and found.restrict(texts, ["pro-1a"]).excluded.tolist() == [0]
    plain = Collection.load(next(Path(os.environ["DIFFRET_CACHE"]).glob("collections/*/")))
    assert plain.fingerprint == found.fingerprint != replace(plain, own=()).fingerprint


def test_an_id_that_is_the_same_by_chance_counts(tmp_path: Path) -> None:
    corpus = [record("1", "a wing in a slipstream"), record("2", "what is lift"), record("3", "How to sort, in C?")]
    queries = [record("1", "what is drag"), record("2", "what is lift"), record("3", "how to sort in c")]
    qrels = [QRELS[0], "1\t2\t1", "2\t2\t1", "3\t2\t1"]
    # numbers: 1 has another text, 2 is judged relevant, 3 is the query
    assert load_beir(write(tmp_path, corpus, queries, qrels)).excluded.tolist() == [-1, -1, 2]


def test_judged_passages_that_are_not_there_count_in_the_ideal_ranking(tmp_path: Path) -> None:
    """ArguAna; a query may have no other relevant passage."""
    qrels = [QRELS[0], "q1\td1\t1", "q1\td9\t1", "q3\td8\t1", "q2\td7\t0"]
    found = load_beir(write(tmp_path, qrels=qrels))
    assert found.qrels == {"q1": {"d1": 1, "d9": 1}, "q3": {"d8": 1}} and list(found.missing) == ["d8", "d9"]
    assert found.relevant("q1") == ["d1"] and found.relevant("q3") == []
    for part in (found, found.restrict(["d1"], ["q1", "q3"])):
        values = per_query(part.qrels, {"q1": {"d1": 2.0}})["ndcg@10"]
        np.testing.assert_allclose(values, [1 / (1 + 1 / np.log2(3)), 0])
    assert found.sample(2, 1).passage_ids == ["d1"] and found.statistics()["relevant_per_query"] == 0.5


def test_passages_without_title_and_text_are_kept(tmp_path: Path) -> None:
    """FiQA."""
    found = load_beir(write(tmp_path, [*CORPUS, record("d3", " ", title=""), '{"_id": "d4", "text": null}']))
    assert found.passages[2:] == ["", ""]
    assert list(bm25(found)["q1"]) == ["d1"]


def test_negative_grades_are_not_relevant(tmp_path: Path) -> None:
    """TREC-COVID."""
    found = load_beir(write(tmp_path, qrels=[QRELS[0], "q1\td1\t1", "q1\td2\t-1", "q2\td1\t-1"]))
    assert found.qrels == {"q1": {"d1": 1, "d2": -1}} and found.relevant("q1") == ["d1"]
    assert found.protocol()["grades"] == "-1, 1"


def test_each_leniency_is_counted_and_said_once(tmp_path: Path, caplog) -> None:
    qrels = [*QRELS, "q1\td1\t2", "q1\td9\t1", "q9\td1\t1", "q8\td1\t1", "q1\td8\t-1"]
    folder = write(tmp_path / "odd", [*CORPUS, record("d3", ""), record("q1", "who purrs")], qrels=qrels)
    with caplog.at_level(logging.WARNING):
        found, again = load_beir(folder), load_beir(folder)
    (said,) = [r.getMessage() for r in caplog.records]
    assert said == (
        "odd: judgements that are there twice (count once): 1; judgements of unknown queries (left out): 2; "
        "negative grades (not relevant): 1; passages without title and text (kept): 1; judged passages that are not in "
        "the corpus (in the ideal ranking): 2; passages that are a query themselves (never count for it): 1"
    )
    assert found.description == again.description == f"BEIR folder odd, split test; {said.removeprefix('odd: ')}"


# -- what is refused


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
        ([CORPUS[0], '{"_id": "\\ufeffd2", "text": "x"}'], r"corpus\.jsonl:2: .* holds no white space"),
        (['{"_id": "d2", "text": 7}'], r'corpus\.jsonl:1: "text" must be a string, got int'),
        ([CORPUS[0], '{"_id": "d2", "text": "\\ud800"}'], r"corpus\.jsonl:2: .*surrogates not allowed"),
        ([*CORPUS, CORPUS[0]], r"corpus\.jsonl:3: duplicate id 'd1', first on line 1"),
        ([""], r"corpus\.jsonl: there is no record in it"),
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
        ([*QRELS, "", "q1\t\t1"], r"qrels/test\.tsv:6: an id must be a string that is not empty"),
        ([*QRELS, "q2\td1\t1.5"], r"qrels/test\.tsv:5: the relevance must be an integer .*, got '1\.5'"),
        ([*QRELS, "q2\td1\t" + "9" * 30], r"qrels/test\.tsv:5: the relevance must be an integer of at most 9 digits"),
        ([*QRELS, "q1\td1\t1"], r"qrels/test\.tsv:5: query 'q1' and passage 'd1' are judged twice, 2 and 1"),
        (QRELS[:1], r"qrels/test\.tsv: no query has a judgement above 0"),
    ],
)
def test_bad_judgements(tmp_path: Path, qrels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_beir(write(tmp_path, qrels=qrels))


def test_bytes_that_are_none_of_the_format(tmp_path: Path) -> None:
    for name, line in (("corpus.jsonl", b'{"_id": "d3", "text": "\xff"}\n'), ("qrels/test.tsv", b"\xe9\td1\t1\n")):
        path = write(tmp_path) / name
        lines = path.read_bytes()
        path.write_bytes(lines + line)
        with pytest.raises(ValueError, match=rf"{name}:{len(lines.splitlines()) + 1}: not UTF-8"):
            load_beir(tmp_path)
    cut = write(tmp_path / "cut", gz=".gz") / "corpus.jsonl.gz"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz:\d: not a whole gzip file"):
        load_beir(tmp_path / "cut")


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv is missing.*splits there: test"):
        load_beir(tmp_path, "dev")
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl is missing"):
        load_beir(tmp_path)


ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
texts = st.text(max_size=20)


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(passages=st.dictionaries(ids, st.tuples(texts, texts), min_size=1, max_size=4), query=st.tuples(ids, texts),
       grade=st.integers(-3, 10**9 + 1), escaped=st.booleans())  # fmt: skip
@example(passages={"d": ("\x1c", "\u2028x\r\n"), "\x7f": ("", "")}, query=("q\u200e", "\x00"), grade=1, escaped=True)
def test_what_is_written_is_read_back_or_refused_by_name(tmp_path_factory, passages, query, grade, escaped) -> None:
    folder = tmp_path_factory.mktemp("made")
    (folder / "qrels").mkdir()
    corpus = [{"_id": i, "title": title, "text": text} for i, (title, text) in passages.items()]
    for name, records in (("corpus", corpus), ("queries", [{"_id": query[0], "text": query[1]}])):
        lines = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in records)
        (folder / f"{name}.jsonl").write_bytes(lines.encode("utf-8", "surrogatepass"))
    judged = next(iter(passages))
    (folder / "qrels" / "test.tsv").write_bytes(f"{QRELS[0]}\n{query[0]}\t{judged}\t{grade}\n".encode())
    sound = all(i.split() == [i] and "\ufeff" not in i for i in (*passages, query[0])) and query[1].strip()
    try:
        found = load_beir(folder)
    except ValueError as error:
        assert not sound or not 0 < grade < 10**9, error
        assert str(error).startswith(str(folder))
    else:
        assert sound and 0 < grade < 10**9
        wanted = {i: " ".join(filter(None, (title.strip(), text.strip()))) for i, (title, text) in passages.items()}
        assert dict(zip(found.passage_ids, found.passages, strict=True)) == wanted
        assert found.queries == [query[1].strip()] and found.qrels == {query[0]: {judged: grade}}


# -- names


def test_paths_and_names_of_load_collection(tmp_path: Path, monkeypatch) -> None:
    folder = write(tmp_path / "my pets")
    (folder / "qrels" / "dev.tsv").write_text("\n".join([QRELS[0], "q2\td2\t1"]))
    assert load_collection(folder).query_ids == ["q1"]
    dev = load_collection(f"{folder}:dev")
    assert dev.query_ids == ["q2"] and dev.name == "my pets:dev"
    monkeypatch.setattr("diffret_lib.config.CHECKOUT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my pets:dev", "~/my pets:dev"):  # from the checkout, from the home folder
        assert load_collection(name).query_ids == ["q2"]
    write(tmp_path / "here" / "my pets", QUERIES, QUERIES, [QRELS[0], "q1\tq3\t1"])
    monkeypatch.chdir(tmp_path / "here")
    assert load_collection("my pets").passage_ids == ["q1", "q2", "q3"]  # the current folder comes first
    for folder, name in (("scifact", "beir/scifact"), ("med", "ir/medline")):
        monkeypatch.setattr(beir, "HUB", str(tmp_path / "nothing"))
        with pytest.raises(FileNotFoundError, match=f"DIFFRET_DATA to a folder with {name.partition('/')[2]}/"):
            load_collection(name)
        write(tmp_path / "data" / folder)
        monkeypatch.setenv("DIFFRET_DATA", "data")
        assert load_collection(name).name == name and collection_folder(name) == (tmp_path / "data" / folder, "test")
        monkeypatch.delenv("DIFFRET_DATA")
    monkeypatch.setenv("DIFFRET_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "scifact" / "qrels" / "train.tsv").write_text("\n".join([QRELS[0], "q3\td2\t1"]))
    train = load_collection("beir/scifact:train")
    assert train.name == "beir/scifact:train" and train.description == "BEIR folder beir/scifact, split train"
    with pytest.raises(FileNotFoundError, match="no collection 'beir/perl': set DIFFRET_DATA .*hub there are arguana"):
        load_collection("beir/perl")
    with pytest.raises(FileNotFoundError, match="no collection 'nothing/here'.*pydocs/pandas-train"):
        load_collection("nothing/here")
    with pytest.raises(ValueError, match="unknown collection 'pydocs/perl'; there are pydocs/pandas"):
        load_collection("pydocs/perl")


def test_a_collection_of_the_hub(tmp_path: Path, monkeypatch) -> None:
    """Files as the hub has them, in a local folder: Parquet of passages and of queries, and judgements by split."""
    revision, of_qrels = beir.REVISIONS["nq"]
    texts, judgements = f"nq@{revision}", f"nq-qrels@{of_qrels}"
    for part, lines in (("corpus", CORPUS), ("queries", QUERIES)):
        rows = [{"title": "", **json.loads(line)} for line in lines]
        (tmp_path / texts / part).mkdir(parents=True)
        for i, row in enumerate(rows):
            shard = f"{part}-0000{i}-of-0000{len(rows)}.parquet"
            datasets.Dataset.from_list([row]).to_parquet(tmp_path / texts / part / shard)
    (tmp_path / judgements).mkdir()
    (tmp_path / judgements / "test.tsv").write_text("\n".join(QRELS))
    monkeypatch.setattr(beir, "HUB", str(tmp_path))
    found = load_collection("beir/nq")
    folder = load_beir(write(tmp_path / "pets"))
    assert found.fingerprint == folder.fingerprint and found.name == "beir/nq"
    assert found.description == f"hub, revision {revision[:7]} beir/nq, split test"
    with pytest.raises(FileNotFoundError, match="nq, split dev: set DIFFRET_DATA to a folder with nq/.* or connect"):
        load_collection("beir/nq:dev")
