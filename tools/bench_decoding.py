"""How long a step waits for its clips, with processes that decode the next one's and without.

    python tools/bench_decoding.py --workers 1 2

Clips of 10 seconds and 640 x 360 are written with PyAV. A step takes its clips' features and is then busy for --step seconds as
with a GPU, when the host waits. The kinds of run take turns, step by step; the first step, for which nothing has been read
ahead, is left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench_common import ROOT, print_table, record, spread, write_results

from recipes.cli.errors import user_errors
from recipes.data import clips
from recipes.data.clips import Clip, clip_content
from recipes.data.decoding import DecodeAhead
from recipes.data.rows import Prompt
from recipes.data.sampler import InOrder
from recipes.data.video_settings import VideoSettings

RATE, SECONDS, HEIGHT, WIDTH = 25, 10, 360, 640


def write_clip(path: Path, seed: int) -> None:
    import av
    import numpy as np

    noise = np.random.default_rng(seed)
    still = noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(RATE * SECONDS):
            picture = av.VideoFrame.from_ndarray(np.roll(still, 2 * number, axis=1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


class Run:
    """Steps over clips of its own."""

    def __init__(self, workers: int, rows: list[Prompt], batch: int):
        self.rows, self.order = rows, InOrder(batch, 0, 1)
        self.ahead = DecodeAhead(workers, rows, self.order)
        self.recent = clips._Recent(clips.CACHE_BYTES)
        self.waits: list[float] = []

    def step(self, busy: float) -> None:
        clips._recent = self.recent
        rows = [self.rows[i] for i in self.order.next()]
        start = time.perf_counter()
        clip_content([clip for row in rows for clip in row.media])
        self.waits.append(time.perf_counter() - start)
        self.ahead.next_batch()
        time.sleep(busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--clips", type=int, default=4, help="of a step")
    parser.add_argument("--step", type=float, default=2.0, help="seconds in which a step is busy otherwise")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/decoding_cpu.json")
    args = parser.parse_args()
    if min(args.steps, args.clips, *args.workers) < 1:
        parser.error("--steps, --clips and --workers must be at least 1")
    how = VideoSettings(num_frames=16, height=224, width=224, patch_size=14)
    with user_errors(), tempfile.TemporaryDirectory(prefix="bench_decoding_") as place:
        count = args.clips * (args.steps + 2)
        for number in range(args.clips):
            write_clip(Path(place) / f"{number}.mp4", number)
        waits = {}
        for number in range(args.clips, count):  # the same pictures under other names: nothing is decoded twice
            (Path(place) / f"{number}.mp4").hardlink_to(Path(place) / f"{number % args.clips}.mp4")
        rows = [
            Prompt((), {}, i, (Clip(str(Path(place) / f"{i}.mp4"), how.grid, how, f"row {i}"),)) for i in range(count)
        ]
        runs = {workers: Run(workers, rows, args.clips) for workers in (0, *args.workers)}
        for _ in range(args.steps + 1):
            for run in runs.values():
                run.step(args.step)
        for workers, run in runs.items():
            waits[workers] = run.waits[1:]
            run.ahead.close()
    found = {str(workers): [round(wait, 4) for wait in each] for workers, each in waits.items()}
    table = [[str(workers or "none"), *(f"{x:.3f}" for x in _quartiles(each))] for workers, each in waits.items()]
    print_table(
        f"Seconds that a step waits for {args.clips} clips of {SECONDS} s and {WIDTH} x {HEIGHT}, busy for {args.step:g} s",
        ["processes", "median", "lower quartile", "upper quartile"],
        table,
    )
    write_results(args.out, record(steps=args.steps, clips=args.clips, busy=args.step) | {"seconds": found})


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    found = spread(values)
    return found.median, found.low, found.high


if __name__ == "__main__":
    main()
