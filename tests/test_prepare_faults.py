"""Faults of prepare.py that a reading found: each test failed before its mend."""

import csv
import gzip
import importlib.machinery
import json
import os
import shutil
import sys
import types

import faiss
import numpy as np
import pytest
from PIL import Image

import prepare as P
import scorer as S
import test_prepare as T
from test_benchmarks import pickled
from test_prepare import base, world  # noqa: F401

csv.field_size_limit(2**31 - 1)


def test_other_dtype_embeds_again(world):
    before = np.load(world / "data/kb_image.npy").copy()
    T.run(world, "--scorer-dtype", "bfloat16")
    assert not np.array_equal(before, np.load(world / "data/kb_image.npy"))


@pytest.mark.parametrize("flag, folder", [("--inat", "inat"), ("--landmarks", "landmarks")])
def test_query_images_outside_the_root(world, monkeypatch, flag, folder):
    shutil.move(world / "raw" / folder, world / "else")
    monkeypatch.setattr(P, "embed", lambda *a: pytest.fail("embedded first"))
    with pytest.raises(ValueError, match=r"\.csv:\d+: its image .* is not inside .*ln -s"):
        T.run(world, flag, str(world / "else") if folder == "inat" else "../else")


def test_no_index_of_other_rows(world):
    manifest = T.run(world, "--candidate-image", "mean")
    assert "index.faiss" not in manifest["files"] and not os.path.exists(world / "data/index.faiss")


@pytest.mark.parametrize("name", ["%E4" * 100 + ".jpg", "a\0.jpg"])
def test_impossible_file_names_are_missing_images(world, name):
    T.edit_json(world / "raw/url_to_path_mapping.json", lambda m: m.update({"https://img/1_0.jpg": f"kb/{name}"}))
    assert T.run(world)["kb"]["images_dropped"]["image missing"] == 1


def test_image_size_of_a_turned_tiff(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "t.tif", exif=exif)
    assert S.image_size(tmp_path / "t.tif") == S.read_image(str(tmp_path / "t.tif")).size


def echo(world, kind=faiss.IndexFlatIP):
    data = S.load_data(str(world / "data"), "test")
    keys = list(json.loads((world / "raw/encyclopedic_kb_wiki.json").read_text()))
    index = kind(16)
    index.add(S.normalise(data.kb_image[:]))
    os.makedirs(world / "echo", exist_ok=True)
    faiss.write_index(index, str(world / "echo/kb_index.faiss"))
    ids = [keys.index(data.entity(int(j))["entity_id"]) for j in data.kb_entity]
    (world / "echo/kb_index_ids.pkl").write_bytes(pickled(ids))
    return "--echosight", str(world / "echo")


def test_echosight_says_why_as_our_own_index(world):
    flags = echo(world)
    rows = [row for row in T.rows_of(world, "train") if row["question_type"] != "2_hop"][:4]
    rows[1]["wikipedia_url"], rows[2]["wikipedia_url"] = T.url(25), "https://nowhere"
    T.write_csv(str(world / "raw"), "train", rows)
    T.write_csv(str(world / "raw"), "val", rows[:0])
    own, theirs = (T.run(world, "--k", "2", "--splits", "train", *more)["splits"]["train"] for more in ((), flags))
    assert theirs["dropped"] == own["dropped"] and theirs["positive_in_kb"] == own["positive_in_kb"]


def test_cuda_of_several_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    args = P.parse_args(["--device", "cuda"])
    assert P.device_of(args, P.Workers(3, 8)) == "cuda:3" and P.device_of(args, P.Workers()) == "cuda"


def test_cut_gz_and_last_empty_line(tmp_path):
    content = gzip.compress(b"".join(json.dumps({"a": os.urandom(20).hex()}).encode() + b"\n" for _ in range(999)))
    (tmp_path / "x.jsonl.gz").write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz.*copied to its end"):
        list(P.read_jsonl(str(tmp_path / "x.jsonl.gz"), ("a",)))
    (tmp_path / "y.jsonl").write_text('{"a": "1"}\n\n')
    assert len(list(P.read_jsonl(str(tmp_path / "y.jsonl"), ("a",)))) == 1


