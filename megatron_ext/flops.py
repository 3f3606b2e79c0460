"""Floating-point operations of one pass over prefix groups, shared or repeated. Pure Python, no torch.

The count is of the useful multiply-adds of matrix products, each as two operations (the "model FLOPs" of
arXiv 2205.05198, appendix A): linear layers on every token of the stream, causal attention as half a square, and the
vocabulary projection of response rows only, in BOTH forms. Norms, rotary embedding and softmax are left out, and so is
whatever is computed twice to save memory. Backward counts twice the forward, so a ratio of two forms is the same with
and without it.

The repeated form is G sequences [prefix, response] without padding, which is also what this package runs with prefix
grouping off.

Symbols: P prefix length, S response lengths, G responses of a group, L layers, h hidden size, n query and m key/value
heads, d head size, f width of the MLP, v vocabulary. With experts a token's MLP is that of those it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.errors import UserError
from megatron_ext.prefix_tree import Nested, PrefixTree, causal_pairs

__all__ = [
    "BACKWARD_OVER_FORWARD",
    "Flops",
    "Lengths",
    "ModelShape",
    "attention_flops",
    "attention_pairs",
    "ideal_attention_speedup",
    "ideal_speedup",
    "model_flops",
    "num_predicted",
    "num_tokens",
    "sharing_pays",
]

# Every group as `PrefixTree.from_nested` reads it, (P, [S1, S2, ...]) or deeper; or its tree.
Lengths = Sequence[tuple[int, Sequence[Nested]] | PrefixTree]

# A product y = x w has two products in its backward, of the same size.
BACKWARD_OVER_FORWARD = 2
# Below this the second attention call of the shared form costs what it saves.
LEAST_SPEEDUP = 1.05


@dataclass(frozen=True)
class ModelShape:
    """What the counts need to know about a GPT; the names are GPTModelConfig's."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    vocab_size: int
    num_query_groups: int
    kv_channels: int
    # Of each layer, the rows before a query that it sees, None for all; empty: all rows in every layer.
    windows: tuple[int | None, ...] = ()
    # Weights of the linears of a layer's attention, and channels of a value head; None: of plain attention.
    attention_weights: int | None = None
    value_channels: int | None = None
    # Weights of all layers' MLPs that a token is multiplied with, of experts the chosen ones and the router's; None: no experts.
    active_mlp_weights: int | None = None

    @classmethod
    def of(cls, config) -> ModelShape:
        """Read a `GPTModelConfig`, whose vocabulary counts as padded: that many columns are computed."""
        return cls(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            ffn_hidden_size=config.ffn_hidden_size,
            vocab_size=config.padded_vocab_size,
            num_query_groups=config.num_query_groups,
            kv_channels=config.kv_channels,
            windows=tuple(config.layer_windows) if config.window_size is not None else (),
            attention_weights=config.latent_weights,
            value_channels=None if config.latent_weights is None else config.value_channels,
            active_mlp_weights=None if config.num_moe_experts is None else _active_mlp_weights(config),
        )

    @property
    def linear_weights_per_layer(self) -> float:
        """Weights of a layer's linears: QKV h(n + 2m)d, projection ndh, gated MLP 3hf; with experts those that a token meets, the
        mean of layers."""
        heads = 2 * self.num_attention_heads + 2 * self.num_query_groups
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        if self.active_mlp_weights is not None:
            mlp = self.active_mlp_weights / self.num_layers
        attention = self.attention_weights or self.hidden_size * heads * self.kv_channels
        return attention + mlp

    @property
    def channels_per_pair(self) -> float:
        """Half of a head's channels in its scores and in their product with the values."""
        return (self.kv_channels + (self.value_channels or self.kv_channels)) / 2

    @property
    def pairs_per_token(self) -> float:
        """What a token's linears cost, in query-key pairs of all heads: 2 operations per weight, 4 n d per pair."""
        return self.linear_weights_per_layer / (2 * self.num_attention_heads * self.channels_per_pair)


def _active_mlp_weights(config) -> int:
    h = config.hidden_size
    width = config.moe_router_topk * config.expert_width + (config.moe_shared_expert_intermediate_size or 0)
    routed = h * (3 * width + config.num_moe_experts + config.moe_shared_expert_gate)
    return sum(routed if has else 3 * h * config.ffn_hidden_size for has in config.layers_with_experts)


