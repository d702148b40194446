"""Re-rank with a trained policy: one query, a file of queries, or a web page to try it on. Where the method is used.

    python -m tools.rerank --image q.jpg --question "Where does this beetle live?" --candidates FOLDER
    python -m tools.rerank --query E-VQA_test_1                         # a query of the prepared data, with its pool
    python -m tools.rerank --batch in.jsonl --out out.jsonl             # many; cut short, it goes on where it stopped
    python -m tools.rerank --serve                                      # http://127.0.0.1:8000

Candidates come from (--candidates; a line of --batch has "candidates": a list of such objects, or "run": a .trec):

    a folder      its images; beetle.txt, where there is one, is the text of beetle.jpg
    a .jsonl      one {"image": path, "text": "...", "name": "..."} a line; text and name may be left out
    a .trec       a run over the prepared knowledge base of --data: the documents are its entity ids
    nothing       retrieval: the K entities of --data whose best image is nearest to the query image

As a function, with models and images of your own:

    from tools.rerank import rerank
    result = rerank(image, question, [(image_1, text_1), (image_2, text_2)], policy, scorer)
    result.ranking, result.action, result.before, result.after, result.view

Boxes are (x1, y1, x2, y2) in pixels of the query image, right and bottom exclusive. Simplified: the policy's greedy
answer only, and no approximate index: retrieval reads all image features of the knowledge base once a query.
"""

import argparse
import base64
import binascii
import contextlib
import hashlib
import io
import json
import os
import sys
import threading
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from policy import Action, load_policy
from scorer import (DAMAGED, Data, as_rgb, crop, fuse, load_data, load_scorer, prepared_dtype, read_image,
                    read_manifest, replacing, scores, write_json)

PAGE = Path(__file__).with_name("demo.html")
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # what a folder of candidates is read for
KNOWN_LIMIT = 200_000          # features kept between queries of a batch: about 1 GB at D = 1,280
UPLOAD_BYTES = 12 << 20        # of a request to the page; it scales its image down before it sends it
UPLOAD_PIXELS = 40_000_000     # of an image that was sent: a small file can unpack to gigabytes
QUESTION_LENGTH = 1_000        # characters


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.rerank", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_argument_group("one query")
    one.add_argument("--image", help="file of the query image")
    one.add_argument("--question", help="what is asked about it")
    one.add_argument("--query", metavar="ID", help="take image and question from this query of --data; with a .trec, "
                                                   "also the query whose candidates are meant")
    one.add_argument("--candidates", metavar="FILE_OR_DIR", help="folder, .jsonl or .trec, see above; default: the "
                                                                 "pool of --query, or retrieval from --data")
    one.add_argument("--save-image", metavar="FILE", help="write the query image with the box drawn, .png or .jpg")
    one.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    many = parser.add_argument_group("many queries")
    many.add_argument("--batch", metavar="FILE", help='.jsonl of {"id", "image", "question", "candidates": [...] or '
                      '"run": a .trec or neither: retrieval}, paths relative to the file; or a .trec: all its queries')
    many.add_argument("--out", metavar="FILE", help=".jsonl to write for --batch; what it already holds is not redone")
    many.add_argument("--batch-size", type=int, default=16, help="queries a step, 1 or more; memory, not results")
    page = parser.add_argument_group("the page")
    page.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT",
                      help="serve the demo page on 127.0.0.1, this machine only; 0 = any free port; default 8000")
    models = parser.add_argument_group("models and data")
    models.add_argument("--run", help="folder of train.py: names policy, adapter, scorer and data; default runs/world, "
                                      "or none when --policy is given")
    models.add_argument("--policy", help="model id or folder; default: the one the run was trained from")
    models.add_argument("--adapter", help="folder of a LoRA adapter; default: the run's; without a run: none")
    models.add_argument("--scorer", help="scorer; default: the one that the data was prepared with, or the run's")
    models.add_argument("--scorer-dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the scorer's weights; default: as the data was prepared with --scorer-dtype, else "
                             "bfloat16 on CUDA, float32 elsewhere")
    models.add_argument("--policy-dtype", choices=("float32", "bfloat16"),
                        help="of the policy's weights; default: as the run was trained with --policy-dtype, else "
                             "bfloat16 on CUDA, float32 elsewhere")
    models.add_argument("--data", help="folder of prepare.py; default: the run's")
    models.add_argument("--split", default="test", help="split of --data that --query and the page's examples come "
                                                        "from: train, val or test")
    models.add_argument("--k", type=int, help="candidates taken from a .trec or from retrieval, best first, 1 or more; "
                                              "default: K of --data")
    models.add_argument("--decode", choices=("grammar", "free"), help="as in evaluate.py; default: as the run was "
                                                                      "trained, else grammar")
    models.add_argument("--threshold", type=float, help="crop where p(REGION | x) is above this, 0 to 1; default: the "
                                                        "likelier decision, which is .5")
    models.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 ...")
    return check_args(parser, parser.parse_args(argv))


