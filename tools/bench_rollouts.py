"""Sampling, response lengths alike and not: this checkout against another one, such as one with static batches.

    git worktree add ../static bb7ce5e
    python tools/bench_rollouts.py --against ../static

A small model on one rank, lengths forced: log-normal with a mean of 128 and sigma 0.8, cut at 1024, or all 128. Where a
checkout has no limits for each response, as before rollouts had a seam, a batch runs to its longest. One process for each
checkout, in turns, with the same interpreter. Nothing else should run: CPU seconds are told beside, which a busy machine
changes less.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 2, "ffn_hidden_size": 768,
         "vocab_size": 4096, "encoder_seq_length": 2048, "precision": "32"}  # fmt: skip
MEAN, SIGMA, CAP = 128, 0.8, 1024


def response_lengths(
    kind: str, prompts: int, samples: int, seed: int, mean: int = MEAN, cap: int = CAP
) -> list[list[int]]:
    """The same in every checkout."""
    rng = random.Random(seed)

    def one() -> int:
        return min(cap, max(1, round(rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA))))

    return [[mean if kind == "equal" else one() for _ in range(samples)] for _ in range(prompts)]


def work(options: argparse.Namespace) -> None:
    """Answer each line of input, a kind of lengths, with the seconds that it took."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import torch

    import megatron_ext
    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed

    torch.set_num_threads(options.threads)
    device = initialize(ParallelSizes())
    set_seed(1)
    model = build_gpt(GPTModelConfig(**MODEL), device)
    rng = random.Random(options.seed)
    prompts = [[rng.randrange(MODEL["vocab_size"]) for _ in range(options.prompt)] for _ in range(options.prompts)]
    here = Path(megatron_ext.__file__).resolve().parent  # of this checkout, whatever is installed
    assert here.parent == Path.cwd().resolve(), f"megatron_ext is that of {here.parent}"
    sampler = _continuous if (here / "rollouts").is_dir() else _static
    for line in sys.stdin:
        lengths = response_lengths(line.strip(), options.prompts, options.samples, options.seed)
        cpu, wall = time.process_time(), time.perf_counter()
        sampler(model, prompts, lengths)
        print("took", time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def _continuous(model, prompts: list[list[int]], lengths: list[list[int]]) -> None:
    from megatron_ext.rollouts import MegatronSource, Request, SamplingParams

    requests = Request.each(prompts, len(lengths[0]), SamplingParams(max(map(max, lengths))))
    found = MegatronSource(model).sample([r.limited(own) for r, own in zip(requests, lengths, strict=True)])
    assert [[len(t) for t in group] for group in found] == lengths


def _static(model, prompts: list[list[int]], lengths: list[list[int]]) -> None:
    from megatron_ext.models.generation import SamplingParams, UniformDraws, generate

    generate(model, prompts, len(lengths[0]), SamplingParams(max(map(max, lengths))), UniformDraws(1))


class Worker:
    """A checkout's process."""

    def __init__(self, checkout: Path, options: argparse.Namespace):
        arguments = [
            f"--{name}={getattr(options, name)}" for name in ("prompts", "samples", "prompt", "threads", "seed")
        ]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(checkout), str(ROOT / "tools")]), "OMP_NUM_THREADS": str(options.threads),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", *arguments], cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def seconds(self, kind: str) -> tuple[float, float]:
        """Wall-clock and CPU."""
        print(kind, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("took "):
                wall, cpu = map(float, line.split()[1:])
                return wall, cpu
        sys.exit(f"error: a worker ended with status {self._process.wait()}")

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(options: argparse.Namespace) -> None:
    from bench_common import (
        print_table,
        ratios,
        record,
        spread,
        write_results,
    )  # not in a worker: it has a checkout of its own

    names = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    workers = {name: Worker(checkout, options) for name, checkout in names.items()}
    rows, found = [], {}
    for kind in ("log-normal", "equal"):
        wall, cpu = ({name: [] for name in names} for _ in range(2))
        for number in range(options.repeats + 1):  # the first is not counted
            for name in list(names)[:: 1 if number % 2 else -1]:
                seconds = workers[name].seconds(kind)
                if number:
                    wall[name].append(seconds[0])
                    cpu[name].append(seconds[1])
        found[kind] = {"wall": wall, "cpu": cpu}
        speed = [f"{ratios(x, 'other', 'this'):.2f}" if options.against else "" for x in (wall, cpu)]
        for name in names:
            rows.append([kind, name, f"{spread(wall[name]):.2f}", f"{spread(cpu[name]):.2f}", *speed])
    for worker in workers.values():
        worker.end()
    lengths = response_lengths("log-normal", options.prompts, options.samples, options.seed)
    print_table(
        f"{options.prompts} prompts of {options.prompt} tokens x {options.samples} responses; log-normal lengths add up to "
        f"{sum(map(sum, lengths))} tokens, the longest has {max(map(max, lengths))}",
        ["lengths", "checkout", "seconds", "CPU seconds", "other / this", "the same of CPU seconds"],
        rows,
    )
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "against", "work")}
    write_results(options.json, record(**settings) | {"model": MODEL, "seconds": json.loads(json.dumps(found))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="responses of each")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/rollouts_cpu.json")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    (work if options.work else compare)(options)


if __name__ == "__main__":
    main()
