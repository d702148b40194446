"""Candidates and pictures from other programs: tools/runs.py, mine.py, echosight.py and atomic.py, and what prepare.py
makes of them.

    python -m pytest tests/test_candidates.py
"""

import itertools
import json
import os
import struct
import sys
import types
from collections import namedtuple

import faiss
import numpy as np
import pytest

import prepare as P
import scorer as S
from test_benchmarks import ENTITIES, ColourScorer, colour, save
from tools import atomic, echosight, mine, runs

# ------------------------------------------------------------------------------------ EchoSight's and OMGM's files

RANKED = {"E-VQA_0": ["https://w/a b", "https://w/c"], "infoseek_val_1": ["https://w/\u00e9"]}


def result_file(folder, form):
    """RANKED in one of their forms."""
    content = {
        "omgm": lambda urls: {"retrieved_entities": [{"url": url, "title": "t"} for url in urls], "sec_sim": [1]},
        "retrieved": lambda urls: {"retrieved_entries": urls, "retrieval_similarities": [.5] * len(urls)},
        # Re-ranked entries stand beside what was retrieved, and with one entity a section they can repeat.
        "reranked": lambda urls: {"retrieved_entries": urls[::-1], "reranked_entries": [urls[0], *urls]}}[form]
    path = folder / f"{form}.json"
    path.write_text("\ufeff" * (form == "omgm")  # a byte-order mark, as an editor leaves it
                    + json.dumps({query: content(urls) for query, urls in RANKED.items()}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form, flags, want", [
    ("omgm", [], RANKED), ("retrieved", [], RANKED), ("reranked", [], RANKED),
    ("reranked", ["--stage", "retrieved"], {query: urls[::-1] for query, urls in RANKED.items()}),
    ("omgm", ["--split", "test"], {"E-VQA_test_0": RANKED["E-VQA_0"], "infoseek_val_1": RANKED["infoseek_val_1"]})])
def test_result_files_become_runs(tmp_path, capsys, form, flags, want):
    out = str(tmp_path / "out.trec")
    runs.main([result_file(tmp_path, form), "--out", out, *flags])
    assert S.read_trec(out) == {query: [S.trec_id(url) for url in urls] for query, urls in want.items()}
    assert "2 queries, 3 entities" in capsys.readouterr().out


@pytest.mark.parametrize("content, complaint", [
    (b'{"q0": ', "not whole JSON"), (b'{"q0": "\xff"}', "not whole JSON in UTF-8"), (b"[1, 2]", "found a list"),
    (b"{}", "object of query"), (b'{"q0": {"top_20": []}}', "'q0' has none of reranked_entries"),
    (b'{"q0": [1]}', "'q0' has none of"), (b'{"q0": {"retrieved_entities": [{"title": "x"}]}}', "'q0': its entities"),
    (b'{"q0": {"retrieved_entities": 3}}', "'q0': its entities"), (b'{"q0": {"reranked_entries": []}}', "'q0': its"),
    (b'{"q0": {"retrieved_entries": [["u"]]}}', "'q0': its"), (b'{"q0": {"retrieved_entries": []}}', "none of its 1"),
    (None, "No such file")])
def test_result_files_that_are_none(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "their.json").write_bytes(content)
    with pytest.raises(SystemExit, match=complaint) as error:
        runs.main([str(tmp_path / "their.json"), "--out", str(tmp_path / "out.trec")])
    assert "their.json" in str(error.value) and not (tmp_path / "out.trec").exists()


# ------------------------------------------------------------------------------------------------------ mined negatives

def knowledge_base(folder, kb, owner, queries, positives):
    """As much of a data folder as mine.py reads; entities are called e0, e1 ...; K = 2 with made-up pools."""
    names, q, pool = [f"e{j}" for j in range(owner[-1] + 1)], len(queries), np.zeros((len(queries), 2), np.int32)
    pool[:, 1] = 1
    (folder / "kb.jsonl").write_text("".join(json.dumps({"entity_id": name, "title": name}) + "\n" for name in names))
    for name, array in (("kb_image", kb), ("kb_entity", owner), ("kb_text", np.zeros((len(names), kb.shape[1]), "f2"))):
        S.write_array(str(folder / f"{name}.npy"), array)
    S.write_split(str(folder), "train", [S.Query(f"q{i}", "x.png", "?", [f"e{j}"]) for i, j in enumerate(positives)],
                  pool=pool, pool_image=np.searchsorted(owner, pool), labels=pool == 0, retrieval=np.zeros((q, 2)),
                  full=queries)
    S.write_json(folder / "manifest.json", {"version": 2, "scorer": {}, "K": 2, "dim": kb.shape[1], "root": "..",
                                            "splits": {"train": {}}, "files": {}})


