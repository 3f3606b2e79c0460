"""Megatron-Core on a machine without CUDA.

Megatron-Core addresses its device as "cuda" throughout. This file, and only this file, makes those addresses mean the
CPU: it replaces a short list of torch functions, once, in this process, and only when torch sees no CUDA device.
Nothing of Megatron is changed. Collectives run on gloo. `cuda_means` lets them mean another device for a while.

What is replaced:
- `torch.cuda.current_device`, `synchronize`, `empty_cache`, the RNG functions and streams: the CPU's, or nothing to do;
- tensor factories and `Tensor.cuda/to/type`: a "cuda" device is read as "cpu", and `Tensor.type()` answers with the
  CUDA name, because Megatron's optimizers sort parameters by that string.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Iterator

import torch
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
