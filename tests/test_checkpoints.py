"""Checkpoints of EVA-CLIP: every published form gives the features of the plain implementation, every fault is named.

    python -m pytest tests/test_checkpoints.py

The plain implementation is test_scorer.py's; the names of the Hugging Face form are written out here a second time.
"""
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_scorer import OBLONG, POSTNORM, SQUARE, random_model, slow_image, slow_text

import scorer as S


def hugging_face(p, config):
    """The tensors of a model under the names and in the shapes of a Hugging Face folder, from the reference table."""
    out = {"vision_model.embeddings.class_embedding": p["visual.cls_token"].reshape(-1),
           "vision_model.embeddings.position_embedding.weight": p["visual.pos_embed"][0],
           "vision_model.embeddings.patch_embedding.weight": p["visual.patch_embed.proj.weight"],
           "vision_model.embeddings.patch_embedding.bias": p["visual.patch_embed.proj.bias"],
           "vision_model.post_layernorm.weight": p["visual.norm.weight"],
           "visual_projection.weight": p["visual.head.weight"],
           "text_model.embeddings.token_embedding.weight": p["text.token_embedding.weight"],
           "text_model.embeddings.position_embedding.weight": p["text.positional_embedding"],
           "text_model.final_layer_norm.weight": p["text.ln_final.weight"],
           "text_model.final_layer_norm.bias": p["text.ln_final.bias"],
           "text_projection.weight": p["text.text_projection"].T.contiguous()}
    for i in range(config.layers):
        ours, theirs = f"visual.blocks.{i}.", f"vision_model.encoder.layers.{i}."
        for n, part in enumerate("qkv"):
            rows = slice(n * config.width, (n + 1) * config.width)
            out[f"{theirs}self_attn.{part}_proj.weight"] = p[f"{ours}attn.qkv.weight"][rows].clone()
        for a, b in (("norm1.weight", "layer_norm1.weight"), ("norm2.weight", "layer_norm2.weight"),
                     ("attn.proj.weight", "self_attn.out_proj.weight"), ("attn.proj.bias", "self_attn.out_proj.bias"),
                     ("mlp.fc1.weight", "mlp.fc1.weight"), ("mlp.fc1.bias", "mlp.fc1.bias"),
                     ("mlp.fc2.weight", "mlp.fc2.weight"), ("mlp.fc2.bias", "mlp.fc2.bias")):
            out[theirs + b] = p[ours + a]
    for i in range(config.text_layers):
        ours, theirs = f"text.transformer.resblocks.{i}.", f"text_model.encoder.layers.{i}."
        for n, part in enumerate("qkv"):
            rows = slice(n * config.text_width, (n + 1) * config.text_width)
            for kind in ("weight", "bias"):
                out[f"{theirs}self_attn.{part}_proj.{kind}"] = p[f"{ours}attn.in_proj_{kind}"][rows].clone()
        for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn.out_proj", "self_attn.out_proj"),
                     ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
            for kind in ("weight", "bias"):
                out[f"{theirs}{b}.{kind}"] = p[f"{ours}{a}.{kind}"]
    return out


def hugging_face_config(config):
    return {"model_type": "clip", "projection_dim": config.embed_dim,
            "vision_config": {"image_size": config.image_size, "patch_size": config.patch_size,
                              "hidden_size": config.width, "num_hidden_layers": config.layers, "hidden_act": "gelu",
                              "num_attention_heads": config.width // config.head_width, "use_rms_norm": True,
                              "intermediate_size": int(config.width * config.mlp_ratio),
                              "post_layernorm": config.postnorm, "q_bias": False},
            "text_config": {"max_position_embeddings": config.context, "vocab_size": config.vocab,
                            "hidden_size": config.text_width, "num_attention_heads": config.text_heads,
                            "num_hidden_layers": config.text_layers, "hidden_act": "gelu"}}


