"""Read what a model said: responses of a run with their rewards, out of its rollouts/ (trainer.grpo.rollout_dump).

python tools/show_rollouts.py runs/grpo                        # of the last step the best and the worst three
python tools/show_rollouts.py runs/grpo --step 40 --worst 5
python tools/show_rollouts.py runs/grpo --prompt 7             # all responses of prompt 7 of the step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors
from recipes.data.visible import visible
from recipes.grpo.dump_files import FOLDER, StepDump, read_step, step_files

Answer = tuple[dict[str, Any], int, dict[str, Any]]  # of a prompt, its number among the samples, what it is


def find_step(run: Path, step: int | None) -> StepDump:
    """
    Args:
        step: None is the last.

    Raises:
        UserError: there is none.
    """
    files = step_files(run / FOLDER) or step_files(run)
    if not files:
        raise UserError(
            f"{run} has no rollouts: the run was not told to write them (trainer.grpo.rollout_dump={{}}), or is another"
        )
    chosen = max(files) if step is None else step
    if chosen not in files:
        raise UserError(f"{run} has no rollouts of step {chosen}; it has {_ranges(list(files))}")
    return read_step(files[chosen])


def _ranges(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps if len(steps) <= 6 else steps[:3]))
    return f"step {shown}" if len(steps) <= 6 else f"{len(steps)} steps, {shown}, ..., {steps[-1]}"


def chosen(dump: StepDump, best: int, worst: int, prompt: int | None) -> list[Answer]:
    """The answers to show, the best first; all of a prompt if one is named.

    Raises:
        UserError: there is no such prompt.
    """
    groups = [group for _, group in dump.groups]
    if prompt is not None:
        groups = [group for group in groups if group["number"] == prompt]
        if not groups:
            numbers = [group["number"] for _, group in dump.groups]
            raise UserError(f"{dump.path} has no prompt {prompt}; it has {min(numbers)} to {max(numbers)}")
    answers = [(group, i, answer) for group in groups for i, answer in enumerate(group["responses"])]
    answers.sort(key=lambda found: -found[2]["reward"])
    if prompt is not None or best + worst >= len(answers):
        return answers
    return answers[:best] + answers[len(answers) - worst :]


def printed(answers: list[Answer], marks: bool) -> Iterator[str]:
    """Lines, with everything that could move the cursor written out, line breaks apart.

    Args:
        marks: whether to name the prompt with each answer.
    """
    last = None
    for group, sample, answer in answers:
        if group is not last or marks:
            yield f"\n=== prompt {group['number']}, line {group['line']} of the data {group['row'] or ''}".rstrip()
            yield from _lines(group["prompt_text"])
            last = group
        tokens = sum(len(passage["tokens"]) for passage in answer["passages"])
        mismatch = answer["mismatch"]
        apart = f", sampler and trainer apart by {mismatch['max']:.2g} nats at most" if mismatch else ""
        yield (
            f"--- sample {sample}: reward {answer['reward']:g}, advantage {answer['advantage']:.3g}, {tokens} tokens, ended by "
            f"{answer['finish_reason']}{apart}"
        )
        yield from _lines(answer["text"])


def _lines(text: str) -> Iterator[str]:
    yield from map(visible, text.split("\n"))


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, or its rollouts/")
    parser.add_argument("--step", type=int, help="default: the last that was written")
    parser.add_argument("--best", type=int, help="so many with the highest rewards")
    parser.add_argument("--worst", type=int, help="so many with the lowest")
    parser.add_argument("--prompt", type=int, help="all responses of this prompt, by its number in the step, from 0")
    args = parser.parse_args()
    best, worst = args.best, args.worst
    if best is None and worst is None:
        best = worst = 3
    if min(best or 0, worst or 0) < 0:
        raise UserError("--best and --worst are numbers of responses, 0 or more")
    dump = find_step(args.run, args.step)
    header = dump.header
    print(
        f"{dump.path}: step {header['step']}, {header['written']} of {header['prompts']} prompts, "
        f"{header['samples_per_prompt']} responses each"
    )
    for line in printed(chosen(dump, best or 0, worst or 0, args.prompt), args.prompt is None):
        print(line)


if __name__ == "__main__":
    main()
