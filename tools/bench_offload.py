"""Time one GRPO update with the reference policy, or Adam's moments, on the host, and without the old policy's pass.

    python tools/bench_offload.py
    python tools/bench_offload.py --shapes 512,8,128 --threads 4 --repeats 21

A step scores the sampled responses with the policy and with the reference, and takes an optimizer step, as the GRPO recipe does
where it must ask for the old log-probabilities first; sampling is left out. "device" keeps everything there, "reference" has the
initial policy's weights on the host, "optimizer" the moments; "own_pass" is "device" without the old policy's pass, which the
recipe leaves out where one optimizer step follows a batch. On a CPU the host is the device: what is left of the cost are the copy
into the gradient buffers and another Adam kernel.
Nothing is timed before the reference has said the same in all forms, bitwise, and the update of "own_pass" is that of "device".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from bench_common import (
    Shape,
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

FORMS = {
    "device": {},
    "reference": {"reference": True},
    "optimizer": {"optimizer": True},
    "own_pass": {},
}


def build(args, form: str, device: torch.device):
    """(engine, reference) of one form, all with the same weights."""
    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.distributed import set_seed
    from megatron_ext.runtime.engine import Engine
    from megatron_ext.runtime.optim import OptimConfig
    from megatron_ext.runtime.reference import ReferenceWeights

    set_seed(0)
    config = GPTModelConfig(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.heads, ffn_hidden_size=args.ffn,
        vocab_size=args.vocab, encoder_seq_length=1 << 20,
    )  # fmt: skip
    chosen = FORMS[form]
    engine = Engine(
        build_gpt(config, device), OptimConfig(lr=1e-5, optimizer_cpu_offload=chosen.get("optimizer", False)), 1000
    )
    return engine, ReferenceWeights(engine, chosen.get("reference", False))


def make_step(
    engine, reference, shape: Shape, device: torch.device, own_pass: bool
) -> Callable[[], tuple[torch.Tensor, dict[str, float]]]:
    """A function that takes a step and returns what the reference said, [r], and the update's metrics.

    Args:
        own_pass: the update's own forward pass says the old log-probabilities.
    """
    from megatron_ext.grouping import pack
    from megatron_ext.losses import GrpoTerms, grpo_loss
    from megatron_ext.models.config import stream_multiple
    from megatron_ext.runtime.engine import Microbatch

    p, g, s = shape
    config = engine.module.model_config
    tokens = torch.randint(config.vocab_size, (p + g * s,), generator=torch.Generator().manual_seed(1))
    responses = [r.tolist() for r in tokens[p:].split(s)]
    batch = pack([tokens[:p].tolist()], [responses], stream_multiple(config), device=device)
    advantages = torch.linspace(-1, 1, g, device=device)[batch.groups.response_ids]
    weights = torch.full((g * s,), 1 / (g * s), device=device)
    terms = GrpoTerms(kl_penalty=0.05)

    def step() -> tuple[torch.Tensor, dict[str, float]]:
        (old,) = [None] if own_pass else engine.score([Microbatch(batch)])
        with reference.used():
            (said,) = engine.score([Microbatch(batch)])

        def loss(microbatch, logprobs, entropy):
            before = logprobs.detach() if own_pass else old
            return grpo_loss(logprobs, before, advantages, weights, terms, said)

        return said, engine.update([Microbatch(batch)], loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, ("256,8,64", "1024,8,128"), repeats=11, name="offload")
    for name, size in (("layers", 4), ("hidden", 512), ("heads", 8), ("ffn", 1536), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--processor-time", action="store_true", help="count what this process computes, where others compute, too"
    )
    args = parser.parse_args()
    shapes = parse_shapes(args.shapes)
    device_and_threads(args.threads)
    from megatron_ext.runtime.distributed import ParallelSizes, initialize

    device = initialize(ParallelSizes())
    rows, results = [], []
    for shape in shapes:
        steps = {
            form: make_step(*build(args, form, device), shape, device, own_pass=form == "own_pass") for form in FORMS
        }
        said = {form: step() for form, step in steps.items()}
        if not all(torch.equal(said["device"][0], logprobs) for logprobs, _ in said.values()):
            raise SystemExit("the reference does not say the same in all forms; nothing was timed")
        if said["own_pass"][1] != said["device"][1]:
            raise SystemExit("without the old policy's pass the update is another one; nothing was timed")
        clock = time.process_time if args.processor_time else time.perf_counter
        times = interleave(steps, args.repeats, device, clock)
        cost = {form: ratios(times, form, "device") for form in FORMS if form != "device"}
        rows.append((",".join(map(str, shape)), *(f"{cost[form]:.3f}" for form in cost)))
        results.append({"shape": shape, "seconds": times, "ratio": {f: vars(c) for f, c in cost.items()}})
        print(f"{shape}: {spread(times['device']):.3f} s on the device")
    print_table(
        "How many times as long a step takes as with all on the device",
        ("P, G, S", "reference on the host", "moments on the host", "without the old policy's pass"),
        rows,
    )
    settings = {
        name: getattr(args, name) for name in ("layers", "hidden", "heads", "ffn", "vocab", "repeats", "processor_time")
    }
    write_results(args.json, record(**settings) | {"offload": results})


if __name__ == "__main__":
    main()
