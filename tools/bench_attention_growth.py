"""How attention's time and memory grow, forward and backward, with the group and with the prompt: a table and a plot.

    python tools/bench_attention_growth.py --threads 2

Grouped against G repeated sequences: G = 2 .. 64 at a fixed prompt and response, and P = 1k .. 64k at a fixed group.
Memory is the peak growth of a fresh process over its inputs: the copies that a form needs, outputs, gradients. The
repeated form is left out where it would take more than --longest-repeated rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from bench_attention import Group, make_inputs, ours, repeated
from bench_common import (
    MIB,
    ROOT,
    PeakMemory,
    add_common_options,
    device_and_threads,
    interleave,
    print_table,
    record,
    run_fresh,
    spread,
    write_results,
)

from megatron_ext.flops import attention_pairs, num_tokens

GROWING = {
    "G": [Group.parse(f"1024,{g},128") for g in (2, 4, 8, 16, 32, 64)],
    "P": [Group.parse(f"{p},8,256") for p in (1024, 2048, 4096, 8192, 16384, 32768, 65536)],
}
FORMS = {"grouped": ours, "repeated": repeated}
PLOT = ROOT / "docs" / "images" / "attention_growth.png"


def rows_repeated(group: Group) -> int:
    return num_tokens([(group.prompt, group.responses)], share_prefix=False)


def peak(group: Group, form: str, args) -> int:
    options = ["--heads", str(args.heads), "--head-dim", str(args.head_dim)]
    if args.threads:
        options += ["--threads", str(args.threads)]
    return run_fresh([*options, "--fresh", form, "--shapes", group.text])["peak_growth_bytes"]


def bench(group: Group, args, device: torch.device) -> dict:
    lengths = [(group.prompt, group.responses)]
    forms = [f for f in FORMS if f == "grouped" or rows_repeated(group) <= args.longest_repeated]
    x = make_inputs(group, args, device)
    pairs = {f: attention_pairs(lengths, share_prefix=f == "grouped") for f in forms}
    repeats = args.repeats if max(pairs.values()) < 1e8 else 1
    times = interleave({f: FORMS[f](x) for f in forms}, repeats, device)
    return {
        "shape": group.text,
        "pairs": pairs,
        "seconds": times,
        "peak_bytes": {f: peak(group, f, args) for f in forms},
    }


def fresh(args, device: torch.device) -> None:
    """One form once, in this process; the answer is its last line."""
    x = make_inputs(Group.parse(args.shapes[0]), args, device)
    with PeakMemory(device) as memory:
        results = FORMS[args.fresh](x)()
    print(json.dumps({"peak_growth_bytes": memory.growth, "results": len(results)}))


def plot(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row")
    fixed = {"G": "P = 1024, S = 128", "P": "G = 8, S = 256"}
    for column, (what, rows) in enumerate(results.items()):
        sizes = [int(r["shape"].split(",")[1 if what == "G" else 0]) for r in rows]
        for form, color in (("grouped", "tab:blue"), ("repeated", "tab:red")):
            here = [(s, r) for s, r in zip(sizes, rows, strict=True) if form in r["seconds"]]
            x = [s for s, _ in here]
            seconds = [spread(r["seconds"][form]).median for _, r in here]
            axes[0, column].plot(x, seconds, "o-", color=color, label=form)
            # The first point's rate held: what time would be if it followed the number of query-key pairs.
            ideal = [seconds[0] * r["pairs"][form] / here[0][1]["pairs"][form] for _, r in here]
            axes[0, column].plot(x, ideal, ":", color=color, label=f"{form}, by pairs of rows")
            axes[1, column].plot(x, [r["peak_bytes"][form] / MIB for _, r in here], "o-", color=color, label=form)
        axes[0, column].set_title(f"{what} grows, {fixed[what]}")
        axes[1, column].set_xlabel({"G": "responses G", "P": "prompt length P"}[what])
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds, forward + backward")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, (), repeats=5, name="attention_growth")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--longest-repeated", type=int, default=140_000, help="rows of the largest repeated form")
    parser.add_argument("--plot", type=Path, default=PLOT, help="default: %(default)s")
    parser.add_argument("--fresh", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = device_and_threads(args.threads)
    args.kv_heads, args.dtype = args.heads, "bf16" if device.type == "cuda" else "fp32"
    if args.fresh:
        fresh(args, device)
        return
    results = {what: [bench(group, args, device) for group in groups] for what, groups in GROWING.items()}
    rows = []
    for found in results.values():
        for r in found:
            for form, seconds in r["seconds"].items():
                per_pair = spread(seconds).median / r["pairs"][form] * 1e9
                memory = f"{r['peak_bytes'][form] / MIB:.0f}"
                rows.append((r["shape"].replace(",", ", "), form, f"{spread(seconds):.3f}", f"{per_pair:.2f}", memory))
    print_table("Growth", ("P, G, S", "form", "seconds", "ns per pair of rows", "peak MiB"), rows)
    plot(results, args.plot)
    settings = {name: getattr(args, name) for name in ("heads", "head_dim", "dtype", "repeats")}
    write_results(args.json, record(**settings) | {"results": results})


if __name__ == "__main__":
    main()
