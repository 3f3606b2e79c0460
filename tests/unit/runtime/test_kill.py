"""A save that is killed at any moment leaves the last complete checkpoint, and the next run goes on from it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import read_checkpoint_info, remove_unfinished, save_checkpoint
from recipes.run.run_folder import Checkpoints
from recipes.run.settings import CheckpointCallbackSection
from tests.gpt_cases import small_config
from tests.harness import ROOT

KILLS = 20
# Imports once, then forks one child after the other; a child trains nothing, counts, and saves after every count,
# every other time in the background.
CHILDREN = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from megatron_ext.runtime.cpu import adapt_megatron_to_cpu
adapt_megatron_to_cpu()
from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import CheckpointSave, load_optimizer, load_rng, load_weights, read_checkpoint_info
from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed
from megatron_ext.runtime.engine import Engine, OptimConfig
from recipes.run.run_folder import Checkpoints
from recipes.run.settings import CheckpointCallbackSection
from tests.gpt_cases import small_config

def say(*words):
    # One write: print under PYTHONUNBUFFERED is one per word, and the kill may come between them.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def child(folder):
    os.setsid()
    device = initialize(ParallelSizes())
    set_seed(1)
    engine = Engine(build_gpt(small_config(hidden_size=64, ffn_hidden_size=256), device), OptimConfig())
    checkpoints = Checkpoints(folder, CheckpointCallbackSection(save_top_k=2))
    newest, count = checkpoints.newest(), 0
    if newest is not None:
        count = read_checkpoint_info(newest)["trainer"]["step"]
        load_weights(newest, engine.module)
        load_optimizer(newest, engine.module, engine.optimizer)
        assert load_rng(newest)
        values = {float(p.detach().flatten()[0]) for p in engine.module.parameters()}
        assert values == {float(count)}, (values, count)
    say("ready", count)
    while True:
        count += 1
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.fill_(count)
        info = {"trainer": {"step": count, "metrics": {}}}
        save = CheckpointSave(checkpoints.path(count), engine.module, info, engine.optimizer, in_background=count % 2 == 0)
        if save.in_background:
            with torch.no_grad():
                for parameter in engine.module.parameters():
                    parameter.fill_(-1)  # training goes on
        save.finish()
        checkpoints.arrange(count, ended=False)
        say("saved", count)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            child(Path(line.strip()))
        finally:
            os._exit(1)
    say("pid", pid)
    os.waitpid(pid, 0)
    say("gone")
"""


@pytest.fixture
def parent():
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILDREN],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


def words(parent) -> list[str]:
    line = parent.stdout.readline()
    assert line, parent.stderr.read()[-3000:]
    return line.split()


def test_a_kill_at_any_moment(parent, tmp_path: Path):
    rng, newest, unfinished, took = random.Random(), 0, 0, None
    checkpoints = Checkpoints(tmp_path, CheckpointCallbackSection())
    for _ in range(KILLS):
        parent.stdin.write(f"{tmp_path}\n")
        parent.stdin.flush()
        pid = int(words(parent)[1])
        assert words(parent) == ["ready", str(newest)], "what was complete has been lost"
        began = time.monotonic()
        if took is None:  # the first is left alone until it has saved once
            assert words(parent) == ["saved", "1"]
            took, newest = time.monotonic() - began, 1
        time.sleep(rng.random() * took)
        os.killpg(pid, signal.SIGKILL)
        while (said := words(parent)) != ["gone"]:
            newest = int(said[1])
        complete = checkpoints.complete()
        assert max(complete) in (newest, newest + 1), "a kill between the rename and the word of it is the only excuse"
        newest = max(complete)
        assert all(info["trainer"]["step"] == step for step, info in complete.items())
        assert json.loads((tmp_path / "checkpoints/latest/checkpoint.json").read_text())["trainer"]["step"] in complete
        assert read_checkpoint_info(checkpoints.newest()) == complete[newest]
        unfinished += any((tmp_path / "checkpoints").glob("*.unfinished*"))
    assert unfinished > KILLS / 4, "no kill came in the midst of a save: nothing was tested"


def test_a_kill_while_an_old_checkpoint_is_removed(world, tmp_path: Path, monkeypatch):
    """What is left of it is not taken for a checkpoint."""
    checkpoints = Checkpoints(tmp_path, CheckpointCallbackSection(save_top_k=1))
    model = build_gpt(small_config(), world)
    for step in (1, 2):
        save_checkpoint(checkpoints.path(step), model, {"trainer": {"step": step, "metrics": {}}})

    def killed(folder: Path) -> None:
        (folder / "checkpoint.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.run.run_folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.arrange(2, ended=False)
    monkeypatch.undo()
    assert list(checkpoints.complete()) == [2]
    remove_unfinished(checkpoints.folder)
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-2", "latest"}
