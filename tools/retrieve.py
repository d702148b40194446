"""Table 8: retrieve again over the whole knowledge base, with the full image and with the policy's view.

    python -m tools.retrieve --run runs/world

From the rows that evaluate.py wrote, without a policy: the policy's crops are encoded by the data's own scorer, and the
20 nearest entities by image features are searched exactly, as prepare.py does (App. C of the paper). Writes
retrieval/<split>.full.jsonl and .policy.jsonl. Their scores are cosines with those entities, their labels say whether
an entity is a right answer: these are rankings of the knowledge base and not of the pools.
"""

import argparse
import os

import numpy as np

from evaluate import cells, rankings, write_rows
from prepare import nearest_entities
from rewards import metrics, summary
from scorer import InputError, blend, lock_folder
from tools.rows import add_flags, encode_crops, finish, open_rows

K = 20
COLUMNS = ("R@1", "R@5", "R@10", "R@20")


def retrieve(data, views, device):
    """K nearest entities of each view [Q, D] -> (labels bool [Q, K], cosines float32 [Q, K]), best first."""
    k = min(K, len(np.unique(data.kb_entity)))
    entities, _, cosines = nearest_entities(data.kb_image, data.kb_entity, views, k, device)  # [Q, K]
    ids = {j: data.entity(j)["entity_id"] for j in np.unique(entities).tolist()}
    labels = [[ids[j] in query.positives for j in listed] for query, listed in zip(data.queries, entities.tolist())]
    return np.array(labels), cosines


def run(args):
    """Both retrievals, to their files -> Table 8 as lines."""
    data, result, _, actions = open_rows(args, ("policy",), needed=("policy",))
    for i, query in enumerate(data.queries):
        if not query.positives:
            raise InputError(f"{data.queries.path}:{i + 1}: query {query.query_id!r} names no positives, so recall over"
                             " the whole knowledge base is not defined: prepare the data again")
    views = {"full": np.asarray(data.full, np.float32)}  # [Q, D]
    views["policy"] = views["full"].copy()
    for i, feature in encode_crops(data, actions["policy"], args.device, args.batch_size):
        views["policy"][i] = blend(views["full"][i], feature, result.get("fuse", 1.0))
    found = {name: retrieve(data, listed, args.device) for name, listed in views.items()}
    lines = [f"{'Table 8':16}" + cells(COLUMNS, 8, "")]
    full_rank = metrics(found["full"][1], found["full"][0], ks=())["rank"]  # [Q]
    with lock_folder(args.out, "--out"):
        os.makedirs(os.path.join(args.out, "retrieval"), exist_ok=True)
        for name, (labels, cosines) in found.items():
            listed = [{"query_id": query.query_id, "positives": query.positives, "decision": action.decision,
                       **{field: fields[field] for field in ("labels", "scores", "rank")}, "full_rank": int(before)}
                      for query, action, fields, before in zip(data.queries, actions[name],
                                                               rankings(labels, cosines, cosines), full_rank)]
            write_rows(os.path.join(args.out, "retrieval", f"{args.split}.{name}.jsonl"), listed)
            means = summary(metrics(cosines, labels))
            lines.append(f"{name:16}" + cells([means[column] for column in COLUMNS], 8, ".3f"))
    return lines


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    finish("retrieve", run, parse_args(argv))


if __name__ == "__main__":
    main()
