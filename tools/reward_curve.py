"""What runs of GRPO learnt, out of their metrics.jsonl: reward, length and KL by stretches of steps, answers to held-out rows.

    python tools/reward_curve.py runs/grpo
    python tools/reward_curve.py runs/seed-1 runs/seed-2 runs/seed-3 --every 10 --last 5 --held-out 200

Several runs are taken as seeds of one: means over them, and in the last table their standard deviation. With --held-out, the
number of held-out rows, an accuracy has its binomial standard error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_common import print_table

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors
from tools.run_metrics import read_metrics

REWARD, HELD_OUT = "train_rollouts/reward", "val_rollouts/reward"
COLUMNS = {
    REWARD: "reward", "train_rollouts/response_length": "tokens", "train_rollouts/truncated": "cut off",
    "train_rollouts/groups_with_signal": "groups with signal", "train_optim/entropy": "entropy", "train_optim/kl": "KL",
}  # fmt: skip


def read(run: Path) -> list[dict[str, float]]:
    """Lines of a run's log, in order.

    Raises:
        UserError: not a run of GRPO.
    """
    rows = read_metrics(run)
    if not any(REWARD in row for row in rows):
        raise UserError(f"{run} is no run of GRPO that has made a step: name its folder (exp_manager.explicit_log_dir)")
    return rows


def stretches(runs: Sequence[list[dict[str, float]]], every: int) -> list[list[str]]:
    """Means over steps and runs, a row for each stretch."""
    last = max(row["step"] for rows in runs for row in rows)
    found = []
    for first in range(1, last + 1, every):
        rows = [row for rows in runs for row in rows if REWARD in row and first <= row["step"] < first + every]
        values = [[row[name] for row in rows if name in row] for name in COLUMNS]
        if rows:
            shown = [f"{statistics.fmean(v):.3f}" if v else "" for v in values]
            found.append([f"{first} to {max(row['step'] for row in rows)}", *shown])
    return found


def held_out(runs: Sequence[list[dict[str, float]]], count: int | None) -> list[list[str]]:
    """Of each validation: its step, and each run's accuracy."""

    def shown(value: float) -> str:
        return f"{value:.3f}" + (f" ± {(value * (1 - value) / count) ** 0.5:.3f}" if count else "")

    steps = sorted({row["step"] for rows in runs for row in rows if HELD_OUT in row})
    by_step = [{row["step"]: row[HELD_OUT] for row in rows if HELD_OUT in row} for rows in runs]
    return [[str(step), *(shown(values[step]) if step in values else "" for values in by_step)] for step in steps]


def ends(runs: Sequence[list[dict[str, float]]], last: int) -> list[list[str]]:
    """The last steps' reward and the last validation: each run's, and mean and deviation over runs."""
    found = []
    for name, count in ((REWARD, last), (HELD_OUT, 1)):
        values = [statistics.fmean(v[-count:]) for rows in runs if (v := [row[name] for row in rows if name in row])]
        if values:
            deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
            found.append([name, *(f"{value:.3f}" for value in values), f"{statistics.fmean(values):.4f}", deviation])
    return found


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their metrics.jsonl")
    parser.add_argument("--every", type=int, default=10, help="steps of a stretch")
    parser.add_argument("--last", type=int, default=5, help="steps at the end whose mean reward is told")
    parser.add_argument("--held-out", type=int, help="rows of data.validation_path")
    args = parser.parse_args()
    if min(args.every, args.last, args.held_out or 1) < 1:
        raise UserError("--every, --last and --held-out are numbers of 1 or more")
    runs, names = [read(run) for run in args.runs], list(map(str, args.runs))
    print_table(f"{len(runs)} runs, means", ["steps", *COLUMNS.values()], stretches(runs, args.every))
    if validations := held_out(runs, args.held_out):
        print_table("held-out rows", ["after step", *names], validations)
    print_table(
        f"the last {args.last} steps, and the last validation", ["", *names, "mean", "deviation"], ends(runs, args.last)
    )


if __name__ == "__main__":
    main()
