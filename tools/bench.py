"""Time and peak memory of an r-GRPO step and of inference (the paper's Table 9), on random weights at its shape.

    python -m tools.bench                                       # the stand-in's size; on a CPU see --rows
    python -m tools.bench --model mid --dtype bfloat16 --queries 1 --repeat 1                   # .3 B on a CPU
    python -m tools.bench --model 3b --device cuda              # Qwen2.5-VL-3B and EVA-CLIP-8B, nothing downloaded

Time and memory do not depend on what the weights are. The shape is the paper's: an image of about 1,000 visual tokens,
the prompt of Table 10, N = 8 rollouts of 4 queries, answers as long as the template. Measured side by side:
* rollout, update: ours (prompt and image once a query) against the repeated way (every completion a row of its own, the
  image through the tower for each, logits of every token), in transformers and PyTorch as they are (`as_published`);
* reward: crops only, equal boxes once, against the release's way (the view and all K candidates for every completion);
* step: ours, whole, against TRL's GRPOTrainer with peft, where TRL is installed (it is no requirement);
* encode: the scorer's image tower against open_clip's own ViT of the same shape, in turns, on pixels that are ready;
* act: inference with grammar and free decoding of answers of the same length, one query at a time and in batches; and
  of FULL, which is the prefill alone, so that the time of writing can be told from that of reading.
Ours follows train.py's defaults: half of a group is FULL, which ends at the decision. The repeated rollouts and TRL
know no grammar and write N whole answers; that is part of what is compared, though small beside the prompt.

Every case runs in a process of its own, so its peak memory is nobody else's: on CUDA the allocator's, on a CPU that of
the whole process, taken anew for every part on Linux. Elsewhere it can only grow; parts are run in the order in which
they need more.

The floor of a case is its operations divided by this machine's own rate in one large matrix product, or its bytes
divided by the rate of a large copy, whichever takes longer; both rates are measured in the same run. Left out of the
counts: norms, softmax, LoRA's own products (about 1 %), what checkpointing computes again, resizing on the CPU. Letters
as in policy.py.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    TrainerCallback,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

import rgrpo
from policy import FULL_TEXT, REGION_TEXT, SYSTEM_PROMPT, Draft, Policy, Tree, suit_cuda
from rewards import reward
from scorer import EvaClip, EvaClipConfig, Preprocess, Scorer, crop, scores, write_json

ROOT = Path(__file__).resolve().parent.parent
K = 20  # candidates of a pool (Sec. 4.1)
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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", choices=("mini", "mid", "3b"), default="mini",
                      help="mini/policy's sizes | .3 B | Qwen2.5-VL-3B and EVA-CLIP-8B (needs a GPU)")
    what.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
                      help=f"default all: {', '.join(CASES)}")
    what.add_argument("--case", choices=(*CASES, "machine"), help="run this one here, print JSON (used by the program)")
    shape = parser.add_argument_group("shape (Sec. 4.1, App. B)")
    shape.add_argument("--visual-tokens", type=int, default=1000, help="image tokens of a query, at least 4, about")
    shape.add_argument("--queries", type=int, default=4, help="queries of a step")
    shape.add_argument("--group", type=int, default=8, help="N, rollouts of a query, at least 2")
    shape.add_argument("--targets", choices=("all", "language"), default="all",
                       help="LoRA on all linear layers (App. B) | on the language model's: image features are kept")
    shape.add_argument("--dropout", type=float, default=0.1, help="of LoRA, in the update")
    shape.add_argument("--scorer-batch", type=int, default=64, help="images of a forward pass in the case encode")
    shape.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="queries of an inference batch")
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    cuda = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.out = args.out or f"bench/{args.model}-{args.device.replace(':', '')}.json"
    args.rows = min(args.rows or args.group, args.group)
    least = {"visual_tokens": 4, "queries": 1, "group": 2, "rows": 1, "repeat": 1, "warmup": 0,
             "scorer_batch": 1}
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}")
    if args.group % args.rows:
        parser.error(f"--rows must divide --group {args.group}")
    return args


def add_machine_flags(parser):
    machine = parser.add_argument_group("machine")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine.add_argument("--device", default=device, help="cpu, cuda, cuda:1 ...")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    # train.py takes eager on a CPU, where images are small; at 1,000 visual tokens that is 3.5 times slower.
    machine.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="eager keeps T x T tables")
    machine.add_argument("--checkpointing", action="store_true", help="activation checkpointing in every update")
    machine.add_argument("--rows", type=int, help="completions of one backward pass in the repeated ways; default the "
                         "group, halved on CUDA until it fits; on a CPU give what memory holds")
    machine.add_argument("--repeat", type=int, default=3, help="timed repeats of a case; medians are compared")
    machine.add_argument("--warmup", type=int, default=1, help="repeats before them that are not timed")
    machine.add_argument("--out", help="JSON file to write; default bench/MODEL-DEVICE.json")


# ---------------------------------------------------------------------------------------------- models and inputs


def build_processor(visual_tokens):
    """mini/policy's processor for images of `visual_tokens` tokens, with a tokenizer that knows the prompt's words.

    The published tokenizer has whole English words; the small one would spell Table 10 in 1,000 tokens instead of 400.
    So it is trained anew on the very text, with its rules kept: digits stay tokens of their own.
    """
    old = AutoProcessor.from_pretrained(ROOT / "mini" / "policy")
    words = [SYSTEM_PROMPT, FULL_TEXT, REGION_TEXT % (1, 2, 3, 4), "system user assistant", question(1)]
    tokenizer = old.tokenizer.train_new_from_iterator(words * 20, vocab_size=2000, show_progress=False)
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
    processor = build_processor(args.visual_tokens)
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
    tower and PyTorch's own choice of an attention kernel. (A case has a process of its own.)"""
    torch.backends.cuda.enable_cudnn_sdp(True)
    for block in policy.model.model.visual.blocks:
        block.attn.__class__ = Qwen2_5_VLVisionAttention


