"""What every recipe sets up and shares: ranks, tokenizer, model, run folder, metrics, clock.

The order: check the configuration, read the data, start the ranks, build the model, restore it, and only then make the
run folder, so that a bad input costs little and leaves nothing half-written.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.delta import apply_delta
from megatron_ext.models.gpt import PrefixGroupedGPT, build_gpt
from megatron_ext.runtime.checkpoint import (
    load_optimizer,
    load_rng,
    load_weights,
    read_checkpoint_info,
    save_checkpoint,
)
from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed, world_size
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.metrics import MetricsLog, Timers
from recipes.data import Tokenizer, load_tokenizer
from recipes.run_folder import CONFIG_FILE, Checkpoints, check_run_folder, cut_metrics

__all__ = ["Session", "progress_bar"]

logger = logging.getLogger(__name__)

# What must agree between a checkpoint and the YAML: everything that shapes a tensor or the function it computes.
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "vocab_size", "share_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "layernorm_epsilon",
    "position_embedding", "vision", "window_size", "window_attn_skip_freq", "attn_logit_softcapping",
)  # fmt: skip


class Session:
    """One run of one recipe on this rank.

    Args:
        config: what a recipe's YAML says, e.g. an `SFTConfig`.
        resolved: the resolved YAML as plain data, kept beside the results.

    Raises:
        ValueError: anything wrong with the configuration, the checkpoint or the run folder.
    """

    def __init__(self, config: Any, resolved: dict):
        self.config = config
        self.resolved = resolved
        model, trainer = config.model, config.trainer
        asked = trainer.devices * trainer.num_nodes
        if asked != world_size():
            raise ValueError(
                f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes} is {asked}, but the "
                f"launcher started {world_size()} processes"
            )
        manager = config.exp_manager
        self.log_dir = check_run_folder(manager.explicit_log_dir, resolved if manager.resume_if_exists else None)
        self.checkpoints = Checkpoints(self.log_dir, manager.checkpoint_callback_params)
        self.resume_from = self.checkpoints.newest() if manager.resume_if_exists else None
        self.checkpoint = config.pretrained_checkpoint.restore_from_path
        info = read_checkpoint_info(Path(self.checkpoint)) if self.checkpoint else None
        self.tokenizer = self._load_tokenizer()
        model.vocab_size = self.tokenizer.vocab_size
        if info is not None:
            _check_architecture(model, info.get("model", {}), self.checkpoint)
        self.sizes = ParallelSizes(
            model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
        )
        self.sizes.data(world_size())
        self._deadline = _deadline(getattr(trainer, "max_time_per_run", None))

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
        if path is None and self.checkpoint:
            path = str(Path(self.checkpoint) / "tokenizer")
        if path is None:
            raise ValueError("model.tokenizer is not set: name the folder of a Hugging Face tokenizer")
        return load_tokenizer(path)

    def build_model(self) -> PrefixGroupedGPT:
        """The model of this pipeline stage, with the checkpoint's weights if one is named."""
        model = build_gpt(self.config.model, self.device)
        if self.checkpoint:
            load_weights(Path(self.checkpoint), model)
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
                # Saving and going on is ours: Lightning's knows nothing of Megatron's ranks.
                "create_checkpoint_callback": False,
                "seconds_to_sleep": 0,
            }
            trainer = pl.Trainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
            exp_manager(trainer, keys)
            cut_metrics(self.log_dir, int(self.resume_from.name.removeprefix("step-")) if self.resume_from else -1)
            (self.log_dir / CONFIG_FILE).write_text(yaml.safe_dump(self.resolved, sort_keys=False), encoding="utf-8")
            self.metrics = MetricsLog(self.log_dir, trainer.loggers)
        dist.barrier()

    def save(self, engine: Engine, step: int, state: dict, metrics: dict[str, float], ended: bool) -> Path:
        """Save all that the run needs to go on after this step, as `<run>/checkpoints/step-<n>`.

        Args:
            state: the trainer's own, JSON-serialisable; `restore` gives it back.
            metrics: of this step, for `best`.
            ended: whether this is the run's last checkpoint.
        """
        folder = self.checkpoints.path(step)
        fields = {f.name for f in dataclasses.fields(GPTModelConfig)}
        model = {k: v for k, v in dataclasses.asdict(self.config.model).items() if k in fields}
        trainer = {"step": step, "scheduler_steps": engine.scheduler.num_steps, "metrics": metrics, "state": state}
        info = {"model": model, "trainer": trainer, "config": self.resolved, "versions": _versions()}
        if not folder.exists():  # the last step of a run that is started again when it had ended
            save_checkpoint(
                folder,
                engine.module,
                info,
                engine.optimizer,
                lambda unfinished: self.tokenizer.save(unfinished / "tokenizer"),
            )
        if self.is_main:
            self.checkpoints.arrange(step, ended)
        dist.barrier()
        return self.checkpoints.folder / "final" if ended else folder

    def restore(self, engine: Engine) -> tuple[int, dict]:
        """Go on where the run's last checkpoint was taken: (its step, the trainer's state); (0, {}) for a new run."""
        folder = self.resume_from
        if folder is None:
            return 0, {}
        trainer = read_checkpoint_info(folder)["trainer"]
        load_weights(folder, engine.module)
        load_optimizer(folder, engine.module, engine.optimizer)
        engine.scheduler.step(increment=trainer["scheduler_steps"])
        same = load_rng(folder)
        self.say(f"going on after step {trainer['step']} from {folder}")
        if not same:
            self.say("another number of ranks: random numbers start anew, which no recipe of ours draws while training")
        return trainer["step"], trainer["state"]

    def progress(self, total: int, what: str, done: int = 0, unit: str = "step"):
        """A bar over steps, or what the unit says, on rank 0 only."""
        return progress_bar(total, what, unit, done, self.is_main)

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def out_of_time(self) -> bool:
        """Whether max_time_per_run has passed; all ranks agree."""
        late = torch.tensor([time.monotonic() > self._deadline], dtype=torch.int32, device=self.device)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        return bool(late.item())

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


def _check_architecture(model: GPTModelConfig, saved: dict, folder: str) -> None:
    fields = dataclasses.asdict(model)
    for name in ARCHITECTURE:
        here, there = fields[name], saved.get(name)
        if here != there:
            raise ValueError(f"model.{name}={here}, but the checkpoint {folder} was made with {name}={there}")


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("megatron-ext", "megatron-core", "torch")}


def _deadline(text: str | None) -> float:
    if text is None:
        return float("inf")
    try:
        days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f'trainer.max_time_per_run must be quoted and look like "DD:HH:MM:SS", got {text!r}') from None
    return time.monotonic() + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
