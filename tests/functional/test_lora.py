"""Recipes that train adapters: the frozen model stays, checkpoints hold adapters alone, and what is left is PEFT's."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.blocks.delta import base_digest, place_weights, save_delta
from megatron_ext.blocks.places import ModelPlace
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.checkpoint import load_weights, read_checkpoint_info
from recipes.cli.config import build
from tests.hf_models import hf_logits
from tests.lora_cases import peft_logits
from tests.recipe_runs import metrics, run

pytestmark = pytest.mark.functional

RESUME = "exp_manager.resume_if_exists=true"
PEFT = "++model.peft={dim: 4, alpha: 8, target_modules: [linear_qkv, o_proj, up_proj]}"
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]


def sft(task, out, *more: str, start=None):
    return task.sft(
        out, f"pretrained_checkpoint.restore_from_path={start or task.checkpoint}", PEFT, "trainer.sft.save_interval=2",
        "trainer.sft.max_steps=4", "exp_manager.save_hf=true", "model.optim.sched.name=constant", *more,
    )  # fmt: skip


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    """A run of two ranks that saves in the background, and one that was stopped at step 2 and went on."""
    folder = tmp_path_factory.mktemp("lora")
    done = sft(task, folder / "straight", "exp_manager.checkpoint_callback_params.async_save=true")
    assert done.code == 0, done.err
    shutil.copytree(folder / "straight", folder / "stopped", symlinks=True)
    for name in ("step-4", "hf-step-4"):
        shutil.rmtree(folder / "stopped/checkpoints" / name)
    (folder / "stopped/checkpoints/final").unlink()
    return folder


def test_checkpoints_hold_adapters_alone_and_say_on_what_they_stand(task, trained):
    found = trained / "straight/checkpoints/final"
    assert not (found / "weights").exists() and (found / "adapters").is_dir() and (found / "optimizer").is_dir()
    info = json.loads((found / "checkpoint.json").read_text())
    assert info["base"] == f"checkpoint:{info['contents']['pretrained_checkpoint.restore_from_path']['weights']}"
    assert info["model"]["peft"]["dim"] == 4
    sizes = [sum(p.stat().st_size for p in (found / part).glob("*.distcp")) for part in ("adapters", "optimizer")]
    whole = sum(value.nbytes for value in adapter(trained / "straight/checkpoints/hf").values())
    assert sizes[0] < whole + 200_000 and sizes[1] < 2 * whole + 400_000


def test_a_run_goes_on_bitwise_and_on_no_other_model(task, trained, tmp_path):
    other = shutil.copytree(task.folder / "sft/checkpoints/final", tmp_path / "other")
    for name in ("optimizer", "rng"):
        shutil.rmtree(other / name)
    done = sft(task, trained / "stopped", RESUME, start=other)  # the same weights under another name
    assert done.code == 0 and "going on after step 2" in done.out + done.err, done.err
    straight, stopped = (adapter(trained / name / "checkpoints/hf") for name in ("straight", "stopped"))
    assert all(torch.equal(value, stopped[name]) for name, value in straight.items())
    losses = [[row["train_optim/loss"] for row in metrics(trained / name)] for name in ("straight", "stopped")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4
    done = task.sft(tmp_path / "moved")
    assert done.code == 0, done.err
    done = sft(task, trained / "stopped", RESUME, "trainer.sft.max_steps=6", start=tmp_path / "moved/checkpoints/final")
    (line,) = done.error_lines
    assert done.code == 2 and "holds other weights than the run began with" in line
    assert "and model.peft trains adapters that stand on them" in line


def test_an_adapter_is_for_peft_and_merges(task, trained, tmp_path):
    """By the run itself and by the tool, which also puts it into the model: transformers and PEFT say the same."""
    run_folder = trained / "straight"
    tool = "tools/convert_hf.py"
    for command in (
        ("export", task.checkpoint, tmp_path / "base"),
        ("adapter", run_folder / "checkpoints/final", tmp_path / "adapter"),
        ("merge", task.checkpoint, run_folder / "checkpoints/final", tmp_path / "merged"),
        ("merge", tmp_path / "base", run_folder / "checkpoints/hf", tmp_path / "merged too"),
    ):
        done = run(tool, *command)
        assert done.code == 0, done.err
    own, made = adapter(run_folder / "checkpoints/hf"), adapter(tmp_path / "adapter")
    assert own.keys() == made.keys() and all(torch.equal(own[name], value) for name, value in made.items())
    described = [
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (run_folder / "checkpoints/hf", tmp_path / "adapter")
    ]
    assert described[0] | {"base_model_name_or_path": None} == described[1] | {"base_model_name_or_path": None}
    assert described[0]["target_modules"] == PARTS and described[0]["lora_alpha"] == 8
    texts = [[5, 17, 30, 8, 8, 100]]
    (expected,) = peft_logits(tmp_path / "base", tmp_path / "adapter", texts)
    (base,) = hf_logits(tmp_path / "base", texts)
    assert (expected - base).abs().max() > 1e-3
    for name in ("merged", "merged too"):
        assert (hf_logits(tmp_path / name, texts)[0] - expected).abs().max() <= 1e-4
        assert (tmp_path / name / "tokenizer.json").exists()
    for command, words in (
        (("export", run_folder / "checkpoints/final", tmp_path / "no"), "or merge both: tools/convert_hf.py merge"),
        (("adapter", task.checkpoint, tmp_path / "no"), "holds a whole model and no adapters"),
        (("merge", tmp_path / "base", task.checkpoint, tmp_path / "no"), "holds a whole model and no adapters"),
    ):
        done = run(tool, *command)
        assert done.code == 2 and words in done.error_lines[0] and not (tmp_path / "no").exists()


def test_adapters_on_a_model_with_a_delta_in_it(task, world, tmp_path):
    """Merged they stand on the same weights; without the delta they would be another model's."""
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(task.checkpoint)["model"]), world)
    load_weights(task.checkpoint, model)
    base, delta = base_digest(place_weights(model, [ModelPlace(1)])), tmp_path / "delta.safetensors"
    with torch.no_grad():
        for parameter in model.decoder.layers[1].parameters():
            parameter.mul_(1.1)
    save_delta(delta, model, [ModelPlace(1)], base)
    done = sft(task, tmp_path / "run", f"pretrained_checkpoint.delta_path={delta}", "trainer.sft.max_steps=2")
    assert done.code == 0, done.err
    final = tmp_path / "run/checkpoints/final"
    for command in (
        ("export", task.checkpoint, tmp_path / "base", "--delta", delta),
        ("merge", task.checkpoint, final, tmp_path / "merged", "--delta", delta),
    ):
        done = run("tools/convert_hf.py", *command)
        assert done.code == 0, done.err
    texts = [[5, 17, 30, 8, 8, 100]]
    (expected,) = peft_logits(tmp_path / "base", tmp_path / "run/checkpoints/hf", texts)
    assert (hf_logits(tmp_path / "merged", texts)[0] - expected).abs().max() <= 1e-4
    assert (hf_logits(tmp_path / "base", texts)[0] - expected).abs().max() > 1e-3
    done = run("tools/convert_hf.py", "merge", task.checkpoint, final, tmp_path / "no")
    assert done.code == 2 and "was trained on other weights" in done.error_lines[0]


