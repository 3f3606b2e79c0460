"""A model of ours as a Hugging Face folder, from any layout of ranks."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.files import give_name, unfinished
from megatron_ext.hf.config import CONFIG_FILE, difference, make_hf_config, read_hf_config
from megatron_ext.hf.eyes import PREPROCESSING_FILES, SAID_IN
from megatron_ext.hf.families import FURTHER
from megatron_ext.hf.files import (
    OTHER_FILES,
    TOKENIZER_FILES,
    check_target,
    companions,
    copy_files,
    create_files,
    described,
    plan_files,
)
from megatron_ext.hf.held import held_slices
from megatron_ext.hf.mapping import exact_tensors, hf_shapes
from megatron_ext.hf.multimodal import SCHEME, family_of, family_scheme
from megatron_ext.hf.raw import read_json
from megatron_ext.hf.spelling import spelled
from megatron_ext.hf.tensors import TensorWriter
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.collectives import together

__all__ = ["MAX_SHARD_SIZE", "describe_hf", "export_hf"]

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5_000_000_000


@torch.no_grad()
def export_hf(
    model: PrefixGroupedGPT,
    folder: str | Path,
    source: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    untied: bool = False,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; every rank calls it, on a disk that all see.

    Tensors are whole and of one type, but experts' biases, which stay fp32: rounded, they would choose others. Rows that pad
    the vocabulary are left out. Every place in every file is known beforehand, so each rank writes its own part of each tensor,
    one of those that hold the same, and nothing is sent.

    Args:
        folder: new. It is written beside its place, flushed to the disk and renamed when whole.
        source: Hugging Face folder that the model came from: its config.json, generation_config.json and tokenizer are
            copied. None: they are made.
        tokenizer: folder of a Hugging Face tokenizer, instead of the source's.
        dtype: of the tensors; None: the model's.
        max_shard_size: bytes of tensors in a file.
        untied: write tied embeddings twice, as a model with an output layer of its own, whatever the model is.

    Raises:
        AlreadyExistsError: the folder is there, if only empty.
        UserError: transformers has no such model, the source is of another shape, a number is not finite in `dtype`, or the
            disk is full.
        Nothing is left behind then.
    """
    folder, config = Path(folder), model.model_config
    source, tokenizer = (None if path is None else Path(path) for path in (source, tokenizer))
    beside = unfinished(folder)
    dtype = dtype or config.dtype
    shapes = {_spelled(name, config): shape for name, shape in hf_shapes(config, untied).items()}
    slots, beginnings = plan_files(shapes, dtype, max_shard_size, exact=exact_tensors(config))
    first = dist.get_rank() == 0
    with _writing(folder, beside if first else None):
        if first:
            check_target(folder)
            texts = _describe(config, source, tokenizer, dtype, untied)
            shutil.rmtree(beside, ignore_errors=True)  # of an export that was killed
            beside.mkdir(parents=True)
            create_files(beside, slots, beginnings)
    writer = TensorWriter(beside, slots)
    with _writing(folder, beside if first else None):
        for name, index, held in held_slices(model, untied):
            writer.write(_spelled(name, config), held, index)
        if error := writer.close():
            raise error
    with _writing(folder, beside if first else None):
        if first:
            _write_companions(beside, texts, source, tokenizer)
            give_name(beside, folder)


def _spelled(name: str, config: GPTModelConfig) -> str:
    return spelled(name, None if config.vision is None else family_of(config.vision))


def describe_hf(config: GPTModelConfig, folder: Path, tokenizer: Path, untied: bool = False) -> None:
    """Write what `export_hf` writes beside the weights into a folder that is there; one rank calls it.

    Raises:
        UserError: transformers has no such model.
    """
    _write_companions(folder, _describe(config, None, tokenizer, config.dtype, untied), None, tokenizer)


@contextlib.contextmanager
def _writing(folder: Path, beside: Path | None) -> Iterator[None]:
    """What one rank cannot write, all raise, and what was written goes."""
    try:
        with together():
            try:
                yield
            except OSError as error:
                raise described(error, folder) from error
    except Exception as error:
        if beside is not None and not isinstance(error, AlreadyExistsError):
            shutil.rmtree(beside, ignore_errors=True)
        raise


def _describe(
    config: GPTModelConfig, source: Path | None, tokenizer: Path | None, dtype: torch.dtype, untied: bool
) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights that are not copied as they are."""
    name = str(dtype).removeprefix("torch.")
    own = ({"tie_word_embeddings": False} if untied else {}) | _own_scheme(config)
    if source is None:
        special = _special_tokens(tokenizer) if tokenizer else {}
        made = {CONFIG_FILE: make_hf_config(config, special) | {"dtype": name} | own}
        for key, (file, _) in SAID_IN.items() if config.vision is not None else ():
            if (said := getattr(config.vision, key)) is not None:
                made[file] = said
        return made | ({"generation_config.json": special} if special else {})
    if wrong := difference(config, read_hf_config(source)):
        raise UserError(f"{source} is not of this model's shape: {wrong}; name the folder that it was made from")
    raw = read_json(source / CONFIG_FILE)
    # What is here now says `own`; code is not copied; what is written are plain numbers.
    for key in (SCHEME, "auto_map", "quantization_config"):
        raw.pop(key, None)
    own |= {key: 0 for key in FURTHER if raw.get(key)}  # of such layers there are none here
    return {CONFIG_FILE: raw | dict.fromkeys(raw.keys() & {"dtype", "torch_dtype"} or {"dtype"}, name) | own}


def _own_scheme(config: GPTModelConfig) -> dict[str, str]:
    """What config.json keeps of positions that transformers does not compute."""
    scheme = config.position_embedding.scheme
    if config.vision is None or scheme == family_scheme(config.vision):
        return {}
    logger.warning(
        "images and videos stand by position scheme %r, which transformers does not know: config.json keeps the name in %s, and "
        "transformers would load the model and place them otherwise; run it here",
        scheme, SCHEME,
    )  # fmt: skip
    return {SCHEME: scheme}


def _write_companions(
    folder: Path, texts: dict[str, dict[str, Any]], source: Path | None, tokenizer: Path | None
) -> None:
    for name, text in texts.items():
        (folder / name).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    if source is not None:
        copy_files(source, folder, companions(source, (*OTHER_FILES, *PREPROCESSING_FILES)))
    if (place := tokenizer or source) is not None:
        copy_files(place, folder, companions(place, TOKENIZER_FILES))


def _special_tokens(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: token for name, token in ids.items() if token is not None}
