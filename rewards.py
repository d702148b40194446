"""Ranking metrics and the reward of Region-R1 (paper Eq. 5-8 and 10), in plain numpy.

A pool holds the K candidates of one query. A view of the query image (the full image, or a crop) gives every
candidate a cosine score; sorting the scores gives a ranking. A crop is paid for what it improves over the full
image (Eq. 7); keeping the full image is paid if it was already right (Eq. 8); text that is no action costs eta.

The worked example below is what `python rewards.py` prints. Four candidates, the third one is the positive:

    labels              0     0     1     0    rank     RR   NDCG  margin
    full image       0.30  0.28  0.26  0.10       3  0.333  0.500  -0.040
    a helpful crop   0.20  0.22  0.31  0.12       1  1.000  1.000  +0.090
    a harmful crop   0.31  0.29  0.12  0.20       4  0.250  0.431  -0.190

    action             dMRR   dNDCG   dRank  dMargin   full penalty    reward
    FULL             +0.000  +0.000  +0.000  +0.000    0.000   0.000    +0.000
    REGION helpful   +0.667  +0.500  +0.693  +0.130    0.000   0.000    +0.424
    REGION harmful   -0.083  -0.069  -0.223  -0.150    0.000   0.000    -0.135
    MALFORMED        +0.000  +0.000  +0.000  +0.000    0.000   1.000    -1.000

By hand, for the helpful crop: RR goes from 1/3 to 1, NDCG from 1/log2(3+1) = .5 to 1, the rank term is
log((3+1)/(1+1)) = .693, the margin goes from .26-.30 to .31-.22; so .2*.667 + .2*.5 + .2*.693 + .4*.13 = .424.
"""

import argparse

import numpy as np

DECISIONS = ("FULL", "REGION", "MALFORMED")


def check_scores(scores, labels):
    """Return scores as float64 [Q, K] and labels as bool [Q, K], or say what is wrong with them (ValueError)."""
    # Checked once, here. A NaN would be sorted silently to the end of the ranking and pass for a bad candidate.
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape or scores.shape[1] == 0:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must both be [Q, K] with K >= 1")
    bad = ~np.isfinite(scores).all(axis=1)  # [Q]
    if bad.any():
        raise ValueError(f"scores of row {bad.argmax()} are not finite: its embedding overflowed or was never written")
    if not np.isin(labels, (0, 1)).all():  # the paper's y is 0 or 1; graded gains would need another NDCG
        raise ValueError("labels must be 0 or 1")
    return scores, labels.astype(bool)


def metrics(scores, labels, ks=(1, 5, 10, 20)):
    """Metrics of Q rankings, one number per query, to be averaged by `summary` (Sec. 4.1).

    scores: [Q, K] finite, higher is better. labels: [Q, K], 1 for a positive, any number of positives a row.
    Ties keep the order of the pool, so a constant score keeps the retriever's ranking: it earns nothing by luck.

    Returns a dict of arrays [Q]:
      rank          int64, 1-based rank of the best positive; K+1 where the pool has none
      rr, ndcg      float64, 0 where the pool has no positive; NDCG has binary gains and no cut-off
      recall@k      float64 0 or 1: is any positive in the top k (the paper's hit@k; k above K counts as K)
      margin        float64, best positive minus best negative score (Sec. 3.4); NaN where one of them is missing
      has_positive  bool
    Raises ValueError for a wrong shape, a score that is not finite, or a label other than 0 and 1.
    """
    scores, labels = check_scores(scores, labels)
    K = scores.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")  # stable: numpy's default sort would break ties at random
    ranked = np.take_along_axis(labels, order, axis=1)  # [Q, K] labels from first to last place
    has_positive = labels.any(axis=1)  # [Q]
    rank = np.where(has_positive, ranked.argmax(axis=1) + 1, K + 1)  # [Q] argmax of a bool is its first True
    rr = np.where(has_positive, 1.0 / rank, 0.0)  # a miss counts 0 and stays in the mean, it is never dropped

    discount = 1.0 / np.log2(np.arange(2, K + 2))  # [K] place r is worth 1 / log2(r + 1)
    dcg = (ranked * discount).sum(axis=1)  # [Q]
    # The ideal ranking has all P positives in front. 1 in place of 0 / 0 where there is none: dcg is 0 there too.
    ideal = np.concatenate([[1.0], discount.cumsum()])[labels.sum(axis=1)]  # [Q]

    has_both = has_positive & ~labels.all(axis=1)
    best_positive = np.where(labels, scores, -np.inf).max(axis=1)  # [Q]
    best_negative = np.where(labels, -np.inf, scores).max(axis=1)  # [Q]
    margin = np.full(len(scores), np.nan)
    # Max of the positives as printed in the paper, not their mean as in the authors' release.
    margin[has_both] = best_positive[has_both] - best_negative[has_both]
    hits = {f"recall@{k}": ((rank <= k) & has_positive).astype(np.float64) for k in ks}
    return {"rr": rr, "ndcg": dcg / ideal, **hits, "rank": rank, "margin": margin, "has_positive": has_positive}


