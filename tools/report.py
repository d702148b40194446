"""Rows of evaluate.py -> the paper's tables and figures with statistics, its claims checked, and one HTML page.

    python -m tools.report --run runs/world                          # everything: runs/world/report/report.html
    python -m tools.report --run runs/world --tables-only            # text, Markdown and LaTeX; needs no matplotlib
    python -m tools.report --run runs/world --runs runs/ablation/* --bench bench/mini-cpu.json

Means are computed anew from the scores and labels of the rows, so a table cannot show a number that its rows do not
hold. No model is loaded. Three rules for every number:
* Queries about one entity are not independent. What is resampled (intervals) and what changes its sign (tests) is the
  entity with all its queries, never the single query.
* Every interval is a 95 % percentile bootstrap of the same resamples, so differences of methods are paired.
* p is of a two-sided randomisation test: were the two methods interchangeable, the sign of an entity's difference would
  be a coin's. Tests that stand in one table are corrected together (Holm).

The file in its order: what goes in, statistics, the paper's claims, tables, their three formats, Table 3's queries,
plots, the page.
"""

import argparse
import base64
import glob
import html
import importlib
import io
import json
import os
import re
from dataclasses import dataclass, field

import numpy as np
from PIL import ImageDraw

from rewards import metrics
from scorer import crop, load_data, read_image, read_json, replacing, write_json

LABELS = {  # methods in the order of the paper's Table 1; a method that is not here goes by its own name
    "full": "full image", "random": "random box", "center": "center box", "zeroshot": "zero-shot policy",
    "zeroshot2": "zero-shot, second base", "zeroshot_always": "zero-shot box, always", "always": "learned box, always",
    "policy": "learned policy", "truth": "true box, always", "oracle": "oracle"}
NEEDED = ("query_id", "question", "positives", "decision", "box", "scores", "labels")  # of a row; others are optional
CROPPING = ("zeroshot", "zeroshot2", "always", "policy")  # Table 4 and 7: methods that choose a region by looking
BLOCK = 500  # resamples at a time: BLOCK x entities numbers are held, not all 10,000 x entities
NO_WEIGHT = ("max_prompt_tokens", "checkpointing", "micro", "eval_every", "val_queries", "save_every", "samples_every",
             "max_kl", "when_sick", "tensorboard", "wandb", "log_level")  # arguments of train.py that move no weight
SLACK = 0.01  # "at least as good as" means: not worse by more than this
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7A7A7A"  # told apart by colour-blind readers (Okabe-Ito)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/world", help="folder that train.py and evaluate.py wrote")
    files.add_argument("--split", default="test", help="split that was evaluated: train, val or test")
    files.add_argument("--runs", nargs="*", default=[], metavar="FOLDER",
                       help="ablation runs for Table 5, evaluated on the same split; names end in -seed<k>; the table "
                            "keeps this order")
    files.add_argument("--bench", nargs="*", default=[], metavar="JSON", help="files of tools/bench.py, for Table 9")
    files.add_argument("--data", help="prepared data, for titles and pictures; default: what the rows were made from")
    files.add_argument("--out", help="folder for what is written; default: RUN/report")
    what = parser.add_argument_group("what is made")
    what.add_argument("--tables-only", action="store_true", help="no plots and no page; matplotlib is not needed")
    what.add_argument("--examples", type=int, default=4, help="queries shown of each kind of success and failure, >= 0")
    what.add_argument("--resamples", type=int, default=10000, help="of the bootstrap and of the tests, 100 or more")
    what.add_argument("--seed", type=int, default=0, help="of the resamples")
    args = parser.parse_args(argv)
    if args.resamples < 100 or args.examples < 0:
        parser.error("--resamples must be 100 or more, --examples 0 or more")
    args.out = args.out or os.path.join(args.run, "report")
    return args


# ------------------------------------------------------------------------------------------------------ what goes in

@dataclass
class Study:
    """One evaluated run. values[method][measure]: float64 [Q], NaN where the measure is not defined for the query."""
    args: argparse.Namespace
    metrics: dict                                       # eval/metrics.json
    config: dict                                        # config.json of the run, {} where nothing was trained
    log: list                                           # lines of log.jsonl
    rows: dict                                          # {method: [Q] dict}
    values: dict                                        # {method: {measure: [Q]}}
    clusters: np.ndarray                                # int [Q], the entity of each query, from 0
    replicates: dict = field(default_factory=dict)      # {(method, measure): [resamples] means}
    retrieved: dict = field(default_factory=dict)       # {view: {"R@k": [Q]}} of the retrieval stage (Table 8)
    ablations: list = field(default_factory=list)       # of Ablation
    bench: dict = field(default_factory=dict)           # {file name: content}
    notes: list = field(default_factory=list)           # what is missing, and the command that makes it


@dataclass
class Ablation:
    """One trained variant, one seed."""
    reading: str
    seed: int
    args: dict      # arguments of train.py
    values: dict    # {measure: [Q]} of its `policy` rows


