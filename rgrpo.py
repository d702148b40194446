"""r-GRPO: GRPO with decision-balanced groups (paper Sec. 3.4, Eq. 9). Pure tensors, no model.

An action is a decision d (FULL or REGION) and, for REGION, a box b. Its policy gradient has two parts,
    E_d[grad log pi(d) (Q(d) - V)] + E_{d,b}[grad log pi(b | d) (r - Q(d))],
with Q(d) the mean reward of a decision and V the mean over decisions. `factored` advantages follow it: the decision
token is judged against the whole balanced group (Eq. 9), the box tokens against the other boxes of the same query
("normalizing advantages conditional on d"). The other modes are further readings of the paper's text.

    python rgrpo.py    learns when and where to crop in a toy world, once per reading (5 s on one core)
"""

import argparse

import torch

FULL, REGION, MALFORMED = 0, 1, 2  # decisions in tensors
CODES = {"FULL": FULL, "REGION": REGION, "MALFORMED": MALFORMED}  # by their names, which all other files use


def plan(n, balance="force", decisions=None):
    """Which of a query's N rollouts continue from a forced decision ("ensuring both decisions appear", Sec. 3.4).

    balance: "force" = N // 2 FULL, the rest REGION; "analytic" = all N are REGION, with as many FULL beside them, whose
    reward is known without a rollout (Eq. 8): rollouts are better spent on boxes; "none" = plain GRPO;
    "resample" = sample freely, then call again with the N sampled `decisions` (strings) to learn which to draw anew,
    the fewest that make both decisions present.
    Returns N entries (analytic: 2 N): "FULL" or "REGION" where forced, None where the policy decides (or what it
    sampled is kept).
    """
    if balance not in ("force", "analytic", "resample", "none") or n < 2:
        raise ValueError(f"balance {balance!r} with {n} rollouts: need force, analytic, resample, none, and 2 or more")
    if decisions is not None and (len(decisions) != n or not set(decisions) <= set(CODES)):
        raise ValueError(f"decisions {decisions}: need {n} of {', '.join(CODES)}")
    if balance == "analytic":
        return ["FULL"] * n + ["REGION"] * n
    if balance == "force":
        return ["FULL"] * (n // 2) + ["REGION"] * (n - n // 2)
    forced, outcomes = [None] * n, list(decisions or ())
    if balance == "none" or not outcomes:
        return forced
    for missing in [d for d in ("FULL", "REGION") if d not in outcomes]:
        # Give up the last rollout that is not the only one of its decision. Going by place, not by reward, keeps the
        # rest a fair sample; replacing MALFORMED ones first would hide them from the loss.
        last = max(i for i, d in enumerate(outcomes) if d == "MALFORMED" or outcomes.count(d) > 1)
        outcomes[last] = forced[last] = missing
    return forced


def branch_shares(decisions, share, p_region):
    """`share` [B, N] with the branches FULL and REGION rescaled to 1 - p : p, p_region [B]; MALFORMED keeps its own.

    An absent branch leaves its share to the other.
    """
    scaled = torch.zeros_like(share)  # [B, N]
    for decision, p in ((FULL, 1 - p_region), (REGION, p_region)):
        branch = share * (decisions == decision)  # [B, N]
        scaled += p[:, None] * branch / branch.sum(1, keepdim=True).clamp_min(1e-12)
    malformed = share * (decisions == MALFORMED)  # [B, N]
    return malformed + scaled / scaled.sum(1, keepdim=True).clamp_min(1e-12) * (1 - malformed.sum(1, keepdim=True))


def centred(rewards, share):
    """rewards minus their mean [B, N], and their standard deviation [B, 1]; share: [B, N], 0 = outside the group."""
    share = share / share.sum(1, keepdim=True).clamp_min(1e-12)  # [B, N] an empty group stays all 0
    deviation = rewards - (share * rewards).sum(1, keepdim=True)  # [B, N]
    # Divided by N: with torch.std's N - 1, a rollout of weight 4 would not equal 4 rollouts.
    return deviation, (share * deviation**2).sum(1, keepdim=True).sqrt()  # [B, N], [B, 1]


def advantages(rewards, decisions, mode="factored", decision_weight="uniform", p_region=None, weights=None,
               std=True, std_floor=0.05, eps=1e-4, sure=1.0):
    """Advantages of B groups of N rollouts (Eq. 9), for the decision token and for the box tokens: two float32 [B, N].

    rewards: float [B, N]. decisions: int [B, N]. weights: [B, N], how many rollouts an entry stands for (1 each).
    mode: "factored" (the module's docstring); on all tokens alike "group" (Eq. 9 as printed), "conditional" (z-score
    inside the decision: FULL's reward is a constant of the query, so the decision learns nothing) or "balanced"
    (Eq. 9, both decisions weighing the same in mean and deviation).
    decision_weight: of factored. "uniform" counts rollouts; "pi" weighs a branch by pi(d | x), with p_region [B] =
    pi(REGION | x): the exact decision gradient. Uniform has its sign, but goes on pushing queries that are settled.
    sure: of factored, with p_region. A query whose better decision is likelier than this leaves its decision alone:
    under "uniform" it would go on pulling all that look like it, and one decision may be given up altogether.
    std False: no division. Eq. 9, over the whole group, divides by sigma + eps; a z-score inside a decision by
    max(sigma, std_floor), lest noise tell equal boxes apart. "Box tokens" are all but the decision token.
    MALFORMED has no known decision: it counts in the group and gets the group's advantage on all its tokens.
    """
    rewards = rewards.double()  # in float32, equal rewards may leave a remainder above 0
    weights = torch.ones_like(rewards) if weights is None else weights.double()  # [B, N]
    check_groups(rewards, decisions, weights, mode, decision_weight, p_region)
    share = weights / weights.sum(1, keepdim=True)  # [B, N]
    deviation, sigma = centred(rewards, share)
    if mode == "balanced":
        deviation, sigma = centred(rewards, branch_shares(decisions, share, torch.full_like(share[:, 0], 0.5)))
    elif decision_weight == "pi":
        # The loss counts rollouts: it gives a branch N_d / N, so pi(d) N / N_d is what makes it count pi(d). sigma
        # stays the balanced group's: under pi it goes to 0 with a sure decision, which would undo the weight.
        wanted = branch_shares(decisions, share, p_region.double())  # [B, N]
        deviation = centred(rewards, wanted)[0] * wanted / share
    group = deviation / (sigma + eps) if std else deviation  # [B, N] Eq. 9
    judged = group
    if sure < 1 and p_region is not None:
        crop = (share * deviation * (decisions == REGION)).sum(1) > 0  # [B] REGION earned more
        judged = group * (torch.where(crop, p_region, 1 - p_region) <= sure)[:, None]  # [B, N]
    alike = group  # [B, N] MALFORMED keeps this
    for decision in (FULL, REGION):
        inside = decisions == decision  # [B, N]
        deviation, sigma = centred(rewards, share * inside)
        alike = torch.where(inside, deviation / sigma.clamp_min(std_floor) if std else deviation, alike)
    pair = {"factored": (judged, alike), "conditional": (alike, alike)}.get(mode, (group, group))
    return tuple(a.float() for a in pair)


def check_groups(rewards, decisions, weights, mode, decision_weight, p_region):
    """Raise ValueError for groups that `advantages` could not judge."""
    if mode not in ("factored", "group", "conditional", "balanced") or decision_weight not in ("uniform", "pi"):
        raise ValueError(f"unknown mode {mode!r} or decision weight {decision_weight!r}")
    if decision_weight == "pi" and (mode != "factored" or p_region is None):
        raise ValueError("decision weight 'pi' needs mode 'factored' and p_region, which is known under a grammar only")
    if rewards.dim() != 2 or not rewards.shape == decisions.shape == weights.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)}, decisions and weights must all be [B, N]")
    bad = ~torch.isfinite(rewards).all(1) | (weights <= 0).any(1)  # [B]
    if bad.any():
        raise ValueError(f"group {int(bad.int().argmax())}: rewards must be finite and weights above 0")


