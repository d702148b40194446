"""tools/layouts.py: every layout, converted and then prepared, gives the pools of the files that prepare.py reads itself.

    python -m pytest tests/test_layouts.py
"""

import gzip
import itertools
import json
import os

import pytest

import prepare as P
import scorer as S
from test_benchmarks import (ENTITIES, EVQA, WIKI, arguments, by_hand, colour, edit, evqa_row, landmarks, pools, root,
                             run, save, scorer, url, write_csv, write_jsonl)  # noqa: F401 (two are fixtures)
from tools import layouts


def convert(root, what, *more):
    layouts.main([what, "--root", str(root), *more])


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


# ------------------------------------------------------------------------------------------------------- InfoSeek

def test_infoseek(root, scorer, capsys):  # noqa: F811
    """No url in the files: it comes from the title, as is or percent-encoded, else from an entry with that title."""
    rows, kb = official(root, "val", range(7), Q2="Caf\u00e9 (x)", Q3="entity 3", Q4="Renamed", Q5="Twice", Q6="")

    def rename(content):
        content[WIKI + "Caf%C3%A9_(x)"] = content.pop(url(2))
        content[WIKI + "Odd"] = content.pop(url(4)) | {"title": "Renamed"}
        content[url(5)]["title"] = content[url(6)]["title"] = "Twice"  # two pages, one title: nobody's
        content[url(7)]["title"] = ""
    edit(root / "encyclopedic_kb_wiki.json", rename)
    write_jsonl(root / "infoseek_val_withkb.jsonl", kb[:-1] + [{**kb[-1], "data_id": "infoseek_val_x"}, kb[-1]])
    rows += [{**rows[0], "data_id": "infoseek_val_99999999"}, rows[1], {**rows[2], "data_id": "infoseek_val_x",
                                                                        "question": " "}]
    write_jsonl(root / "infoseek_val.jsonl", rows)
    with pytest.raises(SystemExit, match=r"infoseek_test_filtered\.csv is missing; python -m tools\.layouts infoseek "
                                         r"--root .*raw makes it of the official infoseek_val\.jsonl; give the splits"):
        P.main(arguments(root, "--dataset", "infoseek"))
    capsys.readouterr()
    convert(root, "infoseek")
    assert capsys.readouterr().out.splitlines() == [
        f"{root}/infoseek_test_filtered.csv: 10 read, 9 kept, 1 dropped; of the kept 3 are about an entity that "
        "encyclopedic_kb_wiki.json lacks",
        f"  dropped 1: data_id not in the withkb file (first: {root}/infoseek_val.jsonl:8: infoseek_val_99999999)"]
    split = run(root, "--dataset", "infoseek")["splits"]["test"]
    assert split["dropped"] == {"data_id repeated": 1, "question empty": 1} and split["positive_in_kb"] == 5
    assert [query.positives for query in pools(root)] == [[url(0)], [url(1)], [WIKI + "Caf%C3%A9_(x)"], [url(3)],
                                                          [WIKI + "Odd"], [WIKI + "Twice"], [WIKI]]
    assert [sum(query.labels) for query in pools(root)] == [1, 1, 1, 1, 1, 0, 0]
    with pytest.raises(SystemExit, match=r"infoseek_test_filtered\.csv is there already: remove it"):
        convert(root, "infoseek")


@pytest.mark.parametrize("name", layouts.WIKI6M)
def test_titles_of_wiki6m_win(root, scorer, name):  # noqa: F811
    """Over withkb's text, which may be older. Both splits; val is cut out of train by prepare.py, as from any csv."""
    official(root, "val", [5], Q5="Its old name")
    official(root, "train", range(ENTITIES), Q5="Its old name")
    write_jsonl(root / name, [{"wikidata_id": "Q5", "wikipedia_title": "Entity 5"},
                              {"wikidata_id": "Q77", "wikipedia_title": "Entity 7"}])
    convert(root, "infoseek")
    splits = run(root, "--dataset", "infoseek", "--splits", "train,test")["splits"]
    assert splits["test"]["positive_in_kb"] == 1
    assert splits["train"]["kept"] + splits["train"]["dropped"].get("entity held out for val", 0) == ENTITIES


