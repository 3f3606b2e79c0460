"""The planner's activations of streams that wait for their backward pass are what real stages keep of them, to the byte."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_ext.planner.activations import EAGER, StreamShape, stage_activations
from megatron_ext.planner.in_flight import in_flight, waiting_passes
from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.in_flight_scenarios import WaitingCase, waiting
from tests.distributed.planner_scenarios import ActivationCase, Layout, planned_job
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

STAGES = 2
PIECES = {"virtual_pipeline_model_parallel_size": 2}
FULL = {"activations_checkpoint_granularity": "full"}
FORMS = {
    "plain": {},
    "uneven": {"num_layers_in_first_pipeline_stage": 1},
    "recomputed": FULL,
    "pieces": PIECES,
    "pieces, untied": PIECES | {"share_embeddings_and_output_weights": False, "precision": "bf16"},
    "pieces, recomputed": PIECES | FULL,
    "pieces, inputs on the host": PIECES | FULL | {"activation_offload": True},
    "inputs on the host": FULL | {"activation_offload": True},
}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[WaitingCase, list[dict[str, int]]]]:
    """Of each form its case, and what each stage has kept."""
    draw, cases = random.Random(), {}
    for name, fields in FORMS.items():
        group = (draw.randint(0, 20), [draw.randint(1, 12)] * 3)
        sizes = {
            "num_layers": 4,
            "hidden_size": draw.randrange(16, 48, 8),
            "ffn_hidden_size": draw.randrange(16, 60, 4),
        }
        # Of fewer streams than stages the interleaved schedule runs one again, whose tokens are then there once.
        fewest = STAGES if PIECES.items() <= fields.items() else 1
        cases[name] = WaitingCase(sizes | fields, [group], draw.randint(fewest, 6))
    print(cases)
    ranks = run_ranks(waiting, STAGES, list(cases.values()), sizes=ParallelSizes(pipeline=STAGES))
    return {name: (case, [rank[i] for rank in ranks]) for i, (name, case) in enumerate(cases.items())}


@pytest.mark.parametrize("name", FORMS)
def test_what_waits_is_planned_to_the_byte(name, found):
    case, stages = found[name]
    for stage, real in enumerate(stages):
        assert real["stage"] == stage
        layout = Layout(STAGES, ParallelSizes(pipeline=STAGES))
        one = planned_job(ActivationCase(case.fields, case.lengths), layout)
        job = replace(one, groups=case.streams)
        stream = StreamShape(real["tokens"], real["predicted"])
        planned = stage_activations(job.model, stage, stream, EAGER)
        if job.model.activations_checkpoint_granularity:
            planned = replace(planned, shared=0)  # held by what computes again, not by autograd
        assert in_flight(job, stage, planned) == (real["here"], real["there"]), (case, stage)
        assert (real["there"] > 0) == case.fields.get("activation_offload", False)


@pytest.mark.parametrize(("stages", "pieces", "streams"), [(2, 2, 2), (2, 2, 7), (4, 2, 8), (4, 3, 9), (8, 4, 64)])
def test_a_stage_runs_as_far_ahead_as_megatron_says(stages, pieces, streams):
    """Earlier stages further; never more than there are; and at its fullest each is for as long as streams come."""
    fullest = [max(map(sum, waiting_passes(stages, stage, pieces, streams))) for stage in range(stages)]
    assert fullest == sorted(fullest, reverse=True) and fullest[0] <= pieces * streams
    for stage in range(stages):
        for first, between, last in waiting_passes(stages, stage, pieces, streams):
            assert max(first, last) <= streams and between <= (pieces - 2) * streams
    assert waiting_passes(stages, 0, pieces, 1) == waiting_passes(stages, 0, pieces, stages)
