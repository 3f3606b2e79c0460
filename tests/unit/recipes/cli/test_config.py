"""Strict configuration: what is taken, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_ext.errors import UserError
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.runtime.optim import OptimConfig, SchedConfig
from recipes.cli.config import ConfigError, at_least, build, nearest_key

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}


@dataclass
class Inner:
    size: int
    names: list[str] = field(default_factory=list)


@dataclass
class Outer:
    inner: Inner
    maybe: Inner | None = None
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    free: dict = field(default_factory=dict)
    whatever: Any = None
    either: int | str = 0
    flag: bool = False
    text: str = ""
    optim: OptimConfig = field(default_factory=OptimConfig)


def refused(cls, node, path="") -> str:
    with pytest.raises(ConfigError) as caught:
        build(cls, node, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_nested_sections():
    built = build(Outer, {"inner": {"size": 3}})
    assert built == Outer(Inner(3))
    node = {
        "inner": {"size": 3, "names": ["a", 1]},
        "maybe": {"size": 4},
        "pair": [5, 6],
        "many": [7, 8, 9],
        "table": {"x": 1},
        "free": {"anything": [1, {"goes": None}]},
        "whatever": {"name": "regex"},
        "optim": {"lr": 2, "sched": {"name": "linear"}},
    }
    built = build(Outer, node)
    assert built.inner.names == ["a", "1"]
    assert built.maybe == Inner(4)
    assert built.pair == (5, 6.0) and isinstance(built.pair[1], float)
    assert built.many == (7, 8, 9)
    assert built.table == {"x": 1.0} and isinstance(built.table["x"], float)
    assert built.free == node["free"] and built.whatever == node["whatever"]
    assert built.optim.sched == SchedConfig(name="linear")


def test_omegaconf_is_resolved():
    node = OmegaConf.create({"inner": {"size": "${pair.0}"}, "pair": [5, 1.5]})
    built = build(Outer, node)
    assert built.inner == Inner(5)
    assert type(built.pair) is tuple


def test_the_real_sections():
    model = build(GPTModelConfig, {**MODEL, "precision": 32, "position_embedding": {"base": 500000}}, "model")
    assert model.precision == "32" and isinstance(model.position_embedding.base, float)
    optim = build(OptimConfig, OmegaConf.create({"lr": "1e-4", "betas": [0.9, 0.99], "eps": "1e-8"}), "model.optim")
    assert optim.lr == 1e-4 and optim.eps == 1e-8 and optim.betas == (0.9, 0.99)


def test_a_section_that_is_built_already_is_kept():
    inner = Inner(3)
    assert build(Outer, {"inner": inner}).inner is inner


def test_unknown_key_names_the_nearest():
    message = refused(GPTModelConfig, {**MODEL, "hiden_size": 3}, "model")
    assert message == "unknown key model.hiden_size; did you mean model.hidden_size?"
    assert "did you mean inner?" in refused(Outer, {"iner": {"size": 1}})
    assert "optim.sched.warmup_steps?" in refused(Outer, {"inner": {"size": 1}, "optim": {"sched": {"warm_steps": 1}}})


def test_unknown_key_from_another_section():
    assert "did you mean optim.lr?" in refused(Outer, {"inner": {"size": 1, "lr": 1.0}})


def test_unknown_key_without_a_near_one_lists_what_is_known():
    message = refused(Outer, {"inner": {"size": 1, "zzz": 2}})
    assert message == "unknown key inner.zzz; known here: inner.size, inner.names"
    assert "unknown key 7" in refused(Outer, {"inner": {"size": 1}, 7: 2})


def test_nearest_key_prefers_the_same_section():
    known = ["a", "a.size", "b", "b.size", "b.sizes"]
    assert nearest_key("b.sise", known) == "b.size"
    assert nearest_key("c.size", known) == "a.size"
    assert nearest_key("model.qqq", known) is None


def test_missing_keys_name_type_and_place():
    message = refused(GPTModelConfig, {"num_layers": 2, "hidden_size": 64}, "model")
    assert message.startswith("missing keys model.num_attention_heads (int), model.ffn_hidden_size (int)")
    assert refused(Outer, {}).startswith("missing key inner (a section)")
    assert refused(Outer, {"inner": {}}).startswith("missing key inner.size (int)")


@pytest.mark.parametrize("key", ["num_layers", "precision"])
def test_question_marks_are_missing(key):
    """With a default, too: the YAML's author asked for a value."""
    message = refused(GPTModelConfig, OmegaConf.create({**MODEL, key: "???"}), "model")
    assert message.startswith(f"missing key model.{key} (")


