"""Re-rank a split with every method and write the paper's tables (Tables 1, 2, 4, 6, 7, 8 and the data of Figure 2).

    python evaluate.py --data data/world --run runs/world --split test    # the README has the minutes and the machine
    python evaluate.py --run runs/world --from-rows                       # the same from the saved rows, in seconds

A method turns a query into an action, and nothing else: FULL, REGION with a box, or MALFORMED. Everything after that
is one code path: actions -> scores -> rows (one JSON line a query) -> numbers. So the rows can be compared, and a new
method is a new list of actions.

    full             the whole image: what retrieval saw (Table 1, EVA-CLIP)
    random           a box at a random place, its size drawn from the learned policy's boxes (Sec. 4.2)
    center           the middle of the image (Sec. 4.2)
    zeroshot         the policy's base model: the same weights with the adapter off (Sec. 4.2)
    zeroshot_always  the base model's own boxes, on every query: with its p(REGION | x) the base model's operating curve
    zeroshot2        another base model (--zeroshot-policy), such as the 7B of Table 1
    always           the learned policy's own boxes, on every query: is it the decision or the box that helps?
    policy           the learned policy
    policy+fuse      its crop and the full image seen together (--fuse)
    policy+best<n>   its decision, with the likeliest of n sampled boxes (--samples)
    oracle           the better of full image and true box, for data whose truth.jsonl names a true box
    NAME             a re-ranking that another program wrote (--run-file NAME=PATH)

Simplified: decoding is greedy, one action a query. With a grammar, REGION is forced on every query and the decision is
read from p(REGION | x), which is exact either way: `policy` and `always` then cost one decoding pass together. So the
seconds of a query that stays FULL are an upper bound: the box that nobody asked for is among them.
"""

import argparse
import base64
import csv
import dataclasses
import errno
import hashlib
import http.client
import importlib
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote

import faiss
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from tqdm import tqdm

from policy import Action, load_policy
from rewards import metrics, summary
from scorer import (
    check_scorer, crop, fuse, hold, image_size, load_data, load_scorer, normalise, prepared_dtype, read_image, read_json,
    replacing, scores, write_json,
)

METHODS = ("full", "random", "center", "zeroshot", "zeroshot_always", "always", "policy", "oracle")
NEED_ADAPTER = ("random", "always", "policy")
CROPPING = ("zeroshot", "zeroshot2", "policy", "always")  # rows of Table 4: methods that choose a region by looking
ASKS = {"zeroshot": ("base", "choose"), "zeroshot_always": ("base", "forced"), "zeroshot2": ("second", "choose"),
        "policy": ("learned", "choose"), "always": ("learned", "forced")}  # method: (weights, may it decide?)
COLUMNS = ("MRR", "NDCG", "R@1", "R@5", "R@10", "R@20", "CondR@1", "CondR@5", "CondR@10")  # Table 1, then Table 2
ROW_FIELDS = ("query_id", "question", "image", "kind", "positives", "decision", "box", "p_region", "text", "scores",
              "labels", "rank", "full_rank", "margin", "full_margin", "iou", "containment", "judge", "seconds",
              "encodes", "unreadable")
RETRIEVED_FIELDS = ("query_id", "scores", "labels")  # of a row of Table 8: what its numbers are made from
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
    files = parser.add_argument_group("files")
    files.add_argument("--data", default="data/world", help="folder that prepare.py wrote")
    files.add_argument("--run", default="runs/world", help="folder that train.py wrote")
    files.add_argument("--out", help="folder for everything that is written; default: eval/ in the run's folder")
    files.add_argument("--split", default="test", help="split of the data: train, val or test")
    files.add_argument("--from-rows", action="store_true",
                       help="compute metrics.json and the tables anew from the rows in --out: no model, no data")
    add_comparisons(parser.add_argument_group("what is compared"))
    add_analyses(parser.add_argument_group("further tables, each off unless asked for"))
    models = parser.add_argument_group("models")
    models.add_argument("--policy", help="model id or folder of the policy; default: the one the run was trained from")
    models.add_argument("--scorer", help="scorer; default: the one the data was prepared with (another is refused)")
    models.add_argument("--scorer-dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the scorer's weights; default: as the data was prepared with --scorer-dtype, else "
                             "bfloat16 on CUDA, float32 elsewhere")
    models.add_argument("--policy-dtype", choices=("float32", "bfloat16"),
                        help="of the policy's weights; default: as the run was trained with --policy-dtype, else "
                             "bfloat16 on CUDA, float32 elsewhere")
    models.add_argument("--decode", choices=("grammar", "free"),
                        help="grammar: only the decision and the digits are choices; free: any text, then parsed; "
                             "default: as the run was trained, else grammar")
    models.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 ...")
    models.add_argument("--batch-size", type=int, default=64, help="queries a step, 1 or more; memory, not results")
    parser.add_argument("--sheet", type=int, default=12, help="queries on the before/after picture, 0 = no picture")
    parser.add_argument("--wandb", metavar="PROJECT", help="also show the numbers in this project of Weights & Biases "
                                                           "(pip install wandb); metrics.json always has them")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    # runs/world/ and ./runs/world are runs/world, also in metrics.json. Not normpath: beyond a link .. leads elsewhere.
    for name in ("run", "data", "out"):
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name))))
    if problem := wrong_flags(args):
        parser.error(problem)
    return args


def add_comparisons(group):
    """Flags that choose methods and how they act."""
    group.add_argument("--methods", type=lambda text: tuple(text.split(",")),
                       help=f"comma-separated, of {','.join(METHODS)}; default: all, oracle where truth is known")
    group.add_argument("--center-fraction", type=float, default=0.5,
                       help="side of the centre box as a share of the image's side, above 0, at most 1 (Sec. 4.2)")
    group.add_argument("--threshold", type=float, default=0.5, metavar="T",
                       help="the learned policy crops where p(REGION | x) > T, 0 to 1; 0.5 is greedy decoding. Choose "
                            "it on the curve of another split. Grammar only")
    group.add_argument("--fuse", type=float, metavar="W",
                       help="adds policy+fuse: (1 - W) full image + W crop, of features of length 1; W from 0 to 1")
    group.add_argument("--samples", type=int, default=0, metavar="N",
                       help="adds policy+bestN: of N sampled boxes the one that the policy itself finds likeliest; "
                            "0 = off. Grammar only")
    group.add_argument("--zeroshot-policy", metavar="NAME",
                       help="adds zeroshot2: this model without any training, such as Qwen/Qwen2.5-VL-7B-Instruct")
    group.add_argument("--run-file", action="append", default=[], metavar="NAME=PATH",
                       help="adds a re-ranking by another program: a TREC run, or EchoSight's or OMGM's result JSON; "
                            "may be given several times")
    group.add_argument("--seed", type=int, default=0, help="of random boxes and --samples; nothing else draws")
    group.add_argument("--limit", type=int, default=0, help="use the first N queries of the split; 0 = all of them")


def add_analyses(group):
    """Flags for Tables 6, 7 and 8."""
    group.add_argument("--test-scorer", action="append", default=[], metavar="NAME",
                       help="re-score the same pools and crops with another scorer (Table 6); may be repeated")
    group.add_argument("--proxy", metavar="groundingdino=NAME",
                       help="target boxes for IoU and containment by this detector, a Hugging Face id or folder "
                            "(Table 7); default: the true boxes, where the data has them")
    group.add_argument("--judge", metavar="URL",
                       help="ask a vision-language model behind an OpenAI-compatible address (http://host:port/v1) "
                            "whether the crop can answer the question (Table 7). The crops are sent there")
    group.add_argument("--judge-model", default="default", help="name of the model to ask for at --judge")
    group.add_argument("--judge-key-env", default="OPENAI_API_KEY", metavar="VARIABLE",
                       help="environment variable that holds the key for --judge; none is sent where it is empty")
    group.add_argument("--judge-limit", type=int, default=200, help="crops to ask about, evenly spaced; 0 = all")
    group.add_argument("--retrieval-stage", action="store_true",
                       help="retrieve again over the whole knowledge base with the policy's view (Table 8)")


def wrong_flags(args):
    """What is wrong with the arguments, in one sentence, or None."""
    named = [text.partition("=")[0] for text in args.run_file]
    if not 0 < args.center_fraction <= 1:
        return f"--center-fraction {args.center_fraction}: above 0 and at most 1"
    if not 0 <= args.threshold <= 1 or args.fuse is not None and not 0 <= args.fuse <= 1:
        return "--threshold and --fuse lie between 0 and 1"
    if args.batch_size < 1 or min(args.limit, args.sheet, args.samples, args.judge_limit) < 0:
        return "--batch-size must be 1 or more, --limit, --sheet, --samples and --judge-limit 0 or more"
    if unknown := sorted(set(args.methods or ()) - set(METHODS)):
        return f"--methods: unknown {', '.join(unknown)}; known are {', '.join(METHODS)}"
    # The name becomes a file name, and @ and + are taken for scorers and extensions.
    if any("=" not in text for text in args.run_file) or not all(re.fullmatch(r"[\w-]+", name) for name in named):
        return "--run-file is NAME=PATH, NAME of letters, digits, - and _"
    if set(named) & {*METHODS, *ASKS, "truth"} or len(set(named)) < len(named):
        return f"--run-file: {', '.join(named)}: each name once, and none that a method here has"
    if args.proxy and not re.fullmatch(r"groundingdino=.+", args.proxy):
        return f"--proxy {args.proxy}: groundingdino=NAME is the one kind there is"
    if args.judge and not re.match(r"https?://", args.judge):
        return f"--judge {args.judge}: an address that begins with http:// or https://"
    further = {"--fuse": args.fuse is not None, "--samples": args.samples, "--judge": args.judge,
               "--retrieval-stage": args.retrieval_stage}
    if args.methods and "policy" not in args.methods and any(further.values()):
        return f"{', '.join(flag for flag, given in further.items() if given)}: need method policy"
    further |= {"--test-scorer": args.test_scorer, "--proxy": args.proxy, "--run-file": args.run_file,
                "--zeroshot-policy": args.zeroshot_policy, "--methods": args.methods,
                "--threshold": args.threshold != 0.5, "--limit": args.limit, "--seed": args.seed}
    if args.from_rows and any(further.values()):
        return f"--from-rows takes what is saved, without {', '.join(flag for flag, given in further.items() if given)}"
    return None


# ------------------------------------------------------------------------------------------------------ what goes in

