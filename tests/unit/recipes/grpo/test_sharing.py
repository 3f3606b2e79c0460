"""Trees are trained where responses have turns in common and counting operations says that it pays."""

from __future__ import annotations

import logging

import torch

from megatron_ext.rollouts import Passage, Trajectory
from recipes.cli.config import build
from recipes.data.rows import Prompt
from recipes.grpo.rollouts import Rollouts
from recipes.grpo.settings import GRPOModel
from recipes.grpo.sharing import Sharing
from recipes.run.sharing import LEAST_SHARED, Shared

MODEL = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "encoder_seq_length": 2048,
    "vocab_size": 97, "micro_batch_size": 1, "global_batch_size": 4, "optim": {"lr": 1e-4},
}  # fmt: skip


def rollouts(rng, prompt: int, common: int, own: int, turns: bool = True) -> Rollouts:
    """Four responses to one prompt: a first turn that they have in common, an answer to it, and a turn of their own."""

    def draw(count):
        return torch.randint(97, (count,), generator=rng).tolist()

    first, heard, responses = draw(common), draw(9), []
    for _ in range(4):
        last = draw(own)
        if turns:
            parts = [Passage(first, [-1.0] * common), Passage(heard), Passage(last, [-1.0] * own)]
        else:
            parts = [Passage([*first, *heard, *last], [-1.0] * (common + 9 + own))]
        responses.append(Trajectory(parts, "stop"))
    nothing = torch.zeros(1, 4, dtype=torch.float64)
    return Rollouts([Prompt(tuple(draw(prompt)), {}, 1)], [responses], nothing, nothing)


def sharing(**changes) -> Sharing:
    return Sharing(build(GRPOModel, MODEL | changes))


def test_the_form_follows_what_counting_promises(rng, caplog):
    caplog.set_level(logging.INFO)
    auto = sharing()
    alike = rollouts(rng, 100, 300, 10)
    assert auto.of(alike, [0]) == Shared(True, LEAST_SHARED)
    assert "prefix grouping is on, trees of what responses share from 8 tokens on" in caplog.text
    assert auto.of(rollouts(rng, 400, 3, 300), [0]) == Shared(True), "a dozen of tokens in common do not pay"
    assert auto.of(rollouts(rng, 2, 300, 10, turns=False), [0]).beginnings is None, "one turn: nobody looks"
    assert auto.of(rollouts(rng, 1, 0, 300, turns=False), [0]) == Shared(False)
    assert sharing(min_shared_tokens=None).of(alike, [0]) == Shared(True)
    assert sharing(min_shared_tokens=5).of(rollouts(rng, 1, 0, 9, turns=False), [0]) == Shared(True, 5)
    assert sharing(prefix_grouping=False).of(alike, [0]) == Shared(False)
    assert sharing(prefix_grouping=True, min_shared_tokens=None).of(rollouts(rng, 1, 0, 300), [0]) == Shared(True)


def test_a_choice_is_logged_when_it_changes(rng, caplog):
    caplog.set_level(logging.INFO)
    auto, alike, single = sharing(), rollouts(rng, 100, 300, 10), rollouts(rng, 100, 300, 10, turns=False)
    for given in (alike, alike, single, single, alike):
        auto.of(given, [0])
    assert caplog.text.count("prefix grouping is on") == 3 and caplog.text.count("trees") == 2
