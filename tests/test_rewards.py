"""rewards.py: values worked by hand, ties, properties, and parity with trec_eval.

    pytest tests/test_rewards.py
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards

ROOT = Path(__file__).resolve().parent.parent
NAN = float("nan")


def one(scores, labels, ks=(1, 2, 5)):
    """Metrics of a single query, as plain numbers."""
    return {k: v[0] for k, v in rewards.metrics(np.array([scores]), np.array([labels]), ks).items()}


# ---------------------------------------------------------------- values worked by hand


def test_one_positive_at_rank_3():
    m = one([0.30, 0.28, 0.26, 0.10], [0, 0, 1, 0])
    assert m["rank"] == 3
    assert m["rr"] == pytest.approx(1 / 3)
    assert m["ndcg"] == pytest.approx(1 / math.log2(3 + 1))  # .5; the ideal DCG of one positive is 1 / log2(2) = 1
    assert (m["recall@1"], m["recall@2"], m["recall@5"]) == (0, 0, 1)  # 5 is more than K = 4: the whole pool
    assert m["margin"] == pytest.approx(0.26 - 0.30)
    assert m["has_positive"]


def test_several_positives():
    # Ranking by score: c1 (.9, negative), c3 (.8, positive), c0 (.5, positive), c2 (.1, negative).
    m = one([0.5, 0.9, 0.1, 0.8], [1, 0, 0, 1])
    assert m["rank"] == 2 and m["rr"] == 1 / 2  # the best placed positive counts
    dcg = 1 / math.log2(2 + 1) + 1 / math.log2(3 + 1)  # ranks 2 and 3
    ideal = 1 / math.log2(1 + 1) + 1 / math.log2(2 + 1)  # ranks 1 and 2
    assert m["ndcg"] == pytest.approx(dcg / ideal)
    assert m["recall@2"] == 1  # a hit, not the share of the positives found
    assert m["margin"] == pytest.approx(0.8 - 0.9)  # the best positive, not the mean .65


def test_no_positive():
    m = one([0.3, 0.2, 0.1], [0, 0, 0])
    assert m["rank"] == 4  # K + 1
    assert (m["rr"], m["ndcg"], m["recall@1"], m["recall@5"]) == (0, 0, 0, 0)
    assert math.isnan(m["margin"]) and not m["has_positive"]


def test_no_negative():
    m = one([0.3, 0.2, 0.1], [1, 1, 1])
    assert (m["rank"], m["rr"], m["recall@1"]) == (1, 1, 1)
    assert m["ndcg"] == pytest.approx(1)
    assert math.isnan(m["margin"])


@pytest.mark.parametrize("place", range(20))
def test_ties_keep_the_order_of_the_pool(place):
    # A constant score keeps the retriever's ranking.
    labels = np.eye(20, dtype=int)[place]
    assert one(np.full(20, 0.25), labels)["rank"] == place + 1


def test_partial_tie():
    assert one([0.5, 0.7, 0.7, 0.7], [0, 0, 1, 0])["rank"] == 2  # c1, c2, c3 share .7, in that order


def test_summary_averages_misses_as_zero():
    # Ranks 1, 3, 2 and a pool without positive.
    scores = np.tile([0.4, 0.3, 0.2, 0.1], (4, 1))
    labels = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    s = rewards.summary(rewards.metrics(scores, labels, ks=(1, 2)))
    assert s["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 2 + 0) / 4)
    assert s["NDCG"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(3) + 0) / 4)
    assert s["R@1"] == 1 / 4 and s["CondR@1"] == pytest.approx(1 / 3)  # Eq. 10: 3 pools hold the positive
    assert s["R@2"] == 2 / 4 and s["CondR@2"] == pytest.approx(2 / 3)


def test_summary_without_any_positive_or_query():
    s = rewards.summary(rewards.metrics(np.zeros((2, 3)), np.zeros((2, 3)), ks=(1,)))
    assert s == {"MRR": 0, "NDCG": 0, "R@1": 0, "CondR@1": None}
    with pytest.raises(ValueError, match="no queries"):
        rewards.summary(rewards.metrics(np.zeros((0, 3)), np.zeros((0, 3))))


@pytest.mark.parametrize("scores, labels, message", [
    ([[0.1, NAN], [0.1, 0.2]], [[1, 0], [1, 0]], "row 0"),
    ([[0.1, 0.2], [0.1, np.inf]], [[1, 0], [1, 0]], "row 1"),
    ([[0.1, 0.2]], [[1, 2]], "0 or 1"),
    ([[0.1, 0.2]], [[1, 0, 0]], "must both be"),
    ([0.1, 0.2], [1, 0], "must both be"),
    (np.zeros((1, 0)), np.zeros((1, 0)), "must both be"),
])
def test_metrics_refuse_bad_input(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        rewards.metrics(scores, labels)


# ---------------------------------------------------------------- the reward

LABELS, FULL = [0, 0, 1, 0], [0.30, 0.28, 0.26, 0.10]  # the full image ranks the positive third
HELPFUL, HARMFUL, UNREAD = [0.20, 0.22, 0.31, 0.12], [0.31, 0.29, 0.12, 0.20], [NAN] * 4


def test_reward_by_hand():
    r = rewards.reward(["FULL", "REGION", "REGION", "MALFORMED"], [UNREAD, HELPFUL, HARMFUL, UNREAD], FULL, LABELS)
    assert r["d_mrr"] == pytest.approx([0, 1 - 1 / 3, 1 / 4 - 1 / 3, 0])
    assert r["d_ndcg"] == pytest.approx([0, 1 - 0.5, 1 / math.log2(5) - 0.5, 0])
    assert r["d_rank"] == pytest.approx([0, math.log(4 / 2), math.log(4 / 5), 0])  # ranks 3 -> 1 and 3 -> 4
    assert r["d_margin"] == pytest.approx([0, (0.31 - 0.22) + 0.04, (0.12 - 0.31) + 0.04, 0])
    assert r["full"].tolist() == [0, 0, 0, 0] and r["penalty"].tolist() == [0, 0, 0, 1]
    helpful = 0.2 * 2 / 3 + 0.2 * 0.5 + 0.2 * math.log(2) + 0.4 * 0.13  # .1333 + .1 + .1386 + .052 = .4240
    assert r["total"] == pytest.approx([0, helpful, -0.13517, -1], abs=1e-5)
    assert all(values.dtype == np.float64 and values.shape == (4,) for values in r.values())


def test_full_pays_only_where_the_full_image_is_right():
    labels = [1, 0, 0, 0]  # FULL above ranks this one first
    r = rewards.reward(["FULL", "REGION", "MALFORMED"], [UNREAD, FULL, UNREAD], FULL, labels)
    assert r["total"].tolist() == [1, 0, -1]  # an unchanged view earns REGION nothing, whatever its rank
    assert r["full"].tolist() == [1, 0, 0]  # MALFORMED never gets FULL's reward


def test_weights_and_eta():
    for i, name in enumerate(("d_mrr", "d_ndcg", "d_rank", "d_margin")):
        r = rewards.reward(["REGION", "MALFORMED"], [HELPFUL, UNREAD], FULL, LABELS, weights=np.eye(4)[i], eta=0.25)
        assert r["total"][0] == r[name][0] != 0
        assert r["total"][1] == -0.25


def test_absolute_reward():
    r = rewards.reward(["FULL", "REGION", "MALFORMED"], [UNREAD, HARMFUL, UNREAD], FULL, LABELS, kind="absolute")
    # FULL: rank 3, .5 / 3 + .5 / 2 = .41667. REGION: rank 4, .5 / 4 + .5 / log2(5).
    assert r["total"] == pytest.approx([5 / 12, 0.125 + 0.5 / math.log2(5), -1])
    assert r["absolute"] == pytest.approx([5 / 12, 0.125 + 0.5 / math.log2(5), 0])


def test_a_pool_without_negative_has_no_margin_to_improve():
    r = rewards.reward(["REGION"], [[0.9, 0.8]], [0.1, 0.2], [1, 1])
    assert r["d_margin"].tolist() == [0] and r["total"].tolist() == [0]


def test_a_constant_crop_earns_no_more_than_the_order_of_the_pool():
    # FULL is in pool order, so a constant crop keeps every rank; only the margin moves, from -.04 to 0.
    r = rewards.reward(["REGION"], [[0.5] * 4], FULL, LABELS)
    assert (r["d_mrr"][0], r["d_ndcg"][0], r["d_rank"][0]) == (0, 0, 0)
    assert r["total"][0] == pytest.approx(0.4 * (0 - -0.04))


@pytest.mark.parametrize("change, message", [
    (dict(labels=[0, 0, 0, 0]), "no positive"),
    (dict(decisions=["CROP"]), "unknown decision 'CROP'"),
    (dict(decisions=["REGION", "REGION"]), "do not fit"),
    (dict(full_scores=[0.1, 0.2]), "do not fit"),
    (dict(scores=[UNREAD]), "not finite"),  # a REGION row must have been scored
    (dict(full_scores=UNREAD), "not finite"),
    (dict(weights=(1, 0)), "four finite"),
    (dict(eta=-1), "not negative"),
    (dict(eta=NAN), "not negative"),
    (dict(kind="mixture"), "unknown reward kind"),
])
def test_reward_refuses_bad_input(change, message):
    given_ = dict(decisions=["REGION"], scores=[HELPFUL], full_scores=FULL, labels=LABELS) | change
    with pytest.raises(ValueError, match=message):
        rewards.reward(**given_)


# ---------------------------------------------------------------- properties

@st.composite
def pools(draw, positive=False):
    """Scores in thousandths and labels of one pool; few values when ties are wanted."""
    K = draw(st.integers(1, 20))
    scores = draw(st.lists(st.integers(-5, 5), min_size=K, max_size=K))
    labels = draw(st.lists(st.integers(0, 1), min_size=K, max_size=K))
    if positive:
        labels[draw(st.integers(0, K - 1))] = 1
    return np.array(scores) / 1000, np.array(labels)


def slow_metrics(scores, labels):
    """The definitions written out with a Python sort, one query at a time: the oracle."""
    ranked = [y for _, _, y in sorted(zip(-scores, range(len(scores)), labels))]
    rank = ranked.index(1) + 1 if 1 in ranked else len(ranked) + 1
    dcg = sum(y / math.log2(r + 1) for r, y in enumerate(ranked, start=1))
    ideal = sum(y / math.log2(r + 1) for r, y in enumerate(sorted(ranked, reverse=True), start=1))
    return rank, dcg / ideal if ideal else 0.0


@settings(max_examples=200, deadline=None)
@given(pools())
def test_metrics_equal_the_slow_way(pool):
    scores, labels = pool
    rank, ndcg = slow_metrics(scores, labels)
    m = one(scores, labels)
    assert m["rank"] == rank
    assert m["ndcg"] == pytest.approx(ndcg)
    assert m["rr"] == (1 / rank if labels.any() else 0)
    assert m["recall@2"] == float(labels.any() and rank <= 2)


@settings(max_examples=100, deadline=None)
@given(pools())
def test_bounds(pool):
    scores, labels = pool
    m = one(scores, labels, ks=(1, 2, 5, 20))
    assert 0 <= m["rr"] <= 1 and 0 <= m["ndcg"] <= 1 + 1e-12 and 1 <= m["rank"] <= len(scores) + 1
    assert m["recall@1"] <= m["recall@2"] <= m["recall@5"] <= m["recall@20"] == float(m["has_positive"])
    assert m["rr"] <= m["ndcg"] + 1e-12 or labels.sum() > 1  # 1 / r <= 1 / log2(r + 1) for one positive


@settings(max_examples=100, deadline=None)
@given(pools(positive=True))
def test_identical_scores_earn_nothing(pool):
    scores, labels = pool
    r = rewards.reward(["REGION", "FULL"], [scores, [NAN] * len(scores)], scores, labels)
    for name in ("d_mrr", "d_ndcg", "d_rank", "d_margin"):
        assert r[name].tolist() == [0, 0]
    assert r["total"].tolist() == [0, float(one(scores, labels)["rank"] == 1)]


@settings(max_examples=100, deadline=None)
@given(pools(positive=True), st.data())
def test_components_add_up_and_deltas_are_antisymmetric(pool, data):
    scores, labels = pool
    other = np.array(data.draw(st.lists(st.integers(-5, 5), min_size=len(scores), max_size=len(scores)))) / 1000
    there = rewards.reward(["REGION"], [other], scores, labels)
    back = rewards.reward(["REGION"], [scores], other, labels)
    for name in ("d_mrr", "d_ndcg", "d_rank", "d_margin", "total"):
        assert there[name][0] == pytest.approx(-back[name][0], abs=1e-12)
    parts = [there[name][0] for name in ("d_mrr", "d_ndcg", "d_rank", "d_margin")]
    assert there["total"][0] == pytest.approx(np.dot((0.2, 0.2, 0.2, 0.4), parts))


# ---------------------------------------------------------------- parity with TREC's own program

@pytest.mark.parametrize("ties", [False, True])
def test_parity_with_trec_eval(ties):
    rng = np.random.default_rng(0)
    Q, K = 200, 20
    # trec_eval keeps scores in float32, so they are spaced far beyond its precision; a fifth of the pools is empty.
    scores = rng.permuted(np.tile(np.arange(K), (Q, 1)), axis=1) / K
    if ties:
        scores = np.floor(scores * 5) / 5  # 4 candidates a value
    labels = (rng.random((Q, K)) < 0.08).astype(int)
    assert (labels.sum(1) == 0).any() and (labels.sum(1) > 1).any()
    ours = rewards.metrics(scores, labels, ks=(1, 5, 10))

    # Ties: trec_eval puts the greater document id first, we the earlier place in the pool. Ids that fall along the
    # pool make both the same ranking.
    names = [f"d{K - j:02d}" for j in range(K)]
    qrels = {f"q{i}": dict(zip(names, map(int, labels[i]))) for i in range(Q)}
    run = {f"q{i}": dict(zip(names, map(float, scores[i]))) for i in range(Q)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "ndcg", "success.1,5,10"}).evaluate(run)
    assert len(theirs) == Q  # queries without positive are not dropped: they count 0
    for mine, name in {"rr": "recip_rank", "ndcg": "ndcg", "recall@1": "success_1", "recall@5": "success_5",
                       "recall@10": "success_10"}.items():
        np.testing.assert_allclose(ours[mine], [theirs[f"q{i}"][name] for i in range(Q)], atol=1e-12)


def test_running_the_file_prints_the_worked_example_of_its_docstring():
    ran = subprocess.run([sys.executable, "rewards.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == 10
    printed = "\n".join(f"    {line}" if line else "" for line in lines)
    assert printed in rewards.__doc__


def test_help_says_what_the_file_is_for():
    ran = subprocess.run([sys.executable, "rewards.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert rewards.__doc__.splitlines()[0] in ran.stdout and "\nlabels  " not in ran.stdout  # and does not run the demo