def check_args(parser, args):
    """The arguments, or argparse's exit with a sentence that says what is missing."""
    if (args.batch is not None) + (args.serve is not None) + bool(args.image or args.query) != 1:
        parser.error("one of --image (with --question), --query, --batch or --serve is needed")
    if args.image and not args.question:
        parser.error("--image needs a --question: where to look depends on what is asked")
    if (args.batch is None) != (args.out is None):
        parser.error("--batch and --out need each other")
    if args.batch is not None and not args.batch.endswith((".jsonl", ".trec")):
        parser.error(f"--batch {args.batch}: expected a .jsonl or a .trec")
    if args.save_image and not args.save_image.lower().endswith((".png", ".jpg", ".jpeg")):
        parser.error(f"--save-image {args.save_image}: expected a name that ends in .png or .jpg")
    if (args.k is not None and args.k < 1) or args.batch_size < 1:
        parser.error("--k and --batch-size must be 1 or more")
    if args.serve is not None and not 0 <= args.serve <= 65535:
        parser.error(f"--serve {args.serve}: a port is 0 to 65535")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: a probability is 0 to 1")
    if args.threshold is not None and args.decode == "free":
        parser.error("--threshold needs --decode grammar: free text has no exact p(REGION | x)")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


# ------------------------------------------------------------------------------------------------------- the function

@dataclass(frozen=True)
class Reranking:
    """What re-ranking one query gave.

    ranking: [K] indices of the candidates, best first, by `after`; equal scores keep the order they were given in.
    before, after: float32 [K] cosines of the candidates, in the order given, with the full image and with `view`.
    action: policy.Action; its box is in pixels of the query image. MALFORMED was scored as FULL.
    view: the PIL image that was scored: the query image or what its box cuts out (Eq. 1).
    size: (width, height) of the query image, pixels: the frame of the box.
    """

    ranking: list[int]
    before: np.ndarray
    after: np.ndarray
    action: Action
    view: Image.Image
    size: tuple[int, int]


def rerank(image, question, candidates, policy, scorer, decode="grammar", threshold=None, force=None):
    """Choose a view of `image` by `question` and rank the candidates with it -> Reranking.

    image: path, read upright by its EXIF, or PIL image, taken as it lies. candidates: list of (image, text), images
    alike, text "" or None where there is none; or float [K, D], vectors of Eq. 3 that scorer.fuse made (of any length),
    which costs no encoding.
    policy, scorer: of load_policy, load_scorer. decode: "grammar" or "free". threshold: crop where p(REGION | x) is
    above it, None = the likelier decision (Sec. 3.2). force: None, "FULL" or "REGION", to see what it would do.
    Raises ValueError or FileNotFoundError naming the image, question or candidate that cannot be used.
    """
    if len(candidates) == 0:
        raise ValueError("no candidates: there is nothing to rank")
    image = open_image(image)
    if not isinstance(candidates, np.ndarray):
        candidates = candidate_features(candidates, scorer)
    full = scorer.image_features([image])
    return rerank_batch([image], [question], [candidates], full, policy, scorer, decode, threshold, force)[0]


def rerank_batch(images, questions, pools, full, policy, scorer, decode="grammar", threshold=None, force=None):
    """Many queries together -> list of Reranking.

    images: [B] PIL. questions: [B]. pools: B x [K, D] vectors of Eq. 3, K may differ. full: [B, D] features of the
    images: retrieval has them already, and FULL then encodes nothing more. The rest as in `rerank`.
    """
    actions = decide(policy, images, questions, decode, threshold, force)
    cropped = [i for i, action in enumerate(actions) if action.decision == "REGION"]
    views = list(images)
    for i in cropped:
        views[i] = crop(images[i], actions[i].box)  # Eq. 1
    seen = np.array(full, dtype=np.float32)  # a copy [B, D]; FULL and MALFORMED keep the full image
    if cropped:
        seen[cropped] = scorer.image_features([views[i] for i in cropped])
    results = []
    for i, pool in enumerate(pools):
        before, after = scores(np.stack([full[i], seen[i]]), pool)  # Eq. 2, 4: [2, K]
        results.append(Reranking(best_first(after), before, after, actions[i], views[i], images[i].size))
    return results


def decide(policy, images, questions, decode, threshold, force):
    """[B] Action: greedy, forced, or REGION wherever p(REGION | x) is above the threshold."""
    if threshold is None or force is not None:
        return policy.act(images, questions, decode=decode, force=force, batch_size=len(images))
    if decode != "grammar":
        raise ValueError("a threshold needs decode='grammar': free text has no exact p(REGION | x)")
    # The box has to be written before it is known whether it is wanted; p(REGION | x) is the same when forced.
    forced = policy.act(images, questions, decode=decode, force="REGION", batch_size=len(images))
    return [a if a.p_region > threshold else Action("FULL", None, a.p_region, a.text) for a in forced]


