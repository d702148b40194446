"""policy.py and tools/merge.py against slow, obvious oracles on a tiny random Qwen2.5-VL: each completion alone, no
cache, no packing; transformers' own forward and generate; peft."""

import doctest
import functools
import itertools
import json
import math
import os
import random
import shutil
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

import policy as policy_module
import rgrpo
import tiny_policy
from policy import (
    FULL_TEXT, REGION_TEXT, Action, Draft, Grammar, Layout, Tree, WindowAttention, adapter_base, load_policy,
    next_digits, parse, queries_a_row, to_original,
)
from tools import merge

SIZES = [(100, 60), (50, 200), (224, 224), (31, 30)]                            # (width, height) in original pixels
QUESTIONS = ["Where does this beetle live?", "What?", "How tall is this tower, and who built it?", "a 12 b"]
PLAN = [None, "FULL", "REGION", None, "REGION"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_policy.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def policy(folder):
    return load_policy(folder, system_prompt="Crop or not?")


def noise(sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module")
def images():
    return noise(SIZES)


@pytest.fixture
def prompts(policy, images):
    return policy.prompts(images, QUESTIONS)


def with_lora(policy, seed=0, **settings):
    """LoRA whose B is away from 0, so that the adapter does something."""
    if not policy.layers:
        policy.add_lora(**settings)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.lora_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


# ---- oracles

def plain_logits(model, prompt, ids):
    """Logits [len(ids) + 1, V] after the prompt's last token and after each of `ids`: one plain forward of one row."""
    row = torch.cat([prompt.ids, torch.tensor(ids, dtype=torch.long)])[None]
    types = torch.cat([prompt.mm_token_type_ids, torch.zeros(len(ids), dtype=torch.long)])[None]
    image = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw[None]}
    if model.config.image_token_id in ids:
        # Random models write image tokens, for which transformers would look for an image: set the features by hand.
        embeds = model.get_input_embeddings()(row)
        embeds = embeds.masked_scatter(types[..., None].bool(), model.model.get_image_features(
            *image.values()).pooler_output[0])
        positions, _ = model.model.get_rope_index(row, types, image_grid_thw=prompt.grid_thw[None])
        out = model(inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones_like(row))
    else:
        out = model(input_ids=row, mm_token_type_ids=types, attention_mask=torch.ones_like(row), **image)
    return out.logits[0, len(prompt.ids) - 1:].float()


@torch.no_grad()
def all_logits(model, prompts):
    return torch.cat([plain_logits(model, prompt, [70, 80, 90]).flatten() for prompt in prompts])


def plain_score(policy, prompts, completions, temperature=1.0):
    """log pi of every choice by the definition, a softmax over what is allowed; each completion alone: [P]."""
    values = []
    for prompt, group in zip(prompts, completions):
        for one in group:
            logits = plain_logits(policy.model, prompt, one.ids)
            for t in np.flatnonzero(one.free):
                allowed = list(range(logits.shape[1]) if one.allowed[t] is None else one.allowed[t])
                values.append((logits[t, allowed] / temperature).log_softmax(-1)[allowed.index(one.ids[t])])
    return torch.stack(values)


def naive_grammar_rollout(policy, prompt, plan, seed, n):
    """One rollout with a full forward for each token; what is allowed is found by listing all legal numbers.
    -> (id, what it was chosen among or None) of each token."""
    grammar, draws = policy.grammar, iter(np.random.default_rng([*seed, n]).random(64))
    written = [(token, None) for token in grammar.prefix]

    def choose(options, forced=None):
        options = sorted(options)
        logits = plain_logits(policy.model, prompt, [token for token, _ in written])[-1]
        drawn = options[int((logits[options].double().softmax(-1).cumsum(-1) < next(draws)).sum())]
        written.append((drawn if forced is None else forced, set(options)))
        return written[-1][0]

    if choose([grammar.full, grammar.region], plan and grammar.decisions[plan]) == grammar.full:
        return written + [(token, None) for token in grammar.full_tail]
    written += [(token, None) for token in grammar.spans[0]]
    numbers = []
    for place, span in enumerate(grammar.spans[1:]):
        side = prompt.resized_size[place % 2]           # 0 <= x1 < w, x1 < x2 <= w, y alike
        legal = [str(n) for n in (range(side) if place < 2 else range(numbers[place - 2] + 1, side + 1))]
        typed = ""
        while True:
            nexts = {s[len(typed):len(typed) + 1] for s in legal if s.startswith(typed)}          # "" = the end
            tokens = {span[0] if c == "" else grammar.digits[int(c)]: c for c in nexts}
            if len(tokens) == 1:
                written.append((*tokens, None))
            c = tokens[choose(tokens) if len(tokens) > 1 else next(iter(tokens))]
            if c == "":
                break
            typed += c
        numbers.append(int(typed))
        written += [(token, None) for token in span[1:]]
    return written


def complete(policy, prompt, box):
    """The Completion that writes `box` (resized pixels), or FULL for None: drives the grammar by hand."""
    grammar, draft = policy.grammar, Draft(0, prompt)
    draft.begin(draft.by_grammar(grammar))
    target = (grammar.prefix + [grammar.full] + grammar.full_tail) if box is None else grammar.region_ids(box)
    while draft.allowed:
        assert target[len(draft.tokens)] in draft.allowed
        draft.choose(target[len(draft.tokens)], 0.0)
    done = draft.finish()
    assert done.ids == target
    return done


def lists(groups):
    return [[(c.ids, c.free, c.allowed, c.decision_index, c.forced_decision, c.action.text) for c in g] for g in groups]


def logged(out, groups):
    """The log_probs that rollout wrote down, in the [M, T] layout of `log_probs`."""
    rows = [c.log_probs + [0.0] * (out["logp"].shape[1] - len(c.ids)) for group in groups for c in group]
    return torch.tensor(rows)


def spied(monkeypatch, owner, name, see):
    """A list that each call of owner.name leaves see(arguments) in."""
    seen, whole = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *rest, **more: (seen.append(see(*rest, **more)), whole(*rest, **more))[1])
    return seen


def fed(monkeypatch, policy):
    """A list of (rows, tokens a row) that each pass of the language model leaves its own in."""
    return spied(monkeypatch, policy.language_model, "forward", lambda input_ids=None, inputs_embeds=None, **_: tuple(
        (inputs_embeds if input_ids is None else input_ids).shape[:2]))


# ---- answers and frames

def call(arguments):
    return REGION_TEXT.replace('{"bbox_2d": [%d, %d, %d, %d]}', arguments)


