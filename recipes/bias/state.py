"""What a checkpoint of LFTF keeps beside model and optimizer, in plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Progress", "Start"]


@dataclass(frozen=True)
class Start:
    """What was found before the first step.

    Attributes:
        before: the evaluation on the test professions.
        ranking: of the blocks, or of finer places, where an estimator chose.
        places: which train, as `parse_places` reads them; None: all.
        base: digest of their weights.
    """

    before: dict
    ranking: dict | None
    places: list[dict] | None
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
