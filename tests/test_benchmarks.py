"""prepare.py on the files of InfoSeek, E-VQA and EchoSight: every layout, every wart, full scale in small.

An image is one colour and its feature is that colour, so pools can be computed by hand and without a model.

    python -m pytest tests/test_benchmarks.py
"""
import csv
import gzip
import itertools
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import prepare as P
import scorer as S
from test_prepare import assert_counts_add_up, queries_of
from test_prepare import edit_json as edit

ENTITIES = 12
WIKI = "https://en.wikipedia.org/wiki/"
EVQA = ("encyclopedic_vqa_split", "question", "answer", "dataset_image_ids", "dataset_name", "dataset_category_id",
        "question_type", "wikipedia_url", "wikipedia_title", "evidence", "evidence_section_id",
        "evidence_section_title", "question_original", "wikipedia_url_used_in_train")
ECHOSIGHT = ("question", "wikipedia_url", "data_id", "dataset_name", "dataset_image_ids", "question_type", "answer",
             "wikipedia_title")


class ColourScorer:
    """The feature of an image is its mean colour (grey = 0) and a constant, that of a text its length."""
    name, dim, device, dtype, batch_size = "colour", 4, "cpu", "float32", 8

    def __init__(self):
        self.images, self.mark = 0, np.eye(4, dtype=np.float32)[0]  # embedded so far; its fingerprint

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image, np.float32).reshape(-1, 3).mean(0) / 255 - 0.5)  # [3]

    def encode(self, pixels):
        self.images += len(pixels)
        return np.concatenate([pixels.numpy(), np.full((len(pixels), 1), 0.2, np.float32)], 1)

    def text_features(self, texts):
        return np.array([[0, 0, 0, 0.001 * len(text)] for text in texts], np.float32).reshape(-1, 4)

    def fingerprint(self):
        return self.mark


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
    assert_counts_add_up(manifest)
    return manifest


def pools(root, split="test"):
    """Queries with their rows of the arrays, as lists."""
    return queries_of(S.load_data(str(root.parent / "data"), split))


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
@given(pairs=st.lists(st.tuples(tricky, st.one_of(values, tricky)), max_size=8), ascii_=st.booleans(),
       chunk=st.integers(1, 60), style=st.sampled_from([(", ", ": ", ""), (",", ":", ""), (" ,\r\n ", " :\n", "\n ")]))
def test_stream_equals_json(tmp_path_factory, pairs, ascii_, chunk, style):
    """Any object, written in any style and read in any pieces, against json.loads with its pairs kept."""
    comma, colon, edge = style
    text = "{" + edge + comma.join(json.dumps(key, ensure_ascii=ascii_) + colon + json.dumps(
        value, ensure_ascii=ascii_) for key, value in pairs) + edge + "}" + edge
    path = tmp_path_factory.getbasetemp() / "stream.json"
    path.write_bytes(b"\xef\xbb\xbf" * ascii_ + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "CHUNK", chunk)
        assert list(P.stream_json(str(path))) == pairs


@pytest.mark.parametrize("chunk", [50, 700, 1 << 18])
def test_stream_names_the_entry(tmp_path, monkeypatch, chunk):
    """Damage is told with the last whole entry before it, and without reading on for ever."""
    monkeypatch.setattr(P, "CHUNK", chunk)
    text = json.dumps({url(j): entry(j) for j in range(40)})

    def error(content):
        (tmp_path / "kb.json").write_bytes(content)
        with pytest.raises(S.InputError, match=r"kb\.json") as caught:
            list(P.stream_json(str(tmp_path / "kb.json")))
        return str(caught.value)
    for cut in (1, 30, 1000, len(text) - 1):
        assert "written or copied whole" in error(text[:cut].encode())
    at = text.index('"Lead 20.') - 1  # a comma or bracket gone in the middle of the file
    assert f"bad after entry '{url(19)}'" in error((text[:at] + "#" + text[at + 1:]).encode())
    at = text.index("Lead 20.")
    assert "can't decode byte 0xff" in error(text[:at].encode() + b"\xff" + text[at + 1:].encode())
    monkeypatch.setattr(P, "LONGEST", 3000)
    assert "bad after entry" in error((text[:at - 2] + "#" + text[at - 1:] + " " * 99_999).encode())
    for content in (text + "x", "url,path\n", " [1]", "", "[" * 99_999, '{"a": ' + "[" * 99_999):
        assert "is not an object" in error(content.encode()) or "bad soon after" in error(content.encode())


