"""Re-rank a split with every method and print the paper's Tables 1, 2 and 4; the rows hold the data of Figure 2.

    python evaluate.py --data data/world --run runs/world --split test

A method turns a query into an action, and nothing else: FULL, REGION with a box, or MALFORMED. Everything after that is
one code path: actions -> scores -> rows (one JSON line a query) -> numbers -> tables. A new method is a new list of
actions. Tables 6, 7 and 8 are made from the rows, without a policy: tools/rescore.py, crop_quality.py, retrieve.py.

    full             the whole image: what retrieval saw (Table 1, EVA-CLIP)
    random           a box at a random place, its size drawn from the learned policy's boxes (Sec. 4.2)
    center           the middle of the image (Sec. 4.2)
    zeroshot         the policy's base model: the same weights with the adapter off (Sec. 4.2)
    zeroshot_always  the base model's own boxes, on every query: with its p(REGION | x) the base model's operating curve
    zeroshot2        another base model (--zeroshot-policy), such as the 7B of Table 1
    always           the learned policy's own boxes, on every query: is it the decision or the box that helps?
    policy           the learned policy
    oracle           the better of full image and true box, for data whose truth.jsonl names a true box
    NAME             a re-ranking that another program wrote: a TREC run (--run-file NAME=PATH)

Letters: Q queries, K candidates of a pool, D the scorer's space. Boxes are in original-image pixels. Simplified:
decoding is greedy, one action a query. With a grammar, REGION is forced on every query and the decision is read from
p(REGION | x), which is exact either way: `policy` and `always` then cost one decoding pass together. So the seconds of
a query that stays FULL are an upper bound: the box that nobody asked for is among them.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from policy import Action, load_policy
from rewards import metrics, summary
from scorer import (
    InputError, crop, hold, load_data, load_scorer, read_json, read_trec, replacing, same_scorer, scores, trec_id,
    write_json, write_trec,
)

METHODS = ("full", "random", "center", "zeroshot", "zeroshot_always", "always", "policy", "oracle")
NEED_ADAPTER = ("random", "always", "policy")
CROPPING = ("zeroshot", "zeroshot2", "policy", "always")  # rows of Table 4: methods that choose a region by looking
# The decoding pass that a method's answers come from, with a grammar and in free text, where p(REGION | x) is not known
# and a decision is a pass of its own. Its first word names the weights; "forced": REGION is forced.
PASSES = {"zeroshot": ("base forced", "base chooses"), "zeroshot_always": ("base forced", "base forced"),
          "zeroshot2": ("second forced", "second chooses"),
          "policy": ("learned forced", "learned chooses"), "always": ("learned forced", "learned forced")}
COLUMNS = ("MRR", "NDCG", "R@1", "R@5", "R@10", "R@20", "CondR@1", "CondR@5", "CondR@10")  # Table 1, then Table 2
PAPER = {  # Tables 1 and 2, recalls in per cent as printed there; the rows that `evaluate.py` has too
    "E-VQA": {"full": (.22, .29, 14.2, 33.4, 47.4, 50.8, .28, .66, .93),
              "random": (.06, .16, 1.2, 5.9, 20.7, 50.8, .02, .12, .41),
              "center": (.14, .22, 7.5, 20.1, 31.5, 50.8, .15, .40, .62),
              "zeroshot": (.23, .29, 15.3, 34.1, 44.3, 50.8, .30, .67, .87),
              "policy": (.47, .48, 44.7, 48.2, 49.9, 50.8, .90, .95, .98)},
    "InfoSeek": {"full": (.55, .61, 46.3, 71.2, 77.3, 81.7, .57, .87, .95),
                 "random": (.19, .32, 10.6, 27.1, 40.7, 81.7, .13, .33, .49),
                 "center": (.47, .55, 38.8, 56.8, 66.6, 81.7, .47, .70, .82),
                 "zeroshot": (.58, .62, 54.1, 68.8, 74.0, 81.7, .69, .84, .91),
                 "policy": (.71, .73, 66.5, 78.2, 80.2, 81.7, .81, .96, .98)},
}
FULL_IMAGE = Action("FULL", None, None, "")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/world", help="folder that prepare.py wrote")
    add("--run", default="runs/world", help="folder that train.py wrote")
    add("--out", help="folder for everything that is written; default: eval/ in the run's folder")
    add("--split", default="test", help="split of the data: train, val or test")
    add("--limit", type=int, default=0, help="use the first N queries of the split; 0 = all of them")
    add("--methods", type=lambda text: text.split(","),
        help=f"of {','.join(METHODS)}, comma-separated; default: all, oracle where truth is known")
    add("--zeroshot-policy", metavar="NAME", help="adds zeroshot2: this model, such as Qwen/Qwen2.5-VL-7B-Instruct")
    add("--run-file", action="append", default=[], metavar="NAME=PATH",
        help="adds a re-ranking by another program, a TREC run (see tools/runs.py); may be given several times")
    add("--center-fraction", type=float, default=0.5, help="side of the centre box as a share of the image's, above 0")
    add("--threshold", type=float, default=0.5, metavar="T",
        help="the learned policy crops where p(REGION | x) > T; 0.5 is greedy; choose it on val's curve. Grammar only")
    add("--seed", type=int, default=0, help="of random boxes; nothing else draws")
    add("--policy", help="model id or folder of the policy; default: the one the run was trained from")
    add("--adapter", metavar="FOLDER", help="adapter to use; default: adapter/ in the run's folder")
    add("--scorer", help="scorer; default: the one the data was prepared with (another is refused)")
    add("--scorer-dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the prepared data")
    add("--policy-dtype", choices=("float32", "bfloat16"),
        help="default: as the run was trained with --policy-dtype, else bfloat16 on CUDA, float32 elsewhere")
    add("--decode", choices=("grammar", "free"),
        help="grammar: decision, digits and their ends are choices; free: any text, then parsed; default: as trained")
    add("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 ...")
    add("--batch-size", type=int, default=64, help="queries a step, 1 or more; memory, not results")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    # runs/world/ and ./runs/world are runs/world, also in metrics.json. Not normpath: beyond a link .. leads elsewhere.
    args.run, args.data, args.out = (str(Path(path)) for path in (args.run, args.data, args.out or f"{args.run}/eval"))
    args.adapter = args.adapter or f"{args.run}/adapter"
    if not (0 < args.center_fraction <= 1 and 0 <= args.threshold <= 1 and args.batch_size >= 1 and args.limit >= 0):
        parser.error("--center-fraction is above 0 and at most 1, --threshold 0 to 1, --batch-size >= 1, --limit >= 0")
    if unknown := sorted(set(args.methods or ()) - set(METHODS)):
        parser.error(f"--methods: unknown {', '.join(unknown)}; known are {', '.join(METHODS)}")
    taken = {*METHODS, "zeroshot2", "truth"}
    for text in args.run_file:  # the name becomes part of a file name, where @ and + belong to the tools
        if not re.fullmatch(r"[\w-]+=.+", text) or text.partition("=")[0] in taken:
            parser.error("--run-file is NAME=PATH, NAME of letters, digits, - and _, each once, and no method's name")
        taken.add(text.partition("=")[0])
    return args


# ------------------------------------------------------------------------------------------------------ what goes in

def open_run(args, data, methods):
    """runs/<run>/config.json as a dict, {} where there is none and none is needed.

    InputError when the run was trained on other pools than `data` holds: test entities could be among its training
    queries, and no number would show it.
    """
    weights, path = f"{args.adapter}/adapter_model.safetensors", f"{args.run}/config.json"
    needing = [name for name in methods if name in NEED_ADAPTER]
    if needing and not os.path.isfile(weights):
        raise InputError(f"{weights} is missing, and {', '.join(needing)} need the trained policy: run `python train.py"
                         f" --data {data.folder} --run {args.run}`, or ask for --methods full,center,zeroshot")
    config = read_json(path, "put it back, or train with another --run") if os.path.isfile(path) else {}
    # The hash of the pools and not of manifest.json: the same pools prepared in another folder are the same data.
    if config and config.get("pools") != data.identity:
        raise InputError(f"run {args.run} was trained on {config.get('data')} (pools {config.get('pools')}), but "
                         f"{data.folder} has pools {data.identity}: evaluate on the data of the run, or train anew")
    return config


def read_truth(data):
    """True boxes of a split, {query row: {"box": 4 floats, "kind": str, ...}}; empty where the data has none.

    This is the only reader of truth.jsonl in the project: what else opened it would learn the answers.
    """
    path, rows, truth = os.path.join(data.root, "truth.jsonl"), {}, {}
    if not os.path.isfile(path):
        return truth
    for i, query in enumerate(data.queries):  # several questions may be asked about one image
        rows.setdefault(query.image, []).append(i)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fact = json.loads(line)
                (x1, y1, x2, y2), image, _ = fact["box"], fact["image"], fact["kind"]
                if not (x1 < x2 and y1 < y2 and np.isfinite(fact["box"]).all()):
                    raise ValueError("the box has no area")
            except (ValueError, KeyError, TypeError) as error:  # no JSON, no object, no four numbers
                raise InputError(f"{path}:{number}: needs image, kind and a box of 4 numbers ({error})") from error
            for i in rows.get(image, ()):
                truth[i] = {**fact, "box": (x1, y1, x2, y2)}
    return truth


def open_images(data, rows):
    """PIL images of these queries, read side by side."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(data.open_image, rows))


