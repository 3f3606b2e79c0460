"""What the YAML of LFTF, of locating and of bias evaluation may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.bias.prompts import PromptsConfig
from megatron_ext.blocks.blocks import check_block
from megatron_ext.blocks.importance import ESTIMATORS, check_excluded
from megatron_ext.errors import UserError
from megatron_ext.kinds import Duration, Record, Training
from megatron_ext.losses.lftf import loss_weights
from megatron_ext.models.placement import Placement
from recipes.cli.config import at_least
from recipes.run.settings import (
    CheckpointSection,
    ExpManagerSection,
    FolderSection,
    Machines,
    TrainedModel,
    TrainerSection,
    check_apart,
    check_batch_sizes,
)

__all__ = [
    "BiasEvalConfig", "BiasEvalModel", "LFTFConfig", "LFTFSettings", "LocateConfig", "LocateSettings",
]  # fmt: skip


@dataclass
class LFTFSettings:
    # Which block trains: a BMI estimator that chooses it (similarity, gradient, intervention, random, last), its number
    # from 0, or "all" for full fine-tuning.
    block: str | int = "gradient"
    # Numbers, from 0, of blocks that an estimator may not choose.
    exclude_blocks: list[int] = field(default_factory=lambda: [0])
    # Training prompts that an estimator asks, evenly spread over them; null: all. Lower is faster, and the ranking less
    # sure.
    locate_prompts: int | None = 512
    # abs_diff, balanced or sum; with hint and kl beside, and weights: balanced+hint+0.5*kl.
    loss: str = "balanced+hint"
    # Passes over the training prompts that hint at no pronoun, unless max_steps is set; `patience` may end them sooner.
    max_epochs: Duration[int] = 2
    # Optimizer steps of the run, instead of max_epochs; null: as max_epochs has it.
    max_steps: Duration[int | None] = None
    # Optimizer steps between validations on the dev professions; there is one before the first step and one after the
    # last, too.
    val_check_interval: Record[int] = 10
    # Steps between checkpoints to go on from; 0: only the last, and where max_time_per_run stops.
    save_interval: Record[int] = 0
    # Stop after this many validations without a lower AFGB (val/afgb) within the guard; null: never. The best state is
    # kept.
    patience: int | None = 5
    # The guard: a state counts only while the mean of P(he) + P(she) is at least this share of what it was before
    # training; 0: no such guard.
    min_pronoun_mass: float = 0.8
    # The guard, too: while the perplexity of data.validation_text_path, which must be set, is at most this many times
    # what it was before training; null: no such guard.
    max_perplexity: float | None = 1.03
    # Gradients with a larger norm, over all parameters, are scaled down to it; 0: no clipping. Compare
    # train_optim/grad_norm.
    gradient_clip_val: float = 1.0

    def __post_init__(self):
        if isinstance(self.block, str) and self.block not in (*ESTIMATORS, "all"):
            raise UserError(
                f"trainer.lftf.block must be a number, all or one of {', '.join(ESTIMATORS)}, got {self.block!r}"
            )
        try:
            self.weights  # noqa: B018  raises on unknown losses
        except UserError as error:
            raise UserError(f"trainer.lftf.loss: {error}") from error
        at_least("trainer.lftf", self, 1, "max_epochs", "max_steps", "val_check_interval", "patience", "max_perplexity")
        at_least("trainer.lftf", self, 2, "locate_prompts")
        at_least("trainer.lftf", self, 0, "gradient_clip_val", "min_pronoun_mass", "save_interval")
        if self.min_pronoun_mass > 1:
            raise UserError(f"trainer.lftf.min_pronoun_mass={self.min_pronoun_mass} is a share: at most 1")

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses by name."""
        return loss_weights(self.loss)


@dataclass
class LFTFTrainerSection(TrainerSection):
    lftf: LFTFSettings = field(default_factory=LFTFSettings)


@dataclass
class LFTFData:
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    # JSONL rows {"text"} that the loss `kl` keeps the model's predictions of near to those before training; null:
    # without kl.
    text_path: str | None = None
    # JSONL rows {"text"} whose perplexity each validation measures, for max_perplexity; others than text_path's. null:
    # none.
    validation_text_path: str | None = None

    def __post_init__(self):
        check_apart({"data.text_path": self.text_path}, {"data.validation_text_path": self.validation_text_path})


@dataclass
class LFTFConfig:
    trainer: Training[LFTFTrainerSection]
    model: TrainedModel
    data: Training[LFTFData]
    exp_manager: Record[ExpManagerSection]
    pretrained_checkpoint: Training[CheckpointSection]

    def __post_init__(self):
        lftf = self.trainer.lftf
        if self.pretrained_checkpoint.restore_from_path is None:
            raise UserError("pretrained_checkpoint.restore_from_path is not set: name the checkpoint to fine-tune")
        if "kl" in lftf.weights and self.data.text_path is None:
            raise UserError("trainer.lftf.loss has kl, which needs text to stay near to: set data.text_path")
        if lftf.max_perplexity is not None and self.data.validation_text_path is None:
            raise UserError(
                f"trainer.lftf.max_perplexity={lftf.max_perplexity} guards the perplexity of data.validation_text_path, "
                "which is not set: name a file, or set max_perplexity=null"
            )
        if self.model.activations_checkpoint_granularity == "full" and lftf.block != "all":
            raise UserError(
                "model.activations_checkpoint_granularity=full gives a block above frozen ones no gradient: set it to "
                "selective or null (below the block nothing is kept anyway)"
            )
        if self.model.gradient_accumulation_fusion:
            raise UserError(
                "model.gradient_accumulation_fusion=true adds to the gradient buffers of all weights, and here there are none "
                "while blocks are located, and one block's while it trains: set it to false"
            )
        if self.model.pipeline_split.pieces > 1 and lftf.block != "all":
            raise UserError(
                f"model.virtual_pipeline_model_parallel_size={self.model.pipeline_split.pieces} needs weights that train in "
                "every piece of every stage, and here one block does: set it to null"
            )
        if isinstance(lftf.block, int):
            _explain("trainer.lftf.block", check_block, lftf.block, self.model.num_layers)
        _explain("trainer.lftf.exclude_blocks", check_excluded, lftf.exclude_blocks, self.model.num_layers)

    # What compares with the weights that the run began with, so that it reads them also where it goes on.
    reads_start = "trainer.lftf.loss compares with them"

    def check_data_parallel(self, ranks: int) -> None:
        """Refuse a batch that data-parallel ranks cannot share evenly."""
        check_batch_sizes("model.global_batch_size", self.model.global_batch_size, ranks)


