"""Supervised fine-tuning: maximise the likelihood of given responses."""

from __future__ import annotations

from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.engine import Engine, Microbatch
from recipes.data.rows import Pair
from recipes.data.sampler import EpochSampler
from recipes.run.session import Session
from recipes.run.settings import check_batch_sizes
from recipes.sft.settings import SFTConfig

__all__ = ["SFTTrainer"]


class SFTTrainer:
    """The loop over optimizer steps.

    Args:
        session: the run.
        engine: the model and its optimizer.
        train, validation: prompt and response pairs.
    """

    def __init__(self, session: Session, engine: Engine, train: list[Pair], validation: list[Pair]):
        self.session, self.engine = session, engine
        self.config: SFTConfig = session.config
        self.train, self.validation = train, validation
        model = self.config.model
        check_batch_sizes("model.global_batch_size", model.global_batch_size, session.data_size)
        if 0 < len(validation) < session.data_size:
            raise UserError(
                f"data.validation_path={self.config.data.validation_path} has {len(validation)} rows, fewer than the "
                f"{session.data_size} data-parallel ranks that share them; add rows"
            )
        self.sampler = EpochSampler(
            len(train), model.global_batch_size, model.seed, session.data_rank, session.data_size
        )

    def fit(self) -> None:
        settings, session = self.config.trainer.sft, self.session
        done, state = session.restore(self.engine)
        if state:
            self.sampler.load_state_dict(state["sampler"])
        metrics: dict[str, float] = {}
        step, stopped = done, ""
        with session.progress(settings.max_steps, "SFT", done) as bar:
            for step in range(done + 1, settings.max_steps + 1):
                metrics = self.run_training([self.train[i] for i in self.sampler.next()])
                if self.validation and settings.val_check_interval and step % settings.val_check_interval == 0:
                    metrics |= self.run_validation()
                metrics |= session.timers.read()
                session.write(step, metrics)
                bar.set_postfix_str(f"loss {metrics['train_optim/loss']:.4f}", refresh=False)
                bar.update()
                last = step == settings.max_steps
                if settings.save_interval and step % settings.save_interval == 0 and not last:
                    session.save(self.engine, step, self._state(), metrics, ended=False)
                if not last and (stopped := session.must_stop()):
                    break
        folder = session.save(self.engine, step, self._state(), metrics, ended=not stopped)
        session.say_saved(folder, step, stopped)

    def _state(self) -> dict:
        return {"sampler": self.sampler.state_dict()}

    def run_training(self, pairs: list[Pair]) -> dict[str, float]:
        with self.session.timers("optimizer_step"):
            microbatches = self._microbatches(pairs)
            self.engine.zero_grad()
            outputs = self.engine.run(microbatches, self._loss)
            metrics = self.engine.reduce_metrics(outputs) | self.engine.step()
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def run_validation(self) -> dict[str, float]:
        mine = self.validation[self.session.data_rank :: self.session.data_size]
        with self.session.timers("validation"):
            outputs = self.engine.run(self._microbatches(mine), self._loss, forward_only=True)
            return {"val/loss": self.engine.reduce_metrics(outputs)["loss"]}

    def _microbatches(self, pairs: list[Pair]) -> list[Microbatch]:
        """Streams of `micro_batch_size` samples, with the number of trained tokens of the GLOBAL batch in each."""
        model = self.config.model
        microbatches = []
        for start in range(0, len(pairs), model.micro_batch_size):
            part = pairs[start : start + model.micro_batch_size]
            if model.loss_on_prompt:  # one document without a prefix: every token but the first is predicted
                prompts, responses = [() for _ in part], [[p.prompt.tokens + p.response] for p in part]
            else:
                prompts, responses = [p.prompt.for_model() for p in part], [[p.response] for p in part]
            scheme = model.position_embedding.scheme
            batch = pack_prompts(prompts, responses, scheme, stream_multiple(model), self.session.device)
            microbatches.append(Microbatch(batch))
        (tokens,) = self.session.sum_over_data(sum(m.batch.groups.num_predicted_tokens for m in microbatches))
        for microbatch in microbatches:
            microbatch.extra["global_tokens"] = tokens
        return microbatches

    @staticmethod
    def _loss(microbatch: Microbatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -logprobs.sum() / microbatch.extra["global_tokens"]
        return loss, {"loss": loss.detach(), "entropy": entropy.detach().sum() / microbatch.extra["global_tokens"]}
