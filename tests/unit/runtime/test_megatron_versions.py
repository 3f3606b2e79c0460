"""What is kept from the log, newer versions of Megatron-Core still say: a filter for nothing would hide a change."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest

from megatron_ext.runtime.megatron_versions import KNOWN, VERSION


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.skipif(VERSION < (0, 19), reason="this megatron-core says nothing of itself")
def test_it_is_still_said(name):
    source = Path(importlib.util.find_spec(name).origin).read_text()
    text = re.sub(r'"\s*f?"', "", source)  # neighbouring literals are one
    assert KNOWN[name] in text


def test_nothing_else_is_kept_from_the_log(world, caplog):
    """Whoever starts the ranks: recipes, tools, a loop of one's own."""
    for name, known in KNOWN.items():
        with caplog.at_level(logging.WARNING, logger=name):
            logging.getLogger(name).warning("%s and so on", known)
            logging.getLogger(name).warning("that the gradient %s", known)
    assert [r.getMessage() for r in caplog.records] == [f"that the gradient {known}" for known in KNOWN.values()]