# The model saw 112 x 56 pixels of a 224 x 56 image: x doubles, y stays.
READ = [
    (REGION_TEXT % (10, 20, 30, 40), (20, 20, 60, 40)),
    (call('{"bbox_2d": [10, 20, 30, 40], "label": "the beetle"}'), (20, 20, 60, 40)),
    (call('{"label": "x", "bbox_2d": [10.5, 20.25, 30.0, 4e1]}'), (21, 20.25, 60, 40)),
    ('  {  "Decision" :\n"REGION" ,"Tool":<tool_call>\n{"name":"image_zoom_in_tool",'
     '"arguments":{"bbox_2d":[1,2,3,4]}}\n</tool_call>\n}\n', (2, 2, 6, 4)),
    (call('{"bbox_2d": [-5, -5, 500, 500]}'), (0, 0, 224, 56)),                 # clamped to the image
    (FULL_TEXT, None), ('\n{"Decision":"FULL"} ', None), ('{"Decision": "FULL", "Tool": null}', None),
    ('{"Decision": "FULL", "Tool": ""}', None),
]
BOXES = (  # as bbox_2d: wrong kinds, wrong numbers, no area
    '"1, 2, 3, 4"', "null", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[[1, 2, 3, 4]]", '[1, 2, 3, "4"]', "[0, 0, true, true]",
    '{"0": 1}', '[1, 2, 3, 4, "5"]', '{"1": 1, "2": 2, "3": 3, "4": 4}', "[NaN, 2, 3, 4]", "[1, 2, Infinity, 4]",
    "[1, 2, 1e999, 4]", "[-Infinity, 2, 3, 4]", f"[1, 2, 3{'0' * 400}, 4]", f"[1, 2, 3{'0' * 5000}, 4]", "[" * 100000,
    "[30, 2, 10, 4]", "[10, 2, 10, 4]", "[1, 40, 3, 20]", "[1, 4, 3, 4]", "[112, 2, 130, 4]", "[-9, 2, 0, 4]")
ONE = call('{"bbox_2d": [1, 2, 3, 4]}')
MALFORMED = [
    "", " ", "FULL", "{}", "null", '{"Decision": "MAYBE"}', '{"Decision": FULL}', '{"decision": "FULL"}',
    'Sure! {"Decision": "FULL"}', '{"Decision": "FULL"} because', '{"Decision": "FULL"', ONE.replace("REGION", "FULL"),
    '{"Decision": "REGION"}', '{"Decision": "REGION", "Tool": null}', '{"Decision": "REGION", "Tool": [1, 2, 3, 4]}',
    ONE.replace("image_zoom_in_tool", "zoom"), call("[1, 2, 3, 4]"), call("{}"), call("null"), ONE + "}",
    call('{"bbox_2d": [1, 2, 3, 4], "label": 7}'), ONE.replace("</tool_call>", ""), ONE.replace('"name"', '"tool"'),
    '<tool_call>{"bbox_2d": [1,2,3,4]}</tool_call>', *(call('{"bbox_2d": %s}' % box) for box in BOXES)]


@pytest.mark.parametrize("text, box", READ)
def test_parse_reads_answers_in_original_pixels(text, box):
    action = parse(text, (112, 56), (224, 56), 0.25)
    assert action == Action("REGION" if box else "FULL", action.box, 0.25, text)
    assert action.box == (box and pytest.approx(box)) and all(type(x) is float for x in action.box or ())


@pytest.mark.parametrize("text", MALFORMED)
def test_parse_malformed(text):
    assert parse(text, (112, 56), (224, 56)) == Action("MALFORMED", None, None, text)


@pytest.mark.parametrize("size", [(100, 60), (640, 480), (333, 1000), (29, 57), (4000, 3000)])
def test_frame_mapping_round_trip(policy, size):
    prompt = policy.prompts([Image.new("RGB", size)], ["?"])[0]
    assert prompt.original_size == size and all(side % 28 == 0 for side in prompt.resized_size)
    scale = np.tile(np.divide(size, prompt.resized_size), 2)
    for whole in np.random.default_rng(1).integers(0, np.tile(prompt.resized_size, 2) + 1, (50, 4)):
        box = to_original(whole.tolist(), prompt.resized_size, size)
        assert np.divide(box, scale) == pytest.approx(whole, abs=1e-6)
        # Whole original pixels -> resized -> original: at most half a pixel of each grid is lost.
        again = to_original(np.round(np.round(box) / scale), prompt.resized_size, size)
        assert (abs(again - np.round(box)) <= np.maximum(1, scale)).all()
    assert parse(REGION_TEXT % (0, 0, *prompt.resized_size), prompt.resized_size, size).box == (0, 0, *size)


# ---- grammar

def test_next_digits_against_listing_all_numbers():
    for low, high in [(0, 0), (0, 9), (0, 10), (3, 3), (5, 28), (0, 223), (99, 101), (198, 1003), (1000, 1000)]:
        numbers = [str(n) for n in range(low, high + 1)]
        for typed in {""} | {n[:k] for n in numbers for k in range(1, 5)}:
            expected = sorted({int(n[len(typed)]) for n in numbers if n.startswith(typed) and len(n) > len(typed)})
            assert next_digits(low, high, typed) == expected, (low, high, typed)
    found = doctest.testmod(policy_module)
    assert found.attempted == 2 and found.failed == 0


def test_grammar_is_the_joint_tokenisation(policy):
    grammar, tokenizer = policy.grammar, policy.processor.tokenizer
    end = tokenizer.eos_token_id
    assert grammar.prefix + [grammar.full] + grammar.full_tail == tokenizer.encode(FULL_TEXT) + [end]
    rng = random.Random(0)
    for _ in range(100):
        box = tuple(rng.randrange(10 ** rng.randrange(1, 6)) for _ in range(4))
        assert grammar.region_ids(box) == tokenizer.encode(REGION_TEXT % box) + [end]
        assert tokenizer.decode(grammar.region_ids(box)[:-1]) == REGION_TEXT % box
    # Pieces tokenised alone would be wrong here: the end of FULL is one token, not a quote and a brace.
    assert len(grammar.full_tail) == 2 and tokenizer.decode(grammar.full_tail[:1]) == '"}'
    with pytest.raises(ValueError, match="digit by digit.*decode='free'"):
        Grammar(tiny_policy.build_tokenizer(single_digits=False))


@pytest.mark.parametrize("size, boxes", [((3, 2), 6 * 3), ((12, 2), 78 * 3)])
def test_all_outputs_of_the_grammar_parse_and_their_probabilities_sum_to_one(policy, prompts, size, boxes):
    prompt = prompts[0]
    prompt.resized_size = size                          # a canvas small enough to list everything that can be written
    xs, ys = ([(a, b) for a in range(side) for b in range(a + 1, side + 1)] for side in size)
    group = [complete(policy, prompt, box) for box in [None, *((x1, y1, x2, y2) for x1, x2 in xs for y1, y2 in ys)]]
    assert [c.action.decision for c in group] == ["FULL"] + ["REGION"] * boxes
    with torch.no_grad():
        probabilities = policy.log_probs([prompt], [group])["logp"].double().sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    # Summing out the box leaves the decision's probability.
    p_region = policy.rollout([prompt], [[None]], sample=False)[0][0].action.p_region
    assert probabilities[1:].sum().item() == pytest.approx(p_region, abs=1e-5)


@torch.no_grad()
def test_p_region_is_the_brute_force_softmax_whatever_is_forced(policy, prompts, images):
    grammar = policy.grammar
    forced = [policy.act(images, QUESTIONS, force=force) for force in (None, "FULL", "REGION")]
    for i, prompt in enumerate(prompts):
        logits = plain_logits(policy.model, prompt, grammar.prefix)[-1]
        expected = logits[[grammar.full, grammar.region]].softmax(-1)[1].item()
        assert [actions[i].p_region for actions in forced] == pytest.approx([expected] * 3, abs=1e-6)
        assert forced[0][i].decision == ("REGION" if expected > 0.5 else "FULL")
        assert (forced[1][i].decision, forced[2][i].decision) == ("FULL", "REGION")
    assert 0.01 < expected < 0.99                       # a random model, but not a saturated one


