"""Every recipe's own script on the pretended GPU, from its YAML on: data, weights, steps, validations, the end.

What is left out is what a checkpoint of tensors without memory cannot be: written. Give it to `run_ranks(recipes, 1, folder)`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.runtime.distributed import shutdown
from recipes.bias.evaluation import evaluate
from recipes.bias.models import CheckpointModel
from recipes.cli.compose import compose
from recipes.registry import RECIPES
from recipes.run.session import Session
from tests.data_cases import EOS, write_rows, write_tokenizer
from tests.dry.machine import pretended_gpu
from tests.dry.run import (
    ASKED,
    BLOCK,
    CHOOSE,
    ENTERS,
    IMPORTANCE,
    METRICS,
    NEEDLES,
    NORM,
    OPTIONS,
    PAIRS,
    RECORDED,
    REJECTED,
    REWARDS,
    SAMPLED,
    SCORES,
    SHARED,
    SHOWN,
    STOP,
    SUM,
    TEXTS,
    DryRun,
)  # fmt: skip
from tests.hf_models import make_hf_model
from tests.pretend import BACKENDS, be_alone

__all__ = ["CASES", "Case", "recipes"]

PROFESSIONS = ["nurse", "pilot", "baker", "judge", "miner"]
# Words that are one token of the tokenizer.
PAIR = [
    "++data.prompts.professions_path={folder}/professions.json",
    "++data.prompts.pair={{first: fox, second: brown, first_hint: quick, second_hint: it}}",
]
START = [
    "model=pretrained",
    "pretrained_checkpoint.restore_from_path={folder}/start",
    "exp_manager.explicit_log_dir={out}",
]
LOOK = ["pretrained_checkpoint.restore_from_path={folder}/start", "exp_manager.explicit_log_dir={out}"]
BATCH = ["trainer.devices=1", "model.micro_batch_size=2", "model.global_batch_size=4"]


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        overrides: what makes it small.
        reads: what the host reads in all of it, see `NECESSARY`.
    """

    overrides: list[str]
    reads: dict[tuple[str, str], int]


def steps(count: int, updates: int) -> dict[tuple[str, str], int]:
    """What every training reads, and is asked after each step but the last."""
    asked = {(STOP, "value"): count - 1} if count > 1 else {}
    return {(NORM, "value"): updates} | asked


