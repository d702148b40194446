"""evaluate.py on a world small enough to work out by hand, with a scripted policy and a scorer that averages colours.

The four queries (images 64 x 64, left half red, right half blue; K = 4, every pool is [purple, red, blue, green]):

           positive  full image ranks          left half ranks    right half ranks   truth   policy says
    q0     red       purple, red, blue: rank 2 red first: rank 1  rank 3             left    REGION left, p .9
    q1     purple    rank 1                    rank 2             rank 2             left    FULL, p .1
    q2     none      5 = K + 1                 5                  5                  -       REGION left, p .8
    q3     blue      rank 3                    rank 3             rank 1             right   REGION left, p .6

A full image is half red, half blue: its mean colour is purple's, cosine 1; red and blue have .707 both and keep the
pool's order. A left half is red: red 1, purple .707, then blue before green with 0 both.
"""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
from PIL import Image

import evaluate
from policy import Action
from rewards import metrics
from scorer import POOL_VERSION, Query, load_data, write_array, write_json, write_pool
from scorer import crop as cut
from scorer import scores as cosine

LEFT, RIGHT, WHOLE = (0.0, 0.0, 32.0, 64.0), (32.0, 0.0, 64.0, 64.0), (0.0, 0.0, 64.0, 64.0)
COLOURS = [(255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 255, 0)]  # purple, red, blue, green
POSITIVE, SAYS = [1, 0, None, 2], [.9, .1, .8, .6]
TRUTH = {0: (LEFT, "species"), 1: (LEFT, "landmark"), 3: (RIGHT, "species")}
ALL = evaluate.METHODS


class ColourScorer:
    """Feature = mean colour, so every cosine can be worked out by hand. Counts what it encodes."""
    name, identity, dim, batch_size = "colours", "colours@1", 3, 64

    def __init__(self):
        self.encoded = 0

    def image_features(self, images):
        self.encoded += len(images)
        return np.array([np.asarray(image, np.float32).mean((0, 1)) for image in images], np.float32).reshape(-1, 3)


