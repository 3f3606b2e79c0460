"""Decoding over pages on a GPU, by every kernel there is, against fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention import Scoring
from megatron_ext.attention.kernels import KERNELS
from tests.gpu.scenarios import paged
from tests.harness import cuda_devices, run_ranks
from tests.layouts import randn
from tests.paged_cases import PagedCase, seen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda_devices() == 0, reason="needs a CUDA GPU")]

SCORINGS = [Scoring(0.1), Scoring(0.1, window=40), Scoring(0.1, softcap=20.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("sunk", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("kernel", ["torch_flash", "flash_attn_2", "flash_attn_3", "blockwise"])
def test_a_row_sees_its_prompt_and_itself(kernel, sunk, scoring, dtype, rng):
    if lacking := KERNELS[kernel].missing():
        pytest.skip(f"needs {lacking}")
    if scoring.softcap and not KERNELS[kernel].softcap:
        pytest.skip(f"{kernel} cannot cap scores")
    case = PagedCase.draw(rng, 8, 2, 64, dtype)
    sinks = randn(rng, 8).to(dtype) if sunk else None
    (found,) = run_ranks(paged, 1, case, scoring, kernel, sinks, cuda=True)
    for row, query, path in zip(found, case.query, case.paths, strict=False):
        expected = seen(query.double(), path.double(), scoring, None if sinks is None else sinks.double())
        assert (row.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
