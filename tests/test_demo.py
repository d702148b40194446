"""tools/demo.py on the colours of test_rerank.py: what the page gets, what is refused, the service for
other programs, and a folder of one's own pictures. test_browser.py has the page as a browser shows it."""

import base64
import http.client
import io
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_house import make
from test_open_clip import CLIP, OPENAI, save_random, table  # noqa: F401
from test_rerank import COLOURS, HALF, LEFT, NAMES, RIGHT, fakes, paint, square, two_halves, world  # noqa: F401

from policy import Action
from scorer import InputError, Query, load_data, load_scorer, read_image, write_split
from tools import demo as tool
from tools import folder, rerank

ROOT = Path(__file__).resolve().parent.parent


def demo_of(world, *flags):  # noqa: F811
    flags = flags or ("--run", str(world / "run"))
    return tool.Demo(rerank.Models(rerank.parse_args([*flags, "--query", "q 0", "--device", "cpu"])))


@pytest.fixture
def server(world):  # noqa: F811
    with tool.open_server(0) as found:
        found.demo = demo_of(world)
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
    assert tool.uploaded(encoded(Image.new("RGB", (8, 4)), exif=exif), "the query").size == (4, 8)


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
    assert status == 413 and answer["error"].startswith("The image of the query has more than 100,000,000 pixels")


@pytest.mark.parametrize("headers, status", [
    ({"Content_Type": "text/plain"}, 415),  # all that a form of another site can send
    ({"Content_Type": "application/json", "Content_Length": str(25 << 20)}, 413),
    ({"Content_Type": "application/json", "Content_Length": "-1"}, 411),
    ({"Content_Type": "application/json", "Host": "evil.example"}, 403)])
def test_headers_that_will_not_do(server, headers, status):
    assert ask(server, "POST", "/rerank", b"", **headers)[0] == status


@pytest.mark.parametrize("path, chunked, headers, status", [
    ("/rerank", False, {"Content_Type": "text/plain"}, 415), ("/none", False, {}, 404),
    ("/rerank", True, {"Content_Type": "application/json"}, 411), ("/rerank", False, {"Host": "evil.example"}, 403),
    ("/rerank", False, {"Content_Type": "application/json"}, 413)])
def test_refusal_of_what_is_still_being_sent(server, path, chunked, headers, status):
    """More than the kernel's buffers hold: who sends it would meet a closed connection, and read no answer."""
    pieces = [b"x" * (1 << 20)] * 25
    assert ask(server, "POST", path, iter(pieces) if chunked else b"".join(pieces), **headers)[0] == status


def test_bug_is_told_to_both_sides(server, monkeypatch):
    """The browser gets a sentence; the exception goes on to the server, whose way is to print its traceback."""
    seen = queue.Queue()
    monkeypatch.setattr(server, "handle_error", lambda *_: seen.put(sys.exc_info()[0]))
    monkeypatch.setattr(server.demo, "answer", lambda request: 1 / 0)
    status, found = post(server, example=0, question="0")
    assert status == 500 and "terminal" in found["error"] and seen.get(timeout=20) is ZeroDivisionError


def test_body_that_never_comes(server, monkeypatch):
    monkeypatch.setattr(tool.Handler, "timeout", .2)
    monkeypatch.setattr(tool, "UNREAD_SECONDS", .2)
    assert ask(server, "POST", "/rerank", b"{", Content_Type="application/json", Content_Length="9")[0] == 408


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


# ---------------------------------------------------------------------------------------------------------- a service

def sent(server, **more):
    """The two halves, asked "0" (the left one: red), with candidates of the request."""
    return post(server, image=encoded(two_halves()), question="Which, 0", **more)


