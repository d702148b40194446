"""Faults of evaluate.py that a reading found: each test failed before its mend."""

import errno
import http.server
import json
import os
import threading
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from PIL import Image
from test_evaluate import LEFT, run_main
from test_evaluate_extra import RedBlind, Policy, rows_of, with_index, world  # noqa: F401

import evaluate
import scorer
from policy import Action
from scorer import normalise


def test_best_of_samples_leaves_full_alone_whatever_a_killed_run_sampled(world, monkeypatch):
    """A run at threshold .05 sampled all four queries and was killed; at .85 only q0 is cropped."""
    arguments, _ = world
    write_all = evaluate.write_all
    monkeypatch.setattr(evaluate, "write_all", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--threshold", ".05", "--samples", "4", "--methods", "policy")
    monkeypatch.setattr(evaluate, "write_all", write_all)
    run_main(arguments, "--threshold", ".85", "--samples", "4", "--methods", "policy")
    decided = [[row["decision"] for row in rows_of(arguments, name)] for name in ("policy", "policy+best4")]
    assert decided == [["REGION", "FULL", "FULL", "FULL"]] * 2
    seconds = [[row["seconds"] for row in rows_of(arguments, name)] for name in ("policy", "policy+best4")]
    assert seconds[0][1:] == seconds[1][1:]  # nothing was sampled for them


def test_sheet_without_a_candidates_image(world, tmp_path):
    """Only the sheet looks at candidates' images; one that is gone must not cost the evaluation."""
    arguments, _ = world
    (tmp_path / "raw" / "e0.png").unlink()
    assert run_main(arguments, "--methods", "policy")["queries"] == 4


def test_test_scorer_without_a_candidates_image(world, tmp_path):
    arguments, _ = world
    (tmp_path / "raw" / "e0.png").unlink()
    with pytest.raises(SystemExit, match="e0.png"):
        run_main(arguments, "--methods", "policy", "--test-scorer", "blind to red", "--sheet", "0")


@pytest.mark.parametrize("content", [{"q0": {"retrieved_entities": [{"title": "x"}]}},
                                     {"q0": {"retrieved_entities": 3}},
                                     {"q0": {"reranked_entries": []}}, {"q0": {"retrieved_entries": [["u"]]}}])
def test_run_file_of_a_wrong_shape_is_refused(world, tmp_path, content):
    arguments, _ = world
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="theirs.json.*q0"):
        run_main(arguments, "--methods", "full", "--run-file", f"theirs={tmp_path}/theirs.json")


class Flaky(http.server.BaseHTTPRequestHandler):
    answer = b'{"choices": [{"message": {"content": "YES"}}]}'

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer) + self.server.lost))
        self.end_headers()
        self.wfile.write(self.answer)
        self.server.lost = 0

    def log_message(self, *_):
        pass


def test_judge_that_is_cut_off_is_asked_again():
    with http.server.HTTPServer(("127.0.0.1", 0), Flaky) as server:
        server.lost = 10
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert evaluate.ask_judge(url, "m", "", Image.new("RGB", (8, 8)), "what?", patience=(0,)) is True
        server.shutdown()


def test_judge_that_answers_in_parts(monkeypatch):
    monkeypatch.setattr(Flaky, "answer", b'{"choices": [{"message": {"content": [{"type": "text", "text": "YES"}]}}]}')
    with http.server.HTTPServer(("127.0.0.1", 0), Flaky) as server:
        server.lost = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(evaluate.Refused, match="judge"):
            evaluate.ask_judge(f"http://127.0.0.1:{server.server_port}/v1", "m", "", Image.new("RGB", (8, 8)), "?",
                               patience=())
        server.shutdown()


def test_truth_of_an_image_that_two_queries_share(world, tmp_path):
    arguments, _ = world
    data = evaluate.load_data(arguments[1], "test")
    data.queries[1].image = data.queries[0].image
    assert evaluate.read_truth(data)[0]["box"] == evaluate.read_truth(data)[1]["box"] == LEFT


