"""The rows of an evaluation, read and checked against each other and against their data: where every tool begins that
goes on from them. And what these tools do alike: their flags, encoding the crops, their end.

A rows file is <split>.<name>.jsonl in the eval folder. A name is a method ("policy": evaluate.py), another program's
ranking ("EchoSight": tools/trec.py), a method by another scorer ("policy@clip", "policy+fuse": tools/rescore.py), the
crops of a method ("policy.quality": tools/crop_quality.py), or a view that retrieved anew ("retrieval/policy":
tools/retrieve.py). No package but those of evaluate.py.
"""

import argparse
import glob
import json
import os

import numpy as np
import torch
from tqdm import tqdm

from evaluate import encode_views
from policy import Action
from scorer import InputError, load_data, load_scorer, read_json, same_scorer

RANKED = ("query_id", "positives", "decision", "box", "scores", "labels")  # fields that these rows must have
RETRIEVED = ("query_id", "decision", "scores", "labels")
CROPS = ("query_id", "box", "iou", "containment")


def read_lines(path, needed=()):
    """JSON lines as dicts. InputError naming file and line for one that is not whole or lacks a needed field."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not JSON ({error}); make the file anew") from error
            missing = [name for name in needed if not isinstance(row, dict) or name not in row]
            if missing:
                raise InputError(f"{path}:{number}: no field {', '.join(missing)}; run evaluate.py again")
            rows.append(row)
    return rows


def read_rows(folder, split, names=None):
    """{name: rows} of an eval folder, all files or those of `names`; a row is a dict, a line of its file.

    FileNotFoundError for a name that has no file, "full" where no names are given; InputError for a damaged line.
    """
    found = {}
    for place in ("", "retrieval/"):
        start = os.path.join(folder, place + split + ".")
        for path in sorted(glob.glob(glob.escape(start) + "*.jsonl")):
            name = place + path[len(start):-len(".jsonl")]
            if names is None or name in names:
                needed = CROPS if name.endswith(".quality") else RETRIEVED if place else RANKED
                found[name] = read_lines(path, needed)
                check_scores(found[name], path)
    for name in names or ("full",):
        if not found.get(name):
            place, _, method = name.rpartition("/")
            raise FileNotFoundError(f"{os.path.join(folder, place, split)}.{method}.jsonl is missing or empty: run "
                                    f"evaluate.py on split {split} first, with the method {method}")
    return found


def check_scores(rows, path):
    """InputError for a row whose scores are not finite numbers, one a label."""
    for number, row in enumerate(rows, 1):
        scores, labels = row.get("scores", []), row.get("labels", [])
        whole = isinstance(scores, list) and isinstance(labels, list) and len(scores) == len(labels)
        # A NaN compares false, also with infinity.
        if not whole or not all(isinstance(s, (int, float)) and abs(s) < np.inf for s in scores):
            raise InputError(f"{path}:{number}: the scores of query {row['query_id']!r} must be finite numbers, one a "
                             "label; run evaluate.py again")


def check_same(rows, pools, path, owner="`full`"):
    """InputError unless the rows of a file are of these pools, [(query id, labels)], line by line. owner: whose they
    are, in words."""
    if len(rows) != len(pools):
        raise InputError(f"{path} has {len(rows)} rows, {owner} {len(pools)}: one of them is of another evaluation, "
                         "run evaluate.py again or remove the old file")
    for number, (row, pool) in enumerate(zip(rows, pools), 1):
        if (row["query_id"], row["labels"]) != pool:
            raise InputError(f"{path}:{number}: query {row['query_id']!r} does not match that line of {owner}: the "
                             "rows are of different pools, run evaluate.py again or remove the old file")


def read_metrics(folder, split, command):
    """metrics.json of an eval folder. FileNotFoundError or InputError where no evaluation of the split has finished.
    command: what makes one."""
    result = read_json(os.path.join(folder, "metrics.json"), f"no evaluation has finished here; run `{command}`")
    if result.get("split") != split:
        raise InputError(f"{folder}/metrics.json is of split {result.get('split')!r}, not {split!r}: run `{command}`")
    return result


# ------------------------------------------------------------------------------- what tools that go on from rows share

def at_least(least):
    """argparse's type of whole numbers from `least` on."""
    def whole(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return int(text)
    return whole


def add_flags(parser):
    parser.add_argument("--data", default="data/world", help="folder that prepare.py wrote")
    parser.add_argument("--run", default="runs/world", help="folder that train.py wrote and evaluate.py evaluated")
    parser.add_argument("--out", help="folder of the rows, for what is written too; default: eval/ in the run's folder")
    parser.add_argument("--split", default="test", help="split of the data: train, val or test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images a step; memory, not results")


def open_rows(args, methods=None, needed=()):
    """(data, metrics.json, {method: [Q] rows}, {method: [Q] Action}) of an evaluation: of full and those of `methods`
    that it has, by default all. InputError or FileNotFoundError where there is no evaluation, where it is of other
    pools, or where it has no rows of a method that is needed."""
    args.out = args.out or os.path.join(args.run, "eval")
    result = read_metrics(args.out, args.split,
                          f"python evaluate.py --data {args.data} --run {args.run} --split {args.split}")
    names = ["full", *(name for name in result["methods"] if name != "full" and (methods is None or name in methods))]
    if missing := [name for name in needed if name not in names]:
        raise InputError(f"{args.out} has no rows of {missing[0]}: run evaluate.py on {args.run} with that method")
    rows = read_rows(args.out, args.split, names)
    data = load_data(args.data, args.split, limit=len(rows["full"]))
    pools = [(query.query_id, labels) for query, labels in zip(data.queries, data.labels.astype(int).tolist())]
    for name in names:
        check_same(rows[name], pools, os.path.join(args.out, f"{args.split}.{name}.jsonl"), args.data)
    actions = {name: [Action(row["decision"], row["box"] and tuple(row["box"]), row["p_region"], row["text"])
                      for row in rows[name]] for name in names}
    return data, result, {name: rows[name] for name in names}, actions


def encode_crops(data, actions, device, batch_size):
    """(i, feature [D] by the data's own scorer) of each query that one method crops."""
    then = data.manifest["scorer"]
    scorer = load_scorer(then["name"], device, then["dtype"])
    same_scorer(data.folder, data.manifest, scorer)
    crops = [(i, action.box) for i, action in enumerate(actions) if action.decision == "REGION"]
    for start in tqdm(range(0, len(crops), batch_size), desc="encode", unit="batch", disable=None):
        for (i, _), feature in encode_views(data, scorer, crops[start:start + batch_size])[0].items():
            yield i, feature


def finish(tool, run, args):
    """Print the lines that run(args) returns; wrong input is said in one line."""
    try:
        lines = run(args)
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"tools.{tool}: {error}") from error
    print("\n".join(lines))
