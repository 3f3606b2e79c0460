"""Where PEFT has the adapters of a layer: which of Hugging Face's modules they are on, what of ours each holds, in which shapes.

Shape legend: r rank of an adapter, i inputs, o outputs, e experts of a layer.

A module's are A [r, i] and B [o, r]. Transformers 5 has all experts of a layer in two parameters, gate_up_proj and down_proj, and
PEFT has so their adapters (`target_parameters`): A [e x r, i], an expert's rows behind those of the one before, and B [o, r x e],
whose columns the experts take in turns, with the rows of gate_proj before those of up_proj, or in turns with them where the
family has its weights so (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.adapters.config import LINEARS, PARTS
from megatron_ext.hf.families import FAMILIES, family_of, spelled
from megatron_ext.models.config import GPTModelConfig

__all__ = [
    "EXPERTS", "PLACES", "AdapterPlace", "every_place", "layer_places", "modules_of", "packed_b", "parts_of", "target_names",
]  # fmt: skip

EXPERTS = "mlp.experts"
SHARED, INNER = ("mlp.shared_expert", "mlp.shared_experts"), "base_layer"
GATE_UP, HALVES = "gate_up_proj", LINEARS["linear_fc1"]
MLP_PARTS = (*HALVES, *LINEARS["linear_fc2"])
ATTENTION_PARTS = tuple(part for part in PARTS if part not in MLP_PARTS)
# Of each of Hugging Face's modules that has linears its linears.
PLACES = {
    place: ATTENTION_PARTS if place == "self_attn" else MLP_PARTS for place in ("self_attn", "mlp", EXPERTS, *SHARED)
}


@dataclass(frozen=True)
class AdapterPlace:
    """One A and one B of a file.

    Attributes:
        module: what is adapted, in a layer of Hugging Face's: "self_attn.q_proj", "mlp.experts.gate_up_proj".
        stored: what a file calls it.
        linear: ours, in a layer; of experts without their numbers.
        branch: the name of its A there.
        rows: outputs of each part whose B it holds, in their order.
        inputs: i.
        experts: how many it holds; None: it is no experts'.
        in_turns: whether the parts' rows of B are in turns; else a part stands behind the other.
    """

    module: str
    stored: str
    linear: str
    branch: str
    rows: Mapping[str, int]
    inputs: int
    experts: int | None
    in_turns: bool = False

    def shape(self, kind: str, dim: int) -> tuple[int, int]:
        """Of "A" or "B"."""
        wide = dim * (self.experts or 1)
        return (wide, self.inputs) if kind == "A" else (sum(self.rows.values()), wide)

    def apart(self, a: Tensor, b: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A [r, i] of one expert, or of the module, and B [o, r] of each part: views."""
        if self.experts is not None:
            a = a.view(self.experts, -1, a.size(1))[number]
            b = b.view(len(b), -1, self.experts)[..., number]
        parts = (
            [b[i :: len(self.rows)] for i in range(len(self.rows))] if self.in_turns else b.split([*self.rows.values()])
        )
        return a, dict(zip(self.rows, parts, strict=True))

    def runs(self, parts: Mapping[str, Tensor], rank: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(number of the first, neighbouring rows of B, [..., rows, r]), in order.

        Args:
            parts: of each its rows, [..., o, r]: of all that are cut over ranks as many, those that are the rank's.
        """
        if self.in_turns:
            rows = torch.stack([*parts.values()], -2).flatten(-3, -2)
            yield rank * rows.size(-2), rows
            return
        before = 0
        for part, whole in self.rows.items():
            yield before + rank * parts[part].size(-2), parts[part]
            before += whole


def packed_b(of_experts: Tensor) -> Tensor:
    """[o, r x e] of [e, o, r]."""
    return of_experts.permute(1, 2, 0).flatten(1)


def layer_places(config: GPTModelConfig, layer: int) -> list[AdapterPlace]:
    """Of a layer of a model with adapters, in the order of a file."""
    peft, found = config.peft, []
    has_experts = config.layers_with_experts[layer]
    for place, linears in config.linears.items():
        if place.startswith("mlp") and (place != "mlp") != has_experts:
            continue
        theirs = _theirs(config, place)
        experts = config.num_moe_experts if place == EXPERTS else None
        for linear, shape in linears.items():
            for branch, parts in peft.branches(linear).items():
                for some in [(part,) for part in parts] if experts is None else [parts]:
                    name = GATE_UP if len(some) > 1 else some[0]
                    own = {part: shape.rows[part] for part in some}
                    stored = f"{theirs}.{name}" if experts is None else _stored(name, peft.parts)
                    module = f"{theirs}.{name}"
                    turns = len(some) > 1 and FAMILIES[family_of(config)].packed
                    found.append(
                        AdapterPlace(module, stored, f"{place}.{linear}", branch, own, shape.inputs, experts, turns)
                    )
    return found


def every_place(config: GPTModelConfig, layers: list[int]) -> Iterator[tuple[int, AdapterPlace, str]]:
    """(layer, place, "A" or "B") of every tensor of a file, in order."""
    for layer in layers:
        for place in layer_places(config, layer):
            yield from ((layer, place, kind) for kind in "AB")


def _theirs(config: GPTModelConfig, place: str) -> str:
    """What Hugging Face's model calls a place of ours."""
    if place == "self_attention":
        return "self_attn"
    return (
        spelled(f"{SHARED[0]}.", FAMILIES[family_of(config)].spelling)[:-1] if place == "mlp.shared_experts" else place
    )


def _stored(name: str, parts: Iterable[str]) -> str:
    """PEFT wraps a module once for each of its parameters that has an adapter, gate_up_proj first."""
    return f"{EXPERTS}.{INNER}" if name == GATE_UP and "down_proj" in parts else EXPERTS


def modules_of(stored: Iterable[str], targets: Iterable[str]) -> dict[str, str]:
    """What each of the names in a file stands for, of those that we know.

    Args:
        targets: `target_parameters`, which says what an only wrapper of experts is around.
    """
    stored = set(stored)
    alone = GATE_UP if any(target.endswith(GATE_UP) for target in targets) else "down_proj"
    found = {}
    for name in stored:
        place, _, part = name.rpartition(".")
        if name == f"{EXPERTS}.{INNER}":
            found[name] = f"{EXPERTS}.{GATE_UP}"
        elif name == EXPERTS:
            found[name] = f"{EXPERTS}.{'down_proj' if f'{EXPERTS}.{INNER}' in stored else alone}"
        elif place != EXPERTS and part in PLACES.get(place, ()):
            found[name] = name
    return found


def parts_of(module: str) -> tuple[str, ...]:
    """The linears that a module is, or holds of each expert."""
    name = module.rpartition(".")[2]
    return HALVES if name == GATE_UP else (name,)


def target_names(config: GPTModelConfig, layers: list[int] | None) -> tuple[list[str], list[str]]:
    """(target_modules, target_parameters) of an adapter_config.json.

    In a model with experts PEFT takes gate_proj, up_proj and down_proj among its modules for those of experts, whatever else has
    these names. There all linears of MLPs are named as parameters.

    Args:
        layers: that have adapters; None: all. Names of parameters say which, since `layers_to_transform` does not hold for them.
    """
    if config.num_moe_experts is None:
        return list(config.peft.parts), []
    named: dict[str, None] = {}
    for layer in range(config.num_layers) if layers is None else layers:
        for place in layer_places(config, layer):
            if place.module.startswith("mlp"):
                name = place.module if place.experts is not None else f"{place.module}.weight"
                named[name if layers is None else f"layers.{layer}.{name}"] = None
    return [part for part in config.peft.parts if part in ATTENTION_PARTS], list(named)
