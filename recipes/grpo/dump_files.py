"""Files of rollouts: `rollouts/step-000012.jsonl.zst` of a run, JSON lines in zstd, a header and then one line for each prompt.

docs/rollouts.md has the format. Reading it needs no torch; zstd is pyarrow's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError, of_system
from megatron_ext.files import unfinished, whole
from recipes.data.errors import DataError
from recipes.data.jsonl import numbered_rows

__all__ = [
    "FOLDER",
    "FORMAT",
    "VERSION",
    "StepDump",
    "forget_steps",
    "keep_within",
    "read_step",
    "step_file",
    "step_files",
    "write_step",
]

FOLDER = "rollouts"
FORMAT = "megatron-ext rollouts"
VERSION = 1
NAME = re.compile(r"step-(\d{6,})\.jsonl\.zst")


@dataclass(frozen=True)
class StepDump:
    """
    Attributes:
        header: what stands in the first line.
        groups: (line, what stands in it) for each prompt, by its number in the step.
    """

    path: Path
    header: dict[str, Any]
    groups: list[tuple[int, dict[str, Any]]]

    @property
    def full(self) -> bool:
        """Whether all prompts of the step are in it."""
        return self.header["written"] == self.header["prompts"]


def step_files(folder: Path) -> dict[int, Path]:
    """The files of a folder by their step, in order."""
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.jsonl.zst"


def write_step(folder: Path, header: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all; in place of the file of that step, if there is one.

    Args:
        header: what the file says of itself, `step` among it; format and version are added.

    Raises:
        UserError: it cannot be written, as where the disk is full. What is there stays as it is.
    """
    import pyarrow

    path = step_file(folder, header["step"])
    try:
        folder.mkdir(exist_ok=True)
        with whole(path) as beside, pyarrow.output_stream(str(beside), compression="zstd") as file:
            for row in ({"format": FORMAT, "version": VERSION, **header}, *groups):
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n")
    except OSError as error:
        raise UserError(
            f"the rollouts of step {header['step']} cannot be written to {path} ({of_system(error)}): make room, or set "
            "trainer.grpo.rollout_dump otherwise (max_bytes, prompts, every_n_steps, or null); "
            "exp_manager.resume_if_exists=true goes on after the last checkpoint"
        ) from error


def read_step(path: Path) -> StepDump:
    """
    Raises:
        DataError: it is no such file, of a newer version, or damaged.
    """
    rows = numbered_rows(path)
    header = next(rows)[1]
    if header.get("format") != FORMAT:
        raise DataError(f"{path} is no dump of rollouts: its first line does not say format={FORMAT!r}")
    if not isinstance(version := header.get("version"), int) or version > VERSION:
        raise DataError(
            f"{path} has version {version} of the format, and this code reads up to {VERSION}: read it with the code that wrote "
            "it"
        )
    groups = list(rows)
    if len(groups) != header.get("written"):
        raise DataError(
            f"{path} has {len(groups)} prompts, and says that it has {header.get('written')}: it is damaged"
        )
    return StepDump(path, header, groups)


def forget_steps(folder: Path, first: int) -> None:
    """Remove what a run left that is gone on with before this step: files of it and later ones, and unfinished ones."""
    for step, path in step_files(folder).items():
        if step >= first:
            path.unlink()
    for path in folder.glob(unfinished(Path("step-*")).name):
        path.unlink()


def keep_within(folder: Path, limit: int | None) -> None:
    """Remove the files of the oldest steps until all together have at most `limit` bytes; the newest stays."""
    files = list(step_files(folder).values())
    sizes = [path.stat().st_size for path in files]
    while limit is not None and len(files) > 1 and sum(sizes) > limit:
        files.pop(0).unlink()
        sizes.pop(0)
