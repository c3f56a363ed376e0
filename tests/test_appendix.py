from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import websocket
from bs4 import BeautifulSoup
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pandas.io.formats.style import Styler
from PIL import Image
from pygments.styles import get_style_by_name

from diffret_lib import appendix
from diffret_lib.appendix import AppendixError, build_appendix, main, mathml

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OPENING = r"""# 01 Scores < 1 & *more*

**Question.** Does $K_q$ of [the second](02_second.ipynb#A-table) matter, and `x < y`?

**Method.** A maximum over $j$,

$$s(q,p) = \sum_{i=1}^{K_q} \max\Big(0, \max_{j \le K_p} \langle q_i, p_j \rangle\Big),$$

see [the paper](https://arxiv.org/abs/2605.07210) and [a file](../README.md)."""
SCORES = pd.DataFrame({
    "system": ["beta", "alpha", "gamma", "delta"], "ndcg": [0.5, 0.123, 0.25, np.nan],
    "passages": ["1,000", "20", "300", "4"], "pair": ["(4, 16)", "(4, 2)", "(16, 1)", "(1, 1)"],
    "what is known of it": ["a text that is long enough to be given room of its own, in a cell"] * 4,
    "fingerprint": ["f" * 128] * 4,
})  # fmt: skip


def png() -> str:
    figure = Figure(figsize=(11, 3))
    figure.subplots().plot([1, 3, 2])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def table(frame: pd.DataFrame) -> str:
    styler = Styler(frame, uuid="scores", cell_ids=False).hide(axis="index")
    return styler.format({"ndcg": "{:.3f}"}, na_rep="").set_caption("Scores, nDCG@10").to_html()