def read_lines(path, needed=()):
    """JSON lines as dicts. ValueError naming file and line for one that is not whole or lacks a needed field."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); make the file anew") from error
            missing = [name for name in needed if not isinstance(row, dict) or name not in row]
            if missing:
                raise ValueError(f"{path}:{number}: no field {', '.join(missing)}; run evaluate.py again")
            rows.append(row)
    return rows


def row_files(folder, split):
    """{method: path} of an eval folder. test.policy@clip.jsonl holds the rows of policy@clip."""
    pattern = os.path.join(glob.escape(folder), f"{split}.*.jsonl")
    return {os.path.basename(path)[len(split) + 1:-len(".jsonl")]: path for path in sorted(glob.glob(pattern))}


def read_rows(folder, split, result=None):
    """{method: [Q] rows} of an eval folder, in the order of LABELS; all about the same queries in the same order.

    result: metrics.json, to leave out files that are not of its evaluation: those may be about other queries.
    """
    paths = row_files(folder, split)
    paths = drop_old(paths, result)[0] if result else paths
    if "full" not in paths:
        raise FileNotFoundError(f"{folder}/{split}.full.jsonl is missing: run evaluate.py on split {split} first, "
                                "`full` among its methods; every other method is compared with it")
    ranks = {name: place for place, name in enumerate(LABELS)}
    order = sorted(paths, key=lambda name: ("@" in name, ranks.get(name, len(ranks)), name))
    rows = {name: read_lines(paths[name], NEEDED) for name in order}
    if not rows["full"]:
        raise ValueError(f"{paths['full']} has no rows: run evaluate.py again")
    for name in order:
        check_same(rows[name], rows["full"], paths[name], paths["full"])
    return rows


def drop_old(rows, result):
    """({method: anything} of the evaluation that wrote metrics.json, names of the others).

    evaluate.py --methods a,b leaves the files of other methods as they were, perhaps of another adapter.
    """
    known = {"full", *result.get("methods", {}), *(["truth"] if "truth_box" in result else [])}
    scorers = {"", *(result.get("test_scorers") or {})}
    old = [name for name in rows if name.partition("@")[0] not in known or name.partition("@")[2] not in scorers]
    return {name: listed for name, listed in rows.items() if name not in old}, old


def check_same(rows, full, path, full_path):
    """ValueError unless two files are about the same queries with the same labels: a pair is compared row by row."""
    if len(rows) != len(full):
        raise ValueError(f"{path} has {len(rows)} rows, {full_path} {len(full)}: one of them is of another evaluation, "
                         "run evaluate.py again or remove the old file")
    for number, (row, other) in enumerate(zip(rows, full), 1):
        if row["query_id"] != other["query_id"] or row["labels"] != other["labels"]:
            raise ValueError(f"{path}:{number}: query {row['query_id']!r} does not match line {number} of {full_path}: "
                             "the rows are of different pools, run evaluate.py again or remove the old file")
        scores = row["scores"] if isinstance(row["scores"], list) else ()
        # abs: a NaN compares false
        if [isinstance(s, (int, float)) and abs(s) < np.inf for s in scores] != [True] * len(row["labels"]):
            raise ValueError(f"{path}:{number}: the scores of query {row['query_id']!r} must be {len(row['labels'])} "
                             "finite numbers; run evaluate.py again")


def measures(rows, full_rows):
    """{measure: float64 [Q]} of one method's rows; NaN = not defined there, so that every mean skips it.

    MRR, NDCG, R@k: all queries. CondR@k: queries whose pool holds a positive (Eq. 10). crop, bad: was a region chosen,
    was the answer unreadable. For g in "=1", ">1", the full image's rank, over queries with a positive (Table 4):
    crop g, help g, hurt g, same g. margin, margin gain: of the view, and minus the full image's. iou, containment,
    seconds, encodes: as evaluate.py wrote them.
    """
    per_query = metrics([row["scores"] for row in rows], [row["labels"] for row in rows])
    before = metrics([row["scores"] for row in full_rows], [row["labels"] for row in full_rows], ks=())
    held = per_query["has_positive"]  # [Q]
    found = {"MRR": per_query["rr"], "NDCG": per_query["ndcg"]}
    for k in (1, 5, 10, 20):
        found[f"R@{k}"] = per_query[f"recall@{k}"]
        found[f"CondR@{k}"] = np.where(held, per_query[f"recall@{k}"], np.nan)
    found["crop"] = np.array([row["decision"] == "REGION" for row in rows], dtype=np.float64)
    found["bad"] = np.array([row["decision"] == "MALFORMED" for row in rows], dtype=np.float64)
    rank, full_rank = per_query["rank"], before["rank"]
    for group, inside in (("=1", held & (full_rank == 1)), (">1", held & (full_rank > 1))):
        for name, fact in (("crop", found["crop"]), ("help", rank < full_rank), ("hurt", rank > full_rank),
                           ("same", rank == full_rank)):
            found[f"{name} {group}"] = np.where(inside, fact, np.nan).astype(np.float64)
    found["rank"] = rank.astype(np.float64)
    found["margin"], found["margin gain"] = per_query["margin"], per_query["margin"] - before["margin"]
    for name in ("iou", "containment", "seconds", "encodes"):
        found[name] = np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
    return found


def full_of(name, rows):
    """The rows of the full image that a method is measured against: those of its own scorer (Table 6)."""
    own = f"full@{name.split('@')[1]}" if "@" in name else "full"
    return rows[own] if own in rows else rows["full"]


def entities(rows):
    """int [Q]: which entity a query is about, by its first positive. A query without one stands for itself."""
    names = [row["positives"][0] if row["positives"] else f"query {row['query_id']}" for row in rows]
    return np.unique(names, return_inverse=True)[1]


def read_ablations(study):
    """Ablation list of --runs. One that is not evaluated yet is left out and named in study.notes."""
    split, found = study.args.split, []
    for folder in study.args.runs:
        name = os.path.basename(os.path.normpath(folder))
        path = os.path.join(folder, "eval", f"{split}.policy.jsonl")
        # metrics.json comes last: without it the rows may be of two evaluations.
        if not os.path.isfile(path) or not os.path.isfile(os.path.join(folder, "eval", "metrics.json")):
            study.notes.append(f"{name} is not in Table 5: it has no {split} rows yet; `make ablations` goes on")
            continue
        rows = read_lines(path, NEEDED)
        check_same(rows, study.rows["full"], path, f"the rows of {study.args.run}")
        config = read_json(os.path.join(folder, "config.json"), "train the run again")["args"]
        found.append(Ablation(re.sub(r"-seed\d+$", "", name), config.get("seed", 0), config,
                              measures(rows, study.rows["full"])))
    return found


def read_retrieval(study):
    """{view: {"R@k": [Q]}} of eval/retrieval, where the index was searched again with each view; {} where it was not.

    The candidates differ from view to view here, so nothing but recall can be compared.
    """
    found = {}
    for name in ("full", "policy") if study.metrics.get("retrieval_stage") else ():
        path = os.path.join(study.args.run, "eval", "retrieval", f"{study.args.split}.{name}.jsonl")
        rows = read_lines(path, ("query_id", "scores", "labels")) if os.path.isfile(path) else []
        if [row["query_id"] for row in rows] != [row["query_id"] for row in study.rows["full"]]:
            raise ValueError(f"{path} is missing or has other queries than the pools: run evaluate.py "
                             "--retrieval-stage again")
        hits = metrics([row["scores"] for row in rows], [row["labels"] for row in rows])
        found[name] = {f"R@{k}": hits[f"recall@{k}"] for k in (1, 5, 10, 20)}
    return found


def open_study(args):
    """Everything that is read, as a Study; every complaint about input comes from here."""
    folder = os.path.join(args.run, "eval")
    result = read_json(os.path.join(folder, "metrics.json"), f"run `python evaluate.py --run {args.run}`")
    if result.get("split") != args.split:
        raise ValueError(f"{folder}/metrics.json is of split {result.get('split')!r}, not {args.split!r}: run "
                         f"`python evaluate.py --run {args.run} --split {args.split}`")
    rows = read_rows(folder, args.split, result)
    old = drop_old(row_files(folder, args.split), result)[1]
    config, log = os.path.join(args.run, "config.json"), os.path.join(args.run, "log.jsonl")
    study = Study(args, result, read_json(config, "put it back, or remove it") if os.path.isfile(config) else {},
                  read_lines(log, ("step",)) if os.path.isfile(log) else [], rows,
                  {name: measures(listed, full_of(name, rows)) for name, listed in rows.items()},
                  entities(rows["full"]))
    study.notes = [f"{name}: its rows are of an earlier evaluation than metrics.json" for name in old]
    study.ablations, study.retrieved = read_ablations(study), read_retrieval(study)
    study.bench = {os.path.basename(path): read_json(path, "run tools.bench again") for path in args.bench}
    return study


# --------------------------------------------------------------------------------------------------------- statistics

def cluster_sums(values, clusters):
    """Sums over each cluster: [Q, V] -> [C, V]."""
    sums = np.zeros((int(clusters.max()) + 1, values.shape[1]))
    np.add.at(sums, clusters, values)
    return sums  # [C, V]


def bootstrap(values, clusters, resamples=10000, seed=0):
    """Means of `resamples` samples of clusters drawn with replacement: [resamples, V].

    values: float [Q, V], NaN = not counted. clusters: int [Q]. A mean is the drawn sums over the drawn counts, so an
    entity with many queries weighs as many: what is estimated is the mean over queries. NaN where a sample has none.
    """
    defined = ~np.isnan(values)
    sums, counts = cluster_sums(np.where(defined, values, 0.0), clusters), cluster_sums(defined, clusters)  # [C, V]
    rng, number = np.random.default_rng(seed), len(sums)
    means = []
    for start in range(0, resamples, BLOCK):
        # How often each cluster is drawn says all about a sample: one matrix product instead of a loop over samples.
        drawn = rng.multinomial(number, np.full(number, 1 / number), min(BLOCK, resamples - start)).astype(float)
        with np.errstate(invalid="ignore"):  # 0 / 0, a sample without any query that counts, is NaN on purpose
            means.append((drawn @ sums) / (drawn @ counts))  # [block, V]
    return np.concatenate(means)


def interval(replicates):
    """(low, high) of the 95 % percentile interval, or None where no resample has a value."""
    kept = replicates[~np.isnan(replicates)]
    return tuple(float(v) for v in np.percentile(kept, (2.5, 97.5))) if kept.size else None


def flip_p(differences, clusters, rounds=10000, seed=0):
    """p values [T] of a paired, two-sided randomisation test: sign flips of whole clusters.

    differences: float [Q, T], NaN = not counted. p = (1 + flips at least as extreme) / (1 + flips): never 0, as the
    data themselves are one of the flips.
    """
    totals = cluster_sums(np.nan_to_num(differences), clusters)  # [C, T]; the count never changes, so sums will do
    # The same terms summed in another order may differ in the last bits, and a tie is to count as extreme.
    observed = np.abs(totals.sum(axis=0)) - 1e-9 * np.abs(totals).sum(axis=0)
    rng, hits = np.random.default_rng(seed), np.zeros(totals.shape[1])
    for start in range(0, rounds, BLOCK):
        signs = 2.0 * rng.integers(0, 2, (min(BLOCK, rounds - start), len(totals))) - 1.0  # [block, C]
        hits += (np.abs(signs @ totals) >= observed).sum(axis=0)
    return (1 + hits) / (1 + rounds)


def holm(p):
    """Holm's correction of p values [T]: the i-th smallest times (T - i), never below a smaller one's, at most 1."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    adjusted = np.empty_like(steps)
    adjusted[order] = steps
    return adjusted


