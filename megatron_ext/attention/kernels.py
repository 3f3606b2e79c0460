"""Attention kernels behind one contract, and the registry that chooses among them.

THE LOG-SUM-EXP CONVENTION, stated once: `lse[row, head] = ln(sum_j exp(softmax_scale * q_row . k_j))`, natural
logarithm, in fp32 (fp64 for fp64 inputs). A kernel whose library uses another base or layout converts at its border.

A kernel runs one `Call` of a plan in *pieces*. A piece knows how to take its query rows and its key rows out of a
[t, n, d] tensor in the layout that the kernel wants, and how to put results back:

    CPU     a `Run`, viewed as [b, n, s, d] without copying
    CUDA    the whole call, rows packed as [rows, n, d] with cu_seqlens

Shape legend: t rows of the stream, n query heads, m key/value heads (n is a multiple of m, K/V never repeated),
d head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.attention.plan import Call, Run

__all__ = ["KERNELS", "Kernel", "Piece", "select_kernel"]

logger = logging.getLogger(__name__)


class Piece(Protocol):
    """Rows of one kernel launch. `take_*` may return a view or a copy; `put`/`add` always reach the tensor."""

    def take_q(self, x: Tensor) -> Tensor: ...
    def take_k(self, x: Tensor) -> Tensor: ...
    def put_q(self, x: Tensor, value: Tensor) -> None: ...
    def add_q(self, x: Tensor, value: Tensor) -> None: ...
    def put_k(self, x: Tensor, value: Tensor) -> None: ...
    def add_k(self, x: Tensor, value: Tensor) -> None: ...


class Kernel(Protocol):
    """What the executor needs of a kernel. Tensors are in the piece's layout; `lse` follows the convention above."""

    name: str

    def pieces(self, call: Call, device: torch.device) -> Sequence[Piece]: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) for the scores of this piece, given the MERGED out and lse."""
        ...


class _StridedPiece:
    """A run of equal rectangles as a [b, n, s, d] (or [b, n, s] for lse) view of a [t, n, d] ([t, n]) tensor."""

    def __init__(self, run: Run, causal: bool):
        self.run, self.causal = run, causal

    def _view(self, x: Tensor, start: int, length: int, step: int) -> Tensor:
        row, *rest = x.stride()
        shape = (self.run.count, x.size(1), length, *x.shape[2:])
        return x.as_strided(shape, (step * row, rest[0], row, *rest[1:]), x.storage_offset() + start * row)

    def take_q(self, x: Tensor) -> Tensor:
        return self._view(x, self.run.first.q_start, self.run.first.q_len, self.run.q_step)

    def take_k(self, x: Tensor) -> Tensor:
        return self._view(x, self.run.first.k_start, self.run.first.k_len, self.run.k_step)

    def put_q(self, x: Tensor, value: Tensor) -> None:
        self.take_q(x).copy_(value)

    def add_q(self, x: Tensor, value: Tensor) -> None:
        self.take_q(x).add_(value)

    def put_k(self, x: Tensor, value: Tensor) -> None:
        self.take_k(x).copy_(value)

    def add_k(self, x: Tensor, value: Tensor) -> None:
        self.take_k(x).add_(value)


class CpuFlashKernel:
    """PyTorch's CPU flash attention, which takes and gives the log-sum-exp. Not variable-length: one launch a run."""

    name = "cpu"

    def pieces(self, call: Call, device: torch.device) -> Sequence[Piece]:
        return _strided_pieces(call)

    def forward(self, q, k, v, piece, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, piece.causal, scale=scale)

    def backward(self, grad, q, k, v, out, lse, piece, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, piece.causal, scale=scale
        )


def _strided_pieces(call: Call) -> tuple[_StridedPiece, ...]:
    if "strided" not in call.cache:
        call.cache["strided"] = tuple(_StridedPiece(run, call.causal) for run in call.runs)
    return call.cache["strided"]


