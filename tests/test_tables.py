"""Tables 6, 7, 8 and TREC runs: tools/rescore.py, crop_quality.py, retrieve.py and trec.py on a small evaluation.

The four queries, their images and the scripted policy are those of test_evaluate.py: red left, blue right, pools of
[purple, red, blue, green]; the policy says REGION left .9, FULL .1, REGION left .8, REGION left .6.
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
import torch
from PIL import Image
from test_evaluate import ALL, FIELDS, LEFT, RIGHT, ColourScorer, ranks, rows_of, run_main, world  # noqa: F401

import evaluate
from scorer import InputError, Query, load_data, lock_folder, read_json, scores, write_array, write_json
from tools import crop_quality, report, rescore, retrieve, trec
from tools import rows as tool_rows


class RedBlind(ColourScorer):
    """Sees no red at all, so purple is blue to it; texts weigh nothing."""
    name, dim = "open:red/blind", 2

    def image_features(self, images):
        return super().image_features(images)[:, 1:] + np.float32(1)  # a red image would have no direction

    def text_features(self, texts):
        return np.zeros((len(texts), 2), np.float32)


@pytest.fixture
def rows(world, monkeypatch):  # noqa: F811
    """(arguments, what was loaded) after an evaluation; the tools load the same fakes."""
    arguments, loaded = world
    run_main(arguments)
    loaded.scorers = {"colours": loaded.scorer, "blind to red": RedBlind()}
    for module in (rescore, tool_rows):
        monkeypatch.setattr(module, "load_scorer", lambda name, device, dtype=None: loaded.scorers[name])
    loaded.scorer.encoded = 0
    return arguments, loaded


def refused(tool, arguments, *more):
    with pytest.raises(SystemExit) as error:
        tool.main([*arguments, *more])
    assert str(error.value).startswith(tool.__name__)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- Table 6: the scorer

def test_other_scorer_against_the_plain_way(rows, tmp_path, capsys):
    arguments, _ = rows
    rescore.main([*arguments, "--scorer", "blind to red", "--batch-size", "3"])
    data, scorer = load_data(str(tmp_path / "data"), "test"), RedBlind()
    colours = scorer.image_features([Image.open(tmp_path / "raw" / f"e{k}.png").convert("RGB") for k in range(4)])
    for name in ("full", "zeroshot", "policy"):
        again = rows_of(arguments, f"{name}@blind-to-red")
        for i, (row, before) in enumerate(zip(again, rows_of(arguments, name), strict=True)):
            assert list(row) == list(before)
            for field in ("query_id", "decision", "box", "labels", "positives", "kind", "iou"):  # the actions stay
                assert row[field] == before[field]
            view = data.open_image(i)
            view = view.crop([int(v) for v in row["box"]]) if row["box"] else view
            assert row["scores"] == pytest.approx(scores(scorer.image_features([view])[0], colours), abs=1e-6)
            assert row["full_rank"] == rows_of(arguments, "full@blind-to-red")[i]["rank"]
    # q0's crop is red, which it cannot see: (1, 1) like the red candidate itself, rank 1; its full image is blue to it.
    assert [row["rank"] for row in rows_of(arguments, "policy@blind-to-red")][0] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{'Table 6':44}" + "".join(f"{c:>9}" for c in rescore.COLUMNS)
    # By hand: the rows of evaluate.py rank 2, 1, 5, 3 and 1, 1, 5, 3.
    assert lines[1].split() == ["full", "colours", "0.250", "0.750", "0.750", "0.333", "1.000", "1.000"]
    assert lines[3].split() == ["policy", "colours", "0.500", "0.750", "0.750", "0.667", "1.000", "1.000"]
    assert [line.split()[:2] for line in lines[4:7]] == [[name, "blind"] for name in ("full", "zeroshot", "policy")]


def test_texts_and_missing_texts(rows, tmp_path, monkeypatch):
    """A row of zeros in kb_text.npy marks an entity without text: the other scorer must not embed one either. Entity 2
    has one, and its text weighs in the other scorer's sum (Eq. 3)."""
    arguments, loaded = rows
    texts = np.zeros((4, 3), np.float16)
    texts[2] = 1
    write_array(tmp_path / "data" / "kb_text.npy", texts)
    asked = []

    def text_features(self, given):
        asked.append(given)
        return np.full((len(given), 2), (300, 0), np.float32)

    monkeypatch.setattr(RedBlind, "text_features", text_features)
    rescore.main([*arguments, "--scorer", "blind to red"])
    assert asked == [[""]]  # the text of entity 2 is empty in kb.jsonl, which only this test makes possible
    # Full image: green 0, blue 127.5, both + 1. Candidate 2, blue: (0 + 1, 255 + 1) + (300, 0).
    wanted = scores(np.array([1, 128.5]), np.array([[301, 256]]))[0]
    assert rows_of(arguments, "full@blind-to-red")[0]["scores"][2] == pytest.approx(wanted, abs=1e-6)


