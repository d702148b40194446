"""A web page to try a policy on, and a service for pipelines in any language: an image and a question go in, the
ranking of the candidates before and after comes out.

    python -m tools.demo --data data/world --run runs/world --port 8000      # http://127.0.0.1:8000
    python -m tools.demo --kb photos --scorer open_clip:ViT-B-32/openai      # pictures of your own (tools/folder.py)
    ssh -L 8000:127.0.0.1:8000 HOST                                          # first, where it runs on another machine

The page is tools/demo.html, one file. It asks:

    GET  /about                       names of the models, number of examples
    GET  /example/3                   id and question of query 3 of --split
    GET  /query/3?side=160            its image as JPEG, at most 160 pixels wide and high
    GET  /candidate/7?side=92         the image behind row 7 of kb_image.npy
    POST /rerank                      an image, a question and candidates -> ranking, box and scores (docs/demo.md)

It listens on this machine only, takes numbers and no file names, and answers one question at a time.
"""

import argparse
import base64
import binascii
import contextlib
import hashlib
import io
import json
import socket
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from scorer import BadSize, InputError, fuse, read_image, scores
from tools.folder import write_folder
from tools.rerank import KNOWN_LIMIT, Job, Models, Pool, add_model_flags, decide, read_object, record, rerank_batch

PAGE = Path(__file__).with_name("demo.html")
UPLOAD_BYTES = 24 << 20  # of a request; the page scales its images down before it sends them
UNREAD_BYTES, UNREAD_SECONDS = 256 << 20, 5  # of a body that was refused: read and forgotten; waited for the next piece
CANDIDATES = 200  # of a request
QUESTION_LENGTH, TEXT_LENGTH = 1_000, 10_000  # characters of a question; of a candidate's text, the rest is not read


class Refusal(Exception):
    """An HTTP answer other than 200: (status, sentence)."""


class Demo:
    """What can be asked for. Nothing in a request names a file: images are numbers of the data's own rows."""

    def __init__(self, models):
        self.models, self.known = models, {}
        self.data = models.data if models.folder else None  # without, it ranks the candidates that are sent
        self.examples = len(self.data or ())
        self.lock = threading.Lock()  # the models are not thread-safe, and two queries at once are not faster
        self.first = self.rescued()

    def rescued(self):
        """The first example whose right answer the whole image misses and the policy's view finds; else 0."""
        data = self.data
        missed = (i for i in range(min(self.examples, 1000)) if data.labels[i].any()
                  and not data.labels[i][np.argmax(scores(data.full[i], data.candidates(i)))])
        for i in islice(missed, 8):
            with contextlib.suppress(Refusal, InputError, FileNotFoundError):  # this one cannot be asked: the next
                if self.answer({"example": i, "question": data.queries[i].question})["candidates"][0]["positive"]:
                    return i
        return 0

    def about(self):
        settings, data = self.models.settings, self.data
        return {"policy": settings["policy"], "adapter": settings["adapter"], "scorer": self.models.scorer.name,
                "dataset": data and data.manifest["dataset"], "entities": data and len(data.kb_text),
                "examples": self.examples, "first": self.first,
                "threshold": 0.5 if self.models.threshold is None else self.models.threshold}

    def example(self, i):
        i = number(i, self.examples)
        query = self.data.queries[i]
        return {"id": query.query_id, "question": query.question,
                "in_pool": bool(self.data.labels[i].any()) if query.positives else None}  # None: no answer is known

    def image(self, kind, i):
        """PIL image of example i ("query"), or behind row i of kb_image.npy ("candidate")."""
        if kind == "query":
            return self.data.open_image(number(i, self.examples))
        return read_image(self.data.candidate_image_path(number(i, len(self.data.kb_image) if self.data else 0)))

    def answer(self, request):
        """The object of a POST /rerank -> the one that is sent back (docs/demo.md)."""
        question, force, i = request.get("question"), request.get("force"), request.get("example")
        if not isinstance(question, str) or not question.strip() or len(question) > QUESTION_LENGTH:
            raise Refusal(400, f"Ask a question of 1 to {QUESTION_LENGTH} characters.")
        if force not in (None, "FULL", "REGION"):
            raise Refusal(400, "The decision is FULL, REGION or left to the policy.")
        row, models, started = None if i is None else number(i, self.examples), self.models, time.perf_counter()
        with self.lock:
            image = uploaded(request.get("image"), "the query") if row is None else self.data.open_image(row)
            full = models.scorer.image_features([image])  # [1, D]
            pool, texts = self.pool(request.get("candidates"), row, full[0])
            asked = [image], [question.strip()]
            result = rerank_batch(*asked, [pool.features], full, models.policy, models.scorer, models.decode,
                                  models.threshold, force, models.fuse)[0]
            spared = None  # the box that a FULL did not take
            if request.get("spared") and result.action.decision == "FULL":
                spared = decide(models.policy, *asked, models.decode, None, "REGION")[0].box
        labels = None if row is None or pool.rows is None else self.data.labels[row]  # [K]
        found = record(pool, result)
        for candidate in found["candidates"]:
            k = candidate["index"]
            candidate |= {"title": pool.titles[k], "text": texts[k], "row": pool.rows and int(pool.rows[k]),
                          "positive": labels is not None and bool(labels[k])}
        return {**found, "ranking": result.ranking, "spared": spared, "seconds": time.perf_counter() - started,
                "retrieved": row is None and pool.rows is not None}

    def pool(self, sent, row, full):
        """The candidates of a query -> Pool, their texts. full: [D], the feature of its whole image."""
        if sent is None and self.data is None:
            raise Refusal(400, "There is no knowledge base here: send candidates, or start with --data or --kb.")
        if sent is None:
            pool = self.models.pool(Job("", None, None, row=row), full)
            return pool, [self.data.entity(self.data.kb_entity[m])["text"] for m in pool.rows]
        if not isinstance(sent, list) or not 0 < len(sent) <= CANDIDATES or not all(isinstance(c, dict) for c in sent):
            raise Refusal(400, f"The candidates are a list of 1 to {CANDIDATES} objects.")
        features = np.stack([self.vector(c, f"candidate {k}") for k, c in enumerate(sent)])  # [K, D]
        names = [str(c.get("name", k)) for k, c in enumerate(sent)]
        return Pool(names, names, features, None), [str(c.get("text") or "") for c in sent]

    def vector(self, candidate, what):
        """{"image": base64 and/or "text"} or {"vector": [D]} -> float32 [D] of Eq. 3."""
        parts = [candidate["vector"]] if "vector" in candidate else [
            self.feature(kind, content, what) for kind in ("image", "text")
            if (content := str(candidate.get(kind) or "").strip())]
        with contextlib.suppress(ValueError, TypeError, OverflowError):  # none, ragged, no numbers, infinite, zero
            vector = fuse(np.array(parts, np.float32).sum(0))  # Eq. 3
            if vector.shape == (self.models.scorer.dim,):
                return vector
        raise Refusal(400, f"No direction for {what}: it needs an image, a text or a vector of "
                      f"{self.models.scorer.dim} numbers.")

    def feature(self, kind, content, what):
        """float32 [D] of a base64 image or of a text, kept for the next time."""
        key, scorer = (kind, hashlib.sha256(content.encode()).digest()), self.models.scorer
        if len(self.known) > KNOWN_LIMIT:
            self.known.clear()
        if key not in self.known:
            self.known[key] = (scorer.text_features([content[:TEXT_LENGTH]]) if kind == "text" else
                               scorer.image_features([uploaded(content, what)]))[0]
        return self.known[key]


