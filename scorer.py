"""The frozen scorer: Eq. 1-4 of the paper, the EVA-CLIP module behind them, and the pool files every stage reads.

A scorer turns images and texts into vectors of one space. A candidate is the normalised sum of its image vector and
its text vector (Eq. 3), a query is the normalised vector of the view that the policy chose (Eq. 1, 2), the score is
their cosine (Eq. 4). Nothing here learns during r-GRPO.

    from scorer import crop, fuse, load_scorer, scores
    scorer = load_scorer("mini/scorer")
    candidates = fuse(scorer.image_features(images), scorer.text_features(texts))           # [K, D]
    query = scorer.image_features([crop(image, (30, 10, 200, 180))])                        # [1, D]
    print(scores(query, candidates))                                                        # [1, K]

Simplified against the authors' code: attention is PyTorch's own (their xformers kernel computes the same). Weights are
read in both of their published forms and no code that comes with them is run. Other CLIPs come through open_clip. The
pool files of `prepare.py` are defined in the last part: one writer and one reader for each.
"""
import dataclasses
import difflib
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import re
import struct
import sys
import tokenize
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# The constants of every OpenAI-style CLIP; SigLIP's are .5 and belong to another loader.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
TOWERS = ("visual", "text")
POOL_VERSION = 1  # of the files in a data folder; raised when their meaning changes


# ---------------------------------------------------------------------------------------------- the EVA-CLIP module

@dataclass(frozen=True)
class EvaClipConfig:
    """Sizes of an EVA-CLIP. The defaults are EVA-CLIP-8B; 8B-448 changes image_size, 18B also sets postnorm."""
    embed_dim: int = 1280       # D of the shared space
    image_size: int | tuple[int, int] = 224  # pixels: one number, or (height, width)
    patch_size: int = 14        # pixels
    width: int = 4096           # vision tower
    layers: int = 32
    head_width: int = 128       # width / head_width heads
    mlp_ratio: float = 5.0
    postnorm: bool = False      # True: the norms follow attention and MLP instead of preceding them (18B)
    context: int = 77           # text tower: most tokens of a text, start and end included
    vocab: int = 49408          # rows of the token table; fewer = CLIP's BPE with its later merges left out (Tokenizer)
    text_width: int = 1280
    text_heads: int = 20
    text_layers: int = 32

    def __post_init__(self):
        for name, value, divisor in (("width", self.width, "head_width"), ("text_width", self.text_width, "text_heads"),
                                     ("image_size", self.image_hw[0], "patch_size"),
                                     ("image_size", self.image_hw[1], "patch_size")):
            if value % getattr(self, divisor):
                raise ValueError(f"EvaClipConfig: {name} {value} is no multiple of {divisor} {getattr(self, divisor)}")

    @property
    def image_hw(self):
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + 1e-6), no mean, no bias."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # Without the weight, so that the product follows the cast back to x's dtype, as in the reference: the other
        # order rounds differently in bf16. The kernel keeps the variance in fp32: 300^2 is beyond fp16.
        return self.weight * F.rms_norm(x, self.weight.shape, eps=1e-6)


class VisionAttention(nn.Module):
    """Full attention with one fused q|k|v matrix. EVA-CLIP-8B has no bias on q, k and v, only on proj."""

    def __init__(self, width, head_width):
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, -1, self.head_width)  # q|k|v, then heads: (B, T, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        x = F.scaled_dot_product_attention(q, k, v)  # scales by head_width^-.5
        return self.proj(x.transpose(1, 2).reshape(b, t, d))  # (B, T, width)


