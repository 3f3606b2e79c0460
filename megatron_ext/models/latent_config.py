"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434): what a configuration says of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_ext.kinds import Architecture
from megatron_ext.models.linears import attention_linears
from megatron_ext.rotary.scaling import yarn_mscale

__all__ = ["LatentConfig"]


@dataclass(kw_only=True)
class LatentConfig:
    # Keys and values of all heads are made of one compressed row for each token, which is what is kept and sent: multi-latent
    # attention, DeepSeek's. The head dimension of queries and keys is then qk_head_dim + qk_pos_emb_head_dim.
    multi_latent_attention: Architecture[bool] = False
    # Width of the compressed queries; null: queries are not compressed.
    q_lora_rank: Architecture[int | None] = None
    # Width of the compressed keys and values.
    kv_lora_rank: Architecture[int] = 512
    # Channels of a query and key head that do not rotate.
    qk_head_dim: Architecture[int] = 128
    # Channels that do, of which all key heads share one.
    qk_pos_emb_head_dim: Architecture[int] = 64
    # Channels of a value head; at most those of a query head.
    v_head_dim: Architecture[int] = 128
    # Added to what the norms of compressed rows divide by; null: layernorm_epsilon.
    latent_layernorm_epsilon: Architecture[float | None] = None

    @property
    def rotated_channels(self) -> int:
        """Of a head, those that positions may turn."""
        return self.qk_pos_emb_head_dim if self.multi_latent_attention else self.kv_channels

    @property
    def value_channels(self) -> int:
        """Of a value head."""
        return self.v_head_dim if self.multi_latent_attention else self.kv_channels

    @property
    def cached_channels(self) -> int:
        """Numbers of a token and layer that sampling keeps on a tensor-parallel rank."""
        if self.multi_latent_attention:
            return self.kv_lora_rank + self.qk_pos_emb_head_dim
        return 2 * self.heads_per_rank[1] * self.kv_channels

    @property
    def latent_weights(self) -> int | None:
        """Of the linears of a layer's latent attention; None: it is plain."""
        if not self.multi_latent_attention:
            return None
        return sum(linear.weights for linear in attention_linears(self).values())

    @property
    def score_scale(self) -> float | None:
        """What scores are multiplied by; None: Megatron's kv_channels ^ -0.5."""
        scaling = self.position_embedding.scaling
        if not (self.multi_latent_attention and scaling is not None and scaling.mscale_all_dim):
            return self.attention_multiplier
        scale = self.attention_multiplier or self.kv_channels**-0.5
        return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2

    def _complete_latent(self) -> None:
        if self.multi_latent_attention and self.kv_channels is None:
            self.kv_channels = self.qk_head_dim + self.qk_pos_emb_head_dim
        if self.latent_layernorm_epsilon == self.layernorm_epsilon:
            self.latent_layernorm_epsilon = None

    def _latent_rules(self) -> Iterator[tuple[bool, str]]:
        """(whether it is broken, what is said then)."""
        if not self.multi_latent_attention:
            for key in fields(LatentConfig):
                value = getattr(self, key.name)
                yield (
                    value != key.default,
                    f"model.{key.name}={value} says nothing without model.multi_latent_attention=true; leave it out",
                )
            return
        tp, with_it = self.tensor_model_parallel_size, "with model.multi_latent_attention=true"
        head = self.qk_head_dim + self.qk_pos_emb_head_dim
        yield self.kv_channels != head, f"model.kv_channels={self.kv_channels} must be {head} {with_it}, or null"
        yield (
            self.num_query_groups != self.num_attention_heads,
            f"model.num_query_groups={self.num_query_groups} must be model.num_attention_heads={self.num_attention_heads}, or "
            f"null, {with_it}",
        )
        yield (
            self.v_head_dim > head,
            f"model.v_head_dim={self.v_head_dim} must be at most {head}, a query head's channels",
        )
        for name in ("add_qkv_bias", "qk_layernorm"):
            yield getattr(self, name), f"model.{name}=true is not computed {with_it}; set it to false"
        epsilon = self.latent_layernorm_epsilon
        yield (
            epsilon is not None and epsilon <= 0,
            f"model.latent_layernorm_epsilon={epsilon} must be above 0; null for model.layernorm_epsilon",
        )
        yield self.fp8 is not None, f"model.fp8={self.fp8} is not computed {with_it}; set it to null"
        yield (
            self.no_rope_freq is not None,
            f"model.no_rope_freq={self.no_rope_freq} is not computed {with_it}, whose layers all rotate; set it to null",
        )
        yield (
            self.context_parallel_size > 1 and self.cp_comm_type != "all_gather",
            f"model.cp_comm_type={self.cp_comm_type} would send keys and values of all heads {with_it}; set it to all_gather, "
            "which sends the compressed rows",
        )
        for name, width in (
            ("q_lora_rank", self.q_lora_rank or 0),
            ("kv_lora_rank + model.qk_pos_emb_head_dim", self.kv_lora_rank + self.qk_pos_emb_head_dim),
        ):
            yield width % tp, f"model.{name}={width} is not divisible by model.tensor_model_parallel_size={tp}"
