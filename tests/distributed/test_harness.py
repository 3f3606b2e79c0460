"""The harness itself: results in rank order, a rank's traceback reaches the test, a hang ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_ext.runtime.distributed import ParallelSizes
from tests.harness import RankError, run_ranks

pytestmark = pytest.mark.distributed


def sum_ranks(device: torch.device, offset: int) -> dict:
    from megatron.core import parallel_state

    total = torch.tensor([dist.get_rank() + offset], device=device)
    dist.all_reduce(total)
    return {
        "rank": dist.get_rank(),
        "total": total.item(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
    }


def fail_or_wait(device: torch.device) -> None:
    if dist.get_rank() == 1:
        raise LookupError("the shelf is empty")
    dist.barrier()


def start_a_child(device: torch.device, folder: Path, end: str) -> None:
    """As Megatron does to save a checkpoint; the child's id is left in a file."""
    manager = multiprocessing.get_context("spawn").Manager()
    (folder / "pid").write_text(str(manager._process.pid))
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sleep_forever(device: torch.device) -> None:
    time.sleep(1000)


def test_results_come_back_in_rank_order():
    results = run_ranks(sum_ranks, 2, 10, sizes=ParallelSizes(tensor=2))
    assert [r["rank"] for r in results] == [0, 1]
    for result in results:
        assert result["total"] == 21
        assert (result["tensor"], result["data"]) == (2, 1)
        assert (result["backend"], result["threads"]) == ("gloo", 1)


def test_a_failing_rank_shows_its_traceback_and_ends_the_others():
    with pytest.raises(RankError) as caught:
        run_ranks(fail_or_wait, 2, timeout=120)
    text = str(caught.value)
    assert "LookupError: the shelf is empty" in text
    assert "in fail_or_wait" in text
    assert "rank 1 of 2: exit status 1" in text


@pytest.mark.parametrize("end", ["return", "kill"])
def test_no_process_is_left_behind(end, tmp_path: Path):
    """Whatever a rank started ends with it, however the rank ends."""
    with contextlib.nullcontext() if end == "return" else pytest.raises(RankError):
        run_ranks(start_a_child, 1, tmp_path, end)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_hang_ends():
    with pytest.raises(RankError, match="did not finish within 3"):
        run_ranks(sleep_forever, 1, timeout=3)
