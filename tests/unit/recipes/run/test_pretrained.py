"""The model that a run starts from: what of its architecture a YAML takes over."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from megatron_ext.errors import UserError
from megatron_ext.kinds import Kind, names
from megatron_ext.models import GPTModelConfig
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.runtime.checkpoint import INFO_FILE, WEIGHTS_FOLDER
from megatron_ext.runtime.checkpoint_files import self_checksum
from megatron_ext.vision import VisionConfig
from recipes.cli.config import build
from recipes.run.checkpoints import RUN_FILE, read_run_file
from recipes.run.pretrained import Pretrained, configure
from tests.gpt_cases import small_config


@dataclasses.dataclass
class Config:
    model: GPTModelConfig
    pretrained_checkpoint: dict


def checkpoint(folder: Path, head: int, position: PositionEmbedding, old: bool = False) -> Path:
    """What of a checkpoint says which model it holds; `old`: from before there were sections."""
    config = GPTModelConfig(2, 64, 4, 128, kv_channels=head, vocab_size=99, position_embedding=position, precision="32")
    model = dataclasses.asdict(config)
    if old:
        del model["position_embedding"]["sections"]
    return describe(folder, model)


def describe(folder: Path, model: dict) -> Path:
    info = {"model": model}
    (folder / WEIGHTS_FOLDER).mkdir(parents=True)
    (folder / INFO_FILE).write_text(json.dumps(info | {"checksum": self_checksum(info)}))
    return folder


SLIDING = small_config(precision="32", window_size=[4, 0], window_attn_skip_freq=2)
EXPERTS = small_config(
    precision="32", num_moe_experts=8, moe_router_topk=4, moe_shared_expert_intermediate_size=16, moe_router_num_groups=4,
    moe_router_group_topk=2,
)  # fmt: skip
LATENT = small_config(
    precision="32", multi_latent_attention=True, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8,
    num_query_groups=8, kv_channels=None, add_qkv_bias=False, qk_layernorm=False,
)  # fmt: skip
OTHER = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 32,
    "ffn_hidden_size": 24, "vocab_size": 62, "share_embeddings_and_output_weights": False,
    "add_qkv_bias": False, "qk_layernorm": False, "qk_layernorm_across_heads": True, "layernorm_epsilon": 0.25,
    "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.25,
    "position_embedding": PositionEmbedding("vrope"), "vision": VisionConfig(7), "window_size": [5, 0],
    "window_attn_skip_freq": [1, 1], "no_rope_freq": 2, "softmax_type": "learnable", "attn_logit_softcapping": 30.0,
    "kv_lora_rank": 24, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
OTHER_EXPERTS = {
    "num_moe_experts": 16, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": 2,
    "moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True, "moe_router_score_function": "sigmoid",
    "moe_router_norm_topk_prob": False, "moe_router_topk_scaling_factor": 2.5, "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 2, "moe_router_group_topk": 4, "moe_router_group_best": 1,
}  # fmt: skip
BIASED = small_config(
    precision="32", num_moe_experts=8, add_bias_linear=True, activation="quick_gelu", activation_func_clamp_value=7.0,
    glu_linear_offset=1.0,
)  # fmt: skip
OTHER_BIASED = {
    "add_bias_linear": False, "activation_func_clamp_value": 5.0, "glu_linear_offset": 0.5,
}  # fmt: skip
GATED = small_config(precision="32", num_moe_experts=8, activation="quick_gelu")
OTHERS = [
    (SLIDING, OTHER),
    (EXPERTS, OTHER_EXPERTS),
    (LATENT, {"multi_latent_attention": False, "q_lora_rank": 12, "latent_layernorm_epsilon": 0.125}),
    (BIASED, OTHER_BIASED),
    (GATED, {"activation": "silu"}),
]


@pytest.mark.parametrize("name", names(GPTModelConfig, Kind.ARCHITECTURE))
def test_every_key_that_shapes_the_model_is_compared_with_a_checkpoint(tmp_path, name):
    """A new one that is not in `OTHERS` fails here."""
    ((config, others),) = [pair for pair in OTHERS if name in pair[1]]
    opened = Pretrained.open(str(describe(tmp_path, dataclasses.asdict(config))))
    opened.check(config)
    other = copy.copy(config)
    setattr(other, name, others[name])  # without the rules, by which some values go with others alone
    with pytest.raises(ValueError, match=f"model.{name}=.*, but the checkpoint .* was made with {name}="):
        opened.check(other)


@pytest.mark.parametrize("idle", [{"moe_router_topk": 4, "moe_router_norm_topk_prob": False}, {"kv_lora_rank": 16}])
def test_what_says_nothing_of_a_saved_model_is_read_over(tmp_path, idle):
    """It was taken without a word once. A run that had it can be gone on with, and begun from."""
    saved = dataclasses.asdict(config := small_config(precision="32")) | idle
    opened = Pretrained.open(str(describe(tmp_path, saved)))
    opened.check(config)
    opened.check(build(GPTModelConfig, opened.architecture | {"precision": "32"}, "model"))
    (tmp_path / RUN_FILE).parent.mkdir(exist_ok=True)
    (tmp_path / RUN_FILE).write_text(yaml.safe_dump({"model": saved, "exp_manager": {}}))
    assert build(GPTModelConfig, read_run_file(tmp_path)["model"], "model") == config


def test_what_a_checkpoint_does_not_speak_of_came_after_it(tmp_path):
    """A model that was saved before there was a key has none of it, and no other model fits."""
    saved = dataclasses.asdict(config := small_config(precision="32"))
    for name in ("attn_logit_softcapping", "window_size", "window_attn_skip_freq", "vision"):
        del saved[name]
    opened = Pretrained.open(str(describe(tmp_path, saved)))
    opened.check(config)
    for name in ("attn_logit_softcapping", "vision"):
        with pytest.raises(ValueError, match=f"was made with {name}=None"):
            opened.check(dataclasses.replace(config, **{name: OTHER[name]}))


@pytest.mark.parametrize(
    ("head", "position", "sections"),
    [
        (64, {"scheme": "mrope_interleaved"}, [12, 10, 10]),  # as it was divided then; today [11, 11, 10]
        (256, {"scheme": "mrope_interleaved", "percent": 0.25}, [12, 10, 10]),
        (128, {"scheme": "mrope_interleaved"}, None),
        (64, {"scheme": "mrope"}, None),
        (64, {"scheme": "rope"}, None),
    ],
)
def test_a_checkpoint_from_before_there_were_sections_keeps_how_it_was_trained(tmp_path, head, position, sections):
    old = checkpoint(tmp_path / "old", head, PositionEmbedding(**position), old=True)
    new = checkpoint(tmp_path / "new", head, PositionEmbedding(**position))
    for folder, expected in ((old, sections), (new, None)):
        config = configure(Config, {"model": {}, "pretrained_checkpoint": {"restore_from_path": str(folder)}})
        assert config.model.position_embedding.sections == expected
        Pretrained.open(str(folder)).check(config.model)


def test_sections_go_with_the_scheme_that_they_belong_to(tmp_path):
    folder = checkpoint(tmp_path / "model", 64, PositionEmbedding("mrope_interleaved", sections=[16, 8, 8]))
    start = {"pretrained_checkpoint": {"restore_from_path": str(folder)}}
    for given, expected in (
        ({}, [16, 8, 8]),
        ({"base": 100.0}, [16, 8, 8]),
        ({"scheme": "mrope_interleaved"}, [16, 8, 8]),
        ({"scheme": "vrope"}, None),
        ({"scheme": "mrope", "sections": [0, 16, 16]}, [0, 16, 16]),
    ):
        config = configure(Config, start | {"model": {"position_embedding": given}})
        assert config.model.position_embedding.sections == expected, given


def test_the_tokens_that_end_a_response_are_those_of_the_generation_config(tmp_path):
    folder = checkpoint(tmp_path / "a", 16, PositionEmbedding())
    assert Pretrained.open(str(folder)).end_token_ids == []
    (folder / "source").mkdir()
    for named, ids in ((None, []), (7, [7]), ([7, 3], [7, 3])):
        (folder / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert Pretrained.open(str(folder)).end_token_ids == ids
    for content, words in (
        ("[1]", "is no JSON object"),
        ('{"eos_token_id": "</s>"}', "must be a token id or a list, got '</s>'"),
    ):
        (folder / "source" / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=words):
            Pretrained.open(str(folder)).end_token_ids  # noqa: B018