def effect(difference):
    """(mean, d_z, n) of paired differences [Q], NaN left out: d_z = mean / standard deviation, None where it is 0."""
    kept = difference[~np.isnan(difference)]
    if not kept.size:
        return None, None, 0
    deviation = kept.std(ddof=1) if kept.size > 1 else 0.0
    return float(kept.mean()), float(kept.mean() / deviation) if deviation > 0 else None, int(kept.size)


def mean(values):
    """Mean of the values that are defined, None where there is none."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else None


def resample(study):
    """Fill study.replicates: one bootstrap of all methods and measures together, so that they are paired."""
    names = [(method, measure) for method, found in study.values.items() for measure in found]
    values = np.stack([study.values[method][measure] for method, measure in names], axis=1)  # [Q, V]
    means = bootstrap(values, study.clusters, study.args.resamples, study.args.seed)
    study.replicates = {name: means[:, i] for i, name in enumerate(names)}


def compare(study, pairs):
    """[{method, base, measure, difference, low, high, d_z, p, p_holm, n}] of (method, base, measure) pairs.

    difference: mean of method - base over queries. p_holm is corrected over all of `pairs`.
    """
    if not pairs:
        return []
    values, replicates = study.values, study.replicates
    differences = np.stack([values[a][m] - values[b][m] for a, b, m in pairs], axis=1)  # [Q, T]
    p = flip_p(differences, study.clusters, study.args.resamples, study.args.seed)
    found = []
    for (a, b, m), column, value, corrected in zip(pairs, differences.T, p, holm(p)):
        middle, d_z, n = effect(column)
        low, high = interval(replicates[a, m] - replicates[b, m]) or (None, None)
        found.append({"method": a, "base": b, "measure": m, "difference": middle, "low": low, "high": high,
                      "d_z": d_z, "p": float(value), "p_holm": float(corrected), "n": n})
    return found


# ------------------------------------------------------------------------------------------------- the paper's claims

@dataclass
class Claim:
    """One ordering of the paper. difference is right side - left side, so a claim that holds has it above 0."""
    text: str
    measure: str
    slack: float = 0.0           # 0: right must be above left; above 0: right must not be below left by more than this
    difference: float = None
    low: float = None
    high: float = None
    p: float = None
    p_holm: float = None
    n: int = 0
    note: str = ""
    told: bool = True            # False: p leaves a source of chance out that is large enough to turn the answer

    @property
    def verdict(self):
        """One of HOLDS, FAILS, OPEN. An ordering is only told where p is below .05 after Holm's correction."""
        if self.difference is None or self.low is None:
            return OPEN
        if self.slack:
            # Both answers are about the slack: an interval that holds -slack tells neither.
            return FAILS if self.high < -self.slack else HOLDS if self.low > -self.slack else OPEN
        if self.p_holm is None or self.p_holm >= 0.05 or not self.told:
            return OPEN
        return HOLDS if self.difference > 0 else FAILS


PAIRED = (  # text, left, right, measure, slack: the claim is left < right, or left <= right where a slack is given
    ("random < center", "random", "center", "MRR", 0),
    ("center < full image", "center", "full", "MRR", 0),
    ("full image <= zero-shot", "full", "zeroshot", "MRR", SLACK),
    ("zero-shot < learned", "zeroshot", "policy", "MRR", 0),
    ("learned < oracle", "policy", "oracle", "MRR", 0),
    ("full image < learned, at the first place", "full", "policy", "CondR@1", 0),
    ("learned box on every query < learned policy: knowing when pays", "always", "policy", "MRR", 0),
    ("where the full image is right, learned hurts less than zero-shot", "policy", "zeroshot", "hurt =1", 0),
    ("where it is wrong, learned crops more than zero-shot", "zeroshot", "policy", "crop >1", 0),
    ("where it is wrong, learned helps more than zero-shot", "zeroshot", "policy", "help >1", 0),
)


def claims(study):
    """Every claim with its numbers; Holm's correction runs over all that have a p value."""
    found, known = [], []
    for text, left, right, measure, slack in PAIRED:
        claim = Claim(text, measure, slack=slack)
        missing = [name for name in (left, right) if name not in study.values]
        if missing:
            claim.note = f"no rows of {', '.join(missing)}"
        else:
            known.append((claim, (right, left, measure)))
        found.append(claim)
    for (claim, _), row in zip(known, compare(study, [pair for _, pair in known])):
        for name in ("difference", "low", "high", "p", "n"):
            setattr(claim, name, row[name])
    found += [need_claim(study), margin_claim(study), retrieval_claim(study)]
    tested = [claim for claim in found if claim.p is not None]
    for claim, corrected in zip(tested, holm([claim.p for claim in tested])):
        claim.p_holm = float(corrected)
    return found


def need_claim(study):
    """Crop rate follows need: more crops where the full image is wrong than where it is right (Table 4)."""
    claim = Claim("crop rate follows need: full image right < full image wrong", "crop")
    if "policy" not in study.values:
        claim.note = "no rows of policy"
        return claim
    right, wrong = (study.values["policy"][f"crop {group}"] for group in ("=1", ">1"))
    if mean(right) is None or mean(wrong) is None:
        claim.note = "one of the two groups has no query"
        return claim
    # Two groups of queries, not pairs: no sign to flip. The same bootstrap tells how often the order turns round.
    drawn = study.replicates["policy", "crop >1"] - study.replicates["policy", "crop =1"]
    drawn = drawn[~np.isnan(drawn)]
    claim.difference, (claim.low, claim.high) = mean(wrong) - mean(right), interval(drawn)
    claim.p = float(min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn))))
    claim.n = int((~np.isnan(right)).sum() + (~np.isnan(wrong)).sum())
    return claim


def same_but(args, other, *names):
    """Do two runs' arguments agree in all but `names`?"""
    return all(args.get(key) == other.get(key) for key in args.keys() | other.keys() if key not in names)


def margin_runs(study):
    """(runs with the margin term, runs without): equal to the main run but for seed and weights (Table 5, Figure 2)."""
    main = study.config.get("args", {})
    alike = [a for a in study.ablations if same_but(a.args, main, "seed", "reward_weights", *NO_WEIGHT)]
    with_term = [a for a in alike if a.args.get("reward_weights") == main.get("reward_weights")]
    without = [a for a in alike if (a.args.get("reward_weights") or [1])[-1] == 0]
    # The paper takes the margin away from all the rest, so of several variants the one with most terms is meant.
    most = max((sum(w > 0 for w in a.args["reward_weights"]) for a in without), default=0)
    return with_term, [a for a in without if sum(w > 0 for w in a.args["reward_weights"]) == most]


def margin_claim(study):
    """The margin term helps (Table 5): mean MRR over seeds, query by query, with against without."""
    claim = Claim("margin term helps: without < with", "MRR")
    with_term, without = margin_runs(study)
    if not with_term or not without or (study.config.get("args", {}).get("reward_weights") or [0])[-1] == 0:
        claim.note = "no ablation runs with and without it: `make ablations`"
        return claim
    a, b = (np.mean([run.values["MRR"] for run in runs], axis=0) for runs in (with_term, without))  # [Q] each
    settle(claim, study, a - b)
    ranges = [(min(m), max(m)) for m in ([mean(run.values["MRR"]) for run in runs] for runs in (with_term, without))]
    claim.note = (f"{len(with_term)} and {len(without)} seeds; MRR {ranges[0][0]:.3f} to {ranges[0][1]:.3f} with, "
                  f"{ranges[1][0]:.3f} to {ranges[1][1]:.3f} without")
    # p knows the chance in the queries and not that in the training: where seeds overlap it says too much.
    apart = ranges[0][0] > ranges[1][1] or ranges[1][0] > ranges[0][1]
    several = min(len(with_term), len(without)) > 1
    claim.told = apart and several
    claim.note += "" if claim.told else ": too few seeds" if not several else ": the seeds overlap"
    return claim


def retrieval_claim(study):
    """Cropping before retrieval does not help (Table 8): the recall of the whole top 20 is not raised."""
    claim = Claim("cropping before retrieval does not help: cropped <= full image", "R@20", slack=SLACK)
    if not {"full", "policy"} <= study.retrieved.keys():
        claim.note = "not measured: `python evaluate.py --retrieval-stage`"
        return claim
    return settle(claim, study, study.retrieved["full"]["R@20"] - study.retrieved["policy"]["R@20"])


