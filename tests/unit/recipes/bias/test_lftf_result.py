"""What a run of LFTF leaves: numbers that come back as they were, and a report of them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_ext.bias.measures import Measure, interval
from megatron_ext.bias.ranking import BlockRanking
from recipes.bias.lftf_result import LFTFResult

WORDS = ("he", "she")


def evaluation(rng: torch.Generator, names: list[str]) -> dict:
    values = torch.rand(len(names), generator=rng).double() * 2 - 1
    measure = Measure.mean(names, values.abs())
    text = f"says {int(torch.randint(99, (), generator=rng))} | \\ and\nmore"
    return {
        "afgb": measure.value, "afgb_interval": list(interval(measure, samples=200)), "answers": {"afgb": measure.as_dict()},
        "profession_table": dict(zip(names, values.tolist(), strict=True)), "samples": [{"prompt": "The nurse", "text": text}],
    }  # fmt: skip


def draw_result(rng: torch.Generator, **changes) -> LFTFResult:
    names = [f"job {i}" for i in range(7)]
    before, after = (evaluation(rng, names) for _ in range(2))
    validations = [
        {"step": 0, "val/afgb": before["afgb"], "val/pronoun_mass": 0.5, "complaint": None},
        {"step": 2, "val/afgb": 0.25, "val/pronoun_mass": 0.4, "val/perplexity": 12.5, "complaint": "too few pronouns"},
    ]
    costs = {"seconds": {"optimizer_step": 3.5}, "parameters": 1000, "trained_parameters": 200, "kept_inputs_bytes": 1 << 20,
             "peak_memory_bytes": 3 << 29}  # fmt: skip
    fields = {
        "places": ["1"], "loss": {"sum": 1.0, "hint": 0.5}, "stopped": "max_steps reached", "before": before, "after": after,
        "steps": 2, "best_step": 2, "best_afgb": 0.25, "validations": validations, "costs": costs,
        "ranking": BlockRanking.of("gradient", [0.5, 2.0, 1.0], exclude=[0]).as_dict(),
    }  # fmt: skip
    return LFTFResult(**fields | changes)


def test_it_is_read_as_it_was_written(rng, tmp_path):
    result = draw_result(rng)
    result.write(tmp_path, WORDS)
    found = LFTFResult.read(tmp_path / "result.json")
    assert json.loads(json.dumps(vars(result))) == vars(found)
    assert (found.about, found.changes(WORDS), found.samples, found.cost_rows) == (
        result.about, result.changes(WORDS), result.samples, result.cost_rows
    )  # fmt: skip


def test_the_report_says_what_it_holds(rng, tmp_path):
    result = draw_result(rng)
    result.write(tmp_path, WORDS)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "Block 1 trained, loss sum + 0.5 hint, 2 steps: max_steps reached." in lines
    ((name, old, new, change),) = result.changes(WORDS)
    gap = result.after["afgb"] - result.before["afgb"]
    assert old.startswith(f"{result.before['afgb']:.4f} [") and change.startswith(f"{gap:+.4f} [")
    assert f"| {name} | {old} | {new} | {change} |" in lines
    said = [one["samples"][0]["text"].split()[1] for one in (result.before, result.after)]
    assert f"| The nurse | says {said[0]} \\| \\\\ and more | says {said[1]} \\| \\\\ and more |" in lines
    assert "## Blocks by gradient" in lines and "![ranking](ranking-gradient.png)" in lines
    assert f"| 0 | {result.before['afgb']:.4f} | 0.5000 |  | kept |" in lines
    assert "| 2 | 0.2500 | 0.4000 | 12.500 | too few pronouns |" in lines
    assert (
        "| parameters that trained | 200 of 1,000 (20.0%) |" in lines
        and "| memory of a rank, at most | 1.50 GiB |" in lines
    )


def test_numbers_of_a_model_that_diverged_are_null(rng, tmp_path):
    """Perplexity overflows, a validation has none; the report says so, and the file is JSON."""
    result = draw_result(rng, best_afgb=math.inf)
    result.after["perplexity"] = math.inf
    result.after["answers"]["afgb"]["sums"][3][0] = math.nan
    result.validations[1]["val/afgb"] = math.nan
    result.write(tmp_path, WORDS)
    node = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert node["best_afgb"] is node["after"]["perplexity"] is node["validations"][1]["val/afgb"] is None
    assert "| 2 | nan | 0.4000 |" in (tmp_path / "report.md").read_text()
    found = LFTFResult.read(tmp_path / "result.json")
    assert math.isnan(Measure.from_dict(found.after["answers"]["afgb"]).value)
    assert [row[0] for row in found.changes(WORDS)] == [row[0] for row in draw_result(rng).changes(WORDS)]


def test_what_trains_nothing_has_no_costs(rng, tmp_path):
    made = draw_result(rng)
    result = LFTFResult(places=None, loss={}, stopped="checkpoint x", before=made.before, after=made.after)
    result.write(tmp_path, WORDS)
    report = (tmp_path / "report.md").read_text()
    assert "Every block: checkpoint x." in report and "What it took" not in report and "ranking" not in report
    assert LFTFResult.read(tmp_path / "result.json").cost_rows == []


@pytest.mark.parametrize("text", ["[]", "{}", '{"places": null}', "{"])
def test_another_file_is_no_result(text, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError)):
        LFTFResult.read(path)
