"""Pages of keys and values: what is written stays where it is looked for, and memory follows it."""

from __future__ import annotations

import torch

from megatron_ext.attention.pages import PAGE, PagePool, Table, pages_of


def draw(rng, high: int) -> int:
    return int(torch.randint(1, high + 1, (1,), generator=rng))


def write(pool: PagePool, table: Table, first: int, count: int, value: float) -> None:
    """The same number into tokens of both layers' keys, its negative into their values."""
    place = torch.tensor(pool.place(table))
    within = torch.arange(first, first + count)
    flat = pool.flat_rows(place[within // PAGE], within % PAGE, 2)
    for layer in (1, 2):
        x = torch.full((count, 2, 4), value * layer) + torch.arange(2).view(2, 1) / 4
        pool.write(layer, flat, x, -x)


def check(pool: PagePool, table: Table, values: list[float]) -> None:
    place = pool.place(table)
    for layer in (1, 2):
        for memory, sign in zip(pool.memory(layer, torch.empty(0, 2, 4)), (1, -1), strict=True):
            found = memory[place].flatten(0, 1)[: len(values)]  # [tokens, 2, 4]
            expected = torch.tensor(values).view(-1, 1, 1) * layer + torch.arange(2).view(1, 2, 1) / 4
            assert torch.equal(found, sign * expected.expand_as(found))


def test_contents_survive_growing_and_moving(rng):
    """Prompts and responses come, grow and go in any order, with and without a limit, in both memory layouts."""
    for limit, heads_first in ((None, True), (40, True), (40, False)):
        pool, there = PagePool(limit, heads_first), {}
        for number in range(400):
            if there and draw(rng, 3) == 1:
                table = list(there)[draw(rng, len(there)) - 1]
                pool.free(table)
                del there[table]
            else:
                grows = there and draw(rng, 2) == 1
                table = list(there)[draw(rng, len(there)) - 1] if grows else pool.new(shared=draw(rng, 3) == 1)
                said, more = there.setdefault(table, []), draw(rng, 90)
                needed = pages_of(len(said) + more) - len(table.pages)
                if pool.fits(needed):
                    pool.extend(table, len(said) + more)
                    write(pool, table, len(said), more, float(number))
                    said += [float(number)] * more
            pool.tidy()
            places = [page for table in there for page in pool.place(table)]
            assert len(set(places)) == len(places) == pool.used and all(0 <= p < pool.capacity for p in places)
            assert pool.peak <= pool.capacity <= pool.peak + pool.peak // 16 and pool.capacity <= (limit or 10**9)
        for table, said in there.items():
            check(pool, table, said)


def test_memory_grows_once_for_pages_that_are_given_together():
    for limit in (None, 50):
        pool = PagePool(limit)
        tables = [pool.new(shared=False) for _ in range(40)]
        for table in tables[:8]:
            pool.extend(table, PAGE)
        like = torch.empty(0, 2, 4)
        pool.memory(1, like)
        pool.extend(tables[8], PAGE, more=31 if limit is None else 100)
        grown = pool.memory(1, like)
        assert pool.capacity == (limit or 40)
        for table in tables[9:]:
            pool.extend(table, PAGE)
        assert pool.memory(1, like) is grown


def test_holes_are_closed_and_contents_move_with_their_pages(rng):
    for shared in (False, True):
        pool = PagePool(heads_first=not shared)
        tables = [pool.new(shared) for _ in range(40)]
        for number, table in enumerate(tables):
            pool.extend(table, PAGE)
            write(pool, table, 0, PAGE, float(number))
        stay = set(torch.randperm(40, generator=rng)[:10].tolist())
        for number, table in enumerate(tables):
            if number not in stay:
                pool.free(table)
        side = pool.top if shared else pool.bottom
        assert side.high >= 10 and len(side.holes) == side.high - 10
        pool.tidy()
        assert (side.high, side.holes) == (10, []) and pool.capacity == 40
        for number in stay:
            assert tables[number].pages[0] < 10
            check(pool, tables[number], [float(number)] * PAGE)


def test_the_pool_has_no_more_memory_than_its_pages():
    pool = PagePool()
    pool.extend(pool.new(shared=True), 70)
    pool.extend(pool.new(shared=False), 1)
    like = torch.empty(5, 2, 8, dtype=torch.float64)
    for layer, widths in ((3, (8, 8)), (4, (8, 6)), (5, (8,))):  # keys and values, narrower ones, compressed rows alone
        memory = pool.memory(layer, *(like[..., :width] for width in widths))
        assert [x.shape for x in memory] == [(4, PAGE, 2, width) for width in widths]
        assert [x.untyped_storage().nbytes() for x in memory] == [4 * PAGE * 2 * width * 8 for width in widths]
