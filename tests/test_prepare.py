"""prepare.py on a small world of plain colours: pools against brute force, every drop counted, no half-made data.

    python -m pytest tests/test_prepare.py
"""
import csv
import json
import os
import shutil
import types
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import prepare as P
import scorer as S

ENTITIES, K = 30, 20
FIELDS = ("question_type", "wikipedia_url", "extra", "question", "dataset_name", "dataset_image_ids")  # any order


def url(j):
    return f"https://en.wikipedia.org/wiki/T%C3%A9_{j}"


def colour(j):
    return tuple(int(v) for v in np.random.default_rng(j).integers(0, 256, 3))


def save(root, path, value, size=(20, 16)):
    os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
    Image.new("RGB", size, value).save(os.path.join(root, path), "PNG")  # named .jpg: Pillow looks inside


def write_csv(root, split, rows, fields=FIELDS):
    with open(os.path.join(root, f"{split}.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def question(j, image_ids, name="inaturalist", kind="automatic", **changes):
    return {"question_type": kind, "wikipedia_url": url(j), "extra": "a\nb, \"c\"" + "x" * 200_000 * (j == 3),
            "question": f"What, exactly, is \u201cthis {j}\u201d?", "dataset_name": name,
            "dataset_image_ids": image_ids, **changes}


def make_world(root):
    """30 entities with 1 or 4 images, one entry without image, one that shares its image with another; entity 0 has two
    nearly equal images, as photographs of one landmark have. Queries show the entity's colour, a little off."""
    kb, files, names = {}, {}, {"train": {}, "val": {}}
    for j in range(ENTITIES):
        images = [f"https://img/{j}_{n}.jpg" for n in range(4 if j % 3 == 0 else 1)]
        for n, image in enumerate(images):
            files[image] = f"kb/{j}_{n}.jpg"
            save(root, files[image], tuple(min(255, v + 6 * n) for v in colour(j)))
        kb[url(j)] = {"title": f"T\u00e9 {j}", "section_titles": ["x"] * 4, "url": url(j),
                      "section_texts": ["lead " * 20, "", "third " * 80, "never read"], "image_urls": images}
    kb[url(0)]["image_urls"] += ["https://img/0_0.jpg", "https://img/nowhere.jpg"]  # repeated; without a file name
    kb[url(4)].update(title="", section_texts=["", " "])                            # no text: t_j is empty in Eq. 3
    kb["https://no.image"] = {"title": "N", "section_texts": ["n"], "image_urls": []}
    for split, first in (("train", 100), ("val", 500), ("test", 700)):
        folder = "train" if split == "train" else "val"  # iNaturalist's val serves val and test
        rows = []
        for j in range(ENTITIES):
            if j % 5 == 4:
                image_id = f"{first + j:x}".zfill(16)
                path = f"landmarks/{'/'.join(image_id[:3])}/{image_id}.jpg"
                rows.append(question(j, image_id, "landmarks", "templated"))
            else:
                image_id = str(first + j)
                names[folder][image_id] = f"{folder}/{image_id}.jpg"
                path = f"inat/{folder}/{image_id}.jpg"
                rows.append(question(j, f"{image_id}|{image_id}9"))
            save(root, path, tuple(min(255, v + 9) for v in colour(j)))
        rows.insert(1, question(1, "1", kind="2_hop", wikipedia_url=f"{url(1)}|{url(2)}"))
        write_csv(root, split, rows)
    for folder, mapping in names.items():
        S.write_json(os.path.join(root, f"inat/{folder}_id2name.json"), mapping)
    S.write_json(os.path.join(root, "url_to_path_mapping.json"), files)
    S.write_json(os.path.join(root, "encyclopedic_kb_wiki.json"), kb)


def save_scorer(config, folder, seed):
    """An EVA-CLIP of random weights."""
    model, draw = S.EvaClip(config), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1 if p.ndim == 1 else 0, 0.2, generator=draw)
    model.save(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """raw/, the scorer, and data/ prepared once. Tests that change something work on a copy."""
    folder = tmp_path_factory.mktemp("world")
    make_world(str(folder / "raw"))
    config = S.EvaClipConfig(embed_dim=16, image_size=28, width=32, layers=2, head_width=16, mlp_ratio=2, context=16,
                             vocab=600, text_width=16, text_heads=2, text_layers=1)
    save_scorer(config, folder / "tiny", 1)
    P.main(arguments(folder))
    return folder


@pytest.fixture
def world(base, tmp_path):
    shutil.copytree(base, tmp_path / "w")
    return tmp_path / "w"


def arguments(folder, *more):
    return ["--root", str(folder / "raw"), "--scorer", str(folder / "tiny"), "--out", str(folder / "data"), *more]


def run(folder, *more):
    return P.prepare(P.parse_args(arguments(folder, *more)))


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    S.write_json(str(path), content)


def rows_of(folder, split):
    with open(folder / "raw" / f"{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def queries_of(data):
    """Queries with their rows of the arrays, as lists."""
    names = ("pool", "pool_image", "labels", "retrieval")
    return [types.SimpleNamespace(**vars(query), **{name: getattr(data, name)[i].tolist() for name in names})
            for i, query in enumerate(data.queries)]


def assert_counts_add_up(manifest):
    for split in manifest["splits"].values():
        assert split["rows_read"] == split["kept"] + sum(split["dropped"].values())
        assert split["first_dropped"].keys() == split["dropped"].keys()
    kb = manifest["kb"]
    assert kb["entries_read"] == kb["kept"] + sum(kb["dropped"].values())
    assert kb["images_read"] == kb["images"] + sum(kb["images_dropped"].values())


# ------------------------------------------------------------------------------------------------------ what is written

def test_pools_equal_brute_force(base):
    """Every pool recomputed from the images, without faiss, float16 or any function of prepare.py."""
    scorer, names = S.load_scorer(str(base / "tiny")), {}
    data = S.load_data(str(base / "data"), "test", scorer)
    for j in range(ENTITIES):
        entity = data.entity(j)
        assert entity["entity_id"] == url(j)
        names[j] = scorer.image_features([Image.open(base / "raw" / path).convert("RGB") for path in entity["images"]])
    assert len(data) == ENTITIES
    for i, query in enumerate(queries_of(data)):
        full = scorer.image_features([Image.open(base / "raw" / query.image).convert("RGB")])[0]
        np.testing.assert_allclose(data.full[i], full, rtol=1e-3, atol=1e-3)
        best = {j: max(float(full @ f / np.linalg.norm(full) / np.linalg.norm(f)) for f in features)
                for j, features in names.items()}
        ranked = sorted(best, key=best.get, reverse=True)[:K]
        np.testing.assert_allclose(query.retrieval, [best[j] for j in ranked], atol=1e-3)  # and sorted
        np.testing.assert_allclose([best[j] for j in query.pool], query.retrieval, atol=1e-3)
        assert len(set(query.pool)) == K
        for j, m in zip(query.pool, query.pool_image, strict=True):
            cosines = [float(full @ f / np.linalg.norm(full) / np.linalg.norm(f)) for f in names[j]]
            chosen = cosines[m - int(np.flatnonzero(data.kb_entity == j)[0])]
            assert chosen == pytest.approx(max(cosines), abs=1e-3)
            assert data.candidate_image_path(m).endswith(".jpg") and data.kb_entity[m] == j
        positive = rows_of(base, "test")[i + (i > 0)]["wikipedia_url"]  # row 1 is the 2-hop one
        assert query.labels == [int(url(j) == positive) for j in query.pool]
        assert query.query_id == f"E-VQA_test_{i}"


def test_features_and_text(base):
    data, scorer = S.load_data(str(base / "data"), "val"), S.load_scorer(str(base / "tiny"))
    assert data.kb_image.dtype == data.kb_text.dtype == data.full.dtype == np.float16
    entity = data.entity(7)
    # 5 + 100 + 2 characters before the third section, so 393 of its 480.
    want = "T\u00e9 7\n" + "lead " * 20 + "\n\n" + ("third " * 80)[:393]
    assert entity["text"] == want and len(want) == 500
    np.testing.assert_allclose(data.kb_text[7], scorer.text_features([entity["text"]])[0], rtol=2e-3, atol=2e-3)
    assert abs(np.linalg.norm(data.kb_image[5].astype(float)) - 1) > 0.05  # un-normalised: Eq. 3 needs the length
    assert data.entity(4)["text"] == "" and not data.kb_text[4].any()      # no text: image alone
    i, k = np.argwhere(data.pool == 4)[0]
    image = data.kb_image[data.pool_image[i, k]]
    np.testing.assert_allclose(data.candidates(i)[k], S.normalise(image), atol=1e-6)
    assert data.open_image(0).size == (20, 16)


def test_counts(base, capsys):
    manifest = json.loads((base / "data/manifest.json").read_text())
    assert_counts_add_up(manifest)
    # 10 entities with 4 images, 20 with 1: 60 used; 2 more of entity 0 are a repeat and a url without a file.
    assert manifest["kb"] == {**manifest["kb"], "entries_read": 31, "kept": 30, "images_read": 62, "images": 60,
                              "dropped": {"entry has no image": 1},
                              "images_dropped": {"image repeated in its entry": 1,
                                                 "image url not in url_to_path_mapping.json": 1}}
    assert manifest["splits"]["test"]["rows_read"] == 31 and manifest["splits"]["test"]["kept"] == 30
    assert manifest["splits"]["test"]["dropped"] == {"question_type '2_hop'": 1}
    assert manifest["splits"]["train"]["kept"] == manifest["splits"]["train"]["with_positive"]
    assert manifest["K"] == 20 and manifest["dim"] == 16 and manifest["root"] == "../raw"
    text = P.table(manifest)
    assert "test       31       30        1" in text and "test dropped 1: question_type '2_hop' (first: " in text
    assert all(manifest["files"][name]["bytes"] == os.path.getsize(base / "data" / name) for name in manifest["files"])
    assert not [name for name in os.listdir(base / "data") if name.endswith(".tmp")]


def test_same_input_same_files(world):
    before = json.loads((world / "data/manifest.json").read_text())
    after = run(world)
    assert after["files"] == before["files"]
    one = S.load_data(str(world / "data"), "val").identity
    run(world, "--k", "10")
    assert S.load_data(str(world / "data"), "val").identity != one  # a run of the old pools will refuse these


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])
def test_nearest_entities_equal_brute_force(device, monkeypatch):
    """Many images an entity, images that several entities share, blocks that cut both: against all products in float64,
    equal ones by row. One entity owns the 50 nearest images, so the search has to go deep."""
    rng = np.random.default_rng(0)
    owner = np.unique(np.sort(np.r_[rng.integers(0, 60, 240), np.full(150, 17)]), return_inverse=True)[1]
    kb = rng.normal(size=(len(owner), 40)).astype(np.float16)
    kb[rng.permutation(len(kb))[:120]] = kb[0]
    kb[owner == 17] += 3  # all in one direction
    queries = np.r_[kb[:1], kb[owner == 17][:2], rng.normal(size=(30, 40)).astype(np.float16)]
    nearest = P.nearest_images
    monkeypatch.setattr(P, "nearest_images", lambda *args: nearest(*args, block=77, at_once=10))
    entities, rows, cosines = P.nearest_entities(kb, owner, queries, 20, device)
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (queries, kb))
    for i, exact in enumerate((a @ b.T).round(9)):
        order = np.lexsort((np.arange(len(kb)), -exact))
        first = order[np.sort(np.unique(owner[order], return_index=True)[1])[:20]]
        assert rows[i].tolist() == first.tolist() and entities[i].tolist() == owner[first].tolist()
        np.testing.assert_allclose(cosines[i], exact[first], atol=1e-8)
    with pytest.raises(S.InputError, match=r"holds \d+ entities, a pool needs 99"):
        P.nearest_entities(kb, owner, queries, 99, device)


