"""The policy pi(a | x) of Region-R1 (Sec. 3.2): Qwen2.5-VL reads image and question, answers FULL or REGION with a box.

    policy = load_policy("mini/policy")                       # or "Qwen/Qwen2.5-VL-3B-Instruct", or any such folder
    policy.act([image], ["Where does this beetle live?"])     # -> [Action(decision="REGION", box=(31.0, ...), ...)]

From top to bottom: the words (prompt, answer, `parse`), the grammar, LoRA, prompts and completions, decoding, `Policy`,
adapter files, loading. What rollouts share is computed once: an image goes through the vision tower once a `Prompt`
(with LoRA in the tower once in every forward pass), a prompt is prefilled once and its key-value cache copied to the
rollouts, and a training row is `[opening | prompt | tree | prompt | tree ...]`: queries with their completions, common
beginnings merged, under a mask by which a token sees its prompt and its ancestors alone.

Frames: a box in *text* is in pixels of the RESIZED image that the model was given; a box in an `Action` is in pixels of
the original image, (x1, y1, x2, y2), right and bottom exclusive. Letters: B queries, M completions, R rows of a
forward pass, P choices, U sites held, O tokens of the opening, T tokens, L row length, S cache slots, V vocabulary,
C allowed tokens, D width, G image tokens.
Simplified: one image a prompt, no beam search; the grammar writes whole numbers and no label.
"""

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, DynamicCache, PreTrainedConfig, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision, eager_attention_forward,
)

# ---- the words: what the policy is asked, and what counts as an answer

