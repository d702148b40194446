"""Scorers of open_clip: same features as open_clip itself gives, and its silent fallbacks are errors here.

    python -m pytest tests/test_open_clip.py

The models are tiny ones that open_clip builds from its own config format, with random weights saved to files; their
names and tags are entered into open_clip's tables for the time of a test, so nothing is fetched.
"""
import copy
import json
import os
import warnings

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained, transform
from PIL import Image
from safetensors.torch import load_file, save_file

import scorer as S

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 32, "text_cfg": TEXT,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}}
EVA02 = {"embed_dim": 32, "text_cfg": TEXT, "custom_text": True,
         "vision_cfg": {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_model_pretrained": False,
                        "timm_pool": "token", "timm_proj": None}}
SIGLIP = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True,
          "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False,
                         "timm_pool": "map", "timm_proj": "none"},
          "text_cfg": {"context_length": 16, "vocab_size": 40, "hf_tokenizer_name": "nobody/nowhere", "width": 64,
                       "tokenizer_kwargs": {"clean": "canonicalize"}, "heads": 2, "layers": 1, "no_causal_mask": True,
                       "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}}
OPENAI = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic",
          "resize_mode": "shortest"}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "squash"}


def save_random(path, name, seed=0, **kwargs):
    """Random weights of a model of open_clip's tables, every parameter random, as a file -> the model."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(name, pretrained_text=False, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path) if str(path).endswith(".safetensors") else torch.save({"state_dict": state}, path)
    return model


@pytest.fixture
def table(monkeypatch):
    """Enter a model and its published tags {tag: settings} into open_clip's tables."""
    def enter(name, config, tags=None):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, copy.deepcopy(config))
        if tags is not None:
            monkeypatch.setitem(pretrained._PRETRAINED, name, tags)
    return enter


def pictures():
    """Wide, tall, square, with an alpha channel."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((90, 40), (30, 77), (64, 64))]


TEXTS = ["a beetle", "", "The old stone bridge over the river, built in 1742. " * 40]


def check(scorer, model, pixels, tokens=None):
    """Features of `scorer` against open_clip's own transform, tokenizer and model."""
    size = model.visual.image_size
    recipe = transform.image_transform_v2(transform.PreprocessCfg(size=size, **pixels), is_train=False)
    tokens = tokens if tokens is not None else open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    with torch.no_grad():
        images = model.encode_image(torch.stack([recipe(image) for image in pictures()])).numpy()
        texts = model.encode_text(tokens).numpy()
    scorer.batch_size = 2
    for got, want in ((scorer.image_features(pictures()), images), (scorer.text_features(TEXTS), texts)):
        assert got.dtype == np.float32 and got.shape == (3, scorer.dim)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert (np.abs(np.linalg.norm(images, axis=1) - 1) > 1e-2).all()  # un-normalised: Eq. 3 adds before it normalises


# ----------------------------------------------------------------------------------------------- the same features

@pytest.mark.parametrize("end", ["safetensors", "pt"])
@pytest.mark.parametrize("config", [CLIP, EVA02], ids=["CLIP", "EVA02"])
def test_file_of_a_model(tmp_path, table, config, end):
    table("tiny", config, {"a": dict(OPENAI), "b": dict(OPENAI)})
    file = tmp_path / f"w.{end}"
    model = save_random(file, "tiny")
    scorer = S.load_scorer(f"open_clip:tiny/{file}")
    check(scorer, model, OPENAI)
    assert scorer.identity.startswith("tiny@") and len(scorer.identity) == 5 + 12
    assert scorer.activation_bytes(1) > 0


def test_statistics_and_resize_are_the_weights_own(tmp_path, table):
    """All weights published for the name agree, so a bare file gets theirs, where open_clip falls back to CLIP's."""
    table("tiny", CLIP, {"webli": dict(HALF)})
    model = save_random(tmp_path / "w.pt", "tiny")
    check(S.load_scorer(f"open_clip:tiny/{tmp_path}/w.pt"), model, HALF)
    table("bilinear", CLIP, {"x": {**HALF, "interpolation": "bilinear"}})
    check(S.load_scorer(f"open_clip:bilinear/{tmp_path}/w.pt"), model, {**HALF, "interpolation": "bilinear"})
    table("unpublished", CLIP)
    check(S.load_scorer(f"open_clip:unpublished/{tmp_path}/w.pt"), model, OPENAI)  # what open_clip trains with


