"""The report: statistics against slow obvious loops and closed forms, tables by hand, a page that runs nothing.

The run that the page is made from is drawn here: 24 queries about 8 entities (three each), K = 4, random scores. Its
titles, questions and names hold tags and quotes, as those of real data may.
"""

import argparse
import base64
import csv
import dataclasses
import io
import itertools
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rewards import metrics, summary
from scorer import InputError, Query, write_array, write_json, write_split
from tools import plots, report, stats, tables
from tools import rows as tool_rows

EVIL = """<script>alert(1)</script> & "quoted" 'too' | $x_1$ \\"""
Q, K, E = 24, 4, 8
# Every sixth pool holds no positive: a miss, which MRR counts as 0 and CondR@k leaves out.
LABELS = [[0] * K if i % 6 == 5 else [0, 0, 1, 0] for i in range(Q)]


# ------------------------------------------------------------------------------------------------ a run, drawn by hand

def write_data(folder):
    """A prepared data folder with pictures: 8 entities of one colour each, 24 queries, three about each entity."""
    (folder / "raw").mkdir(parents=True)
    data = folder / "data"
    data.mkdir()
    for j in range(E):
        Image.new("RGB", (20, 12), (30 * j, 255 - 30 * j, 90)).save(folder / "raw" / f"{j}.png")
    with open(data / "kb.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"entity_id": f"u{j}", "title": f"{EVIL}\x1b\ud800\n {j}", "text": "",
                                    "images": [f"{j}.png"]}) + "\n" for j in range(E))
    for name, array in (("kb_image", np.ones((E, 2), np.float16)), ("kb_text", np.ones((E, 2), np.float16)),
                        ("kb_entity", np.arange(E, dtype=np.int32))):
        write_array(str(data / f"{name}.npy"), array)
    pool = np.array([[(i % E + k) % E for k in range(K)] for i in range(Q)])
    queries = [Query(f"q{i}{EVIL}", f"{i % E}.png", f"What {EVIL} is {i}?", [f"u{(i % E + 2) % E}"]) for i in range(Q)]
    write_split(str(data), "test", queries, pool=pool, pool_image=pool, labels=LABELS, full=np.ones((Q, 2)),
                retrieval=np.tile([.9, .8, .7, .6], (Q, 1)))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": ""} for file in data.iterdir()}
    write_json(str(data / "manifest.json"), {
        "version": 2, "dataset": "world", "root": "../raw", "args": {}, "K": K, "dim": 2, "splits": {"test": {}},
        "scorer": {"name": "tiny", "dtype": "float32", "fingerprint": [1, 0]}, "kb": {}, "files": files})
    return queries


def rows_of(queries, rng, crops=0.0, lift=0.0):
    """Rows of a method that crops a share of the queries and lifts the positives' scores by `lift` on average."""
    rows = []
    for i, query in enumerate(queries):
        region = bool(rng.random() < crops)
        scores = rng.normal(.5, .1, K) + lift * np.array(LABELS[i]) * (region or lift < 0)
        rows.append({"query_id": query.query_id, "question": query.question, "image": query.image, "kind": "ab"[i % 2],
                     "positives": query.positives, "decision": "REGION" if region else "FULL",
                     "box": [2.0, 1.0, 15.0, 11.0] if region else None, "p_region": .9 if region else .1,
                     "scores": [float(s) for s in scores], "labels": LABELS[i], "rank": 0, "full_rank": 0,
                     "text": "said", "iou": .5 + i / 100 if region else None, "seconds": .25, "encodes": int(region),
                     "unreadable": False})
    return rows


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder, queries, name="a run & more"):
    """runs/<name> with all files of an evaluated run; returns its folder."""
    run, rng = folder / "runs" / name, np.random.default_rng(0)
    full, found = rows_of(queries, rng), {}
    for method, (crops, lift) in {"full": (0, 0), "random": (1, -.2), "center": (1, -.1), "zeroshot": (.2, .1),
                                  "always": (1, .1), "policy": (.6, .4), "truth": (1, .2), "best16": (.8, .5)}.items():
        # What is not cropped is seen as the full image.
        found[method] = full if method == "full" else [
            row if row["decision"] == "REGION" else {**row, "scores": f["scores"]}
            for row, f in zip(rows_of(queries, rng, crops, lift), full)]
    for name in ("policy+fuse", "policy@clip", "full@clip"):  # what tools/rescore.py writes: the same actions
        base = found[name.partition("@")[0].partition("+")[0]]
        found[name] = [{**row, "scores": [s + .01 for s in row["scores"]]} for row in base]
    found["policy.quality"] = [{"query_id": row["query_id"], "box": row["box"], "target": row["box"], "iou": .75,
                                "containment": 1.0, "judge": i % 2 == 0} for i, row in enumerate(found["policy"])
                               if row["box"]]
    for method, rows in found.items():
        write_rows(run / "eval" / f"test.{method}.jsonl", rows)
    for view in ("full", "policy"):
        write_rows(run / "eval" / "retrieval" / f"test.{view}.jsonl", [
            {name: row[name] for name in ("query_id", "positives", "decision", "labels", "scores", "rank", "full_rank")}
            for row in found[view]])
    write_json(str(run / "eval" / "metrics.json"), {
        "data": str(folder / "data"), "run": str(run), "split": "test", "scorer": "tiny", "queries": Q,
        "methods": dict.fromkeys(m for m in found if m.isalnum())})
    write_json(str(run / "config.json"), {"policy": "mini/policy", "args": {
        "seed": 0, "balance": "force", "queries": 16, "reward": "delta", "reward_weights": [.2, .2, .2, .4]}})
    before = {"step": -1, "val_mrr": .25, "val_cond_r1": .3, "val_crop_rate": .1}  # the policy before training
    write_rows(run / "log.jsonl", [before] + [{"step": i, "reward": i / 30, "reward_full": .5, "reward_region": .1, "p_region": .4,
                                    "kl": 0.0, "grad_norm": 1.0, **({"val_mrr": .5} if i % 10 == 9 else {})}
                                   for i in range(30)])
    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, queries, run folder), never changed by a test."""
    folder = tmp_path_factory.mktemp("report")
    queries = write_data(folder)
    return folder, queries, write_run(folder, queries)


@pytest.fixture
def copy(world, tmp_path):
    """A run folder of one's own, to damage."""
    return write_run(tmp_path, world[1])


def change(path, edit):
    """Rows of a file through `edit`, a function list -> list."""
    write_rows(path, edit([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]))