def open_run(folder, data, methods):
    """runs/<run>/config.json as a dict ({} where there is none and none is needed). data: of load_data.

    Raises FileNotFoundError when a method needs an adapter and the run has none, ValueError when the run was trained
    on other pools than `data` holds: test entities could be among its training queries, and no number would show it.
    """
    config_file, adapter = os.path.join(folder, "config.json"), adapter_file(folder)
    needing = [name for name in methods if name in NEED_ADAPTER]
    if needing and not os.path.isfile(adapter):
        raise FileNotFoundError(f"{adapter} is missing, and {', '.join(needing)} need the trained policy: run "
                                f"`python train.py --data {data.folder} --run {folder}` (add --resume if it was cut "
                                "short), or ask for --methods full,center,zeroshot")
    if not os.path.isfile(config_file):
        return {}
    config = read_json(config_file, "put it back, or train with another --run")
    if not {"pools", "data"} <= config.keys() or not isinstance(config.get("args", {}), dict):
        raise ValueError(f"{config_file} is not what train.py wrote: put it back, or train with another --run")
    # The hash of the pools and not of manifest.json: the same pools prepared in another folder are the same data.
    if config["pools"] != data.identity:
        raise ValueError(f"run {folder} was trained on {config['data']} (pools {config['pools']}), but {data.folder} "
                         f"has pools {data.identity}: evaluate on the data of the run, or train with another --run")
    return config


def adapter_file(run):
    return os.path.join(run, "adapter", "adapter_model.safetensors")


def read_truth(data):
    """True boxes of a split, for queries that have one: {query row: {"box": 4 floats, "kind": str, ...}}, or None.

    Boxes are original-image pixels. This function is the only reader of truth.jsonl in the project: a policy, a
    stand-in or a training run that opened it would learn the answers. None means that the data has no such file.
    """
    path = os.path.join(data.root, "truth.jsonl")
    if not os.path.isfile(path):
        return None
    rows, truth = {}, {}
    for i, query in enumerate(data.queries):  # several questions may be asked about one image
        rows.setdefault(query.image, []).append(i)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            fact = read_fact(line, f"{path}:{number}")
            for i in rows.get(fact["image"], ()):
                truth[i] = {**fact, "box": tuple(fact["box"])}
    return truth


def read_fact(line, where):
    """A line of truth.jsonl -> dict. ValueError naming `where` unless it has image, kind and a box with an area."""
    try:
        fact = json.loads(line)
        x1, y1, x2, y2 = fact["box"]
        if x1 < x2 and y1 < y2 and np.isfinite(fact["box"]).all() and {"image", "kind"} <= fact.keys():
            return fact
    except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, no UTF-8, no dict, no list, other than four
        pass
    raise ValueError(f"{where}: needs image, kind and a box of 4 numbers; draw the world again")


def choose_methods(wanted, truth, second=None):
    """Methods to run, in the order of the tables. ValueError when the oracle is asked for and no truth is known."""
    if truth is None and "oracle" in (wanted or ()):
        raise ValueError("method oracle needs truth.jsonl beside the raw data, and there is none: leave it out")
    known = [name for name in METHODS if name != "oracle" or truth is not None]
    # The full image is always there: every other row is compared with it, query by query.
    chosen = [name for name in known if wanted is None or name == "full" or name in wanted]
    if second:  # beside the other base model, as in Table 1
        at = sum(name in ("full", "random", "center", "zeroshot", "zeroshot_always") for name in chosen)
        chosen.insert(at, "zeroshot2")
    return chosen


class Images:
    """Query images of a split. One that cannot be read is None, and is remembered: its row must not shift the others.

    prepare.py has read every one of them, so what is unreadable now was moved or damaged since.
    """

    def __init__(self, data):
        self.data, self.unreadable = data, {}  # {query row: what is wrong}

    def open(self, i):
        """Query i's image as PIL RGB, or None."""
        return self._try(i, lambda: self.data.open_image(i))

    def size(self, i):
        """(w, h) of query i's image in pixels, from the file's header alone, or None."""
        return self._try(i, lambda: image_size(self.data.image_path(i)))

    def _try(self, i, read):
        if i in self.unreadable:  # once unreadable, always: all methods must treat the row alike
            return None
        try:
            return read()
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            self.unreadable[i] = str(error)
            return None


class Progress:
    """Answers of models by name and query row, in a file as they come: a killed evaluation goes on where it stopped.

    A line is {"name", "row", "value"}; the first one is the key, and a file with another key is begun anew: its
    answers came from other weights, pools or ways of decoding. Without a path nothing is kept beyond this object.
    """

    def __init__(self, path=None, key=None):
        self.path, self.values = path, {}
        lines = [json.dumps({"key": key}, sort_keys=True) + "\n"]
        if path and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                # A line without its end is one that the kill cut short.
                found = [line for line in file if line.endswith("\n")]
            if found[:1] == lines:
                lines = found
            else:
                print(f"note: {path} is of another adapter, policy or way of decoding, and is begun anew")
        for number, line in enumerate(lines[1:], 2):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise Refused(f"{path}:{number}: not JSON ({error}); remove the file, and its answers are asked for "
                              "again") from error
            self.values[entry["name"], entry["row"]] = entry["value"]
        if path:
            with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(lines)

    def add(self, name, values):
        """values: {query row: anything JSON can hold}. On disk when this returns."""
        self.values |= {(name, row): value for row, value in values.items()}
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"name": name, "row": row, "value": value}) + "\n"
                                for row, value in values.items())

    def missing(self, name, rows):
        return [row for row in rows if (name, row) not in self.values]

    def get(self, name, row):
        return self.values.get((name, row))

    def finish(self):
        if self.path:
            os.remove(self.path)


# ----------------------------------------------------------------------------------------- methods: query -> action

def greedy(forced, threshold=0.5):
    """The action a policy takes by itself, from the action it took when REGION was forced on it."""
    # Greedy decoding takes the likelier decision, and after REGION the forced digits are the ones it would write.
    return forced if forced.p_region > threshold else Action("FULL", None, forced.p_region, '{"Decision": "FULL"}')


def pass_of(name, decode):
    """The decoding pass that a method's actions come from: "learned forced", "base choose" ..."""
    weights, mode = ASKS[name]
    # Free text has no exact p(REGION | x), so there a decision is a pass of its own.
    return f"{weights} {'forced' if decode == 'grammar' else mode}"


def decode_actions(policy, data, names, decode="grammar", batch_size=64, threshold=0.5, progress=None, images=None):
    """Actions of the methods that ask a model: {name: [Q] Action} for names out of ASKS, all of one `policy`.

    progress: answers that are known already are not asked for, new ones are added; each is an action and its seconds.
    threshold is for the learned policy; a base model is a baseline and stays as it is. A query whose image cannot be
    read gets FULL.
    """
    progress, images = progress or Progress(), images or Images(data)
    passes = sorted({pass_of(name, decode) for name in names})
    every = range(len(data.queries))
    todo = sorted({i for name in passes for i in progress.missing(name, every)})
    for start in tqdm(range(0, len(todo), batch_size), desc="decide", unit="batch", disable=None):
        opened = {i: images.open(i) for i in todo[start:start + batch_size]}  # opened once for both models
        rows = [i for i, image in opened.items() if image is not None]
        for name in passes if rows else ():
            begin = time.perf_counter()
            with policy.adapter(not name.startswith("base")):
                found = policy.act([opened[i] for i in rows], [data.queries[i].question for i in rows], decode=decode,
                                   force="REGION" if name.endswith("forced") else None, batch_size=batch_size)
            seconds = (time.perf_counter() - begin) / len(rows)
            progress.add(name, {i: [a.decision, a.box, a.p_region, a.text, seconds] for i, a in zip(rows, found)})
    actions = {}
    for name in names:
        # Under the grammar REGION was forced, so the decision is still to be read.
        decide, least = decode == "grammar" and ASKS[name][1] == "choose", threshold if name == "policy" else 0.5
        actions[name] = [read_action(progress.get(pass_of(name, decode), i), decide, least) for i in every]
    return actions


def read_action(value, decide, threshold):
    """Action from what `progress` holds; None, an unreadable image, is FULL. decide: was REGION forced on it?"""
    if value is None:
        return FULL_IMAGE
    decision, box, p_region, text, _ = value
    action = Action(decision, box and tuple(box), p_region, text)
    return greedy(action, threshold) if decide else action