def grpo(task, out, *more: str):
    return task.grpo(
        out, PEFT, "trainer.grpo.initial_policy_kl_penalty=0.1", "trainer.grpo.max_steps=2", "model.optim.lr=1e-2",
        "model.optim.sched.warmup_steps=0", *more,
    )  # fmt: skip


def test_grpo_compares_with_the_frozen_model(task, tmp_path):
    """At the first step it is the policy, to the last bit: KL is 0, and not about 0."""
    done = grpo(task, tmp_path / "run", "exp_manager.save_hf=true", "model.peft.saved_as=merged")
    assert done.code == 0, done.err
    first, second = metrics(tmp_path / "run")
    assert first["train_optim/kl"] == 0 and second["train_optim/kl"] > 0
    assert first["train_optim/grad_norm"] > 0
    written = tmp_path / "run/checkpoints/hf"
    assert (written / "model.safetensors").is_file() and not (written / "adapter_config.json").exists()


def test_grpo_begins_with_an_adapter_of_ours_or_of_pefts(task, trained, tmp_path):
    """Both give the same run, whose reference is the model without it: KL is not 0. Others are refused."""
    checkpoint, folder = trained / "straight/checkpoints/final", trained / "straight/checkpoints/hf"
    found = []
    for name, start in (("ours", checkpoint), ("theirs", folder)):
        done = grpo(task, tmp_path / name, f"++model.peft.restore_from_path={start}", "trainer.grpo.max_steps=1")
        assert done.code == 0, done.err
        found.append(metrics(tmp_path / name)[0])
    keys = ("train_optim/kl", "train_optim/loss", "train_optim/grad_norm", "train_rollouts/reward")
    assert [found[0][key] for key in keys] == [found[1][key] for key in keys]
    assert found[0]["train_optim/kl"] > 0
    for more, words in (
        (["model.peft.dim=8"], "dim=4"),
        ([f"pretrained_checkpoint.restore_from_path={checkpoint}"], "name it there, and the adapters in model.peft"),
        (["trainer.grpo.offload_reference_policy=true"], "with model.peft there is none"),
        (["pretrained_checkpoint.restore_from_path=null"], "name one in pretrained_checkpoint.restore_from_path"),
        ([f"++model.peft.restore_from_path={task.checkpoint}"], "holds a whole model and no adapters"),
    ):
        done = grpo(task, tmp_path / "no", f"++model.peft.restore_from_path={folder}", *more)
        (line,) = done.error_lines
        assert done.code == 2 and words in line, line
    assert not os.path.lexists(tmp_path / "no")
