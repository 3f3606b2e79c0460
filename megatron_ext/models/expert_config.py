"""Mixture of experts in the configuration: which layers have experts, who is chosen, what a router is taught."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_ext.grouping.routes import RouteShape
from megatron_ext.kinds import Architecture, Speed, Training

__all__ = ["ExpertConfig", "layers_with_experts"]

SCORES = ("softmax", "sigmoid")


@dataclass(kw_only=True)
class ExpertConfig:
    """Keys are Megatron's where it has one."""

    # Experts of a layer, MLPs of which each token takes moe_router_topk (docs/experts.md); null: one MLP for all tokens.
    num_moe_experts: Architecture[int | None] = None
    # Experts that a token takes.
    moe_router_topk: Architecture[int] = 2
    # Width inside an expert; null: ffn_hidden_size, which is that of layers without experts.
    moe_ffn_hidden_size: Architecture[int | None] = None
    # Which layers have experts: n, the first of every n; or a list with a 1 for each layer that does and a 0 for each that has an
    # MLP. 1: all.
    moe_layer_freq: Architecture[int | list[int]] = 1
    # Width of an expert beside the others, which every token takes (of several such, the sum); null: none.
    moe_shared_expert_intermediate_size: Architecture[int | None] = None
    # A gate of its own, the sigmoid of a product with the token, before the shared expert is added, as Qwen2-MoE has it.
    moe_shared_expert_gate: Architecture[bool] = False
    # A token's scores for the experts: "softmax" over all of them, or the "sigmoid" of each, as DeepSeek-V3's.
    moe_router_score_function: Architecture[str] = "softmax"
    # Divide the scores of the chosen experts by their sum: Hugging Face's norm_topk_prob.
    moe_router_norm_topk_prob: Architecture[bool] = True
    # Multiplies the weights of the chosen experts: routed_scaling_factor of Hugging Face. null: 1.
    moe_router_topk_scaling_factor: Architecture[float | None] = None
    # A number for each expert, added to its score where experts are chosen and not where they are weighed (arXiv 2408.15664).
    moe_router_enable_expert_bias: Architecture[bool] = False
    # How much an optimizer step adds to the biases of experts with fewer tokens than the mean, and takes from the others; 0, as
    # usual in RL: they stay. A prompt's token counts once for each response.
    moe_router_bias_update_rate: Training[float] = 0.0
    # Groups of experts: a token takes experts of the moe_router_group_topk best groups alone (arXiv 2412.19437). null: one group.
    moe_router_num_groups: Architecture[int | None] = None
    # Groups that a token's experts come from.
    moe_router_group_topk: Architecture[int | None] = None
    # A group is as good as the sum of so many best experts of it; null: moe_router_topk / moe_router_group_topk, Megatron's.
    moe_router_group_best: Architecture[int | None] = None
    # Weight of the loss that balances experts (arXiv 2101.03961, of each stream, by its share of the step's tokens); 0, as usual
    # in RL: none. A prompt's token counts once for each response.
    moe_aux_loss_coeff: Training[float] = 0.0
    # Experts of a rank in one call of Transformer Engine's grouped product, instead of one after the other. Needs a GPU and
    # transformer_impl=transformer_engine. Not yet run.
    moe_grouped_gemm: Speed[bool] = False
    # Must be null: who is dropped would depend on the other tokens of a stream, and grouping changes those.
    moe_expert_capacity_factor: Training[float | None] = None
    # Must be false, as moe_expert_capacity_factor null.
    moe_token_dropping: Training[bool] = False

    @property
    def layers_with_experts(self) -> list[bool]:
        """Of each layer, whether it has."""
        return layers_with_experts(self)

    @property
    def expert_width(self) -> int:
        """Width inside an expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def mlp_widths(self) -> dict[str, int]:
        """Width of each kind of MLP that a layer may have, by its place there."""
        if self.num_moe_experts is None:
            return {"mlp": self.ffn_hidden_size}
        shared = self.moe_shared_expert_intermediate_size
        dense = {} if all(self.layers_with_experts) else {"mlp": self.ffn_hidden_size}
        return dense | {"mlp.experts": self.expert_width} | ({} if shared is None else {"mlp.shared_experts": shared})

    @property
    def route_shape(self) -> RouteShape:
        """Of a model with experts."""
        return RouteShape(self.num_layers, self.moe_router_topk, self.num_moe_experts)

    def _expert_rules(self) -> Iterator[tuple[bool, str]]:
        """(whether it is broken, what is said then)."""
        yield (
            self.moe_expert_capacity_factor is not None or self.moe_token_dropping,
            f"model.moe_expert_capacity_factor={self.moe_expert_capacity_factor}, "
            f"model.moe_token_dropping={self.moe_token_dropping}: which tokens are dropped depends on the others of their "
            "stream, so grouping and repeating would differ; set them to null and false",
        )
        yield (
            self.add_bias_linear
            and not (all(self.layers_with_experts) and self.moe_shared_expert_intermediate_size is None),
            "model.add_bias_linear=true needs experts in all layers and no shared one (model.num_moe_experts, "
            "model.moe_layer_freq, model.moe_shared_expert_intermediate_size); set it to false",
        )
        if self.num_moe_experts is None:
            idle = {key.name: key.default for key in fields(ExpertConfig)}
            for name, other in (idle | {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}).items():
                value = getattr(self, name)
                yield value != other, f"model.{name}={value} needs experts, and model.num_moe_experts is null; set it"
            return
        yield from self._choice_rules()
        yield from self._layer_rules()
        yield from self._rank_rules()

    def _choice_rules(self) -> Iterator[tuple[bool, str]]:
        experts, topk = self.num_moe_experts, self.moe_router_topk
        yield experts < 2, f"model.num_moe_experts={experts} must be at least 2, or null"
        yield not 1 <= topk <= experts, f"model.moe_router_topk={topk} must lie in 1 .. model.num_moe_experts={experts}"
        score = self.moe_router_score_function
        yield score not in SCORES, f"model.moe_router_score_function must be one of {', '.join(SCORES)}, got {score!r}"
        for name in ("moe_aux_loss_coeff", "moe_router_bias_update_rate"):
            yield getattr(self, name) < 0, f"model.{name}={getattr(self, name)} must be at least 0"
        yield (
            self.moe_router_bias_update_rate > 0 and not self.moe_router_enable_expert_bias,
            f"model.moe_router_bias_update_rate={self.moe_router_bias_update_rate} needs "
            "model.moe_router_enable_expert_bias=true, without which there is no bias",
        )
        groups, chosen, best = self.moe_router_num_groups, self.moe_router_group_topk, self.moe_router_group_best
        yield (
            best is not None and groups is None,
            f"model.moe_router_group_best={best} needs model.moe_router_num_groups",
        )
        yield (
            (groups is None) != (chosen is None),
            f"model.moe_router_num_groups={groups} and model.moe_router_group_topk={chosen}: give both or neither",
        )
        if groups is None or chosen is None:
            return
        yield (
            groups < 1 or experts % groups,
            f"model.moe_router_num_groups={groups} does not divide model.num_moe_experts={experts}",
        )
        yield (
            not 1 <= chosen <= groups or topk > chosen * (experts // groups),
            f"model.moe_router_group_topk={chosen} must be at most model.moe_router_num_groups={groups}, and leave as many "
            f"experts as model.moe_router_topk={topk}",
        )
        yield (
            best is None and topk % chosen,
            f"model.moe_router_group_topk={chosen} does not divide model.moe_router_topk={topk}: set model.moe_router_group_best",
        )
        yield (
            best is not None and not 1 <= best <= experts // groups,
            f"model.moe_router_group_best={best} must lie in 1 .. {experts // groups}, the experts of a group",
        )

    def _layer_rules(self) -> Iterator[tuple[bool, str]]:
        freq = self.moe_layer_freq
        yield (
            isinstance(freq, list) and (len(freq) != self.num_layers or not set(freq) <= {0, 1} or not any(freq)),
            f"model.moe_layer_freq={freq}: give 0 or 1 for each of the {self.num_layers} layers, and a 1 for some",
        )
        yield isinstance(freq, int) and freq < 1, f"model.moe_layer_freq={freq} must be at least 1, or a list"
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            value = getattr(self, name)
            yield value is not None and value < 1, f"model.{name}={value} must be at least 1"
        yield (
            self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None,
            "model.moe_shared_expert_gate=true needs model.moe_shared_expert_intermediate_size",
        )
        yield (
            self.moe_grouped_gemm and self.transformer_impl == "local",
            "model.moe_grouped_gemm=true is Transformer Engine's, and model.transformer_impl=local does without; set it to false",
        )

    def _rank_rules(self) -> Iterator[tuple[bool, str]]:
        tp, ep = self.tensor_model_parallel_size, self.expert_model_parallel_size
        etp = self.expert_tensor_ranks
        yield (
            self.num_moe_experts % ep,
            f"model.num_moe_experts={self.num_moe_experts} is not divisible by model.expert_model_parallel_size={ep}",
        )
        yield (
            tp > 1 and not self.sequence_parallel,
            f"model.tensor_model_parallel_size={tp} with experts needs model.sequence_parallel=true: a rank routes its own rows",
        )
        yield (
            self.expert_width % etp,
            f"the width of an expert, {self.expert_width}, is not divisible by model.expert_tensor_parallel_size={etp}",
        )
        yield (
            (self.moe_shared_expert_intermediate_size or 0) % tp,
            f"model.moe_shared_expert_intermediate_size={self.moe_shared_expert_intermediate_size} is not divisible by "
            f"model.tensor_model_parallel_size={tp}",
        )
        yield (
            ep == 1 and etp != tp,
            f"model.expert_tensor_parallel_size={etp} beside model.tensor_model_parallel_size={tp} needs "
            "model.expert_model_parallel_size > 1: only then Megatron sums gradients of experts over ranks of their own",
        )
        yield (
            self.add_bias_linear and etp > 1 and (self.moe_grouped_gemm or self.gradient_accumulation_fusion),
            f"model.add_bias_linear=true with model.expert_tensor_parallel_size={etp}: experts are then Megatron's own linears, "
            "not Transformer Engine's; set model.moe_grouped_gemm and model.gradient_accumulation_fusion to false, or "
            "model.expert_tensor_parallel_size to 1 with model.expert_model_parallel_size > 1",
        )
        yield self.fp8 is not None, f"model.fp8={self.fp8} with experts is not computed here; set it to null"
        if self.peft is not None:
            yield from self._adapted_rules()

    def _adapted_rules(self) -> Iterator[tuple[bool, str]]:
        """Of experts with adapters."""
        apart = [target for target in ("gate_proj", "up_proj") if target in self.peft.target_modules]
        yield (
            bool(apart),
            f"model.peft.target_modules has {' and '.join(apart)}, and the model experts (model.num_moe_experts), whose "
            "gate_proj and up_proj are one tensor with one A in transformers and PEFT; name linear_fc1 instead",
        )
        yield (
            self.moe_grouped_gemm,
            "model.moe_grouped_gemm=true puts experts into one product of Transformer Engine, which has no adapters here; set it "
            "to false, or model.peft to null",
        )
        yield (
            self.moe_router_bias_update_rate > 0,
            f"model.moe_router_bias_update_rate={self.moe_router_bias_update_rate} moves experts' biases, which model.peft "
            "freezes with all that is no adapter; set it to 0",
        )


def layers_with_experts(config) -> list[bool]:
    """Of what has an `ExpertConfig`'s keys and num_layers: of each layer, whether it has experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [layer % config.moe_layer_freq == 0 for layer in range(config.num_layers)]
    return [bool(one) for one in config.moe_layer_freq]
