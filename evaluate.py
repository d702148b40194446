"""Re-rank a split with every method and write the paper's tables (Tables 1, 2 and 4).

    python evaluate.py --data data/world --run runs/world --split test    # the README has the minutes and the machine

A method turns a query into an action, and nothing else: FULL, REGION with a box, or MALFORMED. Everything after that
is one code path. So the rows can be compared, and a new method is a new list of actions.

    full      the whole image: what retrieval saw (Table 1, EVA-CLIP)
    random    a box at a random place, its size drawn from the learned policy's boxes (Sec. 4.2)
    center    the middle of the image (Sec. 4.2)
    zeroshot  the policy's base model: the same weights with the adapter off (Sec. 4.2)
    always    the learned policy's own boxes, on every query: is it the decision or the box that helps?
    policy    the learned policy
    oracle    the better of full image and true box, for data whose truth.jsonl names a true box

Simplified: decoding is greedy, one action a query. With a grammar, REGION is forced on every query and the decision is
read from p(REGION | x), which is exact either way: `policy` and `always` then cost one decoding pass together.
"""

import argparse
import json
import os
from itertools import groupby
from operator import itemgetter
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from policy import Action, load_policy
from rewards import metrics, summary
from scorer import crop, load_data, load_scorer, replacing, scores, write_json

METHODS = ("full", "random", "center", "zeroshot", "always", "policy", "oracle")
NEED_ADAPTER = ("random", "always", "policy")
CROPPING = ("zeroshot", "policy", "always")  # rows of Table 4: methods that choose a region by looking
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
    files = parser.add_argument_group("files")
    files.add_argument("--data", default="data/world", help="folder that prepare.py wrote")
    files.add_argument("--run", default="runs/world", help="folder that train.py wrote; results go to its eval/")
    files.add_argument("--split", default="test", help="split of the data: train, val or test")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--methods", type=lambda text: tuple(text.split(",")),
                      help=f"comma-separated, of {','.join(METHODS)}; default: all, oracle where truth is known")
    what.add_argument("--center-fraction", type=float, default=0.5,
                      help="side of the centre box as a share of the image's side, above 0, at most 1 (Sec. 4.2)")
    what.add_argument("--seed", type=int, default=0, help="of the random boxes; the other methods draw nothing")
    what.add_argument("--limit", type=int, default=0, help="use the first N queries of the split; 0 = all of them")
    models = parser.add_argument_group("models")
    models.add_argument("--policy", help="model id or folder of the policy; default: the one the run was trained from")
    models.add_argument("--scorer", help="scorer; default: the one the data was prepared with (another is refused)")
    models.add_argument("--decode", choices=("grammar", "free"),
                        help="grammar: only the decision and the digits are choices; free: any text, then parsed; "
                             "default: as the run was trained, else grammar")
    models.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 ...")
    models.add_argument("--batch-size", type=int, default=64, help="queries a step, 1 or more; memory, not results")
    parser.add_argument("--sheet", type=int, default=12, help="queries on the before/after picture, 0 = no picture")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not 0 < args.center_fraction <= 1:
        parser.error(f"--center-fraction {args.center_fraction}: above 0 and at most 1")
    if args.batch_size < 1 or args.limit < 0 or args.sheet < 0:
        parser.error("--batch-size must be 1 or more, --limit and --sheet 0 or more")
    if unknown := sorted(set(args.methods or ()) - set(METHODS)):
        parser.error(f"--methods: unknown {', '.join(unknown)}; known are {', '.join(METHODS)}")
    return args


# ------------------------------------------------------------------------------------------------------ what goes in

def open_run(folder, data, methods):
    """runs/<run>/config.json as a dict ({} where there is none and none is needed). data: of load_data.

    Raises FileNotFoundError when a method needs an adapter and the run has none, ValueError when the run was trained
    on other pools than `data` holds: test entities could be among its training queries, and no number would show it.
    """
    config_file, adapter = (os.path.join(folder, name) for name in ("config.json", "adapter/adapter_model.safetensors"))
    needing = [name for name in methods if name in NEED_ADAPTER]
    if needing and not os.path.isfile(adapter):
        raise FileNotFoundError(f"{adapter} is missing, and {', '.join(needing)} need the trained policy: run "
                                f"`python train.py --data {data.folder} --run {folder}` (add --resume if it was cut "
                                "short), or ask for --methods full,center,zeroshot")
    if not os.path.isfile(config_file):
        return {}
    with open(config_file, encoding="utf-8") as file:
        config = json.load(file)
    # The hash of the pools and not of manifest.json: the same pools prepared in another folder are the same data.
    if config["pools"] != data.identity:
        raise ValueError(f"run {folder} was trained on {config['data']} (pools {config['pools']}), but {data.folder} "
                         f"has pools {data.identity}: evaluate on the data of the run, or train with another --run")
    return config


