"""Rows of an evaluation -> the paper's tables and figures with statistics, its claims checked, and one HTML page.

    python -m tools.report --run runs/world                          # everything: runs/world/report/report.html
    python -m tools.report --run runs/world --tables-only            # no plots, no pictures, no page
    python -m tools.report --run runs/world --runs runs/ablation/* --bench bench/mini-cpu.json

Means are computed anew from the scores and labels of the rows, so a table cannot show a number that its rows do not
hold. No model is loaded. Rows: tools/rows.py. Intervals and tests: tools/stats.py. Numbers as text and the formats of
tables: tools/tables.py. Plots and pictures: tools/plots.py. The page: tools/report.html.j2. The packages are those of
requirements-dev.txt. The file in its order: what goes in, the paper's claims, tables, the page.
"""

import argparse
import os
import re
from dataclasses import dataclass, field

import jinja2
import numpy as np
import pandas as pd

from rewards import metrics
from scorer import InputError, load_data, read_json, replacing, write_json
from tools import plots
from tools.rows import check_same, read_lines, read_metrics, read_rows
from tools.stats import (
    Study, curve_numbers, entities, mean, measures, nine_tenths, operating_curve, pooled,
)
from tools.tables import Table, as_latex, as_markdown, as_text, head, p_text, plain, ranged, shown, span

LABELS = {  # methods in the order of the paper's Table 1; a method that is not here goes by its own name
    "full": "full image", "random": "random box", "center": "center box", "zeroshot": "zero-shot policy",
    "zeroshot2": "zero-shot, second base", "zeroshot_always": "base box, always", "noun_rule": "noun rule",
    "clutter_rule": "clutter rule", "base_best": "base boxes, best decision", "always": "learned box, always",
    "policy": "learned policy", "learned_best": "learned boxes, best decision", "truth": "truth box",
    "oracle": "truth box, best decision", "best16": "best of 16 boxes in hindsight"}
CROPPING = ("zeroshot", "zeroshot2", "always", "policy")  # Table 4 and 7: methods that choose a region by looking
NO_WEIGHT = ("max_prompt_tokens", "checkpointing", "micro_tokens", "eval_every", "val_queries", "save_every",
             "samples_every", "tensorboard", "wandb")  # arguments of train.py that move no weight
SLACK = 0.01  # "at least as good as" means: not worse by more than this
HOLDS, FAILS, OPEN = "holds", "fails", "cannot be told"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/world", help="folder that train.py and evaluate.py wrote")
    parser.add_argument("--split", default="test", help="split that was evaluated: train, val or test")
    parser.add_argument("--runs", nargs="*", default=[], metavar="FOLDER",
                        help="ablation runs for Table 5, evaluated on the same split; names end in -seed<k>; the table "
                             "keeps this order")
    parser.add_argument("--bench", nargs="*", default=[], metavar="JSON", help="files of tools/bench.py, for Table 9")
    parser.add_argument("--data", help="prepared data, for titles and pictures; default: what the rows were made from")
    parser.add_argument("--out", help="folder for what is written; default: RUN/report")
    parser.add_argument("--tables-only", action="store_true", help="no plots, no pictures and no page")
    parser.add_argument("--examples", type=int, default=4, help="queries shown of each kind, 0 or more")
    parser.add_argument("--resamples", type=int, default=10000,
                        help="of the bootstrap and of the tests: 100 or more, and 20 (40) for each test of a table")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    args = parser.parse_args(argv)
    if args.resamples < 100 or args.examples < 0:
        parser.error("--resamples must be 100 or more, --examples 0 or more")
    args.out = args.out or os.path.join(args.run, "report")
    return args


# ------------------------------------------------------------------------------------------------------ what goes in

@dataclass
class Run:
    """One evaluated run, all that the report is made from."""
    args: argparse.Namespace
    metrics: dict                                    # eval/metrics.json: names of data and models; the numbers are ours
    config: dict                                     # config.json of the run, {} where nothing was trained
    log: list                                        # lines of log.jsonl
    rows: dict                                       # {method: [Q] dict}
    study: Study = None                              # of all methods
    curve: dict = field(default_factory=dict)        # {method: points of operating_curve}
    ablations: list = field(default_factory=list)    # of Ablation
    bench: dict = field(default_factory=dict)        # {file name: content}
    notes: list = field(default_factory=list)        # what is missing, and the command that makes it


@dataclass
class Ablation:
    """One trained variant, one seed."""
    reading: str
    seed: int
    args: dict      # arguments of train.py
    values: dict    # {measure: [Q]} of its `policy` rows
    log: list = field(default_factory=list)          # lines of its log.jsonl


