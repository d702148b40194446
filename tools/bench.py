"""Time and peak memory of an r-GRPO step and of inference (the paper's Table 9), on random weights at its shape.

    python -m tools.bench                                       # the stand-in's size; on a CPU see --rows
    python -m tools.bench --model mid --dtype bfloat16 --queries 1 --repeat 1                   # .3 B on a CPU
    python -m tools.bench --model 3b --device cuda              # Qwen2.5-VL-3B and EVA-CLIP-8B, nothing downloaded

Time and memory do not depend on what the weights are. The shape is the paper's: an image of about 1,000 visual tokens,
the prompt of Table 10, N = 8 rollouts of 4 queries, answers as long as the template. Measured:
* rollout, update: ours (prompt and image once a query) against the repeated way (every completion a row of its own, the
  image through the tower for each, logits of every token), in transformers and PyTorch as they are (`as_published`);
* reward: crops only, equal boxes once; and a whole step. tools/bench_trl.py has the release's and TRL's beside them;
* encode: the scorer's image tower against open_clip's own ViT of the same shape, in turns, on pixels that are ready;
* act: inference with grammar and free decoding of answers of the same length, one query at a time and in batches; and
  of FULL, which is the prefill alone, so that the time of writing can be told from that of reading.
Ours follows the paper's preset of train.py: half of a group is FULL, which ends at the decision. The repeated rollouts
know no grammar and write N whole answers; that is part of what is compared, though small beside the prompt.

Every case runs in a process of its own; tools/meter.py says how memory is taken and what a floor is. Letters as in
policy.py.
"""

import argparse
import gc
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

import rgrpo
import train
from policy import FULL_TEXT, REGION_TEXT, SYSTEM_PROMPT, Action, Draft, Policy, suit_cuda
from scorer import EvaClip, EvaClipConfig, Preprocess, Scorer, write_json
from tools.meter import Meter, describe, floor_seconds, measure_peaks, start_case
from tools.rows import at_least
from tools.vocabulary import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
K = 20  # candidates of a pool (Sec. 4.1)
LABELS = np.eye(1, K, K // 2, dtype=int)[0]  # [K], one positive
COMPARED = {  # ratio: (numerator, denominator), each "case part"
    "rollout": ("rollout_repeated rollout", "rollout rollout"),
    "update": ("update_repeated update", "update update"),
    "reward": ("reward_release reward", "reward reward"),
    "step against TRL": ("step_trl step", "step step"),
}

# Sizes of Qwen2.5-VL: (language, vision). "mini" is read from mini/policy. 3b: the published config.json.
QWEN = {
    "mid": (dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=16, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=32768,
                 rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])),
            dict(depth=12, hidden_size=512, intermediate_size=1368, num_heads=8, out_hidden_size=896,
                 fullatt_block_indexes=[2, 5, 8, 11])),
    "3b": (dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                num_key_value_heads=2, vocab_size=151936,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
           dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048,
                fullatt_block_indexes=[7, 15, 23, 31])),
}
# The scorer that goes with each. mid: small on purpose, or the release's hundreds of encodings would take the hour.
EVA = {
    "mini": dict(embed_dim=128, image_size=112, width=128, layers=4, head_width=64, mlp_ratio=4.0, vocab=514,
                 text_width=64, text_heads=1, text_layers=1),
    "mid": dict(embed_dim=256, width=192, layers=12, head_width=64, mlp_ratio=4.0, vocab=514, text_width=64,
                text_heads=1, text_layers=1),
    "3b": {},
}


