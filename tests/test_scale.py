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


def test_stream_and_search_are_measured(tmp_path, capsys, monkeypatch):
    readers = {"json": ("import json; count = len(json.loads(data))", 1e9), "csv": ("", 10)}
    monkeypatch.setattr(scale, "LIBRARIES", readers)
    scale.main(["--folder", str(tmp_path), "--parts", "stream,search,retrieval", "--entries", "200", "--repeat", "1",
                "--vectors", "900", "--dim", "8", "--queries", "40", "--out", str(tmp_path / "out.json")])
    result, text = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert result["stream"]["prepare.stream_json"]["count"] == result["stream"]["json"]["count"] == 200
    assert "csv" not in result["stream"]  # the file is larger than that one may read
    assert result["search"]["ratio"] > 0 and result["retrieval"]["entities"] == 300
    assert "ours has 1.00 and 1.00 of its speed" in text and "71,335 pools in" in text


def test_a_reader_that_fails_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "LIBRARIES", {"json": ("raise MemoryError('too big')", 1e9)})
    monkeypatch.setattr(scale, "OURS", "count = 5")
    result = scale.measure_stream(scale.make_root(str(tmp_path), 5, 500), 1)
    assert list(result) == ["bytes", "prepare.stream_json"] and "too big" in capsys.readouterr().out


def test_scan_embeds_nothing(tmp_path, monkeypatch):
    """The trial batch of --dry-run takes more memory than what is read, and would hide it."""
    asked, measure = [], scale.measure
    monkeypatch.setattr(scale, "measure", lambda path, setup, work: asked.append(work) or measure(path, setup, work))
    found = scale.measure_scan(*(scale.make_root(str(tmp_path), entries, 500) for entries in (60, 50)))
    assert found["seconds"] > 0 and found["peak_mb"] > 0
    assert len(asked) == 2 and all("read_kb" in work and "prepare.prepare(" not in work for work in asked)


def test_made_scorer_is_read_as_a_published_one_is(tmp_path, monkeypatch):
    config = EvaClipConfig(embed_dim=16, image_size=28, width=32, layers=2, head_width=16, mlp_ratio=2, context=16,
                           vocab=600, text_width=16, text_heads=2, text_layers=1)
    folder = scale.make_scorer(str(tmp_path), config)
    model = EvaClip.load(folder)
    assert model.config == config and not model.visual.blocks[0].norm1.weight.ne(1).any()
    assert .01 < model.visual.blocks[1].mlp.fc1.weight.detach().std().item() < .03
    before = os.path.getmtime(os.path.join(folder, "model-00001.safetensors"))
    assert scale.make_scorer(str(tmp_path), config) == folder
    assert os.path.getmtime(os.path.join(folder, "model-00001.safetensors")) == before  # made once


def test_embedding_is_measured(tmp_path, capsys):
    path = os.path.join(os.path.dirname(scale.__file__), "..", "mini", "scorer")
    scale.main(["--folder", str(tmp_path), "--parts", "embed", "--scorer", path, "--batch", "3", "--dtype", "bfloat16",
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
