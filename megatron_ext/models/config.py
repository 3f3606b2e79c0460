"""The model's configuration: one typed dataclass with NeMo's key names, and its translation for Megatron."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from megatron.core.transformer.utils import is_layer_window_attention

from megatron_ext.errors import UserError
from megatron_ext.kinds import Architecture, Kind, Limit, Speed, Start, Training, names
from megatron_ext.models.fp8 import FP8_ROWS
from megatron_ext.models.placement import Placement
from megatron_ext.models.stages import PipelineSplit
from megatron_ext.rotary import RopeScaling, find_scheme

__all__ = ["ARCHITECTURE", "PLAIN", "GPTModelConfig", "PositionEmbedding", "VisionConfig", "stream_multiple"]

# What PyTorch's CUDA flash attention takes.
CUDA_HEAD_MULTIPLE, CUDA_LARGEST_HEAD = 8, 256
FUSED_GRADIENT = "fused_weight_gradient_mlp_cuda"
POSITIVE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels",
    "vocab_size", "encoder_seq_length", "make_vocab_size_divisible_by", "logprob_chunk_size",
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "virtual_pipeline_model_parallel_size",
)  # fmt: skip


@dataclass
class PositionEmbedding:
    """Rotary positions: which scheme places the tokens, and how fast the channels turn."""

    # How tokens of a video get their positions: rope (one after the other), mrope, mrope_interleaved, videorope, vrope,
    # or the dotted path of a Scheme of your own (docs/positions.md). All agree on text.
    scheme: str = "rope"
    # Base of the frequencies, Hugging Face's rope_theta: higher, and the slow channels turn slower, as for long
    # contexts.
    base: float = 10000.0
    # Share of the head dimension that is rotated, above 0; 1: all, as in Llama and Qwen.
    percent: float = 1.0
    # A rotated pair is two neighbouring channels (GPT-J), not one from each half (Llama, Qwen).
    interleaved: bool = False
    # Llama 3's stretching of low frequencies: {factor: 8, ...} as in a Hugging Face config.json; null: none.
    scaling: RopeScaling | None = None
    # How many of the rotated pairs each axis turns, Hugging Face's mrope_section, of mrope and mrope_interleaved: time, rows,
    # columns, e.g. [24, 20, 20]. null: the scheme's own division, which at 32 and 64 pairs is the published one.
    sections: list[int] | None = None

    def __post_init__(self):
        find_scheme(self.scheme)
        if self.sections is not None:
            self.sections = list(self.sections)
        if not 0 < self.percent <= 1:
            raise UserError(f"model.position_embedding.percent={self.percent} must lie in (0, 1]")
        if self.base <= 0:
            raise UserError(f"model.position_embedding.base={self.base} must be positive")

    def pairs(self, kv_channels: int) -> int:
        """Pairs of a head's channels that are rotated."""
        return len(range(0, int(kv_channels * self.percent), 2))


@dataclass
class VisionConfig:
    """What stands for a token of an image or video."""

    # Numbers per media token: pixels of its patch (times channels and frames), or what another encoder computed.
    feature_size: int

    def __post_init__(self):
        if self.feature_size < 1:
            raise UserError(f"model.vision.feature_size={self.feature_size} must be at least 1")


