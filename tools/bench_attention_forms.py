"""Time both forms of attention plan, forward and backward: where does copying a short prompt's keys pay?

    python tools/bench_attention_forms.py --threads 2

A call per level of the tree and a merge, against one call over copied keys (megatron_ext/attention/forms.py holds the
threshold that follows). Prompts of many lengths, responses of equal and of unequal length, one group and sixteen.
"""

from __future__ import annotations

import argparse

import torch
from bench_common import (
    DTYPES,
    add_common_options,
    device_and_threads,
    interleave,
    print_table,
    ratios,
    record,
    write_results,
)

from megatron_ext.attention import prefix_grouped_attention
from megatron_ext.grouping import PrefixGroups

PROMPTS = (4, 8, 16, 32, 64, 128, 256)
HEADS = ((8, 8), (8, 2))
# What is below each prompt, and how many such groups a stream holds.
RESPONSES = {
    "8 x 16": ([16] * 8, 1),
    "8 x 64": ([64] * 8, 1),
    "8 x 256": ([256] * 8, 1),
    "8 unequal, mean 152": ([250, 17, 300, 99, 180, 264, 31, 77], 1),
    "16 groups of 8 x 32": ([32] * 8, 16),
}


def speedup(prompt: int, responses: list[int], count: int, n: int, m: int, args, device: torch.device):
    groups = PrefixGroups.from_lengths([(prompt, responses)] * count, device=device)
    t, d, dtype = groups.num_tokens, args.head_dim, DTYPES["bf16" if device.type == "cuda" else "fp32"]
    leaves = [torch.randn(t, h, d, device=device, dtype=dtype).requires_grad_() for h in (n, m, m)]
    grad = torch.randn(t, n, d, device=device, dtype=dtype)

    def run(attention_plan: str):
        return lambda: torch.autograd.grad(
            prefix_grouped_attention(*leaves, groups, attention_plan=attention_plan), leaves, grad
        )

    return ratios(interleave({f: run(f) for f in ("levels", "one_call")}, args.repeats, device), "levels", "one_call")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, (), repeats=15, name="attention_forms")
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()
    device = device_and_threads(args.threads)
    torch.manual_seed(0)
    results = []
    for n, m in HEADS:
        for prompt in PROMPTS:
            found = {name: speedup(prompt, *shape, n, m, args, device) for name, shape in RESPONSES.items()}
            results.append(
                {"heads": n, "kv_heads": m, "prompt": prompt, "speedup": {k: vars(v) for k, v in found.items()}}
            )
    rows = [
        (f"{r['heads']}/{r['kv_heads']}", str(r["prompt"]), *(f"{s['median']:.2f}" for s in r["speedup"].values()))
        for r in results
    ]
    print_table("One call is faster than levels by", ("heads", "P", *RESPONSES), rows)
    write_results(args.json, record(head_dim=args.head_dim, repeats=args.repeats) | {"results": results})


if __name__ == "__main__":
    main()
