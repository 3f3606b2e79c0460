"""A small GPT with everything that has a weight, and its loss and gradients in several ways; sections share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT, build_gpt
from tests.gpt_cases import (
    Rollout,
    make_rollout,
    named_gradients,
    objective,
    pack_rollout,
    randomize,
    run,
    small_config,
)
from tests.plain_gpt import plain_logprobs

__all__ = ["Answer", "Differences", "Question", "differences", "draw_question", "local_name", "weights_of"]

# Odd lengths, longer than a kernel's block, and a group with one response.
LENGTHS = [(301, [37, 150, 37]), (65, [129, 3]), (17, [200])]
TINY_LENGTHS = [(11, [2, 7, 7]), (5, [3])]


@dataclass(frozen=True)
class Answer:
    """Log-probabilities [r], the GRPO loss, and the gradient of every parameter, on the CPU."""

    logprobs: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Question:
    """A model's weights in fp64 and what it is asked.

    Attributes:
        fields: of `GPTModelConfig`, without precision and kernel.
    """

    fields: dict
    weights: dict[str, Tensor]
    rollout: Rollout

    def model(self, device: torch.device, **changes) -> PrefixGroupedGPT:
        """With these weights; `changes`: of the configuration."""
        model = build_gpt(GPTModelConfig(**(self.fields | changes)), device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[local_name(name)])
        return model

    def answer(self, model: PrefixGroupedGPT, device: torch.device, share_prefix: bool = True) -> Answer:
        """What Megatron's model says, by whatever kernels it has."""
        batch = pack_rollout(self.rollout, share_prefix)
        groups = batch.groups  # on the CPU: what the loss reads
        moved = pack_rollout(self.rollout, share_prefix, device=device)
        logprobs, entropy = (x.cpu() for x in run(model, moved))
        loss = objective(self.rollout, groups, logprobs, entropy)
        loss.backward()
        gradients = {local_name(name): g.cpu() for name, g in named_gradients(model).items()}
        return Answer(logprobs.detach(), loss.detach(), gradients)

    def plain(self, dtype: torch.dtype) -> Answer:
        """What a GPT in plain PyTorch says, on the CPU, one document after the other."""
        config = GPTModelConfig(**self.fields)
        weights = {name: w.to(dtype).clone().requires_grad_() for name, w in self.weights.items()}
        parts = [plain_logprobs(weights, config, p, r) for p, r in self.rollout.flat if r]
        logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        loss = objective(self.rollout, pack_rollout(self.rollout).groups, logprobs, entropy)
        loss.backward()
        gradients = {name: w.grad for name, w in weights.items()}
        return Answer(logprobs.detach(), loss.detach(), gradients)


# What Transformer Engine's fused layers call the norms.
FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def local_name(name: str) -> str:
    """A parameter of either implementation, by its name in the local one."""
    for fused, local in FUSED.items():
        name = name.replace(fused, local)
    return name


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies in fp64 on the CPU, by the names of the local implementation."""
    return {local_name(name): p.detach().double().cpu() for name, p in model.named_parameters()}


def draw_question(device: torch.device, rng: torch.Generator, tiny: bool) -> Question:
    """Fresh weights and tokens; heads of a size that a GPU's kernels take."""
    sizes = (
        {}
        if tiny
        else {"num_layers": 4, "hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 384, "vocab_size": 509}
    )
    fields = vars(
        small_config(**sizes, encoder_seq_length=512, logprob_chunk_size=None, transformer_impl="local")
    ).copy()
    fields.pop("precision")
    model = build_gpt(GPTModelConfig(**fields, precision="bf16"), device)
    randomize(model, rng)
    lengths = TINY_LENGTHS if tiny else LENGTHS
    return Question(fields, weights_of(model), make_rollout(rng, lengths, fields["vocab_size"]))


@dataclass(frozen=True)
class Differences:
    """Relative L2 distances, of all log-probabilities and of all gradients together, and the absolute one of the loss."""

    logprobs: float
    loss: float
    gradients: float

    def over(self, other: Differences) -> float:
        """The larger of the ratios to what is allowed: twice the other's for log-probabilities, three times for gradients."""
        parts = [self.logprobs / (2 * other.logprobs), self.gradients / (3 * other.gradients)]
        return float(torch.tensor(parts).max())  # not Python's max: it may leave out a NaN


def differences(found: Answer, exact: Answer) -> Differences:
    """Raises AssertionError where a parameter has no gradient or one too many."""
    assert found.gradients.keys() == exact.gradients.keys(), found.gradients.keys() ^ exact.gradients.keys()
    ours, theirs = (torch.cat([g.double().flatten() for _, g in sorted(a.gradients.items())]) for a in (found, exact))
    logprobs = (found.logprobs.double() - exact.logprobs).norm() / exact.logprobs.norm()
    return Differences(
        float(logprobs), float((found.loss.double() - exact.loss).abs()), float((ours - theirs).norm() / theirs.norm())
    )
