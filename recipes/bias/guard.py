"""What a state must keep of the model that training began with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.bias.settings import LFTFSettings

__all__ = ["DIVERGED", "Guard"]

DIVERGED = "the model has diverged"


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
