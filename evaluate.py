"""Re-rank a split with every method and print the paper's Tables 1, 2 and 4; the rows hold the data of Figure 2.

    python evaluate.py --data data/world --run runs/world --split test

A method turns a query into an action, and is nothing else: FULL, REGION with a box, or MALFORMED. Everything after that
is one code path: actions -> scores -> rows (one JSON line a query) -> numbers -> tables. A new method is a new list of
actions. The rest needs no policy and is made from the rows: Tables 6, 7 and 8 by tools/rescore.py, crop_quality.py and
retrieve.py, rankings of and for other programs by tools/trec.py, statistics and plots by tools/report.py.

    full             the whole image: what retrieval saw (Table 1, EVA-CLIP)
    random           a box at a random place, its size drawn from the learned policy's boxes (Sec. 4.2)
    center           the middle of the image (Sec. 4.2)
    zeroshot         the policy's base model: the same weights with the adapter off (Sec. 4.2)
    zeroshot_always  the base model's own boxes, on every query: with its p(REGION | x) the base model's operating curve
    zeroshot2        another base model (--zeroshot-policy), such as the 7B of Table 1
    noun_rule        the base model's boxes for the categories of target (truth.jsonl) of which they pay on val
    clutter_rule     the same for the numbers of things in the picture
    base_best        the base model's boxes with the best decision, in hindsight: what *when* alone could give
    always           the learned policy's own boxes, on every query: is it the decision or the box that helps?
    policy           the learned policy
    learned_best     the learned boxes with the best decision, in hindsight: the rest is a matter of *where*
    truth            the true box, on every query whose truth.jsonl names one
    oracle           the true box with the best decision, in hindsight
    best16           the ceiling: the best of the full image, the learned policy's likeliest box, the true one and 16
                     that it draws at temperature 1, in hindsight

Letters: Q queries, i the place of one in its split, K candidates of a pool, D the scorer's space. A view of query i is
(i, box), (i, None) the full image. Boxes are in original-image pixels. Simplified: decoding is greedy, one action a
query. With a grammar, REGION is forced on every query and the decision is read from p(REGION | x), which is exact
either way: `policy` and `always` then cost one decoding pass together. So the seconds of a query that stays FULL are an
upper bound: the box that nobody asked for is among them.
"""

import argparse
import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from policy import Action, load_policy
from rewards import metrics, summary
from scorer import (
    InputError, blend, crop, load_data, load_scorer, lock_folder, read_json, replacing, same_scorer, scores,
    warn_of_idle_card, write_json,
)

METHODS = ("full", "random", "center", "zeroshot", "zeroshot_always", "noun_rule", "clutter_rule", "base_best",
           "always", "policy", "learned_best", "truth", "oracle", "best16")
NEED_ADAPTER = ("random", "always", "policy", "learned_best", "best16")
RULES = {"noun_rule": "category", "clutter_rule": "things"}  # the field of truth.jsonl that such a rule goes by
# Whose box a method takes where it crops, or would take: whether it does is all that is its own (but best16 has more).
BOX_OF = {**dict.fromkeys(("zeroshot", "noun_rule", "clutter_rule", "base_best"), "zeroshot_always"),
          **dict.fromkeys(("policy", "learned_best", "best16"), "always"), "oracle": "truth"}
BOXES = 16
CROPPING = ("zeroshot", "zeroshot2", "policy", "always")  # in Table 4: methods that choose a region by looking
MODELS = {"zeroshot": "base", "zeroshot_always": "base", "zeroshot2": "second", "policy": "learned",
          "always": "learned"}  # whose answers a method takes
