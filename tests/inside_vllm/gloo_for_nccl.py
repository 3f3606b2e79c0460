"""For the workers of a vLLM server on a CPU: gloo for NCCL, nothing for CUDA's streams; else its weight transfer is its own.

PYTHONPATH=<this folder> python -m vllm.entrypoints.openai.api_server --worker-extension-cls gloo_for_nccl.Extension ...
"""

import contextlib

import torch
from gloo_group import GlooGroup
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

__all__ = ["Extension"]


class Extension:
    """Adds nothing to a worker, which imports this module for it."""


class NoStream:
    """Nothing on a CPU runs behind the host."""

    def synchronize(self) -> None:
        pass


def join(init_info, parallel) -> GlooGroup:
    rank = parallel.data_parallel_index * parallel.world_size + parallel.rank + init_info.rank_offset
    return GlooGroup(init_info.nccl_unique_id_bytes, rank, init_info.world_size)


nccl_engine.worker_init_process_group = join
packed_tensor._get_streams = lambda device, count: [NoStream() for _ in range(count)]
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.synchronize = lambda: None
