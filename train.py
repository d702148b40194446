"""The r-GRPO loop (paper Sec. 3.4, App. B): open, sample, score, reward, judge, update, log.

    python train.py          # the embedded world: data/world and the stand-ins in, runs/world out; minutes on a CPU
    python train.py --preset paper --data data/evqa --policy Qwen/Qwen2.5-VL-3B-Instruct --scorer FOLDER --run runs/evqa
    torchrun --nproc_per_node=4 -- train.py --preset paper --queries 16 ...     # four GPUs, as in the paper

A step takes a few queries. The policy writes a decision-balanced group of answers to each, the frozen scorer re-ranks
the query's pool with every crop, the reward is the improvement over the full image (Eq. 7; with --preset mini the
view's .5 MRR + .5 NDCG), and the policy is moved towards the better answers. Only LoRA weights learn. Nothing here
reads a truth box; labels are read by the reward, and by the metrics of val.

Files of a run: config.json (arguments, pools), log.jsonl (a line a step; step -1 is the policy before training),
samples.jsonl (what was said and what it earned), adapter/ (LoRA in peft's format) and state.pt at every save,
adapter_best/ at the best val MRR, `finished` at the end, lock. A run that was killed ends, started again with --resume,
with the samples and adapter of an unbroken one, and with its log but for seconds and memory. With more --steps a
finished one goes on. Ctrl-C and SIGTERM finish the step, save and exit with 130 or 143; a second one stops at once.

With torchrun every process takes its part of a step's queries; gradients are summed, process 0 writes. Without dropout
results are those of one process up to rounding. The `--` keeps torchrun from reading --run as a short --run-path.

Letters: B queries, N = --group rollouts a query, n answers written for them (see `sample_groups`), M answers of a
forward pass, K candidates, T tokens, D embedding, W processes. Simplified: one image a query.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import resource
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import rgrpo
from rewards import metrics, reward, summary
from scorer import (
    InputError, blend, crop, load_data, load_scorer, lock_folder, read_json, replacing, same_scorer, scores,
    warn_of_idle_card, write_json,
)

PRESETS = {
    # App. B. "Batch size 4 per device" on 4 GPUs is read as 16 queries of N rollouts a step, however many GPUs do it.
    # The KL term's weight is not printed there; the release has .1, but compares with a policy only 8 ranks away.
    "paper": dict(queries=16, group=8, epochs=2.0, lr=5e-5, warmup=50, dropout=0.1, targets="all", beta=0.01,
                  balance="force", sure=1.0, reward="delta", eval_every=200, save_every=100),
    # The stand-in is a thousand times smaller: its LoRA takes larger steps, which the KL keeps from ruining the digits
    # of its boxes, and --sure from giving up cropping before they are good. Its vision tower stays frozen, so image
    # features are computed once. Eq. 8 pays a REGION nothing for leaving the right answer first: on the embedded world
    # the policy then never crops (docs/results.md).
    "mini": dict(queries=16, group=8, steps=120, lr=2e-3, warmup=10, dropout=0.0, targets="language",
                 beta=0.02, balance="analytic", sure=0.98, reward="absolute", eval_every=40, save_every=20),
}


def number(kind, least, below=math.inf):
    """An argparse type: an int or float of [least, below). NaN is neither."""
    def read(text):
        if not least <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below {below:.6g}")
        return kind(text)
    read.__name__ = kind.__name__  # what argparse calls it
    return read


whole, real, least_1, above_0 = number(int, 0), number(float, 0), number(int, 1), number(float, 1e-12)
FLAGS = {  # group: (flag, type or choices, default, help); where the default is None, a preset or the policy has one
    "files": [
        ("data", str, "data/world", "folder that prepare.py wrote"),
        ("run", str, "runs/world", "folder to write"),
        ("resume", bool, False, "go on from the run's state.pt; without one, start"),
        ("tensorboard", bool, False, "log.jsonl's numbers in the run's tensorboard/, too"),
        ("wandb", str, None, "and in this project of Weights & Biases")],
    "models (Sec. 3.2, 3.3)": [
        ("policy", str, "mini/policy", "folder or Hugging Face id of a Qwen2.5-VL"),
        ("scorer", str, "mini/scorer", "the scorer that prepared the data, see prepare.py"),
        ("scorer-dtype", ("float32", "bfloat16", "float16"), None, "of its weights; None = as it prepared the data"),
        ("policy-dtype", ("float32", "bfloat16"), None, "of its frozen weights; None = bfloat16 on CUDA, else float32"),
        ("init-adapter", str, None, "folder of a LoRA to start from; KL is to the bare policy still"),
        ("system-prompt", str, None, "file with a text in place of the policy's own (Table 10)"),
        ("max-pixels", number(int, 28 * 28), None, "area that the policy's images are shrunk to; None = its own"),
        ("device", str, "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1; in torchrun cpu or cuda")],
    "r-GRPO (Sec. 3.4; rgrpo.py explains the readings)": [
        ("balance", ("force", "analytic", "resample", "none"), None, "how both decisions come into a group"),
        ("advantage", ("factored", "group", "conditional", "balanced"), "factored", "what a token is judged by"),
        ("decision-weight", ("uniform", "pi"), "uniform", "of FULL and REGION in the decision's advantage"),
        ("sure", number(float, 0.5, below=math.nextafter(1, 2)), None, "a decision that is right and surer than this "
         "is pushed no further (factored advantage and grammar alone); 1 = on and on"),
        ("std", bool, True, "divide advantages by the group's deviation (Eq. 9)"),
        ("std-floor", above_0, 0.05, "least deviation that a z-score inside a decision divides by"),
        ("decode", ("grammar", "free"), "grammar", "decision, digits, their ends are choices | any text, then parsed"),
        ("temperature", above_0, 1.0, "of sampling, and of the log-probabilities that are trained"),
        ("clip", above_0, 0.2, "of the probability ratio"),
        ("beta", real, None, "weight of the KL to the bare policy, nats an answer; 0 saves that one's forward"),
        ("hold", real, 1.0, "weight of the term that keeps the template likely, so that an answer can be read without "
         "the grammar, too; 0 = none, and the adapter is of use under --decode grammar alone"),
        ("norm", ("token", "sequence"), "token", "the loss is a mean over tokens or over rollouts"),
        ("reward", ("delta", "absolute"), None, "Eq. 7-8 | .5 MRR + .5 NDCG, the release's option"),
        ("reward-weights", number(float, -1e9), [0.2, 0.2, 0.2, 0.4], "of dMRR, dNDCG, dRank and dMargin in Eq. 7"),
        ("fuse", number(float, 0, below=math.nextafter(1, 2)), 1.0, "share of the crop beside the full image in the "
         "view that is scored; 1 = the crop alone, as in the paper"),
        ("eta", real, 1.0, "what MALFORMED costs (Eq. 7)"),
        ("encouragement", real, 0.0, "the release's bonus on every REGION reward at step 0, less each step"),
        ("encouragement-steps", least_1, 5000, "steps until that bonus is 0")],
    "LoRA (App. B)": [
        ("rank", least_1, 8, "r"),
        ("alpha", above_0, 32, "scale: the update is alpha / r times B A"),
        ("dropout", number(float, 0, below=1), None, "before A, in the update's forward only"),
        ("targets", ("all", "language"), None, "all linear layers | those of the language model")],
    "sizes and schedule (App. B)": [
        ("queries", least_1, None, "queries a step, over all processes of torchrun"),
        ("group", number(int, 2), None, "N, rollouts a query; with --balance analytic all of them are boxes"),
        ("micro-tokens", least_1, None, "tokens of a forward and backward pass; None = what the card bears, by trial, "
         "8192 on a CPU; changes memory, and dropout's draws"),
        ("checkpointing", bool, False, "compute activations twice instead of keeping them: a third more time"),
        ("epochs", above_0, None, "passes over the training queries, in place of --steps"),
        ("steps", least_1, None, "steps, in place of --epochs"),
        ("inner-steps", least_1, 1, "optimiser steps on the same rollouts"),
        ("max-prompt-tokens", least_1, 8192, "a longer prompt is refused, never cut"),
        ("max-new-tokens", least_1, 256, "limit of a freely decoded answer"),
        ("lr", above_0, None, "peak learning rate; half a cosine towards 0 after the warm-up"),
        ("warmup", whole, None, "steps of linear warm-up"),
        ("max-grad-norm", above_0, 1.0, "gradients are scaled down to this norm"),
        ("seed", whole, 0, "LoRA, the order of the data and every draw are functions of it"),
        ("eval-every", whole, None, "steps between two evaluations on val, 0 = never"),
        ("val-queries", least_1, 200, "val queries of an evaluation, a random sample, the same in every run"),
        ("save-every", least_1, None, "steps between two saves"),
        ("samples-every", whole, 10, "steps between two groups in samples.jsonl, 0 = never")]}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag with its default (of the preset, where that sets it)."""


