"""Block Mitigating Importance: how much each block of a model has to do with its bias, by several estimators.

LFTF (arXiv 2505.15475) names the importance; `similarity` is the formula of a third-party re-implementation, the other
estimators are ours. All work under tensor, sequence, pipeline, context and data parallelism: every rank calls
`rank_blocks` with the same arguments and gets the same ranking.

Shape legend: t rows of a stream, b = 1, h hidden size, n prompts, L blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.blocks.blocks import blocks_here, check_block, tapped, train_only
from megatron_ext.blocks.pairs import pack_pairs, split_pairs
from megatron_ext.errors import UserError
from megatron_ext.losses.lftf import pair_loss
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.prompt_streams import PromptStream, prompt_streams
from megatron_ext.runtime.engine import Engine, Microbatch

__all__ = ["ESTIMATORS", "BiasProbe", "check_excluded", "rank_blocks"]


@dataclass(frozen=True)
class BiasProbe:
    """What the estimators ask a model.

    Attributes:
        prompts: tokens of prompts that hint at neither word.
        swapped: pairs of prompts that differ in their hint alone. Those of unequal length are left out: their rows do
            not correspond.
        pair: the tokens of the two words.
        seed: of `random`.
    """

    prompts: Sequence[Sequence[int]]
    swapped: Sequence[tuple[Sequence[int], Sequence[int]]]
    pair: tuple[int, int]
    seed: int = 0
    stream_tokens: int = 4096
    prompts_per_gradient: int = 32


def rank_blocks(
    estimator: str, model: PrefixGroupedGPT, probe: BiasProbe, exclude: Sequence[int] = (0,)
) -> BlockRanking:
    """All blocks by one of `ESTIMATORS`. Leaves weights and `requires_grad` as they were, and no gradients.

    Call it before an engine with an optimizer is made of the model: Megatron's DDP takes gradients away as they come.

    Raises:
        UserError: an unknown estimator, nothing to ask, blocks that cannot be excluded, or scores that are not finite.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"BMI estimator {estimator!r} does not exist; there are: {', '.join(ESTIMATORS)}")
    check_excluded(exclude, model.model_config.num_layers)
    return BlockRanking.of(estimator, ESTIMATORS[estimator](model, probe), exclude)


def check_excluded(exclude: Sequence[int], num_layers: int) -> None:
    """
    Raises:
        UserError: a block that does not exist or is named twice, or all of them.
    """
    for block in exclude:
        check_block(block, num_layers)
    if twice := sorted({block for block in exclude if exclude.count(block) > 1}):
        raise UserError(f"block {twice[0]} is excluded twice; name each block once")
    if len(exclude) == num_layers:
        raise UserError(f"all {num_layers} blocks are excluded; leave at least one to choose")