class VisionMLP(nn.Module):
    # Plain: the gated MLP (SwiGLU) belongs to EVA02, not to EVA-CLIP-8B.
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU: the tanh form is off by 4e-4


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.postnorm = config.postnorm
        self.norm1 = RMSNorm(config.width)
        self.attn = VisionAttention(config.width, config.head_width)
        self.norm2 = RMSNorm(config.width)
        self.mlp = VisionMLP(config.width, round(config.width * config.mlp_ratio))

    def forward(self, x):
        if self.postnorm:  # the sum itself is never normed, unlike the original transformer's post-norm
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).transpose(1, 2)  # patches row by row  (B, T, width)


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, w = config.image_hw
        tokens = (h // config.patch_size) * (w // config.patch_size)
        self.image_hw = (h, w)
        self.patch_embed = PatchEmbed(config)
        # One learned position a token, CLS included. No rotary or relative positions: those are EVA02's.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.embed_dim, bias=False)

    def forward(self, pixels):
        if tuple(pixels.shape[1:]) != (3, *self.image_hw):
            raise ValueError(f"pixel_values must be [B, 3, {self.image_hw[0]}, {self.image_hw[1]}], "
                             f"got {list(pixels.shape)}: use preprocess(image, size)")
        x = self.patch_embed(pixels)  # (B, T, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + T, width)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # only CLS is used, so only CLS is normed  (B, D)


class TextAttention(nn.Module):
    """Causal attention with the parameter names of nn.MultiheadAttention (here q, k and v do have biases)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(b, t, 3, self.heads, -1)  # (B, T, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).reshape(b, t, d))  # (B, T, width)


class TextMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class TextBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.text_width)  # eps 1e-5, while the vision tower has RMSNorm with 1e-6
        self.attn = TextAttention(config.text_width, config.text_heads)
        self.ln_2 = nn.LayerNorm(config.text_width)
        self.mlp = TextMLP(config.text_width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """Only holds the blocks: the checkpoint calls them text.transformer.resblocks.i."""

    def __init__(self, config):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(config) for _ in range(config.text_layers))


class TextTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.text_width)
        self.positional_embedding = nn.Parameter(torch.zeros(config.context, config.text_width))
        self.transformer = TextTransformer(config)
        self.ln_final = nn.LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim))  # (in, out)

    def forward(self, ids):
        if ids.shape[1] > len(self.positional_embedding):
            raise ValueError(f"{ids.shape[1]} tokens, but only {len(self.positional_embedding)} positions: "
                             "Tokenizer cuts a text to its context")
        # Fewer than `context` tokens are welcome: the mask is causal, so the rest would change nothing before it.
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]  # (B, T, width)
        for block in self.transformer.resblocks:
            x = block(x)
        # The end token has the largest id, so argmax finds its first occurrence whatever pads the rest.
        x = self.ln_final(x[torch.arange(len(x), device=x.device), ids.argmax(-1)])  # (B, width)
        return x @ self.text_projection  # (B, D)


class EvaClip(nn.Module):
    """EVA-CLIP in plain PyTorch, with the parameter names of the original checkpoint.

    encode_image(pixel_values [B, 3, H, W]) and encode_text(ids [B, T]) give un-normalised [B, D]: Eq. 3 adds the two
    before it normalises. `logit_scale` is a log; only contrastive training uses it (times exp(logit_scale)).
    towers: which of the two to build; the other is None (training embeds crops and no text).
    """

    def __init__(self, config, towers=TOWERS):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config) if "visual" in towers else None
        self.text = TextTower(config) if "text" in towers else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixel_values):
        return self.visual(pixel_values.to(self.visual.pos_embed.dtype))  # (B, D)

    def encode_text(self, ids):
        return self.text(ids)  # (B, D)

    def init_weights(self, seed=0):
        """Weights to train from, the same for the same seed whatever the global generator did. Returns self.

        Linear maps keep the size of their input (std = fan_in^-.5), and those that write into the residual stream
        are divided by sqrt(2 * layers), so depth does not blow it up. A fixed .02 starves widths near 100.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:  # norm weights and logit_scale stay as built; nn.Linear draws its biases
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            if name.endswith(("cls_token", "pos_embed", "token_embedding.weight", "positional_embedding")):
                std = 0.02
            elif name == "text.text_projection":
                std = parameter.shape[0] ** -0.5  # (in, out)
            else:
                std = parameter[0].numel() ** -0.5
            if name.endswith(("attn.proj.weight", "fc2.weight", "out_proj.weight", "c_proj.weight")):
                std /= math.sqrt(2 * (self.config.layers if name.startswith("visual") else self.config.text_layers))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def save(self, folder, dtype=None):
        """Write config.json and model.safetensors (in dtype, e.g. torch.bfloat16; None = as the weights are)."""
        os.makedirs(folder, exist_ok=True)
        tensors = {name: (t if dtype is None else t.to(dtype)).detach().cpu().contiguous()
                   for name, t in self.state_dict().items()}
        # safetensors, not torch.save: nothing that is loaded can run code.
        with replacing(os.path.join(folder, "model.safetensors")) as temporary:
            save_file(tensors, temporary)
        write_json(os.path.join(folder, "config.json"),
                   {"model_type": "eva_clip", "config": dataclasses.asdict(self.config)})

    @classmethod
    def load(cls, folder_or_file, device="cpu", dtype=None, towers=TOWERS):
        """Read an EVA-CLIP in any of its published forms, told apart by file and tensor names; nothing is executed.

        folder_or_file: a folder as save() writes it, a Hugging Face folder (.safetensors or .bin, sharded or not) or
        id, or one weight file (the original .pt, .safetensors, .bin). A config.json beside the weights gives the
        sizes; the released 8B, 8B-448, 8B-plus and 18B are known without one. If it asks for another square image
        size than the weights have, the positions are interpolated. dtype None keeps what the file holds. towers: those
        that are read; the other is None.

        Tensors are read from memory maps and cast one by one, so the peak of memory is the model in `dtype` and a few
        per cent. Raises FileNotFoundError or ValueError naming the file when a file is missing or cut short, is no
        EVA-CLIP, does not fit its config (all tensors at fault are listed), or holds NaN.
        """
        checkpoint = Checkpoint(_weight_files(_local(os.fspath(folder_or_file))))
        config = _model_config(checkpoint)
        with torch.device("meta"):  # no memory is spent on weights that are replaced at once
            model, whole = cls(config, towers), cls(config)
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        checkpoint.check(shapes, whole.state_dict())
        tensors = {name: checkpoint.read(name, shape, device, dtype) for name, shape in shapes.items()
                   if checkpoint.holds(name)}
        dtype = dtype or next(iter(tensors.values())).dtype
        # Optional in checkpoints; only contrastive training would use it.
        tensors.setdefault("logit_scale", torch.tensor(math.log(100.0), device=device, dtype=dtype))
        model.load_state_dict(tensors, assign=True)
        return model.eval()


# ------------------------------------------------------------------------------------------------------- checkpoints

KNOWN = ("Known are local folders and files with an EVA-CLIP (such as mini/scorer, which `make mini` builds), "
         "Hugging Face ids of one, open_clip:NAME/TAG, local-dir:FOLDER")
ELSE = "EVA02, SigLIP and other CLIPs are loaded by open_clip:NAME/TAG"  # what the user may have wanted
WEIGHT_ENDS = (".safetensors", ".pt", ".pth", ".bin")
# (width, layers) of the released models -> postnorm, the one setting that no tensor shows: EVA-CLIP-8B (and 8B-448,
# 8B-plus) and EVA-CLIP-18B.
RELEASED = {(4096, 32): False, (5120, 48): True}
# Settings of EvaClipConfig by their names in a Hugging Face config.json and in the original eva_clip json.
CONFIG_NAMES = {
    "vision_config": {"image_size": "image_size", "patch_size": "patch_size", "hidden_size": "width",
                      "num_hidden_layers": "layers", "post_layernorm": "postnorm"},
    "text_config": {"max_position_embeddings": "context", "vocab_size": "vocab", "hidden_size": "text_width",
                    "num_attention_heads": "text_heads", "num_hidden_layers": "text_layers"},
    "vision_cfg": {"image_size": "image_size", "patch_size": "patch_size", "width": "width", "layers": "layers",
                   "head_width": "head_width", "mlp_ratio": "mlp_ratio", "postnorm": "postnorm"},
    "text_cfg": {"context_length": "context", "vocab_size": "vocab", "width": "text_width", "heads": "text_heads",
                 "layers": "text_layers"},
}


class Checkpoint:
    """Weight files of an EVA-CLIP; every method takes the original parameter names, whatever the files call them.

    Tensors come from memory maps that are opened anew after each 100th of the bytes: a map's pages that were touched
    count as this process's memory until it closes, so one map for the whole load would cost the file's size.
    """

    def __init__(self, files):
        self.files, self._maps, self._touched = files, {}, 0
        self._limit = sum(os.path.getsize(file) for file in files) // 100
        self._file, self._shape, self._bytes = {}, {}, {}  # by the names as stored
        for file in files:
            for name, get in _open_weights(file).items():
                if name in self._file:
                    raise ValueError(f"{file}: tensor {name} is there twice, also in {self._file[name]}")
                tensor = get()
                self._file[name], self._shape[name], self._bytes[name] = file, tuple(tensor.shape), tensor.nbytes
        self.hugging_face = any(name.startswith("vision_model.") for name in self._file)
        if not self.hugging_face and not any(name.startswith("visual.") for name in self._file):
            raise ValueError(f"{self}: no EVA-CLIP; its tensors are called {sorted(self._file)[:3]}, not visual.* "
                             f"(original) or vision_model.* (Hugging Face); {ELSE}")

    def __str__(self):
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more shards"

    def _parts(self, name):
        return _hugging_face_names(name) if self.hugging_face else [name]

    def holds(self, name):
        """Are all parts of this tensor there?"""
        return all(part in self._file for part in self._parts(name))

    def shape(self, name):
        """Shape under its original name; None if it is not there, or its q, k and v do not fit each other."""
        if not self.holds(name):
            return None
        # On the meta device a view costs nothing, so one function tells both the shape and the content.
        views = [self._view(part, torch.empty(self._shape[part], device="meta")).shape for part in self._parts(name)]
        if len(views) == 1:
            return tuple(views[0])
        return (len(views) * views[0][0], *views[0][1:]) if len(set(views)) == 1 else None

    def _view(self, part, tensor):
        if part == "text_projection.weight":  # only Hugging Face has it; square in the 8B, so no shape would complain
            return tensor.T  # (D, width) -> (width, D)
        if part == "vision_model.embeddings.class_embedding":
            return tensor[None, None]
        return tensor[None] if part == "vision_model.embeddings.position_embedding.weight" else tensor

    def check(self, wanted, whole):
        """ValueError listing what is missing, unknown or of another shape. wanted {name: shape}: what will be read;
        whole: all names of the model, so that a tower that is not asked for is not unknown."""
        known = {part for name in whole for part in self._parts(name)}
        faults = {
            "missing": [part for name in wanted for part in self._parts(name)
                        if part not in self._file and name != "logit_scale"],
            "unknown": sorted(self._file.keys() - known),
            "of another shape than its config says": [
                f"{name} {self.shape(name)} instead of {shape}" for name, shape in wanted.items() if self.holds(name)
                and self.shape(name) != shape and not (name == "visual.pos_embed" and self._squares(shape))]}
        if any(faults.values()):
            told = "; ".join(f"{len(names)} {what}: {', '.join(names[:20])}{' ...' * (len(names) > 20)}"
                             for what, names in faults.items() if names)
            raise ValueError(f"{self}: the tensors are not those of this EVA-CLIP: {told}")

    def _squares(self, shape):
        """Can the stored positions be interpolated to `shape`? Only from a square to a square, as in the reference."""
        stored = self.shape("visual.pos_embed")
        return stored is not None and len(stored) == 3 and stored[2] == shape[2] and all(
            math.isqrt(n[1] - 1) ** 2 == n[1] - 1 for n in (stored, shape))

    def _tensor(self, part):
        """One stored tensor as a view of its file's memory map."""
        file = self._file[part]
        if self._touched + self._bytes[part] > self._limit:
            self._maps, self._touched = {}, 0
        if file not in self._maps:
            self._maps[file] = _open_weights(file)
        self._touched += self._bytes[part]
        return self._view(part, self._maps[file][part]())

    def read(self, name, shape, device, dtype):
        """The tensor under its original name, on `device` in `dtype` (None: as stored). ValueError if not finite."""
        parts = self._parts(name)
        first = self._tensor(parts[0])
        if not first.is_floating_point():  # quantised, say: without their scales the numbers mean nothing
            raise ValueError(f"{self._file[parts[0]]}: tensor {name} is of {first.dtype}, no floating-point numbers")
        out = torch.empty(shape, device=device, dtype=dtype or first.dtype)
        if self.shape(name) != shape:  # check() let only square grids of positions through
            out.copy_(_resize_positions(first.float(), shape))
        elif len(parts) == 1:
            out.copy_(first)  # casts on the way: no second copy in the file's dtype
        else:
            for part, rows in zip(parts, out.chunk(len(parts)), strict=True):  # q | k | v
                rows.copy_(self._tensor(part))
        # Smallest and largest show both NaN (they propagate it) and infinity, and need no second tensor, unlike
        # isfinite(out). After the cast, because fp16 ends at 65504.
        if not torch.isfinite(torch.stack(torch.aminmax(out))).all():
            raise ValueError(f"{self._file[parts[0]]}: tensor {name} holds NaN or infinity in {out.dtype}")
        return out


def _resize_positions(positions, shape):
    """Positions [1, 1 + g * g, width] -> shape [1, 1 + G * G, width]: bicubic over the grid, CLS untouched."""
    cls, grid = positions[:, :1], positions[:, 1:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(shape[1] - 1)
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, width, g, g)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)  # (1, width, G, G)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, 1 + G * G, width)