def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="mini", help="defaults: App. B, or the embedded world's")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, parents=[first], allow_abbrev=False)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in flags:
            form = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            form = {"action": argparse.BooleanOptionalAction} if kind is bool else form
            form |= {"nargs": len(default)} if isinstance(default, list) else {}
            group.add_argument(f"--{name}", default=default, help=text, **form)
    preset = dict(PRESETS[first.parse_known_args(argv)[0].preset])
    length = {name: preset.pop(name) for name in ("epochs", "steps") if name in preset}
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    if args.epochs and args.steps:
        parser.error("--epochs and --steps: give one of them")
    if not args.epochs and not args.steps:
        vars(args).update(length)
    # Free text has no known pi(REGION | x), and the other advantages have no branches to weigh.
    if args.decision_weight == "pi" and (args.advantage, args.decode) != ("factored", "grammar"):
        parser.error("--decision-weight pi needs --advantage factored and --decode grammar")
    # By pi each decision counts as a whole; "sequence" divides it by the tokens of its answer: 1, or 15 for REGION.
    if args.decision_weight == "pi" and args.norm == "sequence":
        parser.error("--decision-weight pi needs --norm token")
    return args


# ---------------------------------------------------------------------------------------------------------- the step
def train_step(step, steps, opened, policy, optimizer, scorer, data, args):
    """One step of r-GRPO -> (numbers for log.jsonl, lines for samples.jsonl).

    step: from 0, of `steps`; opened: of `open_step`. FloatingPointError names step and queries.
    """
    rows, seeds, queries, images, prompts = opened
    names = [query.query_id for query in queries]
    # Dropout: a resumed run draws what an unbroken one draws, and no process what another draws.
    torch.manual_seed(args.seed * 1_000_003 + step + (process()[0] << 40))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
    bonus = args.encouragement * max(0.0, 1 - step / args.encouragement_steps)
    try:
        groups, counts = sample_groups(policy, prompts, seeds, args)  # B lists of n answers
        actions = [[answer.action for answer in group] for group in groups]
        views = score_views(data, scorer, rows, images, actions, args.fuse)  # B pairs [K], [n, K]   Eq. 1-4
        rewards = reward_groups(data, rows, actions, views, args, bonus)  # B dicts of [n]   Eq. 5-8
        advantages = judge(actions, counts, rewards, args)  # decision, box, weight: [B, n] each   Eq. 9
        numbers = update(policy, optimizer, prompts, groups, advantages, args, names)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step} (from 0, as in log.jsonl; queries {names}): {error}. Nothing of it was "
                                 "kept; if it comes again with --resume, train anew with a smaller --lr") from error
    log = {"step": step, **describe(actions, counts, rewards), **numbers, "lr": optimizer.param_groups[0]["lr"]}
    return log, sample_lines(step, queries[0], groups[0], rewards[0], advantages)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to `peak` in `warmup` steps, then half a cosine that would reach 0 one step after the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def queries_of_step(step, count, queries, seed):
    """Row numbers of a step: consecutive pieces of one random order per epoch, so every query comes once an epoch."""
    places = range(step * queries, (step + 1) * queries)
    # An order is drawn again in each step (15 ms for a million queries), so a resumed run has nothing to restore.
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in {p // count for p in places}}
    return [int(orders[p // count][p % count]) for p in places]


def open_step(step, policy, data, args):
    """What a step reads: rows, seeds, queries, images (PIL RGB) and Prompts of this process's part of it, B each.

    Nothing is drawn but from (seed, step, query), so it can be done while the step before runs. A prompt that is too
    long is refused: cutting it, as text trainers do, would cut through its image.
    """
    rows = queries_of_step(step, len(data), args.queries, args.seed)
    # Where epochs meet, or when there are fewer queries than --queries, one can come twice: its groups must differ.
    seeds = [(args.seed, step, row + len(data) * rows[:i].count(row)) for i, row in enumerate(rows)]
    rank, count = process()
    rows, seeds = rows[rank::count], seeds[rank::count]
    queries, images = [data.queries[row] for row in rows], [data.open_image(row) for row in rows]
    try:
        prompts = policy.prompts(images, [query.question for query in queries])
    except ValueError as error:  # it says which question or image, by its place in the list
        names = [query.query_id for query in queries]
        raise InputError(f"{data.queries.path}: {error}; counted from 0 in queries {names}") from error
    for query, prompt in zip(queries, prompts):
        if len(prompt.ids) > args.max_prompt_tokens:
            raise InputError(f"{data.queries.path}: the prompt of query {query.query_id!r} has {len(prompt.ids)} "
                             f"tokens, {int(prompt.mm_token_type_ids.sum())} of them its image: raise "
                             "--max-prompt-tokens, or start anew with a smaller --max-pixels")
    return rows, seeds, queries, images, prompts


def sample_groups(policy, prompts, seeds, args):
    """A group of answers a query, and how many rollouts each stands for: B lists of Completion, B lists of int.

    Under balance "force" and "analytic" with a grammar all FULL rollouts of a query are one and the same answer: it is
    written once and counts as often. "resample" draws freely first and then again what `rgrpo.plan` asks for.
    """
    def roll(queries, plans, salt=0):
        return policy.rollout([prompts[b] for b in queries], plans, args.decode, args.temperature,
                              seeds=[(*seeds[b], salt) for b in queries])

    everyone = range(len(prompts))
    plan = rgrpo.plan(args.group, args.balance)
    if args.balance in ("force", "analytic") and args.decode == "grammar":
        full, regions = plan.count("FULL"), plan.count("REGION")
        groups = roll(everyone, [["FULL"] + ["REGION"] * regions] * len(prompts))
        return groups, [[full] + [1] * regions] * len(prompts)
    groups = roll(everyone, [plan] * len(prompts))
    if args.balance == "resample":
        again = [rgrpo.plan(args.group, args.balance, [c.action.decision for c in group]) for group in groups]
        lacking = [b for b in everyone if any(again[b])]
        # Rollout n has its own stream of draws, so the whole plan is rolled; entries that stay take the cheap FULL.
        drawn = roll(lacking, [[entry or "FULL" for entry in again[b]] for b in lacking], salt=1) if lacking else []
        for b, new in zip(lacking, drawn):
            groups[b] = [fresh if entry else old for entry, old, fresh in zip(again[b], groups[b], new)]
    return groups, [[1] * len(plan)] * len(prompts)


def score_views(data, scorer, rows, images, actions, share=1.0):
    """Scores of the full image [K] and of every action's view [n, K] (Eq. 1-4), float32: B pairs.

    rows: B row numbers of data; images: their B images; actions: B lists of n Action. FULL and MALFORMED see the full
    image. Only crops are encoded, in one batch, identical boxes once: prepare.py embedded the rest. share: of `blend`.
    """
    # A dict and not a set: the order of the batch must not change from run to run.
    boxes = list(dict.fromkeys((b, a.box) for b, group in enumerate(actions) for a in group if a.decision == "REGION"))
    features = dict(zip(boxes, scorer.image_features([crop(images[b], box) for b, box in boxes])))  # (b, box) -> [D]
    pairs = []
    for b, (row, group) in enumerate(zip(rows, actions)):
        full = np.asarray(data.full[row], dtype=np.float32)  # [D]
        try:
            views = np.stack([blend(full, features[b, action.box], share) if (b, action.box) in features else full
                              for action in group])  # [n, D]
            candidates = data.candidates(row)  # [K, D]
            pairs.append((scores(full, candidates), scores(views, candidates)))  # [K], [n, K]
        except ValueError as error:  # a feature that is NaN or 0, of a crop or of the pool
            raise FloatingPointError(f"{error}; query {data.queries[row].query_id!r}, {data.queries.path}:{row + 1}: "
                                     "is the scorer sound? Prepare the data again, in float32") from error
    return pairs


def reward_groups(data, rows, actions, views, args, bonus=0.0):
    """Reward and its components of every action: B dicts of arrays [n], of rewards.reward (Eq. 5-8).

    views: of `score_views`. bonus: what REGION gets for being one; a component of its own and part of the total.
    """
    rewards = []
    for row, group, (full, seen) in zip(rows, actions, views):
        decisions = [action.decision for action in group]
        earned = reward(decisions, seen, full, data.labels[row], args.reward_weights, args.eta, args.reward)
        if bonus:
            extra = np.array([bonus * (decision == "REGION") for decision in decisions])  # [n]
            earned = {**earned, "total": earned["total"] + extra, "encouragement": extra}
        # Not left to the loss: a group whose advantages are all 0 has none.
        if not np.isfinite([*earned["total"], *(action.p_region or 0.0 for action in group)]).all():
            raise FloatingPointError(f"reward or p(REGION) is not finite; query {data.queries[row].query_id!r}")
        rewards.append(earned)
    return rewards


def judge(actions, counts, rewards, args):
    """Advantages of decision and of box tokens, and the answers' weights: three float32 [B, n].

    counts: B lists, how many rollouts an answer stands for; rewards: of `reward_groups`.
    """
    total = torch.tensor(np.stack([earned["total"] for earned in rewards])).float()  # [B, n]
    weight = torch.tensor(counts).float()  # [B, n]
    codes = torch.tensor([[rgrpo.CODES[action.decision] for action in group] for group in actions])
    known = [group[0].p_region for group in actions]
    p_region = None if None in known else torch.tensor(known)  # [B]
    pair = rgrpo.advantages(total, codes, args.advantage, args.decision_weight, p_region, weight, args.std,
                            args.std_floor, sure=args.sure)  # Eq. 9
    return *pair, weight


def update(policy, optimizer, prompts, groups, advantages, args, names):
    """Gradient steps on one batch of groups -> the numbers to log.

    advantages: (decision, box, weight), [B, n] each. names: B query ids, for FloatingPointError. Groups without any
    advantage cost no pass, unless a KL term pulls on them; they stay in the divisors, and their template is not held in
    that step. Under torchrun this is the process's part; weights and numbers come out alike everywhere.
    """
    idle = rgrpo.zero_advantage(*advantages[:2])  # [B]
    work = [b for b in range(len(groups)) if args.beta or not idle[b]]
    total = sum(gather([loss_size(groups, advantages[2], args.norm)]))  # of the whole batch
    zero_advantage = float(np.mean(gather(idle.tolist())))
    hold = holds_template(args)
    packs = policy.pack(prompts, groups, work, hold, args.micro_tokens) if work else []
    old, parts, norms = {}, [], []
    busy = args.beta or zero_advantage < 1  # anywhere: a process without work must still add its zeros
    for _ in range(args.inner_steps if busy else 0):
        optimizer.zero_grad(set_to_none=True)
        parts += [backward(policy, pack, advantages, total, old, hold, args, names) for pack in packs]
        sum_gradients(policy.lora_parameters())
        norms.append(torch.nn.utils.clip_grad_norm_(policy.lora_parameters(), args.max_grad_norm).item())
        # Clipping by an infinite norm makes every gradient NaN or 0: the step would ruin the weights without a word.
        if not math.isfinite(norms[-1]):
            raise FloatingPointError(f"the gradient's norm is {norms[-1]}; queries {[names[b] for b in work]}")
        optimizer.step()
    if not busy:
        return {"zero_advantage": zero_advantage}
    parts = gather(parts)
    of = {key: np.array([one[key] for one in parts]) for key in parts[0]}  # [passes] each
    learned = {name: of[name].sum() / args.inner_steps for name in ("loss", "kl", "outside") if name in of}
    learned |= {"clip_fraction": of["size"] @ of["clip_fraction"] / of["size"].sum(),
                "ratio_max": of["ratio_max"].max(), "logp_gap": of["logp_gap"].max(),
                "decision_entropy": of["entropy"].sum() / max(1, of["decisions"].sum()), "grad_norm": np.mean(norms)}
    return {**{name: float(value) for name, value in learned.items()}, "zero_advantage": zero_advantage}


def holds_template(args):
    """Is the template held (--hold)? In free decoding its tokens are choices, which the loss moves by itself."""
    return args.hold > 0 and args.decode == "grammar"


def loss_size(groups, weight, norm):
    """What the loss of these groups is divided by: free tokens, or rollouts (norm "sequence"), each as often as it
    counts. weight: [B, n]."""
    return sum(float(weight[b, n]) * (sum(c.free) if norm == "token" else any(c.free))
               for b, group in enumerate(groups) for n, c in enumerate(group))


def backward(policy, pack, advantages, total, old, hold, args, names):
    """Gradients of a Pack's queries -> its numbers. total: the whole batch's loss_size.

    old: {first query of a pack: its log-probs at the first inner step}, filled here.
    """
    owners, at = map(list, zip(*pack.owners))  # M queries, M numbers in their groups
    policy.train()  # LoRA dropout, if any
    out = policy.score(pack, args.temperature, hold)
    logp, mask, choice = out["logp"], out["mask"], out["decision"]  # [M, T] each
    decision, box, weight = (table[owners, at].to(logp.device) for table in advantages)  # [M] each
    token = torch.where(choice, decision[:, None], box[:, None])  # [M, T]
    reference, exact = {}, "options" in out
    if args.beta:
        policy.eval()
        with torch.no_grad(), policy.adapter(False):
            reference = policy.score(pack, args.temperature)
    # The first inner step's own values, detached, and not those of sampling: a ratio of exactly 1, also with dropout.
    before = old.setdefault(owners[0], logp.detach())  # [M, T]
    try:
        value, numbers = rgrpo.loss(logp, before, token, mask, args.clip, reference.get("logp"),
                                    0.0 if exact else args.beta, args.norm, weight, total)
    except FloatingPointError as error:
        # Where every log-probability is finite, it was the ratio or the KL term: any query of the part may be the one.
        sick = {b for b, fine in zip(owners, logp.isfinite().all(1).tolist()) if not fine} or set(owners)
        raise FloatingPointError(f"{error}; queries {[names[b] for b in sorted(sick)]}") from error
    # Both are divided by the queries of the whole step; one that was left out counts 0.
    if args.beta and exact:
        of = torch.tensor(owners, device=logp.device)  # [M]
        kl = rgrpo.answer_kl(logp, out["options"], reference["options"], mask, choice, of, weight) / args.queries
        value, numbers["kl"] = value + args.beta * kl, kl.item()
    if hold:
        outside = out["outside"].sum() / args.queries
        value, numbers["outside"] = value + args.hold * outside, outside.item()
    policy.train()  # checkpointing runs the forward again in the backward pass
    value.backward()
    policy.eval()
    sampled = torch.zeros(logp.shape)  # [M, T]
    for m, c in enumerate(pack.completions):
        sampled[m, :len(c.ids)] = torch.tensor(c.log_probs)
    gap = (before - sampled.to(logp.device)) * mask  # [M, T] sampling against scoring
    size = rgrpo.token_weights(mask, args.norm, weight).sum().item()
    return {**numbers, "size": size, "logp_gap": gap.abs().max().item(),
            "entropy": (out["entropy"] * choice).sum().item(), "decisions": choice.sum().item()}


def describe(actions, counts, rewards):
    """What the step's rollouts were like: means over them, an answer counted as often as it stands for."""
    names = ("total", "d_mrr", "d_ndcg", "d_rank", "d_margin")
    answers = gather([(action.decision, count, *(earned[name][n] for name in names))
                      for group, row, earned in zip(actions, counts, rewards)
                      for n, (action, count) in enumerate(zip(group, row))])
    kinds, weight, *columns = map(np.array, zip(*answers))  # [M] each
    log = {"reward": float(np.average(columns[0], weights=weight))}
    for kind in ("FULL", "REGION", "MALFORMED"):
        inside = kinds == kind  # [M]
        log[f"{kind.lower()}_rate"] = float(weight[inside].sum() / weight.sum())
        if inside.any() and kind != "MALFORMED":  # without one there is no mean; a MALFORMED one earns -eta, always
            log[f"reward_{kind.lower()}"] = float(np.average(columns[0][inside], weights=weight[inside]))
        if inside.any() and kind == "REGION":
            log |= {name: float(np.mean(column[inside])) for name, column in zip(names[1:], columns[1:])}
    p = [p for p in gather([group[0].p_region for group in actions]) if p is not None]
    return {**log, "p_region": float(np.mean(p)) if p else None}  # the crop rate that the policy itself would have


def sample_lines(step, query, group, earned, advantages):
    """Lines for samples.jsonl: the first query of a step with all that was said, earned and concluded."""
    return [{"step": step, "query_id": query.query_id, "question": query.question, "text": c.action.text,
             "decision": c.action.decision, "box": c.action.box, "p_region": c.action.p_region,
             "forced": c.forced_decision, "reward": {name: round(float(v[n]), 4) for name, v in earned.items()},
             "decision_advantage": round(float(advantages[0][0, n]), 4),
             "box_advantage": round(float(advantages[1][0, n]), 4)} for n, c in enumerate(group)]


# ---------------------------------------------------------------------------------------------------------- the loop
SHOWN = ("reward", "reward_full", "reward_region", "p_region", "malformed_rate", "kl", "outside", "grad_norm", "lr",
         "seconds", "val_mrr", "val_cond_r1", "val_crop_rate")  # of a line of log.jsonl, to people


def run_steps(start, steps, policy, optimizer, scorer, data, val, args):
    """Steps start .. steps - 1 with their logs, evaluations and saves -> the signal that ended it early, or None."""
    run, began, coming, first = Path(args.run), time.perf_counter(), None, process()[0] == 0
    best = max([line["val_mrr"] for line in read_log(run / "log.jsonl") if "val_mrr" in line], default=-1.0)
    with open_board(args, start) as board, listening() as heard, ThreadPoolExecutor(1) as thread:
        if args.eval_every and not start:
            log = {"step": -1, **validate(policy, scorer, val, args)}
            best = keep_best(policy, log, best, run)
            if first:
                append(run / "log.jsonl", [log])
                tqdm.write("before training  " + told(log))
        for step in tqdm(range(start, steps), initial=start, total=steps, desc="train", unit="step",
                         disable=None if first else True):  # None: a bar on terminals only
            clock, last = time.perf_counter(), step + 1 == steps
            # A card would stand idle while images are opened; on a CPU the thread would take the step's cores.
            opened = coming.result() if coming else open_step(step, policy, data, args)
            if policy.device.type == "cuda" and not last:
                coming = thread.submit(open_step, step + 1, policy, data, args)
            log, samples = train_step(step, steps, opened, policy, optimizer, scorer, data, args)
            log |= {"seconds": time.perf_counter() - clock, "memory_mb": memory_mb(policy.device)}
            if args.eval_every and ((step + 1) % args.eval_every == 0 or last):
                log |= validate(policy, scorer, val, args)
                best = keep_best(policy, log, best, run)
            signals = gather(list(heard))  # one may reach a process sooner than another; all end after the same step
            if first:
                append(run / "log.jsonl", [log])
                if args.samples_every and step % args.samples_every == 0:
                    append(run / "samples.jsonl", samples)
                left = (time.perf_counter() - began) / (step + 1 - start) * (steps - step - 1) / 60
                tqdm.write(f"step {step + 1}/{steps}  {told(log)}  {left:.1f} min left")
                for name, value in log.items():
                    if board and isinstance(value, (int, float)):
                        board.add_scalar(name, value, step)
                if signals or last or (step + 1) % args.save_every == 0:
                    policy.save_adapter(str(run / "adapter"))
                    save_state(run / "state.pt", step + 1, policy, optimizer)
            if signals and not last:
                return signals[0]
    return None


def told(log):
    return " ".join(f"{name} {log[name]:.3g}" for name in SHOWN if log.get(name) is not None)


def keep_best(policy, log, best, run):
    """Save adapter_best/ where a line of log.jsonl has a better val MRR than any before -> the best MRR."""
    if log["val_mrr"] > best and process()[0] == 0:
        policy.save_adapter(str(run / "adapter_best"))
    return max(best, log["val_mrr"])


def validate(policy, scorer, data, args):
    """Greedy answers to --val-queries val queries: MRR, CondR@1 (None without a positive) and crop rate."""
    rank, count = process()
    # A random sample: the first rows of a file that is sorted by entity know few entities. The same for every run.
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[:args.val_queries])[rank::count].tolist()
    batch = min(64, args.queries * (1 + args.group // 2))  # a step's rollout has as many rows
    answers = []  # a query's labels [K], its scores [K], and whether it was cropped
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        images = [data.open_image(i) for i in part]
        actions = policy.act(images, [data.queries[i].question for i in part], args.decode, batch_size=batch)
        views = score_views(data, scorer, part, images, [[action] for action in actions], args.fuse)
        answers += [(np.array(data.labels[i]), seen[0], action.decision == "REGION")
                    for i, action, (_, seen) in zip(part, actions, views)]
    labels, ranked, crops = map(np.array, zip(*gather(answers)))  # [Q, K], [Q, K], [Q]
    means = summary(metrics(ranked, labels))
    return {"val_mrr": means["MRR"], "val_cond_r1": means["CondR@1"], "val_crop_rate": float(crops.mean())}


def memory_mb(device):
    """MiB: on CUDA the most that PyTorch held since the last call, on a CPU the most that the process ever had."""
    if device.type != "cuda":
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)  # Linux counts in KiB
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak / 2**20, 1)


def try_largest(policy, data, args):
    """How many tokens a forward and backward pass may have (--micro-tokens), and does the largest query fit?

    On a card that is tried before step 0: the question of the longest line, with an image of the policy's cap, is
    stepped once. No weight moves, and all draws of a run are of (seed, step).
    """
    if policy.device.type != "cuda":
        return args.micro_tokens or 8192
    side = math.isqrt(policy.processor.image_processor.size["longest_edge"])  # pixels; the "edge" is an area
    question = data.queries[int(np.diff(data.queries.starts).argmax())].question  # of the longest line
    queries = math.ceil(args.queries / process()[1])
    prompts = policy.prompts([Image.new("RGB", (side, side))] * queries, [question] * queries)
    groups, _ = sample_groups(policy, prompts, [(args.seed, 0, b) for b in range(queries)], args)
    ones, hold = torch.ones(queries, max(map(len, groups))), holds_template(args)
    torch.cuda.empty_cache()
    rest, free = torch.cuda.memory_allocated(policy.device), torch.cuda.mem_get_info(policy.device)[0]
    before = memory_mb(policy.device)
    pack = policy.pack(prompts, groups, None, hold, args.micro_tokens or 1)[0]
    backward(policy, pack, (ones, ones, ones), 1.0, {}, hold, args, ["the largest"] * queries)
    peak = memory_mb(policy.device)
    for parameter in policy.lora_parameters():
        parameter.grad = None
    # Four fifths of what is free: pieces of other sizes leave gaps in the allocator's blocks.
    each = (peak * 2**20 - rest) / pack.layout.tokens
    tokens = args.micro_tokens or max(1, min(gather([int(0.8 * free / each)])))
    if process()[0] == 0:
        print(f"memory: {before:,} MiB at the peak of a rollout, {peak:,} MiB of an update of {pack.layout.tokens} "
              f"tokens; passes of at most {tokens:,} tokens")
    return tokens


@contextlib.contextmanager
def listening():
    """Yields the list of signals heard (SIGINT, SIGTERM): the first is noted, the step goes on; a second one acts."""
    heard, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        heard.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        # Not print: a signal may come in the middle of one.
        os.write(2, b"\ntrain.py: this step is finished and saved first; a second signal stops at once\n")

    try:
        for number in before:
            signal.signal(number, note)
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_board(args, start):
    """The TensorBoard writer of --tensorboard, with which --wandb reads along; a context of None without either."""
    if process()[0] or not (args.tensorboard or args.wandb):
        return contextlib.nullcontext()
    if args.wandb:  # the same id each time, so that a resumed run is the same run there, too
        name = hashlib.sha256(os.path.abspath(args.run).encode()).hexdigest()[:16]
        importlib.import_module("wandb").init(project=args.wandb, name=Path(args.run).name, dir=args.run, id=name,
                                              resume="allow", config=vars(args), sync_tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter  # here, not above: a package that only some have
    # purge_step: a resumed run draws over what the killed one had drawn beyond its last state.
    return SummaryWriter(os.path.join(args.run, "tensorboard"), purge_step=start)


# --------------------------------------------------------------------------------------------------- the run's files
FREE = ("steps", "epochs", "eval_every", "save_every", "samples_every", "max_prompt_tokens",
        "checkpointing", "tensorboard", "wandb")


def describe_run(args, data):
    """What config.json holds: all that decides the result, and on which pools."""
    where = ("resume", "device", "run", "data")  # not what: these may differ when a run is taken up again
    # The prompt's text itself: its file may change or go, and the adapter is of use under these words alone.
    prompt = Path(args.system_prompt).read_text(encoding="utf-8") if args.system_prompt else None
    if prompt is not None and not prompt.strip():  # a policy without instructions learns something: it would not show
        raise InputError(f"--system-prompt {args.system_prompt}: the file is empty")
    return {"args": {k: v for k, v in vars(args).items() if k not in where}, "pools": data.identity, "data": args.data,
            "policy": args.policy, "scorer": args.scorer, "system_prompt": prompt}


def check_run(run, config, resume):
    """What the folder holds: "nothing" that counts, a "state" to go on from, or a "finished" run. InputError where
    writing on would mix two runs."""
    finished = (run / "finished").exists()
    if not finished and not (run / "state.pt").exists():
        return "nothing"  # a run that was killed before its first state.pt starts again
    if not resume:
        raise InputError(f"{run} holds a {'finished ' * finished}run: go on with --resume, or choose another --run")
    then = read_json(run / "config.json", "put it back, or choose another --run")
    # The flags in FREE change no step that was made: a run may go on for longer, or with less memory.
    old, new = ({"pools (the data)": one.get("pools"), **one.get("args", {}), "system_prompt": one.get("system_prompt"),
                 **dict.fromkeys(FREE)} for one in (then, config))
    if changed := sorted(name for name in old | new if old.get(name) != new.get(name)):
        raise InputError(f"{run}: --resume with other values of {', '.join(changed)} than it was started with; see "
                         f"{run / 'config.json'}, or choose another --run")
    longer = any(then["args"].get(name) != config["args"][name] for name in ("steps", "epochs"))
    return "finished" if finished and not longer else "state"


def save_state(path, step, policy, optimizer):
    """All that --resume needs: number of steps done, LoRA, optimiser. Draws are functions of (seed, step): no RNG."""
    content = io.BytesIO()  # torch.save itself turns a full disk into a RuntimeError about its own inside
    torch.save({"step": step, "lora": [p.detach() for p in policy.lora_parameters()],
                "optimizer": optimizer.state_dict()}, content)
    with replacing(path) as temporary:
        Path(temporary).write_bytes(content.getbuffer())


def load_state(path, policy, optimizer):
    """Restore save_state's file; returns the number of steps done."""
    try:
        with zipfile.ZipFile(path) as archive:  # a flipped bit in a weight would train on without a word
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {broken}")
        # To main memory, whatever the device was and is: Adam's step counts belong there, what else does not is moved.
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged archive raises, and what weights_only says of a file that would run code.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError,
            torch.serialization.pickle.UnpicklingError) as error:
        raise InputError(f"{path} is damaged or holds more than numbers ({str(error)[:200]}); put a copy back, or "
                         "choose another --run") from error
    with torch.no_grad():
        for parameter, value in zip(policy.lora_parameters(), state["lora"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def read_log(path):
    """Lines of log.jsonl or samples.jsonl as dicts; [] where there is none."""
    # Only what ends in a newline was written to the end; half a line may even look like JSON.
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): mend or remove that line") from error


def keep_lines_before(path, step):
    """Cut a log back to the steps before `step`: what a killed run wrote after its last state is written again."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_log(path) if step and line["step"] < step]
        with replacing(path) as temporary:
            Path(temporary).write_text("".join(kept), encoding="utf-8")


def append(path, rows):
    """Add dicts to a .jsonl file, a line each."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# ------------------------------------------------------------------------------------------------- several processes
def join_processes(args):
    """Join the processes that torchrun started, if it did; `--device cuda` becomes this process's own GPU."""
    count = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's variables; without it there is one process
    if count == 1:
        return
    if args.queries < count:
        raise InputError(f"--queries {args.queries} counts the queries of a step over all {count} processes: give more")
    if args.device not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device}: under torchrun every process has a GPU of its own; give cuda")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl")


def process():
    """(number of this process, count W of them): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(entries):
    """The entries of all processes' lists, in one list."""
    if process()[1] == 1:
        return entries
    lists = [None] * process()[1]
    dist.all_gather_object(lists, entries)  # it unpickles: what our own processes sent, and nobody else
    return [entry for part in lists for entry in part]


def sum_gradients(parameters):
    """Every process's gradients become the sum over all; the loss was already divided by the whole batch's size."""
    if process()[1] == 1:
        return
    # One message of all gradients, not hundreds of small ones. A process whose groups are all idle has none: zeros.
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = grad.view_as(parameter)


# --------------------------------------------------------------------------------------------------------- the stage
def open_data(args):
    """Scorer, train data, val data (None without evaluation)."""
    with phase("data"):  # before the scorer: a fault of the data should not wait for gigabytes
        data = load_data(args.data, "train")
        val = load_data(args.data, "val") if args.eval_every else None
    if (rows := data.manifest.get("args", {}).get("limit")) and process()[0] == 0:
        print(f"note: {args.data} is a trial of prepare.py --limit {rows}: its pools are easier than the real ones")
    for part, advice in ((data, "see the counts in manifest.json"), (val, "prepare some, or give --eval-every 0")):
        if part is not None and not len(part):
            raise InputError(f"{part.queries.path}: no query here to learn from or to evaluate on; {advice}")
    with phase("scorer"):
        scorer = load_scorer(args.scorer, args.device, args.scorer_dtype or data.manifest["scorer"]["dtype"])
        same_scorer(args.data, data.manifest, scorer)
    return scorer, data, val


@contextlib.contextmanager
def phase(name):
    """Say what is being loaded, and how long it took."""
    began = time.perf_counter()
    if process()[0] == 0:
        print(f"{name} ...", flush=True)
    yield
    if process()[0] == 0:
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


def open_policy(args, prompt):
    """The policy with LoRA: fresh, or that of --init-adapter (not in a resumed run, which has later weights)."""
    from policy import load_policy  # here, not above: transformers takes seconds, and --help needs none of it
    # On a CPU the fused attention kernel's backward is slower than plain matrix products; on CUDA it is far faster.
    attention = "eager" if torch.device(args.device).type == "cpu" else "sdpa"
    try:
        policy = load_policy(args.policy, None, args.device, args.policy_dtype, args.max_pixels, prompt, attention)
        policy.add_lora(args.rank, args.alpha, args.dropout, args.targets, args.seed)
        if args.init_adapter and not (args.resume and (Path(args.run) / "state.pt").exists()):
            policy.load_adapter(args.init_adapter)
    except ValueError as error:
        hint = " (of --init-adapter, --rank, --alpha and --targets must be the same)" * bool(args.init_adapter)
        raise InputError(f"{error}{hint}") from error
    policy.max_new_tokens = args.max_new_tokens
    if args.checkpointing:
        # Decoder layers and vision blocks, in train mode alone: `backward` keeps that mode until its gradients are
        # there. The other kind (re-entrant) would not see LoRA: its inputs, frozen embeddings, need no gradient.
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


def train(args):
    """The stage: args of `parse_args` in, a run folder out. Returns the exit code: 0, or 128 + a signal."""
    for package in ["tensorboard"] * bool(args.tensorboard or args.wandb) + ["wandb"] * bool(args.wandb):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--tensorboard and --wandb need the package {package}: pip install {package}, or leave "
                             "the flag out; log.jsonl has the same numbers")
    scorer, data, val = open_data(args)
    run, first = Path(args.run), process()[0] == 0
    run.mkdir(parents=True, exist_ok=True)
    with lock_folder(args.run, "--run") if first else contextlib.nullcontext():
        config = describe_run(args, data)
        found = check_run(run, config, args.resume)  # before the policy: a refusal should not wait for gigabytes
        if found == "finished":
            if first:
                print(f"{run} is already finished: its adapter is in {run / 'adapter'}")
                (run / "finished").touch()  # make asked because data/ is newer: up to date
            return 0
        with phase("policy"):
            policy = open_policy(args, config["system_prompt"])
        # No weight decay: it would pull B A towards the base policy a second time, beside the KL term.
        optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=args.lr, weight_decay=0.0)
        start = load_state(run / "state.pt", policy, optimizer) if found == "state" else 0
        # Rounded first: 0.7 * 10 is a little above 7 in floating point and must not cost an eighth step.
        steps = args.steps or math.ceil(round(args.epochs * len(data) / args.queries, 6))
        if start > steps:
            raise InputError(f"{run} has {start} steps already, more than the {steps} asked for: choose another --run")
        # Also the moment at which all have read the run folder, and process 0 may write there.
        if len(seen := set(gather([(start, data.identity)]))) > 1:
            raise InputError(f"the processes see different files (steps done, pools): {seen}; --run and --data must be "
                             "the same folders for all")
        with phase("largest query"):
            # A resumed run takes what the card bore that it was begun on: with dropout other passes draw other numbers.
            then = read_json(run / "config.json", "put it back") if start else {}
            args.micro_tokens = config["micro_tokens"] = then.get("micro_tokens") or try_largest(policy, data, args)
        if first:
            (run / "finished").unlink(missing_ok=True)
            write_json(run / "config.json", config)
            for name in ("log.jsonl", "samples.jsonl"):
                keep_lines_before(run / name, start)
            weights = sum(parameter.numel() for parameter in policy.lora_parameters())
            print(f"r-GRPO: {len(data)} training queries, steps {start} to {steps} of {args.queries} queries x "
                  f"{args.group} rollouts, {weights:,} LoRA weights, on {process()[1]} x {args.device}")
        stopped = run_steps(start, steps, policy, optimizer, scorer, data, val, args)
        if first and stopped:
            print(f"train.py: stopped by {signal.Signals(stopped).name} after a whole step, which is saved: go on with "
                  "the same command and --resume", file=sys.stderr)
        elif first:
            (run / "finished").write_text(f"{steps} steps\n", encoding="utf-8")
    return 128 + stopped if stopped else 0


def main(argv=None):
    args = parse_args(argv)
    warn_of_idle_card()
    # A pure function of the seed, on one machine: no kernel that adds up in an order of its own.
    torch.use_deterministic_algorithms(args.device == "cpu")
    try:
        join_processes(args)
        code = train(args)
    # One process's end is everybody's: torchrun stops the others, who would wait for its part.
    except (InputError, FloatingPointError, FileNotFoundError) as error:
        raise SystemExit(f"train.py: {error}") from error
    except OSError as error:  # a full disk, above all
        raise SystemExit(f"train.py: {error}. What was whole in {args.run} still is: make room, or mend what is said, "
                         "then go on with the same command and --resume") from error
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(f"train.py: {error}\nWhat helps: --checkpointing (--resume may add it), or, in a new run, "
                         "smaller --micro-tokens, a smaller --max-pixels or fewer --queries") from error
    except KeyboardInterrupt:  # while loading, or a second one
        print("train.py: stopped at once; --resume goes on from the last state.pt, if there is one", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    # Not in a `finally`: leaving in good order means to wait for the others, who may be waiting for this one.
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
