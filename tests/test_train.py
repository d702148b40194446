"""train.py on a tiny random Qwen2.5-VL, a tiny random EVA-CLIP and six noise images: nothing here can be learned by
looking, so what moves is moved by the reward, and slow, obvious oracles say by how much."""

import json
import math
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

import evaluate
import rgrpo
import tiny_policy
import train
from policy import Action, load_policy
from rewards import reward
from scorer import (
    EvaClip, EvaClipConfig, InputError, Query, crop, load_data, load_scorer, write_array, write_json, write_split,
)

K, TRAIN, VAL = 4, 6, 3  # candidates, train queries, val queries
# What a line of log.jsonl may hold. README.md defines each; `train.py` adds none in silence.
ALWAYS = {"step", "reward", "full_rate", "region_rate", "malformed_rate", "p_region", "zero_advantage", "lr", "seconds",
          "memory_mb"}
OF_FULL, OF_REGION = {"reward_full"}, {"reward_region", "d_mrr", "d_ndcg", "d_rank", "d_margin"}
LEARNED = {"loss", "kl", "outside", "clip_fraction", "ratio_max", "logp_gap", "decision_entropy", "grad_norm"}
EVALUATED = {"val_mrr", "val_cond_r1", "val_crop_rate"}


# ---- a small world ---------------------------------------------------------------------------------------------------


def noise(rng, side):
    return Image.fromarray(rng.integers(0, 256, (*side[::-1], 3), dtype=np.uint8))


def build_data(folder, scorer):
    """data/ as prepare.py writes it: noise images of 84 x 56 pixels, candidates 0 .. 5, positives in turn."""
    (folder / "raw").mkdir()
    (folder / "data").mkdir()
    data, rng = folder / "data", np.random.default_rng(0)
    entities = scorer.image_features([noise(rng, (28, 28)) for _ in range(6)])
    for split, count, positives in (("train", TRAIN, TRAIN), ("val", VAL, 2)):
        images = [noise(rng, (84, 56)) for _ in range(count)]
        for i, image in enumerate(images):
            image.save(folder / f"raw/{split}{i}.png")
        pools = np.array([sorted(rng.permutation(6)[:K].tolist()) for _ in range(count)])  # [Q, K]
        labels = np.array([[k == i % K and i < positives for k in range(K)] for i in range(count)])
        queries = [Query(f"{split}-{i}", f"{split}{i}.png", f"What is this, {i}?", []) for i in range(count)]
        write_split(data, split, queries, pool=pools, pool_image=pools, labels=labels,
                    retrieval=np.tile([.9, .8, .7, .6], (count, 1)), full=scorer.image_features(images))
    (data / "kb.jsonl").write_text("".join(json.dumps({"entity_id": str(j)}) + "\n" for j in range(6)))
    write_array(data / "kb_image.npy", entities.astype(np.float16))
    write_array(data / "kb_text.npy", (0.2 * rng.standard_normal(entities.shape)).astype(np.float16))
    write_array(data / "kb_entity.npy", np.arange(6, dtype=np.int32))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": path.name} for path in sorted(data.iterdir())}
    write_json(data / "manifest.json", {
        "version": 2, "dataset": "noise", "root": "../raw", "args": {}, "K": K, "dim": scorer.dim, "files": files,
        "scorer": {"name": scorer.name, "dtype": "float32", "fingerprint": scorer.fingerprint().tolist()},
        "packages": {}, "splits": {"train": {}, "val": {}}, "kb": {}})


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with policy/, scorer/, data/ and prompt.txt; tests read it and change nothing."""
    torch.set_num_threads(1)
    # tqdm's own lock is a semaphore that forks share: a child killed while it draws a bar would keep it for good.
    tqdm.set_lock(threading.RLock())
    folder = tmp_path_factory.mktemp("train")
    tiny_policy.build(folder / "policy")
    clip = EvaClip(EvaClipConfig(embed_dim=8, image_size=28, width=16, layers=1, head_width=8, context=8, vocab=600,
                                 text_width=8, text_heads=2, text_layers=1))
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in clip.parameters() if p.dim() > 1):
        parameter.data.normal_(0, 0.3, generator=generator)
    clip.save(folder / "scorer")
    (folder / "prompt.txt").write_text("Crop or not?")  # the real one has hundreds of tokens
    build_data(folder, load_scorer(str(folder / "scorer")))
    return folder


def flags(home, run="run", *more):
    """Command line of a run of four steps of two queries; a later flag overrides."""
    return ["--data", f"{home}/data", "--policy", f"{home}/policy", "--scorer", f"{home}/scorer", "--device", "cpu",
            "--system-prompt", f"{home}/prompt.txt", "--run", str(run), "--queries", "2", "--group", "4",
            "--steps", "4", "--micro-tokens", "200", "--save-every", "2", "--eval-every", "2", "--samples-every", "1",
            "--lr", "0.01", "--warmup", "1", "--reward", "delta", "--balance", "force", "--beta", "0", *more]


@pytest.fixture
def settings(home):
    """Arguments, without the term that holds the template: most tests are about the others."""
    return lambda *more: train.parse_args(flags(home, "run", "--hold", "0", *more))


class Counting:
    """A scorer that writes down what it encodes."""

    def __init__(self, scorer):
        self.scorer, self.seen = scorer, []

    def image_features(self, images):
        self.seen += images
        return self.scorer.image_features(images)


@pytest.fixture
def scorer(home):
    return Counting(load_scorer(str(home / "scorer")))


@pytest.fixture
def data(home):
    return load_data(str(home / "data"), "train")


def new_policy(home, dropout=0.0, targets="language", away=0.0, seed=0):
    """The tiny policy with LoRA; away > 0: moved from the base policy, B and all."""
    policy = load_policy(str(home / "policy"), system_prompt="Crop or not?", attention="eager")
    policy.add_lora(4, 8, dropout, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.lora_parameters() if away else []:
        parameter.data += torch.randn(parameter.shape, generator=generator) * away
    return policy


def opened(policy, data, rows, longest=8192):
    """Prompts of some training queries, as a step opens them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "queries_of_step", lambda *_: list(rows))
        return train.open_step(0, policy, data, SimpleNamespace(queries=0, seed=0, max_prompt_tokens=longest))[4]


def actions_of(groups):
    return [[c.action for c in group] for group in groups]


def drawn(policy, data, args, rows=range(4), rewards=None):
    """Prompts, groups, counts and advantages of some queries. rewards(b, n) stands in for the scorer's."""
    prompts = opened(policy, data, rows)
    groups, counts = train.sample_groups(policy, prompts, [(0, 0, row) for row in rows], args)
    rewards = rewards or (lambda b, n: math.sin(3 * b + 5 * n))
    totals = [{"total": np.array([rewards(b, n) for n in range(len(group))])} for b, group in enumerate(groups)]
    return prompts, groups, counts, train.judge(actions_of(groups), counts, totals, args)


def room_for(queries, policy, prompts, groups):
    """--micro-tokens for passes of so many queries."""
    return queries * policy.pack(prompts, groups)[0].layout.ids.shape[1]


