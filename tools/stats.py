"""What can be said of the rows of an evaluation: means, intervals, paired tests, the operating curve. No model.

    rows = read_rows("runs/world/eval", "test")                   # {"full": [...], "policy": [...], ...}
    study = Study({name: measures(rows[name], rows["full"]) for name in ("full", "policy")}, entities(rows["full"]))
    study.interval("policy", "MRR")                               # (low, high)
    study.compare([(("policy", "MRR"), ("full", "MRR"))])         # difference, interval, p, p after Holm

Three rules for every number:
* Queries about one entity are not independent. What is resampled (intervals) and what changes its sign (tests) is the
  entity with all its queries, never the single query.
* Every interval is a 95 % percentile bootstrap of the same resamples, so differences of methods are paired.
* p is of a two-sided randomisation test: were the two methods interchangeable, the sign of an entity's difference would
  be a coin's. Tests that stand in one table are corrected together (Holm).

Letters: Q queries, C entities ("clusters"), V columns of values, T tests.
"""

from dataclasses import dataclass

import numpy as np

from rewards import metrics
from scorer import InputError

BLOCK = 500  # resamples at a time: BLOCK x C numbers are held, not all 10,000 x C


# --------------------------------------------------------------------------------------------------------------- rows

def measures(rows, full_rows):
    """{measure: float64 [Q]} of one method's rows; NaN = not defined there, so that every mean skips it.

    MRR, NDCG, R@k: all queries. CondR@k: queries whose pool holds a positive (Eq. 10); crop: of them, was a region
    chosen. bad: was the answer unreadable. For g in "=1", ">1", the full image's rank, over queries with a positive
    (Table 4): crop g, help g, hurt g, same g. iou: of the box that was taken, or would have been, over >1. margin,
    margin gain: of the view, and minus the full image's. The rest as it stands in the rows: iou crops, containment and
    judge are of crops alone.
    """
    per_query = metrics([row["scores"] for row in rows], [row["labels"] for row in rows])
    before = metrics([row["scores"] for row in full_rows], [row["labels"] for row in full_rows], ks=())
    held = per_query["has_positive"]  # [Q]
    found = {"MRR": per_query["rr"], "NDCG": per_query["ndcg"]}
    for k in (1, 5, 10, 20):
        found[f"R@{k}"] = per_query[f"recall@{k}"]
        found[f"CondR@{k}"] = np.where(held, per_query[f"recall@{k}"], np.nan)
    cropped = np.array([row["decision"] == "REGION" for row in rows], dtype=np.float64)
    found["crop"] = np.where(held, cropped, np.nan)
    found["bad"] = np.array([row["decision"] == "MALFORMED" for row in rows], dtype=np.float64)
    rank, full_rank = per_query["rank"], before["rank"]
    for group, inside in (("=1", held & (full_rank == 1)), (">1", held & (full_rank > 1))):
        for name, fact in (("crop", cropped), ("help", rank < full_rank), ("hurt", rank > full_rank),
                           ("same", rank == full_rank)):
            found[f"{name} {group}"] = np.where(inside, fact, np.nan).astype(np.float64)
    found["rank"] = rank.astype(np.float64)
    found["margin"], found["margin gain"] = per_query["margin"], per_query["margin"] - before["margin"]
    for name in ("iou", "iou crops", "containment", "judge", "seconds", "encodes"):
        found[name] = np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
    found["iou"][~(held & (full_rank > 1))] = np.nan
    return found


def entities(rows):
    """int [Q]: which entity a query is about, by its first positive. A query without one stands for itself."""
    names = [row["positives"][0] if row["positives"] else f"query {row['query_id']}" for row in rows]
    return np.unique(names, return_inverse=True)[1]


def operating_curve(p, full, always):
    """MRR, CondR@1 and crop rate (of queries with a positive) for every threshold on p(REGION | x): a list of points,
    or None where no p is known.

    p [Q]: NaN where there is no box to crop to. full, always: measures of the full image and of the forced boxes. At a
    threshold t a query is cropped where p > t, so no model is asked again. Thresholds: 0, 0.5 and 39 quantiles of p,
    rising; the last one crops nothing.
    """
    if np.isnan(p).all():
        return None
    points = []
    for threshold in np.unique([0, .5, *np.nanquantile(p, np.linspace(0, 1, 39))]):
        crops = p > threshold  # [Q] a NaN compares false
        rate = mean(np.where(np.isnan(full["CondR@1"]), np.nan, crops))
        points.append({"threshold": float(threshold), "crop_rate": rate, **{
            measure: mean(np.where(crops, always[measure], full[measure])) for measure in ("MRR", "CondR@1")}})
    return points


# ------------------------------------------------------------------------------------------- several runs of a reading

def pooled(runs):
    """{measure: [Q]} of several runs of one reading: each query's mean over them. runs: their measures. NaN where the
    measure is not defined in one of them: every run must be measured on the same queries."""
    return {measure: np.mean([run[measure] for run in runs], axis=0) for measure in runs[0]}