def code(source: str, number: int, *outputs: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return new_code_cell(source, id=f"c{number}", outputs=list(outputs), execution_count=number)


def data(kind: str = "display_data", **bundle: str) -> nbformat.NotebookNode:
    return new_output(kind, data={key.replace("_", "/"): value for key, value in bundle.items()})


def write(folder: Path, name: str, *cells: nbformat.NotebookNode) -> Path:
    path = folder / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


@pytest.fixture
def results(tmp_path) -> Path:
    """Results of a profile "tried", as :mod:`diffret_lib.reproduce` and the notebooks leave them."""
    folder = tmp_path / "tried"
    frame = SCORES[["system", "ndcg"]].to_html()  # with <style scoped>, border and an index
    frame = f"<style scoped>.dataframe th {{ color: red }}</style>{frame}<script>alert(1)</script>"
    write(
        folder, "01_first",
        new_markdown_cell(OPENING, id="a"),
        code("print(1 < 2)  # it is", 1, new_output("stream", name="stdout", text="\x1b[31mone\x1b[0m <two>\n"),
             new_output("stream", name="stderr", text="a warning\n")),
        new_markdown_cell("## A figure\n\n" + "word " * 60 + "averyveryverylongword" * 6, id="b"),
        code("show()", 2, data(image_png=png(), text_plain="<Figure>")),
        new_markdown_cell("## A table", id="d"),
        code("scores", 3, data("execute_result", text_html=table(SCORES), text_plain="scores")),
        code("said", 4, data(text_markdown="Selected: **$K_q$ = 4**.", text_plain="...")),
    )  # fmt: skip
    write(
        folder, "02_second",
        new_markdown_cell("# 02 The second", id="a"), new_markdown_cell("## A table\n\n## A table", id="b"),
        code("frame", 1, data(text_html=frame)),
    )  # fmt: skip
    write(folder, "02_second.failed", new_markdown_cell("# failed"))
    write(folder, "03_third.12.running", new_markdown_cell("# running"))
    run = {
        "hardware": {"cpu": "A <CPU>", "gpu": [], "memory_bytes": 8 * 2**30}, "seeds": {"profile": 13},
        "versions": {"python": "3.11.2", "peft": None},
        "profile": {"content": {"name": "tried", "description": "What was tried"}},
        "notebooks": {"01_first": {"seconds": 1234.5, "peak_memory_bytes": 3 * 2**29, "status": "ok"}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    test = {"id": "1a", "comparison": "multi − single", "statistic": "macro difference", "value": 0.03125, "low": 0.01,
            "high": 0.05, "p_corrected": 0.0321, "verdict": "supported", "counts": True}  # fmt: skip
    other = test | {"id": "1b", "counts": False, "value": None, "low": None, "high": None, "p_corrected": None}
    claim = {"id": 1, "statement": "Several are better.", "verdict": "supported", "paper": "", "tests": [test, other]}
    missing = other | {"id": "2a", "counts": True, "verdict": "not tested"}
    second = claim | {"id": 2, "verdict": "not tested", "tests": [missing]}
    (folder / "claims.json").write_text(json.dumps({"claims": [claim, second]}), encoding="utf-8")
    return folder


def build(results: Path, **options: object) -> dict[str, BeautifulSoup]:
    index = build_appendix(results.name, results_root=results.parent, **options)
    return {p.name: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in sorted(index.parent.iterdir())}


def test_pages_links_and_nothing_from_elsewhere(results):
    pages = build(results)
    assert list(pages) == ["01_first.html", "02_second.html", "index.html"]  # neither failed nor running copies
    external = set()
    for name, page in pages.items():
        ids = [tag["id"] for tag in page.select("[id]")]
        assert len(ids) == len(set(ids))
        for link in page.select("a[href]"):
            if link["href"].startswith("http"):
                external.add(link["href"])
                continue
            file, _, fragment = link["href"].partition("#")
            target = pages[file or name]
            assert not fragment or target.find(id=unquote(fragment)), link
        for tag in page.select("[src], link[href]"):
            assert tag.get("src", tag.get("href")).startswith("data:")
        assert not re.search(r"@import|url\(", "".join(style.get_text() for style in page.select("style")))
        assert page.find("meta", attrs={"name": "viewport"})["content"] == "width=device-width, initial-scale=1"
        [script] = page.select("script")  # ours; that of the notebook's output is gone
        digest = base64.b64encode(hashlib.sha256(script.get_text().encode()).digest()).decode()
        policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
        assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none';")
    assert external == {"https://arxiv.org/abs/2605.07210"}
    first, second = pages["01_first.html"], pages["02_second.html"]
    assert first.select_one("main p a")["href"] == "02_second.html#A-table"
    assert first.find("a", string="a file") is None and "a file" in first.main.get_text()
    assert [a["href"] for a in first.select("nav.steps a")] == ["index.html", "02_second.html"] * 2
    assert [a["href"] for a in second.select("nav.steps a")] == ["01_first.html", "index.html"] * 2
    assert [a["href"] for a in second.select("nav.contents a")] == ["#A-table", "#A-table-2"]


def test_cells(results):
    page = build(results)["01_first.html"]
    assert page.title.get_text().startswith("01 Scores < 1 & more – ")
    assert page.select_one("nav.contents").get_text(" ", strip=True) == "On this page A figure A table"
    folded = page.select("main details")
    assert [d.summary.get_text() for d in folded] == ["code", "messages", "code", "code", "code"]
    assert not any(d.has_attr("open") for d in folded)
    assert "print(1 < 2)  # it is" in folded[0].get_text() and folded[0].select_one("span.mi").get_text() == "1"
    assert folded[1].pre.get_text() == "a warning\n"
    assert page.select_one("pre.output").get_text() == "one <two>\n"
    image = page.select_one("figure img")
    assert image["src"] == f"data:image/png;base64,{png()}" and image["alt"] == "Figure: A figure"
    scores = page.select_one("div.table > table")
    assert scores.parent["tabindex"] == "0" and scores.parent["aria-label"] == "Table: Scores, nDCG@10"
    cells = [cell.get_text(strip=True) for cell in scores.select("tbody tr")[1].select("td")]
    assert cells == ["alpha", "0.123", "20", "(4, 2)", SCORES.iloc[0, 4], "f" * 128]
    kinds = [(set(cell["class"]) & {"number", "short", "long"}).pop() for cell in scores.select("thead th")]
    assert kinds == ["short", "number", "number", "short", "long", "long"]
    assert page.main.get_text(" ", strip=True).endswith("= 4 .") and page.select("div.output strong math")

    second = build(results)["02_second.html"]
    assert second.select_one("table").get("border") is None and not second.select("style[scoped], main script")


def test_index(results):
    index = build(results)["index.html"]
    readme = (Path(appendix.__file__).parents[1] / "README.md").read_text(encoding="utf-8").split("\n\n")[1]
    shown = " ".join(index.select_one("main p").get_text().split())
    assert shown == " ".join(re.sub(r"[*]|\[(.*?)\]\(.*?\)", r"\1", readme).split())
    assert "Profile tried: What was tried." in index.main.get_text()
    entries = index.select("ol.notebooks li")
    assert [e.a.get_text() for e in entries] == ["01 Scores < 1 & more", "02 The second"]
    assert entries[0].p.math and entries[0].p.get_text().endswith("matter, and x < y?") and entries[1].p is None
    claims, notebooks, hardware, seeds, versions = (
        [[cell.get_text() for cell in row.select("td")] for row in t.select("tbody tr")] for t in index.select("table")
    )
    tests = "1a multi − single: +0.031 [+0.010, +0.050], p = 0.032, supported"
    assert claims == [
        ["1", "Several are better.", "supported", tests, ""],
        ["2", "Several are better.", "not tested", "2a multi − single: not tested", ""],
    ]
    assert notebooks == [["01 Scores < 1 & more", "1,234.5", "1.5", "ok"]]
    assert hardware == [["cpu", "A <CPU>"], ["gpu", "none"], ["memory", "8.0 GiB"]]
    assert seeds == [["profile", "13"]] and versions == [["python", "3.11.2"], ["peft", "not installed"]]
    for name in ("run.json", "claims.json"):
        (results / name).unlink()
    assert not build(results)["index.html"].select("table, #run, #claims")


def test_same_results_same_bytes_and_the_folder_is_replaced(results, tmp_path):
    build(results)
    first = {p.name: p.read_bytes() for p in (results / "appendix").iterdir()}
    build(results, output=tmp_path / "elsewhere")
    assert {p.name: p.read_bytes() for p in (tmp_path / "elsewhere").iterdir()} == first
    (results / "notebooks" / "02_second.ipynb").unlink()
    assert list(build(results)) == ["01_first.html", "index.html"]
    assert sorted(p.name for p in results.iterdir()) == ["appendix", "claims.json", "notebooks", "run.json"]


def elements(latex: str, display: bool = False) -> list[tuple[str, str]]:
    math = ElementTree.fromstring(mathml(latex, display))
    return [(tag.tag.partition("}")[2], "".join(tag.itertext())) for tag in math.iter()]


def test_formulas_are_mathml(results):
    page = build(results)["01_first.html"]
    block, inline = page.select("math[display=block]"), page.select("math[display=inline]")
    assert len(block) == 1 and len(inline) == 3 and "$" not in page.main.get_text()
    assert block[0].parent["class"] == ["math"]
    found = elements(r"\arg\max_{x} f(x)", display=True)
    assert ("mo", "arg") in found and ("munder", "maxx") in found
    assert ("msub", "maxx") in elements(r"\max_x f(x)")
    assert ("msubsup", "Kq*") in elements("K_q^*")
    assert ("msub", "x∖m") in elements(r"x_{\setminus m}")
    assert [tag for tag, _ in elements(r"\log p")][2:] == ["mi", "mspace", "mi"]
    assert ("mspace", "") not in elements(r"\log(p)") + elements(r"\log\Big(p\Big)") + elements(r"\log\left(p\right)")
    for wrong in (r"\nosuch{x}", r"\left( x", r"a & b"):
        with pytest.raises(AppendixError, match="the formula " + re.escape(repr(wrong))):
            mathml(wrong)


def test_formulas_of_the_notebooks_can_be_converted():
    for path in sorted(appendix._HERE.parent.glob("notebooks/*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                appendix._markdown(cell.source)


def fails(results: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["--profile", results.name, "--results", str(results.parent), *more]) == 1
    return capsys.readouterr().err


def test_mistakes(results, tmp_path, capsys):
    def wrong(*cells: nbformat.NotebookNode) -> str:
        write(results, "03_wrong", *cells)
        message = fails(results, capsys)
        assert str(results / "notebooks" / "03_wrong.ipynb") in message
        return message

    assert main(["--profile", results.name, "--results", str(tmp_path)]) == 0
    before = (results / "appendix" / "index.html").read_bytes()
    again = "run it again: python -m diffret_lib.reproduce 03_wrong --profile tried"
    message = wrong(new_markdown_cell("# 03"), code("1", 1))
    assert "has no outputs" in message and again in message
    assert "ends with an error" in wrong(code("1", 1, new_output("error", ename="E", evalue="", traceback=[])))
    shown = code("1", 1, data(text_plain="1"))
    assert "would be loaded from elsewhere" in wrong(code("1", 1, data(text_html="<img src='https://a.b/c.png'>")))
    assert "would be loaded from elsewhere" in wrong(new_markdown_cell("![a](b.png)"), shown)
    assert "would load something" in wrong(code("1", 1, data(text_html="<p style='background: url(//a.b/c)'>x</p>")))
    assert "has an <iframe>" in wrong(code("1", 1, data(text_html="<iframe srcdoc='x'></iframe>")))
    assert r"has \nosuch, which" in wrong(new_markdown_cell(r"$\nosuch$"), shown)
    (results / "notebooks" / "03_wrong.ipynb").write_text("{", encoding="utf-8")
    assert "not a readable notebook" in fails(results, capsys)
    (results / "notebooks" / "03_wrong.ipynb").unlink()
    (results / "claims.json").write_text('{"claims": [{}]}', encoding="utf-8")
    assert "not as notebook 07 writes it" in fails(results, capsys)
    (results / "run.json").write_text("[", encoding="utf-8")
    assert "run.json: not valid JSON" in fails(results, capsys)
    assert (results / "appendix" / "index.html").read_bytes() == before  # what was there stays
    assert "holds other things than pages" in fails(results, capsys, "--output", str(results))
    assert results.is_dir()
    shutil.rmtree(results / "notebooks")
    message = fails(results, capsys)
    assert f"{results / 'notebooks'} holds no executed notebook" in message
    assert "make reproduce PROFILE=tried" in message


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2."""
    def luminance(colour: str) -> float:
        channels = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast():
    css = (appendix._TEMPLATES / "style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#\w{6});", css))
    ink = [colours[name] for name in ("ink", "quiet", "link")]
    ink += [f"#{token['color']}" for _, token in get_style_by_name(appendix.CODE_STYLE) if token["color"]]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("#ffffff", colours["shade"]):
        assert min(contrast(colour, ground) for colour in ink) >= 4.5


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

    def open(self, page: Path, width: int, height: int = 800) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
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

    def screenshot(self) -> np.ndarray:
        """Pixels, shape (height, width, 3), of the whole page."""
        content = base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


COLUMN = "[...document.querySelectorAll('main table')].at(-1).tBodies[0].rows"


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium and no google-chrome on this machine")
def test_in_a_browser(results, browser):
    index = build_appendix(results.name, results_root=results.parent)
    names = {page.name for page in index.parent.iterdir()}
    for width, page in itertools.product((375, 1280), sorted(index.parent.iterdir())):
        browser.open(page, width)
        assert browser.complaints() == []
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("innerWidth") == width
        sizes = "[...document.images].map((i) => [i.complete, i.naturalWidth, i.parentElement.clientWidth])"
        images = browser.run(sizes)
        assert all(complete and natural > 0 and 0 < shown <= width for complete, natural, shown in images)
        assert len(images) == (page.name == "01_first.html")
        links = browser.run("[...document.querySelectorAll('a[href]')].map((a) => a.href)")
        for link in (link for link in links if link.startswith("file:")):
            file, _, fragment = link.partition("#")
            assert Path(unquote(file.removeprefix("file://"))).name in names
            if fragment and file == page.as_uri():
                assert browser.run(f"document.getElementById(decodeURIComponent({json.dumps(fragment)})) !== null")
        # text is neither tiny nor wider than it can be read
        assert browser.run("parseFloat(getComputedStyle(document.querySelector('main p, main h1')).fontSize)") >= 16
        assert browser.run("[...document.querySelectorAll('main p')].every((p) => p.clientWidth <= 40 * 17)")

    page = index.parent / "01_first.html"
    browser.open(page, 375)
    wide = browser.run("(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.querySelector('.table'))")
    assert wide[0] > wide[1]  # a wide table scrolls by itself
    pixels = browser.screenshot()
    assert pixels.shape[1] == 375 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert 0.01 < (pixels.max(axis=2) < 100).mean() < 0.3  # text, but no black page
    assert (pixels.min(axis=2) > 240).mean() > 0.5
    browser("Emulation.setEmulatedMedia", media="print")
    hidden = "[...document.querySelectorAll('nav, details')].every((tag) => tag.getClientRects().length === 0)"
    assert browser.run(hidden)
    assert browser.run("getComputedStyle(document.querySelector('.table')).overflowX") == "visible"
    assert browser.run("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    browser("Emulation.setEmulatedMedia", media="screen")
    assert not browser.run(hidden)
    browser.open(page, 520)  # as narrow as on A5
    assert not browser.run("document.querySelector('.table').scrollWidth <= 520")
    browser("Emulation.setEmulatedMedia", media="print")
    assert browser.run("document.documentElement.scrollWidth") <= 520  # nothing is cut off
    browser("Emulation.setEmulatedMedia", media="screen")

    browser.open(index, 1280)
    box = browser.run("(({x, y, width, height}) => [x, y, width, height])("
                      "document.querySelector('#claims ~ .table thead').getBoundingClientRect())")  # fmt: skip
    x, y, width, height = (round(value) for value in box)
    header = browser.screenshot()[y : y + height, x : x + width]
    assert header.size and 0.01 < (header.max(axis=2) < 100).mean() < 0.3  # the names of the columns can be seen


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium and no google-chrome on this machine")
def test_tables_are_sorted_in_a_browser(results, browser):
    index = build_appendix(results.name, results_root=results.parent)
    browser.open(index.parent / "01_first.html", 1280)

    def state(column: int) -> tuple[object, str]:
        order = browser.run(f"[...{COLUMN}].map((row) => row.cells[0].textContent.trim()[0]).join('')")
        return browser.run(f"document.querySelectorAll('main thead th')[{column}].getAttribute('aria-sort')"), order

    def click(column: int) -> tuple[object, str]:
        browser.run(f"document.querySelectorAll('main thead th button')[{column}].click()")
        return state(column)

    assert state(0) == (None, "bagd")
    assert [click(0) for _ in range(3)] == [("ascending", "abdg"), ("descending", "gdba"), (None, "bagd")]
    assert [click(1) for _ in range(2)] == [("ascending", "agbd"), ("descending", "bgad")]  # empty cells stay last
    assert click(2) == ("ascending", "dagb") and state(1)[0] is None  # 4, 20, 300, 1,000
    assert click(3) == ("ascending", "dabg")  # pairs by both numbers
    for key, expected in (("Enter", ("descending", "gbad")), (" ", (None, "bagd"))):
        browser.run("document.querySelectorAll('main thead th button')[3].focus()")
        options = {"key": key, "text": "\r" if key == "Enter" else " ", "code": "Enter" if key == "Enter" else "Space",
                   "windowsVirtualKeyCode": 13 if key == "Enter" else 32}  # fmt: skip
        browser("Input.dispatchKeyEvent", type="keyDown", **options)
        browser("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in options.items() if k != "text"})
        assert state(3) == expected
    assert browser.complaints() == []
