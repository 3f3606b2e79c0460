"""Time and memory of a GRPO update of adapters alone beside one of all weights.

    python tools/bench_lora.py
    python tools/bench_lora.py --shapes 512,8,128 --dims 8 64 --threads 4 --repeats 21

A step scores the sampled responses with the reference policy and takes an optimizer step; sampling is left out. "full" trains all
weights beside a second copy of them, the reference; "lora" has adapters of some rank on every linear, and its reference is the
model without them. Nothing is timed before the first step's reference has said bitwise the same in all forms, the losses of the
first update agree, and after it the frozen weights are bitwise what they were. Bytes are counted: of parameters, gradients,
optimizer state and reference; the growth of the process over a step of each form is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from bench_common import (
    MIB,
    PeakMemory,
    Shape,
    add_common_options,
    device_and_threads,
    interleave,
    parse_shapes,
    print_table,
    ratios,
    record,
    run_fresh,
    spread,
    write_results,
)
from bench_offload import make_step

FULL = 0  # in place of a rank


def build(args, dim: int, device: torch.device):
    """(engine, reference) with adapters of that rank, or FULL; all with the same weights."""
    from megatron_ext.adapters import LoraConfig
    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.distributed import set_seed
    from megatron_ext.runtime.engine import Engine
    from megatron_ext.runtime.optim import OptimConfig
    from megatron_ext.runtime.reference import ReferenceBase, ReferenceWeights

    set_seed(0)
    config = GPTModelConfig(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.heads, ffn_hidden_size=args.ffn,
        vocab_size=args.vocab, encoder_seq_length=1 << 20, peft=None if dim == FULL else LoraConfig(dim=dim),
    )  # fmt: skip
    engine = Engine(build_gpt(config, device), OptimConfig(lr=1e-4), 1000)
    return engine, ReferenceWeights(engine) if dim == FULL else ReferenceBase(engine)


def held(engine, reference) -> dict[str, int]:
    """Bytes between steps, after the first."""
    from megatron_ext.runtime.optimizer_state import single_optimizers

    gradients = sum(b.grad_data.nbytes for piece in engine.pieces for b in piece.buffers)
    states = [s for single in single_optimizers(engine.optimizer) for s in single.optimizer.state.values()]
    optimizer = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
    parameters = sum(p.nbytes for p in engine.module.parameters())
    return {
        "parameters": parameters, "gradients": gradients, "optimizer": optimizer, "reference": reference.nbytes,
    }  # fmt: skip


def name(dim: int) -> str:
    return "full" if dim == FULL else f"lora {dim}"


def frozen(engine) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine.module.parameters() if not p.requires_grad]


def grown(args, device: torch.device) -> dict[str, float]:
    """Of one form in this process: growth over everything from an empty process to the third step, in bytes."""
    (shape,) = parse_shapes(args.shapes)
    with PeakMemory(device) as peak:
        engine, reference = build(args, args.alone, device)
        step = make_step(engine, reference, shape, device, own_pass=True)
        for _ in range(3):
            step()
    return {"growth": peak.growth}


def compare(args, shape: Shape, device: torch.device) -> tuple[dict, dict]:
    """(seconds by form, bytes by form)."""
    made = {name(dim): build(args, dim, device) for dim in (FULL, *args.dims)}
    before = {form: frozen(engine) for form, (engine, _) in made.items()}
    steps = {form: make_step(*both, shape, device, own_pass=True) for form, both in made.items()}
    said = {form: step() for form, step in steps.items()}
    for form, (logprobs, metrics) in said.items():
        if not torch.equal(logprobs, said["full"][0]):
            raise SystemExit(f"the reference of {form} is another one; nothing was timed")
        if abs(metrics["loss"] - said["full"][1]["loss"]) > 1e-6:
            raise SystemExit(f"the first loss of {form} is another one; nothing was timed")
        if not all(map(torch.equal, frozen(made[form][0]), before[form])):
            raise SystemExit(f"{form} has changed frozen weights; nothing was timed")
    clock = time.process_time if args.processor_time else time.perf_counter
    return interleave(steps, args.repeats, device, clock), {form: held(*both) for form, both in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, ("256,8,64", "1024,8,128"), repeats=11, name="lora")
    for key, size in (("layers", 4), ("hidden", 512), ("heads", 8), ("ffn", 1536), ("vocab", 8192)):
        parser.add_argument(f"--{key}", type=int, default=size)
    parser.add_argument("--dims", nargs="+", type=int, default=[8, 32], help="ranks of the adapters")
    parser.add_argument(
        "--processor-time", action="store_true", help="count what this process computes, where others compute, too"
    )
    parser.add_argument("--alone", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = parse_shapes(args.shapes)
    device_and_threads(args.threads)
    from megatron_ext.runtime.distributed import ParallelSizes, initialize

    device = initialize(ParallelSizes())
    if args.alone is not None:
        print(json.dumps(grown(args, device)))
        return
    sizes = ("layers", "hidden", "heads", "ffn", "vocab")
    rows, results = [], []
    for shape in shapes:
        text = ",".join(map(str, shape))
        times, counted = compare(args, shape, device)
        common = ["--shapes", text, *(x for key in sizes for x in (f"--{key}", str(getattr(args, key))))]
        common += [] if args.threads is None else ["--threads", str(args.threads)]
        growth = {name(dim): run_fresh([*common, "--alone", str(dim)])["growth"] for dim in (FULL, *args.dims)}
        cost = {form: ratios(times, form, "full") for form in times}
        for form in times:
            parts = counted[form]
            rows.append((
                text, form, f"{spread(times[form]):.3f}", f"{cost[form]:.2f}",
                *(f"{parts[key] / MIB:.1f}" for key in ("parameters", "gradients", "optimizer", "reference")),
                f"{growth[form] / MIB:.0f}",
            ))  # fmt: skip
        results.append({"shape": shape, "seconds": times, "bytes": counted, "growth": growth})
    print_table(
        "A GRPO update of adapters beside one of all weights; MiB",
        (
            "P, G, S",
            "trained",
            "seconds",
            "of full",
            "parameters",
            "gradients",
            "optimizer",
            "reference",
            "process grew by",
        ),
        rows,
    )
    settings = {key: getattr(args, key) for key in (*sizes, "dims", "repeats", "processor_time")}
    write_results(args.json, record(**settings) | {"lora": results})


if __name__ == "__main__":
    main()