def best_boxes(policy, data, actions, count, seed, batch_size, progress, images):
    """`actions` with each box replaced by the likeliest of `count` sampled ones, by the policy's own probability.

    Only queries that the policy crops are sampled: the decision is known exactly and needs no samples.
    """
    name = f"best{count} seed{seed}"
    crops = [i for i, action in enumerate(actions) if action.decision == "REGION"]
    todo, step = progress.missing(name, crops), max(1, batch_size // count)  # a query is `count` rows of a batch
    for start in tqdm(range(0, len(todo), step), desc="sample", unit="batch", disable=None):
        opened = {i: images.open(i) for i in todo[start:start + step]}
        rows = [i for i, image in opened.items() if image is not None]
        if not rows:
            continue
        begin = time.perf_counter()
        prompts = policy.prompts([opened[i] for i in rows], [data.queries[i].question for i in rows])
        # Seeded by row, so neither --limit nor a restart changes what is drawn.
        groups = policy.rollout(prompts, [["REGION"] * count] * len(rows), "grammar", sample=True,
                                seeds=[(seed, i) for i in rows])
        seconds = (time.perf_counter() - begin) / len(rows)
        # The decision's log-probability is in every sum, the same for all: the order is the box's alone.
        best = [max(group, key=lambda completion: sum(completion.log_probs)).action for group in groups]
        progress.add(name, {i: [a.decision, a.box, a.p_region, a.text, seconds] for i, a in zip(rows, best)})
    # `progress` may hold samples for a query that is FULL here: of a run that was killed at a lower threshold.
    return [read_action(progress.get(name, i), False, None) if action.decision == "REGION" and progress.get(name, i)
            else action for i, action in enumerate(actions)]


def center_box(size, fraction):
    """Box of `fraction` of each side in the middle of an image of size (w, h), in its pixels."""
    w, h = size
    return (w * (1 - fraction) / 2, h * (1 - fraction) / 2, w * (1 + fraction) / 2, h * (1 + fraction) / 2)


def random_boxes(sizes, shapes, seed):
    """One box a query: its shape drawn from `shapes`, its place uniform among the places where it fits (Sec. 4.2).

    sizes: [Q] (w, h) of the images in pixels, None for one that cannot be read (its box is None). shapes: list of
    (w, h) as shares of the image's sides. Drawing width and height together keeps the policy's areas and its aspects;
    drawing the area alone would invent an aspect.
    """
    boxes = []
    for row, size in enumerate(sizes):
        if size is None:
            boxes.append(None)
            continue
        width, height = size
        rng = np.random.default_rng([seed, row])  # by row: --limit does not change the boxes that stay
        share_w, share_h = shapes[rng.integers(len(shapes))]
        w, h = share_w * width, share_h * height
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        boxes.append((float(left), float(top), float(left + w), float(top + h)))
    return boxes


def box_shapes(actions, sizes):
    """(w, h) of every REGION action's box, as shares of its image's sides."""
    return [((a.box[2] - a.box[0]) / size[0], (a.box[3] - a.box[1]) / size[1])
            for a, size in zip(actions, sizes) if a.decision == "REGION" and size]


def model_actions(methods, data, policies, args, progress, images):
    """{method: [Q] Action} of the methods that ask a model. policies: see open_all; each is dropped after its use."""
    asked = [name for name in methods if name in ASKS and name != "zeroshot2"]
    if "random" in methods:  # needs the learned policy's boxes even where its row is not asked for
        asked += [name for name in ("policy", "always") if name not in asked]
    how = {"decode": args.decode, "batch_size": args.batch_size, "progress": progress, "images": images}
    actions = {}
    if asked:
        policy = policies.pop("first")()
        actions |= decode_actions(policy, data, asked, threshold=args.threshold, **how)
        if args.samples:
            actions[f"policy+best{args.samples}"] = best_boxes(policy, data, actions["policy"], args.samples, args.seed,
                                                               args.batch_size, progress, images)
        del policy  # before the second comes: two of them and the scorer need not fit together
    if "zeroshot2" in methods:
        actions |= decode_actions(policies.pop("second")(), data, ["zeroshot2"], **how)
    if args.fuse is not None:
        actions["policy+fuse"] = actions["policy"]
    return actions


def all_actions(methods, data, policies, truth, args, progress, images):
    """{method: [Q] Action} for every method but oracle, which takes the better of `full` and `truth` afterwards."""
    actions = {"full": [FULL_IMAGE] * len(data.queries)}
    actions |= model_actions(methods, data, policies, args, progress, images)
    sizes = [images.size(i) for i in range(len(data.queries))]
    if "center" in methods:
        actions["center"] = [region(size and center_box(size, args.center_fraction)) for size in sizes]
    if "random" in methods:
        shapes = box_shapes(actions["policy"], sizes)
        if not shapes:  # a policy that gave up cropping: its forced boxes are the nearest thing to its distribution
            print("note: the policy crops no query, so `random` takes its shapes from the forced boxes of `always`")
            shapes = box_shapes(actions["always"], sizes)
        if not shapes:
            raise Refused("the policy wrote no readable box at all, so `random` has no shapes to draw: leave it out")
        actions["random"] = [region(box) for box in random_boxes(sizes, shapes, args.seed)]
    if "oracle" in methods:
        actions["truth"] = [region(truth[i]["box"] if i in truth else None) for i in range(len(data.queries))]
    return actions


def region(box):
    """REGION with this box, by no model; FULL where there is no box."""
    return Action("REGION", box, None, "") if box else FULL_IMAGE


# ------------------------------------------------------------------------------------------- one code path: -> scores

def score_actions(data, scorer, actions, batch_size=64, images=None, fused=None, spent=None):
    """Scores of every method's views: {method: float32 [Q, K]}, in pool order (Eq. 1, 2, 4).

    FULL and MALFORMED take the stored full-image feature and encode nothing: text that cannot be read leaves the query
    as it was, and so does an image. Each image is opened once and each different box encoded once, however many
    methods chose it. fused: {method: w}, whose crop features are mixed with the full image's as (1 - w) full + w crop.
    spent: a dict that gets the seconds of each view, {(query row, box): cropping and encoding, shared by the batch}.
    """
    images, found = images or Images(data), {name: [] for name in actions}
    for start in tqdm(range(0, len(data.queries), batch_size), desc="score", unit="batch", disable=None):
        rows = range(start, min(start + batch_size, len(data.queries)))
        features, seconds = encode_views(scorer, [(i, listed[i].box) for i in rows for listed in actions.values()
                                                  if listed[i].decision == "REGION"], images)
        if spent is not None:
            spent |= dict.fromkeys(features, seconds)
        for i in rows:
            full, candidates = np.asarray(data.full[i], dtype=np.float32), data.candidates(i)  # [D], [K, D]
            seen = []
            for name, listed in actions.items():
                view = features.get((i, listed[i].box), full)
                if view is not full and name in (fused or {}):  # of length 1 first: w is the share that the crop has
                    view = (1 - fused[name]) * normalise(full) + fused[name] * normalise(view)
                seen.append(view)
            for name, row in zip(actions, scores(np.stack(seen), candidates)):  # Eq. 2, 4: [methods, K]
                found[name].append(row)
    return {name: np.stack(rows) for name, rows in found.items()}  # [Q, K]


def encode_views(scorer, views, images):
    """Features of views (query row, box), repeats dropped -> ({view: [D]}, seconds a view).

    Views of images that cannot be read are left out.
    """
    begin, crops, readable = time.perf_counter(), [], []
    # In the order of the rows, so that each image is opened once; a dict drops the repeats and keeps the order.
    for i, group in groupby(dict.fromkeys(views), key=itemgetter(0)):
        image = images.open(i)
        for view in group if image else ():
            crops.append(crop(image, view[1]))  # Eq. 1
            readable.append(view)
    features = dict(zip(readable, scorer.image_features(crops)))
    return features, (time.perf_counter() - begin) / max(1, len(readable))


def oracle_of(full, truth, actions, labels):
    """Actions and scores [Q, K] of the better of full image and true box: by rank, then by margin."""
    f, t = metrics(full, labels), metrics(truth, labels)
    # A NaN margin (no positive or no negative in the pool) compares false: the full image stays.
    better = (t["rank"] < f["rank"]) | ((t["rank"] == f["rank"]) & (t["margin"] > f["margin"]))  # [Q]
    chosen = [actions["truth"][i] if better[i] else FULL_IMAGE for i in range(len(better))]
    return chosen, np.where(better[:, None], truth, full)  # [Q, K]


class OtherScorer:
    """The same pools as another scorer sees them (Table 6); stands in for Data in score_actions.

    Query images, candidate images and texts are encoded anew, nothing is retrieved anew. full: {query row: [D]}.
    """

    def __init__(self, data, scorer, images, batch_size):
        self.queries, self.dim = data.queries, scorer.dim
        pictures = sorted({m for query in self.queries for m in query.pool_image})
        entities = sorted({j for query in self.queries for j in query.pool})
        # A row of zeros is prepare.py's mark for an entity without text (Eq. 3): it has none for this scorer either.
        entities = [j for j in entities if data.kb_text[j].any()]
        rows = [i for i in range(len(self.queries)) if i not in images.unreadable]

        def encode(keys, load, features, what):
            found = {}
            for start in tqdm(range(0, len(keys), batch_size), desc=what, unit="batch", disable=None):
                part = keys[start:start + batch_size]
                found |= dict(zip(part, features([load(key) for key in part])))
            return found

        self.pictures = encode(pictures, lambda m: read_image(data.candidate_image_path(m)), scorer.image_features,
                               "candidates")
        self.texts = encode(entities, lambda j: data.entity(j)["text"], scorer.text_features, "texts")
        # An image that cannot be read has no feature by this scorer: any vector will do, rescore overwrites its scores.
        self.full = dict.fromkeys(range(len(self.queries)), np.ones(self.dim, np.float32))
        self.full |= encode(rows, data.open_image, scorer.image_features, "queries")

    def candidates(self, i):
        """Candidate vectors of query i by Eq. 3: float32 [K, D]."""
        query, none = self.queries[i], np.zeros(self.dim, np.float32)
        return fuse(np.stack([self.pictures[m] for m in query.pool_image]),
                    np.stack([self.texts.get(j, none) for j in query.pool]))


def rescore(data, scorer, actions, images, batch_size):
    """Scores [Q, K] by another scorer of the same views of the same pools: {method: [Q, K]} (Table 6)."""
    found = score_actions(OtherScorer(data, scorer, images, batch_size), scorer, actions, batch_size, images)
    for listed in found.values():
        for i in images.unreadable:
            listed[i] = -np.arange(listed.shape[1])  # nothing was seen: the pool's order stays
    return found


def slug(identity):
    """A scorer's identity as a part of a file name: "open_clip:ViT-B-32/openai@ab12" -> "open_clip-ViT-B-32-openai"."""
    return re.sub(r"[^\w.-]+", "-", identity.rpartition("@")[0] or identity).strip("-")


# ---------------------------------------------------------------------------------- re-rankings by other programs

def read_run(path):
    """A re-ranking by another program -> ("trec" | "echosight" | "omgm", {query id: [entity ids, best first]}).

    TREC run: `query Q0 entity rank score tag`, by score, equal scores by rank. EchoSight: {query: {"reranked_entries"
    or "retrieved_entries": [url ...]}}. OMGM: {query: {"retrieved_entities": [{"url"} ...]}}. ValueError naming file
    and line or query.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    if not text.lstrip().startswith("{"):
        return "trec", read_trec(path, io.StringIO(text))
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not whole JSON ({error}); copy the file again") from error
    ranked, kinds = {}, set()
    for query, entry in content.items():
        keys = entry.keys() if isinstance(entry, dict) else ()
        if "retrieved_entities" in keys:
            kinds.add("omgm")
            listed = entry["retrieved_entities"]
            ranked[query] = [entity.get("url") if isinstance(entity, dict) else None for entity in listed] \
                if isinstance(listed, list) else None
        elif {"reranked_entries", "retrieved_entries"} & keys:
            kinds.add("echosight")
            ranked[query] = entry.get("reranked_entries") or entry.get("retrieved_entries")
        else:
            raise ValueError(f"{path}: query {query!r} has none of reranked_entries, retrieved_entries (EchoSight) and "
                             "retrieved_entities (OMGM): this is another file of theirs")
        if not isinstance(ranked[query], list) or not all(isinstance(url, str) for url in ranked[query]):
            raise ValueError(f"{path}: query {query!r}: its entities must be a list of urls (of objects with a \"url\" "
                             "in OMGM's form)")
    return " and ".join(sorted(kinds)), ranked


def read_trec(path, file):
    """Lines of a TREC run -> {query id: [entity ids, best first]}."""
    found = {}
    for number, line in enumerate(file, 1):
        parts = line.split()
        if not parts:
            continue
        try:
            query, _, entity, rank, score, _ = parts
            if np.isnan(float(score)):
                raise ValueError("sorted by NaN, entities come out in any order")
            found.setdefault(query, []).append((-float(score), int(rank), entity))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected `query Q0 entity rank score tag`, found {line.strip()!r}; "
                             "blanks in an id are written %20") from error
    # Python's sort is by score, then by rank: trec_eval's tie-break by name would shuffle what the program meant.
    return {query: [entity for _, _, entity in sorted(listed)] for query, listed in found.items()}


def match_run(data, ranked, path):
    """Another program's ranking on our pools -> (scores float32 [Q, K], what did not match, counted).

    A score is K minus the place among the pool's candidates. Candidates that the program did not rank come last with
    equal scores, that is in pool order; entities outside the pool are passed over; a query that the file lacks keeps
    the pool's order. Ids match verbatim or as write_trec quotes them; E-VQA_<i> of prior work is our E-VQA_<split>_<i>.
    """
    found, used = [], set()
    counts = dict.fromkeys(("queries_missing", "candidates_missing", "outside_pool"), 0)
    for query in data.queries:
        k = len(query.pool)
        names = (query.query_id, quote(query.query_id), query.query_id.replace(f"_{data.split}_", "_", 1))
        name = next((name for name in names if name in ranked), None)
        place = {}
        for at, j in enumerate(query.pool):
            entity = data.entity(j)["entity_id"]
            place |= {entity: at, quoted(entity): at}
        listed = list(dict.fromkeys(ranked[name])) if name is not None else []
        order = list(dict.fromkeys(place[entity] for entity in listed if entity in place))
        counts["queries_missing"] += name is None
        counts["candidates_missing"] += k - len(order) if name is not None else 0
        counts["outside_pool"] += sum(entity not in place for entity in listed)
        used.add(name)
        row = np.zeros(k, np.float32)
        row[order] = k - np.arange(len(order))
        found.append(row)
    if counts["queries_missing"] == len(data.queries):
        raise ValueError(f"{path}: none of its {len(ranked)} queries ({next(iter(ranked), '-')!r} ...) is in the "
                         f"split, whose ids are like {data.queries[0].query_id!r}")
    return np.stack(found), {"queries": len(data.queries) - counts["queries_missing"], **counts,
                             "queries_unknown": len(ranked.keys() - used)}


# --------------------------------------------------------------------------------- Table 7: is it the right region?

KEYWORD_AFTER = re.compile(r"\b(?:this|these|that|those)\s+((?:[^\W\d_]|-)+)", re.IGNORECASE)
NO_KEYWORD = frozenset("""a an the of in on at to for from by with and or is are was were be been does do did has have
    had can could will would what which who whose whom where when why how many much long old it its he she they his her
    their this that these those there""".split())


def keyword(question):
    """The noun that a question asks about: the word after this/these, else its last word that can be one; or None.

    "Where does this beetle live?" -> "beetle". The paper extracts "the most important keyword" and does not say how
    (Sec. 4.4); the questions of both benchmarks name the target's category after `this`.
    """
    if found := KEYWORD_AFTER.search(question):
        return found.group(1).lower()
    words = [word for word in re.findall(r"[^\W\d_]+", question.lower()) if word not in NO_KEYWORD]
    return words[-1] if words else None


def load_detector(name, device):
    """GroundingDINO by Hugging Face id or folder -> function(image, word) -> best box in image pixels, or None."""
    # Imported here: no other table needs a detector.
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(name).to(device).eval()

    @torch.inference_mode()
    def detect(image, word):
        # Phrases in lower case, each ended by a full stop, is how GroundingDINO was trained.
        inputs = processor(images=image, text=f"{word}.", return_tensors="pt").to(device)
        # Boxes below the processor's own threshold of confidence are none.
        found = processor.post_process_grounded_object_detection(model(**inputs), inputs["input_ids"],
                                                                 target_sizes=[(image.height, image.width)])[0]
        if len(found["scores"]) == 0:
            return None
        x1, y1, x2, y2 = found["boxes"][found["scores"].argmax()].tolist()
        box = (max(0., x1), max(0., y1), min(float(image.width), x2), min(float(image.height), y2))
        return box if box[0] < box[2] and box[1] < box[3] else None
    return detect


def proxy_targets(data, actions, detect, progress, images, name):
    """Target boxes by a detector for the queries that a policy crops -> ({query row: box}, {why there is none: n})."""
    listed = [actions[method] for method in ("policy", "zeroshot", "zeroshot2") if method in actions]
    rows = [i for i in range(len(data.queries)) if any(chosen[i].decision == "REGION" for chosen in listed)]
    without, targets = {"no keyword": 0, "nothing detected": 0, "image unreadable": 0}, {}
    for i in tqdm(rows, desc="detect", unit="query", disable=None):
        word, image = keyword(data.queries[i].question), None
        if word and progress.missing(name, [i]) and (image := images.open(i)):
            progress.add(name, {i: detect(image, word)})
        if box := progress.get(name, i):
            targets[i] = tuple(box)
        else:
            reason = "no keyword" if not word else "image unreadable" if i in images.unreadable else "nothing detected"
            without[reason] += 1
    return targets, without


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) of one frame, right and bottom exclusive."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def contains(box, target):
    """1.0 if the crop shows the whole target, else 0.0: the paper's containment rate is the mean of it."""
    # The crop takes whole pixels, rounded outward (scorer.crop), so that is what contains.
    x1, y1, x2, y2 = np.floor(box[0]), np.floor(box[1]), np.ceil(box[2]), np.ceil(box[3])
    return float(x1 <= target[0] and y1 <= target[1] and target[2] <= x2 and target[3] <= y2)


def data_url(image):
    """PIL image as a data: URL (JPEG), the form in which OpenAI-compatible endpoints take pictures."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def ask_judge(url, model, key, image, question, patience=(1, 5, 20)):
    """Does the picture hold what is needed to answer the question? -> True, False, or None for another answer.

    patience: seconds to wait before each new try where the server is busy or silent. Refused, with the server's own
    words, when it refuses the request or stays silent.
    """
    text = ("The picture is a crop of a larger one. Question about it: " + question + "\nDoes the crop show enough to "
            "answer the question, given access to an encyclopaedia? Answer with one word, YES or NO.")
    # Neither temperature nor a token limit: servers differ in which of them they take, and one word needs none.
    body = {"model": model, "messages": [{"role": "user", "content": [
        {"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_url(image)}}]}]}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    address = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for wait in (*patience, None):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"] or ""
            if not isinstance(said, str):
                raise TypeError(f"the answer's content is a {type(said).__name__}, not a text")
            words = re.findall(r"\b(yes|no)\b", said.lower())
            return words[0] == "yes" if words and len(set(words)) == 1 else None
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}: {error.read(300).decode('utf-8', 'replace')}"
            if error.code < 500 and error.code not in (408, 429):  # a wrong key or model gets no better by waiting
                break
        # URLError is an OSError; HTTPException, of an answer that breaks off, is none.
        except (OSError, http.client.HTTPException, KeyError, IndexError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if wait is not None:
            time.sleep(wait)
    raise Refused(f"--judge {url}: {problem}")


def judge_crops(data, actions, args, progress, images):
    """YES/NO by a judge for the policy's crops -> ({query row: bool or None}, counts) (Table 7, lower half)."""
    name, key = f"judge {args.judge} {args.judge_model}", os.environ.get(args.judge_key_env, "")
    rows = [i for i, action in enumerate(actions) if action.decision == "REGION" and i not in images.unreadable]
    if args.judge_limit and len(rows) > args.judge_limit:  # evenly spaced: a split may be sorted
        rows = [rows[k * len(rows) // args.judge_limit] for k in range(args.judge_limit)]
    for i in tqdm(progress.missing(name, rows), desc="judge", unit="crop", disable=None):
        if image := images.open(i):
            progress.add(name, {i: ask_judge(args.judge, args.judge_model, key, crop(image, actions[i].box),
                                             data.queries[i].question)})
    verdicts = {i: progress.get(name, i) for i in rows if i not in images.unreadable}
    clear = [verdict for verdict in verdicts.values() if verdict is not None]
    return verdicts, {"model": args.judge_model, "n": len(verdicts), "yes": sum(clear), "unclear":
                      len(verdicts) - len(clear), "rate": sum(clear) / len(verdicts) if verdicts else None}


# ------------------------------------------------------------------------------------ Table 8: the retrieval stage

def nearest_entities(index, kb_entity, queries, k):
    """The k distinct entities nearest to each query [Q, D] -> (entities [Q, k], cosines [Q, k]), best first.

    One search goes as deep as an entity has images at most, so that k entities are found even if the first has all.
    """
    k = min(k, len(np.unique(kb_entity)))
    depth = min(index.ntotal, k * int(np.bincount(kb_entity).max()))
    # at() gives a plain Index, which has no .hnsw whatever it is.
    parts = ([faiss.downcast_index(index.at(n)) for n in range(index.count())]
             if isinstance(index, faiss.IndexShards) else [index])
    for part in parts:
        if hasattr(part, "hnsw"):  # as wide as prepare.py searched it; the file holds faiss's narrow default
            part.hnsw.efSearch = max(256, 2 * depth)
    entities, cosines = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.float32)
    for start in range(0, len(queries), 256):
        found, rows = index.search(normalise(queries[start:start + 256]), depth)  # [256, depth]
        for i, (cosine, row) in enumerate(zip(found, rows), start):
            order = np.lexsort((row, -cosine))  # faiss leaves the order of equal cosines open
            order = order[row[order] >= 0]  # -1: an approximate index found no more
            entity = kb_entity[row[order]]
            first = np.sort(np.unique(entity, return_index=True)[1])[:k]  # the best image of each entity
            if len(first) < k:
                raise Refused(f"the index finds {len(first)} entities for a query, {k} are needed: is it approximate, "
                              "with too few probes?")
            entities[i], cosines[i] = entity[first], cosine[order][first]
    return entities, cosines


def open_index(files):
    """faiss index over the rows of kb_image.npy. files: data.index_files."""
    parts = [faiss.read_index(path) for path in files]
    if len(parts) == 1:
        return parts[0]
    index = faiss.IndexShards(parts[0].d, False, True)  # one after the other, numbered on from one part to the next
    for part in parts:
        index.add_shard(part)
    return index


def retrieval_stage(data, scorer, actions, batch_size, images):
    """Retrieve over the whole knowledge base with the full image and with the policy's view (Table 8, App. C).

    -> {"full" | "policy": (labels [Q, K], cosines [Q, K])} of the K = 20 nearest entities.
    """
    index = open_index(data.index_files)
    full = np.array(data.full[:len(data.queries)], np.float32)  # [Q, D]
    cropped = full.copy()
    for start in tqdm(range(0, len(full), batch_size), desc="retrieve", unit="batch", disable=None):
        rows = range(start, min(start + batch_size, len(full)))
        views = [(i, actions[i].box) for i in rows if actions[i].decision == "REGION"]
        for (i, _), feature in encode_views(scorer, views, images)[0].items():
            cropped[i] = feature
    found, ids = {}, {}
    for name, queries in (("full", full), ("policy", cropped)):
        entities, cosines = nearest_entities(index, data.kb_entity, queries, 20)  # [Q, K]
        ids |= {j: data.entity(j)["entity_id"] for j in np.unique(entities).tolist() if j not in ids}
        labels = np.array([[int(ids[j] in query.positives) for j in listed]
                           for query, listed in zip(data.queries, entities.tolist())])
        found[name] = labels, cosines
    return found


# ------------------------------------------------------------------------------------------------- -> rows -> numbers

def make_rows(data, actions, method_scores, full_scores, seconds=None, targets=None, kinds=None, verdicts=None,
              unreadable=(), action_free=False):
    """What one method did and what it led to: [Q] dicts with ROW_FIELDS, as they stand in <split>.<method>.jsonl.

    targets {query row: box}, kinds {query row: str}, verdicts {query row: bool or None}: where they are known. seconds:
    [Q] or None. action_free: a ranking by another program, whose scores are places, so that a margin means nothing.
    """
    labels = np.array([query.labels for query in data.queries])  # [Q, K]
    after, before = metrics(method_scores, labels, ks=()), metrics(full_scores, labels, ks=())
    targets, kinds, verdicts, rows = targets or {}, kinds or {}, verdicts or {}, []
    for i, (query, action) in enumerate(zip(data.queries, actions)):
        aimed = action.decision == "REGION" and i in targets
        margins = [None if np.isnan(m[i]) else float(f"{m[i]:.9g}") for m in (after["margin"], before["margin"])]
        rows.append(dict(zip(ROW_FIELDS, (
            query.query_id, query.question, query.image, kinds.get(i), query.positives, action.decision,
            action.box and list(action.box), action.p_region, action.text,
            # 9 digits give every float32 back: what is computed from the file is what is computed from here.
            [float(f"{s:.9g}") for s in method_scores[i]], query.labels, int(after["rank"][i]),
            int(before["rank"][i]), None if action_free else margins[0], margins[1],
            iou(action.box, targets[i]) if aimed else None, contains(action.box, targets[i]) if aimed else None,
            verdicts.get(i) if action.decision == "REGION" else None, seconds[i] if seconds else None,
            int(action.decision == "REGION"), i in unreadable), strict=True)))
    return rows


def array(rows, name):
    """A field of all rows as an array [Q] or [Q, K]; None becomes NaN where the rest are numbers."""
    return np.array([row[name] for row in rows], dtype=np.float64 if name in ("p_region", "seconds") else None)


def behaviour(rows, has_positive):
    """Table 4: {"rank=1": {...}, "rank>1": {...}}, split by the full image's rank, over queries with a positive.

    n queries; crop_rate; help, hurt, no_change: shares of the n whose rank got better, worse, or stayed.
    """
    rank, full_rank = array(rows, "rank"), array(rows, "full_rank")
    facts = {"crop_rate": cropped(rows), "help": rank < full_rank, "hurt": rank > full_rank,
             "no_change": rank == full_rank}  # [Q] each
    groups = {"rank=1": has_positive & (full_rank == 1), "rank>1": has_positive & (full_rank > 1)}
    return {name: {"n": int(group.sum()), **shares(facts, group)} for name, group in groups.items()}


def cropped(rows):
    return np.array([row["decision"] == "REGION" for row in rows])  # [Q]


def shares(facts, rows):
    """Mean of each array [Q] over `rows` (a mask or indices): a float, or None where there are no rows."""
    return {name: float(fact[rows].mean()) if fact[rows].size else None for name, fact in facts.items()}


def mean(values):
    """Mean of the values that are known; None where there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def numbers(rows):
    """Every number of one method: means (Tables 1, 2), decisions, Table 4, IoU, and the same by kind where known."""
    per_query = metrics(array(rows, "scores"), array(rows, "labels"))
    result = {**summary(per_query), "crop_rate": float(cropped(rows).mean()),
              "malformed": sum(row["decision"] == "MALFORMED" for row in rows),
              "table4": behaviour(rows, per_query["has_positive"]), "mean_iou": mean(row["iou"] for row in rows)}
    kinds = sorted({row["kind"] for row in rows} - {None})
    rank, full_rank = array(rows, "rank"), array(rows, "full_rank")
    facts = {"CondR@1": per_query["recall@1"], "crop_rate": cropped(rows), "help": rank < full_rank,
             "hurt": rank > full_rank}  # [Q] each
    if kinds:
        result["kinds"] = {}
    for kind in kinds:
        of_kind = [i for i, row in enumerate(rows) if row["kind"] == kind]
        held = [i for i in of_kind if per_query["has_positive"][i]]
        result["kinds"][kind] = {"n": len(held), **shares(facts, held),
                                 "mean_iou": mean(rows[i]["iou"] for i in of_kind)}
    return result


def gap_closed(table):
    """(policy - full) / (oracle - full) in CondR@1, or None where a row is missing or there is no gap."""
    if not {"full", "policy", "oracle"} <= table.keys() or table["full"]["CondR@1"] is None:
        return None
    full, policy, oracle = (table[name]["CondR@1"] for name in ("full", "policy", "oracle"))
    return (policy - full) / (oracle - full) if oracle > full else None


def operating_curve(full, always):
    """MRR and CondR@1 against crop rate, for every threshold on p(REGION | x): a list of points, or None without p.

    full, always: rows of the full image and of the forced boxes. At a threshold t a query is cropped where p > t, so
    no model is asked again. Thresholds: 0, 0.5 and 39 quantiles of p, rising; the last one crops nothing.
    """
    p = np.where(cropped(always), array(always, "p_region"), np.nan)  # [Q] NaN: nothing to crop to
    known = p[~np.isnan(p)]
    if not len(known):
        return None
    views = [metrics(array(rows, "scores"), array(rows, "labels"), ks=(1,)) for rows in (full, always)]
    held, points = views[0]["has_positive"], []
    for threshold in np.unique(np.concatenate([[0, .5], np.quantile(known, np.linspace(0, 1, 39))])):
        crops = p > threshold  # [Q] a NaN compares false
        rr, hit = (np.where(crops, views[1][name], views[0][name]) for name in ("rr", "recall@1"))
        points.append({"threshold": float(threshold), "crop_rate": float(crops.mean()), "MRR": float(rr.mean()),
                       "CondR@1": float(hit[held].mean()) if held.any() else None})
    return points


def curves(rows, table):
    """metrics.json's "curve": the policy's and the base model's operating curve and the oracle's point."""
    found = {}
    for name, forced in (("policy", "always"), ("zeroshot", "zeroshot_always")):
        points = operating_curve(rows["full"], rows[forced]) if {"full", forced} <= rows.keys() else None
        if points:
            found[name] = points
    if "oracle" in table:
        found["oracle"] = {name: table["oracle"][name] for name in ("crop_rate", "MRR", "CondR@1")}
    return found


def extra_costs(rows):
    """What policy+... costs more than policy, as means over all queries: {method: {extra_seconds, extra_encodes}}.

    Encodes are image encodes beside the full image's, which retrieval has made already; so --fuse needs no extra one.
    """
    costs = {}
    for name in (name for name in rows if name.startswith("policy+")):
        both = list(zip(rows[name], rows["policy"], strict=True))
        seconds = [a["seconds"] - b["seconds"] for a, b in both if None not in (a["seconds"], b["seconds"])]
        costs[name] = {"extra_seconds": mean(seconds), "extra_encodes": mean(a["encodes"] - b["encodes"]
                                                                            for a, b in both)}
    return costs


def region_quality(rows):
    """Table 7, upper half: {method: {n, iou, containment}} over its crops that have a target."""
    found = {}
    for name, listed in rows.items():
        aimed = [row for row in listed if row["iou"] is not None]
        if aimed:
            found[name] = {"n": len(aimed), "iou": mean(row["iou"] for row in aimed),
                           "containment": mean(row["containment"] for row in aimed)}
    return found


def tabulate(about, rows, rescored):
    """Rows -> the dict of metrics.json. rows: {method: [Q] rows}; rescored: {scorer slug: the same}.

    about: what the rows do not tell, such as the names of data, run and scorer. The row set `truth` always takes
    the true box; it is a part of the oracle and no method.
    """
    table = {name: numbers(listed) for name, listed in rows.items() if name != "truth"}
    some = next(iter(rows.values()))
    missing = [row["query_id"] for row in some if row["unreadable"]]
    result = {**about, "K": len(some[0]["labels"]), "queries": len(some),
              "with_positive": sum(any(row["labels"]) for row in some),
              "with_truth": sum(row["kind"] is not None for row in some),
              "unreadable": {"count": len(missing), "first": missing[:5]},
              "methods": table, "gap_closed": gap_closed(table), "curve": curves(rows, table),
              "region_quality": {**about["region_quality"], "methods": region_quality(rows)}}
    for name, costs in extra_costs(rows).items():
        result["extras"] = {**result.get("extras", {}), name: {**about.get("extras", {}).get(name, {}), **costs}}
    if rescored:
        result["test_scorers"] = {
            name: {**about.get("test_scorers", {}).get(name, {}), "methods": {
                method: numbers(listed) for method, listed in found.items()}} for name, found in rescored.items()}
    if "truth" in rows:
        result["truth_box"] = numbers(rows["truth"])
    return result


# ---------------------------------------------------------------------------------------------------- what is printed

def cell(value, width=8, digits=3, scale=1):
    return f"{'-' if value is None else format(value * scale, f'.{digits}f'):>{width}}"


def main_table(table):
    """Tables 1 and 2 beside each other, one row a method, and the paper's rows beneath."""
    lines = [f"{'':16}{'Table 1':^48} |{'Table 2':^28} |{'what it did':^26}",
             f"{'method':16}" + "".join(f"{c:>8}" for c in COLUMNS[:6]) + " |"
             + "".join(f"{c:>9}" for c in COLUMNS[6:]) + "  |" + f"{'crop %':>8}{'bad text':>9}{'IoU':>7}"]
    for name, row in table.items():
        percent = [cell(row[c], digits=1, scale=100) for c in COLUMNS[2:6]]  # recalls as the paper prints them
        lines.append(f"{name:16}{cell(row['MRR'])}{cell(row['NDCG'])}" + "".join(percent) + " |"
                     + "".join(cell(row[c], 9) for c in COLUMNS[6:]) + "  |" + cell(row["crop_rate"], 8, 1, 100)
                     + f"{row['malformed']:>9}" + cell(row["mean_iou"], 7, 2))
    for dataset, rows in PAPER.items():
        lines.append(f"the paper, {dataset} (other data, other models: for the shape of the table only)")
        for name, row in rows.items():
            lines.append(f"{name:16}" + "".join(cell(v, digits=2) for v in row[:2]) + "".join(
                cell(v, digits=1) for v in row[2:6]) + " |" + "".join(cell(v, 9, 2) for v in row[6:]) + "  |")
    return "\n".join(lines)


def behaviour_table(table):
    """Table 4, in per cent of the queries whose pool holds the positive."""
    chosen = {name: table[name]["table4"] for name in CROPPING if name in table}
    if not chosen:
        return ""
    sizes = next(iter(chosen.values()))
    columns = ("crop_rate", "help", "hurt", "no_change")
    lines = [f"{'Table 4':16}" + "".join(f"{f'original {g}, n = ' + str(sizes[g]['n']):^44}" for g in sizes),
             f"{'in %':16}" + "".join(f"{c.replace('_', ' '):>11}" for c in columns) * 2]
    for name, groups in chosen.items():
        lines.append(f"{name:16}" + "".join(cell(g[c], 11, 1, 100) for g in groups.values() for c in columns))
    return "\n".join(lines)


def scorer_table(result):
    """Table 6: recalls of the same crops by other scorers, the one that the policy learned from first."""
    if not result.get("test_scorers"):
        return ""
    sets = {result["scorer"]: result["methods"],
            **{found["scorer"]: found["methods"] for found in result["test_scorers"].values()}}
    columns = [c for c in COLUMNS if "@" in c and c != "R@20"]
    lines = [f"{'Table 6':44}" + "".join(f"{c:>9}" for c in columns)]
    for scorer, table in sets.items():
        lines += [f"{name:16}{scorer:28}" + "".join(cell(table[name][c], 9, 1, 100) if c[0] == "R" else
                                                    cell(table[name][c], 9) for c in columns)
                  for name in ("full", "zeroshot", "policy") if name in table]
    return "\n".join(lines)


def quality_table(result):
    """Table 7: overlap of the crops with their targets, and what a judge says of them."""
    quality, judge = result["region_quality"], result.get("judge")
    lines = [f"{name:16}{row['n']:>8}" + cell(row["iou"], 8, 2) + cell(row["containment"], 13, 2)
             for name, row in quality["methods"].items() if name in CROPPING or name.startswith("policy")]
    if lines:
        lines.insert(0, f"{'Table 7':16}{'crops':>8}{'IoU':>8}{'containment':>13}   target: {quality['target']}")
    if judge:
        lines.append(f"Table 7, judge {judge['model']}: YES for {cell(judge['rate'], 0, 2)} of {judge['n']} crops of "
                     f"the policy, {judge['unclear']} answers neither YES nor NO")
    return "\n".join(lines)


def retrieval_table(stage):
    """Table 8: recall in per cent when the view itself retrieves from the whole knowledge base."""
    if not stage:
        return ""
    columns = ("R@1", "R@5", "R@10", "R@20")
    return "\n".join([f"{'Table 8':16}" + "".join(f"{c:>8}" for c in columns)] + [
        f"{name:16}" + "".join(cell(stage[name][c], 8, 1, 100) for c in columns) for name in ("full", "policy")])


def kind_table(table, truth_box):
    """CondR@1, crop rate, IoU, help and hurt of each method by kind of query; `truth` always takes the true box."""
    rows = {**table, "truth": truth_box} if truth_box else table
    kinds = next(iter(rows.values())).get("kinds", {})
    if not kinds:
        return ""
    columns = ("CondR@1", "crop_rate", "mean_iou", "help", "hurt")
    lines = [f"{'by kind':16}" + "".join(f"{k + ', n = ' + str(v['n']):^46}" for k, v in kinds.items()),
             f"{'':16}" + "".join(f"{c:>9}" for c in ("CondR@1", "crop %", "IoU", "help %", "hurt %")) * len(kinds)]
    for name, row in rows.items():
        lines.append(f"{name:16}" + "".join(
            cell(k[c], 9, 3) if c == "CondR@1" else cell(k[c], 9, 2) if c == "mean_iou" else cell(k[c], 9, 1, 100)
            for k in row["kinds"].values() for c in columns))
    return "\n".join(lines)


def notes(result):
    """What a reader of the tables must know: gap closed, costs, what did not match or could not be read."""
    table, gap, lines = result["methods"], result["gap_closed"], []
    if gap is not None:
        full, policy, oracle = (table[name]["CondR@1"] for name in ("full", "policy", "oracle"))
        lines.append(f"gap closed in CondR@1: {gap:.0%} = (policy {policy:.3f} - full {full:.3f}) / "
                     f"(oracle {oracle:.3f} - full {full:.3f})")
    if "zeroshot2" in table:
        lines.append(f"zeroshot2 is {result['models']['zeroshot2']}")
    for name, costs in result.get("extras", {}).items():
        lines.append(f"{name} costs {cell(costs['extra_seconds'], 0, 4)} s and {costs['extra_encodes']:.2f} image "
                     "encodes a query more than policy")
    for name, counts in result.get("external", {}).items():
        lines.append(f"{name}: {counts['queries']} queries from {counts['file']} ({counts['format']}); not matched: " +
                     ", ".join(f"{key.replace('_', ' ')} {counts[key]}" for key in (
                         "queries_missing", "queries_unknown", "candidates_missing", "outside_pool")))
    if result["unreadable"]["count"]:
        lines.append(f"{result['unreadable']['count']} query images cannot be read and count as FULL: "
                     f"{', '.join(result['unreadable']['first'])} ...")
    return "\n".join(lines)


def report(result):
    """All tables as one text."""
    table = result["methods"]
    parts = [f"{result['split']} split of {result['data']}: {result['queries']} queries, {result['with_positive']} of "
             f"them with a positive among their K = {result['K']} candidates", main_table(table),
             behaviour_table(table), scorer_table(result), quality_table(result),
             retrieval_table(result.get("retrieval_stage")), kind_table(table, result.get("truth_box")), notes(result)]
    return "\n\n".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------- what is written

def write_rows(path, rows):
    """One JSON line a query: what was decided and what it led to. tools/report.py makes its tests from these."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path, fields=ROW_FIELDS):
    """Rows of one method, as write_rows wrote them. ValueError naming file and line for one that is not whole or lacks
    one of `fields`."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); run evaluate.py again") from error
            if missing := [name for name in fields if name not in row]:
                raise ValueError(f"{path}:{number}: no {', '.join(missing)}: rows of an older version; run evaluate.py "
                                 "again")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; run evaluate.py again")
    return rows


def write_csv(path, rows, full):
    """The per-query table of the authors' release, in its columns; ranks are empty where the pool has no positive."""
    after, before = (metrics(array(listed, "scores"), array(listed, "labels"), ks=()) for listed in (rows, full))
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("example_idx", "query_id", "question", "has_bbox", "bbox", "num_candidates", "original_rank",
                        "cropped_rank", "rank_improvement", "original_mrr", "cropped_mrr", "mrr_improvement",
                        "original_ndcg", "cropped_ndcg", "ndcg_improvement", "generated_text"))
        for i, row in enumerate(rows):
            held, ranks = before["has_positive"][i], (int(before["rank"][i]), int(after["rank"][i]))
            change = [float(v) for name in ("rr", "ndcg") for v in (before[name][i], after[name][i],
                                                                   after[name][i] - before[name][i])]
            table.writerow([i, row["query_id"], row["question"], row["box"] is not None, row["box"] or "",
                            len(row["labels"]), *(ranks if held else ("", "")), ranks[0] - ranks[1], *change,
                            row["text"]])


