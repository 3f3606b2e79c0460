"""What a run is given, checked on every rank before any of them starts: layout, run folder, starting weights, tokenizer.

A bad input so costs little and leaves nothing half-written.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.runtime.checkpoint import read_checkpoint_info
from megatron_ext.runtime.checkpoint_files import checksum
from megatron_ext.runtime.distributed import ParallelSizes, world_size
from recipes.cli.stopping import StopRequests
from recipes.data.tokenizer import DataError, Tokenizer, load_tokenizer
from recipes.run.adapters import StartAdapter
from recipes.run.checkpoints import Checkpoints
from recipes.run.lock import refuse_if_held
from recipes.run.pretrained import Pretrained, sections_of, start_is_gone
from recipes.run.run_folder import check_run_folder
from recipes.run.settings import ExpManagerSection, TrainedModel

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """
    Attributes:
        config: what a recipe's YAML says, e.g. an `SFTConfig`.
        resolved: all of it as plain data, kept beside the results: defaults, too, which may change in time, and `auto`.
        stops: whether the run must stop; its time counts from here.
        sizes: the layout of ranks.
        log_dir: the run's folder, which may be written to.
        checkpoints: in it; None where nothing is trained that could be gone on with.
        pretrained: the model to start from.
        start_is_gone: the model that the run began with is not there, or not named, any more: `pretrained` is the run's own
            checkpoint.
        adapter: to begin with; None: a new one, none at all, or the run goes on.
        tokenizer: None where a recipe brings its own model and data.
    """

    config: Any
    resolved: dict
    stops: StopRequests
    sizes: ParallelSizes
    log_dir: Path
    checkpoints: Checkpoints | None = None
    pretrained: Pretrained | None = None
    start_is_gone: bool = False
    adapter: StartAdapter | None = None
    tokenizer: Tokenizer | None = None

    @classmethod
    def check(cls, config: Any) -> Inputs:
        """
        Raises:
            UserError: anything wrong with the configuration, the checkpoint or the run folder.
        """
        stops = StopRequests(getattr(config.trainer, "max_time_per_run", None), os.environ.get("RANK", "0") == "0")
        resolved = dataclasses.asdict(config)
        if isinstance(config.model, TrainedModel):
            config = dataclasses.replace(config, model=config.model.here())
        model, trainer, manager = config.model, config.trainer, config.exp_manager
        asked = trainer.devices * trainer.num_nodes
        if asked != world_size():
            raise UserError(
                f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes} is {asked}, but the "
                f"launcher started {world_size()} processes"
            )
        if trainer.num_nodes == 1:  # elsewhere rank 0 alone can say whether what holds it lives, and must not end alone
            refuse_if_held(Path(manager.explicit_log_dir))
        log_dir = check_run_folder(
            manager.explicit_log_dir, type(config), resolved if manager.resume_if_exists else None
        )
        checkpoints = newest = None
        if isinstance(manager, ExpManagerSection):
            manager.check_installed()
            checkpoints = Checkpoints(log_dir, manager.checkpoint_callback_params)
            newest = checkpoints.newest() if manager.resume_if_exists else None
        sizes, pretrained, gone, adapter, tokenizer = ParallelSizes(), None, False, None, None
        if isinstance(model, TrainedModel):
            path = config.pretrained_checkpoint.restore_from_path
            gone = newest is not None and start_is_gone(resolved)
            if gone and config.reads_start:
                raise UserError(
                    f"pretrained_checkpoint.restore_from_path={path} is not there, and {config.reads_start}: put it back"
                )
            start = str(newest) if gone else path
            pretrained = Pretrained.open(start) if start else None
            tokenizer = _tokenizer(model, pretrained, newest)
            if newest is not None and model.position_embedding.sections is None:
                model.position_embedding.sections = sections_of(read_checkpoint_info(newest)["model"])
            _fit(model, tokenizer, pretrained)
            if newest is None and model.peft is not None and model.peft.restore_from_path is not None:
                adapter = StartAdapter.open(model.peft.restore_from_path)
                delta = config.pretrained_checkpoint.delta_path
                adapter.check(model, pretrained.identity(pretrained.digest(), delta and checksum(Path(delta))[1]))
            if pretrained is not None:
                tokenizer.stop_at(pretrained.end_token_ids, f"generation_config.json of {pretrained.path}")
            sizes = model.sizes
        found = cls(config, resolved, stops, sizes, log_dir, checkpoints, pretrained, gone, adapter, tokenizer)
        if hasattr(config, "check_data_parallel"):
            config.check_data_parallel(found.data_size)
        return found

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return self.sizes.data(world_size())


def _tokenizer(model: TrainedModel, pretrained: Pretrained | None, checkpoint: Path | None) -> Tokenizer:
    path = model.tokenizer
    if path is None and pretrained is not None:
        path = pretrained.tokenizer
    if path is None:
        raise UserError(
            "model.tokenizer is not set: name the folder of a Hugging Face tokenizer, or a model to start from in "
            "pretrained_checkpoint.restore_from_path"
        )
    try:
        return load_tokenizer(path)
    except DataError as error:
        if checkpoint is None:
            raise
        copy = checkpoint / "tokenizer"
        raise UserError(
            f"{error}; {copy} is a copy of the one that the run began with: name it in model.tokenizer"
        ) from error


def _fit(model: TrainedModel, tokenizer: Tokenizer, pretrained: Pretrained | None) -> None:
    """Model, tokenizer and starting weights must belong together; a vocabulary size that is not given is the tokenizer's."""
    if model.vocab_size is None:
        model.vocab_size = tokenizer.vocab_size
    if pretrained is not None:
        pretrained.check(model)
        if model.peft is not None and model.vision is not None and pretrained.architecture["vision"] is None:
            raise UserError(
                f"model.vision gives {pretrained.path} eyes that see nothing yet, and model.peft would keep them so: train "
                "without adapters first, or set model.vision=null"
            )
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the {tokenizer.vocab_size} tokens of {tokenizer.path}: take "
            "the tokenizer that belongs to the model, or leave model.vocab_size out"
        )
