"""Places in a model that are ranked, and trained alone: whole blocks, the attention or the MLP of one, single heads.

A head is what it alone has: the rows of its query and the columns of the output projection that read it. Keys and values are
shared by the heads of a group, and norms by all of them: they belong to the attention and to no head. So do sinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.blocks.blocks import check_block
from megatron_ext.errors import UserError
from megatron_ext.models.config import GPTModelConfig

__all__ = [
    "GRAINS", "PARTS", "HeadRows", "ModelPlace", "check_places", "every_place", "head_index", "head_rows", "joined",
    "parse_places",
]  # fmt: skip

GRAINS = ("blocks", "parts", "heads")
PARTS = {"attention": ("input_layernorm.", "self_attention."), "mlp": ("pre_mlp_layernorm.", "mlp.")}


@dataclass(frozen=True)
class ModelPlace:
    """
    Attributes:
        block: from 0, over all pipeline stages.
        part: "attention" or "mlp"; None: the whole block.
        heads: of the attention, from 0, sorted; none: all of it.
    """

    block: int
    part: str | None = None
    heads: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """As rankings and messages have it: "17", "17 mlp", "17 heads 0 3"."""
        if self.heads:
            return f"{self.block} head{'s' * (len(self.heads) > 1)} {' '.join(map(str, self.heads))}"
        return str(self.block) if self.part is None else f"{self.block} {self.part}"

    def as_spec(self) -> dict[str, Any]:
        """What `parse_places` reads it from."""
        found: dict[str, Any] = {"block": self.block}
        if self.heads:
            return found | {"heads": list(self.heads)}
        return found | ({} if self.part is None else {"part": self.part})

    def holds(self, name: str) -> bool:
        """Whether a parameter of its block, by its name there, lies in it; of heads, in part."""
        return self.part is None or name.startswith(PARTS[self.part])


def every_place(grain: str, config: GPTModelConfig) -> list[ModelPlace]:
    """All places of one of `GRAINS`, block by block."""
    heads = range(config.num_attention_heads)
    of_block = {
        "blocks": lambda block: [ModelPlace(block)],
        "parts": lambda block: [ModelPlace(block, part) for part in PARTS],
        "heads": lambda block: [ModelPlace(block, "attention", (head,)) for head in heads],
    }[grain]
    return [place for block in range(config.num_layers) for place in of_block(block)]


def parse_places(spec: Any) -> tuple[ModelPlace, ...]:
    """What a configuration names: a block's number, {block, part} or {block, heads}, or a list of such.

    Raises:
        UserError: anything else, or a place that is named twice.
    """
    given = spec if isinstance(spec, (list, tuple)) else [spec]
    if not given:
        raise UserError("the list of places is empty; name a block's number, or {block: 1, part: mlp}")
    places = sorted(map(_parse, given), key=lambda place: (place.block, place.part or "", place.heads))
    for place, following in zip(places, places[1:], strict=False):
        if place.block == following.block and (place.part is None or place.part == following.part):
            both = f"{place.name!r} and {following.name!r}"
            raise UserError(f"{both} overlap; name each place once, and all heads of a block in one list")
    return tuple(places)


def joined(places: Sequence[ModelPlace]) -> tuple[ModelPlace, ...]:
    """The same places of one grain, the heads of each block as one."""
    heads: dict[int, list[int]] = {}
    for place in places:
        heads.setdefault(place.block, []).extend(place.heads)
    found = [ModelPlace(p.block, p.part, tuple(sorted(heads[p.block]))) for p in places]
    return parse_places([place.as_spec() for place in dict.fromkeys(found)])


def _parse(spec: Any) -> ModelPlace:
    if _is_number(spec):
        return ModelPlace(spec)
    wrong = UserError(
        f"{spec!r} is no place; name a block's number, {{block: 1, part: attention}} (or mlp), or {{block: 1, heads: [0, 3]}}"
    )
    if (
        not isinstance(spec, Mapping)
        or not spec.keys() <= {"block", "part", "heads"}
        or not _is_number(spec.get("block"))
    ):
        raise wrong
    part, heads = spec.get("part"), spec.get("heads")
    if heads is not None:
        heads = [heads] if _is_number(heads) else heads
        good = isinstance(heads, (list, tuple)) and heads and all(map(_is_number, heads))
        if not good or len(set(heads)) < len(heads) or part not in (None, "attention"):
            raise wrong
        return ModelPlace(spec["block"], "attention", tuple(sorted(heads)))
    if part is not None and (not isinstance(part, str) or part not in PARTS):
        raise wrong
    return ModelPlace(spec["block"], part)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_places(places: Sequence[ModelPlace], num_layers: int, num_heads: int) -> None:
    """
    Raises:
        UserError: the model has no such block or head.
    """
    for place in places:
        check_block(place.block, num_layers)
        for head in place.heads:
            if not 0 <= head < num_heads:
                raise UserError(
                    f"head {head} of block {place.block} does not exist: a block has {num_heads} heads, 0 to {num_heads - 1}"
                )


def head_index(config: GPTModelConfig, heads: Sequence[int]) -> dict[str, tuple[int, Tensor]]:
    """Of each parameter of a block that may have numbers of these heads, by its name there: (dimension, their places along it,
    int64, head by head)."""
    if config.multi_latent_attention:
        query = "linear_q_proj" if config.q_lora_rank is None else "linear_q_up_proj"
        width, out = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
        first = [head * width for head in heads]
    else:
        query, width, out = "linear_qkv", config.kv_channels, config.kv_channels
        each = config.num_attention_heads // config.num_query_groups
        # Megatron fuses [q .. q, k, v] per key/value head.
        first = [((head // each) * (each + 2) + head % each) * width for head in heads]
    rows = torch.cat([torch.arange(start, start + width) for start in first])
    columns = torch.cat([torch.arange(head * out, (head + 1) * out) for head in heads])
    query, out_projection = f"self_attention.{query}", "self_attention.linear_proj.weight"
    return {f"{query}.weight": (0, rows), f"{query}.bias": (0, rows), out_projection: (1, columns)}


@dataclass(frozen=True)
class HeadRows:
    """Which numbers of one parameter are some heads'.

    Attributes:
        name: of the parameter in the block.
        module, parameter: it is the module's, of this name there.
        dim: along which they lie.
        mine: int64, the places along it, in this tensor-parallel rank's shard, of those that it has; perhaps none.
        numbers: int64, which of all they are.
        total: how many all ranks have.
    """

    name: str
    module: torch.nn.Module
    parameter: str
    dim: int
    mine: Tensor
    numbers: Tensor
    total: int


def head_rows(layer: torch.nn.Module, config: GPTModelConfig, heads: Sequence[int], tp) -> Iterator[HeadRows]:
    """Where some heads lie in this rank's shard of a block.

    Args:
        tp: the tensor-parallel group.
    """
    for name, (dim, places) in head_index(config, heads).items():
        linear, parameter = name.rsplit(".", 1)
        module = layer.get_submodule(linear)
        if (shard := getattr(module, parameter, None)) is None or not shard.numel():  # no bias
            continue
        here = places - tp.rank() * shard.size(dim)
        numbers = ((here >= 0) & (here < shard.size(dim))).nonzero().squeeze(1)
        yield HeadRows(name, module, parameter, dim, here[numbers].to(shard.device), numbers, len(places))
