"""LFTF from nothing to a report, on this machine, in minutes: what `make lftf` runs.

For each seed: writes a biased corpus, trains a tiny GPT on it, ranks its blocks by every BMI estimator, fine-tunes, and
evaluates on professions held out of the fine-tuning: each estimator's block, a random and the last one, all blocks, a part and
heads of one, what LFTF is compared with (LoRA, a closed-form edit, steering, GRPO), and each loss on the block that `gradient`
chose. Every stage is one of the project's own commands, printed before it runs.

    python tools/lftf.py [--seeds 1] [--jobs 2] [--short] [--out runs/lftf-...]

Leaves report.md, report.png and results.json in --out, and every run with its own report beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from megatron_ext.errors import UserError
from megatron_ext.files import write_json, write_whole
from recipes.cli.errors import user_errors
from tools.demo import ROOT, command, run

ESTIMATORS = ("similarity", "gradient", "intervention", "random", "last")
# Which blocks train is compared with the default loss of lftf_tiny, which loss on one block.
LOSSES = {
    "balanced": "balanced",
    "balanced+hint": "balanced+hint",
    "balanced+kl": "balanced+kl",
    "abs_diff": "abs_diff",
    "abs_diff+hint+kl": "abs_diff+hint+kl",
    "sum": "sum",
    "sum, no guard": "sum",
}
# What else is compared, and the folder of each.
OTHERS = {
    "part of gradient": "part",
    "4 heads of gradient": "heads",
    "LoRA on all blocks": "lora",
    "closed-form edit": "edit",
    "steering": "steer",
    "GRPO": "grpo",
}
GRPO_RUN = "grpo-run"
NO_GUARD = ["trainer.lftf.min_pronoun_mass=0", "trainer.lftf.max_perplexity=null", "trainer.lftf.patience=null"]
# What a mended model must keep, of the model before: see docs/bias.md.
LEAST_FALL, LARGEST_UB_LOSS, LEAST_MASS, LARGEST_PERPLEXITY = 0.6, 0.05, 0.8, 1.03


def build_model(out: Path, seed: int, short: bool, devices: int) -> list[str]:
    """Corpus, biased model and rankings of one seed; returns what all fine-tunings have in common."""
    data, checkpoint = out / "data", out / "biased/checkpoints/final"
    sizes = ["--biased", 1500, "--hinted", 750, "--neutral", 750, "--held-out", 64] if short else []
    run(f"seed {seed}: a biased corpus", command("tools/make_biased_corpus.py", "--out", data, "--seed", seed, *sizes))
    run(
        f"seed {seed}: a model of it",
        command(
            "recipes/train_sft.py", "--config-name", "sft_bias_tiny", f"data.train_path={data / 'sft.jsonl'}",
            f"model.tokenizer={data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out / 'biased'}",
            f"model.seed={seed}", f"trainer.devices={devices}", *(["trainer.sft.max_steps=20"] if short else []),
        ),
    )  # fmt: skip
    run(
        f"seed {seed}: its blocks by every estimator",
        command(
            "recipes/locate_bias.py", f"pretrained_checkpoint.restore_from_path={checkpoint}",
            f"exp_manager.explicit_log_dir={out / 'located'}", f"trainer.locate.estimators=[{','.join(ESTIMATORS)}]",
            f"trainer.locate.seed={seed}", f"trainer.devices={devices}",
            *(["trainer.locate.locate_prompts=16"] if short else []),
        ),
    )  # fmt: skip
    return [
        f"pretrained_checkpoint.restore_from_path={checkpoint}", f"data.text_path={data / 'neutral_train.jsonl'}",
        f"data.validation_text_path={data / 'neutral_test.jsonl'}", f"model.seed={seed}",
        *(["trainer.lftf.max_steps=4", "trainer.lftf.val_check_interval=2"] if short else []),
    ]  # fmt: skip


def plan_runs(located: Path, seed: int, short: bool) -> dict[str, list[str]]:
    """Fine-tunings of one seed by name: each distinct block once, all blocks, each loss."""
    best = {name: json.loads((located / f"ranking-{name}.json").read_text())["best"] for name in ESTIMATORS}
    runs = {f"block-{block}": [f"trainer.lftf.block={block}"] for block in sorted(set(best.values()))}
    runs["all"] = ["trainer.lftf.block=all"]
    for name, loss in LOSSES.items():
        options = [f"trainer.lftf.block={best['gradient']}", f"trainer.lftf.loss={loss}"]
        runs[loss_run(name)] = options + (NO_GUARD if "no guard" in name else [])
    runs["part"] = ["trainer.lftf.block=gradient", "trainer.lftf.places=parts"]
    runs["heads"] = ["trainer.lftf.block=gradient", "trainer.lftf.places=heads", "trainer.lftf.num_places=4"]
    runs["lora"] = ["trainer.lftf.block=all", "++model.peft={dim: 8, alpha: 16}", "model.optim.lr=1e-2"]
    if short:
        runs = {name: runs[name] for name in (f"block-{best['gradient']}", loss_run("sum, no guard"))}
    return runs


def plan_baselines(out: Path, block: int, seed: int) -> dict[str, list[list[str]]]:
    """Commands of what trains no place: an edit of the block that `gradient` chose, steering behind it, GRPO of all weights."""
    data, model, tool = out / "data", out / "biased/checkpoints/final", "tools/bias_baselines.py"
    held_out = ["--validation-text", data / "neutral_test.jsonl"]
    trained = command(
        "recipes/train_grpo.py", "--config-name", "grpo_bias_tiny", f"data.train_path={data / 'grpo.jsonl'}",
        f"pretrained_checkpoint.restore_from_path={model}", f"exp_manager.explicit_log_dir={out / GRPO_RUN}",
        f"model.seed={seed}", "trainer.devices=1",
    )  # fmt: skip
    place = ["--block", block, *held_out]
    edited = command(tool, "edit", model, "--out", out / "edit", "--text", data / "neutral_train.jsonl", *place)
    steered = command(tool, "steer", model, "--out", out / "steer", *place)
    final = out / GRPO_RUN / "checkpoints/final"
    measured = command(tool, "other", model, "--out", out / "grpo", "--checkpoint", final, *held_out)
    return {"edit": [edited], "steer": [steered], "grpo": [trained, measured]}


def loss_run(name: str) -> str:
    """The folder of a loss."""
    return "loss-" + name.replace(", ", "-").replace(" ", "-")


def fine_tuning(folder: Path, common: list[str], options: list[str]) -> list[str]:
    """The command of one."""
    where = f"exp_manager.explicit_log_dir={folder}"
    return command("recipes/train_lftf.py", "--config-name", "lftf_tiny", where, *common, *options)


def run_one(out: Path, name: str, commands: list[list[str]]) -> dict:
    """One run, its output in a log file beside it."""
    folder = out / name
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        for parts in commands:
            log.write(" ".join(parts) + "\n")
            log.flush()
            code = subprocess.run(parts, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            if code:
                raise SystemExit(f"error: {name} ended with code {code}; see {folder}.log")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def run_all(out: Path, runs: dict[str, list[list[str]]], jobs: int) -> dict[str, dict]:
    """Results by name, in the order of `runs`. Where one fails, those that have not begun are not begun."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit="run", mininterval=1) as bar:
        waiting = {pool.submit(run_one, out, name, commands): name for name, commands in runs.items()}
        results: dict[str, dict] = {}
        try:
            for future in as_completed(waiting):
                results[waiting[future]] = future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: results[name] for name in runs}


