"""Faults of tools/rerank.py that a reading found: each test failed before its mend."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from test_rerank import (  # noqa: F401
    ColourScorer, build, encoded, fakes, lines_of, post, run, server, world, write_batch,
)

from policy import load_policy
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


def test_policy_dtype_of_the_run_is_the_default(world, capsys, fakes):
    path = world / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "args": {**config["args"], "policy_dtype": "bfloat16"}}))
    run(world, capsys, "--query", "q 0")
    run(world, capsys, "--query", "q 0", "--policy-dtype", "float32")
    assert [more["dtype"] for _, more in fakes.loaded[-2:]] == ["bfloat16", "float32"]


def test_batch_refuses_another_scorer_dtype(world, capsys):
    arguments = write_batch(world)
    run(world, capsys, *arguments)
    with pytest.raises(SystemExit, match="begun with another scorer_dtype"):
        run(world, capsys, *arguments, "--scorer-dtype", "bfloat16")


def test_half_a_surrogate_pair_takes_no_batch_with_it(world, capsys):
    """JSON may hold a lone \\ud83d, half of an emoji. Tokenizers answer with a TypeError, files with another error."""
    arguments = write_batch(world)
    with open(world / "in.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"id": "half", "image": "raw/q0.png", "question": "\\ud83d 0"}\n{"id": "\\ud83d"}\n')
    run(world, capsys, *arguments)
    found = lines_of(world / "out.jsonl")
    assert sum("half a surrogate pair" in line.get("error", "") for line in found) == 2
    assert any("candidates" in line for line in found)


def test_half_a_surrogate_pair_is_answered_by_the_page(server):  # noqa: F811
    status, answer = post(server, example=0, question="\ud83d 0")
    assert status == 400 and "half a surrogate pair" in answer["error"]
    with pytest.raises(ValueError, match="question 0 has half a surrogate pair"):
        load_policy("mini/policy").act([Image.new("RGB", (64, 64))], ["Where? \ud83d"])


def test_images_that_are_not_rgb_are_read_as_files_are(server):  # noqa: F811
    """Transparent parts are white and 16 bits are 8, also of a PIL image and of one that was sent, which is upright."""
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert tool.open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 20000, np.uint16))
    assert tool.open_image(deep).getpixel((0, 0)) == (78, 78, 78)  # 20000 // 256; convert() alone gives 255
    assert tool.uploaded(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    whole = base64.b64decode(encoded(Image.effect_noise((64, 64), 99).convert("RGB")))
    status, answer = post(server, image=base64.b64encode(whole[:len(whole) // 2]).decode(), question="0")
    assert status == 400 and "cannot be read" in answer["error"]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert tool.uploaded(encoded(Image.new("RGB", (8, 4)), exif=exif)).size == (4, 8)
