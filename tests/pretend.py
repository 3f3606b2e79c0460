"""One process that claims to be any rank of any world: sizes and allocations are real, what other ranks say is not.

torch's fake process group answers every collective at once. What a rank holds does not depend on the answers, so
layouts of a hundred ranks are tried in seconds. Call it in a process of its own (`run_ranks(..., 1)`), and end with
`be_alone`.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ext.runtime.distributed import ParallelSizes, set_seed, shutdown

__all__ = ["BACKENDS", "be_alone", "pretend"]

BACKENDS = "cpu:fake,cuda:fake,meta:fake"  # also for tensors without memory, see tests/dry


def pretend(rank: int, world: int, sizes: ParallelSizes) -> None:
    """Be this rank from now on."""
    shutdown()
    dist.init_process_group(BACKENDS, store=FakeStore(), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(**sizes.named, create_gloo_process_groups=False)
    # The optimizer asks for gloo's twins of these groups, for its checkpoints, which nobody writes here.
    twins = parallel_state.get_data_parallel_group(with_context_parallel=True)
    parallel_state._DATA_PARALLEL_GROUP_GLOO = parallel_state._DATA_PARALLEL_GROUP_WITH_CP_GLOO = twins
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = twins
    parallel_state._EXPERT_DATA_PARALLEL_GROUP_GLOO = twins
    parallel_state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO = twins
    set_seed(1)


def be_alone() -> None:
    """The only rank of a world, as the harness left this process."""
    pretend(0, 1, ParallelSizes())
