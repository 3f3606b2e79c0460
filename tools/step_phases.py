"""Where the seconds of a run's steps go: shares of sampling, scoring, updates and the rest, out of its metrics.jsonl.

    python tools/step_phases.py runs/grpo
    python tools/step_phases.py runs/grpo runs/grpo_vllm --skip 5

Timers that a run logs (docs/metrics.md), one column for each run; "the rest" is what no timer names, e.g. packing. The first
steps, which pay for warming up, are skipped. Validations are no part of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_common import print_table

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors
from recipes.run.metrics import REST, WHOLE, seconds_of
from tools.run_metrics import read_metrics


def phases(run: Path, skip: int) -> dict[str, float]:
    """Mean seconds of a step by timer, the whole step first, and what is left.

    Raises:
        UserError: not a run, or it has no step behind those that are skipped.
    """
    rows = [row for row in read_metrics(run) if WHOLE in row][skip:]
    if not rows:
        raise UserError(f"{run} has no {WHOLE} behind the first {skip} steps: let it run longer, or set --skip lower")
    found = [{WHOLE: row[WHOLE]} | seconds_of(row) for row in rows]
    names = dict.fromkeys(name for step in found for name in step)
    return {name: statistics.fmean(step.get(name, 0.0) for step in found) for name in names}


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of GRPO")
    parser.add_argument("--skip", type=int, default=2, help="steps at the beginning that are left out")
    args = parser.parse_args()
    if args.skip < 0:
        raise UserError(f"--skip={args.skip} must be 0 or more")
    found = [phases(run, args.skip) for run in args.runs]
    names = sorted(dict.fromkeys(name for f in found for name in f), key=lambda name: (name != WHOLE, name == REST))
    rows = [
        [name.removeprefix("timers/"), *(f"{f.get(name, 0.0):.2f} s, {f.get(name, 0.0) / f[WHOLE]:.1%}" for f in found)]
        for name in names
    ]
    print_table("seconds of a step, on average", ["", *map(str, args.runs)], rows)


if __name__ == "__main__":
    main()