def row(name: str, result: dict) -> dict:
    """What the report compares, after against before."""
    before, after = result["before"], result["after"]
    found = {
        "name": name, "places": result["places"], "steps": result["steps"], "kept_step": result["best_step"],
        "stopped": result["stopped"], "afgb": after["afgb"], "afgb_interval": after["afgb_interval"], "ub": after["ub"],
        "afgb_fall": 1 - after["afgb"] / before["afgb"], "ub_change": after["ub"] - before["ub"],
        "mass_kept": after["pronoun_mass"] / before["pronoun_mass"],
        "perplexity_ratio": after["perplexity"] / before["perplexity"],
    }  # fmt: skip
    found["holds"] = (
        found["afgb_fall"] >= LEAST_FALL
        and found["ub_change"] >= -LARGEST_UB_LOSS
        and found["mass_kept"] > LEAST_MASS
        and found["perplexity_ratio"] < LARGEST_PERPLEXITY
    )
    return found


def one_seed(out: Path, seed: int, args: argparse.Namespace) -> dict:
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True)
    common = build_model(folder, seed, args.short, args.devices)
    best = {name: json.loads((folder / f"located/ranking-{name}.json").read_text()) for name in ESTIMATORS}
    plan = plan_runs(folder / "located", seed, args.short)
    runs = {name: [fine_tuning(folder / name, common, options)] for name, options in plan.items()}
    if not args.short:
        runs |= plan_baselines(folder, best["gradient"]["best"], seed)
    print(f"\n--- seed {seed}: {len(runs)} runs, {args.jobs} at a time; each command is in its log", flush=True)
    results = run_all(folder, runs, args.jobs)
    first = next(iter(results.values()))["before"]
    rows = [row(f"block of {e}", results[key]) for e in ESTIMATORS if (key := f"block-{best[e]['best']}") in results]
    rows += [row("all blocks", results["all"])] if "all" in results else []
    rows += [row(name, results[key]) for name, key in OTHERS.items() if key in results]
    for name in LOSSES:
        if loss_run(name) in results:
            rows.append(row(f"loss {name}", results[loss_run(name)]))
    if not args.keep:
        for name in (*results, GRPO_RUN):
            shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)  # an edit and steering leave none
    before = {k: first[k] for k in ("afgb", "afgb_interval", "ub", "ub_interval", "pronoun_mass", "perplexity")}
    return {"seed": seed, "before": before, "rankings": best, "rows": rows}


