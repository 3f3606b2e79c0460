"""Tools told what they cannot do: one clear line, exit code 2, no traceback. And the planner, which says what fits."""

import json
import re

import pytest

from megatron_ext.bias.prompts import AttributePair, BiasPrompt, PromptsConfig
from tests.recipe_runs import run
from tools.lftf import fine_tuning, run_all

pytestmark = pytest.mark.functional


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("make_video_problems.py --out {file}", "--out {file} is not empty, or no folder; choose another"),
        ("make_video_problems.py --out {folder}", "--out {folder} is not empty, or no folder; choose another"),
        ("make_video_problems.py --out {file}/new", "Not a directory"),
        ("make_biased_corpus.py --out {folder}/new --vocab-size -1", "--vocab-size must be from 1 to 1000000, got -1"),
        ("lftf.py --out {file}", "--out {file} is not empty, or no folder; choose another"),
        ("lftf.py --out {file}/new", "Not a directory"),
        ("lftf.py --jobs 0", "--jobs and --devices must be at least 1"),
        (
            "export_bias_prompts.py --out {folder}/new --exclude nurze",
            "is none of our professions; did you mean 'nurse'?",
        ),
        ("export_bias_prompts.py --out {file}", "File exists"),
        ("bench_rotary.py --tokens 1151", "--tokens must be at least 1152"),
        ("bench_rotary.py --head-dim 7", "--head-dim must be even"),
        ("plot_position_bias.py --head-dim 7 --plot {folder}/a.png", "--head-dim 7 must be even, at least 2"),
        ("plot_position_bias.py --head-dim 1 --plot {folder}/a.png", "--head-dim 1 must be even, at least 2"),
        ("plan.py --config grpo --nodes 3", "do not divide by the data-parallel size 12 on 3 x 8 GPUs"),
        ("plan.py --config sft --prompt -5 --response 7", "prompt=-5 (tools/plan.py: --prompt) must be at least 0"),
        ("plan.py --config grpo --hardware V100", "hardware 'V100' is not known; there are: A100, H100, H200, B200"),
        ("plot_position_bias.py --frames 0 --plot {folder}/a.png", "a medium has at least one frame"),
    ],
)
def test_bad_options_are_one_line(command, words, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    names = {"file": file, "folder": tmp_path}
    tool, *options = command.format(**names).split()
    done = run(f"tools/{tool}", *options)
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert [words.format(**names) in line for line in done.err.splitlines() if "error: " in line] == [True]
    assert list(tmp_path.iterdir()) == [file]


def test_the_planner_says_what_fits_and_draws_it(tmp_path):
    done = run(
        "tools/plan.py", "--config", "grpo", "model=llama3_1_70b", "cluster=8x8", "--search", "--growth", 1024,
        "--plot", tmp_path / "plan.png",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "fits: " in done.out and "70.55 billion parameters" in done.out
    assert "Prefix grouping pays" in done.out and "never measured on a GPU" in done.out
    for table in ("GiB on the fullest rank", "Seconds of a step", "The fastest layouts", "Growth"):
        assert table in done.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_planner_refuses_what_does_not_fit():
    done = run("tools/plan.py", "--config", "sft", "model=llama3_1_70b", "--hardware", "A100")
    assert done.code == 1 and "Traceback" not in done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("does not fit: ")]
    assert "GiB of it are optimizer; use more nodes or another layout" in line


def test_lftf_short_from_a_corpus_to_a_report(tmp_path):
    """What one seed has found is kept when the next one fails: its model's seed must not be negative."""
    out = tmp_path / "run"
    done = run("tools/lftf.py", "--short", "--seeds", 1, -5, "--devices", 1, "--jobs", 2, "--out", out, timeout=3600)
    assert done.code == 2 and done.error_lines == ["error: model.seed=-5 must be at least 0"], done.err
    (seed,) = json.loads((out / "results.json").read_text())
    assert seed["seed"] == 1 and all(sorted(r["order"]) == [1, 2, 3, 4, 5] for r in seed["rankings"].values())
    best = seed["rankings"]["gradient"]["best"]
    rows = {row["name"]: row for row in seed["rows"]}
    assert rows["block of gradient"]["places"] == rows["loss sum, no guard"]["places"] == [str(best)]
    for name, folder in (("block of gradient", f"block-{best}"), ("loss sum, no guard", "loss-sum-no-guard")):
        result = json.loads((out / "seed-1" / folder / "result.json").read_text())
        assert rows[name]["afgb"] == result["after"]["afgb"]
        assert rows[name]["afgb_fall"] == 1 - result["after"]["afgb"] / result["before"]["afgb"]
        assert not (out / "seed-1" / folder / "checkpoints").exists()
    report = (out / "report.md").read_text()
    assert f"| 1 | {seed['before']['afgb']:.3f} [" in report and "| loss sum, no guard |" in report
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_fine_tuning_does_not_wait_for_the_others(tmp_path):
    names = [f"run-{number}" for number in range(6)]
    runs = {name: [fine_tuning(tmp_path / name, [], [])] for name in names}  # of no model
    with pytest.raises(SystemExit, match=f"error: run-0 ended with code 2; see {tmp_path}/run-0.log"):
        run_all(tmp_path, runs, 1)
    assert len(list(tmp_path.glob("*.log"))) <= 2  # the next one may have begun
    assert re.search(r"^error: \S+ is not set", (tmp_path / "run-0.log").read_text(), re.M)


def test_exported_prompts_are_those_of_the_recipe(tmp_path):
    """The same split of the same professions in the same templates."""
    path = tmp_path / "professions.json"
    path.write_text(json.dumps([*([f"job_{i}", 0.05 * i, 0] for i in range(20)), ["monk", 1.0, 0]]))
    options = [
        "--professions", path, "--most-definitional", 0.7, "--exclude", "job_3", "job 5", "--split-seed", 4, "--split", "dev",
        "--pair", "man", "woman", "father", "mother", "--bias-templates", "The {profession} was a kind",
        "--hint-templates", "A {hint}, the {profession} was a",
    ]  # fmt: skip
    done = run("tools/export_bias_prompts.py", "--out", tmp_path / "tasks", *options)
    assert done.code == 0, done.err
    settings = PromptsConfig(
        professions_path=str(path), most_definitional=0.7, exclude=["job 3", "job 5"], split_seed=4,
        pair=AttributePair("man", "woman", "father", "mother"), bias_templates=["The {profession} was a kind"],
        hint_templates=["A {hint}, the {profession} was a"],
    )  # fmt: skip
    names = settings.professions()["dev"]
    assert 2 <= len(names) <= 3 and "job 3" not in settings.professions()["all"]
    for name, prompts in zip(("genbiaseval", "genhinteval"), settings.prompts(names), strict=True):
        rows = [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        assert [BiasPrompt(**row) for row in rows] == prompts
        assert 'doc_to_choice: ["man", "woman"]' in (tmp_path / "tasks" / f"{name}.yaml").read_text()
    assert (
        f"{len(names)} and {2 * len(names)} prompts about {len(names)} professions in {tmp_path / 'tasks'}" in done.out
    )
    done = run("tools/export_bias_prompts.py", "--out", tmp_path / "ours")
    assert done.code == 0, done.err
    bias, _ = PromptsConfig().prompts(PromptsConfig().professions()["test"])
    rows = [json.loads(line) for line in (tmp_path / "ours" / "genbiaseval.jsonl").read_text().splitlines()]
    assert [BiasPrompt(**row) for row in rows] == bias
