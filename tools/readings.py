"""One reading of the method over several training seeds, or two of them against each other.

    python -m tools.readings --runs runs/world runs/world-seed1 runs/world-seed2
    python -m tools.readings --runs runs/ablation/plain-seed* --against runs/ablation/default-seed*
    python -m tools.readings --runs A B C --method policy+fuse --against A B C --against-method policy   # of rescore.py

Two kinds of chance stand beside each other. The range is that of the runs' means: what another training seed does. The
interval resamples entities, all queries of one together, and holds the runs as they are: what other queries would do. A
query's value is its mean over the runs. p is of a paired test over entities of these means, so it knows nothing of
training: believe it where the ranges are apart as well.

From log.jsonl, of the validation MRR: its end, its area (the curve's mean height, so an early rise counts), and the
steps to a threshold, by straight lines between validations: --threshold, or nine tenths of the way from the start to
the end of --against, else of --runs. No model is asked.
"""

import argparse
import os

import numpy as np

from tools.rows import check_same, finish, read_lines, read_rows
from tools.stats import Study, curve_numbers, entities, mean, measures, nine_tenths, pooled
from tools.tables import Table, as_text, head, p_text, ranged, shown, span

MEASURES = ("MRR", "NDCG", "R@1", "CondR@1", "crop =1", "crop >1", "hurt =1", "iou")
WORDS = {"crop =1": "crop % at rank 1", "crop >1": "crop % at rank > 1", "hurt =1": "hurt % at rank 1"}
CAPTION = ("MRR, NDCG, R@1: all queries. CondR@1: those with a positive in the pool; at rank 1, at rank > 1: those by "
           "the rank of the full image; IoU: those at rank > 1, of the box taken or not taken.")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="FOLDER", help="evaluated runs of one reading")
    parser.add_argument("--against", nargs="+", default=[], metavar="FOLDER", help="those of another, same pools")
    parser.add_argument("--split", default="test", help="split that was evaluated: train, val or test")
    parser.add_argument("--method", default="policy", help="whose rows are compared: any method of the evaluations")
    parser.add_argument("--against-method", metavar="METHOD", help="whose rows of --against (default: --method)")
    parser.add_argument("--threshold", type=float, metavar="MRR", help="of the validation MRR, for the steps to it")
    parser.add_argument("--resamples", type=int, default=10000, help="of the bootstrap and of the tests, 200 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    args = parser.parse_args(argv)
    if args.resamples < 200:
        parser.error("--resamples must be 200 or more")
    return args


def open_readings(args):
    """({reading: [{measure: [Q]} a run]}, {reading: [lines of log.jsonl, a run]}, entity of each query [Q]).

    A reading is "runs" or "against". InputError where the runs are of different pools."""
    values, logs, first = {}, {}, None
    for reading, folders, method in (("runs", args.runs, args.method),
                                     ("against", args.against, args.against_method or args.method)):
        for folder in folders:
            rows = read_rows(os.path.join(folder, "eval"), args.split, ("full", method))
            first = first or rows["full"]
            pools = [(row["query_id"], row["labels"]) for row in first]
            for name, listed in rows.items():
                check_same(listed, pools, f"{folder}/eval/{args.split}.{name}.jsonl", f"`full` of {args.runs[0]}")
            values.setdefault(reading, []).append(measures(rows[method], rows["full"]))
            log = os.path.join(folder, "log.jsonl")
            logs.setdefault(reading, []).append(read_lines(log, ("step",)) if os.path.isfile(log) else [])
    return values, logs, entities(first)


def value_rows(values, study):
    """Cells of each measure: mean and range over runs, interval over entities, of both readings; then the test."""
    pairs = [(("runs", m), ("against", m)) for m in MEASURES] if "against" in values else []
    tests, rows = study.compare(pairs), []
    for i, measure in enumerate(MEASURES):
        rows.append([WORDS.get(measure, head(measure))])
        for reading, runs in values.items():
            rows[-1] += [ranged([mean(run[measure]) for run in runs], measure),
                         span(study.interval(reading, measure), measure)]
        rows[-1] += [cell for t in tests[i:i + 1] for cell in (
            shown(t["difference"], measure, True), span((t["low"], t["high"]), measure, True), p_text(t["p"]),
            p_text(t["p_holm"]))]
    return rows


def curve_rows(logs, threshold, width):
    """Cells of the validation curve's numbers, filled up to `width`; none where no run has a curve."""
    if threshold is None:
        return []
    rows = []
    for name, words, form in (("end", "validation MRR, end", "MRR"), ("area", "area under it", "MRR"),
                              ("steps", f"steps to {threshold:.3f}", "steps")):
        rows.append([words])
        for runs in logs.values():
            rows[-1] += [ranged([curve_numbers(log, threshold)[name] for log in runs], form), ""]
        rows[-1] += [""] * (width - len(rows[-1]))
    return rows


def run(args):
    """The table as lines."""
    values, logs, clusters = open_readings(args)
    study = Study({reading: pooled(runs) for reading, runs in values.items()}, clusters, args.resamples, args.seed)
    names = [f"{reading} ({len(runs)})" for reading, runs in values.items()]
    columns = ["", *(cell for name in names for cell in (name, "95 %"))]
    columns += ["difference", "95 %", "p", "p (Holm)"] if args.against else []
    threshold = args.threshold if args.threshold is not None else nine_tenths(logs.get("against", logs["runs"]))
    rows = value_rows(values, study) + curve_rows(logs, threshold, len(columns))
    what = " against ".join(dict.fromkeys(filter(None, (args.method, args.against_method))))
    title = (f"{what} on {args.split}: {len(clusters)} queries about {len(np.unique(clusters))} entities; mean, "
             "(range over runs), [interval over entities]")
    return [as_text(Table("readings", title, columns, rows, CAPTION)), "", CAPTION]


def main(argv=None):
    finish("readings", run, parse_args(argv))


if __name__ == "__main__":
    main()