@pytest.fixture
def world(tmp_path):
    """90 entities of 1 to 8 images in 5 dimensions; ten entities share an image; one positive is unknown."""
    rng = np.random.default_rng(2)
    owner = np.sort(np.r_[np.arange(90), rng.integers(0, 90, 310)]).astype(np.int32)
    kb = rng.normal(size=(400, 5)).astype(np.float16)
    kb[rng.permutation(400)[:10]] = kb[0]
    queries, positives = rng.normal(size=(20, 5)).astype(np.float16), rng.integers(0, 90, 20)
    positives[7] = 1000
    knowledge_base(tmp_path, kb, owner, queries, positives)
    return types.SimpleNamespace(folder=str(tmp_path), kb=kb, owner=owner, queries=queries, positives=positives)


def mine_by_hand(world, i, tolerance, k=5):
    """Pool of query i, best first, by a loop over all entities; None where it has none."""
    query = S.normalise(world.queries[i])
    best = np.array([(S.normalise(world.kb[world.owner == j]) @ query).max() for j in range(90)])
    positive = world.positives[i]
    if positive >= 90:
        return None
    gaps = np.abs(best - best[positive])
    gaps[positive] = -1  # first of all
    order = np.argsort(gaps.round(6), kind="stable")[:k]
    return None if gaps[order[-1]] > tolerance else [f"e{j}" for j in sorted(order, key=lambda j: -best[j])]


@pytest.mark.parametrize("tolerance", [.05, .01])
def test_mined_pools_by_hand(world, capsys, tolerance):
    out = os.path.join(world.folder, "train.trec")
    mine.main(["--data", world.folder, "--out", out, "--similarity-tolerance", str(tolerance), "--device", "cpu"])
    want = {f"q{i}": mine_by_hand(world, i, tolerance) for i in range(20)}
    kept = {query: pool for query, pool in want.items() if pool}
    assert S.read_trec(out) == kept and 0 < len(kept) < 20
    assert f"{len(kept)} pools, 1 positive not in the knowledge base" in capsys.readouterr().out


def test_mining_does_not_depend_on_blocks(world):
    data = S.load_data(world.folder, "train")
    rows = np.flatnonzero(world.positives < 90)
    whole = mine.mine(data, data.full[rows], world.positives[rows], 5)
    for block, at_once in ((33, 7), (1, 1)):
        parts = mine.mine(data, data.full[rows], world.positives[rows], 5, block=block, at_once=at_once)
        assert (parts[0] == whole[0]).all()
        np.testing.assert_allclose(parts[1], whole[1], atol=1e-6)


@pytest.mark.parametrize("flags, complaint", [
    (["--similarity-tolerance", "1e-9"], r"no query of train has a pool: .*too few negatives.*: 19"),
    (["--k", "91"], "no query of train has a pool"), (["--split", "val"], "no split 'val'"),
    (["--data", "nowhere"], r"nowhere/manifest\.json is missing")])
def test_mining_that_finds_nothing(world, flags, complaint):
    out = os.path.join(world.folder, "train.trec")
    with pytest.raises(SystemExit, match=complaint):
        mine.main(["--data", world.folder, "--out", out, "--device", "cpu", *flags])
    assert not os.path.exists(out)


# ----------------------------------------------------------------------------------------------------- AToMiC's parquet