def test_image_whose_exif_is_damaged_is_unreadable(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0XX*\0\x08\0\0\0garbage")

    class Data:
        image_path = staticmethod(lambda i: str(tmp_path / "a.jpg"))
    images = evaluate.Images(Data())
    images.size(0)


def test_scorer_dtype_of_the_data_is_the_default(world, tmp_path, monkeypatch):
    arguments, loaded = world
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["args"]["scorer_dtype"] = "float32"
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    asked = []
    monkeypatch.setattr(evaluate, "load_scorer", lambda name, device, dtype=None: asked.append(dtype)
                        or loaded.scorers[name])
    run_main(arguments, "--methods", "full")
    assert asked == ["float32"]


def test_policy_dtype_of_the_run_is_the_default(world, tmp_path, monkeypatch):
    arguments, loaded = world
    asked, policy = [], evaluate.load_policy("scripted")
    monkeypatch.setattr(evaluate, "load_policy", lambda name, **more: asked.append(more["dtype"]) or policy)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "args": {**config.get("args", {}), "policy_dtype": "bfloat16"}}))
    first = run_main(arguments, "--methods", "full,policy")
    other = run_main(arguments, "--methods", "full,policy", "--policy-dtype", "float32")
    assert [result["policy_dtype"] for result in (first, other)] == ["bfloat16", "float32"]
    assert asked == ["bfloat16", "float32"]


def test_answers_are_those_of_one_policy_dtype(world, tmp_path, monkeypatch):
    """A file of answers of before the flag goes on; with another dtype it is begun anew."""
    folder, about = tmp_path / "run" / "eval", {"models": {}, "policy_dtype": None}
    folder.mkdir(exist_ok=True)
    data = evaluate.load_data(world[0][1], "test")
    args = evaluate.parse_args([*world[0], "--decode", "grammar"])
    evaluate.open_progress(folder, data, args, about).add("learned forced", {0: 1})
    assert "policy_dtype" not in (folder / "test.actions.part").read_text()
    assert evaluate.open_progress(folder, data, args, about).get("learned forced", 0) == 1
    assert evaluate.open_progress(folder, data, args, {**about, "policy_dtype": "bfloat16"}).values == {}


@pytest.mark.parametrize("flags", [["--threshold", ".3"], ["--limit", "2"], ["--seed", "1"]])
def test_from_rows_refuses_what_it_would_ignore(flags):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--from-rows", *flags])


def test_one_query_and_none_with_a_positive(world):
    arguments, _ = world
    run_main(arguments, "--limit", "1", "--samples", "2", "--fuse", ".5")


# ------------------------------------------------------------------------------------------- names of folders

@pytest.mark.parametrize("spelt", ["{}/", "{}//", "./{}"])
def test_run_with_a_slash_at_its_end(world, tmp_path, monkeypatch, spelt):
    """One name for one run, in metrics.json and as the tracker's."""
    arguments, _ = world
    monkeypatch.chdir(tmp_path)
    runs, real = [], evaluate.importlib.import_module
    tracker = SimpleNamespace(init=lambda **about: runs.append(about) or SimpleNamespace(
        log=lambda numbers: None, finish=lambda: None))
    monkeypatch.setattr(evaluate.importlib, "import_module", lambda name: tracker if name == "wandb" else real(name))
    run = os.path.relpath(arguments[3])
    evaluate.main(["--data", spelt.format("data"), "--run", spelt.format(run), "--methods", "full", "--wandb", "p"])
    result = json.loads((tmp_path / run / "eval" / "metrics.json").read_text())
    assert (result["run"], result["data"]) == (run, "data")
    assert runs[0]["name"] == os.path.basename(run)


