"""prepare.py's features on disk, its candidates from a run, and faults that a reading found.

    python -m pytest tests/test_prepare_faults.py
"""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import prepare as P
import scorer as S
import test_prepare as T
from test_prepare import base, world  # noqa: F401
from tools import layouts

csv.field_size_limit(2**31 - 1)


# ------------------------------------------------------------------------------------------- features on disk

@pytest.fixture
def embedded(monkeypatch):
    """Keys of all items that are embedded, in order."""
    keys, add = [], P.Features.add
    monkeypatch.setattr(P.Features, "add", lambda self, k, *rest: keys.extend(k.tolist()) or add(self, k, *rest))
    return keys


def test_other_dtype_embeds_again(world, embedded):
    """Features of one dtype never pass for another's, and are there again when it is asked for."""
    before = T.run(world)["files"]
    assert not embedded
    manifest = T.run(world, "--scorer-dtype", "bfloat16")
    assert len(embedded) == 60 + 90 + 29 and manifest["scorer"]["dtype"] == "bfloat16"  # 29 of 30 entities have a text
    assert manifest["files"]["kb_image.npy"] != before["kb_image.npy"]
    after = T.run(world)
    assert after["files"] == before and after["scorer"]["dtype"] == "float32" and len(embedded) == 179
    T.save_scorer(S.EvaClip.load(str(world / "tiny")).config, world / "tiny", 2)  # other weights under the same name
    T.run(world)
    assert len(embedded) == 2 * 179


def test_one_more_image_at_the_front_embeds_one(world, embedded):
    T.save(str(world / "raw"), "kb/new.jpg", (1, 2, 3))
    T.edit_json(world / "raw/url_to_path_mapping.json", lambda files: files.update({"https://img/new": "kb/new.jpg"}))
    path = world / "raw/encyclopedic_kb_wiki.json"
    kb = json.loads(path.read_text())
    S.write_json(str(path), {"https://new": {**kb[T.url(4)], "image_urls": ["https://img/new"]}, **kb})
    assert T.run(world)["kb"]["images"] == 61 and len(embedded) == 1  # entity 4 has no text
    os.utime(world / "raw/kb/new.jpg", ns=(1, 1))
    T.run(world, "--k", "5")
    assert len(embedded) == 2  # a changed file is read again


def test_killed_run_loses_one_piece(world, monkeypatch, embedded):
    monkeypatch.setattr(P, "PIECE", 25)
    shutil.rmtree(world / "data.work")
    whole = T.run(world)["files"]
    shutil.rmtree(world / "data.work")
    embedded.clear()
    add, done = P.Features.add, []

    def killed(self, keys, *rest):
        done.append(len(keys))
        if len(done) == 8:  # 3 splits in 2 pieces each and one of 3 pieces of the knowledge base are whole
            raise KeyboardInterrupt
        add(self, keys, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(P.Features, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            T.run(world)
    assert len(embedded) == 90 + 25
    embedded.clear()
    assert T.run(world)["files"] == whole and len(embedded) == 35 + 29


def test_two_processes_equal_one(world, monkeypatch):
    """As torchrun starts them: they share the work, know of each other by files alone, and the pools are the same."""
    code = "import sys, prepare; prepare.PIECE = 8; prepare.main(sys.argv[1:])"
    shutil.rmtree(world / "data.work")
    both = [subprocess.Popen([sys.executable, "-c", code, *T.arguments(world, "--out", str(world / "two"))], text=True,
                             env={**os.environ, "WORLD_SIZE": "2", "RANK": str(rank)}, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, cwd=os.path.dirname(P.__file__)) for rank in range(2)]
    done = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    assert "positive in pool" in done[0][0] and not done[1][0]  # printed once
    assert sorted(os.listdir(world / "two.work"))[-1] == "lock" or not list((world / "two.work").glob("kb-*"))
    monkeypatch.setattr(P, "PIECE", 8)
    one = T.run(world)
    assert json.loads((world / "two/manifest.json").read_text())["files"] == one["files"]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:60], lambda b: b[:-2], lambda b: bytes(len(b)),
                                    lambda b: b[:b.index(b"keys.npy") + 150] + b"?" + b[b.index(b"keys.npy") + 151:]],
                         ids=["empty", "head", "cut", "zeros", "a byte of its keys"])