def _hugging_face_names(name):
    """What a Hugging Face folder calls a tensor of the original: one name, or three where q, k and v lie apart."""
    single = {
        "logit_scale": "logit_scale", "visual.head.weight": "visual_projection.weight",
        "visual.cls_token": "vision_model.embeddings.class_embedding",
        "visual.pos_embed": "vision_model.embeddings.position_embedding.weight",
        "visual.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
        "visual.norm.weight": "vision_model.post_layernorm.weight",
        "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text.ln_final.weight": "text_model.final_layer_norm.weight",
        "text.ln_final.bias": "text_model.final_layer_norm.bias", "text.text_projection": "text_projection.weight"}
    if name in single:
        return [single[name]]
    tower, layer, rest = re.fullmatch(r"(visual|text)\.(?:blocks|transformer\.resblocks)\.(\d+)\.(.+)", name).groups()
    start = f"{'vision' if tower == 'visual' else 'text'}_model.encoder.layers.{layer}."
    if rest in ("attn.qkv.weight", "attn.in_proj_weight", "attn.in_proj_bias"):
        return [f"{start}self_attn.{part}_proj.{'bias' if rest.endswith('bias') else 'weight'}" for part in "qkv"]
    module, kind = rest.rsplit(".", 1)
    renamed = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj",
               "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",  # vision; text:
               "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
               "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    return [f"{start}{renamed[module]}.{kind}"]


def _open_weights(path):
    """{name: function that gives the tensor} of one memory-mapped weight file, wrappers and prefixes taken off."""
    try:
        if path.endswith(".safetensors"):
            file = safe_open(path, framework="pt")
            tensors = {name: partial(file.get_tensor, name) for name in file.keys()}
        else:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            # Training programs wrap the weights, some twice: {"state_dict": {...}}, {"module": {"model": {...}}}.
            while wrapper := [content[key] for key in ("state_dict", "model", "module")
                              if isinstance(content, dict) and isinstance(content.get(key), dict)]:
                content = wrapper[0]
            tensors = {name: lambda tensor=tensor: tensor for name, tensor in
                       (content.items() if isinstance(content, dict) else ()) if isinstance(tensor, torch.Tensor)}
    # torch raises RuntimeError for what is no (whole) archive; its unpickler's error has no name of its own in torch.
    except (SafetensorError, RuntimeError, OSError, EOFError, torch.serialization.pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read, it is cut short or holds more than tensors "
                         f"({_brief(error)}); fetch it again, or save its tensors as safetensors") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return {_plain_name(name): tensor for name, tensor in tensors.items()
            if not name.endswith(("position_ids", "attn_mask"))}  # buffers of other programs, the same in all models


def _brief(error):
    """The message of another program's error on one line; theirs may list every tensor of a model."""
    return " ".join(str(error).split())[:500]


def _plain_name(name):
    """A stored name without the prefix of a parallel wrapper, and with `text.` where an older form leaves it out."""
    name = name.removeprefix("module.")
    older = name.split(".")[0] in ("token_embedding", "positional_embedding", "transformer", "ln_final")
    if older or name == "text_projection":
        return f"text.{name}"
    return "logit_scale" if name == "text.logit_scale" else name


