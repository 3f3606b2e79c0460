"""SFT and GRPO end to end on two processes, and that a run is what its seed and data make it."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.recipe_runs import ROOT, SMALL, metrics

pytestmark = pytest.mark.functional


def test_sft_leaves_a_complete_run(task):
    rows = metrics(task.folder / "sft")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[-1]["train_optim/loss"] < rows[0]["train_optim/loss"]
    assert rows[-1]["val/loss"] > 0
    assert (task.checkpoint / "tokenizer" / "tokenizer.json").is_file()
    config = yaml.safe_load((task.folder / "sft" / "config.yaml").read_text())
    assert config["model"]["hidden_size"] == 32 and config["trainer"]["sft"]["max_steps"] == 3
    assert list((task.folder / "sft").glob("**/events.out.tfevents*")), "no TensorBoard file"


def test_local_sh_is_the_recipe_under_torchrun(task, tmp_path):
    """The same numbers as the recipe that starts its own processes; each rank's output is kept."""
    done = subprocess.run(
        [
            "launch/local.sh", "train_sft", "--config-name", "sft_tiny", f"data.train_path={task.data / 'sft.jsonl'}",
            f"model.tokenizer={task.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={tmp_path / 'run'}", *SMALL,
            "trainer.sft.max_steps=3", "model.global_batch_size=8", "model.micro_batch_size=4",
        ],
        env=os.environ | {"NPROC": "2", "PYTHON": sys.executable, "LOGS": str(tmp_path / "logs"), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss = "train_optim/loss"
    assert [r[loss] for r in metrics(tmp_path / "run")] == [r[loss] for r in metrics(task.folder / "sft")]
    assert len(list((tmp_path / "logs").glob("**/stdout.log"))) == 2


@pytest.fixture(scope="module")
def grouped(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("grouped") / "run"
    done = task.grpo(
        out, "trainer.grpo.max_steps=5", "trainer.grpo.val_check_interval=5",
        f"data.validation_path={task.data / 'test.jsonl'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    return out


def test_same_seed_same_run_bitwise(task, grouped, tmp_path):
    done = task.grpo(tmp_path / "again", "trainer.grpo.max_steps=5", imports=True)
    assert done.code == 0, done.err
    first = [r for r in metrics(grouped) if "train_optim/loss" in r]
    second = metrics(tmp_path / "again")
    keys = ("train_optim/loss", "train_optim/grad_norm", "train_rollouts/reward", "train_optim/kl")
    assert len(second) == 5
    assert [[r[k] for k in keys] for r in first] == [[r[k] for k in keys] for r in second]
    assert len({r["train_optim/loss"] for r in second}) == 5, "the loss never changes: the test could not fail"


def test_grouping_changes_the_cost_and_not_the_numbers(task, grouped, tmp_path):
    done = task.grpo(tmp_path / "repeated", "model.prefix_grouping=false")
    assert done.code == 0, done.err
    ours = [r for r in metrics(grouped) if "train_optim/loss" in r][:3]
    plain = metrics(tmp_path / "repeated")
    for a, b in zip(ours, plain, strict=True):
        assert a["train_optim/loss"] == pytest.approx(b["train_optim/loss"], abs=1e-5)
        assert a["train_rollouts/reward"] == b["train_rollouts/reward"]
        assert a["train_optim/tokens_executed"] < 0.45 * b["train_optim/tokens_executed"]
        assert a["train_optim/tokens_saved"] > 0.5 and abs(b["train_optim/tokens_saved"]) < 0.05


def test_validation_before_and_after(grouped):
    rewards = {r["step"]: r["val_rollouts/reward"] for r in metrics(grouped) if "val_rollouts/reward" in r}
    assert set(rewards) == {0, 5}
    assert all(0 <= value <= 1 for value in rewards.values())


def test_rewards_keep_their_precision(grouped):
    """Twelfths (`length` with the target 12) have none in fp32: the mean of a step's 16 is a whole number of 192ths."""
    for row in metrics(grouped):
        if "train_rollouts/reward" in row:
            parts = row["train_rollouts/reward"] * 16 * 12
            assert abs(parts - round(parts)) < 1e-9


def test_overlong_responses_can_be_left_out(task, tmp_path):
    """Cut after two tokens nearly all are overlong; the weights of those left add up to 1, and the ratio starts at 1."""
    done = task.grpo(
        tmp_path / "run", "trainer.grpo.max_steps=2", "trainer.grpo.length_params.max_length=2",
        "trainer.grpo.overlong_filtering=true",
    )  # fmt: skip
    assert done.code == 0, done.err
    for row in metrics(tmp_path / "run"):
        expected = 0 if row["train_rollouts/truncated"] == 1 else 1
        assert row["train_rollouts/truncated"] > 0.5
        assert row["train_optim/ratio"] == pytest.approx(expected, abs=1e-6)
        assert (row["train_optim/grad_norm"] > 0) == (expected == 1)


@pytest.mark.parametrize(
    "layout",
    [
        ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        ["model.pipeline_model_parallel_size=2"],
        ["model.context_parallel_size=2"],
        ["model.micro_batch_tokens=300"],
        ["trainer.grpo.offload_reference_policy=true", "model.optim.optimizer_cpu_offload=true"],
        [
            "model.optim.optimizer_cpu_offload=true",
            "model.optim.optimizer_offload_fraction=0.5",
            "model.optim.exp_avg_dtype=bfloat16",
            "model.optim.overlap_grad_reduce=true",
            "model.optim.overlap_param_gather=true",
            "model.activations_checkpoint_granularity=full",
            "model.activation_offload=true",
        ],
    ],
    ids=["tp2-sp", "pp2", "cp2", "token-budget", "host", "levers"],
)
def test_the_first_step_is_the_same_however_it_is_run(task, grouped, tmp_path, layout):
    """It sees the same weights and samples under every layout and packing, so its numbers agree."""
    done = task.grpo(tmp_path / "run", "trainer.grpo.max_steps=2", *layout)
    assert done.code == 0, done.err
    first, other = next(r for r in metrics(grouped) if "train_optim/loss" in r), metrics(tmp_path / "run")[0]
    assert other["train_rollouts/reward"] == pytest.approx(first["train_rollouts/reward"], rel=1e-12)
    assert other["train_rollouts/response_length"] == first["train_rollouts/response_length"]
    assert other["train_optim/grad_norm"] == pytest.approx(first["train_optim/grad_norm"], rel=1e-4)
    if layout == ["model.micro_batch_tokens=300"]:
        assert other["train_optim/saving_kept"] == 1  # every group fits
        assert other["train_optim/tokens_saved"] > 0.5


def test_weights_and_biases_offline(task, tmp_path):
    done = task.sft(
        tmp_path / "run", "trainer.devices=1", "trainer.sft.max_steps=2", "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs={name: mine, project: ours, offline: true}",
    )  # fmt: skip
    assert done.code == 0, done.err
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"train_optim/loss" in content and b"train_optim/grad_norm" in content
