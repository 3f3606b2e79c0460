"""Our Transformer Engine model beside the local one: names, shapes, loss, and checkpoints of one read by the other.

Imported by te_modules.py when it stands in Transformer Engine's place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_ext.models import PrefixGroupedGPT, build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.fp8 import FP8_ROWS
from megatron_ext.models.megatron_config import megatron_config
from megatron_ext.runtime.checkpoint import load_weights, save_checkpoint
from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed, shutdown
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optim import OptimConfig
from tests.gpt_cases import make_rollout, named_gradients, pack_rollout, randomize, run, small_config
from tests.pretend import pretend
from tools.gpu.gpts import local_name

__all__ = ["compare"]

IMPLEMENTATIONS = ("local", "transformer_engine")
LENGTHS = [(11, [2, 7, 7]), (5, [3])]


def compare(folder: Path, with_checkpoints: bool, played) -> dict:
    """What differs between the two, in this process as the only rank; of names and shapes also as one of two under TP and SP.

    Args:
        folder: for checkpoints; made.
        played: te_modules' `Version`, which knows in what contexts of FP8 modules were called.
    """
    try:
        device = initialize(ParallelSizes())
        set_seed(1)
        local, te = (build_gpt(_config(name), device) for name in IMPLEMENTATIONS)
        found = {"names": _different_names(local, te)} | _different_numbers(local, te)
        found["optimizer"] = _optimizer_of(te)
        found["fp8"] = {
            f"{recipe}, {recompute or 'none'}": _in_fp8(recipe, recompute, device, played)
            for recipe in FP8_ROWS
            for recompute in (None, "full")
        }
        if with_checkpoints:
            found["checkpoints"] = _through_checkpoints(folder, local, te)
        pretend(1, 2, ParallelSizes(tensor=2))
        sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
        found["names of a tensor-parallel rank"] = _different_names(
            *(build_gpt(_config(name, **sizes), device) for name in IMPLEMENTATIONS)
        )
        return found
    except TypeError as error:
        return {"refused": str(error)}
    finally:
        shutdown()


def _optimizer_of(te: PrefixGroupedGPT) -> str:
    """The name of the class behind Megatron's optimizer."""
    (part, *_) = Engine(te, OptimConfig()).optimizer.chained_optimizers
    return type(part.optimizer).__name__


def _in_fp8(recipe: str, recompute: str | None, device: torch.device, played) -> dict:
    """A forward and backward pass as a GPU's configuration has it, beside one without FP8."""
    config = _config(
        "transformer_engine", precision="bf16", fp8="hybrid", fp8_recipe=recipe, activations_checkpoint_granularity=recompute,
        ffn_hidden_size=64,
    ).on("cuda")  # fmt: skip
    batch = pack_rollout(make_rollout(torch.Generator().manual_seed(1), LENGTHS, 61), pad=stream_multiple(config))
    answers = []
    played.contexts.clear()
    for settings in (config, replace(config, fp8=None)):
        model = PrefixGroupedGPT(settings, megatron_config(settings, "cuda"), device)
        randomize(model, torch.Generator().manual_seed(2))
        logprobs, _ = run(model, batch)
        logprobs.sum().backward()
        answers.append({"logprobs": logprobs.detach()} | named_gradients(model))
    with_fp8, without = answers
    contexts = played.contexts
    return {
        "same": all(torch.equal(with_fp8[name], value) for name, value in without.items()),
        "recipes": sorted({context.recipe for context in contexts}),
        "layers": len(contexts),
        "linears": sum(context.linears for context in contexts),
        "kept": sum(context.kept for context in contexts),
    }


def _config(implementation: str, **sizes):
    return small_config(transformer_impl=implementation, **sizes)


def _different_names(local: PrefixGroupedGPT, te: PrefixGroupedGPT) -> list[str]:
    """Keys, global shapes and dtypes of what a checkpoint holds, that only one of them has."""
    ours, theirs = (_checkpoint_entries(model) for model in (local, te))
    return sorted(ours ^ theirs)


def _checkpoint_entries(model: PrefixGroupedGPT) -> set[str]:
    found = set()
    for entry in nested_values(model.sharded_state_dict()):
        if isinstance(entry, ShardedTensor):
            found.add(f"{entry.key} {tuple(entry.global_shape)} {entry.dtype}")
        else:
            found.add(entry.key)
    return found


def _different_numbers(local: PrefixGroupedGPT, te: PrefixGroupedGPT) -> dict[str, float]:
    """Largest differences of log-probabilities and of gradients, with the same weights."""
    rng = torch.Generator().manual_seed(1)
    randomize(local, rng)
    weights = {local_name(name): p for name, p in te.named_parameters()}
    with torch.no_grad():
        for name, parameter in local.named_parameters():
            weights[name].copy_(parameter)
    batch = pack_rollout(make_rollout(rng, LENGTHS, 61))
    answers = []
    for model in (local, te):
        logprobs, _ = run(model, batch)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        gradients = {local_name(name): g for name, g in named_gradients(model).items()}
        answers.append((logprobs.detach(), gradients))
    (a, ours), (b, theirs) = answers
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max() for g in ours.values())
    return {
        "logprobs": float((a - b).abs().max()),
        "gradients": float(max((ours[name] - theirs[name]).abs().max() for name in ours) / scale),
    }


def _through_checkpoints(folder: Path, local: PrefixGroupedGPT, te: PrefixGroupedGPT) -> list[str]:
    """Parameters that a checkpoint of the one does not bring to the other."""
    wrong = []
    for written, read in ((local, te), (te, local)):
        name = "local" if written is local else "te"
        save_checkpoint(folder / name, written, {})
        expected = {local_name(n): p.detach().clone() for n, p in written.named_parameters()}
        with torch.no_grad():
            for parameter in read.parameters():
                parameter.zero_()
        load_weights(folder / name, read)
        wrong += [n for n, p in read.named_parameters() if not torch.equal(p, expected[local_name(n)])]
    return wrong