def _weight_files(path):
    """Weight files of a checkpoint in a fixed order. FileNotFoundError naming each file that is missing."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing")
    if os.path.isfile(path):
        if not path.endswith(WEIGHT_ENDS):
            raise ValueError(f"{path}: not a weight file; those end in {', '.join(WEIGHT_ENDS)}")
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if os.path.isfile(os.path.join(path, name)):
            return [os.path.join(path, name)]
        if os.path.isfile(index := os.path.join(path, f"{name}.index.json")):
            files = [os.path.join(path, shard) for shard in _shards(index)]
            if missing := [file for file in files if not os.path.isfile(file)]:
                raise FileNotFoundError(f"{index}: {len(missing)} of {len(files)} shards are missing, fetch them: "
                                        f"{', '.join(missing)}")
            return files
    others = sorted(name for name in os.listdir(path) if name.endswith(WEIGHT_ENDS))
    if len(others) == 1:
        return [os.path.join(path, others[0])]
    # Two are not guessed between, and shards without their index may not be all there are.
    raise FileNotFoundError(f"{path}/model.safetensors is missing, and so are the other names of a checkpoint "
                            f"(model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json)"
                            + (f"; name one of its files: {', '.join(others)}" if others else ""))


def _shards(index):
    """Names of the weight files that an index.json lists, sorted."""
    files = read_json(index, "fetch it again").get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: its 'weight_map' is no object of tensor: file; fetch it again")
    return sorted(set(files.values()))


def _model_config(checkpoint):
    """EvaClipConfig of a checkpoint: from the config.json beside it in any of three forms, else from the tensors."""
    file = os.path.join(os.path.dirname(checkpoint.files[0]), "config.json")
    given = os.path.isfile(file)
    content = read_json(file, "fetch it again") if given else {}
    own = content.get("model_type") == "eva_clip" and "config" in content  # as save() writes it
    for name in ("config",) if own else content.keys() & CONFIG_NAMES.keys():
        if not isinstance(content[name], dict):
            raise ValueError(f"{file}: {name!r} is {content[name]!r}, expected an object of settings; fetch it again")
    if own:
        known = {field.name for field in dataclasses.fields(EvaClipConfig)}
        if unknown := sorted(content["config"].keys() - known):
            raise ValueError(f"{file}: unknown settings {unknown}; known are {sorted(known)}")
        return _build(content["config"], file)
    if given and not content.keys() & CONFIG_NAMES.keys():
        raise ValueError(f"{file}: model_type {content.get('model_type')!r}, and neither 'vision_config' (Hugging "
                         "Face) nor 'vision_cfg' (eva_clip) is in it: not the config of an EVA-CLIP")
    settings = _sizes(checkpoint)
    postnorm = RELEASED.get((settings["width"], settings["layers"]))
    if postnorm is None and not given:
        raise FileNotFoundError(f"{file} is missing, and weights of width {settings['width']} with "
                                f"{settings['layers']} layers are no released EVA-CLIP: write one as EvaClip.save does")
    settings["postnorm"] = bool(postnorm)  # False is the default of both forms of config
    settings.update(_settings(content, file))
    return _build(settings, file)


def _build(settings, file):
    # JSON has no tuples, and a frozen config with a list could not be compared by hash.
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    _check_numbers(settings, file)
    try:
        return EvaClipConfig(**settings)
    except ValueError as error:  # a width that its heads do not divide
        raise ValueError(f"{file}: {error}") from error


def _check_numbers(settings, file):
    """ValueError naming a setting that is not of its kind: null, a text, 0 ..., which arithmetic would trip over."""
    for name, value in settings.items():
        if name == "postnorm":
            if value not in (True, False, None):
                raise ValueError(f"{file}: {name} is {value!r}, expected true or false; fetch it again")
            continue
        kinds, wanted = ((int, float), "a number above 0") if name == "mlp_ratio" else ((int,), "whole and above 0")
        pair = name == "image_size" and isinstance(value, (tuple, list)) and len(value) == 2
        for number in value if pair else [value]:
            # By type, not isinstance: True is an int to Python.
            if type(number) not in kinds or not 0 < number < math.inf:
                raise ValueError(f"{file}: {name} is {value!r}, expected {wanted}; fetch it again")


def _settings(content, file):
    """What a Hugging Face or eva_clip config says, by our names. ValueError for a model that is built otherwise."""
    given = {ours: content[section][theirs] for section, names in CONFIG_NAMES.items() if section in content
             for theirs, ours in names.items() if theirs in content[section]}
    given.update({"embed_dim": content[name] for name in ("embed_dim", "projection_dim") if name in content})
    vision = content.get("vision_config", {})
    _check_numbers({**given, **{name: vision[name] for name in ("num_attention_heads", "intermediate_size")
                                if name in vision}}, file)
    if "num_attention_heads" in vision and "width" in given:
        given["head_width"] = given["width"] // vision["num_attention_heads"]
    if "intermediate_size" in vision and "width" in given:
        given["mlp_ratio"] = vision["intermediate_size"] / given["width"]
    # These change the features but no tensor's name or shape, so nothing else would notice.
    for section in (content, *(content[name] for name in CONFIG_NAMES if name in content)):
        wrong = [name for name in ("quick_gelu", "rope", "global_average_pool") if section.get(name)]
        wrong += [name for name, value in (("hidden_act", "gelu"), ("use_rms_norm", True))
                  if section.get(name, value) != value]
        if wrong:
            raise ValueError(f"{file}: {wrong[0]} = {section[wrong[0]]!r} is no EVA-CLIP-8B or 18B; {ELSE}")
    return given


def _sizes(checkpoint):
    """Settings that the shapes of the tensors tell. The text tower may be missing: then its defaults stay."""
    needed = ("visual.patch_embed.proj.weight", "visual.head.weight", "visual.pos_embed",
              "visual.blocks.0.mlp.fc1.weight")
    patch, head, positions, fc1 = (checkpoint.shape(name) for name in needed)
    if [shape and len(shape) for shape in (patch, head, positions, fc1)] != [4, 2, 3, 2]:
        missing = [name for name, axes in zip(needed, (4, 2, 3, 2)) if len(checkpoint.shape(name) or ()) != axes]
        raise ValueError(f"{checkpoint}: no EVA-CLIP, it has no {', '.join(missing)}; {ELSE}")

    def layers(name):
        return next(i for i in itertools.count() if not checkpoint.holds(name.format(i)))
    # 128 and 64 are the head widths of all released models; a config.json says otherwise where that is so.
    sizes = {"embed_dim": head[0], "patch_size": patch[2], "image_size": math.isqrt(positions[1] - 1) * patch[2],
             "width": patch[0], "layers": layers("visual.blocks.{}.norm1.weight"), "head_width": 128,
             "mlp_ratio": fc1[0] / patch[0]}
    text, table = (checkpoint.shape(f"text.{name}") for name in ("positional_embedding", "token_embedding.weight"))
    if text and table:
        sizes.update(context=text[0], text_width=text[1], text_heads=max(1, text[1] // 64), vocab=table[0],
                     text_layers=layers("text.transformer.resblocks.{}.ln_1.weight"))
    return sizes


def _local(name):
    """`name` itself, or the folder of the Hugging Face model of that id if nothing here is called so."""
    hub = not os.path.exists(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return _download(name) if hub else name


def _download(name):
    """Folder of a Hugging Face model in the local cache, fetched where it is not there yet: config, index and weights,
    no code. ValueError when it is neither there nor to be had."""
    # Imported here, not above: local folders need no hub.
    from huggingface_hub import snapshot_download
    try:
        folder = snapshot_download(name, allow_patterns=["config.json", "*.index.json"])
        # The index says which files belong together; a repository may hold the same weights in several forms.
        for weights in ("model.safetensors", "pytorch_model.bin"):
            index = os.path.join(folder, f"{weights}.index.json")
            shards = _shards(index) if os.path.isfile(index) else [weights]
            folder = snapshot_download(name, allow_patterns=["config.json", f"{weights}.index.json", *shards])
            if all(os.path.isfile(os.path.join(folder, shard)) for shard in shards):
                return folder
    except (OSError, ValueError) as error:  # what the hub raises offline, for an unknown id and for a bad one
        raise ValueError(f"unknown scorer {name!r}: no such folder here, and the Hugging Face hub gave: "
                         f"{_brief(error)}. {KNOWN}") from error
    raise ValueError(f"{name}: {folder} has neither model.safetensors nor pytorch_model.bin with all their shards; if "
                     "the model itself has them, go online to fetch them")


# ------------------------------------------------------------------------------------------- what goes into the model

class Tokenizer:
    """CLIP's byte-pair tokenizer (open_clip's): `context` ids a text, padded with 0; a long text is cut.

    vocab < 49408 keeps the first merges only: ids 0..vocab-3 mean what they mean in CLIP, vocab-2 is the start and
    vocab-1 the end. Every text can still be written, in more pieces. A table of 49,408 rows would be most of a tiny
    model's size, and a table of chosen words would have unknown ones.
    """

    def __init__(self, vocab=49408, context=77):
        # Imported here, not above: open_clip takes seconds to import, and reading a pool file does not need it.
        from open_clip.tokenizer import SimpleTokenizer
        if not 514 <= vocab <= 49408:
            raise ValueError(f"vocab {vocab}: CLIP's tokenizer has 514 (bytes, start, end) to 49408 ids")
        self.context = context
        self._bpe = SimpleTokenizer()
        if vocab < 49408:
            # Ids are 256 bytes, 256 bytes that end a word, then one id a merge in order of rank, then start and end.
            merges = vocab - 514
            self._bpe.bpe_ranks = {pair: rank for pair, rank in self._bpe.bpe_ranks.items() if rank < merges}
            for new, special in ((vocab - 2, "<start_of_text>"), (vocab - 1, "<end_of_text>")):
                self._bpe.encoder[special] = new
            self._bpe.sot_token_id, self._bpe.eot_token_id = vocab - 2, vocab - 1

    def __call__(self, texts):
        """list of str -> int64 ids [B, context]."""
        return self._bpe(list(texts), context_length=self.context)


def as_rgb(image):
    """PIL image of any mode -> RGB with 8 bits a channel. Transparent parts become white, as a page shows them."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        # 16 bits: convert() would clip everything above 255 to white. Pillow opens some of them as 32-bit "I".
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save it with 8 bits a channel")
        deep = image.mode != "I" or values.max() > 255
        image = Image.fromarray((values // 256 if deep else values).astype(np.uint8))
    if image.has_transparency_data:
        # convert("RGB") alone would show whatever colour lies under the transparent parts, mostly black.
        below = Image.new("RGBA", image.size, "white")
        below.alpha_composite(image.convert("RGBA"))
        image = below
    return image.convert("RGB")


def preprocess(image, size, mean=PIXEL_MEAN, std=PIXEL_STD, resize="shortest", interpolation="bicubic"):
    """PIL image -> float32 [3, size, size] for an image encoder: RGB, resize, mean and std. size: or (height, width).

    resize "shortest": the shortest side becomes `size`, then centre crop (EVA-CLIP, CLIP), so an image that is not
    square loses its ends, as in the reference; "squash": both sides become `size` (SigLIP). interpolation: "bicubic" or
    "bilinear", Pillow's, with antialiasing. Every step is Pillow's or numpy's, so threads do not wait for each other.
    """
    image = as_rgb(image)  # first: bicubic on palette indices would invent colours
    h, w = (size, size) if isinstance(size, int) else size
    filtered = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    image = image.resize((w, h), filtered) if resize == "squash" else _resize_and_crop(image, h, w, filtered)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # (h, w, 3)
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (3, h, w)


def _resize_and_crop(image, h, w, filtered):
    """PIL image with its shortest side (against h : w) resized to h or w, then cropped around its centre."""
    # The shorter side becomes exact, the other int() of the exact quotient, as torchvision's Resize.
    if w * image.height >= h * image.width:
        new_w, new_h = w, int(w * image.height / image.width)
    else:
        new_w, new_h = int(h * image.width / image.height), h
    # round(), as torchvision: halves go to the even side. Hugging Face's processor floors, half a pixel beside it.
    left, top = int(round((new_w - w) / 2)), int(round((new_h - h) / 2))
    if max(new_w, new_h) > 16 * max(w, h):
        # A sliver, such as a box one pixel wide, would be blown up to gigabytes: resize only the part that stays. Not
        # done for all images, because Pillow rounds such a part differently (a few grey levels on noise).
        part = (left * image.width / new_w, top * image.height / new_h,
                (left + w) * image.width / new_w, (top + h) * image.height / new_h)
        return image.resize((w, h), filtered, box=part)
    return image.resize((new_w, new_h), filtered).crop((left, top, left + w, top + h))


@contextmanager
def replacing(path):
    """Yield a temporary name beside `path`; on success it becomes `path` at once, so no reader sees half a file."""
    temporary = f"{path}.tmp"
    yield temporary
    os.replace(temporary, path)


def hold(folder, flag):
    """Lock a folder that is about to be written -> an open file: closing it lets go, and so does the kernel when the
    process ends, however it ends. ValueError, naming the process, where another one writes there; flag: what names
    another folder. The file `lock` stays: removing it would let a third process lock a new one while a second waits
    with the old one open."""
    file = open(os.path.join(folder, "lock"), "a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise ValueError(f"{folder} is in use by {file.read().decode().strip() or 'another process'}: wait for its "
                             f"end, stop it, or choose another {flag}") from None
    except OSError as error:  # some network file systems have no locks
        print(f"{folder} cannot be locked ({error}): take care that no second process writes there", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    return file


def read_json(path, remedy):
    """The object that a JSON file holds. FileNotFoundError or ValueError, each naming the file and what to do."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
            raise ValueError(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object: {remedy}")
    return content


def write_json(path, obj):
    """Write obj as indented JSON, atomically."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(obj, file, indent=1, ensure_ascii=False)
        file.write("\n")


def write_array(path, array):
    """Write an array as .npy, atomically. Raises ValueError when a float array holds NaN or infinity: float16 ends at
    65504, and a feature that fell over that edge must not come back as a score."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path}: {np.count_nonzero(~np.isfinite(array))} values are not finite in {array.dtype}; "
                         "the scorer's features overflow or it is broken")
    # np.save gets a file handle: to a name it would append .npy.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


# What Pillow's readers were seen to raise on damaged bytes; UnidentifiedImageError is an OSError.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, LookupError, ArithmeticError,
           AttributeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path):
    """Path -> PIL RGB image, every pixel decoded. FileNotFoundError or ValueError, each naming the file.

    Upright: the camera's EXIF orientation is applied, as browsers do, so boxes are in the pixels that a viewer shows.
    Of an animation the first frame; transparent parts become white; 16 bits become 8. Larger than Pillow's limit
    against decompression bombs (179 million pixels) is an error.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"image {path} is missing")
    try:
        with Image.open(path) as image:
            image.load()  # decodes it: open() reads the header only, and a cut file shows itself here
            ImageOps.exif_transpose(image, in_place=True)
            return as_rgb(image)
    except DAMAGED as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def image_size(path):
    """(width, height) of the image that read_image would give, from the header alone. Raises what Pillow does."""
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter: sides change places
        # Pillow turns a TIFF itself, and says its upright size as soon as it is open.
        return image.size[::-1] if turned and image.format != "TIFF" else image.size


# ------------------------------------------------------------------------------------------------------- Eq. 1 to 4

def crop(image, box):
    """g(I, b) of Eq. 1: the part of a PIL image inside box = (x1, y1, x2, y2).

    box: floats in pixels of *this* image, right and bottom exclusive; rounded outward to whole pixels, so a box never
    loses what it touches, and clamped to the image. ValueError when nothing is left (or a number is not finite): a
    policy's box is checked where it is parsed, so an empty one here is a mistake of the caller.
    """
    x1, y1, x2, y2 = (float(v) for v in box)
    if not all(math.isfinite(v) for v in (x1, y1, x2, y2)) or x2 <= x1 or y2 <= y1:
        raise ValueError(f"box {tuple(box)} is empty or not finite; expected x1 < x2, y1 < y2")
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    right, bottom = min(image.width, math.ceil(x2)), min(image.height, math.ceil(y2))
    if right <= left or bottom <= top:
        raise ValueError(f"box {tuple(box)} lies outside the image of {image.width} x {image.height} pixels")
    return image.crop((left, top, right, bottom))  # Eq. 1, d = REGION


def normalise(x):
    """x / |x| along the last axis, float32. ValueError for a zero or non-finite vector: it has no direction."""
    x = np.asarray(x, dtype=np.float32)  # float16 squares overflow from 256 on
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    if not np.isfinite(length).all() or (length == 0).any():
        bad = np.count_nonzero(~np.isfinite(length) | (length == 0))
        raise ValueError(f"{bad} of {length.size} feature vectors are zero or not finite and cannot be normalised")
    return x / length


def fuse(image_features, text_features=None):
    """Candidate vectors of Eq. 3 from un-normalised [..., D], and [..., D] or None -> float32 [..., D], length 1.

    [t != empty] f_T(t): text_features None means no candidate has text, a row of zeros that this one has none.
    The sum comes before the norm, so the longer of the two features weighs more; normalising each first would not
    be Eq. 3.
    """
    total = np.asarray(image_features, dtype=np.float32)
    if text_features is not None:
        total = total + np.asarray(text_features, dtype=np.float32)
    return normalise(total)  # Eq. 3


def scores(query, candidates):
    """Cosine of query [..., D] with candidates [..., K, D] -> float32 [..., K]; leading axes broadcast.

    So one pool [K, D] serves the N views of a query [N, D]. Vectors of any length: both are normalised here.
    """
    query, candidates = normalise(query), normalise(candidates)  # Eq. 2
    return (candidates @ query[..., None])[..., 0]  # Eq. 4: [..., K, D] x [..., D, 1] -> [..., K]


# ----------------------------------------------------------------------------------------------------------- scorers

class Scorer:
    """What load_scorer returns: PIL images and strings in, un-normalised float32 numpy features out.

    name: as given to load_scorer. identity: "label@hash" over weights and settings, equal for equal ones wherever the
    files lie; it is written into every pool and checked against it. dim: D. batch_size: images or texts a forward pass.
    """

    def __init__(self, name, device, dtype, batch_size=64):
        self.name, self.device, self.batch_size = name, torch.device(device), batch_size
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise ValueError(f"scorer {name}: no dtype {dtype!r}; use float32, bfloat16 or float16 (--scorer-dtype)")
        dtype = known
        if dtype is None:  # bf16 halves the memory of 8 B weights; on a CPU it is slower than fp32
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = dtype
        # Each kind sets these: model, dim, label and settings (for the identity), files, preprocess, encode_texts.

    @cached_property
    def identity(self):
        """label @ first 12 hex digits of the sha256 over settings and weight files (computed once, when asked for)."""
        digest = hashlib.sha256(self.settings)  # they count: postnorm or a mean change features without any weight
        for path in self.files:  # of the bytes, not of file name and time: a copied or touched model stays the same
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return f"{self.label}@{digest.hexdigest()[:12]}"

    def image_features(self, images):
        """list of PIL images of any size -> float32 [B, D]."""
        batches = [images[start:start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        return self._joined(self.image_batches(batches))

    def image_batches(self, batches):
        """Iterable of lists of PIL images -> iterator of their features, float32 [len(list), D] each.

        While one list is encoded, a thread fetches the next from the iterable, so an iterator that opens its images as
        it goes decodes them meanwhile, and worker threads preprocess it (Pillow and numpy release Python's lock).
        """
        batches = iter(batches)
        with ThreadPoolExecutor(1) as feeder, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
            def fetch():
                images = next(batches, None)
                # Stacked here, beside the encoder; a card copies pinned memory faster.
                pixels = torch.stack(list(workers.map(self.preprocess, images))) if images else images
                return pixels.pin_memory() if images and self.device.type == "cuda" else pixels  # [B, 3, H, W]
            coming = feeder.submit(fetch)
            while (pixels := coming.result()) is not None:
                coming = feeder.submit(fetch)
                yield self._encoded(self.model.encode_image, pixels) if len(pixels) else self._joined([])

    def text_features(self, texts):
        """list of str -> float32 [B, D]. An empty string has a feature too; whoever fuses decides that it has none."""
        starts = range(0, len(texts), self.batch_size)
        return self._joined(self.encode_texts(texts[start:start + self.batch_size]) for start in starts)

    @torch.inference_mode()
    def _encoded(self, encode, batch):
        batch = batch.to(self.device, non_blocking=True)
        if batch.is_floating_point():
            batch = batch.to(self.dtype)
        return encode(batch).float().cpu().numpy()  # [B, D]

    def _joined(self, parts):
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])  # [B, D], also of no part

    def activation_bytes(self, count):
        """Bytes for a moment, when `count` images are encoded: residual, norm and the wider of attention and MLP."""
        patches = next(m for m in self.model.visual.modules() if isinstance(m, nn.Conv2d))
        widest = max(m.out_features for m in self.model.visual.modules() if isinstance(m, nn.Linear))
        h, w = self.image_hw
        tokens = min(count, self.batch_size) * ((h // patches.stride[0]) * (w // patches.stride[1]) + 1)
        width = patches.out_channels
        return int(tokens * self.dtype.itemsize * (2 * width + max(4 * width, 2 * widest)))


class EvaClipScorer(Scorer):
    """A Scorer over our EVA-CLIP. The text tower is loaded when the first text comes: training embeds crops only."""

    def __init__(self, name, path, device="cpu", dtype=None):
        super().__init__(name, device, dtype)
        self.path, self.files = path, _weight_files(path)
        self.model = EvaClip.load(path, self.device, self.dtype, towers=("visual",))
        self.dim, self.image_hw = self.model.config.embed_dim, self.model.config.image_hw
        self.preprocess = partial(preprocess, size=self.image_hw)
        config = os.path.join(os.path.dirname(self.files[0]), "config.json")
        self.settings = b""
        if os.path.isfile(config):
            with open(config, "rb") as file:
                self.settings = file.read()
        stem = os.path.basename(path).rsplit(".", 1)[0] if os.path.isfile(path) else ""
        # A folder is named after its model, a file too unless it has the name that it has in every folder. Of a Hugging
        # Face model the id counts: its folder in the cache is called by a hash.
        folder = os.path.dirname(os.path.abspath(path)) if stem else os.path.abspath(name)
        self.label = stem if stem not in ("", "model", "pytorch_model") else os.path.basename(folder)

    @cached_property
    def tokenizer(self):
        return Tokenizer(self.model.config.vocab, self.model.config.context)

    def encode_texts(self, texts):
        if self.model.text is None:
            self.model.text = EvaClip.load(self.path, self.device, self.dtype, towers=("text",)).text
        ids = self.tokenizer(texts)  # (B, context)
        # Attention is causal and the feature is read at the end token, so the columns after the last end change
        # nothing and most of the work is saved. The largest id is the end, hence argmax.
        return self._encoded(self.model.encode_text, ids[:, :int(ids.argmax(-1).max()) + 1])


class OpenClipScorer(Scorer):
    """A Scorer over any model of open_clip: CLIP, SigLIP, SigLIP2, EVA02 ..., with its own statistics and tokenizer.

    name: see load_scorer. Where open_clip only warns, or falls back in silence, this acts: weights trained with quick
    GELU always get it, and pixel statistics are those the weights were published with, or the name is refused.
    """

    def __init__(self, name, device="cpu", dtype=None):
        # Imported here, not above: it takes seconds, and the default scorer needs its tokenizer at most.
        import open_clip
        super().__init__(name, device, dtype)
        self.source, weights, pixels, quick = _open_clip_folder(name) if _is_open_clip_folder(name) \
            else _open_clip_model(name)
        try:
            model = open_clip.create_model(
                self.source, pretrained=None if self.source.startswith("local-dir:") else weights, device="cpu",
                force_quick_gelu=quick, force_preprocess_cfg=pixels, require_pretrained=True)
        # A state that does not fit is a RuntimeError; the others come from damaged files and offline tokenizers.
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, SafetensorError,
                torch.serialization.pickle.UnpicklingError) as error:
            raise ValueError(f"{weights}: cannot be loaded as open_clip's {self.source}: {_brief(error)}") from error
        if broken := [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]:
            raise ValueError(f"{weights}: {len(broken)} tensors hold NaN or infinity, first {broken[:3]}")
        self.model = model.to(self.device, self.dtype).eval()
        config, pixels = open_clip.get_model_config(self.source), model.visual.preprocess_cfg
        if pixels["resize_mode"] not in ("shortest", "squash"):
            raise ValueError(f"{name}: resize mode {pixels['resize_mode']!r} is not known, only shortest and squash")
        if pixels["interpolation"] not in ("bicubic", "bilinear"):
            raise ValueError(f"{name}: interpolation {pixels['interpolation']!r} is not known, only bicubic and "
                             "bilinear")
        size = pixels["size"]
        self.image_hw = (size, size) if isinstance(size, int) else tuple(size)
        self.preprocess = partial(preprocess, size=self.image_hw, mean=pixels["mean"], std=pixels["std"],
                                  resize=pixels["resize_mode"], interpolation=pixels["interpolation"])
        self.dim, self.files = config["embed_dim"], [weights]
        self.settings = json.dumps([config, quick, pixels], sort_keys=True).encode()
        self.label = os.path.basename(os.path.abspath(self.source.removeprefix("local-dir:")))

    @cached_property
    def tokenizer(self):
        from open_clip import get_tokenizer
        try:
            return get_tokenizer(self.source)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.name}: its tokenizer is not here and cannot be fetched ({_brief(error)}); go "
                             "online once, or put model, open_clip_config.json and tokenizer into one folder and use "
                             "local-dir:FOLDER") from error

    def encode_texts(self, texts):
        return self._encoded(self.model.encode_text, self.tokenizer(texts))


def _is_open_clip_folder(name):
    return name.startswith("local-dir:") or os.path.isfile(os.path.join(name, "open_clip_config.json"))


def _open_clip_folder(name):
    """local-dir:FOLDER -> (open_clip's name of it, weight file, None, False): a folder brings its own settings."""
    folder = name.removeprefix("local-dir:")
    file = os.path.join(folder, "open_clip_config.json")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file} is missing: an open_clip folder has it and the weights")
    content = read_json(file, "fetch it again")
    # open_clip would take CLIP's statistics for a SigLIP whose config forgot its own.
    model, pixels = content.get("model_cfg"), content.get("preprocess_cfg")
    if not isinstance(model, dict) or not isinstance(pixels, dict) or {"mean", "std", "resize_mode"} - pixels.keys():
        raise ValueError(f"{file}: needs model_cfg, and preprocess_cfg with mean, std and resize_mode")
    # open_clip's own order of preference; where none of these is there it would take any, we only a single one.
    there = [file for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
                               "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors",
                               "pytorch_model.bin", "pytorch_model.pth", "model.pth")
             if os.path.isfile(os.path.join(folder, file))]
    there = there or [file for file in os.listdir(folder) if file.endswith((".safetensors", ".bin", ".pth"))]
    if not there or (len(there) > 1 and not there[0].startswith(("open_clip_", "model.", "pytorch_model."))):
        raise FileNotFoundError(f"{folder}: no open_clip_model.safetensors, and {sorted(there)} beside its config")
    return f"local-dir:{folder}", os.path.join(folder, there[0]), None, False