class ScriptedPolicy:
    """Says what the table above says; with the adapter off it always points left and never crops by itself (p .2)."""

    def __init__(self, p_region=SAYS, box=LEFT):
        self.p_region, self.box, self.learned, self.passes = p_region, box, True, 0

    @contextmanager
    def adapter(self, enabled):
        self.learned, before = enabled, self.learned
        yield
        self.learned = before

    def act(self, images, questions, decode="grammar", sample=False, force=None, batch_size=16, seed=0):
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
    write_pool(data / "test.jsonl", [
        Query(f"q{i}", f"q{i}.png", f"What is this, {i}", [0, 1, 2, 3], [0, 1, 2, 3],
              [int(k == POSITIVE[i]) for k in range(4)], [.9, .8, .7, .6],
              [f"https://w/entity {POSITIVE[i]}" if i != 2 else "https://w/elsewhere"]) for i in range(4)])
    with open(data / "kb.jsonl", "w", encoding="utf-8") as file:
        for k in range(4):
            entity = {"entity_id": f"https://w/entity {k}", "title": "", "text": "", "images": [f"e{k}.png"]}
            file.write(json.dumps(entity) + "\n")
    write_array(data / "test_full.npy", np.full((4, 3), (127.5, 0, 127.5), np.float16))
    write_array(data / "kb_image.npy", np.array(COLOURS, np.float16))
    write_array(data / "kb_text.npy", np.zeros((4, 3), np.float16))
    write_array(data / "kb_entity.npy", np.arange(4, dtype=np.int32))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in data.iterdir()}
    write_json(data / "manifest.json", {
        "version": POOL_VERSION, "dataset": "colours", "root": "../raw", "args": {}, "scorer": "colours@1",
        "scorer_name": "colours", "K": 4, "dim": 3, "files": files, "packages": {},
        "splits": {"test": {"rows_read": 4, "kept": 4, "dropped": {}, "with_positive": 3}},
        "kb": {"entries_read": 4, "kept": 4, "images": 4, "dropped": {}}})
    if truth:
        rows = [{"image": f"q{i}.png", "box": box, "kind": kind} for i, (box, kind) in TRUTH.items()]
        (raw / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    write_json(run / "config.json", {"args": {"decode": "grammar"}, "pools": load_data(str(data), "test").identity,
                                     "policy": "scripted", "scorer": "colours", "data": "data/colours"})
    return ["--data", str(data), "--run", str(run)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(arguments, the loaded models so far): evaluate.main runs on fakes."""
    loaded = SimpleNamespace(scorer=ColourScorer(), policy=ScriptedPolicy(), asked=[])
    monkeypatch.setattr(evaluate, "load_scorer", lambda name, device, dtype=None: loaded.scorer)

    def load_policy(name, adapter=None, **settings):
        loaded.asked.append((name, adapter))
        return loaded.policy

    monkeypatch.setattr(evaluate, "load_policy", load_policy)
    return build(tmp_path), loaded


def run_main(arguments, *more):
    evaluate.main([*arguments, *more])
    with open(f"{arguments[3]}/eval/metrics.json", encoding="utf-8") as file:
        return json.load(file)


def ranks(arguments, method):
    with open(f"{arguments[3]}/eval/test.{method}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["rank"] for line in file]


# --------------------------------------------------------------------------------------------------- the whole stage

def test_ranks_by_hand(world):
    arguments, _ = world
    run_main(arguments)
    assert ranks(arguments, "full") == [2, 1, 5, 3]
    assert ranks(arguments, "policy") == [1, 1, 5, 3]    # q0 fixed; q1 kept; q3 looked at the wrong half
    assert ranks(arguments, "always") == [1, 2, 5, 3]    # the same boxes also spoil q1
    assert ranks(arguments, "zeroshot") == [2, 1, 5, 3]  # never crops
    assert ranks(arguments, "oracle") == [1, 1, 5, 1]
    assert ranks(arguments, "center") == [2, 1, 5, 3]    # the middle is half red, half blue, as the whole


def test_numbers_by_hand(world):
    arguments, _ = world
    result = run_main(arguments)
    policy, always, full = (result["methods"][name] for name in ("policy", "always", "full"))
    assert full["CondR@1"] == pytest.approx(1 / 3) and full["R@1"] == pytest.approx(1 / 4)  # q2 has no positive
    assert full["MRR"] == pytest.approx((1 / 2 + 1 + 0 + 1 / 3) / 4)
    assert policy["CondR@1"] == pytest.approx(2 / 3)
    assert result["methods"]["oracle"]["CondR@1"] == 1
    assert result["gap_closed"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))  # one half
    assert policy["crop_rate"] == 3 / 4 and always["crop_rate"] == 1 and full["crop_rate"] == 0
    # Table 4, without q2. Rank 1: q1 alone, kept. Rank > 1: q0 helped, q3 cropped for nothing.
    assert policy["table4"]["rank=1"] == {"n": 1, "crop_rate": 0, "help": 0, "hurt": 0, "no_change": 1}
    assert policy["table4"]["rank>1"] == {"n": 2, "crop_rate": 1, "help": .5, "hurt": 0, "no_change": .5}
    assert always["table4"]["rank=1"]["hurt"] == 1
    # IoU of the cropped boxes that have a truth: q0 1, q3 (left for right) 0; always also q1 with 1.
    assert policy["mean_iou"] == 1 / 2 and always["mean_iou"] == pytest.approx(2 / 3) and full["mean_iou"] is None
    assert always["kinds"]["landmark"] == {"n": 1, "CondR@1": 0, "crop_rate": 1, "help": 0, "hurt": 1, "mean_iou": 1}
    assert policy["kinds"]["species"]["CondR@1"] == 1 / 2
    # The true box: fixes both species, spoils the landmark.
    kinds = result["truth_box"]["kinds"]
    assert kinds["species"]["help"] == 1 and kinds["landmark"]["hurt"] == 1


def test_rows_hold_what_report_needs(world):
    arguments, _ = world
    run_main(arguments)
    with open(f"{arguments[3]}/eval/test.policy.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert list(rows[0]) == ["query_id", "question", "image", "kind", "positives", "decision", "box", "p_region",
                             "text", "scores", "labels", "rank", "full_rank", "margin", "full_margin", "iou",
                             "containment", "judge", "seconds", "encodes", "unreadable"]
    assert [row["decision"] for row in rows] == ["REGION", "FULL", "REGION", "REGION"]
    assert rows[0]["box"] == list(LEFT) and rows[1]["box"] is None
    assert [row["p_region"] for row in rows] == SAYS  # exact for FULL as well, though REGION was forced to learn it
    assert [row["full_rank"] for row in rows] == [2, 1, 5, 3]
    again = metrics([row["scores"] for row in rows], [row["labels"] for row in rows])  # the rows give the ranks back
    assert again["rank"].tolist() == [row["rank"] for row in rows]


def test_everything_is_computed_once(world):
    """policy and always share a decoding pass, equal views an embedding, and FULL none at all."""
    arguments, loaded = world
    run_main(arguments, "--methods", "full,zeroshot,policy,always,oracle")
    assert loaded.policy.passes == 4 + 4  # base model, learned policy
    assert loaded.scorer.encoded == 4 + 1  # always left (also policy's and most true boxes), and q3's true box, right
    loaded.scorer.encoded = 0
    run_main(arguments, "--methods", "full")
    assert loaded.scorer.encoded == 0


def test_report_shows_all_tables(world, capsys):
    arguments, _ = world
    run_main(arguments)
    printed = capsys.readouterr().out
    for words in ("Table 1", "Table 2", "Table 4", "Table 7", "by kind", "species, n = 2", "the paper, E-VQA",
                  "the paper, InfoSeek", "4 queries, 3 of them with a positive", "gap closed in CondR@1: 50%"):
        assert words in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.startswith(ALL)}
    assert set(ALL) <= set(lines)
    policy = next(line.split() for line in printed.splitlines() if line.startswith("policy"))
    # MRR (1 + 1 + 0 + 1/3) / 4, R@1 in per cent as in the paper, CondR@1 as a share.
    assert policy[1] == "0.583" and policy[3] == "50.0" and policy[8] == "0.667"


def test_same_numbers_twice_and_for_every_batch_size(world):
    arguments, _ = world
    def rows():
        with open(f"{arguments[3]}/eval/test.random.jsonl", encoding="utf-8") as file:
            return [{**json.loads(line), "seconds": None} for line in file]  # seconds are measured, all else computed

    once = run_main(arguments)
    before = rows()
    assert run_main(arguments, "--batch-size", "3") == once
    assert rows() == before
    assert run_main(arguments, "--limit", "2")["queries"] == 2


def test_contact_sheet(world):
    arguments, _ = world
    run_main(arguments, "--sheet", "3")
    with Image.open(f"{arguments[3]}/eval/test.sheet.png") as sheet:
        assert sheet.size == (5 * 156, 20 + 3 * 186)
        colours = {sheet.getpixel((c * 156 + 75, 20 + 32 + 75)) for c in range(1, 5)}
    # First row is q0, the one that a crop fixed: its crop is red, first before purple, first after and positive red.
    assert colours == {(255, 0, 0), (255, 0, 255)}


def test_trec_files_agree_with_trec_eval(world):
    """trec_eval's own code, on our files, gives our numbers: also with ties, which it would break by name."""
    arguments, _ = world
    result = run_main(arguments)
    with open(f"{arguments[3]}/eval/test.qrels") as file:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(file), {"recip_rank", "ndcg"})
    for name in ALL:
        with open(f"{arguments[3]}/eval/test.{name}.trec") as file:
            found = evaluator.evaluate(pytrec_eval.parse_run(file))
        assert len(found) == 4
        for ours, theirs in (("MRR", "recip_rank"), ("NDCG", "ndcg")):
            assert np.mean([row[theirs] for row in found.values()]) == pytest.approx(result["methods"][name][ours])


# ------------------------------------------------------------------------------------------------------------ refusals

def test_malformed_falls_back_to_full_and_is_counted(world):
    arguments, loaded = world
    loaded.policy.p_region = [None, .1, .8, None]
    result = run_main(arguments, "--decode", "free", "--methods", "full,policy")
    assert ranks(arguments, "policy") == ranks(arguments, "full")
    assert result["methods"]["policy"]["malformed"] == 2 and result["methods"]["policy"]["crop_rate"] == 1 / 4
    with open(f"{arguments[3]}/eval/test.policy.jsonl", encoding="utf-8") as file:
        assert json.loads(file.readline())["decision"] == "MALFORMED"  # counted, not renamed FULL


def test_run_of_other_data_is_refused(world):
    arguments, _ = world
    path = f"{arguments[1]}/manifest.json"
    with open(path, encoding="utf-8") as file:
        manifest = json.load(file)
    write_json(path, {**manifest, "args": {"batch_size": 7}, "packages": {}})  # the same pools, made in another way
    evaluate.main(arguments)
    write_json(path, {**manifest, "files": {**manifest["files"], "test.jsonl": {
        "bytes": manifest["files"]["test.jsonl"]["bytes"], "sha256": "another"}}})
    with pytest.raises(SystemExit, match="trained on data/colours .* evaluate on the data of the run"):
        evaluate.main(arguments)


def test_run_without_adapter(world, tmp_path):
    arguments, loaded = world
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="adapter_model.safetensors is missing.*random, always, policy need.*train.py"):
        evaluate.main(arguments)
    run_main(arguments, "--methods", "full,center,zeroshot")  # needs none
    assert loaded.asked == [("scripted", None)]


