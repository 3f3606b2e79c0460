"""One block's weights as a small file: what fine-tuning one block leaves behind.

Safetensors, whole tensors whatever the tensor-parallel size, under Megatron's names for fused layers
(`decoder.layers.7.self_attention.linear_qkv.weight`). The metadata names the block and carries a digest of the weights
that it replaces, so that a delta is not put on another model, and one of all that the file says, so that damage is found.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from torch import Tensor

from megatron_ext.blocks.blocks import block_prefix, blocks_here
from megatron_ext.errors import UserError
from megatron_ext.files import whole
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.placement import PRECISIONS
from megatron_ext.runtime.collectives import gather_objects, together

__all__ = ["apply_delta", "block_digest", "block_weights", "content_digest", "read_delta", "save_delta"]

FORMAT = "megatron_ext.block_delta.1"


def block_weights(model: PrefixGroupedGPT, block: int) -> dict[str, Tensor] | None:
    """Whole tensors of one block, on the host, gathered over the tensor-parallel group.

    Every rank calls it; None on the pipeline stages that do not hold the block.
    """
    shards = _shards(model, block)
    if shards is None:
        return None
    mine = [(s.key, s.global_shape, s.global_offset, s.data.detach().cpu()) for s in shards]
    found: dict[str, Tensor] = {}
    for key, shape, offset, data in (s for shards in gather_objects(mine, model.pg_collection.tp) for s in shards):
        target = found.setdefault(key, torch.empty(shape, dtype=data.dtype))
        target[_place(offset, data.shape)] = data
    return dict(sorted(found.items()))


def block_digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def content_digest(description: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a file's tensors and of what its description says besides this digest, which it keeps as "content"."""
    about = {key: value for key, value in description.items() if key != "content"}
    text = f"{json.dumps(about, sort_keys=True)}\n{block_digest(tensors)}"
    return hashlib.sha256(text.encode()).hexdigest()


def save_delta(path: Path, model: PrefixGroupedGPT, block: int, base: str | None) -> None:
    """Write one block's weights; every rank calls it, one writes.

    Args:
        base: `block_digest` of the block before training; None on ranks that do not hold it.
    """
    weights = block_weights(model, block)
    ranks = (
        model.pg_collection.tp.rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    with together():
        if weights is not None and ranks == (0, 0):
            _write(path, model.model_config, block, weights, base)


def _write(path: Path, config: GPTModelConfig, block: int, weights: dict[str, Tensor], base: str) -> None:
    from safetensors.torch import save_file

    dtype = str(config.dtype).removeprefix("torch.")
    tensors = {block_prefix(block) + name: tensor for name, tensor in weights.items()}
    description = {"block": block, "num_layers": config.num_layers, "base": base, "dtype": dtype}
    description["content"] = content_digest(description, tensors)
    with whole(path) as unfinished:
        save_file(tensors, str(unfinished), metadata={"format": FORMAT, "delta": json.dumps(description)})


def read_delta(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(description, tensors) of a delta: block, num_layers, base, dtype and content.

    Raises:
        UserError: no delta of ours, a damaged one, or one with a number that is not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the delta {path}: {' '.join(str(error).split())}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no delta of one block: its format is {metadata.get('format')!r}")
    try:
        description = json.loads(metadata["delta"])
        kinds = {"block": int, "num_layers": int, "base": str, "dtype": str, "content": str}
        good = all(isinstance(description[key], kind) for key, kind in kinds.items())
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"the delta {path} is damaged: its description is not what was saved; take another")
    if description["content"] != content_digest(description, tensors):
        raise UserError(f"the delta {path} is damaged: its checksum differs from its content; take another")
    block, layers, dtypes = description["block"], description["num_layers"], [str(d) for d in PRECISIONS.values()]
    if not 0 <= block < layers or f"torch.{description['dtype']}" not in dtypes:
        raise UserError(
            f"the delta {path} is of block {block} of {layers} in {description['dtype']}, which no model of ours has; take "
            "another"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"the delta {path} holds a number that is not finite in {name}: its training broke; take another"
            )
    return description, tensors


def apply_delta(path: str | Path, model: PrefixGroupedGPT) -> int:
    """Put a delta's block into the model; every rank calls it. Returns the block's number.

    Raises:
        UserError: no delta of ours, of a model of another shape, or made from other weights. Nothing has been changed
            then.
    """
    path = Path(path)
    description, tensors = read_delta(path)
    block, layers = description["block"], model.model_config.num_layers
    if description["num_layers"] != layers:
        raise UserError(
            f"the delta {path} belongs to a model of {description['num_layers']} blocks, this one has {layers}"
        )
    dtype = str(model.model_config.dtype).removeprefix("torch.")
    if description["dtype"] != dtype:
        raise UserError(
            f"the delta {path} was trained in {description['dtype']}, this model is {dtype}, in which its weights were others: "
            "set model.precision to what it was trained in (32 or bf16)"
        )
    new = {name.removeprefix(block_prefix(block)): tensor for name, tensor in tensors.items()}
    current = block_weights(model, block)
    with together():
        if current is not None and (wrong := _mismatch(new, current, description["base"])):
            raise UserError(f"the delta {path} does not fit: {wrong}")
    if current is not None:
        with torch.no_grad():
            for shard in _shards(model, block):
                shard.data.copy_(new[shard.key][_place(shard.global_offset, shard.data.shape)])
    return block


def _mismatch(new: dict[str, Tensor], current: dict[str, Tensor], base: str) -> str | None:
    if new.keys() != current.keys():
        return f"its tensors {', '.join(sorted(new.keys() ^ current.keys())[:3])} and the model's differ"
    for name, tensor in new.items():
        if tensor.shape != current[name].shape:
            return f"{name} is {tuple(tensor.shape)}, the model's {tuple(current[name].shape)}"
    if base != block_digest(current):
        return "it was made from other weights than the checkpoint's; name the checkpoint it was trained from"
    return None


def _shards(model: PrefixGroupedGPT, block: int) -> list[ShardedTensor] | None:
    """This rank's shards of the block, each with its place in the whole tensor; views of the parameters."""
    layer = blocks_here(model).get(block)
    if layer is None:
        return None
    state = layer.sharded_state_dict()
    apply_factories(state)
    found: list[ShardedTensor] = []

    def collect(node) -> None:
        if isinstance(node, ShardedTensor):
            found.append(node)
        elif isinstance(node, dict):
            for value in node.values():
                collect(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                collect(value)
        assert not isinstance(node, ShardedTensorFactory), node.key

    collect(state)
    return found


def _place(offset: tuple[int, ...], shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
