"""Submit a recipe to Slurm: check everything that can be checked here, show the command, then sbatch launch/slurm/job.sh.

    python launch/submit.py --recipe train_grpo --config grpo --nodes 2 --gpus-per-node 8 --run-dir /shared/runs/mine \
        --dry-run -- data.train_path=/shared/my.jsonl pretrained_checkpoint.restore_from_path=/shared/Qwen2.5-7B

What follows -- overrides the YAML, byte for byte. --dry-run submits nothing; --test-only asks Slurm whether and when it would
start the job. Options of sbatch itself come by --sbatch, each in one piece:
--sbatch=--account=me --sbatch=--partition=gpu --sbatch=--time=04:00:00
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from megatron_ext.errors import UserError
from recipes.cli.compose import compose, forced
from recipes.cli.errors import user_errors
from recipes.data.files import existing_files
from recipes.registry import RECIPES

if TYPE_CHECKING:
    from megatron_ext.planner import Estimate

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "launch" / "slurm" / "job.sh"
WITH_SERVERS = JOB.with_name("job_with_servers.sh")
# What the job script says itself: (key, option that says it).
OWN_KEYS = (
    ("exp_manager.explicit_log_dir", "--run-dir"),
    ("trainer.num_nodes", "--nodes"),
    ("trainer.devices", "--gpus-per-node or --processes"),
)
# What this script says to sbatch: said twice, the job would not be the one that was checked.
OWN_OPTIONS = ("--nodes", "-N", "--job-name", "-J", "--output", "-o", "--export", "--gpus-per-node", "--ntasks", "-n",
               "--ntasks-per-node", "--array", "-a", "--wrap", "--parsable", "--test-only")  # fmt: skip
# Variables of the job script that are the options' to set, whatever the environment says.
OWN_VARIABLES = ("ROOT", "RECIPE", "CONFIG", "RUN_DIR", "GPUS", "CANARY_GPUS", "CONTAINER", "MOUNTS", "REWARD", "VLLM",
                 "VLLM_CONTAINER", "VLLM_MOUNTS")  # fmt: skip
# Variables of the job script that the environment may set; they are shown.
FREE_VARIABLES = ("PYTHON", "SERVER_PYTHON", "VLLM_PYTHON", "CANARY_SECONDS", "RENDEZVOUS_PORT")
UNKNOWN_VOCABULARY = 1 << 17
# Seconds before the end of its time at which a job is told to stop: for saving, and for the step in hand and the one
# that may begin before it is seen.
SAVING_SECONDS, STEPS_IN_HAND = 180, 2
PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, overrides)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="file of recipes/ without .py")
    parser.add_argument("--config", required=True, help="file of nemo_configs/ without .yaml")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0: nodes without GPUs; see --processes")
    parser.add_argument("--gpu", default="H100", help="kind of GPU that memory is planned for: H100, H200, A100, B200")
    parser.add_argument("--processes", type=int, help="on each node (default: its GPUs)")
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="folder of the run, on a filesystem that all nodes share"
    )
    parser.add_argument("--container", help="image for pyxis: a .sqsh file, or registry#image:tag")
    parser.add_argument("--mounts", help="/host:/container,... beside the repository and the run's folder")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="an option for sbatch; may be repeated"
    )
    parser.add_argument("--reward-server", metavar="REWARD", help="serve this reward from one more node; GRPO asks it")
    parser.add_argument("--reward-gpus", type=int, default=0, help="of that node")
    parser.add_argument(
        "--vllm-nodes",
        type=int,
        default=0,
        help="nodes beside these, with trainer.grpo.rollout.start vLLM servers on each",
    )
    parser.add_argument("--vllm-gpus", type=int, help="of each of these nodes (default: --gpus-per-node)")
    parser.add_argument("--vllm-container", help="image for these nodes (default: --container)")
    parser.add_argument("--vllm-mounts", help="for that image")
    parser.add_argument("--dry-run", action="store_true", help="show the command, submit nothing")
    parser.add_argument("--test-only", action="store_true", help="let sbatch check it, submit nothing")
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


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


def with_cluster(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The overrides, and cluster= for so many nodes where the YAML chooses one and the user does not."""
    from recipes.planning import cluster_choice

    chosen = cluster_choice(args.config, overrides, args.nodes)
    return [*overrides, f"cluster={chosen}"] if chosen else overrides


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
    if not recipe.resumes:
        typed = build(cls, config)
        if isinstance(typed.model, Placement):
            typed.model.on(device)
        check_run_folder(folder)
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