def test_tag(tmp_path, table):
    """Statistics and activation come with the tag: `openai` on a plain name gets quick GELU without a warning."""
    table("tiny", CLIP, {"openai": {**OPENAI, "quick_gelu": True, "file": str(tmp_path / "w.pt")},
                         "half": {**HALF, "file": str(tmp_path / "w.pt")}})
    plain = save_random(tmp_path / "w.pt", "tiny")
    quick = open_clip.create_model("tiny", str(tmp_path / "w.pt"), force_quick_gelu=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = S.load_scorer("open_clip:tiny/openai")
    check(scorer, quick, OPENAI)
    with pytest.raises(AssertionError):  # the two activations can be told apart
        check(scorer, plain, OPENAI)
    half = S.load_scorer("open_clip:tiny/half")
    check(half, plain, HALF)
    assert half.identity != scorer.identity  # same weights, other features
    check(S.load_scorer(f"open_clip:tiny/openai={tmp_path}/w.pt"), quick, OPENAI)


def local_dir(folder, table, config, preprocess_cfg, end="safetensors"):
    """An open_clip folder as its own push_to_hub writes it -> its model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    folder.mkdir()
    table("tiny", config)
    model = save_random(folder / f"open_clip_model.{end}", "tiny")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess_cfg}))
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "beetle", "the", "old", "stone", "bridge"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return model


def test_local_dir_with_siglip(tmp_path, table):
    model = local_dir(tmp_path / "SigLIP", table, SIGLIP, HALF)
    scorer = S.load_scorer(f"local-dir:{tmp_path}/SigLIP")
    # No start or end token and no causal mask: the text is read at the last position, padding included.
    ids = torch.zeros(3, 16, dtype=torch.long)
    ids[0, :2] = torch.tensor([2, 3])
    words = ([4, 5, 6, 7, 1, 4, 1, 1, 1, 1] * 2)[:16]  # "the old stone bridge over the river built in 1742 the ..."
    ids[2] = torch.tensor(words)
    check(scorer, model, HALF, tokens=ids)
    assert scorer.identity.startswith("SigLIP@") and scorer.dim == 64
    assert S.load_scorer(str(tmp_path / "SigLIP")).identity == scorer.identity  # the prefix may be left out
    low = S.load_scorer(f"local-dir:{tmp_path}/SigLIP", dtype=torch.bfloat16)
    for got, want in ((low.image_features(pictures()), scorer.image_features(pictures())),
                      (low.text_features(TEXTS), scorer.text_features(TEXTS))):
        assert (S.normalise(got) * S.normalise(want)).sum(-1).min() > 0.999


def test_identity_counts_weights_and_settings(tmp_path, table):
    local_dir(tmp_path / "m", table, CLIP, OPENAI)
    first = S.load_scorer(f"local-dir:{tmp_path}/m").identity
    os.rename(tmp_path / "m", tmp_path / "else")
    os.rename(tmp_path / "else", tmp_path / "m")
    assert S.load_scorer(f"local-dir:{tmp_path}/m").identity == first
    (tmp_path / "m/open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": HALF}))
    second = S.load_scorer(f"local-dir:{tmp_path}/m").identity
    state = load_file(tmp_path / "m/open_clip_model.safetensors")
    state["visual.proj"][0, 0] += 1
    save_file(state, tmp_path / "m/open_clip_model.safetensors")
    assert len({first, second, S.load_scorer(f"local-dir:{tmp_path}/m").identity}) == 3


# ------------------------------------------------------------------------------------------------------ what is refused

def test_ambiguous_files_are_refused(tmp_path):
    """open_clip's own tables: what a file cannot say must be said in the name."""
    file = tmp_path / "weights.pt"
    file.write_bytes(b"never read")
    # Published for ViT-L-14 with plain GELU: laion2b with mean .5, datacomp and others with CLIP's.
    with pytest.raises(ValueError, match=f"weights published for ViT-L-14 differ; .* open_clip:ViT-L-14/TAG={file}"):
        S.load_scorer(f"open_clip:ViT-L-14/{file}")
    # All that is published for ViT-L-14-336 is OpenAI's, with quick GELU, and the plain name builds plain GELU.
    with pytest.raises(ValueError, match="does not say which GELU"):
        S.load_scorer(f"open_clip:ViT-L-14-336/{file}")
    model, found, pixels, quick = S._open_clip_model(f"open_clip:ViT-L-14-336/openai={file}")
    assert (model, found, quick, pixels["resize_mode"]) == ("ViT-L-14-336", str(file), True, "shortest")
    assert S._open_clip_model(f"open_clip:ViT-L-14/laion2b_s32b_b82k={file}")[2]["mean"] == (0.5, 0.5, 0.5)
    assert S._open_clip_model(f"open_clip:ViT-L-14-quickgelu/metaclip_400m={file}")[3] is True
    _, _, pixels, quick = S._open_clip_model(f"open_clip:ViT-SO400M-14-SigLIP-384/{file}")
    assert not quick and pixels["mean"] == (0.5, 0.5, 0.5) and pixels["resize_mode"] == "squash"
    _, _, pixels, quick = S._open_clip_model(f"open_clip:EVA02-E-14-plus/{file}")
    assert not quick and pixels["mean"] == open_clip.OPENAI_DATASET_MEAN and pixels["resize_mode"] == "shortest"
    os.rename(file, tmp_path / "openai.pt")
    with pytest.raises(ValueError, match="does not say which GELU"):
        S.load_scorer(f"open_clip:ViT-B-32/{tmp_path}/openai.pt")
    assert S._open_clip_model(f"open_clip:ViT-B-32-quickgelu/{tmp_path}/openai.pt")[3] is True


@pytest.mark.parametrize("name", [name for name in pretrained._PRETRAINED if "siglip" in name.lower()])
def test_every_siglip_squashes_with_mean_one_half(name, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"never read")
    pixels = S._open_clip_model(f"open_clip:{name}/{tmp_path}/w.pt")[2]
    assert pixels == HALF


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(ValueError, match="no model 'ViT-B-23'; close are .*'ViT-B-32'"):
        S.load_scorer("open_clip:ViT-B-23/openai")
    with pytest.raises(ValueError, match="'opnai' is no file and no tag of ViT-B-32; its tags are .*'openai'"):
        S.load_scorer("open_clip:ViT-B-32/opnai")
    with pytest.raises(ValueError, match="'' is no file and no tag of ViT-B-32"):
        S.load_scorer("open_clip:ViT-B-32")
    with pytest.raises(FileNotFoundError, match="open_clip_config.json is missing"):
        S.load_scorer(f"local-dir:{tmp_path}")


def test_offline_says_what_to_do(monkeypatch, table):
    def offline(*args, **kwargs):
        raise FileNotFoundError("Failed to download file")
    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ValueError, match="open_clip:ViT-B-32/openai: its weights are not here and cannot be fetched "
                                         r"\(Failed to download file\); .* open_clip:ViT-B-32/openai=FILE"):
        S.load_scorer("open_clip:ViT-B-32/openai")


