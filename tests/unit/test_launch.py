"""What the launcher refuses before anything is submitted, what the canary sees, and how a run is asked to stop."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import canary
from launch import submit as launcher
from megatron_ext.hf import make_hf_config
from megatron_ext.planner import estimate
from recipes.cli import stopping
from recipes.planning import job_of, read_config
from tests.hf_models import write_hollow_weights
from tests.recipe_runs import run

ROOT = Path(__file__).parents[2]
# Files that are there; nothing looks inside.
TRAIN = f"data.train_path={ROOT / 'README.md'}"
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("launch/**/*.sh"))


@pytest.mark.parametrize("script", [*SCRIPTS, ".ci/run"])
def test_shellcheck(script):
    tool = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [str(tool), "--severity=style", "--external-sources", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def node(**changes) -> dict:
    now = 1e9 + random.random()
    seen = {
        "time": now,
        "written": now + 0.1,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "transformers": "5.1"},
    }
    return seen | {"gpus": 8, "gpu": "NVIDIA H100 80GB HBM3", "driver": "570.1"} | changes


def judged(folder: Path, **nodes: dict | None) -> list[str]:
    for name, seen in nodes.items():
        if seen is not None:
            (folder / f"{name}.json").write_text(json.dumps(seen))
    return canary.judge(folder, list(nodes), 8)


def test_the_canary_passes_nodes_that_are_alike(tmp_path):
    assert judged(tmp_path, a=node(), b=node(), c=node()) == []
    assert judged(tmp_path, a=node(), b=node(gpus=16)) == []


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (None, "b: did not write to"),
        (
            node(gpus=7),
            "b: has 7 GPUs that work, 8 were asked for",
        ),  # more than 8 are others', where Slurm does not hide them
        (node(driver="550.9"), 'b: driver is "550.9", others have "570.1"'),
        (node(time=2e9), "b: its clock differs from the shared filesystem's by +"),
        (node(packages={"torch": "2.12.0", "transformers": "5.1"}), "b: packages is torch 2.12.0 (others 2.13.0)"),
    ],
)
def test_the_canary_names_the_node_that_is_not(tmp_path, odd, words):
    (wrong,) = judged(tmp_path, a=node(), b=odd, c=node())
    assert words in wrong


def test_the_canary_looks_at_this_machine(tmp_path):
    command = [sys.executable, str(ROOT / "launch/canary.py")]
    env = os.environ | {"SLURMD_NODENAME": "here"}
    before = time.time()
    subprocess.run([*command, "look", "--folder", tmp_path, "--gpus", "0"], env=env, check=True)
    seen = json.loads((tmp_path / "here.json").read_text())
    assert seen["python"] == ".".join(map(str, sys.version_info[:3])) and before <= seen["time"] <= time.time()
    nodes = ["--nodes", "here"]
    done = subprocess.run(
        [*command, "judge", "--folder", tmp_path, "--gpus", str(seen["gpus"]), *nodes], capture_output=True
    )
    assert done.returncode == 0 and b"1 nodes alike" in done.stdout
    done = subprocess.run(
        [*command, "judge", "--folder", tmp_path, "--gpus", "999", *nodes], capture_output=True, text=True
    )
    assert done.returncode == 1 and f"here: has {seen['gpus']} GPUs that work, 999 were asked for" in done.stderr


def test_a_driver_that_takes_long_to_answer_is_no_clock_that_differs(tmp_path, monkeypatch):
    """Half a minute, told by a clock that was so late before it answered."""
    late, has = [30.0], canary.gpus

    def slow() -> dict:
        late[0] = 0.0
        return has()

    monkeypatch.setattr(canary, "gpus", slow)
    monkeypatch.setattr(canary, "time", SimpleNamespace(time=lambda: time.time() - late[0]))
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    canary.look(tmp_path)
    assert canary.judge(tmp_path, ["here"], 0) == []


def submit(*arguments: object, recipe: str = "train_sft", overrides: tuple[str, ...] = (TRAIN,)):
    return run(
        "launch/submit.py", "--recipe", recipe, "--config", "sft_tiny", "--dry-run", "--gpus-per-node", 0, "--processes", 2,
        *arguments, "--", *overrides,
    )  # fmt: skip


def test_a_dry_run_shows_what_would_be_submitted(tmp_path):
    (tmp_path / """it's "a" $HOME.jsonl""").touch()
    value = f"""data.train_path='{tmp_path}/it\\'s "a" $HOME.jsonl'"""
    done = submit("--nodes", 4, "--run-dir", tmp_path / "my run", "--sbatch=--account=me", overrides=(value,))
    assert done.code == 0, done.err
    words = shlex.split(done.out.replace("\\\n", " "))
    assert words[-1] == value and words[-2] == "--" and "--account=me" in words and "--nodes=4" in words
    assert f"RUN_DIR={tmp_path}/my run" in words and "GPUS=2" in words and "CANARY_GPUS=0" in words
    assert len(list(tmp_path.iterdir())) == 1 and "--signal=B:USR1@180" in words and "--export=ALL" in words


