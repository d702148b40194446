"""A CUDA card that is none: tensors say that they are on cuda:0, and the CPU does the work.

    with pretend_cuda() as card:
        train.main([..., "--device", "cuda"])
    card.operations     # how many ran "there"

What a program gets wrong on its first card is where its tensors are: a table left in main memory, `.numpy()` without
`.cpu()`, a second process on the first process's card. Here these fail as they do there, on a machine without a card,
and what is written for CUDA alone (bfloat16, the largest row, NCCL) is run. Not shown: speed, memory,
and the rounding of CUDA's own kernels.

How: a `Card` wraps a CPU tensor. To Python it is on cuda:0; to C++ it is on the meta device, so that nothing asks a
driver. `Kernels` sees every operation, looks where its arguments are, and runs it on what is wrapped. `Calls` sees the
few calls of PyTorch's that would go to a driver before that.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

aten, CPU = torch.ops.aten, torch.device("cpu")
# What takes tensors from both sides on a real card, too: copies; and indices from main memory into what is on the card.
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Card(torch.Tensor):
    """A tensor on the pretended card. held: the CPU tensor with its values; home: the card's device."""

    home, operations = torch.device("cuda", 0), 0

    @staticmethod
    def __new__(cls, held):
        card = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta", requires_grad=held.requires_grad)
        card.held = held
        return card

    device = property(lambda self: Card.home)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self):
        return Card.home.index

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {Card.home} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                        "host memory first.")

    __array__ = numpy

    def tolist(self):
        return self.held.tolist()

    def __repr__(self):
        return f"Card({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # torch.save: as one that torch.load was told to put on the CPU

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def on_card(device):
    """Does `device` (of a call; None where it names none) mean the card? RuntimeError for the card of another process."""
    if device is None or torch.device(device).type != "cuda":
        return False
    if torch.device(device).index not in (None, Card.home.index):
        raise RuntimeError(f"{device} is the card of another process; this one has {Card.home}")
    return True


def check_places(function, args, kwargs):
    """RuntimeError, in PyTorch's words, where a card would refuse the arguments."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    # A number in main memory (no dimension) is handed over to a kernel like any number.
    there, here = ([x for x in tensors if isinstance(x, Card) is card and (card or x.dim())] for card in (True, False))
    fine = function in COPIES or function in INDEXING and isinstance(tensors[0], Card)
    if function in INDEXING and len(args) > 2:  # what is put there has to be there
        fine = fine and (isinstance(args[2], Card) or not args[2].dim())
    if there and here and not fine:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {Card.home} "
                           f"and cpu! {function} of {[tuple(x.shape) for x in there]} and {[tuple(x.shape) for x in here]}")
    return bool(there)


def run(function, args, kwargs):
    """One operation of C++'s, on the CPU."""
    there, device = check_places(function, args, kwargs), kwargs.get("device")
    if there and device is not None and device.type == "meta":  # C++ names the device of what it was given
        device = Card.home
    to_card = there if device is None else on_card(device)
    if function is aten.copy_.default:
        to_card = isinstance(args[0], Card)
    if function is aten._fused_sdp_choice.default:
        return 0    # the plain way of attention: C++ would look for a kernel by device
    Card.operations += to_card
    # A number that C++ makes for an operation that follows, on the device that it takes a Card to be on.
    if device is not None and (there or to_card or function is aten.scalar_tensor.default):
        kwargs = {**kwargs, "device": CPU}
    held_args, held_kwargs = tree_map_only(Card, lambda card: card.held, (args, kwargs))
    out = function(*held_args, **held_kwargs)
    if to_card:
        out = tree_map_only(torch.Tensor, Card, out)
        out = return_and_correct_aliasing(function, args, kwargs, out) if there else out
    return out


