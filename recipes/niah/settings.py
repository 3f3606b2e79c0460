"""What the YAML of the needle in a video haystack may say."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ext.errors import UserError
from megatron_ext.kinds import Record, Training
from megatron_ext.rotary import find_scheme
from megatron_ext.runtime.optim import OptimConfig
from recipes.cli.config import at_least
from recipes.run.settings import FolderSection, Machines, check_batch_sizes

__all__ = ["LENGTHS_PER_STEP", "NiahConfig", "NiahSettings"]

LENGTHS_PER_STEP = 4  # numbers of frames drawn for one optimizer step


@dataclass
class NiahTransfer:
    """What every model has learnt before, with another scheme than the one that it is tested with."""

    # Position scheme of these steps, by name.
    scheme: str = "rope"
    # Optimizer steps of them, once for every seed; trainer.niah.max_steps are then taken with each scheme, from these weights.
    max_steps: int = 1000

    def __post_init__(self):
        find_scheme(self.scheme)
        at_least("trainer.niah.transfer", self, 1, "max_steps")


@dataclass
class NiahSettings:
    # Optimizer steps of each model, of which there is one for every scheme and seed.
    max_steps: int = 1000
    # Videos of an optimizer step, over all ranks, each with four questions; a multiple of 4 times the data-parallel
    # ranks.
    videos_per_step: int = 32
    # Fewest and most frames of a video that is trained on, at least 2.
    train_frames: list[int] = field(default_factory=lambda: [2, 8])
    # Frames of the videos that are tested, some of them more than any trained on, and some not.
    test_frames: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64, 128])
    # Places of the needle, evenly from the first frame to the last.
    test_depths: int = 5
    # Videos for each number of frames and depth, the same for every scheme.
    test_videos: int = 32
    # Frames from one distractor to the next, before and behind needle A, in videos that are trained on and tested: each looks
    # like A, and is none (V-NIAH-D, arXiv 2502.05173, which tests with 200). null: there are none.
    distractor_period: int | None = None
    # Tokens from top to bottom of a frame, at most 8.
    height: int = 4
    # Tokens from left to right of a frame, at most 8.
    width: int = 4
    # Position schemes that are compared, by name, or by the dotted path of your own.
    schemes: Record[list[str]] = field(
        default_factory=lambda: ["rope", "mrope", "mrope_interleaved", "videorope", "vrope"]
    )
    # Seeds of weights and videos; each trains a model of every scheme. More tell a difference from chance.
    seeds: Record[list[int]] = field(default_factory=lambda: [1, 2, 3])
    # Train with one scheme first, then switch to each of those that are compared: {scheme: rope, max_steps: 1000}. null: each is
    # trained from fresh weights.
    transfer: NiahTransfer | None = None
    # Gradients with a larger norm, over all parameters, are scaled down to it; 0: no clipping.
    gradient_clip_val: float = 1.0

    def __post_init__(self):
        for name in self.schemes:
            find_scheme(name)
        low, high = self.train_frames if len(self.train_frames) == 2 else (0, 0)
        if not 2 <= low <= high or min(self.test_frames, default=0) < 2:
            raise UserError(
                f"trainer.niah.train_frames={self.train_frames} must be [fewest, most] and test_frames={self.test_frames} "
                "not empty, with 2 frames or more: the two needles stand in different ones"
            )
        if min(self.test_frames) > high or max(self.test_frames) <= high:
            raise UserError(
                f"trainer.niah.test_frames={self.test_frames} must have lengths within the trained {low} to {high} and beyond"
            )
        for name in ("test_frames", "schemes", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"trainer.niah.{name}={getattr(self, name)} names something twice")
        if self.distractor_period is not None:
            at_least("trainer.niah", self, 1, "distractor_period")
            if self.distractor_period >= max(self.test_frames):
                raise UserError(
                    f"trainer.niah.distractor_period={self.distractor_period} puts no distractor into videos of up to "
                    f"{max(self.test_frames)} frames: make it smaller, or test longer ones"
                )
        counts = ("max_steps", "videos_per_step", "test_depths", "test_videos", "height", "width")
        at_least("trainer.niah", self, 1, *counts)
        if max(self.height, self.width) > 8:
            raise UserError(
                f"trainer.niah: frames of {self.height} x {self.width} have no answer tokens; 8 x 8 is the most"
            )
        if not self.schemes or not self.seeds:
            raise UserError("trainer.niah.schemes and trainer.niah.seeds must not be empty")


@dataclass
class NiahTrainerSection(Machines):
    niah: NiahSettings = field(default_factory=NiahSettings)


@dataclass
class NiahModel:
    """The model's shape; the task fixes the rest."""

    # Transformer blocks.
    num_layers: int = 3
    # Width of the residual stream.
    hidden_size: int = 96
    # Heads of a block.
    num_attention_heads: int = 4
    # Width inside a block's MLP.
    ffn_hidden_size: int = 288
    # Standard deviation of fresh weights. A small model needs more than the usual 0.02, or its attention stays flat for
    # thousands of steps.
    init_method_std: float = 0.1
    # Base of the rotary frequencies (theta): higher, and positions turn channels slower.
    rotary_base: float = 10000.0
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class NiahConfig:
    trainer: Training[NiahTrainerSection]
    model: Training[NiahModel]
    exp_manager: Record[FolderSection]

    def check_data_parallel(self, ranks: int) -> None:
        """Refuse a batch that data-parallel ranks cannot share evenly."""
        check_batch_sizes("trainer.niah.videos_per_step", self.trainer.niah.videos_per_step, ranks * LENGTHS_PER_STEP)
