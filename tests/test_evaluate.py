"""evaluate.py on a world small enough to work out by hand, with a scripted policy and a scorer that averages colours.

The four queries (images 64 x 64, left half red, right half blue; K = 4, every pool is [purple, red, blue, green]):

           positive  full image ranks          left half ranks    right half ranks   truth   policy says
    q0     red       purple, red, blue: rank 2 red first: rank 1  rank 3             left    REGION left, p .9
    q1     purple    rank 1                    rank 2             rank 2             left    FULL, p .1
    q2     none      5 = K + 1                 5                  5                  -       REGION left, p .8
    q3     blue      rank 3                    rank 3             rank 1             right   REGION left, p .6

A full image is half red, half blue: its mean colour is purple's, cosine 1; red and blue have .707 both and keep the
pool's order. A left half is red: red 1, purple .707, then blue before green with 0 both. Val has two queries, v0 like
q0 (a beetle among 3 things) and v1 like q1 (a tower alone). The base model always points left: of beetles that pays
(1 - 1/2), of towers it does not (1/2 - 1). The boxes that the policy draws are all left, but for the fourth.
"""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from policy import Action
from rewards import metrics
from scorer import InputError, Query, load_data, read_json, write_array, write_json, write_split
from scorer import crop as cut
from scorer import scores as cosine

LEFT, RIGHT, WHOLE = (0.0, 0.0, 32.0, 64.0), (32.0, 0.0, 64.0, 64.0), (0.0, 0.0, 64.0, 64.0)
COLOURS = [(255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 255, 0)]  # purple, red, blue, green
POSITIVE, SAYS = [1, 0, None, 2], [.9, .1, .8, .6]
TRUTH = {0: (LEFT, "species", "beetle", 3), 1: (LEFT, "landmark", "tower", 1), 3: (RIGHT, "species", "beetle", 1)}
ALL = evaluate.METHODS
FIELDS = ["query_id", "question", "image", "kind", "positives", "decision", "box", "p_region", "text", "scores",
          "labels", "rank", "full_rank", "margin", "full_margin", "iou", "seconds", "encodes", "unreadable"]


class ColourScorer:
    """Feature = mean colour, so every cosine can be worked out by hand. Counts what it encodes."""
    name, dtype, dim, batch_size = "colours", torch.float32, 3, 64

    def __init__(self):
        self.encoded = 0

    def fingerprint(self):
        return np.array([1, 0, 0], np.float32)

    def image_features(self, images):
        self.encoded += len(images)
        return np.array([np.asarray(image, np.float32).mean((0, 1)) for image in images], np.float32).reshape(-1, 3)


class ScriptedPolicy:
    """Says what the table above says; with the adapter off it always points left and never crops by itself (p .2).
    Counts its answers and batches, and dies at batch `dies_at`."""

    def __init__(self, p_region=SAYS, box=LEFT):
        self.p_region, self.box, self.learned, self.max_new_tokens = p_region, box, True, 256
        self.passes, self.batches, self.drawn, self.drawn_box, self.dies_at = 0, 0, 0, RIGHT, None
        self.asked = set()  # (learned, decode, force)

    @contextmanager
    def adapter(self, enabled):
        self.learned, before = enabled, self.learned
        yield
        self.learned = before

    def act(self, images, questions, decode="grammar", sample=False, force=None, batch_size=16, seed=0):
        self.batches += 1
        if self.batches == self.dies_at:
            raise KeyboardInterrupt
        self.asked.add((self.learned, decode, force))
        assert all(image.size == (64, 64) for image in images)
        self.passes += len(images)
        actions = []
        for question in questions:
            p = self.p_region[int(question[-1])] if self.learned else .2
            if p is None:
                actions.append(Action("MALFORMED", None, None, "a box, perhaps"))
            else:
                region = force == "REGION" or force is None and p > .5
                actions.append(Action("REGION", self.box, p, "") if region else Action("FULL", None, p, ""))
        return actions

    def prompts(self, images, questions):
        return questions

    def rollout(self, prompts, plans, decode, seeds):
        assert plans == [["REGION"] * 16] * len(prompts) and self.learned
        self.drawn += len(prompts)
        boxes = [self.drawn_box if n == 3 else self.box for n in range(16)]
        return [[SimpleNamespace(action=Action("REGION", box, .5, "")) for box in boxes] for _ in prompts]


