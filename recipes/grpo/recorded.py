"""Trajectories out of files: of any agent framework, or of a run's own rollouts, with the rewards that they were given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.rollouts import Request, Trajectory
from recipes.data.errors import DataError
from recipes.data.jsonl import numbered_rows
from recipes.data.tokenizer import Tokenizer
from recipes.grpo.dump_files import FOLDER, FORMAT, StepDump, read_step, step_files
from recipes.grpo.recorded_rows import RecordedGroup, RowReader
from recipes.grpo.settings import GRPOConfig

__all__ = ["RecordedSource", "load_recorded"]

KEY = "trainer.grpo.rollout.path"


class RecordedSource:
    """Answers the request for prompt n of step s, from 1, with group (s - 1) * per_step + n.

    Args:
        groups: in the order of their use.
        per_step: prompts of a step.
    """

    def __init__(self, groups: Sequence[RecordedGroup], per_step: int):
        self._groups, self._per_step = groups, per_step

    def sample(self, requests: Sequence[Request]) -> list[list[Trajectory]]:
        return [self._group(request).trajectories for request in requests]

    def rewards(self, requests: Sequence[Request]) -> list[list[float]]:
        """Of each request's samples, as the file has them."""
        return [self._group(request).rewards for request in requests]

    def update_weights(self, version: int) -> None:
        """They sample nothing here."""

    def _group(self, request: Request) -> RecordedGroup:
        step, number = request.key[-2:]
        group = self._groups[(step - 1) * self._per_step + number]
        assert tuple(request.prompt) == group.prompt and request.samples == len(group.rewards), request.key
        return group


def load_recorded(config: GRPOConfig, tokenizer: Tokenizer) -> list[RecordedGroup]:
    """The groups of trainer.grpo.rollout.path, in the order of their use.

    Raises:
        DataError: something in them cannot be trained on, they are not enough, or a dump lacks what a replay needs.
    """
    path, grpo = Path(config.trainer.grpo.rollout.path), config.trainer.grpo
    dumps = _dumps(path, grpo.max_steps)
    reader = RowReader(config, tokenizer, replays=bool(dumps))
    if dumps:
        groups = [group for dump in dumps for group in _of_dump(reader, read_step(dump))]
    else:
        groups = reader.groups(numbered_rows(path), path)
    reader.check(path)
    steps = len(groups) // grpo.num_prompts_per_grpo_step
    if steps < grpo.max_steps:
        raise DataError(
            f"{KEY}={path} has {len(groups)} prompts, enough for {steps} steps of trainer.grpo.num_prompts_per_grpo_step="
            f"{grpo.num_prompts_per_grpo_step}: set trainer.grpo.max_steps={steps} or less (it is {grpo.max_steps}), or add rows"
        )
    return groups


def _dumps(path: Path, steps: int) -> list[Path]:
    """The files of a run's own, if that is what stands there."""
    if path.is_file():
        first = next(numbered_rows(path))[1]
        return [path] if first.get("format") == FORMAT else []
    if not path.is_dir():
        return []
    files = step_files(path / FOLDER) or step_files(path)
    missing = [step for step in range(1, steps + 1) if step not in files]
    if missing:
        raise DataError(
            f"{KEY}={path} has no rollouts of step {missing[0]}: a replay needs every step from the first to "
            f"trainer.grpo.max_steps={steps}, written with trainer.grpo.rollout_dump={{}} and no limit that removes old ones"
        )
    return [files[step] for step in range(1, steps + 1)]


def _of_dump(reader: RowReader, dump: StepDump) -> list[RecordedGroup]:
    """
    Raises:
        DataError: it was made otherwise than this run would, or is a sample of its step.
    """
    header, settings, tokenizer = dump.header, reader.settings, reader.tokenizer
    if not dump.full:
        raise DataError(
            f"{dump.path} is a sample, {header['written']} of the step's {header['prompts']} prompts: a replay needs all "
            "(trainer.grpo.rollout_dump.prompts=null in the run that writes them)"
        )
    temperature = header["sampling_params"]["temperature"]
    for name, was, now in (
        ("num_prompts_per_grpo_step", header["prompts"], settings.num_prompts_per_grpo_step),
        ("samples_per_prompt", header["samples_per_prompt"], settings.samples_per_prompt),
        ("sampling_params.temperature", temperature, settings.sampling_params.temperature),
    ):
        if was != now:
            raise DataError(
                f"{dump.path} was made with trainer.grpo.{name}={was}, this run has {now}: set it as it was"
            )
    if header["vocabulary"] != tokenizer.digests()["vocabulary"]:
        raise DataError(
            f"{dump.path} was made with another tokenizer than {tokenizer.path}: name the one that it had in "
            "model.tokenizer, such as that of the run's checkpoint"
        )
    return reader.groups(dump.groups, dump.path)