@torch.no_grad()
def similarity(model: PrefixGroupedGPT, probe: BiasProbe) -> list[float]:
    """1 - cos(H_in, H_out) at each prompt's last token, before the final norm, averaged over prompts."""
    if not probe.prompts:
        raise UserError("similarity needs prompts, and there is none")
    mine = probe.prompts[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    changes = _zeros(model)

    for stream in prompt_streams(model, mine, probe.stream_tokens):

        def measure(block: int, before: Tensor, after: Tensor, ends: Tensor = stream.ends) -> None:
            x, y = (_all_rows(model, h)[ends].double() for h in (before, after))  # [n, h]
            changes[block] += (1 - torch.cosine_similarity(x, y)).sum()

        with tapped(model, measure):
            stream.run(model)
    return (_over_data_and_stages(changes) / len(probe.prompts)).tolist()


def gradient(model: PrefixGroupedGPT, probe: BiasProbe) -> list[float]:
    """Norm of the gradient of the mean |P(he) - P(she)| with respect to the block's parameters.

    Taken for `prompts_per_gradient` prompts at a time, whose mean loss it belongs to, and averaged. Holds the gradients
    of all blocks once, in the parameters' type; no optimizer state.
    """
    if not probe.prompts:
        raise UserError("gradient needs prompts, and there is none")
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    device = next(model.parameters()).device
    before = [p.requires_grad for p in model.parameters()]
    parts = _even_parts(probe.prompts, max(1, len(probe.prompts) // max(probe.prompts_per_gradient, size)))
    norms = _zeros(model)
    try:
        train_only(model, blocks_here(model).values())
        for parameter in model.parameters():
            parameter.grad = None
        engine = Engine(model)
        for part in parts:
            # The same prompts again where there are fewer than ranks: weight 0.
            mine, weight = part[rank::size], 1 / len(part)
            if not mine:
                mine, weight = part[:1], 0.0

            def loss(microbatch, logprobs, entropy, weight=weight):
                value = weight * pair_loss("abs_diff", *split_pairs(logprobs), None).sum()
                return value, {}

            engine.run([Microbatch(pack_pairs(mine, probe.pair, model.model_config, device))], loss)
            norms += _gradient_squares(model).sqrt()
            for parameter in model.parameters():
                parameter.grad = None
    finally:
        for parameter, trains in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(trains)
    return (norms / len(parts)).tolist()


@torch.no_grad()
def intervention(model: PrefixGroupedGPT, probe: BiasProbe) -> list[float]:
    """How far P(he) - P(she) moves when what the block adds is taken from the prompt with the other hint.

    H_out = H_in + what the block adds, at every token; the mean of the absolute change over both directions of all
    pairs. One forward pass for each block.
    """
    pairs = [p for p in probe.swapped if len(p[0]) == len(p[1])]
    if not pairs:
        raise UserError(
            f"intervention needs pairs of prompts of equal length that differ in their hint; of {len(probe.swapped)} none is"
        )
    mine = pairs[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    prompts = [prompt for pair in mine for prompt in pair]
    moved = _zeros(model)
    for stream in prompt_streams(model, prompts, probe.stream_tokens, together=2):
        rows = _swapped_rows(stream)
        start = _difference(model, stream, probe.pair)
        for chosen in range(model.model_config.num_layers):

            def exchange(block: int, before: Tensor, after: Tensor, chosen: int = chosen, rows: Tensor = rows):
                if block != chosen:
                    return None
                added = _all_rows(model, after - before)[rows]  # [t, h]
                return before + _own_rows(model, added)

            with tapped(model, exchange):
                patched = _difference(model, stream, probe.pair)
            if start is not None:
                moved[chosen] += (patched - start).abs().sum()
    return (_over_data_and_stages(moved) / (2 * len(pairs))).tolist()


def last(model: PrefixGroupedGPT, probe: BiasProbe) -> list[float]:
    """A control: the later the block, the higher."""
    return [float(block) for block in range(model.model_config.num_layers)]


def shuffled(model: PrefixGroupedGPT, probe: BiasProbe) -> list[float]:
    """A control: any order, by the seed."""
    rng = random.Random(f"{probe.seed}")
    return [rng.random() for _ in range(model.model_config.num_layers)]


Estimator = Callable[[PrefixGroupedGPT, BiasProbe], list[float]]
ESTIMATORS: dict[str, Estimator] = {
    "similarity": similarity,
    "gradient": gradient,
    "intervention": intervention,
    "random": shuffled,
    "last": last,
}


def _zeros(model: PrefixGroupedGPT) -> Tensor:
    """fp64 [L]."""
    device = next(model.parameters()).device
    return torch.zeros(model.model_config.num_layers, dtype=torch.float64, device=device)


def _over_data_and_stages(sums: Tensor) -> Tensor:
    """Sums over data-parallel ranks and pipeline stages; the other ranks all hold the same."""
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return sums


def _all_rows(model: PrefixGroupedGPT, hidden: Tensor) -> Tensor:
    """[t (/ tp), 1, h] -> [t, h]."""
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=model.pg_collection.tp)
    return hidden.squeeze(1)


def _own_rows(model: PrefixGroupedGPT, hidden: Tensor) -> Tensor:
    """[t, h] -> [t (/ tp), 1, h], the inverse."""
    if model.config.sequence_parallel:
        group = model.pg_collection.tp
        hidden = hidden.chunk(group.size())[group.rank()]
    return hidden.unsqueeze(1)


def _swapped_rows(stream: PromptStream) -> Tensor:
    """int64 [t]: of each row, the same row of the other prompt of its pair; the pad stays."""
    rows = torch.arange(len(stream.batch.tokens), device=stream.ends.device)
    segments = stream.batch.groups.segments
    for first, second in zip(segments[::2], segments[1::2], strict=True):
        a, b = slice(first.start, first.start + first.length), slice(second.start, second.start + second.length)
        rows[a], rows[b] = rows[b].clone(), rows[a].clone()
    return rows


def _difference(model: PrefixGroupedGPT, stream: PromptStream, pair: tuple[int, int]) -> Tensor | None:
    """P(he) - P(she) of each prompt in fp64, on the last stage."""
    logits = stream.run(model)
    if logits is None:
        return None
    he, she = logits.double().softmax(-1)[:, list(pair)].unbind(1)
    return he - she


def _even_parts(items: Sequence, count: int) -> list[Sequence]:
    """`count` parts in order, whose lengths differ by one at most."""
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _gradient_squares(model: PrefixGroupedGPT) -> Tensor:
    """fp64 [L]: squared norm of each block's gradient, of the whole batch and all shards, known on every rank."""
    squares, tp = _zeros(model), model.pg_collection.tp
    for block, layer in blocks_here(model).items():
        for name, parameter in layer.named_parameters():
            grad = parameter.grad.double()
            dist.all_reduce(grad, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            if getattr(parameter, "tensor_model_parallel", False):
                share = 1.0
            else:  # the same on all tensor-parallel ranks, or a part of it on each, as Megatron's optimizer has it
                share = 1 / tp.size()
                if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
                    dist.all_reduce(grad, group=tp)
            squares[block] += share * grad.square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return squares
