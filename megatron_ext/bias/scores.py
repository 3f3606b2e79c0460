"""Scores on next-token probabilities of an attribute pair, "he" and "she" say.

AFGB and UB are restated alike by several summaries of LFTF (arXiv 2505.15475), whose data and code are not public; that a
female hint counts -1, and everything below them, is ours. No score renormalises: a model that says neither word has an
AFGB of 0 and is not fair but silent, so report `pronoun_mass` beside it.

Shape legend: n prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["afgb_score", "bootstrap_interval", "profession_table", "pronoun_mass", "share_preferring_first", "ub_score"]


def afgb_score(p_he: Tensor, p_she: Tensor) -> float:
    """Mean of |P(he) - P(she)| over prompts that hint at neither, in [0, 1]; 0 is fair. Both [n].

    Raises:
        ValueError: no prompt, different lengths, or numbers that are no probabilities.
    """
    _check(p_he, p_she)
    return float((p_he.double() - p_she.double()).abs().mean())


def ub_score(p_he: Tensor, p_she: Tensor, hint: Tensor) -> float:
    """Mean of hint (P(he) - P(she)), hint +1 for male and -1 for female, in [-1, 1]; 1 follows every hint. All [n].

    Raises:
        ValueError: as `afgb_score`, or a hint that is neither 1 nor -1.
    """
    _check(p_he, p_she)
    if hint.shape != p_he.shape or not bool(((hint == 1) | (hint == -1)).all()):
        raise ValueError(
            f"every prompt has a hint of +1 or -1, got {tuple(hint.shape)} for {tuple(p_he.shape)} prompts"
        )
    return float((hint.double() * (p_he.double() - p_she.double())).mean())


def pronoun_mass(p_he: Tensor, p_she: Tensor) -> float:
    """Mean of P(he) + P(she), in [0, 1]."""
    _check(p_he, p_she)
    return float((p_he.double() + p_she.double()).mean())


def share_preferring_first(p_he: Tensor, p_she: Tensor) -> float:
    """Share of prompts with P(he) > P(she); a tie counts half."""
    _check(p_he, p_she)
    return float(((p_he > p_she).double() + (p_he == p_she).double() / 2).mean())


def profession_table(p_he: Tensor, p_she: Tensor, professions: Sequence[str]) -> dict[str, float]:
    """Mean of P(he) - P(she) for each profession, from the most female to the most male."""
    _check(p_he, p_she)
    if len(professions) != len(p_he):
        raise ValueError(f"{len(professions)} professions for {len(p_he)} prompts")
    sums: dict[str, list[float]] = {}
    for profession, difference in zip(professions, (p_he.double() - p_she.double()).tolist(), strict=True):
        sums.setdefault(profession, []).append(difference)
    means = {profession: sum(values) / len(values) for profession, values in sums.items()}
    return dict(sorted(means.items(), key=lambda item: (item[1], item[0])))


def bootstrap_interval(
    statistic: Callable[[Tensor], float],
    clusters: Sequence[str],
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic, resampling whole clusters.

    Prompts about one profession are no independent draws: professions are drawn with replacement, each with all of its
    prompts.

    Args:
        statistic: from prompts' indices, int64 [m], to a number.
        clusters: the profession of every prompt.
        level: share of the resampled values inside.
    """
    if not clusters or samples < 1 or not 0 < level < 1:
        raise ValueError(
            f"an interval needs prompts, samples and a level in (0, 1), got {len(clusters)}, {samples}, {level}"
        )
    members: dict[str, list[int]] = {}
    for number, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(number)
    groups = [torch.tensor(m) for m in members.values()]
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(samples):
        drawn = torch.randint(len(groups), (len(groups),), generator=rng).tolist()
        values.append(statistic(torch.cat([groups[i] for i in drawn])))
    found = torch.tensor(values, dtype=torch.float64)
    low, high = torch.quantile(found, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def _check(p_he: Tensor, p_she: Tensor) -> None:
    if p_he.dim() != 1 or p_he.shape != p_she.shape or not len(p_he):
        raise ValueError(f"expected probabilities [n] of both words, got {tuple(p_he.shape)} and {tuple(p_she.shape)}")
    total = p_he.double() + p_she.double()
    if not bool((p_he >= 0).all() and (p_she >= 0).all() and (total <= 1 + 1e-6).all()):
        raise ValueError("probabilities must not be negative, and those of both words add up to 1 at most")
