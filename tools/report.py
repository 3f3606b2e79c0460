"""One HTML page about runs: curves, seconds, distributions, samples, configuration; several runs are compared.

    python tools/report.py runs/grpo                               # runs/grpo/report.html
    python tools/report.py runs/grpo runs/other --out compared.html

The page is one file that needs nothing else and asks no other host. Distributions and samples are there where the run has
rollouts on disk (trainer.grpo.rollout_dump={}). docs/reports.md says what it shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from recipes.cli.errors import user_errors
from tools.reporting.page import MOST_RUNS, render
from tools.reporting.runs import names_of, read_run

FILE = "report.html"


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of runs, the first is what others are compared with"
    )
    parser.add_argument("--out", type=Path, help=f"file to write (default: {FILE} in the folder of a single run)")
    parser.add_argument(
        "--dumped-steps", type=int, default=60, help="steps with rollouts that are read at most, of each run"
    )
    parser.add_argument("--samples", type=int, default=4, help="steps of which responses are shown")
    args = parser.parse_args()
    if min(args.dumped_steps, args.samples) < 1:
        raise UserError("--dumped-steps and --samples are numbers of 1 or more")
    if len(args.runs) > MOST_RUNS:
        raise UserError(f"{len(args.runs)} runs are more than colours tell apart: name at most {MOST_RUNS}")
    if args.out is None and len(args.runs) > 1:
        raise UserError("several runs have no folder in common: say in --out where the page goes")
    runs = [read_run(folder, name) for folder, name in zip(args.runs, names_of(args.runs), strict=True)]
    out = args.out or args.runs[0] / FILE
    write_whole(out, render(runs, args.dumped_steps, args.samples))
    print(f"{out}: {out.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
