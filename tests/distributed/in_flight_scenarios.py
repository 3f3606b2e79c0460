"""What real pipeline stages keep of the streams that wait for their backward pass, at the fullest moment of a schedule."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.grouping import pack
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.runtime.activation_offload import LayerInputs
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from tests.distributed.planner_scenarios import here, random_tokens
from tests.layouts import Lengths

__all__ = ["WaitingCase", "waiting"]


@dataclass
class WaitingCase:
    """fields: changes to `small_config`. streams: of these lengths, all alike."""

    fields: dict[str, Any]
    lengths: Lengths
    streams: int


class Entry:
    """A tensor in autograd's hands."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Peak:
    """Bytes of storages that somebody holds, each once, and the most of them at once."""

    def __init__(self):
        self.bytes = self.most = 0
        self._holders: Counter[int] = Counter()

    def hold(self, holder: Any, storage: torch.UntypedStorage) -> None:
        """Until the holder is gone."""
        key, size = storage._cdata, storage.nbytes()
        self._holders[key] += 1
        self.bytes += size if self._holders[key] == 1 else 0
        self.most = max(self.most, self.bytes)
        weakref.finalize(holder, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        self.bytes -= 0 if self._holders[key] else size


def waiting(device: torch.device, cases: list[WaitingCase]) -> list[dict[str, int]]:
    return [_waiting(device, case) for case in cases]


def _waiting(device: torch.device, case: WaitingCase) -> dict[str, int]:
    config = here(case.fields)
    engine = Engine(build_gpt(config, device), OptimConfig())
    parameters = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    batches = [pack(*random_tokens(case.lengths), stream_multiple(config), device=device) for _ in range(case.streams)]
    near, far = Peak(), Peak()
    pack_input, unpack_input = LayerInputs.pack, LayerInputs.unpack

    def keep(tensor: Tensor) -> Tensor | Entry:
        storage = tensor.untyped_storage()
        recomputing = torch._C._current_graph_task_id() >= 0
        if recomputing or not storage.nbytes() or storage.data_ptr() in parameters:
            return tensor
        entry = Entry(tensor)
        near.hold(entry, storage)
        return entry

    def packed(self: LayerInputs, tensor: Tensor):
        """Hooks around layers are asked instead of those around all."""
        found = pack_input(self, tensor)
        if isinstance(found, Tensor):
            return keep(found)
        far.hold(found, found.host.untyped_storage())
        return found

    def sent(module, args, output):
        """The interleaved schedule holds it, too."""
        if isinstance(output, Tensor):
            near.hold(output.untyped_storage(), output.untyped_storage())

    def unpack(kept: Tensor | Entry) -> Tensor:
        return kept.tensor if isinstance(kept, Entry) else unpack_input(kept)

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, unpack)
    engine.zero_grad()
    if config.pipeline_split.pieces > 1:
        for piece in engine.pieces:
            piece.module.register_forward_hook(sent)
    with patch.object(LayerInputs, "pack", packed), patch.object(LayerInputs, "unpack", staticmethod(unpack)), hooks:
        engine.run([Microbatch(b) for b in batches], lambda microbatch, logprobs, entropy: (logprobs.sum(), {}))
    gc.collect()
    assert near.bytes == far.bytes == 0, "something is kept for ever"
    groups = batches[0].groups
    return {
        "here": near.most,
        "there": far.most,
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "tokens": groups.num_tokens,
        "predicted": groups.num_predicted_tokens,
    }
