"""What every rank does in the tests of what ranks tell each other."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.errors import AlreadyExistsError, DivergedError, UserError
from megatron_ext.hf import export_hf
from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import save_checkpoint
from megatron_ext.runtime.collectives import (
    broadcast_object,
    from_last,
    gather_objects,
    gather_rows,
    met_by_all,
    sum_of_all,
    together,
)
from tests.gpt_cases import small_config

__all__ = ["FAILURES", "fail", "refused_on_one_rank", "tell", "wait_longer_than_collectives"]

# By case: the rank that fails, and how.
FAILURES: dict[str, dict[int, Exception]] = {
    "none": {},
    "bad input": {1: AlreadyExistsError("it is there"), 2: DivergedError("later")},
    "first": {0: UserError("no room")},
    "system": {1: OSError(28, "No space left on device", "/full")},
    "bug": {2: KeyError("x")},
}


def _raised(work: Callable[[], object]) -> tuple[str, str] | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001  it is the result
        return type(error).__name__, str(error)
    return None


def fail(device: torch.device) -> dict[str, tuple[str, str] | None]:
    """What this rank raises, by case; all are run one after the other, so a rank that did not wait would be seen."""

    def work(failures: dict[int, Exception]) -> None:
        with together():
            if dist.get_rank() in failures:
                raise failures[dist.get_rank()]

    return {name: _raised(lambda failures=failures: work(failures)) for name, failures in FAILURES.items()}


def wait_longer_than_collectives(device: torch.device) -> list:
    """Twice with a rank that is late by more than a group's collectives wait; then in a collective alone."""
    rank, patience = dist.get_rank(), 4.0  # a rank on a loaded machine may come a second late by itself
    group = dist.new_group(timeout=datetime.timedelta(seconds=patience))
    found = []
    for number, meets in enumerate((True, True, False)):
        late = rank == number % 2

        def work(number=number, late=late, meets=meets):
            with together(group), met_by_all() if meets else contextlib.nullcontext():
                if late:
                    time.sleep(1.5 * patience)
                if number == 1:
                    raise UserError("late, and nothing to show")

        found.append(_raised(work))
    return found


def tell(device: torch.device) -> dict:
    rank, group = dist.get_rank(), parallel_state.get_pipeline_model_parallel_group()
    last = torch.arange(6.0, device=device).view(3, 2).t() + 10 * rank if group.rank() == group.size() - 1 else None
    return {
        "gathered": gather_objects({"rank": rank}),
        "stages": gather_objects(rank, group),
        "first": broadcast_object(f"from {rank}"),
        "last": broadcast_object(rank, -1, group),
        "rows": gather_rows(torch.full((2, 3), float(rank), dtype=torch.float64), group),
        "sum": sum_of_all(torch.tensor(rank), group),
        "tensor": from_last(last, (2, 3), device, group).cpu(),
    }


def refused_on_one_rank(device: torch.device, folder: Path) -> list[tuple[str, str] | None]:
    """An export that rank 0 alone refuses, and a checkpoint that all do."""
    model = build_gpt(small_config(), device)
    return [
        _raised(lambda: export_hf(model, folder)),
        _raised(lambda: save_checkpoint(folder, model, {})),
    ]
