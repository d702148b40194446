"""A web page to try a trained policy on: pick a query or drop an image, ask, and see the ranking before and after.

    python -m tools.demo --data data/world --run runs/world --port 8000      # http://127.0.0.1:8000
    ssh -L 8000:127.0.0.1:8000 HOST                                          # first, where it runs on another machine

The page is tools/demo.html, one file. It asks:

    GET  /about                       names of the models, number of examples
    GET  /example/3                   id and question of query 3 of --split
    GET  /query/3?side=160            its image as JPEG, at most 160 pixels wide and high
    GET  /candidate/7?side=92         the image behind row 7 of kb_image.npy
    POST /rerank                      {"example": 3 or "image": base64, "question", "force"} -> the answer, as JSON

It listens on this machine only, takes numbers and no file names, and answers one question at a time.
"""

import argparse
import base64
import binascii
import contextlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from scorer import InputError, TooLarge, read_image
from tools.rerank import Job, Models, add_model_flags, read_object, record

PAGE = Path(__file__).with_name("demo.html")
UPLOAD_BYTES = 12 << 20  # of a request; the page scales its image down before it sends it
QUESTION_LENGTH = 1_000  # characters


class Refusal(Exception):
    """An HTTP answer other than 200: (status, sentence)."""


class Demo:
    """What the page can ask for. Nothing in a request names a file: images are numbers of the data's own rows."""

    def __init__(self, models):
        self.models, self.data = models, models.data
        self.lock = threading.Lock()  # the models are not thread-safe, and two queries at once are not faster

    def about(self):
        settings = self.models.settings
        return {"policy": settings["policy"], "adapter": settings["adapter"], "scorer": self.models.scorer.name,
                "split": self.data.split, "examples": len(self.data), "entities": len(self.data.kb_text),
                "threshold": 0.5 if self.models.threshold is None else self.models.threshold}

    def example(self, i):
        i = number(i, len(self.data))
        query = self.data.queries[i]
        return {"id": query.query_id, "question": query.question, "in_pool": bool(self.data.labels[i].any())}

    def query_image(self, i, side):
        return jpeg(self.data.open_image(number(i, len(self.data))), side)

    def candidate_image(self, m, side):
        return jpeg(read_image(self.data.candidate_image_path(number(m, len(self.data.kb_image)))), side)

    def answer(self, request):
        """{"question", "force", and "example": i or "image": base64} -> what the page draws."""
        question, force, i = request.get("question"), request.get("force"), request.get("example")
        if not isinstance(question, str) or not question.strip() or len(question) > QUESTION_LENGTH:
            raise Refusal(400, f"Ask a question of 1 to {QUESTION_LENGTH} characters.")
        if force not in (None, "FULL", "REGION"):
            raise Refusal(400, "The decision is FULL, REGION or left to the policy.")
        row, started = None if i is None else number(i, len(self.data)), time.perf_counter()
        with self.lock:
            image = uploaded(request.get("image")) if row is None else self.data.open_image(row)
            pool, result = self.models.answer([Job("", image, question.strip(), row=row)], force)[0]
        found = record(pool, result)
        for candidate in found["candidates"]:
            k = candidate["index"]
            candidate |= {"title": pool.titles[k], "row": int(pool.rows[k]),
                          "positive": row is not None and bool(self.data.labels[row, k])}
        return {**found, "retrieved": row is None, "seconds": time.perf_counter() - started}


def number(text, below):
    """A whole number of [0, below); Refusal otherwise."""
    if not str(text).isascii() or not str(text).isdigit() or len(str(text)) > 12 or not int(text) < below:
        raise Refusal(404, f"There is no number {str(text)[:20]!r} here; they run from 0 to {below - 1}.")
    return int(text)


def uploaded(text):
    """base64 of an image file -> PIL RGB."""
    try:
        return read_image(io.BytesIO(base64.b64decode(text or "", validate=True)), "that was sent")
    except TooLarge as error:
        raise Refusal(413, f"The {error}.") from error
    except InputError as error:
        raise Refusal(400, "This file cannot be read as an image.") from error
    except (binascii.Error, ValueError, TypeError) as error:  # no base64, no text
        raise Refusal(400, "The image did not arrive whole.") from error


def jpeg(image, side=None):
    """PIL RGB -> bytes; longest side at most `side` pixels. Encoded anew, so that no EXIF turns it under its box."""
    if side is not None:
        image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, format="jpeg", quality=92)
    return content.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Routes. self.server.demo: Demo."""

    timeout = 60  # seconds for a request to arrive: a body that never ends must not hold a thread
    server_version, sys_version = "demo", ""

    def do_GET(self):
        self.reply(self.get)

    def do_POST(self):
        self.reply(self.post)

    def get(self):
        url, demo = urlsplit(self.path), self.server.demo
        parts = url.path.strip("/").split("/")
        if url.path == "/":
            return "text/html; charset=utf-8", PAGE.read_bytes()
        if parts == ["about"]:
            return as_json(demo.about())
        if len(parts) == 2 and parts[0] == "example":
            return as_json(demo.example(parts[1]))
        if len(parts) == 2 and parts[0] in ("query", "candidate"):
            side = parse_qs(url.query).get("side")
            side = None if side is None else max(16, number(side[0], 4097))
            return "image/jpeg", (demo.query_image if parts[0] == "query" else demo.candidate_image)(parts[1], side)
        raise Refusal(404, "There is no such page.")

    def post(self):
        if self.path != "/rerank":
            raise Refusal(404, "There is no such page.")
        # A form of another site can post, but not with this type unless the browser asks here first.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "Send application/json.")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refusal(411, "Say how long the request is.")
        if len(length) > 12 or int(length) > UPLOAD_BYTES:
            raise Refusal(413, f"The image is too large; at most {UPLOAD_BYTES >> 20} MB can be sent.")
        return as_json(self.server.demo.answer(read_object(self.rfile.read(int(length)), "request")))

    def reply(self, make):
        status = 200
        try:
            # A page elsewhere whose name was bent to 127.0.0.1 comes with its own name here.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                raise Refusal(403, "Open this page as http://127.0.0.1.")
            kind, content = make()
        except Refusal as refusal:
            status, sentence = refusal.args
            kind, content = as_json({"error": sentence})
        except (InputError, FileNotFoundError) as error:  # bad input, or a file of the data that has gone
            status, (kind, content) = 400, as_json({"error": str(error)})
        with contextlib.suppress(ConnectionError):  # a browser that no longer wants a thumbnail hangs up
            self.send(status, kind, content)

    def send(self, status, kind, content):
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(content))),
                            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
                            ("Content-Security-Policy", "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
                             "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
                             "form-action 'none'; frame-ancestors 'none'")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing: a line a thumbnail would bury what matters."""


def as_json(value):
    return "application/json", json.dumps(value).encode()


def open_server(port):
    """HTTP server on this machine only, still without its Demo. port 0 = any free one; .server_port has it."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} cannot be used ({error}): name another, as in --port 8001 (or make demo "
                         "DEMO_PORT=8001)") from error
    server.daemon_threads = True
    return server


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1, this machine only; 0 = any free one")
    add_model_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        with open_server(args.port) as server:  # before the models, which take a minute: the port may be taken
            server.demo = Demo(Models(args))
            print(f"http://127.0.0.1:{server.server_port}    (stop with Ctrl-C)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"demo: {error}") from error


if __name__ == "__main__":
    main()