def test_damaged_piece_is_made_again(world, monkeypatch, embedded, damage):
    monkeypatch.setattr(P, "PIECE", 25)
    shutil.rmtree(world / "data.work")
    first = T.run(world)["files"]
    path = sorted((world / "data.work").glob("image-*.npz"))[0]
    count = len(np.load(path)["keys"])
    path.write_bytes(damage(path.read_bytes()))
    embedded.clear()
    assert T.run(world)["files"] == first and len(embedded) == count
    content = bytearray(path.read_bytes())
    content[content.index(b"vectors.npy") + 200] ^= 1  # one bit of a feature: its checksum tells
    path.write_bytes(content)
    with pytest.raises(S.InputError, match=r"image-\w+\.npz is damaged .*; remove it and run again"):
        T.run(world)


def test_workers_open_and_preprocess(world):
    """Worker processes or none: the same bytes. Only the small pixels of a picture leave them."""
    flags = ("--batch-size", "4", "--out", str(world / "other"))
    files = [T.run(world, *flags, "--workers", workers, "--delete-features")["files"] for workers in ("0", "2")]
    assert files[0] == files[1] and not (world / "other.work").exists()
    Image.new("RGB", (4000, 3000)).save(world / "big.png")
    scorer = S.load_scorer(str(world / "tiny"))
    state, pixels = P.read_pictures(str(world), ["no", "big.png"], scorer.preprocess, [0, 1])
    assert state.tolist() == [1, 0] and pixels.shape == (1, 3, 28, 28)


def test_large_pictures_are_counted_and_bugs_are_not(world, monkeypatch):
    """A picture above MAX_PIXELS, or a sliver, has its own reason; a fault of ours while one is read is no unreadable picture."""
    Image.new("RGB", (300, 200)).save(world / "raw/kb/1_0.jpg")
    Image.new("RGB", (1, 201)).save(world / "raw/kb/2_0.jpg")
    monkeypatch.setattr(S, "MAX_PIXELS", 50_000)
    assert T.run(world)["kb"]["images_dropped"]["image of a bad size"] == 2
    for error in (MemoryError, TypeError, AttributeError):
        def broken(path, error=error):
            raise error("ours")
        monkeypatch.setattr(P, "read_image", broken)
        os.utime(world / "raw/kb/2_0.jpg", ns=(1, 1))
        with pytest.raises(error, match="ours"):
            P.main(T.arguments(world))


def test_disk_full(world, monkeypatch):
    monkeypatch.setattr(P, "write_features", lambda path, *_: (_ for _ in ()).throw(OSError(28, "No space left", path)))
    with pytest.raises(SystemExit, match=r"No space left.*kb_image\.npy.* in .*data\.work, so make room and run again"):
        P.main(T.arguments(world))


# ------------------------------------------------------------------------------------------- retrieval

def test_equal_query_images_are_searched_once(world, monkeypatch):
    rows = T.rows_of(world, "test")
    T.write_csv(str(world / "raw"), "test", rows + [{**row, "question": "And why?"} for row in rows])
    asked, search = [], P.nearest_entities
    monkeypatch.setattr(P, "nearest_entities", lambda kb, owner, full, *a: asked.append(len(full)) or search(
        kb, owner, full, *a))
    assert T.run(world, "--splits", "test")["splits"]["test"]["kept"] == 60 and asked == [30]
    data = S.load_data(str(world / "data"), "test")
    assert (data.pool[:30] == data.pool[30:]).all() and (data.full[:30] == data.full[30:]).all()


def test_positive_without_an_image_has_its_own_reason(world):
    """In the knowledge base it is: with an entry that lists no image, and with one whose image cannot be read."""
    rows = [row for row in T.rows_of(world, "train") if row["question_type"] != "2_hop"][:6]
    for n, positive in enumerate(("https://no.image", T.url(1), "https://nowhere")):
        rows[n]["wikipedia_url"] = positive
    T.write_csv(str(world / "raw"), "train", rows)
    (world / "raw/kb/1_0.jpg").unlink()
    train = T.run(world, "--splits", "train")["splits"]["train"]
    assert train["dropped"]["positive has no image"] == 2
    assert train["dropped"]["positive not in the knowledge base"] == 1


