"""Needle in a video haystack: synthetic frames that hold two marked tokens, and questions about them.

Every token of every frame shows noise and one of `VALUES` values. Two of them, A and B, in different frames, are marked
as needles. Questions, each answered by one token:

    row, column   where in its frame A stands      spatial: only positions can tell
    order         which of A and B comes first     temporal: only positions can tell
    value         what A shows                     retrieval: found by its mark among all other values

With distractors (V-NIAH-D, arXiv 2502.05173) the haystack is periodic: so many frames before and behind A, and again, something
stands that looks like A. It bears half of A's mark, in any place, with any value, and is never what is asked about.

All questions about a video share it as their prefix: they are its group. The same seed draws the same videos whatever
the scheme. Nothing here knows about schemes.

Shape legend: v videos, t frames of h x w tokens, f features of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.models.media import MediaPrompt
from megatron_ext.rotary import Video

__all__ = ["FEATURES", "KINDS", "VOCABULARY", "Sample", "draw_sample"]

KINDS = ("row", "column", "order", "value")
VALUES, LARGEST_SIDE, NOISE = 8, 8, 8
# Tokens: the placeholder, the questions, values, rows or columns, and the needles' names.
PLACEHOLDER, QUESTION = 0, 1
VALUE = QUESTION + len(KINDS)
PLACE = VALUE + VALUES
NEEDLE = PLACE + LARGEST_SIDE
VOCABULARY = NEEDLE + 2
FEATURES = 2 + VALUES + NOISE  # marks of A and B, the value, noise
MARK = 3.0
LIKENESS = 0.5  # of a distractor's mark to the needle's


@dataclass(frozen=True)
class Sample:
    """A video, and a (question, answer) pair of tokens for each of KINDS."""

    prompt: MediaPrompt
    questions: list[list[int]]
    depth: float  # of needle A: 0 in the first frame, 1 in the last


def draw_sample(
    rng: torch.Generator, frames: int, height: int, width: int, frame_a: int | None = None, period: int | None = None
) -> Sample:
    """One video with its questions.

    Args:
        frame_a: where needle A stands; drawn if not given. B stands in any other frame.
        period: frames from one distractor to the next; None: there are none. The video is otherwise the same.
    """

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=rng))

    grid = Video(frames, height, width)
    values = torch.randint(VALUES, (frames, height, width), generator=rng)
    features = torch.zeros(frames, height, width, FEATURES)
    features[..., 2 : 2 + VALUES] = torch.nn.functional.one_hot(values, VALUES).float() * MARK
    features[..., 2 + VALUES :] = torch.randn(frames, height, width, NOISE, generator=rng)
    a = draw(frames) if frame_a is None else frame_a
    b = (a + 1 + draw(frames - 1)) % frames
    row, column = draw(height), draw(width)
    features[a, row, column, 0] = MARK
    features[b, draw(height), draw(width), 1] = MARK
    if period is not None:
        for frame in range(a % period, frames, period):
            place = frame, draw(height), draw(width)
            if frame != a:
                features[(*place, 0)] = LIKENESS * MARK
    answers = (PLACE + row, PLACE + column, NEEDLE + int(b < a), VALUE + int(values[a, row, column]))
    prompt = MediaPrompt.of([PLACEHOLDER] * grid.length, PLACEHOLDER, [grid], features.flatten(0, 2))
    return Sample(prompt, [[QUESTION + i, answer] for i, answer in enumerate(answers)], a / (frames - 1))


def answer_places(num_videos: int) -> Tensor:
    """bool [2 x questions]: which predicted tokens of a stream are answers; each question is (question, answer)."""
    return torch.tensor([False, True]).repeat(num_videos * len(KINDS))
