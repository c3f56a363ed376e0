"""``make`` in a small checkout of its own: what runs, what runs again, and what make variables cannot do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from diffret_lib.cache import _MACHINE
from diffret_lib.config import CHECKOUT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")
NAMES = ["01_first", "02_second"]
WRITE = """from pathlib import Path
folder = Path("../results/smoke/tables")
folder.mkdir(parents=True, exist_ok=True)
(folder / "NAME.csv").write_text(str(profile["seed"]))
print("profile", profile["name"], "collection", collection)
"""
SHOW = """import sys
from tqdm import tqdm
for _ in tqdm(range(3), desc="Bar"):
    pass
print("kept")
print("warned", file=sys.stderr)
import matplotlib.pyplot as plt
plt.plot([1, 2]); plt.show()
import os; open(os.environ["DIFFRET_PEAK_FILE"], "w").write("12345")
"""


def write(path: Path, *cells: str, name: str) -> None:
    code = [new_code_cell("profile, collection = 'embedded', None", metadata={"tags": ["parameters"]}, id="parameters")]
    code += [new_code_cell(cell.replace("NAME", name), id=f"c{number}") for number, cell in enumerate(cells)]
    notebook = new_notebook(cells=[new_markdown_cell("# Title", id="title"), *code])
    notebook.metadata.kernelspec = {"name": "some-other-kernel", "display_name": "x", "language": "python"}
    nbformat.write(notebook, path)


CHECK = """from diffret_lib.config import ProfileError
def check(profile):
    if "bad" in profile.test_collections:
        raise ProfileError("test_collections: bad: no good")
"""


class Copy:
    """A checkout with two small notebooks, and make in it; nothing is loaded to check a profile but its names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("Makefile", "scripts", "requirements.lock", "pyproject.toml", "README.md", "diffret_lib"):
            ignore = shutil.ignore_patterns("adapters", "__pycache__")
            if (CHECKOUT / name).is_dir():
                shutil.copytree(CHECKOUT / name, root / name, ignore=ignore)
            else:
                shutil.copy(CHECKOUT / name, root / name)
        (root / "scripts" / "plan.py").write_text(CHECK)
        (root / "notebooks" / "profiles").mkdir(parents=True)
        shutil.copy(CHECKOUT / "notebooks/profiles/smoke.yml", root / "notebooks/profiles")
        write(self.notebook(0), WRITE, SHOW, name=NAMES[0])
        write(self.notebook(1), WRITE, name=NAMES[1])
        content = self.notebook(1).read_bytes()
        self.notebook(1).write_bytes(b"\xef\xbb\xbf" + content)  # with a byte-order mark
        kernels = root / "jupyter" / "kernels" / "python3"  # a registered python3 that is another interpreter
        kernels.mkdir(parents=True)
        (kernels / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
        self.results = root / "results" / "smoke"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "CONDA"))}
        self.environment |= {"VIRTUAL_ENV": sys.prefix, "DIFFRET_CACHE": str(root / "cache"), "MPLBACKEND": "agg",
                             "JUPYTER_PATH": str(root / "jupyter"), "LC_ALL": "C"}  # fmt: skip
        self.environment.pop("PYTHONPATH", None)

    def notebook(self, number: int) -> Path:
        return self.root / "notebooks" / f"{NAMES[number]}.ipynb"

    def command(self, *words: str, **environment: str) -> dict:
        return {
            "args": ["make", *words], "cwd": self.root, "env": self.environment | environment, "text": True,
            "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT,
        }  # fmt: skip

    def make(self, *words: str, **environment: str) -> tuple[int, str]:
        done = subprocess.run(**self.command(*words, **environment), timeout=120)
        return done.returncode, done.stdout

    def runs(self, *words: str, **environment: str) -> list[str]:
        """Names of the notebooks that make would run."""
        status, output = self.make("-n", "reproduce", "PROFILE=smoke", *words, **environment)
        assert status == 0, output
        return [name for name in NAMES if f"== {name} " in output]


