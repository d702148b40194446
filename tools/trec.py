"""Rankings in TREC's form: an evaluation's as runs for trec_eval, and another program's run as a row of the tables.

    python -m tools.trec --run runs/world                                     # <split>.<method>.trec, <split>.qrels
    python -m tools.trec --run runs/evqa --data data/evqa --run-file EchoSight=echosight.trec

From the rows that evaluate.py wrote, without a policy. --run-file NAME=PATH puts the pools in the order of a run
(tools/runs.py makes one of EchoSight's and OMGM's result files), writes <split>.NAME.jsonl, adds NAME to metrics.json
and prints the tables anew. An evaluation begins metrics.json anew: call the tool again after it.
"""

import argparse
import os
import re

import numpy as np

from evaluate import METHODS, numbers, rankings, report, write_rows
from scorer import InputError, lock_folder, read_trec, replacing, trec_id, write_json, write_trec
from tools.rows import add_flags, finish, open_rows


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


def ranked_rows(data, places, full):
    """Rows of another program's ranking. Its scores are places, so that a margin means nothing. full: the full image's
    rows, whose action is FULL, too."""
    before = np.array([row["scores"] for row in full], np.float32)  # [Q, K]
    return [{**row, **ranking, "margin": None} for row, ranking in zip(full, rankings(data.labels, places, before))]


def run(args):
    """Everything asked for, to its files -> the tables as lines, where there are new ones, and what was written."""
    data, result, rows, _ = open_rows(args)
    ids, lines = {j: data.entity(j)["entity_id"] for j in np.unique(data.pool).tolist()}, []
    pools, start = [[ids[j] for j in pool] for pool in data.pool.tolist()], os.path.join(args.out, args.split)
    with lock_folder(args.out, "--out"):
        for name, path in (text.split("=", 1) for text in args.run_file):
            places, counts = match_run(data, path, ids)
            rows[name] = ranked_rows(data, places, rows["full"])
            write_rows(f"{start}.{name}.jsonl", rows[name])
            result["methods"][name] = numbers(rows[name])
            result.setdefault("external", {})[name] = counts
            lines.append(f"{name}: {counts['queries']} queries from {counts['file']}; not matched: " + ", ".join(
                f"{what.replace('_', ' ')} {n}" for what, n in counts.items() if what not in ("file", "queries")))
        with replacing(f"{start}.qrels") as temporary, open(temporary, "w", encoding="utf-8") as file:
            for row, pool in zip(rows["full"], pools):
                file.writelines(f"{trec_id(row['query_id'])} 0 {trec_id(entity)} {label}\n"
                                for entity, label in zip(pool, row["labels"]))
        for name, listed in rows.items():
            ranked = ((row["query_id"], pool, row["scores"]) for row, pool in zip(listed, pools))
            write_trec(f"{start}.{name}.trec", ranked, name)
        if args.run_file:
            lines = [report(result), *lines]
            write_json(os.path.join(args.out, "metrics.json"), result)
    return [*lines, f"wrote to {args.out}: {args.split}.<method>.trec, {args.split}.qrels"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--run-file", action="append", default=[], metavar="NAME=PATH",
                        help="adds a ranking by another program, a TREC run; may be given several times")
    args, taken = parser.parse_args(argv), {*METHODS, "zeroshot2"}
    for text in args.run_file:  # the name becomes part of a file name, where @ and + belong to the tools
        if not re.fullmatch(r"[\w-]+=.+", text) or text.partition("=")[0] in taken:
            parser.error("--run-file is NAME=PATH, NAME of letters, digits, - and _, each once, and no method's name")
        taken.add(text.partition("=")[0])
    return args


def main(argv=None):
    finish("trec", run, parse_args(argv))


if __name__ == "__main__":
    main()