def parse_args(argv=None, cases=None, default=None, doc=__doc__, out="bench/{model}-{device}.json"):
    """cases: names that --cases may give, `default` those it has by itself. out: the JSON file's name."""
    cases = list(cases or CASES)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", choices=("mini", "mid", "3b"), default="mini",
                      help="mini/policy's sizes | .3 B | Qwen2.5-VL-3B and EVA-CLIP-8B (needs a GPU)")
    what.add_argument("--cases", nargs="+", choices=cases, default=default or cases, metavar="CASE",
                      help=f"of {', '.join(cases)}; default {', '.join(default or ['all'])}")
    what.add_argument("--case", choices=(*cases, "machine"), help="run this one here, print JSON (used by the program)")
    shape = parser.add_argument_group("shape (Sec. 4.1, App. B)")
    shape.add_argument("--visual-tokens", type=at_least(4), default=1000, help="image tokens of a query, about")
    shape.add_argument("--queries", type=at_least(1), default=4, help="queries of a step")
    shape.add_argument("--group", type=at_least(2), default=8, help="N, rollouts of a query")
    shape.add_argument("--targets", choices=("all", "language"), default="all",
                       help="LoRA on all linear layers (App. B) | on the language model's: image features are kept")
    shape.add_argument("--dropout", type=float, default=0.1, help="of LoRA, in the update")
    shape.add_argument("--hold", type=float, default=1.0, help="as in train.py; ours alone")
    shape.add_argument("--scorer-batch", type=at_least(1), default=64, help="images of a pass in the case encode")
    shape.add_argument("--batches", type=at_least(1), nargs="+", default=[1, 2, 4, 8],
                       help="queries of an inference batch")
    machine = parser.add_argument_group("machine")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine.add_argument("--device", default=device, help="cpu, cuda, cuda:1 ...")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    # train.py takes eager on a CPU, where images are small; at 1,000 visual tokens that is 3.5 times slower.
    machine.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="eager keeps T x T tables")
    machine.add_argument("--checkpointing", action="store_true", help="activation checkpointing in every update")
    machine.add_argument("--micro-tokens", type=at_least(1), default=8192, help="tokens of one backward pass of ours")
    machine.add_argument("--rows", type=at_least(1), help="completions of one backward pass in the repeated ways; "
                         "default the group, halved on CUDA until it fits; on a CPU give what memory holds")
    machine.add_argument("--repeat", type=at_least(1), default=3, help="timed repeats of a case; medians are compared")
    machine.add_argument("--warmup", type=at_least(0), default=1,
                         help="repeats before them that are not timed; the first counts operations, so 0 has no floors")
    machine.add_argument("--out", help=f"JSON file to write; default {out}")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.out = args.out or out.format(model=args.model, device=args.device.replace(":", ""))
    args.rows = min(args.rows or args.group, args.group)
    if args.group % args.rows:
        parser.error(f"--rows must divide --group {args.group}")
    return args


# ---------------------------------------------------------------------------------------------- models and inputs


def build_processor(model, visual_tokens):
    """mini/policy's processor for images of `visual_tokens` tokens, with a tokenizer that knows the prompt's words.

    The 3B gets Qwen's own (tools/vocabulary.py). For smaller tables one is trained on the very text, with its rules
    kept, digits are tokens of their own: the stand-in's would spell Table 10 in 1,000 tokens instead of 400.
    """
    old = AutoProcessor.from_pretrained(ROOT / "mini" / "policy")
    words = [SYSTEM_PROMPT, FULL_TEXT, REGION_TEXT % (1, 2, 3, 4), "system user assistant", question(1)]
    tokenizer = load_tokenizer() if model == "3b" else old.tokenizer.train_new_from_iterator(
        words * 20, vocab_size=2000, show_progress=False)
    old.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": visual_tokens * 28 * 28}
    return Qwen2_5_VLProcessor(old.image_processor, tokenizer, old.video_processor, chat_template=old.chat_template)


