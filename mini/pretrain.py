"""Build the stand-in models of the embedded world: mini/scorer (an EVA-CLIP), mini/policy (a Qwen2.5-VL) and
mini/scorer2, another EVA-CLIP, to which the scorer is swapped at test time (Table 6).

    python -m mini.pretrain                    # all; `make mini` (minutes and machine: see LOG.md)
    python -m mini.pretrain --only scorer

They stand in for BAAI/EVA-CLIP-8B and Qwen/Qwen2.5-VL-3B-Instruct and are loaded by the code that loads the real ones.
Both are trained on entities of another universe than the data set's (mini.world.make_entities(..., "pretrain")): other
names, other looks. The scorer learns which pictures and texts belong together. The policy learns to answer in the right
form and to point at what the question names, but as a pretrained model does: its eye goes to the largest object of the
category six times in ten (SALIENT), its boxes are loose, and it wants to crop where the picture is full of things
(CROP_SHARE), whatever they are. That is what r-GRPO has to mend.

What shaped this recipe: localisation shows nothing for the first 10-20 thousand scenes and then comes fast; box targets
relative to the cell that predicts them, never absolute; mini-sized widths need weights of size fan_in^-.5; and
rope_theta 10 for a 6 x 6 image.
"""

import argparse
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as ByteTokenizer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mini import world
from mini.forward import VIEW, patches_of, read, see, text_tables, to_pixels, vision_tables
from scorer import EvaClip, EvaClipConfig, Tokenizer, crop

SCORER = EvaClipConfig(embed_dim=128, image_size=112, patch_size=14, width=128, layers=4, head_width=32, mlp_ratio=4.0,
                       context=64, vocab=4096, text_width=96, text_heads=3, text_layers=2)
AROUND_SHARE = 0.35       # of the pretraining genera; the data set has 0.25
# Dials of the base policy, fixed by the rows full, random, center, zero-shot, noun rule and truth box alone (LOG.md).
SALIENT = 0.6                      # how often it shows the largest object of the category in place of the asked one
LOOSE = (-0.08, 0.2)               # how far an edge of its boxes is off outwards, in sides of the object
CROP_SHARE = (0.06, 0.14, 0.08)    # share of REGION: alone; more for each other object, for each companion
SLOTS = 5                          # objects of a scene that a question can name: the target and up to four


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="mini", help="folder that receives scorer/, policy/ and scorer2/")
    parser.add_argument("--only", choices=("scorer", "policy", "scorer2"), help="build one of the three")
    parser.add_argument("--seed", type=int, default=0, help="entities, pictures, weights and order are functions of it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw pictures")
    size = parser.add_argument_group("length of training")
    size.add_argument("--entities", type=int, default=1800, help="pretraining entities")
    size.add_argument("--scorer-steps", type=int, default=1100, help="contrastive steps")
    size.add_argument("--scorer2-steps", type=int, default=500, help="of the second scorer, with the seed after --seed")
    size.add_argument("--scorer-batch", type=int, default=192, help="entities a contrastive step, in whole families")
    size.add_argument("--scenes", type=int, default=24000,
                      help="scenes for the policy, each seen several times, mirrored and recoloured")
    size.add_argument("--tower-steps", type=int, default=1800, help="steps of 48 scenes, vision tower alone")
    size.add_argument("--answer-steps", type=int, default=2000, help="steps of 64 questions, everything")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None,
                        help="torch.compile the policy's two forwards: 3 times as fast on a CPU, needs a C++ compiler")
    return parser.parse_args(argv)


