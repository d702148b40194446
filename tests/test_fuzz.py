"""Inputs that nobody meant: answers, pool files, images, adapters and model folders, made up, damaged or hostile.

What must hold: no input makes a program end without a word that names the file, none is understood in two ways, none
runs code. hypothesis makes up the texts; `fuzz_actions.py` does the same, guided by coverage, when run by hand.
"""

import builtins
import contextlib
import json
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import prepare
import tiny_policy
from fuzz_actions import ORIGINAL, RESIZED, SEEDS, check
from policy import load_policy, parse, read_adapter
from mini.pretrain import init_weights
from scorer import ARRAYS, EvaClip, EvaClipConfig, Query, load_data, load_scorer, read_image
from test_benchmarks import arguments, landmarks, root, scorer  # noqa: F401 (two are fixtures)
from test_checkpoints import Evil
from test_layouts import official
from test_train import build_data
from tools import layouts

MANY = settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# ---- answers ---------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-5, 240).map(str), st.floats().map(json.dumps), st.integers().map(str),
    st.sampled_from(["1e999", "-1e999", "9" * 400, "9" * 5000, "1e-400", "-0", "-0.0", "00", "01", "1.", ".5", "+1",
                     "0x10", "1_0", "true", "null", '"3"', "[3]", "NaN", "-Infinity", "١", "1e308", "2.5e1"]))
SPACES = st.sampled_from(["", " ", "\n", "\t ", "\u00a0", "\u2028", "\x1c"])
VALUES = st.recursive(st.one_of(NUMBERS, st.text(max_size=8).map(json.dumps)), lambda inner: st.one_of(
    st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]"),
    st.lists(st.tuples(st.text(max_size=3), inner), max_size=3).map(
        lambda items: "{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in items) + "}")), max_leaves=5)


@st.composite
def answers(draw):
    """Answers that are nearly right: each part is usually what it should be."""
    def usually(right, others):
        return right if draw(st.integers(0, 7)) else draw(others)

    box = "[" + ", ".join(draw(st.lists(NUMBERS, min_size=4, max_size=4))) + "]"
    arguments = [('"bbox_2d"', usually(box, VALUES))]
    if draw(st.booleans()):
        arguments.append(('"label"', usually(json.dumps(draw(st.text(max_size=8))), VALUES)))
    if not draw(st.integers(0, 5)):  # a key twice, or one too many
        arguments.append((draw(st.sampled_from(['"bbox_2d"', '"label"', '"x"', '"bbox\\u005f2d"'])), draw(VALUES)))
    call = [('"name"', usually('"image_zoom_in_tool"', VALUES)),
            ('"arguments"', "{" + ", ".join(f"{k}: {v}" for k, v in draw(st.permutations(arguments))) + "}")]
    inside = "{" + ",".join(f"{k}:{draw(SPACES)}{v}" for k, v in draw(st.permutations(call))) + "}"
    tool = usually(f"<tool_call>{draw(SPACES)}{inside}</tool_call>", st.one_of(VALUES, st.just(inside)))
    decision = usually('"REGION"', st.sampled_from(['"FULL"', '"full"', '"MALFORMED"', "REGION", "null"]))
    gap = draw(SPACES)
    return f'{gap}{{{gap}"Decision"{gap}:{gap}{decision}{gap},{gap}"Tool":{gap}{tool}{gap}}}{draw(SPACES)}'


def broken(draw, text, pieces='{}[]",:0123456789.-+eE \n\\utf<>/'):
    """`text` with up to three edits."""
    for _ in range(draw(st.integers(0, 3))):
        at, drop = draw(st.integers(0, len(text))), draw(st.integers(0, 2))
        text = text[:at] + draw(st.sampled_from(["", *pieces])) + text[at + drop:]
    return text


@MANY
@given(answers())
def test_answers_that_are_nearly_right(text):
    check(text, parse)


@MANY
@given(st.data())
def test_answers_with_edits(data):
    check(broken(data.draw, data.draw(st.sampled_from(SEEDS))), parse)


@MANY
@given(st.one_of(st.text(), st.text(alphabet='{}[]":, FULREGIONDecistol_<>/10'), st.binary().map(
    lambda raw: raw.decode("utf-8", "surrogateescape"))))
@example('{"Decision": "FULL"} {"Decision": "FULL"}')
@example('{"Decision": "FULL", "Decision": "REGION"}')
@example('Sure! {"Decision": "FULL"}')
@example("\x00")
def test_any_text(text):
    decision = check(text, parse)
    # Nothing but the form of Table 10 is an answer, so text that lacks its words is none.
    assert decision == "MALFORMED" or '"Decision"' in text and f'"{decision}"' in text


@MANY
@given(st.lists(st.floats(-50, 300) | st.integers(-50, 300), min_size=4, max_size=4),
       st.tuples(*[st.integers(1, 40).map(lambda n: 28 * n)] * 2), st.tuples(*[st.integers(1, 5000)] * 2))
def test_boxes_lie_in_the_image(numbers, resized, original):
    text = SEEDS[3].replace("[10, 20, 30, 40]", json.dumps(numbers))
    check(text, parse, resized, original)


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"a":' * 100_000, SEEDS[3].replace("[10", "[" * 50_000 + "10"),
    SEEDS[3].replace('"label"', '"x": ' + "[" * 100_000 + "]" * 100_000 + ', "label"'),
    SEEDS[3].replace("10", "1" * 1_000_000), SEEDS[3].replace("10", "1." + "0" * 1_000_000 + "e"),
    '{"Decision": "REGION", "Tool": ' + " " * 3000 + "x", '{"Decision": "FULL"' + " " * 100_000 + "x",
    SEEDS[3] * 1000, "\ud800" * 1000, '{"Decision": "REGION", "Tool": ' + "<tool_call>" * 1000 + "}",
])
def test_deep_and_long_answers_are_malformed(text):
    assert parse(text, RESIZED, ORIGINAL).decision == "MALFORMED"


