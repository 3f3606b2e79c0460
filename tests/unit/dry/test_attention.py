"""Every kernel that is for CUDA, in every form of plan, forward and backward, as on a GPU and without one."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_ext.attention import Scoring, prefix_grouped_attention
from megatron_ext.attention.forms import ATTENTION_PLANS
from megatron_ext.attention.kernels import KERNELS, select_kernel
from megatron_ext.errors import UserError
from megatron_ext.grouping import PrefixGroups
from tests.dry.machine import pretended_gpu
from tests.dry.run import DryRun

FORESTS = {
    "groups": [(301, [37, 150, 37]), (65, [29, 3]), (7, [])],
    "equal": [(33, [8, 8, 8])],
    "tree": [(9, [(5, [4, (3, [2, 6])]), 7, (2, [3, 3])])],
    "no prefix": [(0, [5, 3])],
}
SCORINGS = {"plain": Scoring(0.25), "window": Scoring(0.25, window=20), "softcap": Scoring(0.25, softcap=30.0)}
# What has to run for each, on the device. A new kernel is a new row.
LAUNCHES = {
    "blockwise": ("aten::logsumexp", "aten::bmm"),
    "torch_flash": ("aten::_flash_attention_forward", "aten::_flash_attention_backward"),
    "flash_attn_2": ("dry::fa2_forward", "dry::fa2_backward"),
    "flash_attn_3": ("dry::fa3_forward", "dry::fa3_backward"),
}


@pytest.fixture
def gpu():
    with pretended_gpu() as device:
        yield device


def able(kernel: str, scoring: Scoring, form: str) -> bool:
    return (scoring.softcap is None or KERNELS[kernel].softcap) and (scoring.window is None or form != "levels")


CASES = [
    pytest.param(k, f, s, id=f"{k}, {f}, {s}")
    for k, f, s in itertools.product(LAUNCHES, ATTENTION_PLANS, SCORINGS)
    if able(k, SCORINGS[s], f)
]


def test_every_kernel_of_cuda_has_a_dry_run():
    assert set(LAUNCHES) == {name for name, kernel in KERNELS.items() if kernel.device in ("cuda", None)}


@pytest.mark.parametrize(("kernel", "form", "scoring"), CASES)
def test_a_layer_runs_without_the_host(kernel, form, scoring, gpu):
    for number, forest in enumerate(FORESTS.values()):
        dtype = (torch.bfloat16, torch.float16)[number % 2]
        groups = PrefixGroups.from_lengths(forest, 16, gpu)
        leaves = [torch.empty(groups.num_tokens, n, 16, dtype=dtype, device=gpu).requires_grad_() for n in (4, 2, 2)]
        leaves[1:] = torch.empty(groups.num_tokens, 2, 32, dtype=dtype, device=gpu).requires_grad_().chunk(2, -1)
        if number % 2:
            leaves.append(torch.empty(4, dtype=dtype, device=gpu).requires_grad_())
        with DryRun() as run:
            sinks = leaves[3] if number % 2 else None
            out = prefix_grouped_attention(*leaves[:3], groups, SCORINGS[scoring], kernel, form, sinks)
            gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
        assert not run.reads and all(run.operations[name] for name in LAUNCHES[kernel])
        assert [(g.shape, g.dtype, g.device) for g in (out, *gradients)] == [
            (x.shape, x.dtype, x.device) for x in (leaves[0], *leaves)
        ]


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_values_of_deepseeks_heads(kernel, gpu):
    groups = PrefixGroups.from_lengths(FORESTS["groups"], 16, gpu)
    t, dtype = groups.num_tokens, torch.bfloat16
    leaves = [torch.empty(t, 2, d, dtype=dtype, device=gpu).requires_grad_() for d in (192, 192, 128)]
    with DryRun() as run:
        out = prefix_grouped_attention(*leaves, groups, SCORINGS["plain"], kernel)
        gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert not run.reads and all(run.operations[name] for name in LAUNCHES[kernel])
    padded = run.operations["aten::constant_pad_nd"] > 0
    assert padded != KERNELS[kernel].takes_values(192, 128)
    assert [g.shape for g in (out, *gradients)] == [leaves[2].shape, *(x.shape for x in leaves)]


def test_kernels_are_chosen_as_on_a_gpu(gpu):
    assert select_kernel("auto", gpu, SCORINGS["plain"]).name == "flash_attn_3"
    assert all(not KERNELS[name].missing() for name in LAUNCHES)
    with pytest.raises(UserError, match=r"attention_kernel='cpu' cannot run on cuda tensors"):
        select_kernel("cpu", gpu, SCORINGS["plain"])


def test_without_the_libraries_pytorchs_own_is_chosen(gpu, monkeypatch):
    monkeypatch.setattr("megatron_ext.attention.kernels._installed", lambda module: False)
    assert select_kernel("auto", gpu, SCORINGS["plain"]).name == "torch_flash"
    assert select_kernel("auto", gpu, SCORINGS["softcap"]).name == "blockwise"


def test_afterwards_there_is_no_gpu():
    with pretended_gpu():
        assert torch.cuda.is_available() and torch.zeros(1, device="cuda").is_meta
    assert not torch.cuda.is_available() and KERNELS["torch_flash"].missing() == "a CUDA GPU"
    assert torch.zeros(1, device="cuda").device.type == "cpu"