def summary(per_query):
    """Means over queries: MRR, NDCG, R@k over all of them, CondR@k over those whose pool holds a positive (Eq. 10).

    per_query: what `metrics` returned. CondR@k is None when no pool has a positive. ValueError without queries.
    """
    held = per_query["has_positive"]
    if len(held) == 0:
        raise ValueError("no queries: there is no mean to take")
    means = {"MRR": float(per_query["rr"].mean()), "NDCG": float(per_query["ndcg"].mean())}
    for name, hit in per_query.items():
        if name.startswith("recall@"):
            k = name.removeprefix("recall@")
            means[f"R@{k}"] = float(hit.mean())
            # The expectation of Eq. 10. Its left side, a sum of hit@K / hit@20, would divide by 0 on every miss.
            means[f"CondR@{k}"] = float(hit[held].mean()) if held.any() else None  # Eq. 10
    return means


def reward(decisions, scores, full_scores, labels, weights=(0.2, 0.2, 0.2, 0.4), eta=1.0, kind="delta"):
    """Reward of N actions on one query.

    decisions: N strings, FULL, REGION or MALFORMED. scores: [N, K], the scores of each REGION action's crop; the
    other rows are never read and may be NaN. full_scores: [K], of the full image. labels: [K].
    weights: of dMRR, dNDCG, dRank, dMargin. eta >= 0: what MALFORMED costs.
    kind: "delta" is Eq. 7-8; "absolute" is .5 MRR + .5 NDCG of the view, FULL's too, an option of the authors' release.

    Returns a dict of float64 arrays [N]. For kind "delta", exactly
        total = weights . (d_mrr, d_ndcg, d_rank, d_margin) + full - penalty
      d_mrr, d_ndcg, d_rank, d_margin   un-weighted improvements over the full image (Eq. 5, 6); 0 unless REGION
      full                              1 for FULL where the full image ranks a positive first (Eq. 8), otherwise 0
      penalty                           eta for MALFORMED, otherwise 0
      absolute                          .5 MRR + .5 NDCG of the action's view, 0 for MALFORMED
    Without a negative in the pool the margin is not defined and d_margin is 0.
    Raises ValueError for a pool without positive (train never sees one), an unknown decision or kind, wrong shapes.
    """
    decisions = np.asarray(decisions, dtype=object)  # [N]
    scores, full_scores, labels = np.asarray(scores), np.asarray(full_scores), np.asarray(labels)
    check_actions(decisions, scores, full_scores, labels, weights, eta, kind)
    region, malformed = decisions == "REGION", decisions == "MALFORMED"  # [N] bool
    # An action that is not REGION shows the full image, so all its deltas come out as 0 without a special case.
    viewed = np.where(region[:, None], scores, full_scores)  # [N, K]
    after = metrics(viewed, np.broadcast_to(labels, viewed.shape), ks=())
    before = metrics(full_scores[None], labels[None], ks=())  # arrays [1], broadcast below

    d_mrr = after["rr"] - before["rr"]  # Eq. 5
    d_ndcg = after["ndcg"] - before["ndcg"]  # Eq. 5
    d_rank = np.log((before["rank"] + 1) / (after["rank"] + 1))  # Eq. 6
    # NaN only where the pool has no negative: no crop can change that, so it is no improvement.
    d_margin = np.nan_to_num(after["margin"] - before["margin"], nan=0.0)  # Eq. 6
    full = ((decisions == "FULL") & (before["rank"] == 1)).astype(np.float64)  # Eq. 8
    # eta(b): the release gives unreadable text FULL's reward, which teaches a policy to write nothing.
    penalty = np.where(malformed, float(eta), 0.0)
    absolute = np.where(malformed, 0.0, 0.5 * after["rr"] + 0.5 * after["ndcg"])

    improvement = weights[0] * d_mrr + weights[1] * d_ndcg + weights[2] * d_rank + weights[3] * d_margin
    total = improvement + full - penalty if kind == "delta" else absolute - penalty  # Eq. 7, Eq. 8
    return {"total": total, "d_mrr": d_mrr, "d_ndcg": d_ndcg, "d_rank": d_rank, "d_margin": d_margin,
            "full": full, "penalty": penalty, "absolute": absolute}