@pytest.fixture
def checkout(tmp_path) -> Copy:
    root = tmp_path / "a checkout; $HOME"  # no path is ever run either
    root.mkdir()
    return Copy(root)


def test_a_run_and_what_runs_again(checkout):
    root, results = checkout.root, checkout.results
    folder, given = root / "my corpus", "COLLECTION=my corpus:dev"  # a space and a split
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("{}\n")
    (folder / "qrels" / "dev.tsv.gz").write_text("")
    (results / "notebooks").mkdir(parents=True)
    (results / "notebooks" / f"{NAMES[1]}.failed.ipynb").write_text("of an earlier run")
    status, output = checkout.make("reproduce", "PROFILE=smoke", given)
    assert status == 0 and "results/smoke is up to date" in output, output
    assert [p.name for p in sorted((results / "notebooks").iterdir())] == [f"{name}.ipynb" for name in NAMES]
    executed = results / "notebooks" / f"{NAMES[0]}.ipynb"
    notebook = nbformat.read(executed, as_version=4)
    nbformat.validate(notebook)
    assert [cell["id"] for cell in notebook.cells] == ["title", "parameters", "injected-parameters", "c0", "c1"]
    assert notebook.cells[3].outputs[0]["text"] == "profile smoke collection my corpus:dev\n"
    streams = {o["name"]: o["text"] for o in notebook.cells[4].outputs if o.output_type == "stream"}
    assert streams == {"stdout": "kept\n", "stderr": "warned\n"}
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[4].outputs)
    assert str(root) not in executed.read_text(encoding="utf-8") and "papermill" not in str(notebook.metadata)
    run = json.loads((results / "run.json").read_text(encoding="utf-8"))["notebooks"]
    assert run[NAMES[0]]["status"] == "ok" and run[NAMES[0]]["peak_memory_bytes"] == 12345
    assert 0 < run[NAMES[0]]["seconds"] < 120 and len(run[NAMES[1]]["sha256"]) == 64
    assert checkout.runs(given) == checkout.runs(COLLECTION="my corpus:dev") == []
    assert checkout.runs() == NAMES  # the results are those with the collection
    (folder / "corpus.jsonl").touch()
    assert checkout.runs(given) == []
    (folder / "qrels" / "dev.tsv.gz").write_text("a\tb\t1\n")  # an edit of its files
    assert checkout.runs(given) == NAMES
    (folder / "qrels" / "dev.tsv.gz").write_text("")
    status, output = checkout.make("reproduce", "PROFILE=smoke", "COLLECTION=nowhere:dev")
    assert status == 2 and "COLLECTION: there is no folder 'nowhere:dev'" in output
    assert checkout.runs("COLLECTION=nano/nq msmarco/dev") == NAMES  # published ones need no folder
    assert "no folder 'beir/perl'" in checkout.make("reproduce", "PROFILE=smoke", "COLLECTION=beir/perl")[1]
    (root / "bad").mkdir()  # several: the profile is checked with them, before anything runs
    status, output = checkout.make("reproduce", "PROFILE=smoke", "COLLECTION='my corpus' bad")
    assert status == 2 and "error: test_collections: bad: no good" in output and "== 0" not in output
    profile = root / "notebooks/profiles/smoke.yml"
    content = profile.read_text(encoding="utf-8")
    profile.write_text(content.replace("test_collections:", "test_collections:\n    - beir/mine", 1), encoding="utf-8")
    (root / "data" / "mine").mkdir(parents=True)

    def inputs() -> str:
        assert checkout.runs(DIFFRET_DATA="data") == NAMES
        return (root / "build/smoke" / f"{NAMES[0]}.inputs").read_text()

    before = inputs()
    (root / "data" / "mine" / "corpus.jsonl.gz").write_text("{}")  # a collection of the profile itself
    assert inputs() != before
    profile.write_text(content, encoding="utf-8")
    assert checkout.runs(given) == []

    first = executed.read_bytes()
    table = results / "tables" / f"{NAMES[0]}.csv"
    table.unlink()  # what a notebook made is made again
    assert checkout.runs(given) == [NAMES[0]]
    (results / "tables" / f".x.4194305-{_MACHINE}0000.tmp.csv").write_text("of a process that was killed")
    status, output = checkout.make("reproduce", "PROFILE=smoke", given)
    assert status == 0 and f"== {NAMES[1]}" not in output and table.read_text() == "13"
    assert executed.read_bytes() == first  # nothing in it differs between two runs
    assert sorted(p.name for p in (results / "tables").iterdir()) == [f"{name}.csv" for name in NAMES]

    module = root / "diffret_lib" / "environment.py"
    text = module.read_text(encoding="utf-8")
    module.write_text("# a comment\n" + text.replace('"""', '"""Now: ', 1), encoding="utf-8")
    (root / "notebooks/profiles/smoke.yml").touch()
    assert checkout.runs(given) == []
    module.write_text(module.read_text(encoding="utf-8") + "\nX = 1\n", encoding="utf-8")
    assert checkout.runs(given) == NAMES
    module.write_text(module.read_text(encoding="utf-8").removesuffix("\nX = 1\n"), encoding="utf-8")
    write(checkout.notebook(1), WRITE, "1", name=NAMES[1])
    assert NAMES[1] in checkout.runs(given)