def trec_names(data):
    """{line of kb.jsonl: entity id without blanks} of every candidate: the TREC formats separate by blanks."""
    used = sorted({j for query in data.queries for j in query.pool})
    return {j: quoted(data.entity(j)["entity_id"]) for j in used}


def quoted(entity_id):
    return quote(entity_id, safe=":/?&=#%")


def write_trec(path, data, method_scores, names, tag):
    """A TREC run file: `query Q0 entity rank score tag`, as trec_eval, pytrec_eval and ranx read it."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for query, row in zip(data.queries, method_scores):
            last = np.float32(np.inf)
            for rank, k in enumerate(np.argsort(-row, kind="stable"), 1):
                # trec_eval ignores the rank column and breaks ties by name, we by pool order. One float32 step less
                # than the score above says the same in a way that it understands.
                last = min(np.float32(row[k]), np.nextafter(last, np.float32(-np.inf)))
                file.write(f"{quote(query.query_id)} Q0 {names[query.pool[k]]} {rank} {last:.9g} {tag}\n")


def write_qrels(path, data, names):
    """The labels for write_trec's runs: `query 0 entity label`."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for query in data.queries:
            file.writelines(f"{quote(query.query_id)} 0 {names[j]} {y}\n" for j, y in zip(query.pool, query.labels))


