"""What a model says about people: one evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.bias.public_sets import CoreferenceQuestion
from megatron_ext.bias.scores import (
    afgb_score,
    bootstrap_interval,
    choice_accuracy,
    profession_table,
    pronoun_mass,
    share_preferring_first,
    stereotype_share,
    ub_score,
)
from recipes.bias.prompts import PromptSet
from recipes.bias.scorers import Progress, Scorer

__all__ = ["evaluate", "pair_preference", "perplexity", "question_accuracy"]


def evaluate(
    scorer: Scorer,
    prompts: PromptSet,
    pair: tuple[int, int],
    texts: Sequence[Sequence[int]] = (),
    bootstrap_samples: int = 1000,
    progress: Progress = lambda rows: None,
) -> dict:
    """AFGB and UB with 95 % intervals over professions, and what must be read beside them."""
    p = scorer.pair_probabilities(prompts.bias_tokens, pair, progress)
    q = scorer.pair_probabilities(prompts.hinted_tokens, pair, progress)
    hint = torch.tensor([h.hint for h in prompts.hinted])

    def afgb(rows: Tensor) -> float:
        return afgb_score(*p[rows].unbind(1))

    def ub(rows: Tensor) -> float:
        return ub_score(*q[rows].unbind(1), hint[rows])

    names = [b.profession for b in prompts.bias]
    found = {
        "prompts": len(names),
        "hinted_prompts": len(hint),
        "professions": len(set(names)),
        "afgb": afgb(torch.arange(len(p))),
        "afgb_interval": bootstrap_interval(afgb, names, bootstrap_samples),
        "ub": ub(torch.arange(len(q))),
        "ub_interval": bootstrap_interval(ub, [h.profession for h in prompts.hinted], bootstrap_samples),
        "pronoun_mass": pronoun_mass(*p.unbind(1)),
        "hinted_pronoun_mass": pronoun_mass(*q.unbind(1)),
        "share_preferring_first": share_preferring_first(*p.unbind(1)),
        "profession_table": profession_table(*p.unbind(1), names),
    }
    if texts:
        found["perplexity"] = perplexity(scorer, texts, progress)
    return found


def perplexity(scorer: Scorer, texts: Sequence[Sequence[int]], progress: Progress = lambda rows: None) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each text; infinite where fp64 overflows."""
    logprobs = torch.cat(scorer.token_logprobs([((), text) for text in texts], progress)).double()
    return (-logprobs.mean()).exp().item()


def pair_preference(scorer: Scorer, rows: Sequence, progress: Progress = lambda rows: None) -> float:
    """Share of pairs whose more stereotypical sentence is the likelier; rows from `sentence_rows`."""
    return stereotype_share(*_sums(scorer, rows, progress).unbind(1))


def question_accuracy(
    scorer: Scorer, questions: Sequence[CoreferenceQuestion], rows: Sequence, progress: Progress = lambda rows: None
) -> dict:
    """Share of questions whose right answer is the likelier, over all and by the pronoun's gender."""
    found = _sums(scorer, rows, progress)
    answers = torch.tensor([q.answer for q in questions])
    groups = {
        gender: [i for i, q in enumerate(questions) if q.gender == gender] for gender in ("male", "female", "neutral")
    }
    return {
        "winogender_accuracy": choice_accuracy(found, answers),
        "winogender_accuracy_by_gender": {
            gender: choice_accuracy(found[rows], answers[rows]) for gender, rows in groups.items() if rows
        },
    }


def _sums(scorer: Scorer, rows: Sequence, progress: Progress) -> Tensor:
    """Log-likelihoods [pairs, 2] of neighbouring rows."""
    return torch.tensor([float(row.double().sum()) for row in scorer.token_logprobs(rows, progress)]).view(-1, 2)
