"""The launcher on a real Slurm of two nodes, started on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from launch import submit
from megatron_ext.hf import make_hf_config
from recipes.planning import read_config
from recipes.run.holder import Holder
from tests.harness import ROOT
from tests.hf_models import write_hollow_weights
from tests.recipe_runs import metrics, run
from tests.saved_weights import saved_weights
from tests.slurm_cluster import TWO_NODES, Job, started

pytestmark = pytest.mark.functional

ACROSS = "model.tensor_model_parallel_size=2"  # the two ranks of a tensor-parallel group are on different nodes
CORES = 64  # of a node of the partition "gpus"
REWARD = ["--reward-server", "exact_answer", "--reward-gpus", "1"]
VLLM = ["--vllm-nodes", "2", "--vllm-gpus", "4"]
SERVED = "trainer.grpo.rollout={source: vllm, start: 2, python: sh}"
CONFIGS = {"sft": "train_sft", "grpo": "train_grpo", "grpo_video": "train_grpo", "lftf": "train_lftf"}
JOBS = [(recipe, config, nodes) for config, recipe in CONFIGS.items() for nodes in (1, 2, 8, 16)]
THERE = ROOT / "README.md"  # nothing looks inside
TRAIN = [f"data.train_path={THERE}"]
TEXTS = [f"data.text_path={THERE}", f"data.validation_text_path={ROOT / 'LICENSE'}"]
NEEDED = {"sft": TRAIN, "grpo": TRAIN, "grpo_video": TRAIN, "lftf": TEXTS}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def sft_settings(task) -> list[str]:
    return [f"data.train_path={task.data / 'sft.jsonl'}", f"model.tokenizer={task.data / 'tokenizer'}", ACROSS]


def test_grpo_on_two_nodes_is_grpo_on_one_machine(cluster, task, tmp_path, world):
    """The same ranks, on two nodes or started by the recipe itself: bitwise."""
    settings = [
        "model=pretrained", f"data.train_path={task.data / 'train.jsonl'}",
        f"pretrained_checkpoint.restore_from_path={task.checkpoint}",
        "trainer.grpo.max_steps=2", "trainer.grpo.num_prompts_per_grpo_step=4", "trainer.grpo.samples_per_prompt=4",
        "model.global_batch_size=16", "trainer.grpo.val_check_interval=0", ACROSS,
    ]  # fmt: skip
    job = cluster.start("train_grpo", "grpo_tiny", tmp_path / "grpo", *settings)
    here = run(
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", *settings, "trainer.devices=2",
        f"exp_manager.explicit_log_dir={tmp_path / 'here'}",
    )  # fmt: skip
    assert here.code == 0, here.err
    job.end()
    assert "2 nodes alike: 0 x None" in job.log
    ranks = sorted(p.parts[-4] for p in Path(f"{job.run_dir}.slurm").glob("*/node*/*/attempt_0/0/stdout.log"))
    assert len(ranks) == 2, "each node keeps its own log"
    for ours, theirs in zip(metrics(job.run_dir), metrics(tmp_path / "here"), strict=True):
        keys = [k for k in ours if not k.startswith("timers/") and "per_second" not in k]
        assert [ours[k] for k in keys] == [theirs[k] for k in keys] and len(keys) > 10
    there, local = (saved_weights(folder / "checkpoints/final", world) for folder in (job.run_dir, tmp_path / "here"))
    assert all(torch.equal(local[name], value) for name, value in there.items())


def test_a_reward_served_by_another_node(cluster, task, tmp_path):
    """A heterogeneous job: one node trains, the other computes the rewards that the recipe itself would compute."""
    settings = [
        "model=pretrained", f"data.train_path={task.data / 'train.jsonl'}", "trainer.grpo.max_steps=1",
        f"pretrained_checkpoint.restore_from_path={task.checkpoint}", "trainer.grpo.num_prompts_per_grpo_step=4",
        "trainer.grpo.samples_per_prompt=4", "model.global_batch_size=16", "trainer.grpo.val_check_interval=0",
    ]  # fmt: skip
    reward = "{name: length, target: 60}"
    nodes = ["--nodes", "1", "--gpus-per-node", "0", "--processes", "1", "--reward-server", reward]
    job = cluster.start("train_grpo", "grpo_tiny", tmp_path / "grpo", *settings, nodes=nodes)
    here = run(
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", *settings, "trainer.devices=1",
        f"trainer.grpo.reward={reward}", f"exp_manager.explicit_log_dir={tmp_path / 'here'}",
    )  # fmt: skip
    assert here.code == 0, here.err
    job.end()
    assert f"reward {reward} at http://127.0.0.1:" in job.log
    (ours,), (theirs,) = metrics(job.run_dir), metrics(tmp_path / "here")
    keys = [k for k in ours if not k.startswith("timers/") and "per_second" not in k]
    assert [ours[k] for k in keys] == [theirs[k] for k in keys]
    assert 0 < ours["train_rollouts/reward"] < 1


def test_lftf_on_two_nodes(cluster, tmp_path):
    made = run("tools/make_biased_corpus.py", "--out", tmp_path / "data", "--biased", 400, "--hinted", 300, "--neutral", 200,
               "--held-out", 20, "--vocab-size", 1024)  # fmt: skip
    assert made.code == 0, made.err
    small = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"]
    done = run(
        "recipes/train_sft.py", "--config-name", "sft_bias_tiny", f"data.train_path={tmp_path / 'data/sft.jsonl'}", *small,
        f"model.tokenizer={tmp_path / 'data/tokenizer'}", f"exp_manager.explicit_log_dir={tmp_path / 'sft'}",
        "trainer.devices=1", "trainer.sft.max_steps=3",
    )  # fmt: skip
    assert done.code == 0, done.err
    job = cluster.start(
        "train_lftf", "lftf_tiny", tmp_path / "lftf", "model=pretrained", ACROSS, "trainer.lftf.block=1",
        f"pretrained_checkpoint.restore_from_path={tmp_path / 'sft/checkpoints/final'}", "trainer.lftf.max_steps=2",
        f"data.text_path={tmp_path / 'data/neutral_train.jsonl'}", "trainer.lftf.val_check_interval=1",
        f"data.validation_text_path={tmp_path / 'data/neutral_test.jsonl'}",
    )  # fmt: skip
    job.end()
    result = json.loads((job.run_dir / "result.json").read_text())
    assert result["places"] == ["1"] and result["steps"] == 2
    assert (job.run_dir / "delta.safetensors").is_file()


def test_a_preempted_run_goes_on_and_ends_as_if_undisturbed(cluster, task, tmp_path, world):
    """Told to stop, first by a signal to its steps, then by one to its script, as Slurm sends when the time is nearly up, it
    saves, stops and is queued again. Names with spaces, quotes and dollars survive."""
    odd = tmp_path / 'it\'s "a" $HOME run'
    odd.mkdir()
    shutil.copy(task.data / "sft.jsonl", odd / "sft.jsonl")
    path = str(odd / "sft.jsonl").replace("'", "\\'")
    settings = [*sft_settings(task)[1:], f"data.train_path='{path}'", "trainer.sft.max_steps=120"]
    job = cluster.start("train_sft", "sft_tiny", odd / "run", *settings)
    stopped = 0
    for options, told in [([], "told to stop"), (["--batch"], "time is nearly up")]:
        before = stopped + 1
        job.until(lambda: (job.run_dir / "metrics.jsonl").exists() and len(metrics(job.run_dir)) > before)  # noqa: B023
        cluster.ask("scancel", *options, "--signal=USR1", job.number)
        job.until(lambda: job.state == "PENDING")
        stopped = len(metrics(job.run_dir))
        assert before < stopped < 120 and not (job.run_dir / "checkpoints/final").exists()
        assert (
            told in job.log and f"asked to stop after step {stopped}: saved in" in job.log and "queued again" in job.log
        )
        job.until(lambda: cluster.idle)
        time.sleep(2)  # nodes refuse what starts in the very second of the requeue: "Job credential revoked"
        cluster.ask("scontrol", "update", f"JobId={job.number}", "StartTime=now")  # Slurm would wait for two minutes
        job.until(lambda: f"going on after step {stopped}" in job.log)  # noqa: B023
    here = run(
        "recipes/train_sft.py", "--config-name", "sft_tiny", *settings, "trainer.devices=2",
        f"exp_manager.explicit_log_dir={tmp_path / 'here'}",
    )  # fmt: skip
    assert here.code == 0, here.err
    job.end()
    assert yaml.safe_load((job.run_dir / "config.yaml").read_text())["data"]["train_path"] == str(odd / "sft.jsonl")
    there, local = (saved_weights(folder / "checkpoints/final", world) for folder in (job.run_dir, tmp_path / "here"))
    assert all(torch.equal(local[name], value) for name, value in there.items())
    assert [r["step"] for r in metrics(job.run_dir)] == list(range(1, 121))


def test_a_killed_rank_ends_the_job(cluster, task, tmp_path):
    job = cluster.start("train_sft", "sft_tiny", tmp_path / "run", *sft_settings(task), "trainer.sft.max_steps=100000")
    job.until(lambda: (job.run_dir / "metrics.jsonl").exists() and len(metrics(job.run_dir)) > 1)
    ranks = subprocess.run(
        ["pgrep", "-f", f"recipes/train_sft.py.*explicit_log_dir='{job.run_dir}'"], capture_output=True, text=True
    )
    ranks = [int(pid) for pid in ranks.stdout.split() if "torch.distributed.run" not in command_line(int(pid))]
    ranks = [pid for pid in ranks if parent(pid) not in ranks]  # a rank's loggers are a fork of it
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    job.fail()
    assert re.search(r"Signal 9 \(SIGKILL\)|exitcode\s*:\s*-9", job.log), job.log[-3000:]


def test_jobs_of_one_run_wait_for_each_other(cluster, task, tmp_path):
    """Submitted twice, a run has twice the time."""
    first, second = (
        cluster.start("train_sft", "sft_tiny", tmp_path / "run", *sft_settings(task), "trainer.sft.max_steps=3")
        for _ in "12"
    )
    job = cluster.ask("scontrol", "show", "job", second.number)
    assert "JobState=PENDING" in job and "Reason=Dependency" in job and "Dependency=singleton" in job
    first.end()
    second.until(lambda: second.state != "PENDING")
    cluster.ask("scancel", second.number)
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3]


def test_what_slurm_says_of_the_job_that_holds_a_folder(cluster, tmp_path, monkeypatch):
    """Seen from no job at all, as when a run is started by hand: while the job runs the folder is its own."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    number = cluster.ask("sbatch", "--parsable", f"--output={tmp_path}/log", "--wrap=sleep 600").strip()
    job = Job(cluster, number, tmp_path / "run")
    here = Holder.this_process()
    there = replace(here, host="node1", boot="another", cluster="test", job=number)
    job.until(lambda: job.state == "RUNNING")
    assert not there.has_ended(here) and not replace(there, cluster="another", job="123456").has_ended(here)
    assert replace(there, job="123456").has_ended(here), "forgotten"
    job.until(lambda: (tmp_path / "log").exists())
    cluster.ask("scontrol", "requeue", number)
    job.until(lambda: job.state == "PENDING")
    assert there.has_ended(here)
    cluster.ask("scancel", number)
    assert replace(there, restarts=1).has_ended(here)


