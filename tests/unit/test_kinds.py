"""Every key has a kind: that of its field, or of the section around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_ext.kinds import Architecture, Kind, Layout, Record, Speed, Training, kind_of, kinds, names
from megatron_ext.models.config import GPTModelConfig
from recipes.registry import RECIPES


@dataclass
class Inner:
    depth: int
    width: Layout[int] = 1


@dataclass
class Outer:
    plain: Inner
    shape: Architecture[Inner]
    maybe: Speed[Inner | None] = None
    free: Record[dict[str, Any]] = field(default_factory=dict)


def test_a_key_without_a_kind_is_refused_by_name():
    with pytest.raises(TypeError, match=r"Inner.depth \(plain.depth\) has no kind"):
        kinds(Outer)
    with pytest.raises(TypeError, match="Inner.depth"):
        names(Inner, Kind.LAYOUT)


def test_a_section_says_it_for_its_keys_unless_they_do():
    @dataclass
    class Whole:
        outer: Training[Outer]

    Whole.__annotations__["outer"] = Training[Outer]
    known = kinds(Whole)
    assert known["outer"] == known["outer.plain"] == known["outer.plain.depth"] == Kind.TRAINING
    assert known["outer.shape"] == known["outer.shape.depth"] == Kind.ARCHITECTURE
    assert known["outer.maybe.depth"] == Kind.SPEED and known["outer.maybe.width"] == Kind.LAYOUT
    assert kind_of(known, "outer.free.name.of.anything") == Kind.RECORD
    assert names(Whole, Kind.TRAINING) == ("outer",) and names(Whole, Kind.LAYOUT) == ()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_every_recipe_has_a_kind(recipe):
    known = kinds(RECIPES[recipe].config_class())
    assert len(known) > 30 and set(known.values()) <= set(Kind)


def test_a_model_says_the_kind_of_each_key_itself(monkeypatch):
    """No section says it for them: a new one that nobody thinks about would not be compared with a checkpoint."""
    monkeypatch.setitem(GPTModelConfig.__annotations__, "num_layers", "int")
    for recipe in ("train_sft", "train_grpo", "train_lftf"):
        with pytest.raises(TypeError, match=r"num_layers \(model.num_layers\) has no kind"):
            kinds(RECIPES[recipe].config_class())
