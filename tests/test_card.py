"""The model card says what the run's files say, and nothing that they do not."""

import contextlib
import hashlib
import json
import textwrap

import pytest
import yaml

import train
from policy import SYSTEM_PROMPT
from tools import card

CONFIG = {"policy": "org/base: 3B", "scorer": "s", "pools": "abc", "data": "nowhere",
          "args": {"group": 8, "lr": 5e-05, "balance": "force", "std": False, "micro": 4}}
ROW = {"MRR": .5, "NDCG": .25, "R@1": .1, "R@5": .2, "CondR@1": None, "CondR@5": .75, "crop_rate": 0.0}
METRICS = {"split": "test", "queries": 7, "with_positive": 4, "K": 20, "scorer": "s@1", "methods": {"full": ROW}}
MANIFEST = {"dataset": "evqa", "splits": {"test": {"rows_read": 9, "kept": 7, "with_positive": 4}}}


def test_card_by_hand():
    text = card.card(CONFIG, METRICS, MANIFEST, "mit")
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "org/base: 3B" and head["license"] == "mit" and head["library_name"] == "peft"
    assert "| full | 0.500 | 0.250 | 0.100 | 0.200 | - | 0.750 | 0.0 |" in text
    assert "7 queries, 4 with a right answer among their 20 candidates" in text
    assert "* test: 9 rows read, 7 kept, 4 with a right answer in the pool" in text
    assert "| lr | `5e-05` |" in text and "| std | `false` |" in text
    assert "micro" not in text and "| policy |" not in text


def test_every_argument_of_the_method_is_told():
    groups = [[name.replace("-", "_") for name, *_ in flags] for title, flags in train.FLAGS.items()
              if title.startswith(("r-GRPO", "LoRA", "sizes"))]
    where = {"micro_tokens", "max_new_tokens", "eval_every", "val_queries", *train.FREE}  # and how fast
    assert set(sum(groups, [])) - where <= set(card.METHOD)


def test_what_is_not_known_is_not_claimed():
    text = card.card(CONFIG, {}, {}, "other")
    assert "Not evaluated yet" in text and "not on this disk" in text and "0." not in text.split("## Results")[1][:200]


@pytest.mark.parametrize("given", ["--system-prompt", "the model's own", "ours"])
def test_the_prompt_stands_in_it_as_text(tmp_path, given):
    """An adapter is of use under the words it was trained under, and its own two files do not hold them."""
    config, words = dict(CONFIG), SYSTEM_PROMPT
    if given != "ours":
        words, config["policy"] = "Crop?\n```\nOr not.\n", str(tmp_path)
        (tmp_path / "system_prompt.txt").write_text(words if given == "the model's own" else "another")
        config["system_prompt"] = words if given == "--system-prompt" else None
    text = card.card(config, {}, {}, "mit")
    prompt = text.split("to the letter:\n\n")[1].split("\n\n## ")[0]
    assert textwrap.dedent(prompt).split() == words.split() and "null" not in text
    assert prompt.splitlines()[0] == "    " + words.splitlines()[0]  # indented: its ``` cannot end the block


def test_image_size_and_dtype_of_the_run_are_told():
    args = {**CONFIG["args"], "max_pixels": 7056, "policy_dtype": "bfloat16"}
    text = card.card({**CONFIG, "args": args}, {}, {}, "mit")
    assert 'adapter="THIS FOLDER", max_pixels=7056, dtype="bfloat16", system_prompt=PROMPT)' in text
    assert '| policy_dtype | `"bfloat16"` |' in text
    assert 'adapter="THIS FOLDER", system_prompt=PROMPT)' in card.card(CONFIG, {}, {}, "mit")


@pytest.mark.parametrize("args, alone", [({"decode": "grammar", "hold": 1.0}, True), ({"decode": "free", "hold": 0}, True),
                                         ({"decode": "grammar", "hold": 0.0}, False), ({}, False)])
def test_it_says_whether_the_adapter_needs_our_grammar(args, alone):
    text = card.card({**CONFIG, "args": {**CONFIG["args"], **args}}, {}, {}, "mit")
    assert ("keep their form without" in text) == alone and ("its answers cannot be read" in text) != alone


def test_the_card_lies_beside_the_adapter(tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="config.json is missing: a card needs a finished run"):
        card.main(["--run", str(run)])
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SystemExit, match="adapter is missing: train first"):
        card.main(["--run", str(run)])
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (run / "eval" / "metrics.json").write_text(json.dumps(METRICS))
    card.main(["--run", str(run), "--licence", "apache-2.0"])
    assert "license: \"apache-2.0\"" in (run / "adapter" / "README.md").read_text()
    assert str(run) in capsys.readouterr().out and not list(run.rglob("*.tmp"))
    for content, fits in ((b"", True), (b"another's", False)):  # METRICS, which does not say whose it is, was believed
        told = {**METRICS, "adapter_sha256": hashlib.sha256(content).hexdigest()}
        (run / "eval" / "metrics.json").write_text(json.dumps(told))
        with contextlib.nullcontext() if fits else pytest.raises(SystemExit, match="is of another adapter than"):
            card.main(["--run", str(run)])