def test_unreadable_query_keeps_the_pools_order(rows, tmp_path):
    arguments, _ = rows
    (tmp_path / "raw" / "q0.png").unlink()
    run_main(arguments)
    rescore.main([*arguments, "--scorer", "blind to red"])
    found = rows_of(arguments, "policy@blind-to-red")
    assert found[0]["rank"] == 2 and found[0]["unreadable"] and len(found) == 4  # red is second in the pool
    (tmp_path / "raw" / "e0.png").unlink()  # a candidate's
    assert "e0.png" in refused(rescore, arguments, "--scorer", "blind to red")


def test_fuse_by_hand(rows, capsys):
    """q0: full (1, 0, 1)/sqrt 2 and red crop (1, 0, 0), a quarter crop: (.75 * .7071 + .25, 0, .75 * .7071) =
    (.7803, 0, .5303) of length .9435; cosine with red .7803/.9435, with purple (.7803 + .5303)/(sqrt 2 * .9435)."""
    arguments, loaded = rows
    rescore.main([*arguments, "--fuse", ".25"])
    q0, q1 = rows_of(arguments, "policy+fuse")[:2]
    assert q0["scores"][1] == pytest.approx(.7803 / .9435, abs=1e-3)
    assert q0["scores"][0] == pytest.approx((.7803 + .5303) / (2**.5 * .9435), abs=1e-3)
    assert (q0["rank"], q0["full_rank"], q0["box"]) == (2, 2, list(LEFT))
    assert q1["decision"] == "FULL" and q1["scores"] == rows_of(arguments, "full")[1]["scores"]
    assert loaded.scorer.encoded == 3  # the crops; the full image is stored
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["full", "policy", "policy+fuse"]


@pytest.mark.parametrize("weight, like", [("0", "full"), ("1", "policy")])
def test_fuse_ends(rows, weight, like):
    rescore.main([*rows[0], "--fuse", weight, "--batch-size", "1"])
    for fused, plain in zip(rows_of(rows[0], "policy+fuse"), rows_of(rows[0], like), strict=True):
        assert fused["scores"] == pytest.approx(plain["scores"], abs=1e-6) and fused["rank"] == plain["rank"]


@pytest.mark.parametrize("name, part", [("a/b@1", "a-b-1"), ("open_clip:ViT-B-32/openai", "open_clip-ViT-B-32-openai"),
                                        ("../x y", "..-x-y")])
def test_slug(name, part, tmp_path):
    assert rescore.slug(name) == part
    (tmp_path / "large model").mkdir()
    assert rescore.slug(f"{tmp_path}/large model/") == "large-model"


@pytest.mark.parametrize("tool, wrong", [
    (rescore, []), (rescore, ["--fuse", "1.1"]), (rescore, ["--scorer", "a/b", "--scorer", "a:b"]),
    (crop_quality, ["--proxy", "yolo=x"]), (crop_quality, ["--judge", "file:///etc/hosts"]),
    (crop_quality, ["--judge-limit", "-1"]), (retrieve, ["--batch-size", "0"]), (trec, ["--run-file", "x"]),
    (trec, ["--run-file", "a/b=c"]), (trec, ["--run-file", "policy=c"]), (trec, ["--run-file", "truth=c"]),
    (trec, ["--run-file", "a@b=c"]), (trec, ["--run-file", "a=b", "--run-file", "a=c"])])
def test_wrong_flags(tool, wrong):
    with pytest.raises(SystemExit) as error:
        tool.main(wrong)
    assert error.value.code == 2


TOOLS = [(rescore, ["--fuse", ".5"]), (crop_quality, []), (retrieve, []), (trec, [])]


