"""Steps of TRL's GRPOTrainer whose responses end where lengths.json says. It runs in TRL's environment; bench_grpo.py starts it:

python tools/trl/steps.py FOLDER PROMPT_TOKENS SAMPLES PROMPTS STEPS THREADS TARGET
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        print("took", time.perf_counter() - self.began, flush=True)


class Ends:
    """The end of text where a response is to end, and nowhere else."""

    def __init__(self, prompt: int, wanted: torch.Tensor, end: int):
        self.prompt, self.wanted, self.end = prompt, wanted, end

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        last = ids.shape[1] - self.prompt == self.wanted - 1
        scores[:, self.end] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.end] = 0
        return scores


def main() -> None:
    folder, (prompt, samples, prompts, steps, threads, target) = Path(sys.argv[1]), map(int, sys.argv[2:8])
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    wanted = torch.tensor(json.loads((folder / "lengths.json").read_text())).flatten()
    config = GRPOConfig(
        str(folder / "out"), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_strategy="no", max_steps=steps,
        per_device_train_batch_size=samples, gradient_accumulation_steps=prompts, num_generations=samples, beta=0.0,
        max_completion_length=int(wanted.max()), gradient_checkpointing=False, learning_rate=1e-6, disable_tqdm=True,
        shuffle_dataset=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.float32)
    generate, ends = type(model).generate, Ends(prompt, wanted, model.config.eos_token_id)
    type(model).generate = lambda self, *a, **k: generate(self, *a, logits_processor=[ends], **k)
    seen = []

    def reward(completions, completion_ids, **_):
        seen.append([len(ids) for ids in completion_ids])
        return [-abs(len(text) - target) / target for text in completions]

    GRPOTrainer(
        model, reward, config, Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(str(folder / "model")), callbacks=[Clock()],
    ).train()  # fmt: skip
    assert all(step == wanted.tolist() for step in seen), seen


if __name__ == "__main__":
    main()
