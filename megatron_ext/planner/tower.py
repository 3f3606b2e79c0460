"""Operations of a vision tower in a step, of the rank that has most of them.

Frozen, it sees a clip once in a step, where what it has computed is kept, else in every pass; the ranks that see the same streams
share the clips of a stream out. What a step finds kept from an epoch before costs nothing, and is not planned. Where it trains,
every rank runs it with every stream.
"""

from __future__ import annotations

from megatron_ext.flops import BACKWARD_OVER_FORWARD, Flops
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.planner.activations import places_of
from megatron_ext.planner.job import Job

__all__ = ["forward_flops", "tower_flops"]


def forward_flops(config: GPTModelConfig, tokens: int, frame: int) -> Flops:
    """Of one pass over so many media tokens.

    Args:
        frame: patches of a frame, of a tower whose frames have any size.
    """
    kind, tower = config.vision.kind, config.vision.tower_config
    sizes = kind.sizes(tower)
    rows = tokens * sizes.rows * places_of(config.vision)
    e = sizes.width
    # Queries, keys, values and projection, and the MLP; before the layers a patch's pixels.
    weights = sizes.depth * (4 * e * e + sizes.products * e * sizes.inside) + sizes.pixels * e
    seen = sum(kind.seen(tower, frame))
    return Flops(linear=2 * rows * weights, attention=4 * e * rows * seen, vocabulary=0.0)


def tower_flops(job: Job, frame: int) -> Flops:
    """Of one step.

    Args:
        frame: as `forward_flops` takes it.
    """
    config, vision = job.model, job.model.vision
    if vision is None or not vision.has_tower or not job.media_tokens:
        return Flops(0.0, 0.0, 0.0)
    ranks = config.tensor_model_parallel_size * config.context_parallel_size
    forward = job.scoring_passes + job.rollout
    if config.freeze_vision_model:
        clips = sum(-(-len(m.lengths) // ranks) for m in job.microbatches)
        runs = 1 if vision.keeps else forward + 1
    else:
        clips = sum(len(m.lengths) for m in job.microbatches)
        again = config.activations_checkpoint_granularity == "full"
        runs = forward + 1 + again + BACKWARD_OVER_FORWARD
    each = forward_flops(config, job.media_tokens, frame)
    runs *= clips * job.updates
    return Flops(runs * each.linear, runs * each.attention, 0.0)
