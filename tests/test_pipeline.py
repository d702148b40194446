"""The whole pipeline as a newcomer runs it, with the shipped stand-ins at a tiny size, and what kills it.

A copy of the project lies in a temporary folder and `make data train eval` runs there, with this test's own Python
instead of a new environment. Then parts of it are killed with SIGKILL at chosen places, and run again.
"""

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
WORLD = "--entities 48 --train 24 --val 6 --test 12 --seed 0"  # a pool needs 20 entities; families have 6
TRAIN = "--steps 4 --queries 4 --save-every 1 --eval-every 2"  # four steps, resumable after each
ADAPTER = "runs/world/adapter/adapter_model.safetensors"

# Runs a stage like `python STAGE ...`, but SIGKILL falls right before the COUNT-th rename to a name with MATCH in it:
# the worst moment, when everything is written and nothing is in place. A timed kill would hit it once in a while.
KILLER = """
import os, runpy, signal, sys
match, count, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
rename, seen = os.replace, []
def replace(source, target, **keywords):
    seen.extend([target] if match in str(target) else [])
    if len(seen) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, **keywords)
os.replace = replace
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder, *command):
    """Run a command in a copy of the project; returns the finished process."""
    handed_down = re.compile("MAKE|MFLAGS|DATASET|ROOT|POLICY|SCORER|SEEDS?|READINGS|RUN|PRESET|PY|VENV|READY|"
                             r"\w+_FLAGS")
    env = {name: value for name, value in os.environ.items() if not handed_down.match(name)}
    # One thread: small matrices gain nothing from more, and equal bytes need an equal order of sums.
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(part) for part in command], cwd=folder, env=env, capture_output=True, text=True)


def make(folder, *targets):
    return run(folder, "make", f"PY={sys.executable}", "READY=", f"WORLD_FLAGS={WORLD} --workers 1",
               f"TRAIN_FLAGS={TRAIN}", *targets)


def stage(folder, name, *flags):
    """A stage by hand, with the flags that the Makefile gives it."""
    return run(folder, sys.executable, *command_line(name, *flags))


def killed(folder, match, count, name, *flags):
    """A stage by hand, killed right before the count-th rename to a name with `match` in it."""
    process = run(folder, sys.executable, "-c", KILLER, match, count, *command_line(name, *flags))
    assert process.returncode == -9, f"{name} was to be killed, but: {process.stdout[-500:]}{process.stderr[-2000:]}"


def command_line(name, *flags):
    prepare = ["--dataset", "world", "--root", "raw/world", "--scorer", "mini/scorer", "--out", "data/world"]
    train = ["--preset", "mini", "--data", "data/world", "--policy", "mini/policy", "--scorer", "mini/scorer",
             "--run", "runs/world", "--seed", "0", *TRAIN.split()]
    return [f"{name}.py", *{"prepare": prepare, "train": train}[name], *flags]


def ok(process):
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


def digests(folder, *names):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def pools(folder):
    """Names of all finished files of data/world (a killed run may also leave .tmp files)."""
    files = [path for path in (folder / "data/world").iterdir() if path.suffix != ".tmp"]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def copy(source, target, *parts):
    for part in parts:
        (shutil.copytree if (source / part).is_dir() else shutil.copy2)(source / part, target / part)
    return target


def untimed_log(folder):
    """log.jsonl without what differs between two equal runs: how long it took."""
    timed = re.compile("second|time|per_s|eta|memory", re.IGNORECASE)
    lines = [json.loads(line) for line in (folder / "runs/world/log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not timed.search(name)} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder where `make data train eval` has run; tests read it and change nothing. -> (folder, printed text)"""
    folder = tmp_path_factory.mktemp("whole")
    files = [path.name for path in ROOT.glob("*.py")] + ["Makefile", "mini", "tools", "requirements.txt"]
    copy(ROOT, folder, *files)
    return folder, ok(make(folder, "data", "train", "eval"))


