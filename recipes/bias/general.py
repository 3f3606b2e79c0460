"""General ability: any task of lm-evaluation-harness that asks for likelihoods, by name, of the model that is being evaluated.

Needs the extra `harness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.bias.measures import Measure
from megatron_ext.errors import UserError
from recipes.bias.scorers import Scorer
from recipes.data.tokenizer import Tokenizer

__all__ = ["HarnessTasks", "LoadedTasks"]


NOT_KNOWN = (
    False  # whether an answer is the one that greedy sampling would give: tasks whose metrics ask for it are refused
)


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks, groups or tags that are to be asked.

    Attributes:
        names: as the harness calls them.
        include_path: a folder of tasks of one's own; None: the harness's alone.
        num_fewshot: examples before each question; None: as each task says.
        limit: questions of each task; None: all.
    """

    names: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that have been found and whose data have been read.

    Attributes:
        manager: the harness's.
    """

    tasks: HarnessTasks
    manager: Any

    @classmethod
    def load(cls, tasks: HarnessTasks) -> LoadedTasks:
        """
        Raises:
            UserError: no harness, no such task, data that cannot be had, or a task that needs more than likelihoods.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"data.harness.tasks needs lm-evaluation-harness ({error}): pip install 'megatron-ext[harness]'"
            ) from error
        manager = TaskManager(include_path=tasks.include_path, include_defaults=tasks.include_path is None)
        if tasks.include_path is not None and set(tasks.names) - set(manager.all_tasks):
            manager = TaskManager(include_path=tasks.include_path)  # slow: it reads thousands of files
        if unknown := sorted(set(tasks.names) - set(manager.all_tasks)):
            raise UserError(
                f"data.harness.tasks: lm-evaluation-harness has no task {unknown[0]!r}; `lm_eval ls tasks` names all"
            )
        try:
            loaded = manager.load(list(tasks.names))["tasks"]
        except Exception as error:  # a task's own code, the hub's client, or `datasets`: whatever they raise
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"data.harness.tasks: {', '.join(tasks.names)} cannot be loaded: {said}") from error
        for name, task in loaded.items():
            metrics = {metric["metric"] for metric in task.config.metric_list or ()}
            if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood_rolling") or "exact_match" in metrics:
                raise UserError(
                    f"data.harness.tasks: {name} asks for {task.OUTPUT_TYPE} and {', '.join(sorted(metrics))}, and here "
                    "likelihoods alone are computed: name tasks of multiple_choice or loglikelihood_rolling, or ask it by lm_eval"
                )
        return cls(tasks, manager)

    def ask(
        self, scorer: Scorer, tokenizer: Tokenizer, max_length: int
    ) -> tuple[dict[str, Measure], dict[str, dict[str, float]], int]:
        """
        Returns:
            Figures that are means over questions, as `general.<task>.<metric>`; all numbers of the harness by task and metric,
            both empty on ranks that the harness tells nothing; and how many rows lost the beginning of what stands before the
            answer, or were texts read in several windows, since the model reads no more than `max_length` tokens.
        """
        from lm_eval.evaluator import simple_evaluate

        model = _adapted(scorer, tokenizer, max_length)
        found = simple_evaluate(
            model=model, tasks=list(self.tasks.names), task_manager=self.manager, num_fewshot=self.tasks.num_fewshot,
            limit=self.tasks.limit, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
        if found is None:
            return {}, {}, model.cut
        numbers = {
            task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            for task, metrics in found["results"].items()
        }
        return _measures(found["samples"], numbers), numbers, model.cut


def _measures(samples: dict[str, list[dict]], numbers: dict[str, dict[str, float]]) -> dict[str, Measure]:
    """Of metrics that are a number for each question, and their mean over all: others are no means."""
    import torch

    found = {}
    for task, rows in samples.items():
        for metric in rows[0]["metrics"] if rows else ():
            mine = [row for row in rows if row["filter"] == rows[0]["filter"]]
            values = [row[metric] for row in mine]
            whole = numbers.get(task, {}).get(f"{metric},{rows[0]['filter']}")
            if whole is None or not all(isinstance(value, int | float) for value in values):
                continue
            measure = Measure.mean([str(row["doc_id"]) for row in mine], torch.tensor(values, dtype=torch.float64))
            if abs(measure.value - whole) <= 1e-9 * max(1, abs(whole)):
                found[f"general.{task}.{metric}"] = measure
    return found


def _adapted(scorer: Scorer, tokenizer: Tokenizer, max_length: int) -> Any:
    """The model as the harness takes one, cut to its length as the harness's own class cuts. Every rank answers every request,
    as a scorer wants it."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Adapted(TemplateLM):
        cut = 0

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.begin_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            begun = string.startswith(tokenizer.text_of(tokenizer.begin_id))
            return tokenizer.encode(string) if add_special_tokens is False or begun else tokenizer.encode_prompt(string)

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            rows = []
            for _texts, context, continuation in requests:
                kept = max_length + 1 - len(continuation)  # of the context, its end; the last token is not read
                if kept < 1:
                    raise UserError(
                        f"data.harness.tasks: an answer has {len(continuation)} tokens, and the model reads at most {max_length}"
                    )
                self.cut += len(context) > kept
                rows.append((context[-kept:], continuation))
            return [(float(values.double().sum()), NOT_KNOWN) for values in scorer.token_logprobs(rows)]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            parts, ends = [], []
            for (text,) in (request.args for request in requests):
                windows = list(utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=max_length, context_len=1,
                ))  # fmt: skip
                self.cut += len(windows) > 1
                parts += [(None, *utils.make_disjoint_window(window)) for window in windows]
                ends.append(len(parts))
            values = [value for value, _ in self._loglikelihood_tokens(parts)]
            return [sum(values[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

        def generate_until(self, requests, disable_tqdm: bool = False) -> Sequence[str]:
            raise NotImplementedError("refused when tasks are loaded")

    return Adapted()
