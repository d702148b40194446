"""Re-rank with a trained policy: one query or a file of them. (tools/demo.py is the same as a page.)

    python -m tools.rerank --image q.jpg --question "Where does this beetle live?" --candidates FOLDER
    python -m tools.rerank --query E-VQA_test_1                         # a query of the prepared data, with its pool
    python -m tools.rerank --batch in.jsonl --out out.jsonl             # many; cut short, it goes on where it stopped
    python -m tools.rerank --batch in.trec --out out.jsonl --trec out.trec      # a TREC run in, a TREC run out

Candidates (--candidates; a line of --batch has "candidates", a list of such objects, or "run", a .trec):

    a folder      its images; beetle.txt, where there is one, is the text of beetle.jpg
    a .jsonl      one {"image": path, "text": "...", "name": "..."} a line, paths relative to the file; text and name
                  may be left out
    a .trec       a run over the prepared knowledge base of --data: the documents are its entity ids
    nothing       the pool of --query; for an image of your own, the K entities of --data that are nearest to it

As a function, with models and images of your own:

    from tools.rerank import rerank
    result = rerank(image, question, [(image_1, text_1), (image_2, text_2)], policy, scorer)
    result.ranking, result.action, result.before, result.after, result.view

Boxes are (x1, y1, x2, y2) in pixels of the query image, right and bottom exclusive.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from policy import Action, load_policy
from prepare import nearest_entities
from scorer import (InputError, as_rgb, blend, crop, fuse, load_data, load_scorer, lock_folder, read_image, read_json,
                    read_manifest, read_trec, replacing, same_scorer, scores, trec_id, write_json, write_trec)
from tools.layouts import IMAGE_SUFFIXES
from tools.merge import run_config

KNOWN_LIMIT = 200_000  # candidates whose features are kept between queries: about 1 GB at D = 1,280


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


def rerank(image, question, candidates, policy, scorer, decode="grammar", threshold=None, force=None, share=1.0):
    """Choose a view of `image` by `question` and rank the candidates with it -> Reranking.

    image: path, read upright by its EXIF, or PIL image, taken as it lies. candidates: list of (image, text), images
    alike, text "" or None where there is none; or float [K, D], vectors of Eq. 3 that scorer.fuse made (of any length),
    which costs no encoding.
    policy, scorer: of load_policy, load_scorer. decode: "grammar" or "free". threshold: crop where p(REGION | x) is
    above it, None = the likelier decision (Sec. 3.2). force: None, "FULL" or "REGION", to see what it would do.
    share: of the crop in the vector that is scored, beside the full image (scorer.blend). 1: the crop alone, as in the
    paper; .6 ranks better on the embedded world, also for a policy that was trained with 1 (docs/results.md).
    Raises InputError or FileNotFoundError naming the image, question or candidate that cannot be used.
    """
    if len(candidates) == 0:
        raise InputError("no candidates: there is nothing to rank")
    image = open_image(image)
    pool = candidates if isinstance(candidates, np.ndarray) else candidate_features(candidates, scorer)  # [K, D]
    full = scorer.image_features([image])  # [1, D]
    return rerank_batch([image], [question], [pool], full, policy, scorer, decode, threshold, force,
                        share)[0]


def rerank_batch(images, questions, pools, full, policy, scorer, decode="grammar", threshold=None, force=None,
                 share=1.0):
    """Many queries together -> list of Reranking.

    images: [B] PIL. questions: [B]. pools: B x [K, D] vectors of Eq. 3, K may differ. full: [B, D] features of the
    images: retrieval has them already, and FULL then encodes nothing more. The rest as in `rerank`.
    """
    actions = decide(policy, images, questions, decode, threshold, force)
    views, seen = list(images), np.array(full, dtype=np.float32)  # a copy [B, D]: FULL and MALFORMED keep the image
    cropped = [i for i, action in enumerate(actions) if action.decision == "REGION"]
    for i in cropped:
        views[i] = crop(images[i], actions[i].box)  # Eq. 1
    if cropped:
        seen[cropped] = blend(seen[cropped], scorer.image_features([views[i] for i in cropped]), share)
    results = []
    for i, pool in enumerate(pools):
        before, after = scores(np.stack([full[i], seen[i]]), pool)  # Eq. 2, 4: [2, K]
        results.append(Reranking(best_first(after), before, after, actions[i], views[i], images[i].size))
    return results


def decide(policy, images, questions, decode, threshold, force):
    """[B] Action: the likelier decision, the forced one, or REGION exactly where p(REGION | x) is above `threshold`."""
    if threshold is not None and decode != "grammar":
        raise InputError("a threshold needs decode='grammar': free text has no exact p(REGION | x)")

    def act(rows, force):
        try:
            return policy.act([images[i] for i in rows], [questions[i] for i in rows], decode=decode, force=force,
                              batch_size=len(rows))
        except ValueError as error:  # a question with a special token, an image too narrow: the policy says which
            raise InputError(str(error)) from error

    if threshold is None or force is not None:
        return act(range(len(images)), force)
    # The box has to be written before it is known whether it is wanted; p(REGION | x) is the same when forced.
    actions = act(range(len(images)), "REGION")
    kept = [i for i, action in enumerate(actions) if not action.p_region > threshold]
    for i, action in zip(kept, act(kept, "FULL") if kept else ()):  # asked again, for the text of that decision
        actions[i] = action
    return actions


def best_first(values):
    """Indices of values [K] in falling order, equal ones in the order given."""
    return np.argsort(-values, kind="stable").tolist()


def open_image(image):
    """PIL image as RGB, from a PIL image or a path. A PIL image is not turned by its EXIF: the box is for the caller,
    in the pixels that he has."""
    return as_rgb(image) if isinstance(image, Image.Image) else read_image(os.fspath(image))


def candidate_features(candidates, scorer):
    """list of (image, text) -> float32 [K, D] by Eq. 3, normalised."""
    return fuse(*candidate_parts(candidates, scorer))  # Eq. 3: [K, D]


def candidate_parts(candidates, scorer):
    """list of (image, text) -> un-normalised features of the images and of the texts, zeros where there is none:
    float32 [K, D] each."""
    images, starts = [], range(0, len(candidates), scorer.batch_size)
    # In batches: a thousand images open at once would be gigabytes.
    for start in tqdm(starts, "pictures", unit="batch", disable=len(starts) < 2 or None):
        part = candidates[start:start + scorer.batch_size]
        images.append(scorer.image_features([open_image(image) for image, _ in part]))
    images = np.concatenate(images)  # [K, D]
    texts = np.zeros_like(images)  # [K, D] [t != empty] of Eq. 3
    with_text = [k for k, (_, text) in enumerate(candidates) if text and text.strip()]
    if with_text:
        texts[with_text] = scorer.text_features([candidates[k][1] for k in with_text])
    return images, texts


# ------------------------------------------------------------------------------------ candidates and queries from files

Candidate = namedtuple("Candidate", "name image text")  # image: a path
# A query to be answered. image: a path or PIL. Its candidates are those listed, those of a .trec file under its id, the
# pool of a row of the data, or (all three None) what retrieval finds. line: where it stood in the batch.
Job = namedtuple("Job", "id image question candidates run row line", defaults=[None] * 4)


def read_candidates(source):
    """A folder or a .jsonl -> list of Candidate, at least one, each name once."""
    if source.endswith(".jsonl"):
        with open(source, "rb") as file:
            lines = [(line, f"{source}:{number}") for number, line in enumerate(file, 1) if line.strip()]
        return checked([as_candidate(read_object(line, where), source, where) for line, where in lines], source)
    if not os.path.isdir(source):
        raise InputError(f"candidates {source}: no folder of images, and neither a .jsonl nor a .trec")
    files = sorted(path for path in Path(source).iterdir() if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    texts = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    if others := len(files) - len(images) - len(texts.keys() & {path.stem for path in images}):
        print(f"note: {source}: {others} files are neither an image nor the text of one and were not used",
              file=sys.stderr)
    found = []
    for path in images:
        try:
            text = texts[path.stem].read_text(encoding="utf-8").strip() if path.stem in texts else ""
        except UnicodeDecodeError as error:
            raise InputError(f"{texts[path.stem]}: not UTF-8 text ({error}); save it as UTF-8") from error
        found.append(Candidate(path.stem, str(path), text))
    return checked(found, source)  # red.jpg beside red.png would share name and text


def read_object(text, where):
    """A JSON object, str or bytes -> dict."""
    try:
        fields = json.loads(text)
        json.dumps(fields, ensure_ascii=False).encode()  # a lone \ud83d: no tokenizer and no file takes it
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair is no character ({str(error)[:80]})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object in braces, got {type(fields).__name__}")
    return fields


def text_field(fields, name, where, default=None):
    """fields[name], which must be a text that is not empty unless a default stands in for it."""
    value = fields.get(name, default)
    if not isinstance(value, str) or not (value or default is not None):
        raise InputError(f"{where}: {name!r} must be a text{'' if default is not None else ' that is not empty'}, "
                         f"got {json.dumps(value)[:60]}")
    return value


def as_candidate(fields, file, where):
    """{"image", "text", "name"} -> Candidate. One without a name is called by its image, a path relative to `file`."""
    if not isinstance(fields, dict):
        raise InputError(f'{where}: a candidate is an object with "image", and if you like "text" and "name"')
    image = text_field(fields, "image", where)
    return Candidate(text_field(fields, "name", where, image), os.path.join(os.path.dirname(file), image),
                     text_field(fields, "text", where, ""))


def checked(candidates, where):
    """The candidates; InputError when there are none or two share a name, which no output could tell apart."""
    if not candidates:
        raise InputError(f"{where}: no candidates; there is nothing to rank")
    images = {}
    for candidate in candidates:
        if candidate.name in images:
            raise InputError(f"{where}: candidate {candidate.name!r} is there twice, as {images[candidate.name]} and "
                             f'{candidate.image}: drop or rename one, or give each a "name"')
        images[candidate.name] = candidate.image
    return candidates


def as_job(fields, path, number, models):
    """A line of --batch -> Job. Image and question may be left out where the id is a query of --data."""
    where, folder = f"{path}:{number}", os.path.dirname(path)
    name, listed = text_field(fields, "id", where), fields.get("candidates")
    image, question, run = (text_field(fields, key, where) if key in fields else None
                            for key in ("image", "question", "run"))
    if listed is not None and (run is not None or not isinstance(listed, list)):
        raise InputError(f'{where}: "candidates" must be a list, and without a "run" beside it; leave one out')
    row = models.row_of(name) if image is None or question is None else None
    return Job(name, models.data.image_path(row) if image is None else os.path.join(folder, image),
               models.data.queries[row].question if question is None else question,
               None if listed is None else checked([as_candidate(item, path, where) for item in listed], where),
               run and os.path.join(folder, run), row if image is None else None, number)


def read_jobs(path, models):
    """--batch file -> list of Job, or of {"id", "line", "error"} for lines that are none."""
    if path.endswith(".trec"):
        lines = [json.dumps({"id": name, "run": os.path.basename(path)}) for name in read_trec(path)]
    else:
        lines = Path(path).read_bytes().split(b"\n")
    jobs, seen = [], set()
    for number, line in enumerate(lines, 1):
        fields = {}
        if not line.strip():
            continue
        try:
            fields = read_object(line, f"{path}:{number}")
            job = as_job(fields, path, number, models)
            if job.id in seen:
                raise InputError(f"{path}:{number}: id {job.id!r} is there twice; the first line counts")
            seen.add(job.id)
            jobs.append(job)
        except InputError as error:
            jobs.append({"id": fields.get("id"), "line": number, "error": str(error)})
    return jobs


# -------------------------------------------------------------------------------------------- models, data, their pools

# K candidates: names (for machines, unique), titles (to read), features [K, D] of Eq. 3; rows [K]: which images of the
# knowledge base they are, None where they come from files.
Pool = namedtuple("Pool", "names titles features rows")


class Models:
    """A policy, a scorer and the prepared data, as a command's arguments name them. What they do not say, the run's
    config.json and the data's manifest do; without a run, what an adapter was trained under is said by the run that it
    lies in. settings: what another batch into the same file must have in common."""

    def __init__(self, args):
        run = args.run or (None if args.policy else "runs/world")
        config = read_json(os.path.join(run, "config.json"), "train first (`make data train`), name another --run, or "
                           "give --policy and --scorer to use a model without an adapter") if run else (
            run_config(args.adapter) if args.adapter else {})
        trained = config.get("args", {})
        self.folder, self.split, self.threshold = args.data or (run and config.get("data")), args.split, args.threshold
        self.fuse = trained.get("fuse", 1.0) if args.fuse is None else args.fuse
        self.wanted, self.known, self.runs = args.k, {}, {}
        self.decode = args.decode or trained.get("decode", "grammar")
        if self.threshold is not None and self.decode == "free":
            raise InputError("--threshold needs --decode grammar: free text has no exact p(REGION | x)")
        # The run's own data may be gone by now: candidates in files do not need it.
        if self.folder and not args.data and not os.path.isfile(os.path.join(self.folder, "manifest.json")):
            print(f"note: {self.folder}, the data of {run}, is gone: going on without, see --data", file=sys.stderr)
            self.folder = None
        prepared = read_manifest(self.folder)["scorer"] if self.folder else {}
        scorer = args.scorer or prepared.get("name") or config.get("scorer")
        if not scorer:
            raise InputError("no scorer: give --scorer, or --data, or a --run that was trained with one")
        device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.scorer = load_scorer(scorer, device, args.scorer_dtype or prepared.get("dtype"))
        name = args.policy or config["policy"]
        given = {"adapter": args.adapter or (os.path.join(run, "adapter") if run else None),
                 "max_pixels": trained.get("max_pixels"), "system_prompt": config.get("system_prompt"),
                 "dtype": args.policy_dtype or trained.get("policy_dtype")}
        try:
            self.policy = load_policy(name, device=device, **given)
        except ValueError as error:  # of the user's model folder
            raise InputError(str(error)) from error
        self.policy.max_new_tokens = trained.get("max_new_tokens", self.policy.max_new_tokens)
        self.settings = {"policy": name, **given, "data": self.folder, "k": args.k, "decode": self.decode,
                         "threshold": self.threshold, "fuse": self.fuse,
                         # By content, too: trained or prepared again, the same folder gives other answers.
                         "adapter weights": digest(given["adapter"], "adapter_model.safetensors"),
                         "data files": digest(self.folder, "manifest.json")}

    @cached_property
    def data(self):
        """The prepared data, opened when its knowledge base is needed first."""
        if not self.folder:
            raise InputError("this needs the prepared knowledge base: give --data, the folder that prepare.py wrote")
        return load_data(self.folder, self.split, self.scorer)

    @cached_property
    def k(self):
        return self.wanted or self.data.manifest["K"]

    @cached_property
    def entity_of(self):
        """{entity id as a run file writes it: line of kb.jsonl}."""
        return {trec_id(entity["entity_id"]): j for j, entity in enumerate(self.data.entities)}

    @cached_property
    def query_of(self):
        return {trec_id(query.query_id): i for i, query in enumerate(self.data.queries)}

    def row_of(self, query_id):
        """Row of the split; the id as written or as a run file writes it."""
        if trec_id(query_id) not in self.query_of:
            raise InputError(f"{self.data.queries.path} has no query {query_id!r}; it has {len(self.data)}, the first "
                             f"is {next(iter(self.query_of), None)}; see also --split")
        return self.query_of[trec_id(query_id)]

    def answer(self, jobs):
        """[Job] -> [(Pool, Reranking)]. InputError or FileNotFoundError for one that cannot be answered."""
        images = [open_image(job.image) for job in jobs]
        full = self.scorer.image_features(images)  # [B, D]
        pools = [self.pool(job, row) for job, row in zip(jobs, full)]
        found = rerank_batch(images, [job.question for job in jobs], [pool.features for pool in pools], full,
                             self.policy, self.scorer, self.decode, self.threshold, share=self.fuse)
        return list(zip(pools, found))

    def pool(self, job, full):
        """A job's candidates. full: [D], the feature of its whole image."""
        if job.candidates is not None:
            return self.of_files(job.candidates)
        if job.run is not None:
            entities = self.of_run(job.run, job.id)
        elif job.row is not None:
            return self.of_kb(self.data.pool[job.row], self.data.pool_image[job.row])
        else:
            data = self.data
            k = min(self.k, len(data.kb_text))  # no more than there are
            entities = nearest_entities(data.kb_image, data.kb_entity, full[None], k, self.scorer.device)[0][0]
        return self.of_kb(entities, [self.image_row(j, full) for j in entities])

    def of_files(self, candidates):
        if len(self.known) > KNOWN_LIMIT:  # all of them: an order of use would cost more lines than encoding some again
            self.known.clear()
        pairs = [(candidate.image, candidate.text) for candidate in candidates]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        self.known.update(zip(new, candidate_features(new, self.scorer) if new else ()))
        names = [candidate.name for candidate in candidates]
        return Pool(names, names, np.stack([self.known[pair] for pair in pairs]), None)

    def of_kb(self, entities, rows):
        """entities [K]: lines of kb.jsonl; rows [K]: one image of each."""
        found = [self.data.entity(j) for j in entities]
        features = fuse(self.data.kb_image[rows], self.data.kb_text[entities])  # Eq. 3: [K, D]
        return Pool([entity["entity_id"] for entity in found],
                    [entity["title"] or entity["entity_id"] for entity in found], features, list(rows))

    def of_run(self, path, query_id):
        """Entities of the first K documents of a query in a run file; query_id None: its only query."""
        if path not in self.runs:
            self.runs[path] = {trec_id(name): documents for name, documents in read_trec(path).items()}
        run = self.runs[path]
        if query_id is None and len(run) > 1:
            raise InputError(f"{path} has {len(run)} queries, the first is {next(iter(run))}: say which by --query ID")
        name = next(iter(run), None) if query_id is None else trec_id(query_id)
        if name not in run:
            raise InputError(f"{path}: no query {query_id!r} in this run; it has {len(run)}, the first is "
                             f"{next(iter(run), None)}")
        documents = list(dict.fromkeys(trec_id(document) for document in run[name]))[:self.k]
        unknown = [document for document in documents if document not in self.entity_of]
        if unknown:
            raise InputError(f"{path}: document {unknown[0]} of query {name} is no entity of {self.data.folder} "
                             f"({len(unknown)} of {len(documents)} are not): is --data what the run was made with?")
        return [self.entity_of[document] for document in documents]

    def image_row(self, j, full):
        """The image that stands for entity j, as prepare.py chose it for the pools: the one nearest to the query."""
        first, end = np.searchsorted(self.data.kb_entity, [j, j + 1])  # an entity's rows are consecutive
        if self.data.manifest["args"].get("candidate_image") == "first":
            return int(first)
        return int(first + np.argmax(scores(full, self.data.kb_image[first:end])))


