"""scorer.py: the module against a second implementation, the equations against slow ones, the files against bad input.

    python -m pytest tests/test_scorer.py
"""
import json
import math
import multiprocessing
import os
import shutil
import time
import tracemalloc

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

import scorer as S

SMALL = dict(image_size=28, patch_size=14, width=24, layers=2, head_width=8, mlp_ratio=2.5, context=16, vocab=600,
             text_heads=3, text_layers=2)
SQUARE = S.EvaClipConfig(embed_dim=24, text_width=24, **SMALL)   # text_projection square: transposed it still fits
OBLONG = S.EvaClipConfig(embed_dim=16, text_width=24, **SMALL)


def random_model(config, seed=0):
    """Every parameter random, norms and biases too: at their usual 1 and 0 a forgotten one would not show."""
    model = S.EvaClip(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    random_model(OBLONG, 3).save(path)
    return str(path)


# ---------------------------------------------------------------------------- a second EVA-CLIP, written for comparison

def slow_attention(q, k, v, heads, causal):
    """Softmax attention of one sequence [T, width], head by head and position by position."""
    t, width = q.shape
    d = width // heads
    out = torch.zeros(t, width)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(t):
            seen = i + 1 if causal else t
            logits = torch.stack([torch.dot(q[i, part], k[j, part]) / math.sqrt(d) for j in range(seen)])
            weights = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()
            out[i, part] = sum(weights[j] * v[j, part] for j in range(seen))
    return out


def exact_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def rms(x, w):
    return w * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def layer_norm(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * w + b


def slow_image(p, config, pixels):
    """One image [3, H, W] -> [D], from the tensors by name."""
    size, tokens = config.patch_size, []
    for top in range(0, pixels.shape[1], size):
        for left in range(0, pixels.shape[2], size):
            patch = pixels[:, top:top + size, left:left + size]
            kernel = p["visual.patch_embed.weight"]
            tokens.append((kernel * patch).sum((1, 2, 3)) + p["visual.patch_embed.bias"])
    x = torch.stack([p["visual.cls_token"][0, 0], *tokens]) + p["visual.pos_embed"][0]
    width = config.width
    for i in range(config.layers):
        b = {name.removeprefix(f"visual.blocks.{i}."): t for name, t in p.items() if f"visual.blocks.{i}." in name}

        def attention(y, b=b):
            q, k, v = (y @ b["attn.qkv.weight"][n * width:(n + 1) * width].T for n in range(3))
            attended = slow_attention(q, k, v, width // config.head_width, False)
            return attended @ b["attn.proj.weight"].T + b["attn.proj.bias"]

        def mlp(y, b=b):
            return exact_gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]

        if config.postnorm:
            x = x + rms(attention(x), b["norm1.weight"])
            x = x + rms(mlp(x), b["norm2.weight"])
        else:
            x = x + attention(rms(x, b["norm1.weight"]))
            x = x + mlp(rms(x, b["norm2.weight"]))
    return p["visual.head.weight"] @ rms(x, p["visual.norm.weight"])[0]


def slow_text(p, config, ids):
    """One text, ids [T] -> [D]."""
    x = torch.stack([p["text.token_embedding.weight"][i] for i in ids]) + p["text.positional_embedding"][:len(ids)]
    width = config.text_width
    for i in range(config.text_layers):
        start = f"text.blocks.{i}."
        b = {name.removeprefix(start): t for name, t in p.items() if name.startswith(start)}
        y = layer_norm(x, b["norm1.weight"], b["norm1.bias"])
        q, k, v = (y @ b["attn.qkv.weight"][n * width:(n + 1) * width].T
                   + b["attn.qkv.bias"][n * width:(n + 1) * width] for n in range(3))
        attended = slow_attention(q, k, v, config.text_heads, True)
        x = x + attended @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = layer_norm(x, b["norm2.weight"], b["norm2.bias"])
        hidden = exact_gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + hidden @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    end = max(range(len(ids)), key=lambda n: (ids[n], -n))  # first position of the largest id
    x = layer_norm(x, p["text.ln_final.weight"], p["text.ln_final.bias"])[end]
    return sum(x[n] * p["text.text_projection"][n] for n in range(width))  # (in, out)


POSTNORM = S.EvaClipConfig(embed_dim=16, text_width=24, postnorm=True, **SMALL)


@pytest.mark.parametrize("config", [SQUARE, OBLONG, POSTNORM], ids=["square", "oblong", "postnorm"])
@torch.no_grad()
def test_module_equals_second_implementation(config):
    model = random_model(config)
    p = dict(model.named_parameters())
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    got, want = model.encode_image(pixels), torch.stack([slow_image(p, config, image) for image in pixels])
    assert got.shape == (3, config.embed_dim)
    assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item()), (got - want).abs().max()
    ids = torch.tensor([[598, 5, 9, 599, 0, 0], [598, 599, 599, 7, 599, 1], [598, 1, 2, 3, 4, 599]])
    got, want = model.encode_text(ids), torch.stack([slow_text(p, config, row.tolist()) for row in ids])
    assert got.shape == (3, config.embed_dim)
    assert torch.allclose(got, want, atol=1e-5 * want.abs().max().item()), (got - want).abs().max()


def test_sizes_of_the_8b():
    """On the meta device: the released file has 684 tensors and 8,220,748,545 numbers."""
    with torch.device("meta"):
        model = S.EvaClip(S.EvaClipConfig())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(shapes) == 684
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_220_748_545
    assert shapes["visual.blocks.31.attn.qkv.weight"] == (12288, 4096)
    assert "visual.blocks.31.attn.qkv.bias" not in shapes and "visual.head.bias" not in shapes
    assert shapes["text.blocks.0.attn.qkv.bias"] == (3840,) and shapes["visual.pos_embed"] == (1, 257, 4096)


def test_rmsnorm_casts_before_the_weight():
    norm = S.RMSNorm(64).to(torch.bfloat16)
    x = (torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 30).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.3, 3, 64))
        got = norm(x)
    exact = x.float() * torch.rsqrt((x.float() ** 2).mean(-1, keepdim=True) + 1e-6)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, norm.weight * exact.to(torch.bfloat16))
    assert not torch.equal(got, (norm.weight.float() * exact).to(torch.bfloat16))  # the other order does differ
    assert S.RMSNorm(64)(x.float()).dtype == torch.float32
    # 300^2 overflows float16, so the variance must be taken in float32.
    assert torch.isfinite(S.RMSNorm(64).half()(torch.full((1, 64), 300.0, dtype=torch.float16))).all()


