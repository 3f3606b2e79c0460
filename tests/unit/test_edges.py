"""What keeps draws from edges sees each kind of them."""

from __future__ import annotations

import pytest
import torch

from tests.edges import CLEAR, Edges

NEAR = CLEAR / 4


@pytest.mark.parametrize(
    ("kind", "compute"),
    [
        ("topk", lambda x: x.topk(1)),
        ("argmax", lambda x: x.argmax()),
        ("argmax", lambda x: x.argmax(-1)),
        ("clamp", lambda x: x.clamp(-4.0, 1.0)),
        ("clamp", lambda x: x.clamp(max=1.0)),
        ("clamp", lambda x: x.clamp(min=1.0)),
        ("clamp", lambda x: x.clamp(torch.tensor(-4.0), torch.tensor(1.0))),
    ],
)
def test_a_number_at_an_edge_is_seen(kind, compute):
    learnt = {"requires_grad": kind == "clamp"}  # a clamp without a gradient jumps nowhere
    near, far = torch.tensor([1.0 + NEAR, 1.0 - NEAR, -1.0], **learnt), torch.tensor([3.0, 2.0, -1.0], **learnt)
    with Edges() as edges:
        compute(far)
    assert edges.clear and edges.nearest >= 1
    with Edges(*{"topk", "argmax", "clamp"} - {kind}) as edges:
        compute(near)
    assert edges.clear
    with Edges(kind) as edges:
        compute(near)
    assert not edges.clear and edges.nearest == pytest.approx(2 * NEAR if kind != "clamp" else NEAR, rel=0.1)
