"""How long a run of one step takes as a whole process: imports, data, model, run folder, step, checkpoint.

    python tools/bench_start.py --runs 5
    python tools/bench_start.py --runs 5 --against ../another-checkout

A one-step SFT of the tiny model on one rank. With --against the same command runs in another checkout, in turns with this one and
with the same interpreter. Nothing else should run.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench_common import print_table, record, write_results

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "recipes/train_sft.py"


def measure(checkout: Path, data: Path, folder: Path) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds) of one run."""
    command = [
        sys.executable, SCRIPT, "--config-name", "sft_tiny", f"data.train_path={data / 'sft.jsonl'}",
        f"model.tokenizer={data / 'tokenizer'}", f"exp_manager.explicit_log_dir={folder}", "trainer.devices=1",
        "trainer.sft.max_steps=1", "data.validation_path=null",
    ]  # fmt: skip
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=os.environ, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} in {checkout} failed: {done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/start_cpu.json")
    args = parser.parse_args()
    checkouts = [ROOT, *([args.against.resolve()] if args.against else [])]
    found: dict[Path, list[tuple[float, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory(prefix="bench_start_") as place:
        folder = Path(place)
        make = [sys.executable, "tools/make_word_problems.py", "--out", folder / "data"]
        subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for number in range(args.runs + 1):  # the first of each only warms the disk's cache
            for index, checkout in enumerate(checkouts):
                figures = measure(checkout, folder / "data", folder / f"run-{index}-{number}")
                if number:
                    found[checkout].append(figures)
    result = record(runs=args.runs) | {"seconds": {}}
    rows = []
    for name, checkout in zip(("this", "other"), checkouts, strict=False):
        wall, cpu = ([round(figures[i], 2) for figures in found[checkout]] for i in (0, 1))
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=checkout, capture_output=True, text=True
        )
        result["seconds"][name] = {"commit": commit.stdout.strip(), "wall": wall, "cpu": cpu}
        rows.append([f"{name}, {commit.stdout.strip()}", *(f"{median(x)} [{min(x)}, {max(x)}]" for x in (wall, cpu))])
    print_table(
        "A one-step run as a whole process, medians [least, most]", ["checkout", "seconds", "CPU seconds"], rows
    )
    write_results(args.out, result)


if __name__ == "__main__":
    main()