def schedule(step, steps, warmup=50, decay=0.5):
    """Learning-rate factor: linear warm-up, flat, then linear to 0 over the last `decay` share of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def bf16_if_fast():
    """Autocast to bfloat16 where the device multiplies it natively; elsewhere it is emulated, slower than float32."""
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


# --------------------------------------------------------------------------------------------------------- mini/scorer


def views_of(entity_index, entities, seed, size):
    """All training pictures of one entity: (references uint8 [R, size, size, 3], queries uint8 [S, size, size, 3]).

    References look like the knowledge base. Queries are what the scorer meets at test time: filled frames, cluttered
    scenes and crops of them around the target, generous and tight, because a policy's boxes are never exact.
    """
    entity = entities[entity_index]
    rng = np.random.default_rng([seed, 11, entity_index])
    others = world.some_others(entities, entity_index, rng)

    def plain(style):
        return shrink_to(world.photograph(entity, (), rng, style)[0], size)

    references = [plain("reference") for _ in range(6)]
    # Never a crop where the surroundings tell: it would teach that siblings, which look alike, are the same.
    if entity.around:
        return np.stack(references), np.stack([plain("around") for _ in range(6)])
    queries = [plain("filled") for _ in range(2)]
    for _ in range(6):
        image, objects, _ = world.photograph(entity, others, rng, "among")
        queries.append(shrink_to(image, size))
        queries += [shrink_to(crop(image, loosen(objects[0][1], rng)), size) for _ in range(2)]
    return np.stack(references), np.stack(queries)


def shrink_to(image, size):
    """What scorer.Preprocess does to the geometry: shortest side to `size`, centre crop; here kept as uint8."""
    scale = size / min(image.size)
    w, h = max(size, int(image.width * scale)), max(size, int(image.height * scale))
    left, top = round((w - size) / 2), round((h - size) / 2)
    return np.asarray(image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))


def loosen(box, rng):
    """A box as a policy would give it: every edge off by up to 12 % of the side inwards and 25 % outwards."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    dx1, dy1, dx2, dy2 = rng.uniform(-0.12, 0.25, 4)
    return max(0, x1 - dx1 * w), max(0, y1 - dy1 * h), min(world.SIDE, x2 + dx2 * w), min(world.SIDE, y2 + dy2 * h)


def article(entity, rng):
    """The candidate text that prepare.py makes of an entity, under a name of random letters: names must not carry
    meaning, for the data set's names are unknown to the scorer."""
    titles, texts = world.describe(entity)
    letters = "".join(rng.choice(list("abcdefghijklmnoprstuvwxyz"), int(rng.integers(4, 9))))
    return (titles[0] + "\n" + "\n".join(texts)).replace(entity.name, letters.capitalize() + " " + letters[::-1])


def contrast(a, b, scale):
    """Symmetric InfoNCE of matching rows of a and b [B, D], features normalised in float32."""
    logits = scale * F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T              # (B, B)
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def contrastive_batch(rng, families, bank, ids, count):
    """Entities in whole families (siblings are the hard negatives): references, queries, token ids."""
    chosen = rng.permutation(len(families))[:count // world.SIBLINGS]
    entities = np.concatenate([families[f] for f in chosen])
    references = np.stack([bank[e][0][rng.integers(len(bank[e][0]))] for e in entities])
    queries = np.stack([bank[e][1][rng.integers(len(bank[e][1]))] for e in entities])
    return references, queries, ids[entities, rng.integers(ids.shape[1])]


def draw_views(entities, args):
    """views_of for all entities, drawn in worker processes; a list."""
    start = time.time()
    draw = partial(views_of, entities=entities, seed=args.seed, size=SCORER.image_size)
    with ProcessPoolExecutor(args.workers) as pool:
        bank = list(pool.map(draw, range(len(entities)), chunksize=8))
    pictures = sum(len(references) + len(queries) for references, queries in bank)
    print(f"scorer: {pictures} pictures of {len(entities)} entities drawn in {time.time() - start:.0f} s", flush=True)
    return bank


def init_weights(model, seed=0):
    """An EvaClip's weights to train from, the same for the same seed whatever the global generator did. Returns it.

    Linear maps keep the size of their input (std = fan_in^-.5), and those that write into the residual stream are
    divided by sqrt(2 * layers), so depth does not blow it up. A fixed .02 starves widths near 100.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:  # norm weights and logit_scale stay as built; nn.Linear draws its biases
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
            continue
        if name.endswith(("cls_token", "pos_embed", "token_embedding.weight", "positional_embedding")):
            std = 0.02
        elif name == "text.text_projection":
            std = parameter.shape[0] ** -0.5  # (in, out)
        else:
            std = parameter[0].numel() ** -0.5
        if name.endswith(("attn.proj.weight", "fc2.weight")):
            std /= (2 * (model.config.layers if name.startswith("visual") else model.config.text_layers)) ** 0.5
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def scorer_optimizer(model):
    """AdamW with weight decay on matrices only: norms, biases and the logit scale have no reason to be small."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))


def second_scorer(args):
    """The arguments for mini/scorer2: other entities, pictures and first weights, and a shorter training."""
    return argparse.Namespace(**{**vars(args), "seed": args.seed + 1, "scorer_steps": args.scorer2_steps})


def train_scorer(args, device, name="scorer"):
    """Contrastive training of mini/scorer; writes <out>/<name>."""
    start, folder = time.time(), Path(args.out) / name
    entities = world.make_entities(args.entities, AROUND_SHARE, args.seed, universe="pretrain")
    bank = draw_views(entities, args)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)    # despite its name also for the CPU: stay in bf16
    rng = np.random.default_rng([args.seed, 12])
    tokenize = Tokenizer(SCORER.vocab, SCORER.context)
    # Four random names an entity: with one, the name itself could be learnt by heart.
    ids = torch.stack([tokenize([article(e, rng) for _ in range(4)]) for e in entities])            # (E, 4, T)
    families = np.array_split(np.arange(len(entities)), len(entities) // world.SIBLINGS)
    model = init_weights(EvaClip(SCORER), args.seed).to(device).train()
    optimizer = scorer_optimizer(model)
    for step in range(args.scorer_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(step, args.scorer_steps)
        batch = contrastive_batch(rng, families, bank, ids, args.scorer_batch)
        with sdpa_kernel(SDPBackend.MATH):     # on a CPU the fused kernel's backward takes 3 times as long
            loss, parts = scorer_loss(model, *batch, device)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))                                             # as CLIP does
        if step % 25 == 0 or step == args.scorer_steps - 1:
            numbers = " ".join(f"{k} {v:.3f}" for k, v in parts.items())
            print(f"scorer step {step} loss {loss.item():.3f} {numbers} {time.time() - start:.0f} s", flush=True)
        if step % 300 == 299:
            model.save(folder, torch.bfloat16)
    model.eval().save(folder, torch.bfloat16)