def zero_advantage(decision, box, tolerance=1e-6):
    """Groups that teach nothing, bool [B], from advantages [B, N]: a backward pass for them would be wasted."""
    return torch.maximum(decision.abs(), box.abs()).amax(1) <= tolerance  # [B]


def token_weights(mask, norm="token", weights=None):
    """What each token counts, [M, T]: its rollout's weight ("token"), or its part of that among T ("sequence")."""
    if norm not in ("token", "sequence"):
        raise ValueError(f"unknown normalisation {norm!r}: use token or sequence")
    counts = mask.float() if weights is None else mask * weights[:, None].float()  # [M, T]
    return counts if norm == "token" else counts / mask.sum(1, keepdim=True).clamp_min(1)


def loss(logp, old_logp, advantages, mask, clip=0.2, ref_logp=None, beta=0.0, norm="token", weights=None, total=None):
    """Clipped GRPO loss of M rollouts ("the original GRPO update form", Sec. 3.4) and its diagnostics.

    logp (with gradient), old_logp (when sampled), ref_logp (reference policy): float [M, T], nats. advantages: [M, T].
    mask: bool [M, T], the tokens that were free choices; elsewhere anything may stand.
    weights: [M]. All N / 2 forced FULL rollouts of a query are one action: compute it once, at weight N / 2.
    total: the divisor, by default the sum of token_weights. For a batch in parts (accumulation, several GPUs) give the
    whole batch's sum: then the parts' losses add up to the loss of the whole.
    Returns (scalar, dict of floats loss, kl, clip_fraction, ratio_max). loss and kl are parts of the whole batch's, to
    be added up; clip_fraction is a mean, taken as the loss takes it.
    ValueError: no free token, or beta without ref_logp. FloatingPointError: the loss is not finite.
    """
    if not mask.any() or (beta and ref_logp is None):
        raise ValueError("there must be a free token, and ref_logp where beta is not 0")
    counts = token_weights(mask, norm, weights)  # [M, T]
    # Masked before exp: beyond a rollout's end exp may be inf, and inf times a mask of 0 has a NaN gradient.
    log_ratio = (logp.float() - old_logp.float()).masked_fill(~mask, 0)  # [M, T]
    ratio, advantages = log_ratio.exp(), advantages.masked_fill(~mask, 0)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    to_ref = torch.zeros_like(ratio) if ref_logp is None else (ref_logp.float() - logp.float()).masked_fill(~mask, 0)
    # k3: unbiased as -to_ref is, and never negative, for tokens drawn from pi. Under a grammar: answer_kl.
    kl = to_ref.exp() - to_ref - 1
    total = counts.sum() if total is None else total
    value = (counts * (beta * kl - objective)).sum() / total
    clipped = torch.where(advantages > 0, ratio > 1 + clip, (ratio < 1 - clip) & (advantages < 0))
    means = [(counts * kl.detach()).sum() / total, (counts * clipped).sum() / counts.sum()]
    numbers = torch.stack([value.detach(), *means, (ratio.detach() * mask).max()]).tolist()  # one wait for the GPU
    if not torch.isfinite(value):
        bad = ~torch.isfinite(objective + beta * kl).all(1)  # [M]
        raise FloatingPointError(f"loss is {numbers[0]}, because of rollouts {bad.nonzero().flatten().tolist()}")
    return value, dict(zip(("loss", "kl", "clip_fraction", "ratio_max"), numbers))