def image_sizes(data):
    """(w, h) of every query image in pixels, None where it cannot be read: such a query is FULL for every method.

    All are read before anything is asked, so that all methods see the same queries. prepare.py has read every one of
    them: what is unreadable now was moved or damaged since.
    """
    def size(i):
        try:
            return data.open_image(i).size
        except (InputError, FileNotFoundError) as error:
            print(f"note: query {data.queries[i].query_id} counts as FULL: {error}")

    with ThreadPoolExecutor(8) as threads:
        sizes = list(tqdm(threads.map(size, range(len(data))), "read", len(data), unit="image", disable=None))
    if not any(sizes):
        raise InputError(f"no query image of the split can be read: is {data.root} still where it was?")
    return sizes


class Answers(dict):
    """Answers of models, {(pass, query row): JSON value}, also in a file as they come: a killed evaluation goes on.

    The file's first line is the key. A file with another key is begun anew: its answers came from other weights, pools
    or ways of decoding.
    """

    def __init__(self, path, key):
        self.path, head = path, json.dumps(key, sort_keys=True)
        lines = Path(path).read_text(encoding="utf-8").splitlines() if os.path.isfile(path) else []
        if lines and lines[0] != head:
            print(f"note: {path} is of another adapter, policy or way of decoding, and is begun anew")
            lines = []
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # a line that a kill cut short: it is asked for again
                name, row, value = json.loads(line)
                self[name, row] = value
        self.file = open(path, "a" if lines else "w", encoding="utf-8")
        self.file.write("\n" if lines else head + "\n")  # what was cut short ends here

    def add(self, answers):
        """In the file when this returns."""
        self.update(answers)
        self.file.writelines(json.dumps([*at, value]) + "\n" for at, value in answers.items())
        self.file.flush()


