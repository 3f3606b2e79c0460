"""Which layers a stage runs is what Megatron builds there; what cannot be divided is refused with the numbers."""

from __future__ import annotations

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_ext.blocks.blocks import train_only
from megatron_ext.blocks.places import ModelPlace
from megatron_ext.blocks.training import train_only_places
from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.models.megatron_config import megatron_config
from megatron_ext.models.stages import PipelineSplit
from megatron_ext.runtime.pieces import streams_per_turn
from megatron_ext.runtime.trimmed import check_all_train
from tests.gpt_cases import small_config

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
PIECES = "virtual_pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("layers", "stages", "changes"),
    [
        (12, 4, {}),
        (5, 2, {FIRST: 3}),
        (5, 2, {FIRST: 1, LAST: 4}),
        (7, 3, {LAST: 1}),
        (14, 5, {FIRST: 1, LAST: 4}),
        (16, 4, {PIECES: 2}),
        (16, 2, {PIECES: 8}),
        (16, 4, {FIRST: 2, LAST: 6, PIECES: 2}),
        (12, 1, {PIECES: 1}),
    ],
)
def test_stages_run_the_layers_that_megatron_builds_there(layers, stages, changes):
    config = small_config(num_layers=layers, pipeline_model_parallel_size=stages, **changes).on("cpu")
    megatron = megatron_config(config, "cpu")
    pieces = changes.get(PIECES, 1)
    seen = []
    for piece in range(pieces):
        for stage in range(stages):
            found = config.pipeline_split.stage(stage)[piece]
            number = piece if pieces > 1 else None
            start = get_transformer_layer_offset(megatron, number, stage)
            assert found == range(start, start + get_num_layers_to_build(megatron, number, stage))
            seen += found
    assert seen == list(range(layers))  # in the order in which a stream meets them
    assert sum(config.pipeline_split.counts()) == layers


@pytest.mark.parametrize(
    ("layers", "stages", "changes", "words"),
    [
        (
            5,
            2,
            {},
            "num_layers=5 is not divisible by model.pipeline_model_parallel_size=2; give the first or the last stage",
        ),
        (4, 1, {FIRST: 4}, f"{FIRST}=4 needs more stages than model.pipeline_model_parallel_size=1"),
        (4, 1, {LAST: 4}, f"{LAST}=4 needs more stages than model.pipeline_model_parallel_size=1"),
        (4, 1, {PIECES: 2}, f"{PIECES}=2 needs more stages than model.pipeline_model_parallel_size=1"),
        (7, 3, {FIRST: 2}, f"{FIRST}=2 of model.num_layers=7 leave 5 layers for the other 2 of"),
        (
            5,
            2,
            {FIRST: 2, LAST: 2},
            f"{FIRST}=2 and .*{LAST}=2 of model.num_layers=5 leave 1 layers for the other 0 of",
        ),
        (4, 3, {FIRST: 4}, "leave 0 layers for the other 2 of"),
        (4, 3, {FIRST: 9}, "leave -5 layers for the other 2 of"),
        (8, 4, {FIRST: 0}, f"{FIRST}=0 must be at least 1"),
        (8, 4, {PIECES: 0}, f"{PIECES}=0 must be at least 1"),
        (12, 4, {PIECES: 2}, f"{PIECES}=2 does not divide the 3 layers of pipeline stage 0 of 4"),
        (9, 2, {FIRST: 4, PIECES: 2}, f"{PIECES}=2 does not divide the 5 layers of pipeline stage 1 of 2"),
    ],
)
def test_layers_that_cannot_be_divided(layers, stages, changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(num_layers=layers, pipeline_model_parallel_size=stages, **changes)


def test_one_piece_is_no_interleaving():
    split = small_config(num_layers=6, pipeline_model_parallel_size=3, **{PIECES: 1}).pipeline_split
    assert split == PipelineSplit(6, 3) and [split.stage(s) for s in range(3)] == [
        [range(2)],
        [range(2, 4)],
        [range(4, 6)],
    ]


@pytest.mark.parametrize("stages", [2, 3, 4, 7])
def test_turns_are_as_short_as_megatrons_schedule_takes(stages):
    for streams in range(stages, 40):
        size = streams_per_turn(streams, stages)
        fits = [n for n in range(stages, streams + 1) if streams % n == 0 or streams % n >= stages]
        assert size == fits[0]


def test_every_piece_must_train(world):
    """One process is the whole group, so nothing but its own pieces counts."""
    pieces = [build_gpt(small_config(), world) for _ in range(2)]
    group = parallel_state.get_pipeline_model_parallel_group()
    train_only_places(pieces[0], [ModelPlace(1)])
    check_all_train(pieces, group)
    train_only(pieces[1], [])
    with pytest.raises(UserError, match=f"{PIECES}=2 needs weights that train in every piece"):
        check_all_train(pieces, group)
