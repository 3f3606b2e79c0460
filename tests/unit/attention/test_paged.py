"""Attention over pages equals attention over each row's own keys, in fp64, plain and by a kernel."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention import Scoring, paged
from megatron_ext.attention.cache import DecodeStep, Row
from megatron_ext.attention.pages import PAGE, PagePool
from tests.layouts import randn


def expected(q, keys, values, scoring: Scoring):
    """q [n, d], keys and values [t, m, d] of one path, the query's own last."""
    window = len(keys) if scoring.window is None else scoring.window + 1
    keys, values = (x[-window:].repeat_interleave(len(q) // x.size(1), 1) for x in (keys, values))
    scores = torch.einsum("nd,tnd->nt", q, keys) * scoring.scale
    if scoring.softcap:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    return torch.einsum("nt,tnd->nd", scores.softmax(-1), values)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize(
    "scoring", [Scoring(0.3), Scoring(0.3, window=40), Scoring(0.3, window=3), Scoring(0.3, softcap=2.0)]
)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_a_row_sees_its_prompt_and_itself(heads, scoring, by_kernel, rng, monkeypatch):
    """Prompts of several lengths with one to four responses each; pages freed in between leave holes full of numbers."""
    if by_kernel:  # what a GPU does, by a kernel that runs here
        monkeypatch.setattr(paged, "plain_way", lambda kernel: False)
        monkeypatch.setattr("megatron_ext.attention.cache.plain_way", lambda kernel: False)
    (n, m), d = heads, 8
    pool, rows, paths = PagePool(heads_first=not by_kernel), [], []

    def fill(table, count):
        pool.extend(table, count)
        x = randn(rng, 2, count, m, d).double()
        place, within = torch.tensor(pool.place(table)), torch.arange(count)
        pool.write(1, pool.flat_rows(place[within // PAGE], within % PAGE, m), *x)
        return x

    gone = []
    for length, responses in ((70, (1, 64, 33)), (5, (90,)), (128, (32, 2, 65, 31)), (31, (5,))):
        gone.append(pool.new(shared=length % 2 == 0))
        fill(gone[-1], 40)
        prompt = pool.new(shared=True)
        start = fill(prompt, length)
        for own in responses:
            table = pool.new(shared=False)
            x = fill(table, own)
            rows.append(Row(prompt, table, length, own))
            paths.append(torch.cat([start, x], 1))
    for table in gone:
        pool.free(table)
    order = torch.randperm(len(rows), generator=rng).tolist()
    rows, paths = [rows[i] for i in order], [paths[i] for i in order]
    q = randn(rng, len(rows) + 2, n, d).double()
    new = torch.stack([path[:, -1] for path in paths], 1)
    k, v = torch.cat([new, new[:, :2]], 1)  # with padding
    kernel = "blockwise" if scoring.softcap and by_kernel else "auto"
    found = DecodeStep(pool, rows).attend(1, q, k, v, scoring, kernel)
    assert not found[len(rows) :].any()
    for i, (keys, values) in enumerate(paths):
        assert (found[i] - expected(q[i], keys, values, scoring)).abs().max() <= 1e-12


def test_pages_of_a_prompt_are_one_block_for_a_kernel(rng):
    pool = PagePool(heads_first=False)
    rows = []
    for length in (96, 64):
        prompt = pool.new(shared=True)
        pool.extend(prompt, length)
        for _ in range(2):
            own = pool.new(shared=False)
            pool.extend(own, 1)
            rows.append(Row(prompt, own, length, 1))
    step = DecodeStep(pool, rows)
    found = step._of_window(None, True, torch.empty(0))
    whole = [read for read, bias in found if bias is None]
    assert [read.lengths for read in whole] == [(2, 3)] and len(found) == 2
