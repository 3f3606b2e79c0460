"""Rows from easy to hard: bins of them by a number that says how hard each is, which a run opens one after the other."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from recipes.cli.config import at_least
from recipes.data.errors import DataError
from recipes.data.files import Place
from recipes.data.jsonl import kind, numbered_rows

__all__ = ["CurriculumSection", "bins_of"]


@dataclass(kw_only=True)
class CurriculumSection:
    # Steps until all bins are open: they open one after the other, the easiest first, each after as many steps.
    steps: int
    # Key of a row, or of `scores`, with a number that says how hard it is.
    field: str = "difficulty"
    # JSONL with {"line": ..., and the number} for each row, by its line (in a table its row, from 1), and {"file": ...}, its name
    # without folders, where there are several files. null: the rows have the number themselves.
    scores: str | None = None
    # Larger numbers are easier, such as the share of right answers.
    larger_is_easier: bool = False
    # How many bins, of equally many rows.
    bins: int = 4
    # Where one bin ends and the next begins, in place of `bins`: [0.3, 0.7] are three, and 0.3 is in the second. null: equally
    # many rows in each.
    edges: list[float] | None = None
    # What drawn rows are of, stage by stage, each of as many steps; the last one goes on: [[1, 0], [3, 1], [1, 1]] of two bins,
    # the easiest first. null: of all open bins, as many rows as they have.
    weights: list[list[float]] | None = None

    def __post_init__(self):
        at_least("data.curriculum", self, 1, "steps", "bins")
        if self.edges is not None and sorted({*self.edges}) != self.edges:
            raise UserError(f"data.curriculum.edges={self.edges} must rise")
        for row in self.weights or ():
            if len(row) != self.num_bins:
                raise UserError(
                    f"data.curriculum.weights has {row} for {self.num_bins} bins: give each stage one number for each bin"
                )
            if not all(0 <= x < math.inf for x in row) or not any(row):
                raise UserError(f"data.curriculum.weights has {row}: numbers, 0 or more, and one above 0")
        if self.weights == []:
            raise UserError("data.curriculum.weights is empty: give at least one stage, or null")
        if self.steps < len(self.stages):
            raise UserError(f"data.curriculum.steps={self.steps} is less than its {len(self.stages)} stages")

    @property
    def num_bins(self) -> int:
        return self.bins if self.edges is None else len(self.edges) + 1

    @property
    def stages(self) -> list[int]:
        """Steps of each."""
        count = self.num_bins if self.weights is None else len(self.weights)
        return [self.steps * (i + 1) // count - self.steps * i // count for i in range(count)]

    def weights_of(self, number: int, rows: int) -> list[float]:
        """Of a bin, in each stage.

        Args:
            number: of the bin; 0 is the easiest.
        """
        if self.weights is not None:
            return [row[number] for row in self.weights]
        return [float(rows) if number <= stage else 0.0 for stage in range(self.num_bins)]


def bins_of(section: CurriculumSection, rows: Sequence[Any], batch: int) -> list[list[int]]:
    """The numbers of the rows of each bin, the easiest first.

    Args:
        rows: prompts or pairs.
        batch: rows of a step.

    Raises:
        UserError: a row without a number, an empty bin, or a stage with fewer rows than a step takes.
    """
    found = [_score(section, prompt) for prompt in (getattr(row, "prompt", row) for row in rows)]
    if section.scores is not None:
        found = _from_file(section, rows)
    hardness = [-x for x in found] if section.larger_is_easier else found
    if section.edges is None:
        order, count = sorted(range(len(rows)), key=lambda i: (hardness[i], i)), section.bins
        bins = [sorted(order[i * len(rows) // count : (i + 1) * len(rows) // count]) for i in range(count)]
    else:
        bins = [[] for _ in range(section.num_bins)]
        for i, score in enumerate(found):
            number = bisect_right(section.edges, score)
            bins[section.num_bins - 1 - number if section.larger_is_easier else number].append(i)
    for number, members in enumerate(bins):
        if not members:
            raise UserError(
                f"data.curriculum: bin {number + 1} of {len(bins)} has no rows (numbers go from {min(found)} to {max(found)}); "
                "choose other edges, or fewer bins"
            )
    for stage in range(len(section.stages)):
        held = sum(len(b) for n, b in enumerate(bins) if section.weights_of(n, len(b))[stage])
        if held < batch:
            raise UserError(
                f"data.curriculum: the bins of stage {stage + 1} have {held} rows, fewer than the {batch} of a step, which would "
                "see some twice: choose fewer bins, or other edges"
            )
    return bins


def _score(section: CurriculumSection, prompt: Any) -> float:
    if section.scores is not None:
        return 0.0
    return _number(prompt.row.get(section.field), section.field, prompt.where, "data.curriculum.field")


def _number(value: Any, field: str, where: str, key: str) -> float:
    if type(value) not in (int, float):
        got = "nothing" if value is None else kind(value)
        raise DataError(f"{where}: {field} must be a number that says how hard the row is ({key}), got {got}")
    return float(value)


def _from_file(section: CurriculumSection, rows: Sequence[Any]) -> list[float]:
    path, known = section.scores, {}
    for line, row in numbered_rows(path):
        where, name, number = f"{path}:{line}", row.get("file"), row.get("line")
        if type(number) is not int:
            raise DataError(f"{where}: line must be the line of a row, or in a table its number, got {kind(number)}")
        if (name, number) in known:
            raise DataError(f"{where}: the score of {name or 'line'} {number} stands twice")
        known[name, number] = _number(row.get(section.field), section.field, where, "data.curriculum.field")
    places: list[Place] = [getattr(row, "prompt", row).place for row in rows]
    several = len({place.file for place in places}) > 1
    found = []
    for place in places:
        name = Path(place.file).name
        score = known.get((name, place.number), None if several else known.get((None, place.number)))
        if score is None:
            raise DataError(f"{place}: data.curriculum.scores={path} has no score of it")
        found.append(score)
    return found
