"""What every recipe sets up and shares: ranks, tokenizer, model, run folder, metrics, clock.

The order: check the configuration, read the data, start the ranks, build the model, restore it, and only then make the
run folder, so that a bad input costs little and leaves nothing half-written.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_ext.blocks.delta import apply_delta
from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT, build_gpt
from megatron_ext.runtime.checkpoint import (
    CheckpointSave,
    load_optimizer,
    load_rng,
    load_weights,
    read_checkpoint_info,
    remove_unfinished,
)
from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed, world_size
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.metrics import MetricsLog, Timers
from recipes.cli.stopping import REASONS, StopRequests
from recipes.data.tokenizer import Tokenizer, load_tokenizer
from recipes.run.pretrained import Pretrained, sections_of
from recipes.run.run_folder import Checkpoints, check_run_folder, claim_run_folder, cut_metrics

__all__ = ["Session", "progress_bar"]

logger = logging.getLogger(__name__)


class Session:
    """One run of one recipe on this rank.

    Args:
        config: what a recipe's YAML says, e.g. an `SFTConfig`.
        resolved: the resolved YAML as plain data, kept beside the results.

    Raises:
        UserError: anything wrong with the configuration, the checkpoint or the run folder.
    """

    def __init__(self, config: Any, resolved: dict):
        self.config = config
        self.resolved = resolved
        model, trainer = config.model, config.trainer
        asked = trainer.devices * trainer.num_nodes
        if asked != world_size():
            raise UserError(
                f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes} is {asked}, but the "
                f"launcher started {world_size()} processes"
            )
        manager = config.exp_manager
        self.log_dir = check_run_folder(manager.explicit_log_dir, resolved if manager.resume_if_exists else None)
        self.checkpoints = Checkpoints(self.log_dir, manager.checkpoint_callback_params)
        self.resume_from = self.checkpoints.newest() if manager.resume_if_exists else None
        if self.resume_from is not None and config.model.position_embedding.sections is None:
            config.model.position_embedding.sections = sections_of(read_checkpoint_info(self.resume_from)["model"])
        path = config.pretrained_checkpoint.restore_from_path
        self.pretrained = Pretrained.open(path) if path else None
        self.tokenizer = self._load_tokenizer()
        if model.vocab_size is None:
            model.vocab_size = self.tokenizer.vocab_size
        if self.pretrained is not None:
            self.pretrained.check(model)
        if model.vocab_size < self.tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size={model.vocab_size} is less than the {self.tokenizer.vocab_size} tokens of "
                f"{self.tokenizer.path}: take the tokenizer that belongs to the model, or leave model.vocab_size out"
            )
        self.sizes = ParallelSizes(
            model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
        )
        self.sizes.data(world_size())
        self._saving: CheckpointSave | None = None
        self._saved: tuple[int, bool] | None = None  # the step being saved, and whether it is the last
        looks = os.environ.get("RANK", "0") == "0"
        self._stop_requests = StopRequests(getattr(trainer, "max_time_per_run", None), looks)

    def start(self) -> None:
        """Start the ranks. Call it when all inputs have been read and found good."""
        self.device = initialize(self.sizes)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.is_main = dist.get_rank() == 0
        self.timers = Timers()
        self.metrics = MetricsLog(None)
        set_seed(self.config.model.seed)

    def _load_tokenizer(self) -> Tokenizer:
        path = self.config.model.tokenizer
        if path is None and self.pretrained is not None:
            path = self.pretrained.tokenizer
        if path is None:
            raise UserError(
                "model.tokenizer is not set: name the folder of a Hugging Face tokenizer, or a model to start from in "
                "pretrained_checkpoint.restore_from_path"
            )
        return load_tokenizer(path)

    def build_model(self) -> PrefixGroupedGPT:
        """The model of this pipeline stage, with the checkpoint's weights if one is named."""
        model = build_gpt(self.config.model, self.device)
        if self.pretrained is not None:
            self.pretrained.load(model)
        if delta := self.config.pretrained_checkpoint.delta_path:
            block = apply_delta(delta, model)
            logger.info("block %d is that of %s", block, delta)
        return model

    def open_run_folder(self) -> None:
        """Make the run folder with NeMo's exp_manager (rank 0 alone: every other rank would wait for it and write
        nothing) and keep the resolved configuration in it. Call it when all inputs are known to be good."""
        if self.is_main:
            import lightning.pytorch as pl
            import yaml
            from nemo.utils import logging as nemo_logging
            from nemo.utils.exp_manager import exp_manager

            nemo_logging.setLevel(nemo_logging.WARNING)
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
            manager = self.config.exp_manager
            keys = {
                "explicit_log_dir": manager.explicit_log_dir,
                "create_tensorboard_logger": manager.create_tensorboard_logger,
                "create_wandb_logger": manager.create_wandb_logger,
                "wandb_logger_kwargs": manager.wandb_logger_kwargs,
                # Saving and going on is ours: Lightning's knows nothing of Megatron's ranks.
                "create_checkpoint_callback": False,
                "seconds_to_sleep": 0,
            }
            trainer = pl.Trainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
            claim_run_folder(self.log_dir, self.resolved)
            exp_manager(trainer, keys)
            remove_unfinished(self.checkpoints.folder)
            cut_metrics(self.log_dir, int(self.resume_from.name.removeprefix("step-")) if self.resume_from else -1)
            write_whole(self.log_dir / "config.yaml", yaml.safe_dump(self.resolved, sort_keys=False))
            loggers = list(trainer.loggers)
            if manager.create_mlflow_logger:  # exp_manager of NeMo 3.0 cannot: it names the run twice
                from lightning.pytorch.loggers import MLFlowLogger

                place = {"tracking_uri": f"sqlite:///{(self.log_dir / 'mlflow.db').absolute()}"}
                loggers.append(MLFlowLogger(**(place | manager.mlflow_logger_kwargs)))
            self.metrics = MetricsLog(self.log_dir, loggers)
        dist.barrier()

    def save(
        self,
        engine: Engine,
        step: int,
        state: dict,
        metrics: dict[str, float],
        ended: bool,
        extra: dict[str, dict] | None = None,
    ) -> Path:
        """Save all that the run needs to go on after this step, as `<run>/checkpoints/step-<n>`.

        Args:
            state: the trainer's own, JSON-serialisable; `restore` gives it back.
            metrics: of this step, for `best`.
            ended: whether this is the run's last checkpoint.
            extra: the trainer's own tensors, see `save_checkpoint`.
        """
        self._finish_saving()
        folder = self.checkpoints.path(step)
        fields = {f.name for f in dataclasses.fields(GPTModelConfig)}
        model = {k: v for k, v in dataclasses.asdict(self.config.model).items() if k in fields}
        trainer = {"step": step, "scheduler_steps": engine.scheduler.num_steps, "metrics": metrics, "state": state}
        info = {"model": model, "trainer": trainer, "config": self.resolved, "versions": _versions()}
        if not folder.exists():  # the last step of a run that is started again when it had ended
            in_background = self.config.exp_manager.checkpoint_callback_params.async_save and not ended
            self._saving = CheckpointSave(
                folder, engine.module, info, engine.optimizer, self._save_companions, extra, in_background
            )
        self._saved = step, ended
        if self._saving is None or not self._saving.in_background:
            self._finish_saving()
        return self.checkpoints.folder / "final" if ended else folder

    def _finish_saving(self, wait: bool = True) -> None:
        """See whether the checkpoint in the making is whole, and if so link to it."""
        if self._saved is None:
            return
        if self._saving is not None:
            if wait:
                self._saving.finish()
            elif not self._saving.is_finished():
                return
        if self.is_main:
            self.checkpoints.arrange(*self._saved)
        dist.barrier()
        self._saving = self._saved = None

    def _save_companions(self, checkpoint: Path) -> None:
        self.tokenizer.save(checkpoint / "tokenizer")
        if self.pretrained is not None:
            self.pretrained.copy_source(checkpoint)

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
        self.metrics.write(step, metrics)
        monitor = self.config.exp_manager.checkpoint_callback_params.monitor
        validated = any(name.startswith("val") for name in metrics)
        # Before the first step there is validation alone.
        if monitor and validated and monitor not in metrics and (step > 0 or monitor.startswith("val")):
            raise UserError(
                f"exp_manager.checkpoint_callback_params.monitor={monitor} is no metric of this run; there are "
                f"{', '.join(sorted(metrics))}"
            )

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
        """Why the run must save and stop now, or ""; all ranks agree. For the end of each step: looks after saving, too."""
        self._finish_saving(wait=False)
        reason = torch.tensor([self._stop_requests.now()], dtype=torch.int32, device=self.device)
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        return REASONS[int(reason.item())]

    @staticmethod
    def agreed(value: Any) -> Any:
        """Rank 0's value on every rank: what they branch on must be the same to the last bit."""
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def sum_over_data(self, *values: float) -> list[float]:
        """Sums over data-parallel ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.tolist()

    def close(self) -> None:
        self.metrics.close()


def progress_bar(total: int, what: str, unit: str, done: int = 0, shown: bool = True) -> tqdm:
    pause = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants a line now and then
    return tqdm(
        total=total, desc=what, unit=unit, initial=done, disable=not shown, dynamic_ncols=True, mininterval=pause
    )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("megatron-ext", "megatron-core", "torch")}
