"""Attention over pages equals attention over each row's own keys, in fp64, plain and by a kernel."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention import Scoring
from megatron_ext.attention.cache import DecodeStep
from tests.paged_cases import PagedCase, seen, write

SCORINGS = [Scoring(0.3), Scoring(0.3, window=40), Scoring(0.3, window=3), Scoring(0.3, softcap=2.0)]


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_a_row_sees_its_prompt_and_itself(heads, scoring, by_kernel, rng, world, monkeypatch):
    """Prompts of several lengths with one to four responses each."""
    if by_kernel:  # what a GPU does, by a kernel that runs here
        monkeypatch.setattr("megatron_ext.attention.cache.plain_way", lambda kernel: False)
    case = PagedCase.draw(rng, *heads, 8, torch.float64)
    there = write(case, world, heads_first=not by_kernel)
    kernel = "blockwise" if scoring.softcap and by_kernel else "auto"
    found = DecodeStep(there.pool, there.rows).attend(1, case.query, there.key, there.value, scoring, kernel)
    assert not found[len(there.rows) :].any()
    for row, query, path in zip(found, case.query, case.paths, strict=False):
        assert (row - seen(query, path, scoring)).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_may_be_far_apart(dtype, rng, world):
    """Hundreds of nats: what is far below the largest weighs nothing, seen or not.

    A score is a sum of d = 8 terms, of a size of 2000 or less together; its rounding, at most d + 2 times eps of that, moves
    weights by twice as much, and values are below 6.
    """
    case = PagedCase.draw(rng, 6, 2, 8, dtype)
    there, scoring = write(case, world, heads_first=True), Scoring(100.0)
    found = DecodeStep(there.pool, there.rows).attend(1, case.query, there.key, there.value, scoring)
    for row, query, path in zip(found, case.query, case.paths, strict=False):
        expected = seen(query.double(), path.double(), scoring)
        assert (row - expected).abs().max() <= 2 * 10 * 2000 * 6 * torch.finfo(dtype).eps


def test_pages_of_a_prompt_are_one_block_for_a_kernel(rng, world):
    case = PagedCase.draw(rng, 2, 2, 8, torch.float32, [(96, (1, 1)), (64, (1, 1))])
    there = write(case, world, heads_first=False)
    there.pool.tidy()
    (whole,) = DecodeStep(there.pool, there.rows)._of_window(None, True, case.query, 2).whole
    (first, second) = (len({r.prompt for r in there.rows}), len(there.rows))
    assert (first, second) == (2, 4) and {2, 3} <= set(whole.lengths)
