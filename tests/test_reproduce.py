from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from diffret_lib import reproduce
from diffret_lib.reproduce import ParameterError, _kernel_manager, _ShellChannel, main, run_notebook

ROOT = Path(reproduce.__file__).resolve().parents[1]
PARAMETERS = 'profile = "embedded"\ncollection = None\nresults_root = None\nk = 1'
MEGABYTES = 1 << 20


def notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    path.parent.mkdir(exist_ok=True)
    code = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="params")]
    code += [nbformat.v4.new_code_cell(cell, id=f"c{number}") for number, cell in enumerate(cells)]
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title", id="title"), *code])
    # a kernel that no machine has: the interpreter that runs the test must be used whatever this says
    content.metadata.kernelspec = {"name": "some-other-kernel", "display_name": "x", "language": "python"}
    nbformat.write(content, path)
    return path


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", "diffret_lib.reproduce", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def printed(path: Path, cell: str) -> str:
    cells = {cell["id"]: cell for cell in nbformat.read(path, as_version=4).cells}
    return "".join(output["text"] for output in cells[cell].outputs if output.get("name") == "stdout")


def test_success(tmp_path):
    (tmp_path / "corpus").mkdir()
    source = notebook(
        tmp_path / "nb" / "01_first.ipynb",
        "import json, os, sys\nfrom diffret_lib.profiles import load_profile\n"
        "print(json.dumps([profile, collection, results_root, k, os.getcwd(), sys.executable, "
        "load_profile(profile, collection).test_collections[-1]]))",
        "from tqdm.auto import tqdm\nfrom tqdm import tqdm as text_tqdm\n"
        "for _ in text_tqdm(tqdm(range(3))):\n    pass\nprint('kept')\nprint('warned', file=sys.stderr)",
        f"block = bytearray(300 * {MEGABYTES})\nblock[::4096] = b'1' * len(block[::4096])",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
    )
    kernels = tmp_path / "jupyter" / "kernels" / "python3"  # a registered python3 that is another interpreter
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    arguments = [source, "--profile", "smoke", "--collection", "corpus:dev", "--results", "out", "-p", "k", "[7]"]
    os.environ["JUPYTER_PATH"] = str(tmp_path / "jupyter")
    try:
        done = command(*arguments, cwd=tmp_path)
    finally:
        del os.environ["JUPYTER_PATH"]
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "smoke"
    executed = folder / "notebooks" / "01_first.ipynb"
    assert sorted(p.name for p in executed.parent.iterdir()) == ["01_first.html", "01_first.ipynb"]
    assert json.loads(printed(executed, "c0")) == [
        "smoke", "../corpus:dev", "../out", [7], str(tmp_path / "nb"), sys.executable, "../corpus:dev",
    ]  # fmt: skip

    content = nbformat.read(executed, as_version=4)
    nbformat.validate(content)
    assert [cell["id"] for cell in content.cells] == ["title", "params", "injected-parameters", "c0", "c1", "c2", "c3"]
    shown = content.cells[4].outputs  # the words stay, the progress bars go
    assert {output.output_type for output in shown} == {"stream"}
    assert {output["name"]: output["text"] for output in shown} == {"stdout": "kept\n", "stderr": "warned\n"}
    assert str(tmp_path) not in json.dumps([cell for cell in content.cells if cell["id"] != "c0"])
    page = executed.with_suffix(".html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "<title>01_first</title>" in page

    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    entry = run["notebooks"]["01_first"]
    assert entry["status"] == "ok" and 0 < entry["seconds"] < 900
    assert 300 * MEGABYTES < entry["peak_memory_bytes"] < 3000 * MEGABYTES
    assert run["profile"]["content"]["name"] == "smoke" and run["versions"]["python"]

    first = executed.read_bytes()
    run_notebook(source, "smoke", collection=str(tmp_path / "corpus") + ":dev", results_root=tmp_path / "out",
                 parameters={"k": [7]}, progress=False)  # fmt: skip
    assert executed.read_bytes() == first


def test_a_failing_cell_ends_the_output_and_the_copy_is_kept(tmp_path):
    source = notebook(tmp_path / "01_bad.ipynb", "print('before')", "x = {}\nx['missing' + profile]", "print('after')")
    target = tmp_path / "out" / "smoke" / "notebooks"
    target.mkdir(parents=True)
    (target / "01_bad.ipynb").write_text("an earlier good copy", encoding="utf-8")
    done = command(source, "--profile", "smoke", "--results", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'missingsmoke'")
    assert "\x1b[" not in done.stderr
    tail = done.stderr[done.stderr.index("01_bad.ipynb failed under profile smoke") :]
    assert "out/smoke/notebooks/01_bad.failed.ipynb" in tail
    assert "The failing cell:\n\n    x = {}\n    x['missing' + profile]\n" in tail
    assert "Traceback (most recent call last)" in tail
    assert sorted(p.name for p in target.iterdir()) == ["01_bad.failed.ipynb", "01_bad.ipynb"]
    assert (target / "01_bad.ipynb").read_text(encoding="utf-8") == "an earlier good copy"
    kept = target / "01_bad.failed.ipynb"
    assert printed(kept, "c0") == "before\n" and printed(kept, "c2") == ""
    run = json.loads((target.parent / "run.json").read_text(encoding="utf-8"))
    assert run["notebooks"]["01_bad"]["status"] == "failed"

    notebook(source, "pass")  # mended: the failed copy goes
    assert main([str(source), "--profile", "smoke", "--results", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in target.iterdir()) == ["01_bad.html", "01_bad.ipynb"]


def test_a_kernel_that_dies(tmp_path, capsys):
    source = notebook(tmp_path / "01_dead.ipynb", "print('before')", "import os\nos._exit(9)", "print('after')")
    assert main([str(source), "--profile", "smoke", "--results", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "The failing cell:\n\n    import os\n    os._exit(9)\n" in error
    assert "Kernel died" in error and error.rstrip().endswith("most often for want of memory")
    assert (tmp_path / "out" / "smoke" / "notebooks" / "01_dead.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["99_none"], "there is no notebook '99_none'"),
        (["--profile", "smok"], "did you mean 'smoke'?"),
        (["-p", "kk", "1"], "has no parameter kk; its parameters cell names profile, collection, results_root, k"),
        (["-p", "k", "[1"], "error: "),
        (["--collection", "nowhere"], "there is no folder 'nowhere'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, capsys, arguments, part):
    source = notebook(tmp_path / "01_a.ipynb", "raise SystemError('ran')")
    arguments = arguments if arguments[0] == "99_none" else [str(source), *arguments]
    assert main([*arguments, "--results", str(tmp_path / "out")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_notebook_or_cannot_write_there(tmp_path):
    broken = tmp_path / "01_broken.ipynb"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(ParameterError, match=r"01_broken\.ipynb: not a readable notebook"):
        run_notebook(broken, "smoke", results_root=tmp_path / "out")
    fixed = notebook(tmp_path / "01_fixed.ipynb", parameters="k = 1")
    with pytest.raises(ParameterError, match="no parameter results_root"):
        run_notebook(fixed, "smoke", results_root=tmp_path / "out")


def test_large_html_is_named_for_git(tmp_path, monkeypatch):
    page = tmp_path / "01_a.html"
    page.write_text("x" * 100, encoding="utf-8")
    monkeypatch.setattr(reproduce, "LARGE_HTML", 99)
    reproduce._ignore_large(page)
    assert (tmp_path / ".gitignore").read_text(encoding="utf-8") == "01_a.html\n"
    monkeypatch.setattr(reproduce, "LARGE_HTML", 100)
    reproduce._ignore_large(page)
    assert not (tmp_path / ".gitignore").exists()


@pytest.mark.parametrize("sent", [False, True])
def test_a_reply_is_found_though_a_message_was_sent_in_the_same_moment(sent, monkeypatch):
    monkeypatch.setattr(_ShellChannel, "seconds", 0.05)

    async def answered() -> str:
        context, session = zmq.asyncio.Context(), Session(key=b"secret")
        kernel = zmq.Context.shadow(context.underlying).socket(zmq.ROUTER)
        port = kernel.bind_to_random_port("tcp://127.0.0.1")
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{port}")
        channel = _ShellChannel(socket, session)
        try:
            channel.send(session.msg("request", {}))
            who, *_ = await asyncio.to_thread(kernel.recv_multipart)
            waiting = asyncio.create_task(channel.get_msg())
            await asyncio.sleep(0.02)
            session.send(kernel, "reply", {}, ident=who)
            time.sleep(0.05)  # the reply is there, and the loop has not seen it
            if sent:
                channel.send(session.msg("another", {}))
            return (await asyncio.wait_for(waiting, 5))["msg_type"]
        finally:
            channel.close()
            kernel.close(0)

    assert asyncio.run(answered()) == "reply"


def test_the_kernel_s_client_looks_again():
    assert _kernel_manager({})().client().shell_channel_class is _ShellChannel