def open_run(args):
    """Everything that is read, as a Run; every complaint about input comes from here."""
    folder = os.path.join(args.run, "eval")
    result = read_metrics(folder, args.split, f"python evaluate.py --run {args.run} --split {args.split}")
    config, log = os.path.join(args.run, "config.json"), os.path.join(args.run, "log.jsonl")
    run = Run(args, result, read_json(config, "put it back, or remove it") if os.path.isfile(config) else {},
              read_lines(log, ("step",)) if os.path.isfile(log) else [], read_rows(folder, args.split))
    keep_own(run)
    full, values = run.rows["full"], {}
    for name in sorted(run.rows, key=lambda name: ("@" in name, [*LABELS, name].index(name), name)):
        rows = run.rows[name]
        if name.startswith("retrieval/"):  # the candidates differ from view to view: recall alone can be compared
            hits = metrics([row["scores"] for row in rows], [row["labels"] for row in rows])
            values[name] = {f"R@{k}": hits[f"recall@{k}"] for k in (1, 5, 10, 20)}
        else:  # by another scorer a method is measured against that scorer's full image (Table 6)
            values[name] = measures(rows, run.rows.get(f"full@{name.partition('@')[2]}", full))
    read_ablations(run)
    for name, runs in zip(("with margin", "without margin"), margin_runs(run)):
        if runs:
            values[name] = {"MRR": pooled([ablation.values for ablation in runs])["MRR"]}  # [Q]
    run.study = Study(values, entities(full), args.resamples, args.seed)
    for name, forced in (("policy", "always"), ("zeroshot", "zeroshot_always")):
        if forced in run.rows:
            p = [row["p_region"] if row["decision"] == "REGION" else None for row in run.rows[forced]]
            run.curve[name] = operating_curve(np.array(p, float), values["full"], values[forced])
    run.bench = {os.path.basename(path): read_json(path, "run tools.bench again") for path in args.bench}
    return run


def keep_own(run):
    """Leave in run.rows what is of this evaluation and note the rest; lay the crops' quality into their rows.

    evaluate.py --methods a,b leaves the files of other methods as they were, perhaps of another adapter. What a tool
    made from a method's rows (policy@clip, policy+fuse, policy.quality, retrieval/policy) is of this evaluation if it
    tells of the same decisions, boxes and pools.
    """
    rows, pools = run.rows, pools_of(run)
    known = {"full", *run.metrics.get("methods", {})}
    for name in sorted(rows, key=lambda name: bool(re.search(r"[@+./]", name))):  # methods first
        base = re.split(r"[@+.]", name.removeprefix("retrieval/"))[0]
        if name == base and name in known:
            check_same(rows[name], pools, f"{run.args.split}.{name}.jsonl")
        elif name == base or base not in rows or not same_views(name, rows[name], rows[base]):
            del rows[name]
            run.notes.append(f"{name}: its rows are of an earlier evaluation than metrics.json")
    for name in [name for name in rows if name.endswith(".quality")]:
        found = {row["query_id"]: row for row in rows.pop(name)}
        for row in rows[name.removesuffix(".quality")]:
            its = found.get(row["query_id"], {})
            row |= {"iou crops": its.get("iou"), "containment": its.get("containment"), "judge": its.get("judge")}


def pools_of(run):
    """What all rows must be of: [(query id, labels)] of the full image's."""
    return [(row["query_id"], row["labels"]) for row in run.rows["full"]]


def same_views(name, rows, base):
    """Are these rows, which a tool made from those of a method, about the actions that lie in `base` now?"""
    actions, of_crops = {row["query_id"]: row for row in base}, name.endswith(".quality")
    fields = ("decision", "box") if "/" in name else ("decision", "box", "labels")  # Table 8 has candidates of its own
    told = [query_id for query_id, row in actions.items() if row["decision"] == "REGION" or not of_crops]
    return [row["query_id"] for row in rows] == told and all(
        row[f] == actions[row["query_id"]][f] for row in rows for f in fields if f in row)


def read_ablations(run):
    """Fill run.ablations from --runs. One that is not evaluated yet is left out and named in run.notes."""
    for folder in run.args.runs:
        name, evaluated = os.path.basename(os.path.normpath(folder)), os.path.join(folder, "eval")
        # metrics.json comes last: without it the rows may be of two evaluations.
        if not all(os.path.isfile(os.path.join(evaluated, file))
                   for file in ("metrics.json", f"{run.args.split}.policy.jsonl")):
            run.notes.append(f"{name} is not in Table 5: it has no {run.args.split} rows yet; `make ablations` goes on")
            continue
        rows = read_rows(evaluated, run.args.split, ("policy",))["policy"]
        check_same(rows, pools_of(run), f"{evaluated}/{run.args.split}.policy.jsonl")
        args = read_json(os.path.join(folder, "config.json"), "train the run again")["args"]
        log = os.path.join(folder, "log.jsonl")
        run.ablations.append(Ablation(re.sub(r"-seed\d+$", "", name), args.get("seed", 0), args,
                                      measures(rows, run.rows["full"]),
                                      read_lines(log, ("step",)) if os.path.isfile(log) else []))