def build_config(model, tokenizer):
    """Qwen2_5_VLConfig of a `--model`, with this tokenizer's special tokens."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    special = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), ids))
    if model == "mini":
        config = Qwen2_5_VLConfig.from_pretrained(ROOT / "mini" / "policy")
        text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    else:
        text, vision = map(dict, QWEN[model])
    # Rows of the table that no token uses cost what they cost in the real model.
    text["vocab_size"] = max(text["vocab_size"], len(tokenizer))
    text |= dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                 max_position_embeddings=32768, tie_word_embeddings=True)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def build_policy(args, lora=True):
    """A Policy with random weights, LoRA as in App. B when `lora`, in eval mode."""
    torch.manual_seed(0)
    processor = build_processor(args.model, args.visual_tokens)
    config = build_config(args.model, processor.tokenizer)
    with torch.device(args.device):  # made where they are needed: 3 B would take minutes on a CPU
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, args.dtype), attn_implementation=args.attention)
    suit_cuda(model)
    policy = Policy(model.requires_grad_(False).eval(), processor, f"random {args.model}", SYSTEM_PROMPT)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        policy.add_lora(8, 32, args.dropout, args.targets)
    return policy


def as_published(policy):
    """What `suit_cuda` changed is changed back: those that are compared with ours have transformers' vision
    tower and norms and PyTorch's own choice of an attention kernel. (A case has a process of its own.)"""
    torch.backends.cuda.enable_cudnn_sdp(True)
    for block in policy.model.model.visual.blocks:
        block.attn.__class__ = Qwen2_5_VLVisionAttention
    for module in policy.model.modules():
        vars(module).pop("forward", None)


