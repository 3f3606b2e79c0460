"""Turns: what an environment answers is read by the model and never said by it, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ext.attention.pages import PAGE
from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.rollouts import MegatronSource, Passage, Request, SamplingParams, Trajectory, last_turn
from megatron_ext.rollouts.choosing import choose_tokens
from megatron_ext.rollouts.draws import ResponseDraws
from tests.gpt_cases import randomize, small_config
from tests.plain_gpt import plain_logits


class Drawn:
    """Answers with tokens drawn beforehand, so many for each turn of each sample, and keeps what it has heard."""

    def __init__(self, rng, lengths: list[list[int]]):
        self.answers = [[torch.randint(61, (n,), generator=rng).tolist() for n in turns] for turns in lengths]
        self.begun: list[int] = []
        self.heard: dict[int, list] = {}

    def begin(self, sample: int) -> None:
        self.begun.append(sample)
        self.heard[sample] = []

    def observe(self, sample: int, passages):
        turn = len(self.heard[sample])
        self.heard[sample].append(list(passages))
        return self.answers[sample][turn] if turn < len(self.answers[sample]) else None


def build(rng, world, **changes):
    model = build_gpt(small_config(encoder_seq_length=600, **changes), world)
    randomize(model, rng)
    return model.double()


def one_at_a_time(model, request: Request, sample: int) -> list[tuple[list[int], bool]]:
    """[(tokens, whether they were sampled)], by the whole document for every token."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    draws, answers = ResponseDraws((*request.key, sample)), list(request.environment.answers[sample])
    passages, said, limit = [], [], request.limit(sample)
    while True:
        turn = []
        while True:
            logits = plain_logits(weights, model.model_config, [*request.prompt, *said])[-1:].float()
            uniform = torch.tensor([draws[len(said)]], dtype=torch.float64)
            turn.append(int(choose_tokens(logits, request.params, uniform, None)[0]))
            said.append(turn[-1])
            if turn[-1] in request.params.ends or len(said) >= limit:
                break
        passages.append((turn, True))
        if turn[-1] not in request.params.ends or not answers or len(said) + len(answers[0]) >= limit:
            return passages
        passages.append((answers.pop(0), False))
        said += passages[-1][0]


@pytest.mark.parametrize("rollout_tokens", [None, 12 * PAGE])
@pytest.mark.parametrize("changes", [{}, {"window_size": [9, 0], "window_attn_skip_freq": [0, 1]}])
def test_turns_equal_the_whole_document_run_for_every_token(changes, rollout_tokens, rng, world):
    """Answers of a token, of a page, of more than are run at once, beside responses that say more meanwhile; with few pages
    responses step back in the middle of their turns."""
    model = build(rng, world, **changes)
    stops = tuple(range(0, 61, 3))  # a turn is about three tokens long
    lengths = [[], [PAGE, 150], [70, 70, 2], [3, 1, 5]]
    requests = [
        Request(
            torch.randint(61, (n,), generator=rng).tolist(), 4, SamplingParams(260, stops), (int(rng.initial_seed()), i),
            environment=Drawn(rng, lengths[i:] + lengths[:i]),
        )
        for i, n in enumerate((11, 40))
    ]  # fmt: skip
    source = MegatronSource(model, rollout_tokens=rollout_tokens)
    found = source.sample(requests)
    for request, group in zip(requests, found, strict=True):
        assert sorted(request.environment.begun) == [0, 1, 2, 3]
        for sample, trajectory in enumerate(group):
            expected = one_at_a_time(model, request, sample)
            assert [(list(p.tokens), p.sampled) for p in trajectory.passages] == expected
            heard = request.environment.heard[sample]
            for turn, passages in enumerate(heard):
                assert [list(p.tokens) for p in passages] == [tokens for tokens, _ in expected[: 2 * turn + 1]]
            assert len(heard) == sum(sampled and tokens[-1] in stops for tokens, sampled in expected)
    stepped_back = sum(lane.stepped_back for lane in source.lanes)
    assert (stepped_back > 0) == (rollout_tokens is not None), stepped_back
    assert all(lane.pool.used == 0 for lane in source.lanes)


def test_log_probabilities_behind_an_answer_are_those_of_the_whole_document(rng, world):
    model = build(rng, world)
    prompt, stops = torch.randint(61, (9,), generator=rng).tolist(), tuple(range(0, 61, 4))
    environment = Drawn(rng, [[90, 3], [2, 40]])
    params = SamplingParams(200, stops, temperature=0.8)
    (group,) = MegatronSource(model).sample([Request(prompt, 2, params, environment=environment)])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for trajectory in group:
        logits = plain_logits(weights, model.model_config, prompt, trajectory.tokens)[len(prompt) - 1 : -1]
        told = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(trajectory.tokens).unsqueeze(1)).squeeze(1)
        mask = torch.tensor(trajectory.mask)
        assert 90 > (~mask).sum() > 0 or (~mask).sum() >= 42
        assert (torch.tensor(trajectory.logprobs, dtype=torch.float64) - told)[mask].abs().max() <= 1e-5


def test_a_trajectory_ends_where_nothing_could_be_said_behind_the_answer(rng, world):
    """The answer is then left out: there is nothing to learn behind it."""
    model = build(rng, world)
    prompt = torch.randint(61, (5,), generator=rng).tolist()
    request = Request(prompt, 3, SamplingParams(30, tuple(range(61))), environment=Drawn(rng, [[28], [29], [400]]))
    (group,) = MegatronSource(model).sample([request])
    assert [[len(p.tokens) for p in t.passages] for t in group] == [[1, 28, 1], [1], [1]]
    assert [t.finish_reason for t in group] == ["stop", "length", "length"]
    with pytest.raises(UserError, match="an environment answers with no token"):
        MegatronSource(model).sample([replace(request, environment=Drawn(rng, [[0], [1], [1]]))])


def test_a_turn_may_be_several_passages():
    """Of weights of several versions, as where servers get new ones meanwhile."""
    said = [Passage((1, 2), (-1.0, -1.0), 3), Passage((3,), (-1.0,), 4), Passage((8, 9)), Passage((4,), (-1.0,), 4)]
    assert [Trajectory(said[:n], "stop").turns for n in range(1, 5)] == [1, 1, 1, 2]
    assert last_turn(said) == ([1, 2, 3, 8, 9], [4]) and last_turn(said[:2]) == ([], [1, 2, 3])
