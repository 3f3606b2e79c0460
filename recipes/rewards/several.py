"""All rewards of a run: which of them score a row, how they are weighed, and what becomes of a response without a score."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.cli.config import ConfigError
from recipes.data.rows import Prompt
from recipes.environments.registry import Named
from recipes.rewards.processes import Answer, Lost, PromptCall, RewardProcesses
from recipes.rewards.registry import KEY, REGISTRY, NamedReward, RewardError, get_reward, score
from recipes.rewards.settings import RewardLimits, RewardSection

__all__ = ["Rewards", "Scores", "WeightedReward", "rewards_for"]

logger = logging.getLogger(__name__)

SEVERAL = "trainer.grpo.rewards"
SAID = 8  # prompts with responses without a score are named one by one up to so many; all are counted
NAN = math.nan
DEFAULTS = RewardLimits()


@dataclass(frozen=True)
class WeightedReward:
    """One of them.

    Attributes:
        name: for the log.
        data_sources: of the rows that it scores; None: all.
    """

    name: str
    reward: NamedReward
    weight: float = 1.0
    data_sources: Collection[str] | None = None

    def takes(self, row: Mapping[str, Any]) -> bool:
        return self.data_sources is None or row.get("data_source") in self.data_sources


@dataclass(frozen=True)
class Scores:
    """
    Attributes:
        totals: [prompts][samples]: weighted sums; NaN where a reward with a weight did not score in time, with "drop".
        parts: [prompts][samples][rewards], before weights; NaN: the row is not for this reward, or as in `totals`.
        lost: [prompts][samples]: how many rewards did not score it in time.
    """

    totals: list[list[float]]
    parts: list[list[list[float]]]
    lost: list[list[int]]

    def table(self) -> list[list[list[float]]]:
        """[prompts][samples]: the total, how many were lost, and the parts."""
        rows = zip(self.totals, self.lost, self.parts, strict=True)
        return [[[t, n, *p] for t, n, p in zip(*row, strict=True)] for row in rows]


class Rewards:
    """
    Args:
        parts: may be empty, where environments give all rewards.
        limits: see there.
    """

    def __init__(self, parts: Sequence[WeightedReward], limits: RewardLimits = DEFAULTS):
        self.parts, self.limits = tuple(parts), limits
        self._processes = RewardProcesses([part.reward for part in parts], limits.timeout, limits.processes)
        self._said = 0

    @property
    def row_keys(self) -> Collection[str] | None:
        """Which keys all of them read of rows; None: one does not say."""
        keys = [part.reward.row_keys for part in self.parts]
        return None if None in keys else {key for found in keys for key in found}

    @property
    def files(self) -> dict[str, Path | None]:
        """Where those of one's own are written, by the key of the configuration."""
        return {part.reward.key: part.reward.file for part in self.parts}

    def check_here(self) -> None:
        """Let rewards refuse this machine.

        Raises:
            ConfigError: something that one of them needs is not here.
        """
        for part in self.parts:
            part.reward.check_here()

    def check_rows(self, prompts: Sequence[Prompt], path: str) -> None:
        """Let rewards refuse rows before the run starts: those with a method `check(row)`, which raises for a bad one.

        Raises:
            RewardError: with the file and line of the first row that is refused, or that no reward scores.
        """
        for prompt in prompts if self.parts else ():
            self.check_row(prompt, path)

    def check_row(self, prompt: Prompt, path: str) -> None:
        """The same of one."""
        where = prompt.place or f"{path}:{prompt.line}"
        taken = [part for part in self.parts if part.takes(prompt.row)]
        if not taken and self.parts:
            raise RewardError(
                f"{where}: no reward of {SEVERAL} scores data_source={prompt.row.get('data_source')!r}: name "
                "it in the data_sources of one"
            )
        for part in taken:
            check = getattr(part.reward.target, "check", None)
            try:
                check and check(prompt.row)
            except ValueError as error:
                raise RewardError(f"{where}: {error}") from error

    def score(self, texts: Sequence[Sequence[str]], prompts: Sequence[Prompt]) -> Scores:
        """What responses are worth.

        Args:
            texts: [prompts][samples].

        Raises:
            RewardError: a reward failed, gave something else than finite numbers, or did not come back and that is refused.
        """
        parts = [[[NAN] * len(self.parts) for _ in group] for group in texts]
        totals, lost = ([[zero] * len(group) for group in texts] for zero in (0.0, 0))
        for number, part in enumerate(self.parts):
            mine = [i for i, prompt in enumerate(prompts) if part.takes(prompt.row)]
            calls = [PromptCall(tuple(texts[i]), prompts[i].row, prompts[i].where) for i in mine]
            answers = self._in_process(number, calls) if not part.reward.bounds_itself else self._at_once(part, calls)
            for i, values in zip(mine, answers, strict=True):
                for sample, value in enumerate(values):
                    lost[i][sample] += value is None
                    value = value if value is not None else 0.0 if self.limits.on_timeout == "zero" else NAN
                    parts[i][sample][number] = value
                    if part.weight:  # 0 times what is lost would be NaN
                        totals[i][sample] += part.weight * value
        for prompt, group in zip(prompts, totals, strict=True):
            if any(map(math.isinf, group)):
                raise RewardError(
                    f"{SEVERAL}: the weighted sum for the prompt of {prompt.where} is infinite: lower a weight"
                )
        return Scores(totals, parts, lost)

    def close(self) -> None:
        """End what they are asked in."""
        self._processes.close()

    def _in_process(self, number: int, calls: Sequence[PromptCall]) -> list[list[float | None]]:
        """In processes of their own: None for a response that did not come back."""
        name, limits, answers = self.parts[number].reward.name, self.limits, []
        with contextlib.closing(self._processes.ask(number, calls)) as asked:
            for call, answer in zip(calls, asked, strict=True):
                if isinstance(answer, Lost) and limits.on_timeout == "refuse":
                    count = len(call.responses)
                    raise RewardError(
                        f"reward {name} {answer.reason} for {f'one of {count} responses' if count > 1 else 'a response'} to the "
                        f"prompt of {call.where}: mend it, raise trainer.grpo.reward_timeout, or set "
                        "trainer.grpo.on_reward_timeout to zero or drop"
                    )
                answers.append(answer)
        # It may be one response alone that did not come back.
        again = [i for i, answer in enumerate(answers) if isinstance(answer, Lost) and limits.on_timeout == "zero"]
        alone = [each for i in again for each in calls[i].each()]
        found = iter(list(self._processes.ask(number, alone)))
        for i in again:
            answers[i] = [answer if isinstance(answer := next(found), Lost) else answer[0] for _ in calls[i].responses]
        return [self._known(name, call, answer) for call, answer in zip(calls, answers, strict=True)]

    def _known(self, name: str, call: PromptCall, answer: Answer | list[float | Lost]) -> list[float | None]:
        values = [answer] * len(call.responses) if isinstance(answer, Lost) else answer
        for lost in [value for value in values if isinstance(value, Lost)][:1]:
            self._say(f"reward {name} {lost.reason}", call.where)
        return [None if isinstance(value, Lost) else value for value in values]

    def _at_once(self, part: WeightedReward, calls: Sequence[PromptCall]) -> Iterator[list[float | None]]:
        """One that bounds itself, for everything."""
        texts = [text for call in calls for text in call.responses]
        rows = [call.row for call in calls for _ in call.responses]
        origins = [call.where for call in calls for _ in call.responses]
        values = iter(score(part.reward, texts, rows, origins) if texts else ())
        for call in calls:
            found = [next(values) for _ in call.responses]
            if None in found:
                reason = f"reward {part.reward.name} could not score a response in time"
                if self.limits.on_timeout == "refuse":
                    raise RewardError(
                        f"{reason}, to the prompt of {call.where}: see what it asks, give it more time, or set "
                        "trainer.grpo.on_reward_timeout to zero or drop"
                    )
                self._say(reason, call.where)
            yield found

    def _say(self, what: str, where: str) -> None:
        self._said += 1
        if self._said <= SAID:
            done = "they count as 0" if self.limits.on_timeout == "zero" else "their group is not trained on"
            last = "; from now on such are only counted" if self._said == SAID else ""
            logger.warning("%s for responses to the prompt of %s: %s%s", what, where, done, last)


