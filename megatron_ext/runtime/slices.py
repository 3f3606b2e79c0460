"""Some rows or columns of a parameter that train while the others stay: a parameter of their own beside the whole one.

Gradient buffer, optimizer state and the all-reduce of gradients are the slice's, and nothing, weight decay included, can touch
the other numbers. The module computes with the whole parameter, into which the slice is written whenever the module is called;
its state dict has the whole one alone, and what is loaded into that is the slice's, too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_ext.runtime.weight_gather import await_weight

__all__ = ["SUFFIX", "ParameterSlice", "slice_of", "write_slices"]

SUFFIX = "_slice"  # of its name, behind the whole parameter's
OWNER = "slice_of"  # of a parameter: the `ParameterSlice` that it is of


class ParameterSlice:
    """Makes the slice, and a frozen parameter of the whole. Do it before the engine is made.

    Args:
        module: whose parameter it is; it must be called to use it.
        name: of the parameter in the module.
        dim: along which the numbers lie.
        index: int64, their places along it in this rank's shard; perhaps none: every tensor-parallel rank has the slice, so that
            all of them run the same backward pass.

    Attributes:
        whole: the frozen parameter.
        part: the one that trains, of the whole's shape but along `dim`.
    """

    def __init__(self, module: Module, name: str, dim: int, index: Tensor):
        self.whole: Parameter = module._parameters[name]
        self.dim, self.index, self._name, self._module = dim, index, name, module
        self.part = Parameter(self.whole.detach().index_select(dim, index))
        if getattr(self.whole, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(self.part, True, dim, 1)
        setattr(self.part, OWNER, self)
        self.whole.requires_grad_(False)
        module.register_parameter(name + SUFFIX, self.part)
        module.register_forward_pre_hook(self._join)
        module.register_forward_hook(self._part, always_call=True)
        module.register_state_dict_post_hook(functools.partial(self._leave_out))  # it must take an attribute
        module.register_load_state_dict_pre_hook(self._take)

    def write(self) -> None:
        """Put the slice's numbers into the whole, for what reads weights without calling their module."""
        self.whole.data.index_copy_(self.dim, self.index, self.part.data)

    def widened(self, value: Tensor) -> Tensor:
        """A value of the slice's shape in the whole's, zeros around it."""
        found = value.new_zeros(self.whole.shape)
        return found.index_copy_(self.dim, self.index.to(value.device), value)

    def narrowed(self, value: Tensor) -> Tensor:
        """The slice's numbers of a value of the whole's shape."""
        return value.index_select(self.dim, self.index.to(value.device))

    def _join(self, module: Module, args: Any) -> None:
        module._parameters[self._name] = _Joined.apply(await_weight(self.part), self)

    def _part(self, module: Module, args: Any, output: Any) -> None:
        module._parameters[self._name] = self.whole

    def _leave_out(self, module: Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        self.write()
        state.pop(f"{prefix}{self._name}{SUFFIX}", None)

    def _take(self, module: Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if (whole := state.get(f"{prefix}{self._name}")) is not None:
            state[f"{prefix}{self._name}{SUFFIX}"] = self.narrowed(whole)


class _Joined(torch.autograd.Function):
    """The whole parameter with the slice in it. Its memory is the parameter's own: between two steps the same numbers are written
    again, and passes that are on their way at once may keep it."""

    @staticmethod
    def forward(ctx, part: Tensor, owner: ParameterSlice) -> Tensor:
        ctx.owner = owner
        owner.write()
        return owner.whole.data

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.owner.narrowed(gradient), None


def slice_of(parameter: Tensor) -> ParameterSlice | None:
    """The slice that a parameter is; None: it is a whole one."""
    return getattr(parameter, OWNER, None)


def write_slices(model: Module) -> None:
    """All slices of a model into the parameters that they are of."""
    for parameter in model.parameters():
        if (found := slice_of(parameter)) is not None:
            found.write()