WRONG = {
    "text for int": ({"inner": {"size": "three"}}, "inner.size must be int, got 'three'"),
    "digits for int": ({"inner": {"size": "3"}}, "inner.size must be int, got '3'"),
    "float for int": ({"inner": {"size": 3.0}}, "inner.size must be int, got 3.0"),
    "bool for int": ({"inner": {"size": True}}, "inner.size must be int, got true"),
    "null for int": ({"inner": {"size": None}}, "inner.size must be int, got null"),
    "int for bool": ({"flag": 1}, "flag must be true or false, got 1"),
    "text for bool": ({"flag": "true"}, "flag must be true or false, got 'true'"),
    "bool for str": ({"text": False}, "text must be str, got false; put it in quotes"),
    "list for str": ({"text": ["a"]}, "text must be str, got ['a']"),
    "text for float": ({"optim": {"lr": "fast"}}, "optim.lr must be float, got 'fast'"),
    "nan text for float": ({"optim": {"lr": "nan"}}, "optim.lr must be float, got 'nan'"),
    "nan for float": ({"optim": {"lr": float("nan")}}, "optim.lr must be float, got nan"),
    "infinity for float": ({"optim": {"lr": float("inf")}}, "optim.lr must be float, got inf"),
    "bool for float": ({"optim": {"lr": True}}, "optim.lr must be float, got true"),
    "value for section": ({"optim": 3}, "optim must be a section, got 3"),
    "null for section": ({"optim": None}, "optim must be a section, got null"),
    "value for optional section": ({"maybe": 3}, "maybe must be a section or null, got 3"),
    "inside an optional section": ({"maybe": {"size": "x"}}, "maybe.size must be int, got 'x'"),
    "text for list": ({"inner": {"size": 1, "names": "ab"}}, "inner.names must be a list of str, got 'ab'"),
    "inside a list": ({"inner": {"size": 1, "names": ["a", None]}}, "inner.names[1] must be str, got null"),
    "short tuple": ({"pair": [1]}, "pair must have 2 values, got 1: [1]"),
    "inside a tuple": ({"many": [1, 2.5]}, "many[1] must be int, got 2.5"),
    "list for dict": ({"table": [1]}, "table must be a mapping, got [1]"),
    "inside a dict": ({"table": {"x": "y"}}, "table.x must be float, got 'y'"),
    "neither of a union": ({"either": [1]}, "either must be int or str, got [1]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_name_key_value_and_type(name):
    node, message = WRONG[name]
    assert refused(Outer, {"inner": {"size": 1}, **node}) == message


def test_long_values_are_cut():
    assert len(refused(Outer, {"inner": {"size": "x" * 500}})) < 130


def test_unions_take_the_values_own_type():
    assert build(Outer, {"inner": {"size": 1}, "either": "32"}).either == "32"
    assert build(Outer, {"inner": {"size": 1}, "either": 32}).either == 32


def test_not_a_mapping():
    assert refused(Outer, [1], "model") == "model must be a section, got [1]"
    assert refused(Outer, OmegaConf.create([1])).startswith("the configuration must be a section")


def test_errors_of_the_dataclass_pass_through():
    with pytest.raises(ValueError, match="not divisible") as caught:
        build(GPTModelConfig, {**MODEL, "num_attention_heads": 5}, "model")
    assert not isinstance(caught.value, ConfigError)


def test_at_least_names_key_value_and_bound():
    at_least("inner", Inner(3), 3, "size")
    with pytest.raises(ValueError, match="^inner.size=3 must be at least 4$"):
        at_least("inner", Inner(3), 4, "size")
    at_least("outer", Outer(Inner(3)), 1, "whatever")  # None


def test_a_message_is_one_line_whatever_it_quotes():
    assert str(UserError("a\nb\r\nc")) == "a b c"
    assert issubclass(ConfigError, ValueError)


def test_a_field_that_cannot_be_checked_is_a_bug():
    @dataclass
    class Odd:
        data: set

    Odd.__annotations__["data"] = set
    with pytest.raises(TypeError, match="not supported"):
        build(Odd, {"data": [1]})