def rewards_for(
    reward: str | Mapping[str, Any] | None,
    several: Mapping[str, RewardSection],
    environment: Named | None = None,
    limits: RewardLimits = DEFAULTS,
) -> Rewards:
    """The rewards beside an environment: none where that gives them.

    Args:
        reward: one, as trainer.grpo.reward has it.
        several: in its place, by the name that the log has.

    Raises:
        ConfigError: both are given, or none is; or as `get_reward`.
    """
    gives = environment is not None and environment.kind.gives_reward
    if reward is not None and several:
        raise ConfigError(f"{KEY}={reward} and {SEVERAL} are both set: write it as one of {SEVERAL}, or set {KEY}=null")
    if gives and (reward is not None or several):
        said = f"{KEY}={reward}" if reward is not None else f"{SEVERAL}={{{', '.join(several)}}}"
        raise ConfigError(
            f"{said}, and trainer.grpo.environment={environment.name} gives rewards itself: set "
            f"{f'{KEY}=null' if reward is not None else f'{SEVERAL}={{}}'}"
        )
    if not gives and reward is None and not several:
        among = ", ".join(REGISTRY.names)
        raise ConfigError(f"{KEY} is not set: name what scores responses, {among} or the path of a function of yours")
    if reward is not None:
        found = get_reward(reward)
        return Rewards([WeightedReward(found.name, found)], limits)
    for name in several:
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"{SEVERAL}: {name!r} names a reward in the log: use letters, digits, _ and -")
    parts = [
        WeightedReward(name, get_reward(s.reward, f"{SEVERAL}.{name}.reward"), s.weight, s.data_sources)
        for name, s in several.items()
    ]
    return Rewards(parts, limits)
