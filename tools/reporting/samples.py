"""Responses to be read, with their rewards, and token by token how far sampler and trainer are apart."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from recipes.data.tokenizer import Tokenizer, load_tokenizer
from recipes.grpo.dump_files import StepDump
from tools.reporting.dumps import apart_of
from tools.reporting.runs import Run

__all__ = ["BOUNDS", "Answer", "SampledStep", "Shown", "Token", "sampled_steps", "tokenizer_of"]

TOKENS = 240  # of a response that are shown: half of them from its beginning
CHARACTERS = 4000  # of a text
# |trainer - sampler| in nats from which a token is marked as level 1, 2, ...
BOUNDS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CUT = "\ufffd"  # what stands for a part of a character
WINDOW = 8  # tokens before one that its text may depend on


@dataclass(frozen=True)
class Token:
    """
    Attributes:
        text: None: it is not known, and the id is shown.
        level: 0 to len(BOUNDS), by how far the two are apart; None: one of them is not known.
        observed: whether an environment wrote it.
    """

    place: int
    id: int
    text: str | None
    sampler: float | None
    trainer: float | None
    level: int | None
    observed: bool

    @property
    def apart(self) -> float | None:
        return None if self.level is None else self.trainer - self.sampler


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        text: None where tokens have theirs.
        why: "best", "worst" or "furthest apart" of its group; "first" and "last" where all rewards are alike.
        tokens: its first and last ones, where it has many; `left_out` between them are not shown, `begins` of them come before.
    """

    sample: int
    why: str
    reward: float
    advantage: float
    finish_reason: str
    length: int
    mean_apart: float | None
    max_apart: float | None
    text: str | None
    tokens: list[Token]
    begins: int
    left_out: int


@dataclass(frozen=True)
class Shown:
    """A prompt of a step.

    Attributes:
        prompt: its end, where it is long.
        row: what the data says beside it.
        rewards: of all its responses.
    """

    number: int
    line: int
    prompt: str
    row: dict[str, Any]
    rewards: list[float]
    answers: list[Answer]


@dataclass(frozen=True)
class SampledStep:
    step: int
    prompts: list[Shown]


def tokenizer_of(run: Run, vocabulary: str) -> Tokenizer | None:
    """The one that the run had, of those on this machine; None: it is not here.

    Args:
        vocabulary: its digest.
    """
    kept = sorted(run.folder.glob("checkpoints/*/tokenizer"))
    start = run.config.get("pretrained_checkpoint.restore_from_path")
    named = [run.config.get("model.tokenizer"), start and Path(start, "tokenizer"), start]
    for place in (*kept[-1:], *filter(None, named)):
        if not Path(place).is_dir():
            continue
        try:
            tokenizer = load_tokenizer(place)
        except UserError:
            continue  # a checkpoint's folder without one, or another's
        if tokenizer.digests()["vocabulary"] == vocabulary:
            return tokenizer
    return None


def sampled_steps(dumps: Sequence[StepDump], tokenizer: Tokenizer | None) -> list[SampledStep]:
    return [SampledStep(dump.header["step"], [_shown(group, tokenizer) for _, group in dump.groups]) for dump in dumps]


def _shown(group: dict[str, Any], tokenizer: Tokenizer | None) -> Shown:
    answers, prompt = group["responses"], group["prompt_text"]
    rewards = [answer["reward"] for answer in answers]
    order = sorted(range(len(answers)), key=lambda i: -rewards[i])
    furthest = max(range(len(answers)), key=lambda i: (answers[i]["mismatch"] or {"max": -1.0})["max"])
    why = {order[0]: "best" if len(set(rewards)) > 1 else "first"}
    why.setdefault(order[-1], "worst" if len(set(rewards)) > 1 else "last")
    why.setdefault(furthest, "furthest apart")
    return Shown(
        group["number"],
        group["line"],
        prompt if len(prompt) <= CHARACTERS else "… " + prompt[-CHARACTERS:],
        group["row"],
        rewards,
        [_answer(i, reason, group["prompt_tokens"], answers[i], tokenizer) for i, reason in why.items()],
    )


def _answer(
    sample: int, why: str, prompt: Sequence[int], answer: dict[str, Any], tokenizer: Tokenizer | None
) -> Answer:
    ids = [(token, "observed" in passage) for passage in answer["passages"] for token in passage["tokens"]]
    left_out = max(0, len(ids) - TOKENS)
    begins = TOKENS // 2 if left_out else len(ids)
    whole = [*prompt, *(token for token, _ in ids)]
    sampler = [x for p in answer["passages"] for x in p.get("logprobs", [None] * len(p["tokens"]))]
    apart, tokens = apart_of(answer), []
    for i in (*range(begins), *range(begins + left_out, len(ids))):
        end = len(prompt) + i
        text = None if tokenizer is None else _added(tokenizer, whole[max(0, end - WINDOW) : end], ids[i][0])
        level = None if apart[i] is None else _level(apart[i])
        tokens.append(Token(i + 1, ids[i][0], text, sampler[i], answer["old_logprobs"][i], level, ids[i][1]))
    mismatch, text = answer["mismatch"] or {"mean": None, "max": None}, answer["text"]
    return Answer(
        sample, why, answer["reward"], answer["advantage"], answer["finish_reason"], len(ids), mismatch["mean"],
        mismatch["max"], None if tokenizer else text if len(text) <= CHARACTERS else text[:CHARACTERS] + " …", tokens,
        begins, left_out,
    )  # fmt: skip


def _level(apart: float) -> int:
    return len(BOUNDS) if math.isnan(apart) else sum(abs(apart) >= bound for bound in BOUNDS)


def _added(tokenizer: Tokenizer, before: list[int], token: int) -> str:
    """The text that a token adds to those before: alone it would be another one (see Tokenizer.decode_response)."""
    short, long = (tokenizer.decode_whole(ids) for ids in (before, [*before, token]))
    return long[len(os.path.commonprefix([short, long])) :] or CUT
