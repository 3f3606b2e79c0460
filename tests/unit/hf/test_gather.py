"""Tensors of the host are cut into chunks where vLLM's receiver cuts them."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.gather import HostTensors, gather_hf
from megatron_ext.hf.mapping import hf_shapes
from megatron_ext.models import build_gpt
from tests.gpt_cases import small_config


@pytest.mark.parametrize(
    ("most", "chunks"),
    [(1000, [24]), (24, [24]), (23, [24]), (22, [23, 1]), (12, [16, 8]), (9, [12, 11, 1]), (0, [6, 6, 4, 7, 1])],
)
def test_a_chunk_ends_behind_the_tensor_that_makes_it_larger_than_it_may_be(most: int, chunks: list[int]):
    shapes = {"a": (2, 3), "b": (6,), "c": (4, 1), "d": (7,), "e": (1, 1)}
    held = HostTensors(shapes, torch.float16, 2 * most)
    assert [chunk.numel() for chunk in held.chunks] == chunks
    assert {name: tuple(tensor.shape) for name, tensor in held.tensors.items()} == shapes
    for number, tensor in enumerate(held.tensors.values()):
        tensor.fill_(number)
    assert torch.cat(held.chunks).tolist() == [0] * 6 + [1] * 6 + [2] * 4 + [3] * 7 + [4]
    assert {chunk.dtype for chunk in held.chunks} == {torch.float16}


def test_a_broken_model_is_given_to_nobody(world, rng):
    model = build_gpt(small_config(), world)
    held = HostTensors(hf_shapes(model.model_config), torch.float32, 1000)
    gather_hf(model, held, torch.float32)
    held.check_finite()
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("inf")
    gather_hf(model, held, torch.float32)
    with pytest.raises(
        UserError, match=r"model.layers.1.mlp.down_proj.weight holds a number that is not finite in torch.fl"
    ):
        held.check_finite()
