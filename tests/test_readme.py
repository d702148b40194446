"""Every command of the README is one that its program takes, and every make target in it exists.

Here commands are parsed, not run: most need data that no test has. What needs only the embedded world is run in
test_pipeline.py, the README's Python blocks included.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

import train
from policy import Policy
from scorer import EvaClip, EvaClipConfig, EvaClipScorer
from tools import bench

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands():
    """Commands in blocks and in `code` of the text, without their comments."""
    lines = [line.split("  #")[0].strip() for kind, block in FENCED if not kind for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    starts = ("make ", "python ", "torchrun ")
    return sorted({line for line in lines if line.startswith(starts) and "..." not in line})


def test_there_are_commands():
    found = commands()
    assert len(found) > 20 and any(line.startswith("torchrun") for line in found)
    assert "python -m tools.rerank --query E-VQA_test_9" in found


@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith("make ")])
def test_program_takes_these_flags(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")):]]
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    module = importlib.import_module(name.removesuffix(".py"))
    if not hasattr(module, "parse_args"):  # rewards.py and rgrpo.py are run bare
        assert not rest and name in ("rewards.py", "rgrpo.py")
    elif rest == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            module.parse_args(rest)
    else:
        module.parse_args(rest)


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_make_knows_these_targets(command):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run([*shlex.split(command), "--dry-run", f"PY={sys.executable}", "READY="], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_that_are_named_exist():
    ours = TEXT[:TEXT.index("### The options of the authors' release")]  # the table below it names the release's files
    named = set(re.findall(r"`((?:mini/|tools/|tests/)?\w+\.(?:py|html))`", ours)) | {"figures/loop.png"}
    known = {path.name for folder in ("mini", "tools") for path in (ROOT / folder).iterdir()}
    assert len(named) > 8 and {name for name in named if not (ROOT / name).exists() and name not in known} == set()


def test_links_lead_somewhere():
    heads = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
             for head in re.findall("^#+ (.*)$", TEXT, re.MULTILINE)]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")]
    assert links and [link for link in links if link[1:] not in heads and not (ROOT / link).exists()] == []


def test_paper_can_be_cited():
    assert any(kind == "bibtex" and "2604.05268" in block for kind, block in FENCED)


def forecast(micro, checkpointing):
    """GiB that train.py would forecast for Qwen2.5-VL-3B and EVA-CLIP-8B at the paper's shape, without their weights."""
    processor = bench.build_processor(1024)
    config = bench.build_config("3b", processor.tokenizer)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        tower = EvaClip(EvaClipConfig(), ("visual",)).to(torch.bfloat16)
    policy = Policy(model.requires_grad_(False), processor, "3b", "")
    policy.add_lora()
    scorer = EvaClipScorer.__new__(EvaClipScorer)
    vars(scorer).update(model=tower, batch_size=64, dtype=torch.bfloat16,
                        image_hw=tower.config.image_hw)
    args = train.parse_args(["--preset", "paper", "--queries", "4", "--micro", str(micro)]
                            + ["--checkpointing"] * checkpointing)
    # As if it were on a card: there is none here, and arithmetic needs none.
    on_card = SimpleNamespace(model=model, lora=policy.lora, grammar=policy.grammar, tower_adapted=True,
                              device=torch.device("cuda"), lora_parameters=policy.lora_parameters)
    # 1,024 image tokens are 4,096 patches of an image of 896 x 896 pixels; Table 10 and a question take 438 more.
    stays, comes = train.memory_forecast(on_card, scorer, args, 1462, 4096, 896)
    return (sum(stays.values()) + max(comes.values())) / 2**30


@pytest.mark.parametrize("micro, checkpointing, stated", [
    (1, False, "39 GiB with `--micro 1`"), (1, True, "23 GiB with `--checkpointing`")])
def test_memory_as_the_readme_states_it(micro, checkpointing, stated):
    """The forecast for the published sizes. What a card really takes has to be measured on one."""
    assert stated in TEXT
    assert round(forecast(micro, checkpointing)) == int(stated.split()[0])