# --------------------------------------------------------------------------------------------------- the contact sheet

def pick(actions, rank, full_rank, has_positive, count):
    """Rows to look at: half of them queries a crop fixed, half where it did harm or left the positive below rank 1."""
    cropped = np.array([a.decision == "REGION" for a in actions]) & has_positive
    fixed, harmed = cropped & (rank < full_rank), cropped & (rank > full_rank)
    wrong, right = has_positive & (rank > 1) & (rank == full_rank), has_positive & (rank == 1)
    chosen = []
    # Harm first, then what stayed wrong; the last two only fill places that are left. Evenly spaced, not the best.
    for group, room in ((fixed, count - count // 2), (harmed, count), (wrong, count), (fixed, count), (right, count)):
        left = [int(i) for i in np.flatnonzero(group) if int(i) not in chosen]
        take = min(room, count - len(chosen), len(left))
        chosen += [left[k * len(left) // take] for k in range(take)]
    return chosen


def thumbnail(image, side):
    """Image on a white square of `side` pixels, its shape kept."""
    scale = side / max(image.size)
    small = image.resize([max(1, round(s * scale)) for s in image.size])
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def sheet_row(data, i, action, before, after, truth, side):
    """Pictures of query i: image with the box, what was scored, top candidate before, top one after, a positive.

    before, after: scores [K] of the full image and of the action's view.
    """
    image, query = data.open_image(i), data.queries[i]
    view = crop(image, action.box) if action.decision == "REGION" else image
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    line = max(2, max(image.size) // 100)
    if truth and i in truth:
        draw.rectangle(truth[i]["box"], outline="lime", width=line)
    if action.decision == "REGION":
        draw.rectangle(action.box, outline="red", width=line)
    # A stable argmax of scores is the first of equals: the pool's order, as everywhere.
    places = [int(np.argmax(before)), int(np.argmax(after)), int(np.argmax(query.labels))]
    candidates = [candidate_picture(data.candidate_image_path(query.pool_image[k])) for k in places]
    return [thumbnail(picture, side) for picture in (marked, view, *candidates)]


def candidate_picture(path):
    """A candidate's image, grey where it cannot be read: only this sheet looks at it, and an evaluation of hours is
    worth more than its picture. prepare.py read it, so it was moved or damaged since."""
    try:
        return read_image(path)
    except (FileNotFoundError, ValueError) as error:
        print(f"note: grey on the sheet: {error}")
        return Image.new("RGB", (8, 8), "grey")


def contact_sheet(data, actions, full_scores, method_scores, labels, truth, count, side=150, unreadable=()):
    """Before/after picture of `count` queries as a PIL image (see pick and sheet_row for rows and columns)."""
    after, before = metrics(method_scores, labels, ks=()), metrics(full_scores, labels, ks=())
    shown = after["has_positive"] & ~np.isin(np.arange(len(labels)), list(unreadable))
    chosen = pick(actions, after["rank"], before["rank"], shown, count)
    font, text = ImageFont.load_default(12), 36
    sheet = Image.new("RGB", (5 * (side + 6), 20 + len(chosen) * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    heads = ("box red, true box green", "what was scored", "first before", "first after", "positive")
    for column, head in enumerate(heads):
        draw.text((column * (side + 6) + 3, 3), head, fill="black", font=font)
    for n, i in enumerate(chosen):
        top, action = 20 + n * (side + text), actions[i]
        sure = "" if action.p_region is None else f", p(REGION) {action.p_region:.2f}"
        better = before["rank"][i] - after["rank"][i]
        draw.text((3, top), f"{data.queries[i].query_id}: {data.queries[i].question}", fill="black", font=font)
        draw.text((3, top + 15), f"{action.decision}{sure}, rank {before['rank'][i]} -> {after['rank'][i]}", font=font,
                  fill="green" if better > 0 else "red" if better < 0 else "black")
        for column, picture in enumerate(sheet_row(data, i, action, full_scores[i], method_scores[i], truth, side)):
            sheet.paste(picture, (column * (side + 6), top + 32))
    return sheet


# -------------------------------------------------------------------------------------------------------------- stage

class Refused(ValueError):
    """A model, file or server that is needed late says no: as much a matter of input as what open_all checks."""


def outside(load, *args, **settings):
    """load(...), with its complaints as Refused."""
    try:
        return load(*args, **settings)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error


@dataclasses.dataclass
class Job:
    """What open_all() opened: the split, the scorer of its pools, the methods to run; policies {"first" | "second":
    function that gives the policy}; truth of read_truth; external {name: scores [Q, K]} of other programs; about: what
    metrics.json says beside its numbers."""
    data: object
    scorer: object
    policies: dict
    methods: list
    truth: dict | None
    external: dict
    about: dict


@dataclasses.dataclass
class Outcome:
    """What evaluate() found: result is metrics.json; rows {method: [Q] rows}, rescored {scorer slug: the same},
    retrieved {view: rows of Table 8}; scores {method: [Q, K]}; actions {method: [Q]}; images knows the unreadable."""
    result: dict
    rows: dict
    rescored: dict
    retrieved: dict
    scores: dict
    actions: dict
    images: Images


def evaluate(job, args, progress):
    """From queries to numbers: a Job -> Outcome."""
    data, images = job.data, Images(job.data)
    actions = all_actions(job.methods, data, job.policies, job.truth, args, progress, images)
    spent, fused = {}, {} if args.fuse is None else {"policy+fuse": args.fuse}
    found = score_actions(data, job.scorer, actions, args.batch_size, images, fused, spent)
    if len(images.unreadable) == len(data.queries):
        raise Refused(f"no query image of the split can be read; the first: {next(iter(images.unreadable.values()))}")
    keep_full(actions, images.unreadable)
    if "oracle" in job.methods:
        labels = np.array([query.labels for query in data.queries])  # [Q, K]
        actions["oracle"], found["oracle"] = oracle_of(found["full"], found["truth"], actions, labels)
    known, verdicts, sections = region_facts(data, actions, job.truth, args, progress, images)
    about, rows = {**job.about, **sections}, {}
    for name in row_order(job.methods, actions):
        rows[name] = make_rows(data, actions[name], found[name], found["full"], **known, unreadable=images.unreadable,
                               seconds=query_seconds(name, actions[name], args, progress, spent),
                               verdicts=verdicts if name == "policy" else None)
    for name, places in job.external.items():
        found[name] = places
        rows[name] = make_rows(data, actions["full"], places, found["full"], unreadable=images.unreadable,
                               kinds=known["kinds"], action_free=True)
    rescored = rescore_all(data, actions, known, args, images, about)
    retrieved = {}
    if args.retrieval_stage:
        about["retrieval_stage"], retrieved = recall_again(data, job.scorer, actions["policy"], args, images)
    return Outcome(tabulate(about, rows, rescored), rows, rescored, retrieved, found, actions, images)


def keep_full(actions, unreadable):
    """Queries whose image cannot be read: FULL for every method, whatever was found before it was noticed."""
    for listed in actions.values():
        for i in unreadable:
            listed[i] = Action("FULL", None, listed[i].p_region, listed[i].text)


def row_order(methods, actions):
    """Names of the row sets in the order of the tables: extensions after the policy, the true boxes last."""
    extra = [name for name in actions if name.startswith("policy+")]
    at = methods.index("policy") + 1 if extra else 0
    return [*methods[:at], *extra, *methods[at:], *(["truth"] if "truth" in actions else [])]


def query_seconds(name, actions, args, progress, spent):
    """[Q] seconds of each query: its share of the decoding and sampling batches, and its view's of cropping and
    encoding. None where nothing was computed. Loading images and searching the pool are not counted."""
    method = name.partition("+")[0]
    asked = [pass_of(method, args.decode)] if method in ASKS else []
    sampled = [f"best{args.samples} seed{args.seed}"] if name.startswith("policy+best") else []
    seconds = []
    for i, action in enumerate(actions):
        sources = asked + (sampled if action.decision == "REGION" else [])  # as in best_boxes
        parts = [value[-1] for value in (progress.get(source, i) for source in sources) if value]
        parts += [spent[i, action.box]] if (i, action.box) in spent else []
        seconds.append(sum(parts) if parts else None)
    return seconds


def region_facts(data, actions, truth, args, progress, images):
    """({"targets", "kinds"} and verdicts for make_rows, sections of metrics.json), by truth, detector and judge."""
    truth = truth or {}
    targets, without, name = {i: fact["box"] for i, fact in truth.items()}, {}, "true boxes" if truth else None
    if args.proxy:
        detect = outside(load_detector, args.proxy.partition("=")[2], args.device)
        name = args.proxy
        targets, without = proxy_targets(data, actions, detect, progress, images, name)
    sections, verdicts = {"region_quality": {"target": name, "targets": len(targets), "without": without}}, None
    if args.judge:
        verdicts, sections["judge"] = judge_crops(data, actions["policy"], args, progress, images)
    return {"targets": targets, "kinds": {i: fact["kind"] for i, fact in truth.items()}}, verdicts, sections


def rescore_all(data, actions, known, args, images, about):
    """Row sets of full, zeroshot and policy by each --test-scorer: {slug: {method: rows}}; notes each in `about`."""
    chosen = {name: actions[name] for name in ("full", "zeroshot", "policy") if name in actions}
    rescored = {}
    for name in args.test_scorer:
        scorer = outside(load_scorer, name, args.device)
        # It reads all candidates' images anew, so one that is gone since prepare.py shows here, and only here.
        found = outside(rescore, data, scorer, chosen, images, args.batch_size)
        tag = slug(scorer.identity)
        if tag in rescored:  # two folders of one name
            tag = slug(scorer.identity.replace("@", "-") + "@")
        about.setdefault("test_scorers", {})[tag] = {"name": name, "scorer": scorer.identity}
        rescored[tag] = {method: make_rows(data, chosen[method], found[method], found["full"], **known,
                                           unreadable=images.unreadable) for method in chosen}
        del scorer  # one at a time in memory
    return rescored


def recall_again(data, scorer, actions, args, images):
    """Table 8: ({"full" | "policy": R@1 ... R@20 as shares, ...} for metrics.json, {view: rows})."""
    found = retrieval_stage(data, scorer, actions, args.batch_size, images)
    ranks = {name: metrics(cosines, labels) for name, (labels, cosines) in found.items()}
    rows = {name: [{"query_id": query.query_id, "positives": list(query.positives),
                    "decision": "FULL" if name == "full" else actions[i].decision, "labels": labels[i].tolist(),
                    "scores": [float(f"{c:.9g}") for c in cosines[i]], "rank": int(ranks[name]["rank"][i]),
                    "full_rank": int(ranks["full"]["rank"][i])} for i, query in enumerate(data.queries)]
            for name, (labels, cosines) in found.items()}
    return retrieval_section(rows), rows


def retrieval_section(rows):
    """Table 8 in metrics.json from its rows {"full" | "policy": [Q]}."""
    means = {name: summary(metrics(array(listed, "scores"), array(listed, "labels"))) for name, listed in rows.items()}
    return {"K": len(rows["full"][0]["labels"]), "queries": len(rows["full"]), **{
        name: {key: value for key, value in found.items() if key[:2] == "R@" or key == "MRR"}
        for name, found in means.items()}}


def write_all(folder, outcome, data, truth, sheet):
    """Every file of an evaluation; metrics.json comes last, so that where it is the others are whole."""
    split = outcome.result["split"]
    names = trec_names(data)
    write_qrels(os.path.join(folder, f"{split}.qrels"), data, names)
    for name, rows in outcome.rows.items():
        path = os.path.join(folder, f"{split}.{name}")
        write_rows(f"{path}.jsonl", rows)
        write_csv(f"{path}.csv", rows, outcome.rows["full"])
        write_trec(f"{path}.trec", data, outcome.scores[name], names, name)
    for tag, found in outcome.rescored.items():
        for name, rows in found.items():
            write_rows(os.path.join(folder, f"{split}.{name}@{tag}.jsonl"), rows)
    if outcome.retrieved:  # in a folder of their own: they are rankings of the knowledge base, not of the pools
        os.makedirs(os.path.join(folder, "retrieval"), exist_ok=True)
        for name, rows in outcome.retrieved.items():
            write_rows(os.path.join(folder, "retrieval", f"{split}.{name}.jsonl"), rows)
    shown = next((name for name in ("policy", "always", "zeroshot") if name in outcome.rows), None)
    if sheet and shown:  # nothing to look at where no model chose anything
        labels = np.array([query.labels for query in data.queries])
        picture = contact_sheet(data, outcome.actions[shown], outcome.scores["full"], outcome.scores[shown], labels,
                                truth, sheet, unreadable=outcome.images.unreadable)
        with replacing(os.path.join(folder, f"{split}.sheet.png")) as temporary:
            picture.save(temporary, format="png")
    write_json(os.path.join(folder, "metrics.json"), outcome.result)


def open_all(args):
    """The Job that the arguments describe; every complaint about input that can come early comes here.

    The first policy is loaded here, a second base model when it is called, after the first is gone.
    """
    data = load_data(args.data, args.split)
    if args.limit:
        data.queries = data.queries[:args.limit]
    if not data.queries:
        raise ValueError(f"{data.pool_file}: no queries in this split; see its counts in {args.data}/manifest.json")
    if args.retrieval_stage:
        check_retrieval(data)
    truth = read_truth(data)
    methods = choose_methods(args.methods, truth, args.zeroshot_policy)
    config = open_run(args.run, data, methods)
    settings = config.get("args", {})
    args.decode = args.decode or settings.get("decode", "grammar")
    args.policy_dtype = args.policy_dtype or settings.get("policy_dtype")
    if args.decode == "free" and (args.samples or args.threshold != 0.5):
        raise ValueError("--samples and --threshold need p(REGION | x), which only --decode grammar knows exactly")
    external, matches = open_runs(data, args.run_file)
    dtype = args.scorer_dtype or prepared_dtype(data.manifest)
    scorer = load_scorer(args.scorer or data.manifest["scorer_name"], args.device, dtype)
    check_scorer(args.data, data.manifest, scorer.identity)
    policies, name = {}, args.policy or config.get("policy")
    if args.zeroshot_policy:
        policies["second"] = lambda: outside(open_policy, args.zeroshot_policy, config, args, trained=False)
    if set(methods) & {*CROPPING, "zeroshot_always", "random"} - {"zeroshot2"}:
        if not name:
            raise ValueError(f"{args.run} has no config.json that names a policy: give --policy, or train first")
        first = open_policy(name, config, args, trained=bool(set(methods) & set(NEED_ADAPTER)))
        policies["first"] = lambda: first
    about = {**describe(args, scorer, name, settings), **({"external": matches} if matches else {})}
    return Job(data, scorer, policies, methods, truth, external, about)


def open_runs(data, run_files):
    """NAME=PATH texts -> ({name: scores [Q, K]}, {name: file, format and what did not match})."""
    external, matches = {}, {}
    for name, path in (text.split("=", 1) for text in run_files):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--run-file {name}: {path} is missing; it is the other program's result file")
        form, ranked = read_run(path)
        external[name], counts = match_run(data, ranked, path)
        matches[name] = {"file": os.path.basename(path), "format": form, **counts}
    return external, matches


def describe(args, scorer, policy, settings):
    """What metrics.json says of the run beside its numbers. settings: the training run's arguments."""
    about = {"data": args.data, "run": args.run, "split": args.split, "scorer": scorer.identity,
             "policy_dtype": args.policy_dtype,
             "decode": args.decode, "threshold": args.threshold, "seed": args.seed,
             "seeds": {"evaluation": args.seed, "training": settings.get("seed")},
             "center_fraction": args.center_fraction, "models": {"policy": policy, "zeroshot2": args.zeroshot_policy}}
    if args.fuse is not None:
        about["extras"] = {"policy+fuse": {"weight": args.fuse}}
    if args.samples:
        about["extras"] = {**about.get("extras", {}), f"policy+best{args.samples}": {"samples": args.samples}}
    return about


def check_retrieval(data):
    """FileNotFoundError or ValueError unless Table 8 can be made from this data folder."""
    if not data.index_files:
        path = os.path.join(data.folder, "index.faiss")
        raise FileNotFoundError(f"{path} is missing, and --retrieval-stage searches it: leave that flag out, or run "
                                "prepare.py again with --index flat, ivf or hnsw and none of --pool mined, --echosight "
                                "and --candidate-image mean, which write no index")
    if bare := next((query for query in data.queries if not query.positives), None):
        raise ValueError(f"{data.pool_file}:{bare.row + 1}: query {bare.query_id!r} names no positives, so recall over "
                         "the whole knowledge base is not defined: prepare the data again")


def open_policy(name, config, args, trained):
    """The policy as it was trained: prompt and image size from the run's config, the adapter where it is needed."""
    settings = config.get("args", {})
    policy = load_policy(name, adapter=os.path.join(args.run, "adapter") if trained else None, device=args.device,
                         max_pixels=settings.get("max_pixels"), system_prompt=read_prompt(config),
                         dtype=args.policy_dtype)
    policy.keep_prefix = True
    if "max_new_tokens" in settings:
        policy.max_new_tokens = settings["max_new_tokens"]
    return policy


def read_prompt(config):
    """The system prompt that the run was trained with, or None for the model's own. config: of open_run."""
    file = config.get("args", {}).get("system_prompt")
    if "system_prompt" in config or not file:
        return config.get("system_prompt")
    with open(file, encoding="utf-8") as text:  # a run of before its config held the text
        return text.read()


def open_progress(folder, data, args, about):
    """Progress in <split>.actions.part, good for these pools, this adapter and this way of decoding."""
    hashes = {}
    for path in (adapter_file(args.run), os.path.join(args.run, "config.json")):  # config: base model, image size ...
        if os.path.isfile(path):
            with open(path, "rb") as file:
                hashes[os.path.basename(path)] = hashlib.sha256(file.read()).hexdigest()
    return Progress(os.path.join(folder, f"{args.split}.actions.part"), {
        "pools": data.identity, "run": hashes, "decode": args.decode, "models": about["models"],
        # Where none was asked for the key is that of before the flag, whose answers are still good.
        **({"policy_dtype": about["policy_dtype"]} if about["policy_dtype"] else {})})


def from_rows(folder, split):
    """metrics.json computed anew from the rows of a finished evaluation -> result. No model, no data folder.

    Rows alone do not tell the names in metrics.json, nor the judge's model and what of a run file did not match: these
    stay as they are. FileNotFoundError or ValueError where something is missing.
    """
    path = os.path.join(folder, "metrics.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: no evaluation has finished here, so run one without --from-rows")
    old = read_json(path, "run evaluate.py without --from-rows")
    if missing := sorted({"split", "methods", "region_quality"} - old.keys()):
        raise ValueError(f"{path} has no {', '.join(missing)}: run evaluate.py without --from-rows")
    if old["split"] != split:
        raise ValueError(f"{path} is of split {old.get('split')}: give --split {old.get('split')}")
    names = [*old["methods"], *(["truth"] if "truth_box" in old else [])]
    rows = {name: read_rows(os.path.join(folder, f"{split}.{name}.jsonl")) for name in names}
    rescored = {tag: {name: read_rows(os.path.join(folder, f"{split}.{name}@{tag}.jsonl")) for name in found["methods"]}
                for tag, found in old.get("test_scorers", {}).items()}
    retrieved = {name: read_rows(os.path.join(folder, "retrieval", f"{split}.{name}.jsonl"), RETRIEVED_FIELDS)
                 for name in (("full", "policy") if "retrieval_stage" in old else ())}
    for name, listed in [*rows.items(), *((f"{name}@{tag}", listed) for tag, found in rescored.items()
                                          for name, listed in found.items()), *retrieved.items()]:
        if [row["query_id"] for row in listed] != [row["query_id"] for row in rows["full"]]:
            raise ValueError(f"{folder}/{split}.{name}.jsonl has other queries than {split}.full.jsonl: it is of "
                             "another evaluation; run evaluate.py again")
    return tabulate({**old, **({"retrieval_stage": retrieval_section(retrieved)} if retrieved else {})}, rows, rescored)


def run_models(args, folder):
    """The whole evaluation, to its files -> result."""
    try:
        job = open_all(args)
    except (ValueError, FileNotFoundError) as error:  # wrong input, said in one line; anything else is a bug and shows
        raise Refused(str(error)) from error
    os.makedirs(folder, exist_ok=True)
    with outside(hold, folder, "--out"):
        if os.path.isfile(os.path.join(folder, "metrics.json")):
            os.remove(os.path.join(folder, "metrics.json"))  # of the rows that are about to be replaced
        progress = open_progress(folder, job.data, args, job.about)
        outcome = evaluate(job, args, progress)
        write_all(folder, outcome, job.data, job.truth, args.sheet)
        progress.finish()
    if args.methods is None and job.truth is None:
        print("no truth.jsonl beside the raw data: no oracle row, no IoU, no table by kind")
    return outcome.result


def import_wandb():
    """The module. Refused, before any work is done, where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise Refused(f"--wandb needs the package wandb ({error}): pip install wandb, or leave the flag out; "
                      "metrics.json has the same numbers") from error


def show(wandb, project, result):
    """Every method's means in a run of its own kind: "<split>/<method>/MRR" and so on."""
    run = wandb.init(project=project, name=os.path.basename(os.path.abspath(result["run"])), job_type="evaluate",
                     config={key: result[key] for key in ("data", "split", "scorer", "decode", "seed", "threshold")})
    run.log({f"{result['split']}/{name}/{key}": value for name, row in result["methods"].items()
             for key, value in row.items() if isinstance(value, (int, float))})
    run.finish()


def main(argv=None):
    args = parse_args(argv)
    folder = args.out or os.path.join(args.run, "eval")
    try:
        wandb = import_wandb() if args.wandb else None
        if args.from_rows:
            result = outside(from_rows, folder, args.split)
            write_json(os.path.join(folder, "metrics.json"), result)
        else:
            result = run_models(args, folder)
    except Refused as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SystemExit(f"evaluate.py: {folder} could not be written ({error}): the disk is full. The models' answers "
                         "so far are kept there, so make room and run the same command again") from error
    print(report(result))
    if wandb:
        show(wandb, args.wandb, result)
    print(f"wrote to {folder}: metrics.json" if args.from_rows else f"wrote to {folder}: metrics.json, {args.split}."
          f"<method>.jsonl, .csv and .trec, {args.split}.qrels"
          + (f", {args.split}.sheet.png" if os.path.isfile(f"{folder}/{args.split}.sheet.png") else ""))


if __name__ == "__main__":
    main()
