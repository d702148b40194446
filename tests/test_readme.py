"""Every command of the README and of docs/ is one that its program takes, and every make target in them exists.

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

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = PAGES["README.md"]
FENCED = [block for text in PAGES.values() for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def commands():
    """Commands in blocks and in `code` of the text, without their comments."""
    lines = [line.split("  #")[0].strip() for kind, block in FENCED if not kind for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", "\n".join(PAGES.values()), flags=re.DOTALL | re.MULTILINE)
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
    elif rest[-1:] == ["--help"]:
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
    ours = "\n".join(text for name, text in PAGES.items() if name != "docs/options.md")  # that one names the release's
    named = set(re.findall(r"`((?:mini/|tools/|tests/)?\w+\.(?:py|html))`", ours)) | {"figures/loop.png"}
    known = {path.name for folder in ("mini", "tools") for path in (ROOT / folder).iterdir()}
    assert len(named) > 8 and {name for name in named if not (ROOT / name).exists() and name not in known} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("https://")]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_the_readme_is_short():
    """nanoGPT's has 13,900 characters."""
    assert len(TEXT) <= 15_000 and len(re.findall(r"\]\(docs/\w+\.md\)", TEXT)) >= 4


def test_paper_can_be_cited():
    assert any(kind == "bibtex" and "2604.05268" in block for kind, block in FENCED)