def test_any_image_that_is_there(world):
    T.edit_json(world / "raw/inat/val_id2name.json", lambda m: m.update({"7009": "val/other.jpg"}))
    os.rename(world / "raw/inat/val/700.jpg", world / "raw/inat/val/other.jpg")
    split = T.run(world, "--query-image", "any")["splits"]["test"]
    assert "image missing" not in split["dropped"]


def test_echosight_index_of_distances_or_damaged(world):
    flags = echo(world, faiss.IndexFlatL2)
    with pytest.raises(ValueError, match="no index of inner products"):
        T.run(world, "--splits", "test", *flags)
    (world / "echo/kb_index.faiss").write_bytes(b"junk" * 99)
    with pytest.raises(ValueError, match=r"kb_index\.faiss: faiss cannot read it"):
        T.run(world, "--splits", "test", *flags)


def test_places_count_images_of_no_entity():
    index = P.build_index(np.eye(8, 16, dtype=np.float16))
    query = np.array([[8, 7, 6, 5, 4, 3, 2, 1] + [0] * 8], np.float32)
    assert P.retrieve(index, np.array([-1, -1, 0, 1, 2, 3, 4, 5]), query, 2)[3].tolist() == [[2, 3]]


def test_shared_image_ties():
    other = np.random.default_rng(0).normal(size=(100, 16))
    features = np.concatenate([other, np.ones((300, 16))]).astype(np.float16)
    owner, query = np.arange(400, dtype=np.int32), np.ones((3, 16), np.float32)
    for index in (P.build_index(features), P.BlockSearch(features, "cpu", 64)):
        assert P.retrieve(index, owner, query, 20)[1].tolist() == [list(range(100, 120))] * 3


def test_kb_image_name_not_utf8(world):
    path = os.fsdecode(b"kb/caf\xe9.jpg")
    os.rename(world / "raw/kb/1_0.jpg", world / "raw" / path)
    file = world / "raw/url_to_path_mapping.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "https://img/1_0.jpg": path}))
    T.run(world)
    assert S.load_data(str(world / "data"), "test").entity(1)["images"] == [path]