def margin_runs(run):
    """(runs with the margin term, runs without), one a training seed: equal to the main run but for seed and weights
    (Table 5, Figure 2). None where its reward is not Eq. 7, which alone has the weights.

    The paper takes the margin away from all the rest, so of several variants the one with most terms is meant.
    """
    args = run.config.get("args", {})
    if args.get("reward") != "delta":
        return [], []
    weights = args.get("reward_weights") or [0]
    apart = ("seed", "reward_weights", *NO_WEIGHT)
    alike = [a for a in run.ablations if all(a.args.get(key) == args.get(key) for key in a.args.keys() | args.keys()
                                             if key not in apart)]
    without = [a for a in alike if (a.args.get("reward_weights") or [1])[-1] == 0]
    most = max((sum(w > 0 for w in a.args["reward_weights"]) for a in without), default=0)
    return (one_a_seed(a for a in alike if weights[-1] and a.args.get("reward_weights") == weights),
            one_a_seed(a for a in without if sum(w > 0 for w in a.args["reward_weights"]) == most))


def one_a_seed(ablations):
    """The first of each training seed: what was trained under the names of two readings would count twice."""
    first = {}
    for ablation in ablations:
        first.setdefault(ablation.seed, ablation)
    return list(first.values())


def open_data(run):
    """The prepared data behind the rows, or None with a note: tables and plots do without it, pictures do not."""
    folder, full = run.args.data or run.metrics.get("data") or "data/world", run.rows["full"]
    try:
        data = load_data(folder, run.args.split)
    except (FileNotFoundError, InputError) as error:
        run.notes.append(f"no pictures and titles: {error}")
        return None
    if len(data) < len(full) or any(data.queries[i].query_id != row["query_id"] for i, row in enumerate(full)):
        run.notes.append(f"no pictures and titles: {folder} holds other queries than the rows; give --data")
        return None
    return data


# ------------------------------------------------------------------------------------------------- the paper's claims

# Text, left, right, slack: left < right, or left <= right where a slack is given. Holm's correction runs over a family:
# the paper's claims are one, and what it does not claim is none of it.
CLAIMS = (
    ("random < center", ("random", "MRR"), ("center", "MRR"), 0),
    ("center < full image", ("center", "MRR"), ("full", "MRR"), 0),
    ("full image <= zero-shot", ("full", "MRR"), ("zeroshot", "MRR"), SLACK),
    ("zero-shot < learned", ("zeroshot", "MRR"), ("policy", "MRR"), 0),
    ("full image < learned, at the first place", ("full", "CondR@1"), ("policy", "CondR@1"), 0),
    ("where the full image is right, learned hurts less than zero-shot", ("policy", "hurt =1"), ("zeroshot", "hurt =1"),
     0),
    ("where it is wrong, learned crops more than zero-shot", ("zeroshot", "crop >1"), ("policy", "crop >1"), 0),
    ("where it is wrong, learned helps more than zero-shot", ("zeroshot", "help >1"), ("policy", "help >1"), 0),
    ("crop rate follows need: full image right < full image wrong", ("policy", "crop =1"), ("policy", "crop >1"), 0),
    ("margin term helps: without < with", ("without margin", "MRR"), ("with margin", "MRR"), 0),
    ("cropping before retrieval does not help: cropped <= full image", ("retrieval/policy", "R@20"),
     ("retrieval/full", "R@20"), SLACK))
SANITY = (
    ("learned box on every query < learned policy: knowing when pays", ("always", "MRR"), ("policy", "MRR"), 0),
    ("noun rule < learned policy: it does not go by the noun alone", ("noun_rule", "MRR"), ("policy", "MRR"), 0),
    ("clutter rule < learned policy: nor by the number of things", ("clutter_rule", "MRR"), ("policy", "MRR"), 0),
    ("learned policy < best of 16 boxes: there is something left to learn", ("policy", "MRR"), ("best16", "MRR"), 0))
UNTOLD = {"with margin": "no runs under Eq. 7 that differ from this one in the margin's weight alone: `make "
                         "ablations`, then --run with one of its delta",
          "retrieval/full": "not measured: `python -m tools.retrieve`"}


def claims(run, listed=CLAIMS):
    """[{text, verdict, measure, slack, note, difference, low, high, p, p_holm, n}] of CLAIMS or SANITY; difference:
    right - left, so that a claim that holds has it above 0. Holm's correction runs over all that could be tested."""
    def held(side):
        return side[1] in run.study.values.get(side[0], {})
    told = [(right, left) for _, left, right, _ in listed if held(left) and held(right)]
    numbers = dict(zip(told, run.study.compare(told)))
    nothing, found = dict.fromkeys(("difference", "low", "high", "d_z", "p", "p_holm"), np.nan), []
    for text, left, right, slack in listed:
        claim = {"text": text, "measure": right[1], "slack": slack, "note": "", "n": 0,
                 **numbers.get((right, left), nothing)}
        certain = True
        if (right, left) not in numbers:
            missing = [side[0] for side in (left, right) if not held(side)]
            claim["note"] = UNTOLD.get(right[0], f"no rows of {', '.join(missing)}")
        elif right[0] == "with margin":
            claim["note"], certain = seeds_note(*margin_runs(run))
        elif np.isnan(claim["p"]):
            claim["note"] = "no query to tell it by"
        found.append(claim | {"verdict": verdict(claim, slack, certain)})
    return found


