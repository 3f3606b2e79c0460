"""What a recipe's YAML may say: one dataclass per section, each key documented where it is defined.

Top-level sections and key names are NeMo-Aligner's. `recipes.config.build` fills these strictly: an unknown key is an
error that names the nearest known one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.bias.prompts import PromptsConfig
from megatron_ext.losses.grpo import GrpoTerms
from megatron_ext.losses.lftf import loss_weights
from megatron_ext.models.blocks import check_block
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.generation import SamplingParams
from megatron_ext.models.locate import ESTIMATORS, check_excluded
from megatron_ext.runtime.engine import OptimConfig
from recipes.config import at_least
from recipes.video import VideoSettings

__all__ = [
    "BiasEvalConfig",
    "GRPOConfig",
    "LFTFConfig",
    "LocateConfig",
    "SFTConfig",
    "TrainedModel",
    "check_batch_sizes",
]


@dataclass
class CheckpointCallbackSection:
    """Which checkpoints stay; NeMo's names."""

    # How many: those best by `monitor`, else the newest; the last one stays always. -1: all.
    save_top_k: int = -1
    # A validation metric, e.g. val/loss or val_rollouts/reward; the link `best` follows it. null: none.
    monitor: str | None = None
    # "min" or "max": which of its values are better.
    mode: str = "min"
    # Write in processes of their own while training goes on; on a CPU this costs the memory of what training overwrites.
    async_save: bool = False

    def __post_init__(self):
        at_least("exp_manager.checkpoint_callback_params", self, -1, "save_top_k")
        if self.mode not in ("min", "max"):
            raise ValueError(f"exp_manager.checkpoint_callback_params.mode must be min or max, got {self.mode!r}")


@dataclass
class ExpManagerSection:
    """NeMo's exp_manager keys that a Megatron loop can keep."""

    # Folder of this run; must be new or empty, or with resume_if_exists hold the same run.
    explicit_log_dir: str
    create_tensorboard_logger: bool = True
    # Weights & Biases, with {name: ..., project: ..., offline: true}. WANDB_MODE=offline keeps it on this machine, too.
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    # MLflow (pip install mlflow), with {experiment_name: ..., tracking_uri: ...}; without a URI into mlflow.db of this folder.
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    # Go on from the last checkpoint in explicit_log_dir if there is one, on any layout of ranks.
    resume_if_exists: bool = False
    checkpoint_callback_params: CheckpointCallbackSection = field(default_factory=CheckpointCallbackSection)

    def __post_init__(self):
        if self.create_wandb_logger and not {"name", "project"} <= self.wandb_logger_kwargs.keys():
            raise ValueError(
                "exp_manager.create_wandb_logger=true needs exp_manager.wandb_logger_kwargs={name: ..., project: ...}"
            )
        for name in ("wandb", "mlflow"):
            if getattr(self, f"create_{name}_logger") and importlib.util.find_spec(name) is None:
                raise ValueError(f"exp_manager.create_{name}_logger=true: {name} is not installed: pip install {name}")


@dataclass
class CheckpointSection:
    # A Hugging Face folder (Llama, Mistral, Qwen2, Qwen3) or a checkpoint folder of ours to start from.
    restore_from_path: str | None = None
    # A block's weights to put into it, as recipes/train_lftf.py leaves them (delta.safetensors).
    delta_path: str | None = None

    def __post_init__(self):
        if self.delta_path is not None and self.restore_from_path is None:
            raise ValueError(
                f"pretrained_checkpoint.delta_path={self.delta_path} needs the checkpoint that it was trained from: set "
                "pretrained_checkpoint.restore_from_path"
            )


@dataclass
class SFTSettings:
    max_steps: int
    # Steps between validations; 0: never.
    val_check_interval: int = 0
    # Steps between checkpoints; 0: only the last.
    save_interval: int = 0
    # Largest global gradient norm; 0: no clipping.
    gradient_clip_val: float = 1.0

    def __post_init__(self):
        at_least("trainer.sft", self, 1, "max_steps")
        at_least("trainer.sft", self, 0, "val_check_interval", "save_interval", "gradient_clip_val")


@dataclass
class SFTTrainerSection:
    sft: SFTSettings
    # Processes on each machine.
    devices: int = 1
    num_nodes: int = 1
    # "DD:HH:MM:SS": stop after the step in hand, and save.
    max_time_per_run: str | None = None


@dataclass
class SamplingSection:
    use_greedy: bool = False
    temperature: float = 1.0
    # 0: no filter. Log-probabilities are those of the unfiltered distribution, so a filter biases the gradient.
    top_k: int = 0
    # 1: no filter; else as for top_k.
    top_p: float = 1.0