def test_run_folder_is_not_needed_without_a_policy(world, tmp_path):
    arguments, loaded = world
    assert run_main([*arguments[:3], str(tmp_path / "none")], "--methods", "full,center,oracle")["queries"] == 4
    assert loaded.asked == []
    with pytest.raises(SystemExit, match="names a policy: give --policy"):
        evaluate.main([*arguments[:3], str(tmp_path / "none"), "--methods", "zeroshot"])


def test_pools_of_another_scorer_are_refused(world):
    arguments, loaded = world
    loaded.scorer.identity = "grey@2"
    with pytest.raises(SystemExit, match="colours@1.*grey@2"):
        evaluate.main(arguments)


def test_no_truth_no_oracle(tmp_path, monkeypatch, capsys):
    arguments = build(tmp_path, truth=False)
    monkeypatch.setattr(evaluate, "load_scorer", lambda name, device, dtype=None: ColourScorer())
    monkeypatch.setattr(evaluate, "load_policy", lambda *_, **__: ScriptedPolicy())
    result = run_main(arguments)
    assert list(result["methods"]) == [name for name in ALL if name != "oracle"] and result["gap_closed"] is None
    assert "no oracle row" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="oracle needs truth.jsonl"):
        evaluate.main([*arguments, "--methods", "oracle"])


