"""What the YAML of GRPO may say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_ext.attention.pages import PAGE, pages_of
from megatron_ext.errors import UserError
from megatron_ext.kinds import Duration, Record, Speed, Training
from megatron_ext.losses.grpo import GrpoTerms
from megatron_ext.rollouts import SamplingParams
from recipes.cli.config import at_least
from recipes.data.settings import RowsSection
from recipes.data.video import VideoSettings
from recipes.environments.registry import SINGLE_TURN
from recipes.grpo.sampling import (
    LengthSection,
    OffPolicySection,
    RolloutDumpSection,
    RolloutSection,
    SamplingSection,
    ValidationSamplingSection,
)
from recipes.run.settings import (
    CheckpointSection,
    ExpManagerSection,
    TrainedModel,
    TrainerSection,
    check_apart,
    check_batch_sizes,
    check_video,
)

__all__ = ["GRPOConfig", "GRPOData", "GRPOModel", "GRPOSettings", "GRPOTrainerSection"]


@dataclass
class GRPOSettings:
    GONE: ClassVar[dict[str, str]] = {
        "rollout_micro_batch_size": "set trainer.grpo.rollout_tokens, the tokens that sampling holds at once"
    }

    # GRPO steps of the run: sample, score, update.
    max_steps: Duration[int]
    # Prompts sampled in a step, over all data-parallel ranks.
    num_prompts_per_grpo_step: int
    # Responses of each prompt, which are compared with each other: at least 2, usually 8 to 64.
    samples_per_prompt: int
    # What scores responses: exact_answer, regex, length, http, the dotted path of a function of yours, or {name: one of
    # them, and its options}. docs/extending.md has how to write one. null where an environment gives rewards itself.
    reward: Any = None
    # What answers the model when it has spoken: single_turn, nothing; calculator, a tool; guess_number, a game; the dotted path
    # of a class of yours, or {name: one of them, and its options}. docs/environments.md has how to write one.
    environment: Any = SINGLE_TURN
    # Turns that a response has at most; null: as many as its environment goes on for. All of them and what is observed
    # in between count in length_params.max_length.
    max_turns: int | None = None
    # Tokens whose keys and values sampling holds at most on a rank, in pages of 32, a prompt's once for all its responses;
    # what has no room waits. null: no bound, the whole step is sampled at once. Set it where memory is short.
    # For our own sampler: rollout.source=vllm does not ask.
    rollout_tokens: Speed[int | None] = None
    # GRPO steps between validations, and one before the first step; 0: never.
    val_check_interval: Record[int] = 0
    # GRPO steps between checkpoints; 0: only the last, and where max_time_per_run stops.
    save_interval: Record[int] = 0
    # Gradients with a larger norm, over all parameters, are scaled down to it; 0: no clipping. Compare
    # train_optim/grad_norm.
    gradient_clip_val: float = 1.0
    # beta, the weight of the KL divergence to the initial policy: raise it where the model strays too far. 0: none, and
    # neither the pass of the initial policy nor a copy of its weights.
    initial_policy_kl_penalty: float = 0.0
    # Keep the initial policy's weights in the host's memory. For its pass they are copied into the gradient buffers, which are
    # idle then: no memory of the GPU, and one copy of the weights for each update. Set it where GPU memory is short.
    offload_reference_policy: Speed[bool] = False
    # k2 or k3: an estimate of the KL divergence in the loss; k1: in the reward, with use_kl_in_reward.
    # docs/objective.md compares.
    reference_policy_kl_type: str = "k3"
    # Take beta times k1 from each token's advantage, after the group's normalisation, instead of adding to the loss.
    use_kl_in_reward: bool = False
    # Weigh k3 in the loss by the importance ratio: the gradient of KL(policy, initial) without bias, also when a rollout
    # serves several updates. TRL's key, which is on there unless said otherwise.
    use_bias_correction_kl: bool = False
    # Advantages are rewards minus the mean of the OTHER responses of the group (RLOO) instead of all.
    use_leave_one_out_baseline: bool = False
    # Divide advantages by the standard deviation of the group's rewards (plus 1e-6). false: groups that differ little
    # count little.
    normalize_rewards: bool = True
    # A token whose probability has moved by more than this share since it was sampled, the way its advantage wants, is
    # trained no further (PPO's clip); ratio_clip_min and ratio_clip_max set the two sides apart. Matters from the
    # second update of a rollout.
    ratio_eps: float = 0.2
    # How far below 1 the ratio of probabilities counts; null: ratio_eps.
    ratio_clip_min: float | None = None
    # How far above 1 (DAPO's clip-higher: 0.28); null: ratio_eps.
    ratio_clip_max: float | None = None
    # true: every trained token of the batch weighs the same, so long responses weigh more (DAPO); false: every response
    # does (DeepSeekMath).
    token_level_loss: bool = True
    # One ratio per response, the geometric mean over its tokens; with token_level_loss=false this is GSPO.
    sequence_level_importance_ratios: bool = False
    # true: responses cut off at max_length, without an end, are not trained on (DAPO).
    overlong_filtering: bool = False
    # eta, taken times the policy's entropy from the loss: positive keeps answers various, negative makes them alike.
    entropy_bonus: float = 0.0
    # Weights for tokens whose sampler gave them other probabilities than the trainer does, such as another engine
    # (docs/rollouts.md); null: none.
    off_policy: OffPolicySection | None = None
    # How many steps older than those that are trained the weights may be that sample: 0: servers wait while a step is
    # trained; 1 and more: they sample the next steps meanwhile, for rollout.source=vllm. off_policy makes up for it.
    max_staleness: int = 0
    sampling_params: SamplingSection = field(default_factory=SamplingSection)
    validation_sampling_params: Record[ValidationSamplingSection] = field(default_factory=ValidationSamplingSection)
    length_params: LengthSection = field(default_factory=LengthSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    # Steps between tables of a few responses with their rewards, on the console and in TensorBoard and other loggers; the
    # first step has one, too. 0: none.
    log_samples: Record[int] = 25
    # What is written to rollouts/ of the run's folder, to be read by tools/show_rollouts.py or replayed; {}: all of it. null:
    # nothing.
    rollout_dump: Record[RolloutDumpSection | None] = None

    def __post_init__(self):
        at_least("trainer.grpo", self, 1, "max_steps", "num_prompts_per_grpo_step", "rollout_tokens", "max_turns")
        at_least(
            "trainer.grpo", self, 0, "val_check_interval", "save_interval", "gradient_clip_val",
            "initial_policy_kl_penalty", "ratio_eps", "log_samples", "max_staleness",
        )  # fmt: skip
        if self.max_turns is not None and self.environment == SINGLE_TURN:
            raise UserError(
                f"trainer.grpo.max_turns={self.max_turns} is for environments, and trainer.grpo.environment={SINGLE_TURN} has "
                "one turn: set it to null, or name an environment"
            )
        if self.samples_per_prompt < 2:
            raise UserError(
                f"trainer.grpo.samples_per_prompt={self.samples_per_prompt}: a response is compared with the others of "
                "its group, so at least 2 are needed"
            )
        if self.sampling_params.use_greedy:
            raise UserError(
                "trainer.grpo.sampling_params.use_greedy=true makes all responses of a group alike, which teaches "
                "nothing; set it to false (validation has trainer.grpo.validation_sampling_params)"
            )
        if self.max_staleness and self.rollout.source != "vllm":
            raise UserError(
                f"trainer.grpo.max_staleness={self.max_staleness} is for servers, which have weights of their own, and "
                f"trainer.grpo.rollout.source={self.rollout.source}: set source=vllm, or max_staleness=0"
            )
        if self.offload_reference_policy and not self.initial_policy_kl_penalty:
            raise UserError(
                "trainer.grpo.offload_reference_policy=true, but trainer.grpo.initial_policy_kl_penalty=0 has no reference "
                "policy: set one of them otherwise"
            )
        try:
            self.terms  # noqa: B018  raises on bad coefficients
        except UserError as error:
            raise UserError(f"trainer.grpo: {error}") from error
        self.sampling(())
        self.validation_sampling(())

    def sampling(self, stop_token_ids: Sequence[int]) -> SamplingParams:
        """How rollouts are sampled."""
        return self.sampling_params.params("sampling_params", self.length_params.max_length, stop_token_ids)

    def validation_sampling(self, stop_token_ids: Sequence[int]) -> SamplingParams:
        """How answers to data.validation_path are."""
        section = self.validation_sampling_params
        return section.params("validation_sampling_params", self.length_params.max_length, stop_token_ids)

    @property
    def terms(self) -> GrpoTerms:
        low, high = self.ratio_clip_min, self.ratio_clip_max
        return GrpoTerms(
            ratio_clip_min=self.ratio_eps if low is None else low,
            ratio_clip_max=self.ratio_eps if high is None else high,
            kl_penalty=self.initial_policy_kl_penalty,
            kl_type=self.reference_policy_kl_type,
            kl_in_reward=self.use_kl_in_reward,
            kl_weighted=self.use_bias_correction_kl,
            sequence_level_ratios=self.sequence_level_importance_ratios,
            entropy_bonus=self.entropy_bonus,
        )


@dataclass
class GRPOTrainerSection(TrainerSection):
    grpo: GRPOSettings


@dataclass
class GRPOModel(TrainedModel):
    # Tokens of a stream, instead of micro_batch_size (null: that). At least a prompt and a response of full length:
    # streams are filled with whole groups up to it, a group that is longer is split, and work is balanced over
    # data-parallel ranks.
    micro_batch_tokens: Speed[int | None] = None
    # Encode a group's prompt once (true), or once per response (false): same numbers, other cost. "auto": once, unless
    # counting operations promises less than 1.05 times the speed.
    prefix_grouping: Speed[bool | str] = "auto"
    # Responses of a prompt that begin alike share that beginning too, from this many tokens on: prefix trees, for turns of a
    # conversation or steps of an agent. "auto": where responses have several turns, and counting operations promises 1.05
    # times the speed. null: they share the prompt only.
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


@dataclass
class GRPOData(RowsSection):
    # JSONL rows {"prompt" or "messages", and what the reward reads}, with {"video"} or {"features"} beside. null where
    # trainer.grpo.rollout.source=file brings prompts and responses.
    train_path: str | None
    # Rows of the same form, answered at every validation as trainer.grpo.validation_sampling_params says; null: none.
    validation_path: str | None = None
    # Longest prompt, in tokens; those of its videos count.
    max_prompt_length: int = 1024
    # How videos become tokens; null: text only.
    video: VideoSettings | None = None

    def __post_init__(self):
        check_apart(self, "train_path", "validation_path")


@dataclass
class GRPOConfig:
    trainer: Training[GRPOTrainerSection]
    model: GRPOModel
    data: Training[GRPOData]
    exp_manager: Record[ExpManagerSection]
    pretrained_checkpoint: Training[CheckpointSection] = field(default_factory=CheckpointSection)

    def __post_init__(self):
        grpo, model = self.trainer.grpo, self.model
        check_video(model, self.data.video)
        longest = self.data.max_prompt_length + grpo.length_params.max_length
        if longest > model.encoder_seq_length:
            raise UserError(
                f"data.max_prompt_length={self.data.max_prompt_length} + trainer.grpo.length_params.max_length="
                f"{grpo.length_params.max_length} exceed model.encoder_seq_length={model.encoder_seq_length}"
            )
        self._check_rollout_tokens()
        grpo.rollout.check(self.trainer.num_nodes, self.data.train_path, self.data.video is not None)
        if model.micro_batch_tokens is not None and model.micro_batch_tokens < longest:
            raise UserError(
                f"model.micro_batch_tokens={model.micro_batch_tokens} is less than data.max_prompt_length + "
                f"trainer.grpo.length_params.max_length = {longest}: one response must fit with its prompt"
            )
        if model.global_batch_size % grpo.samples_per_prompt:
            raise UserError(
                f"model.global_batch_size={model.global_batch_size} is not divisible by "
                f"trainer.grpo.samples_per_prompt={grpo.samples_per_prompt}: an optimizer step takes whole groups"
            )
        if grpo.num_prompts_per_grpo_step % self.prompts_per_update:
            raise UserError(
                f"trainer.grpo.num_prompts_per_grpo_step={grpo.num_prompts_per_grpo_step} is not divisible by the "
                f"{self.prompts_per_update} prompts of an optimizer step (model.global_batch_size / samples_per_prompt)"
            )

    def _check_rollout_tokens(self) -> None:
        grpo, lanes = self.trainer.grpo, self.model.pipeline_model_parallel_size
        pages = pages_of(self.data.max_prompt_length) + pages_of(grpo.length_params.max_length)
        if grpo.rollout_tokens is not None and grpo.rollout_tokens // PAGE // lanes < pages:
            raise UserError(
                f"trainer.grpo.rollout_tokens={grpo.rollout_tokens} is less than {lanes * pages * PAGE}: for each pipeline "
                f"stage one response of trainer.grpo.length_params.max_length={grpo.length_params.max_length} must fit with a "
                f"prompt of data.max_prompt_length={self.data.max_prompt_length}, in pages of {PAGE}"
            )

    @property
    def prompts_per_update(self) -> int:
        """Prompts of an optimizer step."""
        return self.model.global_batch_size // self.trainer.grpo.samples_per_prompt

    @property
    def why_old_pass(self) -> str | None:
        """Why log-probabilities of the policy that sampled are asked before the update; None: they are not, because they are
        those of the update's own forward pass."""
        grpo, updates = self.trainer.grpo, self.trainer.grpo.num_prompts_per_grpo_step // self.prompts_per_update
        if updates > 1:
            return (
                f"{updates} optimizer steps follow a batch (trainer.grpo.num_prompts_per_grpo_step="
                f"{grpo.num_prompts_per_grpo_step}, and model.global_batch_size={self.model.global_batch_size} takes "
                f"{self.prompts_per_update} prompts)"
            )
        if grpo.off_policy is not None and grpo.off_policy.reject_above is not None:
            return (
                f"trainer.grpo.off_policy.reject_above={grpo.off_policy.reject_above} leaves out responses before the loss is "
                "normalised"
            )
        return None

    @property
    def reads_start(self) -> str | None:
        """What compares with the weights that the run began with, so that it reads them also where it goes on."""
        return (
            "trainer.grpo.initial_policy_kl_penalty compares with them"
            if self.trainer.grpo.initial_policy_kl_penalty
            else None
        )

    def check_data_parallel(self, ranks: int) -> None:
        """Refuse batches that data-parallel ranks cannot share evenly."""
        prompts = self.trainer.grpo.num_prompts_per_grpo_step
        check_batch_sizes("trainer.grpo.num_prompts_per_grpo_step", prompts, ranks)
        key = "the prompts of an optimizer step (model.global_batch_size / trainer.grpo.samples_per_prompt)"
        check_batch_sizes(key, self.prompts_per_update, ranks)
