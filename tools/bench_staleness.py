"""What the age of rollouts does: GRPO of the tiny task with our own sampler, and with a vLLM server that samples 0, 1 and 2 steps
ahead, with and without `trainer.grpo.off_policy`.

    make vllm
    python tools/bench_staleness.py --seeds 1 2 3

One server serves all runs, one after the other: each gives it its weights. Rewards are means over responses of the last five
steps; ages and distances over all steps.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Name: what GRPO is told beside the task.
KINDS = {
    "our own sampler": [],
    "0": ["trainer.grpo.max_staleness=0"],
    "1": ["trainer.grpo.max_staleness=1"],
    "1, off_policy": ["trainer.grpo.max_staleness=1", "trainer.grpo.off_policy={}"],
    "2": ["trainer.grpo.max_staleness=2"],
    "2, off_policy": ["trainer.grpo.max_staleness=2", "trainer.grpo.off_policy={}"],
}
LAST = 5  # steps whose reward is told
LENGTH = 256  # tokens of prompt and response, as the tiny model has them


def run(*command: object, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def make(folder: Path) -> None:
    """The task and a model that has begun to learn it, ours and as a Hugging Face folder."""
    run("tools/make_word_problems.py", "--out", folder / "data", "--seed", 1)
    run(
        "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={folder / 'data/sft.jsonl'}",
        f"model.tokenizer={folder / 'data/tokenizer'}", f"exp_manager.explicit_log_dir={folder / 'sft'}",
        "trainer.devices=1", "model.share_embeddings_and_output_weights=false",
    )  # fmt: skip
    run("tools/convert_hf.py", "export", folder / "sft/checkpoints/final", folder / "hf")


def train(options: argparse.Namespace, folder: Path, kind: str, seed: int, server: list[str], key: str) -> list[dict]:
    """Metrics of each step."""
    out = folder / f"{kind} {seed}".replace(",", "").replace(" ", "-")
    run(
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", f"data.train_path={folder / 'data/train.jsonl'}",
        f"data.validation_path={folder / 'data/test.jsonl'}", f"exp_manager.explicit_log_dir={out}",
        f"pretrained_checkpoint.restore_from_path={folder / 'sft/checkpoints/final'}", "trainer.devices=1",
        f"model.seed={seed}", f"trainer.grpo.max_steps={options.steps}", f"model.optim.lr={options.lr}",
        f"trainer.grpo.val_check_interval={options.steps}", *KINDS[kind], *server, MEGATRON_EXT_VLLM_KEY=key,
    )  # fmt: skip
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(rows: list[dict]) -> dict[str, float]:
    steps = [row for row in rows if "train_rollouts/reward" in row]
    return {
        "reward": mean(row["train_rollouts/reward"] for row in steps[-LAST:]),
        "held_out": rows[-1]["val_rollouts/reward"],
        "age": mean(row.get("train_rollouts/staleness", 0.0) for row in steps),
        "distance": mean(row["train_optim/sampler_logprob_diff"] for row in steps),
        "distance_max": max(row["train_optim/sampler_logprob_diff_max"] for row in steps),
        "seconds": mean(row["timers/step"] for row in steps[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-4, help="of GRPO")
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter with vLLM")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/staleness_cpu.json")
    options = parser.parse_args()

    from megatron_ext.vllm_servers import ServerProcesses, VllmOptions

    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        served = VllmOptions(start=1, python=options.python, arguments=("--enforce-eager",))
        with ServerProcesses(served, folder / "hf", "float32", LENGTH, folder, folder / "removed") as processes:
            (url,) = processes.urls
            rollout = f'+trainer.grpo.rollout={{source: vllm, urls: ["{url}"], weights_dir: {folder / "weights"}}}'
            for seed in options.seeds:
                for kind in KINDS:
                    server = [] if kind == "our own sampler" else [rollout]
                    result = summary(train(options, folder, kind, seed, server, processes.key))
                    found[kind].append(result)
                    print(seed, kind, result, flush=True)
    rows = [
        [kind, *(f"{spread([r[name] for r in results]):.3f}" for name in results[0])] for kind, results in found.items()
    ]
    print_table(
        f"{options.steps} steps, seeds {options.seeds}, learning rate {options.lr:g}",
        [
            "max_staleness",
            "reward of the last 5 steps",
            "held out",
            "age, steps",
            "distance, nats",
            "largest",
            "s a step",
        ],
        rows,
    )
    write_results(options.json, record(steps=str(options.steps), lr=str(options.lr)) | {"runs": found})


if __name__ == "__main__":
    main()
