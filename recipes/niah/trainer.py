"""Training and testing one small model for each position scheme and seed, on needles in video haystacks."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.files import write_json, write_whole
from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT, build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.collectives import broadcast_object, gather_objects
from megatron_ext.runtime.distributed import set_seed
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.vision import VisionConfig
from recipes.niah.report import read_results, write_report
from recipes.niah.settings import LENGTHS_PER_STEP, NiahConfig
from recipes.niah.task import FEATURES, KINDS, VOCABULARY, Sample, answer_places, draw_sample
from recipes.run.run_folder import claim_run_folder
from recipes.run.session import Session

__all__ = ["NiahTrainer"]

STREAM_TOKENS = 4096  # of a stream in testing
SWITCHED = 1_000_000  # added to a seed for the videos that are seen after a switch of schemes


@dataclass(frozen=True, kw_only=True)
class NiahMicrobatch(Microbatch):
    """
    Attributes:
        answers: bool [r], the predicted tokens that are answers.
    """

    answers: Tensor


class Stopped(Exception):
    """Why a model is not trained to its end."""


class NiahTrainer:
    """All models, one after the other; data-parallel ranks share each step's videos.

    Args:
        session: the run.
    """

    def __init__(self, session: Session):
        self.session = session
        self.config: NiahConfig = session.config
        self.settings = self.config.trainer.niah
        if session.is_main:
            text = yaml.safe_dump(session.inputs.resolved, sort_keys=False)
            claim_run_folder(session.log_dir, session.inputs.resolved)
            write_whole(session.log_dir / "config.yaml", text)

    def fit(self) -> None:
        """Train and test every scheme with every seed but for those whose result is there, then report. A run that is to stop
        ends before its next step: the model in hand is lost, and one that is trained already is tested first."""
        settings, session = self.settings, self.session
        pairs = [(seed, scheme) for seed in settings.seeds for scheme in settings.schemes]
        # Rank 0 decides for all: others may see an older state of a shared filesystem.
        missing = broadcast_object([pair for pair in pairs if not self._path(*pair).is_file()])
        if len(missing) < len(pairs):
            session.say(f"{len(pairs) - len(missing)} of {len(pairs)} results are there, {len(missing)} are to come")
        transfer = settings.transfer
        total = len(missing) * settings.max_steps
        if transfer is not None:
            total += len({seed for seed, _ in missing}) * transfer.max_steps
        weights: tuple[int, dict] | None = None  # of the seed that is at it, before the switch
        with session.progress(total, "NIAH") as bar:
            for seed, scheme in missing:
                start = time.perf_counter()
                try:
                    if transfer is not None and (weights is None or weights[0] != seed):
                        weights = seed, self.train(transfer.scheme, seed, transfer.max_steps, bar)[0].state_dict()
                    model, loss = self.train(scheme, seed, settings.max_steps, bar, weights and weights[1])
                except Stopped as why:
                    lost = f"{scheme} with seed {seed} is not trained to its end"
                    session.say(f"{why}: {lost}; exp_manager.resume_if_exists=true begins it anew")
                    return
                result = {
                    "scheme": scheme,
                    "seed": seed,
                    "settings": self._compared(),
                    "last_loss": loss,
                    "cells": self.test(model, scheme, seed),
                    "seconds": time.perf_counter() - start,
                }
                session.check_folder()
                if session.is_main:
                    write_json(self._path(seed, scheme), result)
        if session.is_main:
            session.say(write_report(read_results([session.log_dir]), session.log_dir))

    def _path(self, seed: int, scheme: str) -> Path:
        return self.session.log_dir / f"result-{scheme}-{seed}.json"

    def _compared(self) -> dict:
        """Settings that must agree for results to be compared; one that is null is as if nobody had known of it."""
        settings = dataclasses.asdict(self.settings)
        return {k: v for k, v in settings.items() if k not in ("schemes", "seeds") and v is not None}

    def model_config(self, scheme: str) -> GPTModelConfig:
        shape, settings = self.config.model, self.settings
        longest = max(*settings.test_frames, *settings.train_frames) * settings.height * settings.width
        return GPTModelConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            ffn_hidden_size=shape.ffn_hidden_size,
            init_method_std=shape.init_method_std,
            vocab_size=VOCABULARY,
            encoder_seq_length=longest + 2,
            vision=VisionConfig(FEATURES),
            position_embedding=PositionEmbedding(scheme, shape.rotary_base),
        )

    def train(
        self, scheme: str, seed: int, steps: int, bar, weights: dict | None = None
    ) -> tuple[PrefixGroupedGPT, float]:
        """One model; returns it and the mean loss of the last tenth of its steps.

        Args:
            weights: to begin with, of another scheme's model, in which nothing depends on the scheme; it then sees other videos
                than that has. None: fresh ones.

        Raises:
            Stopped: on every rank, the run must stop.
        """
        settings, losses = self.settings, []
        size = settings.height, settings.width
        set_seed(seed)
        model = build_gpt(self.model_config(scheme), self.session.device)
        if weights is not None:
            model.load_state_dict(weights)
        engine = Engine(model, self.config.model.optim, steps, settings.gradient_clip_val)
        rng = torch.Generator().manual_seed(seed if weights is None else seed + SWITCHED)
        low, high = settings.train_frames
        each = settings.videos_per_step // LENGTHS_PER_STEP
        for step in range(1, steps + 1):
            if why := self.session.must_stop():
                raise Stopped(why)
            microbatches = []
            for _ in range(LENGTHS_PER_STEP):
                frames = int(torch.randint(low, high + 1, (), generator=rng))
                samples = [draw_sample(rng, frames, *size, period=settings.distractor_period) for _ in range(each)]
                microbatches.append(self._microbatch(samples[self.session.data_rank :: self.session.data_size], scheme))
            losses.append(engine.update(microbatches, self._loss)["loss"])
            bar.update()
            if step % 20 == 0:
                bar.tell(f"{scheme}, seed {seed}: loss {losses[-1]:.3f}")
        tail = losses[-max(1, len(losses) // 10) :]
        return model, sum(tail) / len(tail)

    def _microbatch(self, samples: list[Sample], scheme: str) -> NiahMicrobatch:
        batch = pack_prompts(
            [s.prompt for s in samples], [s.questions for s in samples], scheme, 16, self.session.device
        )
        return NiahMicrobatch(batch, answers=answer_places(len(samples)).to(self.session.device))

    def _loss(self, microbatch: NiahMicrobatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        answers = microbatch.answers
        loss = -(logprobs * answers).sum() / (self.settings.videos_per_step * len(KINDS))
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def test(self, model: PrefixGroupedGPT, scheme: str, seed: int) -> list[dict]:
        """Accuracy of every kind of question for each number of frames and depth; ranks take cells in turn."""
        settings = self.settings
        cells = [(f, d) for f in settings.test_frames for d in range(settings.test_depths)]
        mine = []
        for number, (frames, place) in enumerate(cells):
            if number % self.session.data_size != self.session.data_rank:
                continue
            depth = place / max(settings.test_depths - 1, 1)
            rng = torch.Generator().manual_seed(10_000 * seed + number)
            size = (settings.height, settings.width)
            samples = [
                draw_sample(rng, frames, *size, round(depth * (frames - 1)), settings.distractor_period)
                for _ in range(settings.test_videos)
            ]
            per_stream = max(1, STREAM_TOKENS // (frames * settings.height * settings.width))
            right = torch.cat(
                [self._right(model, samples[i : i + per_stream], scheme) for i in range(0, len(samples), per_stream)]
            )
            shares = right.double().mean(0).tolist()  # [kinds]
            mine.append({"frames": frames, "depth": depth} | dict(zip(KINDS, shares, strict=True)))
        parts = gather_objects(mine, parallel_state.get_data_parallel_group())
        return sorted((cell for part in parts for cell in part), key=lambda c: (c["frames"], c["depth"]))

    def _right(self, model: PrefixGroupedGPT, samples: list[Sample], scheme: str) -> Tensor:
        """bool [v, kinds]: whether the answer is the most likely token."""
        batch = self._microbatch(samples, scheme).batch
        answers = answer_places(len(samples)).nonzero().squeeze(1).to(batch.tokens.device)
        rows = batch.groups.predict_index[answers]
        logits = model(batch.tokens, batch.position_ids, batch.groups, rows=rows, media=batch.media)
        return (logits.argmax(-1) == batch.labels[answers]).view(-1, len(KINDS)).cpu()
