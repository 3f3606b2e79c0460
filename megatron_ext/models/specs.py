"""Layer specs with the prefix-grouped core attention."""

from __future__ import annotations

import importlib.util
import logging

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

from megatron_ext.attention.core import PrefixGroupedCoreAttention
from megatron_ext.errors import UserError
from megatron_ext.models.norm import RMSNorm

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
) -> TransformerBlockSubmodules:
    """Spec of a decoder block whose every layer attends over prefix groups.

    Args:
        num_layers: layers on THIS pipeline stage.
        implementation: "local" (Megatron's own linears and our RMSNorm), "transformer_engine" (its linears and
            norms), or "auto": Transformer Engine where it can run. The choice is logged.
        softcap, attention_kernel, attention_plan: of the core attention.
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
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


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