def test_p_region_tells_the_surest_queries_apart(policy, prompts, monkeypatch):
    pair = [policy.grammar.full, policy.grammar.region]
    sure = torch.tensor([[-17.0, -4e-8], [-18.0, -1.5e-8], [-1.0, -.4587], [-4e-8, -17.0]])     # of FULL, of REGION
    monkeypatch.setattr(policy, "choice_log_probs", lambda *_: (sure, pair))
    p = [c.action.p_region for c, in policy.rollout(prompts, [["FULL"]] * 4, sample=False)]
    assert p == [-math.expm1(-17.0), -math.expm1(-18.0), -math.expm1(-1.0), math.exp(-17.0)] and p[0] < p[1] < 1


# ---- rollouts

@pytest.mark.parametrize("lora", [False, True])
def test_rollout_equals_the_naive_loop_without_cache(policy, prompts, lora):
    if lora:
        with_lora(policy)
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[(11, b) for b in range(4)])
    with torch.no_grad():
        for b, group in enumerate(groups):
            for n, c in enumerate(group):
                naive = naive_grammar_rollout(policy, prompts[b], PLAN[n], (11, b), n)
                assert list(zip(c.ids, [some and set(some) for some in c.allowed])) == naive
                assert c.free == [some is not None for some in c.allowed]
                assert (c.decision_index, c.forced_decision) == (len(policy.grammar.prefix), PLAN[n] is not None)
                assert policy.processor.tokenizer.decode(c.ids[:-1]) == c.action.text
                assert c.action.decision == "FULL" or 0 <= c.action.box[0] < c.action.box[2] <= SIZES[b][0]
    assert {c.action.decision for group in groups for c in group} == {"FULL", "REGION"}


def test_free_rollout_equals_the_naive_loop_without_cache(policy, prompts):
    plan = [None, "REGION", None]
    groups = policy.rollout(prompts[:2], [plan] * 2, decode="free", seeds=[1, 2], max_new_tokens=12)
    with torch.no_grad():
        for b, group in enumerate(groups):
            for n, c in enumerate(group):
                given = policy.grammar.prefix + [policy.grammar.region] if plan[n] else []
                ids, draws = list(given), iter(np.random.default_rng([b + 1, n]).random(64))
                while len(ids) < 12 and not (ids and ids[-1] in policy.end_tokens):
                    cdf = plain_logits(policy.model, prompts[b], ids)[-1].double().softmax(-1).cumsum(-1)
                    ids.append(int((cdf < next(draws)).sum()))
                assert c.ids == ids and set(c.allowed) == {None}
                assert c.free == [i >= len(given) - 1 for i in range(len(ids))]
                assert (c.decision_index, c.forced_decision) == ((len(given) - 1, True) if given else (None, False))


def test_greedy_free_decoding_equals_generate(policy, prompts):
    found = policy.rollout(prompts, [[None]] * 4, "free", sample=False, max_new_tokens=12)
    for prompt, (one,) in zip(prompts, found):
        theirs = policy.model.generate(
            input_ids=prompt.ids[None], mm_token_type_ids=prompt.mm_token_type_ids[None],
            attention_mask=torch.ones_like(prompt.ids[None]), pixel_values=prompt.pixel_values, do_sample=False,
            image_grid_thw=prompt.grid_thw[None], max_new_tokens=12, eos_token_id=list(policy.end_tokens))
        assert theirs[0, len(prompt.ids):].tolist() == one.ids


@pytest.mark.parametrize("decode", ["grammar", "free"])
def test_batch_composition_and_group_size_do_not_matter(policy, prompts, images, decode):
    seeds = [3, 1, 4, 1]
    together = policy.rollout(prompts, [PLAN] * 4, decode, seeds=seeds, max_new_tokens=10)
    for i in range(4):
        alone = policy.rollout([prompts[i]], [PLAN[:3]], decode, seeds=[seeds[i]], max_new_tokens=10)
        assert lists(alone) == [lists(together)[i][:3]]
    backwards = policy.rollout(prompts[::-1], [PLAN] * 4, decode, seeds=seeds[::-1], max_new_tokens=10)
    assert lists(backwards)[::-1] == lists(together)
    policy.max_new_tokens = 10
    for sample in (False, True):
        answers = [policy.act(images, QUESTIONS, decode, sample, batch_size=n, force="REGION") for n in (1, 3, 16)]
        texts = [[action.text for action in actions] for actions in answers]
        assert texts[0] == texts[1] == texts[2]


def test_masks_and_entropy(policy, prompts):
    groups = with_lora(policy).rollout(prompts[:2], [["FULL", "REGION"]] * 2, seeds=[1, 2])
    out = policy.log_probs(prompts[:2], groups)
    flat = [c for group in groups for c in group]
    for m, c in enumerate(flat):
        padding = out["mask"].shape[1] - len(c.ids)
        assert out["mask"][m].tolist() == c.free + [False] * padding
        assert out["decision"][m].nonzero().tolist() == [[c.decision_index]]
        p = c.action.p_region
        entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
        assert out["entropy"][m, c.decision_index].item() == pytest.approx(entropy, abs=1e-5)
    assert (out["logp"][~out["mask"]] == 0).all() and (out["entropy"][~out["mask"]] == 0).all()
    assert out["logp"].requires_grad and not out["entropy"].requires_grad


@pytest.mark.parametrize("text, decision", [
    (REGION_TEXT % (10, 20, 30, 40), "REGION"), (FULL_TEXT, "FULL"), ('\n {"Decision":"FULL"}', "FULL"),
    (call('{"bbox_2d": [10, 20, 30, 40], "label": "é"}'), "REGION"), (call("{}"), "MALFORMED"),
    ("I would crop it.", "MALFORMED")])
def test_free_decoding_reads_what_was_written(policy, prompts, monkeypatch, text, decision):
    tokenizer = policy.processor.tokenizer
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id]
    tokens, V = iter(ids), len(policy.model.lm_head.weight)
    monkeypatch.setattr(policy, "choice_log_probs", lambda hidden, *_: (  # whatever the model says
        torch.nn.functional.one_hot(torch.tensor([next(tokens)]), V).mul(20.0).log_softmax(-1), range(V)))
    c = policy.rollout(prompts[:1], [[None]], decode="free", sample=False)[0][0]
    assert c.ids == ids and c.action == parse(text, prompts[0].resized_size, prompts[0].original_size)
    assert c.action.decision == decision
    if '"Decision"' not in text:
        assert c.decision_index is None
    else:                                               # the first token in which a letter of the decision stands
        start, decode = text.index("FULL" if decision == "FULL" else "REGION"), tokenizer.decode
        assert len(decode(ids[:c.decision_index])) <= start < len(decode(ids[:c.decision_index + 1]))


