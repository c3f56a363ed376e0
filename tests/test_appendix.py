"""The pages of ``make appendix``: built from committed notebooks, and opened in a real browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import websocket
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from diffret_lib.config import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "scripts" / "appendix"))
from conf import mathml

import build as appendix

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EMBEDDED = CHECKOUT / "results" / "embedded"
WIDE = "<table><thead><tr>" + "".join(f"<th>column number {i}</th>" for i in range(20)) + "</tr></thead><tbody><tr>"
WIDE += "".join(f"<td>{i}</td>" for i in range(20)) + "</tr></tbody></table>"
OPENING = r"""# 98 Scores < 1 & *more*

**Question.** Does $K_q$ of [the claims](07_claims.ipynb) matter, and `x < y`?

$$s(q,p) = \sum_{i=1}^{K_q} \max\Big(0, \max_{j \le K_p} \langle q_i, p_j \rangle\Big),$$

see [the paper](https://arxiv.org/abs/2605.07210)."""


def executed(*outputs: nbformat.NotebookNode, text: str = OPENING) -> nbformat.NotebookNode:
    cell = new_code_cell("show()", id="c", outputs=list(outputs), execution_count=1)
    metadata = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return new_notebook(cells=[new_markdown_cell(text, id="t"), cell], metadata=metadata)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A results folder with some of the committed notebooks, the ledger's table and the run's record."""
    folder = tmp_path_factory.mktemp("results") / "embedded"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "tables").mkdir()
    others = EMBEDDED / "tables" / "claims.csv", EMBEDDED / "run.json"
    for path in (*(EMBEDDED / "notebooks").glob("0[147]_*.ipynb"), *others):
        shutil.copy(path, folder / path.relative_to(EMBEDDED))
    nbformat.write(executed(new_output("display_data", {"text/html": WIDE})), folder / "notebooks" / "98_wide.ipynb")
    (folder / "notebooks" / "97_x.failed.ipynb").write_text("{", encoding="utf-8")
    assert appendix.build(folder) == folder / "appendix" / "index.html"
    return folder


def pages(results: Path) -> list[Path]:
    return [results / "appendix" / "index.html", *sorted((results / "appendix" / "notebooks").glob("*.html"))]


def test_pages(results):
    index, *notebooks = (path.read_text(encoding="utf-8") for path in pages(results))
    assert [p.stem[:2] for p in pages(results)[1:]] == ["01", "04", "07", "98"]
    run = json.loads((results / "run.json").read_text(encoding="utf-8"))
    shown = "A reproducibility study of", "98 Scores &lt; 1 &amp; more", "DiffRetriever with a single mask"
    shown += run["hardware"]["cpu"], run["versions"]["torch"], "peak memory (GB)", "98_wide.html"
    shown += (f"{run['hardware']['memory_bytes'] / 1e9:.1f}",)
    for text in shown:
        assert text in index
    assert 'href="07_claims.html"' in notebooks[-1]
    for page in (index, *notebooks):
        assert page[page.index("<article") :].count("<h1") == 1 and "MathJax" not in page
        assert str(CHECKOUT) not in page and "/tmp/" not in page
        # nothing is loaded over a network: links may lead there, what is loaded may not
        loaded = re.findall(r"<(?:script|img|link|iframe|source)[^>]*?(?:src|href)=[\"']([^\"']*)", page)
        assert loaded and not [address for address in loaded if re.match(r"(https?:)?//", address)]
    text = re.sub(r"<(script|style).*?</\1>", "", notebooks[-1], flags=re.DOTALL)
    assert "<math" in text and "$" not in text
    styles = [*(results / "appendix" / "_static").rglob("*.css")]
    loads = re.compile(r"(@import|url\()\s*[\"']?(https?:)?//")
    assert styles and not [path for path in styles if loads.search(path.read_text(encoding="utf-8"))]


def test_formulas_are_mathml():
    def shown(latex: str, display: bool = False) -> str:
        return re.sub(r"\s", "", re.sub(r' xmlns="[^"]*"', "", mathml(latex, display)))

    assert 'display="block"' in mathml("x", True) and 'display="inline"' in mathml("x")
    assert "<munder><mo>max</mo><mi>x</mi></munder>" in re.sub(r" \w+=\"[^\"]*\"", "", mathml(r"\arg\max_x f", True))
    assert "<msub>" in shown(r"\max_x f") and "<msubsup>" in shown("K_q^*")
    for wrong in (r"\nosuch{x}", r"\left( x", r"a & b"):
        with pytest.raises(ValueError, match="the formula " + re.escape(repr(wrong))):
            mathml(wrong)


def test_formulas_of_the_notebooks_can_be_converted():
    found = 0
    for path in sorted(CHECKOUT.glob("notebooks/*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                for block, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", cell.source, re.DOTALL):
                    assert mathml(block or inline, bool(block))
                    found += 1
    assert found > 10


def test_mistakes(results, tmp_path):
    def message(notebook: nbformat.NotebookNode | str | None, run: str = "{}") -> str:
        folder = tmp_path / "tried"
        (folder / "notebooks").mkdir(parents=True, exist_ok=True)
        path = folder / "notebooks" / "01_a.ipynb"
        path.unlink(missing_ok=True)
        if isinstance(notebook, str):
            path.write_text(notebook, encoding="utf-8")
        elif notebook is not None:
            nbformat.write(notebook, path)
        (folder / "run.json").write_text(run, encoding="utf-8")
        (folder / "appendix").mkdir(exist_ok=True)
        (folder / "appendix" / "old.html").write_text("old", encoding="utf-8")
        with pytest.raises(appendix.AppendixError) as error:
            appendix.build(folder)
        assert [p.name for p in (folder / "appendix").iterdir()] == ["old.html"]  # what was there stays
        assert not list(folder.glob(".*"))
        return str(error.value)

    assert "holds no executed notebook; make it with: make reproduce PROFILE=tried" in message(None)
    assert "01_a.ipynb: not a readable notebook" in message("{")
    assert "was not executed to its end" in message(executed())
    assert "was not executed to its end" in message(executed(new_output("error", ename="E", evalue="", traceback=[])))
    shown = new_output("stream", text="1")
    assert "run.json: not as a run writes it" in message(executed(shown), run="[")
    assert "Sphinx could not make the pages" in message(executed(shown, text="# A\n\n$\\nosuch$"))


class Browser:
    """A headless Chromium, driven through its DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage", "--remote-debugging-port=0", "--remote-allow-origins=*",
             f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.events: list[dict] = []
        self.numbers = itertools.count(1)
        try:
            port, path = self._wait_for(folder / "DevToolsActivePort").split()
            self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=60)
            self.session = None
            target = self("Target.createTarget", url="about:blank")["targetId"]
            self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self(f"{domain}.enable")
        except BaseException:
            self.process.kill()
            raise

    def _wait_for(self, file: Path) -> str:
        for _ in range(600):
            if file.exists() and len(file.read_text().split()) == 2:
                return file.read_text()
            assert self.process.poll() is None, f"{BROWSER} ended with status {self.process.returncode}"
            time.sleep(0.1)
        raise AssertionError(f"{BROWSER} did not open its debugging port")

    def __call__(self, method: str, **parameters: object) -> dict:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, expression: str) -> object:
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, page: Path, width: int, height: int = 800, query: str = "") -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.events.clear()
        self("Page.navigate", url=page.as_uri() + query)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def complaints(self) -> list[dict]:
        """Errors and warnings in the console, and what was loaded over a network."""
        self.run("new Promise((done) => setTimeout(done, 50))")
        loaded = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [
            event for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"))
            or (event.get("method") == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"))
        ] + [e for e in loaded if not e["params"]["request"]["url"].startswith(("file:", "data:"))]  # fmt: skip

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium and no google-chrome on this machine")
def test_in_a_browser(results, browser):
    for width, page in itertools.product((390, 1400), pages(results)):
        browser.open(page, width)
        assert browser.complaints() == []
        assert browser.run("document.documentElement.scrollWidth") <= width, page
        browser.run("window.scrollTo(1000, 0)")
        assert browser.run("window.scrollX") == 0, page
        sizes = "(i) => [i.complete, i.naturalWidth, i.clientWidth]"
        images = browser.run(f"[...document.querySelectorAll('article img')].map({sizes})")
        assert all(complete and natural > 0 and 0 < shown <= width for complete, natural, shown in images)
        assert browser.run("[...document.querySelectorAll('article math')].every((m) => m.getClientRects().length)")
        assert browser.run("parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)") >= 16

    wide = "[...document.querySelectorAll('article table')].at(-1)"
    cell = f"{wide}.tBodies[0].rows[0].cells[0].getBoundingClientRect().x"
    for width in (390, 1400):  # a wide table scrolls inside itself, its first column stays in sight
        browser.open(results / "appendix" / "notebooks" / "98_wide.html", width)
        assert browser.run(f"{wide}.scrollWidth") > browser.run(f"{wide}.clientWidth") > 200
        before = browser.run(cell)
        browser.run(f"{wide}.scrollLeft = 400")
        assert browser.run(f"{wide}.scrollLeft") == 400 and abs(browser.run(cell) - before) < 2
        assert 0 <= before < width / 2

    browser.open(results / "appendix" / "notebooks" / "04_evaluation.html", 390)  # tables and figures are numbered
    counted = ("table caption", "before", "Table "), (".cell_output:has(> img)", "after", "Figure ")
    for selector, place, word in counted:
        content = browser.run(f"getComputedStyle(document.querySelector('article {selector}'), '::{place}').content")
        assert content.startswith(f'"{word}" counter(')

    browser.open(results / "appendix" / "search.html", 390, query="?q=evaluation")  # the search works from disk
    links, found = "[...document.querySelectorAll('#search-results li a')].map((a) => a.href)", []
    until = time.monotonic() + 60
    while not any("04_evaluation.html" in link for link in found) and time.monotonic() < until:
        found = browser.run(links)  # results come in one after the other
        time.sleep(0.1)
    assert any("04_evaluation.html" in link for link in found)
    assert browser.complaints() == []