def test_the_canary_ends_a_job_and_names_its_nodes(cluster, tmp_path):
    """Submitted by hand, as the job script's head says: the nodes lack the GPUs that are asked for."""
    variables = {
        "RECIPE": "train_sft",
        "CONFIG": "sft_tiny",
        "RUN_DIR": str(tmp_path / "run"),
        "GPUS": "1",
        "CANARY_GPUS": "3",
    }
    (tmp_path / "run.slurm").mkdir()
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        f"--output={tmp_path}/run.slurm/%j.log",
        "launch/slurm/job.sh",
        "--",
    ]
    done = subprocess.run(command, env=cluster.env | variables, cwd=ROOT, capture_output=True, text=True, check=True)
    job = Job(cluster, done.stdout.strip(), tmp_path / "run")
    job.fail()
    assert "error: the nodes are not fit for the run:" in job.log
    for node in ("node1", "node2"):
        assert f"{node}: has 0 GPUs that work, 3 were asked for" in job.log
    assert not (tmp_path / "run").exists()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return "torch.distributed.run"  # gone


def test_slurm_accepts_what_is_submitted(cluster, task, tmp_path):
    settings = [
        "model=pretrained",
        f"data.train_path={task.data / 'train.jsonl'}",
        f"pretrained_checkpoint.restore_from_path={task.checkpoint}",
    ]
    options = [
        "--recipe",
        "train_sft",
        "--config",
        "sft_tiny",
        "--run-dir",
        tmp_path / "run",
        *TWO_NODES,
        "--test-only",
    ]
    done = cluster.submit(*options, "--", *settings)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr and "using 2 processors on nodes node[1-2]" in done.stderr
    assert not (tmp_path / "run.slurm").exists()


