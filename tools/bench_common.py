"""What the benchmarks share: paired timing, peak memory of a fresh process, the machine's record, tables and JSON.

Not a benchmark itself; bench_attention.py and bench_step.py import it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.files import write_json
from megatron_ext.runtime.machine import machine, versions

__all__ = [
    "DTYPES",
    "PeakMemory",
    "Spread",
    "add_common_options",
    "device_and_threads",
    "interleave",
    "parse_shapes",
    "print_table",
    "ratios",
    "record",
    "run_fresh",
    "spread",
    "write_results",
]

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "megatron-core", "prefix_grouper", "numpy")
MIB = 1 << 20

Shape = tuple[int, int, int]


def parse_shapes(texts: Sequence[str]) -> list[Shape]:
    """["P,G,S", ...] -> [(P, G, S), ...]."""
    shapes = []
    for text in texts:
        try:
            p, g, s = (int(x) for x in text.split(","))
        except ValueError:
            raise SystemExit(f"--shapes takes P,G,S, got {text!r}; for example 4096,8,256") from None
        shapes.append((p, g, s))
    return shapes


def add_common_options(parser: argparse.ArgumentParser, shapes: Sequence[str] | None, repeats: int, name: str) -> None:
    if shapes is not None:
        parser.add_argument(
            "--shapes", nargs="+", default=list(shapes), metavar="P,G,S", help="prefix, responses, length"
        )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds, after one that is not counted")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = ROOT / "benchmarks" / f"{name}_{device}.json"
    parser.add_argument("--json", type=Path, default=default, help="where raw results go (default: %(default)s)")


def device_and_threads(threads: int | None) -> torch.device:
    """The GPU where there is one, else the CPU with that many threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(function: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = clock()
    function()
    return clock() - begin


def interleave(
    variants: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round: A B C, B C A, C A B, ... after one round that is not counted.

    A slow moment of the machine then hits all variants, and each comes first and last equally often.

    Args:
        clock: of the CPU; `time.process_time` counts what this process computed, for a machine that others use, too.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = _seconds(variants[name], device, clock)
            if number:
                times[name].append(seconds)
    return times


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def spread(values: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(median, low, high)


def ratios(times: dict[str, list[float]], slow: str, fast: str) -> Spread:
    """Round by round: how many times as fast `fast` was as `slow`."""
    return spread([a / b for a, b in zip(times[slow], times[fast], strict=True)])


class PeakMemory:
    """Largest growth of this process's memory over its state at `with`: resident set on the CPU, allocator on CUDA.

    Attributes:
        growth: bytes, valid after the block.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.growth = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be counted as already there
        Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's high-water mark to the present
        self.before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.growth = torch.cuda.max_memory_allocated() - self.before
        else:
            self.growth = _status_bytes("VmHWM") - self.before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory on the CPU needs Linux")


def run_fresh(arguments: Sequence[str]) -> dict:
    """Run the calling script in a new process with these arguments; its last line of output is its JSON answer."""
    command = [sys.executable, *(f"-W{w}" for w in sys.warnoptions), sys.argv[0], *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def record(**settings) -> dict:
    """Where and with what the numbers were taken; no names of hosts or people."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "machine": machine() | {"load_average_1min": round(os.getloadavg()[0], 2)},
        "versions": versions(PACKAGES),
        "settings": settings,
    }


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, so that it can be pasted into docs/benchmarks.md."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    print(f"\n{title}\n")
    for cells in (header, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |")


def write_results(path: Path, result: dict) -> None:
    """And say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"\nraw results: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
