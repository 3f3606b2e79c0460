"""tools/gpu_check.py runs every section on the CPU, at tiny sizes; its refusals are one line."""

from __future__ import annotations

import json

import pytest

from tests.recipe_runs import run
from tools.gpu.report import check_result
from tools.gpu.sections import SECTIONS

pytestmark = pytest.mark.functional

SKIPPED = dict.fromkeys(("te", "transfer"), "skipped")


def test_every_section_runs_on_the_cpu(tmp_path):
    path = tmp_path / "found.json"
    done = run("tools/gpu_check.py", "--device", "cpu", "--json", path, timeout=3600)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    result = json.loads(path.read_text())
    check_result(result)
    assert {s["name"]: s["status"] for s in result["sections"]} == dict.fromkeys(SECTIONS, "ok") | SKIPPED
    assert result["machine"]["settings"] == {"device": "cpu", "seed": 1} and result["machine"]["versions"]["torch"]
    sections = {s["name"]: s for s in result["sections"]}
    for name in SECTIONS.keys() - SKIPPED.keys():
        assert sections[name]["numbers"], name
        assert f"## {name}: ok" in done.out
    for name in ("kernels", "model", "memory", "levers", "attention", "demo"):
        assert len(sections[name]["checks"]) >= 3, name
    phases = {row["phase"]: row for row in sections["memory"]["numbers"]["memory, MiB"]}
    assert all(phases[kind]["ratio"] == 1 for kind in ("parameters", "gradients", "optimizer"))
    (steps,) = sections["steps"]["numbers"].values()
    assert {row["form"] for row in steps} == {"grouped", "repeated", "repeated_single"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--device cpu --wheels {folder}",
            "--wheels {folder} has no .whl file; where there is a network, run: pip download",
        ),
        ("--device cpu --json {folder}/no/found.json", "--json {folder}/no/found.json: its folder does not exist"),
        ("--sections environment speed", "invalid choice: 'speed'"),
    ],
)
def test_bad_options_are_one_line(options, words, tmp_path):
    done = run("tools/gpu_check.py", *options.format(folder=tmp_path).split())
    assert done.code == 2 and "Traceback" not in done.err
    assert words.format(folder=tmp_path) in done.err.splitlines()[-1]


def test_without_a_gpu_nothing_is_ok(tmp_path):
    path = tmp_path / "found.json"
    done = run("tools/gpu_check.py", "--json", path, "--sections", "environment", imports=True)
    assert done.code == 1
    (found,) = json.loads(path.read_text())["sections"]
    reason = "torch sees no CUDA device; --device cpu runs every section at tiny sizes"
    assert (found["status"], found["reason"]) == ("skipped", reason)
