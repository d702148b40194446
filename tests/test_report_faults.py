"""Faults of tools/report.py that a reading found: each test failed before its mend."""

import json
import os

import pytest
from test_report import copy_run, margin_study, world, write_data, write_run  # noqa: F401

from tools import report


@pytest.mark.parametrize("numbers, verdict", [
    ((-.005, -.0105, -.0005, .01), "cannot be told"),  # surely worse, but by more than .01? it may be or not
    ((-.0105, -.02, -.001, .01), "cannot be told"), ((-.1, -.15, -.05, .01), "does not hold")])
def test_not_worse_by_more_than_the_slack(numbers, verdict):
    claim = report.Claim("", "MRR", slack=.01)
    claim.difference, claim.low, claim.high, claim.p_holm = numbers
    assert claim.verdict == verdict


def test_tables_only_leaves_no_page_of_an_earlier_report(world, tmp_path):
    run = copy_run(world, tmp_path)[0]
    report.main(["--run", str(run), "--resamples", "100"])
    assert os.path.isfile(run / "report" / "report.html")
    report.main(["--run", str(run), "--resamples", "100", "--tables-only"])
    assert not os.path.isfile(run / "report" / "report.html")


def cut(run, keep):
    for path in (run / "eval").rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in keep(rows)))


@pytest.mark.parametrize("keep", [lambda rows: rows[:1], lambda rows: rows[:2],
                                  lambda rows: [{**row, "labels": [0] * len(row["labels"])} for row in rows],
                                  lambda rows: [{**row, "labels": [1] * len(row["labels"])} for row in rows]])
def test_few_queries(world, tmp_path, keep):
    run = copy_run(world, tmp_path)[0]
    cut(run, keep)
    result = json.loads((run / "eval" / "metrics.json").read_text())
    (run / "eval" / "metrics.json").write_text(json.dumps({**result, "curve": {}}))
    report.main(["--run", str(run), "--resamples", "100"])


def test_margin_runs_may_differ_in_what_changes_no_weight():
    """--tensorboard on the main run alone: the ablations are still the same training."""
    study = margin_study((.50, .51, .52))
    study.config["args"] = {**study.config["args"], "tensorboard": True, "save_every": 7}
    assert report.claims(study)[11].verdict == "holds"
