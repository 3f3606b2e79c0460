"""Time a GRPO step over prompts with a clip, its reference pass and its update, sampling left out: the clip's tower run once and
kept, or run with every pass; prompts encoded once, or once for each response.

    python tools/bench_tower.py --threads 2

A frozen SigLIP of --tower-layers layers sees --frames frames of 112 pixels, 64 tokens each, in front of a language model; the
prompt is the clip and 64 tokens of text, and each of G responses has a sixteenth of it. "grouped" is one stream of a group,
"repeated" one stream for each response, which is its faster form. "kept" forgets all at the beginning of a step, as in a first
epoch. Log-probabilities and gradients of all forms are compared first.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from bench_common import (
    add_common_options,
    device_and_threads,
    interleave,
    print_table,
    ratios,
    record,
    spread,
    write_results,
)

from megatron_ext.flops import ModelShape, model_flops

SIDE, PATCH, TEXT = 112, 14, 64
TOKENS = (SIDE // PATCH) ** 2  # of a frame
PLACEHOLDER = 0
TOWER = "the tower alone"
FORMS = {  # (prompts are shared, GiB that the tower may keep)
    "grouped, kept": (True, 4.0),
    "grouped, not kept": (True, 0.0),
    "repeated, kept": (False, 4.0),
    "repeated, not kept": (False, 0.0),
}


def build(args):
    """(engine, device). Imports Megatron only here."""
    from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed

    device = initialize(ParallelSizes())
    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.models.config import PositionEmbedding
    from megatron_ext.runtime.engine import Engine
    from megatron_ext.vision import VisionConfig

    set_seed(0)
    tower = {
        "model_type": "siglip_vision_model", "hidden_size": args.tower_hidden, "intermediate_size": 4 * args.tower_hidden,
        "num_hidden_layers": args.tower_layers, "num_attention_heads": args.tower_hidden // 64, "image_size": SIDE,
        "patch_size": PATCH,
    }  # fmt: skip
    config = GPTModelConfig(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.heads, ffn_hidden_size=args.ffn,
        vocab_size=args.vocab, precision="32", encoder_seq_length=1 << 20, vision=VisionConfig(tower_config=tower),
        position_embedding=PositionEmbedding(scheme="vrope"),
    )  # fmt: skip
    return Engine(build_gpt(config, device)), device


def make_step(engine, args, form: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """A function that runs both passes and returns the update's log-probabilities [r]; gradients are in `.grad`."""
    from megatron_ext.models.config import stream_multiple
    from megatron_ext.models.media import MediaPrompt, pack_prompts
    from megatron_ext.rotary import Video
    from megatron_ext.runtime.engine import Microbatch

    share, gib = FORMS[form]
    model, draws = engine.module, torch.Generator().manual_seed(2)
    clip, count = make_clip(args), prompt_length(args) // 16
    texts = torch.randint(1, args.vocab, (TEXT + args.samples * count,), generator=draws).tolist()
    tokens = [PLACEHOLDER] * (args.frames * TOKENS) + texts[:TEXT]
    prompt = MediaPrompt.of(tokens, PLACEHOLDER, [Video(*clip.patches)], [clip])
    responses = [texts[TEXT + i * count : TEXT + (i + 1) * count] for i in range(args.samples)]
    scheme, multiple = model.model_config.position_embedding.scheme, stream_multiple(model.model_config)
    parts = [responses] if share else [[response] for response in responses]
    microbatches = [Microbatch(pack_prompts([prompt], [part], scheme, multiple, device, share)) for part in parts]
    tower = model.vision_tower

    def loss_function(microbatch, logprobs, entropy):
        return -logprobs.sum() / len(texts), {"logprobs": logprobs.detach()}

    def step() -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        tower.vision.cache_gib = gib
        tower.forget()
        engine.score(microbatches)
        return torch.cat([metrics["logprobs"] for metrics in engine.run(microbatches, loss_function)])

    return step


def make_clip(args):
    from megatron_ext.vision import Pixels

    side = SIDE // PATCH
    values = torch.randn(args.frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return Pixels(values, (args.frames, side, side))


def prompt_length(args) -> int:
    return args.frames * TOKENS + TEXT


def tower_flops(args) -> float:
    """Of a pass over the clip: linears 2 (4 e^2 + 8 e^2) a token, attention 4 e for each pair of a frame's tokens."""
    e = args.tower_hidden
    return args.frames * TOKENS * args.tower_layers * (24 * e * e + 4 * e * TOKENS)


def ideals(args, shape: ModelShape) -> dict[str, float]:
    """Operations of each form over those of "grouped, kept"."""
    lengths = [(prompt_length(args), (prompt_length(args) // 16,) * args.samples)]
    language = {  # a reference's pass, and an update's
        share: sum(model_flops(shape, lengths, share, backward).total for backward in (False, True))
        for share in (True, False)
    }
    found = {}
    for form, (share, gib) in FORMS.items():
        runs = 1 if gib else 2 * (1 if share else args.samples)
        found[form] = language[share] + runs * tower_flops(args)
    return {form: each / found["grouped, kept"] for form, each in found.items()}


def check(engine, steps: dict[str, Callable[[], torch.Tensor]]) -> None:
    """
    Raises:
        SystemExit: two forms differ by more than rounding; no time is printed then.
    """
    expected: Sequence[torch.Tensor] | None = None
    for form, step in steps.items():
        logprobs = step()
        gradient = torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])
        found = logprobs.double(), gradient.double()
        expected = expected or found
        for mine, theirs in zip(found, expected, strict=True):
            if not (mine - theirs).norm() <= 32 * torch.finfo(torch.float32).eps * theirs.norm():
                raise SystemExit(f"{form} says something else than {next(iter(steps))}: nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, None, repeats=5, name="tower")
    parser.add_argument("--frames", type=int, default=15)
    parser.add_argument("--samples", type=int, default=8, help="responses of the prompt, G")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tower-layers", type=int, default=6)
    parser.add_argument("--tower-hidden", type=int, default=384)
    args = parser.parse_args()
    device_and_threads(args.threads)
    engine, device = build(args)
    for parameter in engine.module.vision_tower.parameters():
        parameter.requires_grad_(False)
    steps = {form: make_step(engine, args, form, device) for form in FORMS}
    check(engine, steps)
    tower, clip = engine.module.vision_tower, make_clip(args)

    def see() -> None:
        tower.forget()
        tower([clip])

    times = interleave(steps | {TOWER: see}, args.repeats, device)
    shape = ModelShape.of(engine.module.model_config)
    expected = ideals(args, shape)
    rows = []
    for form in FORMS:
        seconds = times[form]
        found = ratios(times, form, "grouped, kept")
        rows.append(
            (
                form,
                f"{spread(seconds):.2f}",
                f"{found:.2f}",
                f"{found.median / expected[form]:.2f} of {expected[form]:.2f}",
            )
        )
    print_table(
        f"P = {prompt_length(args)}, of which {args.frames * TOKENS} show a clip, G = {args.samples}, S = P / 16",
        ("form", "seconds [quartiles]", "times as long as grouped, kept", "share of FLOP-ideal"),
        rows,
    )
    (seen, _, _), kept, anew = (
        dataclasses.astuple(spread(times[form])) for form in (TOWER, "grouped, kept", "grouped, not kept")
    )
    print(
        f"of a grouped step the tower, {seen:.2f} s, is {seen / kept[0]:.0%} where it is kept, else {2 * seen / anew[0]:.0%}"
    )
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "threads")}
    write_results(args.json, record(**settings) | {"seconds": times, "flop_ideal": expected})


if __name__ == "__main__":
    main()
