"""Checkpoints of EVA-CLIP: every published form gives the features of the plain implementation, every fault is named.

    python -m pytest tests/test_checkpoints.py

The plain implementation is test_scorer.py's; the names of the Hugging Face form are written out here a second time.
"""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_scorer import OBLONG, POSTNORM, SQUARE, random_model, slow_image, slow_text

import scorer as S


def original(p):
    """Our tensors under the names of the released .pt, from the reference table."""
    out = {}
    for name, tensor in p.items():
        if name.startswith("visual.patch_embed."):
            name = name.replace("patch_embed.", "patch_embed.proj.")
        elif name.startswith("text.blocks."):
            for a, b in (("text.blocks", "text.transformer.resblocks"), (".norm", ".ln_"), (".fc1", ".c_fc"),
                         (".attn.proj", ".attn.out_proj"), (".attn.qkv.", ".attn.in_proj_"), (".fc2", ".c_proj")):
                name = name.replace(a, b)
        out[name] = tensor
    return out


def hugging_face(p):
    """Our tensors under the names and in the shapes of a Hugging Face folder, from the reference table."""
    out = {"vision_model.embeddings.class_embedding": p["visual.cls_token"].reshape(-1),
           "vision_model.embeddings.position_embedding.weight": p["visual.pos_embed"][0],
           "vision_model.embeddings.patch_embedding.weight": p["visual.patch_embed.weight"],
           "vision_model.embeddings.patch_embedding.bias": p["visual.patch_embed.bias"],
           "vision_model.post_layernorm.weight": p["visual.norm.weight"],
           "visual_projection.weight": p["visual.head.weight"],
           "text_model.embeddings.token_embedding.weight": p["text.token_embedding.weight"],
           "text_model.embeddings.position_embedding.weight": p["text.positional_embedding"],
           "text_model.final_layer_norm.weight": p["text.ln_final.weight"],
           "text_model.final_layer_norm.bias": p["text.ln_final.bias"],
           "text_projection.weight": p["text.text_projection"].T.contiguous()}
    for name, tensor in p.items():
        tower, _, rest = name.partition(".blocks.")
        if not rest:
            continue
        layer, module, kind = rest.split(".", 1)[0], rest.split(".", 1)[1].rsplit(".", 1)[0], rest.rsplit(".", 1)[1]
        start = f"{'vision' if tower == 'visual' else 'text'}_model.encoder.layers.{layer}."
        if module == "attn.qkv":
            for part, rows in zip("qkv", tensor.chunk(3)):
                out[f"{start}self_attn.{part}_proj.{kind}"] = rows.clone()
        else:
            theirs = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
            out[f"{start}{theirs.get(module, module)}.{kind}"] = tensor
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
                            "num_hidden_layers": config.text_layers, "hidden_act": "gelu",
                            "use_rms_norm": False}}  # and so it must: the text tower has LayerNorm


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
    theirs, p = hugging_face(p), original(p)
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
    scale = math.log(100) if form in ("hf", "hf sharded", "hf sharded bin") else p["logit_scale"].item()
    assert model.logit_scale.item() == pytest.approx(scale)
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
    with pytest.raises(ValueError, match=r"(EVA_CLIP.pt|model-0000.-of-00003.safetensors): tensor text.*l.*_?norm.* "
                                         "holds NaN|text.ln_final.weight holds NaN"):
        S.EvaClip.load(path)


def test_file_of_the_vision_tower_alone(tmp_path, truth):
    p = truth[OBLONG][0]
    write(tmp_path / "m", "pt", OBLONG, p)
    torch.save({name: t for name, t in p.items() if not name.startswith("text.")}, tmp_path / "m/EVA_CLIP.pt")
    assert S.EvaClip.load(tmp_path / "m", towers=("visual",)).text is None
    with pytest.raises(ValueError, match='not those of an EVA-CLIP.*Missing key.*"text.token_embedding.weight"'):
        S.EvaClip.load(tmp_path / "m")


