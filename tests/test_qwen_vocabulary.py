"""The grammar, the prompt and the packed scores on Qwen2.5-VL's own vocabulary: 151,643 merges, their true seams."""

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_policy
from policy import FULL_TEXT, REGION_TEXT, SYSTEM_PROMPT, Grammar, load_policy, parse
from tools import vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.load_tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    """Tiny layers, the whole vocabulary, and the paper's prompt."""
    torch.set_num_threads(1)
    policy = load_policy(tiny_policy.build(tmp_path_factory.mktemp("qwen"), tokenizer=tokenizer))
    policy.add_lora(targets="language")
    for parameter in policy.lora_parameters():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    return policy


@pytest.fixture(scope="module")
def prompts(policy):
    noise = np.random.default_rng(0).integers(0, 256, (3, 120, 180, 3), dtype=np.uint8)
    return policy.prompts([Image.fromarray(pixels) for pixels in noise],
                          ["Where does this beetle live?", "What is the genus of Hélène's plant, 栗?", "1234 + 5?"])


def test_ids_are_the_published_ones(tokenizer):
    """From the model's config.json and tokenizer_config.json."""
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in (
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<tool_call>", "</tool_call>")} == {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
        "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<tool_call>": 151657, "</tool_call>": 151658}
    assert tokenizer.encode("0123456789") == list(range(15, 25))
    assert len(tokenizer.encode(SYSTEM_PROMPT)) == 422 and len(tokenizer.encode(FULL_TEXT)) == 6
    text = "Hélène's 栗 <tool_call> \n\n 12"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_grammar_writes_what_the_tokenizer_would(tokenizer):
    """3,000 boxes: the tokens that the grammar feeds and allows are those of the text as a whole."""
    grammar, draw = Grammar(tokenizer), np.random.default_rng(0)
    assert len(grammar.region_ids((112, 56, 431, 320))) == 52
    for side in (28, 1000, 16384):
        for x1, y1, x2, y2 in draw.integers(0, side, (1000, 4)).tolist():
            ids = grammar.region_ids((x1, y1, x2, y2))
            text = REGION_TEXT % (x1, y1, x2, y2)
            assert ids == [*tokenizer.encode(text), tokenizer.eos_token_id] and tokenizer.decode(ids[:-1]) == text
    assert grammar.prefix + [grammar.full] + grammar.full_tail == [*tokenizer.encode(FULL_TEXT), tokenizer.eos_token_id]


def test_prompts_begin_with_the_system_turn(policy, prompts):
    tokenizer = policy.processor.tokenizer
    assert len(policy.opening) == 422 + 5  # <|im_start|> system \n ... <|im_end|> \n
    for prompt in prompts:
        assert torch.equal(prompt.ids[:427], policy.opening)
        text = tokenizer.decode(prompt.ids[427:])
        assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "Hélène's plant, 栗?" in tokenizer.decode(prompts[1].ids)
    with pytest.raises(ValueError, match="special token '<\\|vision_start\\|>'"):
        policy.prompts([Image.new("RGB", (56, 56))], ["What <|vision_start|> is this?"])


def test_answers_are_read_and_scored_as_they_were_written(policy, prompts):
    """Three queries in one row: sampled and scored log-probabilities agree, and each answer is that of its text."""
    plans = [["FULL", "REGION", "REGION", None]] * 3
    groups = policy.rollout(prompts, plans, seeds=[1, 2, 3])
    pack, = policy.pack(prompts, groups, hold=True)
    assert pack.layout.ids.shape[0] == 1 and pack.layout.tokens < sum(len(p.ids) for p in prompts)  # 427 but once
    out = policy.score(pack, hold=True)
    for row, one in zip(out["logp"], pack.completions):
        assert torch.allclose(row[:len(one.ids)], torch.tensor(one.log_probs), atol=1e-4)
        assert policy.processor.tokenizer.decode(one.ids[:-1]) == one.action.text
        prompt = prompts[0]
        assert parse(one.action.text, prompt.resized_size, prompt.original_size).box == one.action.box
    # A random model gives a template token 1 in 151,659: ln of it is 11.9.
    assert out["outside"].shape == (3,) and 5 < out["outside"].min() and out["outside"].max() < 25
    free = policy.rollout(prompts, [["REGION"]] * 3, "free", seeds=[1, 2, 3], max_new_tokens=40)
    assert all(len(group[0].ids) <= 40 and group[0].action.decision == "MALFORMED" for group in free)
    logp = policy.log_probs(prompts, free)["logp"]
    assert torch.allclose(logp[0, :len(free[0][0].ids)], torch.tensor(free[0][0].log_probs), atol=1e-4)
