"""Does a run fit, how long does a step take, and which layout is fastest: estimates from the YAML alone, no GPU needed.

    python tools/plan.py --config grpo model=llama3_1_70b cluster=8x8
    python tools/plan.py --config grpo model=qwen2_5_7b --nodes 4 --hardware H200 --search --growth 1024 --plot plan.png
    python tools/plan.py --config sft_tiny model.vocab_size=400 trainer.devices=4

Overrides are a recipe's. Lengths are the longest that the YAML allows unless --prompt and --response say what is typical.
Bytes of parameters, gradients and optimizer are exact; times are estimates that were never measured on a GPU. Ends with 0
where it fits, 1 where it does not, 2 for bad input. How it works: docs/planner.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from bench_common import print_table

warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")  # they warn while they are imported

from megatron_ext.errors import UserError  # noqa: E402
from megatron_ext.planner import HARDWARE, Estimate, best_layouts, estimate, grouping_gain, grow  # noqa: E402
from megatron_ext.planner.parameters import model_parameters  # noqa: E402
from recipes.cli.errors import user_errors  # noqa: E402
from recipes.planning import job_of, read_config  # noqa: E402

GIB, GB = 1 << 30, 1e9


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of nemo_configs/, with or without .yaml")
    parser.add_argument("--nodes", type=int, help="instead of the YAML's; cluster= follows")
    parser.add_argument("--hardware", default="H100", help=f"one of {', '.join(HARDWARE)}")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--response", type=int, help="tokens of a response")
    parser.add_argument("--search", action="store_true", help="list the fastest layouts of what fits")
    parser.add_argument("--growth", type=int, metavar="GPUS", help="double the nodes up to so many GPUs")
    parser.add_argument("--plot", type=Path, help="a bar chart (PNG)")
    parser.add_argument("overrides", nargs="*", help="key=value, as on a recipe's command line")
    return parser.parse_args()


@user_errors()
def main() -> None:
    chosen = options()
    if chosen.growth is not None and chosen.growth < 1:
        raise UserError(f"--growth {chosen.growth}: give the GPUs up to which to grow")
    if chosen.plot and chosen.plot.suffix != ".png":
        raise UserError(f"--plot {chosen.plot}: the chart is a .png")
    job = job_of(read_config(chosen.config, chosen.overrides, chosen.nodes), chosen.prompt, chosen.response)
    estimated = estimate(job, chosen.hardware)
    print(f"{chosen.config}: {model_parameters(job.model) / GB:.2f} billion parameters, {describe(estimated)}")
    print(estimated.reason)
    print_memory(estimated)
    print_time(estimated)
    if job.samples > 1:
        print_grouping(estimated)
    if chosen.search:
        print_search(estimated)
    if chosen.growth:
        print_growth(estimated, chosen.growth)
    print("\nAssumed, never measured on a GPU:")
    lines = [estimated.hardware.source, *estimated.assumptions.lines()]
    if chosen.growth:
        lines += estimated.assumptions.growth_lines()
    print("\n".join(f"  {line}" for line in lines))
    if chosen.plot:
        draw(estimated, chosen.plot)
        print(f"chart in {chosen.plot}")
    sys.exit(0 if estimated.fits else 1)


def describe(estimated: Estimate) -> str:
    job = estimated.job
    group = f"prompt {job.prompt} + {job.samples} x {job.response}" if job.samples > 1 else f"{job.response} tokens"
    return (
        f"{job.groups} groups ({group}) per optimizer step, {job.updates} optimizer step(s) per step, "
        f"{len(job.microbatches)} streams of up to {job.largest().shape.tokens} rows per rank"
    )


def print_memory(estimated: Estimate) -> None:
    names = ("parameters", "gradients", "optimizer", "copies", "activations", "working", "locating", "cache")
    print_table(
        "GiB on the fullest rank of each pipeline stage (cache, of sampling, and activations are not there together; host is not "
        "in the peak)",
        ("stage", *names, "peak", "host"),
        [
            (
                str(stage.stage),
                *(f"{getattr(stage, name) / GIB:.2f}" for name in names),
                f"{stage.total / GIB:.2f}",
                f"{stage.host / GIB:.2f}",
            )
            for stage in estimated.stages
        ],
    )


def print_time(estimated: Estimate) -> None:
    step = estimated.step
    title = f"Seconds of a step, estimated: {step.total:.2f}"
    print_table(title, tuple(step.parts()), [tuple(f"{value:.2f}" for value in step.parts().values())])
    if step.sent:
        values = [tuple(f"{value / GB:.1f}" for value in step.sent.values())]
        print_table("GB that one rank sends in a step, sampling excepted", tuple(step.sent), values)
    busy = step.flops / estimated.job.world / (step.total - step.sampling - step.tower) / estimated.hardware.flops
    seen = " and the vision tower" if step.tower else ""
    print(f"\n{step.flops:.3g} operations of all ranks, sampling{seen} excepted: {busy:.0%} of the peak in that time")
    if estimated.job.samples > 1 and not estimated.job.rollout:
        weights = model_parameters(estimated.job.model) * estimated.job.model.dtype.itemsize
        print(
            "Servers sample: their seconds and their GPUs' memory are not planned. Exported weights take "
            f"{weights / GIB:.1f} GiB in /dev/shm or trainer.grpo.rollout.weights_dir, twice that while they are replaced."
        )


def print_grouping(estimated: Estimate) -> None:
    gain = grouping_gain(estimated)
    verdict = "pays" if gain.pays else "does not pay"
    print(
        f"\nPrefix grouping {verdict}: {gain.repeated_tokens / gain.tokens:.2f} times fewer tokens through the layers, "
        f"{gain.repeated_flops / gain.flops:.2f} times fewer operations, a step {gain.repeated_seconds / gain.seconds:.2f} "
        f"times as fast ({gain.seconds:.1f} s instead of {gain.repeated_seconds:.1f} s)"
    )


def print_search(estimated: Estimate) -> None:
    rows = []
    for p in best_layouts(estimated.job, estimated.hardware, estimated.assumptions):
        m = p.job.model
        sizes = (m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size)
        again = m.activations_checkpoint_granularity or "null"
        sizes = tuple(map(str, (*sizes, m.expert_model_parallel_size, p.job.data_parallel)))
        rows.append((*sizes, again, f"{p.bytes_per_rank / GIB:.1f}", f"{p.step.total:.2f}"))
    if rows:
        header = ("TP", "PP", "CP", "EP", "DP", "recompute", "GiB per rank", "seconds")
        print_table("The fastest layouts of what fits", header, rows)
    else:
        print("\nNo layout fits.")


def print_growth(estimated: Estimate, gpus: int) -> None:
    nodes, count = [], estimated.job.nodes
    if gpus < estimated.job.world:
        raise UserError(f"--growth {gpus} is less than the {estimated.job.world} GPUs of the run")
    while count * estimated.job.devices <= gpus:
        nodes.append(count)
        count *= 2
    rows = []
    for g in grow(estimated, nodes):
        strong = ("-", "-")
        if g.strong_seconds is not None:
            strong = (f"{g.strong_seconds:.2f}", f"{g.strong_efficiency:.0%}")
        rows.append((str(g.gpus), str(g.data_parallel), f"{g.weak_seconds:.2f}", f"{g.weak_efficiency:.0%}", *strong))
    print_table(
        "Growth: the batch grows with the ranks (weak) or stays (strong); efficiency in tokens per GPU and second",
        ("GPUs", "DP", "weak: seconds", "efficiency", "strong: seconds", "efficiency"),
        rows,
    )


def draw(estimated: Estimate, path: Path) -> None:
    """Memory of every stage beside the GPU's, and a step with prompts shared and repeated."""
    import dataclasses

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(11, 4.2))
    stages = {f"stage {s.stage}": {n: v / GIB for n, v in s.parts().items()} for s in estimated.stages}
    _stack(memory, stages)
    memory.axhline(estimated.hardware.memory / GIB, color="black", linewidth=1)
    memory.axhline((estimated.hardware.memory - estimated.assumptions.reserve) / GIB, color="black", linestyle=":")
    memory.set_ylabel("GiB per rank at the peak")
    memory.set_title(f"memory ({estimated.hardware.name}; dotted: less a reserve)")
    job = estimated.job
    forms = {"step": estimated}
    if job.samples > 1:
        forms = {
            name: estimate(dataclasses.replace(job, share_prefix=share), estimated.hardware, estimated.assumptions)
            for name, share in (("prompts shared", True), ("prompts repeated", False))
        }
    _stack(seconds, {name: p.step.parts() for name, p in forms.items()})
    seconds.set_ylabel("seconds of a step, estimated")
    seconds.set_title("time (never measured on a GPU)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _stack(axes, bars: dict[str, dict[str, float]]) -> None:
    """One bar for each key, its parts on top of each other."""
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    below = [0.0] * len(bars)
    for name in names:
        values = [parts.get(name, 0.0) for parts in bars.values()]
        axes.bar(list(bars), values, 0.5, bottom=below, label=name)
        below = [b + v for b, v in zip(below, values, strict=True)]
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


if __name__ == "__main__":
    main()
