"""Faults of train.py that a reading found: each test failed before its mend."""

import pytest
import torch
from test_train import flags, home  # noqa: F401

import train


def test_state_that_finds_no_memory_is_not_called_unfit(tmp_path, monkeypatch):
    """CUDA's out-of-memory error is a RuntimeError: a sound state.pt must not be blamed for a full card."""
    torch.save({"step": 1}, tmp_path / "state.pt")

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train.load_state(tmp_path / "state.pt", type("P", (), {"device": "cpu"}), None)


def test_resume_with_another_text_in_the_prompt_file(home, tmp_path):
    from scorer import load_data
    (tmp_path / "prompt.txt").write_text("Crop or not?")
    args = train.parse_args(flags(home, tmp_path / "run", "--system-prompt", str(tmp_path / "prompt.txt")))
    data = load_data(args.data, "train")
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.pt").write_bytes(b"")
    train.write_json(run / "config.json", train.describe_run(args, data))
    assert train.check_run(run, train.describe_run(args, data), True) == "state"
    (tmp_path / "prompt.txt").write_text("Never crop.")
    with pytest.raises(ValueError, match="system-prompt"):
        train.check_run(run, train.describe_run(args, data), True)


def test_log_level_warning_prints_no_step(home, tmp_path, capsys):
    train.main(flags(home, tmp_path / "run", "--log-level", "warning"))
    printed = capsys.readouterr().out
    assert "step 1/" not in printed and (tmp_path / "run" / "log.jsonl").read_text().count("\n") > 0
    train.main(flags(home, tmp_path / "second"))
    assert "step 1/" in capsys.readouterr().out
