"""Bytes that autograd keeps between a stream's forward and backward pass, on one rank, by the operation that keeps them.

Counted once per storage, without parameters. Two ways to run a layer are known: `EAGER`, the CPU's, operation by
operation, which tests compare with what autograd saves; and `FUSED`, Transformer Engine's, whose norms keep their input
and one number per row, and whose SwiGLU keeps its input alone. `on_gpu` says which a GPU takes.

Symbols: t rows of the stream on this context-parallel rank, s those of the residual stream (t / tp under sequence
parallelism), u predicted tokens, h hidden size, n query and m key/value heads of this tensor-parallel rank, d head size,
f this rank's width of the MLP, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.planner.parameters import layers_of_stage
from megatron_ext.vision import VisionConfig

__all__ = [
    "EAGER", "FUSED", "FUSED_FP8", "Activations", "Implementation", "StreamShape", "expert_rows", "on_gpu", "places_of",
    "projected_width", "stage_activations",
]  # fmt: skip

INDEX, FP32, MASK_TYPE = 8, 4, 4


@dataclass(frozen=True)
class Implementation:
    """Which operations keep less than plain ones would."""

    fused_norm: bool
    fused_swiglu: bool
    fp8: bool = False


EAGER = Implementation(fused_norm=False, fused_swiglu=False)
FUSED = Implementation(fused_norm=True, fused_swiglu=True)
FUSED_FP8 = Implementation(fused_norm=True, fused_swiglu=True, fp8=True)
FP8 = 1


def on_gpu(transformer_impl: str, fp8: bool = False) -> Implementation:
    """How a GPU runs layers of `model.transformer_impl`; "auto" is taken for Transformer Engine.

    In FP8 linears keep their inputs in 8 bits, but for attention's output, which attention keeps in bf16 anyway; and a copy of
    their weights for each of two directions, of every stream.

    "local" has Megatron's fused SwiGLU, too, and torch's RMSNorm, which is one kernel on a GPU from torch 2.9 on (pull
    request 153666) and plain operations before. The torch that plans is taken for the one that will run.
    """
    if transformer_impl == "local":
        return Implementation(fused_norm=hasattr(torch.ops.aten, "_fused_rms_norm_backward"), fused_swiglu=True)
    return FUSED_FP8 if fp8 else FUSED


@dataclass(frozen=True)
class StreamShape:
    """One microbatch on one context-parallel rank.

    Attributes:
        tokens: rows, the pad included.
        predicted: rows of the vocabulary projection.
        media_rows: rows that hold a medium. media_tokens: features projected, each once.
        gathered: rows whose keys and values context-parallel ranks gather.
    """

    tokens: int
    predicted: int
    media_rows: int = 0
    media_tokens: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class Activations:
    """Bytes of one microbatch on one pipeline stage.

    Attributes:
        input: embedding and media, on the first stage.
        layer: of one layer, as it is kept until backward.
        shared: what all layers read, once.
        layers: layers of the stage.
        output: final norm and log-probabilities, on the last stage.
        recomputed: what backward makes again and holds beside, for one layer at a time.
        host: of one layer, in the host's memory: not in `kept`.
    """

    input: int
    layer: int
    layers: int
    shared: int
    output: int
    recomputed: int
    host: int = 0

    @property
    def kept(self) -> int:
        return self.input + self.layer * self.layers + self.shared + self.output

    @property
    def peak(self) -> int:
        return self.kept + self.recomputed


def stage_activations(
    config: GPTModelConfig, stage: int, stream: StreamShape, implementation: Implementation
) -> Activations:
    """What one microbatch keeps on a stage whose parameters all train."""
    granularity = config.activations_checkpoint_granularity
    t, h, e = stream.tokens, config.hidden_size, config.dtype.itemsize
    s = t // config.tensor_model_parallel_size if config.sequence_parallel else t
    shared = 2 * t * config.position_embedding.pairs(config.rotated_channels) * e  # cosines and sines
    host = 0
    if granularity == "full":
        layer, recomputed = s * h * e, _layer(config, s, stream, implementation, None)
        if config.activation_offload:  # the layer's own, and the next one's on its way
            host, layer, recomputed = layer, 0, recomputed + 2 * layer
    else:
        layer = _layer(config, s, stream, implementation, granularity)
        recomputed = _core_attention(config, t) if granularity == "selective" else 0
    first, last = stage == 0, stage == config.pipeline_model_parallel_size - 1
    return Activations(
        input=_input(config, stream) if first else 0,
        layer=layer,
        layers=len(layers_of_stage(config, stage)),
        shared=shared,
        output=_output(config, s, stream, implementation) if last else 0,
        recomputed=recomputed,
        host=host,
    )


def _heads(config: GPTModelConfig) -> tuple[int, int, int]:
    return *config.heads_per_rank, config.kv_channels


def projected_width(config: GPTModelConfig) -> int:
    """Of the queries, keys and values that core attention gets views of: all ranks', where these share key/value heads."""
    ranks = 1 if config.shares_key_value_heads else config.tensor_model_parallel_size
    return (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels // ranks


def _norm(rows: int, width: int, e: int, implementation: Implementation) -> int:
    """Of RMSNorm, its output excepted. Eagerly it works in fp32: input, 1 / rms and normalised input."""
    if implementation.fused_norm:
        return rows * (width * e + FP32)
    return rows * (2 * width + 1) * FP32


def _core_attention(config: GPTModelConfig, t: int) -> int:
    """Rotated queries and keys, values, output and log-sum-exp: nothing per query-key pair."""
    n, m, d = _heads(config)
    return t * ((2 * n + 2 * m) * d * config.dtype.itemsize + n * FP32)


def _layer(
    config: GPTModelConfig, s: int, stream: StreamShape, implementation: Implementation, granularity: str | None
) -> int:
    t, h, e = stream.tokens, config.hidden_size, config.dtype.itemsize
    n, m, d = _heads(config)
    f = config.ffn_hidden_size // config.tensor_model_parallel_size
    if any(config.layers_with_experts):
        f = 0  # its own, below
    projected = t * projected_width(config) * e
    kept = FP8 if implementation.fp8 else e
    # Both norms, and what their linears keep of their output.
    total = 2 * (_norm(s, h, e, implementation) + s * h * kept)
    selective = granularity == "selective"
    # Keys (and values, where no kernel of ours copies them) are views that keep the whole projection.
    whole = selective
    if config.qk_layernorm:
        total += _query_key_norms(config, t, implementation)
        whole = whole or e == FP32 or implementation.fused_norm
    total += projected if whole else 0
    total += _core_attention(config, t) + _latent(config, s, stream, implementation)
    if selective:  # neither its own copy of the values nor the log-sum-exp; the kind of mask, as a number
        total += MASK_TYPE - t * (m * d * e + n * FP32)
        if not config.qk_layernorm:
            # Not yet rotated: views of the projection, but for queries whose groups had to be joined.
            total -= t * (m + (0 if n > m > 1 else n)) * d * e
        if config.multi_latent_attention:  # values are views of what both were made in
            made = config.qk_head_dim + config.v_head_dim
            total -= n * (t * (2 * d - made) + stream.gathered * (d - made)) * e
    total += t * f * (2 * e + kept)  # into and out of SwiGLU
    if implementation.fp8:
        qkv = (config.num_attention_heads + 2 * config.num_query_groups) * d // config.tensor_model_parallel_size
        total += 2 * FP8 * h * (qkv + n * d + 3 * f)
    if not implementation.fused_swiglu:
        total += t * 2 * f * e  # the gate's output, and the other half once more
    total += _experts(config, t, implementation) if any(config.layers_with_experts) else 0
    return total if config.peft is None else total + _adapters(config, t)


def _adapters(config: GPTModelConfig, t: int) -> int:
    """Of a layer's adapters, at most: what A has given, and A and B of a linear side by side where it has several."""
    tp = config.tensor_model_parallel_size
    kept = {place: _adapters_at(config, place, t, tp) for place in config.linears if place != "mlp.experts"}
    if config.num_moe_experts is not None:
        local = config.num_moe_experts // config.expert_model_parallel_size
        ranks, sent = config.expert_tensor_ranks, expert_rows(config, t)
        kept["mlp.experts"] = _adapters_at(config, "mlp.experts", sent, ranks, local)
    dense = kept.pop("mlp", 0)
    attention = kept.pop("self_attention")
    return attention + max(dense, sum(kept.values()))


def _adapters_at(config: GPTModelConfig, place: str, rows: int, ranks: int, linears: int = 1) -> int:
    """At a place of a layer: of so many rows, cut over so many ranks, of so many linears of each kind."""
    total = 0
    for name, linear in config.linears[place].items():
        if not (branches := config.peft.branches(name)):
            continue
        wide = len(branches) * config.peft.dim
        total += rows * wide
        if len(linear.rows) > 1:
            total += linears * wide * (linear.inputs + sum(linear.rows.values()) // ranks)
    return total * config.dtype.itemsize


def expert_rows(config: GPTModelConfig, t: int) -> int:
    """Rows of experts on one rank, where all are equally busy: those of a stream that a tensor-parallel rank has, once for each
    expert that a token takes, and with those of the ranks that an expert is cut over."""
    return -(-t // config.tensor_model_parallel_size) * config.moe_router_topk * config.expert_tensor_ranks


def _experts(config: GPTModelConfig, t: int, implementation: Implementation) -> int:
    """Of the layers that keep more, with experts or without; an upper bound, by hand, of what Megatron's layer runs."""
    e, h, tp = config.dtype.itemsize, config.hidden_size, config.tensor_model_parallel_size
    x, own, sent = config.expert_width // config.expert_tensor_ranks, t // tp, expert_rows(config, t)
    # Logits, scores, weights and which are taken; where rows come from and go to, in both orders.
    total = own * config.num_moe_experts * (4 * FP32 + 2) + own * config.moe_router_topk * (3 * FP32 + 5 * INDEX)
    # Rows as experts get them, in the order of their experts; into and out of the gate, with and without the token's weight. One
    # that is clamped keeps two more, one by one.
    one_by_one = 5 if config.activation == "silu" else 7
    inner = (2 + 1) * x if implementation.fused_swiglu else (2 + one_by_one) * x
    gated = 3 if implementation.fused_swiglu else one_by_one
    total += sent * ((2 * h + inner) * e + 3 * FP32)
    if (shared := config.moe_shared_expert_intermediate_size) is not None:
        total += t * gated * (shared // tp) * e + own * h * e * 2
    dense = t * gated * (config.ffn_hidden_size // tp) * e
    return total if all(config.layers_with_experts) else max(total, dense)


def _latent(config: GPTModelConfig, s: int, stream: StreamShape, implementation: Implementation) -> int:
    """Beside what plain attention with as many heads keeps: compressed rows before and after their norms, and the output without
    what values were padded with. Of gathered rows the compressed ones, and keys and values that are made of them: those of plain
    attention are gathered again instead."""
    if not config.multi_latent_attention:
        return 0
    t, e, rank, row = stream.tokens, config.dtype.itemsize, config.q_lora_rank or 0, config.cached_channels
    heads = config.heads_per_rank[0]
    total = sum(_norm(s, width, e, implementation) for width in (rank, config.kv_lora_rank) if width)
    if (
        e == FP32 or implementation.fused_norm
    ):  # a norm's input is a view: of all rows, or of the shared key's channels as well
        total += (t - s) * rank * e if s < t else t * config.qk_pos_emb_head_dim * e
    made = t * (row + heads * config.v_head_dim) + stream.gathered * (row + 2 * heads * config.kv_channels)
    return total + (s * rank + made) * e


def _query_key_norms(config: GPTModelConfig, t: int, implementation: Implementation) -> int:
    """Without what the projection already keeps: keys are a view of it, queries are unless groups had to be joined."""
    n, m, d = _heads(config)
    e = config.dtype.itemsize
    total = t * (n + m) * FP32  # 1 / rms
    if not implementation.fused_norm:
        total += t * (n + m) * d * FP32  # normalised
        if e < FP32:
            return total + t * (n + m) * d * FP32  # fp32 copies of the inputs
    return total + (t * n * d * e if n > m > 1 else 0)


def _input(config: GPTModelConfig, stream: StreamShape) -> int:
    total = stream.tokens * INDEX
    if config.tensor_model_parallel_size > 1:
        total += stream.tokens  # which tokens another vocabulary shard holds
    if config.vision is not None and stream.media_rows:
        h, f, e = config.hidden_size, config.vision.feature_size, config.dtype.itemsize
        # Of a merger's norm each of four patches has its own numbers.
        each = {
            # Norm: input and two numbers; both linears' inputs; GELU's input.
            "norm_mlp": 2 * f * e + 2 * FP32 + 2 * h * e,
            "mlp": f * e + 2 * h * e,
            "onevision": places_of(config.vision) * (f * e + 2 * h * e),
            "merger": 4 * f * e + (8 + 2 * config.vision.deepstack) * FP32,
        }[config.vision.connector]
        if config.vision.deepstack:  # where it is added; a layer that is computed again keeps what is
            again = config.activations_checkpoint_granularity == "full"
            total += stream.media_rows * (INDEX + (config.vision.deepstack * h * e if again else 0))
        shown = places_of(config.vision) * _tower(config)
        total += stream.media_tokens * (each + shown) + 2 * stream.media_rows * INDEX
    return total


def places_of(vision: VisionConfig) -> int:
    """For how many of the tower's places a token stands, at most: of a video's frames half the rows and columns are left, and of
    an image in tiles (up to six times as long as high) what is no bar."""
    if vision.cuts_all:
        return 2
    return 4 if vision.condenses else 1


def _tower(config: GPTModelConfig) -> int:
    """Of the patches that a token shows, in a tower that trains: an upper bound, counted by hand from transformers' encoders."""
    vision = config.vision
    if not vision.has_tower or config.freeze_vision_model:
        return 0
    sizes, e = vision.kind.sizes(vision.tower_config), config.dtype.itemsize
    if config.activations_checkpoint_granularity == "full":
        layer = sizes.width * e
    else:
        # Two norms: input, output and two numbers; queries, keys, values and attention's output; the MLP's input and inside.
        layer = (9 * sizes.width + sizes.inside * sizes.linears) * e + 5 * FP32
        if vision.kind.merges:  # Qwen's rotate: queries, keys and their halves in fp32
            layer += 4 * sizes.width * FP32
    # Before the layers: pixels, patches, their sum with positions, a norm.
    return round(sizes.rows * (sizes.depth * layer + (sizes.pixels + 5 * sizes.width) * e))


def _output(config: GPTModelConfig, s: int, stream: StreamShape, implementation: Implementation) -> int:
    h, e, u = config.hidden_size, config.dtype.itemsize, stream.predicted
    gathered = config.tensor_model_parallel_size if config.sequence_parallel else 0
    indices = (3 if gathered else 2) * INDEX
    return _norm(s, h, e, implementation) + u * (h * e + indices + 2 * FP32)
