"""tools/rerank.py with a scorer that averages colours and a scripted policy, so every score can be worked out by hand.

A query image is 64 x 64, left half red, right half blue; its mean colour is purple's. Candidates are single colours:

                purple   red    blue   green
    full image   1       .707   .707   0      equal scores keep the order given: purple, red, blue, green
    left half    .707    1      0      0      red, purple, blue, green
    right half   .707    0      1      0      blue, purple, red, green

The digit that ends a question says what the policy answers: see SAYS.
"""

import base64
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from policy import Action, load_policy
from scorer import POOL_VERSION, Query, crop, fuse, load_scorer, read_image, scores, write_array, write_json, write_pool
from tools import rerank as tool

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["purple", "red", "blue", "green"]
COLOURS = dict(zip(NAMES, [(255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 255, 0)]))
LEFT, RIGHT, HALF = (0.0, 0.0, 32.0, 64.0), (32.0, 0.0, 64.0, 64.0), 2 ** -.5
SAYS = {0: (LEFT, .9), 1: (RIGHT, .6), 2: (LEFT, .1), 3: None}  # box, p(REGION); None: text that cannot be read


class ColourScorer:
    """Feature of an image = its mean colour, of a text = the colour it names. Counts what it encodes."""
    name, identity, dim, batch_size = "colours", "colours@1", 3, 3

    def __init__(self):
        self.images, self.texts = 0, 0

    def image_features(self, images):
        self.images += len(images)
        return np.array([np.asarray(image, np.float32).mean((0, 1)) for image in images], np.float32).reshape(-1, 3)

    def text_features(self, texts):
        self.texts += len(texts)
        return np.array([COLOURS[text] for text in texts], np.float32)


class ScriptedPolicy:
    def __init__(self):
        self.asked = []

    def act(self, images, questions, decode="grammar", sample=False, force=None, batch_size=16, seed=0):
        self.asked.append((len(images), decode, force))
        actions = []
        for question in questions:
            if "<|" in question:
                raise ValueError(f"question 0 contains the special token: {question!r}")
            said = SAYS[int(question[-1])]
            if said is None:
                actions.append(Action("MALFORMED", None, None, "a box, perhaps"))
            elif force == "REGION" or (force is None and said[1] > .5):
                actions.append(Action("REGION", said[0], said[1], "box"))
            else:
                actions.append(Action("FULL", None, said[1], "full"))
        return actions


def two_halves():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = COLOURS["red"], COLOURS["blue"]
    return Image.fromarray(picture)


def squares(names=NAMES):
    return [(Image.new("RGB", (8, 8), COLOURS[name]), "") for name in names]


def ranked(question, **how):
    """Ranking of the four colours by name, and the Reranking."""
    found = tool.rerank(two_halves(), question, squares(), ScriptedPolicy(), ColourScorer(), **how)
    return [NAMES[k] for k in found.ranking], found


# ------------------------------------------------------------------------------------------------------- the function

@pytest.mark.parametrize("question, order, after, size", [
    ("0", ["red", "purple", "blue", "green"], [HALF, 1, 0, 0], (32, 64)),
    ("1", ["blue", "purple", "red", "green"], [HALF, 0, 1, 0], (32, 64)),
    ("2", NAMES, [1, HALF, HALF, 0], (64, 64)),  # p .1: FULL
    ("3", NAMES, [1, HALF, HALF, 0], (64, 64)),  # unreadable: scored as the full image
])
def test_rerank_by_hand(question, order, after, size):
    names, found = ranked(question)
    assert names == order
    # The mean colour of the whole is (127.5, 0, 127.5): its cosine with red (1, 0, 0) is 127.5 / (127.5 sqrt 2).
    np.testing.assert_allclose(found.before, [1, HALF, HALF, 0], atol=1e-6)
    np.testing.assert_allclose(found.after, after, atol=1e-6)
    assert found.view.size == size and found.size == (64, 64)
    assert found.action.decision == {"2": "FULL", "3": "MALFORMED"}.get(question, "REGION")


@pytest.mark.parametrize("question, threshold, decision", [
    ("0", .89, "REGION"), ("0", .9, "FULL"),  # p .9 is not above .9
    ("2", .05, "REGION"), ("2", .1, "FULL"), ("1", None, "REGION"), ("1", .6, "FULL"), ("1", .0, "REGION")])
