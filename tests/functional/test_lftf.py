"""LFTF end to end: the bias goes, one block has changed, and every layout agrees on the numbers."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_ext.blocks.delta import apply_delta, read_delta
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.checkpoint import INFO_FILE, load_weights, read_checkpoint_info
from megatron_ext.runtime.checkpoint_files import self_checksum
from recipes.cli.config import build
from recipes.data.tokenizer import load_tokenizer
from tests.bias_runs import BOUND, NUMBERS, assert_same_numbers, weights
from tests.recipe_runs import metrics, run

pytestmark = pytest.mark.functional

RESUME = "exp_manager.resume_if_exists=true"
MUCH = 1 << 50  # bytes
SHORT = ["trainer.lftf.max_steps=4", "trainer.lftf.val_check_interval=2"]


def result(folder) -> dict:
    """But for what it took."""
    found = json.loads((folder / "result.json").read_text())
    del found["costs"]
    return found


def costs_of(folder) -> dict:
    return json.loads((folder / "result.json").read_text())["costs"]


def had_memory(checkpoint, most: int) -> int:
    """Make a checkpoint say that the run has had so many bytes at most; what it said."""
    info = read_checkpoint_info(checkpoint)
    state = info["trainer"]["state"]
    found, state["peak_memory_bytes"] = state["peak_memory_bytes"], most
    (checkpoint / INFO_FILE).write_text(json.dumps(info | {"checksum": self_checksum(info)}))
    return found


@pytest.fixture(scope="module")
def ended(bias_task, tmp_path_factory):
    """(folder of a run, what it said)."""
    out = tmp_path_factory.mktemp("mended") / "run"
    done = bias_task.lftf(
        out, "trainer.lftf.max_epochs=10", "trainer.lftf.loss=balanced+2*hint+kl", "trainer.health.spike=1e-6"
    )
    assert done.code == 0, done.err
    return out, done.out


@pytest.fixture(scope="module")
def mended(ended):
    return ended[0]


def test_the_bias_goes_and_nothing_else(mended):
    """The numbers that `make lftf` is held to, on professions held out of the fine-tuning."""
    found = result(mended)
    before, after = found["before"], found["after"]
    assert before["afgb"] >= 0.3 and before["ub"] > 0.5, "the model is not biased, or hears no hint: nothing is tested"
    assert after["afgb"] <= 0.4 * before["afgb"]
    assert after["ub"] >= before["ub"] - 0.05
    assert after["pronoun_mass"] > 0.8 * before["pronoun_mass"]
    assert after["perplexity"] < 1.03 * before["perplexity"]


def test_one_block_has_changed_bitwise(bias_task, mended, world):
    (block,) = result(mended)["places"]
    before, after = weights(bias_task.checkpoint, world), weights(mended / "checkpoints/final", world)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (f"layers.{block}." not in name), name


def test_a_spike_is_told_with_its_prompts(ended):
    out, said = ended
    told = [line for line in said.splitlines() if line.startswith("a spike at step ")]
    named = told[0].rpartition(" (")[2]
    assert "train_optim/grad_norm is " in told[0] and re.match(r'"[^"]+ [^"]+", "', named), told[0]
    assert len(told) > 2 and all(line.split()[4].rstrip(":").isdigit() for line in told)


def test_a_run_leaves_its_report(mended, world):
    found = result(mended)
    assert [str(found["ranking"]["best"])] == found["places"] != ["0"]
    report = (mended / "report.md").read_text()
    assert f"{found['after']['afgb']:.4f}" in report and "## Blocks by gradient" in report
    assert (mended / "ranking-gradient.png").stat().st_size > 5000
    kept = [v for v in found["validations"] if v["complaint"] is None]
    assert found["best_step"] == min(kept, key=lambda v: v["val/afgb"])["step"]
    steps = [r["step"] for r in metrics(mended)]
    assert steps == list(range(found["steps"] + 1))
    for old, new in zip(found["before"]["samples"], found["after"]["samples"], strict=True):
        assert f"| {old['prompt']} | " in report and old["prompt"] == new["prompt"]
    assert found["before"]["samples"] != found["after"]["samples"] and len(found["after"]["samples"]) == 6
    costs, delta = costs_of(mended), load_file(str(mended / "delta.safetensors"))
    assert costs["trained_parameters"] == sum(value.numel() for value in delta.values())
    assert costs["parameters"] == sum(value.numel() for value in weights(mended / "checkpoints/final", world).values())
    assert {"evaluate", "locate", "frozen_pass", "optimizer_step", "validation"} <= costs["seconds"].keys()
    done = run("tools/report.py", mended)
    assert done.code == 0, done.err
    page = (mended / "report.html").read_text()
    assert "What it goes on to say" in page and f"{costs['trained_parameters']:,} of {costs['parameters']:,}" in page


def test_adapters_of_the_located_block(bias_task, tmp_path):
    """With model.peft the block's adapters train alone, the bias falls, and what is left is a folder of PEFT's."""
    settings = ["trainer.lftf.max_steps=8", "trainer.lftf.val_check_interval=2", "trainer.lftf.locate_prompts=20",
                "trainer.lftf.save_interval=4", "++model.peft={dim: 4, alpha: 8}", "model.optim.lr=1e-2"]  # fmt: skip
    done = bias_task.lftf(tmp_path / "run", *settings)
    assert done.code == 0, done.err
    found, tensors = result(tmp_path / "run"), load_file(str(tmp_path / "run/adapter/adapter_model.safetensors"))
    assert {name.split(".")[4] for name in tensors} == set(found["places"]) and len(tensors) == 14
    described = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (described["layers_to_transform"], described["layers_pattern"]) == ([int(found["places"][0])], "layers")
    assert found["best_step"] > 0 and found["after"]["afgb"] < found["before"]["afgb"]
    assert not (tmp_path / "run/delta.safetensors").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
    (tmp_path / "again/checkpoints/final").unlink()
    shutil.rmtree(tmp_path / "again/checkpoints/step-8")
    shutil.rmtree(tmp_path / "again/adapter")
    done = bias_task.lftf(tmp_path / "again", *settings, "exp_manager.resume_if_exists=true")
    assert done.code == 0 and "going on after step 4" in done.out + done.err, done.err
    again = load_file(str(tmp_path / "again/adapter/adapter_model.safetensors"))
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())
    assert result(tmp_path / "again") == found


def test_a_run_that_was_stopped_goes_on_bitwise(bias_task, world, tmp_path):
    """Stopped after its first step, and started again, what enters the block in files; beside it one that is left alone and saves
    in the background. Of the heads that an estimator ranks first, which are slices of parameters. And one that keeps nothing,
    to rounding."""
    settings = ["trainer.lftf.max_steps=10", "trainer.lftf.val_check_interval=2", "trainer.lftf.save_interval=3",
                "trainer.lftf.loss=balanced+2*hint+kl", "trainer.lftf.locate_prompts=20", "trainer.devices=1",
                "trainer.lftf.places=heads", "trainer.lftf.num_places=3"]  # fmt: skip
    files = f"trainer.lftf.kept_inputs_dir={tmp_path / 'kept'}"
    runs = {
        "straight": [["exp_manager.checkpoint_callback_params.async_save=true"]],
        "stopped": [[RESUME, files, 'trainer.max_time_per_run="00:00:00:00"'], [RESUME, files]],
    }
    for name, starts in runs.items():
        for more in starts:
            done = bias_task.lftf(tmp_path / name, *settings, *more)
            assert done.code == 0, done.err
            if name == "stopped" and more != starts[-1]:
                had = had_memory(tmp_path / name / "checkpoints/step-1", MUCH)
        steps = "step-1" if name == "stopped" else "step-3"
        assert (tmp_path / name / "checkpoints" / steps / "best").is_dir()
    assert "going on after step 1" in done.out + done.err
    assert result(tmp_path / "stopped") == result(tmp_path / "straight")
    found = [weights(tmp_path / name / "checkpoints/final", world) for name in runs]
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    (about, delta), (other_about, other) = (read_delta(tmp_path / name / "delta.safetensors") for name in runs)
    assert about == other_about and delta.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in delta.items())
    rows = [[{k: v for k, v in r.items() if not k.startswith("timers/")} for r in metrics(tmp_path / n)] for n in runs]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0]] == list(range(11))
    assert 1 << 25 < had < MUCH, "of the first start"
    assert (
        costs_of(tmp_path / "stopped")["peak_memory_bytes"]
        == MUCH
        > costs_of(tmp_path / "straight")["peak_memory_bytes"]
    )
    for name in runs:  # also of what was done before the stop
        taken = sum(row.get("timers/optimizer_step", 0.0) for row in metrics(tmp_path / name))
        assert costs_of(tmp_path / name)["seconds"]["optimizer_step"] == pytest.approx(taken)
    done = bias_task.lftf(tmp_path / "whole", *settings, "trainer.lftf.kept_inputs_gib=0")
    assert done.code == 0 and "every pass runs the blocks below, too" in done.out, done.err
    assert_same_numbers(result(tmp_path / "whole")["after"], result(tmp_path / "straight")["after"])
    assert costs_of(tmp_path / "whole")["kept_inputs_bytes"] == 0 < costs_of(tmp_path / "straight")["kept_inputs_bytes"]


def test_a_run_that_has_ended_and_is_given_more_steps_goes_on_bitwise_from_its_last_state(bias_task, world, tmp_path):
    """No state counts, so that the best is the start: what goes on is another."""
    settings = ["trainer.lftf.block=1", "trainer.lftf.loss=sum", "trainer.lftf.min_pronoun_mass=1",
                "trainer.lftf.val_check_interval=2", "trainer.devices=1"]  # fmt: skip
    starts = [("straight", 4), ("longer", 2), ("longer", 4)]
    for name, steps in starts:
        done = bias_task.lftf(tmp_path / name, *settings, RESUME, f"trainer.lftf.max_steps={steps}")
        assert done.code == 0, done.err
        final, start = (weights(x, world) for x in (tmp_path / name / "checkpoints/final", bias_task.checkpoint))
        assert all(torch.equal(final[key], value) for key, value in start.items())
        assert (result(tmp_path / name)["steps"], result(tmp_path / name)["best_step"]) == (steps, 0)
    assert "going on after step 2" in done.out + done.err
    assert result(tmp_path / "longer") == result(tmp_path / "straight")
    rows = [
        [{k: v for k, v in r.items() if not k.startswith("timers/")} for r in metrics(tmp_path / n)]
        for n in ("straight", "longer")
    ]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0]] == list(range(5))
    fewer = bias_task.lftf(tmp_path / "longer", *settings, RESUME, "trainer.lftf.max_steps=3")
    (line,) = fewer.error_lines
    assert fewer.code == 2 and "holds a run of 4 steps, and this one has 3: set trainer.lftf.max_steps" in line


def test_a_run_that_diverges_ends_with_its_best_state(bias_task, world, tmp_path):
    settings = ["trainer.lftf.val_check_interval=1", "trainer.lftf.block=1", "trainer.lftf.loss=abs_diff",
                "model.optim.lr=1e20", "model.optim.sched.warmup_steps=0", "trainer.devices=1"]  # fmt: skip
    done = bias_task.lftf(tmp_path / "run", *settings, "trainer.lftf.max_steps=6")
    assert done.code == 0, done.err
    found = result(tmp_path / "run")
    assert "diverged" in found["stopped"] and found["steps"] < 6 and found["best_step"] == 0
    assert {k: found["after"][k] for k in NUMBERS} == {k: found["before"][k] for k in NUMBERS}
    before, after = weights(bias_task.checkpoint, world), weights(tmp_path / "run/checkpoints/final", world)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    longer = bias_task.lftf(tmp_path / "run", *settings, RESUME, "trainer.lftf.max_steps=9")
    (line,) = longer.error_lines
    assert longer.code == 2 and f"holds a run of {found['steps']} steps that has ended (" in line and "diverged" in line


DAMAGED = {
    "no description": lambda about: {"format": about["format"]},
    "broken description": lambda about: about | {"delta": about["delta"][:-5]},
    "no base": lambda about: about | {"delta": json.dumps({**json.loads(about["delta"]), "base": 3})},
    "another dtype": lambda about: about | {"delta": json.dumps({**json.loads(about["delta"]), "dtype": "bfloat16"})},
    "no checksum": lambda about: (
        about | {"delta": json.dumps({k: v for k, v in json.loads(about["delta"]).items() if k != "content"})}
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_delta_is_one_line(damage, bias_task, mended, world, tmp_path):
    with safe_open(str(mended / "delta.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        save_file(tensors, str(tmp_path / "d"), metadata=DAMAGED[damage](file.metadata()))
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"]), world)
    load_weights(bias_task.checkpoint, model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the delta .*d is damaged"):
        apply_delta(tmp_path / "d", model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_delta_of_another_precision_is_refused(bias_task, mended, world):
    fields = read_checkpoint_info(bias_task.checkpoint)["model"] | {"precision": "bf16"}
    model = build_gpt(build(GPTModelConfig, fields), world)
    with pytest.raises(ValueError, match="was trained in float32, this model is bfloat16.*set model.precision"):
        apply_delta(mended / "delta.safetensors", model)


def test_the_delta_is_the_checkpoint(bias_task, mended, tmp_path):
    """Put into the model it came from it gives the fine-tuned model's numbers; any other model is refused."""
    delta = mended / "delta.safetensors"
    assert delta.stat().st_size < 0.5 * sum(f.stat().st_size for f in (mended / "checkpoints/final/weights").iterdir())
    done = bias_task.evaluate(tmp_path / "e", bias_task.checkpoint, f"pretrained_checkpoint.delta_path={delta}")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "e" / "bias.json").read_text())
    assert {k: found[k] for k in NUMBERS} == {k: result(mended)["after"][k] for k in NUMBERS}


