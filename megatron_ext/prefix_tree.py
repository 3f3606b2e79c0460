"""Prefix trees: token sequences with common beginnings, each beginning held once. Pure Python, no torch.

A group of GRPO is a tree of depth 1: the prompt is the root, its responses are the leaves. Agentic and multi-turn
rollouts share more than the prompt; their trees are deeper. Lengths are written nested, `(length, [children])`, and a
plain number is a leaf:

    (P, [S1, S2, S3])                  a prompt with three responses
    (P, [(A, [B, C]), D])              the first two responses share A behind the prompt
    (P, [(A, [0, B]), C])              the first response ends where the second goes on: a leaf of length 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ext.errors import UserError

__all__ = ["Nested", "PrefixTree", "causal_pairs"]

# (length, children), or a length: a leaf.
Nested = tuple[int, Sequence["Nested"]] | int


@dataclass(frozen=True)
class PrefixTree:
    """Lengths and shape of one tree, nodes in depth-first order, which is their order in a stream.

    Attributes:
        lengths: tokens of each node; node 0 is the root, the prompt.
        parents: each node's parent, -1 for the root.
        leaves: the node where each response ends, in the caller's order of the responses.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    leaves: tuple[int, ...]

    @classmethod
    def from_nested(cls, nested: tuple[int, Sequence[Nested]]) -> PrefixTree:
        """Read nested lengths; the outermost pair is the prompt with what continues it.

        Raises:
            UserError: a negative length, or something that is neither a number nor a pair.
        """
        lengths, parents, leaves = [], [], []
        stack: list[tuple[Nested, int]] = [(nested, -1)]
        while stack:
            node, parent = stack.pop()
            number = len(lengths)
            length, children = _read(node, nested)
            if children is None and parent < 0:
                raise UserError(f"a tree is (prompt length, [continuations]), got only {node!r}")
            lengths.append(length)
            parents.append(parent)
            if children is None:
                leaves.append(number)
            else:
                stack.extend((child, number) for child in reversed(children))
        return cls(tuple(lengths), tuple(parents), tuple(leaves))

    @classmethod
    def from_token_lists(
        cls, sequences: Sequence[Sequence[int]], prompt_length: int, min_shared: int = 1
    ) -> PrefixTree:
        """Find the common beginnings of sequences.

        Args:
            sequences: prompt plus response, as token ids. All begin with the same `prompt_length` tokens.
            prompt_length: tokens of the root. What follows is response, shared or not: it is predicted.
            min_shared: a beginning behind the prompt is shared from this many tokens on. Every level of a tree costs
                one more attention call, so sharing a token or two that responses have in common by chance costs more
                than it saves.

        Raises:
            UserError: no sequence, or one that does not begin with the prompt.
        """
        if not sequences:
            raise UserError("a tree needs at least one sequence")
        rows = [list(s) for s in sequences]
        for number, row in enumerate(rows):
            if len(row) < prompt_length or row[:prompt_length] != rows[0][:prompt_length]:
                raise UserError(
                    f"sequence {number} does not begin with the {prompt_length} prompt tokens of sequence 0"
                )
        lengths, parents, leaves = [prompt_length], [-1], [0] * len(rows)
        stack = [
            (cluster, prompt_length, end, 0) for cluster, end in reversed(_branches(rows, prompt_length, min_shared))
        ]
        while stack:
            members, start, end, parent = stack.pop()
            number = len(lengths)
            lengths.append(end - start)
            parents.append(parent)
            if len(members) == 1:
                leaves[members[0]] = number
                continue
            branches = _branches(rows, end, min_shared, members)
            stack.extend((cluster, end, stop, number) for cluster, stop in reversed(branches))
        return cls(tuple(lengths), tuple(parents), tuple(leaves))

    @cached_property
    def first_positions(self) -> tuple[int, ...]:
        """Tokens before each node on its path: the position of its first token."""
        starts = [0] * len(self.lengths)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                starts[node] = starts[parent] + self.lengths[parent]
        return tuple(starts)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each node in the tree's stream."""
        starts, row = [], 0
        for length in self.lengths:
            starts.append(row)
            row += length
        return tuple(starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the tree, each counted once."""
        return sum(self.lengths)

    @property
    def prompt_length(self) -> int:
        return self.lengths[0]

    def path(self, leaf: int) -> tuple[int, ...]:
        """Nodes from below the root down to `leaf`."""
        nodes = []
        while leaf > 0:
            nodes.append(leaf)
            leaf = self.parents[leaf]
        return tuple(reversed(nodes))

    @cached_property
    def response_lengths(self) -> tuple[int, ...]:
        """Tokens of each response, in the caller's order."""
        return tuple(self.first_positions[n] + self.lengths[n] - self.lengths[0] for n in self.leaves)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """One past the last row of each node's subtree, in the tree's stream."""
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        for node in range(len(ends) - 1, 0, -1):
            parent = self.parents[node]
            ends[parent] = max(ends[parent], ends[node])
        return tuple(ends)

    def flatten(self, sequences: Sequence[Sequence[int]]) -> list[int]:
        """The tree's stream of tokens, given each response's whole sequence (prompt included) in the caller's order."""
        stream = list(sequences[0][: self.lengths[0]]) if sequences else []
        stream += [0] * (self.num_tokens - len(stream))
        filled = {0}
        for sequence, leaf in zip(sequences, self.leaves, strict=True):
            for node in self.path(leaf):
                if node not in filled:
                    filled.add(node)
                    first, length, row = self.first_positions[node], self.lengths[node], self.starts[node]
                    stream[row : row + length] = sequence[first : first + length]
        return stream


def causal_pairs(first: int, length: int, window: int | None = None) -> float:
    """Query-key pairs of the rows at positions first .. first + length - 1 of a path, a causal square of n rows as n^2 / 2.

    With a window a row sees at most that many rows before it.
    """

    def below(end: int) -> float:  # of the rows at positions 0 .. end - 1
        full = end if window is None else min(end, window)
        return full * full / 2 + (end - full) * ((window or 0) + 0.5)

    return below(first + length) - below(first)


def _read(node: Nested, whole: object) -> tuple[int, Sequence[Nested] | None]:
    try:
        length, children = (node, None) if isinstance(node, int) else node
        length = int(length)
        children = None if children is None else list(children)
    except (TypeError, ValueError):
        raise UserError(f"a node is a length or (length, [children]), got {node!r}") from None
    if length < 0:
        raise UserError(f"lengths must not be negative, got {length} in {whole!r}")
    return length, children


def _branches(
    rows: Sequence[list[int]], start: int, min_shared: int, members: Sequence[int] | None = None
) -> list[tuple[list[int], int]]:
    """Split sequences that agree before `start` into clusters that go on together: [(members, end of what they share)].

    In order of first appearance. A sequence that ends at `start`, or shares too little with the others, is a cluster
    of its own that reaches to its end.
    """
    done: list[tuple[list[int], int]] = []
    pending = [(list(range(len(rows))) if members is None else list(members), start)]
    while pending:
        group, agreed = pending.pop()
        by_token: dict[int | None, list[int]] = {}
        for m in group:
            by_token.setdefault(rows[m][agreed] if agreed < len(rows[m]) else None, []).append(m)
        for token, part in by_token.items():
            if len(part) == 1 or token is None:
                done += [([m], len(rows[m])) for m in part]
                continue
            end = _common_end([rows[m] for m in part], agreed)
            if end - start >= min_shared:
                done.append((part, end))
            else:  # too short for all of them; some may go on together
                pending.append((part, end))
    return sorted(done, key=lambda branch: branch[0][0])


def _common_end(rows: list[list[int]], start: int) -> int:
    """Where rows that agree before `start` stop agreeing. The extremes in lexical order bound all others."""
    low, high = min(r[start:] for r in rows), max(r[start:] for r in rows)
    for i, token in enumerate(low):
        if token != high[i]:
            return start + i
    return start + len(low)