def number(text, below):
    """A whole number of [0, below); Refusal otherwise."""
    if not str(text).isascii() or not str(text).isdigit() or len(str(text)) > 12 or not int(text) < below:
        raise Refusal(404, f"There is no number {str(text)[:20]!r} here; they run from 0 to {below - 1}.")
    return int(text)


def uploaded(text, what):
    """base64 of an image file -> PIL RGB. what: whose image it is, for messages."""
    try:
        return read_image(io.BytesIO(base64.b64decode(text or "", validate=True)), f"of {what}")
    except BadSize as error:
        raise Refusal(413, f"The {error}.") from error
    except InputError as error:
        raise Refusal(400, f"What was sent for {what} cannot be read as an image.") from error
    except (binascii.Error, ValueError, TypeError) as error:  # no base64, no text
        raise Refusal(400, f"The image of {what} did not arrive whole.") from error


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
            return "image/jpeg", jpeg(demo.image(*parts), side)
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
            raise Refusal(413, f"The request is too large; at most {UPLOAD_BYTES >> 20} MB can be sent.")
        return as_json(self.server.demo.answer(read_object(self.rfile.read(int(length)), "request")))

    def reply(self, make):
        # What is said of an exception that is none of those below. It is not caught: the terminal shows its traceback.
        status, (kind, content) = 500, as_json({"error": "This is a bug: the terminal of tools.demo shows where."})
        try:
            # A page elsewhere whose name was bent to 127.0.0.1 comes with its own name here.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                raise Refusal(403, "Open this page as http://127.0.0.1.")
            status, (kind, content) = 200, make()
        except Refusal as refusal:
            status, sentence = refusal.args
            kind, content = as_json({"error": sentence})
        except (InputError, FileNotFoundError) as error:  # bad input, or a file of the data that has gone
            status, (kind, content) = 400, as_json({"error": str(error)})
        except TimeoutError:
            status, (kind, content) = 408, as_json({"error": "The request did not arrive whole."})
        finally:
            with contextlib.suppress(OSError):  # a browser that no longer wants a thumbnail hangs up
                self.send(status, kind, content)
                if status != 200:
                    self.forget()

    def forget(self):
        """Read what a client still sends of a request that has its answer: were the connection closed on it, it would
        get a broken pipe in place of the answer."""
        self.connection.shutdown(socket.SHUT_WR)  # the answer ends here, for clients that wait for its end
        self.connection.settimeout(UNREAD_SECONDS)
        left = UNREAD_BYTES
        while left > 0 and (piece := self.rfile.read1(1 << 16)):
            left -= len(piece)

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
    parser.add_argument("--kb", metavar="FOLDER", help="a folder of your own pictures in place of --data; embedded at "
                        "each start, tools/folder.py does it once")
    add_model_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        # The server before the models, which take a minute: the port may be taken.
        with open_server(args.port) as server, tempfile.TemporaryDirectory() as folder:
            models = Models(args)
            if args.kb:
                models.folder, models.split = folder, "test"
                write_folder(args.kb, models.scorer, folder, args.k or 20)
            server.demo = Demo(models)
            print(f"http://127.0.0.1:{server.server_port}    (stop with Ctrl-C)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"demo: {error}") from error


if __name__ == "__main__":
    main()
