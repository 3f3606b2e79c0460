"""What of a model's configuration goes together, and what is said where it does not."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.errors import UserError
from megatron_ext.models.expert_config import ExpertConfig
from megatron_ext.models.fp8 import FP8_ROWS
from megatron_ext.models.latent_config import LatentConfig
from megatron_ext.models.linears import attention_linears, mlp_linears
from megatron_ext.models.placement import Placement
from megatron_ext.rotary import find_scheme
from megatron_ext.vision.kinds import merged_width

__all__ = ["ModelRules"]

ACTIVATIONS = ("silu", "quick_gelu")
SOFTMAX_TYPES = ("vanilla", "learnable", "off-by-one")


class ModelRules(ExpertConfig, LatentConfig, Placement):
    """Of `GPTModelConfig`, whose keys they are about: each rule is (whether it is broken, what is said then)."""

    def _rules(self) -> Iterator[tuple[bool, str]]:
        yield from super()._rules()
        yield from self._head_rules()
        yield from self._division_rules()
        yield from self._tower_rules()
        yield from self._attention_rules()
        if self.peft is not None:
            yield from self._peft_rules()
        yield from self._expert_rules()
        yield from self._gate_rules()
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

        tower_trains = self.vision is not None and self.vision.has_tower and not self.freeze_vision_model
        yield (
            self.freeze_language_model
            and (self.vision is None or (self.freeze_vision_projection and not tower_trains)),
            "model.freeze_language_model=true leaves nothing to train: set it to false, or train model.vision "
            "(freeze_vision_projection, freeze_vision_model)",
        )

    def _gate_rules(self) -> Iterator[tuple[bool, str]]:
        """Of what gates an MLP."""
        gate, clamp, offset = self.activation, self.activation_func_clamp_value, self.glu_linear_offset
        yield gate not in ACTIVATIONS, f"model.activation must be one of {', '.join(ACTIVATIONS)}, got {gate!r}"
        yield (
            clamp is not None and clamp <= 0,
            f"model.activation_func_clamp_value={clamp} must be above 0; null for none",
        )
        yield (
            gate == "silu" and (clamp is not None or offset != 0),
            f"model.activation_func_clamp_value={clamp}, model.glu_linear_offset={offset} need model.activation=quick_gelu",
        )
        yield (
            gate != "silu" and not all(self.layers_with_experts),
            f"model.activation={gate} is computed in experts alone, and some layers have none (model.num_moe_experts, "
            "model.moe_layer_freq); set it to silu",
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
        yield from self._latent_rules()
        position, pairs = self.position_embedding, self.position_embedding.pairs(self.rotated_channels)
        yield (
            pairs == 0,
            f"model.position_embedding.percent={position.percent} of {self.rotated_channels} channels of a head leaves no "
            "pair to rotate",
        )
        if position.scaling is not None:
            yield from position.scaling.rules(pairs, self.encoder_seq_length)
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
        yield (
            self.qk_layernorm_across_heads and (not self.qk_layernorm or groups % tp),
            f"model.qk_layernorm_across_heads=true needs model.qk_layernorm=true, and key/value heads "
            f"(model.num_query_groups={groups}) that divide by model.tensor_model_parallel_size={tp}",
        )
        yield from self.pipeline_split.rules()
        for name in ("num_attention_heads", "num_query_groups"):
            value, both = getattr(self, name), tp * self.context_parallel_size
            yield (
                self.cp_comm_type == "a2a" and value % both,
                f"model.{name}={value} does not divide by tensor_model_parallel_size x context_parallel_size={both}, "
                "which model.cp_comm_type=a2a needs; use all_gather",
            )

    def _tower_rules(self) -> Iterator[tuple[bool, str]]:
        """What a tower makes fits the model, and layers that it feeds stand where it stands."""
        if self.vision is None or not self.vision.has_tower or not self.vision.kind.merges:
            return
        width, fed = merged_width(self.vision.tower_config), self.vision.deepstack
        yield (
            width != self.hidden_size,
            f"the tower gives {width} numbers for each token, the language model takes {self.hidden_size} (model.hidden_size): "
            "choose the tower of a model of this width, or one whose connector starts anew (CLIP, SigLIP)",
        )
        here = len(self.pipeline_split.stage(0)[0])
        piece = f" in the first of {self.pipeline_split.pieces} pieces" if self.pipeline_split.pieces > 1 else ""
        yield (
            fed > self.num_layers,
            f"model.vision.tower_config has {fed} deepstack_visual_indexes, more than model.num_layers={self.num_layers}: each "
            "feeds a layer",
        )
        yield (
            fed > here,
            f"the first pipeline stage has {here} of model.num_layers={self.num_layers} layers{piece}, and the tower, which "
            f"stands there, feeds the first {fed} (model.vision.tower_config.deepstack_visual_indexes): give it as many "
            "(model.num_layers_in_first_pipeline_stage), or choose fewer stages or pieces",
        )

    def _peft_rules(self) -> Iterator[tuple[bool, str]]:
        """Of adapters."""
        yield (
            self.fp8 is not None,
            f"model.fp8={self.fp8}: adapters are not computed in 8 bits; set it, or model.peft, to null",
        )
        yield (
            self.transformer_impl == "transformer_engine",
            "model.transformer_impl=transformer_engine: its linears have no adapters here; set it to local, which is what auto "
            "means with model.peft",
        )
        yield (
            self.gradient_accumulation_fusion,
            "model.gradient_accumulation_fusion=true is for weights that train, and with model.peft they are frozen; set one of "
            "them otherwise",
        )
        here = {**attention_linears(self), **mlp_linears(0, 0)}
        names = {*here, *(part for linear in here.values() for part in linear.rows)}
        absent = [target for target in self.peft.target_modules if target not in names]
        yield (
            bool(absent),
            f"model.peft.target_modules: {', '.join(absent)} is no linear of this model, whose layers have {', '.join(here)}",
        )
        rows, tp = self.num_query_groups * self.kv_channels, self.tensor_model_parallel_size
        yield (
            rows % tp and {"k_proj", "v_proj"} & set(self.peft.parts),
            f"model.tensor_model_parallel_size={tp} does not divide the {rows} rows of keys (model.num_query_groups x "
            "model.kv_channels), whose adapters it would cut; leave linear_qkv, k_proj and v_proj out of "
            "model.peft.target_modules",
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
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
            value = getattr(self, name)
            yield value is not None and value <= 0, f"model.{name}={value} must be above 0"
        still = self.no_rope_freq
        yield (
            isinstance(still, list) and (len(still) != self.num_layers or not set(still) <= {0, 1}),
            f"model.no_rope_freq={still}: give a 0 or a 1 for each of the {self.num_layers} layers",
        )
        yield isinstance(still, int) and still < 1, f"model.no_rope_freq={still} must be at least 1"
        yield (
            self.softmax_type not in SOFTMAX_TYPES,
            f"model.softmax_type must be one of {', '.join(SOFTMAX_TYPES)}, got {self.softmax_type!r}",
        )
        cap = self.attn_logit_softcapping
        yield cap is not None and cap <= 0, f"model.attn_logit_softcapping={cap} must be above 0; null for no bound"
        yield (
            self.attention_plan == "levels" and size is not None,
            "model.attention_plan=levels cannot run sliding windows (model.window_size); set it to auto",
        )