# The paper's Table 10 in our own words, with exactly its decisions, tool name, arguments and output form.
SYSTEM_PROMPT = """\
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
{"type": "function", "function": {"name": "image_zoom_in_tool", "description": "Look closer at one region of \
the image.", "parameters": {"type": "object", "properties": {"bbox_2d": {"type": "array", "items": {"type": "number"}, \
"minItems": 4, "maxItems": 4, "description": "The region as [x1, y1, x2, y2]: (x1, y1) is its top-left corner, \
(x2, y2) its bottom-right corner."}, "label": {"type": "string"}}, "required": ["bbox_2d"]}}}
</tools>

# How to call a tool
Give a JSON object with the function's name and its arguments inside <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>

# Output format
{"Decision": "FULL" or "REGION", "Tool": <the tool call with its arguments, if the decision is "REGION">}

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
    """What the policy did with one query: a = (d, b) of Sec. 3.2, or MALFORMED (an unreadable answer)."""

    decision: str               # "FULL", "REGION" or "MALFORMED", which earns -eta and never FULL's reward
    box: tuple | None           # (x1, y1, x2, y2) floats in original-image pixels; None unless REGION
    p_region: float | None      # pi(REGION | x), exact under the grammar, also when forced; None in free decoding
    text: str                   # the answer as written, its numbers in resized-image pixels


def parse(text, resized_size, original_size, p_region=None):
    """Read an answer (Table 10's output form) -> Action. Sizes, (width, height), as the model saw it and original.

    Never raises on text: what cannot be read, contradicts itself (FULL with a tool call) or has no area after clamping
    to the image is MALFORMED. The label is optional; numbers may be integers or floats.
    """
    malformed = Action("MALFORMED", None, p_region, text)
    answer = ANSWER.fullmatch(text.strip())
    if answer is None:
        return malformed
    decision, tool = answer.groups()
    if decision == "FULL":
        # An empty tool field says the same as none at all; a tool call says the opposite of FULL.
        return Action("FULL", None, p_region, text) if tool in (None, "null", '""') else malformed
    try:
        call = json.loads(TOOL_CALL.fullmatch(tool or "")[1])  # TypeError without a tool call
        name, box, label = call["name"], call["arguments"]["bbox_2d"], call["arguments"].get("label", "")
        # bool is an int to Python but not a number to JSON. float() overflows on an integer of 400 digits.
        numbers = [float(x) for x in box if type(x) in (int, float)]
    # Sampled text can be anything JSON can be: a list, 10,000 brackets, a null where a dict belongs.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return malformed
    right = name == "image_zoom_in_tool" and isinstance(label, str) and isinstance(box, list)
    # Python's JSON has NaN and Infinity, and 1e999 is read as infinity.
    if not right or not len(box) == len(numbers) == 4 or not all(math.isfinite(x) for x in numbers):
        return malformed
    box = to_original(numbers, resized_size, original_size)
    return Action("REGION", box, p_region, text) if box[0] < box[2] and box[1] < box[3] else malformed


def to_original(box, resized_size, original_size):
    """A box in resized-image pixels -> the same region in original-image pixels, clamped; sizes are (width, height)."""
    # Each axis by its own factor: the processor rounds both sides to multiples of 28, which changes the aspect ratio.
    scaled = [x * original_size[i % 2] / resized_size[i % 2] for i, x in enumerate(box)]
    return tuple(min(max(x, 0.0), float(original_size[i % 2])) for i, x in enumerate(scaled))


# ---- the grammar: which tokens are choices, and what each choice may be

def next_digits(low, high, typed):
    """Digits that may follow `typed` (the digits so far, a string) so that an integer of [low, high] stays in reach.

    >>> next_digits(0, 223, "2"), next_digits(0, 223, "22"), next_digits(31, 223, "")
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    digits = []
    for digit in range(10) if typed != "0" else ():  # no leading zeros: 0 is a number by itself
        start = int(typed + str(digit))
        # With k more digits it becomes a number of start * 10^k .. start * 10^k + 10^k - 1.
        longer = range(len(str(high))) if start else range(1)
        if any(start * 10**k <= high and (start + 1) * 10**k > low for k in longer):
            digits.append(digit)
    return digits


class Grammar:
    """The two answers as tokens: fixed spans with choices between them.

        FULL:    prefix  full    full_tail
        REGION:  prefix  region  spans[0] x1 spans[1] y1 spans[2] x2 spans[3] y2 spans[4]

    Choices are the decision, each digit, and the comma or bracket that begins spans[1] to spans[4] where another digit
    could stand in its place: it ends the number. The pieces come from comparing whole answers as tokenised: a byte-pair
    tokenizer merges across any seam one may choose (the quote and the brace of `"}` are one token). ValueError for one
    that does not write numbers digit by digit.
    """

    def __init__(self, tokenizer):
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        full, ones, twos = encode(FULL_TEXT), encode(REGION_TEXT % (1, 1, 1, 1)), encode(REGION_TEXT % (2, 2, 2, 2))
        # The decision is the first token in which the two answers differ.
        split = next(i for i, (a, b) in enumerate(zip(full, ones)) if a != b)
        self.prefix, self.full, self.region = full[:split], full[split], ones[split]
        self.decisions = {"FULL": self.full, "REGION": self.region}
        self.full_tail = full[split + 1:] + [tokenizer.eos_token_id]
        # The digits are the tokens in which two boxes differ ("2" also occurs in "bbox_2d": not every 2 is a digit).
        slots = [i for i, (a, b) in enumerate(zip(ones, twos)) if a != b]
        edges = [split, *slots, len(ones)]
        self.spans = [ones[a + 1:b] for a, b in zip(edges, edges[1:])]
        self.spans[-1] = self.spans[-1] + [tokenizer.eos_token_id]
        self.digits = [encode(REGION_TEXT % (d, 1, 1, 1))[slots[0]] for d in range(10)]
        self.trunk = self.prefix + [self.region] + self.spans[0]  # every REGION answer up to the first digit of x1
        # Numbers of every length at every place must come apart the same way.
        boxes = ((2, 2, 2, 2), (0, 0, 1, 1), (12, 345, 67, 890), (9, 10, 1024, 100), (4567, 8, 16384, 2031))
        if any(self.region_ids(box) != encode(REGION_TEXT % box) + [tokenizer.eos_token_id] for box in boxes):
            raise ValueError(f"the grammar needs a tokenizer that writes a number digit by digit; that of "
                             f"{tokenizer.name_or_path!r} does not. Use decode='free' with this model.")

    def region_ids(self, box):
        """Token ids of the whole REGION answer, end-of-turn included, for four integers in resized-image pixels."""
        ids = list(self.trunk)
        for number, span in zip(box, self.spans[1:]):
            ids += [self.digits[int(digit)] for digit in str(number)] + span
        return ids


# ---- LoRA

class LoraLinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x), W and b frozen; B = 0 at the start, so y is at first unchanged.

    A [r, in], B [out, r] are float32 whatever the type of W: at lr 5e-5 a bfloat16 weight would round most steps away.
    They are cast down for the product, which costs nothing beside casting the activations up (what peft does).
    """

    def __init__(self, base, r, alpha, dropout, generator):
        super().__init__()
        self.base, self.scaling, self.dropout, self.enabled = base, alpha / r, dropout, True
        # peft's initialisation: A uniform in +-1/sqrt(in), drawn on the CPU so that every device starts alike.
        a = (torch.rand(r, base.in_features, generator=generator) * 2 - 1) / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        self.shared = None                                      # during a rollout: Shared, and this layer's place in it

    def forward(self, x):
        y = self.base(x)                                                            # [..., out]
        if not self.enabled:
            return y
        if self.shared is not None:
            low, b = self.shared[0].low(x, self.shared[1]), self.shared[2]          # [n, r], [r, out]
        else:
            low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype)) * self.scaling
            low, b = low.flatten(0, -2), self.lora_B.to(x.dtype).T                  # [n, r], [r, out]
        return torch.addmm(y.flatten(0, -2), low, b).view(y.shape)                  # [..., out]


class Shared:
    """The A of LoRA layers that read the same input (q, k and v; gate and up), cast and stacked for a whole rollout.

    A decoding step is a few rows: on a GPU its time is the number of kernels, not their size. So the layers of a group
    take one product with A where they would take one each, with casts and scaling besides.
    """

    def __init__(self, layers, dtype):
        self.a = torch.cat([layer.lora_A * layer.scaling for layer in layers]).to(dtype)        # [sum r, in]
        self.ranks, self.x = [len(layer.lora_A) for layer in layers], None
        for i, layer in enumerate(layers):
            layer.shared = self, i, layer.lora_B.to(dtype).T.contiguous()

    def low(self, x, i):
        """A x of layer i -> [n, r]; the first of the group to see x computes it for all."""
        if x is not self.x:
            self.x, self.parts = x, F.linear(x.flatten(0, -2), self.a).split(self.ranks, 1)
        low = self.parts[i]
        if i + 1 == len(self.ranks):  # the last of them: a prompt's activations must not be kept until the next pass
            self.x = self.parts = None
        return low


# ---- what travels: prompts, completions, and the tree that packs completions

@dataclass
class Prompt:
    """One query as one policy reads it. Tensors are on the CPU but for `features`, and `pixel_values` once seen."""

    ids: torch.Tensor                       # int64 [T]
    mm_token_type_ids: torch.Tensor         # int64 [T], 1 at image tokens
    position_ids: torch.Tensor              # int64 [3, T], mrope: time, height, width
    pixel_values: torch.Tensor              # float32 [patches, 1176]; of the model's type, once seen
    grid_thw: torch.Tensor                  # int64 [3], in patches of 14 pixels
    resized_size: tuple[int, int]           # (width, height) in pixels, as the model sees the image
    original_size: tuple[int, int]          # (width, height) in pixels
    features: torch.Tensor | None = None    # [G, D] image tokens, kept while the vision tower is frozen

    @property
    def next_position(self):
        """Position of the first completion token. Not T: a g x h image takes g * h tokens but max(g, h) positions."""
        return int(self.position_ids.max()) + 1


@dataclass
class Completion:
    """One sampled answer. All lists run over its tokens, end-of-turn included where emitted."""

    ids: list[int]
    free: list[bool]                # True where the token was a choice: the decision, a digit, or what ends a number
                                    # (unless nothing else could stand there); in free decoding everywhere but in the
                                    # template before a forced decision
    allowed: list[tuple | None]     # at a choice: the token ids it was made among, None = the whole vocabulary
    log_probs: list[float]          # at a choice: log pi(token), renormalised over `allowed`; 0 elsewhere
    decision_index: int | None      # index of the decision token; None where the answer has no readable decision
    forced_decision: bool           # the decision was set by the plan; it is a choice all the same (see `rollout`)
    action: Action


class Tree:
    """Completions of one query merged into a prefix tree: equal beginnings are one path, computed once.

    Nodes: tokens [n], parents [n] (-1 = the prompt), depths [n], of the first ends[c] tokens of each completion c.
    paths[c][t] is the node whose hidden state predicts token t of completion c.

    >>> Tree([[7, 8, 9], [7, 5, 6]], ends=[2, 2]).tokens, Tree([[7, 8, 9], [7, 5, 6]], ends=[2, 2]).parents
    ([7, 8, 5], [-1, 0, 0])
    """

    def __init__(self, sequences, ends):
        self.tokens, self.parents, self.depths, self.paths = [], [], [], []
        nodes = {}                                              # (parent, token) -> node
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

    def ancestors(self):
        """bool [n, n]: does node i see node j? (Its ancestors and itself.)"""
        sees = np.eye(len(self.tokens), dtype=bool)             # [n, n]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]                      # parents come before their children
        return torch.from_numpy(sees)


class Layout:
    """Rows for one forward pass, each of one or more (prompt, Tree): [prompt | tree | prompt | tree ...].

    ids [R, L], is_image bool [R, L], positions [3, R, L]; sees bool [R, L, L], the block mask: a token sees what came
    before it in its own prompt, and of its tree its ancestors alone. None where that is plain causal attention, which
    has faster kernels without a mask. What the prompts of a row begin with (the system's turn) is written once and
    seen by all. ends: (row, slot) of each prompt's last token; node k of its tree is k + 1 slots further.
    """

    def __init__(self, rows):
        self.prompts, self.ends = [prompt for row in rows for prompt, _ in row], []
        shared = [common_length([prompt for prompt, _ in row]) if len(row) > 1 else 0 for row in rows]
        lengths = [sum(len(prompt.ids) + len(tree.tokens) for prompt, tree in row) - n * (len(row) - 1)
                   for row, n in zip(rows, shared)]
        size = len(rows), max(lengths)
        self.tokens = sum(lengths)
        self.ids = torch.zeros(size, dtype=torch.long)                                              # [R, L]
        self.is_image = torch.zeros(size, dtype=torch.bool)                                         # [R, L]
        self.positions = torch.zeros(3, *size, dtype=torch.long)                                    # [3, R, L]
        branched = any(len(row) > 1 or len(set(tree.depths)) < len(tree.depths) for row in rows for _, tree in row)
        self.sees = torch.ones(*size, size[1], dtype=torch.bool).tril() if branched else None       # [R, L, L]
        for r, row in enumerate(rows):
            at = 0
            for i, (prompt, tree) in enumerate(row):
                skip = shared[r] if i else 0
                start, end = at, at + len(prompt.ids) - skip
                at = end + len(tree.tokens)
                self.ids[r, start:end], self.ids[r, end:at] = prompt.ids[skip:], torch.tensor(tree.tokens).long()
                self.is_image[r, start:end] = prompt.mm_token_type_ids[skip:].bool()
                self.positions[:, r, start:end] = prompt.position_ids[:, skip:]
                # All branches start at the same position: each reads as if it alone followed the prompt.
                self.positions[:, r, end:at] = prompt.next_position + torch.tensor(tree.depths).long()
                if branched:
                    self.sees[r, start:, skip:start] = False            # of the prompts before, what is shared alone
                    self.sees[r, end:at, end:at] = tree.ancestors()
                self.ends.append((r, end - 1))


def common_length(prompts):
    """How many tokens these prompts begin with in common. Text alone: of an image, equal tokens say nothing."""
    count = min(len(prompt.ids) for prompt in prompts) - 1
    same = torch.stack([(prompt.ids[:count] == prompts[0].ids[:count]) & (prompt.mm_token_type_ids[:count] == 0)
                        for prompt in prompts]).all(0)                                              # [T]
    return count if same.all() else int(same.int().argmin())


def queries_a_row(shared, own, width):
    """How many queries make the cheapest row, in products: what they share, O tokens, is read once a row, but attention
    takes L^2 products, masked or not. With r tokens of its own a query costs least at sqrt(O (O + 6 D)) / r; attention
    under a mask runs at about a third of the rate of the other layers, hence 2 D."""
    return max(1, round(math.sqrt(shared * (shared + 2 * width)) / own))


@dataclass
class Pack:
    """Completions of some queries as one forward pass scores them (`Policy.pack`). P choices, U sites."""

    queries: list[int]          # B indices, of those that were given to `pack`
    owners: list                # M of (query, its completion's number), in the order of the queries
    completions: list           # M
    layout: Layout
    choices: list               # P of (m, t, (row, slot), token, allowed): token t of completion m is predicted there
    sites: list                 # U of (i, (row, slot), tokens fed or allowed there), each node of queries[i]'s tree


# ---- decoding: the answer being written, and the rows of the model that write it

class Draft:
    """An answer being written, in one of two ways: `by_grammar` or `freely`. Each is a generator that yields the tokens
    allowed next (None: all of them; (): the answer is whole) and is sent the one chosen.

    query: index of its prompt; forced: the decision that is set, or None; stream: the rollout's own random numbers, or
    None to take the likeliest token.
    """

    def __init__(self, query, prompt, forced=None, stream=None):
        self.query, self.prompt, self.forced, self.stream = query, prompt, forced, stream
        self.tokens, self.fed = [], 0       # (id, free, allowed, log_prob) each; how many of them the model has read
        self.given = []                     # tokens that are written next, whatever the model would choose
        self.text, self.decision_index, self.p_region = None, None, None

    def begin(self, way):
        self.way, self.allowed = way, next(way)

    def draw(self):
        """The next uniform number of the stream (in free decoding what is given takes none); None without a stream."""
        given = self.given and self.allowed is None
        return None if self.stream is None else 0.0 if given else self.stream.random()

    def add(self, tokens):
        self.tokens += [(token, False, None, 0.0) for token in tokens]

    def choose(self, token, log_prob):
        if len(self.given) > 1:  # the template before a decision that is given: no choice
            self.add([token])
        else:
            self.tokens.append((token, True, self.allowed, log_prob))
        self.given = self.given[1:]
        self.allowed = self.way.send(token)

    def by_grammar(self, grammar):
        """Template, decision, and for REGION four numbers, each kept in range of the resized image (w, h): 0 <= x1 < w,
        x1 < x2 <= w, and the same for y with h. So every box that can be written is well-formed."""
        self.add(grammar.prefix)
        self.decision_index, self.given = len(self.tokens), [grammar.decisions[self.forced]] if self.forced else []
        if (yield grammar.full, grammar.region) == grammar.full:
            self.add(grammar.full_tail)
            self.text = FULL_TEXT
            yield ()
        self.add(grammar.spans[0])
        numbers = []
        for place in range(4):
            side = self.prompt.resized_size[place % 2]
            low, high = (0, side - 1) if place < 2 else (numbers[place - 2] + 1, side)
            end, *template = grammar.spans[place + 1]  # what ends the number, and what follows
            typed, token = "", None
            while token != end:
                allowed = tuple(grammar.digits[digit] for digit in next_digits(low, high, typed))
                allowed += (end,) if typed and int(typed) >= low else ()
                if len(allowed) > 1:
                    token = yield allowed
                else:  # no choice ("223" of at most 223 can only end): no decoding step, log-probability 0
                    token = allowed[0]
                    self.add(allowed)
                typed += "" if token == end else str(grammar.digits.index(token))
            numbers.append(int(typed))
            self.add(template)
        self.text = REGION_TEXT % tuple(numbers)
        yield ()

    def freely(self, tokenizer, ends, limit, grammar=None):
        """Every token is a choice among the whole vocabulary, until end-of-turn or `limit` tokens; a forced decision is
        given, and so is the grammar's template before it."""
        if self.forced:
            self.given, self.decision_index = grammar.prefix + [grammar.decisions[self.forced]], len(grammar.prefix)
        token = yield None
        while self.given or token not in ends and len(self.tokens) < limit:
            token = yield None
        ids = [token for token, *_ in self.tokens]
        ids = ids[:-1] if token in ends else ids
        self.text = tokenizer.decode(ids)
        answer = ANSWER.fullmatch(self.text.strip())
        if answer is not None and self.decision_index is None:
            # It is the token whose text first reaches into the word FULL or REGION; a model may space or split its
            # answer in other ways than the template, so a fixed index would not do.
            start = answer.start(1) + len(self.text) - len(self.text.lstrip())
            self.decision_index = next(i for i in range(len(ids)) if len(tokenizer.decode(ids[:i + 1])) > start)
        yield ()

    def finish(self):
        action = parse(self.text, self.prompt.resized_size, self.prompt.original_size, self.p_region)
        return Completion(*map(list, zip(*self.tokens)), self.decision_index, self.forced is not None, action)


class Slots(DynamicLayer):
    """Keys and values of one layer with room for what comes: torch.cat would copy all of them for every token."""

    def update(self, keys, values, *_, **__):
        start, end = self.get_seq_length(), self.get_seq_length() + keys.shape[-2]
        if not start or end > self.room[0].shape[-2]:
            old = (self.keys, self.values) if start else (keys[..., :0, :], values[..., :0, :])
            self.room = [torch.cat([held, new, torch.empty_like(new[..., :1, :]).expand(-1, -1, 64, -1)], -2)
                         for held, new in zip(old, (keys, values))]
            self.is_initialized = True
        self.room[0][..., start:end, :], self.room[1][..., start:end, :] = keys, values
        self.keys, self.values = (room[..., :end, :] for room in self.room)         # [R, heads, S, d] each
        return self.keys, self.values

    def batch_select_indices(self, index):
        end, self.room = self.get_seq_length(), [room[index] for room in self.room]
        self.keys, self.values = (room[..., :end, :] for room in self.room)


class Rows:
    """The rows being decoded: key-value cache, which of its slots are real [R, S], next position [R], last hidden
    state [R, D]. Rows differ in length, so slots hold padding, behind prompts and before chunks: `valid` hides it, and
    positions are explicit, which is all that attention needs."""

    def __init__(self, language_model, cache, valid, position, hidden):
        self.language_model, self.cache = language_model, cache
        self.valid, self.position, self.hidden = valid, position, hidden

    def select(self, index):
        """Keep, repeat or reorder rows. This is where a query's prompt cache becomes that of its rollouts."""
        index = torch.tensor(index, device=self.hidden.device)                                          # [R']
        self.cache.batch_select_indices(index)
        self.valid, self.position, self.hidden = self.valid[index], self.position[index], self.hidden[index]

    def feed(self, chunks):
        """One forward over each row's new tokens (at least one); `hidden` [R, D] is then that of the last."""
        width, device = max(len(chunk) for chunk in chunks), self.hidden.device
        ids = torch.tensor([[0] * (width - len(chunk)) + chunk for chunk in chunks], device=device)     # [R, T]
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=device)                         # [R]
        real = torch.arange(width, device=device) >= width - lengths[:, None]                           # [R, T]
        positions = self.position[:, None] + (real.cumsum(1) - 1).clamp(min=0)                          # [R, T]
        self.valid, self.position = torch.cat([self.valid, real], 1), self.position + lengths   # [R, S + T], [R]
        slots = torch.arange(self.valid.shape[1], device=device)                                        # [S + T]
        sees = self.valid[:, None] & (slots <= slots[-width:, None])                                    # [R, T, S + T]
        self.hidden = self.language_model(
            input_ids=ids, attention_mask=additive_mask(sees, self.hidden.dtype), use_cache=True,
            position_ids=positions.expand(3, -1, -1), past_key_values=self.cache).last_hidden_state[:, -1]


