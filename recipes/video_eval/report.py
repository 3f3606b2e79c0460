"""What an evaluation on videos leaves in the run's folder: accuracy by category, and every answer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.files import json_text, write_json, write_whole
from recipes.video_eval.scoring import Asked
from recipes.video_eval.sets import LETTERS

__all__ = ["summary", "table", "write_report"]


def summary(asked: Sequence[Asked], scores: Tensor) -> dict[str, Any]:
    """Accuracy over all questions whose answer is known, with its 95 % interval, what chance would have, and both by category.

    Args:
        scores: [questions, options].
    """
    known = [(a.question, int(choice)) for a, choice in zip(asked, scores.argmax(1), strict=True)]
    known = [(question, choice) for question, choice in known if question.answer is not None]
    found: dict[str, Any] = {"questions": len(asked), "answered": len(known)}
    if not known:
        return found
    found |= _accuracy(known)
    divisions: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for question, choice in known:
        for division, category in question.categories.items():
            divisions[division][category].append((question, choice))
    found["by"] = {
        division: {category: _accuracy(part) for category, part in sorted(parts.items())}
        for division, parts in divisions.items()
    }
    return found


def _accuracy(part: Sequence[tuple]) -> dict[str, Any]:
    count = len(part)
    right = sum(choice == question.answer for question, choice in part)
    return {
        "count": count,
        "accuracy": right / count,
        "interval": wilson(right, count),
        "chance": sum(1 / len(question.options) for question, _ in part) / count,
    }


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, spread = right / count, z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def table(found: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(category, questions, accuracy, interval, chance), all in %, the whole first."""
    if not found["answered"]:
        return []
    rows = [_row("all", found)]
    for division, parts in found["by"].items():
        rows += [_row(f"{division}: {category}", part) for category, part in parts.items()]
    return rows


def _row(name: str, part: dict[str, Any]) -> tuple[str, str, str, str, str]:
    low, high = part["interval"]
    shown = (f"{100 * part['accuracy']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * part['chance']:.1f}")
    return name, str(part["count"]), *shown


def write_report(folder: Path, title: str, found: dict[str, Any], asked: Sequence[Asked], scores: Tensor) -> None:
    """video_eval.json, video_eval.md and answers.jsonl."""
    write_json(folder / "video_eval.json", found)
    lines = [f"# {title}", "", f"{found['questions']} questions; the answer of {found['answered']} is known.", ""]
    if rows := table(found):
        lines += ["| category | questions | accuracy, % | 95 % interval | chance, % |", "|---|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    write_whole(folder / "video_eval.md", "\n".join(lines) + "\n")
    answers = []
    for one, values in zip(asked, scores, strict=True):
        question, count = one.question, len(one.question.options)
        answers.append(
            {
                "row": str(question.place),
                "question": question.question,
                "options": list(question.options),
                "chosen": LETTERS[int(values.argmax())],
                "answer": None if question.answer is None else LETTERS[question.answer],
                "scores": [round(float(v), 6) for v in values[:count]],
                "media": dict(question.media),
                **question.categories,
            }  # fmt: skip
        )
    write_whole(folder / "answers.jsonl", "".join(json_text(a, ensure_ascii=False) + "\n" for a in answers))