@dataclass(frozen=True)
class Flops:
    """Operations of one pass, by where they are spent."""

    linear: float
    attention: float
    vocabulary: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.vocabulary


def num_tokens(lengths: Lengths, share_prefix: bool = True) -> int:
    """Tokens that go through the layers: every node once when shared, once per response behind it when repeated."""
    trees = _trees(lengths)
    if share_prefix:
        return sum(tree.num_tokens for tree in trees)
    return sum(len(tree.leaves) * tree.prompt_length + sum(tree.response_lengths) for tree in trees)


def num_predicted(lengths: Lengths, share_prefix: bool = True) -> int:
    """Response tokens that some row predicts. The first token of a path without a prompt has no such row."""
    total = 0
    for tree in _trees(lengths):
        if not share_prefix:
            total += sum(s if tree.prompt_length else max(s - 1, 0) for s in tree.response_lengths)
            continue
        nodes = {node for leaf in tree.leaves for node in tree.path(leaf)}
        total += sum(max(tree.lengths[n] - (tree.first_positions[n] == 0), 0) for n in nodes)
    return total


def attention_pairs(lengths: Lengths, share_prefix: bool = True, window: int | None = None) -> float:
    """Query-key pairs of one head, a causal square of n rows as n^2 / 2.

    Shared: every node sees itself and what lies before it, P^2/2 + sum(S^2/2 + S P) for a plain group. Repeated:
    sum((P + S)^2/2). With a window a row sees at most that many rows before it.
    """
    pairs = 0.0
    for tree in _trees(lengths):
        if share_prefix:
            nodes = zip(tree.first_positions, tree.lengths, strict=True)
            pairs += sum(causal_pairs(first, length, window) for first, length in nodes)
        else:
            pairs += sum(causal_pairs(0, tree.prompt_length + s, window) for s in tree.response_lengths)
    return pairs


def _trees(lengths: Lengths) -> list[PrefixTree]:
    return [group if isinstance(group, PrefixTree) else PrefixTree.from_nested(group) for group in lengths]


def attention_flops(
    lengths: Lengths,
    num_heads: int,
    head_dim: float,
    share_prefix: bool = True,
    backward: bool = True,
    window: int | None = None,
) -> float:
    """Attention of one layer: 4 n d per pair forward (scores, and their product with the values)."""
    return _passes(backward) * 4 * num_heads * head_dim * attention_pairs(lengths, share_prefix, window)


def model_flops(shape: ModelShape, lengths: Lengths, share_prefix: bool = True, backward: bool = True) -> Flops:
    """A GPT over a stream: 2 operations per weight and token, attention, and 2hv per predicted token."""
    passes, tokens = _passes(backward), num_tokens(lengths, share_prefix)
    layers = Counter(shape.windows or (None,) * shape.num_layers)
    heads = (shape.num_attention_heads, shape.channels_per_pair)
    return Flops(
        linear=passes * 2 * shape.num_layers * shape.linear_weights_per_layer * tokens,
        attention=sum(
            count * attention_flops(lengths, *heads, share_prefix, backward, window) for window, count in layers.items()
        ),
        vocabulary=passes * 2 * shape.hidden_size * shape.vocab_size * num_predicted(lengths, share_prefix),
    )


def ideal_attention_speedup(lengths: Lengths) -> float:
    """Operations of the repeated form's attention over the shared form's."""
    return _ratio(attention_pairs(lengths, False), attention_pairs(lengths, True))


def ideal_speedup(shape: ModelShape, lengths: Lengths) -> float:
    """Operations of the whole repeated form over the shared form's: the speed-up of equal efficiency."""
    return _ratio(model_flops(shape, lengths, False).total, model_flops(shape, lengths, True).total)


def sharing_pays(shape: ModelShape, lengths: Lengths) -> bool:
    """Whether sharing prefixes promises at least LEAST_SPEEDUP."""
    return ideal_speedup(shape, lengths) >= LEAST_SPEEDUP


def _passes(backward: bool) -> int:
    return 1 + BACKWARD_OVER_FORWARD if backward else 1


def _ratio(repeated: float, shared: float) -> float:
    if not shared:
        raise UserError("a speed-up needs at least one token, got only empty groups")
    return repeated / shared