def verdict(claim, slack, certain=True):
    """HOLDS, FAILS or OPEN. certain: False where p leaves a source of chance out that is large enough to turn it."""
    if np.isnan(claim["low"]):
        return OPEN
    if slack:  # both answers are about the slack: an interval that holds -slack tells neither
        return FAILS if claim["high"] < -slack else HOLDS if claim["low"] > -slack else OPEN
    if not claim["p_holm"] < 0.05 or not certain:
        return OPEN
    return HOLDS if claim["difference"] > 0 else FAILS


def seeds_note(with_term, without):
    """(note, certain) of the margin claim: p knows the chance in the queries and not that in the training, so where
    the seeds overlap it says too much."""
    a, b = ([mean(run.values["MRR"]) for run in runs] for runs in (with_term, without))
    note = (f"{len(a)} and {len(b)} seeds; MRR {min(a):.3f} to {max(a):.3f} with, {min(b):.3f} to {max(b):.3f} without")
    if min(len(a), len(b)) < 2:
        return note + ": too few seeds", False
    apart = min(a) > max(b) or min(b) > max(a)
    return note + ("" if apart else ": the seeds overlap"), apart


# ------------------------------------------------------------------------------------------------------------- tables

def label(name):
    method, _, scorer = name.partition("@")
    base, plus, extra = method.removeprefix("retrieval/").partition("+")
    return LABELS.get(base, base) + (f" + {extra}" if plus else "") + (f", {scorer}" if scorer else "")


def cells(run, method, columns):
    """A method's cells: the mean of a measure ("MRR"), or its interval ("95 MRR")."""
    study = run.study
    return [span(study.interval(method, column[3:]), column[3:]) if column.startswith("95 ") else
            shown(study.mean(method, column), column) for column in columns]


def tests(pairs, measure):
    """Cells difference, 95 %, d_z, p, p (Holm), n of comparisons."""
    return [[shown(t["difference"], m, True), span((t["low"], t["high"]), m, True), shown(t["d_z"], "d_z", True),
             p_text(t["p"]), p_text(t["p_holm"]), str(t["n"])] for t, m in zip(pairs, measure)]


def own_scorer(run):
    """Methods that order the pools by the run's own scorer: not those of Table 6, not the views of Table 8."""
    return [name for name in run.study.values if name in run.rows and "@" not in name and "/" not in name]


def claim_table(found, name, title):
    """The paper's claims, or others, each with its numbers and what they say."""
    rows = [[claim["text"] + (f" ({claim['note']})" if claim["note"] else ""), claim["verdict"], head(claim["measure"]),
             *(line[i] for i in (0, 1, 3, 4))]
            for claim, line in zip(found, tests(found, [claim["measure"] for claim in found]))]
    return Table(name, title, ["claim", "verdict", "of", "difference", "95 %", "p", "p (Holm)"], rows,
                 "The difference is the side that should be larger minus the other. An ordering holds, or fails, where "
                 "p is below .05 after Holm's correction over this table, and cannot be told otherwise; <= means not "
                 f"worse by more than {SLACK}, told by the interval. What is said is about this data and these models "
                 "alone.")


def ranking_tables(run):
    """Tables 1 and 2: one row a method, intervals for the leading column."""
    study, names = run.study, own_scorer(run)
    first = ["MRR", "95 MRR", "NDCG", "R@1", "R@5", "R@10", "R@20", "crop"]
    second = ["CondR@1", "95 CondR@1", "CondR@5", "CondR@10"]
    held = int((~np.isnan(study.values["full"]["CondR@1"])).sum())
    lost = sum(bool(row.get("unreadable")) for row in run.rows["full"])
    base = (run.metrics.get("models") or {}).get("zeroshot2")
    more = (f" The second base is {base}." if base else "") + (
        f" {lost} images could not be read; they count with what retrieval saw." if lost else "")
    return [Table("table1", "Table 1. Re-ranking", ["method", *map(head, first), "bad text"],
                  [[label(name), *cells(run, name, first), f"{study.values[name]['bad'].sum():.0f}"] for name in names],
                  f"{len(study.clusters)} queries about {study.clusters.max() + 1} entities; every mean is over all of "
                  "them, a query without a positive in its pool counts 0. All methods order the same pools, so R@20 is "
                  "the same. Only crop % is over the queries with a positive, as Table 2. Intervals are resampled by "
                  "entity. Bad text: answers that could not be read and left the full image." + more),
            Table("table2", "Table 2. Conditional recall", ["method", *map(head, second)],
                  [[label(name), *cells(run, name, second)] for name in names],
                  f"Over the {held} queries whose pool holds a positive (Eq. 10): what re-ranking alone can change.")]


