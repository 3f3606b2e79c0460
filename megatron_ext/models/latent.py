"""Multi-latent attention over prefix groups (DeepSeek-V2, arXiv 2405.04434, section 2.1). Weights have Megatron's names and
shapes.

    row      [c, k^R], the latent and the key that all heads share, normed and rotated: all that is kept of a token, and sent
    made     keys [W_uk c, k^R] and values W_uv c of every head, where a stream attends to itself
    absorbed queries q W_uk, where a row is decoded: it goes over the kept rows as they are, one key/value head of r + d_R
             channels of which the first r are the value, and the result is multiplied by W_uv

Megatron's own layer makes positions by itself and lets nobody else: here they come with the record.

Shape legend: t rows of the stream, n heads of this tensor-parallel rank, d_N channels of a head that do not rotate, d_R that
do, d_V of a value, r of the latent, tp tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.adapters.linears import Adapted
from megatron_ext.attention.cache import DecodeStep, PrefillStep
from megatron_ext.attention.context import ContextShard, GatheredStream, gather_rows
from megatron_ext.attention.rotation import RotaryTables, RotatedStream
from megatron_ext.models.latent_config import LatentConfig
from megatron_ext.runtime.weight_gather import await_weight

__all__ = ["LatentSelfAttention", "LatentSubmodules"]


@dataclass
class LatentSubmodules:
    """Classes of the linears and norms, and the core attention's spec."""

    linear_proj: type
    norm: type
    core_attention: ModuleSpec
    linear_q_proj: type
    linear_q_down_proj: type
    linear_q_up_proj: type
    linear_kv_down_proj: type
    linear_kv_up_proj: type

    @classmethod
    def of(cls, column: type, row: type, norm: type, core: ModuleSpec) -> LatentSubmodules:
        """All column-parallel linears alike; each has a field, so that a spec can put adapters on it."""
        return cls(row, norm, core, *[column] * 5)