@pytest.fixture
def fresh(whole, tmp_path):
    """A new folder with the code, the stand-ins and the raw data of `whole`, nothing prepared or trained."""
    source, _ = whole
    files = [path.name for path in source.glob("*.py")] + ["Makefile", "mini"]
    (tmp_path / "raw").mkdir()
    return copy(source, tmp_path, *files, "raw/world")


def test_make_data_train_eval(whole):
    folder, printed = whole
    for name in ("manifest.json", "kb.jsonl", "kb_image.npy", "kb_text.npy", "train.jsonl", "train_full.npy", "test.jsonl",
                 "test_pool.npy", "test_pool_image.npy", "test_labels.npy", "test_retrieval.npy", "test_full.npy"):
        assert (folder / "data/world" / name).stat().st_size > 0
    for name in ("config.json", "log.jsonl", "samples.jsonl", "state.pt", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors", "eval/test.policy.jsonl", "eval/test.policy.trec",
                 "eval/test.qrels", "eval/test.policy@scorer2.jsonl", "eval/test.policy+fuse.jsonl",
                 "eval/test.policy.quality.jsonl", "eval/retrieval/test.policy.jsonl"):
        assert (folder / "runs/world" / name).stat().st_size > 0
    assert not list(folder.rglob("*.tmp"))
    metrics = json.loads((folder / "runs/world/eval/metrics.json").read_text())
    assert list(metrics["methods"]) == ["full", "random", "center", "zeroshot", "zeroshot_always", "noun_rule",
                                        "clutter_rule", "base_best", "always", "policy", "learned_best", "truth",
                                        "oracle", "best16"]
    assert metrics["queries"] == 12 and metrics["K"] == 20
    # These hold for every world and every policy, however little it was trained.
    rows = metrics["methods"]
    assert rows["oracle"]["CondR@1"] >= rows["full"]["CondR@1"]
    assert {row["R@20"] for row in rows.values()} == {metrics["with_positive"] / 12}  # a pool's members never change
    assert rows["always"]["crop_rate"] == 1 and rows["full"]["crop_rate"] == 0 and rows["always"]["malformed"] == 0
    for words in ("Table 1", "Table 2", "Table 4", "Table 6", "Table 7", "Table 8", "among", "around", "the paper, E-VQA"):
        assert words in printed


