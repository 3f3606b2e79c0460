"""Layer specs with experts, and Megatron's options for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ext.errors import UserError
from megatron_ext.models.expert_config import ExpertConfig
from megatron_ext.models.router import ExpertLayer, ExpertRouter

__all__ = ["expert_layer", "expert_options"]

DISTINCT_DRAWS = 1 << 20  # ranks of experts draw from seeds that lie so far apart
PRE_MLP = "pre_mlp_layernorm."


def expert_options(config: ExpertConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig. What a router does is not among them: ours does it."""
    if config.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": config.num_moe_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": True,  # of no bearing; else one expert for a token would be refused
        "moe_router_load_balancing_type": "none",
        "moe_ffn_hidden_size": config.expert_width,
        "moe_layer_freq": [int(one) for one in config.layers_with_experts],
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": config.moe_shared_expert_gate,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "expert_model_parallel_size": config.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.expert_tensor_ranks,
    }


def expert_layer(
    dense: ModuleSpec, config: ExpertConfig, norm: type, fused: bool, router: type = ExpertRouter
) -> ModuleSpec:
    """A layer with experts, of the spec of one without.

    Args:
        norm: before the experts; a fused one of the dense layer's MLP cannot be kept.
        fused: whether layers are Transformer Engine's; cut experts with biases are Megatron's own all the same.
        router: builds what Megatron calls a router, given (config, rules, pg_collection).

    Raises:
        UserError: a grouped product without Transformer Engine.
    """
    biased = config.add_bias_linear
    column, row = _linears(fused and not (biased and config.expert_tensor_ranks > 1))
    if biased and row is RowParallelLinear:
        row = RowParallelThatIsAddedTo
    experts = ModuleSpec(SequentialExperts, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    if config.moe_grouped_gemm:
        if not fused:
            raise UserError(
                "model.moe_grouped_gemm=true needs Transformer Engine, which is not in use here "
                "(model.transformer_impl); set it to false"
            )
        experts = _grouped_experts()
    mlp = ModuleSpec(
        MoELayer,
        submodules=MoESubmodules(
            experts=experts,
            shared_experts=ModuleSpec(SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            router=RouterSpec(router, config),
        ),
    )
    keys = {ours: saved for ours, saved in dense.submodules.sharded_state_dict_keys_map.items() if ours != PRE_MLP}
    changes = {"mlp": mlp, "pre_mlp_layernorm": norm, "sharded_state_dict_keys_map": keys}
    return ModuleSpec(ExpertLayer, submodules=dataclasses.replace(dense.submodules, **changes), params=dense.params)


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """Builds a router that knows our configuration."""

    router: type
    rules: ExpertConfig

    def __call__(self, config, pg_collection=None, **_) -> torch.nn.Module:
        return self.router(config=config, rules=self.rules, pg_collection=pg_collection)


def _linears(fused: bool) -> tuple[type, type]:
    if not fused:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


class RowParallelThatIsAddedTo(RowParallelLinear):
    """Megatron's MLP adds an expert's bias to what this gives on each rank that has a part of the expert, before they are
    summed; and in place, to what of one rank is a view that autograd protects."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, bias = super().forward(input_)
        return out.clone(), _Share.apply(bias, self.tp_group.size())


class _Share(torch.autograd.Function):
    """One rank's share of a bias that ranks add up. Each of them sees all tokens of the expert, so it has the whole gradient."""

    @staticmethod
    def forward(ctx, bias: torch.Tensor, ranks: int) -> torch.Tensor:
        return bias / ranks

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _grouped_experts() -> ModuleSpec:
    """Transformer Engine's grouped linears. Not yet run: they need a GPU."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    linears = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    return ModuleSpec(TEGroupedMLP, submodules=linears)


class SequentialExperts(SequentialMLP):
    """Megatron's, of which each rank draws weights of its own also where they are drawn on the CPU, and whose biases are an
    expert's and no tensor-parallel rank's: Megatron would sum their gradients over ranks that may have other experts."""

    def __init__(self, num_local_experts: int, config, submodules: MLPSubmodules, pg_collection=None, **options):
        with _draws_of_its_own(pg_collection.ep.rank()) if config.use_cpu_initialization else contextlib.nullcontext():
            super().__init__(num_local_experts, config, submodules, pg_collection, **options)
        first = pg_collection.expt_tp.rank() == 0
        for expert in self.local_experts:
            bias = expert.linear_fc2.bias
            if isinstance(bias, torch.nn.Parameter):
                bias.sequence_parallel = False
                # In the norm of all gradients it counts once for the ranks that have a part of the expert.
                bias.tensor_model_parallel, bias.shared = first, not first


@contextlib.contextmanager
def _draws_of_its_own(rank: int) -> Iterator[None]:
    """Where ranks draw from generators that are alike; those of a GPU differ already."""
    seed = int(torch.randint(DISTINCT_DRAWS, ())) + DISTINCT_DRAWS * rank
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