def test_threshold(question, threshold, decision):
    _, found = ranked(question, threshold=threshold)
    assert found.action.decision == decision
    assert found.action.p_region == SAYS[int(question)][1]  # whichever way it went
    assert (found.view.size == (32, 64)) == (decision == "REGION")


def test_threshold_needs_an_exact_probability():
    with pytest.raises(ValueError, match="grammar"):
        ranked("0", decode="free", threshold=.5)


def test_force_wins_over_policy_and_threshold():
    assert ranked("0", force="FULL", threshold=.1)[1].action.decision == "FULL"
    assert ranked("2", force="REGION", threshold=.9)[0] == ["red", "purple", "blue", "green"]


def test_candidates_can_be_features():
    """Vectors of any length: only the direction counts, and no candidate is encoded."""
    scorer, features = ColourScorer(), np.array([COLOURS[name] for name in NAMES], np.float32) * [[1], [5], [.1], [1]]
    found = tool.rerank(two_halves(), "0", features, ScriptedPolicy(), scorer)
    assert found.ranking == [1, 0, 2, 3]
    assert scorer.images == 2  # the full image and the crop


def test_text_of_a_candidate_counts():
    """Eq. 3: red image + text "blue" = (255, 0, 255), purple's direction: cosine 1 with the full image."""
    pairs = [(Image.new("RGB", (8, 8), COLOURS["red"]), text) for text in ("", "blue", None, "red", " ")]
    found = tool.rerank(two_halves(), "2", pairs, ScriptedPolicy(), ColourScorer())
    np.testing.assert_allclose(found.after, [HALF, 1, HALF, HALF, HALF], atol=1e-6)
    assert found.ranking == [1, 0, 2, 3, 4]


def test_known_features_are_not_encoded_again(tmp_path):
    scorer, known, paths = ColourScorer(), {}, []
    for name in NAMES:
        paths.append(str(tmp_path / f"{name}.png"))
        Image.new("RGB", (8, 8), COLOURS[name]).save(paths[-1])
    first = tool.candidate_features([(paths[0], "red"), (paths[1], "red"), (paths[0], "")], scorer, known)
    assert (scorer.images, scorer.texts) == (2, 1)
    again = tool.candidate_features([(paths[2], "blue"), (paths[0], "red"), (squares()[3][0], "")], scorer, known)
    assert (scorer.images, scorer.texts) == (4, 2)
    np.testing.assert_array_equal(first[0], again[1])
    assert sum(kind == "image" for kind, _ in known) == 3  # an image object is not kept: its id may come back


def test_many_at_once_equal_one_by_one():
    """Pools of different sizes, one policy pass, one scorer pass for the crops."""
    policy, scorer, image = ScriptedPolicy(), ColourScorer(), two_halves()
    pools = [fuse(np.array([COLOURS[n] for n in names], np.float32)) for names in (NAMES, NAMES[:2], NAMES[::-1])]
    full = scorer.image_features([image] * 3)
    together = tool.rerank_batch([image] * 3, ["0", "3", "1"], pools, full, policy, scorer)
    assert policy.asked == [(3, "grammar", None)] and scorer.images == 3 + 2
    for pool, question, found in zip(pools, "031", together):
        alone = tool.rerank(image, question, pool, policy, scorer)
        assert found.ranking == alone.ranking
        np.testing.assert_array_equal(found.after, alone.after)


def test_nothing_to_rank():
    with pytest.raises(ValueError, match="no candidates"):
        tool.rerank(two_halves(), "0", [], ScriptedPolicy(), ColourScorer())


# ------------------------------------------------------------------------------------------------------- files -> pools

def paint(folder, names=NAMES, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), COLOURS[name]).save(folder / f"{name}{suffix}")
    return folder


def test_read_folder(tmp_path):
    folder = paint(tmp_path / "c")
    (folder / "red.txt").write_text(" blue \n")
    (folder / "orphan.txt").write_text("no image")
    (folder / "notes.md").write_text("")
    found, others = tool.read_folder(folder)
    assert [(c.name, c.text) for c in found] == [("blue", ""), ("green", ""), ("purple", ""), ("red", "blue")]
    assert others == 2


def test_folders_that_will_not_do(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "notes.md").write_text("")
    with pytest.raises(ValueError, match="no images.*1 other file"):
        tool.read_folder(folder)
    paint(folder, ["red"], ".png")
    paint(folder, ["red"], ".jpg")
    with pytest.raises(ValueError, match="red.jpg and red.png would be one candidate"):
        tool.read_folder(folder)