def best_first(values):
    """Indices of values [K] in falling order, equal ones in the order given."""
    return np.argsort(-values, kind="stable").tolist()


def open_image(image):
    """PIL image as RGB, from a PIL image or a path. A PIL image is not turned by its EXIF: the box is for the caller,
    in the pixels that he has."""
    return as_rgb(image) if isinstance(image, Image.Image) else read_image(os.fspath(image))


def candidate_features(candidates, scorer, known=None):
    """list of (image, text) -> float32 [K, D] by Eq. 3, normalised. known: a dict that keeps what was encoded, by path
    and by text, for the next call: candidates of one retrieval system come again and again."""
    known = {} if known is None else known
    # An image object is known by its id for this call only, while `candidates` keeps it alive.
    images = {key_of(image): image for image, _ in candidates}
    texts = {("text", text): text for _, text in candidates if text and text.strip()}
    encode(images, lambda part: scorer.image_features([open_image(image) for image in part]), scorer, known)
    if texts:
        encode(texts, scorer.text_features, scorer, known)
    no_text = np.zeros(scorer.dim, np.float32)  # [t != empty] of Eq. 3
    features = fuse(np.stack([known[key_of(image)] for image, _ in candidates]),
                    np.stack([known.get(("text", text), no_text) for _, text in candidates]))  # Eq. 3: [K, D]
    for key in [key for key in known if isinstance(key[1], int)]:
        del known[key]
    if len(known) > KNOWN_LIMIT:  # all of them: an order of use would cost more lines than encoding some again
        known.clear()
    return features


def key_of(image):
    return ("image", os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image))


def encode(items, features, scorer, known):
    """Put the features of {key: item} that are not known yet into `known`, in batches: images are opened as needed."""
    missing = [key for key in items if key not in known]
    for start in range(0, len(missing), scorer.batch_size):
        part = missing[start:start + scorer.batch_size]
        known.update(zip(part, features([items[key] for key in part])))


# ------------------------------------------------------------------------------------------- candidates: files -> pools

Candidate = namedtuple("Candidate", "name image text")  # image: a path


@dataclass
class Pool:
    """K candidates: names (for machines, unique), titles (to read), features [K, D] of Eq. 3; rows [K]: which images of
    the knowledge base they are, where they come from one."""

    names: list[str]
    titles: list[str]
    features: np.ndarray
    rows: list[int] | None = None


def read_folder(folder):
    """Images of a folder as candidates, by name; the text of x.jpg is x.txt. -> (candidates, number of other files)."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGES]
    texts = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    if not images:
        raise ValueError(f"{folder}: no images in this folder ({len(files)} other files); known endings are "
                         f"{' '.join(sorted(IMAGES))}")
    stems = {}
    for path in images:
        if path.stem in stems:
            raise ValueError(f"{folder}: {stems[path.stem].name} and {path.name} would be one candidate, as both take "
                             f"their text from {path.stem}.txt: rename one")
        stems[path.stem] = path
    used = len(images) + len(texts.keys() & stems.keys())
    return [Candidate(stem, str(path), read_text(texts[stem]) if stem in texts else "")
            for stem, path in stems.items()], len(files) - used


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def read_list(path):
    """A .jsonl of candidates -> list of Candidate; image paths are relative to the file."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            found.append(as_candidate(read_object(line, f"{path}:{number}"), os.path.dirname(path), f"{path}:{number}"))
    return checked(found, path)


def read_object(line, where):
    """One line of JSON -> dict."""
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object in braces, got {type(fields).__name__}")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:  # a lone \ud83d, which no tokenizer and no file takes
        raise ValueError(f"{where}: half a surrogate pair is no character ({str(error)[:80]})") from error
    return fields


def as_candidate(fields, folder, where):
    """{"image", "text", "name"} -> Candidate. A candidate without a name is called by its image."""
    if not isinstance(fields, dict):
        raise ValueError(f'{where}: a candidate is an object with "image", and if you like "text" and "name"')
    image = text_field(fields, "image", where)
    return Candidate(text_field(fields, "name", where, image), os.path.join(folder, image),
                     text_field(fields, "text", where, ""))


def text_field(fields, name, where, default=None):
    """fields[name], which must be a text that is not empty unless a default stands in for it."""
    value = fields.get(name, default)
    if not isinstance(value, str) or not (value or default is not None):
        raise ValueError(f"{where}: {name!r} must be a text{'' if default is not None else ' that is not empty'}, "
                         f"got {json.dumps(value)[:60]}")
    return value


