"""Training engine: Megatron's DDP, optimizer and pipeline schedule around one model.

The engine knows microbatches and loss functions, not algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.errors import DivergedError, UserError
from megatron_ext.grouping import PackedTokens
from megatron_ext.kinds import Speed
from megatron_ext.runtime.collectives import broadcast_object, from_last
from megatron_ext.runtime.host_optimizer import HostAdamW
from megatron_ext.runtime.optimizer_state import single_optimizers
from megatron_ext.runtime.pieces import pieces_of, streams_per_turn
from megatron_ext.runtime.trimmed import TrimmedPipeline, check_all_train, first_trained_stage, process_groups

__all__ = ["Engine", "Microbatch", "OptimConfig", "SchedConfig"]

SCHEDULES = {"constant": "constant", "CosineAnnealing": "cosine", "linear": "linear"}


@dataclass
class SchedConfig:
    """Learning-rate schedule, in optimizer steps."""

    # What the rate does after warm-up: "constant" (lr), "CosineAnnealing" or "linear" (falls to min_lr).
    name: str = "constant"
    # Optimizer steps in which the rate rises from 0 to lr; a GRPO step may have several. 0: lr from the first.
    warmup_steps: int = 0
    # Optimizer steps, warm-up included, until min_lr is reached, where it stays; null: the run's own number. Set it for
    # a run that may be made longer. Without meaning for "constant".
    decay_steps: int | None = None
    # Where a falling rate ends; at most lr.
    min_lr: float = 0.0

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise UserError(f"model.optim.sched.name must be one of {', '.join(SCHEDULES)}, got {self.name!r}")


@dataclass
class OptimConfig:
    """Megatron's optimizer, under NeMo's keys."""

    # "adam" (AdamW) or "distributed_fused_adam" (the same, its state sharded over data-parallel ranks).
    name: Speed[str] = "distributed_fused_adam"
    # Learning rate, the highest of the schedule.
    lr: float = 1e-4
    # AdamW's: each step takes lr x this x the weight from every matrix; norms and biases have none. 0: none.
    weight_decay: float = 0.0
    # Decay of Adam's first and second moment.
    betas: tuple[float, float] = (0.9, 0.95)
    # Added to Adam's denominator, the root of the second moment.
    eps: float = 1e-8
    # Keep Adam's two moments, 8 bytes for each number, in the host's memory, and take the step there: slower, and the answer
    # where a GPU has no room for them. fp32 copies of bf16 weights stay on the GPU.
    optimizer_cpu_offload: Speed[bool] = False
    # Sum gradients over data-parallel ranks while the last stream's backward pass still runs, in buckets of 40 million numbers
    # or more, instead of after it.
    overlap_grad_reduce: Speed[bool] = False
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self):
        self.betas = tuple(self.betas)
        if self.name not in ("adam", "distributed_fused_adam"):
            raise UserError(f"model.optim.name must be adam or distributed_fused_adam, got {self.name!r}")
        if self.lr <= 0 or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"model.optim: lr={self.lr} must be positive and betas={self.betas} two numbers in [0, 1)")
        if self.sched.min_lr > self.lr:
            raise UserError(f"model.optim.sched.min_lr={self.sched.min_lr} must not exceed model.optim.lr={self.lr}")


@dataclass(frozen=True)
class Microbatch:
    """One packed stream. An algorithm adds, as fields of a subclass, what its loss needs beside it."""

    batch: PackedTokens
    temperature: float = 1.0


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

    Raises:
        UserError: a model in pieces of which some train nothing.
    """

    def __init__(
        self, model: torch.nn.Module, optim: OptimConfig | None = None, total_steps: int = 1, clip_grad: float = 1.0
    ):
        self.module = model
        self.config = model.config
        self.optimizer = self.scheduler = None
        self.pieces = pieces_of(model)  # with an optimizer, each in its DDP
        self._pipeline: dict[str, Any] = {}  # for the schedule, where lower stages train nothing
        self._detach_input = False
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
        sharded = optim.name == "distributed_fused_adam"
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=sharded, overlap_grad_reduce=optim.overlap_grad_reduce
        )
        self.pieces = [
            DistributedDataParallel(self.config, ddp, piece, disable_bucketing=number > 0)  # as Megatron has it
            for number, piece in enumerate(self.pieces)
        ]
        for piece in self.pieces:
            piece.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.sched.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1],
                adam_eps=optim.eps,
                bf16=self.config.bf16,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=sharded,
                clip_grad=clip_grad,
            ),
            self.pieces,
        )
        if optim.optimizer_cpu_offload:
            for single in single_optimizers(self.optimizer):
                if single.optimizer is not None:  # nothing trains here
                    single.optimizer = HostAdamW(single.optimizer)
        self.scheduler = _scheduler(self.optimizer, optim, total_steps)
        # Megatron would divide by the token counts that the loss function returns; ours arrive normalised.
        self.config.finalize_model_grads_func = lambda model, num_tokens, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
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
        """

        streams = [(microbatch, True) for microbatch in microbatches]
        stages, pieces = parallel_state.get_pipeline_model_parallel_world_size(), len(self.pieces)
        if pieces > 1:
            # The interleaved schedule takes no fewer streams than stages: the smallest once more, for nothing.
            smallest = min(microbatches, key=lambda m: m.batch.groups.num_tokens)
            streams += [(smallest, False)] * (stages - len(streams))
            self.config.microbatch_group_size_per_vp_stage = streams_per_turn(len(streams), stages)

        def forward_step(iterator, model):
            microbatch, counts = next(iterator)
            batch = microbatch.batch
            if self._detach_input and not forward_only:
                decoder = self.module.decoder
                if decoder.input_tensor is not None:
                    decoder.set_input_tensor(decoder.input_tensor.detach())
            output = model(
                batch.tokens,
                batch.position_ids,
                packed_seq_params=batch.groups,
                labels=batch.labels,
                temperature=microbatch.temperature,
                media=batch.media,
            )

            def reduce(output):
                loss, metrics = loss_function(microbatch, *output) if counts else (0 * output[0].sum(), {})
                # Megatron accumulates the middle value (a token count) and ours is not used.
                return loss, torch.ones((), dtype=torch.int, device=loss.device), metrics

            return output, reduce

        iterators = [iter(streams) for _ in self.pieces]
        with torch.set_grad_enabled(not forward_only):
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
        """One optimizer step over all microbatches of all data-parallel ranks. Returns the metrics' sums, and `step`'s.

        Raises:
            DivergedError: the gradient is not finite; no parameter has been changed.
        """
        self.zero_grad()
        outputs = self.run(microbatches, loss_function)
        return self.reduce_metrics(outputs) | self.step()

    def score(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Log-probabilities [r] of each microbatch, without gradient, known on every pipeline stage."""

        def keep(microbatch, logprobs, entropy):
            return logprobs.sum(), {"logprobs": logprobs}

        outputs = self.run(microbatches, keep, forward_only=True)
        group = parallel_state.get_pipeline_model_parallel_group()
        scores = []
        for number, microbatch in enumerate(microbatches):
            values = outputs[number]["logprobs"] if outputs else None
            batch = microbatch.batch
            scores.append(from_last(values, (batch.groups.num_predicted_tokens,), batch.tokens.device, group))
        return scores

    def reduce_metrics(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum `run`'s metrics over microbatches and data-parallel ranks; known on every rank."""
        totals = None
        if outputs:
            names = list(outputs[0])
            sums = torch.stack([sum(o[name].double() for o in outputs) for name in names])
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
            totals = dict(zip(names, sums.tolist(), strict=True))
        return broadcast_object(totals, -1, parallel_state.get_pipeline_model_parallel_group())

    def zero_grad(self) -> None:
        for piece in self.pieces:
            piece.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> dict[str, float]:
        """Optimizer and scheduler step. Returns grad_norm and lr.

        Raises:
            DivergedError: the gradient is not finite; no parameter has been changed.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        # Asked before the step: without a loss scaler Megatron itself would step, and spread the NaN to all weights.
        self.optimizer.prepare_grads()
        grad_norm = self.optimizer.get_grad_norm()
        if not torch.isfinite(torch.as_tensor(grad_norm)):
            raise DivergedError(
                f"the gradient norm is {grad_norm}: the step was not taken; lower model.optim.lr or check the data"
            )
        self.optimizer.step()
        self.scheduler.step(increment=1)
        return {"grad_norm": float(grad_norm), "lr": float(lr)}


def _scheduler(optimizer, optim: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    sched = optim.sched
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=sched.min_lr,
        lr_warmup_steps=sched.warmup_steps,
        lr_decay_steps=max(sched.decay_steps or total_steps, sched.warmup_steps + 1),
        lr_decay_style=SCHEDULES[sched.name],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
