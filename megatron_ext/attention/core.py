"""The core attention that goes into Megatron's `SelfAttentionSubmodules.core_attention`.

Shape legend: s rows of the stream, b = 1, np query heads and ng key/value heads of this tensor-parallel rank,
hn head dimension.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.attention.cache import DecodeStep, PrefillStep
from megatron_ext.attention.context import (
    CP_COMM_TYPES,
    ContextShard,
    GatheredStream,
    context_parallel_attention,
    gathered_attention,
)
from megatron_ext.attention.function import prefix_grouped_attention
from megatron_ext.attention.kernels import Scoring
from megatron_ext.attention.rotation import RotatedStream
from megatron_ext.errors import UserError
from megatron_ext.grouping import PrefixGroups

__all__ = ["PrefixGroupedCoreAttention", "check_supported"]


def check_supported(config: TransformerConfig) -> None:
    """Refuse settings under which sharing a prefix would not give the result of repeating it.

    Raises:
        UserError: naming the setting, its value and the remedy.
    """
    rules = [
        (
            config.attention_dropout > 0,
            f"attention_dropout={config.attention_dropout}: a shared prefix would be dropped once per group, not once "
            "per response; set attention_dropout: 0",
        ),
        (
            config.hidden_dropout > 0,
            f"hidden_dropout={config.hidden_dropout}: a shared prefix would be dropped once per group, not once per "
            "response; set hidden_dropout: 0",
        ),
        (
            config.fp8 is not None and config.fp8_dot_product_attention,
            "fp8_dot_product_attention: prefix-grouped attention runs in bf16, fp16 or fp32; switch it off",
        ),
        (
            config.context_parallel_size > 1 and config.cp_comm_type not in CP_COMM_TYPES,
            f"cp_comm_type={config.cp_comm_type!r}: prefix grouping has {', '.join(CP_COMM_TYPES)}",
        ),
        (
            config.window_size is not None and (config.window_size[0] < -1 or config.window_size[1] > 0),
            f"window_size={config.window_size}: attention here is causal; give (rows before a query, 0), -1 for all",
        ),
        (config.apply_rope_fusion, "apply_rope_fusion restarts positions at every segment: set it to False"),
    ]
    for broken, message in rules:
        if broken:
            raise UserError(message)


class PrefixGroupedCoreAttention(torch.nn.Module):
    """Core attention over a prefix-grouped stream, with Megatron's call contract.

    What it does is chosen by the record handed in as `packed_seq_params`: a `PrefixGroups` (training and scoring), a
    `ContextShard` (the same under context parallelism), a `PrefillStep` or a `DecodeStep` (generation); in a `RotatedStream`,
    queries and keys are rotated first. It holds no state but its sinks, which are weights, so recomputation and pipeline stages
    are safe.

    Args:
        config: `window_size`, `window_attn_skip_freq`, `no_rope_freq` and `softmax_type` are honoured, as Megatron defines them:
            "learnable" is a weight `softmax_offset` [np], a sink for each head; "off-by-one" a sink of 0.
        softcap: bound of attention scores, see `Scoring`; None for none.
        attention_kernel, attention_plan: see `prefix_grouped_attention`.
        All others: Megatron's.

    Raises:
        UserError: at construction for settings that grouping cannot honour, at call time for a missing record.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        softcap: float | None = None,
        attention_kernel: str = "auto",
        attention_plan: str = "auto",
    ):
        super().__init__()
        check_supported(config)
        if attention_type != "self" or attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise UserError(
                f"layer {layer_number}: prefix grouping is causal self-attention, got attention_type="
                f"{attention_type!r}, attn_mask_type={attn_mask_type}"
            )
        self.config = config
        self.layer_number = layer_number
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.scoring = Scoring(
            scale=config.kv_channels**-0.5 if softmax_scale is None else softmax_scale,
            softcap=softcap,
            window=config.window_size[0] if windowed and config.window_size[0] >= 0 else None,
        )
        self.attention_kernel, self.attention_plan = attention_kernel, attention_plan
        self.tp_group = None if pg_collection is None else pg_collection.tp
        self.rotates = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        if config.softmax_type == "learnable":
            self.softmax_offset = self._new_sinks()

    def _new_sinks(self) -> torch.nn.Parameter:
        """Drawn for all heads and cut, so that they are the same on any number of ranks."""
        config, size, rank = self.config, 1, 0
        if self.tp_group is not None:
            size, rank = self.tp_group.size(), self.tp_group.rank()
        whole = torch.zeros(config.num_attention_heads, dtype=torch.float32)
        if config.perform_initialization:
            config.init_method(whole)
        sinks = torch.nn.Parameter(whole.chunk(size)[rank].to(config.params_dtype, copy=True))
        set_tensor_model_parallel_attributes(sinks, True, 0, 1)
        return sinks

    def _sinks(self, query: Tensor) -> Tensor | None:
        """[np], or None."""
        match self.config.softmax_type:
            case "learnable":
                return self.softmax_offset
            case "off-by-one":
                return query.new_zeros(query.size(1))
        return None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's: sinks are cut like heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )  # fmt: skip

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, 1, np, hn], key and value [s, 1, ng, hn] -> [s, 1, np * hn]; of narrower values, so many channels fewer."""
        if attention_bias is not None:
            raise UserError("prefix-grouped attention takes no attention_bias (ALiBi and the like)")
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)  # [s, np or ng, hn]
        record = packed_seq_params
        if isinstance(record, RotatedStream):
            if self.rotates:
                q, k = record.tables.rotate(q), record.tables.rotate(k)
            record = record.record
        sinks = self._sinks(q)
        match record:
            case PrefixGroups():
                out = prefix_grouped_attention(
                    q, k, v, record, self.scoring, self.attention_kernel, self.attention_plan, sinks
                )
            case ContextShard():
                comm = self.config.cp_comm_type
                out = context_parallel_attention(
                    q, k, v, record, self.scoring, comm, self.attention_kernel, self.attention_plan, sinks
                )
            case GatheredStream():
                out = gathered_attention(q, k, v, record.shard, self.scoring, self.attention_kernel, sinks)
            case PrefillStep() | DecodeStep():
                out = record.attend(self.layer_number, q, k, v, self.scoring, self.attention_kernel, sinks)
            case _:
                raise UserError(
                    f"layer {self.layer_number}: packed_seq_params must be a PrefixGroups, got "
                    f"{type(record).__name__}; build it with PrefixGroups.from_lengths"
                )
        return out.reshape(out.size(0), 1, -1)  # [s, np, hn] -> [s, 1, np * hn]

    def decode_latent(self, query: Tensor, rows: Tensor, width: int, record: DecodeStep) -> Tensor:
        """See `DecodeStep.attend_latent`."""
        return record.attend_latent(self.layer_number, query, rows, width, self.scoring, self._sinks(query))