def checked(candidates, where):
    """The candidates; ValueError when there are none or two share a name, which no output could tell apart."""
    if not candidates:
        raise ValueError(f"{where}: no candidates; there is nothing to rank")
    names = set()
    for candidate in candidates:
        if candidate.name in names:
            raise ValueError(f'{where}: candidate {candidate.name!r} is there twice; drop one or give each a "name"')
        names.add(candidate.name)
    return candidates


def read_run(path):
    """TREC run file, `query Q0 document rank score tag` -> {query: documents, best first}.

    By score, as trec_eval reads it: the rank column is not used. Equal scores keep the order of the file.
    """
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where, columns = f"{path}:{number}", line.split()
        if not columns:
            continue
        if len(columns) != 6:
            raise ValueError(f"{where}: {len(columns)} columns, a run has 6: query Q0 document rank score tag")
        documents = found.setdefault(columns[0], {})
        if columns[2] in documents:
            raise ValueError(f"{where}: document {columns[2]} is there twice for query {columns[0]}; drop one")
        try:
            documents[columns[2]] = float(columns[4])
        except ValueError as error:
            raise ValueError(f"{where}: {columns[4]!r} is no score; columns are query Q0 document rank score tag "
                             ) from error
    if not found:
        raise ValueError(f"{path}: an empty run; there is nothing to rank")
    return {query: sorted(documents, key=lambda name: -documents[name]) for query, documents in found.items()}


class Pools:
    """Where candidates come from. open_data() -> scorer.Data is called when the first one needs the knowledge base."""

    def __init__(self, scorer, open_data, k=None):
        self.scorer, self.open_data, self.wanted, self.known, self.runs = scorer, open_data, k, {}, {}

    @cached_property
    def data(self) -> Data:
        return self.open_data()

    @cached_property
    def k(self):
        return self.wanted or self.data.manifest["K"]

    @cached_property
    def first_row(self):
        """[E] first row of each entity in kb_image; an entity's rows are consecutive."""
        return np.searchsorted(self.data.kb_entity, np.arange(len(self.data.kb_text)))

    @cached_property
    def entity_of(self):
        """{entity id as a run file writes it (blanks quoted): line of kb.jsonl}."""
        with open(os.path.join(self.data.folder, "kb.jsonl"), encoding="utf-8") as file:
            return {trec_name(json.loads(line)["entity_id"]): j for j, line in enumerate(file)}

    @cached_property
    def query_of(self):
        """{query id as written, and as a run file writes it: row of the split}."""
        ids = [query.query_id for query in self.data.queries]
        return {name: i for i, query_id in enumerate(ids) for name in (query_id, quote(query_id))}

    def row_of(self, query_id):
        if query_id not in self.query_of:
            raise ValueError(f"{self.data.pool_file} has no query {query_id!r}; it has {len(self.data.queries)}, the "
                             f"first is {self.data.queries[0].query_id}; see also --split")
        return self.query_of[query_id]

    def of_files(self, candidates):
        names = [candidate.name for candidate in candidates]
        pairs = [(candidate.image, candidate.text) for candidate in candidates]
        return Pool(names, names, candidate_features(pairs, self.scorer, self.known))

    def of_kb(self, entities, rows):
        """entities [K]: lines of kb.jsonl; rows [K]: one image of each."""
        found = [self.data.entity(j) for j in entities]
        features = fuse(self.data.kb_image[rows], self.data.kb_text[entities])  # Eq. 3: [K, D]
        return Pool([entity["entity_id"] for entity in found],
                    [entity["title"] or entity["entity_id"] for entity in found], features, list(rows))

    def of_split(self, i):
        query = self.data.queries[i]
        return self.of_kb(query.pool, query.pool_image)

    def of_run(self, path, query_id, full):
        """The first K documents of query_id in a run file. full: [D], the query's full-image feature."""
        if path not in self.runs:
            self.runs[path] = read_run(path)
        run = self.runs[path]
        name = next((name for name in (query_id, quote(query_id)) if name in run), None)
        if name is None:
            raise ValueError(f"{path}: no query {query_id!r} in this run; it has {len(run)}, the first is "
                             f"{next(iter(run))}")
        documents = run[name][:self.k]
        unknown = [document for document in documents if document not in self.entity_of]
        if unknown:
            raise ValueError(f"{path}: document {unknown[0]} of query {name} is no entity of {self.data.folder} "
                             f"({len(unknown)} of {len(documents)} are not): is --data what the run was made with?")
        entities = [self.entity_of[document] for document in documents]
        return self.of_kb(entities, [self.image_row(j, full) for j in entities])

    def image_row(self, j, full):
        """The image that stands for entity j, as prepare.py chose it for the pools: the one nearest to the query."""
        first = int(self.first_row[j])
        if self.data.manifest["args"].get("candidate_image") == "first":
            return first
        last = int(np.searchsorted(self.data.kb_entity, j, side="right"))
        return first + int(np.argmax(scores(full, self.data.kb_image[first:last])))

    def retrieved(self, full):
        """The K entities whose best image is nearest to full [D]. Exact: every image feature is compared."""
        kb = self.data.kb_image
        cosines = np.concatenate([scores(full, kb[a:a + (1 << 16)]) for a in range(0, len(kb), 1 << 16)])  # [M]
        best = np.maximum.reduceat(cosines, self.first_row)  # [E]
        entities = best_first(best)[:self.k]
        return self.of_kb(entities, [self.image_row(j, full) for j in entities])


