"""Looks at every node before a run holds its GPUs, and names the one that is not like the others.

    canary.py look  --folder F --gpus N                  on each node, with the run's own interpreter
    canary.py judge --folder F --gpus N --nodes a b c    on one: reads what they saw; exit code 1 names the bad nodes

Needs Python's standard library alone. Checked: the shared filesystem (each node writes where all must read), the GPUs, the
driver, the clock, and versions of Python and packages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

PACKAGES = ("megatron-core", "nemo-toolkit", "torch", "transformer-engine", "transformers")
CLOCK_SECONDS = 5.0
ALIKE = ("driver", "gpu", "python", "packages")


def look(folder: Path) -> None:
    """Write what this node is like to `folder`."""
    seen = {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        **gpus(),
    }
    name = os.environ.get("SLURMD_NODENAME") or platform.node()
    beside = folder / f".{name}"
    before = time.time()  # a driver that has to wake up takes longer than clocks may differ
    beside.write_text(json.dumps(seen), encoding="utf-8")
    seen["time"] = (before + time.time()) / 2
    seen["written"] = beside.stat().st_mtime  # by the filesystem's clock
    beside.write_text(json.dumps(seen), encoding="utf-8")
    beside.replace(folder / f"{name}.json")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpus() -> dict:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {"gpus": 0, "gpu": None, "driver": None}
    rows = (
        [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 1] if done.returncode == 0 else []
    )
    names, drivers = ([row[i] for row in rows] for i in (0, 1))
    return {"gpus": len(rows), "gpu": names[0] if names else None, "driver": drivers[0] if drivers else None}


def judge(folder: Path, nodes: list[str], gpus: int) -> list[str]:
    """One line for each thing that is wrong, beginning with the node."""
    found, wrong = {}, []
    for node in nodes:
        try:
            found[node] = json.loads((folder / f"{node}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            wrong.append(
                f"{node}: did not write to {folder.parent}: is that filesystem mounted there, and does the job's python start?"
            )
    for node, seen in found.items():
        if seen["gpus"] < gpus:  # more is where Slurm does not hide those of others
            wrong.append(f"{node}: has {seen['gpus']} GPUs that work, {gpus} were asked for")
        if abs(ahead := seen["time"] - seen["written"]) > CLOCK_SECONDS:
            wrong.append(f"{node}: its clock differs from the shared filesystem's by {ahead:+.0f} s")
    for key in ALIKE:
        values = Counter(json.dumps(seen[key], sort_keys=True) for seen in found.values())
        if len(values) > 1:
            usual = values.most_common(1)[0][0]
            for node, seen in found.items():
                if (text := json.dumps(seen[key], sort_keys=True)) != usual:
                    wrong.append(
                        f"{node}: {key} is {differs(seen[key], json.loads(usual)) or text}, others have {usual}"
                    )
    return wrong


def differs(here: object, there: object) -> str | None:
    """Of two mappings only what differs."""
    if not isinstance(here, dict) or not isinstance(there, dict):
        return None
    return ", ".join(
        f"{key} {value} (others {there.get(key)})" for key, value in here.items() if value != there.get(key)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("look", "judge"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="0: none are expected")
    parser.add_argument("--nodes", nargs="+", default=[])
    args = parser.parse_args()
    if args.command == "look":
        look(args.folder)
    elif wrong := judge(args.folder, args.nodes, args.gpus):
        print("error: the nodes are not fit for the run:\n  " + "\n  ".join(wrong), file=sys.stderr)
        sys.exit(1)
    else:
        seen = json.loads((args.folder / f"{args.nodes[0]}.json").read_text(encoding="utf-8"))
        print(f"{len(args.nodes)} nodes alike: {args.gpus} x {seen['gpu']}, driver {seen['driver']}, Python {seen['python']}, "
              + ", ".join(f"{name} {found}" for name, found in seen["packages"].items() if found))  # fmt: skip


if __name__ == "__main__":
    main()