def read_truth(data):
    """True boxes of a split, for queries that have one: {query row: {"box": 4 floats, "kind": str, ...}}, or None.

    Boxes are original-image pixels. This function is the only reader of truth.jsonl in the project: a policy, a
    stand-in or a training run that opened it would learn the answers. None means that the data has no such file.
    """
    path = os.path.join(data.root, "truth.jsonl")
    if not os.path.isfile(path):
        return None
    rows = {query.image: i for i, query in enumerate(data.queries)}
    truth = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fact = json.loads(line)
            missing = {"image", "box", "kind"} - fact.keys()
            if missing or len(fact["box"]) != 4:
                raise ValueError(f"{path}:{number}: needs image, kind and a box of 4 numbers; draw the world again")
            if fact["image"] in rows:
                truth[rows[fact["image"]]] = {**fact, "box": tuple(fact["box"])}
    return truth


def choose_methods(wanted, truth):
    """Methods to run, in the order of the tables. ValueError when the oracle is asked for and no truth is known."""
    if truth is None and "oracle" in (wanted or ()):
        raise ValueError("method oracle needs truth.jsonl beside the raw data, and there is none: leave it out")
    known = [name for name in METHODS if name != "oracle" or truth is not None]
    return [name for name in known if wanted is None or name in wanted]


# ----------------------------------------------------------------------------------------- methods: query -> action

def greedy(forced):
    """The action a policy takes by itself, from the action it took when REGION was forced on it."""
    # Greedy decoding takes the likelier decision, and after REGION the forced digits are the ones it would write.
    return forced if forced.p_region > 0.5 else Action("FULL", None, forced.p_region, forced.text)


def decode_actions(policy, data, names, decode="grammar", batch_size=64):
    """Actions of the methods that ask a model: {name: [Q] Action} for names out of zeroshot, always, policy."""
    actions = {name: [] for name in names}

    def ask(images, questions, forced_name, free_name):
        act = {"decode": decode, "batch_size": batch_size}
        forced = free = None
        if decode == "grammar" or forced_name in actions:
            forced = policy.act(images, questions, force="REGION", **act)
        if free_name in actions:  # free text has no exact p(REGION | x), so there it is a pass of its own
            free = [greedy(a) for a in forced] if decode == "grammar" else policy.act(images, questions, **act)
        for name, found in ((forced_name, forced), (free_name, free)):
            if name in actions:
                actions[name] += found

    learned = {"always", "policy"} & actions.keys()
    for start in tqdm(range(0, len(data.queries), batch_size), desc="decide", unit="batch", disable=None):
        rows = range(start, min(start + batch_size, len(data.queries)))
        images = [data.open_image(i) for i in rows]  # opened once for both models
        questions = [data.queries[i].question for i in rows]
        if learned:
            ask(images, questions, "always", "policy")
        if "zeroshot" in names:
            with policy.adapter(False):
                ask(images, questions, None, "zeroshot")
    return actions


def center_box(size, fraction):
    """Box of `fraction` of each side in the middle of an image of size (w, h), in its pixels."""
    w, h = size
    return (w * (1 - fraction) / 2, h * (1 - fraction) / 2, w * (1 + fraction) / 2, h * (1 + fraction) / 2)


def random_boxes(sizes, shapes, seed):
    """One box a query: its shape drawn from `shapes`, its place uniform among the places where it fits (Sec. 4.2).

    sizes: [Q] (w, h) of the images in pixels. shapes: list of (w, h) as shares of the image's sides. Drawing width and
    height together keeps the policy's areas and its aspects; drawing the area alone would invent an aspect.
    """
    boxes = []
    for row, (width, height) in enumerate(sizes):
        rng = np.random.default_rng([seed, row])  # by row: --limit does not change the boxes that stay
        share_w, share_h = shapes[rng.integers(len(shapes))]
        w, h = share_w * width, share_h * height
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        boxes.append((float(left), float(top), float(left + w), float(top + h)))
    return boxes


