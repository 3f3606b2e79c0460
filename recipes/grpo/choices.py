"""Objectives and advantages that the YAML names: ours by a name, one's own by dotted path, with options beside.

objective: dapo
objective: {name: grpo, normalisation: sequence, advantages: leave_one_out}
objective: {name: my_package.my_module.MyObjective, alpha: 2}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses import ADVANTAGES, OBJECTIVES, Objective
from megatron_ext.losses.advantages import takes_each
from recipes.cli.config import ConfigError, at_least, show
from recipes.cli.named import Registry, Spec

__all__ = [
    "advantages_file", "get_advantages", "get_objective", "objective_file", "of_earlier_keys", "settle", "takes_each_reward",
]  # fmt: skip

SECTION = "trainer.grpo"
KEY = f"{SECTION}.objective"
GRPO = "grpo"
# Keys of before there were objectives, which still say what they said.
EARLIER = (
    "ratio_eps",
    "ratio_clip_min",
    "ratio_clip_max",
    "sequence_level_importance_ratios",
    "token_level_loss",
    "normalize_rewards",
    "use_leave_one_out_baseline",
)
_OBJECTIVES = Registry(KEY, "objective", "class")
_ADVANTAGES = Registry(f"{KEY}.advantages", "kind of advantages", "function")
for _name, _objective in OBJECTIVES.items():
    _OBJECTIVES.register(_name)(_objective)
for _name, _advantages in ADVANTAGES.items():
    _ADVANTAGES.register(_name)(_advantages)


def get_objective(spec: Spec) -> Objective:
    """
    Raises:
        ConfigError: an unknown name, a module that does not import, something else than an `Objective`, wrong options.
        UserError: options that are refused.
    """
    name, target, options = _OBJECTIVES.find(spec)
    if not (isinstance(target, type) and issubclass(target, Objective)):
        raise ConfigError(f"{KEY}: {name} is no subclass of megatron_ext.losses.Objective")
    try:
        objective = _OBJECTIVES.with_options(name, target, options)
    except ConfigError:
        raise
    except UserError as error:
        raise UserError(f"{KEY}: {name}: {error}") from error
    get_advantages(objective)
    return objective


def get_advantages(objective: Objective) -> Callable[..., Tensor]:
    """A function of the rewards [prompts, samples] of a step, or of each and their weights: see
    `megatron_ext.losses.advantages`.

    Raises:
        ConfigError: an unknown name, a module that does not import, wrong options.
    """
    return _ADVANTAGES.with_options(*_ADVANTAGES.find(objective.advantages), takes=1 + takes_each_reward(objective))


def takes_each_reward(objective: Objective) -> bool:
    """Whether its advantages are made of each reward apart."""
    return takes_each(_ADVANTAGES.find(objective.advantages)[1])


def settle(settings: Any) -> None:
    """Say in full what `trainer.grpo` leaves to the objective: all of its options, and what goes with it.

    Args:
        settings: a `GRPOSettings`; what has been said is left.

    Raises:
        UserError: impossible values, or what cannot sample again and should.
    """
    objective = get_objective(settings.objective)
    settings.objective = {"name": _OBJECTIVES.name(settings.objective), **asdict(objective)}
    longest = settings.length_params.max_length
    if settings.overlong_filtering is None:
        settings.overlong_filtering = objective.FILTERS_OVERLONG
    if settings.overlong_buffer is None:
        settings.overlong_buffer = round(objective.OVERLONG_BUFFER * longest)
    if settings.max_sampling_rounds is None:
        settings.max_sampling_rounds = objective.SAMPLING_ROUNDS
    if not 0 <= settings.overlong_buffer <= longest:
        raise UserError(
            f"{SECTION}.overlong_buffer={settings.overlong_buffer} must lie in [0, {SECTION}.length_params.max_length={longest}]"
        )
    if not 0 < settings.high_entropy_share <= 1:
        raise UserError(f"{SECTION}.high_entropy_share={settings.high_entropy_share} must lie in (0, 1]")
    at_least(SECTION, settings, 1, "max_sampling_rounds")
    if settings.rollout.source == "file" and takes_each_reward(objective):
        raise UserError(
            f"{KEY}.advantages={objective.advantages} asks for each reward apart, and {SECTION}.rollout.source=file has "
            "their sum alone: name other advantages, or sample"
        )
    if settings.max_sampling_rounds > 1:
        _check_sampling_again(settings)


def _check_sampling_again(settings: Any) -> None:
    rounds = f"{SECTION}.max_sampling_rounds={settings.max_sampling_rounds} (as said, or of {KEY}={settings.objective['name']})"
    if settings.max_staleness:
        raise UserError(
            f"{rounds} samples again where groups have no signal, and {SECTION}.max_staleness={settings.max_staleness} samples "
            "ahead of knowing it: set max_sampling_rounds=1, or max_staleness=0"
        )
    if settings.rollout.source == "file":
        raise UserError(
            f"{rounds} samples again, and {SECTION}.rollout.source=file has all that there is: set max_sampling_rounds=1"
        )


def objective_file(spec: Spec) -> Path | None:
    """Where one of one's own is written, once it has been got; None for ours."""
    return _OBJECTIVES.file(spec)


def advantages_file(objective: Objective) -> Path | None:
    """The same for its advantages."""
    return _ADVANTAGES.file(objective.advantages)


def of_earlier_keys(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """`trainer.grpo` with options of the objective in place of the keys of before there were objectives.

    Raises:
        ConfigError: an option that the objective has not, or that is given both ways.
    """
    said = _said_earlier(section)
    if not said:
        return {key: value for key, value in section.items() if key not in EARLIER}
    spec = section.get("objective", GRPO)
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, target, _ = _OBJECTIVES.find(spec)
    known = {f.name for f in fields(target)} if is_dataclass(target) else set()
    for option, (key, value) in said.items():
        place = f"{SECTION}.{key}={show(section[key])}"
        if option in spec and spec[option] != value:
            raise ConfigError(
                f"{place} and {KEY}.{option}={show(spec[option])} contradict each other: leave the first out"
            )
        if option not in known and value is not False:
            raise ConfigError(f"{place} says nothing to the objective {name}, which has no {option}: leave it out")
    options = {option: value for option, (_, value) in said.items() if option in known}
    return {key: value for key, value in section.items() if key not in EARLIER} | {"objective": spec | options}


def _said_earlier(section: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """option -> (key that says it, value)."""
    given = {key: section[key] for key in EARLIER if section.get(key) is not None}
    said: dict[str, tuple[str, Any]] = {}
    for option in ("ratio_clip_min", "ratio_clip_max"):
        if key := next((key for key in (option, "ratio_eps") if key in given), None):
            said[option] = key, given[key]
    if (key := "sequence_level_importance_ratios") in given:
        said["sequence_level_ratios"] = key, given[key]
    if (key := "token_level_loss") in given:
        said["normalisation"] = key, "token" if given[key] else "sequence"
    if keys := [key for key in ("use_leave_one_out_baseline", "normalize_rewards") if key in given]:
        divided, others = given.get("normalize_rewards", True), given.get("use_leave_one_out_baseline", False)
        ours = {"name": "leave_one_out", "normalize": divided} if others else "group" if divided else "group_mean"
        said["advantages"] = keys[0], ours
    return said