def digest(folder, name):
    """sha256 of a file in a folder, None where there is no such folder or file."""
    path = folder and os.path.join(folder, name)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and os.path.isfile(path) else None


# ----------------------------------------------------------------------------------------------------------- one query

def one_job(args, models):
    """--image or --query -> Job."""
    row = models.row_of(args.query) if args.query else None
    image = args.image or models.data.image_path(row)
    question = args.question or models.data.queries[row].question
    if args.candidates and args.candidates.endswith(".trec"):
        return Job(args.query, image, question, run=args.candidates)
    listed = read_candidates(args.candidates) if args.candidates else None
    # An image of one's own has no pool, even where --query is there for its question.
    return Job(args.query, image, question, listed, row=None if args.image else row)


def record(pool, result):
    """The JSON of a result: decision, box (pixels), p_region, text, size, and the candidates, best first."""
    place = {k: rank for rank, k in enumerate(best_first(result.before), 1)}
    action = result.action
    # Nine digits are all that a float32 holds.
    after, before = ([float(f"{score:.9g}") for score in row] for row in (result.after, result.before))
    return {"decision": action.decision, "box": action.box and list(action.box), "p_region": action.p_region,
            "text": action.text, "size": list(result.size), "candidates": [
                {"name": pool.names[k], "index": k, "rank": rank, "rank_before": place[k], "score": after[k],
                 "score_before": before[k]} for rank, k in enumerate(result.ranking, 1)]}


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