def build(tmp_path, truth=True):
    """raw/, data/ and a run as the stages write them; returns the arguments for evaluate.main."""
    raw, data, run = (tmp_path / name for name in ("raw", "data", "run"))
    for folder in (raw, data, run / "adapter"):
        folder.mkdir(parents=True)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = COLOURS[1], COLOURS[2]
    for i in range(4):
        Image.fromarray(picture).save(raw / f"q{i}.png")
        Image.new("RGB", (8, 8), COLOURS[i]).save(raw / f"e{i}.png")
        Image.fromarray(picture).save(raw / f"v{i}.png")
    pool, labels = np.tile(np.arange(4), (4, 1)), [[k == positive for k in range(4)] for positive in POSITIVE]
    write_split(data, "test", [
        Query(f"q{i}", f"q{i}.png", f"What is this, {i}",
              [f"https://w/entity {POSITIVE[i]}" if i != 2 else "https://w/elsewhere"]) for i in range(4)],
        pool=pool, pool_image=pool, labels=labels, retrieval=np.tile([.9, .8, .7, .6], (4, 1)),
        full=np.full((4, 3), (127.5, 0, 127.5)))
    write_split(data, "val", [Query(f"v{i}", f"v{i}.png", f"What is this, {i}", [f"https://w/entity {1 - i}"])
                              for i in range(2)], pool=pool[:2], pool_image=pool[:2], labels=labels[:2],
                retrieval=np.tile([.9, .8, .7, .6], (2, 1)), full=np.full((2, 3), (127.5, 0, 127.5)))
    with open(data / "kb.jsonl", "w", encoding="utf-8") as file:
        for k in range(4):
            entity = {"entity_id": f"https://w/entity {k}", "title": "", "text": "", "images": [f"e{k}.png"]}
            file.write(json.dumps(entity) + "\n")
    write_array(data / "kb_image.npy", np.array(COLOURS, np.float16))
    write_array(data / "kb_text.npy", np.zeros((4, 3), np.float16))
    write_array(data / "kb_entity.npy", np.arange(4, dtype=np.int32))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in data.iterdir()}
    write_json(data / "manifest.json", {
        "version": 2, "dataset": "world", "root": "../raw", "args": {}, "K": 4, "dim": 3, "files": files,
        "scorer": {"name": "colours", "dtype": "float32", "fingerprint": [1, 0, 0]}, "packages": {},
        "splits": {"test": {"rows_read": 4, "kept": 4, "dropped": {}, "with_positive": 3},
                   "val": {"rows_read": 2, "kept": 2, "dropped": {}, "with_positive": 2}},
        "kb": {"entries_read": 4, "kept": 4, "images": 4, "dropped": {}}})
    if truth:
        rows = [{"image": image, "box": box, "kind": kind, "category": category, "things": things}
                for i, (box, kind, category, things) in TRUTH.items() for image in (f"q{i}.png", f"v{i}.png")]
        (raw / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    pools = load_data(str(data), "test").identity
    write_json(run / "config.json", {"args": {"decode": "grammar", "seed": 5}, "data": "data/colours", "pools": pools,
                                     "policy": "scripted", "scorer": "colours"})
    return ["--data", str(data), "--run", str(run)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(arguments, what was loaded): evaluate.main runs on fakes, on two policies by name."""
    loaded = SimpleNamespace(scorer=ColourScorer(), policy=ScriptedPolicy(), asked=[], dtypes=[])
    policies = {"scripted": loaded.policy, "another": ScriptedPolicy(p_region=[.2, .9, .2, .2], box=RIGHT)}

    def load_policy(name, adapter=None, dtype=None, **settings):
        loaded.asked.append((name, adapter))
        loaded.dtypes.append(dtype)
        return policies[name]

    def load_scorer(name, device, dtype=None):
        loaded.dtypes.append(dtype)
        return loaded.scorer

    monkeypatch.setattr(evaluate, "load_scorer", load_scorer)
    monkeypatch.setattr(evaluate, "load_policy", load_policy)
    return build(tmp_path), loaded


def run_main(arguments, *more):
    evaluate.main([*arguments, *more])
    return read_json(f"{arguments[3]}/eval/metrics.json", "")


def rows_of(arguments, method, folder="eval"):
    lines = Path(f"{arguments[3]}/{folder}/test.{method}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ranks(arguments, method):
    return [row["rank"] for row in rows_of(arguments, method)]


def without_seconds(rows):  # seconds are measured, all else is computed
    return [{**row, "seconds": None} for row in rows]


def refused(arguments, *more):
    with pytest.raises(SystemExit) as error:
        evaluate.main([*arguments, *more])
    assert str(error.value).startswith("evaluate.py: ")
    return str(error.value)


# --------------------------------------------------------------------------------------------------- the whole stage

def test_ranks_rows_and_numbers_by_hand(world):
    arguments, _ = world
    result = run_main(arguments)
    wanted = {"full": [2, 1, 5, 3], "policy": [1, 1, 5, 3],  # q0 fixed; q1 kept; q3 looked at the wrong half
              "always": [1, 2, 5, 3], "zeroshot_always": [1, 2, 5, 3],  # the same boxes also spoil q1
              "zeroshot": [2, 1, 5, 3], "oracle": [1, 1, 5, 1], "truth": [1, 2, 5, 1],  # q2 has no true box
              "base_best": [1, 1, 5, 3], "learned_best": [1, 1, 5, 3],  # left boxes help q0 alone
              "noun_rule": [1, 1, 5, 3], "clutter_rule": [1, 1, 5, 3], "best16": [1, 1, 5, 1],
              "center": [2, 1, 5, 3]}  # the middle is half red, half blue, as the whole
    assert {name: ranks(arguments, name) for name in wanted} == wanted
    assert rows_of(arguments, "center")[0]["box"] == [16, 16, 48, 48]
    policy, always, full = (result["methods"][name] for name in ("policy", "always", "full"))
    assert full["CondR@1"] == pytest.approx(1 / 3) and full["R@1"] == pytest.approx(1 / 4)  # q2 has no positive
    assert full["MRR"] == pytest.approx((1 / 2 + 1 + 0 + 1 / 3) / 4)
    assert policy["CondR@1"] == pytest.approx(2 / 3)
    assert result["methods"]["oracle"]["CondR@1"] == 1
    # Beetles are cropped, so q3 as well, where it is of no use; of the numbers of things only 3, that is q0. Where a box
    # changes nothing the full image is the best decision.
    assert result["rules"] == {"noun_rule": ["beetle"], "clutter_rule": [3]} and result["rules_from"] == "val"
    for name, cropped in {"noun_rule": "0 3", "clutter_rule": "0", "base_best": "0", "best16": "0 3"}.items():
        assert [i for i, row in enumerate(rows_of(arguments, name)) if row["box"]] == list(map(int, cropped.split()))
    assert [rows_of(arguments, "best16")[i]["box"] for i in (0, 3)] == [list(LEFT), list(RIGHT)]
    # (2/3 - 1/3) / (1 - 1/3) is a half; the true box on every query fixes q0 and q3 and spoils q1.
    gaps = {name: row["gap_closed"] for name, row in result["methods"].items() if name not in ("random", "center")}
    assert gaps == pytest.approx({
        "full": 0, "zeroshot": 0, "zeroshot_always": 0, "noun_rule": .5, "clutter_rule": .5, "base_best": .5, "always": 0,
        "policy": .5, "learned_best": .5, "truth": .5, "oracle": 1, "best16": 1})
    # Of q0, q1, q3: in q2, without a positive, nothing can be right or wrong. oracle and policy are told apart by it.
    assert policy["crop_rate"] == 2 / 3 and always["crop_rate"] == 1 and full["crop_rate"] == 0
    assert result["methods"]["oracle"]["crop_rate"] == 2 / 3 and result["methods"]["base_best"]["crop_rate"] == 1 / 3
    # Table 4, without q2. Rank 1: q1 alone, kept. Rank > 1: q0 helped, q3 cropped for nothing.
    assert policy["table4"]["rank=1"] == {"n": 1, "crop_rate": 0, "help": 0, "hurt": 0, "no_change": 1}
    assert policy["table4"]["rank>1"] == {"n": 2, "crop_rate": 1, "help": .5, "hurt": 0, "no_change": .5}
    assert always["table4"]["rank=1"]["hurt"] == 1
    # IoU on q0 and q3 for every row, cropped or not: left is right for q0 (1) and wrong for q3 (0).
    assert {name: row["mean_iou"] for name, row in result["methods"].items() if name != "random"} == {
        "full": None, "center": pytest.approx(512 / (1024 + 2048 - 512)), **dict.fromkeys((
            "zeroshot", "zeroshot_always", "noun_rule", "clutter_rule", "base_best", "always", "policy",
            "learned_best"), 1 / 2), "truth": 1, "oracle": 1, "best16": 1}
    assert (result["K"], result["queries"], result["with_positive"]) == (4, 4, 3)
    assert (result["seed"], result["training_seed"], result["decode"]) == (0, 5, "grammar")
    assert result["adapter_sha256"] == hashlib.sha256(b"").hexdigest()  # of build's file

    rows = rows_of(arguments, "policy")
    q0, q1, q2, _ = rows
    assert list(q0) == FIELDS
    assert [row["decision"] for row in rows] == ["REGION", "FULL", "REGION", "REGION"]
    assert q0["box"] == list(LEFT) and q1["box"] is None and q1["text"] == '{"Decision": "FULL"}'
    assert [row["p_region"] for row in rows] == SAYS  # exact for FULL as well, though REGION was forced to learn it
    assert [row["full_rank"] for row in rows] == [2, 1, 5, 3]
    assert [row["labels"] for row in rows] == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert [row["iou"] for row in rows] == [1, 1, None, 0]  # of q1 it would have taken the left, as asked
    assert q0["margin"] == pytest.approx(1 - 2**-.5, abs=1e-3)        # red 1, purple .7071
    assert q0["full_margin"] == pytest.approx(2**-.5 - 1, abs=1e-3)   # the other way round
    assert q2["margin"] is None and q2["positives"] == ["https://w/elsewhere"] and q2["kind"] is None
    assert (q0["kind"], q0["encodes"], q1["encodes"], q0["unreadable"]) == ("species", 1, 0, False)
    again = metrics([row["scores"] for row in rows], [row["labels"] for row in rows])  # the rows give the ranks back
    assert again["rank"].tolist() == [row["rank"] for row in rows]


def test_seconds_are_of_deciding_and_of_the_view(world, monkeypatch):
    """A clock that jumps by a second at each look: a pass of four takes 1/4 each, the batch of 2 different boxes
    (q0..q3 left; q3's truth right: 5 views) 1/5 each."""
    arguments, _ = world
    ticks = iter(range(1000))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(ticks))
    run_main(arguments, "--methods", "policy,truth")
    q0, q1, *_ = rows_of(arguments, "policy")
    # Views: left of q0, q2, q3 (policy), left of q1 and right of q3 (truth): 5.
    assert q0["seconds"] == pytest.approx(1 / 4 + 1 / 5) and q1["seconds"] == pytest.approx(1 / 4)
    assert rows_of(arguments, "full")[0]["seconds"] is None
    assert rows_of(arguments, "truth")[1]["seconds"] == pytest.approx(1 / 5)


def test_everything_is_computed_once(world):
    """policy and always share a decoding pass, equal views an embedding, and FULL none at all."""
    arguments, loaded = world
    run_main(arguments, "--methods", "full,zeroshot,policy,always,oracle")
    assert loaded.policy.passes == 4 + 4  # base model, learned policy
    assert loaded.scorer.encoded == 4 + 1  # always left (also policy's and most true boxes), and q3's true box, right
    loaded.scorer.encoded = 0
    run_main(arguments, "--methods", "full")
    assert loaded.scorer.encoded == 0


def test_printed_tables(world, capsys):
    arguments, _ = world
    run_main(arguments)
    lines = capsys.readouterr().out.splitlines()
    for words in ("4 queries, 3 of them with a positive", "noun_rule crops where category is one of: beetle",
                  "gap %: how much of the way from full, CondR@1 0.333, to the ceiling best16, 1.000", "wrote to"):
        assert any(words in line for line in lines)
    found = {line.split()[0]: line.split() for line in reversed(lines) if line.startswith(ALL)}  # its first line
    assert set(ALL) <= set(found)
    # MRR (1 + 1 + 0 + 1/3) / 4, NDCG (1 + 1 + 0 + 1/2) / 4, R@1 and CondR@1 both as shares.
    assert found["policy"] == [
        "policy", *"0.583 0.625 0.500 0.750 0.750 0.750 | 0.667 1.000 1.000 | 66.7 0 0.50 50.0".split()]
    assert found["full"][-4:] == ["0.0", "0", "-", "0.0"]
    # The layout, digit by digit: whoever reads these tables by a program may go by columns.
    for line in (
            f"{'':16}{'Table 1: all queries':^48} |{'Table 2: with a positive':^28} |{'what it did':^33}",
            "method               MRR    NDCG     R@1     R@5    R@10    R@20 |  CondR@1  CondR@5 CondR@10  |"
            "  crop % bad text    IoU  gap %",
            "policy              0.47    0.48   0.447   0.482   0.499   0.508 |     0.90     0.95     0.98  |",
            "policy              0.71    0.73   0.665   0.782   0.802   0.817 |     0.81     0.96     0.98  |",
            f"Table 4         {'original rank=1, n = 1':^44}{'original rank>1, n = 2':^44}",
            "policy                  0.0        0.0        0.0      100.0      100.0       50.0        0.0       50.0"
    ):
        assert line in lines


def test_same_numbers_twice_and_for_every_batch_size(world):
    arguments, _ = world
    once = run_main(arguments)
    before = without_seconds(rows_of(arguments, "random"))
    assert run_main(arguments, "--batch-size", "3") == once
    assert without_seconds(rows_of(arguments, "random")) == before
    assert run_main(arguments, "--seed", "1") != once
    assert run_main(arguments, "--limit", "2")["queries"] == 2
    assert run_main(arguments, "--limit", "1")["with_positive"] == 1


def test_metrics_come_last(world, monkeypatch):
    """A run that dies while writing leaves no metrics.json, not even the one of the run before it; and no answer that a
    model gave is asked for again."""
    arguments, loaded = world
    whole = run_main(arguments)
    write, passes = evaluate.write_rows, loaded.policy.passes
    monkeypatch.setattr(evaluate, "write_rows", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):  # no matter of input: it keeps its traceback
        run_main(arguments)
    assert not Path(f"{arguments[3]}/eval/metrics.json").exists() and loaded.policy.passes == 2 * passes
    monkeypatch.setattr(evaluate, "write_rows", write)
    assert run_main(arguments) == whole and loaded.policy.passes == 2 * passes
    assert not list(Path(f"{arguments[3]}/eval").glob("*.part"))


def test_folders_of_ones_own(world, tmp_path, monkeypatch):
    arguments, loaded = world
    best = (tmp_path / "run" / "adapter").rename(tmp_path / "run" / "adapter_best")
    evaluate.main([*arguments, "--out", str(tmp_path / "elsewhere"), "--methods", "policy", "--adapter", str(best)])
    assert (tmp_path / "elsewhere" / "metrics.json").exists() and not (tmp_path / "run" / "eval").exists()
    assert loaded.asked == [("scripted", str(best))]
    monkeypatch.chdir(tmp_path)
    for spelt in ("{}/", "./{}", "{}//"):  # one name for one run
        evaluate.main(["--data", spelt.format("data"), "--run", spelt.format("run"), "--methods", "full"])
        result = read_json(tmp_path / "run" / "eval" / "metrics.json", "")
        assert (result["run"], result["data"]) == ("run", "data")
    assert evaluate.parse_args(["--run", "a/../b/"]).run == "a/../b"  # a may be a link


# ---------------------------------------------------------------------------------------------- methods and refusals

def test_malformed_falls_back_to_full_and_is_counted(world):
    arguments, loaded = world
    loaded.policy.p_region = [None, .1, .8, None]
    result = run_main(arguments, "--decode", "free", "--methods", "full,policy,always")
    assert ranks(arguments, "policy") == ranks(arguments, "full")
    assert result["methods"]["policy"]["malformed"] == 2
    assert result["methods"]["policy"]["crop_rate"] == 0  # q2 alone, whose pool has no positive
    first = rows_of(arguments, "policy")[0]
    assert first["decision"] == "MALFORMED" and first["text"] == "a box, perhaps"  # counted, not renamed FULL
    assert loaded.policy.passes == 4 + 4  # in free text a decision is a pass of its own
    assert "--threshold needs p(REGION" in refused(arguments, "--decode", "free", "--threshold", ".3")


def test_decoding_and_dtypes_are_those_of_run_and_data(world, tmp_path):
    arguments, loaded = world
    config = read_json(tmp_path / "run" / "config.json", "")
    write_json(tmp_path / "run" / "config.json", {**config, "args": {
        "decode": "free", "policy_dtype": "bfloat16", "max_new_tokens": 7}})
    result = run_main(arguments, "--methods", "policy")
    assert (result["decode"], result["policy_dtype"], loaded.dtypes) == ("free", "bfloat16", ["float32", "bfloat16"])
    assert loaded.policy.max_new_tokens == 7
    result = run_main(arguments, "--methods", "policy", "--policy-dtype", "float32", "--decode", "grammar")
    assert (result["decode"], result["policy_dtype"], loaded.dtypes[2:]) == ("grammar", "float32", ["float32"] * 2)


def test_threshold_is_the_learned_policys_alone(world):
    arguments, _ = world
    result = run_main(arguments, "--threshold", ".8", "--methods", "policy,zeroshot")
    # .8 > .8 is false.
    assert [row["decision"] for row in rows_of(arguments, "policy")] == ["REGION", "FULL", "FULL", "FULL"]
    assert result["threshold"] == .8
    run_main(arguments, "--threshold", ".05", "--methods", "policy,zeroshot,always")
    assert [row["decision"] for row in rows_of(arguments, "policy")] == ["REGION"] * 4
    assert [row["decision"] for row in rows_of(arguments, "zeroshot")] == ["FULL"] * 4  # p .2: a baseline stays greedy


def test_second_base_model(world, capsys):
    arguments, loaded = world
    result = run_main(arguments, "--zeroshot-policy", "another")
    # The other model is asked without an adapter, and the base model once more: on val, for the rules.
    assert loaded.asked == [("scripted", f"{arguments[3]}/adapter"), ("another", None), ("scripted", None)]
    assert ranks(arguments, "zeroshot2") == [2, 2, 5, 3]  # crops q1 alone, to its right half, wrongly
    assert list(result["methods"])[4:6] == ["zeroshot_always", "zeroshot2"]
    assert result["models"]["zeroshot2"] == "another" and "zeroshot2 is another" in capsys.readouterr().out


@pytest.mark.parametrize("dataset, flags, decode", [
    ("world", [], "grammar"), ("world", ["--decode", "free"], "free"), ("world", ["--zeroshot", "free"], "free"),
    ("evqa", [], "free"), ("evqa", ["--zeroshot", "grammar"], "grammar")])
def test_zeroshot_is_free_text_on_real_data(world, tmp_path, dataset, flags, decode):
    """As in the paper: the base model writes what it likes, while its forced boxes and the learned policy keep to the
    run's grammar."""
    arguments, loaded = world
    write_json(tmp_path / "data" / "manifest.json", {**read_json(tmp_path / "data" / "manifest.json", ""),
                                                     "dataset": dataset})
    result = run_main(arguments, "--methods", "zeroshot,zeroshot_always", *flags)
    rest = "free" if "--decode" in flags else "grammar"
    assert result["zeroshot"] == decode and result["decode"] == rest
    assert loaded.policy.asked == {(False, decode, "REGION" if decode == "grammar" else None), (False, rest, "REGION")}


def test_run_of_other_data_is_refused(world):
    arguments, _ = world
    path = f"{arguments[1]}/manifest.json"
    manifest = read_json(path, "")
    write_json(path, {**manifest, "args": {"batch_size": 7}, "packages": {}})  # the same pools, made in another way
    evaluate.main(arguments)
    manifest["files"]["test.jsonl"]["sha256"] = "another"
    write_json(path, manifest)
    assert "trained on data/colours" in refused(arguments)


def test_run_without_adapter_or_config(world, tmp_path):
    arguments, loaded = world
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    assert "safetensors is missing, and random, always, policy, learned_best, best16 need the trained policy" in refused(
        arguments)
    run_main(arguments, "--methods", "full,center,zeroshot")  # needs none
    assert loaded.asked == [("scripted", None)]
    nowhere = [*arguments[:3], str(tmp_path / "none")]
    assert run_main(nowhere, "--methods", "full,center,oracle")["queries"] == 4 and len(loaded.asked) == 1
    assert "names a policy: give --policy" in refused(nowhere, "--methods", "zeroshot")
    assert run_main(nowhere, "--methods", "zeroshot", "--policy", "scripted")["models"]["policy"] == "scripted"


def test_damaged_config_unknown_policy_other_scorer(world, tmp_path, monkeypatch):
    arguments, loaded = world
    whole = (tmp_path / "run" / "config.json").read_text()
    for content, message in (("{cut", "put it back"), ("[1]", "put it back"),
                             ('{"policy": "x"}', "trained on None (pools None)")):
        (tmp_path / "run" / "config.json").write_text(content)
        assert message in refused(arguments)
    (tmp_path / "run" / "config.json").write_text(whole)
    monkeypatch.setattr(evaluate, "load_policy", lambda *_, **__: (_ for _ in ()).throw(ValueError("no such model")))
    assert "no such model" in refused(arguments)
    asked = ScriptedPolicy()
    monkeypatch.setattr(asked, "act", lambda *_, **__: (_ for _ in ()).throw(ValueError("question 0 contains <|im_end|>")))
    monkeypatch.setattr(evaluate, "load_policy", lambda *_, **__: asked)
    assert "test.jsonl: question 0 contains <|im_end|>; counted from 0 in queries ['q" in refused(arguments)
    loaded.scorer.fingerprint = lambda: np.array([0, 1, 0], np.float32)
    assert "was prepared with scorer colours" in refused(arguments)


def test_truth_that_is_missing_shared_or_damaged(world, tmp_path, capsys):
    arguments, loaded = world
    data, path = load_data(arguments[1], "test"), tmp_path / "raw" / "truth.jsonl"
    data.queries = [data.queries[0], SimpleNamespace(image="q0.png"), SimpleNamespace(image="q9.png")]
    assert evaluate.read_truth(data) == {
        i: {"image": "q0.png", "box": LEFT, "kind": "species", "category": "beetle", "things": 3} for i in (0, 1)}
    whole = path.read_text()
    for line in ("{cut", "[1]", '{"image": "q2.png", "box": [1, 2, 3], "kind": "x"}',
                 '{"image": "q0.png", "box": 7, "kind": "x"}', '{"image": "q0.png", "box": [1, 2, 3, 4]}',
                 '{"image": "q0.png", "box": [1, 2, "a", 4], "kind": "x"}', '{"box": [1, 2, 3, 4], "kind": "x"}',
                 '{"image": "q0.png", "box": [5, 5, 5, 9], "kind": "x"}',
                 '{"image": "q0.png", "box": [0, 5, 5, 5], "kind": "x"}',
                 '{"image": "q0.png", "box": [0, 0, Infinity, 9], "kind": "x"}'):
        path.write_text(whole + line + "\n")
        assert "truth.jsonl:7: needs image, kind and a box" in refused(arguments)
    path.unlink()
    result = run_main(arguments)
    needy = ("noun_rule", "clutter_rule", "truth", "oracle")
    assert list(result["methods"]) == [name for name in ALL if name not in needy] and result["rules"] == {}
    # The ceiling of real data, without a true box: q3 is the one query whose positive is not first by now.
    assert result["methods"]["best16"]["CondR@1"] == 1 and loaded.policy.drawn == 1
    assert rows_of(arguments, "best16")[3]["box"] == list(RIGHT)
    assert "no rows of truth, oracle, noun_rule, clutter_rule, no IoU" in capsys.readouterr().out
    for name in needy:
        assert f"{name}: needs truth.jsonl" in refused(arguments, "--methods", f"policy,{name}")


@pytest.mark.parametrize("lost", ["category", "things", "val"])
def test_rules_need_a_field_and_a_split_to_be_fitted_on(world, tmp_path, capsys, lost):
    arguments, _ = world
    path, manifest = tmp_path / "raw" / "truth.jsonl", tmp_path / "data" / "manifest.json"
    path.write_text(path.read_text().replace(f'"{lost}"', '"else"'))
    content = read_json(manifest, "")
    write_json(manifest, {**content, "splits": {name: split for name, split in content["splits"].items()
                                                if name != lost}})
    found = run_main(arguments)["methods"].keys()
    gone = {"category": {"noun_rule"}, "things": {"clutter_rule"}, "val": {"noun_rule", "clutter_rule"}}[lost]
    assert set(ALL) - found == gone and f"no rows of {', '.join(sorted(gone, reverse=True))}:" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [
    ["--methods", "policy,magic"], ["--center-fraction", "0"], ["--center-fraction", "1.1"], ["--batch-size", "0"],
    ["--limit", "-1"], ["--threshold", "1.1"], ["--methods", "zeroshot2"]])
def test_wrong_flags(wrong):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(wrong)
    assert error.value.code == 2


def test_second_evaluation_of_a_folder_is_refused(world, tmp_path, monkeypatch):
    """While the first decides, another asks for the same folder; the first goes on unharmed. A lock is of an open file
    and not of a process, so one process can play both."""
    arguments, loaded = world
    act, messages = loaded.policy.act, []

    def interrupted(*a, **settings):
        messages.append(refused(arguments, "--methods", "full"))
        evaluate.main([*arguments, "--methods", "full", "--out", str(tmp_path / "else")])  # another folder is free
        return act(*a, **settings)

    monkeypatch.setattr(loaded.policy, "act", interrupted)
    assert run_main(arguments, "--methods", "policy")["queries"] == 4
    assert len(messages) == 1 and "in use" in messages[0]
    monkeypatch.setattr(loaded.policy, "act", act)
    monkeypatch.setattr(loaded.policy, "dies_at", loaded.policy.batches + 1)
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--methods", "policy")
    run_main(arguments, "--methods", "policy")  # free again, also after a death


# ------------------------------------------------------------------------------------------------- resuming, images

def test_goes_on_after_a_kill(world, tmp_path):
    arguments, loaded = world
    whole = run_main(arguments, "--batch-size", "1")
    rows = {name: without_seconds(rows_of(arguments, name)) for name in whole["methods"]}
    policy, part = loaded.policy, tmp_path / "run" / "eval" / "test.actions.part"
    policy.batches, policy.passes, policy.dies_at = 0, 0, 6  # two passes a batch: the third batch is cut short
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--batch-size", "1")
    lines = part.read_text().splitlines()
    assert len(lines) == 1 + 5
    # The kill came in the middle of a line, and an earlier one was damaged on the disk: the base pass of q0.
    part.write_text("\n".join([lines[0], lines[1][:9], *lines[2:], '["learned fo']))
    policy.dies_at = policy.batches + 3
    with pytest.raises(KeyboardInterrupt):  # and another one, after both passes of q0
        run_main(arguments, "--batch-size", "1")
    policy.dies_at = None
    again = run_main(arguments, "--batch-size", "1")
    assert policy.passes == 5 + 2 + 4 + 2  # and val's two; then q2 and q3 by both passes; q1 never again
    assert again == whole and {name: without_seconds(rows_of(arguments, name)) for name in rows} == rows
    assert not part.exists()
    answers = evaluate.Answers(part, {})  # a kill -9 closes nothing in order: what is added is in the file at once
    answers.add({("base", 3): [1, None]})
    assert evaluate.Answers(part, {}) == {("base", 3): [1, None]} and answers.file


@pytest.mark.parametrize("change", ["adapter", "config", "--policy-dtype", "--decode", "--zeroshot-policy", "--policy"])
def test_answers_of_another_model_are_not_taken(world, tmp_path, capsys, change):
    arguments, loaded = world
    more = {"--policy-dtype": "bfloat16", "--decode": "free", "--zeroshot-policy": "another", "--policy": "another"}
    loaded.policy.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--batch-size", "2", "--methods", "policy")
    loaded.policy.dies_at = None
    if change == "adapter":
        (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"trained further")
    if change == "config":
        config = read_json(tmp_path / "run" / "config.json", "")
        write_json(tmp_path / "run" / "config.json", {**config, "system_prompt": "another"})
    run_main(arguments, "--batch-size", "2", "--methods", "policy", *((change, more[change]) if change in more else ()))
    assert loaded.policy.passes == 2 + {"--policy": 0, "--decode": 8}.get(change, 4) and "begun anew" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_unreadable_image_keeps_its_row(world, tmp_path, how, capsys):
    arguments, loaded = world
    run_main(arguments)
    before = {name: without_seconds(rows_of(arguments, name)) for name in ("policy", "always", "center", "oracle")}
    image = tmp_path / "raw" / "q0.png"
    image.unlink() if how == "missing" else image.write_bytes(image.read_bytes()[:90])
    capsys.readouterr()
    assert run_main(arguments)["unreadable"] == {"count": 1, "first": ["q0"]}
    printed = capsys.readouterr().out
    assert "1 query images cannot be read and count as FULL: q0" in printed
    assert "note: query q0 counts as FULL" in printed
    full = rows_of(arguments, "full")[0]
    for name, rows in before.items():
        first, *others = without_seconds(rows_of(arguments, name))
        assert first["unreadable"] and first["decision"] == "FULL" and first["box"] is None and first["encodes"] == 0
        assert first["query_id"] == "q0" and first["scores"] == full["scores"]
        assert others == rows[1:]  # nothing shifted
    for i in range(1, 4):
        (tmp_path / "raw" / f"q{i}.png").unlink()
    assert "no query image of the split can be read" in refused(arguments)


# -------------------------------------------------------------------------------------------------------------- pieces

@pytest.mark.parametrize("share", [1.0, 0.25])
def test_views_against_the_plain_way(tmp_path, share):
    """Batches, shared views and skipped encodes against a loop that does everything for every query and method."""
    data, scorer, rng = load_data(build(tmp_path)[1], "test"), ColourScorer(), np.random.default_rng(0)
    data.full = rng.random((4, 3), np.float32)  # no two full images alike

    def draw():
        x, y = np.sort(rng.integers(0, 64, (2, 2)), axis=1) + (0, 1)
        return [Action("FULL", None, None, ""), Action("MALFORMED", None, None, ""),
                Action("REGION", (float(x[0]), float(y[0]), float(x[1]), float(y[1])), None, ""),
                Action("REGION", LEFT, None, "")][rng.integers(4)]

    actions = {name: [draw() for _ in range(4)] for name in "abcdef"}
    seen, seconds = evaluate.score_views(data, scorer, actions, batch_size=3, share=share)
    views = {(i, a.box) for listed in actions.values() for i, a in enumerate(listed) if a.decision == "REGION"}
    assert seconds.keys() == views and scorer.encoded == len(views)
    for listed in actions.values():
        for i, (action, found) in enumerate(zip(listed, evaluate.view_scores(listed, seen), strict=True)):
            view = data.full[i]
            if action.decision == "REGION":
                part = scorer.image_features([cut(data.open_image(i), action.box)])[0]
                view = (1 - share) * view / np.linalg.norm(view) + share * part / np.linalg.norm(part)
            np.testing.assert_allclose(found, cosine(np.float32(view), data.candidates(i)), atol=1e-6)


def test_best_takes_the_rank_and_the_first_of_equals():
    labels = np.array([[1, 0, 0]] * 4 + [[0, 0, 0]])
    full = np.array([[.5, .6, .1], [.6, .5, .1], [.6, .5, .1], [.5, .6, .7], [.3, .2, .1]])
    left = np.array([[.6, .5, .1],   # rank 2 -> 1: better
                     [.5, .6, .1],   # rank 1 -> 2: worse
                     [.9, .5, .1],   # rank 1 both: the full image stays, though the margin grows
                     [.5, .6, .1],   # rank 3 -> 2, and the other box 1: the best of three
                     [.9, .2, .1]])  # no positive: nothing can be better
    right = np.array([[.7, .5, .1], *[[.6, .5, .1]] * 4])
    seen = {(i, box): row for box, listed in ((None, full), (LEFT, left), (RIGHT, right))
            for i, row in enumerate(listed)}
    lists = [[evaluate.FULL_IMAGE] * 5, *([evaluate.region(box)] * 5 for box in (LEFT, RIGHT))]
    assert [a.box for a in evaluate.best_of(lists, seen, labels)] == [LEFT, None, None, RIGHT, None]
    assert [a.box for a in evaluate.best_of(lists[:2], seen, labels)] == [LEFT, None, None, LEFT, None]


def test_random_boxes_follow_the_policys_sizes():
    sizes = [(200, 100), (64, 64)] * 100
    actions = [evaluate.region((20.0, 0.0, 120.0, 25.0)), evaluate.region((0.0, 1.6, 6.4, 52.8))]
    actions += [evaluate.FULL_IMAGE] * 198
    boxes = evaluate.random_boxes(sizes, actions, seed=0)
    found = [((x2 - x1) / w, (y2 - y1) / h) for (x1, y1, x2, y2), (w, h) in zip(boxes, sizes)]
    # Only pairs that the policy made: (.5, .8), of a width and a height drawn apart, never comes.
    assert {(round(a, 6), round(b, 6)) for a, b in found} == {(.5, .25), (.1, .8)}
    assert all(0 <= b[0] and 0 <= b[1] and b[2] <= w + 1e-9 and b[3] <= h + 1e-9 for b, (w, h) in zip(boxes, sizes))
    wide = [box[0] for box, shape, size in zip(boxes, found, sizes) if size == (200, 100) and shape[0] > .3]
    assert np.std(wide) > 20 and max(wide) > 80 and min(wide) < 20  # anywhere: left edges from 0 to 100
    assert evaluate.random_boxes(sizes[:7], actions, seed=0) == boxes[:7]  # a query's box hangs on its row alone
    assert evaluate.random_boxes([None, *sizes], [evaluate.FULL_IMAGE, *actions], seed=0)[0] is None
    assert evaluate.random_boxes(sizes, actions, seed=1) != boxes
    with pytest.raises(InputError, match="no readable box"):
        evaluate.random_boxes(sizes, [evaluate.FULL_IMAGE] * 200, 0)


def test_random_takes_the_policys_boxes_or_its_forced_ones(world, capsys, monkeypatch):
    """A policy that has gone all-FULL still gets its row; the note says what was drawn from instead."""
    arguments, loaded = world
    drawn, given = evaluate.random_boxes, []
    monkeypatch.setattr(evaluate, "random_boxes", lambda *a: given.append(a) or drawn(*a))
    run_main(arguments, "--methods", "random", "--seed", "3")
    assert [action.decision for action in given[0][1]] == ["REGION", "FULL", "REGION", "REGION"] and given[0][2] == 3
    loaded.policy.p_region = [.1] * 4
    assert run_main(arguments, "--methods", "random")["methods"]["random"]["crop_rate"] == 1
    assert "the policy crops no query" in capsys.readouterr().out


@pytest.mark.parametrize("a, b, value", [
    (LEFT, LEFT, 1), (LEFT, RIGHT, 0),                # sharing an edge only: exclusive on the right
    ((0, 0, 4, 4), (2, 0, 6, 4), 8 / (16 + 16 - 8)),  # 2 x 4 in common
    ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16), ((0, 0, 1, 1), (3, 3, 4, 4), 0),
])
def test_iou(a, b, value):
    assert evaluate.iou(a, b) == pytest.approx(value)