def test_bad_local_dirs(tmp_path, table):
    local_dir(tmp_path / "m", table, CLIP, OPENAI)
    config = tmp_path / "m/open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3}}))
    with pytest.raises(ValueError, match="open_clip_config.json: needs model_cfg, and preprocess_cfg with mean, std"):
        S.load_scorer(f"local-dir:{tmp_path}/m")
    config.write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {**OPENAI, "resize_mode": "longest"}}))
    with pytest.raises(ValueError, match="resize mode 'longest' is not known"):
        S.load_scorer(f"local-dir:{tmp_path}/m")
    config.write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {**OPENAI, "interpolation": "random"}}))
    with pytest.raises(ValueError, match="interpolation 'random' is not known"):
        S.load_scorer(f"local-dir:{tmp_path}/m")
    config.write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": OPENAI}))
    for name in ("a.pth", "b.pth"):
        os.link(tmp_path / "m/open_clip_model.safetensors", tmp_path / "m" / name)
    os.remove(tmp_path / "m/open_clip_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no open_clip_model.safetensors, and \['a.pth', 'b.pth'\] beside"):
        S.load_scorer(f"local-dir:{tmp_path}/m")


def test_damaged_weights(tmp_path, table):
    table("tiny", CLIP, {"a": dict(OPENAI)})
    table("other", {**CLIP, "embed_dim": 16}, {"a": dict(OPENAI)})
    for end in ("safetensors", "pt"):
        file = tmp_path / f"w.{end}"
        model = save_random(file, "tiny")
        with pytest.raises(ValueError, match=f"w.{end}: cannot be loaded as open_clip's other: .*size mismatch"):
            S.load_scorer(f"open_clip:other/{file}")
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ValueError, match=f"w.{end}: cannot be loaded as open_clip's tiny"):
            S.load_scorer(f"open_clip:tiny/{file}")
    state = model.state_dict()
    state["visual.proj"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"nan.pt: 1 tensors hold NaN or infinity, first \['visual.proj'\]"):
        S.load_scorer(f"open_clip:tiny/{tmp_path}/nan.pt")
    del state["visual.proj"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ValueError, match='less.pt: cannot be loaded .*Missing key.*"visual.proj"'):
        S.load_scorer(f"open_clip:tiny/{tmp_path}/less.pt")


def test_tokenizer_that_is_not_here(tmp_path, table, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    table("tiny", SIGLIP, {"webli": dict(HALF)})
    save_random(tmp_path / "w.pt", "tiny")
    scorer = S.load_scorer(f"open_clip:tiny/{tmp_path}/w.pt")
    assert scorer.image_features(pictures()).shape == (3, 64)  # images need no tokenizer
    with pytest.raises(ValueError, match="its tokenizer is not here and cannot be fetched .* use local-dir:FOLDER"):
        scorer.text_features(["a"])