def gradient(policy, prompts, groups, advantages, args, step=None):
    """(numbers that update logs, its un-clipped gradient as one vector); the weights stay."""
    optimizer = SimpleNamespace(zero_grad=lambda set_to_none: policy.model.zero_grad(), step=step or (lambda: None))
    args = SimpleNamespace(**{**vars(args), "max_grad_norm": 1e9})
    numbers = train.update(policy, optimizer, prompts, groups, advantages, args, [f"q{b}" for b in range(len(groups))])
    return numbers, flat_gradient(policy)


def flat_gradient(policy):
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
                      for p in policy.lora_parameters()])


def close(a, b, tolerance=1e-5):
    """Equal up to `tolerance` of the largest entry, which is not 0."""
    return float(b.abs().max()) > 1e-6 and float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def slow_gradient(policy, prompts, groups, advantages, clip=0.2, hold=0.0, queries=1, left_out=()):
    """The loss by its definition: every rollout alone, none left out, summed and divided at the end. hold: of what lies
    outside the grammar, a mean over `queries`, but for queries that are left out."""
    decision, box, weight = advantages
    value, tokens = 0.0, 0.0
    outside = sum(policy.score(policy.pack(prompts, groups, [b], hold=True)[0], hold=True)["outside"].sum()
                  for b in range(len(groups)) if hold and b not in left_out)
    for b, group in enumerate(groups):
        for n, one in enumerate(group):
            out = policy.log_probs([prompts[b]], [[one]])
            for t in np.flatnonzero(one.free):
                advantage = float(decision[b, n] if t == one.decision_index else box[b, n])
                ratio = (out["logp"][0, t] - out["logp"][0, t].detach()).exp()
                value = value - float(weight[b, n]) * torch.minimum(
                    ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
                tokens += float(weight[b, n])
    policy.model.zero_grad()
    (value / tokens + hold * outside / queries).backward()
    return flat_gradient(policy)


# ---- flags, schedule, order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, steps, peak, warmup, wanted", [
    (0, 10, 4.0, 2, 2.0),           # 4 * 1 / 2
    (1, 10, 4.0, 2, 4.0),           # 4 * 2 / 2
    (2, 10, 4.0, 2, 4.0),           # the cosine begins: 4 * (1 + cos 0) / 2
    (6, 10, 4.0, 2, 2.0),           # half way, (6 - 2) / (10 - 2): 4 * (1 + cos 90) / 2
    (9, 10, 4.0, 2, 0.1522409),     # 7 / 8 of the way: 2 * (1 + cos 157.5) = 2 * (1 - .9238795)
    (0, 5, 3.0, 0, 3.0), (0, 1, 3.0, 1, 3.0),
    (2, 3, 3.0, 10, 0.9),           # 3 * 3 / 10: a warm-up that is too long never gets there
])
def test_learning_rate(step, steps, peak, warmup, wanted):
    assert train.learning_rate(step, steps, peak, warmup) == pytest.approx(wanted)


@pytest.mark.parametrize("count, queries", [(7, 3), (6, 2), (2, 5), (1, 1), (5, 5)])
def test_every_query_comes_once_an_epoch(count, queries):
    steps = count * 3  # so that 3 * queries epochs are whole
    rows = [row for step in range(steps) for row in train.queries_of_step(step, count, queries, seed=4)]
    epochs = [rows[start:start + count] for start in range(0, len(rows), count)]
    assert len(epochs) == 3 * queries and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    for number, epoch in enumerate(epochs):  # the slow way: the order of each epoch by itself
        assert epoch == np.random.default_rng([4, number]).permutation(count).tolist()
    assert all(type(row) is int for row in rows)


