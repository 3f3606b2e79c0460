"""Model weights in Megatron's distributed format (torch_dist): saved by any layout of ranks, loaded by any other.

A checkpoint folder holds `weights/` (the sharded tensors) and `checkpoint.json` (what it is), written last: a folder
without it is not whole and is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

__all__ = ["load_weights", "read_checkpoint_info", "save_weights"]

INFO_FILE, WEIGHTS_FOLDER = "checkpoint.json", "weights"


def save_weights(
    folder: Path, model: torch.nn.Module, info: dict[str, Any], save_more: Callable[[Path], None] | None = None
) -> None:
    """Save this run's weights; every rank calls it.

    Args:
        folder: must not exist: nothing is ever overwritten.
        info: JSON-serialisable description, e.g. the model's configuration.
        save_more: called on rank 0 with the unfinished folder, to write what belongs to the checkpoint.

    Raises:
        FileExistsError: the folder exists.
    """
    exists = torch.tensor([folder.exists()], dtype=torch.int32, device=next(model.parameters()).device)
    dist.all_reduce(exists, op=dist.ReduceOp.MAX)
    if exists.item():
        raise FileExistsError(f"{folder} exists already; a checkpoint is never overwritten, choose another folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    weights = unfinished / WEIGHTS_FOLDER
    if dist.get_rank() == 0:
        weights.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    try:
        dist_checkpointing.save(model.sharded_state_dict(), str(weights))
    finally:
        _end_manager_process()
    dist.barrier()
    if dist.get_rank() == 0:
        if save_more is not None:
            save_more(unfinished)
        (unfinished / INFO_FILE).write_text(json.dumps(info, indent=2), encoding="utf-8")
        os.replace(unfinished, folder)
    dist.barrier()


def _end_manager_process() -> None:
    """End the manager process that Megatron starts for a save and keeps until the interpreter exits.

    A rank that ends by a signal or os._exit would leave it behind, 200 MB each.
    """
    queue, filesystem_async._results_queue = filesystem_async._results_queue, None
    if queue is not None:
        queue._manager.shutdown()


def read_checkpoint_info(folder: Path) -> dict[str, Any]:
    """The `info` of `save_weights`.

    Raises:
        ValueError: no checkpoint of ours there, or a damaged one.
    """
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a complete checkpoint ({INFO_FILE} is missing); check pretrained_checkpoint.restore_from_path"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or take another checkpoint") from error
    if not isinstance(info, dict) or not (path.parent / WEIGHTS_FOLDER).is_dir():
        raise ValueError(
            f"{folder} is damaged: {INFO_FILE} or {WEIGHTS_FOLDER}/ is not what was saved; take another checkpoint"
        )
    return info


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Load weights saved under any layout into this rank's stage; every rank calls it."""
    read_checkpoint_info(folder)
    state = dist_checkpointing.load(model.sharded_state_dict(), str(Path(folder) / WEIGHTS_FOLDER))
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]  # Megatron's, always empty
    if wrong:
        raise ValueError(f"{folder} does not fit this model: {', '.join(wrong[:3])} (of {len(wrong)}) do not match")