def test_candidates_of_a_run(world, embedded):
    """The run's order; the images that match best; only what is in a pool is embedded, and one more entity steps in for
    one without an image. Ids verbatim or percent-quoted."""
    odd = "https://en.wikipedia.org/wiki/Two words"
    path = world / "raw/encyclopedic_kb_wiki.json"
    S.write_json(str(path), {odd if key == T.url(7) else key: entry for key, entry in json.loads(path.read_text()).items()})
    (world / "raw/kb/5_0.jpg").unlink()
    ids = [odd, T.url(5), T.url(3), T.url(0), T.url(9), "https://nowhere"]
    run = [(f"E-VQA_test_{i}", ids, np.arange(6, 0, -1.)) for i in range(28)]
    run.append(("E-VQA_test_28", ids[:3], np.ones(3)))
    S.write_trec(str(world / "own.trec"), run, "other")
    shutil.rmtree(world / "data.work")
    embedded.clear()
    manifest = T.run(world, "--splits", "test", "--k", "4", "--retrieved", str(world / "own.trec"))
    T.assert_counts_add_up(manifest)
    assert manifest["kb"]["kept"] == 4 and manifest["kb"]["dropped"] == {
        "entry in no pool": 26, "no image of the entry can be read": 1}
    assert len(embedded) == 30 + 13 + 5  # query images, 4 + 4 + 4 + 1 images, texts
    assert manifest["splits"]["test"]["dropped"] == {"question_type '2_hop'": 1, "query not in the run": 1,
                                                     "too few candidates in the run": 1}
    data, scorer = S.load_data(str(world / "data"), "test"), S.load_scorer(str(world / "tiny"))
    names = [data.entity(j)["entity_id"] for j in range(4)]
    for i in range(len(data)):
        assert [names[j] for j in data.pool[i]] == [ids[0], ids[2], ids[3], ids[4]]
        cosines = S.normalise(data.kb_image) @ S.normalise(data.full[i])
        best = [cosines[data.kb_entity == j].max() for j in data.pool[i]]
        np.testing.assert_allclose(data.retrieval[i], best, atol=1e-6)
        np.testing.assert_allclose(cosines[data.pool_image[i]], best, atol=1e-6)
    assert manifest["splits"]["test"]["positive_in_kb"] == 26  # 28 but those of entities 5 (no image) and 7 (renamed)
    assert scorer.dim == data.full.shape[1] and data.labels.sum() == 3


def test_limit_cuts_the_knowledge_base(world):
    """The first entries and the positives of the rows that are read; a trial stops reading as soon as it has them."""
    rows = [row for row in T.rows_of(world, "test") if row["question_type"] != "2_hop"]
    T.write_csv(str(world / "raw"), "test", [rows[25], *rows])
    manifest = T.run(world, "--splits", "test", "--k", "2", "--limit", "1")
    T.assert_counts_add_up(manifest)
    assert manifest["kb"]["kept"] == 21 and manifest["kb"]["dropped"] == {"entry beyond --limit": 5}
    assert manifest["splits"]["test"]["with_positive"] == 1 and manifest["splits"]["test"]["rows_read"] == 1


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("flag, folder", [("--inat", "inat"), ("--landmarks", "landmarks")])
def test_query_images_outside_the_root(world, monkeypatch, flag, folder):
    shutil.move(world / "raw" / folder, world / "else")
    monkeypatch.setattr(P, "embed", lambda *a: pytest.fail("embedded first"))
    with pytest.raises(SystemExit, match=rf"{flag}: .* is not inside .*ln -s"):
        P.main(T.arguments(world, flag, str(world / "else") if folder == "inat" else "../else"))


@pytest.mark.parametrize("path", ["/etc/x.jpg", "kb/../../x.jpg", "..\\x.jpg"])
def test_candidate_images_outside_the_root(world, path):
    T.edit_json(world / "raw/url_to_path_mapping.json", lambda m: m.update({"https://img/1_0.jpg": path}))
    with pytest.raises(SystemExit, match=r"mapping\.json: 'https://img/1_0.jpg': .* is not inside"):
        P.main(T.arguments(world))


@pytest.mark.parametrize("name", ["%E4" * 100 + ".jpg", "a\0.jpg"])
def test_impossible_file_names_are_missing_images(world, name):
    T.edit_json(world / "raw/url_to_path_mapping.json", lambda m: m.update({"https://img/1_0.jpg": f"kb/{name}"}))
    assert T.run(world)["kb"]["images_dropped"]["image missing"] == 1