def scorer_loss(model, references, queries, ids, device):
    """Picture with picture, picture with text, and picture with their sum (Eq. 3), one third each."""
    with bf16_if_fast():
        images = model.encode_image(to_pixels(np.concatenate([references, queries]), device))       # (2B, D)
        reference, query = images.float().chunk(2)                                                  # (B, D) each
        text = model.encode_text(ids.to(device)).float()                                            # (B, D)
    fused, scale = reference + text, model.logit_scale.exp()                                        # Eq. 3
    losses = contrast(query, reference, scale), contrast(query, text, scale), contrast(query, fused, scale)
    hit = (F.normalize(query, dim=-1) @ F.normalize(fused, dim=-1).T).argmax(-1)                    # (B,) Eq. 4
    right = (hit == torch.arange(len(hit), device=device)).float().mean().item()
    numbers = {"image": losses[0].item(), "text": losses[1].item(), "fused": losses[2].item(), "top1": right}
    return sum(losses) / 3, numbers


# --------------------------------------------------------------------------------------------------- mini/policy: files


CATEGORIES, PATTERNS, COLOURS = world.CATEGORIES, world.PATTERNS, tuple(world.COLOURS)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]
# A short prompt: the stand-in learns its task from examples, and every token of a prompt is paid for on a CPU.
SYSTEM_PROMPT = "Decide FULL or REGION: does one region of the image rank the right candidate higher?"
REGION = ('{{"Decision": "REGION", "Tool": <tool_call>{{"name": "image_zoom_in_tool", "arguments": '
          '{{"bbox_2d": [{}, {}, {}, {}]}}}}</tool_call>}}')
FULL = '{"Decision": "FULL"}'
# The pre-tokeniser of Qwen2.5: words with one leading mark, single digits, runs of marks, blanks.
CUTS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Question before image, unlike the real model: in so small a model the visual tokens must know what is asked when they
# are read.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def question_texts():
    """Every question that the world can ask."""
    texts = []
    for category in CATEGORIES:
        looks = [{"pattern": p, "body": c, "accent": c} for p in PATTERNS for c in COLOURS]
        names = {name for look in looks for side in ("left", "right")
                 for same in ((), [look | {"pattern": None}, look | {"accent": None}])
                 for name in world.phrases(look, category, same, side)}
        names |= {world.phrases(look, category, [look])[0] for look in looks}
        questions = world.QUESTIONS[world.kind_of(category)]
        texts += [question.format(c=name) for question in questions for name in sorted(names)]
    return texts


