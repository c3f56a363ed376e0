from __future__ import annotations

import gc
import gzip
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffret_lib.config import collection_folder
from diffret_lib.data import beir, load_collection
from diffret_lib.data.beir import load_beir, load_training_rows
from diffret_lib.data.protocols import Download, metrics_of, protocol, published, read_published
from diffret_lib.retrieval.metrics import METRICS, per_query
from diffret_lib.retrieval.search import rank, to_results
from diffret_lib.retrieval.systems import BM25

CORPUS = ['{"_id": "d1", "title": "Cats", "text": "purr"}', '{"_id": "d2", "text": "dogs bark"}']
QUERIES = ['{"_id": "q1", "text": "who purrs"}', '{"_id": "q2", "text": "unjudged"}', '{"_id": "q3", "text": "none"}']
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q3\td2\t0"]


@pytest.fixture(autouse=True)
def cache(own_cache, monkeypatch) -> Path:
    monkeypatch.delenv("DIFFRET_DATA", raising=False)
    monkeypatch.setattr(beir, "_said", set())
    return own_cache


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


def entries(cache: Path) -> dict[str, int]:
    return {kind: sum(p.is_dir() for p in (cache / kind).glob("[!.]*")) for kind in ("texts", "judgements")}


def test_texts_are_memory_mapped_and_read_again_when_their_file_changes(tmp_path: Path, cache: Path) -> None:
    first = load_beir(write(tmp_path / "pets"))
    assert entries(cache) == {"texts": 2, "judgements": 1}
    for rows in (first.passage_rows, first.query_rows):
        assert all(cache / "texts" in Path(f["filename"]).parents for f in rows.cache_files)
    (tmp_path / "pets").rename(tmp_path / "animals")
    again = load_beir(tmp_path / "animals")
    assert again.name == "animals" and again.fingerprint == first.fingerprint
    assert entries(cache) == {"texts": 2, "judgements": 1}
    (tmp_path / "animals" / "qrels" / "dev.tsv").write_text("\n".join([QRELS[0], "q2\td1\t1"]))
    assert load_beir(tmp_path / "animals", "dev").query_ids == ["q2"]
    assert entries(cache) == {"texts": 2, "judgements": 2}  # another split has the same texts
    write(tmp_path / "animals", corpus=[*CORPUS, record("d3", "birds")])
    assert len(load_beir(tmp_path / "animals").passages) == 3 and entries(cache) == {"texts": 3, "judgements": 3}


def opening(folder: Path, n: int) -> list[float]:
    """Bytes by which opening a folder of n passages, of some fifty words each, raises the resident set: twice."""
    load_beir(write(folder / "small"))
    write(folder / "large")
    with (folder / "large" / "corpus.jsonl").open("a") as file:
        file.writelines(record(f"p{i}", f"{'some fifty words of a passage ' * 10}{i}") + "\n" for i in range(n))
    raised, process = [], psutil.Process()
    for _ in range(2):  # read, and from the cache
        gc.collect()
        before = process.memory_info().rss
        found = load_beir(folder / "large")
        raised.append(process.memory_info().rss - before)
        assert len(found.passages) == n + 2 and found.passages[n + 1].endswith(f" {n - 1}")
    return raised


def test_opening_takes_500_mb_for_a_million_passages_at_most(tmp_path: Path) -> None:
    """A part of it, in proportion; ``PYTHONPATH=. python tests/test_beir.py`` opens the million."""
    assert max(opening(tmp_path, 50_000)) < 500e6 * 50_000 / 1e6


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
    assert replace(found, own=()).excluded is None and replace(found, own=()).fingerprint != found.fingerprint


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
    assert found.passages[2:] == ["", "who purrs"]
    (said,) = [r.getMessage() for r in caplog.records]
    assert said == (
        "odd: judgements that are there twice (count once): 1; judgements of unknown queries (left out): 2; "
        "negative grades (not relevant): 1; passages without title and text (kept): 1; judged passages that are not in "
        "the corpus (in the ideal ranking): 2; passages that are a query themselves (never count for it): 1"
    )
    assert found.description == again.description == f"BEIR folder odd, split test; {said.removeprefix('odd: ')}"


# -- what is refused


