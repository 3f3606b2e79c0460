"""What the YAML of LFTF, of locating and of bias evaluation may say, and what is refused in one line."""

from __future__ import annotations

import pytest

from megatron_ext.blocks.places import ModelPlace
from recipes.bias.settings import BiasEvalConfig, LFTFConfig, LocateConfig
from recipes.cli.config import build

EXPERTS = {"num_moe_experts": 4}


def lftf(**changes) -> LFTFConfig:
    node = {
        "trainer": {"lftf": {"max_perplexity": None} | changes.pop("lftf", {})},
        "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64} | changes.pop("model", {}),
        "data": changes.pop("data", {}),
        "exp_manager": {"explicit_log_dir": "runs/x"},
        "pretrained_checkpoint": {"restore_from_path": "somewhere"} | changes.pop("checkpoint", {}),
    }  # fmt: skip
    assert not changes
    return build(LFTFConfig, node)


def test_defaults():
    config = lftf()
    assert config.trainer.lftf.weights == {"balanced": 1.0, "hint": 1.0} and config.trainer.lftf.block == "gradient"
    assert lftf(lftf={"block": 3}).trainer.lftf.named_places == (ModelPlace(3),)
    named = lftf(lftf={"block": [{"block": 3, "part": "mlp"}, {"block": 1, "heads": [3, 0]}]}).trainer.lftf
    assert named.named_places == (ModelPlace(1, "attention", (0, 3)), ModelPlace(3, "mlp")) and named.estimator is None
    assert lftf(lftf={"block": "intervention", "places": "heads", "num_places": 12}).trainer.lftf.most_blocks == 12
    assert lftf(lftf={"block": "all"}, model={"activations_checkpoint_granularity": "full"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lftf": {"block": "first"}}, "trainer.lftf.block must be a number, all or one of similarity, gradient"),
        ({"lftf": {"block": 4}}, "trainer.lftf.block: block 4 does not exist: the model has 4 blocks, 0 to 3"),
        ({"lftf": {"block": -1}}, "block -1 does not exist"),
        (
            {"lftf": {"block": {"block": 1, "heads": [4]}}},
            "trainer.lftf.block: head 4 of block 1 does not exist: .* 4 heads",
        ),
        (
            {"lftf": {"block": {"block": 1, "part": "norm"}}},
            "trainer.lftf.block: .* is no place; name a block's number",
        ),
        ({"lftf": {"block": [1, 1]}}, "trainer.lftf.block: '1' and '1' overlap"),
        (
            {"lftf": {"block": 1, "places": "heads"}},
            "places=heads and num_places=1 are what an estimator chooses among",
        ),
        (
            {"lftf": {"block": "similarity", "places": "parts"}},
            "trainer.lftf.places: similarity compares .* ranks no parts",
        ),
        ({"lftf": {"places": "rows"}}, "trainer.lftf.places: 'rows' are no places to rank; there are: blocks, parts"),
        ({"lftf": {"places": "parts", "num_places": 7}}, "num_places=7, but there are 6 parts to choose from"),
        ({"lftf": {"num_places": 0}}, "trainer.lftf.num_places=0 must be at least 1"),
        (
            {"lftf": {"places": "heads"}, "model": {"peft": {"dim": 4}}},
            "names parts of blocks or heads, and model.peft gives whole blocks adapters",
        ),
        ({"lftf": {"exclude_blocks": [0, 9]}}, "trainer.lftf.exclude_blocks: block 9 does not exist: the model has 4"),
        ({"lftf": {"exclude_blocks": [0, 1, 2, 3]}}, "trainer.lftf.exclude_blocks: all 4 blocks are excluded"),
        ({"lftf": {"exclude_blocks": [0, 0]}}, "trainer.lftf.exclude_blocks: block 0 is excluded twice; name each"),
        ({"lftf": {"locate_prompts": 0}}, "trainer.lftf.locate_prompts=0 must be at least 2"),
        ({"lftf": {"loss": "balanced+hints"}}, "trainer.lftf.loss: loss 'hints' in 'balanced.hints' does not exist"),
        ({"lftf": {"loss": "balanced+kl"}}, "has kl, which needs text to stay near to: set data.text_path"),
        ({"lftf": {"max_perplexity": 1.03}}, "guards the perplexity of data.validation_text_path, which is not set"),
        ({"lftf": {"min_pronoun_mass": 1.5}}, "min_pronoun_mass=1.5 is a share: at most 1"),
        ({"lftf": {"max_steps": 0}}, "trainer.lftf.max_steps=0 must be at least 1"),
        ({"model": {"activations_checkpoint_granularity": "full"}}, "gives a block above frozen ones no gradient"),
        (
            {"model": {"gradient_accumulation_fusion": True}},
            "gradient_accumulation_fusion=true adds to the gradient buffers of all weights.*set it to false",
        ),
        (
            {"model": {"num_layers": 4, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}},
            "virtual_pipeline_model_parallel_size=2 needs weights that train in every piece .* here one block does",
        ),
        ({"checkpoint": {"restore_from_path": None}}, "name the checkpoint to fine-tune"),
        ({"model": EXPERTS | {"expert_model_parallel_size": 2}}, "expert_model_parallel_size=2: here .* set it to 1"),
        (
            {"model": EXPERTS | {"moe_aux_loss_coeff": 0.1}},
            "moe_aux_loss_coeff=0.1 teaches routers beside what is asked",
        ),
        (
            {"model": EXPERTS | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01}},
            "moe_router_bias_update_rate=0.01 teaches routers beside what is asked.*set it to 0",
        ),
    ],
)
def test_lftf_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        lftf(**changes)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (BiasEvalConfig, {"data": {"split": "half"}}, "data.split must be train, dev, test or all, got 'half'"),
        (BiasEvalConfig, {"data": {"winobias_paths": ["a"]}}, "give two, a pro_stereotyped file and the anti_ster"),
        (BiasEvalConfig, {"pretrained_checkpoint": {"delta_path": "d"}}, "delta_path=d needs the checkpoint"),
        (
            LocateConfig,
            {"trainer": {"locate": {"estimators": ["entropy"]}}},
            "trainer.locate.estimators: BMI estimator 'entropy' does not exist; there are: sim",
        ),
        (LocateConfig, {"trainer": {"locate": {"places": []}}}, "trainer.locate.places is empty: name some of blocks"),
        (
            LocateConfig,
            {"trainer": {"locate": {"places": ["heads"]}}},
            "estimators: similarity compares .* ranks no heads",
        ),
        (LocateConfig, {"trainer": {"locate": {"estimators": []}}}, "trainer.locate.estimators is empty"),
        (
            LocateConfig,
            {"data": {"prompts": {"pair": {"first": " "}}}},
            "first and second must be two different words, got '' and 'she'",
        ),
        (
            LocateConfig,
            {"data": {"prompts": {"pair": {"second_hint": "his"}}}},
            "first_hint and second_hint must be two different words",
        ),
        (LocateConfig, {"pretrained_checkpoint": {}}, "restore_from_path is not set"),
        *[
            (cls, {"model": {"expert_model_parallel_size": 2}}, "expert_model_parallel_size=2: here .* set it to 1")
            for cls in (BiasEvalConfig, LocateConfig)
        ],
        (
            BiasEvalConfig,
            {"exp_manager": {"explicit_log_dir": "x", "resume_if_exists": True}},
            "an evaluation cannot be gone on with, only started",
        ),
    ],
)
def test_evaluation_refusals(cls, changes, message):
    node = {"exp_manager": {"explicit_log_dir": "x"}, "pretrained_checkpoint": {"restore_from_path": "y"}}
    with pytest.raises(ValueError, match=message):
        build(cls, node | changes)