def test_broken_truth_names_the_line(world, tmp_path):
    arguments, _ = world
    with open(tmp_path / "raw" / "truth.jsonl", "a", encoding="utf-8") as file:
        file.write('{"image": "q2.png", "box": [1, 2, 3]}\n')
    with pytest.raises(SystemExit, match="truth.jsonl:4: needs image, kind"):
        evaluate.main(arguments)


@pytest.mark.parametrize("wrong", [["--methods", "policy,magic"], ["--center-fraction", "0"], ["--batch-size", "0"],
                                   ["--limit", "-1"]])
def test_wrong_flags(wrong):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(wrong)
    assert error.value.code == 2


def test_metrics_come_last(world, monkeypatch):
    """A run that dies while writing leaves no metrics.json, not even the one of the run before it."""
    arguments, _ = world
    run_main(arguments)
    monkeypatch.setattr(evaluate, "contact_sheet", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run_main(arguments)
    with pytest.raises(FileNotFoundError):
        open(f"{arguments[3]}/eval/metrics.json")


# -------------------------------------------------------------------------------------------------------------- pieces

def test_score_actions_against_the_plain_way(tmp_path):
    """Batches, shared views and skipped encodes against a loop that does everything for every query and method."""
    data, scorer = load_data(build(tmp_path)[1], "test"), ColourScorer()
    rng = np.random.default_rng(0)

    def draw():
        x, y = np.sort(rng.integers(0, 65, (2, 2)), axis=1) + (0, 1)
        return [Action("FULL", None, None, ""), Action("MALFORMED", None, None, ""),
                Action("REGION", (float(x[0]), float(y[0]), float(min(x[1], 65)), float(min(y[1], 65))), None, ""),
                Action("REGION", LEFT, None, "")][rng.integers(4)]

    actions = {name: [draw() for _ in range(4)] for name in "abcdef"}
    found = evaluate.score_actions(data, scorer, actions, batch_size=3)
    for name, listed in actions.items():
        for i, action in enumerate(listed):
            view = data.full[i]
            if action.decision == "REGION":
                view = scorer.image_features([cut(data.open_image(i), action.box)])[0]
            np.testing.assert_allclose(found[name][i], cosine(np.float32(view), data.candidates(i)), atol=1e-6)


def test_oracle_takes_rank_then_margin():
    labels = np.array([[1, 0, 0]] * 4 + [[0, 0, 0]])
    full = np.array([[.5, .6, .1], [.6, .5, .1], [.6, .5, .1], [.6, .5, .1], [.3, .2, .1]])
    truth = np.array([[.6, .5, .1],   # rank 2 -> 1: better
                      [.5, .6, .1],   # rank 1 -> 2: worse
                      [.9, .5, .1],   # rank 1 both, margin .1 -> .4: better
                      [.6, .5, .2],   # the same: the full image stays
                      [.9, .2, .1]])  # no positive: nothing can be better
    actions = {"truth": [evaluate.region(LEFT)] * 5}
    chosen, scores = evaluate.oracle_of(full, truth, actions, labels)
    assert [a.decision for a in chosen] == ["REGION", "FULL", "REGION", "FULL", "FULL"]
    np.testing.assert_array_equal(scores, np.where([[True], [False], [True], [False], [False]], truth, full))


def test_random_boxes_follow_the_policy_s_sizes():
    shapes, sizes = [(.5, .25), (.1, .8)], [(200, 100), (64, 64)] * 100
    boxes = evaluate.random_boxes(sizes, shapes, seed=0)
    found = [((x2 - x1) / w, (y2 - y1) / h) for (x1, y1, x2, y2), (w, h) in zip(boxes, sizes)]
    # Only pairs that the policy made: (.5, .8), of a width and a height drawn apart, never comes.
    assert {(round(a, 6), round(b, 6)) for a, b in found} == set(shapes)
    assert all(0 <= b[0] and 0 <= b[1] and b[2] <= w + 1e-9 and b[3] <= h + 1e-9 for b, (w, h) in zip(boxes, sizes))
    assert np.std([b[0] for b in boxes]) > 10  # random places
    assert evaluate.random_boxes(sizes[:7], shapes, seed=0) == boxes[:7]  # a query's box hangs on its row alone
    assert evaluate.random_boxes(sizes, shapes, seed=1) != boxes


def test_box_shapes_are_those_of_the_policy_s_crops():
    actions = [evaluate.region(LEFT), evaluate.FULL_IMAGE, evaluate.region((10.0, 20.0, 30.0, 30.0))]
    assert evaluate.box_shapes(actions, [(64, 64), (64, 64), (100, 50)]) == [(.5, 1.0), (.2, .2)]


def test_random_of_a_policy_that_never_crops(world, capsys):
    """A policy that has gone all-FULL still gets its row; the note says what was drawn from instead."""
    arguments, loaded = world
    loaded.policy.p_region = [.1] * 4
    assert run_main(arguments, "--methods", "random,policy")["methods"]["random"]["crop_rate"] == 1
    assert "the policy crops no query" in capsys.readouterr().out


def test_center_box():
    assert evaluate.center_box((200, 100), .5) == (50, 25, 150, 75)
    assert evaluate.center_box((64, 64), 1) == WHOLE


@pytest.mark.parametrize("a, b, value", [
    (LEFT, LEFT, 1), (LEFT, RIGHT, 0),                # sharing an edge only: exclusive on the right
    ((0, 0, 4, 4), (2, 0, 6, 4), 8 / (16 + 16 - 8)),  # 2 x 4 in common
    ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16),
])
def test_iou(a, b, value):
    assert evaluate.iou(a, b) == pytest.approx(value)


