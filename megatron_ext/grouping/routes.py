"""Experts that the rows of a stream take because another pass, or a sampler, took them: router replay.

Of a stream that is trained on some passes later than it was sampled, a router may choose otherwise than it did: then importance
ratios compare two networks. Two ways to hold it (arXiv 2507.18071, 2510.11370): R2, the routes of the pass that says the old
log-probabilities; R3, the routes of the sampler. Routes are kept with the stream's record, and follow its rows wherever they are.

Shape legend: t rows of the stream, t_i of one rank, l layers, k experts of a token.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.grouping.record import PrefixGroups

__all__ = ["UNKNOWN", "RouteShape", "Routes", "stream_routes", "without_routes", "write_routes"]

UNKNOWN = -1
KEY = "routes"


class Routes:
    """
    Attributes:
        follows: whether routers take them; else they write down what they take.
        table: int64 [t, l, k], UNKNOWN where a row's router is free; None: each rank knows its own rows alone, as recorded.
        followed: rows of layers that took what they were told, since the last recording, on this rank.
    """

    def __init__(self, table: Tensor | None = None):
        self.table, self.follows, self.followed = table, table is not None, 0
        self._recorded: dict[int, Tensor] = {}

    @classmethod
    def record(cls, groups: PrefixGroups) -> Routes:
        """From now on routers write down what rows of this stream take, until `follow`."""
        groups.derived[KEY] = cls()
        return groups.derived[KEY]

    @classmethod
    def given(cls, groups: PrefixGroups, table: Tensor) -> Routes:
        """From now on rows of this stream take these."""
        groups.derived[KEY] = cls(table.to(groups.position_ids.device))
        return groups.derived[KEY]

    @staticmethod
    def of(groups: PrefixGroups) -> Routes | None:
        return groups.derived.get(KEY)

    def follow(self) -> None:
        """Take from now on what has been written down."""
        self.follows, self.followed = True, 0

    def write(self, layer: int, taken: Tensor) -> None:
        """taken: int64 [t_i, k], of this rank's rows; layers count from 0."""
        self._recorded[layer] = taken

    def read(self, layer: int, rows: Tensor | None, mine: slice) -> Tensor:
        """int64 [t_i, k].

        Args:
            rows: the stream's row behind each of the context-parallel rank's; None: it has all.
            mine: of those, this rank's.
        """
        if self.table is None:
            return self._recorded[layer]
        of_layer = self.table[:, layer]
        return (of_layer if rows is None else of_layer[rows])[mine]


@contextlib.contextmanager
def without_routes(streams: Iterable[PrefixGroups]) -> Iterator[None]:
    """Inside, routers are free, as those of another policy have to be."""
    kept = [(groups, groups.derived.pop(KEY, None)) for groups in streams]
    try:
        yield
    finally:
        for groups, routes in kept:
            if routes is not None:
                groups.derived[KEY] = routes


@dataclass(frozen=True)
class RouteShape:
    """Of a model's routes.

    Attributes:
        layers: all of the model's; those without experts have zeros.
        topk: experts of a token.
        experts: of a layer.
    """

    layers: int
    topk: int
    experts: int

    def read(self, text: object, tokens: int) -> np.ndarray:
        """What a vLLM server answers as `routed_experts` of a choice: base64 of a .npy file, integers [tokens - 1, l, k].

        Args:
            tokens: of the prompt and the response, whose last token no layer has seen.

        Raises:
            UserError: anything else.
        """
        try:
            found = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
        except (binascii.Error, ValueError, TypeError, EOFError, OSError) as error:
            raise UserError(
                f"routed_experts are no .npy file in base64 ({' '.join(str(error).split())[:80]})"
            ) from error
        if found.shape != (tokens - 1, self.layers, self.topk) or not np.issubdtype(found.dtype, np.integer):
            raise UserError(
                f"routed_experts are {found.dtype} {list(found.shape)}, not integers [{tokens - 1}, {self.layers}, {self.topk}]: "
                "one for each token but the last, layer and expert of a token"
            )
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < self.experts:
            wrong = int(found.min()) if found.min() < 0 else int(found.max())
            raise UserError(f"routed_experts name expert {wrong}, and the model has {self.experts}")
        return found


def write_routes(routes: np.ndarray) -> str:
    """What `RouteShape.read` reads."""
    with io.BytesIO() as file:
        np.save(file, routes, allow_pickle=False)
        return base64.b64encode(file.getvalue()).decode("ascii")


def stream_routes(groups: PrefixGroups, responses: Sequence[np.ndarray | None], layers: int, topk: int) -> Tensor:
    """Routes of every row of a stream, int64 [t, l, k]: of tokens that responses share those of the first that has some.

    Args:
        responses: for each response of the stream, [prompt + response - 1 tokens, l, k]; None: not known.
    """
    table = torch.full((groups.num_tokens, layers, topk), UNKNOWN)
    known = torch.zeros(groups.num_tokens, dtype=torch.bool)
    first, number = 0, 0
    for tree in groups.trees:
        for leaf in tree.leaves:
            routes = responses[number]
            number += 1
            if routes is None:
                continue
            for node in {0, *tree.path(leaf)}:
                begin, start = tree.first_positions[node], first + tree.starts[node]
                part = torch.from_numpy(routes[begin : begin + tree.lengths[node]].astype(np.int64))
                rows = torch.arange(start, start + len(part))
                new = ~known[rows]
                table[rows[new]], known[rows[new]] = part[new], True
        first += tree.num_tokens
    return table
