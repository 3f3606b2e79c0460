"""What ranks do in the tests of the harness itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["fail_or_wait", "sleep_forever", "start_a_child", "sum_ranks"]


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


def sleep_forever(device: torch.device) -> None:
    time.sleep(1000)
