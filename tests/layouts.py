"""Lengths of streams to test with, and the plain form of the same attention: one sequence per response.

Nothing here uses the record, the plan or the kernels: a stream's layout is worked out again from its lengths.

Shape legend: t rows of the stream, n query heads, m key/value heads, d head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "LAYOUTS", "Lengths", "documents", "error", "plain_attention", "plain_tree_attention", "random_lengths", "random_nested",
    "randn", "spans",
]  # fmt: skip

Lengths = list[tuple[int, list[int]]]

# Name -> (lengths, pad multiple). Odd lengths throughout.
LAYOUTS: dict[str, tuple[Lengths, int]] = {
    "unequal responses": ([(13, [5, 1, 8])], 1),
    "equal responses": ([(5, [3, 3, 3, 3])], 1),
    "one response": ([(7, [4])], 1),
    "no prefix": ([(0, [5, 3])], 1),
    "no prefix, one response": ([(0, [6])], 1),
    "empty responses": ([(6, [0, 4, 0, 7])], 1),
    "all but one response empty": ([(6, [0, 4])], 1),
    "no response": ([(9, [])], 1),
    "several groups": ([(11, [2, 7, 7]), (1, [1, 1]), (0, [4, 2]), (6, []), (3, [9])], 1),
    "several groups, pad": ([(11, [2, 7, 7]), (1, [1, 1]), (0, [4, 2]), (6, []), (3, [9])], 16),
    "pad longer than a segment": ([(3, [2, 2])], 64),
    "longer than a kernel block": ([(301, [37, 150, 37]), (65, [129, 3])], 16),
}


def documents(forest: list) -> list[tuple[list[int], bool]]:
    """Of nested lengths: the stream's rows of every path from a prompt to a node, and whether a response ends there."""
    found, row = [], 0

    def visit(node, path: list[int], root: bool) -> None:
        nonlocal row
        length, children = (node, None) if isinstance(node, int) else node
        path = [*path, *range(row, row + length)]
        row += length
        found.append((path, children is None and not root))
        for child in children or []:
            visit(child, path, False)

    for tree in forest:
        visit(tree, [], True)
    return found


def random_nested(rng: torch.Generator, depth: int = 4, largest: int = 9) -> tuple:
    """A random tree of at most `depth` levels below its prompt, zeros included."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    def node(level: int):
        length = draw(0, largest)
        if level and (level == depth or draw(0, 2) == 0):
            return length
        return (length, [node(level + 1) for _ in range(draw(1, 3))])

    length, children = node(0)
    return (length + 1, children)


def random_lengths(rng: torch.Generator, groups: int = 3, largest: int = 24) -> Lengths:
    """Random lengths, zeros included."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    return [(draw(1 if g == 0 else 0, largest), [draw(0, largest) for _ in range(draw(0, 5))]) for g in range(groups)]


def randn(rng: torch.Generator, *shape: int) -> Tensor:
    """fp64 normal numbers."""
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def spans(lengths: Lengths) -> list[tuple[range, list[range]]]:
    """Rows of each group: (prefix rows, [rows of each response])."""
    row, groups = 0, []
    for p, suffixes in lengths:
        prefix, row = range(row, row + p), row + p
        responses = []
        for s in suffixes:
            responses.append(range(row, row + s))
            row += s
        groups.append((prefix, responses))
    return groups


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float | None = None, **rules
) -> Tensor:
    """Causal softmax attention over [prefix, response], one response after the other, in the inputs' precision.

    query [t, n, d], key and value [t, m, d] -> [rows without the pad, n, d]. Differentiable. `rules`: softcap, window, sinks.
    """
    parts = []
    for prefix, responses in spans(lengths):
        documents = [[*prefix, *response] for response in responses] or [list(prefix)]
        outs = [_causal(query[rows], key[rows], value[rows], scale, **rules) for rows in documents]
        parts.append(outs[0][: len(prefix)])
        parts.extend(out[len(prefix) :] for out in outs)
    return torch.cat(parts)


def plain_tree_attention(query: Tensor, key: Tensor, value: Tensor, forest: list, **rules) -> Tensor:
    """The same for nested lengths: every path is a document, and each row is taken from the shortest that holds it."""
    out: dict[int, Tensor] = {}
    for rows, _ in documents(forest):
        if any(row not in out for row in rows):
            part = _causal(query[rows], key[rows], value[rows], **rules)
            out |= {row: part[i] for i, row in enumerate(rows) if row not in out}
    return torch.stack([out[row] for row in sorted(out)])


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One document: q [s, n, d], k and v [s, m, d] -> [s, n, d]."""
    s, n, d = q.shape
    k, v = (x.repeat_interleave(n // x.size(1), dim=1).transpose(0, 1) for x in (k, v))  # [n, s, d]
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * (1 / math.sqrt(d) if scale is None else scale)  # [n, s, s]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    hidden = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window - 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:  # one more column, without a value
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, s, 1)), -1)
    return (scores.softmax(-1)[..., :s] @ v).transpose(0, 1)


def error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from the fp64 truth."""
    return (value.double() - truth.double()).abs().max().item() if truth.numel() else 0.0
