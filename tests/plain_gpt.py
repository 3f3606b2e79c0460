"""The same GPT in plain PyTorch: one document at a time, a dense mask, no Megatron, no packing.

It reads the weights by Megatron's names and is differentiable in them, so it is an oracle for outputs, gradients and
generated tokens. Shape legend: s tokens of the document, n query heads, m key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.media import MediaPrompt
from megatron_ext.rotary import Text, find_scheme, layout

__all__ = ["greedy", "plain_logits", "plain_logprobs"]

Weights = dict[str, Tensor]


def plain_logits(
    weights: Weights,
    config: GPTModelConfig,
    prompt: list[int] | MediaPrompt,
    response: list[int] = (),
    visit: Callable[[int, Tensor, Tensor], Tensor] = lambda layer, before, after: after,
) -> Tensor:
    """Logits [s, v] over the real vocabulary, in the weights' precision.

    `visit(layer, hidden_in, hidden_out)` sees every layer's hidden states [s, h] and may give others to go on with.
    """
    media = isinstance(prompt, MediaPrompt)
    items = prompt.items if media else [Text(len(prompt))]
    ids = layout([*items, Text(len(response))], config.position_embedding.scheme).ids  # [axes, s]
    x = weights["embedding.word_embeddings.weight"][torch.tensor([*(prompt.tokens if media else prompt), *response])]
    if media:
        x = x.index_put((prompt.media_rows,), _project(weights, prompt.features.to(x.dtype)))
    for layer in range(config.num_layers):
        before = x
        x = x + _attention(weights, f"decoder.layers.{layer}.", config, x, ids, _window(config, layer))
        x = visit(layer, before, x + _mlp(weights, f"decoder.layers.{layer}.", config, x))
    x = _norm(x, weights["decoder.final_layernorm.weight"], config)
    tied = config.share_embeddings_and_output_weights
    out = weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
    return (x @ out.t())[:, : config.vocab_size]


def plain_logprobs(
    weights: Weights,
    config: GPTModelConfig,
    prompt: list[int] | MediaPrompt,
    response: list[int],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token that has a token before it."""
    skip = 0 if len(prompt) else 1  # nothing predicts the first token of all
    logits = plain_logits(weights, config, prompt, response)[max(len(prompt), 1) - 1 : -1]
    logp = (logits / temperature).log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(response[skip:]).unsqueeze(1)).squeeze(1)
    return chosen, -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def greedy(
    weights: Weights, config: GPTModelConfig, prompt: list[int] | MediaPrompt, count: int, stop: int | None
) -> list[int]:
    """Append the most likely token and run the whole document again, token by token."""
    response: list[int] = []
    while len(response) < count and (stop is None or stop not in response):
        response.append(int(plain_logits(weights, config, prompt, response)[-1].argmax()))
    return response


def _norm(x: Tensor, weight: Tensor, config: GPTModelConfig) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.layernorm_epsilon) * weight


def _project(weights: Weights, features: Tensor) -> Tensor:
    """[n, f] -> [n, h]."""
    names = ("norm", "patch", "out")
    (g, b), (w1, b1), (w2, b2) = (
        (weights[f"media_projector.{n}.weight"], weights[f"media_projector.{n}.bias"]) for n in names
    )
    centred = features - features.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * g + b
    x = x @ w1.t() + b1
    return (x * (1 + torch.erf(x / 2**0.5)) / 2) @ w2.t() + b2


def _rotate(x: Tensor, config: GPTModelConfig, ids: Tensor) -> Tensor:
    """Rotary positions ids [axes, s] on x [s, heads, d]; angles in fp32, as every implementation has them."""
    dim = int(config.kv_channels * config.position_embedding.percent)
    frequency = 1.0 / config.position_embedding.base ** (torch.arange(0, dim, 2).float() / dim)
    axis = find_scheme(config.position_embedding.scheme).allocation(dim // 2)
    angle = torch.stack([ids[a].float() * f for a, f in zip(axis, frequency, strict=True)], -1)[
        :, None
    ]  # [s, 1, dim / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : dim // 2], x[..., dim // 2 : dim]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., dim:]), -1)


def _attention(
    weights: Weights, layer: str, config: GPTModelConfig, x: Tensor, ids: Tensor, window: int | None
) -> Tensor:
    s, m, d = x.size(0), config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // m
    name = layer + "self_attention."
    qkv = _norm(x, weights[layer + "input_layernorm.weight"], config) @ weights[name + "linear_qkv.weight"].t()
    if config.add_qkv_bias:
        qkv = qkv + weights[name + "linear_qkv.bias"]
    # Megatron fuses [q .. q, k, v] per key/value head.
    q, k, v = qkv.view(s, m, per_group + 2, d).split((per_group, 1, 1), dim=2)
    q, k = q.reshape(s, m * per_group, d), k.reshape(s, m, d)
    if config.qk_layernorm:
        q = _norm(q, weights[name + "q_layernorm.weight"], config)
        k = _norm(k, weights[name + "k_layernorm.weight"], config)
    q, k = _rotate(q, config, ids).view(s, m, per_group, d), _rotate(k, config, ids)
    scores = torch.einsum("imgd,jmd->mgij", q, k) / d**0.5
    if config.attn_logit_softcapping is not None:
        scores = config.attn_logit_softcapping * (scores / config.attn_logit_softcapping).tanh()
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(s, s, dtype=torch.bool).tril(-window - 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.einsum("mgij,jmd->imgd", scores.softmax(-1), v.reshape(s, m, d))
    return out.reshape(s, -1) @ weights[name + "linear_proj.weight"].t()


def _window(config: GPTModelConfig, layer: int) -> int | None:
    """Megatron's rule: all layers slide, or all but every n-th, or those marked in a list."""
    skip = config.window_attn_skip_freq
    slides = skip is None or (skip[layer] if isinstance(skip, list) else (layer + 1) % skip)
    return config.window_size[0] if config.window_size is not None and slides else None


def _mlp(weights: Weights, layer: str, config: GPTModelConfig, x: Tensor) -> Tensor:
    x = _norm(x, weights[layer + "pre_mlp_layernorm.weight"], config)
    gate, up = (x @ weights[layer + "mlp.linear_fc1.weight"].t()).chunk(2, -1)
    return (F.silu(gate) * up) @ weights[layer + "mlp.linear_fc2.weight"].t()