# ----------------------------------------------------------------------------------------- methods: query -> action

def all_actions(methods, data, sizes, truth, config, args, answers):
    """{method: [Q] Action}. In place of oracle stands `truth`, always the true box: the scores decide between them."""
    asked = [name for name in PASSES if name in methods and name != "zeroshot2"]
    if "random" in methods:  # needs the learned policy's boxes even where its row is not asked for
        asked += [name for name in ("policy", "always") if name not in asked]
    actions = {"full": [FULL_IMAGE] * len(sizes)}
    if asked:
        name = args.policy or config.get("policy")
        if not name:
            raise InputError(f"{args.run} has no config.json that names a policy: give --policy, or train first")
        policy = open_policy(name, config, args, trained=bool(set(methods) & set(NEED_ADAPTER)))
        actions |= model_actions(policy, asked, data, sizes, args, answers)
        del policy  # before the second comes: two of them and the scorer need not fit together
    if "zeroshot2" in methods:
        policy = open_policy(args.zeroshot_policy, config, args, trained=False)
        actions |= model_actions(policy, ["zeroshot2"], data, sizes, args, answers)
    if "center" in methods:
        low, high = (1 - args.center_fraction) / 2, (1 + args.center_fraction) / 2
        actions["center"] = [region(size and (size[0] * low, size[1] * low, size[0] * high, size[1] * high))
                             for size in sizes]
    if "random" in methods:
        of = "policy" if any(action.box for action in actions["policy"]) else "always"
        if of == "always":  # it gave up cropping: its forced boxes are the nearest thing to its distribution
            print("note: the policy crops no query, so `random` takes its shapes from the forced boxes of `always`")
        actions["random"] = [region(box) for box in random_boxes(sizes, actions[of], args.seed)]
    if "oracle" in methods:
        actions["truth"] = [region(size and i in truth and truth[i]["box"]) for i, size in enumerate(sizes)]
    return actions


def open_policy(name, config, args, trained):
    """The policy as it was trained: prompt and image size from the run's config, the adapter where it is needed."""
    settings = config.get("args", {})
    try:
        policy = load_policy(name, adapter=args.adapter if trained else None, device=args.device,
                             max_pixels=settings.get("max_pixels"), system_prompt=config.get("system_prompt"),
                             dtype=args.policy_dtype)
    except (ValueError, OSError) as error:  # of a folder or name that the user gave
        raise InputError(str(error)) from error
    policy.keep_prefix, policy.max_new_tokens = True, settings.get("max_new_tokens", policy.max_new_tokens)
    return policy