@torch.no_grad()
def test_epsilons():
    """They differ between the towers and only show on small activations, so not in the comparison above."""
    # mean(x^2) = 1e-6, so 1e-3 / sqrt(1e-6 + 1e-6) = .70711
    assert S.RMSNorm(2)(torch.full((1, 2), 1e-3)).tolist() == [pytest.approx([0.5 ** 0.5] * 2, abs=1e-5)]
    block = S.EvaClip(OBLONG).text.blocks[0]
    # mean 0, variance 1e-5, so sqrt(1e-5) / sqrt(1e-5 + 1e-5)
    x = torch.tensor([[1e-5 ** 0.5, -(1e-5 ** 0.5)] * 12])
    assert block.norm1(x)[0, :2].tolist() == pytest.approx([0.5 ** 0.5, -(0.5 ** 0.5)], abs=1e-5)


def test_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"\[B, 3, 28, 28\], got \[1, 3, 28, 42\]"):
        random_model(OBLONG).encode_image(torch.zeros(1, 3, 28, 42))


# ------------------------------------------------------------------------------------------------------- save and load

def test_save_and_load(tmp_path):
    model = random_model(POSTNORM)
    model.save(tmp_path / "m")
    loaded = S.EvaClip.load(tmp_path / "m")
    assert loaded.config == POSTNORM and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert all(p.requires_grad for p in loaded.parameters())  # can be trained on
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]  # no temporary file is left
    model.save(tmp_path / "half", torch.bfloat16)
    kept = S.EvaClip.load(tmp_path / "half")
    wide = S.EvaClip.load(tmp_path / "half/model.safetensors", dtype=torch.float32)  # the file instead of the folder
    assert kept.visual.cls_token.dtype == torch.bfloat16 and wide.visual.cls_token.dtype == torch.float32
    assert torch.equal(wide.visual.head.weight, model.visual.head.weight.to(torch.bfloat16).float())


def test_load_scorer(folder, tmp_path):
    scorer = S.load_scorer(folder)
    scorer.batch_size = 3  # 5 items: a full batch and a rest
    assert scorer.dim == 16 and scorer.name == folder
    images = [Image.new("RGB", (30 + i, 50), (40 * i, 10, 200)) for i in range(5)]
    got = scorer.image_features(images)
    assert got.dtype == np.float32 and got.shape == (5, 16)
    with torch.no_grad():
        want = scorer.model.encode_image(torch.stack([S.Preprocess(28)(image) for image in images])).numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)
    texts = ["a beetle", "", "the long history of the old stone bridge over the river " * 4, "x", "ab"]
    got = scorer.text_features(texts)  # cut after the last end of the batch: must equal the full width
    with torch.no_grad():
        want = scorer.model.encode_text(scorer.tokenizer(texts)).numpy()
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert scorer.image_features([]).shape == (0, 16)