def test_a_delta_of_another_model_is_refused(bias_task, mended, world, tmp_path):
    """The fine-tuned model's own block is not what the delta replaces; nor has another file's format."""
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"]), world)
    load_weights(mended / "checkpoints/final", model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="does not fit: it was made from other weights"):
        apply_delta(mended / "delta.safetensors", model)
    other = build_gpt(
        build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"] | {"num_layers": 2}), world
    )
    with pytest.raises(ValueError, match="belongs to a model of 3 blocks, this one has 2"):
        apply_delta(mended / "delta.safetensors", other)
    path = tmp_path / "broken.safetensors"
    path.write_bytes((mended / "delta.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot read the delta"):
        apply_delta(path, model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.fixture(scope="module")
def one_rank(bias_task, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank") / "run"
    done = bias_task.lftf(out, *SHORT)
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize(
    "layout",
    [
        ["trainer.devices=4", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        ["trainer.devices=3", "model.pipeline_model_parallel_size=3"],
        ["trainer.devices=2", "model.optim.overlap_grad_reduce=true", "model.optim.overlap_param_gather=true"],
    ],
    ids=["tp2 sp dp2", "pp3", "dp2 overlapping"],
)
def test_layouts_agree(layout, bias_task, one_rank, tmp_path):
    """Ranking, losses, validations and scores."""
    done = bias_task.lftf(tmp_path / "run", *SHORT, *layout)
    assert done.code == 0, done.err
    found, expected = result(tmp_path / "run"), result(one_rank)
    assert found["places"] == expected["places"] and found["ranking"]["order"] == expected["ranking"]["order"]
    assert found["ranking"]["scores"] == pytest.approx(expected["ranking"]["scores"], rel=BOUND)
    assert_same_numbers(found["before"], expected["before"])
    assert_same_numbers(found["after"], expected["after"])
    assert found["before"]["samples"] == expected["before"]["samples"]
    for name in ("parameters", "trained_parameters"):
        assert costs_of(tmp_path / "run")[name] == costs_of(one_rank)[name] > 0
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(one_rank), strict=True):
        keys = [key for key in theirs if key.startswith(("train_optim/", "val/"))]
        assert len(keys) >= 3
        for key in keys:
            assert ours[key] == pytest.approx(theirs[key], rel=BOUND, abs=BOUND), key


def test_sum_fails_the_guard(bias_task, tmp_path):
    """Without a guard it silences both pronouns; with one the run goes back to a state that has them."""
    free = ["trainer.lftf.min_pronoun_mass=0", "trainer.lftf.max_perplexity=null", "trainer.lftf.patience=null"]
    loss = ["trainer.lftf.loss=sum", "trainer.lftf.block=last", "trainer.lftf.max_epochs=5"]
    done = bias_task.lftf(tmp_path / "free", *loss, *free)
    assert done.code == 0, done.err
    found = result(tmp_path / "free")
    assert found["after"]["pronoun_mass"] < 0.5 * found["before"]["pronoun_mass"]
    assert found["after"]["ub"] < 0.5 * found["before"]["ub"]
    done = bias_task.lftf(tmp_path / "guarded", *loss, "trainer.lftf.patience=2")
    assert done.code == 0, done.err
    found = result(tmp_path / "guarded")
    assert found["after"]["pronoun_mass"] > 0.8 * found["before"]["pronoun_mass"]
    assert any("pronoun mass is" in (v["complaint"] or "") for v in found["validations"])
    assert "pronoun mass is" in found["stopped"] and found["steps"] < 30


def test_a_delta_of_a_hugging_face_folder_goes_back_into_it(bias_task, llama, tmp_path):
    """On one process, too: transformers cannot take it, so the folder is read as one of ours."""
    done = bias_task.lftf(tmp_path / "run", *SHORT, f"pretrained_checkpoint.restore_from_path={llama}")
    assert done.code == 0, done.err
    delta = f"pretrained_checkpoint.delta_path={tmp_path / 'run/delta.safetensors'}"
    done = bias_task.evaluate(tmp_path / "e", llama, delta)
    assert done.code == 0, done.err
    found, trained = json.loads((tmp_path / "e" / "bias.json").read_text()), result(tmp_path / "run")
    assert {k: found[k] for k in NUMBERS} == {k: trained["after"][k] for k in NUMBERS}
    assert trained["after"]["afgb"] != trained["before"]["afgb"]
    for row in trained["before"]["samples"]:
        assert row["text"] == greedy(llama, row["prompt"], 24)


@torch.no_grad()
def greedy(folder, text: str, tokens: int) -> str:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32), load_tokenizer(folder)
    prompt = torch.tensor([tokenizer.encode(text)])
    options = {"max_new_tokens": tokens, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.eos_id}
    (whole,) = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
    return tokenizer.decode_response(prompt[0].tolist(), whole[prompt.shape[1] :].tolist())
