"""Checkpoints in Megatron's distributed format (torch_dist): saved by any layout of ranks, loaded by any other.

A checkpoint folder holds `weights/`, `checkpoint.json` (what it is) and, where a run can go on from it, `optimizer/` and
`rng/`. Of a model with adapters it holds `adapters/` in place of the weights, which are those that the run began with. It is
written beside its place, flushed to the disk and renamed when whole: a kill at any moment leaves what was there before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.adapters import adapter_parameters, has_adapters, keep_adapters
from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.files import flush, give_name
from megatron_ext.runtime.checkpoint_files import (
    SUMS_FOLDER,
    WriterResults,
    check_files,
    gather_checksums,
    self_checksum,
    with_checksums,
)
from megatron_ext.runtime.collectives import broadcast_object, gather_objects, together
from megatron_ext.runtime.megatron_versions import finish_part, save_sharded
from megatron_ext.runtime.optimizer_state import (
    adam_step,
    load_optimizer_tensors,
    sharded_like_parameters,
    sharded_optimizer_state,
)
from megatron_ext.runtime.pieces import layers_of
from megatron_ext.runtime.rng import get_rng_state, set_rng_state

__all__ = [
    "INFO_FILE", "CheckpointSave", "has_optimizer", "holds_adapters", "load_adapters", "load_optimizer", "load_rng",
    "load_tensors", "load_trained", "load_weights", "read_adapters", "read_checkpoint_info", "remove_unfinished",
    "save_checkpoint", "weights_digest",
]  # fmt: skip

INFO_FILE = "checkpoint.json"
WEIGHTS_FOLDER, OPTIMIZER_FOLDER, RNG_FOLDER = "weights", "optimizer", "rng"
ADAPTERS_FOLDER = "adapters"  # also what the keys of their tensors begin with


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    info: dict[str, Any],
    optimizer=None,
    save_more: Callable[[Path], None] | None = None,
    extra: dict[str, dict] | None = None,
) -> None:
    """Save a model, and with the optimizer all that a run needs to go on; every rank calls it.

    Args:
        folder: must not exist: nothing is ever overwritten.
        info: JSON-serialisable description, e.g. the model's configuration and the trainer's state.
        optimizer: Megatron's; its state and that of every rank's random numbers are kept. None for weights alone.
        save_more: called on rank 0 with the unfinished folder, to write what belongs to the checkpoint.
        extra: sharded tensors of the caller's own, by the name of a folder; `load_tensors` reads one.

    Raises:
        AlreadyExistsError: the folder exists.
        UserError: the disk has no room for it, or cannot be written to; nothing that was there before has been touched.
    """
    CheckpointSave(folder, model, info, optimizer, save_more, extra, in_background=False).finish()


class CheckpointSave:
    """A checkpoint that is being written; every rank has one. Arguments and errors are those of `save_checkpoint`.

    Args:
        in_background: this rank's part is written by a process of its own, from the values that they have now. Call
            `is_finished` now and then, and `finish` before the next one is begun.
    """

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        info: dict[str, Any],
        optimizer=None,
        save_more: Callable[[Path], None] | None = None,
        extra: dict[str, dict] | None = None,
        in_background: bool = True,
    ):
        self.folder, self.in_background, self._save_more = folder, in_background, save_more
        device = next(model.parameters()).device
        with together():
            if folder.exists():
                raise AlreadyExistsError(
                    f"{folder} exists already; a checkpoint is never overwritten, choose another folder"
                )
        if has_adapters(model):
            parts = {ADAPTERS_FOLDER: _sharded_adapters(model, adapter_parameters(model))}
        else:
            parts = {WEIGHTS_FOLDER: model.sharded_state_dict()}
        parts |= extra or {}
        if optimizer is not None:
            info = info | {"adam_step": adam_step(optimizer)}
            parts[OPTIMIZER_FOLDER] = sharded_optimizer_state(model, optimizer)
        self._info = json.dumps(info)  # as it is now
        _check_space(folder, parts, device)
        # Never the name of an earlier attempt, whose writers may be alive though its ranks were killed.
        self._unfinished = folder.with_name(broadcast_object(f"{folder.name}.unfinished-{uuid.uuid4().hex[:8]}"))
        with together():
            if dist.get_rank() == 0:
                remove_unfinished(folder.parent, folder.name)
                for name in (*parts, RNG_FOLDER, SUMS_FOLDER):
                    (self._unfinished / name).mkdir(parents=True)
        if optimizer is not None:
            save_file(get_rng_state(), str(_rng_file(self._unfinished)))
            flush(_rng_file(self._unfinished))
        self._background, self._parts = AsyncCallsQueue(), []
        with self._explained():
            for name, state in parts.items():
                if any(gather_objects(bool(state))):  # an optimizer's state is empty where nothing trains
                    self._write(state, self._unfinished / name, in_background)
                    self._parts.append(name)
        self._named = False

    def _write(self, state: dict, place: Path, in_background: bool) -> None:
        with WriterResults() as results:
            request = save_sharded(state, place)
        if request.async_fn is None:  # this rank has nothing to write
            results.discard()
        else:
            request = request._replace(async_fn=functools.partial(with_checksums, request.async_fn))
        if in_background:
            self._background.schedule_async_request(request)
        else:
            request.execute_sync()

    def is_finished(self) -> bool:
        """Whether the checkpoint is whole and has its name; every rank calls it and gets the same answer."""
        with self._explained():
            self._background.maybe_finalize_async_calls()
        if self._background.get_num_unfinalized_calls():
            return False
        self._give_name()
        return True

    def finish(self) -> None:
        """Wait until it is; every rank calls it."""
        with self._explained():
            self._background.maybe_finalize_async_calls(blocking=True)
        self._give_name()

    def _give_name(self) -> None:
        if self._named:
            return
        self._named = True
        dist.barrier()
        with together(), self._explained():
            if dist.get_rank() == 0:
                for part in self._parts:
                    finish_part(self._unfinished / part)
                if self._save_more is not None:
                    self._save_more(self._unfinished)
                info = json.loads(self._info) | {"files": gather_checksums(self._unfinished)}
                info["checksum"] = self_checksum(info)
                (self._unfinished / INFO_FILE).write_text(json.dumps(info, indent=1), encoding="utf-8")
                give_name(self._unfinished, self.folder)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What cannot be written, in one line."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            # A rank whose own part was written knows only that another's was not.
            failures = getattr(error, "failures", {})
            first = next(iter(failures.values()))[0] if failures else error
            free = shutil.disk_usage(self.folder.parent).free
            raise UserError(
                f"the checkpoint {self.folder} could not be written ({' '.join(str(first).split())[:200]}; "
                f"{free / 2**30:.2f} GiB are free there); the earlier ones are untouched"
            ) from error


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed runs have left of checkpoints in a folder. Rank 0 alone, while nothing is being saved there."""
    for path in folder.glob(f"{name}.unfinished*"):
        shutil.rmtree(path, ignore_errors=True)


