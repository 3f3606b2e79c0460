"""What sections need of this process: the device, and the world of one rank."""

from __future__ import annotations

import functools

import torch

from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed
from tools.gpu.runner import Findings, Settings, Skip

__all__ = ["describe", "device_of", "world"]


def device_of(findings: Findings) -> torch.device:
    """The device that was asked for. Raises Skip where it is not there."""
    if findings.settings.device == "cuda" and not torch.cuda.is_available():
        raise Skip("torch sees no CUDA device; --device cpu runs every section at tiny sizes")
    return torch.device(findings.settings.device)


def world(findings: Findings) -> torch.device:
    """The same, with torch.distributed and Megatron's groups started once and all generators seeded."""
    device_of(findings)
    device = _initialized()
    set_seed(findings.settings.seed)
    return device


@functools.cache
def _initialized() -> torch.device:
    return initialize(ParallelSizes())


def describe(settings: Settings) -> dict:
    """Machine, versions and commit."""
    from bench_common import record

    return record(device=settings.device, seed=settings.seed)
