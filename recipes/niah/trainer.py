"""Training and testing one small model for each position scheme and seed, on needles in video haystacks."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass

import torch
import yaml
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.files import write_whole
from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT, build_gpt
from megatron_ext.models.config import PositionEmbedding, VisionConfig
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.collectives import gather_objects
from megatron_ext.runtime.distributed import set_seed
from megatron_ext.runtime.engine import Engine, Microbatch
from recipes.niah.report import read_results, write_report
from recipes.niah.settings import LENGTHS_PER_STEP, NiahConfig
from recipes.niah.task import FEATURES, KINDS, VOCABULARY, Sample, answer_places, draw_sample
from recipes.run.session import Session

__all__ = ["NiahTrainer"]

STREAM_TOKENS = 4096  # of a stream in testing


@dataclass(frozen=True, kw_only=True)
class NiahMicrobatch(Microbatch):
    """
    Attributes:
        answers: bool [r], the predicted tokens that are answers.
    """

    answers: Tensor


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
            write_whole(session.log_dir / "config.yaml", text)

    def fit(self) -> None:
        """Train and test every scheme with every seed, then report."""
        settings, session = self.settings, self.session
        total = len(settings.seeds) * len(settings.schemes) * settings.max_steps
        with session.progress(total, "NIAH") as bar:
            for seed in settings.seeds:
                for scheme in settings.schemes:
                    start = time.perf_counter()
                    model, loss = self.train(scheme, seed, bar)
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
                        path = session.log_dir / f"result-{scheme}-{seed}.json"
                        write_whole(path, json.dumps(result, indent=1) + "\n")
        if session.is_main:
            session.say(write_report(read_results([session.log_dir]), session.log_dir))

    def _compared(self) -> dict:
        """Settings that must agree for results to be compared."""
        settings = dataclasses.asdict(self.settings)
        return {k: v for k, v in settings.items() if k not in ("schemes", "seeds")}

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

    def train(self, scheme: str, seed: int, bar) -> tuple[PrefixGroupedGPT, float]:
        """One model; returns it and the mean loss of the last tenth of its steps."""
        settings, losses = self.settings, []
        set_seed(seed)
        model = build_gpt(self.model_config(scheme), self.session.device)
        engine = Engine(model, self.config.model.optim, settings.max_steps, settings.gradient_clip_val)
        rng = torch.Generator().manual_seed(seed)
        low, high = settings.train_frames
        each = settings.videos_per_step // LENGTHS_PER_STEP
        for step in range(1, settings.max_steps + 1):
            microbatches = []
            for _ in range(LENGTHS_PER_STEP):
                frames = int(torch.randint(low, high + 1, (), generator=rng))
                samples = [draw_sample(rng, frames, settings.height, settings.width) for _ in range(each)]
                microbatches.append(self._microbatch(samples[self.session.data_rank :: self.session.data_size], scheme))
            losses.append(engine.update(microbatches, self._loss)["loss"])
            bar.update()
            if step % 20 == 0:
                bar.set_postfix_str(f"{scheme}, seed {seed}: loss {losses[-1]:.3f}", refresh=False)
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
                draw_sample(rng, frames, *size, frame_a=round(depth * (frames - 1)))
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
