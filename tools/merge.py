"""An adapter folded into its base model: one folder that plain transformers or vLLM loads, without any of our code.

    python -m tools.merge --adapter runs/world/adapter --out merged

The folder holds transformers' own files and system_prompt.txt, because the adapter was trained under this very prompt;
`load_policy("merged")` reads it from there. Prompt and image size are those of the run in which the adapter lies.
"""

import argparse
import os
import shutil

import torch

from policy import adapter_base, load_policy
from scorer import read_json, replacing


@torch.no_grad()
def fold(policy):
    """Add (alpha / r) B A to each W, in place and for good: the policy is then one without LoRA."""
    for name, layer in policy.layers.items():
        layer.base.weight += (layer.lora_B @ layer.lora_A * layer.scaling).to(layer.base.weight.dtype)
        policy.model.set_submodule(name, layer.base)
    policy.layers, policy.lora = {}, None


def save_merged(policy, folder):
    """Fold the adapter and write the whole model as `folder`, all at once; weights keep their type.

    ValueError without LoRA; FileExistsError when there is something in `folder` already.
    """
    if not policy.layers:
        raise ValueError("there is no adapter to merge: call load_adapter first")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise FileExistsError(f"{folder} is there already and not empty; name a new folder")
    fold(policy)
    with replacing(os.path.normpath(folder)) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # of a merge that was killed
        policy.model.save_pretrained(temporary)
        policy.processor.save_pretrained(temporary)
        with open(os.path.join(temporary, "system_prompt.txt"), "w", encoding="utf-8") as file:
            file.write(policy.system_prompt)
        # safetensors makes files that their owner alone can read: other files have the mode that all files get here.
        mode = os.stat(os.path.join(temporary, "system_prompt.txt")).st_mode
        for name in os.listdir(temporary):
            if name.endswith(".safetensors"):
                os.chmod(os.path.join(temporary, name), mode)


def run_config(adapter):
    """config.json of the run of train.py that an adapter lies in, a dict; {} for a stranger's adapter. The adapter's
    own files hold neither the prompt nor the image size that it was trained under, and in others it answers worse."""
    path = os.path.join(os.path.dirname(os.path.abspath(adapter)), "config.json")
    return read_json(path, "put it back, or copy the adapter elsewhere") if os.path.isfile(path) else {}


def trained_under(args):
    """(system prompt or None, image area or None) of the adapter: from the flags, else from the run it lies in."""
    config = run_config(args.adapter)
    run = config.get("args", {})
    # The run's own copy of the text comes before its file, which may have changed or gone; a run from before there was
    # a copy has the file's name alone.
    prompt, file_name = config.get("system_prompt"), args.system_prompt
    if "system_prompt" not in config:
        file_name = file_name or run.get("system_prompt")
    if file_name:
        with open(file_name, encoding="utf-8") as file:
            prompt = file.read()
    return prompt or None, args.max_pixels or run.get("max_pixels")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder in peft's format, such as runs/world/adapter")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the whole model")
    parser.add_argument("--policy", help="base model, id or folder; default: the one that the adapter names")
    parser.add_argument("--system-prompt", metavar="FILE",
                        help="text that the adapter was trained under; default: that of its run, else the base model's")
    parser.add_argument("--max-pixels", type=int, help="area in pixels that images were shrunk to; default likewise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="of the weights written; the published checkpoints are bfloat16")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        base = args.policy or adapter_base(args.adapter)
        prompt, pixels = trained_under(args)
        policy = load_policy(base, args.adapter, dtype=args.dtype, max_pixels=pixels, system_prompt=prompt)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"merge: {error}") from error
    try:
        save_merged(policy, args.out)
    except FileExistsError as error:
        raise SystemExit(f"merge: {error}") from error
    print(f"wrote {args.out}: {base} with {args.adapter} folded in, {args.dtype}")


if __name__ == "__main__":
    main()
