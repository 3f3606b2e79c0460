"""The haystack task says what its videos show, and its report adds up."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.runtime.optim import OptimConfig
from recipes.niah.report import headline, read_results, write_report
from recipes.niah.settings import NiahConfig, NiahModel, NiahSettings, NiahTrainerSection
from recipes.niah.task import (
    FEATURES,
    KINDS,
    LIKENESS,
    MARK,
    NEEDLE,
    NOISE,
    PLACE,
    PLACEHOLDER,
    QUESTION,
    VALUE,
    VALUES,
    VOCABULARY,
    answer_places,
    draw_sample,
)
from recipes.niah.trainer import NiahTrainer
from recipes.run.settings import FolderSection


def find(features: torch.Tensor, mark: int) -> tuple[int, int, int]:
    places = (features[..., mark] != 0).nonzero()
    assert len(places) == 1, "each needle once"
    return tuple(places[0].tolist())


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 1, 1), (5, 4, 3), (16, 2, 8)])
def test_answers_are_read_off_the_video(frames, height, width, rng):
    for _ in range(20):
        sample = draw_sample(rng, frames, height, width)
        assert sample.prompt.tokens == [PLACEHOLDER] * (frames * height * width)
        features = sample.prompt.content.view(frames, height, width, FEATURES)
        (a, row, column), (b, _, _) = find(features, 0), find(features, 1)
        value = int(features[a, row, column, 2 : 2 + VALUES].argmax())
        expected = [PLACE + row, PLACE + column, NEEDLE + int(b < a), VALUE + value]
        assert sample.questions == [[QUESTION + i, answer] for i, answer in enumerate(expected)]
        assert a != b and sample.depth == a / (frames - 1)
        shown = features[..., 2 : 2 + VALUES]
        assert bool((shown.sum(-1) == MARK).all()) and bool(((shown == 0) | (shown == MARK)).all())
    assert max(max(q) for q in sample.questions) < VOCABULARY and FEATURES == 2 + VALUES + NOISE


def test_distractors_stand_at_a_period_around_the_needle(rng):
    """They bear half of its mark, stand in other frames than it, and change neither the rest nor what is asked."""
    for period in (1, 3, 7, 40):
        frames, height, width = 30, 3, 2
        state = rng.get_state()
        plain = draw_sample(rng, frames, height, width)
        rng.set_state(state)
        sample = draw_sample(rng, frames, height, width, period=period)
        assert sample.questions == plain.questions and sample.depth == plain.depth
        found, before = (s.prompt.content.view(frames, height, width, FEATURES) for s in (sample, plain))
        a = find(before, 0)[0]
        marks = found[..., 0] - before[..., 0]
        assert torch.equal(found[..., 1:], before[..., 1:]) and set(marks.unique().tolist()) <= {0.0, LIKENESS * MARK}
        expected = [int(f != a and (f - a) % period == 0) for f in range(frames)]
        assert (marks != 0).sum((1, 2)).tolist() == expected


def test_the_needle_stands_where_it_is_asked_to_and_answers_are_balanced(rng):
    samples = [draw_sample(rng, 4, 2, 2, frame_a=1) for _ in range(400)]
    assert {s.depth for s in samples} == {1 / 3}
    for kind, name in enumerate(KINDS):
        counts = torch.tensor([s.questions[kind][1] for s in samples]).bincount()
        shares = counts[counts > 0] / len(samples)
        expected = {"row": 1 / 2, "column": 1 / 2, "value": 1 / VALUES}.get(name)
        if expected:
            assert (shares - expected).abs().max() <= 5 * math.sqrt(expected / len(samples))


def test_the_same_seed_draws_the_same_videos():
    one, two = (draw_sample(torch.Generator().manual_seed(4), 3, 2, 2) for _ in range(2))
    assert torch.equal(one.prompt.content, two.prompt.content) and one.questions == two.questions


def test_answers_are_the_second_token_of_each_question():
    assert answer_places(2).tolist() == [False, True] * 8


SETTINGS = {
    "train_frames": [2, 4],
    "test_frames": [2, 8, 16],
    "max_steps": 1,
    "height": 2,
    "width": 2,
    "test_videos": 1,
}


def result(scheme: str, seed: int, far: float, settings=SETTINGS) -> dict:
    cells = [
        {"frames": f, "depth": d, "row": far if f > 4 else 1.0, "column": far, "order": far, "value": far if d else 0.0}
        for f in settings["test_frames"]
        for d in (0.0, 1.0)
    ]
    return {"scheme": scheme, "seed": seed, "settings": settings, "cells": cells, "last_loss": 0.1, "seconds": 1.0}


def save(folder, *results) -> None:
    folder.mkdir(exist_ok=True)
    for r in results:
        (folder / f"result-{r['scheme']}-{r['seed']}.json").write_text(json.dumps(r))


def test_the_headline_counts_lengths_beyond_training_only(tmp_path):
    save(tmp_path / "a", result("rope", 1, 0.5), result("vrope", 1, 0.8))
    save(tmp_path / "b", result("rope", 2, 0.7))
    results = read_results([tmp_path / "a", tmp_path / "b"])
    # Of each far length's two depths times four kinds, one is 0.
    assert headline(results) == {
        "rope": pytest.approx([0.5 * 7 / 8, 0.7 * 7 / 8]),
        "vrope": pytest.approx([0.8 * 7 / 8]),
    }
    text = write_report(results, tmp_path / "report")
    assert "| rope | " in text and f"**{100 * 0.6 * 7 / 8:.1f} ± {100 * 0.2 * 7 / 8 / math.sqrt(2):.1f}**" in text
    assert (tmp_path / "report" / "report.md").read_text() == text
    assert (tmp_path / "report" / "niah.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_spread(tmp_path):
    text = write_report([result("rope", 4, 0.5), result("vrope", 4, 0.8)], tmp_path)
    assert "±" not in text and ", one seed; " in text and "one seed, so no spread" in text
    assert f"| **{100 * 0.8 * 7 / 8:.1f}** |" in text


def test_schemes_with_the_same_seeds_are_compared_without_a_word(tmp_path):
    text = write_report([result(name, seed, 0.5) for seed in (2, 1) for name in ("rope", "vrope")], tmp_path)
    assert ", 2 seeds; " in text and "mean ± standard deviation over seeds." in text and "**The schemes" not in text


def test_schemes_with_different_seeds_are_marked(tmp_path):
    runs = [result("rope", 3, 0.5), result("rope", 1, 0.7), result("vrope", 1, 0.8)]
    text = write_report(runs, tmp_path)
    assert "**The schemes were not run with the same seeds" in text and "Seeds of rope: 1, 3; vrope: 1." in text
    assert f"**{100 * 0.6 * 7 / 8:.1f} ± " in text and f"**{100 * 0.8 * 7 / 8:.1f}**" in text


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (result("rope", 1, 0.5), "scheme rope with seed 1 is in these folders twice"),
        (result("rope", 2, 0.5, SETTINGS | {"max_steps": 2}), "made with different settings"),
    ],
)
def test_refuses_results_that_do_not_belong_together(second, words, tmp_path):
    save(tmp_path / "a", result("rope", 1, 0.5))
    save(tmp_path / "b", second)
    with pytest.raises(ValueError, match=words):
        read_results([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="no result-"):
        read_results([tmp_path / "empty"])


def test_a_switch_of_schemes_begins_with_what_was_learnt(world, rng):
    """At a learning rate of nothing the model stays what the first scheme's was, and not what a fresh one is."""
    config = NiahConfig(
        NiahTrainerSection(niah=NiahSettings(videos_per_step=4, train_frames=[2, 3], height=2, width=2)),
        NiahModel(num_layers=1, hidden_size=32, ffn_hidden_size=48),
        FolderSection("unused"),
    )
    session = SimpleNamespace(
        config=config, is_main=False, device=world, data_rank=0, data_size=1, must_stop=lambda: ""
    )
    bar, trainer = SimpleNamespace(update=lambda: None), NiahTrainer(session)
    seed = int(torch.randint(1000, (), generator=rng))
    first, _ = trainer.train("rope", seed, 3, bar)
    learnt = {name: value.clone() for name, value in first.state_dict().items() if torch.is_tensor(value)}
    config.model.optim = OptimConfig(lr=1e-20, weight_decay=0.0)
    switched, fresh = (trainer.train("vrope", seed, 2, bar, weights)[0] for weights in (first.state_dict(), None))
    assert switched.model_config.position_embedding.scheme == "vrope" and len(learnt) > 5
    for name, value in learnt.items():
        assert torch.equal(switched.state_dict()[name], value), name
    assert any(not torch.equal(fresh.state_dict()[name], value) for name, value in learnt.items())
