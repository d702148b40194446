"""tools/readings.py and what it adds to tools/stats.py: numbers over several runs of one reading, by hand.

Four queries about two entities, K = 2, every first candidate is the positive: a score above .5 is rank 1 (reciprocal
rank 1), one below is rank 2 (1/2). The second candidate always has .5.
"""

import json

import numpy as np
import pytest

from scorer import InputError, write_json
from tools import readings, stats, tables

FULL = (0, 0, 0, 0)  # nowhere right: MRR 1/2


def write_run(folder, first, log=(), pools=((1, 0),) * 4):
    """An evaluated run whose policy has the positive in first place where `first` says so."""
    (folder / "eval").mkdir(parents=True)
    for name, right in (("full", FULL), ("policy", first)):
        rows = [{"query_id": f"q{i}", "positives": [f"e{i // 2}"], "decision": "REGION" if name == "policy" else "FULL",
                 "box": None, "scores": [.9 if r else .1, .5], "labels": list(labels), "iou": .5}
                for i, (r, labels) in enumerate(zip(right, pools))]
        (folder / "eval" / f"test.{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(str(folder / "eval" / "metrics.json"), {"split": "test"})
    if log:
        (folder / "log.jsonl").write_text("".join(json.dumps({"step": s, "val_mrr": v}) + "\n" for s, v in log))
    return str(folder)


def table(capsys, *arguments):
    readings.main(list(arguments))
    lines = capsys.readouterr().out.splitlines()
    return lines, {line[:20].split("  ")[0]: line for line in lines}


def test_two_readings_by_hand(tmp_path, capsys):
    """runs: MRR 1 and 3/4, mean 7/8. against: 1/2 twice. Entity 0 (q0, q1) gains 1/2 in each run, entity 1 in the first
    alone: pooled 1 and 3/4, so its mean is 1, 7/8 or 3/4 as entities are drawn. Of the 4 signs of two entities half are
    as extreme: p is about 1/2."""
    a = [write_run(tmp_path / "a0", (1, 1, 1, 1), [(-1, .2), (9, .6)]),
         write_run(tmp_path / "a1", (1, 1, 0, 0), [(-1, .2)])]
    b = [write_run(tmp_path / f"b{k}", FULL, [(-1, .2), (4, .2), (9, .4)]) for k in range(2)]
    lines, found = table(capsys, "--runs", *a, "--against", *b, "--resamples", "2000")
    assert lines[0].startswith("policy on test: 4 queries about 2 entities")
    mrr = found["MRR"].split()
    assert mrr[:8] == ["MRR", "0.875", "(0.750-1.000)", "[0.750,", "1.000]", "0.500", "(0.500-0.500)", "[0.500,"]
    assert mrr[9:12] == ["+0.375", "[+0.250,", "+0.500]"] and float(mrr[12]) == pytest.approx(.5, abs=.05)
    assert found["IoU"].split()[1:5] == ["0.50", "(0.50-0.50)", "[0.50,", "0.50]"]
    # The threshold is the second reading's: .2 + .9 * .2 = .38. The first run rises by .04 a step and is there after
    # 4.5 (shown as 4); the other has no curve. The second reading lies still for 5 steps, then climbs .04 a step: 9.5.
    assert found["steps to 0.380"].split()[3:] == ["4,", "1", "without", "10", "(10-10)"]
    assert found["area under it"].split()[3:] == ["0.400,", "1", "without", "0.250", "(0.250-0.250)"]
    lines, found = table(capsys, "--runs", *a, "--threshold", ".5")
    assert found["steps to 0.500"].split()[3:] == ["8,", "1", "without"]  # .2 + 7.5 * .04
    assert "p (Holm)" not in lines[1]


def test_two_methods_of_the_same_runs(tmp_path, capsys):
    run = write_run(tmp_path / "a", (1, 1, 1, 1))
    lines, found = table(capsys, "--runs", run, "--against", run, "--against-method", "full", "--resamples", "2000")
    assert lines[0].startswith("policy against full on test") and found["MRR"].split()[7] == "+0.500"


def test_curve_numbers_by_hand():
    """Steps 0, 10, 30 with .2, .4, .3: area ((.3 * 10) + (.35 * 20)) / 30 = 1/3. .3 is reached half-way to 10."""
    log = [{"step": 29, "val_mrr": .3}, {"step": -1, "val_mrr": .2}, {"step": 5, "reward": 1.0},
           {"step": 9, "val_mrr": .4}]
    found = stats.curve_numbers(log, .3)
    assert (found["end"], found["area"], found["steps"]) == pytest.approx((.3, 1 / 3, 5))
    assert stats.curve_numbers(log, .1)["steps"] == 0 and np.isnan(stats.curve_numbers(log, .5)["steps"])
    assert np.isnan(list(stats.curve_numbers(log[1:3], .3).values())).all()  # one validation is no curve
    assert stats.nine_tenths([log, log[:1]]) == pytest.approx(.2 + .9 * .1) and stats.nine_tenths([[]]) is None
    # A resumed run may tell of a step twice: the later line counts.
    assert stats.curve_numbers([*log, {"step": 29, "val_mrr": .6}], .3)["end"] == .6


def test_pooling_and_ranges():
    pooled = stats.pooled([{"a": np.array([1, 2, np.nan])}, {"a": np.array([3, np.nan, np.nan])}])["a"]
    assert pooled[0] == 2 and np.isnan(pooled[1:]).all()
    assert [tables.ranged(values, measure) for values, measure in (
        ([.5, .7], "MRR"), ([.5], "crop >1"), ([.5, np.nan], "iou"), ([np.nan], "MRR"))] == [
        "0.600 (0.500-0.700)", "50.0", "0.50, 1 without", "-"]


def test_runs_that_do_not_belong_together(tmp_path):
    runs = [write_run(tmp_path / "a", FULL), write_run(tmp_path / "b", FULL, pools=((0, 1),) * 4)]
    with pytest.raises(SystemExit, match="tools.readings: .*b/eval/test.full.jsonl:1: query 'q0' does not match"):
        readings.main(["--runs", *runs])
    with pytest.raises(SystemExit, match="no.method.jsonl is missing|test.best.jsonl is missing"):
        readings.main(["--runs", runs[0], "--method", "best"])
    with pytest.raises(SystemExit) as error:
        readings.main(["--runs", runs[0], "--resamples", "100"])
    assert error.value.code == 2
    with pytest.raises(InputError, match="give 220 or more"):  # 11 / 221 is just below .05
        stats.Study({"a": {"x": np.ones(9)}, "b": {"x": np.zeros(9)}}, np.arange(9), 200).compare(
            [(("a", "x"), ("b", "x"))] * 11)
