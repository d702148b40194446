"""Faults of prepare.py that a reading found: each test failed before its mend."""

import csv
import gzip
import json
import os
import shutil

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


def test_rank_0_searches_with_all_cores(monkeypatch):
    monkeypatch.setattr(P.torch.distributed, "init_process_group", lambda *a, **k: None)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        P.join_workers()
        assert faiss.omp_get_max_threads() == os.cpu_count()
    finally:
        faiss.omp_set_num_threads(before)