def test_greedy_threshold():
    forced = [Action("REGION", LEFT, p, "") for p in (.2, .5, .51)]
    assert [evaluate.greedy(action).decision for action in forced] == ["FULL", "FULL", "REGION"]
    assert evaluate.greedy(forced[0]).p_region == .2 and evaluate.greedy(forced[0]).box is None


def test_gap_closed_needs_a_gap():
    table = {name: {"CondR@1": value} for name, value in (("full", .4), ("policy", .7), ("oracle", .9))}
    assert evaluate.gap_closed(table) == pytest.approx(.3 / .5)
    assert evaluate.gap_closed({**table, "oracle": table["full"]}) is None
    assert evaluate.gap_closed({"full": table["full"], "policy": table["policy"]}) is None


def test_pick_shows_successes_and_failures():
    crop, keep = evaluate.region(LEFT), evaluate.FULL_IMAGE
    #           fixed (6)                        harmed (2)               stayed wrong (3)      right all along (4)
    rank = np.array([1] * 6 + [2] * 2 + [4] * 3 + [1] * 4)
    full = np.array([3] * 6 + [1] * 2 + [4] * 3 + [1] * 4)
    actions = [crop] * 8 + [crop, keep, keep] + [keep] * 4
    chosen = evaluate.pick(actions, rank, full, rank < 5, 8)
    assert len(chosen) == len(set(chosen)) == 8
    assert sum(i < 6 for i in chosen) == 4 and {6, 7} <= set(chosen) and sum(8 <= i < 11 for i in chosen) == 2
    assert sorted(evaluate.pick(actions, rank, full, rank < 5, 40)) == list(range(15))  # no more than there are


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
    found = evaluate.decode_actions(policy, data, ["zeroshot", "policy", "always"], batch_size=4)
    plain = policy.act(images, [query.question for query in data.queries], batch_size=6)
    assert [a.decision for a in found["policy"]] == [a.decision for a in plain]
    assert [a.box for a in found["policy"]] == [a.box for a in plain]
    assert [a.p_region for a in found["policy"]] == pytest.approx([a.p_region for a in plain], abs=1e-5)
    assert all(a.decision == "REGION" for a in found["always"])
    # An adapter with B = 0 is the identity, so the base model says the same.
    assert [a.box for a in found["zeroshot"]] == [a.box for a in found["policy"]]
