"""prepare.py on the files of InfoSeek, E-VQA and EchoSight: every layout, every wart, full scale in small.

An image is one colour and its feature is that colour, so pools can be computed by hand and without a model.

    python -m pytest tests/test_benchmarks.py
"""
import csv
import errno
import functools
import gzip
import importlib.machinery
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
from collections import namedtuple

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import prepare as P
import scorer as S

ENTITIES = 12
WIKI = "https://en.wikipedia.org/wiki/"
EVQA = ("encyclopedic_vqa_split", "question", "answer", "dataset_image_ids", "dataset_name", "dataset_category_id",
        "question_type", "wikipedia_url", "wikipedia_title", "evidence", "evidence_section_id",
        "evidence_section_title", "question_original", "wikipedia_url_used_in_train")
ECHOSIGHT = ("question", "wikipedia_url", "data_id", "dataset_name", "dataset_image_ids", "question_type", "answer",
             "wikipedia_title")


class ColourScorer:
    """The feature of an image is its mean colour (grey = 0) and a constant, that of a text its length."""
    name, identity, dim, device, dtype, batch_size = "colour", "colour@1", 4, "cpu", "float32", 8

    def __init__(self):
        self.images = 0  # embedded so far

    def image_features(self, images):
        self.images += len(images)
        pixels = [np.asarray(image, np.float32).reshape(-1, 3).mean(0) / 255 - 0.5 for image in images]
        return np.array([[*p, 0.2] for p in pixels], np.float32).reshape(-1, 4)

    def image_batches(self, batches):
        return map(self.image_features, batches)

    def text_features(self, texts):
        return np.array([[0, 0, 0, 0.001 * len(text)] for text in texts], np.float32).reshape(-1, 4)


@pytest.fixture
def scorer(monkeypatch):
    made = ColourScorer()
    monkeypatch.setattr(P, "load_scorer", lambda name, device, dtype=None: made)
    return made


def colour(j, off=0):
    return tuple(int(v) + off for v in np.random.default_rng(j).integers(0, 245, 3))


def url(j):
    return f"{WIKI}Entity_{j}"


