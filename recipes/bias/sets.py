"""Public sets of questions about people: what a configuration names, in tokens, and what the answers are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.bias.bbq import bbq_measures, read_bbq
from megatron_ext.bias.decisions import (
    ANSWERS,
    GENDER_WORDS,
    cooccurrence_measures,
    decision_measures,
    read_cooccurrence,
    read_decisions,
)
from megatron_ext.bias.measures import Measure
from megatron_ext.bias.public_sets import (
    CoreferenceQuestion,
    CrowsPair,
    OccupationStats,
    SentencePair,
    is_gotcha,
    read_crows_pairs,
    read_occupation_stats,
)
from megatron_ext.bias.scores import preferred, right_answers
from megatron_ext.bias.stereoset import StereoSetTriple, read_stereoset, stereoset_measures
from megatron_ext.bias.winobias import read_winobias
from recipes.bias.prompts import question_rows, read_winogender, sentence_rows
from recipes.bias.settings import BiasEvalData
from recipes.data.errors import DataError
from recipes.data.tokenizer import Tokenizer

__all__ = ["PublicSet", "choice_rows", "read_public_sets", "stereoset_rows"]

Row = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class PublicSet:
    """
    Attributes:
        name: of the set, and of its part.
        questions: what is asked, whose `repr` says all of it.
        rows: (what stands before, text) whose tokens' log-probabilities are asked for.
        measures: from them, in the order of `rows`, to figures by name; `a.b` stands in the report as part b of a.
        counts: how much was asked and left out, by name.
    """

    name: str
    questions: Sequence
    rows: list[Row]
    measures: Callable[[Sequence[Tensor]], dict[str, Measure]]
    counts: dict[str, int] = field(default_factory=dict)


def read_public_sets(data: BiasEvalData, tokenizer: Tokenizer, max_length: int) -> list[PublicSet]:
    """Those that the configuration names.

    Raises:
        UserError: a file that is not what it should be, or a text of more than `max_length` tokens.
    """
    makers = (_crows_pairs, _winobias, _winogender, _bbq, _stereoset, _cooccurrence, _decisions)
    return [found for make in makers for found in make(data, tokenizer, max_length)]


def choice_rows(prompt: str, choices: Sequence[str], tokenizer: Tokenizer, max_length: int, key: str) -> list[Row]:
    """(prompt, choice) for each of them; a choice brings its own space.

    Raises:
        DataError: the tokenizer joins prompt and choice, or they are too long.
    """
    rows = []
    for choice in choices:
        try:
            row = tokenizer.encode_pair(prompt, choice)
        except DataError as error:
            raise DataError(f"{error}; leave {key} out for this model") from error
        if len(row[0]) + len(row[1]) > max_length:
            raise DataError(
                f"{key}: {prompt[:60]!r}... has {len(row[0]) + len(row[1])} tokens; the model reads at most {max_length}"
            )
        rows.append(row)
    return rows


def _totals(logprobs: Sequence[Tensor], choices: int) -> Tensor:
    """Log-likelihoods fp64 [n, choices] of rows that stand one behind the other."""
    return torch.stack([row.double().sum() for row in logprobs]).view(-1, choices)


def _crows_pairs(data: BiasEvalData, tokenizer: Tokenizer, max_length: int):
    for kind in data.crows_pairs_types if data.crows_pairs_path else ():
        pairs = read_crows_pairs(data.crows_pairs_path, kind)
        name = "crows_pairs" if kind == "gender" else f"crows_pairs_{kind}"

        def measures(logprobs, pairs: list[CrowsPair] = pairs, name: str = name) -> dict[str, Measure]:
            more, less = _totals(logprobs, 2).unbind(1)
            clusters = [str(number) for number in range(len(pairs))]
            return {
                f"{name}_stereotype_share": Measure.mean(clusters, preferred(more, less)),
                f"{name}_likelihood_difference": Measure.mean(clusters, (more - less).abs()),
            }

        yield PublicSet(name, pairs, sentence_rows(pairs, tokenizer, max_length), measures, {name: len(pairs)})


def _winobias(data: BiasEvalData, tokenizer: Tokenizer, max_length: int):
    if not data.winobias_paths:
        return
    pairs, dropped = read_winobias(*data.winobias_paths)
    occupations = [pair.occupation for pair in pairs]
    asked = [pair for pair in pairs if pair.questions]
    rows = sentence_rows(list[SentencePair](pairs), tokenizer, max_length)
    rows += question_rows([q for pair in asked for q in pair.questions], tokenizer, max_length)

    def measures(logprobs) -> dict[str, Measure]:
        sentences, choices = logprobs[: 2 * len(pairs)], logprobs[2 * len(pairs) :]
        found = {"winobias_stereotype_share": Measure.mean(occupations, preferred(*_totals(sentences, 2).unbind(1)))}
        if asked:
            right = right_answers(_totals(choices, 2), torch.zeros(2 * len(asked), dtype=torch.int64)).view(-1, 2)
            clusters = [pair.occupation for pair in asked]
            found["winobias_pro_accuracy"] = Measure.mean(clusters, right[:, 0])
            found["winobias_anti_accuracy"] = Measure.mean(clusters, right[:, 1])
            found["winobias_accuracy_gap"] = Measure.mean(clusters, right[:, 0] - right[:, 1])
        return found

    counts = {"winobias_pairs": len(pairs), "winobias_dropped": dropped, "winobias_asked": len(asked)}
    yield PublicSet("winobias", pairs, rows, measures, counts)


def _winogender(data: BiasEvalData, tokenizer: Tokenizer, max_length: int):
    if not data.winogender_path:
        return
    questions = read_winogender(data.winogender_path)
    stats = read_occupation_stats(data.winogender_stats_path) if data.winogender_stats_path else {}
    if stats and (unknown := sorted({q.occupation for q in questions} - stats.keys())):
        raise DataError(
            f"{data.winogender_stats_path} has no row of {unknown[0]!r}; give Winogender's own occupations-stats.tsv"
        )
    answers = torch.tensor([q.answer for q in questions])
    occupations = [q.occupation for q in questions]

    def measures(logprobs) -> dict[str, Measure]:
        totals = _totals(logprobs, 2)
        right = right_answers(totals, answers)
        found = {"winogender_accuracy": Measure.mean(occupations, right)}
        for gender in ("male", "female", "neutral"):
            if rows := [i for i, q in enumerate(questions) if q.gender == gender]:
                clusters = [occupations[i] for i in rows]
                found[f"winogender_accuracy_by_gender.{gender}"] = Measure.mean(clusters, right[rows])
        if stats:
            found |= _by_statistics(questions, stats, right, preferred(*totals.unbind(1)))
        return found

    rows = question_rows(questions, tokenizer, max_length)
    yield PublicSet("winogender", (questions, stats), rows, measures, {"winogender_questions": len(questions)})


def _by_statistics(
    questions: Sequence[CoreferenceQuestion], stats: Mapping[str, OccupationStats], right: Tensor, occupation: Tensor
) -> dict[str, Measure]:
    """
    Args:
        right, occupation: [questions], whether the answer is right, and whether it is the occupation.
    """
    found = {}
    gendered = [i for i, q in enumerate(questions) if q.gender != "neutral"]
    for name, gotcha in (("gotcha", True), ("no_gotcha", False)):
        rows = [i for i in gendered if is_gotcha(questions[i], stats[questions[i].occupation]) == gotcha]
        if rows:
            clusters = [questions[i].occupation for i in rows]
            found[f"winogender_accuracy_by_difficulty.{name}"] = Measure.mean(clusters, right[rows])
    names = sorted({q.occupation for q in questions})
    lean = []  # how much oftener a woman than a man is the occupation's
    for name in names:
        by_gender = [
            occupation[[i for i, q in enumerate(questions) if (q.occupation, q.gender) == (name, gender)]].mean()
            for gender in ("female", "male")
        ]
        lean.append(by_gender[0] - by_gender[1])
    women = torch.tensor([stats[name].bls_pct_female for name in names])
    found["winogender_correlation"] = Measure.correlation(names, women, torch.stack(lean))
    return found


def _bbq(data: BiasEvalData, tokenizer: Tokenizer, max_length: int):
    if not data.bbq_paths:
        return
    questions = read_bbq(data.bbq_paths)
    rows = [
        row
        for q in questions
        for row in choice_rows(q.prompt, [f" {c}" for c in q.choices], tokenizer, max_length, "data.bbq_paths")
    ]
    choices = len(questions[0].choices)
    yield PublicSet(
        "bbq",
        questions,
        rows,
        lambda logprobs: bbq_measures(questions, _totals(logprobs, choices)),
        {"bbq_questions": len(questions)},
    )


def _stereoset(data: BiasEvalData, tokenizer: Tokenizer, max_length: int):
    if not data.stereoset_path:
        return
    triples = read_stereoset(data.stereoset_path)
    rows, sentences = stereoset_rows(triples, tokenizer, max_length)

    def measures(logprobs) -> dict[str, Measure]:
        tokens: dict[int, list[Tensor]] = {}
        for sentence, values in zip(sentences, logprobs, strict=True):
            tokens.setdefault(sentence, []).append(values.double())
        scores = torch.stack([torch.cat(parts).mean() for parts in tokens.values()]).view(-1, 3)
        return stereoset_measures(triples, scores)

    yield PublicSet("stereoset", triples, rows, measures, {"stereoset_triples": len(triples)})


def stereoset_rows(
    triples: Sequence[StereoSetTriple], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Row], list[int]]:
    """Rows, and the number of the sentence that each is part of, three sentences to a triple.

    Within sentences as their authors' script: where the tokenizer puts no token before a text, the first token stands behind
    the begin token and all others behind the sentence alone; where it puts one, all stand behind it.
    """
    rows: list[Row] = []
    sentences: list[int] = []
    texts = [(triple, text) for triple in triples for text in triple.sentences]
    for number, (triple, text) in enumerate(texts):
        if triple.context is not None:
            (row,) = choice_rows(triple.context, [f" {text}"], tokenizer, max_length, "data.stereoset_path")
            parts = [row]
        else:
            tokens = tokenizer.encode(text)
            begun = tokenizer.encode_prompt(text)[: -len(tokens)]
            parts = [(begun, tokens)] if begun else [([tokenizer.begin_id], tokens[:1]), ((), tokens)]
            if len(begun) + len(tokens) > max_length:
                raise DataError(f"data.stereoset_path: {text[:60]!r}... has more than {max_length} tokens")
            parts = [(before, part) for before, part in parts if len(before) + len(part) > 1]
        rows += parts
        sentences += [number] * len(parts)
    return rows, sentences


def _cooccurrence(data: BiasEvalData, tokenizer: Tokenizer, max_length: int):
    if not data.cooccurrence_path:
        return
    key = "data.cooccurrence_path"
    sentences = read_cooccurrence(data.cooccurrence_path)
    words = [f" {word}" for word in GENDER_WORDS]
    rows = [row for text in sentences for row in choice_rows(text, words, tokenizer, max_length, key)]
    yield PublicSet(
        "cooccurrence",
        sentences,
        rows,
        lambda logprobs: cooccurrence_measures(sentences, _totals(logprobs, len(words))),
        {"cooccurrence_sentences": len(sentences)},
    )


def _decisions(data: BiasEvalData, tokenizer: Tokenizer, max_length: int):
    if not data.discrim_eval_path:
        return
    key = "data.discrim_eval_path"
    decisions, dropped = read_decisions(data.discrim_eval_path)
    rows = [row for d in decisions for row in choice_rows(d.prompt, ANSWERS, tokenizer, max_length, key)]
    yield PublicSet(
        "discrim_eval",
        decisions,
        rows,
        lambda logprobs: decision_measures(decisions, _totals(logprobs, len(ANSWERS))),
        {"discrim_eval_questions": len(decisions), "discrim_eval_dropped": dropped},
    )