COLUMNS = ("MRR", "NDCG", "R@1", "R@5", "R@10", "R@20", "CondR@1", "CondR@5", "CondR@10")  # Table 1, then Table 2
PAPER = """\
the paper, E-VQA (other data, other models: for the shape of the table only)
full                0.22    0.29   0.142   0.334   0.474   0.508 |     0.28     0.66     0.93  |
random              0.06    0.16   0.012   0.059   0.207   0.508 |     0.02     0.12     0.41  |
center              0.14    0.22   0.075   0.201   0.315   0.508 |     0.15     0.40     0.62  |
zeroshot            0.23    0.29   0.153   0.341   0.443   0.508 |     0.30     0.67     0.87  |
policy              0.47    0.48   0.447   0.482   0.499   0.508 |     0.90     0.95     0.98  |
the paper, InfoSeek (other data, other models: for the shape of the table only)
full                0.55    0.61   0.463   0.712   0.773   0.817 |     0.57     0.87     0.95  |
random              0.19    0.32   0.106   0.271   0.407   0.817 |     0.13     0.33     0.49  |
center              0.47    0.55   0.388   0.568   0.666   0.817 |     0.47     0.70     0.82  |
zeroshot            0.58    0.62   0.541   0.688   0.740   0.817 |     0.69     0.84     0.91  |
policy              0.71    0.73   0.665   0.782   0.802   0.817 |     0.81     0.96     0.98  |"""
FULL_IMAGE = Action("FULL", None, None, "")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/world", help="folder that prepare.py wrote")
    add("--run", default="runs/world", help="folder that train.py wrote")
    add("--out", help="folder for everything that is written; default: eval/ in the run's folder")
    add("--split", default="test", help="split of the data: train, val or test")
    add("--limit", type=int, default=0, help="use the first N queries of a split; 0 = all of them")
    add("--methods", type=lambda text: text.split(","), help="some of the above, comma-separated; default: all")
    add("--zeroshot-policy", metavar="NAME", help="adds zeroshot2: this model, such as Qwen/Qwen2.5-VL-7B-Instruct")
    add("--center-fraction", type=float, default=0.5, help="side of the centre box as a share of the image's, above 0")
    add("--threshold", type=float, default=0.5, metavar="T",
        help="the learned policy crops where p(REGION | x) > T; 0.5 is greedy; choose it on val's curve. Grammar only")
    add("--seed", type=int, default=0, help="of random boxes and of the 16 of best16; nothing else draws")
    add("--policy", help="model id or folder of the policy; default: the one the run was trained from")
    add("--adapter", metavar="FOLDER", help="adapter to use; default: adapter/ in the run's folder")
    add("--scorer", help="scorer; default: the one the data was prepared with (another is refused)")
    add("--scorer-dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the prepared data")
    add("--policy-dtype", choices=("float32", "bfloat16"), help="default: as trained, else bfloat16 on CUDA alone")
    add("--decode", choices=("grammar", "free"), help="by a template, or any text, then parsed; default: as trained")
    add("--zeroshot", choices=("grammar", "free"), help="the same for zeroshot and zeroshot2; default: free, as in the "
        "paper, but like --decode on the embedded world, whose base model is a stand-in")
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
    return args


# ------------------------------------------------------------------------------------------------------ what goes in

def open_run(args, data, methods):
    """runs/<run>/config.json as a dict, {} where there is none and none is needed. InputError when the run was trained
    on other pools: test entities could be among its training queries, and no number would show it."""
    adapter, path = f"{args.adapter}/adapter_model.safetensors", f"{args.run}/config.json"
    needing = [name for name in methods if name in NEED_ADAPTER]
    if needing and not os.path.isfile(adapter):
        raise InputError(f"{adapter} is missing, and {', '.join(needing)} need the trained policy: run `python train.py"
                         f" --data {data.folder} --run {args.run}`, or ask for --methods full,center,zeroshot")
    config = read_json(path, "put it back, or train with another --run") if os.path.isfile(path) else {}
    # The hash of the pools and not of manifest.json: the same pools prepared in another folder are the same data.
    if config and config.get("pools") != data.identity:
        raise InputError(f"run {args.run} was trained on {config.get('data')} (pools {config.get('pools')}), but "
                         f"{data.folder} has pools {data.identity}: evaluate on the data of the run, or train anew")
    return config


