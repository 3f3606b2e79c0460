"""Group relative policy optimisation with a shared prefix.

One step: sample `samples_per_prompt` responses of every prompt, reward them, compare each with its group, and update
the policy. Sampling, the old-policy pass, the reference pass and the actor pass all encode each prompt once.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.losses.grpo import group_advantages, groups_with_signal, grpo_loss
from megatron_ext.models.generation import SamplingParams, UniformDraws, generate
from megatron_ext.runtime.engine import Engine, Microbatch
from recipes.data.rows import Prompt
from recipes.data.sampler import EpochSampler
from recipes.grpo.batches import BatchMaker, Rollouts, in_parts
from recipes.grpo.rewards import Reward, score
from recipes.grpo.settings import GRPOConfig
from recipes.run.session import Session

__all__ = ["GRPOTrainer", "reference_weights"]


class GRPOTrainer:
    """The loop over GRPO steps.

    Args:
        session: the run.
        engine: the policy and its optimizer.
        reward: see `recipes.grpo.rewards`.
        train, validation: prompts; validation may be empty.
    """

    def __init__(self, session: Session, engine: Engine, reward: Reward, train: list[Prompt], validation: list[Prompt]):
        self.session, self.engine, self.reward = session, engine, reward
        self.config: GRPOConfig = session.config
        self.settings = self.config.trainer.grpo
        self.train, self.validation = train, validation
        self.batches = BatchMaker(session)
        self.context_size = parallel_state.get_context_parallel_world_size()
        self.sampler = EpochSampler(
            len(train),
            self.settings.num_prompts_per_grpo_step,
            self.config.model.seed,
            session.data_rank,
            session.data_size,
        )
        self.initial_weights = _copy_weights(engine.module) if self.settings.initial_policy_kl_penalty else None

    def fit(self) -> None:
        settings, session = self.settings, self.session
        done, state = session.restore(self.engine)
        if state:
            self.sampler.load_state_dict(state["sampler"])
        validating = settings.val_check_interval and self.validation
        if validating and not done:
            session.write(0, self.run_validation())
        metrics: dict[str, float] = {}
        step, stopped = done, ""
        with session.progress(settings.max_steps, "GRPO", done) as bar:
            for step in range(done + 1, settings.max_steps + 1):
                metrics = self.run_step(step)
                if validating and step % settings.val_check_interval == 0:
                    metrics |= self.run_validation()
                session.write(step, metrics)
                bar.set_postfix_str(_summary(metrics), refresh=False)
                bar.update()
                last = step == settings.max_steps
                if settings.save_interval and step % settings.save_interval == 0 and not last:
                    session.save(self.engine, step, self._state(), metrics, ended=False)
                if not last and (stopped := session.must_stop()):
                    break
        folder = session.save(self.engine, step, self._state(), metrics, ended=not stopped)
        session.say_saved(folder, step, stopped)

    def _state(self) -> dict:
        return {"sampler": self.sampler.state_dict()}

    def run_step(self, step: int) -> dict[str, float]:
        """One GRPO step on the next prompts; returns its metrics."""
        timers = self.session.timers
        with timers("step"):
            with timers("generate"):
                rollouts = self.generate_rollouts([self.train[i] for i in self.sampler.next()], step)
            updates, packing = self.batches.updates(rollouts)
            metrics = self._rollout_metrics(rollouts) | packing
            with timers("old_and_reference_logprobs"):  # of the policy that sampled: before any update
                passes = 1 + self.score_rollouts([m for microbatches in updates for m in microbatches])
            with timers("actor_update"):
                steps = [self.run_training(microbatches) for microbatches in updates]
            metrics |= {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}
            groups = [m.batch.groups for microbatches in updates for m in microbatches]
            executed = passes * sum(g.num_tokens for g in groups)
            repeated = passes * sum(g.num_repeated_tokens for g in groups)
        executed, repeated = self.session.sum_over_data(executed, repeated)
        metrics |= timers.read()
        metrics["train_optim/tokens_executed"] = executed
        metrics["train_optim/tokens_repeated"] = repeated
        metrics["train_optim/tokens_saved"] = 1 - executed / repeated
        # Throughput in tokens of the plain form, so that runs with and without grouping compare.
        metrics["train_optim/tokens_per_second"] = repeated / metrics["timers/step"]
        return metrics

    def generate_rollouts(self, prompts: list[Prompt], step: int) -> Rollouts:
        settings = self.settings
        params = settings.sampling(self.session.tokenizer.eos_id)
        g, first = settings.samples_per_prompt, self.session.data_rank * self.batches.local_prompts
        mine = _share(len(prompts), parallel_state.get_context_parallel_rank(), self.context_size)
        responses = []
        for start, part in in_parts(prompts[mine], settings.rollout_micro_batch_size):
            draws = UniformDraws(
                seed=(self.config.model.seed, step),
                first=(first + mine.start + start) * g,
                total=settings.num_prompts_per_grpo_step * g,
            )
            responses += generate(self.engine.module, [p.for_model() for p in part], g, params, draws)
        rewards = self._rewards(prompts[mine], responses)
        responses, rewards = self._from_all_context_ranks(responses, rewards)
        advantages = group_advantages(rewards, settings.normalize_rewards, settings.use_leave_one_out_baseline)
        return Rollouts(prompts, responses, rewards, advantages)

    def _from_all_context_ranks(self, responses: list, rewards: Tensor) -> tuple[list, Tensor]:
        """Context-parallel ranks train on the same prompts and sample a part of them each."""
        if self.context_size == 1:
            return responses, rewards
        parts: list = [None] * self.context_size
        dist.all_gather_object(parts, (responses, rewards.tolist()), group=parallel_state.get_context_parallel_group())
        responses = [r for part, _ in parts for r in part]
        rewards = [r for _, part in parts for r in part]
        return responses, torch.tensor(rewards, dtype=torch.float64, device=self.session.device)

    def score_rollouts(self, microbatches: list[Microbatch]) -> int:
        """Log-probabilities of the sampling policy and, with a KL penalty, of the initial one. Returns the passes."""
        for microbatch, logprobs in zip(microbatches, self.engine.score(microbatches), strict=True):
            microbatch.extra["old_logprobs"] = logprobs
        if self.initial_weights is None:
            return 1
        with reference_weights(self.engine.module, self.initial_weights):
            for microbatch, logprobs in zip(microbatches, self.engine.score(microbatches), strict=True):
                microbatch.extra["ref_logprobs"] = logprobs
        return 2

    def run_training(self, microbatches: list[Microbatch]) -> dict[str, float]:
        """One optimizer step."""
        self.engine.zero_grad()
        outputs = self.engine.run(microbatches, self._loss)
        metrics = self.engine.reduce_metrics(outputs) | self.engine.step()
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def run_validation(self) -> dict[str, float]:
        """Mean reward of greedy answers to the held-out prompts."""
        params = SamplingParams(self.settings.length_params.max_length, self.session.tokenizer.eos_id, use_greedy=True)
        mine = self.validation[self.session.data_rank :: self.session.data_size]
        with self.session.timers("validation"):
            total = 0.0
            for _, part in in_parts(mine, self.settings.rollout_micro_batch_size):
                answers = generate(self.engine.module, [p.for_model() for p in part], 1, params, UniformDraws(0))
                total += self._rewards(part, answers).sum().item()
            total, count = self.session.sum_over_data(total, len(mine))
        return {"val_rollouts/reward": total / count, **self.session.timers.read()}

    def _rewards(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> Tensor:
        """Rewards [prompts, samples] in fp64, computed once per model-parallel group and told to its other ranks."""
        samples = len(responses[0]) if responses else self.settings.samples_per_prompt
        group = parallel_state.get_model_parallel_group()
        rewards = torch.empty(len(prompts), samples, dtype=torch.float64, device=self.session.device)
        if group.rank() == 0:
            texts = [self.session.tokenizer.decode(r) for rs in responses for r in rs]
            rows = [p.row for p in prompts for _ in range(samples)]
            values = score(self.reward, texts, rows)
            rewards.copy_(torch.tensor(values, dtype=torch.float64).view_as(rewards))
        if group.size() > 1:
            dist.broadcast(rewards, src=dist.get_global_rank(group, 0), group=group)
        return rewards

    def _loss(self, microbatch: Microbatch, logprobs: Tensor, entropy: Tensor):
        return grpo_loss(
            logprobs,
            terms=self.settings.terms,
            entropy=entropy,
            response_ids=microbatch.batch.groups.response_ids,
            **microbatch.extra,
        )

    def _rollout_metrics(self, rollouts: Rollouts) -> dict[str, float]:
        lengths = [len(r) for rs in rollouts.responses for r in rs]
        cut = sum(not self.batches.ended(r) for rs in rollouts.responses for r in rs)
        reward, length, cut, useful, responses, prompts = self.session.sum_over_data(
            rollouts.rewards.sum().item(), sum(lengths), cut, groups_with_signal(rollouts.rewards).sum().item(),
            len(lengths), len(rollouts.prompts),
        )  # fmt: skip
        return {
            "train_rollouts/reward": reward / responses,
            "train_rollouts/response_length": length / responses,
            "train_rollouts/truncated": cut / responses,
            "train_rollouts/groups_with_signal": useful / prompts,
        }


def _share(count: int, rank: int, ranks: int) -> slice:
    """A rank's contiguous part of `count` items, sizes as even as can be."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def _copy_weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@contextmanager
def reference_weights(model: torch.nn.Module, weights: list[Tensor]):
    """Run the model with other weights, and put its own back whatever happens. For forward passes only."""
    parameters = list(model.parameters())
    own = [p.data for p in parameters]
    for p, w in zip(parameters, weights, strict=True):
        p.data = w
    try:
        yield
    finally:
        for p, w in zip(parameters, own, strict=True):
            p.data = w


def _summary(metrics: dict[str, float]) -> str:
    parts = [f"reward {metrics['train_rollouts/reward']:.3f}"]
    if "train_optim/kl" in metrics:
        parts.append(f"KL {metrics['train_optim/kl']:.3f}")
    parts.append(f"{metrics['train_optim/tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{round(100 * metrics['train_optim/tokens_saved'])}% of tokens saved")
    return ", ".join(parts)
