"""What a study of blocks (`lftf_study.py run`) has found: estimators against what training every block achieved."""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench_common import print_table, record, write_results

from megatron_ext.errors import UserError

ESTIMATORS = ("similarity", "gradient", "intervention")
GUARD = {"pronoun_mass": 0.8, "perplexity": 1.03}
RESAMPLES = 2000


def gains(before: dict[str, float], runs: Sequence[dict], guarded: bool) -> dict[int, dict[int, float]]:
    """By seed and block: how much lower AFGB is, as a share of it before."""
    found: dict[int, dict[int, float]] = {}
    for one in runs:
        after = one["scores"]
        kept = (
            after["pronoun_mass"] >= GUARD["pronoun_mass"] * before["pronoun_mass"]
            and after["perplexity"] <= GUARD["perplexity"] * before["perplexity"]
        )
        gain = (before["afgb"] - after["afgb"]) / before["afgb"]
        found.setdefault(one["seed"], {})[one["block"]] = gain if kept or not guarded else 0.0
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Not a number where one side is all alike."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def compared(scores: Sequence[float], by_seed: dict[int, dict[int, float]], rng: random.Random) -> dict:
    """An estimator's scores against gains, over the blocks that every seed has."""
    blocks = common(by_seed)
    mean = {block: statistics.mean(found[block] for found in by_seed.values()) for block in blocks}
    drawn = [rng.choices(blocks, k=len(blocks)) for _ in range(RESAMPLES)]
    values = [spearman([scores[b] for b in some], [mean[b] for b in some]) for some in drawn if len(set(some)) > 2]
    values = sorted(value for value in values if value == value)
    ends = [values[int(share * (len(values) - 1))] for share in (0.025, 0.975)] if values else [float("nan")] * 2
    first = max(blocks, key=lambda block: (scores[block], -block))
    return {
        "correlation": spearman([scores[b] for b in blocks], [mean[b] for b in blocks]),
        "interval": ends,
        "by_seed": {s: spearman([scores[b] for b in blocks], [g[b] for b in blocks]) for s, g in by_seed.items()},
        "first": first,
        "regret": max(mean.values()) - mean[first],
        "regret_by_seed": {s: max(g[b] for b in blocks) - g[first] for s, g in by_seed.items()},
    }


def common(by_seed: dict[int, dict[int, float]]) -> list[int]:
    return sorted(set.intersection(*(set(found) for found in by_seed.values())))


