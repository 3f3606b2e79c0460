"""How position schemes favour places of a video: maps side by side (PNG) and a table. No model, no training.

    python tools/plot_position_bias.py
    python tools/plot_position_bias.py --frames 64 --rows 12 --columns 20 --head-dim 64 --base 1000000 --plot bias.png

What is measured, and how: megatron_ext/rotary/measures.py. A flat map is best; so is a small step from video to text. The
table says what speaks against a scheme, too: VRoPE favours late frames far more than the M-RoPE family.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from bench_common import print_table

from megatron_ext.errors import UserError
from megatron_ext.rotary import SCHEMES, Video, find_scheme
from megatron_ext.rotary.measures import Bias, measure
from recipes.cli.errors import user_errors

PLOT = Path(__file__).resolve().parents[1] / "docs" / "images" / "position_bias.png"
MAPS_IN_A_ROW = 5
HEADER = (
    "scheme",
    "largest / smallest",
    "variation",
    "180-degree asymmetry",
    "tilt",
    "temporal steepness",
    "gap to text",
)


def plot(found: dict[str, Bias], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # One scale for all, symmetric in logarithms, so that a map's colour strength is comparable with its neighbours'.
    span = max(max(float(b.map.max()), 1 / float(b.map.min())) for b in found.values())
    columns = min(len(found), MAPS_IN_A_ROW)
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, bias) in zip(axes.flat, found.items(), strict=False):
        image = axis.imshow(bias.map.log2(), cmap="RdBu_r", vmin=-math.log2(span), vmax=math.log2(span))
        axis.set_title(f"{name}\nmax/min {bias.largest_over_smallest:.2f}\nasymmetry {bias.asymmetry:.3f}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.8 / rows)
    bar.set_label("attention of the text after it, log2 of the mean")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rows", type=int, default=24, help="tokens, after patches are merged")
    parser.add_argument("--columns", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--base", type=float, default=1e4)
    parser.add_argument("--queries", type=int, default=64, help="text tokens after the video")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help="names, or dotted paths of your own")
    parser.add_argument("--plot", type=Path, default=PLOT, help="default: %(default)s")
    args = parser.parse_args()
    with user_errors():
        if args.head_dim < 2 or args.head_dim % 2:
            raise UserError(f"--head-dim {args.head_dim} must be even, at least 2: pairs of channels are turned")
        video = Video(args.frames, args.rows, args.columns)
        schemes = [find_scheme(name) for name in args.schemes]
        found = {s.name: measure(video, s, args.head_dim, args.base, args.queries) for s in schemes}
    title = f"{video.t} frames of {video.h} x {video.w}, head dimension {args.head_dim}, base {args.base:g}"
    rows = [
        (
            name, f"{b.largest_over_smallest:.3f}", f"{b.variation:.3f}", f"{b.asymmetry:.3f}", f"{b.tilt:.4f}",
            f"{b.temporal_steepness:.1f}", f"{b.text_gap:.1f}",
        )
        for name, b in found.items()
    ]  # fmt: skip
    print_table(title, HEADER, rows)
    plot(found, title, args.plot)
    print(f"\nmaps: {args.plot}")


if __name__ == "__main__":
    main()
