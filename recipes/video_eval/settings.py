"""What the YAML of an evaluation on videos may say."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ext.errors import UserError
from megatron_ext.kinds import Record, Training
from megatron_ext.models.placement import Placement
from recipes.cli.config import at_least
from recipes.data.settings import RowsSection
from recipes.data.video_settings import VideoSettings
from recipes.run.settings import CheckpointSection, FolderSection, Machines, refuse_shared_experts
from recipes.video_eval.sets import SETS

__all__ = ["VideoEvalConfig"]

SCORING = ("letter", "text")


@dataclass
class VideoEvalModel(Placement):
    """How a checkpoint is run; its architecture is read from it."""

    # Folder of a Hugging Face tokenizer; null: the one beside the weights.
    tokenizer: Training[str | None] = None


@dataclass(kw_only=True)
class VideoEvalData:
    # Questions: a JSONL, parquet or Arrow file, a JSON list, a folder or a pattern of them.
    path: str
    # Whose columns they have: rows {video, question, options, answer, category}, or videomme, mvbench, longvideobench,
    # tempcompass, egoschema.
    set: str = "rows"
    # Folder that clips' names are relative to; null: that of their row's file.
    videos: str | None = None
    # How images and videos become tokens: as the model was trained.
    video: VideoSettings = field(default_factory=VideoSettings)
    # What the model reads; {options} are lines with a letter each.
    prompt: str = "<video>\n{question}\n{options}\nAnswer with the option's letter.\nAnswer:"
    # What stands between the prompt and the letter or text that is scored, such as a space; null: a space, or nothing in a
    # conversation.
    before_answer: str | None = None
    # The prompt is what a user says: the chat template writes it, and the answer is the assistant's.
    prompt_as_message: bool = False
    # As in training, with prompt_as_message.
    chat_template: str | None = None
    # As in training, with prompt_as_message.
    system_prompt: str | None = None
    # Which option is the likeliest: by its "letter", or by its whole "text", divided by its number of tokens.
    scoring: str = "letter"
    # Only so many questions, evenly spread over them; null: all.
    max_questions: int | None = None

    def __post_init__(self):
        if self.set not in SETS:
            raise UserError(f"data.set must be one of {', '.join(SETS)}, got {self.set!r}")
        if self.scoring not in SCORING:
            raise UserError(f"data.scoring must be {' or '.join(SCORING)}, got {self.scoring!r}")
        for part in ("{question}", "{options}"):
            if part not in self.prompt and (part == "{question}" or self.scoring == "letter"):
                raise UserError(f"data.prompt={self.prompt!r} must have {part} in it")
        for name in ("chat_template", "system_prompt"):
            if getattr(self, name) is not None and not self.prompt_as_message:
                raise UserError(f"data.{name} is set, and data.prompt_as_message=false: no conversation is written")
        at_least("data", self, 1, "max_questions")

    @property
    def rows(self) -> RowsSection:
        return RowsSection(chat_template=self.chat_template, system_prompt=self.system_prompt)


@dataclass
class VideoEvalConfig:
    pretrained_checkpoint: Training[CheckpointSection]
    exp_manager: Record[FolderSection]
    data: Training[VideoEvalData]
    trainer: Training[Machines] = field(default_factory=Machines)
    model: VideoEvalModel = field(default_factory=VideoEvalModel)

    def __post_init__(self):
        self.exp_manager.refuse_resuming("an evaluation")
        refuse_shared_experts(self.model)
        if self.pretrained_checkpoint.restore_from_path is None:
            raise UserError(
                "pretrained_checkpoint.restore_from_path is not set: name a checkpoint folder of ours, or a Hugging Face one"
            )