def trec_name(name):
    """An entity id as evaluate.py writes it into run files, which separate by blanks."""
    return quote(name, safe=":/?&=#%")


# ---------------------------------------------------------------------------------------------------------- the models

@dataclass
class Models:
    """Everything a query needs, loaded once. settings: what another run over the same output must have in common."""

    policy: object
    scorer: object
    pools: Pools
    decode: str
    threshold: float | None
    settings: dict

    def rerank(self, images, questions, pools, full, force=None):
        return rerank_batch(images, questions, [pool.features for pool in pools], full, self.policy, self.scorer,
                            self.decode, self.threshold, force)


def open_models(args):
    """Models as the arguments say; what they do not say, the run's config.json and the data's manifest do."""
    folder = args.run or (None if args.policy else "runs/world")
    config = read_config(folder) if folder else {}
    settings = config.get("args", {})
    policy_name, data = args.policy or config.get("policy"), args.data or config.get("data")
    scorer_name = args.scorer or (read_manifest(args.data)["scorer_name"] if args.data else config.get("scorer"))
    if not scorer_name:
        raise ValueError("no scorer: give --scorer, or --data, or a --run that was trained with one")
    adapter = args.adapter or (os.path.join(folder, "adapter") if folder else None)
    decode = args.decode or settings.get("decode", "grammar")
    if args.threshold is not None and decode == "free":
        raise ValueError(f"{folder} was trained with free decoding, which has no exact p(REGION | x): leave out "
                         "--threshold or add --decode grammar")
    # Without data, which candidates in files do not need, the type is the device's.
    prepared = data and os.path.isfile(os.path.join(data, "manifest.json"))
    dtype = args.scorer_dtype or (prepared_dtype(read_manifest(data)) if prepared else None)
    scorer = load_scorer(scorer_name, args.device, dtype)

    def open_data():
        if not data:
            raise ValueError("this needs the prepared knowledge base: give --data, the folder that prepare.py wrote")
        return load_data(data, args.split, scorer.identity)

    prompt = config.get("system_prompt")
    if "system_prompt" not in config and settings.get("system_prompt"):  # a run of before its config held the text
        prompt = Path(settings["system_prompt"]).read_text(encoding="utf-8")  # as it was trained: not stripped
    policy_dtype = args.policy_dtype or settings.get("policy_dtype")
    policy = load_policy(policy_name, adapter=adapter, device=args.device, max_pixels=settings.get("max_pixels"),
                         system_prompt=prompt, dtype=policy_dtype)
    policy.keep_prefix = True
    if "max_new_tokens" in settings:
        policy.max_new_tokens = settings["max_new_tokens"]
    same = {"policy": policy_name, "adapter": adapter, "scorer": scorer.identity, "decode": decode,
            "threshold": args.threshold, "k": args.k, "data": data,
            # By content, too: trained or prepared again, the same folder gives other answers.
            "adapter weights": digest(adapter, "adapter_model.safetensors"),
            "data files": digest(data, "manifest.json"), "system prompt": prompt,
            "max_pixels": settings.get("max_pixels"), "scorer_dtype": dtype, "policy_dtype": policy_dtype}
    return Models(policy, scorer, Pools(scorer, open_data, args.k), decode, args.threshold, same)


def digest(folder, name):
    """sha256 of a file in a folder, None where there is no such folder or file."""
    path = folder and os.path.join(folder, name)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and os.path.isfile(path) else None


def read_config(folder):
    """config.json of a run that has finished; FileNotFoundError with what to do otherwise."""
    weights = os.path.join(folder, "adapter", "adapter_model.safetensors")
    config = os.path.join(folder, "config.json")
    for path in (config, weights):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing: train first (`make data train`), name another --run, or give "
                                    "--policy and --scorer to use a model without an adapter")
    with open(config, encoding="utf-8") as file:
        return json.load(file)


# ----------------------------------------------------------------------------------------------------------- one query

