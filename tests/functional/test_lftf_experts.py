"""LFTF on a model with experts: what trains changes and nothing else, whatever ranks cut the experts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.blocks.delta import apply_delta
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.checkpoint import load_weights, read_checkpoint_info
from recipes.cli.config import build
from tests.hf_folders import tensors
from tests.recipe_runs import BiasTask, metrics, run

pytestmark = pytest.mark.functional

EXPERTS, BLOCK = 4, 1
# The first block has an MLP, the others experts; of a family that transformers knows.
MODEL = (
    f"++model.num_moe_experts={EXPERTS}", "++model.moe_ffn_hidden_size=32", "++model.moe_layer_freq=[0,1,1]",
    "model.qk_layernorm=true",
)  # fmt: skip
SHORT = [
    "trainer.lftf.max_steps=2", "trainer.lftf.val_check_interval=1", "trainer.lftf.patience=null",
    "trainer.lftf.min_pronoun_mass=0", "trainer.lftf.max_perplexity=null", "trainer.lftf.num_samples=1",
    "trainer.lftf.locate_prompts=20", "model.optim.sched.warmup_steps=0",
]  # fmt: skip
CUT = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true", "trainer.devices=2"]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> BiasTask:
    """A model that has seen a few steps: how biased it is does not matter."""
    return BiasTask.make(tmp_path_factory.mktemp("experts"), steps=6, model=MODEL)


def model_of(folder, world):
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(folder)["model"]), world)
    load_weights(folder, model)
    return model


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("spec", "inside"),
    [
        (f"{BLOCK}", ("",)),
        (f"{{block: {BLOCK}, part: mlp}}", ("pre_mlp_layernorm.", "mlp.")),
        (f"{{block: {BLOCK}, part: attention}}", ("input_layernorm.", "self_attention.")),
    ],
    ids=["block", "mlp", "attention"],
)
def test_what_trains_changes_and_nothing_else(spec, inside, task, world, tmp_path):
    done = task.lftf(tmp_path / "run", *SHORT, f"trainer.lftf.block={spec}")
    assert done.code == 0, done.err
    found = result(tmp_path / "run")
    assert found["best_step"] > 0, "the state of before is kept: nothing is tested"
    before, after = model_of(task.checkpoint, world), model_of(tmp_path / "run/checkpoints/final", world)
    old, start = dict(before.named_parameters()), f"decoder.layers.{BLOCK}."
    for name, value in after.named_parameters():
        trains = name.startswith(start) and name.removeprefix(start).startswith(inside)
        assert torch.equal(value, old[name]) != trains, name
    delta = load_file(str(tmp_path / "run/delta.safetensors"))
    assert all(name.startswith(start) for name in delta)
    assert sum(value.numel() for value in delta.values()) == found["costs"]["trained_parameters"]
    with_experts = {name.split(".")[6] for name in delta if ".local_experts." in name}
    assert with_experts == (set() if inside[0].startswith("input") else set(map(str, range(EXPERTS))))
    apply_delta(tmp_path / "run/delta.safetensors", before)
    assert all(torch.equal(value, old[name]) for name, value in after.named_parameters())
    for row in metrics(tmp_path / "run")[1:]:
        assert 1 <= row["train_optim/expert_load_max"] <= EXPERTS


def test_tensor_parallel_ranks_do_what_one_does(task, tmp_path):
    """A block that `gradient` chooses: its scores, what is trained, and a delta of the same tensors."""
    runs = {"one": [], "two": CUT}
    for name, more in runs.items():
        done = task.lftf(tmp_path / name, *SHORT, "trainer.lftf.block=gradient", *more)
        assert done.code == 0, done.err
    (one, two), deltas = (
        [result(tmp_path / name) for name in runs],
        [load_file(str(tmp_path / name / "delta.safetensors")) for name in runs],
    )
    assert two["ranking"]["scores"] == pytest.approx(one["ranking"]["scores"], rel=1e-3)
    assert one["places"] == two["places"] and min(one["ranking"]["scores"]) > 0
    assert one["costs"]["trained_parameters"] == two["costs"]["trained_parameters"]
    assert one["costs"]["parameters"] == two["costs"]["parameters"]
    assert two["after"]["afgb"] == pytest.approx(one["after"]["afgb"], rel=1e-2, abs=1e-5)
    shapes = [{name: value.shape for name, value in delta.items()} for delta in deltas]
    assert shapes[0] == shapes[1]


def test_adapters_of_a_block_with_experts(task, tmp_path):
    """Merged, its linears alone have changed: of attention and of every expert; routers and norms have none."""
    settings = "++model.peft={dim: 4, alpha: 8}", "model.optim.lr=1e-2", f"trainer.lftf.block={BLOCK}"
    done = task.lftf(tmp_path / "run", *SHORT, *settings)
    assert done.code == 0, done.err
    assert result(tmp_path / "run")["best_step"] > 0
    for command in (
        ("export", task.checkpoint, tmp_path / "base"),
        ("merge", task.checkpoint, tmp_path / "run/checkpoints/final", tmp_path / "merged"),
    ):
        done = run("tools/convert_hf.py", *command)
        assert done.code == 0, done.err
    base, merged = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    assert base.keys() == merged.keys() and any(".experts.3." in name for name in base)
    for name, value in merged.items():
        trains = name.startswith(f"model.layers.{BLOCK}.") and "_proj." in name
        assert torch.equal(value, base[name]) != trains, name


def test_experts_over_ranks_of_other_prompts_are_refused(task, tmp_path):
    done = task.lftf(tmp_path / "run", *SHORT, "++model.expert_model_parallel_size=2", "trainer.devices=2")
    assert done.code != 0
    (line,) = done.error_lines
    assert line.startswith(
        "error: model.expert_model_parallel_size=2: here data-parallel ranks run prompts of their own"
    )
    assert not (tmp_path / "run").exists()
