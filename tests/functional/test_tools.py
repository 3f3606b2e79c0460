"""Tools told what they cannot do: one clear line, exit code 2, no traceback. And the planner, which says what fits."""

import pytest

from tests.recipe_runs import run

pytestmark = pytest.mark.functional


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("make_video_problems.py --out {file}", "--out {file} is not empty, or no folder; choose another"),
        ("make_video_problems.py --out {folder}", "--out {folder} is not empty, or no folder; choose another"),
        ("make_video_problems.py --out {file}/new", "Not a directory"),
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