def save(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", (9, 7), value).save(path, "PNG")  # whatever it is called: Pillow looks inside


def write_csv(path, fields, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def entry(j, images=2, **changes):
    """A knowledge-base entry with all fields of the real file."""
    return {"title": f"Entity {j}", "section_titles": [f"Entity {j}", "More"], "section_texts": [f"Lead {j}.", ""],
            "image_urls": [f"https://up.org/e{j}_{n}.jpg" for n in range(images)],
            "image_reference_descriptions": [f"caption {j}.{n}" for n in range(images)],
            "image_section_indices": [0] * images, "url": url(j), **changes}


@pytest.fixture
def root(tmp_path):
    """A root with a knowledge base of 12 entities of 2 images; the tests add questions."""
    kb = {url(j): entry(j) for j in range(ENTITIES)}
    files = {}
    for j, n in itertools.product(range(ENTITIES), range(2)):
        files[f"https://up.org/e{j}_{n}.jpg"] = f"kb/e{j}_{n}.jpg"
        save(tmp_path / f"raw/kb/e{j}_{n}.jpg", colour(j, 3 * n))
    S.write_json(tmp_path / "raw/encyclopedic_kb_wiki.json", kb)
    S.write_json(tmp_path / "raw/url_to_path_mapping.json", files)
    return tmp_path / "raw"


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    S.write_json(path, content)


def evqa_row(j, image_ids, name="landmarks", **changes):
    return {"question": f"How old is this {j}?", "answer": "red&&blue|green", "dataset_image_ids": image_ids,
            "dataset_name": name, "question_type": "automatic", "wikipedia_url": url(j), "evidence": "a\n\"b\", c",
            "question_original": f"How old is Entity {j}?", **changes}


def infoseek_row(j, number, **changes):
    return {"data_id": f"infoseek_val_{number:08d}", "question": f"Where is this {j}?", "answer": "Malta|mt",
            "question_type": "infoseek", "dataset_name": "infoseek", "dataset_image_ids": f"oven_{number:08d}",
            "wikipedia_url": url(j), "wikipedia_title": f"Entity {j}", **changes}


def landmarks(root, layout="{0}/{1}/{2}/{id}.jpg", folder="landmarks"):
    """test.csv of a landmark question an entity, and the images in a layout."""
    ids = [f"{j:x}bcdef0123456789" for j in range(ENTITIES)]
    for j, name in enumerate(ids):
        save(root / folder / layout.format(*name, id=name), colour(j, 5))
    write_csv(root / "test.csv", EVQA, [evqa_row(j, name) for j, name in enumerate(ids)])
    return ids


def arguments(root, *more):
    return ["--root", str(root), "--out", str(root.parent / "data"), "--splits", "test", "--k", "5", *more]


def run(root, *more):
    manifest = P.prepare(P.parse_args(arguments(root, *more)))
    for split in manifest["splits"].values():
        assert split["rows_read"] == split["kept"] + sum(split["dropped"].values())
    kb = manifest["kb"]
    assert kb["entries_read"] == kb["kept"] + sum(kb["dropped"].values())
    assert kb["images_read"] == kb["images"] + sum(kb["images_dropped"].values())
    return manifest


def pools(root, split="test"):
    return S.load_data(str(root.parent / "data"), split).queries


def unit(value):
    x = np.array([*(np.array(value, np.float32) / 255 - 0.5), 0.2])
    return x / np.linalg.norm(x)


def by_hand(query, k=5):
    """The k entities whose nearer image has the highest cosine with a colour, and those cosines."""
    best = {j: max(unit(query) @ unit(colour(j, 3 * n)) for n in range(2)) for j in range(ENTITIES)}
    ranked = sorted(best, key=best.get, reverse=True)[:k]
    return ranked, [best[j] for j in ranked]


# ---------------------------------------------------------------------------------------------------- streaming JSON

tricky = st.text(alphabet='ab{}[]",: \\\n\u00e9\u6771\U0001f600', max_size=12)
values = st.dictionaries(tricky, st.one_of(tricky, st.integers(), st.none(), st.lists(tricky, max_size=4),
                                           st.dictionaries(tricky, tricky, max_size=2)), max_size=4)


@settings(max_examples=150, deadline=None)
@given(pairs=st.lists(st.tuples(tricky, values), max_size=8), ascii_=st.booleans(), chunk=st.integers(9, 60),
       style=st.sampled_from([(", ", ": ", ""), (",", ":", ""), (" ,\r\n ", " :\n", "\n ")]), strings=st.booleans())
def test_stream_equals_json(tmp_path_factory, pairs, ascii_, chunk, style, strings):
    """Any object, written in any style and read in any pieces, against json.loads with its pairs kept."""
    comma, colon, edge = style
    if strings:
        pairs = [(key, json.dumps(value)) for key, value in pairs]
    text = "{" + edge + comma.join(json.dumps(key, ensure_ascii=ascii_) + colon + json.dumps(
        value, ensure_ascii=ascii_) for key, value in pairs) + edge + "}" + edge
    path = tmp_path_factory.getbasetemp() / "stream.json"
    path.write_bytes(b"\xef\xbb\xbf" * ascii_ + text.encode())
    before, P.CHUNK = P.CHUNK, chunk
    try:
        found = list(P.stream_json(str(path), b'"' if strings else b"}"))
    finally:
        P.CHUNK = before
    # Nested objects come as tuples of pairs; the project reads none.
    assert [key for key, _ in found] == [key for key, _ in pairs]
    for (_, got), (_, want) in zip(found, pairs, strict=True):
        assert got == want or {k: dict(v) if isinstance(v, tuple) else v for k, v in got.items()} == want


def kb_text(n=40):
    return json.dumps({url(j): entry(j) for j in range(n)})


@pytest.mark.parametrize("chunk", [50, 700, 1 << 18])
def test_stream_names_the_byte(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(P, "CHUNK", chunk)
    path, text = tmp_path / "kb.json", kb_text()

    def error(content):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            list(P.stream_json(str(path)))
        return str(caught.value)
    for cut in (1, 30, 1000, len(text) - 1):
        message = error(text[:cut].encode())
        assert "kb.json is not JSON at byte" in message and "copied to its end" in message
        assert int(message.split("at byte ")[1].split()[0]) <= cut
    at = text.index('"Lead 20.') - 1  # a comma or bracket gone in the middle of the file
    assert f"at byte {at} " in error((text[:at] + "#" + text[at + 1:]).encode())
    at = text.index("Lead 20.")
    assert f"byte {at} is not UTF-8" in error(text[:at].encode() + b"\xff" + text[at + 1:].encode())
    assert f"at byte {len(text)} " in error((text + "x").encode())
    assert "at byte 0" in error(b"url,path\n") and "holds a list" in error(b" [1]")
    assert "at byte 0" in error(b"")


def test_stream_keeps_repeated_keys(tmp_path):
    (tmp_path / "a.json").write_text('{"a": {"x": 1}, "b": {}, "a": {"x": 2}}')
    assert list(P.stream_json(str(tmp_path / "a.json"))) == [("a", {"x": 1}), ("b", {}), ("a", {"x": 2})]


def test_stream_needs_little_memory(tmp_path):
    one = json.dumps(entry(1, section_texts=["word " * 400]))
    with open(tmp_path / "kb.json", "w", encoding="utf-8") as file:
        file.write("{" + ", ".join(f'"{url(j)}": {one}' for j in range(8000)) + "}")
    assert os.path.getsize(tmp_path / "kb.json") > 16e6
    tracemalloc.start()
    count = sum(1 for _ in P.stream_json(str(tmp_path / "kb.json")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000 and peak < 4e6  # bytes: some pieces of 256 KiB, where the file is 19 MB


def test_image_files_equal_a_dict():
    rng = np.random.default_rng(0)
    pairs = [(f"https://x/{rng.integers(500)}.jpg", f"p/{n}\u00e9.jpg") for n in range(700)]
    files, want = P.ImageFiles(iter(pairs), "map"), dict(reversed(pairs))  # of equal urls the first counts
    for n in range(600):
        name = f"https://x/{n}.jpg"
        number = files.number(name)
        assert (files.path(number) if number >= 0 else None) == want.get(name)
    assert P.ImageFiles([], "none").number("a") == -1 and len(P.ImageFiles([], "none")) == 0


# ------------------------------------------------------------------------------------------------ E-VQA's layouts

@pytest.mark.parametrize("layout", ["{0}/{1}/{2}/{id}.jpg", "{id}.jpg", "train/{0}/{id}.JPEG"])
def test_landmarks(root, scorer, layout):
    landmarks(root, layout)
    manifest = run(root)
    assert manifest["splits"]["test"]["kept"] == ENTITIES and manifest["splits"]["test"]["positive_in_kb"] == ENTITIES
    for j, query in enumerate(pools(root)):
        ranked, cosines = by_hand(colour(j, 5))
        assert query.pool == ranked and query.labels == [int(i == j) for i in ranked]
        np.testing.assert_allclose(query.retrieval, cosines, atol=2e-3)  # features are float16
        assert query.question == f"How old is this {j}?"  # never question_original


def inat(root, kind):
    """test.csv of iNaturalist questions with the id -> file mapping in one of its three forms."""
    names = {}
    for j in range(ENTITIES):
        names[str(900 + j)] = f"val/0001_Genus_{j}/ab{j}.jpg" if kind != "flat" else f"{900 + j}.jpg"
        save(root / "inat" / names[str(900 + j)], colour(j, 5))
    if kind == "id2name":
        S.write_json(root / "inat/val_id2name.json", names)
    elif kind == "coco":
        S.write_json(root / "inat/val.json", {"images": [{"id": int(i), "file_name": n} for i, n in names.items()]})
    write_csv(root / "test.csv", EVQA, [evqa_row(j, f"{900 + j}|77", "inaturalist") for j in range(ENTITIES)])


@pytest.mark.parametrize("kind", ["id2name", "coco", "flat"])
def test_inaturalist(root, scorer, kind):
    inat(root, kind)
    run(root)
    assert [query.pool for query in pools(root)] == [by_hand(colour(j, 5))[0] for j in range(ENTITIES)]


def test_first_or_any_image(root, scorer):
    ids = landmarks(root)
    rows = [evqa_row(j, f"ffffffffffffffff|{name}") for j, name in enumerate(ids)]
    write_csv(root / "test.csv", EVQA, rows + [evqa_row(0, ids[0])])
    assert run(root)["splits"]["test"]["dropped"] == {"image missing": ENTITIES}
    assert run(root, "--query-image", "any")["splits"]["test"]["kept"] == ENTITIES + 1


def test_csv_warts(root, scorer):
    """A byte-order mark, a multi-hop row whose url is a list, a paragraph above csv's limit, the cleaned train file."""
    ids = landmarks(root)
    rows = [evqa_row(j, name, evidence="x\n" * 100_000) for j, name in enumerate(ids)]
    rows.insert(0, evqa_row(0, f"{ids[0]}", question_type="2_hop", wikipedia_url=f"{url(0)}|{url(1)}"))
    write_csv(root / "train_full_image_cleaned.csv", EVQA[::-1], rows)
    path = root / "train_full_image_cleaned.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    manifest = run(root, "--splits", "train,test")
    train = manifest["splits"]["train"]
    assert train["file"] == "train_full_image_cleaned.csv" and train["dropped"] == {"question_type '2_hop'": 1}
    assert [query.query_id for query in pools(root, "train")] == [f"E-VQA_train_{i}" for i in range(ENTITIES)]
    path.write_bytes(path.read_bytes()[:300] + b"\xff" + path.read_bytes()[300:])
    with pytest.raises(SystemExit, match=r"cleaned\.csv: not UTF-8 soon after line \d"):
        P.main(arguments(root, "--splits", "train"))


# -------------------------------------------------------------------------------------------- the knowledge base

def test_kb_warts(root, scorer):
    """Repeated entries and images, svg, torn gif and tiff, shared files, missing urls: each under its reason."""
    landmarks(root)
    kb = json.loads((root / "encyclopedic_kb_wiki.json").read_text())
    extra = {"svg": b"<svg/>", "gif": b"GIF89a", "tif": b"II*\0", "jpg": b"<html>429 Too many requests</html>"}
    for suffix, content in extra.items():
        kb[url(0)]["image_urls"].append(f"https://up.org/bad.{suffix}")
        (root / f"kb/bad.{suffix}").write_bytes(content)
    kb[url(0)]["image_urls"] += ["https://up.org/e0_0.jpg", "https://up.org/gone.jpg", "https://up.org/lost.jpg"]
    kb[url(1)]["image_urls"].append("https://up.org/e0_0.jpg")  # two entries, one file: embedded once
    kb[WIKI + "Empty"] = entry(70, 0)
    kb[WIKI + "Nowhere"] = entry(71, 2)
    text = json.dumps(kb)[:-1] + ", " + json.dumps({url(3): entry(3)})[1:]  # a key twice
    (root / "encyclopedic_kb_wiki.json").write_text(text)
    edit(root / "url_to_path_mapping.json", lambda files: files.update(
        {f"https://up.org/bad.{suffix}": f"kb/bad.{suffix}" for suffix in extra} | {
            "https://up.org/lost.jpg": "kb/lost.jpg"}))
    manifest = run(root)
    assert manifest["kb"]["dropped"] == {"entry has no image": 1, "no image of the entry can be read": 1,
                                         "entry repeated": 1}
    assert manifest["kb"]["images_dropped"] == {
        "image unreadable": 1, "image unreadable (svg)": 1, "image unreadable (gif)": 1, "image unreadable (tif)": 1,
        "image repeated in its entry": 1, "image url not in url_to_path_mapping.json": 3, "image missing": 1,
        "entry repeated": 2}
    assert manifest["kb"]["images"] == 2 * ENTITIES + 1 and scorer.images == 2 * ENTITIES + ENTITIES


def test_all_images_missing(root, scorer):
    landmarks(root)
    S.write_json(root / "url_to_path_mapping.json", {"https://up.org/other.jpg": "kb/other.jpg"})
    with pytest.raises(SystemExit, match=r"0 of 12 entries have a readable image.*image url not in url_to_path.*: 24"):
        P.main(arguments(root))


def test_wrong_files_for_their_roles(root, scorer):
    landmarks(root)
    with pytest.raises(SystemExit, match="has a dict, expected the path of its image"):
        P.main(arguments(root, "--kb-images", "encyclopedic_kb_wiki.json"))
    with pytest.raises(SystemExit, match="field 'title' is missing or no str"):
        P.main(arguments(root, "--kb", "url_to_path_mapping.json"))
    S.write_json(root / "wiki.json", {url(0): {"wikipedia_content": "x"}})  # ReflectiVA's
    with pytest.raises(SystemExit, match="entry 'https.*_0': field 'title' is missing"):
        P.main(arguments(root, "--kb", "wiki.json"))


@pytest.mark.parametrize("kind, want", [("caption", "Entity 3\ncaption 3.0\ncaption 3.1"), ("title", "Entity 3"),
                                        ("lead", "Entity 3\nLead 3."), ("release", "Entity 3\nLead 3.\n")])
def test_texts(root, scorer, kind, want):
    landmarks(root)
    kb = json.loads((root / "encyclopedic_kb_wiki.json").read_text())
    kb[url(4)]["title"] = "half \ud83d"
    (root / "encyclopedic_kb_wiki.json").write_text(json.dumps(kb))
    run(root, "--text", kind)
    data = S.load_data(str(root.parent / "data"), "test")
    assert data.entity(3)["text"] == want
    assert data.entity(4)["title"] == "half ?"  # half a surrogate pair is no text that a file or tokenizer takes
    np.testing.assert_allclose(data.kb_text[3], [0, 0, 0, 0.001 * len(want)], atol=1e-4)


def test_omgm_csv_and_folder(root, scorer):
    landmarks(root)
    run(root)
    want = [(query.pool, query.labels) for query in pools(root)]
    os.remove(root / "url_to_path_mapping.json")
    run(root, "--kb-images", "kb")  # by the file names in the urls
    assert [(query.pool, query.labels) for query in pools(root)] == want
    os.makedirs(root / "wiki_img/output")
    for part in (1, 2):
        write_csv(root / f"wiki_img/output/wiki_image_url_part_{part}_processed.csv",
                  ("title", "image_URL", "img_path", "caption"),
                  [{"title": f"Entity {j}", "image_URL": f"https://up.org/e{j}_{n}.jpg",
                    "img_path": f"full/{part}/{j}_{n}.jpg" if (j, n) != (2, 1) else ""}
                   for j in range(ENTITIES) for n in range(2) if j % 2 == part - 1])
    for j, n in itertools.product(range(ENTITIES), range(2)):
        save(root / f"wiki_img/full/{j % 2 + 1}/{j}_{n}.jpg", colour(j, 3 * n))
    manifest = run(root, "--kb-images", "wiki_img")
    assert manifest["kb"]["images_dropped"] == {"image url not in OMGM's csv": 1}
    assert S.load_data(str(root.parent / "data"), "test").entity(3)["images"][1] == "wiki_img/full/2/3_1.jpg"
    assert manifest["splits"]["test"]["with_positive"] == ENTITIES


class FakeParquet:
    """As much of pyarrow.parquet.ParquetFile as is used; a file holds JSON."""
    opened = 0

    def __init__(self, path):
        FakeParquet.opened += 1
        with open(path, encoding="utf-8") as file:
            self.rows = json.load(file)

    def iter_batches(self, batch_size, columns):
        assert columns == ["image_url", "image"]
        for start in range(0, len(self.rows), 5):
            rows = self.rows[start:start + 5]
            Cell = namedtuple("Cell", "as_py")

            class Column(list):
                def to_pylist(self):
                    return list(self)
            urls = Column(row["url"] for row in rows)
            images = [Cell(lambda row=row: {"bytes": bytes.fromhex(row["image"]), "path": None}) for row in rows]
            yield types.SimpleNamespace(column=lambda name, u=urls, i=images: u if name == "image_url" else i)


def test_atomic_parquet(root, scorer, monkeypatch):
    landmarks(root)
    os.makedirs(root / "atomic")
    for part in range(2):
        rows = [{"url": f"https://up.org/e{j}_{n}.jpg", "image": (root / f"kb/e{j}_{n}.jpg").read_bytes().hex()}
                for j in range(ENTITIES) for n in range(2) if n == part]
        S.write_json(root / f"atomic/part-{part}.parquet", [*rows, {"url": "https://other", "image": "00"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit, match="pip install pyarrow"):
        P.main(arguments(root, "--kb-images", "atomic"))
    package, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    package.__spec__, parquet.ParquetFile = importlib.machinery.ModuleSpec("pyarrow", None), FakeParquet
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert run(root, "--kb-images", "atomic")["kb"]["images"] == 2 * ENTITIES
    assert [query.pool for query in pools(root)] == [by_hand(colour(j, 5))[0] for j in range(ENTITIES)]
    assert FakeParquet.opened == 2
    run(root, "--kb-images", "atomic")
    assert FakeParquet.opened == 2  # unpacked once
    unpacked = [name for _, _, names in os.walk(root / "atomic_images") for name in names if name.endswith(".jpg")]
    assert len(unpacked) == 2 * ENTITIES


# ------------------------------------------------------------------------------------------------------- InfoSeek

OVEN = ["oven_images/{shard}/{id}.jpg", "oven_images/{shard}/{id}.JPEG", "val/{id}.jpg", "any/where/{id}.img.jpg",
        "oven_images/{id}.png"]


@pytest.mark.parametrize("layout", OVEN)
def test_infoseek_echosight_csv(root, scorer, layout):
    rows = [infoseek_row(j, 100 + j) for j in range(ENTITIES)]
    for j in range(ENTITIES):
        name = f"oven_{100 + j:08d}"
        save(root / layout.format(id=name, shard=name[5:7]), colour(j, 5))
    rows.append(infoseek_row(0, 4925801, dataset_image_ids="oven_05001795"))  # known to be absent
    rows.append(infoseek_row(0, 100))  # a data_id twice
    write_csv(root / "infoseek_test_filtered.csv", ECHOSIGHT, rows)
    os.rename(root / "encyclopedic_kb_wiki.json", root / "wiki_100_dict_v4.json")
    manifest = run(root, "--dataset", "infoseek")
    assert manifest["splits"]["test"]["dropped"] == {"image missing": 1, "data_id repeated": 1}
    assert manifest["kb"]["file"] == "wiki_100_dict_v4.json"
    for j, query in enumerate(pools(root)):
        assert query.query_id == f"infoseek_val_{100 + j:08d}" and query.pool == by_hand(colour(j, 5))[0]
    write_csv(root / "infoseek_test_filtered.csv", [name for name in ECHOSIGHT if name != "data_id"],
              [{k: v for k, v in row.items() if k != "data_id"} for row in rows])
    with pytest.raises(SystemExit, match="column data_id is missing"):
        P.main(arguments(root, "--dataset", "infoseek"))


def official(root, split, entities, **texts):
    """infoseek_{split}.jsonl and its withkb file: a question an entity, named Q{j}; texts: {Q1="other name"}."""
    rows, kb = [], []
    for n, j in enumerate(entities):
        number = 1000 + n
        rows.append({"data_id": f"infoseek_{split}_{number:08d}", "image_id": f"oven_{number:08d}",
                     "question": f"Where is this {j}?", "answer": ["Malta"], "data_split": f"{split}_unseen_entity",
                     "answer_eval": [{"wikidata": 12.0, "range": [10.8, 13.2]}]})
        kb.append({"data_id": rows[-1]["data_id"], "entity_id": f"Q{j}",
                   "entity_text": texts.get(f"Q{j}", f"Entity {j}")})
        save(root / f"oven_images/00/oven_{number:08d}.jpg", colour(j, 5))
    write_jsonl(root / f"infoseek_{split}.jsonl", rows)
    write_jsonl(root / f"infoseek_{split}_withkb.jsonl", kb)
    return rows, kb


def test_infoseek_official(root, scorer):
    """No url in the files: it comes from the title, as is or percent-encoded, else from an entry with that title."""
    rows, kb = official(root, "val", range(6), Q2="Caf\u00e9 (x)", Q3="entity 3", Q4="Renamed", Q5="Twice")

    def rename(content):
        content[WIKI + "Caf%C3%A9_(x)"] = content.pop(url(2))
        content[WIKI + "Odd"] = content.pop(url(4)) | {"title": "Renamed"}
        content[url(5)]["title"] = content[url(6)]["title"] = "Twice"  # two pages, one title: nobody's
    edit(root / "encyclopedic_kb_wiki.json", rename)
    write_jsonl(root / "infoseek_val_withkb.jsonl", kb[:-1] + [{**kb[-1], "data_id": "infoseek_val_x"}, kb[-1]])
    rows += [{**rows[0], "data_id": "infoseek_val_99999999"}, rows[1], {**rows[2], "data_id": "infoseek_val_x",
                                                                        "question": " "}]
    write_jsonl(root / "infoseek_val.jsonl", rows)
    manifest = run(root, "--dataset", "infoseek")
    assert manifest["splits"]["test"]["dropped"] == {"data_id not in the withkb file": 1, "data_id repeated": 1,
                                                     "question empty": 1}
    assert [query.positives for query in pools(root)] == [[url(0)], [url(1)], [WIKI + "Caf%C3%A9_(x)"], [url(3)],
                                                          [WIKI + "Odd"], [WIKI + "Twice"]]
    assert [sum(query.labels) for query in pools(root)] == [1, 1, 1, 1, 1, 0]
    assert manifest["splits"]["test"]["positive_in_kb"] == 5
    # Wiki6M's title wins over withkb's text, from any of its three files.
    write_jsonl(root / "Wiki6M_ver_1_0.jsonl.gz", [{"wikidata_id": "Q5", "wikipedia_title": "Entity 5"},
                                                   {"wikidata_id": "Q77", "wikipedia_title": "Entity 7"}])
    assert run(root, "--dataset", "infoseek")["splits"]["test"]["positive_in_kb"] == 6


def test_infoseek_val_is_held_out_by_entity(root, scorer, monkeypatch):
    monkeypatch.setattr(P, "HELD_OUT", 3)
    official(root, "train", [*range(ENTITIES), *range(ENTITIES)])
    manifest = run(root, "--dataset", "infoseek", "--splits", "train,val")
    train, val = ({query.positives[0] for query in pools(root, split)} for split in ("train", "val"))
    assert train and val and not train & val and len(train | val) == ENTITIES
    assert manifest["splits"]["train"]["dropped"] == {"entity held out for val": 2 * len(val)}
    assert manifest["splits"]["val"]["dropped"] == {"entity left to train": 2 * len(train)}


@pytest.mark.parametrize("change, message", [
    (lambda root: os.remove(root / "infoseek_val_withkb.jsonl"), r"infoseek_val_withkb\.jsonl is missing"),
    (lambda root: os.remove(root / "infoseek_val.jsonl"), r"infoseek_test_filtered\.csv \(or infoseek_val\.jsonl\) is"),
    (lambda root: write_jsonl(root / "infoseek_val.jsonl", [{"data_id": "a", "entity_id": "Q1"}]),
     r"val\.jsonl:1: field image_id, question is missing or no text; is this the file"),
    (lambda root: (root / "infoseek_val.jsonl").write_bytes(b'{"data_id": "x'), r"val\.jsonl:1: not a line of JSON"),
    (lambda root: os.rename(root / "oven_images", root.parent / "o"), "image missing")],
    ids=["withkb", "jsonl", "other file", "cut", "images"])
def test_broken_infoseek(root, scorer, change, message):
    official(root, "val", range(3))
    change(root)
    with pytest.raises(SystemExit, match=message):
        P.main(arguments(root, "--dataset", "infoseek"))


# ------------------------------------------------------------------------------------------------ shards and resuming

def test_killed_run_loses_one_shard(root, scorer, monkeypatch):
    landmarks(root)
    flags = ("--shard-size", "5")
    first = run(root, *flags)["files"]
    assert scorer.images == 3 * ENTITIES
    work = root.parent / "data.work"
    for name in os.listdir(work):
        os.remove(work / name)
    write, written = P.Shards.write, []

    def killed(self, number, *rest):
        if len(written) == 6:  # 12 queries = 3 shards, 3 of 5 shards of the knowledge base
            raise KeyboardInterrupt
        written.append((self.name, number))
        write(self, number, *rest)
    monkeypatch.setattr(P.Shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(root, *flags)
    monkeypatch.setattr(P.Shards, "write", write)
    scorer.images = 0
    assert run(root, *flags)["files"] == first
    assert scorer.images == 2 * ENTITIES - 15  # 15 images were in the three shards, the rest only is embedded
    scorer.images = 0
    run(root, *flags, "--k", "3")
    assert scorer.images == 0  # other pools, same features


def test_shards_are_not_reused_for_other_things(root, scorer):
    landmarks(root)
    run(root)
    data = S.load_data(str(root.parent / "data"), "test")
    save(root / "kb/e0_0.jpg", (250, 1, 1))
    os.utime(root / "kb/e0_0.jpg", ns=(1, 1))
    scorer.images = 0
    run(root)
    assert scorer.images == 2 * ENTITIES  # its shard, not the queries'
    changed = S.load_data(str(root.parent / "data"), "test").kb_image
    np.testing.assert_allclose(changed[0], [250 / 255 - .5, 1 / 255 - .5, 1 / 255 - .5, .2], atol=1e-3)
    np.testing.assert_array_equal(changed[1:], data.kb_image[1:])
    os.remove(root.parent / "data.work/kb_image-000000.json")  # killed between the shard's two files
    scorer.images = 0
    run(root)
    assert scorer.images == 2 * ENTITIES
    scorer.identity = "colour@2"
    run(root, "--delete-shards")
    assert scorer.images == 5 * ENTITIES and not os.path.exists(root.parent / "data.work")


def test_disk_full(root, scorer, monkeypatch):
    landmarks(root)
    monkeypatch.setattr(P.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match=r"will be written \(shards .* GB are free; choose another --out"):
        P.main(arguments(root))
    monkeypatch.undo()
    monkeypatch.setattr(P, "load_scorer", lambda name, device, dtype=None: scorer)
    real, calls = P.write_rows, []

    def full(path, blocks, shape):
        calls.append(path)
        raise OSError(errno.ENOSPC, "No space left on device", path)
    monkeypatch.setattr(P, "write_rows", full)
    with pytest.raises(SystemExit, match=r"No space left.*kb_image\.npy.* in .*data\.work, so make room and run again"):
        P.main(arguments(root))
    monkeypatch.setattr(P, "write_rows", real)
    scorer.images = 0
    run(root)
    assert scorer.images == 0 and len(calls) == 1


@pytest.mark.parametrize("more", [(), ("--pool", "mined", "--num-candidates", "3", "--similarity-tolerance", "2"),
                                  ("--index", "hnsw")])
def test_torchrun_equals_one_process(root, tmp_path, more):
    """Two processes, as torchrun starts them, with the real scorer class against one process: the same files."""
    landmarks(root)
    config = S.EvaClipConfig(embed_dim=16, image_size=28, width=32, layers=1, head_width=16, mlp_ratio=2, context=16,
                             vocab=600, text_width=16, text_heads=2, text_layers=1)
    S.EvaClip(config).init_weights(1).save(tmp_path / "tiny")
    flags = ("--scorer", str(tmp_path / "tiny"), "--shard-size", "5", "--device", "cpu", *more)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    script = os.path.join(os.path.dirname(P.__file__), "prepare.py")
    one = run(root, *flags, "--out", str(tmp_path / "one"))
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/index.faiss").write_bytes(b"of an earlier run by one process")
    both = [subprocess.Popen([sys.executable, script, *arguments(root, *flags)], env={**env, "RANK": str(rank)},
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    done = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    assert "positive in pool" in done[0][0] and not done[1][0]  # printed once
    two = json.loads((tmp_path / "data/manifest.json").read_text())
    shards = {f"index-0000{rank}-of-00002.faiss" for rank in range(2)} if "index.faiss" in one["files"] else set()
    assert {name for name in two["files"] if name.startswith("index")} == shards
    assert {name for name in os.listdir(tmp_path / "data") if name.startswith("index")} == shards
    one, two = ({name: value for name, value in manifest["files"].items() if not name.startswith("index")}
                for manifest in (one, two))
    assert two == one
    # A file that the manifest does not name is of another run, copied over, and no part of this index.
    (tmp_path / "data/index-00001-of-00003.faiss").write_bytes(b"of another folder")
    data = [S.load_data(str(tmp_path / name), "test") for name in ("one", "data")]
    assert [os.path.basename(path) for path in data[1].index_files] == sorted(shards)
    assert data[0].identity == data[1].identity  # so a run on these pools takes those
    if shards:
        whole, index = (evaluate.open_index(each.index_files) for each in data)
        query = S.normalise(np.load(tmp_path / "one/kb_image.npy"))
        assert index.ntotal == whole.ntotal == len(query)
        found = [each.search(query, 4) for each in (index, whole)]
        np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
        assert (found[0][1] == found[1][1]).mean() > .9  # equal cosines may change places


# ---------------------------------------------------------------------------------------------------------- retrieval

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])
def test_block_search_equals_faiss(device):
    rng = np.random.default_rng(0)
    kb = rng.normal(size=(1000, 8)).astype(np.float16)
    queries = S.normalise(rng.normal(size=(37, 8)))
    cosines, rows = P.BlockSearch(kb, device, block=77).search(queries, 50, at_once=10)
    want_cosines, want_rows = P.build_index(kb).search(queries, 50)
    np.testing.assert_allclose(cosines, want_cosines, atol=1e-6)
    assert (rows == want_rows).mean() > 0.999  # equal cosines may change places
    assert P.BlockSearch(kb[:3], device).search(queries, 3)[1].max() == 2


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_index(root, scorer, kind):
    landmarks(root)
    manifest = run(root, "--index", kind, "--probes", "1")
    assert manifest["index"]["kind"] == kind and 0 <= manifest["index"]["recall"] <= 1
    assert f"{kind} index: finds {manifest['index']['recall']:.4f} of the exact pools (12" in P.table(manifest)
    rng = np.random.default_rng(1)
    kb, owner = rng.normal(size=(3000, 16)).astype(np.float16), np.arange(3000) // 3
    queries = rng.normal(size=(50, 16)).astype(np.float16)
    exact = P.retrieve(P.BlockSearch(kb, "cpu"), owner, queries, 10)[0]
    recalls = [P.recall(P.retrieve(P.build_index(kb, "ivf", n), owner, queries, 10)[0], exact) for n in (2, 12, 76)]
    assert recalls[0] < 0.7 < recalls[1] < 1 and recalls[2] == 1  # all 76 = 3000 // 39 lists: exact
    assert P.recall(P.retrieve(P.build_index(kb, "hnsw"), owner, queries, 10)[0], exact) > 0.9


def test_exact_without_an_index(root, scorer):
    """--index blocks searches the features on disk: the pools of flat, and no index.faiss."""
    landmarks(root)
    first = run(root)["files"]
    manifest = run(root, "--index", "blocks")
    assert not os.path.exists(root.parent / "data/index.faiss") and "index.faiss" not in manifest["files"]
    assert manifest["index"] == {"kind": "blocks"} and set(first) - set(manifest["files"]) == {"index.faiss"}
    assert [query.pool for query in pools(root)] == [by_hand(colour(j, 5))[0] for j in range(ENTITIES)]


class Together:
    """Workers whose processes are threads: what is broadcast and gathered goes through lists."""

    def __init__(self, rank, world, room):
        self.rank, self.world, self.room = rank, world, room

    def broadcast(self, array=None):
        if self.rank == 0:
            self.room["sent"] = np.array(array)
        self.room["barrier"].wait()
        got = self.room["sent"]
        self.room["barrier"].wait()
        return got

    def gather(self, array):
        self.room[self.rank] = array
        self.room["barrier"].wait()
        got = [self.room[rank] for rank in range(self.world)]
        self.room["barrier"].wait()
        return got if self.rank == 0 else None


@pytest.mark.parametrize("kind", ["flat", "blocks", "ivf", "hnsw", "mined"])
@pytest.mark.parametrize("world", [2, 5])
def test_shared_search_equals_one(kind, world):
    """The knowledge base split over processes finds what it finds whole, where the search is exact; entities of many
    images and equal images (ties) lie across the cuts, and with 5 processes some have next to nothing."""
    rng = np.random.default_rng(3)
    owner = np.sort(np.r_[rng.integers(0, 60, 240), np.full(150, 17)]).astype(np.int32)
    owner = np.unique(owner, return_inverse=True)[1].astype(np.int32)
    kb = rng.normal(size=(len(owner), 6)).astype(np.float16)
    kb[rng.permutation(len(kb))[:120]] = kb[0]  # an image that many entities have
    queries, positives = np.r_[kb[:1], rng.normal(size=(30, 6)).astype(np.float16)], rng.integers(0, 50, 31)

    def base(workers):
        first, end = P.Workers.share(workers, owner)
        find = (functools.partial(P.find_as_near, kb[first:end], owner[first:end], "cpu") if kind == "mined" else
                functools.partial(P.find_in, P.BlockSearch(kb[first:end], "cpu", 50) if kind == "blocks" else
                                  P.build_index(kb[first:end], kind), first))
        return (first, end), P.KB(kb, owner, {}, "cpu", P.Shared(find, workers, len(kb)))

    def pools(base):
        if kind == "mined":
            found, enough = P.mine(base, queries, positives, 5, .1)
            return *found, enough
        return P.retrieve(base.index, owner, queries, 10)

    room = {"barrier": threading.Barrier(world, timeout=60)}
    rows, bases = zip(*(base(Together(rank, world, room)) for rank in range(world)))
    assert rows[0][0] == 0 and rows[-1][1] == len(kb) and all(a[1] == b[0] for a, b in itertools.pairwise(rows))
    assert all(end in (0, len(kb)) or owner[end - 1] != owner[end] for _, end in rows)  # entities stay whole
    others = [threading.Thread(target=each.index.serve) for each in bases[1:]]
    for thread in others:
        thread.start()
    found = pools(bases[0])
    bases[0].index.close()
    for thread in others:
        thread.join(60)
    assert not any(thread.is_alive() for thread in others)
    alone = pools(base(P.Workers())[1])
    if kind in ("ivf", "hnsw"):
        assert P.recall(found[0], alone[0]) > .8
        return
    assert (found[0] == alone[0]).all() and (found[1] == alone[1]).all()
    np.testing.assert_allclose(found[2], alone[2], atol=1e-6)
    assert (found[3] == alone[3]).all()


@pytest.mark.parametrize("kind", ["flat", "blocks"])
@pytest.mark.parametrize("world", [2, 3])
def test_equal_images_in_long_vectors(kind, world):
    """From some 1,000 numbers a vector on, products of one image differ in the last bits with its place in a block, so
    equal cosines are not equal: pools must not show where the knowledge base was cut."""
    rng = np.random.default_rng(0)
    owner = np.unique(np.sort(rng.integers(0, 1000, 2000)), return_inverse=True)[1].astype(np.int32)
    kb = rng.normal(size=(2000, 1280)).astype(np.float16)
    kb[rng.permutation(2000)[:400]] = kb[0]
    for _ in range(40):
        same = rng.permutation(2000)[:3]
        kb[same] = kb[same[0]]
    queries = np.r_[kb[:1], kb[rng.integers(0, 2000, 199)] + .5 * rng.normal(size=(199, 1280)).astype(np.float16)]
    parts = []
    for rank in range(world):
        first, end = P.Workers(rank, world).share(owner)
        parts.append(functools.partial(P.find_in, P.BlockSearch(kb[first:end], "cpu") if kind == "blocks" else
                                       P.build_index(kb[first:end]), first))
    asked = []  # each process's values and numbers are gathered in turn, some rows at a time

    class Room(P.Workers):
        def broadcast(self, array=None):
            asked.append(array)

        def gather(self, array):
            if array.dtype == np.float32:
                self.found = [part(int(asked[-2][0, 0]), asked[-1]) for part in parts]
                assert len(array) == len(asked[-1])
            return [each[0 if array.dtype == np.float32 else 1] for each in self.found]

    shared = P.Shared(parts[0], Room(0, world), len(kb))
    alone = P.Shared(functools.partial(P.find_in, P.build_index(kb), 0), P.Workers(), len(kb))
    for a, b in zip(P.retrieve(shared, owner, queries, 20)[:2], P.retrieve(alone, owner, queries, 20)[:2]):
        assert (a == b).all()


def test_stored_cosines_do_not_depend_on_the_search():
    """Not on what else is searched in the same block, and they are those of a plain product in float64."""
    rng = np.random.default_rng(4)
    kb, queries = (rng.normal(size=(n, 300)).astype(np.float16) for n in (500, 40))
    rows = rng.integers(0, 500, (40, 7))
    found = P.cosines_of(kb, queries, rows, at_once=16)
    assert (found[11:13] == P.cosines_of(kb, queries[11:13], rows[11:13])).all()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (kb.astype(np.float64), queries.astype(np.float64))]
    np.testing.assert_allclose(found, np.take_along_axis(unit[1] @ unit[0].T, rows, 1), atol=1e-12)


def test_a_deep_shared_search_takes_little_memory():
    """Answers of all processes are merged some queries at a time: all at once took 16 times one process's answer."""
    values, numbers = -np.arange(4000, dtype=np.float32)[None].repeat(1000, 0), np.zeros((1000, 4000), np.int64)
    workers = P.Workers(0, 8)
    workers.broadcast, workers.gather = lambda array: None, lambda array: [array.copy() for _ in range(8)]
    tracemalloc.start()
    try:
        best = P.Shared(lambda depth, *_: (values.copy(), numbers), workers, 1).ask(4000)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (best == -(np.arange(4000) // 8)).all() and peak < 4 * (values.nbytes + numbers.nbytes)


def test_index_files_of_other_runs_go(tmp_path):
    args = P.parse_args(["--out", str(tmp_path)])
    names = ["index.faiss", "index.faiss.tmp", "index-00001-of-00008.faiss", "index-00001-of-00008.faiss.tmp",
             "index-00000-of-00002.faiss", "kb.jsonl", "manifest.json", "my-index.faiss"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    P.clear(args, P.Workers(0, 2))
    assert sorted(os.listdir(tmp_path)) == ["index-00000-of-00002.faiss", "kb.jsonl", "my-index.faiss"]


def test_a_dry_run_of_several_processes_is_one(root, scorer, monkeypatch):
    landmarks(root)
    monkeypatch.setattr(P, "join_workers", lambda alone: P.Workers(1, 2))
    assert P.prepare(P.parse_args(arguments(root, "--dry-run"))) is None


def test_recall_of_a_shared_index(root, scorer, monkeypatch):
    """measure_recall asks the exact search first; the other processes answer that until it closes, then the index until
    it closes: what comes next is a barrier, where a process that still listens would wait for ever."""
    landmarks(root)
    calls = []
    monkeypatch.setattr(P.Shared, "serve", lambda self: calls.append(self.find.args[0].__class__.__name__))
    kb = P.KB(np.ones((8, 4), np.float16), np.arange(8, dtype=np.int32), {}, "cpu")
    exact = P.Shared(functools.partial(P.find_in, P.BlockSearch(kb.image, "cpu"), 0), P.Workers(1, 2), 8)
    kb.index = P.Shared(functools.partial(P.find_in, P.build_index(kb.image), 0), P.Workers(1, 2), 8)
    P.measure_recall(None, kb, exact, None)
    assert calls == ["BlockSearch", "IndexFlatIP"] and not kb.notes
    monkeypatch.setattr(P, "retrieve", lambda index, *_: (np.array([[1, 2], [3, 4]])
                                                          + (index is not exact),))  # of one's 2 both miss one
    monkeypatch.setattr(P.Shared, "close", lambda self: calls.append(f"closed {self.find.args[0].__class__.__name__}"))
    exact.workers = kb.index.workers = P.Workers(0, 2)
    P.measure_recall(types.SimpleNamespace(k=2), kb, exact, types.SimpleNamespace(
        count=3, bad={1: "unreadable"}, take=lambda rows: np.zeros((len(rows), 4))))
    assert calls[2:] == ["closed BlockSearch", "closed IndexFlatIP"] and kb.notes == {"recall": .5, "measured_on": 2}


def test_mined_pools(root, scorer):
    """The positive and the nearest in cosine to it, against a loop over all entities."""
    landmarks(root)
    edit(root / "encyclopedic_kb_wiki.json", lambda kb: kb.update({WIKI + "Gone": kb.pop(url(7))}))
    manifest = run(root, "--pool", "mined", "--num-candidates", "3", "--similarity-tolerance", "0.2")
    kept, expected = {query.query_id: query for query in pools(root)}, 0
    names = [url(j) for j in range(ENTITIES) if j != 7] + [WIKI + "Gone"]  # the changed key went to the end
    order = [j for j in range(ENTITIES) if j != 7] + [7]
    for j in range(ENTITIES):
        best = {i: max(unit(colour(j, 5)) @ unit(colour(i, 3 * n)) for n in range(2)) for i in range(ENTITIES)}
        near = sorted((abs(best[i] - best[j]), i) for i in range(ENTITIES) if i != j)[:2]
        if j == 7 or near[-1][0] > 0.2:
            assert f"E-VQA_test_{j}" not in kept
            continue
        expected += 1
        query = kept[f"E-VQA_test_{j}"]
        assert {order[i] for i in query.pool} == {j, *(i for _, i in near)}
        assert query.labels == [int(order[i] == j) for i in query.pool] and sum(query.labels) == 1
        want = sorted((best[order[i]] for i in query.pool), reverse=True)
        np.testing.assert_allclose(query.retrieval, want, atol=2e-3)
        assert [names[i] for i in query.pool][query.labels.index(1)] == url(j)
    assert len(kept) == expected and 0 < expected < ENTITIES and manifest["K"] == 3
    assert set(manifest["splits"]["test"]["dropped"]) == {"positive not in the knowledge base",
                                                          "too few negatives as similar as the positive"}


def test_mine_in_blocks():
    rng = np.random.default_rng(2)
    kb, owner = rng.normal(size=(400, 5)).astype(np.float16), np.sort(rng.permutation(np.arange(400) % 90))
    queries, positives = rng.normal(size=(20, 5)).astype(np.float16), rng.integers(0, 90, 20)
    def mine(size):
        find = functools.partial(P.find_as_near, kb, owner, "cpu", block=size)
        base = P.KB(kb, owner, {}, "cpu", P.Shared(find, P.Workers(), len(kb)))
        return P.mine(base, queries, positives, 5, 0.05)

    whole, blocks = mine(10_000), mine(33)
    for a, b in zip(whole[0], blocks[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert (whole[1] == blocks[1]).all()
    best = np.array([[max(S.normalise(q) @ S.normalise(kb[owner == j]).T) for j in range(90)] for q in queries])
    for i, positive in enumerate(positives):
        gaps = np.abs(best[i] - best[i][positive])
        gaps[positive] = np.inf
        assert set(whole[0][0][i]) == {positive, *np.argsort(gaps)[:4]}
        assert whole[1][i] == (np.sort(gaps)[3] <= 0.05)


def test_top_images(root, scorer):
    """EchoSight's pool: only entities among the top K images count. K = 2, and twins share the first two places."""
    landmarks(root)
    run(root, "--k", "2", "--top", "images")
    images = [(j, n) for j in range(ENTITIES) for n in range(2)]
    misses = 0
    for j, query in enumerate(pools(root)):
        ranked = sorted(images, key=lambda x: -(unit(colour(j, 5)) @ unit(colour(x[0], 3 * x[1]))))
        found = {i for i, _ in ranked[:2]}
        assert query.pool == by_hand(colour(j, 5), 2)[0]
        assert query.labels == [int(i == j and i in found) for i in query.pool]
        misses += len(found) == 1
    assert misses  # somewhere two images of one entity fill the top 2


def test_mean_of_the_images(root, scorer):
    landmarks(root)
    run(root)
    before = [(query.pool, query.retrieval) for query in pools(root)]
    features = np.array(S.load_data(str(root.parent / "data"), "test").kb_image, np.float32)
    run(root, "--candidate-image", "mean")
    data = S.load_data(str(root.parent / "data"), "test")
    np.testing.assert_allclose(data.kb_image, features.reshape(ENTITIES, 2, 4).mean(1), atol=1e-3)
    assert [(query.pool, query.retrieval) for query in data.queries] == before  # retrieval matches single images still
    assert all(query.pool_image == query.pool for query in data.queries)
    assert data.candidate_image_path(3).endswith("kb/e3_0.jpg")


# --------------------------------------------------------------------------------------------------- EchoSight's index

def pickled(values):
    """A list as Python's pickle writes it by protocol 2, texts with their memo."""
    out = b"\x80\x02]q\x00("
    for n, value in enumerate(values):
        if isinstance(value, int):
            out += b"J" + struct.pack("<i", value)
        else:
            out += b"X" + struct.pack("<I", len(value.encode())) + value.encode() + b"r" + struct.pack("<I", n + 1)
    return out + b"e."


@pytest.mark.parametrize("content, want", [
    (pickled([0, 0, 1, 70_000]), [0, 0, 1, 70_000]), (pickled(["a", "\u00e9"]), ["a", "\u00e9"]), (b"\x80\x02].", []),
    (b"\x80\x04\x95\x09\x00\x00\x00\x00\x00\x00\x00]\x94(K\x00M\xe8\x03e.", [0, 1000]),  # protocol 4, BININT1 and 2
    (b"(lp0\nI5\naI6\na.", [5, 6]),                                                    # protocol 0
    (b"\x80\x02]q\x00(X\x01\x00\x00\x00aq\x01h\x01e.", ["a", "a"])])                  # the second from the memo
def test_read_ids(tmp_path, content, want):
    (tmp_path / "ids.pkl").write_bytes(content)
    assert P.read_ids(str(tmp_path / "ids.pkl")) == want


@pytest.mark.parametrize("content, message", [
    (b"cos\nsystem\n(S'true'\ntR.", "opcode GLOBAL at byte 0 .* could run code"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "opcode STACK_GLOBAL"), (b"\x80\x02}q\x00.", "opcode EMPTY_DICT"),
    (b"\x80\x02]q\x00]q\x01a.", "opcode EMPTY_LIST"), (b"\x80\x02]q\x00(I01\ne.", "opcode INT"),
    (b"\x80\x02]q\x00h\x00a.", "opcode BINGET"), (b"\x80\x02K\x01.", "holds no list"),
    (pickled([1, 2])[:-1], "STOP"), (b"", "STOP|exhausted|empty")])
def test_read_ids_refuses(tmp_path, content, message):
    (tmp_path / "ids.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"ids\.pkl.*({message})"):
        P.read_ids(str(tmp_path / "ids.pkl"))


def echosight(root, shift=0, skip=()):
    """kb_index.faiss and its ids over all images of the knowledge base but those to skip, ids shifted by some."""
    vectors, ids = [], []
    for j, n in itertools.product(range(ENTITIES), range(2)):
        if (j, n) not in skip:
            vectors.append(unit(colour(j, 3 * n)))
            ids.append((j + shift) % ENTITIES)
    index = faiss.IndexFlatIP(4)
    index.add(np.array(vectors, np.float32))
    os.makedirs(root / "echo", exist_ok=True)
    faiss.write_index(index, str(root / "echo/kb_index.faiss"))
    (root / "echo/kb_index_ids.pkl").write_bytes(pickled(ids))
    return "--echosight", str(root / "echo")


def test_echosight_index(root, scorer):
    """Same pools as with an index of our own, though only what is in a pool is embedded, and though their index lacks
    an image, which shifts every url after it."""
    landmarks(root)
    write_csv(root / "test.csv", EVQA, [evqa_row(j, f"{j:x}bcdef0123456789") for j in (3,)])
    run(root, "--k", "2")
    data = S.load_data(str(root.parent / "data"), "test")
    want = [([data.entity(j)["entity_id"] for j in query.pool], query.labels, query.retrieval,
             [data.candidate_image_path(m) for m in query.pool_image]) for query in data.queries]
    os.remove(root / "kb/e11_1.jpg")
    scorer.images = 0
    manifest = run(root, "--k", "2", *echosight(root, skip={(9, 0)}))
    data = S.load_data(str(root.parent / "data"), "test")
    got = [([data.entity(j)["entity_id"] for j in query.pool], query.labels, query.retrieval,
            [data.candidate_image_path(m) for m in query.pool_image]) for query in data.queries]
    for (a, b, c, d), (w, x, y, z) in zip(got, want, strict=True):
        assert a == w and b == x and d == z
        np.testing.assert_allclose(c, y, atol=0.01)  # a little less where the image that they lack was the best
    assert manifest["index"]["vectors_confirmed"] > 0.9 and "index.faiss" not in manifest["files"]
    unused = manifest["kb"]["dropped"].get("entity in no pool", 0)
    assert unused > 0 and manifest["kb"]["kept"] == ENTITIES - unused
    assert scorer.images < 2 * ENTITIES


@pytest.mark.parametrize("break_, message", [
    (lambda root: echosight(root, shift=1), "ids are shifted"),
    (lambda root: (root / "echo/kb_index_ids.pkl").write_bytes(pickled([0] * 23)), "24 vectors of 4 .* 23 ids"),
    (lambda root: (root / "echo/kb_index_ids.pkl").write_bytes(pickled([0] * 23 + [12])), "places in .* 0 to 11"),
    (lambda root: (root / "echo/kb_index_ids.pkl").write_bytes(pickled(["x"] * 24)), "places in .* 0 to 11"),
    (lambda root: faiss.write_index(faiss.IndexFlatIP(3), str(root / "echo/kb_index.faiss")), "0 vectors of 3 numbers"),
    (lambda root: os.remove(root / "echo/kb_index_ids.pkl"), r"kb_index_ids\.pkl is missing")],
    ids=["shifted", "short", "too high", "texts", "dim", "missing"])
def test_echosight_index_of_something_else(root, scorer, break_, message):
    landmarks(root)
    flags = echosight(root)
    break_(root)
    with pytest.raises(SystemExit, match=message):
        P.main(arguments(root, *flags))


# -------------------------------------------------------------------------------------------------------------- dry run

def test_dry_run(root, scorer, capsys):
    landmarks(root)
    edit(root / "encyclopedic_kb_wiki.json", lambda kb: kb[url(0)]["image_urls"].append("https://gone"))
    P.main(arguments(root, "--dry-run"))
    text = capsys.readouterr().out
    assert "To embed: 36 images and 12 texts" in text  # 24 of the knowledge base, 12 of the queries
    assert "test       12       12        0      12 in the kb" in text and "dropped 1: image url not in url_to" in text
    assert "To write: 0.00 GB" in text and not os.path.exists(root.parent / "data")


@pytest.mark.parametrize("flags, message", [
    (["--pool", "mined", "--index", "ivf"], "--pool mined compares with every entity"),
    (["--echosight", "x", "--candidate-image", "mean"], "--echosight brings its own index"),
    (["--similarity-tolerance", "0"], "--similarity-tolerance must be"),
    (["--shard-size", "0"], "--shard-size must be")])
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        P.parse_args(flags)
    assert message in capsys.readouterr().err