def test_tracker_of_rows_that_named_the_run_with_a_slash(world, monkeypatch):
    """metrics.json of an earlier version, read again with --from-rows."""
    runs = []
    wandb = SimpleNamespace(init=lambda **about: runs.append(about["name"]) or SimpleNamespace(
        log=lambda numbers: None, finish=lambda: None))
    result = {"run": "runs/world/", **dict.fromkeys(("data", "split", "scorer", "decode", "seed", "threshold"))}
    evaluate.show(wandb, "p", {**result, "methods": {}})
    assert runs == ["world"]


def test_dots_of_a_folder_are_left_alone():
    """a/../b is not b where a is a link."""
    assert evaluate.parse_args(["--run", "a/../b/"]).run == "a/../b"


# ------------------------------------------------------------------------------------------- two processes

def test_second_evaluation_of_a_folder_is_refused(world, tmp_path, monkeypatch):
    """While the first decides, another asks for the same folder: it says who is there, and the first goes on unharmed.
    A lock is of an open file and not of a process, so one process can play both."""
    arguments, loaded = world
    act, refused = loaded.policies["scripted"].act, []

    def interrupted(*a, **settings):
        folder = tmp_path / "run" / "eval"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(SystemExit, match=rf"eval is in use by process {os.getpid()} on .*--out") as error:
            evaluate.main([*arguments, "--methods", "full"])
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        evaluate.main([*arguments, "--methods", "full", "--out", str(tmp_path / "else")])  # another folder is free
        refused.append(str(error.value))
        return act(*a, **settings)

    monkeypatch.setattr(loaded.policies["scripted"], "act", interrupted)
    assert run_main(arguments, "--methods", "policy")["queries"] == 4
    assert len(refused) == 1
    monkeypatch.setattr(loaded.policies["scripted"], "act", act)
    run_main(arguments, "--methods", "policy")  # free again


