"""What the YAML of supervised fine-tuning may say."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ext.errors import UserError
from megatron_ext.kinds import Duration, Record, Training
from recipes.cli.config import at_least
from recipes.data.settings import RowsSection
from recipes.data.video import VideoSettings
from recipes.run.settings import (
    CheckpointSection,
    ExpManagerSection,
    TrainedModel,
    TrainerSection,
    check_apart,
    check_batch_sizes,
    check_video,
)

__all__ = ["SFTConfig", "SFTData", "SFTModel", "SFTSettings", "SFTTrainerSection"]


@dataclass
class SFTSettings:
    # Optimizer steps of the run.
    max_steps: Duration[int]
    # Steps between validations on data.validation_path; 0: never.
    val_check_interval: Record[int] = 0
    # Steps between checkpoints; 0: only the last, and where max_time_per_run stops.
    save_interval: Record[int] = 0
    # Gradients with a larger norm, over all parameters, are scaled down to it; 0: no clipping. Compare
    # train_optim/grad_norm.
    gradient_clip_val: float = 1.0

    def __post_init__(self):
        at_least("trainer.sft", self, 1, "max_steps")
        at_least("trainer.sft", self, 0, "val_check_interval", "save_interval", "gradient_clip_val")


@dataclass
class SFTTrainerSection(TrainerSection):
    sft: SFTSettings


@dataclass
class SFTModel(TrainedModel):
    # Train on the prompt's tokens too, as for plain text; false: on the response alone.
    loss_on_prompt: Training[bool] = False


TURNS = ("last", "all")


@dataclass
class SFTData(RowsSection):
    # Rows {"prompt", "response"} or {"messages"}, with {"video"} or {"features"} beside: a JSONL, parquet or Arrow file, a
    # folder of them, or a pattern; docs/data.md.
    train_path: str | None
    # Rows of the same form whose loss is reported at every validation; null: none.
    validation_path: str | None = None
    # Which of the assistant's messages are learnt: "last", or "all" of a conversation.
    train_on_turns: str = "last"
    # How videos become tokens; null: text only.
    video: VideoSettings | None = None

    def __post_init__(self):
        super().__post_init__()
        trained = {self.train_key(name): section.path for name, section in self.trained.items()}
        if not trained:
            raise UserError(
                "data.train_path is null: name the file with the rows to learn, or several in data.train_sets"
            )
        check_apart(trained, {"data.validation_path": self.validation_path})
        if self.train_on_turns not in TURNS:
            raise UserError(f"data.train_on_turns must be {' or '.join(TURNS)}, got {self.train_on_turns!r}")


@dataclass
class SFTConfig:
    trainer: Training[SFTTrainerSection]
    model: SFTModel
    data: Training[SFTData]
    exp_manager: Record[ExpManagerSection]
    pretrained_checkpoint: Training[CheckpointSection] = field(default_factory=CheckpointSection)

    def __post_init__(self):
        check_video(self.model, self.data.video)
        if self.model.loss_on_prompt and self.data.train_on_turns == "all":
            raise UserError(
                "model.loss_on_prompt=true learns every token, data.train_on_turns=all the assistant's alone: set one of them "
                "otherwise"
            )
        if self.model.loss_on_prompt and self.data.video is not None:
            raise UserError(
                "model.loss_on_prompt=true cannot learn to write videos: set it to false, or data.video to null"
            )

    # What compares with the weights that the run began with, so that it reads them also where it goes on.
    reads_start = None

    def check_data_parallel(self, ranks: int) -> None:
        """Refuse a batch that data-parallel ranks cannot share evenly."""
        check_batch_sizes("model.global_batch_size", self.model.global_batch_size, ranks)
