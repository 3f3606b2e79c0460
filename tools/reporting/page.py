"""The page: what has been read and drawn, put into templates that escape all of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipes.run.metrics import WHOLE
from tools.reporting.bias import bias_sections
from tools.reporting.compare import configuration, differences, ends, environments
from tools.reporting.curves import curve_sections
from tools.reporting.dumps import Dumps, read_dumps
from tools.reporting.filled import filled, now
from tools.reporting.histograms import heat_maps
from tools.reporting.numbers import short
from tools.reporting.phases import phase_charts
from tools.reporting.runs import Run
from tools.reporting.samples import SampledStep, sampled_steps, tokenizer_of
from tools.reporting.words import words_for

__all__ = ["MOST_RUNS", "render"]

MOST_RUNS = 8  # that colours and strokes tell apart
# Metrics whose last value stands at the top.
HEADLINES = {
    "val_rollouts/reward": "held-out reward", "train_rollouts/reward": "reward", "val/loss": "held-out loss",
    "train_rollouts/response_length": "response length", "val/afgb": "AFGB", "train_optim/tokens_saved": "tokens saved",
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class SamplesOf:
    """Of one run.

    Attributes:
        note: what is missing of them.
    """

    run: int
    steps: list[SampledStep]
    note: str


def render(runs: Sequence[Run], dumped_steps: int, sampled: int) -> str:
    """
    Args:
        dumped_steps: files of rollouts that are read at most, of each run.
        sampled: steps of which samples are shown.

    Raises:
        DataError: a file of rollouts is damaged.
        UserError: what a run of LFTF came to is damaged.
    """
    dumps = [read_dumps(i, run, dumped_steps, sampled) for i, run in enumerate(runs) if run.dumps]
    return filled(
        "page.html",
        ["page.css"],
        "page.js",
        words=words_for(runs),
        title=" · ".join(run.name for run in runs),
        kicker=f"{' and '.join(dict.fromkeys(run.algorithm or 'training' for run in runs))} · megatron-ext report of {now()}",
        folders=[str(run.folder) for run in runs],
        facts=_facts(runs),
        sections=curve_sections(runs),
        phases=phase_charts(runs),
        maps=heat_maps(dumps),
        dump_notes=list(_dump_notes(runs, dumps)),
        samples=[_samples(dump, runs[dump.run]) for dump in dumps],
        bias=bias_sections(runs),
        ends=ends(runs),
        differences=differences(runs),
        configuration=list(configuration(runs)),
        environment=environments(runs),
    )


def _facts(runs: Sequence[Run]) -> list[list[Fact]]:
    """What each run came to; the same facts of all."""
    there = {name: title for name, title in HEADLINES.items() if any(run.series(name) for run in runs)}
    found = []
    for run in runs:
        of = f" of {run.wanted_steps}" if run.wanted_steps else ""
        facts = [Fact("steps", f"{run.steps}{of}", "ended" if run.ended else "not ended, or not saved")]
        for name, title in there.items():
            values = list(run.series(name).values())
            first = f"from {short(values[0])}" if len(values) > 1 else ""
            facts.append(Fact(title, short(values[-1]) if values else "–", first))
        if any(run.series(WHOLE) for run in runs):
            seconds = run.series(WHOLE).values()
            facts.append(Fact("seconds a step", *((short(statistics.median(seconds)), "median") if seconds else "–")))
        found.append(facts)
    return found


def _dump_notes(runs: Sequence[Run], dumps: Sequence[Dumps]) -> Iterator[str]:
    """What is missing of responses, and why."""
    read = {dump.run: dump for dump in dumps}
    for i, run in enumerate(runs):
        if (dump := read.get(i)) is None:
            if run.algorithm not in (None, "GRPO"):
                yield f"{run.name} is a run of {run.algorithm}, which samples no responses."
                continue
            yield (
                f"{run.name} has no rollouts on disk, and so neither distributions nor samples: they are written where "
                "trainer.grpo.rollout_dump={} is set"
            )
            continue
        if (count := len(dump.steps)) < dump.total:
            yield f"{run.name}: {count} of {dump.total} steps with rollouts are shown, evenly from the first to the last."
        if part := sum(not step.full for step in dump.steps):
            yield f"{run.name}: {part} of {count} steps were written in part (trainer.grpo.rollout_dump.prompts)."


def _samples(dump: Dumps, run: Run) -> SamplesOf:
    tokenizer = tokenizer_of(run, dump.kept[-1].header["vocabulary"])
    note = (
        "The run's tokenizer is not on this machine, neither beside a checkpoint nor where model.tokenizer says: tokens are "
        "shown by their ids."
    )
    return SamplesOf(dump.run, sampled_steps(dump.kept, tokenizer), "" if tokenizer else note)
