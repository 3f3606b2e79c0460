"""Answers to held-out prompts, measured: how many are right, whether one of k is, whether most agree on the right one.

Source of pass@k without bias: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.data.rows import Prompt
from recipes.grpo.sampling import ValidationSetSection
from recipes.rewards.exact_answer import ExactAnswer, without_thought
from recipes.rewards.notation import Answer, agree, read

__all__ = ["ValidationSet", "majority", "measures", "pass_at"]


@dataclass(frozen=True)
class ValidationSet:
    """
    Attributes:
        name: of its metrics; "": they have none.
        number: among the sets, for the random numbers.
    """

    name: str
    number: int
    section: ValidationSetSection
    prompts: Sequence[Prompt]

    @property
    def prefix(self) -> str:
        return f"val_rollouts/{self.name}" if self.name else "val_rollouts"


def pass_at(k: int, answers: int, right: int) -> float:
    """The probability that of k of these answers, drawn without replacement, one at least is right."""
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def majority(texts: Sequence[str], right: Sequence[bool]) -> bool:
    """Whether the answer that most of the texts state is right; of equally many the one that was stated first.

    What a text states is read as the reward exact_answer reads it; a text that states nothing votes for itself.
    """
    votes: list[tuple[Answer, list[bool]]] = []
    for text, is_right in zip(texts, right, strict=True):
        answer = read(_READER.stated(without_thought(text))[0])
        for known, found in votes:
            if agree(answer, known):
                found.append(is_right)
                break
        else:
            votes.append((answer, [is_right]))
    most = max(votes, key=lambda vote: len(vote[1]))[1]
    return 2 * sum(most) > len(most)


def measures(
    texts: Sequence[Sequence[str]], rewards: Sequence[Sequence[float]], section: ValidationSetSection
) -> dict[str, float]:
    """Sums over prompts, perhaps none, of what is measured of several answers to each.

    Args:
        texts, rewards: [prompts][answers], as many as `section.samples`.
    """
    answers = section.samples
    right = [[reward >= section.right_from for reward in group] for group in rewards]
    ks = [*(2**i for i in range(1, answers.bit_length()) if 2**i < answers), answers]
    found = {"right": sum(sum(group) / answers for group in right)}
    found |= {f"pass_at_{k}": sum(pass_at(k, answers, sum(group)) for group in right) for k in ks}
    votes = (majority(said, group) for said, group in zip(texts, right, strict=True))
    return found | {f"majority_at_{answers}": float(sum(votes))}


_READER = ExactAnswer()