def one_query(args, models):
    """--image or --query -> (image, question, Pool, Reranking)."""
    pools = models.pools
    row = pools.row_of(args.query) if args.query else None
    image = open_image(args.image) if args.image else pools.data.open_image(row)
    question = args.question or pools.data.queries[row].question
    full = models.scorer.image_features([image])  # [1, D]
    if args.candidates is None:
        # An image of one's own has no pool, even where --query is there for its question.
        pool = pools.retrieved(full[0]) if args.image else pools.of_split(row)
    else:
        pool = named_pool(args.candidates, args.query, full[0], pools)
    return image, question, pool, models.rerank([image], [question], [pool], full)[0]


def named_pool(source, query_id, full, pools):
    """Pool of a folder, a .jsonl or a .trec."""
    if os.path.isdir(source):
        candidates, others = read_folder(source)
        if others:
            print(f"note: {source}: {others} files are neither an image nor the text of one and were not used",
                  file=sys.stderr)
        return pools.of_files(candidates)
    if not os.path.isfile(source):
        raise FileNotFoundError(f"candidates {source} are missing: expected a folder of images, a .jsonl or a .trec")
    if source.endswith(".jsonl"):
        return pools.of_files(read_list(source))
    if not source.endswith(".trec"):
        raise ValueError(f"candidates {source}: expected a folder of images, a .jsonl or a .trec")
    if query_id is None:
        queries = list(read_run(source))
        if len(queries) > 1:
            raise ValueError(f"{source} has {len(queries)} queries, the first is {queries[0]}: say which by --query ID")
        query_id = queries[0]
    return pools.of_run(source, query_id, full)


def record(pool, result):
    """The JSON of a result: decision, box (pixels), p_region, text, size, and the candidates, best first."""
    place = {k: rank for rank, k in enumerate(best_first(result.before), 1)}
    action = result.action
    return {"decision": action.decision, "box": action.box and list(action.box), "p_region": action.p_region,
            "text": action.text, "size": list(result.size), "candidates": [
                {"name": pool.names[k], "index": k, "rank": rank, "rank_before": place[k],
                 "score": rounded(result.after[k]), "score_before": rounded(result.before[k])}
                for rank, k in enumerate(result.ranking, 1)]}


def rounded(score):
    return float(f"{score:.9g}")  # all that a float32 holds


def table(question, pool, result):
    """A result as text."""
    found, sure = record(pool, result), result.action.p_region
    box = found["box"] and "(" + ", ".join(f"{x:.0f}" for x in found["box"]) + ")"
    what = {"REGION": f"REGION {box} of {result.size[0]} x {result.size[1]} pixels", "FULL": "FULL: the whole image",
            "MALFORMED": f"an answer that cannot be read, so the whole image: {result.action.text[:60]!r}"}
    lines = [f"{question}", what[found["decision"]] + ("" if sure is None else f", p(REGION) {sure:.3f}"),
             f"{'now':>5}{'was':>5}{'score':>8}{'before':>8}  candidate"]
    for row in found["candidates"]:
        lines.append(f"{row['rank']:>5}{row['rank_before']:>5}{row['score']:>8.3f}{row['score_before']:>8.3f}  "
                     f"{pool.titles[row['index']]}")
    return "\n".join(lines)