def test_an_image_that_hundreds_share():
    """They tie: the first by row are taken, and not those that the search happens to see."""
    other = np.random.default_rng(0).normal(size=(100, 1280))
    features, owner = np.concatenate([other, np.ones((300, 1280))]).astype(np.float16), np.arange(400)
    rows = P.nearest_entities(features, owner, np.ones((3, 1280), np.float16), 20)[1]
    assert rows.tolist() == [list(range(100, 120))] * 3


def test_train_keeps_only_pools_with_the_positive(world):
    rows = rows_of(world, "train")
    rows[5]["wikipedia_url"] = "https://en.wikipedia.org/wiki/T\u00e9_4"  # decoded, so another string: no entity
    write_csv(world / "raw", "train", rows)
    for split in ("val", "test"):
        write_csv(world / "raw", split, [{**row, "wikipedia_url": "https://gone"} for row in rows_of(world, split)])
    manifest = run(world, "--k", "2")
    train = manifest["splits"]["train"]
    assert_counts_add_up(manifest)
    assert train["dropped"]["positive not in the knowledge base"] == 1
    assert "train.csv:" in train["first_dropped"]["positive not in the knowledge base"]
    data = S.load_data(str(world / "data"), "train")
    assert data.labels.any(1).all() and train["kept"] == len(data) == len(data.full)
    # query_id counts single-hop rows whether or not they were kept; features stay with their rows.
    dropped = {4} | {i for i in range(30)} - {int(q.query_id.split("_")[2]) for q in data.queries}
    assert "E-VQA_train_4" not in {query.query_id for query in data.queries} and len(data) == 30 - len(dropped)
    scorer = S.load_scorer(str(world / "tiny"))
    for i, query in enumerate(data.queries):
        np.testing.assert_allclose(data.full[i], scorer.image_features([data.open_image(i)])[0], rtol=2e-3, atol=2e-3)
    assert manifest["splits"]["val"]["kept"] == 30 and manifest["splits"]["val"]["with_positive"] == 0  # misses stay in