def make(run, *arguments):
    report.main(["--run", str(run), "--resamples", "1000", "--examples", "1", *map(str, arguments)])
    return json.loads(((run / "report") / "report.json").read_text(encoding="utf-8")) if not arguments else None


def run_of(values, clusters=None, args=None, resamples=2000, ablations=()):
    """A Run around {method: {measure: values}}, without any file."""
    values = {name: {m: np.asarray(v, dtype=np.float64) for m, v in found.items()} for name, found in values.items()}
    size = len(next(iter(next(iter(values.values())).values())))
    run = report.Run(argparse.Namespace(resamples=resamples, seed=0, split="test", examples=2), {},
                     {"args": args or {}}, [], dict.fromkeys(values, []), ablations=list(ablations))
    for name, runs in zip(("with margin", "without margin"), report.margin_runs(run)):
        if runs:
            values[name] = {"MRR": np.mean([ablation.values["MRR"] for ablation in runs], axis=0)}
    run.study = stats.Study(values, np.arange(size) if clusters is None else np.asarray(clusters), resamples)
    return run


# --------------------------------------------------------------------------------------------------------- statistics

def test_bootstrap_equals_the_slow_loop():
    """The matrix product against samples that are built: draw entities, join their queries, take the mean."""
    rng = np.random.default_rng(1)
    clusters = np.array([0, 0, 0, 1, 2, 2, 3])
    values = rng.normal(size=(7, 2))
    values[4, 1] = np.nan
    found = stats.bootstrap(values, clusters, 700, seed=5)
    draws, slow = np.random.default_rng(5), []
    for size in (stats.BLOCK, 700 - stats.BLOCK):
        for counts in draws.multinomial(4, np.full(4, 1 / 4), size):
            drawn = [i for c, n in enumerate(counts) for _ in range(n) for i in np.flatnonzero(clusters == c)]
            slow.append([np.nanmean(values[drawn, v]) if (~np.isnan(values[drawn, v])).any() else np.nan
                         for v in range(2)])
    np.testing.assert_allclose(found, slow, rtol=1e-12)


def test_bootstrap_has_the_closed_form_variance():
    """Over entities of equal size, the variance of the resampled mean is that of the entities' means over their number:
    means 0, 1, 2, 3 have variance 1.25, over 4 entities .3125. 20,000 resamples know it to about 1 %."""
    found = stats.bootstrap(np.repeat([0.0, 1, 2, 3], 5)[:, None], np.repeat(np.arange(4), 5), 20000)
    assert found.mean() == pytest.approx(1.5, abs=.02) and found.var() == pytest.approx(.3125, rel=.04)


@pytest.mark.parametrize("sums", [[3, 1, -1, 2, .5, 4, 1, -2], [1] * 8, [1, -1, 2, -2, .5, -.5, 3, 1]])
def test_flips_equal_the_enumeration(sums):
    """All 2^8 signs of eight entities against 20,000 drawn ones; the standard error is at most .0035.

    Each entity's sum is spread over two queries, one of them of opposite sign: single queries would give another p.
    """
    totals = np.array(sums)
    exact = np.mean([abs(np.dot(signs, totals)) >= abs(totals.sum()) - 1e-9
                     for signs in itertools.product((-1, 1), repeat=8)])
    values = np.stack([totals + 5, np.full(8, -5.0)], axis=1).ravel()[:, None]  # [16, 1]
    found = stats.flip_p(values, np.repeat(np.arange(8), 2), 20000, seed=3)[0]
    assert found == pytest.approx(exact, abs=.015)


def test_flips_at_the_edges():
    """No difference: every flip is as extreme, p = 1. So for 0, .9, -.9, .1: no signs make less than .1 of them, though
    in floating point half of the flips come out at .09999999999999998. Thirty equal differences: 2 of 2^30 flips are as
    extreme, so (nearly surely) none of 999: p = 1 / 1000, never 0."""
    values = np.array([[0, 0], [0, .9], [0, -.9], [0, .1], [np.nan, np.nan]])
    assert stats.flip_p(values, np.arange(5), 1000).tolist() == [1, 1]
    assert stats.flip_p(np.ones((30, 1)), np.arange(30), 999)[0] == 1 / 1000


def test_interval_and_holm_by_hand():
    """Percentiles of 0 ... 1000 at 2.5 % and 97.5 % are 25 and 975; NaN resamples are left out. Holm: .005 x 4 = .02,
    .01 x 3 = .03, .03 x 2 = .06, .04 x 1 = .04 but never below .06; what was not tested does not count."""
    assert stats.interval(np.append(np.arange(1001.0), np.nan)) == pytest.approx((25, 975))
    assert np.isnan(stats.interval(np.array([np.nan]))).all()
    assert stats.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert stats.holm([.01, np.nan, .04]) == pytest.approx([.02, np.nan, .04], nan_ok=True)
    assert stats.holm([.5, .9]).tolist() == [1, 1] and stats.holm([]).size == 0


def test_compare_by_hand():
    """b = a + .1 with a all over the place: unpaired nobody could tell, paired the interval is one point. Differences
    1, 2, 3: mean 2, standard deviation 1 (n - 1), d_z 2."""
    a = np.random.default_rng(0).normal(size=30)
    study = run_of({"a": {"MRR": a}, "b": {"MRR": a + .1}}).study
    row, = study.compare([(("b", "MRR"), ("a", "MRR"))])
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((.1, .1, .1))
    assert row["p"] < .01 and row["n"] == 30 and row["p_holm"] == row["p"]
    study = run_of({"a": {"x": [1, 2, 3, np.nan], "y": [np.nan] * 4}, "b": {"x": [0, 0, 0, 0]}}).study
    first, second = study.compare([(("a", "x"), ("b", "x")), (("a", "y"), ("b", "x"))])
    assert (first["difference"], first["d_z"], first["n"]) == (2, 2, 3)
    assert np.isnan(second["difference"]) and np.isnan(second["p"]) and study.compare([]) == []


# ------------------------------------------------------------------------------------------------------ rows, measures

