"""The demo: from nothing to GRPO with a shared prefix, on this machine, in minutes.

Makes word problems with an exact answer and a tokenizer, warms a tiny GPT up with SFT, trains it with GRPO on two
processes, repeats the first steps with model.prefix_grouping=false, writes a page about both, and shows what that changed.
Every stage is one of the project's own commands and is printed before it runs, so each can be run again with other settings.

    python tools/demo.py [--seed 1] [--short] [--out runs/demo-...] [--devices 2]
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ext.files import write_json  # noqa: E402
from tools.run_metrics import read_metrics  # noqa: E402


def default_devices() -> int:
    import torch

    gpus = torch.cuda.device_count()
    return 2 if not gpus else max(n for n in (1, 2, 4, 8) if n <= gpus)  # the batch sizes are powers of two


def command(*parts: object) -> list[str]:
    return [sys.executable, *(str(p) for p in parts)]


def run(title: str, parts: list[str]) -> float:
    """Run one stage, show its command, and return its seconds. Ends the demo with the stage's exit code on failure."""
    print(f"\n--- {title}\n{shlex.join(['python', *parts[1:]])}", flush=True)
    start = time.monotonic()
    code = subprocess.run(parts, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)
    return time.monotonic() - start


def plot_rewards(metrics: list[dict[str, float]], path: Path) -> None:
    """Mean reward of the samples, and of greedy answers to held-out prompts, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (
        ("train_rollouts/reward", "training samples", {"linewidth": 1.2}),
        ("val_rollouts/reward", "held-out, greedy", {"marker": "o", "linewidth": 2}),
    ):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="GRPO step", ylabel="mean reward (share of exact answers)", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def seconds_per_step(metrics: list[dict[str, float]], steps: int) -> float:
    """Median over the first `steps` steps, without the very first, which pays for warming up."""
    times = [m["timers/step"] for m in metrics if "timers/step" in m][:steps]
    return statistics.median(times[1:] or times)


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--devices", type=int, help="processes (default: one per GPU, at most 8; without a GPU 2)")
    parser.add_argument("--out", type=Path, help="new folder for everything (default: runs/demo-<time>)")
    parser.add_argument(
        "--short", action="store_true", help="a few steps of each stage: checks that it runs, learns nothing"
    )
    args = parser.parse_args()
    devices = args.devices or default_devices()
    out = (args.out or ROOT / "runs" / time.strftime("demo-%Y%m%d-%H%M%S")).resolve()
    data, compared = out / "data", 3 if args.short else 6
    start = time.monotonic()

    sizes = ["--sft", 640, "--train", 320, "--test", 40] if args.short else []
    run("1/6 the task", command("tools/make_word_problems.py", "--out", data, "--seed", args.seed, *sizes))
    sft = ["trainer.sft.max_steps=20"] if args.short else []
    common = [f"model.seed={args.seed}", f"trainer.devices={devices}"]
    sft_seconds = run(
        "2/6 warm start: supervised fine-tuning",
        command(
            "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={data / 'sft.jsonl'}",
            f"model.tokenizer={data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out / 'sft'}", *common, *sft,
        ),
    )  # fmt: skip
    grpo = [
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", f"data.train_path={data / 'train.jsonl'}",
        f"pretrained_checkpoint.restore_from_path={out / 'sft/checkpoints/final'}", *common,
    ]  # fmt: skip
    short = ["trainer.grpo.max_steps=4"] if args.short else []
    grpo_seconds = run(
        "3/6 GRPO, each prompt encoded once",
        command(
            *grpo, f"data.validation_path={data / 'test.jsonl'}", f"exp_manager.explicit_log_dir={out / 'grpo'}",
            f"trainer.grpo.rollout_dump={{every_n_steps: {1 if args.short else 7}}}", *short,
        ),
    )  # fmt: skip
    run(
        f"4/6 the first {compared} steps again, each response with its own copy of the prompt",
        command(
            *grpo, f"exp_manager.explicit_log_dir={out / 'repeated'}", "model.prefix_grouping=false",
            "trainer.grpo.val_check_interval=0", f"trainer.grpo.max_steps={compared}",
        ),
    )  # fmt: skip

    run(
        "5/6 a page about both",
        command("tools/report.py", out / "grpo", out / "repeated", "--out", out / "report.html"),
    )
    print("\n--- 6/6 results")
    grouped, repeated = read_metrics(out / "grpo"), read_metrics(out / "repeated")
    plot_rewards(grouped, out / "reward.png")
    accuracy = [m["val_rollouts/reward"] for m in grouped if "val_rollouts/reward" in m]
    steps = [m for m in grouped if "timers/step" in m]
    executed = sum(m["train_optim/tokens_executed"] for m in steps)
    plain = sum(m["train_optim/tokens_repeated"] for m in steps)
    ours, theirs = seconds_per_step(steps, compared), seconds_per_step(repeated, compared)
    same = abs(steps[0]["train_optim/loss"] - repeated[0]["train_optim/loss"])
    result = {
        "seed": args.seed,
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[-1],
        "tokens_executed": executed,
        "tokens_repeated": plain,
        "seconds_per_step_grouped": ours,
        "seconds_per_step_repeated": theirs,
        "seconds_sft": sft_seconds,
        "seconds_grpo": grpo_seconds,
        "seconds_total": time.monotonic() - start,
    }
    write_json(out / "result.json", result)
    print(
        table(
            [
                ("held-out accuracy before GRPO", f"{accuracy[0]:.1%}"),
                ("held-out accuracy after GRPO", f"{accuracy[-1]:.1%}"),
                ("tokens executed, grouped", f"{executed:,.0f}"),
                ("tokens executed, repeated", f"{plain:,.0f}  ({plain / executed:.1f}x)"),
                ("seconds per step, grouped", f"{ours:.2f}"),
                ("seconds per step, repeated", f"{theirs:.2f}  ({theirs / ours:.1f}x, sampling included)"),
                ("loss of the first step", f"differs by {same:.1e} between the two forms"),
                ("whole demo", f"{result['seconds_total']:.0f} s"),
                ("reward curve", str(out / "reward.png")),
                ("curves, samples, settings", str(out / "report.html")),
                ("metrics, checkpoints", f"{out / 'grpo'}"),
            ]
        )
    )


if __name__ == "__main__":
    main()
