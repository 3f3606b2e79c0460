"""What every recipe's YAML may say: one dataclass per section, each key documented where it is defined.

Top-level sections and key names are NeMo-Aligner's. `recipes.cli.config.build` fills these strictly: an unknown key is an
error that names the nearest known one.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.kinds import Layout, Record, Speed, Training
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.placement import Placement
from megatron_ext.runtime.engine import Skipping
from megatron_ext.runtime.optim import OptimConfig
from recipes.cli.config import at_least
from recipes.cli.stopping import seconds_of
from recipes.data.files import existing_files
from recipes.data.video_settings import VideoSettings
from recipes.run.profiling import ProfileSection

__all__ = [
    "CheckpointCallbackSection", "CheckpointSection", "ExpManagerSection", "FolderSection", "GroupedModel", "HealthSection",
    "Machines", "TrainedModel", "TrainerSection", "check_apart", "check_batch_sizes", "check_peft", "check_video",
    "refuse_shared_experts",
]  # fmt: skip

# Which values of a metric are better, by the last word of its name.
BETTER = {
    "loss": "min", "perplexity": "min", "afgb": "min", "reward": "max", "accuracy": "max", "mass": "max", "ub": "max",
    "right": "max", "pass": "max", "majority": "max",
}  # fmt: skip


@dataclass(kw_only=True)
class Machines:
    # Processes (ranks) on each machine: its GPUs, or on a CPU any number.
    devices: Layout[int] = 1
    # Machines that take part, each with as many processes.
    num_nodes: Layout[int] = 1


@dataclass
class HealthSection:
    """When a run is told to be ill, and when it ends for it."""

    # Seconds in which no rank has done anything, not a stream, a token or an answer, after which the run ends; every rank then
    # says where it is. It may take half as long again. Saving a checkpoint, rewards and servers have limits of their own.
    # null: until torch's collectives give up, after half an hour.
    hang_seconds: Record[float | None] = 900.0
    # Optimizer steps in a row that are left out because their gradient is not finite, or above skip_above: parameters stay as
    # they are. One more ends the run, with its batch and a checkpoint saved. 0: the first one does.
    max_skipped: Record[int] = 3
    # The largest norm of a gradient, before clipping, that is applied. null: any that is finite.
    skip_above: Record[float | None] = None
    # Deviations from the median of the 50 steps before at which the gradient norm, the mean reward of GRPO or the loss of SFT is
    # told as a spike, with the rows of the step. null: never.
    spike: Record[float | None] = 10.0

    def __post_init__(self):
        at_least("trainer.health", self, 0, "max_skipped")
        for name in ("hang_seconds", "skip_above", "spike"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"trainer.health.{name}={value} must be above 0, or null")

    @property
    def skipping(self) -> Skipping:
        return Skipping(self.max_skipped, self.skip_above)


@dataclass(kw_only=True)
class TrainerSection(Machines):
    # "DD:HH:MM:SS" (days:hours:minutes:seconds): then stop after the step in hand, and save, so that resume_if_exists
    # goes on. Set it below the limit of a cluster's job. null: no limit.
    max_time_per_run: Record[str | None] = None
    health: HealthSection = field(default_factory=HealthSection)
    # A window of steps looked at by torch's profiler; {}: step 3 on rank 0. null: none.
    profile: Record[ProfileSection | None] = None

    def __post_init__(self):
        seconds_of(self.max_time_per_run)  # raises on another form


@dataclass
class CheckpointCallbackSection:
    """Which checkpoints stay; NeMo's names."""

    # Checkpoints that stay on disk: those best by `monitor`, else the newest; the last one stays always, beside them.
    # -1: all. Lower it where the disk is small.
    save_top_k: int = -1
    # A validation metric of docs/metrics.md, e.g. val/loss or val_rollouts/reward; the link `best` follows it. null:
    # none.
    monitor: str | None = None
    # "min" or "max": which values of `monitor` are better. null: as its name says, max of a reward, accuracy, mass,
    # ub, right, pass_at_k or majority_at_n, min of a loss, perplexity or afgb; others must say it.
    mode: str | None = None
    # Write in processes of their own while training goes on, where steps wait long for the disk; on a CPU this costs
    # the memory of what training overwrites.
    async_save: bool = False

    def __post_init__(self):
        at_least("exp_manager.checkpoint_callback_params", self, -1, "save_top_k")
        if self.mode not in ("min", "max", None):
            raise UserError(f"exp_manager.checkpoint_callback_params.mode must be min or max, got {self.mode!r}")
        if self.monitor is not None:
            self._choose_mode()

    def _choose_mode(self) -> None:
        better = BETTER.get(re.split("[/_]", re.sub(r"_at_\d+$", "", self.monitor))[-1])
        if self.mode is None and better is None:
            raise UserError(
                f"exp_manager.checkpoint_callback_params.monitor={self.monitor}: which of its values are better? Set mode=min or "
                "mode=max beside it"
            )
        if None not in (self.mode, better) and self.mode != better:
            raise UserError(
                f"exp_manager.checkpoint_callback_params.mode={self.mode} would keep the worst by monitor={self.monitor}; set "
                f"mode={better}, or leave it out"
            )
        self.mode = self.mode or better