def draw_box(image, action):
    """A copy of the image, with the box in red where there is one."""
    marked = image.copy()
    if action.decision == "REGION":
        x1, y1, x2, y2 = action.box
        # Pillow's rectangle includes its last pixel, the box does not.
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        ImageDraw.Draw(marked).rectangle(corners, outline="red", width=max(2, max(image.size) // 150))
    return marked


def save_image(path, image):
    kind = "png" if path.lower().endswith(".png") else "jpeg"
    with replacing(path) as temporary:
        image.save(temporary, format=kind)


# -------------------------------------------------------------------------------------------------------- many queries

Job = namedtuple("Job", "line id image question candidates run")


def read_jobs(path, pools):
    """--batch file -> list of Job, or of (line, id, error) for lines that are none."""
    jobs, seen = [], set()
    lines = [json.dumps({"id": name, "run": os.path.basename(path)}) for name in read_run(path)] \
        if path.endswith(".trec") else read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        fields = {}
        try:
            fields = read_object(line, f"{path}:{number}") if line.strip() else None
            if fields is None:
                continue
            job = as_job(fields, path, number, pools)
            if job.id in seen:
                raise ValueError(f"{path}:{number}: id {job.id!r} is there twice; the first line counts")
            seen.add(job.id)
            jobs.append(job)
        except ValueError as error:
            jobs.append((number, fields.get("id"), str(error)))
    return jobs


def as_job(fields, path, number, pools):
    """A line of --batch -> Job. Image and question may be left out where the id is a query of --data."""
    where, folder = f"{path}:{number}", os.path.dirname(path)
    name = text_field(fields, "id", where)
    image, question, run = (text_field(fields, key, where) if key in fields else None
                            for key in ("image", "question", "run"))
    if image is None or question is None:
        row = pools.row_of(name)
        question = question or pools.data.queries[row].question
        image = pools.data.image_path(row) if image is None else os.path.join(folder, image)
    else:
        image = os.path.join(folder, image)
    candidates = fields.get("candidates")
    if candidates is not None and run is not None:
        raise ValueError(f'{where}: "candidates" and "run" are there; leave one out')
    if candidates is not None:
        if not isinstance(candidates, list):
            raise ValueError(f'{where}: "candidates" must be a list of {{"image", "text", "name"}}')
        candidates = checked([as_candidate(item, folder, where) for item in candidates], where)
    return Job(number, name, image, question, candidates, run and os.path.join(folder, run))


def run_jobs(jobs, models):
    """[Job] -> [dict]: the line of --out for each. One that fails does not take the others with it."""
    try:
        images = [read_image(job.image) for job in jobs]
        full = models.scorer.image_features(images)  # [B, D]
        pools = [job_pool(job, row, models.pools) for job, row in zip(jobs, full)]
        found = models.rerank(images, [job.question for job in jobs], pools, full)
    except (ValueError, FileNotFoundError) as error:
        if len(jobs) == 1:
            return [{"id": jobs[0].id, "line": jobs[0].line, "error": str(error)}]
        return [line for job in jobs for line in run_jobs([job], models)]  # one by one, to find which it was
    return [{"id": job.id, "line": job.line, **record(pool, result)} for job, pool, result in zip(jobs, pools, found)]


def job_pool(job, full, pools):
    if job.candidates is not None:
        return pools.of_files(job.candidates)
    return pools.retrieved(full) if job.run is None else pools.of_run(job.run, job.id, full)


def finished(out, settings):
    """Ids that `out` already holds. It is left with their lines alone: errors are tried again, and a last line that was
    cut short goes. ValueError when it was written with other settings, which its lines would not show."""
    beside = f"{out}.settings.json"
    if not os.path.exists(out):
        write_json(beside, settings)  # before the first line, so a file without it is somebody else's
        return set()
    if not os.path.isfile(beside):
        raise ValueError(f"{out} exists and {beside} does not, so it was not begun here: name another --out")
    with open(beside, encoding="utf-8") as file:
        before = json.load(file)
    if other := sorted(key for key in settings if settings[key] != before.get(key)):
        raise ValueError(f"{out} was begun with another {', '.join(other)}: name another --out or remove it")
    good = {}
    with open(out, "rb") as file:  # as bytes: a kill may also cut a character in two
        for line in file:
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # the last line of a killed run alone
                text = line.decode()
                fields = json.loads(text)
                if "error" not in fields:
                    good[fields["id"]] = text if text.endswith("\n") else text + "\n"
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(good.values())
    return set(good)


def batch(args, models):
    """--batch -> --out; returns the sentence to print at the end."""
    jobs = read_jobs(args.batch, models.pools)
    done = finished(args.out, models.settings)
    todo = [job for job in jobs if isinstance(job, Job) and job.id not in done]
    if any(job.candidates is None for job in todo):
        _ = models.pools.data  # opened now: a knowledge base that is missing is not the fault of a line
    bad = [{"id": name, "line": line, "error": error} for line, name, error in
           (job for job in jobs if not isinstance(job, Job))]
    before, ranked, started = sum(isinstance(job, Job) for job in jobs) - len(todo), 0, time.perf_counter()
    with open(args.out, "a", encoding="utf-8") as file, tqdm(total=len(todo), unit="query", disable=None) as bar:
        write_lines(file, bad)
        for start in range(0, len(todo), args.batch_size):
            lines = run_jobs(todo[start:start + args.batch_size], models)
            write_lines(file, lines)
            failed = [line for line in lines if "error" in line]
            bad, ranked = bad + failed, ranked + len(lines) - len(failed)
            bar.update(len(lines))
    seconds = time.perf_counter() - started
    said = f"re-ranked {ranked} queries in {seconds:.1f} s ({ranked / max(seconds, 1e-9):.1f} a second)"
    said += f"; {before} were done before" if before else ""
    if bad:
        said += f"; {len(bad)} lines could not be used, the first: {bad[0]['error']}"
    return f"{said}; wrote {args.out}"


def write_lines(file, lines):
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.flush()  # a killed batch loses the queries of one step at most


# ------------------------------------------------------------------------------------------------------------ the page

class Refusal(Exception):
    """An HTTP answer other than 200: (status, sentence)."""


class Demo:
    """What the page can ask for. Nothing in a request names a file: images are numbers of the data's own rows."""

    def __init__(self, models):
        self.models, self.pools, self.data = models, models.pools, models.pools.data
        self.lock = threading.Lock()  # the models are not thread-safe, and two queries at once are not faster
        self.page = PAGE.read_bytes()

    def about(self):
        names = {key: self.models.settings[key] for key in ("policy", "adapter", "scorer", "decode")}
        threshold = 0.5 if self.models.threshold is None else self.models.threshold
        return {**names, "split": self.data.split, "examples": len(self.data.queries), "k": self.pools.k,
                "entities": len(self.data.kb_text), "threshold": threshold}

    def example(self, i):
        query = self.data.queries[number(i, len(self.data.queries))]
        return {"id": query.query_id, "question": query.question, "in_pool": 1 in query.labels}

    def query_image(self, i, side):
        return jpeg(self.data.open_image(number(i, len(self.data.queries))), side)

    def candidate_image(self, m, side):
        return jpeg(read_image(self.data.candidate_image_path(number(m, len(self.data.kb_image)))), side)

    def answer(self, request):
        """{"question", "force", and "example": i or "image": base64} -> what the page draws."""
        question, force, i = request.get("question"), request.get("force"), request.get("example")
        if not isinstance(question, str) or not question.strip() or len(question) > QUESTION_LENGTH:
            raise Refusal(400, f"Ask a question of 1 to {QUESTION_LENGTH} characters.")
        if force not in (None, "FULL", "REGION"):
            raise Refusal(400, "The decision is FULL, REGION or left to the policy.")
        started, labels = time.perf_counter(), None
        if i is None:
            image = uploaded(request.get("image"))
        else:
            i = number(i, len(self.data.queries))
            image, labels = self.data.open_image(i), self.data.queries[i].labels
        with self.lock:
            full = self.models.scorer.image_features([image])  # [1, D]
            pool = self.pools.retrieved(full[0]) if i is None else self.pools.of_split(i)
            result = self.models.rerank([image], [question.strip()], [pool], full, force)[0]
        found = record(pool, result)
        for row in found["candidates"]:
            k = row["index"]
            row |= {"title": pool.titles[k], "row": int(pool.rows[k]), "positive": bool(labels and labels[k])}
        return {**found, "retrieved": i is None, "known": labels is not None,
                "seconds": time.perf_counter() - started}


def number(text, below):
    """A whole number of [0, below); Refusal otherwise."""
    if not str(text).isascii() or not str(text).isdigit() or len(str(text)) > 12 or not int(text) < below:
        raise Refusal(404, f"There is no number {str(text)[:20]!r} here; they run from 0 to {below - 1}.")
    return int(text)


def uploaded(text):
    """base64 of an image file -> PIL RGB."""
    try:
        content = base64.b64decode(text or "", validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Refusal(400, "The image did not arrive whole.") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > UPLOAD_PIXELS:
                raise Refusal(413, f"The image has {image.width} x {image.height} pixels; at most "
                                   f"{UPLOAD_PIXELS // 1_000_000} million can be used.")
            image.load()  # as scorer.read_image does with a file
            ImageOps.exif_transpose(image, in_place=True)
            return as_rgb(image)
    except DAMAGED as error:
        raise Refusal(400, "This file cannot be read as an image.") from error


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
    server_version, sys_version = "rerank", ""

    def do_GET(self):
        self.reply(self.get)

    def do_POST(self):
        self.reply(self.post)

    def get(self):
        url, demo = urlsplit(self.path), self.server.demo
        parts = url.path.strip("/").split("/")
        if url.path == "/":
            return "text/html; charset=utf-8", demo.page
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
        return as_json(self.server.demo.answer(read_object(self.rfile.read(int(length)).decode(), "request")))

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
        except (ValueError, FileNotFoundError) as error:  # bad input, or a file of the data that has gone
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


def make_server(demo, port):
    """HTTP server of a Demo, on this machine only. port 0 = any free one; .server_port has it."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(f"port {port} cannot be used ({error.strerror}): name another, as in --serve {port + 1} "
                         f"(or make demo DEMO_PORT={port + 1})") from error
    server.daemon_threads, server.demo = True, demo
    return server


def serve(args, models):
    with make_server(Demo(models), args.serve) as server:
        print(f"http://127.0.0.1:{server.server_port}    (stop with Ctrl-C)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


# ---------------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    try:
        models = open_models(args)
        if args.serve is not None:
            return serve(args, models)
        if args.batch is not None:
            return print(batch(args, models))
        image, question, pool, result = one_query(args, models)
    except (ValueError, FileNotFoundError) as error:  # wrong input, said in one line; anything else is a bug and shows
        raise SystemExit(f"rerank: {error}") from error
    print(json.dumps({"question": question, **record(pool, result)}, ensure_ascii=False, indent=1) if args.json
          else table(question, pool, result))
    if args.save_image:  # last: a folder that is missing must not cost the answer
        try:
            save_image(args.save_image, draw_box(image, result.action))
        except OSError as error:
            raise SystemExit(f"rerank: --save-image {args.save_image}: {error}") from error


if __name__ == "__main__":
    main()
