"""What an evaluation or a ranking leaves in the run's folder: numbers, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.files import write_json, write_whole
from recipes.bias.titles import titles

__all__ = [
    "harness_lines", "plot_professions", "plot_ranking", "ranking_stem", "summary_rows", "write_ranking", "write_report",
]  # fmt: skip

SHOWN = 12  # professions at either end of the chart
BARS = 40  # of a ranking's chart


def summary_rows(result: dict, words: tuple[str, str] = ("he", "she")) -> list[tuple[str, str]]:
    """(name, value) of what `evaluate` found, in words."""
    return [(title, _shown(result, key)) for key, title in titles(result, words).items()]


def _shown(result: dict, key: str) -> str:
    value, ends = result[key], result.get(f"{key}_interval")
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.3f}" for k, v in value.items())
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if ends is None else f"{value:.4f} [{ends[0]:.4f}, {ends[1]:.4f}]"


def write_report(
    folder: Path, title: str, result: dict, words: tuple[str, str] = ("he", "she"), more: Sequence[str] = ()
) -> None:
    """bias.json, bias.md, with `more` lines, and professions.png."""
    write_json(folder / "bias.json", result)
    plot_professions(result["profession_table"], folder / "professions.png", words)
    table = result["profession_table"]
    lines = [f"# {title}", "", f"{result['professions']} professions, {result['prompts']} prompts of GenBiasEval and "
             f"{result['hinted_prompts']} of GenHintEval. Intervals: 95 %, bootstrap over professions or, in public sets, over "
             "what their questions share.", "",
             "| measure | value |", "|---|---:|"]  # fmt: skip
    lines += [f"| {name} | {value} |" for name, value in summary_rows(result, words)]
    lines += [*more, "", "![most skewed professions](professions.png)", "", f"## P({words[0]}) - P({words[1]}) by profession", "",
              "| profession | difference |", "|---|---:|"]  # fmt: skip
    lines += [f"| {name} | {value:+.4f} |" for name, value in table.items()]
    write_whole(folder / "bias.md", "\n".join(lines) + "\n")


def harness_lines(numbers: dict[str, dict[str, float]], cut: int, max_length: int) -> list[str]:
    """Markdown: what lm-evaluation-harness found, by task and metric, and of how many rows the model read a part at a time."""
    lines = ["", "## General ability, by lm-evaluation-harness", "", "| task | metric | value |", "|---|---|---:|"]
    for task, metrics in numbers.items():
        kept = {metric: value for metric, value in metrics.items() if "," in metric and "stderr" not in metric}
        lines += [f"| {task} | {metric} | {value:.4f} |" for metric, value in kept.items()]
    if cut:
        lines += ["", f"{cut} rows are longer than the {max_length} tokens that the model reads: their beginnings were left out, "
                  "or they were read in windows."]  # fmt: skip
    return lines


def plot_professions(table: dict[str, float], path: Path, words: tuple[str, str] = ("he", "she")) -> None:
    """Bars of the professions at either end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    items = list(table.items())
    shown = items if len(items) <= 2 * SHOWN else items[:SHOWN] + items[-SHOWN:]
    figure, axes = plt.subplots(figsize=(7, 0.26 * len(shown) + 1.2), layout="constrained")
    values = [value for _, value in shown]
    axes.barh([name for name, _ in shown], values, color=["#c4554d" if v < 0 else "#4878a8" for v in values])
    axes.axvline(0, color="black", linewidth=0.8)
    limit = max(0.05, 1.05 * max(map(abs, values)))
    axes.set(xlim=(-limit, limit), xlabel=f"P({words[0]}) - P({words[1]}), mean over templates")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"the {len(shown)} most skewed of {len(items)} professions", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def ranking_stem(ranking: BlockRanking) -> str:
    """What the names of its files begin with."""
    return f"ranking-{ranking.estimator}" + ("" if ranking.grain == "blocks" else f"-{ranking.grain}")


def write_ranking(folder: Path, ranking: BlockRanking) -> None:
    """ranking-<estimator>.json, .md and .png; of places finer than blocks ranking-<estimator>-<parts or heads>."""
    stem = ranking_stem(ranking)
    write_json(folder / f"{stem}.json", ranking.as_dict())
    title = f"# {ranking.grain.capitalize()} by BMI, estimator {ranking.estimator}"
    write_whole(folder / f"{stem}.md", f"{title}\n\n{ranking.markdown()}\n\n![ranking]({stem}.png)\n")
    plot_ranking(ranking, folder / f"{stem}.png")


def plot_ranking(ranking: BlockRanking, path: Path) -> None:
    """Bars of all blocks, the best one marked, excluded ones grey; of finer places those that lead, as many as can be read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict.fromkeys(ranking.excluded, "#b0b0b0") | {ranking.best: "#c4554d"}
    shown = range(len(ranking.scores)) if ranking.grain == "blocks" else sorted(ranking.order[:BARS])
    figure, axes = plt.subplots(figsize=(max(5, 0.3 * len(shown)), 3.2), layout="constrained")
    bars = range(len(shown))
    axes.bar(bars, [ranking.scores[p] for p in shown], color=[colours.get(p, "#4878a8") for p in shown])
    if ranking.names:
        axes.set_xticks(bars, [ranking.name(p) for p in shown], rotation=90, fontsize=7)
    title = f"BMI by {ranking.estimator}: block {ranking.name(ranking.best)} is chosen"
    axes.set(xlabel="block", ylabel="importance", title=title)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
