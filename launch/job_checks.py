"""What of a job is checked before it is submitted: options, folders, data, layout, memory, and what the recipe refuses."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_ext.errors import UserError
from recipes.cli.compose import compose, forced
from recipes.data.files import existing_files
from recipes.registry import RECIPES

if TYPE_CHECKING:
    from megatron_ext.planner import Estimate

__all__ = ["check"]

# What the job script says itself: (key, option that says it).
OWN_KEYS = (
    ("exp_manager.explicit_log_dir", "--run-dir"),
    ("trainer.num_nodes", "--nodes"),
    ("trainer.devices", "--gpus-per-node or --processes"),
)
# What this script says to sbatch: said twice, the job would not be the one that was checked.
OWN_OPTIONS = ("--nodes", "-N", "--job-name", "-J", "--output", "-o", "--export", "--gpus-per-node", "--ntasks", "-n",
               "--ntasks-per-node", "--array", "-a", "--wrap", "--parsable", "--test-only")  # fmt: skip
UNKNOWN_VOCABULARY = 1 << 17
PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
EXPERT_PARALLEL = ("expert_tensor_parallel_size", "expert_model_parallel_size")


def check(args: argparse.Namespace, overrides: list[str]) -> Estimate | None:
    """
    Returns:
        What the planner says of it; None where there are no GPUs, nothing is trained, or the vocabulary is not known.

    Raises:
        UserError: the first thing that would end the job.
    """
    processes = args.gpus_per_node if args.processes is None else args.processes
    if args.nodes < 1 or processes < 1 or args.gpus_per_node < 0 or args.reward_gpus < 0:
        raise UserError(
            f"--nodes {args.nodes}, --gpus-per-node {args.gpus_per_node}, --reward-gpus {args.reward_gpus}: give at least one "
            "node and one process on each (--processes where there are no GPUs)"
        )
    if args.gpus_per_node and processes > args.gpus_per_node:
        raise UserError(f"--processes {processes} on {args.gpus_per_node} GPUs: two ranks cannot share one")
    for option in args.sbatch:
        name = option.partition("=")[0]
        if name in OWN_OPTIONS or any(len(own) == 2 and name.startswith(own) for own in OWN_OPTIONS):
            raise UserError(f"--sbatch={option}: submit.py says {name} itself; use its own options")
    if args.recipe not in RECIPES:
        raise UserError(f"--recipe {args.recipe} does not exist; there are {', '.join(sorted(RECIPES))}")
    if args.reward_server and not RECIPES[args.recipe].asks_reward:
        asking = " and ".join(name for name, recipe in RECIPES.items() if recipe.asks_reward)
        raise UserError(f"--reward-server {args.reward_server}: {args.recipe} asks for no reward, only {asking} does")
    check_servers(args)
    own = list(OWN_KEYS)
    own += [("trainer.grpo.reward", "--reward-server")] if args.reward_server else []
    own += [("trainer.grpo.rollout.rendezvous", "--vllm-nodes")] if args.vllm_nodes else []
    for key, option in own:
        for override in overrides:
            if override.lstrip("+").partition("=")[0] == key:
                raise UserError(f"{override}: {option} says it for the whole job; leave the override out")
    check_run_dir(args.run_dir)
    check_container(args.container, args.mounts, "")
    check_container(args.vllm_container, args.vllm_mounts, "vllm-")
    config = composed(args, overrides, processes)
    check_layout(config, args.nodes * processes)
    if not args.container:  # inside, paths may be others
        check_data(config)
    return check_recipe(args, config)


def check_run_dir(folder: Path) -> None:
    if not folder.is_absolute():
        raise UserError(f"--run-dir {folder} must be absolute: every node resolves it")
    if "${" in str(folder):
        raise UserError(f"--run-dir {folder}: Hydra would fill in what follows the dollar; choose another name")
    parent = folder.parent
    if parent == parent.parent:
        raise UserError(f"--run-dir {folder}: name a folder of a filesystem that all nodes share, not of {parent}")
    if not os.path.lexists(parent):
        raise UserError(
            f"--run-dir {folder}: {parent} does not exist; is the shared filesystem mounted here? If so, mkdir -p {parent}"
        )
    existing = folder if folder.exists() else parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--run-dir {folder} cannot be made: {existing} is no folder to write to")


def check_servers(args: argparse.Namespace) -> None:
    """Options of nodes for vLLM."""
    if args.vllm_nodes < 0 or (args.vllm_gpus or 0) < 0:
        raise UserError(f"--vllm-nodes {args.vllm_nodes}, --vllm-gpus {args.vllm_gpus}: they must not be negative")
    if not args.vllm_nodes:
        for option in ("vllm_gpus", "vllm_container", "vllm_mounts"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise UserError(
                    f"--{name} {getattr(args, option)} is for nodes of vLLM: say how many with --vllm-nodes"
                )
    elif not RECIPES[args.recipe].samples:
        sampling = " and ".join(name for name, recipe in RECIPES.items() if recipe.samples)
        raise UserError(f"--vllm-nodes {args.vllm_nodes}: {args.recipe} samples no responses, only {sampling} does")


def check_container(image: str | None, mounts: str | None, whose: str) -> None:
    """
    Args:
        whose: what its options begin with.
    """
    if mounts and not image:
        raise UserError(f"--{whose}mounts {mounts} is for a container: name one with --{whose}container")
    if not image:
        return
    if image.startswith(("/", ".")) or image.endswith(".sqsh"):
        if not Path(image).is_file():
            raise UserError(f"--{whose}container {image} does not exist: name a .sqsh file or registry#image:tag")
    elif image.split() != [image]:
        raise UserError(f"--{whose}container {image!r} is no image: name a .sqsh file or registry#image:tag")
    for mount in (mounts or "").split(",") if mounts else ():
        source = mount.split(":")[0]
        if not source.startswith("/") or not Path(source).exists():
            raise UserError(
                f"--{whose}mounts {mount}: {source or 'nothing'} does not exist here; give /host:/container,..."
            )


def check_data(config: dict) -> None:
    """Files that `data` names must be there, as this folder sees them, in which the job will run."""
    data = config.get("data") or {}
    kinds = ("train_sets", "validation_sets")
    sets = ((f"{kind}.{name}.path", x) for kind in kinds for name, x in (data.get(kind) or {}).items())
    sets = {key: x.get("path") for key, x in sets if isinstance(x, dict)}
    for key, value in (data | sets).items():
        paths = value if isinstance(value, list) else [value]
        for path in paths if key.endswith(("_path", "_paths", ".path")) else ():
            if isinstance(path, str) and path and not Path(path).exists() and not existing_files(path):
                raise UserError(f"data.{key}={path} does not exist, seen from {Path.cwd()}")


def composed(args: argparse.Namespace, overrides: list[str], processes: int) -> dict:
    """The configuration that the ranks will have, checked as they check it."""
    servers = ["trainer.grpo.reward=http"] if args.reward_server else []
    if args.vllm_nodes:  # the job names the folder after its number
        servers += [f"trainer.grpo.rollout.rendezvous={quoted(f'{args.run_dir}.slurm')}"]
    own = [
        *servers,
        "exp_manager.explicit_log_dir=" + quoted(str(args.run_dir)),
        f"trainer.num_nodes={args.nodes}",
        f"trainer.devices={processes}",
    ]
    return compose(args.config, forced([*overrides, *own]))


def quoted(text: str) -> str:
    """As a value of Hydra's."""
    return "'" + text.replace("'", "\\'") + "'"


