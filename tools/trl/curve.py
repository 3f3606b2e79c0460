"""A run of TRL's GRPOTrainer: its mean reward of each step. It runs in TRL's environment; bench_trl_curve.py starts it:

python tools/trl/curve.py FOLDER '{"seed": 1, "steps": 30, "lr": 2e-4, ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

TOGETHER = 4  # prompts whose responses make a microbatch


def main() -> None:
    folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    rows = [json.loads(line) for line in (folder / "data/train.jsonl").read_text().splitlines()]
    config = GRPOConfig(
        str(folder / f"trl-{given['seed']}"), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_strategy="no",
        max_steps=given["steps"], per_device_train_batch_size=TOGETHER * given["samples"],
        gradient_accumulation_steps=given["prompts"] // TOGETHER, num_generations=given["samples"], beta=given["kl"], epsilon=0.2,
        loss_type="dapo", scale_rewards="group", max_completion_length=given["tokens"], gradient_checkpointing=False,
        learning_rate=given["lr"], lr_scheduler_type="constant_with_warmup", warmup_steps=given["warmup"],
        adam_beta1=given["betas"][0], adam_beta2=given["betas"][1], weight_decay=0.0, max_grad_norm=1.0, disable_tqdm=True,
        seed=given["seed"], temperature=1.0, top_p=1.0, top_k=0,
    )  # fmt: skip
    model, found = AutoModelForCausalLM.from_pretrained(str(folder / "hf"), dtype=torch.float32), []

    def reward(completions, answer, **_):
        stated = [text.split("####")[-1].strip() for text in completions]
        found.append([float(said == right) for said, right in zip(stated, answer, strict=True)])
        return found[-1]

    GRPOTrainer(
        model, reward, config, Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(str(folder / "hf")),
    ).train()  # fmt: skip
    responses = given["prompts"] * given["samples"]
    assert [len(step) for step in found] == [responses] * given["steps"], [len(step) for step in found]
    print("rewards", json.dumps([sum(step) / len(step) for step in found]))


if __name__ == "__main__":
    main()
