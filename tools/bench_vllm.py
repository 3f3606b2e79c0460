"""Beside vLLM: our sampler on the same model, prompts and lengths, and how fast weights get to a server.

    make vllm
    python tools/bench_vllm.py sampling --repeats 5            # vLLM as it comes, compiled
    python tools/bench_vllm.py sampling --repeats 5 --eager
    python tools/bench_vllm.py weights --repeats 5

sampling: the model of bench_rollouts.py; every response gets its full length, and every round has prompts of its own, which no
prefix cache knows. The two take turns with as many threads each; vLLM, which looks for work all the time, is stopped (SIGSTOP)
while ours samples. What a run would wait for is timed: HTTP and JSON, and reading log-probabilities, are in the server's time.
weights: a model of 0.5 GB in fp32, in /dev/shm or --folder: `update_weights`, which a run does after every step (export, reload,
two passes of the canary), the export alone, and `cp` of the exported folder. Nothing else should run.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from bench_common import interleave, print_table, ratios, record, spread, write_results
from bench_rollouts import MODEL

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TEXT = "The quick brown fox jumps over 12 lazy dogs."
LARGE = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 2304,
         "vocab_size": 32768, "encoder_seq_length": 512, "precision": "32"}  # fmt: skip


def build(shape: dict, threads: int):
    """A model of random weights on one rank."""
    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed

    torch.set_num_threads(threads)
    device = initialize(ParallelSizes())
    set_seed(1)
    return build_gpt(GPTModelConfig(**shape), device)


@contextlib.contextmanager
def served(model, args: argparse.Namespace, folder: Path) -> Iterator:
    """A source with a server that has the model's weights."""
    from make_word_problems import train_tokenizer

    from megatron_ext.rollouts.vllm import Home, VllmSource
    from megatron_ext.vllm_servers import VllmOptions
    from recipes.data.tokenizer import load_tokenizer

    train_tokenizer(folder / "tokenizer", [TEXT], 300)
    tokenizer = load_tokenizer(folder / "tokenizer")
    canary = random.Random(2).choices(range(model.model_config.vocab_size), k=160)
    home = Home(folder, tokenizer.save, TEXT, tuple(tokenizer.encode(TEXT)), tuple(canary))
    # Its threads are as many as ours, where the system puts them: bound to cores they would keep one for the HTTP server.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    more = ("--enforce-eager",) if args.eager else ()
    options = VllmOptions(start=1, python=args.python, arguments=more, weights_dir=args.folder)
    source = VllmSource(model, options, home)
    try:
        source.update_weights(0)
        yield source
    finally:
        source.close()


@contextlib.contextmanager
def stopped(groups: Sequence[int]) -> Iterator[None]:
    """Process groups that get no processor meanwhile."""
    for group in groups:
        os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        for group in groups:
            os.killpg(group, signal.SIGCONT)


def sampling(args: argparse.Namespace, folder: Path) -> None:
    from megatron_ext.rollouts import MegatronSource, Request, SamplingParams

    model = build(MODEL, args.threads)
    params = SamplingParams(args.response, ignore_eos=True)

    def turns(source) -> Callable[[], None]:
        rng = random.Random(3)

        def turn() -> None:
            prompts = [rng.choices(range(MODEL["vocab_size"]), k=args.prompt) for _ in range(args.prompts)]
            found = source.sample(Request.each(prompts, args.samples, params))
            assert {len(t) for group in found for t in group} == {args.response}

        return turn

    with served(model, args, folder) as source:
        ours = turns(MegatronSource(model))

        def alone() -> None:
            with stopped(source.processes.pids):
                ours()

        seconds = interleave({"ours": alone, "vllm": turns(source)}, args.repeats, torch.device("cpu"))
    tokens = args.prompts * args.samples * args.response
    form = "eager" if args.eager else "compiled"
    rows = [
        [name, f"{spread(seconds[key]):.2f}", f"{spread([tokens / s for s in seconds[key]]):.0f}", speed]
        for name, key, speed in (
            (f"vLLM, {form}", "vllm", ""), ("ours", "ours", f"{ratios(seconds, 'vllm', 'ours'):.2f}"),
        )
    ]  # fmt: skip
    print_table(
        f"{args.prompts} prompts of {args.prompt} tokens x {args.samples} responses of {args.response}, {args.threads} threads",
        ["sampler", "seconds", "tokens a second", "times as fast as vLLM"],
        rows,
    )
    finish(args, f"vllm_sampling_{form}", seconds, model=MODEL)


def weights(args: argparse.Namespace, folder: Path) -> None:
    from megatron_ext.hf.export import export_hf

    model = build(LARGE, args.threads)
    with served(model, args, folder) as source:
        place = Path(tempfile.mkdtemp(dir=source.options.folder))
        kept, version = place / "kept", iter(range(1, 1_000_000))

        def fresh(write: Callable[[Path], object]) -> Callable[[], None]:
            def turn() -> None:
                write(place / "new")
                shutil.rmtree(place / "new")

            return turn

        def export(target: Path) -> None:
            export_hf(model, target, untied=True)

        try:
            export(kept)
            size = sum(path.stat().st_size for path in kept.iterdir())
            variants = {
                "update": lambda: source.update_weights(next(version)),
                "export": fresh(export),
                "cp": fresh(lambda target: subprocess.run(["cp", "-r", str(kept), str(target)], check=True)),
            }
            seconds = interleave(variants, args.repeats, torch.device("cpu"))
        finally:
            shutil.rmtree(place)
    names = {"update": "export, reload and canary", "export": "export alone", "cp": "`cp`"}
    rows = [
        [name, f"{spread(seconds[key]):.2f}", f"{spread([size / 1e9 / s for s in seconds[key]]):.2f}",
         f"{ratios(seconds, 'cp', key):.2f}"]
        for key, name in names.items()
    ]  # fmt: skip
    print_table(f"{size / 1e9:.2f} GB in {args.folder or '/dev/shm'}", ["", "seconds", "GB/s", "of cp"], rows)
    finish(args, "vllm_weights", seconds, model=LARGE, bytes=size)


def finish(args: argparse.Namespace, name: str, seconds: dict[str, list[float]], **more) -> None:
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("run", "json", "python")}
    write_results(args.json or ROOT / f"benchmarks/{name}_cpu.json", record(**settings) | more | {"seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for run in (sampling, weights):
        kind = kinds.add_parser(run.__name__)
        kind.set_defaults(run=run)
        kind.add_argument("--python", default=str(ROOT / ".venv-vllm/bin/python"), help="interpreter that has vLLM")
        kind.add_argument("--threads", type=int, default=2, help="of each of both")
        kind.add_argument("--repeats", type=int, default=5)
        kind.add_argument("--eager", action="store_true", help="vLLM without compilation")
        kind.add_argument("--folder", help="where weights are left for the server; default: /dev/shm")
        kind.add_argument("--json", type=Path)
    for name, count in (("prompts", 8), ("prompt", 1024), ("samples", 8), ("response", 128)):
        kinds.choices["sampling"].add_argument(f"--{name}", type=int, default=count)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        args.run(args, Path(folder))


if __name__ == "__main__":
    main()