def model_actions(policy, names, data, sizes, args, answers):
    """{method: [Q] Action} for methods that ask one policy. What `answers` holds already is not asked for again."""
    pass_of = {name: PASSES[name][args.decode == "free"] for name in names}
    passes = sorted(set(pass_of.values()))
    todo = [i for i, size in enumerate(sizes) if size and any((each, i) not in answers for each in passes)]
    for start in tqdm(range(0, len(todo), args.batch_size), desc="decide", unit="batch", disable=None):
        rows = todo[start:start + args.batch_size]
        images, questions = open_images(data, rows), [data.queries[i].question for i in rows]
        for each in passes:
            begin = time.perf_counter()
            with policy.adapter(not each.startswith("base")):
                found = policy.act(images, questions, decode=args.decode, batch_size=args.batch_size,
                                   force="REGION" if each.endswith("forced") else None)
            seconds = (time.perf_counter() - begin) / len(rows)
            answers.add({(each, i): [a.decision, a.box, a.p_region, a.text, seconds] for i, a in zip(rows, found)})
    actions = {name: [] for name in names}
    for name, listed in actions.items():
        may_decide = args.decode == "grammar" and not name.endswith("always")  # REGION was forced on it all the same
        threshold = args.threshold if name == "policy" else 0.5  # a base model is a baseline and stays greedy
        for i in range(len(sizes)):
            decision, box, p_region, text, _ = answers.get((pass_of[name], i)) or ("FULL", None, None, "", 0)
            # Greedy decoding takes the likelier decision, and after REGION the forced digits are what it would write.
            if may_decide and p_region is not None and p_region <= threshold:
                decision, box, text = "FULL", None, '{"Decision": "FULL"}'
            listed.append(Action(decision, box and tuple(box), p_region, text))
    return actions


def region(box):
    """REGION with this box, by no model; FULL where there is no box."""
    return Action("REGION", box, None, "") if box else FULL_IMAGE


def random_boxes(sizes, actions, seed):
    """One box a query: its shape that of one of the actions' boxes, its place uniform among those where it fits.

    sizes: [Q] (w, h), None gives None. A shape is (w, h) as shares of the image's sides. Drawn together they keep the
    policy's areas and its aspects (Sec. 4.2); drawing the area alone would invent an aspect.
    """
    shapes = [((a.box[2] - a.box[0]) / size[0], (a.box[3] - a.box[1]) / size[1])
              for a, size in zip(actions, sizes) if a.box]
    if not shapes:
        raise InputError("the policy wrote no readable box at all, so `random` has no shapes to draw: leave it out")
    boxes = [None] * len(sizes)
    for row, (width, height) in ((row, size) for row, size in enumerate(sizes) if size):
        rng = np.random.default_rng([seed, row])  # by row; yet --limit leaves fewer shapes to draw from
        share_w, share_h = shapes[rng.integers(len(shapes))]
        w, h = share_w * width, share_h * height
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        boxes[row] = (float(left), float(top), float(left + w), float(top + h))
    return boxes


# ------------------------------------------------------------------------------------------------- actions -> scores

def score_actions(data, scorer, actions, batch_size=64):
    """Scores of every method's views in pool order, {method: float32 [Q, K]}, and what a view took, {(row, box): s}.

    FULL and MALFORMED take the stored full-image feature and encode nothing: text that cannot be read leaves the query
    as it was. Each image is opened once and each different box encoded once, however many methods chose it.
    """
    found, seconds = {name: [] for name in actions}, {}
    for start in tqdm(range(0, len(data), batch_size), desc="score", unit="batch", disable=None):
        rows = range(start, min(start + batch_size, len(data)))
        views = list(dict.fromkeys((i, listed[i].box) for i in rows for listed in actions.values()
                                   if listed[i].decision == "REGION"))  # without repeats, in this order
        features, took = encode_views(data, scorer, views)
        seconds |= dict.fromkeys(views, took)
        for i in rows:
            full = np.asarray(data.full[i], dtype=np.float32)  # [D]
            seen = np.stack([features.get((i, listed[i].box), full) for listed in actions.values()])  # [methods, D]
            for name, row in zip(actions, scores(seen, data.candidates(i))):  # Eq. 2, 4: [methods, K]
                found[name].append(row)
    return {name: np.stack(rows) for name, rows in found.items()}, seconds  # [Q, K]


def encode_views(data, scorer, views):
    """Features of views (query row, box) -> {view: [D]}, and the seconds of cropping and encoding, a view."""
    rows = list(dict.fromkeys(i for i, _ in views))
    images = dict(zip(rows, open_images(data, rows)))
    begin = time.perf_counter()
    features = scorer.image_features([crop(images[i], box) for i, box in views])  # Eq. 1
    return dict(zip(views, features)), (time.perf_counter() - begin) / max(1, len(views))