class FakeParquet:
    """As much of pyarrow.parquet.ParquetFile as is used; a file holds JSON."""
    opened = 0

    def __init__(self, path):
        FakeParquet.opened += 1
        with open(path, encoding="utf-8") as file:
            self.rows = json.load(file)  # a JSONDecodeError is a ValueError, as pyarrow's ArrowInvalid

    def iter_batches(self, batch_size, columns):
        assert columns == ["image_url", "image"]
        Cell, Column = namedtuple("Cell", "as_py"), type("Column", (list,), {"to_pylist": list.copy})
        for start in range(0, len(self.rows), 5):
            rows = self.rows[start:start + 5]
            columns = {"image_url": Column(row["url"] for row in rows),
                       "image": [Cell(lambda row=row: row["image"] and {"bytes": row["image"].encode(), "path": None})
                                 for row in rows]}
            yield types.SimpleNamespace(column=columns.get)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A root with a knowledge base of 12 images, 11 of which two parts of AToMiC hold; arguments of atomic.main."""
    package, module = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    module.ParquetFile, FakeParquet.opened = FakeParquet, 0
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    urls = [f"https://up.org/caf\u00e9_{n}.jpg" for n in range(12)]
    kb = {f"e{j}": {"image_urls": urls[4 * j:4 * j + 4]} for j in range(3)}
    S.write_json(tmp_path / "encyclopedic_kb_wiki.json", kb)
    (tmp_path / "atomic").mkdir()
    for part in range(2):
        rows = [{"url": url, "image": f"picture {url}"} for n, url in enumerate(urls) if n % 2 == part and n != 4]
        others = [{"url": url, "image": image} for url, image in ((urls[4], None), ("https://x", "no"), (None, "no"))]
        (tmp_path / f"atomic/part-{part}.parquet").write_text(json.dumps([*rows, *others]))
    return types.SimpleNamespace(root=tmp_path, urls=urls, flags=["--root", str(tmp_path), "--atomic",
                                                                  str(tmp_path / "atomic")])


def test_atomic_is_unpacked_once(parquet, capsys):
    atomic.main(parquet.flags)
    mapping = S.read_json(parquet.root / "url_to_path_mapping.json", "")
    assert sorted(mapping) == sorted(set(parquet.urls) - {parquet.urls[4]}) and "11 images" in capsys.readouterr().out
    for url, path in mapping.items():
        assert (parquet.root / path).read_text() == f"picture {url}" and path.startswith("atomic_images/")
    assert sum(name.endswith(".jpg") for _, _, names in os.walk(parquet.root / "atomic_images") for name in names) == 11
    with pytest.raises(SystemExit, match=r"mapping\.json is there already: remove it, or write .* with --out"):
        atomic.main(parquet.flags)
    os.remove(parquet.root / "atomic_images/part-1.parquet.json")  # as after a kill: one part is left
    atomic.main([*parquet.flags, "--out", "other.json"])
    assert FakeParquet.opened == 3 and S.read_json(parquet.root / "other.json", "") == mapping


@pytest.mark.parametrize("change, complaint", [
    (lambda at: sys.modules.update(pyarrow=None), "pip install pyarrow"),
    (lambda at: os.remove(at / "encyclopedic_kb_wiki.json"), "encyclopedic_kb_wiki.json is missing; name .* --kb"),
    (lambda at: (at / "encyclopedic_kb_wiki.json").write_text('{"u": {"title": "x"}}'), "entry 'u' has no list image"),
    (lambda at: (at / "atomic/part-1.parquet").write_text("[cut"), "part-1.parquet: no whole parquet file"),
    (lambda at: [os.remove(at / f"atomic/part-{n}.parquet") for n in range(2)], "atomic holds no .parquet")])
def test_atomic_refuses(parquet, change, complaint):
    change(parquet.root)
    with pytest.raises(SystemExit, match=complaint):
        atomic.main(parquet.flags)
    assert not (parquet.root / "url_to_path_mapping.json").exists()


# -------------------------------------------------------------------------------------------------- EchoSight's index

WIKI = "https://en.wikipedia.org/wiki/"


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A root with 12 entities of 2 images and a landmark question for each, in E-VQA's files; and the scorer."""
    scorer, root = ColourScorer(), tmp_path / "raw"
    for module in (P, echosight, mine):
        monkeypatch.setattr(module, "load_scorer", lambda *_: scorer)
    kb, files = {}, {}
    for j in range(ENTITIES):
        urls = [f"https://up.org/e{j}_{n}.jpg" for n in range(2)]
        kb[f"{WIKI}E {j}"] = {"title": f"Entity {j}", "section_texts": ["Lead."], "image_urls": urls}
        for n, url in enumerate(urls):
            files[url] = f"kb/e{j}_{n}.jpg"
            save(root / files[url], colour(j, 3 * n))
        save(root / f"landmarks/{j}.jpg", colour(j, 5))
    S.write_json(root / "encyclopedic_kb_wiki.json", kb)
    S.write_json(root / "url_to_path_mapping.json", files)
    for split in ("train", "test"):
        rows = [f"How old is it?,automatic,landmarks,{j},{WIKI}E {(j + 5 * (split == 'train')) % 15}\n"
                for j in range(ENTITIES)]
        header = "question,question_type,dataset_name,dataset_image_ids,wikipedia_url\n"
        (root / f"{split}.csv").write_text(header + "".join(rows))
    return types.SimpleNamespace(root=root, scorer=scorer, index=str(tmp_path / "echo"), data=str(tmp_path / "data"),
                                 run=str(tmp_path / "out.trec"))


