"""How the rows of a run are drawn: the order that the configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.data.curriculum import CurriculumSection, bins_of
from recipes.data.digests import row_digest
from recipes.data.mixture import Joined, MixedSampler, Share
from recipes.data.orders import PlainShuffle, Shuffle, TogetherShuffle
from recipes.data.sampler import EpochSampler, Sampler
from recipes.data.settings import TrainSetSection
from recipes.data.streaming import StreamedRows

__all__ = ["draw_order"]


def draw_order(
    sets: Mapping[str, Sequence[Any]],
    sections: Mapping[str, TrainSetSection],
    batch: int,
    steps: int,
    seed: int,
    *place: int,
    together: bool = False,
    curriculum: CurriculumSection | None = None,
) -> Sampler:
    """How rows of sets are drawn that stand one behind the other.

    Args:
        sets: rows by name; "" is that of data.train_path, which is the only one.
        sections: what the configuration says of them.
        place: rank and world.
        together: rows with the same prompt one behind the other.
        curriculum: from easy to hard, for one set.

    Raises:
        UserError: fewer rows than are drawn, or no bins of them.
    """
    options: dict[str, Any] = {}
    if any(isinstance(rows, StreamedRows) for rows in sets.values()):
        joined = Joined(sets.values())
        options["keeps"] = lambda i: joined[i] is not None
    if curriculum is not None:
        (rows,) = sets.values()
        bins = bins_of(curriculum, rows, batch)
        shares = [
            Share(f"bin {n + 1}", len(members), curriculum.weights_of(n, len(members)), None,
                  _shuffle([rows[i] for i in members] if together else members, together), members)
            for n, members in enumerate(bins)
        ]  # fmt: skip
        return MixedSampler(shares, batch, steps, seed, *place, stages=curriculum.stages)
    if "" in sets:
        return EpochSampler(_shuffle(sets[""], together), batch, seed, *place, **options)
    shares = []
    for name, rows in sets.items():
        section = sections[name]
        weight = len(rows) * (section.epochs or 1) if section.weight is None else section.weight
        shares.append(Share(name, len(rows), weight, section.epochs, _shuffle(rows, together)))
    return MixedSampler(shares, batch, steps, seed, *place, **options)


def _shuffle(rows: Sequence[Any], together: bool) -> Shuffle:
    if isinstance(rows, StreamedRows):
        return rows.shuffle
    return TogetherShuffle([_prompt_key(row) for row in rows]) if together else PlainShuffle(len(rows))


def _prompt_key(row: Any) -> bytes:
    prompt = getattr(row, "prompt", row)
    return row_digest([prompt.tokens, prompt.shown, [[*clip.files] for clip in prompt.media]])
