"""Every stage on a pretended CUDA card (pretend_cuda.py): it runs there, and in float32 its results are the CPU's.

The world, the shipped stand-ins and the command lines are those of `make data train eval`, at a tiny size. What does
not depend on the models (resuming, processes, errors) runs on test_train.py's still smaller ones.
"""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import ADAPTER, forked, refused, untimed
from test_train import flags as tiny_flags
from test_train import home as tiny  # noqa: F401 (a fixture)
from torch.utils.checkpoint import checkpoint

import evaluate
import policy as policy_module
import prepare
import train
from mini import world
from policy import WindowAttention, load_policy
from pretend_cuda import Card, pretend_cuda
from scorer import InputError, load_data, load_scorer
from tools import bench, merge, rerank

ROOT = Path(__file__).resolve().parent.parent
EXACT = ("--policy-dtype", "float32", "--scorer-dtype", "float32")


@pytest.fixture(scope="module", autouse=True)
def project_folder():
    """Models are named as the Makefile names them, so that a data folder knows its scorer."""
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    yield
    os.chdir(before)
    torch.set_num_threads(threads)


def prepared(raw, out, *more):
    """prepare.py's folder, made in this process."""
    prepare.main(["--dataset", "world", "--root", str(raw), "--scorer", "mini/scorer", "--out", str(out), *more])
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """raw/ with a world of 48 entities and data/, prepared on the CPU; tests read them and change nothing."""
    folder = tmp_path_factory.mktemp("cuda")
    world.main(["--out", str(folder / "raw"), "--entities", "48", "--train", "12", "--val", "4", "--test", "8",
                "--workers", "1"])
    prepared(folder / "raw", folder / "data", "--device", "cpu")
    return folder


def flags(home, run, device, *more):
    return ["--data", str(home / "data"), "--run", str(run), "--device", device, "--steps", "2", "--queries", "2",
            "--save-every", "1", "--eval-every", "0", "--samples-every", "1", *more]


# ---- the card itself: what it refuses --------------------------------------------------------------------------------


def test_tensors_say_where_they_are():
    before = torch.cuda.is_available()
    with pretend_cuda(index=1) as card:
        made = [torch.zeros(2, device="cuda"), torch.tensor([1., 2.], device="cuda:1"), torch.ones(2).to("cuda"),
                torch.nn.Linear(2, 2).to("cuda").weight, torch.ones(2).to(torch.device("cuda"))]
        assert all(x.is_cuda and x.device == torch.device("cuda", 1) and isinstance(x, card) for x in made)
        assert not any(isinstance(x.cpu(), card) for x in made) and card.operations > 4
        assert made[1].tolist() == [1, 2] and (made[1] + made[2]).cpu().tolist() == [2, 3]
        with pytest.raises(RuntimeError, match="the card of another process"):
            torch.zeros(2, device="cuda:0")
    assert torch.cuda.is_available() == before and Card.home.index == 0


@pytest.mark.parametrize("fault", [
    lambda here, there: here + there,
    lambda here, there: there @ here,
    lambda here, there: torch.cat([there, here]),
    lambda here, there: torch.where(here > 0, there, there),
    lambda here, there: here[there.long()],
    lambda here, there: torch.nn.functional.linear(here, there),
    lambda here, there: there.index_put((torch.tensor([0]),), here[:1]),
])
def test_tensors_on_both_sides_are_refused(fault):
    with pretend_cuda(), pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        fault(torch.ones(3, 3), torch.ones(3, 3, device="cuda"))


def test_what_a_card_takes_from_main_memory():
    with pretend_cuda():
        there = torch.arange(6., device="cuda").view(2, 3)
        assert (there * torch.tensor(2.)).tolist() == [[0, 2, 4], [6, 8, 10]]
        assert there[[1, 0], [2, 0]].tolist() == there[torch.tensor([1, 0]), torch.tensor([2, 0])].tolist() == [5, 0]
        there.copy_(torch.zeros(2, 3))
        assert not there.cpu().any()
        for leaves in (lambda: there.numpy(), lambda: np.asarray(there), lambda: np.stack([there])):
            with pytest.raises(TypeError, match="to numpy. Use Tensor.cpu"):
                leaves()


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_the_cpus(again):
    layer, x = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)

    def gradient(layer, x):
        def forward(x):
            return layer(x, x, x, need_weights=False)[0] + torch.nn.functional.scaled_dot_product_attention(
                x, x, x, is_causal=True)[:, [4, 0, 1, 2, 3]]
        (checkpoint(forward, x, use_reentrant=False) if again else forward(x)).square().sum().backward()
        return [p.grad.cpu().clone() for p in layer.parameters()]

    wanted = gradient(layer, x)
    layer.zero_grad()
    with pretend_cuda():
        found = gradient(layer.to("cuda"), x.to("cuda"))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


