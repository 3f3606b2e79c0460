"""Says on which devices tensors are that are made in torch's "meta" context, in a process where Megatron is on the CPU."""

from __future__ import annotations

import torch

from megatron_ext.runtime.cpu import adapt_megatron_to_cpu

if __name__ == "__main__":
    adapt_megatron_to_cpu()
    with torch.device("meta"):
        made = [torch.zeros(2), torch.arange(3), torch.tensor([1.0]), torch.empty(2), torch.randn(2), torch.ones(1)]
    print({x.device.type for x in made})
