"""One rank's failure is everybody's, and one rank's value is known to all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.collective_scenarios import (
    FAILURES,
    fail,
    refused_on_one_rank,
    tell,
    wait_longer_than_collectives,
)
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed


def test_what_fails_on_one_rank_fails_on_all_and_none_waits():
    results = run_ranks(fail, 3)
    raised = {name: [result[name] for result in results] for name in FAILURES}
    assert raised["none"] == [None] * 3
    # Its own where a rank has one, else that of the first that has, of the same class.
    assert raised["bad input"] == [("AlreadyExistsError", "it is there")] * 2 + [("DivergedError", "later")]
    assert raised["first"] == [("UserError", "no room")] * 3
    full = ("UserError", "/full: No space left on device")
    assert raised["system"] == [full, ("OSError", "[Errno 28] No space left on device: '/full'"), full]
    told = ("RuntimeError", "rank 2 failed: KeyError: 'x'")
    assert raised["bug"] == [told, told, ("KeyError", "'x'")]


def test_a_meeting_outlasts_what_collectives_wait(monkeypatch):
    """Whoever is late and whatever it raises; without one those who are there give up."""
    results = run_ranks(wait_longer_than_collectives, 2)
    for first, second, alone in results:
        assert first is None and second == ("UserError", "late, and nothing to show")
        assert alone is not None and alone[0] == "RuntimeError"


def test_values_of_all_and_of_the_last_stage():
    results = run_ranks(tell, 4, sizes=ParallelSizes(tensor=2, pipeline=2))
    for rank, result in enumerate(results):
        assert result["gathered"] == [{"rank": n} for n in range(4)]
        assert result["stages"] == [rank % 2, rank % 2 + 2] and result["last"] == rank % 2 + 2
        assert result["first"] == "from 0"
        rows = torch.tensor([rank % 2, rank % 2, rank % 2 + 2, rank % 2 + 2], dtype=torch.float64)
        assert torch.equal(result["rows"], rows.unsqueeze(1).expand(4, 3)) and result["sum"] == 2 * (rank % 2) + 2
        assert torch.equal(result["tensor"], torch.arange(6.0).view(3, 2).t() + 10 * (rank % 2 + 2))


def test_a_place_that_is_taken_is_refused_by_every_rank(tmp_path: Path):
    results = run_ranks(refused_on_one_rank, 2, tmp_path)
    for export, checkpoint in results:
        assert export == (
            "AlreadyExistsError",
            f"{tmp_path} exists already; nothing is ever overwritten, choose another name",
        )
        assert checkpoint[0] == "AlreadyExistsError" and "a checkpoint is never overwritten" in checkpoint[1]
    assert not list(tmp_path.iterdir()) and not tmp_path.with_name(tmp_path.name + ".unfinished").exists()
