"""Table 6, the same crops by another scorer, and views that are crop and full image at once: from an evaluation's rows.

    python -m tools.rescore --run runs/world --scorer mini/scorer2      # Table 6
    python -m tools.rescore --run runs/world --fuse .5                  # policy+fuse: half full image, half crop

The pools and the actions stay as evaluate.py wrote them, nothing is retrieved anew: only the scores change. --scorer
encodes query images, crops, candidate images and texts again and writes <split>.<method>@<scorer>.jsonl for full,
zeroshot and policy. --fuse W takes the data's own scorer and, where the policy crops, scores (1 - W) full + W crop,
both of length 1; it encodes the crops again, nothing else, and writes <split>.policy+fuse.jsonl. No policy is needed.
"""

import argparse
import os
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluate import encode_views, ranked, score_actions, write_rows
from policy import Action
from rewards import metrics, summary
from scorer import (
    InputError, fuse, hold, load_data, load_scorer, normalise, read_image, read_json, same_scorer, scores,
)
from tools.stats import read_rows

METHODS = ("full", "zeroshot", "policy")  # rows of Table 6
COLUMNS = ("R@1", "R@5", "R@10", "CondR@1", "CondR@5", "CondR@10")


def count(text):
    """argparse's type of a number of 1 or more."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_flags(parser):
    """The flags of every tool that goes on from the rows of an evaluation."""
    parser.add_argument("--data", default="data/world", help="folder that prepare.py wrote")
    parser.add_argument("--run", default="runs/world", help="folder that train.py wrote and evaluate.py evaluated")
    parser.add_argument("--out", help="folder of the rows, for what is written too; default: eval/ in the run's folder")
    parser.add_argument("--split", default="test", help="split of the data: train, val or test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=count, default=64, help="images a step; memory, not results")


def open_rows(args, methods):
    """(data, {method: [Q] rows}, {method: [Q] Action}) of an evaluation, for those of `methods` that it has.

    InputError or FileNotFoundError where there is no evaluation, or where it was of other pools.
    """
    args.out = args.out or os.path.join(args.run, "eval")
    remedy = f"run `python evaluate.py --data {args.data} --run {args.run} --split {args.split}` first"
    result = read_json(os.path.join(args.out, "metrics.json"), f"no evaluation has finished here; {remedy}")
    if result.get("split") != args.split:
        raise InputError(f"{args.out} holds an evaluation of split {result.get('split')}: {remedy}")
    names = ["full", *(name for name in methods if name in result["methods"] and name != "full")]
    rows = read_rows(args.out, args.split, names)
    data = load_data(args.data, args.split, limit=len(rows["full"]))
    of_data = [(query.query_id, labels) for query, labels in zip(data.queries, data.labels.astype(int).tolist())]
    for name in names:
        if [(row["query_id"], row["labels"]) for row in rows[name]] != of_data:
            raise InputError(f"{args.out}/{args.split}.{name}.jsonl is of other pools than {args.data}: {remedy}")
    actions = {name: [Action(row["decision"], row["box"] and tuple(row["box"]), row["p_region"], row["text"])
                      for row in rows[name]] for name in names}
    return data, {name: rows[name] for name in names}, actions


def own_scorer(data, device):
    """The scorer that the data was prepared with."""
    then = data.manifest["scorer"]
    scorer = load_scorer(then["name"], device, then["dtype"])
    same_scorer(data.folder, data.manifest, scorer)
    return scorer


class OtherPools:
    """The same pools as another scorer sees them; stands in for Data in score_actions.

    unreadable: bool [Q], the queries whose image has no feature; whoever scores them must not look at the result.
    """

    def __init__(self, data, scorer, unreadable, batch_size):
        self.data, self.open_image = data, data.open_image
        self.pictures, self.entities = np.unique(data.pool_image), np.unique(data.pool)  # [P], [E], sorted
        # A row of zeros is prepare.py's mark for an entity without text (Eq. 3): it has none for this scorer either.
        written = [e for e, j in enumerate(self.entities.tolist()) if data.kb_text[j].any()]

        def encode(keys, load, features, what):
            parts = [features([load(key) for key in keys[start:start + batch_size]])
                     for start in tqdm(range(0, len(keys), batch_size), desc=what, unit="batch", disable=None)]
            return np.concatenate([np.zeros((0, scorer.dim), np.float32), *parts])  # [keys, D]

        self.image = encode(self.pictures.tolist(), lambda m: read_image(data.candidate_image_path(m)),
                            scorer.image_features, "candidates")  # [P, D]
        self.text = np.zeros((len(self.entities), scorer.dim), np.float32)  # [E, D]
        self.text[written] = encode(self.entities[written].tolist(), lambda j: data.entity(j)["text"],
                                    scorer.text_features, "texts")
        self.full = np.ones((len(data), scorer.dim), np.float32)  # [Q, D]
        self.full[~unreadable] = encode(np.flatnonzero(~unreadable).tolist(), data.open_image, scorer.image_features,
                                        "queries")

    def __len__(self):
        return len(self.data)

    def candidates(self, i):
        """Candidate vectors of query i by Eq. 3: float32 [K, D]."""
        return fuse(self.image[np.searchsorted(self.pictures, self.data.pool_image[i])],
                    self.text[np.searchsorted(self.entities, self.data.pool[i])])


def rescore(data, scorer, rows, actions, batch_size):
    """Rows of the same views of the same pools by another scorer: {method: [Q] rows}."""
    unreadable = np.array([row["unreadable"] for row in rows["full"]])  # [Q]
    found, _ = score_actions(OtherPools(data, scorer, unreadable, batch_size), scorer, actions, batch_size)
    for listed in found.values():  # where nothing was seen, the pool's order stays
        listed[unreadable] = -np.arange(listed.shape[1])
    return {name: [{**row, **fields} for row, fields in zip(listed, ranked(data.labels, found[name], found["full"]))]
            for name, listed in rows.items()}


def fused(data, scorer, rows, actions, weight, batch_size):
    """Rows of policy+fuse: the policy's, each crop's feature mixed with the full image's as (1 - weight) full + weight
    crop."""
    full = np.array([row["scores"] for row in rows["full"]], np.float32)  # [Q, K]
    found = full.copy()  # what FULL shows
    crops = [(i, action.box) for i, action in enumerate(actions["policy"]) if action.decision == "REGION"]
    for start in tqdm(range(0, len(crops), batch_size), desc="fuse", unit="batch", disable=None):
        for (i, _), feature in encode_views(data, scorer, crops[start:start + batch_size])[0].items():
            # Of length 1 first: the weight is the share that the crop has.
            view = (1 - weight) * normalise(data.full[i]) + weight * normalise(feature)  # [D]
            found[i] = scores(view, data.candidates(i))
    return [{**row, **fields} for row, fields in zip(rows["policy"], ranked(data.labels, found, full))]


def table(title, sets):
    """Lines from {scorer name: {method: rows}}: recalls in per cent, conditional ones as shares."""
    lines = [f"{title:44}" + "".join(f"{column:>9}" for column in COLUMNS)]
    for scorer, rows in sets.items():
        for name in rows:
            means = summary(metrics([row["scores"] for row in rows[name]], [row["labels"] for row in rows[name]]))
            cells = ["-" if means[c] is None else f"{means[c] * 100:.1f}" if c[0] == "R" else f"{means[c]:.3f}"
                     for c in COLUMNS]
            lines.append(f"{name:16}{scorer:28}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def slug(name):
    """A scorer's name as a part of a file name: a folder's own name, or "open_clip-ViT-B-32-openai"."""
    return re.sub(r"[^\w.-]+", "-", Path(name).resolve().name if os.path.exists(name) else name).strip("-")


def run(args):
    """Everything asked for -> the tables as lines."""
    data, rows, actions = open_rows(args, METHODS)
    if args.fuse is not None and "policy" not in rows:
        raise InputError(f"--fuse needs the rows of the policy: run evaluate.py on {args.run} with the method policy")
    own = data.manifest["scorer"]["name"]
    sets, lines = {own: rows}, []
    with hold(args.out, "--out"):
        for name in args.scorer:
            scorer = load_scorer(name, args.device)
            sets[name] = rescore(data, scorer, rows, actions, args.batch_size)
            del scorer  # one at a time in memory
            for method, listed in sets[name].items():
                write_rows(os.path.join(args.out, f"{args.split}.{method}@{slug(name)}.jsonl"), listed)
        if args.scorer:
            lines += [*table("Table 6", sets), ""]
        if args.fuse is not None:
            found = fused(data, own_scorer(data, args.device), rows, actions, args.fuse, args.batch_size)
            write_rows(os.path.join(args.out, f"{args.split}.policy+fuse.jsonl"), found)
            shown = {"full": rows["full"], "policy": rows["policy"], "policy+fuse": found}
            lines += table(f"{1 - args.fuse:g} full image + {args.fuse:g} crop", {own: shown})
    return lines


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--scorer", action="append", default=[], metavar="NAME",
                        help="another scorer, as for prepare.py; may be given several times")
    parser.add_argument("--fuse", type=float, metavar="W", help="weight of the crop beside the full image, 0 to 1")
    args = parser.parse_args(argv)
    if not args.scorer and args.fuse is None or args.fuse is not None and not 0 <= args.fuse <= 1:
        parser.error("nothing to do: give --scorer NAME, or --fuse W with W from 0 to 1")
    if len({slug(name) for name in args.scorer}) < len(args.scorer):
        parser.error("two --scorer would be written under one name: rename a folder, or call the tool once for each")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        lines = run(args)
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"tools.rescore: {error}") from error
    print("\n".join(lines))


if __name__ == "__main__":
    main()
