"""What an evaluation or a ranking leaves in the run's folder: numbers, tables and charts."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.files import write_whole

__all__ = ["plot_professions", "plot_ranking", "summary_rows", "write_lftf_report", "write_ranking", "write_report"]

SHOWN = 12  # professions at either end of the chart


def summary_rows(result: dict, words: tuple[str, str] = ("he", "she")) -> list[tuple[str, str]]:
    """(name, value) of what `evaluate` found, in words."""
    first, second = words

    def interval(key: str) -> str:
        low, high = result[f"{key}_interval"]
        return f"{result[key]:.4f} [{low:.4f}, {high:.4f}]"

    rows = [
        ("AFGB (0 is fair)", interval("afgb")),
        ("UB (1 follows every hint)", interval("ub")),
        (f"mean P({first}) + P({second})", f"{result['pronoun_mass']:.4f}"),
        ("the same on hinted prompts", f"{result['hinted_pronoun_mass']:.4f}"),
        (f"share of prompts preferring {first!r}", f"{result['share_preferring_first']:.3f}"),
    ]
    optional = {
        "perplexity": "perplexity of neutral text",
        "crows_pairs_stereotype_share": "CrowS-Pairs: share preferring the stereotype (ideal 0.5)",
        "crows_pairs": "CrowS-Pairs: pairs of bias type gender",
        "winobias_stereotype_share": "WinoBias: share preferring the stereotype (ideal 0.5)",
        "winobias_pairs": "WinoBias: pairs",
        "winobias_dropped": "WinoBias: pairs left out, which differ in more than pronouns",
        "winogender_accuracy": "Winogender: accuracy",
        "winogender_accuracy_by_gender": "Winogender: accuracy by pronoun",
        "winogender_questions": "Winogender: questions",
    }
    for key, title in optional.items():
        if (value := result.get(key)) is not None:
            if isinstance(value, dict):
                shown = ", ".join(f"{k} {v:.3f}" for k, v in value.items())
            else:
                shown = str(value) if isinstance(value, int) else f"{value:.4f}"
            rows.append((title, shown))
    return rows


def write_report(folder: Path, title: str, result: dict, words: tuple[str, str] = ("he", "she")) -> None:
    """bias.json, bias.md and professions.png."""
    write_whole(folder / "bias.json", json.dumps(result, indent=1) + "\n")
    plot_professions(result["profession_table"], folder / "professions.png", words)
    table = result["profession_table"]
    lines = [f"# {title}", "", f"{result['professions']} professions, {result['prompts']} prompts of GenBiasEval and "
             f"{result['hinted_prompts']} of GenHintEval. Intervals: 95 %, bootstrap over professions.", "",
             "| measure | value |", "|---|---:|"]  # fmt: skip
    lines += [f"| {name} | {value} |" for name, value in summary_rows(result, words)]
    lines += ["", "![most skewed professions](professions.png)", "", f"## P({words[0]}) - P({words[1]}) by profession", "",
              "| profession | difference |", "|---|---:|"]  # fmt: skip
    lines += [f"| {name} | {value:+.4f} |" for name, value in table.items()]
    write_whole(folder / "bias.md", "\n".join(lines) + "\n")


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


def write_ranking(folder: Path, ranking: BlockRanking) -> None:
    """ranking-<estimator>.json, .md and .png."""
    stem = f"ranking-{ranking.estimator}"
    write_whole(folder / f"{stem}.json", json.dumps(ranking.as_dict(), indent=1) + "\n")
    title = f"# Blocks by BMI, estimator {ranking.estimator}"
    write_whole(folder / f"{stem}.md", f"{title}\n\n{ranking.markdown()}\n\n![ranking]({stem}.png)\n")
    plot_ranking(ranking, folder / f"{stem}.png")


def plot_ranking(ranking: BlockRanking, path: Path) -> None:
    """Bars of all blocks, the best one marked, excluded ones grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict.fromkeys(ranking.excluded, "#b0b0b0") | {ranking.best: "#c4554d"}
    blocks = range(len(ranking.scores))
    figure, axes = plt.subplots(figsize=(max(5, 0.3 * len(blocks)), 3.2), layout="constrained")
    axes.bar(blocks, ranking.scores, color=[colours.get(block, "#4878a8") for block in blocks])
    axes.set(xlabel="block", ylabel="importance", title=f"BMI by {ranking.estimator}: block {ranking.best} is chosen")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_lftf_report(folder: Path, result: dict, words: tuple[str, str]) -> None:
    """report.md: before and after, the ranking, the validations."""
    block = result["block"]
    what = "every block trained" if block is None else f"block {block} trained"
    lines = ["# LFTF", "", f"{what.capitalize()}, loss {result['loss']}, {result['steps']} steps: {result['stopped']}.", "",
             "| measure, on professions held out | before | after |", "|---|---:|---:|"]  # fmt: skip
    rows = zip(summary_rows(result["before"], words), summary_rows(result["after"], words), strict=True)
    lines += [f"| {name} | {old} | {new} |" for (name, old), (_, new) in rows]
    if result["ranking"]:
        ranking = BlockRanking(**{k: v for k, v in result["ranking"].items() if k != "best"})
        lines += [
            "",
            f"## Blocks by {ranking.estimator}",
            "",
            ranking.markdown(),
            "",
            f"![ranking](ranking-{ranking.estimator}.png)",
        ]
    lines += [
        "",
        "## Validations",
        "",
        "| step | AFGB | pronoun mass | perplexity | guard |",
        "|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {v['step']} | {v['val/afgb']:.4f} | {v['val/pronoun_mass']:.4f} | {v.get('val/perplexity', float('nan')):.3f} "
        f"| {v['complaint'] or 'kept'} |"
        for v in result["validations"]
    ]
    write_whole(folder / "report.md", "\n".join(lines) + "\n")
