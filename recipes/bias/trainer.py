"""Locate first, then fine-tune: one block is trained until the bias is gone, and no longer."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.bias.scores import afgb_score, pronoun_mass
from megatron_ext.blocks.blocks import train_only_block
from megatron_ext.blocks.delta import block_digest, block_weights, save_delta
from megatron_ext.blocks.importance import rank_blocks
from megatron_ext.blocks.pairs import pack_pairs, split_pairs
from megatron_ext.errors import DivergedError
from megatron_ext.files import write_whole
from megatron_ext.losses.lftf import BIAS_LOSSES, kept_text_loss, pair_loss
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.checkpoint import load_tensors
from megatron_ext.runtime.collectives import gather_objects
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optimizer_state import sharded_like_parameters, trained_parameters
from recipes.bias.evaluation import evaluate, perplexity
from recipes.bias.prompts import PromptSet
from recipes.bias.report import summary_rows, write_lftf_report, write_ranking
from recipes.bias.scorers import MegatronScorer
from recipes.bias.settings import LFTFConfig, LFTFSettings
from recipes.data.sampler import EpochSampler
from recipes.run.loop import Schedule, Trainer, fit
from recipes.run.session import Session

__all__ = ["Guard", "LFTFTrainer"]

BEST = "best"  # folder in a checkpoint: what trains, in the best state so far
DIVERGED = "the model has diverged"
PROMPT_KINDS = {"bias": BIAS_LOSSES, "hint": ("hint",)}


@dataclass(frozen=True)
class Guard:
    """What a state must keep of the start's to count."""

    settings: LFTFSettings
    pronoun_mass: float
    perplexity: float | None

    def complaint(self, metrics: dict[str, float]) -> str | None:
        """What a validation has lost, or None."""
        if not all(math.isfinite(value) for name, value in metrics.items() if name.startswith("val/")):
            return DIVERGED
        mass, least = metrics["val/pronoun_mass"], self.settings.min_pronoun_mass
        if not mass >= least * self.pronoun_mass:  # a start of 0 leaves nothing to lose
            return f"pronoun mass is {mass / self.pronoun_mass:.2f} of its start, less than {least}"
        if self.perplexity is not None and self.settings.max_perplexity is not None:
            rise = metrics["val/perplexity"] / self.perplexity
            if not rise <= self.settings.max_perplexity:
                return f"perplexity is {rise:.3f} times its start, more than {self.settings.max_perplexity}"
        return None


@dataclass(frozen=True)
class Start:
    """What was found before the first step.

    Attributes:
        before: the evaluation on the test professions.
        ranking: of the blocks, where an estimator chose.
        block: which trains; None: all.
        base: digest of its weights.
    """

    before: dict
    ranking: dict | None
    block: int | None
    base: str | None


@dataclass
class Progress:
    """How far training has come, in numbers that JSON keeps to the last bit.

    Attributes:
        steps: taken.
        best_step, best_afgb: of the best state that the guard let pass.
        idle: validations since then.
        stopped: why training has ended; None: it has not.
        validations: each with its step and the guard's complaint.
    """

    steps: int = 0
    best_step: int = 0
    best_afgb: float = math.inf
    idle: int = 0
    stopped: str | None = None
    validations: list[dict] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LFTFMicrobatch(Microbatch):
    """
    Attributes:
        kind: of its rows: bias, hint or kl.
        frozen: what the model said of them before training: of pairs [rows, 2], of texts [r].
        total: rows, or predicted tokens of texts, of the GLOBAL batch.
    """

    kind: str
    frozen: Tensor
    total: float