# ---- the stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--limit", "4")])
def test_prepare(home, tmp_path, more):
    """Another pool or feature on a card than on a CPU would be another experiment."""
    wanted = prepared(home / "raw", tmp_path / "cpu", "--device", "cpu", *more)
    with pretend_cuda() as card:
        found = prepared(home / "raw", tmp_path / "card", "--device", "cuda", "--scorer-dtype", "float32", *more)
        assert card.operations > 500
    for split in ("train", "val", "test"):
        ours, theirs = (load_data(str(folder), split) for folder in (found, wanted))
        assert [query.query_id for query in ours.queries] == [query.query_id for query in theirs.queries]
        assert np.array_equal(ours.pool, theirs.pool) and np.array_equal(ours.pool_image, theirs.pool_image)
        assert np.allclose(ours.retrieval, theirs.retrieval, atol=1e-4)
    assert np.abs(np.load(found / "kb_image.npy") - np.load(wanted / "kb_image.npy")).max() < 2e-3


def test_prepare_in_bfloat16_as_a_card_does(home, tmp_path):
    with pretend_cuda():
        found = prepared(home / "raw", tmp_path / "card", "--device", "cuda")
        scorer = load_scorer("mini/scorer", "cuda")
        assert scorer.dtype == torch.bfloat16 and isinstance(scorer.model.logit_scale, Card)
    data = load_data(str(found), "test")
    assert data.manifest["scorer"]["dtype"] == "bfloat16" and len(data) == 8


def test_training_is_that_of_a_cpu(home, tmp_path):
    for device in ("cpu", "cuda"):
        if device == "cpu":
            train.main(flags(home, tmp_path / device, device, "--eval-every", "2", *EXACT))
        else:
            with pretend_cuda() as card:
                train.main(flags(home, tmp_path / device, device, "--eval-every", "2", *EXACT))
                assert card.operations > 10_000
    ours, theirs = untimed(tmp_path / "cuda"), untimed(tmp_path / "cpu")
    assert len(ours) == 3 and ours[2]["grad_norm"] > 0 and "val_mrr" in ours[2]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    found, wanted = (load_file(tmp_path / device / ADAPTER) for device in ("cuda", "cpu"))
    moved = max(float(b.abs().max()) for k, b in wanted.items() if "lora_B" in k)
    # Adam's first steps follow the sign of a gradient: one of next to nothing may come out either way.
    off = torch.cat([(found[k] - wanted[k]).abs().flatten() for k in wanted]) / moved
    assert off.max() < 0.5 and (off > 0.05).float().mean() < 1e-4


PAPER = ("--targets", "all", "--dropout", "0.1", "--beta", "0.05", "--inner-steps", "2", "--checkpointing")


def short(tiny, run, device, *more):  # noqa: F811
    """Command line of two steps of the tiny models."""
    return tiny_flags(tiny, run, "--device", device, "--steps", "2", "--save-every", "1", "--eval-every", "0", *more)


@pytest.mark.parametrize("more", [
    PAPER, ("--decode", "free", "--max-new-tokens", "24"), ("--balance", "resample", "--decision-weight", "pi"),
    ("--balance", "none", "--advantage", "group", "--norm", "sequence", "--no-std")])
def test_training_in_bfloat16_as_a_card_does(tiny, tmp_path, more, capsys):  # noqa: F811
    with pretend_cuda():
        train.main(short(tiny, tmp_path / "run", "cuda", *more))
    said = capsys.readouterr().out
    assert "on 1 x cuda" in said and "MiB at the peak of a rollout" in said
    log = untimed(tmp_path / "run")
    assert len(log) == 2 and all(np.isfinite(line["reward"]) for line in log)
    assert {value.dtype for value in load_file(tmp_path / "run" / ADAPTER).values()} == {torch.float32}


