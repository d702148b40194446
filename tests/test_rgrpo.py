"""rgrpo.py: who is forced, what each mode gives whom, the loss and its gradient, and whether all of it learns.

    pytest tests/test_rgrpo.py
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rgrpo
from rgrpo import FULL, MALFORMED, REGION

ROOT = Path(__file__).resolve().parent.parent
F, R, X = "FULL", "REGION", "MALFORMED"

# A group of 4: FULL pays 1 twice, the boxes .2 and -.2. Mean .5; deviations .5, .5, -.3, -.7; variance
# (.25 + .25 + .09 + .49) / 4 = .27. Among the boxes: mean 0, deviation .2.
REWARDS = torch.tensor([[1.0, 1.0, 0.2, -0.2]])
DECISIONS = torch.tensor([[FULL, FULL, REGION, REGION]])
SIGMA = math.sqrt(0.27)
GROUP = [0.5 / SIGMA, 0.5 / SIGMA, -0.3 / SIGMA, -0.7 / SIGMA]
ALIKE = [0.0, 0.0, 1.0, -1.0]


def advantages(*args, **kwargs):
    """rgrpo.advantages of one group, as two lists; eps 0 leaves the arithmetic of the tests bare."""
    decision, box = rgrpo.advantages(*args, **{"eps": 0.0} | kwargs)
    assert decision.dtype == box.dtype == torch.float32
    return decision[0].tolist(), box[0].tolist()


def approx(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance)


# ---------------------------------------------------------------- plan

def test_force_splits_the_group():
    assert rgrpo.plan(8) == [F] * 4 + [R] * 4
    assert rgrpo.plan(5) == [F, F, R, R, R]  # FULL's reward is a constant, so the odd one is a box
    assert rgrpo.plan(2, "force", [F, F]) == [F, R]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_analytic_spends_all_rollouts_on_boxes(n):
    """It is `force` of twice the size, whose mean gradient is enumerated below; FULL is written once all the same."""
    assert rgrpo.plan(n, "analytic") == rgrpo.plan(2 * n, "force") == [F] * n + [R] * n


def test_more_boxes_make_the_estimate_steadier():
    """The decision's advantage is FULL's known reward against a mean over the boxes: its variance is theirs over n."""
    draw, variances = np.random.default_rng(0), []
    for n in (2, 8):
        boxes = torch.tensor(draw.choice([0.9, -0.4, 0.1], (4000, n)))
        rewards = torch.cat([torch.full((4000, n), 0.7, dtype=torch.float64), boxes], 1)
        codes = torch.tensor([[FULL] * n + [REGION] * n] * 4000)
        decision, _ = rgrpo.advantages(rewards, codes, std=False)
        variances.append(decision[:, 0].double().var().item())  # (.7 - mean) / 2
    assert 3.6 < variances[0] / variances[1] < 4.4


def test_none_and_a_first_resample_force_nothing():
    assert rgrpo.plan(4, "none") == rgrpo.plan(4, "resample") == [None] * 4
    assert rgrpo.plan(4, "none", [F] * 4) == [None] * 4


@pytest.mark.parametrize("sampled, forced", [
    ([F, F, F, F], [None, None, None, R]),
    ([R, R, R, R], [None, None, None, F]),
    ([F, R, F, F], [None] * 4),
    ([R, X, X, R], [None, None, None, F]),
    ([X, X, X, R], [None, None, F, None]),  # the only REGION is not given up
    ([X, X, X, X], [None, None, R, F]),
    ([X, X], [R, F]),
    ([X, F], [R, None]),
])
def test_resample_by_hand(sampled, forced):
    assert rgrpo.plan(len(sampled), "resample", sampled) == forced


@pytest.mark.parametrize("n", [2, 3, 5])
def test_resample_forces_the_smallest_number(n):
    for sampled in itertools.product((F, R, X), repeat=n):
        forced = rgrpo.plan(n, "resample", list(sampled))
        after = [f or s for f, s in zip(forced, sampled)]
        assert F in after and R in after
        assert sum(f is not None for f in forced) == (F not in sampled) + (R not in sampled)


@pytest.mark.parametrize("args", [(1,), (4, "half"), (4, "resample", [F]), (2, "resample", [F, "CROP"])])
def test_plan_refuses(args):
    with pytest.raises(ValueError):
        rgrpo.plan(*args)


# ---------------------------------------------------------------- advantages, by hand

@pytest.mark.parametrize("mode, decision, box", [
    ("group", GROUP, GROUP),
    ("balanced", GROUP, GROUP),  # equal to group at an even split
    ("conditional", ALIKE, ALIKE),
    ("factored", GROUP, ALIKE),
])
def test_modes_by_hand(mode, decision, box):
    got_decision, got_box = advantages(REWARDS, DECISIONS, mode)
    assert got_decision == approx(decision) and got_box == approx(box)


def test_without_std_by_hand():
    assert advantages(REWARDS, DECISIONS, std=False) == (approx([0.5, 0.5, -0.3, -0.7]), approx([0, 0, 0.2, -0.2]))


def test_pi_by_hand():
    # pi(REGION) = .25: V = .75 * 1 + .25 * 0 = .75; r - V = .25, .25, -.55, -.95. Each branch is half of the group, so
    # FULL counts .75 / .5 = 1.5 and REGION .25 / .5 = .5 times.
    by_hand = [0.375, 0.375, -0.275, -0.475]
    p = torch.tensor([0.25])
    decision, box = advantages(REWARDS, DECISIONS, decision_weight="pi", p_region=p, std=False)
    assert decision == approx(by_hand) and box == approx([0, 0, 0.2, -0.2])  # the boxes are not weighed
    decision, _ = advantages(REWARDS, DECISIONS, decision_weight="pi", p_region=p)
    assert decision == approx([a / SIGMA for a in by_hand])  # still the balanced group's sigma
    half = advantages(REWARDS, DECISIONS, decision_weight="pi", p_region=torch.tensor([0.5]))
    assert half[0] == approx(GROUP)  # pi at one half is uniform


@pytest.mark.parametrize("weight, wanted", [("uniform", lambda p: 1.0), ("pi", lambda p: 4 * p * (1 - p))])
def test_how_hard_the_decision_is_pushed(weight, wanted):
    """d loss / d logit of p(REGION), where REGION earns 1 and FULL 0; under pi it is the true p (1 - p)."""
    for logit in (-6.0, -1.0, 0.0, 2.0, 6.0):
        x = torch.tensor(logit, requires_grad=True)
        p = x.detach().sigmoid()[None]
        decision, _ = rgrpo.advantages(1 - REWARDS.round(), DECISIONS, "factored", weight, p, std=False)  # 0, 0, 1, 1
        logp = torch.nn.functional.logsigmoid(x * torch.tensor([-1.0, -1, 1, 1]))
        rgrpo.loss(logp[:, None], logp[:, None].detach(), decision.T, torch.ones(4, 1, dtype=torch.bool))[0].backward()
        assert x.grad.item() == pytest.approx(-0.25 * wanted(p.item()), abs=1e-6)


@pytest.mark.parametrize("rewards, p_right", [(REWARDS, lambda p: 1 - p), (1 - REWARDS, lambda p: p)])
def test_what_is_right_and_sure_is_pushed_no_further(rewards, p_right):
    for p in (0.01, 0.03, 0.5, 0.97, 0.99):
        found = advantages(rewards, DECISIONS, p_region=torch.tensor([p]), sure=0.98)
        always = advantages(rewards, DECISIONS)
        assert found[0] == (approx([0] * 4) if p_right(p) > 0.98 else always[0]) and found[1] == always[1]
    assert advantages(rewards, DECISIONS, sure=0.98) == always  # in free text p is not known


def test_balanced_weighs_decisions_not_rollouts():
    # One FULL of 1, three REGION of 0: baseline .5 (group: .25), deviation .5.
    rewards, decisions = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[FULL, REGION, REGION, REGION]])
    assert advantages(rewards, decisions, "balanced")[0] == approx([1, -1, -1, -1])
    assert advantages(rewards, decisions, "group", std=False)[0] == approx([0.75, -0.25, -0.25, -0.25])
    lonely = torch.full((1, 4), REGION)  # one decision alone is the whole group
    assert advantages(rewards, lonely, "balanced")[0] == approx(advantages(rewards, lonely, "group")[0])


@pytest.mark.parametrize("mode", ["group", "balanced", "conditional", "factored"])
def test_malformed_gets_the_groups_advantage_and_spoils_no_z_score(mode):
    # 1, .2, -.2, -1: mean 0, sigma sqrt(2.08 / 4). Even with one FULL, two REGION, one MALFORMED.
    rewards, decisions = torch.tensor([[1.0, 0.2, -0.2, -1.0]]), torch.tensor([[FULL, REGION, REGION, MALFORMED]])
    decision, box = advantages(rewards, decisions, mode)
    if mode == "balanced":
        # MALFORMED keeps 1/4, FULL has 3/8, the REGION 3/16 each: mean .375 + 0 - .25 = .125,
        # variance 3/8 * .875^2 + 3/16 * (.075^2 + .325^2) + 1/4 * 1.125^2 = .6243.
        assert decision[3] == box[3] == approx(-1.125 / math.sqrt(0.62438), 1e-4)
    else:
        assert decision[3] == box[3] == approx(-1 / math.sqrt(0.52))
    if mode in ("factored", "conditional"):
        assert box[:3] == approx([0, 1, -1])


def test_box_deviation_has_a_floor():
    # Boxes that differ by noise: deviation .001, z-score 1 without a floor, .001 / .05 with it.
    rewards = torch.tensor([[1.0, 1.0, 0.101, 0.099]])
    assert advantages(rewards, DECISIONS)[1] == approx([0, 0, 0.02, -0.02])
    assert advantages(rewards, DECISIONS, std_floor=1e-6)[1] == approx([0, 0, 1, -1], 1e-4)


def test_a_single_region_teaches_no_box():
    decision, box = advantages(torch.tensor([[1.0, 1, 1, 0.3]]), torch.tensor([[FULL, FULL, FULL, REGION]]))
    assert box == [0, 0, 0, 0] and decision[3] < 0


@pytest.mark.parametrize("mode, weight", [("group", "uniform"), ("balanced", "uniform"), ("conditional", "uniform"),
                                          ("factored", "uniform"), ("factored", "pi")])
def test_a_weighted_entry_equals_its_copies(mode, weight):
    torch.manual_seed(0)
    boxes, p = torch.randn(3, 4), torch.rand(3)
    copies = torch.cat([torch.ones(3, 4), boxes], 1)  # [B, 8]
    once = torch.cat([torch.ones(3, 1), boxes], 1)  # [B, 5]
    weights = torch.tensor([4.0, 1, 1, 1, 1]).expand(3, 5)
    long = rgrpo.advantages(copies, torch.tensor([[FULL] * 4 + [REGION] * 4] * 3), mode, weight, p)
    short = rgrpo.advantages(once, torch.tensor([[FULL] + [REGION] * 4] * 3), mode, weight, p, weights)
    for many, few in zip(long, short):
        torch.testing.assert_close(few[:, 0], many[:, 0])
        torch.testing.assert_close(few[:, 1:], many[:, 4:])


def test_groups_do_not_touch_each_other():
    rewards, decisions = torch.cat([REWARDS, REWARDS * 7 - 3]), DECISIONS.expand(2, 4)
    both = rgrpo.advantages(rewards, decisions)[0]
    assert torch.equal(both[0], rgrpo.advantages(REWARDS, DECISIONS)[0][0])
    torch.testing.assert_close(both[0], both[1], atol=1e-3, rtol=0)  # Eq. 9 ignores scale and shift, but for eps


def test_groups_without_advantage_are_found():
    rewards = torch.tensor([[0.1] * 4, [0.0] * 4, [1.0, 1.0, 0.2, -0.2], [0.0, 0.0, 0.2, -0.2]])
    decision, box = rgrpo.advantages(rewards, DECISIONS.expand(4, 4))
    assert rgrpo.zero_advantage(decision, box).tolist() == [True, True, False, False]
    # Plain GRPO: all FULL, or all boxes equally good. The mean of these in float32 is not quite the reward, and the
    # remainder over eps would pass for an advantage.
    for n in range(2, 33):
        same = torch.tensor([[FULL] * n, [REGION] * n])
        assert rgrpo.zero_advantage(*rgrpo.advantages(torch.full((2, n), 0.15), same)).all()


@pytest.mark.parametrize("change, message", [
    (dict(rewards=torch.tensor([[1.0, 1.0, math.nan, 0.0]])), "group 0"),
    (dict(decisions=DECISIONS[:, :3]), "B, N"),
    (dict(mode="factorised"), "unknown mode"),
    (dict(decision_weight="half"), "decision weight"),
    (dict(decision_weight="pi"), "p_region"),
    (dict(decision_weight="pi", mode="group", p_region=torch.tensor([0.5])), "factored"),
    (dict(weights=torch.tensor([[1.0, 1, 1, 0]])), "weights"),
])
def test_advantages_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        rgrpo.advantages(**(dict(rewards=REWARDS, decisions=DECISIONS) | change))


# ---------------------------------------------------------------- the estimator against enumeration

FULL_REWARD, BOX_REWARDS = 0.7, torch.tensor([0.9, -0.4, 0.1])


def log_probs(theta):
    """A policy of four numbers, the logits of REGION and of three boxes: log pi(FULL), log pi(REGION), log pi(b)."""
    log_sigmoid = torch.nn.functional.logsigmoid
    return log_sigmoid(-theta[0]), log_sigmoid(theta[0]), theta[1:].log_softmax(0)


def true_gradients(theta):
    """The gradients of the expected reward by enumeration: all of it, and what Q(REGION) alone gives."""
    full, region, box = log_probs(theta)
    q_region = (box.exp() * BOX_REWARDS.to(theta)).sum()
    whole = torch.autograd.grad(full.exp() * FULL_REWARD + region.exp() * q_region, theta, retain_graph=True)[0]
    return whole, torch.autograd.grad(q_region, theta)[0]


def expected_gradient(theta, weight):
    """Mean of -grad loss over every draw of two boxes in a group of 2 FULL and 2 REGION, each with its probability."""
    mean = torch.zeros_like(theta)
    for boxes in itertools.product(range(3), repeat=2):
        full, region, box = log_probs(theta)
        b = list(boxes)
        rewards = torch.tensor([[FULL_REWARD, FULL_REWARD, *BOX_REWARDS[b]]])
        pair = rgrpo.advantages(rewards, DECISIONS, "factored", weight, region.detach().exp()[None], std=False)
        nothing = torch.zeros_like(full)
        logp = torch.stack([torch.stack([full, full, region, region]), torch.stack([nothing, nothing, *box[b]])], 1)
        free = torch.tensor([[True, False], [True, False], [True, True], [True, True]])
        # total = N: the mean over rollouts of the sum over tokens, which is what a policy gradient is.
        value, _ = rgrpo.loss(logp, logp.detach(), torch.stack([a[0] for a in pair], 1), free, total=4.0)
        mean -= box.detach()[b].sum().exp() * torch.autograd.grad(value, theta)[0]
    return mean


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 2.0])
def test_mean_of_the_estimator_equals_the_enumerated_gradient(logit):
    theta = torch.tensor([logit, 0.3, -0.2, 0.8], requires_grad=True)
    p = theta[0].sigmoid().item()
    whole, of_boxes = true_gradients(theta)
    estimate = expected_gradient(theta, "pi")
    torch.testing.assert_close(estimate[0], whole[0], atol=1e-6, rtol=1e-5)  # the decision: exactly
    # The boxes: 2 of 4 rollouts are REGION whatever pi(REGION) is, and a mean over 2 boxes that holds the box itself
    # halves the deviation. So 2/4 * 1/2 of the gradient of Q(REGION), where the true one has pi(REGION) of it.
    torch.testing.assert_close(estimate[1:], 0.25 * of_boxes[1:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole[1:], p * of_boxes[1:], atol=1e-6, rtol=1e-5)

    # Uniform: the same direction, larger by 1 / (4 pi(FULL) pi(REGION)), which is 1 at one half.
    uniform = expected_gradient(theta, "uniform")
    torch.testing.assert_close(uniform[0], whole[0] / (4 * p * (1 - p)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(uniform[1:], estimate[1:])


def test_conditional_gives_the_decision_no_gradient():
    decision, _ = rgrpo.advantages(torch.tensor([[1.0, 1, 0.5, 0.3, -0.9, -0.6]]),
                                   torch.tensor([[FULL] * 2 + [REGION] * 4]), "conditional")
    assert decision[0, :2].tolist() == [0, 0]
    assert decision[0, 2:].sum().item() == approx(0)  # all of them multiply the same grad log pi(REGION)


# ---------------------------------------------------------------- the loss

@pytest.mark.parametrize("ratio, advantage, objective, clipped, slope", [
    (1.0, 2.0, 2.0, 0.0, 2.0),
    (1.1, 1.0, 1.1, 0.0, 1.1),
    (0.9, -1.0, -0.9, 0.0, -0.9),
    (1.5, 1.0, 1.2, 1.0, 0.0),  # already made likelier by more than .2: no further push
    (0.5, 1.0, 0.5, 0.0, 0.5),  # a good one made rarer is always pulled back
    (0.5, -1.0, -0.8, 1.0, 0.0),  # already made rarer by more than .2
    (1.5, -1.0, -1.5, 0.0, -1.5),  # a bad one made likelier is always pushed back
    (1.5, 0.0, 0.0, 0.0, 0.0),
])
def test_clip_by_hand(ratio, advantage, objective, clipped, slope):
    old = torch.tensor([[-1.3]])
    logp = (old + math.log(ratio)).requires_grad_()
    value, numbers = rgrpo.loss(logp, old, torch.tensor([[advantage]]), torch.tensor([[True]]), clip=0.2)
    value.backward()
    assert value.item() == approx(-objective) and logp.grad.item() == approx(-slope)  # d ratio / d logp = ratio
    assert numbers["clip_fraction"] == clipped
    assert numbers["ratio_max"] == approx(ratio) and numbers["loss"] == value.item() and numbers["kl"] == 0


def test_kl_is_k3():
    logp, ref = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.5, -1.0]])
    # ref - logp = -.5 and 1: exp(-.5) + .5 - 1 = .10653, exp(1) - 1 - 1 = .71828.
    k3 = [math.exp(-0.5) + 0.5 - 1, math.e - 2]
    value, numbers = rgrpo.loss(logp, logp.detach(), torch.zeros(1, 2), torch.ones(1, 2) > 0, ref_logp=ref, beta=0.1)
    value.backward()
    assert numbers["kl"] == approx(sum(k3) / 2) and value.item() == approx(0.1 * sum(k3) / 2)
    # d k3 / d logp = 1 - exp(ref - logp), over 2 tokens
    assert logp.grad[0].tolist() == approx([0.1 * (1 - math.exp(-0.5)) / 2, 0.1 * (1 - math.e) / 2])


def test_k3_estimates_the_kl_divergence_and_is_never_negative():
    torch.manual_seed(0)
    policy, ref = torch.randn(6).log_softmax(0), torch.randn(6).log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum().item()
    mask, zeros = torch.ones(6, 1) > 0, torch.zeros(6, 1)
    # Each of the six tokens in proportion to its probability: the mean over the policy itself.
    _, numbers = rgrpo.loss(policy[:, None], policy[:, None], zeros, mask, ref_logp=ref[:, None], weights=policy.exp())
    assert numbers["kl"] == approx(exact)
    for i in range(6):
        row = slice(i, i + 1)
        kl = rgrpo.loss(policy[row, None], policy[row, None], zeros[:1], mask[:1], ref_logp=ref[row, None])[1]["kl"]
        assert kl >= 0


def test_beta_0_reports_the_kl_but_does_not_push():
    logp, ref = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-2.0]])
    value, numbers = rgrpo.loss(logp, logp.detach(), torch.zeros(1, 1), torch.tensor([[True]]), ref_logp=ref)
    assert value.item() == 0 and numbers["kl"] == approx(math.exp(-1))  # exp(-1) + 1 - 1


def test_token_and_sequence_normalisation_by_hand():
    # Two rollouts of 1 and 3 tokens, advantages 1 and -1, ratio 1.
    mask = torch.tensor([[True, False, False], [True, True, True]])
    a, logp = torch.tensor([[1.0] * 3, [-1.0] * 3]), torch.zeros(2, 3)
    assert rgrpo.loss(logp, logp, a, mask)[0].item() == approx(-(1 - 3) / 4)
    assert rgrpo.loss(logp, logp, a, mask, norm="sequence")[0].item() == approx(-(1 - 1) / 2)
    assert rgrpo.token_weights(mask, "sequence").tolist() == [[1, 0, 0], approx([1 / 3] * 3)]
    assert rgrpo.token_weights(mask, "token", torch.tensor([4.0, 1.0])).sum() == 4 + 3


def batch(seed=0, M=5, T=4):
    torch.manual_seed(seed)
    mask = torch.rand(M, T) < 0.7
    mask[:, 0] = True
    old = torch.randn(M, T)
    return (old + 0.3 * torch.randn(M, T)), old, torch.randn(M, T), mask, old + 0.3 * torch.randn(M, T)


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_a_weighted_full_rollout_equals_its_copies(norm):
    logp, old, a, mask, ref = batch()
    mask[0, 1:] = False  # row 0 is FULL: its decision token alone
    copies = [0] * 4 + [1, 2, 3, 4]
    long, short = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    many = rgrpo.loss(long[copies], old[copies], a[copies], mask[copies], ref_logp=ref[copies], beta=0.04, norm=norm)
    weights = torch.tensor([4.0, 1, 1, 1, 1])
    few = rgrpo.loss(short, old, a, mask, ref_logp=ref, beta=0.04, norm=norm, weights=weights)
    many[0].backward()
    few[0].backward()
    torch.testing.assert_close(few[0], many[0])
    torch.testing.assert_close(short.grad, long.grad)
    assert few[1] == pytest.approx(many[1])


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_parts_of_a_batch_add_up_to_the_whole(norm):
    logp, old, a, mask, _ = batch()
    weights = torch.tensor([4.0, 1, 1, 2, 1])
    whole, _ = rgrpo.loss(logp, old, a, mask, norm=norm, weights=weights)
    total = rgrpo.token_weights(mask, norm, weights).sum()
    parts = [rgrpo.loss(logp[r], old[r], a[r], mask[r], norm=norm, weights=weights[r], total=total)[0]
             for r in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e9])
def test_masked_positions_may_hold_anything(junk):
    logp, old, a, mask, ref = batch()
    clean = rgrpo.loss(logp, old, a, mask, ref_logp=ref, beta=0.1)[0]
    leaf = logp.masked_fill(~mask, junk).requires_grad_()
    dirty = rgrpo.loss(leaf, old, a.masked_fill(~mask, junk), mask, ref_logp=ref.masked_fill(~mask, -3.0), beta=0.1)[0]
    dirty.backward()
    torch.testing.assert_close(dirty, clean)
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[~mask].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_the_rollout(value):
    logp, old, a, mask, _ = batch()
    a[2, 0] = -1.0
    logp[2, 0] = value
    with pytest.raises(FloatingPointError, match=r"rollouts \[2\]"):
        rgrpo.loss(logp, old, a, mask)


def test_loss_refuses():
    logp, old, a, mask, _ = batch()
    with pytest.raises(ValueError, match="free token"):
        rgrpo.loss(logp, old, a, mask & False)
    with pytest.raises(ValueError, match="ref_logp"):
        rgrpo.loss(logp, old, a, mask, beta=0.1)
    with pytest.raises(ValueError, match="normalisation"):
        rgrpo.loss(logp, old, a, mask, norm="query")


# ---------------------------------------------------------------- learning

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small run slower on two
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weight", ["uniform", "pi"])
def test_factored_learns_when_and_where_to_crop(seed, weight):
    helps, hurts, quality, reward = rgrpo.bandit("factored", "force", weight, seed=seed)
    assert helps > 0.9 and hurts < 0.05 and quality > 0.95
    assert reward > 0.53  # never cropping .5, cropping always with perfect boxes .05, the best .55


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_conditional_learns_boxes_but_never_moves_the_decision(seed):
    helps, hurts, quality, reward = rgrpo.bandit("conditional", seed=seed)
    assert abs(helps - 0.2) < 0.06 and abs(hurts - 0.2) < 0.06 and abs(helps - hurts) < 0.05
    assert quality > 0.95 and reward < 0.5  # worse than never cropping


def test_without_a_balanced_group_the_boxes_starve():
    helps, _, quality, reward = rgrpo.bandit("factored", "none")
    assert helps < 0.1 and quality < 0.9 and reward < 0.51


def test_the_bandit_repeats():
    assert rgrpo.bandit("factored", steps=5) == rgrpo.bandit("factored", steps=5)
    assert rgrpo.bandit("factored", steps=5) != rgrpo.bandit("factored", steps=5, seed=1)


def test_help_says_what_the_file_is_for():
    ran = subprocess.run([sys.executable, "rgrpo.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert rgrpo.__doc__.splitlines()[0] in ran.stdout and "\nforce  " not in ran.stdout  # and does not run the demo


def test_running_the_file_prints_a_row_for_every_reading():
    ran = subprocess.run([sys.executable, "rgrpo.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert [" ".join(row[:2]) for row in rows[1:]] == [
        "force factored", "analytic factored", "force factored", "force group", "force balanced", "force conditional",
        "resample factored", "none factored", "none group"]
    rewards = [float(row[-1]) for row in rows[1:]]
    assert min(rewards[:3]) > 0.53 and rewards[5] == min(rewards)
