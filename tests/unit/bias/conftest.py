"""Fixtures of the tests of bias sets."""

from __future__ import annotations

import pytest


@pytest.fixture
def file(tmp_path):
    """Write a file of these lines; gives its path."""

    def write(*lines: str, name: str = "file.txt") -> str:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
