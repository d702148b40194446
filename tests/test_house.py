"""The house rules, kept by a test: who imports whom, how long a function is, what is never written.

Each rule is a function from a parsed file to its complaints. `test_rules_find_faults` feeds every rule a line that
breaks it, so a rule that has stopped looking is noticed.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"rewards", "rgrpo", "scorer", "policy"}
STAGES = {"prepare", "train", "evaluate"}
# Lines that a file may have at the most: what people come to read stays readable in one sitting.
SIZES = {"rewards": 200, "rgrpo": 251, "train": 853, "evaluate": 636, "prepare": 910, "policy": 1133, "scorer": 900}
RUN_TIME = {"torch", "transformers", "open_clip", "faiss", "PIL", "numpy",  # requirements.txt, by import name, and
            "torchvision", "safetensors", "tokenizers", "tqdm", "huggingface_hub"}  # what these bring along
DEV = {"matplotlib", "pandas", "jinja2", "pyarrow", "peft", "trl", "wandb", "datasets"}  # of tools alone, where asked for
REMOTE = "trust_remote" + "_code"  # in two pieces, or this file would break its own rule
CODE = sorted(path.relative_to(ROOT).as_posix() for pattern in ("*.py", "mini/*.py", "tools/*.py")
              for path in ROOT.glob(pattern))
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py"))


def imported(tree):
    """Dotted names of all imports of a file, also those inside functions; a relative one keeps its dots."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from mini import world` imports mini.world: the package's name alone would hide which file.
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def called(tree):
    """(name, node) of all calls: 'torch.load', 'open', 'parser.add_argument'; of an unnamed thing, only the method."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def docstrings(tree):
    """Constant nodes that are docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.body[0].value for node in ast.walk(tree) if isinstance(node, kinds) and node.body
            and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)}


# --------------------------------------------------------------------------------- rules: (file, tree) -> complaints

def import_rule(file, tree):
    """Leaves import no file of the project, stages import leaves; mini and tools import what they like, nothing them."""
    wing = "/" in file
    allowed = set() if file.removesuffix(".py") in LEAVES else LEAVES | (STAGES | {"mini", "tools"} if wing else set())
    project = LEAVES | STAGES | {"mini", "tools", "tests"}
    tops = {name: name.split(".")[0] for name in imported(tree)}
    return [f"imports {name}" for name, top in tops.items() if not top or (top in project and top not in allowed)]


def run_time_packages(file, tree):
    known = set(sys.stdlib_module_names) | RUN_TIME | LEAVES | STAGES | {"mini", "tools", ""}
    known |= DEV if file.startswith("tools/") else set()
    return [f"imports {name}, no run-time package" for name in imported(tree) if name.split(".")[0] not in known]


