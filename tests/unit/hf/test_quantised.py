"""Weights of 8 and 4 bits: what transformers makes of them, blocks that matrices do not fill, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.errors import UserError
from megatron_ext.hf import export_hf
from megatron_ext.hf.files import SINGLE_FILE, hf_weights_digest, read_headers
from megatron_ext.hf.load import read_checked_config
from megatron_ext.hf.quantised import with_scales
from megatron_ext.hf.tensors import read_slice
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.planner.parameters import stage_parameters
from tests.hf_folders import imported, set_config
from tests.hf_models import clear_text
from tests.quantised_models import BLOCK, QUANTISED, in_8_bits, make_4_bits, make_8_bits


@pytest.fixture(scope="module")
def folder(module_rng, tmp_path_factory):
    """DeepSeek-V3's kin as it is published."""
    path = tmp_path_factory.mktemp("eight") / "model"
    make_8_bits(path, module_rng)
    return path


def test_they_become_the_numbers_that_transformers_makes_of_them(folder, tmp_path, world, rng):
    """Bitwise, and what is written are plain numbers."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    asked = FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK)
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, quantization_config=asked)
    ours = imported(folder, world)
    export_hf(ours, tmp_path / "out", source=folder)
    written = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).state_dict()
    expected = theirs.state_dict()
    assert written.keys() == expected.keys() and len(written) > 40
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    text, logits = clear_text(tmp_path / "out", rng, 17)
    assert (text_logits(ours, text) - logits).abs().max() <= 1e-4


def test_blocks_that_a_matrix_does_not_fill(rng, tmp_path):
    """And a rank's part of them: rows and columns from and to anywhere."""
    block, weight = (8, 16), torch.randn(37, 29, generator=rng)
    quantised, scales = in_8_bits(weight, block)
    save_file({"a.weight": quantised, "a.weight_scale_inv": scales}, str(tmp_path / SINGLE_FILE))
    (name, stored), *rest = with_scales(read_headers(tmp_path), block).items()
    assert not rest
    expected = torch.tensor([[quantised[i, j].float() * scales[i // 8, j // 16] for j in range(29)] for i in range(37)])
    found = torch.empty(25, 13)
    read_slice(name, stored, (slice(5, 30), slice(7, 20)), found)
    assert torch.equal(found, expected[5:30, 7:20]) and (expected - weight).abs().max() < 0.2
    grouped = torch.empty(3, 4, 29, dtype=torch.bfloat16)
    read_slice(name, stored, (slice(20, 32),), grouped)
    assert torch.equal(grouped.flatten(0, 1), expected[20:32].bfloat16())


def test_gpt_oss_in_4_bits_becomes_what_transformers_makes_of_it(rng, tmp_path, world):
    """Bitwise, and written as plain numbers, all experts of a layer in one."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path / "model"
    found, quantised = make_4_bits(folder, rng)
    expected = found | {
        name: convert_moe_packed_tensors(*parts, dtype=torch.float32) for name, parts in quantised.items()
    }
    ours = imported(folder, world)
    named = [(name, tuple(parameter.shape)) for name, parameter in ours.named_parameters()]
    assert named == [(p.name, p.shape) for p in stage_parameters(ours.model_config, 0)]  # as the planner counts them
    export_hf(ours, tmp_path / "out", source=folder)
    written = load_file(str(tmp_path / "out" / SINGLE_FILE))
    assert written.keys() == expected.keys() and len(quantised) == 8
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    text, logits = clear_text(tmp_path / "out", rng, 17)
    assert (text_logits(ours, text) - logits).abs().max() <= 1e-4


def test_a_digest_sees_weights_of_8_bits(folder, tmp_path):
    found = load_file(str(folder / SINGLE_FILE))
    name = next(name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn)
    save_file(found, str(tmp_path / SINGLE_FILE))
    before = hf_weights_digest(tmp_path)
    found[name].view(torch.uint8)[0, 0] ^= 1
    save_file(found, str(tmp_path / SINGLE_FILE))
    assert hf_weights_digest(tmp_path) != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq'. are not read, only mxfp4, and fp8"),
        ({"weight_block_size": None}, "fp8 in e4m3 with a weight_block_size"),
        ({"fmt": "e5m2"}, "fp8 in e4m3"),
        ({"weight_block_size": [16, 8]}, "weight_scale_inv is F32 .* blocks of .16, 8. make it"),
    ],
)
def test_other_ways_to_quantise_are_refused(folder, tmp_path, changes, words):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    text = (folder / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(text)
    set_config(tmp_path, quantization_config=QUANTISED | changes)
    with pytest.raises(UserError, match=words):
        read_checked_config(tmp_path)


def test_scales_that_are_missing_or_not_spoken_of(folder, tmp_path):
    found = load_file(str(folder / SINGLE_FILE))
    scale = next(name for name in found if name.endswith("_scale_inv"))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: tensor for name, tensor in found.items() if name != scale}, str(tmp_path / SINGLE_FILE))
    with pytest.raises(UserError, match="is stored as F8_E4M3; quantised weights are not read"):
        read_checked_config(tmp_path)
    save_file(found, str(tmp_path / SINGLE_FILE))
    set_config(tmp_path, quantization_config=None)
    with pytest.raises(UserError, match="quantised weights are not read, take the model without them"):
        read_checked_config(tmp_path)