def test_table(run):
    """Every method against full and zeroshot, on MRR and CondR@1."""
    pairs = [((name, measure), (base, measure)) for measure in ("MRR", "CondR@1") for base in ("full", "zeroshot")
             if base in run.rows for name in own_scorer(run) if name not in ("full", base)]
    found = tests(run.study.compare(pairs), [measure for (_, measure), _ in pairs])
    return Table("tests", "Paired tests against full image and zero-shot",
                 ["difference", "of", "mean", "95 %", "d_z", "p", "p (Holm)", "queries"],
                 [[f"{label(a)} - {label(b)}", m, *line] for ((a, m), (b, _)), line in zip(pairs, found)],
                 f"Randomisation test of {run.args.resamples:,} sign flips by entity, two-sided, corrected over all "
                 "rows of this table; d_z is the mean difference over its standard deviation between queries.")


def behaviour_table(run):
    """Table 4: what the methods that choose do where the full image is right, and where it is wrong."""
    rows, columns = [], ["crop", "95 crop", "help", "95 help", "hurt", "95 hurt", "same"]
    for group, title in (("=1", "rank 1"), (">1", "rank > 1")):
        inside = int((~np.isnan(run.study.values["full"][f"crop {group}"])).sum())
        rows += [[f"{label(name)}, {title}", str(inside), *cells(run, name, [f"{c} {group}" for c in columns])]
                 for name in CROPPING if name in run.rows]
    return Table("table4", "Table 4. Does it crop when it should?",
                 ["method, rank of the full image", "queries", *map(head, columns)], rows,
                 "Queries with a positive in the pool, split by whether the full image already ranks it first. A "
                 "policy that knows when to crop has a low crop rate above and a high one below; help and hurt are "
                 "shares of queries whose rank got better or worse.")


def kind_table(run):
    """What each method does with each kind of query, where the data names kinds."""
    rows, kinds = [], np.array([str(row.get("kind") or "") for row in run.rows["full"]])  # [Q]
    for kind in sorted(set(kinds) - {""}):
        for name in own_scorer(run):
            found = run.study.values[name]
            held = np.where(np.isnan(found["CondR@1"]), np.nan, found["crop"])  # [Q] crops where there is a positive
            facts = (("CondR@1", found["CondR@1"]), ("crop", held), ("iou", found["iou"]),
                     *((fact, np.fmax(found[f"{fact} =1"], found[f"{fact} >1"])) for fact in ("help", "hurt")))
            rows.append([f"{kind}, {label(name)}", str(int((~np.isnan(held[kinds == kind])).sum())),
                         *(shown(mean(values[kinds == kind]), fact) for fact, values in facts)])
    return Table("kinds", "By kind of query", ["kind, method", "queries",
                                               *map(head, ("CondR@1", "crop", "iou", "help", "hurt"))], rows,
                 "Queries with a positive in the pool. IoU: of the box a method takes, or would take, over those of "
                 "them that the full image does not rank first.")


def extension_table(run):
    """The paper's future work, with its cost: policy+fuse and what else has a + in its name."""
    names = [name for name in own_scorer(run) if "+" in name and "policy" in run.rows]
    found = tests(run.study.compare([((name, "MRR"), ("policy", "MRR")) for name in names]), ["MRR"] * len(names))
    return Table("extensions", "Extensions", ["method", "MRR", "CondR@1", "MRR - learned policy", "95 %", "p (Holm)",
                                              head("encodes"), head("seconds")],
                 [[label(name), *cells(run, name, ("MRR", "CondR@1")), line[0], line[1], line[4],
                   *cells(run, name, ("encodes", "seconds"))] for name, line in zip(names, found)],
                 "What the paper leaves to future work, against the learned policy as it is.")


def ablation_table(run):
    """Table 5: a row a reading. Chance has two sources: another seed (the range) and other queries (the interval)."""
    main, groups, rows = run.config.get("args", {}), {}, []
    for ablation in run.ablations:
        groups.setdefault(ablation.reading, []).append(ablation)
    differs = {reading: [f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                         for key, value in runs[0].args.items()
                         if key not in ("seed", *NO_WEIGHT) and main.get(key) != value]
               for reading, runs in groups.items()}
    own = next((reading for reading, found in differs.items() if not found), "this run")
    values = {reading: pooled([a.values for a in runs]) for reading, runs in groups.items()}
    if own not in values and "policy" in run.rows:
        values[own] = run.study.values["policy"]
    study = Study({name: {"MRR": found["MRR"]} for name, found in values.items()}, run.study.clusters,
                  run.study.resamples, run.study.seed) if groups else None
    tested = [reading for reading in groups if own in values and reading != own]
    tested = dict(zip(tested, study.compare([((r, "MRR"), (own, "MRR")) for r in tested]) if tested else []))
    threshold = nine_tenths([a.log for a in groups[own]] if own in groups else [run.log])
    for reading, runs in groups.items():
        test = tested.get(reading, {"difference": np.nan, "p_holm": np.nan})
        curves = [curve_numbers(a.log, threshold or np.nan) for a in runs]
        rows.append([reading, str(len(runs)), ranged([mean(a.values["MRR"]) for a in runs], "MRR"),
                     span(study.interval(reading, "MRR"), "MRR"), shown(test["difference"], "MRR", True),
                     p_text(test["p_holm"]), *(ranged([mean(a.values[m]) for a in runs], m)
                                               for m in ("CondR@1", "crop =1", "crop >1", "iou", "bad")),
                     *(ranged([found[name] for found in curves], form) for name, form in (("area", "MRR"),
                                                                                         ("steps", "steps"))),
                     ", ".join(differs[reading]) or "as this run"])
    to = "a threshold" if threshold is None else f"{threshold:.3f}"
    return Table("table5", "Table 5. Ablations",
                 ["reading", "seeds", "MRR", "95 %", f"- {own}", "p (Holm)", "CondR@1", "crop % at rank 1",
                  "at rank > 1", "IoU", "bad text %", "validation area", f"steps to {to}", "differs from this run in"],
                 rows, "Mean over training seeds, in brackets the range of the seeds. 95 %: resampled by entity, a "
                 f"query's value being its mean over the seeds, and so for the paired test against {own}. p knows "
                 "nothing of the training: two rows whose ranges overlap are not told apart. MRR and bad text: all "
                 "queries; CondR@1 and crop rates: those with a positive, by the full image's rank; IoU: those of "
                 "rank > 1, of the box taken or not. Validation area: mean height of the curve of the validation MRR; "
                 f"steps: to {to}, nine tenths of the way from its start to its end.")


