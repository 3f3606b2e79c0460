"""What rollouts on disk say of a run: how its rewards, lengths and mismatches are distributed, step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from recipes.grpo.dump_files import StepDump, read_step
from tools.reporting.numbers import spread_out
from tools.reporting.runs import Run

__all__ = ["DumpedStep", "Dumps", "Spread", "apart_of", "read_dumps"]

PROMPTS = 2  # of a step that are shown


@dataclass(frozen=True)
class Spread:
    """How numbers are distributed.

    Attributes:
        counts: how often each occurs.
    """

    counts: Counter[float]
    mean: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None: of no number."""
        counts = Counter(values)
        return cls(counts, sum(x * n for x, n in counts.items()) / counts.total()) if counts else None


@dataclass(frozen=True)
class DumpedStep:
    """
    Attributes:
        rewards, lengths: of the responses.
        apart: |trainer - sampler| of the tokens of which both are known; its counts are by the power of ten below.
        full: whether all prompts of the step are there.
    """

    step: int
    rewards: Spread | None
    lengths: Spread | None
    apart: Spread | None
    full: bool


@dataclass(frozen=True)
class Dumps:
    """
    Attributes:
        run: its number.
        steps: those that were read.
        total: so many are there.
        kept: steps of which samples are shown, with the prompts that are.
    """

    run: int
    steps: list[DumpedStep] = field(default_factory=list)
    total: int = 0
    kept: list[StepDump] = field(default_factory=list)


def read_dumps(number: int, run: Run, limit: int, samples: int) -> Dumps:
    """
    Args:
        limit: files that are read at most, evenly from the first to the last.
        samples: of these so many are kept.

    Raises:
        DataError: one is damaged.
    """
    chosen = spread_out(list(run.dumps), limit)
    wanted, kept, steps = set(spread_out(chosen, samples)), [], []
    for step in chosen:
        dump = read_step(run.dumps[step])  # one at a time: they may be large
        steps.append(_summary(step, dump))
        if step in wanted:
            kept.append(replace(dump, groups=_to_be_read(dump)))
    return Dumps(number, steps, len(run.dumps), kept)


def _to_be_read(dump: StepDump) -> list[tuple[int, dict[str, Any]]]:
    """The first prompts whose responses differ in reward, and then others, in their order."""
    differ = [len({answer["reward"] for answer in group["responses"]}) > 1 for _, group in dump.groups]
    chosen = sorted(range(len(dump.groups)), key=lambda i: not differ[i])[:PROMPTS]
    return [dump.groups[i] for i in sorted(chosen)]


def apart_of(answer: dict[str, Any]) -> list[float | None]:
    """Trainer minus sampler, token by token; None where one is not known, as of what was observed."""
    sampler = [x for p in answer["passages"] for x in p.get("logprobs", [None] * len(p["tokens"]))]
    trainer = answer["old_logprobs"]
    return [None if None in pair else pair[0] - pair[1] for pair in zip(trainer, sampler, strict=True)]


def _summary(step: int, dump: StepDump) -> DumpedStep:
    answers = [answer for _, group in dump.groups for answer in group["responses"]]
    lengths = Spread.of(sum(len(passage["tokens"]) for passage in answer["passages"]) for answer in answers)
    apart = [abs(x) for answer in answers for x in apart_of(answer) if x is not None]
    decades = Counter(10.0 ** math.floor(math.log10(x)) if x else 0.0 for x in apart)
    spread = Spread(decades, sum(apart) / len(apart)) if apart else None
    return DumpedStep(step, Spread.of(answer["reward"] for answer in answers), lengths, spread, dump.full)