@pytest.mark.parametrize("tool, more", TOOLS)
def test_rows_that_are_not_there_or_of_other_pools(rows, tmp_path, tool, more):
    arguments, _ = rows
    assert "is of split 'test', not 'val': run `python evaluate.py" in refused(tool, arguments, *more, "--split", "val")
    with lock_folder(tmp_path / "run" / "eval", "--out"):
        assert "in use by another process" in refused(tool, arguments, *more)
    file = tmp_path / "run" / "eval" / "test.policy.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace('"labels": [0, 1, 0, 0]', '"labels": [1, 0, 0, 0]'))
    assert "test.policy.jsonl:1: query 'q0' does not match that line of" in refused(tool, arguments, *more)
    file.write_text(whole.replace("q3", "q4"))
    assert "test.policy.jsonl:4: query 'q4' does not match" in refused(tool, arguments, *more)
    file.write_text(whole[:whole.rindex("{")])
    assert "test.policy.jsonl has 3 rows" in refused(tool, arguments, *more)
    if tool is not trec:
        run_main(arguments, "--methods", "full")  # the rows of policy are of an evaluation before
        assert "run evaluate.py" in refused(tool, arguments, *more)
    (tmp_path / "run" / "eval" / "metrics.json").unlink()
    assert "metrics.json is missing: no evaluation has finished here" in refused(tool, arguments, *more)


@pytest.mark.parametrize("tool, more", [(rescore, ["--scorer", "blind to red", "--fuse", ".5"]), *TOOLS[1:]])
def test_first_queries_alone(rows, tool, more):
    """Rows of evaluate.py --limit 2 are taken as they are."""
    arguments, _ = rows
    run_main(arguments, "--limit", "2")
    tool.main([*arguments, *more])


# ------------------------------------------------------------------------------------------------ Table 7: the regions

def test_regions_against_true_boxes(rows, capsys):
    """policy: q0 hits (IoU 1, contained), q3 looks left where the truth is right (0 and 0); q2 has no truth."""
    arguments, _ = rows
    crop_quality.main(arguments)
    assert rows_of(arguments, "policy.quality") == [
        {"query_id": "q0", "box": list(LEFT), "target": list(LEFT), "iou": 1, "containment": 1, "judge": None},
        {"query_id": "q2", "box": list(LEFT), "target": None, "iou": None, "containment": None, "judge": None},
        {"query_id": "q3", "box": list(LEFT), "target": list(RIGHT), "iou": 0, "containment": 0, "judge": None}]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Table 7            crops     IoU  containment   target: true boxes"
    assert lines[1:3] == [f"{'always':16}       3    0.67         0.67", f"{'policy':16}       2    0.50         0.50"]
    # By kind: q1 is the landmark, q0 and q3 the species; the true box fixes both species and spoils the landmark, which
    # the full image ranks first: no crop is asked for, so its box does not count.
    heads = "  CondR@1   crop %      IoU   help %   hurt %"
    assert lines[4:6] == [f"by kind         {'landmark, n = 1':^46}{'species, n = 2':^46}", " " * 16 + 2 * heads]
    found = {line.split()[0]: line.split()[1:] for line in lines[6:]}
    assert list(found) == [*ALL]
    assert found["always"] == "0.000 100.0 - 0.0 100.0 0.500 100.0 0.50 50.0 0.0".split()
    assert found["truth"] == "0.000 100.0 - 0.0 100.0 1.000 100.0 1.00 100.0 0.0".split()
    assert found["full"] == "1.000 0.0 - 0.0 0.0 0.000 0.0 - 0.0 0.0".split()


def test_kind_of_a_query_without_a_positive(rows, tmp_path, capsys):
    """One kind, the right half true everywhere: of four crops to the left (IoU 0) three are of queries with a positive,
    and one of these three ranks it first. The box of q2, which has none and is right (IoU 1), counts nowhere."""
    facts = [json.dumps({"image": f"q{i}.png", "box": RIGHT if i != 2 else LEFT, "kind": "x"}) for i in range(4)]
    (tmp_path / "raw" / "truth.jsonl").write_text("\n".join(facts))
    run_main(rows[0])
    capsys.readouterr()
    crop_quality.main(rows[0])
    lines = capsys.readouterr().out.splitlines()
    assert f"{'by kind':16}{'x, n = 3':^46}" in lines
    always = next(line for line in reversed(lines) if line.startswith("always"))
    assert always.split()[1:] == ["0.333", "100.0", "0.00", "33.3", "33.3"]


