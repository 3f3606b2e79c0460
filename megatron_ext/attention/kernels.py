"""Attention kernels behind one contract, and the registry that chooses among them.

THE LOG-SUM-EXP CONVENTION, stated once: `lse[row, head] = ln(sum_j exp(score_j))`, natural logarithm, in fp32 (fp64 for
fp64 inputs), the score being `softmax_scale * q_row . k_j`, after the soft cap if there is one. A kernel whose library
uses another base or layout converts at its border.

    cpu           PyTorch's CPU flash attention                             CPU, fp64/fp32/bf16/fp16
    blockwise     matrix products and a softmax, a block of queries at a time: the slow one that can do everything
    torch_flash   PyTorch's own CUDA flash attention, no extra package      CUDA, bf16/fp16
    flash_attn_2  flash-attn 2, where installed                             CUDA, bf16/fp16, soft cap
    flash_attn_3  flash-attn 3, where installed, on Hopper                  CUDA, bf16/fp16, soft cap

Shape legend: t rows of the stream, n query heads, m key/value heads (n is a multiple of m, K/V never repeated),
d head dimension; b, s, k: rectangles of a piece, queries and keys of one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.attention.pieces import PackedPiece, StridedPiece, packed_pieces, strided_pieces
from megatron_ext.attention.plan import Call
from megatron_ext.devices import device_type
from megatron_ext.errors import UserError

__all__ = ["KERNELS", "Kernel", "Piece", "Scoring", "check_kernel", "select_kernel"]

logger = logging.getLogger(__name__)

# Queries of a block. Wider blocks waste scores above the diagonal, narrower ones launches; 256 was the fastest of
# 64 to 1024 for windows of 128 to 1024 on two threads.
CPU_BLOCK = 256
HOPPER = 9  # major compute capability


@dataclass(frozen=True)
class Scoring:
    """How a score is made from a query and a key.

    Attributes:
        scale: factor of their product.
        softcap: c > 0 bounds scores smoothly, s -> c tanh(s / c) (Gemma 2, arXiv 2408.00118, section 2).
        window: a row sees itself and at most this many rows before it on its path.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self):
        if self.softcap is not None and self.softcap <= 0:
            raise UserError(f"the soft cap of attention scores must be above 0, got {self.softcap}")
        if self.window is not None and self.window < 0:
            raise UserError(f"a sliding window counts the rows before a query, 0 or more, got {self.window}")


class Piece(Protocol):
    """Rows of one kernel launch. `take_*` may return a view or a copy; `put`/`add` always reach the tensor."""

    def take_q(self, x: Tensor) -> Tensor: ...
    def take_k(self, x: Tensor) -> Tensor: ...
    def put_q(self, x: Tensor, value: Tensor) -> None: ...
    def add_q(self, x: Tensor, value: Tensor) -> None: ...
    def put_k(self, x: Tensor, value: Tensor) -> None: ...
    def add_k(self, x: Tensor, value: Tensor) -> None: ...


class Kernel(Protocol):
    """What the executor needs of a kernel. Tensors are in the piece's layout; `lse` follows the convention above.

    Attributes:
        softcap: whether it can cap scores.
        device: the type it runs on, None for any.
    """

    name: str
    softcap: bool
    device: str | None

    def missing(self) -> str | None:
        """What this machine lacks to run it, in words; None if nothing."""
        ...

    def takes_values(self, key: int, value: int) -> bool:
        """Whether values may have so many channels beside keys of as many or more; else they are padded with zeros."""
        ...

    def pieces(self, call: Call, device: torch.device) -> Sequence[Piece]: ...

    def keys_overlap(self, call: Call) -> bool:
        """Whether a key row is in several pieces of the call, so that its gradients have to be added up."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) for the scores of this piece, given the MERGED out and lse."""
        ...


class CpuFlashKernel:
    """PyTorch's CPU flash attention, which takes and gives the log-sum-exp. Not variable-length: one launch a run."""

    name, softcap, device = "cpu", False, "cpu"

    def missing(self):
        return None

    def takes_values(self, key, value):
        return value == key

    def pieces(self, call: Call, device: torch.device) -> Sequence[StridedPiece]:
        return strided_pieces(call, CPU_BLOCK)

    def keys_overlap(self, call: Call) -> bool:
        return call.banded

    def forward(self, q, k, v, piece: StridedPiece, scoring):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, piece.causal, attn_mask=_band(piece, q), scale=scoring.scale
        )

    def backward(self, grad, q, k, v, out, lse, piece: StridedPiece, scoring):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, piece.causal, attn_mask=_band(piece, q), scale=scoring.scale
        )


def _band(piece: StridedPiece, q: Tensor) -> Tensor | None:
    return piece.mask(q) if piece.banded else None  # plain squares are the kernel's own


