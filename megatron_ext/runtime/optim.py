"""What the optimizer's keys mean: their configuration, and Megatron's optimizer and schedule made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.errors import UserError
from megatron_ext.kinds import Speed
from megatron_ext.runtime.lean_adam import MOMENT_TYPES, LeanAdamW, MomentStorage
from megatron_ext.runtime.optimizer_state import single_optimizers

__all__ = ["OptimConfig", "SchedConfig", "ddp_config", "make_optimizer", "make_scheduler"]

SCHEDULES = {"constant": "constant", "CosineAnnealing": "cosine", "linear": "linear"}

BF16_STEP = 2**-8  # half of the last place of a bf16 number just above a power of two, relative to it


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
    # Of which share of each tensor's numbers, above 0, up to 1: all; the GPU takes the step of the others meanwhile. Lower it
    # until what is left no longer fits. Only with optimizer_cpu_offload.
    optimizer_offload_fraction: Speed[float] = 1.0
    # Type in which Adam's first moment is kept: float32, or bfloat16 for half of its 4 bytes a number. Steps are taken in fp32
    # all the same, and differ by the rounding of what is kept. betas[0] must be at most 1 - 1/256.
    exp_avg_dtype: Speed[str] = "float32"
    # Of the second moment, alike. betas[1] must be at most 1 - 1/256: bfloat16 does not see a decay that is slower.
    exp_avg_sq_dtype: Speed[str] = "float32"
    # Sum gradients over data-parallel ranks while the last stream's backward pass still runs, in buckets of 40 million numbers
    # or more, instead of after it.
    overlap_grad_reduce: Speed[bool] = False
    # Tell all data-parallel ranks the new weights while the next pass already runs, each module waiting for its own, instead of
    # before it. Needs overlap_grad_reduce, whose buckets it takes, and distributed_fused_adam. Results stay the same.
    overlap_param_gather: Speed[bool] = False
    # Learning rate of a vision tower that trains (model.freeze_vision_model=false); null: lr. The schedule is that of lr.
    vision_lr: float | None = None
    # Of the connector behind it; null: lr.
    vision_projection_lr: float | None = None
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self):
        self.betas = tuple(self.betas)
        if self.name not in ("adam", "distributed_fused_adam"):
            raise UserError(f"model.optim.name must be adam or distributed_fused_adam, got {self.name!r}")
        if self.lr <= 0 or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"model.optim: lr={self.lr} must be positive and betas={self.betas} two numbers in [0, 1)")
        for key in ("vision_lr", "vision_projection_lr"):
            if (rate := getattr(self, key)) is not None and rate <= 0:
                raise UserError(f"model.optim.{key}={rate} must be positive; to train nothing there, freeze it")
        if not 0 < self.optimizer_offload_fraction <= 1:
            raise UserError(
                f"model.optim.optimizer_offload_fraction={self.optimizer_offload_fraction} must lie in (0, 1]; for none set "
                "optimizer_cpu_offload=false"
            )
        if self.optimizer_offload_fraction != 1 and not self.optimizer_cpu_offload:
            raise UserError(
                f"model.optim.optimizer_offload_fraction={self.optimizer_offload_fraction} needs "
                "model.optim.optimizer_cpu_offload=true, without which nothing lies on the host"
            )
        for key, decay in zip(("exp_avg_dtype", "exp_avg_sq_dtype"), self.betas, strict=True):
            dtype = getattr(self, key)
            if dtype not in MOMENT_TYPES:
                raise UserError(f"model.optim.{key} must be one of {', '.join(MOMENT_TYPES)}, got {dtype!r}")
            if dtype == "bfloat16" and 1 - decay < BF16_STEP:
                raise UserError(
                    f"model.optim.{key}=bfloat16 needs a decay of at most 1 - 1/256 and model.optim.betas has {decay}: bfloat16 "
                    "does not change by less than 1/256 of a number, which would never get smaller; set float32"
                )
        if self.overlap_param_gather and not (self.sharded and self.overlap_grad_reduce):
            raise UserError(
                f"model.optim.overlap_param_gather=true needs model.optim.name=distributed_fused_adam (it is {self.name}), "
                f"without which nothing is gathered, and overlap_grad_reduce=true (it is {self.overlap_grad_reduce}), whose "
                "buckets are gathered"
            )
        if self.sched.min_lr > self.lr:
            raise UserError(f"model.optim.sched.min_lr={self.sched.min_lr} must not exceed model.optim.lr={self.lr}")

    @property
    def sharded(self) -> bool:
        """Whether data-parallel ranks share out the optimizer's state."""
        return self.name == "distributed_fused_adam"

    @property
    def moments(self) -> MomentStorage:
        types = MOMENT_TYPES[self.exp_avg_dtype], MOMENT_TYPES[self.exp_avg_sq_dtype]
        return MomentStorage(self.optimizer_offload_fraction * self.optimizer_cpu_offload, types)


def ddp_config(optim: OptimConfig) -> DistributedDataParallelConfig:
    """Of Megatron's DDP. Gathers of weights are started by the engine, in one order on all ranks: see `WeightGather`."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.sharded,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
        align_param_gather=optim.overlap_param_gather,
    )


def make_optimizer(optim: OptimConfig, config: TransformerConfig, pieces: Sequence[torch.nn.Module]):
    """Megatron's optimizer of a rank's pieces, each in its DDP."""
    given = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.sched.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=optim.sharded,
        overlap_param_gather=optim.overlap_param_gather,
        clip_grad=0.0,  # the engine clips
    )
    optimizer = get_megatron_optimizer(given, list(pieces), get_standard_config_overrides(given) | _own_rates(optim))
    if not optim.moments.is_plain:
        for single in single_optimizers(optimizer):
            if single.optimizer is not None:  # nothing trains here
                single.optimizer = LeanAdamW(single.optimizer, optim.moments)
    return optimizer


def _own_rates(optim: OptimConfig) -> dict[ParamKey, dict[str, float]]:
    """Of parts of the model whose learning rate is not the others': its highest, and what it falls to."""
    given = {"*vision_tower.*": optim.vision_lr, "*media_projector.*": optim.vision_projection_lr}
    falls_to = optim.sched.min_lr / optim.lr
    return {
        ParamKey(name=name): {"max_lr": rate, "min_lr": rate * falls_to}
        for name, rate in given.items()
        if rate is not None
    }


def make_scheduler(optimizer, optim: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    """Of the learning rate, over `total_steps` optimizer steps where the configuration does not say how many."""
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
