"""What LFTF, or what it is compared with, has done to a model: numbers, and the report of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_ext.bias.measures import Measure, difference
from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.files import write_json, write_whole
from recipes.bias.report import ranking_stem, summary_rows
from recipes.bias.titles import titles

__all__ = ["RESULT_FILE", "LFTFResult"]

RESULT_FILE = "result.json"
REPORT_FILE = "report.md"


@dataclass(frozen=True, kw_only=True)
class LFTFResult:
    """
    Attributes:
        places: names of what was trained, edited or steered; None: all.
        loss: weights of the losses by name; none of what trained nothing.
        stopped: why training has ended, or what else was done.
        before, after: evaluations on the test professions.
        steps, best_step, best_afgb, idle, validations: of training.
        ranking: of blocks or finer places, where an estimator chose; else None.
        costs: what it took; None of what trained nothing.
    """

    places: list[str] | None
    loss: dict[str, float]
    stopped: str
    before: dict
    after: dict
    steps: int = 0
    best_step: int = 0
    best_afgb: float | None = None
    idle: int = 0
    validations: list[dict] = field(default_factory=list)
    ranking: dict | None = None
    costs: dict | None = None

    @classmethod
    def read(cls, path: Path) -> LFTFResult:
        """
        Raises:
            ValueError: no JSON.
            TypeError: something else.
        """
        node = json.loads(path.read_bytes())
        return cls(**{one.name: node[one.name] for one in fields(cls) if one.name in node})

    def write(self, folder: Path, words: tuple[str, str]) -> None:
        """result.json and report.md."""
        write_json(folder / RESULT_FILE, asdict(self))
        write_whole(folder / REPORT_FILE, "\n".join(self._report(words)) + "\n")

    @property
    def about(self) -> str:
        """What was trained, how, and why it ended."""
        what = "Every block" if self.places is None else f"Block {', '.join(self.places)}"
        loss = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in self.loss.items())
        how = f" trained, loss {loss}, {self.steps} steps" if loss else ""
        return f"{what}{how}: {self.stopped}"

    def changes(self, words: tuple[str, str]) -> list[tuple[str, str, str, str]]:
        """(name, before, after, change with its paired interval) of every figure."""
        called, found = titles(self.after, words), {}
        for name, node in self.before.get("answers", {}).items():  # none of a run that an older version began
            gap, ends = difference(Measure.from_dict(node), Measure.from_dict(self.after["answers"][name]))
            found[called.get(name)] = f"{gap:+.4f}" if ends is None else f"{gap:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]"
        old, new = (dict(summary_rows(one, words)) for one in (self.before, self.after))
        return [(name, old.get(name, "-"), new.get(name, "-"), found.get(name, "")) for name in old | new]

    @property
    def samples(self) -> list[tuple[str, str, str]]:
        """(prompt, how it went on before, how after); none of a run that an older version began."""
        pairs = zip(self.before.get("samples", ()), self.after.get("samples", ()), strict=False)
        return [(old["prompt"], old["text"], new["text"]) for old, new in pairs if old["prompt"] == new["prompt"]]

    @property
    def cost_rows(self) -> list[tuple[str, str]]:
        """(name, value) of what it took; none of what trained nothing."""
        if (costs := self.costs) is None:
            return []
        trained, every = costs["trained_parameters"], costs["parameters"]
        rows = [("parameters that trained", f"{trained:,} of {every:,} ({trained / every:.1%})")]
        rows += [(f"seconds of {name.replace('_', ' ')}", f"{value:.1f}") for name, value in costs["seconds"].items()]
        if kept := costs["kept_inputs_bytes"]:
            rows.append(("kept of what enters the block, by a rank at most", f"{kept / 2**20:.1f} MiB"))
        return [*rows, ("memory of a rank, at most", f"{costs['peak_memory_bytes'] / 2**30:.2f} GiB")]

    def _report(self, words: tuple[str, str]) -> list[str]:
        lines = ["# LFTF", "", f"{self.about}.", ""]
        lines += _table(
            ["measure, on professions held out", "before", "after", "change"],
            self.changes(words),
            "|---|---:|---:|---:|",
        )
        lines += [
            "",
            "Intervals: 95 %, bootstrap over professions; those of changes draw the same professions before and after.",
        ]
        if self.samples:
            lines += ["", "## What it goes on to say", ""]
            lines += _table(
                ["prompt", "before", "after"], [tuple(map(_cell, row)) for row in self.samples], "|---|---|---|"
            )
        if self.ranking:
            ranking = BlockRanking(**{k: v for k, v in self.ranking.items() if k != "best"})
            lines += ["", f"## {ranking.grain.capitalize()} by {ranking.estimator}", "", ranking.markdown(), ""]
            lines.append(f"![ranking]({ranking_stem(ranking)}.png)")
        lines += ["", "## Validations", ""]
        rows = [
            (str(v["step"]), *(_shown(v, key, form) for key, form in VALIDATED.items()), v["complaint"] or "kept")
            for v in self.validations
        ]
        lines += _table(["step", "AFGB", "pronoun mass", "perplexity", "guard"], rows, "|---:|---:|---:|---:|---|")
        if self.cost_rows:
            lines += ["", "## What it took", "", *_table(["", ""], self.cost_rows, "|---|---:|")]
        return lines


VALIDATED = {"val/afgb": ".4f", "val/pronoun_mass": ".4f", "val/perplexity": ".3f"}


def _shown(validation: dict, key: str, form: str) -> str:
    """Of texts that there were none, nothing; of a model that diverged no number."""
    return f"{validation[key]:{form}}" if key in validation else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], rule: str) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _cell(text: str) -> str:
    """In one cell of a table of Markdown."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
