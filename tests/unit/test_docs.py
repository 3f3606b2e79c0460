"""The documentation builds, its links lead somewhere, and the messages that it explains are the ones that are printed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= built


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in links if target and not (page.parent / target).exists()]
    named = re.findall(
        r"\b(?:recipes|tools|tests|nemo_configs|launch|benchmarks|megatron_ext|docs)/[\w./*-]+\.\w+\b", text
    )
    missing += [name for name in named if "*" not in name and "..." not in name and not (ROOT / name).exists()]
    assert not missing


def literals() -> str:
    """The literal text of every message in the source, ... for what is filled in."""
    found = []
    for folder in ("megatron_ext", "recipes", "tools", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_explained_messages_are_printed_somewhere():
    source, page = literals(), (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^`([^`]+)`$", page, re.M)
    assert len(quoted) >= 15
    for message in quoted:
        parts = [re.escape(part.strip()) for part in re.split(r"\.{3,}", message) if part.strip()]
        assert re.search(r".*".join(parts), source), message