def oracle_of(full, truth, actions, labels):
    """Actions and scores [Q, K] of the better of full image and true box (`actions`): by rank, then by margin."""
    f, t = metrics(full, labels), metrics(truth, labels)
    # A NaN margin (no positive or no negative in the pool) compares false: the full image stays.
    better = (t["rank"] < f["rank"]) | ((t["rank"] == f["rank"]) & (t["margin"] > f["margin"]))  # [Q]
    return [a if take else FULL_IMAGE for a, take in zip(actions, better)], np.where(better[:, None], truth, full)


def match_run(data, path, ids):
    """A TREC run on our pools -> (scores float32 [Q, K], what did not match, counted). ids: {line of kb.jsonl: id}.

    A score is K minus the place among the pool's candidates. Candidates that the run lacks come last with equal scores,
    that is in pool order; entities outside the pool are passed over; a query that the run lacks keeps the pool's order.
    Ids match verbatim or as trec_id writes them.
    """
    their, found, used = read_trec(path), np.zeros(data.pool.shape, np.float32), set()
    counts = {"queries_missing": 0, "candidates_missing": 0, "outside_pool": 0}
    for i, query in enumerate(data.queries):
        name = query.query_id if query.query_id in their else trec_id(query.query_id)
        if name not in their:
            counts["queries_missing"] += 1
            continue
        used.add(name)
        place = {spelt: at for at, j in enumerate(data.pool[i].tolist()) for spelt in (ids[j], trec_id(ids[j]))}
        order = list(dict.fromkeys(place[entity] for entity in their[name] if entity in place))  # the first of repeats
        counts["candidates_missing"] += found.shape[1] - len(order)
        counts["outside_pool"] += len(set(their[name]) - place.keys())
        found[i, order] = found.shape[1] - np.arange(len(order))
    if not used:
        raise InputError(f"{path}: none of its {len(their)} queries ({next(iter(their), '-')!r} ...) is in the split,"
                         f" whose ids are like {data.queries[0].query_id!r}")
    return found, {"file": os.path.basename(path), "queries": len(used), **counts,
                   "queries_unknown": len(their.keys() - used)}


# ---------------------------------------------------------------------------------------------------- scores -> rows

def make_rows(data, actions, method_scores, full_scores, truth, sizes, seconds=None, places=False):
    """What one method did and what it led to: [Q] dicts, the lines of <split>.<method>.jsonl.

    truth, sizes: of read_truth and image_sizes; seconds [Q]: of deciding, cropping and encoding, None where nothing was
    computed. places: the scores are places in another program's ranking, so that a margin means nothing.
    """
    rows = []
    for i, fields in enumerate(ranked(data.labels, method_scores, full_scores)):
        query, action, fact = data.queries[i], actions[i], truth.get(i, {"kind": None})
        cropped = action.decision == "REGION"
        rows.append({
            "query_id": query.query_id, "question": query.question, "image": query.image, "kind": fact["kind"],
            "positives": query.positives, "decision": action.decision, "box": action.box and list(action.box),
            "p_region": action.p_region, "text": action.text, **fields, **({"margin": None} if places else {}),
            "iou": iou(action.box, fact["box"]) if cropped and "box" in fact else None,
            "seconds": seconds[i] if seconds else None, "encodes": int(cropped), "unreadable": sizes[i] is None})
    return rows


def ranked(labels, found, full):
    """What scores [Q, K] say, a dict a query: scores, labels, rank, margin, and the full image's rank and margin."""
    after, before = metrics(found, labels, ks=()), metrics(full, labels, ks=())

    def short(values):  # 9 digits give every float32 back: what is computed from the file is what is computed from here
        return [None if np.isnan(value) else float(f"{value:.9g}") for value in values]

    return [dict(zip(("scores", "labels", "rank", "full_rank", "margin", "full_margin"), fields)) for fields in zip(
        map(short, found), np.asarray(labels).astype(int).tolist(), after["rank"].tolist(), before["rank"].tolist(),
        short(after["margin"]), short(before["margin"]))]


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) of one frame, right and bottom exclusive."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


# --------------------------------------------------------------------------------------------------- rows -> numbers

def column(rows, name):
    """A field of all rows as an array [Q] or [Q, K]."""
    return np.array([row[name] for row in rows])


