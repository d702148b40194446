"""The frozen scorer: Eq. 1-4 of the paper, the EVA-CLIP module behind them, and the pool files every stage reads.

A scorer turns images and texts into vectors of one space. A candidate is the normalised sum of its image vector and
its text vector (Eq. 3), a query is the normalised vector of the view that the policy chose (Eq. 1, 2), the score is
their cosine (Eq. 4). Nothing here learns during r-GRPO.

    from scorer import crop, fuse, load_scorer, scores
    scorer = load_scorer("mini/scorer")
    candidates = fuse(scorer.image_features(images), scorer.text_features(texts))           # [K, D]; no text is empty
    query = scorer.image_features([crop(image, (30, 10, 200, 180))])                        # [1, D]
    print(scores(query, candidates))                                                        # [1, K]

From top to bottom: the four equations, pictures, EVA-CLIP, its checkpoints, scorers, the files of a data folder, run
files. Letters: B images or texts, T tokens, D the shared space, Q queries, K candidates of a pool, E entities, M images
of the knowledge base. No code that comes with weights is ever run.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import tokenize
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


class InputError(ValueError):
    """What a user gave does not fit: his file, row or flag, and what to do. A program prints it in one line; any other
    error is a bug of ours and shows its traceback."""


def warn_of_idle_card():
    """Say so where there is a card that PyTorch cannot use: the stages would run on the CPU without a word."""
    if not torch.cuda.is_available() and (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
        print(f"There is a GPU here, but torch {torch.__version__} cannot use it, so this runs on the CPU. Most often "
              f"the driver is older than CUDA {torch.version.cuda}: renew it, or install a torch for the driver's CUDA "
              "and use that environment (make PY=python READY=).", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- Eq. 1 to 4

def crop(image, box):
    """g(I, b) of Eq. 1: the part of a PIL image inside box = (x1, y1, x2, y2).

    box: floats in pixels of *this* image, right and bottom exclusive; rounded outward to whole pixels, so a box never
    loses what it touches, and clamped to the image. ValueError when nothing is left (or a number is not finite): a
    policy's box is checked where it is parsed, so an empty one here is a mistake of the caller.
    """
    x1, y1, x2, y2 = (float(v) for v in box)
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 <= max(0, x1) or y2 <= max(0, y1) \
            or x1 >= image.width or y1 >= image.height:
        raise ValueError(f"box {tuple(box)} has no pixel of the image of {image.width} x {image.height}")
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    right, bottom = min(image.width, math.ceil(x2)), min(image.height, math.ceil(y2))
    return image.crop((left, top, right, bottom))  # Eq. 1, d = REGION


def normalise(x):
    """x / |x| along the last axis, float32. ValueError for a zero or non-finite vector: it has no direction."""
    x = np.asarray(x, dtype=np.float32)  # float16 squares overflow from 256 on
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    bad = ~np.isfinite(length) | (length == 0)
    if bad.any():
        raise ValueError(f"{bad.sum()} of {length.size} feature vectors are zero or not finite: they have no direction")
    return x / length


def fuse(image_features, text_features=None):
    """Candidate vectors of Eq. 3 from un-normalised [..., D], and [..., D] or None -> float32 [..., D], length 1.

    [t != empty] f_T(t): text_features None means no candidate has text, a row of zeros that this one has none. The sum
    comes before the norm, so the longer of the two weighs more; normalising each first would not be Eq. 3.
    """
    total = np.asarray(image_features, dtype=np.float32)
    if text_features is not None:
        total = total + np.asarray(text_features, dtype=np.float32)
    return normalise(total)  # Eq. 3


def blend(full, crop_features, share=1.0):
    """What a REGION is scored by: the crop's feature alone (share 1, Eq. 2), or (1 - share) full + share crop.

    Both [..., D], each brought to length 1 first. Not in the paper: what a box cuts off is then not lost altogether.
    """
    return crop_features if share == 1 else (1 - share) * normalise(full) + share * normalise(crop_features)


def scores(query, candidates):
    """Cosine of query [..., D] with candidates [..., K, D] -> float32 [..., K]; leading axes broadcast.

    So one pool [K, D] serves the N views of a query [N, D]. Vectors of any length: both are normalised here.
    """
    query, candidates = normalise(query), normalise(candidates)  # Eq. 2
    return (candidates @ query[..., None])[..., 0]  # Eq. 4: [..., K, D] x [..., D, 1] -> [..., K]


# ---------------------------------------------------------------------------------------------------------- pictures

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow knows more, but EPS starts another program
MAX_PIXELS = 100_000_000


class BadSize(InputError):
    """A picture of more than MAX_PIXELS pixels, or so narrow that Qwen2.5-VL cannot resize it."""


def read_image(file, name=None):
    """A picture -> PIL RGB image, every pixel decoded. FileNotFoundError, BadSize or InputError, each naming it.

    file: a path, or a binary file that is called `name` in messages. Upright: the camera's EXIF orientation is applied,
    as browsers do, so boxes are in the pixels that a viewer shows. Of an animation the first frame.
    """
    name = name or file
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before pixels are decoded
                raise BadSize(f"image {name} has more than {MAX_PIXELS:,} pixels: make it smaller")
            if max(image.size) > 200 * min(image.size):
                raise BadSize(f"image {name} has {image.width} x {image.height} pixels: cut it, one side may be at "
                              "most 200 times the other")
            image.load()  # open() reads the header only: a cut file shows itself here
            ImageOps.exif_transpose(image, in_place=True)
            return as_rgb(image)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"image {name} is missing") from error
    # What Pillow's readers raise on damaged bytes.
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, ArithmeticError, struct.error,
            zlib.error, Image.DecompressionBombError) as error:
        raise error if isinstance(error, BadSize) else InputError(f"image {name} cannot be read: {error}")


def as_rgb(image):
    """PIL image of any mode -> RGB with 8 bits a channel. Transparent parts become white, as a page shows them."""
    if image.mode == "F":
        raise InputError("a picture of floating-point numbers of unknown range: save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits, of which convert() would clip all above 255 to white
        values = np.asarray(image)
        image = Image.fromarray((values // 256 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:  # convert("RGB") alone shows whatever colour lies below, mostly black
        below = Image.new("RGBA", image.size, "white")
        below.alpha_composite(image.convert("RGBA"))
        image = below
    return image if image.mode == "RGB" else image.convert("RGB")


class Preprocess:
    """PIL image of any size and mode -> float32 [3, H, W] for an image encoder.

    steps: the model's own; without any those of EVA-CLIP: shortest side to `size`, centre crop (so an image that is
    not square loses its ends, as in the reference), mean and std. Pillow resizes, not torchvision's tensor code, which
    is up to two grey levels off.
    """

    def __init__(self, size=None, steps=None):
        from torchvision import transforms  # here, not above: it takes a second, pool files and --help need none of it
        self.steps = steps or transforms.Compose([
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size),
            transforms.ToTensor(), transforms.Normalize(PIXEL_MEAN, PIXEL_STD)])

    def __call__(self, image):
        image = as_rgb(image)  # first: bicubic on palette indices would invent colours
        short, long = sorted(image.size)
        if long > 16 * short:  # a sliver, say of one pixel, would be blown up to gigabytes: its middle will do
            x, y = (max(0, side - 16 * short) // 2 for side in image.size)
            image = image.crop((x, y, image.width - x, image.height - y))
        return self.steps(image)


# ---------------------------------------------------------------------------------------------- the EVA-CLIP module

TOWERS = ("visual", "text")


@dataclass(frozen=True)
class EvaClipConfig:
    """Sizes of an EVA-CLIP. The defaults are EVA-CLIP-8B; 8B-448 changes image_size, 18B also sets postnorm."""
    embed_dim: int = 1280       # D of the shared space
    image_size: int = 224       # pixels a side
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


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + 1e-6), no mean, no bias."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # Without the weight, so that the product follows the cast back to x's dtype, as in the reference: the other
        # order rounds differently in bf16. The kernel keeps the variance in fp32: 300^2 is beyond fp16.
        return self.weight * F.rms_norm(x, self.weight.shape, eps=1e-6)


class Attention(nn.Module):
    """Attention with one fused q|k|v matrix, which has a bias in the text tower alone."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=causal)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, -1)  # q|k|v, then heads
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # scales by d^-.5
        return self.proj(x.transpose(1, 2).reshape(b, t, d))  # (B, T, width)


