"""Megatron's "cuda" addresses mean the CPU where there is no GPU, and nothing else changes."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist

from megatron_ext.runtime.cpu import adapt_megatron_to_cpu, cuda_means
from tests.harness import ROOT


def test_cuda_addresses_mean_the_cpu(world):
    device = torch.cuda.current_device()
    made = [
        torch.zeros(2, device="cuda"),
        torch.empty(2, device=device),
        torch.tensor([1.0], device="cuda:0"),
        torch.empty_like(torch.zeros(2), device=torch.device("cuda")),
        torch.zeros(2).cuda(),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).to(device="cuda", dtype=torch.float64),
    ]
    assert all(x.device.type == "cpu" for x in made)
    assert made[-1].dtype == torch.float64


def test_cuda_addresses_may_mean_a_device_without_memory(world):
    """And the CPU's own tensors are then told from them, as on a GPU."""
    on_host = torch.zeros(2)
    with cuda_means(torch.device("meta")):
        made = [
            torch.zeros(2, device="cuda"),
            torch.empty(2, device=torch.cuda.current_device()),
            on_host.cuda(),
            on_host.to("cuda"),
            on_host.to(device=torch.device("cuda", 0)),
        ]
        assert all(x.is_meta and x.type() == "torch.cuda.FloatTensor" for x in made)
        assert torch.empty(1, dtype=torch.bfloat16, device="cuda").type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(2).device.type == "cpu" and on_host.type() == "torch.FloatTensor"
    assert torch.zeros(2, device="cuda").device.type == "cpu" and on_host.type() == "torch.cuda.FloatTensor"


def test_other_calls_are_untouched(world):
    """CPU tensors, other devices and conversions keep their meaning; only `type()` answers with CUDA's name."""
    x = torch.zeros(2, dtype=torch.float32)
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.type(torch.int64).dtype == torch.int64
    assert x.to(torch.bfloat16).dtype == torch.bfloat16
    assert x.to(x.double()).dtype == torch.float64
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert not torch.cuda.is_available()


def test_a_group_of_one_leaves_no_threads_behind(world):
    """Of gloo's that would own OpenMP threads of its own; what Megatron's buffers sum and gather is there already."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    threads, group, numbers = torch.get_num_threads(), dist.new_group([0]), torch.randn(2**20)
    torch.set_num_threads(2)
    try:
        expected, before = numbers.exp(), set(os.listdir("/proc/self/task"))
        summed = numbers.exp()
        for collective in (buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func):
            collective(summed, summed.view(-1), group=group, async_op=False)
        assert torch.equal(summed, expected)
        assert set(os.listdir("/proc/self/task")) <= before  # one of another test's may end meanwhile
        elsewhere = torch.empty_like(numbers)
        buffers.dist_all_gather_func(elsewhere, numbers, group=group, async_op=False)
        assert torch.equal(elsewhere, numbers)
    finally:
        torch.set_num_threads(threads)


def test_device_contexts_keep_their_meaning():
    """In a new process: torch remembers its factories when it first enters such a context. transformers builds in one."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.programs.meta_tensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{'meta'}", done.stderr[-2000:]


def test_adapting_twice_changes_nothing(world):
    before = torch.zeros, torch.Tensor.to, torch.cuda.get_rng_state
    adapt_megatron_to_cpu()
    assert before == (torch.zeros, torch.Tensor.to, torch.cuda.get_rng_state)


def test_the_device_generator_is_apart_from_the_cpus(world):
    """Megatron saves and restores the device's state around its layers; the CPU's own numbers go on."""
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    second = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(8), torch.cat((first, second)))


def test_megatron_is_imported_without_what_only_a_gpu_uses():
    command = [sys.executable, "-m", "tests.programs.import_megatron"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
