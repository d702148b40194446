"""evaluate.py beyond Tables 1, 2 and 4: thresholds, extensions, other re-rankers, Tables 6 to 8, resuming, saved rows.

The four queries, their images and the scripted policy are those of test_evaluate.py: red left, blue right, pools of
[purple, red, blue, green]; the policy says REGION left .9, FULL .1, REGION left .8, REGION left .6.
"""

import base64
import csv
import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import pytrec_eval
import torch
from PIL import Image
from test_evaluate import LEFT, RIGHT, SAYS, ColourScorer, ScriptedPolicy, build, ranks, run_main

import evaluate
from policy import Action
from rewards import metrics, summary
from scorer import Query, load_data, scores, write_json


class Policy(ScriptedPolicy):
    """ScriptedPolicy that can be sampled too: box n of query i is likelier the nearer n is to i. Counts its batches."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.batches, self.seeds, self.dies_at = 0, [], None

    def act(self, images, questions, **settings):
        self.batches += 1
        if self.batches == self.dies_at:
            raise KeyboardInterrupt
        return super().act(images, questions, **settings)

    def prompts(self, images, questions):
        return [int(question[-1]) for question in questions]

    def rollout(self, prompts, plans, decode, sample, seeds):
        self.seeds += seeds
        boxes = [LEFT, RIGHT, (0.0, 0.0, 64.0, 32.0), RIGHT]
        return [[SimpleNamespace(log_probs=[-5.0, -abs(n - prompt) / 2, -abs(n - prompt) / 2],
                                 action=Action("REGION", boxes[n], SAYS[prompt], f"sample {n}"))
                 for n in range(len(plan))] for prompt, plan in zip(prompts, plans)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(arguments, what was loaded): evaluate.main runs on fakes, on two policies and two scorers by name."""
    loaded = SimpleNamespace(scorers={"colours": ColourScorer(), "blind to red": RedBlind()}, policies={
        "scripted": Policy(), "another": Policy(p_region=[.2, .9, .2, .2], box=RIGHT)}, asked=[])
    monkeypatch.setattr(evaluate, "load_scorer", lambda name, device, dtype=None: loaded.scorers[name])

    def load_policy(name, adapter=None, **settings):
        loaded.asked.append((name, adapter and "adapter"))
        return loaded.policies[name]

    monkeypatch.setattr(evaluate, "load_policy", load_policy)
    return build(tmp_path), loaded


class RedBlind(ColourScorer):
    """Sees no red at all, so purple is blue to it; texts weigh nothing."""
    name, identity, dim = "blind to red", "open:red/blind@77", 2

    def image_features(self, images):
        return super().image_features(images)[:, 1:] + np.float32(1)  # a red image would have no direction

    def text_features(self, texts):
        return np.zeros((len(texts), 2), np.float32)