@pytest.mark.parametrize("text, complaint", [
    ('{"image": "red.png"}\n{"image": "red.png"}', "'red.png' is there twice"),
    ('{"image": "red.png"}\n{"image": ""}', ":2: 'image' must be a text that is not empty"),
    ('{"image": "red.png", "text": 3}', ":1: 'text' must be a text"),
    ('{"text": "red"}', ":1: 'image' must be"), ("[1]", ":1: expected an object"), ("{", ":1: not JSON"),
    ("[" * 100_000, ":1: not JSON"), ("\n", "no candidates")])
def test_lists_that_will_not_do(tmp_path, text, complaint):
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        tool.read_list(str(tmp_path / "c.jsonl"))


def test_read_list(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"image": "a/red.png", "text": "blue"}\n\n{"image": "/b.png", "name": "n"}\n')
    assert tool.read_list(str(tmp_path / "c.jsonl")) == [("a/red.png", f"{tmp_path}/a/red.png", "blue"),
                                                         ("n", "/b.png", "")]


def test_run_is_read_by_score(tmp_path):
    """As trec_eval does; the rank column says otherwise here. Equal scores keep the order of the file."""
    (tmp_path / "r.trec").write_text("q Q0 a 1 .1 t\nq Q0 b 2 .5 t\np Q0 a 1 1 t\n\nq Q0 c 3 .1 t\n")
    assert tool.read_run(str(tmp_path / "r.trec")) == {"q": ["b", "a", "c"], "p": ["a"]}


@pytest.mark.parametrize("text, complaint", [
    ("q Q0 a 1 .1", ":1: 5 columns"), ("q Q0 a 1 .1 t\nq Q0 a 2 .1 t", ":2: document a is there twice"),
    ("q Q0 a 1 high t", ":1: 'high' is no score"), ("", "empty run")])
def test_runs_that_will_not_do(tmp_path, text, complaint):
    (tmp_path / "r.trec").write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        tool.read_run(str(tmp_path / "r.trec"))


# ------------------------------------------------------------------------------------------- a prepared knowledge base

ENTITIES = [f"https://w/{name} one" for name in NAMES]  # a blank, which run files cannot hold