def _open_clip_model(name):
    """open_clip:NAME/TAG, NAME/FILE or NAME/TAG=FILE -> (NAME, weight file, pixel statistics, quick GELU?)."""
    import open_clip
    model, _, rest = name.removeprefix("open_clip:").partition("/")
    config = open_clip.get_model_config(model)
    if config is None:
        close = difflib.get_close_matches(model, open_clip.list_models(), 5, 0.3)
        raise ValueError(f"{name}: open_clip has no model {model!r}; close are {close}")
    published = {tag: open_clip.get_pretrained_cfg(model, tag)
                 for tag in open_clip.list_pretrained_tags_by_model(model)}
    tag, _, file = rest.partition("=")
    if tag not in published:
        tag, file = "", rest  # a file's name may hold a "="
    elif not file:
        file = _open_clip_download(name, published[tag])
    if not os.path.isfile(file):
        raise ValueError(f"{name}: {file!r} is no file and no tag of {model}; its tags are {sorted(published)}")
    if tag:
        return model, file, _pixels(published[tag]), bool(published[tag].get("quick_gelu"))
    # A bare file says nothing of its training. NAME says which GELU; the statistics must be the same in all weights
    # published for NAME and that GELU, else the file could belong to either.
    quick = bool(config.get("quick_gelu"))
    same = [_pixels(cfg) for cfg in published.values() if bool(cfg.get("quick_gelu")) == quick]
    plain_openai = "openai" in os.path.basename(file) and not quick
    if published and (plain_openai or any(pixels != same[0] for pixels in same) or not same):
        raise ValueError(f"{name}: the file does not say which GELU and pixel statistics it was trained with, and the "
                         f"weights published for {model} differ; name the tag that it is: open_clip:{model}/TAG={file} "
                         f"with TAG one of {sorted(published)}")
    return model, file, same[0] if same else None, quick