def mean(values):
    """Mean of the values that are known; None where there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def numbers(rows):
    """Every number of one method: means (Tables 1, 2), decisions, Table 4, IoU, and the same by kind where known.

    Table 4 splits the n queries with a positive by the full image's rank; help, hurt, no_change: shares of the n whose
    rank got better, worse, or stayed.
    """
    per_query = metrics(column(rows, "scores"), column(rows, "labels"))
    held, rank, full_rank = per_query["has_positive"], column(rows, "rank"), column(rows, "full_rank")
    cropped = column(rows, "decision") == "REGION"  # [Q]
    facts = {"CondR@1": per_query["recall@1"], "crop_rate": cropped, "help": rank < full_rank, "hurt": rank > full_rank,
             "no_change": rank == full_rank}  # [Q] each

    def shares(group, names):
        return {"n": int(group.sum()), **{name: mean(facts[name][group]) for name in names}}

    changes = ("crop_rate", "help", "hurt", "no_change")
    result = {**summary(per_query), "crop_rate": float(cropped.mean()),
              "malformed": sum(row["decision"] == "MALFORMED" for row in rows),
              "table4": {"rank=1": shares(held & (full_rank == 1), changes),
                         "rank>1": shares(held & (full_rank > 1), changes)},
              "mean_iou": mean(row["iou"] for row in rows)}
    for kind in sorted({row["kind"] for row in rows} - {None}):
        group = held & (column(rows, "kind") == kind)  # [Q]
        result.setdefault("kinds", {})[kind] = {**shares(group, ("CondR@1", "crop_rate", "help", "hurt")),
                                                "mean_iou": mean(row["iou"] for row in rows if row["kind"] == kind)}
    return result


def operating_curve(full, always):
    """MRR and CondR@1 against crop rate, for every threshold on p(REGION | x): a list of points, or None without p.

    full, always: rows of the full image and of the forced boxes. At a threshold t a query is cropped where p > t, so
    no model is asked again. Thresholds: 0, 0.5 and 39 quantiles of p, rising; the last one crops nothing.
    """
    p = np.array([row["p_region"] if row["decision"] == "REGION" else None for row in always], float)  # NaN: no box
    if np.isnan(p).all():
        return None
    views = [metrics(column(rows, "scores"), column(rows, "labels"), ks=(1,)) for rows in (full, always)]
    held, points = views[0]["has_positive"], []
    for threshold in np.unique([0, .5, *np.nanquantile(p, np.linspace(0, 1, 39))]):
        crops = p > threshold  # [Q] a NaN compares false
        rr, hit = (np.where(crops, views[1][name], views[0][name]) for name in ("rr", "recall@1"))
        points.append({"threshold": float(threshold), "crop_rate": float(crops.mean()), "MRR": float(rr.mean()),
                       "CondR@1": mean(hit[held])})
    return points


def tabulate(about, rows):
    """{method: [Q] rows} -> the dict of metrics.json. about: what the rows do not tell, such as data, run and scorer.

    The rows `truth` always take the true box; they are a part of the oracle and no method.
    """
    table, full = {name: numbers(listed) for name, listed in rows.items() if name != "truth"}, rows["full"]
    curve, gap = {}, None
    for name, forced in (("policy", "always"), ("zeroshot", "zeroshot_always")):
        if points := operating_curve(full, rows[forced]) if forced in rows else None:
            curve[name] = points
    if "oracle" in table:
        curve["oracle"] = {name: table["oracle"][name] for name in ("crop_rate", "MRR", "CondR@1")}
    if {"policy", "oracle"} <= table.keys() and (best := table["oracle"]["CondR@1"]) is not None:
        least = table["full"]["CondR@1"]
        gap = (table["policy"]["CondR@1"] - least) / (best - least) if best > least else None
    missing = [row["query_id"] for row in full if row["unreadable"]]
    return {**about, "K": len(full[0]["labels"]), "queries": len(full),
            "with_positive": sum(any(row["labels"]) for row in full),
            "unreadable": {"count": len(missing), "first": missing[:5]}, "methods": table,
            **({"truth_box": numbers(rows["truth"])} if "truth" in rows else {}), "gap_closed": gap, "curve": curve}


# -------------------------------------------------------------------------------------------------- numbers -> tables

def cells(values, width, style):
    """Numbers in columns; style "%" is in per cent with one digit, without the sign."""
    return "".join(f"{'-' if v is None else f'{v * 100:.1f}' if style == '%' else format(v, style):>{width}}"
                   for v in values)


def tables(table, truth_box):
    """Tables 1 and 2 beside each other with the paper's rows beneath; Table 4; and some of it by kind of query, where
    `truth` always takes the true box. Three lists of lines."""
    main = [f"{'':16}{'Table 1':^48} |{'Table 2':^28} |{'what it did':^26}",
            f"{'method':16}{cells(COLUMNS[:6], 8, '')} |{cells(COLUMNS[6:], 9, '')}  |  crop % bad text    IoU"]
    for name, row in table.items():
        v = [row[column] for column in COLUMNS]
        main.append(f"{name:16}{cells(v[:2], 8, '.3f')}{cells(v[2:6], 8, '%')} |{cells(v[6:], 9, '.3f')}  |"
                    f"{cells([row['crop_rate']], 8, '%')}{row['malformed']:9}{cells([row['mean_iou']], 7, '.2f')}")
    for dataset, rows in PAPER.items():
        main.append(f"the paper, {dataset} (other data, other models: for the shape of the table only)")
        main += [f"{name:16}{cells(v[:2], 8, '.2f')}{cells(v[2:6], 8, '.1f')} |{cells(v[6:], 9, '.2f')}  |"
                 for name, v in rows.items()]

    columns = ("crop_rate", "help", "hurt", "no_change")  # in per cent of the queries whose pool holds the positive
    table4 = [f"{'Table 4':16}" + "".join(f"{f'original {group}, n = ' + str(found['n']):^44}"
                                          for group, found in table["full"]["table4"].items()),
              f"{'in %':16}" + cells((c.replace("_", " ") for c in columns), 11, "") * 2]
    table4 += [f"{name:16}" + "".join(cells((g[c] for c in columns), 11, "%") for g in table[name]["table4"].values())
               for name in CROPPING if name in table]

    kinds = table["full"].get("kinds", {})
    by_kind = [f"{'by kind':16}" + "".join(f"{f'{kind}, n = ' + str(k['n']):^46}" for kind, k in kinds.items()),
               f"{'':16}" + cells(("CondR@1", "crop %", "IoU", "help %", "hurt %"), 9, "") * len(kinds)]
    by_kind += [f"{name:16}" + "".join(
        cells([k["CondR@1"]], 9, ".3f") + cells([k["crop_rate"]], 9, "%") + cells([k["mean_iou"]], 9, ".2f")
        + cells([k["help"], k["hurt"]], 9, "%") for k in row["kinds"].values())
        for name, row in {**table, **({"truth": truth_box} if truth_box else {})}.items() if kinds]
    return main, table4 if len(table4) > 2 else [], by_kind if kinds else []


def report(result):
    """All tables as one text, and beneath them what a reader must know."""
    table, notes = result["methods"], []
    if result["gap_closed"] is not None:
        full, policy, oracle = (table[name]["CondR@1"] for name in ("full", "policy", "oracle"))
        notes.append(f"gap closed in CondR@1: {result['gap_closed']:.0%} = (policy {policy:.3f} - full {full:.3f}) / "
                     f"(oracle {oracle:.3f} - full {full:.3f})")
    if "zeroshot2" in table:
        notes.append(f"zeroshot2 is {result['models']['zeroshot2']}")
    for name, found in result["external"].items():
        notes.append(f"{name}: {found['queries']} queries from {found['file']}; not matched: " + ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in found.items() if key not in ("file", "queries")))
    if result["unreadable"]["count"]:
        notes.append(f"{result['unreadable']['count']} query images cannot be read and count as FULL: "
                     f"{', '.join(result['unreadable']['first'])} ...")
    head = [f"{result['split']} split of {result['data']}: {result['queries']} queries, {result['with_positive']} of "
            f"them with a positive among their K = {result['K']} candidates"]
    return "\n\n".join("\n".join(part) for part in (head, *tables(table, result.get("truth_box")), notes) if part)


# ------------------------------------------------------------------------------------------------------------- files

def write_rows(path, rows):
    """One JSON line a query, atomically."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_all(folder, data, ids, rows, result):
    """Every file of an evaluation. metrics.json goes first and comes last: where it is, the others are whole."""
    split = result["split"]
    if os.path.isfile(f"{folder}/metrics.json"):
        os.remove(f"{folder}/metrics.json")
    names, entities = [row["query_id"] for row in rows["full"]], [[ids[j] for j in pool] for pool in data.pool.tolist()]
    with replacing(f"{folder}/{split}.qrels") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, listed in zip(rows["full"], entities):
            file.writelines(f"{trec_id(row['query_id'])} 0 {trec_id(entity)} {label}\n"
                            for entity, label in zip(listed, row["labels"]))
    for method, listed in rows.items():
        write_rows(f"{folder}/{split}.{method}.jsonl", listed)
        write_trec(f"{folder}/{split}.{method}.trec", zip(names, entities, (row["scores"] for row in listed)), method)
    write_json(f"{folder}/metrics.json", result)


