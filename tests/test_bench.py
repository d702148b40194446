"""tools/bench.py, bench_trl.py and meter.py: what is compared must compute the same, what is counted must be done."""

import contextlib
import functools
import io
import json
import mmap
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import train
from tools import bench, bench_trl, meter

TINY = ["--visual-tokens", "16", "--queries", "2", "--group", "4", "--repeat", "1", "--warmup", "0", "--device", "cpu",
        "--dropout", "0", "--batches", "1", "2", "--scorer-batch", "2"]


@pytest.fixture(scope="module", autouse=True)
def processor():
    """Trained once: every case needs the same one, and none changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "build_processor", functools.lru_cache(bench.build_processor))
        yield


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
    rewards = [{"total": total} for total in np.random.default_rng(0).normal(size=(2, 3))]  # FULL once, two REGION
    return SimpleNamespace(policy=policy, prompts=prompts, groups=groups, counts=counts,
                           advantages=bench.judge(groups, counts, rewards, args))


def gradients(policy, step):
    step(torch.optim.SGD(policy.lora_parameters(), lr=0.0))
    return [p.grad.clone() for p in policy.lora_parameters()]


def close(a, b):
    """Largest difference relative to the largest gradient."""
    scale = max(float(x.abs().max()) for x in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / scale < 1e-4


# ------------------------------------------------------------------------------------------ the same work on both sides

def test_answers_are_what_a_rollout_writes(world, args):
    rolled, counts = bench.roll(world.policy, world.prompts, args)
    for group in [*world.groups, *rolled]:
        grammar = world.policy.grammar
        for c in group:
            assert c.ids[-1] == world.policy.processor.tokenizer.eos_token_id
            assert c.ids[c.decision_index] in (grammar.full, grammar.region)
            assert all((a is not None and t in a) == f for t, a, f in zip(c.ids, c.allowed, c.free))
    assert counts == world.counts
    assert [[c.action.decision for c in group] for group in world.groups] == [["FULL", "REGION", "REGION"]] * 2
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
def test_both_updates_have_the_same_gradients(world, rows):
    """Else the two sides of the comparison would not do the same."""
    policy, part = world.policy, (world.prompts, world.groups)
    args = bench.parse_args([*TINY, "--hold", "0"])
    ours = gradients(policy, lambda o: bench.update(policy, o, *part, world.advantages, args))
    theirs = bench.unpack(*part, world.counts, world.advantages, rows)
    assert max(len(groups[0]) for _, groups, _ in theirs) == rows
    assert close(gradients(policy, lambda o: bench.repeated_update(policy, o, theirs)), ours)


def test_ours_is_a_step_of_train(args):
    """Its defaults but for the shape: the numbers are those of train.py."""
    asked = vars(bench.settings(bench.parse_args([*TINY, "--hold", "0.5"])))
    assert (asked["queries"], asked["group"], asked["hold"], asked["micro_tokens"]) == (2, 4, 0.5, 8192)
    changed = {name for name, value in vars(train.parse_args(["--preset", "paper"])).items() if asked[name] != value}
    assert changed <= {"queries", "group", "hold", "micro_tokens", "beta"}
    scorer, images, actions, counts, data = bench.reward_inputs(args)
    rewards, passes = bench.earn(data, scorer, images, actions, args)
    assert passes == 4  # two queries, two boxes each: FULL costs nothing
    assert [list(earned["total"][:1]) for earned in rewards] == [[0.0]] * 2  # no full image finds the one positive
    assert all(0 <= x1 < x2 <= images[0].width and 0 <= y1 < y2 <= images[0].height
               for group in actions for x1, y1, x2, y2 in (a.box for a in group if a.box))


def test_generate_writes_whole_answers(world, args):
    length = bench.answer_length(world.policy, args)
    out = bench.generate(world.policy, world.prompts, args.group, length)
    assert out.shape == (2 * 4, max(len(p.ids) for p in world.prompts) + length)


# ------------------------------------------------------------------------------------------ counts

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_passes_are_counted_with_their_weights(attention):
    """By hand: 2 operations a weight and token, 4 a pair of tokens, layer and width; backward through frozen weights
    has the products once more, and the attention's two products twice (the fused kernel makes one of them again)."""
    config = bench.build_config("mini", bench.build_processor("mini", 64).tokenizer)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).requires_grad_(False).model
    weights = {name: sum(p.numel() for n, p in module.named_parameters() if p.dim() > 1 and "embed_tokens" not in n)
               for name, module in (("text", model.language_model), ("image", model.visual))}
    text, phases = config.text_config, []
    embeds = torch.randn(1, 50, text.hidden_size, requires_grad=True)
    with meter.counting([model.visual, model.language_model], phases):
        model.visual(torch.randn(64, 1176), grid_thw=torch.tensor([[1, 8, 8]]))  # 64 patches, one window
        out = model.language_model(inputs_embeds=embeds[:, :20], use_cache=False).last_hidden_state
        model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()
        del out
    pair = 4 * text.num_hidden_layers * text.hidden_size
    assert len(phases) == 3
    assert phases[1][0] == pytest.approx(2 * weights["text"] * 20 + pair * 20**2, rel=0.01)
    backward = (2 if attention == "eager" else 2.5) * pair * 50**2
    assert phases[2][0] == pytest.approx(4 * weights["text"] * 50 + pair * 50**2 + backward, rel=0.01)
    # Four patches are merged to a token before the last two layers.
    merger = sum(p.numel() for p in model.visual.merger.parameters() if p.dim() > 1)
    vision = config.vision_config
    assert phases[0][0] == pytest.approx(2 * (weights["image"] - merger) * 64 + 2 * merger * 64 // 4
                                         + 4 * vision.depth * vision.hidden_size * 64**2, rel=0.02)
    # float32; norms and biases are a per cent.
    assert [size for _, size in phases] == pytest.approx([4 * weights["image"]] + 2 * [4 * weights["text"]], rel=0.02)
    model.visual(torch.randn(64, 1176), grid_thw=torch.tensor([[1, 8, 8]]))
    assert len(phases) == 3  # nothing is left hanging on the modules


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_attention_on_a_card_is_counted_where_keys_have_fewer_heads(kernel):
    """A card's kernels, by their shapes alone: what only looks at a tensor is on the meta device."""
    query, key = torch.empty(2, 16, 30, 128, device="meta"), torch.empty(2, 4, 50, 128, device="meta")
    attend = {"flash": lambda: torch.ops.aten._scaled_dot_product_flash_attention(query, key, key),
              "efficient": lambda: torch.ops.aten._scaled_dot_product_efficient_attention(query, key, key, None, False),
              "cudnn": lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, key, None, False)}
    tower, phases = torch.nn.Identity(), []
    with meter.counting([tower], phases):
        tower(query)
        attend[kernel]()
    assert [operations for operations, _ in phases] == [4 * 2 * 16 * 30 * 50 * 128]
    shapes = query.shape, query.shape, key.shape, key.shape
    assert meter.attention_backward(*shapes) == 2.5 * meter.attention(*shapes[1:])


