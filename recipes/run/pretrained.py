"""The model that a run starts from: a checkpoint of ours or a Hugging Face folder, told apart by what is in it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_ext.errors import UserError
from megatron_ext.hf import hf_weights_digest, is_hf_folder, load_hf_weights, read_checked_config
from megatron_ext.hf.config import ANY_SCHEME
from megatron_ext.hf.eyes import PREPROCESSING_FILES, read_tower
from megatron_ext.kinds import Kind, names
from megatron_ext.models.config import ARCHITECTURE, PLAIN, GPTModelConfig, vision_difference, without_idle
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.rotary import RopeScaling
from megatron_ext.runtime.checkpoint import (
    INFO_FILE,
    holds_adapters,
    load_weights,
    read_checkpoint_info,
    weights_digest,
)
from recipes.cli.config import ABSENT, build
from recipes.run.checkpoints import Checkpoints, read_run_file
from recipes.run.settings import CheckpointCallbackSection

__all__ = ["SOURCE_FOLDER", "START_KEY", "Pretrained", "configure", "sections_of", "start_is_gone"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

START_KEY = "pretrained_checkpoint.restore_from_path"

# Of a checkpoint whose weights came from Hugging Face: what an export writes beside the weights.
SOURCE_FOLDER = "source"
SOURCE_FILES = ("config.json", "generation_config.json", *PREPROCESSING_FILES)


@dataclass(frozen=True)
class Pretrained:
    """
    Attributes:
        path: as the configuration names it.
        folder: what that was when it was opened; a link to the latest checkpoint of a run that goes on is moved meanwhile.
        architecture: fields of `GPTModelConfig`, in plain data.
        hugging_face: whether it is a Hugging Face folder.
        source: files that an export needs beside the weights, by name.
        precision: of a checkpoint of ours, as in `GPTModelConfig`.
    """

    path: str
    folder: Path
    architecture: dict[str, Any]
    hugging_face: bool
    source: dict[str, bytes]
    precision: str | None = None

    @classmethod
    def open(cls, path: str, named_by: str = START_KEY) -> Pretrained:
        """
        Args:
            named_by: the setting that the path comes from.

        Raises:
            UserError: neither kind, damaged, a model that is not supported, or a config.json that the headers of the
                weights contradict.
        """
        folder = Path(path).expanduser().resolve()
        if not (folder / INFO_FILE).is_file():
            if is_hf_folder(folder):
                return cls(path, folder, read_checked_config(folder), True, _source(folder))
            raise UserError(
                f"{path} is not a complete checkpoint of ours (it has no {INFO_FILE}) and no Hugging Face folder (it "
                f"has no config.json with a model_type); check {named_by}"
            )
        info = read_checkpoint_info(folder)
        if holds_adapters(folder):
            raise UserError(
                f"{path} holds adapters alone, and {named_by} wants the model that they stand on: name it there, and the "
                "adapters in model.peft.restore_from_path; or merge both: tools/convert_hf.py merge"
            )
        saved = without_idle(info.get("model", {}))
        if "position_embedding" in saved:
            position = saved["position_embedding"]
            position |= {"sections": sections_of(saved)}
            if position.get("scaling"):  # before there were other types it was llama3
                position["scaling"] = dataclasses.asdict(RopeScaling(**position["scaling"]))
        fields = names(GPTModelConfig, Kind.ARCHITECTURE, Kind.LIMIT)
        architecture = PLAIN | {name: saved[name] for name in fields if name in saved}
        return cls(path, folder, architecture, False, _source(folder / SOURCE_FOLDER), saved.get("precision"))

    @property
    def tokenizer(self) -> str:
        return str(self.folder if self.hugging_face else self.folder / "tokenizer")

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a response by its generation_config.json: a chat model often has several.

        Raises:
            UserError: no such file as transformers would read.
        """
        text = self.source.get("generation_config.json", b"{}")
        try:
            named = json.loads(text).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"generation_config.json of {self.path} is no JSON object: {error}") from error
        ids = [] if named is None else named if isinstance(named, list) else [named]
        if any(type(token) is not int for token in ids):
            raise UserError(
                f"generation_config.json of {self.path}: eos_token_id must be a token id or a list, got {named!r}"
            )
        return ids

    def identity(self, digest: str, delta: str | None = None) -> str:
        """Which weights these are: of a folder and of the checkpoint that was made from it not the same.

        Args:
            digest: of them.
            delta: checksum of the file of a delta that is put into them.
        """
        return f"{'hugging_face' if self.hugging_face else 'checkpoint'}:{digest}" + (f"+{delta}" if delta else "")

    def digest(self) -> str:
        """Of all weights in a checkpoint of ours, by its checksums; of samples of each tensor in a Hugging Face folder."""
        return hf_weights_digest(self.folder) if self.hugging_face else weights_digest(self.folder)

    def check(self, model: GPTModelConfig) -> None:
        """
        Raises:
            UserError: the model is of another architecture.
        """
        here = dataclasses.asdict(model)
        for name in ARCHITECTURE:
            mine, theirs = here[name], self.architecture.get(name)
            if name == "vision":
                if self.hugging_face and None in (mine, theirs):  # eyes may be added, or left out
                    continue
                if wrong := vision_difference(mine, theirs):
                    said = ["None" if eyes is None else "a section" for eyes in (mine, theirs)]
                    raise UserError(
                        f"model.vision={said[0]}, but the checkpoint {self.path} was made with vision={said[1]}: {wrong}"
                    )
                continue
            if self.hugging_face and name == "position_embedding":  # on text all schemes agree
                mine, theirs = mine | ANY_SCHEME, theirs | ANY_SCHEME
            if mine != theirs:
                raise UserError(
                    f"model.{name}={here[name]}, but the checkpoint {self.path} was made with "
                    f"{name}={self.architecture.get(name)}"
                )

    def load(self, model: PrefixGroupedGPT) -> None:
        """Fill this rank's stage; every rank calls it."""
        if self.hugging_face:
            load_hf_weights(self.folder, model)
        else:
            if self.precision == "32" and model.model_config.precision != "32":
                logger.info("%s was saved in fp32: its weights are rounded to bf16", self.path)
            load_weights(self.folder, model)

    def copy_source(self, checkpoint: Path) -> None:
        """Keep what an export needs in a new checkpoint's folder."""
        for name, content in self.source.items():
            (checkpoint / SOURCE_FOLDER).mkdir(exist_ok=True)
            (checkpoint / SOURCE_FOLDER / name).write_bytes(content)


