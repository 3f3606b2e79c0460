"""What is planned: a model, its layout, the batch of one step, and the machines. Numbers only; no file is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ext.attention.sharding import shard_layout
from megatron_ext.errors import UserError
from megatron_ext.flops import ModelShape, num_predicted, num_tokens
from megatron_ext.models.config import GPTModelConfig, stream_multiple
from megatron_ext.packing import pack_groups
from megatron_ext.planner.activations import StreamShape
from megatron_ext.prefix_tree import PrefixTree
from megatron_ext.runtime.distributed import ParallelSizes
from megatron_ext.runtime.lean_adam import MomentStorage

__all__ = ["Job", "MicrobatchShape"]

Lengths = list[tuple[int, list[int]]]


@dataclass(frozen=True)
class MicrobatchShape:
    """One stream: its groups' lengths, and what a context-parallel rank holds of it."""

    lengths: Lengths
    shape: StreamShape


@dataclass(frozen=True)
class Job:
    """One kind of step of one run. All groups are alike: a prompt and its responses.

    Attributes:
        model: architecture and layout, of the device that is planned for (`on`); `vocab_size` must be set.
        nodes, devices: machines, and GPUs of each.
        groups: of one optimizer step, over all ranks. A sample of SFT is a group with one response.
        prompt, response, samples: tokens of a prompt and of each response, responses of a group.
        updates: optimizer steps of one step.
        share_prefix: False for responses that carry their own copy of the prompt.
        groups_per_stream, stream_tokens: how streams are filled; one of them is None.
        scoring_passes: forward passes over the batch before it is trained on.
        reference_copy: a second set of weights is kept, for the KL divergence.
        reference_on_host: and where: in the host's memory, and in the gradient buffers while it is used.
        rollout: the responses are sampled by the model; else others do, whose time and memory are not planned.
        rollout_tokens: tokens whose keys and values sampling holds at most; None: all that there are.
        blocks: so many train and all else is frozen (LFTF); 0: all train. The worst are planned for, all on one stage, and as
            whole ones where parts train.
        locates: the gradients of all blocks are held once, before anything trains.
        distributed_optimizer: its state is sharded over data-parallel ranks.
        moments: where Adam's are kept, and in which types.
        overlap_grad_reduce: gradients are summed while backward runs, in buckets.
        media_tokens: tokens of a prompt that hold a medium.
    """

    model: GPTModelConfig
    nodes: int
    devices: int
    groups: int
    prompt: int
    response: int
    samples: int = 1
    updates: int = 1
    share_prefix: bool = True
    groups_per_stream: int | None = 1
    stream_tokens: int | None = None
    scoring_passes: int = 0
    reference_copy: bool = False
    reference_on_host: bool = False
    rollout: bool = False
    rollout_tokens: int | None = None
    blocks: int = 0
    locates: bool = False
    distributed_optimizer: bool = True
    moments: MomentStorage = MomentStorage()
    overlap_grad_reduce: bool = False
    media_tokens: int = 0

    def __post_init__(self):
        for name in ("nodes", "devices", "groups", "response", "samples", "updates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.prompt < 0:
            raise UserError(f"prompt={self.prompt} must not be negative")
        if self.model.vocab_size is None:
            raise UserError("model.vocab_size is not set: the planner reads no tokenizer; give model.vocab_size=...")
        if self.model.precision == "auto":
            raise UserError('model.precision=auto: plan for a device, e.g. model.on("cuda")')
        if (self.groups_per_stream is None) == (self.stream_tokens is None):
            raise UserError(
                f"groups_per_stream={self.groups_per_stream} and stream_tokens={self.stream_tokens}: give one of them"
            )
        self.local_groups  # noqa: B018  raises on ranks that do not divide

    @property
    def sizes(self) -> ParallelSizes:
        return self.model.sizes

    @property
    def world(self) -> int:
        return self.nodes * self.devices

    @property
    def data_parallel(self) -> int:
        """Raises UserError where the ranks do not divide by tensor x pipeline x context."""
        return self.sizes.data(self.world)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, and share the optimizer's state of them: context-parallel ones count."""
        return self.data_parallel * self.model.context_parallel_size

    @property
    def expert_replicas(self) -> int:
        """The same for experts."""
        m = self.model
        if m.expert_model_parallel_size == 1:
            return self.replicas
        return self.world // (m.expert_model_parallel_size * m.expert_tensor_ranks * m.pipeline_model_parallel_size)

    @property
    def local_groups(self) -> int:
        """Groups of an optimizer step on one data-parallel rank."""
        ranks = self.data_parallel
        if self.groups % ranks:
            raise UserError(
                f"the {self.groups} prompts (or samples) of an optimizer step do not divide by the data-parallel size "
                f"{ranks} on {self.nodes} x {self.devices} GPUs; change model.global_batch_size, or the layout"
            )
        return self.groups // ranks

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.model)

    @cached_property
    def microbatches(self) -> list[MicrobatchShape]:
        """Of one optimizer step on a data-parallel rank.

        Raises:
            UserError: a response does not fit beside its prompt into `stream_tokens`.
        """
        group = (self.prompt, [self.response] * self.samples)
        if self.stream_tokens is None:
            count, per = self.local_groups, self.groups_per_stream
            cuts = [[group] * min(per, count - first) for first in range(0, count, per)]
        else:
            packed = pack_groups([group] * self.local_groups, self.stream_tokens, 1, self.shape, self.share_prefix)[0]
            cuts = [[(self.prompt, [self.response] * len(part.responses)) for part in cut] for cut in packed]
        known: dict[tuple, MicrobatchShape] = {}
        found = []
        for cut in cuts:
            key = tuple((p, len(r)) for p, r in cut)
            if key not in known:
                known[key] = self._microbatch(cut)
            found.append(known[key])
        return found

    def _microbatch(self, lengths: Lengths) -> MicrobatchShape:
        multiple = stream_multiple(self.model)
        tokens = num_tokens(lengths, self.share_prefix)
        predicted = num_predicted(lengths, self.share_prefix)
        media = self.media_tokens * len(lengths)
        rows = media if self.share_prefix else self.media_tokens * sum(len(r) for _, r in lengths)
        gathered, ranks = 0, self.model.context_parallel_size
        if ranks > 1:
            tokens, gathered = self._context_rows(lengths, ranks)
            predicted, rows = -(-predicted // ranks), -(-rows // ranks)
        padded = -(-tokens // multiple) * multiple
        return MicrobatchShape(lengths, StreamShape(padded, predicted, rows, media, gathered))

    def _context_rows(self, lengths: Lengths, ranks: int) -> tuple[int, int]:
        """Rows of the fullest context-parallel rank, and rows that are gathered."""
        nested = lengths if self.share_prefix else [(0, [p + s]) for p, sizes in lengths for s in sizes]
        trees = tuple(PrefixTree.from_nested(group) for group in nested)
        layout = shard_layout(trees, ranks, self.shape.pairs_per_token)
        return max(layout.num_rows), layout.num_gathered

    def on(self, nodes: int) -> Job:
        """The same on another number of nodes."""
        return dataclasses.replace(self, nodes=nodes)

    def laid_out(self, **changes) -> Job:
        """The same with other keys of the model, e.g. tensor_model_parallel_size.

        Raises:
            UserError: the model's rules, or ranks that do not divide.
        """
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **changes))

    def largest(self, values: Sequence[MicrobatchShape] | None = None) -> MicrobatchShape:
        """The microbatch that holds most tokens."""
        return max(values or self.microbatches, key=lambda m: (m.shape.tokens, m.shape.predicted))
