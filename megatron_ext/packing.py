"""Which groups share a microbatch, and which data-parallel rank runs it: by tokens and by work. Pure Python, no torch.

Microbatches are filled with whole groups up to a token budget. A group that does not fit is split, as rarely as
possible, and its prompt repeated once per part: split into m parts, a group of G keeps (G - m) / (G - 1) of the tokens
that sharing saves. Work is balanced over ranks, attention included: two microbatches of equal length differ in cost
where one holds a long prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.errors import UserError
from megatron_ext.flops import ModelShape, model_flops, num_tokens

__all__ = ["Part", "pack_groups", "saving_kept", "split_group"]


@dataclass(frozen=True)
class Part:
    """A group, or the part of it that holds these of its responses."""

    group: int
    responses: tuple[int, ...]


def split_group(prompt: int, responses: Sequence[int], budget: int) -> list[list[int]]:
    """Numbers of the responses in each part, so that prompt plus responses stay within `budget` tokens.

    Parts are as few as can be told from the sizes, and filled evenly: the longest response first, each to the part
    that holds least.

    Raises:
        UserError: a response does not fit beside the prompt.
    """
    room = budget - prompt
    longest = max(responses, default=0)
    if longest > room:
        raise UserError(
            f"a prompt of {prompt} tokens and a response of {longest} exceed the budget of {budget} tokens of a microbatch"
        )
    order = sorted(range(len(responses)), key=lambda i: (-responses[i], i))
    count = max(1, -(-sum(responses) // max(room, 1)))
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in order:
            part = min(range(count), key=lambda p: (filled[p], p))
            parts[part].append(i)
            filled[part] += responses[i]
        if max(filled) <= room:
            return [sorted(part) for part in parts if part or count == 1]
        count += 1


def pack_groups(
    lengths: Sequence[tuple[int, Sequence[int]]], budget: int, ranks: int, shape: ModelShape, share_prefix: bool = True
) -> list[list[list[Part]]]:
    """Microbatches of every data-parallel rank.

    Args:
        lengths: (prompt length, [response lengths]) of each group.
        budget: tokens of a microbatch, its prompts counted once.
        ranks: data-parallel size.
        shape: of the model, to weigh tokens against attention.
        share_prefix: False for streams in which every response carries its own prompt: each is then a part.

    Returns:
        result[rank] is that rank's list of microbatches, at least one each; a microbatch is a list of parts.

    Raises:
        UserError: a response that does not fit beside its prompt, or fewer parts than ranks.
    """
    parts = [
        Part(number, tuple(chosen))
        for number, (prompt, responses) in enumerate(lengths)
        for chosen in _choose(prompt, responses, budget, share_prefix)
    ]
    if len(parts) < ranks:
        raise UserError(
            f"{len(parts)} groups cannot be spread over {ranks} data-parallel ranks; use more prompts per step"
        )
    sizes = {part: _lengths(part, lengths) for part in parts}
    work = {part: model_flops(shape, [sizes[part]]).total for part in parts}
    tokens = {part: num_tokens([sizes[part]]) for part in parts}
    load = [0.0] * ranks
    mine: list[list[Part]] = [[] for _ in range(ranks)]
    for part in sorted(parts, key=lambda p: -work[p]):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        mine[rank].append(part)
        load[rank] += work[part]
    return [_fill(chosen, tokens, budget) for chosen in mine]


def _choose(prompt: int, responses: Sequence[int], budget: int, share_prefix: bool) -> list[list[int]]:
    parts = split_group(prompt, responses, budget)
    return parts if share_prefix else [[i] for part in parts for i in part]


def _lengths(part: Part, lengths: Sequence[tuple[int, Sequence[int]]]) -> tuple[int, list[int]]:
    prompt, responses = lengths[part.group]
    return prompt, [responses[i] for i in part.responses]


def _fill(parts: Sequence[Part], tokens: dict[Part, int], budget: int) -> list[list[Part]]:
    """First fit, the largest first; then every microbatch in the order of its groups."""
    microbatches: list[list[Part]] = []
    filled: list[int] = []
    for part in sorted(parts, key=lambda p: (-tokens[p], p.group, p.responses)):
        for number, held in enumerate(filled):
            if held + tokens[part] <= budget:
                microbatches[number].append(part)
                filled[number] += tokens[part]
                break
        else:
            microbatches.append([part])
            filled.append(tokens[part])
    return [sorted(m, key=lambda p: (p.group, p.responses)) for m in microbatches]


def saving_kept(lengths: Sequence[tuple[int, Sequence[int]]], microbatches: Sequence[Sequence[Part]]) -> float:
    """Share of the tokens that whole groups would save which this packing saves; 1 where no group is split."""
    repeated, whole = num_tokens(lengths, share_prefix=False), num_tokens(lengths)
    packed = sum(num_tokens([_lengths(part, lengths)]) for microbatch in microbatches for part in microbatch)
    return 1.0 if repeated == whole else (repeated - packed) / (repeated - whole)