def test_no_targets_at_all(rows, tmp_path, capsys):
    (tmp_path / "raw" / "truth.jsonl").unlink()
    run_main(rows[0])
    crop_quality.main(rows[0])
    printed = capsys.readouterr().out
    assert "no crop has a target" in printed and "by kind" not in printed


def test_contains_and_keyword():
    contained = {((0, 0, 10, 10), (0, 0, 10, 10)): 1, ((0, 0, 10, 10), (2, 3, 10.2, 8)): 0,
                 ((0, 0, 10, 10), (2, 3, 8, 10.2)): 0, ((1, 0, 10, 10), (0, 0, 10, 10)): 0,
                 ((0, 1, 10, 10), (0, 0, 10, 10)): 0,
                 ((.7, .2, 9.1, 9.9), (0, 0, 10, 10)): 1}  # the crop takes whole pixels: 0, 0, 10, 10
    assert {pair: crop_quality.contains(*pair) for pair in contained} == contained
    words = {"Where does this beetle live?": "beetle", "Who designed the building?": "building", "What is it?": None,
             "What is the closest parent taxonomy of this bird-of-prey?": "bird-of-prey", "": None,
             "THIS Moth eats what?": "moth"}
    assert {question: crop_quality.keyword(question) for question in words} == words


def test_proxy_targets(rows, tmp_path, monkeypatch, capsys):
    """A detector instead of the truth: what it finds is the target; what it does not find is counted by reason. A
    detector that dies is not asked again for what it found."""
    arguments, _ = rows
    asked = []

    def detect(image, word):
        asked.append((image.size, word))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return RIGHT if word == "beetle" else None

    monkeypatch.setattr(crop_quality, "load_detector", lambda name, device: detect)
    path = tmp_path / "data" / "test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, question in zip(lines, ("Where does this beetle live?", "this", "What is it?", "What is this fly?")):
        line["question"] = question
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = read_json(tmp_path / "data" / "manifest.json", "")
    manifest["files"]["test.jsonl"]["bytes"] = path.stat().st_size
    write_json(tmp_path / "data" / "manifest.json", manifest)
    with pytest.raises(KeyboardInterrupt):
        crop_quality.main([*arguments, "--proxy", "groundingdino=some/model"])
    crop_quality.main([*arguments, "--proxy", "groundingdino=some/model"])
    assert asked == [((64, 64), "beetle"), *[((64, 64), "fly")] * 2]  # q1 is not cropped; q2 names nothing
    assert [(row["target"], row["iou"]) for row in rows_of(arguments, "policy.quality")] == [
        (list(RIGHT), 0), (None, None), (None, None)]
    printed = capsys.readouterr().out
    assert "target: groundingdino=some/model" in printed and "policy                 1    0.00         0.00" in printed
    assert "1 queries without a target: no keyword" in printed
    assert "1 queries without a target: nothing detected" in printed
    assert not (tmp_path / "run" / "eval" / "test.quality.part").exists()


def tiny_detector(folder):
    """A GroundingDINO of random weights with a nine-word tokenizer, as a local folder."""
    from transformers import (BertConfig, BertTokenizerFast, GroundingDinoConfig, GroundingDinoForObjectDetection,
                              GroundingDinoImageProcessor, GroundingDinoProcessor, SwinConfig)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "beetle", "animal"]
    swin = SwinConfig(image_size=96, embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage2", "stage3", "stage4"])
    bert = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16)
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(GroundingDinoConfig(
        backbone_config=swin.to_dict(), text_config=bert.to_dict(), d_model=32, num_queries=5, encoder_layers=1,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_text_len=16, disable_custom_kernels=True)).save_pretrained(folder)
    GroundingDinoProcessor(GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}),
                           BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})).save_pretrained(folder)
    return str(folder)