def test_measures_by_hand():
    """Four queries, K = 3, the second candidate is the positive (the fourth pool has none).

              full image                      this method
        q0    .1 .9 .2: rank 1, margin .7     REGION .5 .4 .1: rank 2, margin -.1    hurt
        q1    .9 .5 .7: rank 3, margin -.4    REGION .1 .5 .2: rank 1, margin .3     help
        q2    .9 .5 .1: rank 2, margin -.4    MALFORMED, as the full image           same
        q3    no positive                     FULL
    """
    def row(scores, decision="FULL", labels=(0, 1, 0), **more):
        return {"scores": scores, "labels": list(labels), "decision": decision, **more}
    full = [row([.1, .9, .2]), row([.9, .5, .7]), row([.9, .5, .1]), row([.3, .2, .1], labels=(0, 0, 0))]
    # An IoU counts where the full image is wrong and a positive is there: of q1, and of q2 though it took no box.
    rows = [row([.5, .4, .1], "REGION", iou=.5, containment=1, judge=True), row([.1, .5, .2], "REGION", iou=.6),
            row([.9, .5, .1], "MALFORMED", iou=.7), row([.3, .2, .1], labels=(0, 0, 0), iou=.8)]
    found, nan = stats.measures(rows, full), np.nan
    expected = {"MRR": [.5, 1, .5, 0], "R@1": [0, 1, 0, 0], "CondR@1": [0, 1, 0, nan], "crop": [1, 1, 0, nan],
                "bad": [0, 0, 1, 0], "crop =1": [1, nan, nan, nan], "hurt =1": [1, nan, nan, nan],
                "crop >1": [nan, 1, 0, nan], "help >1": [nan, 1, 0, nan], "hurt >1": [nan, 0, 0, nan],
                "same >1": [nan, 0, 1, nan], "margin": [-.1, .3, -.4, nan], "margin gain": [-.8, .7, 0, nan],
                "iou": [nan, .6, .7, nan], "containment": [1, nan, nan, nan],
                "judge": [1, nan, nan, nan], "rank": [2, 1, 2, 4]}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name, atol=1e-12)
    # An entity is named by the first positive; a query without one is an entity of its own.
    rows = [{"positives": p, "query_id": i} for i, p in enumerate([["b", "a"], ["a"], [], ["b"], []])]
    assert stats.entities(rows).tolist() == [1, 0, 2, 1, 3]


def test_means_equal_the_leaf(world):
    """Every mean of the tables equals that of rewards.summary over the same rows."""
    _, _, run = world
    run = report.open_run(report.parse_args(["--run", str(run), "--resamples", "100"]))
    for name in report.own_scorer(run):
        rows = run.rows[name]
        leaf = summary(metrics([r["scores"] for r in rows], [r["labels"] for r in rows]))
        for measure, value in leaf.items():
            assert run.study.mean(name, measure) == pytest.approx(value)


def test_curve_against_the_slow_way():
    """Every point recomputed query by query, and its ends: all forced boxes, and none."""
    rng = np.random.default_rng(3)
    p, held = rng.random(60).round(2) + .01, np.arange(60) < 50  # ten queries without a positive
    p[7] = np.nan  # nothing to crop to
    full, always = ({"MRR": rng.random(60), "CondR@1": np.where(held, rng.integers(0, 2, 60), np.nan)} for _ in "ab")
    points = stats.operating_curve(p, full, always)
    assert len(points) > 30 and [point["threshold"] for point in points] == sorted(p["threshold"] for p in points)
    for point in points:
        crops = [i for i in range(60) if i != 7 and p[i] > point["threshold"]]
        for measure in ("MRR", "CondR@1"):
            values = [(always if i in crops else full)[measure][i] for i in range(60)]
            assert point[measure] == pytest.approx(np.nanmean(values))
        assert point["crop_rate"] == pytest.approx(sum(i < 50 for i in crops) / 50)
    assert points[0]["crop_rate"] == 49 / 50 and points[-1]["crop_rate"] == 0
    assert stats.operating_curve(np.full(60, np.nan), full, always) is None


def test_rows_are_read_by_name(copy):
    found = tool_rows.read_rows(str(copy / "eval"), "test")
    assert {"full@clip", "policy+fuse", "policy.quality", "retrieval/full"} <= set(found) and len(found["policy"]) == Q
    assert list(tool_rows.read_rows(str(copy / "eval"), "test", ["policy@clip", "full"])) == ["full", "policy@clip"]
    with pytest.raises(FileNotFoundError, match="test.nobody.jsonl is missing or empty: run evaluate.py"):
        tool_rows.read_rows(str(copy / "eval"), "test", ["nobody"])
    run = report.open_run(report.parse_args(["--run", str(copy), "--resamples", "100"]))
    assert report.own_scorer(run) == ["full", "random", "center", "zeroshot", "always", "policy", "truth", "best16",
                                      "policy+fuse"]
    asked = [i % 2 == 0 for i, row in enumerate(found["policy"]) if row["box"]]
    # Of tools/crop_quality.py, beside what evaluate.py measured itself.
    assert run.study.mean("policy", "iou crops") == .75 != run.study.mean("policy", "iou") and run.notes == []
    assert run.study.mean("policy", "judge") == pytest.approx(np.mean(asked))


def test_what_is_refused(copy, tmp_path):
    def message(run=copy):
        with pytest.raises(SystemExit) as error:
            make(run)
        return str(error.value)

    path, scores = copy / "eval" / "test.policy.jsonl", [[float("nan")] * K, [1.0], "high", [None] * K]
    whole = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for rows, wanted in (
            ([{**whole[0], "positives": 0}, {k: v for k, v in whole[1].items() if k != "positives"}],
             ":2: no field positives; run evaluate.py again"),
            (whole[:-1], " has 23 rows, `full` 24"), ([3, *whole], ":1: no field query_id"), ([], " has 0 rows"),
            (whole[1::-1] + whole[2:], ":1: query "), ([{**whole[0], "labels": [1] * K}, *whole[1:]], ":1: query "),
            *(([whole[0], {**whole[1], "scores": wrong}], ":2: the scores of query ")
              for wrong in (*scores, [float("-inf")] * K))):
        write_rows(path, rows)
        assert f"test.policy.jsonl{wanted}" in message()
    path.write_text("{cut", encoding="utf-8")
    assert message().startswith("tools.report: ") and "test.policy.jsonl:1: not JSON" in message()
    assert "metrics.json is missing: no evaluation has finished here; run `python evaluate.py --run" in message(
        tmp_path / "none")
    path = copy / "eval" / "metrics.json"
    write_json(str(path), {**json.loads(path.read_text()), "split": "val"})
    assert "is of split 'val', not 'test'" in message()
    for content in ("{cut", "[1]", '"\xff"'):
        path.write_bytes(content.encode("latin-1"))
        assert "metrics.json" in message() and "run `python evaluate.py" in message()


