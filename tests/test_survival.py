"""What a training run survives: kill -9 at every place where it writes, a second process, signals, full disks, damaged
and hostile files, numbers that are not finite, a CPU or card without memory; and its options and trackers.

A killed run is a forked child that kills itself at a chosen point: no handler, no `finally`, as from outside.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import policy as policy_file
import train
from policy import Action
from scorer import InputError, load_data, load_scorer, lock_folder
from test_checkpoints import Evil
from test_train import ADAPTER, flags, forked, home, read_log, refused, untimed, weights  # noqa: F401 (a fixture: home)

STEPS, EVERY = 6, 2  # steps of a run, and between two states


def command(home, run, *more):
    """Six steps, dropout on (so that draws matter), evaluated once in the middle."""
    return flags(home, run, "--steps", str(STEPS), "--save-every", str(EVERY), "--eval-every", "3", "--dropout", "0.2",
                 *more)


def steps_of(run):
    """Steps in the log; -1 is the policy before training."""
    return [line["step"] for line in read_log(run)]


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
        tqdm.set_lock(threading.RLock())  # a thread of the parent's may have held its own at the fork
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


def nothing(*_, **__):
    pass


def at(owner, name, count, before=die, after=nothing):
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
    assert untimed(run) == untimed(other)
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert weights(run) == weights(other)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (run, other)]
    assert names[0] == names[1] and not [name for name in names[0] if name.endswith(".tmp")]


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

# os.replace, in order: config.json; adapter_config.json and adapter_model.safetensors of adapter_best/, the policy
# before training; after steps 2, 4 and 6 the two of adapter/ and state.pt. What follows one rename precedes the next.
KILLS = {
    **{f"before rename {n}": at(os, "replace", n) for n in range(1, 13)},
    "after the last rename": at(os, "replace", 12, nothing, die),
    **{f"half of state {n}": at(Path, "write_bytes", n, half_a_file) for n in (1, 2)},
    # The first is of step -1, then two a step, log and samples: 6 and 7 are the third step's, whose state is not saved.
    **{f"half a line {n}": at(train, "append", n, half_a_line) for n in (1, 2, 6, 7)},
    **{f"between log and samples {n}": at(train, "append", 2 * n + 1) for n in (1, 4)},
    "before a reward": at(train, "reward_groups", 6),
    **{f"in update {n}": at(torch.optim.AdamW, "step", n, nothing, die) for n in (3, 4)},
    **{f"half of adapter {n}": at(policy_file.Policy, "save_adapter", n, half_an_adapter) for n in (1, 2, 4)},
    "before it is finished": at(Path, "write_text", 1),
}


@pytest.mark.parametrize("point", KILLS)
def test_killed_run_goes_on_as_if_nothing_had_been(home, unbroken, tmp_path, point):  # noqa: F811
    run = tmp_path / "run"
    assert child(command(home, run), KILLS[point]) == -signal.SIGKILL
    assert not (run / "finished").exists()  # no earlier moment leaves something that looks finished
    train.main(command(home, run, "--resume"))
    same_run(run, unbroken)


def test_killed_while_a_resume_cuts_the_log_back(home, unbroken, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    assert child(command(home, run), at(train, "append", 7)) == -signal.SIGKILL  # log: 3 steps, state: 2
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


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_second_process_on_a_run_is_refused_until_the_first_is_dead(home, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    first = multiprocessing.get_context("fork").Process(target=lambda: hold_run(run))
    first.start()
    while not (run / "log.jsonl").exists():  # written under the lock
        time.sleep(0.01)
    message = refused(*command(home, run))
    assert "is in use by another process" in message and "--run" in message
    assert {path.name for path in run.iterdir()} == {"lock", "log.jsonl"}  # the refused one has written nothing
    first.kill()  # kill -9: nobody tidies up, and still the lock is free
    first.join()
    with lock_folder(run, "--run"):
        pass


def hold_run(run):
    run.mkdir()
    with lock_folder(run, "--run"):
        (run / "log.jsonl").touch()
        time.sleep(60)


def test_lock_is_free_again_after_an_error(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "open_policy", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train.main(command(home, tmp_path / "run"))


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
    assert steps_of(run) == [-1, 0, 1, 2] and not (run / "finished").exists() and (run / ADAPTER).exists()
    assert torch.load(run / "state.pt", weights_only=True)["step"] == 3
    assert child(command(home, run, "--resume")) == 0
    same_run(run, unbroken)


@pytest.mark.parametrize("numbers, code", [((signal.SIGTERM, signal.SIGTERM), -signal.SIGTERM),
                                           ((signal.SIGTERM, signal.SIGINT), 130)])
def test_second_signal_stops_at_once(home, tmp_path, numbers, code):  # noqa: F811
    run = tmp_path / "run"
    assert child(command(home, run), at(train, "sample_groups", 3, send(*numbers))) == code
    assert steps_of(run) == [-1, 0, 1]  # the third step is not finished


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
    assert "stopped by SIGINT after a whole step" in (said := capsys.readouterr().err) and "--resume" in said
    assert steps_of(tmp_path / "run") == [-1, 0, 1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    # While it loads there is nothing to save.
    monkeypatch.setattr(train, "open_policy", lambda *_: send(signal.SIGINT)())
    with pytest.raises(SystemExit) as stopped:
        train.main(command(home, tmp_path / "other"))
    assert stopped.value.code == 130 and "stopped at once" in capsys.readouterr().err


@pytest.mark.parametrize("told", [0, 1])
def test_signal_to_one_of_two_processes_ends_both_after_the_same_step(home, tmp_path, monkeypatch, told):  # noqa: F811
    """As torchrun's reach them: one sooner than the other. Else one would wait for the other's part for ever."""
    def main(arguments, whole=train.main):
        if os.environ["RANK"] == str(told):
            at(train, "sample_groups", 3, send(signal.SIGTERM))()
        whole(arguments)

    monkeypatch.setattr(train, "main", main)
    run = tmp_path / "run"
    assert forked(2, flags(home, run, "--eval-every", "0", "--save-every", "9"), tmp_path) == [143, 143]
    said = (tmp_path / "0.err").read_text()
    assert "by SIGTERM" in said and "--resume" in said and "by SIGTERM" not in (tmp_path / "1.err").read_text()
    assert torch.load(run / "state.pt", weights_only=True)["step"] == 3 and steps_of(run) == [0, 1, 2]


# ---- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl", "state.pt.tmp", "adapter/adapter_config.json.tmp"])
def test_full_disk_loses_nothing_that_was_whole(home, unbroken, tmp_path, name):  # noqa: F811
    """The file is a link to /dev/full, which takes nothing: 'No space left on device'."""
    run = tmp_path / "run"
    assert child(command(home, run), at(train, "sample_groups", 4)) == -signal.SIGKILL  # state: 2 steps, log: 3
    kept, link = (run / "state.pt").read_bytes(), run / name

    def fill(*_, **__):
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/full")

    # A log is cut back by a rename, which would replace the link: the disk fills up in the first step.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample_groups", lambda *rest, whole=train.sample_groups: (fill(), whole(*rest))[1])
        message = refused(*command(home, run, "--resume"))
    assert "No space left" in message and "make room" in message and str(run) in message and "--resume" in message
    assert (run / "state.pt").read_bytes() == kept
    link.unlink()
    if name.endswith(".jsonl"):  # what it held before is not the disk's to lose
        shutil.copy(unbroken / name, link)
    train.main(command(home, run, "--resume"))
    same_run(run, unbroken)


# ---- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.fixture
def stopped(home, unbroken, tmp_path):  # noqa: F811
    """A run that was killed after its last save."""
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run/finished").unlink()
    return tmp_path / "run"


def test_damaged_state_is_refused(home, stopped):  # noqa: F811
    path = stopped / "state.pt"
    whole, draw = path.read_bytes(), random.Random(1)
    for content in (b"", b"junk", whole[:len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert "state.pt is damaged" in refused(*command(home, stopped, "--resume"))
    # A single bit anywhere: either it is noticed, or (in a name, a date, padding) the state is what it was.
    noticed = 0
    path.write_bytes(whole)
    wanted = torch.load(path, weights_only=True)
    for _ in range(150):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        taken = SimpleNamespace(device=torch.device("cpu"), lora_parameters=lambda: fresh)
        fresh = [torch.zeros_like(value) for value in wanted["lora"]]
        optimizer = torch.optim.AdamW([torch.nn.Parameter(value) for value in fresh])
        try:
            assert train.load_state(path, taken, optimizer) == STEPS
        except InputError as error:
            assert "state.pt is damaged" in str(error)
            noticed += 1
            continue
        assert all(map(torch.equal, fresh, wanted["lora"]))
    assert noticed > 75


def test_state_that_would_run_code_is_not_unpickled(home, stopped, tmp_path):  # noqa: F811
    torch.save({"step": 2, "lora": Evil(tmp_path / "mark"), "optimizer": {}}, stopped / "state.pt")
    assert "more than numbers" in refused(*command(home, stopped, "--resume"))
    assert not (tmp_path / "mark").exists()


# ---- what is not finite ----------------------------------------------------------------------------------------------


def settings(*more):
    return train.parse_args(["--device", "cpu", *more])


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
    assert steps_of(tmp_path / "run") == [-1, 0]


def views_of(home, rows=(3, 4)):  # noqa: F811
    """Training data, scorer and images of some queries."""
    data = load_data(str(home / "data"), "train")
    return data, load_scorer(str(home / "scorer")), [data.open_image(row) for row in rows]


def region(p=.5):
    return Action("REGION", (0.0, 0.0, 20.0, 20.0), p, "")


def test_nan_of_the_scorer_names_the_query(home):  # noqa: F811
    data, scorer, images = views_of(home)
    actions = [[Action("FULL", None, .5, "")], [region()]]
    train.score_views(data, scorer, [3, 4], images, actions)
    with torch.no_grad():
        scorer.model.visual.head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"query 'train-4', .*train.jsonl:5: is the scorer sound"):
        train.score_views(data, scorer, [3, 4], images, actions)


@pytest.mark.parametrize("bonus, p_regions, name", [
    (math.nan, [.5, .5], "train-3"), (math.inf, [.5, .5], "train-3"), (0.0, [math.nan, .5], "train-3"),
    (0.0, [.5, math.inf], "train-4")])
def test_reward_or_p_region_that_is_not_finite_names_the_query(home, bonus, p_regions, name):  # noqa: F811
    data, scorer, images = views_of(home)
    actions = [[region(p)] for p in p_regions]
    views = train.score_views(data, scorer, [3, 4], images, actions)
    with pytest.raises(FloatingPointError, match=rf"reward or p\(REGION\) is not finite; query '{name}'"):
        train.reward_groups(data, [3, 4], actions, views, settings(), bonus)


def test_memory_is_the_most_that_the_process_had():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert train.memory_mb(torch.device("cpu")) == pytest.approx(int(line.split()[1]) / 1024, rel=0.01)  # kB


# ---- the release's options, and trackers -----------------------------------------------------------------------------


def test_encouragement_is_paid_for_region_alone(home):  # noqa: F811
    data, scorer, images = views_of(home, [2])
    actions = [Action("FULL", None, .5, ""), region(), Action("MALFORMED", None, .5, "")]
    views = train.score_views(data, scorer, [2], images, [actions])
    plain, paid = (train.reward_groups(data, [2], [actions], views, settings(), bonus)[0] for bonus in (0.0, 0.25))
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
    policy = train.open_policy(train.parse_args(command(home, "run", "--init-adapter", adapter)), None)
    learned = load_file(unbroken / ADAPTER)
    for name, layer in policy.layers.items():
        assert torch.equal(layer.lora_A, learned[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B, learned[f"base_model.model.{name}.lora_B.weight"])
    train.main(command(home, tmp_path / "run", "--init-adapter", adapter, "--beta", "0.1", "--lr", "1e-9"))
    assert read_log(tmp_path / "run")[1]["kl"] > 1e-4
    message = refused(*command(home, tmp_path / "other", "--init-adapter", adapter, "--rank", "3"))
    assert adapter in message and "--rank, --alpha and --targets must be" in message
    assert f"{tmp_path}/adapter_config.json" in refused(
        *command(home, tmp_path / "other", "--init-adapter", str(tmp_path)))
    # A resumed run has its own weights, whatever became of the adapter that it started from.
    shutil.copytree(unbroken / "adapter", tmp_path / "start")
    more = ("--init-adapter", str(tmp_path / "start"))
    assert child(command(home, tmp_path / "killed", *more), at(train, "sample_groups", 4)) == -signal.SIGKILL
    shutil.rmtree(tmp_path / "start")
    train.main(command(home, tmp_path / "killed", *more, "--resume"))
    assert steps_of(tmp_path / "killed") == [-1, *range(STEPS)]


def test_trackers_show_what_the_log_says(home, unbroken, tmp_path, monkeypatch):  # noqa: F811
    """A TensorBoard writer that is made after wandb has begun to read along."""
    tensorboard, events = pytest.importorskip("torch.utils.tensorboard"), []

    class Board:
        def __init__(self, folder, purge_step):
            events.append((folder, purge_step))
            self.add_scalar, self.__exit__ = lambda *entry: events.append(entry), None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            events.append("closed")

    module = SimpleNamespace(init=lambda **given: events.append(given))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name, *rest, find=train.importlib.util.find_spec: (
        name if name == "wandb" else find(name, *rest)))
    monkeypatch.setattr(tensorboard, "SummaryWriter", Board)
    run = tmp_path / "run"
    train.main(command(home, run, "--tensorboard", "--wandb", "crops"))
    wandb, made, *shown, closed = events
    assert wandb["project"] == "crops" and wandb["name"] == "run" and wandb["sync_tensorboard"] is True
    assert made == (str(run / "tensorboard"), 0) and closed == "closed"
    assert shown == [(name, value, line["step"]) for line in read_log(run)[1:] for name, value in line.items()
                     if value is not None]
    assert untimed(run) == untimed(unbroken) and weights(run) == weights(unbroken)  # looking changes nothing


def test_tensorboard_itself(home, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    train.main(command(home, tmp_path / "run", "--tensorboard", "--steps", "1"))
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert b"reward_region" in events.read_bytes()


@pytest.mark.parametrize("more, package", [(("--tensorboard",), "tensorboard"), (("--wandb", "crops"), "tensorboard"),
                                           (("--wandb", "crops"), "wandb")])
def test_tracker_that_is_not_installed_is_refused_at_once(home, tmp_path, monkeypatch, more, package):  # noqa: F811
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == package else name)
    message = refused(*command(home, tmp_path / "run", *more))
    assert f"need the package {package}" in message and f"pip install {package}" in message
    assert not (tmp_path / "run").exists()