def box_shapes(actions, sizes):
    """(w, h) of every REGION action's box, as shares of its image's sides."""
    return [((a.box[2] - a.box[0]) / w, (a.box[3] - a.box[1]) / h)
            for a, (w, h) in zip(actions, sizes) if a.decision == "REGION"]


def all_actions(methods, data, policy, truth, args):
    """{method: [Q] Action} for every method but oracle, which takes the better of `full` and `truth` afterwards."""
    asked = [name for name in CROPPING if name in methods]
    if "random" in methods:  # needs the learned policy's boxes even where its row is not asked for
        asked += [name for name in ("policy", "always") if name not in asked]
    actions = {"full": [FULL_IMAGE] * len(data.queries)}
    if asked:
        actions |= decode_actions(policy, data, asked, args.decode, args.batch_size)
    sizes = [image_size(data, i) for i in range(len(data.queries))]
    if "center" in methods:
        actions["center"] = [region(center_box(size, args.center_fraction)) for size in sizes]
    if "random" in methods:
        shapes = box_shapes(actions["policy"], sizes)
        if not shapes:  # a policy that gave up cropping: its forced boxes are the nearest thing to its distribution
            print("note: the policy crops no query, so `random` takes its shapes from the forced boxes of `always`")
            shapes = box_shapes(actions["always"], sizes)
        if not shapes:
            raise ValueError("the policy wrote no readable box at all, so `random` has no shapes to draw: leave it out")
        actions["random"] = [region(box) for box in random_boxes(sizes, shapes, args.seed)]
    if "oracle" in methods:
        actions["truth"] = [region(truth[i]["box"]) if i in truth else FULL_IMAGE for i in range(len(data.queries))]
    return actions


def region(box):
    """REGION with this box, by no model."""
    return Action("REGION", box, None, "")


def image_size(data, i):
    """(w, h) of query i's image in pixels, from the file's header alone."""
    with Image.open(data.image_path(i)) as image:
        return image.size


# -------------------------------------------------------------------------------------- one code path: action -> row

def score_actions(data, scorer, actions, batch_size=64):
    """Scores of every method's views: {method: float32 [Q, K]}, in pool order (Eq. 1, 2, 4).

    FULL and MALFORMED take the stored full-image feature and encode nothing: text that cannot be read leaves the query
    as it was. Each image is opened once and each different box encoded once, however many methods chose it.
    """
    found = {name: [] for name in actions}
    for start in tqdm(range(0, len(data.queries), batch_size), desc="score", unit="batch", disable=None):
        rows = range(start, min(start + batch_size, len(data.queries)))
        # In the order of the rows, so that each image is opened once; a dict drops the repeats and keeps the order.
        views = list(dict.fromkeys((i, listed[i].box) for i in rows for listed in actions.values()
                                   if listed[i].decision == "REGION"))
        crops = []
        for i, group in groupby(views, key=itemgetter(0)):
            image = data.open_image(i)
            crops += [crop(image, box) for _, box in group]  # Eq. 1
        features = dict(zip(views, scorer.image_features(crops)))
        for i in rows:
            full, candidates = np.asarray(data.full[i], dtype=np.float32), data.candidates(i)  # [D], [K, D]
            seen = np.stack([features.get((i, listed[i].box), full) for listed in actions.values()])  # [methods, D]
            for name, row in zip(actions, scores(seen, candidates)):  # Eq. 2, 4: [methods, K]
                found[name].append(row)
    return {name: np.stack(rows) for name, rows in found.items()}  # [Q, K]


def oracle_of(full, truth, actions, labels):
    """Actions and scores [Q, K] of the better of full image and true box: by rank, then by margin."""
    f, t = metrics(full, labels), metrics(truth, labels)
    # A NaN margin (no positive or no negative in the pool) compares false: the full image stays.
    better = (t["rank"] < f["rank"]) | ((t["rank"] == f["rank"]) & (t["margin"] > f["margin"]))  # [Q]
    chosen = [actions["truth"][i] if better[i] else FULL_IMAGE for i in range(len(better))]
    return chosen, np.where(better[:, None], truth, full)  # [Q, K]


# ------------------------------------------------------------------------------------------------------------ numbers

def behaviour(actions, rank, full_rank, has_positive):
    """Table 4: {"rank=1": {...}, "rank>1": {...}}, split by the full image's rank, over queries with a positive.

    n queries; crop_rate; help, hurt, no_change: shares of the n whose rank got better, worse, or stayed.
    """
    facts = {"crop_rate": np.array([a.decision == "REGION" for a in actions]), "help": rank < full_rank,
             "hurt": rank > full_rank, "no_change": rank == full_rank}  # [Q] each
    groups = {"rank=1": has_positive & (full_rank == 1), "rank>1": has_positive & (full_rank > 1)}
    return {name: {"n": int(group.sum()), **shares(facts, group)} for name, group in groups.items()}