def rows_of(arguments, method, folder="eval"):
    with open(f"{arguments[3]}/{folder}/test.{method}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def without_seconds(rows):
    return [{**row, "seconds": None} for row in rows]


# ------------------------------------------------------------------------------------------- threshold, fuse, samples

def test_threshold_is_the_learned_policys_alone(world):
    arguments, _ = world
    result = run_main(arguments, "--threshold", ".85", "--methods", "policy,zeroshot")
    assert [row["decision"] for row in rows_of(arguments, "policy")] == ["REGION", "FULL", "FULL", "FULL"]
    assert result["threshold"] == .85
    run_main(arguments, "--threshold", ".05", "--methods", "policy,zeroshot")
    assert [row["decision"] for row in rows_of(arguments, "policy")] == ["REGION"] * 4
    assert [row["decision"] for row in rows_of(arguments, "zeroshot")] == ["FULL"] * 4  # p .2: a baseline stays greedy


def test_fuse_by_hand(world):
    """q0: full (1, 0, 1)/sqrt 2 and red crop (1, 0, 0), a quarter crop: (.75 * .7071 + .25, 0, .75 * .7071) =
    (.7803, 0, .5303) of length .9435; cosine with red .7803/.9435, with purple (.7803 + .5303)/(sqrt 2 * .9435)."""
    arguments, loaded = world
    result = run_main(arguments, "--fuse", ".25", "--methods", "policy")
    q0, q1 = rows_of(arguments, "policy+fuse")[:2]
    assert q0["scores"][1] == pytest.approx(.7803 / .9435, abs=1e-3)
    assert q0["scores"][0] == pytest.approx((.7803 + .5303) / (2**.5 * .9435), abs=1e-3)
    assert q1["decision"] == "FULL" and q1["scores"] == rows_of(arguments, "full")[1]["scores"]
    assert loaded.scorers["colours"].encoded == 3  # the crops of policy, shared; the full image is stored
    extras = result["extras"]["policy+fuse"]
    assert extras == {"weight": .25, "extra_seconds": 0, "extra_encodes": 0}


@pytest.mark.parametrize("weight, like", [("0", "full"), ("1", "policy")])
def test_fuse_ends(world, weight, like):
    arguments, _ = world
    run_main(arguments, "--fuse", weight)
    for fused, plain in zip(rows_of(arguments, "policy+fuse"), rows_of(arguments, like)):
        assert fused["scores"] == pytest.approx(plain["scores"], abs=1e-6)


def test_best_of_samples(world):
    arguments, loaded = world
    result = run_main(arguments, "--samples", "4", "--seed", "7", "--batch-size", "8", "--methods", "policy")
    rows = rows_of(arguments, "policy+best4")
    # The likeliest sample of query i is number i (log-probability 0 against -1, -2, ...); q1 is FULL and not sampled.
    assert [row["text"][-1] for row in rows if row["decision"] == "REGION"] == ["0", "2", "3"]
    assert [row["box"] for row in rows] == [list(LEFT), None, [0, 0, 64, 32], list(RIGHT)]
    assert loaded.policies["scripted"].seeds == [(7, 0), (7, 2), (7, 3)]  # by row, whatever the batches are
    assert [row["rank"] for row in rows] == [1, 1, 5, 1]  # q3's sample looks at the right half, which is right
    extras = result["extras"]["policy+best4"]
    assert extras["samples"] == 4 and extras["extra_seconds"] > 0 and extras["extra_encodes"] == 0


def test_best_boxes_of_the_real_policy(tmp_path):
    """Against the plain way: each query alone, each sample's probability by the training path, the largest wins."""
    import tiny_policy
    from policy import load_policy
    policy = load_policy(tiny_policy.build(tmp_path / "tiny"))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)) for _ in range(3)]
    data = SimpleNamespace(queries=[SimpleNamespace(question=f"What is this, {i}?") for i in range(3)],
                           open_image=lambda i: pictures[i])
    start = [evaluate.region(LEFT), evaluate.FULL_IMAGE, evaluate.region(LEFT)]
    found = evaluate.best_boxes(policy, data, start, 3, 5, 64, evaluate.Progress(), evaluate.Images(data))
    assert found[1] is evaluate.FULL_IMAGE
    for i in (0, 2):
        prompts = policy.prompts([pictures[i]], [data.queries[i].question])
        group = policy.rollout(prompts, [["REGION"] * 3], sample=True, seeds=[(5, i)])[0]
        with torch.no_grad():
            scored = policy.log_probs(prompts, [group])
        total = (scored["logp"] * scored["mask"]).sum(1)
        assert found[i].box == group[int(total.argmax())].action.box
        assert len({completion.action.box for completion in group}) > 1  # there was something to choose


@pytest.mark.parametrize("flags", [["--threshold", ".3"], ["--samples", "2"]])
def test_what_needs_the_grammar(world, flags):
    with pytest.raises(SystemExit, match="only --decode grammar"):
        evaluate.main([*world[0], "--decode", "free", *flags])


# ---------------------------------------------------------------------------------------------------- operating curve

def test_curve_against_the_slow_way():
    """Every point recomputed query by query, and its ends: all forced boxes, and none."""
    rng = np.random.default_rng(3)
    labels = np.zeros((60, 5), int)
    labels[np.arange(50), rng.integers(0, 5, 50)] = 1  # ten queries without a positive
    p = rng.random(60).round(2)

    def make(values, decision):
        return [{"decision": decision, "p_region": p[i], "scores": values[i].tolist(), "labels": labels[i].tolist()}
                for i in range(60)]

    full, always = make(rng.random((60, 5)), "FULL"), make(rng.random((60, 5)), "REGION")
    always[7]["decision"] = "MALFORMED"  # nothing to crop to, whatever p says
    points = evaluate.operating_curve(full, always)
    assert len(points) > 30 and [point["threshold"] for point in points] == sorted(p["threshold"] for p in points)
    for point in points:
        chosen = [always[i] if p[i] > point["threshold"] and i != 7 else full[i] for i in range(60)]
        means = summary(metrics([row["scores"] for row in chosen], labels))
        assert point["MRR"] == pytest.approx(means["MRR"]) and point["CondR@1"] == pytest.approx(means["CondR@1"])
        assert point["crop_rate"] == pytest.approx(sum(row["decision"] == "REGION" for row in chosen) / 60)
    assert points[0]["crop_rate"] == 59 / 60 and points[-1]["crop_rate"] == 0


def test_curve_in_metrics(world):
    arguments, _ = world
    result = run_main(arguments)
    at_half = next(point for point in result["curve"]["policy"] if point["threshold"] == .5)
    policy, oracle = result["methods"]["policy"], result["methods"]["oracle"]
    assert at_half == {"threshold": .5, **{name: policy[name] for name in ("crop_rate", "MRR", "CondR@1")}}
    assert result["curve"]["oracle"] == {name: oracle[name] for name in ("crop_rate", "MRR", "CondR@1")}
    # The base model points left on every query: the two thresholds below its p of .2 crop all, those above none.
    assert {point["crop_rate"] for point in result["curve"]["zeroshot"]} == {0, 1}


def test_no_curve_without_probabilities(world):
    arguments, _ = world
    rows = [{"decision": "REGION", "p_region": None, "scores": [1.0, .5], "labels": [1, 0]}]
    assert evaluate.operating_curve(rows, rows) is None
    assert "policy" not in run_main(arguments, "--methods", "policy")["curve"]  # no forced boxes


