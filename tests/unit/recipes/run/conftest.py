"""A tokenizer that the tests of what runs have read share."""

from __future__ import annotations

import pytest

from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import write_tokenizer
from tests.unit.recipes.run.contents_cases import SPECIAL


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("contents") / "plain", **SPECIAL))
