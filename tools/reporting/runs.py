"""A run's folder as the report reads it: its numbers, configuration, environment, and what rollouts it has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import UserError
from recipes.grpo.dump_files import FOLDER, step_files
from tools.run_metrics import read_metrics

__all__ = ["Run", "names_of", "read_run"]

# Of the recipes that log step by step, by the section of `trainer` that is theirs.
ALGORITHMS = {"grpo": "GRPO", "sft": "SFT", "lftf": "LFTF"}
# The resolved configuration: as the run was last started, and as it began.
CONFIGURATIONS = ("config.yaml", "checkpoints/run.yaml")


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        name: what the page calls it.
        rows: of metrics.jsonl.
        config: value by dotted key; empty where none is there.
        dumps: files of rollouts by their step.
        environment: what is known of where it ran, by name.
    """

    name: str
    folder: Path
    rows: list[dict[str, float]]
    config: dict[str, Any] = field(default_factory=dict)
    dumps: dict[int, Path] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def algorithm(self) -> str | None:
        sections = {key.split(".")[1] for key in self.config if key.startswith("trainer.")}
        return next((name for section, name in ALGORITHMS.items() if section in sections), None)

    @property
    def steps(self) -> int:
        """That have been taken."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def wanted_steps(self) -> int | None:
        found = (self.config.get(f"trainer.{section}.max_steps") for section in ALGORITHMS)
        return next((steps for steps in found if isinstance(steps, int)), None)

    @property
    def ended(self) -> bool:
        return (self.folder / "checkpoints" / "final").exists()

    def series(self, metric: str) -> dict[int, float]:
        """A metric's value by step."""
        return {row["step"]: row[metric] for row in self.rows if metric in row}


def read_run(folder: Path, name: str) -> Run:
    """
    Raises:
        UserError: it is no run, or none that has logged a number.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the one of a run (exp_manager.explicit_log_dir)")
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder} has logged nothing yet: wait for its first step")
    return Run(name, folder, rows, _config(folder), step_files(folder / FOLDER), dict(_environment(folder)))


def names_of(folders: Sequence[Path]) -> list[str]:
    """As little of each path as tells it from the others.

    Raises:
        UserError: one is named twice.
    """
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is named twice: name each run once")
    longest = max(len(place.parts) for place in places)
    for length in range(1, longest + 1):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths that differ have names that differ")


def _config(folder: Path) -> dict[str, Any]:
    path = next((path for name in CONFIGURATIONS if (path := folder / name).is_file()), None)
    found = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path} is no configuration of a run: keys with their values are expected")
    return dict(_flat(found))


def _flat(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, key)
        else:
            yield key, value


def _environment(folder: Path) -> Iterator[tuple[str, Any]]:
    """What the run, and NeMo's exp_manager, have written down when it was last started."""
    if (path := folder / "environment.json").is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged: remove it, and the report goes without")
        yield from _flat(found)
    if (path := folder / "cmd-args.log").is_file():
        yield "command", _text(path)
    if (path := folder / "git-info.log").is_file():
        first, _, changes = _text(path).partition("\n")
        yield "source", first + (", with changes that were not committed" if changes.strip() else "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()