def test_detector_is_transformers_own(tmp_path):
    """Through the Auto classes; against the model's raw outputs: its best query's (cx, cy, w, h), times the sides."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
    folder = tiny_detector(tmp_path / "detector")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    box = crop_quality.load_detector(folder, "cpu")(image, "beetle")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        raw = model(**processor(images=image, text="beetle.", return_tensors="pt"))
    best = raw.logits[0].sigmoid().max(-1).values.argmax()
    cx, cy, w, h = raw.pred_boxes[0, best].tolist()
    wanted = ((cx - w / 2) * 60, (cy - h / 2) * 40, (cx + w / 2) * 60, (cy + h / 2) * 40)
    assert box == pytest.approx([min(max(0, v), side) for v, side in zip(wanted, (60, 40, 60, 40))], abs=1e-4)
    with pytest.raises(InputError, match="groundingdino=.*nothing here"):
        crop_quality.load_detector(str(tmp_path / "nothing here"), "cpu")


@pytest.fixture
def judge():
    """A local server in the manner of OpenAI: says what .says holds, in turn; a number there is an HTTP error, "cut" an
    answer that breaks off."""
    seen = SimpleNamespace(says=[], requests=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.requests.append((self.path, self.headers.get("Authorization"), body))
            say = seen.says[(len(seen.requests) - 1) % len(seen.says)]
            answer = json.dumps({"choices": [{"message": {"content": say}}]}).encode()
            answer = b"no such key" if isinstance(say, int) else answer
            self.send_response(say if isinstance(say, int) else 200)
            self.send_header("Content-Length", str(len(answer) + 10 * (say == "cut")))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield seen
    server.shutdown()
    server.server_close()


def test_judge(rows, judge, monkeypatch, capsys):
    arguments, _ = rows
    judge.says = ["**YES**", "No.", "Perhaps"]
    monkeypatch.setenv("JUDGE_KEY", "secret")
    crop_quality.main([*arguments, "--judge", judge.url, "--judge-model", "m", "--judge-key-env", "JUDGE_KEY"])
    assert [row["judge"] for row in rows_of(arguments, "policy.quality")] == [True, False, None]
    assert [row["judge"] for row in rows_of(arguments, "always.quality")] == [None] * 4  # only the policy's are asked
    assert "judge m: YES for 0.33 of 3 crops of the policy, 1 answers neither" in capsys.readouterr().out
    path, key, body = judge.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "m"
    text, picture = body["messages"][0]["content"]
    assert "What is this, 0" in text["text"]
    head, data = picture["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as crop:  # the left half alone, and it is red
        assert crop.size == (32, 64) and crop.getpixel((16, 32))[0] > 240 and crop.getpixel((16, 32))[2] < 15


@pytest.mark.parametrize("says, asked, result", [
    ([503, 429, "yes"], 3, True), (["cut", "no"], 2, False), (["YES and no"], 1, None), ([None], 1, None),
    ([401], 1, "401.*no such key"),  # a wrong key gets no better by waiting
    ([500], 3, "500"), ([[{"type": "text", "text": "YES"}]], 3, "judge")])  # an answer in parts is another interface
def test_judge_that_is_busy_or_refuses(judge, says, asked, result):
    judge.says = says
    arguments = (judge.url + "/chat/completions/", "m", "", Image.new("RGB", (8, 8)), "?", (0, 0))
    if isinstance(result, str):
        with pytest.raises(InputError, match=result):
            crop_quality.ask_judge(*arguments)
    else:
        assert crop_quality.ask_judge(*arguments) is result
    assert len(judge.requests) == asked
    assert judge.requests[0][:2] == ("/v1/chat/completions", None)  # no key, no header


def test_judge_is_asked_evenly_and_once(rows, judge, monkeypatch):
    arguments, _ = rows
    judge.says = ["yes", 401]  # the second of q0, q2, q3 is refused ...
    assert "401" in refused(crop_quality, arguments, "--judge", judge.url)
    judge.says = ["no"]  # ... and the next run goes on from there
    crop_quality.main([*arguments, "--judge", judge.url])
    assert [row["judge"] for row in rows_of(arguments, "policy.quality")] == [True, False, False]
    assert len(judge.requests) == 4
    judge.requests.clear()
    crop_quality.main([*arguments, "--judge", judge.url, "--judge-limit", "2"])
    texts = [body["messages"][0]["content"][0]["text"] for _, _, body in judge.requests]
    assert ["this, 0" in texts[0], "this, 2" in texts[1]] == [True, True] and len(texts) == 2
    assert [row["judge"] for row in rows_of(arguments, "policy.quality")] == [False, False, None]
    # Verdicts of other boxes, another judge or another model are not taken.
    judge.says = ["yes", 401]
    assert "401" in refused(crop_quality, arguments, "--judge", judge.url)
    judge.says = ["no"]
    crop_quality.main([*arguments, "--judge", judge.url, "--judge-model", "another"])
    assert [row["judge"] for row in rows_of(arguments, "policy.quality")] == [False] * 3


# ------------------------------------------------------------------------------------------- Table 8: retrieving again

def test_retrieval_by_hand(rows, capsys):
    """With the whole knowledge base as pool and image features alone, retrieval ranks as the pools do: q0 2 -> 1, q1
    stays 1, q3 stays 3; q2's entity is not in the knowledge base at all."""
    arguments, loaded = rows
    retrieve.main([*arguments, "--batch-size", "2"])
    assert loaded.scorer.encoded == 3  # the crops alone
    found = rows_of(arguments, "policy", "eval/retrieval")
    assert [row["rank"] for row in found] == [1, 1, 5, 3] and [row["full_rank"] for row in found] == [2, 1, 5, 3]
    assert [row["decision"] for row in found] == ["REGION", "FULL", "REGION", "REGION"]
    full = rows_of(arguments, "full", "eval/retrieval")
    assert [row["rank"] for row in full] == [2, 1, 5, 3] and {row["decision"] for row in full} == {"FULL"}
    assert found[0]["labels"] == [1, 0, 0, 0] and found[0]["positives"] == ["https://w/entity 1"]
    assert found[0]["scores"] == pytest.approx([1, 2**-.5, 0, 0], abs=1e-3)  # red, purple, then blue and green
    assert list(found[0]) == ["query_id", "positives", "decision", "labels", "scores", "rank", "full_rank"]
    assert capsys.readouterr().out.splitlines() == ["Table 8              R@1     R@5    R@10    R@20",
                                                    "full               0.250   0.750   0.750   0.750",
                                                    "policy             0.500   0.750   0.750   0.750"]


