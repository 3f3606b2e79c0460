"""What came of `train_video_niah.py`: a table with its spread over seeds, and a heat map, from one run folder or several.

    python recipes/video_niah_report.py runs/niah-1 runs/niah-2 --out runs/niah_report

The metric, stated before any run: the share of questions whose answer is the most likely token of all. The headline is its
mean over the four kinds of questions and the test lengths beyond those trained on, each length weighing the same;
mean and standard deviation over seeds. The same with look-alikes of the needle (V-NIAH-D) and after a switch of schemes, beside
the accuracy within the trained lengths: what differs there is how fast a scheme is learnt, and not how far it reaches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors
from recipes.niah.task import KINDS

__all__ = ["headline", "main", "read_results", "write_report"]


def read_results(folders: list[Path]) -> list[dict]:
    """The results of all (scheme, seed) pairs in these run folders.

    Raises:
        UserError: there is none, or a pair was run twice, or runs tested different things.
    """
    found = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("result-*.json"))]
    if not found:
        raise UserError(f"no result-*.json in {', '.join(map(str, folders))}")
    pairs = [(r["scheme"], r["seed"]) for r in found]
    for pair in set(pairs):
        if pairs.count(pair) > 1:
            raise UserError(f"scheme {pair[0]} with seed {pair[1]} is in these folders twice")
    if len({json.dumps(r["settings"], sort_keys=True) for r in found}) > 1:
        raise UserError("the runs were made with different settings and cannot be compared")
    return found


def accuracy(result: dict, frames: list[int], kinds=KINDS) -> float:
    """Mean over kinds, depths and these numbers of frames."""
    cells = [row[kind] for row in result["cells"] if row["frames"] in frames for kind in kinds]
    return sum(cells) / len(cells)


def beyond(result: dict) -> list[int]:
    """Numbers of frames longer than any trained on."""
    settings = result["settings"]
    return [f for f in settings["test_frames"] if f > max(settings["train_frames"])]


def headline(results: list[dict]) -> dict[str, list[float]]:
    """Of each scheme, the headline of each seed."""
    found: dict[str, list[float]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        found.setdefault(result["scheme"], []).append(accuracy(result, beyond(result)))
    return found


def _spread(values: list[float]) -> str:
    """The mean alone where there is one seed, which says nothing of a spread."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _about_seeds(seeds: dict[str, list[int]]) -> tuple[str, str]:
    """(how many seeds, what the numbers are); schemes with different seeds are named one by one."""
    count = len(next(iter(seeds.values())))
    if len(set(map(tuple, seeds.values()))) == 1:
        if count == 1:
            return "one seed", "Accuracy in %; one seed, so no spread."
        return f"{count} seeds", "Accuracy in %, mean ± standard deviation over seeds."
    named = "; ".join(f"{scheme}: {', '.join(map(str, own))}" for scheme, own in seeds.items())
    return "seeds as below", (
        "Accuracy in %, mean ± standard deviation over seeds, where there is more than one.\n\n"
        f"**The schemes were not run with the same seeds, so their rows differ by more than the scheme.** Seeds of {named}."
    )


def write_report(results: list[dict], out: Path) -> str:
    """Write report.md and niah.png; returns the Markdown."""
    settings = results[0]["settings"]
    within = [f for f in settings["test_frames"] if f <= max(settings["train_frames"])]
    far = beyond(results[0])
    schemes = list(dict.fromkeys(r["scheme"] for r in results))
    how_many, meaning = _about_seeds({s: sorted(r["seed"] for r in results if r["scheme"] == s) for s in schemes})
    headlines = headline(results)
    low, high = settings["train_frames"]
    before = settings.get("transfer")
    first = (
        f"First {before['max_steps']} steps with {before['scheme']}, then each scheme from these weights. "
        if before
        else ""
    )
    period = settings.get("distractor_period")
    first += f"A look-alike of the needle every {period} frames. " if period else ""
    lines = [
        f"{first}Trained on {low} to {high} frames of {settings['height']} x {settings['width']}, {settings['max_steps']} steps, "
        f"{how_many}; {settings['test_videos']} videos for each length and depth. {meaning}",
        "",
        f"| scheme | {low} to {high} frames | beyond: {', '.join(map(str, far))} | "
        + " | ".join(f"{kind}, beyond" for kind in KINDS)
        + " |",
        "|---" * (3 + len(KINDS)) + "|",
    ]
    for scheme in schemes:
        mine = [r for r in results if r["scheme"] == scheme]
        cells = [_spread([accuracy(r, within) for r in mine]), f"**{_spread(headlines[scheme])}**"]
        cells += [_spread([accuracy(r, far, (kind,)) for r in mine]) for kind in KINDS]
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    lines += ["", "Mean over the four kinds, by number of frames:", ""]
    lines.append("| scheme | " + " | ".join(str(f) for f in settings["test_frames"]) + " |")
    lines.append("|---" * (1 + len(settings["test_frames"])) + "|")
    for scheme in schemes:
        mine = [r for r in results if r["scheme"] == scheme]
        lines.append(
            f"| {scheme} | "
            + " | ".join(_spread([accuracy(r, [f]) for r in mine]) for f in settings["test_frames"])
            + " |"
        )
    text = "\n".join(lines) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text, encoding="utf-8")
    _plot(results, schemes, out / "niah.png")
    return text


def _plot(results: list[dict], schemes: list[str], path: Path) -> None:
    """Rows: schemes. Columns: kinds. Each map: accuracy by depth (down) and number of frames (right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    settings = results[0]["settings"]
    frames, depths = settings["test_frames"], sorted({c["depth"] for c in results[0]["cells"]})
    figure, axes = plt.subplots(
        len(schemes),
        len(KINDS),
        figsize=(2.6 * len(KINDS), 1.9 * len(schemes)),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for i, scheme in enumerate(schemes):
        mine = [r for r in results if r["scheme"] == scheme]
        for j, kind in enumerate(KINDS):
            grid = np.zeros((len(depths), len(frames)))
            for result in mine:
                for cell in result["cells"]:
                    grid[depths.index(cell["depth"]), frames.index(cell["frames"])] += cell[kind] / len(mine)
            image = axes[i, j].imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes[i, j].axvline(sum(f <= max(settings["train_frames"]) for f in frames) - 0.5, color="black", lw=1)
            if i == 0:
                axes[i, j].set_title(kind)
            if j == 0:
                axes[i, j].set_ylabel(f"{scheme}\ndepth")
    for axis in axes[-1]:
        axis.set_xticks(range(len(frames)), frames)
        axis.set_xlabel("frames")
    axes[0, 0].set_yticks(range(len(depths)), [f"{d:.2f}" for d in depths])
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.6, label="accuracy, mean over seeds")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(write_report(read_results(args.folders), args.out))
