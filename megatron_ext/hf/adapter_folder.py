"""A folder of PEFT's, read and checked: adapter_config.json and the names and shapes in adapter_model.safetensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.adapters import LoraConfig
from megatron_ext.adapters.config import PARTS
from megatron_ext.errors import UserError
from megatron_ext.hf.adapter_places import EXPERTS, PLACES, every_place, modules_of, parts_of
from megatron_ext.hf.files import DTYPES, opened
from megatron_ext.hf.raw import integer, number, read_json, switch
from megatron_ext.hf.tensors import is_finite
from megatron_ext.models.config import GPTModelConfig

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "BASE", "AdapterFolder", "is_adapter_folder"]

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base"  # in a file's metadata: which weights the adapter was trained on
NAME = re.compile(
    r"base_model\.model\.model\.(?:language_model\.)?layers\.(\d{1,9})\.([\w.]+?)\.lora_([AB])(?:\.default)?\.weight",
    re.ASCII,
)
# Of an adapter_config.json what has no bearing on what is computed; everything else must say nothing, or what follows.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "peft_version", "r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "target_parameters", "layers_to_transform", "layers_pattern", "exclude_modules", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class AdapterFolder:
    """A folder of PEFT's, which has been checked.

    Attributes:
        path: of the folder.
        dim, alpha, rslora: as `LoraConfig` has them.
        tensors: stored name of each, by (layer, `AdapterPlace.module`, "A" or "B").
        base: which weights it was trained on, where we wrote it.
    """

    path: Path
    dim: int
    alpha: float
    rslora: bool
    tensors: Mapping[tuple[int, str, str], str]
    base: str | None

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """
        Raises:
            UserError: no such folder, a damaged one, or anything in it that our adapters do not compute.
        """
        path = Path(path)
        where, raw = str(path / ADAPTER_CONFIG), read_json(path / ADAPTER_CONFIG)
        _refuse(raw, where)
        dim, alpha = integer(raw, "r", where), number(raw, "lora_alpha", where)
        if dropout := raw.get("lora_dropout"):
            logger.warning("%s: lora_dropout=%s is for training, and none is here", where, dropout)
        if not (path / ADAPTER_WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
            raise UserError(
                f"{path} has its adapter in adapter_model.bin only, a pickle, which can run code and is never loaded here; save "
                "it as safetensors where you trust it"
            )
        base, shapes = _matrices(path)
        found = {name: NAME.fullmatch(name) for name in shapes}
        modules = modules_of({match[2] for match in found.values() if match}, raw.get("target_parameters") or ())
        tensors: dict[tuple[int, str, str], str] = {}
        for name, shape in shapes.items():
            match = found[name]
            if match is None or match[2] not in modules:
                one = match is not None and match[2].startswith(f"{EXPERTS}.")
                raise UserError(
                    f"{path}: {name} is no adapter of a linear that is adapted here ({', '.join(PARTS)}"
                    f"{'; of experts all in one, as transformers 5 has them' if one else ''})"
                )
            wide, packed = shape[0 if match[3] == "A" else -1], modules[match[2]].startswith(f"{EXPERTS}.")
            if wide % dim if packed else wide != dim:
                raise UserError(
                    f"{path}: {name} is {shape}, and {ADAPTER_CONFIG} says r={dim}: one rank for all is read"
                )
            place = int(match[1]), modules[match[2]], match[3]
            if (other := tensors.setdefault(place, name)) != name:
                raise UserError(f"{path}: {name} and {other} are one tensor under two names; take another adapter")
        opened_folder = cls(path, dim, alpha, bool(raw.get("use_rslora")), tensors, base)
        opened_folder._check_pairs()
        return opened_folder

    def _check_pairs(self) -> None:
        expected = {(layer, module, kind) for layer in self.layers for module in self._modules(layer) for kind in "AB"}
        if not expected or expected != self.tensors.keys():
            lacking = sorted(expected - self.tensors.keys())[:1]
            said = (
                f"layer {lacking[0][0]} has no lora_{lacking[0][2]} of {lacking[0][1]}" if lacking else "it holds none"
            )
            raise UserError(f"{self.path}: {said}; every layer with adapters has them on the same linears here")

    def _modules(self, layer: int) -> Iterator[str]:
        """Those of a layer if it has the same linears as all others, in each of its MLPs."""
        mlps = {module.rpartition(".")[0] for number, module, _ in self.tensors if number == layer} - {"self_attn"}
        if not mlps:  # where they would be
            mlps = {EXPERTS if any(module.startswith(f"{EXPERTS}.") for _, module, _ in self.tensors) else "mlp"}
        for place in ("self_attn", *sorted(mlps)):
            parts = [part for part in PLACES[place] if part in self.parts]
            packed = parts_of("gate_up_proj") if place == EXPERTS else ()
            if packed and set(packed) <= set(parts):
                parts = ["gate_up_proj", *(part for part in parts if part not in packed)]
            yield from (f"{place}.{part}" for part in parts)

    @property
    def layers(self) -> list[int]:
        """Numbers of those with adapters, from 0."""
        return sorted({layer for layer, _, _ in self.tensors})

    @property
    def parts(self) -> list[str]:
        """Linears with adapters, in a layer's order."""
        found = {part for _, module, _ in self.tensors for part in parts_of(module)}
        return [part for part in PARTS if part in found]

    def check(self, config: GPTModelConfig) -> None:
        """
        Raises:
            UserError: the model's adapters are others.
        """
        peft = config.peft
        here = (peft.dim, peft.scale, list(peft.parts))
        there = (self.dim, self.lora_config().scale, self.parts)
        if here != there:
            raise UserError(
                f"model.peft has dim={peft.dim}, alpha={peft.alpha:g}, rslora={peft.rslora} on {', '.join(peft.parts)}, the "
                f"adapter {self.path} dim={self.dim}, alpha={self.alpha:g}, rslora={self.rslora} on {', '.join(self.parts)}: set "
                "them as there"
            )
        if self.layers[-1] >= config.num_layers:
            raise UserError(f"{self.path} adapts layer {self.layers[-1]}, and the model has {config.num_layers} layers")
        places = {(layer, place.module, kind): place for layer, place, kind in every_place(config, self.layers)}
        if wrong := sorted(places.keys() ^ self.tensors.keys()):
            layer, module, _ = wrong[0]
            has = "no adapter of" if wrong[0] in places else "an adapter of"
            raise UserError(
                f"{self.path}: layer {layer} has {has} {module}, otherwise than the model here, all of whose linears of these "
                "names have one: take another adapter, or merge it with peft first"
            )
        with opened(self.path / ADAPTER_WEIGHTS) as file:
            for place, name in self.tensors.items():
                found, shape = tuple(file.get_slice(name).get_shape()), places[place].shape(place[2], peft.dim)
                if found != shape:
                    raise UserError(f"{self.path} belongs to another model: {name} is {found}, here {shape}")

    def lora_config(self) -> LoraConfig:
        """What `model.peft` says of such an adapter."""
        packed = parts_of("gate_up_proj") if any(module.startswith(EXPERTS) for _, module, _ in self.tensors) else ()
        targets = [part for part in self.parts if part not in packed]
        if len(targets) < len(self.parts):
            targets.append("linear_fc1")
        return LoraConfig(dim=self.dim, alpha=self.alpha, rslora=self.rslora, target_modules=targets)

    def read(self) -> Iterator[tuple[tuple[int, str, str], Tensor]]:
        """Every tensor by (layer, module, "A" or "B").

        Raises:
            UserError: a number is not finite.
        """
        with opened(self.path / ADAPTER_WEIGHTS) as file:
            for place, name in sorted(self.tensors.items()):
                tensor = file.get_tensor(name)
                if not is_finite(tensor):
                    raise UserError(f"{self.path}: {name} holds a number that is not finite; take another adapter")
                yield place, tensor


