"""What a step's dump says of log-probabilities."""

from __future__ import annotations

import json
import math

from torch import ones_like, tensor

from megatron_ext.models.media import pack_prompts
from recipes.grpo.batches import GRPOMicrobatch
from recipes.grpo.recorder import old_logprobs, with_scores
from tests.layouts import randn


def test_what_is_not_finite_is_not_known(rng):
    """In a step that is left out: JSON has no NaN, and how far sampler and trainer are apart is that of the other tokens."""
    batch = pack_prompts([[1, 2, 3]], [[[4, 5], [6, 7, 8]]], "text")
    values = randn(rng, 5).tolist()
    values[1], values[3] = math.nan, -math.inf
    ones = ones_like(old := tensor(values))
    made = GRPOMicrobatch(batch, advantages=ones, weights=ones, numbers=[(0, 0), (0, 1)], old_logprobs=old)
    scores = old_logprobs([made])
    assert [x is None for x in (*scores[0, 0], *scores[0, 1])] == [False, True, False, True, False]
    passages = [{"tokens": [4, 5], "logprobs": [0.0, 0.0]}, {"tokens": [6, 7, 8], "logprobs": [None, 0.0, 0.5]}]
    responses = [{"passages": [passage]} for passage in passages]
    first, second = with_scores({"number": 0, "responses": responses}, scores)["responses"]
    json.dumps([first, second], allow_nan=False)
    assert first["mismatch"]["max"] == abs(first["old_logprobs"][0])
    assert second["mismatch"]["max"] == abs(second["old_logprobs"][2] - 0.5)
