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

import pytest

from launch import canary
from launch import submit as launcher
from megatron_ext.models.hf import make_hf_config
from recipes import stopping
from recipes.planning import read_config

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (None, "b: did not write to"),
        (node(gpus=7), "b: has 7 GPUs that work, 8 were asked for"),
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
    subprocess.run([*command, "look", "--folder", tmp_path, "--gpus", "0"], env=env, check=True)
    seen = json.loads((tmp_path / "here.json").read_text())
    assert seen["python"] == ".".join(map(str, sys.version_info[:3])) and abs(seen["time"] - time.time()) < 60
    nodes = ["--nodes", "here"]
    done = subprocess.run(
        [*command, "judge", "--folder", tmp_path, "--gpus", str(seen["gpus"]), *nodes], capture_output=True
    )
    assert done.returncode == 0 and b"1 nodes alike" in done.stdout
    done = subprocess.run(
        [*command, "judge", "--folder", tmp_path, "--gpus", "999", *nodes], capture_output=True, text=True
    )
    assert done.returncode == 1 and f"here: has {seen['gpus']} GPUs that work, 999 were asked for" in done.stderr


def submit(*arguments: object, recipe: str = "train_sft", overrides: tuple[str, ...] = ("data.train_path=x",)):
    command = [sys.executable, "launch/submit.py", "--recipe", recipe, "--config", "sft_tiny", "--dry-run",
               "--gpus-per-node", "0", "--processes", "2", *map(str, arguments), "--", *overrides]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_dry_run_shows_what_would_be_submitted(tmp_path):
    value = f"""data.train_path='{tmp_path}/it\\'s "a" $HOME.jsonl'"""
    done = submit("--nodes", 4, "--run-dir", tmp_path / "my run", "--sbatch=--account=me", overrides=(value,))
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[-1] == value and words[-2] == "--" and "--account=me" in words and "--nodes=4" in words
    assert f"RUN_DIR={tmp_path}/my run" in words and "GPUS=2" in words and "CANARY_GPUS=0" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "overrides", "words"),
    [
        (["--nodes", "3", "--run-dir", "/tmp/r"], ["model.tensor_model_parallel_size=4"],
         "6 processes cannot be divided by model.tensor"),
        (["--run-dir", "/nosuch/shared/r"], [], "/nosuch does not exist; is the shared filesystem mounted here?"),
        (["--run-dir", "relative/r"], [], "--run-dir relative/r must be absolute"),
        (["--run-dir", "/etc/hostname/r"], [], "/etc/hostname is no folder to write to"),
        (["--run-dir", "/tmp/r", "--container", "/nosuch/image.sqsh"], [], "--container /nosuch/image.sqsh does not exist"),
        (["--run-dir", "/tmp/r"], ["model.hiden_size=64"], "unknown key model.hiden_size; did you mean model.hidden_size?"),
        (["--run-dir", "/tmp/r", "--nodes", "0"], [], "--nodes 0"),
        (["--run-dir", "/tmp/r", "--nodes", "3"], ["model.global_batch_size=8"], "do not divide by the data-parallel size 6"),
        (["--run-dir", "/tmp/r"], ["trainer.devices=4"], "trainer.devices=4: --gpus-per-node or --processes says it"),
        (["--run-dir", "/tmp/r"], ["exp_manager.explicit_log_dir=/tmp/o"], "--run-dir says it for the whole job"),
        (["--run-dir", "/tmp/r", "--mounts", "/a:/a"], [], "--mounts /a:/a is for a container"),
        (["--run-dir", ROOT], [], "holds files, but no run of ours"),
        (["--run-dir", "/tmp/r"], ["pretrained_checkpoint.restore_from_path=/nosuch"],
         "/nosuch is not a complete checkpoint of ours"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_submitted(arguments, overrides, words, refused):
    line = refused("--recipe", "train_sft", "--config", "sft_tiny", "--gpus-per-node", "0", "--processes", "2", *arguments,
                   "--", "data.train_path=x", *overrides)  # fmt: skip
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
    assert "train_stf does not exist; there are eval_bias, locate_bias, train_grpo" in line


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
    """By the planner, from the folder's config.json alone: 70 billion parameters on one node, and on eight."""
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    overrides = [
        "data.train_path=x", f"pretrained_checkpoint.restore_from_path={tmp_path}", "model=llama3_1_70b", "cluster=8x8",
        "trainer.grpo.initial_policy_kl_penalty=0",
    ]  # fmt: skip

    def asked(nodes: int):
        command = [sys.executable, "launch/submit.py", "--recipe", "train_grpo", "--config", "grpo", "--dry-run", "--nodes",
                   nodes, "--run-dir", "/tmp/r", "--", *overrides]  # fmt: skip
        return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)

    refused = asked(2)
    assert (
        refused.returncode == 2
        and "--config grpo does not fit: " in refused.stderr
        and "GiB per rank" in refused.stderr
    )
    taken = asked(8)
    assert taken.returncode == 0, taken.stderr
    assert "planned: fits: " in taken.stderr and "--gpus-per-node=8" in taken.stdout


def test_what_the_ranks_would_refuse_is_refused(tmp_path, refused, monkeypatch, capsys):
    """A checkpoint of another model than the YAML's, a reward that does not exist."""
    model = read_config("grpo", ["model=qwen3_8b"]).model
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(model)))
    asked = ["--recipe", "train_grpo", "--config", "grpo", "--nodes", "2", "--run-dir", "/tmp/r"]
    kept = ["--", "data.train_path=x", f"pretrained_checkpoint.restore_from_path={tmp_path}"]
    line = refused(*asked, *kept, "model=llama3_1_8b")
    assert f"but the checkpoint {tmp_path} was made with num_layers=36" in line
    assert "did you mean exact_answer?" in refused(*asked, *kept, "model=qwen3_8b", "trainer.grpo.reward=exact_anwser")
    assert "did you mean exact_answer?" in refused(*asked, "--reward-server", "exact_anwser", *kept, "model=qwen3_8b")
    monkeypatch.setattr(sys, "argv", ["submit.py", "--dry-run", *asked, *kept, "model=qwen3_8b"])
    assert launcher.main() == 0
    assert shlex.split(capsys.readouterr().out)[-1] == "cluster=2x8"
