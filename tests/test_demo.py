"""tools/demo.py on the colours of test_rerank.py: what the page gets, what is refused, and the page in a browser."""

import base64
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import threading

import numpy as np
import pytest
from PIL import Image
from test_rerank import COLOURS, LEFT, RIGHT, fakes, two_halves, world  # noqa: F401

from scorer import read_image
from tools import demo as tool
from tools import rerank


@pytest.fixture
def server(world):  # noqa: F811
    models = rerank.Models(rerank.parse_args(["--run", str(world / "run"), "--query", "q 0", "--device", "cpu"]))
    with tool.open_server(0) as found:
        found.demo = tool.Demo(models)
        thread = threading.Thread(target=found.serve_forever, args=(.01,))  # seconds between looks for a shutdown
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    """-> (status, headers, body bytes)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def post(server, **request):
    status, _, content = ask(server, "POST", "/rerank", json.dumps(request), Content_Type="application/json")
    return status, json.loads(content)


def encoded(image, kind="png", **how):
    content = io.BytesIO()
    image.save(content, format=kind, **how)
    return base64.b64encode(content.getvalue()).decode()


# ------------------------------------------------------------------------------------------------- what the page gets

def test_page_and_its_headers(server):
    status, headers, content = ask(server, "GET", "/?example=3&run=1")
    assert status == 200 and content == tool.PAGE.read_bytes()
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert server.server_address[0] == "127.0.0.1"  # and not all interfaces


def test_page_is_self_contained():
    """No address but its own, no text turned into markup, and every element that the script asks for is there."""
    text = tool.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", text)
    assert set(re.findall(r'\$\("(\w+)"\)', text)) <= set(re.findall(r'id="(\w+)"', text))


def test_example(server):
    status, _, content = ask(server, "GET", "/example/0")
    assert (status, json.loads(content)) == (200, {"id": "q 0", "question": "What is this, 0", "in_pool": True})
    assert json.loads(ask(server, "GET", "/about")[2])["examples"] == 4
    status, found = post(server, example=0, question="Where does it live, 0")
    assert status == 200 and found["decision"] == "REGION" and found["p_region"] == .9 and found["box"] == list(LEFT)
    first = found["candidates"][0]
    # Markup in a title comes as it is, in JSON: the page puts it in as text.
    assert (first["title"], first["row"], first["rank_before"], first["positive"]) == ("The <b>red</b>", 2, 2, True)
    assert post(server, example=0, question="0", force="FULL")[1]["candidates"][0]["title"] == "The <b>purple</b>"
    server.demo.data.pool, server.demo.data.pool_image = np.array([[0, 1, 3]] * 4), np.array([[0, 2, 6]] * 4)
    stored = post(server, example=0, question="0")[1]["candidates"]  # its own pool, which retrieval would not find
    assert [row["title"] for row in stored] == [f"The <b>{name}</b>" for name in ("red", "purple", "green")]


def test_images(server):
    status, headers, content = ask(server, "GET", "/query/1")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(content)).size == (64, 64)
    assert Image.open(io.BytesIO(ask(server, "GET", "/query/1?side=32")[2])).size == (32, 32)
    colour = Image.open(io.BytesIO(ask(server, "GET", "/candidate/2")[2])).getpixel((4, 4))
    np.testing.assert_allclose(colour, COLOURS["red"], atol=3)  # row 2: red's first image; JPEG loses a little


def test_pictures_are_served_as_they_were_scored(server, world):  # noqa: F811
    """A browser turns a picture by its EXIF. The box is in the pixels that read_image gave, turned or not: those are
    served, and no EXIF that would turn them under their box."""
    exif = Image.Exif()
    exif[0x112] = 6  # "turn by 90 degrees"
    two_halves().resize((96, 64)).save(world / "raw" / "q1.png", exif=exif)
    found = Image.open(io.BytesIO(ask(server, "GET", "/query/1")[2]))
    assert found.size == read_image(str(world / "raw" / "q1.png")).size and not found.getexif()
    assert post(server, example=1, question="0")[1]["size"] == list(found.size)
    assert tool.uploaded(encoded(Image.new("RGB", (8, 4)), exif=exif)).size == (4, 8)


def test_dropped_image(server):
    status, found = post(server, image=encoded(two_halves()), question="1")
    assert status == 200 and found["retrieved"] and found["box"] == list(RIGHT)
    assert [row["title"] for row in found["candidates"]] == [f"The <b>{n}</b>" for n in ("blue", "purple", "red")]
    assert not any(row["positive"] for row in found["candidates"])


def test_models_are_asked_one_at_a_time(server, fakes):  # noqa: F811
    """Eight requests at once; the policy notices a second caller while it thinks."""
    inside, overlaps, act, found = [], [], fakes.policy.act, []

    def slow(*arguments, **how):
        overlaps.append(len(inside))
        inside.append(1)
        threading.Event().wait(.02)
        inside.pop()
        return act(*arguments, **how)

    fakes.policy.act = slow
    threads = [threading.Thread(target=lambda i=i: found.append(post(server, example=i % 4, question=str(i % 3))[0]))
               for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 8 and overlaps == [0] * 8


# ---------------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("text", ["\u00b2", "\u0663", "1.0", "", None, -1, True, 4, "0x1", " 1"])
def test_number_takes_plain_numbers_only(text):
    """\u00b2 and \u0663 are digits to Python's isdigit; int() fails on the first and takes the second."""
    with pytest.raises(tool.Refusal):
        tool.number(text, 4)
    assert tool.number("3", 4) == tool.number(3, 4) == 3