def additive_mask(sees, dtype):
    """bool [B, T, S] "token t sees slot s" -> [B, 1, T, S], 0 where it does, the type's minimum elsewhere: additive for
    both attention implementations, and not -inf, which makes NaN of a row that sees nothing."""
    # Rows begin at multiples of 8 numbers: CUDA's kernel copies other masks, in every layer, and keeps the copies.
    width = sees.shape[-1]
    mask = torch.zeros(*sees.shape[:-1], width + -width % 8, dtype=dtype, device=sees.device)[..., :width]
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def pick(log_probs, draws):
    """Column of each row [R], from log_probs [R, C]: the likeliest where draws are None, else by inverse CDF.

    That takes one uniform number a choice, so a rollout's draws do not depend on who else is in the batch.
    (torch.multinomial would take its numbers from one generator for all rows.)
    """
    # NaN would come out as a column that does not exist, or, of argmax, as an answer like any other.
    if log_probs.amax(-1).isnan().any():
        raise FloatingPointError("the policy's log-probabilities are NaN: its weights or activations are not finite "
                                 "(try float32 weights, or an adapter of an earlier step)")
    if draws[0] is None:
        return log_probs.argmax(-1)
    cdf = log_probs.double().exp().cumsum(-1)                                       # [R, C]
    u = torch.tensor(draws, dtype=torch.float64, device=cdf.device)[:, None]        # [R, 1]
    # The factor keeps u below the total even when u rounds to 1; right=True steps over columns of probability 0.
    return torch.searchsorted(cdf, u * (1 - 1e-12) * cdf[:, -1:], right=True)[:, 0]


