"""A whole GRPO step beside TRL's GRPOTrainer: the same model, prompts, lengths, rewards and batch, sampling and update.

    make trl
    python tools/bench_grpo.py

A Qwen3 of 5 million parameters with random weights, fp32, on one rank. A step is --prompts prompts of P tokens with G responses
of exactly S, or of log-normal lengths (mean S, sigma 0.8, at most 8 S; the same in every step), one optimizer step, no KL
penalty: neither side runs another pass than sampling, forward and backward. TRL samples with transformers' generate and trains
one group at a time, its defaults otherwise; ours is the recipe. Each round starts one process of each, in turns, whose first
step is not counted. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_common import print_table, ratios, record, spread, write_results
from bench_rollouts import response_lengths

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}  # fmt: skip
SHAPES = ((1024, 8, 128, "equal"), (256, 8, 256, "equal"), (1024, 8, 128, "log-normal"))
TARGET = 40  # of the reward: characters of a response, or rather how far it is from them
# What runs in TRL's environment, and the recipe with responses that end where they shall.
TRL, OURS = ROOT / "tools/trl/steps.py", ROOT / "tools/trl/ours.py"


def make(folder: Path, prompt: int, rows: int) -> None:
    """The model with its tokenizer, a word for a token, and prompts of as many words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    words = {f"w{number}": number for number in range(SHAPE["vocab_size"] - 1)} | {"<eos>": SHAPE["vocab_size"] - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(str(folder / "model"))
    config = Qwen3Config(**SHAPE, max_position_embeddings=4096, eos_token_id=words["<eos>"])
    Qwen3ForCausalLM(config).save_pretrained(str(folder / "model"))
    rng = random.Random(1)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(rows):
            text = " ".join(f"w{rng.randrange(len(words) - 1)}" for _ in range(prompt))
            file.write(json.dumps({"prompt": text}) + "\n")


def run(command: list[str], threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:3])} ended with status {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


def ours(options: argparse.Namespace, folder: Path, shape: tuple[int, int, int], number: int) -> list[float]:
    """Seconds of each step but the first."""
    prompt, samples, _ = shape
    wanted = json.loads((folder / "lengths.json").read_text())
    response = max(map(max, wanted))
    out = folder / f"ours-{number}"
    command = [
        sys.executable, str(OURS), str(folder / "lengths.json"), "recipes/train_grpo.py", "--config-name", "grpo_tiny",
        "model=pretrained", "trainer.devices=1",
        f"pretrained_checkpoint.restore_from_path={folder / 'model'}", f"data.train_path={folder / 'prompts.jsonl'}",
        f"data.max_prompt_length={prompt}", f"exp_manager.explicit_log_dir={out}", f"trainer.grpo.max_steps={options.steps}",
        f"trainer.grpo.num_prompts_per_grpo_step={options.prompts}", f"trainer.grpo.samples_per_prompt={samples}",
        f"model.global_batch_size={options.prompts * samples}", f"trainer.grpo.length_params.max_length={response}",
        "trainer.grpo.sampling_params.ignore_eos=true", f"trainer.grpo.reward={{name: length, target: {TARGET}}}",
        "trainer.grpo.initial_policy_kl_penalty=0", "trainer.grpo.val_check_interval=0", "trainer.grpo.log_samples=0",
        f"model.encoder_seq_length={prompt + response}", "model.micro_batch_size=1", "model.precision=32", "model.optim.lr=1e-6",
        "exp_manager.create_tensorboard_logger=false",
    ]  # fmt: skip
    run(command, options.threads)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    mean = sum(map(sum, wanted)) / options.prompts / samples
    assert all(abs(step["train_rollouts/response_length"] - mean) < 1e-6 * mean for step in steps)
    return [step["timers/step"] for step in steps[1:]]


def trls(options: argparse.Namespace, folder: Path, shape: tuple[int, int, int], number: int) -> list[float]:
    numbers = (*shape[:2], options.prompts, options.steps, options.threads, TARGET)
    said = run([options.python, str(TRL), str(folder), *map(str, numbers)], options.threads)
    return [float(line.split()[1]) for line in said.splitlines() if line.startswith("took ")][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=str(ROOT / ".venv-trl/bin/python"), help="interpreter that has TRL")
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="of a process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/grpo_trl_cpu.json")
    parser.add_argument("--only", type=int, help="one of the shapes, counted from 0")
    options = parser.parse_args()
    options.shapes = SHAPES if options.only is None else SHAPES[options.only : options.only + 1]
    rows, found = [], {}
    for *shape, kind in options.shapes:
        seconds: dict[str, list[float]] = {"ours": [], "trl": []}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, shape[0], 4 * options.prompts)
            lengths = response_lengths(kind, options.prompts, shape[1], 1, mean=shape[2], cap=8 * shape[2])
            (folder / "lengths.json").write_text(json.dumps(lengths))
            for number in range(options.rounds):
                for who, step in list({"ours": ours, "trl": trls}.items())[:: 1 if number % 2 else -1]:
                    seconds[who] += step(options, folder, shape, number)
        found[",".join(map(str, (*shape, kind)))] = seconds
        rows.append([
            ", ".join(map(str, (*shape, kind))), f"{spread(seconds['trl']):.2f}", f"{spread(seconds['ours']):.2f}",
            f"{ratios(seconds, 'trl', 'ours'):.2f}",
        ])  # fmt: skip
    print_table(
        f"{options.prompts} prompts a step, {options.threads} threads",
        ["P, G, S, lengths", "seconds a step, TRL", "ours", "times as fast"],
        rows,
    )
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "python")}
    write_results(options.json, record(**settings) | {"model": SHAPE, "seconds": found})


if __name__ == "__main__":
    main()
