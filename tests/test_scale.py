"""tools/scale.py on tiny input: what it makes is what prepare.py reads, and what it measures is there.

    python -m pytest tests/test_scale.py
"""
import json
import os

import numpy as np
import pytest

import prepare
from scorer import EvaClip, EvaClipConfig
from tools import scale


def test_made_knowledge_base(tmp_path):
    root = scale.make_root(str(tmp_path), 300, 2000)
    path = os.path.join(root, "encyclopedic_kb_wiki.json")
    with open(path, encoding="utf-8") as file:
        kb = json.load(file)
    assert list(kb) == [scale.page(j) for j in range(300)]
    assert dict(prepare.stream_json(path)) == kb
    assert 1500 < os.path.getsize(path) / 300 < 3000  # bytes an entry
    one = next(entry for entry in kb.values() if len(entry["image_urls"]) == 6)
    assert set(one) == {"title", "section_titles", "section_texts", "image_urls", "image_reference_descriptions",
                        "image_section_indices", "url"}
    assert len(one["section_titles"]) == len(one["section_texts"])
    assert len(one["image_reference_descriptions"]) == len(one["image_section_indices"]) == 6
    files = dict(prepare.stream_json(os.path.join(root, "url_to_path_mapping.json")))
    assert list(files) == [image for entry in kb.values() for image in entry["image_urls"]]
    texts = "".join(text for entry in kb.values() for text in entry["section_texts"])
    assert all(trap in texts for trap in ('"so called"', "{{cite}},", "\n", "\u6771\u4eac", "\\"))
    before = os.path.getmtime(path)
    assert scale.make_root(str(tmp_path), 300, 2000) == root and os.path.getmtime(path) == before  # made once


def test_made_vectors(tmp_path):
    array = np.load(scale.make_vectors(str(tmp_path), 1000, 16, block=300))
    assert array.shape == (1000, 16) and array.dtype == np.float16 and abs(array.std() - 1) < 0.05
    assert len(np.unique(array[:, 0])) > 500  # no block is written twice


@pytest.fixture
def here(monkeypatch):
    """Parts run in this process instead of in processes of their own."""
    monkeypatch.setattr(scale, "start_case", lambda case, argv, module: json.loads(json.dumps(
        scale.MEASURES[case](scale.parse_args([*argv, "--case", case])))))


def test_reading_is_measured_in_processes_of_its_own(tmp_path, capsys):
    """The program itself: in one process the second peak would be the first's."""
    scale.main(["--folder", str(tmp_path), "--parts", "scan", "--entries", "200", "--out", str(tmp_path / "out.json")])
    scan = json.loads((tmp_path / "out.json").read_text())["scan"]
    assert scan["peak_mb"] > 100 and scan["seconds"] > 0
    assert scan["beyond_mb"] < 50  # nothing is embedded: a model would show
    assert "beyond a run on 50 entries" in capsys.readouterr().out


def test_streaming_and_search_are_measured(tmp_path, here, capsys):
    scale.main(["--folder", str(tmp_path), "--parts", "stream,search", "--entries", "200", "--vectors", "900",
                "--dim", "8", "--queries", "40", "--device", "cpu", "--out", str(tmp_path / "out.json")])
    result, text = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    stream, search = result["stream"], result["search"]
    assert stream["count"] == 200 and stream["bytes"] > 100_000 and stream["seconds"] > 0
    assert search["product"] > 0 and search["whole"] > 0 and search["gflop"] == 2e-9 * 900 * 8 * 40
    assert "200 entries at" in text and "40 pools out of 900 images" in text


def test_a_part_that_memory_cannot_hold_is_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "start_case", lambda *_: {"left_out": "killed"})
    scale.main(["--folder", str(tmp_path), "--parts", "scan,search", "--entries", "5"])
    assert capsys.readouterr().out.splitlines() == ["scan: killed", "search: killed"]


def test_made_scorer_is_read_as_a_published_one_is(tmp_path, monkeypatch):
    config = EvaClipConfig(embed_dim=16, image_size=28, width=32, layers=2, head_width=16, mlp_ratio=2, context=16,
                           vocab=600, text_width=16, text_heads=2, text_layers=1)
    folder = scale.make_scorer(str(tmp_path), config)
    model = EvaClip.load(folder)
    assert model.config == config and not model.visual.blocks[0].norm1.weight.ne(1).any()
    assert .01 < model.visual.blocks[1].mlp.fc1.weight.detach().std().item() < .03


def test_embedding_is_measured(tmp_path, here, capsys):
    path = os.path.join(os.path.dirname(scale.__file__), "..", "mini", "scorer")
    scale.main(["--folder", str(tmp_path), "--parts", "embed", "--scorer", path, "--batch", "12", "--dtype", "bfloat16",
                "--out", str(tmp_path / "out.json")])
    embed, text = json.loads((tmp_path / "out.json").read_text())["embed"], capsys.readouterr().out
    visual = EvaClip.load(path, towers=("visual",))
    assert embed["bytes"] == 2 * sum(p.numel() for p in visual.parameters()) and embed["dtype"] == "torch.bfloat16"
    assert embed["load_seconds"] > 0 and embed["per_image"] > 0 and embed["per_text"] > 0
    assert f"a million images take {embed['per_image'] * 1e6 / 3600:.0f} hours" in text


@pytest.mark.parametrize("arguments, message", [(["--parts", "speed"], "expected a comma list out of stream, scan"),
                                                (["--entries", "0"], "--entries must be at least 1")])
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        scale.parse_args(arguments)
    assert message in capsys.readouterr().err