def check_recipe(args: argparse.Namespace, config: dict) -> Estimate | None:
    """What the recipe itself would refuse, on every rank; what the planner says of it."""
    from megatron_ext.models.placement import Placement
    from recipes.cli.config import build
    from recipes.environments.registry import get_environment
    from recipes.rewards.several import rewards_for
    from recipes.run.pretrained import Pretrained, configure
    from recipes.run.run_folder import check_run_folder

    recipe, device = RECIPES[args.recipe], "cuda" if args.gpus_per_node else "cpu"
    cls = recipe.config_class()
    folder = config["exp_manager"]["explicit_log_dir"]
    if not recipe.planned:
        typed = build(cls, config)
        if isinstance(typed.model, Placement):
            typed.model.on(device)
        check_run_folder(folder, *((cls, dataclasses.asdict(typed)) if recipe.resumes else ()))
        return None
    typed = configure(cls, config)
    typed.model.on(device)
    check_run_folder(folder, cls, dataclasses.asdict(typed))
    if typed.pretrained_checkpoint.restore_from_path:
        checkpoint = Pretrained.open(typed.pretrained_checkpoint.restore_from_path)
        if typed.model.vocab_size is not None:
            checkpoint.check(typed.model)
    if args.vllm_nodes and not args.container and not args.vllm_container:
        check_vllm(typed.trainer.grpo.rollout.python)
    if recipe.asks_reward:
        grpo = typed.trainer.grpo
        reward = reward_to_serve(args.reward_server) if args.reward_server else grpo.reward
        environment = grpo.environment
        if not is_own(environment):  # one's own need not be importable here
            environment = get_environment(environment)
            if not any(map(is_own, (reward, *(part.reward for part in grpo.rewards.values())))):
                rewards_for(reward, grpo.rewards, environment)
    return check_memory(args, typed) if recipe.planned else None


