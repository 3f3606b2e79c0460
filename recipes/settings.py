"""What a recipe's YAML may say: one dataclass per section, each key documented where it is defined.

Top-level sections and key names are NeMo-Aligner's. `recipes.config.build` fills these strictly: an unknown key is an
error that names the nearest known one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_ext.losses.grpo import GrpoTerms
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.runtime.engine import OptimConfig

__all__ = ["GRPOConfig", "SFTConfig", "check_batch_sizes"]


@dataclass
class CheckpointSection:
    # A checkpoint folder of ours to start from.
    restore_from_path: str | None = None


@dataclass
class SFTSettings:
    max_steps: int
    # Steps between validations; 0: never.
    val_check_interval: int = 0
    # Largest global gradient norm; 0: no clipping.
    gradient_clip_val: float = 1.0


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
    # 0: no filter.
    top_k: int = 0
    # 1: no filter.
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
    sequence_level_importance_ratios: bool = False
    entropy_bonus: float = 0.0
    sampling_params: SamplingSection = field(default_factory=SamplingSection)
    length_params: LengthSection = field(default_factory=LengthSection)

    def __post_init__(self):
        for name in ("max_steps", "num_prompts_per_grpo_step", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.grpo.{name} must be at least 1, got {getattr(self, name)}")
        self.terms  # noqa: B018  raises on bad coefficients

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
class _TrainedModel(GPTModelConfig):
    # Folder of a Hugging Face tokenizer; None: the one saved with the checkpoint.
    tokenizer: str | None = None
    seed: int = 1
    # Packed per stream: samples in SFT, prompts with all their responses in GRPO.
    micro_batch_size: int = 1
    # Samples (SFT) or responses (GRPO) per optimizer step, over all ranks.
    global_batch_size: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class SFTModel(_TrainedModel):
    # Train on the prompt's tokens too.
    loss_on_prompt: bool = False


@dataclass
class GRPOModel(_TrainedModel):
    pass


@dataclass
class SFTData:
    # JSONL rows {"prompt", "response"} or {"messages"}.
    train_path: str
    validation_path: str | None = None


@dataclass
class GRPOData:
    # JSONL rows {"prompt" or "messages", and what the reward reads}.
    train_path: str
    validation_path: str | None = None
    # Longest prompt, in tokens.
    max_prompt_length: int = 1024


@dataclass
class SFTConfig:
    trainer: SFTTrainerSection
    model: SFTModel
    data: SFTData
    # Handed to NeMo's exp_manager.
    exp_manager: dict
    pretrained_checkpoint: CheckpointSection = field(default_factory=CheckpointSection)


@dataclass
class GRPOConfig:
    trainer: GRPOTrainerSection
    model: GRPOModel
    data: GRPOData
    # Handed to NeMo's exp_manager.
    exp_manager: dict
    pretrained_checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def __post_init__(self):
        grpo, model = self.trainer.grpo, self.model
        longest = self.data.max_prompt_length + grpo.length_params.max_length
        if longest > model.encoder_seq_length:
            raise ValueError(
                f"data.max_prompt_length={self.data.max_prompt_length} + trainer.grpo.length_params.max_length="
                f"{grpo.length_params.max_length} exceed model.encoder_seq_length={model.encoder_seq_length}"
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


def check_batch_sizes(key: str, global_count: int, data_parallel: int) -> int:
    """Each data-parallel rank's share of `global_count`, which must divide evenly."""
    if global_count % data_parallel:
        raise ValueError(f"{key}={global_count} is not divisible by the data-parallel size {data_parallel}")
    return global_count // data_parallel