def test_the_environment_does_not_change_what_was_checked(tmp_path, monkeypatch):
    """What options say is theirs alone; what the job script takes from the environment is shown."""
    monkeypatch.setenv("CONTAINER", "/nosuch.sqsh")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    monkeypatch.setenv("PYTHON", "/opt/my python")
    done = submit("--run-dir", tmp_path / "50% of it")
    assert done.code == 0, done.err
    words = shlex.split(done.out.replace("\\\n", " "))
    assert "PYTHON=/opt/my python" in words and "--export=ALL" in words and not any("CONTAINER" in w for w in words)
    assert f"--output={tmp_path}/50%% of it.slurm/%j.log" in words


def test_a_job_is_told_to_stop_early_enough(tmp_path, monkeypatch, capsys):
    """Before a step ends nobody looks: two of them, as planned, and three minutes to save."""
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(read_config("grpo", ["model=qwen3_8b"]).model)))
    write_hollow_weights(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["submit.py", "--dry-run", "--recipe", "train_grpo", "--config", "grpo", "--run-dir", str(tmp_path / "r"), "--", TRAIN,
         f"pretrained_checkpoint.restore_from_path={tmp_path}", "model=qwen3_8b", "trainer.grpo.max_steps=5"],
    )  # fmt: skip
    assert launcher.main() == 0
    (said,) = [w for w in shlex.split(capsys.readouterr().out.replace("\\\n", " ")) if w.startswith("--signal=B:USR1@")]
    step = estimate(job_of(read_config("grpo", ["model=qwen3_8b", "cluster=1x8"]))).step.total
    assert step > 60 and 0 <= int(said.split("@")[1]) - (180 + 2 * step) < 1