@pytest.mark.parametrize(("file", "lines", "message"), [
    ("corpus", [CORPUS[0], "", '{"_id": "d2", '], r"corpus\.jsonl:3: malformed JSON"),
    ("corpus", [CORPUS[0], '["d2"]'], r"corpus\.jsonl:2: a JSON object is needed, got list"),
    ("corpus", [CORPUS[0], '{"id": "d2", "text": "x"}'], r'corpus\.jsonl:2: the key "_id" is missing'),
    ("corpus", [CORPUS[0], '{"_id": "d2", "title": "x"}'], r'corpus\.jsonl:2: the key "text" is missing'),
    ("corpus", [CORPUS[0], '{"_id": "", "text": "x"}'], r'corpus\.jsonl:2: "_id" must be a string'),
    ("corpus", [CORPUS[0], '{"_id": true, "text": "x"}'], r'corpus\.jsonl:2: "_id" must be a string.*got True'),
    ("corpus", [CORPUS[0], '{"_id": "d 2", "text": "x"}'], r"corpus\.jsonl:2: .* holds no white space, got 'd 2'"),
    ("corpus", [CORPUS[0], '{"_id": "d2\u3000", "text": "x"}'], r"corpus\.jsonl:2: .* holds no white space"),
    ("corpus", [CORPUS[0], '{"_id": "\\ufeffd2", "text": "x"}'], r"corpus\.jsonl:2: .* holds no white space"),
    ("corpus", ['{"_id": "d2", "text": 7}'], r'corpus\.jsonl:1: "text" must be a string, got int'),
    ("corpus", [CORPUS[0], '{"_id": "d2", "text": "\\ud800"}'], r"corpus\.jsonl:2: .*surrogates not allowed"),
    ("corpus", [*CORPUS, CORPUS[0]], r"corpus\.jsonl:3: duplicate id 'd1', first on line 1"),
    ("corpus", [""], r"corpus\.jsonl: there is no record in it"),
    ("queries", [*QUERIES, QUERIES[1]], r"queries\.jsonl:4: duplicate id 'q2', first on line 2"),
    ("queries", ['{"_id": "q1", "title": "a title", "text": " "}'], r"queries\.jsonl:1: empty text for id 'q1'"),
    ("qrels", QRELS[1:], r"qrels/test\.tsv:1: the header must be query-id, corpus-id, score"),
    ("qrels", [], r"qrels/test\.tsv:1: the header must be .*, got ''"),
    ("qrels", [*QRELS, "q1 d1 1"], r"qrels/test\.tsv:5: 3 columns"),
    ("qrels", [QRELS[0], "q1\td1\t1\tx"], r"qrels/test\.tsv:2: 3 columns"),
    ("qrels", [*QRELS, "", "q1\t\t1"], r"qrels/test\.tsv:6: an id must be a string that is not empty"),
    ("qrels", [*QRELS, "q2\td1\t1.5"], r"qrels/test\.tsv:5: the relevance must be an integer .*, got '1\.5'"),
    (
        "qrels", [*QRELS, "q2\td1\t" + "9" * 30],
        r"qrels/test\.tsv:5: the relevance must be an integer of at most 9 digits",
    ),
    ("qrels", [*QRELS, "q1\td1\t1"], r"qrels/test\.tsv:5: query 'q1' and passage 'd1' are judged twice, 2 and 1"),
    ("qrels", QRELS[:1], r"qrels/test\.tsv: no query has a judgement above 0"),
])  # fmt: skip
def test_faults_are_named(tmp_path: Path, cache: Path, capfd, file: str, lines: list[str], message: str) -> None:
    """And nothing is kept of the file that has one."""
    with pytest.raises(ValueError, match=message):
        load_beir(write(tmp_path, **{file: lines}))
    assert entries(cache) == {"texts": ["corpus", "queries", "qrels"].index(file), "judgements": 0}
    assert "".join(capfd.readouterr()) == ""


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
    with pytest.raises(FileNotFoundError, match="no collection 'beir/perl': set DIFFRET_DATA .*are msmarco/train, "):
        load_collection("beir/perl")
    with pytest.raises(FileNotFoundError, match="no collection 'nothing/here'.*pydocs/pandas-train"):
        load_collection("nothing/here")
    with pytest.raises(ValueError, match="unknown collection 'pydocs/perl'; there are pydocs/pandas"):
        load_collection("pydocs/perl")


