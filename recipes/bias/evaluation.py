"""What a model says about people: one evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ext.bias.measures import SAMPLES, Measure, interval
from megatron_ext.bias.scores import absolute_differences, first_preferred, hints_followed, profession_table
from recipes.bias.prompts import PromptSet
from recipes.bias.scorers import Progress, Scorer, answer_probabilities

__all__ = ["ask_prompts", "ask_texts", "evaluate", "perplexity", "summary"]


def evaluate(
    scorer: Scorer,
    prompts: PromptSet,
    answers: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]] = (),
    bootstrap_samples: int = SAMPLES,
    progress: Progress = lambda rows: None,
) -> dict:
    """AFGB, UB and what must be read beside them, with 95 % intervals over professions, and `answers`, by which two evaluations
    of the same questions are compared. Arguments as of `ask_prompts`."""
    measures, facts = ask_prompts(scorer, prompts, answers, progress=progress)
    if texts:
        measures |= ask_texts(scorer, texts, progress)
    answers_of = {name: measure.as_dict() for name, measure in measures.items()}
    return facts | summary(measures, bootstrap_samples) | {"answers": answers_of}


def ask_prompts(
    scorer: Scorer,
    prompts: PromptSet,
    answers: Sequence[Sequence[int]],
    others: Sequence[str] = (),
    progress: Progress = lambda rows: None,
) -> tuple[dict[str, Measure], dict]:
    """Figures by name, and what else is to be said.

    Args:
        answers: tokens of the two words that are compared, then of `others`.
    """
    p = answer_probabilities(scorer, prompts.bias_tokens, answers, progress)
    q = answer_probabilities(scorer, prompts.hinted_tokens, answers, progress)
    hint = torch.tensor([h.hint for h in prompts.hinted])
    names, hinted = [b.profession for b in prompts.bias], [h.profession for h in prompts.hinted]
    he, she = p[:, :2].unbind(1)
    measures = {
        "afgb": Measure.mean(names, absolute_differences(he, she)),
        "ub": Measure.mean(hinted, hints_followed(*q[:, :2].unbind(1), hint)),
        "pronoun_mass": Measure.mean(names, p[:, :2].double().sum(1)),
        "hinted_pronoun_mass": Measure.mean(hinted, q[:, :2].double().sum(1)),
        "share_preferring_first": Measure.mean(names, first_preferred(he, she)),
    }
    if others:
        best = p.argmax(1)
        measures["others_mass"] = Measure.mean(names, p[:, 2:].double().sum(1))
        measures["others_preferred"] = Measure.mean(names, (best >= 2).double())
        for number, word in enumerate(others, 2):
            measures[f"others_by_word.{word}"] = Measure.mean(names, p[:, number])
    facts = {
        "prompts": len(names),
        "hinted_prompts": len(hint),
        "professions": len(set(names)),
        "profession_table": profession_table(he, she, names),
    }
    return measures, facts


def ask_texts(
    scorer: Scorer, texts: Sequence[Sequence[int]], progress: Progress = lambda rows: None
) -> dict[str, Measure]:
    """Perplexity of texts; draws are of whole texts."""
    logprobs = scorer.token_logprobs([((), text) for text in texts], progress)
    rows = torch.tensor([[float(row.double().sum()), len(row)] for row in logprobs], dtype=torch.float64)
    return {"perplexity": Measure.of("perplexity", [str(number) for number in range(len(texts))], rows)}


def summary(measures: Mapping[str, Measure], bootstrap_samples: int) -> dict:
    """Values by name, and intervals as `<name>_interval`; parts `a.b` of a figure stand as {a: {b: value}}. None is no number, as
    of a correlation with what does not vary."""
    found: dict = {}
    for name, measure in measures.items():
        whole, _, part = name.partition(".")
        value = None if math.isnan(measure.value) else measure.value
        if part:
            found.setdefault(whole, {})[part] = value
        else:
            found[name], found[f"{name}_interval"] = value, interval(measure, bootstrap_samples)
    return found


def perplexity(logprobs: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood of the tokens of all texts; infinite where fp64 overflows."""
    return (-torch.cat(tuple(logprobs)).double().mean()).exp().item()