def test_retrieval_needs_positives_and_the_datas_scorer(rows, tmp_path, monkeypatch):
    arguments, loaded = rows
    monkeypatch.setattr(evaluate, "load_data", None)  # a tool asks for nothing of a policy's
    loaded.scorer.fingerprint = lambda: np.array([0, 1, 0], np.float32)
    assert "was prepared with scorer colours" in refused(retrieve, arguments)
    path = tmp_path / "data" / "test.jsonl"
    text = path.read_text().replace('["https://w/entity 0"]', "[" + " " * 20 + "]")  # of the same length
    path.write_text(text)
    assert "test.jsonl:2: query 'q1' names no positives" in refused(retrieve, arguments)


# ---------------------------------------------------------------------------------------------- rankings in TREC's form

def their_run(folder, ranked={"q0": [1, 0, 2, 3], "q1": [3, 1], "q3": [2, 9, 0]}):
    """A TREC run from {query: pool entities, best first}; 9 is outside of every pool. Lines from last to first."""
    path = folder / "their.trec"
    path.write_text("".join(f"{query} Q0 https://w/entity%20{j} {rank} {9 - rank}.5 them\n"
                            for query, js in ranked.items() for rank, j in reversed(list(enumerate(js, 1)))))
    return path


def test_run_file_by_hand_and_by_trec_eval(rows, tmp_path, capsys):
    """q0: red first, rank 1. q1: green, red, then the missing purple (positive), blue: rank 3. q2: not in the file, and
    no positive anyway: 5. q3: blue (positive) first; entity 9 is passed over. And trec_eval's own code gives our
    numbers for every method, also with ties, which it would break by name."""
    arguments, _ = rows
    folder = tmp_path / "run" / "eval"
    before = read_json(folder / "metrics.json", "")
    trec.main([*arguments, "--run-file", f"Their-1={their_run(tmp_path)}"])
    assert ranks(arguments, "Their-1") == [1, 3, 5, 1]
    result = read_json(folder / "metrics.json", "")
    assert result["external"] == {"Their-1": {
        "file": "their.trec", "queries": 3, "queries_missing": 1, "candidates_missing": 2 + 2, "outside_pool": 1,
        "queries_unknown": 0}}
    row = rows_of(arguments, "Their-1")[1]
    assert row["decision"] == "FULL" and row["margin"] is None and row["full_margin"] is not None
    assert row["scores"] == [0, 3, 0, 4] and row["seconds"] is None and row["kind"] == "landmark"
    assert list(row) == FIELDS
    printed = capsys.readouterr().out
    assert ("Their-1: 3 queries from their.trec; not matched: queries missing 1, candidates missing 4, outside pool 1, "
            "queries unknown 0") in printed
    # MRR (1 + 1/3 + 0 + 1) / 4; R@1 of 2 in 4 queries, CondR@1 of 2 in 3.
    assert "Their-1            0.583   0.625   0.500   0.750   0.750   0.750 |    0.667    1.000    1.000  |" in printed

    with open(folder / "test.qrels") as file:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(file), {"recip_rank", "ndcg", "recall.1,5"})
    assert list(result["methods"]) == [*ALL, "Their-1"] and (folder / "test.truth.trec").exists()
    for name, ours in result["methods"].items():
        with open(folder / f"test.{name}.trec") as file:
            found = evaluator.evaluate(pytrec_eval.parse_run(file))
        assert len(found) == 4
        for key, theirs in (("MRR", "recip_rank"), ("NDCG", "ndcg"), ("R@1", "recall_1"), ("R@5", "recall_5")):
            assert np.mean([row[theirs] for row in found.values()]) == pytest.approx(ours[key]), (name, key)
    assert result["methods"].pop("Their-1")["crop_rate"] == 0
    assert {**before, "external": result["external"]} == result  # all else stays