def build_random(args, build):
    """The model that build() makes, random. Weights are drawn in place: 8 B of them in float32 first would be 32 GB."""
    with torch.device("meta"):
        model = build()
    model = model.to(getattr(torch, args.dtype)).to_empty(device=args.device).requires_grad_(False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return model


def build_scorer(args):
    """A Scorer, as load_scorer gives one, around a random EvaClip."""
    scorer = Scorer("random", args.device, args.dtype)
    scorer.model = build_random(args, lambda: EvaClip(EvaClipConfig(**EVA[args.model]), ("visual",)))
    scorer.dim, scorer.preprocess = scorer.model.config.embed_dim, Preprocess(scorer.model.config.image_size)
    return scorer


def question(number):
    """Questions of different length, so that prompts are too."""
    return " ".join(["Where does this beetle live?"] + ["Say it"] * number)


def noise(count, width, height, seed=0):
    """PIL images of noise: nothing in the models looks at what is in them."""
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def build_inputs(args, count):
    """`count` images of about --visual-tokens tokens (a token is 28 x 28 pixels) and as many questions."""
    rows = math.isqrt(args.visual_tokens)
    return noise(count, 28 * (args.visual_tokens // rows), 28 * rows), [question(i % 4) for i in range(count)]


def answer_length(policy, args):
    """Tokens of a REGION answer with numbers as long as the image's sides, end of turn included."""
    side = 28 * math.isqrt(args.visual_tokens)
    return len(policy.grammar.region_ids((side // 2, side // 2, side - 1, side - 1)))


# -------------------------------------------------------------------------------------------- ours: train.py's own step


def settings(args):
    """train.py's arguments for the paper's preset, but for the shape and the KL."""
    names = ("queries", "group", "hold", "micro_tokens")
    shape = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    return train.parse_args(["--preset", "paper", "--beta", "0", *shape])


def roll(policy, prompts, args, seed=0):
    """-> B lists of Completion, B lists of how many rollouts each stands for: FULL is one answer, written once."""
    return train.sample_groups(policy, prompts, [(seed, b) for b in range(len(prompts))], settings(args))


def write_answers(policy, prompts, args):
    """The same groups of random answers without the model, so that the update is measured by itself."""
    full, grammar, groups = rgrpo.plan(args.group, "force").count("FULL"), policy.grammar, []
    for b, prompt in enumerate(prompts):
        group = []
        for n, entry in enumerate(["FULL"] + ["REGION"] * (args.group - full)):
            draft, draw = Draft(b, prompt, entry), np.random.default_rng([b, n])
            draft.begin(draft.by_grammar(grammar))
            draft.choose(draft.given[0], 0.0)
            while draft.allowed:
                draft.choose(int(draw.choice(draft.allowed)), 0.0)
            group.append(draft.finish())
        groups.append(group)
    return groups, [[full] + [1] * (args.group - full)] * len(prompts)


def build_pools(count, dim):
    """What prepare.py would have embedded, random: full images, candidates and labels of `count` queries."""
    features = np.random.default_rng(0).normal(size=(count, 1 + K, dim)).astype(np.float32)             # [B, 1 + K, D]
    return SimpleNamespace(full=features[:, 0], candidates=lambda b: features[b, 1:], labels=[LABELS] * count)


def earn(data, scorer, images, actions, args):
    """Rewards by our way (Eq. 5-8), each box encoded once: B dicts of arrays [n], number of images encoded."""
    rows = range(len(images))
    views = train.score_views(data, scorer, rows, images, actions)
    boxes = {(b, action.box) for b, group in enumerate(actions) for action in group if action.box}
    return train.reward_groups(data, rows, actions, views, settings(args)), len(boxes)


def judge(groups, counts, rewards, args):
    """Advantages of decision and box, and weights: [B, n] each."""
    return train.judge([[c.action for c in group] for group in groups], counts, rewards, settings(args))


def update(policy, optimizer, prompts, groups, advantages, args):
    """One optimiser step."""
    train.update(policy, optimizer, prompts, groups, advantages, settings(args), list(range(len(prompts))))


# ---------------------------------------------------------------------------------------------- the repeated way


def repeated_update(policy, optimizer, pieces):
    """The same but for --hold, from `repeated_log_probs`. pieces: one backward pass each, (prompts, groups,
    (decision [M], box [M], weight [M]))."""
    optimizer.zero_grad(set_to_none=True)
    total = sum(float(w) * sum(c.free) for _, groups, (*_, weight) in pieces
                for c, w in zip((c for group in groups for c in group), weight))
    policy.train()
    for prompts, groups, advantages in pieces:
        out = repeated_log_probs(policy, prompts, groups)
        decision, box, weight = (a.to(out["logp"].device) for a in advantages)                          # [M] each
        token = torch.where(out["decision"], decision[:, None], box[:, None])                           # [M, T]
        value, _ = rgrpo.loss(out["logp"], out["logp"].detach(), token, out["mask"], weights=weight, total=total)
        value.backward()
    policy.eval()
    torch.nn.utils.clip_grad_norm_(policy.lora_parameters(), 1.0)
    optimizer.step()


def repeat(groups, counts):
    """Groups with every rollout there: what counts n times is n rows."""
    return [[c for c, n in zip(group, ns) for _ in range(n)] for group, ns in zip(groups, counts)]


def unpack(prompts, groups, counts, advantages, rows):
    """Pieces for the repeated update: at most `rows` completions of one query a backward pass."""
    pieces = []
    for prompt, group, ns, pair in zip(prompts, repeat(groups, counts), counts, zip(*advantages)):
        # In `group` an answer that stands for n rollouts was repeated n times: each of those rows has weight 1.
        decision, box, _ = (a.repeat_interleave(torch.tensor(ns)) for a in pair)                        # [N] each
        for s in range(0, len(group), rows):
            part = slice(s, s + rows)
            pieces.append(([prompt], [group[part]], (decision[part], box[part], torch.ones(len(group[part])))))
    return pieces


def pad(prompts, tails, side, device):
    """Inputs of transformers' own forward: rows prompt + tail (list of ids), padded on `side`, an image for each."""
    width = max(len(p.ids) + len(tail) for p, tail in zip(prompts, tails))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)                                            # [M, L]
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)                                          # [M, L]
    for m, (prompt, tail) in enumerate(zip(prompts, tails)):
        length = len(prompt.ids) + len(tail)
        start = 0 if side == "right" else width - length
        ids[m, start:start + length] = torch.cat([prompt.ids, torch.tensor(tail, dtype=torch.long)])
        mask[m, start:start + length] = 1
        types[m, start:start + len(prompt.ids)] = prompt.mm_token_type_ids
    pixels, grid = torch.cat([p.pixel_values for p in prompts]), torch.stack([p.grid_thw for p in prompts])
    inputs = dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, pixel_values=pixels, image_grid_thw=grid)
    return {name: value.to(device) for name, value in inputs.items()}


def repeated_log_probs(policy, prompts, groups):
    """policy.log_probs the repeated way: full rows, an image each, and the logits of all tokens, prompts included."""
    flat = [(prompt, c) for prompt, group in zip(prompts, groups) for c in group]                       # M
    inputs = pad([p for p, _ in flat], [c.ids for _, c in flat], "right", policy.device)
    logits = policy.model(**inputs, use_cache=False).logits                                             # [M, L, V]
    tokens = max(len(c.ids) for _, c in flat)
    rows = []
    for m, (prompt, c) in enumerate(flat):
        at = [t for t, free in enumerate(c.free) if free]                                               # P choices
        # float32 for the choices only, as any trainer would that is short of memory.
        here = logits[m, [len(prompt.ids) - 1 + t for t in at]].float()                                 # [P, V]
        # Renormalised over what the grammar allowed at each choice.
        chosen = [row[c.ids[t]] - row[list(c.allowed[t])].logsumexp(0) for row, t in zip(here, at)]
        index = torch.tensor(at, device=logits.device)
        rows.append(torch.zeros(tokens, device=logits.device).index_put((index,), torch.stack(chosen)))
    mask = [c.free + [False] * (tokens - len(c.free)) for _, c in flat]
    decision = [[t == c.decision_index for t in range(tokens)] for _, c in flat]
    return {"logp": torch.stack(rows), "mask": torch.tensor(mask, device=logits.device),
            "decision": torch.tensor(decision, device=logits.device)}                                   # [M, T] each


@torch.no_grad()
def generate(policy, prompts, group, length):
    """N rollouts a query by transformers' generate: every prompt and image is prefilled N times, every token a step."""
    prompts = [p for p in prompts for _ in range(group)]
    inputs = pad(prompts, [[]] * len(prompts), "left", policy.device)
    return policy.model.generate(**inputs, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length,
                                 eos_token_id=policy.processor.tokenizer.eos_token_id,
                                 pad_token_id=policy.processor.tokenizer.pad_token_id)                  # [B N, L]


# ---------------------------------------------------------------------------------------------- the cases


def case_rollout(args, meter):
    """Ours, with the images' way through the tower."""
    policy, inputs = build_policy(args), build_inputs(args, args.queries)
    meter.ready(*towers_of(policy))
    for i in range(meter.turns):
        prompts = policy.prompts(*inputs)  # new ones: what was seen of an image stays with its prompt
        with meter.measure("rollout"):
            groups, _ = roll(policy, prompts, args, i)
    meter.counts = {"prompt_tokens": [len(p.ids) for p in prompts], "image_passes": len(prompts),
                    "answer_tokens": max(len(c.ids) for group in groups for c in group)}


def towers_of(policy):
    return policy.model.model.visual, policy.model.model.language_model


def case_rollout_repeated(args, meter):
    """transformers' generate, the prompt repeated for every rollout."""
    policy = build_policy(args)
    as_published(policy)
    prompts = policy.prompts(*build_inputs(args, args.queries))
    length = answer_length(policy, args)
    meter.ready(*towers_of(policy))
    for _ in range(meter.turns):
        with meter.measure("rollout"):
            generate(policy, prompts, args.group, length)
    meter.counts = {"image_passes": len(prompts) * args.group, "answer_tokens": length}


def update_inputs(args):
    """What both updates are given: policy, optimiser, prompts, groups, counts and advantages from random rewards."""
    policy = build_policy(args)
    prompts = policy.prompts(*build_inputs(args, args.queries))
    groups, counts = write_answers(policy, prompts, args)
    rewards = [{"total": total} for total in np.random.default_rng(0).normal(size=(len(groups), len(groups[0])))]
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=1e-4)
    return policy, optimizer, prompts, groups, counts, judge(groups, counts, rewards, args)


def case_update(args, meter):
    """Ours: rows of queries that share what their prompts begin with."""
    policy, optimizer, prompts, groups, _, advantages = update_inputs(args)
    if args.targets == "language":
        policy.log_probs(prompts, groups)  # features come from the rollout
    meter.ready(*towers_of(policy))
    for _ in range(meter.turns):
        with meter.measure("update"):
            update(policy, optimizer, prompts, groups, advantages, args)
    packs = policy.pack(prompts, groups, None, args.hold > 0, args.micro_tokens)
    meter.counts = {"image_passes": len(prompts) * (args.targets == "all"), "passes": len(packs),
                    "rows": sum(len(pack.layout.ids) for pack in packs),
                    "tokens": sum(pack.layout.tokens for pack in packs)}


def case_update_repeated(args, meter):
    """A row a rollout, --rows of them at once."""
    policy, optimizer, prompts, groups, counts, advantages = update_inputs(args)
    as_published(policy)
    meter.ready(*towers_of(policy))

    def run(rows):
        meter.clear()
        pieces = unpack(prompts, groups, counts, advantages, rows)
        for _ in range(meter.turns):
            with meter.measure("update"):
                repeated_update(policy, optimizer, pieces)

    rows, every = halving(args.rows, run), len(prompts) * args.group
    meter.counts = {"image_passes": every, "rows": every, "rows_at_once": rows}


def halving(rows, run):
    """run(rows), with fewer rows of a backward pass until the card can hold it -> the rows that it held.

    Fewer are a divisor of the last number, so that a group still comes in equal parts.
    """
    while True:
        try:
            run(rows)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Out here the error, and with it what it kept alive, is gone.
        rows = max(d for d in range(1, rows // 2 + 1) if rows % d == 0)
        gc.collect()
        torch.cuda.empty_cache()


def reward_inputs(args):
    """Scorer, images, B lists of actions, their counts and pools. The boxes are random: the policy has no part here."""
    scorer, images = build_scorer(args), build_inputs(args, args.queries)[0]
    draw, full = np.random.default_rng(0), rgrpo.plan(args.group, "force").count("FULL")
    groups = []
    for image in images:
        x = np.sort(draw.choice(image.width, (args.group - full, 2)) // 2 * 2)                          # [n, 2]
        y = np.sort(draw.choice(image.height, (args.group - full, 2)) // 2 * 2)                         # [n, 2]
        boxes = [(float(a), float(b), float(c) + 1, float(d) + 1) for (a, c), (b, d) in zip(x, y)]
        groups.append([Action("FULL", None, None, "")] + [Action("REGION", box, None, "") for box in boxes])
    counts = [[full] + [1] * (args.group - full)] * len(images)
    return scorer, images, groups, counts, build_pools(len(images), scorer.dim)


def case_reward(args, meter):
    """Ours: one pass for every different box."""
    scorer, images, groups, _, data = reward_inputs(args)
    meter.ready(scorer.model.visual)
    for _ in range(meter.turns):
        with meter.measure("reward"):
            _, passes = earn(data, scorer, images, groups, args)
    meter.counts = {"image_passes": passes}


def case_encode(args, meter):
    """The image tower on pixels that are ready, of a batch as prepare.py makes them, and open_clip's in turns."""
    ours, theirs = encode_towers(args)
    size = EvaClipConfig(**EVA[args.model]).image_size
    pixels = torch.randn(args.scorer_batch, 3, size, size).to(args.device, getattr(torch, args.dtype))
    meter.ready(ours)
    with torch.inference_mode():
        for _ in range(meter.turns):
            for name, tower in (("ours", ours), ("open_clip", theirs)):
                with meter.measure(f"batch {args.scorer_batch} {name}"):
                    tower(pixels)
    # PyTorch cannot see into the one kernel that open_clip's blocks are; both do the same work.
    meter.work = {part: meter.work[f"batch {args.scorer_batch} ours"] for part in meter.work}
    meter.counts = {"tower_parameters": sum(p.numel() for p in ours.parameters())}


def encode_towers(args):
    """Our image tower, and open_clip's ViT of the same width, layers, heads and MLP."""
    # Not above: it takes seconds, and no other case needs it.
    from open_clip.transformer import VisionTransformer
    c = EvaClipConfig(**EVA[args.model])
    return build_random(args, lambda: EvaClip(c, ("visual",))).visual, build_random(args, lambda: VisionTransformer(
        c.image_size, c.patch_size, c.width, c.layers, c.width // c.head_width, c.mlp_ratio, output_dim=c.embed_dim))


def case_step(args, meter):
    """A whole step of ours: prompts from images and questions, rollout, reward, advantage, update."""
    policy, scorer = build_policy(args), build_scorer(args)
    images, questions = build_inputs(args, args.queries)
    data = build_pools(len(images), scorer.dim)
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=1e-4)
    meter.ready(*towers_of(policy), scorer.model.visual)
    for i in range(meter.turns):
        with meter.measure("step"):
            prompts = policy.prompts(images, questions)
            groups, counts = roll(policy, prompts, args, i)
            rewards, passes = earn(data, scorer, images, [[c.action for c in group] for group in groups], args)
            update(policy, optimizer, prompts, groups, judge(groups, counts, rewards, args), args)
    meter.counts = {"scorer_passes": passes, "policy_parameters": policy.model.num_parameters(),
                    "scorer_parameters": sum(p.numel() for p in scorer.model.parameters()),
                    "lora_parameters": sum(p.numel() for p in policy.lora_parameters())}


def case_act(args, meter):
    """Inference of batches of each size, from PIL images on; the adapter counts as merged, so there is no LoRA.

    What all prompts begin with is kept, as in every rollout (`Policy.opening`). In turns, so
    that all see the same machine: FULL, which is the prefill alone, a whole REGION answer by the grammar,
    and free decoding of an answer of that length (REGION is forced, and free decoding never ends early).
    """
    policy = build_policy(args, lora=False)
    images, questions = build_inputs(args, max(args.batches))
    # The likeliest boxes of random weights may have short numbers: free decoding writes as many tokens as the grammar.
    first = policy.prompts(images[:1], questions[:1])
    length = len(policy.rollout(first, [["REGION"]], sample=False)[0][0].ids)
    # They may draw the end of turn at any token, too; only the length limit ends a free answer here.
    policy.end_tokens = set()
    meter.ready(*towers_of(policy))
    ways = {"FULL": ("FULL", "grammar"), "grammar": ("REGION", "grammar"), "free": (None, "free")}
    for batch in sorted(args.batches):
        groups = {}
        for _ in range(meter.turns):
            for name, (decision, decode) in ways.items():
                with meter.measure(f"batch {batch} {name}"):
                    prompts = policy.prompts(images[:batch], questions[:batch])
                    groups[name] = policy.rollout(prompts, [[decision]] * batch, decode, sample=False,
                                                  max_new_tokens=length)
        for name in ("grammar", "free"):
            meter.counts[f"answer_tokens {batch} {name}"] = [len(c.ids) for group in groups[name] for c in group]


CASES = {
    "rollout": case_rollout, "rollout_repeated": case_rollout_repeated, "reward": case_reward, "encode": case_encode,
    "update": case_update, "update_repeated": case_update_repeated, "step": case_step, "act": case_act,
}


# ---------------------------------------------------------------------------------------------- the run


def run_case(args, cases):
    """One case, here. What the card cannot hold is a result too."""
    if args.case == "machine":
        peaks = measure_peaks(torch.device(args.device), getattr(torch, args.dtype))
        return {"machine": describe(args), "peaks": peaks}
    meter = Meter(args)
    try:
        cases[args.case](args, meter)
    except torch.OutOfMemoryError as error:
        return {"left_out": f"out of memory: {str(error).splitlines()[0]}"}
    return meter.result()


def compare(results):
    """Ratios of medians and of peak memory, repeated : ours; none where one of the two was left out."""
    def pick(name, what):
        case, part = name.split(maxsplit=1)
        return results.get(case, {}).get(what, {}).get(part)

    ratios = {}
    for name, (slow, fast) in COMPARED.items():
        if pick(slow, "median_s") and pick(fast, "median_s"):
            above = [pick(n, "peak_bytes") - results[n.split()[0]]["rest_bytes"] for n in (slow, fast)]
            ratios[name] = {"time": pick(slow, "median_s") / pick(fast, "median_s"),
                            "peak_memory": pick(slow, "peak_bytes") / pick(fast, "peak_bytes"),
                            "memory_above_rest": above[0] / above[1] if above[1] else None}
    passes = [results.get(case, {}).get("counts", {}).get("image_passes") for case in ("reward_release", "reward")]
    if all(passes):
        ratios["reward"]["image_passes"] = passes[0] / passes[1]
    for part, seconds in results.get("encode", {}).get("median_s", {}).items():
        if part.endswith("open_clip"):
            ratios["open_clip's ViT against ours"] = {"time": seconds / pick(f"encode {part[:-9]}ours", "median_s")}
    parts = [pick(COMPARED[part][0], "median_s") for part in ("rollout", "reward", "update")]
    if all(parts) and pick("step step", "median_s"):
        ratios["step against the sum of the repeated parts"] = {"time": sum(parts) / pick("step step", "median_s")}
    seconds = results.get("act", {}).get("median_s", {})
    for batch in sorted({part.rsplit(" ", 1)[0] for part in seconds}):
        full, grammar, free = (seconds[f"{batch} {name}"] for name in ("FULL", "grammar", "free"))
        found = ratios[f"free against grammar, {batch}"] = {"time": free / grammar}
        # Both read the same prompt; what is left is writing. Noise can make it nothing, and then there is no ratio.
        if min(free, grammar) > full:
            found["time_after_prefill"] = (free - full) / (grammar - full)
    return dict(sorted(ratios.items()))


def table(results, peaks):
    """Lines of the table. "x floor": measured over floor; "of peak": the share of the matrix product's rate (MFU)."""
    heads = ("median s", "a query", "peak GB", "at rest", "TFLOP", "floor s", "x floor", "of peak")
    yield f"{'case':17} {'part':15} " + " ".join(f"{head:>8}" for head in heads)
    for case, result in results.items():
        if "left_out" in result:
            yield f"{case:17} {result['left_out']}"
        for part, seconds in result.get("median_s", {}).items():
            queries = int(part.split()[1]) if part.startswith("batch") else result["queries"]
            cells = [f"{seconds:8.3f}", f"{seconds / queries:8.3f}"]
            cells += [f"{size / 1e9:8.2f}" for size in (result["peak_bytes"][part], result["rest_bytes"])]
            if work := result["work"].get(part):
                operations, least = sum(o for o, _ in work), floor_seconds(work, peaks)
                cells += [f"{operations / 1e12:8.3f}", f"{least:8.3f}", f"{seconds / least:8.1f}",
                          f"{operations / seconds / peaks['operations_per_s']:8.1%}"]
            yield f"{case:17} {part:15} " + " ".join(cells)


def bench(args, argv, module):
    """All cases -> everything that is in --out, which is written after every case: a later one may fail."""
    # The machine, too, is looked at by a process of its own: this one would keep memory of the GPU for itself.
    found = {"args": vars(args), **start_case("machine", argv, module), "ratios": {}, "cases": {}}
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    for case in args.cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        result = start_case(case, argv, module) | {"queries": args.queries}
        result["floor_s"] = {part: floor_seconds(work, found["peaks"]) for part, work in result.get("work", {}).items()}
        found["cases"][case] = result
        found["ratios"] = compare(found["cases"])
        write_json(args.out, found)
    return found


def report(found):
    """The numbers for people."""
    peaks, machine = found["peaks"], found["machine"]
    yield (f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; measured peaks: "
           f"{peaks['operations_per_s'] / 1e12:.3g} TFLOP/s, {peaks['bytes_per_s'] / 1e9:.3g} GB/s")
    yield from table(found["cases"], peaks)
    for name, values in found["ratios"].items():
        cells = [f"{key.replace('_', ' ')} {value:.1f} x" for key, value in values.items() if value is not None]
        yield f"{name}: {', '.join(cells)}"


def main(argv=None, cases=CASES, module="tools.bench", parse=parse_args):
    """cases, module and parse: those of tools.bench, or of a program that adds cases (tools/bench_trl.py)."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.case:
        print(json.dumps(run_case(args, cases)))
        return
    try:
        found = bench(args, argv, module)
    except RuntimeError as error:
        raise SystemExit(f"bench: {error}") from error
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
