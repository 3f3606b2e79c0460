"""The adapter that a run starts from: a folder of PEFT's or a checkpoint of a run with adapters, told apart by what is in it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.hf.adapter_files import load_adapter_folder
from megatron_ext.hf.adapter_folder import ADAPTER_WEIGHTS, AdapterFolder, is_adapter_folder
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.checkpoint import (
    INFO_FILE,
    holds_adapters,
    load_adapters,
    read_checkpoint_info,
    weights_digest,
)
from megatron_ext.runtime.checkpoint_files import checksum

__all__ = ["ADAPTER_KEY", "BASE_KEY", "StartAdapter"]

logger = logging.getLogger(__name__)

ADAPTER_KEY = "model.peft.restore_from_path"
BASE_KEY = "base"  # of a checkpoint's info: which weights its adapters stand on, as `Pretrained.identity` says it


@dataclass(frozen=True)
class StartAdapter:
    """
    Attributes:
        path: as the configuration names it.
        folder: what that was when it was opened.
        theirs: the folder of PEFT's; None: it is a checkpoint of ours.
        base: which weights the adapter was trained on; None: it does not say.
    """

    path: str
    folder: Path
    theirs: AdapterFolder | None
    base: str | None

    @classmethod
    def open(cls, path: str, named_by: str = ADAPTER_KEY) -> StartAdapter:
        """
        Args:
            named_by: the setting that the path comes from.

        Raises:
            UserError: neither kind, damaged, or an adapter that we do not compute.
        """
        folder = Path(path).expanduser().resolve()
        if is_adapter_folder(folder):
            theirs = AdapterFolder.open(folder)
            return cls(path, folder, theirs, theirs.base)
        if not (folder / INFO_FILE).is_file():
            raise UserError(
                f"{path} is no adapter of PEFT's (it has no adapter_config.json) and no complete checkpoint of ours (it has no "
                f"{INFO_FILE}); check {named_by}"
            )
        info = read_checkpoint_info(folder)
        if not holds_adapters(folder):
            raise UserError(f"{path} holds a whole model and no adapters; check {named_by}")
        return cls(path, folder, None, info.get(BASE_KEY))

    def check(self, model: GPTModelConfig, base: str) -> None:
        """
        Args:
            base: `Pretrained.identity` of what the run starts from.

        Raises:
            UserError: the model's adapters are others, or it was trained on other weights.
        """
        if self.theirs is not None:
            self.theirs.check(model)
        else:
            saved = read_checkpoint_info(self.folder)["model"]["peft"]
            for key in ("dim", "alpha", "rslora", "target_modules"):
                if saved[key] != (mine := getattr(model.peft, key)):
                    raise UserError(
                        f"model.peft.{key}={mine}, but the adapters of {self.path} were made with {key}={saved[key]}"
                    )
        if self.base is None or self.base.split(":")[0] != base.split(":")[0]:
            logger.info("%s does not say of these weights whether it was trained on them", self.path)
        elif self.base != base:
            raise UserError(
                f"the adapter {self.path} was trained on other weights than pretrained_checkpoint's; name the model that it was "
                "trained on"
            )

    def digest(self) -> str:
        return weights_digest(self.folder) if self.theirs is None else checksum(self.folder / ADAPTER_WEIGHTS)[1]

    def load(self, model: PrefixGroupedGPT) -> None:
        """Fill this rank's adapters; every rank calls it."""
        if self.theirs is None:
            load_adapters(self.folder, model)
        else:
            load_adapter_folder(self.theirs, model)
        logger.info("read the adapters of %s", self.path)
