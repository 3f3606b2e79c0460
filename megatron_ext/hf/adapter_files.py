"""Adapters in PEFT's file format, in and out: adapter_config.json and adapter_model.safetensors.

PEFT has a pair of matrices for each of Hugging Face's linears, and one for all experts of a layer (`adapter_places`). An A that
several linears share here is written once for each, and read back where all are the same. Names and shapes as of peft 0.21:
base_model.model.model.layers.<n>.self_attn.q_proj.lora_A.weight [r, inputs], ...lora_B.weight [outputs, r]; of a model that sees,
whose tower has linears of the same names, base_model.model.model.language_model.layers.<n>...
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.adapters import adapted_linears, keep_adapters
from megatron_ext.adapters.linears import Adapted
from megatron_ext.adapters.lora import Lora
from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.files import give_name, unfinished
from megatron_ext.hf.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, AdapterFolder
from megatron_ext.hf.adapter_places import AdapterPlace, every_place, layer_places, packed_b, target_names
from megatron_ext.hf.files import check_target, create_files, described, plan_files
from megatron_ext.hf.tensors import TensorWriter
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.runtime.collectives import broadcast_object, gather_objects, together
from megatron_ext.runtime.pieces import layers_of

__all__ = ["adapter_shapes", "export_adapters", "load_adapter_folder", "lora_of", "write_adapters"]


def _sees(config: GPTModelConfig) -> bool:
    """Whether Hugging Face's model has a tower beside its language model."""
    return config.vision is not None and config.vision.has_tower


def _name(config: GPTModelConfig, layer: int, place: AdapterPlace, kind: str) -> str:
    model = "model.language_model" if _sees(config) else "model"
    return f"base_model.model.{model}.layers.{layer}.{place.stored}.lora_{kind}.weight"


def adapter_shapes(config: GPTModelConfig, layers: list[int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file, in order."""
    every = every_place(config, layers)
    return {_name(config, layer, place, kind): place.shape(kind, config.peft.dim) for layer, place, kind in every}


@torch.no_grad()
def load_adapter_folder(folder: AdapterFolder, model: torch.nn.Module) -> None:
    """Fill this rank's adapters; every rank calls it. Layers that the folder has no adapters for lose theirs.

    Raises:
        UserError: on every rank, the model's adapters are others; nothing has been changed then. Or a number is not finite.
    """
    folder.check(model.model_config)
    with together():
        found = dict(folder.read())
        for layer in folder.layers:
            _check_shared(folder, model.model_config, found, layer)
    numbers = set(folder.layers)
    keep_adapters(model, [layer for layer in layers_of(model) if layer.layer_number - 1 in numbers])
    for layer, place, linears, first in _adapted_here(model):
        a, b = (found[layer, place.module, kind] for kind in "AB")
        for number, linear in enumerate(linears, first):
            _fill(linear.lora, place.branch, *place.apart(a, b, number))


def _fill(lora: Lora, branch: str, a: Tensor, parts: Mapping[str, Tensor]) -> None:
    """With this rank's part of whole matrices."""
    width, rank = lora.a[branch].size(1), lora.tp.rank()
    first = 0 if lora.column else rank * width
    lora.a[branch].copy_(a[:, first : first + width])
    for part, b in parts.items():
        mine = lora.b[part]
        first = rank * len(mine) if lora.column else 0
        mine.copy_(b[first : first + len(mine)])


def _check_shared(folder: AdapterFolder, config: GPTModelConfig, found: dict, layer: int) -> None:
    by_branch: dict[tuple[str, str], list[AdapterPlace]] = {}
    for place in layer_places(config, layer):
        by_branch.setdefault((place.linear, place.branch), []).append(place)
    for (_, branch), (first, *rest) in by_branch.items():
        if any(not torch.equal(found[layer, first.module, "A"], found[layer, other.module, "A"]) for other in rest):
            parts = ", ".join(part for place in (first, *rest) for part in place.rows)
            remedy = f"name {parts} instead" if config.num_moe_experts is None else "merge it with peft first"
            raise UserError(
                f"model.peft.target_modules has {branch}, with one A for {parts}, and the adapter {folder.path} has another for "
                f"each: {remedy}"
            )


def _adapted_here(model: torch.nn.Module) -> Iterator[tuple[int, AdapterPlace, list[Adapted], int]]:
    """(number of the layer, place in a file, its linear, 0); of experts those of this rank, and the number of the first."""
    for layer in layers_of(model):
        number = layer.layer_number - 1
        linears: dict[str, list[Adapted]] = {}
        for name, linear in adapted_linears(layer).items():
            linears.setdefault(re.sub(r"\.local_experts\.\d+", "", name), []).append(linear)
        for place in layer_places(model.model_config, number) if linears else ():
            here = linears[place.linear]
            first = 0 if place.experts is None else len(here) * parallel_state.get_expert_model_parallel_rank()
            yield number, place, here, first


def lora_of(config: GPTModelConfig, base: str | None, layers: list[int] | None) -> dict[str, Any]:
    """An adapter_config.json.

    Args:
        base: path of the model that it stands on.
        layers: that have adapters; None: all.
    """
    peft = config.peft
    modules, parameters = target_names(config, layers)
    targets: list[str] | str = modules
    if _sees(config):  # the tower has linears of the same names and no adapters: a pattern says which are meant
        numbers = r"\d+" if layers is None else "|".join(map(str, layers))
        targets, layers = rf".*\.language_model\.layers\.({numbers})\.\w+\.({'|'.join(modules)})", None
    elif not modules:
        layers = None
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": peft.dim,
        "lora_alpha": int(peft.alpha) if float(peft.alpha).is_integer() else peft.alpha, "lora_dropout": 0.0,
        "target_modules": targets, "target_parameters": parameters or None,
        "use_rslora": peft.rslora, "use_dora": False, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
    }  # fmt: skip


@torch.no_grad()
def export_adapters(
    model: torch.nn.Module, folder: str | Path, base_path: str | None = None, base: str | None = None
) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads; every rank calls it, on a disk that all see. Each rank of the first
    data-parallel replica writes its own part, and nothing is sent.

    Args:
        folder: new. It is written beside its place, flushed to the disk and renamed when whole.
        base_path: of the model that the adapters stand on.
        base: which weights those are, as rank 0 says it.

    Raises:
        AlreadyExistsError: the folder is there.
        UserError: a number is not finite, or the disk is full. Nothing is left behind then.
    """
    config = model.model_config
    here, base = {layer for layer, *_ in _adapted_here(model)}, broadcast_object(base)  # the file's places depend on it
    layers = sorted({layer for some in gather_objects(here) for layer in some})
    with _adapter_writer(config, Path(folder), layers, config.dtype, base_path, base, dist.get_rank() == 0) as writer:
        first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
        for layer, place, linears, number in _adapted_here(model):
            if first if place.experts is None else first_of_experts:
                for kind, tensor, index in _held(place, linears, number):
                    writer.write(_name(config, layer, place, kind), tensor, index)


def _held(place: AdapterPlace, linears: list[Adapted], number: int) -> Iterator[tuple[str, Tensor, tuple[slice, ...]]]:
    """This rank's part of a place: ("A" or "B", what is there, its place in it); each number once. The ranks of other experts
    call it, too, and the first of them has all experts' B."""
    lora = linears[0].lora
    rank, first = lora.tp.rank(), lora.tp.rank() == 0
    for expert, linear in enumerate(linears, number):
        a = linear.lora.a[place.branch].data
        rows = slice(expert * len(a), (expert + 1) * len(a))
        if not lora.column:
            yield "A", a, (rows, slice(rank * a.size(1), (rank + 1) * a.size(1)))
        elif first:
            yield "A", a, (rows,)
    if not (lora.column or first):
        return
    parts = {part: torch.stack([linear.lora.b[part].data for linear in linears]) for part in place.rows}
    for begin, b in place.runs(parts, rank if lora.column else 0):  # [e, rows, r]
        if place.experts is not None:
            b = _of_all_experts(b)
        if number == 0:
            yield "B", packed_b(b), (slice(begin, begin + b.size(1)),)


def _of_all_experts(mine: Tensor) -> Tensor:
    """[e, ...] of those of this rank; all that share experts call it."""
    group = parallel_state.get_expert_model_parallel_group()
    if group.size() == 1:
        return mine
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine, group=group)
    return torch.cat(found)