@dataclass
class FolderSection:
    """Of NeMo's exp_manager keys those of a recipe that writes results, and nothing step by step."""

    # Folder that the run writes to; must be new or empty, or with resume_if_exists hold the same run.
    explicit_log_dir: str
    # Go on from the last checkpoint in explicit_log_dir, on any layout of ranks, or start there if it has none; false:
    # start, in a new folder. Set it where a job may be stopped and started again. SFT, GRPO and LFTF; NIAH trains those of its
    # models that have no result there.
    resume_if_exists: bool = False

    def refuse_resuming(self, what: str) -> None:
        if self.resume_if_exists:
            raise UserError(
                f"exp_manager.resume_if_exists=true: {what} cannot be gone on with, only started; set it to false and choose a "
                "new folder"
            )


@dataclass
class ExpManagerSection(FolderSection):
    """NeMo's exp_manager keys that a Megatron loop can keep."""

    # Write TensorBoard events into the run's folder.
    create_tensorboard_logger: bool = True
    # Log to Weights & Biases, too; wandb_logger_kwargs must hold {name: ..., project: ...}. offline: true beside them,
    # or WANDB_MODE=offline in the environment, keeps it on this machine.
    create_wandb_logger: bool = False
    # Arguments of Lightning's WandbLogger.
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    # Log to MLflow, too (pip install mlflow); mlflow_logger_kwargs may hold {experiment_name: ..., tracking_uri: ...},
    # without a URI it is mlflow.db of this folder, with files in mlflow/ beside it.
    create_mlflow_logger: bool = False
    # Arguments of Lightning's MLFlowLogger.
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint_callback_params: CheckpointCallbackSection = field(default_factory=CheckpointCallbackSection)
    # Write a Hugging Face folder of the best checkpoint so far by checkpoint_callback_params.monitor, without one of the last:
    # the link checkpoints/hf follows it.
    save_hf: bool = False

    def __post_init__(self):
        if self.create_wandb_logger and not {"name", "project"} <= self.wandb_logger_kwargs.keys():
            raise UserError(
                "exp_manager.create_wandb_logger=true needs exp_manager.wandb_logger_kwargs={name: ..., project: ...}"
            )

    def check_installed(self) -> None:
        """
        Raises:
            UserError: a logger is asked for that is not installed here, where the ranks are.
        """
        for name in ("wandb", "mlflow"):
            if getattr(self, f"create_{name}_logger") and importlib.util.find_spec(name) is None:
                raise UserError(f"exp_manager.create_{name}_logger=true: {name} is not installed: pip install {name}")


@dataclass
class CheckpointSection:
    # Folder to start from: a Hugging Face model (docs/huggingface.md lists the families) or one of a run's
    # checkpoints/step-N. It also says the architecture where `model` does not. null, in SFT and GRPO alone: fresh
    # weights.
    restore_from_path: str | None = None
    # File of the weights that were trained, of blocks, parts or heads, to put into that model, as recipes/train_lftf.py leaves it
    # (delta.safetensors). null: none.
    delta_path: str | None = None

    def __post_init__(self):
        if self.delta_path is not None and self.restore_from_path is None:
            raise UserError(
                f"pretrained_checkpoint.delta_path={self.delta_path} needs the checkpoint that it was trained from: set "
                "pretrained_checkpoint.restore_from_path"
            )

    @property
    def name(self) -> str | None:
        """As reports call the model."""
        return self.restore_from_path if self.delta_path is None else f"{self.restore_from_path} with {self.delta_path}"


@dataclass
class TrainedModel(GPTModelConfig):
    # Folder of a Hugging Face tokenizer; null: the one beside the weights of pretrained_checkpoint.
    tokenizer: Training[str | None] = None
    # Seed of fresh weights, of the order of rows and of sampling. Another one repeats an experiment independently.
    seed: Training[int] = 1
    # Packed into one stream, which goes through the model at once: samples in SFT, prompts with all their responses in
    # GRPO, prompts in LFTF. Raise it for speed until memory ends; results do not change.
    micro_batch_size: Speed[int] = 1
    # Samples (SFT), responses (GRPO) or prompts (LFTF) per optimizer step, over all ranks.
    global_batch_size: Training[int] = 1
    optim: Training[OptimConfig] = field(default_factory=OptimConfig)

    def __post_init__(self):
        super().__post_init__()
        at_least("model", self, 0, "seed")
        at_least("model", self, 1, "micro_batch_size", "global_batch_size")

    @property
    def reads_start(self) -> str | None:
        """Why a run reads the weights that it began with also where it goes on; None: it does not."""
        return None if self.peft is None else "model.peft trains adapters that stand on them"


