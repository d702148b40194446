"""The model card of a trained run: README.md beside the adapter, in the form that model hubs show.

    python -m tools.card --run runs/world --licence mit

Everything comes from the run's own files: config.json (how it was trained), eval/metrics.json (what it reached),
manifest.json of its data (which pools, which scorer). What is not there is not claimed. The system prompt stands in it
as text: an adapter is of use under the words it was trained under. To share: runs/<run>/adapter.
"""

import argparse
import json
import os
import textwrap
from pathlib import Path

from policy import SYSTEM_PROMPT
from scorer import InputError, read_json, replacing
from tools.rerank import digest

ROWS = ("full", "random", "center", "zeroshot", "policy", "best16")
COLUMNS = {"MRR": "MRR", "NDCG": "NDCG", "R@1": "R@1", "R@5": "R@5", "CondR@1": "CondR@1", "CondR@5": "CondR@5",
           "crop_rate": "crop %"}  # field of metrics.json: what stands above it
# Arguments that say how a run was trained; the rest is where and how fast.
METHOD = ("policy_dtype", "max_pixels", "init_adapter", "balance", "advantage", "decision_weight", "sure",
          "std", "std_floor", "decode", "temperature", "reward", "reward_weights", "fuse", "eta", "encouragement",
          "encouragement_steps", "clip", "beta", "hold", "norm", "rank", "alpha", "dropout", "targets", "queries",
          "group", "inner_steps", "steps", "epochs", "lr", "warmup", "max_grad_norm", "seed")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/world", help="folder of train.py, with eval/ if it was evaluated")
    parser.add_argument("--licence", default="other", help="identifier of the adapter's licence, as hubs spell it; the "
                        "base model's and the data's licences bind too")
    return parser.parse_args(argv)


def front_matter(config, licence):
    """The YAML block that hubs read. Values are quoted as JSON, which YAML includes."""
    fields = {"library_name": "peft", "base_model": config["policy"], "license": licence,
              "pipeline_tag": "image-text-to-text", "tags": ["region-r1", "lora", "visual-re-ranking"]}
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"]


def results(metrics):
    """Lines of the table of results; none before evaluate.py has run."""
    if not metrics:
        return ["Not evaluated yet: `python evaluate.py` writes the numbers that would stand here."]
    lines = [f"{metrics['split']} split, {metrics['queries']} queries, {metrics['with_positive']} with a right answer "
             f"among their {metrics['K']} candidates, scorer `{metrics['scorer']}`; a miss counts 0, CondR@K and "
             "crop % are over the latter.",
             "", "| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in ROWS:
        if row := metrics["methods"].get(name):
            cells = ["-" if row[c] is None else f"{100 * row[c]:.1f}" if "%" in head else f"{row[c]:.3f}"
                     for c, head in COLUMNS.items()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def data_lines(config, manifest):
    """What it was trained on; {} for a manifest that is not on this disk."""
    lines = [f"Pools `{config['pools']}` (data set `{manifest.get('dataset', 'not on this disk')}`), candidates and "
             f"crops embedded by `{config['scorer']}`."]
    for split, counts in manifest.get("splits", {}).items():
        lines.append(f"* {split}: {counts['rows_read']} rows read, {counts['kept']} kept, {counts['with_positive']} "
                     "with a right answer in the pool")
    return lines


def prompt_of(config):
    """The system prompt of the run as text: --system-prompt of the training, else that of the model's own folder, else
    ours; in this order as load_policy chooses."""
    own = Path(config["policy"]) / "system_prompt.txt"
    if config.get("system_prompt") is not None:
        return config["system_prompt"]
    return own.read_text(encoding="utf-8") if own.is_file() else SYSTEM_PROMPT


def use(config):
    """Lines of the section that says how to load it, with what the adapter's own files do not hold: the run's prompt
    and image size."""
    args = config["args"]
    more = f", max_pixels={args['max_pixels']}" if args.get("max_pixels") else ""
    if args.get("policy_dtype"):
        more += f", dtype={json.dumps(args['policy_dtype'])}"
    alone = args.get("decode") == "free" or args.get("hold", 0) > 0  # runs of before had no --hold
    return [
        "```python", "from policy import load_policy",
        f"policy = load_policy({json.dumps(config['policy'])}, adapter=\"THIS FOLDER\"{more}, system_prompt=PROMPT)",
        'action = policy.act([image], ["Where does this beetle live?"])[0]   # FULL, or REGION with a box in pixels',
        "```", "",
        "Or `peft.PeftModel.from_pretrained(base, \"THIS FOLDER\")`, or vLLM with LoRA, or merged into the base model "
        "by `python -m tools.merge`. " + ("Its answers keep their form without this project's grammar." if alone else
        "Trained with `--hold 0`: outside this project's grammar (`decode=\"grammar\"`) its answers cannot be read.")
        + " The answer is `{\"Decision\": \"FULL\"}`, or REGION with a `bbox_2d` in pixels of "
        "the resized image that the model was given: `policy.parse` maps it to the original. Use the system prompt of "
        "the training run, to the letter:",
        # Indented and not fenced: whatever the text holds, it cannot end the block.
        "", *textwrap.indent(prompt_of(config), "    ").splitlines()]


def card(config, metrics, manifest, licence):
    """The whole card as text. config, metrics, manifest: the dicts of the three files."""
    settings = [f"| {name} | `{json.dumps(config['args'][name])}` |" for name in METHOD
                if config["args"].get(name) is not None]  # null: left to the model's or the machine's default
    return "\n".join([
        *front_matter(config, licence), "", "# Region-R1 adapter", "",
        "LoRA that lets a vision-language model decide whether a query image is kept whole or cropped to one region "
        "before a frozen CLIP-style scorer re-ranks candidates "
        "([Region-R1](https://arxiv.org/abs/2604.05268), r-GRPO).",
        "",
        "## Results", "", *results(metrics), "", "## Data", "", *data_lines(config, manifest), "",
        "## Training", "", "The arguments of train.py that decide what is learned; `queries` is of a step, `group` the "
        "rollouts of each.", "", "| | |", "|---|---|", *settings, "",
        "## Use", "", *use(config), "",
        "## Limits and licence", "",
        "Trained for one scorer: which crop helps depends on it. It was never taught to answer the question itself.",
        f"Adapter: {licence}. Base model ({config['policy']}), scorer and data have licences of their own.", ""])


def main(argv=None):
    args = parse_args(argv)
    try:
        config = read_json(os.path.join(args.run, "config.json"), "a card needs a finished run (`make train`)")
        if not os.path.isfile(os.path.join(args.run, "adapter", "adapter_model.safetensors")):
            raise FileNotFoundError(f"{args.run}/adapter is missing: train first, or --resume what was cut short")
        metrics, manifest = (read_json(path, "make it anew") if os.path.isfile(path) else {}
                             for path in (os.path.join(args.run, "eval", "metrics.json"),
                                          os.path.join(config["data"], "manifest.json")))
        # An evaluation from before the field was there is believed.
        if metrics.get("adapter_sha256") not in (None, digest(f"{args.run}/adapter", "adapter_model.safetensors")):
            raise InputError(f"{args.run}/eval is of another adapter than {args.run}/adapter: run `python evaluate.py "
                             f"--run {args.run}`")
    except (FileNotFoundError, InputError) as error:
        raise SystemExit(f"tools.card: {error}") from error
    path = os.path.join(args.run, "adapter", "README.md")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(card(config, metrics, manifest, args.licence))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