def answer_kl(logp, options, ref_options, mask, decision, queries, weights):
    """KL(pi(.|x) || pi_ref(.|x)) over whole answers under a grammar, in nats, summed over queries: a scalar.

    A decision and the digits of a box are choices among a few tokens, so the KL of a choice is a sum, not a sample:
        KL(decision) + pi(REGION) E_boxes[sum of KL(choice) over the choices of a box].
    Under balanced groups the decision was not drawn from pi: a sampled term, such as k3, is then far off where pi is
    small. Its value is exact for the decision and for boxes a mean over those in the group; so is its gradient, which
    has, beside that of each KL, what an earlier choice does to the odds of the later ones.

    logp: [M, T], log pi of what was chosen. options, ref_options: [M, T, C], log-probabilities of all that could be.
    mask, decision: bool [M, T]. queries: int [M], the number of each rollout's query; numbers may be left out. weights:
    [M], as in `loss`. A query without a REGION rollout counts its decision alone.
    """
    kl = (options.exp() * (options - ref_options)).sum(-1)  # [M, T]
    boxes = kl * (mask & ~decision)  # [M, T]
    later = (boxes.sum(1, keepdim=True) - boxes.cumsum(1)).detach() * (mask & ~decision)  # [M, T]
    boxes = (boxes + (logp - logp.detach()) * later).sum(1)  # [M] the second term is 0, but has a gradient
    p = (logp * decision).sum(1).exp()  # [M] pi(d | x) of its decision
    region = weights * (mask & ~decision).any(1)  # [M] FULL has no choice after the decision

    def mean(x, weight):  # [M] -> [B], over each query's rollouts
        total = weight.new_zeros(int(queries.max()) + 1).index_add(0, queries, weight)
        return torch.zeros_like(total).index_add(0, queries, x * weight) / total.clamp_min(1e-12)

    return (mean((kl * decision).sum(1), weights) + mean(p * boxes, region)).sum()