def shares(facts, rows):
    """Mean of each array [Q] over `rows` (a mask or indices): a float, or None where there are no rows."""
    return {name: float(fact[rows].mean()) if fact[rows].size else None for name, fact in facts.items()}


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) of one frame, right and bottom exclusive."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def mean_iou(actions, truth, rows):
    """Mean IoU of the cropped boxes with the true ones over the queries `rows`; None where there is nothing to mean."""
    found = [iou(actions[i].box, truth[i]["box"]) for i in rows if i in truth and actions[i].decision == "REGION"]
    return float(np.mean(found)) if found else None


def numbers(actions, method_scores, full_scores, labels, truth):
    """Every number of one method: means (Tables 1, 2), decisions, Table 4, IoU, and the same by kind where known."""
    per_query, full = metrics(method_scores, labels), metrics(full_scores, labels, ks=())
    cropped = np.array([a.decision == "REGION" for a in actions])
    result = {**summary(per_query), "crop_rate": float(cropped.mean()),
              "malformed": sum(a.decision == "MALFORMED" for a in actions),
              "table4": behaviour(actions, per_query["rank"], full["rank"], per_query["has_positive"])}
    if truth is None:
        return result
    result["mean_iou"] = mean_iou(actions, truth, range(len(actions)))
    facts = {"CondR@1": per_query["recall@1"], "crop_rate": cropped, "help": per_query["rank"] < full["rank"],
             "hurt": per_query["rank"] > full["rank"]}  # [Q] each
    result["kinds"] = {}
    for kind in sorted({fact["kind"] for fact in truth.values()}):
        rows = [i for i, fact in sorted(truth.items()) if fact["kind"] == kind]
        held = [i for i in rows if per_query["has_positive"][i]]
        result["kinds"][kind] = {"n": len(held), **shares(facts, held), "mean_iou": mean_iou(actions, truth, rows)}
    return result


def gap_closed(table):
    """(policy - full) / (oracle - full) in CondR@1, or None where a row is missing or there is no gap."""
    if not {"full", "policy", "oracle"} <= table.keys() or table["full"]["CondR@1"] is None:
        return None
    full, policy, oracle = (table[name]["CondR@1"] for name in ("full", "policy", "oracle"))
    return (policy - full) / (oracle - full) if oracle > full else None


# ---------------------------------------------------------------------------------------------------- what is printed

def cell(value, width=8, digits=3, scale=1):
    return f"{'-' if value is None else format(value * scale, f'.{digits}f'):>{width}}"


def main_table(table):
    """Tables 1 and 2 beside each other, one row a method, and the paper's rows beneath."""
    lines = [f"{'':10}{'Table 1':^48} |{'Table 2':^28} |{'what it did':^26}",
             f"{'method':10}" + "".join(f"{c:>8}" for c in COLUMNS[:6]) + " |"
             + "".join(f"{c:>9}" for c in COLUMNS[6:]) + "  |" + f"{'crop %':>8}{'bad text':>9}{'IoU':>7}"]
    for name, row in table.items():
        percent = [cell(row[c], digits=1, scale=100) for c in COLUMNS[2:6]]  # recalls as the paper prints them
        lines.append(f"{name:10}{cell(row['MRR'])}{cell(row['NDCG'])}" + "".join(percent) + " |"
                     + "".join(cell(row[c], 9) for c in COLUMNS[6:]) + "  |" + cell(row["crop_rate"], 8, 1, 100)
                     + f"{row['malformed']:>9}" + cell(row.get("mean_iou"), 7, 2))
    for dataset, rows in PAPER.items():
        lines.append(f"the paper, {dataset} (other data, other models: for the shape of the table only)")
        for name, row in rows.items():
            lines.append(f"{name:10}" + "".join(cell(v, digits=2) for v in row[:2]) + "".join(
                cell(v, digits=1) for v in row[2:6]) + " |" + "".join(cell(v, 9, 2) for v in row[6:]) + "  |")
    return "\n".join(lines)


