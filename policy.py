"""The policy pi(a | x) of Region-R1 (Sec. 3.2): Qwen2.5-VL reads image and question, answers FULL or REGION with a box.

    policy = load_policy("mini/policy")                       # or "Qwen/Qwen2.5-VL-3B-Instruct", or any such folder
    policy.act([image], ["Where does this beetle live?"])     # -> [Action(decision="REGION", box=(31.0, ...), ...)]

From top to bottom: the words (prompt, answer, `parse`), the grammar, LoRA, prompts and completions, and `Policy`, which
samples (`rollout`), scores for training (`log_probs`) and answers (`act`).

Three things are shared instead of repeated; the tests hold each against the plain way:
* the image goes through the vision tower once per query;
* the prompt is prefilled once per query, and its key-value cache is copied to the query's rollouts;
* a training row is `[prompt | tree]`: the completions of a query are merged into a prefix tree, so what they have in
  common (prompt, template) is computed once. A mask lets each token see the prompt and its own ancestors alone.

Frames: a box in *text* is in pixels of the RESIZED image that the model was given; a box in an `Action` is in pixels of
the original image, (x1, y1, x2, y2), right and bottom exclusive. Letters: B queries, N rollouts a query, M completions,
R rows being decoded, P choices, T tokens, L row length, S cache slots, V vocabulary, C allowed tokens, D width,
G image tokens. Simplified: one image a prompt, no beam search; the grammar writes whole numbers and no label.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, DynamicCache, PreTrainedConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision, eager_attention_forward,
)

# ----------------------------------------------------------------------------------------------------------------------
# The words: what the policy is asked, and what counts as an answer

BOX_FIELD = {
    "type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
    "description": "The region as [x1, y1, x2, y2]: (x1, y1) is its top-left corner, (x2, y2) its bottom-right corner.",
}
FIELDS = {"type": "object", "properties": {"bbox_2d": BOX_FIELD, "label": {"type": "string"}}, "required": ["bbox_2d"]}
TOOL = {"type": "function", "function": {
    "name": "image_zoom_in_tool", "description": "Look closer at one region of the image.", "parameters": FIELDS}}

# The paper's Table 10 in our own words, with exactly its decisions, tool name, arguments and output form.
SYSTEM_PROMPT = f"""\
You choose which view of an image a re-ranking system gets to see.

You are shown an image and the question a user asks about it. Judge whether cutting out one region would drop what \
only distracts, so that the candidates that matter move up in the ranking.

# Instructions
1. Study the image closely, with the question in mind.
2. Judge, from the question, whether selecting a region makes the re-ranking of many similar candidates more accurate \
and brings the most relevant one to rank 1. There are two choices:
   - If one region is what the question is really about, select that region.
   - If the whole image already serves the question best, answer "FULL".
3. State the decision as "FULL" or "REGION". A "REGION" decision has to come with its region.

# Tools
<tools>
{json.dumps(TOOL)}
</tools>

# How to call a tool
Give a JSON object with the function's name and its arguments inside <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>

# Output format
{{"Decision": "FULL" or "REGION", "Tool": <the tool call with its arguments, if the decision is "REGION">}}

