"""Time the rotary embedding of a long stream: building it, and rotating queries with it, against Megatron's own.

    python tools/bench_rotary.py --threads 2

Megatron's MultimodalRotaryEmbedding and ours on the same ids (its three axes in blocks, our `mrope`), and our other
schemes beside them. Rotation is Megatron's function for all. Nothing is timed before both give the same embedding.
"""

from __future__ import annotations

import argparse

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
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding

from megatron_ext.rotary import SCHEMES, PositionIdRotaryEmbedding, Text, Video, layout
from megatron_ext.runtime.distributed import ParallelSizes, initialize

FRAME = 24 * 24  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, (), repeats=11, name="rotary")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    if args.tokens < 2 * FRAME:
        parser.error(f"--tokens must be at least {2 * FRAME}: a frame of 24 x 24 tokens and as many of text around it")
    if args.head_dim < 2 or args.head_dim % 2:
        parser.error("--head-dim must be even, at least 2: pairs of channels are turned")
    device = device_and_threads(args.threads)
    initialize(ParallelSizes())
    frames = args.tokens // FRAME - 1
    items = [Text(100), Video(frames, 24, 24), Text(args.tokens - 100 - frames * FRAME)]
    query = torch.randn(args.tokens, 1, args.heads, args.head_dim, device=device)
    pairs = args.head_dim // 2
    section = [SCHEMES["mrope"].allocation(pairs).count(axis) for axis in range(3)]
    peer = MultimodalRotaryEmbedding(args.head_dim, 1.0)
    ids = {name: layout(items, name).ids.unsqueeze(1).to(device) for name in SCHEMES}
    ours = {name: PositionIdRotaryEmbedding(args.head_dim, 1e4, 1.0, device, name) for name in SCHEMES}

    def megatron():
        return peer(ids["mrope"], section)

    if not torch.equal(ours["mrope"](ids["mrope"]), megatron()):
        raise SystemExit("the embeddings differ on the same ids; nothing is timed")
    build = {"megatron": megatron} | {name: (lambda n=name: ours[n](ids[n])) for name in SCHEMES}
    results = {}
    for what, variants in {
        "build": build,
        "build and rotate": {n: (lambda f=f: _apply_rotary_pos_emb_bshd(query, f())) for n, f in build.items()},
    }.items():
        results[what] = interleave(variants, args.repeats, device)
    rows = [
        (what, name, f"{spread(times):.4f}", f"{ratios(seconds, name, 'megatron'):.2f}")
        for what, seconds in results.items()
        for name, times in seconds.items()
    ]
    title = f"Rotary embedding of {args.tokens} tokens, head dimension {args.head_dim}, {args.heads} heads, fp32"
    print_table(title, ("what", "variant", "seconds [quartiles]", "times Megatron's [quartiles]"), rows)
    settings = {name: getattr(args, name) for name in ("tokens", "heads", "head_dim", "repeats")}
    write_results(args.json, record(**settings) | {"seconds": results})


if __name__ == "__main__":
    main()