def test_overflow_of_the_asked_dtype(tmp_path, truth):
    p = dict(truth[OBLONG][0])
    p["visual.norm.weight"] = torch.full_like(p["visual.norm.weight"], 7e4)  # float16 ends at 65504
    path = write(tmp_path / "m", "pt", OBLONG, p)
    assert S.EvaClip.load(path).visual.norm.weight[0] == 7e4
    with pytest.raises(ValueError, match="visual.norm.weight holds NaN or infinity in torch.float16"):
        S.EvaClip.load(path, dtype=torch.float16)


@pytest.mark.parametrize("form", [original, hugging_face])
@pytest.mark.parametrize("config", [
    S.EvaClipConfig(), S.EvaClipConfig(image_size=448),
    S.EvaClipConfig(embed_dim=1536, width=5120, layers=48, postnorm=True)], ids=["8B", "8B-448", "18B"])
def test_released_models_need_no_config(config, form, monkeypatch):
    """At their real sizes and without their gigabytes: names and shapes alone, on the meta device."""
    with torch.device("meta"):
        stored = form({name: t.detach() for name, t in S.EvaClip(config).named_parameters()})
    if form is hugging_face and config.layers == 32:  # q, k and v apart: 2 more a vision layer, 4 more a text layer
        assert len(stored) == 683 + 2 * 32 + 4 * 32
    monkeypatch.setattr(S, "open_weights", lambda file: [(name, lambda t=t: t) for name, t in stored.items()])
    monkeypatch.setattr(S.torch, "isfinite", lambda t: torch.ones(1))
    monkeypatch.setattr(S, "weight_files", lambda name: ["nowhere/weights.pt"])
    assert S.EvaClip.load("nowhere", device="meta").config == config


# ------------------------------------------------------------------------------------------------------ bad checkpoints

@pytest.fixture
def broken(tmp_path, truth):
    """broken(form, change): the path of a checkpoint whose stored tensors `change` has edited."""
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
    (path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00001-of-00003.safetensors: cannot be read.*No such file"):
        S.EvaClip.load(path)
    with pytest.raises(ValueError, match="Missing key|no EVA-CLIP"):  # one shard by itself is not the model
        S.EvaClip.load(path / "model-00002-of-00003.safetensors")


def test_missing_and_unknown_tensors_are_listed(broken):
    def change(p):
        p["visual.blocks.0.attn.qkv.bias"] = p.pop("visual.norm.weight")
        p["visual.rope.freqs"] = torch.zeros(2)
        p["text.ln_final.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match='Missing key.* "visual.norm.weight".*Unexpected key.*"visual.rope.freqs", '
                                         '"visual.blocks.0.attn.qkv.bias".*size mismatch for text.ln_final.bias'):
        S.EvaClip.load(broken("pt", change))
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    for change in (lambda tensors: tensors.pop(key), lambda tensors: tensors.update({key: torch.zeros(12, 24)})):
        with pytest.raises(ValueError, match="size mismatch for visual.blocks.1.attn.qkv.weight"):
            S.EvaClip.load(broken("hf", change))
    # The norm of a tower shows in its tensors: a LayerNorm in the vision tower has a bias.
    key = "vision_model.encoder.layers.0.layer_norm1.bias"
    with pytest.raises(ValueError, match='Unexpected key.*"visual.blocks.0.norm1.bias"'):
        S.EvaClip.load(broken("hf", lambda tensors: tensors.update({key: torch.zeros(24)})))


def test_tensors_of_another_kind_are_refused(broken):
    """Whole numbers are somebody's quantised weights: cast like others they would be weights a hundred times too large.
    """
    path = broken("pt", lambda p: p.update({"visual.head.weight": torch.ones(16, 24, dtype=torch.int8)}))
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match="EVA_CLIP.pt: tensor visual.head.weight is of torch.int8"):
            S.EvaClip.load(path, dtype=dtype)


