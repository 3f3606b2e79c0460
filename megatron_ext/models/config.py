"""The model's configuration: one typed dataclass with NeMo's key names, and its translation for Megatron."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from megatron.core.transformer.utils import is_layer_window_attention

from megatron_ext.adapters.config import LoraConfig
from megatron_ext.errors import UserError
from megatron_ext.kinds import Architecture, Kind, Limit, Speed, Start, Training, kinds, names
from megatron_ext.models.config_rules import ModelRules
from megatron_ext.models.expert_config import ExpertConfig
from megatron_ext.models.latent_config import LatentConfig
from megatron_ext.models.linears import LinearShape, attention_linears, mlp_linears
from megatron_ext.models.stages import PipelineSplit
from megatron_ext.rotary import RopeScaling, find_scheme
from megatron_ext.vision.settings import VisionConfig

__all__ = [
    "ARCHITECTURE", "PLAIN", "GPTModelConfig", "PositionEmbedding", "stream_multiple", "vision_difference", "without_idle",
]  # fmt: skip

# What PyTorch's CUDA flash attention takes.
CUDA_HEAD_MULTIPLE, CUDA_LARGEST_HEAD = 8, 256
FUSED_GRADIENT = "fused_weight_gradient_mlp_cuda"
POSITIVE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels",
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "vocab_size", "encoder_seq_length",
    "make_vocab_size_divisible_by", "logprob_chunk_size", "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage", "virtual_pipeline_model_parallel_size",
)  # fmt: skip


@dataclass
class PositionEmbedding:
    """Rotary positions: which scheme places the tokens, and how fast the channels turn."""

    # How tokens of a video get their positions: rope (one after the other), mrope, mrope_interleaved, mrope_i, videorope, vrope,
    # vrope_views, qwen2_vl, qwen2_5_vl, qwen3_vl, ernie4_5_vl, hope, v2pe, circle_rope, the last three and qwen2_5_vl also with
    # numbers, "v2pe(stride=64)"; or the dotted path of a Scheme of your own (docs/positions.md). All but hope agree on text.
    scheme: str = "rope"
    # Base of the frequencies, Hugging Face's rope_theta: higher, and the slow channels turn slower, as for long
    # contexts.
    base: float = 10000.0
    # Share of the head dimension that is rotated, above 0; 1: all, as in Llama and Qwen.
    percent: float = 1.0
    # A rotated pair is two neighbouring channels (GPT-J), not one from each half (Llama, Qwen).
    interleaved: bool = False
    # How frequencies were stretched for longer sequences: {rope_type: yarn, factor: 4, ...} as in a Hugging Face config.json;
    # null: they were not.
    scaling: RopeScaling | None = None
    # How many of the rotated pairs each axis turns, Hugging Face's mrope_section, of the schemes that have sections: time, rows,
    # columns, e.g. [24, 20, 20] (ernie4_5_vl: rows, columns, time). null: the scheme's own division, which at 32 and 64 pairs is
    # the published one.
    sections: list[int] | None = None

    def __post_init__(self):
        find_scheme(self.scheme)
        if self.sections is not None:
            self.sections = list(self.sections)
        if not 0 < self.percent <= 1:
            raise UserError(f"model.position_embedding.percent={self.percent} must lie in (0, 1]")
        if self.base <= 0:
            raise UserError(f"model.position_embedding.base={self.base} must be positive")
        if self.scaling is not None and self.scaling.rope_type == "yarn" and self.base <= 1:
            raise UserError(f"model.position_embedding.base={self.base} must be more than 1 with rope_type=yarn")

    def pairs(self, kv_channels: int) -> int:
        """Pairs of a head's channels that are rotated."""
        return len(range(0, int(kv_channels * self.percent), 2))


