"""The adapter of one linear, cut over tensor-parallel ranks as the linear is.

Shape legend: s rows on this rank, b = 1, i inputs, o outputs, r rank of an adapter, R rows of all A of a linear, tp
tensor-parallel size.

What travels between ranks has r columns, not i or o. Of a column-parallel linear every rank has all of A and its rows of B; of a
row-parallel one its columns of A and all of B. With sequence parallelism the whole matrix reads or writes this rank's rows alone,
and the ranks' gradients of it are summed, as Megatron does for norms (`sequence_parallel` on the parameter).

Of an expert's linear nothing travels: its ranks are given the same rows, and what each computes of them, outputs and the inputs'
gradients, is summed where tokens travel to experts and back. Only the gradient of the whole matrix is summed here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Parameter

__all__ = ["Lora", "LoraShape"]


@dataclass(frozen=True)
class LoraShape:
    """The adapter of one kind of linear, in the whole model.

    Attributes:
        branches: the name of each A, and the parts whose B reads it.
        rows: outputs of every part of the linear, in their order; also of those without an adapter.
        groups: the parts' rows stand in so many equal groups, one behind the other in each: key/value heads; None: as many as
            tensor-parallel ranks.
        dim: r.
        scale: what is added is taken times this.
        uncalled: the linear is never called, and whoever uses its weight uses `Lora.factors` beside it.
    """

    branches: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, int]
    groups: int | None
    dim: int
    scale: float
    uncalled: bool = False


class _Summed(torch.autograd.Function):
    """A matrix that ranks have alike, and its gradient summed over them. Of one that lies in memory by columns, as that of B, the
    sum is lost by the function of Megatron 0.16 that does this."""

    @staticmethod
    def forward(ctx, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Lora(torch.nn.Module):
    """
    Args:
        column: whether the linear is column-parallel; else it is row-parallel.
        inputs: of the whole linear.
        tp: the tensor-parallel group.
        sequence_parallel: whether rows outside of the linear are cut over it.
        expert: whether it is an expert's.
        like: the linear's weight, whose type and device it has, and over whose ranks gradients are summed.

    Its parameters are `a_<branch>`, [r, i] ([r, i / tp] of a row-parallel linear), and `b_<part>`, [rows of the part (/ tp), r]:
    rows of Hugging Face's linear in their order. They are its own, and not those of modules within it, which nobody calls:
    Megatron waits for weights on their way where their module is called.
    """

    def __init__(
        self, shape: LoraShape, column: bool, inputs: int, tp, sequence_parallel: bool, expert: bool, like: Tensor
    ):
        super().__init__()
        self.shape, self.column, self.inputs, self.tp = shape, column, inputs, tp
        self.sequence_parallel, self.expert = sequence_parallel and not expert, expert
        size = tp.size()
        width, cut = (inputs, size) if column else (inputs // size, 1)
        for branch in shape.branches:
            self._register(f"a_{branch}", (shape.dim, width), like, None if column else 1)
        for parts in shape.branches.values():
            for part in parts:
                self._register(f"b_{part}", (shape.rows[part] // cut, shape.dim), like, 0 if column else None)
        # Of fewer groups than ranks a rank's rows begin and end anywhere in a group, and those of B lie on several ranks.
        self.spread = column and shape.groups is not None and shape.groups < size

    @property
    def a(self) -> dict[str, Parameter]:
        """By branch."""
        return {branch: getattr(self, f"a_{branch}") for branch in self.shape.branches}

    @property
    def b(self) -> dict[str, Parameter]:
        """By part."""
        return {part: getattr(self, f"b_{part}") for parts in self.shape.branches.values() for part in parts}

    def _register(self, name: str, shape: tuple[int, int], like: Tensor, axis: int | None) -> None:
        """Zeros; `axis` is cut over the ranks."""
        made = Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        # An expert's ranks are not those of the tensor-parallel group, whose first alone would count in the gradients' norm what
        # is not cut.
        cut = axis is not None or self.expert
        set_tensor_model_parallel_attributes(made, cut, 0 if axis is None else axis, 1)
        if axis is None:
            made.sequence_parallel = self.sequence_parallel and not self.shape.uncalled
            made.shared = self.expert and self.tp.rank() > 0  # counted by another rank
        made.allreduce = getattr(like, "allreduce", True)
        self.register_parameter(name, made)

    @property
    def axes(self) -> dict[str, int]:
        """Of the parameters that are cut over ranks, along which dimension."""
        kind, axis, names = ("b", 0, self.b) if self.column else ("a", 1, self.a)
        return {f"{kind}_{name}": axis for name in names}

    @torch.no_grad()
    def start(self, init: str, seed: str) -> None:
        """Draw A and set B to 0, alike on every layout of ranks.

        Args:
            init: one of `config.INITS`.
            seed: of this linear in this run.
        """
        for branch, a in self.a.items():
            if a.is_meta:
                continue
            number = int.from_bytes(hashlib.sha256(f"{seed} {branch}".encode()).digest()[:7], "big")
            generator, r = torch.Generator().manual_seed(number), self.shape.dim
            whole = torch.empty(r, self.inputs)
            if init == "kaiming":  # kaiming_uniform_ with a = sqrt(5)
                whole.uniform_(-1 / math.sqrt(self.inputs), 1 / math.sqrt(self.inputs), generator=generator)
            else:
                deviation = 1 / r if init == "gaussian" else math.sqrt(2 / (self.inputs + r))
                whole.normal_(0, deviation, generator=generator)
            width = a.size(1)
            first = 0 if self.column else self.tp.rank() * width
            a.copy_(whole[:, first : first + width])
        for b in self.b.values():
            b.zero_()

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The linear's output with what the adapter adds.

        Args:
            x: the linear's input, [s, b, i] ([s, b, i / tp] of a row-parallel one); of an expert [s, i], s perhaps 0.
            output: the linear's, [s, b, o / tp] ([s, b, o]); s may be another, see `sequence_parallel`.
        """
        a, b = self._a(), self._b()
        if self.expert and self.tp.size() > 1:
            a, b = (_Summed.apply(a, self.tp), b) if self.column else (a, _Summed.apply(b, self.tp))
        low = F.linear(x, a) * self.shape.scale  # [s, b, R]
        if not self.expert:
            low = self._exchanged(low)
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), b.t()).view(output.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, i] times the scale, and B [o / tp, R], of a column-parallel linear: for rows that all ranks have whole, whose
        gradients are summed where they come from. That of A is summed here."""
        a = self._a()
        if self.tp.size() > 1:
            a = _Summed.apply(a, self.tp)
        return a * self.shape.scale, self._b()

    def _exchanged(self, low: Tensor) -> Tensor:
        """[s, b, R] for the rows that B writes, of what this rank's A has given for those that it reads."""
        if not self.column and self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.tp)
        if not self.column:
            return reduce_from_tensor_model_parallel_region(low, group=self.tp)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp)
        return copy_to_tensor_model_parallel_region(low, group=self.tp)

    @torch.no_grad()
    def delta(self, b: Tensor | None = None) -> Tensor:
        """fp32 [o / tp, i] ([o, i / tp]): what is added to the linear's weight where the adapter is merged into it.

        Args:
            b: `gathered_b`, where it was asked for before; None: as it is now.
        """
        return (self._b() if b is None else b).float() @ self._a().float() * self.shape.scale

    @torch.no_grad()
    def gathered_b(self) -> Tensor | None:
        """This rank's rows of B, [o / tp, R], where they lie on several ranks, all of which call it; None: it has its own."""
        return self._b() if self.spread else None

    def _a(self) -> Tensor:
        """[R, i (/ tp)]."""
        found = list(self.a.values())
        return found[0] if len(found) == 1 else torch.cat(found)

    def _b(self) -> Tensor:
        """[o (/ tp), R] in the order of the linear's outputs on this rank; zeros where a part does not read an A."""
        shape, r = self.shape, self.shape.dim
        if not self.column:
            return next(iter(self.b.values()))
        groups = shape.groups or self.tp.size()
        here = groups if self.spread else groups // self.tp.size()
        parts = []
        for part, rows in shape.rows.items():
            number = next((i for i, parts_of in enumerate(shape.branches.values()) if part in parts_of), None)
            if number is None:
                blank = next(iter(self.b.values()))
                wide = blank.new_zeros(rows // groups * here, len(shape.branches) * r)
            else:
                b = self.b[part]
                if self.spread:
                    b = gather_from_sequence_parallel_region(b, tensor_parallel_output_grad=True, group=self.tp)
                wide = F.pad(b, (number * r, (len(shape.branches) - 1 - number) * r))
            parts.append(wide.view(here, rows // groups, -1))
        whole = torch.cat(parts, 1).flatten(0, 1)
        return whole.chunk(self.tp.size())[self.tp.rank()] if self.spread else whole