def pickled(values):
    """A list as Python's pickle writes it by protocol 2, texts with their memo."""
    out = b"\x80\x02]q\x00("
    for n, value in enumerate(values):
        if isinstance(value, int):
            out += b"J" + struct.pack("<i", value)
        else:
            out += b"X" + struct.pack("<I", len(value)) + value.encode() + b"r" + struct.pack("<I", n + 1)
    return out + b"e."


def write_index(raw, shift=0, skip=()):
    """kb_index.faiss and its ids over all images of the knowledge base but those to skip, ids shifted by some."""
    images = [(j, n) for j, n in itertools.product(range(ENTITIES), range(2)) if (j, n) not in skip]
    index = faiss.IndexFlatIP(4)
    index.add(S.normalise([[*(np.array(colour(j, 3 * n)) / 255 - 0.5), 0.2] for j, n in images]))
    os.makedirs(raw.index, exist_ok=True)
    faiss.write_index(index, f"{raw.index}/kb_index.faiss")
    with open(f"{raw.index}/kb_index_ids.pkl", "wb") as file:
        file.write(pickled([(j + shift) % ENTITIES for j, _ in images]))


def search(raw, *more):
    echosight.main(["--dataset", "evqa", "--root", str(raw.root), "--index", raw.index, "--out", raw.run,
                    "--data", raw.data, "--k", "3", *more])


def prepared(raw, *more):
    """Pools as prepare.py writes them: [(query id, entity ids, image paths, labels)]."""
    P.main(["--dataset", "evqa", "--root", str(raw.root), "--out", raw.data, "--k", "3", *more])
    split = more[more.index("--splits") + 1]
    data = S.load_data(raw.data, split)
    return [(data.queries[i].query_id, [data.entity(j)["entity_id"] for j in data.pool[i]],
             [data.candidate_image_path(m) for m in data.pool_image[i]], data.labels[i].tolist())
            for i in range(len(data))]


def test_echosight_pools_are_those_of_an_exact_search(raw, capsys):
    """Though their index lacks an image, which shifts every url after it, and one of ours is gone."""
    want = prepared(raw, "--splits", "test")
    write_index(raw, skip={(9, 0)})
    os.remove(raw.root / "kb/e11_1.jpg")
    for path in (raw.root.parent / "data.work").iterdir():
        path.unlink()
    search(raw)
    ranked, asked = S.read_trec(raw.run), raw.scorer.images
    assert list(ranked) == [query for query, *_ in want] and all(len(ids) == 3 + P.SPARE for ids in ranked.values())
    assert "23 of 23 vectors are features of an image" in capsys.readouterr().out
    got = prepared(raw, "--splits", "test", "--retrieved", raw.run)
    assert [one[:2] + one[3:] for one in got] == [one[:2] + one[3:] for one in want]
    assert sum(a[2] == b[2] for a, b in zip(got, want)) >= ENTITIES - 2  # the image is chosen by our own features
    assert raw.scorer.images == asked  # no picture is embedded twice


def test_echosight_embeds_only_queries_without_confirming(raw):
    write_index(raw)
    save(raw.root / "landmarks/3.jpg", colour(4, 5))  # a query that shows entity 4
    (raw.root / "landmarks/5.jpg").write_bytes(b"<html>")
    search(raw, "--confirm", "0")
    ranked = S.read_trec(raw.run)
    assert ranked["E-VQA_test_3"][0] == f"{WIKI}E%204" and "E-VQA_test_5" not in ranked and len(ranked) == ENTITIES - 1
    assert raw.scorer.images == ENTITIES - 1


def write_pickle(raw, content):
    with open(f"{raw.index}/kb_index_ids.pkl", "wb") as file:
        file.write(content)