def eva_clip_config(config):
    """The json of the original repository; postnorm is left out where it is False, as there."""
    vision = {"image_size": config.image_size, "layers": config.layers, "width": config.width, "drop_path_rate": 0,
              "head_width": config.head_width, "mlp_ratio": config.mlp_ratio, "patch_size": config.patch_size,
              "xattn": True, "use_rms_norm": True, **({"postnorm": True} if config.postnorm else {})}
    return {"embed_dim": config.embed_dim, "vision_cfg": vision,
            "text_cfg": {"context_length": config.context, "vocab_size": config.vocab, "width": config.text_width,
                         "heads": config.text_heads, "layers": config.text_layers, "xattn": False}}


def shards(folder, tensors, stem, end, save, count=3):
    """Write tensors round robin into `count` files with their index, as Hugging Face does."""
    names = sorted(tensors)
    files = {name: f"{stem}-{n % count + 1:05d}-of-{count:05d}.{end}" for n, name in enumerate(names)}
    for file in set(files.values()):
        save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    total = sum(t.nbytes for t in tensors.values())
    (folder / f"{stem}.{end}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": files}))


def write(folder, form, config, p, change=lambda tensors: None):
    """A model in one of the published forms -> the path to load. p: its tensors by the original names; change edits
    what is stored."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(
        hugging_face_config(config) if form.startswith("hf") else eva_clip_config(config)))
    theirs, p = hugging_face(p, config), dict(p)
    change(theirs if form.startswith("hf") else p)
    if form == "pt":
        torch.save(p, folder / "EVA_CLIP.pt")
    elif form == "pt wrapped twice":
        torch.save({"epoch": 3, "state_dict": {"model": {f"module.{name}": t for name, t in p.items()}}},
                   folder / "EVA_CLIP.pt")
    elif form == "pt of a parallel run":
        torch.save({"module": p, "optimizer": {"lr": 0.1}}, folder / "EVA_CLIP.pt")
    elif form == "pt with older text names":
        old = {name.removeprefix("text."): t for name, t in p.items()}
        torch.save({**old, "attn_mask": torch.zeros(3), "text.position_ids": torch.arange(3)}, folder / "EVA_CLIP.pt")
    elif form == "original safetensors":
        save_file({"text.logit_scale" if name == "logit_scale" else name: t for name, t in p.items()},
                  folder / "EVA_CLIP.safetensors")
    elif form == "hf":
        save_file({**theirs, "vision_model.embeddings.position_ids": torch.arange(5)}, folder / "model.safetensors")
    elif form == "hf sharded":
        shards(folder, theirs, "model", "safetensors", save_file)
    elif form == "hf bin":
        torch.save({**theirs, "logit_scale": p["logit_scale"]}, folder / "pytorch_model.bin")
    elif form == "hf sharded bin":
        shards(folder, theirs, "pytorch_model", "bin", torch.save)
    return folder / "EVA_CLIP.pt" if form == "pt" else folder


FORMS = ["pt", "pt wrapped twice", "pt of a parallel run", "pt with older text names", "original safetensors", "hf",
         "hf sharded", "hf bin", "hf sharded bin"]


@pytest.fixture(scope="module")
def truth():
    """{config: (tensors by original name, pixels, ids, image features, text features)} of the plain implementation."""
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[598, 5, 9, 599, 0, 0], [598, 1, 2, 3, 4, 599]])
    out = {}
    with torch.no_grad():
        for config in (SQUARE, OBLONG, POSTNORM):
            p = {name: t.detach() for name, t in random_model(config, 5).named_parameters()}
            images = torch.stack([slow_image(p, config, image) for image in pixels])
            out[config] = p, pixels, ids, images, torch.stack([slow_text(p, config, row.tolist()) for row in ids])
    return out


# ------------------------------------------------------------------------------------------------------ every form

@pytest.mark.parametrize("config", [SQUARE, OBLONG, POSTNORM], ids=["square", "oblong", "postnorm"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_gives_the_plain_features(tmp_path, truth, form, config):
    p, pixels, ids, images, texts = truth[config]
    model = S.EvaClip.load(write(tmp_path / "m", form, config, p))
    assert model.config == config and not model.training
    for name, tensor in model.named_parameters():  # no tensor is a view of a file that may change
        assert torch.equal(tensor, p[name]) or (name == "logit_scale" and form.startswith("hf")), name
    for got, want in ((model.encode_image(pixels), images), (model.encode_text(ids), texts)):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("form", ["pt", "hf sharded"])
def test_dtype_and_towers(tmp_path, truth, form):
    good = truth[OBLONG][0]
    # Not a number, but only where nobody looks: read it is refused, and the vision tower alone does not read it.
    p = {**good, "text.ln_final.weight": torch.full((24,), math.nan)}
    path = write(tmp_path / "m", form, OBLONG, p)
    model = S.EvaClip.load(path, dtype=torch.bfloat16, towers=("visual",))
    assert model.text is None and {t.dtype for t in model.parameters()} == {torch.bfloat16}
    for name, tensor in model.named_parameters():
        if name != "logit_scale":  # the Hugging Face form has none
            assert torch.equal(tensor, p[name].to(torch.bfloat16)), name
    with pytest.raises(ValueError, match=r"(EVA_CLIP.pt|model-0000.-of-00003.safetensors): tensor text.ln_final.weight "
                                         "holds NaN"):
        S.EvaClip.load(path)


def test_file_of_the_vision_tower_alone(tmp_path, truth):
    p = truth[OBLONG][0]
    write(tmp_path / "m", "pt", OBLONG, p)
    torch.save({name: t for name, t in p.items() if not name.startswith("text.")}, tmp_path / "m/EVA_CLIP.pt")
    assert S.EvaClip.load(tmp_path / "m", towers=("visual",)).text is None
    with pytest.raises(ValueError, match="29 missing: text.positional_embedding"):  # 2 * 12 + 5
        S.EvaClip.load(tmp_path / "m")


def test_overflow_of_the_asked_dtype(tmp_path, truth):
    p = dict(truth[OBLONG][0])
    p["visual.norm.weight"] = torch.full_like(p["visual.norm.weight"], 7e4)  # float16 ends at 65504
    path = write(tmp_path / "m", "pt", OBLONG, p)
    assert S.EvaClip.load(path).visual.norm.weight[0] == 7e4
    with pytest.raises(ValueError, match="visual.norm.weight holds NaN or infinity in torch.float16"):
        S.EvaClip.load(path, dtype=torch.float16)


def bicubic(grid, new):
    """[g, g] -> [new, new], weight by weight: Keys' cubic with a = -.75, pixel centres at .5, edges repeated."""
    def kernel(d):
        d, a = abs(d), -0.75
        if d <= 1:
            return (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1
        return a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a if d < 2 else 0.0

    g = len(grid)
    out = np.zeros((new, new))
    for i in range(new):
        for j in range(new):
            y, x = (i + 0.5) * g / new - 0.5, (j + 0.5) * g / new - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    out[i, j] += kernel(y - m) * kernel(x - n) * grid[min(max(m, 0), g - 1), min(max(n, 0), g - 1)]
    return out


@pytest.mark.parametrize("form", ["pt", "hf"])
def test_positions_are_interpolated(tmp_path, truth, form):
    """Weights for 28 pixels (2 x 2 patches), config for 42 (3 x 3)."""
    p = truth[OBLONG][0]
    path = write(tmp_path / "m", form, OBLONG, p)
    larger = S.EvaClipConfig(**{**vars(OBLONG), "image_size": 42})
    config = (hugging_face_config if form == "hf" else eva_clip_config)(larger)
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    model = S.EvaClip.load(path)
    got, old = model.visual.pos_embed.detach(), p["visual.pos_embed"]
    assert model.config == larger and got.shape == (1, 10, 24)
    assert torch.equal(got[0, 0], old[0, 0])
    for channel in (0, 7, 23):
        want = bicubic(old[0, 1:, channel].reshape(2, 2).numpy(), 3)
        np.testing.assert_allclose(got[0, 1:, channel].reshape(3, 3), want, atol=1e-5)
    wide = S.EvaClipConfig(**{**vars(OBLONG), "image_size": (28, 42)})  # not a square: refused, as in the reference
    model.save(tmp_path / "s")
    S.write_json(str(tmp_path / "s/config.json"), {"model_type": "eva_clip", "config": vars(wide)})
    with pytest.raises(ValueError, match=r"visual.pos_embed \(1, 10, 24\) instead of \(1, 7, 24\)"):
        S.EvaClip.load(tmp_path / "s")


def shapes_only(config, change=lambda shapes: None, hugging=False):
    """A Checkpoint of the released size without its gigabytes: names and shapes, no file."""
    with torch.device("meta"):
        p = {name: t.detach() for name, t in S.EvaClip(config).named_parameters()}
        p = hugging_face(p, config) if hugging else p
    checkpoint = object.__new__(S.Checkpoint)
    checkpoint.files, checkpoint.hugging_face = ["nowhere/weights.pt"], hugging
    checkpoint._shape = checkpoint._file = {name: tuple(t.shape) for name, t in p.items()}
    change(checkpoint._shape)
    return checkpoint


@pytest.mark.parametrize("hugging", [False, True], ids=["original", "hugging face"])
@pytest.mark.parametrize("config", [
    S.EvaClipConfig(), S.EvaClipConfig(image_size=448),
    S.EvaClipConfig(embed_dim=1536, width=5120, layers=48, postnorm=True)], ids=["8B", "8B-448", "18B"])
def test_released_models_need_no_config(config, hugging):
    checkpoint = shapes_only(config, hugging=hugging)
    assert S._model_config(checkpoint) == config
    if hugging:  # q, k and v apart: 2 more a vision layer, 4 more a text layer; 875 without logit_scale in the 8B
        assert len(checkpoint._shape) == 683 + 2 * 32 + 4 * 32 if config.layers == 32 else True
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in S.EvaClip(config).state_dict().items()}
    checkpoint.check(shapes, shapes)


