"""What a response is worth to exact_answer, and how answers are stated."""

from __future__ import annotations

from recipes.rewards.registry import get_reward, score

__all__ = ["STATED", "reward", "state"]


def reward(response: str, answer, **options) -> float:
    return score(get_reward({"name": "exact_answer", **options}), [response], [{"answer": answer}])[0]


STATED = (
    "{}", "#### {}", "Answer: {}", "It is 8, or not.\nanswer: {}\n\nThere are 9 reasons.", "The answer is {}.",
    "**Final Answer**\n{}", "<think>Answer: 8</think>\n<answer>{}</answer>", "Answer: it is {}.",
    "Final Answer: The final answer is {}. I hope it is correct.",
)  # fmt: skip


def state(stated: str, answer: str) -> str:
    return stated.format(answer).replace("..", ".")