@dataclass
class GPTModelConfig(Placement):
    """A Llama/Qwen-shaped GPT (RMSNorm, SwiGLU, rotary positions) and how it is run.

    Key names are NeMo's where NeMo has one.
    """

    # Transformer blocks.
    num_layers: Architecture[int]
    # Width of the residual stream.
    hidden_size: Architecture[int]
    # Query heads of a block.
    num_attention_heads: Architecture[int]
    # Width inside a block's MLP (SwiGLU: of each of its two halves).
    ffn_hidden_size: Architecture[int]
    # Rows of the embedding; null: as many as the tokenizer has tokens. Published models have more.
    vocab_size: Architecture[int | None] = None
    # Key/value heads (grouped-query attention); null: as many as attention heads.
    num_query_groups: Architecture[int | None] = None
    # Head dimension; null: hidden_size / num_attention_heads.
    kv_channels: Architecture[int | None] = None
    # Longest prompt plus response, in tokens.
    encoder_seq_length: Limit[int] = 4096
    # Rows of the embedding are padded to a multiple of this times tensor_model_parallel_size, which must split them
    # evenly. Padding is never predicted.
    make_vocab_size_divisible_by: Training[int] = 16
    # One matrix for embedding and output, as small models have it.
    share_embeddings_and_output_weights: Architecture[bool] = True
    # Biases of the query, key and value projections, as Qwen2 has them.
    add_qkv_bias: Architecture[bool] = False
    # RMSNorm over each query and key head, as Qwen3 has it.
    qk_layernorm: Architecture[bool] = False
    # Added to the mean square in every RMSNorm.
    layernorm_epsilon: Architecture[float] = 1e-5
    # Standard deviation of freshly drawn weights; without meaning where weights are loaded.
    init_method_std: Start[float] = 0.02
    position_embedding: Architecture[PositionEmbedding] = field(default_factory=PositionEmbedding)
    # How images and videos are seen; null: a text model.
    vision: Architecture[VisionConfig | None] = None
    # Must be 0: what is dropped in a shared prompt would be so once per group, not once per response.
    attention_dropout: Training[float] = 0.0
    # Must be 0, as attention_dropout.
    hidden_dropout: Training[float] = 0.0
    # What the backward pass computes again instead of keeping, for memory against time: null, nothing; "selective", the
    # core attention; "full", whole layers. Set it where activations do not fit; results stay the same.
    activations_checkpoint_granularity: Speed[str | None] = None
    # Keep what full recomputation keeps, every layer's input, in the host's memory until its backward pass: 2 bytes x hidden_size
    # for each token and layer in bf16. It needs activations_checkpoint_granularity=full: all that layers keep without it would
    # take longer to copy than to compute again. Results stay the same.
    activation_offload: Speed[bool] = False
    # Sliding windows: [tokens before a token that it sees, 0]; null: all of them. It belongs to the weights, as
    # Mistral's. (A Hugging Face sliding_window counts the token itself: one more.)
    window_size: Architecture[list[int] | None] = None
    # Which layers slide, as Megatron has it: n, all but every n-th; or a list with a 1 for each that does. null: all.
    window_attn_skip_freq: Architecture[int | list[int] | None] = None
    # c bounds attention scores to (-c, c) by c tanh(score / c), Gemma 2's key; null: no bound.
    attn_logit_softcapping: Architecture[float | None] = None
    # The kernel that computes a weight's gradient adds it to the fp32 buffer, instead of one more. It needs a GPU and apex built
    # with its extension fused_weight_gradient_mlp_cuda, and an optimizer for all weights. Not yet run.
    gradient_accumulation_fusion: Speed[bool] = False
    # Tokens whose logits are held at a time; null: by a memory budget. Lower it where logits of a large vocabulary do
    # not fit.
    logprob_chunk_size: Speed[int | None] = None

    def __post_init__(self):
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.window_size is not None:
            self.window_size = list(self.window_size)
        if self.window_attn_skip_freq is not None and not isinstance(self.window_attn_skip_freq, int):
            self.window_attn_skip_freq = list(self.window_attn_skip_freq)
        for name in POSITIVE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads == 0:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        super().__post_init__()

    def _rules(self) -> Iterator[tuple[bool, str]]:
        yield from super()._rules()
        yield from self._head_rules()
        yield from self._division_rules()
        yield from self._attention_rules()
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            yield (
                value > 0,
                (
                    f"model.{name}={value}: a shared prefix would be dropped once per group, not once per response, so "
                    "grouping and repeating would differ; set it to 0"
                ),
            )
        yield (
            self.activations_checkpoint_granularity not in (None, "selective", "full"),
            (
                "model.activations_checkpoint_granularity must be null, selective or full, got "
                f"{self.activations_checkpoint_granularity!r}"
            ),
        )

        yield (
            self.activation_offload and self.activations_checkpoint_granularity != "full",
            "model.activation_offload=true moves the inputs of layers that are computed again, and needs "
            "model.activations_checkpoint_granularity=full, got "
            f"{self.activations_checkpoint_granularity or 'null'}",
        )

    def _head_rules(self) -> Iterator[tuple[bool, str]]:
        """Of a head's channels, and how positions turn them."""
        yield (
            self.kv_channels is None,
            (
                f"model.hidden_size={self.hidden_size} is not divisible by "
                f"model.num_attention_heads={self.num_attention_heads}; set model.kv_channels"
            ),
        )
        yield self.kv_channels % 2, f"model.kv_channels={self.kv_channels} must be even: rotary positions turn pairs"
        position, pairs = self.position_embedding, self.position_embedding.pairs(self.kv_channels)
        yield (
            pairs == 0,
            f"model.position_embedding.percent={position.percent} of model.kv_channels={self.kv_channels} channels leaves no "
            "pair to rotate",
        )
        try:
            find_scheme(position.scheme).axes_of_pairs(pairs, position.sections)
        except UserError as error:
            yield True, f"model.position_embedding: {error}"

    def _division_rules(self) -> Iterator[tuple[bool, str]]:
        """What must divide by what: by ranks, and heads by key/value heads."""
        tp = self.tensor_model_parallel_size
        for name in ("num_attention_heads", "ffn_hidden_size"):
            value = getattr(self, name)
            yield value % tp, f"model.{name}={value} is not divisible by model.tensor_model_parallel_size={tp}"
        groups = self.num_query_groups
        yield (
            groups % tp and tp % groups,
            f"model.num_query_groups={groups} is neither a multiple nor a divisor of model.tensor_model_parallel_size={tp}: "
            "ranks hold equally many key/value heads, or equally many share one",
        )
        rows = (self.num_attention_heads + 2 * groups) * self.kv_channels
        yield (
            rows % tp,
            f"model.tensor_model_parallel_size={tp} does not divide the {rows} rows of queries, keys and values "
            f"((model.num_attention_heads={self.num_attention_heads} + 2 x model.num_query_groups={groups}) x "
            f"model.kv_channels={self.kv_channels})",
        )
        yield (
            self.num_attention_heads % self.num_query_groups,
            (
                f"model.num_attention_heads={self.num_attention_heads} is not divisible by "
                f"model.num_query_groups={self.num_query_groups}"
            ),
        )
        yield from self.pipeline_split.rules()
        for name in ("num_attention_heads", "num_query_groups"):
            value, both = getattr(self, name), tp * self.context_parallel_size
            yield (
                self.cp_comm_type == "a2a" and value % both,
                f"model.{name}={value} does not divide by tensor_model_parallel_size x context_parallel_size={both}, "
                "which model.cp_comm_type=a2a needs; use all_gather",
            )

    def _fp8_rules(self) -> Iterator[tuple[bool, str]]:
        yield from super()._fp8_rules()
        if self.fp8 is None or self.fp8_recipe not in FP8_ROWS or self.kv_channels is None:
            return
        tp, multiple = self.tensor_model_parallel_size, FP8_ROWS[self.fp8_recipe]
        heads = self.num_attention_heads * self.kv_channels
        widths = {
            "model.hidden_size": self.hidden_size,
            "model.ffn_hidden_size per tensor-parallel rank": self.ffn_hidden_size // tp,
            "rows of queries, keys and values per tensor-parallel rank": (
                heads + 2 * self.num_query_groups * self.kv_channels
            )
            // tp,
            "channels of attention per tensor-parallel rank": heads // tp,
        }
        for name, width in widths.items():
            yield (
                width % multiple,
                f"{name}: {width} is no multiple of {multiple}, which model.fp8={self.fp8} with "
                f"model.fp8_recipe={self.fp8_recipe} needs; set model.fp8=null",
            )

    def _attention_rules(self) -> Iterator[tuple[bool, str]]:
        """Of sliding windows and the scores' bound."""
        size = self.window_size
        yield (
            size is not None and (len(size) != 2 or size[0] < 0 or size[1] != 0),
            f"model.window_size={size}: give [rows before a query, 0]; attention is causal, so the second is 0",
        )
        skip = self.window_attn_skip_freq
        yield (
            isinstance(skip, list) and len(skip) != self.num_layers,
            f"model.window_attn_skip_freq={skip}: give one number for each of the {self.num_layers} layers",
        )
        yield (
            (isinstance(skip, int) and skip < 1) or (isinstance(skip, list) and not set(skip) <= {0, 1}),
            f"model.window_attn_skip_freq={skip} must be a number of at least 1, or a list of 0 and 1",
        )
        yield (
            skip is not None and size is None,
            f"model.window_attn_skip_freq={skip} says which layers slide, but model.window_size is not set",
        )
        cap = self.attn_logit_softcapping
        yield cap is not None and cap <= 0, f"model.attn_logit_softcapping={cap} must be above 0; null for no bound"
        yield (
            self.attention_plan == "levels" and size is not None,
            "model.attention_plan=levels cannot run sliding windows (model.window_size); set it to auto",
        )

    @property
    def _capped(self) -> bool:
        return self.attn_logit_softcapping is not None

    def on(self, device_type: str) -> Self:
        """A copy for ranks on "cuda" or "cpu", in whose precision nothing is `auto`.

        Raises:
            UserError: what no such device runs.
        """
        found = super().on(device_type)
        if self.gradient_accumulation_fusion and device_type != "cuda":
            raise UserError(
                f"model.gradient_accumulation_fusion=true is a kernel for GPUs, and cannot run on {device_type}; set it to false"
            )
        if device_type == "cuda" and self.attention_kernel != "blockwise":
            if found.precision == "32":
                raise UserError(
                    "model.precision=32: the fast attention kernels of a GPU take bf16 only; set model.precision=bf16"
                )
            if self.kv_channels % CUDA_HEAD_MULTIPLE or self.kv_channels > CUDA_LARGEST_HEAD:
                raise UserError(
                    f"model.kv_channels={self.kv_channels}: the attention kernels of a GPU take multiples of "
                    f"{CUDA_HEAD_MULTIPLE} up to {CUDA_LARGEST_HEAD}"
                )
        return found

    def here(self) -> Self:
        """`on` this rank's device.

        Raises:
            UserError: also for what needs a library that is not installed here, and for more ranks than GPUs.
        """
        found = super().here()
        if self.gradient_accumulation_fusion and importlib.util.find_spec(FUSED_GRADIENT) is None:
            raise UserError(
                f"model.gradient_accumulation_fusion=true needs {FUSED_GRADIENT}, apex built with its CUDA extensions, which is "
                "not installed here; set it to false"
            )
        return found

    @property
    def pipeline_split(self) -> PipelineSplit:
        """Which layers each pipeline stage runs."""
        return PipelineSplit(
            self.num_layers,
            self.pipeline_model_parallel_size,
            self.num_layers_in_first_pipeline_stage,
            self.num_layers_in_last_pipeline_stage,
            self.virtual_pipeline_model_parallel_size or 1,
        )

    @property
    def heads_per_rank(self) -> tuple[int, int]:
        """Query and key/value heads that a tensor-parallel rank attends with; of fewer key/value heads than ranks it has one,
        and others have the same."""
        tp = self.tensor_model_parallel_size
        return self.num_attention_heads // tp, max(1, self.num_query_groups // tp)

    @property
    def shares_key_value_heads(self) -> bool:
        """Whether there are fewer key/value heads than tensor-parallel ranks, which then gather what they have projected."""
        return self.num_query_groups < self.tensor_model_parallel_size

    @property
    def layer_windows(self) -> list[int | None]:
        """Of each layer, how many rows before a query it sees; None: all."""
        slides = (
            is_layer_window_attention(self.window_size, self.window_attn_skip_freq, layer)
            for layer in range(1, self.num_layers + 1)
        )
        return [self.window_size[0] if s else None for s in slides]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary padded so that every tensor-parallel rank holds as many."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


ARCHITECTURE = names(GPTModelConfig, Kind.ARCHITECTURE)
# Of a model that does not speak of them, because its family has no such thing or it was saved before there was.
PLAIN = {
    field.name: field.default
    for field in dataclasses.fields(GPTModelConfig)
    if field.name in ARCHITECTURE and field.default is not dataclasses.MISSING
}


def stream_multiple(config: GPTModelConfig) -> int:
    """Stream lengths are padded to a multiple of this: 16 rows suit the matrix units, and sequence parallelism needs
    a multiple of the tensor-parallel size; in FP8 each of its ranks' rows are a multiple, too."""
    tp = config.tensor_model_parallel_size
    return math.lcm(16, tp * config.row_multiple if config.sequence_parallel else math.lcm(tp, config.row_multiple))
