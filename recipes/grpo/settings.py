"""What the YAML of GRPO may say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_ext.attention.pages import PAGE, pages_of
from megatron_ext.errors import UserError
from megatron_ext.kinds import Duration, Record, Speed, Training
from megatron_ext.losses import GrpoTerms, Objective
from megatron_ext.rollouts import SamplingParams
from recipes.cli.config import at_least
from recipes.data.settings import RowsSection
from recipes.data.video_settings import VideoSettings
from recipes.environments.registry import SINGLE_TURN
from recipes.grpo.choices import GRPO, get_objective, of_earlier_keys, settle
from recipes.grpo.sampling import (
    LengthSection,
    OffPolicySection,
    RolloutDumpSection,
    RolloutSection,
    SamplingSection,
    ValidationSamplingSection,
    ValidationSetSection,
)
from recipes.rewards.settings import RewardLimits, RewardSection
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

__all__ = ["GRPOConfig", "GRPOData", "GRPOModel", "GRPOSettings", "GRPOTrainerSection"]


@dataclass
class GRPOSettings:
    GONE: ClassVar[dict[str, str]] = {
        "rollout_micro_batch_size": "set trainer.grpo.rollout_tokens, the tokens that sampling holds at once"
    }
    of_earlier_keys = staticmethod(of_earlier_keys)

    # GRPO steps of the run: sample, score, update.
    max_steps: Duration[int]
    # Prompts sampled in a step, over all data-parallel ranks.
    num_prompts_per_grpo_step: int
    # Responses of each prompt, which are compared with each other: at least 2, usually 8 to 64.
    samples_per_prompt: int
    # What scores responses: exact_answer, math, choice, regex, length, format, json_schema, code, judge, model, rarer_word,
    # reasoning_gym, http, the dotted path of a function of yours, or {name: one of them, and its options}. docs/data.md has
    # them, docs/extending.md how to write one. null where an environment gives rewards itself.
    reward: Any = None
    # Several, in place of `reward`, each under a name for the log: {answer: {reward: exact_answer}, form: {reward:
    # {name: regex, pattern: ...}, weight: 0.2}}. A response is worth the weighted sum of those that score its row.
    rewards: dict[str, RewardSection] = field(default_factory=dict)
    # Seconds that a reward has for the responses to one prompt. It runs in a process of its own, which is killed then.
    reward_timeout: Speed[float] = RewardLimits.timeout
    # What becomes of a response that a reward does not score in time, or whose scoring ends its process, and of a conversation
    # whose environment does. refuse: the run ends and says its row. zero: that reward is 0 for it. drop: its group is not
    # trained on.
    on_reward_timeout: str = RewardLimits.on_timeout
    # Processes that each data-parallel rank asks its rewards in. Each has all of them.
    reward_processes: Speed[int] = RewardLimits.processes
    # What answers the model when it has spoken: single_turn, nothing; calculator, a tool; guess_number, a game; the dotted path
    # of a class of yours, or {name: one of them, and its options}. docs/environments.md has how to write one.
    environment: Any = SINGLE_TURN
    # Seconds for one call of an environment, such as a step. Each conversation has a process of its own, which is killed then;
    # on_reward_timeout says what becomes of it.
    environment_timeout: Speed[float] = 300.0
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
    # What is minimised: grpo, dapo, dr_grpo, dual_clip, gspo, cispo, sapo, gpg, the dotted path of a class of yours, or {name:
    # one of them, and its options}, normalisation and advantages among them. docs/objective.md has the formulas,
    # docs/extending.md how to write one.
    objective: Any = GRPO
    # true: responses cut off at max_length, without an end, are not trained on. null: as the objective has it, which is true for
    # dapo.
    overlong_filtering: bool | None = None
    # Tokens before max_length in which a response loses up to 1 of what its reward counts (DAPO's soft penalty); the reward
    # that is logged is without. 0: none. null: as the objective has it, which is a fifth of max_length for dapo, else 0.
    overlong_buffer: int | None = None
    # Times that a step samples prompts at most, until so many groups as it takes have rewards that differ; the others are
    # thrown away (DAPO's dynamic sampling). 1: what is sampled is trained. null: as the objective has it, which is 10 for
    # dapo, else 1.
    max_sampling_rounds: int | None = None
    # Share of the trained tokens, those of the highest entropy, that the objective trains: 1: all, 0.2 in the paper (arXiv
    # 2506.01939). KL penalty and entropy bonus still act on all. Below 1 a pass goes before the update.
    high_entropy_share: float = 1.0
    # eta, taken times the policy's entropy from the loss: positive keeps answers various, negative makes them alike.
    entropy_bonus: float = 0.0
    # Weights for tokens whose sampler gave them other probabilities than the trainer does, such as another engine
    # (docs/rollouts.md); null: none.
    off_policy: OffPolicySection | None = None
    # Of a model with experts. R2: tokens take the experts that they took in the pass that says their old log-probabilities, in
    # every update that follows, so that importance ratios compare one network with itself (arXiv 2507.18071); where one update
    # follows and says them itself, it does anyway. R3: in both those that the sampler took, servers or whoever wrote the
    # trajectories (arXiv 2510.11370). null: routers are free. docs/experts.md.
    router_replay: str | None = None
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
            "initial_policy_kl_penalty", "log_samples", "max_staleness",
        )  # fmt: skip
        if self.max_turns is not None and self.environment == SINGLE_TURN:
            raise UserError(
                f"trainer.grpo.max_turns={self.max_turns} is for environments, and trainer.grpo.environment={SINGLE_TURN} has "
                "one turn: set it to null, or name an environment"
            )
        if not 0 < self.environment_timeout < math.inf:
            raise UserError(
                f"trainer.grpo.environment_timeout={self.environment_timeout} must be a positive number of seconds"
            )
        self.reward_limits  # noqa: B018  raises on bad ones
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
        if self.router_replay not in (None, "R2", "R3"):
            raise UserError(f"trainer.grpo.router_replay must be R2, R3 or null, got {self.router_replay!r}")
        if self.router_replay == "R3" and self.rollout.source == "megatron":
            raise UserError(
                "trainer.grpo.router_replay=R3 takes the experts that another sampler took, and "
                "trainer.grpo.rollout.source=megatron samples with the routers that are trained: set router_replay=R2"
            )
        if self.offload_reference_policy and not self.initial_policy_kl_penalty:
            raise UserError(
                "trainer.grpo.offload_reference_policy=true, but trainer.grpo.initial_policy_kl_penalty=0 has no reference "
                "policy: set one of them otherwise"
            )
        settle(self)
        try:
            self.terms  # noqa: B018  raises on bad coefficients
        except UserError as error:
            raise UserError(f"trainer.grpo: {error}") from error
        self.sampling(())
        self.validation_sampling(())

    def sampling(self, stop_token_ids: Sequence[int]) -> SamplingParams:
        """How rollouts are sampled."""
        return self.sampling_params.params("sampling_params", self.length_params.max_length, stop_token_ids)

    def validation_sampling(
        self, stop_token_ids: Sequence[int], section: ValidationSamplingSection | None = None
    ) -> SamplingParams:
        """How answers to held-out prompts are: as the set's own section says, or the run's."""
        section = section or self.validation_sampling_params
        return section.params("validation_sampling_params", self.length_params.max_length, stop_token_ids)

    @property
    def chosen(self) -> Objective:
        """The objective that is named."""
        return get_objective(self.objective)

    @property
    def reward_limits(self) -> RewardLimits:
        return RewardLimits(self.reward_timeout, self.on_reward_timeout, self.reward_processes)

    @property
    def terms(self) -> GrpoTerms:
        return GrpoTerms(
            objective=self.chosen,
            kl_penalty=self.initial_policy_kl_penalty,
            kl_type=self.reference_policy_kl_type,
            kl_in_reward=self.use_kl_in_reward,
            kl_weighted=self.use_bias_correction_kl,
            entropy_bonus=self.entropy_bonus,
        )


@dataclass
class GRPOTrainerSection(TrainerSection):
    grpo: GRPOSettings


@dataclass
class GRPOModel(GroupedModel):
    """With `GroupedModel`'s keys alone."""