def test_gap_closed_needs_a_gap(world, tmp_path):
    """Boxes that are all the whole image: the ceiling is the full image, and there is no gap to close."""
    arguments, loaded = world
    loaded.policy.box = loaded.policy.drawn_box = WHOLE
    facts = [{"image": f"q{i}.png", "box": WHOLE, "kind": "x"} for i in range(4)]
    (tmp_path / "raw" / "truth.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    result = run_main(arguments, "--center-fraction", "1")
    assert {row["gap_closed"] for row in result["methods"].values()} == {None}
    assert rows_of(arguments, "center")[0]["box"] == [*WHOLE]
    assert run_main(arguments, "--methods", "oracle")["methods"]["oracle"]["gap_closed"] is None


def test_scores_in_rows_are_the_scores():
    """What a row's file gives back is the float32 that was ranked, so no tie is made or broken on the way."""
    found = np.random.default_rng(0).normal(size=(1, 4000)).astype(np.float32)
    found[0, 1] = np.nextafter(found[0, 0], np.float32(9))  # the smallest difference there is
    row = evaluate.rankings(np.eye(1, 4000), found, found)[0]
    assert np.float32(json.loads(json.dumps(row["scores"]))).tolist() == found[0].tolist()


def test_one_forced_pass_equals_asking_freely(tmp_path):
    """With the real Policy class: REGION forced and p(REGION | x) read gives what greedy decoding gives by itself."""
    import tiny_policy
    from policy import load_policy
    policy = load_policy(tiny_policy.build(tmp_path / "tiny"))
    policy.add_lora(r=2, dropout=0.0)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)) for _ in range(6)]
    data = SimpleNamespace(queries=[SimpleNamespace(question=f"What is this, {i}?") for i in range(6)],
                           open_image=lambda i: images[i])
    args = SimpleNamespace(decode="grammar", zeroshot="grammar", batch_size=4, threshold=.5)
    answers = evaluate.Answers(str(tmp_path / "part"), {})
    found = evaluate.model_actions(policy, ["zeroshot", "policy", "always"], data, [(80, 60)] * 6, args, answers)
    plain = policy.act(images, [query.question for query in data.queries], batch_size=6)
    assert [a.decision for a in found["policy"]] == [a.decision for a in plain]
    assert [a.box for a in found["policy"]] == [a.box for a in plain]
    assert [a.p_region for a in found["policy"]] == pytest.approx([a.p_region for a in plain], abs=1e-5)
    assert all(a.decision == "REGION" for a in found["always"])
    # An adapter with B = 0 is the identity, so the base model says the same.
    assert [a.box for a in found["zeroshot"]] == [a.box for a in found["policy"]]