class MLP(nn.Module):  # plain: the gated one (SwiGLU) belongs to EVA02, not to EVA-CLIP-8B
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU: the tanh form is off by 4e-4


class Block(nn.Module):
    """A layer of either tower: RMSNorm and full attention for images, LayerNorm (eps 1e-5) and causal for text."""

    def __init__(self, width, heads, hidden, norm, causal, postnorm=False):
        super().__init__()
        self.postnorm = postnorm
        self.norm1, self.attn = norm(width), Attention(width, heads, causal)
        self.norm2, self.mlp = norm(width), MLP(width, hidden)

    def forward(self, x):
        if self.postnorm:  # the sum itself is never normed, unlike the original transformer's post-norm
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    def __init__(self, c):  # c: EvaClipConfig
        super().__init__()
        self.image_size = c.image_size
        self.patch_embed = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        # One learned position a token, CLS included. No rotary or relative positions: those are EVA02's.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (c.image_size // c.patch_size) ** 2, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.width // c.head_width, round(c.width * c.mlp_ratio), RMSNorm,
                                          causal=False, postnorm=c.postnorm) for _ in range(c.layers))
        self.norm = RMSNorm(c.width)
        self.head = nn.Linear(c.width, c.embed_dim, bias=False)

    def forward(self, pixels):
        if tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(f"pixel_values must be [B, 3, {self.image_size}, {self.image_size}], "
                             f"got {list(pixels.shape)}: use Preprocess")
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # patches row by row  (B, T, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # (B, 1 + T, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # only CLS is used, so only CLS is normed  (B, D)


class TextTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab, c.text_width)
        self.positional_embedding = nn.Parameter(torch.zeros(c.context, c.text_width))
        self.blocks = nn.ModuleList(Block(c.text_width, c.text_heads, 4 * c.text_width, nn.LayerNorm, causal=True)
                                    for _ in range(c.text_layers))
        self.ln_final = nn.LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.zeros(c.text_width, c.embed_dim))  # (in, out)

    def forward(self, ids):
        # Fewer than `context` tokens are welcome: the mask is causal, so the rest would change nothing before it.
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]  # (B, T, width)
        for block in self.blocks:
            x = block(x)
        # The end token has the largest id, so argmax finds its first occurrence whatever pads the rest.
        x = self.ln_final(x[torch.arange(len(x), device=x.device), ids.argmax(-1)])  # (B, width)
        return x @ self.text_projection  # (B, D)


class EvaClip(nn.Module):
    """EVA-CLIP in plain PyTorch. towers: which to build; the other is None (training embeds crops and no text).

    encode_image(pixel_values [B, 3, H, W]) and encode_text(ids [B, T]) give un-normalised [B, D]: Eq. 3 adds the two
    before it normalises. `logit_scale` is a log; only contrastive training uses it (times exp(logit_scale)).
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

    def save(self, folder, dtype=None):
        """Write config.json and model.safetensors (in dtype, e.g. torch.bfloat16; None = as the weights are)."""
        os.makedirs(folder, exist_ok=True)
        tensors = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in self.state_dict().items()}
        with replacing(os.path.join(folder, "model.safetensors")) as temporary:
            save_file(tensors, temporary)
        write_json(os.path.join(folder, "config.json"), {"model_type": "eva_clip", "config": asdict(self.config)})

    @classmethod
    def load(cls, folder_or_file, device="cpu", dtype=None, towers=TOWERS):
        """Read an EVA-CLIP in any of its published forms; nothing that comes with it is executed.

        A folder as save() writes it, a Hugging Face id or folder (.safetensors or .bin, sharded or not), or one weight
        file (the original .pt, .safetensors, .bin). dtype None keeps what the file holds. towers: those that are read.
        FileNotFoundError or InputError naming the file when one is missing or cut short, is no EVA-CLIP (missing,
        unknown and misshapen tensors are listed), or holds NaN.
        """
        files = weight_files(os.fspath(folder_or_file))
        tensors = read_tensors(files, device, dtype, towers)
        with torch.device("meta"):  # no memory is spent on weights that are replaced at once
            model = cls(read_config(tensors, files), towers)
        tensors.setdefault("logit_scale", torch.tensor(math.log(100.0), device=device, dtype=dtype))  # some lack it
        try:
            model.load_state_dict(tensors, assign=True)  # strict: it lists what is missing, unknown or misshapen
        except RuntimeError as error:
            raise InputError(f"{files[0]}: the tensors are not those of an EVA-CLIP. {ELSE}. {brief(error)}") from error
        return model.eval()


# ------------------------------------------------------------------------------------------------------- checkpoints

ELSE = "EVA02, SigLIP and other CLIPs are loaded by open_clip:NAME/TAG"
WEIGHT_ENDS = (".safetensors", ".pt", ".pth", ".bin")
RENAMES = (  # applied one after the other to the names in a checkpoint, to give ours
    # Hugging Face's
    (r"^vision_model\.embeddings\.class_embedding", "visual.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.patch_embed"),
    (r"^vision_model\.post_layernorm", "visual.norm"), (r"^visual_projection", "visual.head"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "text.positional_embedding"),
    (r"^text_model\.embeddings", "text"), (r"^text_model\.final_layer_norm", "text.ln_final"),
    (r"^vision_model\.encoder\.layers", "visual.blocks"), (r"^text_model\.encoder\.layers", "text.blocks"),
    (r"\.layer_norm", ".norm"), (r"\.self_attn\.out_proj", ".attn.proj"), (r"\.self_attn\.[qkv]_proj", ".attn.qkv"),
    # the original's, whose older form leaves `text.` out
    (r"^module\.", ""), (r"^visual\.patch_embed\.proj", "visual.patch_embed"), (r"^text\.logit_scale", "logit_scale"),
    (r"^(token_embedding|positional_embedding|transformer|ln_final|text_projection)\b", r"text.\1"),
    (r"^text\.text_projection\.weight", "text.text_projection"), (r"^text\.transformer\.resblocks", "text.blocks"),
    (r"\.ln_([12])\.", r".norm\1."), (r"\.in_proj_", ".qkv."), (r"\.out_proj", ".proj"),
    (r"\.c_fc", ".fc1"), (r"\.c_proj", ".fc2"))


def read_tensors(files, device, dtype, towers):
    """{our name: tensor on `device` in `dtype`} of weight files, those of a tower that is not asked for left out."""
    tensors, apart = {}, {}  # apart: {name: {"q" | "k" | "v": tensor}} of those that Hugging Face keeps apart
    others = tuple(f"{tower}." for tower in TOWERS if tower not in towers)
    for stored, get in (entry for file in files for entry in open_weights(file)):
        name = stored
        for theirs, ours in RENAMES:
            name = re.sub(theirs, ours, name)
        if name.startswith(others) or name.endswith(("position_ids", "attn_mask")):  # buffers of other programs
            continue
        tensor = get()
        if not tensor.is_floating_point():  # quantised, say: without their scales the numbers mean nothing
            raise InputError(f"{files[0]}: tensor {stored} is of {tensor.dtype}, no floating-point numbers")
        tensor = tensor.to(device, dtype, copy=True)  # a view of the file would change with it
        # Smallest and largest show NaN and infinity without a second tensor. After the cast: fp16 ends at 65504.
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise InputError(f"{files[0]}: tensor {stored} holds NaN or infinity in {tensor.dtype}")
        if found := re.search(r"self_attn\.([qkv])_proj", stored):
            apart.setdefault(name, {})[found[1]] = tensor
        elif stored.endswith("text_projection.weight"):  # a Linear; square in the 8B, so no shape would complain
            tensors[name] = tensor.T.contiguous()  # (D, width) -> (width, D)
        else:
            first = name in ("visual.cls_token", "visual.pos_embed")  # an axis of 1 that Hugging Face leaves out
            tensors[name] = tensor.view(1, -1, tensor.shape[-1]) if first else tensor
    # One of the three that is missing makes a tensor of another shape, which load_state_dict names.
    return tensors | {name: torch.cat([x[part] for part in "qkv" if part in x]) for name, x in apart.items()}


def open_weights(path):
    """[(name, function that gives the tensor)] of one memory-mapped weight file, wrappers taken off."""
    try:
        if path.endswith(".safetensors"):
            file = safe_open(path, framework="pt")
            return [(name, lambda name=name: file.get_tensor(name)) for name in file.keys()]
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # torch raises RuntimeError for what is no (whole) archive; its unpickler's error has no name of its own in torch.
    except (SafetensorError, RuntimeError, OSError, EOFError, torch.serialization.pickle.UnpicklingError) as error:
        raise InputError(f"{path}: cannot be read, it is cut short or holds more than tensors ({brief(error)}); fetch "
                         "it again, or save its tensors as safetensors") from error
    # Training programs wrap the weights, some twice: {"state_dict": {...}}, {"module": {"model": {...}}}.
    while wrapped := [content[key] for key in ("state_dict", "model", "module")
                      if isinstance(content, dict) and isinstance(content.get(key), dict)]:
        content = wrapped[0]
    found = content.items() if isinstance(content, dict) else ()
    return [(name, lambda tensor=tensor: tensor) for name, tensor in found if isinstance(tensor, torch.Tensor)]


def read_config(tensors, files):
    """EvaClipConfig: sizes from the shapes of the tensors; head counts and postnorm, which no tensor tells, from the
    config.json beside them in its three forms: ours, Hugging Face's (vision_config) and the original's (vision_cfg).
    Which norm a tower has shows in its tensors, too: flags such as use_rms_norm are not looked at."""
    file = os.path.join(os.path.dirname(files[0]), "config.json")
    content = read_json(file, "fetch it again") if os.path.isfile(file) else {}
    vision, text = (content.get(f"{tower}_config") or content.get(f"{tower}_cfg") or content.get("config") or {}
                    for tower in ("vision", "text"))
    for section in (vision, text):  # these change the features but no tensor's name or shape
        if section.get("quick_gelu") or section.get("rope") or section.get("hidden_act", "gelu") != "gelu":
            raise InputError(f"{file}: activation or positions are not those of EVA-CLIP-8B and 18B. {ELSE}")
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layers = {tower: len({name.split(".")[2] for name in shape if name.startswith(f"{tower}.blocks.")})
              for tower in TOWERS}
    sizes = {}
    try:
        if layers["visual"]:
            width, _, _, patch = shape["visual.patch_embed.weight"]
            heads = vision.get("num_attention_heads") or width // vision.get("head_width", 128)
            post = vision.get("postnorm", vision.get("post_layernorm", (width, layers["visual"]) == (5120, 48)))  # 18B
            sizes |= dict(width=width, layers=layers["visual"], head_width=width // heads, postnorm=bool(post),
                          patch_size=patch, image_size=math.isqrt(shape["visual.pos_embed"][1] - 1) * patch,
                          embed_dim=shape["visual.head.weight"][0],
                          mlp_ratio=shape["visual.blocks.0.mlp.fc1.weight"][0] / width)
        if layers["text"]:
            vocab, width = shape["text.token_embedding.weight"]
            heads = text.get("num_attention_heads") or text.get("heads") or text.get("text_heads") or width // 64
            sizes |= dict(text_width=width, text_heads=heads, text_layers=layers["text"], vocab=vocab,
                          context=shape["text.positional_embedding"][0], embed_dim=shape["text.text_projection"][1])
    except KeyError as error:
        raise InputError(f"{files[0]}: no EVA-CLIP, it has no {error.args[0]}. {ELSE}") from error
    if not sizes:
        raise InputError(f"{files[0]}: no EVA-CLIP; its tensors are called {sorted(shape)[:3]}. {ELSE}")
    return EvaClipConfig(**sizes)


def weight_files(name):
    """Weight files of a checkpoint, all shards: of a file, a folder, or a Hugging Face id (from the cache, or fetched;
    weights and config alone, never code). FileNotFoundError or InputError where there is none, or not all of them."""
    if os.path.isfile(name) and name.endswith(WEIGHT_ENDS):
        return [name]
    folder = os.path.isdir(name)
    others = sorted(file for file in os.listdir(name) if file.endswith(WEIGHT_ENDS)) if folder else []
    if len(others) == 1:
        return [os.path.join(name, others[0])]
    if not folder and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"unknown scorer {name!r}: no such folder or weight file. {KNOWN}")
    from transformers.utils import cached_file  # here, not above: it takes a second, pool files need none of it
    from transformers.utils.hub import get_checkpoint_shard_files
    try:
        cached_file(name, "config.json", _raise_exceptions_for_missing_entries=not folder)
        for file in ("model.safetensors", "pytorch_model.bin"):
            if path := cached_file(name, f"{file}.index.json", _raise_exceptions_for_missing_entries=False):
                return get_checkpoint_shard_files(name, path)[0]
            if path := cached_file(name, file, _raise_exceptions_for_missing_entries=False):
                return [path]
        raise OSError("neither model.safetensors nor pytorch_model.bin is there, whole or in shards.")
    except (OSError, ValueError, KeyError) as error:  # a shard that is missing, an unknown id, no connection
        raise InputError(f"scorer {name!r}: {brief(error)} {KNOWN}") from error


def brief(error):
    """The message of another program's error on one line; theirs may list every tensor of a model."""
    return " ".join(str(error).split())[:1000]


