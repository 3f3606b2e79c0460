"""What is LLaVA's alone: what is refused, and its language model by itself. The rest: test_seeing.py."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf import hf_model_config, load_hf_weights, read_hf_config
from megatron_ext.models import build_gpt
from megatron_ext.models.prompt_streams import text_logits
from tests.conftest import fresh_generator
from tests.hf_folders import contents, imported, set_config
from tests.hf_models import SIZES
from tests.vision_cases import IMAGE, make_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(folder, transformers' model)."""
    folder = tmp_path_factory.mktemp("llava") / "clip"
    return folder, make_llava(folder, "clip", fresh_generator(), tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_config": None}, "config.json: vision_config must be an object, got None"),
        ({"architectures": ["LlavaModel"]}, r"architectures=\['LlavaModel'\] is no model of model_type=llava"),
        ({"quantization_config": {"bits": 4}}, "quantised weights .quantization_config. are not read"),
        ({"projector_of_tomorrow": 3}, "projector_of_tomorrow=3 is not known of llava"),
        ({"vision_feature_layer": 9}, "vision_feature_layer=9: the tower has hidden states"),
        ({"vision_feature_select_strategy": "full"}, "does not give one token for each patch"),
        ({"projector_hidden_act": 7}, "projector_hidden_act=7"),
    ],
)
def test_what_is_not_computed_is_refused(changes, words, llava, tmp_path):
    (tmp_path / "config.json").write_bytes((llava[0] / "config.json").read_bytes())
    set_config(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        read_hf_config(tmp_path)


def test_another_tower_than_the_folders(llava, world):
    folder = llava[0]
    config = hf_model_config(folder, precision="32")
    config.vision.vision_feature_layer = -1
    model = build_gpt(config, world)
    with pytest.raises(UserError, match="model.vision.vision_feature_layer is -1 here and -2 there"):
        load_hf_weights(folder, model)


def test_the_language_model_alone(llava, world, rng):
    folder, theirs = llava
    model = imported(folder, world, vision=None)
    text = torch.randint(IMAGE, (5,), generator=rng).tolist()
    with torch.no_grad():
        assert (text_logits(model, text) - theirs(input_ids=torch.tensor([text])).logits[0]).abs().max() < 1e-4
    assert model.model_config.num_layers == SIZES["num_hidden_layers"] and contents(folder)