def build(tmp_path):
    """raw/, data/ and a run as the stages write them. Entity k has two images: its colour, and a darker one mixed with
    green that lies further from every query; so the nearest is the first."""
    raw, data, run = (tmp_path / name for name in ("raw", "data", "run"))
    paint(raw)
    for folder in (data, run / "adapter"):
        folder.mkdir(parents=True)
    mixed = [tuple((np.array(COLOURS[name]) + (0, 90, 0)) // 2) for name in NAMES]
    for name, colour in zip(NAMES, mixed):
        Image.new("RGB", (8, 8), tuple(int(x) for x in colour)).save(raw / f"{name}-2.png")
    for i in SAYS:
        two_halves().save(raw / f"q{i}.png")
    write_pool(data / "test.jsonl", [Query(f"q {i}", f"q{i}.png", f"What is this, {i}", [0, 1, 2], [0, 2, 4],
                                           [0, int(i == 0), 0], [1., .7, .7]) for i in SAYS])
    with open(data / "kb.jsonl", "w", encoding="utf-8") as file:
        for name, entity in zip(NAMES, ENTITIES):
            file.write(json.dumps({"entity_id": entity, "title": f"The <b>{name}</b>", "text": "",
                                   "images": [f"{name}.png", f"{name}-2.png"]}) + "\n")
    write_array(data / "test_full.npy", np.full((4, 3), (127.5, 0, 127.5), np.float16))
    both = [colour for pair in zip(COLOURS.values(), mixed) for colour in pair]
    write_array(data / "kb_image.npy", np.array(both, np.float16))
    write_array(data / "kb_text.npy", np.zeros((4, 3), np.float16))
    write_array(data / "kb_entity.npy", np.repeat(np.arange(4, dtype=np.int32), 2))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in data.iterdir()}
    write_json(data / "manifest.json", {
        "version": POOL_VERSION, "dataset": "colours", "root": "../raw", "args": {}, "scorer": "colours@1",
        "scorer_name": "colours", "K": 3, "dim": 3, "files": files, "packages": {},
        "splits": {"test": {"rows_read": 4, "kept": 4, "dropped": {}, "with_positive": 1}},
        "kb": {"entries_read": 4, "kept": 4, "images": 8, "dropped": {}}})
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    write_json(run / "config.json", {"args": {"decode": "grammar"}, "policy": "scripted", "scorer": "colours",
                                     "data": str(data)})
    return tmp_path


@pytest.fixture
def fakes(monkeypatch):
    """The models that the command loads, and what it said when it loaded the policy."""
    found = SimpleNamespace(scorer=ColourScorer(), policy=ScriptedPolicy(), loaded=[])
    monkeypatch.setattr(tool, "load_scorer", lambda name, device, dtype=None: found.scorer)
    monkeypatch.setattr(tool, "load_policy", lambda name, **how: found.loaded.append((name, how)) or found.policy)
    return found


@pytest.fixture
def world(tmp_path, fakes):
    """Folder of `build`; the command runs there on fakes."""
    return build(tmp_path)


def run(world, capsys, *arguments):
    """Standard output of the command."""
    tool.main(["--run", str(world / "run"), *map(str, arguments)])
    return capsys.readouterr().out


def names_of(text):
    return [row["name"] for row in json.loads(text)["candidates"]]


def test_retrieval_finds_what_a_loop_finds(tmp_path):
    """Random features, one to four images an entity: the K best entities by their best image, and which it was."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(30), rng.integers(1, 5, 30)).astype(np.int32)
    image = rng.normal(size=(len(owners), 6)).astype(np.float16)

    class Kb:
        manifest, kb_entity, kb_image, kb_text = {"K": 7, "args": {}}, owners, image, np.zeros((30, 6), np.float16)

        @staticmethod
        def entity(j):
            return {"entity_id": f"e{j}", "title": ""}

    pools = tool.Pools(None, Kb)
    for query in rng.normal(size=(20, 6)).astype(np.float32):
        cosine = [float(v @ query / np.linalg.norm(v) / np.linalg.norm(query)) for v in image.astype(np.float32)]
        best = {}
        for m in sorted(range(len(owners)), key=lambda m: -cosine[m]):
            best.setdefault(int(owners[m]), m)
        found = pools.retrieved(query)
        assert found.names == [f"e{j}" for j in list(best)[:7]]
        assert found.rows == list(best.values())[:7]
        np.testing.assert_allclose(found.features, fuse(image[found.rows]), atol=1e-6)


def test_query_of_the_data(world, capsys, fakes):
    """q 0 crops to the left: red first. --query alone takes the pool that prepare.py stored."""
    found = json.loads(run(world, capsys, "--query", "q 0", "--json"))
    assert found["question"] == "What is this, 0" and found["decision"] == "REGION" and found["box"] == list(LEFT)
    assert [(row["name"], row["rank"], row["rank_before"]) for row in found["candidates"]] == [
        (ENTITIES[1], 1, 2), (ENTITIES[0], 2, 1), (ENTITIES[2], 3, 3)]
    assert fakes.loaded == [("scripted", {"adapter": str(world / "run" / "adapter"), "device": "cpu",
                                          "max_pixels": None, "system_prompt": None, "dtype": None})]


def test_table(world, capsys):
    lines = run(world, capsys, "--query", "q 0", "--device", "cpu").splitlines()
    assert lines[1] == "REGION (0, 0, 32, 64) of 64 x 64 pixels, p(REGION) 0.900"
    assert lines[3].split() == ["1", "2", "1.000", "0.707", "The", "<b>red</b>"]
    assert "cannot be read" in run(world, capsys, "--query", "q 3").splitlines()[1]


def test_own_image_is_retrieved_for(world, capsys):
    """K = 3 by the manifest, so green, which is furthest, is not among the candidates; --k 1 leaves the nearest."""
    own = ["--image", world / "raw" / "q0.png", "--question", "0", "--json"]
    assert names_of(run(world, capsys, *own)) == [ENTITIES[1], ENTITIES[0], ENTITIES[2]]
    assert names_of(run(world, capsys, *own, "--k", "1")) == [ENTITIES[0]]


def test_folder_and_box_picture(world, capsys):
    output = run(world, capsys, "--image", world / "raw" / "q0.png", "--question", "0", "--candidates",
                 paint(world / "c"), "--save-image", world / "out.png", "--json")
    assert names_of(output) == ["red", "purple", "blue", "green"]  # blue and green: 0 both, by file name
    with Image.open(world / "out.png") as picture:
        # The line is 2 wide and inside the box: red on blue can be seen at its bottom right only, were it off by one.
        assert picture.size == (64, 64) and picture.getpixel((31, 63)) == (255, 0, 0)
        assert picture.getpixel((32, 63)) == (0, 0, 255)
    assert not list(world.glob("*.tmp"))


def test_notes_what_a_folder_holds_besides(world, capsys):
    (paint(world / "c") / "notes.md").write_text("")
    tool.main(["--run", str(world / "run"), "--image", str(world / "raw" / "q0.png"), "--question", "0",
               "--candidates", str(world / "c")])
    assert "1 files are neither" in capsys.readouterr().err


def test_trec_run(world, capsys):
    """Document names have their blanks quoted, as evaluate.py writes them; --k cuts the run, best first."""
    (world / "r.trec").write_text("".join(
        f"{query} Q0 https://w/{name}%20one 0 {score} t\n" for query in ("q%200", "other")
        for name, score in (("green", .1), ("blue", .2), ("red", .3))))
    arguments = ["--candidates", world / "r.trec", "--json"]
    assert names_of(run(world, capsys, "--query", "q 0", *arguments)) == [ENTITIES[1], ENTITIES[2], ENTITIES[3]]
    assert names_of(run(world, capsys, "--query", "q 0", *arguments, "--k", "2")) == [ENTITIES[1], ENTITIES[2]]
    with pytest.raises(SystemExit, match="has 2 queries, the first is q%200: say which by --query"):
        run(world, capsys, "--image", world / "raw" / "q0.png", "--question", "0", *arguments)
    (world / "r.trec").write_text("q%200 Q0 nobody 0 1 t\n")
    with pytest.raises(SystemExit, match="nobody of query q%200 is no entity"):
        run(world, capsys, "--query", "q 0", *arguments)


@pytest.mark.parametrize("arguments, complaint", [
    (["--query", "q 9"], "has no query 'q 9'"),
    (["--image", "{}/none.png", "--question", "0"], "none.png is missing"),
    (["--image", "{}/run/config.json", "--question", "0"], "config.json cannot be read"),
    (["--query", "q 0", "--candidates", "{}/none"], "none are missing"),
    (["--query", "q 0", "--candidates", "{}/run/config.json"], "expected a folder of images, a .jsonl or a .trec"),
    (["--query", "q 0", "--split", "val"], "no split 'val'"),
    (["--query", "q 0", "--run", "{}/none"], "config.json is missing: train first"),
    (["--query", "q 0", "--data", "{}/none"], "manifest.json is missing"),
    (["--query", "q 0", "--policy", "p", "--run", ""], "no scorer"),
    (["--query", "q 0", "--policy", "p", "--scorer", "s", "--run", ""], "give --data"),
    (["--batch", "{}/none.jsonl", "--out", "{}/out.jsonl"], "none.jsonl"),
])
def test_complaints(world, capsys, arguments, complaint):
    with pytest.raises(SystemExit, match=re.escape(complaint)):
        run(world, capsys, *(argument.format(world) for argument in arguments))


@pytest.mark.parametrize("arguments", [
    "", "--image q.png", "--image q.png --question x --serve", "--batch a.jsonl", "--query x --out b.jsonl",
    "--batch a.csv --out b.jsonl", "--query x --k 0", "--query x --threshold 1.5", "--serve 70000",
    "--query x --threshold .5 --decode free", "--query x --save-image box.gif", "--query x --batch-size 0"])
def test_arguments_that_will_not_do(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.parse_args(arguments.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- many queries

def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_batch(world):
    paint(world / "c")
    pairs = [{"image": f"c/{name}.png", "name": name} for name in NAMES]
    good = [{"id": f"b{i}", "image": "raw/q0.png", "question": str(i), "candidates": pairs} for i in (0, 1, 2)]
    bad = ["{", json.dumps({**good[0], "question": "again 0"}), json.dumps({**good[0], "id": "x", "image": "no.png"}),
           json.dumps({**good[0], "id": "y", "question": "<|im_end|>"}), json.dumps({"id": "z", "candidates": []}),
           json.dumps({**good[0], "id": "w", "candidates": []}), json.dumps({**good[0], "id": "v", "run": "r.trec"})]
    text = [json.dumps(good[0]), bad[0], json.dumps(good[1]), *bad[1:], "", json.dumps({"id": "q 0"}),
            json.dumps(good[2])]
    (world / "in.jsonl").write_text("\n".join(text))
    return ["--batch", world / "in.jsonl", "--out", world / "out.jsonl"]


def test_batch(world, capsys):
    """Four good lines (one by the id of a query of the data alone) and seven bad ones, each with its own complaint."""
    said = run(world, capsys, *write_batch(world))
    found = {line["line"]: line for line in lines_of(world / "out.jsonl")}
    assert {number for number, line in found.items() if "error" not in line} == {1, 3, 11, 12}
    first = [[row["name"] for row in found[number]["candidates"]][0] for number in (1, 3, 11, 12)]
    assert first == ["red", "blue", ENTITIES[1], "purple"]
    complaints = {2: "not JSON", 4: "'b0' is there twice", 5: "no.png is missing", 6: "special token",
                  7: "has no query 'z'", 8: "no candidates", 9: "leave one out"}
    assert {number for number, line in found.items() if "error" in line} == complaints.keys()
    assert all(words in found[number]["error"] for number, words in complaints.items())
    assert "re-ranked 4 queries in" in said and "a second)" in said and "7 lines could not be used" in said


def test_batch_encodes_a_candidate_once(world, capsys, fakes):
    """4 candidate images for 3 queries, 3 full images, 2 crops (b2 is FULL): 9 where 17 would be without memory."""
    arguments = write_batch(world)
    text = (world / "in.jsonl").read_text().splitlines()
    (world / "in.jsonl").write_text("\n".join([text[0], text[2], text[-1]]))
    run(world, capsys, *arguments)
    assert fakes.scorer.images == 4 + 3 + 2


def test_batch_goes_on(world, capsys, fakes):
    """Killed in the middle of its second line: that one is done again, the first is not, errors are tried again."""
    arguments = write_batch(world)
    run(world, capsys, *arguments, "--batch-size", "1")
    whole = {line["line"]: line for line in lines_of(world / "out.jsonl")}
    good = [line for line in (world / "out.jsonl").read_text().splitlines() if '"error"' not in line]
    (world / "out.jsonl").write_text(good[0] + "\n" + '{"id": "y", "line": 6, "error": "e"}\n' + good[1][:40])
    fakes.policy.asked.clear()
    said = run(world, capsys, *arguments)
    assert "1 were done before" in said and "re-ranked 3 queries" in said
    assert {line["line"]: line for line in lines_of(world / "out.jsonl")} == whole
    assert len(lines_of(world / "out.jsonl")) == len(whole)


def test_batch_refuses_other_settings_and_other_files(world, capsys):
    arguments = write_batch(world)
    run(world, capsys, *arguments)
    with pytest.raises(SystemExit, match="begun with another threshold"):
        run(world, capsys, *arguments, "--threshold", ".3")
    before = (world / "in.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="was not begun here"):
        run(world, capsys, "--batch", world / "in.jsonl", "--out", world / "in.jsonl")
    assert (world / "in.jsonl").read_bytes() == before


def test_batch_of_a_whole_run(world, capsys):
    (world / "r.trec").write_text("".join(f"q%20{i} Q0 https://w/{name}%20one 0 {score} t\n" for i in (0, 1)
                                          for name, score in (("blue", .2), ("red", .3))))
    run(world, capsys, "--batch", world / "r.trec", "--out", world / "out.jsonl")
    assert [(line["id"], line["candidates"][0]["name"]) for line in lines_of(world / "out.jsonl")] == [
        ("q%200", ENTITIES[1]), ("q%201", ENTITIES[2])]


# ------------------------------------------------------------------------------------------------------------ the page

@pytest.fixture
def server(world):
    models = tool.open_models(tool.parse_args(["--run", str(world / "run"), "--serve", "0"]))
    with tool.make_server(tool.Demo(models), 0) as found:
        thread = threading.Thread(target=found.serve_forever, args=(.01,))  # seconds between looks for a shutdown
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    """-> (status, headers, body bytes)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def post(server, **request):
    status, _, content = ask(server, "POST", "/rerank", json.dumps(request), Content_Type="application/json")
    return status, json.loads(content)


def test_page_and_its_headers(server):
    status, headers, content = ask(server, "GET", "/?example=3&run=1")
    assert status == 200 and content == tool.PAGE.read_bytes()
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert server.server_address[0] == "127.0.0.1"  # and not all interfaces


def test_page_is_self_contained():
    """No address but its own, no text turned into markup, and every element that the script asks for is there."""
    text = tool.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", text)
    assert set(re.findall(r'\$\("(\w+)"\)', text)) <= set(re.findall(r'id="(\w+)"', text))


def test_example_by_http(server):
    status, _, content = ask(server, "GET", "/example/0")
    assert (status, json.loads(content)) == (200, {"id": "q 0", "question": "What is this, 0", "in_pool": True})
    assert json.loads(ask(server, "GET", "/about")[2])["examples"] == 4
    status, found = post(server, example=0, question="Where does it live, 0")
    assert status == 200 and found["decision"] == "REGION" and found["p_region"] == .9 and found["box"] == list(LEFT)
    first = found["candidates"][0]
    # Markup in a title comes as it is, in JSON: the page puts it in as text.
    assert (first["title"], first["row"], first["rank_before"], first["positive"]) == ("The <b>red</b>", 2, 2, True)
    assert post(server, example=0, question="0", force="FULL")[1]["candidates"][0]["title"] == "The <b>purple</b>"


def test_images_by_http(server):
    status, headers, content = ask(server, "GET", "/query/1")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(content)).size == (64, 64)
    assert Image.open(io.BytesIO(ask(server, "GET", "/query/1?side=32")[2])).size == (32, 32)
    colour = Image.open(io.BytesIO(ask(server, "GET", "/candidate/2")[2])).getpixel((4, 4))
    np.testing.assert_allclose(colour, COLOURS["red"], atol=3)  # row 2: red's first image; JPEG loses a little


