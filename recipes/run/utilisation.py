"""How much of what GPUs could compute a step has used: model FLOPs utilisation (arXiv 2204.02311, appendix B).

Counted are the multiply-adds of matrix products that the passes over packed streams need (`megatron_ext.flops`), a shared prompt
once, and nothing twice that is computed anew to save memory; over the seconds of these passes, and the peak in dense bf16 of all
GPUs. Sampling is in neither. A CPU has no number, and neither has a GPU that the planner's table does not know, nor training
adapters, whose backward pass leaves out products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_ext.flops import BACKWARD_OVER_FORWARD, ModelShape, model_flops
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.planner.hardware import hardware_of
from recipes.run.session import Session

__all__ = ["Utilisation"]


class Utilisation:
    """
    Args:
        gpu: what CUDA calls each of them; None: there is none.
        ranks: of the run, each with one.
        sum_over_data: sums over data-parallel ranks.
    """

    def __init__(
        self, model: GPTModelConfig, gpu: str | None, ranks: int, sum_over_data: Callable[[float], list[float]]
    ):
        self.shape, self.sum_over_data = ModelShape.of(model), sum_over_data
        known = None if gpu is None else hardware_of(gpu)
        self._peak = None if known is None else ranks * known.flops

    @classmethod
    def of_run(cls, session: Session) -> Utilisation:
        """A GPU whose peak is not known is told of."""
        counted = session.device.type == "cuda" and session.config.model.peft is None
        gpu = torch.cuda.get_device_name(session.device) if counted else None
        if gpu is not None and hardware_of(gpu) is None:
            session.say(f"train_optim/mfu is left out: megatron_ext/planner/hardware.py has no {gpu}")
        return cls(session.config.model, gpu, dist.get_world_size(), session.sum_over_data)

    def of_step(self, streams: Sequence[PrefixGroups], scoring: int, seconds: float) -> dict[str, float]:
        """`train_optim/mfu`, or nothing where it is not known. Every data-parallel rank calls it.

        Args:
            streams: this data-parallel rank's.
            scoring: passes without gradient over each of them, beside the one with it.
            seconds: that all passes have taken.
        """
        if self._peak is None:
            return {}
        forward = sum(model_flops(self.shape, groups.trees, backward=False).total for groups in streams)
        (flops,) = self.sum_over_data((scoring + 1 + BACKWARD_OVER_FORWARD) * forward)
        return {"train_optim/mfu": flops / (seconds * self._peak)}