def test_order_depends_on_epoch_and_seed():
    orders = {tuple(train.queries_of_step(step, 20, 20, seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_a_query_that_comes_twice_in_a_step_has_two_seeds(home, data, monkeypatch):
    monkeypatch.setattr(train, "queries_of_step", lambda *_: [5, 2, 5, 5])
    args = SimpleNamespace(queries=4, seed=1, max_prompt_tokens=8192)
    rows, seeds, queries, images, prompts = train.open_step(3, new_policy(home), data, args)
    assert rows == [5, 2, 5, 5] and seeds == [(1, 3, 5), (1, 3, 2), (1, 3, 11), (1, 3, 17)]  # 5 + 6, 5 + 2 * 6
    assert [query.query_id for query in queries] == ["train-5", "train-2", "train-5", "train-5"]
    assert len(images) == len(prompts) == 4 and prompts[0].ids.tolist() == prompts[2].ids.tolist()


@pytest.mark.parametrize("more, wanted", [
    (["--epochs", "2", "--queries", "4"], 3),       # 2 * 6 / 4
    (["--epochs", "1", "--queries", "4"], 2),       # 6 / 4: the last step is filled up
    (["--epochs", "0.35", "--queries", "1"], 3),    # 2.1
    (["--epochs", str(.7 / 6 * 10), "--queries", "1"], 7),  # a little above 7 in floating point
])
def test_epochs_are_steps(home, tmp_path, monkeypatch, more, wanted):
    base, asked = flags(home, tmp_path / "run"), []
    at = base.index("--steps")
    monkeypatch.setattr(train, "run_steps", lambda start, steps, policy, optimizer, *rest: asked.append(
        (steps, optimizer.defaults["weight_decay"])))
    train.main(base[:at] + base[at + 2:] + more)
    assert asked == [(wanted, 0)] and train.parse_args(base[:at] + base[at + 2:] + more).steps is None


def test_presets():
    paper, mini = train.parse_args(["--preset", "paper"]), train.parse_args([])
    # App. B; two of its numbers are defaults of either preset.
    assert (paper.group, paper.lr, paper.warmup, paper.queries, paper.epochs, paper.steps) == (8, 5e-5, 50, 16, 2, None)
    assert (paper.rank, paper.alpha, paper.dropout, paper.targets) == (8, 32, 0.1, "all")
    assert (mini.max_prompt_tokens, mini.max_new_tokens, mini.reward_weights) == (8192, 256, [.2, .2, .2, .4])
    assert mini.steps > 0 and train.parse_args(["--epochs", "1"]).steps is None  # what was asked for wins
    both = train.parse_args(["--preset", "paper", "--steps", "3"])
    assert both.steps == 3 and both.epochs is None


def test_help_shows_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_args(["--preset", "paper", "--help"])
    assert stopped.value.code == 0 and "(default: 5e-05)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("more, complaint", [
    (["--group", "1"], "--group: must be at least 2"), (["--micro-tokens", "0"], "--micro-tokens: must be"),
    (["--samples-every", "-1"], "--samples-every: must be"), (["--val-queries", "0"], "--val-queries: must be"),
    (["--seed", "-1"], "--seed: must be"), (["--temperature", "0"], "--temperature: must be at least 1e-12"),
    (["--lr", "nan"], "--lr: must be"), (["--beta", "nan"], "--beta: must be"), (["--lr", "inf"], "--lr: must be"),
    (["--dropout", "1"], "--dropout: must be at least 0 and below 1"), (["--steps", "0"], "--steps: must be"),
    (["--steps", "3", "--epochs", "1"], "give one of them"), (["--max-pixels", "783"], "must be at least 784"),
    (["--steps", "1.5"], "--steps: invalid"), (["--balance", "half"], "invalid choice: 'half'"),
    (["--reward-weights", "1", "2", "3"], "--reward-weights: expected 4"), (["--wandb"], "expected one argument"),
    (["--decision-weight", "pi", "--decode", "free"], "--decision-weight pi needs"),
    (["--decision-weight", "pi", "--advantage", "group"], "--decision-weight pi needs"),
    (["--decision-weight", "pi", "--norm", "sequence"], "--decision-weight pi needs --norm token"),
    (["--hold", "-1"], "--hold: must be"), (["--fuse", "1.5"], "--fuse: must be"),
])
def test_flags_that_make_no_sense(more, complaint, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(more)
    assert complaint in capsys.readouterr().err


# ---- groups ----------------------------------------------------------------------------------------------------------


def decisions(groups):
    return [[c.action.decision for c in group] for group in groups]


def test_force_writes_full_once_and_counts_it_half_the_group(home, data, settings):
    for n, full in ((4, 2), (5, 2), (2, 1)):  # N // 2 FULL, the rest REGION
        _, groups, counts, _ = drawn(new_policy(home), data, settings("--group", str(n)))
        assert decisions(groups) == [["FULL"] + ["REGION"] * (n - full)] * 4
        assert counts == [[full] + [1] * (n - full)] * 4 and sum(counts[0]) == n
        assert all(c.forced_decision for group in groups for c in group)
        assert len({c.action.box for group in groups for c in group}) > 4  # the boxes are draws


def test_analytic_writes_full_once_and_a_box_a_rollout(home, data, settings):
    prompts, groups, counts, _ = drawn(new_policy(home), data, settings("--group", "3", "--balance", "analytic"))
    assert decisions(groups) == [["FULL"] + ["REGION"] * 3] * 4 and counts == [[3, 1, 1, 1]] * 4
    free = settings("--group", "2", "--balance", "analytic", "--decode", "free", "--max-new-tokens", "4")
    _, groups, counts, _ = drawn(new_policy(home), data, free)
    assert counts == [[1] * 4] * 4 and [[c.ids[:9] for c in g] for g in groups][0][0] != groups[0][3].ids[:9]


def test_force_with_free_text_writes_every_rollout(home, data, settings):
    _, groups, counts, _ = drawn(new_policy(home), data, settings("--decode", "free", "--max-new-tokens", "12"))
    assert counts == [[1] * 4] * 4
    openings = [["FULL" if '"FULL' in c.action.text else "REGION" for c in group] for group in groups]
    assert openings == [["FULL", "FULL", "REGION", "REGION"]] * 4  # a random policy goes on with nonsense after that
    assert {"MALFORMED"} <= {d for group in decisions(groups) for d in group}


def test_resample_draws_anew_what_is_missing_and_nothing_else(home, data, settings, monkeypatch):
    policy, asked = new_policy(home), []
    monkeypatch.setattr(policy, "rollout", lambda prompts, *rest, roll=policy.rollout, **more:
                        asked.append((len(prompts), set(more["seeds"]))) or roll(prompts, *rest, **more))
    rows = [0, 1, 2, 3, 4, 5] * 3
    seeds = [(0, 0, i) for i in range(18)]
    prompts = opened(policy, data, rows)
    plain, counts = train.sample_groups(policy, prompts, seeds, settings("--balance", "none", "--group", "3"))
    groups, _ = train.sample_groups(policy, prompts, seeds, settings("--balance", "resample", "--group", "3"))
    assert counts == [[1] * 3] * 18 and not any(c.forced_decision for group in plain for c in group)
    lacking = [set(group) != {"FULL", "REGION"} for group in decisions(plain)]
    assert 0 < sum(lacking) < 18  # both kinds are looked at
    assert [count for count, _ in asked] == [18, 18, sum(lacking)]
    assert asked[0][1] == asked[1][1] and not asked[1][1] & asked[2][1]  # what is drawn again is drawn anew
    assert all({"FULL", "REGION"} == set(group) for group in decisions(groups))
    for lacks, old, new in zip(lacking, plain, groups):
        assert [c.forced_decision for c in new].count(True) == int(lacks)  # one is the fewest that mends it
        assert [c.ids for c in new if not c.forced_decision] == [c.ids for c in old][:len(new) - int(lacks)]


def test_draws_do_not_depend_on_the_batch(home, data, settings):
    policy, args = new_policy(home), settings()
    _, groups, _, _ = drawn(policy, data, args)
    _, alone, _, _ = drawn(policy, data, args, rows=[2])
    assert [c.ids for c in alone[0]] == [c.ids for c in groups[2]]
    assert [c.ids for c in groups[0]] != [c.ids for c in groups[1]]


# ---- scores and rewards ----------------------------------------------------------------------------------------------


def acted(decision, box=None):
    return Action(decision, box, 0.5, "")


ACTIONS = [[acted("FULL"), acted("REGION", (0.0, 0.0, 30.0, 20.0)), acted("REGION", (40.5, 10.0, 84.0, 56.0)),
            acted("REGION", (0.0, 0.0, 30.0, 20.0)), acted("MALFORMED"), acted("FULL")],
           [acted("FULL"), acted("FULL")],
           [acted("REGION", (0.0, 0.0, 30.0, 20.0))]]


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_score_views_equals_the_formula_and_encodes_only_what_is_new(data, scorer, share):
    rows = [4, 0, 2]
    images = [data.open_image(row) for row in rows]
    pairs = train.score_views(data, scorer, rows, images, ACTIONS, share)
    # Boxes of query 0: two different ones; query 2 has a box like one of them, but on another image.
    assert len(scorer.seen) == 3 and not {(84, 56)} & {image.size for image in scorer.seen}
    for row, image, group, (whole, scores) in zip(rows, images, ACTIONS, pairs, strict=True):
        assert scores.shape == (len(group), K) and whole.shape == (K,)
        for action, line in [*zip(group, scores), (acted("FULL"), whole)]:
            view = data.full[row].astype(float)
            if action.decision == "REGION":
                part = scorer.scorer.image_features([crop(image, action.box)])[0].astype(float)
                view = (1 - share) * view / np.linalg.norm(view) + share * part / np.linalg.norm(part)
            for candidate, score in zip(data.pool[row], line):  # Eq. 3: image + text, here of one image each
                c = data.kb_image[candidate].astype(float) + data.kb_text[candidate].astype(float)
                assert score == pytest.approx(view @ c / np.linalg.norm(view) / np.linalg.norm(c), abs=1e-6)


def test_rewards_of_a_group(data, scorer, settings):
    """FULL pays 1 where the full image is right (Eq. 8), MALFORMED costs eta, equal boxes earn the same."""
    for row in range(TRAIN):
        views = train.score_views(data, scorer, [row], [data.open_image(row)], ACTIONS[:1])
        (found,) = train.reward_groups(data, [row], ACTIONS[:1], views, settings("--eta", "0.7"))
        full = (data.full[row].astype(float) @ data.candidates(row).T).argmax() == np.argmax(data.labels[row])
        assert found["total"][[0, 4, 5]].tolist() == [float(full), -0.7, float(full)]
        assert found["total"][1] == found["total"][3] != found["total"][2]


@pytest.mark.parametrize("more, wanted", [
    ((), {}), (("--reward", "absolute"), {"kind": "absolute"}), (("--eta", "0.3"), {"eta": .3}),
    (("--reward-weights", "1", "0", "-2", ".5"), {"weights": (1, 0, -2, .5)})])
def test_flags_of_the_reward(data, scorer, settings, more, wanted):
    views = train.score_views(data, scorer, [3, 0, 2], [data.open_image(i) for i in (3, 0, 2)], ACTIONS)
    found = train.reward_groups(data, [3, 0, 2], ACTIONS, views, settings(*more))
    for row, group, (full, seen), earned in zip((3, 0, 2), ACTIONS, views, found):
        oracle = reward([a.decision for a in group], seen, full, data.labels[row], **wanted)
        assert earned.keys() == oracle.keys() and all((earned[name] == oracle[name]).all() for name in oracle)


@pytest.mark.parametrize("more, wanted", [
    ((), {}), (("--no-std",), {"std": False}), (("--std-floor", "0.7"), {"std_floor": 0.7}), (("--advantage", "group"), {"mode": "group"}),
    (("--decision-weight", "pi"), {"decision_weight": "pi", "p_region": torch.tensor([.1, .7])}),
    (("--sure", ".8"), {"sure": .8, "p_region": torch.tensor([.1, .7])})])
def test_flags_of_the_advantage(settings, more, wanted):
    actions = [[Action(d, None, p, "") for d in ("FULL", "REGION", "REGION")] for p in (.1, .7)]
    totals, counts = [[1., .2, -.4], [0., .5, .1]], [[2, 1, 1], [2, 1, 1]]
    found = train.judge(actions, counts, [{"total": np.array(total)} for total in totals], settings(*more))
    codes = torch.tensor([[rgrpo.FULL, rgrpo.REGION, rgrpo.REGION]] * 2)
    oracle = rgrpo.advantages(torch.tensor(totals), codes, weights=torch.tensor(counts), **wanted)
    assert all(map(torch.equal, found[:2], oracle)) and found[2].tolist() == counts


DELTAS = ("mrr", "ndcg", "rank", "margin")


def test_describe_by_hand():
    groups = [[Action(d, None, p, "") for d in kinds] for kinds, p in (
        (("FULL", "REGION", "REGION"), .2), (("REGION", "MALFORMED"), .6))]
    rewards = [{"total": np.array([1, .5, -.5]), **{f"d_{k}": np.array([0, .4, -.1]) for k in DELTAS}},
               {"total": np.array([.3, -1]), **{f"d_{k}": np.array([.6, 0]) for k in DELTAS}}]
    log = train.describe(groups, [[4, 1, 1], [1, 1]], rewards)
    # 8 rollouts: 4 of FULL earn 1, three REGION .5, -.5 and .3, one MALFORMED -1: 4 + .3 - 1 = 3.3.
    wanted = {"reward": 3.3 / 8, "full_rate": .5, "region_rate": 3 / 8, "malformed_rate": 1 / 8, "reward_full": 1.0,
              "reward_region": .1, **{f"d_{k}": .3 for k in DELTAS}, "p_region": .4}
    assert log == pytest.approx(wanted)


def test_describe_says_nothing_about_what_did_not_happen():
    earned = {"total": np.array([1.0]), **{f"d_{k}": np.zeros(1) for k in DELTAS}}
    assert train.describe([[Action("FULL", None, None, "")]], [[1]], [earned]) == {
        "reward": 1, "full_rate": 1, "region_rate": 0, "malformed_rate": 0, "reward_full": 1, "p_region": None}


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["token", "sequence"])
@pytest.mark.parametrize("beta", ["0", "0.3"])
def test_micro_batches_change_nothing(home, data, settings, norm, beta):
    policy = new_policy(home, away=0.1, targets="all")
    whole = settings("--norm", norm, "--beta", beta, "--micro-tokens", "9999", "--balance", "resample", "--hold", "1")
    prompts, groups, _, advantages = drawn(policy, data, whole)
    numbers, wanted = gradient(policy, prompts, groups, advantages, whole)
    for micro in (1, 3):
        whole.micro_tokens = room_for(micro, policy, prompts, groups)
        parts, found = gradient(policy, prompts, groups, advantages, whole)
        assert close(found, wanted)
        # abs: at the first inner step the loss is 0 up to rounding (advantages of a group add up to 0).
        assert parts == pytest.approx(numbers, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("mode, hold", [("factored", 0), ("group", 0), ("factored", 0.5)])
def test_gradient_equals_the_definition_and_idle_groups_cost_nothing(home, data, settings, monkeypatch, mode, hold):
    policy, args, passed = new_policy(home, away=0.1), settings("--advantage", mode, "--hold", str(hold)), []
    # Queries 1 and 3 earn the same whatever they do.
    prompts, groups, _, advantages = drawn(policy, data, args, rewards=lambda b, n: b % 2 or math.sin(b + 5 * n))
    wanted = slow_gradient(policy, prompts, groups, advantages, hold=hold, queries=args.queries, left_out=(1, 3))
    monkeypatch.setattr(policy, "score", lambda pack, *rest, score=policy.score, **more:
                        passed.append(pack.queries) or score(pack, *rest, **more))
    args.micro_tokens = 9999
    numbers, found = gradient(policy, prompts, groups, advantages, args)
    assert close(found, wanted, 2e-5)
    assert passed == [[0, 2]] and numbers["zero_advantage"] == 0.5
    assert numbers["grad_norm"] == pytest.approx(float(wanted.norm()), rel=1e-4)
    assert ("outside" in numbers) == (hold > 0)
    assert numbers["logp_gap"] < 1e-4  # sampling and scoring agree


def test_a_step_in_which_every_group_is_idle(home, data, settings):
    policy, args = new_policy(home, away=0.1), settings()
    prompts, groups, _, advantages = drawn(policy, data, args, rewards=lambda b, n: 0.25)
    numbers, _ = gradient(policy, prompts, groups, advantages, args, step=lambda: pytest.fail("the weights moved"))
    assert numbers == {"zero_advantage": 1.0}


def test_a_weighted_full_answer_equals_as_many_rollouts(home, data, settings):
    policy, args = new_policy(home, away=0.1), settings("--group", "6", "--norm", "sequence")
    prompts, groups, counts, advantages = drawn(policy, data, args)
    repeated = [[group[0]] * 3 + group[1:] for group in groups]
    assert counts[0] == [3, 1, 1, 1] and len(repeated[0]) == 6
    totals = [{"total": np.array([math.sin(3 * b + 5 * max(n - 2, 0)) for n in range(6)])} for b in range(4)]
    plain = train.judge(actions_of(repeated), [[1] * 6] * 4, totals, args)
    assert all(torch.allclose(a[:, 0], b[:, 2]) and torch.allclose(a[:, 1:], b[:, 3:])
               for a, b in zip(advantages[:2], plain))
    for norm in ("sequence", "token"):
        args.norm = norm
        wanted = gradient(policy, prompts, repeated, plain, args)[1]
        assert close(gradient(policy, prompts, groups, advantages, args)[1], wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_first_inner_step_has_ratio_1_and_the_second_moves(home, data, settings, dropout):
    policy, args = new_policy(home, dropout), settings("--inner-steps", "1", "--lr", "0.02")
    prompts, groups, _, advantages = drawn(policy, data, args)
    args.micro_tokens = room_for(2, policy, prompts, groups)
    torch.manual_seed(0)
    numbers, _ = gradient(policy, prompts, groups, advantages, args)
    assert numbers["ratio_max"] == 1.0 and numbers["clip_fraction"] == 0.0
    args.inner_steps, optimizer, ratios, values = 2, torch.optim.AdamW(policy.lora_parameters(), lr=0.02), [], []
    plain = rgrpo.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rgrpo, "loss", lambda logp, old, *rest: ratios.append(
            (logp - old).detach().exp()) or values.append((rest[2], plain(logp, old, *rest))) or values[-1][1])
        args.clip = 0.07
        numbers = train.update(policy, optimizer, prompts, groups, advantages, args, ["a", "b", "c", "d"])
    # Micro-batches of 2: queries 0-1, 2-3 and, after the step, 0-1, 2-3 once more.
    assert [bool((ratio == 1).all()) for ratio in ratios] == [True, True, False, False]
    assert {clip for clip, _ in values} == {0.07}
    assert numbers["loss"] == pytest.approx(sum(value.item() for _, (value, _) in values) / 2)  # a mean of inner steps


def test_sampling_and_scoring_share_the_temperature(home, data, settings):
    policy, args = new_policy(home, away=0.1), settings("--temperature", "3")
    prompts, groups, _, advantages = drawn(policy, data, args)
    assert gradient(policy, prompts, groups, advantages, args)[0]["logp_gap"] < 1e-4
    args.temperature = 1.0
    assert drawn(policy, data, args)[1][0][1].log_probs != groups[0][1].log_probs


def test_gradient_is_clipped(home, data, settings):
    policy, args = new_policy(home, away=0.1), settings("--max-grad-norm", "1e-3")
    prompts, groups, _, advantages = drawn(policy, data, args)
    optimizer = torch.optim.SGD(policy.lora_parameters(), lr=1e-9)
    numbers = train.update(policy, optimizer, prompts, groups, advantages, args, list("abcd"))
    assert numbers["grad_norm"] > 1e-2 and float(flat_gradient(policy).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_dropout_is_on_in_the_update_and_off_in_everything_else(home, data, settings):
    policy, args = new_policy(home, dropout=0.5, away=0.1), settings("--beta", "0.1")
    prompts, groups, _, advantages = drawn(policy, data, args)
    first, second = (gradient(policy, prompts, groups, advantages, args)[1] for _ in range(2))
    assert not close(first, second, 0.01)
    assert not policy.training
    assert [c.ids for c in drawn(policy, data, args)[1][0]] == [c.ids for c in groups[0]]


@pytest.mark.parametrize("decode", ["grammar", "free"])
def test_kl_is_to_the_policy_without_adapter(home, data, settings, decode):
    """Under the grammar whole answers' (rgrpo.answer_kl, tested against enumeration), a mean over the step's queries;
    in free decoding k3, a mean over tokens."""
    policy, args = new_policy(home, away=0.1), settings("--beta", "0", "--queries", "4", "--decode", decode,
                                                        "--max-new-tokens", "6", "--micro-tokens", "9999")
    prompts, groups, _, advantages = drawn(policy, data, args)
    without, _ = gradient(policy, prompts, groups, advantages, args)
    base = load_policy(str(home / "policy"), system_prompt="Crop or not?", attention="eager")
    with torch.no_grad():
        ours, theirs = (p.log_probs(prompts, groups) for p in (policy, base))
    if decode == "grammar":
        owner, weight = torch.arange(4).repeat_interleave(3), advantages[2].flatten()
        kl = rgrpo.answer_kl(ours["logp"], ours["options"], theirs["options"], ours["mask"], ours["decision"], owner,
                             weight).item() / 4
    else:
        difference = theirs["logp"] - ours["logp"]  # [M, T]
        k3 = (difference.exp() - difference - 1)[ours["mask"]]
        kl = float(k3.mean())
    args.beta = 0.5
    log, pulled = gradient(policy, prompts, groups, advantages, args)
    assert kl > 0.01 and log["kl"] == pytest.approx(kl, rel=1e-4)
    if decode == "free":
        assert log["loss"] == pytest.approx(without["loss"] + 0.5 * kl, rel=1e-4)
    # With no advantage anywhere, the KL term alone works on the weights: no group is idle then.
    nothing = tuple(torch.zeros_like(table) for table in advantages[:2]) + advantages[2:]
    numbers, found = gradient(policy, prompts, groups, nothing, args)
    assert numbers["zero_advantage"] == 1.0 and numbers["kl"] == pytest.approx(kl, rel=1e-4)
    assert float(found.norm()) > 1e-4 and not close(found, pulled, 0.01)
    args.beta = 0.25
    assert close(gradient(policy, prompts, groups, nothing, args)[1], found / 2)


def test_a_loss_that_is_not_finite_names_the_query(home, data, settings, monkeypatch):
    policy, args = new_policy(home), settings("--micro-tokens", "9999")
    prompts, groups, _, advantages = drawn(policy, data, args)

    def broken(*arguments, score=policy.score, **more):
        out = score(*arguments, **more)
        m = next(m for m in range(3, 6) if out["mask"][m].any())  # 3 answers a query: rollouts 3 .. 5 are query 1's
        t = int(out["mask"][m].int().argmax())
        return {**out, "logp": out["logp"].index_put((torch.tensor(m), torch.tensor(t)), torch.tensor(math.nan))}

    monkeypatch.setattr(policy, "score", broken)
    with pytest.raises(FloatingPointError, match=r"loss is nan.*queries \['q1'\]"):
        gradient(policy, prompts, groups, advantages, args)


def test_a_gradient_that_is_not_finite_stops_before_the_weights(home, data, settings):
    policy, args = new_policy(home), settings()
    prompts, groups, _, advantages = drawn(policy, data, args)
    policy.lora_parameters()[1].register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match="gradient's norm is (nan|inf)"):
        gradient(policy, prompts, groups, advantages, args, step=lambda: pytest.fail("the weights moved"))


def saved_bytes(policy, run):
    """Bytes that autograd keeps for the backward pass of run(), every storage once, weights left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_memory_and_nothing_else(home, data, settings, dropout):
    """Equal gradients, in language model and tower, also when dropout has to be drawn a second time."""
    found = []
    for more in ((), ("--checkpointing",)):
        args = settings("--targets", "all", "--dropout", str(dropout), "--beta", "0.1", *more)
        policy = train.open_policy(args, "Crop or not?")
        for parameter in policy.lora_parameters():  # away from B = 0, where A has no gradient
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
        prompts, groups, _, advantages = drawn(policy, data, args)
        torch.manual_seed(3)
        numbers, grads = gradient(policy, prompts, groups, advantages, args)
        policy.train()
        found.append((numbers, grads, saved_bytes(policy, lambda: policy.log_probs(prompts, groups))))
        policy.eval()
    (plain, wanted, much), (numbers, grads, little) = found
    assert close(grads, wanted, 1e-6) and numbers == pytest.approx(plain, rel=1e-6, abs=1e-6)
    assert little < much / 4


def test_policy_in_bfloat16(home, tmp_path):
    """Frozen weights in bfloat16, LoRA in float32; such a run trains, and its config.json says so to evaluate.py."""
    arguments = flags(home, tmp_path / "run", "--policy-dtype", "bfloat16", "--dropout", "0")
    policy = train.open_policy(train.parse_args(arguments), "Crop or not?")
    assert policy.model.dtype == torch.bfloat16 and {p.dtype for p in policy.lora_parameters()} == {torch.float32}
    train.main(arguments)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 5 and all(math.isfinite(line["loss"]) and line["logp_gap"] < .1 for line in log[1:])
    assert any(line["grad_norm"] > 0 for line in log[1:])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["policy_dtype"] == "bfloat16"


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full, rightwards", [(-1.0, True), (1.0, False)])
def test_one_query_is_learned(home, data, settings, full, rightwards):
    """REGION earns its x1 (or minus it) as a share of the width, FULL always less (or always more)."""
    policy, args = new_policy(home), settings("--group", "16")
    prompts = opened(policy, data, [1])
    optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=0.01, weight_decay=0.0)
    p_region, x1 = [], []
    for step in range(25):
        groups, counts = train.sample_groups(policy, prompts, [(0, step, 1)], args)
        place = np.array([c.action.box[0] / 84 if c.action.box else 0.0 for c in groups[0]])
        total = np.where(place, place if rightwards else -place, 0.0)
        total[0] = full
        advantages = train.judge(actions_of(groups), counts, [{"total": total}], args)
        train.update(policy, optimizer, prompts, groups, advantages, args, ["q"])
        p_region.append(groups[0][0].action.p_region)
        x1.append(place[1:].mean())
    assert p_region[-1] > 0.9 if rightwards else p_region[-1] < 0.1
    assert 0.05 < p_region[0] < 0.95
    before, after = np.mean(x1[:3]), np.mean(x1[-3:])
    assert after > before + 0.2 if rightwards else after < before - 0.1


def test_validate_equals_one_query_at_a_time(home, scorer, settings, monkeypatch):
    policy, args, asked = new_policy(home, away=0.3), settings("--val-queries", "2"), []
    val = load_data(str(home / "data"), "val")
    found = train.validate(policy, scorer, val, args)
    ranks, crops = [], 0
    rows = sorted(np.random.default_rng(0).permutation(VAL)[:2].tolist())
    assert rows != [0, 1]  # not the first ones
    for row in rows:
        (action,) = policy.act([val.open_image(row)], [val.queries[row].question])
        crops += action.decision == "REGION"
        view = scorer.image_features([crop(val.open_image(row), action.box)])[0] if action.box else val.full[row]
        scores = val.candidates(row) @ view.astype(np.float32)
        positive = val.labels[row].any()  # a miss counts 0 in MRR, and is left out of CondR
        ranks.append(1 + int((scores > scores[np.argmax(val.labels[row])]).sum()) if positive else math.inf)
    assert found == {"val_mrr": pytest.approx(np.mean([1 / rank for rank in ranks])), "val_crop_rate": crops / 2,
                     "val_cond_r1": pytest.approx(np.mean([rank == 1 for rank in ranks if rank < math.inf]))}
    # Evaluated as trained: free text stays free text. And more val queries than there are is all of them.
    monkeypatch.setattr(policy, "act", lambda images, questions, decode, batch_size:
                        asked.append((len(images), decode)) or [acted("FULL")] * len(images))
    assert train.validate(policy, scorer, val, settings("--decode", "free"))["val_crop_rate"] == 0
    assert asked == [(VAL, "free")]


# ---- runs ------------------------------------------------------------------------------------------------------------

DROPOUT = ("--dropout", "0.2", "--targets", "all", "--beta", "0.05", "--inner-steps", "2")


@pytest.fixture(scope="session")
def finished(home):
    """A run of four steps; tests read it and change nothing."""
    train.main(flags(home, home / "finished", *DROPOUT))
    return home / "finished"


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def untimed(run):
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory_mb")}
            for line in read_log(run)]


def weights(run):
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def copy_run(finished, folder, *names):
    """Some files of the finished run, for a test to change."""
    (folder / "run" / "adapter").mkdir(parents=True)
    for name in names:
        shutil.copy(finished / name, folder / "run" / name)
    return folder / "run"


ADAPTER = "adapter/adapter_model.safetensors"


def test_answers_are_as_long_as_the_run_allows_wherever_they_are_asked_for(home, tmp_path):
    """While training, in its evaluations (no flag of theirs), and in evaluate.py."""
    free = ("--decode", "free", "--max-new-tokens", "5", "--steps", "1", "--eval-every", "0")
    assert train.open_policy(train.parse_args(flags(home, "run", *free)), None).max_new_tokens == 5
    train.main(flags(home, tmp_path / "run", *free))
    config = json.loads((tmp_path / "run/config.json").read_text())
    args = evaluate.parse_args(["--run", str(tmp_path / "run"), "--device", "cpu"])
    assert evaluate.open_policy(f"{home}/policy", config, args, trained=True).max_new_tokens == 5


def test_a_run_leaves_what_it_promises(finished):
    config = json.loads((finished / "config.json").read_text())
    assert {"args", "pools", "policy", "scorer", "data", "system_prompt", "micro_tokens"} == set(config)
    assert config["args"]["steps"] == 4 and config["args"]["max_prompt_tokens"] == 8192
    assert {path.name for path in finished.iterdir()} == {"config.json", "log.jsonl", "samples.jsonl", "state.pt",
                                                          "adapter", "adapter_best", "finished", "lock"}
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3  # FULL once, REGION twice
    assert {"query_id", "question", "text", "decision", "box", "p_region", "forced", "reward", "decision_advantage",
            "box_advantage"} < set(samples[0])


def test_log_has_the_documented_fields_and_no_other(finished):
    log = read_log(finished)
    assert [line["step"] for line in log] == [-1, 0, 1, 2, 3] and set(log.pop(0)) == {"step"} | EVALUATED
    assert [set(line) for line in log] == [
        ALWAYS | OF_FULL | OF_REGION | LEARNED | (EVALUATED if step in (1, 3) else set()) for step in range(4)]
    assert all(math.isfinite(value) for line in log for value in line.values())
    assert [line["lr"] for line in log] == pytest.approx([train.learning_rate(s, 4, 0.01, 1) for s in range(4)])
    assert all(line["full_rate"] == line["region_rate"] == 0.5 for line in log)  # force
    assert all(line["kl"] > 0 for line in log)  # the second inner step has left the reference policy, at the latest


def test_resumed_run_equals_an_unbroken_one(home, finished, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", train.train_step

    def killed(step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return whole(step, *rest)

    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(SystemExit):
        train.main(flags(home, run, *DROPOUT))
    assert len(read_log(run)) == 4 and not (run / "finished").exists()  # steps 0 and 1 are in state.pt, step 2 is lost
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "reward": 0.5}'[:17])
    monkeypatch.setattr(train, "train_step", whole)
    train.main(flags(home, run, *DROPOUT, "--resume"))
    assert untimed(run) == untimed(finished)
    assert (run / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert weights(run) == weights(finished)
    assert (run / "adapter_best" / Path(ADAPTER).name).read_bytes() == (
        finished / "adapter_best" / Path(ADAPTER).name).read_bytes()


def test_a_finished_run_goes_on_with_more_steps(home, tmp_path, capsys):
    """In a run without decay of the learning rate's kind it is the longer run; and evaluations may come more often."""
    run, steady = tmp_path / "run", ("--lr", "0.01", "--warmup", "100", "--hold", "0.5")
    train.main(flags(home, run, *steady, "--steps", "2", "--eval-every", "0"))
    train.main(flags(home, run, *steady, "--steps", "4", "--eval-every", "1", "--save-every", "1", "--resume"))
    assert "steps 2 to 4" in capsys.readouterr().out and (run / "finished").read_text() == "4 steps\n"
    train.main(flags(home, tmp_path / "whole", *steady, "--eval-every", "0"))
    assert weights(run) == weights(tmp_path / "whole")
    assert [(line["step"], "val_mrr" in line) for line in read_log(run)] == [
        (0, False), (1, False), (2, True), (3, True)]
    assert (run / "adapter_best").is_dir() and json.loads((run / "config.json").read_text())["args"]["steps"] == 4
    assert "has 4 steps already, more than the 3 asked for" in refused(*flags(home, run, *steady, "--steps", "3",
                                                                              "--resume"))
    assert (run / "finished").read_text() == "4 steps\n"


@pytest.mark.parametrize("mrr, best", [((.5, .6, .4), 1), ((.7, .6, .4), -1), ((.5, .6, .6), 1), ((.1, .2, .3), 3)])
def test_best_adapter_is_that_of_the_best_evaluation(home, tmp_path, monkeypatch, mrr, best):
    """Evaluated before step 0, after step 1 and after step 3; the first of equal ones stays."""
    values, saved = iter(mrr), {}
    monkeypatch.setattr(train, "validate", lambda policy, *_: saved.update(
        {len(saved): {name: layer.lora_B.detach().clone() for name, layer in policy.layers.items()}})
        or {"val_mrr": next(values)})
    train.main(flags(home, tmp_path / "run"))
    policy = load_policy(str(home / "policy"), str(tmp_path / "run" / "adapter_best"))
    wanted = saved[{-1: 0, 1: 1, 3: 2}[best]]
    assert wanted and all(torch.equal(policy.layers[name].lora_B, b) for name, b in wanted.items())


def test_another_seed_gives_other_numbers_and_the_same_seed_the_same(home, data, scorer, settings):
    found = []
    for seed in (0, 0, 1):
        args = settings("--seed", str(seed), "--dropout", "0.2")
        policy = new_policy(home, dropout=0.2, seed=seed)
        optimizer = torch.optim.AdamW(policy.lora_parameters(), lr=0.01, weight_decay=0.0)
        opened = train.open_step(0, policy, data, args)
        log, samples = train.train_step(0, 4, opened, policy, optimizer, scorer, data, args)
        found.append((log, samples, [p.detach().clone() for p in policy.lora_parameters()]))
    first, again, other = found
    assert first[:2] == again[:2] and all(map(torch.equal, first[2], again[2]))
    assert first[0]["p_region"] != other[0]["p_region"] and first[1] != other[1]


def test_dropout_is_drawn_anew_in_each_step(home, tmp_path, monkeypatch):
    seeds, plain = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or plain(seed))
    for seed in ("0", "1"):
        train.main(flags(home, tmp_path / seed, "--seed", seed, "--eval-every", "0"))
    assert len(seeds) == len(set(seeds)) == 8  # two runs of four steps


def refused(*command):
    """main's last words."""
    with pytest.raises(SystemExit) as stopped:
        train.main(list(command))
    return str(stopped.value)


def test_finished_run(home, finished, tmp_path, monkeypatch, capsys):
    run = copy_run(finished, tmp_path, "config.json", "log.jsonl", "state.pt", "finished", ADAPTER)
    assert "holds a finished run: " in refused(*flags(home, run, *DROPOUT))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "open_policy", lambda *_: pytest.fail("nothing is left to do"))
    train.main(flags(home, run, *DROPOUT, "--resume"))
    assert "already finished" in capsys.readouterr().out
    (run / "state.pt").unlink()  # may be removed to save disk
    train.main(flags(home, run, *DROPOUT, "--resume"))
    assert {path: path.read_bytes() for path in before if path.exists()} == {
        path: content for path, content in before.items() if path.name != "state.pt"}


