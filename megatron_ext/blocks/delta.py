"""The weights of some places as a small file: what fine-tuning one block, or a part of one, leaves behind.

Safetensors, whole tensors whatever the tensor-parallel size, under Megatron's names for fused layers
(`decoder.layers.7.self_attention.linear_qkv.weight`); of heads their rows and columns alone. The metadata names the places and
carries a digest of the weights that they replace, so that a delta is not put on another model, and one of all that the file says,
so that damage is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from torch import Tensor

from megatron_ext.adapters import adapter_parameters
from megatron_ext.blocks.blocks import block_prefix, blocks_here
from megatron_ext.blocks.places import ModelPlace, check_places, head_rows, parse_places
from megatron_ext.errors import UserError
from megatron_ext.files import whole
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.placement import PRECISIONS
from megatron_ext.runtime.collectives import gather_objects, together
from megatron_ext.runtime.slices import write_slices

__all__ = ["apply_delta", "base_digest", "content_digest", "place_weights", "read_delta", "save_delta", "tensor_digest"]

FORMATS = ("megatron_ext.block_delta.2", "megatron_ext.block_delta.1")  # written; read, too: one whole block
# All experts of a block are one tensor in Megatron's checkpoints; in a delta each has its own, by its name in the whole model.
EXPERTS, ONE_EXPERT = "mlp.experts.experts.", "mlp.experts.local_experts."


@dataclass(frozen=True)
class _PlaceShard:
    """This rank's numbers of one tensor of a place.

    Attributes:
        key: of the tensor in the whole model.
        shape: of the tensor as a delta has it.
        index: where in it they are.
        data: they themselves; see `own`.
        dim, own: of heads, where in the parameter `data` they are; None: they are `data`.
        of_expert: whose ranks are others than the rest of the model has.
    """

    key: str
    shape: tuple[int, ...]
    index: tuple[slice | Tensor, ...]
    data: Tensor
    dim: int = 0
    own: Tensor | None = None
    of_expert: bool = False

    def read(self) -> Tensor:
        return self.data if self.own is None else self.data.index_select(self.dim, self.own)

    def write(self, value: Tensor) -> None:
        if self.own is None:
            self.data.copy_(value)
        else:
            self.data.index_copy_(self.dim, self.own, value.to(self.data.device))


def place_weights(model: PrefixGroupedGPT, places: Sequence[ModelPlace]) -> dict[str, Tensor]:
    """Whole tensors of some places, without adapters, by their names in the whole model, on the host of every rank. Every rank
    calls it."""
    write_slices(model)
    groups = {
        False: parallel_state.get_model_parallel_group(),
        True: parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    }
    mine = list(_shards(model, places))
    found: dict[str, Tensor] = {}
    for of_expert, group in groups.items():
        own = [(s.key, s.shape, s.index, s.read().detach().cpu()) for s in mine if s.of_expert == of_expert]
        for key, shape, index, data in (s for of_rank in gather_objects(own, group) for s in of_rank):
            found.setdefault(key, torch.empty(shape, dtype=data.dtype))[index] = data
    return dict(sorted(found.items()))


def base_digest(weights: dict[str, Tensor]) -> str:
    """`tensor_digest` of what a delta replaces; of one block by the names that tensors have there, as deltas always had it."""
    blocks = {key.split(".")[2] for key in weights}
    common = block_prefix(int(*blocks)) if len(blocks) == 1 else ""
    return tensor_digest({key.removeprefix(common): value for key, value in weights.items()})


def tensor_digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def content_digest(description: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a file's tensors and of what its description says besides this digest, which it keeps as "content"."""
    about = {key: value for key, value in description.items() if key != "content"}
    text = f"{json.dumps(about, sort_keys=True)}\n{tensor_digest(tensors)}"
    return hashlib.sha256(text.encode()).hexdigest()


def save_delta(path: Path, model: PrefixGroupedGPT, places: Sequence[ModelPlace], base: str) -> None:
    """Write the weights of some places; every rank calls it, one writes.

    Args:
        base: `base_digest` of them before training.
    """
    weights = place_weights(model, places)
    with together():
        if dist.get_rank() == 0:
            _write(path, model.model_config, places, weights, base)


def _write(
    path: Path, config: GPTModelConfig, places: Sequence[ModelPlace], tensors: dict[str, Tensor], base: str
) -> None:
    from safetensors.torch import save_file

    description = {
        "places": [place.as_spec() for place in places], "num_layers": config.num_layers, "base": base,
        "dtype": str(config.dtype).removeprefix("torch."),
    }  # fmt: skip
    description["content"] = content_digest(description, tensors)
    with whole(path) as unfinished:
        save_file(tensors, str(unfinished), metadata={"format": FORMATS[0], "delta": json.dumps(description)})