def _source(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SOURCE_FILES if (folder / name).is_file()}


def sections_of(model: Mapping[str, Any]) -> list[int] | None:
    """`position_embedding.sections` of a checkpoint's model. Before there were any, `mrope_interleaved` divided 32 pairs
    otherwise than transformers, and what was trained so keeps it."""
    position = model["position_embedding"]
    if "sections" in position:
        return position["sections"]
    rotated = int(model["kv_channels"] * position["percent"])
    return [12, 10, 10] if (position["scheme"], rotated) == ("mrope_interleaved", 64) else None


def start_is_gone(resolved: Mapping[str, Any]) -> bool:
    """Whether a run that would go on began with a model that is not there, or not named, any more."""
    return _begun(resolved) is not None


def _start(resolved: Mapping[str, Any]) -> str | None:
    section = resolved.get("pretrained_checkpoint")
    path = section.get("restore_from_path") if isinstance(section, Mapping) else None
    return path if isinstance(path, str) else None


def _begun(resolved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the run that goes on, if that is so."""
    path, manager = _start(resolved), resolved.get("exp_manager")
    there = path is not None and (path == ABSENT or Path(path).expanduser().exists())
    if there or not isinstance(manager, Mapping) or not manager.get("resume_if_exists"):
        return None
    folder = Path(str(manager.get("explicit_log_dir")))
    newest = Checkpoints(folder, CheckpointCallbackSection()).newest()
    if newest is None or START_KEY not in read_checkpoint_info(newest).get("contents", {}):
        return None
    return read_run_file(folder)


def configure(cls: type[T], resolved: Mapping[str, Any]) -> T:
    """A recipe's configuration. What `model` does not say of the architecture is that of the model it starts from.

    Raises:
        UserError: see `build`; or there is no such model.
    """
    resolved = dict(resolved)
    path, model = _start(resolved), resolved.get("model") or {}
    architecture = None
    if begun := _begun(resolved):
        fields = names(GPTModelConfig, Kind.ARCHITECTURE, Kind.LIMIT)
        architecture = {name: begun["model"][name] for name in fields if name in begun["model"]}
    elif path not in (ABSENT, None) and isinstance(model, Mapping):
        architecture = Pretrained.open(path).architecture
    if architecture is not None and isinstance(model, Mapping):
        given = {key: value for key, value in model.items() if not (isinstance(value, str) and value == ABSENT)}
        position = given.get("position_embedding")
        if isinstance(position, Mapping):
            theirs = architecture.get("position_embedding", {})
            if position.get("scheme", theirs.get("scheme")) != theirs.get("scheme"):  # whose the sections are
                theirs = theirs | {"sections": None}
            given["position_embedding"] = theirs | position
        if isinstance(eyes := given.get("vision"), Mapping):
            given["vision"] = (architecture.get("vision") or {}) | eyes
        resolved["model"] = architecture | given
    return build(cls, _with_tower(resolved))


def _with_tower(resolved: dict[str, Any]) -> dict[str, Any]:
    """With what the folder of model.vision.tower says of its shape and of pictures, where the configuration does not."""
    model = resolved.get("model")
    eyes = model.get("vision") if isinstance(model, Mapping) else None
    if not isinstance(eyes, Mapping) or not isinstance(eyes.get("tower"), str) or eyes["tower"] == ABSENT:
        return resolved
    if eyes.get("tower_config") is not None:
        return resolved
    given = {key: value for key, value in eyes.items() if value is not None}
    return resolved | {"model": dict(model) | {"vision": read_tower(eyes["tower"]) | given}}
