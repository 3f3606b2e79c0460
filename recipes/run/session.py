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
import dataclasses
import logging
import shutil
import sys
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
from megatron_ext.hf.export import export_hf
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT, build_gpt
from megatron_ext.runtime.checkpoint import (
    CheckpointSave,
    load_optimizer,
    load_rng,
    load_weights,
    read_checkpoint_info,
)
from megatron_ext.runtime.collectives import broadcast_object, gather_objects, together
from megatron_ext.runtime.distributed import initialize, set_seed
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.metrics import MetricsLog, Timers
from megatron_ext.runtime.progress import PROGRESS
from recipes.cli.stopping import REASONS
from recipes.run.contents import Contents, is_first_here
from recipes.run.inputs import Inputs
from recipes.run.lock import FolderLock
from recipes.run.log_process import LogProcess
from recipes.run.metrics import unknown_metrics
from recipes.run.run_folder import held_run_folder
from recipes.run.run_log import open_run_log
from recipes.run.settings import ExpManagerSection, TrainedModel
from recipes.run.watchdog import Watchdog

__all__ = ["Session", "progress_bar"]

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
        self._saving: CheckpointSave | None = None
        self._saved: tuple[int, bool] | None = None  # the step being saved, and whether it is the last
        self._lock: FolderLock | None = None  # rank 0's
        self._monitored = False  # whether the metric that tells the best checkpoint has been seen
        self._watchdog: Watchdog | None = None
        self._loggers, self._metrics = loggers, MetricsLog(None)
        self._open = contextlib.ExitStack()
        with self._open as opened:  # what is open is closed again if the rest fails
            self.resume_from = self._take_folder()
            self._check_contents()
            self.model = self._build_model() if isinstance(self.config.model, TrainedModel) else None
            self._open = opened.pop_all()

    def _take_folder(self) -> Path | None:
        """Have the run folder for this run alone, and see where it goes on. Rank 0 decides for all: others may see an older
        state of a shared filesystem."""
        manager, newest = self.config.exp_manager, None
        with together():
            if self.is_main:
                resolved = self.inputs.resolved if manager.resume_if_exists else None
                self._lock = self._open.enter_context(
                    held_run_folder(manager.explicit_log_dir, type(self.config), resolved)
                )
                if resolved is not None and self.inputs.checkpoints is not None:
                    newest = self.inputs.checkpoints.newest()
        return broadcast_object(newest)

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
        if delta := self.config.pretrained_checkpoint.delta_path:
            block = apply_delta(delta, model)
            logger.info("block %d is that of %s", block, delta)
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
        """Save all that the run needs to go on after this step, as `<run>/checkpoints/step-<n>`.

        Args:
            state: the trainer's own, JSON-serialisable; `restore` gives it back.
            metrics: of this step, for `best`.
            ended: whether this is the run's last checkpoint.
            tensors: the trainer's own, see `save_checkpoint`.
        """
        self._finish_saving()
        self.check_folder()
        engine.gather_weights()
        folder = self.inputs.checkpoints.path(step)
        fields = {f.name for f in dataclasses.fields(GPTModelConfig)}
        model = {k: v for k, v in dataclasses.asdict(self.config.model).items() if k in fields}
        trainer = {"step": step, "scheduler_steps": engine.scheduler.num_steps, "metrics": metrics, "state": state}
        info = {
            "model": model, "trainer": trainer, "config": self.inputs.resolved, "contents": self._contents.found,
            "versions": self._contents.versions(),
        }  # fmt: skip
        is_new = not self.agreed(folder.exists())
        if self.config.exp_manager.save_hf and is_new and self._is_best(metrics, ended):
            self._save_hf(engine.module, step)
        if is_new:  # the last step of a run that is started again when it had ended
            in_background = self.config.exp_manager.checkpoint_callback_params.async_save and not ended
            with PROGRESS.bounded():  # a large one may take long, and a disk that hangs is torch's to find
                self._saving = CheckpointSave(
                    folder, engine.module, info, engine.optimizer, self._save_companions, tensors, in_background
                )
        self._saved = step, ended
        if self._saving is None or not self._saving.in_background:
            self._finish_saving()
        return self.inputs.checkpoints.folder / "final" if ended else folder

    def _is_best(self, metrics: dict[str, float], ended: bool) -> bool:
        found = False
        with together():
            if self.is_main:
                found = self.inputs.checkpoints.is_best(metrics, ended)
        return self.agreed(found)

    def _save_hf(self, model: PrefixGroupedGPT, step: int) -> None:
        """The weights as they are, for transformers and for servers."""
        target, pretrained = self.inputs.checkpoints.hf(step), self.inputs.pretrained
        tokenizer = self.log_dir / ".tokenizer"
        with together():
            if self.is_main:
                shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before its checkpoint was whole
                self.inputs.tokenizer.save(tokenizer)
        source = pretrained.folder if pretrained is not None and pretrained.hugging_face else None
        try:
            export_hf(model, target, source, tokenizer)
        finally:
            if self.is_main:
                shutil.rmtree(tokenizer, ignore_errors=True)
        with together():
            if self.is_main:
                self.inputs.checkpoints.point_at_hf(step)
        self.say(f"a Hugging Face folder of step {step} is in {target}")

    def _finish_saving(self, wait: bool = True) -> None:
        """See whether the checkpoint in the making is whole, and if so link to it."""
        if self._saved is None:
            return
        if self._saving is not None:
            if wait:
                with PROGRESS.bounded():
                    self._saving.finish()
            elif not self._saving.is_finished():
                return
        with together():
            if self.is_main:
                self.inputs.checkpoints.arrange(*self._saved)
        self._saving = self._saved = None

    def _save_companions(self, checkpoint: Path) -> None:
        self.inputs.tokenizer.save(checkpoint / "tokenizer")
        if self.inputs.pretrained is not None:
            self.inputs.pretrained.copy_source(checkpoint)

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
            load_weights(folder, engine.module)
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
        """A bar over steps, or what the unit says, on rank 0 only."""
        return progress_bar(total, what, unit, done, self.is_main)

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def say_saved(self, folder: Path, step: int, stopped: str) -> None:
        """Where the last checkpoint is, once it is whole, and how to go on if the run has been stopped before its end."""
        self._finish_saving()
        if stopped:
            self.say(f"{stopped} after step {step}: saved in {folder}; exp_manager.resume_if_exists=true goes on")
        else:
            self.say(f"checkpoint in {folder}")

    def must_stop(self) -> str:
        """Why the run must save and stop now, or ""; all ranks agree. For the end of each step: looks after saving, too.

        Raises:
            UserError: see `check_folder`.
        """
        self._finish_saving(wait=False)
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


def progress_bar(total: int, what: str, unit: str, done: int = 0, shown: bool = True) -> tqdm:
    pause = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants a line now and then
    return tqdm(
        total=total, desc=what, unit=unit, initial=done, disable=not shown, dynamic_ncols=True, mininterval=pause
    )
