"""What the attention refuses, which kernel it takes, and the core-attention module's contract with Megatron."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.attention import PrefixGroupedCoreAttention, Scoring, kernels, prefix_grouped_attention
from megatron_ext.attention.kernels import KERNELS, select_kernel
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.megatron_config import megatron_config
from tests.layouts import error, plain_attention, randn


def transformer_config(**changes):
    """A valid Megatron configuration with single fields changed afterwards, past the checks of GPTModelConfig."""
    model = GPTModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48)
    return dataclasses.replace(megatron_config(model.on("cpu"), "cpu"), **changes)


def core_attention(mask: AttnMaskType = AttnMaskType.causal, kind: str = "self", scale=None, **changes):
    return PrefixGroupedCoreAttention(transformer_config(**changes), 3, mask, kind, softmax_scale=scale)


GROUPS = PrefixGroups.from_lengths([(5, [3, 2])])


@pytest.mark.parametrize("scale", [None, 0.3])
def test_core_attention_keeps_megatrons_shapes(scale, rng, world):
    """query [s, 1, np, hn], key and value [s, 1, ng, hn] -> [s, 1, np * hn], the default scale being hn^-0.5."""
    q, k, v = (randn(rng, 10, 1, heads, 8) for heads in (4, 2, 2))
    out = core_attention(scale=scale)(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=GROUPS)
    assert out.shape == (10, 1, 32)
    expected = plain_attention(q[:, 0], k[:, 0], v[:, 0], [(5, [3, 2])], scale)
    assert error(out.view(10, 4, 8), expected) <= 1e-10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1.*set attention_dropout: 0"),
        ({"hidden_dropout": 0.2}, "hidden_dropout=0.2.*set hidden_dropout: 0"),
        (
            {"context_parallel_size": 2, "cp_comm_type": "p2p"},
            "cp_comm_type='p2p': prefix grouping has all_gather, a2a",
        ),
        ({"window_size": (4, 4)}, r"window_size=\(4, 4\): attention here is causal"),
    ],
)
def test_refuses_settings_under_which_sharing_differs_from_repeating(changes, words, world):
    with pytest.raises(ValueError, match=words):
        core_attention(**changes)


@pytest.mark.parametrize(("field", "value"), [("apply_rope_fusion", True), ("fp8_dot_product_attention", True)])
def test_refuses_settings_that_megatron_itself_checks_first(field, value, world):
    """Set after Megatron's own checks, which differ between CPU and GPU."""
    config = transformer_config()
    setattr(config, field, value)
    config.fp8 = "hybrid"
    with pytest.raises(ValueError, match=field):
        PrefixGroupedCoreAttention(config, 1, AttnMaskType.causal, "self")


@pytest.mark.parametrize(
    ("mask", "kind"),
    [(AttnMaskType.no_mask, "self"), (AttnMaskType.arbitrary, "self"), (AttnMaskType.causal, "cross")],
)
def test_refuses_what_is_not_causal_self_attention(mask, kind, world):
    with pytest.raises(ValueError, match="layer 3: prefix grouping is causal self-attention"):
        core_attention(mask, kind)


@pytest.mark.parametrize("record", [None, PackedSeqParams(qkv_format="thd")])
def test_refuses_a_missing_or_foreign_record(record, rng, world):
    q = randn(rng, 10, 1, 4, 8)
    with pytest.raises(ValueError, match=f"layer 3.*must be a PrefixGroups, got {type(record).__name__}"):
        core_attention()(q, q, q, packed_seq_params=record)


def test_refuses_an_attention_bias(rng, world):
    q = randn(rng, 10, 1, 4, 8)
    with pytest.raises(ValueError, match="attention_bias"):
        core_attention()(q, q, q, attention_bias=torch.zeros(1), packed_seq_params=GROUPS)


def test_holds_no_state(world):
    """Recomputation and pipeline stages may run it in any order."""
    module = core_attention()
    assert not list(module.parameters()) and not list(module.buffers())


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((10, 4, 8), (10, 2, 8), (10, 4, 8)), "key, value"),
        (((1, 10, 4, 8),) * 3, "expected query"),
        (((12, 4, 8), (12, 2, 8), (12, 2, 8)), "record has 10 tokens, query 12"),
        (((10, 4, 8), (9, 2, 8), (9, 2, 8)), "query 10 and key 9"),
        (((10, 4, 8), (10, 3, 8), (10, 3, 8)), "4 query heads of 8 do not fit 3"),
        (((10, 4, 8), (10, 2, 4), (10, 2, 4)), "4 query heads of 8 do not fit 2 key/value heads of 4"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes, words):
    with pytest.raises(ValueError, match=words):
        prefix_grouped_attention(*(torch.zeros(s) for s in shapes), GROUPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
@pytest.mark.parametrize(
    ("attention_kernel", "device", "words"),
    [
        ("flash9", "cpu", "unknown attention_kernel 'flash9': choose one of auto, cpu, blockwise, torch_flash"),
        ("torch_flash", "cpu", "'torch_flash' cannot run on cpu"),
        ("cpu", "cuda", "'cpu' cannot run on cuda"),
        ("torch_flash", "cuda", "'torch_flash' needs a CUDA GPU"),
        ("flash_attn_2", "cuda", "'flash_attn_2' needs a CUDA GPU"),
        ("auto", "xpu", "no attention kernel runs on xpu"),
    ],
)
def test_refuses_a_kernel_that_cannot_run_here(attention_kernel, device, words):
    with pytest.raises(ValueError, match=words):
        select_kernel(attention_kernel, torch.device(device), Scoring(1.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_refuses_a_soft_cap_that_a_kernel_cannot_do():
    with pytest.raises(ValueError, match="'cpu' cannot cap scores; use one of auto, blockwise, flash_attn_2"):
        select_kernel("cpu", torch.device("cpu"), Scoring(1.0, softcap=30.0))


@pytest.mark.parametrize(("softcap", "name"), [(None, "cpu"), (30.0, "blockwise")])
def test_auto_takes_a_kernel_that_can_and_logs_it_once(softcap, name, caplog):
    kernels._log_choice.cache_clear()
    scoring = Scoring(1.0, softcap)
    with caplog.at_level(logging.INFO, logger="megatron_ext.attention.kernels"):
        assert select_kernel("auto", torch.device("cpu"), scoring) is KERNELS[name]
        select_kernel("auto", torch.device("cpu"), scoring)
    (record,) = caplog.records
    cap = " with a soft cap" if softcap else ""
    assert record.getMessage() == f"prefix-grouped attention{cap} uses the {name!r} kernel on cpu"
