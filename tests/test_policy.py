"""policy.py against slow, obvious oracles on a tiny random Qwen2.5-VL: each completion alone, no cache, no packing."""

import doctest
import functools
import itertools
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

import policy as policy_module
import tiny_policy
from policy import (
    FULL_TEXT, REGION_TEXT, Action, BoxDraft, Grammar, Tree, WindowAttention, load_policy, next_digits, parse, to_original,
)
from tools.bench import pad

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


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture
def prompts(policy, images):
    return policy.prompts(images, QUESTIONS)


def randomise_lora(policy, seed=0):
    """B away from 0, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.lora_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


# ---- oracles ---------------------------------------------------------------------------------------------------------


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


def plain_log_prob(logits, token, allowed, temperature=1.0):
    """log pi(token) by the definition: a softmax over the allowed tokens alone."""
    allowed = list(range(len(logits))) if allowed is None else list(allowed)
    return (logits[allowed] / temperature).log_softmax(-1)[allowed.index(token)]


def plain_score(policy, prompts, completions, temperature=1.0):
    """The log-prob of every choice, in order, each completion alone: a list of scalars."""
    values = []
    for prompt, group in zip(prompts, completions):
        for one in group:
            logits = plain_logits(policy.model, prompt, one.ids)
            values += [plain_log_prob(logits[t], one.ids[t], one.allowed[t], temperature)
                       for t, free in enumerate(one.free) if free]
    return values


def allowed_numbers(size, numbers):
    """All legal next numbers as strings: 0 <= x1 < w, x1 < x2 <= w, y alike."""
    side = size[len(numbers) % 2]
    return [str(n) for n in (range(side) if len(numbers) < 2 else range(numbers[-2] + 1, side + 1))]


def naive_grammar_rollout(policy, prompt, plan, seed, n):
    """One rollout with a full forward for each token; what is allowed is found by listing all legal numbers."""
    grammar, draws = policy.grammar, iter(np.random.default_rng([seed, n]).random(64))
    ids = list(grammar.prefix)

    def choose(options):
        options = sorted(options)
        p = plain_logits(policy.model, prompt, ids)[-1][options].double().softmax(-1).cumsum(-1)
        return options[int((p < next(draws)).sum())]

    token = choose([grammar.full, grammar.region])
    token = {None: token, "FULL": grammar.full, "REGION": grammar.region}[plan]
    ids.append(token)
    if token == grammar.full:
        return ids + grammar.full_tail
    ids += grammar.spans[0]
    numbers = []
    for span in grammar.spans[1:]:
        typed, legal = "", allowed_numbers(prompt.resized_size, numbers)
        while True:
            nexts = {s[len(typed):len(typed) + 1] for s in legal if s.startswith(typed)}          # "" = the end
            tokens = {span[0] if c == "" else grammar.digits[int(c)]: c for c in nexts}
            token = choose(tokens) if len(tokens) > 1 else next(iter(tokens))
            ids.append(token)
            if tokens[token] == "":
                break
            typed += tokens[token]
        numbers.append(int(typed))
        ids += span[1:]
    return ids


def complete(policy, prompt, box):
    """The Completion that writes `box` (resized pixels), or FULL for None: drives the grammar by hand."""
    grammar = policy.grammar
    draft = BoxDraft(prompt, None, grammar)
    draft.add_template(grammar.prefix)
    token = grammar.full if box is None else grammar.region
    draft.add_decision(token, (grammar.full, grammar.region), 0.0, False)
    draft.add_template(grammar.full_tail if box is None else grammar.spans[0])
    target = [] if box is None else grammar.region_ids(box)
    while box is not None and not draft.done:
        assert target[len(draft.tokens)] in draft.choices()
        draft.choose(target[len(draft.tokens)], 0.0)
    done = draft.finish(draft.text(None))
    assert box is None or done.ids == target
    return done


def lists(groups):
    return [[(c.ids, c.free, c.allowed, c.decision_index, c.forced_decision, c.action.text) for c in g] for g in groups]


def logged(out, groups):
    """The log_probs that rollout wrote down, in the [M, T] layout of `log_probs`."""
    rows = [c.log_probs + [0.0] * (out["logp"].shape[1] - len(c.ids)) for group in groups for c in group]
    return torch.tensor(rows)


# ---- images of odd sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, resized", [
    ((1, 1), (28, 28)), ((20, 20), (28, 28)), ((5, 28), None),          # a side below one token's 28 pixels is enlarged
    ((10, 1900), None),                                                 # 190 : 1, still within what can be resized
])
def test_small_and_thin_images_are_enlarged_and_boxes_come_back_to_them(policy, size, resized):
    prompt = policy.prompts([Image.new("RGB", size)], ["What?"])[0]
    assert prompt.resized_size == (resized or prompt.resized_size) and min(prompt.resized_size) >= 28
    tokens = prompt.resized_size[0] * prompt.resized_size[1] // 28**2
    assert int(prompt.mm_token_type_ids.sum()) == tokens and len(prompt.pixel_values) == 4 * tokens
    action = policy.rollout([prompt], [["REGION"]], seeds=[0])[0][0].action
    x1, y1, x2, y2 = action.box
    assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]


def test_an_image_too_thin_to_be_resized_is_named(policy):
    images = [Image.new("RGB", (50, 50)), Image.new("RGB", (5, 1001))]              # 1001 / 5 > 200
    with pytest.raises(ValueError, match=r"image 1 is \(5, 1001\) pixels.*drop the query"):
        policy.prompts(images, ["What?", "What?"])


# ---- answers and frames ----------------------------------------------------------------------------------------------


def call(arguments, name="image_zoom_in_tool"):
    return f'{{"Decision": "REGION", "Tool": <tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>}}'


# The model saw 112 x 56 pixels of a 224 x 56 image: x doubles, y stays.
BOXES = [
    (REGION_TEXT % (10, 20, 30, 40), (20, 20, 60, 40)),
    (call('{"bbox_2d": [10, 20, 30, 40], "label": "the beetle"}'), (20, 20, 60, 40)),
    (call('{"label": "x", "bbox_2d": [10.5, 20.25, 30.0, 4e1]}'), (21, 20.25, 60, 40)),
    ('  {  "Decision" :\n"REGION" ,"Tool":<tool_call>\n{"name":"image_zoom_in_tool",'
     '"arguments":{"bbox_2d":[1,2,3,4]}}\n</tool_call>\n}\n', (2, 2, 6, 4)),
    (call('{"bbox_2d": [-5, -5, 500, 500]}'), (0, 0, 224, 56)),                 # clamped to the image
]
MALFORMED = [
    "", " ", "FULL", "{}", "null", '{"Decision": "MAYBE"}', '{"Decision": FULL}', '{"decision": "FULL"}',
    'Sure! {"Decision": "FULL"}', '{"Decision": "FULL"} because', '{"Decision": "FULL"',
    call('{"bbox_2d": [1, 2, 3, 4]}').replace("REGION", "FULL"),                # FULL with a tool call
    '{"Decision": "REGION"}', '{"Decision": "REGION", "Tool": null}', '{"Decision": "REGION", "Tool": [1, 2, 3, 4]}',
    call('{"bbox_2d": [1, 2, 3, 4]}', name="zoom"), call("[1, 2, 3, 4]"), call("{}"), call("null"),
    call('{"bbox_2d": [1, 2, 3, 4], "label": 7}'), call('{"bbox_2d": "1, 2, 3, 4"}'), call('{"bbox_2d": null}'),
    call('{"bbox_2d": [1, 2, 3]}'), call('{"bbox_2d": [1, 2, 3, 4, 5]}'), call('{"bbox_2d": [[1, 2, 3, 4]]}'),
    call('{"bbox_2d": [1, 2, 3, "4"]}'), call('{"bbox_2d": [0, 0, true, true]}'), call('{"bbox_2d": {"0": 1}}'),
    call('{"bbox_2d": [NaN, 2, 3, 4]}'), call('{"bbox_2d": [1, 2, Infinity, 4]}'),
    call('{"bbox_2d": [1, 2, 1e999, 4]}'),
    call('{"bbox_2d": [-Infinity, 2, 3, 4]}'), call('{"bbox_2d": [1, 2, 3%s, 4]}' % ("0" * 400)),
    call('{"bbox_2d": [1, 2, 3%s, 4]}' % ("0" * 5000)), call('{"bbox_2d": ' + "[" * 100000),
    call('{"bbox_2d": [30, 2, 10, 4]}'), call('{"bbox_2d": [10, 2, 10, 4]}'), call('{"bbox_2d": [1, 40, 3, 20]}'),
    call('{"bbox_2d": [1, 4, 3, 4]}'), call('{"bbox_2d": [112, 2, 130, 4]}'), call('{"bbox_2d": [-9, 2, 0, 4]}'),
    call('{"bbox_2d": [1, 2, 3, 4]}').replace("</tool_call>", ""), REGION_TEXT % (1, 2, 3, 4) + "}",
    call('{"bbox_2d": [1, 2, 3, 4]}').replace('"name"', '"tool"'), '<tool_call>{"bbox_2d": [1,2,3,4]}</tool_call>',
]


@pytest.mark.parametrize("text, box", BOXES)
def test_parse_reads_boxes_in_original_pixels(text, box):
    action = parse(text, (112, 56), (224, 56))
    assert action == Action("REGION", action.box, None, text)
    assert action.box == pytest.approx(box) and all(type(x) is float for x in action.box)


@pytest.mark.parametrize("text", [FULL_TEXT, '\n{"Decision":"FULL"} ', '{"Decision": "FULL", "Tool": null}',
                                  '{"Decision": "FULL", "Tool": ""}'])
def test_parse_reads_full(text):
    assert parse(text, (112, 56), (224, 56), 0.25) == Action("FULL", None, 0.25, text)


@pytest.mark.parametrize("text", MALFORMED)
def test_parse_malformed(text):
    assert parse(text, (112, 56), (224, 56)) == Action("MALFORMED", None, None, text)


def test_parse_never_raises_and_never_invents_a_box():
    rng, alphabet = random.Random(0), '{}[]<>"\\,:.-+ eE019NaInftrul\n\x00é'
    for _ in range(3000):
        text = list(REGION_TEXT % tuple(rng.randrange(200) for _ in range(4)))
        for _ in range(rng.randrange(1, 5)):
            text[rng.randrange(len(text))] = rng.choice(["", rng.choice(alphabet), "[[", "1e5"])
        action = parse("".join(text), (112, 56), (224, 56))
        if action.decision == "REGION":
            x1, y1, x2, y2 = action.box
            assert 0 <= x1 < x2 <= 224 and 0 <= y1 < y2 <= 56
        else:
            assert action.box is None


@pytest.mark.parametrize("size", [(100, 60), (640, 480), (333, 1000), (29, 57), (4000, 3000)])
def test_frame_mapping_round_trip(policy, size):
    prompt = policy.prompts([Image.new("RGB", size)], ["?"])[0]
    assert prompt.original_size == size and all(side % 28 == 0 for side in prompt.resized_size)
    rng = np.random.default_rng(1)
    for _ in range(50):
        x1, x2 = sorted(rng.choice(prompt.resized_size[0] + 1, 2, replace=False).tolist())
        y1, y2 = sorted(rng.choice(prompt.resized_size[1] + 1, 2, replace=False).tolist())
        box = parse(REGION_TEXT % (x1, y1, x2, y2), prompt.resized_size, size).box
        # Whole original pixels -> resized -> original: at most half a pixel of each grid is lost.
        back = [x * prompt.resized_size[i % 2] / size[i % 2] for i, x in enumerate(box)]
        assert back == pytest.approx((x1, y1, x2, y2), abs=1e-6)
        whole = [round(x) for x in box]
        resized = [round(x * prompt.resized_size[i % 2] / size[i % 2]) for i, x in enumerate(whole)]
        again = to_original(resized, prompt.resized_size, size)
        scale = [max(1, size[i % 2] / prompt.resized_size[i % 2]) for i in range(4)]
        assert all(abs(a - b) <= s for a, b, s in zip(again, whole, scale))
    assert parse(REGION_TEXT % (0, 0, *prompt.resized_size), prompt.resized_size, size).box == (0, 0, *size)


# ---- grammar ---------------------------------------------------------------------------------------------------------


def test_next_digits_against_listing_all_numbers():
    for low, high in [(0, 0), (0, 9), (0, 10), (3, 3), (5, 28), (0, 223), (99, 101), (198, 1003), (1000, 1000)]:
        numbers = [str(n) for n in range(low, high + 1)]
        prefixes = {""} | {n[:k] for n in numbers for k in range(1, 5)}
        for typed in prefixes:
            expected = sorted({int(n[len(typed)]) for n in numbers if n.startswith(typed) and len(n) > len(typed)})
            assert list(next_digits(low, high, typed)) == expected, (low, high, typed)


def test_doctests():
    assert doctest.testmod(policy_module).attempted > 0
    assert doctest.testmod(policy_module).failed == 0


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


def test_grammar_refuses_tokenizers_that_merge_digits():
    with pytest.raises(ValueError, match="digit by digit.*decode='free'"):
        Grammar(tiny_policy.build_tokenizer(single_digits=False))


@pytest.mark.parametrize("size", [(3, 2), (12, 2)])
def test_all_outputs_of_the_grammar_parse_and_their_probabilities_sum_to_one(policy, prompts, size):
    prompt = prompts[0]
    prompt.resized_size = size                          # a canvas small enough to list everything that can be written
    xs = [(a, b) for a in range(size[0]) for b in range(a + 1, size[0] + 1)]
    ys = [(a, b) for a in range(size[1]) for b in range(a + 1, size[1] + 1)]
    boxes = [(x1, y1, x2, y2) for x1, x2 in xs for y1, y2 in ys]
    assert len(boxes) == {(3, 2): 6 * 3, (12, 2): 78 * 3}[size]
    group = [complete(policy, prompt, box) for box in [None, *boxes]]
    assert [c.action.decision for c in group] == ["FULL"] + ["REGION"] * len(boxes)
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


# ---- rollouts --------------------------------------------------------------------------------------------------------


def test_sampled_boxes_are_always_well_formed(policy, prompts):
    for prompt, group in zip(prompts, policy.rollout(prompts, [["REGION"] * 20] * 4, seeds=[5, 6, 7, 8])):
        assert len({c.action.text for c in group}) > 5
        for c in group:
            x1, y1, x2, y2 = c.action.box
            assert c.action.decision == "REGION"
            assert 0 <= x1 < x2 <= prompt.original_size[0] and 0 <= y1 < y2 <= prompt.original_size[1]
            assert policy.processor.tokenizer.decode(c.ids[:-1]) == c.action.text


@pytest.mark.parametrize("lora", [False, True])
def test_rollout_equals_the_naive_loop_without_cache(policy, prompts, lora):
    if lora:
        policy.add_lora()
        randomise_lora(policy)
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[11, 12, 13, 14])
    with torch.no_grad():
        for b, group in enumerate(groups):
            for n, c in enumerate(group):
                assert c.ids == naive_grammar_rollout(policy, prompts[b], PLAN[n], 11 + b, n)
    assert {c.action.decision for group in groups for c in group} == {"FULL", "REGION"}


def test_free_rollout_equals_the_naive_loop_without_cache(policy, prompts):
    groups = policy.rollout(prompts[:2], [[None, None]] * 2, decode="free", seeds=[1, 2], max_new_tokens=12)
    with torch.no_grad():
        for b, group in enumerate(groups):
            for n, c in enumerate(group):
                ids, draws = [], iter(np.random.default_rng([b + 1, n]).random(64))
                while len(ids) < 12 and not (ids and ids[-1] in policy.end_tokens):
                    cdf = plain_logits(policy.model, prompts[b], ids)[-1].double().softmax(-1).cumsum(-1)
                    ids.append(int((cdf < next(draws)).sum()))
                assert c.ids == ids and all(c.free) and set(c.allowed) == {None}


@pytest.mark.parametrize("decode", ["grammar", "free"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_time_log_probs_equal_rescored_and_plain_ones(policy, prompts, decode, temperature):
    groups = policy.rollout(prompts, [PLAN] * 4, decode, temperature, seeds=[1, 2, 3, 4], max_new_tokens=20)
    with torch.no_grad():
        out = policy.log_probs(prompts, groups, temperature)
        plain = torch.stack(plain_score(policy, prompts, groups, temperature))
    torch.testing.assert_close(out["logp"], logged(out, groups), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["logp"][out["mask"]], plain, atol=1e-5, rtol=1e-5)


def test_batch_composition_and_group_size_do_not_matter(policy, prompts, images):
    for decode in ("grammar", "free"):
        seeds = [3, 1, 4, 1]
        together = policy.rollout(prompts, [PLAN] * 4, decode, seeds=seeds, max_new_tokens=10)
        for i in range(4):
            alone = policy.rollout([prompts[i]], [PLAN[:3]], decode, seeds=[seeds[i]], max_new_tokens=10)
            assert lists(alone) == [lists(together)[i][:3]]
        backwards = policy.rollout(prompts[::-1], [PLAN] * 4, decode, seeds=seeds[::-1], max_new_tokens=10)
        assert lists(backwards)[::-1] == lists(together)
    for sample in (False, True):
        by_size = [policy.act(images, QUESTIONS, sample=sample, force="REGION", batch_size=n) for n in (1, 3, 16)]
        boxes = [[(action.decision, action.box) for action in actions] for actions in by_size]
        assert boxes[0] == boxes[1] == boxes[2]


def test_seeds_decide_everything(policy, prompts):
    def sample(seed):
        return lists(policy.rollout(prompts[:1], [["REGION"] * 6], seeds=[seed]))
    torch.manual_seed(0)
    first = sample(7)
    torch.manual_seed(99)                               # the global generator plays no part
    assert sample(7) == first != sample(8)
    assert sample((7, 3)) != first                      # (step, query) seeds
    rollouts = [ids for ids, *_ in first[0]]
    assert len(set(map(tuple, rollouts))) > 1           # the rollouts of one query differ


def test_forced_decisions_are_choices_with_their_log_probability(policy, prompts):
    for decode in ("grammar", "free"):
        groups = policy.rollout(prompts, [["FULL", "REGION", None]] * 4, decode, seeds=[0] * 4, max_new_tokens=9)
        for full, region, own in groups:
            at = len(policy.grammar.prefix)
            assert full.ids[:at] == region.ids[:at] == policy.grammar.prefix
            assert (full.ids[at], region.ids[at]) == (policy.grammar.full, policy.grammar.region)
            assert full.decision_index == region.decision_index == at
            assert (full.forced_decision, region.forced_decision, own.forced_decision) == (True, True, False)
            assert full.free[:at + 1] == [False] * at + [True] and full.log_probs[at] < 0
            if decode == "grammar":
                assert math.exp(full.log_probs[at]) + math.exp(region.log_probs[at]) == pytest.approx(1)
                assert full.free[at + 1:] == [False] * 2 and full.action.decision == "FULL"
                # The box does not depend on how the decision came about: same stream, same draws.
                again = policy.rollout(prompts, [[None]] * 4, seeds=[0] * 4)
                assert own.ids in ([full.ids] + [c.ids for g in groups for c in g]) and len(again) == 4


def test_masks_and_entropy(policy, prompts):
    groups = policy.rollout(prompts[:2], [["FULL", "REGION"]] * 2, seeds=[1, 2])
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
    assert not out["entropy"].requires_grad


def script(policy, monkeypatch, text):
    """Make free decoding write `text` and end-of-turn, whatever the model says."""
    ids = policy.processor.tokenizer.encode(text) + [policy.processor.tokenizer.eos_token_id]
    tokens = iter(ids)

    def choose(hidden, allowed, temperature):
        logits = torch.full((len(hidden), policy.model.lm_head.weight.shape[0]), -20.0)
        logits[:, next(tokens)] = 0.0
        return logits.log_softmax(-1), None
    monkeypatch.setattr(policy, "choice_log_probs", choose)
    return ids


@pytest.mark.parametrize("text, decision", [
    (REGION_TEXT % (10, 20, 30, 40), "REGION"), (FULL_TEXT, "FULL"), ('\n {"Decision":"FULL"}', "FULL"),
    (call('{"bbox_2d": [10, 20, 30, 40], "label": "é"}'), "REGION"), ("I would crop it.", "MALFORMED")])
def test_free_decoding_reads_what_was_written(policy, prompts, monkeypatch, text, decision):
    ids = script(policy, monkeypatch, text)
    c = policy.rollout(prompts[:1], [[None]], decode="free", sample=False)[0][0]
    assert c.ids == ids and c.action == parse(text, prompts[0].resized_size, prompts[0].original_size)
    assert c.action.decision == decision
    if decision == "MALFORMED":
        assert c.decision_index is None
    else:
        decode = policy.processor.tokenizer.decode
        assert decision.startswith(decode(ids[c.decision_index]).lstrip(' "')) or decision in decode(
            ids[c.decision_index:c.decision_index + 3])
        assert "FULL" not in decode(ids[:c.decision_index]) and "REGION" not in decode(ids[:c.decision_index])


def test_free_garbage_is_malformed(policy, images):
    actions = policy.act(images, QUESTIONS, decode="free", sample=True)
    assert [(a.decision, a.box, a.p_region) for a in actions] == [("MALFORMED", None, None)] * 4


def test_free_answers_end_at_the_policys_limit(policy, images, prompts, monkeypatch):
    monkeypatch.setattr(policy, "end_tokens", set())
    for limit, more in ((7, {}), (3, {"max_new_tokens": 3})):
        policy.max_new_tokens = 7
        groups = policy.rollout(prompts, [[None]] * 4, "free", sample=False, **more)
        assert {len(c.ids) for group in groups for c in group} == {limit}
    decode = policy.processor.tokenizer.decode
    texts = [decode(c.ids) for c, in policy.rollout(prompts, [[None]] * 4, "free", sample=False)]
    assert [a.text for a in policy.act(images, QUESTIONS, decode="free")] == texts


def test_bad_plans(policy, prompts):
    for arguments, message in [
        (dict(plans=[[None]] * 3, seeds=[1] * 4), "4 prompts need as many plans"),
        (dict(plans=[[None], [], [None], [None]], seeds=[1] * 4), "none of them empty"),
        (dict(plans=[["CROP"]] * 4, seeds=[1] * 4), "not .'CROP'."),
        (dict(plans=[[None]] * 4), "one seed a query"),
        (dict(plans=[[None]] * 4, seeds=[1] * 4, decode="beam"), "'grammar' or 'free'"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy.rollout(prompts, **arguments)
    with pytest.raises(ValueError, match="at least one completion"):
        policy.log_probs(prompts, [[], [], [], []])


# ---- what all prompts begin with, kept ---------------------------------------------------------------------------------


def answers(policy, prompts, decode):
    groups = policy.rollout(prompts, [PLAN] * len(prompts), decode, sample=False, max_new_tokens=12)
    return [(one.ids, one.action.p_region) for group in groups for one in group]


def fed(policy, monkeypatch):
    """A list to which each forward pass of the language model adds how many tokens a row it was fed."""
    seen, whole = [], policy.language_model.forward
    monkeypatch.setattr(policy.language_model, "forward", lambda *args, inputs_embeds, **more: (
        seen.append(tuple(inputs_embeds.shape[:2])), whole(*args, inputs_embeds=inputs_embeds, **more))[1])
    return seen


QUESTION_FIRST = (  # as mini/policy's template has it
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][1]['text'] }}<|vision_start|><|image_pad|><|vision_end|>{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decode", ["grammar", "free"])
@pytest.mark.parametrize("question_first", [False, True])
def test_kept_prefix_changes_no_answer(folder, images, monkeypatch, decode, attention, question_first):
    policy = load_policy(folder, system_prompt="Crop or not?", attention=attention)
    if question_first:
        policy.processor.chat_template = QUESTION_FIRST
    policy.add_lora()
    prompts = randomise_lora(policy).prompts(images, QUESTIONS)
    plain = answers(policy, prompts, decode)
    policy.keep_prefix, seen = True, fed(policy, monkeypatch)
    assert policy._prefix == (None, [])
    first = answers(policy, prompts, decode)
    # Before image and question stand the system prompt and <|im_start|>: read for one row, the rest for all.
    before, start = len(policy.opening), policy.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    second = [i for i, token in enumerate(prompts[0].ids.tolist()) if token == start][1]
    assert before == (second + 1 if question_first else prompts[0].mm_token_type_ids.tolist().index(1))
    longest = max(len(prompt.ids) for prompt in prompts)
    assert seen[0] == (1, before) and seen[1][1] < longest - before + 60 and before > 15
    seen.clear()
    again = [one for part in (prompts[:1], prompts[1:]) for one in answers(policy, part, decode)]
    assert (1, before) not in seen  # not read again
    for found in (first, again):
        assert [ids for ids, _ in found] == [ids for ids, _ in plain]
        assert [p for _, p in found] == [p and pytest.approx(p, abs=1e-6) for _, p in plain]


def test_kept_prefix_is_forgotten_with_its_weights(folder, images, tmp_path):
    """Each of these changes what the prefix looks like inside: afterwards the answers are those of a new policy."""
    policy = load_policy(folder, system_prompt="Crop or not?")
    policy.add_lora()
    prompts = randomise_lora(policy, 1).prompts(images, QUESTIONS)
    policy.save_adapter(tmp_path)
    randomise_lora(policy, 2)

    def right():
        found, policy.keep_prefix = [], True
        for _ in range(2):
            found.append([p for _, p in answers(policy, prompts, "grammar")])
            policy.keep_prefix = False
        assert found[0] == pytest.approx(found[1], abs=1e-6)
        policy.keep_prefix = True
        return found[0]

    seen = [right()]
    with policy.adapter(False):
        seen.append(right())
    assert right() == seen[0] != seen[1]
    policy.load_adapter(tmp_path)
    seen.append(right())
    policy.merge()
    merged = right()
    policy.unmerge()
    assert right() == seen[2] == pytest.approx(merged, abs=1e-4) and seen[2] != seen[0]
    for i, step in enumerate((torch.optim.SGD, functools.partial(torch.optim.AdamW, fused=True))):
        randomise_lora(policy, 3 + i)
        seen.append(right())
        policy.train()
        groups = policy.rollout(prompts, [["REGION"]] * len(prompts), sample=False)
        policy.log_probs(prompts, groups)["logp"].sum().backward()
        step(policy.lora_parameters(), lr=0.1).step()
        policy.eval()
        seen.append(right())
    assert all(a != b for a, b in itertools.combinations(seen, 2))
    # Prompts of another system prompt are no rows of this prefix.
    other = load_policy(folder, system_prompt="Something else entirely, and longer?")
    other.keep_prefix = True
    mixed = [*other.prompts(images[:1], QUESTIONS[:1]), *prompts[:1]]
    together = [p for _, p in answers(other, mixed, "grammar")]
    other.keep_prefix = False
    assert together == pytest.approx([p for _, p in answers(other, mixed, "grammar")], abs=1e-6)


def test_state_changes_with_all_that_a_kept_prefix_depends_on(folder, tmp_path):
    """Also where answers hardly change: merging rounds."""
    policy = load_policy(folder)
    policy.add_lora(4, 8)
    randomise_lora(policy).save_adapter(tmp_path)
    layer, states = next(iter(policy.layers.values())), [policy._state()]
    assert policy._state() == states[0]
    with policy.adapter(False):
        states.append(policy._state())
    assert policy._state() == states[0]
    old = layer.lora_A
    for change in (policy.merge, policy.unmerge, lambda: policy.load_adapter(tmp_path),
                   lambda: setattr(layer, "lora_A", torch.nn.Parameter(old.detach().clone()))):
        change()
        states.append(policy._state())
    assert all(a != b for a, b in itertools.combinations(states, 2))


def test_a_policy_that_inference_mode_made_answers(folder, images):
    with torch.inference_mode():
        policy = load_policy(folder)
        policy.add_lora(4, 8)
        policy.keep_prefix = True
        assert len(policy.act(images, QUESTIONS)) == 4


# ---- packed log-probs and gradients ----------------------------------------------------------------------------------


def gradients(policy, loss):
    policy.model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in policy.lora_parameters()]


@pytest.mark.parametrize("decode", ["grammar", "free"])
@pytest.mark.parametrize("targets", ["all", "language"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_repeated_with_gradients(folder, images, decode, targets, attention):
    policy = load_policy(folder, system_prompt="Crop or not?", attention=attention)
    policy.add_lora(targets=targets)
    randomise_lora(policy)
    prompts = policy.prompts(images, QUESTIONS)
    plans = [PLAN, PLAN[:2], PLAN[2:], ["REGION"]]                              # groups of different size
    groups = policy.rollout(prompts, plans, decode, seeds=[1, 2, 3, 4], max_new_tokens=9)
    out = policy.log_probs(prompts, groups)
    plain = torch.stack(plain_score(policy, prompts, groups))
    torch.testing.assert_close(out["logp"][out["mask"]], plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(plain), generator=torch.Generator().manual_seed(0))
    packed = gradients(policy, (out["logp"][out["mask"]] * weights).sum())
    repeated = gradients(policy, (plain * weights).sum())
    for a, b in zip(packed, repeated):
        assert b.abs().max() > 0
        assert (a - b).abs().max() / b.abs().max() < 1e-4
    assert all(p.grad is None for name, p in policy.model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decode, limit", [("grammar", 9), ("free", 1)])
def test_packed_equals_rows_padded_on_either_side(folder, images, side, decode, limit):
    """Against transformers' own forward of all completions at once; free decoding writes one token each."""
    policy = load_policy(folder, system_prompt="Crop or not?")
    policy.add_lora()
    randomise_lora(policy)
    prompts = policy.prompts(images, QUESTIONS)
    groups = policy.rollout(prompts, [[None] * 3] * 4, decode, seeds=[1, 2, 3, 4], max_new_tokens=limit)
    flat = [(prompt, one) for prompt, group in zip(prompts, groups) for one in group]
    assert decode == "grammar" or all(len(one.ids) == 1 for _, one in flat)
    inputs = pad([prompt for prompt, _ in flat], [one.ids for _, one in flat], side, "cpu")
    plain = []
    for row, (prompt, one) in zip(policy.model(**inputs, use_cache=False).logits, flat):
        start = len(prompt.ids) + (len(row) - len(prompt.ids) - len(one.ids)) * (side == "left")
        plain += [plain_log_prob(row[start - 1 + t], one.ids[t], one.allowed[t])
                  for t, free in enumerate(one.free) if free]
    plain, out = torch.stack(plain), policy.log_probs(prompts, groups)
    torch.testing.assert_close(out["logp"][out["mask"]], plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(plain), generator=torch.Generator().manual_seed(0))
    packed = gradients(policy, (out["logp"][out["mask"]] * weights).sum())
    for a, b in zip(packed, gradients(policy, (plain * weights).sum())):
        assert (a - b).abs().max() / b.abs().max() < 1e-4


