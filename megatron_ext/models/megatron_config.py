"""Megatron's own configuration, made of ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.experts import expert_options

__all__ = ["megatron_config"]


def plain_quick_gelu(x: Tensor) -> Tensor:
    """Megatron's, which it compiles, without being compiled."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATION_FUNCTIONS = {"silu": (F.silu, F.silu), "quick_gelu": (quick_gelu, plain_quick_gelu)}  # on a GPU, on a CPU


def megatron_config(config: GPTModelConfig, device_type: str) -> TransformerConfig:
    """Of a model that has been asked for `on` this type of device. The fused paths are CUDA's."""
    on_cpu = device_type != "cuda"
    granularity = config.activations_checkpoint_granularity
    full = granularity == "full"
    interleaved = config.pipeline_split.pieces > 1
    # Weights of 8 bits are not kept from one pass to the next: see models/fp8.py.
    fp8 = {"fp8": config.fp8, "fp8_recipe": config.fp8_recipe, "disable_parameter_transpose_cache": True}
    made = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="RMSNorm",
        activation_func=ACTIVATION_FUNCTIONS[config.activation][on_cpu],
        activation_func_clamp_value=config.activation_func_clamp_value,
        glu_linear_offset=config.glu_linear_offset,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        layernorm_epsilon=config.layernorm_epsilon,
        init_method_std=config.init_method_std,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=config.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=config.num_layers_in_last_pipeline_stage,
        virtual_pipeline_model_parallel_size=config.pipeline_split.pieces if interleaved else None,
        context_parallel_size=config.context_parallel_size,
        cp_comm_type=config.cp_comm_type,
        sequence_parallel=config.sequence_parallel,
        window_size=None if config.window_size is None else tuple(config.window_size),
        window_attn_skip_freq=config.window_attn_skip_freq,
        no_rope_freq=config.layers_without_rope,
        softmax_type=config.softmax_type,
        softmax_scale=config.score_scale,
        params_dtype=config.dtype,
        pipeline_dtype=config.dtype,
        bf16=config.precision == "bf16",
        # Streams of different length follow each other through the pipeline; Megatron then demands this
        # dispatcher even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **expert_options(config),
        # Losses arrive normalised by global counts, see megatron_ext.losses.grpo.
        calculate_per_token_loss=True,
        recompute_granularity=granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        # GPTModel hands position ids to the rotary module in 'mrope' mode only.
        mrope_section=[config.kv_channels // 2, 0, 0],
        apply_rope_fusion=False,
        rotary_interleaved=config.position_embedding.interleaved,
        use_cpu_initialization=on_cpu,
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        bias_dropout_fusion=not (on_cpu or config.add_bias_linear),  # experts in one product do without
        masked_softmax_fusion=not on_cpu,
        bias_activation_fusion=not on_cpu,
        # Of two stages each sends to the other twice at a time: batched, the messages would be mixed up. Overlapped,
        # Megatron-Core 0.16 would free an output that is still being sent.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=not interleaved,
        **(fp8 if config.fp8 is not None else {}),
    )
    # Not before: Megatron takes biases of whole experts alone, and ours are shared out (models/experts.py).
    made.add_bias_linear = config.add_bias_linear
    return made
