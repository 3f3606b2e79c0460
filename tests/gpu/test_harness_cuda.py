"""The multi-rank harness on NCCL: one GPU per rank."""

from __future__ import annotations

import pytest

from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.harness_scenarios import sum_ranks
from tests.harness import cuda_devices, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda_devices() < 2, reason="needs two CUDA GPUs")]


def test_results_come_back_in_rank_order():
    results = run_ranks(sum_ranks, 2, 10, sizes=ParallelSizes(tensor=2), cuda=True)
    assert [r["rank"] for r in results] == [0, 1]
    assert all(r["total"] == 21 and r["backend"] == "nccl" for r in results)
