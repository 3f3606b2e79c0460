"""A run that trains nothing, counts, and saves after every count, every other time in the background: to be killed."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import CheckpointSave, load_optimizer, load_rng, load_weights, read_checkpoint_info
from megatron_ext.runtime.cpu import adapt_megatron_to_cpu
from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optim import OptimConfig
from recipes.run.checkpoints import Checkpoints
from recipes.run.settings import CheckpointCallbackSection
from tests.gpt_cases import small_config
from tests.programs.forking import fork_for_each_line, say


def child(folder: str) -> None:
    device = initialize(ParallelSizes())
    set_seed(1)
    engine = Engine(build_gpt(small_config(hidden_size=64, ffn_hidden_size=256), device), OptimConfig())
    checkpoints = Checkpoints(Path(folder), CheckpointCallbackSection(save_top_k=2))
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
        _fill(engine.module, count)
        info = {"trainer": {"step": count, "metrics": {}}}
        save = CheckpointSave(
            checkpoints.path(count), engine.module, info, engine.optimizer, in_background=count % 2 == 0
        )
        if save.in_background:
            _fill(engine.module, -1)  # training goes on
        save.finish()
        checkpoints.arrange(count, ended=False)
        say("saved", count)


@torch.no_grad()
def _fill(model: torch.nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    adapt_megatron_to_cpu()
    fork_for_each_line(child)