class LatentSelfAttention(MegatronModule):
    """
    Args:
        sizes: the channels.
        All others: Megatron's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentSubmodules,
        layer_number: int,
        sizes: LatentConfig,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **_,
    ):
        super().__init__(config)
        self.layer_number, self.sizes, self.tp_group = layer_number, sizes, pg_collection.tp
        heads, rank = config.num_attention_heads, sizes.q_lora_rank
        self.heads = heads // self.tp_group.size()
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=config.softmax_scale,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        value = heads * sizes.v_head_dim
        self.linear_proj = build_module(
            submodules.linear_proj, value, config.hidden_size, config=config, init_method=config.output_layer_init_method,
            bias=False, input_is_parallel=True, skip_bias_add=True, is_expert=False, tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
        )  # fmt: skip

        def column(name: str, width: int, rows: int) -> torch.nn.Module:
            return build_module(
                getattr(submodules, f"linear_{name}"), width, rows, config=config, init_method=config.init_method,
                gather_output=False, bias=False, skip_bias_add=False, is_expert=False, tp_comm_buffer_name=name,
                tp_group=self.tp_group,
            )  # fmt: skip

        def norm(width: int) -> torch.nn.Module:
            epsilon = sizes.latent_layernorm_epsilon or config.layernorm_epsilon
            return build_module(submodules.norm, hidden_size=width, config=config, eps=epsilon)

        queries = heads * config.kv_channels
        if rank is None:
            self.linear_q_proj = column("q_proj", config.hidden_size, queries)
        else:
            self.linear_q_down_proj = column("q_down_proj", config.hidden_size, rank)
            self.linear_q_up_proj = column("q_up_proj", rank, queries)
        latent = sizes.kv_lora_rank
        self.linear_kv_down_proj = column("kv_down_proj", config.hidden_size, latent + sizes.qk_pos_emb_head_dim)
        self.linear_kv_up_proj = column("kv_up_proj", latent, heads * (sizes.qk_head_dim + sizes.v_head_dim))
        if rank is not None:
            self.q_layernorm = norm(rank)
        self.kv_layernorm = norm(latent)
        self.recomputes = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, packed_seq_params=None, **_
    ) -> tuple[Tensor, None]:
        """hidden_states [t (/ tp), 1, h] -> ([t (/ tp), 1, h], no bias)."""
        assert isinstance(packed_seq_params, RotatedStream), "the model hands positions on with the record"
        tables, record = packed_seq_params.tables, packed_seq_params.record
        query, row = self._query(hidden_states, tables), self._row(hidden_states, tables)
        match record:
            case DecodeStep():
                out = self._decode(query, row, record)
            case ContextShard():
                out = self._attend(query, gather_rows(row, record), GatheredStream(record))
            case PrefillStep():
                record.keep(self.layer_number, row.unsqueeze(1))
                out = self._attend(query, row, record.groups)
            case _:
                out = self._attend(query, row, record)
        return self.linear_proj(out)

    def _query(self, hidden: Tensor, tables: RotaryTables) -> Tensor:
        """[t, n, d_N + d_R], rotated."""
        if self.sizes.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            compressed, _ = self.linear_q_down_proj(hidden)  # [t, 1, rank / tp]
            query, _ = self.linear_q_up_proj(self.q_layernorm(self._whole(compressed)))
        query = query.view(query.size(0), self.heads, -1)
        plain, turned = query.split([self.sizes.qk_head_dim, self.sizes.qk_pos_emb_head_dim], -1)
        return torch.cat((plain, tables.rotate(turned)), -1)

    def _row(self, hidden: Tensor, tables: RotaryTables) -> Tensor:
        """What is kept of each token, the same on every tensor-parallel rank: [t, r + d_R], normed and rotated."""
        compressed, _ = self.linear_kv_down_proj(hidden)  # [t, 1, (r + d_R) / tp]
        compressed = gather_from_tensor_model_parallel_region(compressed, group=self.tp_group)
        latent, key = compressed.split([self.sizes.kv_lora_rank, self.sizes.qk_pos_emb_head_dim], -1)
        if self.config.sequence_parallel:  # the norm's weight has the gradient of a part of the rows
            latent = scatter_to_sequence_parallel_region(latent, group=self.tp_group)
            latent = gather_from_sequence_parallel_region(
                self.kv_layernorm(latent), tensor_parallel_output_grad=False, group=self.tp_group
            )
        else:
            latent = self.kv_layernorm(latent)
        return torch.cat((latent.squeeze(1), tables.rotate(key).squeeze(1)), -1)

    def _whole(self, compressed: Tensor) -> Tensor:
        """[t, 1, rank / tp] -> [t (/ tp), 1, rank], as the next linear takes it."""
        whole = gather_from_tensor_model_parallel_region(compressed, group=self.tp_group)
        if not self.config.sequence_parallel:
            return whole
        return scatter_to_sequence_parallel_region(whole, group=self.tp_group)

    def _of_keys_and_values(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """[n (d_N + d_V), ...] -> [n, d_N, ...] and [n, d_V, ...]."""
        return matrix.view(self.heads, -1, matrix.size(1)).split([self.sizes.qk_head_dim, self.sizes.v_head_dim], 1)

    def _adapter(self) -> tuple[Tensor, Tensor] | None:
        """A [R, r] and B [n (d_N + d_V), R] of what makes keys and values; None: they are made without."""
        up = self.linear_kv_up_proj
        if not isinstance(up, Adapted):
            return None
        for parameter in up.parameters():
            await_weight(parameter)
        return up.factors()

    def _attend(self, query: Tensor, rows: Tensor, record) -> Tensor:
        """query [t, n, d_N + d_R], rows [tk, r + d_R] -> [t, 1, n d_V], keys and values made of the rows."""
        # Each rank's heads have a share of the rows' gradient.
        rows = copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        latent, turned = rows.split([self.sizes.kv_lora_rank, self.sizes.qk_pos_emb_head_dim], -1)
        made = F.linear(latent, await_weight(self.linear_kv_up_proj.weight))
        if (adapter := self._adapter()) is not None:
            made = torch.addmm(made, F.linear(latent, adapter[0]), adapter[1].t())
        plain, value = made.view(len(rows), self.heads, -1).split([self.sizes.qk_head_dim, self.sizes.v_head_dim], -1)
        key = torch.cat((plain, turned.unsqueeze(1).expand(-1, self.heads, -1)), -1)

        def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (x.unsqueeze(1) for x in (query, key, value))
            return self.core_attention(q, k, v, None, packed_seq_params=record)

        if self.recomputes and self.training:
            return tensor_parallel.checkpoint(core, False, query, key, value)
        return core(query, key, value)

    def _decode(self, query: Tensor, rows: Tensor, record: DecodeStep) -> Tensor:
        """query [t, n, d_N + d_R] of decoding rows, absorbed -> [t, 1, n d_V]."""
        up_key, up_value = self._of_keys_and_values(await_weight(self.linear_kv_up_proj.weight))
        adapter = self._adapter()
        plain, turned = query.split([self.sizes.qk_head_dim, self.sizes.qk_pos_emb_head_dim], -1)
        absorbed = torch.einsum("tnd,ndr->tnr", plain, up_key)
        if adapter is not None:
            a, (b_key, b_value) = adapter[0], self._of_keys_and_values(adapter[1])
            absorbed = absorbed + torch.einsum("tnd,ndr->tnr", plain, b_key) @ a
        absorbed = torch.cat((absorbed, turned), -1)
        out = self.core_attention.decode_latent(absorbed, rows.unsqueeze(1), self.sizes.kv_lora_rank, record)
        value = torch.einsum("tnr,ndr->tnd", out, up_value)
        if adapter is not None:
            value = value + torch.einsum("tnr,ndr->tnd", out @ a.t(), b_value)
        return value.reshape(len(out), 1, -1)