@pytest.mark.parametrize("change, message", [
    (lambda root: os.remove(root / "infoseek_val_withkb.jsonl"), r"infoseek_val_withkb\.jsonl is missing"),
    (lambda root: os.remove(root / "infoseek_val.jsonl"), "holds neither infoseek_train.jsonl nor infoseek_val.jsonl"),
    (lambda root: os.remove(root / "encyclopedic_kb_wiki.json"), r"wiki_100_dict_v4\.json or .* is missing"),
    (lambda root: edit(root / "encyclopedic_kb_wiki.json", lambda kb: kb[url(1)].pop("title")), "field 'title' is missing"),
    (lambda root: write_jsonl(root / "infoseek_val.jsonl", [{"data_id": "a", "entity_id": "Q1"}]),
     r"val\.jsonl:1: field image_id, question is missing or no text; is this the file"),
    (lambda root: (root / "infoseek_val.jsonl").write_bytes(b'{"data_id": "x'), r"val\.jsonl:1: not a line of JSON"),
    (lambda root: (root / "infoseek_val.jsonl").write_bytes(b'{"a": ' + b"[" * 99_999), r"val\.jsonl:1: not a line")],
    ids=["withkb", "jsonl", "kb", "kb field", "other file", "cut", "deep"])
def test_broken_infoseek(root, change, message):  # noqa: F811
    official(root, "val", range(3))
    change(root)
    with pytest.raises(SystemExit, match=message):
        convert(root, "infoseek")
    assert not list(root.glob("*_filtered.csv"))