def settle(claim, study, difference):
    """Give a claim the numbers of paired differences [Q] that are not between two methods of the study."""
    column, settings = difference[:, None], (study.clusters, study.args.resamples, study.args.seed)
    claim.difference, _, claim.n = effect(difference)
    claim.low, claim.high = interval(bootstrap(column, *settings)[:, 0])
    claim.p = float(flip_p(column, *settings)[0])
    return claim


# ------------------------------------------------------------------------------------------------------------- tables

@dataclass
class Table:
    """Cells are texts. The first column names the row and is set left, all others right, unless `wordy` says so."""
    name: str        # table1: also the file's name
    title: str
    head: list
    rows: list
    caption: str     # what to see
    wordy: bool = False


def num(value, digits=3, scale=1.0, sign=False):
    """A number for a cell; a dash where it is not defined."""
    return "-" if value is None or not np.isfinite(value) else f"{value * scale:{'+' if sign else ''}.{digits}f}"


def span(bounds, digits=3, scale=1.0, sign=False):
    """An interval for a cell: [low, high]."""
    if bounds is None or bounds[0] is None:
        return "-"
    return f"[{num(bounds[0], digits, scale, sign)}, {num(bounds[1], digits, scale, sign)}]"


def p_text(p):
    """A p value for a cell. Below 0.001 its digits depend on the number of flips more than on the data."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def label(name):
    method, _, scorer = name.partition("@")
    base, plus, extra = method.partition("+")
    return LABELS.get(base, base) + (f" + {extra}" if plus else "") + (f", {scorer}" if scorer else "")


def own_scorer(study):
    """Methods scored with the run's own scorer: all but those of Table 6."""
    return [name for name in study.values if "@" not in name]


def ranking_tables(study):
    """Tables 1 and 2: one row a method, recalls in per cent as in the paper, intervals for the leading column."""
    first, second = [], []
    for name in own_scorer(study):
        found, replicates = study.values[name], study.replicates
        first.append([label(name), num(mean(found["MRR"])), span(interval(replicates[name, "MRR"])),
                      num(mean(found["NDCG"]))]
                     + [num(mean(found[f"R@{k}"]), 1, 100) for k in (1, 5, 10, 20)]
                     + [num(mean(found["crop"]), 1, 100), str(int(found["bad"].sum()))])
        second.append([label(name), num(mean(found["CondR@1"])), span(interval(replicates[name, "CondR@1"]))]
                      + [num(mean(found[f"CondR@{k}"])) for k in (5, 10)])
    held = int((~np.isnan(study.values["full"]["CondR@1"])).sum())
    queries = f"{len(study.clusters)} queries about {int(study.clusters.max()) + 1} entities"
    return [Table("table1", "Table 1. Re-ranking", ["method", "MRR", "95 %", "NDCG", "R@1 %", "R@5 %", "R@10 %",
                                                    "R@20 %", "crop %", "bad text"], first,
                  f"{queries}; every mean is over all of them, a query without a positive in its pool counts 0. All "
                  "methods order the same pools, so R@20 is the same. Intervals are resampled by entity. Bad text: "
                  "answers that could not be read and left the full image." + aside(study)),
            Table("table2", "Table 2. Conditional recall", ["method", "CondR@1", "95 %", "CondR@5", "CondR@10"], second,
                  f"Over the {held} queries whose pool holds a positive (Eq. 10): what re-ranking alone can change.")]


def aside(study):
    """What the rows of Table 1 do not say by themselves."""
    second = (study.metrics.get("models") or {}).get("zeroshot2")
    lost = sum(bool(row.get("unreadable")) for row in study.rows.get("full", ()))
    return ((f" The second base is {second}." if second else "")
            + (f" {lost} images could not be read; they count with what retrieval saw." if lost else ""))


def test_table(study):
    """Every method against full and zeroshot, on MRR and CondR@1."""
    pairs = [(name, base, measure) for measure in ("MRR", "CondR@1") for base in ("full", "zeroshot")
             if base in study.values for name in own_scorer(study) if name not in ("full", base)]
    rows = [[f"{label(t['method'])} - {label(t['base'])}", t["measure"], num(t["difference"], sign=True),
             span((t["low"], t["high"]), sign=True), num(t["d_z"], 2, sign=True), p_text(t["p"]), p_text(t["p_holm"]),
             str(t["n"])] for t in compare(study, pairs)]
    return Table("tests", "Paired tests against full image and zero-shot",
                 ["difference", "of", "mean", "95 %", "d_z", "p", "p (Holm)", "queries"], rows,
                 f"Randomisation test of {study.args.resamples:,} sign flips by entity, two-sided, corrected over all "
                 "rows of this table; d_z is the mean difference over its standard deviation between queries.")


def extension_table(study):
    """The paper's future work, each with its cost: policy+fuse, policy+best<n> and what else has a + in its name."""
    rows = []
    names = [name for name in own_scorer(study) if "+" in name]
    for t in compare(study, [(name, "policy", "MRR") for name in names if "policy" in study.values]):
        found = study.values[t["method"]]
        rows.append([label(t["method"]), num(mean(found["MRR"])), num(mean(found["CondR@1"])),
                     num(t["difference"], sign=True), span((t["low"], t["high"]), sign=True), p_text(t["p_holm"]),
                     num(mean(found["encodes"]), 2), num(mean(found["seconds"]), 3)])
    return Table("extensions", "Extensions", ["method", "MRR", "CondR@1", "MRR - learned policy", "95 %", "p (Holm)",
                                              "encodes a query", "s a query"], rows,
                 "Options of evaluate.py that the paper leaves to future work, against the learned policy as it is.")


def behaviour_table(study):
    """Table 4: what the methods that choose do where the full image is right, and where it is wrong."""
    rows = []
    for group, title in (("=1", "rank 1"), (">1", "rank > 1")):
        for name in (name for name in CROPPING if name in study.values):
            found = study.values[name]
            rows.append([f"{label(name)}, {title}", str(int((~np.isnan(found[f"crop {group}"])).sum()))]
                        + [f"{num(mean(found[f'{what} {group}']), 1, 100)} "
                           f"{span(interval(study.replicates[name, f'{what} {group}']), 1, 100)}"
                           for what in ("crop", "help", "hurt")] + [num(mean(found[f"same {group}"]), 1, 100)])
    return Table("table4", "Table 4. Does it crop when it should?",
                 ["method, rank of the full image", "queries", "crop %", "help %", "hurt %", "no change %"], rows,
                 "Queries with a positive in the pool, split by whether the full image already ranks it first. A "
                 "policy that knows when to crop has a low crop rate above and a high one below; help and hurt are "
                 "shares of queries whose rank got better or worse.")


def ablation_table(study):
    """Table 5: a row a reading, mean and spread over its seeds."""
    main, groups = study.config.get("args", {}), {}
    for run in study.ablations:
        groups.setdefault(run.reading, []).append(run)
    rows = []
    for reading, runs in groups.items():
        differs = [f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                   for key, value in runs[0].args.items()
                   if key not in ("seed", *NO_WEIGHT) and main.get(key) != value]
        cells = [spread([mean(run.values[m]) for run in runs], d, s)
                 for m, d, s in (("MRR", 3, 1), ("CondR@1", 3, 1), ("crop =1", 1, 100), ("crop >1", 1, 100),
                                 ("iou", 2, 1), ("bad", 1, 100))]
        rows.append([reading, str(len(runs)), *cells, ", ".join(differs) or "as this run"])
    return Table("table5", "Table 5. Ablations", ["reading", "seeds", "MRR", "CondR@1", "crop % at rank 1",
                                                  "at rank > 1", "IoU", "bad text %", "differs from this run in"], rows,
                 "Mean over training seeds, and the standard deviation between seeds after the sign. Two rows "
                 "whose spreads overlap are not told apart.")


def spread(values, digits, scale):
    """Mean and standard deviation over seeds for a cell."""
    kept = [value for value in values if value is not None]
    if not kept:
        return "-"
    deviation = f" ± {num(np.std(kept, ddof=1), digits, scale)}" if len(kept) > 1 else ""
    return num(np.mean(kept), digits, scale) + deviation