# ----------------------------------------------------------------------------------------------------------- scorers

KNOWN = ("Known are local folders and files with an EVA-CLIP (such as mini/scorer), Hugging Face ids of one, "
         "open_clip:NAME/TAG, open_clip:NAME/TAG=FILE, local-dir:FOLDER")


class Tokenizer:
    """CLIP's byte-pair tokenizer (open_clip's): `context` ids a text, padded with 0; a long text is cut.

    vocab < 49408 keeps the first merges only, for tiny models: ids 0..vocab-3 mean what they mean in CLIP, vocab-2 is
    the start and vocab-1 the end. Every text can still be written, in more pieces.
    """

    def __init__(self, vocab=49408, context=77):
        from open_clip.tokenizer import SimpleTokenizer  # here, not above: it takes seconds, pool files need none of it
        self.context, self.bpe = context, SimpleTokenizer()
        if vocab < 49408:
            # Ids are 256 bytes, 256 bytes that end a word, then one id a merge in order of rank, then start and end.
            self.bpe.bpe_ranks = {pair: rank for pair, rank in self.bpe.bpe_ranks.items() if rank < vocab - 514}
            self.bpe.encoder |= {"<start_of_text>": vocab - 2, "<end_of_text>": vocab - 1}
            self.bpe.sot_token_id, self.bpe.eot_token_id = vocab - 2, vocab - 1

    def __call__(self, texts):
        """list of str -> int64 ids [B, context]."""
        return self.bpe(list(texts), context_length=self.context)