def test_ids_verbatim_or_quoted(tmp_path):
    data = SimpleNamespace(queries=[Query("a b", "", "", []), Query("c", "", "", [])], pool=np.array([[0, 1], [1, 0]]))
    path = tmp_path / "r"
    path.write_text("a%20b Q0 u%20v 1 9 t\na%20b Q0 w 2 8 t\na%20b Q0 u%20v 3 7 t\nx Q0 w 1 9 t\nc Q0 é 1 9 t\n")
    found, counts = trec.match_run(data, str(path), {0: "é", 1: "u v"})
    assert found.tolist() == [[0, 2], [0, 2]]
    assert counts == {"file": "r", "queries": 2, "queries_missing": 0, "candidates_missing": 2, "outside_pool": 1,
                      "queries_unknown": 1}


def test_run_files_that_are_none(rows, tmp_path):
    assert "their.trec" in refused(trec, rows[0], "--run-file", f"their={tmp_path}/their.trec")
    (tmp_path / "their.trec").write_text("q0 Q0 e 1 .5\n")
    assert "their.trec:1: expected `query Q0" in refused(trec, rows[0], "--run-file", f"their={tmp_path}/their.trec")
    message = refused(trec, rows[0], "--run-file", f"their={their_run(tmp_path, {'x7': [1]})}")
    assert "none of its 1 queries ('x7' ...)" in message and "ids are like 'q0'" in message


def test_curve_goes_through_the_policys_own_choice(rows):
    """Threshold .5 is greedy. The base model points left on every query, with p .2: it crops all of them, or none."""
    run = report.open_run(report.parse_args(["--run", rows[0][3], "--resamples", "100"]))
    at_half = next(point for point in run.curve["policy"] if point["threshold"] == .5)
    assert [at_half[name] for name in ("crop_rate", "MRR", "CondR@1")] == [
        run.study.mean("policy", measure) for measure in ("crop", "MRR", "CondR@1")]
    assert {point["crop_rate"] for point in run.curve["zeroshot"]} == {0, 1}
    path = f"{rows[0][3]}/eval/test.always.jsonl"
    first, *others = rows_of(rows[0], "always")
    evaluate.write_rows(path, [{**first, "decision": "MALFORMED", "box": None}, *others])  # q0 has p and nothing to crop
    run = report.open_run(report.parse_args(["--run", rows[0][3], "--resamples", "100"]))
    assert run.curve["policy"][0]["crop_rate"] == 2 / 3  # of q0, q1, q3
    run_main(rows[0], "--methods", "policy")  # no forced boxes
    assert not report.open_run(report.parse_args(["--run", rows[0][3], "--resamples", "100"])).curve
