"""Checkpoints in Megatron's distributed format (torch_dist): saved by any layout of ranks, loaded by any other.

A checkpoint folder holds `weights/`, `checkpoint.json` (what it is) and, where a run can go on from it, `optimizer/` and
`rng/`. It is written beside its place, flushed to the disk and renamed when whole: a kill at any moment leaves what was
there before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file, save_file

from megatron_ext.runtime.optimizer_state import adam_step, load_optimizer_tensors, sharded_optimizer_state
from megatron_ext.runtime.rng import get_rng_state, set_rng_state

__all__ = ["has_optimizer", "load_optimizer", "load_rng", "load_weights", "read_checkpoint_info", "save_checkpoint"]

INFO_FILE, WEIGHTS_FOLDER, OPTIMIZER_FOLDER, RNG_FOLDER = "checkpoint.json", "weights", "optimizer", "rng"


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    info: dict[str, Any],
    optimizer=None,
    save_more: Callable[[Path], None] | None = None,
) -> None:
    """Save a model, and with the optimizer all that a run needs to go on; every rank calls it.

    Args:
        folder: must not exist: nothing is ever overwritten.
        info: JSON-serialisable description, e.g. the model's configuration and the trainer's state.
        optimizer: Megatron's; its state and that of every rank's random numbers are kept. None for weights alone.
        save_more: called on rank 0 with the unfinished folder, to write what belongs to the checkpoint.

    Raises:
        FileExistsError: the folder exists.
        OSError: the disk has no room for it; nothing has been written.
    """
    device = next(model.parameters()).device
    if _any_rank(folder.exists(), device):
        raise FileExistsError(f"{folder} exists already; a checkpoint is never overwritten, choose another folder")
    parts = {WEIGHTS_FOLDER: model.sharded_state_dict()}
    if optimizer is not None:
        info = info | {"adam_step": adam_step(optimizer)}
        parts[OPTIMIZER_FOLDER] = sharded_optimizer_state(model, optimizer)
    _check_space(folder, parts, device)
    unfinished = folder.with_name(folder.name + ".unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        for name in (*parts, RNG_FOLDER):
            (unfinished / name).mkdir(parents=True)
    dist.barrier()
    try:
        for name, state in parts.items():
            if _any_rank(bool(state), device):  # an optimizer's state is empty where nothing trains
                dist_checkpointing.save(state, str(unfinished / name))
    finally:
        _end_manager_process()
    if optimizer is not None:
        save_file(get_rng_state(), str(_rng_file(unfinished)))
        _flush_one(_rng_file(unfinished))
    dist.barrier()
    if dist.get_rank() == 0:
        if save_more is not None:
            save_more(unfinished)
        (unfinished / INFO_FILE).write_text(json.dumps(info, indent=2), encoding="utf-8")
        _flush(unfinished)
        os.replace(unfinished, folder)
        _flush_one(folder.parent)
    dist.barrier()


def _any_rank(here: bool, device: torch.device) -> bool:
    flag = torch.tensor([here], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _check_space(folder: Path, parts: dict[str, dict], device: torch.device) -> None:
    """Whether the disk can hold it, before a byte is written; a little more for metadata."""
    mine = sum(_num_bytes(state) for state in parts.values())
    total = torch.tensor([mine], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    needed = int(total.item() * 1.02) + (1 << 20)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if _any_rank(free < needed, device):
        raise OSError(
            f"no room for the checkpoint {folder}: it needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; free "
            "some, or name another disk in exp_manager.explicit_log_dir"
        )


def _num_bytes(state: dict) -> int:
    """Bytes of tensors that this rank writes; replicas are written once."""
    found = 0
    for value in nested_values(state):
        data = getattr(value, "data", None)
        first = value.replica_id in (0, (0, 0, 0)) if isinstance(value, ShardedBase) else True
        if isinstance(data, torch.Tensor) and first:
            found += data.numel() * data.element_size()
    return found


def _flush(folder: Path) -> None:
    """Everything in a folder to the disk, so that the rename that follows cannot outlive it."""
    for path in folder.rglob("*"):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def has_optimizer(folder: Path) -> bool:
    """Whether a run can go on from this checkpoint."""
    return (Path(folder) / OPTIMIZER_FOLDER).is_dir()


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer) -> None:
    """Load the optimizer's state saved under any layout, with or without the distributed optimizer; every rank calls it.

    Raises:
        ValueError: the checkpoint has weights alone, or another set of parameters trained.
    """
    info = read_checkpoint_info(folder)
    if not has_optimizer(folder):
        raise ValueError(f"{folder} holds weights alone: a run cannot go on from it, only start from its weights")
    state = sharded_optimizer_state(model, optimizer, empty=True)
    try:
        loaded = dist_checkpointing.load(state, str(Path(folder) / OPTIMIZER_FOLDER))
    except dist_checkpointing.core.CheckpointingException as error:
        raise ValueError(
            f"{folder}/{OPTIMIZER_FOLDER} does not fit this run: {' '.join(str(error).split())[:200]}"
        ) from error
    load_optimizer_tensors(model, optimizer, loaded, info["adam_step"])


def load_rng(folder: Path) -> bool:
    """Put this rank's random numbers where they were, if as many ranks saved them; whether that was done."""
    files = sorted((Path(folder) / RNG_FOLDER).glob("*.safetensors"))
    if len(files) != dist.get_world_size():
        return False
    set_rng_state(load_file(str(_rng_file(Path(folder)))))
    return True


def _rng_file(folder: Path) -> Path:
    return folder / RNG_FOLDER / f"rank-{dist.get_rank():05d}.safetensors"