def _pixels(published):
    return {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")}


def _open_clip_download(name, published):
    from open_clip import download_pretrained
    try:
        return download_pretrained(published)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: its weights are not here and cannot be fetched ({_brief(error)}); go online, or "
                         f"give the file as {name}=FILE") from error


def load_scorer(name, device="cpu", dtype=None):
    """The scorer called `name`:

    FOLDER or FILE             an EVA-CLIP in any form that EvaClip.load reads, such as mini/scorer
    BAAI/EVA-CLIP-8B           Hugging Face id of an EVA-CLIP: from the cache, or fetched
    open_clip:NAME/TAG         a published model of open_clip, such as open_clip:ViT-L-14/openai: fetched
    open_clip:NAME/FILE        weights of NAME in a file; open_clip:NAME/TAG=FILE says which weights they are
    local-dir:FOLDER           an open_clip folder (open_clip_config.json and weights), SigLIP with its tokenizer

    dtype: a torch.dtype or its name ("bfloat16"); None is bfloat16 on CUDA and float32 on a CPU. Returns a Scorer:
    .name, .identity, .dim, .batch_size, .image_features(list of PIL), .image_batches(lists of PIL) and
    .text_features(list of str). ValueError for a name that is nothing known.
    """
    if name.startswith("open_clip:") or _is_open_clip_folder(name):
        return OpenClipScorer(name, device, dtype)
    path = _local(name)
    if not os.path.exists(path):
        raise ValueError(f"unknown scorer {name!r}: no such folder here, and no Hugging Face id. {KNOWN}")
    return EvaClipScorer(name, path, device, dtype)


