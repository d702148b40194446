"""Scorers of open_clip: same features as open_clip itself gives, and its silent fallbacks are errors here.

    python -m pytest tests/test_open_clip.py

The models are tiny ones that open_clip builds from its own config format, with random weights saved to files; their
names and tags are entered into open_clip's tables for the time of a test, so nothing is fetched.
"""
import copy
import json
import os
import warnings

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained, transform
from PIL import Image
from safetensors.torch import save_file

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
    check(S.load_scorer(f"open_clip:tiny/a={file}"), model, OPENAI)


def test_statistics_and_resize_are_the_tags(tmp_path, table):
    """A file gets those of the tag that is named with it, where open_clip falls back to CLIP's."""
    table("tiny", CLIP, {"webli": dict(HALF), "x": {**HALF, "interpolation": "bilinear"}})
    model = save_random(tmp_path / "w.pt", "tiny")
    check(S.load_scorer(f"open_clip:tiny/webli={tmp_path}/w.pt"), model, HALF)
    check(S.load_scorer(f"open_clip:tiny/x={tmp_path}/w.pt"), model, {**HALF, "interpolation": "bilinear"})


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
    assert half.fingerprint() @ scorer.fingerprint() < 0.999  # same weights, other features
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
    plain = S.load_scorer(str(tmp_path / "SigLIP"))  # the prefix may be left out
    np.testing.assert_array_equal(plain.fingerprint(), scorer.fingerprint())
    low = S.load_scorer(f"local-dir:{tmp_path}/SigLIP", dtype=torch.bfloat16)
    for got, want in ((low.image_features(pictures()), scorer.image_features(pictures())),
                      (low.text_features(TEXTS), scorer.text_features(TEXTS))):
        assert (S.normalise(got) * S.normalise(want)).sum(-1).min() > 0.999


# ------------------------------------------------------------------------------------------------------ what is refused

@pytest.mark.parametrize("name", [name for name in pretrained._PRETRAINED if "siglip" in name.lower()])
def test_every_siglip_squashes_with_mean_one_half(name, monkeypatch):
    """What reaches open_clip for every published SigLIP; for OpenAI's weights quick GELU."""
    def create(source, pretrained, force_preprocess_cfg, force_quick_gelu, require_pretrained):
        assert source == name and force_preprocess_cfg == HALF and not force_quick_gelu
        raise ValueError("seen")
    monkeypatch.setattr(open_clip, "create_model", create)
    for tag in open_clip.list_pretrained_tags_by_model(name):
        with pytest.raises(S.InputError, match="seen"):
            S.load_scorer(f"open_clip:{name}/{tag}")


@pytest.mark.parametrize("name", ["open_clip:ViT-B-23/openai", "open_clip:ViT-B-32/opnai", "open_clip:ViT-B-32",
                                  "open_clip:ViT-L-14/weights.pt"])
def test_names_that_are_nothing(name, tmp_path):
    """A file alone does not say which GELU and pixel statistics it was trained with: its tag is asked for."""
    with pytest.raises(S.InputError, match="no such model and tag in open_clip .a file: NAME/TAG=FILE.; tags of ViT"):
        S.load_scorer(name)
    with pytest.raises(FileNotFoundError, match="open_clip_config.json is missing"):
        S.load_scorer(f"local-dir:{tmp_path}")


def test_bad_weights_and_being_offline(tmp_path, table, monkeypatch):
    table("tiny", CLIP, {"a": dict(OPENAI), "far": {**OPENAI, "hf_hub": "nobody/nowhere/"}})
    table("other", {**CLIP, "embed_dim": 16}, {"a": dict(OPENAI)})
    for end in ("safetensors", "pt"):
        file = tmp_path / f"w.{end}"
        state = save_random(file, "tiny").state_dict()
        with pytest.raises(S.InputError, match=f"w.{end}: open_clip cannot load its weights, .*size mismatch"):
            S.load_scorer(f"open_clip:other/a={file}")
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(S.InputError, match=f"w.{end}: open_clip cannot load its weights"):
            S.load_scorer(f"open_clip:tiny/a={file}")
    del state["visual.proj"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(S.InputError, match='Missing key.*"visual.proj"'):
        S.load_scorer(f"open_clip:tiny/a={tmp_path}/less.pt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(S.InputError, match="open_clip:tiny/far: open_clip cannot load its weights, or fetch them"):
        S.load_scorer("open_clip:tiny/far")


@pytest.mark.parametrize("content", ["{", json.dumps({"model_cfg": CLIP, "preprocess_cfg": {"std": [0.5] * 3}}),
                                     json.dumps({"model_cfg": CLIP})])
def test_bad_local_dirs(tmp_path, table, content):
    local_dir(tmp_path / "m", table, CLIP, OPENAI)
    (tmp_path / "m/open_clip_config.json").write_text(content)
    with pytest.raises(S.InputError, match="open_clip_config.json: its preprocess_cfg has no mean|is no JSON object"):
        S.load_scorer(f"local-dir:{tmp_path}/m")


def test_images_need_no_tokenizer(tmp_path, table, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    table("tiny", SIGLIP, {"webli": dict(HALF)})
    save_random(tmp_path / "w.pt", "tiny")
    scorer = S.load_scorer(f"open_clip:tiny/webli={tmp_path}/w.pt")
    assert scorer.image_features(pictures()).shape == (3, 64)
    with pytest.raises(OSError, match="nobody/nowhere|connect"):
        scorer.text_features(["a"])