def test_fingerprint_shows_weights_and_preprocessing(folder, tmp_path):
    """Where the files lie does not matter; weights, a setting without weights, pixel statistics and resizing do."""
    shutil.copytree(folder, tmp_path / "else")
    scorer = S.load_scorer(folder)
    mark = scorer.fingerprint()
    assert mark.shape == (16,) and np.linalg.norm(mark) == pytest.approx(1)
    np.testing.assert_array_equal(S.load_scorer(str(tmp_path / "else")).fingerprint(), mark)
    others = [S.load_scorer(str(tmp_path / "else")) for _ in range(3)]
    steps = [transforms.Resize((28, 28)), transforms.ToTensor()]
    others[0].preprocess = S.Preprocess(steps=transforms.Compose([*steps, transforms.Normalize([.5] * 3, [.5] * 3)]))
    others[1].model.visual.blocks[0].postnorm = True
    with torch.no_grad():
        others[2].model.visual.blocks[1].mlp.fc2.weight += 0.1
    assert max(float(other.fingerprint() @ mark) for other in others) < 0.999


def test_unknown_scorer(tmp_path):
    with pytest.raises(ValueError, match="scorer .*model.safetensors.* Known are local folders"):
        S.load_scorer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="unknown scorer 'a/b/no-such-model': .* Known are local folders"):
        S.load_scorer("a/b/no-such-model")  # no form of a Hugging Face id, so nobody is asked


# ------------------------------------------------------------------------------------------------------ text and pixels

AWKWARD = ["", "  A  beetle,\n\tspotted! ", "it's 12.5 km -- no?", "caf\u00e9 na\u00efve \u00fcber",
           "\u6771\u4eac \u5854 \U0001f41e", "&amp;amp; &lt;b&gt;", "a\u0301 \ufb01ne \u2019quote\u2019", "\x00\x07",
           "word " * 200, "<end_of_text> <start_of_text>"]


def test_tokens_are_open_clips():
    assert torch.equal(S.Tokenizer()(AWKWARD), open_clip.get_tokenizer("ViT-B-32")(AWKWARD))


def test_text_of_10000_characters(folder):
    """Cut to the context, the last token is the end; a text of which the first 77 tokens are the same is the same."""
    row = S.Tokenizer()(["word " * 2000])[0]
    assert row.shape == (77,) and row[0] == 49406 and row[76] == 49407 and (row[1:76] != 49407).all()
    scorer = S.load_scorer(folder)
    long, longer = scorer.text_features(["word " * 2000, "word " * 2001])
    np.testing.assert_array_equal(long, longer)


def test_short_context_and_small_vocabulary():
    full = S.Tokenizer()
    cut = S.Tokenizer(context=8)(["word " * 200, "a b"])
    assert cut.shape == (2, 8) and cut[0, -1] == 49407 and cut[0, 0] == 49406
    assert cut[1].tolist() == full(["a b"])[0, :8].tolist()
    small = S.Tokenizer(vocab=600, context=77)
    ids = small(AWKWARD)
    assert ids.max() == 599 and (ids[:, 0] == 598).all()  # start and end are the two last rows of the table
    for row, text in zip(ids, AWKWARD[:-2], strict=False):  # the last two are cut or hold an end of their own
        end = row.argmax()  # what encode_text relies on
        assert row[end] == 599 and (row[end + 1:] == 0).all()
        # Nothing is lost by the smaller table: its pieces spell the same cleaned text.
        long = full([text])[0]
        assert small.bpe.decode(row[1:end].tolist()) == full.bpe.decode(long[1:long.argmax()].tolist())


def photo(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (28, 28), (56, 60), (64, 48)])
def test_preprocess_equals_hugging_face(size):
    """CLIPImageProcessorPil; sizes where the surplus is even, else it centres half a pixel beside torchvision."""
    processor = pytest.importorskip("transformers").CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    want = np.array(processor(photo(*size))["pixel_values"][0])
    np.testing.assert_allclose(S.Preprocess(28)(photo(*size)).numpy(), want, atol=1e-6)