@dataclass
class LengthSection:
    # Longest response, in tokens.
    max_length: int = 1024


@dataclass
class GRPOSettings:
    max_steps: int
    num_prompts_per_grpo_step: int
    samples_per_prompt: int
    # A name of the registry, {name: ..., options}, or the dotted path of a function.
    reward: Any
    # Prompts decoded together on one data-parallel rank; None: all at once.
    rollout_micro_batch_size: int | None = None
    # Steps between validations, and one before the first step; 0: never.
    val_check_interval: int = 0
    # Steps between checkpoints; 0: only the last.
    save_interval: int = 0
    # Largest global gradient norm; 0: no clipping.
    gradient_clip_val: float = 1.0
    # beta, the weight of the KL divergence to the initial policy; 0: no reference pass.
    initial_policy_kl_penalty: float = 0.0
    reference_policy_kl_type: str = "k3"
    use_leave_one_out_baseline: bool = False
    normalize_rewards: bool = True
    # Symmetric clip; ratio_clip_min and ratio_clip_max override it.
    ratio_eps: float = 0.2
    ratio_clip_min: float | None = None
    ratio_clip_max: float | None = None
    # True: every token of the batch weighs the same; False: every response does.
    token_level_loss: bool = True
    # One ratio per response, the mean over its tokens; with token_level_loss=false this is GSPO.
    sequence_level_importance_ratios: bool = False
    # True: responses cut off at max_length, without an end, are not trained on (DAPO).
    overlong_filtering: bool = False
    entropy_bonus: float = 0.0
    sampling_params: SamplingSection = field(default_factory=SamplingSection)
    length_params: LengthSection = field(default_factory=LengthSection)

    def __post_init__(self):
        at_least("trainer.grpo", self, 1, "max_steps", "num_prompts_per_grpo_step", "rollout_micro_batch_size")
        at_least(
            "trainer.grpo", self, 0, "val_check_interval", "save_interval", "gradient_clip_val",
            "initial_policy_kl_penalty",
        )  # fmt: skip
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"trainer.grpo.samples_per_prompt={self.samples_per_prompt}: a response is compared with the others of "
                "its group, so at least 2 are needed"
            )
        if self.sampling_params.use_greedy:
            raise ValueError(
                "trainer.grpo.sampling_params.use_greedy=true makes all responses of a group alike, which teaches "
                "nothing; set it to false (validation is greedy anyway)"
            )
        self.terms  # noqa: B018  raises on bad coefficients
        self.sampling(stop_token_id=None)

    def sampling(self, stop_token_id: int | None) -> SamplingParams:
        """How rollouts are sampled."""
        chosen = self.sampling_params
        try:
            return SamplingParams(
                max_new_tokens=self.length_params.max_length,
                stop_token_id=stop_token_id,
                use_greedy=chosen.use_greedy,
                temperature=chosen.temperature,
                top_k=chosen.top_k,
                top_p=chosen.top_p,
            )
        except ValueError as error:
            raise ValueError(f"trainer.grpo.sampling_params / length_params: {error}") from error

    @property
    def terms(self) -> GrpoTerms:
        low, high = self.ratio_clip_min, self.ratio_clip_max
        return GrpoTerms(
            ratio_clip_min=self.ratio_eps if low is None else low,
            ratio_clip_max=self.ratio_eps if high is None else high,
            kl_penalty=self.initial_policy_kl_penalty,
            kl_type=self.reference_policy_kl_type,
            sequence_level_ratios=self.sequence_level_importance_ratios,
            entropy_bonus=self.entropy_bonus,
        )


@dataclass
class GRPOTrainerSection:
    grpo: GRPOSettings
    # Processes on each machine.
    devices: int = 1
    num_nodes: int = 1
    # "DD:HH:MM:SS": stop after the step in hand, and save.
    max_time_per_run: str | None = None


