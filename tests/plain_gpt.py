"""The same GPT in plain PyTorch: one document at a time, a dense mask, no Megatron, no packing.

It reads the weights by Megatron's names and is differentiable in them, so it is an oracle for outputs, gradients and
generated tokens. Shape legend: s tokens of the document, n query heads, m key/value heads, d head dimension.
"""

from __future__ import annotations

import dataclasses
import math
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
    part: Callable[[int, str, Tensor], Tensor] = lambda layer, name, added: added,
) -> Tensor:
    """Logits [s, v] over the real vocabulary, in the weights' precision.

    `visit(layer, hidden_in, hidden_out)` sees every layer's hidden states [s, h] and may give others to go on with; so does
    `part(layer, name, x)` of what the heads say, "heads" [s, n e], and of what "attention" and "mlp" give, [s, h].
    """
    media = isinstance(prompt, MediaPrompt)
    items = prompt.items if media else [Text(len(prompt))]
    ids = layout([*items, Text(len(response))], config.position_embedding.scheme).ids  # [axes, s]
    x = weights["embedding.word_embeddings.weight"][torch.tensor([*(prompt.tokens if media else prompt), *response])]
    if media:
        x = x.index_put((prompt.media_rows,), _project(weights, prompt.content.to(x.dtype)))
    x, scale = x * config.embedding_multiplier, config.residual_multiplier
    for layer in range(config.num_layers):
        before = x
        here = (_positions(config, layer, ids), _window(config, layer))
        name = f"decoder.layers.{layer}."
        heads = part(layer, "heads", _heads(weights, name, config, x, *here))
        added = heads @ weights[name + "self_attention.linear_proj.weight"].t()
        added = added + weights.get(name + "self_attention.linear_proj.bias", 0)
        x = x + scale * part(layer, "attention", added)
        x = visit(layer, before, x + scale * part(layer, "mlp", _mlp(weights, name, config, x)))
    x = _norm(x, weights["decoder.final_layernorm.weight"], config)
    tied = config.share_embeddings_and_output_weights
    out = weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
    return (x @ out.t())[:, : config.vocab_size] / config.logits_scaling


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
    """Append the most likely token and run the whole document again, token by token.

    Of logits in fp32, as a sampler tells them: two that are one number there are so for both.
    """
    response: list[int] = []
    while len(response) < count and (stop is None or stop not in response):
        response.append(int(plain_logits(weights, config, prompt, response)[-1].float().argmax()))
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


def _positions(config: GPTModelConfig, layer: int, ids: Tensor) -> Tensor | None:
    """None where a layer does not rotate."""
    still = config.no_rope_freq
    return None if still and (still[layer] if isinstance(still, list) else (layer + 1) % still == 0) else ids


