"""Megatron-Core on a machine without CUDA.

Megatron-Core addresses its device as "cuda" throughout. This file, and only this file, makes those addresses mean the
CPU: it replaces a short list of torch functions, once, in this process, and only when torch sees no CUDA device.
Collectives run on gloo. `cuda_means` lets them mean another device for a while.

What is replaced:
- `torch.cuda.current_device`, `synchronize`, `empty_cache`, the RNG functions and streams: the CPU's, or nothing to do;
- tensor factories and `Tensor.cuda/to/type`: a "cuda" device is read as "cpu", and `Tensor.type()` answers with the
  CUDA name, because Megatron's optimizers sort parameters by that string;
- sums of gradients and gathers of weights over a group of one rank: nothing to do. Gloo would copy both in a thread of its
  own, whose OpenMP threads stay, and from then on OpenMP lets all threads sleep between operations: sampling
  took 28 % longer than before the first update.
- of Megatron itself, its generator of random numbers, and what its experts exchange: see `_adapt_megatron_experts`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from megatron_ext.runtime.megatron_versions import DISPENSABLE

__all__ = ["adapt_megatron_to_cpu", "cuda_means", "import_megatron", "imports_without"]

logger = logging.getLogger(__name__)

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "empty_like",
             "zeros_like", "ones_like", "as_tensor")  # fmt: skip
CPU = torch.device("cpu")
_adapted = False
_stand_in = CPU


def import_megatron() -> None:
    """Import megatron.core; where there is no CUDA, without what it would import for a GPU or for servers and not use: Triton
    where it does without, torch.compile's compiler (its fused kernels are off), Weights & Biases. That is two thirds of its time.

    Call it before anything else imports megatron.core, or it has no effect.
    """
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    with imports_without(*DISPENSABLE):
        import megatron.core  # noqa: F401


@contextlib.contextmanager
def imports_without(*names: str) -> Iterator[None]:
    """What is imported inside, and can do without, finds none of these packages, as if they were not installed, and no compiler
    behind torch.compile."""
    hidden = {name for name in names if name not in sys.modules}
    compile_, distribution = torch.compile, importlib.metadata.distribution

    def installed(name):
        if name in hidden:
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    sys.modules.update(dict.fromkeys(hidden))  # None: an import of it fails
    torch.compile = lambda model=None, **options: model if model is not None else (lambda function: function)
    importlib.metadata.distribution = installed
    try:
        yield
    finally:
        torch.compile, importlib.metadata.distribution = compile_, distribution
        for name in hidden:
            del sys.modules[name]


def adapt_megatron_to_cpu() -> None:
    """Idempotent. Does nothing where CUDA is available. Call it before megatron.core builds anything."""
    global _adapted
    if _adapted or torch.cuda.is_available():
        return
    _adapted = True
    _device_constructors()  # remembers the factories as they are: `with torch.device("meta")` must still know them
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _adapt_tensor_methods()
    _adapt_cuda_module()
    _adapt_megatron_rng()
    _adapt_groups_of_one()
    _adapt_megatron_experts()
    logger.info("no CUDA device: Megatron-Core runs on the CPU with gloo")


@contextlib.contextmanager
def cuda_means(device: torch.device) -> Iterator[None]:
    """Inside, "cuda" means this device and not the CPU. On "meta" nothing is computed: steps are tried as a GPU would run them,
    see tests/dry/. Only where there is no GPU, once Megatron has been adapted to the CPU."""
    global _stand_in
    assert _adapted, '"cuda" can mean another device only after adapt_megatron_to_cpu, on a machine without a GPU'
    before, _stand_in = _stand_in, device
    try:
        yield
    finally:
        _stand_in = before


def _is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _on_cpu(factory):
    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _stand_in
        return factory(*args, **kwargs)

    return wrapper


def _adapt_tensor_methods() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (_stand_in, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _stand_in
        return tensor_to(self, *args, **kwargs)

    def type_(self, *args, **kwargs):
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        name = f"torch.{tensor_type(self).rpartition('.')[2]}"  # without "meta."
        return name.replace("torch.", "torch.cuda.", 1) if _stand_in in (CPU, self.device) else name

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self if _stand_in == CPU else tensor_to(self, _stand_in)


class _NoStream:
    """A CUDA stream or event where all work is already done when a call returns."""

    def __init__(self, *args, **kwargs): ...

    def wait_stream(self, stream): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return self

    def synchronize(self): ...


def _adapt_cuda_module() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _stand_in
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()


def _adapt_megatron_rng() -> None:
    """One generator, the CPU's, plays the GPU's part in Megatron's tracker of RNG states.

    Without dropout nothing on the device draws numbers, so the tracker's states only have to be kept apart.
    """
    generator = torch.Generator()

    def get_state(*args, **kwargs):
        return generator.get_state()

    def set_state(state, *args, **kwargs):
        generator.set_state(state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = generator.manual_seed
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _adapt_groups_of_one() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _unless_alone(collective):
    """Of (output, input, ...); Megatron's input is its output where a group has one rank."""

    @functools.wraps(collective)
    def wrapper(output, given, *args, group, async_op=False, **kwargs):
        if async_op or dist.get_world_size(group) > 1 or output.data_ptr() != given.data_ptr():
            return collective(output, given, *args, group=group, async_op=async_op, **kwargs)
        return None

    return wrapper


def _adapt_megatron_experts() -> None:
    """Numbers of tokens that experts are sent reach the host as collectives take them, and not as they lie on the CPU; and what
    ranks that share experts exchange goes in equal parts, as gloo wants them."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor, as_numpy=False, **options):
        tensor = move(tensor, as_numpy=as_numpy, **options)
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) and tensor.device == CPU else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moved
    mappings._gather_along_first_dim = _uneven(mappings._gather_along_first_dim, _gather_uneven)
    mappings._reduce_scatter_along_first_dim = _uneven(mappings._reduce_scatter_along_first_dim, _scatter_uneven)
    # Without Transformer Engine the name is missing, and Megatron's own router asks for it.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def _uneven(even, uneven):
    """A collective over the rows of ranks, whose numbers may be given."""

    @functools.wraps(even)
    def collective(given, group, sizes=None, use_global_buffer=False):
        if sizes is None or group.size() == 1:
            return even(given, group, sizes, use_global_buffer)
        return uneven(given, group, list(sizes))

    return collective


def _gather_uneven(mine: torch.Tensor, group, sizes: list[int]) -> torch.Tensor:
    most = max(sizes)
    out = mine.new_empty(len(sizes) * most, *mine.shape[1:])
    if most:
        dist.all_gather_into_tensor(out, _with_rows(mine, most), group=group)
    return torch.cat([part[:size] for part, size in zip(out.split(most or 1), sizes, strict=False)] or [out])


def _scatter_uneven(rows: torch.Tensor, group, sizes: list[int]) -> torch.Tensor:
    most = max(sizes)
    mine = rows.new_empty(most, *rows.shape[1:])
    if most:
        parts = torch.cat([_with_rows(part, most) for part in rows.split(sizes)])
        dist.reduce_scatter_tensor(mine, parts, group=group)
    return mine[: sizes[group.rank()]]


def _with_rows(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat((x, x.new_zeros(count - len(x), *x.shape[1:]))).contiguous()