def test_part_of_a_released_model_is_refused():
    def cut(shapes):
        for name in [name for name in shapes if name.startswith("visual.blocks.31.")]:
            del shapes[name]
    with pytest.raises(FileNotFoundError, match="nowhere/config.json is missing, and weights of width 4096 with 31"):
        S._model_config(shapes_only(S.EvaClipConfig(), cut))


# ---------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import gc, sys, torch
import scorer as S

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

small, large, towers = sys.argv[1], sys.argv[2], tuple(sys.argv[3].split(","))
S.EvaClip.load(small, dtype=torch.bfloat16, towers=towers)  # what a first load leaves behind is not the model's
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts anew from here
before = status("VmRSS")
model = S.EvaClip.load(large, dtype=torch.bfloat16, towers=towers)
print((status("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("form", ["pt", "hf sharded"])
def test_peak_memory_of_loading(tmp_path, truth, form):
    """float32 file -> bfloat16 model: resident memory, the pages of the mapped file included, must stay within 1.1 of
    the model. Reading the file whole costs 3 (2 for the file, 1 for the model), mapping it once and for all as well.
    """
    config = S.EvaClipConfig(embed_dim=64, image_size=28, width=512, layers=16, head_width=64, mlp_ratio=4,
                             context=16, vocab=600, text_width=128, text_heads=2, text_layers=2)
    p = {name: t.detach() for name, t in S.EvaClip(config).init_weights().named_parameters()}
    assert 180e6 < sum(t.nbytes for t in p.values()) < 300e6  # bytes: enough for the noise of an allocator
    large = write(tmp_path / "large", form, config, p)
    small = write(tmp_path / "small", form, SQUARE, truth[SQUARE][0])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(S.__file__)}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(small), str(large), "visual,text"], capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.1, done.stdout


# ------------------------------------------------------------------------------------------------------ bad checkpoints

@pytest.fixture
def broken(tmp_path, truth):
    def make(form, change=lambda tensors: None, config=OBLONG):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        return write(tmp_path / "broken", form, config, truth[config][0], change)
    return make


@pytest.mark.parametrize("form, file", [("pt", "EVA_CLIP.pt"), ("original safetensors", "EVA_CLIP.safetensors"),
                                        ("hf bin", "pytorch_model.bin")])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated(broken, form, file, keep):
    path = broken(form)
    path = path / file if path.is_dir() else path
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(ValueError, match=f"{file}: cannot be read, it is cut short or holds more than tensors"):
        S.EvaClip.load(path)


def test_missing_shards(broken):
    path = broken("hf sharded")
    for n in (1, 3):
        (path / f"model-0000{n}-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 3 shards are missing, fetch them: .*model-00001-of.*model-00003"):
        S.EvaClip.load(path)
    (path / "model.safetensors.index.json").unlink()  # one shard by itself is not the model
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: no EVA-CLIP, it has no visual"):
        S.EvaClip.load(path / "model-00002-of-00003.safetensors")
    (path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is not JSON"):
        S.EvaClip.load(path)


def test_missing_and_unknown_tensors_are_listed(broken):
    def change(p):
        p["visual.blocks.0.attn.qkv.bias"] = p.pop("visual.norm.weight")
        p["visual.rope.freqs"] = torch.zeros(2)
        p["text.ln_final.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="1 missing: visual.norm.weight; 2 unknown: visual.blocks.0.attn.qkv.bias, "
                                         r"visual.rope.freqs; 1 of another shape .*: text.ln_final.bias \(5,\) instead "
                                         r"of \(24,\)"):
        S.EvaClip.load(broken("pt", change))
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=f"1 missing: {key}$"):
        S.EvaClip.load(broken("hf", lambda tensors: tensors.pop(key)))
    # Rows of another split than q, k, v of one width each would be cut in the wrong places.
    with pytest.raises(ValueError, match=r"visual.blocks.1.attn.qkv.weight None instead of \(72, 24\)"):
        S.EvaClip.load(broken("hf", lambda tensors: tensors.update({key: torch.zeros(12, 24)})))


def test_tensors_of_another_kind_are_refused(broken):
    """Whole numbers are somebody's quantised weights: cast like others they would be weights a hundred times too large.
    """
    path = broken("pt", lambda p: p.update({"visual.head.weight": torch.ones(16, 24, dtype=torch.int8)}))
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match="EVA_CLIP.pt: tensor visual.head.weight is of torch.int8"):
            S.EvaClip.load(path, dtype=dtype)
    path = broken("pt", lambda p: p.update({"visual.pos_embed": p["visual.pos_embed"][0]}))
    with pytest.raises(ValueError, match="EVA_CLIP.pt: no EVA-CLIP, it has no visual.pos_embed"):
        S.EvaClip.load(path)