class BlockwiseKernel:
    """Explicit scores, a block of queries at a time, in fp32 or fp64: any device and every score rule, slowly."""

    name, softcap, device = "blockwise", True, None
    block = 128

    def missing(self):
        return None

    def takes_values(self, key, value):
        return True

    def pieces(self, call: Call, device: torch.device) -> Sequence[StridedPiece]:
        return strided_pieces(call, self.block, always=True)

    def keys_overlap(self, call: Call) -> bool:
        return True

    def forward(self, q, k, v, piece: StridedPiece, scoring):
        scores, _ = self._scores(q, k, piece, scoring)  # [b, m, n / m, s, k]
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp_() @ _wide(v).unsqueeze(2)
        return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)

    def backward(self, grad, q, k, v, out, lse, piece: StridedPiece, scoring):
        m = k.size(1)
        scores, slope = self._scores(q, k, piece, scoring)
        weights = (scores - lse.unflatten(1, (m, -1)).unsqueeze(-1)).exp_()
        g, o = (_wide(x).unflatten(1, (m, -1)) for x in (grad, out))
        dv = (weights.transpose(-1, -2) @ g).sum(2)
        delta = (g * o).sum(-1, keepdim=True)  # D_i of the executor's docstring
        ds = weights * (g @ _wide(v).unsqueeze(2).transpose(-1, -2) - delta) * slope
        dq = ds @ _wide(k).unsqueeze(2)
        dk = (ds.transpose(-1, -2) @ _wide(q).unflatten(1, (m, -1))).sum(2)
        return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, piece: StridedPiece, scoring: Scoring) -> tuple[Tensor, Tensor | float]:
        """Scores, -inf where hidden, and their derivative by q . k."""
        grouped = _wide(q).unflatten(1, (k.size(1), -1))
        scores, slope = grouped @ _wide(k).unsqueeze(2).transpose(-1, -2) * scoring.scale, scoring.scale
        if scoring.softcap is not None:
            bounded = (scores / scoring.softcap).tanh()
            scores, slope = bounded * scoring.softcap, (1 - bounded.square()) * scoring.scale
        mask = piece.mask(scores)
        return scores if mask is None else scores + mask, slope


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _PackedKernel:
    """What the CUDA kernels share: one launch a call, keys of one rectangle after the other."""

    device = "cuda"

    def takes_values(self, key, value):
        return value == key

    def pieces(self, call: Call, device: torch.device) -> Sequence[PackedPiece]:
        return packed_pieces(call, device)

    def keys_overlap(self, call: Call) -> bool:
        return False


class TorchFlashKernel(_PackedKernel):
    """Stock PyTorch's CUDA flash attention with cu_seqlens: no extra package. bf16/fp16, d up to 256."""

    name, softcap = "torch_flash", False

    def missing(self):
        return None if torch.cuda.is_available() else "a CUDA GPU"

    def forward(self, q, k, v, piece: PackedPiece, scoring):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, piece.cu_seqlens_q, piece.cu_seqlens_k, piece.max_seqlen_q, piece.max_seqlen_k,
            0.0, piece.causal, False, scale=scoring.scale, **_torch_window(piece),
        )  # fmt: skip
        return out, lse.transpose(0, 1)  # the library's lse is [n, rows]

    def backward(self, grad, q, k, v, out, lse, piece: PackedPiece, scoring):
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), lse.transpose(0, 1).contiguous(),
            piece.cu_seqlens_q, piece.cu_seqlens_k, piece.max_seqlen_q, piece.max_seqlen_k,
            0.0, piece.causal, *no_dropout, scale=scoring.scale, **_torch_window(piece),
        )  # fmt: skip


def _torch_window(piece: PackedPiece) -> dict[str, int]:
    return {} if piece.window is None else {"window_size_left": piece.window, "window_size_right": 0}


