"""The r-GRPO loop (paper Sec. 3.4, App. B): sample, score, reward, advantage, step, log, save.

    python train.py                       # the embedded world, from data/world and the stand-ins, to runs/world
    python train.py --preset paper --data data/evqa --policy Qwen/Qwen2.5-VL-3B-Instruct --scorer /models/EVA-CLIP-8B --run runs/evqa

A step takes a few queries. The policy writes a decision-balanced group of answers to each, the frozen scorer re-ranks the query's pool
with every crop, the reward is the improvement over the full image, and the policy is moved towards the better answers. Only LoRA
weights learn. Nothing here reads a truth box, and labels are read by the reward alone.

Files of a run: config.json (arguments, data), log.jsonl (a line a step), samples.jsonl (what was said and what it earned), state.pt
(to --resume), adapter/ (the result, in peft's format; written last, so a run that has it is whole).
"""

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rgrpo
from policy import load_policy
from rewards import metrics, reward, summary
from scorer import crop, load_data, load_scorer, replacing, scores, write_json

PRESETS = {
    # App. B. "Batch size 4 per device" is read as 4 queries of N rollouts. The weight of the KL term is not printed there: the authors'
    # release has 0.1 of TRL's estimator, but compares with a policy that is only 8 ranks away, so a small one is enough.
    "paper": dict(queries=4, group=8, epochs=2.0, steps=0, lr=5e-5, warmup=50, dropout=0.1, targets="all", beta=0.01, micro=1, eval_every=200, save_every=100),
    # The stand-in is a thousand times smaller, so its LoRA takes a larger step; its vision tower stays frozen, which lets a query's
    # image features be computed once; without dropout and KL (a second forward each step) it learns as well and faster.
    "mini": dict(queries=16, group=8, epochs=0.0, steps=200, lr=1e-3, warmup=10, dropout=0.0, targets="language", beta=0.0, micro=16, eval_every=50, save_every=25),
}