def notice(estimated: Estimate | None) -> int:
    """Seconds before the end of its time at which the job is told to stop."""
    step = estimated.step.total if estimated else 0.0
    return SAVING_SECONDS + math.ceil(STEPS_IN_HAND * step)


def command(
    args: argparse.Namespace, overrides: list[str], estimated: Estimate | None
) -> tuple[list[str], dict[str, str]]:
    """(sbatch's command line, what is exported to the job)."""
    exported = {
        "ROOT": str(ROOT),
        "RECIPE": args.recipe,
        "CONFIG": args.config,
        "RUN_DIR": str(args.run_dir),
        "GPUS": str(args.gpus_per_node if args.processes is None else args.processes),
        "CANARY_GPUS": str(args.gpus_per_node),
    }
    if args.container:
        exported["CONTAINER"] = args.container
        if args.mounts:
            exported["MOUNTS"] = args.mounts
    # Jobs of one name wait for each other: those of one run folder, wherever it is.
    name = f"{args.run_dir.name}-{zlib.crc32(str(args.run_dir).encode()):08x}"
    parts = ["sbatch", "--parsable", f"--nodes={args.nodes}", f"--job-name={name}",
             f"--output={str(args.run_dir).replace('%', '%%')}.slurm/%j.log", "--export=ALL",
             f"--signal=B:USR1@{notice(estimated)}"]  # fmt: skip
    if args.gpus_per_node:
        parts.append(f"--gpus-per-node={args.gpus_per_node}")
    if args.test_only:
        parts.append("--test-only")
    parts += args.sbatch
    job = JOB
    if args.reward_server:
        job = WITH_SERVERS
        exported["REWARD"] = args.reward_server
        parts += part(args, f"{name}-reward", 1, args.reward_gpus)
    if args.vllm_nodes:
        job = WITH_SERVERS
        exported["VLLM"] = "yes"
        if args.vllm_container:
            exported["VLLM_CONTAINER"] = args.vllm_container
            exported |= {"VLLM_MOUNTS": args.vllm_mounts} if args.vllm_mounts else {}
        gpus = args.gpus_per_node if args.vllm_gpus is None else args.vllm_gpus
        parts += part(args, f"{name}-vllm", args.vllm_nodes, gpus)
    return [*parts, str(job), "--", *overrides], exported


def part(args: argparse.Namespace, name: str, nodes: int, gpus: int) -> list[str]:
    """One more part of a heterogeneous job. Account, partition and time are the first's. It has a name of its own: the job must
    not wait for its own other parts."""
    of_gpus = [f"--gpus-per-node={gpus}"] if gpus else []
    return [
        ":",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        "--export=ALL",
        f"--job-name={name}",
        *of_gpus,
        *args.sbatch,
    ]


@user_errors()
def main() -> int:
    args, overrides = arguments(sys.argv[1:])
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    overrides = with_cluster(args, overrides)
    estimated = check(args, overrides)
    parts, exported = command(args, overrides, estimated)
    inherited = {key: value for key, value in os.environ.items() if key not in OWN_VARIABLES}
    free = {key: inherited[key] for key in FREE_VARIABLES if key in inherited}
    shown = [f"{key}={shlex.quote(value)}" for key, value in (exported | free).items()]
    print(" ".join(shown) + " \\\n  " + " ".join(map(shlex.quote, parts)))
    if args.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node of the cluster, or look with --dry-run")
    if not args.test_only:
        Path(f"{args.run_dir}.slurm").mkdir(parents=True, exist_ok=True)
    return subprocess.run(parts, env=inherited | exported, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
