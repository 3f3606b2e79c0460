"""The first thing to run on a GPU: does this package do there what it does on the CPU, and how fast? (docs/gpu.md)

    python tools/gpu_check.py                          # one GPU, under ten minutes; gpu_check.json and tables
    python tools/gpu_check.py --wheels wheels          # where megatron-core is not installed, and pip cannot be used
    python tools/gpu_check.py --sections environment kernels
    python tools/gpu_check.py --device cpu             # every section at tiny sizes: that this script runs

Needs PyTorch and megatron-core; no network, NeMo, Hydra or pip. Each section runs under a time limit in a process that a crash
may take with it, and the file is written after everything that is found. Exit code 1 where a section failed, or none was ok.
Leaves out the recipes, which need NeMo, and several GPUs (tests/gpu and tests/distributed have them), but for a vLLM on the
second one, which weights are sent to.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nothing need be installed

from megatron_ext.errors import UserError  # noqa: E402
from tools.gpu.report import print_section, write_result  # noqa: E402
from tools.gpu.runner import Settings, run_plans  # noqa: E402
from tools.gpu.sections import SECTIONS  # noqa: E402
from tools.gpu.wheels import check_needed, unpack  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME",
                        help=f"of {', '.join(SECTIONS)}; default: all")  # fmt: skip
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="results (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack first")
    parser.add_argument("--seed", type=int, default=1, help="of every random number")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Limits are for a GPU: a CPU, which others may use, too, has time for all but a hang.
    longer = 20 if args.device == "cpu" else 1
    plans = [replace(plan, budget=longer * plan.budget) for name, plan in SECTIONS.items() if name in args.sections]
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            if args.wheels is not None:
                unpack(args.wheels, Path(unpacked))
            check_needed()
            if not args.json.absolute().parent.is_dir():
                raise UserError(f"--json {args.json}: its folder does not exist")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        sections = run_plans(
            plans,
            Settings(args.device, args.seed),
            save=lambda machine, found: write_result(args.json, machine, found),
            show=print_section,
            describe="tools.gpu.worlds:describe",
        )
    print(f"\n{'section':<12} {'status':<8} {'seconds':>7}")
    for section in sections:
        print(f"{section.name:<12} {section.status:<8} {section.seconds:>7.1f}  {section.reason or ''}")
    print(f"\nresults: {args.json}; docs/gpu.md says where to send them")
    statuses = {section.status for section in sections}
    return int("failed" in statuses or "ok" not in statuses)


if __name__ == "__main__":
    sys.exit(main())