def build_random(args, build):
    """The model that build() makes, random. Weights are drawn in place: 8 B parameters in float32 first would be 32 GB.
    """
    with torch.device("meta"):
        model = build()
    model = model.to(getattr(torch, args.dtype)).to_empty(device=args.device).requires_grad_(False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return model


def build_scorer(args):
    """A random EvaClip."""
    return build_random(args, lambda: EvaClip(EvaClipConfig(**EVA[args.model])))


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


def write_answers(policy, prompts, args):
    """Random answers of the grammar, without the model: a decision-balanced group a query -> B lists of Completion,
    B lists of how many rollouts each stands for (train.py's groups: FULL is one answer, written once).

    So the update is measured by itself, and ours and the repeated way get the same completions.
    """
    full = rgrpo.plan(args.group, "force").count("FULL")
    grammar, groups = policy.grammar, []
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


def answer_length(policy, args):
    """Tokens of a REGION answer with numbers as long as the image's sides, end of turn included."""
    side = 28 * math.isqrt(args.visual_tokens)
    return len(policy.grammar.region_ids((side // 2, side // 2, side - 1, side - 1)))


# ---------------------------------------------------------------------------------------------- ours, from the leaves


def judge(groups, counts, totals):
    """Advantages and weights of each completion, train.py's default: B tuples (decision [n], box [n], weight [n])."""
    weight = torch.tensor(counts, dtype=torch.float32)                                                  # [B, n]
    decision = torch.tensor([[rgrpo.CODES[c.action.decision] for c in group] for group in groups])      # [B, n]
    pair = rgrpo.advantages(torch.as_tensor(np.stack(totals)), decision, weights=weight)
    return list(zip(*pair, weight))


def update(policy, optimizer, pieces, log_probs):
    """One optimiser step. pieces: one backward pass each, (prompts, groups, (decision [M], box [M], weight [M])).

    log_probs: policy.log_probs (ours) or `repeated_log_probs`, of equal results.
    """
    optimizer.zero_grad(set_to_none=True)
    total = sum(float(w) * sum(c.free) for _, groups, (*_, weight) in pieces
                for c, w in zip((c for group in groups for c in group), weight))
    policy.train()
    for prompts, groups, advantages in pieces:
        out = log_probs(prompts, groups)
        decision, box, weight = (a.to(out["logp"].device) for a in advantages)                          # [M] each
        token = torch.where(out["decision"], decision[:, None], box[:, None])                           # [M, T]
        value, _ = rgrpo.loss(out["logp"], out["logp"].detach(), token, out["mask"], weights=weight, total=total)
        value.backward()
    policy.eval()
    torch.nn.utils.clip_grad_norm_(policy.lora_parameters(), 1.0)
    optimizer.step()


def pack(prompts, groups, advantages):
    """Pieces for our update: a query a backward pass."""
    return [([p], [g], a) for p, g, a in zip(prompts, groups, advantages)]


def encode(model, images):
    """Image features, float32 [B, D], by scorer.py's own way around a random model: its threads and its batches."""
    scorer = Scorer("random", model.logit_scale.device, model.logit_scale.dtype)
    scorer.model, scorer.dim = model, model.config.embed_dim
    scorer.preprocess = Preprocess(model.config.image_size)
    return scorer.image_features(images)                                                                # [B, D]


def rewards_of(scorer, images, groups, full, candidates):
    """Rewards by our way (Eq. 5-8): full [B, D] and candidates [B, K, D] are known, crops are encoded once a box.

    -> B arrays [n], number of images encoded.
    """
    boxes = list(dict.fromkeys((b, c.action.box) for b, group in enumerate(groups) for c in group if c.action.box))
    known = dict(zip(boxes, encode(scorer, [crop(images[b], box) for b, box in boxes])))
    totals, labels = [], np.eye(1, K, K // 2, dtype=int)[0]                                             # [K]
    for b, group in enumerate(groups):
        seen = scores(np.stack([known.get((b, c.action.box), full[b]) for c in group]), candidates[b])  # [n, K]
        totals.append(reward([c.action.decision for c in group], seen, scores(full[b], candidates[b]), labels)["total"])
    return totals, len(boxes)


def roll(policy, prompts, args, seed=0):
    """A balanced group a query: FULL once, the REGION half sampled. -> groups, counts as in `write_answers`."""
    full = rgrpo.plan(args.group, "force").count("FULL")
    plans = [["FULL"] + ["REGION"] * (args.group - full)] * len(prompts)
    groups = policy.rollout(prompts, plans, seeds=[(seed, b) for b in range(len(prompts))])
    return groups, [[full] + [1] * (args.group - full)] * len(prompts)


# ---------------------------------------------------------------------------------------------- the repeated way


def repeat(groups, counts):
    """Groups with every rollout there: what counts n times is n rows."""
    return [[c for c, n in zip(group, ns) for _ in range(n)] for group, ns in zip(groups, counts)]


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
        row = torch.zeros(tokens, device=logits.device)                                                 # [T]
        at = torch.tensor(np.flatnonzero(c.free), device=row.device)                                    # [P]
        # float32 for the choices only, as any trainer would that is short of memory.
        here = logits[m, len(prompt.ids) - 1 + at].float().log_softmax(-1)                              # [P, V]
        value = here.gather(1, inputs["input_ids"][m, len(prompt.ids) + at][:, None])[:, 0]             # [P]
        rows.append(row.index_put((at,), value - allowed_mass(here, [c.allowed[i] for i in at.tolist()])))
    mask = [c.free + [False] * (tokens - len(c.free)) for _, c in flat]
    decision = [[t == c.decision_index for t in range(tokens)] for _, c in flat]
    return {"logp": torch.stack(rows), "mask": torch.tensor(mask, device=logits.device),
            "decision": torch.tensor(decision, device=logits.device)}                                   # [M, T] each


def allowed_mass(logp, allowed):
    """Log of the probability of what was allowed at each choice [P], from logp [P, V]."""
    if allowed[0] is None:
        return torch.zeros_like(logp[:, 0])
    width = max(map(len, allowed))
    # Padded with a repetition of the first token, which the mask takes out again.
    table = torch.tensor([list(a) + [a[0]] * (width - len(a)) for a in allowed], device=logp.device)    # [P, C]
    extra = torch.tensor([[i >= len(a) for i in range(width)] for a in allowed], device=logp.device)    # [P, C]
    return logp.gather(1, table).masked_fill(extra, -torch.inf).logsumexp(-1)


def unpack(prompts, groups, counts, advantages, rows):
    """Pieces for the repeated update: at most `rows` completions of one query a backward pass."""
    pieces = []
    for prompt, group, ns, pair in zip(prompts, repeat(groups, counts), counts, advantages):
        # In `group` an answer that stands for n rollouts was repeated n times: each of those rows has weight 1.
        decision, box, _ = (a.repeat_interleave(torch.tensor(ns)) for a in pair)                        # [N] each
        for s in range(0, len(group), rows):
            part = slice(s, s + rows)
            pieces.append(([prompt], [group[part]], (decision[part], box[part], torch.ones(len(group[part])))))
    return pieces


@torch.no_grad()
def generate(policy, prompts, group, length):
    """N rollouts a query by transformers' generate: every prompt and image is prefilled N times, every token a step."""
    prompts = [p for p in prompts for _ in range(group)]
    inputs = pad(prompts, [[]] * len(prompts), "left", policy.device)
    return policy.model.generate(**inputs, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length,
                                 eos_token_id=policy.processor.tokenizer.eos_token_id,
                                 pad_token_id=policy.processor.tokenizer.pad_token_id)                  # [B N, L]


# ---------------------------------------------------------------------------------------------- floors


def language_parameters(config):
    """Weights of the language model's linear layers, each used once a token (lm_head apart)."""
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    attention = text.hidden_size * (2 * queries + 2 * keys)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def vision_parameters(config):
    """Weights of the vision tower's linear layers: those used once a patch, those used once an image token."""
    vision = config.vision_config
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2 * width
    blocks = vision.depth * (4 * width * width + 3 * width * vision.intermediate_size)
    return patch + blocks, merged * merged + merged * vision.out_hidden_size


def language_operations(config, tokens, pairs, backward=False):
    """Operations of `tokens` through the language model, with `pairs` of a token and one that it sees.

    Backward with frozen weights: once more the products (gradients of activations alone), and twice the attention,
    whose two products have two factors each that depend on activations.
    """
    text = config.text_config
    linear, attention = 2 * language_parameters(config) * tokens, 4 * text.num_hidden_layers * text.hidden_size * pairs
    return 2 * linear + 3 * attention if backward else linear + attention


def vision_operations(config, patches, backward=False):
    """Operations of an image of so many patches through the tower. Most blocks see windows, few the whole image."""
    vision = config.vision_config
    by_patch, by_token = vision_parameters(config)
    linear = 2 * by_patch * patches + 2 * by_token * patches // vision.spatial_merge_size**2
    window, full = (vision.window_size // vision.patch_size)**2, len(vision.fullatt_block_indexes)
    pairs = patches * (full * patches + (vision.depth - full) * min(window, patches))
    attention = 4 * vision.hidden_size * pairs
    return 2 * linear + 3 * attention if backward else linear + attention


def causal(start, tokens):
    """Pairs when `tokens` follow `start` others, each seeing all before it and itself."""
    return tokens * start + tokens * (tokens + 1) // 2


def weight_bytes(policy, head):
    """Bytes of the language model, which every forward pass has to read once. head: with lm_head? The grammar needs
    some twenty of its rows, which is nothing."""
    numbers = language_parameters(policy.model.config) + head * policy.model.lm_head.weight.numel()
    return numbers * policy.model.dtype.itemsize


def decode_work(policy, rows, steps, slots, head):
    """[operations, bytes] of `steps` steps of one token for `rows` rows whose caches hold `slots` tokens each. head:
    are there logits of the whole vocabulary?"""
    text = policy.model.config.text_config
    cache = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * text.num_hidden_layers
    logits = 2 * text.hidden_size * text.vocab_size * head
    operations = steps * rows * (language_operations(policy.model.config, 1, slots) + logits)
    # A step of 8 rows still reads every weight, so this, not the operations, is what it waits for.
    return [operations, steps * (weight_bytes(policy, head) + rows * slots * cache * policy.model.dtype.itemsize)]


def prefill_work(policy, prompts, tail=0):
    """[operations, bytes] of prompts with their images, and `tail` tokens after each. What is kept costs nothing.
    """
    config, operations = policy.model.config, 0
    for prompt in prompts:
        kept = len(policy.opening) if policy.keep_prefix else 0
        tokens = len(prompt.ids) - kept + tail
        operations += language_operations(config, tokens, causal(kept, tokens))
    operations += sum(vision_operations(config, len(p.pixel_values)) for p in prompts)
    return [operations, weight_bytes(policy, head=False)]


def rollout_work(policy, prompts, groups):
    """Phases of our rollout: prompts once, then one step a choice for the REGION rollouts."""
    trunk = len(policy.grammar.trunk)
    boxes = [c for group in groups for c in group if c.action.decision == "REGION"]
    # The decision and the first digit come from the prefill; the last choice is never fed.
    steps = max(sum(c.free) for c in boxes) - 2
    slots = int(np.mean([len(p.ids) for p in prompts])) + trunk
    return [prefill_work(policy, prompts, trunk), decode_work(policy, len(boxes), steps, slots, head=False)]


def update_work(policy, pieces, args, repeated):
    """Phases of an update: one a piece."""
    config, phases = policy.model.config, []
    for prompts, groups, _ in pieces:
        operations = 0
        for prompt, group in zip(prompts, groups):
            start = len(prompt.ids)
            tree = Tree([c.ids for c in group], [max(np.flatnonzero(c.free)) for c in group])
            vision = vision_operations(config, len(prompt.pixel_values), args.targets == "all")
            if repeated:
                tokens, rows = len(group) * start + sum(len(c.ids) for c in group), len(group)
                pairs = sum(causal(0, start + len(c.ids)) for c in group)
                operations += 4 * config.text_config.hidden_size * config.text_config.vocab_size * tokens
            else:
                tokens, rows = start + len(tree.tokens), int(args.targets == "all")  # features are kept else
                pairs = causal(0, start) + sum(start + depth + 1 for depth in tree.depths)
            operations += language_operations(config, tokens, pairs, backward=True) + rows * vision
        phases.append([operations, 2 * weight_bytes(policy, head=repeated)])
    return phases


def scorer_work(c, images, dtype):
    """[operations, bytes] of encoding images by an EvaClip of this EvaClipConfig."""
    tokens = (c.image_size // c.patch_size) ** 2 + 1
    weights = c.layers * (4 * c.width**2 + 2 * int(c.width * c.mlp_ratio) * c.width) + 3 * c.patch_size**2 * c.width
    operations = images * (2 * weights * tokens + 4 * c.layers * c.width * tokens**2)
    return [operations, weights * dtype.itemsize * math.ceil(images / 64)]


def measure_peaks(device, dtype):
    """This machine's own rates: operations/s of a large matrix product, bytes/s of a large copy (read and written)."""
    cuda = device.type == "cuda"
    n, size = (8192, 2**30) if cuda else (2048, 2**27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source, target = (torch.full((size,), i, dtype=torch.uint8, device=device) for i in range(2))
    times = {"matmul": [], "copy": []}
    for _ in range(10 if cuda else 4):
        for name, work in (("matmul", lambda: a @ b), ("copy", lambda: target.copy_(source))):
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    # The best, not the median: a floor must not contain somebody else's work.
    return {"operations_per_s": 2 * n**3 / min(times["matmul"]), "bytes_per_s": 2 * size / min(times["copy"])}


# ---------------------------------------------------------------------------------------------- measuring


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device):
    """(now, peak) in bytes: of the CUDA allocator, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if not os.path.exists("/proc/self/status"):  # not Linux: the peak alone; macOS counts bytes, others kilobytes
        unit = 1 if platform.system() == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak
    # Not getrusage: a new process inherits there the peak of the one that started it.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def forget_peak(device):
    """From here on `memory` tells the peak anew, where the system can: CUDA and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Meter:
    """Seconds and peak bytes of the named parts of a case."""

    def __init__(self, device, warmup):
        self.device, self.warmup, self.seconds, self.peak, self.work = torch.device(device), warmup, {}, {}, {}
        self.counts, self.rest = {}, None

    def ready(self):
        """Models and inputs stand: what the case takes from here on is its own."""
        self.rest = memory(self.device)[0]

    @contextlib.contextmanager
    def measure(self, part):
        forget_peak(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds.setdefault(part, []).append(time.perf_counter() - start)
        self.peak[part] = max(self.peak.get(part, 0), memory(self.device)[1])

    def result(self):
        seconds = {part: values[self.warmup:] for part, values in self.seconds.items()}
        return {"seconds": seconds, "median_s": {part: statistics.median(s) for part, s in seconds.items()},
                "peak_bytes": self.peak, "rest_bytes": self.rest, "work": self.work, "counts": self.counts}


# ---------------------------------------------------------------------------------------------- the cases


def case_rollout(args, meter):
    """Ours, with the images' way through the tower."""
    policy, inputs = build_policy(args), build_inputs(args, args.queries)
    meter.ready()
    for i in range(args.warmup + args.repeat):
        prompts = policy.prompts(*inputs)  # new ones: what was seen of an image stays with its prompt
        with meter.measure("rollout"):
            groups, _ = roll(policy, prompts, args, i)
    meter.work["rollout"] = rollout_work(policy, prompts, groups)
    meter.counts = {"prompt_tokens": [len(p.ids) for p in prompts], "image_passes": len(prompts),
                    "answer_tokens": max(len(c.ids) for group in groups for c in group)}


def case_rollout_repeated(args, meter):
    """transformers' generate, the prompt repeated for every rollout."""
    policy = build_policy(args)
    as_published(policy)
    prompts = policy.prompts(*build_inputs(args, args.queries))
    length = answer_length(policy, args)
    meter.ready()
    for _ in range(args.warmup + args.repeat):
        with meter.measure("rollout"):
            generate(policy, prompts, args.group, length)
    rows = len(prompts) * args.group
    slots = int(np.mean([len(p.ids) for p in prompts])) + length // 2
    meter.work["rollout"] = [prefill_work(policy, prompts * args.group),
                             decode_work(policy, rows, length - 1, slots, head=True)]
    meter.counts = {"image_passes": rows, "answer_tokens": length}


def update_inputs(args):
    """What both updates are given: policy, optimiser, prompts, groups, counts and advantages from random rewards."""
    policy = build_policy(args)
    prompts = policy.prompts(*build_inputs(args, args.queries))
    groups, counts = write_answers(policy, prompts, args)
    totals = np.random.default_rng(0).normal(size=(len(groups), len(groups[0])))                        # [B, n]
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=1e-4)
    return policy, optimizer, prompts, groups, counts, judge(groups, counts, totals)


def case_update(args, meter):
    """Ours: a packed row a query."""
    policy, optimizer, prompts, groups, _, advantages = update_inputs(args)
    if args.targets == "language":
        policy.log_probs(prompts, groups)  # features come from the rollout
    pieces = pack(prompts, groups, advantages)
    meter.ready()
    for _ in range(args.warmup + args.repeat):
        with meter.measure("update"):
            update(policy, optimizer, pieces, policy.log_probs)
    meter.work["update"] = update_work(policy, pieces, args, repeated=False)
    meter.counts = {"image_passes": len(prompts) * (args.targets == "all"), "rows": len(prompts)}


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


def case_update_repeated(args, meter):
    """A row a rollout, --rows of them at once."""
    policy, optimizer, prompts, groups, counts, advantages = update_inputs(args)
    as_published(policy)
    meter.ready()

    def run(rows):
        meter.seconds, meter.peak = {}, {}
        pieces = unpack(prompts, groups, counts, advantages, rows)
        for _ in range(args.warmup + args.repeat):
            with meter.measure("update"):
                update(policy, optimizer, pieces, lambda *part: repeated_log_probs(policy, *part))
        meter.work["update"] = update_work(policy, pieces, args, repeated=True)

    rows, every = halving(args.rows, run), len(prompts) * args.group
    meter.counts = {"image_passes": every, "rows": every, "rows_at_once": rows}


def reward_inputs(args):
    """Scorer, images, groups, counts, and what prepare.py would have embedded: full [B, D], candidates [B, K, D]."""
    policy_args = argparse.Namespace(**{**vars(args), "model": "mini", "device": "cpu", "dtype": "float32"})
    policy = build_policy(policy_args, lora=False)  # for the prompts' sizes and the grammar: the smallest will do
    images, questions = build_inputs(args, args.queries)
    groups, counts = write_answers(policy, policy.prompts(images, questions), args)
    scorer, draw = build_scorer(args), np.random.default_rng(0)
    shapes = ((len(images),), (len(images), K))
    full, pool = (draw.normal(size=(*shape, scorer.config.embed_dim)).astype(np.float32) for shape in shapes)
    return scorer, images, groups, counts, full, pool


def case_reward(args, meter):
    scorer, images, groups, _, full, candidates = reward_inputs(args)
    meter.ready()
    for _ in range(args.warmup + args.repeat):
        with meter.measure("reward"):
            _, passes = rewards_of(scorer, images, groups, full, candidates)
    meter.work["reward"] = [scorer_work(scorer.config, passes, scorer.logit_scale.dtype)]
    meter.counts = {"image_passes": passes}


def case_reward_release(args, meter):
    """The release's way: for every completion, its view and all K candidates through the scorer."""
    scorer, images, groups, counts, full, _ = reward_inputs(args)
    pool, labels = noise(K, 336, 336), np.eye(1, K, K // 2, dtype=int)[0]
    meter.ready()
    for _ in range(args.warmup + args.repeat):
        passes = 0
        with meter.measure("reward"):
            for b, group in enumerate(repeat(groups, counts)):
                for c in group:
                    view = crop(images[b], c.action.box) if c.action.box else images[b]
                    features = encode(scorer, [view, *pool])                                            # [1 + K, D]
                    reward([c.action.decision], scores(features[:1], features[1:]),
                           scores(full[b], features[1:]), labels)
                    passes += 1 + K
    once = scorer_work(scorer.config, 1 + K, scorer.logit_scale.dtype)
    meter.work["reward"] = [once] * (passes // (1 + K))
    meter.counts = {"image_passes": passes}


def encode_towers(args):
    """Our image tower, and open_clip's ViT of the same width, layers, heads and MLP."""
    # Not above: it takes seconds, and no other case needs it.
    from open_clip.transformer import VisionTransformer
    c = EvaClipConfig(**EVA[args.model])
    return build_random(args, lambda: EvaClip(c, ("visual",))).visual, build_random(args, lambda: VisionTransformer(
        c.image_size, c.patch_size, c.width, c.layers, c.width // c.head_width, c.mlp_ratio, output_dim=c.embed_dim))


def case_encode(args, meter):
    """The image tower on pixels that are ready, of a batch as prepare.py makes them, and open_clip's in turns."""
    c, (ours, theirs) = EvaClipConfig(**EVA[args.model]), encode_towers(args)
    pixels = torch.randn(args.scorer_batch, 3, c.image_size, c.image_size).to(args.device, getattr(torch, args.dtype))
    meter.ready()
    with torch.inference_mode():
        for _ in range(args.warmup + args.repeat):
            for name, tower in (("ours", ours), ("open_clip", theirs)):
                with meter.measure(f"batch {args.scorer_batch} {name}"):
                    tower(pixels)
    meter.work = {part: [scorer_work(c, args.scorer_batch, pixels.dtype)] for part in meter.seconds}
    meter.counts = {"tower_parameters": sum(p.numel() for p in ours.parameters())}


def case_step(args, meter):
    """A whole step of ours: prompts from images and questions, rollout, reward, advantage, update."""
    policy, scorer = build_policy(args), build_scorer(args)
    images, questions = build_inputs(args, args.queries)
    draw = np.random.default_rng(0)
    full = draw.normal(size=(len(images), scorer.config.embed_dim)).astype(np.float32)                  # [B, D]
    candidates = draw.normal(size=(len(images), K, scorer.config.embed_dim)).astype(np.float32)         # [B, K, D]
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=1e-4)
    meter.ready()
    for i in range(args.warmup + args.repeat):
        with meter.measure("step"):
            prompts = policy.prompts(images, questions)
            groups, counts = roll(policy, prompts, args, i)
            totals, passes = rewards_of(scorer, images, groups, full, candidates)
            pieces = pack(prompts, groups, judge(groups, counts, totals))
            update(policy, optimizer, pieces, policy.log_probs)
    meter.work["step"] = (rollout_work(policy, prompts, groups)
                          + [scorer_work(scorer.config, passes, scorer.logit_scale.dtype)]
                          + update_work(policy, pieces, args, repeated=False))
    meter.counts = {"scorer_passes": passes, "policy_parameters": policy.model.num_parameters(),
                    "scorer_parameters": sum(p.numel() for p in scorer.parameters()),
                    "lora_parameters": sum(p.numel() for p in policy.lora_parameters())}


def case_step_trl(args, meter):
    """GRPOTrainer with peft: the same model, images, questions, N, LoRA and answer length; rewards cost it nothing."""
    # By name: an import statement would make these packages requirements, and they are none.
    trl, peft, datasets = map(importlib.import_module, ("trl", "peft", "datasets"))
    rows = halving(args.rows, lambda rows: trl_steps(args, meter, rows, trl, peft, datasets))
    versions = {package.__name__: package.__version__ for package in (trl, peft)}
    meter.counts |= {"versions": versions, "rows_at_once": rows}


def trl_steps(args, meter, rows, trl, peft, datasets):
    """Warm-up and timed steps of GRPOTrainer, `rows` completions a backward pass."""
    policy = build_policy(args, lora=False)
    as_published(policy)
    length, (images, questions) = answer_length(policy, args), build_inputs(args, args.queries)
    table = [{"prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": q}], "image": i}
             for i, q in zip(images, questions)]
    # Rewards have to differ inside a group, or there would be nothing to learn and less to do.
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            folder, per_device_train_batch_size=rows, gradient_accumulation_steps=args.queries * args.group // rows,
            num_generations=args.group, max_completion_length=length,
            # Random weights would end some answers early, which would be less work than ours.
            generation_kwargs={"min_new_tokens": length},
            max_steps=args.warmup + args.repeat, beta=0.0, learning_rate=1e-4, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=args.device == "cpu", bf16=False,
            gradient_checkpointing=args.checkpointing, shuffle_dataset=False)
        trainer = trl.GRPOTrainer(
            policy.model, reward_funcs=lambda completions, **_: list(draw.random(len(completions))), args=config,
            train_dataset=datasets.Dataset.from_list(table), processing_class=policy.processor,
            peft_config=peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=args.dropout,
                                        target_modules=lora_targets(policy, args)), callbacks=[Watch(meter)])
        meter.seconds, meter.peak = {}, {}
        meter.ready()
        trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    meter.counts = {"lora_parameters": trained, "answer_tokens": length}


def lora_targets(policy, args):
    """Whole paths of the layers that `add_lora` would take: those of policy.py, in peft's words."""
    return [name for name, module in policy.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
            and (args.targets == "all" or name.startswith("model.language_model."))]


class Watch(TrainerCallback):
    """Measures the steps of a transformers Trainer, generation included."""

    def __init__(self, meter):
        self.meter, self.stack = meter, contextlib.ExitStack()

    def on_step_begin(self, args, state, control, **_):
        self.stack.enter_context(self.meter.measure("step"))

    def on_step_end(self, args, state, control, **_):
        self.stack.close()


def case_act(args, meter):
    """Inference of batches of each size, from PIL images on; the adapter counts as merged, so there is no LoRA.

    What all prompts begin with is kept, as evaluate.py and tools/rerank.py have it (`Policy.keep_prefix`). In turns, so
    that all see the same machine: FULL, which is the prefill alone, a whole REGION answer by the grammar,
    and free decoding of an answer of that length (REGION is forced, and free decoding never ends early).
    """
    policy = build_policy(args, lora=False)
    policy.keep_prefix = True
    images, questions = build_inputs(args, max(args.batches))
    # The likeliest boxes of random weights may have short numbers: free decoding writes as many tokens as the grammar.
    first = policy.prompts(images[:1], questions[:1])
    length = len(policy.rollout(first, [["REGION"]], sample=False)[0][0].ids)
    # They may draw the end of turn at any token, too; only the length limit ends a free answer here.
    policy.end_tokens = set()
    meter.ready()
    ways = {"FULL": ("FULL", "grammar"), "grammar": ("REGION", "grammar"), "free": (None, "free")}
    for batch in sorted(args.batches):
        groups = {}
        for _ in range(args.warmup + args.repeat):
            for name, (decision, decode) in ways.items():
                with meter.measure(f"batch {batch} {name}"):
                    prompts = policy.prompts(images[:batch], questions[:batch])
                    groups[name] = policy.rollout(prompts, [[decision]] * batch, decode, sample=False,
                                                  max_new_tokens=length)
        meter.work[f"batch {batch} FULL"] = [prefill_work(policy, prompts, len(policy.grammar.trunk))]
        meter.work[f"batch {batch} grammar"] = rollout_work(policy, prompts, groups["grammar"])
        slots = len(prompts[0].ids) + length // 2
        meter.work[f"batch {batch} free"] = [prefill_work(policy, prompts),
                                             decode_work(policy, batch, length - 1, slots, head=True)]
        for name in ("grammar", "free"):
            meter.counts[f"answer_tokens {batch} {name}"] = [len(c.ids) for group in groups[name] for c in group]


CASES = {
    "rollout": case_rollout, "rollout_repeated": case_rollout_repeated,
    "reward": case_reward, "reward_release": case_reward_release, "encode": case_encode,
    "update": case_update, "update_repeated": case_update_repeated,
    "step": case_step, "step_trl": case_step_trl,
    "act": case_act,
}


# ---------------------------------------------------------------------------------------------- the run


def run_case(args):
    """One case, here. What the card cannot hold is a result too."""
    if args.case == "machine":
        peaks = measure_peaks(torch.device(args.device), getattr(torch, args.dtype))
        return {"machine": describe(args), "peaks": peaks}
    if args.case == "step_trl" and importlib.util.find_spec("trl") is None:
        return {"left_out": "trl is not installed"}
    meter = Meter(args.device, args.warmup)
    try:
        CASES[args.case](args, meter)
    except torch.OutOfMemoryError as error:
        return {"left_out": f"out of memory: {str(error).splitlines()[0]}"}
    return meter.result()


def start_case(case, argv):
    """One case in a process of its own -> its numbers. RuntimeError with what it printed when it failed."""
    command = [sys.executable, "-m", "tools.bench", *argv, "--case", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        return {"left_out": "killed by the system, which ran out of memory"}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # packages print, too; ours is the last line


def floor_seconds(work, peaks):
    """Least seconds of the phases [operations, bytes]: each waits for what takes longer."""
    return sum(max(o / peaks["operations_per_s"], b / peaks["bytes_per_s"]) for o, b in work)


def compare(results):
    """Ratios of medians and of peak memory, repeated : ours; None where one of the two was left out."""
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


def describe(args):
    """The machine and the packages, for whoever reads the JSON later."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    versions = {package: importlib.import_module(package).__version__ for package in ("torch", "transformers")}
    return {"device": name, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
            "python": platform.python_version(), **versions}


def processor_name():
    """The CPU's name; platform.processor() is empty on most Linux systems."""
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def bench(args, argv):
    """All cases -> everything that is in --out, which is written after every case: a later one may fail."""
    # The machine, too, is looked at by a process of its own: this one would keep memory of the GPU for itself.
    found = {"args": vars(args), **start_case("machine", argv), "ratios": {}, "cases": {}}
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    for case in args.cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        result = start_case(case, argv) | {"queries": args.queries}
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


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.case:
        print(json.dumps(run_case(args)))
        return
    try:
        found = bench(args, argv)
    except RuntimeError as error:
        raise SystemExit(f"bench: {error}") from error
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
