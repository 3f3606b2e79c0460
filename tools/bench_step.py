"""Time and weigh a whole GPT step, forward and backward, with prefix grouping on and off; and its log-probabilities.

    python tools/bench_step.py
    python tools/bench_step.py --parts step --shapes 1024,8,128 --threads 4 --repeats 21
    python tools/bench_step.py --parts step --shapes 1024,8,128 --experts 8 --expert-ffn 704

- step: seconds of `Engine.run` over one group, forward and backward of the mean log-probability. Baselines are the same
  model with `share_prefix=False`: causal documents [prefix, response], no padding, logits of response rows only, so
  that nothing but the prefix's copies differs. "repeated" has all G documents in one stream, "repeated_single" one
  document per microbatch: less parallel, but its activations stay small. The speed-up is over the faster one.
- memory: peak growth of the same forward and backward, each form in a fresh process, over the state with the model and
  its gradients in memory.
- logprobs: peak growth of log-probabilities, forward and backward, for a large vocabulary, over the state with hidden
  states, weight and both gradients in memory; against log_softmax of all logits.

Leaves out the optimizer, which grouping does not touch, and sampling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from bench_common import (
    DTYPES,
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
from torch import Tensor

from megatron_ext.flops import ModelShape, ideal_speedup, model_flops
from megatron_ext.grouping import pack
from megatron_ext.losses.logprobs import vocab_parallel_logprobs

SHAPES = ("1024,8,128", "2048,8,128")
PARTS = ("step", "memory", "logprobs")
FORMS = ("grouped", "repeated", "repeated_single")
WARM_UP: Shape = (16, 2, 16)


def build_engine(args):
    """(engine, device) of the model under test. Imports Megatron only here: the logprobs part does without."""
    from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed

    device = initialize(ParallelSizes())
    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.engine import Engine

    set_seed(0)
    return Engine(build_gpt(GPTModelConfig(**model_settings(args)), device)), device


# Of a model without what only this tool has options for.
PLAIN = {"latent": 0, "experts": 0}


def model_settings(args) -> dict:
    return {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "num_attention_heads": args.heads,
        "num_query_groups": args.kv_heads,
        "ffn_hidden_size": args.ffn,
        "vocab_size": args.vocab,
        "precision": args.precision,
        "encoder_seq_length": 1 << 20,
        **latent_settings(args),
        **({"num_moe_experts": args.experts, "moe_router_topk": args.topk, "moe_ffn_hidden_size": args.expert_ffn}
           if args.experts else {}),
    }  # fmt: skip


def latent_settings(args) -> dict:
    """Latent attention of so wide rows, heads in the proportions of DeepSeek's."""
    if not args.latent:
        return {}
    part = args.hidden // args.heads // 4
    return {
        "multi_latent_attention": True, "kv_lora_rank": args.latent, "q_lora_rank": 2 * args.latent, "qk_head_dim": 4 * part,
        "qk_pos_emb_head_dim": 2 * part, "v_head_dim": 4 * part,
    }  # fmt: skip


def model_shape(args) -> ModelShape:
    from megatron_ext.models import GPTModelConfig

    return ModelShape.of(GPTModelConfig(**model_settings(args)))


def make_step(engine, shape: Shape, form: str, device: torch.device) -> Callable[[], Tensor]:
    """A function that runs forward and backward and returns the log-probabilities [r]; gradients are in `.grad`."""
    from megatron_ext.models.config import stream_multiple
    from megatron_ext.runtime.engine import Microbatch

    p, g, s = shape
    model = engine.module
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.model_config.vocab_size, (p + g * s,), generator=draws)
    responses = [r.tolist() for r in tokens[p:].split(s)]
    multiple = stream_multiple(model.model_config)
    parts = [[r] for r in responses] if form == "repeated_single" else [responses]
    share = form == "grouped"
    prompt = [tokens[:p].tolist()]
    microbatches = [Microbatch(pack(prompt, [part], multiple, device=device, share_prefix=share)) for part in parts]

    def loss_function(microbatch, logprobs, entropy):
        return -logprobs.sum() / (g * s), {"logprobs": logprobs.detach()}

    def step() -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        return torch.cat([metrics["logprobs"] for metrics in engine.run(microbatches, loss_function)])

    return step


