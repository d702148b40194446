"""tools/rerank.py with a scorer that averages colours and a scripted policy, so every score can be worked out by hand.

A query image is 64 x 64, left half red, right half blue; its mean colour is purple's. Candidates are single colours:

                purple   red    blue   green
    full image   1       .707   .707   0      equal scores keep the order given: purple, red, blue, green
    left half    .707    1      0      0      red, purple, blue, green
    right half   .707    0      1      0      blue, purple, red, green

The digit that ends a question says what the policy answers: see SAYS.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from policy import Action, load_policy
from scorer import (InputError, Query, crop, fuse, load_scorer, read_trec, scores, write_array, write_json,
                    write_split)
from tools import rerank as tool

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["purple", "red", "blue", "green"]
COLOURS = dict(zip(NAMES, [(255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 255, 0)]))
LEFT, RIGHT, HALF = (0.0, 0.0, 32.0, 64.0), (32.0, 0.0, 64.0, 64.0), 2 ** -.5
SAYS = {0: (LEFT, .9), 1: (RIGHT, .6), 2: (LEFT, .1), 3: None}  # box, p(REGION); None: text that cannot be read


class ColourScorer:
    """Feature of an image = its mean colour, of a text = the colour it names. Counts what it encodes."""
    name, dim, batch_size, device, dtype = "colours", 3, 3, torch.device("cpu"), torch.float32

    def __init__(self, direction=(.6, .8, 0)):
        self.images, self.texts, self.direction = 0, 0, direction

    def image_features(self, images):
        self.images += len(images)
        return np.array([np.asarray(image, np.float32).mean((0, 1)) for image in images], np.float32).reshape(-1, 3)

    def text_features(self, texts):
        self.texts += len(texts)
        return np.array([COLOURS[text] for text in texts], np.float32)

    def fingerprint(self):
        return np.array(self.direction, np.float32)


class ScriptedPolicy:
    max_new_tokens = 256

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
                actions.append(Action("REGION", said[0], said[1], "REGION's text"))
            else:
                actions.append(Action("FULL", None, said[1], "FULL's text"))
        return actions


def two_halves():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = COLOURS["red"], COLOURS["blue"]
    return Image.fromarray(picture)


def square(name):
    return Image.new("RGB", (8, 8), COLOURS[name])


def ranked(question, **how):
    """Ranking of the four colours by name, and the Reranking."""
    pairs = [(square(name), "") for name in NAMES]
    found = tool.rerank(two_halves(), question, pairs, ScriptedPolicy(), ColourScorer(), **how)
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
    """Whichever way it goes, text and box are those of the decision, and p(REGION | x) is what it was."""
    _, found = ranked(question, threshold=threshold)
    said = SAYS[int(question)]
    assert found.action == Action(decision, said[0] if decision == "REGION" else None, said[1], f"{decision}'s text")
    assert (found.view.size == (32, 64)) == (decision == "REGION")


def test_threshold_needs_an_exact_probability():
    with pytest.raises(InputError, match="grammar"):
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
    with pytest.raises(InputError, match="no candidates"):
        tool.rerank(two_halves(), "0", [], ScriptedPolicy(), ColourScorer())


def test_text_of_a_candidate_counts():
    """Eq. 3: red image + text "blue" = (255, 0, 255), purple's direction: cosine 1 with the full image."""
    pairs = [(square("red"), text) for text in ("", "blue", None, "red", " ")]
    found = tool.rerank(two_halves(), "2", pairs, ScriptedPolicy(), ColourScorer())
    np.testing.assert_allclose(found.after, [HALF, 1, HALF, HALF, HALF], atol=1e-6)
    assert found.ranking == [1, 0, 2, 3, 4]


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