def test_other_architectures_are_refused(tmp_path, broken):
    clip = {f"vision_model.{name}": torch.zeros(8) for name in ("embeddings.class_embedding", "pre_layrnorm.weight")}
    save_file(clip, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="no EVA-CLIP; its tensors are called .*open_clip:NAME/TAG"):
        S.EvaClip.load(tmp_path / "clip.safetensors")
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "bert.safetensors")
    with pytest.raises(ValueError, match=r"bert.safetensors: no EVA-CLIP; its tensors are called \['encoder.weight'\]"):
        S.EvaClip.load(tmp_path / "bert.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt: no EVA-CLIP"):
        S.EvaClip.load(tmp_path / "list.pt")
    for form, section, name, value in (("pt", "vision_cfg", "rope", True), ("hf", "vision_config", "hidden_act",
                                                                           "quick_gelu")):
        path = broken(form)
        config = path.parent / "config.json" if path.is_file() else path / "config.json"
        content = json.loads(config.read_text())
        content[section][name] = value
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="config.json: activation or positions are not those of EVA-CLIP"):
            S.EvaClip.load(path)


class Evil:
    """What unpickling would run: it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, truth):
    torch.save({"state_dict": truth[OBLONG][0], "extra": Evil(tmp_path / "mark")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: cannot be read, it is cut short or holds more than tensors"):
        S.EvaClip.load(tmp_path / "evil.pt")
    assert not (tmp_path / "mark").exists()
    function, arguments = Evil(tmp_path / "mark").__reduce__()  # the trap does work
    function(*arguments)
    assert (tmp_path / "mark").exists()


def test_dtype_of_a_config_is_nobodys_business(broken):
    """Weights have their own, and --scorer-dtype says what is wanted: a short name there is no fault."""
    path = broken("hf")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bf16", "torch_dtype": "bf16"}))
    assert S.EvaClip.load(path).logit_scale.dtype == torch.float32


@pytest.mark.parametrize("content", ["{", "[]"])
def test_bad_config(broken, content):
    path = broken("hf")
    (path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is no JSON object .*: fetch it again"):
        S.EvaClip.load(path)


def test_which_file_is_not_guessed(tmp_path, truth):
    write(tmp_path / "m", "pt", OBLONG, truth[OBLONG][0])
    shutil.copy(tmp_path / "m/EVA_CLIP.pt", tmp_path / "m/B.pt")
    with pytest.raises(ValueError, match="model.safetensors"):
        S.EvaClip.load(tmp_path / "m")
    assert S.EvaClip.load(tmp_path / "m/B.pt").config == OBLONG
    with pytest.raises(FileNotFoundError, match="config.json'"):
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
    high = plain.image_features(images), plain.text_features(["a beetle"])
    # The reference itself is at .9998 in bf16 and .999996 in fp16 against fp32 on models of this size.
    for dtype, bound in (("bfloat16", 0.9995), (torch.float16, 0.99999)):
        half = S.load_scorer(str(tmp_path / "a"), dtype=dtype)
        assert str(half.dtype).endswith(str(dtype).split(".")[-1])
        for low, exact in zip((half.image_features(images), half.text_features(["a beetle"])), high):
            assert low.dtype == np.float32 and (S.normalise(low) * S.normalise(exact)).sum(-1).min() > bound


@pytest.mark.parametrize("form", ["hf", "hf sharded", "hf bin", "hf sharded bin"])
def test_hugging_face_id_in_the_cache(tmp_path, truth, form, monkeypatch):
    """An id is found in the local cache without a network; code that lies beside the weights is not run."""
    import huggingface_hub
    import transformers.utils.hub as hub
    snapshot = tmp_path / "models--BAAI--EVA-CLIP-8B/snapshots/0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "models--BAAI--EVA-CLIP-8B/refs").mkdir(parents=True)
    (tmp_path / "models--BAAI--EVA-CLIP-8B/refs/main").write_text(snapshot.name)
    shutil.copytree(write(tmp_path / "m", form, SQUARE, truth[SQUARE][0]), snapshot)
    (snapshot / "modeling_evaclip.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    scorer = S.load_scorer("BAAI/EVA-CLIP-8B")
    assert scorer.dim == 24 and scorer.text_features(["a beetle"]).shape == (1, 24)


def test_hugging_face_id_offline(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="scorer 'BAAI/EVA-CLIP-8B': .*Known are local folders"):
        S.load_scorer("BAAI/EVA-CLIP-8B")