# -------------------------------------------------------------------------------------------------------- pool files

@dataclass
class Query:
    """One line of {split}.jsonl: a query and its fixed pool of K candidates, best retrieved first."""
    query_id: str
    image: str               # path relative to the manifest's root
    question: str
    pool: list[int]          # [K] lines of kb.jsonl (entities), all distinct
    pool_image: list[int]    # [K] rows of kb_image.npy, one image of each entity
    labels: list[int]        # [K] 1 = positive, 0 = not
    retrieval: list[float]   # [K] cosine of the full query image with the entity's best image, descending
    # entity_ids of the right answers, in the pool or not: intervals are resampled by entity, misses included.
    positives: list[str] = dataclasses.field(default_factory=list)
    row: int = -1            # line number from 0 = row of {split}_full.npy; set by read_pool, not stored


def write_pool(path, queries):
    """Write queries as one JSON line each, atomically; checks what read_pool checks."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number, query in enumerate(queries, 1):
            _check_query(query, len(queries[0].pool), f"{path}:{number}")
            fields = dataclasses.asdict(query)
            del fields["row"]
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def read_pool(path):
    """{split}.jsonl -> list of Query, all with the same K. ValueError naming file:line for a line that is not right."""
    names = {field.name for field in dataclasses.fields(Query)} - {"row"}
    queries = []
    with open(path, "rb") as file:
        for row, line in enumerate(file):
            where = f"{path}:{row + 1}"
            try:
                fields = json.loads(line.decode())
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
                raise ValueError(f"{where}: not JSON ({error}); run prepare.py again") from error
            # Unknown fields are refused too: a file of a later version must not be half understood.
            if not isinstance(fields, dict) or fields.keys() != names:
                raise ValueError(f"{where}: a query has exactly the fields {sorted(names)}; run prepare.py again")
            query = Query(**fields, row=row)
            _check_query(query, len(queries[0].pool) if queries else None, where)
            queries.append(query)
    return queries


def _check_query(query, k, where):
    """ValueError naming `where` unless types, lengths (k, if known) and values are what Query promises."""
    def problem():
        for name in ("query_id", "image", "question"):
            if not isinstance(getattr(query, name), str) or not getattr(query, name):
                return f"{name} must be a text that is not empty"
        # A stranger's pools must not have files of this machine shown in a contact sheet or a report.
        if os.path.isabs(query.image) or ".." in query.image.replace("\\", "/").split("/") or "\0" in query.image:
            return f"image {query.image!r} must be a path inside the root"
        if not isinstance(query.positives, list) or any(not isinstance(v, str) for v in query.positives):
            return "positives must be a list of texts"
        for name in ("pool", "pool_image", "labels", "retrieval"):
            values = getattr(query, name)
            kind = (int, float) if name == "retrieval" else int
            # bool is an int to Python: a label written as true is a writer's mistake.
            if not isinstance(values, list) or any(not isinstance(v, kind) or isinstance(v, bool) for v in values):
                return f"{name} must be a list of {'numbers' if name == 'retrieval' else 'whole numbers'}"
            if len(values) != len(query.pool):
                return f"{name} has {len(values)} entries, pool {len(query.pool)}"
        if not query.pool or (k is not None and len(query.pool) != k):
            return f"the pool has {len(query.pool)} candidates, the first line's has {k}"
        if len(set(query.pool)) < len(query.pool):
            return "an entity is in the pool twice"
        if min(query.pool) < 0 or min(query.pool_image) < 0:
            return "pool and pool_image must not be negative"
        if set(query.labels) - {0, 1}:
            return "labels must be 0 or 1"
        if not all(math.isfinite(v) for v in query.retrieval):
            return "retrieval must be finite"
        return None
    if found := problem():
        raise ValueError(f"{where}: query {query.query_id!r}: {found}; run prepare.py again")


def read_array(path):
    """A .npy file, memory-mapped. ValueError naming it where it is none; pickled objects are never read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # numpy reads the header as Python source.
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError, OSError, OverflowError) as error:
        raise ValueError(f"{path}: not a .npy file ({error}); run prepare.py again") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: not a .npy file but an archive; run prepare.py again")
    return array


