"""Time and weigh a training step of LFTF, one block of 12, against full fine-tuning on the same model and batch.

    python tools/bench_lftf.py
    python tools/bench_lftf.py --blocks 0 6 11 --hidden 1024 --prompts 128

- step: seconds of gradient reset, forward and backward of the balanced loss over a batch of bias prompts, and the optimizer
  step, all variants in turn in one process.
- memory: peak growth over the state with the model in memory, each variant in a fresh process: gradient buffers, optimizer
  state, activations and whatever else two steps need.

The ideal is counted from products of matrices alone: a frozen weight costs no weight gradient, and blocks below the trained one
no backward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from bench_common import (
    MIB,
    PeakMemory,
    add_common_options,
    device_and_threads,
    interleave,
    print_table,
    ratios,
    record,
    run_fresh,
    spread,
    write_json,
)

SETTINGS = ("layers", "hidden", "heads", "ffn", "vocab", "precision", "prompts", "length")
FULL = "all"


def start() -> torch.device:
    from megatron_ext.runtime.distributed import ParallelSizes, initialize

    return initialize(ParallelSizes())


def build_model(args, device: torch.device):
    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.distributed import set_seed

    set_seed(0)
    config = GPTModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        ffn_hidden_size=args.ffn,
        vocab_size=args.vocab,
        precision=args.precision,
    )
    return build_gpt(config, device)


def make_step(args, model, device, what: str) -> Callable[[], object]:
    """One training step of the named variant, "all" or a block's number. Freezes the model accordingly."""
    from megatron_ext.blocks.blocks import train_only_block
    from megatron_ext.blocks.pairs import pack_pairs, split_pairs
    from megatron_ext.losses.lftf import pair_loss
    from megatron_ext.runtime.engine import Engine, Microbatch
    from megatron_ext.runtime.optim import OptimConfig

    if what != FULL:
        train_only_block(model, int(what))
    engine = Engine(model, OptimConfig(lr=1e-5))
    draws = torch.Generator().manual_seed(1)
    prompts = torch.randint(args.vocab, (args.prompts, args.length), generator=draws).tolist()
    microbatch = Microbatch(pack_pairs(prompts, (3, 8), model.model_config, device))
    frozen = torch.full((args.prompts, 2), 0.3, device=device)

    def loss(microbatch, logprobs, entropy):
        value = pair_loss("balanced", *split_pairs(logprobs), frozen).mean()
        return value, {"loss": value.detach()}

    def step():
        engine.zero_grad()
        engine.run([microbatch], loss)
        return engine.step()

    return step


def ideal(args, what: str) -> float:
    """Products of matrices, of the full step's: a block's forward, its inputs' and its weights' gradient weigh the same."""
    kv = args.hidden  # as many key/value heads as heads
    block = args.hidden * (2 * args.hidden + 2 * kv) + 3 * args.hidden * args.ffn
    head = (
        args.vocab * args.hidden * 2 * args.prompts / (args.prompts * (args.length + 2))
    )  # rows that predict, per token
    full = 3 * args.layers * block + 3 * head
    if what == FULL:
        return 1.0
    above = args.layers - 1 - int(what)
    return (args.layers * block + (above + 2) * block + 2 * head) / full


def memory(args) -> int:
    """Peak growth in bytes of making the engine and two steps, in this process."""
    device = start()
    model = build_model(args, device)
    with PeakMemory(device) as peak:
        step = make_step(args, model, device, args.fresh)
        for _ in range(2):
            step()
    return peak.growth


def bench(args) -> dict:
    names = [FULL, *map(str, args.blocks)]
    device = start()
    steps = {}
    for name in names:
        model = build_model(args, device)
        steps[name] = make_step(args, model, device, name)
    seconds = interleave(steps, args.repeats, device)
    steps.clear()
    growth = {}
    for name in names:
        options = [text for key in SETTINGS for text in (f"--{key}", str(getattr(args, key)))]
        options += ["--threads", str(torch.get_num_threads()), "--fresh", name]
        growth[name] = run_fresh(options)["peak_growth_bytes"]
    speedup = {name: vars(ratios(seconds, FULL, name)) for name in names}
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "seconds": seconds,
        "speedup_over_full": speedup,
        "ideal_share": {name: ideal(args, name) for name in names},
        "peak_growth_bytes": growth,
    }


def show(result: dict, args) -> None:
    rows = []
    for name, seconds in result["seconds"].items():
        growth, share = result["peak_growth_bytes"][name], ratios(result["seconds"], name, FULL)
        title = "all blocks" if name == FULL else f"block {name}"
        rows.append((title, f"{spread(seconds):.3f}", f"{share:.2f}", f"{result['ideal_share'][name]:.2f}",
                     f"{growth / MIB:.0f}", f"{growth / result['peak_growth_bytes'][FULL]:.2f}"))  # fmt: skip
    print_table(
        f"A training step: {args.layers} layers, hidden {args.hidden}, ffn {args.ffn}, vocabulary {args.vocab}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, {args.prompts} prompts of {args.length} tokens, "
        f"precision {args.precision}",
        (
            "trained",
            "seconds [quartiles]",
            "share of full [quartiles]",
            "ideal",
            "memory beyond the model, MiB",
            "share of full",
        ),
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, None, repeats=9, name="lftf")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 6, 11])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--fresh", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not all(0 <= block < args.layers for block in args.blocks):
        parser.error(f"--blocks must lie in 0..{args.layers - 1}")
    device_and_threads(args.threads)
    if args.fresh:
        print(json.dumps({"peak_growth_bytes": memory(args)}))
        return
    result = bench(args)
    show(result, args)
    write_json(args.json, record(**{name: getattr(args, name) for name in (*SETTINGS, "blocks", "repeats")}) | result)


if __name__ == "__main__":
    main()