def check_vllm(python: str) -> None:
    if os.sep in python and not os.access(python, os.X_OK):
        raise UserError(
            f"trainer.grpo.rollout.python={python} is no program, seen from {Path.cwd()}: `make vllm` makes .venv-vllm, or name "
            "the interpreter of an environment with vLLM in it"
        )


def is_own(spec: Any) -> bool:
    """Whether it names something by its path."""
    name = spec.get("name", "") if isinstance(spec, dict) else spec
    return isinstance(name, str) and ("." in name or ":" in name)


def reward_to_serve(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--reward-server {text} is no YAML ({' '.join(str(error).split())})") from error


def check_memory(args: argparse.Namespace, config: Any) -> Estimate | None:
    """Batches that do not divide, and what cannot fit, are refused; what the planner expects is said."""
    from megatron_ext.planner import estimate
    from recipes.planning import job_of

    known = config.model.vocab_size is not None
    if not known:
        config.model.vocab_size = UNKNOWN_VOCABULARY  # the rest of the job can be checked
    job = job_of(config, device_type="cuda" if args.gpus_per_node else "cpu")
    if not args.gpus_per_node:
        return None
    if not known:
        print("memory not planned: model.vocab_size comes from the tokenizer", file=sys.stderr)
        return None
    estimated = estimate(job, args.gpu)
    if not estimated.fits:
        raise UserError(f"--config {args.config} {estimated.reason} (tools/plan.py finds one)")
    print(f"planned: {estimated.reason}", file=sys.stderr)
    return estimated


def check_layout(config: dict, processes: int) -> None:
    model = config.get("model") or {}
    sizes = {key: model.get(key, 1) for key in PARALLEL}
    together = 1
    for size in sizes.values():
        together *= size if isinstance(size, int) and size > 0 else 1
    if processes % together:
        parts = " x ".join(f"model.{key}={size}" for key, size in sizes.items())
        raise UserError(
            f"{processes} processes cannot be divided by {parts}: give nodes x processes that are a multiple of {together}"
        )
    experts = [model.get(key) for key in EXPERT_PARALLEL]
    experts[0] = experts[0] or sizes[PARALLEL[0]]  # null: as tensor_model_parallel_size
    together = math.prod(size for size in (*experts, sizes[PARALLEL[1]]) if isinstance(size, int) and size > 0)
    if processes % together:
        raise UserError(
            f"{processes} processes cannot be divided by model.{EXPERT_PARALLEL[0]}={experts[0]} x model.{EXPERT_PARALLEL[1]}="
            f"{experts[1]} x model.{PARALLEL[1]}={sizes[PARALLEL[1]]}: give nodes x processes that are a multiple of {together}"
        )
