"""What the YAML of LFTF, of locating and of bias evaluation may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.bias.measures import SAMPLES
from megatron_ext.bias.prompts import PromptsConfig
from megatron_ext.blocks.importance import ESTIMATORS, check_estimator, check_excluded
from megatron_ext.blocks.places import GRAINS, PARTS, ModelPlace, check_places, parse_places
from megatron_ext.errors import UserError
from megatron_ext.kinds import Duration, Record, Speed, Training
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
    refuse_shared_experts,
)

__all__ = [
    "BiasEvalConfig", "BiasEvalModel", "LFTFConfig", "LFTFSettings", "LocateConfig", "LocateSettings",
]  # fmt: skip


@dataclass
class LFTFSettings:
    # What trains: a BMI estimator that chooses it (similarity, gradient, intervention, random, last), a block's number from 0,
    # {block: 17, part: attention} (or mlp), {block: 17, heads: [0, 3]}, a list of such, or "all" for full fine-tuning.
    block: Any = "gradient"
    # Among what an estimator chooses: blocks; parts, the attention and the MLP of each block; heads, its attention heads.
    places: str = "blocks"
    # How many of those that it ranks first train.
    num_places: int = 1
    # Numbers, from 0, of blocks that an estimator may not choose, nor anything in them.
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
    # Where one block trains, what enters it is computed once for every row and kept on each rank's host, up to this many
    # GiB in all: training and validations then run that block and those above alone. 0: nothing is kept.
    kept_inputs_gib: Speed[float] = 8.0
    # Folder on a local disk for files that hold it instead of the host's memory, and are gone with the run. null: memory.
    kept_inputs_dir: Speed[str | None] = None
    # Test prompts, evenly spread, that the report shows with what the model goes on to say, before and after. 0: none.
    num_samples: Record[int] = 6
    # Tokens that it says there, at most; the likeliest ones.
    sample_tokens: Record[int] = 24
    # Gradients with a larger norm, over all parameters, are scaled down to it; 0: no clipping. Compare
    # train_optim/grad_norm.
    gradient_clip_val: float = 1.0

    def __post_init__(self):
        if isinstance(self.block, str) and self.block not in (*ESTIMATORS, "all"):
            raise UserError(
                f"trainer.lftf.block must be a number, all or one of {', '.join(ESTIMATORS)}, or {{block: 1, part: mlp}}, "
                f"{{block: 1, heads: [0]}}, a list of such, got {self.block!r}"
            )
        if self.estimator is not None:
            _explain("trainer.lftf.places", check_estimator, self.estimator, self.places)
        elif (self.places, self.num_places) != ("blocks", 1):
            raise UserError(
                f"trainer.lftf.places={self.places} and num_places={self.num_places} are what an estimator chooses among, and "
                f"trainer.lftf.block={self.block} is none: leave them out"
            )
        else:
            _explain("trainer.lftf.block", lambda: self.named_places)
        try:
            self.weights  # noqa: B018  raises on unknown losses
        except UserError as error:
            raise UserError(f"trainer.lftf.loss: {error}") from error
        at_least("trainer.lftf", self, 1, "max_epochs", "max_steps", "val_check_interval", "patience", "max_perplexity",
                 "num_places", "sample_tokens")  # fmt: skip
        at_least("trainer.lftf", self, 2, "locate_prompts")
        at_least("trainer.lftf", self, 0, "gradient_clip_val", "min_pronoun_mass", "save_interval", "kept_inputs_gib",
                 "num_samples")  # fmt: skip
        if self.min_pronoun_mass > 1:
            raise UserError(f"trainer.lftf.min_pronoun_mass={self.min_pronoun_mass} is a share: at most 1")

    @property
    def estimator(self) -> str | None:
        """What chooses; None: the configuration does."""
        return self.block if isinstance(self.block, str) and self.block != "all" else None

    @property
    def named_places(self) -> tuple[ModelPlace, ...] | None:
        """What the configuration names; None: an estimator chooses, or all trains."""
        return None if isinstance(self.block, str) else parse_places(self.block)

    @property
    def most_blocks(self) -> int:
        """In how many blocks something trains, at most; 0: all of the model trains."""
        if self.estimator is not None:
            return self.num_places
        return len({place.block for place in self.named_places or ()})

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
        _refuse_others(self.data.prompts)
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
        if self.model.peft is not None and self.model.peft.restore_from_path is not None:
            raise UserError(
                f"model.peft.restore_from_path={self.model.peft.restore_from_path}: the located block gets adapters of its own "
                "and the others none; put that adapter into the model first (tools/convert_hf.py merge), and set it to null"
            )
        if self.model.gradient_accumulation_fusion:
            raise UserError(
                "model.gradient_accumulation_fusion=true adds to the gradient buffers of all weights, and here there are none "
                "while blocks are located, and one block's while it trains: set it to false"
            )
        refuse_shared_experts(self.model)
        for name in ("moe_aux_loss_coeff", "moe_router_bias_update_rate"):
            if value := getattr(self.model, name):
                raise UserError(
                    f"model.{name}={value} teaches routers beside what is asked of the block: locating by gradients would "
                    "measure it, and the best state would not have it; set it to 0"
                )
        if self.model.pipeline_split.pieces > 1 and lftf.block != "all":
            raise UserError(
                f"model.virtual_pipeline_model_parallel_size={self.model.pipeline_split.pieces} needs weights that train in "
                "every piece of every stage, and here one block does: set it to null"
            )
        if (places := lftf.named_places) is not None:
            sizes = self.model.num_layers, self.model.num_attention_heads
            _explain("trainer.lftf.block", check_places, places, *sizes)
        _explain("trainer.lftf.exclude_blocks", check_excluded, lftf.exclude_blocks, self.model.num_layers)
        if lftf.estimator is not None:
            per_block = {"blocks": 1, "parts": len(PARTS), "heads": self.model.num_attention_heads}[lftf.places]
            most = per_block * (self.model.num_layers - len(lftf.exclude_blocks))
            if lftf.num_places > most:
                raise UserError(
                    f"trainer.lftf.num_places={lftf.num_places}, but there are {most} {lftf.places} to choose from"
                )
        finer = lftf.places != "blocks" or any(place.part for place in lftf.named_places or ())
        if finer and self.model.peft is not None:
            raise UserError(
                "trainer.lftf names parts of blocks or heads, and model.peft gives whole blocks adapters: name whole blocks, and "
                "in model.peft.target_modules which of their linears have some; or set model.peft=null"
            )

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
    # What they rank: blocks; parts, the attention and the MLP of each block; heads, the attention heads of each block. Parts and
    # heads by gradient and intervention, and the controls.
    places: list[str] = field(default_factory=lambda: ["blocks"])
    # Numbers, from 0, of blocks that are not ranked, nor anything in them.
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
        if not self.places:
            raise UserError(f"trainer.locate.places is empty: name some of {', '.join(GRAINS)}")
        for grain in self.places:
            for name in self.estimators:
                _explain("trainer.locate.estimators", check_estimator, name, grain)


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
        _refuse_others(self.data.prompts)
        refuse_shared_experts(self.model)
        if self.pretrained_checkpoint.restore_from_path is None:
            raise UserError("pretrained_checkpoint.restore_from_path is not set: name a checkpoint folder of ours")


@dataclass
class HarnessSection:
    # Tasks, groups or tags of lm-evaluation-harness, asked for likelihoods: arc_easy, openbookqa, mmlu, ...; []: none. Needs the
    # extra harness.
    tasks: list[str] = field(default_factory=list)
    # Folder of tasks of your own, beside the harness's; null: none.
    include_path: str | None = None
    # Examples before each question; null: as each task says.
    num_fewshot: int | None = None
    # Questions of each task, from its first; null: all.
    limit: int | None = None

    def __post_init__(self):
        at_least("data.harness", self, 0, "num_fewshot")
        at_least("data.harness", self, 1, "limit")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"data.harness.tasks={self.tasks} names a task twice")


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
    # Which of its bias types, each with figures of its own: gender, race-color, religion, age, nationality, disability,
    # sexual-orientation, physical-appearance, socioeconomic.
    crows_pairs_types: list[str] = field(default_factory=lambda: ["gender"])
    # File templates.tsv or all_sentences.tsv of Winogender; null: left out.
    winogender_path: str | None = None
    # Winogender's occupations-stats.tsv, to tell its hard questions and compare with women's share of each occupation; null:
    # left out.
    winogender_stats_path: str | None = None
    # WinoBias: a pro_stereotyped file and the anti_stereotyped one of the same type and split, in either order; null:
    # left out.
    winobias_paths: list[str] | None = None
    # BBQ: some of its files data/*.jsonl, each a category; null: left out.
    bbq_paths: list[str] | None = None
    # File dev.json of StereoSet; null: left out.
    stereoset_path: str | None = None
    # Simple co-occurrence: CSV or JSONL with the beginnings of sentences, such as "The nurse was a", as `sentence`; null: left
    # out.
    cooccurrence_path: str | None = None
    # File explicit.jsonl or implicit.jsonl of discrim-eval; null: left out.
    discrim_eval_path: str | None = None
    # General ability, in the same report.
    harness: HarnessSection = field(default_factory=HarnessSection)
    # Folders of earlier evaluations of the same questions: figures stand side by side, with intervals of pairs.
    compare_with: list[str] = field(default_factory=list)
    # Draws of professions, or other clusters, behind each 95 % interval; more of them steady its ends, and take longer.
    bootstrap_samples: int = SAMPLES

    def __post_init__(self):
        if self.split not in ("train", "dev", "test", "all"):
            raise UserError(f"data.split must be train, dev, test or all, got {self.split!r}")
        if self.winobias_paths is not None and len(self.winobias_paths) != 2:
            raise UserError(
                f"data.winobias_paths={self.winobias_paths}: give two, a pro_stereotyped file and the anti_stereotyped one"
            )
        if self.winogender_stats_path and not self.winogender_path:
            raise UserError(
                "data.winogender_stats_path says more of Winogender's questions: set data.winogender_path, too"
            )
        if self.bbq_paths is not None and not self.bbq_paths:
            raise UserError("data.bbq_paths is empty: name files of BBQ, or set it to null")
        if not self.crows_pairs_types or len(set(self.crows_pairs_types)) < len(self.crows_pairs_types):
            raise UserError(
                f"data.crows_pairs_types={self.crows_pairs_types}: name bias types of CrowS-Pairs, each once"
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
        refuse_shared_experts(self.model)
        if self.pretrained_checkpoint.restore_from_path is None:
            raise UserError(
                "pretrained_checkpoint.restore_from_path is not set: name a checkpoint folder of ours, or a Hugging Face one"
            )


def _refuse_others(prompts: PromptsConfig) -> None:
    if prompts.pair.others:
        raise UserError(
            f"data.prompts.pair.others={prompts.pair.others} answers beside the two words that are compared, and training and "
            "locating know those two alone: set it to [] (recipes/eval_bias.py reports them)"
        )


def _explain(key: str, check: Callable[..., None], *arguments: Any) -> None:
    """A check's UserError with the key that it is about."""
    try:
        check(*arguments)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