# ------------------------------------------------------------------------------------------------ other base models

def test_second_base_model(world, capsys):
    arguments, loaded = world
    result = run_main(arguments, "--zeroshot-policy", "another")
    assert loaded.asked == [("scripted", "adapter"), ("another", None)]  # without the adapter, which is not its own
    assert ranks(arguments, "zeroshot2") == [2, 2, 5, 3]  # crops q1 alone, to its right half, wrongly
    assert list(result["methods"])[4:6] == ["zeroshot_always", "zeroshot2"]
    assert result["models"]["zeroshot2"] == "another" and "zeroshot2 is another" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- re-rankings by other programs

RANKED = {"q0": [1, 0, 2, 3], "q1": [3, 1], "q3": [2, 9, 0]}  # pool entities, best first; 9 is outside of every pool


def run_file(folder, form, ranked):
    """A result file in one of three forms."""
    path, names = folder / f"their.{form}", {q: [f"https://w/entity {j}" for j in js] for q, js in ranked.items()}
    if form == "trec":
        path.write_text("".join(f"{q} Q0 {e.replace(' ', '%20')} {r} {9 - r}.5 them\n"
                                for q, es in names.items() for r, e in reversed(list(enumerate(es, 1)))))
    elif form == "omgm":
        path.write_text(json.dumps({q: {"retrieved_entities": [{"url": e, "title": "t"} for e in es],
                                        "retrieval_similarities": [.5] * len(es)} for q, es in names.items()}))
    elif form == "retrieved":
        path.write_text(json.dumps({q: {"retrieved_entries": es} for q, es in names.items()}))
    else:  # reranked entries stand beside what was retrieved, and with one entity a section they can repeat
        path.write_text(json.dumps({q: {"retrieved_entries": es[::-1], "reranked_entries": [es[0], *es]}
                                    for q, es in names.items()}))
    return path


@pytest.mark.parametrize("form", ["trec", "omgm", "retrieved", "reranked"])
def test_run_files_by_hand(world, tmp_path, form, capsys):
    """q0: red first, rank 1. q1: green, red, then the missing purple (positive), blue: rank 3. q2: not in the file, and
    no positive anyway: 5. q3: blue (positive) first; entity 9 is passed over."""
    arguments, _ = world
    path = run_file(tmp_path, form, RANKED)
    result = run_main(arguments, "--run-file", f"Their-1={path}", "--methods", "full")
    assert ranks(arguments, "Their-1") == [1, 3, 5, 1]
    counts = result["external"]["Their-1"]
    assert counts == {"file": path.name, "format": {"trec": "trec", "omgm": "omgm"}.get(form, "echosight"),
                      "queries": 3, "queries_missing": 1, "candidates_missing": 2 + 2, "outside_pool": 1,
                      "queries_unknown": 0}
    row = rows_of(arguments, "Their-1")[1]
    assert row["decision"] == "FULL" and row["margin"] is None and row["full_margin"] is not None
    assert row["scores"] == [0, 3, 0, 4] and result["methods"]["Their-1"]["crop_rate"] == 0
    assert f"Their-1: 3 queries from {path.name}" in capsys.readouterr().out


def test_our_own_run_comes_back(world):
    arguments, _ = world
    run_main(arguments)
    run_main(arguments, "--run-file", f"again={arguments[3]}/eval/test.always.trec", "--methods", "full")
    assert ranks(arguments, "again") == ranks(arguments, "always")


def test_prior_works_query_ids():
    """EchoSight counts E-VQA's rows as E-VQA_<i>, prepare.py as E-VQA_<split>_<i>; blanks in ids may be quoted."""
    data = SimpleNamespace(split="test", entity=lambda j: {"entity_id": f"https://w/a {j}"}, queries=[
        Query("E-VQA_test_3", "i", "q", [5, 6], [0, 1], [0, 1], [.9, .8])])
    found, counts = evaluate.match_run(data, {"E-VQA_3": ["https://w/a%206"], "E-VQA_4": []}, "file")
    assert found.tolist() == [[0, 2]] and counts["queries"] == 1 and counts["queries_unknown"] == 1


@pytest.mark.parametrize("content, complaint", [
    ("q0 Q0 e 1 .5\n", r"their.txt:1: expected `query Q0"), ("q0 Q0 e one .5 t\n", "their.txt:1"),
    ('{"q0": ', "not whole JSON"), ('{"q0": {"top_20": []}}', "'q0' has none of reranked_entries"),
    ('{"x7": {"retrieved_entries": []}}', "none of its 1 queries .'x7'.* ids are like 'q0'")])
def test_run_files_that_are_none(world, tmp_path, content, complaint):
    (tmp_path / "their.txt").write_text(content)
    with pytest.raises(SystemExit, match=complaint):
        evaluate.main([*world[0], "--methods", "full", "--run-file", f"their={tmp_path}/their.txt"])