def test_other_architectures_are_refused(tmp_path, broken):
    clip = {f"vision_model.{name}": torch.zeros(8) for name in ("embeddings.class_embedding", "pre_layrnorm.weight")}
    save_file(clip, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="no EVA-CLIP, it has no visual.patch_embed.proj.weight.* open_clip:NAME/TAG"):
        S.EvaClip.load(tmp_path / "clip.safetensors")
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "bert.safetensors")
    with pytest.raises(ValueError, match=r"bert.safetensors: no EVA-CLIP; its tensors are called \['encoder.weight'\]"):
        S.EvaClip.load(tmp_path / "bert.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt: holds no tensors"):
        S.EvaClip.load(tmp_path / "list.pt")
    for form, section, name, value in (("pt", "vision_cfg", "rope", True), ("hf", "vision_config", "hidden_act",
                                                                           "quick_gelu")):
        path = broken(form)
        config = path.parent / "config.json" if path.is_file() else path / "config.json"
        content = json.loads(config.read_text())
        content[section][name] = value
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"config.json: {name} = {value!r} is no EVA-CLIP"):
            S.EvaClip.load(path)


class Shell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, truth):
    p = dict(truth[OBLONG][0])
    torch.save({"state_dict": p, "extra": Shell(str(tmp_path / "done"))}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: cannot be read, it is cut short or holds more than tensors"):
        S.EvaClip.load(tmp_path / "evil.pt")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("change, message", [
    (lambda c: c["vision_cfg"].update(head_width=7), "width 24 is no multiple of head_width 7"),
    (lambda c: c["vision_cfg"].update(width="24"), "width is '24', expected whole and above 0; fetch"),
    (lambda c: c["vision_cfg"].update(layers="2"), "layers is '2', expected whole and above 0"),
    (lambda c: c["vision_cfg"].update(layers=True), "layers is True, expected whole and above 0"),
    (lambda c: c["vision_cfg"].update(patch_size=0), "patch_size is 0, expected whole and above 0"),
    (lambda c: c["vision_cfg"].update(mlp_ratio="2"), "mlp_ratio is '2', expected a number above 0"),
    (lambda c: c["vision_cfg"].update(postnorm="no"), "postnorm is 'no', expected true or false"),
    (lambda c: c["text_cfg"].update(context_length=None), "context is None, expected whole and above 0"),
    (lambda c: c.update(vision_cfg=None), "config.json: 'vision_cfg' is None, expected an object of settings; fetch"),
    (lambda c: c.update(text_cfg=[1]), r"config.json: 'text_cfg' is \[1\], expected an object of settings; fetch"),
    (lambda c: c.update(model_type="eva_clip", config=None), "config.json: 'config' is None, expected an object"),
    (lambda c: c.update(model_type="eva_clip", config={"image_size": [28]}), r"image_size is \(28,\), expected whole"),
    (lambda c: c["vision_cfg"].update(layers=3), "9 missing: visual.blocks.2.norm1.weight, visual"),
    (lambda c: c.clear(), "not the config of an EVA-CLIP")])
def test_bad_config(broken, change, message):
    path = broken("pt")
    config = json.loads((path.parent / "config.json").read_text())
    change(config)
    (path.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        S.EvaClip.load(path)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(vision_config=None), "'vision_config' is None, expected an object of settings; fetch it"),
    (lambda c: c.update(text_config=None), "'text_config' is None, expected an object of settings; fetch it"),
    (lambda c: c["vision_config"].update(num_attention_heads=0), "num_attention_heads is 0, expected whole"),
    (lambda c: c["vision_config"].update(num_attention_heads=None), "num_attention_heads is None, expected whole"),
    (lambda c: c["vision_config"].update(intermediate_size="48"), "intermediate_size is '48', expected whole"),
    (lambda c: c.update(projection_dim=None), "embed_dim is None, expected whole")])