def test_candidates_of_a_request(server, fakes):  # noqa: F811
    """Pictures, texts, both (Eq. 3: red and "blue" make purple) and vectors of any length; encoded once."""
    named = [{"image": encoded(square("green")), "name": "leaf"}, {"text": "red"}, {"vector": [255, 0, 255]},
             {"image": encoded(square("red")), "text": " blue ", "name": 7}]
    before = fakes.scorer.images
    for _ in range(2):
        status, found = sent(server, candidates=named)
        assert status == 200 and found["ranking"] == [1, 2, 3, 0] and not found["retrieved"]
        assert found["box"] == list(LEFT) and found["decision"] == "REGION" and found["size"] == [64, 64]
        np.testing.assert_allclose([row["score"] for row in found["candidates"]], [1, HALF, HALF, 0], atol=1e-6)
        np.testing.assert_allclose([row["score_before"] for row in found["candidates"]], [HALF, 1, 1, 0], atol=1e-6)
        assert [row["name"] for row in found["candidates"]] == ["1", "2", "7", "leaf"]
        assert [(row["text"], row["row"], row["positive"]) for row in found["candidates"]][:2] == [
            ("red", None, False), ("", None, False)]
    assert (fakes.scorer.texts, fakes.scorer.images - before) == (2, 2 + 2 * 2)  # and each time the query and its crop
    assert post(server, example=0, question="0", candidates=named)[1]["candidates"][0]["positive"] is False
    server.demo.data, server.demo.examples = None, 0  # a service needs no knowledge base
    assert sent(server, candidates=named)[0] == 200
    status, found = sent(server)
    assert status == 400 and "no knowledge base here: send candidates" in found["error"]


def test_service_of_a_run_whose_data_is_gone(world):  # noqa: F811
    (world / "data").rename(world / "gone")
    found = demo_of(world)
    assert found.examples == 0 and found.about()["dataset"] is None
    answer = found.answer({"image": encoded(two_halves()), "question": "0", "candidates": [{"text": "red"}]})
    assert answer["decision"] == "REGION" and answer["ranking"] == [0]


def test_what_is_kept_of_a_request_is_limited(server, monkeypatch, fakes):  # noqa: F811
    monkeypatch.setattr(tool, "KNOWN_LIMIT", 2)
    for name in ("red", "blue", "green", "purple"):
        assert sent(server, candidates=[{"text": name}])[0] == 200 and len(server.demo.known) <= 3
    assert sent(server, candidates=[{"text": "red"}])[0] == 200 and fakes.scorer.texts == 5
    read = []
    fakes.scorer.text_features = lambda texts: read.append(texts) or np.ones((1, 3), np.float32)
    assert sent(server, candidates=[{"text": "x" * 20_000}])[0] == 200 and read == [["x" * 10_000]]
    assert sent(server, candidates=[{"text": "red"}] * 200)[0] == 200
    picture = encoded(square("red"))  # the same letters as a picture and as a text are two features
    for kind, score in (("image", 1), ("text", 3 ** -.5)):
        assert sent(server, candidates=[{kind: picture}])[1]["candidates"][0]["score"] == pytest.approx(score)


@pytest.mark.parametrize("candidates, complaint", [
    ([], "a list of 1 to 200"), ({}, "a list of 1 to 200"), ([{"text": "red"}] * 201, "a list of 1 to 200"),
    (["red"], "a list of 1 to 200"), ([{"text": "red"}, {}], "No direction for candidate 1"),
    ([{"text": " "}], "candidate 0"), ([{"image": "???"}], "image of candidate 0 did not arrive whole"),
    ([{"image": base64.b64encode(b"GIF89a").decode()}], "sent for candidate 0 cannot be read as an image"),
    ([{"image": ["x"]}], "candidate 0 did not arrive"),
    *[([{"vector": vector}], "a vector of 3 numbers") for vector in (
        [1, 2], [0, 0, 0], [1, 2, float("nan")], [1, 2, 10 ** 400], [[1], [2, 3]], ["a", "b", "c"], None, 3)]])
def test_candidates_that_will_not_do(server, candidates, complaint):
    status, found = sent(server, candidates=candidates)
    assert status == 400 and complaint in found["error"]


