"""What the YAML of supervised fine-tuning may say."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ext.errors import UserError
from megatron_ext.kinds import Duration, Record, Training
from recipes.cli.config import at_least
from recipes.data.settings import RowsSection
from recipes.data.video_settings import VideoSettings
from recipes.run.settings import (
    CheckpointSection,
    ExpManagerSection,
    GroupedModel,
    TrainerSection,
    check_apart,
    check_batch_sizes,
    check_peft,
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
class SFTModel(GroupedModel):
    # Train on the prompt's tokens too, as for plain text; false: on the response alone. Then nothing is shared.
    loss_on_prompt: Training[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.encoder_seq_length:
            raise UserError(
                f"model.micro_batch_tokens={self.micro_batch_tokens} is less than model.encoder_seq_length="
                f"{self.encoder_seq_length}: the longest sample must fit"
            )
        if self.loss_on_prompt and (self.prefix_grouping is True or isinstance(self.min_shared_tokens, int)):
            raise UserError(
                "model.loss_on_prompt=true learns prompts, and each of their tokens once per sample: set "
                "model.prefix_grouping=auto and model.min_shared_tokens=auto, or loss_on_prompt=false"
            )


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
    # Rows with the same prompt are drawn one behind the other, in an order that is shuffled by prompts, so that their prompt
    # is encoded once (model.prefix_grouping).
    keep_together: bool = False
    # How videos become tokens; null: text only.
    video: VideoSettings | None = None

    def __post_init__(self):
        super().__post_init__()
        trained = {self.train_key(name): section.path for name, section in self.trained.items()}
        if not trained:
            raise UserError(
                "data.train_path is null: name the file with the rows to learn, or several in data.train_sets"
            )
        if self.streaming and self.keep_together:
            raise UserError(
                "data.keep_together=true looks at the prompts of all rows, and data.streaming=true reads them when they are "
                "drawn: set one of them to false"
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
        check_peft(self.model, self.pretrained_checkpoint)
        if self.model.loss_on_prompt and self.data.train_on_turns == "all":
            raise UserError(
                "model.loss_on_prompt=true learns every token, data.train_on_turns=all the assistant's alone: set one of them "
                "otherwise"
            )
        if self.model.loss_on_prompt and self.data.video is not None:
            raise UserError(
                "model.loss_on_prompt=true cannot learn to write videos: set it to false, or data.video to null"
            )

    @property
    def reads_start(self) -> str | None:
        """Why it reads the weights that the run began with also where it goes on."""
        return self.model.reads_start

    def check_data_parallel(self, ranks: int) -> None:
        """Refuse a batch that data-parallel ranks cannot share evenly."""
        check_batch_sizes("model.global_batch_size", self.model.global_batch_size, ranks)
