"""Which layers a pipeline stage runs, as Megatron divides them: evenly, or with numbers of their own in the first and the last
stage; in one piece or, interleaved, in several (Megatron's virtual pipeline stages)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["PipelineSplit"]


@dataclass(frozen=True)
class PipelineSplit:
    """
    Attributes:
        layers: of the model.
        stages: ranks that share them.
        first, last: layers of these stages; None: as many as of those between.
        pieces: of each stage. Piece p of all stages comes before piece p + 1 of any.
    """

    layers: int
    stages: int
    first: int | None = None
    last: int | None = None
    pieces: int = 1

    def rules(self) -> Iterator[tuple[bool, str]]:
        """(whether it is broken, what is said then), for `GPTModelConfig`."""
        size = f"model.pipeline_model_parallel_size={self.stages}"
        named = {
            "model.num_layers_in_first_pipeline_stage": self.first,
            "model.num_layers_in_last_pipeline_stage": self.last,
        }
        for name, value in named.items():
            yield value is not None and self.stages == 1, f"{name}={value} needs more stages than {size}"
        given = " and ".join(f"{name}={value}" for name, value in named.items() if value is not None)
        left, between = self._left()
        divides = left >= between and left % between == 0 if between else left == 0
        if given:
            yield (
                not divides,
                f"{given} of model.num_layers={self.layers} leave {left} layers for the other {between} of {size} stages, who "
                "must have equally many, at least one",
            )
        else:
            yield (
                not divides,
                f"model.num_layers={self.layers} is not divisible by {size}; give the first or the last stage another number "
                "of layers (model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage), or choose "
                "another size",
            )
        pieces = f"model.virtual_pipeline_model_parallel_size={self.pieces}"
        yield self.pieces > 1 and self.stages == 1, f"{pieces} needs more stages than {size}"
        for stage, count in enumerate(self.counts()):
            yield (
                count % self.pieces,
                f"{pieces} does not divide the {count} layers of pipeline stage {stage} of {self.stages}",
            )

    def _left(self) -> tuple[int, int]:
        """Layers that are not given to a stage, and stages that share them."""
        given = [value for value in (self.first, self.last) if value is not None]
        return self.layers - sum(given), self.stages - len(given)

    def counts(self) -> list[int]:
        """Layers of each stage."""
        left, between = self._left()
        found = [left // between if between else 0] * self.stages
        if self.first is not None:
            found[0] = self.first
        if self.last is not None:
            found[-1] = self.last
        return found

    def stage(self, stage: int) -> list[range]:
        """The numbers of the layers of each of its pieces, from 0."""
        counts = self.counts()
        before, own = sum(counts[:stage]) // self.pieces, counts[stage] // self.pieces
        starts = (piece * (self.layers // self.pieces) + before for piece in range(self.pieces))
        return [range(start, start + own) for start in starts]
