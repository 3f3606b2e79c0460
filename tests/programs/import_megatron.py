"""Imports Megatron on a machine without a GPU, and fails if that takes what only a GPU uses, or takes it away for good."""

from __future__ import annotations

import sys

import torch

from megatron_ext.runtime.cpu import import_megatron
from megatron_ext.runtime.megatron_versions import DISPENSABLE

if __name__ == "__main__":
    before = torch.compile
    import_megatron()
    assert "megatron.core" in sys.modules and torch.compile is before
    assert not {"torch._dynamo", *DISPENSABLE} & set(sys.modules)
    import triton  # noqa: F401  can still be had

    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(())) == 2
