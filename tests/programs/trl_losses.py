"""TRL's own loss of a batch and the gradient of every weight, for tests/functional/test_trl.py: `python trl_losses.py FOLDER`,
in an environment that has TRL.

FOLDER holds model/ with its tokenizer, batch.safetensors and cases.json, a list of options of TRL's GRPOConfig; the loss and the
gradients of each, by name, are written to FOLDER/0.safetensors, 1.safetensors, ...
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def losses(folder: Path) -> None:
    batch = load_file(str(folder / "batch.safetensors"))
    rows = len(batch["prompt_ids"])
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    prompts = Dataset.from_dict({"prompt": ["x"] * rows})
    for number, options in enumerate(json.loads((folder / "cases.json").read_text())):
        config = GRPOConfig(
            str(folder / "out"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
            per_device_train_batch_size=rows, num_generations=2, disable_dropout=True, **options,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.float64)
        trainer = GRPOTrainer(
            model, lambda completions, **_: [0.0] * len(completions), config, prompts, processing_class=tokenizer
        )
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        loss = trainer._compute_loss(model, dict(batch))
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        save_file(found | {"loss": loss.detach().reshape(1)}, str(folder / f"{number}.safetensors"))


if __name__ == "__main__":
    losses(Path(sys.argv[1]))