def _matrices(path: Path) -> tuple[str | None, dict[str, tuple[int, int]]]:
    """(on which weights, where we wrote it; shapes of the tensors by their stored names) of a folder."""
    with opened(path / ADAPTER_WEIGHTS) as file:
        base, shapes = (file.metadata() or {}).get(BASE), {}
        for name in file.keys():
            stored = file.get_slice(name)
            shape, kind = tuple(stored.get_shape()), stored.get_dtype()
            if len(shape) != 2 or kind not in DTYPES:
                raise UserError(
                    f"{path}: {name} is {shape} of {kind}, and adapters are matrices of {', '.join(DTYPES)}; take another adapter"
                )
            shapes[name] = shape
    return base, shapes


def is_adapter_folder(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def _refuse(raw: dict[str, Any], where: str) -> None:
    if raw.get("use_rslora") is not None:
        switch(raw, "use_rslora", where)
    targets = raw.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(
            f"{where}: target_parameters must be a list of names, got {str(targets)[:80]}; fetch the file again"
        )
    for key, values in ONLY.items():
        if raw.get(key, values[0]) not in values:
            raise UserError(
                f"{where}: {key}={raw[key]!r} is not computed here, only {values[0]!r}; merge it with peft first"
            )
    for key, value in raw.items():
        nothing = value is None or value is False or value in ([], {})
        if key not in NEUTRAL and key not in ONLY and not nothing:
            raise UserError(f"{where}: {key}={str(value)[:80]} is not computed here; merge it with peft first")