def test_killed_run_resumes_on_the_card_and_off_it(tiny, tmp_path, monkeypatch):  # noqa: F811
    more, whole = ("--targets", "all", "--dropout", "0.1", *EXACT), train.train_step
    with pretend_cuda():
        train.main(short(tiny, tmp_path / "one", "cuda", *more))
        monkeypatch.setattr(train, "train_step", lambda step, *rest: whole(step, *rest) if step < 1 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(short(tiny, tmp_path / "two", "cuda", *more))
        monkeypatch.setattr(train, "train_step", whole)
        shutil.copytree(tmp_path / "two", tmp_path / "three")
        train.main(short(tiny, tmp_path / "two", "cuda", *more, "--resume"))
    assert (tmp_path / "two" / ADAPTER).read_bytes() == (tmp_path / "one" / ADAPTER).read_bytes()
    assert untimed(tmp_path / "two") == untimed(tmp_path / "one")
    train.main(short(tiny, tmp_path / "three", "cpu", *more, "--resume"))
    assert untimed(tmp_path / "three")[1] == pytest.approx(untimed(tmp_path / "one")[1], rel=1e-2, abs=1e-3)


def test_the_next_step_is_opened_while_one_runs(tiny, tmp_path, monkeypatch):  # noqa: F811
    """And an error in it is that of its own step: what came before is logged and saved."""
    opened, step_of = {step: threading.Event() for step in range(4)}, []
    whole = train.open_step, train.train_step

    def open_step(step, *rest):
        opened[step].set()
        if step == 2:
            raise InputError("no such image")
        return whole[0](step, *rest)

    def train_step(step, *rest):
        step_of.append((step, opened[step + 1].wait(60)))
        return whole[1](step, *rest)

    monkeypatch.setattr(train, "open_step", open_step)
    monkeypatch.setattr(train, "train_step", train_step)
    with pretend_cuda():
        assert "no such image" in refused(*short(tiny, tmp_path / "run", "cuda", "--steps", "4", *EXACT))
    assert step_of == [(0, True), (1, True)] and not opened[3].is_set()
    assert [line["step"] for line in untimed(tmp_path / "run")] == [0, 1]
    monkeypatch.setattr(train, "open_step", whole[0])
    monkeypatch.setattr(train, "train_step", whole[1])
    with pretend_cuda():
        train.main(short(tiny, tmp_path / "run", "cuda", "--steps", "4", *EXACT, "--resume"))
        train.main(short(tiny, tmp_path / "whole", "cuda", "--steps", "4", *EXACT))
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


@pytest.mark.parametrize("more", [("--balance", "analytic"), ("--balance", "analytic", "--decode", "free"),
                                  ("--group", "2"), ("--balance", "none")])
def test_largest_row_of_groups_of_any_size(home, more):
    """A group has N/2 + 1, N + 1, 2 N or N answers, by balance and decoding."""
    data = load_data(str(home / "data"), "train")
    args = train.parse_args(flags(home, "run", "cuda", "--queries", "2", "--max-new-tokens", "4", *more, *EXACT))
    args.micro_tokens = None
    with pretend_cuda():
        assert train.try_largest(train.open_policy(args, None), data, args) > 1


def test_largest_row_is_stepped_first_and_changes_nothing(home, monkeypatch):
    """As many queries as a step has, the question of the longest line, an image of the policy's cap; one of them is stepped, and
    what that takes says how many tokens a pass may have: 4/5 of 1 GiB at 1 MiB for the tokens of one query."""
    data, asked, passed = load_data(str(home / "data"), "train"), [], []
    args = train.parse_args(flags(home, "run", "cuda", "--dropout", "0.1", "--targets", "all", "--queries", "3",
                                  "--beta", "0", *EXACT))
    args.micro_tokens = None
    with pretend_cuda():
        policy = train.open_policy(args, None)
        before = [p.detach().cpu().clone() for p in policy.lora_parameters()]
        monkeypatch.setattr(policy, "prompts", lambda images, questions, whole=policy.prompts: (
            asked.append((images, questions)), whole(images, questions))[1])
        monkeypatch.setattr(policy, "score", lambda pack, *rest, whole=policy.score, **more: (
            passed.append(pack.layout.tokens), whole(pack, *rest, **more))[1])
        found = train.try_largest(policy, data, args)
        assert found == pytest.approx(0.8 * 1024 * passed[0], abs=1)
        assert all(p.grad is None for p in policy.lora_parameters()) and not policy.training
        args.micro_tokens = 9999
        assert train.try_largest(policy, data, args) == 9999
        assert all(torch.equal(p.cpu(), b) for p, b in zip(policy.lora_parameters(), before))
    (images, questions), _ = asked
    cap = policy.processor.image_processor.size["longest_edge"]
    longest = max(range(len(data.queries)), key=lambda i: data.queries.starts[i + 1] - data.queries.starts[i])
    assert questions == [data.queries[longest].question] * 3
    assert all(cap * .9 < image.width * image.height <= cap for image in images)
    assert passed[1] == pytest.approx(3 * passed[0], abs=6)
    policy = train.open_policy(train.parse_args(flags(home, "run", "cpu")), None)
    monkeypatch.setattr(policy, "prompts", lambda *_: pytest.fail("a CPU has no such limit"))
    args.micro_tokens = None
    assert train.try_largest(policy, data, args) == 8192


@pytest.mark.parametrize("owner, name, more", [
    (train, "backward", ()), (torch.optim.AdamW, "load_state_dict", ("--resume",))])
def test_card_without_room_says_what_helps(tiny, tmp_path, monkeypatch, owner, name, more):  # noqa: F811
    """Before step 0, where nothing is written yet; a sound state.pt is not blamed for it."""
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pretend_cuda():
        if more:
            train.main(short(tiny, tmp_path / "run", "cuda"))
            (tmp_path / "run" / "finished").unlink()
        monkeypatch.setattr(owner, name, full)
        message = refused(*short(tiny, tmp_path / "run", "cuda", *more))
    assert "CUDA out of memory" in message and "What helps: --checkpointing" in message
    assert "damaged" not in message and (more or {path.name for path in (tmp_path / "run").iterdir()} == {"lock"})


def test_two_processes_with_a_card_each(tiny, tmp_path, monkeypatch):  # noqa: F811
    more = ("--queries", "3", *EXACT)
    train.main(short(tiny, tmp_path / "one", "cpu", *more))
    alone = train.main

    def on_a_card(command):
        with pretend_cuda(index=int(os.environ["LOCAL_RANK"])):
            alone(command)

    monkeypatch.setattr(train, "main", on_a_card)
    codes = forked(2, short(tiny, tmp_path / "two", "cuda", *more), tmp_path)
    assert codes == [0, 0], (tmp_path / "0.err").read_text() + (tmp_path / "1.err").read_text()
    assert "on 2 x cuda:0" in (tmp_path / "0.out").read_text()
    for a, b in zip(untimed(tmp_path / "two"), untimed(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def trained(home):
    train.main(flags(home, home / "run", "cpu"))
    return home / "run"


def test_evaluation_is_that_of_a_cpu(home, trained):
    more = ["--data", str(home / "data"), "--run", str(trained)]
    wanted, found = (trained.parent / name for name in ("eval-cpu", "eval-card"))
    evaluate.main([*more, "--device", "cpu", "--out", str(wanted)])
    with pretend_cuda() as card:
        evaluate.main([*more, "--device", "cuda", "--out", str(found), *EXACT])
        assert card.operations > 5_000
    for path in wanted.glob("test.*.jsonl"):
        ours, theirs = ([json.loads(line) for line in (folder / path.name).read_text().splitlines()]
                        for folder in (found, wanted))
        assert [line["decision"] for line in ours] == [line["decision"] for line in theirs]
        assert [line["box"] for line in ours] == [line["box"] for line in theirs]


def test_answering_on_a_card(home, trained, capsys):
    query = load_data(str(home / "data"), "test").queries[0].query_id
    ask = ["--query", query, "--data", str(home / "data"), "--run", str(trained), "--json"]
    rerank.main([*ask, "--device", "cpu"])
    wanted = json.loads(capsys.readouterr().out)
    with pretend_cuda():
        rerank.main([*ask, "--device", "cuda"])
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == wanted.keys() and found["decision"] == wanted["decision"]
    with pretend_cuda():
        policy = load_policy("mini/policy", trained / "adapter", "cuda")
        layers = [layer.base for layer in policy.layers.values()]
        before = [layer.weight.cpu().clone() for layer in layers]
        merge.fold(policy)
        assert all(isinstance(layer.weight, Card) for layer in layers)
        assert all(isinstance(block.attn, WindowAttention) for block in policy.model.model.visual.blocks)
        assert not any(map(torch.equal, before, [layer.weight.cpu() for layer in layers]))


def test_what_is_set_for_a_card_alone(home, monkeypatch):
    switched, masks, whole = [], [], policy_module.additive_mask
    with pretend_cuda():
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
        load_policy("mini/policy")
        assert not switched
        policy = load_policy("mini/policy", device="cuda")
        assert switched == [False]
        args = bench.parse_args(["--device", "cuda", "--visual-tokens", "16"])
        ours = bench.build_policy(args)
        assert switched == [False] * 2 and isinstance(ours.model.model.visual.blocks[0].attn, WindowAttention)
        norms = [module for module in ours.model.modules() if hasattr(module, "variance_epsilon")]
        x = [torch.randn(3, 7, len(norm.weight)).to("cuda", torch.bfloat16) for norm in norms]
        fused = [norm(part).cpu().float() for norm, part in zip(norms, x)]
        assert len(norms) > 9 and all("forward" in vars(norm) for norm in norms)
        bench.as_published(ours)
        assert not any("forward" in vars(module) for module in ours.model.modules())
        for norm, part, one in zip(norms, x, fused):
            torch.testing.assert_close(norm(part).cpu().float(), one, rtol=1 / 64, atol=1e-6)
        assert switched[2:] == [True] and not isinstance(ours.model.model.visual.blocks[0].attn, WindowAttention)
        monkeypatch.setattr(policy_module, "additive_mask", lambda *inputs: masks.append(whole(*inputs)) or masks[-1])
        data = load_data(str(home / "data"), "test")
        prompts = policy.prompts([data.open_image(i) for i in range(2)], ["What is this?", "Where does this live?"])
        groups = policy.rollout(prompts, [["FULL", "REGION", "REGION"]] * 2, seeds=[0, 1])
        seen = [prompt.pixel_values for prompt in prompts]
        assert all(isinstance(pixels, Card) and pixels.dtype == torch.bfloat16 for pixels in seen)
        policy.add_lora(targets="all")
        policy.log_probs(prompts, groups)
        # No second copy.
        assert all(prompt.pixel_values is pixels for prompt, pixels in zip(prompts, seen, strict=True))
    # What PyTorch's memory-efficient attention takes as it is: every stride but the last a multiple of 8.
    assert len(masks) > 3 and all(stride % 8 == 0 for mask in masks for stride in mask.stride()[:-1])
    assert any(mask.shape[-1] % 8 for mask in masks) and {mask.stride(-1) for mask in masks} == {1}


@pytest.mark.parametrize("case", ["machine", *(case for case in bench.CASES if case != "step_trl")])
def test_bench(case, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_peaks", lambda device, dtype: {"device": device.type, "dtype": str(dtype)})
    monkeypatch.setattr(bench, "answer_length", lambda *_: 4)
    with pretend_cuda() as card:
        bench.main(["--device", "cuda", "--visual-tokens", "16", "--queries", "1", "--group", "4", "--repeat", "1",
                    "--warmup", "0", "--batches", "1", "--scorer-batch", "2", "--case", case])
        assert case == "machine" or card.operations > 100
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    if case == "machine":
        assert found["machine"]["device"] == "a CPU"
        assert found["peaks"] == {"device": "cuda", "dtype": "torch.bfloat16"}
    else:
        assert found["median_s"] and all(seconds > 0 for seconds in found["median_s"].values())


def test_building_the_stand_ins(tmp_path):
    pretrain = pytest.importorskip("mini.pretrain")
    with pretend_cuda() as card:
        pretrain.main(["--out", str(tmp_path), "--no-compile", "--entities", "24", "--scorer-steps", "2",
                       "--scorer2-steps", "1", "--scorer-batch", "12", "--scenes", "20", "--tower-steps", "1",
                       "--answer-steps", "1", "--workers", "1"])
        assert card.operations > 5_000
    policy, scorer = load_policy(str(tmp_path / "policy")), load_scorer(str(tmp_path / "scorer"))
    assert all(p.isfinite().all() for p in [*policy.model.parameters(), *scorer.model.parameters()])