def summary(folder: Path, guarded: bool, after: int | None = None) -> dict:
    """Of what is there: seeds that have every block. After so many steps, or the last."""
    plan, before = (json.loads((folder / name).read_text()) for name in ("plan.json", "before.json"))
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("block-*-seed-*.json"))]
    if after is not None:
        runs = [one | {"scores": one["on the way"][str(after)]} for one in runs]
    by_seed = gains(before["scores"], runs, guarded)
    whole = {seed: found for seed, found in by_seed.items() if len(found) == plan["blocks"]}
    if not whole:
        raise UserError(f"{folder}: no seed has all {plan['blocks']} blocks yet; go on with `run`")
    blocks = range(plan["blocks"])
    mean = [statistics.mean(found[block] for found in whole.values()) for block in blocks]
    spread = (
        [statistics.stdev(found[block] for found in whole.values()) for block in blocks] if len(whole) > 1 else None
    )
    scores = before["rankings"] | {"depth": list(map(float, blocks))}
    rng, best, upper = random.Random(1), max(mean), mean[plan["blocks"] // 2 :]
    return {
        "plan": plan, "before": before["scores"], "seeds": sorted(whole), "guarded": guarded, "gains": mean, "spread": spread,
        "estimators": {name: compared(values, whole, rng) for name, values in scores.items()},
        "regret": {"random": best - statistics.mean(mean), "last": best - mean[-1], "upper half": best - statistics.mean(upper)},
        "best_block": mean.index(best), "median_gain": statistics.median(mean), "matters": matters(mean, spread),
        "runs": {f"{one['block']}-{one['seed']}": one["scores"] for one in runs}, "rankings": before["rankings"],
    }  # fmt: skip


def matters(gains: Sequence[float], spread: Sequence[float] | None) -> bool | None:
    """Whether the best block gains at least twice what seeds differ by, at most, over the median one; None: one seed."""
    return None if spread is None else max(gains) - statistics.median(gains) >= 2 * max(spread)


def by_budget(folder: Path, guarded: bool) -> dict[int, dict]:
    """By number of steps, what `summary` says of them; empty where only the last was scored."""
    plan = json.loads((folder / "plan.json").read_text())
    found = {after: summary(folder, guarded, after) for after in plan.get("scored_after", ())}
    once = ("plan", "before", "rankings", "runs")[: 4 if guarded else 3]  # which are the same of all
    return {after: {key: value for key, value in one.items() if key not in once} for after, one in found.items()}


def decision(found: dict) -> dict[str, str]:
    """Of each estimator, by the rule of docs/lftf_study.md."""
    regret, told = found["regret"], {}
    for name in ESTIMATORS:
        one = found["estimators"][name]
        locates = one["interval"][0] > 0 and one["regret"] < regret["random"] / 2
        worth = locates and one["regret"] < min(regret["last"], regret["upper half"])
        told[name] = "locates, worth its pass" if worth else "locates" if locates else "does not locate"
    return told


def report(options: argparse.Namespace) -> None:
    results = {"as it is": summary(options.folder, False), "guarded": summary(options.folder, True)}
    for title, found in results.items():
        regret = found["regret"]
        rows = [
            [name, f"{one['correlation']:.2f} [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]",
             ", ".join(f"{value:.2f}" for value in one["by_seed"].values()), str(one["first"]), f"{100 * one['regret']:.1f} %",
             ", ".join(f"{100 * value:.1f}" for value in one["regret_by_seed"].values()), decision(found).get(name, "")]
            for name, one in found["estimators"].items()
        ]  # fmt: skip
        rows += [[name, "", "", "", f"{100 * value:.1f} %", "", ""] for name, value in regret.items()]
        print_table(
            f"{title}: {found['plan']['model']}, {found['plan']['blocks']} blocks, seeds {found['seeds']}; best block "
            f"{found['best_block']} gains {100 * max(found['gains']):.1f} %, the median {100 * found['median_gain']:.1f} %",
            ["ranked by", "Spearman", "by seed", "first choice", "regret", "by seed, %", ""],
            rows,
        )
        if found["matters"] is False:
            print(
                "the best block gains less than twice what seeds differ by over the median one: locating cannot matter"
            )
    for title, whole in tuple(results.items()):
        if curve := by_budget(options.folder, whole["guarded"]):
            print_curve(title, curve | {whole["plan"]["budget"]["steps"]: whole})
            results[f"{title}, on the way"] = curve
    write_results(options.json, record() | results)
    if options.figure is not None:
        plot(results["as it is"], options.figure)


def print_curve(title: str, curve: dict[int, dict]) -> None:
    """A row for each budget: which block is the best, what each estimator's correlation and choice are then."""
    rows = []
    for steps, found in curve.items():
        row = [
            str(steps),
            f"{found['best_block']}, {100 * max(found['gains']):.1f} %",
            f"{100 * found['median_gain']:.1f} %",
        ]
        for one in found["estimators"].values():
            low, high = one["interval"]
            row.append(f"{one['correlation']:.2f} [{low:.2f}, {high:.2f}], {one['first']}: {100 * one['regret']:.1f} %")
        rows.append(row + [f"{100 * value:.1f} %" for value in found["regret"].values()])
    names = list(next(iter(curve.values()))["estimators"])
    print_table(
        f"by budget, {title}: Spearman, first choice and its regret; at the right what others regret",
        ["steps", "best block", "median", *names, "random", "last", "upper half"],
        rows,
    )


def plot(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = range(found["plan"]["blocks"])
    figure, axes = plt.subplots(len(ESTIMATORS) + 1, 1, figsize=(8, 9), sharex=True)
    axes[0].bar(
        blocks, [100 * gain for gain in found["gains"]], yerr=found["spread"] and [100 * s for s in found["spread"]]
    )
    axes[0].set_ylabel("AFGB falls by, %")
    axes[0].set_title(f"{found['plan']['model']}: every block trained alone, seeds {found['seeds']}")
    for axis, name in zip(axes[1:], ESTIMATORS, strict=True):
        axis.bar(blocks, found["rankings"][name], color="tab:orange")
        axis.set_ylabel(name)
    axes[-1].set_xlabel("block")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