def test_any_image_that_is_there(world):
    T.edit_json(world / "raw/inat/val_id2name.json", lambda m: m.update({"7009": "val/other.jpg"}))
    os.rename(world / "raw/inat/val/700.jpg", world / "raw/inat/val/other.jpg")
    split = T.run(world, "--query-image", "any")["splits"]["test"]
    assert "image missing" not in split["dropped"]


def test_kb_image_name_not_utf8(world):
    path = os.fsdecode(b"kb/caf\xe9.jpg")
    os.rename(world / "raw/kb/1_0.jpg", world / "raw" / path)
    file = world / "raw/url_to_path_mapping.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "https://img/1_0.jpg": path}))
    T.run(world)
    assert S.load_data(str(world / "data"), "test").entity(1)["images"] == [path]


# ------------------------------------------------------------------------------------------- two processes

def test_second_process_on_a_folder_is_refused(world):
    T.run(world)
    with S.lock_folder(str(world / "data.work"), "--out"), pytest.raises(SystemExit, match="in use by another process .*another --out"):
        P.main(T.arguments(world))
    assert (world / "data/manifest.json").exists()  # the refused one has removed nothing
    T.run(world)  # free again


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
    P.main(T.arguments(world))
    printed = capsys.readouterr().out
    printed.encode()
    assert "https://img/?.jpg" in printed and "kb/?.jpg" in printed
    manifest = json.loads((world / "data/manifest.json").read_text(encoding="utf-8"))
    assert manifest["kb"]["dropped"] == {"entry has no image": 1, "no image of the entry can be read": 1}
    assert manifest["kb"]["first_dropped"]["entry has no image"] == "https://?"
    data = S.load_data(str(world / "data"), "test")
    assert data.entity(5)["title"] == f"{kb[T.url(5)]['title'][:-1]}?"
    (world / "data/kb.jsonl").read_text(encoding="utf-8")  # strict


def test_unreadable_image_with_a_name_that_is_no_utf8(world, capsys):
    path = os.fsdecode(b"kb/caf\xe9.jpg")
    (world / "raw" / path).write_bytes(b"no image")
    file = world / "raw/url_to_path_mapping.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "https://img/1_0.jpg": path}))
    P.main(T.arguments(world))
    assert "kb/caf?.jpg)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- links in image folders

@pytest.mark.parametrize("links, more", [
    ({"a/up": "..", "a/b/top": "../.."}, set()), ({"a/b/self": "."}, set()), ({"loop": "loop"}, {"loop"}),
    ({"one": "two", "two": "one"}, {"one", "two"}), ({"c/there": "../a", "a/to": "../c"}, {"c/there/b/7.jpg", "a/to/8.jpg"}),
    ({"other": "../disk"}, {"other/9.jpg"})], ids=str)
def test_links_are_followed_but_not_in_a_circle(tmp_path, links, more):
    """As whole disks are linked in. Of two folders that link to each other, each file is found by both ways."""
    for name in ("in/a/b/7.jpg", "in/c/8.jpg", "disk/9.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for link, target in links.items():
        os.symlink(target, tmp_path / "in" / link)
    found = [path.removeprefix("in/") for path in layouts.files_below(str(tmp_path), "in")]
    assert len(set(found)) == len(found) and {*found} - more == {"a/b/7.jpg", "c/8.jpg"}
    assert more - {*found} <= {"loop", "one", "two"}  # a link to itself is no folder; it may count as a file


# ------------------------------------------------------------------------------------------- other files

def test_captions_that_are_no_text(world):
    T.edit_json(world / "raw/encyclopedic_kb_wiki.json",
                lambda kb: next(iter(kb.values())).update(image_reference_descriptions=[None, 3]))
    with pytest.raises(S.InputError, match="'image_reference_descriptions' holds something that is no text"):
        T.run(world, "--text", "caption")


def test_another_file_in_place_of_id2name(world):
    path = world / "raw/inat/val_id2name.json"
    path.write_text('{"700": {"a": "b"}}')
    with pytest.raises(S.InputError, match="id2name.json: '700' has a dict, expected the path of its image"):
        T.run(world)