def validation_curve(log):
    """(steps [V], validation MRR [V]) of the lines of a log.jsonl. Step -1 is the policy before training, at 0; the
    validation of step k came after k + 1 steps."""
    points = {line["step"] + 1: line["val_mrr"] for line in log if line.get("val_mrr") is not None}
    return np.array(sorted(points), dtype=float), np.array([points[step] for step in sorted(points)], dtype=float)


def curve_numbers(log, threshold):
    """{end, area, steps} of a run's validation MRR, NaN where there is no curve. end: the last value. area: the curve's
    mean height. steps: when it first reaches the threshold, NaN where it never does. By straight lines between points.
    """
    x, y = validation_curve(log)
    if len(x) < 2:
        return dict.fromkeys(("end", "area", "steps"), np.nan)
    area, steps = ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]), np.nan
    if (above := np.flatnonzero(y >= threshold)).size:
        k = above[0]
        steps = x[k] if k == 0 else x[k - 1] + (threshold - y[k - 1]) / (y[k] - y[k - 1]) * (x[k] - x[k - 1])
    return {"end": float(y[-1]), "area": float(area), "steps": float(steps)}


def nine_tenths(logs):
    """The validation MRR nine tenths of the way from start to end, on average over runs; None without a curve."""
    curves = [y for _, y in map(validation_curve, logs) if len(y) > 1]
    return float(np.mean([y[0] + .9 * (y[-1] - y[0]) for y in curves])) if curves else None


# --------------------------------------------------------------------------------------------------------- statistics

def mean(values):
    """Mean of the values that are defined, NaN where there is none."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else np.nan


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
    """(low, high) of the 95 % percentile interval, NaN where no resample has a value."""
    kept = replicates[~np.isnan(replicates)]
    return tuple(float(v) for v in np.percentile(kept, (2.5, 97.5))) if kept.size else (np.nan, np.nan)


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
    """Holm's correction of p values [T]: the i-th smallest times (T - i), never below a smaller one's, at most 1.

    NaN, where nothing could be tested, stays and does not count.
    """
    p = np.asarray(p, dtype=np.float64)
    tested, adjusted = np.flatnonzero(~np.isnan(p)), np.full(len(p), np.nan)
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


@dataclass
class Study:
    """Values of several methods on the same queries, resampled together.

    values: {method: {measure: float [Q]}}, NaN = not defined. clusters: int [Q], the entity of each query, from 0.
    replicates, made here: {(method, measure): [resamples] means}.
    """
    values: dict
    clusters: np.ndarray
    resamples: int = 10000
    seed: int = 0

    def __post_init__(self):
        names = [(method, measure) for method, found in self.values.items() for measure in found]
        columns = np.stack([self.values[method][measure] for method, measure in names], axis=1)  # [Q, V]
        means = bootstrap(columns, self.clusters, self.resamples, self.seed)  # [resamples, V]
        self.replicates = {name: means[:, i] for i, name in enumerate(names)}

    def mean(self, method, measure):
        return mean(self.values[method][measure])

    def interval(self, method, measure):
        return interval(self.replicates[method, measure])

    def compare(self, pairs):
        """[{difference, low, high, d_z, p, p_holm, n}] of pairs (a, b), each a (method, measure): mean of a - b.

        d_z: mean difference over its standard deviation between queries. p_holm: corrected over all of `pairs`.
        Where a and b share no query (two groups of queries, so no sign to flip) p is the bootstrap's: how often the
        order of the two means turns round. InputError where so few resamples could tell nothing: the least p that R of
        them can give, 1 / (1 + R), or twice that of the bootstrap, times the number of tests must be below .05.
        """
        columns = [(self.values[a[0]][a[1]], self.values[b[0]][b[1]]) for a, b in pairs]  # two [Q] each
        differences = np.stack([x - y for x, y in columns], axis=1) if pairs else np.zeros((len(self.clusters), 0))
        flipped, found, unit = flip_p(differences, self.clusters, self.resamples, self.seed), [], 1
        for (a, b), (x, y), p in zip(pairs, columns, flipped):
            drawn = self.replicates[a] - self.replicates[b]  # [resamples]
            drawn = drawn[~np.isnan(drawn)]
            kept = (x - y)[~np.isnan(x - y)]
            deviation, n = kept.std(ddof=1) if len(kept) > 1 else 0.0, len(kept)
            if not n:
                unit = 2
                turned = min((drawn <= 0).sum(), (drawn >= 0).sum())
                p = min(1.0, 2 * (1 + turned) / (1 + len(drawn))) if len(drawn) else np.nan
                n = int((~np.isnan(x)).sum() + (~np.isnan(y)).sum())
            low, high = interval(drawn)
            found.append({"difference": mean(kept) if len(kept) else mean(x) - mean(y), "low": low, "high": high,
                          "d_z": float(kept.mean() / deviation) if deviation > 0 else np.nan, "p": float(p), "n": n})
        tests = sum(not np.isnan(row["p"]) for row in found)
        if self.resamples < (least := 20 * unit * tests):
            raise InputError(f"--resamples {self.resamples} is too few for a table of {tests} tests: corrected for "
                             f"their number, no p could be below .05; give {least} or more")
        for row, corrected in zip(found, holm([row["p"] for row in found])):
            row["p_holm"] = float(corrected)
        return found
