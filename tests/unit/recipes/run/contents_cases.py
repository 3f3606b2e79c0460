"""What runs have read, and what is said of one that goes on with something else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.runtime.distributed import ParallelSizes
from recipes.cli.stopping import StopRequests
from recipes.data.rows import load_pairs
from recipes.run.contents import Contents
from recipes.run.inputs import Inputs
from recipes.sft.settings import SFTConfig
from tests.data_cases import EOS, START

__all__ = ["LIMIT", "SPECIAL", "TRAIN", "check", "read", "refusal", "saved", "sums"]

SPECIAL = {"eos_token": EOS, "bos_token": START}
TRAIN, LIMIT = "data.train_path", 1000


def read(path, tokenizer, load=load_pairs, config=SFTConfig, **more) -> Contents:
    """What a run is given that trains on a file."""
    resolved = {"data": {"train_path": str(path)}, "pretrained_checkpoint": {"restore_from_path": "the start"}}
    inputs = Inputs(
        config, resolved, StopRequests(None, looks=False), ParallelSizes(), path.parent, tokenizer=tokenizer,
        pretrained=more.pop("pretrained", None),
    )  # fmt: skip
    in_order = more.pop("in_order", ())
    contents = Contents(inputs, {TRAIN: load(path, tokenizer, LIMIT, **more)}, in_order=in_order)
    contents.complete()
    return contents


def saved(contents: Contents) -> dict:
    return json.loads(json.dumps({"contents": contents.found, "versions": contents.versions()}))


def refusal(now: Contents, before: Contents) -> str:
    with pytest.raises(UserError) as refused:
        now.check(saved(before), Path("runs/mine/checkpoints/step-5"))
    return str(refused.value)


def check(now: Contents, before: Contents) -> None:
    now.check(saved(before), Path("runs/mine/checkpoints/step-5"))


def sums(count: int) -> list[dict]:
    return [
        {"prompt": f"what is {i} + 2 ?", "response": f"it is {random.randrange(1000)}", "id": i} for i in range(count)
    ]
