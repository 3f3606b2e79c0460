"""The check of a GPU keeps what it found whatever happens to a section, writes what it says it writes, and carries wheels.

That its sections run is tests/functional/test_gpu_check.py's.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_ext.attention.kernels import KERNELS
from megatron_ext.errors import UserError
from tests.gpu.cases import CASES, KINDS, errors, kernel_variants, make_case, truth
from tests.gpu.scenarios import attention
from tools.gpu.report import Section, check_result, write_result
from tools.gpu.runner import Plan, Settings, run_plans
from tools.gpu.sections import SECTIONS
from tools.gpu.wheels import unpack

ROOT = Path(__file__).parents[2]
PLANTED = "tests.programs.gpu_sections"


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """By a fork and, as on a GPU, by a fresh interpreter."""
    return request.param


def run_planted(tmp_path: Path, device: str, *names: str, hangs: float = 6.0, describe: str = "describe") -> dict:
    """Of sections that end by themselves, whose time is more than any machine takes, and of one that has `hangs` seconds."""
    path = tmp_path / "result.json"
    plans = [Plan(name, PLANTED, hangs if name == "hangs" else 600.0, name) for name in names]
    run_plans(
        plans,
        Settings(device),
        save=lambda machine, sections: write_result(path, machine, sections),
        describe=f"{PLANTED}:{describe}",
    )
    result = json.loads(path.read_text())
    check_result(result)
    assert [section["name"] for section in result["sections"]] == list(names)
    return result | {"sections": {section["name"]: section for section in result["sections"]}}


def test_no_section_stops_another_and_what_was_found_stands(device, tmp_path):
    for seconds in (6, 60, 600):  # of which a process needs some to start: more where the machine has much else to do
        result = run_planted(
            tmp_path, device, "raises", "dies", "hangs", "skips", "over_its_limit", "good", hangs=float(seconds)
        )
        if result["sections"]["hangs"]["numbers"]:
            break
    found = {name: (s["status"], s["reason"]) for name, s in result["sections"].items()}
    assert found == {
        "raises": ("failed", "KeyError: 'missing'"),
        "dies": ("failed", "its process ended by SIGKILL"),
        "hangs": ("failed", f"ended after its {seconds} seconds; what it had found stands"),
        "skips": ("skipped", "needs another machine"),
        "over_its_limit": ("failed", "more: 3 is more than 2 (and 1 more)"),
        "good": ("ok", None),
    }
    for number, name in enumerate(("raises", "dies", "hangs"), start=1):
        assert result["sections"][name]["numbers"] == {"numbers": [{"found": number}]}
    checks = [(c["name"], c["value"], c["ok"]) for c in result["sections"]["over_its_limit"]["checks"]]
    assert checks == [("less", 1.0, True), ("more", 3.0, False), ("no number", None, False)]
    assert result["sections"]["good"]["notes"] == ["all is well"]
    assert seconds <= result["sections"]["hangs"]["seconds"]
    assert result["machine"]["device"] == device


def test_sections_share_a_process_until_one_fails(tmp_path):
    path, pids = tmp_path / "result.json", []
    plans = [Plan(str(i), PLANTED, 600, name) for i, name in enumerate(("good", "skips", "good", "raises", "good"))]
    sections = run_plans(plans, Settings("cpu"), save=lambda machine, found: write_result(path, machine, found))
    pids = [section.numbers["numbers"][0]["value"] for section in sections if section.status == "ok"]
    assert pids[0] == pids[1] != pids[2] and os.getpid() not in pids


def test_an_attempt_that_fails_is_a_failed_check_and_the_section_goes_on(tmp_path):
    result = run_planted(tmp_path, "cpu", "goes_on_after_an_attempt", "has_little_time")
    section = result["sections"]["goes_on_after_an_attempt"]
    assert section["status"] == "failed" and section["reason"] == "the first: ValueError: two lines (and 1 more)"
    assert [(c["error"], c["ok"]) for c in section["checks"]] == [
        ("ValueError: two lines", False),
        ("SystemExit: a tool's word", False),
        (None, True),
    ]
    assert section["numbers"] == {"numbers": [{"after": True}]}
    little = result["sections"]["has_little_time"]
    assert little["status"] == "ok" and little["notes"] == ["no time left for what takes days"]


def test_a_machine_that_cannot_be_described_is_checked(tmp_path):
    result = run_planted(tmp_path, "cpu", "good", describe="cannot_describe")
    assert result["machine"] == {"error": "RuntimeError: no such machine"}
    assert result["sections"]["good"]["status"] == "ok"


def good_result() -> dict:
    section = {"name": "a", "status": "ok", "reason": None, "seconds": 1.0, "budget_seconds": 2.0, "checks": [],
               "numbers": {"t": [{"x": 1}]}, "notes": []}  # fmt: skip
    return {"version": 1, "machine": None, "sections": [section]}


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("version",), 2, "version is 2, not 1"),
        (("machine",), [], "machine is []"),
        (("sections", 0, "status"), "fine", "section a: status 'fine' is none of ok, failed, skipped"),
        (("sections", 0, "status"), "failed", "status failed with reason None"),
        (("sections", 0, "notes"), [1], "a note is no text"),
        (("sections", 0, "numbers"), {"t": [[1]]}, "t has a row that is no plain mapping"),
        (("sections", 0, "numbers"), {"t": [{"x": [1]}]}, "t has a row that is no plain mapping"),
        (("sections", 0, "checks"), [{"name": "c"}], "section a: check must be a mapping with name, value"),
        (
            ("sections", 0, "checks"),
            [{"name": "c", "value": 3, "limit": 2, "ok": True, "error": None}],
            "check c says ok=True, its numbers do not",
        ),
        (("sections", 0, "more"), 1, "section must be a mapping with name, status"),
    ],
)
def test_what_is_no_result_is_refused(place, value, words):
    result = good_result()
    check_result(result)
    node = result
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(ValueError, match=re.escape(words)):
        check_result(result)


def test_a_kill_leaves_the_file_of_before(tmp_path):
    """What cannot be written does not replace what was."""
    path = tmp_path / "result.json"
    write_result(path, None, [Section("a", 1.0)])
    before = path.read_text()
    broken = Section("a", 1.0, numbers={"t": [{"x": object()}]})
    with pytest.raises(ValueError, match="no plain mapping"):
        write_result(path, None, [broken])
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(before)["sections"][0]["reason"] == "it has not ended"


def test_the_whole_check_takes_less_than_ten_minutes():
    """By its limits, and with a minute for processes that have to be started anew; but for a vLLM that has to start."""
    *sections, last = SECTIONS.values()
    assert sum(plan.budget for plan in sections) <= 540 and last.name == "transfer"


def test_every_section_is_explained():
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| (\d+) s \|", page, re.M) == [
        (plan.name, str(plan.budget)) for plan in SECTIONS.values()
    ]


def test_sections_import_nothing_that_a_bare_machine_lacks():
    """Neither NeMo, Hydra and OmegaConf nor pytest and hypothesis, however far an import leads within this repository."""
    foreign = {
        "nemo",
        "hydra",
        "omegaconf",
        "lightning",
        "pytest",
        "hypothesis",
        "recipes",
        "safetensors",
        "xxhash",
        "yaml",
    }
    seen, waiting = set(), [ROOT / "tools/gpu_check.py", *(ROOT / "tools/gpu").glob("*.py")]
    found: dict[str, set[str]] = {}
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imported_at_once(path):
            found.setdefault(module.split(".")[0], set()).add(path.name)
            waiting += [p for p in files_of(module) if p not in seen]
    assert not {name: found[name] for name in found.keys() & foreign}
    assert ROOT / "tests/plain_gpt.py" in seen  # the walk leads somewhere


def imported_at_once(path: Path) -> set[str]:
    """Modules that a file imports when it is imported, not in functions."""
    names = set()
    waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return names


def files_of(module: str) -> list[Path]:
    """Files of this repository that an import of the module runs."""
    parts = module.split(".")
    candidates = [ROOT.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
    candidates += [ROOT.joinpath(*parts).with_suffix(".py"), ROOT / "tools" / f"{module}.py"]
    return [path for path in candidates if path.is_file()]


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_are_unpacked_onto_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    here = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheel(tmp_path / "wheels", "carried_one-1.0-py3-none-any.whl", {"carried_one/__init__.py": "value = 7\n"})
    files = {"carried_two-1.0.data/purelib/carried_two.py": "value = 8\n"}
    wheel(tmp_path / "wheels", f"carried_two-1.0-{here}-{here}-manylinux_2_28_{os.uname().machine}.whl", files)
    assert len(unpack(tmp_path / "wheels", tmp_path / "target")) == 2
    import carried_one
    import carried_two

    assert (carried_one.value, carried_two.value) == (7, 8)
    for name in ("carried_one", "carried_two"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a-1.0-cp27-cp27-manylinux_2_28_x86_64.whl", "is for cp27, this is Python"),
        ("a-1.0-py3-none-win_amd65.whl", "is for win_amd65, this machine is"),
        ("a-1.0.whl", "is not named as a wheel"),
        ("a.zip", "has no .whl file; where there is a network, run: pip download --no-deps"),
    ],
)
def test_wheels_that_do_not_fit_are_refused_in_one_line(name, words, tmp_path):
    wheel(tmp_path / "wheels", name, {"a.py": ""})
    with pytest.raises(UserError, match=re.escape(words)) as refusal:
        unpack(tmp_path / "wheels", tmp_path / "target")
    assert "\n" not in str(refusal.value)


def test_every_kernel_is_asked_for_under_every_rule_it_knows():
    for device_type in ("cpu", "cuda"):
        variants = kernel_variants(device_type)
        asked = {(how.get("attention_kernel"), scoring.softcap is not None, scoring.window is not None)
                 for scoring, how in variants.values()}  # fmt: skip
        for name, kernel in KERNELS.items():
            here = kernel.device in (None, device_type)
            assert ((name, False, False) in asked) == ((name, False, True) in asked) == here
            assert ((name, True, False) in asked) == (here and kernel.softcap)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", kernel_variants("cpu"))
def test_what_a_gpu_is_asked_for_besides_is_right_here(variant, kind, rng):
    """Sinks, and values of another size than keys, as of latent attention."""
    import torch

    scoring, how = kernel_variants("cpu")[variant]
    names = ("unequal responses", "no prefix", "several groups, pad", "longer than a kernel block", "tree")
    cases = [make_case(rng, name, torch.bfloat16, scoring, how, **KINDS[kind]) for name in names]
    found = errors(names, attention(torch.device("cpu"), cases), [truth(case) for case in cases], torch.bfloat16)
    assert found.over_allowed <= 1, found
    assert (found.ours[4] > 0) == (kind == "sinks")


def test_a_kernel_that_is_wrong_anywhere_is_over_what_is_allowed(rng):
    """One wrong row of one gradient of the smallest layout, or rounding that is four times that of plain attention."""
    import torch

    names = ("no prefix", "longer than a kernel block")
    cases = [make_case(rng, name, torch.bfloat16) for name in names]
    truths = [truth(case) for case in cases]
    results = attention(torch.device("cpu"), cases)
    assert errors(names, results, truths, torch.bfloat16).over_allowed <= 1
    assert set(names) < set(CASES)
    for part in range(4):
        original = results[0]["grouped"][part].clone()
        results[0]["grouped"][part][2] *= 2
        assert errors(names, results, truths, torch.bfloat16).over_allowed > 1, part
        results[0]["grouped"][part] = torch.full_like(original, float("nan"))
        assert not errors(names, results, truths, torch.bfloat16).over_allowed <= 1, part
        results[0]["grouped"][part] = original
        plain = results[1]["plain"][part]
        kept = results[1]["grouped"][part]
        results[1]["grouped"][part] = (truths[1][part] + 4 * (plain.double() - truths[1][part])).bfloat16()
        assert errors(names, results, truths, torch.bfloat16).over_allowed > 1, part
        results[1]["grouped"][part] = kept
