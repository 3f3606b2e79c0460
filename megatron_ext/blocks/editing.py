"""A closed-form edit of one MLP: a change of rank one of its second matrix, without training.

Rank-one model editing is ROME's (arXiv 2202.05262): the matrix is read as a memory of values behind keys, and changed so that
some keys have other values and the least of all else changes. Many keys at once are MEMIT's (arXiv 2210.07229, equation 14). What
the values shall be is ours: those at which either word is as likely, to first order. It is closed form, too, where ROME and
MEMIT search for them.

Shape legend: p prompts, t tokens of neutral text, f MLP width, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.blocks.blocks import blocks_here, check_block
from megatron_ext.blocks.pairs import pack_pairs, split_pairs
from megatron_ext.errors import UserError
from megatron_ext.grouping import PackedTokens
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import pack_prompts

__all__ = ["edit_mlp", "rank_one_edit"]

STREAM_ROWS = 128  # run at a time


def rank_one_edit(
    keys: Tensor, differences: Tensor, direction: Tensor, others: Tensor, weight: float, ridge: float = 1e-6
) -> Tensor:
    """The change g a^T of a matrix that moves its value behind each key by -d along one direction g, as far as the mean square
    over the keys and, `weight` times, over other keys allows:

        a = argmin  mean_i (k_i^T a + d_i)^2 + weight mean_j (c_j^T a)^2

    whose solution is MEMIT's equation 14, Delta = R K^T (C + K K^T)^-1, with all columns of R along g. Of one key, as weight
    falls to 0, it is ROME's equation 2: C^-1 k (k^T C^-1 k)^-1 times what the value lacks.

    Args:
        keys: k_i, [p, f].
        differences: d_i, [p], how far along `direction` values shall go back.
        direction: g, [h].
        others: c_j, [t, f], keys whose values shall stay.
        weight: of those, above 0.
        ridge: of the mean square of what others hold, added to the diagonal: directions that no key has.

    Returns:
        [h, f], fp64.
    """
    keys, differences, direction, others = (x.double() for x in (keys, differences, direction, others))
    kept = others.t() @ others / len(others)
    kept.diagonal().add_(ridge * kept.diagonal().mean())
    system = weight * kept + keys.t() @ keys / len(keys)
    a = torch.linalg.solve(system, -(keys.t() @ differences) / len(keys))
    return torch.outer(direction, a)


@dataclass(frozen=True)
class _AskedPrompts:
    """At the last token of each prompt: what enters the MLP's second matrix [p, f], log P(first) - log P(second) [p], and its
    gradient with respect to what the MLP adds [p, h]."""

    keys: Tensor
    differences: Tensor
    slopes: Tensor


def edit_mlp(
    model: PrefixGroupedGPT,
    block: int,
    prompts: Sequence[Sequence[int]],
    pair: tuple[int, int],
    texts: Sequence[Sequence[int]],
    weight: float = 1.0,
) -> None:
    """Edit one block's MLP so that either word is as likely behind the prompts. One process has the whole model.

    The direction is the mean gradient of log P(first) - log P(second); along it a value moves by that difference over the square
    of the gradient's length, Newton's step.

    Args:
        prompts: tokens, without a hint.
        texts: tokens of neutral text, whose values stay as far as `weight` says.

    Raises:
        UserError: no such block, one with experts, a model in parts, or nothing to ask.
    """
    check_block(block, model.model_config.num_layers)
    config = model.config
    if config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.context_parallel_size > 1:
        raise UserError("a closed-form edit needs the whole model in one process: set all parallel sizes to 1")
    linear = getattr(blocks_here(model)[block].mlp, "linear_fc2", None)
    if linear is None:
        raise UserError(f"block {block} has experts, and a closed-form edit is of one MLP: choose another block")
    if not prompts or not texts:
        raise UserError("a closed-form edit needs prompts, and neutral texts whose values stay")
    seen = [_ask(model, linear, part, pair) for part in _parts(prompts)]
    keys, differences = torch.cat([s.keys for s in seen]), torch.cat([s.differences for s in seen]).double()
    direction = torch.cat([s.slopes for s in seen]).double().mean(0)
    others = torch.cat([_read(model, linear, part) for part in _parts(texts)])
    change = rank_one_edit(keys, differences / direction.square().sum(), direction, others, weight)
    with torch.no_grad():
        linear.weight.add_(change.to(linear.weight.dtype))


def _parts(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    for start in range(0, len(rows), STREAM_ROWS):
        yield rows[start : start + STREAM_ROWS]


def _ask(
    model: PrefixGroupedGPT, linear: torch.nn.Module, prompts: Sequence[Sequence[int]], pair: tuple[int, int]
) -> _AskedPrompts:
    batch = pack_pairs(prompts, pair, model.model_config, next(model.parameters()).device)
    ends = [s.start + s.length - 1 for s in batch.groups.segments if s.is_prefix]
    with torch.enable_grad():
        logprobs, keys, added = _run(model, linear, batch)
        first, second = split_pairs(logprobs)
        (slopes,) = torch.autograd.grad((first - second).sum(), added)
    return _AskedPrompts(keys[ends], (first - second).detach(), slopes.squeeze(1)[ends])


def _read(model: PrefixGroupedGPT, linear: torch.nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """What enters the matrix at all tokens of texts, [t, f]."""
    config, device = model.model_config, next(model.parameters()).device
    scheme, multiple = config.position_embedding.scheme, stream_multiple(config)
    batch = pack_prompts([() for _ in texts], [[list(text)] for text in texts], scheme, multiple, device)
    with torch.no_grad():
        _, keys, _ = _run(model, linear, batch)
    return keys[: batch.groups.num_tokens - batch.groups.num_pad_tokens]


def _run(model: PrefixGroupedGPT, linear: torch.nn.Module, batch: PackedTokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities [r], what enters the matrix [t, f], and zeros that are added to what it gives, [t, 1, h], to
    differentiate by; None without gradient."""
    found: dict[str, Tensor] = {}

    def watch(module, args, output):
        found["keys"] = args[0].detach().squeeze(1)
        if torch.is_grad_enabled():
            found["added"] = torch.zeros_like(output[0], requires_grad=True)
            return (output[0] + found["added"], *output[1:])
        return None

    handle = linear.register_forward_hook(watch)
    try:
        logprobs, _ = model(batch.tokens, batch.position_ids, batch.groups, labels=batch.labels)
    finally:
        handle.remove()
    return logprobs, found["keys"], found.get("added")
