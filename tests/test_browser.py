"""The pages in a real browser, with clicks: the demo on the colours of test_rerank.py, the report, plots and pictures.

chromium is driven by its own DevTools protocol, JSON over a pair of pipes: nothing to install but chromium
(`apt-get install chromium`). Without it these tests are skipped.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from test_demo import server  # noqa: F401
from test_report import make, write_data, write_run
from test_rerank import COLOURS, fakes, paint, two_halves, world  # noqa: F401

from tools import demo as tool

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe", "about:blank")
PHONE, DESKTOP = (400, 800), (1280, 900)


# ------------------------------------------------------------------------------------------------------------ a browser

class Browser:
    """One chromium; `open` gives it a fresh page. errors: what the page's console complained of."""

    def __init__(self, profile):
        (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
        # It reads commands from file 3 and answers on file 4. Copies above 10, so that neither lies in the other's way.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_in, its_out)]
        self.process = subprocess.Popen(
            [CHROMIUM, f"--user-data-dir={profile}", *FLAGS], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=(3, 4), preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)))
        for end in (its_in, its_out, *ends):
            os.close(end)
        self.out, self.answers = open(our_out, "wb", buffering=0), open(our_in, "rb")
        self.last, self.session, self.target, self.errors = 0, None, None, []

    def call(self, method, **params):
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self.message())
            self.note(answer)
            if answer.get("id") == self.last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def message(self):
        found = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "chromium has gone"
            found += byte
        return found

    def note(self, event):
        params = event.get("params", {})
        if event.get("sessionId") != self.session:
            return  # of a page before this one
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["exception"].get("description"))
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        if event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))

    def open(self, url, size=DESKTOP):
        """A new page at `url`, `size` pixels wide and high, loaded."""
        self.session, before = None, self.target
        self.target = self.call("Target.createTarget", url="about:blank")["targetId"]
        if before:
            self.call("Target.closeTarget", targetId=before)
        self.session = self.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        self.errors = []
        for domain in ("Runtime", "Log", "Page", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                  mobile=size == PHONE)
        self.call("Page.navigate", url=url)
        self.wait("location.href != 'about:blank' && document.readyState == 'complete'")

    def js(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression, seconds=30):
        """Until a JavaScript expression holds."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, (expression, self.errors, self.js("document.body.innerText"))
            time.sleep(.02)

    def text(self, selector="body"):
        return self.js(f"document.querySelector({selector!r}).innerText")

    def middle(self, selector):
        """x, y of an element, scrolled into view; whatever covers it there would be hit instead."""
        x, y, hit = self.js(
            f"(() => {{ const found = document.querySelector({selector!r}); found.scrollIntoView({{block: 'center'}});"
            "const box = found.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;"
            "const there = document.elementFromPoint(x, y); return [x, y, found.contains(there)] })()")
        assert hit, f"{selector} is covered or hidden"
        return x, y

    def click(self, selector):
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def enter(self, times=1):
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                          windowsVirtualKeyCode=13)

    def drop(self, selector, *files):
        """Files from the desktop, let go over an element."""
        x, y = self.middle(selector)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector, *files):
        """Files picked in the dialogue of an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node)

    def shot(self, path, whole=False):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def close(self):
        self.session = None
        with contextlib.suppress(AssertionError, OSError):  # it may hang up before it answers
            self.call("Browser.close")
        self.process.wait(30)
        self.out.close()
        self.answers.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def healthy(browser):
    """No complaint in the console, no picture that failed, nothing wider than the window."""
    assert browser.errors == []
    browser.js("[...document.images].forEach(i => i.loading = 'eager')")
    browser.wait("[...document.images].filter(i => i.offsetParent).every(i => i.complete)")
    assert browser.js("[...document.images].filter(i => i.offsetParent && !i.naturalWidth).map(i => i.src)") == []
    assert browser.js("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.fixture
def page(browser, server):  # noqa: F811
    """The demo's page in the browser: page(query="", size) opens it. .asked: the requests of it that came in."""
    def open_page(query="", size=DESKTOP):
        browser.open(f"http://127.0.0.1:{server.server_port}/{query}", size)
        browser.wait("about.policy && (query === null ? !about.examples || $('status').textContent : question.value)")
        return browser

    answer, open_page.asked, open_page.gate = server.demo.answer, [], threading.Event()
    open_page.gate.set()

    def noted(request):
        open_page.asked.append(request)
        assert open_page.gate.wait(30)
        return answer(request)

    server.demo.answer = noted
    yield open_page
    open_page.gate.set()


RESULT = "!busy && !document.getElementById('lists').hidden"


def ranked(browser, which="after"):
    """Titles of a list, top to bottom."""
    return browser.js(f"[...document.querySelectorAll('#{which} .title')].map(title => title.textContent)")


def titles(*names):
    return [f"The <b>{name}</b>" for name in names]


# ------------------------------------------------------------------------------------------------------------- the demo

@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_first_visit(page, size):
    """The first example is one that the crop rescues, chosen and ready: one press shows it. Titles stay text."""
    browser = page(size=size)
    assert browser.js("document.querySelector('#strip [aria-pressed=true]').dataset.example") == "0"
    browser.wait("document.getElementById('question').value == 'What is this, 0'")
    healthy(browser)
    browser.click("#ask")
    browser.wait(RESULT)
    assert browser.text("#decision") == "REGION: it looks here" and browser.text("#detail") == "p(REGION) = 0.900"
    assert browser.text("#chosen") == "After: what the policy chose"
    assert ranked(browser) == titles("red", "purple", "blue")
    assert ranked(browser, "before") == titles("purple", "red", "blue")
    assert browser.text("#best") == "First: The <b>red</b>" and browser.text("#words") == "It has no text."
    assert browser.text("#fate") == "right answer; rank 2 before"
    assert "rank 2 before, 1 after" in browser.text("#status") and browser.text("#sight") == "What the scorer saw"
    assert browser.js("[view.width, view.height]") == [32, 64]
    assert browser.js("[...view.getContext('2d').getImageData(16, 32, 1, 1).data]")[0] > 240  # the red half
    assert "crops above 0.5" in browser.text("#gauge") and "0.900" in browser.text("#gauge")
    assert browser.js("document.querySelectorAll('b, script').length") == 2  # the gauge's number, the page's script
    healthy(browser)


def test_first_example_and_the_text_of_the_winner(page, server):  # noqa: F811
    """The page opens with the example that the server names. A text stays text, without the title that it begins with."""
    entity, server.demo.first = server.demo.data.entity, 1
    server.demo.data.entity = lambda j: {**entity(j), "text": f"{entity(j)['title']}\n<i>{'long ' * 200}</i>"}
    browser = page()
    assert browser.js("query.example") == 1
    browser.click("#ask")
    browser.wait(RESULT)
    said = browser.text("#words")
    assert said.startswith("<i>long long") and said.endswith("...") and len(said) <= 604
    healthy(browser)


def test_what_a_finger_hits(page):
    browser = page(size=PHONE)
    small = ("[...document.querySelectorAll('button, select, textarea, .drop')].filter(e => e.offsetParent)"
             ".map(e => [e.id, e.getBoundingClientRect()]).filter(([_, r]) => r.width < 44 || r.height < 44)")
    assert browser.js(f"{small}.map(([id, r]) => id)") == []
    browser.click("#random")
    browser.click("#next")
    healthy(browser)


@pytest.mark.parametrize("query, decision, detail, chosen", [
    ("?example=2&run=1", "FULL: it keeps the whole image", "p(REGION) = 0.100", "After: unchanged"),
    ("?example=0&run=1&force=FULL", "FULL: it keeps the whole image", "forced; p(REGION) = 0.900", "After: unchanged"),
    ("?example=2&run=1&force=REGION", "REGION: it looks here", "forced; p(REGION) = 0.100", "After: the forced REGION"),
    ("?example=3&run=1", "Unreadable answer: the whole image", "p(REGION) is not known in free decoding",
     "After: unchanged")])
def test_decisions(page, query, decision, detail, chosen):
    """FULL shows the crop that was not taken; an answer that cannot be read has none to show."""
    browser = page(query)
    browser.wait(RESULT)
    assert [browser.text(name) for name in ("#decision", "#detail", "#chosen")] == [decision, detail, chosen]
    assert browser.js("box.hidden") == browser.js("seen.hidden") == ("example=3" in query)
    if decision.startswith("FULL"):
        assert browser.text("#sight") == "The crop that was not taken" and browser.js("view.width") == 32
        assert ranked(browser) == ranked(browser, "before") == titles("purple", "red", "blue")
        assert browser.js("getComputedStyle(box).borderStyle") == "dashed"
    healthy(browser)


def test_address_of_an_example_that_is_not_there(page):
    assert page("?example=9").text("#status") == "Examples run from 0 to 3."


def test_answer_is_labelled_by_what_was_asked(page):
    """The form is changed while the answer is under way; five presses of Enter and a double press ask once."""
    browser = page("?example=0")
    page.gate.clear()
    browser.js("force.value = 'REGION'")
    browser.js("question.focus()")
    browser.enter(5)
    browser.click("#ask")
    browser.click("#ask")
    browser.js("force.value = ''; question.value = 'another, 1'")
    page.gate.set()
    browser.wait(RESULT)
    assert len(page.asked) == 1 and page.asked[0]["force"] == "REGION"
    assert browser.text("#chosen") == "After: the forced REGION" and browser.text("#detail").startswith("forced;")
    assert browser.js("document.activeElement.id") == "ask"  # not lost to the body
    browser.click("#ask")  # and the next one is asked
    browser.wait(f"{RESULT} && chosen.textContent == 'After: what the policy chose'")
    assert [(asked["force"], asked["question"]) for asked in page.asked[1:]] == [(None, "another, 1")]
    healthy(browser)


def test_late_answer_to_another_picture_is_dropped(page):
    browser = page("?example=0")
    page.gate.clear()
    browser.click("#ask")
    browser.click("#strip [data-example='1']")
    browser.wait("question.value == 'What is this, 1'")
    page.gate.set()
    browser.js("fetch('about').then(() => new Promise(done => setTimeout(done, 300)))")
    assert browser.js("lists.hidden && !busy") and "q 1" in browser.text("#caption")
    browser.click("#ask")
    browser.wait(RESULT)
    assert len(page.asked) == 2 and ranked(browser) == titles("blue", "purple", "red")
    healthy(browser)


def test_drop_of_a_picture(page, tmp_path):
    """Retrieved from the data; then a file that is no image takes picture and answer away."""
    two_halves().save(tmp_path / "mine <i>.png")
    (tmp_path / "notes.txt").write_text("no image")
    browser = page()
    browser.drop("#drop", tmp_path / "mine <i>.png")
    browser.wait("caption.textContent == 'mine <i>.png'")
    assert browser.js("document.activeElement.id") == "question"
    browser.js("question.value = 'And this, 1'")
    browser.enter()
    browser.wait(RESULT)
    assert ranked(browser) == titles("blue", "purple", "red") and "retrieved" in browser.text("#status")
    healthy(browser)
    browser.drop("#drop", tmp_path / "notes.txt")
    browser.wait("$('status').className == 'bad'")
    assert "notes.txt cannot be read as an image" in browser.text("#status")
    assert browser.js("pictures.hidden && lists.hidden && query === null")
    browser.click("#ask")
    assert browser.text("#status") == "Pick an example or drop a picture first." and len(page.asked) == 1
    assert browser.errors == []


def test_drop_of_several_pictures(page, tmp_path):
    """They are the candidates; one of them that is picked as the query is ranked against the others."""
    folder = paint(tmp_path / "own", ["red", "blue", "green"])
    (folder / "a.txt").write_text("no image")
    browser = page(size=PHONE)
    browser.choose("#file", *sorted(folder.iterdir()))
    browser.wait("own !== null && $('status').textContent.includes('candidates now')")
    assert "a.txt cannot be read as an image. 3 pictures are the candidates now." in browser.text("#status")
    assert browser.js("document.querySelectorAll('#strip button').length") == 3
    two_halves().save(tmp_path / "q.png")
    browser.drop("#drop", tmp_path / "q.png")
    browser.wait("caption.textContent == 'q.png'")
    browser.js("question.value = 'Which, 0'")
    browser.click("#ask")
    browser.wait(RESULT)
    assert ranked(browser) == ["red.png", "blue.png", "green.png"] and browser.text("#best") == "First: red.png"
    assert browser.js("face.src") == browser.js("own[2].url")
    healthy(browser)
    browser.click("#strip [data-example='0']")  # blue
    browser.js("question.value = 'Which, 2'")
    browser.click("#ask")
    browser.wait(RESULT)
    assert sorted(ranked(browser)) == ["green.png", "red.png"]
    browser.click("#prepared")
    assert browser.js("own === null && prepared.hidden && query === null && pictures.hidden")
    assert browser.js("document.querySelectorAll('#strip button').length") == 4
    healthy(browser)


def test_many_and_large_pictures(page, tmp_path):
    """A candidate is sent small, of more than 100 the first 100; a single picture as large as a query may be."""
    for i in range(102):
        Image.new("RGB", (2000, 100) if i == 0 else (8, 8)).save(tmp_path / f"{i:03}.png")
    browser = page()
    browser.choose("#file", *sorted(tmp_path.glob("*.png")))
    browser.wait("own !== null && $('status').textContent.includes('candidates now')")
    assert browser.js("own.length") == 100 and "The first 100 were taken" in browser.text("#status")
    browser.click("#strip [data-example='0']")
    browser.wait("picture.naturalWidth == 512")
    browser.choose("#file", tmp_path / "000.png")
    browser.wait("picture.naturalWidth == 1600")
    healthy(browser)


def test_refusals_are_shown(page, tmp_path):
    Image.new("RGB", (900, 4)).save(tmp_path / "sliver.png")
    browser = page()
    browser.drop("#drop", tmp_path / "sliver.png")
    browser.wait("caption.textContent == 'sliver.png'")
    browser.js("question.value = ' '")
    browser.click("#ask")
    assert browser.text("#status") == "Type a question: where to look depends on it." and page.asked == []
    browser.js("question.value = 'Which, 0'")
    browser.click("#ask")
    browser.wait("!busy && $('status').className == 'bad'")
    assert "900 x 4 pixels" in browser.text("#status") and browser.js("lists.hidden")


def test_page_without_data(page, server):  # noqa: F811
    """Only dropped pictures can be ranked, and it says so."""
    server.demo.data, server.demo.examples = None, 0
    browser = page()
    assert "drop several pictures" in browser.text("#about") and browser.js("$('bar').hidden && $('strip').hidden")
    healthy(browser)


@pytest.mark.parametrize("dataset, names, wanted, unwanted", [
    ("world", ("mini/policy", "mini/scorer"), ["a drawn world", "drawings only: mini/policy, mini/scorer."], []),
    ("evqa", ("Qwen/Qwen2.5-VL-3B-Instruct", "BAAI/EVA-CLIP-8B"), ["Qwen2.5", "EVA-CLIP-8B", "4 candidates of evqa"],
     ["drawn", "Stand-in"]),
    ("pictures of <i>cats", ("mini/policy", "open_clip:ViT-B-32/openai"), ["drawings only: mini/policy.", "<i>cats"],
     ["drawn world"])])
def test_page_says_whose_models_these_are(page, server, dataset, names, wanted, unwanted):  # noqa: F811
    server.demo.data.manifest["dataset"] = dataset
    server.demo.models.settings["policy"], server.demo.models.scorer.name = names
    said = page(size=PHONE).text("#about")
    assert [text for text in wanted if text not in said] == [text for text in unwanted if text in said] == []


# --------------------------------------------------------------------------------------------- the report and its plots

@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Folder of a report of a tiny drawn run, or that of runs/world where there is one."""
    if (ROOT / "runs/world/report/report.html").exists():
        return ROOT / "runs/world/report"
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder, write_data(folder))
    make(run)
    return run / "report"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_report(browser, report, size):
    browser.open((report / "report.html").as_uri(), size)
    healthy(browser)
    for n in range(browser.js("document.querySelectorAll('summary').length")):
        browser.js(f"document.querySelectorAll('summary')[{n}].id = 'fold{n}'")
        browser.click(f"#fold{n}")
    for n in range(browser.js("document.querySelectorAll('nav a').length")):
        browser.js(f"document.querySelectorAll('nav a')[{n}].id = 'link{n}'")
        browser.click(f"#link{n}")
        assert browser.js(f"document.getElementById(location.hash.slice(1)) !== null")
    healthy(browser)


def test_pictures(browser, report):
    found = sorted([*report.glob("*.png"), *(ROOT / "figures").glob("*.png"), *(ROOT / "docs").glob("*.png")])
    assert len(found) > 3
    for path in found:
        browser.open(path.as_uri())
        healthy(browser)
        assert browser.js("document.images[0].naturalWidth") > 100, path