# ------------------------------------------------------------------------------------------------------------- stage

def open_all(args):
    """Everything that the stage reads but images and policies -> (data, scorer, methods, truth, config, ids, external).
    Settles decode and dtypes in args by what the run and the data say."""
    data = load_data(args.data, args.split, limit=args.limit)
    if not len(data):
        raise InputError(f"{args.data}: split {args.split} has no queries; see its counts in manifest.json")
    truth = read_truth(data)
    if not truth and "oracle" in (args.methods or ()):
        raise InputError("method oracle needs truth.jsonl beside the raw data, and there is none: leave it out")
    if not truth:
        print("no truth.jsonl beside the raw data: no oracle row, no IoU, no table by kind")
    # The full image is always there: every other row is compared with it, query by query.
    wanted = {"full", *(args.methods or METHODS)} - (set() if truth else {"oracle"})
    methods = [name for name in METHODS if name in wanted]
    if args.zeroshot_policy:  # beside the other base model, as in Table 1
        methods.insert(sum(name in METHODS[:5] for name in methods), "zeroshot2")
    config = open_run(args, data, methods)
    args.decode = args.decode or config.get("args", {}).get("decode", "grammar")
    args.policy_dtype = args.policy_dtype or config.get("args", {}).get("policy_dtype")
    if args.decode == "free" and args.threshold != 0.5:
        raise InputError("--threshold needs p(REGION | x), which only --decode grammar knows exactly")
    ids = {j: data.entity(j)["entity_id"] for j in np.unique(data.pool).tolist()}
    external = {name: match_run(data, path, ids) for name, path in (text.split("=", 1) for text in args.run_file)}
    then = data.manifest["scorer"]
    scorer = load_scorer(args.scorer or then["name"], args.device, args.scorer_dtype or then["dtype"])
    same_scorer(args.data, data.manifest, scorer)
    return data, scorer, methods, truth, config, ids, external


