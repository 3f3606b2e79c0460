"""What trainer.grpo.objective may say, and what keys of before it say now."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.losses import ADVANTAGES, OBJECTIVES, Objective
from megatron_ext.losses.advantages import group_advantages
from megatron_ext.losses.clipped import Dapo, Grpo, Gspo
from recipes.cli.compose import compose, forced
from recipes.cli.config import build
from recipes.grpo.choices import get_advantages, get_objective
from recipes.grpo.settings import GRPOConfig, GRPOSettings
from tests.recipe_runs import ROOT


def settings(*overrides: str) -> GRPOSettings:
    given = ["data.train_path=x", "pretrained_checkpoint.restore_from_path=z", *overrides]
    return build(GRPOConfig, compose("grpo_tiny", forced(given))).trainer.grpo


def objective(said: str) -> str:
    return f"trainer.grpo.objective={said}"


@dataclass(frozen=True, kw_only=True)
class Mine(Objective):
    """One of one's own."""

    alpha: float
    advantages: str = f"{__name__}.halved"

    def policy_loss(self, tokens):
        return -self.alpha * tokens.advantages * tokens.log_ratio, {}


def halved(rewards, by=2.0):
    return group_advantages(rewards) / by


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_name_alone_is_the_papers(name):
    found = settings(objective(name))
    assert found.terms.objective == found.chosen == OBJECTIVES[name]()
    assert found.objective == {"name": name, **asdict(OBJECTIVES[name]())}  # a run's config.yaml says it all
    assert found.overlong_filtering == (name == "dapo")


def test_what_a_run_says_of_itself_is_read_as_it_was():
    found = settings(objective("{name: cispo, ratio_max: 3, advantages: {name: leave_one_out, normalize: true}}"))
    again = build(GRPOSettings, asdict(found), "trainer.grpo")
    assert again == found and again.chosen.ratio_max == 3
    rewards = torch.tensor([[1.0, 2, 4]])
    assert torch.equal(get_advantages(again.chosen)(rewards), ADVANTAGES["leave_one_out"](rewards, True))


def test_ones_own_objective_and_advantages():
    found = settings(objective(f"{{name: {__name__}.Mine, alpha: 2}}"))
    assert found.chosen == Mine(alpha=2.0) and found.objective["name"] == f"{__name__}.Mine"
    rewards = torch.tensor([[1.0, 2, 4]])
    assert torch.equal(get_advantages(found.chosen)(rewards), group_advantages(rewards) / 2)


def test_the_last_fifth_of_a_response_costs_under_dapo_unless_it_is_said():
    longest = settings().length_params.max_length
    assert settings().overlong_buffer == 0 and settings(objective("dapo")).overlong_buffer == round(longest / 5)
    assert settings(objective("dapo"), "++trainer.grpo.overlong_buffer=0").overlong_buffer == 0
    with pytest.raises(UserError, match=rf"overlong_buffer={longest + 1} must lie in \[0, .*max_length={longest}\]"):
        settings(f"++trainer.grpo.overlong_buffer={longest + 1}")


def test_groups_are_sampled_anew_under_dapo_unless_it_is_said():
    assert settings().max_sampling_rounds == 1 and settings(objective("dapo")).max_sampling_rounds == 10
    assert settings(objective("dapo"), "++trainer.grpo.max_sampling_rounds=1").max_sampling_rounds == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["++trainer.grpo.max_sampling_rounds=0"], "max_sampling_rounds=0 must be at least 1"),
        (
            ["++trainer.grpo.max_staleness=1", "++trainer.grpo.rollout={source: vllm, start: 1}"],
            "trainer.grpo.max_staleness=1 samples ahead of knowing it: set max_sampling_rounds=1, or max_staleness=0",
        ),
        (
            ["++trainer.grpo.rollout={source: file, path: x}", "data.train_path=null"],
            "trainer.grpo.rollout.source=file has all that there is: set max_sampling_rounds=1",
        ),
    ],
)
def test_what_cannot_sample_again_is_refused(given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        settings(objective("dapo"), *given)


def test_overlong_filtering_is_what_is_said():
    assert settings(objective("grpo"), "++trainer.grpo.overlong_filtering=true").overlong_filtering
    assert not settings(objective("dapo"), "++trainer.grpo.overlong_filtering=false").overlong_filtering


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Grpo()),
        ({"ratio_eps": 0.1}, Grpo(ratio_clip_min=0.1, ratio_clip_max=0.1)),
        ({"ratio_eps": 0.1, "ratio_clip_max": 0.28}, Grpo(ratio_clip_min=0.1, ratio_clip_max=0.28)),
        ({"ratio_clip_min": 0.1, "ratio_clip_max": "null"}, Grpo(ratio_clip_min=0.1)),
        ({"token_level_loss": "true"}, Grpo()),
        (
            {"token_level_loss": "false", "sequence_level_importance_ratios": "true"},
            Grpo(normalisation="sequence", sequence_level_ratios=True),
        ),
        ({"normalize_rewards": "false"}, Grpo(advantages="group_mean")),
        ({"use_leave_one_out_baseline": "true"}, Grpo(advantages={"name": "leave_one_out", "normalize": True})),
        (
            {"use_leave_one_out_baseline": "true", "normalize_rewards": "false"},
            Grpo(advantages={"name": "leave_one_out", "normalize": False}),
        ),
        (
            {"objective": "gspo", "sequence_level_importance_ratios": "true", "ratio_eps": 0.01},
            Gspo(ratio_clip_min=0.01, ratio_clip_max=0.01),
        ),
        ({"objective": "dapo", "token_level_loss": "true"}, Dapo()),
        ({"objective": "{name: dapo, ratio_clip_min: 0.1}", "ratio_clip_min": 0.1}, Dapo(ratio_clip_min=0.1)),
        ({"objective": "cispo", "sequence_level_importance_ratios": "false"}, OBJECTIVES["cispo"]()),
    ],
)  # fmt: skip
def test_earlier_keys_say_what_they_said(keys, expected):
    assert settings(*(f"trainer.grpo.{key}={value}" for key, value in keys.items())).chosen == expected