class Scorer:
    """What load_scorer returns: PIL images and strings in, un-normalised float32 numpy features out.

    name: as given. dim: D. batch_size: images or texts a forward pass. preprocess: PIL image -> float32 [3, H, W], for
    the processes that read pictures. Each kind sets model, dim, preprocess and token_ids (list of str -> ids [B, T]).
    """

    def __init__(self, name, device, dtype):
        self.name, self.device, self.batch_size = name, torch.device(device), 64
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    @torch.inference_mode()
    def encode(self, pixels):
        """float32 [B, 3, H, W] of `preprocess` -> float32 [B, D]."""
        pixels = pixels.to(self.device, non_blocking=True).to(self.dtype)
        return self.model.encode_image(pixels).float().cpu().numpy()

    @torch.inference_mode()
    def encode_text(self, texts):
        return self.model.encode_text(self.token_ids(texts).to(self.device)).float().cpu().numpy()  # [B, D]

    def image_features(self, images):
        """list of PIL images of any size -> float32 [N, D]."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # Pillow lets them run side by side
            def encode(part):
                return self.encode(torch.stack(list(threads.map(self.preprocess, part))))
            return self.in_batches(encode, images)

    def text_features(self, texts):
        """list of str -> float32 [N, D]. An empty string has a feature too; whoever fuses decides that it has none."""
        return self.in_batches(self.encode_text, texts)

    def in_batches(self, encode, items):
        starts = range(0, len(items), self.batch_size)
        parts = [encode(items[start:start + self.batch_size]) for start in starts]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])  # [N, D], also of no item

    def fingerprint(self):
        """The normalised feature [D] of one fixed drawn picture: what this scorer does, whatever its files are called.
        Other weights and other preprocessing show in it, and no 33 GB have to be hashed."""
        y, x = np.mgrid[:240, :320]
        drawn = np.stack([x * 255 // 320, (x // 5 + y // 7) % 2 * 255, x * y % 256], axis=-1)
        return normalise(self.image_features([Image.fromarray(drawn.astype(np.uint8))])[0])


class EvaClipScorer(Scorer):
    """A Scorer over our EVA-CLIP. The text tower is loaded when the first text comes: training embeds crops only."""

    def __init__(self, name, device="cpu", dtype=None):
        super().__init__(name, device, dtype)
        self.model = EvaClip.load(name, self.device, self.dtype, towers=("visual",))
        self.dim, self.preprocess = self.model.config.embed_dim, Preprocess(self.model.config.image_size)

    @cached_property
    def tokenizer(self):
        model = EvaClip.load(self.name, self.device, self.dtype, towers=("text",))
        self.model.text = model.text
        return Tokenizer(model.config.vocab, model.config.context)

    def token_ids(self, texts):
        ids = self.tokenizer(texts)  # [B, context]
        # Attention is causal and the feature is read at the end token, which has the largest id: the columns after the
        # last end change nothing, and most of the work is saved.
        return ids[:, :int(ids.argmax(-1).max()) + 1]


class OpenClipScorer(Scorer):
    """A Scorer over any model of open_clip: CLIP, SigLIP, SigLIP2, EVA02 ..., with its own statistics and tokenizer.

    A weight file does not say which pixel statistics and GELU it was trained with, and open_clip guesses in silence; a
    TAG does, so a file is given with one."""

    def __init__(self, name, device="cpu", dtype=None):
        import open_clip  # here, not above: it takes seconds, and the default scorer needs its tokenizer at most
        super().__init__(name, device, dtype)
        if name.startswith("open_clip:"):
            self.source, _, rest = name.removeprefix("open_clip:").partition("/")
            tag, _, file = rest.partition("=")
            if not (trained := open_clip.get_pretrained_cfg(self.source, tag)):
                raise InputError(f"{name}: no such model and tag in open_clip (a file: NAME/TAG=FILE); tags of "
                                 f"{self.source}: {', '.join(open_clip.list_pretrained_tags_by_model(self.source))}")
            pixels = {key: trained[key] for key in ("mean", "std", "interpolation", "resize_mode")}
            settings = {"pretrained": file or tag, "force_quick_gelu": bool(trained.get("quick_gelu")),
                        "force_preprocess_cfg": pixels}
        else:
            self.source, settings = f"local-dir:{name.removeprefix('local-dir:')}", {}
            config = os.path.join(name.removeprefix("local-dir:"), "open_clip_config.json")
            if "mean" not in read_json(config, "an open_clip folder has it and the weights").get("preprocess_cfg", {}):
                raise InputError(f"{config}: its preprocess_cfg has no mean; CLIP's would be taken")
        try:
            model = open_clip.create_model(self.source, require_pretrained=True, **settings)
        # A state that does not fit is a RuntimeError; the others come from damaged files and from being offline.
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, SafetensorError,
                torch.serialization.pickle.UnpicklingError) as error:
            raise InputError(f"{name}: open_clip cannot load its weights, or fetch them: {brief(error)}") from error
        self.model = model.to(self.device, self.dtype).eval()
        pixels = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        self.preprocess = Preprocess(steps=open_clip.transform.image_transform_v2(pixels, is_train=False))
        self.dim = open_clip.get_model_config(self.source)["embed_dim"]

    @cached_property
    def tokenizer(self):  # training embeds no text, so it may be missing there
        import open_clip
        return open_clip.get_tokenizer(self.source)

    def token_ids(self, texts):
        return self.tokenizer(texts)


def load_scorer(name, device="cpu", dtype=None):
    """The scorer called `name`:

    FOLDER or FILE             an EVA-CLIP in any form that EvaClip.load reads, such as mini/scorer
    BAAI/EVA-CLIP-8B           Hugging Face id of an EVA-CLIP: from the cache, or fetched
    open_clip:NAME/TAG         a published model of open_clip, such as open_clip:ViT-L-14/openai: fetched
    open_clip:NAME/TAG=FILE    the same from a file
    local-dir:FOLDER           an open_clip folder (open_clip_config.json and weights), SigLIP with its tokenizer

    dtype: a torch.dtype or its name ("bfloat16"); None is bfloat16 on CUDA and float32 on a CPU. Returns a Scorer.
    InputError or FileNotFoundError for a name that is nothing known.
    """
    if name.startswith(("open_clip:", "local-dir:")) or os.path.isfile(os.path.join(name, "open_clip_config.json")):
        return OpenClipScorer(name, device, dtype)
    return EvaClipScorer(name, device, dtype)


# ----------------------------------------------------------------------------------- the files of a data folder

@contextmanager
def replacing(path):
    """Yield a temporary name beside `path`; on success it becomes `path` at once, so no reader sees half a file."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a missing folder, a full disk: whoever reads it knows the name without .tmp
        error.filename = path if error.filename == temporary else error.filename
        raise