def test_finished_stages_do_not_run_again(whole):
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert "Nothing to be done for 'eval'" in ok(make(folder, "data", "train", "eval"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    # A source file that changed does not throw a training run away.
    os.utime(folder / "policy.py")
    assert "Nothing to be done for 'train'" in ok(make(folder, "train"))


def test_killed_prepare(whole, fresh):
    """Killed when all but the manifest is in place: no later stage takes it for whole, and a second run repairs it."""
    killed(fresh, "manifest.json", 1, "prepare")
    assert not (fresh / "data/world/manifest.json").exists()
    refused = stage(fresh, "train")
    assert refused.returncode not in (0, -9) and "manifest.json" in refused.stderr and "prepare.py" in refused.stderr
    assert not (fresh / ADAPTER).exists()
    ok(make(fresh, "data"))
    source, _ = whole
    assert pools(fresh) == pools(source)
    assert digests(fresh, *pools(fresh)) == digests(source, *pools(source))


def test_killed_and_resumed_training_equals_an_unbroken_run(whole, fresh):
    source, _ = whole
    copy(source, fresh, "data")
    # Before the second state is in place: step 1 is saved, step 2 is done and lost.
    killed(fresh, "state.pt", 2, "train")
    assert (fresh / "runs/world/state.pt").exists()
    if (fresh / ADAPTER).exists():  # an adapter of a step that is saved may lie there, half a one may not
        load_file(fresh / ADAPTER)
    ok(make(fresh, "train"))  # the Makefile sees state.pt and resumes
    assert digests(fresh, ADAPTER) == digests(source, ADAPTER)
    assert untimed_log(fresh) == untimed_log(source)  # the lost step is logged once


def test_truth_does_not_leak_into_training(whole, fresh):
    """Without the true boxes on the disk the pools and the adapter come out bit for bit the same."""
    (fresh / "raw/world/truth.jsonl").unlink()
    printed = ok(make(fresh, "data", "train"))
    source, _ = whole
    assert digests(fresh, *pools(fresh)) == digests(source, *pools(source))
    assert digests(fresh, ADAPTER) == digests(source, ADAPTER)
    assert "truth" not in printed


def test_labels_and_test_entities_do_not_leak(whole):
    folder, _ = whole
    urls, images = {}, {}
    for split in ("train", "val", "test"):
        with open(folder / f"raw/world/{split}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        urls[split] = {row["wikipedia_url"] for row in rows}
        lines = [json.loads(line) for line in (folder / f"data/world/{split}.jsonl").read_text().splitlines()]
        images[split] = {line["image"] for line in lines}
        # A question names the category, never the entity: the name would be the label.
        assert not [row for row in rows if row["wikipedia_title"] in row["question"]]
    assert urls["train"] and urls["test"] and not urls["train"] & urls["test"]
    assert not images["train"] & images["test"]
    # And the pool files say the same: no entity is the positive of a training query and of a test query.
    entities = [json.loads(line)["entity_id"] for line in (folder / "data/world/kb.jsonl").read_text().splitlines()]
    arrays = {split: [np.load(folder / f"data/world/{split}_{name}.npy") for name in ("pool", "labels")] for split in urls}
    positives = {split: {entities[j] for j in pool[labels]} for split, (pool, labels) in arrays.items()}
    assert not positives["train"] & positives["test"]
    # What training saves to look at is about training (and, for its periodic evaluation, val) queries alone.
    samples = (folder / "runs/world/samples.jsonl").read_text()
    test_ids = [json.loads(line)["query_id"] for line in (folder / "data/world/test.jsonl").read_text().splitlines()]
    assert not [name for name in test_ids if f'"{name}"' in samples]


def test_the_readmes_figure_is_drawn_from_a_real_group(whole, tmp_path):
    pytest.importorskip("matplotlib")
    folder, _ = whole
    out = tmp_path / "deep" / "loop.png"
    printed = ok(run(folder, sys.executable, "-m", "tools.figure", "--split", "train", "--out", out))
    assert re.search(r"query \d+, E-VQA_train_", printed)
    with Image.open(out) as picture:
        assert picture.size[0] > 1200 and len(picture.convert("RGB").getcolors(256)) > 50
    bad = run(folder, sys.executable, "-m", "tools.figure", "--query", "999", "--out", tmp_path / "no.png")
    assert bad.returncode == 1 and "--query 999: a row from 0 to" in bad.stderr and not (tmp_path / "no.png").exists()


README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = (ROOT / "docs/files.md").read_text(encoding="utf-8")


def test_commands_of_the_readme_run(whole, tmp_path):
    """What the README asks for after `make data train eval`, in a copy of that folder."""
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    commands = ["python -m tools.rerank --query E-VQA_test_9",
                "python -m tools.rerank --batch runs/world/eval/test.full.trec --out out.jsonl",
                "python -m tools.merge --adapter runs/world/adapter --out merged"]
    for command in commands:
        assert command in README or "test.full.trec" in command
        ok(run(folder, *command.replace("python", sys.executable, 1).split()))
    assert len((folder / "out.jsonl").read_text().splitlines()) == 12 and (folder / "merged/config.json").exists()
    ok(make(folder, "ablations", "READINGS=default", "SEEDS=0"))
    ok(make(folder, "tables", "REPORT_FLAGS=--resamples 2000", "READINGS=default", "SEEDS=0"))
    assert "default" in (folder / "runs/world/report/table5.tex").read_text()
    ok(make(folder, "report", "card", "REPORT_FLAGS=--resamples 2000"))
    assert "Region-R1" in (folder / "runs/world/report/report.html").read_text()
    assert "base_model" in (folder / "runs/world/adapter/README.md").read_text()


def as_infoseek(raw, out):
    """The world's raw files as those of InfoSeek: EchoSight's csv files, oven_images/ and wiki_100_dict_v4.json."""
    (out / "oven_images").mkdir(parents=True)
    files = json.loads((raw / "inat/train_id2name.json").read_text()) | {
        f"v{key}": name for key, name in json.loads((raw / "inat/val_id2name.json").read_text()).items()}
    number = 0
    for name, splits in (("train", ("train", "val")), ("test", ("test",))):
        rows = []
        for split in splits:
            with open(raw / f"{split}.csv", newline="", encoding="utf-8") as file:
                rows += [(split, row) for row in csv.DictReader(file)]
        with open(out / f"infoseek_{name}_filtered.csv", "w", newline="", encoding="utf-8") as file:
            columns = ["question", "wikipedia_url", "data_id", "dataset_name", "dataset_image_ids", "question_type",
                       "answer", "wikipedia_title"]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            for split, row in rows:
                image = row["dataset_image_ids"].split("|")[0]
                if row["dataset_name"] == "landmarks":
                    source = raw / "landmarks" / "/".join(image[:3]) / f"{image}.jpg"
                else:
                    source = raw / "inat" / files[image if split == "train" else f"v{image}"]
                number += 1
                oven = f"oven_{number:08d}"
                shutil.copy2(source, out / f"oven_images/{oven}.jpg")
                writer.writerow({**row, "data_id": f"infoseek_{name}_{number:08d}", "dataset_name": "infoseek",
                                 "dataset_image_ids": oven, "question_type": "infoseek"})
    shutil.copy2(raw / "encyclopedic_kb_wiki.json", out / "wiki_100_dict_v4.json")
    shutil.copy2(raw / "url_to_path_mapping.json", out)
    for path in json.loads((raw / "url_to_path_mapping.json").read_text()).values():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(raw / path, out / path)


@pytest.mark.parametrize("dataset", ["evqa", "infoseek"])
def test_real_data_line_of_the_readme(whole, tmp_path, dataset):
    """The benchmarks' own files (of the world's pictures), models in folders of another name, the paper's preset."""
    assert "make data train eval DATASET=evqa ROOT=/data/evqa POLICY=Qwen/Qwen2.5-VL-3B-Instruct SCORER=" in README
    folder, root = tmp_path / "copy", tmp_path / "disk"
    folder.mkdir()
    copy(ROOT, folder, *[path.name for path in ROOT.glob("*.py")], "Makefile", "mini", "tools")
    raw = whole[0] / "raw/world"
    if dataset == "evqa":
        shutil.copytree(raw, root)
        (root / "truth.jsonl").unlink()  # real data has none
    else:
        as_infoseek(raw, root)
    shutil.copytree(ROOT / "mini/policy", tmp_path / "policy")
    shutil.copytree(ROOT / "mini/scorer", tmp_path / "scorer")
    line = ["make", f"PY={sys.executable}", "READY=", "data", "train", "eval", f"DATASET={dataset}", f"ROOT={root}",
            f"POLICY={tmp_path / 'policy'}", f"SCORER={tmp_path / 'scorer'}"]
    validation = "--eval-every 2 --val-queries 2"
    if dataset == "infoseek":  # val is one entity in a hundred, and there are 48
        refused = run(folder, *line)
        assert refused.returncode == 2 and "leave the split out with --splits (and train with" in refused.stderr
        validation = "--eval-every 0"
        line += ["PREPARE_FLAGS=--splits train,test"]
    printed = ok(run(folder, *line, f"TRAIN_FLAGS=--steps 2 --queries 2 --checkpointing {validation}"))
    assert f"test split of data/{dataset}: 12 queries" in printed
    config = json.loads((folder / f"runs/{dataset}/config.json").read_text())["args"]
    assert (config["targets"], config["dropout"], config["lr"], config["preset"]) == ("all", 0.1, 5e-5, "paper")
    manifest = json.loads((folder / f"data/{dataset}/manifest.json").read_text())
    assert manifest["dataset"] == dataset and manifest["splits"]["test"]["kept"] == 12
    metrics = json.loads((folder / f"runs/{dataset}/eval/metrics.json").read_text())
    assert {"full", "zeroshot", "policy", "always"} <= metrics["methods"].keys() and metrics["queries"] == 12


def test_commands_of_the_readme_on_files_of_ones_own(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    (folder / "FOLDER").mkdir()
    for name, entry in zip(("q.jpg", "FOLDER/a.jpg", "FOLDER/b.jpg"), sorted((folder / "raw").rglob("*.jpg"))):
        shutil.copy2(entry, folder / name)
    line = {"id": "a", "image": "q.jpg", "question": "Where is it?", "candidates": [{"image": "FOLDER/a.jpg"}]}
    (folder / "in.jsonl").write_text(json.dumps(line))
    for command in ('python -m tools.rerank --image q.jpg --question "Where does this beetle live?" --candidates FOLDER '
                    "--save-image box.png", "python -m tools.rerank --batch in.jsonl --out out.jsonl"):
        assert command in README
        ok(run(folder, *shlex.split(command.replace("python", sys.executable, 1))))
    assert (folder / "box.png").exists() and "score_before" in (folder / "out.jsonl").read_text()


def test_make_demo_answers(whole, tmp_path):
    """The page that `make demo` serves, from the shipped models, until Ctrl-C."""
    with open(tmp_path / "printed", "w+") as printed:
        process = subprocess.Popen(["make", f"PY={sys.executable}", "READY=", "DEMO_PORT=0", "demo"], cwd=whole[0],
                                   stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "printed").read_text())):
                assert process.poll() is None, (tmp_path / "printed").read_text()
                time.sleep(0.1)
            with urllib.request.urlopen(found[0]) as page:
                assert b"Region-R1" in page.read()
            asked = urllib.request.Request(f"{found[0]}/rerank", headers={"Content-Type": "application/json"},
                                           data=json.dumps({"example": 0, "question": "Where is it?"}).encode())
            with urllib.request.urlopen(asked) as answer:
                assert len(json.load(answer)["candidates"]) == 20
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()


def test_python_of_the_readme_runs(whole, tmp_path):
    """One after the other, as they stand, from an empty folder of the user's own; they make their own pictures."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    code = [[line for line in block.splitlines() if not re.match("from|import|$", line)] for block in blocks]
    assert [len(lines) <= 10 for lines in code] == [True, True]
    # From a file, as a user would: then Python looks in the file's folder first, and has PYTHONPATH for the rest.
    (tmp_path / "mine.py").write_text("\n".join(blocks))
    printed = ok(run(tmp_path, "env", f"PYTHONPATH={whole[0]}", sys.executable, "mine.py"))
    assert re.match(r"\[(0, 1|1, 0)\] \[", printed) and (tmp_path / "seen.png").exists()
    lines = [line.split() for line in (tmp_path / "second.trec").read_text().splitlines()]
    assert sorted(line[2] for line in lines) == ["beetle", "tower"] and lines[0][-1] == "region-r1"


def test_fields_of_the_log_are_documented(whole):
    first = re.findall(r"^\| (`.*?`) \|", FILES[FILES.index("Fields of `log.jsonl`"):], re.MULTILINE)
    explained = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    lines = [json.loads(line) for line in (whole[0] / "runs/world/log.jsonl").read_text().splitlines()]
    written = set().union(*lines)
    assert written == explained, f"not in docs/files.md: {written - explained}; there only: {explained - written}"


def test_files_are_documented(whole):
    """What a run leaves is what docs/files.md lists."""
    tree = FILES[FILES.index("```"):FILES.rindex("```")]
    for path in (path for top in ("data", "runs") for path in (whole[0] / top).rglob("*") if path.is_file()):
        name = re.sub(r"^(train|val|test)", "test", path.name)
        name = re.sub(r"^test\.[\w+]+(@[\w-]+)?\.", lambda found: "test.<method>" + "@<scorer>" * bool(found[1]) + ".", name)
        parent = path.relative_to(whole[0]).parent.as_posix()
        assert name in tree or name.endswith(".trec") or f"{parent}/ " in tree or path.name == "lock" \
            or "world.work" in parent or "retrieval" in parent, path
