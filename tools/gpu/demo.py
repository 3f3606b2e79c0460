"""GRPO through megatron_ext alone: sampling, old-policy pass, loss and optimizer, on a task that a small GPT learns in seconds.

A response's reward is the share of its tokens from the lower half of the vocabulary, a half at first. The first update's loss and
gradient are compared with those of repeated prompts.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.grouping import pack
from megatron_ext.losses import GrpoTerms, group_advantages, grpo_loss, token_weights
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from tools.gpu.runner import Findings
from tools.gpu.worlds import world

__all__ = ["run"]

LARGE = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 512,
         "vocab_size": 64, "precision": "bf16"}  # fmt: skip
TINY = LARGE | {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 16, "precision": "32"}
TERMS = GrpoTerms()
TOLD = 5  # a row for every so many steps
# From a half at first; one that does not learn stays within a few hundredths of it.
LEAST_GAIN = 0.15


@dataclass(frozen=True)
class Task:
    """prompts of a step, samples of each, tokens of prompt and response, steps, learning rate."""

    prompts: int
    samples: int
    prompt: int
    response: int
    steps: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class Sampled(Microbatch):
    """advantages, weights, old_logprobs [r], of each predicted token."""

    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None


def run(findings: Findings) -> None:
    device = world(findings)
    task = Task(4, 8, 8, 8, 15, 1e-2) if findings.tiny else Task(16, 8, 512, 32, 40, 1e-3)
    config = GPTModelConfig(**(TINY if findings.tiny else LARGE), encoder_seq_length=task.prompt + task.response)
    engine = Engine(build_gpt(config, device), OptimConfig(lr=task.lr), total_steps=task.steps)
    draw = torch.Generator().manual_seed(findings.settings.seed)
    rewards = []
    for step in range(task.steps):
        begun = time.perf_counter()
        prompts = torch.randint(config.vocab_size, (task.prompts, task.prompt), generator=draw).tolist()
        key = findings.settings.seed, step
        requests = Request.each(prompts, task.samples, SamplingParams(task.response), key)
        responses = [[t.tokens for t in group] for group in MegatronSource(engine.module).sample(requests)]
        given = torch.tensor([[_reward(r, config.vocab_size) for r in group] for group in responses])
        grouped = _microbatch(engine, prompts, responses, given, True, device)
        if step == 0:
            _compare(findings, engine, grouped, _microbatch(engine, prompts, responses, given, False, device))
        metrics = engine.update([grouped], _loss)
        rewards.append(float(given.mean()))
        if step % TOLD == 0 or step + 1 == task.steps:
            findings.row(
                "GRPO", step=step, reward=rewards[-1], loss=metrics["loss"], grad_norm=metrics["grad_norm"],
                seconds=time.perf_counter() - begun,
            )  # fmt: skip
    few = max(1, task.steps // 10)
    gain = sum(rewards[-few:]) / few - sum(rewards[:few]) / few
    findings.check("what the reward lacks of rising by enough", LEAST_GAIN - gain, 0.0)


def _reward(response: list[int], vocab_size: int) -> float:
    return sum(token < vocab_size // 2 for token in response) / len(response)


def _microbatch(
    engine: Engine, prompts, responses, rewards: Tensor, share_prefix: bool, device: torch.device
) -> Sampled:
    """All responses in one stream, with what the policy that sampled them says of them."""
    multiple = stream_multiple(engine.module.model_config)
    batch = pack(prompts, responses, multiple, device=device, share_prefix=share_prefix)
    ids = batch.groups.response_ids
    advantages = group_advantages(rewards).flatten().float().to(device)[ids]
    weights = token_weights(ids, batch.loss_mask(), batch.groups.num_responses, len(ids), 1, "token")
    made = Sampled(batch, advantages=advantages, weights=weights)
    (old,) = engine.score([made])
    return dataclasses.replace(made, old_logprobs=old)


def _loss(microbatch: Sampled, logprobs: Tensor, entropy: Tensor):
    return grpo_loss(
        logprobs, microbatch.old_logprobs, microbatch.advantages, microbatch.weights, TERMS, entropy=entropy
    )


def _compare(findings: Findings, engine: Engine, grouped: Sampled, repeated: Sampled) -> None:
    """The loss's gradient in both forms: rounding of some hundred operations, each random, as tools/bench_step.py has it."""
    gradients = []
    for microbatch in (grouped, repeated):
        engine.zero_grad()
        engine.run([microbatch], _loss)
        gradients.append(torch.cat([b.grad_data.flatten().double() for piece in engine.pieces for b in piece.buffers]))
    allowed = 32 * torch.finfo(engine.config.params_dtype).eps
    old = (grouped.old_logprobs - repeated.old_logprobs).double().norm() / repeated.old_logprobs.double().norm()
    findings.check("log-probabilities of the sampling policy: grouped and repeated differ by", old, allowed)
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    findings.check("gradient of the first update: grouped and repeated differ by", difference, allowed)
