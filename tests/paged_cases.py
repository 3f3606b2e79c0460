"""Pools of pages with prompts and responses in them, and what a row of theirs must see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.attention import Scoring
from megatron_ext.attention.cache import Row
from megatron_ext.attention.pages import PAGE, PagePool, Table
from tests.layouts import randn

__all__ = ["LENGTHS", "PagedCase", "Written", "seen", "write"]

# Of prompts and of their responses.
LENGTHS = ((70, (1, 64, 33)), (5, (90,)), (128, (32, 2, 65, 31)), (31, (5,)))


@dataclass
class PagedCase:
    """Keys and values of some prompts and responses, on the host.

    Attributes:
        prompts, own: [2, tokens, m, d], of each prompt, and of each response by its prompt.
        query: [rows + pad, n, d].
        order: in which rows are decoded.
    """

    prompts: list[Tensor]
    own: list[list[Tensor]]
    query: Tensor
    order: list[int]

    @classmethod
    def draw(cls, rng, n: int, m: int, d: int, dtype: torch.dtype, lengths=LENGTHS, pad: int = 2) -> PagedCase:
        def tokens(count: int) -> Tensor:
            return randn(rng, 2, count, m, d).to(dtype)

        own = [[tokens(x) for x in responses] for _, responses in lengths]
        count = sum(map(len, own))
        order = torch.randperm(count, generator=rng).tolist()
        return cls([tokens(x) for x, _ in lengths], own, randn(rng, count + pad, n, d).to(dtype), order)

    @property
    def paths(self) -> list[Tensor]:
        """[2, tokens, m, d] of every row, its own token last."""
        flat = [torch.cat([p, x], 1) for p, group in zip(self.prompts, self.own, strict=True) for x in group]
        return [flat[i] for i in self.order]


@dataclass
class Written:
    """A case in a pool: rows, and the newest token of each, which the step itself writes; as many more as the padding."""

    pool: PagePool
    rows: list[Row]
    key: Tensor
    value: Tensor


def write(case: PagedCase, device: torch.device, heads_first: bool) -> Written:
    """Pages that were given back leave holes among the others, full of numbers."""
    pool, flat, gone = PagePool(heads_first=heads_first), [], []
    for number, (prompt, responses) in enumerate(zip(case.prompts, case.own, strict=True)):
        gone.append(_fill(pool, pool.new(shared=number % 2 == 0), case.prompts[0][:, :40], device))
        shared = _fill(pool, pool.new(shared=True), prompt, device)
        for x in responses:
            own = _fill(pool, pool.new(shared=False), x, device)
            flat.append(Row(shared, own, prompt.size(1), x.size(1)))
    for table in gone:
        pool.free(table)
    newest = torch.stack([path[:, -1] for path in case.paths], 1)
    pad = len(case.query) - len(flat)
    key, value = torch.cat([newest, newest[:, :pad]], 1).to(device)
    return Written(pool, [flat[i] for i in case.order], key, value)


def _fill(pool: PagePool, table: Table, x: Tensor, device: torch.device) -> Table:
    count, heads = x.shape[1:3]
    pool.extend(table, count)
    place, within = torch.tensor(pool.place(table)), torch.arange(count)
    flat = pool.flat_rows((place[within // PAGE]).to(device), (within % PAGE).to(device), heads)
    pool.write(1, flat, *x.to(device))
    return table


def seen(query: Tensor, path: Tensor, scoring: Scoring, sinks: Tensor | None = None) -> Tensor:
    """query [n, d] over its path [2, t, m, d], its own token last; sinks [n]."""
    keys, values = _windowed(path, scoring, len(query))
    scores = torch.einsum("nd,tnd->nt", query, keys) * scoring.scale
    if scoring.softcap:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if sinks is not None:
        scores = torch.cat((scores, sinks.unsqueeze(1)), 1)
    return torch.einsum("nt,tnd->nd", scores.softmax(-1)[:, : len(keys)], values)


def _windowed(path: Tensor, scoring: Scoring, n: int) -> Sequence[Tensor]:
    window = path.size(1) if scoring.window is None else scoring.window + 1
    return path[:, -window:].repeat_interleave(n // path.size(2), 2)