@pytest.mark.parametrize(
    ("arguments", "overrides", "words"),
    [
        (["--nodes", "3", "--run-dir", "/tmp/r"], ["model.tensor_model_parallel_size=4"],
         "6 processes cannot be divided by model.tensor"),
        (["--run-dir", "/nosuch/shared/r"], [], "/nosuch/shared does not exist; is the shared filesystem mounted here?"),
        (["--run-dir", "/mnt/nosuch_shared/runs/r"], [], "/mnt/nosuch_shared/runs does not exist; is the shared filesystem"),
        (["--run-dir", "/r"], [], "name a folder of a filesystem that all nodes share, not of /"),
        (["--run-dir", "/tmp/${b}"], [], "Hydra would fill in what follows the dollar"),
        (["--run-dir", "relative/r"], [], "--run-dir relative/r must be absolute"),
        (["--run-dir", "/etc/hostname/r"], [], "/etc/hostname is no folder to write to"),
        (["--run-dir", "/tmp/r", "--container", "/nosuch/image.sqsh"], [], "--container /nosuch/image.sqsh does not exist"),
        (["--run-dir", "/tmp/r"], ["model.hiden_size=64"], "unknown key model.hiden_size; did you mean model.hidden_size?"),
        (["--run-dir", "/tmp/r", "--nodes", "0"], [], "--nodes 0"),
        (["--run-dir", "/tmp/r", "--nodes", "3"], ["model.global_batch_size=8"], "do not divide by the data-parallel size 6"),
        (["--run-dir", "/tmp/r"], ["trainer.devices=4"], "trainer.devices=4: --gpus-per-node or --processes says it"),
        (["--run-dir", "/tmp/r"], ["exp_manager.explicit_log_dir=/tmp/o"], "--run-dir says it for the whole job"),
        (["--run-dir", "/tmp/r", "--mounts", "/a:/a"], [], "--mounts /a:/a is for a container"),
        (["--run-dir", "/tmp/r", "--container", "nvcr.io#x y"], [], "--container 'nvcr.io#x y' is no image"),
        (["--run-dir", "/tmp/r", "--container", "a#b", "--mounts", "/tmp:/t,/nosuch:/z"], [], "/nosuch does not exist here"),
        (["--run-dir", "/tmp/r", "--gpus-per-node", "1"], [], "--processes 2 on 1 GPUs: two ranks cannot share one"),
        (["--run-dir", "/tmp/r", "--reward-gpus", "-3"], [], "--reward-gpus -3"),
        (["--run-dir", "/tmp/r", "--vllm-nodes", "2"], [], "--vllm-nodes 2: train_sft samples no responses, only train_grpo"),
        (["--run-dir", "/tmp/r", "--vllm-nodes", "-1"], [], "--vllm-nodes -1"),
        (["--run-dir", "/tmp/r", "--vllm-gpus", "8"], [], "--vllm-gpus 8 is for nodes of vLLM: say how many with --vllm-nodes"),
        (["--run-dir", "/tmp/r", "--vllm-container", "a#b"], [], "--vllm-container a#b is for nodes of vLLM"),
        (["--run-dir", "/tmp/r", "--sbatch=--nodes=4"], [], "--sbatch=--nodes=4: submit.py says --nodes itself"),
        (["--run-dir", "/tmp/r", "--sbatch=-N4"], [], "--sbatch=-N4: submit.py says -N4 itself"),
        (["--run-dir", "/tmp/r", "--sbatch=--export=NONE"], [], "--sbatch=--export=NONE: submit.py says --export itself"),
        (["--run-dir", "/tmp/r"], ["data.validation_path=/nosuch.jsonl"], "data.validation_path=/nosuch.jsonl does not exist"),
        (["--run-dir", ROOT], [], "holds files, but no run of ours"),
        (["--run-dir", "/tmp/r"], ["pretrained_checkpoint.restore_from_path=/nosuch"],
         "/nosuch is not a complete checkpoint of ours"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_submitted(arguments, overrides, words, refused):
    line = refused("--recipe", "train_sft", "--config", "sft_tiny", "--gpus-per-node", "0", "--processes", "2", *arguments,
                   "--", TRAIN, *overrides)  # fmt: skip
    assert words in line


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that gives the one line with which submit.py refuses."""

    def ask(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["submit.py", "--dry-run", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            launcher.main()
        said = capsys.readouterr()
        (line,) = [line for line in said.err.splitlines() if line]
        assert ended.value.code == 2 and line.startswith("error: ") and said.out == ""
        return line

    return ask


def test_an_unknown_recipe(refused):
    line = refused("--recipe", "train_stf", "--config", "sft_tiny", "--run-dir", "/tmp/r")
    assert "train_stf does not exist; there are eval_bias, eval_video, locate_bias, train_grpo" in line


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_node_is_the_host_by_its_number(number, tmp_path):
    """And each says by which address the others reach it, whatever names resolve to."""
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    shown.chmod(0o755)
    env = {
        "PATH": os.environ["PATH"], "PYTHON": str(shown), "SLURMD_NODENAME": ["a1", "a11"][number], "SLURM_NODEID": str(number),
        "NODE_ADDRESSES": "a1=10.0.0.1\na11=other.name", "SLURM_JOB_NUM_NODES": "2", "GPUS": "8", "RENDEZVOUS_ID": "1-0",
        "RENDEZVOUS": "10.0.0.1:20001", "LOGS": "/shared/my logs", "ROOT": "/my root", "RECIPE": "train_sft",
        "MEGATRON_EXT_STOP_FILE": "/shared/stop",
    }  # fmt: skip
    script = ROOT / "launch/slurm/node.sh"
    done = subprocess.run(
        ["bash", script, "--config-name", "it's"], env=env, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    options = dict(zip(words, words[1:], strict=False))
    assert options["--rdzv-conf"] == f"is_host={1 - number}" and options["--rdzv-endpoint"] == "10.0.0.1:20001"
    assert options["--local-addr"] == ["10.0.0.1", "other.name"][number]
    assert options["--log-dir"] == f"/shared/my logs/{env['SLURMD_NODENAME']}"
    assert words[-3:] == ["/my root/recipes/train_sft.py", "--config-name", "it's"]


def test_a_run_is_asked_to_stop(tmp_path, monkeypatch):
    file = tmp_path / "stop"
    monkeypatch.setenv(stopping.STOP_FILE_VARIABLE, str(file))
    looking, other = stopping.StopRequests(None, looks=True), stopping.StopRequests(None, looks=False)
    assert looking.now() == other.now() == 0
    file.touch()
    assert stopping.REASONS[looking.now()] == "asked to stop" and other.now() == 0
    assert stopping.REASONS[stopping.StopRequests("00:00:00:00", looks=False).now()] == "max_time_per_run reached"
    assert stopping.StopRequests("00:01:00:00", looks=False).now() == 0
    with pytest.raises(ValueError, match="must be quoted and look like"):
        stopping.StopRequests("1 hour", looks=False)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        stopping.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.REASONS[other.now()] == "asked to stop"
    finally:
        signal.signal(signal.SIGUSR1, before)
        monkeypatch.setattr(stopping, "_asked", False)


def test_what_cannot_fit_is_refused(tmp_path):
    """By the planner, from the folder's config.json and headers alone: 70 billion parameters on one node, and on eight."""
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_hollow_weights(tmp_path)
    overrides = [
        TRAIN, f"pretrained_checkpoint.restore_from_path={tmp_path}", "model=llama3_1_70b", "cluster=8x8",
        "trainer.grpo.initial_policy_kl_penalty=0", "trainer.grpo.reward={name: http, url: 'http://here:8000'}",
    ]  # fmt: skip

    def asked(nodes: int):
        """In a process of its own, which has imported no reward by chance."""
        command = [
            "launch/submit.py",
            "--recipe",
            "train_grpo",
            "--config",
            "grpo",
            "--dry-run",
            "--nodes",
            nodes,
            "--run-dir",
            "/tmp/r",
        ]
        return run(*command, "--", *overrides, imports=True)

    refused = asked(2)
    assert refused.code == 2 and "--config grpo does not fit: " in refused.err and "GiB per rank" in refused.err
    taken = asked(8)
    assert taken.code == 0, taken.err
    assert "planned: fits: " in taken.err and "--gpus-per-node=8" in taken.out


def test_what_the_ranks_would_refuse_is_refused(tmp_path, refused, monkeypatch, capsys):
    """A checkpoint of another model than the YAML's, a reward that does not exist."""
    model = read_config("grpo", ["model=qwen3_8b"]).model
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(model)))
    write_hollow_weights(tmp_path)
    asked = ["--recipe", "train_grpo", "--config", "grpo", "--nodes", "2", "--run-dir", "/tmp/r"]
    kept = ["--", TRAIN, f"pretrained_checkpoint.restore_from_path={tmp_path}"]
    line = refused(*asked, *kept, "model=llama3_1_8b")
    assert f"but the checkpoint {tmp_path} was made with num_layers=36" in line
    assert "did you mean exact_answer?" in refused(*asked, *kept, "model=qwen3_8b", "trainer.grpo.reward=exact_anwser")
    assert "did you mean exact_answer?" in refused(*asked, "--reward-server", "exact_anwser", *kept, "model=qwen3_8b")
    assert "--reward-server {name: [ is no YAML" in refused(
        *asked, "--reward-server", "{name: [", *kept, "model=qwen3_8b"
    )
    monkeypatch.setattr(sys, "argv", ["submit.py", "--dry-run", *asked, *kept, "model=qwen3_8b"])
    assert launcher.main() == 0
    assert shlex.split(capsys.readouterr().out)[-1] == "cluster=2x8"


def test_nodes_of_their_own_for_vllm(tmp_path, refused, monkeypatch, capsys):
    model = read_config("grpo", ["model=qwen3_8b"]).model
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(model)))
    write_hollow_weights(tmp_path)
    asked = [
        "--recipe",
        "train_grpo",
        "--config",
        "grpo",
        "--nodes",
        "2",
        "--run-dir",
        str(tmp_path / "r"),
        "--vllm-nodes",
        "3",
    ]
    kept = ["--", TRAIN, f"pretrained_checkpoint.restore_from_path={tmp_path}", "model=qwen3_8b"]
    served = "trainer.grpo.rollout={source: vllm, start: 2, python: sh}"
    assert "trainer.grpo.rollout.rendezvous is for servers" in refused(*asked, *kept)
    line = refused(*asked, *kept, "trainer.grpo.rollout={source: vllm, urls: ['http://a:1']}")
    assert "say in start how many on each" in line
    line = refused(*asked, *kept, "trainer.grpo.rollout={source: vllm, start: 1, python: /nosuch/python}")
    assert "trainer.grpo.rollout.python=/nosuch/python is no program" in line
    line = refused(*asked, *kept, served, "trainer.grpo.rollout.rendezvous=/shared/meet")
    assert "--vllm-nodes says it for the whole job" in line
    assert "--vllm-mounts /a:/a is for a container: name one with --vllm-container" in refused(
        *asked, "--vllm-mounts", "/a:/a", *kept, served
    )
    more = ["--reward-server", "exact_answer", "--vllm-gpus", "4", "--vllm-container", "a#b", "--sbatch=--account=me"]
    monkeypatch.setattr(sys, "argv", ["submit.py", "--dry-run", *asked, *more, *kept, served])
    assert launcher.main() == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    assert {"VLLM=yes", "VLLM_CONTAINER=a#b", "REWARD=exact_answer"} <= set(words)
    parts = " ".join(words[: words.index(str(ROOT / "launch/slurm/job_with_servers.sh"))]).split(" : ")
    assert len(parts) == 3 and all("--account=me" in part for part in parts)
    assert "--nodes=1 " in parts[1] and "-reward" in parts[1] and "--gpus-per-node" not in parts[1]
    assert "--nodes=3 " in parts[2] and "-vllm" in parts[2] and "--gpus-per-node=4" in parts[2]
