"""How tools/bench.py measures: seconds, peak memory and operations of a part, and the machine's own rates.

Every case runs in a process of its own, so its peak memory is nobody else's: on CUDA the allocator's, on a CPU that of
the whole process, taken anew for every part on Linux. Elsewhere it can only grow; parts are run in the order in which
they need more.

The floor of a part is its operations divided by this machine's own rate in one large matrix product, or its bytes
divided by the rate of a large copy, whichever takes longer; both rates are measured in the same run. Operations are
what PyTorch counts: all matrix products, what checkpointing computes again among them, and attention as if every token
saw every other. A causal kernel skips half of that: a few per cent of all at the 3B's sizes, up to a fifth at the
stand-in's. Bytes are the weights, read once a pass.
"""

import contextlib
import importlib
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device):
    """(now, peak) in bytes: of the CUDA allocator, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if not os.path.exists("/proc/self/status"):  # not Linux: the peak alone; macOS counts bytes, others kilobytes
        unit = 1 if platform.system() == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak
    # Not getrusage: a new process inherits there the peak of the one that started it.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def forget_peak(device):
    """From here on `memory` tells the peak anew, where the system can: CUDA and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def attention(query, key, *_, **__):
    """Operations of an attention kernel on shapes [B, H, T, d]: two products. Keys may have fewer heads than queries,
    as on a card. torch 2.11 refuses to count those, and counts nothing on a CPU."""
    return 4 * math.prod(query) * key[-2]


def attention_backward(grad, query, key, *_, **__):
    """Five products: the scores once more, and the gradients of values, probabilities, queries and keys."""
    return 10 * math.prod(query) * key[-2]


ATTENTION = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{end}"): operations
             for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
             for end, operations in (("", attention), ("_backward", attention_backward))}


@contextlib.contextmanager
def counting(towers, phases):
    """Appends [operations, bytes] to `phases` for every pass through one of `towers` (modules) that is run inside.

    A phase lasts until the next pass begins, so a backward pass counts to the forward passes before it. The floor waits
    for each phase by itself: reading a prompt is bound by operations, writing a token by the bytes of the weights.
    """
    counter, begun = FlopCounterMode(display=False, custom_mapping=ATTENTION), []

    def begin(tower, _):
        weights = sum(p.nbytes for name, p in tower.named_parameters() if not name.startswith("embed_tokens"))
        begun.append((counter.get_total_flops(), weights))

    hooks = [tower.register_forward_pre_hook(begin) for tower in towers]
    try:
        with counter:
            yield
    finally:
        for hook in hooks:
            hook.remove()
    ends = [operations for operations, _ in begun[1:]] + [counter.get_total_flops()]
    phases += [[end - start, weights] for (start, weights), end in zip(begun, ends)]


class Meter:
    """Seconds, peak bytes and work of the named parts of a case."""

    def __init__(self, args):
        self.device, self.warmup, self.turns = torch.device(args.device), args.warmup, args.warmup + args.repeat
        self.counts, self.rest, self.towers, self.left_out = {}, None, (), None
        self.clear()

    def clear(self):
        self.seconds, self.peak, self.work = {}, {}, {}

    def ready(self, *towers):
        """Models and inputs stand: what the case takes from here on is its own. towers: modules, see `counting`."""
        self.rest, self.towers = memory(self.device)[0], towers

    @contextlib.contextmanager
    def measure(self, part):
        """Time what is run inside. The first turn of a warm-up is counted instead: neither its seconds nor its memory
        are what they would be without the counter."""
        first = part not in self.seconds and self.warmup and self.towers
        forget_peak(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        with counting(self.towers, self.work.setdefault(part, [])) if first else contextlib.nullcontext():
            yield
        synchronise(self.device)
        self.seconds.setdefault(part, []).append(time.perf_counter() - start)
        if not first:
            self.peak[part] = max(self.peak.get(part, 0), memory(self.device)[1])

    def result(self):
        if self.left_out:
            return {"left_out": self.left_out}
        seconds = {part: values[self.warmup:] for part, values in self.seconds.items()}
        return {"seconds": seconds, "median_s": {part: statistics.median(s) for part, s in seconds.items()},
                "peak_bytes": self.peak, "rest_bytes": self.rest, "work": self.work, "counts": self.counts}


def measure_peaks(device, dtype):
    """This machine's own rates: operations/s of a large matrix product, bytes/s of a large copy (read and written)."""
    cuda = device.type == "cuda"
    n, size = (8192, 2**30) if cuda else (2048, 2**27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source, target = (torch.full((size,), i, dtype=torch.uint8, device=device) for i in range(2))
    times = {"matmul": [], "copy": []}
    for _ in range(10 if cuda else 4):
        for name, work in (("matmul", lambda: a @ b), ("copy", lambda: target.copy_(source))):
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    # The best, not the median: a floor must not contain somebody else's work.
    return {"operations_per_s": 2 * n**3 / min(times["matmul"]), "bytes_per_s": 2 * size / min(times["copy"])}


def start_case(case, argv, module):
    """One case in a process of its own -> its numbers. RuntimeError with what it printed when it failed."""
    command = [sys.executable, "-m", module, *argv, "--case", case]
    # Where this process runs, as its arguments may hold relative paths; but with the project's files within reach.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        return {"left_out": "killed by the system, which ran out of memory"}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # packages print, too; ours is the last line


def floor_seconds(work, peaks):
    """Least seconds of the phases [operations, bytes]: each waits for what takes longer."""
    return sum(max(o / peaks["operations_per_s"], b / peaks["bytes_per_s"]) for o, b in work)


def describe(args):
    """The machine and the packages, for whoever reads the JSON later."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    versions = {package: importlib.import_module(package).__version__ for package in ("torch", "transformers")}
    return {"device": name, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
            "python": platform.python_version(), **versions}


def processor_name():
    """The CPU's name; platform.processor() is empty on most Linux systems."""
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