@dataclass
class GroupedModel(TrainedModel):
    """Of sequences that begin alike, what is alike is encoded once."""

    # Tokens of a stream, instead of micro_batch_size (null: that). At least the longest sample (SFT), or a prompt and a response
    # of full length (GRPO): streams are filled with whole groups up to it, a group that is longer is split, and work is balanced
    # over data-parallel ranks.
    micro_batch_tokens: Speed[int | None] = None
    # Encode a group's prompt once (true), or once per response (false): same numbers, other cost. A group is a prompt with its
    # responses (GRPO), or the samples of a stream that have one prompt (SFT; data.keep_together draws them together). "auto":
    # once, unless counting operations promises less than 1.05 times the speed.
    prefix_grouping: Speed[bool | str] = "auto"
    # Sequences that begin alike share that beginning too, from this many tokens on, as prefix trees: responses of a prompt, for
    # turns of a conversation or steps of an agent (GRPO); all samples of a stream, for conversations that go on or a system
    # message that all have (SFT). "auto": from 8 tokens on, in GRPO where responses have several turns, if counting operations
    # promises 1.05 times the speed. null: they share the prompt only.
    min_shared_tokens: Speed[int | str | None] = "auto"

    def __post_init__(self):
        super().__post_init__()
        at_least("model", self, 1, "micro_batch_tokens")
        if isinstance(self.min_shared_tokens, int):
            at_least("model", self, 1, "min_shared_tokens")
        elif self.min_shared_tokens not in ("auto", None):
            raise UserError(f"model.min_shared_tokens must be auto, a number or null, got {self.min_shared_tokens!r}")
        if self.prefix_grouping not in (True, False, "auto"):
            raise UserError(f"model.prefix_grouping must be auto, true or false, got {self.prefix_grouping!r}")
        if self.prefix_grouping is False and isinstance(self.min_shared_tokens, int):
            raise UserError(
                f"model.min_shared_tokens={self.min_shared_tokens} shares beginnings, model.prefix_grouping=false shares "
                "nothing: set one of them otherwise"
            )


def check_apart(trained: Mapping[str, str | None], held_out: Mapping[str, str | None]) -> None:
    """Refuse paths to share a file: what is trained on is not held out.

    Args:
        trained, held_out: paths by their dotted keys; None: not set.
    """
    for (key, path), (other_key, other) in itertools.product(trained.items(), held_out.items()):
        files, others = (
            {os.path.realpath(file): file for file in existing_files(name) or [name] if file is not None}
            for name in (path, other)
        )
        if shared := sorted(files.keys() & others):
            raise UserError(
                f"{key} and {other_key} are the same file, {files[shared[0]]}: what is trained on is not held out; name "
                f"another, or set {other_key}=null"
            )


def check_video(model: GPTModelConfig, video: VideoSettings | None) -> None:
    if video is None:
        return
    if model.vision is None:
        raise UserError(
            f"data.video is set, but the model has no eyes: set model.vision.feature_size={video.feature_size}"
        )


def check_peft(model: TrainedModel, start: CheckpointSection) -> None:
    """Refuse adapters without a model to stand on."""
    if model.peft is not None and start.restore_from_path is None:
        raise UserError(
            "model.peft trains adapters on a model that stays as it is: name one in pretrained_checkpoint.restore_from_path, or "
            "set model.peft=null"
        )


def check_batch_sizes(key: str, global_count: int, data_parallel: int) -> int:
    """Each data-parallel rank's share of `global_count`, which must divide evenly."""
    if global_count % data_parallel:
        raise UserError(f"{key}={global_count} is not divisible by the data-parallel size {data_parallel}")
    return global_count // data_parallel


def refuse_shared_experts(model: Placement) -> None:
    """
    Raises:
        UserError: ranks would wait for each other's tokens in every layer, and each asks its own questions in its own time.
    """
    if model.expert_model_parallel_size > 1:
        raise UserError(
            f"model.expert_model_parallel_size={model.expert_model_parallel_size}: here data-parallel ranks run prompts of their "
            "own in their own time, and experts would wait for them: set it to 1, and spread experts by "
            "model.tensor_model_parallel_size"
        )
