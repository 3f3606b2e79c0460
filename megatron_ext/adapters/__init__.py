"""Low-rank adapters (LoRA) on the linears of a frozen model. From outside in: `config` says which, `spec` puts `linears` with a
`lora` each into a model, `state` is what one does with all adapters of a model."""

from megatron_ext.adapters.config import LoraConfig
from megatron_ext.adapters.state import (
    adapted_linears,
    adapter_parameters,
    has_adapters,
    keep_adapters,
    merged,
    start_adapters,
    train_adapters,
    without_adapters,
)

__all__ = [
    "LoraConfig", "adapted_linears", "adapter_parameters", "has_adapters", "keep_adapters", "merged", "start_adapters",
    "train_adapters", "without_adapters",
]  # fmt: skip
