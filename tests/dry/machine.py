"""A machine with one Hopper GPU, made of tensors without memory, in a process that has none."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from megatron_ext.attention import kernels
from megatron_ext.runtime.cpu import adapt_megatron_to_cpu, cuda_means
from tests.dry.flash_attn import MODULES

__all__ = ["DEVICE", "pretended_gpu"]

DEVICE = torch.device("meta")
HOPPER = (9, 0)


class LaunchedMerge:
    """In place of the compiled Triton kernel, which needs a driver to be launched: what it relies on in its arguments.

    Its arithmetic is compared elsewhere, in Triton's interpreter.
    """

    def __getitem__(self, grid: tuple[int]):
        def launch(
            out, lse, part, part_lse, rows, first_row, out_row, out_head, lse_row, lse_head, part_row, part_head,
            part_lse_row, part_lse_head, n, d, INDEXED, N, D,
        ):  # fmt: skip
            (count,) = grid
            assert count > 0 and part.shape == (count, n, d) and part_lse.shape == (count, n)
            assert out.shape[1:] == (n, d) and lse.shape == out.shape[:2]
            for x in (out, part):
                assert x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.stride(2) == 1, (
                    f"{x.dtype} {x.stride()}"
                )
            assert lse.dtype == part_lse.dtype == torch.float32, f"lse {lse.dtype}, of the part {part_lse.dtype}"
            assert (out.stride()[:2], part.stride()[:2]) == ((out_row, out_head), (part_row, part_head))
            assert (lse.stride(), part_lse.stride()) == ((lse_row, lse_head), (part_lse_row, part_lse_head))
            if INDEXED:
                assert rows.dtype == torch.int64 and rows.shape == (count,) and rows.is_contiguous()
            else:
                assert 0 <= first_row <= out.size(0) - count
            assert n <= N < 2 * n and d <= D < 2 * d
            tensors: list[Tensor] = [out, lse, part, part_lse, *([rows] if INDEXED else [])]
            assert all(x.device == DEVICE for x in tensors), "a tensor of the host"

        return launch


def pageable(empty: Callable) -> Callable:
    """Page-locked memory is a driver's: where there is none, the host's usual one."""
    return functools.wraps(empty)(lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))


def moved_to_host(x: Tensor, as_numpy: bool = False, record_stream: bool = False):
    """Megatron's own asks whether a tensor is CUDA's, which here none is."""
    found = x.to("cpu") if isinstance(x, Tensor) else x
    return found.numpy() if as_numpy and isinstance(found, Tensor) else found


class LaunchedSinks:
    """The same of the kernel by which sinks join."""

    def __getitem__(self, grid: tuple[int]):
        def launch(out, lse, sinks, out_row, out_head, lse_row, lse_head, n, d, N, D):
            assert grid == (len(out),) and out.shape[1:] == (n, d) and lse.shape == out.shape[:2]
            assert out.dtype in (torch.float32, torch.bfloat16, torch.float16), f"{out.dtype}"
            assert out.stride() == (out_row, out_head, 1)
            assert lse.dtype == torch.float32 and lse.stride() == (lse_row, lse_head)
            assert sinks.shape == (n,) and sinks.is_contiguous() and n <= N < 2 * n and d <= D < 2 * d
            assert all(x.device == DEVICE for x in (out, lse, sinks)), "a tensor of the host"

        return launch


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Inside, "cuda" is a device whose tensors have no memory, and both flash-attn libraries are installed.

    Nothing else of megatron_ext is replaced: kernels are chosen and called as on CUDA.
    """
    adapt_megatron_to_cpu()
    with pytest.MonkeyPatch.context() as patch, cuda_means(DEVICE):
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(torch.optim.Optimizer, name):  # in a CUDA build it asks the driver
                patch.setattr(torch.optim.Optimizer, name, lambda self: None)
        patch.setattr(torch, "empty", pageable(torch.empty))
        patch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", moved_to_host)
        for name, module in MODULES.items():
            patch.setitem(sys.modules, name, module)
        if importlib.util.find_spec("triton") is not None:
            compiled = importlib.import_module("megatron_ext.attention.merge_triton")
            patch.setattr(compiled, "_merge_kernel", LaunchedMerge())
            patch.setattr(compiled, "_sink_kernel", LaunchedSinks())
        _forget_libraries()
        try:
            yield DEVICE
        finally:
            _forget_libraries()


def _forget_libraries() -> None:
    kernels._installed.cache_clear()
    kernels._takes_windows.cache_clear()
