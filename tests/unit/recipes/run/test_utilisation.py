"""Model FLOPs utilisation, counted by hand."""

from __future__ import annotations

import pytest

from megatron_ext.grouping import PrefixGroups
from megatron_ext.models import GPTModelConfig
from megatron_ext.planner.hardware import hardware_of
from recipes.run.utilisation import Utilisation

H100 = "NVIDIA H100 80GB HBM3"


def tiny() -> GPTModelConfig:
    return GPTModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, vocab_size=128
    )


def by_hand(model: GPTModelConfig) -> float:
    """One pass over a prompt of 5 and responses of 3 and 4: 12 tokens, 7 that are predicted."""
    h, n, m, f, head = 32, 4, 2, 64, 8
    weights = h * (n + 2 * m) * head + n * head * h + 3 * h * f
    pairs = 5 * 5 / 2 + 3 * 3 / 2 + 3 * 5 + 4 * 4 / 2 + 4 * 5
    return 2 * (2 * weights * 12 + 4 * n * head * pairs) + 2 * h * model.padded_vocab_size * 7


@pytest.mark.parametrize(("scoring", "passes"), [(0, 3), (2, 5)])
def test_a_step_by_hand_on_one_rank_and_on_two(scoring, passes):
    """Twice the streams on twice the GPUs is the same share."""
    groups, model = PrefixGroups.from_lengths([(5, [3, 4])]), tiny()
    expected = passes * by_hand(model) / (0.25 * 989e12)
    one = Utilisation(model, H100, 1, lambda flops: [flops]).of_step([groups], scoring, 0.25)
    two = Utilisation(model, H100, 2, lambda flops: [2 * flops]).of_step([groups], scoring, 0.25)
    assert one == two == {"train_optim/mfu": pytest.approx(expected, rel=1e-12)}


def test_gpus_are_known_by_what_cuda_calls_them_and_others_have_no_number():
    names = {"NVIDIA A100-SXM4-80GB": "A100", H100: "H100", "NVIDIA H200": "H200", "NVIDIA B200": "B200"}
    assert {name: hardware_of(name).name for name in names} == names
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB", "Tesla T4", "NVIDIA GH200 480GB"):
        assert hardware_of(name) is None
    for name in (None, "Tesla T4"):
        assert Utilisation(tiny(), name, 1, lambda flops: [flops]).of_step([], 1, 1.0) == {}