def test_lock_is_free_after_an_error_and_on_disks_without_locks(world, tmp_path, monkeypatch, capsys):
    arguments, loaded = world
    monkeypatch.setattr(loaded.policies["scripted"], "dies_at", 1)
    with pytest.raises(KeyboardInterrupt):
        run_main(arguments, "--methods", "policy")
    run_main(arguments, "--methods", "policy")
    capsys.readouterr()
    monkeypatch.setattr(scorer.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    run_main(arguments, "--methods", "full")
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize("content, complaint", [
    (b"q0 Q0 caf\xe9 1 .5 t\n", "their.txt is not UTF-8"), (b'{"q0": "\xff"}', "their.txt is not UTF-8"),
    (b"q0 Q0 a 1 nan t\nq0 Q0 b 2 .9 t\n", "their.txt:1: expected .* found 'q0 Q0 a 1 nan t'")])
def test_run_file_that_cannot_be_read_is_named(world, tmp_path, content, complaint):
    (tmp_path / "their.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=complaint):
        run_main(world[0], "--methods", "full", "--run-file", f"their={tmp_path}/their.txt")


def test_run_file_with_a_byte_order_mark(world, tmp_path):
    content = {"q0": {"retrieved_entries": ["https://w/entity 1"]}}
    (tmp_path / "their.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    result = run_main(world[0], "--methods", "full", "--run-file", f"their={tmp_path}/their.json")
    assert result["external"]["their"]["format"] == "echosight" and result["external"]["their"]["queries"] == 1


@pytest.mark.parametrize("line", ["{cut", "[1]", '{"image": "q0.png", "box": 7, "kind": "x"}',
                                  '{"image": "q0.png", "box": [1, 2, "a", 4], "kind": "x"}',
                                  '{"image": "q0.png", "box": [5, 5, 5, 9], "kind": "x"}',
                                  '{"image": "q0.png", "box": [0, 0, NaN, 9], "kind": "x"}'])
def test_damaged_truth_names_the_line(world, tmp_path, line):
    with open(tmp_path / "raw" / "truth.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match="truth.jsonl:4: needs image, kind and a box"):
        run_main(world[0])


@pytest.mark.parametrize("content", ["{cut", "[1]", "{}", '{"pools": "x"}', '{"pools": "x", "data": "y", "args": 3}'])
def test_damaged_config_of_the_run_is_named(world, tmp_path, content):
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(SystemExit, match="config.json .*put it back"):
        run_main(world[0])


@pytest.mark.parametrize("content", ["{cut", "[1]", "{}", '{"split": "test"}'])
def test_damaged_metrics_are_named(world, tmp_path, content):
    run_main(world[0])
    (tmp_path / "run" / "eval" / "metrics.json").write_text(content)
    with pytest.raises(SystemExit, match="metrics.json .*without --from-rows"):
        run_main(world[0], "--from-rows")


def test_damaged_answers_are_named(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "write_all", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        run_main(world[0])
    part = tmp_path / "run" / "eval" / "test.actions.part"
    lines = part.read_text().splitlines()
    part.write_text("\n".join([*lines[:2], lines[2][:5], *lines[3:]]) + "\n")
    with pytest.raises(SystemExit, match="actions.part:3: not JSON .* remove the file"):
        run_main(world[0])


def test_from_rows_makes_table_8_from_its_rows(world, tmp_path):
    """A row changed by hand changes the table; damaged ones are named."""
    arguments, _ = world
    with_index(tmp_path / "data")
    before = run_main(arguments, "--retrieval-stage")["retrieval_stage"]
    path = tmp_path / "run" / "eval" / "retrieval" / "test.policy.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    evaluate.write_rows(path, [{**row, "labels": [0] * len(row["labels"])} for row in rows])
    after = run_main(arguments, "--from-rows")["retrieval_stage"]
    assert before["policy"]["MRR"] > 0 == after["policy"]["MRR"] and after["full"] == before["full"]
    evaluate.write_rows(path, rows[1:])
    with pytest.raises(SystemExit, match="test.policy.jsonl has other queries"):
        run_main(arguments, "--from-rows")


def test_a_graph_index_is_searched_as_widely_as_prepare_searched_it():
    """faiss writes its narrow default to the file: of 4,000 vectors it would miss many of the nearest 20."""
    rng = np.random.default_rng(0)
    vectors, queries = (normalise(rng.normal(size=(n, 32))) for n in (4000, 50))
    index = faiss.IndexHNSWFlat(32, 8, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    found = evaluate.nearest_entities(index, np.arange(4000), queries, 20)[0]
    exact = np.argsort(-queries @ vectors.T, axis=1)[:, :20]
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), exact.tolist())]) > .95


def test_so_are_the_shards_of_a_graph_index(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = (normalise(rng.normal(size=(n, 32))) for n in (8000, 50))
    names = [f"index-0000{n}-of-00002.faiss" for n in range(2)]
    for name, part in zip(names, [vectors[:4000], vectors[4000:]]):
        index = faiss.IndexHNSWFlat(32, 8, faiss.METRIC_INNER_PRODUCT)
        index.add(part)
        faiss.write_index(index, str(tmp_path / name))
    index = evaluate.open_index([str(tmp_path / name) for name in names])
    assert index.ntotal == 8000
    found = evaluate.nearest_entities(index, np.arange(8000), queries, 20)[0]
    exact = np.argsort(-queries @ vectors.T, axis=1)[:, :20]
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), exact.tolist())]) > .95


def test_full_disk_is_said_in_one_line_and_costs_no_answers(world, monkeypatch):
    arguments, loaded = world
    policy, write_csv = loaded.policies["scripted"], evaluate.write_csv
    whole = run_main(arguments, "--methods", "policy")
    passes = policy.passes
    monkeypatch.setattr(evaluate, "write_csv", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(SystemExit, match="the disk is full. The models' answers so far are kept"):
        run_main(arguments, "--methods", "policy")
    assert policy.passes == 2 * passes
    monkeypatch.setattr(evaluate, "write_csv", write_csv)
    assert run_main(arguments, "--methods", "policy") == whole and policy.passes == 2 * passes  # nothing asked again
