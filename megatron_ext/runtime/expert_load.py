"""Experts over ranks and steps: how many streams ranks run that share experts, and what experts were given to do in a training
step, counted by every router, told and acted upon once for a step.

Tokens are counted as the responses would count them that do not share them: a prompt's as often as it has responses.

Shape legend: l routers of this rank, e experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

__all__ = ["ExpertLoad", "finish_step", "most_of_experts", "routers_of", "share_out"]


class ExpertLoad(MegatronModule):
    """What a router counts; its base.

    Attributes:
        balanced: whether there is an auxiliary loss.
        load: fp64 [e], logical tokens that each expert was given since the last step.
        balance_loss: fp64 [], this rank's part of the auxiliary loss since then.
        expert_bias: fp32 [e], see `model.moe_router_enable_expert_bias`; None: there is none.
        step_tokens: logical tokens of all streams of the step; None: of the stream that is being run.
    """

    def __init__(self, config: TransformerConfig, biased: bool, update_rate: float, balanced: bool):
        super().__init__(config=config)
        experts, device = config.num_moe_experts, torch.cuda.current_device()
        self.update_rate, self.balanced = update_rate, balanced
        self.step_tokens: float | None = None
        zeros = lambda *shape, dtype: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
        self.register_buffer("load", zeros(experts, dtype=torch.float64), persistent=False)
        self.register_buffer("balance_loss", zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("expert_bias", zeros(experts, dtype=torch.float32) if biased else None)

    @property
    def trains(self) -> bool:
        """Whether its layer does: one that is frozen keeps its biases, too."""
        return any(p.requires_grad for p in self.parameters())

    def begin(self) -> None:
        """Nothing has been counted: passes before a step, such as those that locate a block, are none of it."""
        self.load.zero_()
        self.balance_loss.zero_()

    def count(self, tokens: Tensor, loss: Tensor | None = None) -> None:
        """tokens [e] of one stream on this rank, and its part of the auxiliary loss []."""
        self.load += tokens
        if loss is not None:
            self.balance_loss += loss


def most_of_experts(config: TransformerConfig, mine: int) -> int:
    """The largest such number of the ranks that share experts, whole ones or parts of one; all of them call it.

    Tokens travel to experts on other ranks in every layer, so all those ranks run a stream whenever one does."""
    if config.expert_model_parallel_size == 1:  # then parts of an expert lie on ranks that run the same streams
        return mine
    most = torch.tensor([mine], device=torch.cuda.current_device())
    dist.all_reduce(most, dist.ReduceOp.MAX, parallel_state.get_expert_tensor_and_model_parallel_group())
    return int(most.item())


def routers_of(pieces: Iterable[torch.nn.Module]) -> list[ExpertLoad]:
    """Those of this rank's layers, in their order."""
    return [module for piece in pieces for module in piece.modules() if isinstance(module, ExpertLoad)]


def share_out(routers: list[ExpertLoad], tokens: int) -> None:
    """Tell routers how many logical tokens a step has, of which this data-parallel rank has `tokens`; its ranks call it."""
    total = torch.tensor([tokens], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    for router in routers:
        router.step_tokens = total.item()


@torch.no_grad()
def finish_step(routers: list[ExpertLoad], applied: bool) -> dict[str, float]:
    """Move the biases, and begin counting anew; every rank calls it, also one without experts.

    Args:
        applied: whether the optimizer took its step; if not, biases stay as well.

    Returns:
        expert_load_max: tokens of the busiest expert of any layer, over the mean of its layer.
        balance_loss: the auxiliary loss, summed over layers.
    """
    everybody = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    largest, loss = torch.zeros(2, 1, dtype=torch.float64, device=torch.cuda.current_device())
    if routers:
        rows = [torch.cat((router.load, router.balance_loss.view(1))) for router in routers]
        counted = torch.stack(rows)  # [l, e + 1]
        dist.all_reduce(counted, group=everybody)
        load, mean = counted[:, :-1], counted[:, :-1].mean(1, keepdim=True)
        largest = (load.amax(1, keepdim=True) / mean.clamp(min=1)).amax(0)
        loss = counted[:, -1:].sum(0)
        for router, of_experts, own in zip(routers, load, mean, strict=True):
            if applied and router.update_rate and router.trains:
                router.expert_bias += router.update_rate * (own - of_experts).sign().to(router.expert_bias.dtype)
            router.begin()
    stages = parallel_state.get_pipeline_model_parallel_group()
    dist.all_reduce(largest, dist.ReduceOp.MAX, stages)
    dist.all_reduce(loss, group=stages)
    largest, loss = torch.cat((largest, loss)).tolist()  # one read of the device
    return {"expert_load_max": largest, "balance_loss": loss}
