"""What a training run survives: kill -9 at every place where it writes, a second process, signals, full disks, damaged
and hostile files; and what it notices of its own sickness.

A killed run is a forked child that kills itself at a chosen point: no handler, no `finally`, as from outside.
"""

import json
import math
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import policy as policy_file
import scorer as scorer_file
import train
from policy import Action
from scorer import load_data, load_scorer
from test_train import flags, home, new_policy, refused, torchrun, weights  # noqa: F401 (home is a fixture)

STEPS, EVERY = 6, 2  # steps of a run, and between two states
LIVE = ("seconds", "memory_mb")  # what differs between two equal runs


def command(home, run, *more):
    """Six steps, dropout on (so that draws matter), evaluated once in the middle."""
    return flags(home, run, "--steps", str(STEPS), "--save-every", str(EVERY), "--eval-every", "3", "--dropout", "0.2",
                 *more)


def read_log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in LIVE} for line in lines]


@pytest.fixture(scope="session")
def unbroken(home):  # noqa: F811
    train.main(command(home, home / "unbroken"))
    return home / "unbroken"


def child(arguments, prepare=lambda: None):
    """train.main in a forked child after `prepare()`; its exit code, -9 when it was killed."""
    def work():
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        # tqdm's lock is a semaphore that a fork shares: a child killed while it draws a bar would keep it for good, and
        # this process would wait for it when it next loads a model.
        tqdm.set_lock(threading.RLock())
        prepare()
        train.main(arguments)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        pytest.fail("the child hangs")
    return process.exitcode


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name, count, before=die, after=lambda *_, **__: None):
    """A `prepare` for `child`: the `count`-th call of owner.name is preceded by `before` and followed by `after`."""
    def prepare():
        whole, calls = getattr(owner, name), []

        def counted(*arguments, **more):
            calls.append(1)
            if len(calls) == count:
                before(*arguments, **more)
            result = whole(*arguments, **more)
            if len(calls) == count:
                after(*arguments, **more)
            return result

        setattr(owner, name, counted)
    return prepare


def nothing(*_, **__):
    pass