def test_msmarco_is_one_folder_with_judgements_of_its_own_for_each_name(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "msmarco"
    queries = [record("1", "what is lift"), record("2", "what is drag"), record("3", "who flies")]
    write(folder, [record("1", "what is lift, they ask"), record("2", "air drags")], queries, [QRELS[0], "2\t2\t3"])
    for split, row in (("dev", "1\t2\t1"), ("trec-dl-2020", "3\t2\t2"), ("train", "2\t1\t1")):
        (folder / "qrels" / f"{split}.tsv").write_text(f"{QRELS[0]}\n{row}\n")
    monkeypatch.setenv("DIFFRET_DATA", str(tmp_path))
    found = {name: load_collection(f"msmarco/{name}") for name in ("train", "dev", "dl19", "dl20")}
    assert [c.name for c in found.values()] == [f"msmarco/{name}" for name in found]
    assert [c.query_ids[0] for c in found.values()] == ["2", "1", "2", "3"]  # BEIR's test.tsv is DL 2019
    assert found["dev"].excluded is None  # its passage 1 holds query 1, and counts all the same
    rows = pd.DataFrame(map(protocol, found.values()))
    assert rows["metric"].tolist() == ["mrr@10", "mrr@10", "ndcg@10", "ndcg@10"]
    assert (rows["passage"] == "text").all() and rows["licence"].str.startswith("non-commercial").all()
    graded = "grade above 0; 2 or more for MRR and recall"
    assert rows["relevant"].tolist() == ["grade above 0", "grade above 0", graded, graded]
    with pytest.raises(FileNotFoundError, match=r"dl20\.tsv is missing.*splits there: dev, test, train"):
        (folder / "qrels" / "trec-dl-2020.tsv").unlink()
        load_collection("msmarco/dl20")


def test_metrics_count_grades_as_published() -> None:
    qrels, run = {"q": {"a": 1, "b": 2, "c": 3}}, {"q": {"a": 3.0, "b": 2.0}}
    values = {m: v.item() for m, v in per_query(qrels, run, metrics_of("msmarco/dl20")).items()}
    assert values["mrr@10-l2"] == 1 / 2 and values["recall@100-l2"] == 1 / 2  # a is not relevant, c not found
    dcg = [sum(g / np.log2(i + 2) for i, g in enumerate(grades)) for grades in ((1, 2), (3, 2, 1))]
    assert values["ndcg@10"] == pytest.approx(dcg[0] / dcg[1])
    assert metrics_of("msmarco/dev") == ("mrr@10", "ndcg@10", "recall@100")
    assert metrics_of("beir/scifact:train") == metrics_of("my own") == METRICS


def test_the_table_of_published_collections() -> None:
    table = read_published()
    kinds = [name.partition("/")[0] for name in table]
    assert {kind: kinds.count(kind) for kind in kinds} == {"msmarco": 4, "beir": 7, "nano": 13}
    assert [name for name, row in table.items() if row.revision is None] == ["beir/quora"]
    assert "newest (not pinned)" in str(table["beir/quora"]) and "revision 4163ba0" in str(table["nano/fiqa2018"])
    assert table["beir/scifact"].passages == 5183 and table["msmarco/dl20"].metrics[0] == "ndcg@10"


# -- the hub: its files, in a local folder


def parquet(folder: Path, rows: list[dict], shards: int = 1) -> None:
    folder.mkdir(parents=True)
    for i in range(shards):
        datasets.Dataset.from_list(rows[i::shards]).to_parquet(folder / f"x-0000{i}-of-0000{shards}.parquet")


def texts_on_the_hub(hub: Path, name: str, **keys: str) -> Path:
    """Passages and queries in the repository of a published collection."""
    row = published(name)
    folder = hub / f"{row.hub}@{row.revision}"
    parquet(folder / "corpus", [keys | json.loads(line) for line in CORPUS], shards=2)
    parquet(folder / "queries", [keys | json.loads(line) for line in QUERIES])
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(beir, "HUB", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_collection_of_the_hub(tmp_path: Path, hub: Path) -> None:
    """Parquet of passages and of queries, and judgements by split."""
    assert not beir.in_cache(published("beir/nq"))
    texts_on_the_hub(hub, "beir/nq", title="")
    judged = published("beir/nq").judgements
    folder = hub / f"{judged.hub}@{judged.revision}"
    folder.mkdir(parents=True)
    (folder / "test.tsv").write_text("\n".join(QRELS))
    found = load_collection("beir/nq")
    assert found.fingerprint == load_beir(write(tmp_path / "pets")).fingerprint and found.name == "beir/nq"
    assert found.description == "hub, BeIR/nq, revision b7253e6, split test" and beir.in_cache(published("beir/nq"))
    with pytest.raises(FileNotFoundError, match="split dev: set DIFFRET_DATA to a folder with nq/.* connect to"):
        load_collection("beir/nq:dev")


def test_nanobeir_has_tables_of_judgements_without_grades(hub: Path) -> None:
    folder = texts_on_the_hub(hub, "nano/scifact")
    parquet(folder / "qrels", [{"query-id": "q1", "corpus-id": "d1"}, {"query-id": "q3", "corpus-id": "d2"}])
    found = load_collection("nano/scifact")
    assert found.qrels == {"q1": {"d1": 1}, "q3": {"d2": 1}} and found.passages[0] == "Cats purr"
    with pytest.raises(FileNotFoundError, match="nano/fiqa2018.*folder with nano/fiqa2018/, a BEIR folder"):
        load_collection("nano/fiqa2018")


def test_dl_2020_has_queries_and_judgements_of_its_own(tmp_path: Path, hub: Path, monkeypatch) -> None:
    texts_on_the_hub(hub, "msmarco/dl20")
    row, update = published("msmarco/dl20"), {}
    content = {"topics": gzip.compress(b"7\twho purrs\n8\tunjudged\n"), "judgements": b"7 0 d1 3\n7 0 d2 0\n"}
    for key, data in content.items():
        path = tmp_path / getattr(row, key).url.rpartition("/")[2]
        path.write_bytes(data)
        update[key] = Download(url=path.as_uri(), md5=hashlib.md5(data).hexdigest())
    monkeypatch.setattr(beir, "published", lambda name: row.model_copy(update=update))
    found = load_collection("msmarco/dl20")
    assert found.query_ids == ["7"] and found.queries == ["who purrs"] and found.qrels == {"7": {"d1": 3, "d2": 0}}
    update["judgements"] = Download(url=update["judgements"].url, md5=32 * "0")
    with pytest.raises(ValueError, match="2020qrels-pass.txt has the MD5 .*, not 0000.* damaged, or another version"):
        load_collection("msmarco/dl20")


# -- training rows


def training_line(name: str, **changes: object) -> str:
    passage = {"docid": "1", "title": "Cats", "text": "purr"}
    row = {"query_id": name, "query": "who purrs", "positive_passages": [passage],
           "negative_passages": [{"docid": "2", "title": "", "text": "dogs"}, passage | {"title": None}]}  # fmt: skip
    return json.dumps(row | changes)


def test_training_rows_of_a_file_and_of_the_hub(tmp_path: Path, hub: Path, cache: Path, monkeypatch) -> None:
    lines = "\n".join([training_line("1"), training_line("2", negative_passages=[])]).encode()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    rows = load_training_rows(tmp_path / "rows.jsonl.gz")
    assert rows[0] == {"query_id": "1", "query": "who purrs", "positives": ["Cats purr"], "negatives": ["dogs", "purr"]}
    assert rows[1]["negatives"] == [] and cache in Path(rows.cache_files[0]["filename"]).parents
    with pytest.raises(FileNotFoundError, match="Tevatron/msmarco-passage-aug@main/train.jsonl.gz"):
        load_training_rows()
    folder = hub / f"{beir.TRAINING_ROWS.hub}@main"
    folder.mkdir(parents=True)
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(lines))
    assert load_training_rows().to_list() == rows.to_list()
    mirror = tmp_path / "data" / "msmarco-passage-aug"
    mirror.mkdir(parents=True)
    (mirror / "train.jsonl.gz").write_bytes(gzip.compress(training_line("3").encode()))
    monkeypatch.setenv("DIFFRET_DATA", str(tmp_path / "data"))
    assert load_training_rows()["query_id"][:] == ["3"]


@pytest.mark.parametrize(("change", "message"), [
    ({"query_id": "1"}, "duplicate id '1', first on line 1"),
    ({"query": " "}, "empty text for id '2'"),
    ({"positive_passages": []}, "query '2' has no positive passage"),
    ({"negative_passages": "none"}, '"negative_passages" must be a list, got str'),
    ({"negative_passages": ["text"]}, "malformed JSON"),
    ({"positive_passages": [{"title": "x"}]}, 'the key "text" is missing'),
])  # fmt: skip
def test_bad_training_rows(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{training_line('1')}\n\n{training_line('2', **change)}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: {message}"):
        load_training_rows(tmp_path / "rows.jsonl")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*other\.jsonl: training\.rows names one"):
        load_training_rows(tmp_path / "other.jsonl")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        os.environ["DIFFRET_CACHE"] = f"{work}/cache"
        read, again = opening(Path(work), 1_000_000)
        print(f"a million passages: {read / 1e6:.0f} MB to read them, {again / 1e6:.0f} MB more to open them again")