@pytest.mark.parametrize("break_, complaint", [
    (lambda raw: write_index(raw, shift=1), "ids are shifted"),
    (lambda raw: write_pickle(raw, pickled([0] * 23)), "24 vectors of 4 .* 23 ids"),
    (lambda raw: write_pickle(raw, pickled([0] * 23 + [12])), "places in .* 0 to 11; 0 to 12"),
    (lambda raw: write_pickle(raw, pickled(["x"] * 24)), "opcode BINUNICODE"),
    (lambda raw: os.remove(f"{raw.index}/kb_index_ids.pkl"), r"kb_index_ids\.pkl is missing"),
    (lambda raw: faiss.write_index(faiss.IndexFlatIP(3), f"{raw.index}/kb_index.faiss"), "0 vectors of 3 numbers"),
    (lambda raw: faiss.write_index(faiss.IndexFlatL2(4), f"{raw.index}/kb_index.faiss"), "no flat index of inner"),
    (lambda raw: os.truncate(f"{raw.index}/kb_index.faiss", 60), "faiss cannot read it"),
    (lambda raw: os.remove(raw.root / "encyclopedic_kb_wiki.json"), "encyclopedic_kb_wiki.json or wiki_corpus.json is missing"),
    (lambda raw: os.remove(raw.root / "test.csv"), "test.csv is missing")],
    ids=["shifted", "short", "too high", "texts", "ids gone", "dim", "distances", "cut", "kb", "csv"])
def test_echosight_index_of_something_else(raw, break_, complaint):
    write_index(raw)
    break_(raw)
    with pytest.raises(SystemExit, match=complaint):
        search(raw)
    assert not os.path.exists(raw.run)


@pytest.mark.parametrize("content, want", [
    (pickled([0, 0, 1, 70_000]), [0, 0, 1, 70_000]), (b"\x80\x02].", []),
    (b"\x80\x04\x95\x09\x00\x00\x00\x00\x00\x00\x00]\x94(K\x00M\xe8\x03e.", [0, 1000]),  # protocol 4, BININT1 and 2
    (b"(lp0\nI5\naI6\na.", [5, 6])])                                                        # protocol 0
def test_read_ids(tmp_path, content, want):
    (tmp_path / "ids.pkl").write_bytes(content)
    assert echosight.read_ids(str(tmp_path / "ids.pkl")) == want


@pytest.mark.parametrize("content, message", [
    (b"cos\nsystem\n(S'true'\ntR.", "opcode GLOBAL at byte 0 .* could run code"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "opcode SHORT_BINUNICODE"), (b"\x80\x02}q\x00.", "opcode EMPTY_DICT"),
    (b"\x80\x02]q\x00(K\x01K\x02\x93e.", "opcode STACK_GLOBAL"), (b"\x80\x02]q\x00]q\x01a.", "opcode EMPTY_LIST"),
    (b"\x80\x02]q\x00(I01\ne.", "opcode INT"), (b"\x80\x02]q\x00h\x00a.", "opcode BINGET"),
    (b"\x80\x02K\x01.", "holds no list"), (pickled([1, 2])[:-1], "STOP"), (b"", "STOP|exhausted|empty")])
def test_read_ids_refuses(tmp_path, content, message):
    (tmp_path / "ids.pkl").write_bytes(content)
    with pytest.raises(S.InputError, match=rf"ids\.pkl.*({message})"):
        echosight.read_ids(str(tmp_path / "ids.pkl"))


# ------------------------------------------------------------------------------------- mined pools, from end to end

def test_mining_for_all_rows_gives_their_pools(raw, capsys):
    """Train rows are about another entity than their picture shows, so prepare.py leaves most of them out; three are
    about none of the knowledge base. --all finds the others' pools with the features that are there."""
    short = prepared(raw, "--splits", "train")
    asked = raw.scorer.images
    flags = ["--data", raw.data, "--split", "train", "--k", "3", "--similarity-tolerance", "2", "--device", "cpu",
             "--out", raw.run]
    mine.main(flags)
    assert list(S.read_trec(raw.run)) == [query for query, *_ in short] and 0 < len(short) < 9
    mine.main([*flags, "--all"])
    assert "9 pools, 3 positive not in the knowledge base" in capsys.readouterr().out and raw.scorer.images == asked
    got = prepared(raw, "--splits", "train", "--retrieved", raw.run)
    assert [query for query, *_ in got] == [f"E-VQA_train_{j}" for j in range(ENTITIES) if (j + 5) % 15 < ENTITIES]
    assert all(sum(labels) == 1 and len(set(pool)) == 3 for _, pool, _, labels in got)


