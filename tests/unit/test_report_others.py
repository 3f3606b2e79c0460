"""The report of runs that sample nothing: SFT, and LFTF with what it has changed."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from megatron_ext.bias.measures import Measure, difference, interval
from tests.report_pages import page_of, parsed, section, table_of, text_of, value_of
from tests.report_runs import write_run


def test_a_run_of_another_recipe(tmp_path):
    """SFT has no rollouts, and its log no whole steps."""
    folder = tmp_path / "sft"
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "run_of_2026_11" / "run", folder)
    page = parsed(page_of(folder))
    assert "sft is a run of SFT, which samples no responses." in text_of(section(page, "rollouts"))
    (means, _) = section(page, "phases").iter("table")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (row,) = table_of(means)[1]
    assert value_of(row[1]) == pytest.approx(statistics.fmean(r["timers/optimizer_step"] for r in rows))
    assert "Nothing in the folder tells where this ran" in text_of(section(page, "environment"))


def test_a_run_of_lftf_and_one_of_grpo(tmp_path, rng):
    """What one has not logged is left empty."""
    rows = [{"step": 0, "val/afgb": 0.25, "timers/evaluate": 2.0, "timers/locate": 1.0}]
    rows += [{"step": i, "train_optim/loss": 1 / i, "timers/optimizer_step": 0.5, "val/afgb": 0.2 / i} for i in (1, 2)]
    (tmp_path / "lftf").mkdir()
    (tmp_path / "lftf" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lftf" / "config.yaml").write_text("trainer: {lftf: {max_steps: 2, losses: []}}")
    write_run(tmp_path / "grpo", rng, dumps=False)
    page = parsed(page_of(tmp_path / "lftf", tmp_path / "grpo"))
    assert text_of(page.find(".//p[@class='kicker']")).startswith("LFTF and GRPO · ")
    glance = [[text_of(cell) for cell in row] for row in table_of(page.find(".//header//table"))[1]]
    assert glance[0][1:] == ["2 of 2 not ended, or not saved", "– ", "– ", "– ", "0.1 from 0.25", "– "]
    phases = [table_of(table) for table in section(page, "phases").iter("table")]
    assert [(text_of(row[0]), value_of(row[1])) for row in phases[0][1]] == [("optimizer_step", 0.5)]
    (afgb,) = (row for row in table_of(section(page, "numbers").find(".//table"))[1] if text_of(row[0]) == "val/afgb")
    assert [text_of(cell) for cell in afgb[2:]] == ["0.1", "2", "", "", ""]


@pytest.mark.parametrize("beside", [False, True])
def test_what_lftf_has_changed(beside, tmp_path, rng):
    """Figures with what changed by pairs, every profession in a bin, the most changed first; names are shown and do nothing."""
    names = [f"job {i}" for i in range(30)] + ["<script>nurse"]
    values = torch.rand(2, len(names), generator=rng).double() * 2 - 1
    made = {}
    for when, row in zip(("before", "after"), values, strict=True):
        measure = Measure.mean(names, row.abs())
        made[when] = {
            "profession_table": dict(zip(names, row.tolist(), strict=True)),
            "answers": {"afgb": measure.as_dict()},
        }
        made[when] |= {"afgb": measure.value, "afgb_interval": interval(measure)}
    folder = tmp_path / "lftf"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "val/afgb": 0.5}) + "\n")
    (folder / "config.yaml").write_text(
        "trainer: {lftf: {max_steps: 2}}\ndata: {prompts: {pair: {first: man, second: woman}}}"
    )
    for when in made:
        made[when]["samples"] = [{"prompt": "The <b>nurse", "text": f"says {when} & <i>"}]
    costs = {"seconds": {"optimizer_step": 3.5}, "parameters": 1000, "trained_parameters": 200, "kept_inputs_bytes": 1 << 20,
             "peak_memory_bytes": 1 << 30}  # fmt: skip
    result = {
        "places": ["3 mlp"],
        "loss": {"sum": 1.0, "hint": 0.5},
        "steps": 7,
        "stopped": "all steps taken",
        "costs": costs,
        **made,
    }
    (folder / "result.json").write_text(json.dumps(result))
    others = []
    if beside:
        write_run(tmp_path / "grpo", rng, dumps=False)
        others.append(tmp_path / "grpo")
    whole = page_of(folder, *others)
    assert "<script>nurse" not in whole
    part = section(parsed(whole), "bias")
    assert "lftf: Block 3 mlp trained, loss sum + 0.5 hint, 7 steps: all steps taken" in text_of(
        part
    ) and "P(man) - P(woman)" in text_of(part)
    figures, bins, changed, samples, took = (table_of(table)[1] for table in part.iter("table"))
    assert [[text_of(cell) for cell in row] for row in samples] == [
        ["The <b>nurse", "says before & <i>", "says after & <i>"]
    ]
    assert {text_of(name): text_of(value) for name, value in took}["parameters that trained"] == "200 of 1,000 (20.0%)"
    gap, ends = difference(*(Measure.from_dict(made[when]["answers"]["afgb"]) for when in ("before", "after")))
    assert text_of(figures[0][3]) == f"{gap:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]" and len(figures) == 1
    assert [sum(value_of(row[column]) for row in bins) for column in (1, 3)] == [len(names)] * 2
    moved = (values[1] - values[0]).abs().tolist()
    assert [text_of(row[0]) for row in changed] == [
        name for _, name in sorted(zip(moved, names, strict=True), key=lambda pair: -pair[0])
    ][:15]
    row = names.index(text_of(changed[0][0]))
    assert [value_of(cell) for cell in changed[0][1:3]] == pytest.approx(values[:, row].tolist())
    (folder / "result.json").write_text("[]")
    with pytest.raises(ValueError, match="result.json is no result of LFTF"):
        page_of(folder)
