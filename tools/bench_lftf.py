"""Time and weigh a training step of LFTF, one block of 12, against full fine-tuning on the same model and batch.

    python tools/bench_lftf.py
    python tools/bench_lftf.py --blocks 0 6 11 --hidden 1024 --prompts 128
    python tools/bench_lftf.py --layers 30 --hidden 576 --heads 9 --kv-heads 3 --ffn 1536 --vocab 49152 --length 10 \
        --blocks 20 25 29 --prompts 32 --json benchmarks/lftf_smollm2_cpu.json    # as SmolLM2-135M; also with --text-tokens 100

- step: seconds of gradient reset, forward and backward of the balanced loss over a batch of bias prompts, and the optimizer
  step, all variants in turn in one process.
- memory: peak growth over the state with the model in memory, each variant in a fresh process: gradient buffers, optimizer
  state, activations and whatever else two steps need.

- kept: the same steps where what enters the block is kept, as the recipe does, against running all blocks below.

The ideal is counted from products of matrices alone: a frozen weight costs no weight gradient, and blocks below the trained one
no backward; where their output is kept, no forward either.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from bench_common import (
    MIB,
    PeakMemory,
    Spread,
    add_common_options,
    device_and_threads,
    interleave,
    print_table,
    ratios,
    record,
    run_fresh,
    spread,
    write_results,
)

SETTINGS = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "precision", "prompts", "length", "text_tokens")
FULL = "all"
KEPT = " kept"  # behind a block's number: what enters it is kept


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
        num_query_groups=args.kv_heads or args.heads,
        ffn_hidden_size=args.ffn,
        vocab_size=args.vocab,
        precision=args.precision,
    )
    return build_gpt(config, device)


def make_step(args, model, device, what: str) -> Callable[[], object]:
    """One training step of the named variant, "all" or a block's number. Freezes the model accordingly. With --text-tokens it
    has the loss `kl`, too, on a text of so many tokens for each prompt."""
    from megatron_ext.blocks.inputs import BlockInputs
    from megatron_ext.blocks.pairs import split_pairs
    from megatron_ext.blocks.places import ModelPlace
    from megatron_ext.blocks.training import train_only_places
    from megatron_ext.losses.lftf import kept_text_loss, pair_loss
    from megatron_ext.runtime.engine import Engine
    from megatron_ext.runtime.optim import OptimConfig
    from recipes.bias.streams import LFTFMicrobatch, RowStreams

    block = None if what == FULL else int(what.removesuffix(KEPT))
    if block is not None:
        train_only_places(model, [ModelPlace(block)])
    engine = Engine(model, OptimConfig(lr=1e-5))
    draws = torch.Generator().manual_seed(1)
    prompts = torch.randint(args.vocab, (args.prompts, args.length), generator=draws).tolist()
    texts = torch.randint(args.vocab, (args.prompts, args.text_tokens), generator=draws).tolist()
    rows = {"pairs": prompts} | ({"texts": texts} if args.text_tokens else {})
    streams, every = RowStreams(model, rows, ("texts",), (3, 8)), list(range(args.prompts))
    if what.endswith(KEPT):
        streams.keep(BlockInputs(model, block, 1 << 40))
    said = {kind: streams.ask(kind) for kind in rows}

    def loss(microbatch, logprobs, entropy):
        if microbatch.kind == "texts":
            value = kept_text_loss(logprobs, microbatch.frozen).mean()
        else:
            value = pair_loss("balanced", *split_pairs(logprobs), microbatch.frozen).mean()
        return value, {"loss": value.detach()}

    def step():
        engine.zero_grad()
        microbatches = []
        for kind in rows:
            frozen = torch.cat(said[kind]) if kind == "texts" else torch.stack(said[kind])
            microbatches.append(
                LFTFMicrobatch(streams.batch(kind, every), kind=kind, frozen=frozen.to(device), total=args.prompts)
            )
        engine.run(microbatches, loss)
        return engine.step()

    return step


def ideal(args, what: str) -> float:
    """Products of matrices, of the full step's: a block's forward, its inputs' and its weights' gradient weigh the same."""
    kv = args.hidden * (args.kv_heads or args.heads) // args.heads
    tokens = args.prompts * (args.length + 2 + args.text_tokens)
    block = tokens * (args.hidden * (2 * args.hidden + 2 * kv) + 3 * args.hidden * args.ffn)
    head = args.prompts * (2 + max(0, args.text_tokens - 1)) * args.vocab * args.hidden  # rows that predict
    full = 3 * args.layers * block + 3 * head
    if what == FULL:
        return 1.0
    number = int(what.removesuffix(KEPT))
    forward, above = args.layers - (number if what.endswith(KEPT) else 0), args.layers - 1 - number
    return (forward * block + (above + 2) * block + 2 * head) / full


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
    names = [FULL, *(f"{block}{kept}" for block in args.blocks for kept in ("", KEPT))]
    device = start()
    steps = {}
    for name in names:
        model = build_model(args, device)
        steps[name] = make_step(args, model, device, name)
    seconds = interleave(steps, args.repeats, device)
    steps.clear()
    growth = {}
    for name in names:
        options = [text for key in SETTINGS for text in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
        options += ["--blocks", *map(str, args.blocks), "--threads", str(torch.get_num_threads()), "--fresh", name]
        growth[name] = run_fresh(options)["peak_growth_bytes"]
    speedup = {name: vars(ratios(seconds, FULL, name)) for name in names}
    gained = {}
    for name in names:
        if name.endswith(KEPT):
            whole = name.removesuffix(KEPT)
            promised = ideal(args, whole) / ideal(args, name)
            gained[whole] = {"times": vars(ratios(seconds, whole, name)), "counted": promised}
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "seconds": seconds,
        "speedup_over_full": speedup,
        "gained_by_keeping": gained,
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
        f"{args.text_tokens} of text beside each, precision {args.precision}",
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
    kept = [
        (
            f"block {block}",
            f"{Spread(**gain['times']):.2f}",
            f"{gain['counted']:.2f}",
            f"{gain['times']['median'] / gain['counted']:.2f}",
        )
        for block, gain in result["gained_by_keeping"].items()
    ]
    print_table("What enters the block kept, against run again", ("trained", "times as fast", "counted", "share"), kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, None, repeats=9, name="lftf")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 6, 11])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--text-tokens", type=int, default=0, help="of a text beside each prompt, for the loss kl")
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
    write_results(
        args.json, record(**{name: getattr(args, name) for name in (*SETTINGS, "blocks", "repeats")}) | result
    )


if __name__ == "__main__":
    main()
