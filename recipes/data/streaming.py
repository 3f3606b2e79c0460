"""Rows that are read when they are drawn, for what does not fit in memory.

They are drawn block by block (`BlockShuffle`), so that a few blocks in memory serve a window of rows, and each is checked when it
arrives as others are when a run begins.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.data.blocks import RowBlock, RowBlocks
from recipes.data.digests import RowsDigest, rows_digest
from recipes.data.errors import DataError
from recipes.data.orders import BlockShuffle
from recipes.data.rows import Pair, Prompt, Reading

__all__ = ["StreamedRows"]

logger = logging.getLogger(__name__)

FIRST_ROWS = 1024  # that are read before the run begins
KEPT_ROWS = 8192  # in tokens: what has been looked at, and is then used


class StreamedRows(Sequence):
    """
    Args:
        path: for messages.
        table: of blocks.
        window: blocks that are shuffled with one another, and in memory.
        samples: of each file, `sampled_digest`.
        check: refuses a row that is otherwise good; raises UserError.

    Attributes:
        shuffle: the order in which they should be drawn.
        talks: whether there was a conversation among the first rows.

    Raises:
        DataError: one of the rows of the first block.
    """

    def __init__(
        self,
        path: str | Path,
        table: RowBlocks,
        reading: Reading,
        window: int,
        samples: Sequence[str],
        check: Callable[[Any], None] | None = None,
    ):
        self.path, self.table, self.reading, self._check = path, table, reading, check
        self.shuffle = BlockShuffle(table.sizes, window)
        self._samples, self._rows = samples, reading.rows()
        self._blocks: OrderedDict[int, RowBlock] = OrderedDict()
        self._items: OrderedDict[int, Prompt | Pair | None] = OrderedDict()
        self._told = False
        for i in range(min(table.sizes[0], FIRST_ROWS)):
            self[i]
        for ours, theirs in self._rows.seen.unseen.items():
            raise DataError(
                f"none of the first {self._rows.seen.rows} rows of {path} has {theirs}, which data.fields.{ours} reads: name "
                "what they have, or leave it out"
            )
        self.talks = self._rows.seen.talked

    def __len__(self) -> int:
        return self.shuffle.count

    def __getitem__(self, place):
        """None: it is blank, or left out as too long."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place in self._items:
            self._items.move_to_end(place)
            return self._items[place]
        found = self._items[place] = self._read(place)
        if len(self._items) > KEPT_ROWS:
            self._items.popitem(last=False)
        return found

    def _read(self, place: int) -> Prompt | Pair | None:
        number = self.shuffle.block_of(place)
        placed = self._block(number).row(place - self.shuffle.first[number], self._rows.ignored)
        if placed is None:
            return None
        item = self.reading.read(self._rows, self._rows.read(*placed))
        if item is None:
            self._tell()
        elif self._check is not None:
            self._check(item)
        return item

    def _tell(self) -> None:
        """That a row is left out, of the first one."""
        if not self._told and os.environ.get("RANK", "0") == "0":
            logger.warning(
                "rows of %s are left out as too long; the first is %s", self.path, self._rows.seen.said_too_long
            )
        self._told = True

    def _block(self, number: int) -> RowBlock:
        if number not in self._blocks:
            self._blocks[number] = self.table.read(number)
            if len(self._blocks) > self.shuffle.window + 1:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    @property
    def digest(self) -> RowsDigest:
        """Of the files, by samples of them: a stream is not read to be known."""
        return RowsDigest(len(self), rows_digest([[*self._samples]]).whole, "")