def test_run_with_a_state_needs_resume_and_its_own_settings(home, finished, tmp_path, monkeypatch):
    run = copy_run(finished, tmp_path, "config.json", "state.pt")
    assert "holds a run: go on with --resume" in refused(*flags(home, run, *DROPOUT))
    message = refused(*flags(home, run, *DROPOUT, "--resume", "--lr", "0.02", "--group", "6"))
    assert "--resume with other values of group, lr than" in message and "config.json" in message
    (tmp_path / "prompt.txt").write_text("Never crop.")
    other = ("--resume", "--system-prompt", str(tmp_path / "prompt.txt"))
    assert "other values of system_prompt than" in refused(*flags(home, run, *DROPOUT, *other))
    # These may change: they have no part in the result. Nor has the place of a prompt's file.
    (tmp_path / "prompt.txt").write_text("Crop or not?")
    monkeypatch.setattr(train, "open_policy", lambda *_: pytest.fail("came through"))
    with pytest.raises(pytest.fail.Exception, match="came through"):
        train.main(flags(home, run, *DROPOUT, *other, "--save-every", "1", "--max-prompt-tokens", "9000",
                         "--checkpointing", "--eval-every", "1", "--steps", "9"))
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", {**config, "pools": "of other data"})
    assert "other values of pools (the data) than" in refused(*flags(home, run, *DROPOUT, "--resume"))
    for content in ("", "[]", '{"pools": 1}', "\x00"):
        (run / "config.json").write_text(content)
        assert str(run / "config.json") in refused(*flags(home, run, *DROPOUT, "--resume"))
    (run / "config.json").unlink()
    assert "config.json is missing" in refused(*flags(home, run, *DROPOUT, "--resume"))