def parse_args(argv=None):
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="mini", help="defaults of all that follows: paper = App. B, mini = the embedded world")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first])
    files = parser.add_argument_group("files")
    files.add_argument("--data", default="data/world", help="folder that prepare.py wrote")
    files.add_argument("--run", default="runs/world", help="folder to write")
    files.add_argument("--resume", action="store_true", help="go on from the run's state.pt; without one, start")
    models = parser.add_argument_group("models")
    models.add_argument("--policy", default="mini/policy", help="folder or Hugging Face id of a Qwen2.5-VL")
    models.add_argument("--scorer", default="mini/scorer", help="folder of the scorer that prepared the data")
    models.add_argument("--system-prompt", metavar="FILE", help="text file to use instead of the policy's own system prompt (Table 10)")
    models.add_argument("--max-pixels", type=int, help="area in pixels that an image is shrunk to for the policy")
    models.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ...")
    add_method_flags(parser)
    add_length_flags(parser)
    parser.set_defaults(**PRESETS[first.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    for name in ("queries", "group", "micro", "inner_steps", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.steps < 1 and args.epochs <= 0:
        parser.error("give --steps or --epochs")
    return args


def add_method_flags(parser):
    method = parser.add_argument_group("r-GRPO (Sec. 3.4; rgrpo.py explains the readings)")
    method.add_argument("--balance", choices=("force", "resample", "none"), default="force", help="how both decisions come into a group")
    method.add_argument("--advantage", choices=("factored", "group", "conditional", "balanced"), default="factored", help="what a token is judged by")
    method.add_argument("--decision-weight", choices=("uniform", "pi"), default="uniform", help="weight of the two branches in the decision's advantage")
    method.add_argument("--std", action=argparse.BooleanOptionalAction, default=True, help="divide advantages by the group's deviation (Eq. 9)")
    method.add_argument("--decode", choices=("grammar", "free"), default="grammar", help="only decision and digits are choices | any text, then parsed")
    method.add_argument("--temperature", type=float, default=1.0, help="of sampling, and of the log-probabilities that are trained")
    method.add_argument("--clip", type=float, default=0.2, help="of the probability ratio")
    method.add_argument("--beta", type=float, help="weight of the KL term; 0 saves the reference policy's forward")
    method.add_argument("--norm", choices=("token", "sequence"), default="token", help="the loss is a mean over tokens or over rollouts")
    method.add_argument("--reward", choices=("delta", "absolute"), default="delta", help="Eq. 7-8 | .5 MRR + .5 NDCG, the release's option")
    method.add_argument("--reward-weights", type=float, nargs=4, default=[0.2, 0.2, 0.2, 0.4], metavar="W",
                        help="of dMRR, dNDCG, dRank and dMargin in Eq. 7")
    method.add_argument("--eta", type=float, default=1.0, help="what MALFORMED costs (Eq. 7)")
    lora = parser.add_argument_group("LoRA (App. B)")
    lora.add_argument("--rank", type=int, default=8, help="r")
    lora.add_argument("--alpha", type=float, default=32, help="scale: the update is alpha / r times B A")
    lora.add_argument("--dropout", type=float, help="before A, in the update's forward only")
    lora.add_argument("--targets", choices=("all", "language"), help="all linear layers | those of the language model")


def add_length_flags(parser):
    size = parser.add_argument_group("sizes and schedule (App. B)")
    size.add_argument("--queries", type=int, help="queries a step")
    size.add_argument("--group", type=int, help="N, rollouts a query")
    size.add_argument("--micro", type=int, help="queries of one forward and backward pass; memory, not results")
    size.add_argument("--epochs", type=float, help="passes over the training queries, when --steps is 0")
    size.add_argument("--steps", type=int, help="steps; overrides --epochs")
    size.add_argument("--inner-steps", type=int, default=1, help="optimiser steps on the same rollouts")
    size.add_argument("--max-new-tokens", type=int, default=256, help="limit of a freely decoded answer")
    size.add_argument("--lr", type=float, help="peak learning rate; cosine to 0 after the warm-up")
    size.add_argument("--warmup", type=int, help="steps of linear warm-up")
    size.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    size.add_argument("--seed", type=int, default=0, help="LoRA, order of the data and every draw are functions of it")
    logs = parser.add_argument_group("looking")
    logs.add_argument("--eval-every", type=int, help="steps between two evaluations on val, 0 = never")
    logs.add_argument("--val-queries", type=int, default=200, help="val queries of an evaluation")
    logs.add_argument("--save-every", type=int, help="steps between two state.pt")
    logs.add_argument("--samples-every", type=int, default=10, help="steps between two groups in samples.jsonl")


# ---------------------------------------------------------------------------------------------- one step


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to `peak`, then half a cosine to 0 at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def queries_of_step(step, count, queries, seed):
    """Row numbers of a step: consecutive pieces of one random order per epoch, so every query comes once an epoch."""
    rows = []
    for position in range(step * queries, (step + 1) * queries):
        epoch, place = divmod(position, count)
        rows.append(int(np.random.default_rng([seed, epoch]).permutation(count)[place]))
    return rows


def sample_groups(policy, prompts, seeds, args):
    """A group of completions a query and how many rollouts each stands for: B lists of Completion, B lists of int.

    Under balance "force" with a grammar all N/2 FULL rollouts of a query are one and the same answer: it is written once and
    counts N/2 times. "resample" draws freely first and then again what `rgrpo.plan` asks for.
    """
    def roll(plans, salt=0):
        salted = [(*seed, salt) for seed in seeds]
        return policy.rollout(prompts, plans, args.decode, args.temperature, seeds=salted, max_new_tokens=args.max_new_tokens)

    plan = rgrpo.plan(args.group, args.balance)
    if args.balance == "force" and args.decode == "grammar":
        full = plan.count("FULL")
        short = ["FULL"] + ["REGION"] * (args.group - full)
        return roll([short] * len(prompts)), [[full] + [1] * (args.group - full)] * len(prompts)
    groups = roll([plan] * len(prompts))
    if args.balance == "resample":
        again = [rgrpo.plan(args.group, args.balance, [c.action.decision for c in group]) for group in groups]
        drawn = roll([[entry or "FULL" for entry in plan] for plan in again], salt=1)      # unused entries are the cheap answer
        groups = [[new if entry else old for entry, old, new in zip(*columns)] for columns in zip(again, groups, drawn)]
    return groups, [[1] * args.group] * len(prompts)


def score_views(data, scorer, rows, images, actions):
    """Scores of every action's view: B arrays float32 [n, K]; rows of FULL and MALFORMED are the full image's (Eq. 1-4).

    Only crops are encoded, in one batch, identical boxes once: candidates and full images were embedded by prepare.py.
    """
    boxes = list(dict.fromkeys((b, a.box) for b, group in enumerate(actions) for a in group if a.decision == "REGION"))
    features = dict(zip(boxes, scorer.image_features([crop(images[b], box) for b, box in boxes])))      # (b, box) -> [D]
    found = []
    for b, (row, group) in enumerate(zip(rows, actions)):
        full = np.asarray(data.full[row], dtype=np.float32)                                             # [D]
        views = np.stack([features.get((b, a.box), full) for a in group])                               # [n, D]
        found.append(scores(views, data.candidates(row)))                                               # [n, K]
    return found


def reward_groups(data, scorer, rows, images, groups, args):
    """Reward and its components of every completion: B dicts of arrays [n] (rewards.reward)."""
    actions = [[c.action for c in group] for group in groups]
    found = []
    for row, group, seen in zip(rows, actions, score_views(data, scorer, rows, images, actions)):
        full = scores(np.asarray(data.full[row], dtype=np.float32), data.candidates(row))               # [K]
        found.append(reward([a.decision for a in group], seen, full, np.array(data.queries[row].labels),
                            args.reward_weights, args.eta, args.reward))
    return found


def judge(groups, counts, rewards, args):
    """Advantages of decision and box tokens, float32 [B, n] each, and the rollout weights [B, n] (0 fills up short rows)."""
    n = max(map(len, groups))
    total, weight = torch.zeros(len(groups), n), torch.zeros(len(groups), n)                            # (B, n)
    decision = torch.zeros(len(groups), n, dtype=torch.long)                                            # (B, n)
    for b, group in enumerate(groups):
        total[b, :len(group)] = torch.from_numpy(rewards[b]["total"])
        weight[b, :len(group)] = torch.tensor(counts[b], dtype=torch.float32)
        decision[b, :len(group)] = torch.tensor([rgrpo.CODES[c.action.decision] for c in group])
    p_region = None
    if args.decision_weight == "pi":
        p_region = torch.tensor([group[0].action.p_region for group in groups])                         # (B,)
    pair = rgrpo.advantages(total, decision, args.advantage, args.decision_weight, p_region, weight, args.std)
    return *pair, weight


def update(policy, optimizer, prompts, groups, advantages, args):
    """Gradient steps on one batch of groups; returns the numbers to log.

    advantages: (decision [B, n], box [B, n], weight [B, n]) of `judge`. Groups without any advantage cost no pass, unless a KL
    term pulls on them; they stay in the divisor, so leaving them out changes nothing but time.
    """
    decision, box, weight = advantages
    idle = rgrpo.zero_advantage(decision, box)                                                          # (B,)
    work = [b for b in range(len(groups)) if args.beta or not idle[b]]
    count = {"token": lambda c: sum(c.free), "sequence": lambda c: any(c.free)}[args.norm]
    total = sum(float(weight[b, n]) * count(c) for b, group in enumerate(groups) for n, c in enumerate(group))
    old, logs = {}, []
    for inner in range(args.inner_steps):
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(work), args.micro):
            part = work[start:start + args.micro]
            logs.append(backward(policy, part, prompts, groups, (decision, box, weight), total, old, args))
        if work:
            norm = torch.nn.utils.clip_grad_norm_(policy.lora_parameters(), args.max_grad_norm)
            logs[-1]["grad_norm"] = norm.item()
            optimizer.step()
    mean = {key: float(np.mean([log[key] for log in logs if key in log])) for key in (logs[-1] if logs else {})}
    return {**mean, "zero_advantage": float(idle.float().mean())}


def backward(policy, part, prompts, groups, advantages, total, old, args):
    """Loss and gradients of the queries `part`. old: {first query of the part: log-probs of the first inner step}."""
    chosen = [prompts[b] for b in part], [groups[b] for b in part]
    flat = [(b, n, c) for b in part for n, c in enumerate(groups[b])]                                   # M completions
    policy.train()                                                                                      # LoRA dropout, if any
    out = policy.log_probs(*chosen, temperature=args.temperature)
    logp, mask = out["logp"], out["mask"]                                                               # (M, T) each
    decision, box, weight = (torch.stack([table[b, n] for b, n, _ in flat]).to(logp.device) for table in advantages)   # (M,)
    token = torch.where(out["decision"], decision[:, None], box[:, None])                               # (M, T)
    reference = None
    if args.beta:
        policy.eval()
        with torch.no_grad(), policy.adapter(False):
            reference = policy.log_probs(*chosen, temperature=args.temperature)["logp"]                 # (M, T)
    # The first inner step's own values, detached: a ratio of exactly 1, also with dropout.
    before = old.setdefault(part[0], logp.detach())
    try:
        value, numbers = rgrpo.loss(logp, before, token, mask, args.clip, reference, args.beta, args.norm, weight, total)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; the rollouts belong to rows {sorted({b for b, _, _ in flat})} of this step") from error
    policy.train()                                     # checkpointing runs the forward again in the backward pass
    value.backward()
    policy.eval()
    sampled = torch.zeros_like(logp)                                                                    # (M, T)
    for m, (_, _, c) in enumerate(flat):
        sampled[m, :len(c.ids)] = torch.tensor(c.log_probs)
    numbers["logp_gap"] = ((before - sampled) * mask).abs().max().item()                                # sampling against scoring
    numbers["decision_entropy"] = (out["entropy"] * out["decision"]).sum().item() / max(1, out["decision"].sum().item())
    return numbers


# ---------------------------------------------------------------------------------------------- looking


def describe(groups, counts, rewards):
    """What a step's rollouts were like: means over rollouts, each counted as often as it stands for."""
    flat = [(c, w, {k: v[n] for k, v in r.items()}) for g, ws, r in zip(groups, counts, rewards) for n, (c, w) in enumerate(zip(g, ws))]
    weight = np.array([w for _, w, _ in flat], dtype=float)
    kinds = np.array([c.action.decision for c, _, _ in flat])
    total = np.array([r["total"] for _, _, r in flat])
    log = {"reward": float((weight * total).sum() / weight.sum())}
    for name in ("FULL", "REGION", "MALFORMED"):
        inside = kinds == name
        log[f"{name.lower()}_rate"] = float(weight[inside].sum() / weight.sum())
        if name != "MALFORMED" and inside.any():
            log[f"reward_{name.lower()}"] = float((weight * total)[inside].sum() / weight[inside].sum())
    for name in ("d_mrr", "d_ndcg", "d_rank", "d_margin"):
        if (kinds == "REGION").any():
            log[name] = float(np.mean([r[name] for c, _, r in flat if c.action.decision == "REGION"]))
    p = [g[0].action.p_region for g in groups if g[0].action.p_region is not None]
    return {**log, "p_region": float(np.mean(p)) if p else None}       # the crop rate that the policy itself would have


def validate(policy, scorer, data, limit):
    """Greedy answers on the first `limit` val queries: MRR, CondR@1 and the crop rate."""
    rows = list(range(min(limit, len(data.queries))))
    ranked = []
    crops = 0
    for start in range(0, len(rows), 32):
        part = rows[start:start + 32]
        images = [data.open_image(i) for i in part]
        actions = policy.act(images, [data.queries[i].question for i in part], batch_size=32)
        crops += sum(a.decision == "REGION" for a in actions)
        ranked += [s[0] for s in score_views(data, scorer, part, images, [[a] for a in actions])]
    means = summary(metrics(np.stack(ranked), np.array([data.queries[i].labels for i in rows])))
    return {"val_mrr": means["MRR"], "val_cond_r1": means["CondR@1"], "val_crop_rate": crops / len(rows)}


def sample_lines(step, data, rows, groups, rewards, advantages):
    """Lines for samples.jsonl: the first query of a step with all that was said, earned and concluded."""
    query = data.queries[rows[0]]
    for n, c in enumerate(groups[0]):
        components = {k: round(float(v[n]), 4) for k, v in rewards[0].items()}
        yield {"step": step, "query_id": query.query_id, "question": query.question, "text": c.action.text, "decision": c.action.decision,
               "box": c.action.box, "p_region": c.action.p_region, "forced": c.forced_decision, "reward": components,
               "decision_advantage": round(float(advantages[0][0, n]), 4), "box_advantage": round(float(advantages[1][0, n]), 4)}


def readable(log, steps, left):
    """One line a step for people."""
    def show(key, form="+.3f"):
        return format(log[key], form) if log.get(key) is not None else "-"
    return (f"step {log['step'] + 1}/{steps} reward {show('reward')} (FULL {show('reward_full')} REGION {show('reward_region')}) "
            f"p(REGION) {show('p_region', '.2f')} malformed {show('malformed_rate', '.2f')} kl {show('kl', '.4f')} grad {show('grad_norm', '.2f')} "
            f"lr {log['lr']:.1e} {log['seconds']:.1f} s, {left / 60:.1f} min left"
            + (f" | val MRR {log['val_mrr']:.3f} CondR@1 {show('val_cond_r1', '.3f')} crop rate {log['val_crop_rate']:.2f}" if "val_mrr" in log else ""))


# ---------------------------------------------------------------------------------------------- the run's files


def open_run(args, data):
    """Make the run folder and its config.json, or check that they are this run's. Returns True when there is a state to go on from."""
    run = Path(args.run)
    with open(os.path.join(args.data, "manifest.json"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    skip = ("resume", "device", "run", "data")                     # what may differ when a run is taken up again
    config = {"args": {k: v for k, v in vars(args).items() if k not in skip}, "manifest_sha256": digest, "pools": data.identity,
              "policy": args.policy, "scorer": args.scorer, "data": args.data}
    path = run / "config.json"
    state = (run / "state.pt").exists()
    if (state or (run / "adapter").exists()) and not args.resume:
        raise ValueError(f"{run} holds a run already: go on with --resume, or choose another --run")
    if state and path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["pools"] != data.identity:
            raise ValueError(f"{run} was trained on other pools ({old['data']}, {old['pools']}) than {args.data} ({data.identity}): choose another --run")
        changed = sorted(k for k in config["args"] if old["args"].get(k) != config["args"][k])
        if changed:
            raise ValueError(f"{run}: --resume with other values of {', '.join(changed)} than it was started with; see {path}")
    run.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
    return state and args.resume


def save_state(path, step, policy, optimizer):
    """All that --resume needs: the number of steps done, LoRA, optimiser. Draws are functions of (seed, step): no generator state."""
    with replacing(path) as temporary:
        torch.save({"step": step, "lora": [p.detach() for p in policy.lora_parameters()], "optimizer": optimizer.state_dict()}, temporary)


def load_state(path, policy, optimizer):
    """Restore save_state's file; returns the number of steps done."""
    state = torch.load(path, map_location=policy.device, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(policy.lora_parameters(), state["lora"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def keep_lines_before(path, step):
    """Cut a log back to the steps before `step`: what a killed run wrote after its last state is written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.endswith("}"):
            break                                                  # cut off while it was written
        if json.loads(line)["step"] < step:
            kept.append(line)
    with replacing(str(path)) as temporary:
        Path(temporary).write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def append(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def load(args):
    """Scorer, train data, val data (None without evaluation) and policy with fresh LoRA."""
    scorer = load_scorer(args.scorer, args.device)
    data = load_data(args.data, "train", scorer.identity)
    if not data.queries:
        raise ValueError(f"{args.data}: no training query has its positive in the pool; see the counts in manifest.json")
    val = load_data(args.data, "val", scorer.identity) if args.eval_every else None
    prompt = Path(args.system_prompt).read_text(encoding="utf-8") if args.system_prompt else None
    policy = load_policy(args.policy, device=args.device, max_pixels=args.max_pixels, system_prompt=prompt)
    policy.add_lora(args.rank, args.alpha, args.dropout, args.targets, args.seed)
    return scorer, data, val, policy


def train_step(step, steps, policy, optimizer, scorer, data, args):
    """One step of r-GRPO. Returns (numbers to log, lines for samples.jsonl)."""
    torch.manual_seed(args.seed * 1_000_003 + step)                # dropout; a resumed run draws what an unbroken one draws
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
    rows = queries_of_step(step, len(data.queries), args.queries, args.seed)
    images = [data.open_image(row) for row in rows]
    prompts = policy.prompts(images, [data.queries[row].question for row in rows])
    groups, counts = sample_groups(policy, prompts, [(args.seed, step, row) for row in rows], args)
    rewards = reward_groups(data, scorer, rows, images, groups, args)
    advantages = judge(groups, counts, rewards, args)
    numbers = update(policy, optimizer, prompts, groups, advantages, args)
    log = {"step": step, **describe(groups, counts, rewards), **numbers, "lr": optimizer.param_groups[0]["lr"]}
    return log, list(sample_lines(step, data, rows, groups, rewards, advantages))


def train(args):
    """The loop. Returns the policy."""
    scorer, data, val, policy = load(args)
    run = Path(args.run)
    resumed = open_run(args, data)
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=args.lr, weight_decay=0.0)
    start = load_state(run / "state.pt", policy, optimizer) if resumed else 0
    steps = args.steps or math.ceil(args.epochs * len(data.queries) / args.queries)
    for name in ("log.jsonl", "samples.jsonl"):
        keep_lines_before(run / name, start)
    print(f"r-GRPO: {len(data.queries)} training queries, {steps} steps of {args.queries} queries x {args.group} rollouts, "
          f"{sum(p.numel() for p in policy.lora_parameters()):,} LoRA weights, on {args.device}"
          + (f", going on from step {start}" if resumed else ""))
    began = time.perf_counter()
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="train", unit="step", disable=None):
        clock = time.perf_counter()
        log, samples = train_step(step, steps, policy, optimizer, scorer, data, args)
        log["seconds"] = time.perf_counter() - clock
        if args.eval_every and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
            log |= validate(policy, scorer, val, args.val_queries)
        append(run / "log.jsonl", [log])
        append(run / "samples.jsonl", samples if step % args.samples_every == 0 else [])
        tqdm.write(readable(log, steps, (time.perf_counter() - began) / (step + 1 - start) * (steps - step - 1)))
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_state(str(run / "state.pt"), step + 1, policy, optimizer)
    policy.save_adapter(str(run / "adapter"))
    return policy


def main(argv=None):
    args = parse_args(argv)
    # A pure function of the seed, on one machine: no kernel that adds up in an order of its own.
    torch.use_deterministic_algorithms(args.device == "cpu")
    try:
        train(args)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"train.py: {error}") from error


if __name__ == "__main__":
    main()