def test_sliver_of_a_picture(server):
    """201 : 1 is more than Qwen2.5-VL resizes."""
    status, found = post(server, image=encoded(Image.new("RGB", (3, 603))), question="0")
    assert status == 413 and "has 3 x 603 pixels: cut it, one side may be at most 200 times the other" in found["error"]
    assert post(server, image=encoded(Image.new("RGB", (3, 600), COLOURS["red"])), question="2")[0] == 200


def test_crop_that_was_not_taken(server):
    assert post(server, example=2, question="2", spared=True)[1]["spared"] == list(LEFT)
    assert post(server, example=2, question="2")[1]["spared"] is None
    assert post(server, example=0, question="0", spared=True)[1]["spared"] is None
    assert post(server, example=0, question="0", spared=True, force="FULL")[1]["spared"] == list(LEFT)


def test_first_example_is_one_that_the_crop_rescues(world, fakes):  # noqa: F811
    """Only query 0's right answer is found by its crop; 1 crops elsewhere, 2 keeps the image, 3 cannot be read."""
    labels = [[0, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 0]]
    for order, first in (((0, 1, 2, 3), 0), ((1, 2, 3, 0), 3), ((1, 2, 3), 0)):
        queries = [Query(f"q {i}", f"q{i}.png", f"What is this, {i}", ["red"]) for i in order]
        write_split(world / "data", "test", queries, pool=[[0, 1, 2]] * len(order), pool_image=[[0, 2, 4]] * len(order),
                    labels=[[0, 1, 0] if i == 0 else labels[i] for i in order], retrieval=[[1., .7, .7]] * len(order),
                    full=[(127.5, 0, 127.5)] * len(order))
        assert demo_of(world).first == first
    (world / "raw" / "q1.png").unlink()  # one that cannot be asked is passed over
    write_split(world / "data", "test", [Query(f"q {i}", f"q{i}.png", f"What is this, {i}", ["red"]) for i in (1, 0)],
                pool=[[0, 1, 2]] * 2, pool_image=[[0, 2, 4]] * 2, labels=[[0, 1, 0]] * 2, retrieval=[[1., .7, .7]] * 2,
                full=[(127.5, 0, 127.5)] * 2)
    assert demo_of(world).first == 1


# -------------------------------------------------------------------------------------------- pictures of one's own

def test_folder_of_pictures(tmp_path, fakes, monkeypatch):  # noqa: F811
    """Four colours: a picture's pool is the other three, nearest first; texts count; another picture meets all four."""
    photos = paint(tmp_path / "photos")
    (photos / "green.txt").write_text("blue")
    folder.write_folder(str(photos), fakes.scorer, str(tmp_path / "data" / "photos"))
    data = load_data(str(tmp_path / "data" / "photos"), "test", fakes.scorer)
    names = [query.query_id for query in data.queries]
    assert names == sorted(NAMES) and data.manifest["K"] == 3 and not data.labels.any()
    assert [[names[j] for j in row] for row in data.pool][2] == ["blue", "red", "green"]  # purple: HALF, HALF, 0
    np.testing.assert_allclose(data.retrieval[2], [HALF, HALF, 0], atol=1e-3)
    assert data.open_image(1).size == (8, 8) and data.candidate_image_path(3) == str(photos / "red.png")
    np.testing.assert_allclose(data.kb_text, [[0] * 3, COLOURS["blue"], [0] * 3, [0] * 3])
    found = demo_of(tmp_path, "--policy", "scripted", "--data", str(tmp_path / "data" / "photos"))
    assert found.example(0) == {"id": "blue", "question": "What is this?", "in_pool": None}
    assert found.about()["dataset"] == "pictures of photos" and found.first == 0
    answer = found.answer({"image": encoded(two_halves()), "question": "0"})
    assert answer["candidates"][0]["name"] == "red" and len(answer["candidates"]) == 3
    monkeypatch.setattr(folder, "load_scorer", lambda *asked: fakes.scorer)
    command = [str(photos), "--scorer", "colours", "--k", "2", "--out"]
    with pytest.raises(SystemExit, match="folder: .* holds prepared data already"):
        folder.main([*command, str(tmp_path / "data" / "photos")])
    folder.main([*command, str(tmp_path / "two")])
    assert load_data(str(tmp_path / "two"), "test").pool.shape == (4, 2)
    for name in NAMES[1:]:
        (photos / f"{name}.png").unlink()
    with pytest.raises(InputError, match="holds one picture"):
        folder.write_folder(str(photos), fakes.scorer, str(tmp_path / "one"))


