"""Hugging Face weights into a model of ours, on any layout of ranks."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.config import CONFIG_FILE, difference, read_hf_config
from megatron_ext.hf.experts import unpacked
from megatron_ext.hf.eyes import read_tower
from megatron_ext.hf.families import FAMILIES, FURTHER, family_of
from megatron_ext.hf.files import DTYPES, Stored, read_headers
from megatron_ext.hf.held import placed_parameters, tensor_rank
from megatron_ext.hf.mapping import EMBEDDING, Architecture, Entry, hf_shapes
from megatron_ext.hf.quantised import check_quantisation, with_scales
from megatron_ext.hf.raw import read_json
from megatron_ext.hf.spelling import TOWER, bare_name
from megatron_ext.hf.tensors import read_of_all, read_slice
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.freezing import CONNECTOR
from megatron_ext.models.freezing import TOWER as EYE
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.collectives import together
from megatron_ext.runtime.pieces import ModelPieces, pieces_of

__all__ = ["checked_headers", "load_hf_weights", "load_tower", "read_checked_config", "read_parameter"]

logger = logging.getLogger(__name__)

OUTPUT = "lm_head.weight"
COMPARED_ROWS = 1024
# Ends of the names of what stands beside quantised weights, or instead of them.
QUANTISED = (
    "_scale", "_scale_inv", "_scale_2", "_packed", "_zero_point", ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax",
    ".quant_map", ".SCB",
)  # fmt: skip


def read_checked_config(folder: str | Path) -> dict[str, Any]:
    """`read_hf_config` of a folder whose safetensors have headers that agree with it: before anything is allocated,
    and without reading a tensor.

    Raises:
        UserError: the config.json is refused, the folder is damaged, or the two contradict each other.
    """
    fields = read_hf_config(folder)
    _compare(Path(folder), SimpleNamespace(**fields))
    return fields


@torch.no_grad()
def load_hf_weights(folder: str | Path, model: PrefixGroupedGPT) -> None:
    """Fill this rank's stage from a Hugging Face folder; every rank calls it.

    A rank reads its own part of each tensor, one after the other, into the parameter and its type. Names, shapes and
    types of all tensors are checked before the first is read.

    Raises:
        UserError: on every rank, the folder is damaged, holds another model than this one, or contradicts its
            config.json, and nothing has been changed then; or a number is not finite, and the model is of no use then.
    """
    folder, config = Path(folder), model.model_config
    fields = read_hf_config(folder)
    one_sees = config.vision is None or fields["vision"] is None
    if wrong := difference(config, fields, ignored=("vision",) if one_sees else ()):
        raise UserError(f"{folder} is not of this model's shape: {wrong}; correct the model's configuration")
    theirs, mine = fields["position_embedding"]["scheme"], config.position_embedding.scheme
    if fields["vision"] is not None and config.vision is not None and mine != theirs:
        logger.warning(
            "%s was trained with media placed by %r, and here they are by %r: it has to learn that",
            folder,
            theirs,
            mine,
        )
    headers = checked_headers(folder, SimpleNamespace(**vars(config) | {"vision": fields["vision"]}))
    with together():  # a rank's own part may be sound where there is no model
        for name, parameter, entry, layer in placed_parameters(model):
            if entry is None or (name.startswith((EYE, CONNECTOR)) and fields["vision"] is None):
                if not (name.startswith(EYE) and config.vision.tower):  # which has a folder of its own
                    logger.warning("%s has no %s: it keeps its random weights", folder, name)
            else:
                read_parameter(parameter, entry, layer, config, tensor_rank(model, entry), headers)
    logger.info("read the weights of %s", folder)
    if fields["vision"] is None:
        load_tower(model)


@torch.no_grad()
def load_tower(model: PrefixGroupedGPT | ModelPieces) -> None:
    """Fill the tower of this rank's stage, if it has one, from `model.vision.tower`; every rank calls it.

    Raises:
        UserError: on every rank, the folder is damaged or holds another tower.
    """
    vision = pieces_of(model)[0].model_config.vision
    if vision is None or not vision.has_tower or vision.tower is None:
        return
    folder = Path(vision.tower).expanduser()
    with together():
        theirs, ours = read_tower(folder)["tower_config"], vision.tower_config
        if wrong := next((key for key in theirs if theirs[key] != ours.get(key)), None):
            raise UserError(
                f"model.vision.tower={folder} has {wrong}={theirs[wrong]}, and model.vision.tower_config says {ours.get(wrong)}: "
                "leave model.vision.tower_config out, or name the folder of that tower"
            )
        found = {f"{TOWER}{bare_name(name)}": stored for name, stored in read_headers(folder).items()}
        for piece in pieces_of(model):
            if (tower := getattr(piece, "vision_tower", None)) is None:
                continue
            for name, parameter in tower.model.named_parameters():
                stored = found.get(TOWER + name)
                if stored is None or stored.shape != tuple(parameter.shape) or stored.dtype not in DTYPES:
                    is_there = "lacks it" if stored is None else f"has it as {stored.dtype} {stored.shape}"
                    raise UserError(
                        f"model.vision.tower={folder}: its config.json makes {name} {tuple(parameter.shape)}, and it {is_there}; "
                        "fetch the folder again"
                    )
                read_slice(name, stored, (slice(0, len(parameter)),), parameter.data)
            tower.forget()
    logger.info("read the vision tower of %s", folder)


def read_parameter(
    parameter: torch.Tensor, entry: Entry, layer: int, config: GPTModelConfig, rank: int, headers: dict[str, Stored]
) -> None:
    """One parameter of a tensor-parallel rank, in place."""
    for hf_slice in entry.slices(layer, config, rank):
        if hf_slice.order is not None:
            read_of_all(hf_slice.name, headers[hf_slice.name], hf_slice.index, hf_slice.within(parameter))
            continue
        target = parameter.view(hf_slice.view)
        if entry.cut == "vocabulary":
            target[hf_slice.place[0].stop :].zero_()
        target = target[hf_slice.place]
        if target.numel():
            read_slice(hf_slice.name, headers[hf_slice.name], hf_slice.index, target)


def checked_headers(folder: Path, config: Architecture) -> dict[str, Stored]:
    """The tensors of a folder, which are all that a model of this configuration has and no others.

    Raises:
        UserError: they are not, or are of another shape or a type that is no plain number.
    """
    found, repeated = _compare(folder, config)
    if repeated is not None:
        _check_tied(found[EMBEDDING], repeated, folder)
    return found


def _compare(folder: Path, config: Architecture) -> tuple[dict[str, Stored], Stored | None]:
    """(the model's tensors, a tied embedding's second copy if there is one), by headers alone."""
    found = {name: s for name, s in read_headers(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    raw = read_json(folder / CONFIG_FILE)
    found = with_scales(_without_further(found, config, folder), check_quantisation(raw, str(folder / CONFIG_FILE)))
    if config.num_moe_experts is not None and not (family := FAMILIES[family_of(config)]).packed:
        found = unpacked(found, family.spelling)
    if config.num_layers > len(found):  # before names are made of a number that may be anything
        raise UserError(
            f"{folder} contradicts its config.json: num_hidden_layers is {config.num_layers}, and it has {len(found)} "
            "tensors in all; fetch both again"
        )
    expected, repeated = hf_shapes(config), None
    if config.share_embeddings_and_output_weights and OUTPUT in found:
        if EMBEDDING in found:
            repeated = found.pop(OUTPUT)
        else:  # of two names for one tensor some tools keep the second
            found[EMBEDDING] = found.pop(OUTPUT)
    _check_names(found.keys(), expected.keys(), folder)
    for name, shape in expected.items():
        stored = found[name]
        if stored.shape != (shape if not stored.turned else (shape[0], *shape[:0:-1])):
            raise UserError(
                f"{folder} contradicts its config.json: {name} is {stored.shape}, the configuration makes it {shape}; fetch "
                "both again"
            )
        if stored.dtype not in DTYPES and stored.scales is None:
            raise UserError(
                f"{folder}: {name} is stored as {stored.dtype}; quantised weights are not read, take the model in one of "
                f"{', '.join(DTYPES)}"
            )
    return found, repeated


def _without_further(found: dict[str, Stored], config: Architecture, folder: Path) -> dict[str, Stored]:
    """Tensors without layers behind the last, which families have that predict further tokens with them."""
    known = config.multi_latent_attention or config.num_moe_experts is not None
    if not (known and FAMILIES[family_of(config)].idle.issuperset(FURTHER)):
        return found
    behind = re.compile(r"model\.layers\.(\d+)\.")
    of_layers = {
        name: stored
        for name, stored in found.items()
        if (layer := behind.match(name)) is None or int(layer[1]) < config.num_layers
    }
    if left := len(found) - len(of_layers):
        logger.warning(
            "%s: %d tensors of layers that predict further tokens are left out: they are neither trained nor exported",
            folder,
            left,
        )
    return of_layers


def _check_names(found: Collection[str], expected: Collection[str], folder: Path) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if scales := [name for name in unknown if name.endswith(QUANTISED)]:
        raise UserError(
            f"{folder} has {scales[0]} (of {len(scales)} such): quantised weights are not read, take the model without them"
        )
    if missing == [OUTPUT] and not unknown:
        raise UserError(
            f"{folder} contradicts its config.json: it lacks {OUTPUT}, and tie_word_embeddings is false; set that to true if "
            "the model puts its embedding in its place, else fetch the whole model and not its body alone"
        )
    if missing or unknown:
        parts = [
            f"{what} {', '.join(names[:2])} (of {len(names)})"
            for what, names in (("lacks", missing), ("has also", unknown))
            if names
        ]
        raise UserError(f"{folder} contradicts its config.json: it {' and '.join(parts)}; fetch both again")


def _check_tied(embedding: Stored, output: Stored, folder: Path) -> None:
    """Some tools write a tied embedding twice."""
    same = embedding.shape == output.shape and output.dtype in DTYPES
    if same:
        wide = torch.promote_types(DTYPES[embedding.dtype], DTYPES[output.dtype])
        rows = [
            slice(r, min(r + COMPARED_ROWS, embedding.shape[0])) for r in range(0, embedding.shape[0], COMPARED_ROWS)
        ]
        pair = torch.empty(2, COMPARED_ROWS, *embedding.shape[1:], dtype=wide)
        for some in rows:
            one, other = pair[:, : some.stop - some.start]
            read_slice(EMBEDDING, embedding, (some,), one)
            read_slice(OUTPUT, output, (some,), other)
            same = same and torch.equal(one, other)
    if not same:
        raise UserError(
            f"{folder} contradicts its config.json: tie_word_embeddings is true, but {OUTPUT} is not {EMBEDDING}, and which one "
            f"is meant transformers 4 and 5 take differently; set it to false if the two were trained apart, else remove {OUTPUT}"
        )