def scorer_table(run):
    """Table 6: the same actions scored by other scorers."""
    columns = [f"{kind}@{k}" for kind in ("R", "CondR") for k in (1, 5, 10)]
    scorers = sorted({name.partition("@")[2] for name in run.rows})  # "", the own scorer, comes first
    own = os.path.basename(str(run.metrics.get("scorer", "own")).partition("@")[0].rstrip("/"))
    rows = [[f"{scorer or own}, {label(method)}", *cells(run, name, columns)]
            for scorer in (scorers if len(scorers) > 1 else ()) for method in ("full", "zeroshot", "policy")
            for name in [f"{method}@{scorer}" if scorer else method] if name in run.rows]
    return Table("table6", "Table 6. Another scorer at test time", ["scorer, method", *map(head, columns)], rows,
                 "The pools and the policy's actions stay, only the scorer that orders the candidates changes; nothing "
                 "is trained again. The first scorer is the one of the training.")


def quality_table(run):
    """Table 7: overlap of the chosen boxes with the target boxes, and the judge's verdicts where one was asked."""
    def counted(name, fact):
        return int((~np.isnan(run.study.values[name][fact])).sum())
    names = [name for name in own_scorer(run) if "+" not in name and any(
        counted(name, fact) for fact in ("iou", "iou crops", "judge"))]
    judged = ["judge"] if any(counted(name, "judge") for name in names) else []
    columns = ["iou crops", "containment", *judged, "iou", "95 iou"]
    return Table("table7", "Table 7. Where it crops", ["method", "crops", "IoU of them", *map(head, columns[1:])],
                 [[label(name), str(max(counted(name, "iou crops"), counted(name, "judge")) or "-"),
                   *cells(run, name, columns)] for name in names],
                 "Left, of methods that choose by looking: each one's own crops against the target's box (the true box "
                 "in the embedded world, a detector's elsewhere), so other queries in each row. IoU: the same queries "
                 "in each row, those with a positive that the full image does not rank first, and the box that the "
                 "method takes, or would take. "
                 "Containment is the share of crops that hold the whole target"
                 + ("; judge is the share of the crops asked about that a vision-language model found sufficient for "
                    "the question." if judged else "."))


def retrieval_table(run):
    """Table 8: the views used to retrieve anew."""
    columns = [f"R@{k}" for k in (1, 5, 10, 20)]
    return Table("table8", "Table 8. Cropping before retrieval", ["view", *map(head, columns)],
                 [[label(name), *cells(run, name, columns)] for name in ("retrieval/full", "retrieval/policy")
                  if name in run.rows],
                 "The knowledge base is searched again with each view. The paper finds a small loss: retrieval needs "
                 "the context that a crop throws away.")


def cost_table(run):
    """Table 9: latency, throughput and peak memory of inference, from tools/bench.py's files."""
    rows = []
    for file, bench in run.bench.items():
        found = bench.get("cases", {}).get("act", {})
        for part, seconds in found.get("median_s", {}).items():
            _, size, answer = part.split()  # "batch 8 grammar"
            rows.append([file.removesuffix(".json"), bench.get("machine", {}).get("device", "?"),
                         str(bench.get("args", {}).get("visual_tokens", "?")), answer, size,
                         f"{seconds / int(size):.3f}", f"{int(size) / seconds:.2f}",
                         f"{found.get('peak_bytes', {}).get(part, np.nan) / 1e6:.0f}".replace("nan", "-")])
    return Table("table9", "Table 9. Cost of inference, random weights",
                 ["bench", "machine", "image tokens", "answer", "batch", "s a query", "queries/s", "peak MB"], rows,
                 "From tools/bench.py: random weights in the shape of the named model; the machine is the bench's, not "
                 "this page's, peak MB of its card, on a CPU of the process. FULL ends at the decision; grammar and "
                 "free write a box, both with the same number of tokens.")