def test_free_answers_end_at_the_policys_limit_and_garbage_is_malformed(policy, images, prompts, monkeypatch):
    monkeypatch.setattr(policy, "end_tokens", set())
    policy.max_new_tokens = 7
    for limit, more in ((7, {}), (3, {"max_new_tokens": 3})):
        groups = policy.rollout(prompts, [[None]] * 4, "free", sample=False, **more)
        assert {len(c.ids) for group in groups for c in group} == {limit}
    actions = policy.act(images, QUESTIONS, decode="free")
    assert [(a.decision, a.box, a.p_region) for a in actions] == [("MALFORMED", None, None)] * 4
    groups = policy.rollout(prompts, [[None]] * 4, "free", sample=False)
    assert [a.text for a in actions] == [policy.processor.tokenizer.decode(c.ids) for c, in groups]


def test_bad_plans_and_weights(policy, prompts):
    for arguments in (dict(plans=[[None]] * 3, seeds=[1] * 4), dict(plans=[[None]] * 4, seeds=[1] * 3),
                      dict(plans=[[None]] * 4), dict(plans=[["CROP"]] * 4, seeds=[1] * 4),
                      dict(plans=[[None]] * 4, seeds=[1] * 4, decode="beam")):
        with pytest.raises((ValueError, TypeError, KeyError)):
            policy.rollout(prompts, **arguments)
    with pytest.raises(ValueError, match="at least one completion"):
        policy.log_probs(prompts, [[], [], [], []])
    with_lora(policy).lora_parameters()[1].data[0, 0] = math.nan
    for sample in (False, True):
        with pytest.raises(FloatingPointError, match="log-probabilities are NaN"):
            policy.rollout(prompts, [[None]] * 4, sample=sample, seeds=[1] * 4)


# ---- what all prompts begin with, kept

def answers(policy, prompts, decode="grammar"):
    groups = policy.rollout(prompts, [PLAN] * len(prompts), decode, sample=False, max_new_tokens=12)
    return [one.ids for group in groups for one in group], [one.action.p_region for group in groups for one in group]


def answers_unkept(policy, *rest):
    """The same where no prompt begins with what could be kept."""
    opening, policy.opening = policy.opening, torch.tensor([-1])
    found, policy.opening = answers(policy, *rest), opening
    return found


QUESTION_FIRST = (  # as mini/policy's template has it
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][1]['text'] }}<|vision_start|><|image_pad|><|vision_end|>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decode", ["grammar", "free"])
@pytest.mark.parametrize("question_first", [False, True])
def test_kept_prefix_changes_no_answer(folder, images, monkeypatch, decode, attention, question_first):
    policy = load_policy(folder, system_prompt="Crop or not?", attention=attention)
    if question_first:
        policy.processor.chat_template = QUESTION_FIRST
    prompts = with_lora(policy).prompts(images, QUESTIONS)
    plain = answers_unkept(policy, prompts, decode)
    seen = fed(monkeypatch, policy)
    first, passes = answers(policy, prompts, decode), list(seen)
    # The system's turn is read for one row, the rest for all; and it is not read again.
    before, starts = len(policy.opening), policy.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert before == np.flatnonzero(prompts[0].ids == starts)[1]
    tail = len(policy.grammar.trunk) if decode == "grammar" else 0
    assert passes[:2] == [(1, before), (4, max(len(prompt.ids) for prompt in prompts) - before + tail)]
    seen.clear()
    again = [answers(policy, part, decode) for part in (prompts[:1], prompts[1:])]
    assert (1, before) not in seen
    for ids, p in (first, [a + b for a, b in zip(*again)]):
        assert ids == plain[0] and (decode == "free" or p == pytest.approx(plain[1], abs=1e-6))
    # Prompts of another system prompt are no rows of this prefix.
    other = load_policy(folder, system_prompt="Something else entirely, and longer?")
    mixed = [*other.prompts(images[:1], QUESTIONS[:1]), *prompts[:1]]
    assert answers(other, mixed) == answers_unkept(other, mixed)


def test_kept_prefix_is_forgotten_with_its_weights(folder, images, tmp_path):
    """Each of these changes what the prefix looks like inside: afterwards the answers are those without keeping it."""
    policy = with_lora(load_policy(folder, system_prompt="Crop or not?"), 1)
    prompts, layer = policy.prompts(images, QUESTIONS), next(iter(policy.layers.values()))
    policy.save_adapter(tmp_path)

    def right():
        found = [kind(policy, prompts)[1] for kind in (answers_unkept, answers)]
        assert found[0] == pytest.approx(found[1], abs=1e-6)
        seen.append(found[1])

    def step(kind):
        groups = policy.rollout(prompts, [["REGION"]] * len(prompts), sample=False)
        policy.train().log_probs(prompts, groups)["logp"].sum().backward()
        kind(policy.lora_parameters(), lr=0.1).step()
        policy.eval()

    seen = []
    right()
    with policy.adapter(False):
        right()
    for change in (lambda: with_lora(policy, 2), lambda: policy.load_adapter(tmp_path), lambda: step(torch.optim.SGD),
                   lambda: step(functools.partial(torch.optim.AdamW, fused=True)),
                   lambda: setattr(layer, "lora_A", torch.nn.Parameter(layer.lora_A.detach() + 0.1)),
                   lambda: layer.base.weight.add_(0.1)):
        change()
        right()
    assert seen.pop(3) == seen[0] and all(a != b for a, b in itertools.combinations(seen, 2))
    with torch.inference_mode():  # tensors made here count no changes
        policy = load_policy(folder)
        policy.add_lora(4, 8)
        assert len(policy.act(images, QUESTIONS)) == 4


# ---- packed log-probs and gradients

def gradients(policy, loss):
    policy.model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in policy.lora_parameters()]


@pytest.mark.parametrize("decode, limit, temperature", [
    ("grammar", 9, 1.0), ("grammar", 9, 0.7), ("free", 9, 0.7), ("free", 1, 1.0)])
@pytest.mark.parametrize("targets, attention, a_row", [
    ("all", "sdpa", 1), ("language", "eager", 3), ("all", "sdpa", 4)])
def test_packed_equals_sampled_and_repeated(folder, images, monkeypatch, decode, limit, temperature, targets, attention,
                                            a_row):
    monkeypatch.setattr(policy_module, "queries_a_row", lambda *_: a_row)
    policy = with_lora(load_policy(folder, system_prompt="Crop or not?", attention=attention), targets=targets)
    prompts = policy.prompts(images, QUESTIONS)
    plans = [PLAN, PLAN[:2], PLAN[2:], ["REGION"]]                              # groups of different size
    groups = policy.rollout(prompts, plans, decode, temperature, seeds=[1, 2, 3, 4], max_new_tokens=limit)
    out, plain = policy.log_probs(prompts, groups, temperature), plain_score(policy, prompts, groups, temperature)
    torch.testing.assert_close(out["logp"], logged(out, groups), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["logp"][out["mask"]], plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(plain), generator=torch.Generator().manual_seed(0))
    packed = gradients(policy, (out["logp"][out["mask"]] * weights).sum())
    for a, b in zip(packed, gradients(policy, (plain * weights).sum())):
        assert b.abs().max() > 0 and (a - b).abs().max() / b.abs().max() < 1e-4
    assert all(p.grad is None for name, p in policy.model.named_parameters() if "lora_" not in name)