def test_first_image_and_limit(world):
    """--limit cuts the rows, and the knowledge base down to the first 10 K (more than there are) and the positives."""
    manifest = run(world, "--candidate-image", "first", "--limit", "7")
    assert [split["rows_read"] for split in manifest["splits"].values()] == [7, 7, 7]
    data = S.load_data(str(world / "data"), "val")
    assert len(data) == 6  # the second of the 7 is 2-hop
    first = [int(np.flatnonzero(data.kb_entity == j)[0]) for j in range(ENTITIES)]
    assert (data.pool_image == np.array(first)[data.pool]).all()


# ------------------------------------------------------------------------------------------------------------ bad input

def test_bad_images_are_counted(world):
    raw = world / "raw"
    (raw / "kb/1_0.jpg").unlink()                                  # the only image of entity 1
    (raw / "kb/3_2.jpg").write_bytes(b"not an image")              # one of four of entity 3
    for j, n in ((2, 0), (9, 0), (9, 1), (9, 2), (9, 3)):          # all images of entities 2 and 9, cut short
        content = (raw / f"kb/{j}_{n}.jpg").read_bytes()
        (raw / f"kb/{j}_{n}.jpg").write_bytes(content[:len(content) // 2])
    for folder, image in (("train", 100), ("val", 500), ("val", 700)):
        (raw / f"inat/{folder}/{image}.jpg").unlink()
        (raw / f"inat/{folder}/{image + 1}.jpg").write_bytes(b"\xff\xd8 torn")
    manifest = run(world)
    assert_counts_add_up(manifest)
    kb = manifest["kb"]
    assert kb["dropped"] == {"entry has no image": 1, "no image of the entry can be read": 3}
    assert kb["images_dropped"]["image missing"] == 1 and kb["images_dropped"]["image unreadable"] == 6
    assert "1_0.jpg" in kb["first_dropped"]["image missing"]
    for split in ("val", "test"):
        assert manifest["splits"][split]["dropped"] == {"question_type '2_hop'": 1, "image missing": 1,
                                                        "image unreadable": 1}
        assert f"{split}.csv:" in manifest["splits"][split]["first_dropped"]["image unreadable"]
    assert Counter(manifest["splits"]["train"]["dropped"])["image unreadable"] == 1
    data = S.load_data(str(world / "data"), "test")
    assert [query.query_id for query in list(data.queries)[:2]] == ["E-VQA_test_2", "E-VQA_test_3"]  # ids do not move up
    assert len(data.entity(1)["images"]) == 3 and data.entity(1)["entity_id"] == url(3)  # 1 and 2 are gone
    assert url(1) not in {data.entity(j)["entity_id"] for j in range(kb["kept"])}
    # Row m belongs to image m of the entity still, though one in the middle is gone.
    assert data.candidate_image_path(int(np.flatnonzero(data.kb_entity == 1)[2])).endswith("kb/3_3.jpg")
    scorer = S.load_scorer(str(world / "tiny"))
    for m in range(len(data.kb_image)):
        image = S.read_image(data.candidate_image_path(m))
        np.testing.assert_allclose(data.kb_image[m], scorer.image_features([image])[0], rtol=2e-3, atol=2e-3)


def test_bad_rows_are_counted(world):
    rows = rows_of(world, "test")
    rows[3]["dataset_image_ids"] = "99999999"
    rows[4]["dataset_name"] = "flickr"
    rows[6]["question"] = "  "
    rows[7]["question_type"] = "riddle"
    rows[8].update(dataset_name="landmarks", dataset_image_ids="")
    rows[10].update(dataset_name="landmarks", dataset_image_ids="../kb/9_0")  # a file that is there
    write_csv(world / "raw", "test", rows)
    manifest = run(world, "--splits", "test")
    assert_counts_add_up(manifest)
    assert manifest["splits"]["test"]["dropped"] == {
        "question_type '2_hop'": 1, "image id unknown": 2, "dataset_name 'flickr'": 1, "question empty": 1,
        "question_type 'riddle'": 1, "image missing": 1}
    # i counts the single-hop rows, used or not: rows 0, 2, 5 and 9 are 0, 1, 4 and 7 (1 is 2-hop, 7 is no known type).
    data = S.load_data(str(world / "data"), "test")
    assert [query.query_id for query in list(data.queries)[:4]] == [f"E-VQA_test_{i}" for i in (0, 1, 4, 7)]
    assert manifest["splits"]["test"]["first_dropped"]["image id unknown"].endswith(": E-VQA_test_6")


def remove(name):
    return lambda raw: (raw / name).unlink()


def append(name, line):
    return lambda raw: (raw / name).write_text((raw / name).read_text(encoding="utf-8") + line, encoding="utf-8")


def without(column):
    return lambda raw: write_csv(raw, "val", rows_of(raw.parent, "val"), [name for name in FIELDS if name != column])


@pytest.mark.parametrize("change, message", [
    *((without(name), rf"prepare.py: .*val\.csv: column {name} is missing; it has \['question")
      for name in ("wikipedia_url", "dataset_image_ids", "question")),
    (remove("test.csv"), r"test\.csv is missing; give the splits that you have"),
    (remove("encyclopedic_kb_wiki.json"), r"encyclopedic_kb_wiki\.json is missing; --root must hold"),
    (remove("url_to_path_mapping.json"), r"url_to_path_mapping\.json is missing"),
    (lambda raw: shutil.rmtree(raw / "inat"), r"inat is missing, or has neither train_id2name\.json nor"),
    (lambda raw: (raw / "encyclopedic_kb_wiki.json").write_text('{"a": {"t'), r"kb_wiki\.json is not an object .*copied whole"),
    (lambda raw: (raw / "encyclopedic_kb_wiki.json").write_text("[]"), "is not an object of JSON"),
    (lambda raw: edit_json(raw / "encyclopedic_kb_wiki.json", lambda kb: kb[url(3)].pop("section_texts")),
     "_3': field 'section_texts' is missing or no list"),
    (append("val.csv", "automatic,too,few\n"), r"val\.csv:\d+: this row does not have the header's 6"),
    (append("val.csv", "a,b,c,d,e,f,g\n"), r"val\.csv:\d+: this row does not have the header's 6"),
    (lambda raw: write_csv(raw, "val", [question(0, "1", kind="2_hop")]), r"val\.csv: none of 1 rows .*2_hop")],
    ids=["url", "image", "question", "csv", "kb", "mapping", "id2name", "kb cut", "kb list", "kb field", "short row", "long row", "nothing left"])
def test_broken_raw_data(world, change, message):
    change(world / "raw")
    with pytest.raises(SystemExit, match=message):
        P.main(arguments(world))
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):  # the old data do not pass for the new
        S.load_data(str(world / "data"), "train")


def test_too_small_knowledge_base(world):
    with pytest.raises(SystemExit, match="30 of 31 entries have a readable image, a pool needs 31: lower --k or"):
        P.main(arguments(world, "--k", "31"))
    assert run(world, "--k", "30")["splits"]["test"]["with_positive"] == 30  # all entities in every pool


def test_unknown_scorer(world):
    with pytest.raises(SystemExit, match="prepare.py: .*no/such"):
        P.main(arguments(world, "--scorer", "no/such"))
    assert (world / "data/manifest.json").exists()  # nothing was touched


def test_other_scorers_pools_are_refused(world):
    save_scorer(S.EvaClip.load(str(world / "tiny")).config, world / "other", 2)
    with pytest.raises(S.InputError, match=r"with scorer .*tiny in float32; .*other in float32 gives others"):
        S.load_data(str(world / "data"), "val", S.load_scorer(str(world / "other")))


@pytest.mark.parametrize("arguments_, message", [
    (["--k", "1"], "--k must be at least 2"), (["--limit", "-1"], "--limit must be at least 0"),
    (["--splits", "dev"], "out of train, val, test"), (["--visualise", "3"], "unrecognized"),
    (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--retrieved", "x", "--top", "images"], "--top images counts images")])
def test_bad_arguments(arguments_, message, capsys):
    with pytest.raises(SystemExit):
        P.parse_args(arguments_)
    assert message in capsys.readouterr().err
    assert P.parse_args(["--splits", "test,val,test"]).splits == ["test", "val"]  # twice would count its drops twice


# ------------------------------------------------------------------------------------------------------------ atomicity

@pytest.mark.parametrize("step", ["read_questions", "read_kb", "embed", "write_kb", "nearest_entities", "write_split",
                                  "write_manifest", "write_json"])
def test_cut_short_at_any_step(world, monkeypatch, step):
    """As after kill -9: whatever was there before, load_data takes nothing for whole; a new run repairs it."""
    def killed(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(P, step, killed)
        with pytest.raises(KeyboardInterrupt):
            run(world)
    with pytest.raises(FileNotFoundError, match="cut short"):
        S.load_data(str(world / "data"), "val")
    run(world)
    assert len(S.load_data(str(world / "data"), "val")) == 30
