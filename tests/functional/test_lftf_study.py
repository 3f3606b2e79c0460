"""Every block of a model trained by the same small budget: `run`, stopped and gone on with, and what `report` says."""

from __future__ import annotations

import json

import pytest

from tests.recipe_runs import run

BUDGET = ["--steps", 2, "--prompts", 4, "--locate-prompts", 8, "--seeds", 1, "--threads", 1, "--gib", 1, "--lr", "1e-3"]


def study(bias_task, out, *more):
    return run("tools/lftf_study.py", "run", "--model", bias_task.checkpoint, "--out", out, *BUDGET, *more)


def test_a_study_goes_on_where_it_was_and_says_what_its_trainings_gained(bias_task, tmp_path):
    out = tmp_path / "study"
    one = study(bias_task, out, "--blocks", 1, "--scored-after", 1)
    assert one.code == 0, one.err
    first, frozen = ((out / name).read_text() for name in ("block-1-seed-1.json", "before.json"))
    texts = json.loads((out / "written.json").read_text())
    (out / "written.json").unlink()
    early = run("tools/lftf_study.py", "report", out, "--json", tmp_path / "early.json")
    assert early.code == 2 and "no seed has all" in early.error_lines[0] and not (tmp_path / "early.json").exists()
    for more in ((), ("--scored-after", 1, "--steps", 3)):
        other = study(bias_task, out, *more)
        assert other.code == 2 and "is of another study (another model or budget)" in other.error_lines[0]
        assert not (out / "written.json").exists(), "it wrote before it looked"
    (out / "written.json").write_text(json.dumps(texts[1:]))  # read again: another machine would write others
    rest = study(bias_task, out, "--scored-after", 1)
    assert rest.code == 0 and "block 1 " not in rest.out and (out / "block-1-seed-1.json").read_text() == first

    scores, earlier = json.loads((out / "before.json").read_text()), json.loads(frozen)
    assert scores["rankings"] == earlier["rankings"]
    assert scores["scores"].pop("perplexity") != earlier["scores"].pop("perplexity") and scores == earlier

    evaluated = run(
        "recipes/eval_bias.py", f"pretrained_checkpoint.restore_from_path={bias_task.checkpoint}",
        f"exp_manager.explicit_log_dir={tmp_path / 'bias'}",
    )  # fmt: skip
    assert evaluated.code == 0, evaluated.err
    found = json.loads((tmp_path / "bias/bias.json").read_text())
    plan, before = (json.loads((out / name).read_text()) for name in ("plan.json", "before.json"))
    for name in ("afgb", "ub", "pronoun_mass"):
        assert before["scores"][name] == pytest.approx(found[name], abs=1e-6), name

    done = run(
        "tools/lftf_study.py", "report", out, "--json", tmp_path / "result.json", "--figure", tmp_path / "gains.png"
    )
    assert done.code == 0 and (tmp_path / "gains.png").stat().st_size > 10_000, done.err
    told = json.loads((tmp_path / "result.json").read_text())
    for title, key in (("as it is", "scores"), ("as it is, on the way", "1")):
        for block in range(plan["blocks"]):
            trained = json.loads((out / f"block-{block}-seed-1.json").read_text())
            after = trained["scores"] if key == "scores" else trained["on the way"]["1"]
            gains = told[title]["gains"] if key == "scores" else told[title]["1"]["gains"]
            assert gains[block] == pytest.approx(1 - after["afgb"] / before["scores"]["afgb"])
            assert after["afgb"] != before["scores"]["afgb"]


def test_what_cannot_be_run_is_one_line(bias_task, tmp_path):
    for more, message in (
        (["--threads", 0], "error: --threads 0 must be at least 1"),
        (["--gib", "inf"], "error: --gib inf must be a number above 0"),
        (["--blocks", 0, 9], "error: block 9 does not exist: the model has"),
        (["--scored-after", 2], "error: --scored-after [2]: wants numbers of steps below --steps 2"),
    ):
        done = study(bias_task, tmp_path / "out", *more)
        assert done.code == 2 and done.error_lines[0].startswith(message), done.err
        assert not list((tmp_path / "out").glob("*.json"))