class _PackedPiece:
    """All rectangles of a call with their rows packed back to back: [rows, n, d], cu_seqlens beside them."""

    def __init__(self, call: Call, device: torch.device):
        self.causal = call.causal
        q = [(run.first.q_start, run.first.q_len, run.q_step, run.count) for run in call.runs]
        k = [(run.first.k_start, run.first.k_len, run.k_step, run.count) for run in call.runs]
        self.q_rows, self.k_rows = _rows(q, device), _rows(k, device)
        self.cu_seqlens_q, self.cu_seqlens_k = _cu_seqlens(q, device), _cu_seqlens(k, device)
        self.max_seqlen_q = max(length for _, length, _, _ in q)
        self.max_seqlen_k = max(length for _, length, _, _ in k)

    def take_q(self, x: Tensor) -> Tensor:
        return x[self.q_rows] if isinstance(self.q_rows, slice) else x.index_select(0, self.q_rows)

    def take_k(self, x: Tensor) -> Tensor:
        return x[self.k_rows] if isinstance(self.k_rows, slice) else x.index_select(0, self.k_rows)

    def put_q(self, x: Tensor, value: Tensor) -> None:
        x[self.q_rows] = value

    def add_q(self, x: Tensor, value: Tensor) -> None:
        x[self.q_rows] += value

    def put_k(self, x: Tensor, value: Tensor) -> None:
        x[self.k_rows] = value

    def add_k(self, x: Tensor, value: Tensor) -> None:
        x[self.k_rows] += value


# (start, length, step, count): `count` stretches of `length` rows, `step` apart.
_Stretches = list[tuple[int, int, int, int]]


def _rows(stretches: _Stretches, device: torch.device) -> slice | Tensor:
    """Contiguous rows become a slice, hence a view; others an int64 index."""
    end, contiguous = stretches[0][0], True
    for start, length, step, count in stretches:
        contiguous &= start == end and (count == 1 or step == length)
        end = start + count * length
    if contiguous:
        return slice(stretches[0][0], end)
    parts = [
        (start + step * torch.arange(count)[:, None] + torch.arange(length)).flatten()
        for start, length, step, count in stretches
    ]
    return torch.cat(parts).to(device)


def _cu_seqlens(stretches: _Stretches, device: torch.device) -> Tensor:
    lengths = torch.tensor([length for _, length, _, _ in stretches])
    counts = torch.tensor([count for _, _, _, count in stretches])
    ends = lengths.repeat_interleave(counts).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(device, torch.int32)


class TorchFlashKernel:
    """Stock PyTorch's CUDA flash attention with cu_seqlens: no extra package. bf16/fp16, d up to 256."""

    name = "torch_flash"

    def pieces(self, call: Call, device: torch.device) -> Sequence[Piece]:
        return _packed_pieces(call, device)

    def forward(self, q, k, v, piece, scale):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, piece.cu_seqlens_q, piece.cu_seqlens_k, piece.max_seqlen_q, piece.max_seqlen_k,
            0.0, piece.causal, False, scale=scale,
        )  # fmt: skip
        return out, lse.transpose(0, 1)  # the library's lse is [n, rows]

    def backward(self, grad, q, k, v, out, lse, piece, scale):
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), lse.transpose(0, 1).contiguous(),
            piece.cu_seqlens_q, piece.cu_seqlens_k, piece.max_seqlen_q, piece.max_seqlen_k,
            0.0, piece.causal, *no_dropout, scale=scale,
        )  # fmt: skip


def _packed_pieces(call: Call, device: torch.device) -> tuple[_PackedPiece, ...]:
    if ("packed", device) not in call.cache:
        call.cache["packed", device] = (_PackedPiece(call, device),)
    return call.cache["packed", device]


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (CpuFlashKernel(), TorchFlashKernel())}


def select_kernel(backend: str, device: torch.device) -> Kernel:
    """Find a kernel by name; "auto" takes the device's own and logs the choice once.

    Raises:
        ValueError: an unknown backend, or one that cannot run on this device.
    """
    name = {"cpu": "cpu", "cuda": "torch_flash"}.get(device.type) if backend == "auto" else backend
    if name not in KERNELS:
        raise ValueError(f"unknown attention backend {backend!r}: choose one of auto, reference, {', '.join(KERNELS)}")
    if (name == "cpu") != (device.type == "cpu"):
        raise ValueError(f"attention backend {name!r} cannot run on {device.type} tensors; use backend='auto'")
    if backend == "auto":
        _log_choice(name, device.type)
    return KERNELS[name]


@cache
def _log_choice(name: str, device_type: str) -> None:
    logger.info("prefix-grouped attention uses the %r kernel on %s", name, device_type)