@pytest.mark.parametrize("alone, threads", [(False, 4), (True, 16)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, alone, threads):
    monkeypatch.setattr(P.torch.distributed, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(P.os, "cpu_count", lambda: 16)
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("RANK", "1"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        P.join_workers(alone)
        assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)


# ------------------------------------------------------------------------------------------- AToMiC's dry run

class Parquet:
    """pyarrow.parquet.ParquetFile: every image of the knowledge base, and one that it does not list."""
    columns = []

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.rows = json.load(file)

    def iter_batches(self, batch_size, columns):
        Parquet.columns.append(columns)
        cells = [types.SimpleNamespace(as_py=lambda b=bytes.fromhex(content): b) for _, content in self.rows]
        urls = types.SimpleNamespace(to_pylist=lambda: [url for url, _ in self.rows])
        yield types.SimpleNamespace(column={"image_url": urls, "image": cells}.get)


def tree(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_dry_run_unpacks_no_images(world, monkeypatch, capsys):
    """The count is that of the real run, from the column of urls alone, and no file or folder changes."""
    mapping = json.loads((world / "raw/url_to_path_mapping.json").read_text())
    (world / "raw/atomic").mkdir()
    S.write_json(world / "raw/atomic/p.parquet", [*((url, (world / "raw" / path).read_bytes().hex())
                                                    for url, path in mapping.items()), ("https://other", "00")])
    package, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    package.__spec__, parquet.ParquetFile = importlib.machinery.ModuleSpec("pyarrow", None), Parquet
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    monkeypatch.setattr(Parquet, "columns", [])
    before = tree(world)
    P.main(T.arguments(world, "--kb-images", "atomic", "--dry-run"))
    assert tree(world) == before and Parquet.columns == [["image_url"]]
    # 10 of the 30 entities have 4 images, 20 have one; and 30 query images a split.
    assert "To embed: 150 images and 30 texts" in capsys.readouterr().out
    assert T.run(world, "--kb-images", "atomic")["kb"]["images"] == 10 * 4 + 20
    assert Parquet.columns[1:] == [["image_url", "image"]]
    unpacked = tree(world)
    P.main(T.arguments(world, "--kb-images", "atomic", "--dry-run"))
    assert "To embed: 150 images and 30 texts" in capsys.readouterr().out
    assert tree(world) == unpacked and len(Parquet.columns) == 2  # read from what the real run left


# ------------------------------------------------------------------------------------------- two processes

def test_second_process_on_a_folder_is_refused(world):
    T.run(world)
    with S.hold(str(world / "data.work"), "--out"), pytest.raises(SystemExit, match="in use by process .*another --out"):
        P.main(T.arguments(world))
    assert (world / "data/manifest.json").exists()  # the refused one has removed nothing
    T.run(world)  # free again


# ------------------------------------------------------------------------------------------- damaged shards

@pytest.mark.parametrize("suffix, damage", [
    ("json", lambda b: b""), ("json", lambda b: b[:-9]), ("json", lambda b: bytes(len(b))), ("json", lambda b: b"[]"),
    ("json", lambda b: json.dumps({"key": json.loads(b)["key"]}).encode()), ("npy", lambda b: b""),
    ("npy", lambda b: b[:60]), ("npy", lambda b: b[:-2]), ("npy", None)], ids=["empty", "cut", "zeros", "list", "half", "empty array", "header", "cut array", "gone"])
def test_damaged_shard_is_made_again(world, monkeypatch, suffix, damage):
    """Of 60 images in shards of 25 the second is damaged: 25 images are embedded again, and the result is the same."""
    flags = ("--shard-size", "25")
    first, path = T.run(world, *flags)["files"], world / f"data.work/kb_image-000001.{suffix}"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    made, write = [], P.Shards.write
    monkeypatch.setattr(P.Shards, "write", lambda self, number, *a: made.append((self.name, number))
                        or write(self, number, *a))
    assert T.run(world, *flags)["files"] == first and made == [("kb_image", 1)]


def test_shard_of_other_rows_is_made_again(world, monkeypatch):
    """Its key says that it is right, but it holds a row too many, or numbers of another kind."""
    path, made, write = world / "data.work/kb-000000.npy", [], P.Shards.write
    monkeypatch.setattr(P.Shards, "write", lambda self, number, *a: made.append(self.name) or write(self, number, *a))
    right = np.load(path)
    for wrong in (np.concatenate([right, right[:1]]), right.astype(np.float32)):
        np.save(path, wrong)
        made.clear()
        T.run(world)
        assert made == ["kb"] and np.array_equal(np.load(path), right)


# ------------------------------------------------------------------------------------------- halves of surrogate pairs

HALF = "\ud83d"  # as json.loads reads "\ud83d" where a text was cut inside an emoji


def test_half_a_surrogate_pair_anywhere_in_the_knowledge_base(world, capsys):
    def change(kb):
        entries = list(kb.values())
        entries[5]["title"] += HALF
        entries[6]["section_texts"][0] = HALF + entries[6]["section_texts"][0]
        entries[7]["image_urls"].append(f"https://img/{HALF}.jpg")  # the only one that is not in the mapping
        kb[f"https://{HALF}"] = {"title": HALF, "section_texts": [HALF], "image_urls": []}
        del kb["https://no.image"]
        kb[f"https://{HALF}2"] = {"title": "Two", "section_texts": [HALF], "image_urls": ["https://img/half"]}
        entries[0]["image_urls"].remove("https://img/nowhere.jpg")
    path = world / "raw/encyclopedic_kb_wiki.json"
    kb = json.loads(path.read_text(encoding="utf-8"))
    change(kb)
    path.write_text(json.dumps(kb))  # escaped, as the files are that hold such texts
    mapping = json.loads((world / "raw/url_to_path_mapping.json").read_text())
    mapping["https://img/half"] = f"kb/{HALF}.jpg"  # no file can be called so
    (world / "raw/url_to_path_mapping.json").write_text(json.dumps(mapping))
    P.main(T.arguments(world, "--visualize", "2"))
    printed = capsys.readouterr().out
    printed.encode()
    assert "https://img/?.jpg" in printed and "kb/?.jpg is missing" in printed
    manifest = json.loads((world / "data/manifest.json").read_text(encoding="utf-8"))
    assert manifest["kb"]["dropped"] == {"entry has no image": 1, P.NO_IMAGE: 1}
    assert manifest["kb"]["first_dropped"]["entry has no image"] == "https://?"
    data = S.load_data(str(world / "data"), "test")
    assert data.entity(5)["title"] == f"{kb[T.url(5)]['title'][:-1]}?"
    (world / "data/kb.jsonl").read_text(encoding="utf-8")  # strict


def test_half_a_surrogate_pair_in_infoseeks_rows(world):
    """The question, the title (which becomes a url) and an id; the url that is found by title is a positive."""
    raw = world / "raw"
    path = raw / "encyclopedic_kb_wiki.json"
    kb = json.loads(path.read_text(encoding="utf-8"))
    kb = {f"https://w/{HALF}" if key == T.url(3) else key: entry for key, entry in kb.items()}
    kb[f"https://w/{HALF}"]["title"] = f"Cut {HALF}"
    path.write_text(json.dumps(kb))
    T.save(str(raw), "oven_images/oven_1.jpg", T.colour(3))
    lines = {"infoseek_val.jsonl": {"data_id": f"d{HALF}", "image_id": "oven_1", "question": f"What {HALF}?"},
             "infoseek_val_withkb.jsonl": {"data_id": f"d{HALF}", "entity_id": "Q1", "entity_text": f"Cut {HALF}"}}
    for name, line in lines.items():
        (raw / name).write_text(json.dumps(line) + "\n")
    T.run(world, "--dataset", "infoseek", "--kb", path.name, "--splits", "test", "--k", "5")
    query = S.load_data(str(world / "data"), "test").queries[0]
    assert (query.query_id, query.question, query.positives) == ("d?", "What ??", ["https://w/?"])
    assert query.labels[0] == 1  # its own colour: the first candidate


def test_unreadable_image_with_a_name_that_is_no_utf8(world, capsys):
    path = os.fsdecode(b"kb/caf\xe9.jpg")
    (world / "raw" / path).write_bytes(b"no image")
    file = world / "raw/url_to_path_mapping.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "https://img/1_0.jpg": path}))
    P.main(T.arguments(world))
    assert "kb/caf?.jpg cannot be read" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- links in image folders

@pytest.mark.parametrize("links", [{"a/up": "..", "a/b/top": "../.."}, {"a/b/self": "."}, {"loop": "loop"},
                                   {"c/there": "../a", "a/to": "../c"}, {"one": "two", "two": "one"}], ids=str)
def test_links_that_lead_in_a_circle(tmp_path, links):
    for name in ("a/b/7.jpg", "c/8.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    for link, target in links.items():
        os.symlink(target, tmp_path / "in" / link)
    assert P.find_files(str(tmp_path), "in", {"7"}) == {"7": "in/a/b/7.jpg"}
    found = [os.path.relpath(entry.path, tmp_path / "in") for entry in P.files_below(str(tmp_path / "in"))]
    assert len(set(found)) == len(found) and {"a/b/7.jpg", "c/8.jpg"} <= {*found}
    # Two folders that link to each other: each file by both ways. A link to nowhere or to itself is no folder.
    assert {*found} - {"a/b/7.jpg", "c/8.jpg"} <= {"c/there/b/7.jpg", "a/to/8.jpg", *links}


def test_links_to_folders_are_followed(tmp_path):
    """As disks are linked in; one folder by two names is found by both, and the first by path is taken."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/7.jpg").write_bytes(b"")
    (tmp_path / "in").mkdir()
    for name in ("b", "a"):
        os.symlink(tmp_path / "disk", tmp_path / "in" / name)
    assert P.find_files(str(tmp_path), "in", {"7"}) == {"7": "in/a/7.jpg"}
    assert sorted(entry.path for entry in P.files_below(str(tmp_path / "in"))) == [
        str(tmp_path / "in" / name / "7.jpg") for name in "ab"]


def test_images_of_the_knowledge_base_behind_a_link(world):
    """--kb-images names a folder of which a part lies on another disk; a link back to the top is no trap."""
    mapping = json.loads((world / "raw/url_to_path_mapping.json").read_text())
    first = next(iter(mapping))  # https://img/0_0.jpg: kb/0_0.jpg
    os.makedirs(world / "disk")
    shutil.move(world / "raw" / mapping[first], world / "disk")
    os.symlink(world / "disk", world / "raw/kb/disk")
    os.symlink("..", world / "raw/kb/up")
    manifest = T.run(world, "--kb-images", "kb")
    assert manifest["kb"]["images"] == len(mapping)
    assert S.load_data(str(world / "data"), "test").entity(0)["images"][0] == "kb/disk/0_0.jpg"


# ------------------------------------------------------------------------------------------- to look at

def test_slivers_are_drawn(world):
    """1 x 5000 in a cell of 128: .0256 pixels wide, drawn as one."""
    data = S.load_data(str(world / "data"), "val")
    Image.new("RGB", (1, 5000), "red").save(data.image_path(0), "PNG")
    Image.new("RGB", (5000, 1), "red").save(data.candidate_image_path(data.queries[0].pool_image[0]), "PNG")
    sheet = S.read_image(P.draw_pools(str(world / "data"), 1))
    assert sheet.getpixel((4, 20)) == sheet.getpixel((4, 147)) == (255, 0, 0) != sheet.getpixel((5, 20))
    assert [P.fitted(Image.new("RGB", size), 128).size for size in ((300, 200), (10, 20), (5000, 1))] == [
        (128, 85), (64, 128), (128, 1)]  # 200 * 128 / 300 = 85.3


def test_captions_that_are_no_text(world):
    T.edit_json(world / "raw/encyclopedic_kb_wiki.json",
                lambda kb: next(iter(kb.values())).update(image_reference_descriptions=[None, 3]))
    with pytest.raises(ValueError, match="'image_reference_descriptions' holds something that is no text"):
        T.run(world, "--text", "caption")


@pytest.mark.parametrize("content", ["{cut", "[1]", '{"annotations": []}', '{"images": [1]}', '{"images": [{"id": 1}]}',
                                     '{"images": [{"id": 1, "file_name": 7}]}', '{"images": 3}'])
def test_another_file_in_place_of_inaturalists(tmp_path, content):
    (tmp_path / "val.json").write_text(content)
    with pytest.raises(ValueError, match="val.json is not iNaturalist"):
        P.inat_names(str(tmp_path / "val.json"), "inat", {"1"})


def test_another_file_in_place_of_id2name(world):
    path = next((world / "raw/inat").glob("*_id2name.json"))
    path.write_text('{"1": {"a": "b"}}')
    with pytest.raises(ValueError, match="id2name.json: '1' has a dict, expected the path of its image"):
        T.run(world)


def test_a_split_named_twice_counts_once(world):
    """Its drops were counted for both, and kept + dropped was more than was read."""
    assert P.parse_args(["--splits", "test,val,test"]).splits == ["test", "val"]
