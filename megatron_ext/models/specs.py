"""Layer specs with the prefix-grouped core attention."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_ext.attention.core import PrefixGroupedCoreAttention
from megatron_ext.errors import UserError
from megatron_ext.models.deepstack import fed_layer
from megatron_ext.models.expert_config import ExpertConfig
from megatron_ext.models.experts import expert_layer
from megatron_ext.models.latent import LatentSelfAttention, LatentSubmodules
from megatron_ext.models.latent_config import LatentConfig
from megatron_ext.models.norm import RMSNorm, RMSNormAcrossHeads

__all__ = ["assert_all_attention_grouped", "block_spec", "has_transformer_engine"]

logger = logging.getLogger(__name__)


def has_transformer_engine() -> bool:
    """True where Transformer Engine can be used: installed, and a GPU is there to run it."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(
    num_layers: int,
    qk_layernorm: bool,
    implementation: str = "auto",
    softcap: float | None = None,
    attention_kernel: str = "auto",
    attention_plan: str = "auto",
    residual_multiplier: float = 1.0,
    latent: LatentConfig | None = None,
    across_heads: tuple[int, int] | None = None,
    experts: ExpertConfig | None = None,
    layers: Iterable[int] = (),
    fed: int = 0,
) -> TransformerBlockSubmodules:
    """Spec of a decoder block whose every layer attends over prefix groups.

    Args:
        num_layers: layers on THIS pipeline stage.
        implementation: "local" (Megatron's own linears and our RMSNorm), "transformer_engine" (its linears and
            norms), or "auto": Transformer Engine where it can run. The choice is logged.
        softcap, attention_kernel, attention_plan: of the core attention.
        residual_multiplier: of what attention and MLP add.
        latent: the channels of multi-latent attention; None: layers have plain attention.
        across_heads: query and key/value heads of all ranks, where one norm spans them.
        experts: which layers have experts, and what they are; None: none have.
        layers: numbers of the stage's layers in the whole model, from 0; needed with `experts`.
        fed: how many of the stage's first layers a vision tower's deepstack feeds.
    """
    if implementation == "auto":
        implementation = "transformer_engine" if has_transformer_engine() else "local"
    logger.info("layers use the %r implementation", implementation)
    core = ModuleSpec(
        PrefixGroupedCoreAttention,
        params={"softcap": softcap, "attention_kernel": attention_kernel, "attention_plan": attention_plan},
    )
    if implementation == "local":
        layer, final_norm = _local_layer(core, qk_layernorm), RMSNorm
    elif implementation == "transformer_engine":
        layer, final_norm = _transformer_engine_layer(core, qk_layernorm)
    else:
        raise UserError(f"transformer_impl must be auto, local or transformer_engine, got {implementation!r}")
    if latent is not None:
        _make_latent(layer, core, latent, implementation)
    if residual_multiplier != 1:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = _multiplied(residual_multiplier)
    if across_heads is not None:
        submodules = layer.submodules.self_attention.submodules
        norms = [ModuleSpec(RMSNormAcrossHeads, params={"heads": heads}) for heads in across_heads]
        submodules.q_layernorm, submodules.k_layernorm = norms
    specs = [layer] * num_layers
    if experts is not None and any(experts.layers_with_experts):
        routed = expert_layer(layer, experts, final_norm, fused=implementation == "transformer_engine")
        specs = [routed if experts.layers_with_experts[number] else layer for number in layers]
    specs[:fed] = [fed_layer(spec, last=number == fed - 1) for number, spec in enumerate(specs[:fed])]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=final_norm)


def _layer(
    core, linear_qkv, linear_proj, linear_fc1, linear_fc2, input_norm, mlp_norm, qk_norm, keys_map
) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv,
                    core_attention=core,
                    linear_proj=linear_proj,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys_map,
        ),
    )


def _make_latent(layer: ModuleSpec, core: ModuleSpec, sizes: LatentConfig, implementation: str) -> None:
    """Put multi-latent attention into a layer's spec. Its first linears are not fused with the norm before them."""
    local = implementation == "local"
    if local:
        submodules = LatentSubmodules.of(ColumnParallelLinear, RowParallelLinear, RMSNorm, core)
    else:  # not yet run: it needs a GPU
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

        submodules = LatentSubmodules.of(TEColumnParallelLinear, TERowParallelLinear, TENorm, core)
        layer.submodules.input_layernorm = TENorm
    layer.submodules.self_attention = ModuleSpec(LatentSelfAttention, params={"sizes": sizes}, submodules=submodules)
    layer.submodules.sharded_state_dict_keys_map.pop("input_layernorm.", None)


def _multiplied(multiplier: float) -> Callable[..., Callable[..., Tensor]]:
    """Megatron's addition to the residual stream, of so many times what is added."""

    def bias_dropout_add(training: bool, fused: bool):
        add = get_bias_dropout_add(training, fused)

        def multiplied(added: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = added
            return add((x * multiplier, None if bias is None else bias * multiplier), residual, dropout)

        return multiplied

    return bias_dropout_add


def _local_layer(core: ModuleSpec, qk_layernorm: bool) -> ModuleSpec:
    return _layer(
        core,
        linear_qkv=ColumnParallelLinear,
        linear_proj=RowParallelLinear,
        linear_fc1=ColumnParallelLinear,
        linear_fc2=RowParallelLinear,
        input_norm=RMSNorm,
        mlp_norm=RMSNorm,
        qk_norm=RMSNorm if qk_layernorm else IdentityOp,
        # Checkpoints of both implementations carry the fused names of Transformer Engine.
        keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )


def _transformer_engine_layer(core: ModuleSpec, qk_layernorm: bool) -> tuple[ModuleSpec, type]:
    """Transformer Engine's fused norm + linear. Not yet run: it needs a GPU."""
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    layer = _layer(
        core,
        linear_qkv=TELayerNormColumnParallelLinear,
        linear_proj=TERowParallelLinear,
        linear_fc1=TELayerNormColumnParallelLinear,
        linear_fc2=TERowParallelLinear,
        input_norm=IdentityOp,
        mlp_norm=IdentityOp,
        qk_norm=TENorm if qk_layernorm else IdentityOp,
        keys_map={},
    )
    return layer, TENorm


def assert_all_attention_grouped(model: torch.nn.Module) -> None:
    """Refuse a model in which some attention layer is not the grouped one.

    Such a layer would ignore the record and attend across responses: it trains, wrongly, and says nothing.

    Raises:
        UserError: naming the first such layer.
    """
    found = 0
    for name, module in model.named_modules():
        core = getattr(module, "core_attention", None)
        if core is None:
            continue
        found += 1
        if not isinstance(core, PrefixGroupedCoreAttention):
            raise UserError(
                f"{name}.core_attention is a {type(core).__name__}, not a PrefixGroupedCoreAttention: it would attend "
                "across responses; build the model with megatron_ext.models.specs.block_spec"
            )
    if not found:
        raise UserError("the model has no attention layer with a core_attention")