def bandit(mode, balance="force", decision_weight="uniform", steps=300, B=32, N=8, seed=0):
    """Crop rate where a crop helps and where it hurts, quality of the boxes in [0, 1], mean reward, after learning.

    Half of the queries gain up to .1 by a good box, the others lose up to .3 by a bad one and pay 1 for FULL. The
    policy sees which is which. As the paper's base model, it crops one query in five at first, and not very well.
    """
    draw = torch.Generator().manual_seed(seed)
    quality = (1 - (torch.arange(21) - 10).abs() * 0.3).clamp_min(0)  # [21] box 10 is right, boxes next to it nearly
    bias_and_slope = torch.tensor([-1.4, 0.0], requires_grad=True)  # the decision; the bias couples both kinds of query
    boxes = (-(torch.arange(21) - 10).abs() * 0.05).requires_grad_()  # [21] logits
    optimizer = torch.optim.Adam([bias_and_slope, boxes], lr=0.05)
    for _ in range(steps):
        hurts = torch.randint(2, (B, 1), generator=draw)  # [B, 1]
        logit = bias_and_slope[0] + bias_and_slope[1] * (0.5 - hurts)  # [B, 1] of REGION
        d = torch.bernoulli(logit.detach().sigmoid().expand(B, N), generator=draw).long()  # [B, N]
        names = [["REGION" if x else "FULL" for x in row] for row in d.tolist()]
        plans = [plan(N, balance, row) for row in names]
        d = torch.tensor([[CODES[f or x] for f, x in zip(p, row + row)] for p, row in zip(plans, names)])
        b = torch.multinomial(boxes.detach().softmax(0), d.numel(), replacement=True, generator=draw).view(d.shape)
        gain = torch.where(hurts == 1, 0.3 * quality[b] - 0.3, 0.35 * quality[b] - 0.25)  # [B, N]
        rewards = torch.where(d == REGION, gain, hurts.float())  # [B, N] FULL pays 1 where a crop hurts, as Eq. 8
        a = advantages(rewards, d, mode, decision_weight, logit.detach()[:, 0].sigmoid())
        logp_d = torch.nn.functional.logsigmoid(logit * (2 * d - 1))  # [B, N]
        logp = torch.stack([logp_d, boxes.log_softmax(0)[b]], 2).flatten(0, 1)  # [B * N, 2]
        free = torch.stack([d >= 0, d == REGION], 2).flatten(0, 1)  # [B * N, 2] FULL has no box token
        value, _ = loss(logp, logp.detach(), torch.stack(a, 2).flatten(0, 1), free)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        helps, hurts = (bias_and_slope[0] + bias_and_slope[1] * torch.tensor([0.5, -0.5])).sigmoid().tolist()
        q = float((boxes.softmax(0) * quality).sum())
    return helps, hurts, q, 0.5 * helps * (0.35 * q - 0.25) + 0.5 * (1 - hurts + hurts * (0.3 * q - 0.3))


def main():
    """Print how every reading fares.

    Boxes are bad at first, so the decision turns away from cropping unless they are learned in time. `factored` judges
    a box by the other boxes of its query: `force` sees to it that there are some, `resample` to one alone, which has
    nothing to be compared with, and plain groups hold one or two. So both give up here. On the embedded world all do
    under these rewards, for another reason (docs/results.md). `group` on all tokens compares a box with FULL, too.
    """
    print("balance   advantage      crops if it helps  if it hurts  box quality  reward (all FULL .500, best .550)")
    for row in (("force", "factored"), ("analytic", "factored"), ("force", "factored", "pi"), ("force", "group"),
                ("force", "balanced"), ("force", "conditional"), ("resample", "factored"), ("none", "factored"),
                ("none", "group")):
        helps, hurts, q, reward = bandit(row[1], row[0], *row[2:])
        print(f"{row[0]:9} {' '.join(row[1:]):14} {helps:17.2f}  {hurts:11.2f}  {q:11.2f}  {reward:.3f}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