def test_tree_shares_what_is_common_and_nothing_else(policy, prompts):
    group = policy.rollout(prompts[:1], [["FULL", "REGION", "REGION"]], seeds=[0])[0]
    tree = Tree([c.ids for c in group], [len(c.ids) for c in group])
    for c, path in zip(group, tree.paths):
        assert [tree.tokens[node] for node in path[1:]] == c.ids
        assert [tree.depths[node] for node in path[1:]] == list(range(len(c.ids)))
        sees = tree.ancestors()
        for node in path[1:]:                                       # sees its own past and nobody else's
            assert sees[node].nonzero()[0].tolist() == path[1:path.index(node) + 1]
    template = len(policy.grammar.trunk)
    assert len(tree.tokens) <= sum(len(c.ids) for c in group) - template - len(policy.grammar.prefix)


def test_gradient_checkpointing_and_dropout_only_in_training(policy, prompts):
    policy.add_lora(dropout=0.3)
    randomise_lora(policy)
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    plain = policy.log_probs(prompts, groups)["logp"]
    assert torch.equal(plain, policy.log_probs(prompts, groups)["logp"])
    policy.train()
    torch.manual_seed(0)
    dropped = policy.log_probs(prompts, groups)["logp"]
    assert not torch.allclose(plain, dropped, atol=1e-3)
    # rollouts are made without dropout even now, and leave the mode alone
    again = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    assert lists(again) == lists(groups) and policy.model.training
    expected = gradients(policy, dropped.sum())
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
    rng, calls = np.random.default_rng(0), []
    shapes = [(112, 112), (168, 84), (56, 224), (140, 196)]  # windows are of 4 x 4 patches: 56 pixels
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in shapes]

    def look(kind):
        policy = load_policy(folder, attention=attention)
        policy.add_lora(4, 8, dropout=0.0)
        for block in randomise_lora(policy).model.model.visual.blocks:
            block.attn.__class__ = kind
            assert block.attn.config._attn_implementation == attention
        features = torch.cat(policy._see(policy.prompts(images, QUESTIONS)))
        features.square().sum().backward()
        return features.detach(), [p.grad for p in policy.lora_parameters() if p.grad is not None]

    theirs = look(Qwen2_5_VLVisionAttention)
    whole = ALL_ATTENTION_FUNCTIONS.get_interface
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *names: lambda *inputs, **more: (
        calls.append(tuple(inputs[1].shape[::2])), whole(*names)(*inputs, **more))[1])
    ours = look(WindowAttention)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5) and len(ours[1]) == len(theirs[1]) > 8
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())) for a, b in zip(ours[1], theirs[1]))
    # (windows, patches in each) of the block with windows: 4 whole ones, then 3 + 3 cut at the bottom, and so on.
    assert sum(count * size for count, size in calls) == 2 * sum(w * h // 14**2 for w, h in shapes)
    assert calls[0] == (7, 16) and len(calls) < 20


def test_image_features_are_kept_only_while_the_tower_is_frozen(policy, prompts, monkeypatch):
    calls = []
    see = policy._see
    monkeypatch.setattr(policy, "_see", lambda prompts: calls.append(len(prompts)) or see(prompts))
    groups = policy.rollout(prompts, [PLAN] * 4, seeds=[1, 2, 3, 4])
    policy.log_probs(prompts, groups)
    assert calls == [4]
    before = policy.log_probs(prompts, groups)["logp"]
    policy.add_lora(targets="all")
    randomise_lora(policy)
    for name, layer in policy.layers.items():
        layer.enabled = name.startswith("model.visual.")            # only the tower's adapter counts
    assert not torch.allclose(policy.log_probs(prompts, groups)["logp"], before, atol=1e-3)
    assert calls == [4, 4]


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def all_logits(model, prompts):
    return torch.cat([plain_logits(model, prompt, [70, 80, 90]).flatten() for prompt in prompts])


def test_lora_starts_as_the_identity_and_leaves_the_base_alone(policy, prompts):
    base = {name: value.clone() for name, value in policy.model.state_dict().items()}
    before = all_logits(policy.model, prompts)
    policy.add_lora(r=4, alpha=8, dropout=0.1)
    assert torch.equal(all_logits(policy.model, prompts), before)
    assert [p for p in policy.model.parameters() if p.requires_grad] and all(
        p.requires_grad == ("lora_" in name) for name, p in policy.model.named_parameters())
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=0.05)
    for step in range(2):
        groups = policy.rollout(prompts, [PLAN] * 4, seeds=[step] * 4)
        optimizer.zero_grad()
        policy.log_probs(prompts, groups)["logp"].sum().backward()
        optimizer.step()
    changed = all_logits(policy.model, prompts)
    assert not torch.allclose(changed, before, atol=1e-2)
    now = {name.replace(".base.", "."): value for name, value in policy.model.state_dict().items()
           if "lora" not in name}
    assert now.keys() == base.keys() and all(torch.equal(now[name], base[name]) for name in base)
    with policy.adapter(False):
        assert torch.equal(all_logits(policy.model, prompts), before)
        with policy.adapter(True):
            assert torch.equal(all_logits(policy.model, prompts), changed)
        assert torch.equal(all_logits(policy.model, prompts), before)
    assert torch.equal(all_logits(policy.model, prompts), changed)


