"""What every rank does in the tests of servers that get weights from many ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.rollouts import Request, SamplingParams
from megatron_ext.rollouts.vllm import source
from tests.distributed.sharding import load_full
from tests.vllm_cases import home_of, largest_difference, make_model, make_tokenizer, source_of
from tests.vllm_gloo import GlooBroadcasters, gloo_options, gloo_servers

__all__ = ["transfer"]


def transfer(device: torch.device, folder: Path, layout: dict, versions: list[dict[str, Tensor]]) -> list[float]:
    """Start a server, and give it the full model's weights, version after version; how far what it samples is from each."""
    source.CHUNK_BYTES = 40_000
    tokenizer = make_tokenizer(folder / f"tokenizer-{dist.get_rank()}")
    model = make_model(torch.Generator(), device, "llama", tokenizer.vocab_size, **layout)
    home = home_of(folder, tokenizer, torch.Generator().manual_seed(5))
    requests = Request.each([[1, 2, 3], [4] * 9], 4, SamplingParams(max_new_tokens=24))
    found = []
    with gloo_servers(), source_of(model, home, GlooBroadcasters(), **gloo_options()) as opened:
        for number, weights in enumerate(versions):
            load_full(model, weights)
            opened.update_weights(number)
            found.append(largest_difference(model, requests, opened.sample(requests)))
        dist.barrier()  # rank 0 ends the server
    return found
