"""Rollouts written down: every prompt of a step with its responses, what they are worth, and what sampler and trainer say of
their probability."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.grouping.routes import write_routes
from megatron_ext.rollouts import Passage, Trajectory
from megatron_ext.runtime.collectives import together
from recipes.data.rows import Prompt
from recipes.grpo.batches import GRPOMicrobatch
from recipes.grpo.dump_files import FOLDER, forget_steps, keep_within, step_file, write_step
from recipes.grpo.rollouts import Rollouts
from recipes.grpo.settings import GRPOConfig
from recipes.run.loop import FAILED
from recipes.run.session import Session

__all__ = ["Recorder"]

T = TypeVar("T")
# (number of the prompt in the step, number of the sample) -> the log-probability of each token.
Scores = dict[tuple[int, int], list[float | None]]
# What a row's prompt is made of, which is there in tokens and text already.
PROMPT_KEYS = frozenset(("prompt", "messages", "tools", "response", "responses"))


class Recorder:
    """Writes `rollouts/` of the run folder, as trainer.grpo.rollout_dump says. Rank 0 writes; the first rank of each
    data-parallel replica tells it what it has."""

    def __init__(self, session: Session):
        self.session = session
        self.config: GRPOConfig = session.config
        self.settings = self.config.trainer.grpo
        self.section = self.settings.rollout_dump
        self._begun = False

    def wants(self, step: int) -> bool:
        """Whether this step is written."""
        return self.section is not None and (step - 1) % self.section.every_n_steps == 0

    def record(self, step: int, rollouts: Rollouts, updates: Sequence[list[GRPOMicrobatch]]) -> None:
        """Every rank calls it.

        Args:
            updates: what has been trained on, with the old log-probabilities.

        Raises:
            UserError: it cannot be written; on every rank.
        """
        scores = old_logprobs(m for update in updates for m in update)
        parts = self._gather((self._groups(rollouts, step, self.section.prompts), scores))
        with together():
            if self.session.is_main:
                folder = self.session.log_dir / FOLDER
                if not self._begun:  # a run that goes on makes these steps again
                    forget_steps(folder, step)
                    self._begun = True
                scores = {key: found for _, part in parts for key, found in part.items()}
                self._write(folder, step, [with_scores(group, scores) for part, _ in parts for group in part])
                keep_within(folder, self.section.max_bytes)

    def save_batch(self, step: int, rollouts: Rollouts) -> Path:
        """All rollouts of a step that could not be taken, whatever is recorded of others; a replay reads it. Every rank calls it.

        Raises:
            UserError: it cannot be written; on every rank.
        """
        parts, folder = self._gather(self._groups(rollouts, step, None)), self.session.log_dir / FAILED
        with together():
            if self.session.is_main:
                self._write(folder, step, [group for part in parts for group in part])
        return step_file(folder, step)

    def _gather(self, mine: T) -> list[T] | None:
        """On rank 0, of every data-parallel replica in order."""
        parts = [None] * self.session.data_size if self.session.is_main else None
        first = parallel_state.get_model_parallel_group().rank() == 0
        if first and parallel_state.get_context_parallel_rank() == 0:
            dist.gather_object(mine, parts, dst=0, group=parallel_state.get_data_parallel_group())
        return parts

    def _write(self, folder: Path, step: int, groups: list[dict[str, Any]]) -> None:
        settings, tokenizer = self.settings, self.session.inputs.tokenizer
        header = {
            "step": step,
            "prompts": settings.num_prompts_per_grpo_step,
            "written": len(groups),
            "samples_per_prompt": settings.samples_per_prompt,
            "seed": self.config.model.seed,
            "sampling_params": dataclasses.asdict(settings.sampling_params),
            "max_length": settings.length_params.max_length,
            "vocabulary": tokenizer.digests()["vocabulary"],
        }
        write_step(folder, header, groups)

    def _groups(self, rollouts: Rollouts, step: int, wanted: int | None) -> list[dict[str, Any]]:
        """This rank's share of what is written, as JSON.

        Args:
            wanted: prompts of the step; None: all.
        """
        first = self.session.data_rank * len(rollouts.prompts)
        last = len(rollouts.prompts) if wanted is None else max(0, min(len(rollouts.prompts), wanted - first))
        rewards, advantages = rollouts.rewards.tolist(), rollouts.advantages.tolist()
        parts = [[{}] * len(group) for group in rewards]
        if self.settings.rewards and rollouts.parts is not None:
            names = list(self.settings.rewards)
            parts = [
                [{n: x for n, x in zip(names, of_one, strict=True) if x == x} for of_one in group]
                for group in rollouts.parts.tolist()
            ]
        drawn = rollouts.numbers or range(first, first + last)
        return [
            {"number": first + i, "key": [self.config.model.seed, step, drawn[i]]}
            | self._group(rollouts.prompts[i], rollouts.trajectories[i], rewards[i], parts[i], advantages[i])
            for i in range(last)
        ]

    def _group(
        self,
        prompt: Prompt,
        trajectories: list[Trajectory],
        rewards: list[float],
        parts: list[dict[str, float]],
        gains: list[float],
    ) -> dict[str, Any]:
        tokenizer = self.session.inputs.tokenizer
        responses = [
            {
                "reward": reward if reward == reward else None,
                **({"rewards": each} if each else {}),
                **({} if trajectory.routes is None else {"routed_experts": write_routes(trajectory.routes)}),
                "advantage": gain,
                "finish_reason": str(trajectory.finish_reason),
                "text": tokenizer.decode_response(prompt.tokens, trajectory.tokens),
                "passages": [passage_json(passage) for passage in trajectory.passages],
            }
            for trajectory, reward, each, gain in zip(trajectories, rewards, parts, gains, strict=True)
        ]
        return {
            "line": prompt.line,
            "row": {name: value for name, value in prompt.row.items() if name not in PROMPT_KEYS},
            "prompt_text": tokenizer.decode_whole(prompt.tokens),
            "prompt_tokens": list(prompt.tokens),
            "responses": responses,
        }


def passage_json(passage: Passage) -> dict[str, Any]:
    """Null is a log-probability that is not known."""
    if not passage.sampled:
        return {"tokens": list(passage.tokens), "observed": True}
    return {
        "tokens": list(passage.tokens),
        "logprobs": [None if x != x else x for x in passage.logprobs],
        "weight_version": passage.weight_version,
    }


def old_logprobs(microbatches: Iterable[GRPOMicrobatch]) -> Scores:
    """Of the policy that sampled, by the trainer's own pass, to seven digits; None where it is not finite, as in a step that
    was left out."""
    found: Scores = {}
    for microbatch in microbatches:  # prompts are never empty: all tokens are predicted
        values = (float(f"{value:.7g}") if math.isfinite(value) else None for value in microbatch.old_logprobs.tolist())
        for number, length in zip(microbatch.numbers, microbatch.batch.groups.response_lengths, strict=True):
            found[number] = list(itertools.islice(values, length))
    return found


def with_scores(group: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """With the trainer's log-probabilities of each response, and how far they are from the sampler's."""
    responses = []
    for sample, response in enumerate(group["responses"]):
        old = scores[group["number"], sample]
        said = [x for p in response["passages"] for x in p.get("logprobs", [None] * len(p["tokens"]))]
        apart = [abs(mine - x) for mine, x in zip(old, said, strict=True) if None not in (mine, x)]
        mismatch = {"mean": sum(apart) / len(apart), "max": max(apart)} if apart else None
        responses.append({**response, "old_logprobs": old, "mismatch": mismatch})
    return {**group, "responses": responses}
