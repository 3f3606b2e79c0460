"""Supervised fine-tuning: maximise the likelihood of given responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from megatron_ext.runtime.collectives import together
from megatron_ext.runtime.engine import Engine
from recipes.data.decoding import DecodeAhead
from recipes.data.drawing import draw_order
from recipes.data.media_rows import with_folder
from recipes.data.mixture import Joined
from recipes.data.rows import Pair
from recipes.data.sampler import Sampler
from recipes.run.loop import FAILED, Schedule, Trainer, fit
from recipes.run.session import Session
from recipes.run.utilisation import Utilisation
from recipes.sft.batches import SFTBatches, negative_log_likelihood
from recipes.sft.settings import SFTConfig

__all__ = ["SFTTrainer", "check_validation"]


class SFTTrainer(Trainer):
    """
    Args:
        session: the run.
        train, validation: prompt and response pairs; those to train on by the name of their set.
    """

    watched = ("train_optim/grad_norm", "train_optim/loss")

    def __init__(self, session: Session, train: Mapping[str, Sequence[Pair]], validation: Sequence[Pair]):
        self.session = session
        self.config: SFTConfig = session.config
        self.train, self.validation = Joined(train.values()), validation
        model, settings = self.config.model, self.config.trainer.sft
        skipping = self.config.trainer.health.skipping
        self.engine = Engine(session.model, model.optim, settings.max_steps, settings.gradient_clip_val, skipping)
        self.utilisation = Utilisation.of_run(session)
        self.batch: list[Pair] = []  # of the last step, this rank's
        place, data = (session.data_rank, session.data_size), self.config.data
        self.batches = SFTBatches(model, session.device, session.sum_over_data, place)
        self.sampler = draw_order(
            train, data.trained, model.global_batch_size, settings.max_steps, model.seed, *place,
            together=data.keep_together, curriculum=data.curriculum,
        )  # fmt: skip
        self.decoding = DecodeAhead.of(data.video, self.train, self.sampler, self._own)

    def fit(self) -> None:
        settings = self.config.trainer.sft
        interval = settings.val_check_interval if self.validation else 0
        with closing(self.decoding):
            fit(self, Schedule("SFT", settings.max_steps, interval, settings.save_interval))

    def run_step(self, step: int) -> dict[str, float]:
        session = self.session
        with session.timers("optimizer_step"):
            drawn, mine = self.sampler.next_batch(), self.sampler.mine
            self.batch = [self.train[i] for i in drawn[mine]]
            everything = [self.train[i] for i in drawn] if self.batches.by_tokens else self.batch
            microbatches, saved = self.batches.of(everything), self.batches.saved
            self.decoding.next_batch()
            metrics = self.engine.update(microbatches, negative_log_likelihood)
        streams, seconds = [m.batch.groups for m in microbatches], session.timers.seconds["optimizer_step"]
        (tokens,) = session.sum_over_data(sum(groups.num_tokens for groups in streams))
        found = {f"train_optim/{name}": value for name, value in metrics.items()}
        speed = {"train_optim/tokens_saved": saved, "train_optim/tokens_per_second": tokens / seconds}
        return found | speed | self.utilisation.of_step(streams, 0, seconds)

    def _own(self, sampler: Sampler) -> list[int]:
        """The numbers of the next rows that this rank computes with."""
        drawn = sampler.next_batch()
        if not self.batches.by_tokens:
            return drawn[sampler.mine]
        pairs = [self.train[i] for i in drawn]
        numbers = {id(pair): i for i, pair in zip(drawn, pairs, strict=True)}
        return [numbers[id(pair)] for pair in self.batches.own(pairs)]

    def has_ended(self) -> bool:
        """Rows that are left out when they arrive take more than was counted when the run began."""
        return not self.sampler.has_next()

    def rows(self) -> list[str]:
        return [pair.where for pair in self.batch]

    def save_batch(self, step: int) -> Path:
        """Its rows as they were read, for data.train_path; files that they name are called in full."""
        path = self.session.log_dir / FAILED / f"step-{step:06d}.jsonl"
        mine = [pair.prompt.row for pair in self.batch]
        if self.config.data.video is not None:
            mine = [with_folder(pair.prompt.row, pair.prompt.place.folder) for pair in self.batch]
        rows = self.session.gathered([json.dumps(row, ensure_ascii=False) for row in mine])
        with together():
            if self.session.is_main:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, "".join(f"{row}\n" for row in rows))
        return path

    def run_validation(self, step: int) -> dict[str, float]:
        mine = self.validation[self.session.data_rank :: self.session.data_size]
        if self.batches.by_tokens:
            mine = self.validation[:]
        with self.session.timers("validation"):
            outputs = self.engine.run(self.batches.of(mine), negative_log_likelihood, forward_only=True)
            return {"val/loss": self.engine.reduce_metrics(outputs)["loss"]}

    def summary(self, metrics: dict[str, float]) -> str:
        loss = metrics.get("train_optim/loss")
        return "the step was left out" if loss is None else f"loss {loss:.4f}"

    def state_dict(self) -> dict:
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state["sampler"])


def check_validation(validation: Sequence[Pair], path: str | None, data_size: int) -> None:
    """
    Raises:
        UserError: a data-parallel rank would have no row.
    """
    if 0 < len(validation) < data_size:
        raise UserError(
            f"data.validation_path={path} has {len(validation)} rows, fewer than the {data_size} data-parallel ranks that "
            "share them; add rows"
        )