def test_trec_eval_gives_our_recalls(world, tmp_path):
    """trec_eval's own code on our run files: reciprocal rank, NDCG, recall; of extensions and other programs too."""
    arguments, _ = world
    path = run_file(tmp_path, "omgm", RANKED)
    result = run_main(arguments, "--fuse", ".5", "--samples", "2", "--run-file", f"their={path}")
    with open(f"{arguments[3]}/eval/test.qrels") as file:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(file), {"recip_rank", "ndcg", "recall.1,5"})
    assert {"policy+fuse", "policy+best2", "their"} < result["methods"].keys()
    for name, ours in result["methods"].items():
        with open(f"{arguments[3]}/eval/test.{name}.trec") as file:
            found = evaluator.evaluate(pytrec_eval.parse_run(file))
        for key, theirs in (("MRR", "recip_rank"), ("NDCG", "ndcg"), ("R@1", "recall_1"), ("R@5", "recall_5")):
            assert np.mean([row[theirs] for row in found.values()]) == pytest.approx(ours[key]), (name, key)


# ------------------------------------------------------------------------------------------------- Table 6: the scorer

def test_other_scorer_against_the_plain_way(world, tmp_path):
    arguments, loaded = world
    result = run_main(arguments, "--test-scorer", "blind to red")
    assert result["test_scorers"].keys() == {"open-red-blind"}
    data, scorer = load_data(str(tmp_path / "data"), "test"), RedBlind()
    colours = scorer.image_features([Image.open(tmp_path / "raw" / f"e{k}.png").convert("RGB") for k in range(4)])
    for name in ("full", "zeroshot", "policy"):
        again = rows_of(arguments, f"{name}@open-red-blind")
        for i, (row, before) in enumerate(zip(again, rows_of(arguments, name))):
            assert row["decision"] == before["decision"] and row["box"] == before["box"]  # the actions stay
            view = data.open_image(i)
            view = view.crop([int(v) for v in row["box"]]) if row["box"] else view
            assert row["scores"] == pytest.approx(scores(scorer.image_features([view])[0], colours), abs=1e-6)
    # q0's crop is red, which it cannot see: (1, 1) like the red candidate itself, rank 1; its full image is blue to it.
    assert [row["rank"] for row in rows_of(arguments, "policy@open-red-blind")][0] == 1
    numbers = result["test_scorers"]["open-red-blind"]
    assert numbers["scorer"] == "open:red/blind@77" and numbers["methods"].keys() == {"full", "zeroshot", "policy"}


def test_other_scorer_leaves_out_texts_that_were_left_out(world, tmp_path, monkeypatch):
    """A row of zeros in kb_text.npy marks an entity without text: this scorer must not embed one either."""
    asked = []
    monkeypatch.setattr(RedBlind, "text_features", lambda self, texts: asked.append(texts))
    run_main(world[0], "--test-scorer", "blind to red", "--methods", "full")
    assert asked == []


@pytest.mark.parametrize("identity, part", [
    ("scorer@ab12", "scorer"), ("open_clip:ViT-B-32/openai@1", "open_clip-ViT-B-32-openai"), ("a/b", "a-b"),
    ("../x y@z@1", "..-x-y-z")])
def test_slug(identity, part):
    assert evaluate.slug(identity) == part


# ----------------------------------------------------------------------------------------------- Table 7: the regions

def test_regions_against_true_boxes(world):
    """policy: q0 hits (IoU 1, contained), q3 looks left where the truth is right (0 and 0); q2 has no truth."""
    arguments, _ = world
    quality = run_main(arguments)["region_quality"]
    assert quality["target"] == "true boxes" and quality["targets"] == 3
    assert quality["methods"]["policy"] == {"n": 2, "iou": .5, "containment": .5}
    assert [(row["iou"], row["containment"]) for row in rows_of(arguments, "policy")] == [
        (1, 1), (None, None), (None, None), (0, 0)]


@pytest.mark.parametrize("box, target, value", [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1), ((0, 0, 10, 10), (2, 3, 10.2, 8), 0),
    ((.7, .2, 9.1, 9.9), (0, 0, 10, 10), 1),  # the crop takes whole pixels: 0, 0, 10, 10
    ((1, 0, 10, 10), (0, 0, 10, 10), 0)])
def test_contains(box, target, value):
    assert evaluate.contains(box, target) == value


@pytest.mark.parametrize("question, word", [
    ("Where does this beetle live?", "beetle"), ("What is the closest parent taxonomy of this bird-of-prey?",
                                                 "bird-of-prey"),
    ("Who designed the building?", "building"), ("THIS Moth eats what?", "moth"), ("What is it?", None), ("", None)])
def test_keyword(question, word):
    assert evaluate.keyword(question) == word


