"""A model to evaluate: on Megatron's ranks, or in transformers in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.hf import is_hf_folder
from megatron_ext.kinds import Kind, names
from megatron_ext.runtime.distributed import local_device, world_size
from recipes.bias.scorers import HuggingFaceScorer, MegatronScorer, Scorer
from recipes.bias.settings import BiasEvalConfig, BiasEvalModel, LocateConfig
from recipes.data.tokenizer import load_tokenizer
from recipes.run.evaluated import checkpoint_inputs
from recipes.run.lock import refuse_if_held
from recipes.run.progress import progress_bar
from recipes.run.run_folder import check_run_folder, held_run_folder
from recipes.run.session import Session

__all__ = ["CheckpointModel", "open_model"]


def open_model(config: BiasEvalConfig) -> CheckpointModel | _HuggingFace:
    """Hugging Face folders run in transformers, whatever their family, where one process is asked for and no delta, which
    is cut as our blocks are, and else as ours do. Nothing is started or written yet.

    Raises:
        UserError: neither kind of model, or one that cannot be run as asked.
    """
    source = config.pretrained_checkpoint
    alone = world_size() == 1 and source.delta_path is None and is_hf_folder(source.restore_from_path)
    return (_HuggingFace if alone else CheckpointModel)(config)


class CheckpointModel:
    """A checkpoint of ours or a Hugging Face folder on Megatron's ranks; its architecture is read from it."""

    def __init__(self, config: BiasEvalConfig | LocateConfig):
        self.inputs = checkpoint_inputs(config)
        model = self.inputs.config.model
        self.tokenizer, self.log_dir = self.inputs.tokenizer, self.inputs.log_dir
        self.longest, self.num_layers = model.encoder_seq_length, model.num_layers
        self.is_main = False  # until the ranks have started

    def session(self) -> Session:
        """Start the ranks, have the run folder for them alone and load this one's stage."""
        session = Session.start(self.inputs)
        self.is_main, self.check_folder = session.is_main, session.check_folder
        return session

    @contextlib.contextmanager
    def start(self) -> Iterator[Scorer]:
        with self.session() as session:
            yield MegatronScorer(session.model)

    def progress(self, rows: int):
        return progress_bar(rows, "rows", "row", shown=self.is_main)


class _HuggingFace:
    is_main = True

    def __init__(self, config: BiasEvalConfig):
        self.path, model = config.pretrained_checkpoint.restore_from_path, config.model
        for name in names(BiasEvalModel, Kind.LAYOUT, Kind.SPEED):
            if getattr(model, name) != getattr(BiasEvalModel(), name):
                raise UserError(
                    f"model.{name}={getattr(model, name)} has no meaning for {self.path}, a Hugging Face folder, "
                    "which transformers runs in one process; set trainer.devices to 2 or more to run it on Megatron"
                )
        refuse_if_held(Path(config.exp_manager.explicit_log_dir))
        self.log_dir = check_run_folder(config.exp_manager.explicit_log_dir)
        self.tokenizer = load_tokenizer(model.tokenizer or self.path)
        self.device = local_device()
        self.scorer = HuggingFaceScorer(self.path, self.device, model.on(self.device.type).dtype)
        self.longest = getattr(self.scorer.model.config, "max_position_embeddings", None) or sys.maxsize

    @contextlib.contextmanager
    def start(self) -> Iterator[Scorer]:
        with held_run_folder(str(self.log_dir)) as lock:
            self.check_folder = lock.check
            yield self.scorer

    def progress(self, rows: int):
        return progress_bar(rows, "rows", "row")