@pytest.mark.parametrize("text, decision", [
    (SEEDS[0], "FULL"), (SEEDS[1], "FULL"), (SEEDS[3], "REGION"), (SEEDS[4], "MALFORMED"),
    # Of two boxes the last one counts, as for every reader of JSON that Python has.
    (SEEDS[3].replace('"label"', '"bbox_2d": [1, 1, 1, 1], "label"'), "MALFORMED"),
    (SEEDS[3].replace('"bbox_2d"', '"bbox_2d": [1, 1, 1, 1], "bbox_2d"'), "REGION"),
])
def test_both_readers_know_what_an_answer_is(text, decision):
    """Two readers that refuse everything would agree, too."""
    assert check(text, parse) == decision


# ---- raw files: questions, knowledge base ----------------------------------------------------------------------------


def read_raw(args):
    """prepare.py's reading of everything but images; every row that was read is kept or counted as dropped. InfoSeek's
    official files become its csv before."""
    if args.dataset == "infoseek":
        Path(args.root, "infoseek_test_filtered.csv").unlink(missing_ok=True)
        layouts.infoseek(layouts.parse_args(["infoseek", "--root", args.root]))
    splits = [prepare.read_questions(args, name) for name in args.splits]
    prepare.find_images(args, splits)
    prepare.read_kb(args, splits, {}, f"{args.out}.draft")
    for split in splits:
        assert split.read == len(split.rows) + sum(split.drops.counts.values())


@pytest.mark.parametrize("dataset, make, names", [
    ("evqa", landmarks, ("test.csv", "encyclopedic_kb_wiki.json", "url_to_path_mapping.json")),
    ("infoseek", lambda root: official(root, "val", range(6)), ("infoseek_val.jsonl", "infoseek_val_withkb.jsonl"))])
def test_damaged_raw_files(root, scorer, dataset, make, names):  # noqa: F811
    """A clear error that names the file, or rows that add up. 2,500 inputs in a longer run: no other error."""
    make(root)
    args = prepare.parse_args(arguments(root, "--dataset", dataset))
    for name in names:
        content, draw, refused = (root / name).read_bytes(), random.Random(name), 0
        for turn in range(100):
            (root / name).write_bytes(damaged(content, draw) if turn % 5 else content[:draw.randrange(len(content))])
            try:
                read_raw(args)
            except (ValueError, OSError) as error:
                assert name in str(error), error
                refused += 1
        (root / name).write_bytes(content)
        assert 20 < refused
    read_raw(args)


# ---- pool files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fuzz")
    config = EvaClipConfig(embed_dim=8, image_size=28, width=16, layers=1, head_width=8, context=8, vocab=600,
                           text_width=8, text_heads=2, text_layers=1)
    init_weights(EvaClip(config)).save(folder / "scorer")
    build_data(folder, load_scorer(str(folder / "scorer")))
    return folder


FILES = ("train.jsonl", "train_full.npy", "train_pool.npy", "train_pool_image.npy", "train_labels.npy", "kb_image.npy",
         "kb_text.npy", "kb_entity.npy", "manifest.json")


def damaged(content, draw):
    """One byte changed: a bit flipped, or a character put where it hurts."""
    changed = bytearray(content)
    at = draw.randrange(len(changed))
    changed[at] = changed[at] ^ 1 << draw.randrange(8) if draw.random() < 0.5 else draw.choice(b'"{}[],:0 9a\n\xff\x00')
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_damaged_pool_files(home, tmp_path, name):
    """A clear error that names a file of the data, or data of the right kind: what was text may be another text, never
    another type, shape or row."""
    folder = tmp_path / "data"
    shutil.copytree(home / "data", folder)
    whole, draw, refused = load_data(str(folder), "train"), random.Random(name), 0
    content = (folder / name).read_bytes()
    for turn in range(150):
        (folder / name).write_bytes(damaged(content, draw))
        try:
            found = load_data(str(folder), "train")
            queries = list(found.queries)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), error
            refused += 1
            continue
        for array in (*ARRAYS, "kb_image", "kb_text", "kb_entity"):
            ours, theirs = getattr(found, array), getattr(whole, array)
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert len(queries) == len(whole) and all(isinstance(query, Query) for query in queries)
        assert found.pool.min() >= 0 and found.pool.max() < len(found.kb_text)
    assert refused > 10 or name in ("train_labels.npy", "train_full.npy", "kb_image.npy", "kb_text.npy")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"version": 1}', b"[" * 100_000])