class Data:
    """One split of a data folder, as load_data opens it.

    .manifest dict, .queries list of Query, .full float16 [Q, D] full-image query features (memory-mapped, as are)
    .kb_image float16 [M, D], .kb_text float16 [E, D] (zeros = no text), all un-normalised; .kb_entity int32 [M].
    .identity names the pools: a hash over scorer, K and the hash of every file, so that a run can refuse others. It has
    no paths in it, and no index: the same pools prepared in another folder, or by another number of processes, whose
    index files differ, are the same. .index_files: paths of the index in the order of rows, one or one a process; as
    the manifest has them, for a folder copied over another may hold files of both.
    """

    def __init__(self, folder, split, manifest):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.pool_file = os.path.join(folder, f"{split}.jsonl")
        self.queries = read_pool(self.pool_file)
        self.full, self.kb_image, self.kb_text, self.kb_entity = (
            read_array(os.path.join(folder, f"{name}.npy"))
            for name in (f"{split}_full", "kb_image", "kb_text", "kb_entity"))
        # The root is stored relative to this folder; joining with an absolute path gives that path.
        self.root = os.path.normpath(os.path.join(folder, manifest["root"]))
        index = sorted(name for name in manifest["files"] if name.endswith(".faiss"))
        self.index_files = [os.path.join(folder, name) for name in index]
        of_content = {key: manifest[key] for key in ("version", "scorer", "K")}
        of_content["files"] = {name: about for name, about in manifest["files"].items() if name not in index}
        self.identity = hashlib.sha256(json.dumps(of_content, sort_keys=True).encode()).hexdigest()[:12]

    def __len__(self):
        return len(self.queries)

    def candidates(self, i):
        """Candidate vectors of query i by Eq. 3: float32 [K, D], normalised, in pool order."""
        query = self.queries[i]
        return fuse(self.kb_image[query.pool_image], self.kb_text[query.pool])  # [K, D]

    def image_path(self, i):
        """Path of query i's image."""
        return os.path.join(self.root, self.queries[i].image)

    def open_image(self, i):
        """Query i's image as PIL RGB, fully decoded; FileNotFoundError or ValueError naming image, file and line."""
        where = f"{self.pool_file}:{i + 1} ({self.queries[i].query_id})"
        try:
            return read_image(self.image_path(i))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, needed by {where}; was the data moved? Run prepare.py again") from error
        except ValueError as error:
            raise ValueError(f"{error}, needed by {where}; restore the file or run prepare.py again") from error

    @cached_property
    def _kb_offsets(self):
        # Where each line starts: a benchmark's kb.jsonl is gigabytes, of which few lines are ever looked at.
        with open(os.path.join(self.folder, "kb.jsonl"), "rb") as file:
            return np.cumsum([0] + [len(line) for line in file])

    def entity(self, j):
        """Line j of kb.jsonl: {"entity_id", "title", "text", "images": [paths relative to the root]}."""
        with open(os.path.join(self.folder, "kb.jsonl"), "rb") as file:
            file.seek(self._kb_offsets[j])
            line = file.readline()
        try:
            return json.loads(line.decode("utf-8", "surrogatepass"))  # prepare.py's: file names need not be UTF-8
        except ValueError as error:
            raise ValueError(f"{file.name}:{j + 1}: not JSON ({error}); run prepare.py again") from error

    def candidate_image_path(self, m):
        """Path of the image behind row m of kb_image.npy."""
        j = int(self.kb_entity[m])
        first = int(np.searchsorted(self.kb_entity, j))  # an entity's rows are consecutive, in the order of its images
        return os.path.join(self.root, self.entity(j)["images"][m - first])


def read_manifest(folder):
    """manifest.json of a prepared data folder, a dict, its fields looked at. FileNotFoundError where prepare.py has not
    finished (it writes this file last), ValueError for a file that it did not write; each says what to do."""
    path = os.path.join(folder, "manifest.json")
    remedy = f"run `python prepare.py --out {folder}` (or `make data`)"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: nothing was prepared here, or it was cut short; {remedy}")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        fields = [(key, manifest[key], kind) for key, kind in (
            ("version", int), ("scorer", str), ("scorer_name", str), ("K", int), ("dim", int), ("root", str),
            ("splits", dict))] + [("args", manifest.get("args", {}), dict)]
        fields += [(f"bytes of {name}", entry["bytes"], int) for name, entry in manifest["files"].items()]
        for name, value, kind in fields:
            if not isinstance(value, kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        manifest["kb"]["images"], manifest["kb"]["kept"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy} again") from error
    if manifest["version"] != POOL_VERSION:
        raise ValueError(f"{path}: version {manifest['version']}, this program reads {POOL_VERSION}; {remedy} again")
    return manifest


def prepared_dtype(manifest):
    """prepare.py's --scorer-dtype, a string or None, of a manifest: the type for whatever is compared with its features.
    Crops and queries that were rounded otherwise would differ from the stored full images by that alone."""
    return manifest.get("args", {}).get("scorer_dtype")


def check_scorer(folder, manifest, identity):
    """ValueError when load_scorer(...).identity is not that of the scorer which prepared the folder: candidates and full
    images are stored as its features, so another's crops cannot be compared."""
    if identity != manifest["scorer"]:
        raise ValueError(f"{folder} was prepared with scorer {manifest['scorer']}, but {identity} is loaded: "
                         f"use --scorer {manifest['scorer_name']} as it was then, or prepare the data again")


def load_data(folder, split, scorer_identity=None):
    """Open one split of a prepared data folder -> Data.

    Errors are those of read_manifest and, where scorer_identity is given, of check_scorer; and ValueError when a file is
    not the one that the manifest describes.
    """
    manifest = read_manifest(folder)
    path, remedy = os.path.join(folder, "manifest.json"), f"run `python prepare.py --out {folder}` (or `make data`)"
    if split not in manifest["splits"]:
        raise ValueError(f"{path}: no split {split!r}; it has {sorted(manifest['splits'])}")
    if scorer_identity is not None:
        check_scorer(folder, manifest, scorer_identity)
    # Sizes catch a copy that was cut short or mixed from two runs, at no cost.
    for name, entry in manifest["files"].items():
        file = os.path.join(folder, name)
        found = os.path.getsize(file) if os.path.isfile(file) else "no"
        if found != entry["bytes"]:
            raise ValueError(f"{file}: {found} bytes where the manifest says {entry['bytes']}; {remedy} again")
    data = Data(folder, split, manifest)
    _check_data(data, remedy)
    return data


def _check_data(data, remedy):
    """ValueError unless the arrays and the pools of one split fit each other (no hashes: those take minutes)."""
    manifest, (m, e) = data.manifest, (len(data.kb_image), len(data.kb_text))
    shapes = {f"{data.split}_full.npy": (data.full, (len(data), manifest["dim"])),
              "kb_image.npy": (data.kb_image, (manifest["kb"]["images"], manifest["dim"])),
              "kb_text.npy": (data.kb_text, (manifest["kb"]["kept"], manifest["dim"])),
              "kb_entity.npy": (data.kb_entity, (m,))}
    for name, (array, shape) in shapes.items():
        kind = np.int32 if name == "kb_entity.npy" else np.float16
        if array.shape != shape:
            raise ValueError(f"{data.folder}/{name}: shape {array.shape}, expected {shape}; {remedy} again")
        if array.dtype != kind:
            raise ValueError(f"{data.folder}/{name}: {array.dtype}, expected {np.dtype(kind)}; {remedy} again")
    for query in data.queries:
        where = f"{data.pool_file}:{query.row + 1}: query {query.query_id!r}"
        if len(query.pool) != manifest["K"]:
            raise ValueError(f"{where}: {len(query.pool)} candidates, the manifest's K is {manifest['K']}; {remedy}")
        if max(query.pool) >= e or max(query.pool_image) >= m:
            raise ValueError(f"{where}: a candidate is outside the {e} entities and {m} images there are; {remedy}")
        # The one mistake that sizes cannot show: features of one entity under the label of another.
        if data.kb_entity[query.pool_image].tolist() != query.pool:
            raise ValueError(f"{where}: pool_image names images of other entities than pool; {remedy}")