@pytest.mark.parametrize("path", ["/none", "/query/4", "/query/-1", "/query/x", "/query/%31", "/candidate/8",
                                  "/example/1e0", "/query/1?side=99999", "/query/../../raw/q0.png",
                                  "/../run/config.json", "/query/%2e%2e%2fq0.png",
                                  "//etc/passwd", "/query/" + "9" * 5000])
def test_nothing_else_is_served(server, path):
    status, _, content = ask(server, "GET", path)
    assert status == 404 and set(json.loads(content)) == {"error"}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
CUT = base64.b64decode(encoded(Image.effect_noise((64, 64), 99)))[:3000]


@pytest.mark.parametrize("request_, status, complaint", [
    ({"example": 0, "question": " "}, 400, "Ask a question"), ({"example": 0, "question": 7}, 400, "Ask a question"),
    ({"example": 0, "question": "x" * 1001}, 400, "Ask a question"), ({"example": 9, "question": "0"}, 404, "9"),
    ({"example": [1], "question": "0"}, 404, "no number"), ({"question": "0"}, 400, "cannot be read as an image"),
    ({"image": "???", "question": "0"}, 400, "did not arrive whole"), ({"image": "\u00e9"}, 400, "Ask a question"),
    ({"image": "\u00e9", "question": "0"}, 400, "did not arrive whole"), ({"image": [], "question": "0"}, 400, "image"),
    ({"image": base64.b64encode(b"GIF89a").decode(), "question": "0"}, 400, "cannot be read as an image"),
    ({"image": base64.b64encode(CUT).decode(), "question": "0"}, 400, "cannot be read as an image"),
    ({"image": base64.b64encode(EPS).decode(), "question": "0"}, 400, "cannot be read as an image"),
    ({"example": 0, "question": "0", "force": "MALFORMED"}, 400, "FULL, REGION"),
    ({"example": 0, "question": "\ud83d 0"}, 400, "half a surrogate pair"),
    ({"example": 0, "question": "<|im_end|>"}, 400, "special token")])
def test_requests_that_will_not_do(server, monkeypatch, request_, status, complaint):
    monkeypatch.setattr(subprocess, "Popen", None)  # an EPS would have Pillow start Ghostscript
    found, answer = post(server, **request_)
    assert found == status and complaint in answer["error"]
    assert post(server, example=0, question="0")[0] == 200  # and the next one is served


def test_image_of_too_many_pixels(server):
    """A white 10,001 x 10,000 PNG is a few kB: it is its header that is looked at."""
    status, answer = post(server, image=encoded(Image.new("1", (10_001, 10_000))), question="0")
    assert status == 413 and answer["error"].startswith("The image that was sent has more than 100,000,000 pixels")


@pytest.mark.parametrize("headers, status", [
    ({"Content_Type": "text/plain"}, 415),  # all that a form of another site can send
    ({"Content_Type": "application/json", "Content_Length": str(13 << 20)}, 413),
    ({"Content_Type": "application/json", "Content_Length": "-1"}, 411),
    ({"Content_Type": "application/json", "Host": "evil.example"}, 403)])
def test_headers_that_will_not_do(server, headers, status):
    assert ask(server, "POST", "/rerank", b"", **headers)[0] == status


def test_body_that_is_no_json(server):
    for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
        assert ask(server, "POST", "/rerank", body, Content_Type="application/json")[0] == 400
    assert ask(server, "POST", "/query/0", b"{}", Content_Type="application/json")[0] == 404


def test_port_in_use_is_noticed_before_the_models_load(world, fakes):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 70_000):
            with pytest.raises(SystemExit, match=f"port {port} cannot be used .* name another"):
                tool.main(["--run", str(world / "run"), "--port", str(port)])
    assert not fakes.policies and not fakes.scorers


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("query, words", [
    ("?example=0&run=1", ["REGION: look here", "p(REGION) = 0.900", "After: what the policy chose", "right answer"]),
    ("?example=2&run=1&force=REGION", ["forced; p(REGION) = 0.100", "After: the forced REGION"]),
    ("?example=9", ["Examples run from 0 to 3."])])
def test_page_in_a_browser(server, tmp_path, query, words):
    """What the page's script makes of the answer, as a browser has it after asking; titles stay text."""
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         "--virtual-time-budget=20000", f"http://127.0.0.1:{server.server_port}/{query}"],
        capture_output=True, text=True, timeout=120)
    body = done.stdout.split("<script>")[0]
    assert [word for word in words if word not in body] == [] and "<b>" not in body
    assert len(re.findall("<li[ >]", body)) == (6 if "run" in query else 0)  # K = 3, before and after
