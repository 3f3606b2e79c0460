"""Which option a model finds the likeliest: all options of a question are responses to one prompt, encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_ext.errors import UserError
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.collectives import gather_objects
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.progress import PROGRESS
from recipes.data.decoding import DecodeAhead
from recipes.data.errors import DataError
from recipes.data.media_rows import MARKERS
from recipes.data.reader import FileRow, Rows
from recipes.data.rows import Pair, read_pair
from recipes.data.tokenizer import Tokenizer
from recipes.data.video import VideoReader
from recipes.video_eval.sets import LETTERS, Question
from recipes.video_eval.settings import VideoEvalData

__all__ = ["Asked", "ask_all", "prepare"]

STREAM_TOKENS = 8192


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it.

    Attributes:
        pairs: its prompt with each option.
        by_token: an option's log-likelihood is divided by its number of tokens.
    """

    question: Question
    pairs: tuple[Pair, ...]
    by_token: bool

    @property
    def media(self) -> tuple:
        return self.pairs[0].media

    @property
    def tokens(self) -> int:
        return len(self.pairs[0].prompt.tokens) + sum(len(pair.response) for pair in self.pairs)


def prepare(
    questions: Sequence[Question], data: VideoEvalData, tokenizer: Tokenizer, video: VideoReader | None, longest: int
) -> list[Asked]:
    """
    Args:
        video: None: the model sees nothing, and the questions show nothing.

    Raises:
        UserError: data.prompt shows something to a model that does not see.
        DataError: a clip that is not there, or a question that is too long, with its place.
    """
    if video is None and (shown := next((marker for marker in MARKERS.values() if marker in data.prompt), None)):
        raise UserError(f"data.prompt={data.prompt!r} shows {shown}, and the model has no eyes: take it out")
    if data.max_questions is not None and data.max_questions < len(questions):
        step = len(questions) / data.max_questions
        questions = [questions[int(i * step)] for i in range(data.max_questions)]
    tokenizer.template.choose(data.chat_template)
    reader = Rows(tokenizer, video, data.rows)
    reader.used["prompt"] |= {"response"}
    return [Asked(q, _pairs(q, data, reader, longest), data.scoring == "text") for q in questions]


def _pairs(question: Question, data: VideoEvalData, reader: Rows, longest: int) -> tuple[Pair, ...]:
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False))
    prompt = data.prompt.replace("{question}", question.question).replace("{options}", options)
    answers = LETTERS[: len(question.options)] if data.scoring == "letter" else question.options
    space = data.before_answer if data.before_answer is not None else "" if data.prompt_as_message else " "
    found = []
    for answer in answers:
        row = {**question.media}
        if data.prompt_as_message:
            talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"{space}{answer}"}]
            system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
            row |= {"messages": [*system, *talk]}
        else:
            row |= {"prompt": prompt, "response": f"{space}{answer}"}
        kind = "messages" if data.prompt_as_message else "prompt"
        pair = read_pair(reader, FileRow(row, row, kind, question.place))
        if (length := len(pair.prompt.tokens) + len(pair.response)) > longest:
            raise DataError(
                f"{question.place}: prompt and answer have {length} tokens, more than model.encoder_seq_length={longest}: show "
                "fewer frames, or raise the limit"
            )
        found.append(pair)
    return tuple(found)


@torch.no_grad()
def ask_all(model: PrefixGroupedGPT, asked: Sequence[Asked], workers: int = 0, progress=lambda n: None) -> torch.Tensor:
    """Scores of all options, fp64 [questions, most options], known on every rank; -inf where a question has no such option.

    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        workers: processes that decode clips ahead.
        progress: told how many questions have been answered.
    """
    engine, config, device = Engine(model), model.model_config, next(model.parameters()).device
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    parts = list(_parts(asked, range(rank, len(asked), ranks)))
    ahead = DecodeAhead(workers, asked)
    mine: dict[int, list[float]] = {}
    for number, part in enumerate(parts):
        prompts, responses, owners = [], [], []
        for i in part:
            for prompt, answers in _alike(asked[i].pairs):
                prompts.append(prompt.for_model())
                responses.append(answers)
                owners.append(i)
        ahead.ask(parts[number + 1] if number + 1 < len(parts) else ())
        batch = pack_prompts(prompts, responses, config.position_embedding.scheme, stream_multiple(config), device)
        (logprobs,) = engine.score([Microbatch(batch)])
        lengths = [len(answer) for answers in responses for answer in answers]
        sums = [float(part.double().sum()) for part in logprobs.detach().cpu().split(lengths)]
        owner_of = [i for i, answers in zip(owners, responses, strict=True) for _ in answers]
        for i, value, length in zip(owner_of, sums, lengths, strict=True):
            mine.setdefault(i, []).append(value / length if asked[i].by_token else value)
        PROGRESS.made()
        progress(len(part) * ranks)
    ahead.close()
    found = {i: v for share in gather_objects(mine, parallel_state.get_data_parallel_group()) for i, v in share.items()}
    scores = torch.full((len(asked), max(len(a.pairs) for a in asked)), -torch.inf, dtype=torch.float64)
    for i, values in found.items():
        scores[i, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return scores


def _alike(pairs: Sequence[Pair]) -> Iterator[tuple]:
    """Prompts with the answers to each, neighbours that have the same together; almost always all have."""
    start = 0
    for end in range(1, len(pairs) + 1):
        if end == len(pairs) or pairs[end].prompt.tokens != pairs[start].prompt.tokens:
            yield pairs[start].prompt, [pair.response for pair in pairs[start:end]]
            start = end


def _parts(asked: Sequence[Asked], own: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of neighbouring questions of together at most so many tokens, at least one."""
    part: list[int] = []
    total = 0
    for number in own:
        if part and total + asked[number].tokens > STREAM_TOKENS:
            yield part
            part, total = [], 0
        part.append(number)
        total += asked[number].tokens
    if part:
        yield part