def mean(seeds: list[dict], name: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [r[key] for s in seeds for r in s["rows"] if r["name"] == name]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_report(out: Path, seeds: list[dict], seconds: float) -> None:
    names = [r["name"] for r in seeds[0]["rows"]]
    several = len(seeds) > 1

    def cell(name: str, key: str, form: str) -> str:
        middle, spread = mean(seeds, name, key)
        return f"{middle:{form}}" + (f" ± {spread:{form.lstrip('+')}}" if several else "")

    lines = ["# LFTF on a tiny biased GPT", "",
             f"Seeds: {', '.join(str(s['seed']) for s in seeds)}; {seconds:.0f} s in all. Measured on test professions, which "
             "neither fine-tuning nor choosing saw. Neutral text is held out.", "",
             "| seed | AFGB before [95 %] | UB before | pronoun mass | perplexity |", "|---:|---:|---:|---:|---:|"]  # fmt: skip
    for s in seeds:
        b, (low, high) = s["before"], s["before"]["afgb_interval"]
        lines.append(
            f"| {s['seed']} | {b['afgb']:.3f} [{low:.3f}, {high:.3f}] | {b['ub']:.3f} | {b['pronoun_mass']:.3f} | "
            f"{b['perplexity']:.3f} |"
        )
    lines += ["", "| trained | block | AFGB after | AFGB falls by | UB changes by | pronoun mass kept | perplexity times | "
              "holds |", "|---|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name in names:
        rows = [r for s in seeds for r in s["rows"] if r["name"] == name]
        blocks = ", ".join("all" if r["places"] is None else " and ".join(r["places"]) for r in rows)
        lines.append(
            f"| {name} | {blocks} | {cell(name, 'afgb', '.4f')} | {cell(name, 'afgb_fall', '.1%')} | "
            f"{cell(name, 'ub_change', '+.3f')} | {cell(name, 'mass_kept', '.3f')} | {cell(name, 'perplexity_ratio', '.4f')} | "
            f"{sum(r['holds'] for r in rows)} of {len(rows)} |"
        )
    lines += [
        "",
        f"A row holds where AFGB falls by at least {LEAST_FALL:.0%}, UB by no more than {LARGEST_UB_LOSS}, pronoun mass stays "
        f"above {LEAST_MASS} of its start and perplexity below {LARGEST_PERPLEXITY} times. Blocks are compared with the loss of "
        "nemo_configs/lftf_tiny.yaml, losses on the block that `gradient` chose. The guard goes back to the best state that "
        "keeps pronouns and text; `sum, no guard` shows where that loss goes without it.",
        "",
        "![comparison](report.png)",
        "",
        "## Blocks, best first",
        "",
        "| estimator | " + " | ".join(f"seed {s['seed']}" for s in seeds) + " |",
        "|---|" + "---|" * len(seeds),
    ]
    for estimator in ESTIMATORS:
        orders = [", ".join(map(str, s["rankings"][estimator]["order"])) for s in seeds]
        lines.append(f"| {estimator} | " + " | ".join(orders) + " |")
    write_whole(out / "report.md", "\n".join(lines) + "\n")


def plot(out: Path, seeds: list[dict]) -> None:
    """Four panels of horizontal bars: AFGB, UB, pronoun mass and perplexity, before as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [r["name"] for r in seeds[0]["rows"]]
    start = {k: statistics.mean(s["before"][k] for s in seeds) for k in ("afgb", "ub")}
    panels = [
        ("afgb", "AFGB (0 is fair)", start["afgb"]),
        ("ub", "UB (1 follows hints)", start["ub"]),
        ("mass_kept", "pronoun mass kept", 1.0),
        ("perplexity_ratio", "perplexity, times start", 1.0),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(13, 0.36 * len(names) + 1.2), sharey=True, layout="constrained")
    for ax, (key, title, before) in zip(axes, panels, strict=True):
        middle, spread = zip(*(mean(seeds, name, key) for name in names), strict=True)
        ax.barh(names, middle, xerr=spread if len(seeds) > 1 else None, color="#4878a8", ecolor="#333333")
        ax.axvline(before, color="#c4554d", linestyle="--", linewidth=1.2, label="before")
        ax.set_xlabel(title)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[3].set_xlim(0.98, max(1.06, 1.02 * max(mean(seeds, n, "perplexity_ratio")[0] for n in names)))
    axes[0].legend(fontsize=8)
    figure.savefig(out / "report.png", dpi=130)
    plt.close(figure)


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=2, help="fine-tunings at a time, one process each")
    parser.add_argument("--devices", type=int, default=2, help="processes that make the model and rank its blocks")
    parser.add_argument("--out", type=Path, help="new folder for everything (default: runs/lftf-<time>)")
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoint of every fine-tuning, not only its delta"
    )
    parser.add_argument(
        "--short", action="store_true", help="a few steps of each stage: checks that it runs, learns nothing"
    )
    args = parser.parse_args()
    if min(args.jobs, args.devices) < 1 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--jobs and --devices must be at least 1, and no seed named twice")
    out = (args.out or ROOT / "runs" / time.strftime("lftf-%Y%m%d-%H%M%S")).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty, or no folder; choose another")
    start, seeds = time.monotonic(), []
    for seed in args.seeds:  # what has been found stays, should a later seed fail
        seeds.append(one_seed(out, seed, args))
        write_json(out / "results.json", seeds)
        write_report(out, seeds, time.monotonic() - start)
        plot(out, seeds)
    print(f"\n{(out / 'report.md').read_text(encoding='utf-8')}\nreport: {out / 'report.md'}")


if __name__ == "__main__":
    main()