IMAGE_FIRST = (  # nothing but the start of a turn is shared
    "{% for m in messages if m['role'] == 'user' %}<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "{{ m['content'][1]['text'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("template", [IMAGE_FIRST, QUESTION_FIRST])
@pytest.mark.parametrize("question", ["What?", None])
def test_a_row_of_queries_wherever_the_image_stands(policy, images, monkeypatch, template, question):
    """With one question for all (then everything before the image is shared) and with a question each."""
    policy.processor.chat_template = template
    prompts = with_lora(policy).prompts(images, [question] * 4 if question else QUESTIONS)
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    plain = plain_score(policy, prompts, groups)
    wanted = gradients(policy, plain.sum())
    monkeypatch.setattr(policy_module, "queries_a_row", lambda *_: 4)
    pack, = policy.pack(prompts, groups)
    together = sum(len(prompt.ids) for prompt in prompts) + sum(
        len({tuple(c.ids[:t]) for c in group for t in range(1, np.flatnonzero(c.free)[-1] + 1)}) for group in groups)
    starts = policy.processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    before = next(i for i, column in enumerate(zip(*(prompt.ids.tolist() for prompt in prompts)))
                  if len(set(column)) > 1 or column[0] == starts)
    shared = before + (question is not None or template == IMAGE_FIRST)  # and the token that starts the image
    assert before > 1 and pack.layout.tokens == together - 3 * shared
    out = policy.score(pack)
    torch.testing.assert_close(out["logp"][out["mask"]], plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(policy, out["logp"].sum()), wanted):
        assert (a - b).abs().max() / b.abs().max() < 1e-4


@pytest.mark.parametrize("budget, a_row", [(None, 2), (1, 2), (130, 1), (260, 1), (260, 2), (420, 2)])
def test_passes_keep_their_budget_and_lose_nothing(policy, prompts, monkeypatch, budget, a_row):
    monkeypatch.setattr(policy_module, "queries_a_row", lambda *_: a_row)
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    whole = policy.log_probs(prompts, groups)["logp"]
    packs = policy.pack(prompts, groups, [3, 0, 1], budget=budget)
    assert [b for pack in packs for b in pack.queries] == [3, 0, 1]
    assert len(packs) == {None: 1, 1: 3, 130: 3, 260: 2}.get(budget, len(packs))
    for pack in packs:
        assert budget is None or pack.layout.ids.numel() <= budget or len(pack.queries) == 1
        for (b, n), row in zip(pack.owners, policy.score(pack)["logp"]):
            wanted = whole[b * len(PLAN) + n]
            assert torch.allclose(row, wanted[:len(row)], atol=1e-5) and not wanted[len(row):].any()


def test_cheapest_row():
    """The 3B: 420 tokens shared, 345 of its own, width 2048: sqrt(420 (420 + 4096)) / 345 = 3.99. A short system prompt
    in a small model: sqrt(40 (40 + 320)) / 150 = .8."""
    assert queries_a_row(420, 345, 2048) == 4 and queries_a_row(40, 150, 160) == 1 and queries_a_row(0, 150, 160) == 1


# ---- what lies outside the grammar

def plain_outside(policy, prompt, group):
    """-log of the whole vocabulary's probability of what was fed or allowed, at every beginning of an answer once."""
    found = {}
    for one in group:
        logits = plain_logits(policy.model, prompt, one.ids).log_softmax(-1)
        for t, token in enumerate(one.ids):
            allowed = list(one.allowed[t]) if one.free[t] else [token]
            found[tuple(one.ids[:t])] = -logits[t, allowed].logsumexp(-1)
    return torch.stack(list(found.values())).mean()


@pytest.mark.parametrize("a_row", [1, 4])
def test_outside_is_what_the_vocabulary_gives_to_other_answers(policy, prompts, monkeypatch, a_row):
    monkeypatch.setattr(policy_module, "queries_a_row", lambda *_: a_row)
    monkeypatch.setattr(policy_module, "in_slices", functools.partial(policy_module.in_slices, size=7))
    groups = with_lora(policy).rollout(prompts, [PLAN, ["FULL"], ["REGION"], PLAN], seeds=[1, 2, 3, 4])
    pack, = policy.pack(prompts, groups, hold=True)
    plain = torch.stack([plain_outside(policy, *pair) for pair in zip(prompts, groups)])
    out = policy.score(pack, hold=True)
    torch.testing.assert_close(out["outside"], plain, atol=1e-5, rtol=1e-5)
    assert plain.min() > 1  # a random model says anything
    # The grammar's own log-probabilities stay what they were.
    torch.testing.assert_close(out["logp"], policy.log_probs(prompts, groups)["logp"], atol=1e-5, rtol=1e-5)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    wanted = gradients(policy, (plain * weights).sum())
    for a, b in zip(gradients(policy, (policy.score(pack, hold=True)["outside"] * weights).sum()), wanted):
        assert b.abs().max() > 0 and (a - b).abs().max() / b.abs().max() < 1e-4


def test_options_are_the_distributions_of_the_choices(policy, prompts):
    groups = with_lora(policy).rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4], temperature=0.7)
    out = policy.score(policy.pack(prompts, groups)[0], 0.7)
    flat = [(prompt, one) for prompt, group in zip(prompts, groups) for one in group]
    for m, (prompt, one) in enumerate(flat):
        logits = plain_logits(policy.model, prompt, one.ids) / 0.7
        for t in range(len(one.ids)):
            found = out["options"][m, t][out["options"][m, t] > -1e4]
            wanted = logits[t, sorted(one.allowed[t])].log_softmax(-1) if one.free[t] else torch.zeros(0)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beside", [0.0, 0.3])
def test_kl_of_answers_is_that_of_enumeration(policy, prompts, beside):
    """All ten answers of an image of 2 x 2 pixels: KL = sum over answers of pi (log pi - log ref), value and gradient.
    The estimator is given each box as often as pi draws it; the decision is drawn in other ways than by pi."""
    prompt = with_lora(policy, 1).prompts(noise([(40, 40)]), ["What?"])[0]
    prompt.resized_size = (2, 2)
    boxes = [(x1, y1, x2, y2) for x1, x2 in ((0, 1), (0, 2), (1, 2)) for y1, y2 in ((0, 1), (0, 2), (1, 2))]
    group = [complete(policy, prompt, box) for box in (None, *boxes)]
    pack, = policy.pack([prompt], [group])
    with torch.no_grad(), policy.adapter(False):
        reference = policy.score(pack)
    out = policy.score(pack)
    answers, before = out["logp"].sum(1), reference["logp"].sum(1)                      # [10] log pi(a | x)
    assert answers.exp().sum().item() == pytest.approx(1, abs=1e-5)
    wanted = (answers.exp() * (answers - before)).sum()
    gradient = gradients(policy, wanted)
    out = policy.score(pack)
    boxes = out["logp"].detach().masked_fill(out["decision"], 0).sum(1).exp()           # [10] pi(b | REGION); FULL: 1
    weights = torch.where(torch.arange(10) > 0, boxes, 0.1 + beside)
    found = rgrpo.answer_kl(out["logp"], out["options"], reference["options"], out["mask"], out["decision"],
                            torch.zeros(10, dtype=torch.long), weights)
    assert wanted.item() > 1e-3 and found.item() == pytest.approx(wanted.item(), rel=1e-4)
    for a, b in zip(gradients(policy, found), gradient):
        assert (a - b).abs().max() <= 1e-4 * max(1e-3, b.abs().max())


class Kernels(TorchDispatchMode):
    """Counts operations that compute: views are free."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_a_decoding_step_costs_little_more_with_lora(policy, prompts, monkeypatch):
    """At most 1.2 times the bare model's operations, and the same tokens as by the layers one by one."""
    forward, counts = policy.language_model.forward, []

    def counted(*rest, **more):
        with Kernels() as kernels:
            out = forward(*rest, **more)
        counts.append(kernels.count)
        return out

    policy.model.to(torch.bfloat16)
    with_lora(policy)
    monkeypatch.setattr(policy.language_model, "forward", counted)
    groups = policy.rollout(prompts, [["REGION"]] * 4, sample=False)
    lora = np.median(counts)
    counts.clear()
    with policy.adapter(False):
        policy.rollout(prompts, [["REGION"]] * 4, sample=False)
    assert lora / np.median(counts) <= 1.2
    assert all(layer.shared is None for layer in policy.layers.values())
    policy._share()
    policy._forward(Layout([[(prompts[0], Tree([[70]], [1]))]]))
    assert all(layer.shared[0].x is None for layer in policy.layers.values())  # gigabytes, of long prompts
    monkeypatch.setattr(policy, "_share", lambda: [setattr(layer, "shared", None) for layer in policy.layers.values()])
    slow = policy.rollout(prompts, [["REGION"]] * 4, sample=False)
    assert [[c.ids for c in group] for group in slow] == [[c.ids for c in group] for group in groups]


def test_log_probs_feeds_no_more_than_the_tree(policy, prompts, monkeypatch):
    """What all completions have in common is fed once, and what follows the last choice never."""
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    seen = fed(monkeypatch, policy)
    policy.log_probs(prompts, groups)
    begun = [{tuple(c.ids[:t]) for c in group for t in range(1, np.flatnonzero(c.free)[-1] + 1)} for group in groups]
    assert seen == [(4, max(len(prompt.ids) + len(some) for prompt, some in zip(prompts, begun)))]


def test_gradient_checkpointing_and_dropout_only_in_training(policy, prompts):
    with_lora(policy, dropout=0.3)
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    plain = policy.log_probs(prompts, groups)["logp"]
    assert torch.equal(plain, policy.log_probs(prompts, groups)["logp"])
    policy.train()
    torch.manual_seed(0)
    dropped = policy.log_probs(prompts, groups)["logp"]
    assert not torch.allclose(plain, dropped, atol=1e-3)
    # rollouts are made without dropout even now, and leave the mode alone
    again = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    assert lists(again) == lists(groups) and policy.training
    expected = gradients(policy, dropped.sum())
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    torch.manual_seed(0)
    logp = policy.log_probs(prompts, groups)["logp"]
    assert torch.allclose(logp, dropped, atol=1e-5)
    for a, b in zip(gradients(policy, logp.sum()), expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    policy.eval()
    assert torch.allclose(policy.log_probs(prompts, groups)["logp"], plain, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_windows_together_are_windows_one_by_one(folder, monkeypatch, attention):
    """WindowAttention against transformers': features and LoRA's gradients; and how few calls it makes."""
    shapes, calls = [(112, 112), (168, 84), (56, 224), (140, 196)], []  # windows are of 4 x 4 patches: 56 pixels

    def look(kind):
        policy = with_lora(load_policy(folder, attention=attention), r=4, alpha=8, dropout=0.0)
        for block in policy.model.model.visual.blocks:
            block.attn.__class__ = kind
        features = policy._features(policy.prompts(noise(shapes), QUESTIONS))
        features.square().sum().backward()
        return [features.detach()] + [p.grad for p in policy.lora_parameters() if p.grad is not None]

    theirs = look(Qwen2_5_VLVisionAttention)
    whole = ALL_ATTENTION_FUNCTIONS.get_interface
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *names: lambda *inputs, **more: (
        calls.append(tuple(inputs[1].shape[::2])), whole(*names)(*inputs, **more))[1])
    ours = look(WindowAttention)
    assert len(ours) == len(theirs) > 9
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())) for a, b in zip(ours, theirs))
    # (windows, patches in each): of all images together, a call for each length.
    assert sum(count * size for count, size in calls) == 2 * sum(w * h // 14**2 for w, h in shapes)
    assert calls == [(1, 4), (8, 8), (17, 16), (2, 64), (1, 72), (1, 140)]


def test_an_image_goes_through_the_tower_once_while_it_is_frozen(policy, prompts, monkeypatch):
    tower = spied(monkeypatch, policy.model.model, "get_image_features", lambda pixels, _: len(pixels))
    patches = sum(len(prompt.pixel_values) for prompt in prompts)
    with_lora(policy, targets="language")
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    policy.rollout(prompts, [PLAN] * 4, "free", seeds=[1, 2, 3, 4], max_new_tokens=3)
    policy.log_probs(prompts, groups)
    assert tower == [patches]
    # With LoRA in the tower once a pass: what it saw before is not what it sees now.
    fresh = load_policy(policy.name, system_prompt="Crop or not?")
    tower = spied(monkeypatch, fresh.model.model, "get_image_features", lambda pixels, _: len(pixels))
    prompts = fresh.prompts(noise(SIZES), QUESTIONS)
    before = fresh.log_probs(prompts, groups)["logp"]
    with_lora(fresh, targets="all")
    for name, layer in fresh.layers.items():
        layer.enabled = name.startswith("model.visual.")            # only the tower's adapter counts
    assert not torch.allclose(fresh.log_probs(prompts, groups)["logp"], before, atol=1e-3)
    fresh.rollout(prompts, [PLAN] * 4, "free", seeds=[1, 2, 3, 4], max_new_tokens=3)
    assert tower == [patches] * 3


# ---- LoRA

def test_lora_starts_as_the_identity_and_leaves_the_base_alone(policy, prompts):
    base = {name: value.clone() for name, value in policy.model.state_dict().items()}
    before = all_logits(policy.model, prompts)
    policy.add_lora(r=4, alpha=8, dropout=0.1)
    assert torch.equal(all_logits(policy.model, prompts), before)
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == {
        f"{name}.{half}" for name in policy.layers for half in ("lora_A", "lora_B")}
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=0.05)
    for step in range(2):
        groups = policy.rollout(prompts, [PLAN] * 4, seeds=[step] * 4)
        optimizer.zero_grad()
        policy.log_probs(prompts, groups)["logp"].sum().backward()
        optimizer.step()
    changed = all_logits(policy.model, prompts)
    assert not torch.allclose(changed, before, atol=1e-2)
    now = {name.replace(".base.", "."): value for name, value in policy.model.state_dict().items()}
    assert len(now) == len(base) + 2 * len(policy.layers) and all(torch.equal(now[name], base[name]) for name in base)
    with policy.adapter(False):
        assert torch.equal(all_logits(policy.model, prompts), before)
        with policy.adapter(True):
            assert torch.equal(all_logits(policy.model, prompts), changed)
        assert torch.equal(all_logits(policy.model, prompts), before)
    assert torch.equal(all_logits(policy.model, prompts), changed)