def in_slices(function, *columns, size=512):
    """function over slices of columns of equal length -> list of results. For logits over 150,000 tokens: computed
    again in the backward pass instead of kept for it."""
    return [checkpoint(function, *(column[i:i + size] for column in columns), use_reentrant=False)
            for i in range(0, len(columns[0]), size)]


# ---- the policy

class Policy:
    """A frozen Qwen2.5-VL with its processor and, once added, LoRA. Made by `load_policy`; starts in eval mode.

    model, processor as in transformers; name: what it was loaded from; max_new_tokens: of a freely decoded answer.
    What all prompts begin with (`opening`) is read once and kept until a weight of the language model changes.
    """

    def __init__(self, model, processor, name, system_prompt):
        self.model, self.processor, self.name, self.system_prompt = model, processor, name, system_prompt
        self.language_model, self.device = model.model.language_model, model.device
        self.lora, self.layers = None, {}                           # settings, {module path: LoraLinear}
        self.max_new_tokens, self.training, self._prefix = 256, False, (None, None)
        # The 3B ends a turn with <|im_end|> or <|endoftext|>; its generation config lists both.
        ends = model.generation_config.eos_token_id
        self.end_tokens = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @functools.cached_property
    def grammar(self):
        return Grammar(self.processor.tokenizer)

    @functools.cached_property
    def opening(self):
        """Tokens with which every prompt begins, int64 [O]: the system's turn, hundreds of tokens."""
        return torch.tensor(self.processor.tokenizer(self._chat())["input_ids"], dtype=torch.long)

    def _chat(self, question=None):
        """The chat template's text: the system's turn alone, or all up to where the answer begins."""
        messages = [{"role": "system", "content": self.system_prompt}]
        if question is not None:
            messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=question is not None)

    def prompts(self, images, questions):
        """PIL images (read as RGB) and question strings, one each a query -> list[Prompt].

        ValueError for a question that holds one of the tokenizer's special tokens (it could end its own turn or stand
        for an image) or half a surrogate pair, and for an image of sides above 200 : 1.
        """
        for i, (image, question) in enumerate(zip(images, questions, strict=True)):
            found = [token for token in self.processor.tokenizer.all_special_tokens if token in question]
            if found:
                raise ValueError(f"question {i} contains the special token {found[0]!r}: {question[:80]!r}")
            if any("\ud800" <= letter <= "\udfff" for letter in question):  # a lone \ud83d in JSON
                raise ValueError(f"question {i} has half a surrogate pair, which is no character: {question[:80]!r}")
            if not min(image.size) or max(image.size) > 200 * min(image.size):
                raise ValueError(f"image {i} is {image.size} pixels: sides that differ by a factor of more than 200 "
                                 "cannot be resized by Qwen2.5-VL; crop it or drop the query")
        # Unpadded: rows are put together (and padded) where they are run, in `_forward`.
        inputs = self.processor(text=[self._chat(question) for question in questions],
                                images=[image.convert("RGB") for image in images])
        grids, patch, prompts = inputs["image_grid_thw"], self.model.config.vision_config.patch_size, []
        pixels = inputs["pixel_values"].split(grids.prod(-1).tolist())                             # B x [patches, 1176]
        for image, ids, pixel_values, grid in zip(images, inputs["input_ids"], pixels, grids):
            ids = torch.as_tensor(ids)                                                              # [T]
            types = (ids == self.processor.image_token_id).long()                                   # [T]
            # Without mm_token_type_ids the model would silently give image tokens text positions.
            positions, _ = self.model.model.get_rope_index(ids[None], types[None], image_grid_thw=grid[None])
            resized = (int(grid[2]) * patch, int(grid[1]) * patch)                                  # (width, height)
            prompts.append(Prompt(ids, types, positions[:, 0], pixel_values, grid, resized, image.size))
        return prompts

    @torch.no_grad()
    def rollout(self, prompts, plans, decode="grammar", temperature=1.0, sample=True, seeds=None, max_new_tokens=None):
        """Write completions for B prompts -> B lists of Completion, as long as the plans. Dropout is off.

        plans[b]: one entry a rollout, None (the policy decides), "FULL" or "REGION" (forced decision, Sec. 3.4's
        "ensuring both decisions appear"). A forced decision is still a choice with its log-probability: it was not
        sampled, but pi(d | x) is what the decision's gradient moves.
        decode: "grammar" or "free"; sample: False takes the likeliest token at each choice.
        seeds[b]: an int (or tuple of ints) a query, needed to sample. Rollout n of a query draws from a stream of its
        own, seeded by (seed, n): the same completions come out whatever else is in the batch, however many rollouts.
        """
        if decode not in ("grammar", "free"):
            raise ValueError(f"decode must be 'grammar' or 'free', not {decode!r}")
        seeds = seeds if sample else [None] * len(prompts)
        groups = [[Draft(b, prompt, entry, np.random.default_rng([*np.atleast_1d(seed), n]) if sample else None)
                   for n, entry in enumerate(plan)]
                  for b, (prompt, plan, seed) in enumerate(zip(prompts, plans, seeds, strict=True))]
        drafts = [draft for group in groups for draft in group]
        # Without forced decisions free decoding asks nothing of the tokenizer.
        grammar = self.grammar if decode == "grammar" or any(draft.forced for draft in drafts) else None
        free = (self.processor.tokenizer, self.end_tokens, max_new_tokens or self.max_new_tokens, grammar)
        for draft in drafts:
            draft.begin(draft.by_grammar(grammar) if decode == "grammar" else draft.freely(*free))
        training = self.training
        self.eval()
        try:
            self._share()
            self._write(prompts, drafts, decode == "grammar", temperature)
        finally:
            for layer in self.layers.values():
                layer.shared = None
            self.train(training)
        return [[draft.finish() for draft in group] for group in groups]

    def _share(self):
        """Make the layers of LoRA ready for many small passes under the same weights (`Shared`)."""
        groups, like = {}, {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # these read the same input
        for name, layer in self.layers.items():
            parent, _, last = name.rpartition(".")
            groups.setdefault((parent, like.get(last, last)), []).append(layer)
        for layers in groups.values():
            Shared(layers, self.model.dtype)

    def _write(self, prompts, drafts, by_grammar, temperature):
        """Write all drafts to their ends: one prefill of the prompts, then choice by choice."""
        # Under the grammar the prefill runs on through the REGION template, whatever will be decided: one pass gives
        # p(REGION | x) and the first digit's distribution; the template is some 30 tokens beside the prompt's hundreds.
        tail, split = (self.grammar.trunk, len(self.grammar.prefix)) if by_grammar else ([], 0)
        cache, skip = self._cache(prompts)
        layout = Layout([[(prompt, Tree([tail], [len(tail)]))] for prompt in prompts])
        hidden = self._forward(layout, cache, skip)                                                     # [B, L, D]
        starts = torch.tensor([len(prompt.ids) for prompt in prompts], device=self.device)              # [B]
        valid = torch.arange(skip + hidden.shape[1], device=self.device) < starts[:, None] + len(tail)  # [B, S]
        position = torch.tensor([prompt.next_position + len(tail) for prompt in prompts], device=self.device)  # [B]
        before, last = (hidden[range(len(prompts)), starts + k - 1 - skip] for k in (split, len(tail)))  # [B, D] each
        rows = Rows(self.language_model, cache, valid, position, last)
        log_probs, columns = self.choice_log_probs(before, [drafts[0].allowed] * len(prompts), temperature)  # [B, C]
        if by_grammar:
            full, region = (log_probs[:, columns.index(token)].tolist() for token in drafts[0].allowed)
            for draft in drafts:
                # exp alone would be 1 from .99999997 on; 1 - p(FULL) tells the surest queries apart (thresholds do).
                p, q = region[draft.query], full[draft.query]
                draft.p_region, draft.fed = math.exp(p) if p < q else -math.expm1(q), len(tail)
        at = [draft.query for draft in drafts]  # the row of each draft: at first that of its query
        log_probs = log_probs[at]                                                                       # [R, C]
        while True:
            picks = pick(log_probs, [draft.draw() for draft in drafts]).tolist()                        # [R]
            tokens = [draft.given[0] if draft.given else columns[c] for draft, c in zip(drafts, picks)]
            values = log_probs[range(len(tokens)), [columns.index(token) for token in tokens]].tolist()
            for draft, token, value in zip(drafts, tokens, values):
                draft.choose(token, value)
            going = [(row, draft) for row, draft in zip(at, drafts) if draft.allowed != ()]
            if not going:
                return
            index, drafts = map(list, zip(*going))
            at = list(range(len(drafts)))
            if index != list(range(len(rows.hidden))):
                rows.select(index)
            # Template text between two choices goes in with the choice before it: no step of its own.
            chunks = [[token for token, *_ in draft.tokens[draft.fed:]] for draft in drafts]
            if any(chunks):
                rows.feed(chunks)
            for draft in drafts:
                draft.fed = len(draft.tokens)
            log_probs, columns = self.choice_log_probs(rows.hidden, [draft.allowed for draft in drafts], temperature)

    def _cache(self, prompts):
        """A key-value cache for rows of these prompts, and how many of their first tokens it holds already."""
        cache, ids = Cache(layers=[Slots() for _ in self.language_model.layers]), self.opening
        if not len(ids) or not all(torch.equal(prompt.ids[:len(ids)], ids) for prompt in prompts):
            return cache, 0  # prompts of another policy, or a template that begins with the image
        # What is kept holds while no weight is changed and no LoRA layer switched. PyTorch counts a tensor's changes,
        # but neither those in inference mode, which cannot be trained, nor a fused optimizer's: so `train` forgets it.
        state = [layer.enabled for layer in self.layers.values()], [
            (id(p), p.is_inference() or p._version) for p in self.language_model.parameters()]
        if self._prefix[0] != state:
            self._prefix = state, DynamicCache(config=self.language_model.config)
            positions = torch.arange(len(ids), device=self.device).expand(3, 1, -1)             # text: all three alike
            self.language_model(input_ids=ids[None].to(self.device), position_ids=positions,
                                past_key_values=self._prefix[1], use_cache=True)
        for i, layer in enumerate(self._prefix[1].layers):                                      # keys [1, heads, O, d]
            cache.update(*(x.expand(len(prompts), -1, -1, -1) for x in (layer.keys, layer.values)), i)
        return cache, len(ids)

    def _forward(self, layout, cache=None, skip=0):
        """The language model over a Layout -> hidden [R, L, D].

        cache: to be filled, for decoding on from here, where rows have one prompt and no branches. It holds the first
        `skip` tokens of all rows already, and L is without them.
        """
        ids, is_image, positions = layout.ids[:, skip:], layout.is_image[:, skip:], layout.positions[..., skip:]
        embeds = self.language_model.embed_tokens(ids.to(self.device))                              # [R, L, D]
        features = self._features(layout.prompts).to(embeds.dtype)                                  # [sum G, D]
        embeds = embeds.masked_scatter(is_image.to(self.device)[..., None], features)               # [R, L, D]
        mask = None if layout.sees is None else additive_mask(layout.sees.to(self.device), embeds.dtype)
        return self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions.to(self.device),
            past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def _features(self, prompts):
        """Image tokens of the prompts after the vision tower, [sum G, D]; only LoRA in the tower makes them anew."""
        new = [prompt for prompt in prompts if self.tower_adapted or prompt.features is None]
        if new:
            for prompt in new:  # once, for rollout, update and reference; the tower casts them first thing anyway
                prompt.pixel_values = prompt.pixel_values.to(self.device, self.model.dtype)
            pixels = torch.cat([prompt.pixel_values for prompt in new])                             # [patches, 1176]
            grid = torch.stack([prompt.grid_thw for prompt in new]).to(self.device)                 # [B, 3]
            with torch.set_grad_enabled(self.tower_adapted and torch.is_grad_enabled()):
                found = self.model.model.get_image_features(pixels, grid).pooler_output             # B x [G, D]
            if self.tower_adapted:
                return torch.cat(found)
            for prompt, features in zip(new, found):
                prompt.features = features
        return torch.cat([prompt.features for prompt in prompts])

    def choice_log_probs(self, hidden, allowed, temperature):
        """Log-probabilities of the next token, renormalised over what is allowed: the one path of sampling and scoring.

        hidden [P, D]; allowed: P tuples of token ids, or P times None for the whole vocabulary.
        -> float32 [P, C], -inf where a column is not allowed in that row; columns, the C token ids.
        """
        weight = self.model.lm_head.weight                                                          # [V, D]
        if allowed[0] is None:
            return (F.linear(hidden, weight).float() / temperature).log_softmax(-1), range(len(weight))
        columns = sorted(set().union(*allowed))
        place = {token: c for c, token in enumerate(columns)}
        mask = np.zeros((len(allowed), len(columns)), dtype=bool)                                   # [P, C]
        rows = np.repeat(np.arange(len(allowed)), [len(tokens) for tokens in allowed])
        mask[rows, [place[token] for tokens in allowed for token in tokens]] = True
        # Fewer than 20 rows of the output layer instead of 150,000, so float32 costs nothing; in bfloat16 logits near
        # 20 come in steps of 1/8, which would show in p(REGION | x).
        logits = F.linear(hidden.float(), weight[columns].float()) / temperature                    # [P, C]
        return logits.masked_fill(~torch.from_numpy(mask).to(logits.device), -torch.inf).log_softmax(-1), columns

    def pack(self, prompts, completions, which=None, hold=False, budget=None):
        """Prompts and as many lists of Completion (of any sizes) -> list of Pack, each a forward pass of `score`.

        which: indices of the queries that are meant; None: all. budget: tokens of a pass, padding included; a query
        that alone has more is a pass by itself. None: all in one.
        hold: feed every token of an answer but its last, so that `score` can tell what the template's have become.
        """
        def end(one):  # the last choice is predicted, never fed: without `hold` a tree ends before it
            return len(one.ids) - 1 if hold else max(np.flatnonzero(one.free), default=0)

        def length(row):
            return sum(sizes[b] for b in row) - (len(row) - 1) * shared

        which = list(range(len(prompts)) if which is None else which)
        trees = {b: Tree([one.ids for one in completions[b]], [end(one) for one in completions[b]]) for b in which}
        sizes = {b: len(prompts[b].ids) + len(tree.tokens) for b, tree in trees.items()}
        shared = common_length([prompts[b] for b in which])
        own = sum(sizes.values()) / len(sizes) - shared
        most = queries_a_row(shared, own, self.language_model.config.hidden_size)
        most = max(1, min(most, budget // max(sizes.values()))) if budget else most
        passes = [[]]
        for start in range(0, len(which), most):
            row = which[start:start + most]
            if budget and passes[-1] and max(map(length, [*passes[-1], row])) * (len(passes[-1]) + 1) > budget:
                passes.append([])
            passes[-1].append(row)
        return [self._pack_rows(rows, prompts, completions, trees) for rows in passes]

    def _pack_rows(self, rows, prompts, completions, trees):
        """The Pack of these rows, lists of indices of queries."""
        queries = [b for row in rows for b in row]
        layout = Layout([[(prompts[b], trees[b]) for b in row] for row in rows])
        choices, sites, owners = [], {}, []
        for i, (b, (row, end)) in enumerate(zip(queries, layout.ends)):
            for n, (one, path) in enumerate(zip(completions[b], trees[b].paths)):
                owners.append((b, n))
                for t, node in enumerate(path):  # the node whose hidden state predicts token t; -1 is the prompt's last
                    at, allowed = (row, end + 1 + node), one.allowed[t] if one.free[t] else (one.ids[t],)
                    sites[at] = (i, at, allowed)
                    if one.free[t]:
                        choices.append((len(owners) - 1, t, at, one.ids[t], allowed))
        if not choices:
            raise ValueError("log_probs needs at least one completion with a choice in it")
        return Pack(queries, owners, [completions[b][n] for b, n in owners], layout, choices, list(sites.values()))

    def log_probs(self, prompts, completions, temperature=1.0):
        """`score` of all completions in one pass: prompts, B; completions, B lists of Completion."""
        return self.score(self.pack(prompts, completions)[0], temperature)

    def score(self, pack, temperature=1.0, hold=False):
        """Log-probabilities of a Pack's completions, differentiable with respect to LoRA.

        -> dict of tensors on the device, M completions, T the longest: logp float32 [M, T] (log pi of the choices, 0
        elsewhere), mask bool [M, T] (choices), decision bool [M, T] (the decision token, a choice too), entropy float32
        [M, T] (nats, of the choice's distribution, detached). Under the grammar also options float32 [M, T, C]: log pi
        of all that was allowed at a choice, -1e4 for what was not. `temperature` must be that of the rollout. Dropout
        only after `train()`. hold, of a pack with `hold`: also outside float32 [B], the mean, over all nodes of a
        query's tree, of -log of the probability that the whole vocabulary gives to what was fed or allowed there.
        """
        hidden = self._forward(pack.layout)                                                             # [R, L, D]
        ms, ts, places, tokens, allowed = map(list, zip(*pack.choices))                                 # P each
        rows, slots = map(list, zip(*places))
        log_probs, logp, entropy = self._score(hidden[rows, slots], tokens, allowed, temperature)       # [P, C], [P]
        # From the list of choices to the table of tokens.
        table = logp.new_zeros(len(pack.completions), max(len(one.ids) for one in pack.completions))    # [M, T]
        index = (torch.tensor(ms, device=logp.device), torch.tensor(ts, device=logp.device))            # m [P], t [P]
        decision = torch.tensor([pack.completions[m].decision_index == t for m, t in zip(ms, ts)], device=logp.device)
        out = {"logp": table.index_put(index, logp), "entropy": table.index_put(index, entropy),
               "mask": table.bool().index_put(index, torch.ones_like(decision)),
               "decision": table.bool().index_put(index, decision)}
        if log_probs is not None:
            blank = logp.new_full((*table.shape, log_probs.shape[-1]), -1e4)                            # [M, T, C]
            out["options"] = blank.index_put(index, log_probs)
        if hold:
            owners, places, allowed = map(list, zip(*pack.sites))                                       # U each
            rows, slots = map(list, zip(*places))
            at = torch.tensor(owners, device=logp.device)                                               # [U]
            outside, ones = self._outside(hidden[rows, slots], allowed), torch.ones_like(at, dtype=logp.dtype)  # [U]
            sums, counts = (logp.new_zeros(len(pack.queries)).index_add(0, at, x) for x in (outside, ones))     # [B]
            out["outside"] = sums / counts
        return out

    def _score(self, hidden, tokens, allowed, temperature):
        """hidden [P, D] and the tokens chosen there -> log-probabilities of all that was allowed [P, C] (None for the
        whole vocabulary), of the tokens [P], and entropies [P]."""
        def score(part, tokens, allowed):
            log_probs, columns = self.choice_log_probs(part, allowed, temperature)                      # [P, C]
            log_probs = log_probs.clamp(min=-1e4)  # for -inf: its exponential is still 0, but 0 * -inf is nan
            entropy = -(log_probs.exp() * log_probs).sum(-1).detach()                                   # [P]
            return log_probs, log_probs[range(len(tokens)), [columns.index(token) for token in tokens]], entropy

        if allowed[0] is not None:
            return score(hidden, tokens, allowed)
        parts = in_slices(lambda *part: score(*part)[1:], hidden, tokens, allowed)
        return None, *map(torch.cat, zip(*parts))

    def _outside(self, hidden, allowed):
        """-log of the probability that the whole vocabulary gives to the tokens allowed at each of U sites -> [U]."""
        def score(part, allowed):
            logits = F.linear(part, self.model.lm_head.weight).float()                                  # [s, V]
            width = max(map(len, allowed))
            columns = torch.tensor([[*some, *[some[0]] * (width - len(some))] for some in allowed], device=part.device)
            again = torch.tensor([[i >= len(some) for i in range(width)] for some in allowed], device=part.device)
            inside = logits.gather(1, columns).masked_fill(again, -torch.inf)                           # [s, width]
            return logits.logsumexp(1) - inside.logsumexp(1)                                            # [s]

        return torch.cat(in_slices(score, hidden, allowed))

    def act(self, images, questions, decode="grammar", sample=False, force=None, batch_size=16, seed=0):
        """One Action a query: PIL images and question strings, lists of equal length.

        sample: False takes the likeliest answer, True samples query i with (seed, i). force: None, "FULL" or "REGION".
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

    def add_lora(self, r=8, alpha=32, dropout=0.1, targets="all", seed=0):
        """Put LoRA on linear layers (App. B): targets "all" (vision tower too), "language", or a list of module paths.

        With "language" the image features never change, so they are computed once a prompt: much faster training.
        Never on lm_head: `choice_log_probs` reads its rows as they are.
        """
        if self.layers:
            raise ValueError("this policy has LoRA already")
        linear = [name for name, module in self.model.named_modules()
                  if isinstance(module, nn.Linear) and name != "lm_head"]
        if isinstance(targets, str):
            start = {"all": "model.", "language": "model.language_model."}[targets]
            targets = [name for name in linear if name.startswith(start)]
        for name in targets:
            if name not in linear:
                raise ValueError(f"{self.name!r} has no linear layer {name!r} that could take LoRA: wrong base model?")
        # One generator through all layers in order: the seed alone fixes the start, whatever ran before.
        generator = torch.Generator().manual_seed(seed)
        self.lora = {"r": r, "alpha": alpha, "dropout": dropout}
        for name in targets:
            self.layers[name] = LoraLinear(self.model.get_submodule(name), r, alpha, dropout, generator)
            self.model.set_submodule(name, self.layers[name].train(self.training))

    @property
    def tower_adapted(self):
        """Is there LoRA in the vision tower? Then image features change with training and must not be kept."""
        return any(name.startswith("model.visual.") for name in self.layers)

    def lora_parameters(self):
        """The trainable parameters, float32, in a fixed order (A, B layer by layer)."""
        return [parameter for layer in self.layers.values() for parameter in (layer.lora_A, layer.lora_B)]

    def save_adapter(self, folder):
        """Write the adapter so that `peft.PeftModel.from_pretrained` and vLLM read it: two files, each by rename."""
        if not self.layers:
            raise ValueError("there is no LoRA to save: call add_lora or load_adapter first")
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.name, "r": self.lora["r"],
            "lora_alpha": self.lora["alpha"], "lora_dropout": self.lora["dropout"], "bias": "none",
            # Whole paths: "gate_proj" alone would match the vision tower as well as the language model.
            "inference_mode": True, "target_modules": sorted(self.layers),
        }
        weights = {f"base_model.model.{name}.{half}.weight": getattr(layer, half).detach().cpu().contiguous()
                   for name, layer in self.layers.items() for half in ("lora_A", "lora_B")}
        os.makedirs(folder, exist_ok=True)
        # Weights last: a folder that has them is whole. Not save_file: its files can be read by their owner alone.
        for name, content in (("adapter_config.json", json.dumps(config, indent=1).encode()),
                              ("adapter_model.safetensors", save(weights, metadata={"format": "pt"}))):
            path = os.path.join(folder, name)
            with open(path + ".tmp", "wb") as file:
                file.write(content)
            os.replace(path + ".tmp", path)

    @torch.no_grad()
    def load_adapter(self, folder):
        """Read an adapter in peft's format, adding LoRA where the policy has none. ValueError where it does not fit."""
        settings, weights = read_adapter(folder)
        if not self.layers:
            names = list(dict.fromkeys(key.rpartition(".")[0] for key in weights))
            self.add_lora(settings["r"], settings["alpha"], settings["dropout"], names)
        layers = {f"{name}.{half}": getattr(layer, half) for name, layer in self.layers.items()
                  for half in ("lora_A", "lora_B")}
        there, found = ({key: tuple(value.shape) for key, value in some.items()} for some in (layers, weights))
        wrong = [key for key in {**there, **found} if there.get(key) != found.get(key)]
        if wrong or settings["alpha"] != self.lora["alpha"]:
            what = f"{wrong[0]} is {found.get(wrong[0])}, not {there.get(wrong[0])}" if wrong else settings
            raise ValueError(f"{folder}: does not fit the LoRA in place, {self.lora}: {what}")
        for key, parameter in layers.items():
            parameter.copy_(weights[key])

    @contextlib.contextmanager
    def adapter(self, enabled):
        """`with policy.adapter(False):` the base model, which is the reference policy of the KL term."""
        before = [layer.enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.enabled = enabled
        try:
            yield self
        finally:
            for layer, was in zip(self.layers.values(), before):
                layer.enabled = was

    def train(self, mode=True):
        """Dropout on (and gradient checkpointing, where enabled on `model`) until `eval()`. Stay in this mode for the
        backward pass too: checkpointing runs the forward again there. `rollout` and `act` never use dropout."""
        self.training, self._prefix = mode, (None, None) if mode else self._prefix
        if self.language_model.layers[0].gradient_checkpointing:  # the model's own word for it differs by version
            self.model.train(mode)
        for layer in self.layers.values():  # the base model has no dropout: to walk over all its modules takes longer
            layer.training = mode
        return self

    def eval(self):
        return self.train(False)


# ---- adapter files, in peft's format

# What peft's adapter_config.json may hold without changing what is computed here: where the weights go stands in the
# other file, and the *_config of ways to begin are spent. Any other switch that is on would give other logits.
HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha
    lora_dropout target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size
    loftq_config eva_config corda_config lora_ga_config ensure_weight_tying""".split()
# Ways to begin that leave the base weights as they are. The others (pissa, olora, loftq, corda ...) take the start of
# B A off W, and peft does so again when it loads: B A on the plain W would be another model.
PLAIN = {"init_lora_weights": (True, "gaussian", "eva", "orthogonal"), "bias": ("none",), "peft_type": ("LORA",)}


def adapter_base(folder):
    """Name of the base model that an adapter was trained on."""
    return read_adapter(folder)[0]["base"]


def read_adapter(folder):
    """A LoRA adapter in peft's format -> dict r, alpha, dropout, base; {"<path>.lora_A": [r, in], "<path>.lora_B"}.
    FileNotFoundError or ValueError naming the file, for what plain LoRA does not write."""
    config_path, path = (os.path.join(folder, "adapter_" + name) for name in ("config.json", "model.safetensors"))
    for needed in (config_path, path):
        if not os.path.isfile(needed):
            raise FileNotFoundError(f"{needed} is missing: {folder!r} is no LoRA adapter (runs/<run>/adapter is one)")
    try:
        with open(config_path, encoding="utf-8") as file:
            config = {"lora_dropout": 0.0, "peft_type": "none", **json.load(file)}
        r, alpha, dropout = config["r"], config["lora_alpha"], config["lora_dropout"]
        if type(r) is not int or r < 1 or not 0 <= dropout < 1 or not math.isfinite(alpha):
            raise ValueError(f"r {r}, alpha {alpha}, dropout {dropout}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{config_path} is no adapter's config ({type(error).__name__}: {error})") from error
    on = {key: value for key, value in config.items()
          if value and key not in HARMLESS and value not in PLAIN.get(key, ())}
    if on:
        raise ValueError(f"{config_path}: only plain LoRA without bias is read here, not {on}")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    tensors = {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in tensors.items()}
    # Before anything of this size is made: r is what a stranger's config says.
    wrong = [key for key, value in tensors.items() if value.shape[key.endswith("B"):][:1] != (r,)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is {tuple(tensors[wrong[0]].shape)}, but r is {r}")
    return {"r": r, "alpha": alpha, "dropout": dropout, "base": config.get("base_model_name_or_path")}, tensors


# ---- loading

def reordered(x, sizes, order):
    """Pieces of x, of so many rows each, in another order. Not by slices: in the backward pass each would fill a tensor
    of x's size, and all of them would be added up."""
    pieces = x.split(sizes)
    return torch.cat([pieces[i] for i in order])


class WindowAttention(Qwen2_5_VLVisionAttention):
    """transformers' attention of the vision tower, for CUDA: all windows of one length in one call.

    Theirs is a call a window: 1,796 for an image of 1,000 tokens in the 3B, each of microseconds on a GPU, which waits
    for Python then (on a CPU a call costs nothing beside its work). Same weights, same numbers.
    """

    def forward(self, hidden_states, cu_seqlens, position_embeddings, **_):
        """hidden_states [T, D]; cu_seqlens int32 [windows + 1]: where they begin and end; cos, sin [T, d] -> [T, D]."""
        # Windows at the images' edges are shorter. How runs of one length are put together is kept with the tensor,
        # which all blocks of a pass share: to ask a GPU for numbers is to wait for it.
        if not hasattr(cu_seqlens, "runs"):
            lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
            runs = [(length, sum(run)) for length, run in itertools.groupby(lengths)]       # length, patches of each
            order, sizes = sorted(range(len(runs)), key=runs.__getitem__), [size for _, size in runs]
            cu_seqlens.runs = sizes, order, [sizes[i] for i in order], np.argsort(order).tolist()
            cu_seqlens.groups = {n: n * lengths.count(n) for n in sorted(set(lengths))}     # length: patches of all
            cu_seqlens.turn = [reordered(x, sizes, order) for x in position_embeddings]
        sizes, order, ordered, back = cu_seqlens.runs
        qkv = reordered(self.qkv(hidden_states), sizes, order)                                          # [T, 3 H d]
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *cu_seqlens.turn)                                      # [T, H, d]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out = []
        for length, *qkv in zip(cu_seqlens.groups, *(x.split(list(cu_seqlens.groups.values())) for x in (q, k, v))):
            windows = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in qkv)                       # [W, H, n, d]
            out.append(attend(self, *windows, None, scaling=self.scaling, is_causal=False)[0].flatten(0, 1).flatten(1))
        return self.proj(reordered(torch.cat(out), ordered, back))                                      # [T, D]


def suit_cuda(model):
    """What a Qwen2.5-VL on a card is run with; on a CPU nothing is changed. cuDNN's attention, PyTorch's first choice
    on an H100, plans anew for each new length, and in a rollout all lengths are new: off, in the whole process."""
    if model.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        for block in model.model.visual.blocks:
            block.attn.__class__ = WindowAttention
        for norm in (module for module in model.modules() if hasattr(module, "variance_epsilon")):
            # One kernel where transformers' forward takes eight, with one rounding where bfloat16 had two.
            norm.forward = functools.partial(F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight,
                                             eps=norm.variance_epsilon)


def load_policy(name, adapter=None, device="cpu", dtype=None, max_pixels=None, system_prompt=None, attention="sdpa"):
    """Load a policy -> Policy in eval mode, base weights frozen. ValueError for what cannot be loaded, saying why.

    name: a folder with a Qwen2.5-VL checkpoint (mini/policy is one) or a Hugging Face id (Qwen/Qwen2.5-VL-3B-Instruct).
    adapter: folder of a LoRA adapter in peft's format. dtype: a torch.dtype or its name; default bfloat16 on CUDA,
    float32 elsewhere.
    max_pixels: area in pixels that an image is scaled down to; default the checkpoint's own, at most 1,280 * 28 * 28
    (the published 12.8 million is 16,384 tokens an image). system_prompt: text; default the folder's system_prompt.txt
    if it has one, else SYSTEM_PROMPT (Table 10). attention: "sdpa" or "eager" (both take the block mask).
    On CUDA this switches cuDNN's attention off, in the whole process (`suit_cuda`).
    """
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attention must be 'sdpa' or 'eager', not {attention!r}: others take no block mask")
    try:
        # The bare dict: for an unknown kind with code of its own AutoConfig would ask the user whether to run that.
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no policy {name!r}: neither a folder with a Qwen2.5-VL checkpoint nor a Hugging Face model "
                         "within reach. Try mini/policy or Qwen/Qwen2.5-VL-3B-Instruct.") from error
    if config.get("model_type") != "qwen2_5_vl":  # transformers would load other architectures with a warning
        raise ValueError(f"{name!r} is a {config.get('model_type')} model; the policy must be a qwen2_5_vl one")
    dtype = dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
    try:  # dtype belongs here: model.to(bfloat16) afterwards would also cast the rotary frequencies
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, RuntimeError, SafetensorError) as error:  # files that are missing or cut short
        raise ValueError(f"{name}: cannot be loaded ({error}): fetch it again") from error
    if info["missing_keys"]:  # transformers fills them at random and warns
        raise ValueError(f"{name}: the checkpoint lacks {sorted(info['missing_keys'])[:3]} ...; they would be random")
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
