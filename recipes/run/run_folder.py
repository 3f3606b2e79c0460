"""A run's folder: whether it may be written to, and whether the run in it is the one that would go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import UserError
from megatron_ext.files import unfinished, write_whole
from megatron_ext.kinds import FREE, Kind, kind_of, kinds
from megatron_ext.runtime.checkpoint import read_checkpoint_info
from recipes.cli.config import build
from recipes.data.settings import RUN_TOKENS
from recipes.run.checkpoints import RUN_FILE, Checkpoints, read_run_file
from recipes.run.lock import LOCK_FOLDER, FolderLock, refuse_if_held
from recipes.run.pretrained import sections_of
from recipes.run.settings import CheckpointCallbackSection

__all__ = ["check_run_folder", "check_unchanged", "claim_run_folder", "cut_metrics", "held_run_folder"]

METRICS_FILE = "metrics.jsonl"


def check_run_folder(path: str, cls: type | None = None, resolved: Mapping[str, Any] | None = None) -> Path:
    """
    Args:
        cls: the class of the recipe's configuration.
        resolved: the configuration of a run that may go on in this folder, as plain data; None: it must be new or empty.

    Raises:
        UserError: the folder holds another run, or cannot be made.
    """
    folder = Path(path)
    if folder.exists() and not _is_new(folder):
        if resolved is None or not folder.is_dir():
            refuse_if_held(folder)  # the better reason
            hint = ", or go on with the same run by exp_manager.resume_if_exists=true" if folder.is_dir() else ""
            raise UserError(
                f"exp_manager.explicit_log_dir={folder} holds another run or other files; nothing is overwritten, "
                f"choose a new folder{hint}"
            )
        _check_same_run(folder, cls, resolved)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists() or parent.is_symlink())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"exp_manager.explicit_log_dir={folder} cannot be made: {existing} is no folder to write to")
    return folder


@contextlib.contextmanager
def held_run_folder(
    path: str, cls: type | None = None, resolved: Mapping[str, Any] | None = None
) -> Iterator[FolderLock]:
    """Have the folder for this run alone. Arguments are those of `check_run_folder`.

    Raises:
        UserError: another run holds it, or has been in it since it was checked.
    """
    with FolderLock.take(Path(path)) as lock:
        check_run_folder(path, cls, resolved)
        yield lock


def _is_new(folder: Path) -> bool:
    """Whether there is nothing in it, or no more than what a run leaves that was killed before it had claimed the folder: tokens
    of its rows, too."""
    begun = folder / RUN_FILE.parent

    def is_left(path: Path) -> bool:
        if path == begun and path.is_dir():
            return all(inner == unfinished(folder / RUN_FILE) for inner in path.absolute().iterdir())
        return path.name in (LOCK_FOLDER, RUN_TOKENS)

    # The first other file decides: a whole home is not walked through.
    return folder.is_dir() and all(map(is_left, folder.iterdir()))


def claim_run_folder(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Make the folder, or find it, and write first of all whose it is: after a kill at any moment the run can go on in it."""
    (folder / RUN_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN_FILE, yaml.safe_dump(dict(resolved), sort_keys=False))


def _check_same_run(folder: Path, cls: type, resolved: Mapping[str, Any]) -> None:
    before = read_run_file(folder)
    if before is None:
        raise UserError(
            f"exp_manager.explicit_log_dir={folder} holds files, but no run of ours ({RUN_FILE} is missing or damaged): "
            "choose a new folder"
        )
    try:
        was = dataclasses.asdict(build(cls, before | {"exp_manager": resolved["exp_manager"]}))
    except UserError as error:
        raise UserError(
            f"exp_manager.explicit_log_dir={folder} holds a run that cannot be gone on with: {error}; choose a new folder"
        ) from error
    now = dataclasses.asdict(build(cls, resolved))
    _fill_sections(was, now, before)
    newest = Checkpoints(folder, CheckpointCallbackSection()).newest()
    contents = {} if newest is None else read_checkpoint_info(newest).get("contents", {})
    check_unchanged(cls, was, now, folder, {key for key, digests in contents.items() if "code" not in digests})


def check_unchanged(
    cls: type, was: Mapping[str, Any], now: Mapping[str, Any], folder: Path, read: Set[str] = frozenset()
) -> None:
    """
    Args:
        cls: the class of a recipe's configuration, whose keys say their kind.
        was, now: all keys of the run in the folder, and of the one that would go on in it.
        read: keys of files whose content is compared when it has been read: what they are called does not matter.

    Raises:
        UserError: something differs that is not where, how fast or how long it runs.
    """
    known, old, new = kinds(cls), dict(_flat(was)), dict(_flat(now))
    schedule = now["model"]["optim"]["sched"]
    any_length = schedule["name"] == "constant" or schedule["decay_steps"] is not None
    for key in sorted((old.keys() | new.keys()) - read):
        if old.get(key) == new.get(key) or (kind := kind_of(known, key)) in FREE:
            continue
        differs = f"holds a run with {key}={old.get(key)}, this one has {key}={new.get(key)}"
        if kind != Kind.DURATION:
            raise UserError(
                f"exp_manager.explicit_log_dir={folder} {differs}: it would not be the same run; set it as it was, or choose "
                "a new folder"
            )
        if not any_length:
            raise UserError(
                f"exp_manager.explicit_log_dir={folder} {differs}: the learning rate falls until the last step, so it would "
                "not be the same run; say in model.optim.sched.decay_steps, before the run begins, how long it falls"
            )


def _fill_sections(was: dict[str, Any], now: dict[str, Any], before: Mapping[str, Any]) -> None:
    """A run of before there were sections has those that its checkpoints are read with."""
    position = was["model"].get("position_embedding")  # NIAH's model brings its own
    if position is None or "sections" in (before["model"].get("position_embedding") or {}):
        return
    if now["model"]["position_embedding"]["sections"] is not None:
        del position["sections"]
        position["sections"] = sections_of(was["model"])


def _flat(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from _flat(value, key)
        else:
            yield key, value


def _kept(folder: Path, name: str) -> Path:
    """The file, or where NeMo's exp_manager put it: it moves the files of a folder that it finds into run_0, run_1, ..."""
    moved = sorted(folder.glob(f"run_*/{name}"), key=lambda path: int(path.parent.name.removeprefix("run_")))
    return folder / name if (folder / name).is_file() or not moved else moved[-1]


def cut_metrics(folder: Path, last: int) -> None:
    """Leave a metrics.jsonl without the steps after `last`, which are taken again. Call it after exp_manager."""
    path = folder / METRICS_FILE
    if not (source := _kept(folder, METRICS_FILE)).is_file():
        return
    kept = []
    for line in source.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if row["step"] <= last:
            kept.append(line)
    write_whole(path, "".join(kept))
