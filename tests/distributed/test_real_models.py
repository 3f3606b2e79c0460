"""The YAML of real models: every one resolves, validates, builds every stage on the meta device, and fits or is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.planner import estimate
from megatron_ext.planner.parameters import model_parameters, stage_parameters
from megatron_ext.runtime.distributed import ParallelSizes
from recipes.planning import CONFIG_FOLDER, job_of, read_config
from tests.harness import run_ranks
from tests.pretend import be_alone, pretend

pytestmark = pytest.mark.distributed

# Billions of parameters, as published.
MODELS = {"llama3_1_8b": 8.03, "llama3_1_70b": 70.55, "qwen2_5_7b": 7.62, "qwen2_5_72b": 72.71, "qwen3_8b": 8.19}
RECIPES = ("sft", "grpo", "grpo_video", "lftf")
NODES = (1, 2, 8, 16)
LARGE = {"llama3_1_70b", "qwen2_5_72b"}
TINY = ("sft_tiny", "grpo_tiny", "grpo_guess_tiny", "sft_video_tiny", "grpo_video_tiny", "sft_bias_tiny", "lftf_tiny")
# Architecture from a checkpoint, models made by the recipe itself, or one for a CPU: nothing to plan.
OTHERS = {"eval_bias", "locate_bias", "video_niah", "grpo_smollm2"}


def read(recipe: str, model: str, nodes: int):
    return read_config(recipe, [f"model={model}", f"cluster={nodes}x8"])


@pytest.fixture(scope="module")
def configs() -> dict:
    return {key: read(*key) for key in product(RECIPES, MODELS, NODES)}


def build_stages(device: torch.device, configs: list[tuple[GPTModelConfig, int]]) -> list[list]:
    """Of each configuration, for every pipeline stage: (name, shape, whether sharded) of the first tensor rank's."""
    found = []
    for config, world in configs:
        stages = config.pipeline_model_parallel_size
        sizes = ParallelSizes(config.tensor_model_parallel_size, stages, config.context_parallel_size)
        found.append([])
        for stage in range(stages):
            pretend(stage * world // stages, world, sizes)
            model = build_gpt(config, torch.device("meta"))
            assert {p.device.type for p in model.parameters()} == {"meta"}
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
            found[-1].append(
                [(n, tuple(p.shape), getattr(p, "tensor_model_parallel", False)) for n, p in model.named_parameters()]
            )
    be_alone()
    return found


@pytest.fixture(scope="module")
def built(configs) -> list[tuple[str, str, GPTModelConfig, list]]:
    """Every distinct model and layout, built; and the tiny ones."""
    distinct: dict[str, tuple] = {}
    for (recipe, model, nodes), config in configs.items():
        m = config.model.on("cuda")
        sizes = (m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size)
        distinct.setdefault(repr((model, m.vision, sizes, nodes * 8)), (recipe, model, m, nodes * 8))
    for recipe in TINY:
        config = read_config(recipe, ["model.vocab_size=400"])
        distinct[recipe] = (recipe, recipe, config.model.on("cuda"), config.trainer.devices)
    cases = list(distinct.values())
    (results,) = run_ranks(build_stages, 1, [(m, world) for _, _, m, world in cases])
    return [(recipe, model, m, stages) for (recipe, model, m, _), stages in zip(cases, results, strict=True)]


def test_every_model_has_the_published_number_of_parameters(built):
    """Every stage of every layout is built on the meta device; the projector of media features comes on top."""
    seen = set()
    for _, model, config, stages in built:
        tensor = config.tensor_model_parallel_size
        sizes = {"media": 0, "text": 0}
        for parameters in stages:
            for name, shape, sharded in parameters:
                kind = "media" if name.startswith("media_projector") else "text"
                sizes[kind] += torch.Size(shape).numel() * (tensor if sharded else 1)
        assert sum(sizes.values()) == model_parameters(config)
        assert (sizes["media"] > 0) == (config.vision is not None)
        if model in MODELS:
            assert f"{sizes['text'] / 1e9:.2f}" == f"{MODELS[model]:.2f}"
            seen.add((model, config.vision is not None))
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
        assert estimated.fits == (model not in LARGE or recipe == "lftf" or nodes >= 8), estimated.reason
        assert estimated.reason.startswith("fits: " if estimated.fits else "does not fit: ")
        assert "\n" not in estimated.reason and f"on {nodes} x 8 H100" in estimated.reason
    for recipe in TINY:
        assert estimate(job_of(read_config(recipe, ["model.vocab_size=400"]))).bytes_per_rank < 1 << 30


def test_every_yaml_is_looked_at():
    """A new file has to be named here."""
    assert {path.stem for path in CONFIG_FOLDER.glob("*.yaml")} == set(RECIPES) | set(TINY) | OTHERS