def test_cut_gz_and_last_empty_line(tmp_path):
    content = gzip.compress(b"".join(json.dumps({"a": os.urandom(20).hex()}).encode() + b"\n" for _ in range(999)))
    (tmp_path / "x.jsonl.gz").write_bytes(content[:len(content) // 2])
    with pytest.raises(S.InputError, match=r"x\.jsonl\.gz.*copied to its end"):
        list(layouts.read_jsonl(str(tmp_path / "x.jsonl.gz"), ("a",)))
    (tmp_path / "y.jsonl").write_text('{"a": "1"}\n\n')
    assert len(list(layouts.read_jsonl(str(tmp_path / "y.jsonl"), ("a",)))) == 1


def test_half_a_surrogate_pair_in_infoseeks_rows(root, scorer):  # noqa: F811
    """The question, the title (which becomes a url) and an id; the url that is found by title is a positive."""
    half = "\ud83d"  # as json.loads reads "\ud83d" where a text was cut inside an emoji
    kb = json.loads((root / "encyclopedic_kb_wiki.json").read_text(encoding="utf-8"))
    kb[f"https://w/{half}"] = kb.pop(url(3)) | {"title": f"Cut {half}"}
    (root / "encyclopedic_kb_wiki.json").write_text(json.dumps(kb))
    save(root / "oven_images/oven_1.jpg", colour(3))
    write_jsonl(root / "infoseek_val.jsonl", [{"data_id": f"d{half}", "image_id": "oven_1", "question": f"What {half}?"}])
    write_jsonl(root / "infoseek_val_withkb.jsonl",
                [{"data_id": f"d{half}", "entity_id": "Q1", "entity_text": f"Cut {half}"}])
    convert(root, "infoseek")
    run(root, "--dataset", "infoseek")
    query, = pools(root)
    assert (query.query_id, query.question, query.positives) == ("d?", "What ??", ["https://w/?"]) and any(query.labels)


# ---------------------------------------------------------------------------------------------------- iNaturalist

@pytest.mark.parametrize("folder", ["inat", ""])
def test_inaturalists_own_list(root, scorer, capsys, folder):  # noqa: F811
    names = {900 + j: f"val/0001_Genus_{j}/ab{j}.jpg" for j in range(ENTITIES)}
    for j, name in enumerate(names.values()):
        save(root / "inat" / name, colour(j, 5))
    images = [{"id": i, "file_name": name} for i, name in names.items()]
    S.write_json(root / folder / "val.json", {"images": images + images[:1]})
    write_csv(root / "test.csv", EVQA, [evqa_row(j, f"{900 + j}|77", "inaturalist") for j in range(ENTITIES)])
    with pytest.raises(SystemExit, match=r"inat is missing, or has neither val_id2name\.json nor .* --inat, or have them "
                                         r"listed: python -m tools\.layouts inat \(of iNaturalist's own list\) or ids"):
        P.main(arguments(root))
    convert(root, "inat")
    assert f"val_id2name.json: {ENTITIES + 1} read, {ENTITIES} kept, 1 dropped\n  dropped 1: id repeated (first: " in (
        capsys.readouterr().out)
    run(root)
    assert [query.pool for query in pools(root)] == [by_hand(colour(j, 5))[0] for j in range(ENTITIES)]
    with pytest.raises(SystemExit, match=r"val_id2name\.json is there already"):
        convert(root, "inat")


@pytest.mark.parametrize("folder, layout", [("disk", "{id}.jpg"), ("any", "where/{id}.img.webp"), (".", "val/{id}.jpg")])
@pytest.mark.parametrize("collection", ["oven", "landmarks", "val"])
def test_query_images_in_other_folders(root, scorer, capsys, collection, folder, layout):  # noqa: F811
    """Any folders, any extension; of two files of an id the first counts."""
    names = {"oven": "oven_{:08d}", "landmarks": "{:x}bcdef0123456789", "val": "{}"}[collection]
    paths = [layout.format(id=names.format(j)) for j in range(ENTITIES)]
    for j, path in enumerate(paths):
        save(root / folder / path, colour(j, 5))
    save(root / folder / "z" / os.path.basename(paths[0]), colour(60))
    (root / folder / "notes.txt").write_text("")
    save(root / folder / os.fsdecode(b"caf\xe9.jpg"), colour(61))  # a name need not be UTF-8
    kind = {"oven": "infoseek", "landmarks": "landmarks", "val": "inaturalist"}[collection]
    rows = [evqa_row(j, names.format(j), kind) | {"data_id": str(j)} for j in range(ENTITIES)]
    write_csv(root / "test.csv", (*EVQA, "data_id"), rows)
    flags = ["--" + {"val": "inat"}.get(collection, collection), folder]
    if folder != "disk":
        with pytest.raises(SystemExit, match=rf"has neither {collection}_id2name\.json .*tools\.layouts .*ids --root"):
            P.main(arguments(root, *flags))
    convert(root, "ids", "--images", folder, "--collection", collection)
    printed = capsys.readouterr().out
    assert "dropped 1: id repeated (first: " in printed and ": not called as an image (first: " in printed
    run(root, *flags)
    assert [query.pool for query in pools(root)] == [by_hand(colour(j, 5))[0] for j in range(ENTITIES)]


@pytest.mark.parametrize("content", ["{cut", "[1]", '{"annotations": []}', '{"images": [1]}', '{"images": [{"id": 1}]}',
                                     '{"images": 3}'])
def test_another_file_in_place_of_inaturalists(tmp_path, content):
    with pytest.raises(SystemExit, match=r"val\.json \(or train\.json, or these in .*\) is missing"):
        convert(tmp_path, "inat")
    (tmp_path / "val.json").write_text(content)
    with pytest.raises(SystemExit, match="val.json is not iNaturalist"):
        convert(tmp_path, "inat")


# ------------------------------------------------------------------------------- images of the knowledge base

def test_omgms_tables(root, scorer, capsys):  # noqa: F811
    landmarks(root)
    run(root)
    want = [(query.pool, query.labels) for query in pools(root)]
    os.remove(root / "url_to_path_mapping.json")
    os.makedirs(root / "wiki_img/output")
    for part in (1, 2):
        rows = [{"title": f"Entity {j}", "image_URL": f"https://up.org/e{j}_{n}.jpg",
                 "img_path": f"full/{part}/{j}_{n}.jpg" if (j, n) != (2, 1) else ""}
                for j in range(ENTITIES) for n in range(2) if j % 2 == part - 1]
        rows += [{**rows[-1], "img_path": "other.jpg"}] * (part == 1)  # of equal urls the first counts
        write_csv(root / f"wiki_img/output/wiki_image_url_part_{part}_processed.csv",
                  ("title", "image_URL", "img_path", "caption"), rows)
    for j, n in itertools.product(range(ENTITIES), range(2)):
        save(root / f"wiki_img/full/{j % 2 + 1}/{j}_{n}.jpg", colour(j, 3 * n))
    with pytest.raises(SystemExit, match=r"wiki_img is missing; it must be a \.json of image url -> path\. OMGM's tables, "
                                         r".* python -m tools\.layouts omgm \(or names\) --root .*raw --images"):
        P.main(arguments(root, "--kb-images", "wiki_img"))
    for folder, out in (("wiki_img", "a.json"), ("wiki_img/output", "url_to_path_mapping.json")):
        convert(root, "omgm", "--images", folder, "--out", out)
        printed = capsys.readouterr().out
        assert f"{out}: {2 * ENTITIES + 1} read, {2 * ENTITIES - 1} kept, 2 dropped\n" in printed
        assert "dropped 1: url repeated (first: " in printed and (
            "dropped 1: no img_path (first: wiki_img/output/wiki_image_url_part_1_processed.csv:5: https://up" in printed)
    assert (root / "a.json").read_text() == (root / "url_to_path_mapping.json").read_text()
    assert run(root)["kb"]["images_dropped"] == {"image url not in url_to_path_mapping.json": 1}
    assert S.load_data(str(root.parent / "data"), "test").entity(3)["images"][1] == "wiki_img/full/2/3_1.jpg"
    assert [query.labels for query in pools(root)] == [labels for _, labels in want]


def test_files_named_as_their_urls(root, scorer, capsys):  # noqa: F811
    """Each url gets the file of its own name; one that only shares its stem gets it where no other does."""
    landmarks(root)
    run(root)
    want = [(query.pool, query.labels) for query in pools(root)]
    convert(root, "names", "--images", "kb", "--out", "names.json")
    run(root, "--kb-images", "names.json")
    assert [(query.pool, query.labels) for query in pools(root)] == want
    names = ["Dom.jpg", "Dom.JPG", "Dom.png", "Dom.webp", "Kirche.svg", "Caf%C3%A9.jpg", "gone.jpg"]
    kb = json.loads((root / "encyclopedic_kb_wiki.json").read_text())
    kb[url(0)]["image_urls"] = [f"https://up.org/{name}?x=1" for name in names] + ["https://up.org/Dom.jpg?x=1"]
    kb[url(1)]["image_urls"].append("https://up.org/\ud83d.jpg")
    (root / "encyclopedic_kb_wiki.json").write_text(json.dumps(kb))
    for n, name in enumerate(("a/Dom.jpg", "b/Dom.JPG", "a/Dom.png", "a/Kirche.png", "Caf\u00e9.jpg")):
        save(root / "kb" / name, colour(50 + n))
    capsys.readouterr()
    convert(root, "names", "--images", "kb", "--out", "b.json")
    printed = capsys.readouterr().out
    assert f"b.json: {2 * ENTITIES + 7} read, {2 * ENTITIES + 3} kept, 4 dropped" in printed
    assert "dropped 1: several files of that name" in printed and "dropped 2: no file of that name" in printed
    assert "dropped 1: url repeated" in printed
    manifest = run(root, "--kb-images", "b.json")
    assert S.load_data(str(root.parent / "data"), "test").entity(0)["images"] == [
        "kb/a/Dom.jpg", "kb/b/Dom.JPG", "kb/a/Dom.png", "kb/a/Kirche.png", "kb/Caf\u00e9.jpg"]
    assert manifest["kb"]["images_dropped"] == {"image url not in b.json": 3, "image repeated in its entry": 1}
    save(root / "kb/c/Dom.png", colour(60))  # which of the two?
    convert(root, "names", "--images", "kb", "--out", "c.json")
    assert "dropped 2: several files of that name (first: " in capsys.readouterr().out


@pytest.mark.parametrize("what, flags, message", [
    ("omgm", ["--images", "kb"], "kb holds no wiki_image_url_part"), ("omgm", ["--images", "no"], "no is missing; --images"),
    ("names", ["--images", "../kb"], "--images: '../kb' is not inside"),
    ("names", ["--images", "empty"], r"url_to_path_mapping\.json would be empty: 24 read, {'no file of that name': 24}"),
    ("omgm", ["--images", "out"], r"part_1_processed\.csv:2: '\.\./x.jpg' is not inside .*ln -s")])
def test_images_that_are_not_there(root, what, flags, message):  # noqa: F811
    os.remove(root / "url_to_path_mapping.json")
    (root / "empty").mkdir()
    (root / "out").mkdir()
    write_csv(root / "out/wiki_image_url_part_1_processed.csv", ("image_URL", "img_path"),
              [{"image_URL": "https://x", "img_path": "../../x.jpg"}])
    with pytest.raises(SystemExit, match=message):
        convert(root, what, *flags)
    assert not (root / "url_to_path_mapping.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["omgm"], "omgm needs --images, the folder"), (["ids", "--images", "x"], "ids needs --collection"), (["x"], "invalid")])
def test_bad_arguments(flags, message, capsys):
    with pytest.raises(SystemExit):
        layouts.parse_args([*flags, "--root", "x"])
    assert message in capsys.readouterr().err