def test_proxy_targets(world, tmp_path, monkeypatch):
    """A detector instead of the truth: what it finds is the target; what it does not find is counted by reason."""
    arguments, _ = world
    asked = []

    def detect(image, word):
        asked.append((image.size, word))
        return RIGHT if len(asked) == 1 else None

    monkeypatch.setattr(evaluate, "load_detector", lambda name, device: detect)
    path = tmp_path / "data" / "test.jsonl"
    path.write_text(path.read_text().replace("What is this, 2", "What is it, 2!").replace("What is this, 0",
                                             "Where does this beetle live, 0").replace("this, 3", "this fly, 3"))
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["files"]["test.jsonl"]["bytes"] = path.stat().st_size
    write_json(tmp_path / "data" / "manifest.json", manifest)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    write_json(tmp_path / "run" / "config.json", {**config, "pools": load_data(arguments[1], "test").identity})
    monkeypatch.setattr(ScriptedPolicy, "act", lambda self, images, questions, **_: [
        Action("REGION", LEFT, .1 if "1" in question else .9, "") for question in questions])
    quality = run_main(arguments, "--proxy", "groundingdino=some/model", "--methods", "policy")["region_quality"]
    assert asked == [((64, 64), "beetle"), ((64, 64), "fly")]  # q1 is not cropped; q2 names nothing
    assert quality["target"] == "groundingdino=some/model" and quality["targets"] == 1
    assert quality["without"] == {"no keyword": 1, "nothing detected": 1, "image unreadable": 0}
    assert quality["methods"]["policy"] == {"n": 1, "iou": 0, "containment": 0}  # left against right


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
    box = evaluate.load_detector(folder, "cpu")(image, "beetle")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        raw = model(**processor(images=image, text="beetle.", return_tensors="pt"))
    best = raw.logits[0].sigmoid().max(-1).values.argmax()
    cx, cy, w, h = raw.pred_boxes[0, best].tolist()
    wanted = ((cx - w / 2) * 60, (cy - h / 2) * 40, (cx + w / 2) * 60, (cy + h / 2) * 40)
    assert box == pytest.approx([min(max(0, v), side) for v, side in zip(wanted, (60, 40, 60, 40))], abs=1e-4)