@pytest.mark.parametrize("text", ["\u00b2", "\u0663", "1.0", "", None, -1, True, 4, "0x1", " 1"])
def test_number_takes_plain_numbers_only(text):
    """\u00b2 and \u0663 are digits to Python's isdigit; int() fails on the first and takes the second."""
    with pytest.raises(tool.Refusal):
        tool.number(text, 4)
    assert tool.number("3", 4) == tool.number(3, 4) == 3


def test_pictures_are_served_as_they_were_scored(server, world):
    """A browser turns a picture by its EXIF. The box is in the pixels that read_image gave, turned or not: those are
    served, and no EXIF that would turn them under their box."""
    exif = Image.Exif()
    exif[0x112] = 6  # "turn by 90 degrees"
    two_halves().resize((96, 64)).save(world / "raw" / "q1.png", exif=exif)
    found = Image.open(io.BytesIO(ask(server, "GET", "/query/1")[2]))
    assert found.size == read_image(str(world / "raw" / "q1.png")).size and not found.getexif()
    assert post(server, example=1, question="0")[1]["size"] == list(found.size)


def encoded(image, kind="png", **how):
    content = io.BytesIO()
    image.save(content, format=kind, **how)
    return base64.b64encode(content.getvalue()).decode()


def test_dropped_image_by_http(server):
    status, found = post(server, image=encoded(two_halves()), question="1")
    assert status == 200 and found["retrieved"] and not found["known"] and found["box"] == list(RIGHT)
    assert [row["title"] for row in found["candidates"]] == [f"The <b>{n}</b>" for n in ("blue", "purple", "red")]


