"""Tools told what they cannot do: one clear line, exit code 2, no traceback."""

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