def test_rows_of_an_earlier_evaluation_are_left_out(copy):
    """A method that metrics.json does not name, and what the tools made from other actions or of fewer queries."""
    path = copy / "eval" / "metrics.json"
    result = json.loads(path.read_text())
    del result["methods"]["center"]
    path.write_text(json.dumps(result))
    change(copy / "eval" / "test.policy+fuse.jsonl", lambda rows: rows[:2])
    for name in ("policy@clip", "policy.quality"):
        change(copy / "eval" / f"test.{name}.jsonl", lambda rows: [{**row, "box": [0, 0, 5, 5]} for row in rows])
    change(copy / "eval" / "retrieval" / "test.policy.jsonl",
           lambda rows: [{**row, "decision": "FULL"} for row in rows])
    found = make(copy)
    assert not {"center", "policy+fuse", "policy@clip", "retrieval/policy"} & found["means"].keys()
    assert {note.split(":")[0] for note in found["notes"] if "earlier evaluation" in note} == {
        "center", "policy+fuse", "policy@clip", "policy.quality", "retrieval/policy"}
    assert found["means"]["policy"]["iou crops"]["mean"] is None


def test_quality_of_a_part_of_the_crops_is_left_out(copy):
    """The policy cropped more since Table 7 was made; the crops that stayed are no sample of it."""
    change(copy / "eval" / "test.policy.quality.jsonl", lambda rows: rows[1:])
    run = report.open_run(report.parse_args(["--run", str(copy), "--resamples", "100"]))
    assert run.notes == ["policy.quality: its rows are of an earlier evaluation than metrics.json"]


# -------------------------------------------------------------------------------------------------------------- claims

@pytest.mark.parametrize("numbers, slack, verdict", [
    ((.1, .05, .15, .01), 0, "holds"), ((-.1, -.15, -.05, .01), 0, "fails"),
    ((.1, .05, .15, .06), 0, "cannot be told"), ((np.nan,) * 4, 0, "cannot be told"),
    ((.0, -.005, .005, .9), .01, "holds"), ((-.005, -.03, .02, .9), .01, "cannot be told"),
    ((-.1, -.15, -.05, .01), .01, "fails"), ((-.004, -.006, -.002, .01), .01, "holds"),
    ((.1, .05, .15, np.nan), 0, "cannot be told"),
    ((-.005, -.0105, -.0005, .01), .01, "cannot be told"),  # surely worse, but by more than .01? it may be or not
    ((-.0105, -.02, -.001, .01), .01, "cannot be told")])
def test_verdict(numbers, slack, verdict):
    claim = dict(zip(("difference", "low", "high", "p_holm"), numbers))
    assert report.verdict(claim, slack) == verdict
    assert report.verdict(claim, 0, certain=False) == "cannot be told"


def paper_like(size=60, **changes):
    """Values of every method in the paper's order, a clear step apart, with noise; the policy crops where it must."""
    rng, right = np.random.default_rng(0), np.arange(size) % 2 == 0
    values = {}
    for place, name in enumerate(("random", "center", "full", "zeroshot", "always", "policy", "best16")):
        level = .1 * place + rng.normal(0, .02, size)
        only = lambda where, what: np.where(where, what, np.nan)  # noqa: E731
        needed = 1.0 * ~right if name == "policy" else rng.integers(0, 2, size) * 1.0
        values[name] = {"MRR": level, "CondR@1": level, "crop =1": only(right, needed), "crop >1": only(~right, needed),
                        "hurt =1": only(right, needed), "help >1": only(~right, needed)}
    for name, shift in changes.items():
        values[name]["MRR"] = values[name]["MRR"] + shift
    return values


def test_claims_hold_where_they_do():
    found = report.claims(run_of(paper_like()))
    assert len(found) == 11
    assert {claim["verdict"] for claim in found[:9]} == {"holds"}
    assert [claim["verdict"] for claim in found[9:]] == ["cannot be told"] * 2  # nothing to tell margin, retrieval by
    assert "make ablations" in found[9]["note"] and "tools.retrieve" in found[10]["note"]
    assert all(claim["p_holm"] >= claim["p"] for claim in found[:9])


def test_sanity_checks_are_a_family_of_their_own():
    """The paper says nothing of boxes on every query, of rules and of ceilings. Were they in its family of 9, its least
    p of 1 / 2001 would come out as 13 / 2001."""
    values = paper_like()
    values |= {rule: {"MRR": values["center"]["MRR"]} for rule in ("noun_rule", "clutter_rule")}
    run = run_of(values)
    checks = report.claims(run, report.SANITY)
    assert [claim["verdict"] for claim in checks] == ["holds"] * 4
    assert {side[0] for _, *sides, _ in report.CLAIMS for side in sides} == {
        "random", "center", "full", "zeroshot", "policy", "with margin", "without margin", "retrieval/policy",
        "retrieval/full"}
    for listed, size in ((report.claims(run), 9), (checks, 4)):
        assert min(claim["p_holm"] for claim in listed) == pytest.approx(size / 2001)


def test_too_few_resamples_are_refused(copy):
    """100 resamples give p = 1 / 101 at the least: times 9 tests .089, and nothing could ever be told. With one test of
    two groups, whose least p is 2 / (1 + R), 9 tests need 40 x 9 = 360: 18 / 361 < .05."""
    with pytest.raises(InputError, match="--resamples 100 is too few for a table of 9 tests: .* give 360 or more"):
        report.claims(run_of(paper_like(), resamples=100))
    assert report.claims(run_of(paper_like(), resamples=360))[0]["verdict"] == "holds"
    run = run_of({"a": {"x": np.ones(30)}, "b": {"x": np.zeros(30)}}, resamples=20)
    assert run.study.compare([(("a", "x"), ("b", "x"))])[0]["p_holm"] < .05
    with pytest.raises(InputError, match="a table of 2 tests: .* give 40 or more"):
        run.study.compare([(("a", "x"), ("b", "x"))] * 2)
    with pytest.raises(SystemExit, match="tools.report: --resamples 100 is too few"):
        report.main(["--run", str(copy), "--resamples", "100"])


