"""The frozen scorer: Eq. 1-4 of the paper, the EVA-CLIP module behind them, and the pool files every stage reads.

A scorer turns images and texts into vectors of one space. A candidate is the normalised sum of its image vector and
its text vector (Eq. 3), a query is the normalised vector of the view that the policy chose (Eq. 1, 2), the score is
their cosine (Eq. 4). Nothing here learns during r-GRPO.

    from scorer import crop, fuse, load_scorer, scores
    scorer = load_scorer("mini/scorer")
    candidates = fuse(scorer.image_features(images), scorer.text_features(texts))           # [K, D]
    query = scorer.image_features([crop(image, (30, 10, 200, 180))])                        # [1, D]
    print(scores(query, candidates))                                                        # [1, K]

Simplified against the authors' code: attention is PyTorch's own (their xformers kernel computes the same), and the
weights are read from safetensors in the original parameter names only. The pool files of `prepare.py` are defined in
the second half: one writer and one reader for each.
"""
import dataclasses
import hashlib
import json
import math
import os
import struct
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

# The constants of every OpenAI-style CLIP; SigLIP's are .5 and belong to another loader.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
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
        variance = x.float().pow(2).mean(-1, keepdim=True)  # fp32: squares of bf16 activations lose too much
        x = x * torch.rsqrt(variance + 1e-6)  # promoted to fp32 by the variance
        # Cast before the product, as the reference does: the other order rounds differently in bf16.
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


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
        self.mlp = VisionMLP(config.width, int(config.width * config.mlp_ratio))

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
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.text = TextTower(config)
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
    def load(cls, folder_or_file, device="cpu", dtype=None):
        """Read a folder with config.json and model.safetensors, or that file with its config.json beside it.

        dtype None keeps what the file holds. Raises FileNotFoundError or ValueError naming the file when a file is
        missing, is no EVA-CLIP of this form, or its tensors do not fit its config.
        """
        weights, config = _eva_files(folder_or_file)
        with torch.device("meta"):  # no memory is spent on weights that are replaced at once
            model = cls(config)
        wanted = model.state_dict()
        tensors = {}
        with safe_open(weights, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                # Cast one by one: the whole model in fp32 never exists beside the one asked for.
                tensors[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
        tensors.setdefault("logit_scale", torch.tensor(math.log(100.0), device=device))  # optional in checkpoints
        wrong = sorted(n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape)
        wrong += sorted(wanted.keys() ^ tensors.keys())
        if wrong:
            raise ValueError(f"{weights}: {len(wrong)} tensors are missing, unknown or of another shape than its "
                             f"config.json says, first {wrong[:3]}; only the original names are read")
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def _eva_files(folder_or_file):
    """(weights file, EvaClipConfig) of a folder or file. The place to add other layouts, told apart by key names."""
    path = os.fspath(folder_or_file)
    weights = os.path.join(path, "model.safetensors") if os.path.isdir(path) else path
    config_file = os.path.join(os.path.dirname(weights), "config.json")
    for needed in (weights, config_file):
        if not os.path.isfile(needed):
            raise FileNotFoundError(f"{needed} is missing: an EVA-CLIP folder has config.json, model.safetensors")
    if not weights.endswith(".safetensors"):
        raise ValueError(f"{weights}: only .safetensors weights are read")
    with open(config_file, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("model_type") != "eva_clip" or "config" not in config:
        raise ValueError(f"{config_file}: model_type {config.get('model_type')!r} is not 'eva_clip' or has no 'config'")
    known = {field.name for field in dataclasses.fields(EvaClipConfig)}
    if unknown := sorted(config["config"].keys() - known):
        raise ValueError(f"{config_file}: unknown settings {unknown}; known are {sorted(known)}")
    # JSON has no tuples, and a frozen config with a list could not be compared by hash.
    return weights, EvaClipConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["config"].items()})


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


def preprocess(image, size):
    """PIL image -> float32 [3, size, size] for encode_image: RGB, bicubic to the shortest side, centre crop, CLIP's
    mean and std. size may be (height, width). A crop that is not square loses its ends here, as in the reference.
    """
    image = image.convert("RGB")  # first: bicubic on palette indices would invent colours
    h, w = (size, size) if isinstance(size, int) else size
    # The shorter side (against h : w) becomes exact, the other int() of the exact quotient, as torchvision's Resize.
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
        image = image.resize((w, h), Image.Resampling.BICUBIC, box=part)
    else:
        image = image.resize((new_w, new_h), Image.Resampling.BICUBIC).crop((left, top, left + w, top + h))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)  # (h, w, 3)
    return ((pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).permute(2, 0, 1).contiguous()  # (3, h, w)


@contextmanager
def replacing(path):
    """Yield a temporary name beside `path`; on success it becomes `path` at once, so no reader sees half a file."""
    temporary = f"{path}.tmp"
    yield temporary
    os.replace(temporary, path)


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


def read_image(path):
    """Path -> PIL RGB image, every pixel decoded. FileNotFoundError or ValueError, each naming the file.

    EXIF rotation is not applied, as in all prior work: boxes and features refer to the pixels as stored.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"image {path} is missing")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")  # decodes it: open() reads the header only, and a cut file shows itself here
    # What Pillow's decoders raise on damaged bytes; UnidentifiedImageError is an OSError.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


# -------------------------------------------------------------------------------------------------------- Eq. 1 to 4

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

class EvaClipScorer:
    """What load_scorer returns: PIL images and strings in, un-normalised float32 numpy features out.

    name: as given to load_scorer. identity: "folder@hash", equal for equal weights and config wherever the folder
    lies; it is written into every pool and checked against it. dim: D. batch_size: images or texts a forward pass.
    """

    def __init__(self, name, device="cpu", dtype=None, batch_size=64):
        self.name, self.device, self.batch_size = name, torch.device(device), batch_size
        if dtype is None:  # bf16 halves the memory of 8 B weights; on a CPU it is slower than fp32
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = EvaClip.load(name, self.device, dtype)
        self.identity = _identity(name)
        self.dim = self.model.config.embed_dim

    @cached_property
    def tokenizer(self):
        # Built when the first text comes: train.py embeds crops only and need not wait for open_clip.
        return Tokenizer(self.model.config.vocab, self.model.config.context)

    def image_features(self, images):
        """list of PIL images of any size -> float32 [B, D]."""
        return self._features(images, lambda batch: self.model.encode_image(
            torch.stack([preprocess(image, self.model.config.image_hw) for image in batch]).to(self.device)))

    def text_features(self, texts):
        """list of str -> float32 [B, D]. An empty string has a feature too; whoever fuses decides that it has none."""
        def encode(batch):
            ids = self.tokenizer(batch)  # (B, context)
            # Attention is causal and the feature is read at the end token, so the columns after the last end change
            # nothing and most of the work is saved. The largest id is the end, hence argmax.
            return self.model.encode_text(ids[:, :int(ids.argmax(-1).max()) + 1].to(self.device))
        return self._features(texts, encode)

    @torch.inference_mode()
    def _features(self, items, encode):
        rows = [encode(items[start:start + self.batch_size]).float().cpu().numpy()  # [B, D]
                for start in range(0, len(items), self.batch_size)]
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)


def _identity(name):
    """folder name @ first 12 hex digits of the sha256 over config.json and the weights. The config counts, because
    postnorm or the head width change every feature without changing a weight."""
    weights, _ = _eva_files(name)
    digest = hashlib.sha256()  # of the bytes, not of file name and time: a copied or touched model stays the same
    for path in (os.path.join(os.path.dirname(weights), "config.json"), weights):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return f"{os.path.basename(os.path.dirname(os.path.abspath(weights)))}@{digest.hexdigest()[:12]}"


def load_scorer(name, device="cpu", dtype=None):
    """The scorer called `name`: a folder (or .safetensors file) of an EVA-CLIP as EvaClip.save writes it.

    dtype None is bfloat16 on CUDA and float32 on a CPU. Returns an object with .name, .identity, .dim, .batch_size,
    .image_features(list of PIL) and .text_features(list of str). ValueError for a name that is nothing known.
    """
    if not os.path.exists(name):
        raise ValueError(f"unknown scorer {name!r}: known are local folders with an EVA-CLIP (config.json + "
                         "model.safetensors), such as mini/scorer, which `make mini` builds")
    return EvaClipScorer(name, device, dtype)


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
    with open(path, encoding="utf-8") as file:
        for row, line in enumerate(file):
            where = f"{path}:{row + 1}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
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


class Data:
    """One split of a data folder, as load_data opens it.

    .manifest dict, .queries list of Query, .full float16 [Q, D] full-image query features (memory-mapped, as are)
    .kb_image float16 [M, D], .kb_text float16 [E, D] (zeros = no text), all un-normalised; .kb_entity int32 [M].
    .identity names the pools: a hash over scorer, K and the hash of every file, so that a run can refuse others. It has
    no paths in it: the same pools prepared in another folder are the same.
    """

    def __init__(self, folder, split, manifest):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.pool_file = os.path.join(folder, f"{split}.jsonl")
        self.queries = read_pool(self.pool_file)
        self.full, self.kb_image, self.kb_text, self.kb_entity = (
            np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r")
            for name in (f"{split}_full", "kb_image", "kb_text", "kb_entity"))
        # The root is stored relative to this folder; joining with an absolute path gives that path.
        self.root = os.path.normpath(os.path.join(folder, manifest["root"]))
        of_content = {key: manifest[key] for key in ("version", "scorer", "K", "files")}
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
            return json.loads(file.readline())

    def candidate_image_path(self, m):
        """Path of the image behind row m of kb_image.npy."""
        j = int(self.kb_entity[m])
        first = int(np.searchsorted(self.kb_entity, j))  # an entity's rows are consecutive, in the order of its images
        return os.path.join(self.root, self.entity(j)["images"][m - first])


def load_data(folder, split, scorer_identity=None):
    """Open one split of a prepared data folder -> Data.

    FileNotFoundError when prepare.py has not finished there (it writes manifest.json last). ValueError when a file is
    not the one that the manifest describes, or when scorer_identity (load_scorer(...).identity) is not the scorer that
    made the pools: candidates and full images are stored as its features, so another's crops cannot be compared.
    """
    path = os.path.join(folder, "manifest.json")
    remedy = f"run `python prepare.py --out {folder}` (or `make data`)"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: nothing was prepared here, or it was cut short; {remedy}")
    with open(path, encoding="utf-8") as file:
        manifest = json.load(file)
    if manifest["version"] != POOL_VERSION:
        raise ValueError(f"{path}: version {manifest['version']}, this program reads {POOL_VERSION}; {remedy} again")
    if split not in manifest["splits"]:
        raise ValueError(f"{path}: no split {split!r}; it has {sorted(manifest['splits'])}")
    if scorer_identity is not None and scorer_identity != manifest["scorer"]:
        raise ValueError(f"{folder} was prepared with scorer {manifest['scorer']}, but {scorer_identity} is loaded: "
                         f"use --scorer {manifest['scorer_name']} as it was then, or prepare the data again")
    # Sizes catch a copy that was cut short or mixed from two runs, at no cost.
    for name, size in manifest["files"].items():
        file = os.path.join(folder, name)
        found = os.path.getsize(file) if os.path.isfile(file) else "no"
        if found != size["bytes"]:
            raise ValueError(f"{file}: {found} bytes where the manifest says {size['bytes']}; {remedy} again")
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
        if array.shape != shape:
            raise ValueError(f"{data.folder}/{name}: shape {array.shape}, expected {shape}; {remedy} again")
    for query in data.queries:
        where = f"{data.pool_file}:{query.row + 1}: query {query.query_id!r}"
        if len(query.pool) != manifest["K"]:
            raise ValueError(f"{where}: {len(query.pool)} candidates, the manifest's K is {manifest['K']}; {remedy}")
        if max(query.pool) >= e or max(query.pool_image) >= m:
            raise ValueError(f"{where}: a candidate is outside the {e} entities and {m} images there are; {remedy}")
        # The one mistake that sizes cannot show: features of one entity under the label of another.
        if data.kb_entity[query.pool_image].tolist() != query.pool:
            raise ValueError(f"{where}: pool_image names images of other entities than pool; {remedy}")
