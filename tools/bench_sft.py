"""Time a step of supervised fine-tuning on several answers to each prompt, forward and backward, with prompts encoded once and
once per sample.

    python tools/bench_sft.py
    python tools/bench_sft.py --shapes 1024,8,128 --prompts 4 --threads 2 --repeats 5

P tokens of a prompt, G answers to each, of S tokens; as many prompts as --prompts in the global batch. Forms: "shared", prompts
encoded once (model.prefix_grouping=true); "repeated", once per sample, as before; both packed to the same token budget. The loss
and all gradients are compared first. Leaves out the optimizer, which neither touches.
"""

from __future__ import annotations

import argparse

import torch
from bench_common import (
    add_common_options,
    device_and_threads,
    interleave,
    parse_shapes,
    print_table,
    ratios,
    record,
    spread,
    write_results,
)
from bench_step import PLAIN, build_engine, describe, model_settings, model_shape

from megatron_ext.flops import ideal_speedup

SHAPES = ("512,4,128", "1024,8,128", "128,4,256")
FORMS = {"shared": True, "repeated": False}


def make_steps(engine, shape, args, device) -> dict:
    """Of each form a function that runs forward and backward and returns the loss."""
    from recipes.data.rows import Pair, Prompt
    from recipes.sft.batches import SFTBatches, negative_log_likelihood
    from recipes.sft.settings import SFTModel

    p, g, s = shape
    draws = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(args.vocab, (count,), generator=draws).tolist())

    pairs = [
        Pair(Prompt(prompt, {}, 1), tokens(s)) for prompt in (tokens(p) for _ in range(args.prompts)) for _ in range(g)
    ]
    budget = max(args.budget, p + s)

    def step_of(share: bool):
        settings = model_settings(args) | {"encoder_seq_length": budget}
        model = SFTModel(**settings, micro_batch_tokens=budget, prefix_grouping=share, min_shared_tokens=None)
        microbatches = SFTBatches(model, device, lambda *sums: list(sums)).of(pairs)

        def step() -> float:
            for parameter in engine.module.parameters():
                parameter.grad = None
            return sum(float(m["loss"]) for m in engine.run(microbatches, negative_log_likelihood))

        return step

    return {form: step_of(share) for form, share in FORMS.items()}


def check(engine, steps) -> float:
    """Relative difference of the gradients of both forms.

    Raises:
        SystemExit: more than rounding; no speed-up is printed then.
    """
    found = {}
    for form, step in steps.items():
        loss = step()
        found[form] = (
            loss,
            torch.cat([p.grad.flatten().double() for p in engine.module.parameters() if p.grad is not None]),
        )
    (one, first), (other, second) = found["repeated"], found["shared"]
    difference = float((first - second).norm() / first.norm())
    if difference > 32 * torch.finfo(engine.config.params_dtype).eps or abs(one - other) > 1e-5 * abs(one):
        raise SystemExit(f"the forms differ by {difference:.1e}: no speed-up is reported")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, SHAPES, repeats=5, name="sft")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.set_defaults(**PLAIN)
    args = parser.parse_args()
    device_and_threads(args.threads)
    engine, device = build_engine(args)
    results, rows = [], []
    for shape in parse_shapes(args.shapes):
        p, g, s = shape
        steps = make_steps(engine, shape, args, device)
        difference = check(engine, steps)
        times = interleave(steps, args.repeats, device)
        ideal = ideal_speedup(model_shape(args), [(p, [s] * g)] * args.prompts)
        faster = ratios(times, "repeated", "shared")
        results.append({"P": p, "G": g, "S": s, "seconds": times, "flop_ideal": ideal, "difference": difference}
                       | {"speedup": vars(faster)})  # fmt: skip
        seconds = [f"{spread(times[form]):.2f}" for form in FORMS]
        rows.append((f"{p}, {g}, {s}", *seconds, f"{faster:.2f}", f"{faster.median / ideal:.2f} of {ideal:.2f}"))
    title = f"A step of SFT, {args.prompts} prompts, budget {args.budget}: {describe(args)}"
    print_table(title, ("P, G, S", *FORMS, "shared is faster by", "of FLOP-ideal"), rows)
    names = ("prompts", "budget", "layers", "hidden", "heads", "ffn", "vocab", "precision", "repeats")
    write_results(args.json, record(**{name: getattr(args, name) for name in names}) | {"results": results})


if __name__ == "__main__":
    main()