def half_a_file(path, content, *_):
    """Kill in the middle of writing `content` to `path`."""
    Path(path).open("wb").write(bytes(content)[:len(content) // 2])
    die()


def half_a_line(path, rows):
    """Kill when the last of these lines is on the disk up to its middle."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text[:-len(text) // (3 * len(rows))])
    die()


def half_an_adapter(_, folder):
    """Kill when both of the adapter's files are there under their temporary names, cut short."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / f"{name}.tmp").write_bytes(b"{" * 100)
    die()


def same_run(run, other):
    """Adapter, log (but for times) and samples are equal, and nothing else lies about."""
    assert read_log(run) == read_log(other)
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert weights(run) == weights(other)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (run, other)]
    assert names[0] == names[1] and not [name for name in names[0] if name.endswith(".tmp")]


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

# os.replace, in order: config.json, a state after steps 2, 4 and 6, adapter_config.json, adapter_model.safetensors.
KILLS = {
    **{f"before rename {n}": at(os, "replace", n) for n in range(1, 7)},
    **{f"after rename {n}": at(os, "replace", n, nothing, die) for n in (1, 3, 5, 6)},
    **{f"half of state {n}": at(Path, "write_bytes", n, half_a_file) for n in (1, 2)},
    # Two calls a step, log and samples: the calls 5 and 6 are those of the third step, whose state is not saved.
    **{f"half a line {n}": at(train, "append", n, half_a_line) for n in (1, 5, 6)},
    **{f"between log and samples {n}": at(train, "append", 2 * n) for n in (1, 4)},
    **{f"before reward {n}": at(train, "reward_groups", n) for n in (1, 6)},
    **{f"in update {n}": at(torch.optim.AdamW, "step", n, nothing, die) for n in (3, 4)},
    "before the adapter": at(policy_file.Policy, "save_adapter", 1),
    "half of the adapter": at(policy_file.Policy, "save_adapter", 1, half_an_adapter),
}


@pytest.mark.parametrize("point", KILLS)
def test_killed_run_goes_on_as_if_nothing_had_been(home, unbroken, tmp_path, point):  # noqa: F811
    run = tmp_path / "run"
    assert child(command(home, run), KILLS[point]) == -signal.SIGKILL
    whole = (run / ADAPTER).exists()
    assert whole == (point == "after rename 6")  # no earlier moment leaves something that looks finished
    train.main(command(home, run, "--resume"))
    same_run(run, unbroken)


ADAPTER = "adapter/adapter_model.safetensors"


def test_killed_while_a_resume_cuts_the_log_back(home, unbroken, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    assert child(command(home, run), at(train, "append", 6)) == -signal.SIGKILL  # log: 3 lines, state: 2 steps
    for rename in (1, 2, 3):  # config.json, log.jsonl, samples.jsonl
        assert child(command(home, run, "--resume"), at(os, "replace", rename)) == -signal.SIGKILL
        assert child(command(home, run, "--resume"), at(os, "replace", rename, nothing, die)) == -signal.SIGKILL
    train.main(command(home, run, "--resume"))
    same_run(run, unbroken)


def test_killed_again_and_again_at_any_time(home, unbroken, tmp_path):  # noqa: F811
    """A timer, not a place: whatever it hits, the end is the same. The delays grow, so that later places are hit."""
    run, draw, deaths = tmp_path / "run", random.Random(0), 0
    for turn in range(20):
        delay = draw.uniform(0.01, 0.05 + 0.05 * turn)
        # setitimer's signal without a handler ends the process at once, as SIGKILL does.
        code = child(command(home, run, "--resume"), lambda delay=delay: signal.setitimer(signal.ITIMER_REAL, delay))
        assert code in (0, -signal.SIGALRM)
        deaths += code != 0
        if code == 0:
            break
    assert deaths >= 3
    train.main(command(home, run, "--resume"))
    same_run(run, unbroken)


def test_killed_child_takes_no_lock_along():
    tqdm.get_lock()  # made here, before the fork

    def killed_while_it_draws():
        tqdm.get_lock().acquire()
        die()

    assert child([], killed_while_it_draws) == -signal.SIGKILL
    assert all(lock.acquire(True, 5) for lock in tqdm.get_lock().locks)
    tqdm.get_lock().release()


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_second_process_on_a_run_is_refused_until_the_first_is_dead(home, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    first = multiprocessing.get_context("fork").Process(target=lambda: hold_run(run))
    first.start()
    while not (run / "lock").exists() or not (run / "lock").read_text().endswith("\n"):
        time.sleep(0.01)
    message = refused(*command(home, run))
    assert f"is in use by process {first.pid} on" in message and "--run" in message
    assert {path.name for path in run.iterdir()} == {"lock"}  # the refused one has written nothing
    first.kill()  # kill -9: nobody tidies up, and still the lock is free
    first.join()
    with train.only_writer(run):
        assert (run / "lock").read_text().startswith(f"process {os.getpid()} ")


def hold_run(run):
    with train.only_writer(run):
        time.sleep(60)


def test_lock_is_free_again_after_an_error_and_on_disks_without_locks(tmp_path, monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError), train.only_writer(tmp_path):
        1 / 0
    with train.only_writer(tmp_path):
        with pytest.raises(ValueError, match="in use by process"), train.only_writer(tmp_path):
            pass

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(scorer_file.fcntl, "flock", unsupported)
    with train.only_writer(tmp_path):
        assert "cannot be locked" in capsys.readouterr().err


# ---- signals ---------------------------------------------------------------------------------------------------------


def send(*numbers):
    def sent(*_, **__):
        for number in numbers:
            os.kill(os.getpid(), number)
    return sent


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_exits(home, unbroken, tmp_path, number, code):  # noqa: F811
    run = tmp_path / "run"
    # The third step: not one after which the state is saved anyway.
    assert child(command(home, run), at(train, "sample_groups", 3, send(number))) == code
    assert len(read_log(run)) == 3 and not (run / "adapter").exists()
    assert torch.load(run / "state.pt", weights_only=True)["step"] == 3
    assert child(command(home, run, "--resume")) == 0
    same_run(run, unbroken)


@pytest.mark.parametrize("numbers, code", [((signal.SIGTERM, signal.SIGTERM), -signal.SIGTERM),
                                           ((signal.SIGTERM, signal.SIGINT), 130)])
def test_second_signal_stops_at_once(home, tmp_path, numbers, code):  # noqa: F811
    run = tmp_path / "run"
    assert child(command(home, run), at(train, "sample_groups", 3, send(*numbers))) == code
    assert len(read_log(run)) == 2  # the third step is not finished


def test_signal_in_the_last_step_lets_the_run_finish(home, unbroken, tmp_path):  # noqa: F811
    assert child(command(home, tmp_path / "run"), at(train, "sample_groups", STEPS, send(signal.SIGTERM))) == 0
    same_run(tmp_path / "run", unbroken)


def test_stopped_run_says_how_to_go_on(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    whole = train.train_step
    monkeypatch.setattr(train, "train_step", lambda step, *rest: (send(signal.SIGINT)() if step == 1 else None,
                                                                  whole(step, *rest))[1])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        train.main(command(home, tmp_path / "run"))
    assert stopped.value.code == 130
    assert "stopped after step 2 of 6 (SIGINT)" in (said := capsys.readouterr().err) and "--resume" in said
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    # While it loads there is nothing to save.
    monkeypatch.setattr(train, "open_policy", lambda args: send(signal.SIGINT)())
    with pytest.raises(SystemExit) as stopped:
        train.main(command(home, tmp_path / "other"))
    assert stopped.value.code == 130 and "stopped at once" in capsys.readouterr().err


def test_threads_do_not_listen(tmp_path):
    """signal.signal is for the main thread alone; a notebook that trains in another one still trains."""
    heard = []

    def work():
        with train.listening() as signals:
            heard.append(signals)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [[]]


def test_torchrun_that_is_told_to_end_leaves_a_whole_state(home, tmp_path):  # noqa: F811
    """Both processes end after the same step, though the signals reach them at different times."""
    run, steps = tmp_path / "run", 2000
    arguments = flags(home, run, "--steps", str(steps), "--eval-every", "0", "--save-every", "5000")
    whole = subprocess.run

    def tell(line, **more):
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=more["env"])
        while not (run / "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=300)
        return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)

    subprocess.run = tell
    try:
        ended = torchrun(2, arguments)
    finally:
        subprocess.run = whole
    assert ended.returncode != 0 and "(SIGTERM)" in ended.stderr and "--resume" in ended.stderr
    done = torch.load(run / "state.pt", weights_only=True)["step"]
    assert 0 < done < steps and [line["step"] for line in read_log(run)] == list(range(done))


# ---- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl", "state.pt.tmp", "adapter/adapter_config.json.tmp"])
def test_full_disk_loses_nothing_that_was_whole(home, unbroken, tmp_path, name):  # noqa: F811
    """The file is a link to /dev/full, which takes nothing: 'No space left on device'."""
    run = tmp_path / "run"
    assert child(command(home, run), at(train, "sample_groups", 4)) == -signal.SIGKILL  # state: 2 steps, log: 3
    kept = (run / "state.pt").read_bytes()
    link = run / name
    link.parent.mkdir(exist_ok=True)
    before = link.read_bytes() if link.exists() else None
    if before is None:
        link.symlink_to("/dev/full")
        message = refused(*command(home, run, "--resume"))
    else:  # a log is cut back by a rename, which would replace the link: the disk fills up in the first step
        def fill():
            link.unlink()
            link.symlink_to("/dev/full")
        full = at(train, "sample_groups", 1, nothing, lambda *_, **__: fill())
        assert child(command(home, run, "--resume"), full) == 1
        message = said(lambda: train.append(link, [{"step": 2}]))
    assert name.removesuffix(".tmp").split("/")[0] in message and "No space left" in message and "--resume" in message
    if name != "adapter/adapter_config.json.tmp":  # there all steps were done, and saved
        assert (run / "state.pt").read_bytes() == kept
    link.unlink()
    if before is not None:
        link.write_bytes(before)
    train.main(command(home, run, "--resume"))
    same_run(run, unbroken)


def said(call):
    with pytest.raises(OSError) as failed:
        call()
    return str(failed.value)


def test_disk_that_is_too_small(home, unbroken, tmp_path):  # noqa: F811
    """A real one: a memory file system that has room for some steps, then grows."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in unbroken.rglob("*") if path.is_file())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * .7) // 4096 * 4}k", "tmpfs", str(disk)],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount")
    try:
        run = disk / "run"
        message = refused(*command(home, run))
        assert "could not be written" in message and "make room" in message and "--resume" in message
        assert "could not be written" in refused(*command(home, run, "--resume"))  # still full
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        train.main(command(home, run, "--resume"))
        same_run(run, unbroken)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.fixture
def stopped(home, unbroken, tmp_path):  # noqa: F811
    """A run with a state, no adapter."""
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    return tmp_path / "run"


def test_damaged_state_is_refused(home, stopped):  # noqa: F811
    path = stopped / "state.pt"
    whole, draw = path.read_bytes(), random.Random(1)
    for content in (b"", b"junk", whole[:len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert "state.pt is damaged" in refused(*command(home, stopped, "--resume"))
    # A single bit anywhere: either it is noticed, or (in a name, a date, padding) the state is what it was.
    noticed = 0
    wanted = torch.load(stopped_state(path, whole), weights_only=True)
    for _ in range(150):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        taken = SimpleNamespace(device=torch.device("cpu"), lora_parameters=lambda: fresh)
        fresh = [torch.zeros_like(value) for value in wanted["lora"]]
        optimizer = torch.optim.AdamW([torch.nn.Parameter(value) for value in fresh])
        try:
            assert train.load_state(path, taken, optimizer) == STEPS
        except ValueError as error:
            assert "state.pt" in str(error)
            noticed += 1
            continue
        assert all(map(torch.equal, fresh, wanted["lora"]))
    assert noticed > 75


def stopped_state(path, content):
    path.write_bytes(content)
    return path


def test_state_of_another_policy_is_refused(home, stopped):  # noqa: F811
    state = torch.load(stopped / "state.pt", weights_only=True)
    for change in ({"lora": state["lora"][:-1]}, {"lora": [torch.zeros(3, 3), *state["lora"][1:]]}, {"optimizer": {}}):
        torch.save({**state, **change}, stopped / "state.pt")
        assert "does not fit this policy's LoRA" in refused(*command(home, stopped, "--resume"))


class Evil:
    """What unpickling would run: it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_state_that_would_run_code_is_not_unpickled(home, stopped, tmp_path):  # noqa: F811
    torch.save({"step": 2, "lora": Evil(tmp_path / "mark"), "optimizer": {}}, stopped / "state.pt")
    assert "more than numbers" in refused(*command(home, stopped, "--resume"))
    assert not (tmp_path / "mark").exists()
    function, arguments = Evil(tmp_path / "mark").__reduce__()  # the trap does work
    function(*arguments)
    assert (tmp_path / "mark").exists()


def test_config_that_is_no_config_is_refused(home, stopped):  # noqa: F811
    for content in ("", "[]", '{"pools": 1}', "\x00"):
        (stopped / "config.json").write_text(content)
        assert "config.json is not what train.py wrote" in refused(*command(home, stopped, "--resume"))


def test_run_of_before_a_flag_existed_goes_on(home, unbroken, stopped):  # noqa: F811
    config = json.loads((stopped / "config.json").read_text())
    for name in ("encouragement", "encouragement_steps", "init_adapter", "max_kl", "when_sick", "wandb"):
        del config["args"][name]
    (stopped / "config.json").write_text(json.dumps(config))
    assert "other values of encouragement than" in refused(*command(home, stopped, "--resume", "--encouragement", "1"))
    train.main(command(home, stopped, "--resume"))
    same_run(stopped, unbroken)


# ---- sick training ---------------------------------------------------------------------------------------------------


def settings(*more):
    return train.parse_args(["--device", "cpu", *more])


def lines(p_region, zero_advantage=(0.0,), kl=(0.0,), region_rate=0.5):
    """Lines of a log: each list is repeated up to the longest."""
    count = max(map(len, (p_region, zero_advantage, kl)))
    return [{"step": n, "region_rate": region_rate, **{name: values[n % len(values)] for name, values in (
        ("p_region", p_region), ("zero_advantage", zero_advantage), ("kl", kl))}} for n in range(count)]


@pytest.mark.parametrize("recent, found", [
    (lines([0.5] * 20), []),
    (lines([0.0] * 19), []),                             # 19 steps are no 20
    (lines([0.0] * 20), ["all FULL"]),
    (lines([0.0] * 19 + [0.19]), ["all FULL"]),          # mean .0095
    (lines([0.0] * 19 + [0.21]), []),                    # mean .0105
    (lines([1.0] * 19 + [0.81]), ["all REGION"]),        # mean .9905
    (lines([1.0] * 19 + [0.79]), []),                    # mean .9895
    (lines([0.0, 1.0] * 10), []),                        # sure of each query, and not of the same
    (lines([0.5] * 20, [1.0] * 19 + [0.0]), ["zero advantage"]),  # .95
    (lines([0.5] * 20, [1.0] * 18 + [0.0] * 2), []),     # .9 is not above .9
    (lines([0.5], kl=[10.5]), ["kl"]),                   # one step is enough
    (lines([0.5], kl=[9.5]), []),
    (lines([0.5], kl=[10.5, 0.5]), []),                  # the newest counts
    (lines([0.0] * 20, [1.0] * 20, [99.0]), ["kl", "all FULL", "zero advantage"]),
    (lines([None] * 20, region_rate=0.0), []),           # free text with --balance force: the rate is not the policy's
])
def test_sickness(recent, found):
    assert list(train.sickness(recent, settings())) == found


def test_sickness_by_flags():
    unknown = lines([None] * 20, region_rate=1.0)
    assert list(train.sickness(unknown, settings("--balance", "none", "--decode", "free"))) == ["all REGION"]
    assert not train.sickness(lines([0.5], kl=[1e9]), settings("--max-kl", "0"))
    assert "KL is 0.3 nats" in train.sickness(lines([0.5], kl=[0.3]), settings("--max-kl", "0.2"))["kl"]
    without = [{key: value for key, value in line.items() if key != "kl"} for line in lines([0.5] * 20, [1.0] * 20)]
    assert list(train.sickness(without, settings())) == ["zero advantage"]  # a step without a pass has no KL


def test_a_warning_is_said_once_and_logged_each_time():
    recent, said_each = train.collections.deque(maxlen=train.WINDOW), []
    for line in lines([0.0] * 22 + [1.0]):
        said_each.append(train.look_after(line, recent, settings()))
    assert [len(said) for said in said_each] == [0] * 19 + [1] + [0] * 3
    assert said_each[19][0].startswith("warning, step 20: p(REGION) is 0.0000 over 20 steps")
    # 22 zeros and a one: the last window has the mean 1 / 20.
    assert [line.get("warnings") for line in recent][-4:] == [["all FULL"]] * 3 + [None]


def test_warnings_go_on_over_a_resume_and_stop_where_asked(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A window of 3 steps in which nothing has an advantage: known after the third, also when the first two were
    another process's."""
    monkeypatch.setattr(train, "WINDOW", 3)
    monkeypatch.setattr(train, "update", lambda *_: {"zero_advantage": 1.0})
    run = tmp_path / "run"
    train.main(command(home, run))
    assert [line.get("warnings") for line in read_log(run)] == [None, None] + [["zero advantage"]] * 4
    assert capsys.readouterr().out.count("warning, step 3: 100.0% of the groups of 3 steps taught nothing") == 1
    other = tmp_path / "other"
    sick = command(home, other, "--when-sick", "stop")
    assert child(sick, at(train, "sample_groups", 3)) == -signal.SIGKILL
    with pytest.raises(SystemExit) as ended:
        train.main([*sick, "--resume"])
    assert ended.value.code == 1 and "sick: ['zero advantage']" in capsys.readouterr().err
    assert len(read_log(other)) == 3 and torch.load(other / "state.pt", weights_only=True)["step"] == 3
    train.main(command(home, other, "--resume"))  # --when-sick warn: the user has seen it and wants to go on
    same_run(other, run)


def test_kl_that_explodes_is_seen(home, tmp_path, capsys):  # noqa: F811
    more = ("--beta", "0.01", "--max-kl", "0.01", "--lr", "0.05", "--eval-every", "0")
    train.main(command(home, tmp_path / "run", *more))
    warned = [line.get("warnings") for line in read_log(tmp_path / "run")]
    assert warned[0] is None and warned[-1] == ["kl"]  # at first the policy is the reference policy
    assert [line["kl"] > 0.01 for line in read_log(tmp_path / "run")] == [bool(names) for names in warned]
    assert "KL is" in capsys.readouterr().out


@pytest.mark.parametrize("beta", ["0", "0.05"])
def test_nan_in_the_weights_stops_the_run_and_names_the_queries(home, tmp_path, monkeypatch, beta):  # noqa: F811
    whole = train.train_step

    def sick(step, steps, opened, policy, *rest):
        if step == 1:
            policy.lora_parameters()[1].data[0, 0] = math.nan
        return whole(step, steps, opened, policy, *rest)

    monkeypatch.setattr(train, "train_step", sick)
    message = refused(*command(home, tmp_path / "run", "--beta", beta))
    named = {f"train-{row}" for row in train.queries_of_step(1, 6, 2, 0)}
    assert "step 1 (from 0" in message and all(name in message for name in named)
    assert len(read_log(tmp_path / "run")) == 1


def test_nan_of_the_scorer_names_the_query(home):  # noqa: F811
    data, scorer = load_data(str(home / "data"), "train"), load_scorer(str(home / "scorer"))
    images = [data.open_image(row) for row in (3, 4)]
    groups = [[SimpleNamespace(action=Action("FULL", None, .5, ""))],
              [SimpleNamespace(action=Action("REGION", (0.0, 0.0, 20.0, 20.0), .5, ""))]]
    train.reward_groups(data, scorer, [3, 4], images, groups, settings())
    with torch.no_grad():
        scorer.model.visual.head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"query 'train-4', .*train.jsonl:5: is the scorer sound"):
        train.reward_groups(data, scorer, [3, 4], images, groups, settings())


@pytest.mark.parametrize("totals, p_regions, words", [
    ([[1.0, math.nan], [0.0, 0.0]], [[.5, .5], [.5, .5]], r"reward is not finite; queries \['a'\]"),
    ([[1.0, 0.0], [0.0, -math.inf]], [[.5, .5], [.5, .5]], r"reward is not finite; queries \['b'\]"),
    ([[1.0, 0.0], [0.0, 0.0]], [[math.nan, .5], [None, math.nan]], r"p\(REGION\) is not finite; queries \['a', 'b'\]"),
])
def test_check_finite(totals, p_regions, words):
    groups = [[SimpleNamespace(action=Action("FULL", None, p, "")) for p in row] for row in p_regions]
    with pytest.raises(FloatingPointError, match=words):
        train.check_finite(["a", "b"], groups, [{"total": np.array(row)} for row in totals])
    sound = [[SimpleNamespace(action=Action("FULL", None, p, "")) for p in (None, .5)]]
    train.check_finite(["a"], sound, [{"total": np.array([1.0, -1.0])}])


def test_memory_is_what_the_process_has():
    before = train.memory_mb(torch.device("cpu"))
    # From the kernel, not from malloc, which may hand out pages that an earlier test gave back to it alone.
    with mmap.mmap(-1, 2**26) as kept:  # 64 MiB
        kept.write(b"\1" * 2**26)  # written to, so they are there
        grown = train.memory_mb(torch.device("cpu"))
    assert 50 < grown - before < 80


# ---- the release's options, and trackers -----------------------------------------------------------------------------


@pytest.mark.parametrize("step, wanted", [(0, 0.5), (1, 0.375), (2, 0.25), (4, 0.0), (9, 0.0)])  # .5 (1 - step / 4)
def test_encouragement(step, wanted):
    assert train.encouragement(step, settings("--encouragement", "0.5", "--encouragement-steps", "4")) == wanted
    assert train.encouragement(step, settings()) == 0


def test_encouragement_is_paid_for_region_alone(home):  # noqa: F811
    data, scorer = load_data(str(home / "data"), "train"), load_scorer(str(home / "scorer"))
    actions = [Action("FULL", None, .5, ""), Action("REGION", (0.0, 0.0, 20.0, 20.0), .5, ""),
               Action("MALFORMED", None, .5, "")]
    groups = [[SimpleNamespace(action=action) for action in actions]]
    plain, paid = (train.reward_groups(data, scorer, [2], [data.open_image(2)], groups, settings(), bonus)[0]
                   for bonus in (0.0, 0.25))
    assert paid["encouragement"].tolist() == [0.0, 0.25, 0.0] and "encouragement" not in plain
    assert (paid["total"] - plain["total"]).tolist() == pytest.approx([0.0, 0.25, 0.0])


def test_encouragement_decays_in_a_run(home, tmp_path):  # noqa: F811
    train.main(command(home, tmp_path / "run", "--encouragement", "0.4", "--encouragement-steps", "2"))
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    paid = {(line["step"], line["decision"]): line["reward"].get("encouragement") for line in samples}
    assert [paid[step, "REGION"] for step in range(3)] == [0.4, 0.2, None]
    assert [paid[step, "FULL"] for step in range(3)] == [0.0, 0.0, None]


def test_init_adapter(home, unbroken, tmp_path, monkeypatch):  # noqa: F811
    """It starts with those weights and not with B = 0, and the reference policy is still the bare one."""
    adapter = str(unbroken / "adapter")
    policy = train.open_policy(train.parse_args(command(home, "run", "--init-adapter", adapter)))
    learned = load_file(unbroken / ADAPTER)
    for name, layer in policy.layers.items():
        assert torch.equal(layer.lora_A, learned[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B, learned[f"base_model.model.{name}.lora_B.weight"])
    train.main(command(home, tmp_path / "run", "--init-adapter", adapter, "--beta", "0.1", "--lr", "1e-9"))
    assert read_log(tmp_path / "run")[0]["kl"] > 1e-4
    message = refused(*command(home, tmp_path / "other", "--init-adapter", adapter, "--rank", "3"))
    assert adapter in message and "--rank, --alpha and --targets must be" in message
    assert "is not a LoRA adapter" in refused(*command(home, tmp_path / "other", "--init-adapter", str(tmp_path)))
    # A resumed run has its own weights, whatever became of the adapter that it started from.
    shutil.copytree(unbroken / "adapter", tmp_path / "start")
    more = ("--init-adapter", str(tmp_path / "start"))
    assert child(command(home, tmp_path / "killed", *more), at(train, "sample_groups", 4)) == -signal.SIGKILL
    shutil.rmtree(tmp_path / "start")
    train.main(command(home, tmp_path / "killed", *more, "--resume"))
    assert len(read_log(tmp_path / "killed")) == STEPS


class Board:
    """What stands in for both trackers: it writes down what it is shown."""

    def __init__(self):
        self.made, self.shown, self.closed = [], [], 0
        self.SummaryWriter = self.init = self.make

    def make(self, *arguments, **more):
        self.made.append((arguments, more))
        return SimpleNamespace(close=self.close, finish=self.close, add_scalar=lambda *entry: self.shown.append(entry),
                               log=lambda numbers, step: self.shown.append((numbers, step)))

    def close(self):
        self.closed += 1


def test_trackers_show_what_the_log_says(home, unbroken, tmp_path, monkeypatch):  # noqa: F811
    board, wandb = Board(), Board()
    known, plain = {"torch.utils.tensorboard": board, "wandb": wandb}, train.importlib.import_module
    monkeypatch.setattr(train.importlib, "import_module",
                        lambda name, *rest: known[name] if name in known else plain(name, *rest))
    run = tmp_path / "run"
    train.main(command(home, run, "--tensorboard", "--wandb", "crops"))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {(name, step): value for name, value, step in board.shown} == {
        (name, line["step"]): value for line in log for name, value in line.items()
        if name != "step" and value is not None}
    assert [step for _, step in wandb.shown] == list(range(STEPS))
    assert all(numbers.items() <= log[step].items() for numbers, step in wandb.shown)
    assert board.made == [((str(run / "tensorboard"),), {"purge_step": 0})] and board.closed == wandb.closed == 1
    assert wandb.made[0][1]["project"] == "crops" and wandb.made[0][1]["name"] == "run"
    assert read_log(run) == read_log(unbroken) and weights(run) == weights(unbroken)  # looking changes nothing


@pytest.mark.parametrize("more, package", [(("--tensorboard",), "tensorboard"), (("--wandb", "crops"), "wandb")])
def test_tracker_that_is_not_installed_is_refused_at_once(home, tmp_path, monkeypatch, more, package):  # noqa: F811
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(train.importlib, "import_module", missing)
    message = refused(*command(home, tmp_path / "run", *more))
    assert f"--{package} needs the package {package}" in message and f"pip install {package}" in message
    assert not (tmp_path / "run").exists()