class Kernels(TorchDispatchMode):
    """Operations without a Card among their arguments: copies to the card, and tensors that are made there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Calls of which C++ would do too much by itself."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        # "cuda" alone: C++ would ask the driver which card is meant.
        args, kwargs = tree_map(lambda x: Card.home if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x,
                                (args, kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and on_card(kwargs.get("device")):
            plain = tree_map_only(Card, lambda card: card.held, args)  # a list of numbers that are on the card, say
            return Card(function(*plain, **{**kwargs, "device": CPU}))
        if function is torch.Tensor.to and isinstance(args[0], Card) and not kwargs.get("copy"):
            like = {x.dtype for x in args[1:] if isinstance(x, torch.Tensor)}   # x.to(other)
            device, dtype, *_ = (Card.home, *like) if like else torch._C._nn._parse_to(*args[1:], **kwargs)
            if device in (None, Card.home) and dtype in (None, args[0].dtype):
                return args[0]      # C++, which takes it to be on the meta device, would copy
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Card):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.as_tensor(x) if isinstance(x, (list, range, np.ndarray)) else x for x in index)
            return function(args[0], index, *args[2:])
        if function is F.scaled_dot_product_attention and kwargs.get("is_causal") and isinstance(args[0], Card):
            seen = torch.ones(args[0].shape[-2], args[1].shape[-2], dtype=torch.bool, device=Card.home).tril()
            kwargs = {**kwargs, "attn_mask": seen, "is_causal": False}
        return function(*args, **kwargs)


def run_backward(*args, engine=torch.autograd._engine_run_backward, **kwargs):
    """The backward pass with `Calls` on, which its own call switched off: checkpointing runs the forward again there."""
    with Calls():
        return engine(*args, **kwargs)


def pretended_collectives():
    """(name in torch.distributed, what stands in for it): NCCL by gloo, but it takes tensors on cards alone."""
    asked, join = [], dist.init_process_group

    def init_process_group(backend, **more):
        asked.append(backend)
        join("gloo", **more)

    def checked(collective):
        def work(*args):
            if asked == ["nccl"] and not all(isinstance(x, Card) for x in tree_leaves(args)):
                raise RuntimeError("No backend type associated with device type cpu")
            return collective(*tree_map_only(Card, lambda card: card.held, args))
        return work

    yield "init_process_group", init_process_group
    yield "get_backend", lambda: asked[0]
    yield from ((name, checked(getattr(dist, name))) for name in ("all_gather", "all_reduce", "broadcast"))


def pretended_calls():
    """(owner, name, what stands in for it): all that would ask a driver."""
    facts = {"is_available": True, "device_count": 1, "current_device": Card.home.index, "get_device_name": "a CPU",
             "memory_allocated": 0, "max_memory_allocated": 1 << 20, "mem_get_info": (1 << 30, 1 << 31),
             "reset_peak_memory_stats": None, "synchronize": None, "empty_cache": None, "set_device": None,
             "_lazy_init": None, "manual_seed_all": None, "get_rng_state": torch.zeros(1), "set_rng_state": None,
             "is_bf16_supported": True, "is_current_stream_capturing": False}
    yield from ((torch.cuda, name, lambda *_, fact=fact, **__: fact) for name, fact in facts.items())
    yield torch.accelerator, "is_available", lambda: False
    yield torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None  # it would stay so after the test
    # Not left to the modes, which are a thread's own: pixels are pinned in another one.
    yield torch.Tensor, "pin_memory", lambda tensor: tensor
    yield torch.autograd, "_engine_run_backward", run_backward
    # Tensors of inference mode lack what views of wrapped tensors need.
    yield from ((torch.inference_mode, name, getattr(torch.no_grad, name)) for name in ("__enter__", "__exit__"))
    yield from ((dist, name, instead) for name, instead in pretended_collectives())


@contextlib.contextmanager
def pretend_cuda(index=0):
    """Yields the class `Card`, with `operations` counted from 0. index: the card's number."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(Card, home=torch.device("cuda", index), operations=0))
        for owner, name, instead in pretended_calls():
            stack.enter_context(mock.patch.object(owner, name, instead))
        stack.enter_context(Kernels())
        stack.enter_context(Calls())
        yield Card
