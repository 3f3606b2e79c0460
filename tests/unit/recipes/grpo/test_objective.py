"""The loss of a microbatch, with old log-probabilities of a pass before the update and without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.losses import OBJECTIVES, GrpoTerms, Objective
from megatron_ext.losses.off_policy import OffPolicyTerms
from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optim import OptimConfig
from recipes.grpo.objective import as_means, objective
from tests.engine_cases import counts, make_microbatches
from tests.gpt_cases import make_rollout, randomize, small_config
from tests.layouts import randn

LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5]), (3, [9])]
FORMS = {
    "plain": (GrpoTerms(), None),
    "k3 and entropy": (GrpoTerms(kl_penalty=0.05, entropy_bonus=0.02), None),
    "weighted k3": (GrpoTerms(kl_penalty=0.05, kl_weighted=True), None),
    "k2, by response": (GrpoTerms(OBJECTIVES["gspo"](), kl_penalty=0.05, kl_type="k2"), None),
    "k1 in the reward": (GrpoTerms(kl_penalty=0.05, kl_type="k1", kl_in_reward=True), OffPolicyTerms()),
    "sampler's tokens": (GrpoTerms(), OffPolicyTerms("token", "mask", 0.7, 1.3)),
    "sampler's responses": (GrpoTerms(OBJECTIVES["gspo"]()), OffPolicyTerms("sequence")),
    **{name: (GrpoTerms(make(), kl_penalty=0.05), None) for name, make in OBJECTIVES.items() if name != "grpo"},
    "their mean": (GrpoTerms(entropy_bonus=0.02), OffPolicyTerms("geometric", "mask", 0.8, 1.2)),
}


@dataclass(frozen=True, kw_only=True)
class Talkative(Objective):
    def policy_loss(self, tokens):
        return -tokens.logprobs, {"ratio": tokens.weights.sum(), "mine": tokens.weights.sum()}


def test_a_metric_that_is_not_in_the_table_is_refused(rng, world):
    model = build_gpt(small_config(), world)
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0]], counts(rollout))
    with pytest.raises(
        UserError, match="Talkative gives metrics that nobody knows, mine: ratio and clip_fraction are logged"
    ):
        Engine(model, OptimConfig()).update(microbatches, partial(objective, terms=GrpoTerms(Talkative())))


def test_metrics_are_means_whatever_divides_the_loss():
    sums = {
        "loss": 3.0,
        "grad_norm": 2.0,
        "lr": 0.1,
        "weight": 0.5,
        "ratio": 0.5,
        "kl": 1.0,
        "sampler_logprob_diff_max": 7.0,
    }
    means = {"loss": 3.0, "grad_norm": 2.0, "lr": 0.1, "ratio": 1.0, "kl": 2.0, "sampler_logprob_diff_max": 7.0}
    assert as_means(sums) == means
    nothing = as_means({"loss": 0.0, "ratio": 0.0, "weight": 0.0, "importance": 0.0, "importance_squared": 0.0})
    assert nothing == {"loss": 0.0, "ratio": 0.0, "importance": 0.0, "effective_samples": 1.0}
    assert as_means({"weight": 0.5, "importance": 0.5, "importance_squared": 0.5})["effective_samples"] == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_a_pass_before_the_update_changes_no_bit_of_it(form, recompute, rng, world):
    """fp32, groups or trees, several streams: metrics, log-probabilities, every weight and Adam's moments behind the step."""
    terms, off_policy = FORMS[form]
    config = small_config(activations_checkpoint_granularity=recompute)
    start = build_gpt(config, world)
    randomize(start, rng)
    rollout = make_rollout(rng, LENGTHS, 61, common=4 * int(torch.randint(2, (), generator=rng)))
    microbatches = make_microbatches(rollout, [[0, 2], [1], [3]], counts(rollout), "sequence")
    asked = Engine(start).score(microbatches)
    microbatches = [
        replace(m, old_logprobs=None, sampled_logprobs=old + 0.3 * randn(rng, len(old)).float())
        for m, old in zip(microbatches, asked, strict=True)
    ]
    loss = partial(objective, terms=terms, off_policy=off_policy)
    found = {}
    for name in ("pass", "no pass", "no pass, told"):
        model = build_gpt(config, world)
        model.load_state_dict(start.state_dict())
        engine, given = Engine(model, OptimConfig(lr=1e-2)), microbatches
        if name == "pass":
            given = [replace(m, old_logprobs=old) for m, old in zip(microbatches, engine.score(given), strict=True)]
        if name == "no pass, told":
            metrics, told = engine.update_and_score(given, loss)
            assert all(torch.equal(a, b) for a, b in zip(told, asked, strict=True))
        else:
            metrics = engine.update(given, loss)
        found[name] = metrics, {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics, weights = found["pass"]
    assert metrics["ratio"] == metrics["weight"] and metrics.get("clip_fraction", 0) == 0
    assert metrics["grad_norm"] > 0 and metrics["sampler_logprob_diff"] > 0
    for name in ("no pass", "no pass, told"):
        assert found[name][0] == metrics
        assert all(torch.equal(found[name][1][n], w) for n, w in weights.items())
    assert all(not torch.equal(w, p) for w, p in zip(weights.values(), start.parameters(), strict=True))