def query_table(run, data):
    """Table 3 in words; the page has it in pictures."""
    def rank(name):
        return f"{run.study.values[name]['rank'][i]:.0f}"
    rows = []
    for heading, chosen in plots.pick(run, run.args.examples):
        for i in chosen:
            row = run.rows["policy"][i]
            rows.append([row["query_id"], heading.split(":")[0], row.get("question", ""), row["decision"],
                         f"{rank('full')} -> {rank('policy')}",
                         *(plots.title_of(data, i, k) for k in plots.places(run, i))])
    return Table("table3", "Table 3. Queries before and after",
                 ["query", "kind", "question", "decision", "rank", "first before", "first after", "positive"], rows,
                 "Drawn evenly from each kind, not picked by hand.", wordy=True)


def as_csv(rows, full):
    """The per-query table of the authors' release, in its columns; ranks are empty where the pool has no positive."""
    after, before = (metrics([row["scores"] for row in listed], [row["labels"] for row in listed], ks=())
                     for listed in (rows, full))
    def rank(found):
        return pd.Series(found["rank"], dtype="Int64").where(before["has_positive"])
    columns = {"example_idx": range(len(rows)), "query_id": [row["query_id"] for row in rows],
               "question": [row.get("question") for row in rows], "has_bbox": [row["box"] is not None for row in rows],
               "bbox": [row["box"] or "" for row in rows], "num_candidates": [len(row["labels"]) for row in rows],
               "original_rank": rank(before), "cropped_rank": rank(after),
               "rank_improvement": before["rank"].astype(int) - after["rank"].astype(int)}
    for name, key in (("mrr", "rr"), ("ndcg", "ndcg")):
        columns |= {f"original_{name}": before[key], f"cropped_{name}": after[key],
                    f"{name}_improvement": after[key] - before[key]}
    return pd.DataFrame({**columns, "generated_text": [row.get("text") for row in rows]}).to_csv(index=False)


# ----------------------------------------------------------------------------------------------------------- the page

SECTIONS = {  # anchor: title, "" for that of the table of this name; plots whose names begin so stand there too
    "curve": "Operating curve", "table3": "Table 3. Queries before and after", "claims": "", "sanity": "", "table1": "",
    "table2": "", "tests": "Paired tests", "table4": "Table 4. Does it crop when it should?", "kinds": "",
    "extensions": "", "table5": "", "figure2": "Figure 2. Margin before and after",
    "table6": "", "table7": "", "table8": "",
    "table9": "", "training": "Training", "pools": "Pools", "run": "Run"}
FOLDED = ("sanity", "tests", "kinds", "table9")  # long tables that few readers want: a click opens them


def headline(run, found):
    """[(number, what it is)]: the few that somebody in a hurry came for."""
    verdicts, means = [claim["verdict"] for claim in found], run.study.mean
    facts = [(f"{verdicts.count(HOLDS)} of {len(verdicts)}", "claims of the paper hold" + "".join(
        f", {verdicts.count(v)} {w}" for v, w in ((FAILS, "fail"), (OPEN, "cannot be told")) if v in verdicts))]
    if "policy" in run.rows:
        facts += [(f"{shown(means('full', m))} → {shown(means('policy', m))}", f"{m}, full image → learned policy")
                  for m in ("CondR@1", "MRR")]
        facts.append((" / ".join(f"{100 * means('policy', f'crop {group}'):.0f} %" for group in ("=1", ">1")),
                      "crop rate where the full image is right / wrong"))
    if {"policy", "best16"} <= run.rows.keys():
        lower, reached, upper = (means(name, "CondR@1") for name in ("full", "policy", "best16"))
        if upper > lower:
            facts.append((f"{100 * (reached - lower) / (upper - lower):.0f} %",
                          "of the gap in CondR@1 between the full image and the best of 16 boxes closed"))
    return facts


def fact_table(name, title, facts):
    """Arguments and names, a row each. The numbers of metrics.json are not among them: the tables have ours."""
    rows = [[key, " ".join(map(str, value)) if isinstance(value, list) else str(value)]
            for key, value in facts.items() if not isinstance(value, dict)]
    return Table(name, title, ["argument", "value"], rows, "", wordy=True)


def split_cases(cases):
    """The first case of each group is seen at once, the others are folded."""
    first = [k for k, case in enumerate(cases) if k == 0 or case.group != cases[k - 1].group]
    return {"cases": [cases[k] for k in first], "more": [case for k, case in enumerate(cases) if k not in first]}


