"""What is Qwen-VL's alone: positions, pictures of any size, what is read and refused. The rest: test_seeing.py."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.grouping import StreamEntry
from megatron_ext.hf import export_hf, hf_model_config, read_hf_config
from megatron_ext.models.media import pack_prompts
from megatron_ext.rotary import Text, layout
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.preprocessing import Preprocessor
from tests.conftest import fresh_generator
from tests.hf_folders import imported, set_config
from tests.seeing_families import SEEING, qwen_arguments
from tests.vision_cases import QWEN, make_qwen, patches, qwen_prompt

families = pytest.mark.parametrize("family", sorted(QWEN))


@pytest.fixture(scope="module")
def qwens(tmp_path_factory):
    """(folder, transformers' model) by family."""
    rng, root = fresh_generator(), tmp_path_factory.mktemp("qwen")
    return {f: (root / f, make_qwen(root / f, f, rng)) for f in QWEN}


@families
def test_positions_are_those_of_get_rope_index(family, qwens):
    """200 drawn layouts, prompt and response in one go."""
    folder, theirs = qwens[family]
    scheme, rng = read_hf_config(folder)["position_embedding"]["scheme"], fresh_generator()

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    for _ in range(200):
        parts: list = [draw(1, 6)]
        for _ in range(draw(1, 5)):
            t = draw(1, 6)
            parts += [patches(rng, t, 2 * draw(1, 6), 2 * draw(1, 6)), draw(1, 6)]
        prompt, length = qwen_prompt(rng, parts, family), draw(1, 9)
        given = qwen_arguments(prompt, [3] * length)
        given = {k: v for k, v in given.items() if not k.startswith("pixel")}
        expected, _ = theirs.model.get_rope_index(**given)
        table = layout([*prompt.items, Text(length)], scheme)
        assert torch.equal(table.ids, expected[:, 0])


def test_another_scheme_is_said_and_kept(qwens, world, tmp_path, caplog):
    """VRoPE in place of the family's: in the log at start and at export, and in the config.json."""
    folder, _ = qwens["qwen2_5_vl"]
    position = replace(hf_model_config(folder).position_embedding, scheme="vrope", sections=None)
    model = imported(folder, world, position_embedding=position)
    assert "media placed by 'qwen2_5_vl(tokens_per_second=2)', and here they are by 'vrope'" in caplog.text
    export_hf(model, tmp_path / "out", source=folder)
    assert "'vrope', which transformers does not know" in caplog.text
    raw, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", folder))
    assert raw.pop("position_scheme") == "vrope" and raw == before
    again = imported(tmp_path / "out", world)
    assert again.model_config.position_embedding == position
    back = hf_model_config(folder, precision="32")
    assert back.position_embedding.scheme == "qwen2_5_vl(tokens_per_second=2)"


@pytest.mark.parametrize("block", [1, 2])
def test_deepstack_feeds_a_stream_that_enters_above_its_tokens(block, qwens, rng, world):
    """At a layer that is fed, and behind all that are: the same as from its tokens on, bitwise."""
    model = imported(qwens["qwen3_vl"][0], world)
    batch = pack_prompts([SEEING["qwen3_vl"].mixed(rng)], [[[5, 6], [7]]], "qwen3_vl", 16)
    given = batch.tokens, batch.position_ids, batch.groups
    entering = []
    layer = model.decoder.layers[block]
    hook = layer.register_forward_pre_hook(
        lambda _, __, kwargs: entering.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        expected, _ = model(*given, labels=batch.labels, media=batch.media)
        hook.remove()
        entry = StreamEntry(block, entering[0])
        found, _ = model(*given, labels=batch.labels, media=batch.media, entry=entry)
        blind, _ = model(*given, labels=batch.labels, entry=entry)
    assert torch.equal(found, expected) and torch.equal(blind, expected) == (block == 2)


@pytest.mark.parametrize(
    ("layout_of", "words"),
    [
        ({"pipeline_model_parallel_size": 4}, "first pipeline stage has 1 of model.num_layers=4 layers, and the tower"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "has 1 of model.num_layers=4 layers in the first of 2 pieces, .* feeds the first 2",
        ),
        ({"num_layers": 1}, "has 2 deepstack_visual_indexes, more than model.num_layers=1"),
    ],
)
def test_layers_that_are_fed_stand_with_the_tower(layout_of, words, qwens):
    folder = qwens["qwen3_vl"][0]
    with pytest.raises(UserError, match=words):
        hf_model_config(folder, **layout_of)
    hf_model_config(folder, pipeline_model_parallel_size=2)
    hf_model_config(folder, pipeline_model_parallel_size=3, num_layers_in_first_pipeline_stage=2)


@pytest.mark.parametrize("shape", [(20, 31), (64, 30), (7, 9)])
def test_pictures_are_those_of_transformers_processor(shape, qwens, rng):
    """Of any size, bitwise; of a video the frames one behind the other."""
    from transformers import Qwen2VLImageProcessorPil

    folder, _ = qwens["qwen2_vl"]
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(folder))
    made = Preprocessor.of(VisionConfig(**read_hf_config(folder)["vision"]))
    frames = torch.randint(256, (3, 3, *shape), dtype=torch.uint8, generator=rng)
    pictures = [theirs([np.moveaxis(frame, 0, -1)], return_tensors="pt") for frame in frames.numpy()]
    for frame, expected in zip(frames, pictures, strict=True):
        found = made.pixels(frame.unsqueeze(0))
        assert (
            torch.equal(found.values, expected["pixel_values"])
            and [*found.patches] == expected["image_grid_thw"][0].tolist()
        )
    film = made.pixels(frames)
    t, h, w = film.patches
    assert (t, h, w) == (2, *pictures[0]["image_grid_thw"][0, 1:].tolist()) and made.grid(3, *shape) == (
        2,
        h // 2,
        w // 2,
    )
    halves = film.values.view(2, h * w, 3, 2, 16)  # [t, patches of a frame, colours, frames of a patch, pixels]
    for number, (moment, half) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        one = pictures[min(number, 2)]["pixel_values"].view(h * w, 3, 2, 16)
        assert torch.equal(halves[moment, :, :, half], one[:, :, 0])


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "qwen2_5_vl",
            {"text_config": {"hidden_size": 64}},
            "the tower gives 32 numbers for each token, the language model takes 64",
        ),
        ("qwen2_5_vl", {"sight_of_tomorrow": 3}, "sight_of_tomorrow=3 is not known of qwen2_5_vl"),
        (
            "qwen2_5_vl",
            {"vision_config": {"window_of_tomorrow": 3}},
            "window_of_tomorrow=3 is not known of qwen2_5_vl_vision",
        ),
        ("qwen2_5_vl", {"text_config": {"use_sliding_window": 7}}, "config.json: "),
        (
            "qwen3_vl",
            {"vision_config": {"deepstack_visual_indexes": [2, 0]}},
            r"deepstack_visual_indexes=\[2, 0\] must be numbers of the tower's 4 layers, ascending",
        ),
        (
            "qwen3_vl",
            {"vision_config": {"deepstack_visual_indexes": [1, 4]}},
            "must be numbers of the tower's 4 layers",
        ),
        ("qwen3_vl", {"text_config": {"attention_bias": True}}, "attention_bias=True is not supported"),
    ],
)
def test_what_is_not_computed_is_refused(family, changes, words, qwens, tmp_path):
    raw = json.loads((qwens[family][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    set_config(
        tmp_path, **{key: raw[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
    )
    with pytest.raises(UserError, match=words):
        read_hf_config(tmp_path)


def test_files_of_2024_say_all_in_one_object(qwens, tmp_path):
    """Qwen2-VL's, as it was published: no text_config, and the tower's own older names."""
    raw = json.loads((qwens["qwen2_vl"][0] / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    kept = {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "dtype") and v is not None}
    tower = raw["vision_config"] | {"model_type": "qwen2_vl", "in_chans": 3}
    (tmp_path / "config.json").write_text(json.dumps(raw | kept | old | {"vision_config": tower}))
    again, expected = read_hf_config(tmp_path), read_hf_config(qwens["qwen2_vl"][0])
    again["vision"]["preprocessing"] = expected["vision"]["preprocessing"]
    assert again == expected