def test_claims_fail_where_they_do():
    """The policy below everything: what it should be above does not hold, what it does not touch still does."""
    found = report.claims(run_of(paper_like(policy=-1)))
    assert [claim["verdict"] for claim in found[:5]] == ["holds"] * 3 + ["fails", "holds"]
    assert [claim["text"] for claim in found[3:5]] == ["zero-shot < learned",
                                                       "full image < learned, at the first place"]
    values = paper_like()
    values["policy"]["crop =1"], values["policy"]["crop >1"] = (values["policy"][f"crop {g}"][::-1].copy()
                                                               for g in (">1", "=1"))
    del values["zeroshot"]
    found = report.claims(run_of(values))
    assert found[3]["verdict"] == "cannot be told" and found[3]["note"] == "no rows of zeroshot"
    assert found[8]["text"].startswith("crop rate follows need") and found[8]["verdict"] == "fails"


def ablation(name, seed, mrr, weights=(.2, .2, .2, .4), **args):
    size = len(mrr)
    values = {"MRR": np.asarray(mrr), "CondR@1": np.asarray(mrr), "crop": np.ones(size), "margin": np.zeros(size),
              **{m: np.full(size, .5) for m in ("crop =1", "crop >1", "iou", "bad")}}
    return report.Ablation(name, seed, {"seed": seed, "reward_weights": list(weights), **args}, values)


def margin_run(without, with_term=(.61, .60, .62), reward="delta", **args):
    noise = np.random.default_rng(0).normal(0, .05, 60)
    found = [*(ablation("delta", s, m + noise, reward=reward) for s, m in enumerate(with_term)),
             *(ablation("rank", s, m + noise, (.3, .3, .4, 0), reward=reward) for s, m in enumerate(without)),
             ablation("mrr", 0, noise, (1, 0, 0, 0), reward=reward),
             ablation("free", 0, noise, reward=reward, decode="free"),
             *(ablation("delta again", s, m + noise, reward=reward) for s, m in enumerate(with_term))]
    return run_of(paper_like(), args={"seed": 0, "reward": reward, "reward_weights": [.2, .2, .2, .4], **args},
                  ablations=found)


def test_margin_claim():
    """With: mean .61; without: .51, all seeds below. A variant with one term alone is not what `without` means."""
    # Arguments that move no weight, on the main run alone: the ablations are still the same training.
    run = margin_run((.50, .51, .52), tensorboard=True, save_every=7)
    with_term, without = report.margin_runs(run)
    # "delta again" is the same training under another name, and no further seeds.
    assert [a.reading for a in with_term] == ["delta"] * 3 and [a.reading for a in without] == ["rank"] * 3
    claim = report.claims(run)[9]
    assert claim["verdict"] == "holds" and claim["difference"] == pytest.approx(.10)
    # .605 without is within .60 to .62 with: the queries are sure and the seeds are not.
    claim = report.claims(margin_run((.50, .51, .605)))[9]
    assert claim["verdict"] == "cannot be told" and claim["p"] < .05 and claim["note"].endswith("the seeds overlap")
    assert report.claims(margin_run((.70, .71, .72)))[9]["verdict"] == "fails"
    claim = report.claims(margin_run((.50, .51, .52), with_term=(.61,)))[9]
    assert claim["verdict"] == "cannot be told" and claim["note"].endswith("too few seeds")
    # The weights are no part of .5 MRR + .5 NDCG: such runs differ by nothing.
    run = margin_run((.50, .51, .52), reward="absolute")
    claim = report.claims(run)[9]
    assert report.margin_runs(run) == ([], []) and claim["note"].startswith("no runs under Eq. 7 that differ")


def test_retrieval_claim():
    """R@20 of 40 queries: the crop loses 10 of 20 hits, mean difference 10 / 40; the other way round it helps."""
    full, cropped = np.repeat([1.0, 0], [20, 20]), np.repeat([1.0, 0], [10, 30])
    for before, after, verdict, difference in ((full, cropped, "holds", .25), (cropped, full, "fails", -.25)):
        run = run_of({"retrieval/full": {"R@20": before}, "retrieval/policy": {"R@20": after}})
        claim = report.claims(run)[10]
        assert claim["verdict"] == verdict and claim["difference"] == pytest.approx(difference)
        assert claim["n"] == 40 and claim["p"] < .05


# -------------------------------------------------------------------------------------------------------------- tables

def test_ablation_table_by_hand():
    """MRR .5, .6, .7: mean .6, range .5 to .7; the row says in what it differs. Every query is .2 below the default, so
    the interval of its mean is a point, and p as small as 2,000 flips of 60 entities can make it, 1 / 2001."""
    run = run_of(paper_like(), args={"seed": 0, "reward_weights": [.2, .2, .2, .4], "balance": "force"})
    run.ablations = [ablation("plain", s, np.full(60, m), balance="none") for s, m in enumerate((.5, .6, .7))]
    run.ablations.append(ablation("default", 0, np.full(60, .8), balance="force"))
    run.ablations[3].log = [{"step": -1, "val_mrr": .2}, {"step": 9, "val_mrr": .6}, {"step": 19, "val_mrr": .6}]
    run.ablations[0].log = [{"step": -1, "val_mrr": .2}, {"step": 19, "val_mrr": .4}]
    table = report.ablation_table(run)
    assert table.rows[0][:8] == ["plain", "3", "0.600 (0.500-0.700)", "[0.600, 0.600]", "-0.200", "< 0.001",
                                 "0.600 (0.500-0.700)", "50.0 (50.0-50.0)"]
    # The curve's height is .3 on average. The threshold .2 + .9 (.6 - .2) = .56 is not reached; the default is at it
    # after 9 of the 10 steps from .2 to .6, and its height is .4 for ten steps, then .6.
    assert table.rows[0][-3:] == ["0.300, 2 without", "-", "balance none"]
    assert table.head[4] == "- default" and table.head[-2] == "steps to 0.560"
    assert table.rows[1] == ["default", "1", "0.800", "[0.800, 0.800]", "-", "-", "0.800", "50.0", "50.0", "0.50", "50.0",
                             "0.500", "9", "as this run"]
    run.ablations.pop()  # no reading is as this run: it is this run's own rows that the others are held against
    assert report.ablation_table(run).head[4] == "- this run"


def test_cost_table_by_hand():
    """4 s for a batch of 8 is .5 s a query, 2 queries a second; 3e9 bytes are 3000 MB. The weights were random, and the
    images as large as this bench's were."""
    run = run_of(paper_like())
    run.bench = {"gpu.json": {"machine": {"device": "H100"}, "args": {"visual_tokens": 64}, "cases": {"act": {
        "median_s": {"batch 8 grammar": 4.0}, "peak_bytes": {"batch 8 grammar": 3e9}}}}}
    table = report.cost_table(run)
    assert table.rows == [["gpu", "H100", "64", "grammar", "8", "0.500", "2.00", "3000"]]
    assert "random weights" in table.title and "random weights" in table.caption and "1,000" not in table.caption
    assert table.head[2] == "image tokens"


