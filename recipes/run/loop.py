"""The loop of every trainer: steps, validation, log, checkpoints, stops.

A trainer says what a step is; when it is validated, logged, saved and stopped is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.errors import UserError
from megatron_ext.runtime.engine import Engine, SkippedError
from megatron_ext.runtime.progress import PROGRESS
from recipes.run.profiling import profiled
from recipes.run.session import Session
from recipes.run.spikes import Spikes

__all__ = ["FAILED", "Schedule", "Trainer", "fit"]

FAILED = "failed"  # folder of batches that a run could not go on with
MOST_ROWS = 16  # that are named in one line


class Trainer(ABC):
    """What the loop needs of an algorithm. Metrics are named `group/name`.

    Attributes:
        session: the run.
        engine: the model and its optimizer.
        watched: metrics in which a spike is told.
    """

    session: Session
    engine: Engine
    watched: tuple[str, ...] = ("train_optim/grad_norm",)

    @abstractmethod
    def run_step(self, step: int) -> dict[str, float]:
        """Take a step and return its metrics; none if it could not be taken, which ends the training."""

    def rows(self) -> list[str]:
        """Which rows this rank's share of the last step was made of, as "rows.jsonl:12"."""
        return []

    def save_batch(self, step: int) -> Path | None:
        """Write down what the step that has failed was to learn from, so that it can be tried again; None: it cannot be. Every
        rank calls it."""
        return None

    @abstractmethod
    def run_validation(self, step: int) -> dict[str, float]:
        """Metrics of the model as it is after this step; 0: before the first."""

    @abstractmethod
    def summary(self, metrics: dict[str, float]) -> str:
        """A few words for the log's line."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model and optimizer, JSON-serialisable."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""

    def tensors(self) -> dict[str, dict]:
        """Tensors that a checkpoint keeps beside those, see `save_checkpoint`."""
        return {}

    def has_ended(self) -> bool:
        """Whether there is nothing more to learn, before all steps have been taken."""
        return False

    def conclude(self) -> None:  # noqa: B027  nothing, if there is nothing to do
        """Called when training has ended, before the last checkpoint; not when it is only interrupted."""


@dataclass(frozen=True)
class Schedule:
    """
    Attributes:
        name: of the algorithm, before the progress bar.
        max_steps: of the run.
        val_check_interval: steps between validations; 0: none.
        save_interval: steps between checkpoints; 0: only the last.
        validates_first: whether there is a validation before the first step.
        validates_last: whether there is one after the last, whatever the interval.
    """

    name: str
    max_steps: int
    val_check_interval: int = 0
    save_interval: int = 0
    validates_first: bool = False
    validates_last: bool = False

    def validates(self, step: int) -> bool:
        last = self.validates_last and step == self.max_steps
        return bool(self.val_check_interval) and (step % self.val_check_interval == 0 or last)

    def saves(self, step: int) -> bool:
        return bool(self.save_interval) and step % self.save_interval == 0


def fit(trainer: Trainer, schedule: Schedule) -> bool:
    """Run the schedule from where the run's last checkpoint is to its end, or until the run must stop; then save.

    Returns:
        Whether training has ended; False if it was stopped before, to be gone on with.

    Raises:
        UserError: the run has taken more steps than the schedule has; nothing has been touched.
    """
    session, engine = trainer.session, trainer.engine
    if (taken := session.resumed[0]) > schedule.max_steps:
        raise UserError(
            f"{session.log_dir} holds a run of {taken} steps, more than the {schedule.max_steps} of this one: set max_steps to "
            "as many or more, or choose a new folder"
        )
    session.open_log()
    step, state = session.restore(engine)
    if state:
        trainer.load_state_dict(state)
        if step == schedule.max_steps:
            session.say(f"all {step} steps have been taken: nothing is left to train; more max_steps would go on")
    elif schedule.validates_first and schedule.val_check_interval:
        session.write(0, trainer.run_validation(0) | session.timers.read())
    metrics: dict[str, float] = {}
    stopped = ""
    spikes = Spikes(trainer.watched, session.config.trainer.health.spike)
    to_take = range(step + 1, schedule.max_steps + 1)
    profile = profiled(session.config.trainer.profile, session.log_dir, to_take, session.say)
    with session.progress(schedule.max_steps, schedule.name, step) as bar, profile as before_step:
        while step < schedule.max_steps and not trainer.has_ended() and not stopped:
            step += 1
            PROGRESS.step = step
            before_step(step)
            try:
                metrics = trainer.run_step(step)
            except SkippedError as error:  # on every rank
                _save_for_trying(trainer, step, error)
            if not metrics:
                break
            _tell_spikes(trainer, spikes, step, metrics)
            if schedule.validates(step):
                metrics |= trainer.run_validation(step)
            metrics |= session.timers.read()
            session.write(step, metrics)
            bar.tell(trainer.summary(metrics), metrics)
            bar.update()
            if step < schedule.max_steps and not trainer.has_ended():
                if schedule.saves(step):
                    session.save(engine, step, trainer.state_dict(), metrics, False, trainer.tensors())
                stopped = session.must_stop()
    if not stopped:
        trainer.conclude()
    folder = session.save(engine, step, trainer.state_dict(), metrics, not stopped, trainer.tensors())
    session.say_saved(folder, step, stopped)
    return not stopped


def _tell_spikes(trainer: Trainer, spikes: Spikes, step: int, metrics: dict[str, float]) -> None:
    """Metrics are the same on every rank, so all of them come together here or none."""
    if found := spikes.look(metrics):
        rows = trainer.session.gathered(trainer.rows())
        named = ", ".join(rows[:MOST_ROWS]) + (f" and {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else "")
        trainer.session.say(f"a spike at step {step}: {'; '.join(found)}" + (f" ({named})" if rows else ""))


def _save_for_trying(trainer: Trainer, step: int, error: SkippedError) -> NoReturn:
    """The batch, and a checkpoint with the weights as they are: those that it met, unless an update of the step was taken.

    Raises:
        SkippedError: with the places of both.
    """
    session = trainer.session
    batch = trainer.save_batch(step)
    folder = session.save(trainer.engine, step, trainer.state_dict(), {}, False, trainer.tensors())
    session.say_saved(folder, step, "training cannot go on")
    kept = f"; the batch of step {step} is in {batch}" if batch is not None else ""
    raise SkippedError(f"{error}{kept}, the weights as they are in {folder}") from error