@pytest.mark.parametrize(("recipe", "config", "nodes"), JOBS)
def test_slurm_accepts_every_job_of_real_models(cluster, tmp_path, recipe, config, nodes):
    """On a partition of 17 nodes of 8 GPUs; GRPO also with its reward on one more node, and with vLLM on two more."""
    model = read_config(config.removesuffix("_video"), ["model=qwen3_8b", f"cluster={nodes}x8"]).model
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(model)))
    write_hollow_weights(tmp_path)
    options = [
        "--recipe", recipe, "--config", config, "--nodes", nodes, "--run-dir", tmp_path / "it's a run", "--test-only",
        "--sbatch=--partition=gpus",
    ]  # fmt: skip
    settings = ["model=qwen3_8b", f"cluster={nodes}x8", f"pretrained_checkpoint.restore_from_path={tmp_path}"]
    cases = [([], [], 0)]
    if config == "grpo":
        cases.append((REWARD, [], 1))
    if config == "grpo" and nodes <= 8:
        cases.append(([*REWARD, *VLLM], [SERVED], 3))
    for more, said, servers in cases:
        args, overrides = submit.arguments([*map(str, [*options, *more]), "--", *settings, *said, *NEEDED[config]])
        parts, exported = submit.command(args, overrides, submit.check(args, overrides))
        done = subprocess.run(parts, env=cluster.env | exported, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
        cores = CORES * nodes + servers
        assert f"using {cores} processors" in done.stderr, done.stderr