def build_processor():
    """Tokenizer, image processor and chat template with Qwen2.5-VL's special tokens; nothing is downloaded."""
    tokenizer = ByteTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CUTS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # Two hundred times what every sequence holds, so that it becomes few tokens; a question stands here once.
    frame = [SYSTEM_PROMPT, "system", "user", "assistant", FULL, REGION.format(12, 34, 56, 78)]
    corpus = question_texts() + frame * 200
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL,
        show_progress=False))
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])        # single tokens, but not special: decoding keeps them
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL[1:])
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=VIEW * VIEW)
    return Qwen2_5_VLProcessor(images, fast, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def policy_config(tokenizer):
    """A Qwen2.5-VL of 3 million weights."""
    vision = dict(depth=4, hidden_size=128, intermediate_size=320, num_heads=4, patch_size=14, spatial_merge_size=2,
                  temporal_patch_size=2, window_size=112, fullatt_block_indexes=[0, 1, 2, 3], out_hidden_size=192)
    # rope_theta 10 with these sections: the image is 6 x 6 tokens, and with 1e6 the width axis would hardly turn.
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 10, 10]}
    text = dict(vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=1024,
                tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.pad_token_id,
                rope_parameters=rope)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def build_policy(tokenizer, seed):
    """policy_config's model with an initialisation that suits its width (transformers' 0.02 is made for thousands)."""
    model = Qwen2_5_VLForConditionalGeneration(policy_config(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            fan_in = p[0].numel()
            std = fan_in ** -0.5 if "visual" in name else 0.06
            if name.endswith(("attn.proj.weight", "down_proj.weight")) and "visual" in name:
                std /= math.sqrt(8)                                  # four blocks, each adds twice
            if "patch_embed" in name:
                std /= 2                    # neighbouring pixels and a still's two frames are alike: sums are large
            p.data = torch.randn(p.shape, generator=generator) * std
    return model


def save_policy(model, processor, folder):
    """Write the folder as a published checkpoint looks, weights in bfloat16, plus system_prompt.txt."""
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    half = {name: tensor.detach().to(torch.bfloat16).cpu() for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"}                             # tied to the embedding
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)
    (Path(folder) / "system_prompt.txt").write_text(SYSTEM_PROMPT, encoding="utf-8")


# -------------------------------------------------------------------------------------------------- mini/policy: scenes


def scene_of(index, entities, seed):
    """Training scene `index`: (uint8 [VIEW, VIEW, 3], boxes float32 [SLOTS, 4] in VIEW pixels, kinds int64 [SLOTS, 4],
    things int64). kinds: category, pattern, body's and accent's colour, as indices; -1 where the slot is empty.

    Slot 0 is the target; things counts all that stands beside it, companions included.
    """
    rng = np.random.default_rng([seed, 21, index])
    style = str(rng.choice(world.STYLES, p=(0.65, 0.15, 0.2)))
    fitting = [i for i, e in enumerate(entities) if bool(e.around) == (style == "around")]
    chosen = world.pick(rng, fitting)
    image, objects, things = world.photograph(entities[chosen], world.some_others(entities, chosen, rng), rng, style)
    boxes, kinds = np.zeros((SLOTS, 4), np.float32), np.full((SLOTS, 4), -1)
    for i, (entity, box) in enumerate(objects):
        boxes[i], look = np.array(box) * VIEW / world.SIDE, entity.look
        kinds[i] = (CATEGORIES.index(entity.category), PATTERNS.index(look["pattern"]), COLOURS.index(look["body"]),
                    COLOURS.index(look["accent"]))
    return np.asarray(image.resize((VIEW, VIEW), Image.Resampling.BICUBIC)), boxes, kinds, things


def draw_scenes(args, count):
    """`count` scenes as four stacked arrays, drawn in worker processes."""
    entities = world.make_entities(args.entities, AROUND_SHARE, args.seed, universe="pretrain")
    with ProcessPoolExecutor(args.workers) as pool:
        rows = list(pool.map(partial(scene_of, entities=entities, seed=args.seed), range(count), chunksize=64))
    return tuple(np.stack(column) for column in zip(*rows))


def augmented(bank, picks, rng, recolour):
    """Scenes `picks` mirrored and re-lit at random: images uint8 [B, VIEW, VIEW, 3], boxes [B, SLOTS, 4], kinds
    [B, SLOTS, 4], things [B]. A share `recolour` of them gets its colour channels shuffled: new scenes out of old ones,
    whose colours have no names (-1)."""
    images, boxes, kinds, things = (column[picks].copy() for column in bank)
    for i in range(len(picks)):
        if rng.random() < 0.5:
            images[i] = images[i, :, ::-1]
            x1, y1, x2, y2 = boxes[i].T                              # (SLOTS,) each
            boxes[i] = np.stack([VIEW - x2, y1, VIEW - x1, y2], 1)   # (SLOTS, 4)
        image = images[i]
        if rng.random() < recolour:
            image, kinds[i, :, 2:] = image[..., rng.permutation(3)], -1
        images[i] = np.minimum(image.astype(np.float32) * rng.uniform(0.75, 1.2), 255).astype(np.uint8)
    return images, boxes, kinds, things


def cell_targets(boxes, kinds, side):
    """What lies under the centre of each of side x side cells, row by row.

    Returns the category int64 [B, side^2] (0 = background, else its index + 1), pattern and two colours int64
    [B, side^2, 3] (-1: none or not known) and the distances from the centre to the left, top, right and bottom edge of
    its box, float32 [B, side^2, 4] in units of VIEW. Where boxes overlap, a smaller slot wins: the target stands first
    in the list and is drawn last.
    """
    centre = (np.arange(side) + 0.5) * VIEW / side
    x, y = np.tile(centre, side), np.repeat(centre, side)                                           # (side^2,)
    label = np.zeros((len(boxes), side * side), np.int64)
    look = np.full((len(boxes), side * side, 3), -1)
    relative = np.zeros((len(boxes), side * side, 4), np.float32)
    for slot in reversed(range(SLOTS)):
        x1, y1, x2, y2 = boxes[:, slot, :, None].transpose(1, 0, 2)                                 # (B, 1) each
        inside = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)                                        # (B, side^2)
        inside &= (kinds[:, slot, 0] >= 0)[:, None]
        label = np.where(inside, kinds[:, slot, :1] + 1, label)
        look = np.where(inside[..., None], kinds[:, slot, None, 1:], look)
        edges = np.stack([x - x1, y - y1, x2 - x, y2 - y], -1) / VIEW                               # (B, side^2, 4)
        relative = np.where(inside[..., None], edges, relative)
    return torch.from_numpy(label), torch.from_numpy(look), torch.from_numpy(relative.astype(np.float32))


# -------------------------------------------------------------------------------------------------- mini/policy: losses


# What is read under a cell: background or category, pattern, body's colour, accent's colour; four edges.
READ_OUTS = len(CATEGORIES) + 1, len(PATTERNS), len(COLOURS), len(COLOURS), 4


class Heads(nn.Module):
    """Read-outs that exist during pretraining only: category, look and box under a cell, is the cell asked for, where
    is the box. Half-way states are read too: that brings the gradient to the lower layers by a short way."""

    def __init__(self):
        super().__init__()
        outputs = sum(READ_OUTS)
        self.early, self.late, self.merged = nn.Linear(128, outputs), nn.Linear(128, outputs), nn.Linear(192, outputs)
        self.asked, self.box = nn.Linear(192, 1), nn.Linear(192, 4)


def cell_loss(prediction, label, look, relative):
    """Category's cross-entropy, plus .3 x that of the look, plus 3 x smooth L1 of the cell-relative box on foreground
    cells; and the accuracy of the category there.

    prediction: [B, cells, sum(READ_OUTS)]; label, look, relative: as cell_targets gives them.
    """
    kind, *looks, edges = prediction.float().split(READ_OUTS, -1)                   # (B, cells, n) each
    label, look, relative = (t.to(kind.device) for t in (label, look, relative))
    front = label > 0                                                               # (B, cells)
    loss = F.cross_entropy(kind.flatten(0, 1), label.flatten())
    loss = loss + 3 * F.smooth_l1_loss(edges[front], relative[front], beta=0.05)
    for prediction, target in zip(looks, look.unbind(-1)):
        known = (target >= 0).sum().clamp(min=1)
        loss = loss + 0.3 * F.cross_entropy(prediction.flatten(0, 1), target.flatten(), ignore_index=-1,
                                            reduction="sum") / known
    return loss, (kind.argmax(-1)[front] == label[front]).float().mean()


def block_major(x, side=VIEW // 14):
    """Row-major cells [B, side^2, ...] -> the order of patches_of."""
    g = side // 2
    return x.view(len(x), g, 2, g, 2, *x.shape[2:]).transpose(2, 3).reshape(x.shape)


def tower_loss(heads, early, late, merged, boxes, kinds):
    """Stage 1: what is where, read from the merged tokens (1), the patches before merging (.5) and halfway up (.25)."""
    fine = [block_major(t) for t in cell_targets(boxes, kinds, VIEW // 14)]
    loss, accuracy = cell_loss(heads.merged(merged), *cell_targets(boxes, kinds, VIEW // 28))
    return loss + 0.5 * cell_loss(heads.late(late), *fine)[0] + 0.25 * cell_loss(heads.early(early), *fine)[0], accuracy


def crop_share(kinds, things):
    """How often the stand-in crops a scene. kinds: [SLOTS, 4] of its objects; things: all that stands beside one."""
    others = int((kinds[:, 0] >= 0).sum()) - 1
    alone, object_more, companion_more = CROP_SHARE
    return alone + others * object_more + (int(things) - others) * companion_more


class Questions:
    """Token sequences [prompt | answer] for scenes, with soft decisions: what the stand-in decides is set by the number
    of things in the picture (CROP_SHARE)."""

    def __init__(self, processor):
        self.tokenizer = processor.tokenizer
        self.pad = self.tokenizer.pad_token_id
        self.prompts = {text: self._prompt(text) for text in question_texts()}
        answers = [self.tokenizer(text)["input_ids"] for text in (FULL, REGION.format(100, 100, 100, 100))]
        self.decision = next(i for i, (a, b) in enumerate(zip(*answers)) if a != b)     # index of the deciding token
        self.choices = answers[0][self.decision], answers[1][self.decision]             # FULL, REGION
        self.length = max(len(ids) for ids, _ in self.prompts.values()) + len(answers[1]) + 1
        self.digits = {self.tokenizer.convert_tokens_to_ids(d) for d in "0123456789"}

    def _prompt(self, text):
        """(token ids with 36 places for the image, index of the first of them)."""
        image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        messages = [{"role": "system", "content": SYSTEM_PROMPT},
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat = self.tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True,
                                                  tokenize=False)
        ids = self.tokenizer(chat)["input_ids"]
        at = ids.index(image)
        return ids[:at] + [image] * 36 + ids[at + 1:], at

    def _answer(self, box, rng):
        """Token ids of an answer with this box, drawn loosely; end of turn included."""
        sides = np.tile(box[2:] - box[:2], 2) * (-1, -1, 1, 1)
        x1, y1, x2, y2 = (int(v) for v in np.clip(np.round(box + sides * rng.uniform(*LOOSE, 4)), 0, VIEW))
        full = rng.random() < 0.08                                  # the few that teach how an answer ends after FULL
        text = FULL if full else REGION.format(x1, y1, x2, y2)
        return self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id]

    def _ask(self, boxes, kinds, rng):
        """A question about one object of a scene, the target half the time: (text, its slot, the slot that is shown).

        boxes: [SLOTS, 4]; kinds: [SLOTS, 4].
        """
        slots = np.flatnonzero(kinds[:, 0] >= 0)
        asked = 0 if rng.random() < 0.5 else int(rng.choice(slots))
        same = [int(s) for s in slots if s != asked and kinds[s, 0] == kinds[asked, 0]]
        looks = {s: {"pattern": PATTERNS[kinds[s, 1]], "body": COLOURS[kinds[s, 2]], "accent": COLOURS[kinds[s, 3]]}
                 for s in (asked, *same)}
        if any(looks[s]["pattern"] == looks[asked]["pattern"] and looks[s]["accent"] == looks[asked]["accent"]
               for s in same):
            return self._ask(boxes, kinds, rng)               # two that no words tell apart: never so of the target
        scaled = boxes * world.SIDE / VIEW
        side = world.side_of(scaled[asked], [scaled[s] for s in same])
        category = CATEGORIES[kinds[asked, 0]]
        name = world.pick(rng, world.phrases(looks[asked], category, [looks[s] for s in same], side))
        question = world.pick(rng, world.QUESTIONS[world.kind_of(category)])
        largest = max((asked, *same), key=lambda s: np.prod(boxes[s, 2:] - boxes[s, :2]))
        return question.format(c=name), asked, largest if rng.random() < SALIENT else asked

    def batch(self, boxes, kinds, things, rng):
        """One question a scene. Returns a dict of tensors: ids [B, T] padded at the end, weight [B, T] of each token in
        the loss; start of the image, start of the answer, digit (where the box head reads: the answer's first digit,
        that is the 2 of bbox_2d, or the decision of a FULL) int64 [B]; crop, the wanted share of REGION [B]; asked, the
        box of what is asked for, and box, of what is shown, [B, 4] in 0..1.
        """
        n, t = len(boxes), self.length
        out = {"ids": torch.full((n, t), self.pad), "weight": torch.zeros(n, t),
               **{name: torch.zeros(n, dtype=torch.long) for name in ("start", "answer", "digit")},
               "crop": torch.zeros(n), "asked": torch.zeros(n, 4), "box": torch.zeros(n, 4)}
        for i in range(n):
            text, asked, slot = self._ask(boxes[i], kinds[i], rng)
            prompt, at = self.prompts[text]
            answer = self._answer(boxes[i, slot], rng)
            begin, end = len(prompt), len(prompt) + len(answer)
            out["ids"][i, :end] = torch.tensor(prompt + answer)
            out["start"][i], out["answer"][i], out["crop"][i] = at, begin, crop_share(kinds[i], things[i])
            out["asked"][i], out["box"][i] = (torch.from_numpy(boxes[i, s]) / VIEW for s in (asked, slot))
            is_digit = [token in self.digits for token in answer]
            out["digit"][i] = begin + (is_digit.index(True) if any(is_digit) else self.decision)
            # The digits are what is hard; the template's tokens are learnt at any weight.
            out["weight"][i, begin:end] = torch.tensor([3.0 if d else 0.2 for d in is_digit])
            out["weight"][i, begin + self.decision] = 0             # the decision has a soft target of its own
        return out

    def positions(self, start):
        """mrope positions [3, B, T]: text counts on, the 6 x 6 visual tokens share a time and have row and column."""
        t = torch.arange(self.length).expand(len(start), -1)                                        # (B, T)
        offset = t - start[:, None]
        inside = (offset >= 0) & (offset < 36)
        after = torch.where(offset >= 36, t - 36 + 6, t)            # text after a 6 x 6 image goes on at start + 6
        rows, columns = torch.div(offset, 6, rounding_mode="floor"), offset % 6
        base = start[:, None].expand_as(t)
        return torch.stack([torch.where(inside, p, after) for p in (base, base + rows, base + columns)])   # (3, B, T)


def asked_cells(box):
    """Whose centre lies in the box: [B, 4] in 0..1 -> float [B, 36] over the 6 x 6 visual tokens."""
    centre = (torch.arange(6, device=box.device) + 0.5) / 6
    x, y = centre.repeat(6), centre.repeat_interleave(6)                                            # (36,)
    x1, y1, x2, y2 = box.split(1, 1)                                                                # (B, 1) each
    return ((x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)).float()                                    # (B, 36)


def answer_loss(model, heads, questions, batch, merged, device, reader=read):
    """Stage 2: tokens of the answer, the soft decision, which cells are asked for, and where the box is.

    batch: of Questions.batch; merged: visual tokens [B, 36, 192]; reader: `read` or a compiled one.
    Returns (weighted sum, dict of the four losses).
    """
    cos, sin = (t.to(merged.dtype) for t in text_tables(model, questions.positions(batch["start"]).to(device)))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    ids, embedding = batch["ids"], model.model.language_model.embed_tokens
    cell = batch["start"][:, None] + torch.arange(36, device=device)                                # (B, 36)
    cell = cell[..., None].expand(-1, -1, merged.shape[-1])                                         # (B, 36, 192)
    embeddings = embedding(ids).to(merged.dtype).scatter(1, cell, merged)                           # (B, T, 192)
    t = ids.shape[1]
    mask = torch.full((t, t), -1e4, device=device).triu(1).to(merged.dtype)    # padding is at the end: causal is enough
    middle, final = reader(model, embeddings, cos, sin, mask)
    logits = F.linear(final, embedding.weight).float()                                              # tied (B, T, V)
    weight = batch["weight"][:, 1:]                                                                 # (B, T - 1)
    token = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weight)
    row = torch.arange(len(ids), device=device)
    decide = logits[row, batch["answer"] + questions.decision - 1].log_softmax(-1)                  # (B, V)
    full, region = decide[:, questions.choices[0]], decide[:, questions.choices[1]]                 # (B,) each
    asked = heads.asked(middle.gather(1, cell))[..., 0].float()                                     # (B, 36)
    where = heads.box(final[row, batch["digit"] - 1]).float().sigmoid()                             # (B, 4)
    share = batch["crop"]
    losses = {"token": (token * weight).sum() / weight.sum(),
              "decision": -(share * region + (1 - share) * full).mean(),
              "asked": F.binary_cross_entropy_with_logits(asked, asked_cells(batch["asked"])),
              "box": (where - batch["box"]).abs().mean()}
    return losses["token"] + 0.5 * losses["decision"] + 0.7 * losses["asked"] + 3 * losses["box"], losses


# ------------------------------------------------------------------------------------------------ mini/policy: training


@dataclass
class Lessons:
    """What both stages of the policy's training share, and one step's loss of each."""

    model: Qwen2_5_VLForConditionalGeneration
    heads: Heads
    questions: Questions
    bank: tuple                    # of draw_scenes
    rng: np.random.Generator
    device: str
    eyes: Callable                 # `see` and `read`, compiled or not
    reader: Callable

    def __post_init__(self):
        self.tower = self.model.model.visual
        self.tables = [t.to(self.device) for t in vision_tables(self.tower)]

    def scenes(self, count, recolour):
        return augmented(self.bank, self.rng.integers(len(self.bank[0]), size=count), self.rng, recolour)

    def look(self, images):
        with bf16_if_fast():
            return self.eyes(self.tower, patches_of(images, self.device), *self.tables)

    def stage1(self):
        """What is where: the tower alone. Returns (loss, numbers to print)."""
        images, boxes, kinds, _ = self.scenes(48, recolour=0.5)
        with bf16_if_fast():
            loss, accuracy = tower_loss(self.heads, *self.look(images), boxes, kinds)
        return loss, {"loss": loss, "cells right": accuracy}

    def stage2(self):
        """Answers; with stage 1's loss beside it, or the tower would forget what is where."""
        images, boxes, kinds, things = self.scenes(64, recolour=0)
        batch = self.questions.batch(boxes, kinds, things, self.rng)
        with bf16_if_fast():
            early, late, merged = self.look(images)
            loss, parts = answer_loss(self.model, self.heads, self.questions, batch, merged, self.device, self.reader)
            cells, accuracy = tower_loss(self.heads, early, late, merged, boxes, kinds)
        return loss + 0.5 * cells, {**parts, "cells right": accuracy}


def train_policy(args, device):
    """Stage 1 teaches the tower what is where; stage 2 teaches both towers to answer. Writes <out>/policy."""
    start = time.time()
    bank = draw_scenes(args, args.scenes)
    print(f"policy: {args.scenes} scenes drawn in {time.time() - start:.0f} s", flush=True)
    processor = build_processor()
    model = build_policy(processor.tokenizer, args.seed).to(device)
    heads = Heads().to(device)
    eyes, reader = (torch.compile(see), torch.compile(read)) if args.compile else (see, read)
    rng = np.random.default_rng([args.seed, 22])
    lessons = Lessons(model, heads, Questions(processor), bank, rng, device, eyes, reader)

    def save():
        save_policy(model, processor, Path(args.out) / "policy")

    tower, language = model.model.visual, model.model.language_model
    groups = [(tower, 1.5e-3), (heads, 1.5e-3)]
    optimise("policy stage 1", lessons.stage1, groups, args.tower_steps, 0.4, start)
    groups = [(language, 1.5e-3), (tower, 2e-4), (heads, 1.5e-3)]   # the tower has learnt: it only adapts
    optimise("policy stage 2", lessons.stage2, groups, args.answer_steps, 0.5, start, save)
    save()


def optimise(name, step_loss, groups, steps, decay, start, save=None):
    """AdamW over (module, learning rate) groups; step_loss() gives (loss, numbers to print); save() every 300 steps."""
    groups = [{"params": list(module.parameters()), "peak": lr, "lr": lr} for module, lr in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.03, betas=(0.9, 0.98))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps, warmup=100, decay=decay)
        loss, numbers = step_loss()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}, step {step}: loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            values = " ".join(f"{k} {v.item():.3f}" for k, v in numbers.items())
            print(f"{name} step {step} {values} {time.time() - start:.0f} s", flush=True)
        if save and step % 300 == 299:
            save()


def main(argv=None):
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    if args.only in (None, "scorer"):
        train_scorer(args, device)
    if args.only in (None, "policy"):
        train_policy(args, device)
    if args.only in (None, "scorer2"):
        train_scorer(second_scorer(args), device, "scorer2")


if __name__ == "__main__":
    main()