def test_folder_with_a_model_of_open_clip(tmp_path, table):  # noqa: F811
    """Random weights: what is stored is what the model gives, and the folder knows its scorer."""
    table("tiny", CLIP, {"openai": {**OPENAI, "quick_gelu": False}})
    save_random(tmp_path / "w.safetensors", "tiny")
    photos = paint(tmp_path / "photos")
    (photos / "red.txt").write_text("red", encoding="utf-8")
    name = f"open_clip:tiny/openai={tmp_path}/w.safetensors"
    folder.main([str(photos), "--scorer", name, "--out", str(tmp_path / "data")])
    scorer = load_scorer(name)
    data = load_data(str(tmp_path / "data"), "test", scorer)
    full = scorer.image_features([square("red")])
    np.testing.assert_allclose(data.kb_image[3:], full, atol=1e-2, rtol=1e-2)
    np.testing.assert_allclose(data.kb_text[3:], scorer.text_features(["red"]), atol=1e-2, rtol=1e-2)
    assert data.manifest["scorer"]["name"] == name and data.manifest["dim"] == 32


def test_kb_of_the_command(world, fakes, monkeypatch, capsys):  # noqa: F811
    """--kb takes the run's policy, the scorer that is named, and leaves nothing behind."""
    photos, seen = paint(world / "photos"), []
    (photos / "red.txt").write_text("red")

    def serve(server):
        seen.append((server.demo.about(), server.demo.models.folder,
                     server.demo.answer({"example": 0, "question": "What, 0"})))

    monkeypatch.setattr(tool.ThreadingHTTPServer, "serve_forever", serve)
    command = ["--run", str(world / "run"), "--port", "0", "--kb"]
    tool.main([*command, str(photos), "--scorer", "open_clip:X/y", "--k", "2"])
    (about, used, answer), = seen
    assert about["examples"] == about["entities"] == 4 and about["dataset"] == "pictures of photos"
    assert fakes.scorers[0][0] == "open_clip:X/y" and not os.path.exists(used)
    assert len(answer["candidates"]) == 2 and "blue" not in [row["name"] for row in answer["candidates"]]
    assert {row["name"]: row["text"] for row in answer["candidates"]}.get("red", "red") == "red"
    with pytest.raises(SystemExit, match="demo: candidates .*none: no folder"):
        tool.main([*command, str(world / "none")])


def test_make_takes_a_folder():
    printed = make("-n", "demo", "KB=my photos", "DEMO_FLAGS=--scorer open_clip:X/y").stdout
    assert '--kb "my photos" --scorer open_clip:X/y' in printed and "--kb" not in make("-n", "demo").stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_of_the_docs(server, tmp_path, fakes):  # noqa: F811
    """The block of docs/demo.md, run as it stands; and every field of the answer is explained there."""
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    block, = re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    two_halves().save(tmp_path / "q.jpg")
    square("red").save(tmp_path / "tower.jpg")
    fakes.scorer.text_features = lambda texts: np.tile(np.float32(COLOURS["blue"]), (len(texts), 1))
    fakes.policy.act = lambda images, questions, **how: [Action("REGION", LEFT, .9, "") for _ in questions]
    block = block.replace("8000", str(server.server_port))
    done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranking"] and [row["name"] for row in found["candidates"]][0] == "tower"
    assert [name for name in (*found, *found["candidates"][0]) if f"`{name}`" not in page] == []