@dataclass
class LFTFSettings:
    # Which block trains: a BMI estimator that chooses it (similarity, gradient, intervention, random, last), its number,
    # or "all" for full fine-tuning.
    block: str | int = "gradient"
    # Blocks that an estimator may not choose.
    exclude_blocks: list[int] = field(default_factory=lambda: [0])
    # Training prompts that an estimator asks, evenly spread over them; null: all.
    locate_prompts: int | None = 512
    # abs_diff, balanced or sum; with hint and kl beside, and weights: balanced+hint+0.5*kl.
    loss: str = "balanced+hint"
    # Passes over the training prompts.
    max_epochs: int = 2
    # Optimizer steps instead.
    max_steps: int | None = None
    # Steps between validations on the dev professions.
    val_check_interval: int = 10
    # Steps between checkpoints to go on from; 0: only the last, and where max_time_per_run stops.
    save_interval: int = 0
    # Stop after this many validations without a lower AFGB within the guard; null: never.
    patience: int | None = 5
    # The guard: a state counts only while the mean of P(he) + P(she) is at least this share of what it was; 0: no guard.
    min_pronoun_mass: float = 0.8
    # And while the perplexity of data.validation_text_path is at most this many times what it was; null: no guard.
    max_perplexity: float | None = 1.03
    # Largest global gradient norm; 0: no clipping.
    gradient_clip_val: float = 1.0

    def __post_init__(self):
        if isinstance(self.block, str) and self.block not in (*ESTIMATORS, "all"):
            raise ValueError(
                f"trainer.lftf.block must be a number, all or one of {', '.join(ESTIMATORS)}, got {self.block!r}"
            )
        try:
            self.weights  # noqa: B018  raises on unknown losses
        except ValueError as error:
            raise ValueError(f"trainer.lftf.loss: {error}") from error
        at_least("trainer.lftf", self, 1, "max_epochs", "max_steps", "val_check_interval", "patience", "max_perplexity")
        at_least("trainer.lftf", self, 2, "locate_prompts")
        at_least("trainer.lftf", self, 0, "gradient_clip_val", "min_pronoun_mass", "save_interval")
        if self.min_pronoun_mass > 1:
            raise ValueError(f"trainer.lftf.min_pronoun_mass={self.min_pronoun_mass} is a share: at most 1")

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses by name."""
        return loss_weights(self.loss)


@dataclass
class LFTFTrainerSection:
    lftf: LFTFSettings = field(default_factory=LFTFSettings)
    # Processes on each machine.
    devices: int = 1
    num_nodes: int = 1
    # "DD:HH:MM:SS": stop after the step in hand, and save.
    max_time_per_run: str | None = None


@dataclass
class LocateSettings:
    # BMI estimators: similarity, gradient, intervention, random, last.
    estimators: list[str] = field(default_factory=lambda: ["similarity", "gradient", "intervention"])
    # Blocks that are not ranked.
    exclude_blocks: list[int] = field(default_factory=lambda: [0])
    # Training prompts that an estimator asks, evenly spread over them; null: all.
    locate_prompts: int | None = 512
    # Of the estimator `random`.
    seed: int = 1

    def __post_init__(self):
        at_least("trainer.locate", self, 2, "locate_prompts")
        if not self.estimators:
            raise ValueError(f"trainer.locate.estimators is empty: name some of {', '.join(ESTIMATORS)}")
        if unknown := [name for name in self.estimators if name not in ESTIMATORS]:
            raise ValueError(
                f"trainer.locate.estimators: {unknown[0]!r} does not exist; there are: {', '.join(ESTIMATORS)}"
            )


@dataclass
class LocateTrainerSection:
    locate: LocateSettings = field(default_factory=LocateSettings)
    # Processes on each machine.
    devices: int = 1
    num_nodes: int = 1


@dataclass
class BiasEvalTrainerSection:
    # Processes on each machine.
    devices: int = 1
    num_nodes: int = 1


@dataclass
class TrainedModel(GPTModelConfig):
    # Folder of a Hugging Face tokenizer; None: the one beside the weights of pretrained_checkpoint.
    tokenizer: str | None = None
    seed: int = 1
    # Packed per stream: samples in SFT, prompts with all their responses in GRPO, prompts in LFTF.
    micro_batch_size: int = 1
    # Samples (SFT), responses (GRPO) or prompts (LFTF) per optimizer step, over all ranks.
    global_batch_size: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        super().__post_init__()
        at_least("model", self, 0, "seed")
        at_least("model", self, 1, "micro_batch_size", "global_batch_size")


@dataclass
class SFTModel(TrainedModel):
    # Train on the prompt's tokens too.
    loss_on_prompt: bool = False


@dataclass
class GRPOModel(TrainedModel):
    # Tokens of a stream, instead of micro_batch_size: streams are filled with whole groups up to it, a group that is
    # longer is split, and work is balanced over data-parallel ranks.
    micro_batch_tokens: int | None = None
    # Encode a group's prompt once (true), or once per response (false): same numbers, other cost. "auto": once, unless
    # counting operations promises less than 1.05 times the speed.
    prefix_grouping: bool | str = "auto"
    # Responses of a prompt that begin alike share that beginning too, from this many tokens on: prefix trees, for turns
    # of a conversation or steps of an agent; prefix_grouping: auto is then on. null: they share the prompt only.
    min_shared_tokens: int | None = None

    def __post_init__(self):
        super().__post_init__()
        at_least("model", self, 1, "micro_batch_tokens", "min_shared_tokens")
        if self.prefix_grouping not in (True, False, "auto"):
            raise ValueError(f"model.prefix_grouping must be auto, true or false, got {self.prefix_grouping!r}")
        if self.prefix_grouping is False and self.min_shared_tokens is not None:
            raise ValueError(
                f"model.min_shared_tokens={self.min_shared_tokens} shares beginnings, model.prefix_grouping=false shares "
                "nothing: set one of them otherwise"
            )


@dataclass
class BiasEvalModel:
    """How a checkpoint is spread over ranks; its architecture is read from it."""

    # Folder of a Hugging Face tokenizer; null: the one beside the weights.
    tokenizer: str | None = None
    # "32", "bf16", or "auto": bf16 on a GPU and fp32 on a CPU.
    precision: str = "auto"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    transformer_impl: str = "auto"
    attention_kernel: str = "auto"


@dataclass
class SFTData:
    # JSONL rows {"prompt", "response"} or {"messages"}, with {"video"} or {"features"} beside.
    train_path: str
    validation_path: str | None = None
    # How videos become tokens; null: text only.
    video: VideoSettings | None = None


@dataclass
class GRPOData:
    # JSONL rows {"prompt" or "messages", and what the reward reads}, with {"video"} or {"features"} beside.
    train_path: str
    validation_path: str | None = None
    # Longest prompt, in tokens; those of its videos count.
    max_prompt_length: int = 1024
    # How videos become tokens; null: text only.
    video: VideoSettings | None = None


@dataclass
class LFTFData:
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    # JSONL rows {"text"} that the loss `kl` keeps the model near to.
    text_path: str | None = None
    # JSONL rows {"text"} whose perplexity is watched; others than text_path's.
    validation_text_path: str | None = None


@dataclass
class BiasEvalData:
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    # "test", "dev", "train", or "all" professions.
    split: str = "test"
    # JSONL rows {"text"} whose perplexity is reported.
    validation_text_path: str | None = None
    # crows_pairs_anonymized.csv; null: left out.
    crows_pairs_path: str | None = None
    # Winogender's templates.tsv or all_sentences.tsv.
    winogender_path: str | None = None
    # WinoBias: [pro_stereotyped file, anti_stereotyped file].
    winobias_paths: list[str] | None = None
    # Resamplings of professions behind each confidence interval.
    bootstrap_samples: int = 1000

    def __post_init__(self):
        if self.split not in ("train", "dev", "test", "all"):
            raise ValueError(f"data.split must be train, dev, test or all, got {self.split!r}")
        if self.winobias_paths is not None and len(self.winobias_paths) != 2:
            raise ValueError(
                f"data.winobias_paths={self.winobias_paths}: give [pro_stereotyped file, anti_stereotyped file]"
            )
        at_least("data", self, 1, "bootstrap_samples")


@dataclass
class SFTConfig:
    trainer: SFTTrainerSection
    model: SFTModel
    data: SFTData
    exp_manager: ExpManagerSection
    pretrained_checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def __post_init__(self):
        _check_video(self.model, self.data.video)
        if self.model.loss_on_prompt and self.data.video is not None:
            raise ValueError(
                "model.loss_on_prompt=true cannot learn to write videos: set it to false, or data.video to null"
            )


@dataclass
class GRPOConfig:
    trainer: GRPOTrainerSection
    model: GRPOModel
    data: GRPOData
    exp_manager: ExpManagerSection
    pretrained_checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def __post_init__(self):
        grpo, model = self.trainer.grpo, self.model
        _check_video(model, self.data.video)
        longest = self.data.max_prompt_length + grpo.length_params.max_length
        if longest > model.encoder_seq_length:
            raise ValueError(
                f"data.max_prompt_length={self.data.max_prompt_length} + trainer.grpo.length_params.max_length="
                f"{grpo.length_params.max_length} exceed model.encoder_seq_length={model.encoder_seq_length}"
            )
        if model.micro_batch_tokens is not None and model.micro_batch_tokens < longest:
            raise ValueError(
                f"model.micro_batch_tokens={model.micro_batch_tokens} is less than data.max_prompt_length + "
                f"trainer.grpo.length_params.max_length = {longest}: one response must fit with its prompt"
            )
        if model.global_batch_size % grpo.samples_per_prompt:
            raise ValueError(
                f"model.global_batch_size={model.global_batch_size} is not divisible by "
                f"trainer.grpo.samples_per_prompt={grpo.samples_per_prompt}: an optimizer step takes whole groups"
            )
        prompts_per_update = model.global_batch_size // grpo.samples_per_prompt
        if grpo.num_prompts_per_grpo_step % prompts_per_update:
            raise ValueError(
                f"trainer.grpo.num_prompts_per_grpo_step={grpo.num_prompts_per_grpo_step} is not divisible by the "
                f"{prompts_per_update} prompts of an optimizer step (model.global_batch_size / samples_per_prompt)"
            )


@dataclass
class LFTFConfig:
    trainer: LFTFTrainerSection
    model: TrainedModel
    data: LFTFData
    exp_manager: ExpManagerSection
    pretrained_checkpoint: CheckpointSection

    def __post_init__(self):
        lftf = self.trainer.lftf
        if self.pretrained_checkpoint.restore_from_path is None:
            raise ValueError("pretrained_checkpoint.restore_from_path is not set: name the checkpoint to fine-tune")
        if "kl" in lftf.weights and self.data.text_path is None:
            raise ValueError("trainer.lftf.loss has kl, which needs text to stay near to: set data.text_path")
        if lftf.max_perplexity is not None and self.data.validation_text_path is None:
            raise ValueError(
                f"trainer.lftf.max_perplexity={lftf.max_perplexity} guards the perplexity of data.validation_text_path, "
                "which is not set: name a file, or set max_perplexity=null"
            )
        if self.model.activations_checkpoint_granularity == "full" and lftf.block != "all":
            raise ValueError(
                "model.activations_checkpoint_granularity=full gives a block above frozen ones no gradient: set it to "
                "selective or null (below the block nothing is kept anyway)"
            )
        if isinstance(lftf.block, int):
            _explain("trainer.lftf.block", check_block, lftf.block, self.model.num_layers)
        _explain("trainer.lftf.exclude_blocks", check_excluded, lftf.exclude_blocks, self.model.num_layers)


@dataclass
class LocateData:
    # Only the training professions are asked about.
    prompts: PromptsConfig = field(default_factory=PromptsConfig)


@dataclass
class LocateConfig:
    pretrained_checkpoint: CheckpointSection
    exp_manager: ExpManagerSection
    trainer: LocateTrainerSection = field(default_factory=LocateTrainerSection)
    model: BiasEvalModel = field(default_factory=BiasEvalModel)
    data: LocateData = field(default_factory=LocateData)

    def __post_init__(self):
        _refuse_resuming(self.exp_manager, "locating")
        if self.pretrained_checkpoint.restore_from_path is None:
            raise ValueError("pretrained_checkpoint.restore_from_path is not set: name a checkpoint folder of ours")


@dataclass
class BiasEvalConfig:
    pretrained_checkpoint: CheckpointSection
    exp_manager: ExpManagerSection
    trainer: BiasEvalTrainerSection = field(default_factory=BiasEvalTrainerSection)
    model: BiasEvalModel = field(default_factory=BiasEvalModel)
    data: BiasEvalData = field(default_factory=BiasEvalData)

    def __post_init__(self):
        _refuse_resuming(self.exp_manager, "an evaluation")
        if self.pretrained_checkpoint.restore_from_path is None:
            raise ValueError(
                "pretrained_checkpoint.restore_from_path is not set: name a checkpoint folder of ours, or a Hugging Face one"
            )


def _explain(key: str, check: Callable[..., None], *arguments: Any) -> None:
    """A check's ValueError with the key that it is about."""
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _refuse_resuming(manager: ExpManagerSection, what: str) -> None:
    if manager.resume_if_exists:
        raise ValueError(
            f"exp_manager.resume_if_exists=true: {what} cannot be gone on with, only started; set it to false and choose a "
            "new folder"
        )


def _check_video(model: GPTModelConfig, video: VideoSettings | None) -> None:
    if video is None:
        return
    if model.vision is None:
        raise ValueError(
            f"data.video is set, but the model has no eyes: set model.vision.feature_size={video.feature_size}"
        )


def check_batch_sizes(key: str, global_count: int, data_parallel: int) -> int:
    """Each data-parallel rank's share of `global_count`, which must divide evenly."""
    if global_count % data_parallel:
        raise ValueError(f"{key}={global_count} is not divisible by the data-parallel size {data_parallel}")
    return global_count // data_parallel