def page(run, tables, drawn, cases, found):
    """The whole report as one HTML file without scripts and without anything to load. cases: {section: [Case]}."""
    named, args = {table.name: table for table in tables}, run.config.get("args", {})
    trained = {key: value for key, value in run.config.items() if key != "args"} | args
    folded = {"run": [fact_table("evaluation", "Evaluation: metrics.json", run.metrics),
                      fact_table("training", "Training: config.json", trained)],
              **{name: [named[name]] for name in FOLDED if name in named}}
    sections = [{"name": name, "title": title or named[name].title, **split_cases(cases.get(name, [])),
                 "table": None if cases.get(name) or name in folded else named.get(name),
                 "folded": folded.get(name, []), "plots": [plot for plot in drawn if plot.name.startswith(name)]}
                for name, title in SECTIONS.items() if title or name in named]
    # Undefined names stop it, so the template cannot show an empty place for what it no longer gets.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
                                     autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"plain": plain, "uri": plots.data_uri}
    subtitle = (f"{run.args.split} split of {run.metrics.get('data', '?')}: {len(run.study.clusters)} queries about "
                f"{run.study.clusters.max() + 1} entities, K = {len(run.rows['full'][0]['labels'])} candidates, scorer "
                f"{run.metrics.get('scorer', '?')}, policy {run.config.get('policy', '?')}, training seed "
                f"{args.get('seed', '?')}")
    return environment.get_template("report.html.j2").render(
        name=os.path.basename(os.path.normpath(run.args.run)), subtitle=subtitle, own=label("policy"), notes=run.notes,
        facts=headline(run, found), badges={HOLDS: ("✓", "good"), FAILS: ("✗", "bad"), OPEN: ("?", "open")},
        sections=[part for part in sections if part["table"] or part["cases"] or part["folded"] or part["plots"]])


# -------------------------------------------------------------------------------------------------------------- stage

def write_report(folder, files, numbers):
    """Write {name: text or bytes}, report.json last. What an earlier report wrote and this one has nothing for goes:
    it would pass for this one's."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "report.json")
    old = read_json(path, "remove it").get("files", []) if os.path.isfile(path) else []
    for name in {os.path.basename(name) for name in old} - files.keys():
        if os.path.isfile(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    for name, content in files.items():
        with replacing(os.path.join(folder, name)) as temporary, open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    write_json(path, {**numbers, "files": sorted(files)})


def finite(value):
    """A number for JSON, None where it is not defined."""
    return None if isinstance(value, float) and np.isnan(value) else value


def numbers(run, found, checks):
    """What report.json holds: means with intervals of every method, the claims, and the sanity checks."""
    study = run.study
    means = {method: {measure: {"mean": finite(mean(column)), "n": int((~np.isnan(column)).sum()),
                                "interval": [finite(bound) for bound in study.interval(method, measure)]}
                      for measure, column in values.items()} for method, values in study.values.items()}
    return {"run": run.args.run, "split": run.args.split, "queries": len(study.clusters),
            "entities": int(study.clusters.max()) + 1, "resamples": study.resamples, "seed": study.seed, "means": means,
            **{name: [{key: finite(value) for key, value in claim.items()} for claim in listed]
               for name, listed in (("claims", found), ("sanity", checks))}, "curve": run.curve, "notes": run.notes}


def main(argv=None):
    args = parse_args(argv)
    try:
        run = open_run(args)
        data = open_data(run)
        found, checks = claims(run), claims(run, SANITY)
        made = [claim_table(found, "claims", "The paper's claims, on this data"),
                claim_table(checks, "sanity", "Sanity checks, not claims of the paper"),
                *ranking_tables(run), test_table(run), query_table(run, data),
                behaviour_table(run), kind_table(run), extension_table(run), ablation_table(run), scorer_table(run),
                quality_table(run), retrieval_table(run), cost_table(run)]
        tables = [table for table in made if table.rows]
        run.notes += [f"{table.title}: nothing was measured for it" for table in made if not table.rows]
        files = {f"{table.name}.tex": as_latex(table) for table in tables}
        files |= {"tables.txt": "\n\n".join(map(as_text, tables)) + "\n",
                  "tables.md": "\n\n".join(map(as_markdown, tables)) + "\n"}
        files |= {f"{args.split}.{name}.csv": as_csv(run.rows[name], run.rows["full"]) for name in own_scorer(run)}
        if not args.tables_only:
            without = margin_runs(run)[1][:1]
            drawn = plots.draw(run, label, without[0].values if without else None)
            files |= {f"{plot.name}.png": plot.png for plot in drawn}
            cases = {"table3": plots.cases(run, data, args.examples) if data else [],
                     "pools": plots.pools(run, data, args.examples) if data else []}
            files["report.html"] = page(run, tables, drawn, cases, found)
        write_report(args.out, files, numbers(run, found, checks))
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"tools.report: {error}") from error
    print("\n\n".join(map(as_text, tables)))
    print("\n".join(["", *(f"note: {note}" for note in run.notes)]))
    print(f"wrote {len(files) + 1} files to {args.out}: tables.txt, tables.md, <table>.tex, {args.split}.<method>.csv, "
          "report.json" + ("" if args.tables_only else ", report.html and its pictures"))


if __name__ == "__main__":
    main()
