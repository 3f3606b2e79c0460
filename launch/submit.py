"""Submit a recipe to Slurm: check everything that can be checked here, show the command, then sbatch launch/slurm/job.sh.

    python launch/submit.py --recipe train_grpo --config grpo --nodes 2 --gpus-per-node 8 --run-dir /shared/runs/mine \
        --dry-run -- data.train_path=/shared/my.jsonl pretrained_checkpoint.restore_from_path=/shared/Qwen2.5-7B

What follows -- overrides the YAML, byte for byte. --dry-run submits nothing; --test-only asks Slurm whether and when it would
start the job. Options of sbatch itself come by --sbatch, each in one piece:
--sbatch=--account=me --sbatch=--partition=gpu --sbatch=--time=04:00:00
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.job_checks import check
from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors

if TYPE_CHECKING:
    from megatron_ext.planner import Estimate

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "launch" / "slurm" / "job.sh"
WITH_SERVERS = JOB.with_name("job_with_servers.sh")
# Variables of the job script that are the options' to set, whatever the environment says.
OWN_VARIABLES = ("ROOT", "RECIPE", "CONFIG", "RUN_DIR", "GPUS", "CANARY_GPUS", "CONTAINER", "MOUNTS", "REWARD", "VLLM",
                 "VLLM_CONTAINER", "VLLM_MOUNTS")  # fmt: skip
# Variables of the job script that the environment may set; they are shown.
FREE_VARIABLES = ("PYTHON", "SERVER_PYTHON", "VLLM_PYTHON", "CANARY_SECONDS", "RENDEZVOUS_PORT")
# Seconds before the end of its time at which a job is told to stop: for saving, and for the step in hand and the one
# that may begin before it is seen.
SAVING_SECONDS, STEPS_IN_HAND = 180, 2


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


def with_cluster(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The overrides, and cluster= for so many nodes where the YAML chooses one and the user does not."""
    from recipes.planning import cluster_choice

    chosen = cluster_choice(args.config, overrides, args.nodes)
    return [*overrides, f"cluster={chosen}"] if chosen else overrides


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
