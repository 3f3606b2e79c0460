"""From a recipe's YAML to what the planner plans, without tokenizer, data or checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from megatron_ext.flops import ModelShape, sharing_pays
from megatron_ext.planner import Job
from recipes.bias.settings import LFTFConfig
from recipes.cli.compose import CONFIG_FOLDER, choices, compose, forced
from recipes.cli.config import ConfigError, build
from recipes.grpo.settings import GRPOConfig, GRPOModel
from recipes.registry import RECIPES
from recipes.sft.settings import SFTConfig

__all__ = ["cluster_choice", "job_of", "read_config"]

PLANNED = [recipe for recipe in RECIPES.values() if recipe.planned]


def read_config(
    name: str, overrides: Sequence[str] = (), nodes: int | None = None, folder: Path = CONFIG_FOLDER
) -> SFTConfig | GRPOConfig | LFTFConfig:
    """A YAML of `nemo_configs/` with overrides as on a recipe's command line. Keys marked ??? may stay unset.

    Args:
        nodes: instead of trainer.num_nodes. Where the YAML chooses a cluster, and the overrides do not, the layout is that
            of the largest known cluster with no more nodes.

    Raises:
        ConfigError: a YAML without trainer.sft, trainer.grpo or trainer.lftf; a key that does not exist.
        HydraException: no such file, or an override that cannot be read.
        UserError: whatever the recipe itself would refuse.
    """
    given = forced(overrides)
    name = name.removesuffix(".yaml")
    if nodes is not None:
        cluster = _cluster_choice(name, given, nodes, folder)
        given += [f"cluster={cluster}"] * (cluster is not None) + [f"++trainer.num_nodes={nodes}"]
    node = compose(name, given, folder, may_be_unset=True)
    recipe = next((recipe for recipe in PLANNED if recipe.section in (node.get("trainer") or {})), None)
    if recipe is None:
        sections = ", ".join(f"trainer.{recipe.section}" for recipe in PLANNED)
        raise ConfigError(f"{name} has none of {sections}: there is no training to plan")
    return build(recipe.config_class(), _filled(node))


def cluster_choice(name: str, overrides: Sequence[str], nodes: int, folder: Path = CONFIG_FOLDER) -> str | None:
    """The file of cluster/ for so many nodes: of the largest cluster with no more. None: the YAML chooses none, or the
    overrides do, or what is given cannot be read."""
    try:
        return _cluster_choice(name.removesuffix(".yaml"), forced(overrides), nodes, folder)
    except (ConfigError, HydraException):
        return None


def _cluster_choice(name: str, given: Sequence[str], nodes: int, folder: Path) -> str | None:
    if "cluster" not in choices(name, given, folder) or any(a.startswith("cluster=") for a in given):
        return None
    return _nearest_cluster(folder, nodes)


def _nearest_cluster(folder: Path, nodes: int) -> str:
    """The name of the largest cluster of no more nodes, else of the smallest; names are <nodes>x<GPUs>."""
    names = sorted((path.stem for path in folder.glob("cluster/*.yaml")), key=lambda stem: int(stem.split("x")[0]))
    return ([stem for stem in names if int(stem.split("x")[0]) <= nodes] or names[:1])[-1]


def _filled(node: Any, key: str = "") -> Any:
    """What a plan does not depend on, paths, may stay unset; each gets a name of its own, since two files must not be one."""
    if isinstance(node, dict):
        return {name: _filled(value, name) for name, value in node.items()}
    return f"{key}-not-set" if isinstance(node, str) and node == "???" else node


def job_of(
    config: SFTConfig | GRPOConfig | LFTFConfig,
    prompt: int | None = None,
    response: int | None = None,
    device_type: str = "cuda",
) -> Job:
    """One step of a recipe.

    Args:
        prompt, response: tokens; None: the longest that the configuration allows, hence an upper bound.
        device_type: of the ranks that are planned for.

    Raises:
        ConfigError: a negative prompt, a response without tokens, or, but for GRPO, a prompt without a response.
        UserError: ranks or batches that do not divide; no model.vocab_size; what no such device runs.
    """
    model = config.model.on(device_type)
    for name, value, least in (("prompt", prompt, 0), ("response", response, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} (tools/plan.py: --{name}) must be at least {least}")
    if isinstance(config, GRPOConfig):
        return _grpo(config, model, prompt, response)
    if prompt is not None and response is None:
        raise ConfigError(
            f"a sample is one document of prompt plus response: beside prompt={prompt} give response, too"
        )
    trainer = config.trainer
    blocks = trainer.lftf.most_blocks if isinstance(config, LFTFConfig) else 0
    length = model.encoder_seq_length if response is None else (prompt or 0) + response
    budget = model.micro_batch_tokens if isinstance(config, SFTConfig) else None
    return Job(
        model=model,
        nodes=trainer.num_nodes,
        devices=trainer.devices,
        groups=model.global_batch_size,
        # A sample is one document, whatever part of it is the prompt; LFTF's largest are its texts.
        prompt=0,
        response=length,
        groups_per_stream=model.micro_batch_size if budget is None else None,
        stream_tokens=budget,
        blocks=blocks,
        locates=bool(blocks) and trainer.lftf.estimator == "gradient",
        distributed_optimizer=model.optim.sharded,
        moments=model.optim.moments,
        overlap_grad_reduce=model.optim.overlap_grad_reduce,
        media_tokens=length if model.vision is not None else 0,
    )


def _grpo(config: GRPOConfig, model: GRPOModel, prompt: int | None, response: int | None) -> Job:
    trainer, grpo = config.trainer, config.trainer.grpo
    prompt = config.data.max_prompt_length if prompt is None else prompt
    response = grpo.length_params.max_length if response is None else response
    share = model.prefix_grouping
    if share == "auto" and model.vocab_size is not None:
        share = sharing_pays(ModelShape.of(model), [(prompt, [response] * grpo.samples_per_prompt)])
    groups = model.global_batch_size // grpo.samples_per_prompt
    by_tokens = model.micro_batch_tokens is not None
    return Job(
        model=model,
        nodes=trainer.num_nodes,
        devices=trainer.devices,
        groups=groups,
        prompt=prompt,
        response=response,
        samples=grpo.samples_per_prompt,
        updates=grpo.num_prompts_per_grpo_step // groups,
        share_prefix=bool(share),
        groups_per_stream=None if by_tokens else model.micro_batch_size,
        stream_tokens=model.micro_batch_tokens,
        scoring_passes=(config.why_old_pass is not None) + bool(grpo.initial_policy_kl_penalty),
        reference_copy=bool(grpo.initial_policy_kl_penalty) and model.peft is None,
        reference_on_host=grpo.offload_reference_policy,
        rollout=grpo.rollout.source != "vllm",
        rollout_tokens=grpo.rollout_tokens,
        distributed_optimizer=model.optim.sharded,
        moments=model.optim.moments,
        overlap_grad_reduce=model.optim.overlap_grad_reduce,
        # Where videos are seen, all of a prompt may be one.
        media_tokens=prompt if model.vision is not None else 0,
    )