def test_files_that_are_something_else(home, tmp_path, content):
    for name in FILES:
        folder = tmp_path / name
        shutil.copytree(home / "data", folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=str(folder)):
            list(load_data(str(folder), "train").queries)


# ---- images ----------------------------------------------------------------------------------------------------------


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def png(width, height):
    """A PNG that says it is as large as that and holds next to nothing."""
    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b""))


@pytest.mark.parametrize("content", [b"", b"x", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"<svg/>",
                                     png(50_000, 50_000), png(0, 10), png(300, 300)])
def test_what_is_no_image_is_named(tmp_path, content):
    """50,000 x 50,000 pixels would be 7.5 GB: refused by the header, before a pixel is decoded."""
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(ValueError, match="image .*image.png cannot be read"):
        read_image(str(tmp_path / "image.png"))
    with pytest.raises(FileNotFoundError):
        read_image(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "DDS", "AVIF"])
def test_damaged_images(tmp_path, kind):
    """Refused with its name, or read: never an error of a decoder's own."""
    draw, refused, path = random.Random(kind), 0, tmp_path / "image"
    try:
        noise().save(path, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    content = path.read_bytes()
    for turn in range(150):
        changed = bytearray(content[:draw.randrange(len(content))] if turn % 3 == 0 else content)
        for _ in range(turn % 3):
            changed[draw.randrange(min(len(changed), draw.choice((200, len(changed)))))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            assert read_image(str(path)).mode == "RGB"
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


# ---- models and adapters made by an attacker -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Path(tiny_policy.build(tmp_path_factory.mktemp("plain")))


EVIL = "import os\nos.mkdir({mark!r})\nclass Evil:\n    pass\n"


def booby_trapped(plain, folder, mark):
    """A policy folder whose every config asks for a class of its own evil.py, which leaves a mark when imported."""
    shutil.copytree(plain, folder)
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and path.name != "tokenizer.json":
            content["auto_map"] = {name: "evil.Evil" for name in (
                "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoProcessor",
                "AutoImageProcessor", "AutoVideoProcessor", "AutoFeatureExtractor")}
            content["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
            path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("change", [{}, {"model_type": "evil"}])
def test_a_model_folder_runs_no_code(plain, tmp_path, monkeypatch, change):
    """Neither one of a known kind nor one that only its own code could open."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "y")  # who would say yes to anything
    folder = booby_trapped(plain, tmp_path / "trap", tmp_path / "mark")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    # To refuse a known kind is as good as to ignore the trap.
    with pytest.raises(ValueError) if change else contextlib.suppress(ValueError):
        load_policy(str(folder))
    assert not (tmp_path / "mark").exists() and not asked


def test_weights_that_are_a_pickle_are_not_loaded(plain, tmp_path):
    """A checkpoint of pytorch_model.bin alone: transformers would unpickle it with weights_only, and it holds more."""
    folder = tmp_path / "trap"
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"x": Evil(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception):
        load_policy(str(folder))
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def adapter(plain, tmp_path):
    policy = load_policy(str(plain))
    policy.add_lora(2, 4, 0.0, "language")
    policy.save_adapter(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_an_adapter_is_read_from_safetensors_alone(plain, adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "mark")}, adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        load_policy(str(plain), str(adapter))
    assert not (tmp_path / "mark").exists()


def test_an_adapter_points_nowhere(plain, adapter):
    """Where it says its base model lies is not followed, and a layer's name is looked up, never imported."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "../../../../etc", "auto_mapping": {"parent_library": "os"},
               "target_modules": ["../../x", "__class__"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    load_policy(str(plain), str(adapter))


@pytest.mark.parametrize("change", [
    b"", b"{", b"[]", b"null", b"\xff", {"r": "8"}, {"r": None}, {"r": 0}, {"r": -1}, {"r": 10**12}, {"r": 2.5},
    {"lora_alpha": None}, {"lora_alpha": "1"}, {"lora_dropout": 7}, {"lora_dropout": "x"}, {"peft_type": 1},
])
def test_adapter_configs_that_make_no_sense(plain, adapter, change):
    path = adapter / "adapter_config.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="adapter"):
        load_policy(str(plain), str(adapter))


def test_damaged_adapter_weights(adapter):
    path, draw = adapter / "adapter_model.safetensors", random.Random(0)
    content, refused = path.read_bytes(), 0
    for turn in range(200):
        changed = bytearray(content[:draw.randrange(len(content))] if turn % 4 == 0 else content)
        if changed:
            changed[draw.randrange(min(len(changed), 2000))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            read_adapter(str(adapter))
        except ValueError as error:
            assert "adapter_model.safetensors" in str(error)
            refused += 1
    assert refused > 50
