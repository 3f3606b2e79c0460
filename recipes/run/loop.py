"""The loop of every trainer: steps, validation, log, checkpoints, stops.

A trainer says what a step is; when it is validated, logged, saved and stopped is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from megatron_ext.runtime.engine import Engine
from recipes.run.session import Session

__all__ = ["Schedule", "Trainer", "fit"]


class Trainer(ABC):
    """What the loop needs of an algorithm. Metrics are named `group/name`.

    Attributes:
        session: the run.
        engine: the model and its optimizer.
    """

    session: Session
    engine: Engine

    @abstractmethod
    def run_step(self, step: int) -> dict[str, float]:
        """Take a step and return its metrics; none if it could not be taken, which ends the training."""

    @abstractmethod
    def run_validation(self, step: int) -> dict[str, float]:
        """Metrics of the model as it is after this step; 0: before the first."""

    @abstractmethod
    def summary(self, metrics: dict[str, float]) -> str:
        """A few words for the progress bar."""

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
    """
    session, engine = trainer.session, trainer.engine
    session.open_log()
    step, state = session.restore(engine)
    if state:
        trainer.load_state_dict(state)
    elif schedule.validates_first and schedule.val_check_interval:
        session.write(0, trainer.run_validation(0) | session.timers.read())
    metrics: dict[str, float] = {}
    stopped = ""
    with session.progress(schedule.max_steps, schedule.name, step) as bar:
        while step < schedule.max_steps and not trainer.has_ended() and not stopped:
            step += 1
            if not (metrics := trainer.run_step(step)):
                break
            if schedule.validates(step):
                metrics |= trainer.run_validation(step)
            metrics |= session.timers.read()
            session.write(step, metrics)
            bar.set_postfix_str(trainer.summary(metrics), refresh=False)
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