If you call the tool, keep to this format to the letter: an answer in any other form cannot be read.
"""

FULL_TEXT = '{"Decision": "FULL"}'
REGION_TEXT = ('{"Decision": "REGION", "Tool": <tool_call>{"name": "image_zoom_in_tool", '
               '"arguments": {"bbox_2d": [%d, %d, %d, %d]}}</tool_call>}')

# Whitespace is free and nothing else is: text before or after the answer is not an answer ("to the letter" above).
ANSWER = re.compile(r'\{\s*"Decision"\s*:\s*"(FULL|REGION)"\s*(?:,\s*"Tool"\s*:\s*(.*\S)\s*)?\}', re.DOTALL)
TOOL_CALL = re.compile(r"<tool_call>(.*)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Action:
    """What the policy did with one query: a = (d, b) of Sec. 3.2, or MALFORMED.

    decision: "FULL", "REGION" or "MALFORMED" (unreadable answer: earns -eta, never FULL's reward).
    box: (x1, y1, x2, y2) floats in original-image pixels, right/bottom exclusive; None unless REGION.
    p_region: pi(REGION | x), exact under the grammar (also when the decision was forced), None in free decoding.
    text: the answer as written, its numbers in resized-image pixels.
    """

    decision: str
    box: tuple[float, float, float, float] | None
    p_region: float | None
    text: str


def parse(text, resized_size, original_size, p_region=None):
    """Read an answer (Table 10's output form) -> Action.

    text: the completion without its end-of-turn token. resized_size, original_size: (width, height) in pixels of the
    image the model saw and of the image it came from. The label is optional; numbers may be integers or floats.
    Never raises on text: what cannot be read, contradicts itself (FULL with a tool call) or has no area after clamping
    to the image is MALFORMED.
    """
    malformed = Action("MALFORMED", None, p_region, text)
    answer = ANSWER.fullmatch(text.strip())
    if answer is None:
        return malformed
    decision, tool = answer.groups()
    if decision == "FULL":
        # An empty tool field says the same as none at all; a tool call says the opposite of FULL.
        return Action("FULL", None, p_region, text) if tool in (None, "null", '""') else malformed
    numbers = _read_tool_call(tool or "")
    if numbers is None:
        return malformed
    box = to_original(numbers, resized_size, original_size)
    if not (box[2] > box[0] and box[3] > box[1]):
        return malformed
    return Action("REGION", box, p_region, text)


def _read_tool_call(tool):
    """`<tool_call>{...}</tool_call>` -> four finite floats in resized-image pixels, or None."""
    call = TOOL_CALL.fullmatch(tool)
    if call is None:
        return None
    try:
        call = json.loads(call.group(1))
        name, box, label = call["name"], call["arguments"]["bbox_2d"], call["arguments"].get("label", "")
        # bool is an int to Python but not a number to JSON. float() overflows on an integer of 400 digits.
        numbers = [float(x) for x in box if type(x) in (int, float)]
    # Sampled text can be anything JSON can be: a list, 10,000 brackets, a null where a dict belongs.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    right = name == "image_zoom_in_tool" and isinstance(label, str) and isinstance(box, list)
    # Python's JSON has NaN and Infinity, and 1e999 is read as infinity.
    right = right and len(box) == len(numbers) == 4 and all(math.isfinite(x) for x in numbers)
    return numbers if right else None


def to_original(box, resized_size, original_size):
    """A box in resized-image pixels -> the same region in original-image pixels, clamped to the image.

    Both sizes are (width, height). Scaling each axis by its own factor matters: the processor rounds both sides to
    multiples of 28, which changes the aspect ratio a little.
    """
    scaled = [x * original_size[i % 2] / resized_size[i % 2] for i, x in enumerate(box)]
    return tuple(min(max(x, 0.0), float(original_size[i % 2])) for i, x in enumerate(scaled))


# ----------------------------------------------------------------------------------------------------------------------
# The grammar: which tokens are choices, and what each choice may be


def next_digits(low, high, typed):
    """Digits that may follow `typed` (the digits so far, a string) so that an integer of [low, high] stays in reach.

    Integers have no leading zeros. Cutting the last k digits off the integers of [low, high] leaves the integers
    low // 10^k .. high // 10^k: a digit is allowed when `typed` + digit is one of them for some k.

    >>> next_digits(0, 223, "2"), next_digits(0, 223, "22"), next_digits(31, 223, "")
    ((0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (0, 1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8, 9))
    """
    if typed == "0":
        return ()
    prefix = 10 * int(typed or 0)
    digits = set()
    for k in range(len(str(high)) - len(typed)):
        # A first digit 0 is the whole number 0, so it can have no further digits (k = 0).
        smallest = 1 if k > 0 and not typed else 0
        digits.update(range(max(low // 10**k - prefix, smallest), min(high // 10**k - prefix, 9) + 1))
    return tuple(sorted(digits))


class Grammar:
    """The two answers as tokens: fixed spans with choices between them.

        FULL:    prefix  full    full_tail
        REGION:  prefix  region  spans[0] x1 spans[1] y1 spans[2] x2 spans[3] y2 spans[4]

    The token pieces come from tokenising whole answers and comparing them, never from tokenising the pieces alone: a
    byte-pair tokenizer merges across any seam one may choose (the quote and the brace of `"}` are one token). Raises
    ValueError when the tokenizer has no one-token digits, which is what makes a number a sequence of digit choices.
    """

    def __init__(self, tokenizer):
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        full, ones, twos = encode(FULL_TEXT), encode(REGION_TEXT % (1, 1, 1, 1)), encode(REGION_TEXT % (2, 2, 2, 2))
        # The decision is the first token in which the two answers differ.
        split = next(i for i, (a, b) in enumerate(zip(full, ones)) if a != b)
        self.prefix, self.full, self.region = full[:split], full[split], ones[split]
        self.full_tail = full[split + 1:] + [tokenizer.eos_token_id]
        # The digits are the tokens in which two boxes differ ("2" also occurs in "bbox_2d": not every 2 is a digit).
        slots = [i for i, (a, b) in enumerate(zip(ones, twos)) if a != b]
        if len(ones) != len(twos) or len(slots) != 4:
            raise ValueError(self._refusal(tokenizer))
        edges = [split, *slots, len(ones)]
        self.spans = [ones[a + 1:b] for a, b in zip(edges, edges[1:])]
        self.spans[4] = self.spans[4] + [tokenizer.eos_token_id]
        self.digits = [encode(REGION_TEXT % (d, 1, 1, 1))[slots[0]] for d in range(10)]
        # Numbers of every length at every place must come apart the same way.
        for box in ((0, 0, 1, 1), (12, 345, 67, 890), (9, 10, 1024, 100), (4567, 8, 16384, 2031)):
            if self.region_ids(box) != encode(REGION_TEXT % box) + [tokenizer.eos_token_id]:
                raise ValueError(self._refusal(tokenizer))

    @staticmethod
    def _refusal(tokenizer):
        return (f"the grammar needs a tokenizer that writes a number digit by digit; {type(tokenizer).__name__} of "
                f"{tokenizer.name_or_path!r} does not. Use decode='free' with this model.")

    def region_ids(self, box):
        """Token ids of the whole REGION answer, end-of-turn included, for four integers in resized-image pixels."""
        ids = self.prefix + [self.region] + self.spans[0]
        for number, span in zip(box, self.spans[1:]):
            ids = ids + [self.digits[int(digit)] for digit in str(number)] + span
        return ids

    @property
    def trunk(self):
        """What every REGION answer begins with, up to the first digit of x1."""
        return self.prefix + [self.region] + self.spans[0]


# ----------------------------------------------------------------------------------------------------------------------
# LoRA


class LoraLinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x), W and b frozen; B = 0 at the start, so y is at first unchanged.

    A [r, in], B [out, r] are float32 whatever the type of W: at lr 5e-5 a bfloat16 weight would round most steps away.
    They are cast down for the product, which costs nothing beside casting the activations up (what peft does).
    """

    def __init__(self, base, r, alpha, dropout, generator):
        super().__init__()
        self.base, self.r, self.scaling, self.dropout = base, r, alpha / r, dropout
        self.enabled, self.saved_weight = True, None
        # peft's initialisation: A uniform in +-1/sqrt(in), drawn on the CPU so that every device starts alike.
        a = (torch.rand(r, base.in_features, generator=generator) * 2 - 1) / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x):
        y = self.base(x)                                                            # [..., out]
        if not self.enabled or self.saved_weight is not None:
            return y
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scaling                   # [..., r]
        return y + F.linear(low, self.lora_B.to(x.dtype))                           # [..., out]

    @torch.no_grad()
    def merge(self):
        """Fold B A into W. The old W is kept (in main memory): subtracting B A again would not give it back exactly."""
        if self.saved_weight is None:
            self.saved_weight = self.base.weight.to("cpu", copy=True)
            self.base.weight += (self.lora_B @ self.lora_A * self.scaling).to(self.base.weight.dtype)

    @torch.no_grad()
    def unmerge(self):
        if self.saved_weight is not None:
            self.base.weight.copy_(self.saved_weight)
            self.saved_weight = None


# What an adapter_config.json may say that this file does not do; silently ignoring one would give other logits.
UNSUPPORTED = ("use_rslora", "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
               "fan_in_fan_out", "layer_replication", "trainable_token_indices", "use_qalora",
               "alora_invocation_tokens", "target_parameters", "use_bdlora", "kasa_config", "monteclora_config")
# Ways to begin that leave the base weights as they are. The others (pissa, olora, loftq, corda ...) take the start of
# B A off W, and peft does so again when it loads: B A on the plain W would be another model.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter(folder):
    """A LoRA adapter in peft's format -> (settings dict r/alpha/dropout, {module path: (A, B)}).

    Reads adapter_config.json and adapter_model.safetensors, written by `Policy.save_adapter` or by peft. Raises
    FileNotFoundError or ValueError naming the file.
    """
    paths = [os.path.join(folder, name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing: {folder!r} is not a LoRA adapter (runs/<run>/adapter is one)")
    try:
        with open(paths[0], encoding="utf-8") as file:
            config = dict(json.load(file))
        settings = {"r": config["r"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout", 0.0)}
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in settings.values())
        if not numbers or type(settings["r"]) is not int or settings["r"] < 1 or not 0 <= settings["dropout"] < 1:
            raise ValueError(f"{settings} are no settings of LoRA")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{paths[0]} is no adapter's config ({type(error).__name__}: {error})") from error
    unknown = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        unknown.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unknown:
        raise ValueError(f"{paths[0]}: only plain LoRA without bias is read here; found peft_type "
                         f"{config.get('peft_type')!r}, bias {config.get('bias')!r}, {unknown}")
    try:
        tensors = load_file(paths[1])
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{paths[1]} is damaged ({error}): copy it again") from error
    weights = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None:
            raise ValueError(f"{paths[1]}: {key!r} is no LoRA weight")
        rows = value.shape[0 if found[2] == "A" else 1] if value.dim() == 2 else None  # A [r, in], B [out, r]
        # Before anything of this size is made: r is what a stranger's config says.
        if rows != settings["r"]:
            raise ValueError(f"{paths[1]}: {key!r} has the shape {tuple(value.shape)}, r is {settings['r']}")
        weights.setdefault(found[1], {})[found[2]] = value.float()
    halves = [name for name, pair in weights.items() if set(pair) != {"A", "B"}]
    if halves:
        raise ValueError(f"{paths[1]}: lora_A or lora_B is missing for {halves[:3]}")
    return settings, {name: (pair["A"], pair["B"]) for name, pair in weights.items()}


def adapter_base(folder):
    """Name of the base model that an adapter was trained on, from its adapter_config.json."""
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: {folder!r} is not a LoRA adapter (runs/<run>/adapter is one)")
    with open(path, encoding="utf-8") as file:
        return json.load(file)["base_model_name_or_path"]


def write_adapter(folder, base, settings, layers):
    """Write {module path: LoraLinear} so that `peft.PeftModel.from_pretrained` and vLLM read it. `base`: model name."""
    os.makedirs(folder, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": settings["r"],
        "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"], "bias": "none", "inference_mode": True,
        # Whole paths: "gate_proj" alone would match the vision tower as well as the language model.
        "target_modules": sorted(layers),
    }
    weights = {}
    for name, layer in layers.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    # Weights last: a folder that has them is whole. Both by rename, so a killed run leaves no half-written file.
    path = os.path.join(folder, "adapter_config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
    os.replace(path + ".tmp", path)
    path = os.path.join(folder, "adapter_model.safetensors")
    # Not save_file: its files can be read by their owner alone.
    with open(path + ".tmp", "wb") as file:
        file.write(save(weights, metadata={"format": "pt"}))
    os.replace(path + ".tmp", path)


# ----------------------------------------------------------------------------------------------------------------------
# The vision tower's windows


class WindowAttention(Qwen2_5_VLVisionAttention):
    """transformers' attention of the vision tower, for CUDA: neighbouring windows of one length in one call.

    Theirs is a call a window: 1,796 for an image of 1,000 tokens in the 3B, each of microseconds on a GPU, which waits for
    Python then. (On a CPU a call costs nothing beside its work.) Same weights, same numbers.
    """

    def forward(self, hidden_states, cu_seqlens, position_embeddings, **_):
        """hidden_states [T, D]; cu_seqlens int32 [windows + 1]: where windows begin and the last one ends; cos and sin,
        [T, d] each -> [T, D]."""
        q, k, v = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1).unbind(1)     # [T, H, d]
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, start = [], 0
        for length, count in self.runs(cu_seqlens):
            end = start + count * length
            windows = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))   # [W, H, n, d]
            out.append(attend(self, *windows, None, scaling=self.scaling, is_causal=False)[0].reshape(end - start, -1))
            start = end
        return self.proj(out[0] if len(out) == 1 else torch.cat(out))                                   # [T, D]

    @staticmethod
    def runs(cu_seqlens):
        """(length, number) of neighbouring windows of one length, in order; those at the image's edges are shorter. Kept
        with the tensor, which all blocks of a pass share: to ask a GPU for numbers is to wait for it."""
        if not hasattr(cu_seqlens, "runs"):
            lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
            cu_seqlens.runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
        return cu_seqlens.runs


def suit_cuda(model):
    """What a Qwen2.5-VL on a card is run with; on a CPU nothing is changed. cuDNN's attention, PyTorch's first choice on
    an H100, builds a plan for each new length, and in a rollout all lengths are new: off, in the whole process."""
    if model.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        for block in model.model.visual.blocks:
            block.attn.__class__ = WindowAttention


# ----------------------------------------------------------------------------------------------------------------------
# What travels: prompts, completions, and the tree that packs completions


@dataclass
class Prompt:
    """One query as one policy reads it. Tensors are on the CPU but for `features`, and `pixel_values` once seen."""

    ids: torch.Tensor                   # int64 [T]
    mm_token_type_ids: torch.Tensor     # int64 [T], 1 at image tokens
    position_ids: torch.Tensor          # int64 [3, T], mrope: time, height, width
    pixel_values: torch.Tensor          # float32 [patches, 1176]; of the model's type, once seen
    grid_thw: torch.Tensor              # int64 [3], in patches of 14 pixels
    resized_size: tuple[int, int]       # (width, height) in pixels, as the model sees the image
    original_size: tuple[int, int]      # (width, height) in pixels
    features: torch.Tensor | None = None    # [G, D] image tokens, kept while the vision tower is frozen

    @property
    def next_position(self):
        """Position of the first completion token. Not T: a g x h image takes g * h tokens but max(g, h) positions."""
        return int(self.position_ids.max()) + 1


@dataclass
class Completion:
    """One sampled answer. All lists run over its tokens, end-of-turn included where emitted."""

    ids: list[int]
    free: list[bool]                    # True where the token was a choice: decision and digits, or all (free decoding)
    allowed: list[tuple | None]         # at a choice: the token ids it was made among, None = the whole vocabulary
    log_probs: list[float]              # at a choice: log pi(token), renormalised over `allowed`; 0 elsewhere
    decision_index: int | None          # index of the decision token; None where the answer has no readable decision
    forced_decision: bool               # the decision was set by the plan; it is a choice all the same (see `rollout`)
    action: Action


class Tree:
    """Completions of one query merged into a prefix tree: equal beginnings are one path, computed once.

    nodes: tokens [n], parents [n] (-1 = the prompt), depths [n]. paths[c][t] is the node whose hidden state predicts
    token t of completion c. What follows the last choice of a completion is not in the tree: nothing depends on it.

    >>> Tree([[7, 8, 9], [7, 5, 6]], ends=[2, 2]).tokens, Tree([[7, 8, 9], [7, 5, 6]], ends=[2, 2]).parents
    ([7, 8, 5], [-1, 0, 0])
    """

    def __init__(self, sequences, ends):
        self.tokens, self.parents, self.depths, self.paths = [], [], [], []
        nodes = {}                                                  # (parent, token) -> node
        for ids, end in zip(sequences, ends):
            path = [-1]
            for token in ids[:end]:
                key = (path[-1], token)
                if key not in nodes:
                    nodes[key] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(path[-1])
                    self.depths.append(len(path) - 1)
                path.append(nodes[key])
            self.paths.append(path)

    @property
    def is_chain(self):
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def ancestors(self):
        """bool [n, n]: does node i see node j? (Its ancestors and itself.)"""
        sees = np.eye(len(self.tokens), dtype=bool)                 # [n, n]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]                          # parents come before their children
        return sees


class Draft:
    """A completion being written. `waiting` holds the tokens that the model has not been fed yet."""

    def __init__(self, prompt, stream):
        self.prompt, self.stream, self.tokens, self.waiting, self.done = prompt, stream, [], [], False
        self.decision_index, self.forced_decision, self.p_region = None, False, None

    def draw(self):
        """The next uniform number of this rollout's own stream; None when decoding greedily."""
        return None if self.stream is None else self.stream.random()

    def add(self, token, free=False, allowed=None, log_prob=0.0):
        self.tokens.append((token, free, allowed, log_prob))
        self.waiting.append(token)

    def add_template(self, tokens):
        for token in tokens:
            self.add(token)

    def add_decision(self, token, allowed, log_prob, forced):
        self.decision_index, self.forced_decision = len(self.tokens), forced
        self.add(token, True, allowed, log_prob)

    def finish(self, text):
        action = parse(text, self.prompt.resized_size, self.prompt.original_size, self.p_region)
        ids, free, allowed, log_probs = map(list, zip(*self.tokens))
        return Completion(ids, free, allowed, log_probs, self.decision_index, self.forced_decision, action)


class FreeDraft(Draft):
    """Free decoding: every token is a choice among the whole vocabulary, until end-of-turn or `limit` tokens."""

    def __init__(self, prompt, stream, ends, limit):
        super().__init__(prompt, stream)
        self.ends, self.limit = ends, limit

    def choices(self):
        return None

    def choose(self, token, log_prob):
        self.add(token, True, None, log_prob)
        self.done = token in self.ends or len(self.tokens) >= self.limit

    def text(self, decode):
        """The answer without end-of-turn. Finds the decision token on the way, where there is one."""
        ids = [token for token, *_ in self.tokens]
        ids = ids[:-1] if ids[-1] in self.ends else ids
        text = decode(ids)
        answer = ANSWER.fullmatch(text.strip())
        if answer is not None and self.decision_index is None:
            # It is the token whose text first reaches into the word FULL or REGION; a model may space or split its
            # answer in other ways than the template, so a fixed index would not do.
            start = answer.start(1) + len(text) - len(text.lstrip())
            self.decision_index = next(i for i in range(len(ids)) if len(decode(ids[:i + 1])) > start)
        return text


class BoxDraft(Draft):
    """The numbers of a REGION answer, digit by digit, each kept in range of the resized image (w, h):
    0 <= x1 < w, x1 < x2 <= w, and the same for y with h. So every box that can be written is well-formed."""

    def __init__(self, prompt, stream, grammar):
        super().__init__(prompt, stream)
        self.grammar, self.numbers, self.typed = grammar, [], ""
        self.options = self._options()

    def choices(self):
        return self.options

    def _options(self):
        """Token ids allowed next: digits that keep the number in reach, and what ends the number where it is one."""
        place, side = len(self.numbers), self.prompt.resized_size[len(self.numbers) % 2]
        low, high = (0, side - 1) if place < 2 else (self.numbers[place - 2] + 1, side)
        tokens = tuple(self.grammar.digits[d] for d in next_digits(low, high, self.typed))
        complete = self.typed and low <= int(self.typed) <= high
        return tokens + (self.grammar.spans[place + 1][0],) if complete else tokens

    def choose(self, token, log_prob):
        self.add(token, True, self.options, log_prob)
        self._advance(token)
        # A single allowed token is no choice: it costs no decoding step and has log-probability 0. (After "22" of a
        # number up to 223 there are two; after "223" the comma is the only one.)
        while not self.done and len(self.options) == 1:
            self.add(self.options[0])
            self._advance(self.options[0])

    def _advance(self, token):
        """The token just written ends the number or lengthens it: on to the next choice."""
        if token in self.grammar.digits:
            self.typed += str(self.grammar.digits.index(token))
        else:
            self.numbers, self.typed = self.numbers + [int(self.typed)], ""
            self.add_template(self.grammar.spans[len(self.numbers)][1:])
            self.done = len(self.numbers) == 4
        self.options = () if self.done else self._options()

    def text(self, _):
        # Known without decoding, and right for tokenizers that do not give spaces back.
        return REGION_TEXT % tuple(self.numbers) if self.numbers else FULL_TEXT


class Rows:
    """The rows being decoded: KV cache, which of its slots are real, next position, last hidden state.

    Rows are of different length, so slots hold padding; `valid` hides it and positions are explicit, which is all that
    attention needs. So prompts may be padded on the right (as in training rows) and chunks on the left.
    """

    def __init__(self, language_model, cache, valid, position, hidden):
        self.language_model, self.cache = language_model, cache
        self.valid, self.position, self.hidden = valid, position, hidden            # [R, S], [R], [R, D]

    def select(self, index):
        """Keep, repeat or reorder rows. This is where a query's prompt cache becomes that of its N rollouts."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.hidden.device)         # [R'], may be empty
        self.cache.batch_select_indices(index)
        self.valid, self.position, self.hidden = self.valid[index], self.position[index], self.hidden[index]

    def feed(self, chunks):
        """One forward over each row's waiting tokens (at least one); `hidden` [R, D] is then that of the last."""
        width, device = max(len(chunk) for chunk in chunks), self.hidden.device
        ids = torch.tensor([[0] * (width - len(chunk)) + chunk for chunk in chunks], device=device)     # [R, T]
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=device)                         # [R]
        real = torch.arange(width, device=device) >= width - lengths[:, None]                           # [R, T]
        positions = self.position[:, None] + (real.cumsum(1) - 1).clamp(min=0)                          # [R, T]
        past = self.valid.shape[1]
        self.valid = torch.cat([self.valid, real], 1)                                                   # [R, S + T]
        slots = torch.arange(past + width, device=device)                                               # [S + T]
        sees = self.valid[:, None] & (slots <= slots[past:, None])                                      # [R, T, S + T]
        embeds = self.language_model.embed_tokens(ids)                                                  # [R, T, D]
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=additive_mask(sees, embeds.dtype),
            position_ids=positions.expand(3, -1, -1), past_key_values=self.cache, use_cache=True)
        self.hidden = out.last_hidden_state[:, -1]                                                      # [R, D]
        self.position = self.position + lengths