def test_bad_hugging_face_config(broken, change, message):
    path = broken("hf")
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        S.EvaClip.load(path)


def test_dtype_of_a_config_is_nobodys_business(broken):
    """Weights have their own, and --scorer-dtype says what is wanted: a short name there is no fault."""
    path = broken("hf")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bf16", "torch_dtype": "bf16"}))
    assert S.EvaClip.load(path).logit_scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "load", "int8", 3])
def test_unknown_dtype(broken, dtype):
    path = str(broken("hf"))
    with pytest.raises(ValueError, match=f"scorer {path}: no dtype {dtype!r}; use float32, bfloat16 or float16"):
        S.load_scorer(path, dtype=dtype)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_index_without_files(broken, content):
    path = broken("hf sharded")
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json: its 'weight_map' is no object of tensor: file; fetch it again"):
        S.EvaClip.load(path)


@pytest.mark.parametrize("content", [{"model_cfg": {}, "preprocess_cfg": None}, {"preprocess_cfg": {"mean": 0}},
                                     {"model_cfg": None, "preprocess_cfg": {"mean": 0, "std": 1, "resize_mode": 2}}])
def test_bad_open_clip_config(tmp_path, content):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="open_clip_config.json: needs model_cfg, and preprocess_cfg with mean"):
        S.load_scorer(str(tmp_path))