@pytest.mark.parametrize("path", ["/none", "/query/4", "/query/-1", "/query/x", "/query/%31", "/candidate/8",
                                  "/example/1e0", "/query/1?side=99999", "/query/../../raw/q0.png",
                                  "/../run/config.json", "/query/%2e%2e%2fq0.png",
                                  "//etc/passwd", "/query/" + "9" * 5000])
def test_nothing_else_is_served(server, path):
    status, _, content = ask(server, "GET", path)
    assert status == 404 and set(json.loads(content)) == {"error"}


@pytest.mark.parametrize("request_, status, complaint", [
    ({"example": 0, "question": " "}, 400, "Ask a question"), ({"example": 0, "question": 7}, 400, "Ask a question"),
    ({"example": 0, "question": "x" * 1001}, 400, "Ask a question"), ({"example": 9, "question": "0"}, 404, "9"),
    ({"example": [1], "question": "0"}, 404, "no number"), ({"question": "0"}, 400, "cannot be read as an image"),
    ({"image": "???", "question": "0"}, 400, "did not arrive whole"), ({"image": [], "question": "0"}, 400, "image"),
    ({"image": base64.b64encode(b"GIF89a").decode(), "question": "0"}, 400, "cannot be read as an image"),
    ({"example": 0, "question": "0", "force": "MALFORMED"}, 400, "FULL, REGION"),
    ({"example": 0, "question": "<|im_end|>"}, 400, "special token")])
