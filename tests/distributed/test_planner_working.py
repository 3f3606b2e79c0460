"""What the planner counts for backward of attention is an upper bound of what it holds, with and without context ranks."""

from __future__ import annotations

import random

import pytest

from megatron_ext.planner.memory import stage_memory
from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.planner_scenarios import ActivationCase, Layout, planned_job, pretended
from tests.distributed.working_scenarios import attention_peaks
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "one": Layout(1, ParallelSizes()),
    "cp2": Layout(2, ParallelSizes(context=2)),
    "cp4": Layout(4, ParallelSizes(context=4)),
}
# Attention is nearly all there is: the residual stream and the MLP are narrow.
NARROW = {"hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 8, "kv_channels": 64, "num_layers": 2}


def cases() -> list[ActivationCase]:
    """Drawn: long prompts, of which much is gathered, and long responses, of which little is."""
    draw, found = random.Random(), []
    for comm_type in ("all_gather", "a2a"):
        for precision in ("32", "bf16"):
            for prompt, response in ((500, 10), (100, 50), (20, 150)):
                for share in (True, False):
                    more = {"precision": precision, "cp_comm_type": comm_type, "num_query_groups": draw.choice([4, 8])}
                    group = (prompt + draw.randint(0, 50), [response + draw.randint(0, 30)] * draw.randint(1, 5))
                    found.append(ActivationCase(NARROW | more, [group] * draw.randint(1, 2), share))
    print(found)
    return found


@pytest.fixture(scope="module")
def measured() -> tuple[list[ActivationCase], dict[str, list[list[int]]]]:
    drawn = cases()
    ((answers,),) = run_ranks(pretended, 1, [(attention_peaks, list(LAYOUTS.values()), drawn)])
    return drawn, dict(zip(LAYOUTS, answers, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_backward_of_attention_holds_no_more_than_planned(name, measured):
    """And at least a third of it: a GPU runs a call's sequences at once, the CPU one after the other."""
    drawn, peaks = measured
    for number, case in enumerate(drawn):
        working = stage_memory(planned_job(case, LAYOUTS[name]), 0).working
        peak = max(rank[number] for rank in peaks[name])
        assert working / 4 < peak <= working, (case, peak / working)
