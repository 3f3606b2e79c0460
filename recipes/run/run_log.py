"""The run folder as NeMo's exp_manager makes it, and the log of numbers in it. Rank 0 alone: every other rank would wait for it
and write nothing."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from megatron_ext.files import write_json, write_whole
from megatron_ext.runtime.checkpoint import remove_unfinished
from megatron_ext.runtime.machine import machine, versions
from megatron_ext.runtime.metrics import MetricsLog
from recipes.run.inputs import Inputs
from recipes.run.log_process import LogProcess
from recipes.run.run_folder import claim_run_folder, cut_metrics
from recipes.run.settings import ExpManagerSection

PACKAGES = ("megatron-ext", "megatron-core", "torch", "nemo-toolkit", "transformers", "tokenizers")

__all__ = ["mlflow_arguments", "open_run_log"]


def open_run_log(inputs: Inputs, loggers: LogProcess, last: int) -> MetricsLog:
    """Fill the run's folder, which this process holds, and keep the resolved configuration in it. Call it when all inputs are
    known to be good.

    Args:
        last: the step after which the run goes on; -1: it begins, where step 0 is the validation before the first.
    """
    manager, folder = inputs.config.exp_manager, inputs.log_dir
    claim_run_folder(folder, inputs.resolved)
    keys = {
        "explicit_log_dir": manager.explicit_log_dir,
        "create_tensorboard_logger": manager.create_tensorboard_logger,
        "create_wandb_logger": manager.create_wandb_logger,
        "wandb_logger_kwargs": manager.wandb_logger_kwargs,
        # Saving and going on is ours: Lightning's knows nothing of Megatron's ranks.
        "create_checkpoint_callback": False,
        "seconds_to_sleep": 0,
    }
    loggers.open(keys, mlflow_arguments(manager, folder) if manager.create_mlflow_logger else None)
    remove_unfinished(inputs.checkpoints.folder)
    cut_metrics(folder, last)
    write_whole(folder / "config.yaml", yaml.safe_dump(inputs.resolved, sort_keys=False))
    write_json(folder / "environment.json", _environment())
    return MetricsLog(folder, [loggers])


def _environment() -> dict[str, Any]:
    """Of the start that writes it; a run that goes on may be on another machine."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": started, "ranks": dist.get_world_size(), "machine": machine(), "versions": versions(PACKAGES)}


def mlflow_arguments(manager: ExpManagerSection, folder: Path) -> dict[str, Any]:
    """Of Lightning's MLFlowLogger: what the configuration says, and without a place in it all is kept in the run's folder. MLflow
    itself would put files, such as tables, into the folder that the process was started in."""
    if "tracking_uri" in manager.mlflow_logger_kwargs:
        return manager.mlflow_logger_kwargs
    home = folder.absolute()
    place = {"tracking_uri": f"sqlite:///{home / 'mlflow.db'}", "artifact_location": (home / "mlflow").as_uri()}
    return place | manager.mlflow_logger_kwargs
