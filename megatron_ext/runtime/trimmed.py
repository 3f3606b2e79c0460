"""Pipelines that train nothing below some stage: no backward there, and no gradient sent down to it.

Megatron's 1F1B schedule stays as it is; only what it says to neighbouring stages changes. Stages below the boundary
run their forward passes one after the other and wait for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ext.errors import UserError
from megatron_ext.runtime.collectives import gather_objects

__all__ = ["TrimmedPipeline", "check_all_train", "first_trained_stage", "process_groups"]

GROUPS = ["tp", "pp", "embd", "pos_embd", "cp", "dp_cp"]


def first_trained_stage(model: torch.nn.Module, pp_group: dist.ProcessGroup) -> int:
    """The lowest pipeline stage with a parameter that trains, 0 if none does; every rank of the group calls it."""
    trains = gather_objects(any(p.requires_grad for p in model.parameters()), pp_group)
    return trains.index(True) if True in trains else 0


def check_all_train(pieces: Sequence[torch.nn.Module], pp_group: dist.ProcessGroup) -> None:
    """Megatron's interleaved schedule runs a backward pass through every piece; every rank of the group calls it.

    Raises:
        UserError: nothing trains in some.
    """
    trains = [any(p.requires_grad for p in piece.parameters()) for piece in pieces]
    if not all(all(found) for found in gather_objects(trains, pp_group)):
        raise UserError(
            f"model.virtual_pipeline_model_parallel_size={len(pieces)} needs weights that train in every piece of every stage; "
            "set it to null where one block trains alone"
        )


def process_groups() -> ProcessGroupCollection:
    """What the schedule would look up by itself, were it not handed a communicator."""
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=GROUPS)


class TrimmedPipeline(P2PCommunicator):
    """Communication between stages of which those below `first` run no backward.

    The stage `first` itself must not send a gradient down: its input is detached by the engine.
    """

    def __init__(self, pp_group: dist.ProcessGroup, config, first: int):
        super().__init__(pp_group, config)
        self.below, self.lowest = pp_group.rank() < first, pp_group.rank() <= first

    def recv_backward(self, tensor_shapes, is_last_stage):
        return [None] if self.below else super().recv_backward(tensor_shapes, is_last_stage)

    def send_backward(self, input_tensor_grads, is_first_stage):
        if not self.lowest:
            super().send_backward(input_tensor_grads, is_first_stage)

    def send_forward_recv_backward(self, output_tensors, tensor_shapes, is_last_stage):
        if not self.below:
            return super().send_forward_recv_backward(output_tensors, tensor_shapes, is_last_stage)
        self.send_forward(output_tensors, is_last_stage)
        return [None]

    def send_backward_recv_forward(self, input_tensor_grads, tensor_shapes, is_first_stage):
        if not self.lowest:
            return super().send_backward_recv_forward(input_tensor_grads, tensor_shapes, is_first_stage)
        return self.recv_forward(tensor_shapes, is_first_stage)
