"""The forward of a small Qwen2.5-VL, for training it on a CPU (mini/pretrain.py).

The same numbers as transformers' forward (a test compares them), for images of one size and without its per-image
loops; plain matrix products for attention, because on a CPU they train about twice as fast as the fused kernel.
Both towers as functions of a transformers model's own modules, so the weights stay where they are saved from.
"""

import torch
import torch.nn.functional as F

from scorer import PIXEL_MEAN, PIXEL_STD

VIEW = 168                    # pixels of the policy's input: 12 x 12 patches, 6 x 6 visual tokens


def to_pixels(images, device):
    """uint8 [B, H, W, 3] -> normalised float32 [B, 3, H, W]."""
    x = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float().div_(255)                # (B, 3, H, W)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (x - mean) / std


def rms(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def turn(x, cos, sin):
    """Rotary embedding of x [B, H, T, d] by tables [T, d] or [B, 1, T, d]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attend(q, k, v, mask=None):
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                                       # (B, H, T, T)
    if mask is not None:
        weights = weights + mask
    return weights.softmax(-1, dtype=torch.float32).to(v.dtype) @ v                                 # (B, H, T, d)


def gated(mlp, x):
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def patches_of(images, device):
    """uint8 [B, VIEW, VIEW, 3] -> float32 [B, 144, 588] in the processor's order: 2 x 2 patches that are merged stand
    together. One frame of 3 x 14 x 14; the processor gives a still's frame twice (1,176 numbers)."""
    g = VIEW // 28
    x = to_pixels(images, device).view(-1, 3, g, 2, 14, g, 2, 14)   # rows and columns: group, patch in it, pixel in it
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(images), 4 * g * g, 588)                   # (B, 144, 588)


def vision_tables(tower):
    """cos and sin [144, head_dim] of the tower's rotary positions, in the order of patches_of."""
    g = VIEW // 28
    h = torch.arange(2 * g).view(g, 2, 1, 1).expand(g, 2, g, 2).permute(0, 2, 1, 3).reshape(-1)     # (144,)
    w = torch.arange(2 * g).view(1, 1, g, 2).expand(g, 2, g, 2).permute(0, 2, 1, 3).reshape(-1)     # (144,)
    frequency = tower.rotary_pos_emb.inv_freq.float().cpu()     # as the positions are; who asks moves both tables
    angle = torch.cat([h[:, None] * frequency, w[:, None] * frequency], 1).repeat(1, 2)             # (144, d)
    return angle.cos(), angle.sin()


def see(tower, patches, cos, sin):
    """The vision tower. Returns (patch states after block 2, after block 4, merged tokens [B, 36, 192])."""
    kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)        # summed over frames: both of a still are equal
    x = F.linear(patches, kernel)                                                                   # (B, 144, 128)
    states = []
    for block in tower.blocks:
        b, t, _ = x.shape
        qkv = block.attn.qkv(rms(x, block.norm1.weight)).view(b, t, 3, block.attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                        # (B, H, T, d) each
        out = attend(turn(q, cos, sin), turn(k, cos, sin), v)                                       # (B, H, T, d)
        x = x + block.attn.proj(out.transpose(1, 2).reshape(b, t, -1))                              # (B, T, 128)
        x = x + gated(block.mlp, rms(x, block.norm2.weight))
        states.append(x)
    merged = tower.merger.mlp(rms(x, tower.merger.ln_q.weight).reshape(b, t // 4, -1))              # (B, 36, 192)
    return states[1], states[3], merged


def text_tables(model, positions):
    """cos and sin [B, 1, T, d] of the language model's three-part rotary positions [3, B, T]."""
    language = model.model.language_model
    angle = positions[..., None].float() * language.rotary_emb.inv_freq.float()                     # (3, B, T, d/2)
    sections = model.config.text_config.rope_parameters["mrope_section"]
    parts = enumerate(angle.split(sections, -1))                    # section i turns by time, height or width
    angle = torch.cat([part[i] for i, part in parts], -1).repeat(1, 1, 2)                           # (B, T, d)
    return angle.cos()[:, None], angle.sin()[:, None]


def read(model, embeddings, cos, sin, mask):
    """The language model. Returns (states after layer 2, final normed states), [B, T, 192] each."""
    language, x, states = model.model.language_model, embeddings, []
    for layer in language.layers:
        b, t, _ = x.shape
        a, y = layer.self_attn, rms(x, layer.input_layernorm.weight)
        q, k, v = (p(y).view(b, t, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        k, v = (z.repeat_interleave(a.num_key_value_groups, 1) for z in (turn(k, cos, sin), v))     # (B, H, T, d)
        out = attend(turn(q, cos, sin), k, v, mask)                                                 # (B, H, T, d)
        x = x + a.o_proj(out.transpose(1, 2).reshape(b, t, -1))                                     # (B, T, 192)
        x = x + gated(layer.mlp, rms(x, layer.post_attention_layernorm.weight))
        states.append(x)
    return states[1], rms(x, language.norm.weight)