def _frequencies(config: GPTModelConfig, dim: int) -> tuple[Tensor, float]:
    """Of each pair, and the factor of cosines and sines: what was stretched by transformers' own functions."""
    position = config.position_embedding
    frequency = 1.0 / position.base ** (torch.arange(0, dim, 2).float() / dim)
    if position.scaling is None:
        return frequency, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {key: value for key, value in dataclasses.asdict(position.scaling).items() if value is not None}
    rope = given | {"rope_theta": position.base}
    theirs = LlamaConfig(head_dim=dim, max_position_embeddings=config.encoder_seq_length, rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS[position.scaling.rope_type](theirs, "cpu")


def _rotate(x: Tensor, config: GPTModelConfig, ids: Tensor | None) -> Tensor:
    """Rotary positions ids [axes, s] on x [s, heads, d]; angles in fp32, as every implementation has them."""
    if ids is None:
        return x
    dim = int(x.size(-1) * config.position_embedding.percent)
    frequency, factor = _frequencies(config, dim)
    axis = find_scheme(config.position_embedding.scheme).allocation(dim // 2)
    turned = [
        torch.zeros(ids.size(1)) if a is None else ids[a].float() * f for a, f in zip(axis, frequency, strict=True)
    ]
    angle = torch.stack(turned, -1)[:, None]  # [s, 1, dim / 2]
    cos, sin = ((f * factor).to(x.dtype) for f in (angle.cos(), angle.sin()))
    if config.position_embedding.interleaved:
        a, b = x[..., :dim:2], x[..., 1:dim:2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x[..., : dim // 2], x[..., dim // 2 : dim]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, x[..., dim:]), -1)


def _heads(
    weights: Weights, layer: str, config: GPTModelConfig, x: Tensor, ids: Tensor | None, window: int | None
) -> Tensor:
    """[s, n e], before the output projection."""
    s, m, d = x.size(0), config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // m
    name = layer + "self_attention."
    if config.multi_latent_attention:
        q, k, v = _latent(weights, name, config, _norm(x, weights[layer + "input_layernorm.weight"], config), ids)
    else:
        q, k, v = _projected(weights, layer, config, x)
        q, k = _rotate(q, config, ids), _rotate(k, config, ids)
    q = q.view(s, m, per_group, d)
    scores = torch.einsum("imgd,jmd->mgij", q, k) * (config.attention_multiplier or d**-0.5) * _latent_scale(config)
    if config.attn_logit_softcapping is not None:
        scores = config.attn_logit_softcapping * (scores / config.attn_logit_softcapping).tanh()
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(s, s, dtype=torch.bool).tril(-window - 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if config.softmax_type != "vanilla":  # a logit that joins every row's softmax
        learnt = config.softmax_type == "learnable"
        sinks = weights[name + "core_attention.softmax_offset"] if learnt else scores.new_zeros(m * per_group)
        scores = torch.cat((scores, sinks.view(m, per_group, 1, 1).expand(-1, -1, s, 1)), -1)
    out = torch.einsum("mgij,jmd->imgd", scores.softmax(-1)[..., :s], v)
    return out.reshape(s, -1)


def _latent_scale(config: GPTModelConfig) -> float:
    """DeepSeek's: yarn's factor of both queries and keys, put into the scores."""
    scaling = config.position_embedding.scaling
    if not config.multi_latent_attention or scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2


def _latent(weights: Weights, name: str, config: GPTModelConfig, x: Tensor, ids: Tensor | None):
    """Normed x [s, h] -> queries and keys [s, n, d], values [s, n, e], all expanded."""
    s, n, rotated = x.size(0), config.num_attention_heads, config.qk_pos_emb_head_dim
    if config.q_lora_rank is None:
        q = x @ weights[name + "linear_q_proj.weight"].t()
    else:
        q = _norm(x @ weights[name + "linear_q_down_proj.weight"].t(), weights[name + "q_layernorm.weight"], config)
        q = q @ weights[name + "linear_q_up_proj.weight"].t()
    q = q.view(s, n, -1)
    row = x @ weights[name + "linear_kv_down_proj.weight"].t()
    latent = _norm(row[:, :-rotated], weights[name + "kv_layernorm.weight"], config)
    made = (latent @ weights[name + "linear_kv_up_proj.weight"].t()).view(s, n, -1)
    shared = _rotate(row[:, None, -rotated:], config, ids).expand(-1, n, -1)
    q = torch.cat((q[..., :-rotated], _rotate(q[..., -rotated:], config, ids)), -1)
    return q, torch.cat((made[..., : config.qk_head_dim], shared), -1), made[..., config.qk_head_dim :]


def _projected(weights: Weights, layer: str, config: GPTModelConfig, x: Tensor):
    """x [s, h] -> queries [s, n, d], keys and values [s, m, d]."""
    s, m, d = x.size(0), config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // m
    name = layer + "self_attention."
    qkv = _norm(x, weights[layer + "input_layernorm.weight"], config) @ weights[name + "linear_qkv.weight"].t()
    if config.add_qkv_bias:
        qkv = qkv + weights[name + "linear_qkv.bias"]
    # Megatron fuses [q .. q, k, v] per key/value head.
    q, k, v = qkv.view(s, m, per_group + 2, d).split((per_group, 1, 1), dim=2)
    q, k = q.reshape(s, m * per_group, d), k.reshape(s, m, d)
    if config.qk_layernorm_across_heads:
        q, k = (
            _norm(x.flatten(1), weights[name + f"{which}_layernorm.weight"], config).view_as(x)
            for which, x in (("q", q), ("k", k))
        )
    elif config.qk_layernorm:
        q = _norm(q, weights[name + "q_layernorm.weight"], config)
        k = _norm(k, weights[name + "k_layernorm.weight"], config)
    return q, k, v.reshape(s, m, d)


def _window(config: GPTModelConfig, layer: int) -> int | None:
    """Megatron's rule: all layers slide, or all but every n-th, or those marked in a list."""
    skip = config.window_attn_skip_freq
    slides = skip is None or (skip[layer] if isinstance(skip, list) else (layer + 1) % skip)
    return config.window_size[0] if config.window_size is not None and slides else None


def _mlp(weights: Weights, layer: str, config: GPTModelConfig, x: Tensor) -> Tensor:
    x = _norm(x, weights[layer + "pre_mlp_layernorm.weight"], config)
    if layer + "mlp.router.weight" in weights:
        return _experts(weights, layer + "mlp.", config, x)
    return _swiglu(weights, layer + "mlp.", config, x)


def _swiglu(weights: Weights, name: str, config: GPTModelConfig, x: Tensor) -> Tensor:
    gate, up = (x @ weights[name + "linear_fc1.weight"].t() + weights.get(name + "linear_fc1.bias", 0)).chunk(2, -1)
    if (most := config.activation_func_clamp_value) is not None:
        gate, up = gate.clamp(max=most), up.clamp(-most, most)
    gate = F.silu(gate) if config.activation == "silu" else gate / (1 + (-1.702 * gate).exp())
    out = (gate * (up + config.glu_linear_offset)) @ weights[name + "linear_fc2.weight"].t()
    return out + weights.get(name + "linear_fc2.bias", 0)


def _experts(weights: Weights, name: str, config: GPTModelConfig, x: Tensor) -> Tensor:
    """One token after the other, one expert after the other."""
    logits = x @ weights[name + "router.weight"].t() + weights.get(name + "router.bias", 0)  # [s, e]
    if config.moe_router_score_function == "softmax":
        scores = (logits - logits.logsumexp(-1, keepdim=True)).exp()
    else:
        scores = 1 / (1 + (-logits).exp())
    rows = []
    for token, own in zip(x, scores, strict=True):
        wanted = (own + weights.get(name + "router.expert_bias", 0)).tolist()
        chosen = sorted(_allowed(wanted, config), key=lambda e: -wanted[e])[: config.moe_router_topk]
        total = sum(own[e] for e in chosen) if config.moe_router_norm_topk_prob else 1
        factor = config.moe_router_topk_scaling_factor or 1
        out = [
            own[e] / total * factor * _swiglu(weights, f"{name}experts.local_experts.{e}.", config, token[None])
            for e in chosen
        ]
        rows.append(sum(out))
    out = torch.cat(rows)
    if config.moe_shared_expert_intermediate_size is not None:
        shared = _swiglu(weights, name + "shared_experts.", config, x)
        if config.moe_shared_expert_gate:
            shared = shared / (1 + (-x @ weights[name + "shared_experts.gate_weight"].t()).exp())
        out = out + shared
    return out


def _allowed(wanted: list[float], config: GPTModelConfig) -> list[int]:
    """Experts of the best groups: by the sum of each group's best."""
    groups, chosen = config.moe_router_num_groups, config.moe_router_group_topk
    if groups is None:
        return list(range(len(wanted)))
    size, best = len(wanted) // groups, config.moe_router_topk // chosen
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    value = [sum(sorted((wanted[e] for e in group), reverse=True)[:best]) for group in members]
    kept = sorted(range(groups), key=lambda g: -value[g])[:chosen]
    return [e for g in kept for e in members[g]]