def _check_space(folder: Path, parts: dict[str, dict], device: torch.device) -> None:
    """Whether the disk can hold it, before a byte is written; a little more for metadata."""
    mine = sum(_num_bytes(state) for state in parts.values())
    total = torch.tensor([mine], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    needed = int(total.item() * 1.02) + (1 << 20)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    with together():
        if free < needed:
            raise UserError(
                f"no room for the checkpoint {folder}: it needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
                "free some, or name another disk in exp_manager.explicit_log_dir"
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


def read_checkpoint_info(folder: Path) -> dict[str, Any]:
    """The `info` of `save_checkpoint`, with `files`: [bytes, XXH3] of each file.

    Raises:
        UserError: no checkpoint of ours there, or a damaged one.
    """
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not a complete checkpoint ({INFO_FILE} is missing); check pretrained_checkpoint.restore_from_path"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or take another checkpoint") from error
    saved = info.pop("checksum", None) if isinstance(info, dict) else None
    there = any((path.parent / part).is_dir() for part in (WEIGHTS_FOLDER, ADAPTERS_FOLDER))
    if saved is None or saved != self_checksum(info) or not there:
        raise UserError(
            f"{folder} is damaged: {INFO_FILE} or {WEIGHTS_FOLDER}/ is not what was saved; take another checkpoint"
        )
    return info


def holds_adapters(folder: Path) -> bool:
    """Whether a checkpoint holds adapters, and not the weights that they stand on."""
    return (Path(folder) / ADAPTERS_FOLDER).is_dir()


def load_trained(folder: Path, model: torch.nn.Module) -> None:
    """Load what a run's checkpoint holds of its model: adapters where it has them, else weights; every rank calls it."""
    (load_adapters if has_adapters(model) else load_weights)(folder, model)


def load_adapters(folder: Path, model: torch.nn.Module) -> None:
    """Load adapters saved under any layout into this rank's stage; every rank calls it. Layers that the checkpoint has none for
    lose theirs.

    Raises:
        UserError: the checkpoint has none, damaged files, or others than the model.
    """
    if not holds_adapters(folder):
        raise UserError(
            f"{folder} holds a whole model and no adapters: name it in pretrained_checkpoint.restore_from_path"
        )
    _check_part(folder, ADAPTERS_FOLDER)
    path = str(Path(folder) / ADAPTERS_FOLDER)
    # Newer versions of Megatron-Core have entries of their own beside ours (megatron_versions.py).
    there = {key: value for key, value in load_sharded_metadata(path).items() if key.startswith(f"{ADAPTERS_FOLDER}.")}
    numbers = {int(key.removeprefix(f"{ADAPTERS_FOLDER}.decoder.layers.").split(".")[0]) for key in there}
    keep_adapters(model, [layer for layer in layers_of(model) if layer.layer_number - 1 in numbers])
    adapters = adapter_parameters(model)
    state = _sharded_adapters(model, {name: torch.empty_like(p) for name, p in adapters.items()})
    mine = {value.key: value.global_shape for value in nested_values(state)}
    known = {key for keys in gather_objects(set(mine)) for key in keys}
    wrong = [key for key, shape in mine.items() if key not in there or there[key].global_shape != shape]
    with together():
        if wrong := sorted({*wrong, *(there.keys() - known)}):
            raise UserError(
                f"the adapters of {folder} are others than the model's: {wrong[0].removeprefix(f'{ADAPTERS_FOLDER}.')} (of "
                f"{len(wrong)}); set model.peft.dim and target_modules as they were"
            )
    with torch.no_grad():
        for name, value in dist_checkpointing.load(state, path).items():
            adapters[name].copy_(value)


def read_adapters(folder: Path) -> dict[str, torch.Tensor]:
    """Whole adapters of a checkpoint by their parameters' names in the whole model, on the host; a group of ranks, if only one,
    has been started.

    Raises:
        UserError: the checkpoint has none, or damaged files.
    """
    if not holds_adapters(folder):
        raise UserError(f"{folder} holds a whole model and no adapters; name a checkpoint of a run with model.peft")
    _check_part(folder, ADAPTERS_FOLDER)
    found = dist_checkpointing.load_plain_tensors(str(Path(folder) / ADAPTERS_FOLDER))
    return {key.removeprefix(f"{ADAPTERS_FOLDER}."): value for key, value in found.items()}


def _sharded_adapters(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> dict[str, Any]:
    return sharded_like_parameters(model, {name: v.detach() for name, v in values.items()}, ADAPTERS_FOLDER)


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Load weights saved under any layout into this rank's stage; every rank calls it. Adapters stay as they are.

    Raises:
        UserError: no checkpoint of ours, one with damaged files, or one of another model.
    """
    if holds_adapters(folder):
        raise UserError(
            f"{folder} holds adapters alone: name it in model.peft.restore_from_path, and the model that they stand on in "
            "pretrained_checkpoint.restore_from_path"
        )
    _check_part(folder, WEIGHTS_FOLDER)
    path, adapters = str(Path(folder) / WEIGHTS_FOLDER), adapter_parameters(model)
    sharded = {name: value for name, value in model.sharded_state_dict().items() if name not in adapters}
    state = dist_checkpointing.load(_without_missing_objects(sharded, path), path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]  # Megatron's, always empty
    wrong = [name for name in wrong if name not in adapters]
    if wrong:
        raise UserError(f"{folder} does not fit this model: {', '.join(wrong[:3])} (of {len(wrong)}) do not match")


def _without_missing_objects(state: dict[str, Any], path: str) -> dict[str, Any]:
    """Transformer Engine's norms keep something beside their weights, nothing without FP8, and the local ones keep none."""
    there = load_sharded_metadata(path)
    return {k: v for k, v in state.items() if not isinstance(v, ShardedObject) or v.unique_key in there}


def weights_digest(folder: Path) -> str:
    """XXH3 of the checksums of the files of the weights, or of the adapters."""
    sums = read_checkpoint_info(folder)["files"]
    parts = tuple(f"{part}/" for part in (WEIGHTS_FOLDER, ADAPTERS_FOLDER))
    return self_checksum({name: value for name, value in sums.items() if name.startswith(parts)})


def _check_part(folder: Path, part: str) -> dict[str, Any]:
    """The checkpoint's `info`, once the files of a part have been found as they were saved."""
    info = read_checkpoint_info(folder)
    check_files(Path(folder), part, info["files"])
    return info


def has_optimizer(folder: Path) -> bool:
    """Whether a run can go on from this checkpoint."""
    return (Path(folder) / OPTIMIZER_FOLDER).is_dir()


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer) -> None:
    """Load the optimizer's state saved under any layout, with or without the distributed optimizer; every rank calls it.

    Raises:
        UserError: the checkpoint has weights alone or damaged files, or another set of parameters trained.
    """
    if not has_optimizer(folder):
        raise UserError(f"{folder} holds weights alone: a run cannot go on from it, only start from its weights")
    info = _check_part(folder, OPTIMIZER_FOLDER)
    state = sharded_optimizer_state(model, optimizer, empty=True)
    try:
        loaded = dist_checkpointing.load(state, str(Path(folder) / OPTIMIZER_FOLDER))
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(
            f"{folder}/{OPTIMIZER_FOLDER} does not fit this run: {' '.join(str(error).split())[:200]}"
        ) from error
    load_optimizer_tensors(model, optimizer, loaded, info["adam_step"])


def load_tensors(folder: Path, name: str, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that were saved as `extra`, for the sharded tensors in `state`; every rank calls it.

    Raises:
        UserError: the checkpoint is damaged, or was saved without them.
    """
    info = _check_part(folder, name)
    if not any(file.startswith(f"{name}/") for file in info["files"]):
        raise UserError(f"{folder} has no {name}/: it was saved by another recipe")
    return dist_checkpointing.load(state, str(Path(folder) / name))


def load_rng(folder: Path) -> bool:
    """Put this rank's random numbers where they were, if as many ranks saved them; whether that was done.

    Raises:
        UserError: damaged files.
    """
    saved = [name for name in read_checkpoint_info(folder)["files"] if name.startswith(f"{RNG_FOLDER}/")]
    if len(saved) != dist.get_world_size():
        return False
    _check_part(folder, RNG_FOLDER)
    set_rng_state(load_file(str(_rng_file(Path(folder)))))
    return True


def _rng_file(folder: Path) -> Path:
    return folder / RNG_FOLDER / f"rank-{dist.get_rank():05d}.safetensors"
