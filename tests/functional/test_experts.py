"""A mixture of experts from SFT to GRPO, its experts on one rank and on two."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.grouping.routes import RouteShape, write_routes
from recipes.data.tokenizer import load_tokenizer
from recipes.grpo.dump_files import read_step, step_files
from tests.data_cases import write_rows
from tests.hf_models import hf_logits
from tests.lora_cases import peft_logits
from tests.recipe_runs import metrics, run, run_on

pytestmark = pytest.mark.functional


@pytest.fixture(scope="module")
def start(task, tmp_path_factory):
    """A model with experts that has seen a step of the task."""
    out = tmp_path_factory.mktemp("experts") / "sft"
    done = task.sft(out, "model=tiny_experts", "trainer.sft.max_steps=1")
    assert done.code == 0, done.err
    return out / "checkpoints" / "final"


def step_of(task, start, out, *overrides, recipe: str = "grpo") -> dict:
    """The metrics of a run's only step."""
    overrides = [f"pretrained_checkpoint.restore_from_path={start}", f"trainer.{recipe}.max_steps=1", *overrides]
    if recipe == "sft":
        done = task.sft(out, "model=tiny_experts", *overrides)
    else:
        done = run("recipes/train_grpo.py", "--config-name", "grpo_experts_tiny", *task.grpo_overrides(out), *overrides)
    assert done.code == 0, done.err
    (step,) = metrics(out)
    return step


def test_grpo_is_the_same_with_experts_on_one_rank_and_on_two(task, start, tmp_path):
    """Two updates of a step, whose tokens take the experts of the pass before; sampled by ranks that wait for each other."""
    steps = {}
    for ranks in (1, 2):
        sizes = "model.global_batch_size=8", f"model.expert_model_parallel_size={ranks}"
        steps[ranks] = step_of(task, start, tmp_path / f"ep{ranks}", *sizes)
    for name in ("train_rollouts/reward", "train_rollouts/response_length"):
        assert steps[1][name] == steps[2][name]
    for name in ("train_optim/grad_norm", "train_optim/entropy", "train_optim/expert_load_max"):
        assert steps[1][name] == pytest.approx(steps[2][name], rel=1e-3) and steps[1][name] > 0


@pytest.mark.parametrize("recipe", ["grpo", "sft"])
def test_adapters_stand_on_experts_on_one_rank_and_on_two(recipe, task, start, tmp_path):
    """What is left is PEFT's, and merged says the same."""
    steps, folders = {}, {ranks: tmp_path / f"ep{ranks}" for ranks in (1, 2)}
    for ranks, folder in folders.items():
        peft = "++model.peft={dim: 4, alpha: 8}", "model.optim.lr=1e-2", "model.optim.sched.warmup_steps=0"
        layout = f"model.expert_model_parallel_size={ranks}"
        steps[ranks] = step_of(task, start, folder, *peft, layout, recipe=recipe)
    for name in ("train_optim/loss", "train_optim/grad_norm"):
        assert steps[1][name] == pytest.approx(steps[2][name], rel=1e-3, abs=1e-6)
    assert steps[1]["train_optim/grad_norm"] > 0
    final = folders[2] / "checkpoints/final"
    for command in (
        ("export", start, tmp_path / "base"),
        ("adapter", final, tmp_path / "adapter"),
        ("merge", start, final, tmp_path / "merged"),
    ):
        done = run("tools/convert_hf.py", *command)
        assert done.code == 0, done.err
    assert any("experts" in name for name in load_file(str(tmp_path / "adapter/adapter_model.safetensors")))
    texts = [[5, 17, 30, 8, 8, 100]]
    (expected,) = peft_logits(tmp_path / "base", tmp_path / "adapter", texts)
    assert (hf_logits(tmp_path / "merged", texts)[0] - expected).abs().max() <= 1e-4
    assert (hf_logits(tmp_path / "base", texts)[0] - expected).abs().max() > 1e-3


def test_ranks_that_share_experts_write_them_as_one_does(start, tmp_path):
    for ranks in (1, 2):
        done = run_on(ranks, "tools/convert_hf.py", "export", start, tmp_path / str(ranks), "--tensor", ranks)
        assert not any(one.code for one in done), done
    one, two = (load_file(str(tmp_path / ranks / "model.safetensors")) for ranks in "12")
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_step_takes_the_experts_of_whoever_sampled_and_its_dump_replays_bitwise(task, start, tmp_path):
    """Two experts take all tokens but the last of each response, which no layer of a sampler sees."""
    tokenizer, shape, rng = load_tokenizer(start / "tokenizer"), RouteShape(2, 2, 8), random.Random()
    chosen, rows = np.array(rng.sample(range(8), 2), dtype=np.uint8), []
    for _ in range(4):
        prompt, responses = tokenizer.encode("What is 3 + 4?"), []
        for reward in range(4):
            tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 8))]
            routes = np.broadcast_to(chosen, (len(prompt) + len(tokens) - 1, 2, 2))
            responses.append({"tokens": tokens, "reward": reward, "routed_experts": write_routes(routes)})
        rows.append({"prompt_tokens": prompt, "responses": responses})
    steps, source = [], write_rows(tmp_path / "rows.jsonl", *rows)
    for name in ("first", "again"):
        given = f"++trainer.grpo.rollout={{source: file, path: {source}}}", "data.train_path=null"
        told = "trainer.grpo.router_replay=R3", "trainer.grpo.rollout_dump={}"
        steps.append(step_of(task, start, tmp_path / name, *given, *told))
        source = tmp_path / name
    assert 3.5 < steps[0]["train_optim/expert_load_max"] <= 4, "of 4 where two of eight experts take everything"
    for name in ("train_optim/loss", "train_optim/grad_norm", "train_optim/expert_load_max"):
        assert steps[0][name] == steps[1][name]
    (group, *_) = [group for _, group in read_step(step_files(tmp_path / "again" / "rollouts")[1]).groups]
    read = shape.read(
        group["responses"][0]["routed_experts"], len(rows[0]["prompt_tokens"]) + len(rows[0]["responses"][0]["tokens"])
    )
    assert (read == chosen).all()


def test_routes_are_replayed_of_models_with_experts_alone(task, tmp_path):
    done = task.grpo(tmp_path / "run", "trainer.grpo.router_replay=R2")
    assert done.code != 0
    (line,) = done.error_lines
    assert "trainer.grpo.router_replay=R2 is for models with experts" in line
