"""Qwen2.5-VL's tokenizer without its checkpoint: for true token counts in tools/bench.py and true seams in the tests.

    pip install --no-deps dashscope  # in requirements-dev.txt; it ships Qwen's 151,643 tokens
    python -m tools.vocabulary       # how many tokens the system prompt, a question and an answer have

The tokens are the package's file; Qwen2's way of cutting text and its special tokens, in their published order, are
written here. Ids are those of the published checkpoints.
"""

import argparse
import base64
import importlib.util
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from policy import FULL_TEXT, REGION_TEXT, SYSTEM_PROMPT

# Words with at most one sign before them, digits one by one, runs of signs, of blanks.
CUTS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
SPECIAL = [f"<|{name}|>" for name in (  # from id 151643 on
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad").split()]
TAGS = ["<tool_call>", "</tool_call>"]  # single tokens, but not special ones: decode() keeps them


class Merges(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(path):
        """A line a token, its bytes in base64 and its rank -> {bytes: rank}. (transformers would import tiktoken.)"""
        pairs = (line.split() for line in Path(path).read_bytes().splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


def is_installed():
    return importlib.util.find_spec("dashscope") is not None


def load_tokenizer():
    """Qwen2.5-VL's tokenizer, a PreTrainedTokenizerFast. ModuleNotFoundError, saying what to install."""
    if not is_installed():
        raise ModuleNotFoundError("Qwen's tokens come with the package dashscope: pip install --no-deps dashscope")
    folder = Path(importlib.util.find_spec("dashscope").origin).parent  # found, not imported: it needs other packages
    tokenizer = Merges(folder / "resources" / "qwen.tiktoken", CUTS, extra_special_tokens=SPECIAL).converted()
    tokenizer.add_tokens(TAGS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL)


def main():
    tokenizer = load_tokenizer()
    for name, text in (("system prompt (Table 10)", SYSTEM_PROMPT), ("question", "Where does this beetle live?"),
                       ("FULL", FULL_TEXT), ("REGION", REGION_TEXT % (112, 56, 431, 320))):
        print(f"{name:25} {len(tokenizer.encode(text)):4} tokens")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