def test_crop_and_full_image_can_be_scored_together():
    """A policy that was trained with --fuse .5: halves of both, each of length 1."""
    pool = fuse(np.array([COLOURS[n] for n in NAMES], np.float32))
    found = tool.rerank(two_halves(), "0", pool, ScriptedPolicy(), ColourScorer(), share=0.5)
    assert found.action.decision == "REGION"
    full, crop = (f / np.linalg.norm(f) for f in ColourScorer().image_features([two_halves(), found.view]))
    both = (full + crop) / np.linalg.norm(full + crop)
    np.testing.assert_allclose(found.after, pool @ both, atol=1e-6)
    assert np.abs(found.after - pool @ crop).max() > 0.01


def test_images_that_are_not_rgb_are_read_as_files_are():
    """Transparent parts are white and 16 bits are 8, also of a PIL image."""
    assert tool.open_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 20000, np.uint16))
    assert tool.open_image(deep).getpixel((0, 0)) == (78, 78, 78)  # 20000 // 256; convert() alone gives 255


# ------------------------------------------------------------------------------------------------- candidates in files

def paint(folder, names=NAMES, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        square(name).save(folder / f"{name}{suffix}")
    return folder


def test_folder_of_candidates(tmp_path, capsys):
    folder = paint(tmp_path / "c")
    (folder / "red.txt").write_text(" blue \n")
    (folder / "orphan.txt").write_text("no image")
    (folder / "notes.md").write_text("")
    found = tool.read_candidates(str(folder))
    assert [(c.name, c.text) for c in found] == [("blue", ""), ("green", ""), ("purple", ""), ("red", "blue")]
    assert "2 files are neither an image nor the text of one" in capsys.readouterr().err
    paint(folder, ["red"], ".jpg")
    with pytest.raises(InputError, match="'red' is there twice, as .*red.jpg and .*red.png"):
        tool.read_candidates(str(folder))
    (folder / "red.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="red.txt: not UTF-8"):
        tool.read_candidates(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no candidates"):
        tool.read_candidates(str(tmp_path / "empty"))


@pytest.mark.parametrize("text, complaint", [
    (b'{"image": "red.png"}\n{"image": "red.png"}', "'red.png' is there twice"),
    (b'{"image": "red.png"}\n{"image": ""}', ":2: 'image' must be a text that is not empty"),
    (b'{"image": "red.png", "text": 3}', ":1: 'text' must be a text"),
    (b'{"text": "red"}', ":1: 'image' must be"), (b"[1]", ":1: expected an object"), (b"{", ":1: not JSON"),
    (b"[" * 100_000, ":1: not JSON"), (b"9" * 5000, ":1: not JSON"), (b'{"image": "\xff"}', ":1: not JSON"),
    (b'{"image": "\\ud83d"}', ":1: half a surrogate pair"), (b"\n", "no candidates")])
def test_lists_that_will_not_do(tmp_path, text, complaint):
    (tmp_path / "c.jsonl").write_bytes(text)
    with pytest.raises(InputError, match=re.escape(complaint)):
        tool.read_candidates(str(tmp_path / "c.jsonl"))


def test_list_of_candidates(tmp_path):
    """Paths are relative to the file; U+2028 ends a line for str.splitlines, not in JSON."""
    text = '{"image": "a/red.png", "text": "blue\u2028sky"}\n\n{"image": "/b.png", "name": "n"}\n'
    (tmp_path / "c.jsonl").write_text(text, encoding="utf-8")
    assert tool.read_candidates(str(tmp_path / "c.jsonl")) == [
        ("a/red.png", f"{tmp_path}/a/red.png", "blue\u2028sky"), ("n", "/b.png", "")]


# ------------------------------------------------------------------------------------------- a prepared knowledge base

# Run files cannot hold a blank, and may or may not quote a bracket.
ENTITIES = [*(f"https://w/{name} one" for name in NAMES[:3]), "https://w/green_(colour)"]


def build(tmp_path):
    """raw/, data/ and a run as the stages write them. Entity k has two images: its colour, and a darker one mixed with
    green that lies further from every query; so the nearest is the first."""
    raw, data, run = (tmp_path / name for name in ("raw", "data", "run"))
    paint(raw)
    for folder in (data, run / "adapter"):
        folder.mkdir(parents=True)
    mixed = [tuple(int(x) // 2 for x in np.array(COLOURS[name]) + (0, 90, 0)) for name in NAMES]
    for name, colour in zip(NAMES, mixed):
        Image.new("RGB", (8, 8), colour).save(raw / f"{name}-2.png")
    for i in SAYS:
        two_halves().save(raw / f"q{i}.png")
    write_split(data, "test", [Query(f"q {i}", f"q{i}.png", f"What is this, {i}", ENTITIES[1:2]) for i in SAYS],
                pool=[[0, 1, 2]] * 4, pool_image=[[0, 2, 4]] * 4, labels=[[0, i == 0, 0] for i in SAYS],
                retrieval=[[1., .7, .7]] * 4, full=[(127.5, 0, 127.5)] * 4)
    with open(data / "kb.jsonl", "w", encoding="utf-8") as file:
        for name, entity in zip(NAMES, ENTITIES):
            file.write(json.dumps({"entity_id": entity, "title": f"The <b>{name}</b>", "text": "",
                                   "images": [f"{name}.png", f"{name}-2.png"]}) + "\n")
    both = [colour for pair in zip(COLOURS.values(), mixed) for colour in pair]
    write_array(data / "kb_image.npy", np.array(both, np.float16))
    write_array(data / "kb_text.npy", np.zeros((4, 3), np.float16))
    write_array(data / "kb_entity.npy", np.repeat(np.arange(4, dtype=np.int32), 2))
    write_json(data / "manifest.json", {
        "version": 2, "dataset": "colours", "root": "../raw", "args": {}, "K": 3, "dim": 3,
        "scorer": {"name": "data's colours", "dtype": "float32", "fingerprint": [.6, .8, 0]},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in data.iterdir()},
        "splits": {"test": {"rows_read": 4, "kept": 4, "dropped": {}, "with_positive": 1}}})
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    write_json(run / "config.json", {"args": {"decode": "grammar"}, "policy": "scripted", "scorer": "colours",
                                     "data": str(data), "system_prompt": "Crop or not?\n"})
    return tmp_path


@pytest.fixture
def fakes(monkeypatch):
    """The models that the command loads, and how it asked for them."""
    found = SimpleNamespace(scorer=ColourScorer(), policy=ScriptedPolicy(), policies=[], scorers=[])
    monkeypatch.setattr(tool, "load_scorer", lambda *asked: found.scorers.append(asked) or found.scorer)
    monkeypatch.setattr(tool, "load_policy", lambda name, **how: found.policies.append((name, how)) or found.policy)
    return found


@pytest.fixture
def world(tmp_path, fakes):
    """Folder of `build`; the command runs there on fakes."""
    return build(tmp_path)


def run(world, capsys, *arguments):
    """Standard output of the command."""
    try:
        tool.main(["--run", str(world / "run"), "--device", "cpu", *map(str, arguments)])
    except SystemExit as stopped:
        if stopped.code not in (0, 1):
            raise
    return capsys.readouterr().out


def names_of(text):
    return [row["name"] for row in json.loads(text)["candidates"]]


def test_query_of_the_data(world, capsys, fakes):
    """q 0 crops to the left: red first. --query alone takes the pool that prepare.py stored. The models are the run's:
    the system prompt to the letter (a newline at its end is a token), the scorer in the type of the data."""
    found = json.loads(run(world, capsys, "--query", "q 0", "--json"))
    assert found["question"] == "What is this, 0" and found["decision"] == "REGION" and found["box"] == list(LEFT)
    assert [(row["name"], row["rank"], row["rank_before"]) for row in found["candidates"]] == [
        (ENTITIES[1], 1, 2), (ENTITIES[0], 2, 1), (ENTITIES[2], 3, 3)]
    assert fakes.scorers == [("data's colours", "cpu", "float32")]
    assert fakes.policies == [("scripted", {"adapter": str(world / "run" / "adapter"), "device": "cpu", "dtype": None,
                                            "max_pixels": None, "system_prompt": "Crop or not?\n"})]


def test_models_as_they_were_trained(world, capsys, fakes):
    """Types of weights: the flag, else the run's and the data's; data that is not there leaves it to the device."""
    config = json.loads((world / "run" / "config.json").read_text())
    config["args"] |= {"policy_dtype": "bfloat16", "max_new_tokens": 5, "max_pixels": 784}
    write_json(world / "run" / "config.json", config)
    run(world, capsys, "--query", "q 0")
    assert fakes.policy.max_new_tokens == 5
    run(world, capsys, "--query", "q 0", "--policy-dtype", "float32")
    assert [(how["dtype"], how["max_pixels"]) for _, how in fakes.policies] == [("bfloat16", 784), ("float32", 784)]
    run(world, capsys, "--query", "q 0", "--scorer-dtype", "float16")
    (world / "data").rename(world / "gone")
    own = ["--image", world / "raw" / "q0.png", "--question", "What, 0", "--candidates", world / "raw"]
    run(world, capsys, *own)
    run(world, capsys, *own, "--data", world / "gone", "--scorer", "mine")
    assert fakes.scorers[2:] == [("data's colours", "cpu", "float16"), ("colours", "cpu", None),
                                 ("mine", "cpu", "float32")]


def test_adapter_without_its_run_is_used_as_it_was_trained(world, fakes):
    """The run that it lies in says how, and --adapter alone names no data; a stranger's lies in none."""
    config = json.loads((world / "run" / "config.json").read_text())
    config["args"] |= {"fuse": 0.5, "max_pixels": 784, "decode": "free"}
    write_json(world / "run" / "config.json", config)
    (world / "stranger").mkdir()
    command = ["--policy", "p", "--scorer", "s", "--query", "q 0", "--adapter"]
    found = [tool.Models(tool.parse_args([*command, str(world / folder / "adapter")])) for folder in ("run", "stranger")]
    assert [(models.fuse, models.decode, models.folder) for models in found] == [
        (.5, "free", None), (1, "grammar", None)]
    assert [(how["max_pixels"], how["system_prompt"]) for _, how in fakes.policies] == [(784, "Crop or not?\n"),
                                                                                       (None, None)]


def test_share_of_the_crop_is_the_flag_or_as_trained(world, capsys):
    def scores_of(*flags):
        rows = json.loads(run(world, capsys, "--query", "q 0", "--json", *flags))["candidates"]
        return [{row["name"]: row[score] for row in rows} for score in ("score", "score_before")]

    config = json.loads((world / "run" / "config.json").read_text())
    config["args"] |= {"fuse": 0.5}
    alone, half = scores_of()[0], scores_of("--fuse", ".5")[0]
    write_json(world / "run" / "config.json", config)
    assert scores_of()[0] == half != alone == scores_of("--fuse", "1")[0]
    after, before = scores_of("--fuse", "0")
    assert after == pytest.approx(before, abs=1e-6)


def test_table(world, capsys):
    lines = run(world, capsys, "--query", "q 0").splitlines()
    assert lines[1] == "REGION (0, 0, 32, 64) of 64 x 64 pixels, p(REGION) 0.900"
    assert lines[3].split() == ["1", "2", "1.000", "0.707", "The", "<b>red</b>"]
    assert "cannot be read" in run(world, capsys, "--query", "q 3").splitlines()[1]


def test_stored_pool_is_that_of_its_own_image(world, capsys):
    """As where --retrieved or another --pool made it. An image of one's own, asked the same question, has none."""
    for name, rows in (("test_pool", [0, 1, 3]), ("test_pool_image", [0, 2, 6])):
        write_array(world / "data" / f"{name}.npy", np.array([rows] * 4, np.int32))
    stored, own = ["--query", "q 0", "--json"], ["--image", world / "raw" / "q1.png"]
    assert names_of(run(world, capsys, *stored)) == [ENTITIES[1], ENTITIES[0], ENTITIES[3]]
    assert names_of(run(world, capsys, *stored, *own)) == [ENTITIES[1], ENTITIES[0], ENTITIES[2]]
    (world / "in.jsonl").write_text('{"id": "q 0"}\n{"id": "q%201", "image": "raw/q0.png"}')
    run(world, capsys, "--batch", world / "in.jsonl", "--out", world / "out.jsonl")
    assert [{row["name"] for row in line["candidates"]} for line in lines_of(world / "out.jsonl")] == [
        {ENTITIES[0], ENTITIES[1], ENTITIES[3]}, set(ENTITIES[:3])]


def test_own_image_is_retrieved_for(world, capsys):
    """prepare.py's search. K = 3 by the manifest, so green, the furthest, is not there; --k 1 leaves the nearest."""
    own = ["--image", world / "raw" / "q0.png", "--question", "0", "--json"]
    assert names_of(run(world, capsys, *own)) == [ENTITIES[1], ENTITIES[0], ENTITIES[2]]
    assert names_of(run(world, capsys, *own, "--k", "1")) == [ENTITIES[0]]
    assert len(names_of(run(world, capsys, *own, "--k", "9"))) == 4  # all there are


def test_folder_and_box_picture(world, capsys):
    output = run(world, capsys, "--image", world / "raw" / "q0.png", "--question", "1", "--candidates",
                 paint(world / "c"), "--save-image", world / "out.png", "--json")
    assert names_of(output) == ["blue", "purple", "green", "red"]  # green and red: 0 both, by file name
    with Image.open(world / "out.png") as picture:  # a red line, 2 wide and inside the box, on the blue half
        assert picture.size == (64, 64)
        assert {picture.getpixel(at) for at in ((33, 30), (62, 30), (50, 1), (50, 62))} == {(255, 0, 0)}
        assert {picture.getpixel(at) for at in ((34, 30), (61, 30), (50, 2), (50, 61))} == {(0, 0, 255)}
    assert not list(world.glob("*.tmp"))
    with pytest.raises(SystemExit, match="no-such-folder"):
        run(world, capsys, "--query", "q 0", "--save-image", world / "no-such-folder" / "a.png")
    assert "REGION" in capsys.readouterr().out  # the ranking is not lost with it


def trec(path, queries, scored):
    path.write_text("".join(f"{query} Q0 {ENTITIES[NAMES.index(name)].replace(' ', '%20')} 0 {score} t\n"
                            for query in queries for name, score in scored))


def test_trec_run(world, capsys):
    """Ids have their blanks quoted, as evaluate.py writes them; --k cuts the run, best first; twice is once."""
    trec(world / "r.trec", ["q%200", "other"], [("green", .1), ("blue", .2), ("red", .3), ("red", .15)])
    arguments = ["--candidates", world / "r.trec", "--json"]
    assert names_of(run(world, capsys, "--query", "q 0", *arguments)) == [ENTITIES[1], ENTITIES[2], ENTITIES[3]]
    assert names_of(run(world, capsys, "--query", "q 0", *arguments, "--k", "2")) == [ENTITIES[1], ENTITIES[2]]
    own = ["--image", world / "raw" / "q0.png", "--question", "0"]
    with pytest.raises(SystemExit, match="has 2 queries, the first is q%200: say which by --query"):
        run(world, capsys, *own, *arguments)
    with pytest.raises(SystemExit, match="no query 'q 1' in this run; it has 2"):
        run(world, capsys, "--query", "q 1", *arguments)
    trec(world / "r.trec", ["mine"], [("blue", .2)])
    assert names_of(run(world, capsys, *own, *arguments)) == [ENTITIES[2]]
    for text, complaint in (("nobody 0 1 t", "nobody of query q%200 is no entity"), ("a 0 nan t", "r.trec:1: exp")):
        (world / "r.trec").write_text(f"q%200 Q0 {text}\n")
        with pytest.raises(SystemExit, match=complaint):
            run(world, capsys, "--query", "q 0", *arguments)


def test_image_of_an_entity_is_chosen_as_for_the_pools(world, capsys):
    """blue's images lie the other way round here: the nearest to the query is row 5, the first is row 4."""
    path = world / "data" / "kb_image.npy"
    write_array(path, np.load(path)[[0, 1, 2, 3, 5, 4, 6, 7]])
    models = tool.Models(tool.parse_args(["--run", str(world / "run"), "--query", "q 0"]))
    trec(world / "r.trec", ["x"], [("blue", 1)])
    full = np.array([1, 0, 1], np.float32)
    assert models.pool(tool.Job("x", None, "", run=str(world / "r.trec")), full).rows == [5]
    models.data.manifest["args"]["candidate_image"] = "first"
    assert models.pool(tool.Job("x", None, "", run=str(world / "r.trec")), full).rows == [4]


@pytest.mark.parametrize("arguments, complaint", [
    (["--query", "q 9"], "has no query 'q 9'"),
    (["--image", "{}/none.png", "--question", "0"], "none.png is missing"),
    (["--image", "{}/run/config.json", "--question", "0"], "config.json cannot be read"),
    (["--query", "q 0", "--candidates", "{}/none"], "no folder of images"),
    (["--query", "q 0", "--candidates", "{}/run/config.json"], "neither a .jsonl nor a .trec"),
    (["--query", "q 0", "--split", "val"], "no split 'val'"),
    (["--query", "q 0", "--run", "{}/none"], "config.json is missing: train first"),
    (["--query", "q 0", "--data", "{}/none"], "manifest.json is missing"),
    (["--query", "q 0", "--policy", "p", "--run", ""], "no scorer"),
    (["--query", "q 0", "--policy", "p", "--scorer", "s", "--run", ""], "give --data"),
    (["--query", "q 0", "--question", "<|im_end|>"], "special token"),
    (["--batch", "{}/none.jsonl", "--out", "{}/out.jsonl"], "none.jsonl")])
def test_complaints(world, capsys, arguments, complaint):
    with pytest.raises(SystemExit, match=re.escape(complaint)):
        run(world, capsys, *(argument.format(world) for argument in arguments))


@pytest.mark.parametrize("arguments", [
    "", "--image q.png", "--image q.png --question x --batch a.jsonl --out b.jsonl", "--batch a.jsonl",
    "--query x --out b.jsonl", "--query x --k 0", "--query x --threshold 1.5",
    "--query x --threshold nan", "--query x --trec a.trec", "--query x --save-image box.gif",
    "--query x --batch-size 0", *(f"--batch a.jsonl --out b.jsonl {flag}" for flag in (
        "--question x", "--candidates c", "--json", "--save-image a.png"))])
def test_arguments_that_will_not_do(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.parse_args(arguments.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- many queries

def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def many(world):
    """Arguments of a batch with four good lines (one by the id of a query alone) and nine bad ones."""
    paint(world / "c")
    pairs = [{"image": f"c/{name}.png", "name": name} for name in NAMES]
    good = [{"id": f"b{i}", "image": "raw/q0.png", "question": str(i), "candidates": pairs} for i in (0, 1, 2)]
    lines = [good[0], "{", good[1], {**good[0], "question": "again 0"}, {**good[0], "id": "x", "image": "no.png"},
             {**good[0], "id": "y", "question": "<|im_end|>"}, {"id": "z", "candidates": []},
             {**good[0], "id": "w", "candidates": []}, {**good[0], "id": "v", "run": "r.trec"}, "", {"id": "q 0"},
             good[2], {**good[0], "id": "half", "question": "\ud83d 0"}, {"id": "\ud83d"}]
    (world / "in.jsonl").write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))
    return ["--batch", world / "in.jsonl", "--out", world / "out.jsonl"]


def test_batch(world, capsys, many):
    """Each bad line has its own complaint and takes no other with it; the program says so in its exit status."""
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--run", str(world / "run"), *map(str, many)])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    found = {line["line"]: line for line in lines_of(world / "out.jsonl")}
    assert {number for number, line in found.items() if "error" not in line} == {1, 3, 11, 12}
    first = [[row["name"] for row in found[number]["candidates"]][0] for number in (1, 3, 11, 12)]
    assert first == ["red", "blue", ENTITIES[1], "purple"]
    complaints = {2: "not JSON", 4: "'b0' is there twice", 5: "no.png is missing", 6: "special token",
                  7: "has no query 'z'", 8: "no candidates", 9: "leave one out", 13: "half a surrogate pair",
                  14: "half a surrogate pair"}
    assert {number for number, line in found.items() if "error" in line} == complaints.keys()
    assert all(words in found[number]["error"] for number, words in complaints.items())
    assert "re-ranked 4 queries in" in said.out and "a second)" in said.out
    assert "9 lines could not be used, the first: " in said.err


def test_batch_encodes_a_candidate_once(world, capsys, fakes, many):
    """4 candidate images for 3 queries, 3 full images, 2 crops (b2 is FULL): 9 where 17 would be without memory."""
    text = (world / "in.jsonl").read_text().splitlines()
    (world / "in.jsonl").write_text("\n".join([text[0], text[2], text[11]]))
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--run", str(world / "run"), *map(str, many)])
    assert stopped.value.code == 0 and fakes.scorer.images == 4 + 3 + 2


@pytest.mark.parametrize("cut", [lambda lines: lines[0] + b'{"id": "y", "line": 6, "error": "e"}\n' + lines[1][:40],
                                 lambda lines: lines[0] + '{"id": "b1", "text": "é'.encode()[:-1],
                                 lambda lines: lines[0][:-1]])
def test_batch_goes_on_after_a_kill(world, capsys, fakes, many, cut):
    """Killed in its second line, inside a letter there, or before a line's end: what was whole stays, errors are tried
    again, and the others are answered beside the same neighbours, so that they come out the same to the last bit."""
    run(world, capsys, *many)
    whole, asked = sorted(lines_of(world / "out.jsonl"), key=lambda line: line["line"]), list(fakes.policy.asked)
    good = [line + b"\n" for line in (world / "out.jsonl").read_bytes().splitlines() if b'"error"' not in line]
    (world / "out.jsonl").write_bytes(cut(good))
    fakes.policy.asked.clear()
    said = run(world, capsys, *many)
    assert "1 were done before" in said and "re-ranked 3 queries" in said and fakes.policy.asked == asked
    assert sorted(lines_of(world / "out.jsonl"), key=lambda line: line["line"]) == whole


def test_batch_refuses_other_settings_and_other_files(world, capsys, fakes, many):
    run(world, capsys, *many)
    adapter = world / "run" / "adapter" / "adapter_model.safetensors"
    for more, complaint in ((["--threshold", ".3"], "another threshold"), (["--fuse", ".5"], "another fuse"),
                            (["--policy-dtype", "bfloat16"], "another dtype"),
                            (["--batch", world / "in.jsonl", "--out", world / "in.jsonl"], "was not begun here")):
        before = (world / "in.jsonl").read_bytes()
        with pytest.raises(SystemExit, match=complaint):
            run(world, capsys, *many, *more)
        assert (world / "in.jsonl").read_bytes() == before
    (world / "in.jsonl").write_text((world / "in.jsonl").read_text().split("\n")[0])  # needs no data, which checks too
    fakes.scorer = ColourScorer((.8, .6, 0))
    with pytest.raises(SystemExit, match="cosine 0.9600"):
        run(world, capsys, *many)
    fakes.scorer = ColourScorer()
    adapter.write_bytes(b"trained again")
    (world / "data" / "manifest.json").write_text((world / "data" / "manifest.json").read_text() + "\n")
    with pytest.raises(SystemExit, match="begun with another adapter weights, data files"):
        run(world, capsys, *many)


def test_batch_without_its_data_is_no_fault_of_its_lines(world, capsys):
    (world / "in.jsonl").write_text('{"id": "a", "image": "raw/q0.png", "question": "0"}')
    (world / "data").rename(world / "gone")
    with pytest.raises(SystemExit, match="needs the prepared knowledge base: give --data"):
        run(world, capsys, "--batch", world / "in.jsonl", "--out", world / "out.jsonl")
    assert not (world / "out.jsonl").exists() and "is gone: going on without" in capsys.readouterr().err


def test_second_batch_into_a_file_is_refused(world, capsys, fakes, many):
    """While the first asks, another wants the same --out, and gets it afterwards."""
    act, said = fakes.policy.act, []

    def interrupted(*asked, **how):
        fakes.policy.act = act
        with pytest.raises(SystemExit) as refused:
            tool.main(["--run", str(world / "run"), *map(str, many)])
        said.append(str(refused.value))
        return act(*asked, **how)

    fakes.policy.act = interrupted
    run(world, capsys, *many)
    assert len(said) == 1 and re.search("in use by another process .* another --out", said[0])
    assert "4 were done before" in run(world, capsys, *many)


def test_batch_of_a_whole_run(world, capsys, fakes):
    trec(world / "r.trec", ["q%200", "q%201"], [("blue", .2), ("red", .3)])
    run(world, capsys, "--batch", world / "r.trec", "--out", world / "out.jsonl")
    assert [(line["id"], line["candidates"][0]["name"]) for line in lines_of(world / "out.jsonl")] == [
        ("q%200", ENTITIES[1]), ("q%201", ENTITIES[2])]
    run(world, capsys, "--batch", world / "r.trec", "--out", world / "out.jsonl", "--trec", world / "new.trec")
    assert len(fakes.policy.asked) == 1  # nothing was left to do
    quoted = [ENTITIES[k].replace(" ", "%20") for k in (1, 2)]
    assert read_trec(world / "new.trec") == {"q%200": quoted, "q%201": quoted[::-1]}
    assert (world / "new.trec").read_text().splitlines()[0] == f"q%200 Q0 {quoted[0]} 1 1 region-r1"  # its cosine


def test_run_of_a_batch_leaves_errors_out(world, capsys, many):
    with pytest.raises(SystemExit):
        tool.main(["--run", str(world / "run"), *map(str, many), "--trec", str(world / "new.trec")])
    found = read_trec(world / "new.trec")
    assert set(found) == {"b0", "b1", "b2", "q%200"} and found["b1"] == ["blue", "purple", "red", "green"]


# --------------------------------------------------------------------------------------------------- the shipped models

def noise(seed, size=(140, 112)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


def test_command_with_the_shipped_models(tmp_path, monkeypatch, capsys):
    """The whole command against the leaves put together by hand."""
    folder = tmp_path / "c"
    folder.mkdir()
    for i in range(5):
        noise(i).save(folder / f"{i}.png")
    (folder / "3.txt").write_text("A beetle with blue spots")
    noise(9, (224, 168)).save(tmp_path / "q.png")
    question = "Where does this beetle live?"
    monkeypatch.chdir(ROOT)
    tool.main(["--policy", "mini/policy", "--scorer", "mini/scorer", "--image", str(tmp_path / "q.png"), "--question",
               question, "--candidates", str(folder), "--threshold", "0", "--json", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    policy, scorer, image = load_policy("mini/policy"), load_scorer("mini/scorer"), noise(9, (224, 168))
    action = policy.act([image], [question], force="REGION")[0]  # above 0 is every p(REGION | x)
    texts = np.zeros((5, scorer.dim), np.float32)
    texts[3] = scorer.text_features(["A beetle with blue spots"])[0]
    pool = fuse(scorer.image_features([noise(i) for i in range(5)]), texts)
    before, after = (scores(scorer.image_features([view])[0], pool) for view in (image, crop(image, action.box)))
    assert found["decision"] == "REGION" and found["text"] == action.text
    np.testing.assert_allclose(found["box"], action.box)
    np.testing.assert_allclose(found["p_region"], action.p_region, rtol=1e-4)
    rows = sorted(found["candidates"], key=lambda row: row["index"])
    np.testing.assert_allclose([row["score"] for row in rows], after, atol=1e-5)
    np.testing.assert_allclose([row["score_before"] for row in rows], before, atol=1e-5)
    assert [row["name"] for row in found["candidates"]] == [str(k) for k in np.argsort(-after, kind="stable")]
