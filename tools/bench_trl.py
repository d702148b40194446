"""What others do, beside ours: TRL's GRPOTrainer with peft, and the reward of the authors' release.

    pip install trl peft datasets               # no requirements of ours
    python -m tools.bench_trl --queries 2       # flags as of tools/bench.py; JSON into bench/MODEL-DEVICE-trl.json

* step_trl: a whole step of TRL on the same model, images, questions, N, LoRA and answer length as `step`, ours. TRL
  knows no grammar and writes N whole answers; its rewards cost nothing here. Left out where TRL is not installed.
* reward_release: for every completion its view and all K candidates go through the scorer, as in the release. Ours,
  `reward`, encodes a crop once a box: candidates and full images were embedded by prepare.py.
Each runs in a process of its own and is compared with ours of the same run. --cases may name those of tools/bench.py.
"""

import contextlib
import importlib
import importlib.util
import tempfile

import numpy as np
import torch
from transformers import TrainerCallback

from policy import SYSTEM_PROMPT
from rewards import reward
from scorer import crop, scores
from tools import bench


def case_reward_release(args, meter):
    scorer, images, groups, counts, data = bench.reward_inputs(args)
    pool = bench.noise(bench.K, 336, 336)
    meter.ready(scorer.model.visual)
    for _ in range(meter.turns):
        passes = 0
        with meter.measure("reward"):
            for b, group in enumerate(bench.repeat(groups, counts)):
                for action in group:
                    view = crop(images[b], action.box) if action.box else images[b]
                    features = scorer.image_features([view, *pool])                                     # [1 + K, D]
                    reward([action.decision], scores(features[:1], features[1:]),
                           scores(data.full[b], features[1:]), bench.LABELS)
                    passes += 1 + bench.K
    meter.counts = {"image_passes": passes}


def case_step_trl(args, meter):
    if importlib.util.find_spec("trl") is None:
        meter.left_out = "trl is not installed"
        return
    # By name: an import statement would make these packages requirements, and they are none.
    trl, peft, datasets = map(importlib.import_module, ("trl", "peft", "datasets"))
    rows = bench.halving(args.rows, lambda rows: trl_steps(args, meter, rows, trl, peft, datasets))
    versions = {package.__name__: package.__version__ for package in (trl, peft)}
    meter.counts |= {"versions": versions, "rows_at_once": rows}


def trl_steps(args, meter, rows, trl, peft, datasets):
    """Warm-up and timed steps of GRPOTrainer, `rows` completions a backward pass."""
    policy = bench.build_policy(args, lora=False)
    bench.as_published(policy)
    length, (images, questions) = bench.answer_length(policy, args), bench.build_inputs(args, args.queries)
    table = [{"prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": q}], "image": i}
             for i, q in zip(images, questions)]
    # Rewards have to differ inside a group, or there would be nothing to learn and less to do.
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            folder, per_device_train_batch_size=rows, gradient_accumulation_steps=args.queries * args.group // rows,
            num_generations=args.group, max_completion_length=length,
            # Random weights would end some answers early, which would be less work than ours.
            generation_kwargs={"min_new_tokens": length},
            max_steps=meter.turns, beta=0.0, learning_rate=1e-4, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=args.device == "cpu", bf16=False,
            gradient_checkpointing=args.checkpointing, shuffle_dataset=False)
        trainer = trl.GRPOTrainer(
            policy.model, reward_funcs=lambda completions, **_: list(draw.random(len(completions))), args=config,
            train_dataset=datasets.Dataset.from_list(table), processing_class=policy.processor,
            peft_config=peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=args.dropout,
                                        target_modules=lora_targets(policy, args)), callbacks=[Watch(meter)])
        meter.clear()
        meter.ready()  # operations are not counted: a trainer's hooks and the counter's need not agree
        trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    meter.counts = {"lora_parameters": trained, "answer_tokens": length}


def lora_targets(policy, args):
    """Whole paths of the layers that `add_lora` would take: those of policy.py, in peft's words."""
    return [name for name, module in policy.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
            and (args.targets == "all" or name.startswith("model.language_model."))]


class Watch(TrainerCallback):
    """Measures the steps of a transformers Trainer, generation included."""

    def __init__(self, meter):
        self.meter, self.stack = meter, contextlib.ExitStack()

    def on_step_begin(self, args, state, control, **_):
        self.stack.enter_context(self.meter.measure("step"))

    def on_step_end(self, args, state, control, **_):
        self.stack.close()


CASES = {"reward": bench.case_reward, "reward_release": case_reward_release,
         "step": bench.case_step, "step_trl": case_step_trl}
ALL = {**bench.CASES, **CASES}


def parse_args(argv=None):
    return bench.parse_args(argv, ALL, list(CASES), __doc__, "bench/{model}-{device}-trl.json")


def main(argv=None):
    bench.main(argv, ALL, "tools.bench_trl", parse_args)


if __name__ == "__main__":
    main()