def test_both_towers_do_the_same_work(args):
    """open_clip's ViT beside ours: the same matrices; its biases and LayerNorms are not counted."""
    counted = []
    for tower in bench.encode_towers(args):
        tower.train()  # there is no dropout; the counter does not know the kernel that open_clip's takes in eval mode
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert tower(torch.zeros(2, 3, 112, 112)).shape == (2, 128)
        counted.append(counter.get_total_flops())
    assert counted[0] == pytest.approx(counted[1], rel=0.02)


# ------------------------------------------------------------------------------------------ measuring

def test_floor_waits_for_the_slower_of_both():
    peaks = {"operations_per_s": 10, "bytes_per_s": 5}
    assert meter.floor_seconds([[10, 1], [1, 10]], peaks) == max(1, 0.2) + max(0.1, 2)


def test_memory_sees_what_is_taken():
    device, size = torch.device("cpu"), 200_000_000  # bytes
    before, _ = meter.memory(device)
    # Not an array: it could be given pages that an earlier test left to the process.
    with mmap.mmap(-1, size) as block:
        block.write(b"1" * size)
        now, peak = meter.memory(device)
    assert peak >= now and size <= now - before < 2.2 * size
    assert meter.memory(device)[0] < now - size / 2 and meter.memory(device)[1] >= peak


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
def test_a_peak_is_of_its_part():
    taken = meter.Meter(SimpleNamespace(device="cpu", warmup=0, repeat=1))
    with taken.measure("much"), mmap.mmap(-1, 200_000_000) as block:
        block.write(b"1" * 200_000_000)
    with taken.measure("little"):
        pass
    assert taken.peak["little"] < taken.peak["much"] - 150_000_000  # bytes


def test_meter_leaves_the_warm_up_out():
    taken = meter.Meter(SimpleNamespace(device="cpu", warmup=1, repeat=2))
    taken.ready()
    for _ in range(3):
        with taken.measure("nothing"):
            pass
    taken.seconds["nothing"] = [9.0, 2.0, 4.0]
    result = taken.result()
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
    monkeypatch.setattr(meter.subprocess, "run", lambda *_, **__: done)
    if left_out:
        assert "memory" in meter.start_case("step", [], "tools.bench")["left_out"]
        return
    with pytest.raises(RuntimeError, match="no such thing"):
        meter.start_case("step", [], "tools.bench")


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


def test_a_process_of_its_own_runs_where_the_program_does(tmp_path, monkeypatch):
    """So that a relative --folder is the same for both; the project's files are found all the same."""
    (tmp_path / "probe.py").write_text("import json, os, rewards\nprint(json.dumps([os.getcwd(), rewards.__file__]))\n")
    monkeypatch.chdir(tmp_path)
    assert meter.start_case("any", [], "probe") == [os.getcwd(), str(meter.ROOT / "rewards.py")]