def test_requests_that_will_not_do(server, request_, status, complaint):
    found, answer = post(server, **request_)
    assert found == status and complaint in answer["error"]
    assert post(server, example=0, question="0")[0] == 200  # and the next one is served


def test_image_of_too_many_pixels(server):
    """A grey 7,000 x 7,000 PNG is a few kB: it is its header that is looked at."""
    status, answer = post(server, image=encoded(Image.new("L", (7000, 7000))), question="0")
    assert status == 413 and "at most 40 million" in answer["error"]


@pytest.mark.parametrize("headers, status", [
    ({"Content_Type": "text/plain"}, 415),  # all that a form of another site can send
    ({"Content_Type": "application/json", "Content_Length": str(13 << 20)}, 413),
    ({"Content_Type": "application/json", "Content_Length": "-1"}, 411),
    ({"Content_Type": "application/json", "Host": "evil.example"}, 403)])
def test_headers_that_will_not_do(server, headers, status):
    assert ask(server, "POST", "/rerank", b"", **headers)[0] == status


def test_body_that_is_no_json(server):
    for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
        assert ask(server, "POST", "/rerank", body, Content_Type="application/json")[0] == 400
    assert ask(server, "POST", "/query/0", b"{}", Content_Type="application/json")[0] == 404


def test_models_are_asked_one_at_a_time(server, world, fakes):
    """Eight requests at once; the policy notices a second caller while it thinks."""
    inside, overlaps, act = [], [], fakes.policy.act

    def slow(*arguments, **how):
        overlaps.append(len(inside))
        inside.append(1)
        threading.Event().wait(.02)
        inside.pop()
        return act(*arguments, **how)

    fakes.policy.act = slow
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(post(server, example=i % 4, question=str(i % 3))[0]))
               for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 8 and overlaps == [0] * 8