def check_actions(decisions, scores, full_scores, labels, weights, eta, kind):
    """Raise ValueError, naming the argument, for anything that `reward` could only answer with a made-up number."""
    unknown = sorted(set(map(str, decisions)) - set(DECISIONS))
    if unknown:
        raise ValueError(f"unknown decision {unknown[0]!r}: use {', '.join(DECISIONS)}")
    if full_scores.ndim != 1 or labels.shape != full_scores.shape or scores.shape != (len(decisions), len(labels)):
        raise ValueError(f"scores {scores.shape}, full_scores {full_scores.shape}, labels {labels.shape} and "
                         f"{len(decisions)} decisions do not fit: they must be [N, K], [K], [K] and N")
    if not labels.any():
        raise ValueError("no positive in this pool: re-ranking cannot earn anything, leave the query out of training")
    if len(weights) != 4 or not np.isfinite(weights).all() or not 0 <= eta < np.inf:
        raise ValueError(f"weights {weights} must be four finite numbers and eta {eta} finite and not negative")
    if kind not in ("delta", "absolute"):
        raise ValueError(f"unknown reward kind {kind!r}: use delta or absolute")


def main():
    """Print the worked example of the module's docstring."""
    labels, full = np.array([0, 0, 1, 0]), np.array([0.30, 0.28, 0.26, 0.10])
    helpful, harmful = np.array([0.20, 0.22, 0.31, 0.12]), np.array([0.31, 0.29, 0.12, 0.20])
    print(f"{'labels':15}" + "".join(f"{y:6d}" for y in labels) + "    rank     RR   NDCG  margin")
    for name, row in (("full image", full), ("a helpful crop", helpful), ("a harmful crop", harmful)):
        m = {key: value[0] for key, value in metrics(row[None], labels[None]).items()}
        print(f"{name:15}" + "".join(f"{s:6.2f}" for s in row)
              + f"{m['rank']:8d} {m['rr']:6.3f} {m['ndcg']:6.3f}  {m['margin']:+.3f}")

    no_crop = np.full(4, np.nan)  # FULL and MALFORMED bring no scores of their own
    r = reward(["FULL", "REGION", "REGION", "MALFORMED"], np.stack([no_crop, helpful, harmful, no_crop]), full, labels)
    print(f"\n{'action':15}    dMRR   dNDCG   dRank  dMargin   full penalty    reward")
    for n, name in enumerate(("FULL", "REGION helpful", "REGION harmful", "MALFORMED")):
        deltas = "  ".join(f"{r[key][n]:+.3f}" for key in ("d_mrr", "d_ndcg", "d_rank", "d_margin"))
        print(f"{name:15}  {deltas}    {r['full'][n]:.3f}   {r['penalty'][n]:.3f}    {r['total'][n]:+.3f}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
