"""What differs between the versions of Megatron-Core that this package runs on, 0.16.1 to 0.19. Nothing else asks for it.

| what | 0.16 | 0.17 and newer |
|---|---|---|
| Python | 3.10 and newer | 3.12 and newer |
| Triton | is done without | must be importable |
| writers of `dist_checkpointing.save` | its own | its own for `async_strategy="mcore"`, else nvidia-resiliency-ext |
| gradients of a norm | `get_main_grads_for_grad_norm` | `get_grads_for_grad_norm`, in 0.19 |
| what is no tensor in a checkpoint | in `common.pt`, which must be there | among the tensors, or in `common.pt` |
| says at every start | nothing | that what this package uses of it, and 0.16 alone has, will go: see `KNOWN` |

To know the version nothing of Megatron is imported.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from megatron_ext.runtime.install_check import megatron_package_info

__all__ = ["DISPENSABLE", "VERSION", "finish_part", "gradients_for_norm", "quieten", "save_sharded"]

VERSION: tuple[int, int] = tuple((megatron_package_info() or {"VERSION": (0, 0)})["VERSION"][:2])
# What `import megatron.core` would load for a GPU or a server, and does without.
DISPENSABLE = ("triton", "wandb") if VERSION < (0, 17) else ("wandb",)
COMMON_FILE = "common.pt"
# Logger of Megatron's -> how what it need not say to a user of this package begins.
KNOWN = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


@functools.cache  # also in a fork
def quieten() -> None:
    """Keep from the log what newer versions say of themselves, and no user can act upon."""
    for name, known in KNOWN.items():
        logging.getLogger(name).addFilter(lambda record, known=known: not record.getMessage().startswith(known))


def save_sharded(state: dict[str, Any], place: Path):
    """Megatron's request to write a folder of sharded tensors with its own writers; every rank calls it."""
    from megatron.core import dist_checkpointing

    own = {} if VERSION < (0, 17) else {"async_strategy": "mcore"}
    return dist_checkpointing.save(state, str(place), async_sharded_save=True, **own)


def finish_part(place: Path) -> None:
    """Make a written folder one that every version loads: ours hold nothing but tensors. One rank calls it."""
    import torch

    if not (place / COMMON_FILE).exists():
        torch.save({}, place / COMMON_FILE)


def gradients_for_norm(optimizer) -> list[Any]:
    """Of one of Megatron's optimizers, the gradients on this rank that no other rank counts."""
    ask = getattr(optimizer, "get_grads_for_grad_norm", None) or optimizer.get_main_grads_for_grad_norm
    return ask()
