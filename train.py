"""The r-GRPO loop (paper Sec. 3.4, App. B): sample, score, reward, advantage, step, log, save.

    python train.py          # the embedded world: data/world and the stand-ins in, runs/world out; minutes on a CPU
    python train.py --preset paper --data data/evqa --policy Qwen/Qwen2.5-VL-3B-Instruct --scorer FOLDER --run runs/evqa
    torchrun --nproc_per_node=4 -- train.py --preset paper --queries 16 ...     # four GPUs, as in the paper

A step takes a few queries. The policy writes a decision-balanced group of answers to each, the frozen scorer re-ranks
the query's pool with every crop, the reward is the improvement over the full image, and the policy is moved towards the
better answers. Only LoRA weights learn. Nothing here reads a truth box, and labels are read by the reward alone.

Files of a run: config.json (arguments, data), log.jsonl (a line a step), samples.jsonl (what was said and what it
earned), state.pt (to --resume), adapter/ (the result, in peft's format; written last, so a run that has it is whole),
lock (who writes here; it binds as long as that process lives).

What may happen to a run. Killed (kill -9, a full disk): --resume goes on from the last state.pt and ends with the log,
samples and adapter of an unbroken run. Ctrl-C or SIGTERM: the step is finished, state.pt is written, exit code 130 or
143; a second one stops at once. Reward, p(REGION), loss or gradient not finite: the run stops and names the queries.
Decisions that are all alike, hardly any advantage, a KL above --max-kl: "warnings" in log.jsonl (see `sickness`).

Under torchrun every process takes its share of a step's queries, LoRA's gradients are summed, process 0 writes: losses,
log and adapter are those of one process up to rounding (with dropout: up to its draws). All see the same files. The
`--` keeps torchrun from reading --run as a short form of its own --run-path.

Simplified: one image a query, no checkpoints but the last. Letters: B queries, n answers written a query (at most
N = --group, see `sample_groups`), M answers of a forward pass, K candidates, T tokens, D embed, W processes.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import importlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import rgrpo
from policy import cache_memory, load_policy, passing_memory, saved_activations
from rewards import metrics, reward, summary
from scorer import check_scorer, crop, hold, load_data, load_scorer, prepared_dtype, replacing, scores, write_json

PRESETS = {
    # App. B. "Batch size 4 per device" is read as 4 queries of N rollouts; --queries counts those of all processes, so
    # on the paper's 4 GPUs it is --queries 16, which a preset that also has to fit one GPU cannot know. The weight of
    # the KL term is not printed there: the authors' release has 0.1 of TRL's estimator, but compares with a policy that
    # is only 8 ranks away, so a small one is enough.
    "paper": dict(queries=4, group=8, epochs=2.0, steps=0, lr=5e-5, warmup=50, dropout=0.1, targets="all", beta=0.01,
                  micro=1, eval_every=200, save_every=100),
    # The stand-in is a thousand times smaller, so its LoRA takes a larger step; its vision tower stays frozen, which
    # lets a query's image features be computed once; without dropout and KL (a second forward each step) it learns as
    # well and faster.
    "mini": dict(queries=16, group=8, epochs=0.0, steps=120, lr=1e-3, warmup=10, dropout=0.0, targets="language",
                 beta=0.0, micro=16, eval_every=40, save_every=20),
}
WINDOW = 20  # steps that `sickness` looks back on


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag with its default (of the preset, where that sets it)."""


