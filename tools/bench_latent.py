"""A decoding step of latent attention, one layer: the compressed cache, read absorbed or expanded, against an expanded cache.

    python tools/bench_latent.py
    python tools/bench_latent.py --heads 128 --latent 512 --shapes 2048,8,64 --threads 2

- absorbed: queries go over the compressed rows as they are (what `megatron_ext.models.latent` does).
- expanded in the step: keys and values of all heads are made of the compressed rows again in every step.
- expanded cache: keys and values of all heads are kept.

G responses of S tokens each have one prompt of P tokens. Outputs are compared before anything is timed, in seconds of the CPU.
Leaves out the projections that all three share.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_common import (
    DTYPES,
    MIB,
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
from torch import Tensor

from megatron_ext.attention import Scoring
from megatron_ext.attention.cache import DecodeStep, Row
from megatron_ext.attention.kernels import KERNELS
from megatron_ext.attention.pages import PAGE, PagePool

SHAPES = ("512,8,64", "2048,8,64", "2048,64,64")
WAYS = ("absorbed", "expanded in the step", "expanded cache")


class Layer:
    """Weights of a layer, and one prompt with its responses in both kinds of cache."""

    def __init__(self, args: argparse.Namespace, shape: tuple[int, int, int], device: torch.device):
        self.args, (p, g, s) = args, shape
        self.scoring = Scoring((args.plain + args.rotated) ** -0.5)
        draws, dtype = torch.Generator().manual_seed(1), DTYPES[args.dtype]

        def drawn(*size: int) -> Tensor:
            return torch.randn(size, generator=draws).to(device, dtype)

        self.up = drawn(args.heads, args.plain + args.value, args.latent) / args.latent**0.5
        self.query = drawn(g, args.heads, args.plain + args.rotated)
        rows = drawn(p + g * s, args.latent + args.rotated)
        self.newest = rows[p + s - 1 :: s]  # of each response; the step writes it again
        self.compressed, self.rows = self._fill([rows.unsqueeze(1)], shape)
        self.expanded, self.expanded_rows = self._fill(self.made(rows), shape)

    def made(self, rows: Tensor) -> list[Tensor]:
        """[..., latent + rotated] -> keys and values [..., n, d]; values padded to the size of keys, as its kernel wants them."""
        args = self.args
        latent, shared = rows.split([args.latent, args.rotated], -1)
        both = (latent @ self.up.flatten(0, 1).t()).unflatten(-1, (args.heads, -1))
        plain, value = both.split([args.plain, args.value], -1)
        return [torch.cat((plain, shared.unsqueeze(-2).expand(*plain.shape[:-1], -1)), -1), value.contiguous()]

    def _fill(self, kept: list[Tensor], shape: tuple[int, int, int]) -> tuple[PagePool, list[Row]]:
        p, g, s = shape
        pool = PagePool()
        prompt = pool.new(shared=True)
        pool.extend(prompt, p)
        own = [pool.new(shared=False) for _ in range(g)]
        for table in own:
            pool.extend(table, s)
        first = 0
        for table, count in ((prompt, p), *((table, s) for table in own)):
            place, within = torch.tensor(pool.place(table)), torch.arange(count)
            flat = pool.flat_rows(place[within // PAGE], within % PAGE, kept[0].size(1))
            pool.write(1, flat.to(kept[0].device), *(x[first : first + count] for x in kept))
            first += count
        return pool, [Row(prompt, table, p, s) for table in own]

    def step(self, way: str):
        """A function that attends and returns [g, n, value]."""
        args, up_key = self.args, self.up[:, : self.args.plain]
        up_value, kernel = self.up[:, self.args.plain :], KERNELS["blockwise"]
        step = DecodeStep(self.compressed, self.rows)
        if way == "absorbed":

            def run() -> Tensor:
                plain, turned = self.query.split([args.plain, args.rotated], -1)
                absorbed = torch.cat((torch.einsum("tnd,ndr->tnr", plain, up_key), turned), -1)
                out = step.attend_latent(1, absorbed, self.newest.unsqueeze(1), args.latent, self.scoring)
                return torch.einsum("tnr,ndr->tnd", out, up_value)

        elif way == "expanded in the step":

            def run() -> Tensor:
                (rows,) = step._write(1, self.newest.unsqueeze(1))
                keys, values = self.made(rows.squeeze(2))
                return step._read(self.query, keys, values, self.scoring, kernel, False, None)

        else:
            step = DecodeStep(self.expanded, self.expanded_rows)
            key, value = self.made(self.newest)

            def run() -> Tensor:
                return step._read(self.query, *step._write(1, key, value), self.scoring, kernel, False, None)

        return run

    def cache_bytes(self, way: str) -> int:
        pool = self.expanded if way == "expanded cache" else self.compressed
        return sum(x.nbytes for x in pool.layers[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, SHAPES, repeats=11, name="latent")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--latent", type=int, default=512)
    parser.add_argument("--plain", type=int, default=128, help="channels of a query head that do not rotate")
    parser.add_argument("--rotated", type=int, default=64)
    parser.add_argument("--value", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    device = device_and_threads(args.threads)
    rows, found = [], []
    for shape in parse_shapes(args.shapes):
        layer = Layer(args, shape, device)
        steps = {way: layer.step(way) for way in WAYS}
        expected = steps["expanded cache"]().double()
        for way, step in steps.items():
            difference = float((step().double() - expected).norm() / expected.norm())
            if not difference <= 32 * torch.finfo(DTYPES[args.dtype]).eps:
                raise SystemExit(f"{way} differs by {difference:.1e}, more than rounding; nothing is timed")
        times = interleave(steps, args.repeats, device, time.process_time)
        for way in WAYS:
            over = f"{ratios(times, way, 'absorbed'):.2f}" if way != "absorbed" else ""
            size = f"{layer.cache_bytes(way) / MIB:.1f}"
            rows.append((", ".join(map(str, shape)), way, size, f"{1000 * spread(times[way]).median:.2f}", over))
        found.append({"shape": shape, "seconds": times, "bytes": {way: layer.cache_bytes(way) for way in WAYS}})
    title = f"A decoding step of one layer: {args.heads} heads of {args.plain} + {args.rotated}, latent {args.latent}"
    print_table(title, ("P, G, S", "way", "cache, MiB", "CPU ms", "absorbed is faster by"), rows)
    settings = {
        name: getattr(args, name) for name in ("heads", "latent", "plain", "rotated", "value", "dtype", "repeats")
    }
    write_results(args.json, record(**settings) | {"steps": found})


if __name__ == "__main__":
    main()