def additive_mask(sees, dtype):
    """bool [B, T, S] "token t sees slot s" -> [B, 1, T, S], 0 where it does, the type's minimum elsewhere.

    Additive works with both attention implementations; the minimum instead of -inf keeps rows that see nothing finite.
    """
    # Rows begin at multiples of 8 numbers: CUDA's kernel copies other masks, in every layer, and keeps the copies.
    width = sees.shape[-1]
    mask = torch.zeros(*sees.shape[:-1], width + -width % 8, dtype=dtype, device=sees.device)[..., :width]
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def pick(log_probs, draws):
    """Column of each row: the argmax where `draws` is None, else by inverse CDF. log_probs [P, C], draws list -> [P].

    Inverse CDF takes one uniform number per choice, so a rollout's draws do not depend on who else is in the batch
    (torch.multinomial would take its numbers from one generator for all rows). FloatingPointError for NaN.
    """
    # NaN would come out as a column that does not exist, or, of argmax, as an answer like any other.
    if log_probs.amax(-1).isnan().any():
        raise FloatingPointError("the policy's log-probabilities are NaN: its weights or activations are not finite "
                                 "(try float32 weights, or an adapter of an earlier step)")
    if draws[0] is None:
        return log_probs.argmax(-1)
    cdf = log_probs.double().exp().cumsum(-1)                                       # [P, C]
    u = torch.tensor(draws, dtype=torch.float64, device=cdf.device)[:, None]        # [P, 1]
    # The factor keeps u below the total even when u rounds to 1; right=True steps over columns of probability 0.
    return torch.searchsorted(cdf, u * (1 - 1e-12) * cdf[:, -1:], right=True)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# The policy


