"""Training engine: Megatron's DDP, optimizer and pipeline schedule around one model.

The engine knows microbatches and loss functions, not algorithms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.errors import DivergedError
from megatron_ext.grouping import PackedTokens, PrefixGroups
from megatron_ext.runtime.collectives import broadcast_object, from_last
from megatron_ext.runtime.expert_load import finish_step, most_of_experts, routers_of, share_out
from megatron_ext.runtime.full_memory import full_memory_told
from megatron_ext.runtime.grad_norm import clip_gradients, gradient_norm
from megatron_ext.runtime.optim import OptimConfig, ddp_config, make_optimizer, make_scheduler
from megatron_ext.runtime.pieces import pieces_of, streams_per_turn
from megatron_ext.runtime.progress import PROGRESS
from megatron_ext.runtime.trimmed import TrimmedPipeline, check_all_train, first_trained_stage, process_groups
from megatron_ext.runtime.weight_gather import WeightGather

__all__ = ["Engine", "Microbatch", "Skipping", "SkippedError"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Microbatch:
    """One packed stream. An algorithm adds, as fields of a subclass, what its loss needs beside it."""

    batch: PackedTokens
    temperature: float = 1.0


@dataclass(frozen=True)
class Skipping:
    """Optimizer steps that are left out: gradients that are not finite, or too large.

    Attributes:
        most: in a row; one more is an error.
        above: the largest norm that is applied, before clipping; None: any that is finite.
    """

    most: int = 0
    above: float | None = None

    def why(self, grad_norm: float) -> str | None:
        """Why a step of this norm is left out; None: it is taken."""
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if self.above is not None and grad_norm > self.above:
            return f"the gradient norm is {grad_norm:.4g}, above {self.above:g} (trainer.health.skip_above)"
        return None


class SkippedError(DivergedError):
    """More optimizer steps in a row were left out than may be."""


LossFunction = Callable[[Microbatch, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Engine:
    """A model with gradients that are summed over data-parallel ranks, and its optimizer.

    Losses must come normalised by GLOBAL counts: gradients of microbatches and ranks are added, never averaged, so a
    batch gives the same gradient however it is cut.

    Parameters with `requires_grad` off cost neither gradient buffer nor optimizer state, and nothing below the lowest
    parameter that trains runs a backward: neither layers nor whole pipeline stages.

    Args:
        model: this rank's pipeline stage, with `requires_grad` as it shall be; perhaps in pieces.
        optim: None for a model that is only run forward, or whose bare `.grad` is wanted.
        total_steps: optimizer steps of the run, for the schedule.
        clip_grad: largest global gradient norm, 0 for none.
        skipping: which optimizer steps are left out.

    Raises:
        UserError: a model in pieces of which some train nothing.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optim: OptimConfig | None = None,
        total_steps: int = 1,
        clip_grad: float = 1.0,
        skipping: Skipping = Skipping(),
    ):
        self.module = model
        self.skipping, self._skipped = skipping, 0  # in a row
        self.config = model.config
        self.optimizer = self.scheduler = None
        self.pieces = pieces_of(model)  # with an optimizer, each in its DDP
        self.routers = routers_of(self.pieces)
        self._pipeline: dict[str, Any] = {}  # for the schedule, where lower stages train nothing
        self._detach_input = False
        self.clip_grad = clip_grad
        self._gather: WeightGather | None = None
        group = parallel_state.get_pipeline_model_parallel_group()
        if len(self.pieces) > 1:
            check_all_train(self.pieces, group)
        elif first := first_trained_stage(model, group):
            self._pipeline = {
                "p2p_communicator": TrimmedPipeline(group, self.config, first),
                "pg_collection": process_groups(),
            }
            self._detach_input = group.rank() <= first
        if optim is None:
            return
        ddp = ddp_config(optim)
        self.pieces = [
            DistributedDataParallel(self.config, ddp, piece, disable_bucketing=number > 0)  # as Megatron has it
            for number, piece in enumerate(self.pieces)
        ]
        for piece in self.pieces:
            piece.broadcast_params()
        if optim.overlap_param_gather:
            self._gather = WeightGather(self.pieces)
        self.optimizer = make_optimizer(optim, self.config, self.pieces)
        self.scheduler = make_scheduler(self.optimizer, optim, total_steps)
        self.config.finalize_model_grads_func = self._finalize
        no_syncs = [piece.no_sync for piece in self.pieces]
        self.config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]

    def run(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction, forward_only: bool = False
    ) -> list[dict[str, Tensor]]:
        """Run all microbatches through the pipeline, with backward unless `forward_only`.

        Args:
            loss_function: (microbatch, log-probabilities [r], entropies [r]) -> (loss, metrics). Called on the last
                pipeline stage.

        Returns:
            The metrics of each microbatch on the last stage, an empty list elsewhere.

        Raises:
            UserError: memory is full.
        """

        streams = [(microbatch, True) for microbatch in microbatches]
        stages, pieces = parallel_state.get_pipeline_model_parallel_world_size(), len(self.pieces)
        # The interleaved schedule takes no fewer streams than stages, and ranks that share experts run equally many.
        fewest = max(stages if pieces > 1 else 0, most_of_experts(self.config, len(streams)))
        if fewest > len(streams):
            smallest = min(microbatches, key=lambda m: m.batch.groups.num_tokens)
            idle = _of_no_response(smallest.batch.groups)
            streams += [(smallest, False)] * (fewest - len(streams))
        if not forward_only and self.routers and self.routers[0].balanced:
            share_out(self.routers, sum(m.batch.groups.num_repeated_tokens for m in microbatches))
        if pieces > 1:
            self.config.microbatch_group_size_per_vp_stage = streams_per_turn(len(streams), stages)

        newest = microbatches[0]

        def forward_step(iterator, model):
            nonlocal newest
            microbatch, counts = next(iterator)
            newest, batch = microbatch, microbatch.batch
            PROGRESS.made()
            if self._detach_input and not forward_only:
                decoder = self.module.decoder
                if decoder.input_tensor is not None:
                    decoder.set_input_tensor(decoder.input_tensor.detach())
            output = model(
                batch.tokens,
                batch.position_ids,
                packed_seq_params=batch.groups if counts else idle,
                labels=batch.labels,
                temperature=microbatch.temperature,
                media=batch.media,
                entry=batch.entry,
            )

            def reduce(output):
                loss, metrics = loss_function(microbatch, *output) if counts else (0 * output[0].sum(), {})
                # Megatron accumulates the middle value (a token count) and ours is not used.
                return loss, torch.ones((), dtype=torch.int, device=loss.device), metrics

            return output, reduce

        iterators = [iter(streams) for _ in self.pieces]
        with torch.set_grad_enabled(not forward_only), full_memory_told(lambda: _too_large(newest.batch)):
            outputs = get_forward_backward_func(stages, pieces if pieces > 1 else None)(
                forward_step_func=forward_step,
                data_iterator=iterators if pieces > 1 else iterators[0],
                model=self.pieces,
                num_microbatches=len(streams),
                seq_length=max(m.batch.groups.num_tokens for m in microbatches),
                micro_batch_size=1,
                forward_only=forward_only,
                **({} if forward_only else self._pipeline),
            )
        return outputs[: len(microbatches)]

    def update(self, microbatches: Sequence[Microbatch], loss_function: LossFunction) -> dict[str, float]:
        """One optimizer step over all microbatches of all data-parallel ranks. Returns the metrics' sums, and `step`'s; of a step
        that is left out those that are finite.

        Raises:
            SkippedError: see `step`.
        """
        self.zero_grad()
        return self._stepped(self.run(microbatches, loss_function))

    def _stepped(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        metrics = self.reduce_metrics(outputs) | self.step()
        return {k: v for k, v in metrics.items() if math.isfinite(v)} if metrics["skipped"] else metrics

    def update_and_score(
        self, microbatches: Sequence[Microbatch], loss_function: LossFunction
    ) -> tuple[dict[str, float], list[Tensor]]:
        """`update`, and what `score` would have said before it: the update's own forward pass says it."""

        def keep(microbatch, logprobs, entropy):
            loss, metrics = loss_function(microbatch, logprobs, entropy)
            return loss, metrics | {"logprobs": logprobs.detach()}

        self.zero_grad()
        outputs = self.run(microbatches, keep)
        scores = self._on_all_stages(microbatches, [metrics.pop("logprobs") for metrics in outputs])
        return self._stepped(outputs), scores

    def score(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Log-probabilities [r] of each microbatch, without gradient, known on every pipeline stage."""
        return self._scores(microbatches, "logprobs")[0]

    def score_with_entropies(self, microbatches: Sequence[Microbatch]) -> tuple[list[Tensor], list[Tensor]]:
        """`score`, and the entropies [r] of the distributions that tokens were drawn from."""
        logprobs, entropies = self._scores(microbatches, "logprobs", "entropy")
        return logprobs, entropies

    def _scores(self, microbatches: Sequence[Microbatch], *names: str) -> list[list[Tensor]]:
        def keep(microbatch, logprobs, entropy):
            found = {"logprobs": logprobs, "entropy": entropy}
            return logprobs.sum(), {name: found[name] for name in names}

        outputs = self.run(microbatches, keep, forward_only=True)
        return [self._on_all_stages(microbatches, [metrics[name] for metrics in outputs]) for name in names]

    @staticmethod
    def _on_all_stages(microbatches: Sequence[Microbatch], found: list[Tensor]) -> list[Tensor]:
        """[r] of each microbatch, from the last pipeline stage; elsewhere nothing has been found."""
        group = parallel_state.get_pipeline_model_parallel_group()
        scores = []
        for number, microbatch in enumerate(microbatches):
            shape = (microbatch.batch.groups.num_predicted_tokens,)
            values = found[number] if found else None
            scores.append(from_last(values, shape, microbatch.batch.tokens.device, group))
        return scores

    def reduce_metrics(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """`run`'s metrics over microbatches and data-parallel ranks: sums, the largest where a name ends in "_max". Known on
        every rank."""
        totals = None
        if outputs:
            group = parallel_state.get_data_parallel_group()
            largest = [name for name in outputs[0] if name.endswith("_max")]
            names = [name for name in outputs[0] if name not in largest]
            values = torch.stack([sum(o[name].double() for o in outputs) for name in names])
            torch.distributed.all_reduce(values, group=group)
            if largest:
                most = torch.stack([torch.stack([o[name].double() for o in outputs]).amax() for name in largest])
                torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group)
                values = torch.cat([values, most])
            totals = dict(zip(names + largest, values.tolist(), strict=True))
        return broadcast_object(totals, -1, parallel_state.get_pipeline_model_parallel_group())

    def _finalize(self, model, num_tokens, **kwargs) -> None:
        """Sum gradients. Megatron would divide by the token counts that the loss function returns; ours arrive normalised."""
        finalize_model_grads(model, None, **kwargs)
        if self._gather is not None:
            self._gather.nothing_to_gather()

    def gather_weights(self) -> None:
        """Wait until this rank has all weights of the last step. For what reads or writes weights without calling their
        modules, such as a checkpoint; modules wait themselves."""
        if self._gather is not None:
            self._gather.finish()

    def zero_grad(self) -> None:
        for piece in self.pieces:
            piece.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in self.routers:
            router.begin()

    def step(self) -> dict[str, float]:
        """Optimizer and scheduler step. Returns grad_norm, lr, and whether both were left out: skipped, 0 or 1; of a model with
        experts what `finish_step` tells as well.

        Raises:
            SkippedError: one more in a row than may be left out; no parameter has been changed.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.prepare_grads()
        grad_norm = gradient_norm(self.optimizer, next(self.module.parameters()).device).item()
        # Without a loss scaler Megatron itself would step, and spread the NaN to all weights.
        if why := self.skipping.why(grad_norm):
            self._skipped += 1
            if self._skipped > self.skipping.most:
                times = f" {self._skipped} times in a row" if self.skipping.most else ""
                raise SkippedError(f"{why}{times}: the step was not taken; lower model.optim.lr or check the data")
            logger.warning("%s: an optimizer step is left out (%d in a row)", why, self._skipped)
            return {"grad_norm": grad_norm, "lr": float(lr), "skipped": 1.0} | self._experts_told(applied=False)
        self._skipped = 0
        self.gather_weights()  # nobody has asked for some of them
        clip_gradients(self.optimizer, grad_norm, self.clip_grad)
        self.optimizer.step_with_ready_grads()
        if self._gather is not None:
            self._gather.start()
        self.scheduler.step(increment=1)
        return {"grad_norm": grad_norm, "lr": float(lr), "skipped": 0.0} | self._experts_told(applied=True)

    def _experts_told(self, applied: bool) -> dict[str, float]:
        return {} if self.config.num_moe_experts is None else finish_step(self.routers, applied)


def _of_no_response(groups: PrefixGroups) -> PrefixGroups:
    """The same layout, whose rows count for nothing where experts are counted."""
    idle = PrefixGroups.from_trees(groups.trees, groups.num_tokens, groups.position_ids.device)
    idle.derived["response_counts"] = torch.zeros_like(idle.group_ids)
    return idle


def _too_large(stream: PackedTokens) -> str:
    return (
        f"at a stream of {stream.groups.num_tokens} rows, of which {stream.groups.num_predicted_tokens} predict: lower "
        "model.micro_batch_tokens or model.micro_batch_size, set model.activations_checkpoint_granularity=full, or take more "
        "ranks; tools/plan.py says what fits"
    )