def test_preprocess_of_other_modes_and_slivers():
    """RGB comes before resizing. A box may be 1 pixel wide and 5,000 high: resized whole it would be 28 x 140,000."""
    palette = photo(40, 40).quantize(16)
    assert torch.equal(S.Preprocess(28)(palette), S.Preprocess(28)(palette.convert("RGB")))
    assert S.Preprocess(28)(Image.new("L", (9, 5), 200)).shape == (3, 28, 28)
    for size in ((1, 5000), (5000, 1), (3, 100)):
        seen, image = [], photo(*size)
        S.Preprocess(steps=seen.append)(image)
        assert max(seen[0].size) <= 16 * min(size)
        middle = np.asarray(image)[size[1] // 2, size[0] // 2]
        assert (np.asarray(seen[0]) == middle).all(-1).any()  # its middle is still there
    assert S.Preprocess(28)(Image.new("RGB", (1, 5000), (255, 0, 0))).shape == (3, 28, 28)


def test_read_image(tmp_path):
    """By what is inside, whatever the file is called; and what cannot be read is named."""
    for name, kind, size in (("a.jpg", "JPEG", (40, 30)), ("jpeg_in_truth.png", "JPEG", (40, 30)),
                             ("no_extension", "PNG", (40, 30)), ("long.png", "PNG", (600, 3))):
        photo(*size).save(tmp_path / name, kind)
        assert S.read_image(tmp_path / name).size == size
    with pytest.raises(FileNotFoundError, match="none.jpg is missing"):
        S.read_image(tmp_path / "none.jpg")
    whole, png = (tmp_path / "a.jpg").read_bytes(), (tmp_path / "no_extension").read_bytes()
    for content in (whole[:len(whole) // 2], png[:len(png) // 2], png[:60] + b"\xff" * 40 + png[100:]):
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(ValueError, match="cut cannot be read"):
            S.read_image(tmp_path / "cut")


def test_decompression_bomb(tmp_path):
    """A white image of 10,001 x 10,000 is a few kB. Below Pillow's own limit, so ours alone refuses it, by its header
    (test_fuzz.py has one beyond Pillow's)."""
    Image.new("1", (10001, 10000)).save(tmp_path / "large.png")
    with pytest.raises(S.BadSize, match="large.png has more than 100,000,000 pixels"):
        S.read_image(tmp_path / "large.png")
    photo(603, 3).save(tmp_path / "sliver.png")
    with pytest.raises(S.BadSize, match="sliver.png has 603 x 3 pixels"):  # no policy could resize it
        S.read_image(tmp_path / "sliver.png")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(S.InputError, match="float.tif cannot be read"):
        S.read_image(tmp_path / "float.tif")


def test_only_pictures_are_opened(tmp_path):
    """An EPS that calls itself .jpg would start Ghostscript, another program, on what a stranger wrote."""
    photo(8, 8).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.jpg")
    with pytest.raises(S.InputError, match="a.jpg cannot be read: cannot identify"):
        S.read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("error", [MemoryError, TypeError, AttributeError])
def test_errors_of_the_machine_and_of_code_are_no_bad_pictures(tmp_path, monkeypatch, error):
    photo(8, 8).save(tmp_path / "a.png")

    def fail(*args, **keywords):
        raise error("not the file's fault")
    monkeypatch.setattr(S.Image, "open", fail)
    with pytest.raises(error):
        S.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Four corners of four colours. The tag says where the stored top row and left column belong in the scene."""
    scene = np.zeros((4, 6, 3), np.uint8)
    scene[0, 0], scene[0, -1], scene[-1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {1: scene, 2: scene[:, ::-1], 3: scene[::-1, ::-1], 4: scene[::-1], 5: scene.transpose(1, 0, 2),
              6: np.rot90(scene, 1), 7: np.rot90(scene, 2).transpose(1, 0, 2), 8: np.rot90(scene, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(S.read_image(tmp_path / "a.png")), scene)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_costs_no_image(tmp_path):
    photo(8, 6).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert S.read_image(tmp_path / "a.jpg").size == (8, 6)


def test_modes_of_images(tmp_path):
    """What each kind of file must look like in RGB; worked out beside each."""
    def read(image, name, **options):
        image.save(tmp_path / name, **options)
        got = S.read_image(tmp_path / name)
        assert got.mode == "RGB"
        return np.asarray(got).astype(int)

    clear = np.array([[[200, 10, 10, 255], [200, 10, 10, 0], [200, 10, 10, 51]]], np.uint8)
    # opaque as it is; transparent white; 51 / 255 = .2: 200 * .2 + 255 * .8 = 244, 10 * .2 + 255 * .8 = 206
    assert np.abs(read(Image.fromarray(clear), "rgba.png") - [[[200, 10, 10], [255] * 3, [244, 206, 206]]]).max() <= 1
    grey = np.array([[[9, 255], [9, 0]]], np.uint8)
    assert read(Image.fromarray(grey, "LA"), "la.png").tolist() == [[[9] * 3, [255] * 3]]
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255, 7, 7, 7])
    palette.putdata([0, 1, 2])
    assert read(palette, "p.png").tolist() == [[[255, 0, 0], [0, 0, 255], [7, 7, 7]]]
    assert read(palette, "t.png", transparency=1).tolist() == [[[255, 0, 0], [255, 255, 255], [7, 7, 7]]]
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)  # the high byte: 0, 0, 1, 128, 255
    assert read(Image.fromarray(deep), "deep.png")[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert read(Image.fromarray(deep), "deep.tif")[0, :, 1].tolist() == [0, 0, 1, 128, 255]
    assert read(Image.fromarray(np.array([[0, 200]], np.int32)), "int.tif")[0, :, 0].tolist() == [0, 200]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    for name in ("cmyk.tif", "cmyk.jpg"):
        assert np.abs(read(cmyk, name)[0, 0] - [255, 0, 0]).max() <= 2, name
    assert read(Image.new("1", (2, 2), 1), "bit.png").tolist() == [[[255] * 3] * 2] * 2
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.gif", "a.png", "a.webp"):  # the first frame
        got = read(frames[0], name, save_all=True, append_images=frames[1:])
        assert got.shape == (4, 4, 3) and np.abs(got[0, 0] - [255, 0, 0]).max() <= 5, name
    assert read(Image.new("RGB", (1, 1), (3, 4, 5)), "one.png").tolist() == [[[3, 4, 5]]]
    Image.fromarray(np.array([[0.5]], np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(S.InputError, match="floating-point numbers of unknown range"):
        S.read_image(tmp_path / "float.tif")


# --------------------------------------------------------------------------------------------------------- Eq. 1 to 4

def test_crop():
    image = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))  # 8 wide, 6 high
    pixels = np.array(image)
    np.testing.assert_array_equal(S.crop(image, (1, 2, 5, 6)), pixels[2:6, 1:5])         # right, bottom exclusive
    np.testing.assert_array_equal(S.crop(image, (1.9, 2.1, 4.1, 5.5)), pixels[2:6, 1:5])  # outward: floor, ceil
    np.testing.assert_array_equal(S.crop(image, (-3, -1, 99, 99)), pixels)               # clamped
    np.testing.assert_array_equal(S.crop(image, (0, 0, 8, 6)), pixels)
    assert S.crop(image, (3.2, 3.2, 3.3, 3.3)).size == (1, 1)                            # touches one pixel
    for box in ((4, 2, 4, 5), (5, 2, 4, 5), (0, 3, 4, 3), (0, 0, float("nan"), 3), (0, 0, float("inf"), 3),
                (8, 0, 9, 3), (-5, 0, 0, 3), (0, 6, 3, 7), (0, -3, 3, -1)):
        with pytest.raises(ValueError, match="has no pixel of the image of 8 x 6"):
            S.crop(image, box)


def test_fuse_by_hand():
    """(3, 0) + (0, 4) = (3, 4), length 5. Normalised first it would be (.707, .707)."""
    np.testing.assert_allclose(S.fuse([[3, 0]], [[0, 4]]), [[0.6, 0.8]], atol=1e-7)
    np.testing.assert_allclose(S.fuse([[3, 0]], [[0, 0]]), [[1, 0]])  # a row of zeros: no text
    np.testing.assert_allclose(S.fuse([[0, 2]]), [[0, 1]])            # no text at all
    assert S.normalise(np.full((1, 2), 300, np.float16)).dtype == np.float32
    half = S.fuse(np.full((1, 2), 300, np.float16), np.zeros((1, 2), np.float16))  # 300^2 is beyond float16
    np.testing.assert_allclose(half, [[0.5 ** 0.5] * 2], atol=1e-7)
    for bad in ([[0, 0]], [[np.nan, 1]], [[np.inf, 1]]):
        with pytest.raises(ValueError, match="1 of 1 feature vectors are zero or not finite"):
            S.fuse(bad)


def test_blend_by_hand():
    """(3, 0) and (0, 4) become (1, 0) and (0, 1); three quarters of the crop are (.25, .75). Alone it stays as it is."""
    np.testing.assert_allclose(S.blend([3, 0], [[0, 4]], 0.75), [[0.25, 0.75]], atol=1e-7)
    assert S.blend([3, 0], [[0, 4]]) == [[0, 4]]
    np.testing.assert_allclose(S.blend([3, 0], [0, 4], 0), [1, 0], atol=1e-7)
    with pytest.raises(ValueError, match="1 of 1 feature vectors are zero or not finite"):
        S.blend([0, 0], [0, 4], 0.5)


def test_scores_equal_the_slow_formula():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 5, 7)).astype(np.float16)  # [K, D]
    views = rng.normal(size=(3, 7)).astype(np.float32) * 9       # [N, D]
    got = S.scores(views, S.fuse(image, text))
    assert got.shape == (3, 5) and got.dtype == np.float32
    for n in range(3):
        for k in range(5):
            total = [float(a) + float(b) for a, b in zip(image[k], text[k], strict=True)]
            dot = sum(float(q) * v for q, v in zip(views[n], total, strict=True))
            want = dot / math.sqrt(sum(float(q) ** 2 for q in views[n])) / math.sqrt(sum(v ** 2 for v in total))
            assert got[n, k] == pytest.approx(want, abs=1e-6)
    one = S.scores(views[1], S.fuse(image, text))  # a single query [D]
    assert one.shape == (5,)
    np.testing.assert_allclose(one, got[1], atol=1e-6)
    pools = np.stack([S.fuse(image, text)] * 3)    # a pool of its own for every query
    np.testing.assert_allclose(S.scores(views, pools), got, atol=1e-6)


# ------------------------------------------------------------------------------------------------- data folders

def test_replacing_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "x.json")
    S.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        S.write_json(path, {"a": object()})
    with open(path) as file:
        assert json.load(file) == {"a": 1}
    with pytest.raises(ValueError, match="x.npy: values are not finite in float16"):
        S.write_array(str(tmp_path / "x.npy"), np.array([1, np.inf], np.float16))
    S.write_array(str(tmp_path / "x.npy"), np.arange(3))
    assert np.load(tmp_path / "x.npy").tolist() == [0, 1, 2]
    with pytest.raises(FileNotFoundError, match=r"/none/x\.json'$"):  # the name that was asked for, not x.json.tmp
        S.write_json(str(tmp_path / "none" / "x.json"), {})
    with pytest.raises(FileNotFoundError, match=r"'other\.txt'$"), S.replacing(path):
        open("other.txt").close()


def test_lines(tmp_path):
    """Lines are found by their ends, however long and in whatever letters; half a line at the end is none."""
    rows = [{"a": "\u00e9" * n, "b": n} for n in (0, 5, 1, 3_000_000)]  # the last one is longer than a block of bytes
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    lines = S.Lines(path)
    assert len(lines) == 4 and list(lines) == rows and lines[-1] == rows[3]
    assert list(S.Lines(path, limit=2)) == rows[:2]
    path.write_bytes(b'{"a": 1}\n{"a": \n{"b"')
    lines = S.Lines(path, lambda a: a)
    assert len(lines) == 2 and lines[0] == 1
    with pytest.raises(S.InputError, match=r"x.jsonl:2: no line of prepare.py's"):
        lines[1]
    path.write_bytes(b'{"a": 1, "c": 2}\n')
    with pytest.raises(S.InputError, match=r"x.jsonl:1: no line .*unexpected keyword"):
        S.Lines(path, lambda a: a)[0]


def write_data(folder, **changes):
    """A data folder by hand: 3 entities, 4 images (two of entity 2), D = 2, one query twice."""
    os.makedirs(os.path.join(folder, "../raw/img"), exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    Image.new("RGB", (12, 8), (200, 10, 10)).save(os.path.join(folder, "../raw/img/a.png"))
    entities = [{"entity_id": f"u{j}", "title": f"T\u00e9 {j}", "text": "",
                 "images": [f"img/{j}_{n}.png" for n in range(1 + (j == 2))]} for j in range(3)]
    with open(os.path.join(folder, "kb.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entity, ensure_ascii=False) + "\n" for entity in entities)
    for name, array in (("kb_image", np.array([[3, 0], [0, 1], [1, 1], [2, 0]], np.float16)),
                        ("kb_text", np.array([[0, 4], [0, 0], [0, 2]], np.float16)),
                        ("kb_entity", np.array([0, 1, 2, 2], np.int32))):
        S.write_array(os.path.join(folder, f"{name}.npy"), array)
    queries = [S.Query(f"q{i}", changes.pop("image", "img/a.png"), "What is \u201cthis\u201d?", ["u0"])
               for i in range(2)]
    arrays = dict(pool=[[2, 0, 1]] * 2, pool_image=[[3, 0, 1]] * 2, labels=[[0, 1, 0]] * 2,
                  retrieval=[[0.9, 0.5, 0.25]] * 2, full=[[1, 0]] * 2)
    S.write_split(folder, "val", queries, **{**arrays, **{k: v for k, v in changes.items() if k in arrays}})
    files = {name: {"bytes": os.path.getsize(os.path.join(folder, name)), "sha256": ""} for name in os.listdir(folder)
             if name != "manifest.json"}
    S.write_json(os.path.join(folder, "manifest.json"), {
        "version": 2, "dataset": "world", "root": "../raw", "args": {}, "K": 3, "dim": 2, "splits": {"val": {}},
        "scorer": {"name": "mini/scorer", "dtype": "float32", "fingerprint": [0.6, 0.8]}, "files": files,
        **{k: v for k, v in changes.items() if k not in arrays}})
    return folder


class Stranger:
    """A scorer as far as same_scorer looks."""
    name, dim, dtype = "other", 2, torch.float32

    def __init__(self, *mark):
        self.mark = mark

    def fingerprint(self):
        return np.array(self.mark, np.float32)


def test_load_data(tmp_path):
    folder = write_data(str(tmp_path / "data"))
    data = S.load_data(folder, "val", Stranger(0.6, 0.8))
    assert len(data) == 2 and data.full.shape == (2, 2) and data.full.dtype == np.float16
    assert data.queries[1] == S.Query("q1", "img/a.png", "What is \u201cthis\u201d?", ["u0"])
    assert data.labels.tolist() == [[False, True, False]] * 2 and data.retrieval.dtype == np.float32
    # Eq. 3 in pool order 2, 0, 1: (2, 0) + (0, 2) -> .707 .707; (3, 0) + (0, 4) -> .6 .8; (0, 1), no text -> 0 1
    np.testing.assert_allclose(data.candidates(1), [[0.5 ** 0.5] * 2, [0.6, 0.8], [0, 1]], atol=1e-6)
    assert data.open_image(0).size == (12, 8) and data.open_image(0).mode == "RGB"
    assert [data.entity(j)["entity_id"] for j in (2, 0, 1)] == ["u2", "u0", "u1"]  # \u00e9 has two bytes
    assert data.candidate_image_path(3).endswith("raw/img/2_1.png")               # second image of entity 2
    assert data.candidate_image_path(0).endswith("raw/img/0_0.png")
    first = S.load_data(folder, "val", limit=1)
    assert len(first) == len(first.pool) == len(first.full) == 1 and first.identity == data.identity
    os.makedirs(tmp_path / "far/away")
    os.symlink(folder, tmp_path / "far/away/link")  # the root is beside the folder, not beside a link to it
    assert S.load_data(str(tmp_path / "far/away/link"), "val").open_image(0).size == (12, 8)
    moved = shutil.move(str(tmp_path), str(tmp_path) + "_moved")  # raw and data move together
    assert S.load_data(os.path.join(moved, "data"), "val").open_image(1).size == (12, 8)
    assert S.load_data(os.path.join(moved, "data"), "val").identity == data.identity


@pytest.mark.parametrize("scorer, message", [
    (Stranger(0.8, 0.6), r"prepared with scorer mini/scorer in float32; other in float32 gives others \(cosine 0.96"),
    (type("Low", (Stranger,), {"dtype": torch.bfloat16})(0.6, 0.8), "other in bfloat16"),
    (type("Small", (Stranger,), {"dim": 3})(1, 0, 0), r"cosine 0.0000")])
def test_another_scorer_is_refused(tmp_path, scorer, message):
    with pytest.raises(S.InputError, match=message):
        S.load_data(write_data(str(tmp_path / "data")), "val", scorer)


@pytest.mark.parametrize("changes, message", [
    (dict(version=1), "manifest.json was written by another version of prepare.py; run"),
    (dict(splits={}), r"no split 'val'; it has \[\]"),
    (dict(dim=3), r"kb_image.npy: float16 \(4, 2\) where float16 \(-1, 3\) fits"),
    (dict(K=20), r"val_pool.npy: int32 \(2, 3\) where int32 \(2, 20\) fits"),
    (dict(root="/"), "root '/' is no folder of images"),  # would make every picture of a machine readable
    (dict(root="../../../../../../../../../../.."), "root .* is no folder of images"),
    (dict(labels=[[0, 1, 0]]), r"val_labels.npy: bool \(1, 3\) where bool \(2, 3\) fits"),
    (dict(pool=[[2, 0, 1], [9, 0, 1]]), "val_pool_image.npy names images of other entities"),
    (dict(pool_image=[[3, 0, 1], [1, 0, 1]]), "val_pool_image.npy names images of other entities"),
    (dict(pool_image=[[3, 0, 1], [9, 0, 1]]), "val_pool_image.npy names images of other entities")])
def test_load_data_refuses(tmp_path, changes, message):
    folder = write_data(str(tmp_path / "data"), **changes)
    with pytest.raises(S.InputError, match=message):
        S.load_data(folder, "val")


def test_load_data_of_damaged_files(tmp_path):
    folder = write_data(str(tmp_path / "data"))
    for name, remains in (("kb_image.npy", 130), ("val_full.npy", 20), ("val_pool.npy", 0), ("val.jsonl", 90)):
        shutil.copytree(folder, folder + name)
        os.truncate(os.path.join(folder + name, name), remains)
        with pytest.raises(S.InputError, match="val_pool.npy|" + name):  # a shorter .jsonl shows in its arrays
            S.load_data(folder + name, "val")
    with open(os.path.join(folder, "val_full.npy"), "wb") as file:
        np.save(file, np.array([[None, {}]], dtype=object))
    with pytest.raises(S.InputError, match="val_full.npy: not a whole .npy file .*Python objects"):
        S.load_data(folder, "val")
    os.remove(os.path.join(folder, "manifest.json"))
    with pytest.raises(FileNotFoundError, match="manifest.json is missing: .* cut short; run `python prepare.py"):
        S.load_data(folder, "val")


@pytest.mark.parametrize("image", ["/etc/passwd", "../secret.png", "a/../../b.png", "a\\..\\..\\b.png"])
def test_paths_stay_inside_the_root(tmp_path, image):
    """Of query images, and of candidates' in kb.jsonl."""
    data = S.load_data(write_data(str(tmp_path / "data"), image=image), "val")
    with pytest.raises(S.InputError, match=r"val.jsonl:1: image .* must be a path inside the root"):
        data.open_image(0)
    path = os.path.join(data.folder, "kb.jsonl")
    with open(path, encoding="utf-8") as file:
        text = file.read().replace('"img/0_0.png"', json.dumps(image))
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(S.InputError, match=r"kb.jsonl:1: image .* must be a path inside the root"):
        S.load_data(data.folder, "val").candidate_image_path(0)


def test_open_image_names_file_and_line(tmp_path):
    folder = write_data(str(tmp_path / "data"))
    data = S.load_data(folder, "val")
    image = os.path.join(folder, "../raw/img/a.png")
    with open(image, "r+b") as file:
        file.truncate(os.path.getsize(image) - 30)  # its end marker alone would not be missed
    with pytest.raises(S.InputError, match=r"a\.png, needed by .*val\.jsonl:2, cannot be read"):
        data.open_image(1)
    os.remove(image)
    with pytest.raises(FileNotFoundError, match=r"a\.png, needed by .*val\.jsonl:1, is missing"):
        data.open_image(0)


def test_many_queries_open_in_little_memory(tmp_path):
    """[Q, K] arrays stay on disk, lines are not parsed: some 8 bytes a query, where a row of dicts has 3,500."""
    folder, Q = write_data(str(tmp_path / "data")), 100_000
    line = json.dumps({"query_id": "q%07d", "image": "img/a.png", "question": "What is this?", "positives": ["u0"]})
    with open(os.path.join(folder, "val.jsonl"), "w") as file:
        file.writelines(line % i + "\n" for i in range(Q))
    for name, row in (("pool", [2, 0, 1]), ("pool_image", [3, 0, 1]), ("labels", [0, 1, 0]), ("full", [1, 0]),
                      ("retrieval", [.9, .5, .2])):
        S.write_array(os.path.join(folder, f"val_{name}.npy"), np.tile(np.array(row, S.ARRAYS[name]), (Q, 1)))
    tracemalloc.start()
    data = S.load_data(folder, "val")
    (kept, most), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()  # bytes
    assert len(data) == Q and data.queries[Q - 1].query_id == "q0099999"
    assert kept < 12 * Q and most < 300 * Q


# ------------------------------------------------------------------------------------------------------- run files

def test_trec_round_trip(tmp_path):
    """Ties keep the pool's order for readers that sort by score alone; blanks in ids are quoted."""
    path = str(tmp_path / "a.trec")
    scores = np.array([0.5, 0.7, 0.5, 0.5], np.float32)
    S.write_trec(path, [("q 1", ["a b", "https://x/y?z=1&w", "c", "d"], scores)], "mine")
    rows = [line.split() for line in open(path)]
    assert [row[2] for row in rows] == ["https://x/y?z=1&w", "a%20b", "c", "d"] and rows[0][0] == "q%201"
    values = [float(row[4]) for row in rows]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4 and abs(values[3] - 0.5) < 1e-6
    assert S.read_trec(path) == {"q%201": ["https://x/y?z=1&w", "a%20b", "c", "d"]}
    (tmp_path / "b.trec").write_text("\ufeffq Q0 b 2 1.0 t\nq Q0 a 1 1.0 t\n\nq Q0 c 3 5e0 t\n", encoding="utf-8")
    assert S.read_trec(tmp_path / "b.trec") == {"q": ["c", "a", "b"]}  # by score, then by rank


@pytest.mark.parametrize("line", [
    "q Q0 a 1 nan t", "q Q0 a 1 0.5", "q Q0 a one 0.5 t", "q Q0 a b 1 0.5 t", "\xff\xfe Q0"])
def test_bad_trec_lines(tmp_path, line):
    (tmp_path / "a.trec").write_bytes(b"q Q0 a 1 0.5 t\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(S.InputError, match=r"a.trec:2: expected `query Q0 entity rank score tag`"):
        S.read_trec(tmp_path / "a.trec")


def test_a_folder_is_held_by_one_process(tmp_path):
    """By another process, that is; and let go of when its file is closed or its process ends, however it ends."""
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    other = fork.Process(target=lambda: (file := S.lock_folder(str(tmp_path), "--run"), held.set(), time.sleep(60), file))
    other.start()
    assert held.wait(60)
    with pytest.raises(S.InputError, match="in use by another process .*choose another --run"):
        S.lock_folder(str(tmp_path), "--run")
    other.kill()
    other.join()
    S.lock_folder(str(tmp_path), "--run").close()
    S.lock_folder(str(tmp_path), "--run").close()


def test_a_disk_without_locks_is_no_other_process(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(S.fcntl, "flock", flock)
    S.lock_folder(str(tmp_path), "--run").close()
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize("tool, usable, said", [
    ("/usr/bin/nvidia-smi", False, True), ("/usr/bin/nvidia-smi", True, False), (None, False, False)])
def test_a_card_that_torch_cannot_use_is_told(monkeypatch, capsys, tool, usable, said):
    """A driver that is too old for torch's CUDA: the stages would take the CPU without a word."""
    monkeypatch.setattr(S.shutil, "which", lambda name: tool)
    monkeypatch.setattr(S.os.path, "exists", lambda path: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    S.warn_of_idle_card()
    assert ("There is a GPU here" in capsys.readouterr().err) == said
