"""What GRPO learns, beside TRL's GRPOTrainer: the tiny task from the same warm start, step by step, over seeds.

    make trl
    python tools/bench_trl_curve.py --seeds 1 2 3

Both take 32 prompts of 16 responses a step and one optimizer step: AdamW at the same rate with the same warm-up, norm clipped at
1, clip range 0.2, advantages of the group over its standard deviation, a mean over tokens, KL to the warm start (k3) at 0.01.
They draw other prompts in another order and other tokens: what is alike is what they are expected to learn. TRL's reward is the
number behind the last "####", ours is exact_answer, which reads it there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from bench_common import print_table, record, spread, write_results
from bench_staleness import make, run

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, SAMPLES, WARMUP, BETAS, KL, TOKENS = 32, 16, 5, (0.9, 0.95), 0.01, 16
FIRST, LAST = 3, 5  # steps whose mean reward is told
TRL = ROOT / "tools/trl/curve.py"


def ours(options: argparse.Namespace, folder: Path, seed: int) -> list[float]:
    """Mean reward of each step."""
    out = folder / f"ours-{seed}"
    run(
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", f"data.train_path={folder / 'data/train.jsonl'}",
        f"exp_manager.explicit_log_dir={out}", f"pretrained_checkpoint.restore_from_path={folder / 'sft/checkpoints/final'}",
        "trainer.devices=1", f"model.seed={seed}", f"trainer.grpo.max_steps={options.steps}", f"model.optim.lr={options.lr}",
        f"model.optim.sched.warmup_steps={WARMUP}", f"model.optim.betas={list(BETAS)}",
        f"trainer.grpo.num_prompts_per_grpo_step={PROMPTS}", f"trainer.grpo.samples_per_prompt={SAMPLES}",
        f"trainer.grpo.length_params.max_length={TOKENS}", f"trainer.grpo.initial_policy_kl_penalty={KL}",
    )  # fmt: skip
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [step["train_rollouts/reward"] for step in steps if "train_rollouts/reward" in step]


def trls(options: argparse.Namespace, folder: Path, seed: int) -> list[float]:
    given = {
        "seed": seed, "steps": options.steps, "lr": options.lr, "prompts": PROMPTS, "samples": SAMPLES, "warmup": WARMUP,
        "betas": BETAS, "kl": KL, "tokens": TOKENS,
    }  # fmt: skip
    command = [options.python, str(TRL), str(folder), json.dumps(given)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: TRL ended with status {done.returncode}: {done.stderr[-3000:]}")
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("rewards ")]
    return json.loads(said.removeprefix("rewards "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=str(ROOT / ".venv-trl/bin/python"), help="interpreter that has TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/trl_curve_cpu.json")
    options = parser.parse_args()
    found: dict[str, list[list[float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for seed in options.seeds:
            for who, train in {"ours": ours, "trl": trls}.items():
                found[who].append(train(options, folder, seed))
                print(seed, who, [round(reward, 3) for reward in found[who][-1]], flush=True)
    stretches = {f"steps 1 to {FIRST}": slice(FIRST), f"last {LAST}": slice(-LAST, None), "all": slice(None)}
    rows = [
        [who, *(f"{spread([mean(curve[part]) for curve in curves]):.3f}" for part in stretches.values())]
        for who, curves in found.items()
    ]
    print_table(f"mean reward over {options.steps} steps, seeds {options.seeds}", ["", *stretches], rows)
    write_results(options.json, record(steps=str(options.steps), lr=str(options.lr)) | {"rewards": found})


if __name__ == "__main__":
    main()