def evaluate(args):
    """From queries to files -> the dict of metrics.json."""
    data, scorer, methods, truth, config, ids, external = open_all(args)
    about = {"data": args.data, "run": args.run, "split": args.split, "scorer": scorer.name, "decode": args.decode,
             "policy_dtype": args.policy_dtype, "threshold": args.threshold, "center_fraction": args.center_fraction,
             "seed": args.seed, "training_seed": config.get("args", {}).get("seed"),
             "models": {"policy": args.policy or config.get("policy"), "zeroshot2": args.zeroshot_policy},
             "external": {name: counts for name, (_, counts) in external.items()}}
    key = {"pools": data.identity, "files": [], **{name: about[name] for name in ("decode", "policy_dtype", "models")}}
    for path in (f"{args.adapter}/adapter_model.safetensors", f"{args.run}/config.json"):  # config: prompt, image size
        if os.path.isfile(path):
            key["files"].append(hashlib.sha256(Path(path).read_bytes()).hexdigest())
    os.makedirs(args.out, exist_ok=True)
    with hold(args.out, "--out"):
        answers = Answers(f"{args.out}/{args.split}.actions.part", key)
        sizes = image_sizes(data)
        actions = all_actions(methods, data, sizes, truth, config, args, answers)
        found, view_seconds = score_actions(data, scorer, actions, args.batch_size)
        if "oracle" in methods:
            labels = np.asarray(data.labels)  # [Q, K]
            actions["oracle"], found["oracle"] = oracle_of(found["full"], found["truth"], actions["truth"], labels)
        rows = {}
        for name in [*methods, *(["truth"] if "truth" in actions else [])]:
            seconds = []  # loading images and searching the pool are not counted
            for i, action in enumerate(actions[name]):
                asked = answers.get((PASSES[name][args.decode == "free"], i), [0])[-1] if name in PASSES else 0
                seconds.append(asked + view_seconds.get((i, action.box), 0) or None)
            rows[name] = make_rows(data, actions[name], found[name], found["full"], truth, sizes, seconds)
        for name, (places, _) in external.items():
            rows[name] = make_rows(data, actions["full"], places, found["full"], truth, sizes, places=True)
        result = tabulate(about, rows)
        write_all(args.out, data, ids, rows, result)
        os.remove(answers.path)
    return result


def main(argv=None):
    args = parse_args(argv)
    try:
        result = evaluate(args)
    except (InputError, FileNotFoundError) as error:  # wrong input, said in one line; anything else is a bug and shows
        raise SystemExit(f"evaluate.py: {error}") from error
    print(report(result))
    print(f"wrote to {args.out}: metrics.json, {args.split}.<method>.jsonl and .trec, {args.split}.qrels")


if __name__ == "__main__":
    main()