@dataclass
class GRPOData(RowsSection):
    # Rows {"prompt" or "messages", and what the reward reads}, with {"video"} or {"features"} beside: a JSONL, parquet or
    # Arrow file, a folder of them, or a pattern. null where trainer.grpo.rollout.source=file brings prompts and responses.
    train_path: str | None
    # Rows of the same form, answered at every validation as trainer.grpo.validation_sampling_params says; null: none.
    validation_path: str | None = None
    # Several, in place of validation_path, each under a name for the log: {gsm: {path: ..., samples: 8, sampling_params:
    # {use_greedy: false}}, hard: {path: ...}}.
    validation_sets: dict[str, ValidationSetSection] = field(default_factory=dict)
    # Longest prompt, in tokens; those of its videos count.
    max_prompt_length: int = 1024
    # How videos become tokens; null: text only.
    video: VideoSettings | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.validation_sets and self.validation_path is not None:
            raise UserError(
                f"data.validation_path={self.validation_path} and data.validation_sets are both set: write it as one of the sets"
            )
        for name in self.validation_sets:
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"data.validation_sets: {name!r} names a set in the log: use letters, digits, _ and -")
        check_apart(
            {self.train_key(name): section.path for name, section in self.trained.items()},
            {self.held_out_key(name): section.path for name, section in self.held_out.items()},
        )

    @property
    def held_out(self) -> dict[str, ValidationSetSection]:
        """By name; "" is that of validation_path."""
        return (
            self.validation_sets if self.validation_path is None else {"": ValidationSetSection(self.validation_path)}
        )

    @staticmethod
    def held_out_key(name: str) -> str:
        """The dotted key of a set's path."""
        return f"data.validation_sets.{name}.path" if name else "data.validation_path"


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
        check_peft(model, self.pretrained_checkpoint)
        if model.peft is not None and grpo.offload_reference_policy:
            raise UserError(
                "trainer.grpo.offload_reference_policy=true moves a copy of the weights, and with model.peft there is none, as "
                "the reference policy is the model without its adapters: set it to false"
            )
        if grpo.router_replay is not None and model.num_moe_experts is None:
            raise UserError(
                f"trainer.grpo.router_replay={grpo.router_replay} is for models with experts, and this one has none: set it to "
                "null"
            )
        longest = self.data.max_prompt_length + grpo.length_params.max_length
        if longest > model.encoder_seq_length:
            raise UserError(
                f"data.max_prompt_length={self.data.max_prompt_length} + trainer.grpo.length_params.max_length="
                f"{grpo.length_params.max_length} exceed model.encoder_seq_length={model.encoder_seq_length}"
            )
        for name, section in self.data.validation_sets.items():
            section.check(name, grpo.validation_sampling_params)
        self._check_rollout_tokens()
        train_path = ", ".join(section.path for section in self.data.trained.values()) or None
        grpo.rollout.check(self.trainer.num_nodes, train_path, self.data.video is not None)
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
        if grpo.high_entropy_share < 1:
            return (
                f"trainer.grpo.high_entropy_share={grpo.high_entropy_share} asks for the entropies of all tokens first"
            )
        return None

    @property
    def reads_start(self) -> str | None:
        """What compares with the weights that the run began with, so that it reads them also where it goes on."""
        if self.trainer.grpo.initial_policy_kl_penalty:
            return "trainer.grpo.initial_policy_kl_penalty compares with them"
        return self.model.reads_start

    def check_data_parallel(self, ranks: int) -> None:
        """Refuse batches that data-parallel ranks cannot share evenly."""
        prompts = self.trainer.grpo.num_prompts_per_grpo_step
        check_batch_sizes("trainer.grpo.num_prompts_per_grpo_step", prompts, ranks)
        key = "the prompts of an optimizer step (model.global_batch_size / trainer.grpo.samples_per_prompt)"
        check_batch_sizes(key, self.prompts_per_update, ranks)