# A new recipe is a new row.
CASES: dict[str, Case] = {
    "train_sft": Case(
        [
            *START, *BATCH, "data.train_path={folder}/pairs.jsonl", "data.validation_path={folder}/held_out_pairs.jsonl",
            "trainer.sft.max_steps=2", "trainer.sft.val_check_interval=2",
        ],
        steps(2, 2) | {(METRICS, "copy"): 3, (SUM, "copy"): 7},  # of a step three
    ),
    "train_grpo": Case(
        [
            *START, *BATCH, "data.train_path={folder}/prompts.jsonl", "data.validation_path={folder}/held_out_prompts.jsonl",
            "trainer.grpo.max_steps=2", "trainer.grpo.val_check_interval=2", "trainer.grpo.num_prompts_per_grpo_step=2",
            "trainer.grpo.samples_per_prompt=2", "data.max_prompt_length=64", "trainer.grpo.length_params.max_length=3",
            "trainer.grpo.reward={{name:length,target:2}}", "++trainer.grpo.sampling_params.ignore_eos=true",
            "++trainer.grpo.rollout_dump={{}}", "++trainer.grpo.off_policy={{level:geometric,form:mask,reject_above:1}}",
            "++trainer.grpo.validation_sampling_params.ignore_eos=true",  # the pretended GPU says 0, the end token
            "++trainer.grpo.high_entropy_share=0.5", "++trainer.grpo.max_sampling_rounds=2",
        ],
        steps(2, 2)
        | {
            (METRICS, "copy"): 2,
            (SUM, "copy"): 16,  # of a step six, of a validation, of which there is one before the first, two
            (REJECTED, "copy"): 2,
            (CHOOSE, "copy"): 18,  # three tokens each in two steps of two rounds and two validations
            (SAMPLED, "copy"): 4,  # all rewards are alike: it samples again
            (SHOWN, "copy"): 1,  # at the first step
            (RECORDED, "copy"): 4,
            (SCORES, "copy"): 2,  # of the one stream of each step
            (f"{REWARDS}._rollout_metrics", "value"): 2,
            (f"{REWARDS}._reward_means", "copy"): 4,
        },
    ),
    "train_lftf": Case(
        [
            *START, *BATCH, *PAIR, "data.text_path={folder}/texts.jsonl",
            "data.validation_text_path={folder}/held_out_texts.jsonl", "+trainer.lftf.max_steps=1",
            "trainer.lftf.val_check_interval=1", "trainer.lftf.locate_prompts=2",
        ],
        steps(1, 1)
        | {
            (METRICS, "copy"): 1,
            (SUM, "copy"): 1,
            (PAIRS, "copy"): 4,
            (SHARED, "copy"): 4,
            (TEXTS, "copy"): 2,
            (CHOOSE, "copy"): 2,  # how the model goes on, before and after: the pretended GPU says the end token at once
            (ENTERS, "copy"): 5,  # prompts of three kinds and texts of two
            (ASKED, "copy"): 14,  # two each: of those, and of two of them in the second validation
            (f"{IMPORTANCE}:gradient", "copy"): 1,
            (BLOCK, "copy"): 7,
        },
    ),
    "locate_bias": Case(
        [*LOOK, *PAIR, "trainer.locate.locate_prompts=2"],
        {(f"{IMPORTANCE}:{name}", "copy"): 1 for name in ("similarity", "gradient", "intervention")},
    ),
    "eval_bias": Case([*LOOK, *PAIR, "++data.bootstrap_samples=4"], {(PAIRS, "copy"): 2, (SHARED, "copy"): 2}),
    "eval_video": Case(
        [
            *LOOK, "data.path={folder}/questions.jsonl", "++data.prompt='what is {{question}} ? {{options}}'",
            "data.video.workers=0",
        ],
        {(OPTIONS, "copy"): 1},
    ),
    "train_video_niah": Case(
        [
            "exp_manager.explicit_log_dir={out}", "trainer.niah.max_steps=2", "trainer.niah.videos_per_step=4",
            "trainer.niah.train_frames=[2,3]", "trainer.niah.test_frames=[2,4]", "trainer.niah.test_depths=1",
            "trainer.niah.test_videos=2", "trainer.niah.height=2", "trainer.niah.width=2", "trainer.niah.schemes=[vrope]",
            "trainer.niah.seeds=[1]",
        ],
        steps(1, 2) | {(METRICS, "copy"): 2, (NEEDLES, "copy"): 2, (STOP, "value"): 2},  # it asks before each step
    ),
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """A tokenizer, a Hugging Face model and rows of every kind."""
    write_tokenizer(folder / "start", eos_token=EOS)
    make_hf_model(
        folder / "start", "llama", torch.Generator().manual_seed(1), vocab_size=400, max_position_embeddings=128
    )
    pairs = [{"prompt": f"what is 1 + {i} ?", "response": "it is 3"} for i in range(8)]
    for name, part in (("", slice(0, 5)), ("held_out_", slice(5, 8))):
        write_rows(folder / f"{name}pairs.jsonl", *pairs[part])
        write_rows(folder / f"{name}prompts.jsonl", *({"prompt": pair["prompt"]} for pair in pairs[part]))
        write_rows(folder / f"{name}texts.jsonl", *({"text": pair["prompt"]} for pair in pairs[part]))
    questions = [{"question": f"1 + {i}", "options": ["1", "2"], "answer": "A"} for i in range(3)]
    write_rows(folder / "questions.jsonl", *questions)
    (folder / "professions.json").write_text(json.dumps([[name, 0.0, 0.0] for name in PROFESSIONS]))


def recipes(device: torch.device, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """What the host read in a run of each of these, and the functions that it ran on the device."""
    write_inputs(folder)
    found = {}
    for name in names:
        given = [word.format(folder=folder, out=folder / name) for word in CASES[name].overrides]
        main = importlib.import_module(f"recipes.{name}").main
        config = compose(RECIPES[name].default, given)
        loggers = [None] * (len(inspect.signature(main).parameters) - 1)  # numbers are not kept
        run = DryRun()
        with pretended_gpu(), pytest.MonkeyPatch.context() as patch:
            shutdown()
            dist.init_process_group(BACKENDS, store=dist.HashStore(), rank=0, world_size=1)
            patch.setattr(Session, "save", lambda *args, **kwargs: folder)
            patch.setattr("recipes.bias.trainer.save_delta", lambda *args: None)
            # The host's own arithmetic, a thousand times over.
            patch.setattr("recipes.bias.trainer.evaluate", partial(evaluate, bootstrap_samples=4))
            # A Hugging Face folder on one rank would be run by transformers, which is not ours.
            patch.setattr("recipes.bias.models.open_model", CheckpointModel)
            with run:
                main(config, *loggers)
        found[name] = {"reads": dict(run.reads), "places": run.places}
    be_alone()
    return found