def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="mini",
                       help="defaults of what follows: paper = App. B, mini = the embedded world")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, parents=[first])
    files = parser.add_argument_group("files")
    files.add_argument("--data", default="data/world", help="folder that prepare.py wrote")
    files.add_argument("--run", default="runs/world", help="folder to write")
    files.add_argument("--resume", action="store_true", help="go on from the run's state.pt; without one, start")
    models = parser.add_argument_group("models (Sec. 3.2, 3.3)")
    models.add_argument("--policy", default="mini/policy", help="folder or Hugging Face id of a Qwen2.5-VL")
    models.add_argument("--scorer", default="mini/scorer", help="the scorer that prepared the data, see prepare.py")
    models.add_argument("--scorer-dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the scorer's weights; None = as the data was prepared with --scorer-dtype, else "
                             "bfloat16 on CUDA, float32 elsewhere")
    models.add_argument("--policy-dtype", choices=("float32", "bfloat16"),
                        help="of the policy's frozen weights and activations (LoRA's are float32); None = bfloat16 on "
                             "CUDA, float32 elsewhere")
    models.add_argument("--init-adapter", metavar="FOLDER",
                        help="LoRA in peft's format to start from; the KL term still compares with the bare policy")
    models.add_argument("--system-prompt", metavar="FILE",
                        help="text in place of the policy's own system prompt (Table 10)")
    models.add_argument("--max-pixels", type=int,
                        help="area in pixels that the policy's images are shrunk to, at least 784; None = its own")
    models.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1; under torchrun cuda is one GPU a process")
    add_method_flags(parser)
    add_length_flags(parser)
    parser.set_defaults(**PRESETS[first.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    # The flag that was given wins over the preset's number of the other kind; both at once argparse refuses.
    if args.epochs != PRESETS[args.preset]["epochs"]:
        args.steps = 0
    check_args(parser, args)
    return args


def add_method_flags(parser):
    method = parser.add_argument_group("r-GRPO (Sec. 3.4; rgrpo.py explains the readings)")
    method.add_argument("--balance", choices=("force", "resample", "none"), default="force",
                        help="how both decisions come into a group")
    method.add_argument("--advantage", choices=("factored", "group", "conditional", "balanced"), default="factored",
                        help="what a token is judged by")
    method.add_argument("--decision-weight", choices=("uniform", "pi"), default="uniform",
                        help="weight of the two branches in the decision's advantage; pi needs factored and grammar")
    method.add_argument("--std", action=argparse.BooleanOptionalAction, default=True,
                        help="divide advantages by the group's deviation (Eq. 9)")
    method.add_argument("--decode", choices=("grammar", "free"), default="grammar",
                        help="only decision and digits are choices | any text, then parsed")
    method.add_argument("--temperature", type=float, default=1.0,
                        help="of sampling, and of the log-probabilities that are trained, above 0")
    method.add_argument("--clip", type=float, default=0.2, help="of the probability ratio, above 0")
    method.add_argument("--beta", type=float, help="weight of the KL term; 0 saves the reference policy's forward")
    method.add_argument("--norm", choices=("token", "sequence"), default="token",
                        help="the loss is a mean over tokens or over rollouts")
    method.add_argument("--reward", choices=("delta", "absolute"), default="delta",
                        help="Eq. 7-8 | .5 MRR + .5 NDCG, the release's option")
    method.add_argument("--reward-weights", type=float, nargs=4, default=[0.2, 0.2, 0.2, 0.4], metavar="W",
                        help="of dMRR, dNDCG, dRank and dMargin in Eq. 7")
    method.add_argument("--eta", type=float, default=1.0, help="what MALFORMED costs (Eq. 7), at least 0")
    method.add_argument("--encouragement", type=float, default=0.0,
                        help="added to every REGION reward at step 0, less each step; an option of the release")
    method.add_argument("--encouragement-steps", type=int, default=5000, help="steps until that bonus is 0")
    lora = parser.add_argument_group("LoRA (App. B)")
    lora.add_argument("--rank", type=int, default=8, help="r")
    lora.add_argument("--alpha", type=float, default=32, help="scale: the update is alpha / r times B A")
    lora.add_argument("--dropout", type=float, help="before A, in the update's forward only; 0 up to below 1")
    lora.add_argument("--targets", choices=("all", "language"), help="all linear layers | those of the language model")


def add_length_flags(parser):
    size = parser.add_argument_group("sizes and schedule (App. B)")
    size.add_argument("--queries", type=int,
                      help="queries a step, over all processes of torchrun (the paper: 4 on each of 4 GPUs, so 16)")
    size.add_argument("--group", type=int, help="N, rollouts a query, at least 2")
    size.add_argument("--micro", type=int, help="queries of a process's forward and backward pass; memory, not results")
    size.add_argument("--checkpointing", action="store_true",
                      help="compute activations again in the backward pass instead of keeping them: a third more time")
    length = size.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="passes over the training queries, in place of --steps")
    length.add_argument("--steps", type=int, help="steps, in place of --epochs")
    size.add_argument("--inner-steps", type=int, default=1, help="optimiser steps on the same rollouts")
    size.add_argument("--max-prompt-tokens", type=int, default=8192, help="a longer prompt is an error, never cut")
    size.add_argument("--max-new-tokens", type=int, default=256, help="limit of a freely decoded answer")
    size.add_argument("--lr", type=float, help="peak learning rate; half a cosine towards 0 after the warm-up")
    size.add_argument("--warmup", type=int, help="steps of linear warm-up")
    size.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    size.add_argument("--seed", type=int, default=0, help="LoRA, order of the data and every draw are functions of it")
    logs = parser.add_argument_group("looking")
    logs.add_argument("--eval-every", type=int, help="steps between two evaluations on val, 0 = never")
    logs.add_argument("--val-queries", type=int, default=200, help="val queries of an evaluation, the first ones")
    logs.add_argument("--save-every", type=int, help="steps between two state.pt")
    logs.add_argument("--samples-every", type=int, default=10,
                      help="steps between two groups in samples.jsonl, 0 = never")
    logs.add_argument("--log-level", choices=("info", "warning"), default="info",
                      help="what is printed: a line a step | warnings alone; log.jsonl has everything")
    logs.add_argument("--max-kl", type=float, default=10.0,
                      help="warn of a step whose KL (nats a token, measured where --beta is not 0) is above; 0 = never")
    logs.add_argument("--when-sick", choices=("warn", "stop"), default="warn",
                      help=f"at a warning (KL; over {WINDOW} steps: p(REGION) below .01 or above .99 on average, more "
                           "than 90%% of the groups without advantage): go on | save the state and stop")
    logs.add_argument("--tensorboard", action="store_true",
                      help="log.jsonl's numbers to TensorBoard as well, in the run's tensorboard/ (needs tensorboard)")
    logs.add_argument("--wandb", metavar="PROJECT", help="and to a Weights & Biases project (needs wandb)")


def check_args(parser, args):
    """End with a usage message for a number that would only fail, or do nonsense, in the middle of a run."""
    for least, names in ((0, "seed warmup eval_every samples_every beta eta steps epochs dropout encouragement max_kl"),
                         (1, "queries micro inner_steps save_every val_queries max_new_tokens max_prompt_tokens rank "
                             "encouragement_steps"),
                         (2, "group"), (28 * 28, "max_pixels")):
        for name in names.split():
            if getattr(args, name) is not None and not getattr(args, name) >= least:  # `not >=` is true of NaN, too
                parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    for name in ("lr", "temperature", "clip", "max_grad_norm", "alpha"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.dropout >= 1:
        parser.error("--dropout must be below 1")
    if not args.steps and not args.epochs:
        parser.error("give --steps or --epochs")
    # Free text has no known pi(REGION | x), and the other advantages have no branches to weigh.
    if args.decision_weight == "pi" and (args.advantage, args.decode) != ("factored", "grammar"):
        parser.error("--decision-weight pi needs --advantage factored and --decode grammar")


# ------------------------------------------------------------------------------------------------- several processes

PATIENCE = datetime.timedelta(minutes=20)  # with the others, who may be loading gigabytes; then they count as lost


def join_processes(args):
    """Join the processes that torchrun started, if it did; `--device cuda` becomes this process's own GPU.

    ValueError where they would share a GPU, or where a step has fewer queries than there are processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's variables; without it there is one process
    if count == 1:
        return
    if args.queries < count:
        raise ValueError(f"--queries {args.queries} cannot be shared among {count} processes: it counts the queries of "
                         "a step over all of them")
    if torch.device(args.device).type == "cuda":
        if args.device != "cuda":
            raise ValueError(f"--device {args.device}: under torchrun every process has a GPU of its own; give cuda")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=PATIENCE)


def place():
    """(number of this process, count W of them): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def exchange(operation, *tensors):
    """A collective operation. ConnectionError when another process has ended: that one has said why. (With gloo. NCCL only
    queues the operation; there torchrun stops those who wait, after half a minute, and state.pt is as safe.)"""
    try:
        operation(*tensors)
    except RuntimeError as error:  # what gloo and nccl raise
        raise ConnectionError(f"process {place()[0]} of {place()[1]} lost the others; the first message of another "
                              f"process says why ({str(error)[:200]})") from error


def gather(value):
    """The `value` of every process, in order: a list of W. It must be made of what JSON has.

    Not all_gather_object, which would unpickle what it is sent; JSON gives every float back exactly.
    """
    if place()[1] == 1:
        return [value]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)  # [bytes]
    sizes = list(torch.zeros(place()[1], 1, dtype=torch.long, device=device))  # W x [1]
    exchange(dist.all_gather, sizes, torch.tensor([len(own)], device=device))
    longest = max(int(size) for size in sizes)
    padded = own.new_zeros(longest)  # all_gather wants equal lengths
    padded[:len(own)] = own
    parts = list(own.new_zeros(place()[1], longest))  # W x [longest]
    exchange(dist.all_gather, parts, padded)
    return [json.loads(bytes(part[:int(size)].tolist())) for part, size in zip(parts, sizes)]


def share(rows):
    """This process's part of a list: every W-th entry. All of it without torchrun."""
    rank, count = place()
    return rows[rank::count]


def unshare(part):
    """The whole list again, in its order, of everybody's `share`; JSON entries."""
    parts = gather(part)
    whole = [None] * sum(map(len, parts))
    for rank, entries in enumerate(parts):
        whole[rank::len(parts)] = entries
    return whole


def sum_gradients(parameters):
    """Every process's gradients become the sum over all; the loss was already divided by the whole batch's size."""
    if place()[1] == 1:
        return
    # One message of all gradients, not hundreds of small ones. A process whose groups are all idle has none: zeros.
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    exchange(dist.all_reduce, flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = grad.view_as(parameter)


# ------------------------------------------------------------------------------------------------------ what is drawn


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to `peak` in `warmup` steps, then half a cosine that would reach 0 one step after the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def steps_of(args, count):
    """Steps of a run on `count` training queries. The last one is filled up from the epoch that would follow."""
    # Rounded first: 0.7 * 10 is a little above 7 in floating point and must not cost an eighth step.
    return args.steps or math.ceil(round(args.epochs * count / args.queries, 6))


def queries_of_step(step, count, queries, seed):
    """Row numbers of a step: consecutive pieces of one random order per epoch, so every query comes once an epoch."""
    epochs, places = np.divmod(np.arange(step * queries, (step + 1) * queries), count)  # [B], [B]
    rows = np.empty(queries, dtype=np.int64)  # [B]
    # The order is drawn again in each step (15 ms for a million queries), so a resumed run has nothing to restore.
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch  # [B]
        rows[here] = np.random.default_rng([seed, epoch]).permutation(count)[places[here]]
    return rows.tolist()


def seeds_of_step(step, rows, count, seed):
    """A seed a query, of (seed, step, query): what is drawn does not depend on the rest of the batch."""
    # Where epochs meet, or when there are fewer queries than --queries, one can come twice: its groups must differ.
    return [(seed, step, row + count * rows[:i].count(row)) for i, row in enumerate(rows)]


def open_queries(policy, data, rows, longest):
    """Images (PIL RGB) and Prompts of some training queries. ValueError naming the query whose prompt is too long.

    longest: tokens a prompt may have (App. B: 8192). Cutting one, as text trainers do, would cut through its image.
    """
    names = [data.queries[row].query_id for row in rows]
    images = [data.open_image(row) for row in rows]
    try:
        prompts = policy.prompts(images, [data.queries[row].question for row in rows])
    except ValueError as error:
        raise ValueError(f"{data.pool_file}: {error}; counted from 0 in queries {names}") from error
    for name, prompt in zip(names, prompts):
        if len(prompt.ids) > longest:
            raise ValueError(
                f"{data.pool_file}: the prompt of query {name!r} has {len(prompt.ids)} tokens, "
                f"{int(prompt.mm_token_type_ids.sum())} of them its image; --max-prompt-tokens is {longest}. A smaller "
                "--max-pixels makes images smaller (in a new run), a larger --max-prompt-tokens lets it pass")
    return images, prompts


def sample_groups(policy, prompts, seeds, args):
    """A group of answers a query, and how many rollouts each stands for: B lists of Completion, B lists of int.

    Under balance "force" with a grammar all N/2 FULL rollouts of a query are one and the same answer: it is written
    once and counts N/2 times. "resample" draws freely first and then again what `rgrpo.plan` asks for.
    """
    def roll(queries, plans, salt=0):
        return policy.rollout([prompts[b] for b in queries], plans, args.decode, args.temperature,
                              seeds=[(*seeds[b], salt) for b in queries])

    everyone = range(len(prompts))
    plan = rgrpo.plan(args.group, args.balance)
    if args.balance == "force" and args.decode == "grammar":
        full, regions = plan.count("FULL"), plan.count("REGION")
        groups = roll(everyone, [["FULL"] + ["REGION"] * regions] * len(prompts))
        return groups, [[full] + [1] * regions] * len(prompts)
    groups = roll(everyone, [plan] * len(prompts))
    if args.balance == "resample":
        again = [rgrpo.plan(args.group, args.balance, [c.action.decision for c in group]) for group in groups]
        lacking = [b for b in everyone if any(again[b])]
        # Rollout n has its own stream of draws, so the whole plan is rolled; entries that are kept take the cheap FULL.
        drawn = roll(lacking, [[entry or "FULL" for entry in again[b]] for b in lacking], salt=1) if lacking else []
        for b, new in zip(lacking, drawn):
            groups[b] = [fresh if entry else kept for entry, kept, fresh in zip(again[b], groups[b], new)]
    return groups, [[1] * args.group] * len(prompts)


# ------------------------------------------------------------------------------------------------------ what it earns


def score_views(data, scorer, rows, images, actions):
    """Scores of every action's view (Eq. 1-4): B arrays float32 [n, K]; FULL and MALFORMED have the full image's.

    rows: B row numbers of data; images: their B images; actions: B lists of Action, boxes in original-image pixels.
    Only crops are encoded, in one batch, identical boxes once: candidates and full images were embedded by prepare.py.
    """
    # A dict and not a set: the order of the batch must not change from run to run.
    boxes = list(dict.fromkeys((b, a.box) for b, group in enumerate(actions) for a in group if a.decision == "REGION"))
    features = dict(zip(boxes, scorer.image_features([crop(images[b], box) for b, box in boxes])))  # (b, box) -> [D]
    found = []
    for b, (row, group) in enumerate(zip(rows, actions)):
        full = np.asarray(data.full[row], dtype=np.float32)  # [D]
        views = np.stack([features.get((b, a.box), full) for a in group])  # [n, D]
        try:
            found.append(scores(views, data.candidates(row)))  # [n, K]
        except ValueError as error:  # a feature that is NaN or 0, of a crop or of the pool
            raise FloatingPointError(f"{error}; query {data.queries[row].query_id!r}, {data.pool_file}:{row + 1}: is "
                                     "the scorer sound? Try it in float32, then prepare the data again") from error
    return found


def reward_groups(data, scorer, rows, images, groups, args, bonus=0.0):
    """Reward and its components of every answer: B dicts of arrays [n] (rewards.reward).

    bonus: of `encouragement`; where there is one, it is a component of its own and part of the total.
    """
    actions = [[c.action for c in group] for group in groups]
    found = []
    for row, group, seen in zip(rows, actions, score_views(data, scorer, rows, images, actions)):
        full = scores(np.asarray(data.full[row], dtype=np.float32), data.candidates(row))  # [K]
        earned = reward([a.decision for a in group], seen, full, np.array(data.queries[row].labels),
                        args.reward_weights, args.eta, args.reward)
        if bonus:
            extra = np.array([bonus * (a.decision == "REGION") for a in group])  # [n]
            earned = {**earned, "total": earned["total"] + extra, "encouragement": extra}
        found.append(earned)
    return found


def encouragement(step, args):
    """What a REGION rollout gets for being one, in the step counted from 0: a straight line down to 0."""
    return args.encouragement * max(0.0, 1 - step / args.encouragement_steps)


def check_finite(names, groups, rewards):
    """FloatingPointError naming the queries that have a reward or a p(REGION) that is not finite.

    Not left to the loss: a group whose advantages are all 0 has none, and NaN would pass for a decision until then.
    """
    for what, values in (("reward", [earned["total"] for earned in rewards]),
                         ("p(REGION)", [[c.action.p_region or 0.0 for c in group] for group in groups])):
        sick = [name for name, row in zip(names, values) if not np.isfinite(row).all()]
        if sick:
            raise FloatingPointError(f"{what} is not finite; queries {sick}")


def judge(groups, counts, rewards, args):
    """Advantages of decision and of box tokens, and the answers' weights: three float32 [B, n].

    counts: B lists, how many rollouts an answer stands for; rewards: of `reward_groups`. Short rows are filled up with
    answers of weight 0, which `rgrpo.advantages` leaves out and gives the advantage 0.
    """
    n = max(map(len, groups))
    total, weight = torch.zeros(len(groups), n), torch.zeros(len(groups), n)  # [B, n], [B, n]
    decision = torch.zeros(len(groups), n, dtype=torch.long)  # [B, n]
    for b, group in enumerate(groups):
        total[b, :len(group)] = torch.from_numpy(rewards[b]["total"])
        weight[b, :len(group)] = torch.tensor(counts[b], dtype=torch.float32)
        decision[b, :len(group)] = torch.tensor([rgrpo.CODES[c.action.decision] for c in group])
    p_region = None
    if args.decision_weight == "pi":
        p_region = torch.tensor([group[0].action.p_region for group in groups])  # [B]
    pair = rgrpo.advantages(total, decision, args.advantage, args.decision_weight, p_region, weight, args.std)
    return *pair, weight


# ---------------------------------------------------------------------------------------------------- what is learned


def loss_size(groups, weight, norm):
    """What the loss of these groups is divided by: free tokens (norm "token") or rollouts ("sequence"), each as often
    as it counts. weight: [B, n]."""
    size = {"token": lambda c: sum(c.free), "sequence": lambda c: any(c.free)}[norm]
    return sum(float(weight[b, n]) * size(c) for b, group in enumerate(groups) for n, c in enumerate(group))


def update(policy, optimizer, prompts, groups, advantages, args, names):
    """Gradient steps on one batch of groups; returns the numbers to log.

    advantages: (decision, box, weight), [B, n] each, of `judge`. names: B query ids, for FloatingPointError, raised
    when loss or gradient is not finite. Groups without any advantage cost no pass, unless a KL term pulls on them; they
    stay in the divisor, so leaving them out changes nothing but time. Under torchrun all of this is the process's
    share, and weights and numbers come out alike everywhere.
    """
    idle = rgrpo.zero_advantage(*advantages[:2])  # [B]
    work = [b for b in range(len(groups)) if args.beta or not idle[b]]
    sizes = gather(loss_size(groups, advantages[2], args.norm))
    total, everyone = sum(sizes), unshare(idle.tolist())  # of the whole batch
    busy = args.beta or not all(everyone)  # anywhere: a process without work must still add its zeros
    old, passes, norms = {}, [], []
    for _ in range(args.inner_steps if busy else 0):
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(work), args.micro):
            part = work[start:start + args.micro]
            passes.append(backward(policy, part, prompts, groups, advantages, total, old, args, names))
        sum_gradients(policy.lora_parameters())
        norms.append(torch.nn.utils.clip_grad_norm_(policy.lora_parameters(), args.max_grad_norm).item())
        # Clipping by an infinite norm makes every gradient NaN or 0: the step would ruin the weights without a word.
        if not math.isfinite(norms[-1]):
            raise FloatingPointError(f"the gradient's norm is {norms[-1]}; queries {[names[b] for b in work]}"
                                     + (" or another process's" if place()[1] > 1 else ""))
        optimizer.step()
    passes = [one for part in gather(passes) for one in part]
    learned = {**merge_passes(passes, args.inner_steps), "grad_norm": float(np.mean(norms))} if busy else {}
    return {**learned, "zero_advantage": float(torch.tensor(everyone, dtype=torch.float32).mean())}


def merge_passes(passes, inner_steps):
    """The numbers of all backward passes of a step -> those of the step, however --micro cut it into parts."""
    share = np.array([one["size"] for one in passes])
    share = share / share.sum()
    entropy, decisions = (sum(one[key] for one in passes) for key in ("entropy", "decisions"))
    return {
        "loss": sum(one["loss"] for one in passes) / inner_steps,  # the parts of a batch add up to its loss
        **{key: float(sum(s * one[key] for s, one in zip(share, passes))) for key in ("kl", "clip_fraction")},
        **{key: max(one[key] for one in passes) for key in ("ratio_max", "logp_gap")},
        "decision_entropy": entropy / max(1, decisions)}


def backward(policy, part, prompts, groups, advantages, total, old, args, names):
    """Loss and gradients of the queries `part` (numbers into the other lists); returns numbers for `merge_passes`.

    total: the whole batch's loss_size. old: {first query of a part: its log-probs at the first inner step}.
    """
    chosen = [prompts[b] for b in part], [groups[b] for b in part]
    flat = [(b, n, c) for b in part for n, c in enumerate(groups[b])]  # M answers
    policy.train()  # LoRA dropout, if any
    out = policy.log_probs(*chosen, temperature=args.temperature)
    logp, mask = out["logp"], out["mask"]  # [M, T], [M, T]
    at = [b for b, _, _ in flat], [n for _, n, _ in flat]
    decision, box, weight = (table[at].to(logp.device) for table in advantages)  # [M] each
    token = torch.where(out["decision"], decision[:, None], box[:, None])  # [M, T]
    reference = None
    if args.beta:
        policy.eval()
        with torch.no_grad(), policy.adapter(False):
            reference = policy.log_probs(*chosen, temperature=args.temperature)["logp"]  # [M, T]
    # The first inner step's own values, detached, and not those of sampling: a ratio of exactly 1, also with dropout.
    before = old.setdefault(part[0], logp.detach())  # [M, T]
    try:
        value, numbers = rgrpo.loss(
            logp, before, token, mask, args.clip, reference, args.beta, args.norm, weight, total)
    except FloatingPointError as error:
        finite = torch.isfinite(logp.detach()).all(1).tolist()  # [M]
        # Where every log-probability is finite, it was the ratio or the KL term: any query of the part may be the one.
        found = {b for (b, _, _), fine in zip(flat, finite) if not fine} or part
        raise FloatingPointError(f"{error}; queries {[names[b] for b in sorted(found)]}") from error
    policy.train()  # checkpointing runs the forward again in the backward pass
    value.backward()
    policy.eval()
    sampled = torch.zeros(logp.shape)  # [M, T]
    for m, (_, _, c) in enumerate(flat):
        sampled[m, :len(c.ids)] = torch.tensor(c.log_probs)
    gap = (before - sampled.to(logp.device)) * mask  # [M, T] sampling against scoring
    return {**numbers, "size": loss_size(chosen[1], advantages[2][part], args.norm), "logp_gap": gap.abs().max().item(),
            "entropy": (out["entropy"] * out["decision"]).sum().item(), "decisions": out["decision"].sum().item()}


# ------------------------------------------------------------------------------------------------------------ looking


def tell(groups, counts, rewards):
    """What `describe` needs of a step's rollouts, a dict a query, made of what JSON has: processes exchange it."""
    return [{"decision": [c.action.decision for c in group], "count": list(count),
             "p_region": group[0].action.p_region, **{name: values.tolist() for name, values in earned.items()}}
            for group, count, earned in zip(groups, counts, rewards)]


def describe(told):
    """What a step's rollouts were like: means over rollouts, an answer counted as often as it stands for.

    told: of `tell`, all queries of the step.
    """
    def column(name):
        return np.array([value for query in told for value in query[name]])  # [M]

    weight, kinds, total = column("count").astype(float), column("decision"), column("total")  # [M] each
    log = {"reward": float((weight * total).sum() / weight.sum())}
    for name in ("FULL", "REGION", "MALFORMED"):
        inside = kinds == name  # [M]
        log[f"{name.lower()}_rate"] = float(weight[inside].sum() / weight.sum())
        if name != "MALFORMED" and inside.any():  # a MALFORMED one earns -eta, which needs no mean
            log[f"reward_{name.lower()}"] = float((weight * total)[inside].sum() / weight[inside].sum())
    if (kinds == "REGION").any():  # without one there is no mean, and 0 would say "no better, no worse"
        for name in ("d_mrr", "d_ndcg", "d_rank", "d_margin"):
            log[name] = float(np.mean(column(name)[kinds == "REGION"]))
    p = [query["p_region"] for query in told if query["p_region"] is not None]
    return {**log, "p_region": float(np.mean(p)) if p else None}  # the crop rate that the policy itself would have


def answered_at_once(args):
    """Queries of a batch in `validate`: few enough that what fits a step fits this, at most 32."""
    return min(32, 2 * args.queries)


def validate(policy, scorer, data, args):
    """Greedy answers to the first --val-queries val queries: MRR, CondR@1 (None without a positive) and crop rate."""
    everyone = list(range(min(args.val_queries, len(data.queries))))
    rows = share(everyone)
    ranked = []  # per query: its scores [K] and whether it was cropped
    batch = answered_at_once(args)
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        images = [data.open_image(i) for i in part]
        actions = policy.act(images, [data.queries[i].question for i in part], args.decode, batch_size=batch)
        found = score_views(data, scorer, part, images, [[a] for a in actions])  # [1, K] each
        ranked += [(s[0].tolist(), a.decision == "REGION") for s, a in zip(found, actions)]
    ranked, crops = zip(*unshare(ranked))
    means = summary(metrics(np.array(ranked), np.array([data.queries[i].labels for i in everyone])))
    return {"val_mrr": means["MRR"], "val_cond_r1": means["CondR@1"], "val_crop_rate": sum(crops) / len(everyone)}


def sample_lines(step, data, rows, groups, rewards, advantages):
    """Lines for samples.jsonl: the first query of a step with all that was said, earned and concluded."""
    query = data.queries[rows[0]]
    for n, c in enumerate(groups[0]):
        components = {k: round(float(v[n]), 4) for k, v in rewards[0].items()}
        yield {"step": step, "query_id": query.query_id, "question": query.question, "text": c.action.text,
               "decision": c.action.decision, "box": c.action.box, "p_region": c.action.p_region,
               "forced": c.forced_decision, "reward": components,
               "decision_advantage": round(float(advantages[0][0, n]), 4),
               "box_advantage": round(float(advantages[1][0, n]), 4)}


def readable(log, steps, left):
    """One line a step for people. left: seconds."""
    def show(key, form="+.3f"):
        return format(log[key], form) if log.get(key) is not None else "-"

    line = (f"step {log['step'] + 1}/{steps} reward {show('reward')} "
            f"(FULL {show('reward_full')} REGION {show('reward_region')}) p(REGION) {show('p_region', '.2f')} "
            f"malformed {show('malformed_rate', '.2f')} kl {show('kl', '.4f')} grad {show('grad_norm', '.2f')} "
            f"lr {log['lr']:.1e} {log['seconds']:.1f} s, {left / 60:.1f} min left")
    if "val_mrr" in log:
        line += (f" | val MRR {show('val_mrr', '.3f')} CondR@1 {show('val_cond_r1', '.3f')} "
                 f"crop rate {show('val_crop_rate', '.2f')}")
    return line


# ------------------------------------------------------------------------------------------------------------ memory


def longest_prompt(policy, data):
    """(tokens, patches, pixels a side): what no prompt of `data` has more of, from longest question and largest image.

    No pixel is read: image sizes stand in the files' headers, and the image processor says what it would make of them.
    Once an image is as large as --max-pixels allows, the others need not be looked at. A file that cannot be read is
    left to the step that needs it, which says more.
    """
    reader, tokenizer = policy.processor.image_processor, policy.processor.tokenizer
    cap, patches, side = reader.size["longest_edge"], 0, 0
    for path in dict.fromkeys(map(data.image_path, range(len(data.queries)))):
        try:
            with Image.open(path) as image:
                width, height = image.size
            patches = max(patches, reader.get_number_of_image_patches(height, width))
            side = max(side, width, height)
        except (OSError, ValueError, Image.DecompressionBombError):  # ValueError: sides too unequal to be resized
            continue
        if width * height >= cap:
            patches, side = cap // reader.patch_size**2, math.isqrt(4 * cap)  # sides of 1 to 4, say
            break
    empty, = policy.prompts([Image.new("RGB", (56, 56))], [""])
    frame = len(empty.ids) - int(empty.mm_token_type_ids.sum())  # all that surrounds question and image
    longest, questions = 0, [query.question for query in data.queries]
    for start in range(0, len(questions), 10_000):  # in parts: a million encodings at once would take gigabytes
        ids = tokenizer(questions[start:start + 10_000], add_special_tokens=False)["input_ids"]
        longest = max(longest, *map(len, ids))
    return frame + longest + patches // reader.merge_size**2, patches, side


def memory_forecast(policy, scorer, args, tokens, patches, side):
    """Bytes that a process will need: ({what stays: bytes}, {what comes and goes: bytes}); the peak is the sum of the
    first and the largest of the second. tokens, patches, side: of `longest_prompt`. Arithmetic; nothing is run."""
    config, size, cuda = policy.model.config, policy.model.dtype.itemsize, policy.device.type == "cuda"
    queries = math.ceil(args.queries / place()[1])
    written = args.group  # rollouts that are decoded to their end
    if args.decode == "grammar":
        # Coordinates as long as can be; nothing depends on what follows the last of them.
        region = policy.grammar.region_ids([int("9" * len(str(side)))] * 4)
        answer, trunk = len(region) - len(policy.grammar.spans[4]), len(policy.grammar.trunk)
        if args.balance == "force":  # FULL ends at its decision
            written = rgrpo.plan(args.group, args.balance).count("REGION")
        tree, vocabulary = trunk + written * (answer - trunk), 0
    else:
        answer, tree, vocabulary = args.max_new_tokens, args.group * args.max_new_tokens, config.text_config.vocab_size

    # Free answers with forced decisions begin in two ways, each with a prefill of its own (policy.py).
    ways = 2 if args.decode == "free" and args.balance != "none" else 1

    def answering(count, each, ways):
        """The prompts' cache, then the pass that fills it or its copies, of which one layer's is being lengthened."""
        copies = cache_memory(config, count * each, tokens + answer, size)
        copies += copies // config.text_config.num_hidden_layers + count * each * vocabulary * (size + 32)
        reading = passing_memory(config, count * ways, tokens, patches, size, cuda)
        return cache_memory(config, count * ways, tokens, size) + max(copies, reading)

    rows = min(args.micro, queries), tokens + tree, patches, size, cuda
    # Beside what is kept: the reference policy's forward, or the gradients of the MLP's three products.
    beside = passing_memory(config, *rows) if args.beta else math.prod(
        (3, *rows[:2], config.text_config.intermediate_size, size))
    weights = sum(p.numel() for p in policy.lora_parameters())
    stays = {"policy": sum(p.numel() * p.element_size() for p in policy.model.parameters()) - 4 * weights,
             "LoRA, its gradient and Adam's two moments": weights * (16 + (size if cuda else 0)),  # + its cast copy
             "scorer": sum(p.numel() * p.element_size() for p in scorer.model.parameters())}
    saved = saved_activations(config, policy.lora, *rows, policy.tower_adapted, args.checkpointing, cuda)
    comes = {
        "rollout": answering(queries, written, ways),
        # 512 choices among a whole vocabulary at a time: logits, their softmax and both gradients.
        "update": sum(saved.values()) + beside + min(vocabulary, 1) * 512 * vocabulary * 24,
        "scorer's crops": scorer.activation_bytes(queries * written)}
    if args.eval_every:
        comes["evaluation"] = answering(answered_at_once(args), 1, 1)
    return stays, comes


def check_memory(policy, scorer, data, args):
    """The forecast: lines to print, and the bytes of a step's peak. ValueError, with a remedy, where a CUDA card cannot
    hold it."""
    tokens, patches, side = longest_prompt(policy, data)
    stays, comes = memory_forecast(policy, scorer, args, tokens, patches, side)
    most, peak = max(comes, key=comes.get), sum(stays.values()) + max(comes.values())
    lines = [f"memory forecast, for prompts of up to {tokens} tokens (images of up to {patches} patches):"]
    lines += [f"  {count / 2**20:10,.1f} MiB  {name}" for name, count in {**stays, **comes}.items()]
    lines += [f"  {peak / 2**20:10,.1f} MiB  at the peak, {most}"]
    if policy.device.type == "cuda":
        # What is free, and what this process holds already: the weights.
        room = torch.cuda.mem_get_info(policy.device)[0] + torch.cuda.memory_reserved(policy.device)
        if peak > room:
            remedies = {"update": "--micro 1, --checkpointing", "rollout": "fewer --queries or more processes",
                        "evaluation": "--eval-every 0", "scorer's crops": "a smaller scorer"}
            raise ValueError("\n".join(lines) + f"\n{policy.device} has {room / 2**20:,.1f} MiB for it. What helps: "
                             f"{remedies[most]}, or a smaller --max-pixels (in a new run)")
    return lines, sum(stays.values()) + max(value for name, value in comes.items() if name != "evaluation")


def measured_memory(log, forecast, device):
    """What to print after a run's first step: nothing but on a card, where memory_mb is a peak. forecast: bytes."""
    if device.type != "cuda":
        return []
    return [f"memory: {log['memory_mb']:,.1f} MiB at the peak of step {log['step'] + 1}, "
            f"{forecast / 2**20:,.1f} MiB were forecast"]


# --------------------------------------------------------------------------------------------------- the run's files


def describe_run(args, data):
    """What config.json holds: all that decides the result, and on which pools."""
    with open(os.path.join(args.data, "manifest.json"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    skip = ("resume", "device", "run", "data")  # where and how, not what: these may differ when a run is taken up again
    return {"args": {k: v for k, v in vars(args).items() if k not in skip}, "manifest_sha256": digest,
            "pools": data.identity, "policy": args.policy, "scorer": args.scorer, "data": args.data,
            # The text itself: its file may change or go, and the adapter is of use under these words alone.
            "system_prompt": read_prompt(args)}


def check_run(run, config, resume):
    """What the run folder holds: "nothing" that counts, a "state" to go on from, or a "finished" run.

    run: Path; config: of `describe_run`; resume: was it asked for? ValueError where writing on would mix two runs.
    """
    finished, state = (run / "adapter" / "adapter_model.safetensors").exists(), (run / "state.pt").exists()
    if not finished and not state:
        return "nothing"  # a run that was killed before its first state.pt starts again
    if not resume:
        advice = "choose another --run" if finished else "go on with --resume, or choose another --run"
        raise ValueError(f"{run} holds a {'finished ' if finished else ''}run already: {advice}")
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{path} is missing, so what {run} was trained on is unknown: put it back, or choose another "
                         "--run")
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        pools, arguments, where = old["pools"], dict(old["args"]), old["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what train.py wrote ({error!r}): put it back, or choose another --run"
                         ) from error
    if pools != config["pools"]:
        raise ValueError(f"{run} was trained on other pools ({where}, {pools}) than {config['data']} "
                         f"({config['pools']}): choose another --run")
    if old.get("system_prompt", config["system_prompt"]) != config["system_prompt"]:
        raise ValueError(f"{run}: the text of --system-prompt is another than the run was started with; see {path}")
    # These change no weight: a run that stopped at a long prompt or for want of memory may go on with another value.
    free = ("save_every", "max_prompt_tokens", "checkpointing", "max_kl", "when_sick", "tensorboard", "wandb",
            "log_level")
    # A run of before some flag existed did what is that flag's default now.
    then = {**vars(parse_args(["--preset", config["args"]["preset"]])), **arguments}
    changed = sorted(k for k, v in config["args"].items() if k not in free and then[k] != v)
    if changed:
        raise ValueError(f"{run}: --resume with other values of {', '.join(changed)} than it was started with; "
                         f"see {path}")
    return "finished" if finished else "state"


@contextlib.contextmanager
def writing(path):
    """Errors of writing `path`, which may not even name it, say what is safe and what to do: OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}). What was whole still is: make room, or mend what is "
                      "said there, then go on with the same command and --resume") from error


def save_state(path, step, policy, optimizer):
    """All that --resume needs: number of steps done, LoRA, optimiser. Draws are functions of (seed, step): no RNG."""
    content = io.BytesIO()  # torch.save itself turns a full disk into a RuntimeError about its own inside
    torch.save({"step": step, "lora": [p.detach() for p in policy.lora_parameters()],
                "optimizer": optimizer.state_dict()}, content)
    with writing(path), replacing(path) as temporary:
        Path(temporary).write_bytes(content.getbuffer())


def load_state(path, policy, optimizer):
    """Restore save_state's file; returns the number of steps done. ValueError for what is none, or of another policy.

    Its checksums are looked at first: a flipped bit in a weight would train on without a word.
    """
    remedy = "put a copy back, or choose another --run"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise zipfile.BadZipFile(f"checksum of {broken}")
        # To main memory, whatever the device was and is: Adam's step counts belong there, what else does not is moved.
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(policy.lora_parameters(), state["lora"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    # What a damaged archive raises, and what weights_only says of a file that would run code (its error's class lives
    # in a module that no file here imports).
    except (zipfile.BadZipFile, EOFError, NotImplementedError, torch.serialization.pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or holds more than numbers ({str(error)[:200]}); {remedy}") from error
    except torch.cuda.OutOfMemoryError:  # a RuntimeError, but no fault of the file: `main` says what helps
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit this policy's LoRA ({str(error)[:200]}); {remedy}") from error


def whole_lines(path):
    """The lines of a log as dicts. ValueError naming the line that is none."""
    # Only what ends in a newline was written to the end; half a line may even look like JSON.
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a line of a log ({error!r}); mend or remove the line") from error
        yield row


def keep_lines_before(path, step):
    """Cut a log back to the steps before `step`: what a killed run wrote after its last state is written again."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in whole_lines(path) if row["step"] < step]
        with writing(path), replacing(str(path)) as temporary:
            Path(temporary).write_text("".join(kept), encoding="utf-8")


def append(path, rows):
    """Add dicts to a .jsonl file, a line each."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def only_writer(run):
    """Hold the run folder's lock: ValueError, naming the process, where another one trains there."""
    if place()[0]:  # process 0 writes; where it is refused, the others lose it and end
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with writing(run / "lock"):
        lock = hold(run, "--run")
    with lock:
        yield


# ------------------------------------------------------------------------------------------- what may happen to a run

class Stopped(Exception):
    """The run ends before its last step, on demand and in good order. args: message, the program's exit code."""


@contextlib.contextmanager
def listening():
    """Yields the list of signals heard (SIGINT, SIGTERM): they are noted, and the step goes on; a second one acts at
    once. Threads cannot listen: there the list stays empty."""
    heard = []

    def note(number, frame):
        heard.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        # Not print: a signal may come in the middle of one.
        os.write(2, b"\ntrain.py: this step is finished and saved first; a second signal stops at once\n")

    before = {}
    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sickness(recent, args):
    """What is wrong with a run by its last lines of log.jsonl (newest last): {name: sentence}, empty when all is well.

    Means are over WINDOW steps and wait until there are as many. p(REGION) is the policy's own; where free decoding
    hides it, the crop rate says the same only without balance. The decision's entropy is no symptom: a policy that has
    learned when to crop is sure of itself.
    """
    found, newest = {}, recent[-1]
    if args.max_kl and newest.get("kl", 0) > args.max_kl:
        found["kl"] = (f"KL is {newest['kl']:.3g} nats a token, --max-kl {args.max_kl:g}: the policy runs away from "
                       "what it was; a larger --beta or a smaller --lr holds it")
    if len(recent) < WINDOW:
        return found
    crops = [line["region_rate"] if args.balance == "none" and line["p_region"] is None else line["p_region"]
             for line in recent]
    if None not in crops and not 0.01 <= float(np.mean(crops)) <= 0.99:
        name = "all FULL" if np.mean(crops) < 0.5 else "all REGION"
        found[name] = (f"p(REGION) is {np.mean(crops):.4f} over {WINDOW} steps: hardly anything is left to decide; see "
                       "reward_full and reward_region")
    idle = float(np.mean([line["zero_advantage"] for line in recent]))
    if idle > 0.9:
        found["zero advantage"] = (f"{idle:.1%} of the groups of {WINDOW} steps taught nothing: all answers earn the "
                                   "same; look at samples.jsonl")
    return found


def look_after(log, recent, args):
    """Add `log` to the last lines and "warnings" to it where something is wrong; returns what is news, to print."""
    recent.append(log)
    found, known = sickness(list(recent), args), recent[-2].get("warnings", ()) if len(recent) > 1 else ()
    if found:
        log["warnings"] = list(found)
    return [f"warning, step {log['step'] + 1}: {text}" for name, text in found.items() if name not in known]


def last_lines(path, step):
    """The last lines of log.jsonl before `step`, as many as `sickness` looks at: a deque of dicts, for more."""
    return collections.deque((line for line in whole_lines(path) if line["step"] < step), maxlen=WINDOW)


def memory_mb(device):
    """MiB of this process: on CUDA the most that PyTorch held since the last call, on a CPU what is resident now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return round(peak / 2**20, 1)
    try:
        return round(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except FileNotFoundError:  # not Linux
        return None


def import_trackers(args):
    """The optional packages that --tensorboard and --wandb ask for: {module: itself}. ValueError where one is missing,
    before the models are loaded."""
    found = {}
    for asked, flag, module in ((args.tensorboard, "tensorboard", "torch.utils.tensorboard"),
                                (args.wandb, "wandb", "wandb")):
        try:
            found |= {flag: importlib.import_module(module)} if asked else {}
        except ImportError as error:
            raise ValueError(f"--{flag} needs the package {flag} ({error}): pip install {flag}, or leave the flag out; "
                             "log.jsonl has the same numbers") from error
    return found


@contextlib.contextmanager
def tracking(args, start):
    """Yields a function that shows a line of log.jsonl to the trackers asked for, if any."""
    trackers = import_trackers(args) if place()[0] == 0 else {}
    with contextlib.ExitStack() as stack:
        shown = []
        if "tensorboard" in trackers:
            # purge_step: a resumed run draws over what the killed one had drawn beyond its last state.
            board = trackers["tensorboard"].SummaryWriter(os.path.join(args.run, "tensorboard"), purge_step=start)
            stack.callback(board.close)
            shown.append(lambda numbers, step: [board.add_scalar(k, v, step) for k, v in numbers.items()])
        if "wandb" in trackers:
            # The same id each time, so that a resumed run is the same run there, too.
            run = trackers["wandb"].init(project=args.wandb, name=Path(args.run).name, dir=args.run, config=vars(args),
                                         id=hashlib.sha256(os.path.abspath(args.run).encode()).hexdigest()[:16],
                                         resume="allow")
            stack.callback(run.finish)
            shown.append(lambda numbers, step: run.log(numbers, step=step))
        yield lambda log: [show({k: v for k, v in log.items() if k != "step" and isinstance(v, (int, float))},
                                log["step"]) for show in shown]


# -------------------------------------------------------------------------------------------------------- the stage


def open_data(args):
    """Scorer, train data, val data (None without evaluation)."""
    data = load_data(args.data, "train")  # before the scorer: a fault of the data should not wait for gigabytes
    scorer = load_scorer(args.scorer, args.device, args.scorer_dtype or prepared_dtype(data.manifest))
    check_scorer(args.data, data.manifest, scorer.identity)
    if not data.queries:
        raise ValueError(f"{args.data}: no training query has its positive in the pool; see the counts in "
                         "manifest.json")
    val = load_data(args.data, "val", scorer.identity) if args.eval_every else None
    if val is not None and not val.queries:
        raise ValueError(f"{val.pool_file}: no val queries to evaluate on; prepare some, or give --eval-every 0")
    return scorer, data, val


def read_prompt(args):
    """The text of --system-prompt, None where it is not given."""
    if not args.system_prompt:
        return None
    if not os.path.isfile(args.system_prompt):
        raise FileNotFoundError(f"--system-prompt {args.system_prompt}: no such file")
    prompt = Path(args.system_prompt).read_text(encoding="utf-8")
    if not prompt.strip():  # a policy without instructions learns something, which hides the mistake
        raise ValueError(f"--system-prompt {args.system_prompt}: the file is empty")
    return prompt


def open_policy(args):
    """The policy with fresh LoRA."""
    # On a CPU the fused attention kernel's backward is slower than plain matrix products; on CUDA it is far faster.
    attention = "eager" if torch.device(args.device).type == "cpu" else "sdpa"
    policy = load_policy(args.policy, device=args.device, max_pixels=args.max_pixels, system_prompt=read_prompt(args),
                         attention=attention, dtype=args.policy_dtype)
    policy.max_new_tokens = args.max_new_tokens
    policy.add_lora(args.rank, args.alpha, args.dropout, args.targets, args.seed)
    if args.init_adapter and not (args.resume and (Path(args.run) / "state.pt").exists()):  # which has later weights
        try:
            policy.load_adapter(args.init_adapter)
        except ValueError as error:
            raise ValueError(f"--init-adapter: {error}; --rank, --alpha and --targets must be those it was made with"
                             ) from error
    if args.checkpointing:
        # Decoder layers and vision blocks, in train mode alone: `backward` keeps that mode until its gradients are
        # there. The other kind (re-entrant) would not see LoRA: its inputs, frozen embeddings, need no gradient.
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


def open_step(step, policy, data, args):
    """What a step reads: rows and seeds of this process's queries, their images and Prompts.

    Nothing is drawn but from (seed, step), so it can be done while the step before runs.
    """
    rows = queries_of_step(step, len(data.queries), args.queries, args.seed)
    seeds = share(seeds_of_step(step, rows, len(data.queries), args.seed))
    rows = share(rows)  # the step's first query is process 0's, which writes the samples
    return rows, seeds, *open_queries(policy, data, rows, args.max_prompt_tokens)


def train_step(step, steps, opened, policy, optimizer, scorer, data, args):
    """One step of r-GRPO. Returns (numbers to log, lines for samples.jsonl).

    step: from 0, of `steps`; opened: of `open_step`. FloatingPointError names step and queries when loss or gradient is
    not finite.
    """
    # Dropout: a resumed run draws what an unbroken one draws, and no process what another draws.
    torch.manual_seed(args.seed * 1_000_003 + step + (place()[0] << 40))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
    rows, seeds, images, prompts = opened
    names = [data.queries[row].query_id for row in rows]
    try:
        groups, counts = sample_groups(policy, prompts, seeds, args)
        rewards = reward_groups(data, scorer, rows, images, groups, args, encouragement(step, args))
        check_finite(names, groups, rewards)
        advantages = judge(groups, counts, rewards, args)
        numbers = update(policy, optimizer, prompts, groups, advantages, args, names)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step} (from 0, as in log.jsonl; queries {names}): {error}. Nothing of this "
                                 "step was kept; if it comes again with --resume, train anew with a smaller --lr"
                                 ) from error
    told = unshare(tell(groups, counts, rewards))
    log = {"step": step, **describe(told), **numbers, "lr": optimizer.param_groups[0]["lr"]}
    return log, list(sample_lines(step, data, rows, groups, rewards, advantages))


def run_steps(start, steps, recent, forecast, policy, optimizer, scorer, data, val, args):
    """Steps start .. steps - 1, with their logs, evaluations and states in the run folder.

    recent: the last lines of the log before `start`; forecast: bytes, of `check_memory`. Raises Stopped, with the state
    saved, after the step in which a signal came to any process, or a warning under --when-sick stop.
    """
    run, began, first = Path(args.run), time.perf_counter(), place()[0] == 0
    with tracking(args, start) as track, listening() as heard, ThreadPoolExecutor(1) as thread:
        def ahead(step):
            """What gives a step its `opened`. A card would stand idle meanwhile, so there a thread begins at once; on two
            cores of a CPU that made a step 1.4 times as long."""
            if step < steps and policy.device.type == "cuda":
                return thread.submit(open_step, step, policy, data, args).result
            return functools.partial(open_step, step, policy, data, args)

        coming = ahead(start)
        # disable=None: a bar on terminals only.
        for step in tqdm(range(start, steps), initial=start, total=steps, desc="train", unit="step",
                         disable=None if first else True):
            clock = time.perf_counter()
            opened, coming = coming(), ahead(step + 1)  # an error in there is raised here, in its own step
            log, samples = train_step(step, steps, opened, policy, optimizer, scorer, data, args)
            log |= {"seconds": time.perf_counter() - clock, "memory_mb": memory_mb(policy.device)}
            if args.eval_every and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
                log |= validate(policy, scorer, val, args)
            news = look_after(log, recent, args)  # alike in all processes, as all numbers are
            # A signal may reach one process sooner than another; the last step needs no stopping.
            signals = [number for part in gather(list(heard)) for number in part] if step + 1 < steps else []
            stopping = bool(signals) or (args.when_sick == "stop" and "warnings" in log and step + 1 < steps)
            if first:
                write_step(run, log, samples, args)
                track(log)
                left = (time.perf_counter() - began) / (step + 1 - start) * (steps - step - 1)
                told = [readable(log, steps, left)]
                told += measured_memory(log, forecast, policy.device) if step == start else []
                for line in (*told * (args.log_level == "info"), *news):
                    tqdm.write(line)
                if stopping or (step + 1) % args.save_every == 0 or step + 1 == steps:
                    save_state(str(run / "state.pt"), step + 1, policy, optimizer)
            if stopping:
                raise Stopped(f"stopped after step {step + 1} of {steps} "
                              f"({signal.Signals(signals[0]).name if signals else 'sick: ' + str(log['warnings'])}); "
                              f"{run / 'state.pt'} has it all: go on with the same command and --resume",
                              128 + signals[0] if signals else 1)


def write_step(run, log, samples, args):
    """Add a step to the run's logs."""
    append(run / "log.jsonl", [log])
    if args.samples_every and log["step"] % args.samples_every == 0:
        append(run / "samples.jsonl", samples)


def start_files(run, config, start):
    """The run folder as it should be before step `start`."""
    run.mkdir(parents=True, exist_ok=True)
    with writing(run / "config.json"):
        write_json(run / "config.json", config)
    for name in ("log.jsonl", "samples.jsonl"):
        keep_lines_before(run / name, start)


def train(args):
    """The stage: args of `parse_args` in, a run folder out. Returns the policy, None if the run was finished before.

    ValueError or OSError for input that does not fit and for disks that are full; FloatingPointError for numbers that
    are not finite; Stopped after a signal.
    """
    import_trackers(args)
    scorer, data, val = open_data(args)
    with only_writer(Path(args.run)):
        return train_alone(scorer, data, val, args)


def train_alone(scorer, data, val, args):
    """`train` in a run folder that no other process writes to."""
    run, config, first = Path(args.run), describe_run(args, data), place()[0] == 0
    found = check_run(run, config, args.resume)  # before the policy: a refusal should not wait for gigabytes
    if found == "finished":
        if first:
            print(f"{run} is already finished: its adapter is in {run / 'adapter'}")
            os.utime(run / "adapter" / "adapter_model.safetensors")  # make asked because data/ is newer: up to date
        return None
    policy = open_policy(args)
    # No weight decay: it would pull B A towards the base policy a second time, beside the KL term.
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=args.lr, weight_decay=0.0)
    start = load_state(run / "state.pt", policy, optimizer) if found == "state" else 0
    steps, recent = steps_of(args, len(data.queries)), last_lines(run / "log.jsonl", start)
    # Also the moment at which all have read the run folder, and process 0 may write there.
    seen = gather([start, config["manifest_sha256"]])
    if any(one != seen[0] for one in seen):
        raise ValueError(f"the processes found different files (steps done, manifest): {seen}; --run and --data must "
                         "be the same folders for all")
    lines, forecast = check_memory(policy, scorer, data, args)
    if first:
        start_files(run, config, start)
        print(f"r-GRPO: {len(data.queries)} training queries, {steps} steps of {args.queries} queries x {args.group} "
              f"rollouts, {sum(p.numel() for p in policy.lora_parameters()):,} LoRA weights, on {args.device}"
              + (f" and {place()[1] - 1} more" if place()[1] > 1 else "")
              + (f", going on from step {start}" if start else ""))
        print("\n".join(lines))
    run_steps(start, steps, recent, forecast, policy, optimizer, scorer, data, val, args)
    if first:
        with writing(run / "adapter"):
            policy.save_adapter(str(run / "adapter"))
    return policy


def main(argv=None):
    args = parse_args(argv)
    # A pure function of the seed, on one machine: no kernel that adds up in an order of its own.
    torch.use_deterministic_algorithms(args.device == "cpu")
    code = 0
    try:
        join_processes(args)
        train(args)
    except Stopped as stopped:  # all processes after the same step, so they can also leave together
        message, code = stopped.args
        if place()[0] == 0:
            print(f"train.py: {message}", file=sys.stderr)
    # One process's end is everybody's: torchrun stops the others, who would wait for its part. OSError: files that are
    # missing or cannot be written, and other processes that are lost (ConnectionError).
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train.py: {error}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(f"train.py: {error}\nWhat helps: --micro 1 and --checkpointing (--resume may add the latter), "
                         "or, in a new run, a smaller --max-pixels or fewer --queries") from error
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
