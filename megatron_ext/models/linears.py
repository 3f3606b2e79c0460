"""The linears of a layer: Megatron's, and which of Hugging Face's each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LinearShape", "attention_linears", "mlp_linears"]


@dataclass(frozen=True)
class LinearShape:
    """A linear of the whole model.

    Attributes:
        inputs: how many it reads.
        rows: outputs of each of Hugging Face's linears that it is, in their order.
        column: whether tensor-parallel ranks have rows of it each; else they have columns.
    """

    inputs: int
    rows: Mapping[str, int]
    column: bool = True

    @property
    def weights(self) -> int:
        return self.inputs * sum(self.rows.values())


def attention_linears(config) -> dict[str, LinearShape]:
    """Of plain attention or of latent one.

    Args:
        config: a `GPTModelConfig`.
    """
    h, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.kv_channels
    found: dict[str, LinearShape] = {}
    if not config.multi_latent_attention:
        keys = config.num_query_groups * config.kv_channels
        found["linear_qkv"] = LinearShape(h, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
    else:
        rank, latent = config.q_lora_rank, config.kv_lora_rank
        if rank is None:
            found["linear_q_proj"] = LinearShape(h, {"q_proj": queries})
        else:
            found["linear_q_down_proj"] = LinearShape(h, {"q_a_proj": rank})
            found["linear_q_up_proj"] = LinearShape(rank, {"q_b_proj": queries})
        compressed, made = latent + config.qk_pos_emb_head_dim, config.qk_head_dim + config.v_head_dim
        found["linear_kv_down_proj"] = LinearShape(h, {"kv_a_proj_with_mqa": compressed})
        found["linear_kv_up_proj"] = LinearShape(latent, {"kv_b_proj": heads * made})
    found["linear_proj"] = LinearShape(heads * config.value_channels, {"o_proj": h}, column=False)
    return found


def mlp_linears(hidden: int, width: int) -> dict[str, LinearShape]:
    """
    Args:
        hidden: the model's channels.
        width: between its two linears.
    """
    return {
        "linear_fc1": LinearShape(hidden, {"gate_proj": width, "up_proj": width}),
        "linear_fc2": LinearShape(width, {"down_proj": hidden}, column=False),
    }
