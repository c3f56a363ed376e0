from __future__ import annotations

import json
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from diffret_lib.cache import _MACHINE, StorageError
from diffret_lib.config import CHECKOUT, load_profile
from diffret_lib.report import results as module
from diffret_lib.report.results import Results, default_root, paper_against_ours, readable, telling_collections


@pytest.fixture
def results(tmp_path) -> Results:
    return Results("smoke", tmp_path)


FRAME = pd.DataFrame({
    "system": ["PromptReps", "a|b & 50%_<i>"], "value": [1 / 3, np.nan], "ndcg@10": [0.5, 0.123456789012345],
    "k": [1, 16], "words": ["x", "two\nlines"],
})  # fmt: skip


def cells_of(path) -> list[list[str]]:
    """The rows of a table in Markdown, its caption and the rule left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.replace(r"\|", "\0").strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def test_folders(results, tmp_path):
    for name in ("tables", "figures", "notebooks"):
        assert (tmp_path / "smoke" / name).is_dir()
    assert results.path("runs", "a.json") == (tmp_path / "smoke" / "runs" / "a.json").resolve()
    assert (tmp_path / "smoke" / "runs").is_dir()
    assert Results(load_profile("smoke"), tmp_path).folder == results.folder
    for wrong in ("../x", None):
        with pytest.raises(ValueError, match=f"profile name {wrong!r}"):
            Results(wrong, tmp_path)


@pytest.mark.parametrize("place", ["smoke", "smoke/tables"])
def test_a_file_in_place_of_a_folder(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("")
    with pytest.raises(StorageError) as error:
        Results("smoke", tmp_path)
    message = str(error.value)
    assert f"{place} is a file, and a folder is needed" in message and "\n" not in message


def test_default_root_is_the_checkouts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert default_root() == CHECKOUT / "results"
    monkeypatch.setattr(module, "CHECKOUT", tmp_path / "site")
    assert default_root() == tmp_path / "results"


def test_csv_keeps_every_digit_and_markdown_is_read(results):
    results.table(FRAME, "t", caption="Zero shot", floatfmt={"value": ".2f"})
    read = pd.read_csv(results.tables / "t.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(read, FRAME, check_exact=True, check_dtype=False)
    assert b"\r" not in (results.tables / "t.csv").read_bytes()
    lines = (results.tables / "t.md").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["**Zero shot**", ""]
    assert [rule.endswith(":") for rule in lines[3].strip("|").split("|")] == [False, True, True, True, False]
    assert cells_of(results.tables / "t.md") == [
        ["system", "value", "ndcg@10", "k", "words"], ["PromptReps", "0.33", "0.500", "1", "x"],
        ["a\0b & 50%_<i>", "", "0.123", "16", "two lines"],
    ]  # fmt: skip
    results.data(FRAME, "long")  # a CSV alone
    assert [p.name for p in results.tables.glob("long.*")] == ["long.csv"]
    assert (results.tables / "long.csv").read_bytes() == (results.tables / "t.csv").read_bytes()
    for write in (results.table, results.data):
        with pytest.raises(ValueError, match="table name 'a/b'"):
            write(FRAME, "a/b")


def test_intervals_marks_and_p():
    frame = pd.DataFrame({
        "difference": [0.5, 0.25, np.nan], "mark": ["†", "", ""], "low": [0.41, -0.1, np.nan],
        "high": [10.6, 0.6, np.nan], "low_all": [0.1, -0.2, np.nan], "high_all": [0.9, 0.7, np.nan],
        "p": [0.0002, 0.2, np.nan], "p_corrected": [0.0004, 0.4, np.nan], "ratio": [12.0, 1.5, np.nan],
        "ratio_low": [11.0] * 3, "ratio_high": [13.0] * 3, "size_kb": [10000.0, 197.234, np.nan],
        "fingerprint": ["ab" * 32] * 3, "note": [""] * 3, "rate": [0.0005, 0.00012345, 0.0],
    })  # fmt: skip
    shown = readable(frame)
    assert shown["rate"].tolist() == ["0.0005", "0.000123", "0"]
    assert shown["difference"].tolist() == ["0.500† [0.410, 10.600]*", "0.250 [-0.100, 0.600]", ""]
    assert shown["interval over collections too"].tolist() == ["[0.100, 0.900]", "[-0.200, 0.700]", ""]
    assert shown["p"].tolist() == ["< .001", ".200", ""] and shown["p corrected"].tolist() == ["< .001", ".400", ""]
    assert shown["ratio"].tolist()[:2] == ["12.0 [11.0, 13.0]", "1.5 [11.0, 13.0]"]
    assert shown["size kb"].tolist() == ["10000", "197", ""] and shown["fingerprint"][0] == "ab" * 6
    assert "note" not in shown and "low" not in shown
    assert readable(frame, {"difference": ".1f"})["difference"][0] == "0.5† [0.4, 10.6]*"
    small = readable(pd.DataFrame({"change": [-0.0001, -0.5], "needed_queries": [1234.0, 441468730.0]}))
    assert small["change"].tolist() == ["0.000", "-0.500"]
    assert small["needed queries"].tolist() == ["1,234", "> 100,000"]


def wide() -> pd.DataFrame:
    rows = [("zero-shot", "X single", "dense", 0.5, 0.4, 0.6), ("zero-shot", "X multi", "dense", 0.625, 0.5, 0.75),
            ("fine-tuned", "X multi", "dense", 0.75, 0.9, 0.6)]  # fmt: skip
    return pd.DataFrame(rows, columns=["training", "system", "mode", "macro", "one", "two"])


def test_effectiveness(results):
    intervals = wide()[["training", "system", "mode"]].assign(value=0.5, low=0.25, high=0.875)[::-1]
    pairs = [("X multi", "X single"), ("X multi, fine-tuned", "X multi"), ("X single", "X multi")]
    about = {"mode": "dense", "reading": ["better", "better", "worse"]}
    comparisons = pd.DataFrame(pairs, columns=["better", "than"]).assign(**about)
    results.effectiveness(wide(), "e", "nDCG@10.", intervals, comparisons)
    saved = pd.read_csv(results.tables / "e.csv")
    assert list(saved) == ["training", "system", "mode", "macro", "low", "high", "one", "two"]
    assert "(corrected p < 0.05)" in (results.tables / "e.md").read_text(encoding="utf-8")
    rows = cells_of(results.tables / "e.md")
    assert rows[0] == ["system", "macro", "one", "two"]
    assert rows[1] == ["X single (dense)", "0.500 [0.250, 0.875]", "0.400", "0.600"]
    assert rows[2] == ["X multi (dense)", "0.625* [0.250, 0.875]", "0.500", "**0.750**"]
    assert rows[3] == ["X multi, fine-tuned (dense)", "**0.750† [0.250, 0.875]**", "**0.900**", "0.600"]
    assert "font-weight: bold" in results.effectiveness(wide(), "plain", "").html
    assert telling_collections("recall@100", {"small": 100, "large": 101}) == ["large"]
    assert telling_collections("ndcg@10", {"small": 5, "large": 101}) == ["small", "large"]


def test_paper_against_ours():
    columns = "claim comparison direction statistic bound value low high queries counts verdict".split()
    rows = [
        (1, "z − y", "greater", "macro difference", 0.0, np.nan, np.nan, np.nan, 0, True, "not tested"),
        (1, "a − b", "greater", "macro difference", 0.0, 0.5, 0.25, 0.75, 240, True, "supported"),
        (3, "c − d", "no gain", "macro difference", 0.02, -0.1, -0.2, 0.01, 240, True, "supported"),
        (4, "e", "about", "ratio of latencies", 15.0, 8.1, 7.9, 8.3, 0, True, "contradicted"),
        (4, "f", "at most", "ratio of latencies", 1.25, 2.5, 2.25, 2.75, 0, False, "contradicted"),
    ]
    table = paper_against_ours(pd.DataFrame(rows, columns=columns))
    assert table["paper"].tolist() == ["better", "better", "no reliable gain", "15 times"]
    assert table["ours"].tolist() == ["", "more", "not clear", "less"]  # 8 times is less than the paper's 15


def test_latex(results):
    results.table(FRAME, "t", caption="50% of_it")
    text = (results.tables / "t.tex").read_text(encoding="utf-8")
    row = r"a\textbar{}b \& 50\%\_\allowbreak{}\textless{}i\textgreater{} &  & 0.123 & 16 & two lines \\"
    for part in (r"\toprule", r"\bottomrule", r"\label{tab:t}", r"\begin{table}[tbp]", "{k}", "table-format=-1.3", row):
        assert part in text
    results.table(pd.concat([FRAME] * 31), "t")
    assert not (results.tables / "t.tex").exists()  # nobody prints so many rows


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdfLaTeX on this machine")
def test_latex_compiles_as_it_is(results, tmp_path):
    words = ["− ␣ · × † ≥ “日本” é & % $x_1$ \\ ~^{}#", "tables/per_query.csv, " * 20, "plain"]
    numbers = {"value": [0.5, -1.25, np.nan], "low": [0.25, -2, np.nan], "high": 1.0, "p": [0.0001, 0.5, np.nan]}
    many = {f"column {i}": [0.125] * 3 for i in range(16)}
    hard = pd.DataFrame({"words_and_signs": words} | numbers | {"number": [1, 20, 300]} | many)
    results.table(hard, "hard", caption="100 % − “hard” & more", bold=hard == 0.125)
    results.effectiveness(wide(), "e", "nDCG@10")
    results.table(pd.DataFrame({"one": ["a row that breaks into several lines " * 4] * 33, "value": 0.5}), "tall")
    packages = (results.tables / "hard.tex").read_text(encoding="utf-8").splitlines()[0].removeprefix("% ")
    body = "\n".join(rf"\input{{{results.tables / name}}}" for name in ("hard", "e", "tall"))
    parts = "\\documentclass[twocolumn]{article}", packages, "\\begin{document}", body, "\\end{document}"
    document = "\n".join(parts)
    (tmp_path / "paper.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and (tmp_path / "paper.pdf").stat().st_size > 10_000, done.stdout[-3000:]
    assert "Float too large" not in done.stdout


def test_what_a_notebook_shows(results):
    shown = results.table(FRAME, "t", caption="a < b")
    markup = shown._repr_html_()
    assert "a &lt; b" in markup and "50%_&lt;i&gt;" in markup and ">0.333</td>" in markup
    assert markup == results.table(FRAME, "t", caption="a < b")._repr_html_()
    assert repr(shown) == (results.tables / "t.md").read_text(encoding="utf-8").rstrip("\n")
    assert "0x" not in repr(shown)


def test_a_table_without_rows(results):
    results.table(pd.DataFrame({"a": [], "b": []}), "none")
    assert (results.tables / "none.csv").read_text(encoding="utf-8") == "a,b\n"


def test_figures_are_the_same_bytes_again(results):
    module.set_style()
    found = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.fill_between([1, 2], [1, 3], label="$x$")
        axes.legend()
        results.figure(figure, "f")
        plt.close(figure)
        found.append([(results.figures / f"f.{ending}").read_bytes() for ending in ("png", "svg")])
    assert found[0] == found[1]
    png, svg = found[0]
    assert png.startswith(b"\x89PNG") and b"<svg" in svg and b"<dc:date>" not in svg
    assert sorted(p.name for p in results.figures.iterdir()) == ["f.png", "f.svg"]


def test_a_failed_write_leaves_nothing(results):
    class Broken:
        def savefig(self, path, **options):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results.figure(Broken(), "f")
    assert list(results.figures.iterdir()) == []


def test_run_json_is_merged(results):
    assert results.run() == {}
    results.record("pydocs/numpy", "abc")
    results.record("backbone", "old")
    results.record("backbone", {"a": np.float32(0.5), "n": np.arange(2)})
    results.record("sample", 7, section="seeds")
    results.record_run("01_backbones", seconds=1.2345, peak_memory_bytes=5, status="ok")
    results.record_run("01_backbones", seconds=2, peak_memory_bytes=None)
    results.record_run("02_mask_count_ablation", seconds=3, peak_memory_bytes=6)
    profile = load_profile("smoke")
    results.record_environment(profile)
    run = json.loads(results.run_file.read_text(encoding="utf-8"))
    assert run["fingerprints"] == {"pydocs/numpy": "abc", "backbone": {"a": 0.5, "n": [0, 1]}}
    assert run["seeds"] == {"sample": 7, "profile": profile.seed}
    assert run["notebooks"] == {
        "01_backbones": {"seconds": 2.0, "peak_memory_bytes": None},
        "02_mask_count_ablation": {"seconds": 3.0, "peak_memory_bytes": 6},
    }
    assert run["profile"]["fingerprint"] == profile.fingerprint
    assert run["profile"]["content"]["test_collections"] == profile.test_collections
    assert run["versions"]["numpy"] == np.__version__ and run["versions"]["python"]
    found = run["hardware"]
    assert found["cpu"] and found["cores_usable"] >= 1 and found["memory_bytes"] > 0 and isinstance(found["gpu"], list)
    assert [p.name for p in results.folder.iterdir() if p.is_file()] == ["run.json"]


def test_a_broken_record_is_named(results):
    for damaged in ("{", "[]", '{"notebooks": 5}'):
        results.run_file.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=r"run\.json: not a JSON object of objects .*remove it"):
            results.record("a", 1)
    results.run_file.unlink()
    with pytest.raises(AttributeError, match="tolist"):
        results.record("a", object())
    assert not results.run_file.exists()


def test_start(tmp_path, monkeypatch):
    """The first call of a notebook, in a process of its own: what it returns, shows, records and leaves."""
    code = (
        "from diffret_lib.report import start\n"
        f"study, results = start('smoke', None, {str(tmp_path / 'results')!r})\n"
        "print(study.profile.name, results.run()['profile']['content']['name'])\n"
    )
    # no process has this number
    left = tmp_path / "results" / "smoke" / "tables" / f".a.4194305-{_MACHINE}0000.tmp.csv"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    monkeypatch.setenv("DIFFRET_PEAK_FILE", str(tmp_path / "peak"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert "smoke smoke" in done.stdout
    assert not left.exists() and int((tmp_path / "peak").read_text()) > 10_000_000