def test_run_killed_before_its_first_state_starts_again(home, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "log.jsonl").write_text('{"step": 0, "reward": 9}\n{"step": 1, "rew')
    train.main(flags(home, run, "--steps", "1", "--eval-every", "0", "--resume"))
    assert [line["step"] for line in read_log(run)] == [0] and read_log(run)[0]["reward"] < 9


# ---- several processes -----------------------------------------------------------------------------------------------


def forked(processes, command, folder):
    """As torchrun does it, but without importing everything anew. Exit codes; what they print is in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        # Left open: what SystemExit says is printed after this function.
        sys.stdout, sys.stderr = (open(folder / f"{rank}.{end}", "w", buffering=1) for end in ("out", "err"))
        tqdm.set_lock(threading.RLock())  # a thread of the parent's may have held its own at the fork
        train.main(command)

    children = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        if child.is_alive():
            child.kill()
            pytest.fail("a process hangs")
    return [child.exitcode for child in children]


def torchrun(processes, command):
    """train.py under torchrun on a free port; a hang is an error."""
    # Without the "--" argparse of some versions takes our --run for a short form of torchrun's own --run-path.
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--",
         str(Path(train.__file__)), *command],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_equal_one(home, tmp_path):
    """Three queries a step, so the shares are 2 and 1; process 1 also goes idle now and then."""
    more = ("--queries", "3", "--lr", "0.001", "--beta", "0.05", "--inner-steps", "2",
            "--decision-weight", "pi", "--targets", "all")
    train.main(flags(home, tmp_path / "one", *more))
    done = torchrun(2, flags(home, tmp_path / "two", *more))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("r-GRPO: 6 training queries") == 1 and "on 2 x cpu" in done.stdout
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    for ours, theirs in zip(untimed(tmp_path / "two"), untimed(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    lines = [[json.loads(line) for line in (tmp_path / run / "samples.jsonl").read_text().splitlines()]
             for run in ("two", "one")]
    assert [line["text"] for line in lines[0]] == [line["text"] for line in lines[1]]
    ours, theirs = (load_file(tmp_path / run / ADAPTER) for run in ("two", "one"))
    assert set(ours) == set(theirs) and max(float(b.abs().max()) for k, b in theirs.items() if "lora_B" in k) > 1e-3
    assert all(float((ours[key] - theirs[key]).abs().max()) < 1e-5 for key in theirs)


def test_two_processes_go_on_where_one_was_killed(home, tmp_path, monkeypatch):
    more = ("--eval-every", "0", "--lr", "0.001")
    train.main(flags(home, tmp_path / "one", *more))
    whole = train.train_step
    monkeypatch.setattr(train, "train_step", lambda step, *rest: whole(step, *rest) if step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(flags(home, tmp_path / "two", *more))
    monkeypatch.setattr(train, "train_step", whole)
    assert forked(2, flags(home, tmp_path / "two", *more, "--resume"), tmp_path) == [0, 0]
    assert "steps 2 to 4" in (tmp_path / "0.out").read_text() and not (tmp_path / "1.out").read_text()
    assert [line["step"] for line in read_log(tmp_path / "two")] == [0, 1, 2, 3]
    for ours, theirs in zip(untimed(tmp_path / "two"), untimed(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_one_process_that_fails_stops_all(home, tmp_path):
    """The image of process 1's share is gone: it says so, and process 0 does not wait for it."""
    shutil.copytree(home / "data", tmp_path / "data")
    shutil.copytree(home / "raw", tmp_path / "raw")
    second = train.queries_of_step(0, TRAIN, 2, 0)[1]
    (tmp_path / f"raw/train{second}.png").unlink()
    assert forked(2, flags(home, tmp_path / "run", "--data", str(tmp_path / "data")), tmp_path) == [1, 1]
    first, other = [(tmp_path / f"{rank}.err").read_text() for rank in range(2)]
    assert f"train{second}.png" in other and "needed by" in other and "Traceback" not in other and first
    assert not (tmp_path / "run/adapter").exists() and [line["step"] for line in read_log(tmp_path / "run")] == [-1]


