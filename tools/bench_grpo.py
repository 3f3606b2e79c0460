"""A whole GRPO step beside TRL's GRPOTrainer: the same model, prompts, lengths, rewards and batch, sampling and update.

    make trl
    python tools/bench_grpo.py

A Qwen3 of 5 million parameters with random weights, fp32, on one rank. A step is --prompts prompts of P tokens with G responses
of exactly S, one optimizer step, no KL penalty: neither side runs another pass than sampling, forward and backward. TRL samples
with transformers' generate and trains one group at a time, its defaults otherwise; ours is the recipe. Each round starts one
process of each, in turns, whose first step is not counted. Nothing else should run.
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

from bench_common import print_table, ratios, record, spread, write_json

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}  # fmt: skip
SHAPES = ((1024, 8, 128), (256, 8, 256))
TARGET = 40  # of the reward: characters of a response, or rather how far it is from them
# Runs in TRL's environment: FOLDER P G S PROMPTS STEPS.
TRL = """
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

folder, (p, g, s, prompts, steps, threads) = sys.argv[1], map(int, sys.argv[2:8])
torch.set_num_threads(threads)

class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()
    def on_step_end(self, *_, **__):
        print("took", time.perf_counter() - self.began, flush=True)

rows = [json.loads(line) for line in open(f"{folder}/prompts.jsonl")]
config = GRPOConfig(
    f"{folder}/out", use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_strategy="no", max_steps=steps,
    per_device_train_batch_size=g, gradient_accumulation_steps=prompts, num_generations=g, beta=0.0,
    max_completion_length=s, generation_kwargs={"min_new_tokens": s}, gradient_checkpointing=False, learning_rate=1e-6,
    disable_tqdm=True, shuffle_dataset=False,
)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
lengths = set()
def reward(completions, completion_ids, **_):
    lengths.update(map(len, completion_ids))
    return [-abs(len(text) - TARGET) / TARGET for text in completions]
GRPOTrainer(
    model, reward, config, Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
    processing_class=AutoTokenizer.from_pretrained(f"{folder}/model"), callbacks=[Clock()],
).train()
assert lengths == {s}, lengths
""".replace("TARGET", str(TARGET))


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
    prompt, samples, response = shape
    out = folder / f"ours-{number}"
    command = [
        sys.executable, "recipes/train_grpo.py", "--config-name", "grpo_tiny", "model=pretrained", "trainer.devices=1",
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
    assert {step["train_rollouts/response_length"] for step in steps} == {response}
    return [step["timers/step"] for step in steps[1:]]


def trls(options: argparse.Namespace, folder: Path, shape: tuple[int, int, int], number: int) -> list[float]:
    numbers = (*shape, options.prompts, options.steps, options.threads)
    said = run([options.python, "-c", TRL, str(folder), *map(str, numbers)], options.threads)
    return [float(line.split()[1]) for line in said.splitlines() if line.startswith("took ")][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=str(ROOT / ".venv-trl/bin/python"), help="interpreter that has TRL")
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="of a process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/grpo_trl_cpu.json")
    options = parser.parse_args()
    rows, found = [], {}
    for shape in SHAPES:
        seconds: dict[str, list[float]] = {"ours": [], "trl": []}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, shape[0], 4 * options.prompts)
            for number in range(options.rounds):
                for who, step in list({"ours": ours, "trl": trls}.items())[:: 1 if number % 2 else -1]:
                    seconds[who] += step(options, folder, shape, number)
        found[",".join(map(str, shape))] = seconds
        rows.append([
            ", ".join(map(str, shape)), f"{spread(seconds['trl']):.2f}", f"{spread(seconds['ours']):.2f}",
            f"{ratios(seconds, 'trl', 'ours'):.2f}",
        ])  # fmt: skip
    print_table(
        f"{options.prompts} prompts a step, {options.threads} threads",
        ["P, G, S", "seconds a step, TRL", "ours", "times as fast"],
        rows,
    )
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "python")}
    write_json(options.json, record(**settings) | {"model": SHAPE, "seconds": found})


if __name__ == "__main__":
    main()
