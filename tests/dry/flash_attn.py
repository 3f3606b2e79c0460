"""The functions of flash-attn 2 and 3 that our kernels call, on tensors without memory: what they would refuse, and the shapes
that they give back.

Each is an operation of PyTorch with the signature of the library's own, which is one, too (flash-attn 2.8 of August 2026,
`flash_attn/flash_attn_interface.py` and `hopper/flash_attn_interface.py`). They check what the C++ behind them checks, and what
it only relies on: it reads `softmax_lse` as contiguous fp32 without a look.

Shape legend: tq, tk rows of all sequences, n query heads, m key/value heads, d head dimension, b sequences.
"""

from __future__ import annotations

import importlib.machinery
import types
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MODULES", "check_backward", "check_forward"]

DTYPES = (torch.bfloat16, torch.float16)
HEAD_MULTIPLE, LARGEST_HEAD = 8, 256


def check_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: tuple, narrow: bool = False
) -> None:
    """What every variable-length flash attention asks of its inputs; `narrow`: values may be those of DeepSeek's heads."""
    assert q.dim() == k.dim() == 3 and k.shape[:2] == v.shape[:2], (
        f"q {q.shape}, k {k.shape}, v {v.shape}: not packed rows"
    )
    (_, n, d), m = q.shape, k.size(1)
    assert v.size(2) == d or (narrow and 128 < d <= 192 and 96 < v.size(2) <= 128), f"values of {v.size(2)} beside {d}"
    assert q.dtype in DTYPES and q.dtype == k.dtype == v.dtype, f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    assert k.size(2) == d and d % HEAD_MULTIPLE == 0 and d <= LARGEST_HEAD and n % m == 0, f"{n} x {d} and {m} heads"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "a head is not contiguous"
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.dim() == 1, f"cu_seqlens {cu.dtype} {cu.stride()}"
    assert len(cu_q) == len(cu_k) >= 2, f"{len(cu_q) - 1} sequences of queries, {len(cu_k) - 1} of keys"
    assert all(type(x) is int and x > 0 for x in longest), f"longest sequences {longest}"
    assert longest[0] <= q.size(0) and longest[1] <= k.size(0), (
        f"longest sequences {longest} of {q.size(0)}, {k.size(0)} rows"
    )
    _on_device(q, k, v, cu_q, cu_k)


def check_backward(grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, *gradients: tuple[Tensor, Tensor]) -> None:
    """What its backward asks beside that; `gradients`: each with what it is the gradient of, the values' last."""
    like = (*q.shape[:2], gradients[-1][1].size(-1)) if gradients else q.shape
    for name, x in (("dout", grad), ("out", out)):
        assert x.dtype == q.dtype and x.shape == like and x.stride(-1) == 1, f"{name} {x.dtype} {tuple(x.shape)}"
    shape = (q.size(1), q.size(0))
    assert lse.dtype == torch.float32 and lse.shape == shape and lse.is_contiguous(), (
        f"softmax_lse {lse.dtype} {tuple(lse.shape)} {lse.stride()}, read as contiguous fp32 {shape}"
    )
    for d, x in gradients:
        assert d.dtype == x.dtype and d.shape == x.shape and d.stride(-1) == 1, f"gradient {d.dtype} {tuple(d.shape)}"
        _on_device(d)
    _on_device(grad, out, lse)


def _on_device(*tensors: Tensor) -> None:
    assert all(x.device.type == "meta" for x in tensors), "a tensor of the host"


def _window(left: int, right: int, causal: bool) -> None:
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0 and causal), (
        f"window {left}, {right}, causal {causal}"
    )


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.size(2)), torch.empty(q.size(1), q.size(0), dtype=torch.float32, device=q.device)


def _fa2_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False, block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
    _window(window_size_left, window_size_right, causal)
    assert dropout_p == 0
    return *_results(q, v), q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None, dk: Tensor | None,
    dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    check_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
    check_backward(dout, q, out, softmax_lse, (dq, q), (dk, k), (dv, v))
    _window(window_size_left, window_size_right, causal)
    assert dropout_p == 0
    return q.new_empty(q.size(1), q.size(0), dtype=torch.float32)


def _fa3_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None, qv: Tensor | None = None,
    out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None, leftpad_k: Tensor | None = None, rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None, seqlens_rotary: Tensor | None = None, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None, num_splits: int = 1,
    pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), narrow=True)
    _window(window_size_left, window_size_right, causal)
    return *_results(q, v), q.new_empty(0), q.new_empty(0)


def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None, sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, dq: Tensor | None = None, dk: Tensor | None = None,
    dv: Tensor | None = None, softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    check_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), narrow=True)
    check_backward(dout, q, out, softmax_lse, (dq, q), (dk, k), (dv, v))
    _window(window_size_left, window_size_right, is_causal)
    return q.new_empty(q.size(1), q.size(0), dtype=torch.float32)


def _operation(name: str, function: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """As both libraries register theirs: for CUDA, with a form for tensors that have no memory."""

    def on_cuda(*args, **kwargs):
        raise AssertionError(f"{name} has been called with tensors that have memory")

    schema = torch.library.infer_schema(function, mutates_args=mutates)
    made = torch.library.custom_op(f"dry::{name}", on_cuda, mutates_args=mutates, device_types="cuda", schema=schema)
    made.register_fake(function)
    return made


def _module(name: str, **functions: Callable) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(functions)
    return module


GRADIENTS = ("dq", "dk", "dv")
# By the names under which our kernels import them.
MODULES = {
    "flash_attn_2_cuda": _module("flash_attn_2_cuda"),
    "flash_attn": _module("flash_attn"),
    "flash_attn.flash_attn_interface": _module(
        "flash_attn.flash_attn_interface",
        _flash_attn_varlen_forward=_operation("fa2_forward", _fa2_forward),
        _flash_attn_varlen_backward=_operation("fa2_backward", _fa2_backward, GRADIENTS),
    ),
    "flash_attn_interface": _module(
        "flash_attn_interface",
        _flash_attn_forward=_operation("fa3_forward", _fa3_forward),
        _flash_attn_backward=_operation("fa3_backward", _fa3_backward, GRADIENTS),
    ),
}