def test_lora_targets_start_and_seed(folder):
    def layers(targets, seed=0):
        policy = load_policy(folder)
        policy.add_lora(targets=targets, seed=seed)
        return policy
    everything, language = layers("all"), layers("language")
    linear = {n for n, m in load_policy(folder).model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(everything.layers) == linear - {"lm_head"} and everything.tower_adapted
    assert set(language.layers) == {n for n in linear if n.startswith("model.language_model.")}
    assert len(language.layers) == 2 * 7 and not language.tower_adapted                     # 2 layers: q k v o, 3 MLP
    assert everything.lora == {"r": 8, "alpha": 32, "dropout": 0.1}                         # App. B
    same, other = layers("all"), layers("all", seed=1)
    pairs = list(zip(everything.lora_parameters(), same.lora_parameters(), other.lora_parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert all(not torch.equal(a, c) for a, _, c in pairs[::2]) and all((b == 0).all() for b, _, _ in pairs[1::2])
    for a, _, _ in pairs[::2]:                          # uniform in +-1 / sqrt(in), as peft begins
        assert 0.8 / math.sqrt(a.shape[1]) < a.abs().max() <= 1 / math.sqrt(a.shape[1])
    with pytest.raises(KeyError, match="vision"):
        layers("vision")
    with pytest.raises(ValueError, match="has LoRA already"):
        same.add_lora()


@pytest.mark.parametrize("targets", ["all", "language"])
def test_peft_reads_our_adapter(folder, policy, prompts, tmp_path, targets):
    from peft import PeftModel
    with_lora(policy, r=4, alpha=12, targets=targets).save_adapter(tmp_path / "adapter")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()}
    (tmp_path / "plain").write_text("")
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert modes == {"adapter_config.json": plain, "adapter_model.safetensors": plain}
    assert adapter_base(tmp_path / "adapter") == folder
    theirs = PeftModel.from_pretrained(load_policy(folder).model, tmp_path / "adapter").eval()
    adapted = all_logits(policy.model, prompts)
    torch.testing.assert_close(all_logits(theirs, prompts), adapted, atol=1e-4, rtol=1e-4)
    with policy.adapter(False):
        assert not torch.allclose(all_logits(policy.model, prompts), adapted, atol=1e-2)
    with pytest.raises(ValueError, match="no LoRA to save"):
        load_policy(folder).save_adapter(tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_we_read_the_adapter_of_peft(folder, policy, prompts, tmp_path, targets):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.2, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(load_policy(folder).model, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_policy(folder, adapter=str(tmp_path))
    assert ours.lora == {"r": 3, "alpha": 7, "dropout": 0.2}
    torch.testing.assert_close(all_logits(ours.model, prompts), all_logits(theirs, prompts), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(all_logits(policy.model, prompts), all_logits(theirs, prompts), atol=1e-2)


def test_adapters_that_do_not_fit(folder, policy, tmp_path):
    with_lora(policy, r=4).save_adapter(tmp_path / "a")
    other = load_policy(folder)
    other.add_lora(r=4, seed=5)
    other.load_adapter(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(policy.lora_parameters(), other.lora_parameters()))
    for settings in ({"r": 5}, {"r": 4, "alpha": 8}, {"r": 4, "targets": "language"}):
        other = load_policy(folder)
        other.add_lora(**settings)
        with pytest.raises(ValueError, match="does not fit the LoRA in place"):
            other.load_adapter(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        load_policy(folder, adapter=str(tmp_path / "nowhere"))
    config, path = tmp_path / "a/adapter_config.json", str(tmp_path / "a/adapter_model.safetensors")
    written, weights = json.loads(config.read_text()), load_file(path)
    for change in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"rank_pattern": {"q_proj": 2}},
                   {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_what_comes_next": True}):
        config.write_text(json.dumps(written | change))
        with pytest.raises(ValueError, match="only plain LoRA.*" + next(iter(change))):
            load_policy(folder, adapter=str(tmp_path / "a"))
    config.write_text(json.dumps(written))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    extra = name.replace("layers.0", "layers.9")
    head = "base_model.model.lm_head.lora_A.weight"  # `choice_log_probs` reads its rows as they are
    for change, message in [
        ({name: torch.zeros(4, 47)}, "q_proj.lora_A is .4, 47., not .4, 48."),
        ({name: torch.zeros(3, 48)}, "lora_A is .3, 48., but r is 4"),
        ({name.replace("_A", "_B"): torch.zeros(48, 3)}, "lora_B is .48, 3., but r is 4"),
        ({name.replace("lora_A", "lora_magnitude"): torch.zeros(4)}, "lora_magnitude is .4,., not None"),
        ({extra: torch.zeros(4, 48), extra.replace("_A", "_B"): torch.zeros(48, 4)}, "no linear layer .*layers.9"),
        ({head: torch.zeros(4, 48), head.replace("_A", "_B"): torch.zeros(431, 4)}, "no linear layer 'lm_head'"),
        ({name: None}, "q_proj.lora_A is None, not .4, 48."),
    ]:
        save_file({key: value for key, value in (weights | change).items() if value is not None}, path)
        with pytest.raises(ValueError, match=message):
            load_policy(folder, adapter=str(tmp_path / "a"))


def test_merged_model_is_loaded_by_plain_transformers(policy, prompts, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "whole")
    with_lora(policy, r=4, alpha=12).save_adapter(adapter)
    adapted = all_logits(policy.model, prompts)
    merge.main(["--adapter", adapter, "--out", out, "--dtype", "float32"])
    assert "folded in, float32" in capsys.readouterr().out
    plain, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(all_logits(plain.eval(), prompts), adapted, atol=1e-4, rtol=1e-4)
    assert AutoProcessor.from_pretrained(out).tokenizer.get_vocab() == policy.processor.tokenizer.get_vocab()
    # Its files can be read by whom the umask lets read.
    written = [tmp_path / "adapter/adapter_config.json", *(tmp_path / "whole").glob("*.safetensors")]
    assert len({stat.S_IMODE(path.stat().st_mode) for path in written}) == 1 < len(written)
    # With the prompt that it was trained under, and no need to name it.
    again = load_policy(out)
    assert not again.layers and again.system_prompt == load_policy(policy.name).system_prompt
    # ... also where the run had a prompt and an image size of its own: they stand in the run's config.json.
    own, run = tmp_path / "own.txt", tmp_path / "config.json"
    own.write_text("Say FULL or REGION.")
    run.write_text(json.dumps({"args": {"system_prompt": str(own), "max_pixels": 28 * 28 * 9}}))
    merge.main(["--adapter", adapter, "--out", str(tmp_path / "own")])
    again = load_policy(str(tmp_path / "own"))
    assert again.system_prompt == "Say FULL or REGION." and again.processor.image_processor.size["longest_edge"] == 7056
    assert load_file(tmp_path / "own/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    # The run's own copy of the text counts, not what its file says by now; the flag wins over both.
    own.write_text("Say something else.")
    run.write_text(json.dumps({"args": {"system_prompt": str(own)}, "system_prompt": "Say FULL or REGION."}))
    for flag, text in ([], "Say FULL or REGION."), (["--system-prompt", str(own)], "Say something else."):
        asked = merge.parse_args(["--adapter", adapter, "--out", "unused", *flag])
        assert merge.trained_under(asked) == (text, None)
    for folder, target, complaint in [(adapter, out, "is there already and not empty"),
                                      (str(tmp_path), out + "2", "adapter_config.json is missing")]:
        with pytest.raises(SystemExit, match=complaint):
            merge.main(["--adapter", folder, "--out", target])
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge.save_merged(again, str(tmp_path / "third"))


def test_merge_that_is_killed_leaves_no_model(policy, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(policy.processor), "save_pretrained", killed)
        merge.save_merged(with_lora(policy), str(tmp_path / "whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["whole.tmp"]
    (tmp_path / "whole.tmp" / "model-00009-of-00009.safetensors").touch()  # of other shards: not of the next merge
    (tmp_path / "whole").mkdir()  # an empty folder is as good as none
    merge.save_merged(with_lora(policy), f"{tmp_path}/whole/")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"] and load_policy(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "model-00009-of-00009.safetensors").exists()


# ---- loading and prompts

def test_what_is_no_policy(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for name, message in [("./missing/folder", "no policy './missing/folder'.*mini/policy"), ("empty", "empty"),
                          ("llama", "is a llama model"), ("copy", "the checkpoint lacks .*up_proj")]:
        with pytest.raises(ValueError, match=message):
            load_policy(name if "/" in name else str(tmp_path / name))
    os.truncate(copy / "model.safetensors", 5000)  # a copy that was cut short
    with pytest.raises(ValueError, match="copy: cannot be loaded"):
        load_policy(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="copy: cannot be loaded"):
        load_policy(str(copy))
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        load_policy(folder, attention="flash_attention_2")


def test_system_prompt_comes_from_argument_folder_or_table_10(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "system_prompt.txt").write_text("Crop?")
    assert load_policy(str(copy)).system_prompt == "Crop?"
    assert load_policy(str(copy), system_prompt="Or not.").system_prompt == "Or not."
    table_10 = load_policy(folder).system_prompt
    for words in ("image_zoom_in_tool", "bbox_2d", '"label"', "[x1, y1, x2, y2]", '"FULL"', '"REGION"', "<tool_call>",
                  '{"Decision": "FULL" or "REGION", "Tool": <'):
        assert words in table_10
    tool = json.loads(table_10.split("<tools>")[1].split("</tools>")[0])["function"]
    assert tool["name"] == "image_zoom_in_tool" and tool["parameters"]["required"] == ["bbox_2d"]


def test_prompt_is_the_chat_template_with_the_image_in_it(policy, prompts, images):
    decode = policy.processor.tokenizer.decode
    for prompt, question, image in zip(prompts, QUESTIONS, images):
        tokens = int(prompt.grid_thw.prod()) // 4                               # 2 x 2 patches are merged into a token
        assert decode(prompt.ids) == (
            "<|im_start|>system\nCrop or not?<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * tokens
            + "<|vision_end|>" + question + "<|im_end|>\n<|im_start|>assistant\n")
        assert int(prompt.mm_token_type_ids.sum()) == tokens == prompt.resized_size[0] * prompt.resized_size[1] // 784
        single = policy.prompts([image.convert("RGBA")], [question])[0]         # alone, and in another mode
        assert torch.equal(single.ids, prompt.ids) and torch.equal(single.pixel_values, prompt.pixel_values)
    # 100 x 60 -> 112 x 56: 4 x 2 tokens take max(4, 2) = 4 positions, so text goes on 4 positions lower than its index
    assert prompts[0].resized_size == (112, 56) and prompts[0].next_position == len(prompts[0].ids) - (8 - 4)


@pytest.mark.parametrize("size, pixels, resized", [
    ((1, 1), None, (28, 28)), ((20, 20), None, (28, 28)), ((5, 28), None, (28, 84)),    # a side below 28 is enlarged
    ((10, 1900), None, None),                           # 190 : 1, still within what can be resized
    ((600, 300), None, (224, 112)), ((600, 300), 28 * 28 * 9, (112, 56)), ((600, 300), 28 * 28, (28, 28)),  # max_pixels
])
def test_images_of_any_size_are_resized_and_boxes_come_back_to_them(folder, size, pixels, resized):
    policy = load_policy(folder, max_pixels=pixels)     # the folder's own size: 40 tokens hold 8 x 4
    prompt = policy.prompts([Image.new("RGB", size)], ["What?"])[0]
    assert prompt.resized_size == (resized or prompt.resized_size) and min(prompt.resized_size) >= 28
    tokens = prompt.resized_size[0] * prompt.resized_size[1] // 28**2
    assert int(prompt.mm_token_type_ids.sum()) == tokens and len(prompt.pixel_values) == 4 * tokens
    x1, y1, x2, y2 = policy.rollout([prompt], [["REGION"]], seeds=[0])[0][0].action.box
    assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]


@pytest.mark.parametrize("size, question, message", [
    ((50, 50), "What <|image_pad|> is", "question 1 contains the special token '<.image_pad.>'"),
    ((50, 50), "<|im_end|>", "question 1 contains the special token"),
    ((50, 50), "a \ud83d b", "question 1 has half a surrogate pair"), ((50, 50), "\udfff", "half a surrogate pair"),
    ((5, 1001), "What?", r"image 1 is \(5, 1001\) pixels.*drop the query"),             # 1001 / 5 > 200
    ((0, 0), "What?", "image 1 is .0, 0. pixels"),
])
def test_bad_prompts(policy, size, question, message):
    with pytest.raises(ValueError, match=message):
        policy.prompts([Image.new("RGB", (40, 40)), Image.new("RGB", size)], ["fine", question])
    for ask in (policy.prompts, functools.partial(policy.act, batch_size=1)):
        with pytest.raises(ValueError):
            ask([Image.new("RGB", (40, 40))], ["a", "b"])


def test_tied_embeddings_and_bfloat16(tmp_path, images):
    folder = tiny_policy.build(tmp_path, tie=True)
    exact, rounded = load_policy(folder), load_policy(folder, dtype=torch.bfloat16)
    assert exact.model.lm_head.weight is exact.model.get_input_embeddings().weight
    assert rounded.model.dtype == torch.bfloat16
    rounded.add_lora()
    assert all(p.dtype == torch.float32 for p in rounded.lora_parameters())
    a, b = (policy.act(images, QUESTIONS) for policy in (exact, rounded))
    assert [x.p_region for x in a] == pytest.approx([x.p_region for x in b], abs=0.1)
    prompts = rounded.prompts(images, QUESTIONS)
    groups = rounded.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    out = rounded.log_probs(prompts, groups)
    out["logp"].sum().backward()
    assert torch.allclose(out["logp"], logged(out, groups), atol=0.3)           # bfloat16 keeps 8 bits
    assert all(torch.isfinite(p.grad).all() for p in rounded.lora_parameters())
