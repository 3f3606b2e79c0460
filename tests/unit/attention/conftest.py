"""Fixtures of the attention tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["levels", "one_call"])
def attention_plan(request) -> str:
    """Both forms of plan; what "auto" takes depends on the lengths."""
    return request.param