def test_quality_table_by_hand():
    """The policy's own crops are of two queries, IoU .9 and .7; the box it takes or would take has .5 where a crop could
    help. The rule's crops were not looked at."""
    nothing = {name: [np.nan] * 3 for name in ("iou crops", "containment", "judge")}
    run = run_of({"policy": {"iou crops": [.9, .7, np.nan], "containment": [1, 0, np.nan], "judge": [np.nan] * 3,
                             "iou": [np.nan, .4, .6]}, "noun_rule": {**nothing, "iou": [np.nan, .2, .4]}})
    table = report.quality_table(run)
    assert table.head == ["method", "crops", "IoU of them", "containment", "IoU", "95 %"]
    assert [row[:5] for row in table.rows] == [["learned policy", "2", "0.80", "0.50", "0.50"],
                                               ["noun rule", "-", "-", "-", "0.30"]]


def test_behaviour_table_by_hand():
    found = {"crop =1": [1, 0, np.nan], "help =1": [0, 0, np.nan], "hurt =1": [1, 0, np.nan],
             "same =1": [0, 1, np.nan], **{f"{fact} >1": [np.nan] * 3 for fact in ("crop", "help", "hurt", "same")}}
    table = report.behaviour_table(run_of({"policy": found, "full": found}, clusters=[0, 0, 1]))
    # Queries 0 and 1 are of one entity: every resample that has it has both, and the interval is a point.
    assert table.rows[0] == ["learned policy, rank 1", "2", "50.0", "[50.0, 50.0]", "0.0", "[0.0, 0.0]", "50.0",
                             "[50.0, 50.0]", "50.0"]
    assert table.rows[1] == ["learned policy, rank > 1", "0", *"-------"]
    assert table.head[2:] == ["crop %", "95 %", "help %", "95 %", "hurt %", "95 %", "no change %"]


def test_table_as_text_markdown_latex():
    table = tables.Table("t", "Title", ["name", "n"], [["a|b <i>&_%", "1.0"], ["c\n^~\\", "22"]], "See 5 %.")
    assert tables.as_text(dataclasses.replace(table, rows=[["ab", "1.0"]])).splitlines() == [
        "Title", "name    n", "---------", "ab    1.0"]
    assert tables.plain("a\x1b[31m\ud800\tb\nc") == "a [31m b c"
    assert tables.as_markdown(table).splitlines() == [
        "**Title.** See 5 %.", "", "| name | n |", "|---|---:|", "| a\\|b &lt;i&gt;&amp;_% | 1.0 |", "| c ^~\\ | 22 |"]
    latex = tables.as_latex(table)
    assert r"a$|$b $<$i$>$\&\_\% & 1.0 \\" in latex
    assert r"c \textasciicircum{}\textasciitilde{}\textbackslash{}" in latex
    assert r"\begin{tabular}{lr}" in latex and r"See 5 \%." in latex and r"\midrule" in latex


def test_every_number_has_one_form():
    """Rates in per cent, MRR and recalls as fractions, whatever the table."""
    assert [tables.shown(v) for v in (None, np.nan, .12345)] == ["-", "-", "0.123"]
    assert [tables.shown(.3124, m) for m in ("R@1", "CondR@1", "crop >1", "MRR", "iou")] == [
        "0.312", "0.312", "31.2", "0.312", "0.31"]
    assert tables.shown(.5, "crop", sign=True) == "+50.0" and tables.span((np.nan, np.nan)) == "-"
    assert [tables.head(c) for c in ("R@1", "95 R@1", "CondR@1", "same =1")] == ["R@1", "95 %", "CondR@1",
                                                                                "no change %"]
    assert [tables.p_text(p) for p in (np.nan, .0001, .0123)] == ["-", "< 0.001", "0.012"]
    assert [report.label(n) for n in ("policy", "policy+best4", "full@clip", "EchoSight", "retrieval/full")] == [
        "learned policy", "learned policy + best4", "full image, clip", "EchoSight", "full image"]


def test_pick_by_hand():
    """q0 fixed by a crop, q1 kept where the crop would have lost, q2 kept where it would not, q3 harmed, q4 still
    wrong with a crop, q5 has no positive."""
    def values(rank, crop=(1, 0, 0, 1, 1, 1)):
        return {"rank": rank, "crop": crop, "CondR@1": [0, 0, 0, 0, 0, np.nan]}
    run = run_of({"full": values([3, 1, 1, 1, 2, 5]), "policy": values([1, 1, 1, 2, 2, 5]),
                  "always": values([1, 4, 1, 2, 3, 5])})
    assert [chosen for _, chosen in plots.pick(run, 2)] == [[0], [1], [3], [4]]
    assert plots.pick(run, 2)[1][0].endswith("first place: 1 of 5")
    many = run_of({"full": values([3] * 6, [1] * 6), "policy": values([1] * 6, [1] * 6)})
    assert plots.pick(many, 2)[0][1] == [0, 2]  # evenly spaced over the five, not the first two


# ------------------------------------------------------------------------------------------------------------ the page