def test_notebooks_that_a_profile_has_no_work_for_are_left_out(checkout):
    both, profile = ["00_diffusion_backbone", "03_training"], checkout.root / "notebooks/profiles/nothing.yml"
    for name in both:
        write(checkout.root / "notebooks" / f"{name}.ipynb", "1 / 0", name=name)
    for lines, left_out in {"": [], "  adaptation: null": both[:1], "  fine_tuned: []": both[1:]}.items():
        profile.write_text(f"profile:\n  like: smoke\n  name: nothing\n{lines}\n")
        output = checkout.make("-n", "reproduce", "PROFILE=nothing", LEFT_OUT="01_first")[1]
        assert [name for name in (*NAMES, *both) if name not in output] == left_out, output


def test_adapters_that_stand_in_for_training_are_inputs(checkout):
    profile, adapter = checkout.root / "notebooks/profiles/smoke.yml", checkout.root / "tuned/one/adapter.safetensors"
    text, line = profile.read_text(encoding="utf-8"), "    patience: 2\n"
    assert line in text
    profile.write_text(text.replace(line, f"{line}    adapters: tuned\n"), encoding="utf-8")
    adapter.parent.mkdir(parents=True)
    found = set()
    for content in ("a", "b", "a"):
        adapter.write_text(content)
        checkout.runs()
        found.add((checkout.root / "build/smoke" / f"{NAMES[0]}.inputs").read_text())
    assert len(found) == 2