def test_a_run_of_before_there_were_objectives_is_the_one_that_would_go_on_now():
    """Its run.yaml says every key that there was."""
    now = asdict(settings())
    new = ("objective", "overlong_buffer", "high_entropy_share", "max_sampling_rounds")
    before = {key: value for key, value in now.items() if key not in new}
    before |= {
        "ratio_eps": 0.2,
        "ratio_clip_min": None,
        "ratio_clip_max": None,
        "token_level_loss": True,
        "sequence_level_importance_ratios": False,
        "normalize_rewards": True,
        "use_leave_one_out_baseline": False,
    }
    assert asdict(build(GRPOSettings, before, "trainer.grpo")) == now


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            [objective("gppo")],
            "trainer.grpo.objective: unknown objective gppo; did you mean gspo? There are cispo, dapo, dr_grpo",
        ),
        ([objective("{name: grpo, ratio_eps: 0.2}")], "unknown key trainer.grpo.objective.ratio_eps"),
        ([objective("{name: sapo, temperature_positiv: 2}")], "did you mean trainer.grpo.objective.temperature_positive?"),
        ([objective("{name: grpo, ratio_clip_max: high}")], "trainer.grpo.objective.ratio_clip_max must be float, got 'high'"),
        (
            [objective("{name: gspo, normalisation: token}")],
            "trainer.grpo.objective: gspo: normalisation=token contradicts this objective",
        ),
        (
            [objective("{name: grpo, advantages: groups}")],
            "trainer.grpo.objective.advantages: unknown kind of advantages groups; did you",
        ),
        (
            [objective("{name: grpo, advantages: {name: leave_one_out, normalise: true}}")],
            "did you mean trainer.grpo.objective.advantages.normalize?",
        ),
        ([objective("no_such_package.Mine")], "there is no module no_such_package"),
        ([objective(f"{__name__}.halved")], f"{__name__}.halved is no subclass of megatron_ext.losses.Objective"),
        ([objective(f"{__name__}.Mine")], "missing key trainer.grpo.objective.alpha (float)"),
        (
            [objective("gpg"), "trainer.grpo.ratio_eps=0.2"],
            "trainer.grpo.ratio_eps=0.2 says nothing to the objective gpg, which has no ratio_clip_min: leave it out",
        ),
        (
            [objective("cispo"), "trainer.grpo.sequence_level_importance_ratios=true"],
            "says nothing to the objective cispo, which has no sequence_level_ratios",
        ),
        ([objective("gspo"), "trainer.grpo.token_level_loss=true"], "gspo: normalisation=token contradicts this objective"),
        ([objective("dr_grpo"), "trainer.grpo.normalize_rewards=true"], "dr_grpo: advantages=group contradicts this objective"),
        (
            [objective("{name: dapo, ratio_clip_max: 0.3}"), "trainer.grpo.ratio_clip_max=0.2"],
            "trainer.grpo.ratio_clip_max=0.2 and trainer.grpo.objective.ratio_clip_max=0.3 contradict each other",
        ),
        (
            [objective("{name: grpo, advantages: gdpo}"), "trainer.grpo.rollout={source: file, path: x}", "data.train_path=null"],
            "objective.advantages=gdpo asks for each reward apart, and trainer.grpo.rollout.source=file has their sum alone",
        ),
    ],
)  # fmt: skip
def test_what_an_objective_is_not_is_refused_in_one_line(said, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        settings(*said)
    assert "\n" not in str(caught.value)


def test_the_page_lists_every_objective_option_and_kind_of_advantages():
    page = (ROOT / "docs/objective.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+)$", page, re.M))
    assert set(OBJECTIVES) | set(ADVANTAGES) <= set(rows)
    options = {option for make in OBJECTIVES.values() for option in asdict(make())}
    assert all(f"`{option}`" in page for option in options)


def test_what_is_given_by_name_alone_is_found_by_its_class():
    assert get_objective("dapo") == Dapo()