def read_json(path, remedy):
    """The object that a JSON file holds. FileNotFoundError or InputError, each naming the file and what to do."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}")
            return content
        except (ValueError, TypeError, RecursionError) as error:  # no JSON, no UTF-8, no object
            raise InputError(f"{path} is no JSON object ({error}): {remedy}") from error


def write_json(path, content):
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")


def write_array(path, array):
    """Write an array as .npy, atomically. ValueError for NaN and infinity: float16 ends at 65504, and a feature that
    fell over that edge must not come back as a score."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path}: values are not finite in {array.dtype}: the scorer overflows or is broken")
    with replacing(path) as temporary, open(temporary, "wb") as file:  # to a name np.save would append .npy
        np.save(file, array)


def lock_folder(folder, flag):
    """Lock a folder that is about to be written -> an open file; closing it lets go, and so does the kernel when the
    process ends, however it ends. InputError where another process writes there; flag: what names another folder."""
    file = open(os.path.join(folder, "lock"), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"{folder} is in use by another process ({error}): wait for its end, or choose another {flag}")
    except OSError as error:  # some network file systems have no locks
        print(f"{folder} cannot be locked ({error}): take care that no second process writes there", file=sys.stderr)
    return file


@dataclass
class Query:
    """A line of {split}.jsonl. positives: entity_ids of the right answers, in the pool or not."""
    query_id: str
    image: str       # path below the manifest's root
    question: str
    positives: list