class Policy:
    """A frozen Qwen2.5-VL with its processor and, once added, LoRA. Made by `load_policy`; starts in eval mode.

    model, processor, device as in transformers. `name` is what it was loaded from. `system_prompt` is a plain string.

    keep_prefix: set it to True for inference, and what all prompts begin with (`opening`: the system prompt, hundreds of
    tokens) is read once and its keys and values are kept, instead of once a query, until LoRA or what it is on changes
    (see `_state`) or `train()` is called. Whoever changes weights in other ways must leave it False.
    max_new_tokens: tokens of a freely decoded answer at most.
    """

    def __init__(self, model, processor, name, system_prompt):
        self.model, self.processor, self.name, self.system_prompt = model, processor, name, system_prompt
        self.language_model = model.model.language_model
        self.lora, self.layers = None, {}                           # settings, {module path: LoraLinear}
        self.max_new_tokens = 256
        self.keep_prefix, self._prefix = False, (None, [])          # _state then, and `opening`'s keys and values
        # The 3B ends a turn with <|im_end|> or <|endoftext|>; its generation config lists both.
        ends = model.generation_config.eos_token_id
        self.end_tokens = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @property
    def device(self):
        return self.model.device

    @functools.cached_property
    def grammar(self):
        return Grammar(self.processor.tokenizer)

    # -- prompts -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def opening(self):
        """Tokens with which every prompt begins, int64 [P]: those that neither image nor question changes."""
        tokenizer = self.processor.tokenizer
        one, other = (tokenizer(self._chat(question))["input_ids"] for question in ("a", "b"))
        # Some chat templates have the image first, some the question. And whatever a question begins with, it is never
        # joined to a special token, as it may be to the line break before it.
        special, ends = set(tokenizer.all_special_ids), [0]
        for i, (a, b) in enumerate(zip(one, other), 1):
            if a != b or a == self.processor.image_token_id:
                break
            ends += [i] if a in special else []
        return torch.tensor(one[:ends[-1]], dtype=torch.long)

    def prompts(self, images, questions):
        """PIL images and question strings, one each a query -> list[Prompt]. Images are read as RGB.

        Raises ValueError for a question that holds one of the tokenizer's special tokens (it could end its own turn or
        stand for an image) or is no text (half a surrogate pair), and for an image whose sides differ by a factor of
        more than 200.
        """
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images but {len(questions)} questions")
        for i, (image, question) in enumerate(zip(images, questions)):
            self._check(i, image, question)
        # Unpadded: rows are put together (and padded) where they are run, in `_forward`.
        images = [image.convert("RGB") for image in images]
        inputs = self.processor(text=[self._chat(question) for question in questions], images=images)
        sizes = inputs["image_grid_thw"].prod(-1).tolist()
        pixels = inputs["pixel_values"].split(sizes)                                # B x [patches, 1176]
        rows = zip(images, inputs["input_ids"], pixels, inputs["image_grid_thw"])
        return [self._prompt(*row) for row in rows]

    def _check(self, i, image, question):
        found = [token for token in self.processor.tokenizer.all_special_tokens if token in question]
        if found:
            raise ValueError(f"question {i} contains the special token {found[0]!r}: {question[:80]!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in question):  # a lone \ud83d in JSON; no tokenizer takes it
            raise ValueError(f"question {i} has half a surrogate pair, which is no character: {question[:80]!r}")
        if not isinstance(image, Image.Image):
            raise ValueError(f"image {i} is a {type(image).__name__}; a PIL image is needed")
        if not min(image.size) or max(image.size) > 200 * min(image.size):
            raise ValueError(f"image {i} is {image.size} pixels: sides that differ by a factor of more than 200 cannot "
                             f"be resized by Qwen2.5-VL; crop it or drop the query")

    def _chat(self, question):
        user = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": user}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _prompt(self, image, ids, pixel_values, grid):
        ids = torch.as_tensor(ids)                                                  # [T]
        types = (ids == self.processor.image_token_id).long()                       # [T]
        # Without mm_token_type_ids the model would silently give image tokens text positions.
        position_ids, _ = self.model.model.get_rope_index(ids[None], types[None], image_grid_thw=grid[None])
        patch = self.model.config.vision_config.patch_size
        resized = (int(grid[2]) * patch, int(grid[1]) * patch)                      # (width, height)
        return Prompt(ids, types, position_ids[:, 0], pixel_values, grid, resized, image.size)

    # -- LoRA ----------------------------------------------------------------------------------------------------------

    def add_lora(self, r=8, alpha=32, dropout=0.1, targets="all", seed=0):
        """Put LoRA on every linear layer but lm_head (App. B): targets "all" (vision tower too) or "language".

        With "language" the image features never change, so they are computed once a prompt: much faster training.
        """
        if targets not in ("all", "language"):
            raise ValueError(f"LoRA targets must be 'all' or 'language', not {targets!r}")
        names = [name for name, module in self.model.named_modules()
                 if isinstance(module, nn.Linear) and name != "lm_head"
                 and (targets == "all" or name.startswith("model.language_model."))]
        self._wrap(names, {"r": r, "alpha": alpha, "dropout": dropout}, seed)

    def _wrap(self, names, settings, seed):
        if self.layers:
            raise ValueError("this policy has LoRA already")
        # One generator through all layers in order: the seed alone fixes the start, whatever ran before.
        generator = torch.Generator().manual_seed(seed)
        self.lora = settings
        for name in names:
            parent, _, child = name.rpartition(".")
            base = self.model.get_submodule(name)
            layer = LoraLinear(base, settings["r"], settings["alpha"], settings["dropout"], generator)
            setattr(self.model.get_submodule(parent), child, layer.train(self.model.training))
            self.layers[name] = layer

    @property
    def tower_adapted(self):
        """Is there LoRA in the vision tower? Then image features change with training and must not be kept."""
        return any(name.startswith("model.visual.") for name in self.layers)

    def lora_parameters(self):
        """The trainable parameters, float32, in a fixed order (A, B layer by layer)."""
        return [parameter for layer in self.layers.values() for parameter in (layer.lora_A, layer.lora_B)]

    def save_adapter(self, folder):
        """Write the adapter in peft's format (two files, each by rename)."""
        if not self.layers:
            raise ValueError("there is no LoRA to save: call add_lora or load_adapter first")
        write_adapter(folder, self.name, self.lora, self.layers)

    def load_adapter(self, folder):
        """Read an adapter in peft's format, adding LoRA where the policy has none. ValueError if it does not fit."""
        settings, weights = read_adapter(folder)
        # Not lm_head: `choice_log_probs` reads its rows as they are, so LoRA there would be passed over or break it.
        linear = {name for name, module in self.model.named_modules()
                  if isinstance(module, nn.Linear) and name != "lm_head"}
        if not self.layers:
            missing = [name for name in weights if name not in linear]
            if missing:
                raise ValueError(f"{folder}: {self.name!r} has no linear layer {missing[0]!r} that could take LoRA; "
                                 "wrong base model? (lm_head takes none here)")
            self._wrap(list(weights), settings, seed=0)
        same = all(settings[key] == self.lora[key] for key in ("r", "alpha"))
        if set(weights) != set(self.layers) or not same:
            raise ValueError(f"{folder}: {settings} on {len(weights)} layers do not fit the LoRA in place, {self.lora} "
                             f"on {len(self.layers)} layers")
        for name, (a, b) in weights.items():
            layer = self.layers[name]
            if a.shape != layer.lora_A.shape or b.shape != layer.lora_B.shape:
                raise ValueError(f"{folder}: {name} has A {tuple(a.shape)}, B {tuple(b.shape)}; the base model needs "
                                 f"{tuple(layer.lora_A.shape)}, {tuple(layer.lora_B.shape)}")
            with torch.no_grad():
                layer.lora_A.copy_(a)
                layer.lora_B.copy_(b)

    @contextlib.contextmanager
    def adapter(self, enabled):
        """`with policy.adapter(False):` the base model, which is the reference policy of the KL term."""
        # Merged, the base weights are not to be had; answering with the adapter would make the KL silently 0.
        if any(layer.saved_weight is not None for layer in self.layers.values()) and not enabled:
            raise ValueError("the adapter is merged into the base weights: unmerge() before switching it off")
        before = [layer.enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.enabled = enabled
        try:
            yield self
        finally:
            for layer, was in zip(self.layers.values(), before):
                layer.enabled = was

    def merge(self):
        """Fold the adapter into the base weights: faster inference, no training until `unmerge`."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self):
        """Restore the base weights bit by bit."""
        for layer in self.layers.values():
            layer.unmerge()

    def save_merged(self, folder):
        """Write the whole model with the adapter folded in, as plain transformers (or vLLM) loads it.

        Weights keep their type. Files: transformers' own, and system_prompt.txt, because the adapter was trained under
        this very prompt. The policy itself is as before afterwards. ValueError without LoRA; FileExistsError when there
        is a model in `folder` already.
        """
        if not self.layers:
            raise ValueError("there is no adapter to merge: call load_adapter first")
        if os.path.exists(os.path.join(folder, "config.json")):
            raise FileExistsError(f"{folder} holds a model already; name a new folder")
        merged = [name for name, layer in self.layers.items() if layer.saved_weight is not None]
        self.merge()
        self._place({name: layer.base for name, layer in self.layers.items()})
        try:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        finally:
            self._place(self.layers)
            if not merged:
                self.unmerge()
        with open(os.path.join(folder, "system_prompt.txt"), "w", encoding="utf-8") as file:
            file.write(self.system_prompt)

    def _place(self, modules):
        """Put {path: module} into the model, in place of what is there."""
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module)

    def train(self, mode=True):
        """Dropout on (and gradient checkpointing, where enabled on `model`) until `eval()`. Stay in this mode for the
        backward pass too: checkpointing runs the forward again there. `rollout` and `act` never use dropout."""
        if mode:
            self._prefix = None, []     # a fused optimizer's steps are not counted by `_state`
        self.model.train(mode)
        return self

    def eval(self):
        return self.train(False)

    # -- forward passes ------------------------------------------------------------------------------------------------

    def _features(self, prompts):
        """Image tokens of each prompt after the vision tower: B x [G, D]."""
        # Once a query, however many rows it has here: free decoding with forced decisions has up to three.
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        if self.tower_adapted:
            seen = dict(zip(map(id, distinct), self._see(distinct)))
            return [seen[id(prompt)] for prompt in prompts]
        new = [prompt for prompt in distinct if prompt.features is None]
        if new:
            with torch.no_grad():
                for prompt, features in zip(new, self._see(new)):
                    prompt.features = features
        return [prompt.features for prompt in prompts]

    def _see(self, prompts):
        for prompt in prompts:  # once, for rollout, update and reference; the tower casts them first thing anyway
            prompt.pixel_values = prompt.pixel_values.to(self.device, self.model.dtype)
        pixels = torch.cat([prompt.pixel_values for prompt in prompts])                             # [patches, 1176]
        grid = torch.stack([prompt.grid_thw for prompt in prompts]).to(self.device)                 # [B, 3]
        return self.model.model.get_image_features(pixels, grid).pooler_output                      # B x [G, D]

    def _forward(self, prompts, trees, cache=None, skip=0):
        """Rows `[prompt | tree | padding]` through the language model -> hidden [B, L, D], row lengths [B] (a list).

        `cache`: a DynamicCache to be filled, for decoding on from here. It holds the first `skip` tokens of all rows
        already: then L is without them, and the lengths are not. Only rows without branches can be skipped into.
        """
        lengths = [len(prompt.ids) + len(tree.tokens) for prompt, tree in zip(prompts, trees)]
        width = max(lengths)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)                                    # [B, L]
        is_image = torch.zeros(len(prompts), width, dtype=torch.bool)                               # [B, L]
        positions = torch.zeros(3, len(prompts), width, dtype=torch.long)                           # [3, B, L]
        for b, (prompt, tree) in enumerate(zip(prompts, trees)):
            start, end = len(prompt.ids), lengths[b]
            ids[b, :start], ids[b, start:end] = prompt.ids, torch.tensor(tree.tokens, dtype=torch.long)
            is_image[b, :start] = prompt.mm_token_type_ids.bool()
            positions[:, b, :start] = prompt.position_ids
            # All branches start at the same position: each reads as if it alone followed the prompt.
            positions[:, b, start:end] = prompt.next_position + torch.tensor(tree.depths, dtype=torch.long)
        ids, is_image, positions = ids[:, skip:], is_image[:, skip:], positions[..., skip:]
        embeds = self.language_model.embed_tokens(ids.to(self.device))                              # [B, L, D]
        features = torch.cat(self._features(prompts)).to(embeds.dtype)                              # [sum G, D]
        embeds = embeds.masked_scatter(is_image.to(self.device)[..., None], features)               # [B, L, D]
        # Without branches plain causal attention is right (padding comes last) and has faster kernels: no mask.
        mask = None
        if not all(tree.is_chain for tree in trees):
            mask = additive_mask(self._sees(prompts, trees, width).to(self.device), embeds.dtype)   # [B, 1, L, L]
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions.to(self.device),
            past_key_values=cache, use_cache=cache is not None)
        return out.last_hidden_state, lengths

    @staticmethod
    def _sees(prompts, trees, width):
        """The block mask, bool [B, L, L]: prompt tokens see what came before, tree tokens the prompt and their
        ancestors, padding itself (a row that sees nothing has no softmax)."""
        sees = np.zeros((len(prompts), width, width), dtype=bool)                                   # [B, L, L]
        sees[:, np.arange(width), np.arange(width)] = True
        for b, (prompt, tree) in enumerate(zip(prompts, trees)):
            start, end = len(prompt.ids), len(prompt.ids) + len(tree.tokens)
            sees[b, :start, :start] = np.tri(start, dtype=bool)
            sees[b, start:end, :start] = True
            sees[b, start:end, start:end] = tree.ancestors()
        return torch.from_numpy(sees)

    def choice_log_probs(self, hidden, allowed, temperature):
        """Log-probabilities of the next token, renormalised over what is allowed: the one path of sampling and scoring.

        hidden [P, D]; allowed: P tuples of token ids, or P times None for the whole vocabulary.
        -> float32 [P, C], -inf where a column is not allowed in that row; columns, a list of C token ids, None: C = V.
        """
        weight = self.model.lm_head.weight                                                          # [V, D]
        if allowed[0] is None:
            return (F.linear(hidden, weight).float() / temperature).log_softmax(-1), None           # [P, V]
        columns = sorted(set().union(*allowed))
        place = {token: c for c, token in enumerate(columns)}
        mask = np.zeros((len(allowed), len(columns)), dtype=bool)                                   # [P, C]
        rows = np.repeat(np.arange(len(allowed)), [len(tokens) for tokens in allowed])
        mask[rows, [place[token] for tokens in allowed for token in tokens]] = True
        # Fewer than 20 rows of the output layer instead of 150,000, so float32 costs nothing; in bfloat16 logits near
        # 20 come in steps of 1/8, which would show in p(REGION | x).
        logits = F.linear(hidden.float(), weight[columns].float()) / temperature                    # [P, C]
        mask = torch.from_numpy(mask).to(logits.device)
        return logits.masked_fill(~mask, -torch.inf).log_softmax(-1), columns

    # -- training ------------------------------------------------------------------------------------------------------

    def log_probs(self, prompts, completions, temperature=1.0):
        """Log-probabilities of completions, differentiable with respect to LoRA.

        prompts: B; completions: B lists of Completion (from `rollout`, of any sizes). -> dict of tensors on the device,
        M = completions in order, T = longest: logp float32 [M, T] (log pi of the choices, 0 elsewhere), mask bool
        [M, T] (choices), decision bool [M, T] (the decision token, a choice too), entropy float32 [M, T] (nats, of the
        choice's distribution, detached). `temperature` must be that of the rollout. Dropout only after `train()`.
        """
        flat = [(b, c, one) for b, group in enumerate(completions) for c, one in enumerate(group)]      # M entries
        at = [(m, t) for m, (_, _, one) in enumerate(flat) for t, free in enumerate(one.free) if free]  # P entries
        if not at:
            raise ValueError("log_probs needs at least one completion with a choice in it")
        # The last choice is predicted, never fed: a completion's part in the tree ends before it.
        trees = [Tree([one.ids for one in group], [max(np.flatnonzero(one.free), default=0) for one in group])
                 for group in completions]
        hidden, _ = self._forward(prompts, trees)                                                       # [B, L, D]
        rows = [flat[m][0] for m, _ in at]
        slots = [len(prompts[b].ids) + trees[b].paths[c][t] for (b, c, _), t in ((flat[m], t) for m, t in at)]
        tokens, allowed = [flat[m][2].ids[t] for m, t in at], [flat[m][2].allowed[t] for m, t in at]
        logp, entropy = self._score(hidden[rows, slots], tokens, allowed, temperature)                  # [P], [P]
        # From the list of choices to the table of tokens.
        index = tuple(torch.tensor(at, device=logp.device).T)                                           # m [P], t [P]
        table = logp.new_zeros(len(flat), max(len(one.ids) for _, _, one in flat))                      # [M, T]
        decision = torch.tensor([flat[m][2].decision_index == t for m, t in at], device=logp.device)    # [P]
        return {
            "logp": table.index_put(index, logp), "entropy": table.index_put(index, entropy),
            "mask": table.bool().index_put(index, torch.ones_like(decision)),
            "decision": table.bool().index_put(index, decision),
        }

    def _score(self, hidden, tokens, allowed, temperature):
        """hidden [P, D] and the tokens chosen there -> their log-probabilities [P] and entropies [P]."""
        def score(part, tokens, allowed):
            log_probs, columns = self.choice_log_probs(part, allowed, temperature)                      # [P, C]
            at = tokens if columns is None else [columns.index(token) for token in tokens]
            # 0 * -inf is nan, so -inf is clamped to something whose exponential is still 0.
            entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1).detach()                   # [P]
            return log_probs[range(len(at)), at], entropy

        if allowed[0] is not None:
            return score(hidden, tokens, allowed)
        # Logits over 150,000 tokens: in slices, and computed again in the backward pass instead of kept for it.
        parts = [checkpoint(score, hidden[i:i + 512], tokens[i:i + 512], allowed[i:i + 512], use_reentrant=False)
                 for i in range(0, len(tokens), 512)]
        return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])

    # -- sampling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, prompts, plans, decode="grammar", temperature=1.0, sample=True, seeds=None, max_new_tokens=None):
        """Write completions for B prompts -> B lists of Completion, as long as the plans.

        plans[b]: one entry a rollout, None (the policy decides), "FULL" or "REGION" (forced decision, Sec. 3.4's
        "ensuring both decisions appear"). A forced decision is still a choice with its log-probability: it was not
        sampled, but pi(d | x) is what the decision's gradient moves.
        decode: "grammar" or "free"; sample: False takes the likeliest token at each choice.
        seeds[b]: an int (or tuple of ints) a query, needed to sample. Rollout n of a query draws from a stream of its
        own, seeded by (seed, n): the same completions come out whatever else is in the batch, however many rollouts.
        max_new_tokens: limit of free decoding, in place of the policy's own. Dropout is off.
        """
        self._check_plans(prompts, plans, decode, sample, seeds)
        streams = [[np.random.default_rng([*np.atleast_1d(seeds[b]), n]) if sample else None for n in range(len(plan))]
                   for b, plan in enumerate(plans)]
        start = self._start_grammar if decode == "grammar" else self._start_free
        before = self.model.training
        self.eval()
        try:
            drafts, rows = start(prompts, plans, streams, temperature, max_new_tokens or self.max_new_tokens)
            self._decode([draft for group in drafts for draft in group if not draft.done], rows, temperature)
        finally:
            self.train(before)
        read = functools.partial(self.processor.tokenizer.decode, skip_special_tokens=False)
        return [[draft.finish(draft.text(read)) for draft in group] for group in drafts]

    @staticmethod
    def _check_plans(prompts, plans, decode, sample, seeds):
        if decode not in ("grammar", "free"):
            raise ValueError(f"decode must be 'grammar' or 'free', not {decode!r}")
        if len(plans) != len(prompts) or not all(len(plan) for plan in plans):
            raise ValueError(f"{len(prompts)} prompts need as many plans, none of them empty; got {len(plans)}")
        unknown = {entry for plan in plans for entry in plan} - {None, "FULL", "REGION"}
        if unknown:
            raise ValueError(f"a plan may hold None, 'FULL' and 'REGION', not {sorted(map(str, unknown))}")
        if sample and (seeds is None or len(seeds) != len(prompts)):
            raise ValueError("sampling needs one seed a query")

    def _prefill(self, prompts, tails):
        """Prompt and tail (list of tokens) of each row, once -> hidden [B, L, D], how many tokens stand before the first
        of L (`keep_prefix`), and Rows standing after the tail."""
        cache, skip = self._start(prompts)
        hidden, lengths = self._forward(prompts, [Tree([tail], [len(tail)]) for tail in tails], cache, skip)
        ends = torch.tensor(lengths, device=self.device)                                            # [B]
        valid = torch.arange(skip + hidden.shape[1], device=self.device) < ends[:, None]            # [B, S]
        position = torch.tensor([p.next_position + len(tail) for p, tail in zip(prompts, tails)], device=self.device)
        last = hidden[torch.arange(len(prompts), device=self.device), ends - 1 - skip]              # [B, D]
        return hidden, skip, Rows(self.language_model, cache, valid, position, last)

    def _start(self, prompts):
        """A DynamicCache for rows of these prompts, and how many of their first tokens it holds: those of `opening` with
        `keep_prefix`, else none."""
        cache = DynamicCache(config=self.language_model.config)
        if not self.keep_prefix:
            return cache, 0
        ids = self.opening
        if not all(torch.equal(prompt.ids[:len(ids)], ids) for prompt in prompts):  # made under another system prompt
            return cache, 0
        if self._prefix[0] != (state := self._state()):
            self._prefix = state, self._read(ids)
        for i, (keys, values) in enumerate(self._prefix[1]):                                        # [1, heads, P, d]
            cache.update(keys.expand(len(prompts), -1, -1, -1), values.expand(len(prompts), -1, -1, -1), i)
        return cache, len(ids)

    def _state(self):
        """Equal as long as no LoRA layer was changed or switched: PyTorch counts the changes of a tensor (but for those of
        inference mode, which cannot be trained)."""
        return [(layer.enabled, id(tensor), tensor.is_inference() or tensor._version) for layer in self.layers.values()
                for tensor in (layer.base.weight, layer.lora_A, layer.lora_B)]

    def _read(self, ids):
        """Tokens at the beginning of a prompt, int64 [P] -> their keys and values, a pair a layer, each [1, heads, P, d]."""
        cache = DynamicCache(config=self.language_model.config)
        ids = ids[None].to(self.device)                                                             # [1, P]
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, 1, -1)                 # text: all three alike
        self.language_model(inputs_embeds=self.language_model.embed_tokens(ids), position_ids=positions,
                            past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _start_grammar(self, prompts, plans, streams, temperature, _):
        """Decisions of all rollouts, and the rows of those that go on to a box.

        The prefill runs on through the REGION template, whatever will be decided: one pass gives p(REGION | x) and the
        first digit's distribution; the template costs some 30 tokens beside the prompt's hundreds.
        """
        grammar = self.grammar
        hidden, skip, rows = self._prefill(prompts, [grammar.trunk] * len(prompts))
        # The token before the decision predicts it.
        at = [len(prompt.ids) + len(grammar.prefix) - 1 - skip for prompt in prompts]
        pair = (grammar.full, grammar.region)
        log_probs, columns = self.choice_log_probs(hidden[range(len(at)), at], [pair] * len(at), temperature)   # [B, 2]
        drafts, index = [], []
        for b, plan in enumerate(plans):
            group = [BoxDraft(prompts[b], stream, grammar) for stream in streams[b]]
            picks = pick(log_probs[b].expand(len(group), -1), [draft.draw() for draft in group]).tolist()
            values = dict(zip(columns, log_probs[b].tolist()))
            for draft, entry, column in zip(group, plan, picks):
                token = columns[column] if entry is None else {"FULL": pair[0], "REGION": pair[1]}[entry]
                draft.add_template(grammar.prefix)
                draft.add_decision(token, pair, values[token], forced=entry is not None)
                draft.add_template(grammar.full_tail if token == grammar.full else grammar.spans[0])
                # exp alone would be 1 from .99999997 on; 1 - p(FULL) tells the surest queries apart (thresholds do).
                full, region = values[grammar.full], values[grammar.region]
                draft.p_region = math.exp(region) if region < full else -math.expm1(full)
                # All of it was prefilled, so nothing is waiting. FULL is complete; REGION takes a copy of row b.
                draft.done, draft.waiting = token == grammar.full, []
                index += [] if draft.done else [b]
            drafts.append(group)
        rows.select(index)
        return drafts, rows

    def _start_free(self, prompts, plans, streams, temperature, limit):
        """Drafts and rows for free decoding. A forced decision begins with the template up to the decision token."""
        # A query may need up to three prefills (own decision, FULL, REGION): `kinds` lists those in use, each rollout
        # takes a copy of its kind. The grammar is touched only to force a decision: otherwise any tokenizer will do.
        opening = {None: []}
        if any(entry for plan in plans for entry in plan):
            opening["FULL"] = self.grammar.prefix + [self.grammar.full]
            opening["REGION"] = self.grammar.prefix + [self.grammar.region]
        kinds = list(dict.fromkeys((b, entry) for b, plan in enumerate(plans) for entry in plan))
        hidden, skip, rows = self._prefill([prompts[b] for b, _ in kinds], [opening[entry] for _, entry in kinds])
        drafts = []
        for b, plan in enumerate(plans):
            drafts.append([FreeDraft(prompts[b], stream, self.end_tokens, limit) for stream in streams[b]])
            for draft, entry in zip(drafts[-1], plan):
                if entry is not None:
                    # The decision was fed, not chosen; its log-probability stands one token earlier.
                    row, token = kinds.index((b, entry)), opening[entry][-1]
                    before = hidden[row, len(prompts[b].ids) + len(opening[entry]) - 2 - skip]      # [D]
                    log_probs, _ = self.choice_log_probs(before[None], [None], temperature)         # [1, V]
                    draft.add_template(opening[entry][:-1])
                    draft.add_decision(token, None, float(log_probs[0, token]), forced=True)
                    draft.waiting = []
        rows.select([kinds.index((b, entry)) for b, plan in enumerate(plans) for entry in plan])
        return drafts, rows

    def _decode(self, drafts, rows, temperature):
        """Choice by choice until every draft is done. drafts[i] stands at rows i."""
        while drafts:
            log_probs, columns = self.choice_log_probs(rows.hidden, [draft.choices() for draft in drafts], temperature)
            picks = pick(log_probs, [draft.draw() for draft in drafts])                                 # [R]
            values = log_probs.gather(1, picks[:, None])[:, 0].tolist()
            for draft, column, value in zip(drafts, picks.tolist(), values):
                draft.choose(column if columns is None else columns[column], value)
            keep = [i for i, draft in enumerate(drafts) if not draft.done]
            if not keep:
                return
            if len(keep) < len(drafts):
                rows.select(keep)
                drafts = [drafts[i] for i in keep]
            # Template text between two choices goes in with the choice before it: no step of its own.
            rows.feed([draft.waiting for draft in drafts])
            for draft in drafts:
                draft.waiting = []

    # -- answering -----------------------------------------------------------------------------------------------------

    def act(self, images, questions, decode="grammar", sample=False, force=None, batch_size=16, seed=0):
        """One Action a query: PIL images and question strings, lists of equal length.

        decode: "grammar" or "free"; sample: False takes the likeliest answer, True samples query i with (seed, i);
        force: None, "FULL" or "REGION" (the rows `always` and `zeroshot_always` force REGION).
        Under the grammar p_region is exact, also when forced. MALFORMED can only come from free decoding.
        """
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images but {len(questions)} questions")
        actions = []
        for start in range(0, len(images), batch_size):
            prompts = self.prompts(images[start:start + batch_size], questions[start:start + batch_size])
            seeds = [(seed, start + i) for i in range(len(prompts))]
            groups = self.rollout(prompts, [[force]] * len(prompts), decode, sample=sample, seeds=seeds)
            actions += [group[0].action for group in groups]
        return actions


# ----------------------------------------------------------------------------------------------------------------------
# Memory, from arithmetic over the model's config: nothing is run, so it can be asked before anything is


def saved_by_layer(tokens, width, inner, readers, lora, size, attention, own_output, noise):
    """Bytes that autograd keeps of one transformer layer whose linear layers are frozen and carry LoRA.

    A frozen linear layer keeps nothing, its LoRA keeps its input and A's output. tokens; width D; inner: width of the
    gated MLP; readers: linear layers that read the attention's input (q, k, v, or one qkv); lora: {"r", "dropout"};
    size: bytes a number; attention: bytes a token that attention keeps beside q, k, v and output; own_output: does it
    keep an output that o_proj's LoRA does not (widths D)? noise: bytes of a dropped number's mask.
    """
    norms = 2 * 4 * (width + 1)             # both norms read float32, and keep the root mean square
    values = (3 * width + 3 * inner) * size     # q, k, v; gate, silu(gate), up
    if lora["dropout"]:
        inputs = ((readers + 3) * width + inner) * (size + noise) + own_output * width * size   # each drops its own
    else:
        inputs = (3 * width + inner) * size     # q, k and v share theirs, gate and up theirs
    return tokens * (norms + values + inputs + (readers + 4) * lora["r"] * size + attention)


def saved_activations(config, lora, rows, length, patches, size=2, fused=True, tower=True, checkpointing=False,
                      cuda=True):
    """Bytes that `log_probs` keeps for its backward pass -> {"language", "tower", "mask", "again"}.

    config: Qwen2_5_VLConfig; lora: {"r", "dropout"}; rows of `length` tokens, prompt and tree, each with an image of
    `patches` patches of 14 pixels; size: bytes a number; fused: attention "sdpa" instead of "eager"; tower: is LoRA in
    the vision tower? "again" is what checkpointing computes again and holds a layer at a time.
    """
    text = config.text_config
    noise = 1 if cuda else size             # a dropout mask is of bytes on CUDA, of numbers on a CPU
    eager = text.num_attention_heads * length * (4 if size == 4 else 4 + size)  # softmax in float32, and cast down
    layer = saved_by_layer(rows * length, text.hidden_size, text.intermediate_size, 3, lora, size,
                           4 * text.num_attention_heads if fused else eager, fused, noise)
    kept = rows * length * text.hidden_size * size if checkpointing else layer
    kept_tower, again = 0, 0
    if tower:
        kept_tower, again = _saved_by_tower(config.vision_config, lora, rows, patches, size, fused, checkpointing,
                                            noise)
    return {"language": text.num_hidden_layers * kept + 4 * rows * length * text.hidden_size,   # + the last norm's
            "tower": kept_tower, "mask": rows * length**2 * size,
            "again": max(layer, again) if checkpointing else 0}


def _saved_by_tower(vision, lora, rows, patches, size, fused, checkpointing, noise):
    """(bytes kept, bytes of the largest block) of the vision tower: window or full attention, then the merger."""
    width, tokens = vision.hidden_size, rows * patches
    full = len(set(vision.fullatt_block_indexes) & set(range(vision.depth)))
    window = min(patches, (vision.window_size // vision.patch_size)**2)
    blocks = []
    for reach, count in ((patches, full), (window, vision.depth - full)):
        attention = 4 * vision.num_heads if fused else vision.num_heads * reach * (4 if size == 4 else 4 + size)
        # Windows are put together after their attention: another copy.
        blocks += count * [saved_by_layer(tokens, width, vision.intermediate_size, 1, lora, size,
                                          attention + (fused and reach < patches) * width * size, fused, noise)]
    merger = tokens * width * (4 + 3 * size + bool(lora["dropout"]) * 2 * noise)
    return merger + (vision.depth * tokens * width * size if checkpointing else sum(blocks)), max(blocks)


def passing_memory(config, rows, length, patches, size=2, fused=True):
    """Bytes that a forward pass without gradient needs for a moment: the larger of language model and tower."""
    text, vision = config.text_config, config.vision_config
    peaks = []
    for part, tokens, reach in ((text, rows * length, length), (vision, rows * patches, patches)):
        width, inner = part.hidden_size, part.intermediate_size
        heads = part.num_attention_heads if part is text else part.num_heads
        attention = 0 if fused else heads * reach * (4 + 2 * size)
        # Residual and its norm, then either attention (rotary positions in float32) or the MLP's three.
        peaks.append(tokens * (2 * width * size + max(4 * width * size + 4 * width * 4 + attention, 3 * inner * size)))
    return max(peaks)


def cache_memory(config, rows, length, size=2):
    """Bytes of the key-value cache of `rows` rows of `length` tokens."""
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    return rows * length * text.num_hidden_layers * 2 * text.num_key_value_heads * head * size


def load_policy(name, adapter=None, device="cpu", dtype=None, max_pixels=None, system_prompt=None, attention="sdpa"):
    """Load a policy -> Policy in eval mode, base weights frozen.

    name: a folder with a Qwen2.5-VL checkpoint (mini/policy is one) or a Hugging Face id (Qwen/Qwen2.5-VL-3B-Instruct).
    adapter: folder of a LoRA adapter in peft's format. dtype: a torch.dtype or its name; default bfloat16 on CUDA,
    float32 elsewhere.
    max_pixels: area in pixels that an image is scaled down to; default the checkpoint's own, at most 1,280 * 28 * 28
    (the published 12.8 million is 16,384 tokens an image). system_prompt: text; default the folder's system_prompt.txt
    if it has one, else SYSTEM_PROMPT (Table 10). attention: "sdpa" or "eager" (both take the block mask).
    On CUDA this switches cuDNN's attention off, in the whole process (`suit_cuda`).
    Raises ValueError for what cannot be loaded and says why.
    """
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attention must be 'sdpa' or 'eager', not {attention!r}: others take no block mask")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    _check_name(name)
    # dtype belongs here: model.to(bfloat16) afterwards would also cast the rotary frequencies.
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        name, dtype=dtype, attn_implementation=attention, output_loading_info=True)
    # transformers fills missing weights at random and warns; a policy must not run on those.
    if info["missing_keys"]:
        raise ValueError(f"{name}: the checkpoint lacks {sorted(info['missing_keys'])[:3]} ...; they would be random")
    processor = AutoProcessor.from_pretrained(name)
    size = dict(processor.image_processor.size)
    longest = max_pixels or min(size["longest_edge"], 1280 * 28 * 28)
    processor.image_processor.size = {"shortest_edge": min(size["shortest_edge"], longest), "longest_edge": longest}
    own_prompt = os.path.join(name, "system_prompt.txt")
    if system_prompt is None and os.path.isfile(own_prompt):
        with open(own_prompt, encoding="utf-8") as file:
            system_prompt = file.read()
    model.requires_grad_(False).to(device).eval()
    suit_cuda(model)
    policy = Policy(model, processor, name, SYSTEM_PROMPT if system_prompt is None else system_prompt)
    if adapter is not None:
        policy.load_adapter(adapter)
    return policy


def _check_name(name):
    """Is there a Qwen2.5-VL under this name? transformers would load other architectures with a warning."""
    try:
        # The bare dict: for an unknown kind with code of its own AutoConfig would ask the user whether to run that.
        config, _ = PreTrainedConfig.get_config_dict(name)
        if "model_type" not in config:  # a folder without a config.json
            raise ValueError("no config.json with a model_type")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no policy {name!r}: neither a folder with a Qwen2.5-VL checkpoint nor a Hugging Face model within reach. "
            f"Try mini/policy (`make mini` builds it) or Qwen/Qwen2.5-VL-3B-Instruct.") from error
    if config["model_type"] != "qwen2_5_vl":
        raise ValueError(f"{name!r} is a {config['model_type']} model; the policy must be a qwen2_5_vl one")


# ----------------------------------------------------------------------------------------------------------------------
# python policy.py --adapter runs/world/adapter --merge OUT


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Fold an adapter into its base model: one folder for transformers.")
    parser.add_argument("--adapter", required=True, help="folder in peft's format, such as runs/world/adapter")
    parser.add_argument("--merge", required=True, metavar="OUT", help="new folder for the whole model")
    parser.add_argument("--policy", help="base model, id or folder; default: the one that the adapter names")
    parser.add_argument("--system-prompt", metavar="FILE",
                        help="text that the adapter was trained under; default: that of its run, else the base model's")
    parser.add_argument("--max-pixels", type=int,
                        help="area in pixels that images were shrunk to; default likewise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="of the weights written; the published checkpoints are bfloat16")
    return parser.parse_args(argv)


def trained_under(args):
    """(system prompt or None, image area or None) of the adapter: from the flags, else from the run it lies in.

    An adapter alone knows neither, and a merged model that asks in other words than it was taught answers worse.
    """
    path, config = os.path.join(os.path.dirname(os.path.abspath(args.adapter)), "config.json"), {}
    if os.path.isfile(path):  # not a stranger's adapter, but a run of train.py
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    run = config.get("args", {})
    # The run's own copy of the text before its file, which may have changed or gone; a run of before it had a copy has
    # the file's name alone.
    prompt, file_name = config.get("system_prompt"), args.system_prompt
    if "system_prompt" not in config:
        file_name = file_name or run.get("system_prompt")
    if file_name:
        with open(file_name, encoding="utf-8") as file:
            prompt = file.read()
    return prompt or None, args.max_pixels or run.get("max_pixels")


def main(argv=None):
    args = parse_args(argv)
    try:
        base = args.policy or adapter_base(args.adapter)
        prompt, pixels = trained_under(args)
        policy = load_policy(base, args.adapter, dtype=args.dtype, max_pixels=pixels,
                             system_prompt=prompt)
        policy.save_merged(args.merge)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise SystemExit(f"policy.py: {error}") from error
    print(f"wrote {args.merge}: {base} with {args.adapter} folded in, {args.dtype}")


if __name__ == "__main__":
    main()