class Reader(HTMLParser):
    """What a browser would do with the page: tags must close in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [tag] if tag not in ("img", "meta") else []

    def values(self, attribute):
        return [given[attribute] for _, given in self.tags if attribute in given]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    """report/ of the drawn run with two ablations and a bench file: (out folder, page, reader)."""
    folder, queries, run = world
    rng, runs = np.random.default_rng(7), []
    for name, weights in (("plain-seed1", [.2, .2, .2, .4]), ("nomargin-seed0", [.3, .3, .4, 0])):
        runs.append(folder / "runs" / "ablation" / name)
        write_rows(runs[-1] / "eval" / "test.policy.jsonl", rows_of(queries, rng, .5, .3))
        write_json(str(runs[-1] / "eval" / "metrics.json"), {})
        write_json(str(runs[-1] / "config.json"), {"args": {"seed": int(name[-1]), "balance": "force", "queries": 16,
                                                            "reward": "delta", "reward_weights": weights}})
    bench = folder / "gpu.json"
    write_json(str(bench), {"cases": {"act": {"median_s": {"batch 1 free": 1.0}, "peak_bytes": {"batch 1 free": 1e6}}}})
    out = tmp_path_factory.mktemp("out")
    make(run, "--out", out, "--bench", bench, "--runs", *runs, folder / "runs" / "ablation" / "unfinished-seed0")
    page = (out / "report.html").read_text(encoding="utf-8")
    return out, page, Reader(page)


def test_page_is_whole(written):
    out, page, reader = written
    assert reader.open == [] and reader.values("id") == [  # what catches the eye comes right under the headline
        "curve", "table3", "claims", "sanity", "table1", "table2", "tests", "table4", "kinds", "extensions", "table5",
        "figure2",
        "table6", "table7", "table8", "table9", "training", "pools", "run"]
    assert set(reader.values("href")) == {f"#{name}" for name in reader.values("id")}
    for address, words in zip(reader.values("src"), reader.values("alt"), strict=True):
        head, _, content = address.partition(";base64,")  # in the page, can be decoded, and says what it shows
        assert head in ("data:image/png", "data:image/jpeg") and words
        Image.open(io.BytesIO(base64.b64decode(content))).load()
    text = "".join(reader.text)
    assert "unfinished-seed0 is not in Table 5" in text and "nomargin" in text and "gpu" in text
    assert {"tables.txt", "tables.md", "table1.tex", "table5.tex", "claims.tex", "figure2.png",
            "figure2_without.png", "curve_mrr.png", "training_reward.png",
            "test.policy.csv"} <= {path.name for path in out.iterdir()}
    # The queries of a training step and those that were evaluated are told apart.
    evaluation, training = text[text.index("Evaluation: metrics.json"):].split("Training: config.json")
    assert "".join(evaluation.split("queries")[1].split()).startswith(str(Q))
    assert "".join(training.split("queries")[1].split()).startswith("16")


def test_what_few_want_is_folded(written):
    """The paired tests, the kinds, Table 9 and all but the first query of each kind; no picture is on the page twice."""
    _, page, reader = written
    parts = dict(part.split('"', 1) for part in page.split('<section id="')[1:])
    assert [name for name, part in parts.items() if "<details>" in part] == ["sanity", "tests", "kinds", "table9", "run"]
    for name in ("sanity", "tests", "kinds", "table9", "run"):  # no table but in what a click opens
        assert parts[name].index("<details>") < parts[name].index("<table")
    made = [plots.Case(group, f"q{k}", "", []) for k, group in enumerate("aabbbc")]
    found = report.split_cases(made)
    assert [[case.words for case in found[part]] for part in ("cases", "more")] == [["q0", "q2", "q5"],
                                                                                   ["q1", "q3", "q4"]]
    assert report.split_cases([]) == {"cases": [], "more": []}


def test_every_query_that_was_picked_is_on_the_page(world, tmp_path):
    make(world[2], "--out", tmp_path, "--examples", 3)
    run = report.open_run(report.parse_args(["--run", str(world[2]), "--resamples", "100"]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    part = page[page.index('id="table3"'):page.index('id="claims"')]
    chosen = [rows for _, rows in plots.pick(run, 3)]
    assert part.count('<div class="case">') == sum(map(len, chosen)) > len(chosen)
    assert part[:part.index("<details>")].count('<div class="case">') == len([rows for rows in chosen if rows])


def test_a_picture_is_shown_once(world):
    """The first before, the first after and the positive are often one entity: it has one picture and both scores."""
    run = report.open_run(report.parse_args(["--run", str(world[2]), "--resamples", "100"]))
    data = report.open_data(run)
    for i in range(Q):
        captions = [caption for caption, _ in plots.case(run, data, i, "").views if "(right)" in caption
                    or "(wrong)" in caption]
        assert len(captions) == len(set(plots.places(run, i)))
        assert [caption.startswith("first before") for caption in captions] == [True] + [False] * (len(captions) - 1)
        full, row = (run.rows[name][i] for name in ("full", "policy"))
        k = plots.places(run, i)[0]
        score = f"{full['scores'][k]:.3f}" + ("" if row["decision"] == "FULL" else f" → {row['scores'][k]:.3f}")
        assert captions[0].endswith(score)
        same = len(set(plots.places(run, i)[:2])) == 1
        assert captions[0].startswith("first before and after (" if same else "first before (")
        assert same or captions[1].startswith("first after (")
    shown = {case.soft for case in plots.pools(run, data, 30)}
    assert shown and not shown & {data.queries[i].query_id for _, rows in plots.pick(run, 30) for i in rows}


def test_picture_of_a_query_without_a_true_box(copy, world):
    """truth.jsonl may name a part of the queries."""
    change(copy / "eval" / "test.truth.jsonl", lambda rows: [{**row, "decision": "FULL", "box": None} if i % 2 else row
                                                             for i, row in enumerate(rows)])
    run = report.open_run(report.parse_args(["--run", str(copy), "--resamples", "100", "--data", f"{world[0]}/data"]))
    data = report.open_data(run)
    first = [plots.case(run, data, i, "").views[0][0] for i in range(Q)]
    assert [("true box" in caption) for caption in first] == [i % 2 == 0 for i in range(Q)]


def test_threshold_is_told_of_the_learned_policy_alone(world):
    run = report.open_run(report.parse_args(["--run", str(world[2]), "--resamples", "100"]))
    run.metrics["threshold"] = .7
    assert "the learned one's at threshold 0.7, the base's at 0.5." in plots.curve_plots(run, report.label)[0].caption


def test_validation_is_drawn_from_step_0(monkeypatch):
    """Step -1 of the log is the policy before training: x = 0. Step 9's validation came after 10 steps: x = 10."""
    run, lines = run_of(paper_like()), {}
    run.log = [{"step": -1, "val_mrr": .2}, *({"step": k, "reward": k, **({"val_mrr": .5} if k == 9 else {})}
                                              for k in range(10))]
    monkeypatch.setattr(plots, "drawn", lambda figure, name, caption, legend: lines.update(
        {name: [line.get_xdata().tolist() for line in figure.axes[0].lines]}))
    plots.training_plots(run)
    assert lines == {"training_validation": [[0, 10]], "training_reward": [list(range(1, 11))]}


def test_the_page_fits_a_phone_and_the_night(written):
    page = written[1]
    style = page[page.index("<style>"):page.index("</style>")]
    dark = style[style.index("prefers-color-scheme: dark"):style.index("* { box-sizing")]
    assert ".plots img { filter: invert(1)" in dark
    assert "td:first-child { position: sticky; left: 0;" in style and "#fff;" not in style.replace("#ffffff", "")
    wide = page.count('<p class="soft hint">')
    assert wide == sum(part[:part.index("</thead>")].count("<th>") > 4 for part in page.split("<table ")[1:])


