"""One run of one recipe on this rank: ranks, model, run folder, metrics, checkpoints, clock.

    inputs = Inputs.check(config)                # and read the data: nothing has been started or written yet
    with Session.start(inputs, loggers) as session:       # the ranks, the run folder's lock, the model with its weights
        trainer = ...                                     # its optimizer
        session.open_log()                                # the run folder

Nothing but the lock is written to the run folder before all else is there, so that a bad input, or too little memory, leaves
nothing half-written.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_ext.blocks.delta import apply_delta
from megatron_ext.errors import UserError
from megatron_ext.hf.config import make_hf_config
from megatron_ext.hf.load import load_tower
from megatron_ext.models.gpt import PrefixGroupedGPT, build_gpt
from megatron_ext.runtime.checkpoint import load_optimizer, load_rng, load_trained, read_checkpoint_info
from megatron_ext.runtime.collectives import broadcast_object, gather_objects, together
from megatron_ext.runtime.distributed import initialize, set_seed
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.metrics import MetricsLog, Timers
from recipes.cli.stopping import REASONS
from recipes.run.contents import Contents, is_first_here
from recipes.run.inputs import Inputs
from recipes.run.lock import FolderLock
from recipes.run.log_process import LogProcess
from recipes.run.metrics import unknown_metrics
from recipes.run.progress import progress_bar
from recipes.run.run_folder import held_run_folder
from recipes.run.run_log import open_run_log
from recipes.run.saver import CheckpointSaver
from recipes.run.settings import ExpManagerSection, TrainedModel
from recipes.run.watchdog import Watchdog

__all__ = ["Session"]

logger = logging.getLogger(__name__)

LOST = len(REASONS)  # the run folder is another run's


class Session:
    """See `start`.

    Attributes:
        inputs: what it was given.
        config: of these.
        device: this rank's.
        data_rank, data_size: its place among the data-parallel ranks.
        is_main: whether it is rank 0.
        model: the model of this pipeline stage, with the weights to start from; None where a recipe brings its own.
        timers: read and written once a step.
        resume_from: the checkpoint to go on from, the same on every rank; None: the run begins.
    """

    def __init__(self, inputs: Inputs, loggers: LogProcess | None, contents: Contents):
        self.inputs, self.config, self._contents = inputs, inputs.config, contents
        self.device = initialize(inputs.sizes)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.is_main = dist.get_rank() == 0
        self.timers = Timers()
        self._lock: FolderLock | None = None  # rank 0's
        self._monitored = False  # whether the metric that tells the best checkpoint has been seen
        self._watchdog: Watchdog | None = None
        self._loggers, self._metrics = loggers, MetricsLog(None)
        self._open = contextlib.ExitStack()
        with self._open as opened:  # what is open is closed again if the rest fails
            self.resume_from, best = self._take_folder()
            self._saver = CheckpointSaver(inputs, contents, self.say, best)
            self._check_contents()
            self.model = self._build_model() if isinstance(self.config.model, TrainedModel) else None
            self._open = opened.pop_all()

    def _take_folder(self) -> tuple[Path | None, float | None]:
        """Have the run folder for this run alone, and see where it goes on, and what the best was before. Rank 0 decides for all:
        others may see an older state of a shared filesystem."""
        manager, newest, best = self.config.exp_manager, None, None
        with together():
            if self.is_main:
                resolved = self.inputs.resolved if manager.resume_if_exists else None
                self._lock = self._open.enter_context(
                    held_run_folder(manager.explicit_log_dir, type(self.config), resolved)
                )
                if resolved is not None and self.inputs.checkpoints is not None:
                    newest = self.inputs.checkpoints.newest()
                if newest is not None:
                    best = self.inputs.checkpoints.best_known(read_checkpoint_info(newest))
        return broadcast_object((newest, best))

    def _check_contents(self) -> None:
        """Whether all ranks have read the same, and what the run had read when it began."""
        contents = self._contents
        with together():
            if is_first_here():
                contents.complete()
        contents.check_ranks()
        with together():
            if self.is_main and self.resume_from is not None:
                contents.check(read_checkpoint_info(self.resume_from), self.resume_from)
            elif self.is_main:
                contents.warn()

    @classmethod
    def start(cls, inputs: Inputs, loggers: LogProcess | None = None, contents: Contents | None = None) -> Session:
        """Start the ranks, have the run folder for them alone and build the model. Call it on every rank, when all inputs have
        been read and found good.

        Args:
            loggers: for numbers step by step, see `open_log`; None: the recipe writes its results itself.
            contents: of the data that the recipe has read; None: it has read none that could make it another run.

        Raises:
            UserError: another run is in the folder, the run in it had read something else, or weights cannot be loaded.
        """
        return cls(inputs, loggers, contents or Contents(inputs))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            self._metrics.close("failed" if kind else "success")
        finally:
            self._open.close()

    def at_end(self, close: Callable[[], None]) -> None:
        """Call this when the session ends, however it does."""
        self._open.callback(close)

    def open_log(self) -> None:
        """Once: fill the run folder, with the log of numbers in it. Call it on every rank when model, optimizer and trainer are
        there: nothing is left that bad input, or too little memory, could stop."""
        with together():
            if self.is_main and self._loggers is not None:
                self._lock.check()
                last = self.resumed[0] if self.resume_from else -1
                self._metrics, self._loggers = open_run_log(self.inputs, self._loggers, last), None
        if self._watchdog is None:
            self._watchdog = Watchdog(self.log_dir, self.config.trainer.health.hang_seconds)
            self.at_end(self._watchdog.close)

    @property
    def log_dir(self) -> Path:
        return self.inputs.log_dir

    def _build_model(self) -> PrefixGroupedGPT:
        manager = self.config.exp_manager
        if isinstance(manager, ExpManagerSection) and manager.save_hf:
            make_hf_config(self.config.model)  # raises where transformers has no such model
        if (profile := getattr(self.config.trainer, "profile", None)) is not None:
            profile.check(dist.get_world_size())
        set_seed(self.config.model.seed)
        model = build_gpt(self.config.model, self.device)
        if self.resume_from is not None and not self.config.reads_start:  # all of it is in the checkpoint
            return model
        if self.inputs.pretrained is not None:
            self.inputs.pretrained.load(model)
        else:
            load_tower(model)
        if delta := self.config.pretrained_checkpoint.delta_path:
            places = apply_delta(delta, model)
            logger.info("block %s: as in %s", ", ".join(place.name for place in places), delta)
        if self.inputs.adapter is not None:
            self.inputs.adapter.load(model)
        return model

    def save(
        self,
        engine: Engine,
        step: int,
        state: dict,
        metrics: dict[str, float],
        ended: bool,
        tensors: dict[str, dict] | None = None,
    ) -> Path:
        """Save all that the run needs to go on after this step. Arguments are those of `CheckpointSaver.save`.

        Raises:
            UserError: see `check_folder`.
        """
        self._saver.finish()
        self.check_folder()
        return self._saver.save(engine, step, state, metrics, ended, tensors)

    def save_adapters(self, model: PrefixGroupedGPT, folder: Path) -> None:
        """See `CheckpointSaver`."""
        self._saver.save_adapters(model, folder)

    @property
    def resumed(self) -> tuple[int, dict]:
        """Where the run goes on: (the last step taken, the trainer's state); (0, {}) for a new run."""
        if self.resume_from is None:
            return 0, {}
        trainer = read_checkpoint_info(self.resume_from)["trainer"]
        return trainer["step"], trainer["state"]

    def restore(self, engine: Engine) -> tuple[int, dict]:
        """Put the model and its optimizer where `resumed` is, and return that."""
        folder = self.resume_from
        if folder is not None:
            load_trained(folder, engine.module)
            load_optimizer(folder, engine.module, engine.optimizer)
            engine.scheduler.step(increment=read_checkpoint_info(folder)["trainer"]["scheduler_steps"])
            same = load_rng(folder)
            self.say(f"going on after step {self.resumed[0]} from {folder}")
            if not same:
                self.say(
                    "another number of ranks: random numbers start anew, which no recipe of ours draws while training"
                )
        return self.resumed

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of one step, to the log.

        Raises:
            UserError: `monitor` names none of them, at the first validation.
        """
        assert not (unknown := unknown_metrics(metrics)), f"recipes/run/metrics.py does not know {unknown}"
        self._metrics.write(step, metrics)
        monitor = self.config.exp_manager.checkpoint_callback_params.monitor
        validated = any(name.startswith("val") for name in metrics)
        self._monitored = self._monitored or monitor in metrics
        # Before the first step there is validation alone. Later one may be missing, where no reward came back in time.
        if monitor and validated and not self._monitored and (step > 0 or monitor.startswith("val")):
            raise UserError(
                f"exp_manager.checkpoint_callback_params.monitor={monitor} is no metric of this run; there are "
                f"{', '.join(sorted(metrics))}"
            )

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """What is to be read rather than drawn, to TensorBoard and other loggers."""
        self._metrics.write_table(step, name, columns, rows)

    def progress(self, total: int, what: str, done: int = 0, unit: str = "step"):
        """Over steps, or what the unit says, on rank 0 only; see there."""
        return progress_bar(total, what, unit, done, self.is_main)

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def say_saved(self, folder: Path, step: int, stopped: str) -> None:
        """Where the last checkpoint is, once it is whole, and how to go on if the run has been stopped before its end."""
        self._saver.finish()
        if stopped:
            self.say(f"{stopped} after step {step}: saved in {folder}; exp_manager.resume_if_exists=true goes on")
        else:
            self.say(f"checkpoint in {folder}")

    def must_stop(self) -> str:
        """Why the run must save and stop now, or ""; all ranks agree. For the end of each step: looks after saving, too.

        Raises:
            UserError: see `check_folder`.
        """
        self._saver.finish(wait=False)
        lost = self._lock is not None and self._lock.taken_away
        reason = torch.tensor([LOST if lost else self.inputs.stops.now()], dtype=torch.int32, device=self.device)
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        if (found := int(reason.item())) == LOST:
            self.check_folder()
        return REASONS[found]

    def check_folder(self) -> None:
        """Before results are written; every rank calls it.

        Raises:
            UserError: this run was taken for dead, and another has the folder.
        """
        with together():
            if self._lock is not None:
                self._lock.check()

    @staticmethod
    def gathered(mine: list[str]) -> list[str]:
        """Of all data-parallel ranks, in their order, on every rank."""
        return [x for part in gather_objects(mine, parallel_state.get_data_parallel_group()) for x in part]

    @staticmethod
    def agreed(value: Any) -> Any:
        """Rank 0's value on every rank: what they branch on must be the same to the last bit."""
        return broadcast_object(value)

    def sum_over_data(self, *values: float) -> list[float]:
        """Sums over data-parallel ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.tolist()

    def largest_over_data(self, value: float) -> float:
        """The largest over data-parallel ranks."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        return largest.item()
