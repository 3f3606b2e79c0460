"""Towers of transformers within the model: their features, what is computed once, and what trains."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.errors import UserError
from megatron_ext.hf.eyes import read_tower
from megatron_ext.hf.load import load_tower
from megatron_ext.models import build_gpt
from megatron_ext.models.media import pack_prompts
from megatron_ext.rotary import Video
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.preprocessing import Preprocessor
from tests.gpt_cases import randomize, small_config
from tests.vision_cases import IMAGE, SIDE, TOWERS, image_prompt, make_tower, pictures

kinds = pytest.mark.parametrize("kind", sorted(TOWERS))


def build(world, folder, vision=None, **changes):
    """fp64, a tower from the folder, random weights elsewhere."""
    eyes = VisionConfig(**{"tower": str(folder)} | read_tower(folder) | (vision or {}))
    model = build_gpt(small_config(vision=eyes, vocab_size=IMAGE + 1, **changes), world)
    randomize(model, torch.Generator().manual_seed(1))
    load_tower(model)
    return model.double()


def run(model, batch):
    return model(batch.tokens, batch.position_ids, batch.groups, labels=batch.labels, media=batch.media)


def prompts_of(rng):
    one, film = pictures(rng, 1), pictures(rng, 3)
    prompts = [image_prompt(rng, [2, one, 3, film, 1]), image_prompt(rng, [film, 2]), [5, 6, 7]]
    responses = [[[1, 2, 3], [4, 5]], [[7], [8, 9]], [[1, 2]]]
    return prompts, responses


@kinds
@pytest.mark.parametrize("layers", [-2, [0, 2, -1]])
def test_features_are_transformers_hidden_states(kind, layers, rng, world, tmp_path):
    theirs = make_tower(tmp_path / "tower", kind, rng).double()
    tower = build(world, tmp_path / "tower", {"vision_feature_layer": layers}).vision_tower
    media = [pictures(rng, 2), pictures(rng, 1)]
    found = tower(media)
    for parameter, expected in zip(tower.model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    states = theirs(torch.cat([m.values for m in media]).double(), output_hidden_states=True).hidden_states
    chosen = [
        states[layer][:, 1 if kind == "clip" else 0 :] for layer in ([layers] if isinstance(layers, int) else layers)
    ]
    expected = torch.cat(chosen, -1).flatten(0, 1)
    assert found.shape == (3 * 4, 24 * len(chosen)) and (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("trains", [False, True])
def test_a_frozen_tower_sees_each_clip_once(trains, rng, world, tmp_path):
    """Whatever the number of responses and passes, grouped or repeated: by content, in memory."""
    make_tower(tmp_path / "tower", "siglip", rng)
    model = build(world, tmp_path / "tower", freeze_vision_model=not trains)
    prompts, responses = prompts_of(rng)
    found = []
    for share in (True, False, True):
        batch = pack_prompts(prompts, responses, "rope", 16, share_prefix=share)
        logprobs, _ = run(model, batch)
        logprobs.sum().backward()
        found.append(logprobs.detach())
    assert model.vision_tower.seen == (3 * 2 if trains else 2), "one film stands in two prompts"
    for other in found[1:]:
        assert (found[0] - other).abs().max() < 1e-10


def test_what_trains(rng, world, tmp_path):
    """By the three switches; never the head and the layers above the one that is chosen."""
    make_tower(tmp_path / "tower", "siglip", rng)
    names = {}
    for switches in ((False, True, False), (True, False, True), (False, False, False)):
        keys = ("freeze_language_model", "freeze_vision_model", "freeze_vision_projection")
        model = build(world, tmp_path / "tower", **dict(zip(keys, switches, strict=True)))
        names[switches] = {name for name, p in model.named_parameters() if p.requires_grad}
        prompts, responses = prompts_of(rng)
        run(model, pack_prompts(prompts, responses, "rope", 16))[0].sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == names[switches]
        text, _ = run(model, pack_prompts([[1, 2]], [[[3], [4]]], "rope", 16))
        text.sum().backward()  # also where nothing but eyes trains
    eyes = ("vision_tower.", "media_projector.")
    assert not any(name.startswith("vision_tower.") for name in names[False, True, False])
    tower_alone = names[True, False, True]
    assert tower_alone and all(name.startswith("vision_tower.model.e") for name in tower_alone)
    assert not any(".layers.2." in name for name in tower_alone), "hidden state -2 of three layers is behind the second"
    assert any(".layers.1." in name for name in tower_alone)
    assert any(not name.startswith(eyes) for name in names[False, False, False])


def test_a_folder_keeps_features_for_later_runs(rng, world, tmp_path, caplog):
    """Another process's, too; damaged files are seen again; another tower's folder is refused."""
    make_tower(tmp_path / "tower", "siglip", rng)
    kept = {"cache_folder": str(tmp_path / "kept")}
    media = [pictures(rng, 2), pictures(rng, 1)]
    first = build(world, tmp_path / "tower", kept).vision_tower
    features = first(media)
    assert first.seen == 2
    second = build(world, tmp_path / "tower", kept).vision_tower
    assert torch.equal(second(media), features) and second.seen == 0
    (path,) = (tmp_path / "kept").glob(f"{media[0].key}.safetensors")
    spoilt = load_file(str(path))["features"] + 1
    save_file({"features": spoilt}, str(path), {"digest": "of something else"})
    third = build(world, tmp_path / "tower", kept).vision_tower
    assert torch.equal(third(media), features) and third.seen == 1 and "its clip is seen again" in caplog.text
    other = build(world, tmp_path / "tower", kept | {"vision_feature_layer": -1}).vision_tower
    with pytest.raises(UserError, match="kept holds the features of another tower"):
        other(media)
    shutil.rmtree(tmp_path / "kept")
    caplog.clear()
    more = [pictures(rng, 1) for _ in range(2)]
    expected = build(world, tmp_path / "tower").vision_tower(more)
    assert torch.equal(third(more), expected) and caplog.text.count("nothing more is kept in") == 1


def test_memory_is_bounded(rng, world, tmp_path):
    make_tower(tmp_path / "tower", "siglip", rng)
    size = 4 * 24 * 8  # of a picture's features in fp64
    tower = build(world, tmp_path / "tower", {"cache_gib": 2.5 * size / 2**30}).vision_tower
    media = [pictures(rng, 1) for _ in range(3)]
    for one in [*media, media[2], media[1]]:
        tower([one])
    assert tower.seen == 3
    tower([media[0]])
    assert tower.seen == 4, "the oldest had to go"


def test_pictures_and_features_that_do_not_fit(rng, world, tmp_path):
    make_tower(tmp_path / "tower", "siglip", rng)
    model = build(world, tmp_path / "tower", freeze_vision_model=False)
    blind = build_gpt(small_config(vision=VisionConfig(24), vocab_size=IMAGE + 1), world).double()
    batch = pack_prompts([image_prompt(rng, [1, pictures(rng, 1)])], [[[1]]], "rope", 16)
    with pytest.raises(UserError, match="the model has no model.vision.tower"):
        run(blind, batch)
    prompt = image_prompt(rng, [1, pictures(rng, 1)])
    features = type(prompt)(prompt.tokens, prompt.items, torch.zeros(4, 24))
    with pytest.raises(UserError, match="the tower that would compute them trains"):
        run(model, pack_prompts([features], [[[1]]], "rope", 16))
    with pytest.raises(UserError, match="some prompts have features and others pictures"):
        pack_prompts([features, prompt], [[[1]], [[1]]], "rope")
    with pytest.raises(UserError, match="has 1 media .1 x 2 x 2. and pictures of 2"):
        type(prompt).of(prompt.tokens, IMAGE, [Video(1, 2, 2)], [*prompt.content, *prompt.content])


@kinds
def test_what_is_left_at_the_edge_of_a_picture_belongs_to_no_patch(kind, rng, world, tmp_path):
    """As 384 pixels are 27 patches of 14."""
    side = SIDE + 3
    theirs = make_tower(tmp_path / "tower", kind, rng, image_size=side).double()
    read = read_tower(tmp_path / "tower")
    read["preprocessing"] |= {"size": {"height": side, "width": side}, "do_center_crop": False}
    eyes = Preprocessor.of(VisionConfig(**read))
    film = eyes.pixels(torch.randint(256, (3, 3, 20, 30), generator=rng, dtype=torch.uint8))
    assert film.patches == eyes.patches(3, 20, 30) == (3, 2, 2) and film.values.shape[2:] == (side, side)
    found = build(world, tmp_path / "tower").vision_tower([film])
    expected = theirs(film.values.double(), output_hidden_states=True).hidden_states[-2][:, int(kind == "clip") :]
    assert found.shape == (12, 24) and (found - expected.flatten(0, 1)).abs().max() < 1e-12


def test_a_folder_of_another_tower_is_refused(rng, world, tmp_path):
    make_tower(tmp_path / "tower", "siglip", rng)
    other = read_tower(tmp_path / "tower")["tower_config"] | {"intermediate_size": 48}
    with pytest.raises(UserError, match="has intermediate_size=40, and model.vision.tower_config says 48: leave"):
        build(world, tmp_path / "tower", {"tower_config": other})