def test_page_runs_and_loads_nothing(written):
    """Titles, questions, ids and the run's own name hold tags and quotes; all of it stays text, in every format."""
    out, page, reader = written
    assert not {"script", "link", "iframe", "object", "form", "base", "svg"} & {tag for tag, _ in reader.tags}
    assert not [name for _, given in reader.tags for name in given if name.startswith("on")]
    assert "http" not in page and "url(" not in page and "@import" not in page
    text = " ".join("".join(reader.text).split())
    assert " ".join(f"What {EVIL} is".split()) in text and "Region-R1: a run & more" in text
    titles = [words for words in reader.values("alt") if words.startswith("positive")]
    assert titles and all("<script>alert(1)</script> & \"quoted\" 'too'" in title for title in titles)
    assert "<script>" not in (out / "tables.md").read_text(encoding="utf-8")
    body = (out / "table3.tex").read_text(encoding="utf-8")
    assert r"\$x\_1\$" in body and r"\textbackslash{}" in body


def test_csv_has_the_columns_of_the_release(written, world):
    with open(written[0] / "test.policy.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    rows = tool_rows.read_rows(str(world[2] / "eval"), "test")
    after, before = (metrics(*([row[f] for row in rows[name]] for f in ("scores", "labels")), ks=())
                     for name in ("policy", "full"))
    assert ",".join(found[0]) == (
        "example_idx,query_id,question,has_bbox,bbox,num_candidates,original_rank,cropped_rank,rank_improvement,"
        "original_mrr,cropped_mrr,mrr_improvement,original_ndcg,cropped_ndcg,ndcg_improvement,generated_text")
    for i, line in enumerate(found):
        box = rows["policy"][i]["box"]
        assert (line["query_id"], line["has_bbox"], line["bbox"]) == (f"q{i}{EVIL}", str(box is not None),
                                                                     str(box or ""))
        for column, ranks in (("cropped_rank", after["rank"]), ("original_rank", before["rank"])):
            assert line[column] == (str(ranks[i]) if any(LABELS[i]) else "")  # no positive: no rank
        assert float(line["mrr_improvement"]) == after["rr"][i] - before["rr"][i]
        assert float(line["cropped_ndcg"]) == after["ndcg"][i] and line["generated_text"] == "said"


def test_report_json_holds_the_numbers(written):
    out, page, _ = written
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    policy = found["means"]["policy"]
    assert (policy["MRR"]["n"], policy["CondR@1"]["n"]) == (Q, Q - 4)  # pools without a positive: 5, 11, 17, 23
    assert policy["MRR"]["interval"][0] < policy["MRR"]["mean"] < policy["MRR"]["interval"][1]
    assert (found["queries"], found["entities"]) == (Q, E) and len(found["claims"]) == 11
    assert {claim["verdict"] for claim in found["claims"] + found["sanity"]} <= {"holds", "fails", "cannot be told"}
    full, policy, best = (found["means"][name]["CondR@1"]["mean"] for name in ("full", "policy", "best16"))
    assert f"<b>{100 * (policy - full) / (best - full):.0f} %" in page


def test_same_rows_same_bytes(world, written, tmp_path):
    """And nothing of an earlier report stays beside it: it would pass for this one's."""
    shutil.copytree(written[0], tmp_path / "two")
    (tmp_path / "two" / "mine.png").touch()  # of somebody else
    for name in ("one", "two"):
        make(world[2], "--out", tmp_path / name)
    assert not {"table5.tex", "figure2_without.png"} & {path.name for path in (tmp_path / "two").iterdir()}
    assert (tmp_path / "two" / "mine.png").exists()
    for file in ("report.html", "report.json", "tables.txt", "figure2.png", "curve_mrr.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    make(world[2], "--out", tmp_path / "two", "--tables-only")
    assert {path.suffix for path in (tmp_path / "two").iterdir()} == {".txt", ".md", ".tex", ".csv", ".json", ".png"}
    assert [path.name for path in (tmp_path / "two").glob("*.png")] == ["mine.png"]


def test_without_data_and_with_a_lost_picture(tmp_path):
    """No data folder: no pictures, and the reason stands on the page. A lost picture costs its own query alone."""
    run = write_run(tmp_path / "moved", write_data(tmp_path / "moved"))
    for path in (tmp_path / "moved" / "raw").iterdir():
        if path.name != "0.png":
            path.unlink()
    make(run)
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert ".png is missing" in page and "data:image/jpeg" not in page
    (tmp_path / "moved" / "data" / "manifest.json").unlink()
    make(run)
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "no pictures and titles:" in page and "data:image/jpeg" not in page and "candidate 3" in page


@pytest.mark.filterwarnings("error")  # matplotlib warns of a plot without anything in it
@pytest.mark.parametrize("keep", [lambda rows: rows[:1], lambda rows: rows[:2],
                                  lambda rows: [row | {"labels": [0] * K} if "labels" in row else row for row in rows],
                                  lambda rows: [row | {"labels": [1] * K} if "labels" in row else row for row in rows]])
def test_few_queries(copy, keep):
    for path in (copy / "eval").rglob("*.jsonl"):
        change(path, keep)
    make(copy)


def test_marked_box_is_where_the_box_is():
    """Box (4, 2, 10, 8), exclusive: the line is light at column 4 and at column 9, and column 10 is untouched."""
    image = Image.new("RGB", (20, 12), (10, 20, 30))
    shown = plots.marked(image, (4.0, 2.0, 10.0, 8.0))
    assert shown.getpixel((4, 5)) == shown.getpixel((9, 5)) == shown.getpixel((6, 7)) == (255, 200, 0)
    assert shown.getpixel((10, 5)) == shown.getpixel((3, 5)) == shown.getpixel((6, 8)) == (10, 20, 30)
    assert image.getpixel((4, 5)) == (10, 20, 30)  # the caller's image stays


def test_both_halves_of_figure_2_have_the_same_axes(monkeypatch):
    values, limits = paper_like(), []
    values["full"]["margin"] = np.linspace(-.2, .2, 60)
    values["policy"] |= {"crop": np.ones(60), "margin": values["full"]["margin"] + .1}
    monkeypatch.setattr(plots, "drawn", lambda figure, name, caption: limits.append(
        (figure.axes[0].get_xlim(), figure.axes[0].get_ylim())))
    plots.margin_plots(run_of(values), {"crop": np.ones(60), "margin": values["full"]["margin"] + .4})
    assert len(limits) == 2 and limits[0] == limits[1]