def behaviour_table(table):
    """Table 4, in per cent of the queries whose pool holds the positive."""
    chosen = {name: table[name]["table4"] for name in CROPPING if name in table}
    if not chosen:
        return ""
    sizes = next(iter(chosen.values()))
    columns = ("crop_rate", "help", "hurt", "no_change")
    lines = [f"{'Table 4':10}" + "".join(f"{f'original {g}, n = ' + str(sizes[g]['n']):^44}" for g in sizes),
             f"{'in %':10}" + "".join(f"{c.replace('_', ' '):>11}" for c in columns) * 2]
    for name, groups in chosen.items():
        lines.append(f"{name:10}" + "".join(cell(g[c], 11, 1, 100) for g in groups.values() for c in columns))
    return "\n".join(lines)


def kind_table(table, truth_box):
    """CondR@1, crop rate, IoU, help and hurt of each method by kind of query; `truth` always takes the true box."""
    rows = {**table, "truth": truth_box} if truth_box else table
    kinds = next(iter(rows.values())).get("kinds", {})
    if not kinds:
        return ""
    columns = ("CondR@1", "crop_rate", "mean_iou", "help", "hurt")
    lines = [f"{'by kind':10}" + "".join(f"{k + ', n = ' + str(v['n']):^46}" for k, v in kinds.items()),
             f"{'':10}" + "".join(f"{c:>9}" for c in ("CondR@1", "crop %", "IoU", "help %", "hurt %")) * len(kinds)]
    for name, row in rows.items():
        lines.append(f"{name:10}" + "".join(
            cell(k[c], 9, 3) if c == "CondR@1" else cell(k[c], 9, 2) if c == "mean_iou" else cell(k[c], 9, 1, 100)
            for k in row["kinds"].values() for c in columns))
    return "\n".join(lines)


def report(result):
    """All tables as one text."""
    table, gap = result["methods"], result["gap_closed"]
    parts = [f"{result['split']} split of {result['data']}: {result['queries']} queries, {result['with_positive']} of "
             f"them with a positive among their K = {result['K']} candidates", main_table(table),
             behaviour_table(table), kind_table(table, result.get("truth_box"))]
    if gap is not None:
        full, policy, oracle = (table[name]["CondR@1"] for name in ("full", "policy", "oracle"))
        parts.append(f"gap closed in CondR@1: {gap:.0%} = (policy {policy:.3f} - full {full:.3f}) / "
                     f"(oracle {oracle:.3f} - full {full:.3f})")
    return "\n\n".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------- what is written

def write_rows(path, data, actions, method_scores, labels, full_rank):
    """One JSON line a query: what was decided and what it led to. tools/report.py makes its tests from these."""
    rank = metrics(method_scores, labels, ks=())["rank"]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, (query, action) in enumerate(zip(data.queries, actions)):
            file.write(json.dumps({
                "query_id": query.query_id, "decision": action.decision, "box": action.box and list(action.box),
                "p_region": action.p_region, "scores": [float(f"{s:.9g}") for s in method_scores[i]],
                "labels": list(query.labels), "rank": int(rank[i]), "full_rank": int(full_rank[i])}) + "\n")


def trec_names(data):
    """{line of kb.jsonl: entity id without blanks} of every candidate: the TREC formats separate by blanks."""
    used = sorted({j for query in data.queries for j in query.pool})
    return {j: quote(data.entity(j)["entity_id"], safe=":/?&=#%") for j in used}


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
    pictures = [marked, view]
    for k in places:
        with Image.open(data.candidate_image_path(query.pool_image[k])) as candidate:
            pictures.append(candidate.convert("RGB"))
    return [thumbnail(picture, side) for picture in pictures]


def contact_sheet(data, actions, full_scores, method_scores, labels, truth, count, side=150):
    """Before/after picture of `count` queries as a PIL image (see pick and sheet_row for rows and columns)."""
    after, before = metrics(method_scores, labels, ks=()), metrics(full_scores, labels, ks=())
    chosen = pick(actions, after["rank"], before["rank"], after["has_positive"], count)
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

