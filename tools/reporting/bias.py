"""What LFTF has changed: figures before and after, by profession, and which changed most; out of a run's result.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.errors import UserError
from recipes.bias.lftf_result import RESULT_FILE, LFTFResult
from tools.reporting.runs import Run

__all__ = ["BiasOf", "bias_sections"]

BINS, CHANGED = 20, 15


@dataclass(frozen=True)
class BiasOf:
    """Of one run.

    Attributes:
        run: its number.
        about: what was trained, how long, and why it ended.
        words: that are compared.
        figures: (name, before, after, change) in words.
        bins: (lowest difference, highest, professions before, after) of those that are not empty.
        changed: (profession, before, after), the most changed first.
        samples: (prompt, how the model went on before, how after).
        costs: (name, value) of what it took.
    """

    run: int
    about: str
    words: tuple[str, str]
    figures: list[tuple[str, str, str, str]]
    bins: list[tuple[float, float, int, int]]
    changed: list[tuple[str, float, float]]
    samples: list[tuple[str, str, str]]
    costs: list[tuple[str, str]]

    @property
    def most(self) -> int:
        """Professions in the fullest bin."""
        return max(max(before, after) for _, _, before, after in self.bins)


def bias_sections(runs: Sequence[Run]) -> list[BiasOf]:
    """Of the runs of LFTF that have ended.

    Raises:
        UserError: a result.json is damaged.
    """
    found = []
    for number, run in enumerate(runs):
        path = run.folder / RESULT_FILE
        if run.algorithm != "LFTF" or not path.is_file():
            continue
        try:
            found.append(_section(number, run, LFTFResult.read(path)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no result of LFTF ({type(error).__name__}: {error}): remove it, and the report goes without"
            ) from None
    return found


def _section(number: int, run: Run, result: LFTFResult) -> BiasOf:
    pair = (run.config.get(f"data.prompts.pair.{name}") for name in ("first", "second"))
    words = tuple(word or default for word, default in zip(pair, ("he", "she"), strict=True))
    before, after = (one["profession_table"] for one in (result.before, result.after))
    places = [[_bin(value) for value in table.values()] for table in (before, after)]
    bins = [
        (-1 + 2 * place / BINS, -1 + 2 * (place + 1) / BINS, *(found.count(place) for found in places))
        for place in range(BINS)
        if any(place in found for found in places)
    ]
    names = sorted(before.keys() & after.keys(), key=lambda name: (-abs(after[name] - before[name]), name))
    return BiasOf(
        number, result.about, words, result.changes(words), bins, [(name, before[name], after[name]) for name in names[:CHANGED]],
        result.samples, result.cost_rows,
    )  # fmt: skip


def _bin(value: float) -> int:
    return min(int((value + 1) / 2 * BINS), BINS - 1)
