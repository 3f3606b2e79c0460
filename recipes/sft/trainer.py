"""Supervised fine-tuning: maximise the likelihood of given responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from megatron_ext.runtime.collectives import together
from megatron_ext.runtime.engine import Engine
from recipes.data.mixture import draw_order
from recipes.data.rows import Pair
from recipes.run.loop import FAILED, Schedule, Trainer, fit
from recipes.run.session import Session
from recipes.sft.batches import SFTMicrobatch, make_microbatches, negative_log_likelihood
from recipes.sft.settings import SFTConfig

__all__ = ["SFTTrainer", "check_validation"]


class SFTTrainer(Trainer):
    """
    Args:
        session: the run.
        train, validation: prompt and response pairs; those to train on by the name of their set.
    """

    watched = ("train_optim/grad_norm", "train_optim/loss")

    def __init__(self, session: Session, train: Mapping[str, list[Pair]], validation: list[Pair]):
        self.session = session
        self.config: SFTConfig = session.config
        self.train, self.validation = [pair for pairs in train.values() for pair in pairs], validation
        model, settings = self.config.model, self.config.trainer.sft
        skipping = self.config.trainer.health.skipping
        self.engine = Engine(session.model, model.optim, settings.max_steps, settings.gradient_clip_val, skipping)
        self.batch: list[Pair] = []  # of the last step, this rank's
        place = session.data_rank, session.data_size
        batch, sections = model.global_batch_size, self.config.data.trained
        self.sampler = draw_order(train, sections, batch, settings.max_steps, model.seed, *place)

    def fit(self) -> None:
        settings = self.config.trainer.sft
        interval = settings.val_check_interval if self.validation else 0
        fit(self, Schedule("SFT", settings.max_steps, interval, settings.save_interval))

    def run_step(self, step: int) -> dict[str, float]:
        with self.session.timers("optimizer_step"):
            self.batch = [self.train[i] for i in self.sampler.next()]
            metrics = self.engine.update(self._microbatches(self.batch), negative_log_likelihood)
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def rows(self) -> list[str]:
        return [pair.where for pair in self.batch]

    def save_batch(self, step: int) -> Path:
        """Its rows as they were read, for data.train_path."""
        path = self.session.log_dir / FAILED / f"step-{step:06d}.jsonl"
        rows = self.session.gathered([json.dumps(pair.prompt.row, ensure_ascii=False) for pair in self.batch])
        with together():
            if self.session.is_main:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, "".join(f"{row}\n" for row in rows))
        return path

    def run_validation(self, step: int) -> dict[str, float]:
        mine = self.validation[self.session.data_rank :: self.session.data_size]
        with self.session.timers("validation"):
            outputs = self.engine.run(self._microbatches(mine), negative_log_likelihood, forward_only=True)
            return {"val/loss": self.engine.reduce_metrics(outputs)["loss"]}

    def summary(self, metrics: dict[str, float]) -> str:
        loss = metrics.get("train_optim/loss")
        return "the step was left out" if loss is None else f"loss {loss:.4f}"

    def state_dict(self) -> dict:
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state["sampler"])

    def _microbatches(self, pairs: list[Pair]) -> list[SFTMicrobatch]:
        return make_microbatches(pairs, self.config.model, self.session.device, self.session.sum_over_data)


def check_validation(validation: list[Pair], path: str | None, data_size: int) -> None:
    """
    Raises:
        UserError: a data-parallel rank would have no row.
    """
    if 0 < len(validation) < data_size:
        raise UserError(
            f"data.validation_path={path} has {len(validation)} rows, fewer than the {data_size} data-parallel ranks that "
            "share them; add rows"
        )
