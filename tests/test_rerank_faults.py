"""Faults of tools/rerank.py that a reading found: each test failed before its mend."""

import json

import pytest
from test_rerank import ColourScorer, build, fakes, lines_of, run, world, write_batch  # noqa: F401

from tools import rerank as tool


def test_batch_refuses_another_adapter_in_the_same_folder(world, capsys):
    arguments = write_batch(world)
    run(world, capsys, *arguments)
    adapter = world / "run" / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes() + b"trained again")
    with pytest.raises(SystemExit, match="begun with another adapter"):
        run(world, capsys, *arguments)


def test_batch_goes_on_after_a_kill_inside_a_letter(world, capsys):
    """A write was cut in the middle of a character of two bytes."""
    arguments = write_batch(world)
    run(world, capsys, *arguments)
    whole = {line["line"]: line for line in lines_of(world / "out.jsonl")}
    good = [line for line in (world / "out.jsonl").read_text().splitlines() if '"error"' not in line]
    (world / "out.jsonl").write_bytes((good[0] + '\n{"id": "b1", "text": "é').encode()[:-1])
    assert "1 were done before" in run(world, capsys, *arguments)
    assert {line["line"]: line for line in lines_of(world / "out.jsonl")} == whole


def test_picture_that_cannot_be_saved(world, capsys):
    """Said in one line, and the ranking is not lost with it."""
    with pytest.raises(SystemExit, match="no-such-folder"):
        run(world, capsys, "--query", "q 0", "--save-image", world / "no-such-folder" / "a.png")
    assert "REGION" in capsys.readouterr().out


def test_system_prompt_is_the_trained_one_to_the_letter(world, capsys, fakes):
    """train.py and evaluate.py read the file as it is; a newline at its end is a token of the prompt."""
    (world / "prompt.txt").write_text("Crop or not?\n")
    config = json.loads((world / "run" / "config.json").read_text())
    config["args"]["system_prompt"] = str(world / "prompt.txt")
    (world / "run" / "config.json").write_text(json.dumps(config))
    run(world, capsys, "--query", "q 0")
    assert fakes.loaded[-1][1]["system_prompt"] == "Crop or not?\n"


def test_scorer_dtype_of_the_data_is_the_default(world, capsys, monkeypatch):
    """As in evaluate.py; the flag wins; data that does not say, or is not there, leaves it to the device."""
    asked = []
    monkeypatch.setattr(tool, "load_scorer", lambda name, device, dtype=None: asked.append(dtype) or ColourScorer())
    manifest, path = json.loads((world / "data" / "manifest.json").read_text()), world / "data" / "manifest.json"
    run(world, capsys, "--query", "q 0")
    path.write_text(json.dumps({**manifest, "args": {"scorer_dtype": "bfloat16"}}))
    run(world, capsys, "--query", "q 0")
    run(world, capsys, "--query", "q 0", "--data", world / "data", "--scorer", "colours")
    run(world, capsys, "--query", "q 0", "--scorer-dtype", "float16")
    path.unlink()
    run(world, capsys, "--image", world / "raw" / "q0.png", "--question", "What, 0", "--candidates", world / "raw")
    assert asked == [None, "bfloat16", "bfloat16", "float16", None]


def test_batch_refuses_another_scorer_dtype(world, capsys):
    arguments = write_batch(world)
    run(world, capsys, *arguments)
    with pytest.raises(SystemExit, match="begun with another scorer_dtype"):
        run(world, capsys, *arguments, "--scorer-dtype", "bfloat16")