@pytest.fixture
def judge():
    """A local server in the manner of OpenAI: says what .says holds, in turn; a number there is an HTTP error."""
    seen = SimpleNamespace(says=[], requests=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.requests.append((self.path, self.headers.get("Authorization"), body))
            say = seen.says[(len(seen.requests) - 1) % len(seen.says)]
            self.send_response(say if isinstance(say, int) else 200)
            self.end_headers()
            answer = {"choices": [{"message": {"content": say}}]}
            self.wfile.write(b"no such key" if isinstance(say, int) else json.dumps(answer).encode())

        def log_message(self, *_):
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield seen
    server.shutdown()
    server.server_close()


def test_judge(world, judge, monkeypatch, capsys):
    arguments, _ = world
    judge.says = ["**YES**", "No.", "Perhaps"]
    monkeypatch.setenv("JUDGE_KEY", "secret")
    result = run_main(arguments, "--judge", judge.url, "--judge-model", "m", "--judge-key-env", "JUDGE_KEY")
    assert result["judge"] == {"model": "m", "n": 3, "yes": 1, "unclear": 1, "rate": 1 / 3}
    assert [row["judge"] for row in rows_of(arguments, "policy")] == [True, None, False, None]
    assert "judge m: YES for 0.33 of 3 crops" in capsys.readouterr().out
    path, key, body = judge.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "m"
    text, picture = body["messages"][0]["content"]
    assert "What is this, 0" in text["text"]
    head, data = picture["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as crop:  # the left half alone, and it is red
        assert crop.size == (32, 64) and crop.getpixel((16, 32))[0] > 240 and crop.getpixel((16, 32))[2] < 15


def test_judge_that_is_busy_or_refuses(judge):
    image = Image.new("RGB", (8, 8))
    judge.says = [503, 429, "yes"]
    assert evaluate.ask_judge(judge.url, "m", "", image, "?", patience=(0, 0)) is True
    assert len(judge.requests) == 3 and judge.requests[0][1] is None  # no key, no header
    judge.says, judge.requests[:] = [401], []
    with pytest.raises(evaluate.Refused, match="401.*no such key"):
        evaluate.ask_judge(judge.url, "m", "", image, "?", patience=(0, 0))
    assert len(judge.requests) == 1  # a wrong key gets no better by waiting
    judge.says, judge.requests[:] = [500], []
    with pytest.raises(evaluate.Refused, match="500"):
        evaluate.ask_judge(judge.url, "m", "", image, "?", patience=(0, 0))
    assert len(judge.requests) == 3


def test_judge_is_asked_evenly_and_once(world, judge):
    arguments, loaded = world
    judge.says = ["yes", 401]  # the second of q0, q2, q3 is refused ...
    with pytest.raises(SystemExit, match="401"):
        evaluate.main([*arguments, "--judge", judge.url])
    judge.says = ["no"]  # ... and the next evaluation goes on from there
    assert run_main(arguments, "--judge", judge.url)["judge"]["yes"] == 1
    assert len(judge.requests) == 4 and loaded.policies["scripted"].batches == 2  # nothing is decoded twice either
    judge.requests.clear()
    assert run_main(arguments, "--judge", judge.url, "--judge-limit", "2")["judge"]["n"] == 2
    texts = [body["messages"][0]["content"][0]["text"] for _, _, body in judge.requests]
    assert ["this, 0" in texts[0], "this, 2" in texts[1]] == [True, True]


# -------------------------------------------------------------------------------------------- Table 8: retrieving again

def with_index(folder):
    data = load_data(str(folder), "test")
    index = faiss.IndexFlatIP(3)
    images = np.asarray(data.kb_image, np.float32)
    index.add(images / np.linalg.norm(images, axis=1, keepdims=True))
    faiss.write_index(index, str(folder / "index.faiss"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["index.faiss"] = {"bytes": (folder / "index.faiss").stat().st_size}
    write_json(folder / "manifest.json", manifest)


def test_retrieval_stage_by_hand(world, tmp_path, capsys):
    """With the whole knowledge base as pool and image features alone, retrieval ranks as the pools do: q0 2 -> 1, q1
    stays 1, q3 stays 3; q2's entity is not in the knowledge base at all."""
    arguments, _ = world
    with_index(tmp_path / "data")
    stage = run_main(arguments, "--retrieval-stage")["retrieval_stage"]
    assert stage["full"]["R@1"] == 1 / 4 and stage["policy"]["R@1"] == 2 / 4
    assert stage["full"]["R@5"] == stage["policy"]["R@5"] == 3 / 4 and stage["K"] == 4
    rows = rows_of(arguments, "policy", "eval/retrieval")
    assert [row["rank"] for row in rows] == [1, 1, 5, 3] and [row["full_rank"] for row in rows] == [2, 1, 5, 3]
    assert "Table 8" in capsys.readouterr().out


def test_nearest_entities_against_brute_force():
    rng = np.random.default_rng(0)
    owner = np.sort(rng.integers(0, 12, 60))
    owner = np.unique(owner, return_inverse=True)[1].astype(np.int32)
    images, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (60, 300))
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(8)
    index.add(unit)
    entities, cosines = evaluate.nearest_entities(index, owner, queries, 5)
    for query, listed, values in zip(queries / np.linalg.norm(queries, axis=1, keepdims=True), entities, cosines):
        best = {j: max(float(unit[m] @ query) for m in np.flatnonzero(owner == j)) for j in set(owner.tolist())}
        assert listed.tolist() == sorted(best, key=best.get, reverse=True)[:5]
        assert values.tolist() == pytest.approx(sorted(best.values(), reverse=True)[:5], abs=1e-5)
    assert evaluate.nearest_entities(index, owner, queries[:2], 99)[0].shape == (2, len(set(owner)))


def test_approximate_index_that_finds_too_few():
    index = SimpleNamespace(ntotal=4, search=lambda queries, depth: (
        np.array([[.9, .8, -1, -1]], np.float32), np.array([[2, 0, -1, -1]])))
    found = evaluate.nearest_entities(index, np.array([0, 1, 1, 2]), np.ones((1, 2)), 2)[0]
    assert found.tolist() == [[1, 0]]
    with pytest.raises(evaluate.Refused, match="finds 2 entities for a query, 3 are needed"):
        evaluate.nearest_entities(index, np.array([0, 1, 1, 2]), np.ones((1, 2)), 3)


def test_retrieval_stage_refuses(world, tmp_path):
    arguments, _ = world
    with pytest.raises(SystemExit, match="index.faiss is missing, and --retrieval-stage"):
        evaluate.main([*arguments, "--retrieval-stage"])
    with_index(tmp_path / "data")
    data = load_data(arguments[1], "test")
    data.queries[1] = replace(data.queries[1], positives=[])
    with pytest.raises(ValueError, match=r"test.jsonl:2: query 'q1' names no positives"):
        evaluate.check_retrieval(data)


# ------------------------------------------------------------------------------------------------- resuming, from rows

def test_goes_on_after_a_kill(world, tmp_path):
    arguments, loaded = world
    whole = run_main(arguments, "--batch-size", "1", "--samples", "2")
    rows = {name: without_seconds(rows_of(arguments, name)) for name in whole["methods"]}
    policy = loaded.policies["scripted"]
    policy.batches, policy.passes, policy.dies_at = 0, 0, 6  # two passes a batch: the third batch is cut short
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--batch-size", "1", "--samples", "2")
    part = tmp_path / "run" / "eval" / "test.actions.part"
    with open(part, "a", encoding="utf-8") as file:
        file.write('{"name": "learned fo')  # the kill came in the middle of a line
    assert not (tmp_path / "run" / "eval" / "metrics.json").exists()
    policy.dies_at = None
    again = run_main(arguments, "--batch-size", "1", "--samples", "2")
    assert policy.passes == 5 + 4  # q0 and q1 by both passes and q2 by one; then q2 (both, again) and q3
    for result in (whole, again):
        result.pop("extras")  # has measured seconds
    assert again == whole and {name: without_seconds(rows_of(arguments, name)) for name in rows} == rows
    assert not part.exists()


def test_answers_of_another_adapter_are_not_taken(world, tmp_path, capsys):
    arguments, loaded = world
    policy = loaded.policies["scripted"]
    policy.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--batch-size", "2", "--methods", "policy")
        run_main(arguments, "--batch-size", "2", "--methods", "policy")
    assert policy.passes == 4  # the first evaluation finished; the second one died at its first batch
    policy.dies_at, policy.batches = 2, 0
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--batch-size", "2", "--methods", "policy")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"trained further")
    policy.dies_at = None
    run_main(arguments, "--batch-size", "2", "--methods", "policy")
    assert policy.passes == 4 + 2 + 4 and "begun anew" in capsys.readouterr().out


def test_from_rows_needs_nothing_else(world, tmp_path, monkeypatch, capsys):
    arguments, _ = world
    with_index(tmp_path / "data")
    result = run_main(arguments, "--fuse", ".5", "--test-scorer", "blind to red", "--retrieval-stage", "--run-file",
                      f"their={run_file(tmp_path, 'omgm', RANKED)}", "--zeroshot-policy", "another")
    tables = capsys.readouterr().out.split("wrote to")[0]
    for name in ("load_scorer", "load_policy", "load_data"):
        monkeypatch.setattr(evaluate, name, None)
    write_json(f"{arguments[3]}/eval/metrics.json", {**result, "curve": {}, "gap_closed": 7})
    again = run_main(arguments, "--from-rows")
    assert again == result and capsys.readouterr().out.split("wrote to")[0] == tables


def test_from_rows_follows_the_rows(world):
    """A row changed by hand changes the numbers: they are computed, not copied."""
    arguments, _ = world
    before = run_main(arguments)["methods"]["policy"]["R@1"]
    path = f"{arguments[3]}/eval/test.policy.jsonl"
    rows = rows_of(arguments, "policy")
    rows[0]["scores"] = [1, 0, 0, 0]  # q0's positive is no longer first
    evaluate.write_rows(path, rows)
    assert run_main(arguments, "--from-rows")["methods"]["policy"]["R@1"] == before - 1 / 4


@pytest.mark.parametrize("spoil, complaint", [
    (lambda folder: (folder / "metrics.json").unlink(), "metrics.json is missing"),
    (lambda folder: (folder / "test.policy.jsonl").unlink(), "test.policy.jsonl"),
    (lambda folder: (folder / "test.policy.jsonl").write_text(""), "test.policy.jsonl is empty"),
    (lambda folder: (folder / "test.policy.jsonl").write_text('{"query_id": "q0"}\n'), "policy.jsonl:1: no question"),
    (lambda folder: (folder / "test.policy.jsonl").write_text("{\n"), "policy.jsonl:1: not JSON"),
    (lambda folder: (folder / "test.policy.jsonl").write_text((folder / "test.full.jsonl").read_text().replace(
        '"q2"', '"x"')), "other queries than test.full")])
def test_from_rows_refuses(world, tmp_path, spoil, complaint):
    arguments, _ = world
    run_main(arguments)
    spoil(tmp_path / "run" / "eval")
    with pytest.raises(SystemExit, match=complaint):
        evaluate.main([*arguments, "--from-rows"])


def test_from_rows_of_another_split(world):
    arguments, _ = world
    run_main(arguments)
    with pytest.raises(SystemExit, match="is of split test: give --split test"):
        evaluate.main([*arguments, "--from-rows", "--split", "val"])


def test_out_folder(world, tmp_path):
    arguments, _ = world
    evaluate.main([*arguments, "--out", str(tmp_path / "elsewhere"), "--methods", "policy"])
    assert (tmp_path / "elsewhere" / "metrics.json").exists() and not (tmp_path / "run" / "eval").exists()


# --------------------------------------------------------------------------------------------- images, csv, arguments

@pytest.mark.parametrize("how", ["missing", "broken"])
def test_unreadable_image_keeps_its_row(world, tmp_path, how, capsys):
    arguments, _ = world
    run_main(arguments)
    before = {name: without_seconds(rows_of(arguments, name)) for name in ("policy", "always", "center", "oracle")}
    image = tmp_path / "raw" / "q0.png"
    image.unlink() if how == "missing" else image.write_bytes(image.read_bytes()[:90])
    capsys.readouterr()
    result = run_main(arguments, "--test-scorer", "blind to red")
    assert result["unreadable"] == {"count": 1, "first": ["q0"]}
    assert "1 query images cannot be read and count as FULL: q0" in capsys.readouterr().out
    full = rows_of(arguments, "full")[0]
    for name, rows in before.items():
        first, *others = without_seconds(rows_of(arguments, name))
        assert first["unreadable"] and first["decision"] == "FULL" and first["box"] is None and first["encodes"] == 0
        assert first["query_id"] == "q0" and first["scores"] == full["scores"]
        assert others == rows[1:]  # nothing shifted
    other = rows_of(arguments, "full@open-red-blind")
    assert other[0]["rank"] == 2 and len(other) == 4  # the pool's order: red is second in it


def test_no_readable_image_at_all(world, tmp_path):
    for i in range(4):
        (tmp_path / "raw" / f"q{i}.png").unlink()
    with pytest.raises(SystemExit, match="no query image of the split can be read; the first: .*q0.png"):
        evaluate.main([*world[0], "--methods", "zeroshot,center"])


def test_csv_has_the_columns_of_the_release(world):
    arguments, _ = world
    run_main(arguments)
    with open(f"{arguments[3]}/eval/test.policy.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "example_idx", "query_id", "question", "has_bbox", "bbox", "num_candidates", "original_rank", "cropped_rank",
        "rank_improvement", "original_mrr", "cropped_mrr", "mrr_improvement", "original_ndcg", "cropped_ndcg",
        "ndcg_improvement", "generated_text"]
    q0, q1, q2, _ = rows
    assert (q0["has_bbox"], q0["original_rank"], q0["cropped_rank"], q0["rank_improvement"]) == ("True", "2", "1", "1")
    assert (float(q0["original_mrr"]), float(q0["cropped_mrr"]), float(q0["mrr_improvement"])) == (.5, 1, .5)
    assert float(q0["original_ndcg"]) == pytest.approx(1 / np.log2(3))
    assert q1["has_bbox"] == "False" and q1["bbox"] == "" and q1["generated_text"] == '{"Decision": "FULL"}'
    assert q2["original_rank"] == q2["cropped_rank"] == "" and float(q2["cropped_mrr"]) == 0  # no positive in the pool


def test_row_values_by_hand(world):
    arguments, _ = world
    run_main(arguments)
    q0, q1, q2, _ = rows_of(arguments, "policy")
    assert q0["margin"] == pytest.approx(1 - 2**-.5, abs=1e-3)        # red 1, purple .7071
    assert q0["full_margin"] == pytest.approx(2**-.5 - 1, abs=1e-3)   # the other way round
    assert q2["margin"] is None and q2["positives"] == ["https://w/elsewhere"] and q2["kind"] is None
    assert (q0["kind"], q0["encodes"], q1["encodes"]) == ("species", 1, 0)
    assert q0["seconds"] > 0 and q1["seconds"] > 0 and rows_of(arguments, "full")[0]["seconds"] is None


@pytest.mark.parametrize("wrong", [
    ["--threshold", "1.1"], ["--fuse", "-1"], ["--samples", "-2"], ["--run-file", "x"], ["--run-file", "a/b=c"],
    ["--run-file", "policy=c"], ["--run-file", "a=b", "--run-file", "a=c"], ["--proxy", "yolo=x"],
    ["--judge", "file:///etc/hosts"], ["--fuse", ".5", "--methods", "full"], ["--retrieval-stage", "--methods", "full"],
    ["--from-rows", "--methods", "full"], ["--from-rows", "--test-scorer", "x"]])
def test_wrong_flags(wrong):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(wrong)
    assert error.value.code == 2


def test_late_models_that_do_not_exist(world, monkeypatch):
    """A name that is wrong, but needed only late, is told in one line as well."""
    arguments, loaded = world

    def load_scorer(name, device, dtype=None):
        if name == "typo":
            raise ValueError("unknown scorer 'typo'")
        return loaded.scorers[name]

    monkeypatch.setattr(evaluate, "load_scorer", load_scorer)
    with pytest.raises(SystemExit, match="unknown scorer 'typo'"):
        evaluate.main([*arguments, "--test-scorer", "typo"])
    with pytest.raises(SystemExit, match="their.json"):
        evaluate.main([*arguments, "--run-file", "their=their.json"])


def test_scores_in_rows_are_the_scores():
    """What a row's file gives back is the float32 that was ranked, so no tie is made or broken on the way."""
    found = np.random.default_rng(0).normal(size=(1, 4000)).astype(np.float32)
    found[0, 1] = np.nextafter(found[0, 0], np.float32(9))  # the smallest difference there is
    data = SimpleNamespace(queries=[Query("q", "i", "?", [], [], [1] + [0] * 3999, [])])
    row = evaluate.make_rows(data, [evaluate.FULL_IMAGE], found, found)[0]
    assert np.float32(json.loads(json.dumps(row["scores"]))).tolist() == found[0].tolist()
    assert list(row) == list(evaluate.ROW_FIELDS)


def test_wandb_gets_the_means_or_is_asked_for(world, monkeypatch, capsys):
    arguments, _ = world
    real, told = evaluate.importlib.import_module, []
    run = SimpleNamespace(log=told.append, finish=lambda: told.append("finished"))
    tracker = SimpleNamespace(init=lambda **settings: told.append(settings) or run)
    monkeypatch.setattr(evaluate.importlib, "import_module", lambda name: tracker if name == "wandb" else real(name))
    result = run_main(arguments, "--wandb", "crops")
    settings, numbers, end = told
    assert settings["project"] == "crops" and settings["config"]["split"] == "test" and end == "finished"
    assert numbers["test/policy/MRR"] == result["methods"]["policy"]["MRR"]
    assert all(isinstance(value, (int, float)) for value in numbers.values())

    def missing(name):
        raise ImportError("no such package")
    monkeypatch.setattr(evaluate.importlib, "import_module", missing)
    with pytest.raises(SystemExit, match="pip install wandb"):
        run_main(arguments, "--wandb", "crops")
