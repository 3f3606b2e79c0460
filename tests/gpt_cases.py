"""Small GPTs with weights that make every term count, and batches to run them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.grouping import PackedTokens, PrefixGroups, pack
from megatron_ext.losses import GrpoTerms, grpo_loss, token_weights
from megatron_ext.losses.clipped import Grpo
from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling
from tests.layouts import Lengths, randn

__all__ = [
    "LATENT",
    "TERMS",
    "Rollout",
    "make_rollout",
    "named_gradients",
    "objective",
    "pack_rollout",
    "randomize",
    "run",
    "small_config",
]

# Latent attention, of heads that are unlike in everything, with DeepSeek's positions.
LATENT = {
    "multi_latent_attention": True, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8, "num_query_groups": None, "kv_channels": None, "add_qkv_bias": False, "qk_layernorm": False,
    "position_embedding": PositionEmbedding(
        interleaved=True,
        scaling=RopeScaling(
            4.0, original_max_position_embeddings=32, rope_type="yarn", beta_fast=3.0, mscale=1.0, mscale_all_dim=0.7
        ),
    ),
}  # fmt: skip
TERMS = GrpoTerms(Grpo(ratio_clip_max=0.3), kl_penalty=0.05, entropy_bonus=0.02)


def small_config(**changes) -> GPTModelConfig:
    """Two layers with everything that has a weight: grouped queries 4:1, QKV bias, q and k norms; a padded vocabulary."""
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "vocab_size": 61,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "encoder_seq_length": 128,
        "logprob_chunk_size": 5,
        "attention_plan": "levels",  # "auto" would copy prompts as short as these
    }
    if changes.get("window_size"):
        fields["attention_plan"] = "auto"
    return GPTModelConfig(**(fields | changes))


def randomize(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Weights that let no term be too small to be seen: norms around 1, biases not 0, attention far from uniform.

    The vocabulary's weights are smaller: importance ratios are exponentials of the logits, and so is their rounding.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * randn(rng, *parameter.shape))
            else:
                scale = 0.5 if "word_embeddings" in name or "output_layer" in name else 1.5
                parameter.copy_(scale * randn(rng, *parameter.shape) / parameter.size(1) ** 0.5)


@dataclass
class Rollout:
    """Prompts, responses and, per response token, what GRPO needs: [[values of response 1], ...]."""

    prompts: list[list[int]]
    responses: list[list[list[int]]]
    advantages: list[float]
    old: list[Tensor]
    reference: list[Tensor]
    masks: list[list[bool]]
    min_shared: int | None = None  # of `pack`: responses share their beginnings, too

    @property
    def flat(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) of every response, in stream order."""
        return [(p, r) for p, rs in zip(self.prompts, self.responses, strict=True) for r in rs]

    def pick(self, numbers: list[int]) -> Rollout:
        """The groups of these numbers."""
        first = [0]
        for rs in self.responses:
            first.append(first[-1] + len(rs))
        flat = [i for g in numbers for i in range(first[g], first[g + 1])]
        return Rollout(
            [self.prompts[g] for g in numbers],
            [self.responses[g] for g in numbers],
            *([values[i] for i in flat] for values in (self.advantages, self.old, self.reference, self.masks)),
            self.min_shared,
        )


def make_rollout(rng: torch.Generator, lengths: Lengths, vocab: int, common: int = 0) -> Rollout:
    """Random tokens; old and reference log-probabilities around those of an untrained model.

    With `common`, neighbouring responses of a prompt begin alike: the second with that many tokens of the first, the
    third with one less of the second, and so on. They are then packed as trees.
    """

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab, (count,), generator=rng).tolist()

    prompts = [tokens(p) for p, _ in lengths]
    responses = [[tokens(n) for n in s] for _, s in lengths]
    for group in responses:
        for i, (before, after) in enumerate(zip(group, group[1:], strict=False)):
            share = max(min(common - i, len(before), len(after)), 0)
            after[:share] = before[:share]
    flat = [(p, r) for p, rs in zip(prompts, responses, strict=True) for r in rs]
    predicted = [len(r) if p else max(len(r) - 1, 0) for p, r in flat]
    old, reference = ([-4 + randn(rng, n) for n in predicted] for _ in range(2))
    masks = [(torch.rand(len(r), generator=rng) < 0.8).tolist() for _, r in flat]
    min_shared = 1 if common else None
    return Rollout(prompts, responses, randn(rng, len(flat)).tolist(), old, reference, masks, min_shared)


def run(model: PrefixGroupedGPT, batch: PackedTokens, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) of a whole model's forward pass."""
    groups = batch.groups
    return model(batch.tokens, groups.position_ids, groups, labels=batch.labels, temperature=temperature)


def objective(rollout: Rollout, groups: PrefixGroups, logprobs: Tensor, entropy: Tensor, terms=TERMS) -> Tensor:
    """The GRPO loss of the rollout, whatever the form of the stream that gave the log-probabilities."""
    advantages = torch.tensor(rollout.advantages, dtype=logprobs.dtype)[groups.response_ids]
    mask = torch.ones(len(logprobs), dtype=torch.bool)
    weights = token_weights(groups.response_ids, mask, groups.num_responses, len(logprobs), 1, "token")
    old, reference = (torch.cat(x).to(logprobs.dtype) for x in (rollout.old, rollout.reference))
    return grpo_loss(
        logprobs, old, advantages, weights, terms, reference, entropy, groups.response_ids, groups.num_responses
    )[0]


def named_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, which are then cleared."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradients


def pack_rollout(
    rollout: Rollout, share_prefix: bool = True, pad: int = 16, device: torch.device | str = "cpu"
) -> PackedTokens:
    shared = {"share_prefix": share_prefix, "min_shared": rollout.min_shared if share_prefix else None}
    return pack(rollout.prompts, rollout.responses, pad, device=device, **shared)