def test_a_process_of_its_own():
    result = meter.start_case("reward", [*TINY, "--queries", "1"], "tools.bench")
    assert result["counts"] == {"image_passes": 2} and len(result["seconds"]["reward"]) == 1
    assert result["peak_bytes"]["reward"] >= result["rest_bytes"] > 1e8


def here(program, monkeypatch):
    """Cases run in this process instead of in processes of their own."""
    monkeypatch.setattr(bench, "start_case", lambda case, argv, module: json.loads(json.dumps(bench.run_case(
        bench.parse_args([*argv, "--case", case], program.CASES), program.CASES))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of the JSON of all cases, what it holds, and the table."""
    folder, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        here(bench, patch)
        bench.main([*TINY, "--warmup", "1", "--out", str(folder / "deep" / "tiny.json")])
    return folder, json.loads((folder / "deep" / "tiny.json").read_text()), printed.getvalue()


def test_ours_counts_less_work_than_the_repeated_way(whole):
    """2 x 4 rows of prompt + answer against one tree: nearly 8 times, as what is shared is most of a row."""
    def work(case):
        return whole[1]["cases"][case]["work"][case.split("_")[0]]

    def operations(phases):
        return sum(o for o, _ in phases)

    ours, theirs = work("update"), work("update_repeated")
    assert 4 < operations(theirs) / operations(ours) < 8
    args = bench.parse_args([*TINY, "--warmup", "1", "--case", "update_repeated", "--rows", "2"])
    halves = bench.run_case(args, bench.CASES)["work"]["update"]
    assert halves[0][0] == pytest.approx(theirs[0][0] / 2, rel=0.1)  # the image tower sees half of the rows at once
    # The system's turn, the images and prompts first, then steps of a token: these cost little, wait for the weights.
    first = work("rollout")[0]
    steps = [step for step in work("rollout") if step[0] < first[0] / 10]
    assert 6 <= len(steps) <= 16 and len({step[1] for step in steps}) == 1
    assert len(work("rollout_repeated")) - 2 > 2 * len(steps)  # every token is a step


def test_whole_run(whole):
    """All cases, to the JSON and the table."""
    folder, found, table = whole
    assert list(found["cases"]) == list(bench.CASES)
    assert found["args"]["visual_tokens"] == 16 and found["machine"]["torch"] == torch.__version__
    assert found["ratios"]["update"]["time"] > 1
    counts = {case: result["counts"] for case, result in found["cases"].items()}
    assert counts["rollout"]["image_passes"] == 2 and counts["update_repeated"]["image_passes"] == 8
    assert found["ratios"]["open_clip's ViT against ours"]["time"] > 0
    assert found["cases"]["encode"]["work"]["batch 2 ours"] == found["cases"]["encode"]["work"]["batch 2 open_clip"]
    assert counts["act"]["answer_tokens 1 free"] == counts["act"]["answer_tokens 1 grammar"]
    assert {"free against grammar, batch 1", "free against grammar, batch 2"} < set(found["ratios"])
    # Every part has a floor, and what was measured is above it; 3: a busy machine may slow the measured rates alone.
    for result in found["cases"].values():
        assert result["floor_s"].keys() == result["median_s"].keys()
        assert all(0 < floor < 3 * result["median_s"][part] for part, floor in result["floor_s"].items())
    assert "x floor" in table and not list(folder.rglob("*.tmp"))


def test_beside_the_release_and_trl(tmp_path, monkeypatch, capsys):
    here(bench_trl, monkeypatch)
    monkeypatch.setattr(bench_trl.importlib.util, "find_spec", lambda name: None)  # TRL is no requirement
    out = tmp_path / "tiny.json"
    bench_trl.main([*TINY, "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["cases"]) == ["reward", "reward_release", "step", "step_trl"]
    assert found["cases"]["step_trl"]["left_out"] == "trl is not installed" and "trl is not" in capsys.readouterr().out
    # 2 queries x 4 rollouts x (view + 20 candidates), against a crop for each of 2 boxes a query.
    assert found["ratios"]["reward"]["image_passes"] == 2 * 4 * 21 / 4
    assert found["cases"]["reward"]["work"] == {}  # nothing is counted without a warm-up


def test_trl_trains_the_same_weights():
    pytest.importorskip("trl")
    flags = [*TINY, "--queries", "1", "--group", "2", "--case"]
    step, theirs = (bench.run_case(bench.parse_args([*flags, case], bench_trl.CASES), bench_trl.CASES)
                    for case in ("step", "step_trl"))
    assert step["counts"]["lora_parameters"] == theirs["counts"]["lora_parameters"]
    assert len(theirs["seconds"]["step"]) == 1
