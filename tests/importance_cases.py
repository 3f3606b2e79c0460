"""What BMI estimators are asked, and what a plain GPT in fp64 answers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.blocks.importance import BiasProbe
from megatron_ext.models import PrefixGroupedGPT
from tests.plain_gpt import plain_logits

__all__ = ["EXPERTS", "PAIR", "VOCAB", "assert_close", "difference", "draw_probe", "weights_of"]

VOCAB = 61  # of small_config
BOUND = 1e-9  # relative, in fp64
PAIR = (3, 8)
# Of four blocks the first has an MLP, the others experts.
EXPERTS = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip


def draw_probe(rng, prompts: int = 13, **options) -> BiasProbe:
    def tokens(n: int) -> list[int]:
        return torch.randint(VOCAB, (n,), generator=rng).tolist()

    def length(least: int) -> int:
        return int(torch.randint(least, 12, (), generator=rng))

    swapped = []
    for _ in range(5):
        a = tokens(length(3))
        swapped.append((a, [*a[:1], (a[1] + 7) % VOCAB, *a[2:]]))
    return BiasProbe([tokens(length(1)) for _ in range(prompts)], swapped, PAIR, **options)


def weights_of(model: PrefixGroupedGPT) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def difference(weights, config, prompt: list[int], visit=None) -> Tensor:
    logits = plain_logits(weights, config, prompt, **({"visit": visit} if visit else {}))
    he, she = logits[-1].softmax(-1)[list(PAIR)]
    return he - she


def assert_close(found: BlockRanking, expected: Tensor, bound: float = BOUND) -> None:
    error = (torch.tensor(found.scores, dtype=torch.float64) - expected).abs().max() / expected.abs().max()
    assert error <= bound, error