def evaluate(data, scorer, policy, methods, truth, args):
    """Actions, scores and all numbers: (result dict for metrics.json, {method: actions}, {method: scores [Q, K]})."""
    labels = np.array([query.labels for query in data.queries])  # [Q, K]
    actions = all_actions(methods, data, policy, truth, args)
    found = score_actions(data, scorer, actions, args.batch_size)
    if "oracle" in methods:
        actions["oracle"], found["oracle"] = oracle_of(found["full"], found["truth"], actions, labels)
    table = {name: numbers(actions[name], found[name], found["full"], labels, truth) for name in methods}
    result = {"data": args.data, "run": args.run, "split": args.split, "scorer": scorer.identity,
              "decode": args.decode, "seed": args.seed, "center_fraction": args.center_fraction,
              "K": labels.shape[1], "queries": len(labels), "with_positive": int(labels.any(axis=1).sum()),
              "with_truth": 0 if truth is None else len(truth), "methods": table, "gap_closed": gap_closed(table)}
    if "oracle" in methods:
        result["truth_box"] = numbers(actions["truth"], found["truth"], found["full"], labels, truth)
    return result, actions, found


def write_all(folder, result, actions, found, data, truth, sheet):
    """Every file of runs/<run>/eval; metrics.json comes last, so that where it is the others are whole."""
    labels, split = np.array([query.labels for query in data.queries]), result["split"]
    full_rank = metrics(found["full"], labels, ks=())["rank"]
    names = trec_names(data)
    write_qrels(os.path.join(folder, f"{split}.qrels"), data, names)
    for name in result["methods"]:
        path = os.path.join(folder, f"{split}.{name}")
        write_rows(f"{path}.jsonl", data, actions[name], found[name], labels, full_rank)
        write_trec(f"{path}.trec", data, found[name], names, name)
    shown = next((name for name in ("policy", "always", "zeroshot") if name in result["methods"]), None)
    if sheet and shown:  # nothing to look at where no model chose anything
        picture = contact_sheet(data, actions[shown], found["full"], found[shown], labels, truth, sheet)
        with replacing(os.path.join(folder, f"{split}.sheet.png")) as temporary:
            picture.save(temporary, format="png")
    write_json(os.path.join(folder, "metrics.json"), result)


def open_all(args):
    """(data, scorer, policy or None, methods, truth) as the arguments say; every complaint about input comes here."""
    data = load_data(args.data, args.split)
    if args.limit:
        data.queries = data.queries[:args.limit]
    if not data.queries:
        raise ValueError(f"{data.pool_file}: no queries in this split; see its counts in {args.data}/manifest.json")
    truth = read_truth(data)
    methods = choose_methods(args.methods, truth)
    config = open_run(args.run, data, methods)
    args.decode = args.decode or config.get("args", {}).get("decode", "grammar")
    scorer = load_scorer(args.scorer or data.manifest["scorer_name"], args.device)
    load_data(args.data, args.split, scorer.identity)  # refuses a scorer that did not make these pools
    policy = None
    if set(methods) & {*CROPPING, "random"}:
        name = args.policy or config.get("policy")
        if not name:
            raise ValueError(f"{args.run} has no config.json that names a policy: give --policy, or train first")
        policy = open_policy(name, config, args, trained=bool(set(methods) & set(NEED_ADAPTER)))
    return data, scorer, policy, methods, truth


def open_policy(name, config, args, trained):
    """The policy as it was trained: prompt and image size from the run's config, the adapter where it is needed."""
    settings = config.get("args", {})
    prompt = None
    if settings.get("system_prompt"):  # a file's name; the text may be long
        with open(settings["system_prompt"], encoding="utf-8") as file:
            prompt = file.read()
    return load_policy(name, adapter=os.path.join(args.run, "adapter") if trained else None, device=args.device,
                       max_pixels=settings.get("max_pixels"), system_prompt=prompt)


def main(argv=None):
    args = parse_args(argv)
    folder = os.path.join(args.run, "eval")
    try:
        data, scorer, policy, methods, truth = open_all(args)
    except (ValueError, FileNotFoundError) as error:  # wrong input, said in one line; anything else is a bug and shows
        raise SystemExit(f"evaluate.py: {error}") from error
    os.makedirs(folder, exist_ok=True)
    if os.path.isfile(os.path.join(folder, "metrics.json")):
        os.remove(os.path.join(folder, "metrics.json"))  # of the rows that are about to be replaced
    result, actions, found = evaluate(data, scorer, policy, methods, truth, args)
    write_all(folder, result, actions, found, data, truth, args.sheet)
    print(report(result))
    if args.methods is None and truth is None:
        print("no truth.jsonl beside the raw data: no oracle row, no IoU, no table by kind")
    print(f"wrote to {folder}: metrics.json, {args.split}.<method>.jsonl and .trec, {args.split}.qrels"
          + (f", {args.split}.sheet.png" if os.path.isfile(f"{folder}/{args.split}.sheet.png") else ""))


if __name__ == "__main__":
    main()