class Lines:
    """A .jsonl file as a sequence, each line parsed when it is asked for: a million open in a fraction of a second.

    kind: makes an item of a line's fields. limit: the first so many lines, 0 = all.
    """

    def __init__(self, path, kind=dict, limit=0):
        self.path, self.kind, ends, read = path, kind, [], 0
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                ends.append(read + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
                read += len(block)
        self.starts = np.concatenate([[0], *ends])[:limit + 1 if limit else None]  # [N + 1] bytes

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        start = int(self.starts[range(len(self))[i]])  # IndexError ends a loop
        with open(self.path, "rb") as file:
            file.seek(start)
            try:
                # surrogatepass: file names need not be UTF-8.
                return self.kind(**json.loads(file.readline().decode("utf-8", "surrogatepass")))
            except (ValueError, TypeError) as error:
                raise InputError(f"{self.path}:{i + 1}: no line of prepare.py's ({error}); run it again") from error


# Row i of each array belongs to line i of {split}.jsonl. K candidates a pool, best retrieved first.
ARRAYS = {"pool": np.int32,        # [Q, K] lines of kb.jsonl: entities, all distinct
          "pool_image": np.int32,  # [Q, K] rows of kb_image.npy: one image of each entity
          "labels": np.bool_,      # [Q, K] is it a right answer?
          "retrieval": np.float32,  # [Q, K] cosine of the full query image with that image
          "full": np.float16}      # [Q, D] un-normalised features of the full query images


def write_split(folder, split, queries, **arrays):
    """Write a split's queries (of Query) and its arrays, one for each name in ARRAYS; each file by a rename."""
    with replacing(os.path.join(folder, f"{split}.jsonl")) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.writelines(json.dumps(asdict(query), ensure_ascii=False) + "\n" for query in queries)
    for name, kind in ARRAYS.items():
        write_array(os.path.join(folder, f"{split}_{name}.npy"), np.asarray(arrays[name], kind))


def read_manifest(folder):
    """manifest.json of a data folder, a dict. prepare.py writes it last: FileNotFoundError where it has not ended."""
    path, remedy = os.path.join(folder, "manifest.json"), f"run `python prepare.py --out {folder}` (or `make data`)"
    manifest = read_json(path, f"nothing was prepared here, or it was cut short; {remedy}")
    if manifest.get("version") != 2 or {"scorer", "K", "dim", "root", "splits", "files"} - manifest.keys():
        raise InputError(f"{path} was written by another version of prepare.py; {remedy} again")
    return manifest


def same_scorer(folder, manifest, scorer):
    """InputError unless this scorer prepared the folder: candidates and full images are stored as its features, so
    another's crops, or those in another dtype, cannot be compared."""
    then, dtype = manifest["scorer"], str(scorer.dtype).removeprefix("torch.")
    likeness = float(np.dot(scorer.fingerprint(), then["fingerprint"])) if scorer.dim == manifest["dim"] else 0.0
    if likeness < 0.999 or dtype != then["dtype"]:
        raise InputError(f"{folder} was prepared with scorer {then['name']} in {then['dtype']}; {scorer.name} in "
                         f"{dtype} gives others (cosine {likeness:.4f}): use that one, or prepare the data again")


class Data:
    """One split of a data folder, as load_data opens it.

    .manifest dict; .queries, a sequence of Query; .pool .pool_image .labels .retrieval .full as in ARRAYS; .kb_image
    float16 [M, D], .kb_text float16 [E, D] (zeros = no text), un-normalised, .kb_entity int32 [M]: all memory-mapped.
    .identity names the pools: a hash over K and the hash of every file, so that a run can refuse others.
    """

    def __init__(self, folder, split, scorer=None, limit=0):
        self.folder, self.split, self.manifest = folder, split, read_manifest(folder)
        remedy = f"run `python prepare.py --out {folder}` (or `make data`) again"
        if split not in self.manifest["splits"]:
            raise InputError(f"{folder}/manifest.json: no split {split!r}; it has {sorted(self.manifest['splits'])}")
        if scorer is not None:
            same_scorer(folder, self.manifest, scorer)
        # Stored relative to this folder, so that both can move together. A stranger's must not make all files readable.
        self.root = os.path.normpath(os.path.join(os.path.realpath(folder), self.manifest["root"]))
        if os.path.isabs(self.manifest["root"]) or os.path.realpath(self.root) == "/":
            raise InputError(f"{folder}/manifest.json: root {self.manifest['root']!r} is no folder of images; {remedy}")
        content = json.dumps([self.manifest["K"], self.manifest["files"]], sort_keys=True)
        self.identity = hashlib.sha256(content.encode()).hexdigest()[:12]
        self.queries = Lines(os.path.join(folder, f"{split}.jsonl"), Query)
        self.entities = Lines(os.path.join(folder, "kb.jsonl"))
        q, k, d = len(self.queries), self.manifest["K"], self.manifest["dim"]
        for name, (kind, shape) in {
                "kb_entity": (np.int32, (-1,)), "kb_image": (np.float16, (-1, d)),  # -1: any number of images
                "kb_text": (np.float16, (len(self.entities), d)),
                **{name: (kind, (q, d if name == "full" else k)) for name, kind in ARRAYS.items()}}.items():
            path = os.path.join(folder, f"{split}_{name}.npy" if name in ARRAYS else f"{name}.npy")
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            # numpy reads the header as Python source.
            except (ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError, OverflowError) as error:
                raise InputError(f"{path}: not a whole .npy file ({error}); {remedy}") from error
            if array.dtype != kind or array.shape[1:] != shape[1:] or shape[0] not in (-1, len(array)):
                raise InputError(f"{path}: {array.dtype} {array.shape} where {np.dtype(kind)} {shape} fits; {remedy}")
            setattr(self, name, array)
        if len(self.kb_entity) != len(self.kb_image) or not self.images_are_of_their_entities():
            raise InputError(f"{folder}/{split}_pool_image.npy names images of other entities than its pools; {remedy}")
        if limit:
            self.queries = Lines(self.queries.path, Query, limit)
            vars(self).update({name: getattr(self, name)[:limit] for name in ARRAYS})

    def images_are_of_their_entities(self):
        """The one mistake that shapes cannot show: features of one entity under the label of another."""
        for start in range(0, len(self.pool), 1 << 16):  # in parts: [Q, K] of a million queries is 80 MB
            pool, image = self.pool[start:start + (1 << 16)], self.pool_image[start:start + (1 << 16)]
            if image.min() < 0 or image.max() >= len(self.kb_entity) or (self.kb_entity[image] != pool).any():
                return False
        return True

    def __len__(self):
        return len(self.queries)

    def candidates(self, i):
        """Candidate vectors of query i by Eq. 3: float32 [K, D], normalised, in pool order."""
        return fuse(self.kb_image[self.pool_image[i]], self.kb_text[self.pool[i]])  # [K, D]

    def path(self, image, where):
        """A path below the root. InputError where it leads out of it: a stranger's pools must not show other files."""
        if os.path.isabs(image) or ".." in image.replace("\\", "/").split("/") or "\0" in image:
            raise InputError(f"{where}: image {image!r} must be a path inside the root; run prepare.py again")
        return os.path.join(self.root, image)

    def image_path(self, i):
        return self.path(self.queries[i].image, f"{self.queries.path}:{i + 1}")

    def open_image(self, i):
        """Query i's image as PIL RGB; FileNotFoundError or InputError naming image, file and line."""
        return read_image(path := self.image_path(i), f"{path}, needed by {self.queries.path}:{i + 1},")

    def entity(self, j):
        """Line j of kb.jsonl: {"entity_id", "title", "text", "images": [paths below the root]}."""
        return self.entities[j]

    def candidate_image_path(self, m):
        """Path of the image behind row m of kb_image.npy."""
        j = self.kb_entity[m]  # int32, as the array: another type would have it copied
        first = int(np.searchsorted(self.kb_entity, j))  # an entity's rows are consecutive, in the order of its images
        return self.path(self.entities[j]["images"][m - first], f"{self.entities.path}:{j + 1}")


load_data = Data


# ------------------------------------------------------------------------------------------ run files, in TREC's form

def trec_id(text):
    """What an id is called in a run file, whose columns are separated by blanks: percent-quoted."""
    return quote(text, safe=":/?&=#%")


def read_trec(path):
    """A TREC run, `query Q0 entity rank score tag` a line -> {query id: [entity ids, best first]}, ids as written there
    (see trec_id). By score, equal scores by rank. InputError naming file and line."""
    found = {}
    with open(path, "rb") as file:
        for number, line in ((number, line) for number, line in enumerate(file, 1) if line.strip()):
            try:
                query, _, entity, rank, score, _ = line.decode("utf-8-sig").split()
                if math.isnan(float(score)):
                    raise ValueError("NaN is no score")
                found.setdefault(query, []).append((-float(score), int(rank), entity))
            except ValueError as error:
                raise InputError(f"{path}:{number}: expected `query Q0 entity rank score tag` ({error}); blanks in an "
                                 "id are written %20") from error
    return {query: [entity for _, _, entity in sorted(listed)] for query, listed in found.items()}


def write_trec(path, rows, tag):
    """Write a TREC run as trec_eval, pytrec_eval and ranx read it, atomically.

    rows: (query id, K entity ids, K scores) each, in pool order. trec_eval ignores the rank column and breaks ties by
    name, we by pool order: one float32 step less than the score above says the same in a way that it understands.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for query_id, entity_ids, row in rows:
            last = np.float32(np.inf)
            for rank, k in enumerate(np.argsort(-np.asarray(row), kind="stable"), 1):
                last = min(np.float32(row[k]), np.nextafter(last, np.float32(-np.inf)))
                file.write(f"{trec_id(query_id)} Q0 {trec_id(entity_ids[k])} {rank} {last:.9g} {tag}\n")
