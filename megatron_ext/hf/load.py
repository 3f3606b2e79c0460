"""Hugging Face weights into a model of ours, on any layout of ranks."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.config import difference, read_hf_config
from megatron_ext.hf.files import DTYPES, Stored, read_headers
from megatron_ext.hf.mapping import EMBEDDING, Architecture, Entry, hf_shapes, placed_parameters
from megatron_ext.hf.tensors import read_slice
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.collectives import together

__all__ = ["checked_headers", "load_hf_weights", "read_checked_config", "read_parameter"]

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
    if wrong := difference(config, read_hf_config(folder), ignored=("vision",)):
        raise UserError(f"{folder} is not of this model's shape: {wrong}; correct the model's configuration")
    headers = checked_headers(folder, config)
    rank = model.pg_collection.tp.rank()
    with together():  # a rank's own part may be sound where there is no model
        for name, parameter, entry, layer in placed_parameters(model):
            if entry is None:
                logger.warning("%s has no %s: it keeps its random weights", folder, name)
            else:
                read_parameter(parameter, entry, layer, config, rank, headers)
    logger.info("read the weights of %s", folder)


def read_parameter(
    parameter: torch.Tensor, entry: Entry, layer: int, config: GPTModelConfig, rank: int, headers: dict[str, Stored]
) -> None:
    """One parameter of a tensor-parallel rank, in place."""
    for hf_slice in entry.slices(layer, config, rank):
        target = parameter.view(hf_slice.view)
        if entry.cut == "vocabulary":
            target[hf_slice.place[0].stop :].zero_()
        target = target[hf_slice.place]
        if target.numel():
            read_slice(hf_slice.name, headers[hf_slice.name], hf_slice.index, target)


def checked_headers(folder: Path, config: GPTModelConfig) -> dict[str, Stored]:
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
        if stored.shape != shape:
            raise UserError(
                f"{folder} contradicts its config.json: {name} is {stored.shape}, the configuration makes it {shape}; fetch "
                "both again"
            )
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{folder}: {name} is stored as {stored.dtype}; quantised weights are not read, take the model in one of "
                f"{', '.join(DTYPES)}"
            )
    return found, repeated


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