def scorer_table(study):
    """Table 6: the same actions scored by other scorers."""
    rows, recalls = [], [f"{kind}@{k}" for kind in ("R", "CondR") for k in (1, 5, 10)]
    scorers = dict.fromkeys(name.partition("@")[2] for name in study.values)
    for scorer in scorers if len(scorers) > 1 else ():
        for method in ("full", "zeroshot", "policy"):
            name = f"{method}@{scorer}" if scorer else method
            if name in study.values:
                shown = scorer or study.metrics.get("scorer", "own").split("@")[0]
                rows.append([f"{shown}, {label(method)}"] + [num(mean(study.values[name][m])) for m in recalls])
    return Table("table6", "Table 6. Another scorer at test time", ["scorer, method", *recalls], rows,
                 "The pools and the policy's actions stay, only the scorer that orders the candidates changes; nothing "
                 "is trained again. The first scorer is the one of the training.")


def quality_table(study):
    """Table 7: overlap of the chosen boxes with the target boxes, and the judge's verdicts where one was asked."""
    rows, judge = [], study.metrics.get("judge") or {}
    for name in (name for name in (*CROPPING, "center", "random") if name in study.values):
        found = study.values[name]
        if (~np.isnan(found["iou"])).any():
            rate = judge.get("rate") if name == "policy" else None
            rows.append([label(name), str(int((~np.isnan(found["iou"])).sum())), num(mean(found["iou"]), 2),
                         span(interval(study.replicates[name, "iou"]), 2), num(mean(found["containment"]), 2)]
                        + ([num(rate, 2)] if judge else []))
    return Table("table7", "Table 7. Where it crops",
                 ["method", "crops", "IoU", "95 %", "containment"] + (["judge"] if judge else []), rows,
                 "Crops against the target's box (the true box in the embedded world, a detector's elsewhere). "
                 "Containment is the share of crops that hold the whole target"
                 + (f"; judge is the share of {judge['n']} crops that {judge['model']} found sufficient for the "
                    "question." if judge else "."))


def retrieval_table(study):
    """Table 8: the views used to retrieve anew."""
    recalls = [f"R@{k}" for k in (1, 5, 10, 20)]
    rows = [[label(name)] + [num(mean(found[r]), 1, 100) for r in recalls] for name, found in study.retrieved.items()]
    return Table("table8", "Table 8. Cropping before retrieval", ["view", *(f"{r} %" for r in recalls)], rows,
                 "The index is searched again with each view. The paper finds a small loss: retrieval needs the "
                 "context that a crop throws away.")


def cost_table(study):
    """Table 9: latency, throughput and peak memory of inference, from tools/bench.py's files."""
    rows = []
    for file, bench in study.bench.items():
        machine = bench.get("machine", {}).get("device", "?")
        found = bench.get("cases", {}).get("act", {})
        for part, seconds in found.get("median_s", {}).items():
            _, size, answer = part.split()  # "batch 8 grammar"
            memory = found.get("peak_bytes", {}).get(part)
            rows.append([file.removesuffix(".json"), machine, answer, size, num(seconds / int(size), 3),
                         num(int(size) / seconds, 2), num(memory, 0, 1e-6)])
    return Table("table9", "Table 9. Cost of inference", ["bench", "machine", "answer", "batch", "s a query",
                                                          "queries/s", "peak MB"], rows,
                 "From tools/bench.py, images of about 1,000 tokens; the machine is the bench's, not this page's. FULL "
                 "ends at the decision; grammar and free write a box of as many tokens.")


def claim_table(found):
    """The paper's claims, each with its numbers and what they say."""
    rows = [[claim.text + (f" ({claim.note})" if claim.note else ""), claim.verdict, claim.measure.split()[0],
             num(claim.difference, sign=True), span((claim.low, claim.high), sign=True), p_text(claim.p),
             p_text(claim.p_holm)] for claim in found]
    return Table("claims", "The paper's claims, on this data", ["claim", "verdict", "of", "difference", "95 %", "p",
                                                                "p (Holm)"], rows,
                 "The difference is the side that should be larger minus the other. An ordering holds, or does not, "
                 "where p is below .05 after Holm's correction over this table, and cannot be told otherwise; <= means "
                 f"not worse by more than {SLACK}, told by the interval. What is said is about this data and these "
                 "models alone.")


# --------------------------------------------------------------------------------------------- tables as three formats