def test_port_in_use(server):
    with pytest.raises(ValueError, match="name another"):
        tool.make_server(None, server.server_port)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("query, words", [
    ("?example=0&run=1", ["REGION: look here", "p(REGION) = 0.900", "After: what the policy chose", "right answer"]),
    ("?example=2&run=1&force=REGION", ["forced; p(REGION) = 0.100", "After: the forced REGION"]),
    ("?example=9", ["Examples run from 0 to 3."])])
def test_page_in_a_browser(server, tmp_path, query, words):
    """What the page's script makes of the answer, as a browser has it after asking; titles stay text."""
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         "--virtual-time-budget=20000", f"http://127.0.0.1:{server.server_port}/{query}"],
        capture_output=True, text=True, timeout=120)
    body = done.stdout.split("<script>")[0]
    assert [word for word in words if word not in body] == [] and "<b>" not in body
    assert len(re.findall("<li[ >]", body)) == (6 if "run" in query else 0)  # K = 3, before and after


# --------------------------------------------------------------------------------------------------- the shipped models

def noise(seed, size=(140, 112)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


def test_command_with_the_shipped_models(tmp_path):
    """The whole command in a process of its own, against the leaves put together by hand."""
    folder = tmp_path / "c"
    folder.mkdir()
    for i in range(5):
        noise(i).save(folder / f"{i}.png")
    (folder / "3.txt").write_text("A beetle with blue spots")
    noise(9, (224, 168)).save(tmp_path / "q.png")
    question = "Where does this beetle live?"
    done = subprocess.run(
        [sys.executable, "-m", "tools.rerank", "--policy", "mini/policy", "--scorer", "mini/scorer", "--image",
         tmp_path / "q.png", "--question", question, "--candidates", folder, "--threshold", "0", "--json"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    policy, scorer, image = load_policy("mini/policy"), load_scorer("mini/scorer"), noise(9, (224, 168))
    action = policy.act([image], [question], force="REGION")[0]  # above 0 is every p(REGION | x)
    texts = np.zeros((5, scorer.dim), np.float32)
    texts[3] = scorer.text_features(["A beetle with blue spots"])[0]
    pool = fuse(scorer.image_features([noise(i) for i in range(5)]), texts)
    before, after = (scores(scorer.image_features([view])[0], pool) for view in (image, crop(image, action.box)))
    assert found["decision"] == "REGION"
    np.testing.assert_allclose(found["box"], action.box)
    np.testing.assert_allclose(found["p_region"], action.p_region, rtol=1e-4)
    rows = sorted(found["candidates"], key=lambda row: row["index"])
    np.testing.assert_allclose([row["score"] for row in rows], after, atol=1e-5)
    np.testing.assert_allclose([row["score_before"] for row in rows], before, atol=1e-5)
    assert [row["name"] for row in found["candidates"]] == [str(k) for k in np.argsort(-after, kind="stable")]
