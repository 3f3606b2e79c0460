"""What a run starts from and goes on with: what is gone, and what moves while it is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.runtime.checkpoint_files import self_checksum
from recipes.grpo.settings import GRPOConfig
from recipes.run.inputs import Inputs
from recipes.run.pretrained import START_KEY, Pretrained, configure
from recipes.run.run_folder import claim_run_folder
from recipes.sft.settings import SFTConfig

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}


def begun(folder: Path, trainer: dict, cls: type, data: dict) -> dict:
    """The configuration of a run in the folder that has saved a checkpoint, as far as what it had read is concerned."""
    resolved = {
        "trainer": {"num_nodes": 1, "devices": 1, **trainer},
        "model": SHAPE | {"tokenizer": str(folder / "gone"), "global_batch_size": 2, "optim": {"lr": 1e-3}},
        "data": {"train_path": "x", **data},
        "exp_manager": {"explicit_log_dir": str(folder / "run"), "resume_if_exists": True},
        "pretrained_checkpoint": {"restore_from_path": str(folder / "start")},
    }
    alone = resolved | {"pretrained_checkpoint": {"restore_from_path": None}}
    complete = dataclasses.asdict(configure(cls, alone))
    claim_run_folder(folder / "run", complete | {"pretrained_checkpoint": resolved["pretrained_checkpoint"]})
    checkpoint = folder / "run/checkpoints/step-3"
    for name in ("weights", "optimizer"):
        (checkpoint / name).mkdir(parents=True)
    contents = {"model.tokenizer": {}, START_KEY: {"weights": "f00"}, "data.train_path": {"rows": 1}}
    info = {"trainer": {"step": 3, "metrics": {}}, "files": {}, "contents": contents, "model": complete["model"]}
    (checkpoint / "checkpoint.json").write_text(
        json.dumps(info | {"checksum": self_checksum(json.loads(json.dumps(info)))})
    )
    return resolved


@pytest.mark.parametrize("start", ["start", None], ids=["gone", "not named"])
def test_a_model_that_nothing_is_compared_with_may_be_gone(tmp_path, start):
    """The architecture is the run's own; the next that is missing is the tokenizer, of which the checkpoint has a copy."""
    resolved = begun(tmp_path, {"sft": {"max_steps": 5}}, SFTConfig, {})
    resolved["model"] = {name: value for name, value in resolved["model"].items() if name not in SHAPE}
    if start is None:
        resolved["pretrained_checkpoint"]["restore_from_path"] = None
    config = configure(SFTConfig, resolved)
    assert {name: getattr(config.model, name) for name in SHAPE} == SHAPE
    with pytest.raises(UserError) as refused:
        Inputs.check(config)
    copy = tmp_path / "run/checkpoints/step-3/tokenizer"
    assert f"{copy} is a copy of the one that the run began with: name it in model.tokenizer" in str(refused.value)


def test_a_reference_that_is_gone_is_refused(tmp_path):
    grpo = {"max_steps": 5, "reward": "exact_answer", "num_prompts_per_grpo_step": 1, "samples_per_prompt": 2}
    trainer = {"grpo": grpo | {"initial_policy_kl_penalty": 0.1}}
    config = configure(GRPOConfig, begun(tmp_path, trainer, GRPOConfig, {"max_prompt_length": 100}))
    words = (
        f"{START_KEY}={tmp_path / 'start'} is not there, and trainer.grpo.initial_policy_kl_penalty compares with them"
    )
    with pytest.raises(UserError) as refused:
        Inputs.check(config)
    assert words in str(refused.value)


def test_a_link_that_moves_is_followed_once(tmp_path):
    """What is read of `latest` of a run that goes on is one checkpoint's: weights, tokenizer and what an export needs."""
    for step in (3, 4):
        folder = tmp_path / f"step-{step}"
        for name in ("weights", "source"):
            (folder / name).mkdir(parents=True)
        (folder / "source/config.json").write_text(str(step))
        info = {"files": {"weights/a": [1, str(step)]}}
        (folder / "checkpoint.json").write_text(json.dumps(info | {"checksum": self_checksum(info)}))
    latest = tmp_path / "latest"
    latest.symlink_to("step-3")
    opened = Pretrained.open(str(latest))
    latest.unlink()
    latest.symlink_to("step-4")
    assert opened.folder == tmp_path / "step-3" and opened.tokenizer == str(tmp_path / "step-3/tokenizer")
    assert (
        opened.digest() == Pretrained.open(str(tmp_path / "step-3")).digest() != Pretrained.open(str(latest)).digest()
    )
    (tmp_path / "copy").mkdir()
    opened.copy_source(tmp_path / "copy")
    assert (tmp_path / "copy/source/config.json").read_text() == "3"
    assert opened.path == str(latest), "messages name what was asked for"
