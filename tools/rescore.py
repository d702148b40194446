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
from tqdm import tqdm

from evaluate import cells, rankings, score_views, view_scores, write_rows
from rewards import metrics, summary
from scorer import blend, fuse, load_scorer, lock_folder, read_image, scores
from tools.rows import add_flags, encode_crops, finish, open_rows

METHODS = ("full", "zeroshot", "policy")  # rows of Table 6
COLUMNS = ("R@1", "R@5", "R@10", "CondR@1", "CondR@5", "CondR@10")


class OtherPools:
    """The same pools as another scorer sees them; stands in for Data in score_views.

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


def rescore(data, scorer, rows, actions, batch_size, share=1.0):
    """Rows of the same views of the same pools by another scorer: {method: [Q] rows}."""
    unreadable = np.array([row["unreadable"] for row in rows["full"]])  # [Q]
    seen, _ = score_views(OtherPools(data, scorer, unreadable, batch_size), scorer, actions, batch_size, share)
    found = {name: view_scores(listed, seen) for name, listed in actions.items()}
    for listed in found.values():  # where nothing was seen, the pool's order stays
        listed[unreadable] = -np.arange(listed.shape[1])
    return {name: [{**row, **ranking} for row, ranking in zip(rows[name], rankings(data.labels, listed, found["full"]))]
            for name, listed in found.items()}


def fused(data, rows, actions, args):
    """Rows of policy+fuse: the policy's, each crop's feature mixed with the full image's as (1 - W) full + W crop."""
    full = np.array([row["scores"] for row in rows["full"]], np.float32)  # [Q, K]
    found = full.copy()  # what FULL shows
    for i, feature in encode_crops(data, actions["policy"], args.device, args.batch_size):
        found[i] = scores(blend(data.full[i], feature, args.fuse), data.candidates(i))
    return [{**row, **ranking} for row, ranking in zip(rows["policy"], rankings(data.labels, found, full))]


def table(title, sets):
    """Lines from {scorer name: {method: rows}}; R@K is over all queries, CondR@K over those with a positive."""
    lines = [f"{title:44}" + cells(COLUMNS, 9, "")]
    for scorer, rows in sets.items():
        for name in rows:
            means = summary(metrics([row["scores"] for row in rows[name]], [row["labels"] for row in rows[name]]))
            lines.append(f"{name:16}{scorer:28}" + cells([means[c] for c in COLUMNS], 9, ".3f"))
    return lines


def slug(name):
    """A scorer's name as a part of a file name: a folder's own name, or "open_clip-ViT-B-32-openai"."""
    return re.sub(r"[^\w.-]+", "-", Path(name).resolve().name if os.path.exists(name) else name).strip("-")


def run(args):
    """Everything asked for -> the tables as lines."""
    data, result, rows, actions = open_rows(args, METHODS, needed=("policy",) if args.fuse is not None else ())
    own = data.manifest["scorer"]["name"]
    sets, lines = {own: rows}, []
    with lock_folder(args.out, "--out"):
        for name in args.scorer:
            scorer = load_scorer(name, args.device)
            sets[name] = rescore(data, scorer, rows, actions, args.batch_size, result.get("fuse", 1.0))
            del scorer  # one at a time in memory
            for method, listed in sets[name].items():
                write_rows(os.path.join(args.out, f"{args.split}.{method}@{slug(name)}.jsonl"), listed)
        if args.scorer:
            lines += [*table("Table 6", sets), ""]
        if args.fuse is not None:
            found = fused(data, rows, actions, args)
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
    finish("rescore", run, parse_args(argv))


if __name__ == "__main__":
    main()
