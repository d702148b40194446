"""A tiny random Qwen2.5-VL folder for tests: the real classes, a few thousand weights, nothing downloaded.

`build(folder)` writes config, weights, tokenizer, image processor and chat template in the layout of the published
checkpoints, so that `load_policy(folder)` takes exactly the road that the 3B model takes.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]
# As in the real tokenizer the tool tags are single added tokens, but not special ones: decode() keeps them.
TAGS = ["<tool_call>", "</tool_call>"]

# Words, single digits, runs of punctuation with at most one leading space: the cuts that the real tokenizer makes.
CUTS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS_WHOLE_NUMBERS = CUTS.replace(r"|\p{N}|", r"|\p{N}+|")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = [
    '{"Decision": "FULL"}', '{"Decision": "REGION", "Tool": ', '{"name": "image_zoom_in_tool", "arguments": ',
    '{"bbox_2d": [1, 2, 3, 4]}}', "system user assistant", "Where does this beetle live? What is this tower?",
] * 20


def build_tokenizer(single_digits=True):
    """Byte-level BPE; `single_digits=False` merges runs of digits, which the grammar must refuse."""
    tokenizer = Tokenizer(models.BPE())
    cuts = CUTS if single_digits else CUTS_WHOLE_NUMBERS
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(cuts), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = CORPUS if single_digits else CORPUS + [str(n) for n in range(100)] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL,
        show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(TAGS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:])


def build_config(tokenizer, tie=False):
    """Two layers everywhere; window attention in one vision block and full attention in the other, as in the 3B."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=tie, initializer_range=0.15,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"), eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]})
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1], out_hidden_size=48, initializer_range=0.15)
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tie, image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"])


def build(folder, seed=0, single_digits=True, tie=False, max_pixels=28 * 28 * 40, tokenizer=None):
    """Write the tiny policy into `folder` (created); returns the folder as a string."""
    tokenizer = tokenizer or build_tokenizer(single_digits)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, tie))
    with torch.no_grad():
        # Zero biases would hide a lost bias term.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=max_pixels), tokenizer, Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return str(folder)