def test_stream_needs_little_memory(tmp_path):
    one = json.dumps(entry(1, section_texts=["word " * 400]))
    with open(tmp_path / "kb.json", "w", encoding="utf-8") as file:
        file.write("{" + ", ".join(f'"{url(j)}": {one}' for j in range(8000)) + "}")
    assert os.path.getsize(tmp_path / "kb.json") > 16e6
    tracemalloc.start()
    count = sum(1 for _ in P.stream_json(str(tmp_path / "kb.json")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000 and peak < 4e6  # bytes: some pieces of 256 Ki, where the file is 19 MB


# ------------------------------------------------------------------------------------------------ E-VQA's layouts

@pytest.mark.parametrize("layout", ["{0}/{1}/{2}/{id}.jpg", "{id}.jpg", "{0}/{1}/{2}/{id}.JPEG"])
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
    """test.csv of iNaturalist questions with the id -> file mapping in one of its forms."""
    names = {}
    for j in range(ENTITIES):
        names[str(900 + j)] = f"val/0001_Genus_{j}/ab{j}.jpg" if kind != "flat" else f"{900 + j}.jpg"
        save(root / "inat" / names[str(900 + j)], colour(j, 5))
    folder = root if kind.endswith("at the root") else root / "inat"
    if kind.startswith("id2name"):
        S.write_json(folder / "val_id2name.json", names)
    write_csv(root / "test.csv", EVQA, [evqa_row(j, f"{900 + j}|77", "inaturalist") for j in range(ENTITIES)])


@pytest.mark.parametrize("kind", ["id2name", "flat", "id2name at the root"])
def test_inaturalist(root, scorer, kind):
    inat(root, kind)
    run(root)
    assert [query.pool for query in pools(root)] == [by_hand(colour(j, 5))[0] for j in range(ENTITIES)]


def test_first_any_or_all_images(root, scorer):
    ids = landmarks(root)
    rows = [evqa_row(j, f"ffffffffffffffff|{name}|{ids[0]}") for j, name in enumerate(ids)]
    write_csv(root / "test.csv", EVQA, [evqa_row(0, ids[0]), *rows, evqa_row(1, f"{ids[1]}|x", question_type="2_hop")])
    split = run(root)["splits"]["test"]
    assert split["dropped"] == {"image missing": ENTITIES, "question_type '2_hop'": 1} and split["rows_read"] == 14
    assert run(root, "--query-image", "any")["splits"]["test"]["kept"] == ENTITIES + 1
    # A query for each image of each row: 1 + 12 x 3 + 2 of the 2-hop row.
    split = run(root, "--query-image", "all")["splits"]["test"]
    assert split["rows_read"] == 39 and split["kept"] == 1 + 2 * ENTITIES
    assert split["dropped"] == {"image missing": ENTITIES, "question_type '2_hop'": 2}
    assert [(query.query_id, query.image[-20:]) for query in pools(root)[:3]] == [
        ("E-VQA_test_0.0", f"{ids[0]}.jpg"), ("E-VQA_test_1.1", f"{ids[0]}.jpg"), ("E-VQA_test_1.2", f"{ids[0]}.jpg")]


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
    with pytest.raises(SystemExit, match=r"cleaned\.csv: no csv in UTF-8 soon after line \d"):
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
    text = (root / "url_to_path_mapping.json").read_text().rstrip("}\n")
    (root / "url_to_path_mapping.json").write_text(text + ', "https://up.org/e5_0.jpg": "kb/none.jpg"}')  # the first counts
    manifest = run(root)
    assert manifest["kb"]["dropped"] == {"entry has no image": 1, "no image url of the entry is known": 1,
                                         "entry repeated": 1}
    assert manifest["kb"]["images_dropped"] == {
        "image unreadable": 1, "image unreadable (svg)": 1, "image unreadable (gif)": 1, "image unreadable (tif)": 1,
        "image repeated in its entry": 1, "image url not in url_to_path_mapping.json": 3, "image missing": 1,
        "entry repeated": 2}
    assert manifest["kb"]["images"] == 2 * ENTITIES + 1 and scorer.images == 2 * ENTITIES + ENTITIES


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


# ------------------------------------------------------------------------------------------------------- InfoSeek

OVEN = ["oven_images/{shard}/{id}.jpg", "oven_images/{shard}/{id}.JPEG", "oven_images/{id}.png"]


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


def test_infoseek_val_is_held_out_by_entity(root, scorer, monkeypatch):
    monkeypatch.setattr(P, "HELD_OUT", 3)
    save(root / "oven_images/oven_00000001.jpg", colour(1))
    write_csv(root / "infoseek_train_filtered.csv", ECHOSIGHT, [
        infoseek_row(n % ENTITIES, n, dataset_image_ids="oven_00000001") for n in range(2 * ENTITIES)])
    manifest = run(root, "--dataset", "infoseek", "--splits", "train,val", "--k", str(ENTITIES))
    train, val = ({query.positives[0] for query in pools(root, split)} for split in ("train", "val"))
    assert train and val and not train & val and len(train | val) == ENTITIES
    assert manifest["splits"]["train"]["dropped"] == {"entity held out for val": 2 * len(val)}
    assert manifest["splits"]["val"]["dropped"] == {"entity left to train": 2 * len(train)}


# ---------------------------------------------------------------------------------------------------------- retrieval

def test_stored_cosines_do_not_depend_on_the_search():
    """Not on what else is searched in the same block, and they are those of a plain product in float64."""
    rng = np.random.default_rng(4)
    kb, queries = (rng.normal(size=(n, 300)).astype(np.float16) for n in (500, 40))
    rows = rng.integers(0, 500, (40, 7))
    found = P.cosines_of(kb, queries, rows)
    assert (found[11:13] == P.cosines_of(kb, queries[11:13], rows[11:13])).all()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (kb.astype(np.float64), queries.astype(np.float64))]
    np.testing.assert_allclose(found, np.take_along_axis(unit[1] @ unit[0].T, rows, 1), atol=1e-12)


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
