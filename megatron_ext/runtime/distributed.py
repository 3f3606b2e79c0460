"""Process groups, devices and seeds: NCCL on GPUs, gloo on CPUs, chosen by what is there."""

from __future__ import annotations

import datetime
import logging
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.runtime.cpu import adapt_megatron_to_cpu
from megatron_ext.runtime.megatron_versions import quieten

__all__ = [
    "STAGE_SEEDS",
    "ParallelSizes",
    "initialize",
    "local_device",
    "set_seed",
    "shutdown",
    "world_size",
]

logger = logging.getLogger(__name__)

STAGE_SEEDS = 100  # between the seeds of neighbouring pipeline stages


@dataclass(frozen=True)
class ParallelSizes:
    """How the world of ranks is divided: world = tensor x pipeline x context x data, and for experts = expert_tensor x expert x
    pipeline x the ranks that hold the same ones."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None  # None: as tensor

    @property
    def named(self) -> dict[str, int | None]:
        """By Megatron's names, which are those of `model.*`."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor,
        }

    def data(self, world: int) -> int:
        """Data-parallel size.

        Raises:
            UserError: the world is no multiple of tensor x pipeline x context.
        """
        if min(self.tensor, self.pipeline, self.context) < 1:
            raise UserError(
                f"model.tensor_model_parallel_size={self.tensor}, model.pipeline_model_parallel_size={self.pipeline} and "
                f"model.context_parallel_size={self.context} must be at least 1"
            )
        model = self.tensor * self.pipeline * self.context
        if world % model:
            raise UserError(
                f"{world} processes cannot be divided by tensor_model_parallel_size={self.tensor} x "
                f"pipeline_model_parallel_size={self.pipeline} x context_parallel_size={self.context}; set "
                f"trainer.devices x trainer.num_nodes to a multiple of {model}"
            )
        experts = (self.expert_tensor or self.tensor) * self.expert * self.pipeline
        if world % experts:
            raise UserError(
                f"{world} processes cannot be divided by expert_tensor_parallel_size={self.expert_tensor or self.tensor} x "
                f"expert_model_parallel_size={self.expert} x pipeline_model_parallel_size={self.pipeline}; set "
                f"trainer.devices x trainer.num_nodes to a multiple of {experts}"
            )
        return world // model


def world_size() -> int:
    """Ranks of this job, from the launcher's environment (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """This rank's device: its own GPU, or the CPU where there is none.

    Raises:
        UserError: more ranks on this machine than GPUs.
    """
    if torch.cuda.is_available():
        rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if rank >= gpus:
            raise UserError(
                f"{gpus} GPUs are visible, too few for local rank {rank}; set trainer.devices to {gpus} or less"
            )
        return torch.device("cuda", rank)
    return torch.device("cpu")


def initialize(sizes: ParallelSizes, timeout_minutes: float = 30.0) -> torch.device:
    """Start torch.distributed and Megatron's process groups; adapt Megatron to the CPU where there is no GPU.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them. Without them this
    process is the whole world, and no port is opened.

    Raises:
        UserError: the world does not divide by the parallel sizes, or there are more ranks than GPUs.
    """
    sizes.data(world_size())
    quieten()
    adapt_megatron_to_cpu()
    from megatron.core import parallel_state  # after the adaptation

    device = local_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if world_size() == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
        logger.info("%d ranks on %s, device %s", world_size(), backend, device)
    parallel_state.initialize_model_parallel(**sizes.named)
    return device


def shutdown() -> None:
    """Undo `initialize`; safe to call twice."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def set_seed(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tracker. Ranks of one tensor-parallel group draw alike outside it."""
    from megatron.core import parallel_state, tensor_parallel

    seed = seed + STAGE_SEEDS * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from the global generator
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
