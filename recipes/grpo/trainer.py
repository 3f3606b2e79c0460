"""Group relative policy optimisation with a shared prefix.

One step: sample `samples_per_prompt` responses of every prompt, reward them, compare each with its group, and update
the policy. Sampling, the reference pass and the actor pass all encode each prompt once; so does the old policy's, which is
left out where the actor's own log-probabilities are those (`GRPOConfig.why_old_pass`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.grouping.routes import Routes, without_routes
from megatron_ext.rollouts import MegatronSource, Source
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.reference import ReferenceBase, ReferenceWeights
from recipes.cli.config import show
from recipes.data.decoding import DecodeAhead
from recipes.data.drawing import draw_order
from recipes.data.mixture import Joined
from recipes.data.rows import Prompt
from recipes.data.sampler import InOrder
from recipes.environments.registry import Named
from recipes.grpo.ahead import AheadSampler
from recipes.grpo.batches import BatchMaker, GRPOMicrobatch
from recipes.grpo.objective import as_means, objective
from recipes.grpo.recorded import RecordedSource
from recipes.grpo.recorded_rows import RecordedGroup
from recipes.grpo.recorder import Recorder
from recipes.grpo.refilling import RefillingSampler
from recipes.grpo.rollouts import Answered, Rollouts, RolloutSampler
from recipes.grpo.samples import COLUMNS, shown, table
from recipes.grpo.servers import vllm_source
from recipes.grpo.settings import GRPOConfig
from recipes.grpo.validation import ValidationSet, measures
from recipes.rewards.several import Rewards
from recipes.run.loop import Schedule, Trainer, fit
from recipes.run.session import Session
from recipes.run.utilisation import Utilisation

__all__ = ["GRPOTrainer"]

PHASES = ("timers/generate", "timers/old_and_reference_logprobs", "timers/actor_update")


class GRPOTrainer(Trainer):
    """
    Args:
        session: the run.
        rewards: without any where environments give them.
        train: prompts, by the name of their set.
        validation: held-out ones; may be empty.
        recorded: in place of `train`, prompts with their responses and rewards.
        environment: what answers the turns of a response; None: it has one.
    """

    watched = ("train_optim/grad_norm", "train_rollouts/reward")

    def __init__(
        self,
        session: Session,
        rewards: Rewards,
        train: Mapping[str, Sequence[Prompt]],
        validation: Sequence[ValidationSet],
        recorded: Sequence[RecordedGroup] = (),
        environment: Named | None = None,
    ):
        self.session = session
        self.config: GRPOConfig = session.config
        self.settings = settings = self.config.trainer.grpo
        self.train, self.validation = Joined(train.values()), validation
        updates = settings.num_prompts_per_grpo_step // self.config.prompts_per_update
        steps = settings.max_steps * updates
        health = self.config.trainer.health
        self.engine = Engine(session.model, self.config.model.optim, steps, settings.gradient_clip_val, health.skipping)
        self.batches = BatchMaker(session)
        place = settings.num_prompts_per_grpo_step, session.data_rank, session.data_size
        if recorded:
            self.train = [group.for_prompt() for group in recorded]
            self.order = InOrder(*place)
            source = RecordedSource(recorded, settings.num_prompts_per_grpo_step)
            self.sampler = RolloutSampler(session, source, rewards, environment, answers=self._source())
        else:
            batch, *rank = place
            sections, seed = self.config.data.trained, self.config.model.seed
            curriculum = self.config.data.curriculum
            self.order = draw_order(train, sections, batch, settings.max_steps, seed, *rank, curriculum=curriculum)
            self.sampler = RolloutSampler(session, self._source(), rewards, environment)
        self.decoding = DecodeAhead.of(self.config.data.video, self.train, self.order)
        self.ahead = AheadSampler(self.sampler, self.train, self.order) if settings.max_staleness else None
        refills = settings.max_sampling_rounds > 1
        self.refilling = RefillingSampler(self.sampler, self._draw, self.order.has_next) if refills else None
        self.recorder, self.utilisation = Recorder(session), Utilisation.of_run(session)
        self.rollouts: Rollouts | None = None  # of the last step
        self._step = session.resumed[0]
        off_policy = None if settings.off_policy is None else settings.off_policy.terms
        self.loss = partial(objective, terms=settings.terms, off_policy=off_policy)
        self.reference: ReferenceWeights | ReferenceBase | None = None
        if settings.initial_policy_kl_penalty and self.config.model.peft is not None:
            self.reference = ReferenceBase(self.engine)
        elif settings.initial_policy_kl_penalty:
            self.reference = ReferenceWeights(self.engine, settings.offload_reference_policy)

    def _source(self) -> Source:
        """What samples; with rollout.source=file, answers of validations."""
        settings = self.settings
        if settings.rollout.source == "vllm":
            return vllm_source(self.session, self.engine, self.train)
        decode = self.session.inputs.tokenizer.decode_response
        return MegatronSource(self.engine.module, decode, settings.rollout_tokens)

    def fit(self) -> None:
        settings, why = self.settings, self.config.why_old_pass
        self.session.say("objective: " + ", ".join(f"{key} {show(value)}" for key, value in settings.objective.items()))
        self.session.say(
            f"old log-probabilities come from a pass of their own before the update: {why}"
            if why
            else "old log-probabilities are those of the update's own forward pass: one optimizer step follows a batch"
        )
        interval = settings.val_check_interval if self.validation else 0
        with closing(self.decoding):
            fit(self, Schedule("GRPO", settings.max_steps, interval, settings.save_interval, validates_first=True))

    def run_step(self, step: int) -> dict[str, float]:
        """One GRPO step on the next prompts; returns its metrics."""
        settings, timers, self._step = self.settings, self.session.timers, step
        with timers("step"):
            with timers("generate"):
                rollouts, sampled = self._rollouts(step)
                self.rollouts = rollouts
            self._show(step, rollouts)
            updates, packing = self.batches.updates(rollouts)
            metrics = self._rollout_metrics(rollouts) | sampled | packing
            if self.ahead is not None:
                metrics |= self.ahead.staleness(step, rollouts)
            with timers("old_and_reference_logprobs"):  # of the policy that sampled: before any update
                updates = [self.score_rollouts(microbatches) for microbatches in updates]
            if settings.off_policy is not None and settings.off_policy.reject_above is not None:
                updates, metrics["train_rollouts/rejected"] = self.batches.without_rejected(
                    updates, settings.off_policy.reject_above
                )
            if settings.high_entropy_share < 1:
                updates = [self.batches.of_high_entropy(m, settings.high_entropy_share) for m in updates]
            recorded = self.recorder.wants(step)
            with timers("actor_update"):
                steps, trained = zip(*[self.run_training(m, recorded) for m in updates], strict=True)
            if recorded:
                with timers("rollout_dump"):
                    self.recorder.record(step, rollouts, trained)
            metrics |= _of_step(steps)
            groups = [m.batch.groups for microbatches in updates for m in microbatches]
            # Of the trained policy; of the sampling and of the initial one.
            scoring = (self.config.why_old_pass is not None) + (self.reference is not None)
            passes = 1 + scoring
            executed = passes * sum(g.num_tokens for g in groups)
            repeated = passes * sum(g.num_repeated_tokens for g in groups)
        executed, repeated = self.session.sum_over_data(executed, repeated)
        metrics |= timers.read()
        computing = metrics["timers/old_and_reference_logprobs"] + metrics["timers/actor_update"]
        metrics |= self.utilisation.of_step(groups, scoring, computing)
        metrics["train_optim/tokens_executed"] = executed
        metrics["train_optim/tokens_repeated"] = repeated
        metrics["train_optim/tokens_saved"] = 1 - executed / repeated
        # Throughput in tokens of the plain form, so that runs with and without grouping compare.
        metrics["train_optim/tokens_per_second"] = repeated / metrics["timers/step"]
        return metrics

    def _rollouts(self, step: int) -> tuple[Rollouts, dict[str, float]]:
        """And metrics of what is not in them."""
        if self.refilling is not None:
            return self.refilling.rollouts(step)
        return (self.ahead.rollouts(step) if self.ahead else self.sampler.rollouts(self._draw(), step)), {}

    def has_ended(self) -> bool:
        """Rounds of dynamic sampling, and rows that are left out on arrival, take more than was counted when the run began."""
        return not self.order.has_next()

    def conclude(self) -> None:
        if self.has_ended() and self._step < self.settings.max_steps:
            self.session.say(
                "all sets of data.train_sets have been drawn as often as their epochs say, and the run ends: raise epochs of one "
                "for more steps"
            )

    def _draw(self) -> list[Prompt]:
        drawn = [self.train[i] for i in self.order.next()]
        self.decoding.next_batch()
        return drawn

    def rows(self) -> list[str]:
        return [prompt.where for prompt in self.rollouts.prompts]

    def save_batch(self, step: int) -> Path:
        return self.recorder.save_batch(step, self.rollouts)

    def summary(self, metrics: dict[str, float]) -> str:
        parts = [
            f"reward {metrics['train_rollouts/reward']:.3f}" if "train_rollouts/reward" in metrics else "no rewards"
        ]
        if "train_optim/kl" in metrics:
            parts.append(f"KL {metrics['train_optim/kl']:.3f}")
        parts.append(f"{metrics['train_optim/tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{round(100 * metrics['train_optim/tokens_saved'])}% of tokens saved")
        parts.append(
            "/".join(f"{round(100 * metrics[x] / metrics['timers/step'])}" for x in PHASES)
            + "% sampling/scoring/update"
        )
        if metrics["train_optim/skipped"]:
            parts.append("LEFT OUT")
        return ", ".join(parts)

    def state_dict(self) -> dict:
        return {"sampler": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["sampler"])

    def score_rollouts(self, microbatches: list[GRPOMicrobatch]) -> list[GRPOMicrobatch]:
        """With the log-probabilities of the sampling policy, where they are asked before the update, and, with a KL penalty, of
        the initial one."""
        old: Sequence[Tensor | None] = [None] * len(microbatches)
        reference = entropies = old
        streams = [microbatch.batch.groups for microbatch in microbatches]
        # Where the update's own pass says them, routers have nothing to be held to.
        replays = self.settings.router_replay == "R2" and self.config.why_old_pass is not None
        recorded = [Routes.record(stream) for stream in streams] if replays else []
        if self.settings.high_entropy_share < 1:
            old, entropies = self.engine.score_with_entropies(microbatches)
        elif self.config.why_old_pass is not None:
            old = self.engine.score(microbatches)
        for routes in recorded:
            routes.follow()
        if self.reference is not None:
            with self.reference.used(), without_routes(streams):
                reference = self.engine.score(microbatches)
        return [
            replace(microbatch, old_logprobs=o, ref_logprobs=r, entropies=e)
            for microbatch, o, r, e in zip(microbatches, old, reference, entropies, strict=True)
        ]

    def run_training(
        self, microbatches: list[GRPOMicrobatch], keep_old: bool
    ) -> tuple[dict[str, float], list[GRPOMicrobatch]]:
        """One optimizer step. Returns its metrics and the microbatches, with old log-probabilities in any case if they are to be
        kept."""
        if keep_old and self.config.why_old_pass is None:
            metrics, old = self.engine.update_and_score(microbatches, self.loss)
            microbatches = [replace(m, old_logprobs=o) for m, o in zip(microbatches, old, strict=True)]
        else:
            metrics = self.engine.update(microbatches, self.loss)
        return {f"train_optim/{name}": value for name, value in as_means(metrics).items()}, microbatches

    def run_validation(self, step: int) -> dict[str, float]:
        """Of every set: what the answers to its prompts are worth."""
        with self.session.timers("validation"):
            found = [self._measured(held_out, self.sampler.answered(held_out, step)) for held_out in self.validation]
        return {name: value for metrics in found for name, value in metrics.items()}

    def _measured(self, held_out: ValidationSet, answered: Answered) -> dict[str, float]:
        rewards, everything = answered.rewards, [t for group in answered.trajectories for t in group]
        sums = {"response_length": sum(map(len, everything)), "truncated": sum(t.truncated for t in everything)}
        counts = dict.fromkeys(sums, len(everything))
        if held_out.section.samples > 1:
            worth = rewards[..., 0].nan_to_num(-math.inf).tolist()
            several = measures(answered.texts, worth, held_out.section)
            sums, counts = sums | several, counts | dict.fromkeys(several, len(answered.trajectories))
        found = self.session.sum_over_data(*sums.values(), *counts.values())
        means = (total / count for total, count in zip(found[: len(sums)], found[len(sums) :], strict=True))
        measured = {f"{held_out.prefix}/{name}": mean for name, mean in zip(sums, means, strict=True)}
        return measured | self._reward_means(held_out.prefix, rewards[..., 0], self.sampler.parts(rewards))

    def _show(self, step: int, rollouts: Rollouts) -> None:
        """A few responses, on rank 0."""
        every, session = self.settings.log_samples, self.session
        if session.is_main and every and (step == 1 or step % every == 0):
            rows = shown(session.inputs.tokenizer, rollouts)
            session.say(f"step {step}, a few responses:\n{table(rows)}")
            session.write_table(step, "train_rollouts/samples", COLUMNS, rows)

    def _rollout_metrics(self, rollouts: Rollouts) -> dict[str, float]:
        everything = [t for group in rollouts.trajectories for t in group]
        sums = {
            "response_length": sum(map(len, everything)),
            "truncated": sum(t.truncated for t in everything),
            "turns": sum(t.turns for t in everything),
            "observed_length": sum(len(p.tokens) for t in everything for p in t.passages if not p.sampled),
        }
        if rollouts.lost is not None and self.settings.on_reward_timeout != "refuse":
            sums["reward_timeouts"] = (rollouts.lost > 0).sum().item()
        useful, dropped = rollouts.signal.sum().item(), sum(rollouts.dropped)
        *found, useful, dropped, responses, prompts = self.session.sum_over_data(
            *sums.values(), useful, dropped, len(everything), len(rollouts.prompts)
        )
        means = {f"train_rollouts/{name}": x / responses for name, x in zip(sums, found, strict=True)}
        means["train_rollouts/groups_with_signal"] = useful / prompts
        if self.settings.on_reward_timeout == "drop":
            means["train_rollouts/dropped_groups"] = dropped / prompts
        return means | self._reward_means("train_rollouts", rollouts.rewards, rollouts.parts)

    def _reward_means(self, section: str, rewards: Tensor, parts: Tensor | None) -> dict[str, float]:
        """Over all responses that have one; of several rewards each apart, too.

        Args:
            rewards, parts: as `Rollouts` has them.
        """
        names = ["reward"]
        if parts is not None and self.settings.rewards:
            names += [f"reward/{name}" for name in self.settings.rewards]
            rewards = torch.cat([rewards[..., None], parts], -1)
        values = rewards.flatten(0, 1).view(-1, len(names))
        sums = torch.stack([values.nansum(0), (~values.isnan()).sum(0)]).flatten().tolist()
        found = self.session.sum_over_data(*sums)
        pairs = zip(names, found[: len(names)], found[len(names) :], strict=True)
        return {f"{section}/{name}": total / count for name, total, count in pairs if count}


def _of_step(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step's optimizer steps as one: means, but the largest where a name ends in "_max". One that was left out
    may lack some."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: max(found) if name.endswith("_max") else sum(found) / len(found) for name, found in values.items()}