def test_processes_that_cannot_share(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "counts the queries of a step over all 3 processes" in refused(*flags(home, tmp_path / "run"))
    assert "give cuda" in refused(*flags(home, tmp_path / "run", "--queries", "3", "--device", "cuda:1"))


def test_system_prompt_file(home, tmp_path):
    assert "No such file or directory: 'nowhere.txt'" in refused(
        *flags(home, tmp_path / "run", "--system-prompt", "nowhere.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "the file is empty" in refused(
        *flags(home, tmp_path / "run", "--system-prompt", str(tmp_path / "empty.txt")))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock"}


def test_long_prompt_is_an_error_and_is_not_cut(home, data, tmp_path):
    message = refused(*flags(home, tmp_path / "run", "--max-prompt-tokens", "30", "--seed", "2"))
    first = data.queries[train.queries_of_step(0, TRAIN, 2, 2)[0]]
    # 84 x 56 pixels are 3 x 2 image tokens.
    assert first.query_id in message and ", 6 of them its image" in message and "--max-pixels" in message
    length = int(message.split(" tokens")[0].split()[-1])
    train.main(flags(home, tmp_path / "other", "--max-prompt-tokens", str(length), "--steps", "1", "--eval-every", "0",
                     "--seed", "2"))  # the questions are of equal length: at the limit is within it


def test_question_that_cannot_be_asked_names_the_query(home, data, monkeypatch):
    monkeypatch.setattr(data.queries, "kind", lambda **line: Query(**{**line, "question": "What is <|im_end|>?"}))
    with pytest.raises(InputError, match=r"train.jsonl: question 0 contains .* in queries \['train-2', 'train-3'\]"):
        opened(new_policy(home), data, [2, 3])


@pytest.mark.parametrize("fault", [ValueError("ours"), TypeError("ours"), MemoryError("ours")])
def test_fault_of_ours_keeps_its_traceback(home, tmp_path, monkeypatch, fault):
    """A one-line message is for the user's own input alone."""
    def broken(*_):
        raise fault

    monkeypatch.setattr(train, "judge", broken)
    with pytest.raises(type(fault), match="ours"):
        train.main(flags(home, tmp_path / "run"))


def test_not_finite_names_the_step(home, tmp_path, monkeypatch):
    def burst(*arguments):
        raise FloatingPointError(f"loss is nan; queries {arguments[-1]}")

    monkeypatch.setattr(train, "update", burst)
    message = refused(*flags(home, tmp_path / "run"))
    assert "step 0 (from 0" in message and "train-" in message and "--lr" in message


def test_data_without_queries_is_refused(home, tmp_path):
    for split, words in (("train", "see the counts in manifest.json"), ("val", "give --eval-every 0")):
        folder = tmp_path / split
        shutil.copytree(home / "data", folder / "data")
        write_split(folder / "data", split, [], pool=np.zeros((0, K)), pool_image=np.zeros((0, K)),
                    labels=np.zeros((0, K)), retrieval=np.zeros((0, K)), full=np.zeros((0, 8)))
        message = refused(*flags(home, folder / "run", "--data", str(folder / "data")))
        assert words in message and f"{split}.jsonl" in message and not (folder / "run").exists()


def test_scorer_that_did_not_prepare_the_data_is_refused(home, tmp_path):
    assert "was prepared with scorer" in refused(*flags(home, tmp_path / "run", "--scorer-dtype", "bfloat16"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("end", ["", '{"step": 2, "text": "{}', '{"step": 2, "reward": {"d_mrr": 0.5}', '{"step": 2}'])
def test_keep_lines_before(tmp_path, end):
    """Whatever stands behind the last newline was cut off, also when it ends in a brace."""
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "text": "a } b\u2028"}) + "\n" for step in (0, 0, 1, 2)]
    path.write_text("".join(lines) + end)
    train.keep_lines_before(path, 2)
    assert path.read_text() == "".join(lines[:3])
    train.keep_lines_before(path, 0)
    assert path.read_text() == ""
    train.keep_lines_before(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()
