"""How far a run is, and how it is: on a terminal a bar with what the last step says below it, in a log a line now and then."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping

import psutil
import torch
from tqdm import tqdm

from recipes.run.metrics import REST, WHOLE, seconds_of

__all__ = [
    "HEALTH",
    "PHASES",
    "StepLine",
    "StepPanel",
    "health",
    "memory",
    "peak_memory",
    "phases",
    "progress_bar",
    "speed",
]

GIB = 1 << 30
LOG_SECONDS = 10.0  # between lines of a log
# Timers by what a reader calls them; others keep their name.
PHASES = {
    "timers/generate": "sampling", "timers/old_and_reference_logprobs": "scoring", "timers/actor_update": "update",
    "timers/optimizer_step": "update", "timers/rollout_dump": "dump", "timers/frozen_pass": "scoring",
}  # fmt: skip
# What tells a run that is well from one that is ill, in order: the metric, its name here, and how it is written.
HEALTH = {
    "train_rollouts/reward": ("reward", ".3f"),
    "train_optim/loss": ("loss", ".4f"),
    "train_optim/kl": ("KL", ".3g"),
    "train_optim/entropy": ("entropy", ".3g"),
    "train_optim/grad_norm": ("gradient", ".3g"),
    "train_optim/clip_fraction": ("clipped", ".1%"),
    "train_rollouts/groups_with_signal": ("groups with signal", ".0%"),
    "train_rollouts/response_length": ("length", ".0f"),
    "train_rollouts/truncated": ("cut off", ".0%"),
    "train_optim/sampler_logprob_diff": ("mismatch", ".2g"),
    "train_rollouts/staleness": ("staleness", ".2g"),
    "train_optim/skipped": ("steps left out", ".0%"),
}


def phases(metrics: Mapping[str, float]) -> str:
    """Where the seconds of a step went, in shares of it and of its validation: "sampling 61%, update 30%, the rest 9%"."""
    found: dict[str, float] = {}
    seconds = seconds_of(metrics) | {k: v for k, v in metrics.items() if k == "timers/validation"}
    for timer, spent in seconds.items():
        name = PHASES.get(timer, timer.removeprefix("timers/"))
        found[name] = found.get(name, 0.0) + spent
    total = sum(found.values())
    shares = {name: spent / total for name, spent in found.items()} if total > 0 else {}
    rest = shares.pop(REST, 0.0)
    ordered = [*sorted(shares.items(), key=lambda pair: -pair[1]), (REST, rest)]
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005)


def speed(metrics: Mapping[str, float]) -> str:
    """Tokens a second, the seconds of the step, and of GPUs how much of their peak is used."""
    seconds = metrics.get(WHOLE, metrics.get("timers/optimizer_step"))
    parts = [
        f"{metrics['train_optim/tokens_per_second']:,.0f} tokens/s"
        if "train_optim/tokens_per_second" in metrics
        else "",
        f"{seconds:.3g} s a step" if seconds is not None else "",
        f"MFU {metrics['train_optim/mfu']:.1%}" if "train_optim/mfu" in metrics else "",
    ]
    return ", ".join(filter(None, parts))


def memory() -> str:
    """Of this process, and of its GPU where it has one."""
    said = [f"{psutil.Process().memory_info().rss / GIB:.1f} GiB resident"]
    if _uses_gpu():
        free, total = torch.cuda.mem_get_info()
        said.append(
            f"{(total - free) / GIB:.1f} of {total / GIB:.0f} GiB of the GPU, {peak_memory() / GIB:.1f} GiB of tensors at most"
        )
    return ", ".join(said)


def peak_memory() -> int:
    """Bytes of tensors on this process's GPU at most so far, or of its resident memory where it has none."""
    if _uses_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def health(metrics: Mapping[str, float]) -> str:
    """On one line what tells whether the run is well. GRPO's loss says little, and is left out."""
    left_out = {"train_optim/loss"} if "train_rollouts/reward" in metrics else set()
    shown = [(name, *said) for name, said in HEALTH.items() if name in metrics and name not in left_out]
    shown += [(name, name, ".4g") for name in metrics if name in ("val/loss", "val_rollouts/reward", "val/afgb")]
    return ", ".join(f"{label} {metrics[name]:{form}}" for name, label, form in shown)


class StepLine:
    """One line, for logs, of which a new one is written every `LOG_SECONDS`.

    Args:
        total: steps, or what `unit` says.
        shown: whether anything is.
    """

    def __init__(self, total: int, what: str, unit: str, done: int = 0, shown: bool = True):
        self._bar = tqdm(
            total=total,
            desc=what,
            unit=unit,
            initial=done,
            disable=not shown,
            dynamic_ncols=True,
            mininterval=LOG_SECONDS,
        )

    def __enter__(self) -> StepLine:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        self._bar.update(count)

    def tell(self, summary: str, metrics: Mapping[str, float] | None = None) -> None:
        """What the last step says: a few words, of which the log's line is made, and all of its numbers."""
        self._bar.set_postfix_str(summary, refresh=False)


class StepPanel:
    """A bar, and below it where the time of the last step went, how fast it was, and how the run is. For terminals; what is
    printed meanwhile stands above it. Arguments and methods as `StepLine`."""

    def __init__(self, total: int, what: str, unit: str, done: int = 0):
        from rich.console import Console
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit}s, "),
            TimeElapsedColumn(), TextColumn("gone, "), TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._lines: list[str] = []
        # stdout may be a file where stderr is a terminal: what goes there is not for us.
        self._live = Live(
            get_renderable=self._shown, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty(),
            refresh_per_second=4,
        )  # fmt: skip

    def __enter__(self) -> StepPanel:
        self._live.start(refresh=True)
        self._live.console.show_cursor(True)  # a process that is killed leaves the terminal as it is
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def update(self, count: int = 1) -> None:
        self._bar.advance(self._task, count)

    def tell(self, summary: str, metrics: Mapping[str, float] | None = None) -> None:
        if metrics is None:
            self._lines = [summary]
            return
        spent = phases(metrics)
        lines = [f"{speed(metrics)}: {spent}" if spent else speed(metrics), memory(), health(metrics)]
        self._lines = [line for line in lines if line]

    def _shown(self):
        from rich.console import Group
        from rich.text import Text

        return Group(
            self._bar.get_renderable(), *(Text(f"  {line}", overflow="ellipsis", no_wrap=True) for line in self._lines)
        )


@contextlib.contextmanager
def progress_bar(total: int, what: str, unit: str, done: int = 0, shown: bool = True) -> Iterator[StepLine | StepPanel]:
    """What fits where the standard error output goes."""
    on_terminal = shown and sys.stderr.isatty()
    with StepPanel(total, what, unit, done) if on_terminal else StepLine(total, what, unit, done, shown) as bar:
        yield bar