@dataclass
class GPTModelConfig(ModelRules):
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
    # Biases of the router, of experts, and of attention's output, as gpt-oss has them; all layers then have experts.
    add_bias_linear: Architecture[bool] = False
    # What gates an MLP: "silu", SwiGLU's; or "quick_gelu", x sigmoid(1.702 x), gpt-oss's.
    activation: Architecture[str] = "silu"
    # An MLP's gate is cut at this from above, and what it gates at this from both sides; null: neither.
    activation_func_clamp_value: Architecture[float | None] = None
    # Added to what an MLP's gate multiplies, gpt-oss's 1.
    glu_linear_offset: Architecture[float] = 0.0
    # RMSNorm over each query and key head, as Qwen3 has it.
    qk_layernorm: Architecture[bool] = False
    # The norm of qk_layernorm spans all heads of a token together, as OLMoE has it, not each head.
    qk_layernorm_across_heads: Architecture[bool] = False
    # Added to the mean square in every RMSNorm.
    layernorm_epsilon: Architecture[float] = 1e-5
    # Embeddings are multiplied by it; this and the next three are Granite's.
    embedding_multiplier: Architecture[float] = 1.0
    # What attention and MLP add to the residual stream is multiplied by it.
    residual_multiplier: Architecture[float] = 1.0
    # Logits are divided by it.
    logits_scaling: Architecture[float] = 1.0
    # Scores are multiplied by it; null: by kv_channels ^ -0.5.
    attention_multiplier: Architecture[float | None] = None
    # Standard deviation of freshly drawn weights; without meaning where weights are loaded.
    init_method_std: Start[float] = 0.02
    position_embedding: Architecture[PositionEmbedding] = field(default_factory=PositionEmbedding)
    # How images and videos are seen; null: a text model.
    vision: Architecture[VisionConfig | None] = None
    # Leave the language model as it is, and train its eyes alone: the first of two stages.
    freeze_language_model: Training[bool] = False
    # Leave the vision tower as it is. It then runs once for each clip, and what it computed is kept.
    freeze_vision_model: Training[bool] = True
    # Leave the connector behind it as it is.
    freeze_vision_projection: Training[bool] = False
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
    # Layers that do not rotate, SmolLM3's: n, every n-th; or a list with a 1 for each that does not. null: all rotate.
    no_rope_freq: Architecture[int | list[int] | None] = None
    # "vanilla"; "learnable": a logit for each head joins every row's softmax and stands for no value, gpt-oss's sinks;
    # "off-by-one": the same, of 0.
    softmax_type: Architecture[str] = "vanilla"
    # c bounds attention scores to (-c, c) by c tanh(score / c), Gemma 2's key; null: no bound.
    attn_logit_softcapping: Architecture[float | None] = None
    # The kernel that computes a weight's gradient adds it to the fp32 buffer, instead of one more. It needs a GPU and apex built
    # with its extension fused_weight_gradient_mlp_cuda, and an optimizer for all weights. Not yet run.
    gradient_accumulation_fusion: Speed[bool] = False
    # Tokens whose logits are held at a time; null: by a memory budget. Lower it where logits of a large vocabulary do
    # not fit.
    logprob_chunk_size: Speed[int | None] = None
    # Train adapters alone and freeze the model that they stand on (docs/lora.md); {}: LoRA of rank 32 on all linears. null: all
    # weights train.
    peft: Training[LoraConfig | None] = None

    def __post_init__(self):
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.window_size is not None:
            self.window_size = list(self.window_size)
        if self.window_attn_skip_freq is not None and not isinstance(self.window_attn_skip_freq, int):
            self.window_attn_skip_freq = list(self.window_attn_skip_freq)
        if self.no_rope_freq is not None and not isinstance(self.no_rope_freq, int):
            self.no_rope_freq = list(self.no_rope_freq)
        if not isinstance(self.moe_layer_freq, int):
            everywhere = all(self.moe_layer_freq) and len(self.moe_layer_freq) == self.num_layers
            self.moe_layer_freq = 1 if everywhere else list(self.moe_layer_freq)
        for name in POSITIVE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        self._complete_latent()
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads == 0:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        super().__post_init__()

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
    def linears(self) -> dict[str, dict[str, LinearShape]]:
        """Of a layer, by their place in it and their names."""
        mlps = {place: mlp_linears(self.hidden_size, width) for place, width in self.mlp_widths.items()}
        return {"self_attention": attention_linears(self)} | mlps

    @property
    def layers_without_rope(self) -> list[int] | None:
        """Of each layer 1 where it does not rotate; None: all do."""
        every = self.no_rope_freq
        if isinstance(every, int):
            every = [int((layer + 1) % every == 0) for layer in range(self.num_layers)]
        return every if every and any(every) else None

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


def without_idle(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A model's keys as they were saved, but those that say nothing of it: before they were refused they might have any value."""
    sections = {"num_moe_experts": ExpertConfig, "multi_latent_attention": LatentConfig}
    idle = {
        key.name for switch, section in sections.items() if not saved.get(switch) for key in dataclasses.fields(section)
    }
    return {name: value for name, value in saved.items() if name not in idle}


_EYES = tuple(
    key.rpartition(".")[2]
    for key, kind in kinds(VisionConfig, "vision", Kind.ARCHITECTURE).items()
    if kind is Kind.ARCHITECTURE
)


def vision_difference(mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str | None:
    """The first thing in which two models' eyes differ, both as plain data, in words: what is here, and what there."""
    if mine is None or theirs is None:
        said = ["null" if eyes is None else "set" for eyes in (mine, theirs)]
        return None if mine is theirs else f"model.vision is {said[0]} here and {said[1]} there"
    mine, theirs = (
        dataclasses.asdict(VisionConfig(**eyes)) for eyes in (mine, theirs)
    )  # saved ones may lack newer keys
    for key in _EYES:
        if mine[key] != theirs[key]:
            here, there = (str(eyes[key])[:80] for eyes in (mine, theirs))
            return f"model.vision.{key} is {here} here and {there} there"
    return None


def stream_multiple(config: GPTModelConfig) -> int:
    """Stream lengths are padded to a multiple of this: 16 rows suit the matrix units, and sequence parallelism needs
    a multiple of the tensor-parallel size; in FP8 each of its ranks' rows are a multiple, too."""
    tp = config.tensor_model_parallel_size
    return math.lcm(16, tp * config.row_multiple if config.sequence_parallel else math.lcm(tp, config.row_multiple))