class _FlashAttnKernel(_PackedKernel):
    """A flash-attn package. Both versions give lse as [n, rows], natural logarithm, and write gradients in place."""

    softcap = True
    version: str  # that has the functions below, with these arguments
    extension: str  # the compiled module: the plain name may belong to another version of the package
    module: str
    functions: tuple[str, str]

    def missing(self):
        if not torch.cuda.is_available():
            return "a CUDA GPU"
        if not _installed(self.extension) or not _takes_windows(self.module, self.functions):
            return self.version
        return None

    @staticmethod
    def rules(piece: PackedPiece, scoring: Scoring) -> dict:
        """Keywords that both versions take, forward and backward."""
        return {
            "softmax_scale": scoring.scale,
            "window_size_left": -1 if piece.window is None else piece.window,
            "window_size_right": -1 if piece.window is None else 0,
            "softcap": scoring.softcap or 0.0,
        }

    @staticmethod
    def lengths(piece: PackedPiece) -> dict:
        return {name: getattr(piece, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")}

    def forward(self, q, k, v, piece: PackedPiece, scoring):
        out, lse = self.launch_forward(q, k, v, piece, scoring)
        return out, lse.transpose(0, 1)

    def backward(self, grad, q, k, v, out, lse, piece: PackedPiece, scoring):
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        lse = lse.transpose(0, 1).contiguous()
        self.launch_backward(grad.contiguous(), q, k, v, out.contiguous(), lse, gradients, piece, scoring)
        return gradients


class FlashAttn2Kernel(_FlashAttnKernel):
    name, version = "flash_attn_2", "flash-attn 2.7 or newer"
    extension, module = "flash_attn_2_cuda", "flash_attn.flash_attn_interface"
    functions = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")

    def launch_forward(self, q, k, v, piece, scoring):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, **self.lengths(piece), **self.rules(piece, scoring), dropout_p=0.0, causal=piece.causal
        )
        return out, lse

    def launch_backward(self, grad, q, k, v, out, lse, gradients, piece, scoring):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        _flash_attn_varlen_backward(
            grad, q, k, v, out, lse, *gradients, **self.lengths(piece), **self.rules(piece, scoring),
            dropout_p=0.0, causal=piece.causal, alibi_slopes=None, deterministic=False,
        )  # fmt: skip


class FlashAttn3Kernel(_FlashAttnKernel):
    name, version = "flash_attn_3", "flash-attn 3 of November 2025 or newer"
    extension, module = "flash_attn_interface", "flash_attn_interface"
    functions = ("_flash_attn_forward", "_flash_attn_backward")

    def takes_values(self, key, value):
        """What it was compiled for, forward and backward: the sizes of DeepSeek's heads."""
        return value == key or (128 < key <= 192 and 96 < value <= 128)

    def missing(self):
        if lacking := super().missing():
            return lacking
        return None if torch.cuda.get_device_capability()[0] == HOPPER else "a Hopper GPU"

    def launch_forward(self, q, k, v, piece, scoring):
        from flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(
            q, k, v, **self.lengths(piece), **self.rules(piece, scoring), causal=piece.causal
        )
        return out, lse

    def launch_backward(self, grad, q, k, v, out, lse, gradients, piece, scoring):
        from flash_attn_interface import _flash_attn_backward

        dq, dk, dv = gradients
        _flash_attn_backward(
            grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **self.lengths(piece), **self.rules(piece, scoring),
            is_causal=piece.causal,
        )  # fmt: skip


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def _takes_windows(module: str, functions: tuple[str, str]) -> bool:
    """Whether the library's functions are there and name their arguments as we do; older versions had a tuple."""
    try:
        found = [getattr(importlib.import_module(module), function) for function in functions]
    except (ImportError, AttributeError):
        return False
    return all("window_size_left" in _arguments(function) for function in found)


def _arguments(function: Callable) -> Container[str]:
    """Argument names of a function, or of one that is registered as a PyTorch operation."""
    if hasattr(function, "_opoverload"):
        return [argument.name for argument in function._opoverload._schema.arguments]
    return inspect.signature(function).parameters


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (CpuFlashKernel(), BlockwiseKernel(), TorchFlashKernel(), FlashAttn2Kernel(), FlashAttn3Kernel())
}
# What "auto" looks for, in order: an installed flash-attn is there on purpose.
_PREFERRED = {
    "cpu": ("cpu", "blockwise"),
    "cuda": ("flash_attn_3", "flash_attn_2", "torch_flash", "blockwise"),
}


def select_kernel(attention_kernel: str, device: torch.device, scoring: Scoring) -> Kernel:
    """Find a kernel by name; "auto" takes the first that this machine can run, and logs the choice once.

    Raises:
        UserError: an unknown kernel, or one that cannot run here, on this device or with a soft cap.
    """
    softcap, kind = scoring.softcap is not None, device_type(device)
    if attention_kernel == "auto":
        for name in _PREFERRED.get(kind, ()):
            kernel = KERNELS[name]
            if not kernel.missing() and (kernel.softcap or not softcap):
                _log_choice(name, kind, softcap)
                return kernel
        raise UserError(f"no attention kernel runs on {kind} tensors; there are {', '.join(KERNELS)}")
    check_kernel(attention_kernel, softcap, kind)
    if lacking := KERNELS[attention_kernel].missing():
        raise UserError(f"attention_kernel={attention_kernel!r} needs {lacking}; use 'auto'")
    return KERNELS[attention_kernel]


def check_kernel(attention_kernel: str, softcap: bool, device_type: str | None = None) -> None:
    """Refuse a kernel by name that cannot do what is asked, on whatever machine; there is always one for "auto".

    Args:
        softcap: whether scores are capped.
        device_type: of the tensors; None: not known yet.

    Raises:
        UserError: an unknown kernel, or one that does not run on such a device or with a soft cap.
    """
    if attention_kernel == "auto":
        return
    if attention_kernel not in KERNELS:
        known = ", ".join(("auto", *KERNELS, "reference", "flex"))
        raise UserError(f"unknown attention_kernel {attention_kernel!r}: choose one of {known}")
    kernel = KERNELS[attention_kernel]
    if device_type is not None and kernel.device not in (None, device_type):
        raise UserError(f"attention_kernel={attention_kernel!r} cannot run on {device_type} tensors; use 'auto'")
    if softcap and not kernel.softcap:
        able = ", ".join(name for name, k in KERNELS.items() if k.softcap)
        raise UserError(f"attention_kernel={attention_kernel!r} cannot cap scores; use one of auto, {able}")


@cache
def _log_choice(name: str, device_type: str, softcap: bool) -> None:
    logger.info("prefix-grouped attention%s uses the %r kernel on %s", " with a soft cap" * softcap, name, device_type)
