"""Locate first, then fine-tune: one block is trained until the bias is gone, and no longer."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
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
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.checkpoint import load_tensors
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optimizer_state import sharded_like_parameters
from recipes.bias.evaluation import evaluate, perplexity
from recipes.bias.prompts import PromptSet
from recipes.bias.report import summary_rows, write_ranking
from recipes.bias.scorers import MegatronScorer
from recipes.bias.settings import LFTFConfig, LFTFSettings
from recipes.data.sampler import EpochSampler
from recipes.run.session import Session
from recipes.run.settings import check_batch_sizes

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


class LFTFTrainer:
    """
    Args:
        session: the run.
        model: this rank's pipeline stage, with the weights to start from.
        prompts: sets by name, from `load_prompt_sets`.
        pair: tokens of the two words.
        texts, validation_texts: for the loss `kl`, and for perplexity; may be empty.
    """

    def __init__(
        self,
        session: Session,
        model: PrefixGroupedGPT,
        prompts: dict[str, PromptSet],
        pair: tuple[int, int],
        texts: list[list[int]],
        validation_texts: list[list[int]],
    ):
        self.session, self.model, self.prompts, self.pair = session, model, prompts, pair
        self.texts, self.validation_texts = texts, validation_texts
        self.config: LFTFConfig = session.config
        self.settings = self.config.trainer.lftf
        self.weights = self.settings.weights
        self.scorer = MegatronScorer(model)
        batch = self.config.model.global_batch_size
        check_batch_sizes("model.global_batch_size", batch, session.data_size)
        train = prompts["train"]
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
        _, state = session.resumed
        self.start = Start(**state["start"]) if state else self._start()
        block = self.start.block
        if block is not None:
            session.say(f"block {block} of {self.model.model_config.num_layers} trains, all else stays as it is")
            train_only_block(self.model, block)
        with session.timers("frozen_pass"):
            self.frozen = self._frozen()  # of the weights that the run began with, also where it goes on
        self.engine = Engine(self.model, self.config.model.optim, self.steps, settings.gradient_clip_val)
        self._resume(state)
        interrupted = ""
        if self.progress.stopped is None:
            interrupted = self._train()
        else:
            session.say(f"the run has ended: {self.progress.stopped}; to train on, start a new one from its checkpoint")
        if interrupted:
            session.say_saved(self._save(ended=False), self.progress.steps, interrupted)
            return
        with session.timers("evaluate"):
            after = self._evaluate()
        folder = self._save(ended=True)
        if block is not None:
            save_delta(session.log_dir / "delta.safetensors", self.model, block, self.start.base)
        before, history = self.start.before, dataclasses.asdict(self.progress)
        result = {
            "block": block, "loss": self.weights, **history, "ranking": self.start.ranking, "before": before,
            "after": after,
        }  # fmt: skip
        if session.is_main:
            write_whole(session.log_dir / "result.json", json.dumps(result, indent=1) + "\n")
            _write_report(session.log_dir, result, words)
        rows = zip(summary_rows(before, words), summary_rows(after, words), strict=True)
        session.say("\n".join(f"  {name:<40} {old:>28} -> {new}" for (name, old), (_, new) in rows))
        session.say(f"weights saved in {folder}; report in {session.log_dir / 'report.md'}")

    def _start(self) -> Start:
        """Measure, and choose the block."""
        with self.session.timers("evaluate"):
            before = self._evaluate()
        ranking, asked = self._locate(), self.settings.block
        block = ranking.best if ranking else None if asked == "all" else int(asked)
        weights = None if block is None else block_weights(self.model, block)
        digests: list = [None] * dist.get_world_size()  # known where the block is
        dist.all_gather_object(digests, None if weights is None else block_digest(weights))
        base = next(filter(None, digests), None)
        return Start(before, ranking and ranking.as_dict(), block, base)

    def _resume(self, state: dict) -> None:
        """Begin, or go on from a checkpoint's state."""
        self.session.restore(self.engine)
        if not state:
            self.progress, self.best = Progress(), self._trained()
            return
        self.progress = Progress(**state["progress"])
        for kind, sampler in self.samplers.items():
            sampler.load_state_dict(state["samplers"][kind])
        room = {name: torch.empty_like(value) for name, value in self._trained().items()}
        place = sharded_like_parameters(self.model, room, BEST)
        self.best = load_tensors(self.session.resume_from, BEST, place)

    def _save(self, ended: bool) -> Path:
        state = {
            "start": dataclasses.asdict(self.start),
            "progress": dataclasses.asdict(self.progress),
            "samplers": {kind: sampler.state_dict() for kind, sampler in self.samplers.items()},
        }
        last = self.progress.validations[-1]
        metrics = {k: v for k, v in last.items() if k.startswith("val/")} if last["step"] == self.progress.steps else {}
        best = {BEST: sharded_like_parameters(self.model, self.best, BEST)}
        return self.session.save(self.engine, self.progress.steps, state, metrics, ended, best)

    def _trained(self) -> dict[str, Tensor]:
        """Copies of the parameters that train."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

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

    def _train(self) -> str:
        """Steps until the end or until nothing gets better; then the best state is in the model. Or until the run must stop:
        returns why."""
        session, settings, done = self.session, self.settings, self.progress
        if not done.validations:
            start = self.run_validation()
            session.write(0, start)
            done.validations.append({"step": 0, **start, "complaint": None})
            done.best_afgb = start["val/afgb"]
        start = done.validations[0]
        guard = Guard(settings, start["val/pronoun_mass"], start.get("val/perplexity"))
        with session.progress(self.steps, "LFTF", done.steps) as bar:
            while done.stopped is None:
                done.steps += 1
                try:
                    metrics = self.run_training()
                except DivergedError as error:  # raised by all ranks
                    done.stopped = f"training diverged ({error})"
                    break
                if done.steps % settings.val_check_interval == 0 or done.steps == self.steps:
                    with session.timers("validation"):
                        metrics |= self.run_validation()
                    self._judge(metrics, guard)
                    bar.set_postfix_str(f"dev AFGB {metrics['val/afgb']:.4f}", refresh=False)
                session.write(done.steps, metrics | session.timers.read())
                bar.update()
                if done.stopped is None and done.steps >= self.steps:
                    done.stopped = "max_steps reached"
                if done.stopped is None:
                    if interrupted := session.must_stop():
                        return interrupted
                    if settings.save_interval and done.steps % settings.save_interval == 0:
                        self._save(ended=False)
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, value in self.best.items():
                parameters[name].copy_(value)
        session.say(f"{done.stopped} after step {done.steps}; the state of step {done.best_step} is kept, dev AFGB "
                    f"{done.best_afgb:.4f}")  # fmt: skip
        return ""

    def _judge(self, metrics: dict[str, float], guard: Guard) -> None:
        """Keep the state if a validation finds it the best so far; stop when none has been better for long."""
        done, patience = self.progress, self.settings.patience
        complaint = guard.complaint(metrics)
        validation = {k: v for k, v in metrics.items() if k.startswith("val/")}
        done.validations.append({"step": done.steps, **validation, "complaint": complaint})
        done.idle += 1
        if complaint is None and metrics["val/afgb"] < done.best_afgb:
            done.best_afgb, done.best_step, done.idle = metrics["val/afgb"], done.steps, 0
            self.best = self._trained()
        if complaint == DIVERGED:
            done.stopped = complaint
        elif patience is not None and done.idle >= patience:
            done.stopped = f"no better state in {done.idle} validations" + (f" ({complaint})" if complaint else "")

    def run_training(self) -> dict[str, float]:
        engine = self.engine
        with self.session.timers("optimizer_step"):
            microbatches = [m for kind in self.rows for m in self._microbatches(kind, self.samplers[kind].next())]
            engine.zero_grad()
            outputs = engine.run(microbatches, self._loss)
            metrics = engine.reduce_metrics(outputs) | engine.step()
        return {f"train_optim/{name}": value for name, value in metrics.items()}

    def run_validation(self) -> dict[str, float]:
        p = self.scorer.pair_probabilities(self.prompts["dev"].bias_tokens, self.pair)
        if bool(p.isfinite().all()):
            metrics = {"val/afgb": afgb_score(*p.unbind(1)), "val/pronoun_mass": pronoun_mass(*p.unbind(1))}
        else:  # for the guard to see
            metrics = {"val/afgb": math.nan, "val/pronoun_mass": math.nan}
        if self.validation_texts:
            metrics["val/perplexity"] = perplexity(self.scorer, self.validation_texts)
        return self.session.agreed(metrics)

    def _microbatches(self, kind: str, numbers: list[int]) -> list[Microbatch]:
        """Streams of `micro_batch_size` rows of one kind, each row with its share of the global batch."""
        config, device = self.config.model, self.session.device
        rows, frozen = self.rows[kind], self.frozen[kind]
        microbatches = []
        for start in range(0, len(numbers), config.micro_batch_size):
            part = numbers[start : start + config.micro_batch_size]
            if kind == "kl":
                scheme, multiple = config.position_embedding.scheme, stream_multiple(config)
                batch = pack_prompts([() for _ in part], [[rows[i]] for i in part], scheme, multiple, device)
                reference = torch.cat([frozen[i] for i in part]).to(device)
            else:
                batch = pack_pairs([rows[i] for i in part], self.pair, config, device)
                reference = frozen[part].to(device)
            microbatches.append(Microbatch(batch, extra={"kind": kind, "frozen": reference}))
        if kind == "kl":
            (total,) = self.session.sum_over_data(sum(m.batch.groups.num_predicted_tokens for m in microbatches))
        else:
            total = config.global_batch_size
        for microbatch in microbatches:
            microbatch.extra["total"] = total
        return microbatches

    def _loss(self, microbatch: Microbatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        kind, frozen, total = (microbatch.extra[key] for key in ("kind", "frozen", "total"))
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


def _write_report(folder: Path, result: dict, words: tuple[str, str]) -> None:
    block = result["block"]
    what = "every block trained" if block is None else f"block {block} trained"
    lines = ["# LFTF", "", f"{what.capitalize()}, loss {result['loss']}, {result['steps']} steps: {result['stopped']}.", "",
             "| measure, on professions held out | before | after |", "|---|---:|---:|"]  # fmt: skip
    rows = zip(summary_rows(result["before"], words), summary_rows(result["after"], words), strict=True)
    lines += [f"| {name} | {old} | {new} |" for (name, old), (_, new) in rows]
    if result["ranking"]:
        ranking = BlockRanking(**{k: v for k, v in result["ranking"].items() if k != "best"})
        lines += [
            "",
            f"## Blocks by {ranking.estimator}",
            "",
            ranking.markdown(),
            "",
            f"![ranking](ranking-{ranking.estimator}.png)",
        ]
    lines += [
        "",
        "## Validations",
        "",
        "| step | AFGB | pronoun mass | perplexity | guard |",
        "|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {v['step']} | {v['val/afgb']:.4f} | {v['val/pronoun_mass']:.4f} | {v.get('val/perplexity', float('nan')):.3f} "
        f"| {v['complaint'] or 'kept'} |"
        for v in result["validations"]
    ]
    write_whole(folder / "report.md", "\n".join(lines) + "\n")
