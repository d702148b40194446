"""tools/bench.py: what it compares must compute the same, and what it counts must be what is done."""

import json
import mmap
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import train
from tools import bench

TINY = ["--visual-tokens", "16", "--queries", "2", "--group", "4", "--repeat", "1", "--warmup", "0", "--device", "cpu",
        "--dropout", "0", "--batches", "1", "2", "--scorer-batch", "2"]


@pytest.fixture(scope="module")
def args():
    return bench.parse_args(TINY)


@pytest.fixture(scope="module")
def world(args):
    """policy with LoRA that does something, prompts, groups, counts, advantages."""
    policy = bench.build_policy(args)
    torch.manual_seed(1)
    for layer in policy.layers.values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.02)
    prompts = policy.prompts(*bench.build_inputs(args, args.queries))
    groups, counts = bench.write_answers(policy, prompts, args)
    totals = np.random.default_rng(0).normal(size=(2, 3))  # FULL once, two REGION
    return SimpleNamespace(policy=policy, prompts=prompts, groups=groups, counts=counts,
                           advantages=bench.judge(groups, counts, totals))


def gradients(policy, step):
    step(torch.optim.SGD(policy.lora_parameters(), lr=0.0))
    return [p.grad.clone() for p in policy.lora_parameters()]


def close(a, b):
    """Largest difference relative to the largest gradient."""
    scale = max(float(x.abs().max()) for x in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / scale < 1e-4


# ------------------------------------------------------------------------------------------ the same work on both sides

def test_answers_are_what_a_rollout_writes(world):
    for group in world.groups:
        assert [c.action.decision for c in group] == ["FULL", "REGION", "REGION"]
        for c in group:
            grammar = world.policy.grammar
            assert c.ids[-1] == world.policy.processor.tokenizer.eos_token_id
            # Which tokens are choices and among what is read off the grammar alone, so a rollout has the same.
            assert c.ids[c.decision_index] in (grammar.full, grammar.region)
            assert all((a is not None and t in a) == f for t, a, f in zip(c.ids, c.allowed, c.free))
    assert world.counts == [[2, 1, 1], [2, 1, 1]]
    assert [[c.action.decision for c in group] for group in bench.repeat(world.groups, world.counts)] == [
        ["FULL", "FULL", "REGION", "REGION"]] * 2


def test_repeated_log_probs_are_ours(world):
    ours = world.policy.log_probs(world.prompts, world.groups)
    theirs = bench.repeated_log_probs(world.policy, world.prompts, world.groups)
    assert torch.equal(ours["mask"], theirs["mask"]) and torch.equal(ours["decision"], theirs["decision"])
    assert torch.allclose(ours["logp"], theirs["logp"], atol=1e-5)
    assert ours["logp"].min() < -0.1  # there is something to compare


@pytest.mark.parametrize("rows", [4, 1])
def test_both_updates_have_the_gradients_of_train(world, args, rows):
    """So the numbers are those of train.py's step, and the two sides of the comparison do the same."""
    policy, part = world.policy, (world.prompts, world.groups)
    tables = tuple(torch.stack(columns) for columns in zip(*world.advantages))
    settings = SimpleNamespace(beta=0.0, norm="token", inner_steps=1, micro=1, max_grad_norm=1.0, temperature=1.0,
                               clip=0.2)
    wanted = gradients(policy, lambda o: train.update(policy, o, *part, tables, settings, ["a", "b"]))
    ours = bench.pack(*part, world.advantages)
    assert close(gradients(policy, lambda o: bench.update(policy, o, ours, policy.log_probs)), wanted)
    theirs = bench.unpack(*part, world.counts, world.advantages, rows)
    assert max(len(groups[0]) for _, groups, _ in theirs) == rows
    assert close(gradients(policy, lambda o: bench.update(
        policy, o, theirs, lambda *piece: bench.repeated_log_probs(policy, *piece))), wanted)


def test_rewards_and_advantages_are_those_of_train(args):
    scorer, images, groups, counts, full, candidates = bench.reward_inputs(args)
    totals, passes = bench.rewards_of(scorer, images, groups, full, candidates)
    labels = np.eye(1, bench.K, bench.K // 2, dtype=int)[0]
    data = SimpleNamespace(full=full, candidates=lambda i: candidates[i], labels=[labels] * 2)
    settings = SimpleNamespace(reward_weights=(0.2, 0.2, 0.2, 0.4), eta=1.0, reward="delta", advantage="factored",
                               decision_weight="uniform", std=True)
    encoder = SimpleNamespace(image_features=lambda views: bench.encode(scorer, views))
    actions = [[answer.action for answer in group] for group in groups]
    views = train.score_views(data, encoder, [0, 1], images, actions)
    wanted = train.reward_groups(data, [0, 1], actions, views, settings)
    np.testing.assert_allclose(totals, [w["total"] for w in wanted], atol=1e-6)
    tables = train.judge(actions, counts, wanted, settings)
    for b, rows in enumerate(bench.judge(groups, counts, totals)):
        assert all(torch.allclose(row, table[b], atol=1e-4) for row, table in zip(rows, tables))
    assert passes == 4  # two queries, two boxes each: FULL costs nothing


def test_generate_writes_whole_answers(world, args):
    length = bench.answer_length(world.policy, args)
    out = bench.generate(world.policy, world.prompts, args.group, length)
    assert out.shape == (2 * 4, max(len(p.ids) for p in world.prompts) + length)


# ------------------------------------------------------------------------------------------ counts, against a counter

def build_counted():
    """A random model whose tower has window blocks and a full one, and its config."""
    tokenizer = bench.build_processor(64).tokenizer
    config = bench.build_config("mini", tokenizer)
    config.vision_config.fullatt_block_indexes = [1]
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").requires_grad_(False), config


def test_parameters_are_counted_from_the_config():
    model, config = build_counted()

    def count(module, skip=None):
        return sum(p.numel() for n, p in module.named_parameters()
                   if p.dim() > 1 and not n.startswith("embed_tokens") and n.startswith("merger") == (skip is False)
                   or skip is None and p.dim() > 1 and not n.startswith("embed_tokens"))

    assert bench.language_parameters(config) == count(model.model.language_model)
    merger = sum(p.numel() for p in model.model.visual.merger.parameters() if p.dim() > 1)
    assert bench.vision_parameters(config) == (count(model.model.visual) - merger, merger)


@pytest.mark.parametrize("backward", [False, True])
def test_operations_are_those_that_torch_counts(backward):
    model, config = build_counted()
    tokens, patches = 50, 16 * 16  # 4 windows of 8 x 8 patches
    embeds = torch.randn(1, tokens, config.text_config.hidden_size, requires_grad=backward)
    with FlopCounterMode(display=False) as language:
        out = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        if backward:
            out.sum().backward()
    # Eager attention multiplies all pairs, also those that the mask takes out again.
    assert language.get_total_flops() == pytest.approx(
        bench.language_operations(config, tokens, tokens**2, backward), rel=0.01)
    pixels = torch.randn(patches, 1176, requires_grad=backward)
    with FlopCounterMode(display=False) as vision:
        out = model.model.visual(pixels, grid_thw=torch.tensor([[1, 16, 16]])).pooler_output
        if backward:
            out.sum().backward()
    assert vision.get_total_flops() == pytest.approx(bench.vision_operations(config, patches, backward), rel=0.02)


def test_causal_pairs():
    assert bench.causal(0, 3) == 1 + 2 + 3
    assert bench.causal(10, 2) == 11 + 12


def test_scorer_operations(args):
    scorer = bench.build_scorer(args)
    # In plain products: not every version of torch counts the fused kernel's.
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        bench.encode(scorer, bench.noise(3, 40, 30))
    # The class token has no patch, and the last projection is left out: less than 1 % each.
    assert counted.get_total_flops() == pytest.approx(bench.scorer_work(scorer.config, 3, torch.float32)[0], rel=0.02)


def test_both_towers_do_the_same_work(args):
    """open_clip's ViT beside ours: the same matrices; its biases and LayerNorms are not counted."""
    counted = []
    for tower in bench.encode_towers(args):
        tower.train()  # there is no dropout; the counter does not know the kernel that open_clip's takes in eval mode
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert tower(torch.zeros(2, 3, 112, 112)).shape == (2, 128)
        counted.append(counter.get_total_flops())
    assert counted[0] == pytest.approx(counted[1], rel=0.02)


def test_a_floor_reads_of_the_output_layer_what_is_needed(world):
    """The grammar chooses among some twenty tokens, so its floor must not wait for the logits of all."""
    head = world.policy.model.lm_head.weight.numel()
    (few, little), (all_, much) = (bench.decode_work(world.policy, 2, 3, 10, head=h) for h in (False, True))
    assert all_ - few == 3 * 2 * 2 * head and much - little == 3 * 4 * head  # steps x rows x 2; steps x 4 bytes


def test_ours_counts_less_work_than_the_repeated_way(world, args):
    ours = bench.update_work(world.policy, bench.pack(world.prompts, world.groups, world.advantages), args, False)
    theirs = bench.unpack(world.prompts, world.groups, world.counts, world.advantages, 4)
    theirs = bench.update_work(world.policy, theirs, args, True)
    # N = 4 rows of prompt + answer against one: between 3 and 5 times, as the prompt is most of both.
    assert len(ours) == len(theirs) == 2 and 3 < theirs[0][0] / ours[0][0] < 5


# ------------------------------------------------------------------------------------------ measuring

def test_floor_waits_for_the_slower_of_both():
    peaks = {"operations_per_s": 10, "bytes_per_s": 5}
    assert bench.floor_seconds([[10, 1], [1, 10]], peaks) == max(1, 0.2) + max(0.1, 2)


def test_memory_sees_what_is_taken():
    device, size = torch.device("cpu"), 200_000_000  # bytes
    before, _ = bench.memory(device)
    # Not an array: it could be given pages that an earlier test left to the process.
    with mmap.mmap(-1, size) as block:
        block.write(b"1" * size)
        now, peak = bench.memory(device)
    assert peak >= now and size <= now - before < 2.2 * size
    assert bench.memory(device)[0] < now - size / 2 and bench.memory(device)[1] >= peak


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
def test_a_peak_is_of_its_part():
    meter = bench.Meter("cpu", warmup=0)
    with meter.measure("much"), mmap.mmap(-1, 200_000_000) as block:
        block.write(b"1" * 200_000_000)
    with meter.measure("little"):
        pass
    assert meter.peak["little"] < meter.peak["much"] - 150_000_000  # bytes


def test_meter_leaves_the_warm_up_out():
    meter = bench.Meter("cpu", warmup=1)
    meter.ready()
    for _ in range(3):
        with meter.measure("nothing"):
            pass
    meter.seconds["nothing"] = [9.0, 2.0, 4.0]
    result = meter.result()
    assert result["seconds"] == {"nothing": [2.0, 4.0]} and result["median_s"] == {"nothing": 3.0}


def test_ratios():
    def case(part, seconds, peak, **counts):
        return {"median_s": {part: seconds}, "peak_bytes": {part: peak}, "rest_bytes": 100, "counts": counts}
    found = bench.compare({
        "update": case("update", 2.0, 200), "update_repeated": case("update", 12.0, 700),
        "reward": case("reward", 1.0, 200, image_passes=4), "reward_release": case("reward", 9.0, 200, image_passes=84),
        "rollout": case("rollout", 1.0, 200), "rollout_repeated": case("rollout", 5.0, 200),
        "step": case("step", 2.0, 100), "step_trl": {"left_out": "trl is not installed"},
        "act": {"median_s": {"batch 2 FULL": 1.0, "batch 2 grammar": 1.5, "batch 2 free": 3.0}}})
    # above rest: (700 - 100) / (200 - 100)
    assert found["update"] == {"time": 6.0, "peak_memory": 3.5, "memory_above_rest": 6.0}
    assert found["reward"]["image_passes"] == 21
    assert "step against TRL" not in found
    assert found["step against the sum of the repeated parts"] == {"time": (5 + 9 + 12) / 2}
    # 3 / 1.5 in all; without the prompt, which takes 1 s, (3 - 1) / (1.5 - 1).
    assert found["free against grammar, batch 2"] == {"time": 2.0, "time_after_prefill": 4.0}


@pytest.mark.parametrize("code, left_out", [(-9, True), (1, False)])
def test_a_case_that_ends_badly(monkeypatch, code, left_out):
    done = SimpleNamespace(returncode=code, stdout="", stderr="ValueError: no such thing")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: done)
    if left_out:
        assert "memory" in bench.start_case("step", [])["left_out"]
        return
    with pytest.raises(RuntimeError, match="no such thing"):
        bench.start_case("step", [])


def test_rows_are_halved_until_they_fit():
    tried = []

    def run(rows, room):
        tried.append(rows)
        if rows > room:
            raise torch.OutOfMemoryError("no room")

    assert bench.halving(12, lambda rows: run(rows, 3)) == 3 and tried == [12, 6, 3]
    with pytest.raises(torch.OutOfMemoryError):
        bench.halving(2, lambda rows: run(rows, 0))


@pytest.mark.parametrize("flags", [["--group", "1"], ["--rows", "3"],
                                   ["--visual-tokens", "3"], ["--repeat", "0"], ["--cases", "all"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_process_of_its_own():
    result = bench.start_case("reward", [*TINY, "--queries", "1"])
    assert result["counts"] == {"image_passes": 2} and len(result["seconds"]["reward"]) == 1
    assert result["peak_bytes"]["reward"] >= result["rest_bytes"] > 1e8


def test_whole_run(tmp_path, monkeypatch, capsys):
    """All cases, here instead of in processes of their own, to the JSON and the table."""
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)  # TRL is no requirement
    monkeypatch.setattr(bench, "start_case", lambda case, argv: json.loads(json.dumps(
        bench.run_case(bench.parse_args([*argv, "--case", case])))))
    out = tmp_path / "deep" / "tiny.json"
    bench.main([*TINY, "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["cases"]) == list(bench.CASES)
    assert found["args"]["visual_tokens"] == 16 and found["machine"]["torch"] == torch.__version__
    assert found["cases"]["step_trl"]["left_out"] == "trl is not installed"
    # 2 queries x 4 rollouts x (view + 20 candidates), against a crop for each of 2 boxes a query.
    assert found["ratios"]["reward"]["image_passes"] == 2 * 4 * 21 / 4
    assert found["ratios"]["update"]["time"] > 1
    counts = {case: result.get("counts") for case, result in found["cases"].items()}
    assert counts["rollout"]["image_passes"] == 2 and counts["update_repeated"]["image_passes"] == 8
    assert found["ratios"]["open_clip's ViT against ours"]["time"] > 0
    assert found["cases"]["encode"]["work"]["batch 2 ours"] == found["cases"]["encode"]["work"]["batch 2 open_clip"]
    assert counts["act"]["answer_tokens 1 free"] == counts["act"]["answer_tokens 1 grammar"]
    assert {"free against grammar, batch 1", "free against grammar, batch 2"} < set(found["ratios"])
    # A floor is below what was measured, whatever else the machine is doing.
    for result in found["cases"].values():
        assert all(0 < floor < result["median_s"][part] for part, floor in result.get("floor_s", {}).items())
    table = capsys.readouterr().out
    assert "trl is not installed" in table and "x floor" in table and not list(tmp_path.rglob("*.tmp"))


def test_trl_trains_the_same_weights(args):
    pytest.importorskip("trl")
    results = {case: bench.run_case(bench.parse_args([*TINY, "--queries", "1", "--group", "2", "--case", case]))
               for case in ("step", "step_trl")}
    assert results["step"]["counts"]["lora_parameters"] == results["step_trl"]["counts"]["lora_parameters"]
    assert len(results["step_trl"]["seconds"]["step"]) == 1