def read_delta(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(description, tensors) of a delta: places, as `parse_places` reads them, num_layers, base, dtype and content.

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
    if metadata.get("format") not in FORMATS:
        raise UserError(f"{path} is no delta of ours: its format is {metadata.get('format')!r}")
    try:
        description = json.loads(metadata["delta"])
        kinds = {"num_layers": int, "base": str, "dtype": str, "content": str}
        places = parse_places(description["places" if metadata["format"] == FORMATS[0] else "block"])
        good = all(isinstance(description[key], kind) for key, kind in kinds.items())
    except (ValueError, KeyError, TypeError):  # a UserError is a ValueError
        good = False
    if not good:
        raise UserError(f"the delta {path} is damaged: its description is not what was saved; take another")
    if description["content"] != content_digest(description, tensors):
        raise UserError(f"the delta {path} is damaged: its checksum differs from its content; take another")
    layers, dtypes = description["num_layers"], [str(d) for d in PRECISIONS.values()]
    wrong = [place.block for place in places if not 0 <= place.block < layers]
    if wrong or f"torch.{description['dtype']}" not in dtypes:
        raise UserError(
            f"the delta {path} is of block {(wrong or [places[0].block])[0]} of {layers} in {description['dtype']}, which no "
            "model of ours has; take another"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"the delta {path} holds a number that is not finite in {name}: its training broke; take another"
            )
    return description | {"places": [place.as_spec() for place in places]}, tensors


def apply_delta(path: str | Path, model: PrefixGroupedGPT) -> tuple[ModelPlace, ...]:
    """Put a delta's weights into the model; every rank calls it. Returns the places that it is of.

    Raises:
        UserError: no delta of ours, of a model of another shape, or made from other weights. Nothing has been changed
            then.
    """
    path = Path(path)
    description, new = read_delta(path)
    places, layers = parse_places(description["places"]), model.model_config.num_layers
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
    check_places(places, layers, model.model_config.num_attention_heads)
    current = place_weights(model, places)
    with together():
        if wrong := _mismatch(new, current, description["base"]):
            raise UserError(f"the delta {path} does not fit: {wrong}")
    with torch.no_grad():
        for shard in _shards(model, places):
            shard.write(new[shard.key][shard.index])
    return places


def _mismatch(new: dict[str, Tensor], current: dict[str, Tensor], base: str) -> str | None:
    if new.keys() != current.keys():
        return f"its tensors {', '.join(sorted(new.keys() ^ current.keys())[:3])} and the model's differ"
    for name, tensor in new.items():
        if tensor.shape != current[name].shape:
            return f"{name} is {tuple(tensor.shape)}, the model's {tuple(current[name].shape)}"
    if base != base_digest(current):
        return "it was made from other weights than the checkpoint's; name the checkpoint it was trained from"
    return None


def _shards(model: PrefixGroupedGPT, places: Sequence[ModelPlace]) -> Iterator[_PlaceShard]:
    """This rank's numbers of some places, without adapters; views of the parameters."""
    here, tp = blocks_here(model), model.pg_collection.tp
    for place in places:
        if (layer := here.get(place.block)) is None:
            continue
        prefix = block_prefix(place.block)
        if place.heads:
            for rows in head_rows(layer, model.model_config, place.heads, tp):
                data = getattr(rows.module, rows.parameter).data
                shape, index = list(data.shape), [slice(None)] * data.dim()
                shape[rows.dim], index[rows.dim] = rows.total, rows.numbers
                yield _PlaceShard(prefix + rows.name, tuple(shape), tuple(index), data, rows.dim, rows.mine)
        else:
            for shard in _sharded_tensors(layer):
                if place.holds(shard.key):
                    yield _whole_shard(prefix, shard)


def _whole_shard(prefix: str, shard: ShardedTensor) -> _PlaceShard:
    """A sharded tensor of a block; of an expert without the axis along which Megatron puts them one behind the other."""
    axes, key = shard.prepend_axis_num, shard.key
    if axes:
        key = key.replace(EXPERTS, f"{ONE_EXPERT}{shard.global_offset[0]}.")
        assert axes == 1 and key != shard.key, f"{shard.key} has {axes} axes before its own"
    offset, shape = shard.global_offset[axes:], shard.global_shape[axes:]
    return _PlaceShard(prefix + key, shape, _place(offset, shard.data.shape), shard.data, of_expert=bool(axes))


def _sharded_tensors(layer: torch.nn.Module) -> list[ShardedTensor]:
    """Of a block, without adapters, by their names there."""
    adapters = adapter_parameters(layer)
    state = {name: value for name, value in layer.sharded_state_dict().items() if name not in adapters}
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