def read_truth(data):
    """True boxes of a split, {i: {"box": 4 floats, "kind": str, ...}}; empty where the data has none.

    This is the only reader of truth.jsonl in the project: what else opened it would learn the answers.
    """
    path, facts = os.path.join(data.root, "truth.jsonl"), {}
    if not os.path.isfile(path):
        return {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fact = json.loads(line)
                (x1, y1, x2, y2), _ = fact["box"], fact["kind"]
                if not (x1 < x2 and y1 < y2 and np.isfinite(fact["box"]).all()):
                    raise ValueError("the box has no area")
                facts[fact["image"]] = {**fact, "box": (x1, y1, x2, y2)}
            except (ValueError, KeyError, TypeError) as error:  # no JSON, no object, no four numbers
                raise InputError(f"{path}:{number}: needs image, kind and a box of 4 numbers ({error})") from error
    # Several questions may be asked about one image.
    return {i: facts[query.image] for i, query in enumerate(data.queries) if query.image in facts}


def open_images(data, queries):
    """PIL images of these queries, read side by side."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(data.open_image, queries))


def image_sizes(data):
    """(w, h) of every query image in pixels, None where it cannot be read: such a query is FULL for every method.

    All are read before anything is asked, so that all methods see the same queries.
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
    """Answers of models, {(pass, i): JSON value}, also in a file as they come: a killed evaluation goes on.

    The file's first line is the key. Under another key it is begun anew: other models, pools or ways of decoding.
    """

    def __init__(self, path, key):
        self.path, head = path, json.dumps(key, sort_keys=True)
        lines = Path(path).read_text(encoding="utf-8").splitlines() if os.path.isfile(path) else []
        if lines and lines[0] != head:
            print(f"note: {path} is of another adapter, policy or way of decoding, and is begun anew")
            lines = []
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # a line that a kill cut short: it is asked for again
                name, i, value = json.loads(line)
                self[name, i] = value
        self.file = open(path, "a" if lines else "w", encoding="utf-8")
        self.file.write("\n" if lines else head + "\n")  # what was cut short ends here

    def add(self, answers):
        """In the file when this returns."""
        self.update(answers)
        self.file.writelines(json.dumps([*at, value]) + "\n" for at, value in answers.items())
        self.file.flush()


# ----------------------------------------------------------------------------------------- methods: query -> action

def all_actions(methods, data, sizes, truth, config, args, answers):
    """{method: [Q] Action}, with those whose boxes it takes. What scores decide is missing: rules, and what is best in
    hindsight."""
    # Methods that choose by looking have their own box. What they would take where they do not crop is for the IoU.
    needed = {*methods, *(BOX_OF[name] for name in methods if name in BOX_OF and (truth or name not in CROPPING))}
    if "random" in methods:  # needs the learned policy's boxes even where its row is not asked for
        needed |= {"policy", "always"}
    asked = [name for name in MODELS if name in needed and name != "zeroshot2"]
    actions = {"full": [FULL_IMAGE] * len(sizes)}
    for name, asking in ((args.policy or config.get("policy"), asked),
                         (args.zeroshot_policy, [name for name in methods if name == "zeroshot2"])):
        if asking:
            policy = open_policy(name, config, args, trained=bool(set(asking) & set(NEED_ADAPTER)))
            actions |= model_actions(policy, asking, data, sizes, args, answers)
            del policy  # before the second comes: two of them and the scorer need not fit together
    if "center" in methods:
        low, high = (1 - args.center_fraction) / 2, (1 + args.center_fraction) / 2
        actions["center"] = [region(size and (size[0] * low, size[1] * low, size[0] * high, size[1] * high))
                             for size in sizes]
    if "random" in methods:
        of = "policy" if any(action.box for action in actions["policy"]) else "always"
        if of == "always":  # it gave up cropping: its forced boxes are the nearest thing to its distribution
            print("note: the policy crops no query, so `random` takes its shapes from the forced boxes of `always`")
        actions["random"] = [region(box) for box in random_boxes(sizes, actions[of], args.seed)]
    if truth and needed & {"truth", "best16"}:
        actions["truth"] = [region(size and i in truth and truth[i]["box"]) for i, size in enumerate(sizes)]
    return actions


def open_policy(name, config, args, trained):
    """The policy as it was trained: prompt and image size from the run's config, the adapter where it is needed."""
    settings = config.get("args", {})
    if not name:
        raise InputError(f"{args.run} has no config.json that names a policy: give --policy, or train first")
    try:
        policy = load_policy(name, adapter=args.adapter if trained else None, device=args.device,
                             max_pixels=settings.get("max_pixels"), system_prompt=config.get("system_prompt"),
                             dtype=args.policy_dtype)
    except (ValueError, OSError) as error:  # of a folder or name that the user gave
        raise InputError(str(error)) from error
    policy.max_new_tokens = settings.get("max_new_tokens", policy.max_new_tokens)
    return policy


def pass_of(name, args):
    """The decoding pass that a method's answers come from: model, is REGION forced, decoding. Under a grammar it is; in
    free text p(REGION | x) is not known, so a decision is a pass of its own."""
    decode = args.zeroshot if name in ("zeroshot", "zeroshot2") else args.decode
    forced = decode == "grammar" or name.endswith("always")
    return f"{MODELS[name]} {'forced' if forced else 'chooses'} {decode}"


def model_actions(policy, names, data, sizes, args, answers):
    """{method: [Q] Action} for methods that ask one policy. What `answers` holds already is not asked for again."""
    passes = sorted({pass_of(name, args) for name in names})
    todo = [i for i, size in enumerate(sizes) if size and any((each, i) not in answers for each in passes)]
    for start in tqdm(range(0, len(todo), args.batch_size), desc="decide", unit="batch", disable=None):
        batch = todo[start:start + args.batch_size]
        images, questions = open_images(data, batch), [data.queries[i].question for i in batch]
        for each in passes:
            begin = time.perf_counter()
            with policy.adapter(not each.startswith("base")):
                try:
                    found = policy.act(images, questions, decode=each.split()[2], batch_size=args.batch_size,
                                       force="REGION" if "forced" in each else None)
                except ValueError as error:  # a question with a special token in it
                    raise InputError(f"{data.queries.path}: {error}; counted from 0 in queries "
                                     f"{[data.queries[i].query_id for i in batch]}") from error
            seconds = (time.perf_counter() - begin) / len(batch)
            answers.add({(each, i): [a.decision, a.box, a.p_region, a.text, seconds] for i, a in zip(batch, found)})
    actions = {name: [] for name in names}
    for name, listed in actions.items():
        # REGION was forced on it all the same
        may_decide = pass_of(name, args).endswith("grammar") and not name.endswith("always")
        threshold = args.threshold if name == "policy" else 0.5  # a base model is a baseline and stays greedy
        for i in range(len(sizes)):
            decision, box, p_region, text, _ = answers.get((pass_of(name, args), i)) or ("FULL", None, None, "", 0)
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
    for i, (width, height) in ((i, size) for i, size in enumerate(sizes) if size):
        rng = np.random.default_rng([seed, i])  # by query; yet --limit leaves fewer shapes to draw from
        share_w, share_h = shapes[rng.integers(len(shapes))]
        w, h = share_w * width, share_h * height
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        boxes[i] = (float(left), float(top), float(left + w), float(top + h))
    return boxes


def best_of(lists, seen, labels):
    """The action of each query whose view ranks best, the first of equals: [Q]. lists: of [Q] Action each."""
    ranks = [metrics(view_scores(listed, seen), labels, ks=())["rank"] for listed in lists]
    return [lists[k][i] for i, k in enumerate(np.argmin(ranks, axis=0))]


def ceiling(data, scorer, actions, seen, sizes, config, args, answers):
    """best16: [Q] Action; the scores of its views are added to `seen`. The learned policy draws boxes, a query's in one
    tree, only where they can matter: where neither the full image nor the likeliest or true box puts a positive first.
    """
    labels = np.asarray(data.labels)
    best = best_of([actions[name] for name in ("full", "always", "truth") if name in actions], seen, labels)
    rank = metrics(view_scores(best, seen), labels, ks=())["rank"]  # [Q]
    open_ones = dict.fromkeys(i for i in np.flatnonzero((rank > 1) & labels.any(1)).tolist() if sizes[i])
    todo = [i for i in open_ones if ("drawn", i) not in answers]
    policy = open_policy(args.policy or config.get("policy"), config, args, trained=True) if todo else None
    step = max(1, args.batch_size // BOXES)  # so many answers at once as in the other passes: memory
    for start in tqdm(range(0, len(todo), step), desc="draw", unit="batch", disable=None):
        batch = todo[start:start + step]
        prompts = policy.prompts(open_images(data, batch), [data.queries[i].question for i in batch])
        groups = policy.rollout(prompts, [["REGION"] * BOXES] * len(batch), args.decode,
                                seeds=[(args.seed, i) for i in batch])
        answers.add({("drawn", i): [one.action.box for one in group] for i, group in zip(batch, groups)})
    drawn = [[region(answers["drawn", i][k] and tuple(answers["drawn", i][k])) if i in open_ones else FULL_IMAGE
              for i in range(len(data))] for k in range(BOXES)]
    seen.update(score_views(data, scorer, dict(enumerate(drawn)), args.batch_size, args.fuse)[0])
    return best_of([best, *drawn], seen, labels)


def fit_rules(rules, scorer, config, args, key):
    """{rule: its values, sorted, for which cropping pays}: in reciprocal rank, over another split, the base model's
    boxes against the full image. scorer, config, key: as in `evaluate`."""
    data = load_data(args.data, args.rules_from, limit=args.limit)
    answers = Answers(f"{args.out}/{args.split}.actions.{args.rules_from}.part", key)
    actions = all_actions(["full", "zeroshot_always"], data, image_sizes(data), {}, config, args, answers)
    seen, _ = score_views(data, scorer, actions, args.batch_size, args.fuse)
    full, crops = (metrics(view_scores(actions[name], seen), data.labels, ks=())["rr"]
                   for name in ("full", "zeroshot_always"))  # [Q] each
    gains = {rule: {} for rule in rules}
    for i, fact in read_truth(data).items():
        for rule, found in gains.items():
            found[fact[RULES[rule]]] = found.get(fact[RULES[rule]], 0) + crops[i] - full[i]
    return {rule: sorted(value for value, gain in found.items() if gain > 0) for rule, found in gains.items()}


# ------------------------------------------------------------------------------------------------- actions -> scores

def score_views(data, scorer, actions, batch_size=64, share=1.0):
    """Scores of the full image and of each box that some method chose: {view: float32 [K] in pool order}. And the
    seconds that a box took, {view: s}.

    The full image's feature is stored, so nothing is encoded for it. Each different box is encoded once, however many
    methods chose it. batch_size: of views; an image is opened once for each batch that holds boxes of it.
    share: of the crop (`scorer.blend`).
    """
    boxes = {i: dict.fromkeys(listed[i].box for listed in actions.values()) for i in range(len(data))}
    views, seen, seconds = [(i, box) for i in boxes for box in (None, *filter(None, boxes[i]))], {}, {}
    for start in tqdm(range(0, len(views), batch_size), desc="score", unit="batch", disable=None):
        batch = views[start:start + batch_size]
        features, took = encode_views(data, scorer, [view for view in batch if view[1]])
        seconds |= dict.fromkeys(features, took)
        features = {(i, box): blend(np.asarray(data.full[i], dtype=np.float32), feature, share)
                    for (i, box), feature in features.items()}
        features |= {(i, None): np.asarray(data.full[i], dtype=np.float32) for i, box in batch if not box}  # [D] each
        candidates = {i: data.candidates(i) for i in dict.fromkeys(i for i, _ in batch)}  # [K, D] each
        seen |= {(i, box): scores(feature, candidates[i]) for (i, box), feature in features.items()}  # Eq. 2, 4
    return seen, seconds


def encode_views(data, scorer, views):
    """Features of views with a box -> {view: [D]}, and the seconds of cropping and encoding, a view."""
    queries = list(dict.fromkeys(i for i, _ in views))
    images = dict(zip(queries, open_images(data, queries)))
    begin = time.perf_counter()
    features = scorer.image_features([crop(images[i], box) for i, box in views])  # Eq. 1
    return dict(zip(views, features)), (time.perf_counter() - begin) / max(1, len(views))


def view_scores(actions, seen):
    """Scores [Q, K] of one method. An action without a box, FULL or MALFORMED, leaves the query as it was."""
    return np.stack([seen[i, action.box] for i, action in enumerate(actions)])


# ---------------------------------------------------------------------------------------------------- scores -> rows

def make_rows(data, actions, forced, seen, truth, sizes, seconds):
    """What one method did and what it led to: [Q] dicts, the lines of <split>.<method>.jsonl.

    forced: [Q] Action, whose box the method would have taken where it took none. seen, truth, sizes: of score_views,
    read_truth and image_sizes. seconds [Q]: of deciding, cropping and encoding, None where nothing was computed.
    """
    full, rows = view_scores([FULL_IMAGE] * len(data), seen), []
    for i, ranking in enumerate(rankings(data.labels, view_scores(actions, seen), full)):
        query, action, fact = data.queries[i], actions[i], truth.get(i, {"kind": None})
        box = action.box or forced[i].box
        rows.append({
            "query_id": query.query_id, "question": query.question, "image": query.image, "kind": fact["kind"],
            "positives": query.positives, "decision": action.decision, "box": action.box and list(action.box),
            "p_region": action.p_region, "text": action.text, **ranking,
            "iou": iou(box, fact["box"]) if box and "box" in fact else None, "seconds": seconds[i],
            "encodes": int(action.decision == "REGION"), "unreadable": sizes[i] is None})
    return rows


def rankings(labels, found, full):
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


def write_rows(path, rows):
    """One JSON line a query, atomically."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --------------------------------------------------------------------------------------------------- rows -> numbers

def mean(values):
    """Mean of the values that are known; None where there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def numbers(rows):
    """Every number of one method. Table 4 splits the n queries with a positive by the full image's rank; help, hurt,
    no_change: shares of the n whose rank got better, worse, or stayed. The same queries for all methods: crop_rate is
    of those with a positive, mean_iou of those where a crop could help, rank > 1."""
    per_query = metrics([row["scores"] for row in rows], [row["labels"] for row in rows])
    held = per_query["has_positive"]  # [Q]
    decision, rank, full_rank = (np.array([row[field] for row in rows]) for field in ("decision", "rank", "full_rank"))
    facts = {"crop_rate": decision == "REGION", "help": rank < full_rank, "hurt": rank > full_rank,
             "no_change": rank == full_rank}  # [Q] each
    groups = {"rank=1": held & (full_rank == 1), "rank>1": held & (full_rank > 1)}
    table4 = {name: {"n": int(group.sum()), **{fact: mean(values[group]) for fact, values in facts.items()}}
              for name, group in groups.items()}
    return {**summary(per_query), "crop_rate": mean(facts["crop_rate"][held]),
            "malformed": int((decision == "MALFORMED").sum()), "table4": table4,
            "mean_iou": mean(row["iou"] for row, inside in zip(rows, groups["rank>1"]) if inside)}


def tabulate(about, rows):
    """{method: [Q] rows} -> the dict of metrics.json. about: what the rows do not tell, such as data, run and scorer.
    gap_closed: how far a method comes from full (0) to the ceiling best16 (1) in CondR@1, None without a gap."""
    methods, full = {name: numbers(listed) for name, listed in rows.items()}, rows["full"]
    least, best = (methods.get(name, {}).get("CondR@1") for name in ("full", "best16"))
    for found in methods.values():
        found["gap_closed"] = (found["CondR@1"] - least) / (best - least) if best and best > least else None
    missing = [row["query_id"] for row in full if row["unreadable"]]
    return {**about, "K": len(full[0]["labels"]), "queries": len(full),
            "with_positive": sum(any(row["labels"]) for row in full),
            "unreadable": {"count": len(missing), "first": missing[:5]}, "methods": methods}


# -------------------------------------------------------------------------------------------------- numbers -> tables

def cells(values, width, style):
    """Numbers in columns; style "%" is in per cent with one digit, without the sign."""
    return "".join(f"{'-' if v is None else f'{v * 100:.1f}' if style == '%' else format(v, style):>{width}}"
                   for v in values)


def tables(methods):
    """Tables 1 and 2 beside each other with the paper's methods beneath, and Table 4: two lists of lines."""
    main = [f"{'':16}{'Table 1: all queries':^48} |{'Table 2: with a positive':^28} |{'what it did':^33}",
            f"{'method':16}{cells(COLUMNS[:6], 8, '')} |{cells(COLUMNS[6:], 9, '')}  |  crop % bad text    IoU  gap %"]
    for name, found in methods.items():
        v = [found[column] for column in COLUMNS]
        did = cells([found["crop_rate"]], 8, "%") + f"{found['malformed']:9}" + cells([found["mean_iou"]], 7, ".2f")
        did += cells([found.get("gap_closed")], 7, "%")  # another program's row has none
        main.append(f"{name:16}{cells(v[:6], 8, '.3f')} |{cells(v[6:], 9, '.3f')}  |{did}")
    main += PAPER.splitlines()

    columns = ("crop_rate", "help", "hurt", "no_change")  # in per cent of the queries whose pool holds the positive
    table4 = [f"{'Table 4':16}" + "".join(f"{f'original {group}, n = ' + str(found['n']):^44}"
                                          for group, found in methods["full"]["table4"].items()),
              f"{'in %':16}" + cells((c.replace("_", " ") for c in columns), 11, "") * 2]
    table4 += [f"{name:16}" + "".join(cells((g[c] for c in columns), 11, "%") for g in methods[name]["table4"].values())
               for name in CROPPING if name in methods]
    return main, table4 if len(table4) > 2 else []


def report(result):
    """All tables as one text, and beneath them what a reader must know."""
    methods, notes = result["methods"], [
        "crop %: of the queries with a positive; bad text: of all. IoU: of the box that a method takes, or would\n"
        "take, on the queries with a positive that the full image does not rank first"]
    if methods["full"]["gap_closed"] is not None:
        full, best = (methods[name]["CondR@1"] for name in ("full", "best16"))
        notes.append(f"gap %: how much of the way from full, CondR@1 {full:.3f}, to the ceiling best16, {best:.3f}.\n"
                     "Knowing *when* to crop could give base_best, knowing *where* what learned_best has beyond it")
    notes += [f"{rule} crops where {RULES[rule]} is one of: {', '.join(map(str, values)) or 'none'} (fitted on "
              f"{result['rules_from']})" for rule, values in result["rules"].items()]
    if result.get("fuse", 1) < 1:
        notes.append(f"crops are scored together with the full image: {result['fuse']:g} is the crop's share (--fuse)")
    if "zeroshot2" in methods:
        notes.append(f"zeroshot2 is {result['models']['zeroshot2']}")
    if result["unreadable"]["count"]:
        notes.append(f"{result['unreadable']['count']} query images cannot be read and count as FULL: "
                     f"{', '.join(result['unreadable']['first'])} ...")
    head = [f"{result['split']} split of {result['data']}: {result['queries']} queries, {result['with_positive']} of "
            f"them with a positive among their K = {result['K']} candidates"]
    return "\n\n".join("\n".join(part) for part in (head, *tables(methods), notes) if part)


# ------------------------------------------------------------------------------------------------------------- stage

def open_all(args):
    """Everything that the stage reads but images and policies -> (data, scorer, methods, truth, config). In args it
    settles, by what the run and the data say, decode, dtypes and the split that rules are fitted on."""
    data = load_data(args.data, args.split, limit=args.limit)
    if not len(data):
        raise InputError(f"{args.data}: split {args.split} has no queries; see its counts in manifest.json")
    truth = read_truth(data)
    splits = [split for split, counts in data.manifest["splits"].items() if split != args.split and counts.get("kept")]
    args.rules_from = next((split for split in ("val", "train") if split in splits), None)
    lacking = [] if truth else ["truth", "oracle"]
    lacking += [rule for rule, field in RULES.items()
                if not (truth and args.rules_from and all(field in fact for fact in truth.values()))]
    if asked := [name for name in lacking if name in (args.methods or ())]:
        raise InputError(f"{', '.join(asked)}: needs truth.jsonl beside the raw data, a rule also its category or "
                         "things and a val or train split to be fitted on: leave it out")
    if lacking:
        print(f"no rows of {', '.join(lacking)}{'' if truth else ', no IoU'}: no truth.jsonl beside the raw data that "
              "says what they need")
    # The full image is always there: every other method is compared with it, query by query.
    wanted = {"full", *(args.methods or METHODS)} - set(lacking)
    methods = [name for name in METHODS if name in wanted]
    if args.zeroshot_policy:  # beside the other base model, as in Table 1
        methods.insert(sum(name in METHODS[:5] for name in methods), "zeroshot2")
    config = open_run(args, data, methods)
    args.decode = args.decode or config.get("args", {}).get("decode", "grammar")
    args.zeroshot = args.zeroshot or (args.decode if data.manifest["dataset"] == "world" else "free")
    args.fuse = config.get("args", {}).get("fuse", 1.0)
    args.policy_dtype = args.policy_dtype or config.get("args", {}).get("policy_dtype")
    if args.decode == "free" and args.threshold != 0.5:
        raise InputError("--threshold needs p(REGION | x), which only --decode grammar knows exactly")
    then = data.manifest["scorer"]
    scorer = load_scorer(args.scorer or then["name"], args.device, args.scorer_dtype or then["dtype"])
    same_scorer(args.data, data.manifest, scorer)
    return data, scorer, methods, truth, config


def evaluate(args):
    """From queries to files -> the dict of metrics.json."""
    data, scorer, methods, truth, config = open_all(args)
    told = ("data", "run", "split", "decode", "policy_dtype", "threshold", "center_fraction", "seed", "zeroshot",
            "rules_from", "fuse")
    # By content: an adapter that was trained on is another, and config.json holds prompt and image size.
    files = [hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None
             for path in (f"{args.adapter}/adapter_model.safetensors", f"{args.run}/config.json")]
    about = {**{name: getattr(args, name) for name in told}, "scorer": scorer.name, "adapter_sha256": files[0],
             "training_seed": config.get("args", {}).get("seed"),
             "models": {"policy": args.policy or config.get("policy"), "zeroshot2": args.zeroshot_policy}}
    asked = ("decode", "policy_dtype", "models", "seed")
    key = {"pools": data.identity, "files": files, **{name: about[name] for name in asked}}
    os.makedirs(args.out, exist_ok=True)
    with lock_folder(args.out, "--out"):
        answers = Answers(f"{args.out}/{args.split}.actions.part", key)
        sizes = image_sizes(data)
        actions = all_actions(methods, data, sizes, truth, config, args, answers)
        seen, view_seconds = score_views(data, scorer, actions, args.batch_size, args.fuse)
        rules = [name for name in methods if name in RULES]
        about["rules"] = fit_rules(rules, scorer, config, args, key) if rules else {}
        for rule, values in about["rules"].items():
            actions[rule] = [box if i in truth and truth[i][RULES[rule]] in values else FULL_IMAGE
                             for i, box in enumerate(actions[BOX_OF[rule]])]
        for name in ("base_best", "learned_best", "oracle"):
            if name in methods:
                actions[name] = best_of([actions["full"], actions[BOX_OF[name]]], seen, np.asarray(data.labels))
        if "best16" in methods:
            actions["best16"] = ceiling(data, scorer, actions, seen, sizes, config, args, answers)
        rows = {}
        for name in methods:
            seconds = []  # loading images and searching the pool are not counted
            for i, action in enumerate(actions[name]):
                took = answers.get((pass_of(name, args), i), [0])[-1] if name in MODELS else 0
                seconds.append(took + view_seconds.get((i, action.box), 0) or None)
            forced = actions.get(BOX_OF.get(name), actions["full"])
            rows[name] = make_rows(data, actions[name], forced, seen, truth, sizes, seconds)
        result = tabulate(about, rows)
        # It goes first and comes last: where it is, the others are whole.
        Path(args.out, "metrics.json").unlink(missing_ok=True)
        for name, listed in rows.items():
            write_rows(f"{args.out}/{args.split}.{name}.jsonl", listed)
        write_json(f"{args.out}/metrics.json", result)
        for path in Path(args.out).glob(f"{args.split}.actions.*"):
            path.unlink()
    return result


def main(argv=None):
    args = parse_args(argv)
    warn_of_idle_card()
    try:
        result = evaluate(args)
    except (InputError, FileNotFoundError) as error:  # wrong input, said in one line; anything else is a bug and shows
        raise SystemExit(f"evaluate.py: {error}") from error
    print(report(result))
    print(f"wrote to {args.out}: metrics.json, {args.split}.<method>.jsonl")


if __name__ == "__main__":
    main()
