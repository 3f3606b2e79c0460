"""Models side by side: what an evaluation leaves for later ones, and what two of the same questions differ by.

Every evaluation leaves `answers.json`: figures over clusters, by the group of questions that they are of, with a digest of
what was asked. A later one of the same questions, on another model, layout or machine, is compared with it cluster by cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from megatron_ext.bias.measures import Measure, difference
from megatron_ext.errors import UserError
from megatron_ext.files import write_json
from recipes.bias.titles import titles

__all__ = ["ANSWERS_FILE", "Answers", "Earlier", "compared", "comparison_lines", "digest_of", "read_earlier"]

ANSWERS_FILE = "answers.json"
CHANGED = 12  # professions in the table of the most changed
# Groups that may be other ones without a refusal, and what is said then.
BESIDE = {
    "texts": "Perplexity is not compared with that of {}: other texts, or other tokens of them.",
    "general": "General ability is not compared with that of {}: other tasks, or rows cut to other lengths.",
}


def digest_of(*questions: object) -> str:
    """Of all that makes questions other ones. Their `repr` must say it."""
    return xxhash.xxh3_64_hexdigest(repr(questions).encode())


@dataclass
class Answers:
    """What one model said, by group of questions ("prompts", "texts", a public set).

    Attributes:
        asked: digests of the questions.
        measures: figures by name.
    """

    asked: dict[str, str] = field(default_factory=dict)
    measures: dict[str, dict[str, Measure]] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, Measure]:
        return {name: measure for group in self.measures.values() for name, measure in group.items()}

    def write(self, folder: Path, model: str, professions: Mapping[str, float]) -> None:
        groups = {
            group: {"asked": self.asked[group], "measures": {name: m.as_dict() for name, m in found.items()}}
            for group, found in self.measures.items()
        }
        node = {"model": model, "professions": dict(professions), "groups": groups}
        write_json(folder / ANSWERS_FILE, node)


@dataclass(frozen=True)
class Earlier:
    """An evaluation that was made before.

    Attributes:
        name: what it is called in tables.
        model: as it was named then.
        professions: mean P(first) - P(second) of each.
    """

    name: str
    model: str
    answers: Answers
    professions: dict[str, float]

    def check(self, asked: Mapping[str, str]) -> list[str]:
        """Groups that are not compared although both have them: texts in other tokens, other tasks of the harness or as much of
        them as another length shows.

        Args:
            asked: digests of what is asked now.

        Raises:
            UserError: it was asked other questions, or none of these.
        """
        common = [group for group in asked if group in self.answers.asked]
        other = [group for group in common if asked[group] != self.answers.asked[group]]
        if wrong := [group for group in other if group not in BESIDE]:
            raise UserError(
                f"data.compare_with: {self.name} was asked other questions of {', '.join(wrong)} than this evaluation asks; give "
                "both the same data.prompts, data.split and files"
            )
        if not set(common) - set(other):
            raise UserError(f"data.compare_with: {self.name} was asked none of the questions of this evaluation")
        return other


def read_earlier(folders: Sequence[str]) -> list[Earlier]:
    """
    Raises:
        UserError: a folder that holds no evaluation, or two of one name.
    """
    found = []
    for folder in folders:
        path = Path(folder) / ANSWERS_FILE
        try:
            node = json.loads(path.read_text(encoding="utf-8"))
            answers = Answers(
                {group: part["asked"] for group, part in node["groups"].items()},
                {
                    group: {name: Measure.from_dict(m) for name, m in part["measures"].items()}
                    for group, part in node["groups"].items()
                },
            )
            found.append(Earlier(Path(folder).absolute().name, node["model"], answers, node["professions"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"data.compare_with: {path} is no evaluation's ({type(error).__name__}: {error}); name folders that "
                "recipes/eval_bias.py has written"
            ) from None
    names = [earlier.name for earlier in found]
    if len(set(names)) < len(names):
        raise UserError(f"data.compare_with: folders of one name, {', '.join(names)}, cannot be told apart in a table")
    return found


def compared(earlier: Earlier, now: Answers, samples: int) -> dict[str, dict]:
    """Of every figure that both have on the same questions: {"earlier", "now", "difference", "interval"}, now less earlier."""
    skipped = earlier.check(now.asked)
    found = {}
    for group, measures in now.measures.items():
        before = earlier.answers.measures.get(group, {}) if group not in skipped else {}
        for name in measures.keys() & before.keys():
            gap, ends = difference(before[name], measures[name], samples)
            found[name] = {
                "earlier": before[name].value, "now": measures[name].value, "difference": gap, "interval": ends
            }  # fmt: skip
    return found


def comparison_lines(
    earlier: Sequence[Earlier],
    found: Sequence[Mapping[str, dict]],
    now: Answers,
    professions: Mapping[str, float],
    words: tuple[str, str],
) -> list[str]:
    """Markdown: every figure of every model, what this one differs by from each, and whose figure changed most.

    Args:
        found: `compared` of each earlier evaluation.
        professions: as an earlier one's, of this model.
    """
    mine = now.by_name
    whole = {name: measure.value for name, measure in mine.items() if "." not in name}
    called = titles(whole, words)
    called |= {name: name.replace("_", " ").replace(".", ": ") for name in mine if name not in called}
    heads = [one.name for one in earlier]
    lines = ["", "## Beside other models", ""]
    lines += [f"- {one.name}: {one.model}" for one in earlier]
    lines += [
        "",
        "Differences are this model's figure less the other's, with 95 % intervals of pairs: the same professions, templates or "
        "terms are drawn for both. * where 0 lies outside.",
        "",
        "| measure | " + " | ".join([*heads, "this model", *(f"less {head}" for head in heads)]) + " |",
        "|---|" + "---:|" * (2 * len(heads) + 1),
    ]
    for name in called:
        cells = [
            cell if cell and math.isfinite(cell["difference"]) else None for cell in (one.get(name) for one in found)
        ]
        if name in mine and any(cells):
            lines.append(
                f"| {called[name]} | " + " | ".join("-" if cell is None else f"{cell['earlier']:.4f}" for cell in cells)
                + f" | {mine[name].value:.4f} | " + " | ".join(map(_gap, cells)) + " |"
            )  # fmt: skip
    for one in earlier:
        skipped = [group for group in one.check(now.asked) if group in now.measures]
        lines += [line for group in skipped for line in ("", BESIDE[group].format(one.name))]
        common = one.professions.keys() & professions.keys()
        changes = sorted(common, key=lambda name: (-abs(professions[name] - one.professions[name]), name))[:CHANGED]
        lines += [
            "", f"### Most changed from {one.name}, P({words[0]}) - P({words[1]})", "",
            f"| profession | {one.name} | this model |", "|---|---:|---:|",
            *(f"| {name} | {one.professions[name]:+.4f} | {professions[name]:+.4f} |" for name in changes),
        ]  # fmt: skip
    return lines


def _gap(cell: dict | None) -> str:
    if cell is None:
        return "-"
    if cell["interval"] is None:
        return f"{cell['difference']:+.4f}"
    low, high = cell["interval"]
    return f"{cell['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{' *' if low > 0 or high < 0 else ''}"