def test_which_file_is_not_guessed(tmp_path, truth):
    write(tmp_path / "m", "pt", OBLONG, truth[OBLONG][0])
    shutil.copy(tmp_path / "m/EVA_CLIP.pt", tmp_path / "m/B.pt")
    with pytest.raises(FileNotFoundError, match="name one of its files: B.pt, EVA_CLIP.pt"):
        S.EvaClip.load(tmp_path / "m")
    assert S.EvaClip.load(tmp_path / "m/B.pt").config == OBLONG
    with pytest.raises(ValueError, match="config.json: not a weight file"):
        S.EvaClip.load(tmp_path / "m/config.json")


# ---------------------------------------------------------------------------------------------------------- as a scorer

def test_scorer_of_any_form(tmp_path, truth):
    """The same features from every form; the text tower comes with the first text."""
    p = truth[SQUARE][0]
    plain = S.load_scorer(str(write(tmp_path / "a", "pt", SQUARE, p)))
    other = S.load_scorer(str(write(tmp_path / "b", "hf sharded", SQUARE, p)))
    images = [Image.new("RGB", (30 + i, 50), (40 * i, 10, 200)) for i in range(3)]
    np.testing.assert_array_equal(plain.image_features(images), other.image_features(images))
    assert plain.model.text is None
    np.testing.assert_array_equal(plain.text_features(["a beetle", ""]), other.text_features(["a beetle", ""]))
    assert plain.model.text is not None
    assert plain.identity.startswith("EVA_CLIP@") and other.identity.startswith("b@")
    assert plain.identity.split("@")[1] != other.identity.split("@")[1]
    half = S.load_scorer(str(tmp_path / "a"), dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and plain.dtype == torch.float32
    # 2 images of 2 x 2 patches and CLS, 4 or 2 bytes, 2 * 24 beside the wider of 4 * 24 and 2 * 72 (q, k and v)
    assert (plain.activation_bytes(2), half.activation_bytes(2)) == (10 * 4 * 192, 10 * 2 * 192)
    low, high = half.image_features(images), plain.image_features(images)
    assert low.dtype == np.float32 and half.identity.split("@")[1] == plain.identity.split("@")[1]
    # The reference itself is at .9998 in bf16 and .999996 in fp16 against fp32 on models of this size.
    assert (S.normalise(low) * S.normalise(high)).sum(-1).min() > 0.9995
    half = S.load_scorer(str(tmp_path / "a"), dtype=torch.float16)
    assert (S.normalise(half.image_features(images)) * S.normalise(high)).sum(-1).min() > 0.99999


def test_every_shard_counts_for_the_identity(tmp_path, truth):
    p = dict(truth[OBLONG][0])
    first = S.load_scorer(str(write(tmp_path / "a", "hf sharded", OBLONG, p))).identity
    for name in ("visual.norm.weight", "text.ln_final.bias", "visual.head.weight"):
        changed = {**p, name: p[name] + 1e-3}
        shutil.rmtree(tmp_path / "a")
        assert S.load_scorer(str(write(tmp_path / "a", "hf sharded", OBLONG, changed))).identity != first
    shutil.rmtree(tmp_path / "a")
    assert S.load_scorer(str(write(tmp_path / "a", "hf sharded", OBLONG, p))).identity == first


@pytest.mark.parametrize("form", ["hf", "hf sharded", "hf bin", "hf sharded bin"])
def test_hugging_face_id(tmp_path, truth, form, monkeypatch):
    """The hub is a folder here: only files that match the patterns asked for are copied from it into the cache."""
    import fnmatch

    import huggingface_hub
    hub, cache = write(tmp_path / "hub", form, SQUARE, truth[SQUARE][0]), tmp_path / "cache/0123abc"
    (hub / "modeling_evaclip.py").write_text("raise SystemExit('executed')")
    (hub / "EVA_CLIP_8B_psz14_s9B.pt").write_bytes(b"33 GB of the same")
    cache.mkdir(parents=True)

    def snapshot_download(name, allow_patterns):
        assert name == "BAAI/EVA-CLIP-8B"
        for file in os.listdir(hub):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                shutil.copy(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    scorer = S.load_scorer("BAAI/EVA-CLIP-8B")
    assert scorer.identity.startswith("EVA-CLIP-8B@") and scorer.dim == 24
    assert scorer.text_features(["a beetle"]).shape == (1, 24)
    assert not [file for file in os.listdir(cache) if file.endswith((".py", ".pt"))]  # no code, no second copy


def test_hugging_face_id_offline(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="unknown scorer 'BAAI/EVA-CLIP-8B': no such folder here, and the Hugging Face "
                                         "hub gave: .*Known are local folders"):
        S.load_scorer("BAAI/EVA-CLIP-8B")