class LFTFTrainer(Trainer):
    """
    Args:
        session: the run.
        prompts: sets by name, from `load_prompt_sets`.
        pair: tokens of the two words.
        texts, validation_texts: for the loss `kl`, and for perplexity; may be empty.
    """

    def __init__(
        self,
        session: Session,
        prompts: dict[str, PromptSet],
        pair: tuple[int, int],
        texts: list[list[int]],
        validation_texts: list[list[int]],
    ):
        self.session, self.model, self.prompts, self.pair = session, session.model, prompts, pair
        self.texts, self.validation_texts = texts, validation_texts
        self.config: LFTFConfig = session.config
        self.settings = self.config.trainer.lftf
        self.weights = self.settings.weights
        self.scorer = MegatronScorer(self.model)
        batch, train = self.config.model.global_batch_size, prompts["train"]
        self.rows = {"bias": train.bias_tokens}
        if "hint" in self.weights:
            self.rows["hint"] = train.hinted_tokens
        if "kl" in self.weights:
            self.rows["kl"] = texts
        self.samplers = {
            kind: EpochSampler(len(rows), batch, self.config.model.seed, session.data_rank, session.data_size)
            for kind, rows in self.rows.items()
        }
        self.steps = self.settings.max_steps or math.ceil(len(train.bias) * self.settings.max_epochs / batch)

    def fit(self) -> None:
        session, settings = self.session, self.settings
        words = (self.config.data.prompts.pair.first, self.config.data.prompts.pair.second)
        session.open_log()  # rankings are written to it
        _, state = session.resumed
        self.start = Start(**state["start"]) if state else self._start()
        block = self.start.block
        if block is not None:
            session.say(f"block {block} of {self.model.model_config.num_layers} trains, all else stays as it is")
            train_only_block(self.model, block)
        with session.timers("frozen_pass"):
            self.frozen = self._frozen()  # of the weights that the run began with, also where it goes on
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
        if block is not None:
            save_delta(session.log_dir / "delta.safetensors", self.model, block, self.start.base)
        before, history = self.start.before, dataclasses.asdict(self.progress)
        result = {
            "block": block, "loss": self.weights, **history, "ranking": self.start.ranking, "before": before,
            "after": self.after,
        }  # fmt: skip
        if session.is_main:
            write_whole(session.log_dir / "result.json", json.dumps(result, indent=1) + "\n")
            write_lftf_report(session.log_dir, result, words)
        rows = zip(summary_rows(before, words), summary_rows(self.after, words), strict=True)
        session.say("\n".join(f"  {name:<40} {old:>28} -> {new}" for (name, old), (_, new) in rows))
        session.say(f"report in {session.log_dir / 'report.md'}")

    def _start(self) -> Start:
        """Measure, and choose the block."""
        with self.session.timers("evaluate"):
            before = self._evaluate()
        ranking, asked = self._locate(), self.settings.block
        block = ranking.best if ranking else None if asked == "all" else int(asked)
        weights = None if block is None else block_weights(self.model, block)
        digests = gather_objects(None if weights is None else block_digest(weights))  # known where the block is
        base = next(filter(None, digests), None)
        return Start(before, ranking and ranking.as_dict(), block, base)

    def state_dict(self) -> dict:
        return {
            "start": dataclasses.asdict(self.start),
            "progress": dataclasses.asdict(self.progress),
            "samplers": {kind: sampler.state_dict() for kind, sampler in self.samplers.items()},
        }

    def tensors(self) -> dict[str, dict]:
        return {BEST: sharded_like_parameters(self.model, self.best, BEST)}

    def load_state_dict(self, state: dict) -> None:
        self.progress = Progress(**state["progress"])
        for kind, sampler in self.samplers.items():
            sampler.load_state_dict(state["samplers"][kind])
        room = {name: torch.empty_like(value) for name, value in self._trained().items()}
        place = sharded_like_parameters(self.model, room, BEST)
        self.best = load_tensors(self.session.resume_from, BEST, place)
        if self.progress.stopped is not None:
            self.session.say(
                f"the run has ended: {self.progress.stopped}; to train on, start a new one from its checkpoint"
            )

    def _trained(self) -> dict[str, Tensor]:
        """Copies of the parameters that train."""
        return {name: p.detach().clone() for name, p in trained_parameters(self.model).items()}

    def _evaluate(self) -> dict:
        """On the test professions."""
        return evaluate(self.scorer, self.prompts["test"], self.pair, self.validation_texts)

    def _locate(self) -> BlockRanking | None:
        name = self.settings.block
        if not isinstance(name, str) or name == "all":
            return None
        probe = self.prompts["train"].probe(self.pair, self.settings.locate_prompts, self.config.model.seed)
        with self.session.timers("locate"):
            ranking = rank_blocks(name, self.model, probe, self.settings.exclude_blocks)
        if self.session.is_main:
            write_ranking(self.session.log_dir, ranking)
        return ranking

    def _frozen(self) -> dict[str, Tensor | list[Tensor]]:
        """What the model says before training, by kind of row."""
        found: dict[str, Tensor | list[Tensor]] = {}
        for kind, rows in self.rows.items():
            if kind == "kl":
                found[kind] = self.scorer.token_logprobs([((), row) for row in rows])
            else:
                found[kind] = self.scorer.pair_probabilities(rows, self.pair)
        return found

    def run_step(self, step: int) -> dict[str, float]:
        self.progress.steps = step
        try:
            return self.run_training()
        except DivergedError as error:  # raised by all ranks
            self.progress.stopped = f"training diverged ({error})"
            return {}

    def run_training(self) -> dict[str, float]:
        with self.session.timers("optimizer_step"):
            microbatches = [m for kind in self.rows for m in self._microbatches(kind, self.samplers[kind].next())]
            metrics = self.engine.update(microbatches, self._loss)
        self.engine.gather_weights()  # the best are copied, and put back
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def run_validation(self, step: int) -> dict[str, float]:
        """On the dev professions; the state is kept if it is the best so far."""
        with self.session.timers("validation"):
            p = self.scorer.pair_probabilities(self.prompts["dev"].bias_tokens, self.pair)
            if bool(p.isfinite().all()):
                metrics = {"val/afgb": afgb_score(*p.unbind(1)), "val/pronoun_mass": pronoun_mass(*p.unbind(1))}
            else:  # for the guard to see
                metrics = {"val/afgb": math.nan, "val/pronoun_mass": math.nan}
            if self.validation_texts:
                metrics["val/perplexity"] = perplexity(self.scorer, self.validation_texts)
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
            done.stopped = "max_steps reached"
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, value in self.best.items():
                parameters[name].copy_(value)
        with self.session.timers("evaluate"):
            self.after = self._evaluate()  # before the last checkpoint: a run that is killed here has not ended
        self.session.say(
            f"{done.stopped} after step {done.steps}; the state of step {done.best_step} is kept, dev AFGB {done.best_afgb:.4f}"
        )

    def summary(self, metrics: dict[str, float]) -> str:
        return f"dev AFGB {self.progress.validations[-1]['val/afgb']:.4f}"

    def _microbatches(self, kind: str, numbers: list[int]) -> list[LFTFMicrobatch]:
        """Streams of `micro_batch_size` rows of one kind, each row with its share of the global batch."""
        config, device = self.config.model, self.session.device
        rows, frozen = self.rows[kind], self.frozen[kind]
        found = []
        for start in range(0, len(numbers), config.micro_batch_size):
            part = numbers[start : start + config.micro_batch_size]
            if kind == "kl":
                scheme, multiple = config.position_embedding.scheme, stream_multiple(config)
                batch = pack_prompts([() for _ in part], [[rows[i]] for i in part], scheme, multiple, device)
                found.append((batch, torch.cat([frozen[i] for i in part]).to(device)))
            else:
                found.append((pack_pairs([rows[i] for i in part], self.pair, config, device), frozen[part].to(device)))
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