@dataclass
class BiasEvalModel(Placement):
    """How a checkpoint is run; its architecture is read from it."""

    # Folder of a Hugging Face tokenizer; null: the one beside the weights.
    tokenizer: Training[str | None] = None


@dataclass
class LocateSettings:
    # What ranks blocks by how much they have to do with the bias, each in turn: similarity, gradient, intervention,
    # random, last (docs/bias.md).
    estimators: list[str] = field(default_factory=lambda: ["similarity", "gradient", "intervention"])
    # Numbers, from 0, of blocks that are not ranked.
    exclude_blocks: list[int] = field(default_factory=lambda: [0])
    # Training prompts that an estimator asks, evenly spread over them; null: all. Lower is faster, and the ranking less
    # sure.
    locate_prompts: int | None = 512
    # Seed of the estimator `random`, which ranks by chance for comparison.
    seed: int = 1

    def __post_init__(self):
        at_least("trainer.locate", self, 2, "locate_prompts")
        if not self.estimators:
            raise UserError(f"trainer.locate.estimators is empty: name some of {', '.join(ESTIMATORS)}")
        if unknown := [name for name in self.estimators if name not in ESTIMATORS]:
            raise UserError(
                f"trainer.locate.estimators: {unknown[0]!r} does not exist; there are: {', '.join(ESTIMATORS)}"
            )


@dataclass
class LocateTrainerSection(Machines):
    locate: LocateSettings = field(default_factory=LocateSettings)


@dataclass
class LocateData:
    # Only the training professions are asked about.
    prompts: PromptsConfig = field(default_factory=PromptsConfig)


@dataclass
class LocateConfig:
    pretrained_checkpoint: Training[CheckpointSection]
    exp_manager: Record[FolderSection]
    trainer: Training[LocateTrainerSection] = field(default_factory=LocateTrainerSection)
    model: BiasEvalModel = field(default_factory=BiasEvalModel)
    data: Training[LocateData] = field(default_factory=LocateData)

    def __post_init__(self):
        self.exp_manager.refuse_resuming("locating")
        if self.pretrained_checkpoint.restore_from_path is None:
            raise UserError("pretrained_checkpoint.restore_from_path is not set: name a checkpoint folder of ours")


@dataclass
class BiasEvalData:
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    # Whose prompts are scored: "test", "dev", "train", or "all" professions. Only "test" is fair to a model trained
    # here.
    split: str = "test"
    # JSONL rows {"text"} whose perplexity is reported, to see whether less bias cost language; null: left out.
    validation_text_path: str | None = None
    # File crows_pairs_anonymized.csv of CrowS-Pairs, a public set of stereotypes; null: left out.
    crows_pairs_path: str | None = None
    # File templates.tsv or all_sentences.tsv of Winogender; null: left out.
    winogender_path: str | None = None
    # WinoBias: a pro_stereotyped file and the anti_stereotyped one of the same type and split, in either order; null:
    # left out.
    winobias_paths: list[str] | None = None
    # Resamplings of professions behind each 95 % confidence interval; more of them steady its ends, and take longer.
    bootstrap_samples: int = 1000

    def __post_init__(self):
        if self.split not in ("train", "dev", "test", "all"):
            raise UserError(f"data.split must be train, dev, test or all, got {self.split!r}")
        if self.winobias_paths is not None and len(self.winobias_paths) != 2:
            raise UserError(
                f"data.winobias_paths={self.winobias_paths}: give two, a pro_stereotyped file and the anti_stereotyped one"
            )
        at_least("data", self, 1, "bootstrap_samples")


@dataclass
class BiasEvalConfig:
    pretrained_checkpoint: Training[CheckpointSection]
    exp_manager: Record[FolderSection]
    trainer: Training[Machines] = field(default_factory=Machines)
    model: BiasEvalModel = field(default_factory=BiasEvalModel)
    data: Training[BiasEvalData] = field(default_factory=BiasEvalData)

    def __post_init__(self):
        self.exp_manager.refuse_resuming("an evaluation")
        if self.pretrained_checkpoint.restore_from_path is None:
            raise UserError(
                "pretrained_checkpoint.restore_from_path is not set: name a checkpoint folder of ours, or a Hugging Face one"
            )


def _explain(key: str, check: Callable[..., None], *arguments: Any) -> None:
    """A check's UserError with the key that it is about."""
    try:
        check(*arguments)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
