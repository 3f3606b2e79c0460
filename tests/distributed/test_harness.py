"""The harness itself: results in rank order, a rank's traceback reaches the test, a hang ends."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.harness_scenarios import fail_or_wait, sleep_forever, start_a_child, sum_ranks
from tests.harness import RankError, run_ranks
from tests.waiting import until

pytestmark = pytest.mark.distributed


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_results_come_back_in_rank_order():
    results = run_ranks(sum_ranks, 2, 10, sizes=ParallelSizes(tensor=2))
    assert [r["rank"] for r in results] == [0, 1]
    for result in results:
        assert result["total"] == 21
        assert (result["tensor"], result["data"]) == (2, 1)
        assert (result["backend"], result["threads"]) == ("gloo", 1)


def test_a_failing_rank_shows_its_traceback_and_ends_the_others():
    with pytest.raises(RankError) as caught:
        run_ranks(fail_or_wait, 2, timeout=600)
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
    until(lambda: not is_running(pid))


def test_a_hang_ends():
    with pytest.raises(RankError, match="did not finish within 3"):
        run_ranks(sleep_forever, 1, timeout=3)