def save_image(path, image, action):
    """Write the image with the box in red, where there is one."""
    marked = image.copy()
    if action.decision == "REGION":
        x1, y1, x2, y2 = action.box
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # Pillow's rectangle includes its last pixel
        ImageDraw.Draw(marked).rectangle(corners, outline="red", width=max(2, max(image.size) // 150))
    with replacing(path) as temporary:
        marked.save(temporary, format="png" if path.lower().endswith(".png") else "jpeg")


# -------------------------------------------------------------------------------------------------------- many queries

def batch(args, models):
    """--batch -> --out, of which nothing is done twice; returns the number of lines that could not be used."""
    jobs = read_jobs(args.batch, models)
    errors, jobs = [job for job in jobs if isinstance(job, dict)], [job for job in jobs if isinstance(job, Job)]
    if any(job.candidates is None for job in jobs):
        _ = models.data  # opened now: a knowledge base that is missing is not the fault of a line
    lock = Path(f"{args.out}.lock")  # beside --out, which is replaced: a lock of its own would go with it
    lock.mkdir(exist_ok=True)
    with lock_folder(lock, "--out"):
        done, ranked, started = finished(args.out, models), 0, time.perf_counter()
        with open(args.out, "a", encoding="utf-8") as file, tqdm(total=len(jobs), unit="query", disable=None) as bar:
            write_lines(file, errors)
            for start in range(0, len(jobs), args.batch_size):
                part = jobs[start:start + args.batch_size]
                if not all(job.id in done for job in part):
                    # The whole part again, however much of it was written: other neighbours would round otherwise.
                    lines = [line for line in lines_of(part, models) if line["id"] not in done]
                    write_lines(file, lines)
                    failed = [line for line in lines if "error" in line]
                    errors, ranked = errors + failed, ranked + len(lines) - len(failed)
                bar.update(len(part))
        seconds = time.perf_counter() - started
        print(f"re-ranked {ranked} queries in {seconds:.1f} s ({ranked / max(seconds, 1e-9):.1f} a second)"
              + (f"; {len(done)} were done before" if done else "") + f"; wrote {args.out}")
        if args.trec:
            write_run(args.trec, args.out)
    if errors:
        print(f"{len(errors)} lines could not be used, the first: {errors[0]['error']}", file=sys.stderr)
    return len(errors)


def lines_of(jobs, models):
    """[Job] -> [dict]: the line of --out for each. One that fails does not take the others with it."""
    try:
        return [{"id": job.id, "line": job.line, **record(pool, result)}
                for job, (pool, result) in zip(jobs, models.answer(jobs))]
    except (InputError, FileNotFoundError) as error:
        if len(jobs) == 1:
            return [{"id": jobs[0].id, "line": jobs[0].line, "error": str(error)}]
        return [line for job in jobs for line in lines_of([job], models)]  # one by one, to find which it was


def write_run(path, out):
    """All rankings of the .jsonl `out` as a TREC run; lines with an error are left out."""
    with open(out, encoding="utf-8") as file:
        lines = (line for line in map(json.loads, file) if "error" not in line)
        write_trec(path, ((line["id"], *zip(*((row["name"], row["score"]) for row in line["candidates"])))
                          for line in lines), "region-r1")


def write_lines(file, lines):
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.flush()  # a killed batch loses the queries of one step at most


def finished(out, models):
    """Ids that `out` already holds. It is left with their lines alone: errors are tried again, and a last line that was
    cut short goes. InputError when it was written with other settings, which its lines would not show."""
    beside, scorer = f"{out}.settings.json", models.scorer
    settings = {**models.settings, "dim": scorer.dim, "scorer": {  # as in a manifest, for same_scorer
        "name": scorer.name, "dtype": str(scorer.dtype).removeprefix("torch."),
        "fingerprint": scorer.fingerprint().tolist()}}
    if not os.path.exists(out):
        write_json(beside, settings)  # before the first line, so a file without it is somebody else's
        return set()
    before = read_json(beside, f"{out} was not begun here, name another --out")
    if other := sorted(key for key in settings if key != "scorer" and settings[key] != before.get(key)):
        raise InputError(f"{out} was begun with another {', '.join(other)}: name another --out or remove it")
    same_scorer(out, before, scorer)
    good = {}
    with open(out, "rb") as file:  # as bytes: a kill may also cut a character in two
        for line in file:
            with contextlib.suppress(ValueError):  # the last line of a killed run alone
                fields = json.loads(line)
                if "error" not in fields:
                    good[fields["id"]] = line.rstrip(b"\n") + b"\n"
    with replacing(out) as temporary, open(temporary, "wb") as file:
        file.writelines(good.values())
    return set(good)


# ---------------------------------------------------------------------------------------------------------------- main

def add_model_flags(parser):
    models = parser.add_argument_group("models and data")
    models.add_argument("--run", help="folder of train.py: names policy, adapter, scorer and data; default runs/world, "
                                      "or none when --policy is given")
    models.add_argument("--policy", help="model id or folder; default: the one the run was trained from")
    models.add_argument("--adapter", help="folder of a LoRA adapter; default: the run's; without a run: none")
    models.add_argument("--scorer", help="scorer; default: the one that the data was prepared with, or the run's")
    models.add_argument("--scorer-dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: as the data was prepared, else bfloat16 on CUDA, float32 elsewhere")
    models.add_argument("--policy-dtype", choices=("float32", "bfloat16"),
                        help="default: as the run was trained, else bfloat16 on CUDA, float32 elsewhere")
    models.add_argument("--data", help="folder of prepare.py; default: the run's")
    models.add_argument("--split", default="test", help="split of --data that queries come from: train, val or test")
    models.add_argument("--k", type=at_least_one, help="candidates taken from a .trec or from retrieval, best first; "
                                                       "default: K of --data")
    models.add_argument("--decode", choices=("grammar", "free"), help="default: as the run was trained, else grammar")
    models.add_argument("--threshold", type=probability, help="crop where p(REGION | x) is above this, 0 to 1; "
                                                              "default: the likelier decision, which is .5")
    models.add_argument("--fuse", type=probability, metavar="W", help="score a crop as (1 - W) full image + W crop, "
                        "1 = the crop alone; default: as the run was trained")
    models.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 ...")


def at_least_one(text):  # not rows.at_least: with it comes evaluate.py, and who uses `rerank` may have one of his own
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def probability(text):
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError("must be 0 to 1")
    return float(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.rerank", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_argument_group("one query")
    one.add_argument("--image", help="file of the query image")
    one.add_argument("--question", help="what is asked about it")
    one.add_argument("--query", metavar="ID", help="take image and question from this query of --data; with a .trec, "
                                                   "also the query whose candidates are meant")
    one.add_argument("--candidates", metavar="FILE_OR_DIR", help="folder, .jsonl or .trec, see above")
    one.add_argument("--save-image", metavar="FILE", help="write the query image with the box drawn, .png or .jpg")
    one.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    many = parser.add_argument_group("many queries")
    many.add_argument("--batch", metavar="FILE", help='.jsonl of {"id", "image", "question", "candidates": [...] or '
                      '"run": a .trec or neither}, paths relative to the file; or a .trec: all its queries')
    many.add_argument("--out", metavar="FILE", help=".jsonl to write for --batch; what it already holds is not redone")
    many.add_argument("--trec", metavar="FILE", help="the rankings of --out as a TREC run, too")
    many.add_argument("--batch-size", type=at_least_one, default=16, help="queries a step; memory, not results")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if (args.batch is not None) + bool(args.image or args.query) != 1:
        parser.error("one of --image (with --question), --query or --batch is needed")
    if args.image and not (args.question or args.query):
        parser.error("--image needs a --question: where to look depends on what is asked")
    if (args.batch is None) != (args.out is None):
        parser.error("--batch and --out need each other")
    if args.batch is not None and (args.question or args.candidates or args.save_image or args.json):
        parser.error("--question, --candidates, --save-image and --json are of one query; lines of --batch have their "
                     "own question and candidates")
    if args.trec and not args.batch:
        parser.error("--trec is of a --batch")
    if args.save_image and not args.save_image.lower().endswith((".png", ".jpg", ".jpeg")):
        parser.error(f"--save-image {args.save_image}: expected a name that ends in .png or .jpg")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        models = Models(args)
        if args.batch is not None:
            raise SystemExit(1 if batch(args, models) else 0)
        job = one_job(args, models)
        pool, result = models.answer([job])[0]
    except (InputError, FileNotFoundError) as error:  # wrong input, in one line; anything else is a bug and shows
        raise SystemExit(f"rerank: {error}") from error
    print(json.dumps({"question": job.question, **record(pool, result)}, ensure_ascii=False, indent=1) if args.json
          else table(job.question, pool, result))
    if args.save_image:  # last: a folder that is missing must not cost the answer
        try:
            save_image(args.save_image, open_image(job.image), result.action)
        except OSError as error:
            raise SystemExit(f"rerank: --save-image {args.save_image}: {error}") from error


if __name__ == "__main__":
    main()
