"""Attention sinks: a logit of its own for each head joins the softmax of every row, and stands for no value (gpt-oss,
arXiv 2508.10925; Megatron's `softmax_type`; with a logit of 0 the "softmax off by one").

Whatever the parts of a row's softmax, the sink is one more term of its log-sum-exp, and joins once, after they are merged:
with l' = ln(exp(l) + exp(sink)) the output is exp(l - l') o. A flash backward that is handed o' and l' gives the exact share of
every score (`function`): the sink's own derivative by its value is 0, so that of its logit is -sum_i p_i D_i over the rows, with
p_i = exp(sink - l'_i) and D_i = sum_d dO_id O_id.

Shape legend: t rows, n heads, d head dimension.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from megatron_ext.devices import device_type

__all__ = ["add_sinks", "sinks_gradient"]


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> None:
    """Let the sinks join, in place. No autograd.

    Args:
        out: [t, n, d], merged.
        lse: fp32 or fp64 [t, n].
        sinks: [n]; None: there are none.
    """
    if sinks is None:
        return
    if device_type(out.device) == "cuda" and importlib.util.find_spec("triton") is not None:
        from megatron_ext.attention.merge_triton import sink_rows

        sink_rows(out, lse, sinks)
        return
    merged = torch.logaddexp(lse, sinks.to(lse.dtype))
    out.copy_(out * (lse - merged).exp_().unsqueeze(-1))
    lse.copy_(merged)


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """[n] in the sinks' dtype.

    Args:
        grad: [t, n, d], of `out`.
        out, lse: with the sinks in them.
    """
    if sinks is None:
        return None
    delta = (grad.to(lse.dtype) * out).sum(-1)  # D, [t, n]
    return -((sinks.to(lse.dtype) - lse).exp_() * delta).sum(0).to(sinks.dtype)