def short_functions(file, tree):
    """The aim is 40 lines; 60, docstring included, is where a reader is lost."""
    return [f"{node.name} has {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60]


def size(file, tree):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines() if isinstance(tree, ast.Module) else tree
    most = SIZES.get(file.removesuffix(".py"), 1030)
    return ([f"has {len(lines)} lines, {most} at the most"] if len(lines) > most else []) + [
        f"line {number} has {len(line)} characters" for number, line in enumerate(lines, 1) if len(line) > 120]


def narrow_excepts(file, tree):
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    return [f"line {node.lineno}: catches everything" for node in handlers if node.type is None
            or {"Exception", "BaseException"} & {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}]


def no_globals(file, tree):
    return [f"line {node.lineno}: global {node.names}" for node in ast.walk(tree) if isinstance(node, ast.Global)]


def nothing_executed(file, tree):
    """No pickle, no code from a model's folder, no exec, no shell: what is downloaded is data."""
    found = [f"imports {name}" for name in imported(tree)
             if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}]
    for name, node in called(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in {"exec", "eval", "compile", "__import__"} or REMOTE in given:
            found.append(f"line {node.lineno}: {name} executes what it is given")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True unpickles")
        if given.get("allow_pickle") == "True":
            found.append(f"line {node.lineno}: allow_pickle")
        if given.get("shell", "False") != "False" or name in {"os.system", "os.popen", "subprocess.getoutput"}:
            found.append(f"line {node.lineno}: {name} in a shell")
    # As the key of a dict it would reach a model by **.
    return found + [f"line {node.lineno}: {REMOTE}" for node in ast.walk(tree)
                    if isinstance(node, ast.Constant) and node.value == REMOTE]


def no_module_level_work(file, tree):
    """A file can be imported without anything happening: only definitions, constants and the `if __name__` line."""
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    texts = docstrings(tree)
    main = [node for node in tree.body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
    return [f"line {node.lineno}: module-level {type(node).__name__}" for node in tree.body
            if not isinstance(node, harmless) and node not in main and getattr(node, "value", None) not in texts]


def no_path_tricks(file, tree):
    return [f"line {node.lineno}: sys.path" for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"]


def flags_have_help(file, tree):
    return [f"line {node.lineno}: {ast.unparse(node.args[0])} has no help" for name, node in called(tree)
            if name.endswith(".add_argument") and "help" not in {keyword.arg for keyword in node.keywords}]


def truth_stays_shut(file, tree):
    """The true boxes are written by the world and read by evaluate.py: no other file of code so much as names them."""
    if file in {"evaluate.py", "mini/world.py"}:
        return []
    return [f"line {node.lineno}: names truth.jsonl" for node in ast.walk(tree) if isinstance(node, ast.Constant)
            and "truth.jsonl" in str(node.value) and node not in docstrings(tree)]


RULES = {  # rule: a file that breaks it
    import_rule: ("train.py", "from prepare import main"),
    run_time_packages: ("train.py", "import wandb"),
    short_functions: ("train.py", "def f():\n" + "    a = 1\n" * 60),
    narrow_excepts: ("train.py", "try:\n    f()\nexcept (OSError, Exception):\n    g()"),
    no_globals: ("train.py", "def f():\n    global x\n    x = 1"),
    nothing_executed: ("train.py", "state = torch.load(path)"),
    no_module_level_work: ("train.py", "\"\"\"Text.\"\"\"\nprint(1)"),
    no_path_tricks: ("train.py", "import sys\nsys.path.insert(0, '.')"),
    flags_have_help: ("train.py", "parser.add_argument('--lr', type=float)"),
    truth_stays_shut: ("train.py", "f = open(root + '/truth.jsonl')"),
}
TESTS_TOO = (short_functions, narrow_excepts, no_globals, nothing_executed, no_path_tricks)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    complaints = [f"{file}: {complaint}" for file in CODE + (TESTS if rule in TESTS_TOO else [])
                  for complaint in rule(file, ast.parse((ROOT / file).read_text(encoding="utf-8")))]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_find_faults(rule):
    file, source = RULES[rule]
    assert len(rule(file, ast.parse(source))) == 1


@pytest.mark.parametrize("file, source, count", [
    ("rewards.py", "import scorer", 1),           # a leaf imports no leaf
    ("scorer.py", "def f():\n    import policy", 1),  # nor inside a function
    ("evaluate.py", "from rewards import metrics", 0),
    ("tools/rerank.py", "from tools import report", 0),
    ("tools/mine.py", "from prepare import nearest_entities", 0),
    ("evaluate.py", "from tools import stats", 1),
    ("mini/pretrain.py", "from . import world", 1),  # relative imports break `python mini/pretrain.py`
])
def test_import_rule_cases(file, source, count):
    assert len(import_rule(file, ast.parse(source))) == count


@pytest.mark.parametrize("source, count", [
    ("torch.load(path, weights_only=True)", 0), ("torch.load(path, weights_only=False)", 1), ("model.eval()", 0),
    ("AutoModel.from_pretrained(name, trust_remote_code=True)", 1), ("f(**{'trust_remote_code': True})", 1),
    ("np.load(path, allow_pickle=True)", 1), ("import pickle", 1), ("exec(text)", 1),
    ("os.system(text)", 1), ("subprocess.run(text, shell=True)", 1), ("subprocess.run([name, text])", 0),
])
def test_nothing_executed_cases(source, count):
    assert len(nothing_executed("scorer.py", ast.parse(source))) == count


# ------------------------------------------------------------------------------------------------------ whole files

@pytest.mark.parametrize("file", CODE)
def test_files_are_short_and_narrow(file):
    assert not (complaints := size(file, ast.parse(""))), complaints
    assert size("train.py", ["x" * 121]) and size("train.py", ["x"] * 1031)  # the rule does find them


def test_the_seven_are_all_there_is():
    """One file a stage or an idea. What only some users need is a small program in tools/."""
    assert {path.stem for path in ROOT.glob("*.py")} == LEAVES | STAGES
    assert sum(len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in LEAVES | STAGES) <= 4950


def test_no_grab_bags():
    bags = {"utils", "util", "common", "helpers", "misc", "config", "settings"}
    assert not [file for file in CODE + TESTS if Path(file).stem in bags]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_take_their_arguments(stage):
    """parse_args(argv=None) and main(argv=None): a stage can be called from Python with a list."""
    tree = ast.parse((ROOT / f"{stage}.py").read_text(encoding="utf-8"))
    functions = {node.name: ast.unparse(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions["parse_args"] == "argv=None" and functions["main"] == "argv=None"


def test_every_equation_has_its_tag():
    text = "\n".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in LEAVES | STAGES)
    # A tag is a comment on a line: "# Eq. 7", also "# Eq. 2, 4: ...".
    tagged = {int(n) for tag in re.findall(r"#.*?Eq\. *(\d+(?:(?:, *| and )(?:Eq\. *)?\d+)*)", text)
              for n in re.findall(r"\d+", tag)}
    assert set(range(1, 11)) <= tagged


def test_no_machine_paths():
    """Nothing refers to a folder of somebody's machine. Also in what is no Python."""
    machine = re.compile(r"(?<![\w.:/~-])/(?:home|root|work|tmp|mnt|opt|farm|Users)/\w")
    files = CODE + TESTS + ["Makefile", ".ci/run", "requirements.txt", "requirements-dev.txt"]
    files += ["README.md", "LOG.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
    lines = [(file, number, line) for file in files
             for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1)]
    found = [f"{file}:{number}: {line.strip()}" for file, number, line in lines if machine.search(line)]
    assert not found, "\n".join(found)
    assert machine.search("open('/ho" "me/me/data')")  # the pattern does find one


def test_stand_ins_are_small():
    weights = [path for name in ("policy", "scorer", "scorer2") for path in (ROOT / "mini" / name).rglob("*.safetensors")]
    assert len(weights) == 3, "mini/{policy,scorer,scorer2} ship one .safetensors each; `make mini` builds them"
    assert sum(path.stat().st_size for path in weights) <= 15e6  # bytes: what a clone should cost at most


# ----------------------------------------------------------------------------------------------- set-up by the Makefile

def requirements(name):
    """(package, version) of each line, environment markers left out."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [tuple(line.split(";")[0].strip().split("==")) for line in lines if line]


def test_requirements():
    """Every version is pinned, and nothing else is needed at run time (parity packages stay in the dev file)."""
    run, dev = requirements("requirements.txt"), requirements("requirements-dev.txt")
    assert all(len(line) == 2 and re.fullmatch(r"[\d.]+", line[1]) for line in run + dev)
    assert {name for name, _ in run} == {"torch", "torchvision", "transformers", "open_clip_torch", "faiss-cpu",
                                         "pillow", "numpy"}
    assert {name for name, _ in dev} == {"pytest", "pytest-xdist", "hypothesis", "peft", "matplotlib", "pytrec_eval-terrier",
                                         "pandas", "jinja2", "tensorboard", "dashscope"}


def make(*arguments):
    # Without what a surrounding `make test SEED=3` hands down: every variable here has its default.
    handed_down = re.compile("MAKE|MFLAGS|DATASET|ROOT|POLICY|SCORER|SEEDS?|READINGS|RUN|PRESET|PY|VENV|READY|"
                             r"\w+_FLAGS")
    env = {name: value for name, value in os.environ.items() if not handed_down.match(name)}
    return subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", *arguments], capture_output=True, text=True,
                          env=env)


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    assert {"data", "train", "eval", "test", "mini", "clean", "help"} <= set(phony)
    printed = make().stdout  # no target is `make help`
    assert [name for name in phony if f"make {name} " not in printed] == []
    assert "$" not in printed and "in runs/world/eval\n" in printed
    assert "in runs/mine/eval\n" in make("RUN=mine").stdout


@pytest.mark.parametrize("arguments, wanted", [
    ([], ["--preset mini", "--policy mini/policy", "--run runs/world", "--seed 0", "--dataset world --root raw/world"]),
    (["SEED=1"], ["--run runs/world-seed1", "--seed 1"]),
    (["POLICY=Qwen/Qwen2.5-VL-3B-Instruct", "SCORER=eva", "DATASET=evqa", "ROOT=disk/evqa", "RUN=mine"],
     ["--preset paper", "--scorer eva", "--data data/evqa", "--root disk/evqa", "--run runs/mine"]),
])
def test_make_passes_its_variables(arguments, wanted):
    # -n prints the commands and runs none, -B takes every file for old: the answer does not depend on what is built.
    printed = make("-n", "-B", "eval", *arguments).stdout
    assert [text for text in wanted if text not in printed] == []
    assert "--resume" not in printed or (ROOT / "runs").exists()
    assert printed.count("mini.world") == (0 if "DATASET=evqa" in arguments else 1)  # only the world can be drawn


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test", script.read_text(encoding="utf-8"), re.MULTILINE)