def write_adapters(
    config: GPTModelConfig,
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    base_path: str | None = None,
    base: str | None = None,
) -> None:
    """`export_adapters` of whole adapters by the names of their parameters in the whole model, by one process; see
    `megatron_ext.runtime.checkpoint.read_adapters`."""
    named: dict[tuple[int, str, str, str], Tensor] = {}
    for name, tensor in tensors.items():
        layer, linear, kind, own = re.fullmatch(r"decoder\.layers\.(\d+)\.([\w.]+)\.lora\.([ab])_(\w+)", name).groups()
        named[int(layer), linear.replace(".experts.experts.", ".experts."), kind, own] = tensor
    layers = sorted({layer for layer, *_ in named})
    dtype = next(iter(named.values())).dtype
    with _adapter_writer(config, Path(folder), layers, dtype, base_path, base, True) as writer:
        for layer in layers:
            for place in layer_places(config, layer):
                a = named[layer, place.linear, "a", place.branch]
                parts = {part: named[layer, place.linear, "b", part] for part in place.rows}
                b = torch.cat([rows for _, rows in place.runs(parts)], -2)
                if place.experts is not None:
                    a, b = a.flatten(0, 1), packed_b(b)
                writer.write(_name(config, layer, place, "A"), a)
                writer.write(_name(config, layer, place, "B"), b)


@contextlib.contextmanager
def _adapter_writer(
    config: GPTModelConfig,
    folder: Path,
    layers: list[int],
    dtype: torch.dtype,
    base_path: str | None,
    base: str | None,
    first: bool,
) -> Iterator[TensorWriter]:
    """Takes tensors of a new folder; it has its name when all ranks have left.

    Args:
        first: of the one rank that makes it.
    """
    beside = unfinished(folder)
    metadata = {} if base is None else {BASE: base}
    shapes = adapter_shapes(config, layers)
    slots, beginnings = plan_files(shapes, dtype, 1 << 62, ADAPTER_WEIGHTS, metadata)
    try:
        with together(), _said(folder):
            if first:
                check_target(folder)
                shutil.rmtree(beside, ignore_errors=True)  # of an export that was killed
                beside.mkdir(parents=True)
                create_files(beside, slots, beginnings)
        writer = TensorWriter(beside, slots)
        yield writer
        with together(), _said(folder):
            if error := writer.close():
                raise error
        with together(), _said(folder):
            if first:
                some = None if len(layers) == config.num_layers else layers
                text = json.dumps(lora_of(config, base_path, some), indent=2) + "\n"
                (beside / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
                give_name(beside, folder)
    except Exception as error:
        if first and not isinstance(error, AlreadyExistsError):
            shutil.rmtree(beside, ignore_errors=True)
        raise


@contextlib.contextmanager
def _said(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise described(error, folder) from error