def test_lora_is_the_formula(policy):
    policy.add_lora(r=2, alpha=6, dropout=0.5)
    randomise_lora(policy)
    layer = policy.layers["model.language_model.layers.0.self_attn.q_proj"]
    x = torch.randn(5, 48)
    expected = x @ layer.base.weight.T + layer.base.bias + 3 * x @ layer.lora_A.T @ layer.lora_B.T      # 6 / 2 = 3
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_merge_and_unmerge(policy, prompts):
    policy.add_lora()
    randomise_lora(policy)
    base, adapted = [], all_logits(policy.model, prompts)
    for layer in policy.layers.values():
        base.append(layer.base.weight.clone())
    policy.merge()
    merged = all_logits(policy.model, prompts)
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    policy.merge()                                                              # merging twice is merging once
    assert torch.equal(all_logits(policy.model, prompts), merged)
    with pytest.raises(ValueError, match="unmerge"), policy.adapter(False):
        pass
    policy.unmerge()
    assert all(torch.equal(layer.base.weight, w) for layer, w in zip(policy.layers.values(), base))
    assert torch.equal(all_logits(policy.model, prompts), adapted)


def test_lora_targets_and_seed(folder):
    def layers(targets, seed=0):
        policy = load_policy(folder)
        policy.add_lora(targets=targets, seed=seed)
        return policy
    everything, language = layers("all"), layers("language")
    linear = {n for n, m in load_policy(folder).model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(everything.layers) == linear - {"lm_head"} and everything.tower_adapted
    assert set(language.layers) == {n for n in linear if n.startswith("model.language_model.")}
    assert len(language.layers) == 2 * 7 and not language.tower_adapted                     # 2 layers: q k v o, 3 MLP
    same, other = layers("all"), layers("all", seed=1)
    pairs = list(zip(everything.lora_parameters(), same.lora_parameters(), other.lora_parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert all(not torch.equal(a, c) for a, _, c in pairs[::2]) and all((b == 0).all() for b, _, _ in pairs[1::2])
    with pytest.raises(ValueError, match="'all' or 'language'"):
        layers("vision")
    with pytest.raises(ValueError, match="has LoRA already"):
        same.add_lora()


@pytest.mark.parametrize("targets", ["all", "language"])
def test_peft_reads_our_adapter(folder, policy, prompts, tmp_path, targets):
    from peft import PeftModel
    policy.add_lora(r=4, alpha=12, targets=targets)
    randomise_lora(policy)
    policy.save_adapter(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
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


def test_adapter_round_trip_and_what_does_not_fit(folder, policy, tmp_path):
    policy.add_lora(r=4)
    randomise_lora(policy)
    policy.save_adapter(tmp_path / "a")
    other = load_policy(folder)
    other.add_lora(r=4, seed=5)
    other.load_adapter(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(policy.lora_parameters(), other.lora_parameters()))
    bigger = load_policy(folder)
    bigger.add_lora(r=5)
    with pytest.raises(ValueError, match="do not fit the LoRA in place"):
        bigger.load_adapter(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        load_policy(folder, adapter=str(tmp_path / "nowhere"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"rank_pattern": {"q_proj": 2}},
                   {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        broken = shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        (broken / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="only plain LoRA"):
            load_policy(folder, adapter=str(broken))


def test_merged_model_is_loaded_by_plain_transformers(policy, prompts, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    policy.add_lora(r=4, alpha=12)
    randomise_lora(policy)
    policy.save_adapter(tmp_path / "adapter")
    adapted, weights = all_logits(policy.model, prompts), policy.model.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    out = str(tmp_path / "whole")
    policy_module.main(["--adapter", str(tmp_path / "adapter"), "--merge", out, "--dtype", "float32"])
    assert "folded in, float32" in capsys.readouterr().out
    plain, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(all_logits(plain.eval(), prompts), adapted, atol=1e-4, rtol=1e-4)
    assert AutoProcessor.from_pretrained(out).tokenizer.get_vocab() == policy.processor.tokenizer.get_vocab()
    # With the prompt that it was trained under, and no need to name it.
    again = load_policy(out)
    assert not again.layers and again.system_prompt == load_policy(policy.name).system_prompt
    # ... also where the run had a prompt and an image size of its own: they stand in the run's config.json.
    (tmp_path / "own.txt").write_text("Say FULL or REGION.")
    (tmp_path / "config.json").write_text(json.dumps(
        {"args": {"system_prompt": str(tmp_path / "own.txt"), "max_pixels": 28 * 28 * 9}}))
    policy_module.main(["--adapter", str(tmp_path / "adapter"), "--merge", str(tmp_path / "own")])
    again = load_policy(str(tmp_path / "own"))
    assert again.system_prompt == "Say FULL or REGION."
    assert again.processor.image_processor.size["longest_edge"] == 28 * 28 * 9
    # The run's own copy of the text counts, not what its file says by now; the flag wins over both.
    (tmp_path / "own.txt").write_text("Say something else.")
    (tmp_path / "config.json").write_text(json.dumps(
        {"args": {"system_prompt": str(tmp_path / "own.txt")}, "system_prompt": "Say FULL or REGION."}))
    asked = policy_module.parse_args(["--adapter", str(tmp_path / "adapter"), "--merge", "unused"])
    assert policy_module.trained_under(asked) == ("Say FULL or REGION.", None)
    asked.system_prompt = str(tmp_path / "own.txt")
    assert policy_module.trained_under(asked) == ("Say something else.", None)
    (tmp_path / "config.json").unlink()
    # A model that writes itself in the middle of training goes on as if nothing had happened.
    policy.save_merged(str(tmp_path / "second"))
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    for adapter, target, complaint in [(tmp_path / "adapter", out, "holds a model already"),
                                       (tmp_path, out + "2", "adapter_config.json is missing")]:
        with pytest.raises(SystemExit, match=complaint):
            policy_module.main(["--adapter", str(adapter), "--merge", target])
    with pytest.raises(ValueError, match="no adapter to merge"):
        again.save_merged(str(tmp_path / "third"))


def test_adapter_of_the_output_layer_is_refused(folder, policy, tmp_path):
    policy.add_lora(r=4, targets="language")
    layer = next(iter(policy.layers.values()))
    width, vocabulary = policy.model.lm_head.in_features, policy.model.lm_head.out_features
    layer.lora_A.data, layer.lora_B.data = torch.zeros(4, width), torch.zeros(vocabulary, 4)
    policy_module.write_adapter(tmp_path, folder, policy.lora, {"lm_head": layer})
    with pytest.raises(ValueError, match="no linear layer 'lm_head'"):
        load_policy(folder, adapter=str(tmp_path))


def test_adapter_of_another_base(folder, policy, tmp_path):
    policy.add_lora(r=4)
    policy.save_adapter(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    weights = load_file(path)
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, message in [
        ({name: torch.zeros(4, 47)}, "q_proj has A .4, 47."),
        ({name.replace("layers.0", "layers.9"): torch.zeros(4, 48)}, "is missing for"),
        ({name.replace("lora_A", "lora_magnitude"): torch.zeros(4)}, "is no LoRA weight"),
    ]:
        save_file(weights | change, path)
        with pytest.raises(ValueError, match=message):
            load_policy(folder, adapter=str(tmp_path))
    extra = name.replace("layers.0", "layers.9")
    save_file(weights | {extra: torch.zeros(4, 48), extra.replace("_A", "_B"): torch.zeros(48, 4)}, path)
    with pytest.raises(ValueError, match="no linear layer .*layers.9.*wrong base"):
        load_policy(folder, adapter=str(tmp_path))


# ---- loading and prompts ---------------------------------------------------------------------------------------------


def test_names_that_are_no_policy(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no policy './missing/folder'.*mini/policy"):
        load_policy("./missing/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no policy .*empty"):
        load_policy(str(tmp_path / "empty"))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a llama model"):
        load_policy(str(tmp_path / "llama"))
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        load_policy(folder, attention="flash_attention_2")


def test_a_checkpoint_with_a_weight_missing_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint lacks .*up_proj"):
        load_policy(str(copy))


def test_system_prompt_comes_from_argument_folder_or_table_10(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "system_prompt.txt").write_text("Crop?")
    assert load_policy(str(copy)).system_prompt == "Crop?"
    assert load_policy(str(copy), system_prompt="Or not.").system_prompt == "Or not."
    table_10 = load_policy(folder).system_prompt
    for words in ("image_zoom_in_tool", "bbox_2d", '"label"', "[x1, y1, x2, y2]", '"FULL"', '"REGION"', "<tool_call>",
                  '{"Decision": "FULL" or "REGION", "Tool": <'):
        assert words in table_10


def test_prompt_is_the_chat_template_with_the_image_in_it(policy, prompts, images):
    decode = policy.processor.tokenizer.decode
    for prompt, question, image in zip(prompts, QUESTIONS, images):
        tokens = int(prompt.grid_thw.prod()) // 4                               # 2 x 2 patches are merged into a token
        pads = "<|image_pad|>" * tokens
        assert decode(prompt.ids) == (
            "<|im_start|>system\nCrop or not?<|im_end|>\n<|im_start|>user\n<|vision_start|>" + pads + "<|vision_end|>"
            + question + "<|im_end|>\n<|im_start|>assistant\n")
        assert int(prompt.mm_token_type_ids.sum()) == tokens == prompt.resized_size[0] * prompt.resized_size[1] // 784
        single = policy.prompts([image], [question])[0]
        assert torch.equal(single.ids, prompt.ids) and torch.equal(single.pixel_values, prompt.pixel_values)
    # 100 x 60 -> 112 x 56: 4 x 2 tokens take max(4, 2) = 4 positions, so text goes on 4 positions lower than its index
    assert prompts[0].resized_size == (112, 56) and prompts[0].next_position == len(prompts[0].ids) - (8 - 4)


def test_max_pixels(folder):
    big = [Image.new("RGB", (600, 300))]
    sizes = [load_policy(folder, max_pixels=n).prompts(big, ["?"])[0].resized_size
             for n in (None, 28 * 28 * 9, 28 * 28)]
    assert sizes == [(224, 112), (112, 56), (28, 28)]       # default: the folder's own 40 tokens hold 8 x 4


def test_images_of_any_mode_are_read_as_rgb(policy):
    grey = Image.fromarray(np.arange(3600, dtype=np.uint8).reshape(60, 60) % 251)
    a, b = policy.prompts([grey, grey.convert("RGB")], ["?", "?"])
    assert torch.equal(a.pixel_values, b.pixel_values)


@pytest.mark.parametrize("image, question, message", [
    (Image.new("RGB", (50, 50)), "What <|image_pad|> is", "question 1 contains the special token '<.image_pad.>'"),
    (Image.new("RGB", (50, 50)), "<|im_end|>", "question 1 contains the special token"),
    (Image.new("RGB", (500, 2)), "What?", "image 1 is .500, 2. pixels"),
    (Image.new("RGB", (0, 0)), "What?", "image 1 is .0, 0. pixels"),
    ("scene.jpg", "What?", "image 1 is a str; a PIL image"),
])
def test_bad_prompts(policy, image, question, message):
    with pytest.raises(ValueError, match=message):
        policy.prompts([Image.new("RGB", (40, 40)), image], ["fine", question])
    with pytest.raises(ValueError, match="1 images but 2 questions"):
        policy.prompts([Image.new("RGB", (40, 40))], ["a", "b"])
    with pytest.raises(ValueError, match="1 images but 2 questions"):
        policy.act([Image.new("RGB", (40, 40))], ["a", "b"], batch_size=1)


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


@pytest.mark.parametrize("targets", ["all", "language"])
def test_free_decoding_sends_an_image_through_the_tower_once(policy, prompts, monkeypatch, targets):
    """Own decision, forced FULL and forced REGION are three rows of a prefill, and one image."""
    policy.add_lora(r=2, targets=targets)
    see, seen = policy._see, []
    monkeypatch.setattr(policy, "_see", lambda found: seen.append(len(found)) or see(found))
    wanted = [c.ids for c in policy.rollout(prompts[:1], [["REGION"]], "free", seeds=[1], max_new_tokens=3)[0]]
    policy.rollout(prompts[:2], [[None, "FULL", "REGION"], ["REGION", None]], "free", seeds=[1, 2], max_new_tokens=3)
    assert seen == ([1, 2] if targets == "all" else [1, 1])         # the first image is kept where no LoRA changes it
    again = policy.rollout(prompts[:1], [["REGION"]], "free", seeds=[1], max_new_tokens=3)[0]
    assert [c.ids for c in again] == wanted
