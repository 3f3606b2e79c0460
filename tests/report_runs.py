"""Folders of runs as the report reads them, made up: numbers drawn afresh, and text that means harm."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import yaml

from recipes.grpo.dump_files import write_step

# What a model may say, and a page must not act on.
HOSTILE = [
    "<script>document.title = 'owned'</script>", "]]></style></script><!--", '"><img src=x onerror="document.title=1">',
    "\x00\x07\x1b[2J", "\u202eright to left\u202c", "\ud800 alone", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "&lt;b&gt; & &#x27;", "x" * 9000, "line\nbreak\r\n\ttab", "{{ 7 * 7 }} {% raw %}", "\ufffe\uffff \U0001f468\u200d\U0001f469",
    "javascript:alert(1) //host/x http://host/y",
]  # fmt: skip
CONFIG = {
    "trainer": {"devices": 1, "grpo": {"max_steps": 12, "reward": "exact_answer", "sampling_params": {"top_k": None}}},
    "model": {"tokenizer": None, "optim": {"lr": 2e-4}, "prefix_grouping": "auto"},
    "exp_manager": {"explicit_log_dir": "runs/made-up"},
}


def draw(rng: torch.Generator) -> float:
    return torch.rand((), generator=rng, dtype=torch.float64).item()


def write_run(folder: Path, rng: torch.Generator, steps: int = 12, dumps: bool = True, **config: object) -> list[dict]:
    """A run of GRPO with a validation before its first step and after every fourth; returns its log.

    Args:
        config: of its `model`.
    """
    rows: list[dict[str, float]] = [{"step": 0, "val_rollouts/reward": draw(rng), "timers/validation": draw(rng)}]
    folder.mkdir(parents=True)
    for step in range(1, steps + 1):
        names = ("train_rollouts/reward", "train_rollouts/response_length", "train_optim/kl", "train_optim/entropy")
        row = {"step": step, **{name: draw(rng) for name in names}, "train_rollouts/turns": 1.0}
        row["train_rollouts/reward/format"] = draw(rng)
        row["train_optim/sampler_logprob_diff"] = 10 ** (-7 * draw(rng))
        row |= {"timers/weights": draw(rng), "timers/generate": 1 + draw(rng), "timers/actor_update": draw(rng)}
        row["timers/step"] = row["timers/generate"] + row["timers/actor_update"] + draw(rng)
        if step % 4 == 0:
            row |= {
                "val_rollouts/reward": draw(rng),
                "timers/validation": draw(rng),
                "val_rollouts/gsm/pass_at_4": draw(rng),
            }
        if dumps:
            write_step(folder / "rollouts", *made_up_step(step, rng))
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": CONFIG["model"] | config}))
    return rows


def made_up_step(step: int, rng: torch.Generator, prompts: int = 3, samples: int = 4) -> tuple[dict, list[dict]]:
    """(header, groups) of a file of rollouts."""
    header = {"step": step, "prompts": prompts, "written": prompts, "samples_per_prompt": samples, "seed": 1,
              "sampling_params": {}, "max_length": 8, "vocabulary": "none of ours"}  # fmt: skip
    groups = []
    for number in range(prompts):
        responses = [made_up_answer(HOSTILE[(step + number + i) % len(HOSTILE)], rng) for i in range(samples)]
        text = HOSTILE[(step * prompts + number) % len(HOSTILE)]
        groups.append(
            {"number": number, "key": [1, step, number], "line": number + 1, "row": {"answer": text, text[:40]: [1, None]},
             "prompt_text": text, "prompt_tokens": [1, 2, 3], "responses": responses}
        )  # fmt: skip
    return header, groups


def made_up_answer(text: str, rng: torch.Generator) -> dict:
    count = 1 + int(draw(rng) * 7)
    sampler: list[float | None] = [-5 * draw(rng) for _ in range(count)]
    trainer = [x + (1 if draw(rng) < 0.5 else -1) * 10 ** (1 - 8 * draw(rng)) for x in sampler]
    observed = {"tokens": [7, 8], "observed": True}
    apart = [abs(a - b) for a, b in zip(trainer, sampler, strict=True)]
    return {
        "reward": round(draw(rng) * 2) / 2, "advantage": draw(rng) - 0.5, "finish_reason": "stop", "text": text,
        "passages": [{"tokens": list(range(count)), "logprobs": sampler, "weight_version": 0}, observed],
        "old_logprobs": [*trainer, -1.0, -2.0],
        "mismatch": {"mean": math.fsum(apart) / count, "max": max(apart)},
    }  # fmt: skip
