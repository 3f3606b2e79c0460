"""Block Mitigating Importance: how much each block of a model, or each part of one, has to do with its bias, by several
estimators.

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
from torch import Tensor

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.blocks.blocks import blocks_here, check_block, tapped, train_only
from megatron_ext.blocks.exchange import all_rows, exchanged, swapped_rows
from megatron_ext.blocks.pairs import pack_pairs, split_pairs
from megatron_ext.blocks.places import GRAINS, ModelPlace, every_place, head_rows
from megatron_ext.errors import UserError
from megatron_ext.losses.lftf import pair_loss
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.prompt_streams import PromptStream, prompt_streams
from megatron_ext.runtime.engine import Engine, Microbatch

__all__ = ["ESTIMATORS", "BiasProbe", "check_estimator", "check_excluded", "rank_blocks"]


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
    estimator: str, model: PrefixGroupedGPT, probe: BiasProbe, exclude: Sequence[int] = (0,), grain: str = "blocks"
) -> BlockRanking:
    """All blocks by one of `ESTIMATORS`, or all places of a finer grain. Leaves weights and `requires_grad` as they were, and no
    gradients.

    Call it before an engine with an optimizer is made of the model: Megatron's DDP takes gradients away as they come.

    Args:
        exclude: blocks that may not be chosen, nor any place in them.

    Raises:
        UserError: an unknown estimator, nothing to ask, blocks that cannot be excluded, or scores that are not finite.
    """
    check_estimator(estimator, grain)
    check_excluded(exclude, model.model_config.num_layers)
    places = every_place(grain, model.model_config)
    scores = ESTIMATORS[estimator](model, probe, places)
    names = [] if grain == "blocks" else [place.name for place in places]
    out = [number for number, place in enumerate(places) if place.block in exclude]
    return BlockRanking.of(estimator, scores, out, grain, names)


def check_estimator(estimator: str, grain: str) -> None:
    """
    Raises:
        UserError: an unknown estimator or grain, or one that does not rank places of this grain.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"BMI estimator {estimator!r} does not exist; there are: {', '.join(ESTIMATORS)}")
    if grain not in GRAINS:
        raise UserError(f"{grain!r} are no places to rank; there are: {', '.join(GRAINS)}")
    if estimator == "similarity" and grain != "blocks":
        raise UserError(
            f"similarity compares what enters a block with what leaves it, and ranks no {grain}; take gradient or intervention"
        )


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
def similarity(model: PrefixGroupedGPT, probe: BiasProbe, places: Sequence[ModelPlace]) -> list[float]:
    """1 - cos(H_in, H_out) at each prompt's last token, before the final norm, averaged over prompts."""
    if not probe.prompts:
        raise UserError("similarity needs prompts, and there is none")
    mine = probe.prompts[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    changes = _zeros(model, places)

    for stream in prompt_streams(model, mine, probe.stream_tokens):

        def measure(block: int, before: Tensor, after: Tensor, ends: Tensor = stream.ends) -> None:
            x, y = (all_rows(model, h)[ends].double() for h in (before, after))  # [n, h]
            changes[block] += (1 - torch.cosine_similarity(x, y)).sum()

        with tapped(model, measure):
            stream.run(model)
    return (_over_data_and_stages(changes) / len(probe.prompts)).tolist()


def gradient(model: PrefixGroupedGPT, probe: BiasProbe, places: Sequence[ModelPlace]) -> list[float]:
    """Norm of the gradient of the mean |P(he) - P(she)| with respect to a place's parameters.

    Taken for `prompts_per_gradient` prompts at a time, whose mean loss it belongs to, and averaged. Holds the gradients
    of all blocks once, in the parameters' type; no optimizer state.
    """
    if not probe.prompts:
        raise UserError("gradient needs prompts, and there is none")
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    device = next(model.parameters()).device
    before = [p.requires_grad for p in model.parameters()]
    parts = _even_parts(probe.prompts, max(1, len(probe.prompts) // max(probe.prompts_per_gradient, size)))
    norms = _zeros(model, places)
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
            norms += _gradient_squares(model, places).sqrt()
            for parameter in model.parameters():
                parameter.grad = None
    finally:
        for parameter, trains in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(trains)
    return (norms / len(parts)).tolist()


@torch.no_grad()
def intervention(model: PrefixGroupedGPT, probe: BiasProbe, places: Sequence[ModelPlace]) -> list[float]:
    """How far P(he) - P(she) moves when what a place adds is taken from the prompt with the other hint (activation patching, see
    `exchanged`).

    At every token; the mean of the absolute change over both directions of all pairs. One forward pass for each place.
    """
    pairs = [p for p in probe.swapped if len(p[0]) == len(p[1])]
    if not pairs:
        raise UserError(
            f"intervention needs pairs of prompts of equal length that differ in their hint; of {len(probe.swapped)} none is"
        )
    mine = pairs[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    prompts = [prompt for pair in mine for prompt in pair]
    moved = _zeros(model, places)
    for stream in prompt_streams(model, prompts, probe.stream_tokens, together=2):
        rows = swapped_rows(stream)
        start = _difference(model, stream, probe.pair)
        for number, place in enumerate(places):
            with exchanged(model, place, rows):
                patched = _difference(model, stream, probe.pair)
            if start is not None:
                moved[number] += (patched - start).abs().sum()
    return (_over_data_and_stages(moved) / (2 * len(pairs))).tolist()


def last(model: PrefixGroupedGPT, probe: BiasProbe, places: Sequence[ModelPlace]) -> list[float]:
    """A control: the later the place, the higher."""
    return [float(number) for number in range(len(places))]


def shuffled(model: PrefixGroupedGPT, probe: BiasProbe, places: Sequence[ModelPlace]) -> list[float]:
    """A control: any order, by the seed."""
    rng = random.Random(f"{probe.seed}")
    return [rng.random() for _ in places]


Estimator = Callable[[PrefixGroupedGPT, BiasProbe, Sequence[ModelPlace]], list[float]]
ESTIMATORS: dict[str, Estimator] = {
    "similarity": similarity,
    "gradient": gradient,
    "intervention": intervention,
    "random": shuffled,
    "last": last,
}


def _zeros(model: PrefixGroupedGPT, places: Sequence[ModelPlace]) -> Tensor:
    """fp64 [places]."""
    return torch.zeros(len(places), dtype=torch.float64, device=next(model.parameters()).device)


def _over_data_and_stages(sums: Tensor) -> Tensor:
    """Sums over data-parallel ranks and pipeline stages; the other ranks all hold the same."""
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return sums


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


def _gradient_squares(model: PrefixGroupedGPT, places: Sequence[ModelPlace]) -> Tensor:
    """fp64 [places]: squared norm of each place's gradient, of the whole batch and all shards, known on every rank."""
    squares, tp = _zeros(model, places), model.pg_collection.tp
    inside: dict[int, list[tuple[int, ModelPlace]]] = {}
    for number, place in enumerate(places):
        inside.setdefault(place.block, []).append((number, place))
    for block, layer in blocks_here(model).items():
        gradients = _gradients(model, layer)
        for number, place in inside.get(block, ()):
            if place.heads:
                for rows in head_rows(layer, model.model_config, place.heads, tp):
                    _, whole = gradients[rows.name]
                    squares[number] += whole.index_select(rows.dim, rows.mine).square().sum()
            else:
                for name, (share, whole) in gradients.items():
                    if place.holds(name):
                        squares[number] += share * whole.square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return squares


def _gradients(model: PrefixGroupedGPT, layer: torch.nn.Module) -> dict[str, tuple[float, Tensor]]:
    """By parameter: this rank's share of the gradient's square, and the gradient of the whole batch in fp64."""
    found, tp = {}, model.pg_collection.tp
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:  # an adapter's
            continue
        grad, share = parameter.grad.double(), 1.0
        dist.all_reduce(grad, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if not getattr(parameter, "tensor_model_parallel", False):
            # The same on all tensor-parallel ranks, or a part of it on each, as Megatron's optimizer has it.
            share = 1 / tp.size()
            of_heads = model.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
            if getattr(parameter, "sequence_parallel", False) or of_heads:
                dist.all_reduce(grad, group=tp)
        found[name] = share, grad
    return found
