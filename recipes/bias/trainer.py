"""Locate first, then fine-tune: one block, or a part of one, is trained until the bias is gone, and no longer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.bias.scores import afgb_score, pronoun_mass
from megatron_ext.blocks.delta import base_digest, place_weights, save_delta
from megatron_ext.blocks.importance import rank_blocks
from megatron_ext.blocks.inputs import BlockInputs
from megatron_ext.blocks.pairs import split_pairs
from megatron_ext.blocks.places import every_place, joined, parse_places
from megatron_ext.blocks.training import train_only_places
from megatron_ext.errors import DivergedError, UserError
from megatron_ext.losses.lftf import BIAS_LOSSES, kept_text_loss, pair_loss
from megatron_ext.runtime.checkpoint import load_tensors
from megatron_ext.runtime.collectives import gather_objects
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optimizer_state import count_parameters, own_part, sharded_like_parameters, trained_parameters
from megatron_ext.runtime.slices import write_slices
from recipes.bias.evaluation import evaluate, perplexity
from recipes.bias.guard import DIVERGED, Guard
from recipes.bias.lftf_result import LFTFResult
from recipes.bias.prompts import PromptSet
from recipes.bias.report import write_ranking
from recipes.bias.samples import continuations
from recipes.bias.scorers import MegatronScorer
from recipes.bias.settings import LFTFConfig
from recipes.bias.state import Progress, Start
from recipes.bias.streams import LFTFMicrobatch, RowStreams
from recipes.data.sampler import EpochSampler
from recipes.data.tokenizer import Tokenizer
from recipes.run.loop import Schedule, Trainer, fit
from recipes.run.progress import peak_memory
from recipes.run.session import Session

__all__ = ["LFTFTrainer"]

BEST = "best"  # folder in a checkpoint: what trains, in the best state so far
LAST = "last"  # alike, of a run that has taken all its steps: what trains, as the last of them left it
ALL_STEPS = "max_steps reached"
PROMPT_KINDS = {"bias": BIAS_LOSSES, "hint": ("hint",)}
DEV, DEV_TEXTS = "dev", "dev_texts"  # rows of validations
GIB = 1 << 30


class LFTFTrainer(Trainer):
    """
    Args:
        session: the run.
        tokenizer: the model's.
        prompts: sets by name, from `load_prompt_sets`.
        pair: tokens of the two words.
        texts, validation_texts: for the loss `kl`, and for perplexity; may be empty.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompts: dict[str, PromptSet],
        pair: tuple[int, int],
        texts: list[list[int]],
        validation_texts: list[list[int]],
    ):
        self.session, self.model, self.tokenizer = session, session.model, tokenizer
        self.prompts, self.pair = prompts, pair
        self.earlier_peak = 0  # of memory, in the starts before this one
        self.num_parameters = count_parameters(self.model.parameters())
        self.validation_texts = validation_texts
        self.config: LFTFConfig = session.config
        self.settings = self.config.trainer.lftf
        self.weights = self.settings.weights
        self.scorer = MegatronScorer(self.model)
        batch, train = self.config.model.global_batch_size, prompts["train"]
        self.learnt = {"bias": train.bias_tokens}
        if "hint" in self.weights:
            self.learnt["hint"] = train.hinted_tokens
        if "kl" in self.weights:
            self.learnt["kl"] = texts
        self.samplers = {
            kind: EpochSampler(len(rows), batch, self.config.model.seed, session.data_rank, session.data_size)
            for kind, rows in self.learnt.items()
        }
        asked = self.learnt | {DEV: prompts["dev"].bias_tokens, DEV_TEXTS: validation_texts}
        self.streams = RowStreams(self.model, asked, ("kl", DEV_TEXTS), pair)
        self.steps = self.settings.max_steps or math.ceil(len(train.bias) * self.settings.max_epochs / batch)

    def fit(self) -> None:
        session, settings = self.session, self.settings
        words = (self.config.data.prompts.pair.first, self.config.data.prompts.pair.second)
        _, state = session.resumed
        if state:
            self._check_steps(Progress(**state["progress"]), state.get("steps", self.steps))
        session.open_log()  # rankings are written to it
        self.start = Start(**state["start"]) if state else self._start()
        places = None if self.start.places is None else parse_places(self.start.places)
        names = None if places is None else [place.name for place in places]
        if places is not None:
            session.say(
                f"block {', '.join(names)} of {self.model.model_config.num_layers} trains, all else stays as it is"
            )
            train_only_places(self.model, places)
            self._keep_inputs(min(place.block for place in places))
        with session.timers("frozen_pass"):  # of the weights that the run began with, also where it goes on
            self.frozen = {kind: self.streams.ask(kind) for kind in self.learnt}
        health = self.config.trainer.health
        self.engine = Engine(
            self.model, self.config.model.optim, self.steps, settings.gradient_clip_val, health.skipping
        )
        self.progress, self.best = Progress(), self._trained()
        schedule = Schedule(
            "LFTF", self.steps, settings.val_check_interval, settings.save_interval, validates_first=True, validates_last=True
        )  # fmt: skip
        if not fit(self, schedule):
            return
        if self.config.model.peft is not None:
            session.save_adapters(self.model, session.log_dir / "adapter")
        elif places is not None:
            save_delta(session.log_dir / "delta.safetensors", self.model, places, self.start.base)
        result = LFTFResult(
            places=names, loss=self.weights, ranking=self.start.ranking, before=self.start.before, after=self.after,
            costs=self._costs(), **dataclasses.asdict(self.progress),
        )  # fmt: skip
        if session.is_main:
            result.write(session.log_dir, words)
        changes = result.changes(words)
        session.say("\n".join(f"  {name:<40} {old:>28} -> {new}" for name, old, new, _ in changes))
        session.say(f"report in {session.log_dir / 'report.md'}")

    def _check_steps(self, progress: Progress, before: int) -> None:
        """Whether the run may go on to as many steps as it has been given.

        Args:
            before: how many it had been given.

        Raises:
            UserError: it has ended, and not for want of steps; it has taken more of them; or as many, and its checkpoint is not
                yet that of an ended run.
        """
        found = f"{self.session.log_dir} holds a run of {progress.steps} steps"
        if progress.stopped not in (None, ALL_STEPS) and self.steps > before:
            raise UserError(
                f"{found} that has ended ({progress.stopped}): with {self.steps} instead of {before} it would not go on; start "
                "a new one from its checkpoint"
            )
        if self.steps < progress.steps or progress.stopped is None and self.steps == progress.steps:
            raise UserError(
                f"{found}, and this one has {self.steps}: set trainer.lftf.max_steps (or max_epochs) higher, or choose a new "
                "folder"
            )

    def _start(self) -> Start:
        """Measure, and choose what trains."""
        with self.session.timers("evaluate"):
            before = self._evaluate()
        ranking, places, base = self._locate(), self.settings.named_places, None
        if ranking is not None:
            every = every_place(ranking.grain, self.model.model_config)
            places = joined([every[number] for number in ranking.order[: self.settings.num_places]])
        if places is not None:
            base = base_digest(place_weights(self.model, places))
        specs = None if places is None else [place.as_spec() for place in places]
        return Start(before, ranking and ranking.as_dict(), specs, base)

    def state_dict(self) -> dict:
        """Collective."""
        return {
            "start": dataclasses.asdict(self.start),
            "progress": dataclasses.asdict(self.progress),
            "samplers": {kind: sampler.state_dict() for kind, sampler in self.samplers.items()},
            "steps": self.steps,
            "seconds": dict(self.session.timers.totals),
            "peak_memory_bytes": self._peak_memory(),
        }

    def tensors(self) -> dict[str, dict]:
        found = {BEST: self.best} | ({LAST: self.last} if self.progress.stopped == ALL_STEPS else {})
        return {name: sharded_like_parameters(self.model, values, name) for name, values in found.items()}

    def load_state_dict(self, state: dict) -> None:
        self.progress = Progress(**state["progress"])
        for kind, sampler in self.samplers.items():
            sampler.load_state_dict(state["samplers"][kind])
        for name, seconds in state.get("seconds", {}).items():
            self.session.timers.totals[name] += seconds
        self.earlier_peak = state.get("peak_memory_bytes", 0)
        self.best = self._saved(BEST)
        if self.progress.stopped == ALL_STEPS and self.steps > self.progress.steps:  # the model is in its best state
            self._put(self._saved(LAST))
            self.progress.stopped = None
        elif self.progress.stopped is not None:
            self.session.say(
                f"the run has ended: {self.progress.stopped}; to train on, start a new one from its checkpoint"
            )

    def _saved(self, folder: str) -> dict[str, Tensor]:
        """What trains, as a checkpoint's folder has it."""
        room = {name: torch.empty_like(value) for name, value in self._trained().items()}
        found = load_tensors(self.session.resume_from, folder, sharded_like_parameters(self.model, room, folder))
        parameters = trained_parameters(self.model)
        return {name: own_part(parameters[name], value) for name, value in found.items()}

    def _put(self, values: dict[str, Tensor]) -> None:
        """Into the model."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        write_slices(self.model)

    def _trained(self) -> dict[str, Tensor]:
        """Copies of the parameters that train."""
        return {name: p.detach().clone() for name, p in trained_parameters(self.model).items()}

    def _evaluate(self) -> dict:
        """On the test professions, with what the model goes on to say behind some prompts about them."""
        test, settings = self.prompts["test"], self.settings
        found = evaluate(self.scorer, test, [[token] for token in self.pair], self.validation_texts)
        said = continuations(self.model, self.tokenizer, test, settings.num_samples, settings.sample_tokens)
        return found | {"samples": said}

    def _costs(self) -> dict:
        """Of the whole run: this rank's seconds by phase, numbers that train, and of the rank that has most what is kept of the
        blocks below and its memory. Collective."""
        kept = 0 if self.streams.inputs is None else self.streams.inputs.kept
        return {
            "seconds": dict(self.session.timers.totals), "parameters": self.num_parameters,
            "trained_parameters": count_parameters(trained_parameters(self.model).values()),
            "kept_inputs_bytes": max(gather_objects(kept)), "peak_memory_bytes": self._peak_memory(),
        }  # fmt: skip

    def _peak_memory(self) -> int:
        """Of the rank that has had most, over all starts of the run. Collective."""
        return max(self.earlier_peak, *gather_objects(peak_memory()))

    def _locate(self) -> BlockRanking | None:
        name = self.settings.estimator
        if name is None:
            return None
        probe = self.prompts["train"].probe(self.pair, self.settings.locate_prompts, self.config.model.seed)
        with self.session.timers("locate"):
            ranking = rank_blocks(name, self.model, probe, self.settings.exclude_blocks, self.settings.places)
        if self.session.is_main:
            write_ranking(self.session.log_dir, ranking)
        return ranking

    def _keep_inputs(self, block: int) -> None:
        """What enters the lowest block in which something trains never changes."""
        settings, say = self.settings, self.session.say
        if not settings.kept_inputs_gib:
            say("every pass runs the blocks below, too (trainer.lftf.kept_inputs_gib=0)")
        elif self.config.model.context_parallel_size > 1:
            say("every pass runs the blocks below, too: context-parallel ranks have a part of each row, and keep none")
        else:
            folder = settings.kept_inputs_dir and Path(settings.kept_inputs_dir)
            inputs = BlockInputs(self.model, block, int(settings.kept_inputs_gib * GIB), folder)
            left = [kind for kind in self.streams.keep(inputs) if self.streams.rows[kind]]
            say(f"what enters block {block} is kept: {inputs.kept / 2**20:.1f} MiB")
            if left:
                say(f"{', '.join(left)} found no room in trainer.lftf.kept_inputs_gib={settings.kept_inputs_gib:g}")

    def run_step(self, step: int) -> dict[str, float]:
        self.progress.steps = step
        try:
            return self.run_training()
        except DivergedError as error:  # raised by all ranks
            self.progress.stopped = f"training diverged ({error})"
            return {}

    def run_training(self) -> dict[str, float]:
        with self.session.timers("optimizer_step"):
            self.drawn = {kind: self.samplers[kind].next() for kind in self.learnt}
            microbatches = [m for kind, numbers in self.drawn.items() for m in self._microbatches(kind, numbers)]
            metrics = self.engine.update(microbatches, self._loss)
        self.engine.gather_weights()  # the best are copied, and put back
        write_slices(self.model)
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def rows(self) -> list[str]:
        """The prompts themselves: no file has them."""
        train = self.prompts["train"]
        kinds = {"bias": train.bias, "hint": train.hinted}
        return [f'"{kinds[kind][n].prompt}"' for kind in kinds if kind in self.drawn for n in self.drawn[kind]]

    def run_validation(self, step: int) -> dict[str, float]:
        """On the dev professions; the state is kept if it is the best so far."""
        with self.session.timers("validation"):
            p = torch.stack(self.streams.ask(DEV))
            if bool(p.isfinite().all()):
                metrics = {"val/afgb": afgb_score(*p.unbind(1)), "val/pronoun_mass": pronoun_mass(*p.unbind(1))}
            else:  # for the guard to see
                metrics = {"val/afgb": math.nan, "val/pronoun_mass": math.nan}
            if self.validation_texts:
                metrics["val/perplexity"] = perplexity(self.streams.ask(DEV_TEXTS))
        metrics = self.session.agreed(metrics)
        self._judge(step, metrics)
        return metrics

    def _judge(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the state if a validation finds it the best so far; stop when none has been better for long."""
        done, patience = self.progress, self.settings.patience
        if step == 0:
            done.validations.append({"step": 0, **metrics, "complaint": None})
            done.best_afgb = metrics["val/afgb"]
            return
        start = done.validations[0]
        guard = Guard(self.settings, start["val/pronoun_mass"], start.get("val/perplexity"))
        complaint = guard.complaint(metrics)
        done.validations.append({"step": step, **metrics, "complaint": complaint})
        done.idle += 1
        if complaint is None and metrics["val/afgb"] < done.best_afgb:
            done.best_afgb, done.best_step, done.idle = metrics["val/afgb"], step, 0
            self.best = self._trained()
        if complaint == DIVERGED:
            done.stopped = complaint
        elif patience is not None and done.idle >= patience:
            done.stopped = f"no better state in {done.idle} validations" + (f" ({complaint})" if complaint else "")

    def has_ended(self) -> bool:
        return self.progress.stopped is not None

    def conclude(self) -> None:
        """Put the best state into the model, and measure it."""
        done = self.progress
        if done.stopped is None:
            done.stopped = ALL_STEPS
        self.last = self._trained()
        self._put(self.best)
        with self.session.timers("evaluate"):
            self.after = self._evaluate()  # before the last checkpoint: a run that is killed here has not ended
        self.session.say(
            f"{done.stopped} after step {done.steps}; the state of step {done.best_step} is kept, dev AFGB {done.best_afgb:.4f}"
        )

    def summary(self, metrics: dict[str, float]) -> str:
        return f"dev AFGB {self.progress.validations[-1]['val/afgb']:.4f}"

    def _microbatches(self, kind: str, numbers: list[int]) -> list[LFTFMicrobatch]:
        """Streams of `micro_batch_size` rows of one kind, each row with its share of the global batch."""
        config, device, frozen = self.config.model, self.session.device, self.frozen[kind]
        found = []
        for start in range(0, len(numbers), config.micro_batch_size):
            part = numbers[start : start + config.micro_batch_size]
            said = [frozen[i] for i in part]
            before = torch.cat(said) if kind == "kl" else torch.stack(said)
            found.append((self.streams.batch(kind, part), before.to(device)))
        total = config.global_batch_size
        if kind == "kl":
            (total,) = self.session.sum_over_data(sum(batch.groups.num_predicted_tokens for batch, _ in found))
        return [LFTFMicrobatch(batch, kind=kind, frozen=before, total=total) for batch, before in found]

    def _loss(self, microbatch: LFTFMicrobatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        kind, frozen, total = microbatch.kind, microbatch.frozen, microbatch.total
        if kind == "kl":
            losses = {"kl": kept_text_loss(logprobs, frozen).sum() / total}
        else:
            he, she = split_pairs(logprobs)
            names = [name for name in PROMPT_KINDS[kind] if name in self.weights]
            losses = {name: pair_loss(name, he, she, frozen).sum() / total for name in names}
        loss = sum(self.weights[name] * value for name, value in losses.items())
        # Every microbatch reports every loss, whatever its kind: reports are added up.
        parts = {name: losses[name].detach() if name in losses else torch.zeros_like(loss) for name in self.weights}
        return loss, {"loss": loss.detach()} | (parts if len(parts) > 1 else {})