def check_agreement(engine, steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Relative difference of log-probabilities and of all gradients between the forms.

    Raises:
        SystemExit: they differ by more than rounding; no speed-up is printed then.
    """
    results = {}
    for form, step in steps.items():
        logprobs = step()
        gradient = torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])
        results[form] = {"logprobs": logprobs.double(), "gradient": gradient.double()}
    # Rounding of a few hundred operations in a row, each random: about sqrt(1000) times the machine's epsilon.
    tolerance = 32 * torch.finfo(engine.config.params_dtype).eps
    differences = {}
    for part, expected in results["repeated"].items():
        for form in FORMS:
            difference = float((results[form][part] - expected).norm() / expected.norm())
            if not difference <= tolerance:
                raise SystemExit(
                    f"{form} and repeated {part} differ by {difference:.1e}, more than rounding ({tolerance:.1e}); no "
                    "speed-up is reported"
                )
            differences[f"{form}/{part}"] = difference
    return differences


def bench_step(args) -> list[dict]:
    engine, device = build_engine(args)
    results = []
    for shape in parse_shapes(args.shapes):
        p, g, s = shape
        steps = {form: make_step(engine, shape, form, device) for form in FORMS}
        differences = check_agreement(engine, steps)
        times = interleave(steps, args.repeats, device)
        lengths = [(p, (s,) * g)]
        flops = model_flops(model_shape(args), lengths)
        ideal = ideal_speedup(model_shape(args), lengths)
        over = {form: ratios(times, form, "grouped") for form in FORMS if form != "grouped"}
        share = min(x.median for x in over.values()) / ideal
        results.append(
            {"P": p, "G": g, "S": s, "flop_ideal": ideal, "flops_grouped": vars(flops), "differences": differences}
            | {"seconds": times, "speedup_over": {form: vars(x) for form, x in over.items()}}
            | {"share_of_flop_ideal": share}
        )
    return results


def print_step(results: list[dict], args) -> None:
    rows = []
    for r in results:
        for form, seconds in r["seconds"].items():
            shape = f"{r['P']}, {r['G']}, {r['S']}"
            if form == "grouped":
                rows.append((shape, form, f"{spread(seconds):.3f}", "", ""))
                continue
            speedup = ratios(r["seconds"], form, "grouped")
            share = f"{speedup.median / r['flop_ideal']:.2f} of {r['flop_ideal']:.2f}"
            rows.append((shape, form, f"{spread(seconds):.3f}", f"{speedup:.2f}", share))
    header = ("P, G, S", "form", "seconds [quartiles]", "grouped is faster by [quartiles]", "share of FLOP-ideal")
    print_table(f"Forward + backward of a GPT: {describe(args)}", header, rows)


def describe(args) -> str:
    width = f"{args.experts} experts of {args.expert_ffn}, top {args.topk}," if args.experts else f"ffn {args.ffn}"
    return (
        f"{args.layers} layers, hidden {args.hidden}, {args.heads} heads ({args.kv_heads} key/value), "
        f"{f'latent rows of {args.latent}, ' if args.latent else ''}"
        f"{width} (SwiGLU), vocabulary {args.vocab}, precision {args.precision}"
    )


def step_memory(args) -> int:
    """Peak growth in bytes of one forward and backward, in this process."""
    engine, device = build_engine(args)
    for parameter in engine.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_step(engine, WARM_UP, args.fresh, device)()  # libraries and thread pools are not the step's
    step = make_step(engine, parse_shapes(args.shapes)[0], args.fresh, device)
    with PeakMemory(device) as peak:
        step()
    return peak.growth


def bench_memory(args) -> list[dict]:
    results = []
    for p, g, s in parse_shapes(args.shapes):
        growth = {form: fresh(args, form, f"{p},{g},{s}") for form in FORMS}
        results.append({"P": p, "G": g, "S": s, "peak_growth_bytes": growth})
    return results


def fresh(args, what: str, shape: str = "") -> int:
    """Measure one form in a new process with this one's settings."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"threads": torch.get_num_threads()}
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return run_fresh([*options, "--fresh", what, *(["--shapes", shape] if shape else [])])["peak_growth_bytes"]


def print_memory(results: list[dict], args) -> None:
    rows = []
    for r in results:
        grouped = r["peak_growth_bytes"]["grouped"]
        for form, growth in r["peak_growth_bytes"].items():
            shape = f"{r['P']}, {r['G']}, {r['S']}"
            rows.append((shape, form, f"{growth / MIB:.0f}", f"{growth / grouped:.2f}"))
    header = ("P, G, S", "form", "peak growth, MiB", "over grouped")
    print_table("Peak memory of forward + backward, beyond model and gradients", header, rows)


def logprobs_memory(args) -> int:
    """Peak growth in bytes of log-probabilities, forward and backward, in this process."""
    device = device_and_threads(args.threads)
    dtype = DTYPES[args.logprob_dtype]
    weight = torch.randn(args.logprob_vocab, args.logprob_hidden, device=device).div_(args.logprob_hidden**0.5)
    weight = weight.to(dtype).requires_grad_()

    def run(count: int) -> PeakMemory:
        hidden = torch.randn(count, args.logprob_hidden, device=device).to(dtype).requires_grad_()
        targets = torch.randint(args.logprob_vocab, (count,), device=device)
        for leaf in (hidden, weight):
            leaf.grad = torch.ones_like(leaf)  # ones: pages of zeros would not be in memory yet
        with PeakMemory(device) as peak:
            if args.fresh == "chunked":
                logprobs, _ = vocab_parallel_logprobs(hidden, weight, targets)
            else:
                logits = (hidden @ weight.t()).float()
                logprobs = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
                del logits
            logprobs.mean().backward()
        return peak

    run(16)  # libraries and thread pools are not the measured pass's
    return run(args.logprob_tokens).growth


def bench_logprobs(args) -> dict:
    growth = {what: fresh(args, what) for what in ("chunked", "log_softmax")}
    materialised = 4 * args.logprob_tokens * args.logprob_vocab
    return {"materialised_logits_bytes": materialised, "peak_growth_bytes": growth}


def print_logprobs(result: dict, args) -> None:
    whole = result["materialised_logits_bytes"]
    rows = [
        (what, f"{growth / MIB:.0f}", f"{growth / whole:.3f}") for what, growth in result["peak_growth_bytes"].items()
    ]
    title = (
        f"Peak memory of log-probabilities, forward + backward: {args.logprob_tokens} tokens, vocabulary "
        f"{args.logprob_vocab}, hidden {args.logprob_hidden}, {args.logprob_dtype}; fp32 logits: {whole / MIB:.0f} MiB"
    )
    print_table(title, ("way", "peak growth, MiB", "share of all logits"), rows)


SETTINGS = ("layers", "hidden", "heads", "kv_heads", "latent", "ffn", "vocab", "precision", "logprob_tokens", "logprob_vocab",
            "logprob_hidden", "logprob_dtype", "experts", "topk", "expert_ffn")  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, SHAPES, repeats=11, name="step")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as --heads")
    parser.add_argument("--latent", type=int, default=0, help="width of latent attention's rows; 0: plain attention")
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=0, help="default: none, one MLP for all tokens")
    parser.add_argument("--topk", type=int, default=2, help="experts of a token")
    parser.add_argument("--expert-ffn", type=int, default=704, help="width of an expert")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--logprob-tokens", type=int, default=4096)
    parser.add_argument("--logprob-vocab", type=int, default=131072)
    parser.add_argument("--logprob-hidden", type=int, default=256)
    parser.add_argument("--logprob-dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--fresh", choices=(*FORMS, "chunked", "log_softmax"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    return args


def main() -> None:
    args = parse_arguments()
    device_and_threads(args.threads)
    if args.fresh:
        growth = step_memory(args) if args.fresh in FORMS else logprobs_memory(args)
        print(json.dumps({"peak_growth_bytes": growth}))
        return
    parts = {
        "step": (bench_step, print_step),
        "memory": (bench_memory, print_memory),
        "logprobs": (bench_logprobs, print_logprobs),
    }
    result = {}
    for name in args.parts:
        bench, show = parts[name]
        result[name] = bench(args)
        show(result[name], args)
    settings = {name: getattr(args, name) for name in (*SETTINGS, "repeats")}
    write_results(args.json, record(**settings) | result)


if __name__ == "__main__":
    main()
