"""The model that a run starts from: a checkpoint of ours or a Hugging Face folder, told apart by what is in it."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_ext.errors import UserError
from megatron_ext.hf import is_hf_folder, load_hf_weights, read_checked_config
from megatron_ext.hf.config import ANY_SCHEME
from megatron_ext.kinds import Kind, names
from megatron_ext.models.config import ARCHITECTURE, PLAIN, GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.checkpoint import INFO_FILE, load_weights, read_checkpoint_info
from recipes.cli.config import ABSENT, build

__all__ = ["SOURCE_FOLDER", "Pretrained", "configure", "sections_of"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Of a checkpoint whose weights came from Hugging Face: what an export writes beside the weights.
SOURCE_FOLDER = "source"
SOURCE_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Pretrained:
    """
    Attributes:
        path: as the configuration names it.
        architecture: fields of `GPTModelConfig`, in plain data.
        hugging_face: whether it is a Hugging Face folder.
        precision: of a checkpoint of ours, as in `GPTModelConfig`.
    """

    path: str
    architecture: dict[str, Any]
    hugging_face: bool
    precision: str | None = None

    @classmethod
    def open(cls, path: str, named_by: str = "pretrained_checkpoint.restore_from_path") -> Pretrained:
        """
        Args:
            named_by: the setting that the path comes from.

        Raises:
            UserError: neither kind, damaged, a model that is not supported, or a config.json that the headers of the
                weights contradict.
        """
        path = str(Path(path).expanduser())
        folder = Path(path)
        if not (folder / INFO_FILE).is_file():
            if is_hf_folder(folder):
                return cls(path, read_checked_config(folder), True)
            raise UserError(
                f"{path} is not a complete checkpoint of ours (it has no {INFO_FILE}) and no Hugging Face folder (it "
                f"has no config.json with a model_type); check {named_by}"
            )
        saved = read_checkpoint_info(folder).get("model", {})
        if "position_embedding" in saved:
            saved["position_embedding"] |= {"sections": sections_of(saved)}
        fields = names(GPTModelConfig, Kind.ARCHITECTURE, Kind.LIMIT)
        architecture = PLAIN | {name: saved[name] for name in fields if name in saved}
        return cls(path, architecture, False, saved.get("precision"))

    @property
    def tokenizer(self) -> str:
        return self.path if self.hugging_face else str(Path(self.path) / "tokenizer")

    def check(self, model: GPTModelConfig) -> None:
        """
        Raises:
            UserError: the model is of another architecture.
        """
        here = dataclasses.asdict(model)
        for name in ARCHITECTURE:
            mine, theirs = here[name], self.architecture.get(name)
            if self.hugging_face and name == "vision":  # eyes may be added
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
            load_hf_weights(self.path, model)
        else:
            if self.precision == "32" and model.model_config.precision != "32":
                logger.info("%s was saved in fp32: its weights are rounded to bf16", self.path)
            load_weights(Path(self.path), model)

    def copy_source(self, checkpoint: Path) -> None:
        """Keep what an export needs in a new checkpoint's folder."""
        source = Path(self.path) if self.hugging_face else Path(self.path) / SOURCE_FOLDER
        for name in SOURCE_FILES:
            if (source / name).is_file():
                (checkpoint / SOURCE_FOLDER).mkdir(exist_ok=True)
                shutil.copyfile(source / name, checkpoint / SOURCE_FOLDER / name)


def sections_of(model: Mapping[str, Any]) -> list[int] | None:
    """`position_embedding.sections` of a checkpoint's model. Before there were any, `mrope_interleaved` divided 32 pairs
    otherwise than transformers, and what was trained so keeps it."""
    position = model["position_embedding"]
    if "sections" in position:
        return position["sections"]
    rotated = int(model["kv_channels"] * position["percent"])
    return [12, 10, 10] if (position["scheme"], rotated) == ("mrope_interleaved", 64) else None


def configure(cls: type[T], resolved: Mapping[str, Any]) -> tuple[T, dict[str, Any]]:
    """A recipe's configuration. What `model` does not say of the architecture is that of the model it starts from.

    Returns:
        `cls` filled, and all of it as plain data: what was filled in and defaults, too, which may change in time.

    Raises:
        UserError: see `build`; or there is no such model.
    """
    resolved = dict(resolved)
    section, model = resolved.get("pretrained_checkpoint"), resolved.get("model") or {}
    path = section.get("restore_from_path") if isinstance(section, Mapping) else None
    if isinstance(path, str) and path != ABSENT and isinstance(model, Mapping):
        architecture = Pretrained.open(path).architecture
        given = {key: value for key, value in model.items() if not (isinstance(value, str) and value == ABSENT)}
        position = given.get("position_embedding")
        if isinstance(position, Mapping):
            theirs = architecture.get("position_embedding", {})
            if position.get("scheme", theirs.get("scheme")) != theirs.get("scheme"):  # whose the sections are
                theirs = theirs | {"sections": None}
            given["position_embedding"] = theirs | position
        resolved["model"] = architecture | given
    config = build(cls, resolved)
    return config, dataclasses.asdict(config)
