"""What the ranks of a layout say of rows, and make of one block, where what enters the block is kept and where it is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.blocks.blocks import tapped
from megatron_ext.blocks.inputs import BlockInputs
from megatron_ext.blocks.pairs import split_pairs
from megatron_ext.blocks.places import parse_places
from megatron_ext.blocks.training import train_only_places
from megatron_ext.losses.lftf import kept_text_loss, pair_loss
from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine
from recipes.bias.streams import LFTFMicrobatch, RowStreams
from tests.distributed.scenarios import copies, optim
from tests.distributed.sharding import load_full, ranks_here
from tests.gpt_cases import small_config

__all__ = ["PAIR", "KeptCase", "kept_inputs"]

PAIR = (3, 8)


@dataclass
class KeptCase:
    """
    Attributes:
        place: that trains, as a configuration has it.
        rows: of the kinds "pairs" and "texts".
        batches: (kind, numbers) of each stream of a step; data-parallel ranks take them in turns.
        limit: bytes that may be kept; None: nothing is kept.
        folder: for files.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    place: Any
    rows: dict[str, list[list[int]]]
    batches: list[tuple[str, list[int]]]
    limit: int | None = None
    folder: Path | None = None


def kept_inputs(device: torch.device, case: KeptCase) -> dict[str, Any]:
    """What is said of the rows, twice; two steps; how often each block of this stage ran in the second asking and the steps."""
    model = build_gpt(small_config(**case.fields), device)
    load_full(model, case.weights)
    places = parse_places(case.place)
    train_only_places(model, places)
    streams, left = RowStreams(model, case.rows, ("texts",), PAIR), None
    if case.limit is not None:
        left = streams.keep(BlockInputs(model, places[0].block, case.limit, case.folder))
    said = {kind: streams.ask(kind) for kind in case.rows}
    ran: Counter = Counter()
    with tapped(model, lambda block, before, after: ran.update([block])):
        again = {kind: streams.ask(kind) for kind in case.rows}
        engine = Engine(model, optim(), total_steps=2)
        metrics = [_step(engine, streams, case, said) for _ in range(2)]
    kept = streams.inputs.kept if streams.inputs else 0
    return {"ranks": ranks_here(), "said": said, "again": again, "metrics": metrics, "ran": dict(ran), "kept": kept,
            "left": left, "parameters": copies(model)}  # fmt: skip


def _step(engine: Engine, streams: RowStreams, case: KeptCase, said: dict[str, list[Tensor]]) -> dict[str, float]:
    data = parallel_state.get_data_parallel_group()
    microbatches, total = [], float(sum(len(numbers) for _, numbers in case.batches))
    for kind, numbers in case.batches[dist.get_rank(data) :: dist.get_world_size(data)]:
        before = [said[kind][i] for i in numbers]
        frozen = torch.cat(before) if kind == "texts" else torch.stack(before)
        microbatches.append(
            LFTFMicrobatch(streams.batch(kind, numbers), kind=kind, frozen=frozen, total=total)
        )  # fmt: skip
    return engine.update(microbatches, _loss)


def _loss(microbatch: LFTFMicrobatch, logprobs: Tensor, entropy: Tensor):
    if microbatch.kind == "texts":
        loss = (kept_text_loss(logprobs, microbatch.frozen) + 0.1 * logprobs).sum() / microbatch.total
    else:
        loss = pair_loss("balanced", *split_pairs(logprobs), microbatch.frozen).sum() / microbatch.total
    return loss, {"loss": loss.detach()}