def test_rows_backbones_of_folders_and_a_gpu_are_inputs(checkout):
    root, line = checkout.root, "    patience: 2\n"
    profile, registry = root / "notebooks/profiles/smoke.yml", root / "diffret_lib/models/backbones.yaml"
    rows, model = root / "rows.jsonl", root / "model" / "model.safetensors"
    more = f"{line}    rows: rows.jsonl\n    mask_false_negatives: false\n"
    text = profile.read_text(encoding="utf-8").replace(line, more)
    profile.write_text(text.replace("text_only: smollm2-135m-diffusion-text", "text_only: child"), encoding="utf-8")
    own = {"child": {"source": {"parent": "own", "adapter": "x"}}, "own": {"source": {"path": str(model.parent)}}}
    registry.write_text(json.dumps(own))
    model.parent.mkdir()
    smi = root / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    found = []
    for path, content in ((rows, "a"), (model, "a"), (rows, "bb"), (model, "bb"), (smi, "#!/bin/sh\necho A, 1\n")):
        path.write_text(content)
        path.chmod(0o755)
        checkout.runs(PATH=f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
        found.append((checkout.root / "build/smoke" / f"{NAMES[0]}.inputs").read_text())
    assert len(set(found)) == 5


def test_variables_of_the_command_line_reach_the_programs(checkout):
    del checkout.environment["DIFFRET_CACHE"]  # what is in the environment reaches them in any case
    assert checkout.runs("DIFFRET_CACHE=elsewhere", XDG_CACHE_HOME=str(checkout.root / "home")) == NAMES
    assert (checkout.root / "elsewhere").is_dir() and not (checkout.root / "home").exists()


@pytest.mark.parametrize("text", [
    "$(shell touch ran)", "`touch ran`", "; touch ran", "\"; touch ran; \"", "'; touch ran; '", "$$(touch ran)", "a b",
    "%", "smoke smoke", "../smoke", "x$y(z",
])  # fmt: skip
def test_make_variables_are_data(checkout, text):
    targets = {"PROFILE": ["reproduce"], "COLLECTION": ["reproduce", "PROFILE=smoke"], "VIRTUAL_ENV": ["test"]}
    for name, words in targets.items():
        for status, output in (checkout.make(*words, f"{name}={text}"), checkout.make(*words, **{name: text})):
            assert status == 2 and "error: " in output and "Traceback" not in output
            said = output.replace("''", "'").replace("\\'", "'").replace("\\\\", "\\")
            assert name in said and text in said, output
    assert checkout.make("help", f"FOO={text}", f"PROFILE={text}")[0] == 0
    assert not list(checkout.root.glob("**/ran"))


def test_words_of_args_are_words(checkout):
    scripts = checkout.root / "tests"
    scripts.mkdir()
    (scripts / "test_a.py").write_text("def test_one(): pass\ndef test_two(): pass\ndef test_three(): pass\n")
    status, output = checkout.make("test", 'ARGS=-k "one or two" -p no:cacheprovider')
    assert status == 0 and "2 passed" in output, output
    status, output = checkout.make("test", "ARGS=-k 'one; touch ran' $(shell touch ran)")
    assert status != 0 and not list(checkout.root.glob("**/ran"))


def test_a_failing_cell_is_shown_last_and_the_good_copy_stays(checkout):
    target = checkout.results / "notebooks"
    target.mkdir(parents=True)
    (target / f"{NAMES[0]}.ipynb").write_text("an earlier good copy", encoding="utf-8")
    failing = "x = {}\nx['missing' + profile['name']]"
    write(checkout.notebook(0), "print('before')", failing, "print('after')", name=NAMES[0])
    write(checkout.notebook(1), "import os\nos._exit(9)", "print('after')", name=NAMES[1])  # a kernel that dies
    status, output = checkout.make("-k", "reproduce", "PROFILE=smoke")
    assert status == 2
    dead = output[output.index(f"error: {NAMES[1]} failed under profile smoke") :]
    assert "The failing cell:\n\n    import os\n    os._exit(9)\n" in dead and "most often for want of memory" in dead
    output = output[: output.index(f"== {NAMES[1]}")]
    tail = output[output.index(f"error: {NAMES[0]} failed under profile smoke") :]
    assert f"results/smoke/notebooks/{NAMES[0]}.failed.ipynb" in tail and "\x1b[" not in tail
    assert "The failing cell:\n\n    x = {}\n    x['missing' + profile['name']]\n" in tail
    assert [line for line in tail.splitlines() if line and "make" not in line][-1] == "KeyError: 'missingsmoke'"
    assert (target / f"{NAMES[0]}.ipynb").read_text(encoding="utf-8") == "an earlier good copy"
    kept = nbformat.read(target / f"{NAMES[0]}.failed.ipynb", as_version=4)
    assert [cell["id"] for cell in kept.cells] == ["title", "parameters", "injected-parameters", "c0", "c1", "c2"]
    assert kept.cells[3].outputs[0]["text"] == "before\n" and not kept.cells[5].outputs
    run = json.loads((checkout.results / "run.json").read_text(encoding="utf-8"))
    assert run["notebooks"][NAMES[0]]["status"] == "failed"


def test_a_second_make_waits_and_a_killed_one_is_no_hindrance(checkout):
    checkout.notebook(1).unlink()
    write(checkout.notebook(0), "import time; time.sleep(3)", WRITE, name=NAMES[0])
    first = subprocess.Popen(**checkout.command("reproduce", "PROFILE=smoke"))
    while not (checkout.root / "build/smoke" / f"{NAMES[0]}.begun").exists():
        assert first.poll() is None
        time.sleep(0.1)
    status, output = checkout.make("reproduce", "PROFILE=smoke")
    assert "another run of the profile smoke goes on in this checkout: waiting for it" in output
    assert status == 0 and "== 01_first" not in output  # the first has made it
    assert first.wait(60) == 0
    (checkout.results / "tables" / f"{NAMES[0]}.csv").unlink()
    killed = subprocess.Popen(**checkout.command("reproduce", "PROFILE=smoke"), start_new_session=True)
    time.sleep(2.5)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(30)
    status, output = checkout.make("reproduce", "PROFILE=smoke")
    assert status == 0 and (checkout.results / "tables" / f"{NAMES[0]}.csv").exists(), output


def test_folders_that_cannot_be_used_give_one_line(checkout):
    (checkout.root / "results").mkdir()
    checkout.results.write_text("a file")
    status, output = checkout.make("reproduce", "PROFILE=smoke")
    assert status == 2 and "results/smoke is a file, and a folder is needed; remove or rename it" in output
    assert "Traceback" not in output
    checkout.results.unlink()
    (checkout.root / "cache").write_text("a file")
    status, output = checkout.make("reproduce", "PROFILE=smoke")
    assert status == 2 and "cache is a file, and a folder is needed" in output and "Traceback" not in output
    (checkout.root / "cache").unlink()
    checkout.notebook(1).write_text("{", encoding="utf-8")
    status, output = checkout.make("reproduce", "PROFILE=smoke")
    assert status == 2 and "notebooks/02_second.ipynb: not a readable notebook" in output and "Traceback" not in output


def test_tables_are_compared(tmp_path):
    def compare(one: dict[str, str], other: dict[str, str]) -> tuple[int, str]:
        for folder, tables in (("a", one), ("b", other)):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
            (tmp_path / folder / "tables").mkdir(parents=True)
            for name, text in tables.items():
                (tmp_path / folder / "tables" / f"{name}.csv").write_text(text)
        script = CHECKOUT / "scripts" / "compare_results.py"
        done = subprocess.run([sys.executable, script, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    table = {"grid": "k,ndcg\n1,0.5\n2,0.25\n"}
    one, other = ({"latency_search": time, "latency": time, "paper_against_ours": time} for time in "12")
    assert compare(table | one, table | other) == (
        0, f"{'grid.csv':32} equal, byte by byte\n1 of 1 tables are equal\n",
    )  # fmt: skip
    status, text = compare(table, {"grid": "K,kind,ndcg\n1,x,0.5\n2,y,0.25\n"})
    assert status == 0 and "equal, value by value (k is now K; new column kind)" in text
    timed = [{"training_summary": f"system,seconds,query_ms\nA,{seconds},{seconds}\n"} for seconds in (1, 2)]
    assert compare(*timed)[0] == 0
    for grid in ("k,ndcg\n1,0.5\n2,0.26\n", "k\n1\n2\n", "k,ndcg\n1,0.5\n"):
        assert compare(table, {"grid": grid})[0] == 1
    assert compare(table, table | {"x": "a\n1\n"})[0] == 1
    assert "first 0.25 and 0.26" in compare(table, {"grid": "k,ndcg\n1,0.5\n2,0.26\n"})[1]