def plain(value):
    """Any text on one line, without what steers a terminal or cannot be written as UTF-8."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def as_text(table):
    """A table for the terminal: columns as wide as their cells."""
    lines = [table.head, *([plain(cell) for cell in line] for line in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    drawn = ["  ".join(cell.ljust(w) if i == 0 or table.wordy else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
    return "\n".join([table.title, drawn[0], "-" * (sum(widths) + 2 * len(widths) - 2), *drawn[1:]])


def as_markdown(table):
    """A table in GitHub's Markdown, with its caption."""
    def line(cells):
        # What a question may hold must not end a cell or become a tag: Markdown passes HTML on.
        safe = (html.escape(plain(cell), quote=False).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(safe) + " |"
    rule = "|" + "|".join(["---"] + ["---" if table.wordy else "---:"] * (len(table.head) - 1)) + "|"
    return "\n".join([f"**{table.title}.** {html.escape(table.caption, quote=False)}", "", line(table.head), rule,
                      *map(line, table.rows)])


def tex(text):
    """Text for LaTeX, every character that means something there escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
               "±": r"$\pm$", "|": "$|$", **{c: "\\" + c for c in "&%$#_{}"}}
    return "".join(special.get(c, c) for c in plain(text))


def as_latex(table):
    """A table environment (booktabs), to be \\input by a paper."""
    columns = "l" + ("l" if table.wordy else "r") * (len(table.head) - 1)
    body = [" & ".join(tex(cell) for cell in line) + r" \\" for line in [table.head, *table.rows]]
    return "\n".join([r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0],
                      r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}",
                      rf"\caption{{{tex(table.title)}. {tex(table.caption)}}}", rf"\label{{tab:{table.name}}}",
                      r"\end{table}"]) + "\n"


# ---------------------------------------------------------------------------------------- Table 3: queries to look at

def pick(study, count):
    """[(heading, [rows])] of queries to look at: successes of both decisions, then failures, `count` of each kind."""
    if "policy" not in study.values:
        return []
    found, full = study.values["policy"], study.values["full"]
    cropped, held = found["crop"] == 1, ~np.isnan(found["CondR@1"])
    rank, before = found["rank"], full["rank"]
    kinds = [("A crop put the positive first", held & cropped & (rank == 1) & (before > 1))]
    if "always" in study.values:
        lost = study.values["always"]["rank"] > 1
        kinds.append(("The full image was kept, and a crop would have lost the first place",
                      held & ~cropped & (before == 1) & lost))
    kinds += [("A crop did harm", held & cropped & (rank > before)),
              ("Still wrong", held & (rank > 1) & (rank <= before))]
    chosen = []
    for heading, group in kinds:
        left = np.flatnonzero(group)
        take = min(count, len(left))
        # Evenly spaced over the split, not the best ones: what is shown is what is typical.
        chosen.append((f"{heading}: {len(left)} of {int(held.sum())}", [int(left[k * len(left) // take])
                                                                        for k in range(take)]))
    return chosen


def places(study, i):
    """Pool places of query i: first before, first after, the positive that comes first after."""
    before, after = (np.array(study.rows[name][i]["scores"]) for name in ("full", "policy"))  # [K] each
    labels = np.array(study.rows["full"][i]["labels"])
    # argmax takes the first of equals: the pool's order, as everywhere.
    return int(before.argmax()), int(after.argmax()), int(np.where(labels, after, -np.inf).argmax())


def title_of(study, data, i, k):
    """Title of candidate k of query i, or its place in the pool where the data are not at hand."""
    return f"candidate {k + 1}" if data is None else data.entity(data.queries[i].pool[k])["title"]


def qualitative_table(study, data):
    """Table 3 in words; the page has it in pictures."""
    rows = []
    for heading, chosen in pick(study, study.args.examples):
        for i in chosen:
            row, (first, now, positive) = study.rows["policy"][i], places(study, i)
            rows.append([row["query_id"], heading.split(":")[0], row["question"], row["decision"],
                         f"{study.values['full']['rank'][i]:.0f} -> {study.values['policy']['rank'][i]:.0f}",
                         *(title_of(study, data, i, k) for k in (first, now, positive))])
    return Table("table3", "Table 3. Queries before and after", ["query", "kind", "question", "decision", "rank",
                                                                 "first before", "first after", "positive"], rows,
                 "Drawn evenly from each kind, not picked by hand.", wordy=True)


def open_data(study):
    """The prepared data behind the rows, or None with a note: tables and plots do without it, pictures do not."""
    folder = study.args.data or study.metrics.get("data")
    try:
        data = load_data(folder or "data/world", study.args.split)
    except (FileNotFoundError, ValueError) as error:
        study.notes.append(f"no pictures and titles: {error}")
        return None
    if [q.query_id for q in data.queries[:len(study.clusters)]] != [row["query_id"] for row in study.rows["full"]]:
        study.notes.append(f"no pictures and titles: {folder} holds other queries than the rows; give --data")
        return None
    return data


# -------------------------------------------------------------------------------------------------------------- plots

@dataclass
class Plot:
    name: str
    png: bytes
    caption: str     # what to see; also what a screen reader says


PANELS = (  # name, title, y label, ((field of log.jsonl, label, colour), ...), what to see
    ("reward", "Reward", "reward", (("reward_full", "FULL", GREEN), ("reward_region", "REGION", ORANGE),
                                    ("reward", "all rollouts", BLUE)),
     "Mean reward of a step's rollouts, and of each decision's."),
    ("validation", "Validation", "", (("val_cond_r1", "CondR@1", BLUE), ("val_mrr", "MRR", ORANGE)),
     "Greedy decoding on the validation split."),
    ("cropping", "How often it crops", "share", (("p_region", "p(REGION), training", BLUE),
                                                 ("val_crop_rate", "crop rate, validation", ORANGE)),
     "A policy that drifts to 0 or 1 has stopped deciding."),
    ("entropy", "Entropy of the decision", "nats", (("decision_entropy", "", BLUE),),
     "How open the decision still is; at 0 nothing is explored any more."),
    ("trouble", "Signs of trouble", "share", (("malformed_rate", "unreadable", ORANGE),
                                              ("zero_advantage", "groups without advantage", BLUE),
                                              ("clip_fraction", "clipped tokens", GREEN)),
     "Unreadable answers, groups that teach nothing, and tokens whose ratio was clipped."),
    ("gradient", "Gradient and KL", "", (("grad_norm", "gradient norm", BLUE), ("kl", "KL to the base model", ORANGE)),
     "Norm before clipping; KL is 0 where it is not part of the loss."),
)
PICTURES = ("figure2", "figure2_without", "table4_right", "table4_wrong", "curve_mrr", "curve_condr1",
            *(f"training_{panel[0]}" for panel in PANELS))  # every name that a plot may have


def canvas(title, xlabel, ylabel):
    """(figure, axes) of one panel. One panel a picture: beside each other on a desktop, below each other on a phone."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ValueError("plots need matplotlib: pip install -r requirements-dev.txt, or give --tables-only") from error
    # A Figure of its own and no pyplot: nothing is shared between plots, and no display is looked for.
    figure = figures.Figure(figsize=(4.6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def legend(figure):
    """Below the axes: inside them it would sooner or later lie on the data."""
    figure.legend(loc="outside lower center", ncol=3, frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.2)


def drawn(figure, name, caption):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, metadata={"Software": None})  # no version: equal rows, equal bytes
    return Plot(name, buffer.getvalue(), caption)


def margin_plots(study):
    """Figure 2: margin of the full image against that of the crop, without and with the margin term."""
    _, without = margin_runs(study)
    shown = [("figure2_without", "without the margin term", run.values) for run in without[:1]]
    if "policy" in study.values:
        shown.append(("figure2", "learned policy", study.values["policy"]))
    before, plots, points = study.values["full"]["margin"], [], {}
    for name, _, values in shown:
        kept = (values["crop"] == 1) & ~np.isnan(before) & ~np.isnan(values["margin"])
        if kept.any():
            points[name] = before[kept], values["margin"][kept]
    # One diagonal for both, and so the same axes: what is to be compared is where the points lie.
    ends = [min(np.min(xy) for xy in points.values()), max(np.max(xy) for xy in points.values())] if points else None
    for name, title in ((name, title) for name, title, _ in shown if name in points):
        x, y = points[name]
        better = y > x
        figure, axes = canvas(f"{title}: {num(better.mean(), 0, 100)} % of {len(x)} crops gain",
                              "margin of the full image", "margin of the crop")
        for inside, colour, mark in ((better, BLUE, "o"), (~better, ORANGE, "x")):  # two marks: colour is not all
            axes.scatter(x[inside], y[inside], s=12, color=colour, marker=mark, alpha=0.55, linewidths=0.8)
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        plots.append(drawn(figure, name, f"Figure 2, {title}. A point is a cropped query; above the line (blue dots) "
                           "the crop widened the distance between the best positive and the best negative. Upper left: "
                           f"a wrong first place was put right. Mean gain {num(float((y - x).mean()), sign=True)}."))
    return plots


def behaviour_plots(study):
    """Table 4 as bars: base against learned policy."""
    names = [name for name in ("zeroshot", "policy") if name in study.values]
    plots = []
    for group, title in (("=1", "Full image right (rank 1)"), (">1", "Full image wrong (rank > 1)")):
        if not names or mean(study.values[names[0]][f"crop {group}"]) is None:
            continue
        figure, axes = canvas(title, "", "% of queries")
        for place, (name, colour) in enumerate(zip(names, (GREY, BLUE))):
            facts = [f"{what} {group}" for what in ("crop", "help", "hurt", "same")]
            middle = np.array([mean(study.values[name][fact]) for fact in facts]) * 100
            bounds = np.array([interval(study.replicates[name, fact]) for fact in facts]).T * 100  # [2, 4]
            x = np.arange(4) + 0.4 * place - 0.2
            axes.bar(x, middle, 0.38, color=colour, label=label(name))
            axes.errorbar(x, middle, [np.maximum(middle - bounds[0], 0), np.maximum(bounds[1] - middle, 0)],
                          fmt="none", ecolor="black", elinewidth=1, capsize=2)
            for left, height, top in zip(x, middle, bounds[1]):
                axes.text(left, top + 1.5, f"{height:.0f}", ha="center", fontsize=9)
        axes.set_xticks(range(4), ["crops", "helps", "hurts", "no change"])
        axes.set_ylim(0, 108)
        legend(figure)
        plots.append(drawn(figure, f"table4_{'right' if group == '=1' else 'wrong'}",
                           f"Table 4, {title.lower()}. " + (
                               "The less it crops and hurts here, the better." if group == "=1" else
                               "The more it crops and helps here, the better.") + " Whiskers: 95 % intervals."))
    return plots


def curve_plots(study):
    """The operating curve: MRR and CondR@1 against crop rate as the threshold on p(REGION | x) moves."""
    curve, plots = study.metrics.get("curve") or {}, []
    if not curve.get("policy"):
        study.notes.append("no operating curve: metrics.json has none; run evaluate.py with `always` among its methods")
        return []
    for measure in ("MRR", "CondR@1"):
        figure, axes = canvas(f"{measure} against crop rate", "queries that are cropped, %", measure)
        for name, colour, style in (("zeroshot", GREY, "--"), ("policy", BLUE, "-")):
            points = sorted((p["crop_rate"], p[measure]) for p in curve.get(name, []) if p[measure] is not None)
            if points:
                x, y = np.array(points).T
                axes.plot(x * 100, y, color=colour, linestyle=style, marker=".", markersize=4, label=label(name))
            if points and name in study.values:
                axes.plot(mean(study.values[name]["crop"]) * 100, mean(study.values[name][measure]), "o", color=colour,
                          markersize=9, markeredgecolor="white")
        best = curve.get("oracle")
        if best and best.get(measure) is not None:
            axes.plot(best["crop_rate"] * 100, best[measure], "*", color=GREEN, markersize=14, label="oracle")
        axes.set_xlim(-3, 103)
        legend(figure)
        plots.append(drawn(figure, f"curve_{measure.replace('@', '').lower()}",
                           f"Operating curve, {measure}: queries are cropped where p(REGION) is above a threshold that "
                           "moves from 1 (left) to 0 (right, always crop). Large dots: the policies' own choice, "
                           f"threshold {study.metrics.get('threshold', 0.5)}. A policy that knows when to crop rises "
                           "steeply, then falls; a stretch without points joins queries of equal p."))
    return plots


def training_plots(study):
    """Curves of log.jsonl, smoothed over a window of a twelfth of the run with the raw steps behind."""
    plots = []
    for name, title, ylabel, lines, caption in PANELS:
        figure, axes = canvas(title, "step", ylabel)
        empty = True
        for key, text, colour in lines:
            points = [(row["step"], row[key]) for row in study.log if row.get(key) is not None]
            if not points:
                continue
            x, y = np.array(points, dtype=np.float64).T
            window = max(1, len(study.log) // 12)
            # Values of every step are smoothed; the few of a validation are shown as they are.
            if len(points) > len(study.log) // 2 and window > 1:
                axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
                sums, counts = (np.convolve(v, np.ones(window), mode="same") for v in (y, np.ones(len(y))))
                axes.plot(x, sums / counts, color=colour, label=text)
            else:
                axes.plot(x, y, color=colour, marker="o", markersize=5, label=text)
            empty = False
        if empty:
            continue
        if len(lines) > 1:
            legend(figure)
        if ylabel == "share":  # the whole range: a line at 0 must look like one
            axes.set_ylim(-0.03, 1.03)
        plots.append(drawn(figure, f"training_{name}", f"{title}. {caption}"))
    return plots


# ----------------------------------------------------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #59616b; --line: #dcdfe3; --page: #ffffff; --band: #f5f6f8;
  --link: #0a5c99; --good: #00694d; --bad: #a83c00; --open: #59616b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a4abb4; --line: #3a4048; --page: #16191d;
  --band: #20242a; --link: #7cc0f5; --good: #4fd1a5; --bad: #ff9f66; --open: #a4abb4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 1.25rem; margin: 44px 0 4px; }
h3 { font-size: 1rem; margin: 24px 0 8px; } p { margin: 6px 0; } .soft, caption, figcaption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 0; font-size: .92rem; } a { color: var(--link); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: 12px; margin: 20px 0; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.facts b { display: block; font-size: 1.35rem; line-height: 1.3; }
.facts span { color: var(--soft); font-size: .86rem; }
.scroll { overflow-x: auto; margin: 10px 0; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; }
th { background: var(--band); font-weight: 600; } td { border-top: 1px solid var(--line); }
th:first-child, td:first-child, .wordy th, .wordy td { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; }
td:first-child { background: var(--page); }
.wordy td, td:first-child, th:first-child { white-space: normal; overflow-wrap: normal; }
td:first-child { min-width: 9rem; } .claims td:first-child { min-width: 20rem; }
.claims :nth-child(2) { text-align: left; }
.table5 th { white-space: normal; overflow-wrap: normal; } .table5 td:first-child { min-width: 6.5rem; }
.table5 th:last-child, .table5 td:last-child { text-align: left; white-space: normal; min-width: 10rem; }
.own td { font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 4px 16px; }
.plots figure { max-width: 540px; }
figure { margin: 10px 0; } figcaption { font-size: .88rem; }
.plots img { width: 100%; height: auto; display: block; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); }
.badge { font-weight: 600; white-space: nowrap; } .good { color: var(--good); } .bad { color: var(--bad); }
.open { color: var(--open); }
.case { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 12px 0; }
.case .soft { display: inline-block; }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin-top: 8px; }
.views figure { margin: 0; } .views img { width: 100%; height: 150px; object-fit: contain; background: var(--band);
  border-radius: 4px; display: block; } .views figcaption { font-size: .8rem; line-height: 1.35; margin-top: 4px; }
details { margin: 12px 0; } summary { cursor: pointer; }
@media (max-width: 600px) { main { padding: 16px 14px 48px; } th, td { padding: 6px 8px; }
  td:first-child, .claims td:first-child { min-width: 8rem; } .facts { grid-template-columns: 1fr 1fr; }
  .facts b { font-size: 1.15rem; } .views { grid-template-columns: repeat(3, 1fr); } .views img { height: 105px; } }
"""


def tag(name, inside, **attributes):
    """<name attributes>inside</name>. Texts must come through `text`; attribute values are escaped here."""
    given = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items())
    return f"<{name}{given}>{inside}</{name}>"


def text(value):
    """Any text as HTML: titles and questions come from data that anybody may have written."""
    return html.escape(plain(value))


def picture(content, alt, kind="png"):
    """An <img> that carries its own bytes, so that the page is one file."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{text(alt)}">'


def badge(verdict):
    """A verdict by sign, word and colour."""
    sign, kind = {HOLDS: ("✓", "good"), FAILS: ("✗", "bad"), OPEN: ("?", "open")}[verdict]
    return tag("span", f"{sign} {verdict}", class_=f"badge {kind}")


def as_html(table, own=None):
    """A table in a box of its own that scrolls by itself: the page never does sideways. own: method to set bold."""
    head = tag("tr", "".join(tag("th", text(cell)) for cell in table.head))
    body = ""
    for line in table.rows:
        cells = "".join(tag("td", badge(cell) if cell in (HOLDS, FAILS, OPEN) else text(cell)) for cell in line)
        body += tag("tr", cells, **({"class_": "own"} if own and re.match(f"{own}($|,| -)", line[0]) else {}))
    kind = "wordy" if table.wordy else table.name
    return tag("p", text(table.caption), class_="soft") + tag(
        "div", tag("table", f"<thead>{head}</thead><tbody>{body}</tbody>", class_=kind), class_="scroll", tabindex=0)


def gallery(plots):
    """Plots beside each other where there is room."""
    shown = "".join(tag("figure", picture(plot.png, plot.caption) + tag("figcaption", text(plot.caption)))
                    for plot in plots)
    return tag("div", shown, class_="plots") if shown else ""


def jpeg(image, side=260):
    """PIL image -> bytes of a small JPEG."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, format="jpeg", quality=82)
    return buffer.getvalue()


def marked(image, box):
    """A copy with the box drawn on it, a light line in a dark one: it shows on any picture."""
    shown = image.copy()
    width = max(2, max(image.size) // 90)
    x1, y1, x2, y2 = (round(v) for v in box)
    draw = ImageDraw.Draw(shown)
    draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline="black", width=width + max(1, width // 2))
    draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=(255, 200, 0), width=width)
    return shown


def case(study, data, i):
    """One query in pictures: what was asked and chosen, what was scored, and who came first before and after."""
    row, full, query = study.rows["policy"][i], study.rows["full"][i], data.queries[i]
    image = data.open_image(i)
    refused = study.rows["always"][i]["box"] if "always" in study.rows else None
    if row["decision"] == "REGION":
        shown = [("query, box chosen", marked(image, row["box"])), ("what was scored", crop(image, row["box"]))]
    elif refused:
        shown = [("query, scored as it is", image), ("the crop it did not take: rank "
                 f"{study.values['always']['rank'][i]:.0f}", crop(image, refused))]
    else:
        shown = [("query, scored as it is", image)]
    for what, k, scores in zip(("first before", "first after", "positive"), places(study, i),
                               (full["scores"], row["scores"], row["scores"])):
        sign = "right" if query.labels[k] else "wrong"
        shown.append((f"{what} ({sign}): {title_of(study, data, i, k)}, {scores[k]:.3f}",
                      read_image(data.candidate_image_path(query.pool_image[k]))))
    views = "".join(tag("figure", picture(jpeg(content), caption, "jpeg") + tag("figcaption", text(caption)))
                    for caption, content in shown)
    sure = "" if row.get("p_region") is None else f", p(REGION) {row['p_region']:.2f}"
    fate = f"{study.values['full']['rank'][i]:.0f} → {study.values['policy']['rank'][i]:.0f}"
    head = f"{tag('b', text(row['question']))} {text(row['decision'])}{sure}, rank {fate} " + tag(
        "span", text(row["query_id"]), class_="soft")
    return tag("div", head + tag("div", views, class_="views"), class_="case")


def examples(study, data):
    """Table 3 in pictures. A picture that cannot be read is named in its place and stops nothing."""
    parts = []
    for heading, chosen in pick(study, study.args.examples):
        parts.append(tag("h3", text(heading)))
        for i in chosen:
            try:
                parts.append(case(study, data, i))
            except (FileNotFoundError, ValueError) as error:
                parts.append(tag("p", text(f"{data.queries[i].query_id}: {error}"), class_="soft"))
    return "".join(parts)


def headline(study, found):
    """The few numbers that somebody in a hurry came for."""
    full, verdicts = study.values["full"], [claim.verdict for claim in found]
    facts = [(f"{sum(v == HOLDS for v in verdicts)} of {len(verdicts)}", "claims of the paper hold"
              + "".join(f", {verdicts.count(v)} {w}" for v, w in ((FAILS, "do not"), (OPEN, "cannot be told")) if v in
                        verdicts))]
    if "policy" in study.values:
        policy = study.values["policy"]
        facts += [(f"{num(mean(full[m]))} → {num(mean(policy[m]))}", f"{m}, full image → learned policy")
                  for m in ("CondR@1", "MRR")]
        facts.append((f"{num(mean(policy['crop =1']), 0, 100)} % / {num(mean(policy['crop >1']), 0, 100)} %",
                      "crop rate where the full image is right / wrong"))
    if {"policy", "oracle"} <= study.values.keys():
        lower, reached, upper = (mean(study.values[name]["CondR@1"]) for name in ("full", "policy", "oracle"))
        if upper is not None and upper > lower:
            facts.append((f"{num((reached - lower) / (upper - lower), 0, 100)} %",
                          "of the gap in CondR@1 between full image and oracle closed"))
    return tag("div", "".join(tag("div", f"<b>{text(big)}</b><span>{text(small)}</span>") for big, small in facts),
               class_="facts")


def configuration(study):
    """Arguments of the training and facts of the evaluation, folded away."""
    facts = {key: value for key, value in study.metrics.items() if not isinstance(value, (dict, list))}
    facts |= {key: value for key, value in study.config.items() if key != "args"}
    facts |= study.config.get("args", {})
    rows = [[key, " ".join(map(str, value)) if isinstance(value, list) else str(value)] for key, value in facts.items()]
    table = Table("configuration", "", ["argument", "value"], rows, "config.json of the run and the head of "
                  "metrics.json.", wordy=True)
    return tag("details", tag("summary", f"{len(rows)} arguments and facts") + as_html(table))


def sections(study, data, tables, plots):
    """[(anchor, title, HTML)] of the page in order, empty ones left out."""
    named = {table.name: as_html(table, label("policy")) for table in tables}
    drawn_as = {kind: gallery([plot for plot in plots if plot.name.startswith(kind)])
                for kind in ("table4", "curve", "figure2", "training")}
    notes = tag("p", "Not on this page:") + tag("ul", "".join(tag("li", text(note)) for note in study.notes))
    listed = [("claims", "The paper's claims, on this data", named["claims"]),
              ("table1", "Table 1. Re-ranking", named["table1"]),
              ("table2", "Table 2. Conditional recall", named["table2"]),
              ("tests", "Paired tests", named.get("tests", "")),
              ("table3", "Table 3. Queries before and after", named.get("table3", "") if data is None else
               examples(study, data)),
              ("table4", "Table 4. Does it crop when it should?", drawn_as["table4"] + named.get("table4", "")),
              ("curve", "Operating curve", drawn_as["curve"]),
              ("extensions", "Extensions", named.get("extensions", "")),
              ("table5", "Table 5. Ablations", named.get("table5", "")),
              ("figure2", "Figure 2. Margin before and after", drawn_as["figure2"]),
              *((table.name, table.title, named[table.name]) for table in tables if table.name[-1] in "6789"),
              ("training", "Training", drawn_as["training"]),
              ("run", "Run", configuration(study) + (notes if study.notes else ""))]
    return [(name, title, inside) for name, title, inside in listed if inside]


def page(study, data, tables, plots, found):
    """The whole report as one HTML file without scripts and without anything to load."""
    run = text("Region-R1: " + os.path.basename(os.path.normpath(study.args.run)))
    parts = sections(study, data, tables, plots)
    links = "".join(tag("a", text(title.split(".")[0].split(",")[0]), href=f"#{name}") for name, title, _ in parts)
    body = "".join(tag("section", tag("h2", text(title)) + inside, id=name) for name, title, inside in parts)
    subtitle = (f"{study.args.split} split of {study.metrics.get('data', '?')}: {len(study.clusters)} queries about "
                f"{int(study.clusters.max()) + 1} entities, K = {len(study.rows['full'][0]['labels'])} candidates, "
                f"scorer {study.metrics.get('scorer', '?')}, policy {study.config.get('policy', '?')}, training seed "
                f"{study.config.get('args', {}).get('seed', '?')}")
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            + tag("title", run) + tag("style", STYLE))
    top = tag("h1", run) + tag("p", text(subtitle), class_="soft") + headline(study, found) + tag("nav", links)
    return "<!DOCTYPE html>\n" + tag("html", tag("head", head) + tag("body", tag("main", top + body)), lang="en") + "\n"


# -------------------------------------------------------------------------------------------------------------- stage

def write_text(path, content):
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(content)


def remove_old(folder, names):
    """Remove files that an earlier report wrote and this one has nothing for: they would pass for its own."""
    for path in (os.path.join(folder, name) for name in names):
        if os.path.isfile(path):
            os.remove(path)


def write_tables(folder, tables):
    """tables.txt, tables.md and one .tex a table."""
    write_text(os.path.join(folder, "tables.txt"), "\n\n".join(map(as_text, tables)) + "\n")
    write_text(os.path.join(folder, "tables.md"), "\n\n".join(map(as_markdown, tables)) + "\n")
    for table in tables:
        write_text(os.path.join(folder, f"{table.name}.tex"), as_latex(table))


def numbers(study, found):
    """What report.json holds: means with intervals of every method, and the claims."""
    means = {method: {measure: {"mean": mean(column), "interval": interval(study.replicates[method, measure]),
                                "n": int((~np.isnan(column)).sum())} for measure, column in values.items()}
             for method, values in study.values.items()}
    return {"run": study.args.run, "split": study.args.split, "queries": len(study.clusters),
            "entities": int(study.clusters.max()) + 1, "resamples": study.args.resamples, "seed": study.args.seed,
            "means": means, "claims": [{**vars(claim), "verdict": claim.verdict} for claim in found],
            "notes": study.notes}


def main(argv=None):
    args = parse_args(argv)
    try:
        study = open_study(args)
        data = open_data(study)
        resample(study)
        found = claims(study)
        made = [claim_table(found), *ranking_tables(study), test_table(study), qualitative_table(study, data),
                behaviour_table(study), extension_table(study), ablation_table(study), scorer_table(study),
                quality_table(study), retrieval_table(study), cost_table(study)]
        tables = [table for table in made if table.rows]
        plots = [] if args.tables_only else [*margin_plots(study), *behaviour_plots(study), *curve_plots(study),
                                             *training_plots(study)]
    except (ValueError, FileNotFoundError) as error:  # wrong input, said in one line; anything else is a bug and shows
        raise SystemExit(f"tools.report: {error}") from error
    study.notes += [f"{table.title.removesuffix('.')}: nothing was measured for it" for table in made if not table.rows]
    os.makedirs(args.out, exist_ok=True)
    remove_old(args.out, [f"{table.name}.tex" for table in made] + [f"{name}.png" for name in PICTURES]
               + ["report.html"] * args.tables_only)
    write_tables(args.out, tables)
    for plot in plots:
        with replacing(os.path.join(args.out, f"{plot.name}.png")) as temporary, open(temporary, "wb") as file:
            file.write(plot.png)
    write_json(os.path.join(args.out, "report.json"), numbers(study, found))
    if not args.tables_only:
        write_text(os.path.join(args.out, "report.html"), page(study, data, tables, plots, found))
    print("\n\n".join(map(as_text, tables)))
    print("\n".join(["", *(f"note: {note}" for note in study.notes)]))
    print(f"wrote to {args.out}: tables.txt, tables.md, <table>.tex, report.json"
          + ("" if args.tables_only else f", {len(plots)} pictures, report.html"))


if __name__ == "__main__":
    main()
